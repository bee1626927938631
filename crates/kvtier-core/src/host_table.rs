use crate::index::NONE;
use crate::key_map::{KeyMap, mix_number};
use crate::{OperationId, SegmentId, Time, TrustDomain};
use std::collections::{BTreeSet, VecDeque};

/// Slots are whole pages.
pub(crate) const PAGE: u64 = 4096;

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum SlotState {
    /// Nothing. `owner` is the next free slot.
    Free,
    /// A client may write it under a reservation.
    Reserved,
    /// A promotion reads into it. `owner` is the promotion.
    Filling,
    /// The host copy of block `owner`.
    Block,
    /// A copy that the index forgot, while leases or operations still hold the memory.
    Orphan,
}

/// Held by nobody and not free either.
const ORPHAN: Slot = Slot {
    owner: NONE,
    leases: 0,
    state: SlotState::Orphan,
    operations: 0,
};

/// One slot of a host segment: 8 bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) owner: u32,
    /// Leases, expired ones included.
    pub(crate) leases: u16,
    pub(crate) state: SlotState,
    /// Device operations in flight.
    pub(crate) operations: u8,
}

impl Slot {
    /// Nobody may see other bytes here yet.
    pub(crate) fn is_held(&self) -> bool {
        self.leases > 0 || self.operations > 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostSegmentState {
    /// Awaits the answer to its `OpenSegment`.
    Opening,
    Active,
    /// Being emptied: its free slots are not given out.
    Draining,
    /// Empty; awaits the answer to its `CloseSegment`.
    Closing,
}

/// Slots of one size, of one trust domain, in one shared-memory file.
#[derive(Debug)]
pub(crate) struct HostSegment {
    pub(crate) id: SegmentId,
    pub(crate) group: u32,
    pub(crate) bytes: u64,
    pub(crate) state: HostSegmentState,
    pub(crate) slots: Box<[Slot]>,
    pub(crate) free_head: u32,
    pub(crate) free: u32,
    /// On its group's stack of segments with free slots.
    pub(crate) available: bool,
}

/// Host memory of one trust domain in slots of one size.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) domain: TrustDomain,
    pub(crate) slot_bytes: u64,
    /// In any state.
    pub(crate) segments: Vec<u32>,
    /// Stack of active segments with free slots.
    pub(crate) available: Vec<u32>,
    /// Slots of active segments.
    pub(crate) slots: u32,
    /// Free ones of them.
    pub(crate) free: u32,
    /// Slots of segments being opened.
    pub(crate) opening: u32,
    /// Who waits for slots, first come first served.
    pub(crate) wants: VecDeque<Want>,
    /// Slots that they wait for.
    pub(crate) wanted: u64,
    /// When somebody who does not wait was last refused one.
    pub(crate) refused_at: Option<Time>,
    /// Demotions in flight that will make a slot clean.
    pub(crate) demotions: u32,
    /// Slots that are being filled for nobody, which will be clean.
    pub(crate) ahead: u32,
    /// Demotion runs until the high watermark is reached.
    pub(crate) demoting: bool,
    /// On the list of groups to look after.
    pub(crate) attended: bool,
    /// Evictions since the ages of groups were last compared.
    pub(crate) evictions: u32,
}

/// Who waits for a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// Items of a reserve.
    Reserve(OperationId),
    /// A promotion, by id.
    Promotion(u64),
}

/// All host segments and groups.
#[derive(Debug, Default)]
pub(crate) struct HostTable {
    pub(crate) segments: Vec<Option<HostSegment>>,
    free_segments: Vec<u32>,
    pub(crate) groups: Vec<Option<Group>>,
    free_groups: Vec<u32>,
    by_shape: KeyMap<(u32, u64, u32)>,
    next_segment: u32,
    /// Bytes of segments in any state.
    pub(crate) opened_bytes: u64,
    /// Bytes of slots that are not free.
    pub(crate) used_bytes: u64,
    pub(crate) attention: Vec<u32>,
    /// Slots that are zeroed before anybody gets them again, once they come free.
    pub(crate) tainted: BTreeSet<(u32, u32)>,
    /// Actions that zero slots, in flight.
    pub(crate) zeroing: u32,
    /// No segment is opened before this: the last one was refused.
    pub(crate) open_not_before: Time,
}

impl HostTable {
    pub(crate) fn segment(&self, place: u32) -> &HostSegment {
        self.segments[place as usize].as_ref().expect("a segment in use")
    }

