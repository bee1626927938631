//! What a segment file looks like, byte by byte. Little-endian, fixed width; what is reserved is zero. Pure: no I/O, no
//! key.
//!
//! ```text
//! 0         4096      8192                                   end-128*n      end-128    end
//! | header  | seal    | payloads ...            | free ...  | entry n-1 ... | entry 0 |
//! ```
//!
//! Payloads start at multiples of 4 KiB and take their length rounded up to 4 KiB, nothing more: what describes them
//! lies in the index at the end of the file. The index grows downwards, entry 0 last, so that its place is known before
//! its length is, and its pages are written while the segment is open, each time the tier is synced. The seal page says
//! that the segment is complete and how many entries it has; it is zero before. Reopening a sealed segment therefore
//! takes one read at the front and one at the end; of an open one all of the file's end where entries may lie is read.
//! Entries stand in the order in which their writes ended. One that is zero is no record: its block was deleted.
//!
//! Header (page 0):
//! ```text
//!    0  8  magic "kvtier\x01H"
//!    8  4  version (3; 2 is read)
//!   12  4  segment id
//!   16 32  incarnation: random, drawn when the segment is opened; binds seal and entries to this life of the file, and
//!          salts the keys of its records
//!   48  8  file size, bytes
//!   56  8  opened at, ms since 1970
//!   64  4  encryption of payloads: 0 none, 1 AES-256-GCM
//!   68 4024  reserved
//! 4092  4  CRC32C of bytes 0..4092
//! ```
//! Seal (page 1):
//! ```text
//!    0  8  magic "kvtier\x01S"
//!    8  4  version, as in the header
//!   12  4  segment id
//!   16 32  incarnation
//!   48  4  entries
//!   52  4  reserved
//!   56  8  sealed at, ms since 1970
//!   64 4028  reserved
//! 4092  4  CRC32C of bytes 0..4092
//! ```
//! Entry (128 bytes) of version 3. The name is always sealed, also where payloads are not: what lies here tells nobody whose prompt it
//! was.
//! ```text
//!   0 16  authentication tag of an encrypted payload, else zero
//!  16  8  generation of the namespace
//!  24  4  namespace slot
//!  28  4  offset of the payload in the file, in units of 4 KiB: its place, and the nonce of all that is sealed of it
//!  32  4  length of the payload, bytes
//!  36  4  reserved
//!  40 64  name, AES-256-GCM; bytes 0..40 and the segment id are its associated data
//! 104 16  authentication tag of the name
//! 120  4  reserved
//! 124  4  CRC32C of the incarnation followed by bytes 0..124
//! ```
//! Name (64 bytes, plaintext):
//! ```text
//!  0 16  prefix hash
//! 16 16  prefix hash of the parent, else zero
//! 32  4  realization
//! 36  4  tokens
//! 40  4  CRC32C of the payload's plaintext
//! 44  1  parent: 0 unknown, 1 none (the block starts a prefix), 2 the hash above
//! 45  1  labels that the block was put under: 0 none, 1 the first, 2 both, 3 any, for they are more or not known
//! 46  2  reserved
//! 48  8  first label, else zero
//! 56  8  second label, larger, else zero
//! ```
//! Version 2 knew no labels: its names end at byte 48, with byte 45 reserved, and its entries have the tag at 88 and 20 reserved
//! bytes behind it. Whatever its records were put under, they are taken for put under any label.

use kvtier_core::{BlockHash, Label, Labels, Parent};
use kvtier_transfer::crc32c;

/// Payloads start and end at multiples of this.
pub const ALIGNMENT: u64 = 4096;
/// Bytes at the front of a segment file that hold no payload: header and seal pages.
pub const HEADER_BYTES: u64 = 8192;
/// Bytes at the end of a segment file for each record.
pub const ENTRY_BYTES: u64 = 128;
/// Bytes of a name.
pub const NAME_BYTES: usize = 64;
/// The version written.
pub const VERSION: u32 = 3;
/// The oldest version understood.
pub const VERSION_MIN: u32 = 2;

#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;

const PAGE: usize = ALIGNMENT as usize;
const ENTRY: usize = ENTRY_BYTES as usize;
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
    #[error("version {0} is not understood, this program knows {VERSION_MIN} to {VERSION}")]
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
    #[error("entry points outside the payloads")]
    Misplaced,
}

/// How payloads of a segment are protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encryption {
    /// AES-256-GCM under a key of the namespace, its generation and the segment's incarnation.
    #[default]
    Aes256Gcm,
    /// Plaintext with a CRC32C: finds damage, not tampering.
    None,
}

impl Encryption {
    fn code(self) -> u32 {
        match self {
            Encryption::None => 0,
            Encryption::Aes256Gcm => 1,
        }
    }
}

