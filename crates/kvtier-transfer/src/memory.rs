//! Memory regions and checked ranges of them.
//!
//! A region may be mapped by other processes that write to it at any time, so nothing here hands out a reference to its
//! bytes: every access is a copy, a system call or a pointer given to a device. What such a copy reads while somebody
//! writes is unspecified bytes, which the layers above check (a checksum, a seal); it is never used as a length, an
//! offset or a pointer.
#![expect(
    unsafe_code,
    reason = "maps memory and copies through raw pointers, so that no reference to memory shared with other processes exists"
)]

mod checksum;
mod cipher;
mod foreign;
mod pages;
mod pinned;
mod slice;

pub use checksum::crc32c;
pub use cipher::{CIPHER_KEY_BYTES, CIPHER_NONCE_BYTES, CIPHER_TAG_BYTES, Cipher, Opening, SealBroken};
pub use foreign::{ForeignCopyError, ForeignSlice};
pub use pages::{PageKind, PageRequest, free_huge_pages, shared_huge_pages_allowed};
pub use pinned::Pinned;
pub use slice::{CopyError, MemorySlice, OutOfRange};

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// The unit that sizes and offsets are multiples of.
pub const PAGE_BYTES: usize = 4096;
/// Size of a huge page.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Prefaulting reports its progress this often.
const PREFAULT_CHUNK_BYTES: usize = 32 << 20;
/// What every region that is passed on carries: nobody can change its size under somebody who mapped it.
const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);
/// `f_type` of hugetlbfs, see statfs(2).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// What may be done through an attached mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only: a write through this mapping is refused here and would fault.
    ReadOnly,
    /// Read and write.
    ReadWrite,
}

/// Why a region could not be made, attached or prepared.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size that no region can have.
    #[error("a region of {bytes} bytes cannot be made: sizes are positive multiples of {PAGE_BYTES}")]
    Size {
        /// What was asked for.
        bytes: usize,
    },
    /// Huge pages were required and cannot be had.
    #[error(
        "no huge pages for {bytes} bytes ({free} of 2 MiB are free, the size must be a multiple of 2 MiB): reserve more with sysctl vm.nr_hugepages, or do not require them: {source}"
    )]
    NoHugePages {
        /// What was asked for.
        bytes: usize,
        /// Free reserved pages.
        free: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No memory file.
    #[error(
        "cannot create a memory file of {bytes} bytes: {source}{}",
        file_limit_remedy(source)
    )]
    Create {
        /// What was asked for.
        bytes: usize,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No mapping.
    #[error(
        "cannot map {bytes} bytes: {source} (each region is one mapping: see sysctl vm.max_map_count and ulimit -v)"
    )]
    Map {
        /// What was asked for.
        bytes: usize,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The pages could not be had.
    #[error(
        "cannot make {bytes} bytes of memory present: {source} (lower the memory asked for, or raise the container's limit)"
    )]
    Prefault {
        /// The region's size.
        bytes: usize,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A descriptor whose file is not as large as its sender said.
    #[error("the file has {actual} bytes, its sender said {claimed}")]
    SizeMismatch {
        /// What the sender said.
        claimed: usize,
        /// What fstat said.
        actual: u64,
    },
    /// A descriptor whose file may shrink under a mapping, which would kill whoever touches it.
    #[error("the file is not sealed against shrinking")]
    NotSealed,
    /// The NUMA policy was refused.
    #[error("cannot place memory on NUMA node {node}: {source} (nodes are listed in /sys/devices/system/node/online)")]
    Bind {
        /// Which node.
        node: u32,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn file_limit_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => {
            " (each host segment is one open file: raise LimitNOFILE or use larger segments)"
        }
        _ => "",
    }
}

/// A mapping that owns its bytes until the last [`MemorySlice`] of it is gone.
///
/// Other processes may map the same bytes and write them at any time: no reference to them is ever formed.
pub struct MemoryRegion {
    base: NonNull<u8>,
    bytes: usize,
    pages: PageKind,
    access: Access,
    /// Who mapped it. An attached mapping is not inherited by a forked child, where its addresses may be something else's.
    process: u32,
    pins: pinned::Pins,
}

