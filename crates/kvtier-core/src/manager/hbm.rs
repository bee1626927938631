use super::operation::Operation;
use super::{TierManager, mutant_is};
use crate::hbm_table::{HbmSegmentState, HbmSlotState, HbmTable, Shape};
use crate::holding::Holding;
use crate::host_table::{SlotState, pages};
use crate::index::flag;
use crate::namespace_table::backoff;
use crate::{Action, Completion, Extent, Failure, Fetched, LeaseId, SegmentId, Tier, TrustDomain};
use std::ops::Range;
use std::time::Duration;

/// How long nothing is asked of the device after it refused.
const PAUSE: Duration = Duration::from_millis(100);
/// Errors in a row after which all that it holds is given up.
const ERRORS_MAX: u32 = 3;

/// A slot in which an earlier copy may lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Residue {
    place: u32,
    segment: SegmentId,
    slot: u32,
    bytes: u64,
}

/// What became of residues.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// Zero by now.
    pub(super) gone: u64,
    pub(super) gone_bytes: u64,
    /// Given up on.
    pub(super) left: u64,
    pub(super) waiting: Vec<Residue>,
    /// The device was asked to zero some.
    pub(super) asked: bool,
}

impl Looked {
    fn is_gone(&mut self, residue: &Residue) {
        self.gone += 1;
        self.gone_bytes += residue.bytes;
    }
}

impl TierManager {
    fn hbm_mut(&mut self) -> &mut HbmTable {
        self.hbm.as_mut().expect("a tier in device memory")
    }

    /// Where a block can be read in device memory, by a caller that can.
    pub(super) fn hbm_copy(&self, block: u32) -> Option<(u32, u32)> {
        self.hbm.as_ref()?.copy_of(block)
    }

    fn hbm_extent(&self, (segment, slot): (u32, u32), length: u32) -> Extent {
        let hbm = self.hbm.as_ref().expect("a tier in device memory");
        Extent {
            segment: hbm.segment(segment).id,
            offset: u64::from(slot) * hbm.slot_bytes(segment),
            length,
        }
    }

    /// Leases the copy of a block in device memory.
    pub(super) fn lease_hbm(&mut self, client: u32, block: u32, at: (u32, u32)) -> Fetched {
        let entry = self.index.entry(block);
        let (length, checksum) = (entry.length, entry.is(flag::CHECKSUM).then_some(entry.checksum));
        let extent = self.hbm_extent(at, length);
        let leases_max = self.settings.leases_per_client_max;
        let holder = self.clients.at_mut(client);
        if holder.leases as usize >= leases_max {
            return Fetched::Busy;
        }
        holder.leases += 1;
        self.hbm_mut().lease(at);
        self.counters.fetch_hits_hbm += 1;
        let expires = self.now.after(self.settings.lease_ttl);
        let mut holding = Holding::new(client, at.0, at.1, expires);
        holding.on_device = true;
        Fetched::Leased {
            lease: LeaseId(self.leases.insert(holding)),
            extent,
            tier: Tier::Hbm,
            checksum,
        }
    }

    /// The bytes that a lease or reservation keeps from other use.
    pub(super) fn held_bytes(&self, holding: &Holding) -> u64 {
        match &self.hbm {
            Some(hbm) if holding.on_device => hbm.slot_bytes(holding.segment),
            _ => self.host.slot_bytes(holding.segment),
        }
    }

    pub(super) fn end_hbm_lease(&mut self, holding: &Holding) {
        self.hbm_mut().end_lease(holding.segment, holding.slot);
        self.close_drained_hbm();
    }

    /// The block whose copy the slot of a lease on device memory still is.
    pub(super) fn hbm_owner(&self, holding: &Holding) -> Option<u32> {
        let slot = self.hbm.as_ref()?.slot(holding.segment, holding.slot);
        (slot.state == HbmSlotState::Block).then_some(slot.owner)
    }

