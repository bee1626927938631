//! The host tier: segments of shared memory, each a memory file of its own.
//!
//! Segments of the base size come from a pool that is prefaulted at start and refilled in the background, so that
//! opening one costs nothing; other sizes are made on demand, for which pooled memory is given back. Together they
//! never exceed the capacity.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use kvtier_core::{Extent, SegmentId};
use kvtier_transfer::memory::{
    HUGE_PAGE_BYTES, MemoryError, MemoryRegion, MemorySlice, OutOfRange, PAGE_BYTES, PageKind, PageRequest,
    free_huge_pages, shared_huge_pages_allowed,
};
use parking_lot::{Condvar, Mutex};
use rustix::fs::FallocateFlags;

/// A range longer than this is zeroed in steps.
const ZEROED_AT_ONCE: u32 = 1 << 30;

/// Whether segments lie on 2 MiB pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Reserved ones if there are enough, else transparent ones if the system allows, else 4 KiB.
    #[default]
    Auto,
    /// 4 KiB pages.
    Never,
    /// Reserved ones, or the tier does not start.
    Require,
}

/// Sizes and placement of a [`HostTier`].
#[derive(Clone, Debug)]
pub struct HostSettings {
    /// Memory for all segments, pooled ones included, bytes.
    pub capacity_bytes: u64,
    /// Size of a pooled segment, bytes (multiple of 4 KiB; of 2 MiB to lie on reserved huge pages). Each segment is one
    /// open file and one mapping.
    pub base_segment_bytes: u64,
    /// Preferred NUMA node; `None`: wherever the kernel likes.
    pub numa_node: Option<u32>,
    /// Lock the memory if the system allows.
    pub lock: bool,
    /// Page kind.
    pub huge: HugePages,
}

/// Why the host tier refused.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A setting that cannot be.
    #[error("{field} = {value}: {remedy}")]
    Settings {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What to do.
        remedy: &'static str,
    },
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A thread could not be started.
    #[error("cannot start a thread for the host tier: {0}")]
    Thread(std::io::Error),
    /// The segment does not fit into the capacity.
    #[error("no room for a segment of {bytes} bytes: {used_bytes} of {capacity_bytes} are in use")]
    Full {
        /// What was asked for.
        bytes: u64,
        /// Bytes of open segments.
        used_bytes: u64,
        /// Bound of the tier.
        capacity_bytes: u64,
    },
    /// The id is in use.
    #[error("segment {} is open already", .0.0)]
    AlreadyOpen(SegmentId),
    /// The id is not in use.
    #[error("segment {} is not open", .0.0)]
    NotOpen(SegmentId),
    /// The extent does not lie in its segment.
    #[error("extent outside segment {}: {source}", .segment.0)]
    Extent {
        /// Which segment.
        segment: SegmentId,
        /// Where and how large.
        source: OutOfRange,
    },
}

/// A segment of host memory: its mapping here and the file that other processes may map.
#[derive(Clone, Debug)]
pub struct HostSegment {
    /// The mapping in this process.
    pub region: Arc<MemoryRegion>,
    /// The sealed memory file, to pass to clients.
    pub file: Arc<OwnedFd>,
}

/// What the tier holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostUsage {
    /// Open segments.
    pub segments: u64,
    /// Their bytes.
    pub segment_bytes: u64,
    /// Bytes made ready and not assigned.
    pub pool_bytes: u64,
}

/// Segments of shared memory.
///
/// Memory of a closed segment is zeroed and given back to the system, never handed to another owner.
pub struct HostTier {
    shared: Arc<Shared>,
    refill: Option<JoinHandle<()>>,
}

struct Shared {
    settings: HostSettings,
    state: Mutex<State>,
    /// Rung when memory is pooled, given back or wanted, and at the end.
    changed: Condvar,
    /// Whether every segment so far could be locked.
    locked: AtomicBool,
    smallest_page_kib: AtomicU64,
}

#[derive(Default)]
struct State {
    open: HashMap<SegmentId, HostSegment>,
    pool: Vec<HostSegment>,
    open_bytes: u64,
    pool_bytes: u64,
    /// Being made or zeroed outside the lock: counted, not usable.
    busy_bytes: u64,
    /// Callers of `open` that wait: the refill keeps out of their way.
    waiting: usize,
    /// The refill met an error; it tries again when something is closed.
    refill_paused: bool,
    stopping: bool,
}

