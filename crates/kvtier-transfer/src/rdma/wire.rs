//! What two nodes say to each other to connect queue pairs. Little-endian; a question and its answer.
//!
//! | describe | connect | |
//! |---|---|---|
//! | 0: 2, version | 0: 2, version | |
//! | 1: 1, kind | 1: 2, kind | |
//! | | 2: u16 | which of the answering node's NICs |
//! | | 4: u32 | lane: one of the same number is replaced |
//! | | 8: 40 bytes | the asking end, as below |
//!
//! | described | connected | refused | |
//! |---|---|---|---|
//! | 0: 2, 1: 0x81 | 0: 2, 1: 0x82 | 0: 2, 1: 0xff | |
//! | 2: u16 | 2: zero u16, 4: zero u32 | 2: … | number of NICs; why, in UTF-8 |
//! | 4 + 40 i | 8: 40 bytes | | NIC i, with number and PSN zero; the answering end |
//!
//! | an end at | size | what |
//! |---|---|---|
//! | 0 | 4 | queue pair number |
//! | 4 | 4 | first packet number |
//! | 8 | 16 | address (GID) |
//! | 24 | 2 | LID |
//! | 26 | 1 | 0 RoCE, 1 InfiniBand, 2 iWARP |
//! | 27 | 1 | MTU code: 1 to 5 for 256 to 4096 bytes |
//! | 28 | 1 | reads that it makes at a time |
//! | 29 | 1 | reads that it answers at a time |
//! | 30 | 8 | iWARP: what who calls must show; else zero |
//! | 38 | 2 | zero |
//!
//! On iWARP the answering end is called through librdmacm: its number is the port of that, its address an IP address
//! (IPv4 mapped into IPv6).

use super::verbs::Destination;

const VERSION: u8 = 2;
const END_BYTES: usize = 40;
/// The longest message.
pub(super) const MESSAGE_BYTES_MAX: usize = 1024;

/// `ibv_mtu` of a number of bytes.
pub(super) fn mtu_code(bytes: u32) -> Option<u32> {
    [256, 512, 1024, 2048, 4096]
        .iter()
        .zip(1..)
        .find_map(|(known, code)| (*known == bytes).then_some(code))
}

/// What a NIC speaks. Two ends must speak the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fabric {
    Roce = 0,
    InfiniBand = 1,
    Iwarp = 2,
}

/// One end of a connection, or a NIC that could be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) destination: Destination,
    pub(super) fabric: Fabric,
    pub(super) mtu: u32,
    pub(super) reads_out: u8,
    pub(super) reads_in: u8,
    /// Zero but for an answering iWARP end.
    pub(super) token: u64,
}

