use std::collections::BTreeMap;
use std::time::Duration;

use kvtier_core::{
    Action, Answer, BlockHash, CheckedCoreSettings, ClientId, Completion, CoreSettings, Event, Eviction, FetchScope,
    Fetched, Hints, LeaseId, NamespaceId, OperationId, Parent, Realization, RealizationId, Request, Reserved, SealItem,
    SealRequest, Statistics, Tier, TierManager, Time, TrustDomain,
};

use super::GateError;
use super::hardware::GateHardware;
use super::life::{seconds, time};
use super::link::Link;

/// Header and index of an NVMe segment, as the daemon has them.
const SEGMENT_HEADER_BYTES: u64 = 4096;
const RECORD_INDEX_BYTES: u64 = 64;

/// Puts wait for room this long.
const PUT_PATIENCE: Duration = Duration::from_secs(1);

/// Longer than any queue of a simulated device: what is slow is not broken.
const NEVER: Duration = Duration::from_secs(86_400);

/// What the node's own tiers hold, and how they choose what goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LocalSetup {
    pub(super) nvme: bool,
    pub(super) eviction: Eviction,
}

/// What came of a call, now or later. Requests are named by their place in the trace.
#[derive(Debug)]
pub(super) enum Told {
    Fetched {
        request: usize,
        results: Vec<Fetched>,
    },
    Reserved {
        request: usize,
        results: Vec<Reserved>,
    },
    /// A device will answer at this time.
    Device {
        at: Time,
        event: Event,
    },
}

/// What is put under which hash, in prefix order.
#[derive(Clone, Debug)]
pub(super) struct PutBlock {
    pub(super) hash: BlockHash,
    pub(super) parent: Parent,
    pub(super) tokens: u32,
}

/// The real tier manager over devices that move no bytes and take their time.
pub(super) struct Local {
    manager: TierManager,
    client: ClientId,
    namespace: NamespaceId,
    realization: RealizationId,
    block_bytes: u32,
    pub(super) nvme_read: Link,
    pub(super) nvme_write: Link,
    fetches: BTreeMap<OperationId, usize>,
    reserves: BTreeMap<OperationId, usize>,
}

impl Local {
    pub(super) fn new(hardware: &GateHardware, setup: LocalSetup, block_bytes: u64) -> Result<Local, GateError> {
        let settings = settings(hardware, setup, block_bytes)?;
        let policy = settings.policy();
        let mut manager = TierManager::new(settings, policy);
        let (client, domain) = (ClientId(1), TrustDomain(1));
        manager
            .connect(client, domain, Time::ZERO)
            .expect("the first client fits");
        let (namespace, _) = manager
            .open_namespace(domain, "trace")
            .expect("the first namespace fits");
        let realization = manager
            .open_realization(Realization::digest(&[("model", "trace")]))
            .expect("the first realization fits");
        let nvme = hardware.nvme.as_ref();
        let link = |gb_per_s: Option<f64>| Link::new(gb_per_s.unwrap_or(1.0), nvme.map_or(0.0, |nvme| nvme.latency_ms));
        Ok(Local {
            manager,
            client,
            namespace,
            realization,
            block_bytes: block_bytes as u32,
            nvme_read: link(nvme.map(|nvme| nvme.read_gb_per_s)),
            nvme_write: link(nvme.map(|nvme| nvme.write_gb_per_s)),
            fetches: BTreeMap::new(),
            reserves: BTreeMap::new(),
        })
    }

    pub(super) fn fetch(
        &mut self,
        request: usize,
        hashes: &[BlockHash],
        (now, deadline): (Time, Time),
        told: &mut Vec<Told>,
    ) {
        let asked = self.asked(hashes, deadline);
        match self.manager.fetch(&asked, FetchScope::Prefix, now) {
            Ok(Answer::Ready(results)) => told.push(Told::Fetched { request, results }),
            Ok(Answer::Pending(operation)) => {
                self.fetches.insert(operation, request);
            }
            // Full: a miss.
            Err(_) => told.push(Told::Fetched {
                request,
                results: Vec::new(),
            }),
        }
        self.pump(now, told);
    }

