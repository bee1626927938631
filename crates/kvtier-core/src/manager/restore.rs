use super::copies::StaleRecord;
use super::{TierManager, mutant_is};
use crate::host_table::{PAGE, pages};
use crate::index::{NONE, flag};
use crate::nvme_table::{NvmeSegmentState, NvmeTable};
use crate::{
    BlockKey, Generation, Labels, NamespaceId, Parent, Refusal, Restored, RestoredRecord, RestoredSegment, Time,
    TrustDomain,
};

/// A segment while it is decided what of it is cached again.
struct Candidate {
    segment: RestoredSegment,
    /// For each record the block whose copy it is; [`NONE`] where it counts no more.
    blocks: Vec<u32>,
    /// For each record the block of which another one is the copy.
    shadowed: Vec<u32>,
    live: usize,
}

impl TierManager {
    /// Before any client: a namespace of an earlier run, with the generation on record. Ids are given in the order of the
    /// calls.
    ///
    /// # Errors
    /// `Invalid` where the name was opened already; `Busy` where `namespaces_max` is reached.
    pub fn restore_namespace(
        &mut self,
        domain: TrustDomain,
        name: &str,
        generation: Generation,
    ) -> Result<NamespaceId, Refusal> {
        if self.find_namespace(domain, name).is_some() {
            return Err(Refusal::Invalid("a namespace is restored once"));
        }
        let (namespace, _) = self.open_namespace(domain, name)?;
        let entry = self.namespaces.at_mut(namespace.0);
        entry.generation = generation;
        entry.recorded = generation;
        Ok(namespace)
    }

    /// Before any client, after namespaces and realizations: the NVMe segments of an earlier run, all in one call.
    ///
    /// The newest copy of a key counts. Older generations, unknown namespaces and realizations, impossible extents, and the
    /// oldest segments that do not fit `nvme_bytes` are left out. A segment of which nothing is left is closed.
    ///
    /// # Panics
    /// Where something is cached already.
    pub fn restore(&mut self, segments: Vec<RestoredSegment>, now: Time) -> Restored {
        self.advance(now);
        let given: usize = segments.iter().map(|segment| segment.records.len()).sum();
        let mut restored = Restored::default();
        if self.nvme.is_some() {
            assert!(
                self.index.len() == 0 && self.nvme_ref().opened == 0,
                "segments are restored once, before anything is cached"
            );
            let mut candidates = self.choose_copies(segments);
            self.make_it_fit(&mut candidates);
            for candidate in &candidates {
                self.attach_segment(candidate, &mut restored);
            }
            for candidate in &candidates {
                self.link_parents(candidate);
            }
            self.cut_circles(&candidates);
            self.append_to_restored(&candidates);
            self.pump();
        }
        restored.left_out = given as u64 - restored.blocks;
        restored
    }

    /// The segments, oldest first, with the newest copy of each key in the index.
    fn choose_copies(&mut self, mut segments: Vec<RestoredSegment>) -> Vec<Candidate> {
        segments.sort_by_key(|segment| segment.segment);
        segments.dedup_by_key(|segment| segment.segment);
        if mutant_is!(self, RestoreOlderCopy) {
            segments.reverse();
        }
        let mut candidates: Vec<Candidate> = segments
            .into_iter()
            .map(|mut segment| {
                self.keep_possible(&mut segment);
                Candidate {
                    blocks: vec![NONE; segment.records.len()],
                    shadowed: vec![NONE; segment.records.len()],
                    live: 0,
                    segment,
                }
            })
            .collect();
        for candidate in candidates.iter_mut().rev() {
            for (number, record) in candidate.segment.records.iter().enumerate().rev() {
                let (key, epoch) = self.restored_key(record);
                if let Some(block) = self.index.find(key, epoch) {
                    candidate.shadowed[number] = block;
                } else if self.index.len() < self.settings.blocks_max {
                    candidate.blocks[number] = self.index.insert(key, epoch);
                    candidate.live += 1;
                }
            }
        }
        candidates
    }

    /// Keeps the records that can be read and moved, in the order of their places.
    fn keep_possible(&self, segment: &mut RestoredSegment) {
        let nvme = self.nvme_ref();
        let mut end = nvme.header_bytes;
        let mut count = 0;
        segment.records.sort_by_key(|record| record.offset);
        segment.records.retain(|record| {
            let possible = self.is_known(record)
                && self.is_possible(record)
                && record.offset >= end
                && record
                    .offset
                    .checked_add(pages(record.length) + (count + 1) * nvme.record_bytes)
                    .is_some_and(|end| end <= segment.bytes);
            if possible {
                end = record.offset + pages(record.length);
                count += 1;
            }
            possible
        });
    }

