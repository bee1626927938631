use kvtier_core::{ClientId, Extent, Fetched, Generation, ReservationId, Reserved, Sealed, SegmentId, Tier};

use super::array::Array;
use super::field::{Cursor, put_bytes, put_u32, put_u64};
use super::{DecodeError, EncodeError, Envelope, Extensions, FRAME_BYTES_MAX, Header, Kind, MESSAGE_BYTES_MAX};
use crate::ErrorKind;

/// A slot granted ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// To seal or abandon.
    pub reservation: ReservationId,
    /// Where in host memory; its length is the one asked for.
    pub extent: Extent,
}

/// What a node says first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Welcome {
    /// The version spoken from here on.
    pub version: u16,
    /// The node's clock is the largest `clock_ns` that a client sent: a test mode.
    pub client_clock: bool,
    /// Most keys in one message.
    pub batch_keys_max: u32,
    /// Largest block.
    pub block_bytes_max: u32,
    /// Who the client is, for logs.
    pub client: ClientId,
    /// How long a lease promises.
    pub lease_ttl_ms: u64,
    /// How long an unsealed slot lives.
    pub reservation_ttl_ms: u64,
}

/// What a node says: one reply to a request, or a notice of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reply<'a> {
    /// To `Hello`.
    Welcome(Welcome),
    /// To `OpenNamespace`.
    NamespaceOpened {
        /// Names it on this connection.
        handle: u32,
        /// In force now.
        generation: Generation,
    },
    /// To `Lookup`.
    Found {
        /// In force now.
        generation: Generation,
        /// One per key.
        tiers: Array<'a, Option<Tier>>,
    },
    /// To `Fetch`.
    Fetched {
        /// In force now.
        generation: Generation,
        /// One per key.
        outcomes: Array<'a, Fetched>,
    },
    /// To `Reserve`.
    Reserved {
        /// In force now: what to seal with.
        generation: Generation,
        /// One per key.
        outcomes: Array<'a, Reserved>,
    },
    /// To `Seal`.
    Sealed {
        /// In force now.
        generation: Generation,
        /// One per item.
        outcomes: Array<'a, Sealed>,
        /// Slots ahead; may be fewer than asked for.
        granted: Array<'a, Slot>,
    },
    /// To `Grant`.
    Granted {
        /// May be fewer than asked for.
        slots: Array<'a, Slot>,
    },
    /// To `Delete`.
    Deleted {
        /// In force now.
        generation: Generation,
        /// One per key: whether it was there.
        removed: Array<'a, bool>,
    },
    /// To `Invalidate`, once it is durable.
    Invalidated {
        /// In force now.
        generation: Generation,
    },
    /// To `Flush`.
    Flushed {
        /// Blocks that were written for it.
        written: u64,
        /// Blocks that could not be.
        left_out: u64,
    },
    /// To `Status`.
    Status {
        /// A JSON object.
        json: &'a str,
    },
    /// To `Goodbye`.
    Farewell,
    /// To `Watch`.
    Watched {
        /// To ask with next.
        sequence: u64,
        /// A JSON array: name and generation of every namespace of the domain that was ever invalidated.
        json: &'a str,
    },
    /// To `Confirm`.
    Confirmed {
        /// In force now.
        generation: Generation,
    },
    /// To `Explain`.
    Explained {
        /// A JSON object.
        json: &'a str,
    },
    /// To `Computed`.
    Counted,
    /// To `Advise`.
    Advised {
        /// How many of the keys' blocks are cached here.
        blocks: u32,
    },
    /// To anything.
    Error {
        /// The remedy.
        kind: ErrorKind,
        /// In words.
        message: &'a str,
    },
    /// A notice: one descriptor came beside it.
    SegmentAdded {
        /// Named by extents from here on.
        segment: SegmentId,
        /// Its size.
        bytes: u64,
    },
    /// A notice: nothing will name it any more.
    SegmentRemoved {
        /// Which.
        segment: SegmentId,
    },
}

impl<'a> Reply<'a> {
    /// The reply or notice of a frame, and its extensions.
    ///
    /// # Errors
    /// The first broken rule.
    pub fn decode(header: &Header, body: &'a [u8]) -> Result<(Reply<'a>, Extensions<'a>), DecodeError> {
        let kind = header.check()?;
        let unused = [
            ("deadline_us of a reply", header.deadline_us),
            ("clock_ns of a reply", header.clock_ns),
            ("releases of a reply", header.releases.into()),
        ];
        for (field, value) in unused {
            if value != 0 {
                return Err(DecodeError::NotZero { field });
            }
        }
        let mut cursor = Cursor(body);
        let reply = Reply::decode_body(kind, &mut cursor)?;
        Ok((reply, Extensions::decode(cursor.0)?))
    }

