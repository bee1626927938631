use kvtier_core::{BlockHash, FetchScope, Generation, Parent, Realization, ReservationId, SealItem};

use super::array::Array;
use super::field::{Cursor, parent_code, parent_of, put_bytes, put_u32, put_u64};
use super::{DecodeError, EncodeError, Envelope, Extensions, Header, Kind, NAME_BYTES_MAX, TOKEN_BYTES_MAX};

/// How the keys of a batch hang together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lineage {
    /// In prefix order: each is the parent of the next; the first one's parent is given.
    Chain(Parent),
    /// Nothing is known: every parent is unknown.
    Independent,
}

impl Default for Lineage {
    fn default() -> Self {
        Lineage::Chain(Parent::Unknown)
    }
}

impl From<Parent> for Lineage {
    fn from(parent: Parent) -> Self {
        Lineage::Chain(parent)
    }
}

/// A batch of keys of one namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Keys<'a> {
    /// From [`super::Reply::NamespaceOpened`].
    pub handle: u32,
    /// How they hang together.
    pub lineage: Lineage,
    /// Their hashes, at most [`super::KEYS_MAX`].
    pub hashes: Array<'a, BlockHash>,
}

impl<'a> Keys<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Keys<'a>, DecodeError> {
        let handle = cursor.u32("handle")?;
        let code = cursor.u32("lineage")?;
        let parent = cursor.hash("parent")?;
        let lineage = match code {
            3 if parent == BlockHash::default() => Lineage::Independent,
            3 => {
                return Err(DecodeError::NotZero {
                    field: "parent that is not there",
                });
            }
            code => Lineage::Chain(parent_of(code, parent)?),
        };
        Ok(Keys {
            handle,
            lineage,
            hashes: cursor.array("hashes")?,
        })
    }

    fn encode(&self, target: &mut Vec<u8>) -> Result<(), EncodeError> {
        let (code, parent) = match self.lineage {
            Lineage::Chain(parent) => parent_code(parent),
            Lineage::Independent => (3, BlockHash::default()),
        };
        put_u32(self.handle, target);
        put_u32(code, target);
        target.extend_from_slice(&parent.0);
        self.hashes.encode("hashes", target)
    }
}

/// Slots to grant ahead: the next puts of this length then take one trip. A count of 0 asks for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ahead {
    /// Bytes of each.
    pub length: u32,
    /// How many.
    pub count: u32,
}

/// What a client says of the session whose prompt it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AdviceKind {
    /// It is over.
    Closed,
    /// Its blocks are to stay for a time.
    Pinned,
    /// An agent works on it and will ask again within a time.
    Expected,
    /// The prompt has been answered.
    Answered,
}

