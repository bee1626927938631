use kvtier_core::{BlockHash, Extent, Parent, SegmentId};

use super::array::{Array, Record};
use super::{DecodeError, EncodeError, KEYS_MAX};

/// Counts are bounded by [`KEYS_MAX`] or [`super::FRAME_BYTES_MAX`] before they are written.
pub(crate) fn put_count(count: usize, target: &mut Vec<u8>) {
    target.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
}

pub(crate) fn put_u32(value: u32, target: &mut Vec<u8>) {
    target.extend_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u64(value: u64, target: &mut Vec<u8>) {
    target.extend_from_slice(&value.to_le_bytes());
}

/// What is left of a body. Each method takes one field off its front, or names the field that is cut.
pub(crate) struct Cursor<'a>(pub(crate) &'a [u8]);

impl<'a> Cursor<'a> {
    pub(crate) fn take(&mut self, bytes: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(DecodeError::Truncated { field })?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn fixed<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or(DecodeError::Truncated { field })?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        Ok(self.fixed::<1>(field)?[0])
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.fixed(field)?))
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.fixed(field)?))
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.fixed(field)?))
    }

    pub(crate) fn hash(&mut self, field: &'static str) -> Result<BlockHash, DecodeError> {
        Ok(BlockHash(self.fixed(field)?))
    }

    pub(crate) fn zero<const N: usize>(&mut self, field: &'static str) -> Result<(), DecodeError> {
        if self.fixed::<N>(field)? == [0; N] {
            Ok(())
        } else {
            Err(DecodeError::NotZero { field })
        }
    }

    pub(crate) fn extent(&mut self) -> Result<Extent, DecodeError> {
        let segment = SegmentId(self.u32("extent")?);
        let length = self.u32("extent")?;
        Ok(Extent {
            segment,
            offset: self.u64("extent")?,
            length,
        })
    }

    pub(crate) fn count(&mut self, field: &'static str) -> Result<usize, DecodeError> {
        let count = self.u32(field)?;
        let checked = usize::try_from(count).unwrap_or(usize::MAX);
        if checked > KEYS_MAX {
            Err(DecodeError::TooMany {
                field,
                count,
                max: KEYS_MAX,
            })
        } else {
            Ok(checked)
        }
    }

    pub(crate) fn records<T: Record>(
        &mut self,
        count: usize,
        field: &'static str,
    ) -> Result<Array<'a, T>, DecodeError> {
        Array::decode(self.take(count.saturating_mul(T::BYTES), field)?)
    }

    pub(crate) fn array<T: Record>(&mut self, field: &'static str) -> Result<Array<'a, T>, DecodeError> {
        let count = self.count(field)?;
        self.records(count, field)
    }

    /// Bytes after a u32 length between `min` and `max`.
    pub(crate) fn bytes(&mut self, field: &'static str, min: usize, max: usize) -> Result<&'a [u8], DecodeError> {
        let length = self.u32(field)?;
        let checked = usize::try_from(length).unwrap_or(usize::MAX);
        if checked < min || checked > max {
            return Err(DecodeError::BadLength { field, length, max });
        }
        self.take(checked, field)
    }

    pub(crate) fn text(&mut self, field: &'static str, min: usize, max: usize) -> Result<&'a str, DecodeError> {
        std::str::from_utf8(self.bytes(field, min, max)?).map_err(|_| DecodeError::NotText { field })
    }
}

/// Appends a u32 length between `min` and `max`, then the bytes.
pub(crate) fn put_bytes(
    bytes: &[u8],
    field: &'static str,
    (min, max): (usize, usize),
    target: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    if bytes.len() < min || bytes.len() > max {
        return Err(EncodeError::BadLength {
            field,
            length: bytes.len(),
            max,
        });
    }
    put_count(bytes.len(), target);
    target.extend_from_slice(bytes);
    Ok(())
}

pub(crate) fn put_extent(extent: &Extent, target: &mut Vec<u8>) {
    put_u32(extent.segment.0, target);
    put_u32(extent.length, target);
    put_u64(extent.offset, target);
}

pub(crate) fn parent_code(parent: Parent) -> (u32, BlockHash) {
    match parent {
        Parent::Unknown => (0, BlockHash::default()),
        Parent::Root => (1, BlockHash::default()),
        Parent::Block(hash) => (2, hash),
    }
}

pub(crate) fn parent_of(code: u32, hash: BlockHash) -> Result<Parent, DecodeError> {
    match (code, hash) {
        (2, hash) => Ok(Parent::Block(hash)),
        (0 | 1, BlockHash([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])) => {
            Ok(if code == 0 { Parent::Unknown } else { Parent::Root })
        }
        (0 | 1, _) => Err(DecodeError::NotZero {
            field: "parent that is not there",
        }),
        (code, _) => Err(DecodeError::UnknownCode { field: "parent", code }),
    }
}