    /// A block in host memory is read by a caller that could read device memory too. Who does so a second time is likely
    /// to do it again: it is copied there.
    pub(super) fn used_from_device(&mut self, block: u32) {
        let entry = self.index.entry_mut(block);
        if !entry.is(flag::TO_DEVICE) {
            entry.set(flag::TO_DEVICE);
            return;
        }
        let entry = self.index.entry(block);
        let (host_segment, host_slot, length) = (entry.host_segment, entry.host_slot, entry.length);
        let checksum = entry.is(flag::CHECKSUM).then_some(entry.checksum);
        let domain = self.namespaces.at(entry.namespace).domain;
        let in_flight_max = self.settings.hbm_promotions_in_flight_max;
        let Some(hbm) = &self.hbm else { return };
        let is_idle = hbm.place_of(block).is_none() && hbm.filling < in_flight_max && hbm.not_before <= self.now;
        if !is_idle || self.host.slot(host_segment, host_slot).operations == u8::MAX {
            return;
        }
        let Some(at) = self.hbm_room((domain, pages(length))) else {
            return;
        };
        self.hbm_mut().fill(at, block);
        self.host.slot_mut(host_segment, host_slot).operations += 1;
        let source = self.host_extent(host_segment, host_slot, length);
        let target = self.hbm_extent(at, length);
        let operation = self.issue(Operation::PromoteToHbm {
            segment: at.0,
            slot: at.1,
            host_segment,
            host_slot,
            length,
        });
        self.actions.push_back(Action::PromoteToHbm {
            operation,
            source,
            target,
            checksum,
        });
    }

    /// A free slot: of memory that is left, or of the copy that was used longest ago. Nobody waits for one: where there is
    /// none now, the next use asks again.
    fn hbm_room(&mut self, shape: Shape) -> Option<(u32, u32)> {
        let now = self.now;
        let hbm = self.hbm_mut();
        if let Some(free) = hbm.free_slot(shape) {
            return Some(free);
        }
        let bytes = hbm.segment_bytes(shape.1)?;
        if hbm.is_opening(shape) {
            return None;
        }
        if hbm.opened_bytes + bytes <= hbm.bytes_max && hbm.not_before <= now {
            self.open_hbm(shape, bytes);
            return None;
        }
        let oldest = hbm.oldest(shape);
        if (oldest.is_none() || hbm.count_eviction(shape)) && !hbm.is_closing() {
            // Who has none yet takes one that was not used while a segment's worth of others asked.
            let than = oldest.map_or_else(|| hbm.next_use().saturating_sub(bytes / shape.1), |(used, _)| used);
            if let Some(stale) = hbm.stale_segment(shape, than) {
                self.drain_hbm(stale);
            }
        }
        let (_, block) = oldest?;
        self.counters.evictions_hbm += 1;
        self.drop_hbm(block);
        self.hbm_mut().free_slot(shape)
    }

    fn open_hbm(&mut self, shape: Shape, bytes: u64) {
        let place = self.hbm_mut().open(shape, bytes);
        let operation = self.issue(Operation::OpenHbm { segment: place });
        let segment = self.hbm_mut().segment(place).id;
        self.actions.push_back(Action::OpenSegment {
            operation,
            tier: Tier::Hbm,
            segment,
            bytes,
            domain: Some(shape.0),
        });
    }

    pub(super) fn hbm_opened(&mut self, place: u32, outcome: Result<Completion, Failure>) {
        let first = self.settings.tier_retry_backoff;
        let now = self.now;
        let hbm = self.hbm_mut();
        if outcome.is_ok() {
            hbm.attempts = 0;
            hbm.opened(place);
            return;
        }
        // An engine owns most of that memory and may have taken the rest.
        hbm.drop_segment(place);
        hbm.not_before = backoff(now, first, hbm.attempts);
        hbm.attempts += 1;
        self.counters.hbm_errors += 1;
    }

    fn drain_hbm(&mut self, place: u32) {
        let before = self.hbm_mut().blocks;
        self.hbm_mut().drain(place);
        self.counters.evictions_hbm += before - self.hbm_mut().blocks;
        self.close_drained_hbm();
    }

