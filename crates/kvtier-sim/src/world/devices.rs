//! Devices: they carry out actions in their own time, or fail to.

use std::time::Duration;

use kvtier_core::{Action, Completion, Event, Extent, Failure, OperationId, RecordLabel, SegmentId, Tier};

use super::{Happening, World};
use crate::counts::Fault;
use crate::memory::{CutShort, Reach, Record, Tag};
use crate::oracle::{Check, Key, found};
use crate::random::Random;

/// What a device makes of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Done and reported.
    Done,
    /// Refused before anything was done.
    Refused(Failure),
    /// Half done, then an error.
    Halfway,
    /// Half done and reported as done.
    Torn,
    /// Never reported, and perhaps never done.
    Lost {
        /// It was done.
        done: bool,
    },
    /// Done in time, reported after the tier was reset.
    Late,
}

/// An action that awaits its event.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) action: Action,
    /// Its tier was reset: it touches nothing any more, whatever is still reported of it.
    pub(super) cancelled: bool,
}

/// Extents that an action reads and writes, by tier.
struct Touched {
    reads: Option<(Tier, Extent)>,
    writes: Option<(Tier, Extent)>,
}

fn touched(action: &Action) -> Touched {
    match action {
        Action::Demote { source, target, .. } => Touched {
            reads: Some((Tier::Host, *source)),
            writes: Some((Tier::Nvme, *target)),
        },
        Action::PromoteToHbm { source, target, .. } => Touched {
            reads: Some((Tier::Host, *source)),
            writes: Some((Tier::Hbm, *target)),
        },
        Action::Promote { source, target, .. } => Touched {
            reads: Some((Tier::Nvme, *source)),
            writes: Some((Tier::Host, *target)),
        },
        Action::Relocate { source, target, .. } => Touched {
            reads: Some((Tier::Nvme, *source)),
            writes: Some((Tier::Nvme, *target)),
        },
        _ => Touched {
            reads: None,
            writes: None,
        },
    }
}

fn operation_of(action: &Action) -> Option<OperationId> {
    match action {
        Action::OpenSegment { operation, .. }
        | Action::CloseSegment { operation, .. }
        | Action::SealSegment { operation, .. }
        | Action::Demote { operation, .. }
        | Action::Promote { operation, .. }
        | Action::Relocate { operation, .. }
        | Action::SyncTier { operation, .. }
        | Action::ResetTier { operation, .. }
        | Action::PromoteToHbm { operation, .. }
        | Action::ZeroSegment { operation, .. }
        | Action::EraseRecords { operation, .. }
        | Action::RecordGeneration { operation, .. } => Some(*operation),
        Action::ForgetRecord { .. }
        | Action::FetchDone { .. }
        | Action::ReserveDone { .. }
        | Action::Invalidated { .. }
        | Action::Destroyed { .. }
        | Action::Forgotten { .. }
        | Action::Flushed { .. } => None,
    }
}

/// Whether a reset of the NVMe tier ends it.
fn is_nvme(action: &Action) -> bool {
    match action {
        Action::OpenSegment { tier, .. } | Action::CloseSegment { tier, .. } | Action::SyncTier { tier, .. } => {
            *tier == Tier::Nvme
        }
        Action::SealSegment { .. }
        | Action::EraseRecords { .. }
        | Action::Demote { .. }
        | Action::Promote { .. }
        | Action::Relocate { .. } => true,
        _ => false,
    }
}

/// Parents and tokens may differ: a restart may know less of them than the run before.
fn same_block(one: &RecordLabel, other: &RecordLabel) -> bool {
    let name = |label: &RecordLabel| (label.namespace, label.generation, label.realization, label.hash);
    name(one) == name(other)
}

impl World {
    pub(super) fn memory(&mut self, tier: Tier) -> &mut crate::memory::Memory {
        match tier {
            Tier::Hbm => &mut self.hbm,
            Tier::Host => &mut self.host,
            Tier::Nvme => &mut self.nvme,
            Tier::Remote => unreachable!("no segments of ours lie there"),
        }
    }

