//! A software device behind the calls of CUDA's driver API that `kvtier_transfer::gpu` makes: for tests of ordering, leaks
//! and failures on machines without a GPU. It is opened as a driver would be and is no part of the product.
//!
//! Its memory is host memory. Each stream is a thread that works through its queue, so that streams run at the same time and
//! in any order unless events order them. Kernels it refuses, but for one device, which carries out what their PTX says, a thread after
//! another (see `ptx`); that is no GPU's code, and no test of how one runs it. What a device does wrong is chosen by its number, so that
//! tests need no other way in:
//!
//! | number | name | |
//! |---|---|---|
//! | 0 | software: well | |
//! | 1 | software: slow | every operation takes 30 ms first; no copies of rows |
//! | 2 | software: small | 1 MiB of memory |
//! | 3 | software: breaks | its third copy fails for good, like an illegal address; so does everything after it |
//! | 4 | software: refuses | no host memory can be registered, and no copies begun together |
//! | 5 | software: kernels | well; carries out kernels |
//! | 6 | software: launches none | well; loads kernels and refuses to launch them |
//! | 7 | software: wrong kernels | well; forgets the last block of a kernel |
//!
//! With `SOFTGPU_BREAKS_AT=N` in the environment every device of the process breaks with its Nth copy.
//!
//! An operation on memory of a device that is not allocated, or not any more, a range that is freed or unregistered while an
//! operation is in flight on it (a mapping that is undone included), and a thread that is left with another context than it had end the process with a message: on
//! a device that would be silent damage. Host memory that nobody registered is taken as it comes, and copied like the rest.
#![expect(
    unsafe_code,
    reason = "exports C functions that are given pointers, as a driver does"
)]

mod device;
mod ipc;
mod kernels;
mod ptx;
mod shared;
mod stream;

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;

use device::{
    DEVICES, Device, allocate_host, current, device, free_host, is_known, of_context, pop_current, push_current,
    register, unregister,
};
use stream::{Event, Operation, PeerSide, Stream};

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const INVALID_CONTEXT: c_int = 201;
const MAP_FAILED: c_int = 205;
const INVALID_PTX: c_int = 218;
const NOT_FOUND: c_int = 500;
const INVALID_DEVICE: c_int = 101;
const NOT_READY: c_int = 600;
const ILLEGAL_ADDRESS: c_int = 700;
const ALREADY_REGISTERED: c_int = 712;
const NOT_REGISTERED: c_int = 713;
const NOT_SUPPORTED: c_int = 801;

/// The device of the calling thread's context, if it still answers.
fn here() -> Result<&'static Device, c_int> {
    let device = current().ok_or(INVALID_CONTEXT)?;
    if device.is_broken() {
        Err(ILLEGAL_ADDRESS)
    } else {
        Ok(device)
    }
}

fn code(result: Result<(), c_int>) -> c_int {
    result.err().unwrap_or(SUCCESS)
}

/// # Safety
/// As `cuInit`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(_flags: c_uint) -> c_int {
    SUCCESS
}

/// # Safety
/// As `cuDriverGetVersion`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: room for a number, as the caller promises.
    unsafe { version.write(12_080) };
    SUCCESS
}

/// # Safety
/// As `cuDeviceGetCount`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    // SAFETY: room for a number, as the caller promises.
    unsafe { count.write(c_int::try_from(DEVICES).unwrap_or(0)) };
    SUCCESS
}

/// # Safety
/// As `cuDeviceGet`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(handle: *mut c_int, number: c_int) -> c_int {
    if device(number).is_none() {
        return INVALID_DEVICE;
    }
    // SAFETY: room for a number, as the caller promises.
    unsafe { handle.write(number) };
    SUCCESS
}

/// # Safety
/// As `cuDeviceGetName`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, room: c_int, handle: c_int) -> c_int {
    let (Some(device), Ok(room)) = (device(handle), usize::try_from(room)) else {
        return INVALID_DEVICE;
    };
    let words = device.name.as_bytes();
    if words.len() >= room {
        return INVALID_VALUE;
    }
    // SAFETY: room for the name, as was checked against what the caller promises.
    unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), name.cast(), words.len()) };
    // SAFETY: and for a zero behind it.
    unsafe { name.wrapping_add(words.len()).write(0) };
    SUCCESS
}

/// # Safety
/// As `cuDevicePrimaryCtxRetain`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, handle: c_int) -> c_int {
    let Some(device) = device(handle) else {
        return INVALID_DEVICE;
    };
    // SAFETY: room for a pointer, as the caller promises.
    unsafe { context.write(std::ptr::from_ref(device).cast_mut().cast()) };
    SUCCESS
}

