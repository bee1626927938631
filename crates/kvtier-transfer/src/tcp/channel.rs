//! The bytes of one connection, as they are or within TLS.
//!
//! One thread reads and another sends at the same time. Within TLS both need the one state of the session: it is held
//! while a record is made or opened, never while a socket is waited for. Records go out in the order in which they were
//! made, as whoever makes them holds the right to send.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustls::Connection as Session;

use super::Tls;
use crate::memory::MemorySlice;
use crate::socket::{Part, WhenFull, ZeroCopy, receive_exactly, send_parts};

/// Plaintext of one turn through the session: four records.
const TURN_BYTES: usize = 64 << 10;

/// For the kernel to have sent what it was given; the connection's own limit on silence is shorter.
const SETTLE_PATIENCE: Duration = Duration::from_secs(40);

/// A TCP connection whose bytes are as they are or within TLS. One thread may read while another writes; each by `&Channel`.
pub struct Channel {
    stream: Arc<TcpStream>,
    tls: Option<Within>,
    /// For sends of so many bytes and more.
    zerocopy: Option<(usize, Mutex<ZeroCopy>)>,
}

struct Within {
    session: Mutex<Session>,
    sending: Mutex<Vec<u8>>,
    receiving: Mutex<Received>,
}

/// Records, or parts of some, that the session has not taken yet.
struct Received {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Channel {
    /// The side that called `address`. With `tls` both ends show a certificate before this returns, and nothing is said in the
    /// clear. The stream's own time limits apply.
    ///
    /// # Errors
    /// What the network or TLS says; `PermissionDenied` for a peer whose certificate is not accepted. With TLS 1.3 a caller learns
    /// that its own is not by its first read.
    pub fn call(stream: Arc<TcpStream>, tls: Option<&Tls>, address: SocketAddr) -> io::Result<Channel> {
        match tls {
            None => Ok(Channel::plain(stream)),
            Some(tls) => {
                let session = tls.call(&stream, address)?;
                Ok(Channel::within(stream, session))
            }
        }
    }

    /// As [`Channel::call`], of the side that was called.
    ///
    /// # Errors
    /// As there.
    pub fn answer(stream: Arc<TcpStream>, tls: Option<&Tls>) -> io::Result<Channel> {
        match tls {
            None => Ok(Channel::plain(stream)),
            Some(tls) => {
                let session = tls.take(&stream)?;
                Ok(Channel::within(stream, session))
            }
        }
    }

    pub(super) fn plain(stream: Arc<TcpStream>) -> Channel {
        Channel {
            stream,
            tls: None,
            zerocopy: None,
        }
    }

    /// As [`Channel::plain`]; long answers are not copied into the kernel where the route leaves this node.
    pub(super) fn sparing(stream: Arc<TcpStream>, least: usize) -> Channel {
        let enabled = leaves_the_node(&stream).then(|| ZeroCopy::enable(&*stream));
        Channel {
            zerocopy: enabled
                .and_then(Result::ok)
                .map(|zerocopy| (least, Mutex::new(zerocopy))),
            ..Channel::plain(stream)
        }
    }

    pub(super) fn within(stream: Arc<TcpStream>, session: Session) -> Channel {
        let tls = Within {
            session: Mutex::new(session),
            sending: Mutex::new(vec![0; TURN_BYTES]),
            receiving: Mutex::new(Received {
                bytes: vec![0; TURN_BYTES],
                start: 0,
                end: 0,
            }),
        };
        Channel {
            stream,
            tls: Some(tls),
            zerocopy: None,
        }
    }

    /// The connection itself: for its time limits, and to end it.
    #[must_use]
    pub fn stream(&self) -> &Arc<TcpStream> {
        &self.stream
    }

