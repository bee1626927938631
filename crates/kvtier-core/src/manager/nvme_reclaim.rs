use super::copies::{StaleRecord, is_held};
use super::nvme::Placement;
use super::operation::Operation;
use super::{TierManager, mutant_is};
use crate::index::{NONE, flag};
use crate::nvme_table::{Drain, NvmeSegmentState, Writer};
use crate::{Action, BlockId, Completion, Failure, OperationId, SegmentId};

/// Segments kept empty or nearly so: one for demotion to open next, one for reclaim.
const FREE_SEGMENTS: u32 = 2;

/// A record being copied to another segment.
#[derive(Clone, Debug)]
pub(super) struct Relocation {
    /// [`NONE`] once the block is forgotten.
    pub(super) block: u32,
    pub(super) source_segment: u32,
    pub(super) source_page: u32,
    pub(super) segment: u32,
    pub(super) page: u32,
    pub(super) length: u32,
    /// The block was deleted meanwhile, not evicted.
    pub(super) deleted: bool,
}

impl TierManager {
    /// Empties segments while too few are free.
    pub(super) fn reclaim_nvme(&mut self) {
        let nvme = self.nvme_ref();
        let closing = self
            .unsettled
            .iter()
            .filter(|&&place| nvme.segment(place).will_close())
            .count();
        let free = nvme.unopened() as usize + closing;
        // Not before something is written: a restart alone gives nothing up. And not long before its room is needed: what
        // is still there may be used, or need no copying by then.
        let written = nvme.open[Writer::Demotion as usize].is_some_and(|place| {
            let segment = nvme.segment(place);
            nvme.filled(place) / 4 >= (segment.bytes - nvme.header_bytes) / 5
        });
        if written && nvme.draining.is_none() && free < FREE_SEGMENTS as usize {
            self.start_drain();
        }
        self.drain_nvme();
    }

    /// Chooses the segment that is emptied at the least cost. Where what was used longest ago goes first, that is the oldest:
    /// demotion writes in the order of last use, so age in the log is age in use, and what was not used since it was written
    /// may go. Else it is the one with the fewest bytes to copy. Passes over those that would only be copied. False where
    /// there is none, or its records have no place to move to.
    pub(super) fn start_drain(&mut self) -> bool {
        let nvme = self.nvme_ref();
        let by_age = self.policy.goes_by_age();
        let mut sealed: Vec<(u64, SegmentId, u32)> = (0..)
            .zip(&nvme.segments)
            .filter_map(|(place, segment)| segment.as_ref().map(|segment| (place, segment)))
            .filter(|(_, segment)| segment.state == NvmeSegmentState::Sealed)
            .map(|(place, segment)| (if by_age { 0 } else { self.bytes_to_copy(place) }, segment.id, place))
            .collect();
        sealed.sort_unstable();
        let place = sealed.into_iter().map(|(_, _, place)| place).find(|&place| {
            if by_age {
                self.is_worth_emptying(place)
            } else {
                self.bytes_to_copy(place) < nvme.filled(place)
            }
        });
        let Some(place) = place else { return false };
        let has_place = nvme.unopened() > 0 || nvme.open[Writer::Relocation as usize].is_some();
        let moves = if by_age {
            nvme.segment(place).live
        } else {
            self.bytes_to_copy(place)
        };
        if moves > 0 && !has_place {
            return false;
        }
        // Whatever survives of the copies, what they were copied from does: then a restart without a free segment can do
        // without the copies.
        if nvme.segment(place).needs_synced > nvme.synced {
            self.sync();
            return self.nvme_ref().syncing.is_some();
        }
        let nvme = self.nvme_mut();
        nvme.segment_mut(place).state = NvmeSegmentState::Draining;
        nvme.draining = Some(Drain {
            segment: place,
            cursor: 0,
            writes: 0,
            again: false,
            moved: false,
        });
        nvme.attention = true;
        true
    }

    /// What of a segment may have to be copied: what counts and is nowhere else, and while all is flushed what is, too.
    fn bytes_to_copy(&self, place: u32) -> u64 {
        let segment = self.nvme_ref().segment(place);
        if !self.is_flushed() {
            segment.live - segment.redundant
        } else {
            segment.live
        }
    }

