//! What peers say to each other. Little-endian; the body of a frame of [`super::channel`].
//!
//! ```text
//! message  = number u64, kind u8, fields
//!            number: of the request, echoed in its reply; 0 where none is expected
//! kinds    1 Hello     text member, text address, incarnation u64, text tcp, verbs u8; its reply is 0x81, the same fields
//!          2 Locate    keys -> 0x82: versions, array(tier u8: 0 absent, 1 host, 2 NVMe)
//!          3 Acquire   wait_ms u32, keys -> 0x83: versions, array(region: bytes), array(leased)
//!          4 Release   array(lease u64); no reply
//!          5 Connect   bytes -> 0x85: bytes. A step of an RDMA handshake
//!          6 Cluster   bytes; no reply. Between the state machines of generations
//!          9 Share     text DOMAIN/NAME, versions, public half of a key (32) -> 0x89: bytes. What objects are sealed with, see [`super::sharing`]
//!          8 Probe     -> 0x88: bytes, a region of nobody's bytes to read from
//!         10 Learned   -> 0x8a: bytes, what the eviction policy learned (the image of `LearnedTables`); empty where it learns nothing
//!          7 Command   text JSON -> 0x87: text JSON. A purge for the member to carry out, or a question about one
//! keys     = text DOMAIN/NAME, realization (32), array(hash (16))
//! versions = array(member (16), counter u64)
//! leased   = outcome u8 (0 absent, 1 busy, 2 leased), parent u8 (0 unknown, 2 block), labels u8 (0..2 of them, 3 any), zero u8,
//!            region u32, length u32, checksum u32 (CRC32C), tokens u32, zero u32, offset u64, lease u64,
//!            parent (16), labels (2 * u64)
//! ```
//! A region of a reply is named by its place in the reply's list. What is reserved is zero.

use std::collections::BTreeMap;

use kvtier_core::{BlockHash, Label, Labels, Parent, Tier};

use crate::wire::field::{Cursor, put_bytes, put_u32, put_u64};
use crate::wire::{DecodeError, EncodeError, KEYS_MAX};

/// Longest `DOMAIN/NAME`, address or member, bytes.
const TEXT_BYTES_MAX: usize = 4096;
/// Longest opaque part, bytes.
const BYTES_MAX: usize = 1 << 20;
/// Members that a list of versions may name.
const VERSIONS_MAX: usize = 4096;
const REPLY: u8 = 0x80;

/// Names a member by its state directory, for life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct MemberKey(pub(crate) [u8; 16]);

/// How often each member raised a namespace's generation, as far as its holder knows. Two nodes whose lists are equal have
/// seen the same invalidations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Versions(pub(crate) BTreeMap<MemberKey, u64>);

/// Who a peer is, and how its memory is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Introduction {
    /// Of its state directory, in hexadecimal digits.
    pub(super) member: String,
    /// Where peers reach it, as its operator says.
    pub(super) address: String,
    /// Differs between its runs.
    pub(super) incarnation: u64,
    /// Where its bytes are read over TCP; empty: as `address`, at a port that follows a colon.
    pub(super) tcp: String,
    /// It has RDMA devices.
    pub(super) verbs: bool,
}

/// Blocks that are asked for: of one namespace and realization, in prefix order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keys {
    pub(super) namespace: String,
    pub(super) realization: [u8; 32],
    pub(super) hashes: Vec<BlockHash>,
}

/// A block that stays where it is until its lease is released or has expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) lease: u64,
    /// Place in the reply's list.
    pub(super) region: u32,
    pub(super) offset: u64,
    pub(super) length: u32,
    pub(super) checksum: u32,
    pub(super) tokens: u32,
    pub(super) parent: Parent,
    pub(super) labels: Labels,
}

