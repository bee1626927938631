use std::collections::BTreeMap;
use std::sync::Arc;

use kvtier_core::cluster::{Cluster, MemberId};
use kvtier_core::{Generation, OperationId, Time};

use super::clock::Clock;

/// A purge that its coordinator has begun and not completed. Durable.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) name: usize,
    pub(super) generation: Generation,
    /// Real time at which it was asked for: blocks from before may not be shown once it is acknowledged.
    pub(super) asked_at: Time,
    /// Who had confirmed, once it was acknowledged.
    pub(super) reached: Option<Vec<MemberId>>,
    /// This run was told that no majority had it by the deadline.
    pub(super) not_stored: bool,
}

/// A member: what it keeps on its disk, and the process while it runs.
pub(super) struct Member {
    pub(super) clock: Clock,
    /// `None` while it is down.
    pub(super) run: Option<Run>,
    /// Of the latest run.
    pub(super) incarnation: u64,
    /// The register.
    pub(super) durable: Vec<Generation>,
    /// When the first block under a generation of a name was written. On disk.
    pub(super) written: BTreeMap<(usize, Generation), Time>,
    pub(super) jobs: BTreeMap<u64, Job>,
}

/// A member's process.
pub(super) struct Run {
    pub(super) cluster: Cluster,
    /// What reads compare with.
    pub(super) in_force: Vec<Generation>,
    pub(super) open: BTreeMap<OperationId, u64>,
    /// Records that are durable and not answered; for the counts.
    pub(super) unanswered: u64,
    /// And those that are not even durable.
    pub(super) recording: u64,
    /// It does nothing before this real time.
    pub(super) stalled_until: Time,
    pub(super) timer_after: Time,
    /// Timeouts in a row at one time.
    pub(super) spins: u32,
    pub(super) last_timer: Time,
}

impl Member {
    /// What its register has, as the cluster takes it.
    pub(super) fn register(&self, names: &[Arc<str>]) -> Vec<(Arc<str>, Generation)> {
        let raised = names.iter().cloned().zip(self.durable.iter().copied());
        raised.filter(|(_, generation)| *generation > Generation(0)).collect()
    }
}
