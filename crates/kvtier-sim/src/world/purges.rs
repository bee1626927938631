//! Purges as a driver carries them out: journalled, deleted, destroyed, and after a restart gone on with before anybody is
//! served.

use std::collections::BTreeSet;
use std::time::Duration;

use kvtier_core::{ForgetScope, Generation, NamespaceId, OperationId, PurgeEvidence};

use super::World;
use super::operator::Errand;
use crate::memory::{Memory, Tag};
use crate::oracle::{Check, Key, Part, Scope, Written, found};

/// Destructions run one after another, and each may wait for holders.
const DESTRUCTIONS_MAX: usize = 2;

/// What the journal says has to be done.
#[derive(Clone, Debug)]
pub(super) enum Job {
    /// What was written before this generation is destroyed.
    All { space: u32, below: Generation },
    /// What the scope names is deleted, then destroyed.
    Narrow(Scope),
}

impl Job {
    pub(super) fn space(&self) -> u32 {
        match self {
            Job::All { space, .. } => *space,
            Job::Narrow(scope) => scope.space,
        }
    }

    fn covers(&self, tag: Tag, written: &Written) -> bool {
        match self {
            Job::All { space, below } => {
                written.key.space == *space && written.generation < *below && written.published
            }
            Job::Narrow(scope) => scope.covers(tag, written) && written.published,
        }
    }
}

impl World {
    fn journalled(&mut self, job: &Job) -> u64 {
        self.next_job += 1;
        self.journal.insert(self.next_job, job.clone());
        self.next_job
    }

    fn is_busy_destroying(&self) -> bool {
        let destructions = self
            .errands
            .values()
            .filter(|errand| matches!(errand, Errand::Destroy { .. } | Errand::Forget { .. }));
        destructions.count() >= DESTRUCTIONS_MAX
    }

    /// Has destroyed what lies behind the last acknowledged invalidation.
    pub(super) fn destroy_old(&mut self, space: u32) -> Check {
        if self.is_busy_destroying() || self.is_refused(space) {
            return Ok(());
        }
        let job = Job::All {
            space,
            below: self.spaces[space as usize].acknowledged,
        };
        let number = self.journalled(&job);
        self.destroy(number, job)
    }

    fn destroy(&mut self, number: u64, job: Job) -> Check {
        let id = self.spaces[job.space() as usize].id;
        let grace = match &job {
            Job::Narrow(_) if self.random.chance(500) => Duration::ZERO,
            _ => self.plan.settings.lease_ttl * 2,
        };
        self.step += 1;
        let operation = self.manager.destroy(id, grace, self.now);
        self.note(|| format!("destroy {job:?}: {operation:?}"));
        self.errands.insert(operation, Errand::Destroy { number, job });
        self.pump()
    }

    /// Nothing of it is left anywhere, unless it is said to be.
    pub(super) fn destroyed(
        &mut self,
        operation: OperationId,
        namespace: NamespaceId,
        evidence: PurgeEvidence,
    ) -> Check {
        let Some(Errand::Destroy { number, job }) = self.errands.remove(&operation) else {
            return found(format!("{operation:?} is reported as a destruction nobody waits for"));
        };
        if self.spaces[job.space() as usize].id != namespace {
            return found(format!("{job:?} is reported as the destruction of {namespace:?}"));
        }
        let is_covered = |tag| self.ledger.written(tag).is_some_and(|written| job.covers(tag, written));
        let left = |memory: &Memory| memory.tags().find(|&(_, _, tag)| is_covered(tag));
        if evidence.host_left == 0
            && let Some(place) = left(&self.host)
        {
            return found(format!(
                "{job:?} is reported as destroyed, but lies in host memory at {place:?}"
            ));
        }
        if evidence.hbm_left == 0
            && let Some(place) = left(&self.hbm)
        {
            return found(format!(
                "{job:?} is reported as destroyed, but lies in device memory at {place:?}"
            ));
        }
        if evidence.nvme_left > 0 {
            // What could not be overwritten may come back: it is tried again before anybody is told.
            return self.destroy(number, job);
        }
        if let Some(place) = left(&self.nvme) {
            return found(format!(
                "{job:?} is reported as destroyed, but lies on NVMe at {place:?}"
            ));
        }
        self.journal.remove(&number);
        if let Job::Narrow(scope) = job {
            self.tally.answer("purge_acknowledged");
            self.step += 1;
            self.ledger.destroy(&scope, self.step);
        }
        Ok(())
    }

