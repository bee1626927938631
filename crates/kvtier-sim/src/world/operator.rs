//! The operator: invalidates, flushes, drains, audits.

use std::collections::BTreeSet;

use kvtier_core::{ClientId, FetchScope, Generation, NamespaceId, OperationId, Refusal, Tier, TrustDomain};

use super::clients::Asked;
use super::purges::Job;
use super::{Happening, World};
use crate::counts::Fault;
use crate::memory::Tag;
use crate::oracle::{Check, Finding, Key, Scope, found};

/// Something the operator waits for.
#[derive(Debug)]
pub(super) enum Errand {
    Invalidate {
        space: u32,
        at_least: Generation,
    },
    Destroy {
        number: u64,
        job: Job,
    },
    ForgetOrphans,
    /// Of blocks that were deleted.
    Forget {
        number: u64,
        scope: Scope,
    },
    /// With the blocks that were cached when it was asked for.
    Flush {
        cached: Vec<(Key, Tag)>,
    },
}

/// What the tables of so small a world may take: they grow by chunks, not with time.
const INDEX_BYTES_MAX: u64 = 4 << 20;

/// Auditors look and never hold. One for each domain, apart from all clients.
pub(super) fn auditor(domain: TrustDomain) -> ClientId {
    ClientId((1 << 40) + u64::from(domain.0))
}

impl World {
    pub(super) fn admit_auditors(&mut self) -> Check {
        for domain in 0..self.plan.domains {
            let domain = TrustDomain(domain);
            if let Err(refusal) = self.manager.connect(auditor(domain), domain, self.now) {
                return found(format!("an auditor of {domain:?} is refused: {refusal:?}"));
            }
        }
        self.pump()
    }

    pub(super) fn operate(&mut self) -> Check {
        if self.steps_left == 0 {
            return Ok(());
        }
        self.step += 1;
        let rates = self.plan.rates;
        if self.strikes(rates.crash) {
            // Not now, where nothing is half-way, but a few happenings later.
            self.crash_after = Some(self.random.below(20));
        }
        if self.strikes(rates.flip) {
            self.flip_a_bit();
        }
        if self.random.chance(self.plan.operator_permille) {
            let space = self.random.index(self.spaces.len()) as u32;
            let current = self.generation(space)?.0;
            let target = self
                .random
                .chance(300)
                .then(|| Generation(self.random.between(1, current + 2)));
            self.invalidate(space, target)?;
        }
        if self.random.chance(self.plan.operator_permille / 4) {
            let space = self.random.index(self.spaces.len()) as u32;
            self.destroy_old(space)?;
        }
        if self.random.chance(self.plan.operator_permille / 4) {
            let space = self.random.index(self.spaces.len()) as u32;
            self.forget_some(space)?;
        }
        if self.random.chance(self.plan.operator_permille / 3) {
            let domain = self
                .random
                .chance(500)
                .then(|| TrustDomain(self.random.below(u64::from(self.plan.domains)) as u32));
            self.flush(domain)?;
        }
        if self.plan.anchored && self.random.chance(30) {
            self.take_image();
        }
        if self.plan.anchored && self.random.chance(60) {
            self.advance_refused()?;
        }
        if rates.drain && !self.draining && self.steps_left < self.plan.steps / 8 && self.strikes(20) {
            self.tally.fault(Fault::Drain);
            self.begin_drain()?;
        }
        let delay_ns = self.random.exponential(self.plan.step_gap_ns);
        self.after(delay_ns, Happening::Operate);
        Ok(())
    }

    pub(super) fn begin_drain(&mut self) -> Check {
        self.note(|| "drain".to_owned());
        self.draining = true;
        self.manager.drain(self.now);
        self.pump()
    }

