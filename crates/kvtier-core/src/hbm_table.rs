use std::collections::{BTreeMap, BTreeSet};

use crate::host_table::place_in;
use crate::index::NONE;
use crate::key_map::KeyMap;
use crate::{CoreSettings, SegmentId, Time, TrustDomain};

/// Segments of device memory have the highest bit in their ids: where both kinds are named, they and those of host memory differ.
const FIRST_SEGMENT: u32 = 1 << 31;

/// What a slot of device memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HbmSlotState {
    /// Nothing that anybody may see.
    Free,
    /// A copy of block `owner` is being written into it.
    Filling,
    /// The copy of block `owner`.
    Block,
    /// A copy that counts no more, while leases or the device still hold the memory.
    Orphan,
    /// The device zeroes it.
    Zeroing,
}

/// One slot of a device segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HbmSlot {
    pub(crate) owner: u32,
    /// Leases, expired ones included.
    pub(crate) leases: u32,
    pub(crate) state: HbmSlotState,
    /// The device writes into it.
    pub(crate) is_busy: bool,
    /// Something was written into it since it was last zero.
    pub(crate) is_dirty: bool,
    /// When it was last used, in uses of this tier.
    pub(crate) used: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HbmSegmentState {
    /// Awaits the answer to its `OpenSegment`.
    Opening,
    Active,
    /// Its copies count no more; closed once nobody holds a slot of it.
    Draining,
    /// Awaits the answer to its `CloseSegment`.
    Closing,
}

/// Whose memory, in slots of how many bytes.
pub(crate) type Shape = (TrustDomain, u64);

/// One allocation on the device: slots of one size, of one trust domain.
#[derive(Debug)]
pub(crate) struct HbmSegment {
    pub(crate) id: SegmentId,
    pub(crate) shape: Shape,
    pub(crate) bytes: u64,
    pub(crate) state: HbmSegmentState,
    pub(crate) slots: Box<[HbmSlot]>,
    /// The last use of any of its slots.
    pub(crate) newest: u64,
}

impl HbmSegment {
    fn is_unheld(&self) -> bool {
        self.slots
            .iter()
            .all(|slot| slot.leases == 0 && matches!(slot.state, HbmSlotState::Free | HbmSlotState::Block))
    }
}

/// Device memory of one trust domain in slots of one size.
#[derive(Debug, Default)]
pub(crate) struct HbmGroup {
    /// Free slots of active segments.
    free: BTreeSet<(u32, u32)>,
    /// Copies that nobody holds, the one used longest ago first.
    order: BTreeSet<(u64, u32, u32)>,
    /// Segments being opened.
    opening: u32,
    /// Copies that made room for others since segments of other groups were last looked at.
    evictions: usize,
}

/// Copies in device memory. Each is of a block that has another copy: what goes from here is never lost.
#[derive(Debug)]
pub(crate) struct HbmTable {
    pub(crate) bytes_max: u64,
    segment_bytes: u64,
    pub(crate) segments: Vec<Option<HbmSegment>>,
    free_segments: Vec<u32>,
    groups: BTreeMap<Shape, HbmGroup>,
    /// Block -> its slot; those being filled included.
    copies: KeyMap<(u64, (u32, u32))>,
    next_segment: u32,
    uses: u64,
    /// Bytes of all segments, those being opened or closed included.
    pub(crate) opened_bytes: u64,
    /// Bytes of slots that are not free.
    pub(crate) used_bytes: u64,
    /// Copies that may be read.
    pub(crate) blocks: u64,
    /// Copies being written.
    pub(crate) filling: usize,
    /// `ZeroSegment`s in flight.
    pub(crate) zeroing: u32,
    /// Segments in state `Draining`.
    draining: u32,
    /// No segment is opened and nothing is copied before this.
    pub(crate) not_before: Time,
    /// Errors in a row.
    pub(crate) errors: u32,
    /// How often it was given up since it last worked.
    pub(crate) attempts: u32,
}

