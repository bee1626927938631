//! Modules and their kernels.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use crate::ptx::{self, Grid, Kernel};
use crate::stream::{Operation, Stream};
use crate::{INVALID_PTX, INVALID_VALUE, NOT_FOUND, NOT_SUPPORTED, code, here};

/// What was loaded from one text.
struct Module(Vec<Arc<Kernel>>);

/// # Safety
/// As `cuModuleLoadData`, of a text that ends in zero.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_void) -> c_int {
    code(here().and_then(|device| {
        if !device.loads_kernels() {
            return Err(NOT_SUPPORTED);
        }
        // SAFETY: a text that ends in zero, as the caller promises.
        let text = unsafe { CStr::from_ptr(image.cast::<c_char>()) };
        let kernels = text.to_str().ok().and_then(ptx::read).ok_or(INVALID_PTX)?;
        let loaded = Box::new(Module(kernels.into_iter().map(Arc::new).collect()));
        // SAFETY: room for a pointer, as the caller promises.
        unsafe { module.write(Box::into_raw(loaded).cast()) };
        Ok(())
    }))
}

/// # Safety
/// As `cuModuleGetFunction`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    module: *mut c_void,
    name: *const c_char,
) -> c_int {
    code(here().and_then(|_| {
        // SAFETY: loaded above and not unloaded yet, as the caller promises.
        let module = unsafe { module.cast::<Module>().as_ref() }.ok_or(INVALID_VALUE)?;
        // SAFETY: a text that ends in zero, as the caller promises.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        let found = module.0.iter().find(|kernel| kernel.name == name).ok_or(NOT_FOUND)?;
        // SAFETY: room for a pointer, as the caller promises; it is good while the module is.
        unsafe { function.write(std::ptr::from_ref(found).cast_mut().cast()) };
        Ok(())
    }))
}

/// # Safety
/// As `cuModuleUnload`: neither it nor a function of it is used again.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuModuleUnload(module: *mut c_void) -> c_int {
    if module.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: loaded above, and unloaded once, as the caller promises; what was launched holds its kernel.
    drop(unsafe { Box::from_raw(module.cast::<Module>()) });
    crate::SUCCESS
}

/// # Safety
/// As `cuLaunchKernel`, of a kernel with one parameter.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    blocks: c_uint,
    blocks_y: c_uint,
    blocks_z: c_uint,
    threads: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    _shared_bytes: c_uint,
    stream: *mut c_void,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> c_int {
    code(here().and_then(|device| {
        let stream = Stream::of(device, stream).ok_or(INVALID_VALUE)?;
        // SAFETY: of a module that is not unloaded yet, as the caller promises.
        let kernel = unsafe { function.cast::<Arc<Kernel>>().as_ref() }.ok_or(INVALID_VALUE)?;
        if device.launches_none() {
            return Err(NOT_SUPPORTED);
        }
        let is_flat = [blocks_y, blocks_z, threads_y, threads_z] == [1; 4];
        if !is_flat || blocks == 0 || threads == 0 || threads > 1024 || !extra.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: as many pointers as the kernel has parameters, as the caller promises: one.
        let parameter = unsafe { parameters.read() };
        // SAFETY: to as many bytes as the kernel says.
        let bytes = unsafe { std::slice::from_raw_parts(parameter.cast::<u8>(), kernel.parameter_bytes) };
        stream.push(Operation::Launch {
            kernel: Arc::clone(kernel),
            grid: Grid { blocks, threads },
            parameters: bytes.to_vec(),
        });
        Ok(())
    }))
}