/// Page 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Of the whole file, [`VERSION_MIN`] to [`VERSION`].
    pub version: u32,
    /// Segment id, as in the file name.
    pub segment: u32,
    /// This life of the file.
    pub incarnation: Incarnation,
    /// File size, bytes.
    pub bytes: u64,
    /// Opened at, ms since 1970.
    pub opened_ms: u64,
    /// Of its payloads.
    pub encryption: Encryption,
}

impl Header {
    /// The page.
    #[must_use]
    pub fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[..8].copy_from_slice(&HEADER_MAGIC);
        page[8..12].copy_from_slice(&self.version.to_le_bytes());
        page[12..16].copy_from_slice(&self.segment.to_le_bytes());
        page[16..48].copy_from_slice(&self.incarnation);
        page[48..56].copy_from_slice(&self.bytes.to_le_bytes());
        page[56..64].copy_from_slice(&self.opened_ms.to_le_bytes());
        page[64..68].copy_from_slice(&self.encryption.code().to_le_bytes());
        close_page(&mut page);
        page
    }

    /// Reads a page back.
    ///
    /// # Errors
    /// When it is not a header of a version understood, undamaged.
    pub fn decode(page: &[u8]) -> Result<Header, FormatError> {
        let page = open_page(page, HEADER_MAGIC, "header")?;
        let encryption = match word(page, 64) {
            0 => Encryption::None,
            1 => Encryption::Aes256Gcm,
            _ => return Err(FormatError::Damaged("header")),
        };
        if !is_zero(&page[68..PAGE - 4]) {
            return Err(FormatError::Damaged("header"));
        }
        Ok(Header {
            version: word(page, 8),
            segment: word(page, 12),
            incarnation: array(page, 16),
            bytes: double(page, 48),
            opened_ms: double(page, 56),
            encryption,
        })
    }
}

/// Page 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal {
    /// As in the header.
    pub version: u32,
    /// Segment id.
    pub segment: u32,
    /// The life of the file that was sealed.
    pub incarnation: Incarnation,
    /// Entries in the index.
    pub entries: u32,
    /// Sealed at, ms since 1970.
    pub sealed_ms: u64,
}

impl Seal {
    /// The page.
    #[must_use]
    pub fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[..8].copy_from_slice(&SEAL_MAGIC);
        page[8..12].copy_from_slice(&self.version.to_le_bytes());
        page[12..16].copy_from_slice(&self.segment.to_le_bytes());
        page[16..48].copy_from_slice(&self.incarnation);
        page[48..52].copy_from_slice(&self.entries.to_le_bytes());
        page[56..64].copy_from_slice(&self.sealed_ms.to_le_bytes());
        close_page(&mut page);
        page
    }

    /// Reads a page back; it must belong to `header`. A page of zeroes is an open segment: `None`.
    ///
    /// # Errors
    /// When it is neither, or its index does not fit the file.
    pub fn decode(page: &[u8], header: &Header) -> Result<Option<Seal>, FormatError> {
        if page.len() >= PAGE && is_zero(&page[..PAGE]) {
            return Ok(None);
        }
        let page = open_page(page, SEAL_MAGIC, "seal")?;
        if !is_zero(&page[64..PAGE - 4]) || word(page, 52) != 0 {
            return Err(FormatError::Damaged("seal"));
        }
        let seal = Seal {
            version: word(page, 8),
            segment: word(page, 12),
            incarnation: array(page, 16),
            entries: word(page, 48),
            sealed_ms: double(page, 56),
        };
        let named = (seal.version, seal.segment, seal.incarnation);
        if named != (header.version, header.segment, header.incarnation) {
            return Err(FormatError::Foreign("seal"));
        }
        if seal.entries > entries_max(header.bytes) {
            return Err(FormatError::Damaged("seal"));
        }
        Ok(Some(seal))
    }
}

/// What the index says about one record. The name is sealed: see [`Name`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Of its segment.
    pub version: u32,
    /// Authentication tag of an encrypted payload, else zero.
    pub tag: [u8; 16],
    /// Of the namespace, when the block was sealed.
    pub generation: u64,
    /// Owner.
    pub namespace: u32,
    /// Byte offset of the payload, a multiple of [`ALIGNMENT`].
    pub offset: u64,
    /// Bytes of payload.
    pub length: u32,
    /// Ciphertext of the name; what version 2 lacks of it is zero.
    pub name: [u8; NAME_BYTES],
    /// Its authentication tag.
    pub name_tag: [u8; 16],
}

