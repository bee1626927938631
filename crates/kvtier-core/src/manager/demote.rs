use super::copies::StaleRecord;
use super::nvme::Placement;
use super::operation::{Operation, Purpose};
use super::{TierManager, mutant_is};
use crate::host_table::HostSegmentState;
use crate::index::{NONE, flag};
use crate::nvme_table::Writer;
use crate::{Action, BlockId, Completion, Failure, OperationId, Tier, Verdict};

impl TierManager {
    /// Whether blocks of this group can go to NVMe: the tier is in service and a segment holds one.
    pub(super) fn can_demote(&self, group: u32) -> bool {
        let Some(nvme) = &self.nvme else { return false };
        self.nvme_in_service()
            && self.host.group(group).slot_bytes + nvme.record_bytes <= nvme.room().min(nvme.live_max)
    }

    /// Writes the oldest blocks of a group to NVMe ahead of need, so that there is always a slot that can be had at once.
    pub(super) fn demote_ahead(&mut self, group: u32) {
        if !self.can_demote(group) || (self.has_budget(group) && self.host_reclaim.is_none()) {
            return;
        }
        let entry = self.host.group(group);
        let slots = u64::from(entry.slots);
        let wanted = entry.wanted;
        let (least, low) = self.clean_watermark(group);
        let high = (slots * u64::from(self.settings.host_clean_high_permille) / 1000)
            .max(wanted.min(slots))
            .max(least * 3 / 2);
        loop {
            let entry = self.host.group(group);
            let clean = self.policy.length(TierManager::group_list(group, true)) as u64;
            let ready = u64::from(entry.free) + clean + u64::from(entry.demotions) + u64::from(entry.ahead);
            let demoting = ready < high && (entry.demoting || ready < low.max(wanted.min(slots)));
            self.host.group_mut(group).demoting = demoting;
            if !demoting || !self.demote_one(group) {
                return;
            }
        }
    }

    /// Slots of a group that are to be had at once whatever their share, and the least of all together.
    fn clean_watermark(&self, group: u32) -> (u64, u64) {
        let slots = u64::from(self.host.group(group).slots);
        // A share of few slots is less than what keeps the device at work.
        let least = u64::from(self.settings.host_clean_slots_min).min(slots / 4);
        let low = (slots * u64::from(self.settings.host_clean_low_permille) / 1000).max(least);
        (least, low)
    }

    /// Whether a group has more slots to be had at once than it is to keep.
    pub(super) fn has_slots_to_spare(&self, group: u32) -> bool {
        let clean = self.policy.length(TierManager::group_list(group, true)) as u64;
        u64::from(self.host.group(group).free) + clean > self.clean_watermark(group).1
    }

    /// Makes one more block of a group clean, or begins to. False where nothing can be done now.
    fn demote_one(&mut self, group: u32) -> bool {
        if !self.may_write() {
            return false;
        }
        let TierManager {
            policy, index, host, ..
        } = self;
        let list = TierManager::group_list(group, false);
        let victim = policy.victim(list, true, &mut |block| {
            let entry = index.entry(block.0);
            let leased = host.slot(entry.host_segment, entry.host_slot).leases > 0;
            if leased || entry.is(flag::DEMOTING) {
                Verdict::Shelve
            } else {
                Verdict::Take
            }
        });
        let Some(BlockId(block)) = victim else { return false };
        let entry = self.index.entry(block);
        if !self.is_current(entry) {
            self.forget(block);
            return true;
        }
        if self.is_clean(block) {
            self.move_to_clean(block);
            self.host.attend(group);
            return true;
        }
        if !self.is_admitted(block) {
            self.counters.evictions_host += 1;
            self.forget(block);
            return true;
        }
        match self.start_demotion(block, Purpose::Room) {
            Placement::Placed => {
                self.policy.shelve(list, BlockId(block));
                self.host.group_mut(group).demotions += 1;
                true
            }
            Placement::Wait => false,
            Placement::Full => self.forget_for_room(group),
        }
    }

