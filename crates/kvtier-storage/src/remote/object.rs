//! What an object looks like, byte by byte. Little-endian, fixed width; what is reserved is zero.
//!
//! ```text
//! 0        48         104    120                    end-16  end
//! | header | contents | tag  | payload ...          | tag   |
//! ```
//!
//! Header:
//! ```text
//!  0  8  magic "kvtier\x01O"
//!  8  4  version (1)
//! 12  4  flags: 1 the payload is a frame of `compression`, else it is the block
//! 16 32  salt: random, drawn when the object is sealed
//! ```
//! Contents (56 bytes, plaintext):
//! ```text
//!  0  4  length of the block, bytes
//!  4  4  tokens
//!  8  4  CRC32C of the block as it lay in host memory
//! 12  4  bytes of payload in the object
//! 16 16  prefix hash of the parent, else zero
//! 32  1  parent: 0 unknown, 1 none (the block starts a prefix), 2 the hash above
//! 33  1  labels that the block was put under: 0 none, 1 the first, 2 both, 3 any, for they are more or not known
//! 34  6  reserved
//! 40  8  first label, else zero
//! 48  8  second label, larger, else zero
//! ```
//! Keys:
//! ```text
//! object key (namespace, generation) --HKDF-SHA256, salt = salt--> contents key   info "kvtier object contents v1"
//!                                                              '-> payload key    info "kvtier object payload v1"
//!            '--BLAKE3 derive_key "kvtier object name v1"--> name key
//! name = first 16 bytes of BLAKE3 keyed by the name key, of the realization's digest (32) and the prefix hash (16)
//! ```
//!
//! Contents and payload are sealed with AES-256-GCM under a nonce of zeroes: a salt is drawn for each object, so each key seals one
//! message. The associated data of both is the name (16) followed by the header (48). An object that was cut, changed, joined from two, or put
//! under another name does not open. One that lay under its own name before does: a name stands for one block for ever.

use std::cmp::Ordering;
use std::{fmt, mem};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use kvtier_core::{BlockHash, Label, Labels, Parent};
use kvtier_transfer::memory::{Cipher, MemorySlice};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::compression::{Compressor, Decompressor, Element};

const MAGIC: [u8; 8] = *b"kvtier\x01O";
const VERSION: u32 = 1;
const COMPRESSED: u32 = 1;

const HEADER: usize = 48;
const CONTENTS: usize = 56;
const TAG: usize = 16;
const PAYLOAD_AT: usize = HEADER + CONTENTS + TAG;
/// The cipher opens less than 2 GiB at once.
const PAYLOAD_BYTES_MAX: usize = (1 << 31) - 1;
const NONCE: [u8; NONCE_LEN] = [0; NONCE_LEN];

/// Bytes of an object beside its payload.
pub const OBJECT_OVERHEAD_BYTES: usize = PAYLOAD_AT + TAG;

/// Name of an object: a keyed digest, of which who lacks the key learns nothing about the block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(pub [u8; 16]);

/// What objects are deleted together by. Opaque here: fingerprints that the caller makes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectGroup {
    /// Of a namespace.
    pub namespace: [u8; 16],
    /// Of a generation of it.
    pub generation: [u8; 16],
}

/// What an object says of its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Bytes of the block.
    pub length: u32,
    /// Its tokens.
    pub tokens: u32,
    /// What comes before it.
    pub parent: Parent,
    /// What it was put under.
    pub labels: Labels,
    /// CRC32C of the block as it lay in host memory.
    pub checksum: u32,
}

/// An object that gives no block: treat it as a miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ObjectError {
    /// Shorter than any object, or not as long as it says, or longer than one can be.
    #[error("an object of {bytes} bytes has another length than it must: it was cut, or is none of ours")]
    Length {
        /// Its length.
        bytes: usize,
    },
    /// It does not begin as objects do.
    #[error("not an object of ours")]
    Magic,
    /// Of another version, or with flags of one.
    #[error(
        "an object of version {0}, of which this build knows nothing: write with the older build until all are updated"
    )]
    Version(u32),
    /// It was sealed with another key or under another name, or was changed since.
    #[error("the seal does not fit: another key, another name, or changed bytes")]
    Seal,
    /// What was sealed makes no sense.
    #[error("what was sealed is no block of ours")]
    Contents,
    /// The target is too small.
    #[error("the block has {length} bytes and the target {room}: ask for its length first")]
    Room {
        /// Of the block.
        length: u32,
        /// Of the target.
        room: usize,
    },
    /// The block opened, and is not what its checksum was taken of: it was damaged before it was sealed.
    #[error("the block was damaged before it was sealed")]
    Checksum,
    /// No memory to decompress in.
    #[error("no memory to decompress in")]
    Memory,
}

