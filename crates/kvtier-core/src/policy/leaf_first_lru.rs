use super::{BlockId, EvictionPolicy, ListId, Verdict};
use crate::{Tier, Time};

/// Least recently used goes first, but never a block before its cached children.
#[derive(Debug, Default)]
pub struct LeafFirstLru {}

impl LeafFirstLru {
    /// Empty.
    #[must_use]
    pub fn new() -> LeafFirstLru {
        LeafFirstLru::default()
    }
}

impl EvictionPolicy for LeafFirstLru {
    fn insert(&mut self, _list: ListId, _block: BlockId, _now: Time) {}
    fn insert_oldest(&mut self, _list: ListId, _block: BlockId) {}
    fn touch(&mut self, _list: ListId, _block: BlockId, _now: Time) {}
    fn remove(&mut self, _list: ListId, _block: BlockId) {}
    fn unpark(&mut self, _list: ListId, _block: BlockId) {}
    fn victim(&mut self, _list: ListId, _parked: bool, _judge: &mut dyn FnMut(BlockId) -> Verdict) -> Option<BlockId> {
        None
    }
    fn oldest(&self, _list: ListId) -> Option<Time> {
        None
    }
    fn admit(&mut self, _block: BlockId, _tier: Tier) -> bool {
        true
    }
    fn keep(&mut self, _block: BlockId) -> bool {
        true
    }
    fn contains(&self, _list: ListId, _block: BlockId) -> bool {
        false
    }
    fn length(&self, _list: ListId) -> usize {
        0
    }
    fn memory_bytes(&self) -> u64 {
        0
    }
    fn check_invariants(&self) {}
}