    pub(super) fn invalidate(&mut self, space: u32, target: Option<Generation>) -> Check {
        let current = self.generation(space)?;
        let target = target.or_else(|| self.above_anchor(space, current));
        let at_least = target.unwrap_or(Generation(current.0 + 1));
        self.step += 1;
        let operation = self
            .manager
            .invalidate(self.spaces[space as usize].id, target, self.now);
        self.note(|| format!("invalidate {space} to {target:?}: {operation:?}"));
        if self
            .errands
            .insert(operation, Errand::Invalidate { space, at_least })
            .is_some()
        {
            return found(format!("{operation:?} is used for a second errand"));
        }
        self.pump()
    }

    pub(super) fn invalidated(
        &mut self,
        operation: OperationId,
        namespace: NamespaceId,
        generation: Generation,
    ) -> Check {
        let Some(Errand::Invalidate { space, at_least }) = self.errands.remove(&operation) else {
            return found(format!(
                "{operation:?} is acknowledged as an invalidation nobody waits for"
            ));
        };
        let open = &mut self.spaces[space as usize];
        if open.id != namespace || generation < at_least {
            return found(format!(
                "the invalidation of {:?} to {at_least:?} is acknowledged as {namespace:?} to {generation:?}",
                open.id
            ));
        }
        if open.recorded < generation {
            return found(format!(
                "{namespace:?} {generation:?} is acknowledged, on record is {:?}",
                open.recorded
            ));
        }
        if self.plan.anchored && open.anchored < generation {
            return found(format!(
                "{namespace:?} {generation:?} is acknowledged, the anchor knows of {:?}",
                open.anchored
            ));
        }
        open.acknowledged = open.acknowledged.max(generation);
        self.step += 1;
        self.ledger.invalidate(space, generation, self.step);
        self.after(0, Happening::Probe(space));
        if self.plan.anchored && self.faults_on && self.random.chance(700) {
            // As a purge that destroys goes on.
            return self.destroy_old(space);
        }
        Ok(())
    }

    /// Asks at once for what was just invalidated.
    pub(super) fn probe(&mut self, space: u32) -> Check {
        if self.is_refused(space) {
            return Ok(());
        }
        self.step += 1;
        let domain = self.spaces[space as usize].domain;
        for realization in 0..self.plan.realizations {
            let keys: Vec<Key> = self
                .nodes()
                .map(|node| Key {
                    space,
                    realization,
                    node,
                })
                .collect();
            self.check_lookup(auditor(domain), &keys)?;
        }
        let client = self
            .clients
            .iter()
            .find(|(_, client)| client.domain == domain && !client.lost && client.stalled_until <= self.now)
            .map(|(client, _)| *client);
        let Some(client) = client else { return Ok(()) };
        let realization = self.random.below(u64::from(self.plan.realizations)) as u32;
        let keys: Vec<Key> = self
            .nodes()
            .map(|node| Key {
                space,
                realization,
                node,
            })
            .collect();
        self.fetch_keys(client, keys, FetchScope::Each, self.now)
    }

    fn nodes(&self) -> std::ops::Range<u32> {
        0..self.plan.lengths.len().min(self.plan.settings.batch_keys_max) as u32
    }

    pub(super) fn flush(&mut self, domain: Option<TrustDomain>) -> Check {
        let present = self.present()?;
        let spaces: BTreeSet<u32> = (0..self.spaces.len() as u32)
            .filter(|space| domain.is_none_or(|domain| self.spaces[*space as usize].domain == domain))
            .collect();
        let cached = self
            .ledger
            .live_keys()
            .filter(|(key, _)| spaces.contains(&key.space) && present.contains(key))
            .collect();
        self.step += 1;
        let operation = self.manager.flush(domain, self.now);
        self.note(|| format!("flush {domain:?}: {operation:?}"));
        if self.errands.insert(operation, Errand::Flush { cached }).is_some() {
            return found(format!("{operation:?} is used for a second errand"));
        }
        self.pump()
    }

