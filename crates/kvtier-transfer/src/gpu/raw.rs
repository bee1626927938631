use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use super::device::Gpu;
use super::driver::{Address, GpuError, Opaque};
use super::memory::DeviceRegion;
use super::stream::{Event, RawStream};

/// The barest copies that the driver makes, to measure others by: one call each, between memory of the device and host memory that
/// the driver itself allocated and pinned.
pub struct RawCopies {
    gpu: Arc<Gpu>,
    stream: Arc<RawStream>,
    host: NonNull<std::ffi::c_void>,
    device: Arc<DeviceRegion>,
}

impl fmt::Debug for RawCopies {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("RawCopies")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

// SAFETY: the driver's objects and the memory may be used from any thread.
unsafe impl Send for RawCopies {}

impl RawCopies {
    /// Between `bytes` on either side.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<RawCopies, GpuError> {
        let stream = RawStream::new(gpu)?;
        let device = gpu.allocate(bytes)?;
        let driver = gpu.current()?;
        let mut host: Opaque = std::ptr::null_mut();
        // SAFETY: the library writes one pointer.
        let answer = unsafe { (driver.functions.host_allocate)(&raw mut host, bytes) };
        gpu.check("cuMemAllocHost", answer)?;
        let host = NonNull::new(host).ok_or_else(|| GpuError {
            call: "cuMemAllocHost",
            code: 0,
            words: "no memory".to_owned(),
        })?;
        // SAFETY: as many bytes were allocated, and nobody else has them.
        unsafe { host.cast::<u8>().write_bytes(0x5A, bytes) };
        Ok(RawCopies {
            gpu: Arc::clone(gpu),
            stream,
            host,
            device,
        })
    }

    /// Copies all bytes, `piece` at a time, up to the device or down from it, and waits.
    ///
    /// # Errors
    /// What the driver says.
    pub fn run(&self, up: bool, piece: usize) -> Result<(), GpuError> {
        let driver = self.gpu.current()?;
        let event = Event::new(&self.gpu)?;
        let bytes = self.device.bytes();
        for offset in (0..bytes).step_by(piece.max(1)) {
            let length = piece.min(bytes - offset);
            let host = self.host.as_ptr() as Address + offset as Address;
            let device = self.device.base() + offset as Address;
            let (target, source) = if up { (device, host) } else { (host, device) };
            // SAFETY: both ranges lie in memory that `self` holds; `drop` waits for whatever is under way.
            let answer = unsafe { (driver.functions.copy)(target, source, length, self.stream.raw()) };
            self.gpu.check("cuMemcpyAsync", answer)?;
        }
        event.record(&self.stream)?;
        event.wait()
    }
}

impl Drop for RawCopies {
    fn drop(&mut self) {
        // A run that failed may have left copies under way.
        let at_rest = Event::new(&self.gpu).and_then(|event| {
            event.record(&self.stream)?;
            event.wait()
        });
        if let (Ok(()), Ok(driver)) = (at_rest, self.gpu.current()) {
            // SAFETY: allocated there, freed once, and nothing is under way.
            let answer = unsafe { (driver.functions.host_free)(self.host.as_ptr()) };
            let _ = self.gpu.check("cuMemFreeHost", answer);
        }
    }
}
