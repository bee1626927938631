use super::operation::Operation;
use super::{TierManager, mutant_is};
use crate::host_table::{SlotState, Want, pages};
use crate::index::{NONE, flag};
use crate::key_map::KeyMap;
use crate::{Action, Failure, Fetched, OperationId, Tier};
use std::collections::VecDeque;

/// Reads in flight from which on none begins that nobody waits for: who comes next waits for them.
const AHEAD_READS_MAX: usize = 8;

/// An NVMe copy on its way to host memory. All who fetch the block meanwhile share it.
#[derive(Debug)]
pub(super) struct Promotion {
    /// [`NONE`] once the block is forgotten: the bytes are then nobody's.
    pub(super) block: u32,
    pub(super) group: u32,
    pub(super) stage: Stage,
    /// Who waits, and for which of its keys.
    pub(super) waiters: Vec<(OperationId, u32)>,
    /// Begun for nobody: it goes on without one.
    ahead: bool,
    /// Length and checksum of what is read (a planted bug).
    #[cfg(feature = "mutants")]
    read: (u32, u32),
}

impl Promotion {
    /// Whether it was begun for nobody.
    pub(super) fn is_ahead(&self) -> bool {
        self.ahead
    }

    pub(super) fn new(block: u32, group: u32, stage: Stage, waiters: Vec<(OperationId, u32)>) -> Promotion {
        Promotion {
            block,
            group,
            stage,
            ahead: waiters.is_empty(),
            waiters,
            #[cfg(feature = "mutants")]
            read: (0, 0),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// For a slot.
    NeedsSlot,
    /// It has a slot and waits for its turn on the device.
    Ready { segment: u32, slot: u32 },
    /// The device is asked.
    Reading { segment: u32, slot: u32 },
}

/// Promotions by id and by block.
#[derive(Debug, Default)]
pub(super) struct PromotionTable {
    entries: KeyMap<(u64, Promotion)>,
    of_block: KeyMap<(u64, u64)>,
    next: u64,
    /// Those with a slot, first come first served.
    pub(super) ready: VecDeque<u64>,
    /// Those with a slot for which nobody waited when they began: after all others.
    ready_ahead: VecDeque<u64>,
    /// Begun for nobody and not ended.
    ahead: usize,
    /// Those whose block was forgotten before the device was asked, or whose tier is out of service.
    pub(super) cancelled: Vec<u64>,
}

impl PromotionTable {
    pub(super) fn at(&self, promotion: u64) -> Option<&Promotion> {
        self.entries.at(promotion)
    }

    pub(super) fn at_mut(&mut self, promotion: u64) -> Option<&mut Promotion> {
        self.entries.at_mut(promotion)
    }

    /// In no meaningful order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Promotion> {
        self.entries.iter().map(|(_, promotion)| promotion)
    }

    fn of_block_mut(&mut self, block: u32) -> Option<&mut Promotion> {
        let id = *self.of_block.at(u64::from(block))?;
        self.entries.at_mut(id)
    }

    fn insert(&mut self, promotion: Promotion) -> u64 {
        let id = self.next;
        self.next += 1;
        self.of_block.put(u64::from(promotion.block), id);
        self.ahead += usize::from(promotion.ahead);
        self.entries.put(id, promotion);
        id
    }

    /// One that nobody waits for, with its slot.
    pub(super) fn start_ahead(&mut self, promotion: Promotion) {
        let id = self.insert(promotion);
        // Those that somebody came to wait for, or that ended, are only in the way.
        if self.ready_ahead.len() > 2 * self.ahead + 32 {
            let entries = &self.entries;
            self.ready_ahead
                .retain(|id| entries.at(*id).is_some_and(|entry| entry.waiters.is_empty()));
        }
        self.ready_ahead.push_back(id);
    }

    pub(super) fn ahead_in_flight(&self) -> usize {
        self.ahead
    }

    /// The next to ask the device for; `idle`: it has little to do, so one that nobody waits for may be next.
    fn next_ready(&mut self, idle: bool) -> Option<u64> {
        let waited_for = self.ready.pop_front();
        waited_for.or_else(|| if idle { self.ready_ahead.pop_front() } else { None })
    }

    /// One of this group that nobody waits for and whose device was not asked, the last that was begun.
    pub(super) fn take_ahead_of(&mut self, group: u32) -> Option<u64> {
        let place = self.ready_ahead.iter().rposition(|id| {
            let entry = self.entries.at(*id);
            entry.is_some_and(|entry| {
                entry.group == group && entry.waiters.is_empty() && matches!(entry.stage, Stage::Ready { .. })
            })
        })?;
        self.ready_ahead.remove(place)
    }

    /// Somebody waits for the block now: its promotion has its turn with those of others.
    fn join(&mut self, block: u32, waiter: (OperationId, u32)) {
        let id = *self.of_block.at(u64::from(block)).expect("a block being promoted");
        let promotion = self.entries.at_mut(id).expect("a promotion of a block");
        let overtakes =
            promotion.ahead && promotion.waiters.is_empty() && matches!(promotion.stage, Stage::Ready { .. });
        promotion.waiters.push(waiter);
        if overtakes {
            self.ready.push_back(id);
        }
    }

    /// Its device was busy.
    fn try_again(&mut self, id: u64) {
        let queue = match self.entries.at(id) {
            Some(entry) if entry.ahead && entry.waiters.is_empty() => &mut self.ready_ahead,
            _ => &mut self.ready,
        };
        queue.push_front(id);
    }

    fn take(&mut self, promotion: u64) -> Option<Promotion> {
        let entry = self.entries.take(promotion)?;
        if entry.block != NONE {
            self.of_block.take(u64::from(entry.block));
        }
        self.ahead -= usize::from(entry.ahead);
        Some(entry)
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        self.entries.memory_bytes() + self.of_block.memory_bytes()
    }
}

impl TierManager {
    /// Reads an NVMe copy for `operation`, or joins who reads it already.
    pub(super) fn promote(&mut self, block: u32, operation: OperationId, position: u32) {
        if self.index.entry(block).is(flag::PROMOTING) {
            self.promotions.join(block, (operation, position));
            self.lease_before_read(block);
            return;
        }
        let entry = self.index.entry_mut(block);
        entry.set(flag::PROMOTING);
        let (namespace, length) = (entry.namespace, entry.length);
        let domain = self.namespaces.at(namespace).domain;
        let group = self.host.open_group(domain, pages(length));
        let waiters = vec![(operation, position)];
        let promotion = self
            .promotions
            .insert(Promotion::new(block, group, Stage::NeedsSlot, waiters));
        let entry = self.host.group_mut(group);
        entry.wants.push_back(Want::Promotion(promotion));
        entry.wanted += 1;
        self.host.attend(group);
    }

