use crate::Time;
use crate::index::NONE;

const CHUNK: usize = 1024;

/// A slot that a client may touch: under a lease (read) or a reservation (write).
#[derive(Clone, Debug)]
pub(crate) struct Holding {
    /// Place of the client.
    pub(crate) client: u32,
    /// Place of the segment: of host memory, or where `on_device` of device memory.
    pub(crate) segment: u32,
    pub(crate) slot: u32,
    /// Bytes charged to `namespace` (reservations).
    pub(crate) length: u32,
    /// To which the bytes are charged; [`NONE`] for leases and grants.
    pub(crate) namespace: u32,
    /// A lease on a copy in device memory.
    pub(crate) on_device: bool,
    /// Past its time, or its client is lost: counted as quarantined.
    pub(crate) expired: bool,
    /// What is written under it is stale: blocks of its namespace were deleted since (reservations).
    pub(crate) fenced: bool,
    /// Published when it was granted (a planted bug).
    #[cfg(feature = "mutants")]
    pub(crate) published: bool,
    pub(crate) expires: Time,
}

impl Holding {
    pub(crate) fn new(client: u32, segment: u32, slot: u32, expires: Time) -> Holding {
        Holding {
            client,
            segment,
            slot,
            length: 0,
            namespace: NONE,
            on_device: false,
            expired: false,
            fenced: false,
            #[cfg(feature = "mutants")]
            published: false,
            expires,
        }
    }

    /// Whether the slot is a block's already (a planted bug).
    #[cfg_attr(
        not(feature = "mutants"),
        expect(clippy::unused_self, reason = "only planted bugs publish early")
    )]
    pub(crate) fn is_published(&self) -> bool {
        #[cfg(feature = "mutants")]
        return self.published;
        #[cfg(not(feature = "mutants"))]
        false
    }
}

#[derive(Clone, Debug)]
struct Place {
    holding: Option<Holding>,
    version: u32,
    /// In the order of expiry; on a free place `next_due` is the next free one.
    previous_due: u32,
    next_due: u32,
    previous_own: u32,
    next_own: u32,
}

/// Leases, or reservations: found by versioned id, by client, and in the order in which they expire.
///
/// All of one table live equally long, so the order of expiry is the order of arrival.
#[derive(Debug, Default)]
pub(crate) struct Holdings {
    chunks: Vec<Box<[Place]>>,
    free: Option<u32>,
    due_head: Option<u32>,
    due_tail: Option<u32>,
    /// First holding of each client, by the client's place.
    own_heads: Vec<u32>,
    live: usize,
    expired: usize,
}

impl Holdings {
    pub(crate) fn insert(&mut self, holding: Holding) -> u64 {
        if self.free.is_none() {
            self.grow();
        }
        let place = self.free.expect("just grown");
        let client = holding.client as usize;
        if client >= self.own_heads.len() {
            self.own_heads.resize(client + 1, NONE);
        }
        let own_head = std::mem::replace(&mut self.own_heads[client], place);
        let due_tail = self.due_tail.replace(place);
        let slot = self.place_mut(place);
        let next_free = slot.next_due;
        slot.holding = Some(holding);
        slot.previous_due = due_tail.unwrap_or(NONE);
        slot.next_due = NONE;
        slot.previous_own = NONE;
        slot.next_own = own_head;
        let id = u64::from(place) | (u64::from(slot.version) << 32);
        self.free = (next_free != NONE).then_some(next_free);
        match due_tail {
            Some(tail) => self.place_mut(tail).next_due = place,
            None => self.due_head = Some(place),
        }
        if own_head != NONE {
            self.place_mut(own_head).previous_own = place;
        }
        self.live += 1;
        id
    }

    pub(crate) fn find(&self, id: u64) -> Option<&Holding> {
        let (place, version) = split(id);
        let slot = self.chunks.get(place as usize / CHUNK)?.get(place as usize % CHUNK)?;
        if slot.version == version {
            slot.holding.as_ref()
        } else {
            None
        }
    }

    pub(crate) fn remove(&mut self, id: u64) -> Option<Holding> {
        self.find(id)?;
        let (place, _) = split(id);
        if self
            .place(place)
            .holding
            .as_ref()
            .is_some_and(|holding| !holding.expired)
        {
            self.unlink_due(place);
        } else {
            self.expired -= 1;
        }
        let free = self.free.replace(place).unwrap_or(NONE);
        let slot = self.place_mut(place);
        let holding = slot.holding.take()?;
        let (previous, next) = (slot.previous_own, slot.next_own);
        // A version that comes round again would let a stale id pass; skip 0 so that id 0 is never valid.
        slot.version = slot.version.checked_add(1).unwrap_or(1);
        slot.next_due = free;
        if next != NONE {
            self.place_mut(next).previous_own = previous;
        }
        if previous == NONE {
            self.own_heads[holding.client as usize] = next;
        } else {
            self.place_mut(previous).next_own = next;
        }
        self.live -= 1;
        Some(holding)
    }

    /// Takes it off the order of expiry. False where it was off already.
    pub(crate) fn expire(&mut self, id: u64) -> bool {
        if self.find(id).is_none_or(|holding| holding.expired) {
            return false;
        }
        let (place, _) = split(id);
        self.unlink_due(place);
        self.place_mut(place).holding.as_mut().expect("found above").expired = true;
        self.expired += 1;
        true
    }

