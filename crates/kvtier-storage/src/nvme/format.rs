//! What a segment file looks like, byte by byte. Little-endian, fixed width; what is reserved is zero. Pure: no I/O.
//!
//! ```text
//! 0         4096      8192                                   end-64*n       end-64     end
//! | header  | seal    | payloads ...            | free ...  | entry n-1 ... | entry 0 |
//! ```
//!
//! Payloads start at multiples of 4 KiB and take their length rounded up to 4 KiB, nothing more: what describes them
//! lies in the index at the end of the file. The index grows downwards, entry 0 last, so that its place is known before
//! its length is, and it can be written while the segment is open. The seal page says that the segment is complete, how
//! many entries it has and what they sum up to; it is zero before. Reopening a segment therefore takes one read at the
//! front and one at the end.
//!
//! Header (page 0):
//! ```text
//!    0  8  magic "kvtier\x01H"
//!    8  4  version (1)
//!   12  4  segment id
//!   16 32  incarnation: random, drawn when the segment is opened; binds seal and entries to this life of the file
//!   48  8  file size, bytes
//!   56  8  opened at, ms since 1970
//!   64  4  encryption of payloads: 0 none
//!   68 4024  reserved
//! 4092  4  CRC32C of bytes 0..4092
//! ```
//! Seal (page 1):
//! ```text
//!    0  8  magic "kvtier\x01S"
//!    8  4  version (1)
//!   12  4  segment id
//!   16 32  incarnation
//!   48  4  entries
//!   52  4  CRC32C of the index, in file order
//!   56  8  sealed at, ms since 1970
//!   64 4028  reserved
//! 4092  4  CRC32C of bytes 0..4092
//! ```
//! Entry (64 bytes):
//! ```text
//!  0 16  fingerprint: keyed BLAKE3 of realization and prefix hash, key per namespace; never the hash itself
//! 16 16  authentication tag of an encrypted payload, else zero
//! 32  8  generation of the namespace
//! 40  4  offset of the payload in the file, in units of 4 KiB
//! 44  4  length of the payload, bytes
//! 48  4  CRC32C of the payload
//! 52  4  namespace slot
//! 56  4  flags, reserved
//! 60  4  CRC32C of the incarnation followed by bytes 0..60
//! ```

use kvtier_transfer::crc32c;

/// Payloads start and end at multiples of this.
pub const ALIGNMENT: u64 = 4096;
/// Bytes at the front of a segment file that hold no payload: header and seal pages.
pub const HEADER_BYTES: u64 = 8192;
/// Bytes at the end of a segment file for each record.
pub const ENTRY_BYTES: u64 = 64;
/// The version written and understood.
pub const VERSION: u32 = 1;

const PAGE: usize = ALIGNMENT as usize;
const HEADER_MAGIC: [u8; 8] = *b"kvtier\x01H";
const SEAL_MAGIC: [u8; 8] = *b"kvtier\x01S";

/// Drawn anew each time a segment is opened.
pub type Incarnation = [u8; 32];

/// What was read is not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not a page of this kind.
    #[error("not a {0} of a kvtier segment")]
    Magic(&'static str),
    /// Written by another version.
    #[error("version {0} is not understood, this program knows version {VERSION}")]
    Version(u32),
    /// A checksum or a reserved byte is wrong.
    #[error("damaged {0}")]
    Damaged(&'static str),
    /// Belongs to another segment or another life of this file.
    #[error("{0} of another segment or incarnation")]
    Foreign(&'static str),
    /// Bytes are missing.
    #[error("{0} too short")]
    Short(&'static str),
    /// An entry whose payload cannot lie where it says.
    #[error("entry {0} points outside the payloads or into another record")]
    Misplaced(u32),
}

/// Page 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Segment id, as in the file name.
    pub segment: u32,
    /// This life of the file.
    pub incarnation: Incarnation,
    /// File size, bytes.
    pub bytes: u64,
    /// Opened at, ms since 1970.
    pub opened_ms: u64,
}

impl Header {
    /// The page.
    #[must_use]
    pub fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[..8].copy_from_slice(&HEADER_MAGIC);
        page[8..12].copy_from_slice(&VERSION.to_le_bytes());
        page[12..16].copy_from_slice(&self.segment.to_le_bytes());
        page[16..48].copy_from_slice(&self.incarnation);
        page[48..56].copy_from_slice(&self.bytes.to_le_bytes());
        page[56..64].copy_from_slice(&self.opened_ms.to_le_bytes());
        close_page(&mut page);
        page
    }

    /// Reads a page back.
    pub fn decode(page: &[u8]) -> Result<Header, FormatError> {
        let page = open_page(page, HEADER_MAGIC, "header")?;
        if page[64..PAGE - 4].iter().any(|byte| *byte != 0) {
            return Err(FormatError::Damaged("header"));
        }
        Ok(Header {
            segment: word(page, 12),
            incarnation: array(page, 16),
            bytes: double(page, 48),
            opened_ms: double(page, 56),
        })
    }
}

/// Page 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal {
    /// Segment id.
    pub segment: u32,
    /// The life of the file that was sealed.
    pub incarnation: Incarnation,
    /// Entries in the index.
    pub entries: u32,
    /// CRC32C of the index in file order.
    pub index_checksum: u32,
    /// Sealed at, ms since 1970.
    pub sealed_ms: u64,
}

