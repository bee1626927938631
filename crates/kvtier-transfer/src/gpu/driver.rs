//! The part of the driver API that is used: a table of functions of a library that was opened at run time.
//!
//! Signatures as in `cuda.h` of CUDA 12.9; every function has been there since CUDA 11.4 under these names.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::rdma::verbs::loader;

pub(super) type Opaque = *mut c_void;
/// `CUdeviceptr`. With unified addressing a host address is one, too.
pub(super) type Address = u64;

pub(super) const SUCCESS: c_int = 0;
const OUT_OF_MEMORY: c_int = 2;
/// `CU_STREAM_NON_BLOCKING`: it does not wait for the legacy default stream, which an engine may use.
pub(super) const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING`: who waits sleeps.
pub(super) const EVENT_FLAGS: c_uint = 1 | 2;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`: what this thread calls has nothing to do with what others record into graphs.
pub(super) const CAPTURE_RELAXED: c_int = 2;
/// `CU_MEMHOSTREGISTER_PORTABLE`: pinned for every context.
pub(super) const REGISTER_PORTABLE: c_uint = 1;
/// `CU_MEMHOSTREGISTER_READ_ONLY`, for mappings that are.
pub(super) const REGISTER_READ_ONLY: c_uint = 8;

/// `CU_MEM_ALLOCATION_TYPE_PINNED`, `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR` and `CU_MEM_LOCATION_TYPE_DEVICE`.
const PINNED: c_int = 1;
pub(super) const FILE_DESCRIPTOR: c_int = 1;
const ON_DEVICE: c_int = 1;
/// `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`: drivers have no other for memory of a device.
const READ_WRITE: c_int = 3;
/// `CU_MEM_ALLOC_GRANULARITY_MINIMUM`.
pub(super) const GRANULARITY_MINIMUM: c_int = 0;

/// `CUmemLocation`.
#[repr(C)]
pub(super) struct Location {
    kind: c_int,
    id: c_int,
}

/// `CUmemAllocationProp`.
#[repr(C)]
pub(super) struct AllocationProperties {
    kind: c_int,
    handle_types: c_int,
    location: Location,
    win32: Opaque,
    compression: u8,
    gpudirect: u8,
    usage: u16,
    reserved: [u8; 4],
}

impl AllocationProperties {
    /// Memory of a device that may be passed on as a file descriptor, and that NICs may reach where the device can have that.
    pub(super) fn of(device: c_int, is_direct: bool) -> AllocationProperties {
        AllocationProperties {
            kind: PINNED,
            handle_types: FILE_DESCRIPTOR,
            location: Location {
                kind: ON_DEVICE,
                id: device,
            },
            win32: std::ptr::null_mut(),
            compression: 0,
            gpudirect: u8::from(is_direct),
            usage: 0,
            reserved: [0; 4],
        }
    }
}

/// `CUmemAccessDesc`.
#[repr(C)]
pub(super) struct AccessDescription {
    location: Location,
    flags: c_int,
}

impl AccessDescription {
    /// The device itself may read and write.
    pub(super) fn of(device: c_int) -> AccessDescription {
        AccessDescription {
            location: Location {
                kind: ON_DEVICE,
                id: device,
            },
            flags: READ_WRITE,
        }
    }
}

const FILE: &CStr = c"libcuda.so.1";

/// Why there is no CUDA here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unavailable(pub String);

impl fmt::Display for Unavailable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "cuda unavailable: {}", self.0)
    }
}

impl std::error::Error for Unavailable {}

/// A call of the driver that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {words} ({code})")]
pub struct GpuError {
    /// The function.
    pub call: &'static str,
    /// `CUresult`; 0 where the call was not made.
    pub code: i32,
    /// In the driver's words.
    pub words: String,
}

impl GpuError {
    /// Whether the device has not so much memory left: `CUDA_ERROR_OUT_OF_MEMORY`.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        self.code == OUT_OF_MEMORY
    }
}

/// What stands for an allocation of one process in another: `CUipcMemHandle`, which `cudaIpcMemHandle_t` and what PyTorch shares of a storage
/// are, too. Whoever knows it can open it.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct IpcHandle(pub [u8; IpcHandle::BYTES]);

impl IpcHandle {
    /// Length of a handle.
    pub const BYTES: usize = 64;
}