    /// Takes an action on: from here until its answer the device may touch what it names.
    pub(super) fn start(&mut self, action: Action) -> Check {
        let Some(operation) = operation_of(&action) else {
            if let Action::ForgetRecord { target } = action {
                self.forget_record(&target);
            }
            return Ok(());
        };
        if self.flights.contains_key(&operation) {
            return found(format!("{operation:?} is used for a second action"));
        }
        self.check_start(&action)?;
        let touched = touched(&action);
        if let Some((tier, extent)) = touched.reads {
            self.memory(tier).begin_read(&extent)?;
        }
        if let Some((tier, extent)) = touched.writes {
            self.memory(tier).begin_write(&extent, operation.0 | DEVICE)?;
        }
        let fate = self.fate(&action);
        let mut delay_ns = self.delay(&action);
        if let Some(key) = self.purged_meanwhile(&action) {
            self.tally.fault(Fault::PurgedMeanwhile);
            delay_ns *= 8;
            let soon = self.random.below(self.plan.device_ns);
            self.after(soon, Happening::Purge(key));
        }
        self.flights.insert(
            operation,
            Flight {
                action,
                cancelled: false,
            },
        );
        self.check_bounds()?;
        self.after(delay_ns, Happening::Execute(operation, fate));
        Ok(())
    }

    /// A block whose move takes long enough for a purge to come in between.
    fn purged_meanwhile(&mut self, action: &Action) -> Option<Key> {
        let (key, permille) = match action {
            Action::Promote { label, .. } => (self.key_of(label)?, 200),
            Action::Relocate { label, .. } => (self.key_of(label)?, 500),
            Action::PromoteToHbm { source, .. } => (self.ledger.written(self.host.content(source)?)?.key, 300),
            _ => return None,
        };
        (self.plan.anchored && self.strikes(permille)).then_some(key)
    }

    fn check_start(&mut self, action: &Action) -> Check {
        match action {
            Action::OpenSegment {
                tier,
                segment,
                bytes,
                domain,
                ..
            } => {
                if (*tier == Tier::Nvme) == domain.is_some() {
                    return found(format!("{tier:?} segment {segment:?} belongs to {domain:?}"));
                }
                self.memory(*tier).begin_open(*segment, *bytes, *domain)?;
                let (budget, used) = match tier {
                    Tier::Hbm => (self.plan.settings.hbm_bytes, self.hbm.bytes()),
                    Tier::Host => (self.plan.settings.host_bytes, self.host.bytes()),
                    Tier::Nvme => (self.plan.settings.nvme_bytes, self.nvme.bytes()),
                    Tier::Remote => return found(format!("segment {segment:?} of another node")),
                };
                if used > budget {
                    return found(format!("{tier:?} segments take {used} of {budget} bytes"));
                }
            }
            Action::CloseSegment { tier, segment, .. } => {
                if *tier == Tier::Nvme {
                    self.check_covered_elsewhere(*segment)?;
                }
                self.memory(*tier).begin_close(*segment)?;
            }
            Action::SealSegment { segment, .. } => {
                let writes = |flight: &Flight| match touched(&flight.action).writes {
                    Some((Tier::Nvme, target)) => target.segment == *segment,
                    _ => false,
                };
                if let Some((operation, _)) = self.flights.iter().find(|(_, flight)| writes(flight)) {
                    return found(format!("{segment:?} is sealed while {operation:?} writes into it"));
                }
                if let Some(segment) = self.nvme.segments.get_mut(segment) {
                    segment.sealed = true;
                }
            }
            Action::Demote {
                source, target, label, ..
            } => {
                let tag = self.host.content(source);
                let written = tag.and_then(|tag| self.ledger.written(tag)).copied();
                let key = self.key_of(label);
                if written.is_none_or(|written| {
                    Some(written.key) != key
                        || !written.published
                        || written.generation != label.generation
                        || written.length != source.length
                }) {
                    return found(format!(
                        "a demotion of {key:?} {label:?} reads {source:?}, which holds {written:?}"
                    ));
                }
                let recorded = key.map(|key| self.spaces[key.space as usize].recorded);
                if recorded.is_none_or(|recorded| recorded < label.generation) {
                    return found(format!("{key:?} {label:?} is written, on record is {recorded:?}"));
                }
                if let Some(tag) = tag {
                    // It was evicted from NVMe since whatever flush wrote it.
                    self.ledger.uncover(tag);
                }
                self.check_target(target, source.length)?;
            }
            Action::Promote { source, target, .. } if source.length != target.length => {
                return found(format!("a promotion of {source:?} goes to {target:?}"));
            }
            Action::Relocate { source, target, .. } => self.check_target(target, source.length)?,
            Action::PromoteToHbm {
                source,
                target,
                checksum,
                ..
            } => {
                let tag = self.host.content(source);
                let written = tag.and_then(|tag| self.ledger.written(tag));
                if written.is_none_or(|written| !written.published || written.length != source.length)
                    || source.length != target.length
                    || checksum.is_some_and(|checksum| checksum != self.host.checksum(source))
                    || self.host.domain(source) != self.hbm.domain(target)
                {
                    return found(format!(
                        "{source:?}, which holds {written:?}, goes to device memory at {target:?}"
                    ));
                }
            }
            Action::ZeroSegment {
                tier, segment, ranges, ..
            } => {
                for range in ranges {
                    self.memory(*tier).check_unheld(*segment, range.clone())?;
                }
            }
            Action::EraseRecords { segment, .. }
                if !self.nvme.segments.get(segment).is_some_and(|segment| segment.sealed) =>
            {
                return found(format!(
                    "records of {segment:?} are erased, which takes records or is gone"
                ));
            }
            _ => {}
        }
        Ok(())
    }

