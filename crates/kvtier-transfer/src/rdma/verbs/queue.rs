//! Queue pairs that own the memory of what they were given until it is complete or they are gone, and completion queues.

use std::collections::VecDeque;
use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::device::{Device, Registered};
use super::ffi::{
    self, AddressHandle, Capacity, Channel, Cq, Qp, QpAttributes, QpInit, ReceiveRequest, ScatterEntry, SendRequest,
    WorkCompletion,
};
use super::manager::Link;
use crate::gpu::Place;
use crate::memory::{MemoryRegion, MemorySlice};
use crate::remote::RemoteAccess;
use crate::transfer::Direction;

const STATE_INIT: u32 = 1;
const STATE_READY_TO_RECEIVE: u32 = 2;
const STATE_READY_TO_SEND: u32 = 3;
const STATE_ERROR: u32 = 6;
const TYPE_RELIABLE_CONNECTION: u32 = 2;
const ACCESS_REMOTE: u32 = 2 | 4;
const OPCODE_WRITE: u32 = 0;
#[cfg(test)]
const OPCODE_SEND: u32 = 2;
const OPCODE_SEND_WITH_IMMEDIATE: u32 = 3;
const OPCODE_READ: u32 = 4;
/// Of completions: a receive.
const COMPLETED_RECEIVE: u32 = 1 << 7;
const COMPLETED_WITH_IMMEDIATE: u32 = 1 << 1;
const FLAG_SIGNALLED: u32 = 2;
const FLAG_INLINE: u32 = 8;

const MASK_STATE: c_int = 1;
const MASK_ACCESS: c_int = 1 << 3;
const MASK_PKEY: c_int = 1 << 4;
const MASK_PORT: c_int = 1 << 5;
const MASK_ADDRESS: c_int = 1 << 7;
const MASK_PATH_MTU: c_int = 1 << 8;
const MASK_TIMEOUT: c_int = 1 << 9;
const MASK_RETRY: c_int = 1 << 10;
const MASK_RNR_RETRY: c_int = 1 << 11;
const MASK_RECEIVE_PSN: c_int = 1 << 12;
const MASK_MAX_READ: c_int = 1 << 13;
const MASK_MIN_RNR: c_int = 1 << 15;
const MASK_SEND_PSN: c_int = 1 << 16;
const MASK_MAX_TARGET_READ: c_int = 1 << 17;
const MASK_TARGET_QP: c_int = 1 << 20;

/// Bytes of a write that travel within the request itself.
pub(crate) const INLINE_BYTES: u32 = 64;

/// How a work request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Done,
    /// Never begun, or stopped, because an earlier one failed or the queue pair was stopped.
    Flushed,
    /// This node's memory or request: its key, its length, its rights.
    Local(u32),
    /// The peer's memory: a key that it does not know or that does not allow this.
    RemoteAccess(u32),
    /// Nobody answered.
    Unanswered(u32),
    /// The device or something unexpected.
    Device(u32),
}

impl Status {
    fn of(code: u32) -> Status {
        match code {
            0 => Status::Done,
            5 => Status::Flushed,
            1 | 2 | 4 | 6 => Status::Local(code),
            9 | 10 => Status::RemoteAccess(code),
            12 | 13 => Status::Unanswered(code),
            _ => Status::Device(code),
        }
    }

    /// In the library's words.
    pub(crate) fn words(self) -> String {
        let code = match self {
            Status::Done => 0,
            Status::Flushed => 5,
            Status::Local(code) | Status::RemoteAccess(code) | Status::Unanswered(code) | Status::Device(code) => code,
        };
        let Ok(library) = ffi::library() else {
            return format!("status {code}");
        };
        // SAFETY: any number may be asked for.
        let words = unsafe { (library.wc_status_str)(code) };
        // SAFETY: a constant string of the library.
        let words = unsafe { CStr::from_ptr(words) }.to_string_lossy();
        format!("{words} ({code})")
    }
}