    fn decode_body(kind: Kind, cursor: &mut Cursor<'a>) -> Result<Reply<'a>, DecodeError> {
        Ok(match kind {
            Kind::Welcome => Reply::Welcome(decode_welcome(cursor)?),
            Kind::NamespaceOpened => {
                let handle = cursor.u32("handle")?;
                cursor.zero::<4>("padding of namespace")?;
                Reply::NamespaceOpened {
                    handle,
                    generation: Generation(cursor.u64("generation")?),
                }
            }
            Kind::Found => Reply::Found {
                generation: Generation(cursor.u64("generation")?),
                tiers: cursor.array("tiers")?,
            },
            Kind::Fetched => Reply::Fetched {
                generation: Generation(cursor.u64("generation")?),
                outcomes: cursor.array("fetched")?,
            },
            Kind::Reserved => Reply::Reserved {
                generation: Generation(cursor.u64("generation")?),
                outcomes: cursor.array("reserved")?,
            },
            Kind::Sealed => Reply::Sealed {
                generation: Generation(cursor.u64("generation")?),
                outcomes: cursor.array("sealed")?,
                granted: cursor.array("granted")?,
            },
            Kind::Granted => Reply::Granted {
                slots: cursor.array("slots")?,
            },
            Kind::Deleted => Reply::Deleted {
                generation: Generation(cursor.u64("generation")?),
                removed: cursor.array("removed")?,
            },
            Kind::Invalidated => Reply::Invalidated {
                generation: Generation(cursor.u64("generation")?),
            },
            Kind::Flushed => Reply::Flushed {
                written: cursor.u64("written")?,
                left_out: cursor.u64("left_out")?,
            },
            Kind::StatusReport => Reply::Status {
                json: cursor.text("json", 0, FRAME_BYTES_MAX)?,
            },
            Kind::Farewell => Reply::Farewell,
            Kind::Watched => Reply::Watched {
                sequence: cursor.u64("sequence")?,
                json: cursor.text("json", 0, FRAME_BYTES_MAX)?,
            },
            Kind::Confirmed => Reply::Confirmed {
                generation: Generation(cursor.u64("generation")?),
            },
            Kind::Explained => Reply::Explained {
                json: cursor.text("json", 0, FRAME_BYTES_MAX)?,
            },
            Kind::Counted => Reply::Counted,
            Kind::Advised => {
                let blocks = cursor.u32("blocks")?;
                cursor.zero::<4>("padding of advised")?;
                Reply::Advised { blocks }
            }
            Kind::Error => {
                let code = cursor.u32("error kind")?;
                let kind = u8::try_from(code).ok().and_then(ErrorKind::from_code);
                Reply::Error {
                    kind: kind.ok_or(DecodeError::UnknownCode {
                        field: "error kind",
                        code,
                    })?,
                    message: cursor.text("message", 0, MESSAGE_BYTES_MAX)?,
                }
            }
            Kind::SegmentAdded => {
                let segment = SegmentId(cursor.u32("segment")?);
                cursor.zero::<4>("padding of segment")?;
                Reply::SegmentAdded {
                    segment,
                    bytes: cursor.u64("bytes")?,
                }
            }
            Kind::SegmentRemoved => Reply::SegmentRemoved {
                segment: SegmentId(cursor.u32("segment")?),
            },
            kind => return Err(DecodeError::UnknownKind { kind: kind.code() }),
        })
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Reply::Welcome(_) => Kind::Welcome,
            Reply::NamespaceOpened { .. } => Kind::NamespaceOpened,
            Reply::Found { .. } => Kind::Found,
            Reply::Fetched { .. } => Kind::Fetched,
            Reply::Reserved { .. } => Kind::Reserved,
            Reply::Sealed { .. } => Kind::Sealed,
            Reply::Granted { .. } => Kind::Granted,
            Reply::Deleted { .. } => Kind::Deleted,
            Reply::Invalidated { .. } => Kind::Invalidated,
            Reply::Flushed { .. } => Kind::Flushed,
            Reply::Status { .. } => Kind::StatusReport,
            Reply::Farewell => Kind::Farewell,
            Reply::Watched { .. } => Kind::Watched,
            Reply::Confirmed { .. } => Kind::Confirmed,
            Reply::Explained { .. } => Kind::Explained,
            Reply::Counted => Kind::Counted,
            Reply::Advised { .. } => Kind::Advised,
            Reply::Error { .. } => Kind::Error,
            Reply::SegmentAdded { .. } => Kind::SegmentAdded,
            Reply::SegmentRemoved { .. } => Kind::SegmentRemoved,
        }
    }