    /// What a flush made durable and is only on NVMe is durable elsewhere before its segment goes.
    fn check_covered_elsewhere(&mut self, closing: SegmentId) -> Check {
        let Some(segment) = self.nvme.segments.get(&closing) else {
            return Ok(());
        };
        let tags: Vec<Tag> = segment
            .records
            .values()
            .filter(|record| self.ledger.is_covered(record.tag))
            .map(|record| record.tag)
            .collect();
        for tag in tags {
            let elsewhere = self
                .nvme
                .segments
                .iter()
                .filter(|(id, segment)| **id != closing && segment.open && !segment.closing)
                .flat_map(|(_, segment)| segment.records.values())
                .any(|record| record.tag == tag && record.is_synced());
            let key = self.ledger.written(tag).map(|written| written.key);
            let Some(key) = key.filter(|key| !elsewhere && self.ledger.live(*key) == Some(tag)) else {
                continue;
            };
            if self.tier_of(key)? == Some(Tier::Nvme) {
                return found(format!(
                    "{closing:?} is closed, which holds the only copy of {key:?} that survives a power cut"
                ));
            }
        }
        Ok(())
    }

    /// A record lies behind its segment's header and leaves room for its index.
    fn check_target(&self, target: &Extent, length: u32) -> Check {
        let settings = &self.plan.settings;
        let Some(segment) = self.nvme.segments.get(&target.segment) else {
            return found(format!("a record goes to {target:?}, whose segment is not open"));
        };
        let end = target.offset + u64::from(length).next_multiple_of(crate::memory::PAGE_BYTES);
        let index = (segment.records.len() as u64 + 1) * settings.nvme_record_index_bytes;
        if target.length != length || target.offset < settings.nvme_segment_header_bytes || end + index > segment.bytes
        {
            return found(format!(
                "a record of {length} bytes goes to {target:?} in a segment of {} bytes with {} records",
                segment.bytes,
                segment.records.len()
            ));
        }
        if segment.records.contains_key(&target.offset) {
            return found(format!("{target:?} was written before"));
        }
        Ok(())
    }

