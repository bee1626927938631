//! The bytes on a TCP connection. Everything is little-endian.
//!
//! First the two ends introduce themselves. With a shared secret each proves that it knows it, bound to both nonces, so
//! that nothing of one connection is of use in another; without one on both sides the proofs are zero.
//!
//! | who | at | size | what |
//! |---|---|---|---|
//! | caller | 0 | 4 | `KVTX` |
//! | | 4 | 2 | version, 1 |
//! | | 6 | 2 | 1: I have a secret |
//! | | 8 | 16 | nonce |
//! | listener | 0 | 24 | the same four, its own nonce |
//! | | 24 | 32 | BLAKE3 keyed with the secret over `listener`, caller's nonce, listener's nonce |
//! | caller | 0 | 32 | the same over `caller…` |
//!
//! Then the caller sends requests, and the listener answers them in order.
//!
//! | request at | size | what |
//! |---|---|---|
//! | 0 | 1 | 1 read, 2 write |
//! | 1 | 3 | zero |
//! | 4 | 4 | tag, which the answer repeats |
//! | 8 | 8 | region id |
//! | 16 | 8 | offset in the region |
//! | 24 | 8 | length; a write's bytes follow |
//!
//! | answer at | size | what |
//! |---|---|---|
//! | 0 | 1 | 0 done, 1 no such region or revoked, 2 outside the region, 3 registered for reads only |
//! | 1 | 3 | zero |
//! | 4 | 4 | tag |
//! | 8 | 8 | length of the bytes that follow: what was asked for after a read that was done, else 0 |
//! | 16 | 48 | zero: a head as long as a cache line keeps what follows aligned in the kernel's buffers, which copies them faster |

use crate::registry::Denied;
use crate::remote::RegionId;
use crate::transfer::Direction;

pub(super) const REQUEST_BYTES: usize = 32;
pub(super) const ANSWER_BYTES: usize = 64;
pub(super) const GREETING_BYTES: usize = 24;
pub(super) const PROOF_BYTES: usize = 32;

const MAGIC: [u8; 4] = *b"KVTX";
const VERSION: u16 = 1;

/// A secret that both ends of a connection must know.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl Secret {
    /// From any bytes: only who has all of them has the secret.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Secret {
        Secret(blake3::derive_key("kvtier transfer handshake 1", bytes))
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Secret(…)")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    pub(super) secret: bool,
    pub(super) nonce: [u8; 16],
}

impl Greeting {
    pub(super) fn draw(secret: bool) -> Greeting {
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).expect("the system's randomness never ends");
        Greeting { secret, nonce }
    }

    pub(super) fn encode(&self) -> [u8; GREETING_BYTES] {
        let mut bytes = [0; GREETING_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = u8::from(self.secret);
        bytes[8..].copy_from_slice(&self.nonce);
        bytes
    }

    pub(super) fn decode(bytes: &[u8; GREETING_BYTES]) -> Result<Greeting, &'static str> {
        if bytes[..4] != MAGIC {
            return Err("it does not speak this protocol");
        }
        if bytes[4..6] != VERSION.to_le_bytes() || bytes[7] != 0 || bytes[6] > 1 {
            return Err("it speaks another version");
        }
        Ok(Greeting {
            secret: bytes[6] == 1,
            nonce: bytes[8..].try_into().expect("16 bytes"),
        })
    }
}

