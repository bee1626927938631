use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use kvtier_core::{BlockHash, Parent, Reserved, SealItem, Sealed};

use super::foreign::Source;
use super::handle::HeldSlot;
use super::returns::Home;
use super::session::Session;
use super::{ClientError, PutOutcome};
use crate::wire::{Ahead, Array, Lineage, Slot};

/// A `put_from`, sans I/O: rounds of at most two trips each, until every block has its outcome.
pub(super) struct Put<'a, S> {
    blocks: &'a [(BlockHash, S)],
    lineage: Lineage,
    tokens: u32,
    /// Blocks without an outcome, and whether they may be written before the node was asked.
    queue: VecDeque<(usize, bool)>,
    outcomes: Vec<PutOutcome>,
    put_bytes_max: usize,
}

/// The end of a large round's last block that is copied after the blocks before it are sealed. The node slept while
/// the client copied, and what it sleeps longest from is slowest to wake: the first seal wakes it during this copy, so
/// that the second, which the caller waits for, finds it awake.
const TAIL_BYTES: usize = 512 << 10;

/// Rounds below this many bytes are too short for the node to sleep deeply.
const TAIL_ROUND_BYTES: usize = 2 << 20;

/// The two halves of a round, each with a seal of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// All blocks, or all but the last one of a large round.
    Front,
    /// The last block of a large round.
    Last,
}

impl Part {
    /// In the order of sending.
    pub(super) const ALL: [Part; 2] = [Part::Front, Part::Last];
}

/// Some blocks of a put on their way.
pub(super) struct PutRound {
    index: usize,
    items: Vec<Item>,
    /// The item that is [`Part::Last`].
    last: Option<usize>,
    /// Slots held ahead were given back because the reserve found no room.
    made_room: bool,
}

struct Item {
    /// Of the put's blocks.
    block: usize,
    place: Place,
}

enum Place {
    /// To be reserved.
    Asked,
    /// A slot granted ahead.
    Ahead(HeldSlot),
    /// A slot of a reserve's answer.
    Granted(HeldSlot),
    /// The reserve found no room.
    Refused,
    Settled(PutOutcome),
}

/// What a round asks slots for.
pub(super) struct Asking {
    pub(super) lineage: Lineage,
    pub(super) hashes: Vec<BlockHash>,
    pub(super) lengths: Vec<u32>,
}

