//! What a peer says about memory of its own: plain data, safe to send, and worth nothing without a connection.

use std::fmt;
use std::sync::Arc;

use crate::memory::OutOfRange;

/// Most NICs of one node that a region can be reached through.
pub const REMOTE_KEYS_MAX: usize = 16;
/// The longest encoding of a [`RemoteRegion`].
pub const REMOTE_REGION_BYTES_MAX: usize = HEADER_BYTES + 4 * REMOTE_KEYS_MAX;

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 32;

/// Names one registration. Drawn at random, so that a number of an older registration, or a guess, names nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RegionId(pub u64);

impl RegionId {
    /// A fresh one.
    pub(crate) fn draw() -> RegionId {
        RegionId(draw_u64())
    }
}

impl fmt::Debug for RegionId {
    /// Whoever reads a log could read memory with the number.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("RegionId(…)")
    }
}

/// 64 bits of the system's randomness.
pub(crate) fn draw_u64() -> u64 {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).expect("the system's randomness never ends");
    u64::from_le_bytes(bytes)
}

/// What a peer may do with a registered region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoteAccess {
    /// Read it.
    Read,
    /// Read and write it.
    ReadWrite,
}

/// A registered region of another node or process, as its owner describes it.
///
/// Bytes, little-endian, [`REMOTE_REGION_BYTES_MAX`] at most:
///
/// | at | size | what |
/// |---|---|---|
/// | 0 | 1 | version, 1 |
/// | 1 | 1 | access: 0 read, 1 read and write |
/// | 2 | 2 | number of keys, at most 16 |
/// | 4 | 4 | zero |
/// | 8 | 8 | region id |
/// | 16 | 8 | address of the first byte in its owner's process; 0 where the transport has no use for it |
/// | 24 | 8 | length in bytes |
/// | 32 | 4 each | remote key through the owner's first, second, … NIC; 0: not reachable through that one |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteRegion {
    /// Which registration.
    pub id: RegionId,
    /// Address of the first byte in the owner's process; only a NIC has use for it.
    pub address: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// What may be done with it.
    pub access: RemoteAccess,
    /// One key for each NIC of the owner, in the owner's order. Empty without RDMA.
    pub remote_keys: Vec<u32>,
}

/// Bytes that describe no region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("these bytes describe no remote region: {0}")]
pub struct NotARegion(&'static str);

impl RemoteRegion {
    /// The bytes of the table above.
    ///
    /// # Panics
    /// With more than [`REMOTE_KEYS_MAX`] keys.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.remote_keys.len() <= REMOTE_KEYS_MAX, "a key for each NIC");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + 4 * self.remote_keys.len());
        bytes.extend([VERSION, u8::from(self.access == RemoteAccess::ReadWrite)]);
        bytes.extend(u16::try_from(self.remote_keys.len()).expect("few").to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.id.0.to_le_bytes());
        bytes.extend(self.address.to_le_bytes());
        bytes.extend(self.bytes.to_le_bytes());
        bytes.extend(self.remote_keys.iter().flat_map(|key| key.to_le_bytes()));
        bytes
    }

    /// Reads what [`RemoteRegion::encode`] wrote.
    ///
    /// # Errors
    /// Anything else, in full or in part.
    pub fn decode(bytes: &[u8]) -> Result<RemoteRegion, NotARegion> {
        let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(NotARegion("too short"))?;
        let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
        if header[0] != VERSION {
            return Err(NotARegion("another version"));
        }
        let access = match header[1] {
            0 => RemoteAccess::Read,
            1 => RemoteAccess::ReadWrite,
            _ => return Err(NotARegion("unknown access")),
        };
        let keys = usize::from(u16::from_le_bytes([header[2], header[3]]));
        let rest = &bytes[HEADER_BYTES..];
        if keys > REMOTE_KEYS_MAX || rest.len() != 4 * keys || header[4..8] != [0; 4] {
            return Err(NotARegion("the length does not fit the number of keys"));
        }
        let (address, length) = (number(16), number(24));
        if address.checked_add(length).is_none() {
            return Err(NotARegion("it reaches past the end of the address space"));
        }
        Ok(RemoteRegion {
            id: RegionId(number(8)),
            address,
            bytes: length,
            access,
            remote_keys: rest
                .chunks_exact(4)
                .map(|key| u32::from_le_bytes(key.try_into().expect("4 bytes")))
                .collect(),
        })
    }

    /// A checked range of it.
    ///
    /// # Errors
    /// When the range does not lie in the region.
    pub fn slice(self: &Arc<Self>, offset: u64, length: u64) -> Result<RemoteSlice, OutOfRange> {
        if offset.checked_add(length).is_none_or(|end| end > self.bytes) {
            let narrow = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
            return Err(OutOfRange {
                offset: narrow(offset),
                length: narrow(length),
                bytes: narrow(self.bytes),
            });
        }
        Ok(RemoteSlice {
            region: Arc::clone(self),
            offset,
            length,
        })
    }
}

