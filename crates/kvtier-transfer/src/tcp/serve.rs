//! The side that owns regions: a thread a connection, which answers requests from the registry.

use std::collections::HashMap;
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::channel::Channel;
use super::greet::{introduce_listener, within};
use super::wire::{ANSWER_BYTES, Answer, REQUEST_BYTES, Request, Secret};
use super::{NotGreeted, TcpSettings, Tls};
use crate::registry::{Registry, Use};
use crate::socket::{PARTS_MAX, Part, WhenFull};
use crate::transfer::Direction;

/// How long a stranger may take to introduce itself.
const GREETING_PATIENCE: Duration = Duration::from_secs(2);
/// Requests taken in one go. Small: the bytes of a write that come along are copied once more.
const BUFFER_BYTES: usize = 64 * REQUEST_BYTES;
/// Answers sent in one go: a head and a body each, and no further ones once there are so many bytes. A call with tens of
/// megabytes was a quarter slower than several with a few.
const ANSWERS_MAX: usize = PARTS_MAX / 2;
const ANSWER_BYTES_MAX: usize = 256 << 10;

/// The accepting thread and its connections.
pub(super) struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    registry: Arc<Registry>,
    secret: Option<Secret>,
    tls: Option<Tls>,
    zerocopy_bytes: usize,
    connections_max: usize,
    closed: AtomicBool,
    connections: Mutex<Connections>,
}

#[derive(Default)]
struct Connections {
    living: HashMap<u64, Arc<TcpStream>>,
    next: u64,
}