/// # Safety
/// As `cuDevicePrimaryCtxRelease`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(handle: c_int) -> c_int {
    device(handle).map_or(INVALID_DEVICE, |_| SUCCESS)
}

/// # Safety
/// As `cuCtxPushCurrent`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPushCurrent_v2(context: *mut c_void) -> c_int {
    match push_current(context) {
        true => SUCCESS,
        false => INVALID_CONTEXT,
    }
}

/// # Safety
/// As `cuCtxPopCurrent`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut *mut c_void) -> c_int {
    let Some(device) = pop_current() else {
        return INVALID_CONTEXT;
    };
    // SAFETY: room for a pointer, as the caller promises.
    unsafe { context.write(std::ptr::from_ref(device).cast_mut().cast()) };
    SUCCESS
}

/// Nothing is recorded here: a mode changes nothing.
///
/// # Safety
/// As `cuThreadExchangeStreamCaptureMode`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(_mode: *mut c_int) -> c_int {
    SUCCESS
}

/// # Safety
/// As `cuMemGetInfo`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, all: *mut usize) -> c_int {
    code(here().map(|device| {
        // SAFETY: room for a number, as the caller promises.
        unsafe { free.write(device.free_bytes()) };
        // SAFETY: as above.
        unsafe { all.write(device.bytes) };
    }))
}

/// # Safety
/// As `cuDeviceGetUuid`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], handle: c_int) -> c_int {
    let (Some(_), Ok(number)) = (device(handle), u8::try_from(handle)) else {
        return INVALID_DEVICE;
    };
    // The same in every process.
    let mut bytes = *b"software device\0";
    bytes[15] = number;
    // SAFETY: room for so many bytes, as the caller promises.
    unsafe { uuid.write(bytes) };
    SUCCESS
}

/// # Safety
/// As `cuDeviceGetAttribute`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, which: c_int, handle: c_int) -> c_int {
    let Some(device) = device(handle) else {
        return INVALID_DEVICE;
    };
    let answer = match which {
        // Memory that processes share can be a NIC's, too.
        110 => 1,
        // What a NIC wrote is seen after a call, on one device; never for sure on the small one; at once on the others.
        117 => c_int::from(device.runs_kernels()),
        118 if device.runs_kernels() || device.bytes < 2 << 20 => 0,
        118 => 200,
        _ => return INVALID_VALUE,
    };
    // SAFETY: room for a number, as the caller promises.
    unsafe { value.write(answer) };
    SUCCESS
}

/// It is attached to no bus.
///
/// # Safety
/// As `cuDeviceGetPCIBusId`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(_address: *mut c_char, _room: c_int, _handle: c_int) -> c_int {
    NOT_SUPPORTED
}

/// No kernel knows its memory as a DMA-BUF.
///
/// # Safety
/// As `cuMemGetHandleForAddressRange`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetHandleForAddressRange(
    _handle: *mut c_void,
    _address: u64,
    _bytes: usize,
    _kind: c_int,
    _flags: u64,
) -> c_int {
    NOT_SUPPORTED
}

/// # Safety
/// As `cuFlushGPUDirectRDMAWrites`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFlushGPUDirectRDMAWrites(target: c_int, scope: c_int) -> c_int {
    code(here().and(match (target, scope) {
        (0, 100) => Ok(()),
        _ => Err(INVALID_VALUE),
    }))
}

/// # Safety
/// As `cuMemGetAllocationGranularity`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAllocationGranularity(
    bytes: *mut usize,
    _properties: *const c_void,
    _option: c_int,
) -> c_int {
    // SAFETY: room for a number, as the caller promises.
    unsafe { bytes.write(shared::GRANULARITY) };
    SUCCESS
}

/// # Safety
/// As `cuMemCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemCreate(handle: *mut u64, bytes: usize, _properties: *const c_void, _flags: u64) -> c_int {
    code(here().and_then(|device| {
        let made = shared::create(device, bytes)?;
        // SAFETY: room for a number, as the caller promises.
        unsafe { handle.write(made) };
        Ok(())
    }))
}

/// # Safety
/// As `cuMemRelease`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemRelease(handle: u64) -> c_int {
    code(here().and_then(|_| shared::release(handle)))
}

