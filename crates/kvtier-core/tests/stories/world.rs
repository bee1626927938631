//! A tiny driver: carries out actions in memory, at once or when told to, and remembers what lies where.

use kvtier_core::{
    Action, Answer, BlockHash, ClientId, Completion, CoreSettings, Departure, Event, Extent, Failure, FetchScope,
    Fetched, ForgetScope, Generation, Hints, Label, LeafFirstLru, LeaseId, NamespaceId, OperationId, Parent,
    PurgeEvidence, Realization, RealizationId, RecordLabel, Request, ReservationId, Reserved, Restored, RestoredRecord,
    RestoredSegment, SealItem, SealRequest, Sealed, SegmentId, Tier, TierManager, Time, TrustDomain,
};
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

pub(crate) const KIB: u32 = 1024;
pub(crate) const SECOND: u64 = 1_000_000_000;
pub(crate) const ME: ClientId = ClientId(1);
/// Of the same domain, for stories with two clients. Connects itself.
pub(crate) const OTHER: ClientId = ClientId(2);
/// For stories with two domains. Connects itself.
pub(crate) const STRANGER: ClientId = ClientId(3);
pub(crate) const DOMAIN: TrustDomain = TrustDomain(7);

/// What lies at an extent: the hash of the block that was written there.
type Memory = BTreeMap<(SegmentId, u64), BlockHash>;

pub(crate) struct World {
    pub(crate) core: TierManager,
    pub(crate) now: Time,
    pub(crate) namespace: NamespaceId,
    pub(crate) generation: Generation,
    pub(crate) realization: RealizationId,
    /// What puts are part of.
    pub(crate) label: Option<Label>,
    /// Whether fetches may be answered from device memory.
    pub(crate) device: bool,
    pub(crate) hbm: Memory,
    pub(crate) host: Memory,
    pub(crate) nvme: Memory,
    /// What a restart would find: segments with the records that were written and not forgotten.
    pub(crate) log: BTreeMap<SegmentId, RestoredSegment>,
    /// Actions not yet answered, oldest first.
    pub(crate) held: Vec<Action>,
    /// Kinds of actions that are held back instead of being answered at once.
    pub(crate) hold: fn(&Action) -> bool,
    /// Kinds of actions that fail, and how.
    pub(crate) fail: fn(&Action) -> Option<Failure>,
    pub(crate) fetched: BTreeMap<OperationId, Vec<Fetched>>,
    pub(crate) reserved: BTreeMap<OperationId, Vec<Reserved>>,
    pub(crate) invalidated: Vec<OperationId>,
    pub(crate) flushed: BTreeMap<OperationId, (u64, u64)>,
    pub(crate) destroyed: BTreeMap<OperationId, PurgeEvidence>,
    pub(crate) forgotten: BTreeMap<OperationId, u64>,
    pub(crate) of_any_label: u64,
    pub(crate) seen: BTreeMap<&'static str, u64>,
}

pub(crate) fn settings(host_bytes: u64, nvme_bytes: u64) -> CoreSettings {
    CoreSettings {
        host_bytes,
        nvme_bytes,
        host_segment_bytes: 64 << 10,
        nvme_segment_bytes: 128 << 10,
        ..CoreSettings::default()
    }
}

pub(crate) fn hash(number: u64) -> BlockHash {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    BlockHash(bytes)
}

pub(crate) fn hashes(numbers: impl IntoIterator<Item = u64>) -> Vec<BlockHash> {
    numbers.into_iter().map(hash).collect()
}

impl World {
    pub(crate) fn new(settings: CoreSettings) -> World {
        World::with(TierManager::new(
            settings.check().unwrap(),
            Box::new(LeafFirstLru::new()),
        ))
    }

