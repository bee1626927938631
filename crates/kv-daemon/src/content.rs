//! Bytes that a block of a trace must hold: made from its id at the speed of a copy, and told apart from any others.
//!
//! A block is cut into laps of 64 KiB. The words of a lap are words of one pseudo-random pad, from a place that the id and
//! the lap choose, each XORed with a mask that they choose too. Two laps of different ids or places thus differ in about
//! every byte, and one changed bit anywhere is seen, because every byte is compared. The first 8 bytes are the id itself
//! (little-endian), so that a wrong block can be named.

/// Words of the pad: one lap.
const LAP_WORDS: usize = 8 << 10;
const LAP_BYTES: usize = LAP_WORDS * 8;

/// The pad. One serves any number of threads.
#[derive(Clone, Debug)]
pub struct Content {
    /// Twice the same lap, so that any place in it begins a whole lap.
    pad: Box<[u64]>,
}

impl Default for Content {
    fn default() -> Self {
        let lap = (0..LAP_WORDS as u64).map(|word| mix(word ^ 0x6b76_7469_6572_0001));
        Content {
            pad: lap.clone().chain(lap).collect(),
        }
    }
}

impl Content {
    /// Writes the bytes of the block of `id` over all of `target`.
    pub fn fill(&self, id: u64, target: &mut [u8]) {
        for (lap, bytes) in target.chunks_mut(LAP_BYTES).enumerate() {
            let (words, mask) = self.lap(id, lap);
            let (whole, rest) = bytes.as_chunks_mut::<8>();
            for (chunk, word) in whole.iter_mut().zip(words) {
                *chunk = (word ^ mask).to_le_bytes();
            }
            let last = (words[whole.len() % LAP_WORDS] ^ mask).to_le_bytes();
            rest.copy_from_slice(&last[..rest.len()]);
        }
        let head = target.len().min(8);
        target[..head].copy_from_slice(&id.to_le_bytes()[..head]);
    }

    /// How many of `bytes` are not what the block of `id` must hold. Zero is the only good answer.
    #[must_use]
    pub fn wrong_bytes(&self, id: u64, bytes: &[u8]) -> u64 {
        if self.is_right(id, bytes) {
            return 0;
        }
        let mut right = vec![0; bytes.len()];
        self.fill(id, &mut right);
        right.iter().zip(bytes).filter(|(right, found)| right != found).count() as u64
    }

    /// The id that the head of these bytes claims, for a message about a wrong block.
    #[must_use]
    pub fn claimed_id(bytes: &[u8]) -> Option<u64> {
        bytes.first_chunk::<8>().map(|head| u64::from_le_bytes(*head))
    }

    fn is_right(&self, id: u64, bytes: &[u8]) -> bool {
        let mut different = 0;
        for (lap, bytes) in bytes.chunks(LAP_BYTES).enumerate() {
            let (words, mask) = self.lap(id, lap);
            let (whole, rest) = bytes.as_chunks::<8>();
            let skip = usize::from(lap == 0 && !whole.is_empty());
            if skip == 1 {
                different |= u64::from_le_bytes(whole[0]) ^ id;
            }
            for (chunk, word) in whole[skip..].iter().zip(&words[skip..]) {
                different |= u64::from_le_bytes(*chunk) ^ word ^ mask;
            }
            let word = if lap == 0 && whole.is_empty() {
                id
            } else {
                words[whole.len() % LAP_WORDS] ^ mask
            };
            different |= u64::from(rest != &word.to_le_bytes()[..rest.len()]);
        }
        different == 0
    }

    fn lap(&self, id: u64, lap: usize) -> (&[u64], u64) {
        let mask = mix(id.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ mix(lap as u64));
        let start = usize::try_from(mix(mask) % LAP_WORDS as u64).unwrap_or(0);
        (&self.pad[start..start + LAP_WORDS], mask)
    }
}

/// The finalizer of splitmix64: a bijection whose every output bit depends on every input bit.
fn mix(value: u64) -> u64 {
    let mut value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::{Content, LAP_BYTES};

    const LENGTHS: [usize; 9] = [0, 1, 7, 8, 9, 4096, 16384, LAP_BYTES + 13, 3 * LAP_BYTES];

    #[test]
    fn what_was_filled_is_right_and_names_its_id() {
        let content = Content::default();
        for length in LENGTHS {
            let mut bytes = vec![0xAA; length];
            content.fill(77, &mut bytes);
            assert_eq!(content.wrong_bytes(77, &bytes), 0, "{length}");
            assert_eq!(Content::claimed_id(&bytes), (length >= 8).then_some(77));
        }
    }

    #[test]
    fn one_changed_bit_anywhere_is_one_wrong_byte() {
        let content = Content::default();
        for length in LENGTHS {
            let mut bytes = vec![0; length];
            content.fill(5, &mut bytes);
            for place in (0..length).step_by(1 + length / 97) {
                bytes[place] ^= 1 << (place % 8);
                assert_eq!(content.wrong_bytes(5, &bytes), 1, "byte {place} of {length}");
                bytes[place] ^= 1 << (place % 8);
            }
        }
    }

    #[test]
    fn a_block_of_another_id_or_with_its_laps_swapped_is_wrong_in_about_every_byte() {
        let content = Content::default();
        let mut bytes = vec![0; 2 * LAP_BYTES];
        for other in [1, 2, 3, u64::MAX] {
            content.fill(other, &mut bytes);
            assert!(content.wrong_bytes(0, &bytes) > 15 * bytes.len() as u64 / 16);
        }
        content.fill(0, &mut bytes);
        bytes.rotate_left(LAP_BYTES);
        assert!(content.wrong_bytes(0, &bytes) > 15 * bytes.len() as u64 / 16);
        assert!(content.wrong_bytes(0, &vec![0; 4096]) > 4000, "zeroes are no block");
    }
}