/// # Safety
/// As `cuMemAddressReserve`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAddressReserve(
    address: *mut u64,
    bytes: usize,
    _alignment: usize,
    _hint: u64,
    _flags: u64,
) -> c_int {
    code(here().and_then(|_| {
        let base = shared::reserve(bytes)?;
        // SAFETY: room for a number, as the caller promises.
        unsafe { address.write(base) };
        Ok(())
    }))
}

/// # Safety
/// As `cuMemAddressFree`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAddressFree(address: u64, bytes: usize) -> c_int {
    code(here().and_then(|_| shared::unreserve(address, bytes)))
}

/// # Safety
/// As `cuMemMap`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemMap(address: u64, bytes: usize, offset: usize, handle: u64, _flags: u64) -> c_int {
    code(here().and_then(|device| {
        if offset != 0 {
            return Err(INVALID_VALUE);
        }
        shared::map(device, address, bytes, handle)
    }))
}

/// # Safety
/// As `cuMemUnmap`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemUnmap(address: u64, bytes: usize) -> c_int {
    code(here().and_then(|device| shared::unmap(device, address, bytes)))
}

/// # Safety
/// As `cuMemSetAccess`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemSetAccess(address: u64, bytes: usize, _access: *const c_void, count: usize) -> c_int {
    code(here().and_then(|device| {
        if count != 1 {
            return Err(INVALID_VALUE);
        }
        shared::allow(device, address, bytes)
    }))
}

/// # Safety
/// As `cuMemExportToShareableHandle`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemExportToShareableHandle(
    descriptor: *mut c_void,
    handle: u64,
    kind: c_int,
    _flags: u64,
) -> c_int {
    code(here().and_then(|_| {
        if kind != 1 {
            return Err(NOT_SUPPORTED);
        }
        let exported = shared::export(handle)?;
        // SAFETY: for a descriptor there is room for its number, as the caller promises.
        unsafe { descriptor.cast::<c_int>().write(exported) };
        Ok(())
    }))
}

/// # Safety
/// As `cuMemImportFromShareableHandle`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemImportFromShareableHandle(
    handle: *mut u64,
    descriptor: *mut c_void,
    kind: c_int,
) -> c_int {
    code(here().and_then(|device| {
        let descriptor = c_int::try_from(descriptor as usize).map_err(|_| INVALID_VALUE)?;
        if kind != 1 {
            return Err(NOT_SUPPORTED);
        }
        let made = shared::import(device, descriptor)?;
        // SAFETY: room for a number, as the caller promises.
        unsafe { handle.write(made) };
        Ok(())
    }))
}

/// # Safety
/// As `cuMemAlloc`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int {
    code(here().and_then(|device| {
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        let base = device.allocate(bytes).ok_or(OUT_OF_MEMORY)?;
        // SAFETY: room for a number, as the caller promises.
        unsafe { address.write(base) };
        Ok(())
    }))
}

/// # Safety
/// As `cuMemFree`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    code(here().and_then(|device| device.free(address).then_some(()).ok_or(INVALID_VALUE)))
}

/// # Safety
/// As `cuPointerGetAttribute`, of the device's number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttribute(data: *mut c_void, attribute: c_int, address: u64) -> c_int {
    code(here().and_then(|device| {
        if attribute != 9 || device.range(address).is_none() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: room for a number, as the caller promises.
        unsafe { data.cast::<c_int>().write(device.number()) };
        Ok(())
    }))
}

/// # Safety
/// As `cuMemGetAddressRange`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAddressRange_v2(base: *mut u64, bytes: *mut usize, address: u64) -> c_int {
    code(here().and_then(|device| {
        let (first, all) = device.range(address).ok_or(INVALID_VALUE)?;
        // SAFETY: room for a number, as the caller promises.
        unsafe { base.write(first) };
        // SAFETY: as above.
        unsafe { bytes.write(all) };
        Ok(())
    }))
}

/// # Safety
/// As `cuMemHostRegister`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostRegister_v2(address: *mut c_void, bytes: usize, _flags: c_uint) -> c_int {
    code(here().and_then(|device| {
        if device.refuses_registrations() {
            return Err(NOT_SUPPORTED);
        }
        register(address as u64, bytes).then_some(()).ok_or(ALREADY_REGISTERED)
    }))
}

/// # Safety
/// As `cuMemHostGetDevicePointer`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostGetDevicePointer_v2(device: *mut u64, host: *mut c_void, _flags: c_uint) -> c_int {
    code(here().and_then(|_| {
        if !is_known(host as u64) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: room for a number, as the caller promises.
        unsafe { device.write(host as u64) };
        Ok(())
    }))
}