    pub(crate) fn with(mut core: TierManager) -> World {
        let now = Time(SECOND);
        let (namespace, generation) = core.open_namespace(DOMAIN, "story").unwrap();
        let realization = core.open_realization(Realization::digest(&[("model", "m")])).unwrap();
        core.connect(ME, DOMAIN, now).unwrap();
        World {
            core,
            now,
            namespace,
            generation,
            realization,
            label: None,
            device: false,
            hbm: Memory::new(),
            host: Memory::new(),
            nvme: Memory::new(),
            log: BTreeMap::new(),
            held: Vec::new(),
            hold: |_| false,
            fail: |_| None,
            fetched: BTreeMap::new(),
            reserved: BTreeMap::new(),
            invalidated: Vec::new(),
            flushed: BTreeMap::new(),
            destroyed: BTreeMap::new(),
            forgotten: BTreeMap::new(),
            of_any_label: 0,
            seen: BTreeMap::new(),
        }
    }

    /// The same node after a crash, with whatever settings it has now. Answers what came of the log.
    pub(crate) fn restart(self, settings: CoreSettings) -> (World, Restored) {
        World::found(settings, self.generation, self.log.into_values().collect())
    }

    /// A node that finds segments of an earlier run, in which its namespace was at `generation`.
    pub(crate) fn found(
        settings: CoreSettings,
        generation: Generation,
        segments: Vec<RestoredSegment>,
    ) -> (World, Restored) {
        let mut core = TierManager::new(settings.check().unwrap(), Box::new(LeafFirstLru::new()));
        let namespace = core.restore_namespace(DOMAIN, "story", generation).unwrap();
        core.open_realization(Realization::digest(&[("model", "m")])).unwrap();
        let mut world = World::with(core);
        assert_eq!((world.namespace, world.generation), (namespace, generation));
        for segment in &segments {
            for record in &segment.records {
                world.nvme.insert((segment.segment, record.offset), record.label.hash);
            }
            world.log.insert(segment.segment, segment.clone());
        }
        let restored = world.core.restore(segments, world.now);
        world.core.check_invariants();
        world.run();
        world.core.check_invariants();
        (world, restored)
    }