/// What became of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Acquired {
    Absent,
    Busy,
    Held(Held),
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    Hello(Introduction),
    Welcome(Introduction),
    Locate(Keys),
    Located {
        versions: Versions,
        tiers: Vec<Option<Tier>>,
    },
    Acquire {
        wait_ms: u32,
        keys: Keys,
    },
    Leased {
        versions: Versions,
        regions: Vec<Vec<u8>>,
        outcomes: Vec<Acquired>,
    },
    Release(Vec<u64>),
    Connect(Vec<u8>),
    Connected(Vec<u8>),
    Cluster(Vec<u8>),
    Command(String),
    Answered(String),
    Probe,
    Probed(Vec<u8>),
    Learned,
    Tables(Vec<u8>),
    Share {
        namespace: String,
        versions: Versions,
        public: [u8; 32],
    },
    Shared(Vec<u8>),
}

impl Message {
    fn kind(&self) -> u8 {
        match self {
            Message::Hello(_) => 1,
            Message::Welcome(_) => REPLY | 1,
            Message::Locate(_) => 2,
            Message::Located { .. } => REPLY | 2,
            Message::Acquire { .. } => 3,
            Message::Leased { .. } => REPLY | 3,
            Message::Release(_) => 4,
            Message::Connect(_) => 5,
            Message::Connected(_) => REPLY | 5,
            Message::Cluster(_) => 6,
            Message::Command(_) => 7,
            Message::Answered(_) => REPLY | 7,
            Message::Probe => 8,
            Message::Probed(_) => REPLY | 8,
            Message::Share { .. } => 9,
            Message::Shared(_) => REPLY | 9,
            Message::Learned => 10,
            Message::Tables(_) => REPLY | 10,
        }
    }

    /// Whether it answers something.
    pub(super) fn is_reply(&self) -> bool {
        self.kind() & REPLY != 0
    }

    /// The body of a frame.
    pub(super) fn encode(&self, number: u64) -> Result<Vec<u8>, EncodeError> {
        let mut target = Vec::with_capacity(256);
        put_u64(number, &mut target);
        target.push(self.kind());
        match self {
            Message::Hello(introduction) | Message::Welcome(introduction) => {
                put_introduction(introduction, &mut target)?;
            }
            Message::Locate(keys) => put_keys(keys, &mut target)?,
            Message::Located { versions, tiers } => {
                put_versions(versions, &mut target);
                put_u32(count(tiers.len()), &mut target);
                target.extend(tiers.iter().map(|tier| tier_code(*tier)));
            }
            Message::Acquire { wait_ms, keys } => {
                put_u32(*wait_ms, &mut target);
                put_keys(keys, &mut target)?;
            }
            Message::Leased {
                versions,
                regions,
                outcomes,
            } => {
                put_versions(versions, &mut target);
                put_u32(count(regions.len()), &mut target);
                for region in regions {
                    put_bytes(region, "region", (0, BYTES_MAX), &mut target)?;
                }
                put_u32(count(outcomes.len()), &mut target);
                for outcome in outcomes {
                    put_acquired(outcome, &mut target);
                }
            }
            Message::Release(leases) => {
                put_u32(count(leases.len()), &mut target);
                for lease in leases {
                    put_u64(*lease, &mut target);
                }
            }
            Message::Probe | Message::Learned => {}
            Message::Share {
                namespace,
                versions,
                public,
            } => {
                put_text(namespace, "namespace", &mut target)?;
                put_versions(versions, &mut target);
                target.extend(public);
            }
            Message::Connect(bytes)
            | Message::Connected(bytes)
            | Message::Cluster(bytes)
            | Message::Probed(bytes)
            | Message::Tables(bytes)
            | Message::Shared(bytes) => {
                put_bytes(bytes, "bytes", (0, BYTES_MAX), &mut target)?;
            }
            Message::Command(text) | Message::Answered(text) => {
                put_bytes(text.as_bytes(), "text", (0, BYTES_MAX), &mut target)?;
            }
        }
        Ok(target)
    }

