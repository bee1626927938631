//! What the real state machine hits on a trace with given sizes, and what it writes for that. No byte moves; devices
//! answer at once, or take their time. The policy is told how long answers were, where the trace says so.

use kvtier_core::{
    Action, Advice, Answer, BlockHash, CheckedCoreSettings, ClientId, Completion, Event, Extent, FetchScope, Fetched,
    NamespaceId, Realization, RealizationId, RecordLabel, Request, Reserved, RestoredRecord, RestoredSegment, SealItem,
    SealRequest, SegmentId, Tier, TierManager, Time, TrustDomain,
};
use std::collections::BTreeMap;
use std::time::Duration;

use crate::lru::HitTokens;
use crate::trace::{TraceAnswer, TraceAnswers, TraceRequest};

#[cfg(test)]
mod tests;

/// What a replay did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapacityReport {
    /// Requests replayed.
    pub requests: u64,
    /// Prompt tokens found as a cached prefix, of all.
    pub tokens: HitTokens,
    /// Blocks found in host memory.
    pub hits_host: u64,
    /// Blocks found on NVMe.
    pub hits_nvme: u64,
    /// Blocks published.
    pub published: u64,
    /// Blocks for which there was no room.
    pub busy: u64,
    /// Payload written to NVMe from host memory, bytes.
    pub demoted_bytes: u64,
    /// Payload read back from NVMe, bytes.
    pub promoted_bytes: u64,
    /// Payload copied between NVMe segments, bytes.
    pub relocated_bytes: u64,
    /// Segments emptied to be used anew, host segments included.
    pub segments_reclaimed: u64,
    /// Host copies and NVMe copies dropped to make room.
    pub evictions: (u64, u64),
    /// Virtual time that the replay took.
    pub took: Duration,
    /// Blocks in the cache at the end.
    pub blocks: u64,
    /// Blocks in the cache when a request came, on average since the last power of two of requests.
    pub blocks_mean: u64,
    /// Of these, those in host memory and on NVMe both.
    pub twice_mean: u64,
    /// Blocks that were not worth writing to NVMe.
    pub refused: u64,
    /// Memory of the manager's tables at the end, bytes.
    pub index_bytes: u64,
}

impl CapacityReport {
    /// Bytes written to NVMe for each byte demoted; 1 where nothing was.
    #[must_use]
    pub fn write_amplification(&self) -> f64 {
        if self.demoted_bytes == 0 {
            1.0
        } else {
            (self.demoted_bytes + self.relocated_bytes) as f64 / self.demoted_bytes as f64
        }
    }
}

/// How long things take in a replay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// From asking a device to its answer, besides the transfer.
    pub latency: Duration,
    /// What a device moves in a second; 0: any number of bytes at once.
    pub device_bytes_per_second: u64,
    /// A client's call and what it does with one block.
    pub trip: Duration,
    /// A client's work on one block.
    pub block: Duration,
}

/// Replays `requests` in order through a [`TierManager`] of these settings, one block of `block_bytes` for each id.
/// Devices answer at once.
///
/// # Panics
/// Where the manager refuses what these settings must allow: a bug of ours.
#[must_use]
pub fn replay(requests: &[TraceRequest], settings: CheckedCoreSettings, block_bytes: u32) -> CapacityReport {
    replay_paced(requests, settings, block_bytes, Pace::default())
}

/// The same, one request as soon as the one before is done, with devices and a client that take their time.
///
/// # Panics
/// As [`replay`].
#[must_use]
pub fn replay_paced(
    requests: &[TraceRequest],
    settings: CheckedCoreSettings,
    block_bytes: u32,
    pace: Pace,
) -> CapacityReport {
    let mut replay = Replay::new(settings, block_bytes, pace);
    for request in requests {
        replay.request(request);
    }
    replay.finish()
}

/// The same, with a flush, the death of the process and a restart before the request at `restart`. Answers what the requests
/// from there on did.
///
/// # Panics
/// As [`replay`].
#[must_use]
pub fn replay_restarted(
    requests: &[TraceRequest],
    restart: usize,
    settings: &CheckedCoreSettings,
    block_bytes: u32,
    pace: Pace,
) -> CapacityReport {
    let mut replay = Replay::new(settings.clone(), block_bytes, pace);
    for request in &requests[..restart] {
        replay.request(request);
    }
    let mut replay = replay.restart(settings.clone());
    for request in &requests[restart..] {
        replay.request(request);
    }
    replay.finish()
}

/// Blocks that a client fetches or puts in one call at most.
const CHUNK_BLOCKS_MAX: usize = 64;
/// Tries of a put that finds no room.
const TRIES_MAX: u32 = 1000;

