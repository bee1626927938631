use std::collections::BTreeSet;

use super::BlockCache;

/// Counts uses while a block is cached; of two that are equal the one used longer ago goes.
pub(in crate::simulate) struct Lfu {
    capacity_blocks: usize,
    clock: u64,
    /// Uses and last use of a cached block.
    uses: Vec<Option<(u64, u64)>>,
    order: BTreeSet<(u64, u64, u32)>,
}

impl Lfu {
    pub(in crate::simulate) fn new(blocks: usize, capacity_blocks: usize) -> Lfu {
        Lfu {
            capacity_blocks,
            clock: 0,
            uses: vec![None; blocks],
            order: BTreeSet::new(),
        }
    }
}

impl BlockCache for Lfu {
    fn contains(&self, block: u32) -> bool {
        self.uses[block as usize].is_some()
    }

    fn access(&mut self, block: u32) {
        self.clock += 1;
        let before = self.uses[block as usize].take();
        if let Some((uses, last)) = before {
            self.order.remove(&(uses, last, block));
        } else {
            if self.order.len() >= self.capacity_blocks
                && let Some((_, _, victim)) = self.order.pop_first()
            {
                self.uses[victim as usize] = None;
            }
            if self.capacity_blocks == 0 {
                return;
            }
        }
        let uses = before.map_or(1, |(uses, _)| uses + 1);
        self.uses[block as usize] = Some((uses, self.clock));
        self.order.insert((uses, self.clock, block));
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.order.len()
    }
}
