use super::nvme::Placement;
use super::operation::Purpose;
use super::{TierManager, mutant_is};
use crate::host_table::{HostSegmentState, Slot, SlotState};
use crate::index::flag;
use crate::{Time, Verdict};
use std::time::Duration;

/// How long the emptying of a segment may make no progress before another is tried.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long no segment is chosen after none could be.
const PAUSE: Duration = Duration::from_millis(20);
/// A group whose next victim is this much older, in units of 2^20 ns, and twice as old, gives up a segment.
const MUCH_OLDER: u32 = 1000;
/// Blocks forgotten in one step so that a block of the segment becomes a leaf.
const LEAVES_A_STEP: u32 = 16;

/// A host segment being emptied, so that its memory can serve another group.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostDrain {
    pub(super) segment: u32,
    pub(super) group: u32,
    cursor: u32,
    /// Slots before the cursor changed: look once more.
    pub(super) again: bool,
    since: Time,
    /// Free slots when last looked at: while they grow in number there is progress.
    free: u32,
}

impl HostDrain {
    pub(super) fn gives_up_at(&self) -> Time {
        self.since.after(PATIENCE)
    }
}

impl TierManager {
    /// Begins to empty a segment of another group, where this one starves or where its blocks are much younger.
    pub(super) fn reclaim_host_for(&mut self, group: u32) {
        let entry = self.host.group(group);
        let per_segment = self.segment_bytes(entry.slot_bytes) / entry.slot_bytes;
        // Without NVMe nobody waits: a group serves itself by forgetting. That counts as a want once it cost a segment.
        if (entry.wanted == 0 && u64::from(entry.evictions) < per_segment)
            || entry.opening > 0
            || self.host_reclaim.is_some()
            || self.has_budget(group)
            || self.now < self.host_reclaim_not_before
            || self.host_segment_is_closing()
        {
            return;
        }
        let starved = self.host.group(group).wanted > 0 && !self.will_have_room(group);
        let entry = self.host.group(group);
        if !starved && u64::from(entry.evictions) < per_segment {
            return;
        }
        self.host.group_mut(group).evictions = 0;
        let own_age = self.group_age(group).unwrap_or(0);
        let sources = self.groups_by_age();
        let source = sources
            .into_iter()
            .filter(|&other| other != group && self.may_give(other))
            .find(|&other| {
                let age = self.group_age(other).unwrap_or(u32::MAX);
                starved || age > own_age.saturating_mul(2).saturating_add(MUCH_OLDER)
            });
        let segment = source.and_then(|source| self.choose_segment(source));
        match segment {
            Some(segment) => self.begin_host_drain(segment),
            None => self.host_reclaim_not_before = self.now.after(PAUSE),
        }
    }

    /// Whether who waits in a group will be served by its own blocks. Where nothing can be written to NVMe, who still waits
    /// found none that may go.
    fn will_have_room(&mut self, group: u32) -> bool {
        if !self.can_demote(group) {
            return false;
        }
        if self.host.group(group).demotions > 0 || self.policy.length(TierManager::group_list(group, true)) > 0 {
            return true;
        }
        let TierManager {
            policy, index, host, ..
        } = self;
        let movable = policy.victim(TierManager::group_list(group, false), true, &mut |block| {
            let entry = index.entry(block.0);
            if super::copies::is_held(host, entry) {
                Verdict::Shelve
            } else {
                Verdict::Take
            }
        });
        movable.is_some()
    }

    /// A group in which others wait gives nothing.
    fn may_give(&self, group: u32) -> bool {
        let entry = self.host.group(group);
        entry.slots > 0 && entry.wanted == 0
    }

    fn host_segment_is_closing(&self) -> bool {
        self.host
            .segments
            .iter()
            .flatten()
            .any(|segment| segment.state == HostSegmentState::Closing)
    }

    /// The segment with the fewest slots that somebody holds; of those the one of the next victim, since the blocks beside
    /// it are likely to be as old and as deep; then the one with the most free slots.
    fn choose_segment(&mut self, group: u32) -> Option<u32> {
        let TierManager {
            policy, index, host, ..
        } = self;
        let list = TierManager::group_list(group, false);
        let next = policy.victim(list, false, &mut |block| {
            super::copies::judge_forget(index, host, block.0, false)
        });
        let next = next.map(|block| self.index.entry(block.0).host_segment);
        let held = |slot: &&Slot| slot.is_held() || !matches!(slot.state, SlotState::Free | SlotState::Block);
        self.host
            .group(group)
            .segments
            .iter()
            .copied()
            .filter(|&place| self.host.segment(place).state == HostSegmentState::Active)
            .min_by_key(|&place| {
                let segment = self.host.segment(place);
                let held = segment.slots.iter().filter(held).count();
                (held, next != Some(place), std::cmp::Reverse(segment.free), place)
            })
    }

