use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use super::{CopyError, MemoryRegion, MemorySlice, OutOfRange};

/// A range of memory that somebody else in this process owns: an engine's page. It does not keep that memory alive.
///
/// The one rule: whoever makes it promises that the bytes stay mapped until the last clone is gone, or until no copy
/// is made through it any more.
#[derive(Clone)]
pub struct ForeignSlice {
    address: NonNull<u8>,
    length: usize,
    /// Set when the memory is a region of ours after all.
    region: Option<Arc<MemoryRegion>>,
}

// SAFETY: the memory belongs to no thread, and every access is a copy through raw pointers that others may race with.
unsafe impl Send for ForeignSlice {}
// SAFETY: as for `Send`; no reference to the bytes exists.
unsafe impl Sync for ForeignSlice {}

impl ForeignSlice {
    /// The `length` bytes at `address`.
    ///
    /// # Safety
    /// The bytes are mapped, readable and (where they are a copy's target) writable until no copy through this slice or a
    /// clone of it can happen any more, and no Rust reference to them exists meanwhile. They may lie in a [`MemoryRegion`]
    /// if that promise covers it too: the copies allow overlap.
    #[must_use]
    pub unsafe fn new(address: NonNull<u8>, length: usize) -> ForeignSlice {
        ForeignSlice {
            address,
            length,
            region: None,
        }
    }

    /// A writable slice of a region, seen as if it were somebody else's. It keeps the region alive.
    ///
    /// # Errors
    /// `ReadOnly` when the region is mapped read-only.
    pub fn of(slice: &MemorySlice) -> Result<ForeignSlice, CopyError> {
        if !slice.is_writable() {
            return Err(CopyError::ReadOnly);
        }
        let address = NonNull::new(slice.as_mut_ptr()).ok_or(CopyError::ReadOnly)?;
        Ok(ForeignSlice {
            address,
            length: slice.len(),
            region: Some(Arc::clone(slice.region())),
        })
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Copies the bytes from `offset` on into all of `target`.
    pub fn copy_to(&self, offset: usize, target: &MemorySlice) -> Result<(), ForeignCopyError> {
        let source = self.range(offset, target.len())?;
        if !target.is_writable() {
            return Err(CopyError::ReadOnly.into());
        }
        // SAFETY: both sides have the target's length; `range` checked that the source lies in this slice, whose maker
        // promised that it is mapped; the target keeps its region alive. `copy` allows overlap, which a slice made by
        // `of` may have.
        unsafe { std::ptr::copy(source, target.as_mut_ptr(), target.len()) }
        Ok(())
    }

    /// Copies all of `source` over the bytes from `offset` on.
    pub fn copy_from(&self, offset: usize, source: &MemorySlice) -> Result<(), ForeignCopyError> {
        let target = self.range(offset, source.len())?;
        // SAFETY: both sides have the source's length; `range` checked that the target lies in this slice, whose maker
        // promised that it is mapped and writable; the source keeps its region alive. `copy` allows overlap.
        unsafe { std::ptr::copy(source.as_ptr(), target, source.len()) }
        Ok(())
    }

    fn range(&self, offset: usize, length: usize) -> Result<*mut u8, OutOfRange> {
        if offset.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(OutOfRange {
                offset,
                length,
                bytes: self.length,
            });
        }
        Ok(self.address.as_ptr().wrapping_add(offset))
    }
}

impl fmt::Debug for ForeignSlice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ForeignSlice")
            .field("length", &self.length)
            .field("ours", &self.region.is_some())
            .finish_non_exhaustive()
    }
}

/// A copy from or to foreign memory that was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForeignCopyError {
    /// Past the end.
    #[error(transparent)]
    Range(#[from] OutOfRange),
    /// Into a mapping that is read-only.
    #[error(transparent)]
    Copy(#[from] CopyError),
}
