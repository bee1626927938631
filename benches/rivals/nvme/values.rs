use std::sync::Arc;

use bytes::Bytes;
use kvtier_transfer::memory::{HUGE_PAGE_BYTES, MemoryRegion, MemorySlice, PageRequest, crc32c};

use crate::cache::Read;

/// Bytes of every value.
pub(crate) const VALUE_BYTES: usize = 1 << 20;

/// What is put, made before anything is measured: no two values agree, and no word repeats.
///
/// They lie where their cache wants them, so that no put begins with a copy. An index begins again at the end.
pub(crate) struct Values {
    held: Held,
    checksums: Vec<u32>,
}

enum Held {
    /// For ours: a region such as host memory is.
    Blocks(Blocks),
    /// For foyer: buffers that can be shared.
    Buffers(Vec<Bytes>),
}

/// A populated region of blocks of [`VALUE_BYTES`], made as the host tier makes its segments.
pub(crate) struct Blocks {
    region: Arc<MemoryRegion>,
}

impl Blocks {
    pub(crate) fn new(count: usize) -> anyhow::Result<Blocks> {
        let bytes = (count * VALUE_BYTES).next_multiple_of(HUGE_PAGE_BYTES);
        let (region, _) = MemoryRegion::create("rivals", bytes, PageRequest::Auto)?;
        region.prefault(&|_| {})?;
        Ok(Blocks { region })
    }

    pub(crate) fn count(&self) -> usize {
        self.region.bytes() / VALUE_BYTES
    }

    /// The `index`th block; it begins again at the end.
    pub(crate) fn block(&self, index: usize) -> MemorySlice {
        self.region
            .slice(index % self.count() * VALUE_BYTES, VALUE_BYTES)
            .expect("a block of the region")
    }
}

impl Values {
    pub(crate) fn new(count: usize, as_blocks: bool) -> anyhow::Result<Values> {
        let values = (0..count as u64).map(value);
        let mut checksums = Vec::with_capacity(count);
        let held = if as_blocks {
            let blocks = Blocks::new(count)?;
            for (index, value) in values.enumerate() {
                checksums.push(crc32c(&value));
                blocks.block(index).copy_from_slice(&value)?;
            }
            Held::Blocks(blocks)
        } else {
            Held::Buffers(
                values
                    .inspect(|value| checksums.push(crc32c(value)))
                    .map(Bytes::from)
                    .collect(),
            )
        };
        Ok(Values { held, checksums })
    }

    pub(crate) fn count(&self) -> usize {
        self.checksums.len()
    }

    pub(crate) fn block(&self, index: usize) -> MemorySlice {
        match &self.held {
            Held::Blocks(blocks) => blocks.block(index % self.count()),
            Held::Buffers(_) => unreachable!("made as buffers"),
        }
    }

    pub(crate) fn buffer(&self, index: usize) -> Bytes {
        match &self.held {
            Held::Buffers(buffers) => buffers[index % self.count()].clone(),
            Held::Blocks(_) => unreachable!("made as blocks"),
        }
    }

    /// Whether these are the bytes of value `index`, going by their checksum: readers of both sides sum up all that they
    /// were given.
    pub(crate) fn compare(&self, index: usize, checksum: u32) -> Read {
        if self.checksums[index] == checksum {
            Read::Right
        } else {
            Read::Wrong
        }
    }
}

/// A number that looks random, the same for the same `index` (splitmix64).
pub(crate) fn draw(index: u64) -> u64 {
    let mut state = index.wrapping_add(0x9e37_79b9_7f4a_7c15);
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

/// The numbers below `count` in an order that `seed` fixes.
pub(crate) fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        let other = draw((seed << 32) ^ last as u64) % (last as u64 + 1);
        order.swap(last, other as usize);
    }
    order
}

fn value(index: u64) -> Vec<u8> {
    let first = draw(index);
    (0..VALUE_BYTES as u64 / 8)
        .flat_map(|position| {
            first
                .wrapping_add(position.wrapping_mul(0x9e37_79b9_7f4a_7c15))
                .to_le_bytes()
        })
        .collect()
}
