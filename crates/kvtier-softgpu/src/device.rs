//! The devices, their memory, and what is in flight on it.

use std::alloc::{Layout, alloc, dealloc};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

/// How many there are.
pub(crate) const DEVICES: usize = 5;
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
];

thread_local! {
    static CURRENT: Cell<Option<&'static Device>> = const { Cell::new(None) };
}

/// One device; what it does wrong is in its name.
pub(crate) struct Device {
    pub(crate) name: &'static str,
    pub(crate) bytes: usize,
    memory: Mutex<Memory>,
    copies: AtomicUsize,
    broken: AtomicBool,
}

struct Memory {
    used: usize,
    /// Device allocations and registered host ranges, by their first byte.
    ranges: BTreeMap<u64, Range>,
}

struct Range {
    bytes: usize,
    is_host: bool,
    in_flight: usize,
}

pub(crate) fn device(number: c_int) -> Option<&'static Device> {
    ALL.get(usize::try_from(number).ok()?)
}

pub(crate) fn current() -> Option<&'static Device> {
    CURRENT.get()
}

/// Makes the device whose context this is the calling thread's. Whether there is one.
pub(crate) fn set_current(context: *const std::ffi::c_void) -> bool {
    let found = ALL
        .iter()
        .find(|device| std::ptr::eq(std::ptr::from_ref(*device).cast(), context));
    CURRENT.set(found);
    found.is_some()
}

impl Device {
    const fn new(name: &'static str, bytes: usize) -> Device {
        Device {
            name,
            bytes,
            memory: Mutex::new(Memory {
                used: 0,
                ranges: BTreeMap::new(),
            }),
            copies: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    pub(crate) fn refuses_registrations(&self) -> bool {
        self.name == "software: refuses"
    }

    /// How long it takes before each operation.
    pub(crate) fn delay(&self) -> Duration {
        match self.name {
            "software: slow" => Duration::from_millis(30),
            _ => Duration::ZERO,
        }
    }

    /// Counts a copy. Whether it may be made.
    pub(crate) fn may_copy(&self) -> bool {
        let number = self.copies.fetch_add(1, Ordering::AcqRel) + 1;
        if self.name == "software: breaks" && number >= BREAKS_AT {
            self.broken.store(true, Ordering::Release);
        }
        !self.is_broken()
    }

    pub(crate) fn free_bytes(&self) -> usize {
        self.bytes - self.memory.lock().used
    }

    pub(crate) fn allocate(&self, bytes: usize) -> Option<u64> {
        let mut memory = self.memory.lock();
        if bytes > self.bytes - memory.used {
            return None;
        }
        let layout = Layout::from_size_align(bytes, ALIGNMENT).ok()?;
        // SAFETY: a size above zero.
        let base = unsafe { alloc(layout) };
        if base.is_null() {
            return None;
        }
        // As on a device: what lies in it is whatever was there.
        // SAFETY: the bytes were just allocated.
        unsafe { base.write_bytes(0xA5, bytes) };
        memory.used += bytes;
        let range = Range {
            bytes,
            is_host: false,
            in_flight: 0,
        };
        memory.ranges.insert(base as u64, range);
        Some(base as u64)
    }

    pub(crate) fn free(&self, address: u64) -> bool {
        let mut memory = self.memory.lock();
        let Some(range) = memory.ranges.get(&address).filter(|range| !range.is_host) else {
            return false;
        };
        if range.in_flight > 0 {
            damage(self, "memory is freed while an operation is in flight on it");
        }
        let bytes = range.bytes;
        memory.ranges.remove(&address);
        memory.used -= bytes;
        let Ok(layout) = Layout::from_size_align(bytes, ALIGNMENT) else {
            return false;
        };
        // SAFETY: allocated with this layout, and no operation is in flight on it.
        unsafe { dealloc(address as *mut u8, layout) };
        true
    }

    pub(crate) fn register(&self, address: u64, bytes: usize) -> bool {
        let mut memory = self.memory.lock();
        if memory.ranges.contains_key(&address) {
            return false;
        }
        let range = Range {
            bytes,
            is_host: true,
            in_flight: 0,
        };
        memory.ranges.insert(address, range);
        true
    }

    pub(crate) fn unregister(&self, address: u64) -> bool {
        let mut memory = self.memory.lock();
        let Some(range) = memory.ranges.get(&address).filter(|range| range.is_host) else {
            return false;
        };
        if range.in_flight > 0 {
            damage(
                self,
                "host memory is unregistered while an operation is in flight on it",
            );
        }
        memory.ranges.remove(&address);
        true
    }

    /// An operation on these bytes begins its wait. Host memory that is not registered is anybody's.
    pub(crate) fn enter(&self, address: u64, bytes: usize) {
        self.count(address, bytes, |range| range.in_flight += 1);
    }

    /// It is over.
    pub(crate) fn leave(&self, address: u64, bytes: usize) {
        self.count(address, bytes, |range| range.in_flight -= 1);
    }

    fn count(&self, address: u64, bytes: usize, change: fn(&mut Range)) {
        let mut memory = self.memory.lock();
        let Some((base, range)) = memory.ranges.range_mut(..=address).next_back() else {
            return;
        };
        let offset = usize::try_from(address - base).unwrap_or(usize::MAX);
        if offset >= range.bytes {
            return;
        }
        if offset + bytes > range.bytes {
            damage(self, "an operation goes past the end of what was allocated");
        }
        change(range);
    }
}

/// What would be silent damage on a device.
fn damage(device: &Device, what: &str) -> ! {
    eprintln!("{}: {what}", device.name);
    std::process::abort()
}
