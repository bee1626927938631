mod copies;
mod demote;
mod destroy;
mod expiry;
mod fetch;
mod flush;
mod forget;
mod generation;
mod hbm;
mod host;
mod host_reclaim;
mod identity;
mod invariants;
mod lease;
mod looking;
mod nvme;
mod nvme_reclaim;
mod operation;
mod prefetch;
mod promote;
mod remote;
mod reserve;
mod restore;
mod seal;
mod service;
mod sweep;
mod waiting;

pub use remote::{Copied, Described};

use crate::client_table::ClientTable;
use crate::hbm_table::HbmTable;
use crate::holding::Holdings;
use crate::host_table::HostTable;
use crate::index::BlockIndex;
use crate::key_map::KeyMap;
use crate::namespace_table::{NamespaceTable, RealizationTable};
use crate::nvme_table::NvmeTable;
use crate::{Action, CheckedCoreSettings, EvictionPolicy, LearnedTables, OperationId, Statistics, Time};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The state machine: which block lies where, who holds it, what moves next.
///
/// It never waits and never does anything itself: commands and [`crate::Event`]s change its state, what it wants done is
/// drained with [`TierManager::poll_action`], and it asks to be called again by [`TierManager::poll_timeout`]. The same
/// calls in the same order give the same actions.
pub struct TierManager {
    settings: CheckedCoreSettings,
    policy: Box<dyn EvictionPolicy>,
    /// The latest time seen: it never runs backwards.
    now: Time,
    refuses_new: bool,
    actions: VecDeque<Action>,
    next_operation: u64,
    operations: BTreeMap<OperationId, operation::Issued>,
    /// The write (demotion or relocation) in flight of each block.
    writes: KeyMap<(u64, OperationId)>,
    /// Where older records of a cached block may still lie: to be forgotten with the block.
    stale: KeyMap<(u64, Vec<copies::StaleRecord>)>,
    index: BlockIndex,
    namespaces: NamespaceTable,
    realizations: RealizationTable,
    clients: ClientTable,
    leases: Holdings,
    reservations: Holdings,
    waiting: KeyMap<(u64, waiting::Waiting)>,
    deadlines: BTreeSet<(Time, OperationId)>,
    promotions: promote::PromotionTable,
    successors: prefetch::Successors,
    hbm: Option<HbmTable>,
    host: HostTable,
    host_reclaim: Option<host_reclaim::HostDrain>,
    /// No host segment is chosen for reclaim before this: none could be emptied.
    host_reclaim_not_before: Time,
    nvme: Option<NvmeTable>,
    /// NVMe segments that wait for a `SealSegment` or `CloseSegment` to be issued.
    unsettled: Vec<u32>,
    record_retries: BTreeSet<(Time, u32)>,
    sweep: sweep::Sweep,
    flushes: VecDeque<flush::Flush>,
    destructions: VecDeque<destroy::Destruction>,
    /// Deletions that a sync has to cover before they are acknowledged.
    forgets: Vec<forget::Forget>,
    counters: Statistics,
}

impl TierManager {
    /// No I/O: segments are opened on demand.
    #[must_use]
    pub fn new(settings: CheckedCoreSettings, policy: Box<dyn EvictionPolicy>) -> TierManager {
        TierManager {
            index: BlockIndex::new(settings.index_seed),
            hbm: HbmTable::new(&settings),
            nvme: NvmeTable::new(&settings),
            settings,
            policy,
            now: Time::ZERO,
            refuses_new: false,
            actions: VecDeque::new(),
            next_operation: 1,
            operations: BTreeMap::new(),
            writes: KeyMap::default(),
            stale: KeyMap::default(),
            namespaces: NamespaceTable::default(),
            realizations: RealizationTable::default(),
            clients: ClientTable::default(),
            leases: Holdings::default(),
            reservations: Holdings::default(),
            waiting: KeyMap::default(),
            deadlines: BTreeSet::new(),
            promotions: promote::PromotionTable::default(),
            successors: prefetch::Successors::default(),
            host: HostTable::default(),
            host_reclaim: None,
            host_reclaim_not_before: Time::ZERO,
            unsettled: Vec::new(),
            record_retries: BTreeSet::new(),
            sweep: sweep::Sweep::default(),
            flushes: VecDeque::new(),
            destructions: VecDeque::new(),
            forgets: Vec::new(),
            counters: Statistics::default(),
        }
    }

    /// No new leases, reservations or grants from now on: [`crate::Refusal::Draining`]. Seals and releases continue, and
    /// what waits already is still answered.
    pub fn drain(&mut self, now: Time) {
        self.advance(now);
        self.refuses_new = true;
    }

    /// What the policy learned so far, to be kept across restarts or given to other nodes; `None` where it learns nothing.
    #[must_use]
    pub fn learned(&self) -> Option<LearnedTables> {
        self.policy.learned()
    }

    /// Adds what was learned earlier or elsewhere.
    pub fn learn(&mut self, learned: &LearnedTables) {
        self.policy.learn(learned);
    }

    /// The next thing to do, in order. Call until `None` after every command, event and timeout.
    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Lets everything that can move on move on. Each step is paid for by what brought it about.
    fn pump(&mut self) {
        loop {
            let mut idle = true;
            while let Some(promotion) = self.promotions.cancelled.pop() {
                idle = false;
                self.cancel_promotion(promotion);
            }
            while let Some(group) = self.host.attention.pop() {
                idle = false;
                self.host.group_mut(group).attended = false;
                self.look_after(group);
            }
            if self
                .nvme
                .as_mut()
                .is_some_and(|nvme| std::mem::take(&mut nvme.attention))
            {
                idle = false;
                self.pump_nvme();
            }
            if !self.destructions.is_empty() && self.pump_destruction() {
                idle = false;
            }
            if idle {
                return;
            }
        }
    }

    #[cfg(feature = "mutants")]
    fn mutant_is(&self, mutant: crate::Mutant) -> bool {
        self.settings.mutant == Some(mutant)
    }
}

/// Whether a planted bug is active. Without the feature `mutants` this is `false` at compile time.
macro_rules! mutant_is {
    ($manager:expr, $mutant:ident) => {{
        #[cfg(feature = "mutants")]
        let active = $manager.mutant_is(crate::Mutant::$mutant);
        #[cfg(not(feature = "mutants"))]
        let active = false;
        active
    }};
}
use mutant_is;