/// One work request's end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    pub(crate) id: u64,
    pub(crate) status: Status,
    /// Immediate data that was received.
    pub(crate) note: Option<u32>,
}

impl Completion {
    fn of(raw: &WorkCompletion) -> Completion {
        let status = Status::of(raw.status);
        let has_note = raw.opcode & COMPLETED_RECEIVE != 0 && raw.flags & COMPLETED_WITH_IMMEDIATE != 0;
        Completion {
            id: raw.id,
            status,
            // Of one that failed only the id and the status mean anything.
            note: (status == Status::Done && has_note).then(|| u32::from_be(raw.immediate)),
        }
    }
}

/// Where completions of many queue pairs of one device arrive.
pub(crate) struct CompletionQueue {
    device: Arc<Device>,
    channel: NonNull<Channel>,
    cq: NonNull<Cq>,
    pub(crate) depth: u32,
    unacknowledged: Mutex<u32>,
}

// SAFETY: the library's objects may be used from any thread, it locks for itself.
unsafe impl Send for CompletionQueue {}
// SAFETY: as for `Send`.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    pub(crate) fn new(device: &Arc<Device>, depth: u32) -> io::Result<Arc<CompletionQueue>> {
        let library = device.library;
        // SAFETY: an open context.
        let channel = unsafe { (library.create_comp_channel)(device.context.as_ptr()) };
        let channel = NonNull::new(channel).ok_or_else(io::Error::last_os_error)?;
        let entries = c_int::try_from(depth).map_err(io::Error::other)?;
        // SAFETY: an open context and a channel of it.
        let cq = unsafe {
            (library.create_cq)(
                device.context.as_ptr(),
                entries,
                std::ptr::null_mut(),
                channel.as_ptr(),
                0,
            )
        };
        let Some(cq) = NonNull::new(cq) else {
            let error = io::Error::last_os_error();
            // SAFETY: made above, nothing uses it.
            unsafe { (library.destroy_comp_channel)(channel.as_ptr()) };
            return Err(error);
        };
        Ok(Arc::new(CompletionQueue {
            device: Arc::clone(device),
            channel,
            cq,
            depth,
            unacknowledged: Mutex::new(0),
        }))
    }

    /// Appends up to `limit` completions; the caller takes all of them: an error and what it flushed come together.
    pub(crate) fn poll(&self, limit: usize, into: &mut Vec<Completion>) -> io::Result<usize> {
        const BATCH: usize = 64;
        let mut raw = [WorkCompletion::default(); BATCH];
        let wanted = c_int::try_from(limit.min(BATCH)).unwrap_or(1);
        // SAFETY: the queue lives as long as `self`.
        let context = unsafe { self.cq.as_ref() }.context;
        // SAFETY: a completion queue points to its context, which the device keeps open.
        let poll = unsafe { (*context).operations.poll_cq };
        // SAFETY: a live queue and room for as many completions as asked for.
        let count = unsafe { poll(self.cq.as_ptr(), wanted, raw.as_mut_ptr()) };
        let count = usize::try_from(count).map_err(|_| io::Error::other("polling the completion queue failed"))?;
        into.extend(raw[..count].iter().map(Completion::of));
        Ok(count)
    }

    /// Asks for an event at the next completion. Poll once more after it, before sleeping.
    pub(crate) fn arm(&self) -> io::Result<()> {
        // SAFETY: the queue lives as long as `self`.
        let context = unsafe { self.cq.as_ref() }.context;
        // SAFETY: a completion queue points to its context, which the device keeps open.
        let notify = unsafe { (*context).operations.req_notify_cq };
        // SAFETY: a live queue.
        match unsafe { notify(self.cq.as_ptr(), 0) } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error.abs())),
        }
    }

    /// Sleeps until an event or for `patience`.
    pub(crate) fn sleep(&self, patience: Duration) -> io::Result<()> {
        // SAFETY: the channel lives as long as `self`.
        let fd = unsafe { self.channel.as_ref() }.fd;
        // SAFETY: the channel keeps its descriptor open as long as `self` lives.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: patience.as_secs().cast_signed(),
            tv_nsec: patience.subsec_nanos().into(),
        };
        match rustix::event::poll(&mut polled, Some(&limit)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let (mut cq, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: a live channel that has an event, and room for two pointers.
        let answer =
            unsafe { (self.device.library.get_cq_event)(self.channel.as_ptr(), &raw mut cq, &raw mut context) };
        if answer != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut unacknowledged = self.unacknowledged.lock();
        *unacknowledged += 1;
        // Acknowledging takes a lock of the library: many at a time.
        if *unacknowledged >= 128 {
            // SAFETY: as many events as were received.
            unsafe { (self.device.library.ack_cq_events)(self.cq.as_ptr(), *unacknowledged) };
            *unacknowledged = 0;
        }
        Ok(())
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        let library = self.device.library;
        let unacknowledged = *self.unacknowledged.lock();
        if unacknowledged > 0 {
            // SAFETY: as many events as were received; without this the next call would wait for ever.
            unsafe { (library.ack_cq_events)(self.cq.as_ptr(), unacknowledged) };
        }
        // SAFETY: every queue pair that uses it holds it, so none is left.
        unsafe { (library.destroy_cq)(self.cq.as_ptr()) };
        // SAFETY: its only queue is gone.
        unsafe { (library.destroy_comp_channel)(self.channel.as_ptr()) };
    }
}

