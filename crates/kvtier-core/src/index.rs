use crate::key_map::{KeyMap, fold};
use crate::{BlockHash, BlockKey, NamespaceId, RealizationId};

/// No block, segment, slot or list element.
pub(crate) const NONE: u32 = u32::MAX;

/// Entries are allocated this many at a time and never move.
const CHUNK: usize = 4096;

/// What an entry is going through.
pub(crate) mod flag {
    /// In use (not on the free list).
    pub(crate) const LIVE: u16 = 1;
    /// The checksum is known.
    pub(crate) const CHECKSUM: u16 = 1 << 1;
    /// A demotion is in flight.
    pub(crate) const DEMOTING: u16 = 1 << 2;
    /// A relocation is in flight.
    pub(crate) const RELOCATING: u16 = 1 << 3;
    /// A promotion waits or is in flight.
    pub(crate) const PROMOTING: u16 = 1 << 4;
    /// Used while its demotion was in flight.
    pub(crate) const USED: u16 = 1 << 5;
    /// The host copy is on its group's clean list: it may be dropped at once.
    pub(crate) const CLEAN: u16 = 1 << 6;
    /// The NVMe copy is on the list of redundant ones: the host copy is in use.
    pub(crate) const REDUNDANT: u16 = 1 << 7;
    /// On the list of its namespace, which has a quota.
    pub(crate) const ENROLLED: u16 = 1 << 8;
    /// Leased since its NVMe record was written.
    pub(crate) const AGAIN: u16 = 1 << 9;
    /// A restart found it without the parent that it names.
    pub(crate) const ORPHANED: u16 = 1 << 10;
    /// Its record names fewer labels than it counts as put under.
    pub(crate) const UNDERSTATED: u16 = 1 << 11;
    /// Read from NVMe for nobody, and not asked for since.
    pub(crate) const PREFETCHED: u16 = 1 << 12;
    /// Fetched by somebody who could have read it from device memory.
    pub(crate) const TO_DEVICE: u16 = 1 << 13;
}

/// One block: its key, its parent, where its copies lie. One cache line.
///
/// A block that was forgotten while its children were cached stays as a *ghost*, with no copies, until the last child
/// goes: `parent` of a child is a place in the index and must not be reused.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(crate) struct Entry {
    pub(crate) hash: BlockHash,
    pub(crate) namespace: u32,
    /// How often the namespace's generation had been raised when the block was sealed.
    pub(crate) epoch: u32,
    /// Place of the parent; on a free entry the next free one.
    pub(crate) parent: u32,
    /// Entries that name this one as their parent.
    pub(crate) children: u32,
    pub(crate) length: u32,
    pub(crate) host_segment: u32,
    pub(crate) host_slot: u32,
    pub(crate) nvme_segment: u32,
    /// Offset on NVMe in units of 4 KiB.
    pub(crate) nvme_page: u32,
    pub(crate) checksum: u32,
    pub(crate) realization: u16,
    /// Saturating.
    pub(crate) tokens: u16,
    pub(crate) flags: u16,
    /// Place of its labels in the table of its namespace; 0: none.
    pub(crate) labels: u16,
}

impl Entry {
    const FREE: Entry = Entry {
        hash: BlockHash([0; 16]),
        namespace: 0,
        epoch: 0,
        parent: NONE,
        children: 0,
        length: 0,
        host_segment: NONE,
        host_slot: NONE,
        nvme_segment: NONE,
        nvme_page: 0,
        checksum: 0,
        realization: 0,
        tokens: 0,
        flags: 0,
        labels: 0,
    };

    pub(crate) fn is(&self, flags: u16) -> bool {
        self.flags & flags != 0
    }

    pub(crate) fn set(&mut self, flags: u16) {
        self.flags |= flags;
    }

    pub(crate) fn clear(&mut self, flags: u16) {
        self.flags &= !flags;
    }

    pub(crate) fn in_host(&self) -> bool {
        self.host_segment != NONE
    }

    pub(crate) fn on_nvme(&self) -> bool {
        self.nvme_segment != NONE
    }

    /// Neither copy is left: only the children hold the entry.
    pub(crate) fn is_ghost(&self) -> bool {
        !self.in_host() && !self.on_nvme()
    }
}