    pub(crate) fn segment_mut(&mut self, place: u32) -> &mut HostSegment {
        self.segments[place as usize].as_mut().expect("a segment in use")
    }

    pub(crate) fn group(&self, place: u32) -> &Group {
        self.groups[place as usize].as_ref().expect("a group in use")
    }

    pub(crate) fn group_mut(&mut self, place: u32) -> &mut Group {
        self.groups[place as usize].as_mut().expect("a group in use")
    }

    pub(crate) fn slot(&self, segment: u32, slot: u32) -> Slot {
        self.segment(segment).slots[slot as usize]
    }

    pub(crate) fn slot_mut(&mut self, segment: u32, slot: u32) -> &mut Slot {
        &mut self.segment_mut(segment).slots[slot as usize]
    }

    pub(crate) fn slot_bytes(&self, segment: u32) -> u64 {
        self.group(self.segment(segment).group).slot_bytes
    }

    pub(crate) fn find_group(&self, domain: TrustDomain, slot_bytes: u64) -> Option<u32> {
        self.by_shape
            .find(shape(domain.0, slot_bytes), |group| {
                group.0 == domain.0 && group.1 == slot_bytes
            })
            .map(|group| group.2)
    }

    /// The group of this shape, made where there is none.
    pub(crate) fn open_group(&mut self, domain: TrustDomain, slot_bytes: u64) -> u32 {
        if let Some(group) = self.find_group(domain, slot_bytes) {
            return group;
        }
        let group = Group {
            domain,
            slot_bytes,
            segments: Vec::new(),
            available: Vec::new(),
            slots: 0,
            free: 0,
            opening: 0,
            wants: VecDeque::new(),
            wanted: 0,
            demotions: 0,
            ahead: 0,
            refused_at: None,
            demoting: false,
            attended: false,
            evictions: 0,
        };
        let place = place_in(&mut self.groups, &mut self.free_groups, group);
        self.by_shape
            .insert(shape(domain.0, slot_bytes), (domain.0, slot_bytes, place), |group| {
                shape(group.0, group.1)
            });
        place
    }

    /// Drops a group that has no segments and that nobody waits for.
    pub(crate) fn close_group_if_idle(&mut self, place: u32) {
        let group = self.group(place);
        if !group.segments.is_empty() || !group.wants.is_empty() || group.attended {
            return;
        }
        let (domain, slot_bytes) = (group.domain.0, group.slot_bytes);
        self.by_shape.remove(shape(domain, slot_bytes), |group| {
            group.0 == domain && group.1 == slot_bytes
        });
        self.groups[place as usize] = None;
        self.free_groups.push(place);
    }

    /// A new segment of `group`, in state `Opening`.
    pub(crate) fn open_segment(&mut self, group: u32, bytes: u64) -> u32 {
        let count = u32::try_from(bytes / self.group(group).slot_bytes).expect("slots of a segment");
        let id = SegmentId(self.next_segment);
        self.next_segment = self.next_segment.checked_add(1).expect("segment ids last for a run");
        let slots = (0..count).map(|slot| Slot {
            owner: if slot + 1 == count { NONE } else { slot + 1 },
            leases: 0,
            state: SlotState::Free,
            operations: 0,
        });
        let segment = HostSegment {
            id,
            group,
            bytes,
            state: HostSegmentState::Opening,
            slots: slots.collect(),
            free_head: 0,
            free: count,
            available: false,
        };
        self.opened_bytes += bytes;
        let place = place_in(&mut self.segments, &mut self.free_segments, segment);
        let group = self.group_mut(group);
        group.segments.push(place);
        group.opening += count;
        place
    }

    /// Forgets a segment whose memory was given back (or never was there).
    pub(crate) fn drop_segment(&mut self, place: u32) -> u32 {
        let segment = self.segments[place as usize].take().expect("a segment in use");
        self.free_segments.push(place);
        self.opened_bytes -= segment.bytes;
        self.group_mut(segment.group).segments.retain(|&other| other != place);
        segment.group
    }

    /// Asks for the group to be looked after.
    pub(crate) fn attend(&mut self, group: u32) {
        let entry = self.group_mut(group);
        if !entry.attended {
            entry.attended = true;
            self.attention.push(group);
        }
    }