/// Where a queue pair is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Destination {
    pub(crate) number: u32,
    pub(crate) psn: u32,
    pub(crate) gid: [u8; 16],
    pub(crate) lid: u16,
}

/// How a queue pair is connected.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    pub(crate) port: u8,
    pub(crate) gid_index: u8,
    pub(crate) is_infiniband: bool,
    pub(crate) mtu: u32,
    pub(crate) reads_out: u8,
    pub(crate) reads_in: u8,
    /// 4.096 µs times two to this power, before an unanswered packet is sent again.
    pub(crate) timeout: u8,
    pub(crate) retries: u8,
    /// How often a message is sent again that the peer has no receive for; 7: until it has.
    pub(crate) receiver_retries: u8,
}

/// One copy for a queue pair to make.
pub(crate) struct Work {
    pub(crate) id: u64,
    pub(crate) local: Place,
    pub(crate) registered: Arc<Registered>,
    pub(crate) remote_address: u64,
    pub(crate) remote_key: u32,
    pub(crate) direction: Direction,
    pub(crate) signalled: bool,
}

/// A reliable connection.
pub(crate) struct QueuePair {
    device: Arc<Device>,
    // Destroyed after the queue pair, as fields are dropped after `drop`.
    _completions: Arc<CompletionQueue>,
    qp: NonNull<Qp>,
    /// What librdmacm knows of it, on iWARP: let go of after the queue pair.
    link: Mutex<Option<Link>>,
    /// On iWARP: where the byte goes that is read behind a write.
    scratch: Option<(MemorySlice, Registered)>,
    /// In the order of posting, which is the order of completion but on iWARP.
    held: Mutex<VecDeque<(u64, Place, Arc<Registered>)>>,
}

// SAFETY: the library's objects may be used from any thread, it locks for itself.
unsafe impl Send for QueuePair {}
// SAFETY: as for `Send`.
unsafe impl Sync for QueuePair {}