impl Entry {
    /// What the name's seal is bound to: the fields before it and the segment.
    ///
    /// # Panics
    /// As [`Entry::encode`].
    #[must_use]
    pub fn associated(&self, segment: u32) -> [u8; 44] {
        let mut bytes = [0; 44];
        bytes[..16].copy_from_slice(&self.tag);
        bytes[16..24].copy_from_slice(&self.generation.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.namespace.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.place().to_le_bytes());
        bytes[32..36].copy_from_slice(&self.length.to_le_bytes());
        bytes[40..44].copy_from_slice(&segment.to_le_bytes());
        bytes
    }

    /// The offset in units of [`ALIGNMENT`].
    ///
    /// # Panics
    /// When the offset is no multiple of [`ALIGNMENT`] or past 16 TiB.
    #[must_use]
    pub fn place(&self) -> u32 {
        place_of(self.offset)
    }

    /// The bytes, bound to a life of the file.
    ///
    /// # Panics
    /// When the offset is no multiple of [`ALIGNMENT`] or past 16 TiB.
    #[must_use]
    pub fn encode(&self, incarnation: &Incarnation) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..40].copy_from_slice(&self.associated(0)[..40]);
        let tag_at = 40 + name_bytes(self.version);
        bytes[40..tag_at].copy_from_slice(&self.name[..tag_at - 40]);
        bytes[tag_at..tag_at + 16].copy_from_slice(&self.name_tag);
        let sum = entry_checksum(&bytes, incarnation);
        bytes[124..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads an entry back; it must belong to this life of the file, and its payload must lie inside it. Zeroes are no
    /// record: `None`.
    ///
    /// # Errors
    /// When it is neither.
    pub fn decode(bytes: &[u8], header: &Header) -> Result<Option<Entry>, FormatError> {
        let bytes: &[u8; ENTRY] = bytes.first_chunk().ok_or(FormatError::Short("entry"))?;
        if is_zero(bytes) {
            return Ok(None);
        }
        let tag_at = 40 + name_bytes(header.version);
        let is_reserved_zero = word(bytes, 36) == 0 && is_zero(&bytes[tag_at + 16..124]);
        #[cfg(feature = "mutants")]
        let is_reserved_zero = is_reserved_zero || fuzz::planted::is_on();
        if word(bytes, 124) != entry_checksum(bytes, &header.incarnation) || !is_reserved_zero {
            return Err(FormatError::Damaged("entry"));
        }
        let mut name = [0; NAME_BYTES];
        name[..tag_at - 40].copy_from_slice(&bytes[40..tag_at]);
        let entry = Entry {
            version: header.version,
            tag: array(bytes, 0),
            generation: double(bytes, 16),
            namespace: word(bytes, 24),
            offset: u64::from(word(bytes, 28)) * ALIGNMENT,
            length: word(bytes, 32),
            name,
            name_tag: array(bytes, tag_at),
        };
        if !is_payload_range(header.bytes, entry.offset, entry.length) {
            return Err(FormatError::Misplaced);
        }
        Ok(Some(entry))
    }
}

/// What a record is, in the clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// The block's prefix hash.
    pub hash: BlockHash,
    /// What comes before it.
    pub parent: Parent,
    /// Its form.
    pub realization: u32,
    /// Its tokens.
    pub tokens: u32,
    /// CRC32C of the payload's plaintext.
    pub checksum: u32,
    /// What it was put under.
    pub labels: Labels,
}

impl Name {
    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; NAME_BYTES] {
        let mut bytes = [0; NAME_BYTES];
        let (code, parent) = match self.parent {
            Parent::Unknown => (0, BlockHash::default()),
            Parent::Root => (1, BlockHash::default()),
            Parent::Block(hash) => (2, hash),
        };
        bytes[..16].copy_from_slice(&self.hash.0);
        bytes[16..32].copy_from_slice(&parent.0);
        bytes[32..36].copy_from_slice(&self.realization.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[44] = code;
        let none = Label::default();
        let (code, first, second) = match self.labels {
            Labels::None => (0, none, none),
            Labels::One(label) => (1, label, none),
            Labels::Two(first, second) => (2, first, second),
            Labels::Any => (3, none, none),
        };
        bytes[45] = code;
        bytes[48..56].copy_from_slice(&first.0.to_le_bytes());
        bytes[56..64].copy_from_slice(&second.0.to_le_bytes());
        bytes
    }

    /// Reads a name back.
    ///
    /// # Errors
    /// When it is none.
    pub fn decode(bytes: &[u8; NAME_BYTES]) -> Result<Name, FormatError> {
        let hash = BlockHash(array(bytes, 16));
        let parent = match bytes[44] {
            0 if hash == BlockHash::default() => Parent::Unknown,
            1 if hash == BlockHash::default() => Parent::Root,
            2 => Parent::Block(hash),
            _ => return Err(FormatError::Damaged("name")),
        };
        let (first, second) = (Label(double(bytes, 48)), Label(double(bytes, 56)));
        let none = Label::default();
        let labels = match bytes[45] {
            0 if (first, second) == (none, none) => Labels::None,
            1 if second == none => Labels::One(first),
            2 if first < second => Labels::Two(first, second),
            3 if (first, second) == (none, none) => Labels::Any,
            _ => return Err(FormatError::Damaged("name")),
        };
        if !is_zero(&bytes[46..48]) {
            return Err(FormatError::Damaged("name"));
        }
        Ok(Name {
            hash: BlockHash(array(bytes, 0)),
            parent,
            realization: word(bytes, 32),
            tokens: word(bytes, 36),
            checksum: word(bytes, 40),
            labels,
        })
    }
}