    /// The number and the message of a frame's body.
    pub(super) fn decode(body: &[u8]) -> Result<(u64, Message), DecodeError> {
        let mut cursor = Cursor(body);
        let number = cursor.u64("number")?;
        let kind = cursor.u8("kind")?;
        let message = match kind {
            1 => Message::Hello(introduction(&mut cursor)?),
            0x81 => Message::Welcome(introduction(&mut cursor)?),
            2 => Message::Locate(keys(&mut cursor)?),
            0x82 => Message::Located {
                versions: versions(&mut cursor)?,
                tiers: {
                    let count = cursor.count("tiers")?;
                    let codes = cursor.take(count, "tiers")?;
                    codes.iter().map(|code| tier_of(*code)).collect::<Result<_, _>>()?
                },
            },
            3 => Message::Acquire {
                wait_ms: cursor.u32("wait_ms")?,
                keys: keys(&mut cursor)?,
            },
            0x83 => {
                let versions = versions(&mut cursor)?;
                let regions = (0..cursor.count("regions")?)
                    .map(|_| Ok(cursor.bytes("region", 0, BYTES_MAX)?.to_vec()))
                    .collect::<Result<Vec<_>, DecodeError>>()?;
                let outcomes = (0..cursor.count("outcomes")?)
                    .map(|_| acquired(&mut cursor, regions.len()))
                    .collect::<Result<_, _>>()?;
                Message::Leased {
                    versions,
                    regions,
                    outcomes,
                }
            }
            4 => {
                let count = cursor.count("leases")?;
                Message::Release((0..count).map(|_| cursor.u64("lease")).collect::<Result<_, _>>()?)
            }
            5 => Message::Connect(cursor.bytes("bytes", 0, BYTES_MAX)?.to_vec()),
            0x85 => Message::Connected(cursor.bytes("bytes", 0, BYTES_MAX)?.to_vec()),
            6 => Message::Cluster(cursor.bytes("bytes", 0, BYTES_MAX)?.to_vec()),
            7 => Message::Command(cursor.text("text", 0, BYTES_MAX)?.to_owned()),
            0x87 => Message::Answered(cursor.text("text", 0, BYTES_MAX)?.to_owned()),
            8 => Message::Probe,
            0x88 => Message::Probed(cursor.bytes("bytes", 0, BYTES_MAX)?.to_vec()),
            9 => Message::Share {
                namespace: cursor.text("namespace", 1, TEXT_BYTES_MAX)?.to_owned(),
                versions: versions(&mut cursor)?,
                public: cursor.fixed("public")?,
            },
            10 => Message::Learned,
            0x8a => Message::Tables(cursor.bytes("bytes", 0, BYTES_MAX)?.to_vec()),
            0x89 => Message::Shared(cursor.bytes("bytes", 0, BYTES_MAX)?.to_vec()),
            code => {
                return Err(DecodeError::UnknownCode {
                    field: "kind",
                    code: code.into(),
                });
            }
        };
        if cursor.0.is_empty() {
            Ok((number, message))
        } else {
            Err(DecodeError::NotZero {
                field: "bytes behind the message",
            })
        }
    }
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

fn tier_code(tier: Option<Tier>) -> u8 {
    match tier {
        None | Some(Tier::Remote) => 0,
        // What lies on a device lies elsewhere here, too; peers are told of that only.
        Some(Tier::Hbm | Tier::Host) => 1,
        Some(Tier::Nvme) => 2,
    }
}

fn tier_of(code: u8) -> Result<Option<Tier>, DecodeError> {
    match code {
        0 => Ok(None),
        1 => Ok(Some(Tier::Host)),
        2 => Ok(Some(Tier::Nvme)),
        code => Err(DecodeError::UnknownCode {
            field: "tier",
            code: code.into(),
        }),
    }
}

fn put_text(text: &str, field: &'static str, target: &mut Vec<u8>) -> Result<(), EncodeError> {
    put_bytes(text.as_bytes(), field, (0, TEXT_BYTES_MAX), target)
}

fn put_introduction(introduction: &Introduction, target: &mut Vec<u8>) -> Result<(), EncodeError> {
    put_text(&introduction.member, "member", target)?;
    put_text(&introduction.address, "address", target)?;
    put_u64(introduction.incarnation, target);
    put_text(&introduction.tcp, "tcp", target)?;
    target.push(u8::from(introduction.verbs));
    Ok(())
}

fn introduction(cursor: &mut Cursor<'_>) -> Result<Introduction, DecodeError> {
    Ok(Introduction {
        member: cursor.text("member", 1, TEXT_BYTES_MAX)?.to_owned(),
        address: cursor.text("address", 0, TEXT_BYTES_MAX)?.to_owned(),
        incarnation: cursor.u64("incarnation")?,
        tcp: cursor.text("tcp", 0, TEXT_BYTES_MAX)?.to_owned(),
        verbs: cursor.u8("verbs")? == 1,
    })
}

fn put_keys(keys: &Keys, target: &mut Vec<u8>) -> Result<(), EncodeError> {
    put_text(&keys.namespace, "namespace", target)?;
    target.extend(keys.realization);
    put_u32(count(keys.hashes.len()), target);
    target.extend(keys.hashes.iter().flat_map(|hash| hash.0));
    Ok(())
}

fn keys(cursor: &mut Cursor<'_>) -> Result<Keys, DecodeError> {
    let namespace = cursor.text("namespace", 1, TEXT_BYTES_MAX)?.to_owned();
    let realization = cursor.fixed("realization")?;
    let count = cursor.count("hashes")?;
    debug_assert!(count <= KEYS_MAX, "checked by the cursor");
    let hashes = (0..count).map(|_| cursor.hash("hashes")).collect::<Result<_, _>>()?;
    Ok(Keys {
        namespace,
        realization,
        hashes,
    })
}

fn put_versions(versions: &Versions, target: &mut Vec<u8>) {
    put_u32(count(versions.0.len()), target);
    for (member, counter) in &versions.0 {
        target.extend(member.0);
        put_u64(*counter, target);
    }
}

fn versions(cursor: &mut Cursor<'_>) -> Result<Versions, DecodeError> {
    let count = cursor.u32("versions")?;
    let checked = usize::try_from(count).unwrap_or(usize::MAX);
    if checked > VERSIONS_MAX {
        return Err(DecodeError::TooMany {
            field: "versions",
            count,
            max: VERSIONS_MAX,
        });
    }
    let entry = |cursor: &mut Cursor<'_>| Ok((MemberKey(cursor.fixed("versions")?), cursor.u64("versions")?));
    Ok(Versions(
        (0..checked)
            .map(|_| entry(cursor))
            .collect::<Result<_, DecodeError>>()?,
    ))
}

fn put_acquired(acquired: &Acquired, target: &mut Vec<u8>) {
    let Acquired::Held(held) = acquired else {
        target.push(u8::from(*acquired == Acquired::Busy));
        target.extend([0; ACQUIRED_BYTES - 1]);
        return;
    };
    let (parent_code, parent) = match held.parent {
        Parent::Unknown | Parent::Root => (0, BlockHash::default()),
        Parent::Block(hash) => (2, hash),
    };
    let (labels_code, labels) = match held.labels {
        Labels::None => (0, [0, 0]),
        Labels::One(label) => (1, [label.0, 0]),
        Labels::Two(one, other) => (2, [one.0, other.0]),
        Labels::Any => (3, [0, 0]),
    };
    target.extend([2, parent_code, labels_code, 0]);
    for number in [held.region, held.length, held.checksum, held.tokens, 0] {
        put_u32(number, target);
    }
    put_u64(held.offset, target);
    put_u64(held.lease, target);
    target.extend(parent.0);
    put_u64(labels[0], target);
    put_u64(labels[1], target);
}

const ACQUIRED_BYTES: usize = 4 + 5 * 4 + 2 * 8 + 16 + 2 * 8;

fn acquired(cursor: &mut Cursor<'_>, regions: usize) -> Result<Acquired, DecodeError> {
    let unknown = |field, code: u8| {
        Err(DecodeError::UnknownCode {
            field,
            code: code.into(),
        })
    };
    let [outcome, parent_code, labels_code, zero] = cursor.fixed::<4>("outcome")?;
    let region = cursor.u32("region")?;
    let length = cursor.u32("length")?;
    let checksum = cursor.u32("checksum")?;
    let tokens = cursor.u32("tokens")?;
    cursor.zero::<4>("outcome")?;
    let offset = cursor.u64("offset")?;
    let lease = cursor.u64("lease")?;
    let parent = cursor.hash("parent")?;
    let labels = [cursor.u64("labels")?, cursor.u64("labels")?].map(Label);
    if zero != 0 {
        return Err(DecodeError::NotZero { field: "outcome" });
    }
    match outcome {
        0 => return Ok(Acquired::Absent),
        1 => return Ok(Acquired::Busy),
        2 => {}
        code => return unknown("outcome", code),
    }
    if region as usize >= regions {
        return Err(DecodeError::UnknownCode {
            field: "region",
            code: region,
        });
    }
    Ok(Acquired::Held(Held {
        lease,
        region,
        offset,
        length,
        checksum,
        tokens,
        parent: match parent_code {
            0 => Parent::Unknown,
            2 => Parent::Block(parent),
            code => return unknown("parent", code),
        },
        labels: match labels_code {
            0 => Labels::None,
            1 => Labels::One(labels[0]),
            2 => Labels::Two(labels[0], labels[1]),
            3 => Labels::Any,
            code => return unknown("labels", code),
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Message> {
        let introduction = Introduction {
            member: "ab".repeat(16),
            address: "node-a:7411".into(),
            incarnation: 7,
            tcp: "10.0.0.1:7412".into(),
            verbs: true,
        };
        let keys = Keys {
            namespace: "team/chat".into(),
            realization: [3; 32],
            hashes: vec![BlockHash([1; 16]), BlockHash([2; 16])],
        };
        let versions = Versions(BTreeMap::from([(MemberKey([1; 16]), 4), (MemberKey([9; 16]), 1)]));
        let held = |labels, parent| {
            Acquired::Held(Held {
                lease: 77,
                region: 1,
                offset: 1 << 40,
                length: 4097,
                checksum: 0xdead_beef,
                tokens: 256,
                parent,
                labels,
            })
        };
        vec![
            Message::Hello(introduction.clone()),
            Message::Welcome(introduction),
            Message::Locate(keys.clone()),
            Message::Located {
                versions: versions.clone(),
                tiers: vec![None, Some(Tier::Host), Some(Tier::Nvme)],
            },
            Message::Acquire { wait_ms: 250, keys },
            Message::Share {
                namespace: "team/chat".into(),
                versions: versions.clone(),
                public: [6; 32],
            },
            Message::Shared(vec![7; 96]),
            Message::Leased {
                versions,
                regions: vec![vec![], vec![5; 40]],
                outcomes: vec![
                    Acquired::Absent,
                    Acquired::Busy,
                    held(Labels::None, Parent::Unknown),
                    held(Labels::One(Label(5)), Parent::Block(BlockHash([8; 16]))),
                    held(Labels::Two(Label(5), Label(6)), Parent::Unknown),
                    held(Labels::Any, Parent::Unknown),
                ],
            },
            Message::Release(vec![1, u64::MAX]),
            Message::Connect(vec![1, 2, 3]),
            Message::Connected(vec![]),
            Message::Cluster(vec![0; 100]),
            Message::Command("{}".into()),
            Message::Answered("{}".into()),
            Message::Probe,
            Message::Probed(vec![4; 40]),
            Message::Learned,
            Message::Tables(vec![9; 30]),
        ]
    }

    #[test]
    fn every_message_comes_back_as_it_was() {
        for (number, message) in (1..).zip(all()) {
            let body = message.encode(number).expect("it fits");
            assert_eq!(Message::decode(&body), Ok((number, message)));
        }
    }

    #[test]
    fn a_message_that_is_cut_or_longer_is_refused() {
        for message in all() {
            let mut body = message.encode(1).expect("it fits");
            for cut in 0..body.len() {
                assert!(Message::decode(&body[..cut]).is_err(), "{message:?} cut at {cut}");
            }
            body.push(0);
            assert!(Message::decode(&body).is_err(), "{message:?} and a byte more");
        }
    }

    #[test]
    fn no_altered_byte_makes_the_decoder_panic() {
        for message in all() {
            let body = message.encode(1).expect("it fits");
            for at in 0..body.len() {
                for flip in [1, 0x80, 0xff] {
                    let mut altered = body.clone();
                    altered[at] ^= flip;
                    if let Ok((number, decoded)) = Message::decode(&altered) {
                        // What is understood is said the same way again.
                        assert_eq!(decoded.encode(number).expect("it was decoded").len(), altered.len());
                    }
                }
            }
        }
    }
}