    fn close_drained_hbm(&mut self) {
        for place in self.hbm_mut().take_drained() {
            self.close_hbm(place);
        }
    }

    pub(super) fn close_hbm(&mut self, place: u32) {
        let segment = self.hbm_mut().segment(place).id;
        let operation = self.issue(Operation::CloseHbm {
            segment: place,
            is_asked: true,
        });
        self.actions.push_back(Action::CloseSegment {
            operation,
            tier: Tier::Hbm,
            segment,
        });
    }

    pub(super) fn hbm_closed(&mut self, place: u32, outcome: Result<Completion, Failure>) {
        if outcome.is_err() {
            // The memory must not be counted as free before it is: ask again when the operation is due.
            self.retry_later(Operation::CloseHbm {
                segment: place,
                is_asked: false,
            });
            return;
        }
        self.hbm_mut().drop_segment(place);
        self.counters.segments_reclaimed += 1;
    }

    /// The device answered. The copy counts only if the block is still wanted under its generation.
    pub(super) fn promoted_to_hbm(
        &mut self,
        at: (u32, u32),
        host: (u32, u32),
        length: u32,
        outcome: Result<Completion, Failure>,
    ) {
        let slot = self.hbm_mut().slot(at.0, at.1);
        let block = (slot.state == HbmSlotState::Filling).then_some(slot.owner);
        let is_current = block.is_some_and(|block| self.is_current(self.index.entry(block)));
        let is_good = outcome.is_ok() || mutant_is!(self, HbmPublishesFailedCopy);
        if self.hbm_mut().filled(at, is_good && is_current) {
            self.counters.hbm_promotions += 1;
            self.counters.hbm_promoted_bytes += u64::from(length);
            if let (Some(block), Ok(Completion::Written { checksum })) = (block, outcome) {
                let entry = self.index.entry_mut(block);
                entry.checksum = checksum;
                entry.set(flag::CHECKSUM);
            }
        }
        self.host.slot_mut(host.0, host.1).operations -= 1;
        let memory = self.host.slot(host.0, host.1);
        if memory.state == SlotState::Block {
            self.unpark(memory.owner);
        }
        self.host.settle_slot(host.0, host.1);
        let group = self.host.segment(host.0).group;
        self.host.attend(group);
        if let (Some(block), Err(Failure::Corrupt)) = (block, outcome) {
            // What was to be copied is not what was put: nobody else may see it.
            self.forget(block);
        }
        self.note_hbm_outcome(outcome);
        self.close_drained_hbm();
    }

    /// Counts what the device answered, and pauses or gives it up where it fails.
    fn note_hbm_outcome(&mut self, outcome: Result<Completion, Failure>) {
        let (now, first) = (self.now, self.settings.tier_retry_backoff);
        let hbm = self.hbm_mut();
        match outcome {
            Ok(_) => hbm.errors = 0,
            Err(Failure::Busy | Failure::Deadline) => hbm.not_before = now.after(PAUSE),
            // The bytes in host memory are bad: no fault of the device's.
            Err(Failure::Corrupt) => self.counters.corrupt += 1,
            Err(Failure::Io | Failure::Full) => {
                hbm.errors += 1;
                let gives_up = hbm.errors >= ERRORS_MAX;
                if gives_up {
                    hbm.errors = 0;
                    hbm.not_before = backoff(now, first, hbm.attempts);
                    hbm.attempts += 1;
                }
                self.counters.hbm_errors += 1;
                if gives_up {
                    self.give_hbm_up();
                }
            }
        }
    }

    /// Whatever lies there counts no more: nobody knows in what state the device is.
    fn give_hbm_up(&mut self) {
        let places = 0..self.hbm_mut().segments.len() as u32;
        for place in places {
            let segment = self.hbm_mut().segments[place as usize].as_ref();
            if segment.is_some_and(|segment| segment.state == HbmSegmentState::Active) {
                self.drain_hbm(place);
            }
        }
    }

