//! RDMA: NICs read and write registered memory of both nodes without either processor touching the bytes.
//!
//! libibverbs is opened at run time: where it, or a device, is missing, [`Verbs::start`] says "rdma unavailable: …" and the
//! same program goes on without. Peers are connected by reliable queue pairs, several a pair of NICs; how they find each
//! other travels over an [`Exchange`], a channel that the owner authenticates. RoCE v2 and v1 and InfiniBand are addressed
//! there; iWARP devices are connected through librdmacm, opened at run time when there is such a device.

mod exchange;
mod gid;
mod iwarp;
mod nic;
mod notices;
mod peer;
mod raw;
mod session;
pub(crate) mod verbs;
mod wire;

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::gpu::{DeviceRegion, Place};
use crate::memory::{Access, MemoryRegion};
use crate::remote::{REMOTE_KEYS_MAX, RegionId, RemoteAccess, RemoteRegion};
use crate::tcp::Secret;
use crate::transport::{
    ConnectError, Peer, PeerAddress, RegisterError, Registration, Revoke, RevokeError, Transport, TransportKind,
};
use exchange::ExchangeServer;
pub use exchange::{Exchange, TcpExchange};
pub use gid::Network;
use nic::{LocalRegions, Nic};
pub use notices::Notices;
pub use raw::RawReads;
pub use session::Session;
pub use verbs::DirectWay;
use verbs::Registered;

/// How an RDMA transport behaves.
#[derive(Clone, Debug)]
pub struct VerbsSettings {
    /// Which devices, by name; empty takes every one with an active port that can be used. At most 16.
    pub devices: Vec<String>,
    /// Where peers ask for a connection; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Both ends of that must know it. Default none.
    pub secret: Option<Secret>,
    /// Index in the table of addresses of every device; default: chosen by kind (RoCE v2, IPv4 first) and `network`.
    pub gid_index: Option<u8>,
    /// Prefer an address of this network. Default none.
    pub network: Option<Network>,
    /// Largest path MTU, in bytes: 256, 512, 1024, 2048 or 4096. The smaller of both ends is taken. Default 4,096.
    pub mtu_max: u32,
    /// Queue pairs for each pair of NICs. Default 2.
    pub lanes: usize,
    /// Requests in flight on a queue pair. Default 128.
    pub queue_depth: u32,
    /// Pieces are cut into slices of at least this size; large ones into larger slices, 1 MiB at most. Default 64 KiB.
    pub slice_bytes: usize,
    /// One request in so many reports its completion, and the last of each posting. Default 16.
    pub signal_every: u32,
    /// How long the polling thread of a NIC spins after a completion before it sleeps. To sleep costs a wake-up, which is longer
    /// than most reads; to spin costs, in traffic with pauses below this, a processor that yields to whoever wants it. Default
    /// 500 µs.
    pub spin: Duration,
    /// Slices in flight or waiting, for one peer; a batch past it is refused as busy. Default 16,384.
    pub in_flight_max: usize,
    /// 4.096 µs times two to this power until an unanswered packet is sent again. Default 12, 17 ms.
    pub ack_timeout: u8,
    /// How often, 0 to 7. Default 6.
    pub retries: u8,
    /// Whether peers may send notices here: somebody must take them from [`Transport::notices`]. Default false.
    pub notices: bool,
}

impl Default for VerbsSettings {
    fn default() -> VerbsSettings {
        VerbsSettings {
            devices: Vec::new(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            secret: None,
            gid_index: None,
            network: None,
            mtu_max: 4096,
            lanes: 2,
            queue_depth: 128,
            slice_bytes: 64 << 10,
            signal_every: 16,
            spin: Duration::from_micros(500),
            in_flight_max: 16_384,
            ack_timeout: 12,
            retries: 6,
            notices: false,
        }
    }
}

/// Why there is no RDMA here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unavailable(pub String);

impl fmt::Display for Unavailable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "rdma unavailable: {}", self.0)
    }
}

impl std::error::Error for Unavailable {}

/// Names of the RDMA devices of this node.
///
/// # Errors
/// Why there is no RDMA here: no libibverbs, most often.
pub fn device_names() -> Result<Vec<String>, Unavailable> {
    verbs::device_names().map_err(Unavailable)
}