impl State {
    fn used_bytes(&self) -> u64 {
        self.open_bytes + self.pool_bytes + self.busy_bytes
    }
}

impl HostTier {
    /// Makes the tier and fills its pool, on as many threads as there are cores. Calls `progress` with bytes done and
    /// bytes in total.
    pub fn start(settings: HostSettings, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<HostTier, HostError> {
        check(&settings)?;
        let base = settings.base_segment_bytes;
        let count = settings.capacity_bytes / base;
        let shared = Arc::new(Shared {
            locked: AtomicBool::new(settings.lock),
            smallest_page_kib: AtomicU64::new(u64::from(PageKind::Huge.kib())),
            settings,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        });
        fill_pool(&shared, count, progress)?;
        let refill = thread::Builder::new()
            .name("kvtier-host".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.refill()
            })
            .map_err(HostError::Thread)?;
        Ok(HostTier {
            shared,
            refill: Some(refill),
        })
    }

    /// Makes a segment of `bytes` ready: zeroed, mapped and present. One of the base size comes from the pool at once;
    /// others are made here, which takes time: call it from a thread that may wait.
    pub fn open(&self, segment: SegmentId, bytes: u64) -> Result<(), HostError> {
        let shared = &*self.shared;
        let given_back = match shared.claim(segment, bytes)? {
            Claim::Pooled => return Ok(()),
            Claim::Room { given_back } => given_back,
        };
        drop(given_back);
        let made = shared.make(bytes);
        let mut state = shared.state.lock();
        state.busy_bytes -= bytes;
        shared.changed.notify_all();
        let made = made?;
        if state.open.contains_key(&segment) {
            return Err(HostError::AlreadyOpen(segment));
        }
        state.open_bytes += bytes;
        state.open.insert(segment, made);
        Ok(())
    }

    /// Zeroes a segment and gives its memory back. Whoever still maps it sees zeroes.
    pub fn close(&self, segment: SegmentId) -> Result<(), HostError> {
        let shared = &*self.shared;
        let mut state = shared.state.lock();
        let closed = state.open.remove(&segment).ok_or(HostError::NotOpen(segment))?;
        let bytes = closed.region.bytes() as u64;
        state.open_bytes -= bytes;
        state.busy_bytes += bytes;
        drop(state);
        // Pages that a device holds stay its own under a hole, and a client's device may hold them without this process knowing:
        // they are zeroed where they lie.
        closed.region.zero();
        if !closed.region.is_pinned() {
            // A client may still map the memory: its pages go back to the system all the same, and it sees zeroes.
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Without it the pages go back with the last mapping.
            let _ = rustix::fs::fallocate(&*closed.file, punch, 0, bytes);
        }
        drop(closed);
        let mut state = shared.state.lock();
        state.busy_bytes -= bytes;
        state.refill_paused = false;
        shared.changed.notify_all();
        Ok(())
    }

    /// Zeroes byte ranges of an open segment that nobody else touches.
    pub fn zero(&self, segment: SegmentId, ranges: &[Range<u64>]) -> Result<(), HostError> {
        for range in ranges {
            let mut offset = range.start;
            while offset < range.end {
                let length = u32::try_from(range.end - offset)
                    .unwrap_or(ZEROED_AT_ONCE)
                    .min(ZEROED_AT_ONCE);
                let extent = Extent {
                    segment,
                    offset,
                    length,
                };
                self.slice(&extent)?.zero();
                offset += u64::from(length);
            }
        }
        Ok(())
    }

    /// The bytes of an extent.
    pub fn slice(&self, extent: &Extent) -> Result<MemorySlice, HostError> {
        let region = {
            let state = self.shared.state.lock();
            Arc::clone(
                &state
                    .open
                    .get(&extent.segment)
                    .ok_or(HostError::NotOpen(extent.segment))?
                    .region,
            )
        };
        let offset = usize::try_from(extent.offset).unwrap_or(usize::MAX);
        region
            .slice(offset, extent.length as usize)
            .map_err(|source| HostError::Extent {
                segment: extent.segment,
                source,
            })
    }

