//! CRC32C (Castagnoli, as in iSCSI, RFC 3720 B.4), read through pointers so that it may run over memory that others
//! write.
//!
//! On x86-64 three streams of the processor's own instruction run side by side, because it takes three cycles and one
//! can begin in each; their sums are joined by a table that appends zeroes (Mark Adler, "Fast CRC32C in hardware",
//! <https://stackoverflow.com/a/17646775>).

/// CRC32C of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    // SAFETY: a slice's pointer is valid for its length.
    unsafe { crc32c_at(0, bytes.as_ptr(), bytes.len()) }
}

/// CRC32C of what summed up to `before` (0: nothing) and `length` bytes after it. If somebody writes them meanwhile, the
/// sum of no particular state.
///
/// # Safety
/// The bytes are mapped and readable while this runs. Others may write them.
pub(super) unsafe fn crc32c_at(before: u32, start: *const u8, length: usize) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has the instruction, and the caller promises the bytes.
        return unsafe { streams::crc32c_at(before, start, length) };
    }
    // SAFETY: the caller promises the bytes.
    unsafe { by_copies(before, start, length) }
}

/// Copies the bytes in chunks that stay in the first-level cache.
unsafe fn by_copies(before: u32, start: *const u8, length: usize) -> u32 {
    const CHUNK_BYTES: usize = 8 << 10;
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    let mut chunk = [0u8; CHUNK_BYTES];
    let mut done = 0;
    while done < length {
        let count = CHUNK_BYTES.min(length - done);
        // SAFETY: `done + count <= length` bytes from `start` are readable by the caller's promise; `chunk` has at
        // least `count`.
        unsafe { std::ptr::copy_nonoverlapping(start.wrapping_add(done), chunk.as_mut_ptr(), count) }
        digest.update(&chunk[..count]);
        done += count;
    }
    let sum = crc_fast::checksum_combine(
        crc_fast::CrcAlgorithm::Crc32Iscsi,
        u64::from(before),
        digest.finalize(),
        length as u64,
    );
    u32::try_from(sum).expect("a sum of 32 bits")
}

