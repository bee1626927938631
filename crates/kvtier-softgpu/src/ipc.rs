//! Handles of allocations for other processes: CUDA's older way, which engines share their tensors by.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_uint, c_void};
use std::fs::File;

use parking_lot::Mutex;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{INVALID_CONTEXT, INVALID_VALUE, MAP_FAILED, NOT_SUPPORTED, code, here};

/// What the file of a device's memory is called.
pub(crate) const ARENA: &str = "softgpu arena";

/// `CUipcMemHandle`.
#[repr(C)]
pub(crate) struct Handle {
    magic: [u8; 16],
    process: u32,
    descriptor: u32,
    offset: u64,
    bytes: u64,
    rest: [u64; 3],
}

/// The name of a device of ours, cut or filled up.
fn magic(name: &str) -> [u8; 16] {
    let mut magic = [0; 16];
    for (byte, of) in magic.iter_mut().zip(name.trim_start_matches("software: ").bytes()) {
        *byte = of;
    }
    magic
}

/// What is open, by the address that the caller was given.
static OPEN: Mutex<BTreeMap<u64, Opened>> = Mutex::new(BTreeMap::new());

/// As on a device, one mapping however often it is opened.
struct Opened {
    of: (u32, u32, u64),
    base: u64,
    bytes: usize,
    count: usize,
}

/// # Safety
/// As `cuIpcGetMemHandle`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuIpcGetMemHandle(handle: *mut Handle, address: u64) -> c_int {
    code(here().and_then(|device| {
        let (descriptor, offset, bytes) = device.allocation(address).ok_or(INVALID_VALUE)?;
        let made = Handle {
            magic: magic(device.name),
            process: std::process::id(),
            descriptor: u32::try_from(descriptor).map_err(|_| INVALID_VALUE)?,
            offset,
            bytes: bytes as u64,
            rest: [0; 3],
        };
        // SAFETY: room for a handle, as the caller promises.
        unsafe { handle.write(made) };
        Ok(())
    }))
}

/// # Safety
/// As `cuIpcOpenMemHandle`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuIpcOpenMemHandle_v2(address: *mut u64, handle: Handle, flags: c_uint) -> c_int {
    code(here().and_then(|device| {
        if handle.magic != magic(device.name) || flags != 1 {
            return Err(INVALID_VALUE);
        }
        // As on a device.
        if handle.process == std::process::id() {
            return Err(INVALID_CONTEXT);
        }
        let of = (handle.process, handle.descriptor, handle.offset);
        let mut open = OPEN.lock();
        if let Some((there, known)) = open.iter_mut().find(|(_, known)| known.of == of) {
            known.count += 1;
            // SAFETY: room for a number, as the caller promises.
            unsafe { address.write(*there) };
            return Ok(());
        }
        let bytes = usize::try_from(handle.bytes).map_err(|_| INVALID_VALUE)?;
        let path = format!("/proc/{}/fd/{}", handle.process, handle.descriptor);
        let name = std::fs::read_link(&path).map_err(|_| MAP_FAILED)?;
        if !name.to_string_lossy().contains(ARENA) || handle.offset + handle.bytes > device.bytes as u64 {
            return Err(MAP_FAILED);
        }
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|_| MAP_FAILED)?;
        let allowed = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel picks addresses that nothing is mapped at.
        let base = unsafe { mmap(std::ptr::null_mut(), device.bytes, allowed, MapFlags::SHARED, file, 0) };
        let base = base.map_err(|_| NOT_SUPPORTED)? as u64;
        let there = base + handle.offset;
        device.add_mapping(there, bytes);
        let opened = Opened {
            of,
            base,
            bytes: device.bytes,
            count: 1,
        };
        open.insert(there, opened);
        // SAFETY: room for a number, as the caller promises.
        unsafe { address.write(there) };
        Ok(())
    }))
}

/// # Safety
/// As `cuIpcCloseMemHandle`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuIpcCloseMemHandle(address: u64) -> c_int {
    code(here().and_then(|device| {
        let mut open = OPEN.lock();
        let known = open.get_mut(&address).ok_or(INVALID_VALUE)?;
        known.count -= 1;
        if known.count > 0 {
            return Ok(());
        }
        let (base, bytes) = (known.base, known.bytes);
        open.remove(&address);
        device.remove_mapping(address);
        // SAFETY: mapped above, all of it, and no operation is in flight on it.
        unsafe { munmap(base as *mut c_void, bytes) }.map_err(|_| INVALID_VALUE)
    }))
}
