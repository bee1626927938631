//! A way to move bytes, and the other end of it.

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::gpu::DeviceRegion;
use crate::memory::MemoryRegion;
use crate::rdma::{DirectWay, Notices};
use crate::remote::{RemoteAccess, RemoteRegion};
use crate::transfer::{Piece, Refusal, Refused, Transfer};

/// The ways there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TransportKind {
    /// Within one process.
    Loopback,
    /// Between processes of one node, through mappings of each other's memory files.
    Shm,
    /// Sockets.
    Tcp,
    /// RDMA through libibverbs.
    Verbs,
}

impl fmt::Display for TransportKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            TransportKind::Loopback => "loopback",
            TransportKind::Shm => "shm",
            TransportKind::Tcp => "tcp",
            TransportKind::Verbs => "verbs",
        })
    }
}

/// Where a transport is reached. Not a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerAddress {
    /// In this process: a number it drew.
    Loopback(u64),
    /// On this node: a Unix socket.
    Shm(PathBuf),
    /// A TCP socket that moves the bytes.
    Tcp(SocketAddr),
    /// A TCP socket for the handshake of an RDMA connection.
    Verbs(SocketAddr),
}

/// A way to move bytes.
///
/// Its owner registers regions and tells peers their [`RemoteRegion`]s over a channel of its own; a peer connects and
/// reads or writes them, one-sided: no code of the owner's runs above the transport.
pub trait Transport: Send + Sync {
    /// Which way.
    fn kind(&self) -> TransportKind;

    /// Where peers reach it.
    fn address(&self) -> PeerAddress;

    /// Lets peers reach `region` until the registration is revoked or dropped. `file` is the memory file behind it; only
    /// [`TransportKind::Shm`] needs it. With NICs it also makes the region usable as the local side of a piece.
    ///
    /// # Errors
    /// When the transport cannot: in words that name the limit.
    fn register(
        &self,
        region: &Arc<MemoryRegion>,
        file: Option<BorrowedFd<'_>>,
        access: RemoteAccess,
    ) -> Result<Registration, RegisterError>;

    /// Lets peers reach memory of a GPU until the registration is revoked or dropped, and makes it usable as the local side of a piece:
    /// NICs read and write it past the host's memory.
    ///
    /// # Errors
    /// This transport has no NICs; a NIC or the GPU cannot, this way: in words.
    fn register_device(
        &self,
        region: &Arc<DeviceRegion>,
        way: DirectWay,
        access: RemoteAccess,
    ) -> Result<Registration, RegisterError> {
        let _ = (way, access);
        Err(RegisterError::Device {
            device: self.kind().to_string(),
            bytes: region.bytes(),
            what: "only NICs reach memory of a device".to_owned(),
        })
    }

    /// What peers told this node by [`Peer::notify`]; `None`: this transport carries no notices, or its settings take none.
    fn notices(&self) -> Option<&Notices> {
        None
    }

    /// Connects to a peer within `patience`.
    ///
    /// # Errors
    /// When it cannot be reached, is another kind of transport, or refuses us.
    fn connect(&self, address: &PeerAddress, patience: Duration) -> Result<Box<dyn Peer>, ConnectError>;
}

/// The other end of a connected transport. Dropping it ends what is in flight: such a batch fails, unless it was done first.
pub trait Peer: Send + Sync {
    /// Starts a batch: everything is moved, or the outcome names the first failed piece. The outcome arrives at `deadline`
    /// from now at the latest, plus the short time that stopping takes.
    ///
    /// Where the processor copies (`loopback`, `shm`), a small batch is over when this returns, and one below some MiB begins
    /// when somebody waits for it, looks for its outcome or lets go of it.
    ///
    /// # Errors
    /// When the batch is not taken; its pieces come back.
    fn submit(&self, pieces: Vec<Piece>, deadline: Duration) -> Result<Transfer, Refused>;

