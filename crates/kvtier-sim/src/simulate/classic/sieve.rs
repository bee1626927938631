use super::super::queue::Queue;
use super::BlockCache;

/// A queue in order of arrival, and a hand that passes over what was used since it came by.
pub(in crate::simulate) struct Sieve {
    capacity_blocks: usize,
    queue: Queue,
    used: Vec<bool>,
    hand: Option<u32>,
}

impl Sieve {
    pub(in crate::simulate) fn new(blocks: usize, capacity_blocks: usize) -> Sieve {
        Sieve {
            capacity_blocks,
            queue: Queue::new(blocks),
            used: vec![false; blocks],
            hand: None,
        }
    }

    fn evict(&mut self) {
        let mut hand = self.hand.or_else(|| self.queue.oldest());
        while let Some(block) = hand {
            if !std::mem::take(&mut self.used[block as usize]) {
                self.hand = self.queue.newer(block);
                self.queue.remove(block);
                return;
            }
            hand = self.queue.newer(block).or_else(|| self.queue.oldest());
        }
    }
}

impl BlockCache for Sieve {
    fn contains(&self, block: u32) -> bool {
        self.queue.contains(block)
    }

    fn access(&mut self, block: u32) {
        if self.queue.contains(block) {
            self.used[block as usize] = true;
            return;
        }
        if self.queue.len() >= self.capacity_blocks {
            self.evict();
        }
        if self.capacity_blocks > 0 {
            self.queue.push(block);
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.queue.len()
    }
}