// SAFETY: the mapping belongs to no thread; `base` stays valid until drop, which needs exclusive ownership.
unsafe impl Send for MemoryRegion {}
// SAFETY: all access through `&self` is by copies and system calls that other threads and processes may race with; no
// reference to the bytes exists.
unsafe impl Sync for MemoryRegion {}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegion")
            .field("bytes", &self.bytes)
            .field("pages", &self.pages)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

impl MemoryRegion {
    /// A zeroed region in a memory file of its own, sealed against any change of size. The descriptor can be passed to
    /// other processes; the region does not need it.
    pub fn create(name: &str, bytes: usize, pages: PageRequest) -> Result<(Arc<MemoryRegion>, OwnedFd), MemoryError> {
        check_size(bytes)?;
        if pages != PageRequest::Small {
            match create_huge(name, bytes) {
                Ok(made) => return Ok(made),
                Err(source) if pages == PageRequest::Huge => {
                    return Err(MemoryError::NoHugePages {
                        bytes,
                        free: free_huge_pages(),
                        source,
                    });
                }
                Err(_) => {}
            }
        }
        let file =
            memory_file(name, bytes, MemfdFlags::empty()).map_err(|source| MemoryError::Create { bytes, source })?;
        let mut region = map_shared(&file, bytes, Access::ReadWrite)?;
        if pages == PageRequest::Auto
            && bytes >= HUGE_PAGE_BYTES
            && shared_huge_pages_allowed()
            && region.advise(Advice::LinuxHugepage).is_ok()
        {
            region.pages = PageKind::Transparent;
        }
        Ok((Arc::new(region), file))
    }