    /// Tells the other end a number, which waits in its [`Transport::notices`]: that bytes written there are complete, say. Send
    /// it once their batch is done. The outcome arrives when the other end's device has it, or at `deadline` from now at the
    /// latest, which also bounds connecting. Those sent from here arrive in order. One that is late ends those that are on their
    /// way with it; one that failed may have arrived all the same, and one that is done may be lost with the connection before its
    /// owner sees it. By RDMA on RoCE and InfiniBand alone.
    ///
    /// # Errors
    /// When it is not sent: this transport has no notices, too many are on their way, or the other end is gone.
    fn notify(&self, note: u32, deadline: Duration) -> Result<Transfer, Refused> {
        let _ = (note, deadline);
        Err(Refused {
            reason: Refusal::Invalid {
                piece: 0,
                what: "this transport carries no notices",
            },
            pieces: Vec::new(),
        })
    }

    /// How each way to it fares.
    fn rails(&self) -> Vec<RailReport>;
}

/// How one way to a peer (a pair of NICs, or a socket) fares.
#[derive(Clone, Debug, PartialEq)]
pub struct RailReport {
    /// What it is, in words: `rxe0 to rxe1`, `127.0.0.1:4000`.
    pub name: String,
    /// Whether it takes transfers now.
    pub usable: bool,
    /// Bytes moved, both directions.
    pub bytes: u64,
    /// Measured bytes a second while busy; 0 before the first transfer.
    pub bytes_per_second: f64,
    /// Failures that were its own.
    pub errors: u64,
    /// How often it was connected anew.
    pub reconnects: u64,
}

/// A registered region: peers reach it until this is revoked or dropped.
pub struct Registration {
    remote: RemoteRegion,
    owner: Option<Box<dyn Revoke>>,
}

impl Registration {
    pub(crate) fn new(remote: RemoteRegion, owner: Box<dyn Revoke>) -> Registration {
        Registration {
            remote,
            owner: Some(owner),
        }
    }

    /// What to tell peers.
    #[must_use]
    pub fn remote(&self) -> &RemoteRegion {
        &self.remote
    }

    /// Takes the region back. When this returns `Ok`, no peer reads or writes it any more, and none can again.
    ///
    /// # Errors
    /// [`RevokeError`]: somebody may still reach the bytes; the memory must not be given to anybody else.
    pub fn revoke(mut self) -> Result<(), RevokeError> {
        match self.owner.take() {
            Some(mut owner) => owner.revoke(),
            None => Ok(()),
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(mut owner) = self.owner.take() {
            // Who needs to know calls `revoke`; whatever could not be revoked keeps its memory.
            let _ = owner.revoke();
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Registration")
            .field("remote", &self.remote)
            .finish_non_exhaustive()
    }
}

/// The transport's side of a [`Registration`].
pub(crate) trait Revoke: Send + Sync {
    /// Called once.
    fn revoke(&mut self) -> Result<(), RevokeError>;
}

/// A revocation that is not complete.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the region may still be reached by a peer: {0}; its memory is kept and must not be reused")]
pub struct RevokeError(pub String);

/// Why a region could not be registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The transport passes memory files, and none was given.
    #[error("shared memory is passed as a memory file: create the region with MemoryRegion::create and give its file")]
    NoFile,
    /// Peers are to write a region that this process may only read.
    #[error("the region is mapped read-only: it cannot be registered for writes")]
    ReadOnly,
    /// A device refused.
    #[error("{device} cannot register {bytes} bytes: {what}")]
    Device {
        /// Which.
        device: String,
        /// The region's size.
        bytes: usize,
        /// The system's answer and the limit that it may be.
        what: String,
    },
    /// No descriptor for it.
    #[error("cannot keep the region's memory file: {0}")]
    File(String),
}

/// Why a peer could not be connected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// An address of another kind of transport.
    #[error("{transport} cannot connect to {address}")]
    WrongKind {
        /// This transport.
        transport: TransportKind,
        /// What it was given.
        address: String,
    },
    /// Nobody answers there, or not in time.
    #[error("{address} cannot be reached: {what}")]
    Unreachable {
        /// Where.
        address: String,
        /// Why.
        what: String,
    },
    /// It answers, and one side does not accept the other.
    #[error("{address} and this node do not accept each other: {what}")]
    Denied {
        /// Where.
        address: String,
        /// Why.
        what: String,
    },
}