    /// Some record is dead, or may go now or, once it was copied, the next time. Else emptying the segment would fill another
    /// one with the same records, over and over.
    fn is_worth_emptying(&self, place: u32) -> bool {
        let nvme = self.nvme_ref();
        let segment = nvme.segment(place);
        segment.live < nvme.filled(place) || segment.records.iter().any(|&block| !self.is_needed(block))
    }

    /// A copy that is being read, or of a block whose children are cached and that will soon be its last, or one that a
    /// flush would write again.
    fn is_needed(&self, block: u32) -> bool {
        let entry = self.index.entry(block);
        entry.is(flag::PROMOTING)
            || (entry.children > 0 && (!entry.in_host() || entry.is(flag::CLEAN)))
            || (entry.in_host() && self.is_flushed())
    }

    /// What is in host memory is to be on NVMe, too: a flush is under way, or the node is about to stop.
    fn is_flushed(&self) -> bool {
        !self.flushes.is_empty() || self.refuses_new
    }

    /// Copies the live records of the segment that is being emptied, or drops those not worth it.
    fn drain_nvme(&mut self) {
        while let Some(drain) = self.nvme_ref().draining {
            let segment = self.nvme_ref().segment(drain.segment);
            if drain.cursor == segment.records.len() {
                self.finish_drain(drain);
                return;
            }
            let block = segment.records[drain.cursor];
            let step = if self.is_record_of(block, drain.segment) {
                self.move_record(block, drain.segment)
            } else {
                true
            };
            if !step {
                return;
            }
            self.nvme_mut().draining.as_mut().expect("checked above").cursor += 1;
        }
    }

    fn finish_drain(&mut self, drain: Drain) {
        let now = self.now;
        let nvme = self.nvme_mut();
        if drain.again && drain.writes == 0 {
            let drain = nvme.draining.as_mut().expect("the caller's");
            drain.cursor = 0;
            drain.again = false;
            nvme.attention = nvme.not_before <= now;
            return;
        }
        if drain.writes > 0 || nvme.segment(drain.segment).live > 0 {
            return;
        }
        // Copies out of it that no sync covers yet are lost by a power cut, while here they may survive one.
        let needs_synced = if drain.moved { nvme.written } else { 0 };
        let segment = nvme.segment_mut(drain.segment);
        segment.state = NvmeSegmentState::Drained;
        segment.needs_synced = needs_synced;
        nvme.draining = None;
        nvme.attention = true;
        self.unsettled.push(drain.segment);
    }

    /// Whether the block's NVMe copy lies in this segment. Its place in the index may be another block's by now, which then
    /// has a record of its own.
    fn is_record_of(&self, block: u32, segment: u32) -> bool {
        let entry = self.index.entry(block);
        entry.is(flag::LIVE) && entry.nvme_segment == segment && !entry.is(flag::RELOCATING)
    }