    /// NVMe is full of blocks whose children are here: the leaves have to go first, but not before somebody wants their room.
    fn forget_for_room(&mut self, group: u32) -> bool {
        let entry = self.host.group_mut(group);
        let refused = entry.refused_at.take() == Some(self.now);
        (entry.wanted > 0 || refused) && (self.forget_leaf(group) || self.forget_any_leaf())
    }

    /// Whether a block is written to NVMe when its slot is needed: the policy says so, or its children are cached.
    pub(super) fn is_admitted(&mut self, block: u32) -> bool {
        let admitted = !self.settings.nvme_admission
            || self.index.entry(block).children > 0
            || self.policy.admit(BlockId(block), Tier::Nvme);
        self.counters.admissions_refused += u64::from(!admitted);
        admitted
    }

    /// Whether one more demotion may be issued.
    pub(super) fn may_write(&self) -> bool {
        self.nvme_accepts() && (self.nvme_ref().writes as usize) < self.settings.demotions_in_flight_max
    }

    /// Whether the block's generation is on record. One that is not may be gone after a crash and come again for other blocks:
    /// nothing of it may lie on NVMe then.
    fn is_recorded(&self, block: u32) -> bool {
        let namespace = self.namespaces.at(self.index.entry(block).namespace);
        namespace.recorded >= namespace.generation || mutant_is!(self, DemoteBeforeRecorded)
    }

    /// It is not, but soon will be.
    pub(super) fn awaits_record(&self, block: u32) -> bool {
        let namespace = self.namespaces.at(self.index.entry(block).namespace);
        !self.is_recorded(block) && namespace.recording.is_some() && namespace.record_failures == 0
    }

    /// Issues the write of a host copy that is the only one.
    pub(super) fn start_demotion(&mut self, block: u32, purpose: Purpose) -> Placement {
        let entry = self.index.entry(block);
        assert!(
            entry.in_host() && !entry.on_nvme() && !entry.is(flag::DEMOTING),
            "only a dirty block is demoted"
        );
        let length = entry.length;
        if !self.is_recorded(block) {
            let failing = !self.awaits_record(block);
            return if failing { Placement::Full } else { Placement::Wait };
        }
        let (placement, segment, page) = self.place(block, length, Writer::Demotion);
        if placement != Placement::Placed {
            return placement;
        }
        let entry = self.index.entry(block);
        let (host_segment, host_slot) = (entry.host_segment, entry.host_slot);
        let source = self.host_extent(host_segment, host_slot, length);
        let target = self.nvme_extent(segment, page, length);
        let label = self.label(entry);
        let operation = self.issue(Operation::Demote(Demotion {
            block,
            host_segment,
            host_slot,
            nvme_segment: segment,
            page,
            length,
            purpose,
            group: self.host.segment(host_segment).group,
            deleted: false,
            flush: if let Purpose::Flush(flush) = purpose {
                Some(flush)
            } else {
                None
            },
        }));
        self.nvme_mut().writes += 1;
        self.host.slot_mut(host_segment, host_slot).operations += 1;
        self.writes.put(u64::from(block), operation);
        self.index.entry_mut(block).set(flag::DEMOTING);
        self.actions.push_back(Action::Demote {
            operation,
            source,
            target,
            label,
        });
        Placement::Placed
    }

    /// The block of a write in flight is forgotten: the write goes on for nobody.
    pub(super) fn detach_write(&mut self, block: u32) {
        let operation = self.writes.take(u64::from(block)).expect("a block being written");
        self.index
            .entry_mut(block)
            .clear(flag::DEMOTING | flag::RELOCATING | flag::USED);
        match &mut self
            .operations
            .get_mut(&operation)
            .expect("a write in flight")
            .operation
        {
            Operation::Demote(demotion) => demotion.block = NONE,
            Operation::Relocate(relocation) => relocation.block = NONE,
            _ => unreachable!("writes are demotions and relocations"),
        }
    }

    /// The block of a write in flight is deleted: what the write leaves behind has to be forgotten.
    pub(super) fn mark_deleted(&mut self, block: u32) {
        let operation = *self.writes.at(u64::from(block)).expect("a block being written");
        match &mut self
            .operations
            .get_mut(&operation)
            .expect("a write in flight")
            .operation
        {
            Operation::Demote(demotion) => demotion.deleted = true,
            Operation::Relocate(relocation) => relocation.deleted = true,
            _ => unreachable!("writes are demotions and relocations"),
        }
    }

