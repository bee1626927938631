use super::hbm::Residue;
use super::operation::Operation;
use super::{TierManager, mutant_is};
use crate::host_table::{HostSegmentState, PAGE, SlotState, pages};
use crate::index::flag;
use crate::nvme_table::NvmeSegmentState;
use crate::{Action, Completion, Failure, NamespaceId, OperationId, PurgeEvidence, SegmentId, Tier, Time, TrustDomain};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

/// Pages of an NVMe segment that one action overwrites at most: 64 MiB.
const PAGES_AT_ONCE: u32 = 16 << 10;
/// Slots of a host segment that one step zeroes.
const SLOTS_AT_ONCE: u32 = 1024;
/// Records of an NVMe segment that one step looks at.
const RECORDS_AT_ONCE: usize = 2048;
/// Between two such steps.
const STEP_PAUSE: Duration = Duration::from_micros(500);
/// Refusals and errors in a row after which a part of a segment is left as it is, and said to be.
const ATTEMPTS_MAX: u32 = 10;
/// First pause after an error.
const PAUSE: Duration = Duration::from_millis(5);

/// What an earlier generation, or deleted blocks, left in memory and on NVMe is being destroyed.
#[derive(Debug)]
pub(super) struct Destruction {
    operation: OperationId,
    namespace: NamespaceId,
    domain: TrustDomain,
    grace: Duration,
    /// Slots that somebody still holds are given up on after this.
    grace_until: Time,
    phase: Phase,
    not_before: Time,
    evidence: PurgeEvidence,
    /// Reported before it was done (a planted bug).
    #[cfg(feature = "mutants")]
    reported: bool,
}

#[derive(Debug)]
enum Phase {
    /// Waits for older blocks to be forgotten.
    Sweep,
    /// Waits for moves that were issued before this.
    Moves(OperationId),
    /// Host segments to zero, one after another, and from which slot on.
    Host(Vec<(u32, SegmentId, u32)>),
    /// Waits for slots that were held when their segment was zeroed.
    Held,
    /// Slots of device memory in which earlier copies may lie: to be zeroed, or waited for.
    Hbm(Vec<Residue>),
    Nvme(VecDeque<Part>, Gathered),
}

/// Where the namespace's cached blocks lie in a segment, as far as its records were looked at.
#[derive(Clone, Debug, Default)]
struct Gathered {
    /// `None`: of no segment yet.
    segment: Option<SegmentId>,
    records: usize,
    kept: Vec<Range<u32>>,
}

/// A part of an NVMe segment to overwrite.
#[derive(Clone, Debug)]
struct Part {
    place: u32,
    segment: SegmentId,
    pages: Range<u32>,
    attempts: u32,
    in_flight: bool,
}

impl TierManager {
    /// Destroys what blocks of a namespace that are not cached any more left behind: memory is zeroed, records on NVMe are
    /// overwritten. [`Action::Destroyed`] follows, with what was done. Destructions run one after another.
    ///
    /// Slots that a client holds are zeroed when they come free; those held for longer than `grace` are counted as left.
    ///
    /// # Panics
    /// Where the namespace was never opened.
    pub fn destroy(&mut self, namespace: NamespaceId, grace: Duration, now: Time) -> OperationId {
        self.advance(now);
        let operation = self.take_operation_id();
        let entry = self.namespaces.entry(namespace);
        let domain = entry.expect("a namespace that was opened").domain;
        self.destructions.push_back(Destruction {
            operation,
            namespace,
            domain,
            grace,
            grace_until: self.now,
            phase: Phase::Sweep,
            not_before: Time::ZERO,
            evidence: PurgeEvidence::default(),
            #[cfg(feature = "mutants")]
            reported: false,
        });
        self.pump();
        operation
    }

    /// When the destruction in progress may go on, if only time holds it up.
    pub(super) fn destruction_due(&self) -> Option<Time> {
        let destruction = self.destructions.front()?;
        let at = match &destruction.phase {
            Phase::Held => destruction.grace_until,
            // Who holds slots has until the grace is over, a device that zeroes them until the deadline of its operation.
            Phase::Hbm(_) if destruction.grace_until <= self.now => destruction.not_before,
            Phase::Hbm(_) => destruction.grace_until,
            Phase::Nvme(..) => destruction.not_before,
            Phase::Sweep | Phase::Moves(_) | Phase::Host(_) => return None,
        };
        (at > self.now).then_some(at)
    }