    /// A free slot of an active segment, which the caller puts to use.
    pub(crate) fn take_slot(&mut self, group: u32, state: SlotState, owner: u32) -> Option<(u32, u32)> {
        let place = *self.group(group).available.last()?;
        let segment = self.segments[place as usize].as_mut().expect("an available segment");
        let slot = segment.free_head;
        let entry = &mut segment.slots[slot as usize];
        segment.free_head = entry.owner;
        segment.free -= 1;
        *entry = Slot {
            owner,
            leases: 0,
            state,
            operations: 0,
        };
        let exhausted = segment.free == 0;
        segment.available = !exhausted;
        let group = self.group_mut(group);
        group.free -= 1;
        if exhausted {
            group.available.pop();
        }
        self.used_bytes += self.slot_bytes(place);
        Some((place, slot))
    }

    /// Gives a slot back that nobody holds.
    pub(crate) fn free_slot(&mut self, place: u32, slot: u32) {
        if !self.tainted.is_empty() && self.tainted.contains(&(place, slot)) {
            *self.slot_mut(place, slot) = ORPHAN;
            return;
        }
        let segment = self.segments[place as usize].as_mut().expect("a segment in use");
        let entry = &mut segment.slots[slot as usize];
        assert_ne!(
            entry.state,
            SlotState::Free,
            "slot {slot} of {:?} is free already",
            segment.id
        );
        *entry = Slot {
            owner: segment.free_head,
            leases: 0,
            state: SlotState::Free,
            operations: 0,
        };
        segment.free_head = slot;
        segment.free += 1;
        let group = segment.group;
        if segment.state == HostSegmentState::Active {
            let newly = !std::mem::replace(&mut segment.available, true);
            let entry = self.group_mut(group);
            entry.free += 1;
            if newly {
                entry.available.push(place);
            }
        }
        self.used_bytes -= self.group(group).slot_bytes;
        self.attend(group);
    }

    /// Takes a free slot out of use; [`HostTable::relink_free`] has to follow.
    pub(crate) fn withhold_slot(&mut self, place: u32, slot: u32) {
        let segment = self.segments[place as usize].as_mut().expect("a segment in use");
        segment.slots[slot as usize] = ORPHAN;
        segment.free -= 1;
        let (group, is_active) = (segment.group, segment.state == HostSegmentState::Active);
        let group = self.group_mut(group);
        group.free -= u32::from(is_active);
        self.used_bytes += group.slot_bytes;
    }

    /// Makes the chain of a segment's free slots anew.
    pub(crate) fn relink_free(&mut self, place: u32) {
        let segment = self.segments[place as usize].as_mut().expect("a segment in use");
        segment.free_head = NONE;
        for slot in (0..segment.slots.len() as u32).rev() {
            let entry = &mut segment.slots[slot as usize];
            if entry.state == SlotState::Free {
                entry.owner = std::mem::replace(&mut segment.free_head, slot);
            }
        }
        let (group, is_available) = (segment.group, segment.free > 0);
        if segment.state == HostSegmentState::Active && !is_available && std::mem::take(&mut segment.available) {
            self.group_mut(group).available.retain(|&other| other != place);
        }
    }

    /// Frees an orphan that nobody holds any more.
    pub(crate) fn settle_slot(&mut self, segment: u32, slot: u32) {
        let entry = self.slot(segment, slot);
        if entry.state == SlotState::Orphan && !entry.is_held() {
            self.free_slot(segment, slot);
        }
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        let segments = self
            .segments
            .iter()
            .flatten()
            .map(|segment| segment.slots.len() * size_of::<Slot>())
            .sum::<usize>();
        let tables = self.segments.capacity() * size_of::<Option<HostSegment>>()
            + self.groups.capacity() * size_of::<Option<Group>>()
            + (self.free_segments.capacity() + self.free_groups.capacity()) * size_of::<u32>();
        let wants = self
            .groups
            .iter()
            .flatten()
            .map(|group| group.wants.capacity() * size_of::<Want>())
            .sum::<usize>();
        (segments + tables + wants) as u64 + self.by_shape.memory_bytes()
    }
}

/// Puts `element` into a free place of `table`.
pub(crate) fn place_in<T>(table: &mut Vec<Option<T>>, free: &mut Vec<u32>, element: T) -> u32 {
    if let Some(place) = free.pop() {
        table[place as usize] = Some(element);
        return place;
    }
    table.push(Some(element));
    u32::try_from(table.len() - 1).expect("tables are bounded by settings")
}

fn shape(domain: u32, slot_bytes: u64) -> u64 {
    mix_number((u64::from(domain) << 32) ^ slot_bytes)
}

/// The slot that a block of this length takes, bytes.
pub(crate) fn pages(length: u32) -> u64 {
    u64::from(length).next_multiple_of(PAGE)
}
