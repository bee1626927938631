//! Host segments as peers may read them: registered when a block of theirs is first leased to a peer, or one is read into
//! them, and revoked when their trust domain is purged or their memory goes.
//!
//! A registration is of a whole segment: members of a cluster trust each other with the memory of the domains that they
//! share. No peer writes to it.

use std::collections::HashMap;
use std::sync::Arc;

use kvtier_core::{SegmentId, TrustDomain};
use kvtier_storage::host::HostTier;
use kvtier_transfer::memory::{MemoryRegion, PageRequest};
use kvtier_transfer::rdma::Verbs;
use kvtier_transfer::tcp::Tcp;
use kvtier_transfer::{Registration, RemoteAccess, Transport};
use parking_lot::Mutex;

use super::weighing::PROBE_BYTES;

/// How a peer reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Way {
    Tcp,
    Verbs,
}

/// See the module.
pub(crate) struct Regions {
    host: Arc<HostTier>,
    tcp: Arc<Tcp>,
    verbs: Option<Arc<Verbs>>,
    open: Mutex<HashMap<(SegmentId, Way), Registered>>,
    /// Nobody's bytes, for peers to measure with.
    probes: Mutex<HashMap<Way, (Registration, Vec<u8>)>>,
}

struct Registered {
    domain: TrustDomain,
    registration: Registration,
    encoded: Arc<Vec<u8>>,
}

impl Regions {
    pub(super) fn new(host: Arc<HostTier>, tcp: Arc<Tcp>, verbs: Option<Arc<Verbs>>) -> Regions {
        Regions {
            host,
            tcp,
            verbs,
            open: Mutex::default(),
            probes: Mutex::default(),
        }
    }

    fn transport(&self, way: Way) -> Result<&dyn Transport, String> {
        match (way, &self.verbs) {
            (Way::Tcp, _) => Ok(&*self.tcp),
            (Way::Verbs, Some(verbs)) => Ok(&**verbs),
            (Way::Verbs, None) => Err("this node has no RDMA".into()),
        }
    }

    /// A region that holds nobody's bytes.
    pub(super) fn probe(&self, way: Way) -> Result<Vec<u8>, String> {
        let mut probes = self.probes.lock();
        if let Some((_, encoded)) = probes.get(&way) {
            return Ok(encoded.clone());
        }
        let (region, _) =
            MemoryRegion::create("kvtier-probe", PROBE_BYTES, PageRequest::Small).map_err(|error| error.to_string())?;
        // Pages that are there: else a probe would measure how they are made.
        region.zero();
        let registration = self
            .transport(way)?
            .register(&region, None, RemoteAccess::Read)
            .map_err(|error| error.to_string())?;
        let encoded = registration.remote().encode();
        probes.insert(way, (registration, encoded.clone()));
        Ok(encoded)
    }

    /// What to tell a peer of a segment that holds something leased. Registers it if need be.
    pub(super) fn of(&self, segment: SegmentId, domain: TrustDomain, way: Way) -> Result<Arc<Vec<u8>>, String> {
        // Under the lock while it is pinned: who needs the same segment waits for that in any case.
        let mut open = self.open.lock();
        if let Some(registered) = open.get(&(segment, way)) {
            return Ok(Arc::clone(&registered.encoded));
        }
        let memory = self.host.segment(segment).ok_or("the segment is closed")?;
        let registration = self
            .transport(way)?
            .register(&memory.region, None, RemoteAccess::Read)
            .map_err(|error| error.to_string())?;
        let encoded = Arc::new(registration.remote().encode());
        let registered = Registered {
            domain,
            registration,
            encoded: Arc::clone(&encoded),
        };
        open.insert((segment, way), registered);
        Ok(encoded)
    }

    /// Takes a segment back from all peers. Zeroed first: who reads until then reads nothing of anybody's. False where a
    /// peer may still reach it: its memory must not be given back.
    pub(crate) fn close(&self, segment: SegmentId) -> bool {
        let taken: Vec<Registered> = {
            let mut open = self.open.lock();
            [Way::Tcp, Way::Verbs]
                .into_iter()
                .filter_map(|way| open.remove(&(segment, way)))
                .collect()
        };
        if taken.is_empty() {
            return true;
        }
        if let Some(memory) = self.host.segment(segment) {
            memory.region.zero();
        }
        revoke(taken)
    }

    /// Takes every segment of a domain back. False where a peer may still reach one.
    pub(super) fn revoke(&self, domain: TrustDomain) -> bool {
        let taken: Vec<Registered> = {
            let mut open = self.open.lock();
            let keys: Vec<_> = open
                .iter()
                .filter(|(_, registered)| registered.domain == domain)
                .map(|(key, _)| *key)
                .collect();
            keys.iter().filter_map(|key| open.remove(key)).collect()
        };
        revoke(taken)
    }

    /// Registrations now.
    pub(super) fn count(&self) -> usize {
        self.open.lock().len()
    }
}

fn revoke(taken: Vec<Registered>) -> bool {
    let mut all = true;
    for registered in taken {
        if let Err(error) = registered.registration.revoke() {
            tracing::error!(%error, "a segment could not be taken back from peers");
            all = false;
        }
    }
    all
}