    /// Whether no request asked for it.
    #[must_use]
    pub fn is_notice(&self) -> bool {
        matches!(self, Reply::SegmentAdded { .. } | Reply::SegmentRemoved { .. })
    }

    /// Appends the frame that answers `request` (0 for a notice) to `target`.
    ///
    /// # Errors
    /// Something is over its limit; `target` is as it was.
    pub fn encode(&self, request: u64, target: &mut Vec<u8>) -> Result<(), EncodeError> {
        self.encode_with(request, Extensions::default(), target)
    }

    /// As [`Reply::encode`], with extensions behind the body.
    ///
    /// # Errors
    /// Something is over its limit; `target` is as it was.
    pub fn encode_with(
        &self,
        request: u64,
        extensions: Extensions<'_>,
        target: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let envelope = Envelope {
            request,
            extensions,
            ..Envelope::default()
        };
        envelope.wrap(self.kind(), target, |target| self.encode_body(target))
    }

    fn encode_body(&self, target: &mut Vec<u8>) -> Result<(), EncodeError> {
        match *self {
            Reply::Welcome(welcome) => encode_welcome(&welcome, target),
            Reply::NamespaceOpened { handle, generation } => {
                put_u32(handle, target);
                put_u32(0, target);
                put_u64(generation.0, target);
            }
            Reply::Found { generation, tiers } => {
                put_u64(generation.0, target);
                tiers.encode("tiers", target)?;
            }
            Reply::Fetched { generation, outcomes } => {
                put_u64(generation.0, target);
                outcomes.encode("fetched", target)?;
            }
            Reply::Reserved { generation, outcomes } => {
                put_u64(generation.0, target);
                outcomes.encode("reserved", target)?;
            }
            Reply::Sealed {
                generation,
                outcomes,
                granted,
            } => {
                put_u64(generation.0, target);
                outcomes.encode("sealed", target)?;
                granted.encode("granted", target)?;
            }
            Reply::Granted { slots } => slots.encode("slots", target)?,
            Reply::Deleted { generation, removed } => {
                put_u64(generation.0, target);
                removed.encode("removed", target)?;
            }
            Reply::Invalidated { generation } => put_u64(generation.0, target),
            Reply::Flushed { written, left_out } => {
                put_u64(written, target);
                put_u64(left_out, target);
            }
            Reply::Status { json } | Reply::Explained { json } => {
                put_bytes(json.as_bytes(), "json", (0, FRAME_BYTES_MAX), target)?
            }
            Reply::Farewell | Reply::Counted => {}
            Reply::Advised { blocks } => {
                put_u32(blocks, target);
                put_u32(0, target);
            }
            Reply::Watched { sequence, json } => {
                put_u64(sequence, target);
                put_bytes(json.as_bytes(), "json", (0, FRAME_BYTES_MAX), target)?;
            }
            Reply::Confirmed { generation } => put_u64(generation.0, target),
            Reply::Error { kind, message } => {
                put_u32(kind.code().into(), target);
                put_bytes(message.as_bytes(), "message", (0, MESSAGE_BYTES_MAX), target)?;
            }
            Reply::SegmentAdded { segment, bytes } => {
                put_u32(segment.0, target);
                put_u32(0, target);
                put_u64(bytes, target);
            }
            Reply::SegmentRemoved { segment } => put_u32(segment.0, target),
        }
        Ok(())
    }
}

fn decode_welcome(cursor: &mut Cursor<'_>) -> Result<Welcome, DecodeError> {
    let version = cursor.u16("version")?;
    let client_clock = match cursor.u16("client_clock")? {
        0 => false,
        1 => true,
        code => {
            return Err(DecodeError::UnknownCode {
                field: "client_clock",
                code: code.into(),
            });
        }
    };
    let batch_keys_max = cursor.u32("batch_keys_max")?;
    let block_bytes_max = cursor.u32("block_bytes_max")?;
    cursor.zero::<4>("padding of welcome")?;
    Ok(Welcome {
        version,
        client_clock,
        batch_keys_max,
        block_bytes_max,
        client: ClientId(cursor.u64("client")?),
        lease_ttl_ms: cursor.u64("lease_ttl_ms")?,
        reservation_ttl_ms: cursor.u64("reservation_ttl_ms")?,
    })
}

fn encode_welcome(welcome: &Welcome, target: &mut Vec<u8>) {
    target.extend_from_slice(&welcome.version.to_le_bytes());
    target.extend_from_slice(&u16::from(welcome.client_clock).to_le_bytes());
    for value in [welcome.batch_keys_max, welcome.block_bytes_max, 0] {
        put_u32(value, target);
    }
    for value in [welcome.client.0, welcome.lease_ttl_ms, welcome.reservation_ttl_ms] {
        put_u64(value, target);
    }
}
