use std::fmt;

use kvtier_core::{BlockHash, Extent, Fetched, LeaseId, Parent, ReservationId, Reserved, SealItem, Sealed, SegmentId, Tier};

use super::{DecodeError, EncodeError, KEYS_MAX, Slot};

/// A fixed-width record of an [`Array`].
pub trait Record: Copy {
    /// Width on the wire, bytes.
    const BYTES: usize;

    /// Reads one record from exactly [`Record::BYTES`] bytes.
    ///
    /// # Errors
    /// A code that stands for nothing, or a field that must be zero and is not.
    fn read(bytes: &[u8]) -> Result<Self, DecodeError>;

    /// Appends exactly [`Record::BYTES`] bytes.
    fn write(&self, target: &mut Vec<u8>);
}

#[derive(Clone, Copy)]
enum Backing<'a, T> {
    /// Every record in it was read once, successfully.
    Wire(&'a [u8]),
    Slice(&'a [T]),
}

/// Many records: a checked view of received bytes, or a slice to send. Copying it copies a pointer.
#[derive(Clone, Copy)]
pub struct Array<'a, T>(Backing<'a, T>);

impl<'a, T: Record> Array<'a, T> {
    pub(super) fn decode(bytes: &'a [u8]) -> Result<Array<'a, T>, DecodeError> {
        for record in bytes.chunks_exact(T::BYTES) {
            T::read(record)?;
        }
        Ok(Array(Backing::Wire(bytes)))
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        match self.0 {
            Backing::Wire(bytes) => bytes.len() / T::BYTES,
            Backing::Slice(slice) => slice.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One after the other.
    #[must_use]
    pub fn iter(&self) -> ArrayIter<'a, T> {
        ArrayIter { rest: self.0 }
    }

    /// Replaces what `target` holds by these records; allocates only when it is too small.
    pub fn copy_to(&self, target: &mut Vec<T>) {
        target.clear();
        target.extend(self.iter());
    }

    /// The records in a vector of their own.
    #[must_use]
    pub fn to_vec(&self) -> Vec<T> {
        self.iter().collect()
    }

    pub(super) fn check(&self, field: &'static str) -> Result<(), EncodeError> {
        if self.len() > KEYS_MAX {
            return Err(EncodeError::TooMany { field, count: self.len() });
        }
        Ok(())
    }

    pub(super) fn write_records(&self, target: &mut Vec<u8>) {
        match self.0 {
            Backing::Wire(bytes) => target.extend_from_slice(bytes),
            Backing::Slice(slice) => slice.iter().for_each(|record| record.write(target)),
        }
    }

    pub(super) fn encode(&self, field: &'static str, target: &mut Vec<u8>) -> Result<(), EncodeError> {
        self.check(field)?;
        put_count(self.len(), target);
        self.write_records(target);
        Ok(())
    }
}

impl<T> Default for Array<'_, T> {
    fn default() -> Self {
        Array(Backing::Slice(&[]))
    }
}

impl<'a, T> From<&'a [T]> for Array<'a, T> {
    fn from(slice: &'a [T]) -> Self {
        Array(Backing::Slice(slice))
    }
}

impl<'a, T> From<&'a Vec<T>> for Array<'a, T> {
    fn from(vector: &'a Vec<T>) -> Self {
        Array(Backing::Slice(vector))
    }
}

impl<T: Record + PartialEq> PartialEq for Array<'_, T> {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}

impl<T: Record + fmt::Debug> fmt::Debug for Array<'_, T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_list().entries(self.iter()).finish()
    }
}

impl<'a, T: Record> IntoIterator for Array<'a, T> {
    type Item = T;
    type IntoIter = ArrayIter<'a, T>;
    fn into_iter(self) -> ArrayIter<'a, T> {
        self.iter()
    }
}

/// Iterates over an [`Array`].
#[derive(Clone)]
pub struct ArrayIter<'a, T> {
    rest: Backing<'a, T>,
}

