//! Within one process: a copy from region to region, under the same rules as over a wire.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::copier::{Copier, Patience, Resolve, at_once};
use crate::memory::{Access, MemoryRegion, MemorySlice};
use crate::registry::Registry;
use crate::remote::{RegionId, RemoteAccess, RemoteRegion, draw_u64};
use crate::transfer::{self, Cause, Piece, Refusal, Refused, Transfer};
use crate::transport::{
    ConnectError, Peer, PeerAddress, RailReport, RegisterError, Registration, Revoke, RevokeError, Transport,
    TransportKind,
};

/// Pieces in flight to one peer.
const IN_FLIGHT_MAX: usize = 8192;

/// Every loopback transport of this process, by its number.
static LIVING: LazyLock<Mutex<HashMap<u64, Weak<Registry>>>> = LazyLock::new(Mutex::default);

/// Moves bytes between regions of one process.
pub struct Loopback {
    number: u64,
    registry: Arc<Registry>,
    copier: Arc<Copier>,
}

impl Loopback {
    /// One that others of this process can connect to until it is dropped.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start() -> std::io::Result<Loopback> {
        let number = draw_u64();
        let registry = Arc::new(Registry::default());
        LIVING.lock().insert(number, Arc::downgrade(&registry));
        Ok(Loopback {
            number,
            registry,
            copier: Arc::new(Copier::start("kvtier-loopback")?),
        })
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        LIVING.lock().remove(&self.number);
    }
}

impl Transport for Loopback {
    fn kind(&self) -> TransportKind {
        TransportKind::Loopback
    }

    fn address(&self) -> PeerAddress {
        PeerAddress::Loopback(self.number)
    }

    fn register(
        &self,
        region: &Arc<MemoryRegion>,
        _file: Option<BorrowedFd<'_>>,
        access: RemoteAccess,
    ) -> Result<Registration, RegisterError> {
        register_in(&self.registry, region, access)
    }

    fn connect(&self, address: &PeerAddress, _patience: Duration) -> Result<Box<dyn Peer>, ConnectError> {
        let PeerAddress::Loopback(number) = address else {
            return Err(ConnectError::WrongKind {
                transport: TransportKind::Loopback,
                address: format!("{address:?}"),
            });
        };
        let registry = LIVING.lock().get(number).cloned();
        let registry =
            registry
                .filter(|registry| registry.strong_count() > 0)
                .ok_or_else(|| ConnectError::Unreachable {
                    address: format!("{address:?}"),
                    what: "no such transport in this process".to_owned(),
                })?;
        Ok(Box::new(LoopbackPeer {
            remote: Arc::new(RemoteRegistry(registry)),
            copier: Arc::clone(&self.copier),
            counters: Arc::default(),
        }))
    }
}

/// Registers with a registry alone: what every transport without NICs does.
pub(crate) fn register_in(
    registry: &Arc<Registry>,
    region: &Arc<MemoryRegion>,
    access: RemoteAccess,
) -> Result<Registration, RegisterError> {
    if access == RemoteAccess::ReadWrite && region.access() == Access::ReadOnly {
        return Err(RegisterError::ReadOnly);
    }
    let id = registry.insert(region, access);
    let remote = RemoteRegion {
        id,
        address: 0,
        bytes: region.bytes() as u64,
        access,
        remote_keys: Vec::new(),
    };
    Ok(Registration::new(
        remote,
        Box::new(Registered {
            registry: Arc::clone(registry),
            id,
        }),
    ))
}

struct Registered {
    registry: Arc<Registry>,
    id: RegionId,
}

impl Revoke for Registered {
    fn revoke(&mut self) -> Result<(), RevokeError> {
        self.registry.revoke(self.id)
    }
}

/// The other end, in this process.
struct RemoteRegistry(Weak<Registry>);

impl Resolve for RemoteRegistry {
    fn with(
        &self,
        piece: &Piece,
        _patience: Patience,
        copy: &mut dyn FnMut(&MemorySlice) -> Result<(), Cause>,
    ) -> Option<Result<(), Cause>> {
        let Some(registry) = self.0.upgrade() else {
            return Some(Err(Cause::PeerGone("the transport was dropped".to_owned())));
        };
        let (remote, direction) = (&piece.remote, piece.direction);
        let begun = registry.begin(remote.region().id, remote.offset(), remote.len(), direction, None);
        Some(match begun {
            Ok(range) => copy(&range.slice),
            Err(denied) => Err(Cause::Denied(denied.words().to_owned())),
        })
    }
}

/// What a copying peer counts.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) in_flight: AtomicUsize,
    pub(crate) bytes: AtomicU64,
}

impl Counters {
    /// Counts a batch in, if `limit` allows.
    pub(crate) fn enter(&self, pieces: usize, limit: usize) -> Result<(), Refusal> {
        let in_flight = self.in_flight.fetch_add(pieces, Ordering::Relaxed);
        if in_flight + pieces > limit {
            self.in_flight.fetch_sub(pieces, Ordering::Relaxed);
            return Err(Refusal::Busy { in_flight, limit });
        }
        Ok(())
    }

    /// Counts a batch out.
    fn leave(&self, pieces: usize, bytes: u64) {
        self.in_flight.fetch_sub(pieces, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

struct LoopbackPeer {
    remote: Arc<RemoteRegistry>,
    copier: Arc<Copier>,
    counters: Arc<Counters>,
}

impl Peer for LoopbackPeer {
    fn submit(&self, pieces: Vec<Piece>, deadline: Duration) -> Result<Transfer, Refused> {
        submit_copies(
            pieces,
            deadline,
            &self.counters,
            &self.copier,
            Arc::clone(&self.remote) as _,
        )
    }

    fn rails(&self) -> Vec<RailReport> {
        vec![RailReport {
            name: "memory".to_owned(),
            usable: self.remote.0.strong_count() > 0,
            bytes: self.counters.bytes.load(Ordering::Relaxed),
            bytes_per_second: 0.0,
            errors: 0,
            reconnects: 0,
        }]
    }
}

/// Checks and queues a batch of copies.
pub(crate) fn submit_copies(
    pieces: Vec<Piece>,
    deadline: Duration,
    counters: &Arc<Counters>,
    copier: &Copier,
    resolve: Arc<dyn Resolve>,
) -> Result<Transfer, Refused> {
    let admitted = transfer::check_host(&pieces).and_then(|()| counters.enter(pieces.len(), IN_FLIGHT_MAX));
    if let Err(reason) = admitted {
        return Err(Refused { reason, pieces });
    }
    let (count, bytes) = (pieces.len(), pieces.iter().map(|piece| piece.remote.len()).sum());
    // A deadline that has passed already is found out below.
    if !deadline.is_zero()
        && let Some(outcome) = at_once(&pieces, bytes, &*resolve)
    {
        counters.leave(count, bytes);
        return Ok(Transfer::done(outcome));
    }
    let counters = Arc::clone(counters);
    let on_done = Box::new(move || counters.leave(count, bytes));
    let batch = copier.submit(pieces, Instant::now() + deadline, resolve, on_done);
    Ok(Transfer::new(batch))
}
