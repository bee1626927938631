//! The devices, their memory, and what is in flight on it.

use std::alloc::{Layout, alloc, dealloc};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};

use crate::ipc;
use crate::stream::Stream;

/// How many there are.
pub(crate) const DEVICES: usize = 8;
const MIB: usize = 1 << 20;
const ALIGNMENT: usize = 512;
/// The copy, counted from 1, with which a device breaks.
const BREAKS_AT: usize = 3;

static ALL: [Device; DEVICES] = [
    Device::new("software: well", 256 * MIB),
    Device::new("software: slow", 256 * MIB),
    Device::new("software: small", MIB),
    Device::new("software: breaks", 256 * MIB),
    Device::new("software: refuses", 256 * MIB),
    Device::new("software: kernels", 256 * MIB),
    Device::new("software: launches none", 256 * MIB),
    Device::new("software: wrong kernels", 256 * MIB),
];

/// The same for every device of this process.
static BREAKS_HERE_AT: LazyLock<usize> = LazyLock::new(|| {
    let copies = std::env::var("SOFTGPU_BREAKS_AT");
    copies.ok().and_then(|copies| copies.parse().ok()).unwrap_or(usize::MAX)
});

/// Host memory that was registered or allocated: of the process, whichever device was asked.
static HOST: Mutex<Ranges> = Mutex::new(Ranges(BTreeMap::new()));

thread_local! {
    static CURRENT: Contexts = const { Contexts(RefCell::new(Vec::new())) };
}

/// A thread's stack of contexts.
struct Contexts(RefCell<Vec<&'static Device>>);

impl Drop for Contexts {
    fn drop(&mut self) {
        if let Some(device) = self.0.borrow().last() {
            damage(device.name, "a thread is left with a context that it did not have");
        }
    }
}

/// One device; what it does wrong is in its name.
pub(crate) struct Device {
    pub(crate) name: &'static str,
    pub(crate) bytes: usize,
    memory: Mutex<Memory>,
    copies: AtomicUsize,
    broken: AtomicBool,
    /// Made when it is first asked for.
    default_stream: OnceLock<usize>,
}

struct Memory {
    used: usize,
    /// First byte of all of it; 0 before it is needed.
    arena: u64,
    /// Of memory, so that other processes can map it.
    file: Option<OwnedFd>,
    ranges: Ranges,
}

/// Ranges that are not over, by their first byte.
struct Ranges(BTreeMap<u64, Range>);

struct Range {
    bytes: usize,
    kind: Kind,
    in_flight: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Memory of a device.
    Device,
    /// Memory of a device that processes share.
    Mapped,
    /// Host memory that the driver allocated.
    Host,
    /// Host memory that was registered.
    Registered,
}

pub(crate) fn device(number: c_int) -> Option<&'static Device> {
    ALL.get(usize::try_from(number).ok()?)
}

pub(crate) fn current() -> Option<&'static Device> {
    CURRENT.with(|contexts| contexts.0.borrow().last().copied())
}

/// The device whose context this is.
pub(crate) fn of_context(context: *const c_void) -> Option<&'static Device> {
    ALL.iter()
        .find(|device| std::ptr::eq(std::ptr::from_ref(*device).cast(), context))
}

/// Makes the device whose context this is the calling thread's. Whether there is one.
pub(crate) fn push_current(context: *const c_void) -> bool {
    let found = of_context(context);
    if let Some(device) = found {
        CURRENT.with(|contexts| contexts.0.borrow_mut().push(device));
    }
    found.is_some()
}

/// The context that was the thread's; before it another, or none, was.
pub(crate) fn pop_current() -> Option<&'static Device> {
    CURRENT.with(|contexts| contexts.0.borrow_mut().pop())
}

