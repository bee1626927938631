use crate::host_table::{PAGE, pages, place_in};
use crate::{CoreSettings, OperationId, SegmentId, Time};

/// Of what may be live, what is not redundant may take this much, where those segments are emptied that have little to copy.
/// Thousandths: with more, a little more is cached and much more is copied.
const UNIQUE_PERMILLE: u64 = 970;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NvmeSegmentState {
    /// Awaits the answer to its `OpenSegment`.
    Opening,
    /// Records are appended.
    Open,
    /// Full; its last writes are in flight, or its footer waits to be written.
    Full,
    /// Awaits the answer to its `SealSegment`.
    Sealing,
    Sealed,
    /// Its live records are being copied away.
    Draining,
    /// Empty; closed once what was copied out of it survives a power cut.
    Drained,
    /// Empty; to be closed, or awaits the answer to its `CloseSegment`.
    Closing,
}

/// A log segment: records are appended front to back, never overwritten.
#[derive(Debug)]
pub(crate) struct NvmeSegment {
    pub(crate) id: SegmentId,
    /// Header and index included. Restored ones may have another size than new ones.
    pub(crate) bytes: u64,
    pub(crate) state: NvmeSegmentState,
    /// End of the last payload, bytes.
    pub(crate) end: u64,
    /// Blocks in the order of their records; a block that is elsewhere by now left a dead record.
    pub(crate) records: Vec<u32>,
    /// Payload and index bytes of records that the index still names, or that are being written.
    pub(crate) live: u64,
    /// Those of them whose block is also in host memory, and in use there: they may go whenever their room is needed.
    pub(crate) redundant: u64,
    pub(crate) writes: u32,
    pub(crate) reads: u32,
    /// How many writes a sync has to cover before it is emptied, and once it is empty, before it is closed.
    pub(crate) needs_synced: u64,
    /// The `CloseSegment` or `SealSegment` in flight.
    pub(crate) operation: Option<OperationId>,
}

impl NvmeSegment {
    /// Empty, and its bytes will be free.
    pub(crate) fn will_close(&self) -> bool {
        matches!(self.state, NvmeSegmentState::Drained | NvmeSegmentState::Closing)
    }
}

/// Who appends: demotion or reclaim. Each has its own open segment, so that demotion never takes the room that reclaim needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writer {
    Demotion,
    Relocation,
}

/// Whether the device is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    In,
    /// A `ResetTier` awaits its answer.
    Resetting,
    /// After errors or a reset: not before this.
    Out(Time),
}

/// All NVMe segments.
#[derive(Debug)]
pub(crate) struct NvmeTable {
    pub(crate) segments: Vec<Option<NvmeSegment>>,
    free_places: Vec<u32>,
    next_segment: u32,
    pub(crate) segment_bytes: u64,
    pub(crate) header_bytes: u64,
    pub(crate) record_bytes: u64,
    /// All segments together.
    pub(crate) bytes_max: u64,
    /// Segments in any state.
    pub(crate) opened: u32,
    /// Their bytes. After the capacity was lowered, more than `bytes_max` until those left out are closed.
    pub(crate) opened_bytes: u64,
    /// Payload and index bytes that may be live.
    pub(crate) live_max: u64,
    /// The same of what is not redundant, where segments are emptied that have little to copy: what is dead or redundant is
    /// what makes them so.
    pub(crate) unique_max: u64,
    pub(crate) live: u64,
    /// Those of them that may go whenever their room is needed.
    pub(crate) redundant: u64,
    /// Live payload of blocks in the index, bytes.
    pub(crate) used_bytes: u64,
    pub(crate) open: [Option<u32>; 2],
    pub(crate) draining: Option<Drain>,
    pub(crate) service: Service,
    /// Errors since the last success.
    pub(crate) errors: u32,
    /// Doublings of the backoff.
    pub(crate) attempts: u32,
    /// After `Busy` or an error: no new operation before this.
    pub(crate) not_before: Time,
    /// Nobody has looked since that pause began.
    pub(crate) paused: bool,
    /// Demotions and relocations in flight.
    pub(crate) writes: u32,
    /// Promotions in flight.
    pub(crate) reads: u32,
    /// Writes that came about, those of an earlier run counted as one.
    pub(crate) written: u64,
    /// How many of them survive a power cut.
    pub(crate) synced: u64,
    /// How many the `SyncTier` in flight covers.
    pub(crate) syncing: Option<u64>,
    /// All operations in flight.
    pub(crate) operations: u32,
    /// Something changed that may let segments move on.
    pub(crate) attention: bool,
}

/// A segment being emptied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drain {
    pub(crate) segment: u32,
    /// Next record to look at.
    pub(crate) cursor: usize,
    /// Relocations in flight.
    pub(crate) writes: u32,
    /// Records have to be looked at once more.
    pub(crate) again: bool,
    /// Some record was copied elsewhere.
    pub(crate) moved: bool,
}

