//! What the real state machine hits on a trace with given sizes: devices answer at once and no byte moves.

use kvtier_core::{
    Action, Answer, CheckedCoreSettings, ClientId, Completion, Event, FetchScope, Fetched, LeafFirstLru, NamespaceId,
    Realization, RealizationId, Request, Reserved, SealItem, Tier, TierManager, Time, TrustDomain,
};
use std::collections::VecDeque;
use std::time::Duration;

use crate::lru::HitTokens;
use crate::trace::TraceRequest;

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
    /// Blocks in the cache at the end.
    pub blocks: u64,
    /// Memory of the manager's tables at the end, bytes.
    pub index_bytes: u64,
}

/// Replays `requests` in order through a [`TierManager`] of these settings, one block of `block_bytes` for each id.
///
/// # Panics
/// Where the manager refuses what these settings must allow: a bug of ours.
#[must_use]
pub fn replay(requests: &[TraceRequest], settings: CheckedCoreSettings, block_bytes: u32) -> CapacityReport {
    let mut replay = Replay::new(settings, block_bytes);
    for request in requests {
        replay.request(request);
    }
    replay.finish()
}

struct Replay {
    manager: TierManager,
    client: ClientId,
    namespace: NamespaceId,
    realization: RealizationId,
    block_bytes: u32,
    fetched: Option<Vec<Fetched>>,
    reserved: Option<Vec<Reserved>>,
    report: CapacityReport,
}

impl Replay {
    fn new(settings: CheckedCoreSettings, block_bytes: u32) -> Replay {
        let mut manager = TierManager::new(settings, Box::new(LeafFirstLru::new()));
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
            fetched: None,
            reserved: None,
            report: CapacityReport::default(),
        }
    }

    fn request(&mut self, request: &TraceRequest) {
        let now = Time::ZERO.after(Duration::from_millis(request.timestamp_ms));
        let hashes = request.block_hashes();
        self.report.requests += 1;
        self.report.tokens.total += request.input_tokens;
        if self.manager.poll_timeout().is_some_and(|due| due <= now) {
            self.manager.handle_timeout(now);
            self.pump(now);
        }
        let hit = self.fetch(request, &hashes, now);
        self.put(request, &hashes, hit, now);
    }

    fn asked<'a>(&self, hashes: &'a [kvtier_core::BlockHash], now: Time) -> Request<'a> {
        Request {
            client: self.client,
            namespace: self.namespace,
            realization: self.realization,
            hashes,
            hints: kvtier_core::Hints::default(),
            deadline: now.after(Duration::from_secs(1)),
        }
    }

    fn fetch(&mut self, request: &TraceRequest, hashes: &[kvtier_core::BlockHash], now: Time) -> usize {
        let asked = self.asked(hashes, now);
        let answer = self
            .manager
            .fetch(&asked, FetchScope::Prefix, now)
            .expect("a fetch is in bounds");
        self.fetched = None;
        let fetched = match answer {
            Answer::Ready(fetched) => fetched,
            Answer::Pending(_) => {
                self.pump(now);
                self.fetched
                    .take()
                    .expect("devices that answer at once leave no fetch waiting")
            }
        };
        let mut leases = Vec::new();
        for outcome in &fetched {
            let Fetched::Leased { lease, tier, .. } = outcome else {
                break;
            };
            match tier {
                Tier::Host => self.report.hits_host += 1,
                Tier::Nvme => self.report.hits_nvme += 1,
            }
            self.report.tokens.hit += u64::from(request.tokens_at(leases.len()));
            leases.push(*lease);
        }
        self.manager.release(self.client, &leases, now);
        self.pump(now);
        leases.len()
    }

    fn put(&mut self, request: &TraceRequest, hashes: &[kvtier_core::BlockHash], hit: usize, now: Time) {
        let misses = &hashes[hit..];
        let asked = self.asked(misses, now);
        let answer = self
            .manager
            .reserve(&asked, &vec![self.block_bytes; misses.len()], now)
            .expect("a reserve is in bounds");
        self.reserved = None;
        let reserved = match answer {
            Answer::Ready(reserved) => reserved,
            Answer::Pending(_) => {
                self.pump(now);
                if self.reserved.is_none() {
                    self.manager.handle_timeout(asked.deadline);
                    self.pump(asked.deadline);
                }
                self.reserved.take().expect("a wait ends at its deadline")
            }
        };
        let items: Vec<SealItem> = reserved
            .iter()
            .enumerate()
            .filter_map(|(index, outcome)| {
                let Reserved::Granted { reservation, .. } = outcome else {
                    return None;
                };
                let place = hit + index;
                Some(SealItem {
                    reservation: *reservation,
                    hash: hashes[place],
                    parent: request.parent_at(place),
                    length: self.block_bytes,
                    tokens: request.tokens_at(place),
                })
            })
            .collect();
        self.report.busy += reserved
            .iter()
            .filter(|outcome| matches!(outcome, Reserved::Busy))
            .count() as u64;
        let generation = self
            .manager
            .find_namespace(TrustDomain(1), "trace")
            .expect("it was opened")
            .1;
        let sealed = self
            .manager
            .seal(self.client, self.namespace, self.realization, generation, &items, now)
            .expect("a seal is in bounds");
        self.report.published += sealed
            .iter()
            .filter(|outcome| matches!(outcome, kvtier_core::Sealed::Published))
            .count() as u64;
        self.pump(now);
    }

    /// Answers every action at once, and what those answers lead to.
    fn pump(&mut self, now: Time) {
        let mut answers = VecDeque::new();
        loop {
            while let Some(action) = self.manager.poll_action() {
                let (operation, completion) = match action {
                    Action::FetchDone { results, .. } => {
                        self.fetched = Some(results);
                        continue;
                    }
                    Action::ReserveDone { results, .. } => {
                        self.reserved = Some(results);
                        continue;
                    }
                    Action::ForgetRecord { .. } | Action::Invalidated { .. } | Action::Flushed { .. } => continue,
                    Action::Demote { operation, .. } => (operation, Completion::Written { checksum: 0 }),
                    Action::OpenSegment { operation, .. }
                    | Action::CloseSegment { operation, .. }
                    | Action::SealSegment { operation, .. }
                    | Action::Promote { operation, .. }
                    | Action::Relocate { operation, .. }
                    | Action::SyncTier { operation, .. }
                    | Action::ResetTier { operation, .. }
                    | Action::RecordGeneration { operation, .. } => (operation, Completion::Done),
                };
                answers.push_back(Event {
                    operation,
                    outcome: Ok(completion),
                });
            }
            let Some(event) = answers.pop_front() else { return };
            self.manager.handle_event(event, now);
        }
    }

    fn finish(self) -> CapacityReport {
        self.manager.check_invariants();
        let statistics = self.manager.statistics();
        CapacityReport {
            demoted_bytes: statistics.demoted_bytes,
            promoted_bytes: statistics.promoted_bytes,
            relocated_bytes: statistics.relocated_bytes,
            blocks: statistics.blocks,
            index_bytes: statistics.index_bytes,
            ..self.report
        }
    }
}
