use std::io;

use kvtier_transfer::memory::{CopyError, MemoryError};

use crate::ErrorKind;
use crate::wire::{DecodeError, EncodeError};

/// A call that was not carried out: the remedy as a kind, and in words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: {message}")]
pub struct ClientError {
    /// What to do about it.
    pub kind: ErrorKind,
    /// What happened, and what to do next.
    pub message: String,
}

impl ClientError {
    pub(super) fn new(kind: ErrorKind, message: impl Into<String>) -> ClientError {
        ClientError {
            kind,
            message: message.into(),
        }
    }

    pub(super) fn invalid(message: impl Into<String>) -> ClientError {
        ClientError::new(ErrorKind::Invalid, message)
    }

    pub(super) fn closed(message: impl Into<String>) -> ClientError {
        ClientError::new(ErrorKind::Closed, message)
    }

    /// The node broke the protocol.
    pub(super) fn protocol(message: impl std::fmt::Display) -> ClientError {
        ClientError::new(
            ErrorKind::Internal,
            format!(
                "the node broke the protocol ({message}): check that it is a kv-daemon of this version, and report a bug"
            ),
        )
    }

    pub(super) fn forked() -> ClientError {
        ClientError::closed("this client was connected before a fork: connect again in the child")
    }

    pub(super) fn lost(error: &io::Error) -> ClientError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::late(),
            io::ErrorKind::InvalidData => ClientError::protocol(error),
            _ => ClientError::new(
                ErrorKind::Unavailable,
                format!("the connection is lost ({error}): recompute; the next call connects again"),
            ),
        }
    }

    pub(super) fn late() -> ClientError {
        ClientError::new(
            ErrorKind::Unavailable,
            "the node did not answer in time: recompute; the next call connects again (a longer `timeout` waits longer)",
        )
    }

    pub(crate) fn unanswered() -> ClientError {
        ClientError::new(
            ErrorKind::Unavailable,
            "the connection was closed before the answer: recompute; the next call connects again",
        )
    }
}

impl From<DecodeError> for ClientError {
    fn from(error: DecodeError) -> Self {
        ClientError::protocol(error)
    }
}

impl From<EncodeError> for ClientError {
    fn from(error: EncodeError) -> Self {
        ClientError::invalid(error.to_string())
    }
}

impl From<CopyError> for ClientError {
    fn from(error: CopyError) -> Self {
        ClientError::invalid(error.to_string())
    }
}

impl From<MemoryError> for ClientError {
    fn from(error: MemoryError) -> Self {
        ClientError::new(ErrorKind::Unavailable, format!("cannot map the node's memory: {error}"))
    }
}
