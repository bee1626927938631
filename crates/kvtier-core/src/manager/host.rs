use super::copies::{is_held, judge_forget};
use super::operation::Operation;
use super::{TierManager, mutant_is};
use crate::host_table::{HostSegmentState, SlotState, Want};
use crate::index::flag;
use crate::{Action, BlockId, Completion, Failure, Tier, Verdict};
use std::time::Duration;

/// How long no segment is opened after the driver had no memory for one.
const OPEN_PAUSE: Duration = Duration::from_millis(100);

impl TierManager {
    /// How large a segment for slots of this size is: the base size, or where that would hold fewer than four, up to eight
    /// slots as far as an eighth of the host memory allows.
    pub(super) fn segment_bytes(&self, slot_bytes: u64) -> u64 {
        let base = self.settings.host_segment_bytes;
        if slot_bytes * 4 <= base {
            return base;
        }
        slot_bytes * (self.settings.host_bytes / 8 / slot_bytes).clamp(1, 8)
    }

    /// A slot for a group: a free one, or the one of the next victim. None where room has to be made first, which begins
    /// then. The slot comes in state `Reserved` and has to be put to use.
    pub(super) fn acquire(&mut self, group: u32) -> Option<(u32, u32)> {
        loop {
            if let Some(slot) = self.host.take_slot(group, SlotState::Reserved, crate::index::NONE) {
                self.open_ahead(group);
                return Some(slot);
            }
            // More memory comes before eviction.
            if self.host.group(group).opening > 0 || self.open_segment(group) {
                return None;
            }
            if !self.evict_clean(group) && (self.can_demote(group) || !self.forget_leaf(group)) {
                return None;
            }
        }
    }

    /// Serves who waits for slots of a group and sees to it that there will be more.
    pub(super) fn look_after(&mut self, group: u32) {
        self.serve(group);
        self.demote_ahead(group);
        self.drain_host(group);
        self.reclaim_host_for(group);
        if self.host.group(group).wanted == 0 && self.policy.length(TierManager::group_list(group, false)) == 0 {
            self.host.close_group_if_idle(group);
        }
    }

    fn serve(&mut self, group: u32) {
        while let Some(&want) = self.host.group(group).wants.front() {
            let served = match want {
                Want::Reserve(operation) => self.serve_reserve(group, operation),
                Want::Promotion(promotion) => self.serve_promotion(group, promotion),
            };
            if !served {
                if self.give_up_ahead(group) {
                    continue;
                }
                self.open_for_wanted(group);
                return;
            }
            let wants = &mut self.host.group_mut(group).wants;
            if wants.front() == Some(&want) {
                wants.pop_front();
            }
        }
    }

    fn serve_promotion(&mut self, group: u32, promotion: u64) -> bool {
        if self.promotions.at(promotion).is_none() {
            return true;
        }
        let Some((segment, slot)) = self.acquire(group) else {
            return false;
        };
        self.host.slot_mut(segment, slot).state = SlotState::Filling;
        self.host.group_mut(group).wanted -= 1;
        self.promotion_has_slot(promotion, segment, slot);
        true
    }

    /// Opens segments for all who wait, as far as memory is left.
    fn open_for_wanted(&mut self, group: u32) {
        loop {
            let entry = self.host.group(group);
            if u64::from(entry.opening) >= entry.wanted || !self.open_segment(group) {
                return;
            }
        }
    }

    /// Opens the next segment while there are still free slots, so that nobody has to wait for it.
    fn open_ahead(&mut self, group: u32) {
        let entry = self.host.group(group);
        let per_segment = self.segment_bytes(entry.slot_bytes) / entry.slot_bytes;
        if entry.opening == 0 && u64::from(entry.free) * 4 < per_segment {
            self.open_segment(group);
        }
    }

    /// Whether another segment for this group would fit the host memory.
    pub(super) fn has_budget(&self, group: u32) -> bool {
        let bytes = self.segment_bytes(self.host.group(group).slot_bytes);
        self.host.opened_bytes + bytes <= self.settings.host_bytes && self.now >= self.host.open_not_before
    }

    fn open_segment(&mut self, group: u32) -> bool {
        if !self.has_budget(group) {
            return false;
        }
        let bytes = self.segment_bytes(self.host.group(group).slot_bytes);
        let place = self.host.open_segment(group, bytes);
        let operation = self.issue(Operation::OpenHost { segment: place });
        let segment = self.host.segment(place).id;
        let domain = Some(self.host.group(group).domain);
        self.actions.push_back(Action::OpenSegment {
            operation,
            tier: Tier::Host,
            segment,
            bytes,
            domain,
        });
        true
    }

    pub(super) fn host_opened(&mut self, place: u32, outcome: Result<Completion, Failure>) {
        let segment = self.host.segment_mut(place);
        assert_eq!(segment.state, HostSegmentState::Opening, "a segment is opened once");
        let (count, group) = (segment.free, segment.group);
        self.host.group_mut(group).opening -= count;
        if outcome.is_err() {
            self.host.drop_segment(place);
            self.host.open_not_before = self.now.after(OPEN_PAUSE);
            self.attend_all();
            return;
        }
        let segment = self.host.segment_mut(place);
        segment.state = HostSegmentState::Active;
        segment.available = true;
        let entry = self.host.group_mut(group);
        entry.slots += count;
        entry.free += count;
        entry.available.push(place);
        self.host.attend(group);
    }