/// Moves bytes by RDMA.
pub struct Verbs {
    shared: Arc<Shared>,
    server: ExchangeServer,
    address: SocketAddr,
}

struct Shared {
    settings: VerbsSettings,
    nics: Vec<Arc<Nic>>,
    regions: LocalRegions,
    notices: Arc<Notices>,
}

impl Verbs {
    /// Opens the devices and listens for peers.
    ///
    /// # Errors
    /// In words: no library, no device, no active port, a setting out of range, or an address that cannot be listened at.
    pub fn start(settings: VerbsSettings) -> Result<Verbs, Unavailable> {
        let system = |error: io::Error| Unavailable(error.to_string());
        check(&settings)?;
        let nics = open_nics(&settings)?;
        let listener = TcpListener::bind(settings.listen)
            .map_err(|error| Unavailable(format!("cannot listen at {}: {error}", settings.listen)))?;
        let address = listener.local_addr().map_err(system)?;
        let secret = settings.secret.clone();
        let shared = Arc::new(Shared {
            settings,
            nics,
            regions: LocalRegions::default(),
            notices: Arc::default(),
        });
        let server = ExchangeServer::start(listener, secret, {
            let shared = Arc::clone(&shared);
            Arc::new(move || Session::new(&shared.nics, &shared.settings, &shared.notices))
        })
        .map_err(system)?;
        Ok(Verbs {
            shared,
            server,
            address,
        })
    }

    /// The side of a handshake that was asked, for owners who carry questions over a channel of their own: one session a
    /// connection. Dropping it ends every queue pair that it made.
    #[must_use]
    pub fn session(&self) -> Session {
        Session::new(&self.shared.nics, &self.shared.settings, &self.shared.notices)
    }

    /// A connection that only reads, as plainly as the device can: the limit to measure against.
    ///
    /// # Errors
    /// What the system or the peer says.
    pub fn raw_reads(&self, address: SocketAddr) -> io::Result<RawReads> {
        let exchange = TcpExchange::new(address, self.shared.settings.secret.clone());
        RawReads::connect(&self.shared, Box::new(exchange))
    }

    /// Connects through a channel of the caller's own.
    ///
    /// # Errors
    /// As for [`Transport::connect`].
    pub fn connect_through(
        &self,
        name: String,
        exchange: Box<dyn Exchange>,
        patience: Duration,
    ) -> Result<Box<dyn Peer>, ConnectError> {
        peer::connect(&self.shared, name, exchange, patience)
    }
}

impl Drop for Verbs {
    fn drop(&mut self) {
        self.server.close(self.address);
    }
}

fn check(settings: &VerbsSettings) -> Result<(), Unavailable> {
    let wrong = |what: &str| Err(Unavailable(format!("settings: {what}")));
    if settings.lanes == 0 || settings.lanes > 64 || settings.queue_depth < 2 || settings.signal_every == 0 {
        return wrong("1 to 64 lanes, a queue depth of 2 at least, and a signal every 1 or more");
    }
    if settings.slice_bytes < 4096 || settings.slice_bytes > 1 << 30 || settings.in_flight_max == 0 {
        return wrong("slices of 4 KiB to 1 GiB, and at least one in flight");
    }
    if settings.ack_timeout > 31 || settings.retries > 7 || wire::mtu_code(settings.mtu_max).is_none() {
        return wrong("ack_timeout up to 31, retries up to 7, an MTU of 256, 512, 1024, 2048 or 4096");
    }
    if settings.devices.len() > REMOTE_KEYS_MAX {
        return wrong("16 devices at most");
    }
    Ok(())
}

fn open_nics(settings: &VerbsSettings) -> Result<Vec<Arc<Nic>>, Unavailable> {
    let named = !settings.devices.is_empty();
    let names = if named {
        settings.devices.clone()
    } else {
        device_names()?
    };
    let (mut nics, mut refused) = (Vec::new(), Vec::new());
    for name in names.iter().take(REMOTE_KEYS_MAX) {
        match Nic::open(name, settings) {
            Ok(nic) => nics.push(nic),
            Err(why) if named => return Err(Unavailable(why)),
            Err(why) => refused.push(why),
        }
    }
    if nics.is_empty() {
        let why = if refused.is_empty() {
            "no device".to_owned()
        } else {
            refused.join("; ")
        };
        return Err(Unavailable(why));
    }
    Ok(nics)
}