    fn is_known(&self, record: &RestoredRecord) -> bool {
        let label = &record.label;
        (label.realization.0 as usize) < self.realizations.len()
            && self.namespaces.entry(label.namespace).is_some_and(|namespace| {
                namespace.generation == label.generation || mutant_is!(self, RestoreOlderGeneration)
            })
    }

    /// Whether it lies where a record can lie, and fits a new segment and a slot, so that it can be moved and read.
    fn is_possible(&self, record: &RestoredRecord) -> bool {
        let nvme = self.nvme_ref();
        record.length > 0
            && record.length <= self.settings.block_bytes_max
            && record.offset.is_multiple_of(PAGE)
            && u32::try_from(record.offset / PAGE).is_ok()
            && nvme.cost(record.length) <= nvme.room().min(nvme.live_max)
            && self.segment_bytes(pages(record.length)) <= self.settings.host_bytes
    }

    fn restored_key(&self, record: &RestoredRecord) -> (BlockKey, u32) {
        let label = &record.label;
        let key = BlockKey {
            namespace: label.namespace,
            realization: label.realization,
            hash: label.hash,
        };
        (key, self.namespaces.at(label.namespace.0).epoch)
    }

    /// Gives up segments until one more can be opened: with that one reclaim can go on.
    fn make_it_fit(&mut self, candidates: &mut [Candidate]) {
        let NvmeTable {
            bytes_max,
            segment_bytes,
            ..
        } = *self.nvme_ref();
        let sum = |candidates: &[Candidate]| -> u64 {
            let used = candidates.iter().filter(|candidate| candidate.live > 0);
            used.map(|candidate| candidate.segment.bytes).sum()
        };
        let room = bytes_max - segment_bytes;
        let total = sum(candidates);
        if total > room && total <= bytes_max {
            self.undo_relocation(candidates);
        }
        let mut total = sum(candidates);
        for candidate in candidates.iter_mut().filter(|candidate| candidate.live > 0) {
            if total <= room {
                return;
            }
            total -= candidate.segment.bytes;
            for block in std::mem::replace(&mut candidate.blocks, vec![NONE; candidate.segment.records.len()]) {
                if block != NONE {
                    self.index.remove(block);
                }
            }
            candidate.live = 0;
        }
    }

    /// The last run ended while its last free segment took in what another one held: what was copied still lies where it
    /// came from, so the new segment can go. Nothing changes where it mostly holds anything else.
    fn undo_relocation(&mut self, candidates: &mut [Candidate]) {
        let Some((newest, older)) = candidates.split_last_mut() else {
            return;
        };
        let mut copied: Vec<(u32, RestoredRecord)> = newest
            .blocks
            .iter()
            .copied()
            .zip(newest.segment.records.iter().copied())
            .filter(|(block, _)| *block != NONE)
            .collect();
        copied.sort_unstable_by_key(|(block, _)| *block);
        let mut sources = vec![None; copied.len()];
        for (place, candidate) in older.iter().enumerate() {
            for (number, record) in candidate.segment.records.iter().enumerate() {
                let block = candidate.shadowed[number];
                if let Ok(position) = copied.binary_search_by_key(&block, |(block, _)| *block) {
                    let (_, copy) = &copied[position];
                    if copy.length == record.length && copy.checksum == record.checksum {
                        sources[position] = Some((place, number));
                    }
                }
            }
        }
        if sources.iter().flatten().count() * 2 < copied.len() {
            return;
        }
        newest.shadowed = std::mem::replace(&mut newest.blocks, vec![NONE; newest.segment.records.len()]);
        newest.live = 0;
        for ((block, _), source) in copied.iter().zip(sources) {
            let Some((place, number)) = source else {
                // Deleted, and that survived only where it came from.
                self.index.remove(*block);
                continue;
            };
            older[place].blocks[number] = *block;
            older[place].shadowed[number] = NONE;
            older[place].live += 1;
        }
    }