/// Bytes of a name in a version.
#[must_use]
pub fn name_bytes(version: u32) -> usize {
    if version < 3 { 48 } else { NAME_BYTES }
}

fn entry_checksum(bytes: &[u8; ENTRY], incarnation: &Incarnation) -> u32 {
    let mut bound = [0; 156];
    bound[..32].copy_from_slice(incarnation);
    bound[32..].copy_from_slice(&bytes[..124]);
    crc32c(&bound)
}

/// Bytes that `length` bytes of payload take.
#[must_use]
pub fn padded(length: u64) -> u64 {
    length.next_multiple_of(ALIGNMENT)
}

/// An offset in units of [`ALIGNMENT`].
///
/// # Panics
/// When it is no multiple of it or past 16 TiB.
#[must_use]
pub fn place_of(offset: u64) -> u32 {
    assert!(offset.is_multiple_of(ALIGNMENT), "a payload at {offset}");
    u32::try_from(offset / ALIGNMENT).expect("segments are smaller than 16 TiB")
}

/// Whether a record may lie there: aligned, behind the seal page, and before the index of at least itself.
#[must_use]
pub fn is_payload_range(file_bytes: u64, offset: u64, length: u32) -> bool {
    let end = offset.checked_add(padded(u64::from(length)));
    let limit = file_bytes.saturating_sub(ENTRY_BYTES);
    length > 0 && offset.is_multiple_of(ALIGNMENT) && offset >= HEADER_BYTES && end.is_some_and(|end| end <= limit)
}

/// Entries that a file can have: each needs itself and a page of payload.
#[must_use]
pub fn entries_max(file_bytes: u64) -> u32 {
    let most = file_bytes.saturating_sub(HEADER_BYTES) / (ENTRY_BYTES + ALIGNMENT);
    u32::try_from(most).unwrap_or(u32::MAX)
}

/// Where the page lies that holds entry `ordinal`.
#[must_use]
pub fn index_page(file_bytes: u64, ordinal: u32) -> u64 {
    let entry = file_bytes - (u64::from(ordinal) + 1) * ENTRY_BYTES;
    entry - entry % ALIGNMENT
}

/// The entries of an index from the bytes at the end of a file, entry 0 first: `entries` of them, or as many as `tail`
/// holds. Those that cannot be read are counted; zeroes are neither.
pub fn decode_index(tail: &[u8], header: &Header, entries: usize) -> (Vec<(u32, Entry)>, u32) {
    let mut found = Vec::with_capacity(entries.min(tail.len() / ENTRY));
    let mut damaged = 0;
    for (ordinal, bytes) in (0..).zip(tail.rchunks_exact(ENTRY).take(entries)) {
        match Entry::decode(bytes, header) {
            Ok(Some(entry)) => found.push((ordinal, entry)),
            Ok(None) => {}
            Err(_) => damaged += 1,
        }
    }
    (found, damaged)
}

/// How many entries of a segment that nobody sealed are damaged. Where its index ends is not written down, and beyond it lie
/// payloads, or what an earlier segment left in the same place, of which nothing can be told: an index page is one with an
/// entry that can be read, the ones before it, and the one behind it if it has nothing but a first entry.
#[must_use]
pub fn damaged_in_open_index(tail: &[u8], header: &Header) -> u32 {
    let (mut damaged, mut unsure) = (0, 0);
    let mut follows_index = true;
    for page in tail.rchunks_exact(PAGE) {
        let (mut readable, mut unreadable) = (0, 0);
        for bytes in page.rchunks_exact(ENTRY) {
            match Entry::decode(bytes, header) {
                Ok(Some(_)) => readable += 1,
                Ok(None) => {}
                Err(_) => unreadable += 1,
            }
        }
        unsure += unreadable;
        let (rest, first) = page.split_at(PAGE - ENTRY);
        let first_alone = is_zero(rest) && !is_zero(first);
        if readable > 0 || (first_alone && follows_index) {
            damaged += std::mem::take(&mut unsure);
        }
        follows_index = readable > 0;
    }
    damaged
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
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
        VERSION_MIN..=VERSION => Ok(page),
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