    pub(crate) fn request<'a>(&self, client: ClientId, hashes: &'a [BlockHash]) -> Request<'a> {
        Request {
            client,
            namespace: self.namespace,
            realization: self.realization,
            hashes,
            hints: Hints {
                label: self.label,
                device: self.device,
                ..Hints::default()
            },
            deadline: Time(self.now.0 + SECOND),
        }
    }

    /// Carries out what the core wants done until it wants nothing more.
    pub(crate) fn run(&mut self) {
        while let Some(action) = self.core.poll_action() {
            *self.seen.entry(name(&action)).or_default() += 1;
            if (self.hold)(&action) {
                self.held.push(action);
            } else {
                self.answer(&action);
            }
        }
    }

    /// Answers everything that was held back.
    pub(crate) fn let_go(&mut self) {
        self.hold = |_| false;
        for action in std::mem::take(&mut self.held) {
            self.answer(&action);
        }
        self.run();
    }

    pub(crate) fn answer(&mut self, action: &Action) {
        let outcome = match (self.fail)(action) {
            Some(failure) => Err(failure),
            None => Ok(self.carry_out(action)),
        };
        if let Some(operation) = answered(action) {
            self.core.handle_event(Event { operation, outcome }, self.now);
        }
    }

    fn carry_out(&mut self, action: &Action) -> Completion {
        match action {
            Action::Demote {
                source, target, label, ..
            } => {
                let bytes = self.host[&at(source)];
                assert_eq!(bytes, label.hash, "a block is written under its own hash");
                self.nvme.insert(at(target), bytes);
                self.record(*target, *label);
                return Completion::Written {
                    checksum: checksum(bytes),
                };
            }
            Action::Promote {
                source,
                target,
                checksum: expected,
                label,
                ..
            } => {
                let bytes = self.nvme[&at(source)];
                assert_eq!(
                    (bytes, checksum(bytes)),
                    (label.hash, *expected),
                    "wrong bytes are read"
                );
                self.host.insert(at(target), bytes);
            }
            Action::Relocate {
                source,
                target,
                checksum: expected,
                label,
                ..
            } => {
                let bytes = self.nvme[&at(source)];
                assert_eq!(
                    (bytes, checksum(bytes)),
                    (label.hash, *expected),
                    "wrong bytes are moved"
                );
                self.nvme.insert(at(target), bytes);
                self.record(*target, *label);
            }
            Action::OpenSegment {
                tier: Tier::Nvme,
                segment,
                bytes,
                ..
            } => {
                let empty = RestoredSegment {
                    segment: *segment,
                    bytes: *bytes,
                    records: Vec::new(),
                };
                assert!(self.log.insert(*segment, empty).is_none(), "a segment id is used once");
            }
            Action::ForgetRecord { target } => {
                if let Some(segment) = self.log.get_mut(&target.segment) {
                    segment.records.retain(|record| record.offset != target.offset);
                }
            }
            Action::CloseSegment { tier, segment, .. } => {
                if *tier == Tier::Nvme {
                    self.log.remove(segment);
                }
                let memory = match tier {
                    Tier::Hbm => &mut self.hbm,
                    Tier::Host => &mut self.host,
                    Tier::Nvme | Tier::Remote => &mut self.nvme,
                };
                memory.retain(|(other, _), _| other != segment);
            }
            Action::FetchDone { operation, results, .. } => {
                self.fetched.insert(*operation, results.clone());
            }
            Action::ReserveDone { operation, results, .. } => {
                self.reserved.insert(*operation, results.clone());
            }
            Action::Invalidated { operation, .. } => self.invalidated.push(*operation),
            Action::Flushed {
                operation,
                written,
                left_out,
            } => {
                self.flushed.insert(*operation, (*written, *left_out));
            }
            Action::Destroyed {
                operation, evidence, ..
            } => {
                self.destroyed.insert(*operation, *evidence);
            }
            Action::Forgotten {
                operation,
                blocks,
                of_any_label,
            } => {
                self.forgotten.insert(*operation, *blocks);
                self.of_any_label += of_any_label;
            }
            Action::PromoteToHbm {
                source,
                target,
                checksum: expected,
                ..
            } => {
                let bytes = self.host[&at(source)];
                let checksum = checksum(bytes);
                assert!(
                    expected.is_none_or(|expected| expected == checksum),
                    "wrong bytes go to the device"
                );
                self.hbm.insert(at(target), bytes);
                return Completion::Written { checksum };
            }
            Action::ZeroSegment {
                tier, segment, ranges, ..
            } => {
                let memory = if *tier == Tier::Hbm {
                    &mut self.hbm
                } else {
                    &mut self.host
                };
                memory.retain(|(other, offset), _| {
                    other != segment || !ranges.iter().any(|range| range.contains(offset))
                });
            }
            Action::EraseRecords {
                segment,
                pages,
                namespace,
                keep,
                ..
            } => return self.erase(*segment, pages.clone(), *namespace, keep),
            _ => {}
        }
        Completion::Done
    }

    /// Overwrites records of a namespace, and what no record names, but not what lies at `keep`.
    fn erase(&mut self, id: SegmentId, pages: Range<u32>, namespace: NamespaceId, keep: &[Range<u32>]) -> Completion {
        let segment = self.log.get_mut(&id).expect("a segment that is there");
        let goes = |offset: u64| {
            let page = u32::try_from(offset / 4096).unwrap();
            pages.contains(&page) && !keep.iter().any(|kept| kept.start == page)
        };
        let before = segment.records.len();
        segment
            .records
            .retain(|record| record.label.namespace != namespace || !goes(record.offset));
        let named: Vec<u64> = segment.records.iter().map(|record| record.offset).collect();
        let erased = before - named.len();
        let held = self.nvme.len();
        self.nvme
            .retain(|(other, offset), _| *other != id || named.contains(offset) || !goes(*offset));
        Completion::Erased {
            records: erased.try_into().unwrap(),
            bytes: ((held - self.nvme.len()) as u64) << 12,
        }
    }

    fn record(&mut self, target: Extent, label: RecordLabel) {
        let segment = self.log.get_mut(&target.segment).expect("an open segment");
        segment.records.push(RestoredRecord {
            label,
            offset: target.offset,
            length: target.length,
            checksum: checksum(label.hash),
        });
    }

    /// Lets time pass, timeouts included.
    pub(crate) fn pass(&mut self, nanoseconds: u64) {
        let end = self.now.0 + nanoseconds;
        while let Some(due) = self.core.poll_timeout().filter(|due| due.0 <= end) {
            self.now = Time(due.0.max(self.now.0));
            self.core.handle_timeout(self.now);
            self.run();
        }
        self.now = Time(end);
    }

    /// Waits as long as it takes, at most two seconds.
    fn wait_for<T>(&mut self, mut done: impl FnMut(&mut World) -> Option<T>) -> T {
        let end = self.now.0 + 2 * SECOND;
        loop {
            self.run();
            if let Some(answer) = done(self) {
                return answer;
            }
            let due = self.core.poll_timeout().expect("something will happen");
            assert!(due.0 <= end, "nothing happens");
            self.now = Time(due.0.max(self.now.0));
            self.core.handle_timeout(self.now);
        }
    }

    pub(crate) fn fetch_as(&mut self, client: ClientId, hashes: &[BlockHash], scope: FetchScope) -> Vec<Fetched> {
        let request = self.request(client, hashes);
        match self.core.fetch(&request, scope, self.now).unwrap() {
            Answer::Ready(results) => {
                self.run();
                results
            }
            Answer::Pending(operation) => self.wait_for(|world| world.fetched.remove(&operation)),
        }
    }

    /// Fetches a prefix, checks the bytes and releases. Answers where each block was found.
    pub(crate) fn fetch(&mut self, hashes: &[BlockHash]) -> Vec<Option<Tier>> {
        let results = self.fetch_as(ME, hashes, FetchScope::Prefix);
        self.check_and_release(hashes, &results)
    }

    pub(crate) fn check_and_release(&mut self, hashes: &[BlockHash], results: &[Fetched]) -> Vec<Option<Tier>> {
        let mut leases = Vec::new();
        let mut tiers = Vec::new();
        for (hash, result) in hashes.iter().zip(results) {
            tiers.push(match result {
                Fetched::Leased {
                    lease, extent, tier, ..
                } => {
                    let memory = if *tier == Tier::Hbm { &self.hbm } else { &self.host };
                    assert_eq!(
                        memory.get(&at(extent)),
                        Some(hash),
                        "wrong bytes at {tier:?} {extent:?}"
                    );
                    leases.push(*lease);
                    Some(*tier)
                }
                Fetched::Miss | Fetched::Busy => None,
            });
        }
        assert_eq!(self.core.release(ME, &leases, self.now), 0);
        self.run();
        tiers
    }

    /// Asks and does not wait: the answer will be in `fetched`.
    pub(crate) fn fetch_later(&mut self, hashes: &[BlockHash]) -> OperationId {
        let request = self.request(ME, hashes);
        let Answer::Pending(operation) = self.core.fetch(&request, FetchScope::Prefix, self.now).unwrap() else {
            panic!("it is there already")
        };
        self.run();
        operation
    }

    /// Asks and does not wait: the answer will be in `reserved`.
    pub(crate) fn reserve_later(&mut self, client: ClientId, hashes: &[BlockHash], length: u32) -> OperationId {
        let request = self.request(client, hashes);
        let answer = self
            .core
            .reserve(&request, &vec![length; hashes.len()], self.now)
            .unwrap();
        let Answer::Pending(operation) = answer else {
            panic!("there is room: {answer:?}")
        };
        self.run();
        operation
    }

    /// Slots ahead; the first time a segment has to be opened.
    pub(crate) fn grant(&mut self, client: ClientId, length: u32, count: u32) -> Vec<(ReservationId, Extent)> {
        let granted = self.core.grant(client, length, count, self.now);
        self.run();
        if granted.is_empty() {
            self.core.grant(client, length, count, self.now)
        } else {
            granted
        }
    }

    /// Writes and seals what was granted.
    pub(crate) fn seal_granted(&mut self, results: &[Reserved], hashes: &[BlockHash], parent: Parent) -> Vec<Sealed> {
        let items: Vec<SealItem> = granted(results)
            .into_iter()
            .zip(hashes)
            .map(|((reservation, extent), &hash)| {
                self.write(&extent, hash);
                SealItem {
                    reservation,
                    hash,
                    parent,
                    length: extent.length,
                    tokens: 512,
                }
            })
            .collect();
        self.seal(&items)
    }

    pub(crate) fn reserve_as(&mut self, client: ClientId, hashes: &[BlockHash], length: u32) -> Vec<Reserved> {
        let request = self.request(client, hashes);
        match self
            .core
            .reserve(&request, &vec![length; hashes.len()], self.now)
            .unwrap()
        {
            Answer::Ready(results) => {
                self.run();
                results
            }
            Answer::Pending(operation) => self.wait_for(|world| world.reserved.remove(&operation)),
        }
    }

    /// Puts a chain behind `parent`; answers what became of each.
    pub(crate) fn put_after(&mut self, parent: Parent, hashes: &[BlockHash], length: u32) -> Vec<Sealed> {
        let results = self.reserve_as(ME, hashes, length);
        let mut items = Vec::new();
        let mut outcomes = vec![Sealed::Busy; hashes.len()];
        let mut places = Vec::new();
        let mut parent = parent;
        for (place, (&hash, result)) in hashes.iter().zip(&results).enumerate() {
            match *result {
                Reserved::Granted { reservation, extent } => {
                    self.write(&extent, hash);
                    items.push(SealItem {
                        reservation,
                        hash,
                        parent,
                        length,
                        tokens: 512,
                    });
                    places.push(place);
                }
                Reserved::Present => outcomes[place] = Sealed::Present,
                Reserved::Busy => {}
            }
            parent = Parent::Block(hash);
        }
        let sealed = self.seal(&items);
        for (place, outcome) in places.into_iter().zip(sealed) {
            outcomes[place] = outcome;
        }
        outcomes
    }

    pub(crate) fn put(&mut self, hashes: &[BlockHash], length: u32) -> Vec<Sealed> {
        self.put_after(Parent::Root, hashes, length)
    }

    pub(crate) fn seal_request<'a>(&self, client: ClientId, items: &'a [SealItem]) -> SealRequest<'a> {
        SealRequest {
            client,
            namespace: self.namespace,
            realization: self.realization,
            generation: self.generation,
            label: self.label,
            items,
        }
    }

    pub(crate) fn seal(&mut self, items: &[SealItem]) -> Vec<Sealed> {
        let sealed = self.core.seal(&self.seal_request(ME, items), self.now).unwrap();
        self.run();
        sealed
    }

    pub(crate) fn write(&mut self, extent: &Extent, hash: BlockHash) {
        self.host.insert(at(extent), hash);
    }

    pub(crate) fn lookup(&mut self, hashes: &[BlockHash]) -> Vec<Option<Tier>> {
        let request = self.request(ME, hashes);
        self.core.lookup(&request, self.now).unwrap()
    }

    pub(crate) fn present(&mut self, numbers: impl IntoIterator<Item = u64>) -> Vec<u64> {
        let numbers: Vec<u64> = numbers.into_iter().collect();
        let found = self.lookup(&hashes(numbers.iter().copied()));
        numbers
            .into_iter()
            .zip(found)
            .filter(|(_, tier)| tier.is_some())
            .map(|(number, _)| number)
            .collect()
    }

    pub(crate) fn invalidate(&mut self) -> OperationId {
        let operation = self.core.invalidate(self.namespace, None, self.now);
        self.run();
        operation
    }

    pub(crate) fn flush(&mut self) -> OperationId {
        let operation = self.core.flush(None, self.now);
        self.run();
        operation
    }

    pub(crate) fn destroy(&mut self, grace_ns: u64) -> OperationId {
        let grace = Duration::from_nanos(grace_ns);
        let operation = self.core.destroy(self.namespace, grace, self.now);
        self.run();
        operation
    }

    pub(crate) fn forget_scope(&mut self, scope: &ForgetScope<'_>) -> OperationId {
        let operation = self.core.forget_scope(self.namespace, scope, self.now);
        self.run();
        operation
    }

    pub(crate) fn delete(&mut self, hashes: &[BlockHash]) -> Vec<bool> {
        let request = self.request(ME, hashes);
        let deleted = self.core.delete(&request, self.now).unwrap();
        self.run();
        deleted
    }

    pub(crate) fn leave(&mut self, client: ClientId, departure: Departure) {
        self.core.disconnect(client, departure, self.now);
        self.run();
    }
}