impl QueuePair {
    /// # Errors
    /// What the device says.
    pub(crate) fn new(
        device: &Arc<Device>,
        completions: &Arc<CompletionQueue>,
        depth: u32,
        receives: u32,
        port: u8,
    ) -> io::Result<QueuePair> {
        let mut init = QpInit {
            qp_context: std::ptr::null_mut(),
            send_cq: completions.cq.as_ptr(),
            receive_cq: completions.cq.as_ptr(),
            srq: std::ptr::null_mut(),
            capacity: Capacity {
                // A write on iWARP is followed by a read.
                max_send_wr: if device.is_iwarp { 2 * depth } else { depth },
                max_recv_wr: receives.max(1),
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: INLINE_BYTES,
            },
            qp_type: TYPE_RELIABLE_CONNECTION,
            signal_all: 0,
        };
        let scratch = match device.is_iwarp {
            true => Some(scratch_on(device)?),
            false => None,
        };
        // SAFETY: a protection domain and a completion queue of the same device; the library only reads and updates
        // the attributes.
        let qp = unsafe { (device.library.create_qp)(device.pd.as_ptr(), &raw mut init) };
        let qp = NonNull::new(qp).ok_or_else(io::Error::last_os_error)?;
        let pair = QueuePair {
            device: Arc::clone(device),
            _completions: Arc::clone(completions),
            qp,
            link: Mutex::default(),
            scratch,
            held: Mutex::default(),
        };
        let mut attributes = QpAttributes {
            state: STATE_INIT,
            port,
            access: ACCESS_REMOTE,
            ..QpAttributes::default()
        };
        pair.modify(&mut attributes, MASK_STATE | MASK_PKEY | MASK_PORT | MASK_ACCESS)?;
        Ok(pair)
    }