impl<T: Record> Iterator for ArrayIter<'_, T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        match &mut self.rest {
            Backing::Wire(bytes) => {
                let (record, rest) = bytes.split_at_checked(T::BYTES)?;
                *bytes = rest;
                T::read(record).ok()
            }
            Backing::Slice(slice) => {
                let (record, rest) = slice.split_first()?;
                *slice = rest;
                Some(*record)
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = Array(self.rest).len();
        (left, Some(left))
    }
}

impl<T: Record> ExactSizeIterator for ArrayIter<'_, T> {}

/// Counts are bounded by [`KEYS_MAX`] or [`super::FRAME_BYTES_MAX`] before they are written.
pub(super) fn put_count(count: usize, target: &mut Vec<u8>) {
    target.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
}

pub(super) fn put_u32(value: u32, target: &mut Vec<u8>) {
    target.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_u64(value: u64, target: &mut Vec<u8>) {
    target.extend_from_slice(&value.to_le_bytes());
}

/// What is left of a body. Each method takes one field off its front, or names the field that is cut.
pub(super) struct Cursor<'a>(pub(super) &'a [u8]);

impl<'a> Cursor<'a> {
    pub(super) fn take(&mut self, bytes: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(DecodeError::Truncated { field })?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn fixed<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(DecodeError::Truncated { field })?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        Ok(self.fixed::<1>(field)?[0])
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.fixed(field)?))
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.fixed(field)?))
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.fixed(field)?))
    }

    pub(super) fn hash(&mut self, field: &'static str) -> Result<BlockHash, DecodeError> {
        Ok(BlockHash(self.fixed(field)?))
    }

    pub(super) fn zero<const N: usize>(&mut self, field: &'static str) -> Result<(), DecodeError> {
        if self.fixed::<N>(field)? == [0; N] { Ok(()) } else { Err(DecodeError::NotZero { field }) }
    }

    pub(super) fn extent(&mut self) -> Result<Extent, DecodeError> {
        let segment = SegmentId(self.u32("extent")?);
        let length = self.u32("extent")?;
        Ok(Extent { segment, offset: self.u64("extent")?, length })
    }

    pub(super) fn count(&mut self, field: &'static str) -> Result<usize, DecodeError> {
        let count = self.u32(field)?;
        let checked = usize::try_from(count).unwrap_or(usize::MAX);
        if checked > KEYS_MAX { Err(DecodeError::TooMany { field, count, max: KEYS_MAX }) } else { Ok(checked) }
    }

    pub(super) fn records<T: Record>(&mut self, count: usize, field: &'static str) -> Result<Array<'a, T>, DecodeError> {
        Array::decode(self.take(count.saturating_mul(T::BYTES), field)?)
    }

    pub(super) fn array<T: Record>(&mut self, field: &'static str) -> Result<Array<'a, T>, DecodeError> {
        let count = self.count(field)?;
        self.records(count, field)
    }

    /// Bytes after a u32 length between `min` and `max`.
    pub(super) fn bytes(&mut self, field: &'static str, min: usize, max: usize) -> Result<&'a [u8], DecodeError> {
        let length = self.u32(field)?;
        let checked = usize::try_from(length).unwrap_or(usize::MAX);
        if checked < min || checked > max {
            return Err(DecodeError::BadLength { field, length, max });
        }
        self.take(checked, field)
    }

    pub(super) fn text(&mut self, field: &'static str, min: usize, max: usize) -> Result<&'a str, DecodeError> {
        std::str::from_utf8(self.bytes(field, min, max)?).map_err(|_| DecodeError::NotText { field })
    }
}

/// Appends a u32 length between `min` and `max`, then the bytes.
pub(super) fn put_bytes(
    bytes: &[u8],
    field: &'static str,
    (min, max): (usize, usize),
    target: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    if bytes.len() < min || bytes.len() > max {
        return Err(EncodeError::BadLength { field, length: bytes.len(), max });
    }
    put_count(bytes.len(), target);
    target.extend_from_slice(bytes);
    Ok(())
}

pub(super) fn put_extent(extent: &Extent, target: &mut Vec<u8>) {
    put_u32(extent.segment.0, target);
    put_u32(extent.length, target);
    put_u64(extent.offset, target);
}

impl Record for BlockHash {
    const BYTES: usize = 16;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        Cursor(bytes).hash("hash")
    }
    fn write(&self, target: &mut Vec<u8>) {
        target.extend_from_slice(&self.0);
    }
}

impl Record for u32 {
    const BYTES: usize = 4;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        Cursor(bytes).u32("number")
    }
    fn write(&self, target: &mut Vec<u8>) {
        put_u32(*self, target);
    }
}

impl Record for LeaseId {
    const BYTES: usize = 8;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        Ok(LeaseId(Cursor(bytes).u64("lease")?))
    }
    fn write(&self, target: &mut Vec<u8>) {
        put_u64(self.0, target);
    }
}