    /// Drops the copy of a block in device memory, if there is one.
    pub(super) fn drop_hbm(&mut self, block: u32) {
        if mutant_is!(self, HbmForgetsNothing) {
            return;
        }
        if let Some(hbm) = &mut self.hbm
            && hbm.detach(block)
        {
            self.close_drained_hbm();
        }
    }

    /// Slots of device memory of a domain in which something was written that is not the copy of a block now.
    pub(super) fn hbm_residues(&self, domain: TrustDomain) -> Vec<Residue> {
        let Some(hbm) = self.hbm.as_ref().filter(|_| !mutant_is!(self, DestroySkipsHbm)) else {
            return Vec::new();
        };
        let mut residues = Vec::new();
        for (place, segment) in (0..).zip(&hbm.segments) {
            let Some(segment) = segment.as_ref().filter(|segment| segment.shape.0 == domain) else {
                continue;
            };
            let dirty = (0..)
                .zip(&segment.slots)
                .filter(|(_, slot)| slot.is_dirty && slot.state != HbmSlotState::Block);
            residues.extend(dirty.map(|(slot, _)| Residue {
                place,
                segment: segment.id,
                slot,
                bytes: segment.shape.1,
            }));
        }
        residues
    }

    /// What became of residues: those that are free are zeroed now. `over`: who holds a slot is not waited for any more; `hung`: nor
    /// is the device.
    pub(super) fn look_at_residues(&mut self, residues: Vec<Residue>, over: bool, hung: bool) -> Looked {
        let mut looked = Looked::default();
        let mut free: Vec<u32> = Vec::new();
        for residue in residues {
            let hbm = self.hbm_mut();
            let segment = hbm.segments[residue.place as usize].as_ref();
            // One that was closed was zeroed with that.
            let segment = segment.filter(|segment| segment.id == residue.segment);
            let state = segment.map(|segment| (segment.state, segment.slots[residue.slot as usize]));
            match state {
                None => looked.is_gone(&residue),
                Some((HbmSegmentState::Active, slot)) => match slot.state {
                    HbmSlotState::Block => {}
                    HbmSlotState::Free if slot.is_dirty => {
                        free.push(residue.place);
                        looked.waiting.push(residue);
                    }
                    HbmSlotState::Free => looked.is_gone(&residue),
                    HbmSlotState::Zeroing if !hung => looked.waiting.push(residue),
                    HbmSlotState::Orphan | HbmSlotState::Filling if !over => looked.waiting.push(residue),
                    HbmSlotState::Zeroing | HbmSlotState::Orphan | HbmSlotState::Filling => looked.left += 1,
                },
                Some(_) if !over => looked.waiting.push(residue),
                Some(_) => looked.left += 1,
            }
        }
        free.dedup();
        looked.asked = !free.is_empty();
        for place in free {
            self.zero_hbm_slots(place);
        }
        looked
    }

    fn zero_hbm_slots(&mut self, place: u32) {
        let hbm = self.hbm_mut();
        let slots = hbm.begin_zeroing(place);
        if slots.is_empty() {
            return;
        }
        let (segment, slot_bytes) = (hbm.segment(place).id, hbm.slot_bytes(place));
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for &slot in &slots {
            let start = u64::from(slot) * slot_bytes;
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = start + slot_bytes,
                _ => ranges.push(start..start + slot_bytes),
            }
        }
        let operation = self.issue(Operation::ZeroHbm { segment: place, slots });
        self.actions.push_back(Action::ZeroSegment {
            operation,
            tier: Tier::Hbm,
            segment,
            ranges,
        });
    }

    pub(super) fn hbm_zeroed(&mut self, place: u32, slots: &[u32], outcome: Result<Completion, Failure>) {
        self.hbm_mut().zeroed(place, slots, outcome.is_ok());
        if outcome.is_err() {
            // It is not tried again: the whole segment goes, which is zeroed with that.
            self.counters.hbm_errors += 1;
            if self.hbm_mut().segment(place).state == HbmSegmentState::Active {
                self.drain_hbm(place);
            }
        }
        self.close_drained_hbm();
    }
}