impl Seal {
    /// The page.
    #[must_use]
    pub fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[..8].copy_from_slice(&SEAL_MAGIC);
        page[8..12].copy_from_slice(&VERSION.to_le_bytes());
        page[12..16].copy_from_slice(&self.segment.to_le_bytes());
        page[16..48].copy_from_slice(&self.incarnation);
        page[48..52].copy_from_slice(&self.entries.to_le_bytes());
        page[52..56].copy_from_slice(&self.index_checksum.to_le_bytes());
        page[56..64].copy_from_slice(&self.sealed_ms.to_le_bytes());
        close_page(&mut page);
        page
    }

    /// Reads a page back; it must belong to `header`. A page of zeroes is an open segment: `None`.
    pub fn decode(page: &[u8], header: &Header) -> Result<Option<Seal>, FormatError> {
        if page.len() >= PAGE && page[..PAGE].iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let page = open_page(page, SEAL_MAGIC, "seal")?;
        if page[64..PAGE - 4].iter().any(|byte| *byte != 0) {
            return Err(FormatError::Damaged("seal"));
        }
        let seal = Seal {
            segment: word(page, 12),
            incarnation: array(page, 16),
            entries: word(page, 48),
            index_checksum: word(page, 52),
            sealed_ms: double(page, 56),
        };
        if seal.segment != header.segment || seal.incarnation != header.incarnation {
            return Err(FormatError::Foreign("seal"));
        }
        Ok(Some(seal))
    }
}

/// What the index says about one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Keyed digest that stands for the block's name.
    pub fingerprint: [u8; 16],
    /// Authentication tag of an encrypted payload, else zero.
    pub tag: [u8; 16],
    /// Of the namespace, when the block was sealed.
    pub generation: u64,
    /// Byte offset of the payload, a multiple of [`ALIGNMENT`].
    pub offset: u64,
    /// Bytes of payload.
    pub length: u32,
    /// CRC32C of the payload.
    pub checksum: u32,
    /// Owner.
    pub namespace: u32,
}

