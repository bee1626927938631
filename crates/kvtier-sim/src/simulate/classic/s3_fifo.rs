use super::super::queue::Queue;
use super::BlockCache;

const USES_MAX: u8 = 3;

/// A small queue on probation, a main queue with second chances, and a ghost queue of what left probation unused.
pub(in crate::simulate) struct S3Fifo {
    capacity_blocks: usize,
    small_blocks: usize,
    small: Queue,
    main: Queue,
    ghosts: Queue,
    uses: Vec<u8>,
}

impl S3Fifo {
    pub(in crate::simulate) fn new(blocks: usize, capacity_blocks: usize) -> S3Fifo {
        S3Fifo {
            capacity_blocks,
            small_blocks: (capacity_blocks / 10).max(1),
            small: Queue::new(blocks),
            main: Queue::new(blocks),
            ghosts: Queue::new(blocks),
            uses: vec![0; blocks],
        }
    }

    fn evict(&mut self) {
        if self.small.len() >= self.small_blocks || self.main.len() == 0 {
            self.evict_small();
        } else {
            self.evict_main();
        }
    }

    fn evict_small(&mut self) {
        while let Some(block) = self.small.pop() {
            if self.uses[block as usize] <= 1 {
                self.ghosts.push(block);
                while self.ghosts.len() > self.capacity_blocks - self.small_blocks.min(self.capacity_blocks) {
                    self.ghosts.pop();
                }
                return;
            }
            self.uses[block as usize] = 0;
            self.main.push(block);
        }
        self.evict_main();
    }

    fn evict_main(&mut self) {
        while let Some(block) = self.main.pop() {
            let uses = &mut self.uses[block as usize];
            if *uses == 0 {
                return;
            }
            *uses -= 1;
            self.main.push(block);
        }
    }
}

impl BlockCache for S3Fifo {
    fn contains(&self, block: u32) -> bool {
        self.small.contains(block) || self.main.contains(block)
    }

    fn access(&mut self, block: u32) {
        if self.contains(block) {
            let uses = &mut self.uses[block as usize];
            *uses = (*uses + 1).min(USES_MAX);
            return;
        }
        if self.capacity_blocks == 0 {
            return;
        }
        while self.small.len() + self.main.len() >= self.capacity_blocks {
            self.evict();
        }
        self.uses[block as usize] = 0;
        if self.ghosts.remove(block) {
            self.main.push(block);
        } else {
            self.small.push(block);
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.small.len() + self.main.len()
    }
}
