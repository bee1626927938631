//! Devices, their ports, and memory registered with them.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::Mutex;

use super::ffi::{self, Context, DeviceAttributes, Extended, Library, Mr, Pd, PortAttributes};
use crate::gpu::DeviceRegion;
use crate::memory::{Access, MemoryRegion, Pinned};
use crate::remote::RemoteAccess;

const ACCESS_LOCAL_WRITE: c_int = 1;
const ACCESS_REMOTE_WRITE: c_int = 2;
const ACCESS_REMOTE_READ: c_int = 4;
const ACCESS_ON_DEMAND: c_int = 64;
const PORT_ACTIVE: u32 = 4;
const LINK_INFINIBAND: u8 = 1;

/// Names of the devices here, in the library's order.
///
/// # Errors
/// Why there is no RDMA here, in words.
pub(crate) fn device_names() -> Result<Vec<String>, String> {
    let library = ffi::library()?;
    let mut names = Vec::new();
    for_each_device(library, |device, name| {
        let _ = device;
        names.push(name.to_owned());
        false
    })?;
    Ok(names)
}

/// Calls `look` with each device until it returns true.
fn for_each_device(library: &Library, mut look: impl FnMut(ffi::Opaque, &str) -> bool) -> Result<(), String> {
    let mut count = 0;
    // SAFETY: the library writes one number and returns a list that ends in null.
    let list = unsafe { (library.get_device_list)(&raw mut count) };
    if list.is_null() {
        return Err(format!("no list of devices: {}", io::Error::last_os_error()));
    }
    for at in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the list has `count` entries, and `at` is less.
        let device = unsafe { list.wrapping_add(at).read() };
        // SAFETY: a device of the list, which is not freed yet.
        let name = unsafe { (library.get_device_name)(device) };
        // SAFETY: the name lies in the device, which the list keeps.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        if look(device, &name) {
            break;
        }
    }
    // SAFETY: the list came from the library and is freed once; devices that were opened stay.
    unsafe { (library.free_device_list)(list) };
    Ok(())
}

/// Asks the device, by a call that lies around its context rather than in the library.
fn pages_on_demand(context: NonNull<Context>) -> bool {
    // SAFETY: an open context.
    if unsafe { context.as_ref() }.abi != usize::MAX {
        return false;
    }
    // The beginning is what an older library has not: its size says how much there is.
    let needed = size_of::<Extended>() - std::mem::offset_of!(Extended, query_device_ex);
    let before = std::mem::offset_of!(Extended, context) - std::mem::offset_of!(Extended, size);
    let size = context.as_ptr().wrapping_byte_sub(before).cast::<usize>();
    // SAFETY: the size lies next to the context, in every version.
    let size = unsafe { size.read() };
    if size < needed {
        return false;
    }
    let before = std::mem::offset_of!(Extended, context) - std::mem::offset_of!(Extended, query_device_ex);
    let query = context.as_ptr().wrapping_byte_sub(before).cast::<ffi::QueryDevice>();
    // SAFETY: the size says that this much lies before the context.
    let query = unsafe { query.read() };
    let Some(query) = query else { return false };
    let mut attributes = ffi::ExtendedAttributes([0; ffi::EXTENDED_BYTES]);
    // SAFETY: an open context, no input, and room for as many bytes as it is told of.
    let answer = unsafe {
        query(
            context.as_ptr(),
            std::ptr::null(),
            &raw mut attributes,
            ffi::EXTENDED_BYTES,
        )
    };
    answer == 0 && attributes.pages_on_demand()
}

fn is_iwarp(name: &str) -> bool {
    let path = format!("/sys/class/infiniband/{name}/node_type");
    // `4: RNIC`, see the kernel's ABI documentation.
    std::fs::read_to_string(path).is_ok_and(|kind| kind.starts_with('4'))
}

/// What a port can do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) is_active: bool,
    pub(crate) is_infiniband: bool,
    pub(crate) mtu: u32,
    pub(crate) lid: u16,
    pub(crate) gid_count: u32,
}

/// What a device allows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) work_requests: u32,
    pub(crate) completions: u32,
    pub(crate) reads_out: u32,
    pub(crate) reads_in: u32,
    /// Memory need not be pinned: it is paged in when it is asked for.
    pub(crate) on_demand: bool,
}

/// An open device with one protection domain.
pub(crate) struct Device {
    pub(super) library: &'static Library,
    pub(super) context: NonNull<Context>,
    pub(super) pd: NonNull<Pd>,
    pub(crate) name: String,
    pub(crate) limits: Limits,
    /// It speaks iWARP: connections are librdmacm's, a read's target is written by the peer, completions have no order.
    pub(crate) is_iwarp: bool,
}

// SAFETY: the library's objects may be used from any thread, it locks for itself.
unsafe impl Send for Device {}
// SAFETY: as for `Send`.
unsafe impl Sync for Device {}

