use std::fmt;

use super::field::put_count;
use super::{DecodeError, EncodeError, KEYS_MAX};

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
            return Err(EncodeError::TooMany {
                field,
                count: self.len(),
            });
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