    /// False where the record has to wait.
    fn move_record(&mut self, block: u32, source_segment: u32) -> bool {
        let entry = self.index.entry(block);
        if !self.is_current(entry) {
            self.forget(block);
            return true;
        }
        let entry = self.index.entry(block);
        let needed = self.is_needed(block);
        let again = entry.is(flag::AGAIN) && !entry.is(flag::REDUNDANT);
        let list = TierManager::nvme_list(entry.is(flag::REDUNDANT));
        let worth = needed || (!entry.is(flag::REDUNDANT) && self.policy.keep(list, BlockId(block), again));
        if !worth && entry.is(flag::CLEAN) && !is_held(&self.host, entry) {
            // Without this copy the host copy would be written again at once, to be dropped again, for ever.
            self.count_evictions(block);
            self.forget(block);
            return true;
        }
        if !worth {
            self.counters.evictions_nvme += 1;
            self.drop_nvme(block);
            return true;
        }
        if !self.may_write() {
            return false;
        }
        let entry = self.index.entry(block);
        let (length, source_page, checksum) = (entry.length, entry.nvme_page, entry.checksum);
        let (placement, segment, page) = self.place(block, length, Writer::Relocation);
        match placement {
            Placement::Wait if self.has_relocation_target() || self.nvme_is_closing() => return false,
            Placement::Placed => {}
            // Writes that failed used up the room: better to lose one block than to stand still.
            Placement::Wait | Placement::Full => {
                self.counters.evictions_nvme += 1;
                self.drop_nvme(block);
                return true;
            }
        }
        let source = self.nvme_extent(source_segment, source_page, length);
        let target = self.nvme_extent(segment, page, length);
        let label = self.label(self.index.entry(block));
        let operation = self.issue(Operation::Relocate(Relocation {
            block,
            source_segment,
            source_page,
            segment,
            page,
            length,
            deleted: false,
        }));
        self.writes.put(u64::from(block), operation);
        self.index.entry_mut(block).set(flag::RELOCATING);
        let nvme = self.nvme_mut();
        nvme.writes += 1;
        nvme.segment_mut(source_segment).reads += 1;
        nvme.draining
            .as_mut()
            .expect("records are moved while a segment is emptied")
            .writes += 1;
        self.actions.push_back(Action::Relocate {
            operation,
            source,
            target,
            checksum,
            label,
        });
        true
    }

    /// A segment is being closed: there will be room for a new one.
    fn nvme_is_closing(&self) -> bool {
        self.unsettled
            .iter()
            .any(|&place| self.nvme_ref().segment(place).will_close())
    }

    fn has_relocation_target(&self) -> bool {
        self.nvme_ref().open[Writer::Relocation as usize].is_some()
    }

    pub(super) fn relocation_answered(
        &mut self,
        operation: OperationId,
        relocation: &Relocation,
        outcome: Result<Completion, Failure>,
        lost: bool,
    ) {
        let Relocation {
            block,
            source_segment,
            segment,
            page,
            length,
            deleted,
            ..
        } = *relocation;
        let copy = StaleRecord { segment, page, length };
        let nvme = self.nvme_mut();
        nvme.writes -= 1;
        nvme.segment_mut(segment).writes -= 1;
        nvme.segment_mut(source_segment).reads -= 1;
        nvme.attention = true;
        let drain = nvme
            .draining
            .as_mut()
            .expect("a segment is emptied until its last relocation is answered");
        drain.writes -= 1;
        drain.moved |= outcome.is_ok();
        let retry = lost || outcome == Err(Failure::Busy);
        drain.again |= retry && block != NONE;
        if deleted {
            // Whatever the outcome: a write that failed may have got there all the same.
            self.forget_record(copy);
        }
        if block == NONE {
            self.nvme_mut().kill(segment, length);
            return;
        }
        assert_eq!(
            self.writes.take(u64::from(block)),
            Some(operation),
            "one write of a block at a time"
        );
        self.index.entry_mut(block).clear(flag::RELOCATING | flag::AGAIN);
        match outcome {
            Ok(_) => {
                self.nvme_mut().written += 1;
                self.counters.relocations += 1;
                self.counters.relocated_bytes += u64::from(length);
                if self.index.entry(block).is(flag::REDUNDANT) {
                    self.nvme_mut().mark_redundant(source_segment, length, false);
                    self.nvme_mut().mark_redundant(segment, length, true);
                }
                self.nvme_mut().kill(source_segment, length);
                let stay = mutant_is!(self, WrongExtentOnRelocate);
                let source = StaleRecord {
                    segment: source_segment,
                    page: self.index.entry(block).nvme_page,
                    length,
                };
                self.note_stale(block, source);
                let entry = self.index.entry_mut(block);
                entry.nvme_segment = segment;
                if !stay {
                    entry.nvme_page = page;
                }
                self.unpark(block);
            }
            Err(_) => {
                self.nvme_mut().kill(segment, length);
                self.note_stale(block, copy);
                if retry {
                    self.unpark(block);
                } else {
                    // The record cannot be read, or not be written: the segment must be emptied all the same.
                    self.drop_nvme(block);
                }
            }
        }
    }
}
