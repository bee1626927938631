//! Memory that processes share: files of memory behind descriptors, mapped where addresses were reserved.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::io::dup;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};

use crate::device::Device;
use crate::{INVALID_VALUE, OUT_OF_MEMORY};

/// As on devices.
pub(crate) const GRANULARITY: usize = 2 << 20;
/// What the file of each is called, followed by its device.
const NAME: &str = "softgpu of ";

static TABLE: Mutex<Table> = Mutex::new(Table {
    handles: BTreeMap::new(),
    reserved: BTreeMap::new(),
    next: 1,
});

struct Table {
    handles: BTreeMap<u64, Arc<Shared>>,
    reserved: BTreeMap<u64, Reserved>,
    next: u64,
}

struct Reserved {
    bytes: usize,
    mapped: Option<Arc<Shared>>,
}

/// Goes back to the device, as far as this process knows, with the last handle and the last mapping.
struct Shared {
    device: &'static Device,
    file: OwnedFd,
    bytes: usize,
    /// It was created here.
    is_counted: bool,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.is_counted {
            self.device.give_bytes(self.bytes);
        }
    }
}

impl Table {
    fn add(&mut self, shared: Shared) -> u64 {
        let handle = self.next;
        self.next += 1;
        self.handles.insert(handle, Arc::new(shared));
        handle
    }
}

pub(crate) fn create(device: &'static Device, bytes: usize) -> Result<u64, c_int> {
    if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) {
        return Err(INVALID_VALUE);
    }
    if !device.take_bytes(bytes) {
        return Err(OUT_OF_MEMORY);
    }
    let name = format!("{NAME}{}", device.name);
    let Ok(file) = memfd_create(name.as_str(), MemfdFlags::CLOEXEC) else {
        device.give_bytes(bytes);
        return Err(OUT_OF_MEMORY);
    };
    let shared = Shared {
        device,
        file,
        bytes,
        is_counted: true,
    };
    ftruncate(&shared.file, bytes as u64).map_err(|_| OUT_OF_MEMORY)?;
    // As on a device: what lies in it is whatever was there.
    let garbage = vec![0xA5; 1 << 20];
    for offset in (0..bytes).step_by(garbage.len()) {
        rustix::io::pwrite(&shared.file, &garbage, offset as u64).map_err(|_| OUT_OF_MEMORY)?;
    }
    Ok(TABLE.lock().add(shared))
}

pub(crate) fn release(handle: u64) -> Result<(), c_int> {
    let released = TABLE.lock().handles.remove(&handle);
    released.map(drop).ok_or(INVALID_VALUE)
}

pub(crate) fn export(handle: u64) -> Result<c_int, c_int> {
    let table = TABLE.lock();
    let shared = table.handles.get(&handle).ok_or(INVALID_VALUE)?;
    Ok(dup(&shared.file).map_err(|_| OUT_OF_MEMORY)?.into_raw_fd())
}

pub(crate) fn import(device: &'static Device, descriptor: c_int) -> Result<u64, c_int> {
    if descriptor < 0 {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller of the C function has it open until that returns.
    let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
    let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    let file = std::fs::read_link(path).map_err(|_| INVALID_VALUE)?;
    if !file.to_string_lossy().contains(&format!("{NAME}{}", device.name)) {
        return Err(INVALID_VALUE);
    }
    let bytes = fstat(descriptor).map_err(|_| INVALID_VALUE)?.st_size;
    let shared = Shared {
        device,
        file: dup(descriptor).map_err(|_| OUT_OF_MEMORY)?,
        bytes: usize::try_from(bytes).map_err(|_| INVALID_VALUE)?,
        is_counted: false,
    };
    Ok(TABLE.lock().add(shared))
}

pub(crate) fn reserve(bytes: usize) -> Result<u64, c_int> {
    if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) {
        return Err(INVALID_VALUE);
    }
    // SAFETY: no address is asked for: the kernel picks one that nothing is mapped at.
    let base = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), MapFlags::PRIVATE) };
    let base = base.map_err(|_| OUT_OF_MEMORY)? as u64;
    let reserved = Reserved { bytes, mapped: None };
    TABLE.lock().reserved.insert(base, reserved);
    Ok(base)
}

pub(crate) fn unreserve(address: u64, bytes: usize) -> Result<(), c_int> {
    let mut table = TABLE.lock();
    let fits = |reserved: &Reserved| reserved.bytes == bytes && reserved.mapped.is_none();
    if !table.reserved.get(&address).is_some_and(fits) {
        return Err(INVALID_VALUE);
    }
    table.reserved.remove(&address);
    // SAFETY: mapped by `reserve`, all of it, and nobody else's since.
    unsafe { munmap(address as *mut c_void, bytes) }.map_err(|_| INVALID_VALUE)
}

pub(crate) fn map(device: &'static Device, address: u64, bytes: usize, handle: u64) -> Result<(), c_int> {
    let mut table = TABLE.lock();
    let shared = Arc::clone(table.handles.get(&handle).ok_or(INVALID_VALUE)?);
    let is_here = std::ptr::eq(shared.device, device);
    let reserved = table.reserved.get_mut(&address).ok_or(INVALID_VALUE)?;
    if !is_here || reserved.bytes != bytes || shared.bytes != bytes || reserved.mapped.is_some() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: replaces what `reserve` mapped, all of it, which nobody can have used.
    let mapped = unsafe {
        mmap(
            address as *mut c_void,
            bytes,
            ProtFlags::empty(),
            MapFlags::SHARED | MapFlags::FIXED,
            &shared.file,
            0,
        )
    };
    mapped.map_err(|_| OUT_OF_MEMORY)?;
    reserved.mapped = Some(shared);
    Ok(())
}

pub(crate) fn allow(device: &'static Device, address: u64, bytes: usize) -> Result<(), c_int> {
    let table = TABLE.lock();
    let fits = |reserved: &Reserved| reserved.bytes == bytes && reserved.mapped.is_some();
    if !table.reserved.get(&address).is_some_and(fits) {
        return Err(INVALID_VALUE);
    }
    // SAFETY: mapped by `map`, all of it.
    let allowed = unsafe {
        mprotect(
            address as *mut c_void,
            bytes,
            MprotectFlags::READ | MprotectFlags::WRITE,
        )
    };
    allowed.map_err(|_| INVALID_VALUE)?;
    device.add_mapping(address, bytes);
    Ok(())
}

pub(crate) fn unmap(device: &'static Device, address: u64, bytes: usize) -> Result<(), c_int> {
    let mut table = TABLE.lock();
    let reserved = table.reserved.get_mut(&address).ok_or(INVALID_VALUE)?;
    if reserved.bytes != bytes || reserved.mapped.is_none() {
        return Err(INVALID_VALUE);
    }
    // It may have been mapped and never allowed.
    device.remove_mapping(address);
    // SAFETY: replaces what `map` mapped, all of it, and no operation is in flight on it.
    let replaced = unsafe {
        mmap_anonymous(
            address as *mut c_void,
            bytes,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::FIXED,
        )
    };
    replaced.map_err(|_| OUT_OF_MEMORY)?;
    reserved.mapped = None;
    Ok(())
}