    /// Its number on the wire.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: the queue pair lives as long as `self`.
        unsafe { self.qp.as_ref() }.number
    }

    /// Connects it: from here on the peer can reach this node's registered memory through it, and requests may be posted.
    pub(crate) fn connect(&self, path: &Path, psn: u32, peer: &Destination) -> io::Result<()> {
        let half = |at: usize| u64::from_ne_bytes(peer.gid[at..at + 8].try_into().expect("8 bytes"));
        let address = AddressHandle {
            target_gid: [half(0), half(8)],
            source_gid_index: path.gid_index,
            hop_limit: 64,
            is_global: u8::from(!path.is_infiniband),
            target_lid: peer.lid,
            port: path.port,
            ..AddressHandle::default()
        };
        let mut attributes = QpAttributes {
            state: STATE_READY_TO_RECEIVE,
            path_mtu: path.mtu,
            target_qp: peer.number,
            receive_psn: peer.psn,
            max_target_read_atomic: path.reads_in,
            min_rnr_timer: 12,
            address,
            ..QpAttributes::default()
        };
        let mask =
            MASK_ADDRESS | MASK_PATH_MTU | MASK_TARGET_QP | MASK_RECEIVE_PSN | MASK_MAX_TARGET_READ | MASK_MIN_RNR;
        self.modify(&mut attributes, MASK_STATE | mask)?;
        attributes.state = STATE_READY_TO_SEND;
        attributes.send_psn = psn;
        attributes.timeout = path.timeout;
        attributes.retry_count = path.retries;
        attributes.rnr_retry = path.receiver_retries;
        attributes.max_read_atomic = path.reads_out;
        let mask = MASK_TIMEOUT | MASK_RETRY | MASK_RNR_RETRY | MASK_SEND_PSN | MASK_MAX_READ;
        self.modify(&mut attributes, MASK_STATE | mask)
    }

    /// Whether a completion tells that everything before it is complete, too.
    pub(crate) fn is_ordered(&self) -> bool {
        !self.device.is_iwarp
    }

    /// It was connected through librdmacm.
    pub(crate) fn keep(&self, link: Link) {
        *self.link.lock() = Some(link);
    }

    /// Whether the connection that it called for is over, which an idle queue pair does not tell by a completion.
    pub(crate) fn has_ended(&self) -> bool {
        self.link.lock().as_ref().is_some_and(Link::has_ended)
    }

    /// Stops it: whatever it was given completes as flushed.
    pub(crate) fn stop(&self) -> io::Result<()> {
        let mut attributes = QpAttributes {
            state: STATE_ERROR,
            ..QpAttributes::default()
        };
        self.modify(&mut attributes, MASK_STATE)
    }

    fn modify(&self, attributes: &mut QpAttributes, mask: c_int) -> io::Result<()> {
        // SAFETY: a live queue pair; the library reads the attributes that the mask names.
        match unsafe { (self.device.library.modify_qp)(self.qp.as_ptr(), attributes, mask) } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error.abs())),
        }
    }

    /// Posts all of `works` in one call. From here on their memory is owned here until [`QueuePair::complete`] or drop.
    /// On an error nothing that was posted is lost: `posted` of them complete as any other.
    pub(crate) fn post(&self, works: &[Work]) -> Result<(), PostError> {
        let mut entries: Vec<ScatterEntry> = Vec::with_capacity(2 * works.len());
        let mut requests: Vec<SendRequest> = Vec::with_capacity(2 * works.len());
        for work in works {
            entries.push(entry_of(work));
            let mut request = request_of(work);
            if let (Some((scratch, registered)), Direction::Write) = (&self.scratch, work.direction) {
                // There a write completes when it is sent: only an answer to what comes after it shows that it was not
                // refused, and has arrived.
                request.flags &= !FLAG_SIGNALLED;
                requests.push(request);
                entries.push(ScatterEntry {
                    address: scratch.as_ptr() as u64,
                    length: 1,
                    local_key: registered.local_key,
                });
                request.opcode = OPCODE_READ;
                request.flags = FLAG_SIGNALLED;
            }
            requests.push(request);
        }
        self.link_and_post(works, &mut entries, &mut requests)
    }

    fn link_and_post(
        &self,
        works: &[Work],
        entries: &mut [ScatterEntry],
        requests: &mut [SendRequest],
    ) -> Result<(), PostError> {
        let (first, count) = (requests.as_mut_ptr(), requests.len());
        for (at, request) in requests.iter_mut().enumerate() {
            request.entries = &raw mut entries[at];
            request.entry_count = 1;
            if at + 1 < count {
                request.next = first.wrapping_add(at + 1);
            }
        }
        let mut held = self.held.lock();
        held.extend(
            works
                .iter()
                .map(|work| (work.id, work.local.clone(), Arc::clone(&work.registered))),
        );
        let mut refused = std::ptr::null_mut();
        // SAFETY: the queue pair lives as long as `self`.
        let context = unsafe { self.qp.as_ref() }.context;
        // SAFETY: a queue pair points to its context, which the device keeps open.
        let post = unsafe { (*context).operations.post_send };
        // SAFETY: a live queue pair and a list of requests that ends in null, all of which the library copies before it
        // returns. The memory that they name is held above until each is complete or the queue pair is destroyed.
        let answer = unsafe { post(self.qp.as_ptr(), first, &raw mut refused) };
        if answer == 0 {
            return Ok(());
        }
        let taken = (0..count)
            .find(|at| std::ptr::eq(first.wrapping_add(*at), refused))
            .unwrap_or(count);
        // One of which a part was taken counts: its memory is the device's.
        let posted = works
            .iter()
            .take_while(|work| requests[..taken].iter().any(|request| request.id == work.id))
            .count();
        // What was not posted is not the device's.
        let keep = held.len() - (works.len() - posted);
        held.truncate(keep);
        Err(PostError {
            posted,
            source: io::Error::from_raw_os_error(answer.abs()),
        })
    }

    /// A completion of `id` has come: that one, and all before it where there is an order, are the device's no more.
    pub(crate) fn complete(&self, id: u64) {
        let done: Vec<_> = {
            let mut held = self.held.lock();
            let Some(at) = held.iter().position(|(other, ..)| *other == id) else {
                return;
            };
            let first = if self.is_ordered() { 0 } else { at };
            held.drain(first..=at).collect()
        };
        // A region may be unmapped by this: not under the lock.
        drop(done);
    }

    /// Tells the peer a number, in a message without bytes.
    pub(crate) fn post_note(&self, id: u64, note: u32) -> io::Result<()> {
        let mut request = SendRequest {
            id,
            opcode: OPCODE_SEND_WITH_IMMEDIATE,
            flags: FLAG_SIGNALLED,
            immediate: note.to_be(),
            ..SendRequest::empty()
        };
        let mut refused = std::ptr::null_mut();
        // SAFETY: the queue pair lives as long as `self`.
        let context = unsafe { self.qp.as_ref() }.context;
        // SAFETY: a queue pair points to its context, which the device keeps open.
        let post = unsafe { (*context).operations.post_send };
        // SAFETY: a live queue pair and one request that names no memory, which the library copies before it returns.
        match unsafe { post(self.qp.as_ptr(), &raw mut request, &raw mut refused) } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error.abs())),
        }
    }

    /// Room for one message without bytes.
    pub(crate) fn post_receive(&self, id: u64) -> io::Result<()> {
        let mut request = ReceiveRequest {
            id,
            next: std::ptr::null_mut(),
            entries: std::ptr::null_mut(),
            entry_count: 0,
        };
        let mut refused = std::ptr::null_mut();
        // SAFETY: the queue pair lives as long as `self`.
        let context = unsafe { self.qp.as_ref() }.context;
        // SAFETY: a queue pair points to its context, which the device keeps open.
        let post = unsafe { (*context).operations.post_recv };
        // SAFETY: a live queue pair and one request that names no memory, which the library copies before it returns.
        match unsafe { post(self.qp.as_ptr(), &raw mut request, &raw mut refused) } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error.abs())),
        }
    }

    /// A message that the peer must have room for, which nobody here ever has: a peer that is not ready.
    #[cfg(test)]
    pub(crate) fn post_send_message(&self, work: &Work) -> Result<(), PostError> {
        let mut request = request_of(work);
        request.opcode = OPCODE_SEND;
        let mut entry = entry_of(work);
        self.link_and_post(
            std::slice::from_ref(work),
            std::slice::from_mut(&mut entry),
            std::slice::from_mut(&mut request),
        )
    }
}

