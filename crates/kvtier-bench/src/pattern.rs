use kvtier::BlockHash;

/// Mixes a number into one that looks random (splitmix64).
fn mixed(number: u64) -> u64 {
    let mut state = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

/// A number that looks random, the same for the same `index`.
pub(crate) fn draw(index: u64) -> u64 {
    mixed(index)
}

/// The hash of block number `index` in `stream`.
pub(crate) fn hash(stream: u64, index: u64) -> BlockHash {
    let seed = mixed(stream) ^ index;
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&mixed(seed).to_le_bytes());
    bytes[8..].copy_from_slice(&mixed(seed ^ 0xa5a5_a5a5_5a5a_5a5a).to_le_bytes());
    BlockHash(bytes)
}

/// Writes the bytes that block `index` holds: no two blocks, and no two words of a block, agree.
pub(crate) fn write(index: u64, block: &mut [u8]) {
    let first = mixed(index);
    for (position, word) in (0u64..).zip(block.chunks_exact_mut(8)) {
        word.copy_from_slice(&word_at(first, position).to_le_bytes());
    }
}

/// Whether `block` holds the bytes of block `index`.
pub(crate) fn matches(index: u64, block: &[u8]) -> bool {
    let first = mixed(index);
    (0u64..)
        .zip(block.chunks_exact(8))
        .fold(0, |difference, (position, word)| {
            difference | (u64::from_le_bytes(word.try_into().expect("eight bytes")) ^ word_at(first, position))
        })
        == 0
}

fn word_at(first: u64, position: u64) -> u64 {
    first.wrapping_add(position.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// Spoils one word in every page, so that bytes which a get should have written and did not are noticed.
pub(crate) fn spoil(block: &mut [u8]) {
    for page in block.chunks_mut(4096) {
        page[0] ^= 0xff;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_matches_its_own_number_and_no_other() {
        let mut block = vec![0; 8192];
        write(7, &mut block);
        assert!(matches(7, &block));
        assert!(!matches(8, &block));
        block[8191] ^= 1;
        assert!(!matches(7, &block));
    }

    #[test]
    fn a_spoilt_page_is_noticed_in_every_page() {
        let mut block = vec![0; 8192];
        write(7, &mut block);
        let clean = block.clone();
        spoil(&mut block);
        assert_ne!(block[..4096], clean[..4096]);
        assert_ne!(block[4096..], clean[4096..]);
    }

    #[test]
    fn hashes_of_a_stream_do_not_repeat() {
        let hashes: std::collections::BTreeSet<_> = (0..10_000)
            .map(|index| hash(1, index))
            .chain((0..10_000).map(|index| hash(2, index)))
            .collect();
        assert_eq!(hashes.len(), 20_000);
    }
}