impl Server {
    pub(super) fn start(listener: TcpListener, registry: Arc<Registry>, settings: &TcpSettings) -> io::Result<Server> {
        let shared = Arc::new(Shared {
            registry,
            secret: settings.secret.clone(),
            tls: settings.tls.clone(),
            zerocopy_bytes: settings.zerocopy_bytes,
            connections_max: settings.served_max,
            closed: AtomicBool::new(false),
            connections: Mutex::default(),
        });
        std::thread::Builder::new()
            .name("kvtier-tcp-accept".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.accept(&listener)
            })?;
        Ok(Server { shared })
    }

    /// Ends every connection and stops accepting.
    pub(super) fn close(&self, address: SocketAddr) {
        self.shared.closed.store(true, Ordering::Release);
        // Wakes the accepting thread, which also listens to an unspecified address on this node.
        let mut local = address;
        if address.ip().is_unspecified() {
            local.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        let _ = TcpStream::connect_timeout(&local, Duration::from_secs(1));
        for stream in self.shared.connections.lock().living.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        for stream in listener.incoming() {
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            match stream {
                Ok(stream) => self.admit(Arc::new(stream)),
                // Out of descriptors: the queue stays as it is, so do not spin on it.
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn admit(self: &Arc<Self>, stream: Arc<TcpStream>) {
        let number = {
            let mut connections = self.connections.lock();
            if connections.living.len() >= self.connections_max {
                return;
            }
            connections.next += 1;
            let number = connections.next;
            connections.living.insert(number, Arc::clone(&stream));
            number
        };
        let shared = Arc::clone(self);
        let serving = std::thread::Builder::new()
            .name("kvtier-tcp-serve".to_owned())
            .spawn(move || {
                let greeted = super::prepare(&stream).map_err(NotGreeted::from);
                if let Ok(channel) = greeted.and_then(|()| shared.greet(&stream)) {
                    // However it ends, the peer sees a closed connection.
                    let _ = shared.serve(&channel);
                }
                let _ = stream.shutdown(Shutdown::Both);
                shared.connections.lock().living.remove(&number);
            });
        if serving.is_err() {
            self.connections.lock().living.remove(&number);
        }
    }

    /// In the clear only where TLS was not asked for: who speaks something else is not answered.
    fn greet(&self, stream: &Arc<TcpStream>) -> Result<Channel, NotGreeted> {
        within(stream, GREETING_PATIENCE, || {
            let channel = match &self.tls {
                None => Channel::sparing(Arc::clone(stream), self.zerocopy_bytes),
                Some(tls) => Channel::answer(Arc::clone(stream), Some(tls))?,
            };
            introduce_listener(&channel, self.secret.as_ref())?;
            Ok(channel)
        })
    }

    fn serve(&self, channel: &Channel) -> io::Result<()> {
        let mut buffer = Buffer::default();
        let mut reads: Vec<([u8; ANSWER_BYTES], Option<Use>)> = Vec::with_capacity(ANSWERS_MAX);
        let mut collected = 0;
        loop {
            let request = match buffer.next() {
                Some(request) => request,
                None => {
                    answer_reads(channel, &mut reads)?;
                    collected = 0;
                    buffer.fill(channel)?;
                    continue;
                }
            };
            let request = Request::decode(&request).ok_or(io::ErrorKind::InvalidData)?;
            match request.direction {
                Direction::Read => {
                    let used = self.begin(&request, channel.stream());
                    let answer = Answer {
                        result: used.as_ref().map(|_| ()).map_err(|denied| *denied),
                        tag: request.tag,
                        length: if used.is_ok() { request.length } else { 0 },
                    };
                    collected += used.as_ref().map_or(0, |used| used.slice.len());
                    reads.push((answer.encode(), used.ok()));
                    if reads.len() == ANSWERS_MAX || collected >= ANSWER_BYTES_MAX {
                        answer_reads(channel, &mut reads)?;
                        collected = 0;
                    }
                }
                Direction::Write => {
                    answer_reads(channel, &mut reads)?;
                    collected = 0;
                    self.take_write(&request, channel, &mut buffer)?;
                }
            }
        }
    }

    fn begin(&self, request: &Request, stream: &Arc<TcpStream>) -> Result<Use, crate::registry::Denied> {
        let Request {
            region, offset, length, ..
        } = *request;
        self.registry
            .begin(region, offset, length, request.direction, Some(stream))
    }

    fn take_write(&self, request: &Request, channel: &Channel, buffer: &mut Buffer) -> io::Result<()> {
        let result = match self.begin(request, channel.stream()) {
            Ok(target) => {
                let slice = &target.slice;
                let early = buffer.take(slice.len());
                let (head, rest) = (
                    slice.subslice(0, early.len()).map_err(io::Error::other)?,
                    slice
                        .subslice(early.len(), slice.len() - early.len())
                        .map_err(io::Error::other)?,
                );
                head.copy_from_slice(early).map_err(io::Error::other)?;
                channel.receive_exactly(&rest)?;
                Ok(())
            }
            Err(denied) => {
                // The bytes come anyway: they must be out of the way before the next request.
                let early = buffer.take(usize::try_from(request.length).unwrap_or(usize::MAX)).len() as u64;
                let mut rest = channel.take(request.length - early);
                if io::copy(&mut rest, &mut io::sink())? < request.length - early {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Err(denied)
            }
        };
        let answer = Answer {
            result,
            tag: request.tag,
            length: 0,
        };
        channel
            .send(&[Part::Bytes(&answer.encode())], 0, WhenFull::Wait)
            .map(drop)
    }
}

/// Sends what has been collected, each body straight from its region.
fn answer_reads(channel: &Channel, reads: &mut Vec<([u8; ANSWER_BYTES], Option<Use>)>) -> io::Result<()> {
    if reads.is_empty() {
        return Ok(());
    }
    let mut parts = Vec::with_capacity(2 * reads.len());
    for (head, body) in reads.iter() {
        parts.push(Part::Bytes(head));
        parts.extend(body.as_ref().map(|body| Part::Memory(&body.slice)));
    }
    channel.send_and_settle(&parts)?;
    drop(parts);
    reads.clear();
    Ok(())
}

/// Requests as they come.
struct Buffer {
    bytes: [u8; BUFFER_BYTES],
    start: usize,
    end: usize,
}

impl Default for Buffer {
    fn default() -> Buffer {
        Buffer {
            bytes: [0; BUFFER_BYTES],
            start: 0,
            end: 0,
        }
    }
}

impl Buffer {
    fn next(&mut self) -> Option<[u8; REQUEST_BYTES]> {
        let request = *self.bytes[self.start..self.end].first_chunk()?;
        self.start += REQUEST_BYTES;
        Some(request)
    }

    /// Up to `length` bytes that are here already.
    fn take(&mut self, length: usize) -> &[u8] {
        let length = length.min(self.end - self.start);
        let from = self.start;
        self.start += length;
        &self.bytes[from..from + length]
    }

    fn fill(&mut self, mut channel: &Channel) -> io::Result<()> {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        match channel.read(&mut self.bytes[self.end..])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.end += count;
                Ok(())
            }
        }
    }
}