fn scratch_on(device: &Arc<Device>) -> io::Result<(MemorySlice, Registered)> {
    let region = MemoryRegion::anonymous(4096).map_err(io::Error::other)?;
    let slice = region.slice(0, 1).map_err(io::Error::other)?;
    Ok((slice, Registered::new(device, &region, RemoteAccess::Read)?))
}

fn entry_of(work: &Work) -> ScatterEntry {
    ScatterEntry {
        address: work.local.address(),
        length: u32::try_from(work.local.len()).expect("slices are short"),
        local_key: work.registered.local_key,
    }
}

fn request_of(work: &Work) -> SendRequest {
    // What goes inline is read by the processor.
    let is_small_write = work.direction == Direction::Write
        && matches!(work.local, Place::Host(_))
        && u32::try_from(work.local.len()).is_ok_and(|length| length <= INLINE_BYTES);
    SendRequest {
        id: work.id,
        opcode: match work.direction {
            Direction::Read => OPCODE_READ,
            Direction::Write => OPCODE_WRITE,
        },
        flags: if work.signalled { FLAG_SIGNALLED } else { 0 } | if is_small_write { FLAG_INLINE } else { 0 },
        remote_address: work.remote_address,
        remote_key: work.remote_key,
        ..SendRequest::empty()
    }
}

/// Requests that the device did not take.
#[derive(Debug)]
pub(crate) struct PostError {
    /// How many it did take.
    pub(crate) posted: usize,
    pub(crate) source: io::Error,
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: destroyed once; afterwards the device touches nothing that was posted here, so that `held`, dropped after
        // this, may go.
        let answer = unsafe { (self.device.library.destroy_qp)(self.qp.as_ptr()) };
        if answer != 0 {
            // The device may still write: never unmap it.
            let held = std::mem::take(&mut *self.held.lock());
            let _kept = std::mem::ManuallyDrop::new(held);
        }
    }
}