    /// Moves the destruction at the front on. True where something changed that others may wait for.
    pub(super) fn pump_destruction(&mut self) -> bool {
        let mut moved = false;
        while let Some(destruction) = self.destructions.front() {
            let step = match &destruction.phase {
                Phase::Sweep => self.await_sweep(),
                Phase::Moves(before) => self.await_moves(*before),
                Phase::Host(_) => self.zero_next_segment(),
                Phase::Held => self.await_held(),
                Phase::Hbm(_) => self.await_hbm(),
                Phase::Nvme(..) => self.erase_next_part(),
            };
            if !step {
                break;
            }
            moved = true;
        }
        moved
    }

    fn enter(&mut self, phase: Phase) -> bool {
        self.destruction_mut().phase = phase;
        true
    }

    fn destruction_mut(&mut self) -> &mut Destruction {
        self.destructions.front_mut().expect("the destruction in progress")
    }

    fn await_sweep(&mut self) -> bool {
        if self.sweep.due().is_some() {
            return false;
        }
        let before = self.take_operation_id();
        self.enter(Phase::Moves(before))
    }

    /// A move that was under way may still bring older bytes somewhere.
    fn await_moves(&mut self, before: OperationId) -> bool {
        let moves = |operation: &Operation| {
            matches!(
                operation,
                Operation::Demote(_) | Operation::Promote { .. } | Operation::Relocate(_)
            )
        };
        let is_moving = self
            .operations
            .range(..before)
            .any(|(_, issued)| moves(&issued.operation));
        if is_moving && !mutant_is!(self, DestroySkipsMoves) {
            return false;
        }
        let domain = self.destruction_mut().domain;
        let segments = (0..)
            .zip(&self.host.segments)
            .filter_map(|(place, segment)| segment.as_ref().map(|segment| (place, segment)))
            .filter(|(_, segment)| self.host.group(segment.group).domain == domain)
            .map(|(place, segment)| (place, segment.id, 0))
            .collect();
        self.enter(Phase::Host(segments))
    }

    fn zero_next_segment(&mut self) -> bool {
        let now = self.now;
        if self.host.zeroing > 0 {
            return false;
        }
        let destruction = self.destructions.front().expect("the destruction in progress");
        let Phase::Host(segments) = &destruction.phase else {
            return false;
        };
        let Some(&(place, id, from)) = segments.last() else {
            let until = now.after(destruction.grace);
            self.destruction_mut().grace_until = until;
            return self.enter(Phase::Held);
        };
        let segment = self.host.segments[place as usize].as_ref();
        let segment = segment.filter(|segment| segment.id == id);
        let (state, count) = (
            segment.map(|segment| segment.state),
            segment.map_or(0, |segment| segment.slots.len() as u32),
        );
        if state == Some(HostSegmentState::Closing) {
            // Its memory is zeroed and given back; not yet.
            return false;
        }
        // Nothing was ever in one that is being opened.
        let is_used = state.is_some_and(|state| state != HostSegmentState::Opening);
        let until = count.min(from.saturating_add(SLOTS_AT_ONCE));
        if let Phase::Host(segments) = &mut self.destruction_mut().phase {
            segments.pop();
            if is_used && until < count {
                segments.push((place, id, until));
            }
        }
        if is_used {
            self.zero_slots(place, from..until);
        }
        true
    }