impl fmt::Debug for IpcHandle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Who reads a log could open it.
        formatter.debug_struct("IpcHandle").finish_non_exhaustive()
    }
}

/// `CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL`.
pub(super) const POINTER_DEVICE: c_int = 9;

/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`: the only way there is.
pub(super) const IPC_LAZY: c_uint = 1;

/// One side of `CUDA_MEMCPY2D`.
#[repr(C)]
pub(super) struct CopySide {
    x_bytes: usize,
    y: usize,
    kind: c_int,
    host: Address,
    device: Address,
    array: Opaque,
    pitch: usize,
}

impl CopySide {
    /// `CU_MEMORYTYPE_HOST`.
    pub(super) fn host(address: Address, pitch: usize) -> CopySide {
        CopySide {
            x_bytes: 0,
            y: 0,
            kind: 1,
            host: address,
            device: 0,
            array: std::ptr::null_mut(),
            pitch,
        }
    }

    /// `CU_MEMORYTYPE_DEVICE`.
    pub(super) fn device(address: Address, pitch: usize) -> CopySide {
        CopySide {
            kind: 2,
            host: 0,
            device: address,
            ..CopySide::host(0, pitch)
        }
    }
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub(super) struct CopyRows {
    pub(super) source: CopySide,
    pub(super) target: CopySide,
    pub(super) row_bytes: usize,
    pub(super) rows: usize,
}

/// `CUmemcpyAttributes`.
#[repr(C)]
pub(super) struct CopyAttributes {
    source_order: c_int,
    source: Location,
    target: Location,
    flags: c_uint,
}

impl CopyAttributes {
    /// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`: sources are read when the stream gets to them. No hints.
    pub(super) fn in_stream_order() -> CopyAttributes {
        let nowhere = || Location { kind: 0, id: 0 };
        CopyAttributes {
            source_order: 1,
            source: nowhere(),
            target: nowhere(),
            flags: 0,
        }
    }
}

// As in cuda.h of CUDA 12.9.
const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(AllocationProperties, win32) == 16 && offset_of!(AllocationProperties, gpudirect) == 25);
    assert!(size_of::<AllocationProperties>() == 32 && size_of::<AccessDescription>() == 12);
    assert!(offset_of!(CopyAttributes, flags) == 20 && size_of::<CopyAttributes>() == 24);
    assert!(offset_of!(CopySide, pitch) == 48 && offset_of!(CopyRows, target) == 56);
    assert!(offset_of!(CopyRows, row_bytes) == 112 && size_of::<CopyRows>() == 128);
};

/// `cuMemcpyBatchAsync` of CUDA 12.8; later drivers keep it under this name.
pub(super) type CopyBatch = unsafe extern "C" fn(
    *mut Address,
    *mut Address,
    *mut usize,
    usize,
    *mut CopyAttributes,
    *mut usize,
    usize,
    *mut usize,
    Opaque,
) -> c_int;

/// `cuMemGetHandleForAddressRange` of CUDA 11.7, and the kind of handle that is asked for:
/// `CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD`.
pub(super) type ExportRange = unsafe extern "C" fn(*mut c_void, Address, usize, c_int, u64) -> c_int;
pub(super) const DMA_BUF: c_int = 1;

/// `cuFlushGPUDirectRDMAWrites`, for the context that is current
/// (`CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX`) and its device (`CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER`).
pub(super) type FlushWrites = unsafe extern "C" fn(c_int, c_int) -> c_int;
pub(super) const FLUSH_CURRENT: c_int = 0;
pub(super) const FLUSH_TO_OWNER: c_int = 100;

/// `CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS` and the bit for what a host may call; then
/// `..._WRITES_ORDERING`, and from which answer on the device itself sees what NICs wrote without that; then
/// `..._GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED`.
pub(super) const FLUSH_OPTIONS: c_int = 117;
pub(super) const FLUSH_BY_HOST: c_int = 1;
pub(super) const WRITES_ORDERING: c_int = 118;
pub(super) const ORDERED_FOR_OWNER: c_int = 100;
pub(super) const DIRECT_SHARED: c_int = 110;

