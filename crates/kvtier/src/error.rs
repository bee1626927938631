//! What went wrong, by remedy.

use std::fmt;

/// The remedy for a failed call. The codes are fixed: they cross the wire and the C ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ErrorKind {
    /// Fix the call.
    Invalid = 1,
    /// Back off, or recompute.
    Busy = 2,
    /// Use another tier, or recompute.
    Unavailable = 3,
    /// Look up again.
    Stale = 4,
    /// The bytes failed their check: recompute.
    Corrupt = 5,
    /// The other side is gone: stop.
    Closed = 6,
    /// A rule of ours is broken: report a bug.
    Internal = 7,
    /// Wrong credentials.
    Denied = 8,
}

impl ErrorKind {
    /// The fixed code.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The kind with this code, if there is one.
    #[must_use]
    pub fn from_code(code: u8) -> Option<ErrorKind> {
        Some(match code {
            1 => ErrorKind::Invalid,
            2 => ErrorKind::Busy,
            3 => ErrorKind::Unavailable,
            4 => ErrorKind::Stale,
            5 => ErrorKind::Corrupt,
            6 => ErrorKind::Closed,
            7 => ErrorKind::Internal,
            8 => ErrorKind::Denied,
            _ => return None,
        })
    }

    /// The word that logs and JSON use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ErrorKind::Invalid => "invalid",
            ErrorKind::Busy => "busy",
            ErrorKind::Unavailable => "unavailable",
            ErrorKind::Stale => "stale",
            ErrorKind::Corrupt => "corrupt",
            ErrorKind::Closed => "closed",
            ErrorKind::Internal => "internal",
            ErrorKind::Denied => "denied",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}
