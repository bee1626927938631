//! What was learned as bytes, to be kept across restarts and given to other nodes.
//!
//! ```text
//! offset  bytes
//!      0      8  "kvtreuse"
//!      8      2  version, 3
//!     10      2  bins of age, 34
//!     12      2  classes there could be, 6730
//!     14      2  rows n
//!     16         n rows in order of class, each
//!                 2  class
//!                34 x 4  returns by bin, f32: shares of visits
//!                34 x 4  visits times ticks at risk by bin, f32
//!    end      4  CRC32C of all before it
//! ```
//! Little-endian. Version 2, whose 1690 classes tell no answers apart, is read too: nobody had said how long they were. Counts are finite and not negative. Tables of several nodes are merged by adding them.

use super::ages::BINS;
use super::class::{CLASSES, CLASSES_OLDER, Class};
use super::tables::{Counts, Tables};

const MAGIC: &[u8; 8] = b"kvtreuse";
const VERSION: u16 = 3;
/// The version before.
const OLDER: u16 = 2;
const HEADER_BYTES: usize = 16;
const ROW_BYTES: usize = 2 + 8 * BINS;
const CHECKSUM_BYTES: usize = 4;
/// An image has less than a MiB: of more classes those are left out that were seen for the shortest time.
const ROWS_MAX: usize = 3_800;

/// What a policy learned of how visits return: counts by class and age, and nothing about any block, key or client.
#[derive(Clone, Debug, Default)]
pub struct LearnedTables {
    /// In order of class.
    rows: Vec<(Class, Counts)>,
}

/// Bytes that are no learned tables, or not of this version. What was learned is only a help: start without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Too short, too long, or not begun as an image is.
    #[error("not an image of learned tables")]
    Malformed,
    /// Written by another version.
    #[error("learned tables of another version")]
    Version,
    /// Damaged.
    #[error("learned tables fail their checksum")]
    Checksum,
}

impl LearnedTables {
    pub(super) fn of(tables: &Tables) -> LearnedTables {
        let rows = tables.counts().map(|(class, counts)| (class, counts.clone()));
        LearnedTables { rows: rows.collect() }
    }

    pub(super) fn add_to(&self, tables: &mut Tables) {
        for (class, counts) in &self.rows {
            tables.add(*class, counts);
        }
    }

    /// Adds what another node learned.
    pub fn merge(&mut self, other: &LearnedTables) {
        for (class, counts) in &other.rows {
            match self.rows.binary_search_by_key(&class.0, |(class, _)| class.0) {
                Ok(place) => self.rows[place].1.add(counts),
                Err(place) => self.rows.insert(place, (*class, counts.clone())),
            }
        }
    }

    /// Whether nothing was learned yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// How many returns were seen, as whole visits.
    #[must_use]
    pub fn returns(&self) -> f64 {
        let counts = self.rows.iter().flat_map(|(_, counts)| counts.returns);
        counts.map(f64::from).sum()
    }

    /// The image of the tables.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut rows: Vec<&(Class, Counts)> = self.rows.iter().collect();
        if rows.len() > ROWS_MAX {
            rows.sort_by(|(_, one), (_, other)| other.ticks().total_cmp(&one.ticks()));
            rows.truncate(ROWS_MAX);
            rows.sort_by_key(|(class, _)| class.0);
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + rows.len() * ROW_BYTES + CHECKSUM_BYTES);
        bytes.extend(MAGIC);
        for number in [VERSION as usize, BINS, CLASSES, rows.len()] {
            bytes.extend(u16::try_from(number).expect("a small number").to_le_bytes());
        }
        for (class, counts) in rows {
            bytes.extend(class.0.to_le_bytes());
            for count in counts.returns.iter().chain(&counts.at_risk) {
                bytes.extend(count.to_le_bytes());
            }
        }
        bytes.extend(crc32c(&bytes).to_le_bytes());
        bytes
    }

    /// Reads an image.
    ///
    /// # Errors
    /// Where the bytes are not an image of this version, whole.
    pub fn decode(bytes: &[u8]) -> Result<LearnedTables, ImageError> {
        let length = bytes.len().checked_sub(CHECKSUM_BYTES).ok_or(ImageError::Malformed)?;
        let (body, checksum) = bytes.split_at(length);
        if length < HEADER_BYTES || body[..8] != *MAGIC {
            return Err(ImageError::Malformed);
        }
        let number = |offset: usize| u16::from_le_bytes([body[offset], body[offset + 1]]);
        let classes = match number(8) {
            VERSION => CLASSES,
            OLDER => CLASSES_OLDER,
            _ => return Err(ImageError::Version),
        };
        if usize::from(number(10)) != BINS || usize::from(number(12)) != classes {
            return Err(ImageError::Version);
        }
        if length != HEADER_BYTES + usize::from(number(14)) * ROW_BYTES {
            return Err(ImageError::Malformed);
        }
        if checksum != crc32c(body).to_le_bytes() {
            return Err(ImageError::Checksum);
        }
        let mut rows: Vec<(Class, Counts)> = Vec::new();
        for row in body[HEADER_BYTES..].chunks_exact(ROW_BYTES) {
            let class = u16::from_le_bytes([row[0], row[1]]);
            if usize::from(class) >= classes {
                return Err(ImageError::Malformed);
            }
            let class = if classes == CLASSES {
                Class(class)
            } else {
                Class::of_older(class)
            };
            if rows.last().is_some_and(|(last, _)| last.0 >= class.0) {
                return Err(ImageError::Malformed);
            }
            let mut counts = row[2..]
                .chunks_exact(4)
                .map(|count| f32::from_le_bytes([count[0], count[1], count[2], count[3]]));
            let mut column = || std::array::from_fn::<f32, BINS, _>(|_| counts.next().expect("a row of counts"));
            let (returns, at_risk) = (column(), column());
            if returns
                .iter()
                .chain(&at_risk)
                .any(|count| !count.is_finite() || *count < 0.0)
            {
                return Err(ImageError::Malformed);
            }
            rows.push((class, Counts { returns, at_risk }));
        }
        Ok(LearnedTables { rows })
    }
}