impl HbmTable {
    pub(crate) fn new(settings: &CoreSettings) -> Option<HbmTable> {
        (settings.hbm_bytes > 0).then(|| HbmTable {
            bytes_max: settings.hbm_bytes,
            segment_bytes: settings.hbm_segment_bytes,
            segments: Vec::new(),
            free_segments: Vec::new(),
            groups: BTreeMap::new(),
            copies: KeyMap::default(),
            next_segment: FIRST_SEGMENT,
            uses: 0,
            opened_bytes: 0,
            used_bytes: 0,
            blocks: 0,
            filling: 0,
            zeroing: 0,
            draining: 0,
            not_before: Time::ZERO,
            errors: 0,
            attempts: 0,
        })
    }

    pub(crate) fn segment(&self, place: u32) -> &HbmSegment {
        self.segments[place as usize].as_ref().expect("a device segment in use")
    }

    pub(crate) fn segment_mut(&mut self, place: u32) -> &mut HbmSegment {
        self.segments[place as usize].as_mut().expect("a device segment in use")
    }

    pub(crate) fn slot(&self, segment: u32, slot: u32) -> &HbmSlot {
        &self.segment(segment).slots[slot as usize]
    }

    fn slot_mut(&mut self, segment: u32, slot: u32) -> &mut HbmSlot {
        &mut self.segment_mut(segment).slots[slot as usize]
    }

    pub(crate) fn slot_bytes(&self, segment: u32) -> u64 {
        self.segment(segment).shape.1
    }

    fn group(&mut self, segment: u32) -> &mut HbmGroup {
        let shape = self.segment(segment).shape;
        self.groups.entry(shape).or_default()
    }

    /// Where the copy of a block lies, or will once it is written.
    pub(crate) fn place_of(&self, block: u32) -> Option<(u32, u32)> {
        self.copies.at(u64::from(block)).copied()
    }

    /// Where the copy of a block can be read.
    pub(crate) fn copy_of(&self, block: u32) -> Option<(u32, u32)> {
        let (segment, slot) = self.place_of(block)?;
        (self.slot(segment, slot).state == HbmSlotState::Block).then_some((segment, slot))
    }

    /// How large a segment for slots of this size is: the base size, or four slots; `None` where that is more than there is.
    pub(crate) fn segment_bytes(&self, slot_bytes: u64) -> Option<u64> {
        let bytes = if slot_bytes * 4 <= self.segment_bytes {
            self.segment_bytes
        } else {
            (slot_bytes * 4).next_multiple_of(self.segment_bytes)
        };
        (bytes <= self.bytes_max).then_some(bytes)
    }

    pub(crate) fn is_opening(&self, shape: Shape) -> bool {
        self.groups.get(&shape).is_some_and(|group| group.opening > 0)
    }

    /// A new segment, in state `Opening`.
    pub(crate) fn open(&mut self, shape: Shape, bytes: u64) -> u32 {
        let free = HbmSlot {
            owner: NONE,
            leases: 0,
            state: HbmSlotState::Free,
            is_busy: false,
            is_dirty: false,
            used: 0,
        };
        let count = usize::try_from(bytes / shape.1).expect("slots of a segment");
        let segment = HbmSegment {
            id: SegmentId(self.next_segment),
            shape,
            bytes,
            state: HbmSegmentState::Opening,
            slots: vec![free; count].into_boxed_slice(),
            newest: 0,
        };
        self.next_segment = self.next_segment.checked_add(1).expect("segment ids last for a run");
        self.opened_bytes += bytes;
        self.groups.entry(shape).or_default().opening += 1;
        place_in(&mut self.segments, &mut self.free_segments, segment)
    }

    pub(crate) fn opened(&mut self, place: u32) {
        self.group(place).opening -= 1;
        self.segment_mut(place).state = HbmSegmentState::Active;
        let slots = self.segment(place).slots.len() as u32;
        self.group(place).free.extend((0..slots).map(|slot| (place, slot)));
    }

