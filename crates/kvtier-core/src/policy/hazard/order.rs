//! Orders of blocks by level, in constant time.

use super::super::{BlockId, ListId, Plane, Verdict};

const CHUNK: usize = 4096;
const NIL: u32 = u32::MAX;

/// Levels of an order, from what goes first to what goes last.
pub(in crate::policy::hazard) const LEVELS: usize = 240;

const PARKED: u8 = 0xfd;
const SHELVED: u8 = 0xfe;
const ABSENT: u8 = 0xff;

/// At which end of its level a block joins.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Newest,
    Oldest,
}

/// A block's neighbours, and where it is: list in the upper 24 bits, level or state in the lower 8.
#[derive(Clone, Copy, Debug)]
struct Node {
    newer: u32,
    older: u32,
    place: u32,
}

impl Node {
    const ABSENT: Node = Node {
        newer: NIL,
        older: NIL,
        place: ABSENT as u32,
    };

    fn list(self) -> usize {
        (self.place >> 8) as usize
    }

    fn slot(self) -> u8 {
        self.place.to_le_bytes()[0]
    }
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    newest: u32,
    oldest: u32,
    blocks: u32,
}

const EMPTY: Ends = Ends {
    newest: NIL,
    oldest: NIL,
    blocks: 0,
};

#[derive(Debug)]
struct Order {
    /// Bit n: level n has blocks.
    used: [u128; 2],
    levels: Box<[Ends]>,
    parked: Ends,
    /// Parked and shelved blocks too.
    length: u32,
}

impl Default for Order {
    fn default() -> Order {
        Order {
            used: [0; 2],
            levels: Box::default(),
            parked: EMPTY,
            length: 0,
        }
    }
}

/// The lists of one plane. The nodes are chunked by the block's place.
#[derive(Debug, Default)]
struct PlaneOrders {
    chunks: Vec<Option<Box<[Node]>>>,
    lists: Vec<Order>,
}

/// All lists: of each, blocks by level, and within a level from the oldest to the newest.
#[derive(Debug, Default)]
pub(super) struct Orders {
    planes: [PlaneOrders; 3],
}

fn plane(plane: Plane) -> usize {
    match plane {
        Plane::Host => 0,
        Plane::Nvme => 1,
        Plane::Namespace => 2,
    }
}

impl Orders {
    pub(super) fn insert(&mut self, list: ListId, block: BlockId, level: u8, end: End) {
        self.planes[plane(list.plane)].insert(list.index, block.0, level, end);
    }

    /// Just before `newer`, where that is on this level of the list; else the newest.
    pub(super) fn insert_beside(&mut self, list: ListId, block: BlockId, level: u8, newer: Option<BlockId>) {
        let orders = &mut self.planes[plane(list.plane)];
        match newer {
            Some(BlockId(newer)) if orders.node(newer).place == list.index << 8 | u32::from(level) => {
                orders.insert_before(block.0, newer);
            }
            _ => orders.insert(list.index, block.0, level, End::Newest),
        }
    }

    pub(super) fn remove(&mut self, list: ListId, block: BlockId) {
        let orders = &mut self.planes[plane(list.plane)];
        assert_eq!(
            orders.node(block.0).list(),
            list.index as usize,
            "block {} is on another list",
            block.0
        );
        orders.remove(block.0);
    }

    pub(super) fn shelve(&mut self, list: ListId, block: BlockId) {
        self.planes[plane(list.plane)].set_aside(block.0, SHELVED);
    }

    /// Back to the oldest end of its level, where it was parked or shelved.
    pub(super) fn unpark(&mut self, list: ListId, block: BlockId, level: u8) {
        let orders = &mut self.planes[plane(list.plane)];
        if matches!(orders.node(block.0).slot(), PARKED | SHELVED) {
            orders.remove(block.0);
            orders.insert(list.index, block.0, level, End::Oldest);
        }
    }

    /// To an end of another level, on every plane where it is in order.
    pub(super) fn move_to(&mut self, block: BlockId, level: u8, end: End) {
        for orders in &mut self.planes {
            let node = orders.node(block.0);
            if usize::from(node.slot()) < LEVELS && node.slot() != level {
                orders.remove(block.0);
                orders.insert(node.place >> 8, block.0, level, end);
            }
        }
    }

