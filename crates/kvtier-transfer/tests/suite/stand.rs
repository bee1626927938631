//! Two transports of a kind and a connection between them, in one process.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use kvtier_transfer::loopback::Loopback;
use kvtier_transfer::memory::{MemoryRegion, PageRequest};
use kvtier_transfer::rdma::{Verbs, VerbsSettings};
use kvtier_transfer::shm::Shm;
use kvtier_transfer::tcp::{Secret, Tcp, TcpSettings};
use kvtier_transfer::{
    Direction, Peer, Piece, Registration, RemoteAccess, RemoteRegion, Transfer, TransferError, Transport,
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// What a target holds before: bytes that are nobody's.
pub(crate) const POISON: u8 = 0xdb;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Loopback,
    Shm,
    Tcp,
    /// TCP within TLS.
    Tls,
    /// RDMA over RoCE or InfiniBand.
    Verbs,
    /// RDMA over TCP connections of the device.
    Iwarp,
}

/// RDMA devices of that kind, as the kernel names them.
fn devices_of(kind: Kind) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/sys/class/infiniband") else {
        return Vec::new();
    };
    // `4: RNIC`, see the kernel's ABI documentation.
    let is_iwarp = |entry: &std::fs::DirEntry| {
        std::fs::read_to_string(entry.path().join("node_type")).is_ok_and(|kind| kind.starts_with('4'))
    };
    let of_kind = entries
        .flatten()
        .filter(|entry| is_iwarp(entry) == (kind == Kind::Iwarp));
    of_kind
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// What differs from the defaults.
#[derive(Clone, Default)]
pub(crate) struct Wishes {
    pub(crate) in_flight_max: Option<usize>,
    pub(crate) secret: Option<Secret>,
    pub(crate) listen: Option<std::net::SocketAddr>,
    pub(crate) devices: Vec<String>,
}

/// One transport and where it keeps its socket.
pub(crate) struct Site {
    pub(crate) transport: Arc<dyn Transport>,
    _directory: Option<tempfile::TempDir>,
}

/// None, with the reason printed, where this machine cannot have it.
pub(crate) fn site(kind: Kind, wishes: &Wishes) -> Option<Site> {
    let mut directory = None;
    let transport: Arc<dyn Transport> = match kind {
        Kind::Loopback => Arc::new(Loopback::start().expect("a thread")),
        Kind::Shm => {
            let made = tempfile::tempdir().expect("a directory");
            let shm = Shm::start(&made.path().join("shm.sock")).expect("a socket");
            directory = Some(made);
            Arc::new(shm)
        }
        Kind::Tcp | Kind::Tls => {
            let mut settings = TcpSettings {
                secret: wishes.secret.clone(),
                tls: (kind == Kind::Tls).then(crate::tls::of_the_suite),
                ..TcpSettings::default()
            };
            settings.listen = wishes.listen.unwrap_or(settings.listen);
            settings.in_flight_max = wishes.in_flight_max.unwrap_or(settings.in_flight_max);
            Arc::new(Tcp::start(settings).expect("a port"))
        }
        Kind::Verbs | Kind::Iwarp => {
            let mut devices = wishes.devices.clone();
            if devices.is_empty() {
                devices = devices_of(kind);
            }
            if devices.is_empty() {
                println!("skipped: {kind:?}: this machine has no such device");
                return None;
            }
            let mut settings = VerbsSettings {
                secret: wishes.secret.clone(),
                devices,
                notices: true,
                ..VerbsSettings::default()
            };
            settings.listen = wishes.listen.unwrap_or(settings.listen);
            settings.in_flight_max = wishes.in_flight_max.unwrap_or(settings.in_flight_max);
            match Verbs::start(settings) {
                Ok(verbs) => Arc::new(verbs),
                Err(unavailable) => {
                    assert!(unavailable.to_string().starts_with("rdma unavailable: "));
                    println!("skipped: {kind:?}: {unavailable}");
                    return None;
                }
            }
        }
    };
    Some(Site {
        transport,
        _directory: directory,
    })
}