    /// The planted bug `PromotePublishesBeforeRead`: who waits for a read is given the slot before the bytes are there.
    fn lease_before_read(&mut self, block: u32) {
        if !mutant_is!(self, PromotePublishesBeforeRead) {
            return;
        }
        let promotion = self.promotions.of_block_mut(block).expect("a block being promoted");
        let Stage::Reading { segment, slot } = promotion.stage else {
            return;
        };
        for (operation, position) in std::mem::take(&mut promotion.waiters) {
            let Some(client) = self.waiting.at(operation.0).map(|waiting| waiting.client) else {
                continue;
            };
            let entry = self.index.entry(block);
            let (length, checksum) = (entry.length, entry.checksum);
            let extent = self.host_extent(segment, slot, length);
            let outcome = self.lease_slot(client, segment, slot, extent, Tier::Nvme, Some(checksum));
            self.decide_fetch(operation, position, outcome);
        }
    }

    /// A slot was found for a promotion that waited for one.
    pub(super) fn promotion_has_slot(&mut self, promotion: u64, segment: u32, slot: u32) {
        let entry = self.promotions.at_mut(promotion).expect("it waited for the slot");
        entry.stage = Stage::Ready { segment, slot };
        self.promotions.ready.push_back(promotion);
        self.nvme_mut().attention = true;
    }