    /// It could not be opened, or was closed.
    pub(crate) fn drop_segment(&mut self, place: u32) {
        if self.segment(place).state == HbmSegmentState::Opening {
            self.group(place).opening -= 1;
        }
        let segment = self.segments[place as usize].take().expect("a device segment in use");
        self.free_segments.push(place);
        self.opened_bytes -= segment.bytes;
        let shape = segment.shape;
        let is_last = !self.segments.iter().flatten().any(|other| other.shape == shape);
        if is_last {
            self.groups.remove(&shape);
        }
    }

    pub(crate) fn free_slot(&self, shape: Shape) -> Option<(u32, u32)> {
        self.groups.get(&shape)?.free.first().copied()
    }

    /// The copy of a group that nobody holds and that was used longest ago: its last use and its block.
    pub(crate) fn oldest(&self, shape: Shape) -> Option<(u64, u32)> {
        let &(used, segment, slot) = self.groups.get(&shape)?.order.first()?;
        Some((used, self.slot(segment, slot).owner))
    }

    /// Counts a copy that makes room. True once as many did as a segment has slots.
    pub(crate) fn count_eviction(&mut self, shape: Shape) -> bool {
        let per_segment = self.segment_bytes(shape.1).map_or(1, |bytes| bytes / shape.1);
        let group = self.groups.entry(shape).or_default();
        group.evictions += 1;
        let many = group.evictions as u64 >= per_segment;
        if many {
            group.evictions = 0;
        }
        many
    }

    /// The segment of another group whose every copy was used before `than` and is held by nobody, of those the one used
    /// longest ago.
    pub(crate) fn stale_segment(&self, shape: Shape, than: u64) -> Option<u32> {
        let candidates = (0..).zip(&self.segments);
        candidates
            .filter_map(|(place, segment)| segment.as_ref().map(|segment| (place, segment)))
            .filter(|(_, segment)| {
                segment.state == HbmSegmentState::Active
                    && segment.shape != shape
                    && segment.newest < than
                    && segment.is_unheld()
            })
            .min_by_key(|(place, segment)| (segment.newest, *place))
            .map(|(place, _)| place)
    }

    /// Whether a segment is on its way out: its bytes will be free.
    pub(crate) fn is_closing(&self) -> bool {
        self.segments
            .iter()
            .flatten()
            .any(|segment| matches!(segment.state, HbmSegmentState::Draining | HbmSegmentState::Closing))
    }

    /// The number of a use that happens now.
    pub(crate) fn next_use(&mut self) -> u64 {
        self.uses += 1;
        self.uses
    }

    /// A copy of `block` will be written into a free slot.
    pub(crate) fn fill(&mut self, (segment, slot): (u32, u32), block: u32) {
        let used = self.next_use();
        let taken = self.group(segment).free.remove(&(segment, slot));
        assert!(taken, "slot {slot} of device segment {segment} is not free");
        self.used_bytes += self.slot_bytes(segment);
        self.filling += 1;
        let entry = self.segment_mut(segment);
        entry.newest = used;
        entry.slots[slot as usize] = HbmSlot {
            owner: block,
            leases: 0,
            state: HbmSlotState::Filling,
            is_busy: true,
            is_dirty: true,
            used,
        };
        self.copies.put(u64::from(block), (segment, slot));
    }

    /// The device is done with a slot. True where it holds the copy of a block from now on.
    pub(crate) fn filled(&mut self, (segment, slot): (u32, u32), is_good: bool) -> bool {
        self.filling -= 1;
        let entry = self.slot_mut(segment, slot);
        entry.is_busy = false;
        if entry.state != HbmSlotState::Filling {
            self.settle(segment, slot);
            return false;
        }
        let (block, used) = (entry.owner, entry.used);
        if !is_good {
            self.detach(block);
            return false;
        }
        self.slot_mut(segment, slot).state = HbmSlotState::Block;
        self.blocks += 1;
        self.group(segment).order.insert((used, segment, slot));
        true
    }