    /// Maps a memory file that another process made. It must have exactly `bytes` bytes and be sealed against
    /// shrinking, else it is refused.
    ///
    /// With `populate` the page tables are filled now, so that first touches cost nothing later. The mapping is not
    /// inherited by forks.
    pub fn attach(
        file: OwnedFd,
        bytes: usize,
        access: Access,
        populate: bool,
    ) -> Result<Arc<MemoryRegion>, MemoryError> {
        check_size(bytes)?;
        let actual = rustix::fs::fstat(&file)
            .map_err(|error| MemoryError::Map {
                bytes,
                source: error.into(),
            })?
            .st_size;
        let actual = u64::try_from(actual).unwrap_or(0);
        if actual != bytes as u64 {
            return Err(MemoryError::SizeMismatch { claimed: bytes, actual });
        }
        // Files that know no seals answer with an error: they may shrink.
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|_| MemoryError::NotSealed)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(MemoryError::NotSealed);
        }
        let mut region = map_shared(&file, bytes, access)?;
        if rustix::fs::fstatfs(&file).is_ok_and(|system| system.f_type == HUGETLBFS_MAGIC) {
            region.pages = PageKind::Huge;
        }
        if populate {
            // Worth time, not correctness: a kernel that knows no populate faults the pages in later.
            let _ = match access {
                Access::ReadOnly => region.advise(Advice::LinuxPopulateRead),
                Access::ReadWrite => region.advise(Advice::LinuxPopulateWrite),
            };
        }
        Ok(Arc::new(region))
    }

    /// A zeroed private region, on transparent huge pages when the system allows and it is at least one of them long.
    pub fn anonymous(bytes: usize) -> Result<Arc<MemoryRegion>, MemoryError> {
        check_size(bytes)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        let mut region = MemoryRegion::from_mapping(mapped, bytes, Access::ReadWrite)?;
        if bytes >= HUGE_PAGE_BYTES
            && pages::private_huge_pages_allowed()
            && region.advise(Advice::LinuxHugepage).is_ok()
        {
            region.pages = PageKind::Transparent;
        }
        Ok(Arc::new(region))
    }

    fn from_mapping(
        mapped: rustix::io::Result<*mut libc::c_void>,
        bytes: usize,
        access: Access,
    ) -> Result<MemoryRegion, MemoryError> {
        let base = mapped.map_err(|error| MemoryError::Map {
            bytes,
            source: error.into(),
        })?;
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| MemoryError::Map {
            bytes,
            source: io::ErrorKind::AddrNotAvailable.into(),
        })?;
        let region = MemoryRegion {
            base,
            bytes,
            pages: PageKind::Small,
            access,
            process: std::process::id(),
            pins: pinned::Pins::default(),
        };
        // A child that inherits the mapping would keep the memory alive and could write it behind its owner's back.
        let _ = region.advise(Advice::LinuxDontFork);
        Ok(region)
    }

    /// Makes every page present, so that no later touch waits for the kernel. Calls `progress` with the bytes done so
    /// far.
    pub fn prefault(&self, progress: &dyn Fn(usize)) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < self.bytes {
            let chunk = PREFAULT_CHUNK_BYTES.min(self.bytes - done);
            match self.advise_range(done, chunk, Advice::LinuxPopulateWrite) {
                Ok(()) => {}
                // A kernel before 5.14: touch the pages ourselves.
                Err(rustix::io::Errno::INVAL) => self.touch_for_write(done, chunk),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
                Err(error) => {
                    return Err(MemoryError::Prefault {
                        bytes: self.bytes,
                        source: error.into(),
                    });
                }
            }
            done += chunk;
            progress(done);
        }
        Ok(())
    }

    fn touch_for_write(&self, offset: usize, length: usize) {
        assert!(
            self.access == Access::ReadWrite,
            "prefaulting for write through a read-only mapping"
        );
        for page in (offset..offset + length).step_by(PAGE_BYTES) {
            let byte = self.pointer(page);
            // SAFETY: `pointer` checked that the byte lies in this writable mapping, which lives as long as `self`.
            let byte = unsafe { AtomicU8::from_ptr(byte) };
            // Changes nothing, even if another process writes the same byte at this moment.
            byte.fetch_or(0, Ordering::Relaxed);
        }
    }

    /// Locks the pages into memory; `false` when the system does not allow it (RLIMIT_MEMLOCK).
    #[must_use]
    pub fn lock(&self) -> bool {
        // SAFETY: the range is this mapping; locking changes no bytes.
        unsafe { rustix::mm::mlock(self.base.as_ptr().cast(), self.bytes) }.is_ok()
    }

    /// Prefers NUMA node `node` for pages that are not present yet: call it before [`MemoryRegion::prefault`]. When the
    /// node is full the kernel takes another one.
    pub fn bind(&self, node: u32) -> Result<(), MemoryError> {
        const MPOL_PREFERRED: libc::c_ulong = 1;
        const NODES_MAX: u32 = 1024;
        if node >= NODES_MAX {
            return Err(MemoryError::Bind {
                node,
                source: io::ErrorKind::InvalidInput.into(),
            });
        }
        let mut mask = [0u64; (NODES_MAX / 64) as usize];
        mask[(node / 64) as usize] |= 1 << (node % 64);
        // The kernel ignores the last bit it is told of, hence one more.
        let bits = libc::c_ulong::from(NODES_MAX + 1);
        // SAFETY: the range is this mapping, the mask lives across the call and has the number of bits that the kernel
        // reads.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base.as_ptr(),
                self.bytes,
                MPOL_PREFERRED,
                mask.as_ptr(),
                bits,
                0 as libc::c_ulong,
            )
        };
        if answer == 0 {
            Ok(())
        } else {
            Err(MemoryError::Bind {
                node,
                source: io::Error::last_os_error(),
            })
        }
    }

    /// The NUMA node that its first page lies on; `None` where the system does not tell.
    #[must_use]
    pub fn numa_node(&self) -> Option<u32> {
        const MPOL_F_NODE: libc::c_ulong = 1;
        const MPOL_F_ADDR: libc::c_ulong = 2;
        let mut node: libc::c_int = -1;
        // SAFETY: the kernel writes one number, and only looks at the address, which lies in this mapping.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut node,
                std::ptr::null_mut::<libc::c_ulong>(),
                0 as libc::c_ulong,
                self.base.as_ptr(),
                MPOL_F_NODE | MPOL_F_ADDR,
            )
        };
        (answer == 0).then(|| u32::try_from(node).ok()).flatten()
    }

    /// Zeroes all of it.
    ///
    /// # Panics
    /// When the mapping is read-only.
    pub fn zero(&self) {
        assert!(self.access == Access::ReadWrite, "zeroing through a read-only mapping");
        // SAFETY: the range is this writable mapping.
        unsafe { std::ptr::write_bytes(self.base.as_ptr(), 0, self.bytes) }
    }

    /// A checked range.
    pub fn slice(self: &Arc<Self>, offset: usize, length: usize) -> Result<MemorySlice, OutOfRange> {
        MemorySlice::new(self, offset, length)
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What kind of pages it was given.
    #[must_use]
    pub fn pages(&self) -> PageKind {
        self.pages
    }

    /// Size of its pages in KiB, as far as known: 4 or 2048.
    #[must_use]
    pub fn page_kib(&self) -> u32 {
        self.pages.kib()
    }

    /// What may be done through this mapping.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// The address of the byte at `offset`. Never past the end.
    fn pointer(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.bytes, "offset {offset} in a region of {}", self.bytes);
        self.base.as_ptr().wrapping_add(offset)
    }

    fn advise(&self, advice: Advice) -> rustix::io::Result<()> {
        self.advise_range(0, self.bytes, advice)
    }

    /// Only advice that keeps the bytes as they are.
    fn advise_range(&self, offset: usize, length: usize, advice: Advice) -> rustix::io::Result<()> {
        assert!(offset + length <= self.bytes);
        // SAFETY: the range lies in this mapping; no advice used in this file discards bytes.
        unsafe { rustix::mm::madvise(self.pointer(offset).cast(), length, advice) }
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            return;
        }
        // SAFETY: this mapping was made in a constructor here and every slice of it holds the region, so nobody points
        // into it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "unmapping our own mapping: {unmapped:?}");
    }
}