    /// Asks the device for promotions that have their slots.
    pub(super) fn start_promotions(&mut self) {
        while self.nvme_accepts() && (self.nvme_ref().reads as usize) < self.settings.promotions_in_flight_max {
            let idle = (self.nvme_ref().reads as usize) < AHEAD_READS_MAX;
            let Some(promotion) = self.promotions.next_ready(idle) else {
                return;
            };
            let Some(entry) = self.promotions.at(promotion) else {
                continue;
            };
            let Stage::Ready { segment, slot } = entry.stage else {
                continue;
            };
            let waits = entry.ahead
                || entry
                    .waiters
                    .iter()
                    .any(|(operation, _)| self.waiting.at(operation.0).is_some());
            if !waits || entry.block == NONE {
                self.promotions.cancelled.push(promotion);
                continue;
            }
            let block = entry.block;
            if !self.is_current(self.index.entry(block)) {
                self.forget(block);
                continue;
            }
            self.promotions.at_mut(promotion).expect("found above").stage = Stage::Reading { segment, slot };
            let entry = self.index.entry(block);
            let source = self.nvme_extent(entry.nvme_segment, entry.nvme_page, entry.length);
            let target = self.host_extent(segment, slot, entry.length);
            let (checksum, label) = (entry.checksum, self.label(entry));
            let (nvme_segment, nvme_page, length) = (entry.nvme_segment, entry.nvme_page, entry.length);
            #[cfg(feature = "mutants")]
            if let Some(entry) = self.promotions.at_mut(promotion) {
                entry.read = (length, checksum);
            }
            let operation = self.issue(Operation::Promote {
                promotion,
                #[cfg(feature = "mutants")]
                block,
                segment,
                slot,
                nvme_segment,
                nvme_page,
                length,
            });
            self.host.slot_mut(segment, slot).operations += 1;
            let nvme = self.nvme_mut();
            nvme.reads += 1;
            nvme.segment_mut(nvme_segment).reads += 1;
            self.actions.push_back(Action::Promote {
                operation,
                source,
                target,
                checksum,
                label,
            });
            self.lease_before_read(block);
        }
    }

    /// The device answered. The bytes count only if the block is still wanted under its generation.
    pub(super) fn promotion_answered(
        &mut self,
        promotion: u64,
        place: (u32, u32),
        source: (u32, u32),
        outcome: Result<(), Failure>,
    ) {
        let (segment, slot) = place;
        let nvme = self.nvme_mut();
        nvme.reads -= 1;
        nvme.segment_mut(source.0).reads -= 1;
        nvme.attention = true;
        self.host.slot_mut(segment, slot).operations -= 1;
        let entry = self.promotions.at_mut(promotion).expect("its operation was in flight");
        let block = entry.block;
        let retry = matches!(outcome, Err(Failure::Busy)) && block != NONE && self.nvme_in_service();
        if retry {
            self.promotions.at_mut(promotion).expect("found above").stage = Stage::Ready { segment, slot };
            self.promotions.try_again(promotion);
            return;
        }
        let entry = self.take_promotion(promotion);
        if block != NONE {
            self.index.entry_mut(block).clear(flag::PROMOTING);
        }
        let current = block != NONE && (self.is_current(self.index.entry(block)) || mutant_is!(self, SkippedRecheck));
        if outcome.is_ok() && current {
            let length = self.index.entry(block).length;
            self.counters.promotions += 1;
            self.counters.promoted_bytes += u64::from(length);
            self.attach_host(block, segment, slot);
            if entry.waiters.is_empty() {
                self.prefetched(block);
            } else {
                self.move_to_redundant(block);
            }
            self.unpark(block);
            for (operation, position) in entry.waiters {
                let outcome = match self.waiting.at(operation.0).map(|waiting| waiting.client) {
                    Some(client) => self.lease(client, block, Tier::Nvme),
                    None => continue,
                };
                self.decide_fetch(operation, position, outcome);
            }
            self.host.attend(entry.group);
            return;
        }
        let held = std::mem::replace(&mut self.host.slot_mut(segment, slot).state, SlotState::Orphan);
        assert_eq!(held, SlotState::Filling, "a promotion's slot");
        if outcome.is_ok() && self.lease_unchecked(&entry, place) {
            return;
        }
        self.host.settle_slot(segment, slot);
        if block != NONE {
            let copy = self.index.entry(block);
            let same = (copy.nvme_segment, copy.nvme_page) == source;
            if !current {
                self.forget(block);
            } else if outcome == Err(Failure::Corrupt) && same {
                self.drop_nvme(block);
            } else {
                self.unpark(block);
            }
        }
        self.miss(entry.waiters);
    }