    fn attach_segment(&mut self, candidate: &Candidate, restored: &mut Restored) {
        let Candidate {
            segment, blocks, live, ..
        } = candidate;
        let used = *live > 0;
        let state = if used {
            NvmeSegmentState::Sealed
        } else {
            NvmeSegmentState::Drained
        };
        let place = self.nvme_mut().add_segment(segment.segment, segment.bytes, state);
        let nvme = self.nvme_mut();
        nvme.written = 1;
        nvme.segment_mut(place).needs_synced = 1;
        self.note_shadowed(candidate, place);
        if !used {
            // What shadows its records may not have been synced by the run that wrote it.
            let nvme = self.nvme_mut();
            nvme.attention = true;
            self.unsettled.push(place);
            return;
        }
        let mut cost = 0;
        for (record, &block) in segment.records.iter().zip(blocks).filter(|(_, block)| **block != NONE) {
            let entry = self.index.entry_mut(block);
            entry.length = record.length;
            entry.tokens = u16::try_from(record.label.tokens).unwrap_or(u16::MAX);
            entry.checksum = record.checksum;
            entry.set(flag::CHECKSUM);
            cost += self.nvme_ref().cost(record.length);
            let page = u32::try_from(record.offset / PAGE).expect("a possible record");
            let lost = mutant_is!(self, LabelsLostOnRestore);
            let labels = if lost { Labels::None } else { record.label.labels };
            self.attach_labels(block, labels);
            if self.labels_of(self.index.entry(block)) != labels {
                self.index.entry_mut(block).set(flag::UNDERSTATED);
            }
            self.count_first_copy(block);
            self.attach_nvme(block, place, page, false);
            restored.blocks += 1;
            restored.bytes += u64::from(record.length);
        }
        let nvme = self.nvme_mut();
        nvme.live += cost;
        let record_bytes = nvme.record_bytes;
        let entry = nvme.segment_mut(place);
        entry.live = cost;
        entry
            .records
            .extend(blocks.iter().copied().filter(|&block| block != NONE));
        let footer = entry.records.len() as u64 * record_bytes;
        // Nothing is appended any more: what is left behind the last record counts as dead.
        entry.end = (segment.bytes - footer) / PAGE * PAGE;
    }

    /// What a deletion has to forget too, as long as the segment is there.
    fn note_shadowed(&mut self, candidate: &Candidate, place: u32) {
        for (record, &block) in candidate.segment.records.iter().zip(&candidate.shadowed) {
            if block != NONE && self.index.entry(block).is(flag::LIVE) {
                let page = u32::try_from(record.offset / PAGE).expect("a possible record");
                let stale = StaleRecord {
                    segment: place,
                    page,
                    length: record.length,
                };
                self.note_stale(block, stale);
                self.nvme_mut().segment_mut(place).records.push(block);
            }
        }
    }

    /// The planted bug `RestoredExtentReused`.
    fn append_to_restored(&mut self, candidates: &[Candidate]) {
        if !mutant_is!(self, RestoredExtentReused) {
            return;
        }
        let newest = candidates.iter().rev().find(|candidate| candidate.live > 0);
        let id = newest.map(|candidate| candidate.segment.segment);
        let nvme = self.nvme_mut();
        let place = (0..)
            .zip(&nvme.segments)
            .find(|(_, segment)| segment.as_ref().is_some_and(|segment| Some(segment.id) == id));
        if let Some((place, _)) = place {
            let end = nvme.header_bytes;
            let segment = nvme.segment_mut(place);
            segment.state = NvmeSegmentState::Open;
            segment.end = end;
            nvme.open[0] = Some(place);
        }
    }

    fn link_parents(&mut self, candidate: &Candidate) {
        for (record, &block) in candidate.segment.records.iter().zip(&candidate.blocks) {
            let Parent::Block(hash) = record.label.parent else {
                continue;
            };
            if block == NONE {
                continue;
            }
            let (key, epoch) = self.restored_key(record);
            if let Some(parent) = self.index.find(BlockKey { hash, ..key }, epoch) {
                self.index.entry_mut(block).parent = parent;
                self.index.entry_mut(parent).children += 1;
            } else {
                self.index.entry_mut(block).set(flag::ORPHANED);
            }
        }
    }

    /// Records of different times may name each other as parents: of such a circle one block loses its parent.
    fn cut_circles(&mut self, candidates: &[Candidate]) {
        // Which walk towards the root came by first.
        let mut walks = vec![NONE; self.index.places() as usize];
        let blocks = candidates.iter().flat_map(|candidate| &candidate.blocks);
        for (walk, &start) in (0..).zip(blocks) {
            let (mut block, mut child) = (start, NONE);
            while block != NONE && walks[block as usize] == NONE {
                walks[block as usize] = walk;
                child = block;
                block = self.index.entry(block).parent;
            }
            if block != NONE && child != NONE && walks[block as usize] == walk {
                self.index.entry_mut(child).parent = NONE;
                self.index.entry_mut(block).children -= 1;
            }
        }
    }
}
