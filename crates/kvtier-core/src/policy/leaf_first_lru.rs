use super::{BlockId, EvictionPolicy, ListId, Plane, Verdict};
use crate::{Tier, Time};

const CHUNK: usize = 4096;
/// The two upper bits of a link's two words are its state, so a place has 31 bits.
const NIL: u32 = 0x7fff_ffff;
const UPPER: u32 = 0x8000_0000;
/// What is used within this time counts as used together, in units of 2^20 ns.
const TOGETHER: u32 = 64;

/// Least recently used goes first, but never a block before its cached children.
///
/// A candidate whose children are cached is *parked* off the order, and is next when its last child goes. Each parking is
/// paid for by the child that ends it, so choosing a victim takes constant time, whatever the length of a chain.
#[derive(Debug, Default)]
pub struct LeafFirstLru {
    planes: [PlaneLinks; 3],
    /// When each block was last used, in units of about a millisecond.
    stamps: Vec<Box<[u32]>>,
}

impl LeafFirstLru {
    /// Empty.
    #[must_use]
    pub fn new() -> LeafFirstLru {
        LeafFirstLru::default()
    }

    /// Makes room for the stamp of `block`.
    fn reach(&mut self, block: BlockId) {
        while self.stamps.len() <= block.0 as usize / CHUNK {
            self.stamps.push(vec![0; CHUNK].into_boxed_slice());
        }
    }

    fn stamp(&mut self, block: BlockId, now: Time) {
        self.reach(block);
        self.stamps[block.0 as usize / CHUNK][block.0 as usize % CHUNK] = coarse(now);
    }

    fn join(&mut self, list: ListId, block: BlockId, beside: Option<BlockId>) {
        let links = &mut self.planes[plane(list)];
        match beside {
            // A parked or shelved one has no place in the order.
            Some(newer) if links.link(newer.0).state() == State::Listed => {
                links.push_beside(list.index, block.0, newer.0);
            }
            _ => links.push(list.index, block.0, End::Newest),
        }
    }

    fn age_of(&self, block: u32, now: Time) -> u32 {
        coarse(now).wrapping_sub(self.stamps[block as usize / CHUNK][block as usize % CHUNK])
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "coarse and wrapping: only ages are compared"
)]
fn coarse(now: Time) -> u32 {
    (now.0 >> 20) as u32
}

impl EvictionPolicy for LeafFirstLru {
    fn insert(&mut self, list: ListId, block: BlockId, beside: Option<BlockId>, now: Time) {
        self.stamp(block, now);
        self.join(list, block, beside);
    }

    fn insert_oldest(&mut self, list: ListId, block: BlockId) {
        self.reach(block);
        self.planes[plane(list)].push(list.index, block.0, End::Oldest);
    }

    fn touch(&mut self, list: ListId, block: BlockId, beside: Option<BlockId>, now: Time) {
        self.stamp(block, now);
        self.planes[plane(list)].unlink(list.index, block.0);
        self.join(list, block, beside);
    }

    fn is_recent(&self, block: BlockId, now: Time) -> bool {
        self.age_of(block.0, now) <= TOGETHER
    }

    fn remove(&mut self, list: ListId, block: BlockId) {
        self.planes[plane(list)].unlink(list.index, block.0);
    }

    fn shelve(&mut self, list: ListId, block: BlockId) {
        let links = &mut self.planes[plane(list)];
        links.unlink(list.index, block.0);
        links.push(list.index, block.0, End::Shelved);
    }

    fn unpark(&mut self, list: ListId, block: BlockId) {
        let links = &mut self.planes[plane(list)];
        if matches!(links.link(block.0).state(), State::Parked | State::Shelved) {
            links.unlink(list.index, block.0);
            links.push(list.index, block.0, End::Oldest);
        }
    }

    fn victim(&mut self, list: ListId, parked: bool, judge: &mut dyn FnMut(BlockId) -> Verdict) -> Option<BlockId> {
        let links = &mut self.planes[plane(list)];
        loop {
            let order = links.lists.get(list.index as usize)?;
            let candidate = if parked && order.parked.tail != NIL {
                order.parked.tail
            } else {
                order.listed.tail
            };
            if candidate == NIL {
                return None;
            }
            let end = match judge(BlockId(candidate)) {
                Verdict::Take => return Some(BlockId(candidate)),
                Verdict::Park => End::Parked,
                Verdict::Shelve => End::Shelved,
            };
            assert!(
                !parked || matches!(end, End::Shelved),
                "where parked blocks count, none is parked again"
            );
            links.unlink(list.index, candidate);
            links.push(list.index, candidate, end);
        }
    }