    pub(super) fn victim(
        &mut self,
        list: ListId,
        parked: bool,
        judge: &mut dyn FnMut(BlockId) -> Verdict,
    ) -> Option<BlockId> {
        let orders = &mut self.planes[plane(list.plane)];
        loop {
            let candidate = orders.candidate(list.index, parked)?;
            let aside = match judge(BlockId(candidate)) {
                Verdict::Take => return Some(BlockId(candidate)),
                Verdict::Park => PARKED,
                Verdict::Shelve => SHELVED,
            };
            assert!(
                !parked || aside == SHELVED,
                "where parked blocks count, none is parked again"
            );
            orders.set_aside(candidate, aside);
        }
    }

    /// Who would be judged next: in order, or else parked.
    pub(super) fn next(&self, list: ListId) -> Option<BlockId> {
        let orders = &self.planes[plane(list.plane)];
        let candidate = orders.candidate(list.index, false);
        candidate.or_else(|| orders.candidate(list.index, true)).map(BlockId)
    }

    pub(super) fn contains(&self, list: ListId, block: BlockId) -> bool {
        let node = self.planes[plane(list.plane)].node(block.0);
        node.slot() != ABSENT && node.list() == list.index as usize
    }

    pub(super) fn is_listed(&self, block: BlockId) -> bool {
        self.planes.iter().any(|orders| orders.node(block.0).slot() != ABSENT)
    }

    pub(super) fn length(&self, list: ListId) -> usize {
        let lists = &self.planes[plane(list.plane)].lists;
        lists.get(list.index as usize).map_or(0, |order| order.length as usize)
    }

    /// Blocks of the list in order on lower levels than this one.
    pub(super) fn below(&self, list: ListId, level: u8) -> usize {
        let lists = &self.planes[plane(list.plane)].lists;
        lists.get(list.index as usize).map_or(0, |order| {
            let levels = order.levels.iter().take(usize::from(level));
            levels.map(|ends| ends.blocks as usize).sum()
        })
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        self.planes.iter().map(PlaneOrders::memory_bytes).sum()
    }

    pub(super) fn check_invariants(&self) {
        for orders in &self.planes {
            orders.check_invariants();
        }
    }
}

impl PlaneOrders {
    fn node(&self, block: u32) -> Node {
        let chunk = self.chunks.get(block as usize / CHUNK).and_then(Option::as_ref);
        chunk.map_or(Node::ABSENT, |chunk| chunk[block as usize % CHUNK])
    }

    fn node_mut(&mut self, block: u32) -> &mut Node {
        let chunk = self.chunks[block as usize / CHUNK].as_mut();
        &mut chunk.expect("a listed block's chunk")[block as usize % CHUNK]
    }

    /// Makes room for the block's node, and counts it.
    fn enter(&mut self, list: u32, block: u32) {
        assert!(list < 1 << 24, "a list's place has 24 bits");
        let chunk = block as usize / CHUNK;
        if self.chunks.len() <= chunk {
            self.chunks.resize_with(chunk + 1, || None);
        }
        self.chunks[chunk].get_or_insert_with(|| vec![Node::ABSENT; CHUNK].into_boxed_slice());
        assert_eq!(
            self.node(block).slot(),
            ABSENT,
            "block {block} is on a list of this plane already"
        );
        if self.lists.len() <= list as usize {
            self.lists.resize_with(list as usize + 1, Order::default);
        }
        let order = &mut self.lists[list as usize];
        if order.levels.is_empty() {
            order.levels = vec![EMPTY; LEVELS].into_boxed_slice();
        }
        order.length += 1;
    }

    fn ends(&mut self, list: usize, slot: u8) -> &mut Ends {
        let order = &mut self.lists[list];
        if slot == PARKED {
            &mut order.parked
        } else {
            order.used[usize::from(slot / 128)] |= 1 << (slot % 128);
            &mut order.levels[usize::from(slot)]
        }
    }

    fn insert(&mut self, list: u32, block: u32, level: u8, end: End) {
        self.enter(list, block);
        self.join(list, block, level, end);
    }

    fn join(&mut self, list: u32, block: u32, slot: u8, end: End) {
        let ends = self.ends(list as usize, slot);
        let (newer, older) = match end {
            End::Newest => (NIL, std::mem::replace(&mut ends.newest, block)),
            End::Oldest => (std::mem::replace(&mut ends.oldest, block), NIL),
        };
        if newer == NIL && older == NIL {
            (ends.newest, ends.oldest) = (block, block);
        }
        ends.blocks += 1;
        if newer != NIL {
            self.node_mut(newer).older = block;
        }
        if older != NIL {
            self.node_mut(older).newer = block;
        }
        let place = list << 8 | u32::from(slot);
        *self.node_mut(block) = Node { newer, older, place };
    }

