//! The death of the process that holds the manager, or of its machine: what is left, and the run after it.

use std::collections::{BTreeMap, BTreeSet};

use kvtier_core::{
    Action, Extent, Labels, OperationId, Parent, Realization, RecordLabel, Restored, RestoredRecord, RestoredSegment,
    Tier,
};

use super::{World, new_manager};
use crate::counts::Fault;
use crate::memory::{CutShort, Memory, Reach, Record, Tag};
use crate::oracle::{Check, Finding, Key, found};
use crate::plan::Plan;
use crate::random::Random;

/// What a restart has to bring back: for each key the newest record that is left.
struct Left {
    tag: Tag,
    label: RecordLabel,
    record: Record,
}

impl World {
    /// Everything that is not on a device is gone, and of that only what survives such a death is left.
    pub(super) fn crash(&mut self) -> Check {
        let power_cut = self.random.chance(500);
        self.tally.fault(if power_cut { Fault::PowerCut } else { Fault::Kill });
        self.note(|| {
            if power_cut {
                "the power goes"
            } else {
                "the process dies"
            }
            .to_owned()
        });
        self.step += 1;
        let mut promised = self.promised()?;
        let mut unanswered = self.end_flights(power_cut)?;
        self.lose_what_does_not_survive(power_cut);
        if let Some(of_image) = self.put_image_back() {
            promised.clear();
            unanswered = of_image;
        }
        self.lose_memory();
        let resized = self.plan.settings.nvme_bytes > 0 && self.strikes(100);
        if resized {
            self.tally.fault(Fault::Resize);
            let segments = self.random.between(4, 12);
            self.plan.settings.nvme_bytes = self.plan.settings.nvme_segment_bytes * segments;
        }
        // A smaller tier drops the oldest segments; one that could not be closed before this death is there once more, and dropped again.
        let resized = resized || self.nvme.bytes() > self.plan.settings.nvme_bytes;
        let mut left = self.newest_records();
        let (restored, given) = self.restart()?;
        self.check_restored(&left, restored, given)?;
        self.catch_up_anchor();
        left.retain(|key, _| !self.is_refused(key.space));
        self.come_back(&left, &unanswered)?;
        self.admit_auditors()?;
        let present = self.present()?;
        // The index takes the newest; what more there is has no place.
        let full = restored.blocks >= self.plan.settings.blocks_max as u64;
        for key in left.keys().filter(|key| !present.contains(key)) {
            // One that was deleted may stay away, or come back as long as that was not durable.
            let deleted = left[key].record.was_forgotten;
            if !resized && !full && !deleted {
                return found(format!(
                    "a record of {key:?} survived, but a restart does not bring it back"
                ));
            }
            self.ledger.forget(*key, self.step);
        }
        for (key, tag) in promised {
            let written = self.ledger.written(tag).map(|written| written.generation);
            let current = written == Some(self.spaces[key.space as usize].recorded);
            let there = present.contains(&key) && self.ledger.live(key) == Some(tag);
            if current && there {
                self.tally.answer("came_back_as_flushed");
            }
            if current && !there && !resized && !full {
                return found(format!(
                    "a flush covered write {tag} of {key:?}, which nobody deleted, and a restart does not bring it back"
                ));
            }
        }
        for _ in 0..restored.blocks {
            self.tally.answer("came_back");
        }
        self.link_again(&left, &present);
        self.over_quota = (0..self.spaces.len() as u32).collect();
        self.seen = present;
        self.resume_purges()?;
        for _ in 0..self.plan.clients {
            self.arrive()?;
        }
        Ok(())
    }

    /// What a flush covered and the manager says is only on NVMe: it must be there after a restart.
    fn promised(&mut self) -> Result<Vec<(Key, Tag)>, Finding> {
        let covered: Vec<(Key, Tag)> = self
            .ledger
            .live_keys()
            .filter(|(_, tag)| self.ledger.is_covered(*tag))
            .collect();
        let mut promised = Vec::new();
        for (key, tag) in covered {
            if self.tier_of(key)? == Some(Tier::Nvme) {
                promised.push((key, tag));
            }
        }
        Ok(promised)
    }

