use kvtier::{BlockHash, Parent};

use super::session::{Keys, nanoseconds_since_1970};
use crate::baseline::SharedBlocks;
use crate::{BenchError, pattern};

/// Blocks of one prefix in the working set.
pub(super) const CHAIN_BLOCKS: u64 = 16;

const PAGE_BYTES: usize = 4096;

/// A place in the cycle over the working set, in blocks.
pub(super) struct Cursor {
    pub(super) next: u64,
    pub(super) blocks: u64,
}

impl Cursor {
    /// The next `batch` blocks' first number. A batch never wraps: the working set is a multiple of every batch.
    pub(super) fn advance(&mut self, batch: u64) -> u64 {
        let first = self.next;
        self.next = (self.next + batch) % self.blocks;
        first
    }
}

/// The working set: private memory of this process, shared memory for the baseline, and the keys of both.
pub(super) struct WorkingSet {
    pub(super) block_bytes: usize,
    pub(super) blocks: u64,
    memory: Vec<u8>,
    /// Where the blocks begin in `memory`: at a page, as in an engine's arena. Some processors copy several times slower
    /// between buffers that lie a few bytes apart within their pages.
    start: usize,
    pub(super) shared: SharedBlocks,
    /// Blocks put so far with keys of their own, beside the working set.
    fresh: u64,
    /// Sets the keys of this run apart from those of any other.
    stream: u64,
}

impl WorkingSet {
    pub(super) fn create(bytes: u64, block_bytes: usize) -> Result<WorkingSet, BenchError> {
        let bytes = usize::try_from(bytes)
            .map_err(|_| BenchError::Options("a working set beyond this machine's addresses".to_owned()))?;
        let blocks = (bytes / block_bytes) as u64 / CHAIN_BLOCKS * CHAIN_BLOCKS;
        let bytes = blocks as usize * block_bytes;
        let mut memory = vec![0; bytes + PAGE_BYTES];
        let start = memory.as_ptr().align_offset(PAGE_BYTES).min(PAGE_BYTES);
        let mut shared = SharedBlocks::create(bytes, block_bytes)?;
        for (block, private) in memory[start..start + bytes].chunks_exact_mut(block_bytes).enumerate() {
            pattern::write(block as u64, private);
            shared.copy_in(block, private);
        }
        let stream = (u64::from(std::process::id()) << 32) ^ nanoseconds_since_1970();
        Ok(WorkingSet {
            block_bytes,
            blocks,
            memory,
            start,
            shared,
            fresh: 0,
            stream,
        })
    }

    /// Writes every private block's bytes again.
    pub(super) fn rewrite(&mut self) {
        for block in 0..self.blocks {
            pattern::write(block, self.block_mut(block));
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.blocks * self.block_bytes as u64
    }

    fn offset(&self, block: u64) -> usize {
        self.start + (block % self.blocks) as usize * self.block_bytes
    }

    pub(super) fn block(&self, block: u64) -> &[u8] {
        let start = self.offset(block);
        &self.memory[start..start + self.block_bytes]
    }

    pub(super) fn block_mut(&mut self, block: u64) -> &mut [u8] {
        let start = self.offset(block);
        &mut self.memory[start..start + self.block_bytes]
    }

    /// `memcpy` of a block from shared to private memory.
    pub(super) fn copy_out(&mut self, block: u64) {
        let start = self.offset(block);
        self.shared
            .copy_out(block as usize, &mut self.memory[start..start + self.block_bytes]);
    }

    /// `memcpy` of a block from private to shared memory.
    pub(super) fn copy_in(&mut self, block: u64) {
        let start = self.offset(block);
        self.shared
            .copy_in(block as usize, &self.memory[start..start + self.block_bytes]);
    }

    pub(super) fn targets(&mut self, first: u64, batch: u64) -> Vec<&mut [u8]> {
        let start = self.offset(first);
        self.memory[start..start + batch as usize * self.block_bytes]
            .chunks_exact_mut(self.block_bytes)
            .collect()
    }

    /// What a put takes: these keys, with the bytes of the blocks from `first` on.
    pub(super) fn blocks_of<'a>(&'a self, first: u64, hashes: &[BlockHash]) -> Vec<(BlockHash, &'a [u8])> {
        (first..)
            .zip(hashes)
            .map(|(block, hash)| (*hash, self.block(block)))
            .collect()
    }

    /// Keys `first..first + batch` of the working set, after what comes before them in their prefix.
    pub(super) fn keys(&self, first: u64, batch: u64) -> Keys {
        let parent = if first.is_multiple_of(CHAIN_BLOCKS) {
            Parent::Root
        } else {
            Parent::Block(pattern::hash(self.stream, first - 1))
        };
        Keys {
            parent,
            hashes: (first..first + batch)
                .map(|block| pattern::hash(self.stream, block))
                .collect(),
        }
    }

    /// The next `batch` keys that nobody has seen, as a prefix of their own. Their bytes are those of the same blocks of
    /// the working set.
    pub(super) fn fresh_keys(&mut self, batch: u64) -> (u64, Keys) {
        // Smaller batches may have left it anywhere; a batch never wraps.
        let first = self.fresh.next_multiple_of(batch);
        self.fresh = first + batch;
        let hashes = (first..first + batch)
            .map(|block| pattern::hash(self.stream ^ 1, block))
            .collect();
        (
            first % self.blocks,
            Keys {
                parent: Parent::Root,
                hashes,
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_visits_every_batch_once_a_cycle() {
        let mut cursor = Cursor { next: 16, blocks: 64 };
        let visited: Vec<u64> = (0..5).map(|_| cursor.advance(16)).collect();
        assert_eq!(visited, [16, 32, 48, 0, 16]);
    }

    #[test]
    fn every_block_holds_its_pattern_in_private_and_in_shared_memory() {
        let set = WorkingSet::create(32 << 20, 1 << 20).expect("32 MiB twice");
        let mut copy = vec![0; 1 << 20];
        for block in 0..set.blocks {
            set.shared.copy_out(block as usize, &mut copy);
            assert!(
                pattern::matches(block, &copy) && pattern::matches(block, set.block(block)),
                "block {block}"
            );
        }
    }
}
