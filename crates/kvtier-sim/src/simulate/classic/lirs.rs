use super::super::queue::Queue;
use super::BlockCache;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Low inter-reference recency: stays.
    Low,
    /// Cached for the time being.
    High,
    Absent,
}

/// Blocks by the distance between their last two uses; one in a hundred places is for newcomers.
pub(in crate::simulate) struct Lirs {
    low_blocks: usize,
    high_blocks: usize,
    stack: Queue,
    cached_high: Queue,
    state: Vec<State>,
    low: usize,
    /// Blocks that are in the stack and not cached, oldest first.
    ghosts: Queue,
}

impl Lirs {
    pub(in crate::simulate) fn new(blocks: usize, capacity_blocks: usize) -> Lirs {
        let high_blocks = (capacity_blocks / 100).max(1).min(capacity_blocks);
        Lirs {
            low_blocks: capacity_blocks - high_blocks,
            high_blocks,
            stack: Queue::new(blocks),
            cached_high: Queue::new(blocks),
            state: vec![State::Absent; blocks],
            low: 0,
            ghosts: Queue::new(blocks),
        }
    }

    /// The oldest of the stack has to be a low one.
    fn prune(&mut self) {
        while let Some(block) = self.stack.oldest() {
            if self.state[block as usize] == State::Low {
                return;
            }
            self.stack.remove(block);
            self.ghosts.remove(block);
        }
    }

    fn evict(&mut self) {
        if let Some(block) = self.cached_high.pop() {
            self.state[block as usize] = State::Absent;
            if self.stack.contains(block) {
                self.ghosts.push(block);
            }
        }
        // The stack would grow without end: what was evicted longest ago leaves it.
        while self.ghosts.len() > 2 * (self.low_blocks + self.high_blocks) {
            if let Some(ghost) = self.ghosts.pop() {
                self.stack.remove(ghost);
            }
        }
    }

    fn promote(&mut self, block: u32) {
        self.state[block as usize] = State::Low;
        self.low += 1;
        if self.low <= self.low_blocks {
            return;
        }
        self.prune();
        if let Some(oldest) = self.stack.pop() {
            self.state[oldest as usize] = State::High;
            self.low -= 1;
            self.cached_high.push(oldest);
        }
        self.prune();
    }
}

impl BlockCache for Lirs {
    fn contains(&self, block: u32) -> bool {
        self.state[block as usize] != State::Absent
    }

    fn access(&mut self, block: u32) {
        let capacity_blocks = self.low_blocks + self.high_blocks;
        if capacity_blocks == 0 {
            return;
        }
        match self.state[block as usize] {
            State::Low => {
                self.stack.renew(block);
                self.prune();
            }
            State::High => {
                if self.stack.renew(block) {
                    self.cached_high.remove(block);
                    self.promote(block);
                } else {
                    self.stack.push(block);
                    self.cached_high.renew(block);
                }
            }
            State::Absent => {
                if self.low + self.cached_high.len() >= capacity_blocks {
                    self.evict();
                }
                let known = self.stack.renew(block);
                self.ghosts.remove(block);
                if !known {
                    self.stack.push(block);
                }
                if self.low < self.low_blocks || known {
                    self.promote(block);
                } else {
                    self.state[block as usize] = State::High;
                    self.cached_high.push(block);
                }
            }
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.low + self.cached_high.len()
    }
}