    pub(crate) fn lease(&mut self, (segment, slot): (u32, u32)) {
        let now = self.next_use();
        let entry = self.segment_mut(segment);
        entry.newest = now;
        let memory = &mut entry.slots[slot as usize];
        let used = std::mem::replace(&mut memory.used, now);
        memory.leases += 1;
        if memory.leases == 1 {
            self.group(segment).order.remove(&(used, segment, slot));
        }
    }

    pub(crate) fn end_lease(&mut self, segment: u32, slot: u32) {
        let memory = self.slot_mut(segment, slot);
        memory.leases = memory.leases.saturating_sub(1);
        if memory.leases > 0 {
            return;
        }
        if memory.state == HbmSlotState::Block {
            let used = memory.used;
            self.group(segment).order.insert((used, segment, slot));
        } else {
            self.settle(segment, slot);
        }
    }

    /// The copy of a block counts no more. Its slot is free, or free once nobody holds it. False where there is none.
    pub(crate) fn detach(&mut self, block: u32) -> bool {
        let Some((segment, slot)) = self.copies.take(u64::from(block)) else {
            return false;
        };
        let memory = self.slot_mut(segment, slot);
        let (state, used) = (std::mem::replace(&mut memory.state, HbmSlotState::Orphan), memory.used);
        memory.owner = NONE;
        if state == HbmSlotState::Block {
            self.blocks -= 1;
            self.group(segment).order.remove(&(used, segment, slot));
        }
        self.settle(segment, slot);
        true
    }

    /// Frees an orphan that nobody holds any more.
    fn settle(&mut self, segment: u32, slot: u32) {
        let memory = self.slot_mut(segment, slot);
        if memory.state != HbmSlotState::Orphan || memory.leases > 0 || memory.is_busy {
            return;
        }
        memory.state = HbmSlotState::Free;
        self.freed(segment, slot);
    }

    fn freed(&mut self, segment: u32, slot: u32) {
        self.used_bytes -= self.slot_bytes(segment);
        if self.segment(segment).state == HbmSegmentState::Active {
            self.group(segment).free.insert((segment, slot));
        }
    }

    /// Nothing of a segment counts any more, and no slot of it is given out.
    pub(crate) fn drain(&mut self, place: u32) {
        let owners: Vec<u32> = self
            .segment(place)
            .slots
            .iter()
            .filter(|slot| matches!(slot.state, HbmSlotState::Block | HbmSlotState::Filling))
            .map(|slot| slot.owner)
            .collect();
        for block in owners {
            self.detach(block);
        }
        self.segment_mut(place).state = HbmSegmentState::Draining;
        self.draining += 1;
        self.group(place).free.retain(|&(segment, _)| segment != place);
    }

    /// Segments that are to be closed and of which nobody holds anything: they are being closed from now on.
    pub(crate) fn take_drained(&mut self) -> Vec<u32> {
        if self.draining == 0 {
            return Vec::new();
        }
        let drained: Vec<u32> = (0..)
            .zip(&self.segments)
            .filter(|(_, segment)| {
                segment.as_ref().is_some_and(|segment| {
                    segment.state == HbmSegmentState::Draining
                        && segment.slots.iter().all(|slot| slot.state == HbmSlotState::Free)
                })
            })
            .map(|(place, _)| place)
            .collect();
        for &place in &drained {
            self.segment_mut(place).state = HbmSegmentState::Closing;
        }
        self.draining -= drained.len() as u32;
        drained
    }

