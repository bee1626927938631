use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use parking_lot::Mutex;

use super::device::Gpu;
use super::driver::{Address, GpuError, REGISTER_PORTABLE, REGISTER_READ_ONLY};
use crate::memory::{Access, MemoryRegion, Pinned};

/// Host regions of this process that devices know, by the region: to the driver a registration is the process's, whichever device
/// it was made for.
static KNOWN: LazyLock<Mutex<HashMap<usize, Known>>> = LazyLock::new(Mutex::default);

/// One region.
#[derive(Default)]
struct Known {
    /// How many ask for it to be registered.
    holders: usize,
    /// Copies in flight, registered or not: it may become so meanwhile.
    copies: usize,
    registered: Option<Registered>,
}

/// Through which device, and what keeps the pages.
struct Registered {
    gpu: Arc<Gpu>,
    pinned: Pinned,
}

fn key(region: &Arc<MemoryRegion>) -> usize {
    Arc::as_ptr(region) as usize
}

impl Gpu {
    /// Pins a host region for this and every other device of the driver, so that copies to and from it need no bounce. It stays so
    /// until the last answer for it, and the last copy of it that began before, are gone. It takes as long as pinning takes;
    /// copies that are submitted meanwhile wait for it.
    ///
    /// # Errors
    /// What the driver says: no more memory can be pinned, or a device that is lost.
    pub fn register(self: &Arc<Self>, region: &Arc<MemoryRegion>) -> Result<HostRegistration, GpuError> {
        let mut known = KNOWN.lock();
        let entry = known.entry(key(region)).or_default();
        if entry.registered.is_none() {
            match self.register_now(region) {
                Ok(pinned) => {
                    let gpu = Arc::clone(self);
                    entry.registered = Some(Registered { gpu, pinned });
                }
                Err(error) => {
                    if entry.copies == 0 {
                        known.remove(&key(region));
                    }
                    return Err(error);
                }
            }
        }
        entry.holders += 1;
        Ok(HostRegistration {
            region: Arc::clone(region),
        })
    }

    fn register_now(&self, region: &Arc<MemoryRegion>) -> Result<Pinned, GpuError> {
        let driver = self.current()?;
        let flags = match region.access() {
            Access::ReadWrite => REGISTER_PORTABLE,
            Access::ReadOnly => REGISTER_PORTABLE | REGISTER_READ_ONLY,
        };
        let pinned = Pinned::new(region);
        // SAFETY: the range is the region's mapping, which `pinned` keeps mapped until it is unregistered.
        let answer = unsafe { (driver.functions.register)(first_byte(region) as *mut _, region.bytes(), flags) };
        self.check("cuMemHostRegister", answer)?;
        Ok(pinned)
    }
}

fn first_byte(region: &Arc<MemoryRegion>) -> usize {
    let all = region.slice(0, region.bytes()).expect("all of it");
    all.as_ptr() as usize
}

/// Lets go of a region that nobody needs any more, with the table locked: nobody can begin to meanwhile.
fn settle(known: &mut HashMap<usize, Known>, region: &Arc<MemoryRegion>) {
    let is_over = |entry: &Known| entry.holders == 0 && entry.copies == 0;
    if !known.get(&key(region)).is_some_and(is_over) {
        return;
    }
    let Some(Known {
        registered: Some(Registered { gpu, pinned }),
        ..
    }) = known.remove(&key(region))
    else {
        return;
    };
    let unregistered = gpu.current().and_then(|driver| {
        // SAFETY: registered there; no copy of it is in flight, or it is kept for good.
        let answer = unsafe { (driver.functions.unregister)(first_byte(region) as *mut _) };
        gpu.check("cuMemHostUnregister", answer)
    });
    if unregistered.is_err() {
        // The device may still reach the pages: they stay.
        let _for_good = std::mem::ManuallyDrop::new(pinned);
    }
}

/// A host region that devices reach without a bounce.
pub struct HostRegistration {
    region: Arc<MemoryRegion>,
}

impl HostRegistration {
    /// What is registered.
    #[must_use]
    pub fn region(&self) -> &Arc<MemoryRegion> {
        &self.region
    }
}

impl fmt::Debug for HostRegistration {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("HostRegistration").field(&self.region).finish()
    }
}

impl Drop for HostRegistration {
    fn drop(&mut self) {
        let mut known = KNOWN.lock();
        if let Some(entry) = known.get_mut(&key(&self.region)) {
            entry.holders -= 1;
        }
        settle(&mut known, &self.region);
    }
}

/// Host regions that one user's copies go through, each registered when it is first met, or before that, and let go of when
/// nobody else has it.
#[derive(Debug)]
pub struct PinnedRegions {
    gpu: Arc<Gpu>,
    held: Mutex<Vec<HostRegistration>>,
}

impl PinnedRegions {
    /// None yet.
    #[must_use]
    pub fn new(gpu: &Arc<Gpu>) -> PinnedRegions {
        PinnedRegions {
            gpu: Arc::clone(gpu),
            held: Mutex::default(),
        }
    }

    /// Pins a region, where that can be: without it the driver copies through buffers of its own, slower and no less right. Whether it is.
    pub fn pin(&self, region: &Arc<MemoryRegion>) -> bool {
        let mut held = self.held.lock();
        if held.iter().any(|known| Arc::ptr_eq(known.region(), region)) {
            return true;
        }
        drop_abandoned(&mut held);
        match self.gpu.register(region) {
            Ok(registration) => {
                held.push(registration);
                true
            }
            Err(_) => false,
        }
    }

    /// Lets go of what its owner took back while it was pinned here.
    pub fn tidy(&self) {
        drop_abandoned(&mut self.held.lock());
    }

    /// Lets go of a region of which no copy is in flight. Where that would take longer than `wait`, as with a device that hangs while
    /// it pins another, it goes with the next that is pinned.
    pub fn let_go(&self, region: &Arc<MemoryRegion>, wait: Duration) {
        if let Some(mut held) = self.held.try_lock_for(wait) {
            held.retain(|known| !Arc::ptr_eq(known.region(), region));
        }
    }
}

/// Lets go of regions that registrations alone hold: this one's and others', and the table's entry.
fn drop_abandoned(held: &mut Vec<HostRegistration>) {
    held.retain(|known| {
        let holders = KNOWN.lock().get(&key(known.region())).map_or(0, |entry| entry.holders);
        Arc::strong_count(known.region()) > holders + 1
    });
}

/// A copy of a region is in flight: it is not unregistered before this is dropped.
pub(super) struct InFlight {
    region: Arc<MemoryRegion>,
    /// It was registered, and stays so for as long as this lives.
    is_registered: bool,
}

impl InFlight {
    /// From before the device is told.
    pub(super) fn new(region: &Arc<MemoryRegion>) -> InFlight {
        let mut known = KNOWN.lock();
        let entry = known.entry(key(region)).or_default();
        entry.copies += 1;
        InFlight {
            region: Arc::clone(region),
            is_registered: entry.registered.is_some(),
        }
    }

    /// Where this device has the first byte of the region, if it may go there by itself.
    pub(super) fn address_on(&self, gpu: &Gpu) -> Option<Address> {
        match self.is_registered {
            true => gpu.reaches(first_byte(&self.region)),
            false => None,
        }
    }

    pub(super) fn is_of(&self, region: &Arc<MemoryRegion>) -> bool {
        Arc::ptr_eq(&self.region, region)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut known = KNOWN.lock();
        if let Some(entry) = known.get_mut(&key(&self.region)) {
            entry.copies -= 1;
        }
        settle(&mut known, &self.region);
    }
}
