//! An anchor outside the devices, and older images of these that a restart may find: what the driver makes of the two.

use std::collections::{BTreeMap, BTreeSet};

use kvtier_core::{Generation, NamespaceId, OperationId, TrustDomain};

use super::World;
use super::purges::Job;
use crate::counts::Fault;
use crate::memory::Memory;
use crate::oracle::Check;

/// The devices as a power cut at some moment would have left them.
pub(super) struct Image {
    nvme: Memory,
    /// Of each namespace, as the register had it.
    recorded: Vec<Generation>,
    /// Writes that nobody had been told of.
    unanswered: BTreeSet<OperationId>,
    journal: BTreeMap<u64, Job>,
    step: u64,
}

impl World {
    /// Copies what is durable now.
    pub(super) fn take_image(&mut self) {
        let copy = self.nvme.clone();
        let live = std::mem::replace(&mut self.nvme, copy);
        self.lose_what_does_not_survive(true);
        let mut nvme = std::mem::replace(&mut self.nvme, live);
        nvme.found_again();
        self.note(|| "an image is taken".to_owned());
        self.image = Some(Image {
            nvme,
            recorded: self.spaces.iter().map(|space| space.recorded).collect(),
            unanswered: self.flights.keys().copied().collect(),
            journal: self.journal.clone(),
            step: self.step,
        });
    }

    /// The devices are now as they were; the anchor is not. Answers which writes nobody had been told of then.
    pub(super) fn put_image_back(&mut self) -> Option<BTreeSet<OperationId>> {
        let restored = self.plan.rates.restored;
        if self.image.is_none() || !self.strikes(restored) {
            return None;
        }
        let image = self.image.as_ref()?;
        self.nvme = image.nvme.clone();
        for (space, recorded) in self.spaces.iter_mut().zip(&image.recorded) {
            space.recorded = *recorded;
        }
        self.journal = image.journal.clone();
        let (step, unanswered) = (image.step, image.unanswered.clone());
        self.ledger.rewind(step);
        self.tally.fault(Fault::Restored);
        self.note(|| format!("the devices are as they were at step {step}"));
        Some(unanswered)
    }

    /// The anchor knows of a later generation than the register: nobody is served.
    pub(super) fn is_refused(&self, space: u32) -> bool {
        let space = &self.spaces[space as usize];
        space.recorded < space.anchored && !self.serves_whatever_the_anchor_knows()
    }

    /// The planted bug `RegisterResetOnRestore`.
    #[cfg(feature = "mutants")]
    fn serves_whatever_the_anchor_knows(&self) -> bool {
        self.plan.settings.mutant == Some(kvtier_core::Mutant::RegisterResetOnRestore)
    }

    #[cfg(not(feature = "mutants"))]
    #[expect(clippy::unused_self, reason = "only a planted bug does")]
    fn serves_whatever_the_anchor_knows(&self) -> bool {
        false
    }

    /// Namespaces of a domain that are served.
    pub(super) fn served(&self, domain: TrustDomain) -> Vec<u32> {
        (0..self.spaces.len() as u32)
            .filter(|space| self.spaces[*space as usize].domain == domain && !self.is_refused(*space))
            .collect()
    }

    pub(super) fn refused_spaces(&self) -> Vec<u32> {
        (0..self.spaces.len() as u32)
            .filter(|space| self.is_refused(*space))
            .collect()
    }

    /// What the anchor knows is not in force a second time, unless somebody insists.
    pub(super) fn above_anchor(&self, space: u32, current: Generation) -> Option<Generation> {
        let anchored = self.spaces[space as usize].anchored.0;
        (self.is_refused(space) && current.0 + 1 == anchored).then_some(Generation(anchored + 1))
    }

    /// The operator has refused namespaces served again, empty.
    pub(super) fn advance_refused(&mut self) -> Check {
        for space in self.refused_spaces() {
            self.tally.answer("advanced_above_anchor");
            let above = Generation(self.spaces[space as usize].anchored.0 + 1);
            self.invalidate(space, Some(above))?;
        }
        Ok(())
    }

    /// A generation is durable in the register.
    pub(super) fn record_generation(&mut self, namespace: NamespaceId, generation: Generation) {
        if let Some(space) = self.spaces.iter_mut().find(|space| space.id == namespace) {
            space.recorded = space.recorded.max(generation);
        }
    }

    /// Then, and before anybody is told, the anchor knows of it.
    pub(super) fn note_in_anchor(&mut self, namespace: NamespaceId, generation: Generation) {
        if let Some(space) = self.spaces.iter_mut().find(|space| space.id == namespace) {
            space.anchored = space.anchored.max(generation);
        }
    }

    /// At a restart: what the register got to know and the anchor did not, before a crash.
    pub(super) fn catch_up_anchor(&mut self) {
        for space in &mut self.spaces {
            space.anchored = space.anchored.max(space.recorded);
        }
        for _ in self.refused_spaces() {
            self.tally.answer("refused_behind_anchor");
        }
    }
}