    /// A flush waits for a write that something else began.
    pub(super) fn join_demotion(&mut self, block: u32, flush: OperationId) -> bool {
        let Some(&operation) = self.writes.at(u64::from(block)) else {
            return false;
        };
        match &mut self
            .operations
            .get_mut(&operation)
            .expect("a write in flight")
            .operation
        {
            // A flush that waits for it already counts it once.
            Operation::Demote(demotion) => demotion.flush.replace(flush) != Some(flush),
            _ => false,
        }
    }

    pub(super) fn demotion_answered(
        &mut self,
        operation: OperationId,
        demotion: &Demotion,
        outcome: Result<Completion, Failure>,
    ) {
        let Demotion {
            block,
            host_segment,
            host_slot,
            nvme_segment,
            page,
            length,
            purpose,
            group,
            deleted,
            ..
        } = *demotion;
        let record = StaleRecord {
            segment: nvme_segment,
            page,
            length,
        };
        let nvme = self.nvme_mut();
        nvme.writes -= 1;
        nvme.segment_mut(nvme_segment).writes -= 1;
        nvme.attention = true;
        self.host.slot_mut(host_segment, host_slot).operations -= 1;
        if matches!(purpose, Purpose::Room) {
            self.host.group_mut(group).demotions -= 1;
        }
        self.host.attend(group);
        let written = match outcome {
            Ok(Completion::Written { checksum }) => Some(checksum),
            Err(_) if mutant_is!(self, LostDemotion) => Some(0),
            Ok(Completion::Done | Completion::Erased { .. }) | Err(_) => None,
        };
        if deleted {
            // Whatever the outcome: a write that failed may have got there all the same.
            self.forget_record(record);
        }
        if block == NONE {
            self.nvme_mut().kill(nvme_segment, length);
            self.host.settle_slot(host_segment, host_slot);
            self.flush_answered(demotion, false);
            return;
        }
        assert_eq!(
            self.writes.take(u64::from(block)),
            Some(operation),
            "one write of a block at a time"
        );
        let entry = self.index.entry_mut(block);
        let used = entry.is(flag::USED);
        entry.clear(flag::DEMOTING | flag::USED);
        let Some(checksum) = written else {
            self.nvme_mut().kill(nvme_segment, length);
            self.note_stale(block, record);
            self.unpark(block);
            self.flush_answered(demotion, false);
            return;
        };
        if !self.is_current(self.index.entry(block)) {
            self.nvme_mut().kill(nvme_segment, length);
            self.forget(block);
            self.flush_answered(demotion, false);
            return;
        }
        let entry = self.index.entry_mut(block);
        entry.checksum = checksum;
        entry.set(flag::CHECKSUM);
        self.nvme_mut().written += 1;
        self.counters.demotions += 1;
        self.counters.demoted_bytes += u64::from(length);
        self.attach_nvme(block, nvme_segment, page, used);
        let leaves = self.host.segment(host_segment).state == HostSegmentState::Draining;
        let leased = self.host.slot(host_segment, host_slot).leases > 0;
        if leaves && !leased {
            self.counters.evictions_host += 1;
            self.drop_host(block);
        } else if matches!(purpose, Purpose::Room) && !used && !leased {
            self.move_to_clean(block);
        }
        self.unpark(block);
        if mutant_is!(self, LostDemotion) && outcome.is_err() && self.index.entry(block).in_host() {
            self.drop_host(block);
        }
        self.flush_answered(demotion, true);
    }
}

/// A host copy being written to NVMe.
#[derive(Clone, Debug)]
pub(super) struct Demotion {
    /// [`NONE`] once the block is forgotten.
    pub(super) block: u32,
    pub(super) host_segment: u32,
    pub(super) host_slot: u32,
    pub(super) nvme_segment: u32,
    pub(super) page: u32,
    pub(super) length: u32,
    pub(super) purpose: Purpose,
    pub(super) group: u32,
    /// The block was deleted meanwhile, not evicted.
    pub(super) deleted: bool,
    /// The flush that counts it.
    pub(super) flush: Option<OperationId>,
}