macro_rules! functions {
    ($($(#[$doc:meta])* $field:ident: $symbol:literal ($($argument:ty),*);)*) => {
        /// What is called.
        pub(super) struct Functions {
            $($(#[$doc])* pub(super) $field: unsafe extern "C" fn($($argument),*) -> c_int,)*
            /// Where the driver has it.
            pub(super) copy_batch: Option<CopyBatch>,
            /// The same.
            pub(super) dma_buf: Option<ExportRange>,
            /// The same.
            pub(super) flush_writes: Option<FlushWrites>,
        }

        impl Functions {
            fn of(handle: Opaque, file: &CStr) -> Result<Functions, String> {
                Ok(Functions {
                    $($field: {
                        let symbol = loader::symbol(handle, file, $symbol)?;
                        // SAFETY: the library's function of this name has this signature, see cuda.h.
                        unsafe { std::mem::transmute::<Opaque, unsafe extern "C" fn($($argument),*) -> c_int>(symbol) }
                    },)*
                    copy_batch: loader::symbol(handle, file, "cuMemcpyBatchAsync").ok().map(|symbol| {
                        // SAFETY: the library's function of this name has this signature, see cuda.h of CUDA 12.8.
                        unsafe { std::mem::transmute::<Opaque, CopyBatch>(symbol) }
                    }),
                    dma_buf: loader::symbol(handle, file, "cuMemGetHandleForAddressRange").ok().map(|symbol| {
                        // SAFETY: the library's function of this name has this signature, see cuda.h of CUDA 11.7.
                        unsafe { std::mem::transmute::<Opaque, ExportRange>(symbol) }
                    }),
                    flush_writes: loader::symbol(handle, file, "cuFlushGPUDirectRDMAWrites").ok().map(|symbol| {
                        // SAFETY: the library's function of this name has this signature, see cuda.h of CUDA 11.3.
                        unsafe { std::mem::transmute::<Opaque, FlushWrites>(symbol) }
                    }),
                })
            }
        }
    };
}

functions! {
    init: "cuInit"(c_uint);
    driver_version: "cuDriverGetVersion"(*mut c_int);
    device_count: "cuDeviceGetCount"(*mut c_int);
    device_get: "cuDeviceGet"(*mut c_int, c_int);
    device_name: "cuDeviceGetName"(*mut c_char, c_int, c_int);
    primary_retain: "cuDevicePrimaryCtxRetain"(*mut Opaque, c_int);
    primary_release: "cuDevicePrimaryCtxRelease_v2"(c_int);
    push_current: "cuCtxPushCurrent_v2"(Opaque);
    pop_current: "cuCtxPopCurrent_v2"(*mut Opaque);
    capture_mode: "cuThreadExchangeStreamCaptureMode"(*mut c_int);
    memory_info: "cuMemGetInfo_v2"(*mut usize, *mut usize);
    allocate: "cuMemAlloc_v2"(*mut Address, usize);
    free: "cuMemFree_v2"(Address);
    fill: "cuMemsetD8Async"(Address, u8, usize, Opaque);
    register: "cuMemHostRegister_v2"(Opaque, usize, c_uint);
    unregister: "cuMemHostUnregister"(Opaque);
    host_allocate: "cuMemAllocHost_v2"(*mut Opaque, usize);
    host_free: "cuMemFreeHost"(Opaque);
    stream_create: "cuStreamCreate"(*mut Opaque, c_uint);
    stream_destroy: "cuStreamDestroy_v2"(Opaque);
    stream_wait: "cuStreamWaitEvent"(Opaque, Opaque, c_uint);
    event_create: "cuEventCreate"(*mut Opaque, c_uint);
    event_record: "cuEventRecord"(Opaque, Opaque);
    event_query: "cuEventQuery"(Opaque);
    event_synchronize: "cuEventSynchronize"(Opaque);
    event_destroy: "cuEventDestroy_v2"(Opaque);
    copy: "cuMemcpyAsync"(Address, Address, usize, Opaque);
    attribute: "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    bus_address: "cuDeviceGetPCIBusId"(*mut c_char, c_int, c_int);
    device_uuid: "cuDeviceGetUuid_v2"(*mut [u8; 16], c_int);
    granularity: "cuMemGetAllocationGranularity"(*mut usize, *const AllocationProperties, c_int);
    create: "cuMemCreate"(*mut u64, usize, *const AllocationProperties, u64);
    release: "cuMemRelease"(u64);
    reserve: "cuMemAddressReserve"(*mut Address, usize, usize, Address, u64);
    unreserve: "cuMemAddressFree"(Address, usize);
    map: "cuMemMap"(Address, usize, usize, u64, u64);
    unmap: "cuMemUnmap"(Address, usize);
    set_access: "cuMemSetAccess"(Address, usize, *const AccessDescription, usize);
    export: "cuMemExportToShareableHandle"(*mut c_void, u64, c_int, u64);
    import: "cuMemImportFromShareableHandle"(*mut u64, *mut c_void, c_int);
    copy_rows: "cuMemcpy2DAsync_v2"(*const CopyRows, Opaque);
    copy_peer: "cuMemcpyPeerAsync"(Address, Opaque, Address, Opaque, usize, Opaque);
    pointer: "cuPointerGetAttribute"(*mut c_void, c_int, Address);
    address_range: "cuMemGetAddressRange_v2"(*mut Address, *mut usize, Address);
    ipc_handle: "cuIpcGetMemHandle"(*mut IpcHandle, Address);
    ipc_open: "cuIpcOpenMemHandle_v2"(*mut Address, IpcHandle, c_uint);
    ipc_close: "cuIpcCloseMemHandle"(Address);
    host_address: "cuMemHostGetDevicePointer_v2"(*mut Address, Opaque, c_uint);
    module_load: "cuModuleLoadData"(*mut Opaque, *const c_void);
    module_function: "cuModuleGetFunction"(*mut Opaque, Opaque, *const c_char);
    module_unload: "cuModuleUnload"(Opaque);
    launch: "cuLaunchKernel"(
        Opaque, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Opaque, *mut Opaque, *mut Opaque);
    error_name: "cuGetErrorName"(c_int, *mut *const c_char);
}

/// An open driver. It is never closed: its threads may live as long as the process.
pub(super) struct Driver {
    pub(super) functions: Functions,
    /// `CUDA_VERSION`: 1000 times the major one, 10 times the minor one.
    pub(super) version: i32,
}

impl Driver {
    /// The system's, or the one at `path`.
    pub(super) fn open(path: Option<&Path>) -> Result<Driver, Unavailable> {
        let file = match path {
            None => FILE.to_owned(),
            Some(path) => CString::new(path.as_os_str().as_bytes()).map_err(|error| Unavailable(error.to_string()))?,
        };
        let handle = loader::open(&file, "it comes with NVIDIA's driver").map_err(Unavailable)?;
        let functions = Functions::of(handle, &file).map_err(Unavailable)?;
        let mut driver = Driver { functions, version: 0 };
        // SAFETY: takes no pointer.
        let answer = unsafe { (driver.functions.init)(0) };
        driver.check("cuInit", answer).map_err(unavailable)?;
        // SAFETY: the library writes one number.
        let answer = unsafe { (driver.functions.driver_version)(&raw mut driver.version) };
        driver.check("cuDriverGetVersion", answer).map_err(unavailable)?;
        Ok(driver)
    }

    /// The answer of `call`.
    pub(super) fn check(&self, call: &'static str, answer: c_int) -> Result<(), GpuError> {
        if answer == SUCCESS {
            return Ok(());
        }
        Err(GpuError {
            call,
            code: answer,
            words: self.words(answer),
        })
    }

    fn words(&self, code: c_int) -> String {
        let mut words: *const c_char = std::ptr::null();
        // SAFETY: the library writes one pointer, to a constant string of its own, or null for a code that it does not know.
        let answer = unsafe { (self.functions.error_name)(code, &raw mut words) };
        if answer != SUCCESS || words.is_null() {
            return "an error that the driver has no name for".to_owned();
        }
        // SAFETY: a constant string of the library that ends in zero.
        unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
    }
}

pub(super) fn unavailable(error: GpuError) -> Unavailable {
    Unavailable(error.to_string())
}

/// Errors after which a context answers nothing else, see "sticky errors" in CUDA's programming guide: illegal addresses and
/// instructions, launch failures and timeouts, uncorrectable ECC errors, devices that are gone.
pub(super) fn is_for_good(code: i32) -> bool {
    matches!(
        code,
        4 | 214 | 220 | 700 | 702 | 709 | 710 | 714 | 715 | 716 | 717 | 718 | 719 | 721 | 810
    )
}
