//! MOVE: bytes between memory regions, and file descriptors between processes.
//!
//! Memory that another process may write is reached through pointers kept in one corner: callers hold checked ranges
//! and copy, they never get a `&[u8]`. A batch of copies to or from a peer's memory is a [`Transfer`]: one deadline, one
//! outcome, and its memory stays owned until nothing touches it any more. The ways to move bytes ([`loopback`], [`shm`],
//! [`tcp`], [`rdma`]) stand behind one trait, [`Transport`]. Absent on purpose: block keys, tiers, policy, and who may
//! talk to whom.
//!
//! Host memory and an RDMA wire carry plaintext, and so does a TCP one unless [`tcp::Tls`] is asked for: what must not be
//! read on the network between nodes needs that, or a network that encrypts.
//!
//! Read first: [`memory::MemoryRegion`] (owns a mapping), [`memory::MemorySlice`] (a checked range of one),
//! [`Transport`] and [`Transfer`].

mod copier;
pub mod direct;
pub mod gpu;
pub mod loopback;
pub mod memory;
pub mod rails;
pub mod rdma;
mod registry;
mod remote;
pub mod shm;
pub mod socket;
pub mod tcp;
mod transfer;
mod transport;

pub use memory::crc32c;
pub use remote::{
    NotARegion, REMOTE_KEYS_MAX, REMOTE_REGION_BYTES_MAX, RegionId, RemoteAccess, RemoteRegion, RemoteSlice,
};
pub use transfer::{Cause, Direction, PIECES_MAX, Piece, Refusal, Refused, Transfer, TransferError};
pub use transport::{
    ConnectError, Peer, PeerAddress, RailReport, RegisterError, Registration, RevokeError, Transport, TransportKind,
};