/// # Safety
/// As `cuMemHostUnregister`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostUnregister(address: *mut c_void) -> c_int {
    code(here().and_then(|_| unregister(address as u64).then_some(()).ok_or(NOT_REGISTERED)))
}

/// # Safety
/// As `cuMemAllocHost`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocHost_v2(address: *mut *mut c_void, bytes: usize) -> c_int {
    code(here().and_then(|_| {
        let base = allocate_host(bytes).ok_or(OUT_OF_MEMORY)?;
        // SAFETY: room for a pointer, as the caller promises.
        unsafe { address.write(base as *mut c_void) };
        Ok(())
    }))
}

/// # Safety
/// As `cuMemFreeHost`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(address: *mut c_void) -> c_int {
    code(here().and_then(|_| free_host(address as u64).then_some(()).ok_or(INVALID_VALUE)))
}

/// # Safety
/// As `cuMemcpyAsync`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyAsync(target: u64, source: u64, bytes: usize, stream: *mut c_void) -> c_int {
    code(here().and_then(|device| {
        let stream = Stream::of(device, stream).ok_or(INVALID_VALUE)?;
        device.enter(target, bytes);
        device.enter(source, bytes);
        stream.push(Operation::Copy { target, source, bytes });
        Ok(())
    }))
}

/// # Safety
/// As `cuMemcpyBatchAsync` of CUDA 12.8.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyBatchAsync(
    targets: *mut u64,
    sources: *mut u64,
    sizes: *mut usize,
    count: usize,
    _attributes: *mut c_void,
    first: *mut usize,
    attributes_count: usize,
    _failed: *mut usize,
    stream: *mut c_void,
) -> c_int {
    code(here().and_then(|device| {
        let stream = Stream::of(device, stream).ok_or(INVALID_VALUE)?;
        // SAFETY: there is one, as the caller promises.
        if count == 0 || attributes_count != 1 || unsafe { first.read() } != 0 {
            return Err(INVALID_VALUE);
        }
        if device.refuses_registrations() {
            return Err(NOT_SUPPORTED);
        }
        // In an order that nobody may count on.
        for at in (0..count).rev() {
            // SAFETY: as many as said, as the caller promises.
            let target = unsafe { targets.wrapping_add(at).read() };
            // SAFETY: as above.
            let source = unsafe { sources.wrapping_add(at).read() };
            // SAFETY: as above.
            let bytes = unsafe { sizes.wrapping_add(at).read() };
            device.enter(target, bytes);
            device.enter(source, bytes);
            stream.push(Operation::Copy { target, source, bytes });
        }
        Ok(())
    }))
}

/// # Safety
/// As `cuMemcpyPeerAsync`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyPeerAsync(
    target: u64,
    target_context: *mut c_void,
    source: u64,
    source_context: *mut c_void,
    bytes: usize,
    stream: *mut c_void,
) -> c_int {
    code(here().and_then(|device| {
        let stream = Stream::of(device, stream).ok_or(INVALID_VALUE)?;
        let side = |context: *mut c_void, address: u64| -> Result<PeerSide, c_int> {
            let device = of_context(context).ok_or(INVALID_CONTEXT)?;
            if !device.owns(address) {
                return Err(INVALID_VALUE);
            }
            device.enter(address, bytes);
            Ok(PeerSide { device, address })
        };
        let (target, source) = (side(target_context, target)?, side(source_context, source)?);
        stream.push(Operation::PeerCopy { target, source, bytes });
        Ok(())
    }))
}

/// One side of a copy of rows, as the driver has it.
#[repr(C)]
pub struct Side {
    x_bytes: usize,
    y: usize,
    kind: c_int,
    host: u64,
    device: u64,
    array: *mut c_void,
    pitch: usize,
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub struct Rows {
    source: Side,
    target: Side,
    row_bytes: usize,
    rows: usize,
}

impl Side {
    /// The first byte of a row.
    fn row(&self, row: usize) -> Option<u64> {
        let base = match self.kind {
            1 => self.host,
            2 => self.device,
            _ => return None,
        };
        let plain = self.array.is_null() && self.x_bytes == 0 && self.y == 0;
        plain.then_some(base + (row * self.pitch) as u64)
    }
}

/// # Safety
/// As `cuMemcpy2DAsync`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy2DAsync_v2(rows: *const Rows, stream: *mut c_void) -> c_int {
    code(here().and_then(|device| {
        let stream = Stream::of(device, stream).ok_or(INVALID_VALUE)?;
        // SAFETY: there is one, as the caller promises.
        let rows = unsafe { &*rows };
        if device.is_slow() {
            return Err(NOT_SUPPORTED);
        }
        if rows.source.pitch < rows.row_bytes || rows.target.pitch < rows.row_bytes {
            return Err(INVALID_VALUE);
        }
        for row in 0..rows.rows {
            let source = rows.source.row(row).ok_or(INVALID_VALUE)?;
            let target = rows.target.row(row).ok_or(INVALID_VALUE)?;
            let bytes = rows.row_bytes;
            device.enter(target, bytes);
            device.enter(source, bytes);
            stream.push(Operation::Copy { target, source, bytes });
        }
        Ok(())
    }))
}