impl Record for ReservationId {
    const BYTES: usize = 8;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        Ok(ReservationId(Cursor(bytes).u64("reservation")?))
    }
    fn write(&self, target: &mut Vec<u8>) {
        put_u64(self.0, target);
    }
}

impl Record for bool {
    const BYTES: usize = 1;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        match Cursor(bytes).u8("flag")? {
            0 => Ok(false),
            1 => Ok(true),
            code => Err(DecodeError::UnknownCode { field: "flag", code: code.into() }),
        }
    }
    fn write(&self, target: &mut Vec<u8>) {
        target.push(u8::from(*self));
    }
}

fn tier_code(tier: Tier) -> u8 {
    match tier {
        Tier::Host => 1,
        Tier::Nvme => 2,
    }
}

fn tier_of(code: u8) -> Result<Tier, DecodeError> {
    match code {
        1 => Ok(Tier::Host),
        2 => Ok(Tier::Nvme),
        code => Err(DecodeError::UnknownCode { field: "tier", code: code.into() }),
    }
}

impl Record for Option<Tier> {
    const BYTES: usize = 1;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        match Cursor(bytes).u8("tier")? {
            0 => Ok(None),
            code => tier_of(code).map(Some),
        }
    }
    fn write(&self, target: &mut Vec<u8>) {
        target.push(self.map_or(0, tier_code));
    }
}

impl Record for Slot {
    const BYTES: usize = 24;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor(bytes);
        let reservation = ReservationId(cursor.u64("slot")?);
        Ok(Slot { reservation, extent: cursor.extent()? })
    }
    fn write(&self, target: &mut Vec<u8>) {
        put_u64(self.reservation.0, target);
        put_extent(&self.extent, target);
    }
}

impl Record for Sealed {
    const BYTES: usize = 1;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        Ok(match Cursor(bytes).u8("outcome")? {
            0 => Sealed::Published,
            1 => Sealed::Present,
            2 => Sealed::Stale,
            3 => Sealed::Busy,
            4 => Sealed::Invalid,
            code => return Err(DecodeError::UnknownCode { field: "outcome of a seal", code: code.into() }),
        })
    }
    fn write(&self, target: &mut Vec<u8>) {
        target.push(match self {
            Sealed::Published => 0,
            Sealed::Present => 1,
            Sealed::Stale => 2,
            Sealed::Busy => 3,
            Sealed::Invalid => 4,
        });
    }
}