    /// What was under way came about or not. Answers which writes nobody was told of.
    fn end_flights(&mut self, power_cut: bool) -> Result<BTreeSet<OperationId>, Finding> {
        let flights = std::mem::take(&mut self.flights);
        let unanswered = flights.keys().copied().collect();
        for flight in flights.into_values().filter(|flight| !flight.cancelled) {
            if !self.random.chance(500) {
                continue;
            }
            match flight.action {
                Action::OpenSegment {
                    tier: Tier::Nvme,
                    segment,
                    ..
                } if !self.nvme.segments.get(&segment).is_some_and(|segment| segment.open) => {
                    self.nvme.segments.remove(&segment);
                }
                Action::CloseSegment {
                    tier: Tier::Nvme,
                    segment,
                    ..
                } => {
                    self.nvme.segments.remove(&segment);
                }
                Action::SealSegment { segment, .. } => self.write_index(segment),
                Action::SyncTier { .. } => self.sync_records(),
                Action::RecordGeneration {
                    namespace, generation, ..
                } => {
                    self.record_generation(namespace, generation);
                    if self.random.chance(500) {
                        self.note_in_anchor(namespace, generation);
                    }
                }
                Action::EraseRecords {
                    segment,
                    pages,
                    namespace,
                    keep,
                    ..
                } => {
                    let mut random = Random::new(self.random.next_u64());
                    let cut_short = CutShort {
                        random: &mut random,
                        index_may_lag: power_cut,
                    };
                    self.nvme.erase(segment, pages, namespace, &keep, Some(cut_short))?;
                }
                _ => {}
            }
        }
        Ok(unanswered)
    }

    pub(super) fn lose_what_does_not_survive(&mut self, power_cut: bool) {
        let (interval, now) = (self.plan.flush_interval_ns, self.now.0);
        let mut lost = Vec::new();
        let mut torn = Vec::new();
        for (id, segment) in &mut self.nvme.segments {
            for (offset, record) in &mut segment.records {
                // Entries that were held back went to the system once in every interval.
                if now / interval > record.at.0 / interval {
                    record.entry = record.entry.max(Reach::System);
                }
                if let Some((at, reach)) = &mut record.forgotten
                    && now / interval > at.0 / interval
                {
                    *reach = (*reach).max(Reach::System);
                }
                let random = &mut self.random;
                let mut survives = |reach: Reach| match reach {
                    Reach::Process => false,
                    Reach::System => !power_cut || random.chance(500),
                    Reach::Device => true,
                };
                if !survives(record.entry) {
                    lost.push((*id, *offset));
                    continue;
                }
                let forgotten = record.forgotten.take();
                record.was_forgotten |= forgotten.is_some();
                record.forgotten = forgotten.filter(|(_, reach)| survives(*reach));
                if !survives(record.payload) {
                    let extent = Extent {
                        segment: *id,
                        offset: *offset,
                        length: record.length,
                    };
                    torn.push(extent);
                }
                if power_cut {
                    record.sync();
                }
            }
        }
        for (id, offset) in lost {
            if let Some(segment) = self.nvme.segments.get_mut(&id) {
                segment.records.remove(&offset);
            }
        }
        for extent in torn {
            let pages = self
                .random
                .below(u64::from(extent.length).div_ceil(crate::memory::PAGE_BYTES));
            self.nvme.tear(&extent, pages as usize);
        }
    }

    fn lose_memory(&mut self) {
        self.ledger.clear(self.step);
        self.hbm = Memory::new("hbm");
        self.host = Memory::new("host");
        self.nvme.found_again();
        self.waits.clear();
        self.errands.clear();
        self.clients.clear();
        self.queue
            .retain(|_, happening| matches!(happening, super::Happening::Operate));
        self.forgotten_before = 0;
        self.corrupt_answers = 0;
        self.draining = false;
        self.crash_after = None;
    }

    fn newest_records(&self) -> BTreeMap<Key, Left> {
        let mut left = BTreeMap::new();
        for segment in self.nvme.segments.values() {
            for record in segment.records.values() {
                let Some(key) = self.key_of(&record.label) else {
                    continue;
                };
                let current = record.label.generation == self.spaces[key.space as usize].recorded;
                if current && record.forgotten.is_none() {
                    let newest = Left {
                        tag: record.tag,
                        label: record.label,
                        record: *record,
                    };
                    left.insert(key, newest);
                }
            }
        }
        if self.plan.settings.nvme_bytes == 0 {
            left.clear();
        }
        left
    }

