use super::super::queue::Queue;
use super::BlockCache;
use crate::random::mix;

const ROWS: usize = 4;
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
    sketch: Sketch,
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
            sketch: Sketch::new(capacity_blocks),
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
        if self.sketch.count(candidate) > self.sketch.count(victim) {
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
        self.sketch.add(block);
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

/// A count-min sketch of four bits a count, halved now and then.
struct Sketch {
    counts: Vec<u8>,
    width: usize,
    added: usize,
    sample: usize,
}

impl Sketch {
    fn new(capacity_blocks: usize) -> Sketch {
        let width = capacity_blocks.max(16).next_power_of_two();
        Sketch {
            counts: vec![0; width * ROWS],
            width,
            added: 0,
            sample: capacity_blocks.max(16) * SAMPLE_FACTOR,
        }
    }

    fn places(&self, block: u32) -> [usize; ROWS] {
        std::array::from_fn(|row| {
            let hash = mix(u64::from(block) ^ (row as u64 + 1) << 40);
            row * self.width + (hash as usize & (self.width - 1))
        })
    }

    fn count(&self, block: u32) -> u8 {
        let counts = self.places(block).map(|place| self.counts[place]);
        counts.into_iter().min().unwrap_or(0)
    }

    fn add(&mut self, block: u32) {
        for place in self.places(block) {
            self.counts[place] = (self.counts[place] + 1).min(COUNT_MAX);
        }
        self.added += 1;
        if self.added >= self.sample {
            self.added /= 2;
            self.counts.iter_mut().for_each(|count| *count /= 2);
        }
    }
}