    /// Takes the free slots of a segment that are not zero out of use, to be zeroed.
    pub(crate) fn begin_zeroing(&mut self, place: u32) -> Vec<u32> {
        let slots: Vec<u32> = (0..)
            .zip(&self.segment(place).slots)
            .filter(|(_, slot)| slot.state == HbmSlotState::Free && slot.is_dirty)
            .map(|(slot, _)| slot)
            .collect();
        for &slot in &slots {
            self.group(place).free.remove(&(place, slot));
            self.slot_mut(place, slot).state = HbmSlotState::Zeroing;
            self.used_bytes += self.slot_bytes(place);
        }
        self.zeroing += u32::from(!slots.is_empty());
        slots
    }

    /// They are zero, or not.
    pub(crate) fn zeroed(&mut self, place: u32, slots: &[u32], is_zero: bool) {
        self.zeroing -= 1;
        for &slot in slots {
            let memory = self.slot_mut(place, slot);
            memory.state = HbmSlotState::Free;
            memory.is_dirty = !is_zero;
            self.freed(place, slot);
        }
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        let slots: usize = self
            .segments
            .iter()
            .flatten()
            .map(|segment| segment.slots.len() * (size_of::<HbmSlot>() + size_of::<(u64, u32, u32)>()))
            .sum();
        slots as u64 + self.copies.memory_bytes()
    }

    /// Panics where the tables contradict each other.
    pub(crate) fn check_invariants(&self) {
        let (mut opened, mut used, mut blocks, mut filling, mut copies) = (0, 0, 0, 0, 0);
        let (mut free, mut ordered) = (0, 0);
        for (place, segment) in (0..).zip(&self.segments) {
            let Some(segment) = segment else { continue };
            opened += segment.bytes;
            for (slot, memory) in (0..).zip(&segment.slots) {
                let at = (place, slot);
                let is_active = segment.state == HbmSegmentState::Active;
                let group = &self.groups[&segment.shape];
                used += u64::from(memory.state != HbmSlotState::Free) * segment.shape.1;
                filling += usize::from(memory.is_busy);
                match memory.state {
                    HbmSlotState::Free => {
                        assert!(
                            memory.leases == 0 && !memory.is_busy,
                            "device slot {at:?} is free and held"
                        );
                        assert_eq!(group.free.contains(&at), is_active, "device slot {at:?} is on offer");
                        free += usize::from(is_active);
                    }
                    HbmSlotState::Filling => {
                        assert!(
                            memory.is_busy && memory.leases == 0,
                            "device slot {at:?} is being filled"
                        );
                        assert_eq!(self.place_of(memory.owner), Some(at), "the block of device slot {at:?}");
                        copies += 1;
                    }
                    HbmSlotState::Block => {
                        assert!(is_active && !memory.is_busy, "device slot {at:?} holds a block");
                        assert_eq!(self.copy_of(memory.owner), Some(at), "the block of device slot {at:?}");
                        let is_ordered = group.order.contains(&(memory.used, place, slot));
                        assert_eq!(is_ordered, memory.leases == 0, "the order of device slot {at:?}");
                        ordered += usize::from(is_ordered);
                        copies += 1;
                        blocks += 1;
                    }
                    HbmSlotState::Orphan => {
                        assert!(
                            memory.leases > 0 || memory.is_busy,
                            "device slot {at:?} is held by nobody"
                        );
                    }
                    HbmSlotState::Zeroing => assert_eq!(memory.leases, 0, "device slot {at:?} is zeroed"),
                }
            }
        }
        assert_eq!(
            (
                self.opened_bytes,
                self.used_bytes,
                self.blocks,
                self.filling,
                self.copies.len()
            ),
            (opened, used, blocks, filling, copies),
            "device bytes opened and used, blocks, those being filled, copies"
        );
        assert!(opened <= self.bytes_max, "{opened} device bytes opened");
        let listed = |of: fn(&HbmGroup) -> usize| self.groups.values().map(of).sum::<usize>();
        assert_eq!(
            (listed(|group| group.free.len()), listed(|group| group.order.len())),
            (free, ordered),
            "device slots listed"
        );
    }
}