/// CRC32C bit by bit: an image is written every few minutes.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |checksum, byte| {
        (0..8).fold(checksum ^ u32::from(*byte), |checksum, _| {
            (checksum >> 1) ^ if checksum & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(class: u16, count: f32) -> LearnedTables {
        let counts = Counts {
            returns: [count; BINS],
            at_risk: [count * 10.0; BINS],
        };
        LearnedTables {
            rows: vec![(Class(class), counts)],
        }
    }

    #[test]
    fn an_image_says_again_what_was_learned() {
        let mut learned = tables(7, 2.0);
        learned.merge(&tables(3, 1.5));
        learned.merge(&tables(7, 0.5));
        let bytes = learned.encode();
        assert_eq!(bytes.len(), 16 + 2 * (2 + 8 * 34) + 4);
        let again = LearnedTables::decode(&bytes).expect("an image");
        assert_eq!(again.encode(), bytes);
        let classes: Vec<u16> = again.rows.iter().map(|(class, _)| class.0).collect();
        assert_eq!(classes, [3, 7]);
        assert_eq!(again.rows[1].1.returns[5].to_bits(), 2.5_f32.to_bits());
    }

    #[test]
    fn an_image_of_every_class_has_less_than_a_mebibyte_and_what_was_seen_longest() {
        let mut learned = LearnedTables::default();
        for class in (0..CLASSES as u16).rev() {
            learned.merge(&tables(class, f32::from(class)));
        }
        let bytes = learned.encode();
        assert!(bytes.len() < 1 << 20, "{}", bytes.len());
        let again = LearnedTables::decode(&bytes).expect("an image");
        let classes: Vec<u16> = again.rows.iter().map(|(class, _)| class.0).collect();
        let expected: Vec<u16> = (CLASSES as u16 - ROWS_MAX as u16..CLASSES as u16).collect();
        assert_eq!(classes, expected);
    }

    #[test]
    fn merging_is_the_same_in_any_order() {
        let parts = [tables(1, 1.0), tables(2, 2.0), tables(1, 4.0)];
        let sum = |order: [usize; 3]| {
            let mut sum = LearnedTables::default();
            order.iter().for_each(|part| sum.merge(&parts[*part]));
            sum.encode()
        };
        assert_eq!(sum([0, 1, 2]), sum([2, 1, 0]));
    }

    #[test]
    fn no_bit_of_an_image_may_be_wrong_and_no_byte_missing() {
        let bytes = tables(7, 2.0).encode();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(LearnedTables::decode(&damaged).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(LearnedTables::decode(&bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn an_image_that_tells_no_answers_apart_is_read_as_one_of_which_nobody_said_them() {
        let older = |classes: u16| {
            let mut bytes = tables(1_679, 2.0).encode();
            let ending = tables(1_680, 3.0).encode();
            bytes.truncate(HEADER_BYTES + ROW_BYTES);
            bytes.extend(&ending[HEADER_BYTES..HEADER_BYTES + ROW_BYTES]);
            for (offset, number) in [(8, OLDER), (12, classes), (14, 2)] {
                bytes[offset..offset + 2].copy_from_slice(&number.to_le_bytes());
            }
            bytes.extend(crc32c(&bytes).to_le_bytes());
            LearnedTables::decode(&bytes)
        };
        let learned = older(1_690).expect("an image");
        let last = Class(1_679 * 4);
        assert_eq!(last.values(), [6, 7, 5, 4, 0]);
        assert_eq!((learned.rows[0].0, learned.rows[1].0), (last, Class::PARTIAL));
        assert_eq!(learned.returns().round(), 170.0);
        assert_eq!(older(1_689).err(), Some(ImageError::Version));
        let again = LearnedTables::decode(&learned.encode()).expect("an image of this version");
        assert_eq!(again.rows[0].0, last);
    }

    #[test]
    fn an_image_of_another_version_is_refused() {
        let mut bytes = tables(7, 2.0).encode();
        bytes[8..10].copy_from_slice(&1_u16.to_le_bytes());
        let body = bytes.len() - CHECKSUM_BYTES;
        let checksum = crc32c(&bytes[..body]).to_le_bytes();
        bytes[body..].copy_from_slice(&checksum);
        assert_eq!(LearnedTables::decode(&bytes).err(), Some(ImageError::Version));
    }

    #[test]
    fn counts_that_cannot_be_are_refused() {
        for count in [f32::NAN, f32::INFINITY, -1.0] {
            let bytes = tables(7, count).encode();
            assert_eq!(LearnedTables::decode(&bytes).err(), Some(ImageError::Malformed));
        }
    }

    #[test]
    fn the_checksum_is_crc32c() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
