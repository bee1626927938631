//! The part of libibverbs that is used, opened at run time: a table of functions and the layouts that they read.
//!
//! `post_send`, `poll_cq` and `req_notify_cq` are no symbols of the library: each device brings its own, in the table
//! within its context (`verbs.h` calls them through inline functions). The layouts are the library's ABI 1.1, on 64-bit
//! machines; each is asserted below.

use std::ffi::{CStr, c_char, c_int};
use std::sync::OnceLock;

use super::loader;
pub(super) use super::loader::Opaque;

const FILE: &CStr = c"libibverbs.so.1";

#[repr(C)]
pub(super) struct Operations {
    before: [Opaque; 11],
    pub(super) poll_cq: unsafe extern "C" fn(*mut Cq, c_int, *mut WorkCompletion) -> c_int,
    pub(super) req_notify_cq: unsafe extern "C" fn(*mut Cq, c_int) -> c_int,
    between: [Opaque; 12],
    pub(super) post_send: unsafe extern "C" fn(*mut Qp, *mut SendRequest, *mut *mut SendRequest) -> c_int,
    pub(super) post_recv: unsafe extern "C" fn(*mut Qp, *mut ReceiveRequest, *mut *mut ReceiveRequest) -> c_int,
    after: [Opaque; 5],
}

#[repr(C)]
pub(super) struct Context {
    device: Opaque,
    pub(super) operations: Operations,
    command_fd: c_int,
    pub(super) async_fd: c_int,
    completion_vectors: c_int,
    mutex: [u64; 5],
    /// All ones where an [`Extended`] lies around it.
    pub(super) abi: usize,
}

/// A device may have none.
pub(super) type QueryDevice =
    Option<unsafe extern "C" fn(*mut Context, *const u32, *mut ExtendedAttributes, usize) -> c_int>;

/// What lies around a context of any library since 2014: `verbs_context`.
#[repr(C)]
pub(super) struct Extended {
    before: [Opaque; 27],
    pub(super) query_device_ex: QueryDevice,
    between: [Opaque; 11],
    /// Bytes of all this; what an older library lacks is at the beginning.
    pub(super) size: usize,
    pub(super) context: Context,
}

/// `ibv_device_attr_ex`, as far as on-demand paging.
#[repr(C, align(8))]
pub(super) struct ExtendedAttributes(pub(super) [u8; EXTENDED_BYTES]);

pub(super) const EXTENDED_BYTES: usize = 400;
const ODP_SUPPORTED: u64 = 1;
/// Writes and reads.
const ODP_ONE_SIDED: u32 = 4 | 8;

impl ExtendedAttributes {
    /// Whether reliable connections read and write memory that is paged in on demand.
    pub(super) fn pages_on_demand(&self) -> bool {
        let general = u64::from_ne_bytes(self.0[240..248].try_into().expect("8 bytes"));
        let reliable = u32::from_ne_bytes(self.0[248..252].try_into().expect("4 bytes"));
        general & ODP_SUPPORTED != 0 && reliable & ODP_ONE_SIDED == ODP_ONE_SIDED
    }
}

#[repr(C)]
pub(super) struct Pd {
    context: *mut Context,
    handle: u32,
}

#[repr(C)]
pub(super) struct Mr {
    context: *mut Context,
    pd: *mut Pd,
    address: Opaque,
    length: usize,
    handle: u32,
    pub(super) local_key: u32,
    pub(super) remote_key: u32,
}

#[repr(C)]
pub(super) struct Cq {
    pub(super) context: *mut Context,
}

#[repr(C)]
pub(super) struct Channel {
    context: *mut Context,
    pub(super) fd: c_int,
}