    /// The one that expires next.
    pub(crate) fn first_due(&self) -> Option<(u64, Time)> {
        let place = self.due_head?;
        let slot = self.place(place);
        let holding = slot.holding.as_ref().expect("listed");
        Some((u64::from(place) | (u64::from(slot.version) << 32), holding.expires))
    }

    /// The ids of one client.
    pub(crate) fn of_client(&self, client: u32) -> Vec<u64> {
        let mut ids = Vec::new();
        let mut place = self.own_heads.get(client as usize).copied().unwrap_or(NONE);
        while place != NONE {
            let slot = self.place(place);
            ids.push(u64::from(place) | (u64::from(slot.version) << 32));
            place = slot.next_own;
        }
        ids
    }

    pub(crate) fn len(&self) -> usize {
        self.live
    }

    pub(crate) fn expired(&self) -> usize {
        self.expired
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Holding> {
        self.chunks
            .iter()
            .flat_map(|chunk| chunk.iter())
            .filter_map(|place| place.holding.as_ref())
    }

    pub(crate) fn find_mut(&mut self, id: u64) -> Option<&mut Holding> {
        self.find(id)?;
        self.place_mut(split(id).0).holding.as_mut()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Holding> {
        self.chunks
            .iter_mut()
            .flat_map(|chunk| chunk.iter_mut())
            .filter_map(|place| place.holding.as_mut())
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        let places =
            self.chunks.len() * CHUNK * size_of::<Place>() + self.chunks.capacity() * size_of::<Box<[Place]>>();
        (places + self.own_heads.capacity() * size_of::<u32>()) as u64
    }

    pub(crate) fn check_invariants(&self) {
        assert_eq!(self.iter().count(), self.live, "holdings");
        assert_eq!(
            self.iter().filter(|holding| holding.expired).count(),
            self.expired,
            "expired holdings"
        );
        let mut due = 0;
        let mut previous = Time::ZERO;
        let mut place = self.due_head;
        while let Some(current) = place {
            let slot = self.place(current);
            let holding = slot.holding.as_ref().expect("a due place holds");
            assert!(!holding.expired && holding.expires >= previous, "order of expiry");
            previous = holding.expires;
            due += 1;
            place = (slot.next_due != NONE).then_some(slot.next_due);
        }
        assert_eq!(due + self.expired, self.live, "due and expired holdings");
    }

    fn place(&self, place: u32) -> &Place {
        &self.chunks[place as usize / CHUNK][place as usize % CHUNK]
    }

    fn place_mut(&mut self, place: u32) -> &mut Place {
        &mut self.chunks[place as usize / CHUNK][place as usize % CHUNK]
    }

    fn unlink_due(&mut self, place: u32) {
        let (previous, next) = (self.place(place).previous_due, self.place(place).next_due);
        if previous == NONE {
            self.due_head = (next != NONE).then_some(next);
        } else {
            self.place_mut(previous).next_due = next;
        }
        if next == NONE {
            self.due_tail = (previous != NONE).then_some(previous);
        } else {
            self.place_mut(next).previous_due = previous;
        }
    }

    fn grow(&mut self) {
        let first = u32::try_from(self.chunks.len() * CHUNK).expect("bounded by clients and their leases");
        let chunk: Vec<Place> = (first..)
            .take(CHUNK)
            .map(|place| Place {
                holding: None,
                version: 1,
                previous_due: NONE,
                next_due: if place as usize % CHUNK == CHUNK - 1 {
                    NONE
                } else {
                    place + 1
                },
                previous_own: NONE,
                next_own: NONE,
            })
            .collect();
        self.chunks.push(chunk.into_boxed_slice());
        self.free = Some(first);
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "an id is a place and a version of 32 bits each"
)]
fn split(id: u64) -> (u32, u32) {
    (id as u32, (id >> 32) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holding(client: u32, expires: u64) -> Holding {
        Holding::new(client, 0, 0, Time(expires))
    }

    #[test]
    fn a_stale_id_is_refused_after_its_place_is_reused() {
        let mut table = Holdings::default();
        let first = table.insert(holding(0, 1));
        assert!(table.remove(first).is_some());
        let second = table.insert(holding(0, 2));
        assert!(table.find(first).is_none() && table.remove(first).is_none());
        assert!(table.find(second).is_some());
        table.check_invariants();
    }

    #[test]
    fn a_client_finds_its_own_in_any_order_of_removal() {
        let mut table = Holdings::default();
        let ids: Vec<u64> = (0..3000)
            .map(|number| table.insert(holding(number % 3, u64::from(number))))
            .collect();
        for id in ids.iter().skip(1).step_by(3) {
            assert!(table.expire(*id));
            table.remove(*id);
        }
        assert_eq!(
            (
                table.of_client(0).len(),
                table.of_client(1).len(),
                table.of_client(2).len()
            ),
            (1000, 0, 1000)
        );
        assert_eq!(table.first_due(), Some((ids[0], Time(0))));
        table.check_invariants();
    }
}