    /// An open segment.
    #[must_use]
    pub fn segment(&self, segment: SegmentId) -> Option<HostSegment> {
        self.shared.state.lock().open.get(&segment).cloned()
    }

    /// The memory file of an open segment, to pass to a client.
    #[must_use]
    pub fn file(&self, segment: SegmentId) -> Option<Arc<OwnedFd>> {
        self.shared
            .state
            .lock()
            .open
            .get(&segment)
            .map(|open| Arc::clone(&open.file))
    }

    /// What is held now.
    #[must_use]
    pub fn usage(&self) -> HostUsage {
        let state = self.shared.state.lock();
        HostUsage {
            segments: state.open.len() as u64,
            segment_bytes: state.open_bytes,
            pool_bytes: state.pool_bytes,
        }
    }

    /// Size of the smallest pages in use, KiB.
    #[must_use]
    pub fn page_kib(&self) -> u32 {
        u32::try_from(self.shared.smallest_page_kib.load(Ordering::Relaxed)).unwrap_or(4)
    }

    /// One line for the operator: which pages the memory lies on, and how to get better ones.
    #[must_use]
    pub fn page_note(&self) -> String {
        self.shared.page_note()
    }
}

impl Drop for HostTier {
    fn drop(&mut self) {
        self.shared.state.lock().stopping = true;
        self.shared.changed.notify_all();
        if let Some(refill) = self.refill.take() {
            // A panic of that thread was reported when it happened.
            let _ = refill.join();
        }
    }
}

enum Claim {
    /// Assigned from the pool.
    Pooled,
    /// The bytes are counted as busy: make the segment. What was taken from the pool for it is to be dropped first.
    Room { given_back: Vec<HostSegment> },
}

