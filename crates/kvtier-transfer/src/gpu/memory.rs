use std::fmt;
use std::sync::Arc;

use super::device::Gpu;
use super::driver::{Address, GpuError};
use super::shared::Mapping;
use crate::memory::OutOfRange;

/// Memory of a device that owns its bytes until the last [`DeviceSlice`] of it is gone, those of copies in flight included.
pub struct DeviceRegion {
    gpu: Arc<Gpu>,
    base: Address,
    bytes: usize,
    origin: Origin,
}

/// Whose the memory is, and how it goes back.
pub(super) enum Origin {
    /// Freed here.
    Allocated,
    /// Somebody else's.
    Adopted,
    /// Mapped here; other processes may map it too.
    Mapped(#[expect(dead_code, reason = "held for what its drop does")] Mapping),
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
            origin: Origin::Allocated,
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
            origin: Origin::Adopted,
        })
    }
}

impl DeviceRegion {
    pub(super) fn mapped(gpu: &Arc<Gpu>, mapping: Mapping) -> Arc<DeviceRegion> {
        Arc::new(DeviceRegion {
            gpu: Arc::clone(gpu),
            base: mapping.base(),
            bytes: mapping.bytes(),
            origin: Origin::Mapped(mapping),
        })
    }

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

    pub(super) fn base(&self) -> Address {
        self.base
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
        if let (Origin::Allocated, Ok(driver)) = (&self.origin, self.gpu.current()) {
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