impl Device {
    /// # Errors
    /// In words: no library, no such device, or what the system says.
    pub(crate) fn open(name: &str) -> Result<Arc<Device>, String> {
        let library = ffi::library()?;
        let mut opened = None;
        for_each_device(library, |device, found| {
            if found != name {
                return false;
            }
            // SAFETY: a device of the list, which is not freed yet.
            let context = unsafe { (library.open_device)(device) };
            opened = Some(NonNull::new(context).ok_or_else(io::Error::last_os_error));
            true
        })?;
        let context = opened
            .ok_or_else(|| format!("no device {name}"))?
            .map_err(|error| format!("cannot open {name}: {error}"))?;
        // SAFETY: an open context.
        let pd = unsafe { (library.alloc_pd)(context.as_ptr()) };
        let Some(pd) = NonNull::new(pd) else {
            let error = io::Error::last_os_error();
            // SAFETY: opened above, nothing was made of it.
            unsafe { (library.close_device)(context.as_ptr()) };
            return Err(format!("{name} has no protection domain for us: {error}"));
        };
        let mut attributes = DeviceAttributes([0; 512]);
        // SAFETY: an open context, and room for more than the library writes.
        let answer = unsafe { (library.query_device)(context.as_ptr(), &raw mut attributes) };
        let device = Device {
            library,
            context,
            pd,
            name: name.to_owned(),
            is_iwarp: is_iwarp(name),
            limits: Limits {
                work_requests: attributes.max_qp_wr(),
                completions: attributes.max_cqe(),
                reads_out: attributes.max_qp_init_rd_atom(),
                reads_in: attributes.max_qp_rd_atom(),
                on_demand: pages_on_demand(context),
            },
        };
        if answer != 0 {
            return Err(format!(
                "{name} does not tell its limits: {}",
                io::Error::from_raw_os_error(answer)
            ));
        }
        Ok(Arc::new(device))
    }

    /// # Errors
    /// What the device says.
    pub(crate) fn port(&self, number: u8) -> io::Result<Port> {
        let mut attributes = PortAttributes([0; 128]);
        // SAFETY: an open context, and room for more than the library writes.
        let answer = unsafe { (self.library.query_port)(self.context.as_ptr(), number, &raw mut attributes) };
        if answer != 0 {
            return Err(io::Error::from_raw_os_error(answer));
        }
        Ok(Port {
            is_active: attributes.state() == PORT_ACTIVE,
            is_infiniband: attributes.link_layer() == LINK_INFINIBAND,
            mtu: attributes.active_mtu(),
            lid: attributes.lid(),
            gid_count: attributes.gid_count(),
        })
    }

    /// The address at `index` of a port's table, as 16 bytes in network order.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn gid(&self, port: u8, index: u8) -> io::Result<[u8; 16]> {
        let mut gid = [0u64; 2];
        // SAFETY: an open context, and room for the 16 bytes that the library writes.
        let answer = unsafe { (self.library.query_gid)(self.context.as_ptr(), port, c_int::from(index), &raw mut gid) };
        if answer != 0 {
            return Err(io::Error::other("no such address"));
        }
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gid[0].to_ne_bytes());
        bytes[8..].copy_from_slice(&gid[1].to_ne_bytes());
        Ok(bytes)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: everything made of the domain holds this device, so nothing is left of it.
        unsafe { (self.library.dealloc_pd)(self.pd.as_ptr()) };
        // SAFETY: the last object of the context is gone.
        unsafe { (self.library.close_device)(self.context.as_ptr()) };
    }
}

/// How a NIC gets at memory of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectWay {
    /// The GPU's driver exports the memory as a DMA-BUF, which the NIC's imports.
    DmaBuf,
    /// The NIC's driver asks a module of the GPU's about the address: `nvidia-peermem`.
    PeerMemory,
}

