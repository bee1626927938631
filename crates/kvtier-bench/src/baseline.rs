//! What the product is compared with, through the rawest means: memory copies by pointer, an io_uring ring, and the CPU
//! time of another process.
//!
//! The copy is one `memcpy` per block between a populated, shared, memfd-backed mapping (made exactly as the daemon makes
//! its segments) and ordinary private memory: what a client would do if blocks needed no daemon at all.
#![expect(
    unsafe_code,
    reason = "a baseline copies through raw pointers, gives the kernel pointers, and asks libc for another process's CPU clock"
)]

mod ring;
mod socket;

pub use ring::{RawRequest, RawRing};
pub use socket::RawSockets;

use std::sync::Arc;
use std::time::Duration;

use kvtier_transfer::memory::{MemoryRegion, MemorySlice, PageRequest};

use crate::BenchError;

/// A populated shared mapping, cut into blocks, that nobody but this process uses.
pub struct SharedBlocks {
    region: Arc<MemoryRegion>,
    block_bytes: usize,
}

impl SharedBlocks {
    /// At least `bytes` of shared memory in blocks of `block_bytes`, every page present.
    ///
    /// # Errors
    /// [`BenchError::System`] when the memory cannot be had.
    pub fn create(bytes: usize, block_bytes: usize) -> Result<SharedBlocks, BenchError> {
        let (region, _descriptor) =
            MemoryRegion::create("kvtier-bench", bytes.next_multiple_of(2 << 20), PageRequest::Auto).map_err(
                |error| BenchError::System {
                    what: format!("{bytes} bytes of shared memory"),
                    source: std::io::Error::other(error.to_string()),
                },
            )?;
        region.prefault(&|_| {}).map_err(|error| BenchError::System {
            what: "population of shared memory".to_owned(),
            source: std::io::Error::other(error.to_string()),
        })?;
        Ok(SharedBlocks { region, block_bytes })
    }

    /// The same memory cut differently.
    #[must_use]
    pub fn recut(self, block_bytes: usize) -> SharedBlocks {
        SharedBlocks { block_bytes, ..self }
    }

    /// How many blocks there are.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.region.bytes() / self.block_bytes
    }

    /// Size of the pages behind the mapping.
    #[must_use]
    pub fn page_kib(&self) -> u32 {
        self.region.page_kib()
    }

    /// `memcpy` of one block out of the mapping, as in a get.
    ///
    /// # Panics
    /// When `block` is out of range or `target` is not of the block's size.
    pub fn copy_out(&self, block: usize, target: &mut [u8]) {
        let source = self.pointer(block, target.len());
        // SAFETY: `pointer` checked that the range lies in the mapping, which `self.region` keeps alive; nobody else has
        // this memfd, so nothing writes it meanwhile; `target` is private memory and cannot overlap it.
        unsafe { std::ptr::copy_nonoverlapping(source.cast_const(), target.as_mut_ptr(), target.len()) };
    }

    /// `memcpy` of one block into the mapping, as in a put.
    ///
    /// # Panics
    /// When `block` is out of range or `source` is not of the block's size.
    pub fn copy_in(&mut self, block: usize, source: &[u8]) {
        let target = self.pointer(block, source.len());
        // SAFETY: as in `copy_out`; `&mut self` makes this the only access to the mapping.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), target, source.len()) };
    }

    fn pointer(&self, block: usize, length: usize) -> *mut u8 {
        assert_eq!(length, self.block_bytes, "a block of another size");
        self.region
            .slice(block * self.block_bytes, length)
            .expect("a block inside the mapping")
            .as_mut_ptr()
    }
}

/// `memcpy` from one mapping into another of the same length.
///
/// # Panics
/// When the lengths differ.
pub fn copy(source: &MemorySlice, target: &MemorySlice) {
    assert_eq!(source.len(), target.len(), "a copy between unequal lengths");
    // SAFETY: both ranges have the same length and lie in mappings that the slices keep; the harness makes source and target
    // two regions, so they do not overlap.
    unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), target.as_mut_ptr(), source.len()) };
}

/// CPU time that a process used so far, all its threads, ended ones too. `None` when there is no such process.
#[must_use]
pub fn process_cpu_time(process: u32) -> Option<Duration> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: `clock` outlives the call, which only writes it.
    let status = unsafe { libc::clock_getcpuclockid(libc::pid_t::try_from(process).ok()?, &raw mut clock) };
    if status != 0 {
        return None;
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` outlives the call, which only writes it; an unknown clock is refused with an error.
    let status = unsafe { libc::clock_gettime(clock, &raw mut time) };
    (status == 0).then(|| Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_copied_in_comes_out_the_same_and_its_neighbours_stay_zero() {
        let mut shared = SharedBlocks::create(2 << 20, 64 << 10).expect("2 MiB of shared memory");
        let block: Vec<u8> = (0..64 << 10).map(|byte: u32| (byte % 251) as u8 | 1).collect();
        shared.copy_in(3, &block);
        let mut target = vec![0; 64 << 10];
        shared.copy_out(3, &mut target);
        assert_eq!(target, block);
        for neighbour in [2, 4] {
            shared.copy_out(neighbour, &mut target);
            assert!(target.iter().all(|&byte| byte == 0), "block {neighbour} was touched");
        }
    }

    #[test]
    fn the_cpu_time_of_this_process_grows_with_work_and_a_missing_process_has_none() {
        let before = process_cpu_time(std::process::id()).expect("this process");
        let mut sum = 0u64;
        for number in 0..3_000_000u64 {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(number));
        }
        assert!(process_cpu_time(std::process::id()).expect("this process") > before);
        assert_eq!(process_cpu_time(u32::MAX), None);
    }
}
