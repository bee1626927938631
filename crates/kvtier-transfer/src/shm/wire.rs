//! What the two ends of a connection say about mappings. 24 bytes each, little-endian:
//!
//! | at | size | what |
//! |---|---|---|
//! | 0 | 1 | 1 attach, 2 attached, 3 revoke, 4 released |
//! | 1 | 1 | attached: access, 0 read, 1 read and write; else 0 |
//! | 2 | 6 | zero |
//! | 8 | 8 | region id |
//! | 16 | 8 | attached: length in bytes, 0 when there is no such region; else 0 |
//!
//! `attached` with a length carries the memory file as a descriptor.

use crate::remote::{RegionId, RemoteAccess};

pub(super) const FRAME_BYTES: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// Peer to owner: let me map this.
    Attach { id: RegionId },
    /// Owner to peer: here it is, or (0 bytes) no such region.
    Attached {
        id: RegionId,
        access: RemoteAccess,
        bytes: u64,
    },
    /// Owner to peer: let go of this.
    Revoke { id: RegionId },
    /// Peer to owner: not mapped any more.
    Released { id: RegionId },
}

impl Frame {
    pub(super) fn attach(id: RegionId) -> Frame {
        Frame::Attach { id }
    }

    pub(super) fn encode(self) -> [u8; FRAME_BYTES] {
        let (kind, access, id, length) = match self {
            Frame::Attach { id } => (1, 0, id, 0),
            Frame::Attached { id, access, bytes } => (2, u8::from(access == RemoteAccess::ReadWrite), id, bytes),
            Frame::Revoke { id } => (3, 0, id, 0),
            Frame::Released { id } => (4, 0, id, 0),
        };
        let mut bytes = [0; FRAME_BYTES];
        bytes[0] = kind;
        bytes[1] = access;
        bytes[8..16].copy_from_slice(&id.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&length.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; FRAME_BYTES]) -> Option<Frame> {
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let (id, length) = (RegionId(number(8)), number(16));
        let access = match bytes[1] {
            0 => RemoteAccess::Read,
            1 => RemoteAccess::ReadWrite,
            _ => return None,
        };
        let frame = match bytes[0] {
            1 => Frame::Attach { id },
            2 => Frame::Attached {
                id,
                access,
                bytes: length,
            },
            3 => Frame::Revoke { id },
            4 => Frame::Released { id },
            _ => return None,
        };
        // Anything that the frame has no place for must be zero.
        (frame.encode() == *bytes).then_some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_from_their_bytes_and_changed_ones_do_not() {
        let id = RegionId(0x0102_0304_0506_0708);
        let frames = [
            Frame::Attach { id },
            Frame::Attached {
                id,
                access: RemoteAccess::ReadWrite,
                bytes: 4096,
            },
            Frame::Revoke { id },
            Frame::Released { id },
        ];
        for frame in frames {
            let bytes = frame.encode();
            assert_eq!(Frame::decode(&bytes), Some(frame));
            for at in 2..8 {
                let mut changed = bytes;
                changed[at] = 1;
                assert_eq!(Frame::decode(&changed), None);
            }
        }
        assert_eq!(Frame::decode(&[0; FRAME_BYTES]), None);
        assert_eq!(Frame::decode(&[5; FRAME_BYTES]), None);
    }
}
