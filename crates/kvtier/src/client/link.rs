use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use kvtier_transfer::socket::{receive_with_fds, send_with_fds};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::session::Session;
use super::{ClientError, ClientOptions};
use crate::ErrorKind;
use crate::wire::{Envelope, Frame, FrameStream, Reply, Request, VERSION_MAX, VERSION_MIN, Welcome};

/// Bytes that one read takes. Replies of a few keys are far smaller; of thousands, larger.
pub(super) const READ_BYTES: usize = 64 << 10;
/// The node answers at the deadline at the latest; its answer may take a little longer to get here.
pub(super) const GRACE: Duration = Duration::from_millis(250);
/// The number of the first request.
pub(super) const HELLO_REQUEST: u64 = 1;
/// A hello is shorter.
const HELLO_BYTES: usize = 512;

/// A blocking socket of the node's, with what was received and not yet looked at.
pub(super) struct Link {
    pub(super) session: Session,
    socket: OwnedFd,
    incoming: Incoming,
    next_request: u64,
    timeout: Duration,
}

/// Opens a connection. Waits at most `timeout` for a node that does not accept.
pub(super) fn open_socket(path: &Path, timeout: Duration) -> Result<OwnedFd, ClientError> {
    let failed = |error: rustix::io::Errno| refused(path, &error.into());
    let address = SocketAddrUnix::new(path)
        .map_err(|_| ClientError::invalid(format!("{}: not a path that a socket can have", path.display())))?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed)?;
    wait_at_most(&socket, timeout)?;
    connect(&socket, &address).map_err(failed)?;
    Ok(socket)
}

/// No connection, and what to do about it.
pub(super) fn refused(path: &Path, error: &io::Error) -> ClientError {
    let place = path.display();
    match error.kind() {
        io::ErrorKind::PermissionDenied => ClientError::new(
            ErrorKind::Denied,
            format!("{place}: {error}: this user may not use the socket; see the node's socket_mode"),
        ),
        _ => ClientError::new(
            ErrorKind::Unavailable,
            format!("{place}: {error}: is kv-daemon running, and is this its socket?"),
        ),
    }
}

fn wait_at_most(socket: &OwnedFd, timeout: Duration) -> Result<(), ClientError> {
    // The kernel takes a zero for "no limit".
    let timeout = Some(timeout.max(Duration::from_millis(1)));
    let set = |which| set_socket_timeout(socket, which, timeout);
    set(Timeout::Send)
        .and_then(|()| set(Timeout::Recv))
        .map_err(|error| ClientError::lost(&error.into()))
}

/// The hello of a client with these options.
pub(super) fn encode_hello(options: &ClientOptions, frames: &mut Vec<u8>) -> Result<(), ClientError> {
    let token = options.token.as_deref().unwrap_or_default();
    let hello = Request::Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        token,
    };
    let deadline_us = micros(options.timeout);
    Ok(hello.encode(
        &Envelope {
            request: HELLO_REQUEST,
            deadline_us,
            ..Envelope::default()
        },
        frames,
    )?)
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Link {
    /// Connects and says hello.
    pub(super) fn open(options: &ClientOptions, epoch: u64) -> Result<Link, ClientError> {
        let socket = open_socket(&options.socket, options.timeout + GRACE)?;
        let mut frames = Vec::with_capacity(HELLO_BYTES);
        encode_hello(options, &mut frames)?;
        send_all(&socket, &frames)?;
        let mut incoming = Incoming {
            stream: FrameStream::new(READ_BYTES),
            fds: VecDeque::new(),
            received: Vec::new(),
        };
        let until = Instant::now() + options.timeout + GRACE;
        let welcome = loop {
            if let Some(frame) = incoming.stream.next()? {
                break welcome_of(&frame)?;
            }
            incoming.read(&socket, until)?;
        };
        let session = Session::begin(welcome, epoch, options)?;
        Ok(Link {
            session,
            socket,
            incoming,
            next_request: HELLO_REQUEST + 1,
            timeout: options.timeout,
        })
    }

    /// A number for the next request.
    pub(super) fn number(&mut self) -> u64 {
        let number = self.next_request;
        self.next_request += 1;
        number
    }

    pub(super) fn send(&mut self, frames: &[u8]) -> Result<(), ClientError> {
        send_all(&self.socket, frames)
    }

    /// Waits as long as this for answers from here on.
    pub(super) fn set_timeout(&mut self, timeout: Duration) -> Result<(), ClientError> {
        if timeout != self.timeout {
            wait_at_most(&self.socket, timeout + GRACE)?;
            self.timeout = timeout;
        }
        Ok(())
    }

    /// Waits for the answer to `request`, taking notices on the way. An error reply is the inner error.
    pub(super) fn receive<T>(
        &mut self,
        request: u64,
        absorb: impl FnOnce(&mut Session, Reply<'_>) -> Result<T, ClientError>,
    ) -> Result<Result<T, ClientError>, ClientError> {
        let until = Instant::now() + self.timeout + GRACE;
        loop {
            while let Some(frame) = self.incoming.stream.next()? {
                let (reply, _) = Reply::decode(&frame.header, frame.body)?;
                if reply.is_notice() {
                    self.session.absorb_notice(&reply, &mut self.incoming.fds)?;
                } else if frame.header.request == request {
                    if let Reply::Error { kind, message } = reply {
                        return Ok(Err(ClientError::new(kind, message)));
                    }
                    return absorb(&mut self.session, reply).map(Ok);
                }
            }
            self.incoming.read(&self.socket, until)?;
        }
    }
}

/// What the node said first.
pub(super) fn welcome_of(frame: &Frame<'_>) -> Result<Welcome, ClientError> {
    match Reply::decode(&frame.header, frame.body)?.0 {
        Reply::Welcome(welcome) => Ok(welcome),
        Reply::Error { kind, message } => Err(ClientError::new(kind, message)),
        _ => Err(ClientError::protocol("something else than a welcome")),
    }
}

struct Incoming {
    stream: FrameStream,
    fds: VecDeque<OwnedFd>,
    received: Vec<OwnedFd>,
}

impl Incoming {
    /// One read. A process that was stopped past `until` still finds the answer that came meanwhile.
    fn read(&mut self, socket: &OwnedFd, until: Instant) -> Result<(), ClientError> {
        let count = receive_with_fds(socket, self.stream.space(), &mut self.received);
        let count = count.map_err(|error| ClientError::lost(&error))?;
        if count == 0 {
            return Err(ClientError::unanswered());
        }
        self.stream.advance(count);
        self.fds.extend(self.received.drain(..));
        // A node that drips bytes must not keep the call alive: the socket bounds each read, this their sum.
        if !self.stream.is_ready() && Instant::now() > until {
            return Err(ClientError::late());
        }
        Ok(())
    }
}

fn send_all(socket: &OwnedFd, mut frames: &[u8]) -> Result<(), ClientError> {
    while !frames.is_empty() {
        let sent = send_with_fds(socket, frames, &[]).map_err(|error| ClientError::lost(&error))?;
        if sent == 0 {
            return Err(ClientError::lost(&io::ErrorKind::WriteZero.into()));
        }
        frames = &frames[sent..];
    }
    Ok(())
}