#[repr(C)]
pub(super) struct Qp {
    pub(super) context: *mut Context,
    qp_context: Opaque,
    pd: *mut Pd,
    send_cq: *mut Cq,
    receive_cq: *mut Cq,
    srq: Opaque,
    handle: u32,
    pub(super) number: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Capacity {
    pub(super) max_send_wr: u32,
    pub(super) max_recv_wr: u32,
    pub(super) max_send_sge: u32,
    pub(super) max_recv_sge: u32,
    pub(super) max_inline_data: u32,
}

#[repr(C)]
pub(super) struct QpInit {
    pub(super) qp_context: Opaque,
    pub(super) send_cq: *mut Cq,
    pub(super) receive_cq: *mut Cq,
    pub(super) srq: Opaque,
    pub(super) capacity: Capacity,
    pub(super) qp_type: u32,
    pub(super) signal_all: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct AddressHandle {
    /// Two words, as the library's union is aligned like one.
    pub(super) target_gid: [u64; 2],
    pub(super) flow_label: u32,
    pub(super) source_gid_index: u8,
    pub(super) hop_limit: u8,
    pub(super) traffic_class: u8,
    pub(super) target_lid: u16,
    pub(super) service_level: u8,
    pub(super) source_path_bits: u8,
    pub(super) static_rate: u8,
    pub(super) is_global: u8,
    pub(super) port: u8,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct QpAttributes {
    pub(super) state: u32,
    pub(super) current_state: u32,
    pub(super) path_mtu: u32,
    pub(super) migration: u32,
    pub(super) qkey: u32,
    pub(super) receive_psn: u32,
    pub(super) send_psn: u32,
    pub(super) target_qp: u32,
    pub(super) access: u32,
    pub(super) capacity: Capacity,
    pub(super) address: AddressHandle,
    pub(super) alternate: AddressHandle,
    pub(super) pkey_index: u16,
    pub(super) alternate_pkey_index: u16,
    pub(super) drained_notify: u8,
    pub(super) draining: u8,
    pub(super) max_read_atomic: u8,
    pub(super) max_target_read_atomic: u8,
    pub(super) min_rnr_timer: u8,
    pub(super) port: u8,
    pub(super) timeout: u8,
    pub(super) retry_count: u8,
    pub(super) rnr_retry: u8,
    pub(super) alternate_port: u8,
    pub(super) alternate_timeout: u8,
    pub(super) rate_limit: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct ScatterEntry {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) local_key: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SendRequest {
    pub(super) id: u64,
    pub(super) next: *mut SendRequest,
    pub(super) entries: *mut ScatterEntry,
    pub(super) entry_count: c_int,
    pub(super) opcode: u32,
    pub(super) flags: u32,
    pub(super) immediate: u32,
    pub(super) remote_address: u64,
    pub(super) remote_key: u32,
    pub(super) rest: [u32; 19],
}

impl SendRequest {
    pub(super) fn empty() -> SendRequest {
        SendRequest {
            id: 0,
            next: std::ptr::null_mut(),
            entries: std::ptr::null_mut(),
            entry_count: 0,
            opcode: 0,
            flags: 0,
            immediate: 0,
            remote_address: 0,
            remote_key: 0,
            rest: [0; 19],
        }
    }
}

#[repr(C)]
pub(super) struct ReceiveRequest {
    pub(super) id: u64,
    pub(super) next: *mut ReceiveRequest,
    pub(super) entries: *mut ScatterEntry,
    pub(super) entry_count: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct WorkCompletion {
    pub(super) id: u64,
    pub(super) status: u32,
    pub(super) opcode: u32,
    pub(super) vendor_error: u32,
    bytes: u32,
    /// In network order.
    pub(super) immediate: u32,
    pub(super) qp_number: u32,
    source_qp: u32,
    pub(super) flags: u32,
    pkey_index: u16,
    source_lid: u16,
    service_level: u8,
    path_bits: u8,
}

/// `ibv_query_port` fills the first 48 bytes or so, whatever the library's age; the rest is room.
#[repr(C, align(8))]
pub(super) struct PortAttributes(pub(super) [u8; 128]);

impl PortAttributes {
    fn word(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.0[at..at + 4].try_into().expect("4 bytes"))
    }
    pub(super) fn state(&self) -> u32 {
        self.word(0)
    }
    pub(super) fn active_mtu(&self) -> u32 {
        self.word(8)
    }
    pub(super) fn gid_count(&self) -> u32 {
        self.word(12)
    }
    pub(super) fn lid(&self) -> u16 {
        u16::from_ne_bytes([self.0[34], self.0[35]])
    }
    pub(super) fn link_layer(&self) -> u8 {
        self.0[46]
    }
}

/// `ibv_query_device` fills 232 bytes.
#[repr(C, align(8))]
pub(super) struct DeviceAttributes(pub(super) [u8; 512]);

impl DeviceAttributes {
    fn word(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.0[at..at + 4].try_into().expect("4 bytes"))
    }
    pub(super) fn max_qp_wr(&self) -> u32 {
        self.word(112)
    }
    pub(super) fn max_cqe(&self) -> u32 {
        self.word(132)
    }
    pub(super) fn max_qp_rd_atom(&self) -> u32 {
        self.word(144)
    }
    pub(super) fn max_qp_init_rd_atom(&self) -> u32 {
        self.word(156)
    }
}

const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(size_of::<usize>() == 8);
    assert!(offset_of!(Context, operations) == 8 && size_of::<Operations>() == 256);
    assert!(offset_of!(Context, operations) + offset_of!(Operations, poll_cq) == 96);
    assert!(offset_of!(Context, operations) + offset_of!(Operations, req_notify_cq) == 104);
    assert!(offset_of!(Context, operations) + offset_of!(Operations, post_send) == 208);
    assert!(offset_of!(Context, operations) + offset_of!(Operations, post_recv) == 216);
    assert!(offset_of!(Context, command_fd) == 264 && offset_of!(Context, async_fd) == 268);
    assert!(size_of::<Context>() == 328 && offset_of!(Context, abi) == 320);
    assert!(size_of::<Extended>() == 648 && offset_of!(Extended, query_device_ex) == 216);
    assert!(offset_of!(Extended, size) == 312 && offset_of!(Extended, context) == 320);
    assert!(offset_of!(Mr, local_key) == 36 && offset_of!(Mr, remote_key) == 40);
    assert!(offset_of!(Qp, number) == 52 && offset_of!(Channel, fd) == 8);
    assert!(size_of::<QpInit>() == 64 && size_of::<AddressHandle>() == 32);
    assert!(size_of::<QpAttributes>() == 144 && offset_of!(QpAttributes, access) == 32);
    assert!(offset_of!(QpAttributes, address) == 56 && offset_of!(QpAttributes, pkey_index) == 120);
    assert!(offset_of!(QpAttributes, port) == 129 && offset_of!(QpAttributes, timeout) == 130);
    assert!(offset_of!(QpAttributes, rate_limit) == 136);
    assert!(size_of::<ScatterEntry>() == 16);
    assert!(size_of::<SendRequest>() == 128 && offset_of!(SendRequest, opcode) == 28);
    assert!(offset_of!(SendRequest, remote_address) == 40 && offset_of!(SendRequest, remote_key) == 48);
    assert!(size_of::<ReceiveRequest>() == 32 && offset_of!(ReceiveRequest, entry_count) == 24);
    assert!(size_of::<WorkCompletion>() == 48 && offset_of!(WorkCompletion, status) == 8);
    assert!(offset_of!(WorkCompletion, opcode) == 12 && offset_of!(WorkCompletion, immediate) == 24);
    assert!(offset_of!(WorkCompletion, flags) == 36);
    assert!(offset_of!(WorkCompletion, qp_number) == 28);
};

/// `ibv_reg_dmabuf_mr`: of rdma-core 34 and later.
type RegisterDmaBuf = unsafe extern "C" fn(*mut Pd, u64, usize, u64, c_int, c_int) -> *mut Mr;

macro_rules! library {
    ($($(#[$words:meta])* $name:ident: $signature:ty),* $(,)?) => {
        /// The library's functions.
        pub(super) struct Library {
            $($(#[$words])* pub(super) $name: $signature,)*
            /// Where the library has it.
            pub(super) reg_dmabuf_mr: Option<RegisterDmaBuf>,
        }

        impl Library {
            fn open() -> Result<Library, String> {
                let handle = loader::open(FILE, "install libibverbs1 and the provider of the NIC")?;
                Ok(Library {
                    $($name: {
                        let symbol = loader::symbol(handle, FILE, concat!("ibv_", stringify!($name)))?;
                        // SAFETY: the library documents this function under this name with this signature, and its
                        // ABI version is part of the file name that was opened.
                        unsafe { std::mem::transmute::<Opaque, $signature>(symbol) }
                    },)*
                    reg_dmabuf_mr: loader::symbol(handle, FILE, "ibv_reg_dmabuf_mr").ok().map(|symbol| {
                        // SAFETY: the library documents this function with this signature.
                        unsafe { std::mem::transmute::<Opaque, RegisterDmaBuf>(symbol) }
                    }),
                })
            }
        }
    };
}

library! {
    get_device_list: unsafe extern "C" fn(*mut c_int) -> *mut Opaque,
    free_device_list: unsafe extern "C" fn(*mut Opaque),
    get_device_name: unsafe extern "C" fn(Opaque) -> *const c_char,
    open_device: unsafe extern "C" fn(Opaque) -> *mut Context,
    close_device: unsafe extern "C" fn(*mut Context) -> c_int,
    query_device: unsafe extern "C" fn(*mut Context, *mut DeviceAttributes) -> c_int,
    query_port: unsafe extern "C" fn(*mut Context, u8, *mut PortAttributes) -> c_int,
    query_gid: unsafe extern "C" fn(*mut Context, u8, c_int, *mut [u64; 2]) -> c_int,
    alloc_pd: unsafe extern "C" fn(*mut Context) -> *mut Pd,
    dealloc_pd: unsafe extern "C" fn(*mut Pd) -> c_int,
    reg_mr: unsafe extern "C" fn(*mut Pd, Opaque, usize, c_int) -> *mut Mr,
    dereg_mr: unsafe extern "C" fn(*mut Mr) -> c_int,
    create_comp_channel: unsafe extern "C" fn(*mut Context) -> *mut Channel,
    destroy_comp_channel: unsafe extern "C" fn(*mut Channel) -> c_int,
    create_cq: unsafe extern "C" fn(*mut Context, c_int, Opaque, *mut Channel, c_int) -> *mut Cq,
    destroy_cq: unsafe extern "C" fn(*mut Cq) -> c_int,
    get_cq_event: unsafe extern "C" fn(*mut Channel, *mut *mut Cq, *mut Opaque) -> c_int,
    ack_cq_events: unsafe extern "C" fn(*mut Cq, u32),
    create_qp: unsafe extern "C" fn(*mut Pd, *mut QpInit) -> *mut Qp,
    modify_qp: unsafe extern "C" fn(*mut Qp, *mut QpAttributes, c_int) -> c_int,
    destroy_qp: unsafe extern "C" fn(*mut Qp) -> c_int,
    wc_status_str: unsafe extern "C" fn(u32) -> *const c_char,
}

/// The library, opened once. It stays open: its threads and tables outlive any use of ours.
pub(super) fn library() -> Result<&'static Library, String> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    LIBRARY.get_or_init(Library::open).as_ref().map_err(Clone::clone)
}
