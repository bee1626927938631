//! What is known of a visit once its prompt has been answered.

use super::class::{Class, answer};
use super::visits::NONE;
use super::{BlockId, ReuseHazard};

impl ReuseHazard {
    /// The prompt that these blocks, in prefix order, are of was answered with so many tokens. Blocks of the answer may follow.
    pub(super) fn answered(&mut self, blocks: &[BlockId], tokens: u32) {
        // A last block that is not full is a visit of its own.
        let mut visits = (0..blocks.len())
            .rev()
            .take(2)
            .map(|last| (last, self.block(blocks[last].0).visit));
        let last = visits.find(|&(_, visit)| visit != NONE && self.visits.at(visit).class != Class::PARTIAL);
        let Some((last, mut visit)) = last else { return };
        // Where another prompt went on from here, this is about the one before.
        if !self.is_told(blocks[last]) || !blocks.contains(&BlockId(self.visits.at(visit).newest_block)) {
            return;
        }
        self.tell(visit, tokens);
        // Blocks of a long answer are visits of their own, each later than the one that it goes on from.
        for &block in blocks[..last].iter().rev() {
            let before = self.block(block.0).visit;
            if before == visit {
                continue;
            }
            let goes_on = self.visits.at(visit).pause == NONE;
            if !goes_on || !self.is_told(block) || self.age(before) <= self.age(visit) {
                return;
            }
            if self.visits.at(before).newest_block != block.0 {
                return;
            }
            self.tell(before, tokens);
            visit = before;
        }
    }

    /// Whether the block is of a visit that an answer says something of.
    fn is_told(&self, block: BlockId) -> bool {
        let visit = self.block(block.0).visit;
        visit != NONE && self.visits.at(visit).class.is_conversation()
    }

    fn tell(&mut self, visit: u32, tokens: u32) {
        self.unweigh(visit);
        let entry = self.visits.at_mut(visit);
        entry.answer = answer(tokens);
        // What was seen of it at earlier ages was seen of a visit that waits for its answer.
        entry.class = entry.conversation();
        self.weigh(visit);
        self.level(visit);
    }
}
