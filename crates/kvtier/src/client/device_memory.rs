use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::locks::Mutex;
use kvtier_transfer::gpu::{DeviceRegion, DeviceSlice, Gpu, GpuError};

/// Device memory that the node shares: mapped when it is first needed, and unmapped once the node has closed it and nothing
/// of it is in use.
#[derive(Debug)]
pub(super) struct SharedDeviceMemory {
    file: OwnedFd,
    bytes: usize,
    /// One for each device object that it was mapped with: one, as a rule.
    mapped: Mutex<Vec<Arc<DeviceRegion>>>,
}

impl SharedDeviceMemory {
    pub(super) fn new(file: OwnedFd, bytes: usize) -> SharedDeviceMemory {
        SharedDeviceMemory {
            file,
            bytes,
            mapped: Mutex::default(),
        }
    }

    fn region(&self, gpu: &Arc<Gpu>) -> Result<Arc<DeviceRegion>, GpuError> {
        let mut mapped = self.mapped.lock();
        if let Some(known) = mapped.iter().find(|region| Arc::ptr_eq(region.gpu(), gpu)) {
            return Ok(Arc::clone(known));
        }
        let region = gpu.map(self.file.as_fd(), self.bytes)?;
        mapped.push(Arc::clone(&region));
        Ok(region)
    }
}

/// A range of it.
#[derive(Clone, Debug)]
pub(super) struct DeviceExtent {
    memory: Arc<SharedDeviceMemory>,
    offset: usize,
    length: usize,
}

impl DeviceExtent {
    pub(super) fn new(memory: &Arc<SharedDeviceMemory>, offset: usize, length: usize) -> DeviceExtent {
        DeviceExtent {
            memory: Arc::clone(memory),
            offset,
            length,
        }
    }

    /// The bytes, on the device.
    pub(super) fn on(&self, gpu: &Arc<Gpu>) -> Result<DeviceSlice, String> {
        let region = self.memory.region(gpu).map_err(|error| error.to_string())?;
        region
            .slice(self.offset, self.length)
            .map_err(|error| error.to_string())
    }
}