impl Record for Fetched {
    const BYTES: usize = 32;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor(bytes);
        let outcome = cursor.u8("fetched")?;
        if outcome < 2 {
            cursor.zero::<31>("what follows a miss")?;
            return Ok(if outcome == 0 { Fetched::Miss } else { Fetched::Busy });
        }
        if outcome > 2 {
            return Err(DecodeError::UnknownCode { field: "outcome of a fetch", code: outcome.into() });
        }
        let tier = tier_of(cursor.u8("fetched")?)?;
        let checked = cursor.u8("fetched")?;
        cursor.zero::<1>("padding of fetched")?;
        let checksum = cursor.u32("fetched")?;
        let checksum = match (checked, checksum) {
            (0, 0) => None,
            (0, _) => return Err(DecodeError::NotZero { field: "checksum that is not there" }),
            (1, checksum) => Some(checksum),
            (code, _) => return Err(DecodeError::UnknownCode { field: "checked", code: code.into() }),
        };
        let lease = LeaseId(cursor.u64("fetched")?);
        Ok(Fetched::Leased { lease, extent: cursor.extent()?, tier, checksum })
    }
    fn write(&self, target: &mut Vec<u8>) {
        match self {
            Fetched::Miss => target.extend_from_slice(&[0; 32]),
            Fetched::Busy => {
                target.push(1);
                target.extend_from_slice(&[0; 31]);
            }
            Fetched::Leased { lease, extent, tier, checksum } => {
                target.extend_from_slice(&[2, tier_code(*tier), u8::from(checksum.is_some()), 0]);
                put_u32(checksum.unwrap_or(0), target);
                put_u64(lease.0, target);
                put_extent(extent, target);
            }
        }
    }
}

impl Record for Reserved {
    const BYTES: usize = 32;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor(bytes);
        let outcome = cursor.u8("reserved")?;
        cursor.zero::<7>("padding of reserved")?;
        match outcome {
            0 | 1 => {
                cursor.zero::<24>("what follows a refusal")?;
                Ok(if outcome == 0 { Reserved::Present } else { Reserved::Busy })
            }
            2 => {
                let reservation = ReservationId(cursor.u64("reserved")?);
                Ok(Reserved::Granted { reservation, extent: cursor.extent()? })
            }
            code => Err(DecodeError::UnknownCode { field: "outcome of a reserve", code: code.into() }),
        }
    }
    fn write(&self, target: &mut Vec<u8>) {
        let outcome = match self {
            Reserved::Present => 0,
            Reserved::Busy => 1,
            Reserved::Granted { .. } => 2,
        };
        target.extend_from_slice(&[outcome, 0, 0, 0, 0, 0, 0, 0]);
        match self {
            Reserved::Present | Reserved::Busy => target.extend_from_slice(&[0; 24]),
            Reserved::Granted { reservation, extent } => {
                put_u64(reservation.0, target);
                put_extent(extent, target);
            }
        }
    }
}

pub(super) fn parent_code(parent: Parent) -> (u32, BlockHash) {
    match parent {
        Parent::Unknown => (0, BlockHash::default()),
        Parent::Root => (1, BlockHash::default()),
        Parent::Block(hash) => (2, hash),
    }
}

pub(super) fn parent_of(code: u32, hash: BlockHash) -> Result<Parent, DecodeError> {
    match (code, hash) {
        (2, hash) => Ok(Parent::Block(hash)),
        (0 | 1, BlockHash([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])) => {
            Ok(if code == 0 { Parent::Unknown } else { Parent::Root })
        }
        (0 | 1, _) => Err(DecodeError::NotZero { field: "parent that is not there" }),
        (code, _) => Err(DecodeError::UnknownCode { field: "parent", code }),
    }
}

impl Record for SealItem {
    const BYTES: usize = 56;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor(bytes);
        let reservation = ReservationId(cursor.u64("item")?);
        let hash = cursor.hash("item")?;
        let parent = cursor.hash("item")?;
        let parent = parent_of(cursor.u32("item")?, parent)?;
        let length = cursor.u32("item")?;
        let tokens = cursor.u32("item")?;
        cursor.zero::<4>("padding of item")?;
        Ok(SealItem { reservation, hash, parent, length, tokens })
    }
    fn write(&self, target: &mut Vec<u8>) {
        let (code, parent) = parent_code(self.parent);
        put_u64(self.reservation.0, target);
        target.extend_from_slice(&self.hash.0);
        target.extend_from_slice(&parent.0);
        put_u32(code, target);
        put_u32(self.length, target);
        put_u32(self.tokens, target);
        put_u32(0, target);
    }
}
