//! Connections that only librdmacm can make: those of iWARP, where a queue pair runs over a TCP connection of the device.
//!
//! One side listens at an address of its device and is told beforehand which queue pair each caller is for, by a token that
//! travels over the owners' authenticated channel; who calls without one is rejected. A [`Link`] is the library's side of
//! one connection; a queue pair keeps it, and lets go of it after its own end, as the library wants it.

mod ffi;

use std::collections::HashMap;
use std::ffi::c_int;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::QueuePair;
use ffi::{Event, EventChannel, Id, Library, Parameters};

/// Callers that may wait to be taken.
const BACKLOG: c_int = 128;
/// Bytes of a token on the wire.
const TOKEN_BYTES: usize = 8;

/// Where the library tells what happened to its ids.
struct Channel {
    library: &'static Library,
    raw: NonNull<EventChannel>,
}

// SAFETY: the library locks for itself; the pointer is to its own memory.
unsafe impl Send for Channel {}
// SAFETY: as for `Send`.
unsafe impl Sync for Channel {}

impl Channel {
    fn open() -> io::Result<Arc<Channel>> {
        let library = ffi::library().map_err(io::Error::other)?;
        // SAFETY: takes no argument.
        let raw = unsafe { (library.create_event_channel)() };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(Arc::new(Channel { library, raw }))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel lives as long as `self`.
        let fd = unsafe { self.raw.as_ref() }.fd;
        // SAFETY: it keeps its descriptor open as long.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// The next event, if one comes before `until`.
    fn next(&self, until: Instant) -> io::Result<Option<Happened<'_>>> {
        let fd = self.fd();
        let left = until.saturating_duration_since(Instant::now());
        let limit = Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match rustix::event::poll(&mut polled, Some(&limit)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let mut event = std::ptr::null_mut();
        // SAFETY: a live channel that has an event, and room for one pointer.
        let answer = unsafe { (self.library.get_cm_event)(self.raw.as_ptr(), &raw mut event) };
        match NonNull::new(event) {
            Some(event) if answer == 0 => Ok(Some(Happened { channel: self, event })),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: every id on it holds it, so none is left; every event was acknowledged when it was dropped.
        unsafe { (self.library.destroy_event_channel)(self.raw.as_ptr()) };
    }
}

/// An event until it is acknowledged.
struct Happened<'a> {
    channel: &'a Channel,
    event: NonNull<Event>,
}

impl Happened<'_> {
    fn event(&self) -> &Event {
        // SAFETY: the library's event, which is freed when `self` is dropped.
        unsafe { self.event.as_ref() }
    }

    /// What the caller sent along.
    fn token(&self) -> Option<u64> {
        let parameters = &self.event().parameters;
        if parameters.private_data.is_null() || usize::from(parameters.private_data_length) < TOKEN_BYTES {
            return None;
        }
        // SAFETY: the library says how many bytes there are, within the event.
        let bytes = unsafe { parameters.private_data.cast::<[u8; TOKEN_BYTES]>().read_unaligned() };
        Some(u64::from_le_bytes(bytes))
    }
}

impl Drop for Happened<'_> {
    fn drop(&mut self) {
        // SAFETY: received and acknowledged once.
        unsafe { (self.channel.library.ack_cm_event)(self.event.as_ptr()) };
    }
}

/// One connection, or the beginning of one. Whatever queue pair uses it is destroyed before it is dropped.
pub(crate) struct Link {
    channel: Arc<Channel>,
    id: NonNull<Id>,
}

// SAFETY: as for `Channel`.
unsafe impl Send for Link {}
// SAFETY: as for `Send`.
unsafe impl Sync for Link {}