    fn check_bounds(&self) -> Check {
        let count = |kind: fn(&Action) -> bool| self.flights.values().filter(|flight| kind(&flight.action)).count();
        let settings = &self.plan.settings;
        let moves = count(|action| matches!(action, Action::Demote { .. } | Action::Relocate { .. }));
        if moves > settings.demotions_in_flight_max {
            return found(format!(
                "{moves} demotions and relocations are in flight, the bound is {}",
                settings.demotions_in_flight_max
            ));
        }
        let copies = count(|action| matches!(action, Action::PromoteToHbm { .. }));
        if copies > settings.hbm_promotions_in_flight_max {
            return found(format!(
                "{copies} copies to device memory are in flight, the bound is {}",
                settings.hbm_promotions_in_flight_max
            ));
        }
        let promotions = count(|action| matches!(action, Action::Promote { .. }));
        if promotions > settings.promotions_in_flight_max {
            return found(format!(
                "{promotions} promotions are in flight, the bound is {}",
                settings.promotions_in_flight_max
            ));
        }
        Ok(())
    }

    fn delay(&mut self, action: &Action) -> u64 {
        let mean = match action {
            Action::OpenSegment { tier: Tier::Host, .. } | Action::CloseSegment { tier: Tier::Host, .. } => {
                self.plan.device_ns / 10
            }
            _ => self.plan.device_ns,
        };
        let delay = 1 + self.random.exponential(mean);
        if self.strikes(self.plan.rates.slow) {
            self.tally.fault(Fault::Slow);
            return delay * 20;
        }
        delay
    }

    fn fate(&mut self, action: &Action) -> Fate {
        if !self.faults_on {
            return Fate::Done;
        }
        let rates = self.plan.rates;
        let writes = matches!(action, Action::Demote { .. } | Action::Relocate { .. });
        let opens = matches!(action, Action::OpenSegment { .. });
        if (writes || opens) && self.random.chance(rates.full) {
            self.tally.fault(Fault::Full);
            return Fate::Refused(Failure::Full);
        }
        if self.random.chance(rates.busy) {
            self.tally.fault(Fault::Busy);
            return Fate::Refused(Failure::Busy);
        }
        if self.random.chance(rates.io) {
            if self.random.chance(500) {
                self.tally.fault(Fault::Io);
                return Fate::Refused(Failure::Io);
            }
            self.tally.fault(Fault::IoHalfway);
            return Fate::Halfway;
        }
        let to_device = matches!(action, Action::PromoteToHbm { .. });
        if to_device && self.random.chance(rates.flip) {
            self.tally.fault(Fault::BitFlip);
            return Fate::Refused(Failure::Corrupt);
        }
        if to_device && self.random.chance(rates.torn) {
            self.tally.fault(Fault::TornWrite);
            return Fate::Torn;
        }
        if !is_nvme(action) {
            return Fate::Done;
        }
        if self.random.chance(rates.deadline) {
            self.tally.fault(Fault::Deadline);
            return Fate::Refused(Failure::Deadline);
        }
        if writes && self.random.chance(rates.torn) {
            self.tally.fault(Fault::TornWrite);
            return Fate::Torn;
        }
        if self.random.chance(rates.lost) {
            self.tally.fault(Fault::Lost);
            return Fate::Lost {
                done: self.random.chance(500),
            };
        }
        if self.random.chance(rates.late) {
            self.tally.fault(Fault::Late);
            return Fate::Late;
        }
        Fate::Done
    }