impl<'a, S: Source> Put<'a, S> {
    pub(super) fn new(blocks: &'a [(BlockHash, S)], lineage: Lineage, tokens: u32, put_bytes_max: usize) -> Put<'a, S> {
        Put {
            blocks,
            lineage,
            tokens,
            queue: (0..blocks.len()).map(|block| (block, true)).collect(),
            outcomes: vec![PutOutcome::Busy; blocks.len()],
            put_bytes_max,
        }
    }

    pub(super) fn into_outcomes(self) -> Vec<PutOutcome> {
        self.outcomes
    }

    /// The next blocks to send; `None` once all are decided.
    pub(super) fn next_round(
        &mut self,
        session: &mut Session,
        index: usize,
        home: &Arc<dyn Home>,
    ) -> Result<Option<PutRound>, ClientError> {
        let handle = session.opened(index).map_or(0, |opened| opened.handle);
        let now = Instant::now();
        let ahead_bytes_max = session.slots.bytes_max();
        let mut items = Vec::with_capacity(self.queue.len().min(session.keys_max()));
        let (mut bytes, mut ahead_bytes, mut may_go_ahead) = (0usize, 0usize, true);
        while items.len() < session.keys_max() {
            let Some((block, first_try)) = self.queue.front().copied() else {
                break;
            };
            let (hash, ref source) = self.blocks[block];
            let length = u32::try_from(source.len()).unwrap_or(u32::MAX);
            if length == 0 || length > session.welcome.block_bytes_max {
                self.outcomes[block] = PutOutcome::Invalid;
                self.queue.pop_front();
                continue;
            }
            if bytes > 0 && bytes + source.len() > self.put_bytes_max {
                break;
            }
            bytes += source.len();
            self.queue.pop_front();
            // Only the front of a round goes ahead: its copies hide the trip of the reserve for the rest.
            may_go_ahead &= ahead_bytes == 0 || ahead_bytes + source.len() <= ahead_bytes_max;
            let mut place = Place::Asked;
            if may_go_ahead
                && first_try
                && !session.known.contains(handle, hash)
                && let Some(slot) = session.slots.take(length, now)
            {
                ahead_bytes += source.len();
                let slice = session.slice(&slot.extent)?;
                place = Place::Ahead(HeldSlot::new(slot.reservation, slice, session.epoch, Arc::clone(home)));
            }
            items.push(Item { block, place });
        }
        Ok(if items.is_empty() {
            None
        } else {
            Some(PutRound {
                index,
                items,
                last: None,
                made_room: false,
            })
        })
    }

    /// What to reserve first, if anything.
    pub(super) fn reserve(&self, round: &PutRound) -> Option<Asking> {
        let mut asking = Asking {
            lineage: Lineage::Independent,
            hashes: Vec::new(),
            lengths: Vec::new(),
        };
        let (mut first, mut last) = (None, None);
        for item in round.items.iter().filter(|item| matches!(item.place, Place::Asked)) {
            first = first.or(Some(item.block));
            last = Some(item.block);
            asking.hashes.push(self.blocks[item.block].0);
            asking.lengths.push(self.length(item));
        }
        let (first, last) = first.zip(last)?;
        if self.lineage != Lineage::Independent && last - first + 1 == asking.hashes.len() {
            asking.lineage = Lineage::Chain(parent_in(self.lineage, first, |before| self.blocks[before].0));
        }
        Some(asking)
    }

    fn length(&self, item: &Item) -> u32 {
        u32::try_from(self.blocks[item.block].1.len()).unwrap_or(u32::MAX)
    }

    /// Copies the blocks that have a slot granted ahead. Do it while the reserve is on its way.
    pub(super) fn copy_ahead(&self, round: &PutRound) -> Result<(), ClientError> {
        for item in &round.items {
            if let Place::Ahead(held) = &item.place {
                self.copy(item, held, 0..self.blocks[item.block].1.len())?;
            }
        }
        Ok(())
    }

    /// Copies the blocks that the reserve's answer gave a slot; of the last one, [`Part::Front`] copies what is not its
    /// tail.
    pub(super) fn copy_granted(&self, round: &PutRound, part: Part) -> Result<(), ClientError> {
        for (number, item) in round.items.iter().enumerate() {
            let Place::Granted(held) = &item.place else { continue };
            let length = self.blocks[item.block].1.len();
            let tail = if round.last == Some(number) {
                length.min(TAIL_BYTES)
            } else {
                0
            };
            let range = match part {
                Part::Front => 0..length - tail,
                Part::Last => length - tail..length,
            };
            self.copy(item, held, range)?;
        }
        Ok(())
    }

    fn copy(&self, item: &Item, held: &HeldSlot, range: Range<usize>) -> Result<(), ClientError> {
        let target = held.slice.subslice(range.start, range.len());
        self.blocks[item.block]
            .1
            .copy_to(range.start, &target.map_err(ClientError::protocol)?)
    }

    pub(super) fn absorb_reserved(
        &self,
        round: &mut PutRound,
        session: &mut Session,
        outcomes: Array<'_, Reserved>,
        home: &Arc<dyn Home>,
    ) -> Result<(), ClientError> {
        let handle = session.opened(round.index).map_or(0, |opened| opened.handle);
        let mut outcomes = outcomes.iter();
        for item in round.items.iter_mut().filter(|item| matches!(item.place, Place::Asked)) {
            let outcome = outcomes
                .next()
                .ok_or_else(|| ClientError::protocol("fewer answers than keys"))?;
            item.place = match outcome {
                Reserved::Present => {
                    session.known.insert(handle, self.blocks[item.block].0);
                    Place::Settled(PutOutcome::Present)
                }
                Reserved::Busy => Place::Refused,
                Reserved::Granted { reservation, extent } => {
                    let slice = session.slice(&extent)?;
                    Place::Granted(HeldSlot::new(reservation, slice, session.epoch, Arc::clone(home)))
                }
            };
        }
        if round.is_refused() {
            // What is held ahead counts against the same bound.
            let mut held = Vec::new();
            session.slots.give_back(&mut held);
            round.made_room = !held.is_empty();
            home.returns().abandon(session.epoch, held);
        }
        round.last = self.last_apart(round);
        Ok(())
    }

    fn last_apart(&self, round: &PutRound) -> Option<usize> {
        let written = round.items.iter().filter(|item| item.held().is_some());
        let bytes: usize = written.map(|item| self.blocks[item.block].1.len()).sum();
        let last = round.items.iter().rposition(|item| item.held().is_some())?;
        let item = &round.items[last];
        let length = self.blocks[item.block].1.len();
        // A block that went ahead is copied already.
        let is_granted = matches!(item.place, Place::Granted(_));
        (bytes >= TAIL_ROUND_BYTES && length >= TAIL_BYTES && length < bytes && is_granted).then_some(last)
    }

    /// What to seal; empty when nothing was written.
    pub(super) fn seal_items(&self, round: &PutRound, part: Part) -> Vec<SealItem> {
        let covered = (0..)
            .zip(&round.items)
            .filter(|(number, _)| round.part(*number) == part);
        covered
            .filter_map(|(_, item)| Some((item, item.held()?)))
            .map(|(item, held)| SealItem {
                reservation: held.reservation,
                hash: self.blocks[item.block].0,
                parent: parent_in(self.lineage, item.block, |before| self.blocks[before].0),
                length: self.length(item),
                tokens: self.tokens,
            })
            .collect()
    }

    /// Slots for the next put like this one.
    pub(super) fn ahead(&self, round: &PutRound, session: &Session) -> Ahead {
        let Some(first) = round.items.first().filter(|_| !round.is_refused()) else {
            return Ahead::default();
        };
        let length = self.length(first);
        let class = super::slots::Slots::class_of(length);
        let alike = |item: &&Item| super::slots::Slots::class_of(self.length(item)) == class;
        session.slots.wanted(length, round.items.iter().filter(alike).count())
    }

    pub(super) fn absorb_sealed(
        &self,
        round: &mut PutRound,
        part: Part,
        session: &mut Session,
        outcomes: Array<'_, Sealed>,
        granted: Array<'_, Slot>,
    ) -> Result<(), ClientError> {
        session.absorb_slots(granted);
        let handle = session.opened(round.index).map_or(0, |opened| opened.handle);
        let mut outcomes = outcomes.iter();
        for number in 0..round.items.len() {
            if round.part(number) != part {
                continue;
            }
            let item = &mut round.items[number];
            let went_ahead = matches!(item.place, Place::Ahead(_));
            let Some(held) = item.held_mut() else { continue };
            let outcome = outcomes
                .next()
                .ok_or_else(|| ClientError::protocol("fewer answers than items"))?;
            // The node keeps a slot whose seal is invalid.
            if outcome != Sealed::Invalid {
                held.settle();
            }
            item.place = match outcome {
                // Nobody said when this put began until now: ask, so that the answer says under which generation.
                Sealed::Stale if went_ahead => Place::Asked,
                outcome => Place::Settled(outcome_of(outcome)),
            };
            if matches!(outcome, Sealed::Published | Sealed::Present) {
                session.known.insert(handle, self.blocks[item.block].0);
            }
        }
        Ok(())
    }

    /// Notes the outcomes; what deserves another round is queued again.
    pub(super) fn finish(&mut self, round: PutRound) {
        let published = |item: &Item| matches!(item.place, Place::Settled(PutOutcome::Published));
        let made_room = round.made_room || round.items.iter().any(published);
        for item in round.items.into_iter().rev() {
            match item.place {
                Place::Settled(outcome) => self.outcomes[item.block] = outcome,
                Place::Asked => self.queue.push_front((item.block, false)),
                // Slots that were sealed or given back made room under this client's own bound: asking again can help.
                Place::Refused if made_room => self.queue.push_front((item.block, true)),
                Place::Refused | Place::Ahead(_) | Place::Granted(_) => self.outcomes[item.block] = PutOutcome::Busy,
            }
        }
    }
}

impl PutRound {
    fn part(&self, number: usize) -> Part {
        if self.last == Some(number) {
            Part::Last
        } else {
            Part::Front
        }
    }

