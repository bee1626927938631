//! Bringing up what a request is likely to ask for next, before it does.
//!
//! Who fetches a prompt in pieces is given the first while the next still lie on NVMe. What followed a block when it was last used is
//! what follows it now, unless the request has already gone another way: then it asked for a block that is not here, and nothing is read.

use super::TierManager;
use super::promote::{Promotion, Stage};
use crate::host_table::{SlotState, pages};
use crate::index::{NONE, flag};

/// So many blocks in host memory in a row, and the end of what is there is not looked for: the request that comes near it will.
const IN_HOST_MAX: u32 = 4;

/// For each block the one that followed it when that was last used.
#[derive(Debug, Default)]
pub(super) struct Successors(Vec<u32>);

impl Successors {
    fn at(&self, block: u32) -> u32 {
        self.0.get(block as usize).copied().unwrap_or(NONE)
    }

    fn put(&mut self, block: u32, next: u32, places: u32) {
        if self.0.len() <= block as usize {
            self.0.resize(places as usize, NONE);
        }
        self.0[block as usize] = next;
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        (self.0.capacity() * size_of::<u32>()) as u64
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
            let places = self.index.places();
            self.successors.put(parent, block, places);
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
        if self.host.group(group).wanted > 0 {
            return false;
        }
        let slot = self.host.take_slot(group, SlotState::Filling, NONE).or_else(|| {
            self.evict_clean(group)
                .then(|| self.host.take_slot(group, SlotState::Filling, NONE))
                .flatten()
        });
        self.host.attend(group);
        let Some((segment, slot)) = slot else { return false };
        self.index.entry_mut(block).set(flag::PROMOTING);
        let stage = Stage::Ready { segment, slot };
        self.promotions
            .start_ahead(Promotion::new(block, group, stage, Vec::new()));
        self.counters.prefetches += 1;
        self.nvme_mut().attention = true;
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
