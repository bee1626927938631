use std::sync::Arc;

use kvtier_core::{BlockHash, LeaseId, Parent, Reserved, SealItem};

use super::foreign::Target;
use super::handle::{HeldSlot, OpenSlot};
use super::put::{outcome_of, parent_in};
use super::returns::Home;
use super::session::{Got, Session};
use super::{ClientError, GetOutcome, PutOutcome, Writing};
use crate::wire::{Lineage, Reply};

/// Copies a leased block to the front of the caller's buffer.
pub(super) fn copy_out(got: &Got, target: &mut impl Target) -> Result<GetOutcome, ClientError> {
    let leased = match got {
        Got::Miss => return Ok(GetOutcome::Miss),
        Got::Busy => return Ok(GetOutcome::Busy),
        Got::Leased(leased) => leased,
    };
    let slice = leased.slice()?;
    let length = u32::try_from(slice.len()).unwrap_or(u32::MAX);
    if target.room() < slice.len() {
        return Ok(GetOutcome::TooSmall { length });
    }
    target.copy_from(slice)?;
    Ok(GetOutcome::Hit {
        length,
        tier: leased.tier,
    })
}

/// What a fetch leased.
pub(super) fn leases_of(got: &[Got]) -> impl Iterator<Item = LeaseId> {
    got.iter().filter_map(|got| match got {
        Got::Leased(leased) => Some(leased.lease),
        Got::Miss | Got::Busy => None,
    })
}

/// Pieces that fit a message, each with the parent of its first key as far as it is known.
pub(super) fn chunks(hashes: &[BlockHash], keys_max: usize) -> impl Iterator<Item = (&[BlockHash], Lineage)> {
    hashes.chunks(keys_max.max(1)).enumerate().map(move |(number, chunk)| {
        let before = (number * keys_max).checked_sub(1).and_then(|before| hashes.get(before));
        (
            chunk,
            Lineage::Chain(before.map_or(Parent::Unknown, |hash| Parent::Block(*hash))),
        )
    })
}

/// Refuses an answer that is not one entry per key.
pub(super) fn check_count(count: usize, keys: usize) -> Result<(), ClientError> {
    if count == keys {
        Ok(())
    } else {
        Err(ClientError::protocol("another number of answers than keys"))
    }
}

/// Refuses a get that does not say where each block goes.
pub(super) fn check_targets(targets: usize, keys: usize) -> Result<(), ClientError> {
    if targets == keys {
        Ok(())
    } else {
        Err(ClientError::invalid(format!("{targets} targets for {keys} keys")))
    }
}

/// Refuses more keys than one message takes.
pub(super) fn check_one_message(keys: usize, session: &Session) -> Result<(), ClientError> {
    let most = session.keys_max();
    if keys > most {
        return Err(ClientError::invalid(format!("{keys} keys: at most {most} at once")));
    }
    Ok(())
}

/// Refuses what the node would refuse.
pub(super) fn check_lengths(blocks: &[(BlockHash, u32)], session: &Session) -> Result<(), ClientError> {
    let longest = session.welcome.block_bytes_max;
    check_one_message(blocks.len(), session)?;
    if blocks.iter().any(|(_, length)| *length == 0 || *length > longest) {
        return Err(ClientError::invalid(format!("a block has 1 to {longest} bytes")));
    }
    Ok(())
}

/// Slots asked for, to be written in place.
pub(super) struct Opening<'a> {
    pub(super) index: usize,
    pub(super) hashes: &'a [BlockHash],
    pub(super) lengths: &'a [u32],
    pub(super) lineage: Lineage,
    pub(super) tokens: u32,
}

impl Opening<'_> {
    pub(super) fn absorb(
        &self,
        session: &mut Session,
        reply: Reply<'_>,
        home: &Arc<dyn Home>,
    ) -> Result<Vec<Writing<OpenSlot>>, ClientError> {
        let Reply::Reserved { generation, outcomes } = reply else {
            return Err(unexpected());
        };
        check_count(outcomes.len(), self.hashes.len())?;
        session.observe(self.index, generation);
        let opened = outcomes.iter().enumerate().map(|(at, outcome)| {
            Ok(match outcome {
                Reserved::Present => Writing::Present,
                Reserved::Busy => Writing::Busy,
                Reserved::Granted { reservation, extent } => {
                    let held = HeldSlot::new(reservation, session.slice(&extent)?, session.epoch, Arc::clone(home));
                    let parent = parent_in(self.lineage, at, |before| self.hashes[before]);
                    let (hash, length) = (self.hashes[at], self.lengths[at]);
                    let item = SealItem {
                        reservation,
                        hash,
                        parent,
                        length,
                        tokens: self.tokens,
                    };
                    Writing::Open(OpenSlot::new(held, generation, item))
                }
            })
        });
        opened.collect()
    }
}

/// Settles written slots by the answer to their seal.
pub(super) fn absorb_sealed<'s>(
    session: &mut Session,
    index: usize,
    reply: Reply<'_>,
    slots: impl ExactSizeIterator<Item = &'s mut OpenSlot>,
    outcomes: &mut Vec<PutOutcome>,
) -> Result<(), ClientError> {
    let Reply::Sealed {
        generation,
        outcomes: sealed,
        granted,
    } = reply
    else {
        return Err(unexpected());
    };
    if sealed.len() != slots.len() {
        return Err(unexpected());
    }
    session.observe(index, generation);
    session.absorb_slots(granted);
    for (slot, sealed) in slots.zip(sealed) {
        slot.settle(sealed);
        outcomes.push(outcome_of(sealed));
    }
    Ok(())
}

pub(super) fn unexpected() -> ClientError {
    ClientError::protocol("an answer of another kind than the request")
}