impl Entry {
    /// The bytes, bound to a life of the file.
    ///
    /// # Panics
    /// When the offset is no multiple of [`ALIGNMENT`] or past 16 TiB.
    #[must_use]
    pub fn encode(&self, incarnation: &Incarnation) -> [u8; ENTRY_BYTES as usize] {
        assert!(self.offset.is_multiple_of(ALIGNMENT), "a payload at {}", self.offset);
        let pages = u32::try_from(self.offset / ALIGNMENT).expect("segments are smaller than 16 TiB");
        let mut bytes = [0; ENTRY_BYTES as usize];
        bytes[..16].copy_from_slice(&self.fingerprint);
        bytes[16..32].copy_from_slice(&self.tag);
        bytes[32..40].copy_from_slice(&self.generation.to_le_bytes());
        bytes[40..44].copy_from_slice(&pages.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.length.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.namespace.to_le_bytes());
        let sum = entry_checksum(&bytes, incarnation);
        bytes[60..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads an entry back; it must belong to this life of the file.
    pub fn decode(bytes: &[u8], incarnation: &Incarnation) -> Result<Entry, FormatError> {
        let bytes: &[u8; ENTRY_BYTES as usize] = bytes.first_chunk().ok_or(FormatError::Short("entry"))?;
        if word(bytes, 60) != entry_checksum(bytes, incarnation) || word(bytes, 56) != 0 {
            return Err(FormatError::Damaged("entry"));
        }
        Ok(Entry {
            fingerprint: array(bytes, 0),
            tag: array(bytes, 16),
            generation: double(bytes, 32),
            offset: u64::from(word(bytes, 40)) * ALIGNMENT,
            length: word(bytes, 44),
            checksum: word(bytes, 48),
            namespace: word(bytes, 52),
        })
    }
}

fn entry_checksum(bytes: &[u8; ENTRY_BYTES as usize], incarnation: &Incarnation) -> u32 {
    let mut bound = [0; 92];
    bound[..32].copy_from_slice(incarnation);
    bound[32..].copy_from_slice(&bytes[..60]);
    crc32c(&bound)
}

/// Bytes that `length` bytes of payload take.
#[must_use]
pub fn padded(length: u64) -> u64 {
    length.next_multiple_of(ALIGNMENT)
}

/// Whether a record may lie there: aligned, behind the seal page, and before the index of at least itself.
#[must_use]
pub fn is_payload_range(file_bytes: u64, offset: u64, length: u32) -> bool {
    let end = offset.checked_add(padded(u64::from(length)));
    let limit = file_bytes.saturating_sub(ENTRY_BYTES);
    length > 0 && offset.is_multiple_of(ALIGNMENT) && offset >= HEADER_BYTES && end.is_some_and(|end| end <= limit)
}

/// Where an index of `entries` starts, rounded down to what direct I/O can write.
#[must_use]
pub fn index_start(file_bytes: u64, entries: u64) -> Option<u64> {
    let start = file_bytes.checked_sub(entries.checked_mul(ENTRY_BYTES)?)?;
    let start = start - start % ALIGNMENT;
    (start >= HEADER_BYTES).then_some(start)
}

/// The last bytes of the file, from [`index_start`] on.
#[must_use]
pub fn encode_index(entries: &[Entry], file_bytes: u64, incarnation: &Incarnation) -> Option<(Vec<u8>, u32)> {
    let start = index_start(file_bytes, entries.len() as u64)?;
    let mut bytes = vec![0; usize::try_from(file_bytes - start).ok()?];
    for (entry, place) in entries.iter().zip(bytes.rchunks_exact_mut(ENTRY_BYTES as usize)) {
        place.copy_from_slice(&entry.encode(incarnation));
    }
    let used = bytes.len() - entries.len() * ENTRY_BYTES as usize;
    let sum = crc32c(&bytes[used..]);
    Some((bytes, sum))
}

/// Reads an index back from the end of a file (`tail` may be longer than the index). Entry 0 comes first.
pub fn decode_index(tail: &[u8], header: &Header, seal: &Seal) -> Result<Vec<Entry>, FormatError> {
    let length = (seal.entries as usize)
        .checked_mul(ENTRY_BYTES as usize)
        .filter(|length| *length <= tail.len())
        .ok_or(FormatError::Short("index"))?;
    let index = &tail[tail.len() - length..];
    if crc32c(index) != seal.index_checksum {
        return Err(FormatError::Damaged("index"));
    }
    let entries: Vec<Entry> = index
        .rchunks_exact(ENTRY_BYTES as usize)
        .map(|bytes| Entry::decode(bytes, &header.incarnation))
        .collect::<Result<_, _>>()?;
    let limit = header.bytes.saturating_sub(length as u64);
    let mut places: Vec<(u64, u64, u32)> = Vec::with_capacity(entries.len());
    for (ordinal, entry) in (0..).zip(&entries) {
        let end = entry.offset + padded(u64::from(entry.length));
        if !is_payload_range(header.bytes, entry.offset, entry.length) || end > limit {
            return Err(FormatError::Misplaced(ordinal));
        }
        places.push((entry.offset, end, ordinal));
    }
    places.sort_unstable();
    match places.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        Some(pair) => Err(FormatError::Misplaced(pair[1].2)),
        None => Ok(entries),
    }
}

fn close_page(page: &mut [u8; PAGE]) {
    let sum = crc32c(&page[..PAGE - 4]);
    page[PAGE - 4..].copy_from_slice(&sum.to_le_bytes());
}

fn open_page<'page>(page: &'page [u8], magic: [u8; 8], what: &'static str) -> Result<&'page [u8; PAGE], FormatError> {
    let page: &[u8; PAGE] = page.first_chunk().ok_or(FormatError::Short(what))?;
    if page[..8] != magic {
        return Err(FormatError::Magic(what));
    }
    if word(page, PAGE - 4) != crc32c(&page[..PAGE - 4]) {
        return Err(FormatError::Damaged(what));
    }
    match word(page, 8) {
        VERSION => Ok(page),
        other => Err(FormatError::Version(other)),
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a slice of N bytes")
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn double(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

#[cfg(test)]
mod tests;