impl Device {
    const fn new(name: &'static str, bytes: usize) -> Device {
        Device {
            name,
            bytes,
            memory: Mutex::new(Memory {
                used: 0,
                arena: 0,
                file: None,
                ranges: Ranges(BTreeMap::new()),
            }),
            copies: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            default_stream: OnceLock::new(),
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    pub(crate) fn refuses_registrations(&self) -> bool {
        self.name == "software: refuses"
    }

    pub(crate) fn runs_kernels(&self) -> bool {
        self.name == "software: kernels"
    }

    /// Some that then have no memory to try them, or cannot register any, are among them.
    pub(crate) fn loads_kernels(&self) -> bool {
        self.runs_kernels()
            || self.launches_none()
            || self.forgets_blocks()
            || self.refuses_registrations()
            || self.name == "software: small"
    }

    pub(crate) fn launches_none(&self) -> bool {
        self.name == "software: launches none"
    }

    pub(crate) fn forgets_blocks(&self) -> bool {
        self.name == "software: wrong kernels"
    }

    pub(crate) fn number(&self) -> c_int {
        let number = ALL.iter().position(|device| std::ptr::eq(device, self));
        number.and_then(|number| c_int::try_from(number).ok()).unwrap_or(-1)
    }

    /// Whether what runs on the device may go to these bytes: its own memory, or host memory that it knows.
    pub(crate) fn reaches(&self, address: u64, bytes: usize) -> bool {
        let is_own = self.memory.lock().ranges.of(self.name, address, bytes).is_some();
        is_own || HOST.lock().of(self.name, address, bytes).is_some()
    }

    /// Whether something of the device lies there.
    pub(crate) fn owns(&self, address: u64) -> bool {
        self.memory.lock().ranges.of(self.name, address, 1).is_some()
    }

    /// Ends the process: on a device it would be an illegal address, or nothing that anybody sees.
    pub(crate) fn damage(&self, what: &str) -> ! {
        damage(self.name, what)
    }

    pub(crate) fn is_slow(&self) -> bool {
        self.name == "software: slow"
    }

    /// How long it takes before each operation.
    pub(crate) fn delay(&self) -> Duration {
        match self.is_slow() {
            true => Duration::from_millis(30),
            false => Duration::ZERO,
        }
    }

    pub(crate) fn default_stream(&'static self) -> Option<*mut c_void> {
        let made = self
            .default_stream
            .get_or_init(|| Stream::start(self).map_or(0, |stream| stream as usize));
        (*made != 0).then_some(*made as *mut c_void)
    }

    /// Counts a copy. Whether it may be made.
    pub(crate) fn may_copy(&self) -> bool {
        let number = self.copies.fetch_add(1, Ordering::AcqRel) + 1;
        let breaks_at = match self.name {
            "software: breaks" => BREAKS_AT,
            _ => *BREAKS_HERE_AT,
        };
        if number >= breaks_at {
            self.broken.store(true, Ordering::Release);
        }
        !self.is_broken()
    }

    pub(crate) fn free_bytes(&self) -> usize {
        self.bytes - self.memory.lock().used
    }

    pub(crate) fn allocate(&self, bytes: usize) -> Option<u64> {
        let mut memory = self.memory.lock();
        if memory.arena == 0 {
            let file = memfd_create(ipc::ARENA, MemfdFlags::CLOEXEC).ok()?;
            ftruncate(&file, self.bytes as u64).ok()?;
            let allowed = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: the kernel picks addresses that nothing is mapped at. They stay for the rest of the process, so that one of them is
            // never anybody else's.
            let arena = unsafe { mmap(std::ptr::null_mut(), self.bytes, allowed, MapFlags::SHARED, &file, 0) };
            memory.arena = arena.ok()? as u64;
            memory.file = Some(file);
        }
        let base = memory.gap(bytes, self.bytes)?;
        // As on a device: what lies in it is whatever was there.
        // SAFETY: the range lies in the arena, and is nobody's.
        unsafe { (base as *mut u8).write_bytes(0xA5, bytes) };
        memory.used += bytes;
        memory.ranges.add(base, bytes, Kind::Device);
        Some(base)
    }

    /// Where what holds this address begins, and its bytes.
    pub(crate) fn range(&self, address: u64) -> Option<(u64, usize)> {
        let memory = self.memory.lock();
        let (base, range) = memory.ranges.0.range(..=address).next_back()?;
        (address - base < range.bytes as u64).then_some((*base, range.bytes))
    }

    /// What was allocated and holds this address: its descriptor, where it begins in it, and its bytes.
    pub(crate) fn allocation(&self, address: u64) -> Option<(c_int, u64, usize)> {
        let memory = self.memory.lock();
        let (base, range) = memory.ranges.0.range(..=address).next_back()?;
        let is_in = range.kind == Kind::Device && address - base < range.bytes as u64;
        let file = memory.file.as_ref()?.as_raw_fd();
        // What was mapped there may lie before all of it.
        is_in.then(|| (file, base - memory.arena, range.bytes))
    }

    pub(crate) fn free(&self, address: u64) -> bool {
        let mut memory = self.memory.lock();
        let freed = memory.ranges.remove(self.name, address, Kind::Device);
        memory.used -= freed.unwrap_or(0);
        freed.is_some()
    }

    /// Bytes for memory that is shared, if there are so many.
    pub(crate) fn take_bytes(&self, bytes: usize) -> bool {
        let mut memory = self.memory.lock();
        let fits = memory.used + bytes <= self.bytes;
        memory.used += if fits { bytes } else { 0 };
        fits
    }

    pub(crate) fn give_bytes(&self, bytes: usize) {
        self.memory.lock().used -= bytes;
    }

    /// Shared memory can be reached at `address` from now on.
    pub(crate) fn add_mapping(&self, address: u64, bytes: usize) {
        self.memory.lock().ranges.add(address, bytes, Kind::Mapped);
    }

    /// And not any more. Whether it could be.
    pub(crate) fn remove_mapping(&self, address: u64) -> bool {
        let mut memory = self.memory.lock();
        memory.ranges.remove(self.name, address, Kind::Mapped).is_some()
    }

    /// An operation on these bytes begins its wait. Host memory that is not registered is anybody's.
    pub(crate) fn enter(&self, address: u64, bytes: usize) {
        self.count(address, bytes, |range| range.in_flight += 1);
    }

    /// It is over.
    pub(crate) fn leave(&self, address: u64, bytes: usize) {
        // What was registered after an operation on it began was not counted then.
        self.count(address, bytes, |range| {
            range.in_flight = range.in_flight.saturating_sub(1)
        });
    }

    fn count(&self, address: u64, bytes: usize, change: fn(&mut Range)) {
        let mut memory = self.memory.lock();
        let arena = memory.arena..memory.arena + self.bytes as u64;
        let is_mapped = memory.ranges.of(self.name, address, 1).is_some();
        if is_mapped || arena.contains(&address) {
            let Some(range) = memory.ranges.of(self.name, address, bytes) else {
                damage(
                    self.name,
                    "an operation on memory that is not allocated, or not any more",
                );
            };
            return change(range);
        }
        drop(memory);
        if let Some(range) = HOST.lock().of(self.name, address, bytes) {
            change(range);
        }
    }
}

pub(crate) fn allocate_host(bytes: usize) -> Option<u64> {
    let layout = Layout::from_size_align(bytes, ALIGNMENT).ok().filter(|_| bytes > 0)?;
    // SAFETY: a size above zero.
    let base = unsafe { alloc(layout) } as u64;
    if base != 0 {
        HOST.lock().add(base, bytes, Kind::Host);
    }
    (base != 0).then_some(base)
}

pub(crate) fn free_host(address: u64) -> bool {
    let freed = HOST.lock().remove("software", address, Kind::Host);
    let Some(layout) = freed.and_then(|bytes| Layout::from_size_align(bytes, ALIGNMENT).ok()) else {
        return false;
    };
    // SAFETY: allocated with this layout, and no operation is in flight on it.
    unsafe { dealloc(address as *mut u8, layout) };
    true
}

pub(crate) fn register(address: u64, bytes: usize) -> bool {
    let mut host = HOST.lock();
    let is_new = !host.0.contains_key(&address);
    if is_new {
        host.add(address, bytes, Kind::Registered);
    }
    is_new
}

/// Whether host memory that begins there is registered, or the driver's.
pub(crate) fn is_known(address: u64) -> bool {
    HOST.lock().of("software", address, 1).is_some()
}

pub(crate) fn unregister(address: u64) -> bool {
    HOST.lock().remove("software", address, Kind::Registered).is_some()
}

impl Memory {
    /// The first place that is free.
    fn gap(&self, bytes: usize, all: usize) -> Option<u64> {
        let mut at = self.arena;
        for (base, range) in self.ranges.0.iter().filter(|(_, range)| range.kind == Kind::Device) {
            if at + bytes as u64 <= *base {
                break;
            }
            at = (base + range.bytes as u64).next_multiple_of(ALIGNMENT as u64);
        }
        (self.arena > 0 && at + bytes as u64 <= self.arena + all as u64).then_some(at)
    }
}

impl Ranges {
    fn add(&mut self, base: u64, bytes: usize, kind: Kind) {
        let range = Range {
            bytes,
            kind,
            in_flight: 0,
        };
        self.0.insert(base, range);
    }

    fn of(&mut self, name: &str, address: u64, bytes: usize) -> Option<&mut Range> {
        let (base, range) = self.0.range_mut(..=address).next_back()?;
        let offset = usize::try_from(address - base)
            .ok()
            .filter(|offset| *offset < range.bytes)?;
        if offset + bytes > range.bytes {
            damage(name, "an operation goes past the end of what was allocated");
        }
        Some(range)
    }

    /// Forgets a range. Its bytes.
    fn remove(&mut self, name: &str, address: u64, kind: Kind) -> Option<usize> {
        let range = self.0.get(&address).filter(|range| range.kind == kind)?;
        if range.in_flight > 0 {
            damage(
                name,
                "memory is freed or unregistered while an operation is in flight on it",
            );
        }
        let bytes = range.bytes;
        self.0.remove(&address);
        Some(bytes)
    }
}

/// What would be silent damage on a device.
fn damage(name: &str, what: &str) -> ! {
    eprintln!("{name}: {what}");
    std::process::abort()
}