    /// The device gets to it.
    pub(super) fn execute(&mut self, operation: OperationId, fate: Fate) -> Check {
        let Some(flight) = self.flights.get(&operation) else {
            return Ok(());
        };
        let cancelled = flight.cancelled;
        let action = flight.action.clone();
        let outcome = match fate {
            _ if cancelled => {
                self.not_opened(&action);
                Err(Failure::Io)
            }
            Fate::Refused(failure) => {
                self.not_opened(&action);
                Err(failure)
            }
            Fate::Lost { done: false } => return Ok(()),
            Fate::Halfway => {
                // Whatever it came to, the device says that it failed.
                self.carry_out(&action, operation, true)?.ok();
                self.unrecord(&action);
                Err(Failure::Io)
            }
            Fate::Torn => {
                let outcome = self.carry_out(&action, operation, true)?;
                self.damage(&action);
                outcome
            }
            Fate::Done | Fate::Late | Fate::Lost { done: true } => self.carry_out(&action, operation, false)?,
        };
        let event = Event { operation, outcome };
        match fate {
            Fate::Lost { .. } => return Ok(()),
            Fate::Late => {
                let deadline = self.plan.settings.operation_deadline.as_nanos() as u64;
                let delay_ns = deadline + self.random.below(deadline * 2);
                self.after(delay_ns, Happening::Deliver(event));
            }
            _ => {
                let delay_ns = self.random.exponential(self.plan.device_ns / 4);
                self.after(delay_ns, Happening::Deliver(event));
            }
        }
        if self.strikes(self.plan.rates.duplicate) {
            self.tally.fault(Fault::Duplicate);
            let delay_ns = self.random.exponential(self.plan.device_ns * 4);
            self.after(delay_ns, Happening::Deliver(event));
        }
        if self.strikes(self.plan.rates.unknown) {
            self.tally.fault(Fault::Unknown);
            let unknown = OperationId(operation.0 ^ (1 << self.random.between(20, 63)));
            self.after(
                0,
                Happening::Deliver(Event {
                    operation: unknown,
                    outcome: event.outcome,
                }),
            );
        }
        Ok(())
    }

    /// A segment that could not be opened is not there.
    fn not_opened(&mut self, action: &Action) {
        if let Action::OpenSegment { tier, segment, .. } = action {
            let segment = *segment;
            self.memory(*tier).segments.remove(&segment);
        }
    }

    fn carry_out(
        &mut self,
        action: &Action,
        operation: OperationId,
        half: bool,
    ) -> Result<Result<Completion, Failure>, crate::oracle::Finding> {
        let done = Ok(Ok(Completion::Done));
        match action {
            Action::OpenSegment { tier, segment, .. } => {
                let (tier, segment) = (*tier, *segment);
                if half {
                    self.memory(tier).segments.remove(&segment);
                } else if let Some(segment) = self.memory(tier).segments.get_mut(&segment) {
                    segment.open = true;
                }
            }
            Action::CloseSegment { tier, segment, .. } => {
                let (tier, segment) = (*tier, *segment);
                self.memory(tier).begin_close(segment)?;
                if !half {
                    self.memory(tier).segments.remove(&segment);
                }
            }
            Action::Demote {
                source, target, label, ..
            } => {
                let checksum = self.host.checksum(source);
                let image = self.host.image(source)?;
                let tag = self.host.content(source).unwrap_or(0);
                let pages = if half { image.len() / 2 } else { image.len() };
                self.nvme.copy_from(target, operation.0 | DEVICE, &image, pages)?;
                self.record(target, operation, label, checksum, tag, half);
                return Ok(Ok(Completion::Written { checksum }));
            }
            Action::Promote {
                source,
                target,
                checksum,
                label,
                ..
            } => {
                let image = self.nvme.image(source)?;
                let pages = if half { image.len() / 2 } else { image.len() };
                let holder = operation.0 | DEVICE;
                if let Err(failure) = self.check_record(source, *checksum, label)? {
                    self.host.write(target, holder, 0, 0..image.len())?;
                    return Ok(Err(failure));
                }
                self.host.copy_from(target, holder, &image, pages)?;
            }
            Action::Relocate {
                source,
                target,
                checksum,
                label,
                ..
            } => {
                let image = self.nvme.image(source)?;
                if let Err(failure) = self.check_record(source, *checksum, label)? {
                    return Ok(Err(failure));
                }
                let tag = self.record_at(source).map_or(0, |record| record.tag);
                let pages = if half { image.len() / 2 } else { image.len() };
                self.nvme.copy_from(target, operation.0 | DEVICE, &image, pages)?;
                self.record(target, operation, label, *checksum, tag, half);
            }
            Action::SyncTier { .. } if !half => {
                self.sync_records();
            }
            Action::SealSegment { segment, .. } if !half => self.write_index(*segment),
            Action::ResetTier { .. } if !half => {
                // Cancelled: from here on no operation in flight touches memory.
                for flight in self.flights.values_mut().filter(|flight| is_nvme(&flight.action)) {
                    flight.cancelled = true;
                }
            }
            Action::RecordGeneration {
                namespace, generation, ..
            } => {
                self.record_generation(*namespace, *generation);
                if !half {
                    self.note_in_anchor(*namespace, *generation);
                }
            }
            Action::PromoteToHbm { source, target, .. } => {
                let checksum = self.host.checksum(source);
                let image = self.host.image(source)?;
                let pages = if half { image.len() / 2 } else { image.len() };
                self.hbm.copy_from(target, operation.0 | DEVICE, &image, pages)?;
                if half {
                    // It is read back, and is not what was written.
                    return Ok(Err(Failure::Io));
                }
                return Ok(Ok(Completion::Written { checksum }));
            }
            Action::ZeroSegment {
                tier, segment, ranges, ..
            } if !half => {
                for range in ranges {
                    self.memory(*tier).check_unheld(*segment, range.clone())?;
                    self.memory(*tier).zero(*segment, range.clone());
                }
            }
            Action::EraseRecords {
                segment,
                pages,
                namespace,
                keep,
                ..
            } => {
                if half {
                    let mut random = Random::new(self.random.next_u64());
                    let cut_short = CutShort {
                        random: &mut random,
                        index_may_lag: false,
                    };
                    self.nvme
                        .erase(*segment, pages.clone(), *namespace, keep, Some(cut_short))?;
                    return done;
                }
                let (records, bytes) = self.nvme.erase(*segment, pages.clone(), *namespace, keep, None)?;
                return Ok(Ok(Completion::Erased { records, bytes }));
            }
            _ => {}
        }
        done
    }

