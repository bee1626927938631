//! Random commands, faults and times: whatever the order, tables agree, bytes are right and nobody's slot is reused.

use crate::world::{answered, hash};
use kvtier_core::{
    Action, Answer, BlockHash, ClientId, Completion, CoreSettings, Departure, Event, Eviction, Extent, Failure,
    FetchScope, Fetched, ForgetScope, Generation, Hints, Label, LeaseId, NamespaceId, OperationId, Parent,
    PurgeEvidence, Realization, RealizationId, Request, ReservationId, Reserved, SealItem, SealRequest, Sealed,
    SegmentId, Tier, TierManager, Time, TrustDomain,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

const DOMAINS: [TrustDomain; 2] = [TrustDomain(1), TrustDomain(2)];

/// What was written: whose block, and in which generation.
type Bytes = (NamespaceId, BlockHash, u64);

struct Client {
    id: ClientId,
    domain: usize,
    leases: Vec<(LeaseId, Extent, Bytes)>,
    reservations: Vec<(ReservationId, Extent)>,
}

struct Storm {
    core: TierManager,
    now: Time,
    realization: RealizationId,
    clients: Vec<Client>,
    lost: Vec<Client>,
    next_client: u64,
    host: BTreeMap<(SegmentId, u64), Bytes>,
    nvme: BTreeMap<(SegmentId, u64), Bytes>,
    open: BTreeSet<(bool, SegmentId)>,
    pending: Vec<Action>,
    answered: Vec<Event>,
    waiting: BTreeMap<u64, (NamespaceId, Vec<BlockHash>)>,
    acknowledged: BTreeMap<NamespaceId, Generation>,
    recorded: BTreeMap<NamespaceId, Generation>,
    /// Destructions under way, each of what is older than a generation.
    destroying: BTreeMap<OperationId, (NamespaceId, Generation)>,
    forgetting: BTreeSet<OperationId>,
    /// What puts are part of just now.
    label: Option<Label>,
    /// Faults happen.
    rough: bool,
}

fn settings(nvme: bool, eviction: Eviction) -> CoreSettings {
    CoreSettings {
        eviction,
        ghosts_max: 512,
        host_bytes: 256 << 10,
        host_segment_bytes: 32 << 10,
        nvme_bytes: if nvme { 640 << 10 } else { 0 },
        nvme_segment_bytes: 64 << 10,
        block_bytes_max: 40 << 10,
        lease_ttl: Duration::from_millis(400),
        reservation_ttl: Duration::from_millis(300),
        operation_deadline: Duration::from_millis(500),
        tier_retry_backoff: Duration::from_millis(50),
        clients_max: 6,
        blocks_max: 60,
        label_sets_per_namespace_max: 4,
        leases_per_client_max: 12,
        reserved_bytes_per_client_max: 96 << 10,
        quarantine_bytes_per_client_max: 64 << 10,
        waiting_max: 6,
        waiting_per_client_max: 3,
        demotions_in_flight_max: 4,
        promotions_in_flight_max: 3,
        prefetch_blocks: 4,
        ..CoreSettings::default()
    }
}

impl Storm {
    fn new(nvme: bool, eviction: Eviction) -> Storm {
        let settings = settings(nvme, eviction).check().unwrap();
        let policy = settings.policy();
        let mut core = TierManager::new(settings, policy);
        for domain in DOMAINS {
            for name in ["a", "b"] {
                core.open_namespace(domain, name).unwrap();
            }
        }
        let realization = core.open_realization(Realization::default()).unwrap();
        Storm {
            core,
            now: Time(1),
            realization,
            clients: Vec::new(),
            lost: Vec::new(),
            next_client: 1,
            host: BTreeMap::new(),
            nvme: BTreeMap::new(),
            open: BTreeSet::new(),
            pending: Vec::new(),
            answered: Vec::new(),
            waiting: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            recorded: BTreeMap::new(),
            destroying: BTreeMap::new(),
            forgetting: BTreeSet::new(),
            label: None,
            rough: true,
        }
    }

    fn step(&mut self, command: (u8, u16, u16)) {
        let (kind, a, b) = command;
        self.label = (a % 3 > 0).then(|| Label(u64::from(b % 7)));
        match kind {
            0..=3 | 32..=35 => self.fetch(a, b),
            4..=8 => self.put(a, b),
            9 | 10 => self.release(a),
            11 => self.delete(a, b),
            12 if b % 4 == 0 => drop(self.core.invalidate(NamespaceId(u32::from(a) % 4), None, self.now)),
            13 if b % 4 == 0 => {
                let _ = self.core.flush((a % 2 == 0).then_some(DOMAINS[0]), self.now);
            }
            14 => self.come(a),
            15 if b % 3 == 0 => self.go(a, b),
            16 => self.core.set_quota(
                NamespaceId(u32::from(a) % 4),
                (b % 3 != 0).then_some(u64::from(b % 64) << 12),
            ),
            17 => self.grant(a, b),
            18 => self.seal_or_abandon(a, b),
            19 => self.lie(a),
            20..=28 => {
                for more in 0..1 + a % 8 {
                    self.answer_one(
                        a.wrapping_mul(31).wrapping_add(more),
                        b.wrapping_mul(17).wrapping_add(more * 7),
                    );
                    self.drain();
                }
            }
            36 if b % 4 == 0 && self.destroying.len() < 2 => self.destroy(a, b),
            37 if b % 4 == 0 => self.forget_scope(a, b),
            29 => self.pass(Duration::from_micros(u64::from(a) * 8)),
            _ => self.pass(Duration::from_micros(u64::from(a / 8))),
        }
        self.drain();
        self.core.check_invariants();
        assert!(self.core.statistics().waiting <= 6, "more wait than may");
    }

    fn pass(&mut self, duration: Duration) {
        self.now = self.now.after(duration);
        self.core.handle_timeout(self.now);
    }

    fn come(&mut self, a: u16) {
        let id = ClientId(self.next_client);
        let domain = usize::from(a % 2);
        if self.core.connect(id, DOMAINS[domain], self.now).is_ok() {
            self.clients.push(Client {
                id,
                domain,
                leases: Vec::new(),
                reservations: Vec::new(),
            });
            self.next_client += 1;
        }
    }

    fn go(&mut self, a: u16, b: u16) {
        if !self.lost.is_empty() && b.is_multiple_of(2) {
            let client = self.lost.remove(usize::from(a) % self.lost.len());
            self.core.disconnect(client.id, Departure::Gone, self.now);
        } else if !self.clients.is_empty() {
            let client = self.clients.remove(usize::from(a) % self.clients.len());
            let departure = [Departure::Clean, Departure::Gone, Departure::Alive][usize::from(b % 9) / 3];
            self.core.disconnect(client.id, departure, self.now);
            if departure == Departure::Alive {
                self.lost.push(client);
            }
        }
    }

    fn client(&self, a: u16) -> Option<usize> {
        (!self.clients.is_empty()).then(|| usize::from(a) % self.clients.len())
    }

    /// Chains of eight; a chain's blocks all have its own length.
    fn keys(a: u16, b: u16) -> (NamespaceId, Vec<BlockHash>, u32) {
        let chain = u64::from(a / 8 % 7);
        let depth = 1 + u64::from(b % 8);
        let length = [4 << 10, 12 << 10, 4000, 33 << 10][(chain % 4) as usize];
        (
            NamespaceId(u32::from(b / 8) % 2),
            (0..depth).map(|n| hash(chain * 100 + n)).collect(),
            length,
        )
    }

    fn request<'a>(&self, client: ClientId, namespace: NamespaceId, hashes: &'a [BlockHash]) -> Request<'a> {
        let deadline = self.now.after(Duration::from_millis(30));
        Request {
            client,
            namespace,
            realization: self.realization,
            hashes,
            hints: Hints {
                label: self.label,
                ..Hints::default()
            },
            deadline,
        }
    }

    fn seal_request<'a>(
        &self,
        client: ClientId,
        namespace: NamespaceId,
        generation: Generation,
        items: &'a [SealItem],
    ) -> SealRequest<'a> {
        SealRequest {
            client,
            namespace,
            realization: self.realization,
            generation,
            label: self.label,
            items,
        }
    }

    fn namespace_of(&self, client: usize, namespace: NamespaceId) -> NamespaceId {
        NamespaceId(namespace.0 + 2 * u32::try_from(self.clients[client].domain).unwrap())
    }

    fn fetch(&mut self, a: u16, b: u16) {
        let Some(client) = self.client(a) else { return };
        let (namespace, hashes, _) = Storm::keys(a, b);
        let namespace = self.namespace_of(client, namespace);
        let scope = if b.is_multiple_of(5) {
            FetchScope::Each
        } else {
            FetchScope::Prefix
        };
        let request = self.request(self.clients[client].id, namespace, &hashes);
        match self.core.fetch(&request, scope, self.now) {
            Ok(Answer::Ready(results)) => self.leased(self.clients[client].id, namespace, &hashes, &results),
            Ok(Answer::Pending(operation)) => drop(self.waiting.insert(operation.0, (namespace, hashes))),
            Err(_) => {}
        }
    }

    fn leased(&mut self, client: ClientId, namespace: NamespaceId, hashes: &[BlockHash], results: &[Fetched]) {
        let acknowledged = self.acknowledged.get(&namespace).map_or(1, |generation| generation.0);
        for (hash, result) in hashes.iter().zip(results) {
            let Fetched::Leased { lease, extent, .. } = result else {
                continue;
            };
            let bytes = self
                .host
                .get(&(extent.segment, extent.offset))
                .expect("a lease on memory that was written");
            assert_eq!((bytes.0, bytes.1), (namespace, *hash), "wrong bytes");
            assert!(bytes.2 >= acknowledged, "an older generation");
            let bytes = *bytes;
            let client = self
                .clients
                .iter_mut()
                .find(|other| other.id == client)
                .expect("a client that is here");
            client.leases.push((*lease, *extent, bytes));
        }
    }

    fn put(&mut self, a: u16, b: u16) {
        let Some(client) = self.client(a) else { return };
        let (namespace, hashes, length) = Storm::keys(a, b);
        let namespace = self.namespace_of(client, namespace);
        let request = self.request(self.clients[client].id, namespace, &hashes);
        match self.core.reserve(&request, &vec![length; hashes.len()], self.now) {
            Ok(Answer::Ready(results)) => self.granted(self.clients[client].id, namespace, &hashes, &results),
            Ok(Answer::Pending(operation)) => drop(self.waiting.insert(operation.0, (namespace, hashes))),
            Err(_) => {}
        }
    }

    /// Writes what was granted, and seals most of it.
    fn granted(&mut self, client: ClientId, namespace: NamespaceId, hashes: &[BlockHash], results: &[Reserved]) {
        let generation = self.core.generation(namespace);
        let mut items = Vec::new();
        let mut parent = Parent::Root;
        for (&hash, result) in hashes.iter().zip(results) {
            if let Reserved::Granted { reservation, extent } = result {
                self.take(extent);
                self.host
                    .insert((extent.segment, extent.offset), (namespace, hash, generation.0));
                if hash.0[0] % 7 == 0 {
                    let place = self
                        .clients
                        .iter()
                        .position(|other| other.id == client)
                        .expect("it is here");
                    self.clients[place].reservations.push((*reservation, *extent));
                } else {
                    items.push(SealItem {
                        reservation: *reservation,
                        hash,
                        parent,
                        length: extent.length,
                        tokens: 16,
                    });
                }
            }
            parent = Parent::Block(hash);
        }
        let request = self.seal_request(client, namespace, generation, &items);
        let sealed = self.core.seal(&request, self.now).unwrap();
        assert!(!sealed.contains(&Sealed::Invalid));
    }

    /// Nobody may still be looking at a slot that is given out.
    fn take(&self, extent: &Extent) {
        for client in self.clients.iter().chain(&self.lost) {
            for (_, leased, bytes) in &client.leases {
                assert_ne!(
                    (leased.segment, leased.offset),
                    (extent.segment, extent.offset),
                    "{bytes:?} is being read"
                );
            }
            for (_, reserved) in &client.reservations {
                assert_ne!(
                    (reserved.segment, reserved.offset),
                    (extent.segment, extent.offset),
                    "a slot given twice"
                );
            }
        }
        for action in &self.pending {
            if let Action::Demote { source: busy, .. } | Action::Promote { target: busy, .. } = action {
                assert_ne!(
                    (busy.segment, busy.offset),
                    (extent.segment, extent.offset),
                    "a device uses the slot"
                );
            }
        }
        assert!(
            self.open.contains(&(true, extent.segment)),
            "a slot in a segment that is not open"
        );
    }

    fn grant(&mut self, a: u16, b: u16) {
        let Some(client) = self.client(a) else { return };
        let granted = self
            .core
            .grant(self.clients[client].id, u32::from(b % 3 + 1) << 12, 2, self.now);
        for (reservation, extent) in granted {
            self.take(&extent);
            self.clients[client].reservations.push((reservation, extent));
        }
    }

    fn seal_or_abandon(&mut self, a: u16, b: u16) {
        let Some(client) = self.client(a) else { return };
        let Some((reservation, extent)) = self.clients[client].reservations.pop() else {
            return;
        };
        let id = self.clients[client].id;
        if b.is_multiple_of(3) {
            assert_eq!(self.core.abandon(id, &[reservation], self.now), 0);
            return;
        }
        let namespace = self.namespace_of(client, NamespaceId(u32::from(b % 2)));
        // Sometimes for a generation that is over.
        let generation = Generation(self.core.generation(namespace).0 - u64::from(b % 5 == 1));
        let (hash, parent) = (hash(u64::from(b) + 5000), Parent::Block(hash(u64::from(a % 12) * 100)));
        self.host
            .insert((extent.segment, extent.offset), (namespace, hash, generation.0));
        let item = SealItem {
            reservation,
            hash,
            parent,
            length: 4096,
            tokens: 70_000,
        };
        let items = [item];
        let request = self.seal_request(id, namespace, generation, &items);
        let sealed = self.core.seal(&request, self.now).unwrap();
        assert_ne!(sealed, [Sealed::Invalid]);
    }

    fn release(&mut self, a: u16) {
        let Some(client) = self.client(a) else { return };
        let leases = std::mem::take(&mut self.clients[client].leases);
        for (_, extent, bytes) in &leases {
            assert_eq!(
                self.host.get(&(extent.segment, extent.offset)),
                Some(bytes),
                "bytes changed under a lease"
            );
        }
        let ids: Vec<LeaseId> = leases.iter().map(|(lease, ..)| *lease).collect();
        let id = self.clients[client].id;
        assert_eq!(
            self.core.release(id, &ids, self.now),
            0,
            "a lease the core does not know"
        );
        assert_eq!(
            self.core.release(id, &ids, self.now) as usize,
            ids.len(),
            "a lease released twice"
        );
    }

    fn delete(&mut self, a: u16, b: u16) {
        let Some(client) = self.client(a) else { return };
        let (namespace, hashes, _) = Storm::keys(a, b);
        let namespace = self.namespace_of(client, namespace);
        let last = hashes.len() - 1;
        let request = self.request(self.clients[client].id, namespace, &hashes[last..]);
        self.core.delete(&request, self.now).unwrap();
        assert_eq!(self.core.lookup(&request, self.now).unwrap(), [None]);
    }

    fn destroy(&mut self, a: u16, b: u16) {
        let namespace = NamespaceId(u32::from(a) % 4);
        let older = self.acknowledged.get(&namespace).copied().unwrap_or(Generation(1));
        let grace = Duration::from_millis(u64::from(b % 64) * 10);
        let operation = self.core.destroy(namespace, grace, self.now);
        self.destroying.insert(operation, (namespace, older));
    }

    fn forget_scope(&mut self, a: u16, b: u16) {
        let (namespace, hashes, _) = Storm::keys(a, b);
        let namespace = NamespaceId(namespace.0 + 2 * u32::from(a % 2));
        let scope = match b % 5 {
            0 => ForgetScope::Realization(self.realization),
            1 | 2 => ForgetScope::Label(Label(u64::from(a % 7))),
            _ => ForgetScope::Hashes(&hashes[hashes.len() - 1..]),
        };
        let operation = self.core.forget_scope(namespace, &scope, self.now);
        self.forgetting.insert(operation);
    }

    fn destroyed(&self, namespace: NamespaceId, older: Generation, evidence: &PurgeEvidence) {
        // Generation 0 was never in force: a client wrote that in error, whenever it liked, and its seal was refused.
        let is_older = |bytes: &&Bytes| bytes.0 == namespace && 0 < bytes.2 && bytes.2 < older.0;
        if evidence.host_left == 0 {
            assert_eq!(self.host.values().find(is_older), None, "left in memory");
        }
        if evidence.nvme_left == 0 {
            assert_eq!(self.nvme.values().find(is_older), None, "left on NVMe");
        }
    }

    /// Nobody may touch what is zeroed.
    fn zero(&mut self, segment: SegmentId, ranges: &[Range<u64>]) {
        let within = |extent: &Extent| {
            extent.segment == segment
                && ranges
                    .iter()
                    .any(|range| range.start < extent.offset + u64::from(extent.length) && extent.offset < range.end)
        };
        for client in self.clients.iter().chain(&self.lost) {
            let leased = client.leases.iter().map(|(_, extent, _)| extent);
            for extent in leased.chain(client.reservations.iter().map(|(_, extent)| extent)) {
                assert!(!within(extent), "{extent:?} is zeroed under a client");
            }
        }
        self.host
            .retain(|(other, offset), _| *other != segment || !ranges.iter().any(|range| range.contains(offset)));
    }

    /// Another client's ids, invented ids, another domain's namespace.
    fn lie(&mut self, a: u16) {
        let Some(liar) = self.client(a) else { return };
        let id = self.clients[liar].id;
        for other in self.clients.iter().filter(|other| other.id != id) {
            for (lease, ..) in &other.leases {
                assert_eq!(self.core.release(id, &[*lease], self.now), 1);
            }
            for (reservation, _) in &other.reservations {
                assert_eq!(self.core.abandon(id, &[*reservation], self.now), 1);
            }
        }
        assert_eq!(self.core.release(id, &[LeaseId(u64::from(a) << 20)], self.now), 1);
        let foreign = NamespaceId(2 * u32::from(self.clients[liar].domain == 0));
        let hashes = [hash(0)];
        assert!(self.core.lookup(&self.request(id, foreign, &hashes), self.now).is_err());
    }

    fn drain(&mut self) {
        while let Some(action) = self.core.poll_action() {
            match &action {
                Action::FetchDone {
                    operation,
                    client,
                    results,
                } => {
                    let (namespace, hashes) = self.waiting.remove(&operation.0).expect("a fetch that waits");
                    self.leased(*client, namespace, &hashes, results);
                }
                Action::ReserveDone {
                    operation,
                    client,
                    results,
                } => {
                    let (namespace, hashes) = self.waiting.remove(&operation.0).expect("a reserve that waits");
                    self.granted(*client, namespace, &hashes, results);
                }
                Action::Invalidated {
                    namespace, generation, ..
                } => {
                    let recorded = self.recorded.get(namespace).map_or(1, |generation| generation.0);
                    assert!(generation.0 <= recorded, "acknowledged before it was recorded");
                    let known = self.acknowledged.entry(*namespace).or_insert(Generation(1));
                    *known = (*known).max(*generation);
                }
                Action::Destroyed {
                    operation, evidence, ..
                } => {
                    let (namespace, older) = self.destroying.remove(operation).expect("a destruction under way");
                    self.destroyed(namespace, older, evidence);
                }
                Action::Forgotten { operation, .. } => {
                    assert!(self.forgetting.remove(operation), "a deletion nobody asked for");
                }
                Action::Promote { target, .. } => {
                    self.take(target);
                    self.pending.push(action);
                }
                _ if answered(&action).is_some() => self.pending.push(action),
                _ => {}
            }
        }
    }

    /// Keeps what has to be answered.
    fn note(&mut self, action: Action) -> bool {
        if answered(&action).is_some() {
            self.pending.push(action);
        }
        true
    }

    fn answer_one(&mut self, a: u16, b: u16) {
        if self.rough && b.is_multiple_of(40) && !self.answered.is_empty() {
            let event = self.answered[usize::from(a) % self.answered.len()];
            self.core.handle_event(event, self.now);
            return;
        }
        if self.pending.is_empty() {
            return;
        }
        let action = self.pending.remove(usize::from(a) % self.pending.len());
        let operation = answered(&action).expect("only such are pending");
        if self.rough
            && b % 190 == 7
            && matches!(
                action,
                Action::Demote { .. } | Action::Promote { .. } | Action::Relocate { .. }
            )
        {
            // Lost: only a reset helps.
            return;
        }
        let fails = self.rough && b % 23 == 3 && !matches!(action, Action::ResetTier { .. });
        let outcome = if fails {
            let failure = [Failure::Busy, Failure::Io, Failure::Full, Failure::Corrupt][usize::from(b / 23 % 4)];
            let corrupt =
                failure == Failure::Corrupt && !matches!(action, Action::Promote { .. } | Action::Relocate { .. });
            Err(if corrupt { Failure::Io } else { failure })
        } else {
            Ok(self.carry_out(&action))
        };
        let event = Event { operation, outcome };
        self.answered.push(event);
        self.core.handle_event(event, self.now);
    }

    fn carry_out(&mut self, action: &Action) -> Completion {
        match action {
            Action::OpenSegment { tier, segment, .. } => {
                self.open.insert((*tier == Tier::Host, *segment));
            }
            Action::CloseSegment { tier, segment, .. } => {
                for client in self.clients.iter().chain(&self.lost) {
                    let leased = client.leases.iter().map(|(_, extent, _)| extent);
                    for extent in leased.chain(client.reservations.iter().map(|(_, extent)| extent)) {
                        assert!(
                            *tier == Tier::Nvme || extent.segment != *segment,
                            "a segment is closed under a client"
                        );
                    }
                }
                self.open.remove(&(*tier == Tier::Host, *segment));
                let memory = if *tier == Tier::Host {
                    &mut self.host
                } else {
                    &mut self.nvme
                };
                memory.retain(|(other, _), _| other != segment);
            }
            Action::Demote {
                source, target, label, ..
            } => {
                let bytes = self.host[&(source.segment, source.offset)];
                assert_eq!(
                    (bytes.0, bytes.1, bytes.2),
                    (label.namespace, label.hash, label.generation.0)
                );
                assert!(
                    self.open.contains(&(false, target.segment)),
                    "a write to a segment that is not open"
                );
                self.nvme.insert((target.segment, target.offset), bytes);
                return Completion::Written {
                    checksum: bytes.1.0[0].into(),
                };
            }
            Action::Promote {
                source,
                target,
                label,
                checksum,
                ..
            } => {
                let bytes = self.nvme[&(source.segment, source.offset)];
                let expected = (label.namespace, label.hash, label.generation.0);
                assert_eq!((bytes.0, bytes.1, bytes.2), expected, "wrong bytes are read");
                assert_eq!(*checksum, u32::from(bytes.1.0[0]));
                self.host.insert((target.segment, target.offset), bytes);
            }
            Action::Relocate {
                source, target, label, ..
            } => {
                let bytes = self.nvme[&(source.segment, source.offset)];
                assert_eq!(
                    (bytes.0, bytes.1),
                    (label.namespace, label.hash),
                    "wrong bytes are moved"
                );
                self.nvme.insert((target.segment, target.offset), bytes);
            }
            Action::RecordGeneration {
                namespace, generation, ..
            } => {
                let known = self.recorded.entry(*namespace).or_insert(Generation(1));
                *known = (*known).max(*generation);
            }
            Action::ZeroSegment { segment, ranges, .. } => self.zero(*segment, ranges),
            Action::EraseRecords {
                segment,
                pages,
                namespace,
                keep,
                ..
            } => {
                let before = self.nvme.len();
                let goes = |offset: u64| {
                    let page = u32::try_from(offset / 4096).unwrap();
                    pages.contains(&page) && !keep.iter().any(|kept| kept.start == page)
                };
                self.nvme
                    .retain(|(other, offset), bytes| other != segment || bytes.0 != *namespace || !goes(*offset));
                return Completion::Erased {
                    records: u32::try_from(before - self.nvme.len()).unwrap(),
                    bytes: 0,
                };
            }
            Action::ResetTier { .. } => {
                // What the tier had in flight never happens.
                self.pending.retain(|action| {
                    matches!(
                        action,
                        Action::RecordGeneration { .. } | Action::ResetTier { .. } | Action::ZeroSegment { .. }
                    ) || matches!(action, Action::OpenSegment { tier: Tier::Host, .. })
                        || matches!(action, Action::CloseSegment { tier: Tier::Host, .. })
                });
            }
            _ => {}
        }
        Completion::Done
    }

    /// The faults stop: everything comes to rest, and nothing is left behind.
    fn settle(&mut self) {
        self.rough = false;

        for client in std::mem::take(&mut self.clients)
            .into_iter()
            .chain(std::mem::take(&mut self.lost))
        {
            self.core.disconnect(client.id, Departure::Gone, self.now);
            // What it frees may serve another one, which leaves next.
            while self.core.poll_action().is_some_and(|action| self.note(action)) {}
        }
        self.waiting.clear();
        for _ in 0..2000 {
            self.drain();
            while !self.pending.is_empty() {
                self.answer_one(0, 1);
                self.drain();
            }
            let Some(due) = self.core.poll_timeout() else { break };
            self.now = self.now.max(due);
            self.core.handle_timeout(self.now);
        }
        self.core.check_invariants();
        let statistics = self.core.statistics();
        let left = (
            statistics.leases,
            statistics.reservations,
            statistics.waiting,
            statistics.operations_in_flight,
        );
        assert_eq!(
            left,
            (0, 0, 0, 0),
            "leases, reservations, waiting, operations: {statistics:?}"
        );
        assert_eq!(statistics.clients, 0);
        assert!(
            self.destroying.is_empty() && self.forgetting.is_empty(),
            "{:?} and {:?} do not end",
            self.destroying,
            self.forgetting
        );
        // Progress: a new client can put and get, whatever happened before.
        for namespace in 0..4 {
            self.core.set_quota(NamespaceId(namespace), None);
        }
        self.come(0);
        let before = self.core.statistics().puts_published;
        for chain in 0..8 {
            self.put(chain * 8, 3);
            for _ in 0..200 {
                self.drain();
                while !self.pending.is_empty() {
                    self.answer_one(0, 1);
                    self.drain();
                }
                if self.waiting.is_empty() {
                    break;
                }
                let due = self.core.poll_timeout().expect("somebody waits");
                self.now = self.now.max(due);
                self.core.handle_timeout(self.now);
            }
            self.release(0);
            while let Some((reservation, _)) = self.clients[0].reservations.pop() {
                self.core.abandon(self.clients[0].id, &[reservation], self.now);
            }
        }
        let statistics = self.core.statistics();
        let present = statistics.puts_present;
        assert!(
            statistics.puts_published > before || present > 0,
            "no progress: {statistics:?}"
        );
    }
}