/// A region, its file, and its registration.
pub(crate) struct Memory {
    pub(crate) region: Arc<MemoryRegion>,
    file: OwnedFd,
    pub(crate) registration: Option<Registration>,
}

impl Memory {
    pub(crate) fn new(bytes: usize) -> Memory {
        let (region, file) = MemoryRegion::create("kvtier-suite", bytes, PageRequest::Small).expect("memory");
        Memory {
            region,
            file,
            registration: None,
        }
    }

    pub(crate) fn register(mut self, site: &Site, access: RemoteAccess) -> Memory {
        let registered = site.transport.register(&self.region, Some(self.file.as_fd()), access);
        self.registration = Some(registered.expect("registered"));
        self
    }

    pub(crate) fn remote(&self) -> Arc<RemoteRegion> {
        Arc::new(self.registration.as_ref().expect("registered").remote().clone())
    }

    pub(crate) fn fill(self, seed: u64) -> Memory {
        let bytes = pattern(seed, 0, self.region.bytes());
        self.all().copy_from_slice(&bytes).expect("equal lengths");
        self
    }

    pub(crate) fn poison(self) -> Memory {
        self.all()
            .copy_from_slice(&vec![POISON; self.region.bytes()])
            .expect("equal lengths");
        self
    }

    pub(crate) fn all(&self) -> kvtier_transfer::memory::MemorySlice {
        self.region.slice(0, self.region.bytes()).expect("all of it")
    }

    pub(crate) fn bytes(&self, offset: usize, length: usize) -> Vec<u8> {
        self.region.slice(offset, length).expect("inside").to_vec()
    }
}

/// Bytes that no two places share.
pub(crate) fn pattern(seed: u64, offset: usize, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    let mut word = offset as u64 / 8;
    let skip = offset % 8;
    while bytes.len() < length + skip {
        let mixed = (word ^ seed.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bytes.extend((mixed ^ (mixed >> 29)).to_le_bytes());
        word += 1;
    }
    bytes[skip..skip + length].to_vec()
}

pub(crate) fn piece(
    local: &Memory,
    local_offset: usize,
    remote: &Arc<RemoteRegion>,
    remote_offset: usize,
    length: usize,
    direction: Direction,
) -> Piece {
    Piece {
        local: local.region.slice(local_offset, length).expect("inside").into(),
        remote: remote.slice(remote_offset as u64, length as u64).expect("inside"),
        direction,
    }
}

/// An owner of memory, a caller, and the caller's connection.
pub(crate) struct Stand {
    pub(crate) peer: Box<dyn Peer>,
    pub(crate) caller: Site,
    pub(crate) owner: Site,
}

impl Stand {
    pub(crate) fn set_up(kind: Kind) -> Option<Stand> {
        Stand::with(kind, &Wishes::default())
    }

    pub(crate) fn with(kind: Kind, wishes: &Wishes) -> Option<Stand> {
        let (owner, caller) = (site(kind, wishes)?, site(kind, wishes)?);
        let address = owner.transport.address();
        let peer = caller.transport.connect(&address, PATIENCE).expect("connected");
        Some(Stand { peer, caller, owner })
    }

    /// Local memory of the caller, ready to be a side of a piece.
    pub(crate) fn local(&self, bytes: usize) -> Memory {
        Memory::new(bytes).register(&self.caller, RemoteAccess::Read).poison()
    }

    pub(crate) fn owned(&self, bytes: usize, access: RemoteAccess) -> Memory {
        Memory::new(bytes).fill(7).register(&self.owner, access)
    }

    pub(crate) fn submit(&self, pieces: Vec<Piece>) -> Transfer {
        self.peer.submit(pieces, PATIENCE).expect("taken")
    }

    pub(crate) fn run(&self, pieces: Vec<Piece>) -> Result<(), TransferError> {
        self.submit(pieces).wait()
    }
}