#[cfg(target_arch = "x86_64")]
mod streams {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_crc32_u8, _mm_crc32_u64, _mm_prefetch};

    /// Bytes of each of three streams: long ones while there is enough, then short ones.
    const LONG: usize = 2048;
    const SHORT: usize = 256;
    static AFTER_LONG: [[u32; 256]; 4] = zeroes_appended(LONG);
    static AFTER_SHORT: [[u32; 256]; 4] = zeroes_appended(SHORT);

    /// # Safety
    /// `length` bytes from `start` are readable.
    #[target_feature(enable = "sse4.2")]
    pub(super) unsafe fn crc32c_at(before: u32, start: *const u8, length: usize) -> u32 {
        let mut sum = !before;
        let mut at = start;
        let mut left = length;
        while left > 0 && !at.cast::<u64>().is_aligned() {
            // SAFETY: `left` bytes from `at` are readable.
            sum = _mm_crc32_u8(sum, unsafe { at.read_volatile() });
            at = at.wrapping_add(1);
            left -= 1;
        }
        for (lane, table) in [(LONG, &AFTER_LONG), (SHORT, &AFTER_SHORT)] {
            while left >= 3 * lane {
                // SAFETY: `3 * lane` bytes from `at` are readable, and `at` is aligned.
                sum = unsafe { three(sum, at, lane, table) };
                at = at.wrapping_add(3 * lane);
                left -= 3 * lane;
            }
        }
        let mut wide = u64::from(sum);
        while left >= 8 {
            // SAFETY: 8 bytes from `at` are readable, and `at` is aligned.
            wide = _mm_crc32_u64(wide, unsafe { at.cast::<u64>().read_volatile() });
            at = at.wrapping_add(8);
            left -= 8;
        }
        sum = low(wide);
        while left > 0 {
            // SAFETY: `left` bytes from `at` are readable.
            sum = _mm_crc32_u8(sum, unsafe { at.read_volatile() });
            at = at.wrapping_add(1);
            left -= 1;
        }
        !sum
    }

    /// # Safety
    /// `3 * lane` bytes from `start` are readable; `start` and `lane` are multiples of 8.
    #[target_feature(enable = "sse4.2")]
    unsafe fn three(sum: u32, start: *const u8, lane: usize, table: &[[u32; 256]; 4]) -> u32 {
        let (mut first, mut second, mut third) = (u64::from(sum), 0, 0);
        let end = start.wrapping_add(lane);
        let mut at = start;
        while at < end {
            if at.addr().is_multiple_of(64) {
                // What the next round reads: memory that a device just filled is in no cache, and the streams are too short
                // for the processor to see them coming.
                for stream in 0..3 {
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add((3 + stream) * lane).cast());
                }
            }
            // SAFETY: 8 bytes of the first stream.
            first = _mm_crc32_u64(first, unsafe { at.cast::<u64>().read_volatile() });
            // SAFETY: 8 bytes of the second stream.
            second = _mm_crc32_u64(second, unsafe { at.wrapping_add(lane).cast::<u64>().read_volatile() });
            // SAFETY: 8 bytes of the third stream.
            third = _mm_crc32_u64(third, unsafe {
                at.wrapping_add(2 * lane).cast::<u64>().read_volatile()
            });
            at = at.wrapping_add(8);
        }
        let joined = append(table, low(first)) ^ low(second);
        append(table, joined) ^ low(third)
    }

    /// The instruction leaves the upper half zero.
    fn low(sum: u64) -> u32 {
        (sum & u64::from(u32::MAX)) as u32
    }

    fn append(table: &[[u32; 256]; 4], sum: u32) -> u32 {
        let [a, b, c, d] = sum.to_le_bytes();
        table[0][a as usize] ^ table[1][b as usize] ^ table[2][c as usize] ^ table[3][d as usize]
    }

    /// What appending `bytes` zero bytes (a power of two) makes of a sum, byte by byte of the sum.
    const fn zeroes_appended(bytes: usize) -> [[u32; 256]; 4] {
        const POLYNOMIAL: u32 = 0x82F6_3B78;
        assert!(bytes.is_power_of_two());
        // One zero bit, as a matrix over GF(2) of 32 columns; each squaring doubles the bits.
        let mut matrix = [0u32; 32];
        matrix[0] = POLYNOMIAL;
        let mut column = 1;
        while column < 32 {
            matrix[column] = 1 << (column - 1);
            column += 1;
        }
        let mut bits = 1;
        while bits < bytes * 8 {
            let mut square = [0u32; 32];
            column = 0;
            while column < 32 {
                square[column] = times(&matrix, matrix[column]);
                column += 1;
            }
            matrix = square;
            bits *= 2;
        }
        let mut table = [[0u32; 256]; 4];
        let mut byte = 0;
        while byte < 4 {
            let mut value = 0;
            while value < 256 {
                table[byte][value] = times(&matrix, (value as u32) << (8 * byte));
                value += 1;
            }
            byte += 1;
        }
        table
    }

    const fn times(matrix: &[u32; 32], vector: u32) -> u32 {
        let mut product = 0;
        let mut column = 0;
        while column < 32 {
            if vector >> column & 1 == 1 {
                product ^= matrix[column];
            }
            column += 1;
        }
        product
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_of_rfc_3720() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        assert_eq!(crc32c(&[]), 0);
    }

    #[test]
    fn every_length_and_alignment_sums_up_to_the_same_as_the_library() {
        let bytes: Vec<u8> = (0..70_000u32)
            .map(|at| (at.wrapping_mul(0x9E37_79B9) >> 24).to_le_bytes()[0])
            .collect();
        let lengths = (0..300).chain([
            767,
            768,
            769,
            3071,
            6143,
            6144,
            6145,
            6144 + 768,
            16_384,
            65_536,
            69_990,
        ]);
        for length in lengths {
            for start in 0..9 {
                let part = &bytes[start..start + length];
                let library = crc_fast::crc32_iscsi(part);
                assert_eq!(crc32c(part), library, "{length} bytes from {start}");
                // SAFETY: a slice's pointer is valid for its length.
                let copied = unsafe { by_copies(0, part.as_ptr(), part.len()) };
                assert_eq!(copied, library, "{length} bytes from {start}");
            }
        }
    }

    #[test]
    fn a_sum_goes_on_where_another_ended() {
        let bytes: Vec<u8> = (0..30_000u32)
            .map(|at| (at.wrapping_mul(0x85EB_CA6B) >> 24) as u8)
            .collect();
        for cut in [0, 1, 8, 767, 4096, 29_999, 30_000] {
            let (front, back) = bytes.split_at(cut);
            // SAFETY: a slice's pointer is valid for its length.
            let continued = unsafe { crc32c_at(crc32c(front), back.as_ptr(), back.len()) };
            // SAFETY: as above.
            let copied = unsafe { by_copies(crc32c(front), back.as_ptr(), back.len()) };
            assert_eq!((continued, copied), (crc32c(&bytes), crc32c(&bytes)), "cut at {cut}");
        }
    }
}