    /// With nothing left out, what was cached then and still is has a synced copy on NVMe.
    pub(super) fn flushed(&mut self, operation: OperationId, left_out: u64) -> Check {
        let Some(Errand::Flush { cached }) = self.errands.remove(&operation) else {
            return found(format!("{operation:?} is acknowledged as a flush nobody waits for"));
        };
        if left_out > 0 {
            return Ok(());
        }
        let kept: BTreeSet<Tag> = self
            .nvme
            .segments
            .values()
            .filter(|segment| segment.open && !segment.closing)
            .flat_map(|segment| segment.records.values())
            .filter(|record| record.is_synced())
            .map(|record| record.tag)
            .collect();
        let present = self.present()?;
        for (key, tag) in cached {
            if present.contains(&key) && self.ledger.live(key) == Some(tag) && !kept.contains(&tag) {
                return found(format!("a flush left nothing out, but {key:?} has no synced copy"));
            }
            if kept.contains(&tag) {
                self.ledger.cover(tag);
            }
        }
        Ok(())
    }

    /// What the manager lists as cached.
    pub(super) fn present(&mut self) -> Result<BTreeSet<Key>, Finding> {
        let mut present = BTreeSet::new();
        for space in 0..self.spaces.len() as u32 {
            if self.is_refused(space) {
                continue;
            }
            let domain = self.spaces[space as usize].domain;
            for realization in 0..self.plan.realizations {
                let keys: Vec<Key> = self
                    .nodes()
                    .map(|node| Key {
                        space,
                        realization,
                        node,
                    })
                    .collect();
                let tiers = self.check_lookup(auditor(domain), &keys)?;
                present.extend(
                    keys.iter()
                        .zip(tiers)
                        .filter(|(_, tier)| tier.is_some())
                        .map(|(key, _)| *key),
                );
            }
        }
        Ok(present)
    }

    /// Everything that must hold at any time.
    pub(super) fn audit(&mut self) -> Check {
        self.manager.check_invariants();
        let present = self.present()?;
        let statistics = self.manager.statistics();
        let hidden = self.plan.settings.nvme_bytes > 0 && statistics.nvme_in_service == 0;
        self.ledger.check_present(&present, hidden)?;
        let settings = &self.plan.settings;
        let (leases, slots) = self
            .clients
            .keys()
            .map(|client| self.holdings(*client))
            .fold((0, 0), |sum, holds| (sum.0 + holds.0, sum.1 + holds.1));
        // What a request that waits was given already is counted, but its client does not know of it yet.
        let (mut leases_to_come, mut slots_to_come) = (0, 0);
        for wait in self.waits.values() {
            match wait.asked {
                Asked::Fetch { .. } => leases_to_come += wait.keys.len(),
                Asked::Reserve { .. } => slots_to_come += wait.keys.len(),
            }
        }
        for client in self.clients.values() {
            leases_to_come += client.never_told.0;
            slots_to_come += client.never_told.1;
        }
        let settling = self.flights.len();
        let clients = self.clients.len() + self.plan.domains as usize;
        for (name, said, counted, to_come) in [
            ("leases", statistics.leases, leases, leases_to_come),
            ("reservations", statistics.reservations, slots, slots_to_come),
            ("waiting", statistics.waiting, self.waits.len(), 0),
            ("clients", statistics.clients, clients, 0),
            (
                "host segments",
                statistics.host_segments,
                self.host.segments.len(),
                settling,
            ),
        ] {
            if said < counted as u64 || said > (counted + to_come) as u64 {
                return found(format!("{said} {name} are said to be, {counted} are"));
            }
        }
        for (name, said, most) in [
            ("blocks", statistics.blocks, settings.blocks_max as u64),
            ("host_used_bytes", statistics.host_used_bytes, self.host.bytes()),
            ("hbm_used_bytes", statistics.hbm_used_bytes, self.hbm.bytes()),
            ("hbm_blocks", statistics.hbm_blocks, statistics.blocks),
            ("nvme_used_bytes", statistics.nvme_used_bytes, self.nvme.bytes()),
            ("blocks cached", present.len() as u64, statistics.blocks),
            ("host_blocks", statistics.host_blocks, statistics.blocks),
            ("nvme_blocks", statistics.nvme_blocks, statistics.blocks),
            ("index_bytes", statistics.index_bytes, INDEX_BYTES_MAX),
            ("corrupt", statistics.corrupt, self.corrupt_answers),
            // Besides those on their way, some that were refused wait for their next attempt.
            (
                "operations_in_flight",
                statistics.operations_in_flight,
                self.flights.len() as u64 + statistics.host_segments + statistics.hbm_segments + 1,
            ),
        ] {
            if said > most {
                return found(format!("{name} is {said}, more than {most}"));
            }
        }
        self.check_quotas(&present)?;
        let mut gone = 0;
        for key in self.seen.difference(&present) {
            let written = self.ledger.live(*key).and_then(|tag| self.ledger.written(tag));
            // An invalidation hides blocks before it is acknowledged.
            gone += u64::from(written.is_some_and(|written| self.generation(key.space) == Ok(written.generation)));
        }
        let forgotten = statistics.forgotten - self.forgotten_before;
        if gone > forgotten && !hidden {
            return found(format!("{gone} blocks are gone, {forgotten} are said to be forgotten"));
        }
        self.forgotten_before = statistics.forgotten;
        self.seen = present;
        Ok(())
    }

