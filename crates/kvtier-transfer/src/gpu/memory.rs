use std::ffi::c_int;
use std::fmt;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use super::device::Gpu;
use super::driver::{Address, DMA_BUF, GpuError, IPC_LAZY, IpcHandle, POINTER_DEVICE};
use super::shared::Mapping;
use crate::memory::{OutOfRange, PAGE_BYTES};

/// Memory of a device that owns its bytes until the last [`DeviceSlice`] of it is gone, those of copies in flight included.
pub struct DeviceRegion {
    gpu: Arc<Gpu>,
    base: Address,
    bytes: usize,
    origin: Origin,
}

/// What stands for device memory in other drivers.
pub(crate) struct DmaBuf {
    pub(crate) file: OwnedFd,
    /// Where the memory begins in it.
    pub(crate) offset: u64,
}

/// Whose the memory is, and how it goes back.
pub(super) enum Origin {
    /// Freed here.
    Allocated,
    /// Somebody else's.
    Adopted,
    /// Opened: another process's, at this address.
    Opened(Address),
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

impl Gpu {
    /// `bytes` from `offset` on of an allocation of another process, which has to be on this device. It is closed here when the last slice is
    /// gone, and freed by its owner, who has to keep it until then: CUDA leaves open what becomes of the device otherwise.
    ///
    /// # Errors
    /// What the driver says: a process that is gone, this process's own handle, another device's. A range outside of the allocation.
    pub fn open_ipc(
        self: &Arc<Self>,
        handle: &IpcHandle,
        offset: usize,
        bytes: usize,
    ) -> Result<Arc<DeviceRegion>, GpuError> {
        let driver = self.current()?;
        let mut first: Address = 0;
        // SAFETY: the library writes one number, and knows a handle that is none.
        let answer = unsafe { (driver.functions.ipc_open)(&raw mut first, *handle, IPC_LAZY) };
        self.check("cuIpcOpenMemHandle", answer)?;
        // Closes it, whatever comes.
        let mut opened = DeviceRegion {
            gpu: Arc::clone(self),
            base: first,
            bytes,
            origin: Origin::Opened(first),
        };
        let mut device: c_int = -1;
        // SAFETY: of this attribute the library writes one number.
        let answer = unsafe { (driver.functions.pointer)((&raw mut device).cast(), POINTER_DEVICE, first) };
        self.check("cuPointerGetAttribute", answer)?;
        if device != self.handle() {
            return Err(GpuError {
                call: "cuPointerGetAttribute",
                code: 0,
                words: format!("it is memory of device {device}, not {}", self.handle()),
            });
        }
        let (mut base, mut all): (Address, usize) = (0, 0);
        // SAFETY: the library writes two numbers.
        let answer = unsafe { (driver.functions.address_range)(&raw mut base, &raw mut all, first) };
        self.check("cuMemGetAddressRange", answer)?;
        let before = usize::try_from(first - base).unwrap_or(usize::MAX);
        let end = before.checked_add(offset).and_then(|start| start.checked_add(bytes));
        if end.is_none_or(|end| end > all) {
            return Err(GpuError {
                call: "cuMemGetAddressRange",
                code: 0,
                words: format!(
                    "{bytes} bytes from {offset} on are not in the allocation, which has {}",
                    all - before
                ),
            });
        }
        opened.base = first + offset as Address;
        Ok(Arc::new(opened))
    }
}

impl DeviceRegion {
    /// What another process opens the allocation with that this lies in, from its first byte on: with [`Gpu::open_ipc`].
    ///
    /// # Errors
    /// What the driver says: memory that cannot be shared so, such as [`Gpu::share`]'s.
    pub fn ipc_handle(&self) -> Result<IpcHandle, GpuError> {
        let driver = self.gpu.current()?;
        let mut handle = IpcHandle([0; IpcHandle::BYTES]);
        // SAFETY: the library writes one handle.
        let answer = unsafe { (driver.functions.ipc_handle)(&raw mut handle, self.base) };
        self.gpu.check("cuIpcGetMemHandle", answer).map(|()| handle)
    }

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

    /// Of its first byte, as the device knows it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.base
    }

    /// The memory for other devices to import.
    ///
    /// # Errors
    /// What the driver says: it, the device or the kernel has no DMA-BUFs.
    pub(crate) fn dma_buf(&self) -> Result<DmaBuf, GpuError> {
        let driver = self.gpu.current()?;
        let export = driver.functions.dma_buf.ok_or_else(|| GpuError {
            call: "cuMemGetHandleForAddressRange",
            code: 0,
            words: "the driver is older than CUDA 11.7".to_owned(),
        })?;
        // Whole pages of the host's size.
        let first = self.base / PAGE_BYTES as u64 * PAGE_BYTES as u64;
        let offset = self.base - first;
        let bytes = (self.bytes + usize::try_from(offset).unwrap_or(0)).next_multiple_of(PAGE_BYTES);
        let mut descriptor: c_int = -1;
        // SAFETY: for this kind of handle the library writes one descriptor, which is the caller's.
        let answer = unsafe { export((&raw mut descriptor).cast(), first, bytes, DMA_BUF, 0) };
        self.gpu.check("cuMemGetHandleForAddressRange", answer)?;
        // SAFETY: the library opened it for the caller.
        let file = unsafe { OwnedFd::from_raw_fd(descriptor) };
        Ok(DmaBuf { file, offset })
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
        let Ok(driver) = self.gpu.current() else { return };
        match self.origin {
            Origin::Allocated => {
                // SAFETY: allocated there, and no slice of it is left: nothing in flight reaches it.
                let answer = unsafe { (driver.functions.free)(self.base) };
                let _ = self.gpu.check("cuMemFree", answer);
            }
            Origin::Opened(first) => {
                // SAFETY: opened there, closed once, and nothing in flight reaches it.
                let answer = unsafe { (driver.functions.ipc_close)(first) };
                let _ = self.gpu.check("cuIpcCloseMemHandle", answer);
            }
            Origin::Adopted | Origin::Mapped(_) => {}
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