/// Names, seals and opens the objects of one namespace and generation. Zeroed when dropped; never shown.
pub struct ObjectKey {
    object: Zeroizing<[u8; 32]>,
    name: Zeroizing<[u8; 32]>,
}

impl ObjectKey {
    /// Of these bytes, which are random.
    #[must_use]
    pub fn new(bytes: &[u8; 32]) -> ObjectKey {
        ObjectKey {
            object: Zeroizing::new(*bytes),
            name: Zeroizing::new(blake3::derive_key("kvtier object name v1", bytes)),
        }
    }

    /// The name of a block, by the digest of its realization and its prefix hash.
    #[must_use]
    pub fn name(&self, realization: &[u8; 32], hash: BlockHash) -> ObjectName {
        let mut block = [0; 48];
        block[..32].copy_from_slice(realization);
        block[32..].copy_from_slice(&hash.0);
        let digest = blake3::keyed_hash(&self.name, &block);
        ObjectName(array(digest.as_bytes(), 0))
    }

    /// The object of the block in `source`, which is copied once. With an element it is compressed first, and kept plain where that saves
    /// nothing; this takes as much memory again while it runs.
    ///
    /// # Panics
    /// When `contents.length` is not the length of `source`, or 2 GiB or more; when the system gives no random bytes.
    #[must_use]
    pub fn seal(
        &self,
        name: ObjectName,
        contents: &Contents,
        source: &MemorySlice,
        compress: Option<Element>,
    ) -> Vec<u8> {
        assert_eq!(contents.length as usize, source.len(), "contents of another block");
        assert!(source.len() <= PAYLOAD_BYTES_MAX, "a block of 2 GiB or more");
        let mut header = Header {
            flags: 0,
            salt: [0; 32],
        };
        getrandom::fill(&mut header.salt).expect("the system has random bytes");
        let frame = compress.and_then(|element| compressed(element, source));
        if let Some(mut object) = frame {
            header.flags = COMPRESSED;
            let (keys, binding) = (Keys::derive(&self.object, &header.salt), binding(name, &header));
            keys.seal_front(&header, contents, &binding, &mut object);
            let tag = aead(&keys.payload).seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(NONCE),
                Aad::from(binding),
                &mut object[PAYLOAD_AT..],
            );
            object.extend_from_slice(tag.expect("a frame can be sealed").as_ref());
            return object;
        }
        let mut object = Vec::with_capacity(source.len() + OBJECT_OVERHEAD_BYTES);
        object.resize(PAYLOAD_AT + source.len(), 0);
        let (keys, binding) = (Keys::derive(&self.object, &header.salt), binding(name, &header));
        keys.seal_front(&header, contents, &binding, &mut object);
        let tag = Cipher::new(&keys.payload).seal_to_slice(&NONCE, &binding, source, &mut object[PAYLOAD_AT..]);
        object.extend_from_slice(&tag);
        object
    }

    /// Opens an object into the front of `target`; what lies behind the block stays. On an error all of `target` holds zeroes. A compressed
    /// object takes as much memory as it and its block have while this runs.
    ///
    /// # Errors
    /// [`ObjectError`].
    ///
    /// # Panics
    /// When the target is mapped read-only.
    pub fn open(&self, name: ObjectName, object: &[u8], target: &MemorySlice) -> Result<Contents, ObjectError> {
        self.open_front_of(name, object, target).inspect_err(|_| target.zero())
    }

    /// What an object says of its block, without its payload being opened: so that room for it can be made first.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub fn contents(&self, name: ObjectName, object: &[u8]) -> Result<Contents, ObjectError> {
        self.front(name, object).map(|front| front.contents)
    }

    fn open_front_of(&self, name: ObjectName, object: &[u8], target: &MemorySlice) -> Result<Contents, ObjectError> {
        let front = self.front(name, object)?;
        let (contents, room) = (front.contents, target.len());
        let length = contents.length;
        let target = target
            .subslice(0, length as usize)
            .map_err(|_| ObjectError::Room { length, room })?;
        let (sealed, tag) = object[PAYLOAD_AT..].split_at(object.len() - OBJECT_OVERHEAD_BYTES);
        if front.is_compressed {
            let mut scratch = Zeroizing::new(object[PAYLOAD_AT..].to_vec());
            let frame = aead(&front.keys.payload)
                .open_in_place(
                    Nonce::assume_unique_for_key(NONCE),
                    Aad::from(front.binding),
                    &mut scratch,
                )
                .map_err(|_| ObjectError::Seal)?;
            let mut block = Zeroizing::new(vec![0; length as usize]);
            Decompressor::new()
                .map_err(|_| ObjectError::Memory)?
                .decompress(frame, &mut block)
                .map_err(|_| ObjectError::Contents)?;
            target.copy_from_slice(&block).expect("a writable target, as long");
        } else {
            let mut opening = Cipher::new(&front.keys.payload).opening(&NONCE, &front.binding);
            opening.decrypt_from_slice(sealed, &target);
            opening.finish(&array(tag, 0)).map_err(|_| ObjectError::Seal)?;
        }
        // The seal vouches for what was sealed; this, for what was in memory when it was.
        if target.crc32c() != contents.checksum {
            return Err(ObjectError::Checksum);
        }
        Ok(contents)
    }

    fn front(&self, name: ObjectName, object: &[u8]) -> Result<Front, ObjectError> {
        let length = ObjectError::Length { bytes: object.len() };
        if object.len() < OBJECT_OVERHEAD_BYTES || object.len() - OBJECT_OVERHEAD_BYTES > PAYLOAD_BYTES_MAX {
            return Err(length);
        }
        let header = Header::decode(&array(object, 0))?;
        let (keys, binding) = (Keys::derive(&self.object, &header.salt), binding(name, &header));
        let mut sealed: [u8; CONTENTS + TAG] = array(object, HEADER);
        let opened = aead(&keys.contents)
            .open_in_place(Nonce::assume_unique_for_key(NONCE), Aad::from(binding), &mut sealed)
            .map_err(|_| ObjectError::Seal)?;
        let (contents, payload_bytes) = Contents::decode(&array(opened, 0))?;
        if payload_bytes as usize != object.len() - OBJECT_OVERHEAD_BYTES {
            return Err(length);
        }
        let is_compressed = header.flags == COMPRESSED;
        if !is_compressed && payload_bytes != contents.length {
            return Err(ObjectError::Contents);
        }
        Ok(Front {
            contents,
            is_compressed,
            keys,
            binding,
        })
    }
}

