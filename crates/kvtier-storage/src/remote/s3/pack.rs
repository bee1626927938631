//! What a pack looks like, byte by byte: objects that were put together, one behind the other, and before them where each lies.
//! Little-endian, fixed width; what is reserved is zero.
//!
//! ```text
//! 0        32            32 + 24 n                          end
//! | header | entry 0 ... | object 0 | object 1 | ...           |
//! ```
//!
//! Header:
//! ```text
//!  0  8  magic "kvtier\x01P"
//!  8  4  version (1)
//! 12  4  entries n, at least 1
//! 16  4  CRC32C of the header, with zeroes here, and of the entries
//! 20 12  reserved
//! ```
//! Entry:
//! ```text
//!  0 16  name
//! 16  4  bytes of the object
//! 20  4  reserved
//! ```
//!
//! Nothing here is secret, and nothing is believed: an object that is somewhere else than its entry says does not open.

use kvtier_transfer::crc32c;

use crate::remote::ObjectName;

const MAGIC: [u8; 8] = *b"kvtier\x01P";
const VERSION: u32 = 1;
const HEADER: usize = 32;
const ENTRY: usize = 24;
/// Entries of one pack, at most.
pub(super) const ENTRIES_MAX: usize = 1 << 16;

/// Where an object lies in its pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: ObjectName,
    pub(super) offset: u64,
    pub(super) length: u32,
}

/// What the front of a pack says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Front {
    Entries(Vec<Entry>),
    /// It has so many bytes, more than were given.
    Longer(usize),
}

/// A pack of these objects, and where each lies.
///
/// # Panics
/// When there is none, or more than [`ENTRIES_MAX`], or one of 4 GiB.
pub(super) fn encode(objects: &[(ObjectName, Vec<u8>)]) -> (Vec<u8>, Vec<Entry>) {
    assert!((1..=ENTRIES_MAX).contains(&objects.len()), "{} objects", objects.len());
    let front = HEADER + ENTRY * objects.len();
    let total: usize = objects.iter().map(|(_, object)| object.len()).sum();
    let (mut pack, mut entries) = (Vec::with_capacity(front + total), Vec::with_capacity(objects.len()));
    pack.extend_from_slice(&MAGIC);
    pack.extend_from_slice(&VERSION.to_le_bytes());
    pack.extend_from_slice(&u32::try_from(objects.len()).expect("few").to_le_bytes());
    pack.resize(HEADER, 0);
    let mut offset = front as u64;
    for (name, object) in objects {
        let length = u32::try_from(object.len()).expect("less than 4 GiB");
        pack.extend_from_slice(&name.0);
        pack.extend_from_slice(&length.to_le_bytes());
        pack.extend_from_slice(&[0; 4]);
        entries.push(Entry {
            name: *name,
            offset,
            length,
        });
        offset += u64::from(length);
    }
    let checksum = crc32c(&pack);
    pack[16..20].copy_from_slice(&checksum.to_le_bytes());
    objects.iter().for_each(|(_, object)| pack.extend_from_slice(object));
    (pack, entries)
}

/// Of the first bytes of a pack of `bytes`. `None`: it is none of ours, or damaged.
pub(super) fn decode(front: &[u8], bytes: u64) -> Option<Front> {
    let header: &[u8; HEADER] = front.first_chunk()?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let count = word(12) as usize;
    let is_ours = header[..8] == MAGIC && word(8) == VERSION && header[20..] == [0; 12];
    if !is_ours || !(1..=ENTRIES_MAX).contains(&count) {
        return None;
    }
    let length = HEADER + ENTRY * count;
    let Some(front) = front.get(..length) else {
        return Some(Front::Longer(length)).filter(|_| length as u64 <= bytes);
    };
    let mut checked = front.to_vec();
    checked[16..20].fill(0);
    if crc32c(&checked) != word(16) {
        return None;
    }
    let (mut entries, mut offset) = (Vec::with_capacity(count), length as u64);
    for entry in front[HEADER..].chunks_exact(ENTRY) {
        let entry: &[u8; ENTRY] = entry.first_chunk()?;
        let length = u32::from_le_bytes([entry[16], entry[17], entry[18], entry[19]]);
        if entry[20..] != [0; 4] {
            return None;
        }
        entries.push(Entry {
            name: ObjectName(*entry.first_chunk()?),
            offset,
            length,
        });
        offset += u64::from(length);
    }
    (offset == bytes).then_some(Front::Entries(entries))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(lengths: &[usize]) -> Vec<(ObjectName, Vec<u8>)> {
        let object = |(number, length): (usize, &usize)| (ObjectName([number as u8; 16]), vec![number as u8; *length]);
        lengths.iter().enumerate().map(object).collect()
    }

    #[test]
    fn what_was_packed_lies_where_its_entry_says() {
        let objects = objects(&[100, 0, 70_000, 1]);
        let (pack, entries) = encode(&objects);
        assert_eq!(decode(&pack, pack.len() as u64), Some(Front::Entries(entries.clone())));
        for ((name, object), entry) in objects.iter().zip(&entries) {
            let from = usize::try_from(entry.offset).expect("small");
            assert_eq!(*name, entry.name);
            assert_eq!(&pack[from..from + entry.length as usize], object.as_slice());
        }
    }

    #[test]
    fn a_front_that_is_longer_than_what_was_read_says_so() {
        let (pack, entries) = encode(&objects(&[5; 200]));
        let longer = 32 + 24 * 200;
        for given in [32, 33, longer - 1] {
            assert_eq!(
                decode(&pack[..given], pack.len() as u64),
                Some(Front::Longer(longer)),
                "{given}"
            );
        }
        assert_eq!(
            decode(&pack[..longer], pack.len() as u64),
            Some(Front::Entries(entries))
        );
        assert_eq!(decode(&pack[..31], pack.len() as u64), None);
    }

    #[test]
    fn every_flipped_bit_of_the_front_is_refused() {
        let (pack, _) = encode(&objects(&[10, 20, 30]));
        let front = 32 + 24 * 3;
        for bit in 0..front * 8 {
            let mut damaged = pack.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let decoded = decode(&damaged, pack.len() as u64);
            assert!(!matches!(decoded, Some(Front::Entries(_))), "bit {bit}");
        }
    }

    #[test]
    fn a_pack_of_another_length_is_refused() {
        let (pack, _) = encode(&objects(&[10, 20]));
        assert_eq!(decode(&pack, pack.len() as u64 - 1), None);
        assert_eq!(decode(&pack, pack.len() as u64 + 1), None);
        // A front that claims more than the whole pack has.
        assert_eq!(decode(&pack[..32], 40), None);
        assert_eq!(decode(b"", 0), None);
    }
}