    pub(super) fn shut(&self) {
        // Fails only for a connection that is closed already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// As [`send_parts`]; within TLS a caller who will not wait sends only what is short.
    pub(super) fn send(&self, parts: &[Part<'_>], skipped: usize, when_full: WhenFull) -> io::Result<usize> {
        let Some(tls) = &self.tls else {
            return send_parts(&*self.stream, parts, skipped, when_full);
        };
        let total: usize = parts.iter().map(Part::len).sum();
        if when_full == WhenFull::Return && total - skipped > TURN_BYTES {
            return Ok(skipped);
        }
        let mut buffer = tls.sending.lock();
        let mut sent = skipped;
        while sent < total {
            let length = gather(parts, sent, &mut buffer)?;
            self.seal(tls, &buffer[..length])?;
            sent += length;
        }
        Ok(total)
    }

    /// Sends all parts. When this returns, whatever it returns, the kernel holds no page of them.
    pub(super) fn send_and_settle(&self, parts: &[Part<'_>]) -> io::Result<()> {
        let total: usize = parts.iter().map(Part::len).sum();
        if let Some((least, zerocopy)) = &self.zerocopy
            && total >= *least
        {
            let mut zerocopy = zerocopy.lock();
            // A kernel that copied it the last time would pay for both.
            if !zerocopy.was_copied() {
                let sent = zerocopy.send(&*self.stream, parts);
                return match sent.and_then(|()| zerocopy.settle(&*self.stream, SETTLE_PATIENCE)) {
                    Ok(()) => Ok(()),
                    Err(error) => {
                        // Until then whoever revokes the region is told that it is not at rest.
                        while zerocopy
                            .abort(&*self.stream, SETTLE_PATIENCE)
                            .is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
                        {}
                        Err(error)
                    }
                };
            }
        }
        self.send(parts, 0, WhenFull::Wait).map(drop)
    }

    fn seal(&self, tls: &Within, mut plain: &[u8]) -> io::Result<()> {
        let mut records = Vec::with_capacity(plain.len() + 1024);
        while !plain.is_empty() {
            {
                let mut session = tls.session.lock();
                let taken = session.writer().write(plain)?;
                plain = &plain[taken..];
                while session.wants_write() {
                    session.write_tls(&mut records)?;
                }
            }
            (&*self.stream).write_all(&records)?;
            records.clear();
        }
        Ok(())
    }

    /// Fills all of `target`.
    pub(super) fn receive_exactly(&self, target: &MemorySlice) -> io::Result<()> {
        if self.tls.is_none() {
            return receive_exactly(&*self.stream, target);
        }
        let mut plain = vec![0; TURN_BYTES.min(target.len())];
        let mut filled = 0;
        while filled < target.len() {
            let wanted = plain.len().min(target.len() - filled);
            let count = (&*self).read(&mut plain[..wanted])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let part = target.subslice(filled, count).map_err(io::Error::other)?;
            part.copy_from_slice(&plain[..count]).map_err(io::Error::other)?;
            filled += count;
        }
        Ok(())
    }
}

impl Read for &Channel {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &self.tls else {
            return (&*self.stream).read(bytes);
        };
        let mut received = tls.receiving.lock();
        loop {
            match tls.session.lock().reader().read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            let Received { bytes, start, end } = &mut *received;
            if start == end {
                // Nothing is there if this fails.
                (*start, *end) = (0, 0);
                *end = (&*self.stream).read(bytes)?;
            }
            let mut session = tls.session.lock();
            // As much as the session takes while nothing waits to be read from it. Nothing at all tells it of the end.
            *start += session.read_tls(&mut &bytes[*start..*end])?;
            let opened = session.process_new_packets();
            opened.map_err(|error| super::tls::refused(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        }
    }
}

impl Write for &Channel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(&[Part::Bytes(bytes)], 0, WhenFull::Wait)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Within a node the kernel copies all the same, and later than at once.
fn leaves_the_node(stream: &TcpStream) -> bool {
    match (stream.local_addr(), stream.peer_addr()) {
        (Ok(near), Ok(far)) => near.ip() != far.ip() && !far.ip().is_loopback(),
        _ => false,
    }
}

/// Copies what follows the first `skipped` bytes of the parts into `buffer`, as much as it holds.
fn gather(parts: &[Part<'_>], skipped: usize, buffer: &mut [u8]) -> io::Result<usize> {
    let (mut before, mut filled) = (0, 0);
    for part in parts {
        let skip = (skipped + filled).saturating_sub(before).min(part.len());
        before += part.len();
        let length = (part.len() - skip).min(buffer.len() - filled);
        let target = &mut buffer[filled..filled + length];
        match part {
            Part::Bytes(bytes) => target.copy_from_slice(&bytes[skip..skip + length]),
            Part::Memory(slice) => {
                let range = slice.subslice(skip, length).map_err(io::Error::other)?;
                range.copy_to_slice(target).map_err(io::Error::other)?;
            }
        }
        filled += length;
    }
    Ok(filled)
}