impl Transport for Verbs {
    fn kind(&self) -> TransportKind {
        TransportKind::Verbs
    }

    fn address(&self) -> PeerAddress {
        PeerAddress::Verbs(self.address)
    }

    fn register(
        &self,
        region: &Arc<MemoryRegion>,
        _file: Option<BorrowedFd<'_>>,
        access: RemoteAccess,
    ) -> Result<Registration, RegisterError> {
        if access == RemoteAccess::ReadWrite && region.access() == Access::ReadOnly {
            return Err(RegisterError::ReadOnly);
        }
        let all = region.slice(0, region.bytes()).expect("all of it");
        self.shared.register(&all.into(), region.numa_node(), access, &|nic| {
            nic.register(region, access)
        })
    }

    fn register_device(
        &self,
        region: &Arc<DeviceRegion>,
        way: DirectWay,
        access: RemoteAccess,
    ) -> Result<Registration, RegisterError> {
        let all = region.slice(0, region.bytes()).expect("all of it");
        let node = region.gpu().numa_node();
        self.shared.register(&all.into(), node, access, &|nic| {
            nic.register_device(region, way, access)
        })
    }

    fn notices(&self) -> Option<&Notices> {
        self.shared.settings.notices.then_some(&*self.shared.notices)
    }

    fn connect(&self, address: &PeerAddress, patience: Duration) -> Result<Box<dyn Peer>, ConnectError> {
        let PeerAddress::Verbs(address) = address else {
            return Err(ConnectError::WrongKind {
                transport: TransportKind::Verbs,
                address: format!("{address:?}"),
            });
        };
        let exchange = TcpExchange::new(*address, self.shared.settings.secret.clone());
        self.connect_through(address.to_string(), Box::new(exchange), patience)
    }
}

impl Shared {
    /// Registers `all` of a region with every NIC by `one`.
    fn register(
        self: &Arc<Self>,
        all: &Place,
        node: Option<u32>,
        access: RemoteAccess,
        one: &(dyn Fn(&Nic) -> Result<Arc<Registered>, RegisterError> + Sync),
    ) -> Result<Registration, RegisterError> {
        // Pinning takes a second a gibibyte and NIC: all at the same time.
        let made: Vec<_> = std::thread::scope(|scope| {
            let running: Vec<_> = self.nics.iter().map(|nic| scope.spawn(|| one(nic))).collect();
            running
                .into_iter()
                .map(|thread| thread.join().expect("registering does not panic"))
                .collect()
        });
        let registered: Vec<Arc<Registered>> = made.into_iter().collect::<Result<_, _>>()?;
        let remote = RemoteRegion {
            id: RegionId::draw(),
            address: all.address(),
            bytes: all.len() as u64,
            access,
            remote_keys: registered.iter().map(|registered| registered.remote_key).collect(),
        };
        self.regions.insert(all.region_key(), node, &self.nics, &registered);
        let owner = RegisteredEverywhere {
            shared: Arc::clone(self),
            region: all.clone(),
            registered,
        };
        Ok(Registration::new(remote, Box::new(owner)))
    }
}

/// A region's registrations with every NIC.
struct RegisteredEverywhere {
    shared: Arc<Shared>,
    region: Place,
    registered: Vec<Arc<Registered>>,
}

impl Revoke for RegisteredEverywhere {
    fn revoke(&mut self) -> Result<(), RevokeError> {
        self.shared.regions.remove(self.region.region_key(), &self.registered);
        let mut failed = Vec::new();
        for (nic, registered) in self.shared.nics.iter().zip(&self.registered) {
            if let Err(error) = registered.deregister() {
                failed.push(format!("{}: {error}", nic.name()));
            }
        }
        if failed.is_empty() {
            Ok(())
        } else {
            Err(RevokeError(failed.join(", ")))
        }
    }
}