fn commands() -> impl Strategy<Value = Vec<(u8, u16, u16)>> {
    prop::collection::vec((0_u8..38, any::<u16>(), any::<u16>()), 1..400)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_commands_faults_and_times_keeps_the_promises(commands in commands(), nvme in any::<bool>(), hazard in any::<bool>()) {
        let mut storm = Storm::new(nvme, if hazard { Eviction::Hazard } else { Eviction::Lru });
        storm.come(0);
        storm.come(1);
        for command in commands {
            storm.step(command);
        }
        storm.settle();
    }
}

/// It wrote under a generation that never was into a slot that a destruction had zeroed, and the oracle called that a block that
/// was left.
#[test]
fn what_is_written_under_a_generation_that_never_was_is_no_block_that_a_destruction_left() {
    let commands: [(u8, u16, u16); 29] = [
        (9, 0, 41),
        (6, 64167, 55992),
        (15, 22766, 58518),
        (5, 26341, 39627),
        (16, 8998, 13124),
        (14, 14844, 27724),
        (25, 43946, 63698),
        (4, 61103, 9670),
        (14, 17584, 27376),
        (14, 3261, 47740),
        (14, 21669, 46193),
        (17, 5213, 54675),
        (26, 2766, 7419),
        (15, 27075, 43788),
        (29, 48331, 57135),
        (6, 27171, 26415),
        (14, 7700, 58180),
        (4, 3892, 8938),
        (25, 38293, 530),
        (28, 43353, 45995),
        (36, 13981, 1316),
        (24, 54697, 21530),
        (22, 17434, 25276),
        (14, 29087, 37903),
        (4, 48276, 48398),
        (18, 49638, 25571),
        (18, 54006, 46605),
        (20, 38147, 23634),
        (22, 53133, 47147),
    ];
    let mut storm = Storm::new(true, Eviction::Hazard);
    storm.come(0);
    storm.come(1);
    for command in commands {
        storm.step(command);
    }
    storm.settle();
}