    /// Zeroes what is free of these slots, and behind the blocks that stay. The rest is zeroed when it comes free.
    fn zero_slots(&mut self, place: u32, visited: Range<u32>) {
        let segment = self.host.segment(place);
        let slot_bytes = self.host.slot_bytes(place);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut slots = Vec::new();
        let memories = &segment.slots[visited.start as usize..visited.end as usize];
        for (slot, memory) in visited.zip(memories) {
            let start = u64::from(slot) * slot_bytes;
            let kept = match memory.state {
                SlotState::Free => 0,
                SlotState::Block => u64::from(self.index.entry(memory.owner).length),
                SlotState::Reserved | SlotState::Filling | SlotState::Orphan => {
                    slots.push((slot, true));
                    continue;
                }
            };
            if kept == slot_bytes {
                continue;
            }
            if memory.operations == u8::MAX {
                slots.push((slot, true));
                continue;
            }
            let range = start + kept..start + slot_bytes;
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
            slots.push((slot, false));
        }
        let mut zeroed = Vec::new();
        let forgets_held = mutant_is!(self, DestroyForgetsHeld);
        for (slot, held) in slots {
            if held {
                if forgets_held {
                    continue;
                }
                self.host.tainted.insert((place, slot));
                continue;
            }
            if self.host.slot(place, slot).state == SlotState::Free {
                self.host.withhold_slot(place, slot);
            }
            self.host.slot_mut(place, slot).operations += 1;
            zeroed.push(slot);
        }
        self.host.relink_free(place);
        self.zero(place, zeroed, ranges);
    }

    fn zero_slot(&mut self, place: u32, slot: u32, range: Range<u64>) {
        self.zero(place, vec![slot], Vec::from_iter([range]));
    }

    fn zero(&mut self, place: u32, slots: Vec<u32>, ranges: Vec<Range<u64>>) {
        if slots.is_empty() {
            return;
        }
        let bytes = ranges.iter().map(|range| range.end - range.start).sum::<u64>();
        if let Some(destruction) = self.destructions.front_mut() {
            destruction.evidence.host_slots += slots.len() as u64;
            destruction.evidence.host_bytes += bytes;
        }
        let segment = self.host.segment(place).id;
        self.host.zeroing += 1;
        let operation = self.issue(Operation::Zero { segment: place, slots });
        self.actions.push_back(Action::ZeroSegment {
            operation,
            tier: Tier::Host,
            segment,
            ranges,
        });
    }

    /// The memory is zero (the driver cannot fail at that), or will be before the answer to a second attempt.
    pub(super) fn zeroed(&mut self, place: u32, slots: &[u32], outcome: Result<Completion, Failure>) {
        self.host.zeroing -= 1;
        if outcome.is_err()
            && let Some(destruction) = self.destructions.front_mut()
        {
            destruction.evidence.host_left += slots.len() as u64;
        }
        for &slot in slots {
            self.host.slot_mut(place, slot).operations -= 1;
            let memory = self.host.slot(place, slot);
            if memory.state == SlotState::Block {
                self.unpark(memory.owner);
            }
            self.host.settle_slot(place, slot);
        }
        let group = self.host.segment(place).group;
        self.host.attend(group);
    }

    /// Zeroes slots that came free, and behind blocks that were published where nothing was yet.
    fn await_held(&mut self) -> bool {
        let mut left = 0;
        for (place, slot) in std::mem::take(&mut self.host.tainted) {
            if self.host.segments[place as usize].is_none() {
                continue;
            }
            let memory = self.host.slot(place, slot);
            let slot_bytes = self.host.slot_bytes(place);
            let start = u64::from(slot) * slot_bytes;
            match memory.state {
                SlotState::Block => {
                    let kept = u64::from(self.index.entry(memory.owner).length);
                    if memory.operations == u8::MAX {
                        self.host.tainted.insert((place, slot));
                    } else if kept < slot_bytes {
                        self.host.slot_mut(place, slot).operations += 1;
                        self.zero_slot(place, slot, start + kept..start + slot_bytes);
                    }
                }
                // It came free, and was kept from use.
                SlotState::Orphan if !memory.is_held() => {
                    self.host.slot_mut(place, slot).operations += 1;
                    self.zero_slot(place, slot, start..start + slot_bytes);
                }
                _ => {
                    self.host.tainted.insert((place, slot));
                    left += 1;
                }
            }
        }
        let now = self.now;
        let over = self.destruction_mut().grace_until <= now;
        if self.host.zeroing > 0 || (!self.host.tainted.is_empty() && !over) {
            return false;
        }
        self.destruction_mut().evidence.host_left += left;
        // They are given out again as they are.
        for (place, slot) in std::mem::take(&mut self.host.tainted) {
            self.host.settle_slot(place, slot);
        }
        let domain = self.destruction_mut().domain;
        let residues = self.hbm_residues(domain);
        self.enter(Phase::Hbm(residues))
    }