/// Key -> block: 64 bytes an entry in chunks that never move, and 5 bytes a bucket in the lookup table.
#[derive(Debug)]
pub(crate) struct BlockIndex {
    seed: u64,
    chunks: Vec<Box<[Entry]>>,
    free: u32,
    live: usize,
    table: KeyMap<u32>,
}

impl BlockIndex {
    pub(crate) fn new(seed: u64) -> BlockIndex {
        BlockIndex {
            seed,
            chunks: Vec::new(),
            free: NONE,
            live: 0,
            table: KeyMap::default(),
        }
    }

    pub(crate) fn entry(&self, block: u32) -> &Entry {
        &self.chunks[block as usize / CHUNK][block as usize % CHUNK]
    }

    pub(crate) fn entry_mut(&mut self, block: u32) -> &mut Entry {
        &mut self.chunks[block as usize / CHUNK][block as usize % CHUNK]
    }

    /// The block of this key and epoch, ghosts included.
    pub(crate) fn find(&self, key: BlockKey, epoch: u32) -> Option<u32> {
        self.table
            .find(mix(self.seed, key), |&block| is_of(self.entry(block), key, epoch))
            .copied()
    }

    /// The blocks of many keys, [`NONE`] where there is none.
    ///
    /// The table is probed for all of them before any entry is looked at: so the processor waits for many cache misses at
    /// once instead of one after the other.
    pub(crate) fn find_all(&self, scope: BlockKey, hashes: &[BlockHash], epoch: u32) -> Vec<u32> {
        let guess = |hash: &BlockHash| {
            let key = BlockKey { hash: *hash, ..scope };
            self.table.find(mix(self.seed, key), |_| true).copied().unwrap_or(NONE)
        };
        let mut blocks: Vec<u32> = hashes.iter().map(guess).collect();
        for (block, hash) in blocks.iter_mut().zip(hashes) {
            let key = BlockKey { hash: *hash, ..scope };
            if *block != NONE && !is_of(self.entry(*block), key, epoch) {
                *block = self.find(key, epoch).unwrap_or(NONE);
            }
        }
        blocks
    }

    /// The block of this key, whatever its epoch.
    #[cfg(feature = "mutants")]
    pub(crate) fn find_any_epoch(&self, key: BlockKey) -> Option<u32> {
        self.table
            .find(mix(self.seed, key), |&block| {
                let entry = self.entry(block);
                entry.hash == key.hash
                    && entry.namespace == key.namespace.0
                    && u32::from(entry.realization) == key.realization.0
                    && !entry.is_ghost()
            })
            .copied()
    }

    /// A new entry without copies. The caller made sure that the key is absent in this epoch.
    pub(crate) fn insert(&mut self, key: BlockKey, epoch: u32) -> u32 {
        if self.free == NONE {
            self.grow();
        }
        let block = self.free;
        let entry = self.entry_mut(block);
        let next = entry.parent;
        *entry = Entry {
            hash: key.hash,
            namespace: key.namespace.0,
            epoch,
            flags: flag::LIVE,
            ..Entry::FREE
        };
        entry.realization = u16::try_from(key.realization.0).expect("realizations_max is at most 65,536");
        self.free = next;
        self.live += 1;
        let BlockIndex {
            seed, chunks, table, ..
        } = self;
        table.insert(mix(*seed, key), block, |&other| {
            mix(*seed, key_of(&chunks[other as usize / CHUNK][other as usize % CHUNK]))
        });
        block
    }

    pub(crate) fn remove(&mut self, block: u32) {
        let key = key_of(self.entry(block));
        let removed = self.table.remove(mix(self.seed, key), |&other| other == block);
        assert!(removed.is_some(), "block {block} is not in the lookup table");
        let free = self.free;
        *self.entry_mut(block) = Entry {
            parent: free,
            ..Entry::FREE
        };
        self.free = block;
        self.live -= 1;
    }

    /// Names the entry's key and epoch as long as this index lives: whoever does not know the seed cannot choose one.
    pub(crate) fn fingerprint(&self, block: u32) -> u64 {
        let entry = self.entry(block);
        fold(mix(self.seed, key_of(entry)) ^ u64::from(entry.epoch), self.seed | 1)
    }