impl Shared {
    fn claim(&self, segment: SegmentId, bytes: u64) -> Result<Claim, HostError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES as u64) || usize::try_from(bytes).is_err() {
            return Err(MemoryError::Size {
                bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
            }
            .into());
        }
        let capacity = self.settings.capacity_bytes;
        let mut state = self.state.lock();
        loop {
            if state.open.contains_key(&segment) {
                return Err(HostError::AlreadyOpen(segment));
            }
            if bytes == self.settings.base_segment_bytes
                && let Some(ready) = state.pool.pop()
            {
                state.pool_bytes -= bytes;
                state.open_bytes += bytes;
                state.open.insert(segment, ready);
                self.changed.notify_all();
                return Ok(Claim::Pooled);
            }
            if state.open_bytes.saturating_add(bytes) > capacity {
                return Err(HostError::Full {
                    bytes,
                    used_bytes: state.open_bytes,
                    capacity_bytes: capacity,
                });
            }
            let mut given_back = Vec::new();
            while state.used_bytes() + bytes > capacity
                && let Some(spare) = state.pool.pop()
            {
                state.pool_bytes -= spare.region.bytes() as u64;
                given_back.push(spare);
            }
            if state.used_bytes() + bytes <= capacity {
                state.busy_bytes += bytes;
                return Ok(Claim::Room { given_back });
            }
            // The rest is being pooled or zeroed at this moment, which ends soon.
            drop(given_back);
            state.waiting += 1;
            self.changed.wait(&mut state);
            state.waiting -= 1;
        }
    }

    fn make(&self, bytes: u64) -> Result<HostSegment, HostError> {
        let settings = &self.settings;
        let length = usize::try_from(bytes).map_err(|_| MemoryError::Size { bytes: usize::MAX })?;
        let pages = match settings.huge {
            HugePages::Auto => PageRequest::Auto,
            HugePages::Never => PageRequest::Small,
            HugePages::Require => PageRequest::Huge,
        };
        let (region, file) = MemoryRegion::create("kvtier-segment", length, pages)?;
        if let Some(node) = settings.numa_node {
            region.bind(node)?;
        }
        region.prefault(&|_| {})?;
        if settings.lock && !region.lock() {
            self.locked.store(false, Ordering::Relaxed);
        }
        self.smallest_page_kib
            .fetch_min(u64::from(region.page_kib()), Ordering::Relaxed);
        Ok(HostSegment {
            region,
            file: Arc::new(file),
        })
    }

    /// Keeps the pool as full as the capacity allows, until the tier goes.
    fn refill(&self) {
        let base = self.settings.base_segment_bytes;
        let mut state = self.state.lock();
        while !state.stopping {
            let room = state.used_bytes() + base <= self.settings.capacity_bytes;
            if !room || state.waiting > 0 || state.refill_paused {
                self.changed.wait(&mut state);
                continue;
            }
            state.busy_bytes += base;
            drop(state);
            let made = self.make(base);
            state = self.state.lock();
            state.busy_bytes -= base;
            match made {
                Ok(ready) => {
                    state.pool_bytes += base;
                    state.pool.push(ready);
                }
                Err(error) => {
                    state.refill_paused = true;
                    tracing::warn!(%error, "host memory could not be made ready ahead of use; trying again when a segment is closed");
                }
            }
            self.changed.notify_all();
        }
    }

    fn page_note(&self) -> String {
        let capacity = self.settings.capacity_bytes;
        let huge_pages = capacity.div_ceil(HUGE_PAGE_BYTES as u64);
        let mut note = match (self.settings.huge, self.smallest_page_kib.load(Ordering::Relaxed)) {
            (HugePages::Never, _) => "host memory lies on 4 KiB pages, as the settings say".to_owned(),
            (HugePages::Require, _) => "host memory lies on reserved 2 MiB pages".to_owned(),
            (HugePages::Auto, 4) => format!(
                "host memory lies on 4 KiB pages ({} 2 MiB pages are free, shared memory {} transparent ones): copies and device reads are faster after \
                 `sysctl vm.nr_hugepages={huge_pages}` or `echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled`",
                free_huge_pages(),
                if shared_huge_pages_allowed() {
                    "may have"
                } else {
                    "gets no"
                },
            ),
            (HugePages::Auto, _) if shared_huge_pages_allowed() => {
                "host memory lies on 2 MiB pages (reserved or transparent ones)".to_owned()
            }
            (HugePages::Auto, _) => "host memory lies on reserved 2 MiB pages".to_owned(),
        };
        if self.settings.lock && !self.locked.load(Ordering::Relaxed) {
            note.push_str("; not all of it could be locked and may be swapped out: raise LimitMEMLOCK (ulimit -l)");
        }
        note
    }
}

fn check(settings: &HostSettings) -> Result<(), HostError> {
    let page = PAGE_BYTES as u64;
    let base = settings.base_segment_bytes;
    if base == 0 || !base.is_multiple_of(page) {
        return Err(HostError::Settings {
            field: "base_segment_bytes",
            value: base,
            remedy: "must be a positive multiple of 4 KiB",
        });
    }
    if settings.huge == HugePages::Require && !base.is_multiple_of(HUGE_PAGE_BYTES as u64) {
        return Err(HostError::Settings {
            field: "base_segment_bytes",
            value: base,
            remedy: "must be a multiple of 2 MiB when huge pages are required",
        });
    }
    if settings.capacity_bytes < base {
        return Err(HostError::Settings {
            field: "capacity_bytes",
            value: settings.capacity_bytes,
            remedy: "must hold at least one base segment",
        });
    }
    Ok(())
}

fn fill_pool(shared: &Shared, count: u64, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<(), HostError> {
    let base = shared.settings.base_segment_bytes;
    let left = AtomicU64::new(count);
    let done = Mutex::new(0);
    let threads = thread::available_parallelism()
        .map_or(1, |cores| cores.get() as u64)
        .min(count);
    let worker = || -> Result<(), HostError> {
        while left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .is_ok()
        {
            let ready = shared.make(base).inspect_err(|_| left.store(0, Ordering::Relaxed))?;
            let mut state = shared.state.lock();
            state.pool_bytes += base;
            state.pool.push(ready);
            drop(state);
            let mut done = done.lock();
            *done += base;
            progress(*done, count * base);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().expect("a prefaulting thread does not panic"))
    })
}

#[cfg(test)]
mod tests;