    fn is_refused(&self) -> bool {
        self.items.iter().any(|item| matches!(item.place, Place::Refused))
    }
}

impl Item {
    fn held(&self) -> Option<&HeldSlot> {
        match &self.place {
            Place::Ahead(held) | Place::Granted(held) => Some(held),
            _ => None,
        }
    }

    fn held_mut(&mut self) -> Option<&mut HeldSlot> {
        match &mut self.place {
            Place::Ahead(held) | Place::Granted(held) => Some(held),
            _ => None,
        }
    }
}

/// The parent of a batch's block number `block`.
pub(super) fn parent_in(lineage: Lineage, block: usize, hash: impl Fn(usize) -> BlockHash) -> Parent {
    match (lineage, block.checked_sub(1)) {
        (Lineage::Independent, _) => Parent::Unknown,
        (Lineage::Chain(parent), None) => parent,
        (Lineage::Chain(_), Some(before)) => Parent::Block(hash(before)),
    }
}

pub(super) fn outcome_of(sealed: Sealed) -> PutOutcome {
    match sealed {
        Sealed::Published => PutOutcome::Published,
        Sealed::Present => PutOutcome::Present,
        Sealed::Stale => PutOutcome::Stale,
        Sealed::Busy => PutOutcome::Busy,
        Sealed::Invalid => PutOutcome::Invalid,
    }
}
