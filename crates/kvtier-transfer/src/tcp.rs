//! Sockets: a request names a range, the answer is received straight into its target.
//!
//! Reads and writes are one-sided: the owner's side serves them from its registered regions in threads of this transport.
//! Several connections a peer share the load; one that breaks is made anew and what was on it goes over another, so an
//! idle connection that the network forgot never fails a transfer. With a [`Secret`] both ends prove that they know it
//! before any request is served; with [`Tls`] both show certificates and bytes are encrypted, and nothing is said in the
//! clear to who does not.

mod channel;
mod connection;
mod greet;
mod peer;
mod serve;
mod tls;
mod wire;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::loopback::register_in;
use crate::memory::MemoryRegion;
use crate::registry::Registry;
use crate::remote::RemoteAccess;
use crate::transport::{ConnectError, Peer, PeerAddress, RegisterError, Registration, Transport, TransportKind};
pub use channel::Channel;
pub(crate) use greet::{Refused as NotGreeted, greet_as_caller, greet_as_listener};
use serve::Server;
pub use tls::{Tls, TlsError};
pub use wire::Secret;

/// How a TCP transport behaves.
#[derive(Clone, Debug)]
pub struct TcpSettings {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Connections to each peer. Default 2.
    pub connections: usize,
    /// A batch longer than this is spread over the connections in slices of this size. Default 1 MiB.
    pub slice_bytes: usize,
    /// Slices in flight to one peer; a batch past it is refused as busy. Default 8,192.
    pub in_flight_max: usize,
    /// Connections served at a time, of all peers; one more is closed at once. A thread each. Default 1,024.
    pub served_max: usize,
    /// Both ends must know it. Default none: whoever reaches the port and knows a region's number reads it.
    pub secret: Option<Secret>,
    /// Both ends must have it: certificates are shown and checked on both sides, everything is encrypted, which costs the
    /// processor several times what the socket does. Default none.
    pub tls: Option<Tls>,
    /// Answers with this many bytes or more are sent without copying them into the kernel (`MSG_ZEROCOPY`) where the route
    /// leaves this node; never within TLS. Default 128 KiB; `usize::MAX` turns it off.
    pub zerocopy_bytes: usize,
}

impl Default for TcpSettings {
    fn default() -> TcpSettings {
        TcpSettings {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            connections: 2,
            slice_bytes: 1 << 20,
            in_flight_max: 8192,
            served_max: 1024,
            secret: None,
            tls: None,
            zerocopy_bytes: 128 << 10,
        }
    }
}

/// Moves bytes over TCP.
pub struct Tcp {
    settings: Arc<TcpSettings>,
    address: SocketAddr,
    registry: Arc<Registry>,
    server: Server,
}

impl Tcp {
    /// Listens and serves.
    ///
    /// # Errors
    /// When it cannot listen there, a setting is zero, or no thread can be started.
    pub fn start(settings: TcpSettings) -> io::Result<Tcp> {
        let TcpSettings {
            connections,
            slice_bytes,
            in_flight_max,
            served_max,
            ..
        } = settings;
        if [connections, slice_bytes, in_flight_max, served_max].contains(&0) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "connections, slices and limits are at least 1",
            ));
        }
        let listener = TcpListener::bind(settings.listen)?;
        let address = listener.local_addr()?;
        let registry = Arc::new(Registry::default());
        let server = Server::start(listener, Arc::clone(&registry), &settings)?;
        Ok(Tcp {
            settings: Arc::new(settings),
            address,
            registry,
            server,
        })
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        self.server.close(self.address);
    }
}

impl Transport for Tcp {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn address(&self) -> PeerAddress {
        PeerAddress::Tcp(self.address)
    }

    fn register(
        &self,
        region: &Arc<MemoryRegion>,
        _file: Option<BorrowedFd<'_>>,
        access: RemoteAccess,
    ) -> Result<Registration, RegisterError> {
        register_in(&self.registry, region, access)
    }

    fn connect(&self, address: &PeerAddress, patience: Duration) -> Result<Box<dyn Peer>, ConnectError> {
        let PeerAddress::Tcp(address) = address else {
            return Err(ConnectError::WrongKind {
                transport: TransportKind::Tcp,
                address: format!("{address:?}"),
            });
        };
        Ok(Box::new(peer::TcpPeer::connect(
            *address,
            Arc::clone(&self.settings),
            patience,
        )?))
    }
}

/// What every connection of ours has: no delays, a sign of life while idle, an end when the network has gone silent.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(15))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, 30_000)?;
    Ok(())
}