/// An object whose payload alone is still sealed.
struct Front {
    contents: Contents,
    is_compressed: bool,
    keys: Keys,
    binding: [u8; 16 + HEADER],
}

/// An object with a compressed block for a payload, not sealed and empty before it; `None` where compression saves nothing.
fn compressed(element: Element, source: &MemorySlice) -> Option<Vec<u8>> {
    let block = Zeroizing::new(source.to_vec());
    let mut object = Zeroizing::new(vec![0; PAYLOAD_AT]);
    Compressor::new().ok()?.compress(element, &block, &mut object).ok()?;
    (object.len() - PAYLOAD_AT < block.len()).then(|| mem::take(&mut *object))
}

struct Header {
    flags: u32,
    salt: [u8; 32],
}

impl Header {
    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.flags.to_le_bytes());
        bytes[16..].copy_from_slice(&self.salt);
        bytes
    }

    fn decode(bytes: &[u8; HEADER]) -> Result<Header, ObjectError> {
        if bytes[..8] != MAGIC {
            return Err(ObjectError::Magic);
        }
        let (version, flags) = (word(bytes, 8), word(bytes, 12));
        if version != VERSION || flags & !COMPRESSED != 0 {
            return Err(ObjectError::Version(version));
        }
        Ok(Header {
            flags,
            salt: array(bytes, 16),
        })
    }
}