/// # Safety
/// As `cuMemsetD8Async`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(target: u64, value: u8, bytes: usize, stream: *mut c_void) -> c_int {
    code(here().and_then(|device| {
        let stream = Stream::of(device, stream).ok_or(INVALID_VALUE)?;
        device.enter(target, bytes);
        stream.push(Operation::Fill { target, value, bytes });
        Ok(())
    }))
}

/// # Safety
/// As `cuStreamCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) -> c_int {
    code(here().and_then(|device| {
        let made = Stream::start(device).ok_or(OUT_OF_MEMORY)?;
        // SAFETY: room for a pointer, as the caller promises.
        unsafe { stream.write(made) };
        Ok(())
    }))
}

/// # Safety
/// As `cuStreamDestroy`: the stream is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> c_int {
    code(here().and_then(|_| Stream::destroy(stream).then_some(()).ok_or(INVALID_VALUE)))
}

/// # Safety
/// As `cuStreamWaitEvent`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(stream: *mut c_void, event: *mut c_void, _flags: c_uint) -> c_int {
    code(here().and_then(|device| {
        let stream = Stream::of(device, stream).ok_or(INVALID_VALUE)?;
        let event = Event::of(event).ok_or(INVALID_VALUE)?;
        stream.push(Operation::Wait(event.mark()));
        Ok(())
    }))
}

/// # Safety
/// As `cuEventCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) -> c_int {
    code(here().map(|device| {
        // SAFETY: room for a pointer, as the caller promises.
        unsafe { event.write(Event::make(device)) };
    }))
}

/// # Safety
/// As `cuEventRecord`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: *mut c_void, stream: *mut c_void) -> c_int {
    code(here().and_then(|device| {
        let stream = Stream::of(device, stream).ok_or(INVALID_VALUE)?;
        let event = Event::of(event).ok_or(INVALID_VALUE)?;
        stream.push(Operation::Record(event.record()));
        Ok(())
    }))
}

/// # Safety
/// As `cuEventQuery`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(event: *mut c_void) -> c_int {
    code(here().and_then(|_| {
        let event = Event::of(event).ok_or(INVALID_VALUE)?;
        event.mark().has_happened().then_some(()).ok_or(NOT_READY)
    }))
}

/// # Safety
/// As `cuEventSynchronize`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventSynchronize(event: *mut c_void) -> c_int {
    code(here().and_then(|device| {
        Event::of(event).ok_or(INVALID_VALUE)?.mark().wait();
        if device.is_broken() {
            Err(ILLEGAL_ADDRESS)
        } else {
            Ok(())
        }
    }))
}

/// # Safety
/// As `cuEventDestroy`: the event is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> c_int {
    code(here().and_then(|_| Event::destroy(event).then_some(()).ok_or(INVALID_VALUE)))
}

/// # Safety
/// As `cuGetErrorName`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: c_int, name: *mut *const c_char) -> c_int {
    let words = match error {
        INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        INVALID_DEVICE => c"CUDA_ERROR_INVALID_DEVICE",
        MAP_FAILED => c"CUDA_ERROR_MAP_FAILED",
        INVALID_PTX => c"CUDA_ERROR_INVALID_PTX",
        NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
        ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        ALREADY_REGISTERED => c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
        NOT_REGISTERED => c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
        NOT_SUPPORTED => c"CUDA_ERROR_NOT_SUPPORTED",
        _ => {
            // SAFETY: room for a pointer, as the caller promises.
            unsafe { name.write(null_mut()) };
            return INVALID_VALUE;
        }
    };
    // SAFETY: room for a pointer, as the caller promises; the words are constant.
    unsafe { name.write(words.as_ptr()) };
    SUCCESS
}
