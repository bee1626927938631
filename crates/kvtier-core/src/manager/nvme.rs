use super::operation::Operation;
use super::{TierManager, mutant_is};
use crate::host_table::PAGE;
use crate::index::flag;
use crate::nvme_table::{NvmeSegmentState, NvmeTable, Service, Writer};
use crate::{Action, BlockId, Completion, Extent, Failure, Tier, Verdict};

/// Whether there is room for a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placement {
    Placed,
    /// There will be: a segment is being opened or emptied.
    Wait,
    /// Not before something that only the caller can let go is gone.
    Full,
}

/// Copies dropped at once so that some segment becomes worth emptying.
const EVICTIONS_A_STEP: u32 = 64;

impl TierManager {
    pub(super) fn nvme_ref(&self) -> &NvmeTable {
        self.nvme.as_ref().expect("an NVMe tier")
    }

    pub(super) fn nvme_mut(&mut self) -> &mut NvmeTable {
        self.nvme.as_mut().expect("an NVMe tier")
    }

    pub(super) fn nvme_in_service(&self) -> bool {
        self.nvme.as_ref().is_some_and(|nvme| nvme.service == Service::In)
    }

    /// Whether new operations may be issued: in service, and not pausing after a refusal.
    pub(super) fn nvme_accepts(&self) -> bool {
        self.nvme
            .as_ref()
            .is_some_and(|nvme| nvme.service == Service::In && nvme.not_before <= self.now)
    }

    pub(super) fn nvme_extent(&self, segment: u32, page: u32, length: u32) -> Extent {
        Extent {
            segment: self.nvme_ref().segment(segment).id,
            offset: u64::from(page) * PAGE,
            length,
        }
    }

    /// Room for a record at the end of the writer's open segment.
    pub(super) fn place(&mut self, block: u32, length: u32, writer: Writer) -> (Placement, u32, u32) {
        let cost = self.nvme_ref().cost(length);
        if writer == Writer::Demotion {
            let mut dropped = 0;
            while !self.may_hold(cost) {
                // After a restart nothing is redundant, so there may be more than fits.
                if dropped == EVICTIONS_A_STEP && !self.policy.goes_by_age() {
                    self.nvme_mut().attention = true;
                    return (Placement::Wait, 0, 0);
                }
                dropped += 1;
                if !self.evict_for_another() {
                    // What is being written or read now can go later.
                    let moving = self.nvme_ref().writes + self.nvme_ref().reads > 0;
                    return (if moving { Placement::Wait } else { Placement::Full }, 0, 0);
                }
            }
        }
        if let Some(open) = self.nvme_ref().open[writer as usize] {
            if self.nvme_ref().segment(open).state == NvmeSegmentState::Opening {
                return (Placement::Wait, 0, 0);
            }
            if self.nvme_ref().fits(open, length) {
                let page = self.nvme_mut().append(open, block, length);
                return (Placement::Placed, open, page);
            }
            self.fill_up(open);
            self.nvme_mut().open[writer as usize] = None;
        }
        (self.open_nvme(writer), 0, 0)
    }

    /// Whether so many bytes more may count. Where the policy goes by age, all that counts has a bound; else what is also in
    /// use in host memory takes only room that would be dead otherwise.
    fn may_hold(&self, cost: u64) -> bool {
        let nvme = self.nvme_ref();
        if self.policy.goes_by_age() {
            nvme.live + cost <= nvme.live_max
        } else {
            nvme.live - nvme.redundant + cost <= nvme.unique_max
        }
    }

    /// Drops a copy so that another one may count.
    fn evict_for_another(&mut self) -> bool {
        if self.policy.goes_by_age() {
            return self.evict_nvme();
        }
        let Some(BlockId(block)) = self.nvme_victim() else {
            return false;
        };
        self.counters.evictions_nvme += 1;
        self.drop_nvme(block);
        true
    }

    /// No more records: the segment is sealed once its last write is answered.
    pub(super) fn fill_up(&mut self, place: u32) {
        let nvme = self.nvme_mut();
        nvme.segment_mut(place).state = NvmeSegmentState::Full;
        nvme.attention = true;
        self.unsettled.push(place);
    }

