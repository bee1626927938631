//! The part of librdmacm that is used, opened at run time like libibverbs. Layouts are those of its ABI 1.0, asserted below.

use std::ffi::{CStr, c_int, c_void};
use std::sync::OnceLock;

use crate::rdma::verbs::loader::{self, Opaque};

const FILE: &CStr = c"librdmacm.so.1";

/// `RDMA_PS_TCP`: reliable connections.
pub(super) const SPACE_TCP: c_int = 0x106;
pub(super) const EVENT_ADDRESS_RESOLVED: u32 = 0;
pub(super) const EVENT_ROUTE_RESOLVED: u32 = 2;
pub(super) const EVENT_CONNECT_REQUEST: u32 = 4;
pub(super) const EVENT_REJECTED: u32 = 8;
pub(super) const EVENT_ESTABLISHED: u32 = 9;

#[repr(C)]
pub(super) struct EventChannel {
    pub(super) fd: c_int,
}

/// Only passed on, but for its beginning.
#[repr(C)]
pub(super) struct Id {
    /// Null until it is bound to a device.
    pub(super) context: Opaque,
    pub(super) channel: *mut EventChannel,
}

#[repr(C)]
pub(super) struct Parameters {
    pub(super) private_data: *const c_void,
    pub(super) private_data_length: u8,
    pub(super) responder_resources: u8,
    pub(super) initiator_depth: u8,
    pub(super) flow_control: u8,
    pub(super) retry_count: u8,
    pub(super) rnr_retry_count: u8,
    pub(super) srq: u8,
    pub(super) qp_number: u32,
}

#[repr(C)]
pub(super) struct Event {
    pub(super) id: *mut Id,
    pub(super) listener: *mut Id,
    pub(super) kind: u32,
    pub(super) status: c_int,
    /// For requests and established connections; of others the library leaves it zero.
    pub(super) parameters: Parameters,
    rest: [u64; 4],
}

const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(size_of::<usize>() == 8);
    assert!(offset_of!(Id, channel) == 8);
    assert!(size_of::<Parameters>() == 24 && offset_of!(Parameters, private_data_length) == 8);
    assert!(offset_of!(Parameters, initiator_depth) == 10 && offset_of!(Parameters, srq) == 14);
    assert!(offset_of!(Parameters, qp_number) == 16);
    assert!(size_of::<Event>() == 80 && offset_of!(Event, kind) == 16);
    assert!(offset_of!(Event, status) == 20 && offset_of!(Event, parameters) == 24);
};

macro_rules! library {
    ($($name:ident: $signature:ty),* $(,)?) => {
        /// The library's functions.
        pub(super) struct Library {
            $(pub(super) $name: $signature,)*
        }

        impl Library {
            fn open() -> Result<Library, String> {
                let handle = loader::open(FILE, "install librdmacm1")?;
                Ok(Library {
                    $($name: {
                        let symbol = loader::symbol(handle, FILE, concat!("rdma_", stringify!($name)))?;
                        // SAFETY: the library documents this function under this name with this signature, and its
                        // ABI version is part of the file name that was opened.
                        unsafe { std::mem::transmute::<Opaque, $signature>(symbol) }
                    },)*
                })
            }
        }
    };
}

library! {
    create_event_channel: unsafe extern "C" fn() -> *mut EventChannel,
    destroy_event_channel: unsafe extern "C" fn(*mut EventChannel),
    create_id: unsafe extern "C" fn(*mut EventChannel, *mut *mut Id, Opaque, c_int) -> c_int,
    destroy_id: unsafe extern "C" fn(*mut Id) -> c_int,
    bind_addr: unsafe extern "C" fn(*mut Id, *mut libc::sockaddr) -> c_int,
    listen: unsafe extern "C" fn(*mut Id, c_int) -> c_int,
    get_src_port: unsafe extern "C" fn(*mut Id) -> u16,
    resolve_addr: unsafe extern "C" fn(*mut Id, *mut libc::sockaddr, *mut libc::sockaddr, c_int) -> c_int,
    resolve_route: unsafe extern "C" fn(*mut Id, c_int) -> c_int,
    connect: unsafe extern "C" fn(*mut Id, *mut Parameters) -> c_int,
    accept: unsafe extern "C" fn(*mut Id, *mut Parameters) -> c_int,
    reject: unsafe extern "C" fn(*mut Id, *const c_void, u8) -> c_int,
    get_cm_event: unsafe extern "C" fn(*mut EventChannel, *mut *mut Event) -> c_int,
    ack_cm_event: unsafe extern "C" fn(*mut Event) -> c_int,
}

/// The library, opened once. It stays open.
pub(super) fn library() -> Result<&'static Library, String> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    LIBRARY.get_or_init(Library::open).as_ref().map_err(Clone::clone)
}