/// A checked range of a [`RemoteRegion`].
#[derive(Clone, Debug)]
pub struct RemoteSlice {
    region: Arc<RemoteRegion>,
    offset: u64,
    length: u64,
}

impl RemoteSlice {
    /// Its region.
    #[must_use]
    pub fn region(&self) -> &Arc<RemoteRegion> {
        &self.region
    }

    /// Where it starts in its region.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether it holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Address of its first byte in the owner's process.
    pub(crate) fn address(&self) -> u64 {
        self.region.address + self.offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region() -> RemoteRegion {
        RemoteRegion {
            id: RegionId(7),
            address: 4096,
            bytes: 8192,
            access: RemoteAccess::ReadWrite,
            remote_keys: vec![1, 0xffff_ffff],
        }
    }

    #[test]
    fn a_region_comes_back_from_its_bytes_and_from_no_others() {
        let bytes = region().encode();
        assert_eq!(RemoteRegion::decode(&bytes), Ok(region()));
        for short in 0..bytes.len() {
            assert!(RemoteRegion::decode(&bytes[..short]).is_err(), "{short} bytes");
        }
        for (at, value) in [(0, 2), (1, 2), (2, 1), (2, 17), (4, 1)] {
            let mut changed = bytes.clone();
            changed[at] = value;
            assert!(RemoteRegion::decode(&changed).is_err(), "byte {at} as {value}");
        }
        let mut endless = bytes;
        endless[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(RemoteRegion::decode(&endless).is_err());
    }

    #[test]
    fn ranges_outside_a_remote_region_cannot_be_made() {
        let region = Arc::new(region());
        assert!(region.slice(8192, 0).is_ok());
        for (offset, length) in [(0, 8193), (8192, 1), (u64::MAX, 2), (1, u64::MAX)] {
            assert!(region.slice(offset, length).is_err(), "{offset}..+{length}");
        }
        assert_eq!(region.slice(100, 5).expect("inside").address(), 4196);
    }

    #[test]
    fn a_log_does_not_tell_the_number_that_opens_a_region() {
        assert!(!format!("{:?}", RegionId(0x1234_5678)).contains("305419896"));
    }

    #[test]
    fn no_bytes_make_the_decoder_panic_or_come_back_different() {
        let right = region().encode();
        for _ in 0..100_000 {
            let mut bytes = right.clone();
            for _ in 0..1 + draw_u64() % 4 {
                let at = usize::try_from(draw_u64() % right.len() as u64).expect("small");
                bytes[at] = u8::try_from(draw_u64() % 256).expect("a byte");
            }
            bytes.truncate(
                usize::try_from(draw_u64() % (right.len() as u64 + 1))
                    .expect("small")
                    .max(right.len() - 3),
            );
            if let Ok(decoded) = RemoteRegion::decode(&bytes) {
                assert_eq!(decoded.encode(), bytes);
            }
        }
    }
}