/// Sums over requests.
#[derive(Clone, Copy, Debug, Default)]
struct Sampled {
    requests: u64,
    blocks: u64,
    twice: u64,
}

struct Replay {
    manager: TierManager,
    client: ClientId,
    namespace: NamespaceId,
    realization: RealizationId,
    block_bytes: u32,
    chunk_blocks: usize,
    pace: Pace,
    now: Time,
    /// Answers on their way, in the order in which they arrive.
    answers: BTreeMap<(Time, u64), Event>,
    asked: u64,
    device_free: Time,
    fetched: Option<Vec<Fetched>>,
    reserved: Option<Vec<Reserved>>,
    flushed: bool,
    /// What a restart finds.
    log: BTreeMap<SegmentId, RestoredSegment>,
    sampled: Sampled,
    given: TraceAnswers<Vec<BlockHash>>,
    report: CapacityReport,
}

impl Replay {
    fn new(settings: CheckedCoreSettings, block_bytes: u32, pace: Pace) -> Replay {
        let chunk_blocks = (settings.host_bytes / 8 / u64::from(block_bytes)) as usize;
        let policy = settings.policy();
        let manager = TierManager::new(settings, policy);
        Replay::with(manager, chunk_blocks, block_bytes, pace)
    }

    fn with(mut manager: TierManager, chunk_blocks: usize, block_bytes: u32, pace: Pace) -> Replay {
        let domain = TrustDomain(1);
        let client = ClientId(1);
        manager
            .connect(client, domain, Time::ZERO)
            .expect("the first client fits");
        let (namespace, _) = manager
            .open_namespace(domain, "trace")
            .expect("the first namespace fits");
        let realization = manager
            .open_realization(Realization::digest(&[("model", "trace")]))
            .expect("the first realization fits");
        Replay {
            manager,
            client,
            namespace,
            realization,
            block_bytes,
            chunk_blocks: chunk_blocks.clamp(1, CHUNK_BLOCKS_MAX),
            pace,
            now: Time::ZERO,
            answers: BTreeMap::new(),
            asked: 0,
            device_free: Time::ZERO,
            fetched: None,
            reserved: None,
            flushed: false,
            log: BTreeMap::new(),
            sampled: Sampled::default(),
            given: TraceAnswers::default(),
            report: CapacityReport::default(),
        }
    }

    fn restart(mut self, settings: CheckedCoreSettings) -> Replay {
        self.manager.flush(None, self.now);
        self.flushed = false;
        self.wait(|replay| replay.flushed.then_some(()));
        let policy = settings.policy();
        let mut manager = TierManager::new(settings, policy);
        let generation = self.manager.generation(self.namespace);
        manager
            .restore_namespace(TrustDomain(1), "trace", generation)
            .expect("the first namespace fits");
        manager
            .open_realization(Realization::digest(&[("model", "trace")]))
            .expect("the first realization fits");
        manager.restore(self.log.values().cloned().collect(), self.now);
        let mut next = Replay::with(manager, self.chunk_blocks, self.block_bytes, self.pace);
        next.now = self.now;
        next.device_free = self.device_free;
        next.log = self.log;
        next.given = self.given;
        next.pump();
        next
    }

    fn record(&mut self, target: Extent, label: RecordLabel) {
        let segment = self.log.get_mut(&target.segment).expect("an open segment");
        segment.records.push(RestoredRecord {
            label,
            offset: target.offset,
            length: target.length,
            checksum: 0,
        });
    }

    fn request(&mut self, request: &TraceRequest) {
        let hashes = request.block_hashes();
        self.report.requests += 1;
        self.sample();
        self.report.tokens.total += request.input_tokens;
        while let Some((answer, hashes)) = self.given.complete(request.timestamp_ms) {
            self.reach(answer.at_ms);
            // One message takes so many keys; the prompt's end says which it is.
            let asked = self.asked(&hashes[hashes.len().saturating_sub(CHUNK_BLOCKS_MAX)..]);
            let advice = Advice::Answered(answer.tokens);
            self.manager
                .advise(&asked, advice, self.now)
                .expect("advice is in bounds");
            self.pump();
        }
        if let Some(answer) = TraceAnswer::to(request, request.timestamp_ms) {
            self.given.begin(answer, hashes.clone());
        }
        self.reach(request.timestamp_ms);
        let mut hit = 0;
        for chunk in hashes.chunks(self.chunk_blocks) {
            let hits = self.fetch(request, chunk, hit);
            hit += hits;
            if hits < chunk.len() {
                break;
            }
        }
        let mut start = hit;
        let mut tries = 0;
        while start < hashes.len() && tries < TRIES_MAX {
            let chunk = &hashes[start..hashes.len().min(start + self.chunk_blocks)];
            let put = self.put(request, chunk, start);
            start += put;
            if put < chunk.len() {
                tries += 1;
                self.report.busy += 1;
                self.live_until(self.now.after(Duration::from_millis(1)));
            }
        }
    }

