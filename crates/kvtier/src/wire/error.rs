/// Why bytes are not a message. Each broken rule has its own name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The header announces more than [`super::FRAME_BYTES_MAX`].
    #[error("a frame of {length} bytes is over the limit of 1 MiB")]
    FrameTooLong {
        /// Announced.
        length: u32,
    },
    /// More leases in front of the body than fit the frame or the limit.
    #[error("{count} leases do not fit in front of the body")]
    Releases {
        /// Announced.
        count: u32,
    },
    /// A field that must be zero is not.
    #[error("{field} must be zero")]
    NotZero {
        /// Which.
        field: &'static str,
    },
    /// No request, reply or notice has this kind.
    #[error("unknown kind {kind:#06x}")]
    UnknownKind {
        /// As received.
        kind: u16,
    },
    /// The body ends inside a field.
    #[error("the body ends inside {field}")]
    Truncated {
        /// Which.
        field: &'static str,
    },
    /// An array announces more records than the limit.
    #[error("{count} records in {field}: at most {max}")]
    TooMany {
        /// Which array.
        field: &'static str,
        /// Announced.
        count: u32,
        /// The limit.
        max: usize,
    },
    /// A name, token or message is longer than its limit, or empty where it must not be.
    #[error("{field} of {length} bytes: at most {max}, and a name is not empty")]
    BadLength {
        /// Which.
        field: &'static str,
        /// Announced.
        length: u32,
        /// The limit.
        max: usize,
    },
    /// A code that stands for nothing.
    #[error("{code} is no {field}")]
    UnknownCode {
        /// Which field.
        field: &'static str,
        /// As received.
        code: u32,
    },
    /// Text that is not UTF-8.
    #[error("{field} is not UTF-8")]
    NotText {
        /// Which.
        field: &'static str,
    },
    /// An extension's tag does not rise, or a known tag has the wrong length.
    #[error("extension {tag} is out of order or has the wrong length")]
    BadExtension {
        /// Its tag.
        tag: u16,
    },
}

impl DecodeError {
    /// Whether the stream is lost: where the next frame starts is unknown. Otherwise only this frame is refused.
    #[must_use]
    pub fn is_fatal(self) -> bool {
        matches!(self, DecodeError::FrameTooLong { .. } | DecodeError::Releases { .. })
    }
}

/// Why a message cannot be sent: it is over a limit. Nothing was appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// More records than [`super::KEYS_MAX`]: send several messages.
    #[error("{count} records in {field}: send at most {max} in one message", max = super::KEYS_MAX)]
    TooMany {
        /// Which array.
        field: &'static str,
        /// Given.
        count: usize,
    },
    /// A name, token or message over its limit, or an empty name.
    #[error("{field} of {length} bytes: at most {max}, and a name is not empty")]
    BadLength {
        /// Which.
        field: &'static str,
        /// Given.
        length: usize,
        /// The limit.
        max: usize,
    },
    /// Two arrays that must have the same length have not.
    #[error("{field}: one for each key, please")]
    Unequal {
        /// Which.
        field: &'static str,
    },
    /// The whole would be longer than [`super::FRAME_BYTES_MAX`].
    #[error("a frame of {length} bytes is over the limit of 1 MiB: send several")]
    FrameTooLong {
        /// Bytes after the header.
        length: usize,
    },
}