    /// Zeroes what earlier copies left in device memory. What came later is not waited for: it is written whole.
    fn await_hbm(&mut self) -> bool {
        let now = self.now;
        let deadline = now.after(self.settings.operation_deadline);
        let destruction = self.destruction_mut();
        let over = destruction.grace_until <= now;
        let hung = over && destruction.not_before > Time::ZERO && destruction.not_before <= now;
        let Phase::Hbm(residues) = &mut destruction.phase else {
            unreachable!("this phase is the one in progress")
        };
        let residues = std::mem::take(residues);
        let looked = self.look_at_residues(residues, over, hung);
        let destruction = self.destruction_mut();
        destruction.evidence.hbm_slots += looked.gone;
        destruction.evidence.hbm_bytes += looked.gone_bytes;
        destruction.evidence.hbm_left += looked.left;
        if looked.asked {
            destruction.not_before = deadline;
        }
        if !looked.waiting.is_empty() {
            destruction.phase = Phase::Hbm(looked.waiting);
            return false;
        }
        destruction.not_before = Time::ZERO;
        self.begin_erasing()
    }

    fn begin_erasing(&mut self) -> bool {
        let Some(nvme) = &mut self.nvme else {
            return self.finish_destruction();
        };
        if nvme.draining.is_some() {
            // Its records would have nowhere to go, once no open segment takes any.
            return false;
        }
        let mut parts = VecDeque::new();
        let mut full = Vec::new();
        for place in (0..).take(nvme.segments.len()) {
            let Some(segment) = &nvme.segments[place as usize] else {
                continue;
            };
            if segment.state == NvmeSegmentState::Opening {
                continue;
            }
            if segment.state == NvmeSegmentState::Open {
                if segment.records.is_empty() {
                    continue;
                }
                full.push(place);
            }
            let end = u32::try_from(segment.bytes / PAGE).expect("segments have at most 2^32 pages");
            for first in (0..end).step_by(PAGES_AT_ONCE as usize) {
                parts.push_back(Part {
                    place,
                    segment: segment.id,
                    pages: first..end.min(first.saturating_add(PAGES_AT_ONCE)),
                    attempts: 0,
                    in_flight: false,
                });
            }
        }
        for place in full {
            // Nothing more comes into a segment that is being overwritten.
            for open in &mut self.nvme_mut().open {
                if *open == Some(place) {
                    *open = None;
                }
            }
            self.fill_up(place);
        }
        self.destruction_mut().evidence.nvme_segments =
            parts.iter().filter(|part| part.pages.start == 0).count() as u64;
        self.enter(Phase::Nvme(parts, Gathered::default()))
    }

    fn erase_next_part(&mut self) -> bool {
        let now = self.now;
        let destruction = self.destructions.front().expect("the destruction in progress");
        let Phase::Nvme(parts, _) = &destruction.phase else {
            return false;
        };
        let Some(part) = parts.front() else {
            return self.finish_destruction();
        };
        if part.in_flight || destruction.not_before > now || !self.nvme_accepts() {
            return false;
        }
        let namespace = destruction.namespace;
        let part = part.clone();
        let is_last = parts.len() == 1;
        let segment = self.nvme_ref().segments[part.place as usize].as_ref();
        let Some(segment) = segment.filter(|segment| segment.id == part.segment) else {
            // It was closed meanwhile.
            return self.part_done();
        };
        let closing = segment.state == NvmeSegmentState::Closing && segment.operation.is_some();
        if closing || matches!(segment.state, NvmeSegmentState::Full | NvmeSegmentState::Sealing) {
            return false;
        }
        let Some(mut keep) = self.kept_pages(&part, namespace) else {
            return false;
        };
        if mutant_is!(self, DestroyErasesKept) {
            keep.clear();
        }
        let nvme = self.nvme_mut();
        nvme.segment_mut(part.place).reads += 1;
        let operation = self.issue(Operation::Erase { segment: part.place });
        let Phase::Nvme(parts, _) = &mut self.destruction_mut().phase else {
            unreachable!("checked above")
        };
        parts.front_mut().expect("found above").in_flight = true;
        self.actions.push_back(Action::EraseRecords {
            operation,
            segment: part.segment,
            pages: part.pages,
            namespace,
            keep,
        });
        if is_last && mutant_is!(self, DestroyedBeforeErased) {
            self.report_destroyed();
        }
        true
    }

