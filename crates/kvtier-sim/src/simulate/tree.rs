use kvtier_core::{Advice, BlockId, EvictionPolicy, ListId, NamespaceId, Plane, Time, Use, Verdict};

use super::{Cache, Prompt};
use crate::random::mix;
use crate::trace::TraceAnswer;

const LIST: ListId = ListId {
    plane: Plane::Host,
    index: 0,
};
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Node {
    cached: bool,
    parent: u32,
    children: u32,
    tokens: u16,
}

/// A cache that is full of whole prefixes: one of the core's policies proposes, leaves go first.
pub(super) struct TreeCache<P> {
    policy: P,
    nodes: Vec<Node>,
    cached: usize,
    capacity_blocks: usize,
}

impl<P: EvictionPolicy> TreeCache<P> {
    pub(super) fn new(policy: P, blocks: usize, capacity_blocks: usize) -> TreeCache<P> {
        let node = Node {
            cached: false,
            parent: NONE,
            children: 0,
            tokens: 0,
        };
        TreeCache {
            policy,
            nodes: vec![node; blocks],
            cached: 0,
            capacity_blocks,
        }
    }

    pub(super) fn policy(&self) -> &P {
        &self.policy
    }

    #[cfg(test)]
    pub(super) fn check_invariants(&self) {
        self.policy.check_invariants();
        assert_eq!(self.policy.length(LIST), self.cached);
    }

    fn usage(&self, block: u32) -> Use {
        let node = self.nodes[block as usize];
        Use {
            parent: Some(BlockId(node.parent)).filter(|parent| parent.0 != NONE),
            tokens: node.tokens,
            bytes: 0,
            namespace: NamespaceId(0),
            fingerprint: mix(u64::from(block)),
        }
    }

    fn beside(&self, block: u32, now: Time) -> Option<BlockId> {
        let parent = BlockId(self.nodes[block as usize].parent);
        (parent.0 != NONE && self.policy.is_recent(parent, now)).then_some(parent)
    }

    /// Room for one more block: false where only the block itself before it could go.
    fn make_room(&mut self, before: u32) -> bool {
        if self.cached < self.capacity_blocks {
            return true;
        }
        let TreeCache { policy, nodes, .. } = self;
        let victim = policy.victim(LIST, false, &mut |block| {
            if nodes[block.0 as usize].children > 0 {
                Verdict::Park
            } else {
                Verdict::Take
            }
        });
        match victim {
            Some(BlockId(block)) if block != before => {
                self.evict(block);
                true
            }
            _ => false,
        }
    }

    fn evict(&mut self, block: u32) {
        self.policy.remove(LIST, BlockId(block));
        self.policy.forgotten(BlockId(block), mix(u64::from(block)));
        self.cached -= 1;
        let node = &mut self.nodes[block as usize];
        node.cached = false;
        let parent = node.parent;
        if parent != NONE {
            let above = &mut self.nodes[parent as usize];
            above.children -= 1;
            if above.children == 0 {
                self.policy.unpark(LIST, BlockId(parent));
            }
        }
    }

    fn insert(&mut self, block: u32, parent: u32, tokens: u16, now: Time) {
        self.nodes[block as usize] = Node {
            cached: true,
            parent,
            children: self.nodes[block as usize].children,
            tokens,
        };
        if parent != NONE {
            self.nodes[parent as usize].children += 1;
        }
        self.cached += 1;
        self.policy.appeared(BlockId(block), self.usage(block), now);
        let beside = self.beside(block, now);
        self.policy.insert(LIST, BlockId(block), beside, now);
    }
}

impl<P: EvictionPolicy> Cache for TreeCache<P> {
    fn request(&mut self, prompt: &Prompt) -> usize {
        let now = Time(prompt.time_ms * 1_000_000);
        let cached = |(block, _): &&(u32, u16)| self.nodes[*block as usize].cached;
        let hit = prompt.blocks.iter().take_while(cached).count();
        for (block, _) in &prompt.blocks[..hit] {
            self.policy.used(BlockId(*block), self.usage(*block), now);
            let beside = self.beside(*block, now);
            self.policy.touch(LIST, BlockId(*block), beside, now);
        }
        let mut parent = hit.checked_sub(1).map_or(NONE, |last| prompt.blocks[last].0);
        for (block, tokens) in &prompt.blocks[hit..] {
            if !self.nodes[*block as usize].cached {
                if !self.make_room(parent) {
                    break;
                }
                self.insert(*block, parent, *tokens, now);
            }
            parent = *block;
        }
        hit
    }

    fn answered(&mut self, prompt: &Prompt, answer: TraceAnswer) {
        let cached = |(block, _): &&(u32, u16)| self.nodes[*block as usize].cached;
        let blocks: Vec<BlockId> = prompt
            .blocks
            .iter()
            .take_while(cached)
            .map(|(block, _)| BlockId(*block))
            .collect();
        self.policy
            .advise(&blocks, Advice::Answered(answer.tokens), Time(answer.at_ms * 1_000_000));
    }
}