    /// Where requests come when the trace says: lives on until then.
    fn reach(&mut self, at_ms: u64) {
        if self.pace == Pace::default() {
            let due = Time::ZERO.after(Duration::from_millis(at_ms));
            self.live_until(due.max(self.now));
        }
    }

    /// What is cached now. The first part of a replay, in which the cache fills, does not count.
    fn sample(&mut self) {
        let statistics = self.manager.statistics();
        if self.report.requests.is_power_of_two() {
            self.sampled = Sampled::default();
        }
        self.sampled.requests += 1;
        self.sampled.blocks += statistics.blocks;
        self.sampled.twice += statistics.host_blocks + statistics.nvme_blocks - statistics.blocks;
    }

    fn asked<'a>(&self, hashes: &'a [BlockHash]) -> Request<'a> {
        Request {
            client: self.client,
            namespace: self.namespace,
            realization: self.realization,
            hashes,
            hints: kvtier_core::Hints::default(),
            deadline: self.now.after(Duration::from_secs(1)),
        }
    }

    /// How many of the chunk's blocks, from the first, are there.
    fn fetch(&mut self, request: &TraceRequest, chunk: &[BlockHash], start: usize) -> usize {
        let asked = self.asked(chunk);
        self.fetched = None;
        let answer = self
            .manager
            .fetch(&asked, FetchScope::Prefix, self.now)
            .expect("a fetch is in bounds");
        let fetched = match answer {
            Answer::Ready(fetched) => fetched,
            Answer::Pending(_) => self.wait(|replay| replay.fetched.take()),
        };
        let mut leases = Vec::new();
        for outcome in &fetched {
            let Fetched::Leased { lease, tier, .. } = outcome else {
                break;
            };
            match tier {
                Tier::Hbm | Tier::Host => self.report.hits_host += 1,
                Tier::Nvme | Tier::Remote => self.report.hits_nvme += 1,
            }
            self.report.tokens.hit += u64::from(request.tokens_at(start + leases.len()));
            leases.push(*lease);
        }
        self.work(leases.len());
        self.manager.release(self.client, &leases, self.now);
        self.pump();
        leases.len()
    }

    /// How many of the chunk's blocks, from the first, are there now.
    fn put(&mut self, request: &TraceRequest, chunk: &[BlockHash], start: usize) -> usize {
        let asked = self.asked(chunk);
        self.reserved = None;
        let answer = self
            .manager
            .reserve(&asked, &vec![self.block_bytes; chunk.len()], self.now)
            .expect("a reserve is in bounds");
        let reserved = match answer {
            Answer::Ready(reserved) => reserved,
            Answer::Pending(_) => self.wait(|replay| replay.reserved.take()),
        };
        self.work(reserved.len());
        let mut items = Vec::new();
        for (index, outcome) in reserved.iter().enumerate() {
            let Reserved::Granted { reservation, .. } = outcome else {
                continue;
            };
            let place = start + index;
            items.push(SealItem {
                reservation: *reservation,
                hash: chunk[index],
                parent: request.parent_at(place),
                length: self.block_bytes,
                tokens: request.tokens_at(place),
            });
        }
        let generation = self.manager.generation(self.namespace);
        let sealed = self
            .manager
            .seal(
                &SealRequest {
                    client: self.client,
                    namespace: self.namespace,
                    realization: self.realization,
                    generation,
                    label: None,
                    items: &items,
                },
                self.now,
            )
            .expect("a seal is in bounds");
        self.report.published += sealed
            .iter()
            .filter(|outcome| matches!(outcome, kvtier_core::Sealed::Published))
            .count() as u64;
        self.pump();
        let stored = |outcome: &&Reserved| !matches!(outcome, Reserved::Busy);
        reserved.iter().take_while(stored).count()
    }

    /// The client's own time for a call with this many blocks.
    fn work(&mut self, blocks: usize) {
        let blocks = u32::try_from(blocks).expect("chunks are bounded");
        self.live_until(self.now.after(self.pace.trip + self.pace.block * blocks));
    }

    /// Lives on until there is an answer.
    fn wait<T>(&mut self, mut answer: impl FnMut(&mut Replay) -> Option<T>) -> T {
        loop {
            self.pump();
            if let Some(answer) = answer(self) {
                return answer;
            }
            let next = self.next_happening().expect("a wait ends at its deadline");
            self.live_until(next);
        }
    }

    fn next_happening(&self) -> Option<Time> {
        let arrival = self.answers.first_key_value().map(|((time, _), _)| *time);
        arrival.into_iter().chain(self.manager.poll_timeout()).min()
    }

    /// Delivers what is due until then.
    fn live_until(&mut self, end: Time) {
        self.pump();
        while let Some(next) = self.next_happening().filter(|next| *next <= end) {
            self.now = self.now.max(next);
            match self.answers.first_entry() {
                Some(entry) if entry.key().0 <= self.now => {
                    let event = entry.remove();
                    self.manager.handle_event(event, self.now);
                }
                _ => self.manager.handle_timeout(self.now),
            }
            self.pump();
        }
        self.now = self.now.max(end);
    }

    /// Takes on what the manager wants done. Devices that answer at once do so in order.
    fn pump(&mut self) {
        loop {
            while let Some(action) = self.manager.poll_action() {
                self.take_on(action);
            }
            if self.pace.latency > Duration::ZERO {
                return;
            }
            let Some((_, event)) = self.answers.pop_first() else {
                return;
            };
            self.manager.handle_event(event, self.now);
        }
    }

    fn take_on(&mut self, action: Action) {
        let (operation, bytes, completion) = match action {
            Action::FetchDone { results, .. } => {
                self.fetched = Some(results);
                return;
            }
            Action::ReserveDone { results, .. } => {
                self.reserved = Some(results);
                return;
            }
            Action::Flushed { .. } => {
                self.flushed = true;
                return;
            }
            Action::ForgetRecord { .. }
            | Action::Invalidated { .. }
            | Action::Destroyed { .. }
            | Action::Forgotten { .. } => return,
            Action::Demote {
                operation,
                target,
                label,
                ..
            } => {
                self.record(target, label);
                (operation, target.length, Completion::Written { checksum: 0 })
            }
            Action::Promote { operation, source, .. } => (operation, source.length, Completion::Done),
            Action::Relocate {
                operation,
                target,
                label,
                ..
            } => {
                self.record(target, label);
                (operation, target.length * 2, Completion::Done)
            }
            Action::OpenSegment {
                operation,
                tier,
                segment,
                bytes,
                ..
            } => {
                if tier == Tier::Nvme {
                    let records = Vec::new();
                    self.log.insert(
                        segment,
                        RestoredSegment {
                            segment,
                            bytes,
                            records,
                        },
                    );
                }
                (operation, 0, Completion::Done)
            }
            Action::CloseSegment {
                operation,
                tier,
                segment,
            } => {
                if tier == Tier::Nvme {
                    self.log.remove(&segment);
                }
                (operation, 0, Completion::Done)
            }
            Action::SealSegment { operation, .. }
            | Action::SyncTier { operation, .. }
            | Action::ResetTier { operation, .. }
            | Action::RecordGeneration { operation, .. }
            | Action::PromoteToHbm { operation, .. }
            | Action::ZeroSegment { operation, .. } => (operation, 0, Completion::Done),
            Action::EraseRecords { operation, .. } => (operation, 0, Completion::Erased { records: 0, bytes: 0 }),
        };
        let event = Event {
            operation,
            outcome: Ok(completion),
        };
        let transfer = match self.pace.device_bytes_per_second {
            0 => 0,
            rate => u64::from(bytes) * 1_000_000_000 / rate,
        };
        self.device_free = self.device_free.max(self.now).after(Duration::from_nanos(transfer));
        self.asked += 1;
        self.answers
            .insert((self.device_free.after(self.pace.latency), self.asked), event);
    }

    fn finish(mut self) -> CapacityReport {
        self.pump();
        self.manager.check_invariants();
        let statistics = self.manager.statistics();
        CapacityReport {
            demoted_bytes: statistics.demoted_bytes,
            promoted_bytes: statistics.promoted_bytes,
            relocated_bytes: statistics.relocated_bytes,
            segments_reclaimed: statistics.segments_reclaimed,
            evictions: (statistics.evictions_host, statistics.evictions_nvme),
            took: self.now.since(Time::ZERO),
            blocks: statistics.blocks,
            blocks_mean: self.sampled.blocks / self.sampled.requests.max(1),
            twice_mean: self.sampled.twice / self.sampled.requests.max(1),
            refused: statistics.admissions_refused,
            index_bytes: statistics.index_bytes,
            ..self.report
        }
    }
}