    /// Where a namespace's cached blocks lie in a segment, and whatever is being read, in order. `None` while there are records
    /// to look at: in steps, for there are tens of thousands of them. Blocks that are forgotten meanwhile are kept all the same:
    /// they are not what is being destroyed.
    fn kept_pages(&mut self, part: &Part, namespace: NamespaceId) -> Option<Vec<Range<u32>>> {
        let extent = |page: u32, length: u32| {
            let count = u32::try_from(pages(length) / PAGE).expect("blocks have fewer than 2^32 pages");
            page..page + count
        };
        let now = self.now;
        let place = part.place;
        let destruction = self.destructions.front_mut().expect("the destruction in progress");
        let Phase::Nvme(_, gathered) = &mut destruction.phase else {
            unreachable!("parts are erased in this phase")
        };
        if gathered.segment != Some(part.segment) {
            *gathered = Gathered {
                segment: Some(part.segment),
                ..Gathered::default()
            };
        }
        let nvme = self.nvme.as_ref().expect("an NVMe tier");
        let records = &nvme.segment(place).records;
        if self.namespaces.at(namespace.0).nvme_blocks == 0 {
            gathered.records = records.len();
        }
        let until = records.len().min(gathered.records.saturating_add(RECORDS_AT_ONCE));
        let visited = records.get(gathered.records..until).unwrap_or_default();
        let cached = visited
            .iter()
            .map(|&block| self.index.entry(block))
            .filter(|entry| entry.is(flag::LIVE) && entry.nvme_segment == place && entry.namespace == namespace.0)
            .map(|entry| extent(entry.nvme_page, entry.length));
        gathered.kept.extend(cached);
        gathered.records = until;
        if until < records.len() {
            destruction.not_before = now.after(STEP_PAUSE);
            return None;
        }
        let mut kept = gathered.kept.clone();
        // What was under way when the destruction began was waited for: these came later, and may be forgotten by now.
        kept.extend(self.operations.values().filter_map(|issued| match &issued.operation {
            Operation::Promote {
                nvme_segment,
                nvme_page,
                length,
                ..
            } => (*nvme_segment == place).then(|| extent(*nvme_page, *length)),
            Operation::Relocate(relocation) => {
                (relocation.source_segment == place).then(|| extent(relocation.source_page, relocation.length))
            }
            _ => None,
        }));
        kept.sort_unstable_by_key(|kept| (kept.start, kept.end));
        kept.dedup();
        Some(kept)
    }

    fn part_done(&mut self) -> bool {
        if let Phase::Nvme(parts, _) = &mut self.destruction_mut().phase {
            parts.pop_front();
        }
        true
    }

    pub(super) fn erased(&mut self, place: u32, outcome: Result<Completion, Failure>) {
        let now = self.now;
        let nvme = self.nvme_mut();
        nvme.segment_mut(place).reads -= 1;
        nvme.attention = true;
        let destruction = self.destruction_mut();
        let Phase::Nvme(parts, _) = &mut destruction.phase else {
            unreachable!("records are erased by the destruction in progress")
        };
        let part = parts.front_mut().expect("the part in flight");
        part.in_flight = false;
        match outcome {
            Ok(Completion::Erased { records, bytes }) => {
                destruction.evidence.nvme_records += u64::from(records);
                destruction.evidence.nvme_bytes += bytes;
                parts.pop_front();
            }
            Ok(_) | Err(_) => {
                part.attempts += 1;
                destruction.not_before = crate::namespace_table::backoff(now, PAUSE, part.attempts);
                if part.attempts >= ATTEMPTS_MAX {
                    destruction.evidence.nvme_left += 1;
                    parts.pop_front();
                }
            }
        }
    }

    fn finish_destruction(&mut self) -> bool {
        self.report_destroyed();
        self.destructions.pop_front();
        true
    }

    fn report_destroyed(&mut self) {
        let destruction = self.destruction_mut();
        #[cfg(feature = "mutants")]
        if std::mem::replace(&mut destruction.reported, true) {
            return;
        }
        let Destruction {
            operation,
            namespace,
            evidence,
            ..
        } = *destruction;
        self.actions.push_back(Action::Destroyed {
            operation,
            namespace,
            evidence,
        });
    }
}
