//! Keys of one segment's records, and what their seals are bound to.
//!
//! ```text
//! data key (namespace, generation) --HKDF-SHA256, salt = incarnation--> payload key   info "kvtier record v1"
//!                                                                   '-> name key      info "kvtier entry v1"
//! nonce = place of the record in the segment (4 bytes, little-endian), then 8 zeroes
//! ```
//!
//! A segment is a log: in one incarnation each place is written once, and an incarnation is 256 random bits drawn when
//! the segment is opened. So no pair of key and nonce occurs twice, also not where a state directory was copied and both
//! copies are written on, and no counter has to be kept. A name may be sealed again at its place, to the same bytes.
//!
//! A payload's associated data (44 bytes): segment 4, place 4, length 4, namespace 4, generation 8, realization 4,
//! prefix hash 16. A record that was moved, cut, or put back from elsewhere does not open.

use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};
use kvtier_core::{Extent, Labels, RecordLabel};
use kvtier_transfer::memory::{Cipher, MemorySlice, Opening};
use zeroize::Zeroizing;

use super::format::{Entry, FormatError, Incarnation, NAME_BYTES, Name, name_bytes, place_of};
use super::keys::DataKey;

/// Seals and opens the records of one namespace and generation in one incarnation of a segment.
pub(super) struct RecordCipher {
    payload: Cipher,
    name: LessSafeKey,
}

struct KeyBytes;

impl KeyType for KeyBytes {
    fn len(&self) -> usize {
        32
    }
}

fn derive(key: &DataKey, incarnation: &Incarnation, purpose: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut derived = Zeroizing::new([0; 32]);
    Salt::new(HKDF_SHA256, incarnation)
        .extract(key.bytes())
        .expand(&[purpose], KeyBytes)
        .and_then(|output| output.fill(&mut *derived))
        .expect("HKDF yields 32 bytes");
    derived
}

impl RecordCipher {
    pub(super) fn derive(key: &DataKey, incarnation: &Incarnation) -> Arc<RecordCipher> {
        let name = derive(key, incarnation, b"kvtier entry v1");
        Arc::new(RecordCipher {
            payload: Cipher::new(&derive(key, incarnation, b"kvtier record v1")),
            name: LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &*name).expect("32 bytes are a key")),
        })
    }

    /// Encrypts a payload from `source` to `target`, as long; returns its tag.
    pub(super) fn seal(
        &self,
        place: &Extent,
        label: &RecordLabel,
        source: &MemorySlice,
        target: &MemorySlice,
    ) -> [u8; 16] {
        self.payload.seal(
            &nonce_bytes(place_of(place.offset)),
            &binding(place, label),
            source,
            target,
        )
    }

    /// Begins to decrypt a payload, which may come piece by piece.
    pub(super) fn opening(&self, place: &Extent, label: &RecordLabel) -> Opening {
        self.payload
            .opening(&nonce_bytes(place_of(place.offset)), &binding(place, label))
    }

    /// Puts the name into its entry, sealed to the entry's other fields. An entry of version 2 has no room for labels.
    pub(super) fn seal_name(&self, entry: Entry, segment: u32, name: &Name) -> Entry {
        let length = name_bytes(entry.version);
        let mut sealed = match length {
            NAME_BYTES => *name,
            _ => Name {
                labels: Labels::None,
                ..*name
            },
        }
        .encode();
        let tag = self
            .name
            .seal_in_place_separate_tag(
                nonce(entry.place()),
                Aad::from(entry.associated(segment)),
                &mut sealed[..length],
            )
            .expect("a name can be sealed");
        Entry {
            name: sealed,
            name_tag: tag.as_ref().try_into().expect("a tag of 16 bytes"),
            ..entry
        }
    }

    /// The name of an entry of this key.
    pub(super) fn open_name(&self, entry: &Entry, segment: u32) -> Result<Name, FormatError> {
        let mut bytes = [0; NAME_BYTES + 16];
        let length = name_bytes(entry.version);
        bytes[..length].copy_from_slice(&entry.name[..length]);
        bytes[length..length + 16].copy_from_slice(&entry.name_tag);
        let opened = self
            .name
            .open_in_place(
                nonce(entry.place()),
                Aad::from(entry.associated(segment)),
                &mut bytes[..length + 16],
            )
            .map_err(|_| FormatError::Damaged("name"))?;
        let mut name = [0; NAME_BYTES];
        name[..length].copy_from_slice(opened);
        let name = Name::decode(&name)?;
        if length == NAME_BYTES {
            return Ok(name);
        }
        match name.labels {
            // Its writer kept none, whatever it was told.
            Labels::None => Ok(Name {
                labels: Labels::Any,
                ..name
            }),
            _ => Err(FormatError::Damaged("name")),
        }
    }
}

fn nonce_bytes(place: u32) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&place.to_le_bytes());
    nonce
}

fn nonce(place: u32) -> Nonce {
    Nonce::assume_unique_for_key(nonce_bytes(place))
}

fn binding(place: &Extent, label: &RecordLabel) -> [u8; 44] {
    let mut bytes = [0; 44];
    bytes[..4].copy_from_slice(&place.segment.0.to_le_bytes());
    bytes[4..8].copy_from_slice(&place_of(place.offset).to_le_bytes());
    bytes[8..12].copy_from_slice(&place.length.to_le_bytes());
    bytes[12..16].copy_from_slice(&label.namespace.0.to_le_bytes());
    bytes[16..24].copy_from_slice(&label.generation.0.to_le_bytes());
    bytes[24..28].copy_from_slice(&label.realization.0.to_le_bytes());
    bytes[28..].copy_from_slice(&label.hash.0);
    bytes
}
