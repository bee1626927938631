//! The classics: they see single blocks, and nothing of prefixes.

mod arc;
mod lfu;
mod lirs;
mod s3_fifo;
mod sieve;
mod w_tiny_lfu;

pub(super) use arc::Arc;
pub(super) use lfu::Lfu;
pub(super) use lirs::Lirs;
pub(super) use s3_fifo::S3Fifo;
pub(super) use sieve::Sieve;
pub(super) use w_tiny_lfu::WTinyLfu;

use super::{Cache, Prompt};

/// A cache of single blocks.
pub(super) trait BlockCache {
    fn contains(&self, block: u32) -> bool;
    /// The block is used, and cached if the policy thinks so.
    fn access(&mut self, block: u32);
    /// Cached blocks.
    #[cfg(test)]
    fn len(&self) -> usize;
}

/// A prompt's blocks one by one, the last one first: so of what was used once the start of a prompt is the newest.
pub(super) struct Flat<C>(pub(super) C);

impl<C: BlockCache> Cache for Flat<C> {
    fn request(&mut self, prompt: &Prompt) -> usize {
        let cached = |(block, _): &&(u32, u16)| self.0.contains(*block);
        let hit = prompt.blocks.iter().take_while(cached).count();
        for (block, _) in prompt.blocks.iter().rev() {
            self.0.access(*block);
        }
        hit
    }
}
