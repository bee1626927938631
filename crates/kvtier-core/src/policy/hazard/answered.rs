//! What is known of a visit once its prompt has been answered.

use super::class::{Class, answer};
use super::{BlockId, NONE, ReuseHazard};

impl ReuseHazard {
    /// The prompt that these blocks, in prefix order, are of was answered with so many tokens.
    pub(super) fn answered(&mut self, blocks: &[BlockId], tokens: u32) {
        // A last block that is not full is a visit of its own.
        let visits = blocks.iter().rev().map(|block| self.block(block.0).visit);
        let Some(visit) = visits
            .take(2)
            .find(|visit| *visit != NONE && self.visits.at(*visit).class != Class::PARTIAL)
        else {
            return;
        };
        let entry = self.visits.at(visit);
        // Where another prompt went on from here, this is about the one before.
        if !entry.class.is_conversation() || !blocks.contains(&BlockId(entry.newest_block)) {
            return;
        }
        self.unweigh(visit);
        let entry = self.visits.at_mut(visit);
        entry.answer = answer(tokens);
        // What was seen of it before was seen of a visit that waits for its answer.
        entry.class = entry.conversation();
        self.weigh(visit);
        self.level(visit);
    }
}