    fn open_nvme(&mut self, writer: Writer) -> Placement {
        // The last free segment is reclaim's: with it the segment that is being emptied can always be emptied.
        let kept = match writer {
            Writer::Demotion => 1,
            Writer::Relocation => 0,
        };
        if self.nvme_ref().unopened() > kept {
            let nvme = self.nvme_mut();
            let place = nvme.open_segment();
            nvme.open[writer as usize] = Some(place);
            let (segment, bytes) = (nvme.segment(place).id, nvme.segment_bytes);
            let operation = self.issue(Operation::OpenNvme { segment: place });
            self.actions.push_back(Action::OpenSegment {
                operation,
                tier: Tier::Nvme,
                segment,
                bytes,
                domain: None,
            });
            return Placement::Wait;
        }
        let mut dropped = 0;
        loop {
            if self.nvme_ref().draining.is_some() || self.start_drain() || self.nvme_will_free() {
                return Placement::Wait;
            }
            if dropped == EVICTIONS_A_STEP || !self.evict_nvme() {
                return if dropped > 0 { Placement::Wait } else { Placement::Full };
            }
            dropped += 1;
        }
    }

    /// Segments are on their way to being reclaimable or free.
    fn nvme_will_free(&self) -> bool {
        let busy = [
            NvmeSegmentState::Full,
            NvmeSegmentState::Sealing,
            NvmeSegmentState::Drained,
            NvmeSegmentState::Closing,
        ];
        self.unsettled
            .iter()
            .any(|&place| busy.contains(&self.nvme_ref().segment(place).state))
    }

    /// Drops the NVMe copy that is missed least: first those whose host copy is in use, then the least recently left,
    /// but never the last copy of a block before its cached children. False where there is none.
    ///
    /// During a flush those with a host copy come last: they would have to be written again at once.
    pub(super) fn evict_nvme(&mut self) -> bool {
        if self.nvme.is_none() {
            return false;
        }
        let victim = if self.flushes.is_empty() {
            self.redundant_victim().or_else(|| self.nvme_victim())
        } else {
            self.nvme_victim().or_else(|| self.redundant_victim())
        };
        let Some(BlockId(block)) = victim else { return false };
        self.counters.evictions_nvme += 1;
        self.drop_nvme(block);
        true
    }

    fn redundant_victim(&mut self) -> Option<BlockId> {
        let TierManager { policy, index, .. } = self;
        policy.victim(TierManager::nvme_list(true), false, &mut |block| {
            if index.entry(block.0).is(flag::RELOCATING) {
                Verdict::Shelve
            } else {
                Verdict::Take
            }
        })
    }

    fn nvme_victim(&mut self) -> Option<BlockId> {
        let careless = mutant_is!(self, EvictParentBeforeChild);
        let flushing = !self.flushes.is_empty();
        let TierManager { policy, index, .. } = self;
        policy.victim(TierManager::nvme_list(false), false, &mut |block| {
            let entry = index.entry(block.0);
            // A clean host copy would have to be written again at once; so would any while all are flushed.
            let again = entry.is(flag::CLEAN) || (flushing && entry.in_host());
            if again || entry.is(flag::RELOCATING | flag::PROMOTING) {
                Verdict::Shelve
            } else if !entry.in_host() && entry.children > 0 && !careless {
                Verdict::Park
            } else {
                Verdict::Take
            }
        })
    }

    /// Forgets the least recently left block that is only on NVMe and whose children are not cached. False where there is
    /// none.
    pub(super) fn forget_nvme_leaf(&mut self) -> bool {
        let TierManager { policy, index, .. } = self;
        let victim = policy.victim(TierManager::nvme_list(false), false, &mut |block| {
            let entry = index.entry(block.0);
            if entry.in_host() || entry.is(flag::RELOCATING | flag::PROMOTING) {
                Verdict::Shelve
            } else if entry.children > 0 {
                Verdict::Park
            } else {
                Verdict::Take
            }
        });
        let Some(BlockId(block)) = victim else { return false };
        self.counters.evictions_nvme += 1;
        self.drop_nvme(block);
        true
    }

