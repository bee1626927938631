//! Exact leaf-first LRU over a trace, metadata only: what a radix cache of a given size would have hit. The yardstick
//! for the real state machine.

use std::collections::{BTreeMap, BTreeSet};

use crate::trace::TraceRequest;

#[cfg(test)]
mod tests;

/// What a replay hit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HitTokens {
    /// Prompt tokens found as a cached prefix.
    pub hit: u64,
    /// Prompt tokens.
    pub total: u64,
}

impl HitTokens {
    /// Share of prompt tokens that were hit; 0 without any.
    #[must_use]
    pub fn ratio(self) -> f64 {
        if self.total == 0 {
            0.0
        } else {
            self.hit as f64 / self.total as f64
        }
    }
}

struct Node {
    parent: Option<u64>,
    children: u32,
    touched: u64,
}

/// A cache of `capacity_blocks` blocks that evicts the least recently used block without cached children.
pub struct LeafLru {
    capacity_blocks: usize,
    clock: u64,
    nodes: BTreeMap<u64, Node>,
    /// Blocks without cached children, least recently used first.
    leaves: BTreeSet<(u64, u64)>,
}

impl LeafLru {
    /// An empty cache.
    #[must_use]
    pub fn new(capacity_blocks: usize) -> LeafLru {
        LeafLru {
            capacity_blocks,
            clock: 0,
            nodes: BTreeMap::new(),
            leaves: BTreeSet::new(),
        }
    }

    /// Blocks that are cached.
    #[must_use]
    pub fn length(&self) -> usize {
        self.nodes.len()
    }

    /// How many of the prompt's ids are cached as a prefix.
    #[must_use]
    pub fn matched(&self, ids: &[u64]) -> usize {
        ids.iter().take_while(|id| self.nodes.contains_key(id)).count()
    }

    /// Looks the prompt up, then caches all of it. How many of its ids were hit as a prefix.
    pub fn request(&mut self, ids: &[u64]) -> usize {
        let hit = self.matched(ids);
        self.clock += 1;
        let mut parent = None;
        for (index, id) in ids.iter().enumerate() {
            if !self.touch(*id) && !self.insert(*id, parent, &ids[..index]) {
                break;
            }
            parent = Some(*id);
        }
        hit
    }

    fn touch(&mut self, id: u64) -> bool {
        let Some(node) = self.nodes.get_mut(&id) else {
            return false;
        };
        if node.children == 0 {
            self.leaves.remove(&(node.touched, id));
            self.leaves.insert((self.clock, id));
        }
        node.touched = self.clock;
        true
    }

    /// False when only the prompt itself is left to evict: its tail is not cached.
    fn insert(&mut self, id: u64, parent: Option<u64>, prefix: &[u64]) -> bool {
        while self.nodes.len() >= self.capacity_blocks {
            let Some((touched, victim)) = self.leaves.first().copied() else {
                return false;
            };
            if touched == self.clock && prefix.contains(&victim) {
                return false;
            }
            self.evict(victim);
        }
        if let Some(parent) = parent
            && let Some(node) = self.nodes.get_mut(&parent)
        {
            node.children += 1;
            self.leaves.remove(&(node.touched, parent));
        }
        self.nodes.insert(
            id,
            Node {
                parent,
                children: 0,
                touched: self.clock,
            },
        );
        self.leaves.insert((self.clock, id));
        true
    }

    fn evict(&mut self, id: u64) {
        let Some(node) = self.nodes.remove(&id) else { return };
        self.leaves.remove(&(node.touched, id));
        if let Some(parent) = node.parent
            && let Some(above) = self.nodes.get_mut(&parent)
        {
            above.children -= 1;
            if above.children == 0 {
                self.leaves.insert((above.touched, parent));
            }
        }
    }
}

/// Replays a trace through an exact leaf-first LRU of `capacity_blocks` blocks.
#[must_use]
pub fn replay(requests: &[TraceRequest], capacity_blocks: usize) -> HitTokens {
    let mut cache = LeafLru::new(capacity_blocks);
    let mut tokens = HitTokens::default();
    for request in requests {
        let hit = cache.request(&request.hash_ids);
        tokens.hit += (0..hit).map(|index| u64::from(request.tokens_at(index))).sum::<u64>();
        tokens.total += request.input_tokens;
    }
    tokens
}

/// Distinct blocks of a trace: the size of a cache that never evicts.
#[must_use]
pub fn unique_blocks(requests: &[TraceRequest]) -> usize {
    requests
        .iter()
        .flat_map(|request| &request.hash_ids)
        .collect::<BTreeSet<_>>()
        .len()
}
