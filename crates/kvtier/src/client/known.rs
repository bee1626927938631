use std::collections::HashSet;

use kvtier_core::BlockHash;

/// A bounded memory of keys that were present when last heard of. It may be wrong: it only chooses between asking first
/// and writing first.
///
/// Two sets: when the young one is full it becomes the old one, and the old one is forgotten.
#[derive(Debug)]
pub(super) struct KnownKeys {
    young: HashSet<(u32, BlockHash)>,
    old: HashSet<(u32, BlockHash)>,
    keys_max: usize,
}

impl KnownKeys {
    pub(super) fn new(keys_max: usize) -> KnownKeys {
        KnownKeys {
            young: HashSet::new(),
            old: HashSet::new(),
            keys_max,
        }
    }

    pub(super) fn contains(&self, handle: u32, hash: BlockHash) -> bool {
        let key = (handle, hash);
        self.young.contains(&key) || self.old.contains(&key)
    }

    pub(super) fn insert(&mut self, handle: u32, hash: BlockHash) {
        if self.keys_max == 0 || self.old.contains(&(handle, hash)) {
            return;
        }
        self.young.insert((handle, hash));
        if self.young.len() >= self.keys_max.div_ceil(2) {
            self.old = std::mem::take(&mut self.young);
        }
    }

    pub(super) fn remove(&mut self, handle: u32, hash: BlockHash) {
        self.young.remove(&(handle, hash));
        self.old.remove(&(handle, hash));
    }

    pub(super) fn clear(&mut self) {
        self.young.clear();
        self.old.clear();
    }
}
