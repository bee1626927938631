use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use super::device::Gpu;
use super::driver::{
    AccessDescription, Address, AllocationProperties, DIRECT_SHARED, FILE_DESCRIPTOR, GRANULARITY_MINIMUM, GpuError,
};
use super::memory::DeviceRegion;

impl Gpu {
    /// Memory that other processes can map is a multiple of so many bytes.
    ///
    /// # Errors
    /// What the driver says.
    pub fn share_bytes(&self) -> Result<usize, GpuError> {
        let driver = self.current()?;
        let properties = AllocationProperties::of(self.handle(), self.attribute(DIRECT_SHARED) == Ok(1));
        let mut bytes = 0;
        // SAFETY: the library reads one structure and writes one number.
        let answer =
            unsafe { (driver.functions.granularity)(&raw mut bytes, &raw const properties, GRANULARITY_MINIMUM) };
        self.check("cuMemGetAllocationGranularity", answer)?;
        Ok(bytes)
    }

    /// Memory of this device that whoever is given the descriptor can map, too, with [`Gpu::map`]. What lies in it is unspecified.
    /// It goes back to the device when nobody maps it and every copy of the descriptor is closed.
    ///
    /// # Errors
    /// What the driver says: out of memory, a size that is no multiple of [`Gpu::share_bytes`], a device that shares none.
    pub fn share(self: &Arc<Self>, bytes: usize) -> Result<(Arc<DeviceRegion>, OwnedFd), GpuError> {
        let properties = AllocationProperties::of(self.handle(), self.attribute(DIRECT_SHARED) == Ok(1));
        let mut handle = 0;
        {
            let driver = self.current()?;
            // SAFETY: the library reads one structure and writes one number.
            let answer = unsafe { (driver.functions.create)(&raw mut handle, bytes, &raw const properties, 0) };
            self.check("cuMemCreate", answer)?;
        }
        let mapping = Mapping::new(self, handle, bytes)?;
        let mut descriptor: c_int = -1;
        {
            let driver = self.current()?;
            // SAFETY: for this kind of handle the library writes one descriptor, which is the caller's.
            let answer = unsafe { (driver.functions.export)((&raw mut descriptor).cast(), handle, FILE_DESCRIPTOR, 0) };
            self.check("cuMemExportToShareableHandle", answer)?;
        }
        // SAFETY: the library opened it for the caller.
        let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
        Ok((DeviceRegion::mapped(self, mapping), descriptor))
    }

    /// Maps `bytes` of memory of this device that another process, or this one, shared. All of it.
    ///
    /// # Errors
    /// What the driver says: a descriptor of something else, memory of another device, another size.
    pub fn map(self: &Arc<Self>, shared: BorrowedFd<'_>, bytes: usize) -> Result<Arc<DeviceRegion>, GpuError> {
        let mut handle = 0;
        {
            let driver = self.current()?;
            let descriptor = shared.as_raw_fd() as usize as *mut c_void;
            // SAFETY: for this kind of handle the pointer is the descriptor's number; the library keeps a copy of it.
            let answer = unsafe { (driver.functions.import)(&raw mut handle, descriptor, FILE_DESCRIPTOR) };
            self.check("cuMemImportFromShareableHandle", answer)?;
        }
        Ok(DeviceRegion::mapped(self, Mapping::new(self, handle, bytes)?))
    }
}

/// Shared memory of a device in this process's addresses. Undone in reverse, as far as it came.
pub(super) struct Mapping {
    gpu: Arc<Gpu>,
    handle: u64,
    base: Address,
    bytes: usize,
    is_mapped: bool,
}

impl Mapping {
    /// Takes the handle, also where it fails.
    fn new(gpu: &Arc<Gpu>, handle: u64, bytes: usize) -> Result<Mapping, GpuError> {
        let mut mapping = Mapping {
            gpu: Arc::clone(gpu),
            handle,
            base: 0,
            bytes,
            is_mapped: false,
        };
        let driver = gpu.current()?;
        // SAFETY: the library writes one number.
        let answer = unsafe { (driver.functions.reserve)(&raw mut mapping.base, bytes, 0, 0, 0) };
        gpu.check("cuMemAddressReserve", answer)?;
        // SAFETY: addresses that were reserved for this, and nothing is mapped at yet.
        let answer = unsafe { (driver.functions.map)(mapping.base, bytes, 0, handle, 0) };
        gpu.check("cuMemMap", answer)?;
        mapping.is_mapped = true;
        let access = AccessDescription::of(gpu.handle());
        // SAFETY: what was mapped above; the library reads one structure.
        let answer = unsafe { (driver.functions.set_access)(mapping.base, bytes, &raw const access, 1) };
        gpu.check("cuMemSetAccess", answer)?;
        Ok(mapping)
    }

    pub(super) fn base(&self) -> Address {
        self.base
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The memory of a lost device goes with the process.
        let Ok(driver) = self.gpu.current() else { return };
        if self.is_mapped {
            // SAFETY: mapped there, and no slice of it is left: nothing in flight reaches it.
            let answer = unsafe { (driver.functions.unmap)(self.base, self.bytes) };
            if self.gpu.check("cuMemUnmap", answer).is_err() {
                return;
            }
        }
        if self.base != 0 {
            // SAFETY: reserved there, and nothing is mapped at it any more.
            let answer = unsafe { (driver.functions.unreserve)(self.base, self.bytes) };
            let _ = self.gpu.check("cuMemAddressFree", answer);
        }
        // SAFETY: created or imported for this, released once.
        let answer = unsafe { (driver.functions.release)(self.handle) };
        let _ = self.gpu.check("cuMemRelease", answer);
    }
}