    /// The driver did not answer in time: whatever it did, the segment is closed.
    pub(super) fn host_open_overdue(&mut self, place: u32) {
        let segment = self.host.segment_mut(place);
        let (count, group) = (segment.free, segment.group);
        segment.state = HostSegmentState::Closing;
        self.host.group_mut(group).opening -= count;
        self.close_host(place);
        self.host.attend(group);
    }

    pub(super) fn close_host(&mut self, place: u32) {
        let operation = self.issue(Operation::CloseHost { segment: place });
        let segment = self.host.segment(place).id;
        self.actions.push_back(Action::CloseSegment {
            operation,
            tier: Tier::Host,
            segment,
        });
    }

    pub(super) fn host_closed(&mut self, place: u32, outcome: Result<Completion, Failure>) {
        if outcome.is_err() {
            // The memory must not be counted as free before it is: ask again when the operation is due.
            self.retry_later(Operation::CloseHost { segment: place });
            return;
        }
        let group = self.host.drop_segment(place);
        self.counters.segments_reclaimed += 1;
        self.host.attend(group);
        self.attend_all();
    }

    /// Drops the oldest copy that is also on NVMe. False where there is none.
    pub(super) fn evict_clean(&mut self, group: u32) -> bool {
        let TierManager {
            policy, index, host, ..
        } = self;
        let list = TierManager::group_list(group, true);
        let victim = policy.victim(list, false, &mut |block| {
            let entry = index.entry(block.0);
            if host.slot(entry.host_segment, entry.host_slot).is_held() {
                Verdict::Shelve
            } else {
                Verdict::Take
            }
        });
        let Some(BlockId(block)) = victim else { return false };
        self.counters.evictions_host += 1;
        self.host.group_mut(group).evictions += 1;
        self.drop_host(block);
        true
    }

    /// Forgets the oldest block of a group that nobody holds and whose children are not cached; of a block that is also on
    /// NVMe only the host copy goes, whatever its children. False where there is none.
    pub(super) fn forget_leaf(&mut self, group: u32) -> bool {
        let careless = mutant_is!(self, EvictParentBeforeChild);
        let TierManager {
            policy, index, host, ..
        } = self;
        let list = TierManager::group_list(group, false);
        let victim = policy.victim(list, false, &mut |block| {
            let entry = index.entry(block.0);
            if entry.on_nvme() && !is_held(host, entry) {
                return Verdict::Take;
            }
            judge_forget(index, host, block.0, careless)
        });
        let Some(BlockId(block)) = victim else { return false };
        self.counters.evictions_host += 1;
        self.host.group_mut(group).evictions += 1;
        self.drop_host(block);
        true
    }

    /// The same, in whichever group has the oldest. Where all that may go is also on NVMe, a host copy goes, so that the
    /// NVMe copy may.
    pub(super) fn forget_any_leaf(&mut self) -> bool {
        let groups = self.groups_by_age();
        let used = |manager: &TierManager, group| manager.policy.length(TierManager::group_list(group, false)) > 0;
        groups.iter().any(|&group| used(self, group) && self.forget_leaf(group))
            || groups.iter().any(|&group| self.evict_clean(group))
    }

    /// Groups in use, that with the oldest candidate first.
    pub(super) fn groups_by_age(&self) -> Vec<u32> {
        let mut groups: Vec<(u32, u32)> = (0..)
            .zip(&self.host.groups)
            .filter(|(_, group)| group.is_some())
            .map(|(place, _)| (self.group_age(place).unwrap_or(0), place))
            .collect();
        groups.sort_by_key(|&(age, place)| (std::cmp::Reverse(age), place));
        groups.into_iter().map(|(_, place)| place).collect()
    }

    pub(super) fn group_age(&self, group: u32) -> Option<u32> {
        let clean = self.policy.age(TierManager::group_list(group, true), self.now);
        clean.max(self.policy.age(TierManager::group_list(group, false), self.now))
    }

    /// Has every group in which somebody waits looked after.
    pub(super) fn attend_waiting(&mut self) {
        for place in 0..u32::try_from(self.host.groups.len()).expect("groups are bounded by segments") {
            let waits = self.host.groups[place as usize]
                .as_ref()
                .is_some_and(|group| group.wanted > 0 || group.demoting);
            if waits || self.host_reclaim.as_ref().is_some_and(|drain| drain.group == place) {
                self.host.attend(place);
            }
        }
    }

    /// The same, and NVMe too.
    pub(super) fn attend_all(&mut self) {
        self.attend_waiting();
        if let Some(nvme) = &mut self.nvme {
            nvme.attention = true;
        }
    }

    /// Whether a block may leave host memory at once: it is also on NVMe.
    pub(super) fn is_clean(&self, block: u32) -> bool {
        let entry = self.index.entry(block);
        entry.on_nvme() && !entry.is(flag::DEMOTING)
    }
}