    fn check_quotas(&mut self, present: &BTreeSet<Key>) -> Check {
        for (index, space) in self.plan.spaces.iter().enumerate() {
            let Some(quota) = space.quota_bytes.or(self.plan.settings.namespace_quota_bytes) else {
                continue;
            };
            let lengths = present
                .iter()
                .filter(|key| key.space == index as u32)
                .filter_map(|key| self.ledger.written(self.ledger.live(*key)?));
            let bytes: u64 = lengths.map(|written| u64::from(written.length)).sum();
            // What came back with a restart counts, but is no reason to forget anything before room is asked for.
            let back = self.over_quota.contains(&(index as u32));
            if bytes > quota && !back {
                return found(format!("namespace {index} caches {bytes} bytes, its quota is {quota}"));
            }
            // While the device is out of service part of it is not seen, and comes back with it.
            if bytes <= quota && self.manager.statistics().nvme_in_service == 1 {
                self.over_quota.remove(&(index as u32));
            }
        }
        Ok(())
    }

    /// Where a key is, as the auditor of its domain sees it.
    pub(super) fn tier_of(&mut self, key: Key) -> Result<Option<Tier>, Finding> {
        let domain = self.spaces[key.space as usize].domain;
        Ok(self.check_lookup(auditor(domain), &[key])?[0])
    }

    /// The last to leave.
    pub(super) fn dismiss_auditors(&mut self) -> Check {
        for domain in 0..self.plan.domains {
            self.manager
                .disconnect(auditor(TrustDomain(domain)), kvtier_core::Departure::Clean, self.now);
            self.pump()?;
        }
        Ok(())
    }

    /// Forgets everything, as the clients could.
    pub(super) fn delete_everything(&mut self) -> Check {
        for space in 0..self.spaces.len() as u32 {
            for realization in 0..self.plan.realizations {
                let keys: Vec<Key> = self
                    .nodes()
                    .map(|node| Key {
                        space,
                        realization,
                        node,
                    })
                    .collect();
                let domain = self.spaces[space as usize].domain;
                self.delete_keys(auditor(domain), &keys)?;
            }
        }
        Ok(())
    }

    /// A refusal that only a drain explains.
    pub(super) fn expect_draining(&mut self, refusal: Option<Refusal>) -> Check {
        match refusal {
            Some(Refusal::Draining) => {
                self.tally.answer("refused_draining");
                Ok(())
            }
            other => found(format!("while draining, a request is answered {other:?}")),
        }
    }
}
