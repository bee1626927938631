use std::collections::BTreeSet;

use super::{Cache, Prompt, Prompts};

const NEVER: u32 = u32::MAX;
const NONE: u32 = u32::MAX;

#[derive(Clone)]
struct Node {
    /// Requests that use the block, the next one last.
    uses: Vec<u32>,
    parent: u32,
    depth: u32,
    children: u32,
    cached: bool,
}

/// Belady's policy on whole prefixes: the leaf that is used again last goes first, of equals the deepest; and a block that
/// would have to go at once is not cached.
///
/// Who uses a block uses all before it, so a parent is never used later than its child: with the deepest of equals going
/// first, what Belady's policy keeps is closed under prefixes.
pub(super) struct Opt {
    nodes: Vec<Node>,
    capacity_blocks: usize,
    cached: usize,
    /// Cached blocks without cached children: when they are used again, how deep they lie, which they are.
    leaves: BTreeSet<(u32, u32, u32)>,
}

impl Opt {
    pub(super) fn new(prompts: &Prompts, capacity_blocks: usize) -> Opt {
        let node = Node {
            uses: Vec::new(),
            parent: NONE,
            depth: 0,
            children: 0,
            cached: false,
        };
        let mut nodes = vec![node; prompts.blocks];
        for (number, prompt) in prompts.prompts.iter().enumerate().rev() {
            let number = u32::try_from(number).expect("fewer than 2^32 requests");
            for (block, _) in &prompt.blocks {
                let uses = &mut nodes[*block as usize].uses;
                if uses.last() != Some(&number) {
                    uses.push(number);
                }
            }
        }
        Opt {
            nodes,
            capacity_blocks,
            cached: 0,
            leaves: BTreeSet::new(),
        }
    }

    fn key(&self, block: u32) -> (u32, u32, u32) {
        let node = &self.nodes[block as usize];
        (node.uses.last().copied().unwrap_or(NEVER), node.depth, block)
    }

    fn insert(&mut self, block: u32, parent: u32) {
        let key = self.key(block);
        let node = &mut self.nodes[block as usize];
        node.cached = true;
        node.parent = parent;
        if node.children == 0 {
            self.leaves.insert(key);
        }
        self.cached += 1;
        if parent != NONE {
            let key = self.key(parent);
            self.leaves.remove(&key);
            self.nodes[parent as usize].children += 1;
        }
    }

    fn evict(&mut self, block: u32) {
        self.cached -= 1;
        let node = &mut self.nodes[block as usize];
        node.cached = false;
        let parent = node.parent;
        if parent != NONE {
            let above = &mut self.nodes[parent as usize];
            above.children -= 1;
            if above.children == 0 && above.cached {
                let key = self.key(parent);
                self.leaves.insert(key);
            }
        }
    }
}

impl Cache for Opt {
    fn request(&mut self, prompt: &Prompt) -> usize {
        let cached = |(block, _): &&(u32, u16)| self.nodes[*block as usize].cached;
        let hit = prompt.blocks.iter().take_while(cached).count();
        for (depth, (block, _)) in (0..).zip(&prompt.blocks) {
            let was_leaf = self.leaves.remove(&self.key(*block));
            let node = &mut self.nodes[*block as usize];
            node.uses.pop();
            if !node.cached {
                node.depth = depth;
            }
            if was_leaf {
                let key = self.key(*block);
                self.leaves.insert(key);
            }
        }
        let mut parent = NONE;
        for (block, _) in &prompt.blocks {
            if !self.nodes[*block as usize].cached {
                if self.cached >= self.capacity_blocks {
                    let last = self.leaves.last().copied();
                    match last.filter(|last| *last > self.key(*block)) {
                        Some(last) => {
                            self.leaves.remove(&last);
                            self.evict(last.2);
                        }
                        None => break,
                    }
                }
                self.insert(*block, parent);
            }
            parent = *block;
        }
        hit
    }
}