fn check_size(bytes: usize) -> Result<(), MemoryError> {
    if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) || isize::try_from(bytes).is_err() {
        return Err(MemoryError::Size { bytes });
    }
    Ok(())
}

fn create_huge(name: &str, bytes: usize) -> io::Result<(Arc<MemoryRegion>, OwnedFd)> {
    if !bytes.is_multiple_of(HUGE_PAGE_BYTES) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let file = memory_file(name, bytes, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?;
    // Mapping reserves the pages: from here on no touch can fail for want of them.
    let mut region = map_shared(&file, bytes, Access::ReadWrite).map_err(|error| match error {
        MemoryError::Map { source, .. } => source,
        other => io::Error::other(other),
    })?;
    region.pages = PageKind::Huge;
    Ok((Arc::new(region), file))
}

fn memory_file(name: &str, bytes: usize, flags: MemfdFlags) -> io::Result<OwnedFd> {
    let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know the flag that forbids executing the file.
    let file = rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL)
        .or_else(|_| rustix::fs::memfd_create(name, flags))?;
    rustix::fs::ftruncate(&file, bytes as u64)?;
    rustix::fs::fcntl_add_seals(&file, SIZE_SEALS)?;
    Ok(file)
}

fn map_shared(file: &OwnedFd, bytes: usize, access: Access) -> Result<MemoryRegion, MemoryError> {
    let protection = match access {
        Access::ReadOnly => ProtFlags::READ,
        Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
    };
    let file: BorrowedFd<'_> = file.as_fd();
    // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing; the file is sealed against
    // shrinking, so no touch can fault.
    let mapped = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, file, 0) };
    MemoryRegion::from_mapping(mapped, bytes, access)
}

#[cfg(test)]
mod tests;
