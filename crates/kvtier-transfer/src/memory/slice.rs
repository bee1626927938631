use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use super::{Access, MemoryRegion, PAGE_BYTES};

/// A range that does not lie in its region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes {offset}..+{length} do not lie in a range of {bytes} bytes")]
pub struct OutOfRange {
    /// First byte.
    pub offset: usize,
    /// How many.
    pub length: usize,
    /// Size of what they should lie in.
    pub bytes: usize,
}

/// A copy that was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    /// The two sides differ in length; nothing was copied.
    #[error("the slice has {slice} bytes, the other side {other}")]
    Length {
        /// Bytes of the slice.
        slice: usize,
        /// Bytes of the other side.
        other: usize,
    },
    /// The target is mapped read-only; nothing was copied.
    #[error("the target is mapped read-only")]
    ReadOnly,
}

/// A checked range of a [`MemoryRegion`], which it keeps alive.
///
/// It never yields `&[u8]`: other processes may write the bytes at any time.
#[derive(Clone)]
pub struct MemorySlice {
    region: Arc<MemoryRegion>,
    // `offset + length <= region.bytes()`, kept by the only constructor.
    offset: usize,
    length: usize,
}

impl fmt::Debug for MemorySlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemorySlice")
            .field("offset", &self.offset)
            .field("length", &self.length)
            .field("region_bytes", &self.region.bytes)
            .finish()
    }
}

impl MemorySlice {
    pub(super) fn new(region: &Arc<MemoryRegion>, offset: usize, length: usize) -> Result<MemorySlice, OutOfRange> {
        if offset.checked_add(length).is_none_or(|end| end > region.bytes) {
            return Err(OutOfRange {
                offset,
                length,
                bytes: region.bytes,
            });
        }
        Ok(MemorySlice {
            region: Arc::clone(region),
            offset,
            length,
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

    /// Where it starts in its region.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Its region.
    #[must_use]
    pub fn region(&self) -> &Arc<MemoryRegion> {
        &self.region
    }

    /// The `length` bytes from `offset` on.
    pub fn subslice(&self, offset: usize, length: usize) -> Result<MemorySlice, OutOfRange> {
        if offset.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(OutOfRange {
                offset,
                length,
                bytes: self.length,
            });
        }
        MemorySlice::new(&self.region, self.offset + offset, length)
    }

    /// The same start with another length, longer too as long as the region reaches that far: for callers who know that
    /// what follows is theirs.
    pub fn with_length(&self, length: usize) -> Result<MemorySlice, OutOfRange> {
        MemorySlice::new(&self.region, self.offset, length)
    }

    /// Address of the first byte, for a device or the kernel to read. Keep the slice until they are done.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.region.pointer(self.offset)
    }

    /// Address of the first byte, for a device or the kernel to write. Keep the slice until they are done.
    ///
    /// # Panics
    /// When the mapping is read-only.
    #[must_use]
    pub fn as_mut_ptr(&self) -> *mut u8 {
        assert!(
            self.region.access == Access::ReadWrite,
            "a writable pointer into a read-only mapping"
        );
        self.region.pointer(self.offset)
    }

    /// Whether it may be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.region.access == Access::ReadWrite
    }

    /// Copies all of `source` in.
    pub fn copy_from_slice(&self, source: &[u8]) -> Result<(), CopyError> {
        self.check_copy(source.len(), self)?;
        // SAFETY: both sides have `length` bytes; this one lies in a writable mapping that `self` keeps alive; a
        // `&[u8]` never lies in a region.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), self.as_mut_ptr(), self.length) }
        Ok(())
    }

    /// Copies everything out to `target`.
    pub fn copy_to_slice(&self, target: &mut [u8]) -> Result<(), CopyError> {
        if target.len() != self.length {
            return Err(CopyError::Length {
                slice: self.length,
                other: target.len(),
            });
        }
        // SAFETY: both sides have `length` bytes; this one lies in a mapping that `self` keeps alive; a `&mut [u8]`
        // never lies in a region.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr(), target.as_mut_ptr(), self.length) }
        Ok(())
    }