    fn age(&self, list: ListId, now: Time) -> Option<u32> {
        let order = self.planes[plane(list)].lists.get(list.index as usize)?;
        let candidate = if order.listed.tail == NIL {
            order.parked.tail
        } else {
            order.listed.tail
        };
        if candidate == NIL {
            return None;
        }
        Some(self.age_of(candidate, now))
    }

    fn admit(&mut self, _block: BlockId, _tier: Tier) -> bool {
        true
    }

    fn keep(&mut self, _list: ListId, _block: BlockId, again: bool) -> bool {
        again
    }

    fn contains(&self, list: ListId, block: BlockId) -> bool {
        let links = &self.planes[plane(list)];
        links.chunks.get(block.0 as usize / CHUNK).is_some_and(Option::is_some)
            && links.link(block.0).state() != State::Absent
    }

    fn length(&self, list: ListId) -> usize {
        self.planes[plane(list)]
            .lists
            .get(list.index as usize)
            .map_or(0, |order| order.length as usize)
    }

    fn memory_bytes(&self) -> u64 {
        let stamps = self.stamps.len() * CHUNK * size_of::<u32>() + self.stamps.capacity() * size_of::<Box<[u32]>>();
        stamps as u64 + self.planes.iter().map(PlaneLinks::memory_bytes).sum::<u64>()
    }

    fn check_invariants(&self) {
        for links in &self.planes {
            links.check_invariants();
        }
    }
}