pub(crate) fn leases(results: &[Fetched]) -> Vec<LeaseId> {
    results
        .iter()
        .filter_map(|result| {
            if let Fetched::Leased { lease, .. } = result {
                Some(*lease)
            } else {
                None
            }
        })
        .collect()
}

pub(crate) fn extents(results: &[Fetched]) -> Vec<Extent> {
    results
        .iter()
        .filter_map(|result| {
            if let Fetched::Leased { extent, .. } = result {
                Some(*extent)
            } else {
                None
            }
        })
        .collect()
}

pub(crate) fn granted(results: &[Reserved]) -> Vec<(ReservationId, Extent)> {
    results
        .iter()
        .filter_map(|result| match result {
            Reserved::Granted { reservation, extent } => Some((*reservation, *extent)),
            Reserved::Present | Reserved::Busy => None,
        })
        .collect()
}

fn at(extent: &Extent) -> (SegmentId, u64) {
    (extent.segment, extent.offset)
}

pub(crate) fn checksum(hash: BlockHash) -> u32 {
    u32::from_le_bytes(hash.0[..4].try_into().unwrap()) ^ 0x5eed
}

pub(crate) fn name(action: &Action) -> &'static str {
    match action {
        Action::OpenSegment { .. } => "open",
        Action::CloseSegment { .. } => "close",
        Action::SealSegment { .. } => "seal",
        Action::Demote { .. } => "demote",
        Action::Promote { .. } => "promote",
        Action::Relocate { .. } => "relocate",
        Action::SyncTier { .. } => "sync",
        Action::ResetTier { .. } => "reset",
        Action::RecordGeneration { .. } => "record",
        Action::ForgetRecord { .. } => "forget",
        Action::FetchDone { .. } => "fetch done",
        Action::ReserveDone { .. } => "reserve done",
        Action::Invalidated { .. } => "invalidated",
        Action::Flushed { .. } => "flushed",
        Action::PromoteToHbm { .. } => "promote to hbm",
        Action::ZeroSegment { .. } => "zero",
        Action::EraseRecords { .. } => "erase",
        Action::Destroyed { .. } => "destroyed",
        Action::Forgotten { .. } => "forgotten",
    }
}

pub(crate) fn answered(action: &Action) -> Option<OperationId> {
    match action {
        Action::OpenSegment { operation, .. }
        | Action::CloseSegment { operation, .. }
        | Action::SealSegment { operation, .. }
        | Action::Demote { operation, .. }
        | Action::Promote { operation, .. }
        | Action::Relocate { operation, .. }
        | Action::SyncTier { operation, .. }
        | Action::ResetTier { operation, .. }
        | Action::ZeroSegment { operation, .. }
        | Action::PromoteToHbm { operation, .. }
        | Action::EraseRecords { operation, .. }
        | Action::RecordGeneration { operation, .. } => Some(*operation),
        Action::ForgetRecord { .. }
        | Action::FetchDone { .. }
        | Action::ReserveDone { .. }
        | Action::Invalidated { .. }
        | Action::Destroyed { .. }
        | Action::Forgotten { .. }
        | Action::Flushed { .. } => None,
    }
}