    fn insert_before(&mut self, block: u32, newer: u32) {
        let Node { older, place, .. } = self.node(newer);
        self.enter(place >> 8, block);
        let ends = self.ends((place >> 8) as usize, place.to_le_bytes()[0]);
        ends.blocks += 1;
        if older == NIL {
            ends.oldest = block;
        } else {
            self.node_mut(older).newer = block;
        }
        self.node_mut(newer).older = block;
        *self.node_mut(block) = Node { newer, older, place };
    }

    fn remove(&mut self, block: u32) {
        let node = self.node(block);
        self.unlink(block, node);
        *self.node_mut(block) = Node::ABSENT;
        self.lists[node.list()].length -= 1;
    }

    fn unlink(&mut self, block: u32, node: Node) {
        assert_ne!(node.slot(), ABSENT, "block {block} is on no list of this plane");
        if node.slot() == SHELVED {
            return;
        }
        let ends = self.ends(node.list(), node.slot());
        ends.blocks -= 1;
        if node.newer == NIL {
            ends.newest = node.older;
        }
        if node.older == NIL {
            ends.oldest = node.newer;
        }
        if node.newer == NIL && node.older == NIL && node.slot() != PARKED {
            self.lists[node.list()].used[usize::from(node.slot() / 128)] &= !(1 << (node.slot() % 128));
        }
        if node.newer != NIL {
            self.node_mut(node.newer).older = node.older;
        }
        if node.older != NIL {
            self.node_mut(node.older).newer = node.newer;
        }
    }

    fn set_aside(&mut self, block: u32, state: u8) {
        let node = self.node(block);
        self.unlink(block, node);
        let list = node.place >> 8;
        if state == PARKED {
            self.join(list, block, PARKED, End::Newest);
        } else {
            *self.node_mut(block) = Node {
                newer: NIL,
                older: NIL,
                place: list << 8 | u32::from(SHELVED),
            };
        }
    }

    fn candidate(&self, list: u32, parked: bool) -> Option<u32> {
        let order = self.lists.get(list as usize)?;
        if parked && order.parked.oldest != NIL {
            return Some(order.parked.oldest);
        }
        let lowest = match order.used {
            [0, upper] => 128 + upper.trailing_zeros() as usize,
            [lower, _] => lower.trailing_zeros() as usize,
        };
        order.levels.get(lowest).map(|ends| ends.oldest)
    }

    fn memory_bytes(&self) -> u64 {
        let nodes = self.chunks.iter().flatten().count() * CHUNK * size_of::<Node>();
        let chunks = self.chunks.capacity() * size_of::<Option<Box<[Node]>>>();
        let levels: usize = self.lists.iter().map(|order| order.levels.len()).sum();
        (nodes + chunks + levels * size_of::<Ends>() + self.lists.capacity() * size_of::<Order>()) as u64
    }

    fn check_invariants(&self) {
        let mut linked = 0;
        for (list, order) in self.lists.iter().enumerate() {
            let levels = (0_u8..).zip(order.levels.iter());
            for (slot, ends) in levels.chain([(PARKED, &order.parked)]) {
                let (mut block, mut newer, before) = (ends.newest, NIL, linked);
                while block != NIL {
                    let node = self.node(block);
                    assert_eq!(
                        (node.list(), node.slot(), node.newer),
                        (list, slot, newer),
                        "node of block {block}"
                    );
                    linked += 1;
                    newer = block;
                    block = node.older;
                }
                assert_eq!(ends.oldest, newer, "the oldest of a level");
                assert_eq!(ends.blocks as usize, linked - before, "blocks of a level");
                if slot != PARKED {
                    let used = order.used[usize::from(slot / 128)] >> (slot % 128) & 1 == 1;
                    assert_eq!(used, newer != NIL, "a level's bit");
                }
            }
        }
        let nodes = || self.chunks.iter().flatten().flat_map(|chunk| chunk.iter());
        let shelved = nodes().filter(|node| node.slot() == SHELVED).count();
        let present = nodes().filter(|node| node.slot() != ABSENT).count();
        assert_eq!(present, linked + shelved, "blocks in order, parked and shelved");
        let lengths: usize = self.lists.iter().map(|order| order.length as usize).sum();
        assert_eq!(lengths, present, "lengths of lists");
    }
}
