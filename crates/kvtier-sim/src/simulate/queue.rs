//! Queues of blocks in constant time.

const NONE: u32 = u32::MAX;

/// A queue of blocks with small numbers; a block is in it at most once.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    /// The one that came in after, and before.
    links: Vec<(u32, u32)>,
    inside: Vec<bool>,
    newest: u32,
    oldest: u32,
    length: usize,
}

impl Queue {
    pub(super) fn new(blocks: usize) -> Queue {
        Queue {
            links: vec![(NONE, NONE); blocks],
            inside: vec![false; blocks],
            newest: NONE,
            oldest: NONE,
            length: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.length
    }

    pub(super) fn contains(&self, block: u32) -> bool {
        self.inside[block as usize]
    }

    pub(super) fn oldest(&self) -> Option<u32> {
        Some(self.oldest).filter(|block| *block != NONE)
    }

    /// The one that came in after this one.
    pub(super) fn newer(&self, block: u32) -> Option<u32> {
        Some(self.links[block as usize].0).filter(|block| *block != NONE)
    }

    pub(super) fn push(&mut self, block: u32) {
        assert!(!self.contains(block), "a block is in a queue once");
        self.inside[block as usize] = true;
        self.length += 1;
        let older = std::mem::replace(&mut self.newest, block);
        self.links[block as usize] = (NONE, older);
        match older {
            NONE => self.oldest = block,
            older => self.links[older as usize].0 = block,
        }
    }

    /// False where it is not in the queue.
    pub(super) fn remove(&mut self, block: u32) -> bool {
        if !self.contains(block) {
            return false;
        }
        self.inside[block as usize] = false;
        self.length -= 1;
        let (newer, older) = self.links[block as usize];
        match newer {
            NONE => self.newest = older,
            newer => self.links[newer as usize].1 = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.links[older as usize].0 = newer,
        }
        true
    }

    pub(super) fn pop(&mut self) -> Option<u32> {
        let oldest = self.oldest()?;
        self.remove(oldest);
        Some(oldest)
    }

    /// To the newest end, where it is in the queue.
    pub(super) fn renew(&mut self, block: u32) -> bool {
        let inside = self.remove(block);
        if inside {
            self.push(block);
        }
        inside
    }
}
