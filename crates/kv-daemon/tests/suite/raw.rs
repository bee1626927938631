//! The client protocol by hand, for clients that lie: bytes as the wire's documentation draws them.

use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

pub(crate) const HELLO: u16 = 1;
pub(crate) const OPEN_NAMESPACE: u16 = 2;
pub(crate) const LOOKUP: u16 = 3;
pub(crate) const FETCH: u16 = 4;
pub(crate) const RESERVE: u16 = 5;
pub(crate) const SEAL: u16 = 6;
pub(crate) const GRANT: u16 = 7;
pub(crate) const RELEASE: u16 = 8;
pub(crate) const ABANDON: u16 = 9;
pub(crate) const DELETE: u16 = 10;
pub(crate) const INVALIDATE: u16 = 11;
pub(crate) const STATUS: u16 = 13;
pub(crate) const GOODBYE: u16 = 14;
pub(crate) const ERROR: u16 = 0xffff;

/// A connection, and every descriptor that came over it.
pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
    pub(crate) fds: Vec<OwnedFd>,
    pending: Vec<u8>,
    next_request: u64,
}

/// A reply: kind and body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) kind: u16,
    pub(crate) body: Vec<u8>,
}

impl Raw {
    /// Connects and says nothing.
    pub(crate) fn connect(socket: &Path) -> Raw {
        let stream = UnixStream::connect(socket).expect("the daemon accepts");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("a timeout");
        Raw {
            stream,
            fds: Vec::new(),
            pending: Vec::new(),
            next_request: 1,
        }
    }

    /// Connects and says hello.
    pub(crate) fn greet(socket: &Path, token: &[u8]) -> Raw {
        let mut raw = Raw::connect(socket);
        let welcome = raw.call(HELLO, &hello(token)).expect("an answer to hello");
        assert_eq!(welcome.kind, HELLO + 0x8000, "{welcome:?}");
        raw
    }

    /// Opens a namespace; its handle and generation.
    pub(crate) fn open(&mut self, name: &str) -> io::Result<(u32, u64)> {
        let answer = self.call(OPEN_NAMESPACE, &namespace(name))?;
        if answer.kind != OPEN_NAMESPACE + 0x8000 {
            return Err(io::Error::other(format!("{answer:?}")));
        }
        Ok((answer.u32_at(0), answer.u64_at(8)))
    }

    /// Sends a request and waits for its answer.
    pub(crate) fn call(&mut self, kind: u16, body: &[u8]) -> io::Result<Answer> {
        self.call_releasing(kind, &[], body)
    }

    pub(crate) fn call_releasing(&mut self, kind: u16, releases: &[u64], body: &[u8]) -> io::Result<Answer> {
        let request = self.next_request;
        self.next_request += 1;
        self.stream.write_all(&frame(kind, request, releases, body))?;
        loop {
            let (answer, number) = self.receive()?;
            if number == request && answer.kind & 0xc000 != 0x4000 {
                return Ok(answer);
            }
        }
    }

    /// The next frame, whatever it answers.
    pub(crate) fn receive(&mut self) -> io::Result<(Answer, u64)> {
        loop {
            if let Some(header) = self.pending.first_chunk::<40>() {
                let length = u32::from_le_bytes(header[..4].try_into().expect("four")) as usize;
                if self.pending.len() >= 40 + length {
                    let kind = u16::from_le_bytes(header[4..6].try_into().expect("two"));
                    let request = u64::from_le_bytes(header[8..16].try_into().expect("eight"));
                    let body = self.pending[40..40 + length].to_vec();
                    self.pending.drain(..40 + length);
                    return Ok((Answer { kind, body }, request));
                }
            }
            self.read()?;
        }
    }

    fn read(&mut self) -> io::Result<()> {
        let mut bytes = [0; 65536];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        for ancillary in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = ancillary {
                self.fds.extend(fds);
            }
        }
        if message.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.pending.extend_from_slice(&bytes[..message.bytes]);
        Ok(())
    }

    /// Reads until the daemon closes the connection; false when it does not within the timeout.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut bytes = [0; 65536];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
    }
}

impl Answer {
    pub(crate) fn u32_at(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.body[offset..offset + 4].try_into().expect("four"))
    }

    pub(crate) fn u64_at(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.body[offset..offset + 8].try_into().expect("eight"))
    }

    /// Records of an array that begins at `offset`, each of `bytes`.
    pub(crate) fn records(&self, offset: usize, bytes: usize) -> Vec<Vec<u8>> {
        let count = self.u32_at(offset) as usize;
        self.body[offset + 4..]
            .chunks_exact(bytes)
            .take(count)
            .map(<[u8]>::to_vec)
            .collect()
    }
}

/// A frame.
pub(crate) fn frame(kind: u16, request: u64, releases: &[u64], body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(releases.len() * 8 + body.len()).expect("a length");
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend(kind.to_le_bytes());
    frame.extend(0_u16.to_le_bytes());
    frame.extend(request.to_le_bytes());
    frame.extend(5_000_000_u64.to_le_bytes());
    frame.extend(0_u64.to_le_bytes());
    frame.extend(u32::try_from(releases.len()).expect("a count").to_le_bytes());
    frame.extend(0_u32.to_le_bytes());
    frame.extend(releases.iter().flat_map(|lease| lease.to_le_bytes()));
    frame.extend(body);
    frame
}

pub(crate) fn hello(token: &[u8]) -> Vec<u8> {
    let mut body = vec![1, 0, 1, 0];
    body.extend(u32::try_from(token.len()).expect("a length").to_le_bytes());
    body.extend(token);
    body
}

pub(crate) fn namespace(name: &str) -> Vec<u8> {
    let mut body = vec![7; 32];
    body.extend(text(name));
    body
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).expect("a length").to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

/// Keys without a known parent.
pub(crate) fn keys(handle: u32, hashes: &[[u8; 16]]) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend([0; 20]);
    body.extend(u32::try_from(hashes.len()).expect("a count").to_le_bytes());
    body.extend(hashes.iter().flatten());
    body
}

/// Keys to fetch, each for itself.
pub(crate) fn fetch(handle: u32, hashes: &[[u8; 16]]) -> Vec<u8> {
    let mut body = 1_u32.to_le_bytes().to_vec();
    body.extend(keys(handle, hashes));
    body
}

pub(crate) fn reserve(handle: u32, hashes: &[[u8; 16]], length: u32) -> Vec<u8> {
    let mut body = keys(handle, hashes);
    body.extend(hashes.iter().flat_map(|_| length.to_le_bytes()));
    body
}

/// One item to seal.
pub(crate) fn seal(handle: u32, generation: u64, reservation: u64, hash: [u8; 16], length: u32) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend([0; 12]);
    body.extend(generation.to_le_bytes());
    body.extend(1_u32.to_le_bytes());
    body.extend(reservation.to_le_bytes());
    body.extend(hash);
    body.extend([0; 20]);
    body.extend(length.to_le_bytes());
    body.extend([0; 8]);
    body
}