    /// Has a part of a namespace deleted and destroyed: around one of the blocks that it shows.
    pub(super) fn forget_some(&mut self, space: u32) -> Check {
        if self.is_busy_destroying() {
            return Ok(());
        }
        let live: Vec<Key> = self
            .ledger
            .live_keys()
            .map(|(key, _)| key)
            .filter(|key| key.space == space)
            .collect();
        if live.is_empty() {
            return Ok(());
        }
        let chosen = live[self.random.index(live.len())];
        let labels = self.ledger.labels(chosen);
        let part = if labels > 0 && self.label_random.chance(600) {
            self.tally.answer("purged_by_label");
            Part::Label(labels.trailing_zeros() as u8)
        } else if self.random.chance(200) {
            Part::Realization(chosen.realization)
        } else {
            Part::Node(chosen.node)
        };
        self.forget_part(space, part)
    }

    /// While it is being moved, a block is the hardest to be rid of.
    pub(super) fn purge(&mut self, key: Key) -> Check {
        if self.random.chance(500) {
            self.invalidate(key.space, None)
        } else {
            self.forget_part(key.space, Part::Node(key.node))
        }
    }

    fn forget_part(&mut self, space: u32, part: Part) -> Check {
        let scope = Scope {
            space,
            part,
            until: self.ledger.last(),
            descendants: BTreeSet::new(),
        };
        let number = self.journalled(&Job::Narrow(scope.clone()));
        self.forget(number, scope)
    }

    fn forget(&mut self, number: u64, mut scope: Scope) -> Check {
        let space = scope.space;
        let live: Vec<(Key, Tag)> = self.ledger.live_keys().filter(|(key, _)| key.space == space).collect();
        let descendants = self.ledger.descendants(|key| scope.names(key, self.ledger.labels(key)));
        let mut gone = Vec::new();
        for (key, tag) in live {
            let extends = descendants.contains(&key);
            let is_named = scope.names(key, self.ledger.labels(key));
            if !extends && !is_named {
                continue;
            }
            let was_cached = self.tier_of(key)?.is_some();
            if extends && !is_named {
                if !was_cached {
                    continue;
                }
                scope.descendants.insert(tag);
            }
            gone.push((key, was_cached));
        }
        scope.until = self.ledger.last();
        self.journal.insert(number, Job::Narrow(scope.clone()));
        self.step += 1;
        let id = self.spaces[space as usize].id;
        let hashes;
        let part = match scope.part {
            Part::Node(node) => {
                hashes = Self::hashes(&[node]);
                ForgetScope::Hashes(&hashes)
            }
            Part::Realization(realization) => ForgetScope::Realization(self.realizations[realization as usize]),
            Part::Label(label) => ForgetScope::Label(Self::label(label)),
        };
        let operation = self.manager.forget_scope(id, &part, self.now);
        self.note(|| format!("forget {scope:?}: {operation:?}"));
        self.spaces[space as usize].forgot_at = self.step;
        for (key, was_cached) in gone {
            // An older record of one that was not may come back, until it is overwritten.
            if was_cached {
                self.ledger.delete(key, self.step);
            } else {
                self.ledger.forget(key, self.step);
            }
            self.seen.remove(&key);
            if let Some(tier) = self.tier_of(key)? {
                return found(format!(
                    "{key:?} is still listed in {tier:?} after {scope:?} was forgotten"
                ));
            }
        }
        self.errands.insert(operation, Errand::Forget { number, scope });
        self.pump()
    }

    pub(super) fn forgotten(&mut self, operation: OperationId) -> Check {
        match self.errands.remove(&operation) {
            Some(Errand::Forget { number, scope }) => self.destroy(number, Job::Narrow(scope)),
            Some(Errand::ForgetOrphans) => Ok(()),
            _ => found(format!("{operation:?} is reported as a deletion nobody waits for")),
        }
    }

    /// What extended a block whose deletion is durable, and lost its own, is not known to extend it any more.
    fn forget_orphans(&mut self, space: u32) -> Check {
        self.step += 1;
        let id = self.spaces[space as usize].id;
        let operation = self.manager.forget_scope(id, &ForgetScope::Orphans, self.now);
        self.note(|| format!("forget orphans of {space}: {operation:?}"));
        self.errands.insert(operation, Errand::ForgetOrphans);
        let live: Vec<Key> = self.ledger.live_keys().map(|(key, _)| key).collect();
        for key in live.into_iter().filter(|key| key.space == space) {
            if self.tier_of(key)?.is_none() {
                self.ledger.delete(key, self.step);
                self.seen.remove(&key);
            }
        }
        self.pump()
    }

    /// After a restart: what the journal has begins anew. What a restored register is behind was done before.
    pub(super) fn resume_purges(&mut self) -> Check {
        for (number, job) in self.journal.clone() {
            if self.is_refused(job.space()) {
                self.journal.remove(&number);
                continue;
            }
            self.tally.answer("purge_resumed");
            match job {
                Job::All { .. } => self.destroy(number, job)?,
                Job::Narrow(scope) => {
                    self.forget_orphans(scope.space)?;
                    self.forget(number, scope)?;
                }
            }
        }
        Ok(())
    }
}