/// What an end sends to prove that it knows the secret.
pub(super) fn proof(
    secret: Option<&Secret>,
    role: &'static str,
    caller: &Greeting,
    listener: &Greeting,
) -> blake3::Hash {
    let Some(secret) = secret else {
        return blake3::Hash::from_bytes([0; PROOF_BYTES]);
    };
    let mut hasher = blake3::Hasher::new_keyed(&secret.0);
    hasher.update(role.as_bytes());
    hasher.update(&caller.nonce);
    hasher.update(&listener.nonce);
    hasher.finalize()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) direction: Direction,
    pub(super) tag: u32,
    pub(super) region: RegionId,
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Request {
    pub(super) fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0] = match self.direction {
            Direction::Read => 1,
            Direction::Write => 2,
        };
        bytes[4..8].copy_from_slice(&self.tag.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.region.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Request> {
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let direction = match bytes[..4] {
            [1, 0, 0, 0] => Direction::Read,
            [2, 0, 0, 0] => Direction::Write,
            _ => return None,
        };
        Some(Request {
            direction,
            tag: u32::from_le_bytes(bytes[4..8].try_into().expect("4 bytes")),
            region: RegionId(number(8)),
            offset: number(16),
            length: number(24),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) result: Result<(), Denied>,
    pub(super) tag: u32,
    pub(super) length: u64,
}

impl Answer {
    pub(super) fn encode(&self) -> [u8; ANSWER_BYTES] {
        let mut bytes = [0; ANSWER_BYTES];
        bytes[0] = match self.result {
            Ok(()) => 0,
            Err(Denied::Unknown) => 1,
            Err(Denied::Range) => 2,
            Err(Denied::Access) => 3,
        };
        bytes[4..8].copy_from_slice(&self.tag.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; ANSWER_BYTES]) -> Option<Answer> {
        let result = match bytes[..4] {
            [0, 0, 0, 0] => Ok(()),
            [1, 0, 0, 0] => Err(Denied::Unknown),
            [2, 0, 0, 0] => Err(Denied::Range),
            [3, 0, 0, 0] => Err(Denied::Access),
            _ => return None,
        };
        if bytes[16..] != [0; ANSWER_BYTES - 16] {
            return None;
        }
        Some(Answer {
            result,
            tag: u32::from_le_bytes(bytes[4..8].try_into().expect("4 bytes")),
            length: u64::from_le_bytes(bytes[8..16].try_into().expect("8 bytes")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_come_back_from_their_bytes_and_changed_ones_do_not() {
        let request = Request {
            direction: Direction::Write,
            tag: 7,
            region: RegionId(0x1122_3344_5566_7788),
            offset: 4096,
            length: 1 << 40,
        };
        assert_eq!(Request::decode(&request.encode()), Some(request));
        let answers = [Ok(()), Err(Denied::Unknown), Err(Denied::Range), Err(Denied::Access)];
        for result in answers {
            let answer = Answer {
                result,
                tag: u32::MAX,
                length: 5,
            };
            assert_eq!(Answer::decode(&answer.encode()), Some(answer));
        }
        for at in 0..4 {
            let mut bytes = request.encode();
            bytes[at] ^= 0x80;
            assert_eq!(Request::decode(&bytes), None);
            let mut bytes = [0; ANSWER_BYTES];
            bytes[at] = 0x80;
            assert_eq!(Answer::decode(&bytes), None);
        }
    }

    #[test]
    fn a_proof_is_of_one_secret_one_role_and_one_pair_of_nonces() {
        let (caller, listener) = (Greeting::draw(true), Greeting::draw(true));
        let secret = Secret::new(b"a");
        let right = proof(Some(&secret), "caller", &caller, &listener);
        assert_eq!(right, proof(Some(&Secret::new(b"a")), "caller", &caller, &listener));
        assert_ne!(right, proof(Some(&Secret::new(b"b")), "caller", &caller, &listener));
        assert_ne!(right, proof(Some(&secret), "listener", &caller, &listener));
        assert_ne!(right, proof(Some(&secret), "caller", &listener, &caller));
        assert_ne!(right, proof(None, "caller", &caller, &listener));
    }

    #[test]
    fn greetings_of_something_else_are_told_apart() {
        let greeting = Greeting::draw(true);
        assert_eq!(Greeting::decode(&greeting.encode()), Ok(greeting));
        assert!(Greeting::decode(b"GET / HTTP/1.1\r\nHost: xy").is_err());
        let mut later = greeting.encode();
        later[4] = 2;
        assert!(Greeting::decode(&later).is_err());
    }
}
