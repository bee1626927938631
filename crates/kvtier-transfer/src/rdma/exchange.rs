//! How the few messages of a handshake reach the other node: over any channel the owner has, or a TCP socket of ours.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::session::Session;
use super::wire::MESSAGE_BYTES_MAX;
use crate::tcp::{NotGreeted, Secret, greet_as_caller, greet_as_listener, prepare};

const CONNECTIONS_MAX: usize = 1024;
const GREETING_PATIENCE: Duration = Duration::from_secs(2);

/// A channel to one peer that carries questions to its [`Session`] and brings the answers back. It should authenticate
/// both ends: whoever answers gets to reach registered memory, with the keys that it was told.
pub trait Exchange: Send + Sync {
    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// When none comes within `patience`, or the peer is gone; `PermissionDenied` when it does not accept us.
    fn ask(&self, question: &[u8], patience: Duration) -> io::Result<Vec<u8>>;
}

/// A TCP connection that is made when it is needed. Each message is its length, 4 bytes little-endian, and its bytes.
pub struct TcpExchange {
    address: SocketAddr,
    secret: Option<Secret>,
    stream: Mutex<Option<TcpStream>>,
}

impl TcpExchange {
    /// To a peer's address, proving the secret if there is one.
    #[must_use]
    pub fn new(address: SocketAddr, secret: Option<Secret>) -> TcpExchange {
        TcpExchange {
            address,
            secret,
            stream: Mutex::new(None),
        }
    }

    fn open(&self, patience: Duration) -> io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.address, patience.max(Duration::from_millis(1)))?;
        prepare(&stream)?;
        match greet_as_caller(&stream, self.secret.as_ref(), patience) {
            Ok(()) => Ok(stream),
            Err(NotGreeted::System(error)) => Err(error),
            Err(NotGreeted::Denied(what)) => Err(io::Error::new(io::ErrorKind::PermissionDenied, what.into_owned())),
        }
    }
}

impl Exchange for TcpExchange {
    fn ask(&self, question: &[u8], patience: Duration) -> io::Result<Vec<u8>> {
        let until = Instant::now() + patience;
        let left = || {
            until
                .saturating_duration_since(Instant::now())
                .max(Duration::from_millis(1))
        };
        let mut kept = self.stream.try_lock_until(until).ok_or(io::ErrorKind::TimedOut)?;
        // One that was open may have been closed by the peer since: then a new one gets the question once more, and lanes
        // of the same number replace each other.
        if let Some(stream) = kept.take()
            && let Ok(answer) = ask_over(&stream, question, left())
        {
            *kept = Some(stream);
            return Ok(answer);
        }
        let stream = self.open(left())?;
        let answer = ask_over(&stream, question, left())?;
        *kept = Some(stream);
        Ok(answer)
    }
}

fn ask_over(stream: &TcpStream, question: &[u8], patience: Duration) -> io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    send(stream, question)?;
    receive(stream)
}

fn send(mut stream: &TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u32::try_from(message.len()).map_err(io::Error::other)?;
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend(message);
    stream.write_all(&bytes)
}

fn receive(mut stream: &TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MESSAGE_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message)?;
    Ok(message)
}

type MakeSession = Arc<dyn Fn() -> Session + Send + Sync>;

/// Answers questions over TCP: a thread and a session for each connection.
pub(super) struct ExchangeServer {
    shared: Arc<Shared>,
}

struct Shared {
    secret: Option<Secret>,
    session: MakeSession,
    closed: AtomicBool,
    connections: Mutex<(u64, HashMap<u64, Arc<TcpStream>>)>,
}

impl ExchangeServer {
    pub(super) fn start(
        listener: TcpListener,
        secret: Option<Secret>,
        session: MakeSession,
    ) -> io::Result<ExchangeServer> {
        let shared = Arc::new(Shared {
            secret,
            session,
            closed: AtomicBool::new(false),
            connections: Mutex::default(),
        });
        std::thread::Builder::new()
            .name("kvtier-rdma-accept".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.accept(&listener)
            })?;
        Ok(ExchangeServer { shared })
    }

    pub(super) fn close(&self, address: SocketAddr) {
        self.shared.closed.store(true, Ordering::Release);
        let mut local = address;
        if address.ip().is_unspecified() {
            local.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        // Wakes the accepting thread.
        let _ = TcpStream::connect_timeout(&local, Duration::from_secs(1));
        for stream in self.shared.connections.lock().1.values() {
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
            let Ok(stream) = stream else {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            };
            let stream = Arc::new(stream);
            let number = {
                let mut connections = self.connections.lock();
                if connections.1.len() >= CONNECTIONS_MAX {
                    continue;
                }
                connections.0 += 1;
                let number = connections.0;
                connections.1.insert(number, Arc::clone(&stream));
                number
            };
            let shared = Arc::clone(self);
            let serving = std::thread::Builder::new()
                .name("kvtier-rdma-answer".to_owned())
                .spawn(move || {
                    // However it ends: its queue pairs end with the session.
                    let _ = shared.serve(&stream);
                    let _ = stream.shutdown(Shutdown::Both);
                    shared.connections.lock().1.remove(&number);
                });
            if serving.is_err() {
                self.connections.lock().1.remove(&number);
            }
        }
    }

    fn serve(&self, stream: &TcpStream) -> io::Result<()> {
        prepare(stream)?;
        if greet_as_listener(stream, self.secret.as_ref(), GREETING_PATIENCE).is_err() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let session = (self.session)();
        loop {
            let question = receive(stream)?;
            send(stream, &session.answer(&question))?;
        }
    }
}
