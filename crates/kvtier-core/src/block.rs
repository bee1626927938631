use crate::NamespaceId;

/// A chained prefix hash: names the tokens of a block and everything before them. 16 bytes, opaque.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash(pub [u8; 16]);

/// What must match for KV bytes to be usable: model, dtype, layout, parallel rank. A digest of 32 bytes.
///
/// The digest is taken over length-prefixed fields, so that ("ab", "c") and ("a", "bc") never collide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Realization(pub [u8; 32]);

impl Realization {
    /// The digest of named fields. Order matters; each name and value is preceded by its length.
    #[must_use]
    pub fn digest(fields: &[(&str, &str)]) -> Realization {
        let mut hasher = blake3::Hasher::new_derive_key("kvtier realization v1");
        for (name, value) in fields {
            for part in [name.as_bytes(), value.as_bytes()] {
                hasher.update(&(part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
        }
        Realization(*hasher.finalize().as_bytes())
    }
}

/// An interned [`Realization`]: what a key carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RealizationId(pub u32);

/// The name of a block: namespace, realization and prefix hash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockKey {
    /// Whose block.
    pub namespace: NamespaceId,
    /// In which form.
    pub realization: RealizationId,
    /// Of which tokens.
    pub hash: BlockHash,
}

/// What comes before a block in its prefix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Parent {
    /// The caller does not know.
    #[default]
    Unknown,
    /// Nothing: the block starts a prefix.
    Root,
    /// The block with this hash, in the same namespace and realization.
    Block(BlockHash),
}
