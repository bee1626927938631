use super::super::queue::Queue;
use super::BlockCache;

/// Recency and frequency, with ghosts of both that shift the balance.
pub(in crate::simulate) struct Arc {
    capacity_blocks: usize,
    /// Blocks that those used once should have.
    target: usize,
    once: Queue,
    often: Queue,
    once_ghosts: Queue,
    often_ghosts: Queue,
}

impl Arc {
    pub(in crate::simulate) fn new(blocks: usize, capacity_blocks: usize) -> Arc {
        Arc {
            capacity_blocks,
            target: 0,
            once: Queue::new(blocks),
            often: Queue::new(blocks),
            once_ghosts: Queue::new(blocks),
            often_ghosts: Queue::new(blocks),
        }
    }

    fn replace(&mut self, was_often: bool) {
        let once = self.once.len();
        if once > 0 && (once > self.target || (was_often && once == self.target)) {
            if let Some(block) = self.once.pop() {
                self.once_ghosts.push(block);
            }
        } else if let Some(block) = self.often.pop() {
            self.often_ghosts.push(block);
        } else if let Some(block) = self.once.pop() {
            self.once_ghosts.push(block);
        }
    }

    fn is_full(&self) -> bool {
        self.once.len() + self.often.len() >= self.capacity_blocks
    }

    fn miss(&mut self, block: u32) {
        let first = self.once.len() + self.once_ghosts.len();
        let all = first + self.often.len() + self.often_ghosts.len();
        if first >= self.capacity_blocks {
            if self.once.len() < self.capacity_blocks {
                self.once_ghosts.pop();
                if self.is_full() {
                    self.replace(false);
                }
            } else {
                self.once.pop();
            }
        } else if all >= self.capacity_blocks {
            if all >= 2 * self.capacity_blocks {
                self.often_ghosts.pop();
            }
            if self.is_full() {
                self.replace(false);
            }
        }
        self.once.push(block);
    }
}

impl BlockCache for Arc {
    fn contains(&self, block: u32) -> bool {
        self.once.contains(block) || self.often.contains(block)
    }

    fn access(&mut self, block: u32) {
        if self.capacity_blocks == 0 {
            return;
        }
        let (once_ghosts, often_ghosts) = (self.once_ghosts.len(), self.often_ghosts.len());
        if self.once.remove(block) || self.often.remove(block) {
            self.often.push(block);
        } else if self.once_ghosts.remove(block) {
            let step = (often_ghosts / once_ghosts).max(1);
            self.target = (self.target + step).min(self.capacity_blocks);
            if self.is_full() {
                self.replace(false);
            }
            self.often.push(block);
        } else if self.often_ghosts.remove(block) {
            let step = (once_ghosts / often_ghosts).max(1);
            self.target = self.target.saturating_sub(step);
            if self.is_full() {
                self.replace(true);
            }
            self.often.push(block);
        } else {
            self.miss(block);
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.once.len() + self.often.len()
    }
}