    pub(super) fn release(&mut self, leases: &[LeaseId], now: Time, told: &mut Vec<Told>) {
        self.manager.release(self.client, leases, now);
        self.pump(now, told);
    }

    /// Asks for slots; [`Local::seal`] follows when they are there.
    pub(super) fn reserve(&mut self, request: usize, hashes: &[BlockHash], now: Time, told: &mut Vec<Told>) {
        let asked = self.asked(hashes, now.after(PUT_PATIENCE));
        match self.manager.reserve(&asked, &vec![self.block_bytes; hashes.len()], now) {
            Ok(Answer::Ready(results)) => told.push(Told::Reserved { request, results }),
            Ok(Answer::Pending(operation)) => {
                self.reserves.insert(operation, request);
            }
            Err(_) => {}
        }
        self.pump(now, told);
    }

    /// Publishes what was granted; how many blocks.
    pub(super) fn seal(&mut self, blocks: &[PutBlock], results: &[Reserved], now: Time, told: &mut Vec<Told>) -> u64 {
        let items: Vec<SealItem> = blocks
            .iter()
            .zip(results)
            .filter_map(|(block, outcome)| match outcome {
                Reserved::Granted { reservation, .. } => Some(SealItem {
                    reservation: *reservation,
                    hash: block.hash,
                    parent: block.parent,
                    length: self.block_bytes,
                    tokens: block.tokens,
                }),
                Reserved::Present | Reserved::Busy => None,
            })
            .collect();
        let request = SealRequest {
            client: self.client,
            namespace: self.namespace,
            realization: self.realization,
            generation: self.manager.generation(self.namespace),
            label: None,
            items: &items,
        };
        let sealed = self.manager.seal(&request, now).expect("a seal is in bounds");
        self.pump(now, told);
        let published = |outcome: &&kvtier_core::Sealed| matches!(outcome, kvtier_core::Sealed::Published);
        sealed.iter().filter(published).count() as u64
    }

    pub(super) fn handle(&mut self, event: Event, now: Time, told: &mut Vec<Told>) {
        self.manager.handle_event(event, now);
        self.pump(now, told);
    }

    pub(super) fn poll_timeout(&self) -> Option<Time> {
        self.manager.poll_timeout()
    }

    pub(super) fn handle_timeout(&mut self, now: Time, told: &mut Vec<Told>) {
        self.manager.handle_timeout(now);
        self.pump(now, told);
    }

    pub(super) fn statistics(&self) -> Statistics {
        self.manager.check_invariants();
        self.manager.statistics()
    }