/// What a registration keeps.
enum Held {
    Host(#[expect(dead_code, reason = "held for what its drop does")] Pinned),
    Device(#[expect(dead_code, reason = "held so that the memory stays")] Arc<DeviceRegion>),
}

/// A region that a device may read and write. It keeps the region's memory until the device has let go of it.
pub(crate) struct Registered {
    device: Arc<Device>,
    /// None once the device has let go.
    held: Mutex<Option<(Vec<NonNull<Mr>>, Held)>>,
    pub(crate) local_key: u32,
    pub(crate) remote_key: u32,
}

// SAFETY: as for `Device`; the region is shared memory that nobody holds references into.
unsafe impl Send for Registered {}
// SAFETY: as for `Send`.
unsafe impl Sync for Registered {}

impl Registered {
    /// Pins the region's pages for the device; where they may not be pinned, and the device can, they are paged in on
    /// demand.
    ///
    /// # Errors
    /// What the system says to the first way.
    pub(crate) fn new(
        device: &Arc<Device>,
        region: &Arc<MemoryRegion>,
        remote: RemoteAccess,
    ) -> io::Result<Registered> {
        let is_writable = region.access() == Access::ReadWrite;
        let mut access = ACCESS_REMOTE_READ;
        if is_writable {
            access |= ACCESS_LOCAL_WRITE;
        }
        if remote == RemoteAccess::ReadWrite {
            access |= ACCESS_REMOTE_WRITE;
        }
        let register = |access| {
            let start = region.slice(0, region.bytes()).map_err(io::Error::other)?.as_ptr();
            // SAFETY: the region's mapping, which `Registered` keeps until the device has let go of it; the device only
            // does what `access` says.
            let mr =
                unsafe { (device.library.reg_mr)(device.pd.as_ptr(), start.cast_mut().cast(), region.bytes(), access) };
            NonNull::new(mr).ok_or_else(io::Error::last_os_error)
        };
        let register = |access| match register(access) {
            Err(error) if device.limits.on_demand => register(access | ACCESS_ON_DEMAND).map_err(|_| error),
            answered => answered,
        };
        let pinned = Pinned::new(region);
        let told = register(access)?;
        // SAFETY: the library just returned it.
        let keys = unsafe { told.as_ref() };
        let mut registered = Registered {
            device: Arc::clone(device),
            local_key: keys.local_key,
            remote_key: keys.remote_key,
            held: Mutex::new(Some((vec![told], Held::Host(pinned)))),
        };
        if !device.is_iwarp || !is_writable || remote == RemoteAccess::ReadWrite {
            return Ok(registered);
        }
        // A read's target on iWARP is memory that the peer may write. The key for that is another than the one that peers
        // are told, so that who may only read is refused as ever.
        let target = register(access | ACCESS_REMOTE_WRITE)?;
        // SAFETY: the library just returned it.
        registered.local_key = unsafe { target.as_ref() }.local_key;
        if let Some((mrs, _)) = registered.held.get_mut() {
            mrs.push(target);
        }
        Ok(registered)
    }

    /// The same for memory of a GPU, which is never paged in on demand.
    ///
    /// # Errors
    /// What the GPU's driver or the system says.
    pub(crate) fn of_device(
        device: &Arc<Device>,
        region: &Arc<DeviceRegion>,
        way: DirectWay,
        remote: RemoteAccess,
    ) -> io::Result<Registered> {
        let mut access = ACCESS_REMOTE_READ | ACCESS_LOCAL_WRITE;
        // As for host memory: a read's target on iWARP is memory that the peer may write.
        if remote == RemoteAccess::ReadWrite || device.is_iwarp {
            access |= ACCESS_REMOTE_WRITE;
        }
        if device.is_iwarp && remote == RemoteAccess::Read {
            return Err(io::Error::other(
                "iWARP: a peer that may read device memory could write it",
            ));
        }
        let (address, bytes) = (region.address(), region.bytes());
        let mr = match way {
            DirectWay::PeerMemory => {
                // SAFETY: memory of a GPU that is allocated until `Registered` lets go of it; the system refuses addresses that no
                // module of a GPU's knows.
                unsafe { (device.library.reg_mr)(device.pd.as_ptr(), address as ffi::Opaque, bytes, access) }
            }
            DirectWay::DmaBuf => {
                let register = device.library.reg_dmabuf_mr.ok_or_else(|| {
                    io::Error::other("libibverbs has no ibv_reg_dmabuf_mr: it is older than rdma-core 34")
                })?;
                let exported = region.dma_buf().map_err(io::Error::other)?;
                // SAFETY: the range lies in what the descriptor stands for; the device keeps a reference of its own to that, and
                // `Registered` the memory, until it is taken back.
                unsafe {
                    register(
                        device.pd.as_ptr(),
                        exported.offset,
                        bytes,
                        address,
                        exported.file.as_raw_fd(),
                        access,
                    )
                }
            }
        };
        let told = NonNull::new(mr).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the library just returned it.
        let keys = unsafe { told.as_ref() };
        Ok(Registered {
            device: Arc::clone(device),
            local_key: keys.local_key,
            remote_key: keys.remote_key,
            held: Mutex::new(Some((vec![told], Held::Device(Arc::clone(region))))),
        })
    }

    /// Takes the region from the device: afterwards no key reaches it. Work of ours on it that is in flight fails.
    ///
    /// # Errors
    /// When the device refuses; the memory is then kept for good.
    pub(crate) fn deregister(&self) -> io::Result<()> {
        let mut held = self.held.lock();
        let Some((mrs, region)) = held.take() else {
            return Ok(());
        };
        let mut refused = None;
        for mr in mrs {
            // SAFETY: registered by us and taken back once.
            let answer = unsafe { (self.device.library.dereg_mr)(mr.as_ptr()) };
            if answer != 0 {
                refused = Some(io::Error::from_raw_os_error(answer));
            }
        }
        let Some(error) = refused else { return Ok(()) };
        // The device may still write: never unmap it.
        let _kept = std::mem::ManuallyDrop::new(region);
        Err(error)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // Who needs to know has called it.
        let _ = self.deregister();
    }
}
