use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::device::Gpu;
use super::driver::{Address, GpuError, REGISTER_PORTABLE, REGISTER_READ_ONLY};
use crate::memory::{Access, MemoryRegion, OutOfRange, Pinned};

/// Memory of a device that owns its bytes until the last [`DeviceSlice`] of it is gone, those of copies in flight included.
pub struct DeviceRegion {
    gpu: Arc<Gpu>,
    base: Address,
    bytes: usize,
    /// Whether it is to be freed here.
    is_ours: bool,
}

impl fmt::Debug for DeviceRegion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("DeviceRegion")
            .field("gpu", &self.gpu.name())
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Gpu {
    /// Memory of this device. What lies in it is unspecified: [`super::Stream::zero`] it before somebody else may see it.
    ///
    /// # Errors
    /// What the driver says: out of memory, or a device that is lost.
    pub fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Arc<DeviceRegion>, GpuError> {
        let driver = self.current()?;
        let mut base: Address = 0;
        // SAFETY: the library writes one number.
        let answer = unsafe { (driver.functions.allocate)(&raw mut base, bytes) };
        self.check("cuMemAlloc", answer)?;
        Ok(Arc::new(DeviceRegion {
            gpu: Arc::clone(self),
            base,
            bytes,
            is_ours: true,
        }))
    }

    /// Memory of this device that somebody else in this process allocated: an engine's tensor. It is not freed here.
    ///
    /// # Safety
    /// The `bytes` at `address` are this device's, and stay allocated until the last slice of the answer and the last copy that
    /// was submitted with one are gone.
    #[must_use]
    pub unsafe fn adopt(self: &Arc<Self>, address: u64, bytes: usize) -> Arc<DeviceRegion> {
        Arc::new(DeviceRegion {
            gpu: Arc::clone(self),
            base: address,
            bytes,
            is_ours: false,
        })
    }

    /// Pins a host region for this and every other device, so that copies to and from it need no bounce. It stays so until the
    /// answer and the last copy that began before are gone. To register a region again gives the same registration.
    ///
    /// # Errors
    /// What the driver says: no more memory can be pinned, or a device that is lost.
    pub fn register(self: &Arc<Self>, region: &Arc<MemoryRegion>) -> Result<Arc<HostRegistration>, GpuError> {
        let mut known = self.registrations.0.lock();
        let key = Arc::as_ptr(region) as usize;
        if let Some(registration) = known.get(&key).and_then(Weak::upgrade) {
            return Ok(registration);
        }
        let driver = self.current()?;
        let flags = match region.access() {
            Access::ReadWrite => REGISTER_PORTABLE,
            Access::ReadOnly => REGISTER_PORTABLE | REGISTER_READ_ONLY,
        };
        let pinned = Pinned::new(region);
        let base = first_byte(region);
        // SAFETY: the range is the region's mapping, which `pinned` keeps mapped until it is unregistered.
        let answer = unsafe { (driver.functions.register)(base as *mut _, region.bytes(), flags) };
        self.check("cuMemHostRegister", answer)?;
        let registration = Arc::new(HostRegistration {
            gpu: Arc::clone(self),
            base,
            pinned: Some(pinned),
        });
        known.retain(|_, other| other.strong_count() > 0);
        known.insert(key, Arc::downgrade(&registration));
        Ok(registration)
    }
}

fn first_byte(region: &Arc<MemoryRegion>) -> usize {
    let all = region.slice(0, region.bytes()).expect("all of it");
    all.as_ptr() as usize
}

impl DeviceRegion {
    /// Its device.
    #[must_use]
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A checked range.
    pub fn slice(self: &Arc<Self>, offset: usize, length: usize) -> Result<DeviceSlice, OutOfRange> {
        let bytes = self.bytes;
        if offset.checked_add(length).is_none_or(|end| end > bytes) {
            return Err(OutOfRange { offset, length, bytes });
        }
        Ok(DeviceSlice {
            region: Arc::clone(self),
            offset,
            length,
        })
    }
}

impl Drop for DeviceRegion {
    fn drop(&mut self) {
        // The memory of a lost device went with its context, or will with the process.
        if let (true, Ok(driver)) = (self.is_ours, self.gpu.current()) {
            // SAFETY: allocated there, and no slice of it is left: nothing in flight reaches it.
            let answer = unsafe { (driver.functions.free)(self.base) };
            let _ = self.gpu.check("cuMemFree", answer);
        }
    }
}

/// A checked range of a [`DeviceRegion`], which it keeps alive.
#[derive(Clone)]
pub struct DeviceSlice {
    region: Arc<DeviceRegion>,
    // `offset + length <= region.bytes`, kept by the only constructor.
    offset: usize,
    length: usize,
}

impl DeviceSlice {
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

    /// Its region.
    #[must_use]
    pub fn region(&self) -> &Arc<DeviceRegion> {
        &self.region
    }

    /// The `length` bytes from `offset` on.
    pub fn subslice(&self, offset: usize, length: usize) -> Result<DeviceSlice, OutOfRange> {
        if offset.checked_add(length).is_none_or(|end| end > self.length) {
            let bytes = self.length;
            return Err(OutOfRange { offset, length, bytes });
        }
        self.region.slice(self.offset + offset, length)
    }

    pub(super) fn address(&self) -> Address {
        self.region.base + self.offset as Address
    }
}

impl fmt::Debug for DeviceSlice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("DeviceSlice")
            .field("offset", &self.offset)
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

/// A host region that devices reach without a bounce.
pub struct HostRegistration {
    gpu: Arc<Gpu>,
    base: usize,
    pinned: Option<Pinned>,
}

impl HostRegistration {
    /// What is registered.
    #[must_use]
    pub fn region(&self) -> Option<&Arc<MemoryRegion>> {
        self.pinned.as_ref().map(Pinned::region)
    }
}

impl fmt::Debug for HostRegistration {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("HostRegistration").finish_non_exhaustive()
    }
}

impl Drop for HostRegistration {
    fn drop(&mut self) {
        let driver = self.gpu.driver();
        // SAFETY: registered there; copies hold this while they are in flight.
        let answer = unsafe { (driver.functions.unregister)(self.base as *mut _) };
        if self.gpu.check("cuMemHostUnregister", answer).is_err() {
            // The device may still reach the pages: they stay.
            let _for_good = std::mem::ManuallyDrop::new(self.pinned.take());
        }
    }
}

/// What is registered, by the region.
#[derive(Default)]
pub(super) struct Registrations(Mutex<HashMap<usize, Weak<HostRegistration>>>);

impl Registrations {
    pub(super) fn of(&self, region: &Arc<MemoryRegion>) -> Option<Arc<HostRegistration>> {
        let key = Arc::as_ptr(region) as usize;
        self.0.lock().get(&key).and_then(Weak::upgrade)
    }
}
