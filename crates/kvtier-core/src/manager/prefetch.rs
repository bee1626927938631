//! Bringing up what a request is likely to ask for next, before it does.
//!
//! Who fetches a prompt in pieces is given the first while the next still lie on NVMe. What followed a block when it was last used is
//! what follows it now, unless the request has already gone another way: then it asked for a block that is not here, and nothing is read.

use super::TierManager;
use super::promote::{Promotion, Stage};
use crate::Verdict;
use crate::host_table::{SlotState, pages};
use crate::index::{NONE, flag};

/// So many blocks in host memory in a row, and the end of what is there is not looked for: the request that comes near it will.
const IN_HOST_MAX: u32 = 4;

/// Places are remembered this many at a time and never move.
const CHUNK: usize = 4096;

/// For each block the one that followed it when that was last used.
#[derive(Debug, Default)]
pub(super) struct Successors(Vec<Box<[u32]>>);

impl Successors {
    fn at(&self, block: u32) -> u32 {
        let chunk = self.0.get(block as usize / CHUNK);
        chunk.map_or(NONE, |chunk| chunk[block as usize % CHUNK])
    }

    fn put(&mut self, block: u32, next: u32) {
        while self.0.len() <= block as usize / CHUNK {
            self.0.push(vec![NONE; CHUNK].into_boxed_slice());
        }
        self.0[block as usize / CHUNK][block as usize % CHUNK] = next;
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        (self.0.len() * CHUNK * size_of::<u32>() + self.0.capacity() * size_of::<Box<[u32]>>()) as u64
    }
}

impl TierManager {
    /// The block was used after its parent.
    pub(super) fn note_succession(&mut self, block: u32) {
        if self.settings.prefetch_blocks == 0 || self.nvme.is_none() {
            return;
        }
        let parent = self.index.entry(block).parent;
        if parent != NONE {
            self.successors.put(parent, block);
        }
    }

    /// A child of the block, if the one that was used last is still cached. Places are used anew: what is there now must name the block
    /// as its parent.
    fn successor(&self, block: u32) -> Option<u32> {
        let next = Some(self.successors.at(block)).filter(|&next| next != NONE)?;
        let entry = self.index.entry(next);
        (entry.is(flag::LIVE) && entry.parent == block && !entry.is_ghost() && self.is_current(entry)).then_some(next)
    }

    /// Reads ahead of a request that found all it asked for, up to this block.
    pub(super) fn prefetch_after(&mut self, block: u32) {
        if self.settings.prefetch_blocks == 0 || self.refuses_new || !self.nvme_in_service() {
            return;
        }
        let (mut block, mut in_host) = (block, 0);
        for _ in 0..self.settings.prefetch_blocks {
            let Some(next) = self.successor(block) else { return };
            let entry = self.index.entry(next);
            if entry.in_host() {
                in_host += 1;
                if in_host == IN_HOST_MAX {
                    return;
                }
            } else if entry.is(flag::PROMOTING) {
                in_host = 0;
            } else if !self.start_prefetch(next) {
                return;
            }
            block = next;
        }
    }

    /// False where it would take the place of something in use, or of a read that somebody waits for.
    fn start_prefetch(&mut self, block: u32) -> bool {
        if self.promotions.ahead_in_flight() * 2 >= self.settings.promotions_in_flight_max {
            return false;
        }
        let entry = self.index.entry(block);
        let domain = self.namespaces.at(entry.namespace).domain;
        let group = self.host.open_group(domain, pages(entry.length));
        if self.host.group(group).wanted > 0 || !self.has_slots_to_spare(group) {
            return false;
        }
        let mut slot = self.host.take_slot(group, SlotState::Filling, NONE);
        if slot.is_none() && !self.next_clean_is_ahead(group) && self.evict_clean(group) {
            slot = self.host.take_slot(group, SlotState::Filling, NONE);
        }
        self.host.attend(group);
        let Some((segment, slot)) = slot else { return false };
        self.host.group_mut(group).ahead += 1;
        self.index.entry_mut(block).set(flag::PROMOTING);
        let stage = Stage::Ready { segment, slot };
        self.promotions
            .start_ahead(Promotion::new(block, group, stage, Vec::new()));
        self.counters.prefetches += 1;
        self.nvme_mut().attention = true;
        true
    }

    /// Whether the next clean copy to go was read ahead itself and not asked for yet: more at once than there is room for.
    fn next_clean_is_ahead(&mut self, group: u32) -> bool {
        let TierManager {
            policy, index, host, ..
        } = self;
        let next = policy.victim(TierManager::group_list(group, true), false, &mut |block| {
            let entry = index.entry(block.0);
            if host.slot(entry.host_segment, entry.host_slot).is_held() {
                Verdict::Shelve
            } else {
                Verdict::Take
            }
        });
        next.is_some_and(|block| self.index.entry(block.0).is(flag::PREFETCHED))
    }

    /// Somebody wants a slot: one that is to be filled for nobody goes to them. False where there is none.
    pub(super) fn give_up_ahead(&mut self, group: u32) -> bool {
        let Some(promotion) = self.promotions.take_ahead_of(group) else {
            return false;
        };
        self.cancel_promotion(promotion);
        true
    }

    /// Nobody has asked for the block yet: its host copy can be dropped at once.
    pub(super) fn prefetched(&mut self, block: u32) {
        self.move_to_clean(block);
        self.index.entry_mut(block).set(flag::PREFETCHED);
    }

    /// Somebody asks for a block in host memory.
    pub(super) fn note_prefetch_hit(&mut self, block: u32) {
        let entry = self.index.entry_mut(block);
        if entry.is(flag::PREFETCHED) {
            entry.clear(flag::PREFETCHED);
            self.counters.prefetch_hits += 1;
        }
    }
}