impl Contents {
    fn encode(&self, payload_bytes: u32) -> [u8; CONTENTS] {
        let mut bytes = [0; CONTENTS];
        let (parent, hash) = match self.parent {
            Parent::Unknown => (0, BlockHash::default()),
            Parent::Root => (1, BlockHash::default()),
            Parent::Block(hash) => (2, hash),
        };
        let none = Label::default();
        let (labels, first, second) = match self.labels {
            Labels::None => (0, none, none),
            Labels::One(label) => (1, label, none),
            Labels::Two(first, second) => (2, first, second),
            Labels::Any => (3, none, none),
        };
        bytes[..4].copy_from_slice(&self.length.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[12..16].copy_from_slice(&payload_bytes.to_le_bytes());
        bytes[16..32].copy_from_slice(&hash.0);
        bytes[32] = parent;
        bytes[33] = labels;
        bytes[40..48].copy_from_slice(&first.0.to_le_bytes());
        bytes[48..].copy_from_slice(&second.0.to_le_bytes());
        bytes
    }

    /// And the bytes of payload that the object has.
    fn decode(bytes: &[u8; CONTENTS]) -> Result<(Contents, u32), ObjectError> {
        let (hash, none) = (BlockHash(array(bytes, 16)), Label::default());
        let parent = match bytes[32] {
            0 if hash == BlockHash::default() => Parent::Unknown,
            1 if hash == BlockHash::default() => Parent::Root,
            2 => Parent::Block(hash),
            _ => return Err(ObjectError::Contents),
        };
        let (first, second) = (Label(double(bytes, 40)), Label(double(bytes, 48)));
        let labels = match (bytes[33], first.cmp(&second)) {
            (0, Ordering::Equal) if first == none => Labels::None,
            (1, _) if second == none => Labels::One(first),
            (2, Ordering::Less) => Labels::Two(first, second),
            (3, Ordering::Equal) if first == none => Labels::Any,
            _ => return Err(ObjectError::Contents),
        };
        if bytes[34..40] != [0; 6] {
            return Err(ObjectError::Contents);
        }
        let contents = Contents {
            length: word(bytes, 0),
            tokens: word(bytes, 4),
            parent,
            labels,
            checksum: word(bytes, 8),
        };
        Ok((contents, word(bytes, 12)))
    }
}

/// Of one object.
struct Keys {
    contents: Zeroizing<[u8; 32]>,
    payload: Zeroizing<[u8; 32]>,
}

struct KeyBytes;

impl KeyType for KeyBytes {
    fn len(&self) -> usize {
        32
    }
}

impl Keys {
    fn derive(object: &[u8; 32], salt: &[u8; 32]) -> Keys {
        let secret = Salt::new(HKDF_SHA256, salt).extract(object);
        Keys {
            contents: expanded(&secret, b"kvtier object contents v1"),
            payload: expanded(&secret, b"kvtier object payload v1"),
        }
    }

    /// Writes header, contents and their tag before the payload, which `object` ends with.
    fn seal_front(&self, header: &Header, contents: &Contents, binding: &[u8; 16 + HEADER], object: &mut [u8]) {
        let payload_bytes = u32::try_from(object.len() - PAYLOAD_AT).expect("less than 2 GiB");
        let mut sealed = contents.encode(payload_bytes);
        let tag = aead(&self.contents)
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(NONCE), Aad::from(binding), &mut sealed)
            .expect("contents can be sealed");
        object[..HEADER].copy_from_slice(&header.encode());
        object[HEADER..HEADER + CONTENTS].copy_from_slice(&sealed);
        object[HEADER + CONTENTS..PAYLOAD_AT].copy_from_slice(tag.as_ref());
    }
}

fn expanded(secret: &Prk, purpose: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut key = Zeroizing::new([0; 32]);
    secret
        .expand(&[purpose], KeyBytes)
        .and_then(|output| output.fill(&mut *key))
        .expect("HKDF yields 32 bytes");
    key
}

fn aead(key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("32 bytes are a key"))
}

fn binding(name: ObjectName, header: &Header) -> [u8; 16 + HEADER] {
    let mut bytes = [0; 16 + HEADER];
    bytes[..16].copy_from_slice(&name.0);
    bytes[16..].copy_from_slice(&header.encode());
    bytes
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

fn write_hex(formatter: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
}

/// In hexadecimal.
impl fmt::Display for ObjectName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(formatter, &self.0)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(formatter, &self.0)
    }
}

/// Namespace and generation in hexadecimal, with a colon between them.
impl fmt::Display for ObjectGroup {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(formatter, &self.namespace)?;
        formatter.write_str(":")?;
        write_hex(formatter, &self.generation)
    }
}

impl fmt::Debug for ObjectGroup {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ObjectKey(..)")
    }
}

#[cfg(test)]
mod tests;