    /// Lets segments and promotions move on.
    pub(super) fn pump_nvme(&mut self) {
        self.settle_segments();
        self.start_promotions();
        self.reclaim_nvme();
        self.settle_segments();
        self.pump_flush();
        self.pump_forgets();
        if self.nvme_accepts() {
            self.attend_waiting();
        }
    }

    /// Issues the seals and closes that are due.
    fn settle_segments(&mut self) {
        if !self.nvme_accepts() {
            return;
        }
        for place in std::mem::take(&mut self.unsettled) {
            let (synced, careless) = (self.nvme_ref().synced, mutant_is!(self, CloseBeforeSync));
            let segment = self.nvme_mut().segment_mut(place);
            if segment.state == NvmeSegmentState::Drained {
                if synced >= segment.needs_synced || careless {
                    segment.state = NvmeSegmentState::Closing;
                } else {
                    self.sync();
                }
            }
            let segment = self.nvme_ref().segment(place);
            let quiet = segment.writes == 0 && segment.reads == 0 && segment.operation.is_none();
            match segment.state {
                NvmeSegmentState::Full if segment.writes == 0 && segment.operation.is_none() => {
                    let id = segment.id;
                    let operation = self.issue(Operation::SealNvme { segment: place });
                    self.actions.push_back(Action::SealSegment { operation, segment: id });
                    let segment = self.nvme_mut().segment_mut(place);
                    segment.state = NvmeSegmentState::Sealing;
                    segment.operation = Some(operation);
                    self.unsettled.push(place);
                }
                NvmeSegmentState::Closing if quiet => {
                    let id = segment.id;
                    let operation = self.issue(Operation::CloseNvme { segment: place });
                    self.actions.push_back(Action::CloseSegment {
                        operation,
                        tier: Tier::Nvme,
                        segment: id,
                    });
                    self.nvme_mut().segment_mut(place).operation = Some(operation);
                    self.unsettled.push(place);
                }
                NvmeSegmentState::Sealed | NvmeSegmentState::Draining => {}
                _ => self.unsettled.push(place),
            }
        }
    }

    pub(super) fn nvme_opened(&mut self, place: u32, outcome: Result<Completion, Failure>, lost: bool) {
        let nvme = self.nvme_mut();
        nvme.attention = true;
        if outcome.is_ok() {
            nvme.segment_mut(place).state = NvmeSegmentState::Open;
            return;
        }
        for open in &mut nvme.open {
            if *open == Some(place) {
                *open = None;
            }
        }
        if lost {
            // It may have been opened after all.
            nvme.segment_mut(place).state = NvmeSegmentState::Closing;
            self.unsettled.push(place);
        } else {
            nvme.drop_segment(place);
        }
    }

    pub(super) fn nvme_sealed(&mut self, place: u32, outcome: Result<Completion, Failure>) {
        let nvme = self.nvme_mut();
        nvme.attention = true;
        let written = nvme.written;
        let segment = nvme.segment_mut(place);
        segment.operation = None;
        segment.needs_synced = written;
        segment.state = if outcome.is_ok() {
            NvmeSegmentState::Sealed
        } else {
            NvmeSegmentState::Full
        };
        if outcome.is_ok() {
            segment.records.shrink_to_fit();
        }
        self.unsettled.retain(|&other| other != place || outcome.is_err());
    }

    pub(super) fn nvme_closed(&mut self, place: u32, outcome: Result<Completion, Failure>) {
        self.nvme_mut().attention = true;
        if outcome.is_err() {
            self.nvme_mut().segment_mut(place).operation = None;
            return;
        }
        for block in std::mem::take(&mut self.nvme_mut().segment_mut(place).records) {
            if let Some(stale) = self.stale.at_mut(u64::from(block)) {
                stale.retain(|record| record.segment != place);
                if stale.is_empty() {
                    self.stale.take(u64::from(block));
                }
            }
        }
        self.nvme_mut().drop_segment(place);
        self.unsettled.retain(|&other| other != place);
        self.counters.segments_reclaimed += 1;
    }
}