    fn begin_host_drain(&mut self, place: u32) {
        let segment = self.host.segment_mut(place);
        segment.state = HostSegmentState::Draining;
        segment.available = false;
        let (group, free, slots) = (segment.group, segment.free, segment.slots.len());
        let entry = self.host.group_mut(group);
        entry.available.retain(|&other| other != place);
        entry.free -= free;
        entry.slots -= u32::try_from(slots).expect("slots of a segment");
        self.host_reclaim = Some(HostDrain {
            segment: place,
            group,
            cursor: 0,
            again: false,
            since: self.now,
            free,
        });
        self.host.attend(group);
    }

    /// Empties the segment that is being reclaimed, if it is this group's.
    pub(super) fn drain_host(&mut self, group: u32) {
        let Some(drain) = self.host_reclaim.filter(|drain| drain.group == group) else {
            return;
        };
        let place = drain.segment;
        let count = u32::try_from(self.host.segment(place).slots.len()).expect("slots of a segment");
        let mut cursor = drain.cursor;
        while cursor < count {
            if !self.empty_slot(group, place, cursor) {
                break;
            }
            cursor += 1;
        }
        let free = self.host.segment(place).free;
        if free == count || (cursor == count && self.may_close_under_lease(place)) {
            self.host.segment_mut(place).state = HostSegmentState::Closing;
            self.host_reclaim = None;
            self.close_host(place);
            return;
        }
        let now = self.now;
        let drain = self.host_reclaim.as_mut().expect("found above");
        drain.cursor = cursor;
        if std::mem::replace(&mut drain.free, free) < free {
            drain.since = now;
        }
        if cursor == count && std::mem::take(&mut drain.again) {
            drain.cursor = 0;
            self.host.attend(group);
        }
    }

    /// False where the slot has to wait for room on NVMe.
    fn empty_slot(&mut self, group: u32, place: u32, slot: u32) -> bool {
        let memory = self.host.slot(place, slot);
        if memory.state != SlotState::Block || memory.is_held() {
            return true;
        }
        let block = memory.owner;
        let entry = self.index.entry(block);
        if self.is_clean(block) {
            self.counters.evictions_host += 1;
            self.drop_host(block);
            return true;
        }
        if !self.is_current(entry) {
            self.forget(block);
            return true;
        }
        if self.can_demote(group) && self.is_admitted(block) {
            if !self.may_write() {
                return false;
            }
            match self.start_demotion(block, Purpose::Drain) {
                Placement::Placed => return true,
                Placement::Wait => return false,
                Placement::Full => {}
            }
        }
        for forgotten in 0..LEAVES_A_STEP {
            let entry = self.index.entry(block);
            if entry.children == 0 && !entry.is(flag::PROMOTING) {
                self.counters.evictions_host += 1;
                self.drop_host(block);
                return true;
            }
            if !self.forget_any_leaf() {
                if forgotten > 0 {
                    // NVMe may have room now.
                    break;
                }
                return true;
            }
            let memory = self.host.slot(place, slot);
            if memory.state != SlotState::Block || memory.owner != block {
                return true;
            }
        }
        self.host.attend(group);
        false
    }

    /// The planted bug `ReclaimUnderLease`: only leases are left in the segment, and it is closed all the same.
    fn may_close_under_lease(&mut self, place: u32) -> bool {
        if !mutant_is!(self, ReclaimUnderLease) {
            return false;
        }
        let segment = self.host.segment(place);
        let only_leased =
            |slot: &Slot| slot.state == SlotState::Free || (slot.state == SlotState::Block && slot.operations == 0);
        if !segment.slots.iter().all(only_leased) {
            return false;
        }
        let blocks: Vec<u32> = segment
            .slots
            .iter()
            .filter(|slot| slot.state == SlotState::Block)
            .map(|slot| slot.owner)
            .collect();
        for block in blocks {
            self.drop_host(block);
        }
        true
    }

    /// Gives up on a segment that cannot be emptied in time: it serves its group again.
    pub(super) fn check_host_drain(&mut self) {
        let Some(drain) = self.host_reclaim.filter(|drain| drain.gives_up_at() <= self.now) else {
            return;
        };
        self.host_reclaim = None;
        self.host_reclaim_not_before = self.now.after(PAUSE);
        let segment = self.host.segment_mut(drain.segment);
        segment.state = HostSegmentState::Active;
        segment.available = segment.free > 0;
        let (free, slots) = (segment.free, segment.slots.len());
        let entry = self.host.group_mut(drain.group);
        entry.free += free;
        entry.slots += u32::try_from(slots).expect("slots of a segment");
        if free > 0 {
            entry.available.push(drain.segment);
        }
        self.host.attend(drain.group);
        self.attend_all();
    }
}