    /// A new manager is given what the storage finds, in no particular order.
    fn restart(&mut self) -> Result<(Restored, u64), Finding> {
        self.manager = new_manager(&self.plan)?;
        let quotas_first = self.random.chance(500);
        for index in 0..self.spaces.len() {
            let (space, name) = (&self.spaces[index], self.plan.spaces[index].name);
            let (domain, recorded, id) = (space.domain, space.recorded, space.id);
            let restored = self.manager.restore_namespace(domain, name, recorded);
            if restored != Ok(id) {
                return found(format!("namespace {index} was {id:?} and is restored as {restored:?}"));
            }
            if self.generation(index as u32)? != recorded {
                return found(format!("namespace {index} is not at {recorded:?}, which is on record"));
            }
        }
        for index in 0..self.realizations.len() {
            let digest = Realization::digest(&[("rank", &index.to_string())]);
            let opened = self.manager.open_realization(digest);
            if opened != Ok(self.realizations[index]) {
                return found(format!("realization {index} comes back as {opened:?}"));
            }
        }
        if quotas_first {
            self.set_quotas();
        }
        // An image has them with their labels.
        if self.plan.labels > 0 && !self.plan.anchored && self.label_random.chance(200) {
            // Written by a version that kept none.
            let index = self.label_random.index(self.nvme.segments.len());
            for record in self
                .nvme
                .segments
                .values_mut()
                .skip(index)
                .take(1)
                .flat_map(|segment| segment.records.values_mut())
            {
                record.label.labels = Labels::Any;
            }
        }
        let mut segments: Vec<RestoredSegment> = self
            .nvme
            .segments
            .iter()
            .map(|(id, segment)| RestoredSegment {
                segment: *id,
                bytes: segment.bytes,
                records: segment
                    .records
                    .iter()
                    .filter(|(_, record)| record.forgotten.is_none())
                    .map(|(offset, record)| RestoredRecord {
                        label: record.label,
                        offset: *offset,
                        length: record.length,
                        checksum: record.checksum,
                    })
                    .collect(),
            })
            .collect();
        for index in (1..segments.len()).rev() {
            let other = self.random.index(index + 1);
            segments.swap(index, other);
        }
        let given = segments.iter().map(|segment| segment.records.len() as u64).sum();
        let restored = self.manager.restore(segments, self.now);
        self.note(|| format!("restart: {restored:?} of {given} records"));
        if !quotas_first {
            self.set_quotas();
        }
        self.manager.check_invariants();
        Ok((restored, given))
    }

    fn set_quotas(&mut self) {
        for index in 0..self.spaces.len() {
            let quota_bytes = self.plan.spaces[index].quota_bytes;
            if quota_bytes.is_some() {
                self.manager.set_quota(self.spaces[index].id, quota_bytes);
            }
        }
    }

    fn check_restored(&self, left: &BTreeMap<Key, Left>, restored: Restored, given: u64) -> Check {
        let statistics = self.manager.statistics();
        if restored.blocks > left.len() as u64
            || restored.blocks + restored.left_out != given
            || (statistics.blocks, statistics.nvme_blocks) != (restored.blocks, restored.blocks)
        {
            return found(format!(
                "of {given} records for {} keys {restored:?}; there are {} blocks, {} on NVMe",
                left.len(),
                statistics.blocks,
                statistics.nvme_blocks
            ));
        }
        Ok(())
    }

    /// What is left may be seen again.
    fn come_back(&mut self, left: &BTreeMap<Key, Left>, unanswered: &BTreeSet<OperationId>) -> Check {
        for (key, Left { tag, record, .. }) in left {
            if self.ledger.is_destroyed(*tag) {
                return found(format!(
                    "write {tag} of {key:?} was deleted and destroyed, but a restart finds {record:?}"
                ));
            }
            let acknowledged = self.spaces[key.space as usize].acknowledged;
            if record.label.generation < acknowledged {
                return found(format!(
                    "a restart brings back {key:?} of {:?}, invalidated up to {acknowledged:?}",
                    record.label.generation
                ));
            }
            let lost_its_forgetting = record.was_forgotten || unanswered.contains(&record.operation);
            if self.ledger.is_deleted(*tag) && !lost_its_forgetting {
                return found(format!(
                    "write {tag} of {key:?} was deleted, but its record {record:?} was never forgotten"
                ));
            }
            self.ledger.revive(*tag);
        }
        Ok(())
    }

    /// Children of cached parents, as their records say.
    fn link_again(&mut self, left: &BTreeMap<Key, Left>, present: &BTreeSet<Key>) {
        for (key, Left { label, .. }) in left.iter().filter(|(key, _)| present.contains(key)) {
            let Parent::Block(hash) = label.parent else { continue };
            let Some(above) = self.plan.parents[key.node as usize] else {
                continue;
            };
            let parent = Key { node: above, ..*key };
            if Plan::hash(above) == hash && present.contains(&parent) {
                self.ledger.link(*key, parent);
            }
        }
    }

    /// All that was written so far survives a power cut.
    pub(super) fn sync_records(&mut self) {
        for record in self
            .nvme
            .segments
            .values_mut()
            .flat_map(|segment| segment.records.values_mut())
        {
            record.sync();
        }
    }
}