impl Link {
    fn on(channel: &Arc<Channel>) -> io::Result<Link> {
        let mut id = std::ptr::null_mut();
        // SAFETY: a live channel and room for one pointer.
        let answer = unsafe {
            (channel.library.create_id)(channel.raw.as_ptr(), &raw mut id, std::ptr::null_mut(), ffi::SPACE_TCP)
        };
        match NonNull::new(id) {
            Some(id) if answer == 0 => Ok(Link {
                channel: Arc::clone(channel),
                id,
            }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn check(answer: c_int) -> io::Result<()> {
        if answer == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Whether anything happened to an established connection of its own channel: it has ended.
    pub(super) fn has_ended(&self) -> bool {
        let fd = self.channel.fd();
        let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }

    fn accept(&self, ends: &Ends) -> io::Result<()> {
        let mut parameters = ends.parameters(&[]);
        // SAFETY: a live id with a request, and parameters that the library copies.
        Link::check(unsafe { (self.channel.library.accept)(self.id.as_ptr(), &raw mut parameters) })
    }

    fn reject(&self) {
        // SAFETY: a live id with a request; no private data.
        unsafe { (self.channel.library.reject)(self.id.as_ptr(), std::ptr::null(), 0) };
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // SAFETY: destroyed once; its queue pair is gone. The library waits for events of it that are not acknowledged,
        // which whoever received them does at once.
        unsafe { (self.channel.library.destroy_id)(self.id.as_ptr()) };
    }
}

/// A queue pair and how many reads it may make and answer at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ends {
    pub(crate) number: u32,
    pub(crate) reads_out: u8,
    pub(crate) reads_in: u8,
}

impl Ends {
    fn parameters(&self, private_data: &[u8]) -> Parameters {
        Parameters {
            private_data: private_data.as_ptr().cast(),
            private_data_length: u8::try_from(private_data.len()).expect("a token"),
            responder_resources: self.reads_in,
            initiator_depth: self.reads_out,
            flow_control: 0,
            retry_count: 0,
            rnr_retry_count: 0,
            srq: 0,
            qp_number: self.number,
        }
    }
}

/// A socket address as the system wants it.
struct Address {
    bytes: libc::sockaddr_storage,
}

impl Address {
    fn new(address: SocketAddr) -> Address {
        // SAFETY: every field may be zero.
        let mut bytes: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        let start = &raw mut bytes;
        match address {
            SocketAddr::V4(v4) => {
                let raw = libc::sockaddr_in {
                    sin_family: u16::try_from(libc::AF_INET).expect("small"),
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: u32::from(*v4.ip()).to_be(),
                    },
                    sin_zero: [0; 8],
                };
                // SAFETY: the storage is made for any kind of address.
                unsafe { start.cast::<libc::sockaddr_in>().write(raw) };
            }
            SocketAddr::V6(v6) => {
                let raw = libc::sockaddr_in6 {
                    sin6_family: u16::try_from(libc::AF_INET6).expect("small"),
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr {
                        s6_addr: v6.ip().octets(),
                    },
                    sin6_scope_id: v6.scope_id(),
                };
                // SAFETY: the storage is made for any kind of address.
                unsafe { start.cast::<libc::sockaddr_in6>().write(raw) };
            }
        }
        Address { bytes }
    }

    fn pointer(&mut self) -> *mut libc::sockaddr {
        (&raw mut self.bytes).cast()
    }
}

/// A connection to be made.
pub(crate) struct Call {
    /// Address of the device that calls.
    pub(crate) from: IpAddr,
    pub(crate) to: SocketAddr,
    pub(crate) token: u64,
    pub(crate) ends: Ends,
}

impl Call {
    /// Connects the queue pair.
    ///
    /// # Errors
    /// `ConnectionRefused` when the other side rejects it, `TimedOut`, or what the system says.
    pub(crate) fn run(&self, patience: Duration) -> io::Result<Link> {
        let until = Instant::now() + patience;
        let limit = c_int::try_from(patience.as_millis()).unwrap_or(c_int::MAX);
        let channel = Channel::open()?;
        let library = channel.library;
        let link = Link::on(&channel)?;
        let id = link.id.as_ptr();
        let (mut from, mut to) = (Address::new(SocketAddr::new(self.from, 0)), Address::new(self.to));
        // SAFETY: a live id, and addresses that the library copies.
        Link::check(unsafe { (library.resolve_addr)(id, from.pointer(), to.pointer(), limit) })?;
        await_event(&channel, ffi::EVENT_ADDRESS_RESOLVED, until)?;
        // SAFETY: a live id whose address is resolved.
        Link::check(unsafe { (library.resolve_route)(id, limit) })?;
        await_event(&channel, ffi::EVENT_ROUTE_RESOLVED, until)?;
        let token = self.token.to_le_bytes();
        let mut parameters = self.ends.parameters(&token);
        // SAFETY: a live id whose route is resolved, and parameters that the library copies.
        Link::check(unsafe { (library.connect)(id, &raw mut parameters) })?;
        await_event(&channel, ffi::EVENT_ESTABLISHED, until)?;
        Ok(link)
    }
}

fn await_event(channel: &Channel, wanted: u32, until: Instant) -> io::Result<()> {
    loop {
        let Some(happened) = channel.next(until)? else {
            if Instant::now() < until {
                continue;
            }
            return Err(io::ErrorKind::TimedOut.into());
        };
        let Event { kind, status, .. } = happened.event();
        match *kind {
            kind if kind == wanted && *status == 0 => return Ok(()),
            ffi::EVENT_REJECTED => return Err(io::ErrorKind::ConnectionRefused.into()),
            _ if *status < 0 => return Err(io::Error::from_raw_os_error(-*status)),
            kind => return Err(io::Error::other(format!("librdmacm: event {kind}, status {status}"))),
        }
    }
}

/// Takes calls at an address of one device.
pub(crate) struct Listener {
    channel: Arc<Channel>,
    link: Link,
    expected: Mutex<HashMap<u64, Expected>>,
}

struct Expected {
    pair: Weak<QueuePair>,
    ends: Ends,
}

impl Listener {
    /// At a port that the system chooses.
    ///
    /// # Errors
    /// In words.
    pub(crate) fn bind(address: IpAddr) -> Result<Listener, String> {
        ffi::library()?;
        let listening = || -> io::Result<(Arc<Channel>, Link)> {
            let channel = Channel::open()?;
            let link = Link::on(&channel)?;
            let mut bound = Address::new(SocketAddr::new(address, 0));
            // SAFETY: a live id, and an address that the library copies.
            Link::check(unsafe { (channel.library.bind_addr)(link.id.as_ptr(), bound.pointer()) })?;
            // SAFETY: a live id that is bound.
            Link::check(unsafe { (channel.library.listen)(link.id.as_ptr(), BACKLOG) })?;
            Ok((channel, link))
        };
        let (channel, link) = listening().map_err(|error| format!("cannot listen at {address}: {error}"))?;
        Ok(Listener {
            channel,
            link,
            expected: Mutex::default(),
        })
    }

    pub(crate) fn port(&self) -> u16 {
        // SAFETY: a live id that is bound.
        u16::from_be(unsafe { (self.channel.library.get_src_port)(self.link.id.as_ptr()) })
    }

    /// Whoever calls with `token` gets this queue pair, once.
    pub(crate) fn expect(&self, token: u64, pair: &Arc<QueuePair>, ends: Ends) {
        let mut expected = self.expected.lock();
        // Those that nobody called for before they were dropped.
        expected.retain(|_, expected| expected.pair.strong_count() > 0);
        expected.insert(
            token,
            Expected {
                pair: Arc::downgrade(pair),
                ends,
            },
        );
    }

    /// Takes what happens within `patience`.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn serve(&self, patience: Duration) -> io::Result<()> {
        let Some(happened) = self.channel.next(Instant::now() + patience)? else {
            return Ok(());
        };
        // An accepted connection that ends is seen by its queue pair.
        if happened.event().kind != ffi::EVENT_CONNECT_REQUEST {
            return Ok(());
        }
        let token = happened.token();
        let Some(id) = NonNull::new(happened.event().id) else {
            return Ok(());
        };
        let link = Link {
            channel: Arc::clone(&self.channel),
            id,
        };
        drop(happened);
        let expected = token.and_then(|token| self.expected.lock().remove(&token));
        let wanted = expected.and_then(|expected| Some((expected.pair.upgrade()?, expected.ends)));
        match wanted {
            // The caller sees a connection that could not be accepted as one that was rejected.
            Some((pair, ends)) if link.accept(&ends).is_ok() => pair.keep(link),
            _ => link.reject(),
        }
        Ok(())
    }
}