impl End {
    fn encode(&self) -> [u8; END_BYTES] {
        let mut bytes = [0; END_BYTES];
        bytes[..4].copy_from_slice(&self.destination.number.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.destination.psn.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.destination.gid);
        bytes[24..26].copy_from_slice(&self.destination.lid.to_le_bytes());
        bytes[26] = self.fabric as u8;
        bytes[27] = u8::try_from(self.mtu).unwrap_or(0);
        bytes[28] = self.reads_out;
        bytes[29] = self.reads_in;
        bytes[30..38].copy_from_slice(&self.token.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<End> {
        let bytes: &[u8; END_BYTES] = bytes.try_into().ok()?;
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let end = End {
            destination: Destination {
                number: word(0),
                psn: word(4),
                gid: bytes[8..24].try_into().expect("16 bytes"),
                lid: u16::from_le_bytes([bytes[24], bytes[25]]),
            },
            fabric: match bytes[26] {
                0 => Fabric::Roce,
                1 => Fabric::InfiniBand,
                2 => Fabric::Iwarp,
                _ => return None,
            },
            mtu: bytes[27].into(),
            reads_out: bytes[28],
            reads_in: bytes[29],
            token: u64::from_le_bytes(bytes[30..38].try_into().expect("8 bytes")),
        };
        let fits = (1..=5).contains(&end.mtu) && end.destination.number < 1 << 24 && end.destination.psn < 1 << 24;
        // What the format has no place for must be zero.
        (fits && end.encode() == *bytes).then_some(end)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Question {
    Describe,
    Connect { nic: u16, lane: u32, end: End },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Described(Vec<End>),
    Connected(End),
    Refused(String),
}

impl Question {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Question::Describe => vec![VERSION, 1],
            Question::Connect { nic, lane, end } => {
                let mut bytes = vec![VERSION, 2];
                bytes.extend(nic.to_le_bytes());
                bytes.extend(lane.to_le_bytes());
                bytes.extend(end.encode());
                bytes
            }
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Question> {
        match bytes {
            [VERSION, 1] => Some(Question::Describe),
            [VERSION, 2, nic_low, nic_high, a, b, c, d, end @ ..] => Some(Question::Connect {
                nic: u16::from_le_bytes([*nic_low, *nic_high]),
                lane: u32::from_le_bytes([*a, *b, *c, *d]),
                end: End::decode(end)?,
            }),
            _ => None,
        }
    }
}

impl Answer {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Answer::Described(nics) => {
                let mut bytes = vec![VERSION, 0x81];
                bytes.extend(u16::try_from(nics.len()).expect("16 at most").to_le_bytes());
                bytes.extend(nics.iter().flat_map(End::encode));
                bytes
            }
            Answer::Connected(end) => {
                let mut bytes = vec![VERSION, 0x82, 0, 0, 0, 0, 0, 0];
                bytes.extend(end.encode());
                bytes
            }
            Answer::Refused(why) => {
                let mut bytes = vec![VERSION, 0xff];
                bytes.extend(why.bytes().take(MESSAGE_BYTES_MAX - 2));
                bytes
            }
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Answer> {
        match bytes {
            [VERSION, 0x81, low, high, ends @ ..] => {
                let count = usize::from(u16::from_le_bytes([*low, *high]));
                if ends.len() != count * END_BYTES {
                    return None;
                }
                let ends: Option<Vec<End>> = ends.chunks_exact(END_BYTES).map(End::decode).collect();
                ends.map(Answer::Described)
            }
            [VERSION, 0x82, 0, 0, 0, 0, 0, 0, end @ ..] => End::decode(end).map(Answer::Connected),
            [VERSION, 0xff, why @ ..] => Some(Answer::Refused(String::from_utf8_lossy(why).into_owned())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end() -> End {
        End {
            destination: Destination {
                number: 0x1234,
                psn: 0xff_ffff,
                gid: [7; 16],
                lid: 9,
            },
            fabric: Fabric::Iwarp,
            mtu: 5,
            reads_out: 16,
            reads_in: 8,
            token: 0x0102_0304_0506_0708,
        }
    }

    #[test]
    fn questions_and_answers_come_back_from_their_bytes_and_from_no_shorter_ones() {
        let questions = [
            Question::Describe,
            Question::Connect {
                nic: 3,
                lane: 70_000,
                end: end(),
            },
        ];
        for question in questions {
            let bytes = question.encode();
            assert_eq!(Question::decode(&bytes), Some(question));
            (0..bytes.len()).for_each(|short| assert_eq!(Question::decode(&bytes[..short]), None, "{short}"));
        }
        let answers = [
            Answer::Described(vec![end(), end()]),
            Answer::Connected(end()),
            Answer::Refused("no such NIC".to_owned()),
        ];
        for answer in answers {
            assert_eq!(Answer::decode(&answer.encode()), Some(answer));
        }
    }

    #[test]
    fn ends_that_no_device_could_use_are_refused() {
        for (at, value) in [(3, 1), (7, 1), (26, 3), (27, 0), (27, 6), (38, 1), (39, 1)] {
            let mut bytes = end().encode();
            bytes[at] = value;
            assert_eq!(End::decode(&bytes), None, "byte {at} as {value}");
        }
    }

    #[test]
    fn mtu_codes_are_the_library_s() {
        assert_eq!(mtu_code(256), Some(1));
        assert_eq!(mtu_code(4096), Some(5));
        assert_eq!(mtu_code(1500), None);
    }

    #[test]
    fn no_bytes_make_a_decoder_panic_or_come_back_different() {
        use crate::remote::draw_u64;
        let connect = Question::Connect {
            nic: 1,
            lane: 2,
            end: end(),
        };
        let rights = [
            connect.encode(),
            Answer::Described(vec![end(); 2]).encode(),
            Answer::Connected(end()).encode(),
        ];
        for right in rights {
            for _ in 0..30_000 {
                let mut bytes = right.clone();
                let at = usize::try_from(draw_u64() % right.len() as u64).expect("small");
                bytes[at] = u8::try_from(draw_u64() % 256).expect("a byte");
                if let Some(decoded) = Question::decode(&bytes) {
                    assert_eq!(decoded.encode(), bytes);
                }
                match Answer::decode(&bytes) {
                    // Text that is no UTF-8 is shown with marks in place of it.
                    None | Some(Answer::Refused(_)) => {}
                    Some(decoded) => assert_eq!(decoded.encode(), bytes),
                }
            }
        }
    }
}
