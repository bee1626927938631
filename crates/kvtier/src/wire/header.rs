use kvtier_core::LeaseId;

use super::array::Array;
use super::field::{Cursor, put_count, put_u32, put_u64};
use super::{DecodeError, EncodeError, Extensions, FRAME_BYTES_MAX, HEADER_BYTES, KEYS_MAX, Record};

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $code:literal,)*) => {
        /// What a frame is. The codes are fixed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Kind { $($(#[$doc])* $name = $code,)* }

        impl Kind {
            /// All of them.
            pub const ALL: &'static [Kind] = &[$(Kind::$name,)*];

            /// The kind with this code, if there is one.
            #[must_use]
            pub fn from_code(code: u16) -> Option<Kind> {
                match code {
                    $($code => Some(Kind::$name),)*
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    /// [`super::Request::Hello`]
    Hello = 0x0001,
    /// [`super::Request::OpenNamespace`]
    OpenNamespace = 0x0002,
    /// [`super::Request::Lookup`]
    Lookup = 0x0003,
    /// [`super::Request::Fetch`]
    Fetch = 0x0004,
    /// [`super::Request::Reserve`]
    Reserve = 0x0005,
    /// [`super::Request::Seal`]
    Seal = 0x0006,
    /// [`super::Request::Grant`]
    Grant = 0x0007,
    /// [`super::Request::Release`]
    Release = 0x0008,
    /// [`super::Request::Abandon`]
    Abandon = 0x0009,
    /// [`super::Request::Delete`]
    Delete = 0x000a,
    /// [`super::Request::Invalidate`]
    Invalidate = 0x000b,
    /// [`super::Request::Flush`]
    Flush = 0x000c,
    /// [`super::Request::Status`]
    Status = 0x000d,
    /// [`super::Request::Goodbye`]
    Goodbye = 0x000e,
    /// [`super::Request::Watch`]
    Watch = 0x000f,
    /// [`super::Request::Confirm`]
    Confirm = 0x0010,
    /// [`super::Request::Explain`]
    Explain = 0x0011,
    /// [`super::Request::Computed`]
    Computed = 0x0012,
    /// [`super::Request::Advise`]
    Advise = 0x0013,
    /// [`super::Reply::SegmentAdded`]
    SegmentAdded = 0x4001,
    /// [`super::Reply::SegmentRemoved`]
    SegmentRemoved = 0x4002,
    /// [`super::Reply::Welcome`]
    Welcome = 0x8001,
    /// [`super::Reply::NamespaceOpened`]
    NamespaceOpened = 0x8002,
    /// [`super::Reply::Found`]
    Found = 0x8003,
    /// [`super::Reply::Fetched`]
    Fetched = 0x8004,
    /// [`super::Reply::Reserved`]
    Reserved = 0x8005,
    /// [`super::Reply::Sealed`]
    Sealed = 0x8006,
    /// [`super::Reply::Granted`]
    Granted = 0x8007,
    /// [`super::Reply::Deleted`]
    Deleted = 0x800a,
    /// [`super::Reply::Invalidated`]
    Invalidated = 0x800b,
    /// [`super::Reply::Flushed`]
    Flushed = 0x800c,
    /// [`super::Reply::Status`]
    StatusReport = 0x800d,
    /// [`super::Reply::Farewell`]
    Farewell = 0x800e,
    /// [`super::Reply::Watched`]
    Watched = 0x800f,
    /// [`super::Reply::Confirmed`]
    Confirmed = 0x8010,
    /// [`super::Reply::Explained`]
    Explained = 0x8011,
    /// [`super::Reply::Counted`]
    Counted = 0x8012,
    /// [`super::Reply::Advised`]
    Advised = 0x8013,
    /// [`super::Reply::Error`]
    Error = 0xffff,
}

impl Kind {
    /// The fixed code.
    #[must_use]
    pub fn code(self) -> u16 {
        self as u16
    }

    /// Whether clients send it.
    #[must_use]
    pub fn is_request(self) -> bool {
        self.code() < 0x4000
    }
}

/// The 40 bytes in front of a frame. `kind` is kept as it came: an unknown one is refused with its frame, not with the stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Bytes after the header, leases included.
    pub length: u32,
    /// Code of a [`Kind`].
    pub kind: u16,
    /// Zero in this version; checked with the body.
    pub flags: u16,
    /// Chosen by the client, echoed in the reply; 0 in notices.
    pub request: u64,
    /// How long the client waits, microseconds; 0 lets the node choose.
    pub deadline_us: u64,
    /// The client's virtual time, nanoseconds; 0 unless the node runs on it.
    pub clock_ns: u64,
    /// Leases in front of the body.
    pub releases: u32,
    /// Zero in this version; checked with the body.
    pub reserved: u32,
}

impl Header {
    /// The header at the front of `bytes`; `None` while there are fewer than [`HEADER_BYTES`].
    ///
    /// # Errors
    /// A length or a number of leases over its limit. The stream is lost then.
    pub fn decode(bytes: &[u8]) -> Result<Option<Header>, DecodeError> {
        let Some(bytes) = bytes.get(..HEADER_BYTES) else {
            return Ok(None);
        };
        let mut cursor = Cursor(bytes);
        let header = Header {
            length: cursor.u32("header")?,
            kind: cursor.u16("header")?,
            flags: cursor.u16("header")?,
            request: cursor.u64("header")?,
            deadline_us: cursor.u64("header")?,
            clock_ns: cursor.u64("header")?,
            releases: cursor.u32("header")?,
            reserved: cursor.u32("header")?,
        };
        if header.body_bytes() > FRAME_BYTES_MAX {
            return Err(DecodeError::FrameTooLong { length: header.length });
        }
        let releases = usize::try_from(header.releases).unwrap_or(usize::MAX);
        if releases > KEYS_MAX || releases * LeaseId::BYTES > header.body_bytes() {
            return Err(DecodeError::Releases { count: header.releases });
        }
        Ok(Some(header))
    }

    /// Bytes of the whole frame, header included.
    #[must_use]
    pub fn frame_bytes(&self) -> usize {
        HEADER_BYTES + self.body_bytes()
    }

    fn body_bytes(&self) -> usize {
        usize::try_from(self.length).unwrap_or(usize::MAX - HEADER_BYTES)
    }

    /// What both kinds of message check before their body.
    pub(super) fn check(&self) -> Result<Kind, DecodeError> {
        for (field, value) in [("flags", u32::from(self.flags)), ("reserved", self.reserved)] {
            if value != 0 {
                return Err(DecodeError::NotZero { field });
            }
        }
        Kind::from_code(self.kind).ok_or(DecodeError::UnknownKind { kind: self.kind })
    }
}

/// One whole frame, borrowed from the bytes that were received.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Frame<'a> {
    /// Its header.
    pub header: Header,
    /// Leases that the client gives back.
    pub releases: Array<'a, LeaseId>,
    /// For [`super::Request::decode`] or [`super::Reply::decode`].
    pub body: &'a [u8],
}

impl<'a> Frame<'a> {
    /// The frame at the front of `bytes`; `None` while it is not whole.
    ///
    /// # Errors
    /// As [`Header::decode`].
    pub fn decode(bytes: &'a [u8]) -> Result<Option<Frame<'a>>, DecodeError> {
        let Some(header) = Header::decode(bytes)? else {
            return Ok(None);
        };
        let Some(rest) = bytes.get(HEADER_BYTES..header.frame_bytes()) else {
            return Ok(None);
        };
        let mut cursor = Cursor(rest);
        let count = usize::try_from(header.releases).unwrap_or(usize::MAX);
        let releases = cursor.records(count, "releases")?;
        Ok(Some(Frame {
            header,
            releases,
            body: cursor.0,
        }))
    }
}

/// What goes around a message: the header's fields that the sender chooses, leases and extensions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Envelope<'a> {
    /// Chosen by the client, echoed in the reply.
    pub request: u64,
    /// How long the client waits, microseconds; 0 lets the node choose.
    pub deadline_us: u64,
    /// The client's virtual time, nanoseconds.
    pub clock_ns: u64,
    /// Leases to give back.
    pub releases: Array<'a, LeaseId>,
    /// Hints and what a later version added.
    pub extensions: Extensions<'a>,
}

impl Envelope<'_> {
    /// Appends a frame whose body `write` appends. On an error `target` is as it was.
    pub(super) fn wrap(
        &self,
        kind: Kind,
        target: &mut Vec<u8>,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
    ) -> Result<(), EncodeError> {
        let start = target.len();
        let result = self.append(kind, start, target, write);
        if result.is_err() {
            target.truncate(start);
        }
        result
    }

    fn append(
        &self,
        kind: Kind,
        start: usize,
        target: &mut Vec<u8>,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
    ) -> Result<(), EncodeError> {
        self.releases.check("releases")?;
        put_u32(0, target);
        target.extend_from_slice(&kind.code().to_le_bytes());
        target.extend_from_slice(&[0, 0]);
        for value in [self.request, self.deadline_us, self.clock_ns] {
            put_u64(value, target);
        }
        put_count(self.releases.len(), target);
        put_u32(0, target);
        self.releases.write_records(target);
        write(target)?;
        self.extensions.encode(target);
        let length = target.len() - start - HEADER_BYTES;
        let field = u32::try_from(length).ok().filter(|_| length <= FRAME_BYTES_MAX);
        let field = field.ok_or(EncodeError::FrameTooLong { length })?;
        target[start..start + 4].copy_from_slice(&field.to_le_bytes());
        Ok(())
    }
}