    fn record(
        &mut self,
        target: &Extent,
        operation: OperationId,
        label: &RecordLabel,
        checksum: u32,
        tag: Tag,
        damaged: bool,
    ) {
        let record = Record {
            label: *label,
            length: target.length,
            checksum,
            damaged,
            tag,
            operation,
            at: self.now,
            payload: Reach::System,
            entry: Reach::Process,
            forgotten: None,
            was_forgotten: false,
        };
        if let Some(segment) = self.nvme.segments.get_mut(&target.segment) {
            segment.records.insert(target.offset, record);
        }
    }

    /// The index of a segment goes to the system.
    pub(super) fn write_index(&mut self, segment: SegmentId) {
        let Some(segment) = self.nvme.segments.get_mut(&segment) else {
            return;
        };
        for record in segment.records.values_mut() {
            record.entry = record.entry.max(Reach::System);
            if let Some((_, reach)) = &mut record.forgotten {
                *reach = (*reach).max(Reach::System);
            }
        }
    }

    /// A record is not to come back. One that is not there needs no forgetting.
    fn forget_record(&mut self, target: &Extent) {
        let record = self
            .nvme
            .segments
            .get_mut(&target.segment)
            .and_then(|segment| segment.records.get_mut(&target.offset));
        if let Some(record) = record.filter(|record| record.length == target.length && record.forgotten.is_none()) {
            record.forgotten = Some((self.now, Reach::Process));
        }
    }

    fn record_at(&self, extent: &Extent) -> Option<&Record> {
        self.nvme.segments.get(&extent.segment)?.records.get(&extent.offset)
    }

    /// A write that was reported as failed left no record that anybody may count on.
    fn unrecord(&mut self, action: &Action) {
        if let Action::Demote { target, .. } | Action::Relocate { target, .. } = action
            && let Some(segment) = self.nvme.segments.get_mut(&target.segment)
        {
            segment.records.remove(&target.offset);
        }
    }