    /// The planted bug `SkippedRecheck`: the bytes arrived, and nobody asks once more whether they may be seen.
    fn lease_unchecked(&mut self, promotion: &Promotion, place: (u32, u32)) -> bool {
        if promotion.block != NONE || !mutant_is!(self, SkippedRecheck) {
            return false;
        }
        #[cfg(feature = "mutants")]
        {
            let (length, checksum) = promotion.read;
            let extent = self.host_extent(place.0, place.1, length);
            for &(operation, position) in &promotion.waiters {
                if let Some(client) = self.waiting.at(operation.0).map(|waiting| waiting.client) {
                    let outcome = self.lease_slot(client, place.0, place.1, extent, Tier::Nvme, Some(checksum));
                    self.decide_fetch(operation, position, outcome);
                }
            }
            self.host.settle_slot(place.0, place.1);
        }
        #[cfg(not(feature = "mutants"))]
        let _ = place;
        true
    }

    fn take_promotion(&mut self, promotion: u64) -> Promotion {
        let entry = self.promotions.take(promotion).expect("the caller found it");
        self.host.group_mut(entry.group).ahead -= u32::from(entry.ahead);
        entry
    }

    /// A promotion whose device was not asked: its waiters miss.
    pub(super) fn cancel_promotion(&mut self, promotion: u64) {
        let Some(entry) = self.promotions.at(promotion) else {
            return;
        };
        let stage = entry.stage;
        if matches!(stage, Stage::Reading { .. }) {
            return;
        }
        let entry = self.take_promotion(promotion);
        if entry.block != NONE {
            self.index.entry_mut(entry.block).clear(flag::PROMOTING);
            self.unpark(entry.block);
        }
        if let Stage::Ready { segment, slot } = stage {
            self.host.free_slot(segment, slot);
        } else {
            self.host.group_mut(entry.group).wanted -= 1;
            self.drop_stale_wants(entry.group);
        }
        self.miss(entry.waiters);
    }

    /// Those not asked of the device yet cannot be while the tier is out of service.
    pub(super) fn cancel_waiting_promotions(&mut self) {
        let ids = self.promotions.not_reading();
        self.promotions.cancelled.extend(ids);
    }

    /// The block is forgotten: its promotion goes on for nobody.
    pub(super) fn detach_promotion(&mut self, block: u32) {
        let Some(id) = self.promotions.of_block.take(u64::from(block)) else {
            return;
        };
        let promotion = self.promotions.entries.at_mut(id).expect("a promotion of a block");
        promotion.block = NONE;
        if !matches!(promotion.stage, Stage::Reading { .. }) {
            self.promotions.cancelled.push(id);
        }
    }

    fn miss(&mut self, waiters: Vec<(OperationId, u32)>) {
        for (operation, position) in waiters {
            if self.waiting.at(operation.0).is_some() {
                self.counters.fetch_misses += 1;
                self.decide_fetch(operation, position, Fetched::Miss);
            }
        }
    }
}

impl PromotionTable {
    /// In the order of their ids.
    fn not_reading(&self) -> Vec<u64> {
        let mut ids: Vec<u64> = self
            .entries
            .iter()
            .filter(|(_, promotion)| !matches!(promotion.stage, Stage::Reading { .. }))
            .map(|(id, _)| *id)
            .collect();
        ids.sort_unstable();
        ids
    }
}