impl NvmeTable {
    pub(crate) fn new(settings: &CoreSettings) -> Option<NvmeTable> {
        if settings.nvme_bytes == 0 {
            return None;
        }
        let segments_max = settings.nvme_bytes / settings.nvme_segment_bytes;
        let room = settings.nvme_segment_bytes - settings.nvme_segment_header_bytes;
        // One segment open for demotion, one for reclaim, one empty so that reclaim can always go on.
        let live_max =
            (room * segments_max / 1000 * u64::from(settings.nvme_live_permille)).min(room * (segments_max - 3));
        Some(NvmeTable {
            segments: Vec::new(),
            free_places: Vec::new(),
            next_segment: 0,
            segment_bytes: settings.nvme_segment_bytes,
            header_bytes: settings.nvme_segment_header_bytes,
            record_bytes: settings.nvme_record_index_bytes,
            bytes_max: settings.nvme_bytes,
            opened: 0,
            opened_bytes: 0,
            live_max,
            unique_max: (live_max / 1000 * UNIQUE_PERMILLE).max(room.min(live_max)),
            live: 0,
            redundant: 0,
            used_bytes: 0,
            open: [None; 2],
            draining: None,
            service: Service::In,
            errors: 0,
            attempts: 0,
            not_before: Time::ZERO,
            paused: false,
            writes: 0,
            reads: 0,
            written: 0,
            synced: 0,
            syncing: None,
            operations: 0,
            attention: false,
        })
    }

    pub(crate) fn segment(&self, place: u32) -> &NvmeSegment {
        self.segments[place as usize].as_ref().expect("a segment in use")
    }

    pub(crate) fn segment_mut(&mut self, place: u32) -> &mut NvmeSegment {
        self.segments[place as usize].as_mut().expect("a segment in use")
    }

    /// Payload bytes of a segment.
    pub(crate) fn room(&self) -> u64 {
        self.segment_bytes - self.header_bytes
    }

    pub(crate) fn payload_capacity(&self) -> u64 {
        self.room() * (self.bytes_max / self.segment_bytes)
    }

    /// Payload and index bytes of all records of a segment, dead ones too.
    pub(crate) fn filled(&self, place: u32) -> u64 {
        let segment = self.segment(place);
        segment.end - self.header_bytes + segment.records.len() as u64 * self.record_bytes
    }

    /// What a record costs: whole pages and its entry in the footer.
    pub(crate) fn cost(&self, length: u32) -> u64 {
        pages(length) + self.record_bytes
    }

    /// Segments that could be opened now.
    pub(crate) fn unopened(&self) -> u32 {
        let free = self.bytes_max.saturating_sub(self.opened_bytes);
        u32::try_from(free / self.segment_bytes).expect("checked settings")
    }

    pub(crate) fn open_segment(&mut self) -> u32 {
        let id = SegmentId(self.next_segment);
        self.add_segment(id, self.segment_bytes, NvmeSegmentState::Opening)
    }

    /// A segment without records. New ids are above every one added.
    pub(crate) fn add_segment(&mut self, id: SegmentId, bytes: u64, state: NvmeSegmentState) -> u32 {
        let segment = NvmeSegment {
            id,
            bytes,
            state,
            end: self.header_bytes,
            records: Vec::new(),
            live: 0,
            redundant: 0,
            writes: 0,
            reads: 0,
            needs_synced: 0,
            operation: None,
        };
        let next = id.0.checked_add(1).expect("segment ids last for as long as the tier");
        self.next_segment = self.next_segment.max(next);
        self.opened += 1;
        self.opened_bytes += bytes;
        place_in(&mut self.segments, &mut self.free_places, segment)
    }

    pub(crate) fn drop_segment(&mut self, place: u32) {
        let segment = self.segments[place as usize].take().expect("a segment in use");
        assert!(
            segment.live == 0 && segment.writes == 0 && segment.reads == 0,
            "{:?} is in use",
            segment.id
        );
        self.free_places.push(place);
        self.opened -= 1;
        self.opened_bytes -= segment.bytes;
    }

    /// Whether a record of this length fits behind the last one.
    pub(crate) fn fits(&self, place: u32, length: u32) -> bool {
        let segment = self.segment(place);
        let footer = (segment.records.len() as u64 + 1) * self.record_bytes;
        segment.end + pages(length) + footer <= segment.bytes
    }

    /// Appends a record; the caller made sure that it fits. Answers its page.
    pub(crate) fn append(&mut self, place: u32, block: u32, length: u32) -> u32 {
        let cost = self.cost(length);
        self.live += cost;
        let segment = self.segment_mut(place);
        let page = u32::try_from(segment.end / PAGE).expect("segments have at most 2^32 pages");
        segment.end += pages(length);
        segment.records.push(block);
        segment.live += cost;
        segment.writes += 1;
        page
    }

    /// A record is dead.
    pub(crate) fn kill(&mut self, place: u32, length: u32) {
        let cost = self.cost(length);
        self.live -= cost;
        self.segment_mut(place).live -= cost;
        self.attention = true;
    }

    /// A record that counts became redundant, or, with `false`, is so no more.
    pub(crate) fn mark_redundant(&mut self, place: u32, length: u32, redundant: bool) {
        let cost = self.cost(length);
        let segment = self.segments[place as usize].as_mut().expect("a segment in use");
        if redundant {
            segment.redundant += cost;
            self.redundant += cost;
        } else {
            segment.redundant -= cost;
            self.redundant -= cost;
        }
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        let records = self
            .segments
            .iter()
            .flatten()
            .map(|segment| segment.records.capacity() * size_of::<u32>());
        let tables = self.segments.capacity() * size_of::<Option<NvmeSegment>>() + self.free_places.capacity() * 4;
        (records.sum::<usize>() + tables) as u64
    }
}
