use super::super::queue::Queue;
use super::BlockCache;

const COUNT_MAX: u8 = 15;
/// Uses for each place until all counts are halved.
const SAMPLE_FACTOR: usize = 10;

/// A small window, and behind it a segmented LRU that only takes who was used more often than who would have to go.
pub(in crate::simulate) struct WTinyLfu {
    capacity_blocks: usize,
    window_blocks: usize,
    protected_blocks: usize,
    window: Queue,
    probation: Queue,
    protected: Queue,
    frequencies: Frequencies,
}

impl WTinyLfu {
    pub(in crate::simulate) fn new(blocks: usize, capacity_blocks: usize) -> WTinyLfu {
        let window_blocks = (capacity_blocks / 100).max(1).min(capacity_blocks);
        WTinyLfu {
            capacity_blocks,
            window_blocks,
            protected_blocks: (capacity_blocks - window_blocks) * 4 / 5,
            window: Queue::new(blocks),
            probation: Queue::new(blocks),
            protected: Queue::new(blocks),
            frequencies: Frequencies::new(blocks, capacity_blocks),
        }
    }

    /// The window is too large: its oldest competes with the oldest on probation.
    fn shrink_window(&mut self) {
        let Some(candidate) = self.window.pop() else { return };
        if self.probation.len() + self.protected.len() < self.capacity_blocks - self.window_blocks {
            self.probation.push(candidate);
            return;
        }
        let Some(victim) = self.probation.oldest().or_else(|| self.protected.oldest()) else {
            return;
        };
        if self.frequencies.count(candidate) > self.frequencies.count(victim) {
            if !self.probation.remove(victim) {
                self.protected.remove(victim);
            }
            self.probation.push(candidate);
        }
    }
}

impl BlockCache for WTinyLfu {
    fn contains(&self, block: u32) -> bool {
        self.window.contains(block) || self.probation.contains(block) || self.protected.contains(block)
    }

    fn access(&mut self, block: u32) {
        if self.capacity_blocks == 0 {
            return;
        }
        self.frequencies.add(block);
        if self.window.renew(block) || self.protected.renew(block) {
            return;
        }
        if self.probation.remove(block) {
            self.protected.push(block);
            if self.protected.len() > self.protected_blocks
                && let Some(oldest) = self.protected.pop()
            {
                self.probation.push(oldest);
            }
            return;
        }
        self.window.push(block);
        if self.window.len() > self.window_blocks {
            self.shrink_window();
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.window.len() + self.probation.len() + self.protected.len()
    }
}

/// Uses of each block up to fifteen, halved now and then. Exact, where a real cache has a sketch with collisions: so the
/// policy is shown at its best.
struct Frequencies {
    counts: Vec<u8>,
    added: usize,
    sample: usize,
}

impl Frequencies {
    fn new(blocks: usize, capacity_blocks: usize) -> Frequencies {
        Frequencies {
            counts: vec![0; blocks],
            added: 0,
            sample: capacity_blocks.max(16) * SAMPLE_FACTOR,
        }
    }

    fn count(&self, block: u32) -> u8 {
        self.counts[block as usize]
    }

    fn add(&mut self, block: u32) {
        let count = &mut self.counts[block as usize];
        *count = (*count + 1).min(COUNT_MAX);
        self.added += 1;
        if self.added >= self.sample {
            self.added /= 2;
            self.counts.iter_mut().for_each(|count| *count /= 2);
        }
    }
}