fn plane(list: ListId) -> usize {
    match list.plane {
        Plane::Host => 0,
        Plane::Nvme => 1,
        Plane::Namespace => 2,
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Listed,
    Parked,
    Shelved,
    Absent,
}

#[derive(Clone, Copy)]
enum End {
    Newest,
    Oldest,
    Parked,
    Shelved,
}

/// Neighbours of one block: towards the newest and towards the oldest. The upper bits say where the block is.
#[derive(Clone, Copy, Debug)]
struct Link {
    newer: u32,
    older: u32,
}

impl Link {
    const ABSENT: Link = Link::with(NIL, NIL, State::Absent);

    const fn with(newer: u32, older: u32, state: State) -> Link {
        match state {
            State::Listed => Link { newer, older },
            State::Parked => Link {
                newer: newer | UPPER,
                older,
            },
            State::Shelved => Link {
                newer,
                older: older | UPPER,
            },
            State::Absent => Link {
                newer: newer | UPPER,
                older: older | UPPER,
            },
        }
    }

    fn state(self) -> State {
        match (self.newer & UPPER != 0, self.older & UPPER != 0) {
            (false, false) => State::Listed,
            (true, false) => State::Parked,
            (false, true) => State::Shelved,
            (true, true) => State::Absent,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    head: u32,
    tail: u32,
}

#[derive(Clone, Copy, Debug)]
struct Order {
    listed: Ends,
    parked: Ends,
    /// Shelved blocks too.
    length: u32,
}

const EMPTY: Order = Order {
    listed: Ends { head: NIL, tail: NIL },
    parked: Ends { head: NIL, tail: NIL },
    length: 0,
};

/// The lists of one plane. Links are chunked by the block's place and allocated when a first block of the chunk is listed.
#[derive(Debug, Default)]
struct PlaneLinks {
    chunks: Vec<Option<Box<[Link]>>>,
    lists: Vec<Order>,
}

impl PlaneLinks {
    fn link(&self, block: u32) -> Link {
        self.chunks[block as usize / CHUNK]
            .as_ref()
            .expect("a listed block's chunk")[block as usize % CHUNK]
    }

    fn link_mut(&mut self, block: u32) -> &mut Link {
        &mut self.chunks[block as usize / CHUNK]
            .as_mut()
            .expect("a listed block's chunk")[block as usize % CHUNK]
    }

    /// Makes room for the block's link, and counts it.
    fn enter(&mut self, list: u32, block: u32) {
        assert!(block < NIL, "a block's place has 31 bits");
        let chunk = block as usize / CHUNK;
        if self.chunks.len() <= chunk {
            self.chunks.resize_with(chunk + 1, || None);
        }
        self.chunks[chunk].get_or_insert_with(|| vec![Link::ABSENT; CHUNK].into_boxed_slice());
        if self.lists.len() <= list as usize {
            self.lists.resize(list as usize + 1, EMPTY);
        }
        assert_eq!(
            self.link(block).state(),
            State::Absent,
            "block {block} is on a list of this plane already"
        );
        self.lists[list as usize].length += 1;
    }

    /// Just before `newer`, which is listed on this list.
    fn push_beside(&mut self, list: u32, block: u32, newer: u32) {
        self.enter(list, block);
        let older = self.link(newer).older & !UPPER;
        if older == NIL {
            let ends = &mut self.lists[list as usize].listed;
            assert_eq!(ends.tail, newer, "block {newer} is on another list");
            ends.tail = block;
        } else {
            self.link_mut(older).newer = block;
        }
        self.link_mut(newer).older = block;
        *self.link_mut(block) = Link::with(newer, older, State::Listed);
    }

    fn push(&mut self, list: u32, block: u32, end: End) {
        self.enter(list, block);
        let order = &mut self.lists[list as usize];
        let (ends, state) = match end {
            End::Newest | End::Oldest => (&mut order.listed, State::Listed),
            End::Parked => (&mut order.parked, State::Parked),
            End::Shelved => {
                *self.link_mut(block) = Link::with(NIL, NIL, State::Shelved);
                return;
            }
        };
        if matches!(end, End::Oldest) {
            let newer = std::mem::replace(&mut ends.tail, block);
            if newer == NIL {
                ends.head = block;
            } else {
                self.link_mut(newer).older = block;
            }
            *self.link_mut(block) = Link::with(newer, NIL, state);
        } else {
            let older = std::mem::replace(&mut ends.head, block);
            if older == NIL {
                ends.tail = block;
            } else {
                let link = self.link_mut(older);
                link.newer = block | (link.newer & UPPER);
            }
            *self.link_mut(block) = Link::with(NIL, older, state);
        }
    }

    fn unlink(&mut self, list: u32, block: u32) {
        let link = self.link(block);
        let state = link.state();
        assert_ne!(state, State::Absent, "block {block} is on no list of this plane");
        *self.link_mut(block) = Link::ABSENT;
        let order = &mut self.lists[list as usize];
        order.length -= 1;
        let ends = match state {
            State::Parked => &mut order.parked,
            State::Listed => &mut order.listed,
            State::Shelved | State::Absent => return,
        };
        let (newer, older) = (link.newer & !UPPER, link.older & !UPPER);
        if newer == NIL {
            assert_eq!(ends.head, block, "block {block} is on another list");
            ends.head = older;
        }
        if older == NIL {
            assert_eq!(ends.tail, block, "block {block} is on another list");
            ends.tail = newer;
        }
        if newer != NIL {
            let link = self.link_mut(newer);
            link.older = older | (link.older & UPPER);
        }
        if older != NIL {
            let link = self.link_mut(older);
            link.newer = newer | (link.newer & UPPER);
        }
    }

    fn memory_bytes(&self) -> u64 {
        let links = self.chunks.iter().flatten().count() * CHUNK * size_of::<Link>();
        let chunks = self.chunks.capacity() * size_of::<Option<Box<[Link]>>>();
        (links + chunks + self.lists.capacity() * size_of::<Order>()) as u64
    }

    fn check_invariants(&self) {
        let mut listed = 0;
        for order in &self.lists {
            for (ends, state) in [(order.listed, State::Listed), (order.parked, State::Parked)] {
                let (mut block, mut newer) = (ends.head, NIL);
                while block != NIL {
                    let link = self.link(block);
                    assert_eq!(
                        (link.state(), link.newer & !UPPER),
                        (state, newer),
                        "links of block {block}"
                    );
                    listed += 1;
                    newer = block;
                    block = link.older & !UPPER;
                }
                assert_eq!(ends.tail, newer, "tail of a list");
            }
        }
        let links = || self.chunks.iter().flatten().flat_map(|chunk| chunk.iter());
        let shelved = links().filter(|link| link.state() == State::Shelved).count();
        let present = links().filter(|link| link.state() != State::Absent).count();
        assert_eq!(present, listed + shelved, "listed, parked and shelved blocks");
        assert_eq!(
            self.lists.iter().map(|order| order.length as usize).sum::<usize>(),
            present,
            "lengths of lists"
        );
    }
}

#[cfg(test)]
mod tests;