    /// Copies everything to `target`, which has the same length. The two may overlap.
    pub fn copy_to(&self, target: &MemorySlice) -> Result<(), CopyError> {
        self.check_copy(target.length, target)?;
        if Arc::ptr_eq(&self.region, &target.region) {
            // SAFETY: both sides have `length` bytes in mappings that the slices keep alive; `copy` allows overlap.
            unsafe { std::ptr::copy(self.as_ptr(), target.as_mut_ptr(), self.length) }
        } else {
            // SAFETY: both sides have `length` bytes in two different mappings that the slices keep alive.
            unsafe { std::ptr::copy_nonoverlapping(self.as_ptr(), target.as_mut_ptr(), self.length) }
        }
        Ok(())
    }

    fn check_copy(&self, other: usize, target: &MemorySlice) -> Result<(), CopyError> {
        if other != self.length {
            return Err(CopyError::Length {
                slice: self.length,
                other,
            });
        }
        if target.is_writable() {
            Ok(())
        } else {
            Err(CopyError::ReadOnly)
        }
    }

    /// Everything, in a vector of its own.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        // SAFETY: the vector was made with `length` bytes; this side lies in a mapping that `self` keeps alive.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr(), bytes.as_mut_ptr(), self.length) }
        bytes
    }

    /// Zeroes it.
    ///
    /// # Panics
    /// When the mapping is read-only.
    pub fn zero(&self) {
        // SAFETY: the range lies in a writable mapping that `self` keeps alive.
        unsafe { std::ptr::write_bytes(self.as_mut_ptr(), 0, self.length) }
    }

    /// CRC32C of the bytes. If somebody writes them meanwhile, the sum of no particular state.
    #[must_use]
    pub fn crc32c(&self) -> u32 {
        self.crc32c_after(0)
    }

    /// CRC32C of what summed up to `before`, and these bytes after it.
    #[must_use]
    pub fn crc32c_after(&self, before: u32) -> u32 {
        // SAFETY: the range lies in a mapping that `self` keeps alive.
        unsafe { super::checksum::crc32c_at(before, self.as_ptr(), self.length) }
    }

    /// Reads from `file` at `file_offset` straight into the memory: one pread. Returns how many bytes came, 0 at the
    /// end of the file.
    pub fn read_at(&self, file: impl AsFd, file_offset: u64) -> io::Result<usize> {
        if !self.is_writable() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let file_offset = file_position(file_offset)?;
        // SAFETY: the kernel writes at most `length` bytes from the start of this slice, before the call returns.
        let count = unsafe {
            libc::pread64(
                file.as_fd().as_raw_fd(),
                self.as_mut_ptr().cast(),
                self.length,
                file_offset,
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Writes to `file` at `file_offset` straight from the memory: one pwrite. Returns how many bytes went.
    pub fn write_at(&self, file: impl AsFd, file_offset: u64) -> io::Result<usize> {
        let file_offset = file_position(file_offset)?;
        // SAFETY: the kernel reads at most `length` bytes from the start of this slice, before the call returns.
        let count = unsafe { libc::pwrite64(file.as_fd().as_raw_fd(), self.as_ptr().cast(), self.length, file_offset) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Reads one byte of each 4 KiB, as somebody who uses the bytes in place would, and returns their sum.
    #[must_use]
    pub fn touch_pages(&self) -> u64 {
        let mut sum = 0u64;
        for at in (0..self.length).step_by(PAGE_BYTES) {
            let byte = self.region.pointer(self.offset + at);
            // SAFETY: `at < length`, so the byte lies in a mapping that `self` keeps alive; volatile, for others may
            // write it.
            sum = sum.wrapping_add(u64::from(unsafe { byte.read_volatile() }));
        }
        sum
    }
}

fn file_position(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}