    /// Reads a record back as the storage does. What fails without a fault of the world's making, the manager got wrong.
    fn check_record(
        &self,
        source: &Extent,
        checksum: u32,
        label: &RecordLabel,
    ) -> Result<Result<(), Failure>, crate::oracle::Finding> {
        let record = self.record_at(source);
        let Some(record) = record else {
            return found(format!(
                "nothing was ever written at {source:?}, which is read for {label:?}"
            ));
        };
        let same = same_block(&record.label, label);
        if same && record.checksum == checksum && self.nvme.checksum(source) == checksum {
            return Ok(Ok(()));
        }
        if record.damaged && same {
            return Ok(Err(Failure::Corrupt));
        }
        found(format!(
            "{source:?} is read for {label:?} with checksum {checksum:#x}, but holds {record:?}"
        ))
    }

    fn damage(&mut self, action: &Action) {
        if let Action::Demote { target, .. } | Action::Relocate { target, .. } = action {
            let record = self
                .nvme
                .segments
                .get_mut(&target.segment)
                .and_then(|segment| segment.records.get_mut(&target.offset));
            if let Some(record) = record {
                record.damaged = true;
            }
        }
    }

    /// An answer arrives: what its operation held is free, once.
    pub(super) fn landed(&mut self, event: &Event) {
        let Some(flight) = self.flights.remove(&event.operation) else {
            return;
        };
        if let (Err(Failure::Corrupt), Action::PromoteToHbm { source, .. }) = (event.outcome, &flight.action)
            && let Some(written) = self.host.content(source).and_then(|tag| self.ledger.written(tag))
        {
            // Its block is forgotten.
            let key = written.key;
            self.ledger.unlink(key);
        }
        self.release_flight(&flight.action);
        if let (Err(_), Action::Promote { label, .. } | Action::Relocate { label, .. }) =
            (event.outcome, &flight.action)
            && let Some(key) = self.key_of(label)
        {
            self.ledger.unlink(key);
        }
        if let (Ok(_), Action::ResetTier { .. }) = (event.outcome, &flight.action) {
            self.reset_done();
        }
    }

    fn release_flight(&mut self, action: &Action) {
        let touched = touched(action);
        if let Some((tier, extent)) = touched.reads {
            self.memory(tier).end_read(&extent);
        }
        if let Some((tier, extent)) = touched.writes {
            self.memory(tier).end_write(&extent);
        }
    }

    /// The reset is over: every operation that was in flight when the device stopped has failed.
    fn reset_done(&mut self) {
        self.ledger.unlink_all();
        let failed: Vec<OperationId> = self
            .flights
            .iter()
            .filter(|(_, flight)| flight.cancelled)
            .map(|(operation, _)| *operation)
            .collect();
        for operation in failed {
            let Some(flight) = self.flights.remove(&operation) else {
                continue;
            };
            self.release_flight(&flight.action);
            // A segment half opened or half closed is cleared away by the driver.
            if let Action::OpenSegment {
                tier: Tier::Nvme,
                segment,
                ..
            } = flight.action
            {
                self.nvme.segments.remove(&segment);
            }
        }
    }

    /// A bit flips in some record at rest.
    pub(super) fn flip_a_bit(&mut self) {
        let records: Vec<(SegmentId, u64)> = self
            .nvme
            .segments
            .iter()
            .flat_map(|(id, segment)| segment.records.keys().map(|offset| (*id, *offset)))
            .collect();
        if !records.is_empty() {
            let (segment, offset) = records[self.random.index(records.len())];
            self.tally.fault(Fault::BitFlip);
            self.note(|| format!("a bit flips in {segment:?} at {offset}"));
            self.nvme.flip(segment, offset);
        }
    }

    /// Longest that anything may take once faults have stopped.
    pub(super) fn patience(&self) -> Duration {
        let settings = &self.plan.settings;
        settings.operation_deadline * 6
            + settings.tier_retry_backoff * 200
            + (settings.lease_ttl + settings.reservation_ttl) * 4
            + Duration::from_millis(1_500)
    }
}

/// Tells an operation's holder id from a client's slot.
const DEVICE: u64 = 1 << 63;