/// What a client asks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Request<'a> {
    /// First on every connection. Answered with [`super::Reply::Welcome`].
    Hello {
        /// Oldest version spoken.
        version_min: u16,
        /// Newest version spoken.
        version_max: u16,
        /// Names a trust domain; empty: the peer's uid does.
        token: &'a [u8],
    },
    /// Answered with [`super::Reply::NamespaceOpened`].
    OpenNamespace {
        /// Its name in the client's trust domain.
        name: &'a str,
        /// The form of the bytes.
        realization: Realization,
    },
    /// Which keys are cached, and where. Answered with [`super::Reply::Found`].
    Lookup(Keys<'a>),
    /// Lease. Answered with [`super::Reply::Fetched`].
    Fetch {
        /// Which are worth reading.
        scope: FetchScope,
        /// What.
        keys: Keys<'a>,
    },
    /// Slots for the keys that are absent. Answered with [`super::Reply::Reserved`].
    Reserve {
        /// What.
        keys: Keys<'a>,
        /// Bytes of each.
        lengths: Array<'a, u32>,
    },
    /// Publish. Answered with [`super::Reply::Sealed`].
    Seal {
        /// From [`super::Reply::NamespaceOpened`].
        handle: u32,
        /// The generation under which the bytes were made.
        generation: Generation,
        /// Slots to grant with the answer.
        ahead: Ahead,
        /// What.
        items: Array<'a, SealItem>,
    },
    /// Slots ahead. Answered with [`super::Reply::Granted`].
    Grant(Ahead),
    /// Gives back the leases in front. Not answered.
    Release,
    /// Gives back slots unsealed. Not answered.
    Abandon {
        /// Which.
        reservations: Array<'a, ReservationId>,
    },
    /// Forget keys. Answered with [`super::Reply::Deleted`].
    Delete(Keys<'a>),
    /// Raise a namespace's generation. Answered with [`super::Reply::Invalidated`].
    Invalidate {
        /// Its name in the client's trust domain.
        name: &'a str,
    },
    /// Make everything sealed so far durable. Answered with [`super::Reply::Flushed`].
    Flush,
    /// Answered with [`super::Reply::Status`].
    Status,
    /// Which namespaces of the client's trust domain were ever invalidated. Answered with [`super::Reply::Watched`]: at once
    /// when something changed since the sequence given, else when it does, or when the time is over.
    Watch {
        /// From the last answer; 0 at first.
        since: u64,
        /// How long to wait, at most [`super::WATCH_MS_MAX`].
        wait_ms: u32,
    },
    /// A cache says that of generations of a namespace before this one it holds nothing. Answered with
    /// [`super::Reply::Confirmed`].
    Confirm {
        /// At most the one in force.
        generation: Generation,
        /// The namespace's name in the client's trust domain.
        name: &'a str,
        /// What the cache is called.
        processor: &'a str,
    },
    /// What would be decided about fetching keys from elsewhere, term by term; decides nothing. Answered with
    /// [`super::Reply::Explained`].
    Explain(Keys<'a>),
    /// An engine says how long it computed: what recomputing takes is learned from it. Answered with [`super::Reply::Counted`].
    Computed {
        /// Of the prompt.
        tokens: u32,
        /// Those in front of them, whose keys and values it had.
        before_tokens: u32,
        /// On the GPU, waiting not counted.
        took_us: u64,
    },
    /// What becomes of the session that these keys are the prompt of. Answered with [`super::Reply::Advised`].
    Advise {
        /// What will.
        advice: AdviceKind,
        /// For how long that counts, milliseconds, at most [`super::ADVICE_MS_MAX`]; 0 behind [`AdviceKind::Closed`], and elsewhere takes
        /// back what was said. Behind [`AdviceKind::Answered`] the tokens of the answer.
        amount: u32,
        /// The prompt.
        keys: Keys<'a>,
    },
    /// The client touches nothing any more. Answered with [`super::Reply::Farewell`].
    Goodbye,
}

impl<'a> Request<'a> {
    /// The request of a frame, and its extensions.
    ///
    /// # Errors
    /// The first broken rule. Only this frame is refused, see [`DecodeError::is_fatal`].
    pub fn decode(header: &Header, body: &'a [u8]) -> Result<(Request<'a>, Extensions<'a>), DecodeError> {
        let kind = header.check()?;
        let mut cursor = Cursor(body);
        let request = Request::decode_body(kind, &mut cursor)?;
        Ok((request, Extensions::decode(cursor.0)?))
    }

    fn decode_body(kind: Kind, cursor: &mut Cursor<'a>) -> Result<Request<'a>, DecodeError> {
        Ok(match kind {
            Kind::Hello => Request::Hello {
                version_min: cursor.u16("version_min")?,
                version_max: cursor.u16("version_max")?,
                token: cursor.bytes("token", 0, TOKEN_BYTES_MAX)?,
            },
            Kind::OpenNamespace => Request::OpenNamespace {
                realization: Realization(cursor.fixed("realization")?),
                name: cursor.text("name", 1, NAME_BYTES_MAX)?,
            },
            Kind::Lookup => Request::Lookup(Keys::decode(cursor)?),
            Kind::Fetch => {
                let scope = match cursor.u32("scope")? {
                    0 => FetchScope::Prefix,
                    1 => FetchScope::Each,
                    code => return Err(DecodeError::UnknownCode { field: "scope", code }),
                };
                Request::Fetch {
                    scope,
                    keys: Keys::decode(cursor)?,
                }
            }
            Kind::Reserve => {
                let keys = Keys::decode(cursor)?;
                Request::Reserve {
                    keys,
                    lengths: cursor.records(keys.hashes.len(), "lengths")?,
                }
            }
            Kind::Seal => {
                let handle = cursor.u32("handle")?;
                let ahead = Ahead {
                    length: cursor.u32("ahead")?,
                    count: cursor.u32("ahead")?,
                };
                cursor.zero::<4>("padding of seal")?;
                let generation = Generation(cursor.u64("generation")?);
                Request::Seal {
                    handle,
                    generation,
                    ahead,
                    items: cursor.array("items")?,
                }
            }
            Kind::Grant => Request::Grant(Ahead {
                length: cursor.u32("ahead")?,
                count: cursor.u32("ahead")?,
            }),
            Kind::Release => Request::Release,
            Kind::Abandon => Request::Abandon {
                reservations: cursor.array("reservations")?,
            },
            Kind::Delete => Request::Delete(Keys::decode(cursor)?),
            Kind::Invalidate => Request::Invalidate {
                name: cursor.text("name", 1, NAME_BYTES_MAX)?,
            },
            Kind::Flush => Request::Flush,
            Kind::Status => Request::Status,
            Kind::Goodbye => Request::Goodbye,
            Kind::Watch => {
                let since = cursor.u64("since")?;
                let wait_ms = cursor.u32("wait_ms")?;
                cursor.zero::<4>("padding of watch")?;
                Request::Watch { since, wait_ms }
            }
            Kind::Confirm => Request::Confirm {
                generation: Generation(cursor.u64("generation")?),
                name: cursor.text("name", 1, NAME_BYTES_MAX)?,
                processor: cursor.text("processor", 1, NAME_BYTES_MAX)?,
            },
            Kind::Explain => Request::Explain(Keys::decode(cursor)?),
            Kind::Computed => Request::Computed {
                tokens: cursor.u32("tokens")?,
                before_tokens: cursor.u32("before_tokens")?,
                took_us: cursor.u64("took_us")?,
            },
            Kind::Advise => {
                let advice = match cursor.u32("advice")? {
                    0 => AdviceKind::Closed,
                    1 => AdviceKind::Pinned,
                    2 => AdviceKind::Expected,
                    3 => AdviceKind::Answered,
                    code => return Err(DecodeError::UnknownCode { field: "advice", code }),
                };
                let amount = cursor.u32("amount of advice")?;
                if advice == AdviceKind::Closed && amount != 0 {
                    return Err(DecodeError::NotZero {
                        field: "time of what is over",
                    });
                }
                Request::Advise {
                    advice,
                    amount,
                    keys: Keys::decode(cursor)?,
                }
            }
            kind => return Err(DecodeError::UnknownKind { kind: kind.code() }),
        })
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Request::Hello { .. } => Kind::Hello,
            Request::OpenNamespace { .. } => Kind::OpenNamespace,
            Request::Lookup(_) => Kind::Lookup,
            Request::Fetch { .. } => Kind::Fetch,
            Request::Reserve { .. } => Kind::Reserve,
            Request::Seal { .. } => Kind::Seal,
            Request::Grant(_) => Kind::Grant,
            Request::Release => Kind::Release,
            Request::Abandon { .. } => Kind::Abandon,
            Request::Delete(_) => Kind::Delete,
            Request::Invalidate { .. } => Kind::Invalidate,
            Request::Flush => Kind::Flush,
            Request::Status => Kind::Status,
            Request::Goodbye => Kind::Goodbye,
            Request::Watch { .. } => Kind::Watch,
            Request::Confirm { .. } => Kind::Confirm,
            Request::Explain(_) => Kind::Explain,
            Request::Computed { .. } => Kind::Computed,
            Request::Advise { .. } => Kind::Advise,
        }
    }

    /// Whether the node answers it: all but [`Request::Release`] and [`Request::Abandon`].
    #[must_use]
    pub fn is_answered(&self) -> bool {
        !matches!(self, Request::Release | Request::Abandon { .. })
    }

    /// Appends the frame to `target`.
    ///
    /// # Errors
    /// Something is over its limit; `target` is as it was.
    pub fn encode(&self, envelope: &Envelope<'_>, target: &mut Vec<u8>) -> Result<(), EncodeError> {
        envelope.wrap(self.kind(), target, |target| self.encode_body(target))
    }

    fn encode_body(&self, target: &mut Vec<u8>) -> Result<(), EncodeError> {
        match *self {
            Request::Hello {
                version_min,
                version_max,
                token,
            } => {
                target.extend_from_slice(&version_min.to_le_bytes());
                target.extend_from_slice(&version_max.to_le_bytes());
                put_bytes(token, "token", (0, TOKEN_BYTES_MAX), target)
            }
            Request::OpenNamespace { name, realization } => {
                target.extend_from_slice(&realization.0);
                put_bytes(name.as_bytes(), "name", (1, NAME_BYTES_MAX), target)
            }
            Request::Lookup(keys) | Request::Delete(keys) | Request::Explain(keys) => keys.encode(target),
            Request::Fetch { scope, keys } => {
                put_u32(u32::from(scope == FetchScope::Each), target);
                keys.encode(target)
            }
            Request::Reserve { keys, lengths } => {
                if lengths.len() != keys.hashes.len() {
                    return Err(EncodeError::Unequal { field: "lengths" });
                }
                keys.encode(target)?;
                lengths.write_records(target);
                Ok(())
            }
            Request::Seal {
                handle,
                generation,
                ahead,
                items,
            } => {
                for value in [handle, ahead.length, ahead.count, 0] {
                    put_u32(value, target);
                }
                put_u64(generation.0, target);
                items.encode("items", target)
            }
            Request::Grant(ahead) => {
                put_u32(ahead.length, target);
                put_u32(ahead.count, target);
                Ok(())
            }
            Request::Abandon { reservations } => reservations.encode("reservations", target),
            Request::Invalidate { name } => put_bytes(name.as_bytes(), "name", (1, NAME_BYTES_MAX), target),
            Request::Watch { since, wait_ms } => {
                put_u64(since, target);
                put_u32(wait_ms, target);
                put_u32(0, target);
                Ok(())
            }
            Request::Confirm {
                generation,
                name,
                processor,
            } => {
                put_u64(generation.0, target);
                put_bytes(name.as_bytes(), "name", (1, NAME_BYTES_MAX), target)?;
                put_bytes(processor.as_bytes(), "processor", (1, NAME_BYTES_MAX), target)
            }
            Request::Computed {
                tokens,
                before_tokens,
                took_us,
            } => {
                put_u32(tokens, target);
                put_u32(before_tokens, target);
                put_u64(took_us, target);
                Ok(())
            }
            Request::Advise { advice, amount, keys } => {
                put_u32(advice as u32, target);
                put_u32(amount, target);
                keys.encode(target)
            }
            Request::Release | Request::Flush | Request::Status | Request::Goodbye => Ok(()),
        }
    }
}