    fn asked<'a>(&self, hashes: &'a [BlockHash], deadline: Time) -> Request<'a> {
        Request {
            client: self.client,
            namespace: self.namespace,
            realization: self.realization,
            hashes,
            hints: Hints::default(),
            deadline,
        }
    }

    fn pump(&mut self, now: Time, told: &mut Vec<Told>) {
        while let Some(action) = self.manager.poll_action() {
            self.take_on(action, now, told);
        }
    }

    fn take_on(&mut self, action: Action, now: Time, told: &mut Vec<Told>) {
        let now_s = seconds(now);
        let (operation, at, completion) = match action {
            Action::FetchDone { operation, results, .. } => {
                if let Some(request) = self.fetches.remove(&operation) {
                    told.push(Told::Fetched { request, results });
                }
                return;
            }
            Action::ReserveDone { operation, results, .. } => {
                if let Some(request) = self.reserves.remove(&operation) {
                    told.push(Told::Reserved { request, results });
                }
                return;
            }
            Action::Flushed { .. }
            | Action::ForgetRecord { .. }
            | Action::Invalidated { .. }
            | Action::Destroyed { .. }
            | Action::Forgotten { .. } => return,
            Action::Demote { operation, target, .. } => {
                let end_s = self.nvme_write.pass(now_s, u64::from(target.length));
                (operation, time(end_s), Completion::Written { checksum: 0 })
            }
            Action::Promote { operation, source, .. } => {
                let end_s = self.nvme_read.pass(now_s, u64::from(source.length));
                (operation, time(end_s), Completion::Done)
            }
            Action::Relocate { operation, source, .. } => {
                let bytes = u64::from(source.length);
                let read_s = self.nvme_read.pass(now_s, bytes);
                (operation, time(self.nvme_write.pass(read_s, bytes)), Completion::Done)
            }
            Action::OpenSegment { operation, .. }
            | Action::CloseSegment { operation, .. }
            | Action::SealSegment { operation, .. }
            | Action::SyncTier { operation, .. }
            | Action::ResetTier { operation, .. }
            | Action::RecordGeneration { operation, .. }
            | Action::PromoteToHbm { operation, .. }
            | Action::ZeroSegment { operation, .. } => (operation, now, Completion::Done),
            Action::EraseRecords { operation, .. } => (operation, now, Completion::Erased { records: 0, bytes: 0 }),
        };
        let event = Event {
            operation,
            outcome: Ok(completion),
        };
        told.push(Told::Device { at: at.max(now), event });
    }
}

/// Whether a copy lay in host memory when it was asked for.
pub(super) fn lay_in_host(tier: Tier) -> bool {
    matches!(tier, Tier::Host)
}

fn settings(hardware: &GateHardware, setup: LocalSetup, block_bytes: u64) -> Result<CheckedCoreSettings, GateError> {
    let bytes = |gib: f64| (gib * (1u64 << 30) as f64) as u64;
    let slot_bytes = block_bytes.next_multiple_of(4096);
    let host_bytes = bytes(hardware.host.gib);
    let blocks = host_bytes / slot_bytes;
    if block_bytes > 1 << 30 {
        return Err(GateError(format!("a block is {block_bytes} bytes: at most 1 GiB")));
    }
    if blocks < 16 {
        return Err(GateError(format!(
            "host.gib = {}: a block is {block_bytes} bytes: give room for at least 16",
            hardware.host.gib
        )));
    }
    let host_segment_bytes = slot_bytes * (blocks / 64).clamp(1, 16);
    let nvme_gib = hardware
        .nvme
        .as_ref()
        .filter(|_| setup.nvme)
        .map_or(0.0, |nvme| nvme.gib);
    let nvme_bytes = bytes(nvme_gib);
    let nvme_blocks = nvme_bytes / slot_bytes;
    if setup.nvme && nvme_blocks < 32 {
        return Err(GateError(format!(
            "nvme.gib = {nvme_gib}: a block is {block_bytes} bytes: give room for at least 32"
        )));
    }
    let records = (nvme_blocks / 64).clamp(1, 16);
    let nvme_segment_bytes =
        (SEGMENT_HEADER_BYTES + records * (slot_bytes + RECORD_INDEX_BYTES)).next_multiple_of(4096);
    CoreSettings {
        host_bytes: host_bytes / host_segment_bytes * host_segment_bytes,
        host_segment_bytes,
        nvme_bytes,
        nvme_segment_bytes,
        nvme_segment_header_bytes: SEGMENT_HEADER_BYTES,
        nvme_record_index_bytes: RECORD_INDEX_BYTES,
        block_bytes_max: 1 << 30,
        lease_ttl: NEVER,
        reservation_ttl: NEVER,
        operation_deadline: NEVER,
        leases_per_client_max: 1 << 24,
        reserved_bytes_per_client_max: u64::MAX >> 1,
        quarantine_bytes_per_client_max: u64::MAX >> 1,
        waiting_per_client_max: 65_536,
        batch_keys_max: 1 << 20,
        eviction: setup.eviction,
        ..CoreSettings::default()
    }
    .check()
    .map_err(|error| GateError(error.to_string()))
}