    /// Entries in use, ghosts included.
    pub(crate) fn len(&self) -> usize {
        self.live
    }

    /// Every place is below this.
    pub(crate) fn places(&self) -> u32 {
        u32::try_from(self.chunks.len() * CHUNK).expect("blocks_max is at most 2^31")
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        let entries = self.chunks.len() * CHUNK * size_of::<Entry>();
        let chunks = self.chunks.capacity() * size_of::<Box<[Entry]>>();
        (entries + chunks) as u64 + self.table.memory_bytes()
    }

    pub(crate) fn check_invariants(&self) {
        assert_eq!(self.table.len(), self.live, "lookup table and entries");
        let mut free = 0;
        let mut next = self.free;
        while next != NONE {
            assert!(!self.entry(next).is(flag::LIVE), "a free entry is live");
            next = self.entry(next).parent;
            free += 1;
        }
        assert_eq!(free + self.live, self.chunks.len() * CHUNK, "free and live entries");
    }

    fn grow(&mut self) {
        let first = self.places();
        let mut chunk = vec![Entry::FREE; CHUNK];
        for (place, entry) in (first..).zip(chunk.iter_mut()) {
            entry.parent = if place as usize % CHUNK == CHUNK - 1 {
                NONE
            } else {
                place + 1
            };
        }
        self.chunks.push(chunk.into_boxed_slice());
        self.free = first;
    }
}

fn is_of(entry: &Entry, key: BlockKey, epoch: u32) -> bool {
    entry.hash == key.hash
        && entry.namespace == key.namespace.0
        && entry.epoch == epoch
        && u32::from(entry.realization) == key.realization.0
}

pub(crate) fn key_of(entry: &Entry) -> BlockKey {
    BlockKey {
        namespace: NamespaceId(entry.namespace),
        realization: RealizationId(u32::from(entry.realization)),
        hash: entry.hash,
    }
}

/// The key is a hash already: the halves are folded with the seed, so that who does not know it cannot aim for a bucket.
fn mix(seed: u64, key: BlockKey) -> u64 {
    let value = u128::from_le_bytes(key.hash.0);
    #[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
    let (low, high) = (value as u64, (value >> 64) as u64);
    let scope = (u64::from(key.namespace.0) << 32) | u64::from(key.realization.0);
    fold(
        fold(low ^ seed, high ^ 0xa076_1d64_78bd_642f) ^ scope,
        seed.rotate_left(32) | 1,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u64) -> BlockKey {
        let mut hash = [0; 16];
        hash[..8].copy_from_slice(&number.to_le_bytes());
        BlockKey {
            hash: BlockHash(hash),
            ..BlockKey::default()
        }
    }

    #[test]
    fn an_entry_is_one_cache_line() {
        assert_eq!(size_of::<Entry>(), 64);
    }

    #[test]
    fn places_are_reused_and_never_move() {
        let mut index = BlockIndex::new(7);
        let places: Vec<u32> = (0..10_000).map(|number| index.insert(key(number), 1)).collect();
        for number in (0..10_000).step_by(2) {
            index.remove(places[number]);
        }
        for number in 0..10_000_u64 {
            let found = index.find(key(number), 1);
            assert_eq!(found, (number % 2 == 1).then(|| places[number as usize]));
        }
        let hashes: Vec<BlockHash> = (0..10_000).map(|number| key(number).hash).collect();
        for (number, found) in index.find_all(key(0), &hashes, 1).into_iter().enumerate() {
            assert_eq!(found, if number % 2 == 1 { places[number] } else { NONE });
        }
        let before = index.places();
        for number in (0..10_000).step_by(2) {
            index.insert(key(number), 1);
        }
        assert_eq!(index.places(), before);
        index.check_invariants();
    }

    #[test]
    fn one_key_may_live_in_two_epochs() {
        let mut index = BlockIndex::new(7);
        let old = index.insert(key(1), 1);
        let new = index.insert(key(1), 2);
        assert_eq!((index.find(key(1), 1), index.find(key(1), 2)), (Some(old), Some(new)));
    }
}
