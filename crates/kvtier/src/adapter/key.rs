use std::hash::{Hash, Hasher};
use std::sync::Arc;

use kvtier_core::{BlockHash, Realization};

use super::AdapterSettings;

/// LMCache's name of an object. `model` and `salt` are shared by many keys.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Isolates tenants: it decides the namespace.
    pub salt: Arc<str>,
    /// The model.
    pub model: Arc<str>,
    /// Which part of the model's state this is.
    pub group: u32,
    /// Which worker's share.
    pub rank: i64,
    /// Chained hash of the tokens up to and with this chunk, as LMCache computes it: of any length.
    pub chunk_hash: Box<[u8]>,
}

impl ObjectKey {
    /// The name of its block in a namespace and form.
    ///
    /// LMCache's hash is digested together with rank and group, so that one request asks for all ranks and groups of a
    /// form, and no two hashes of another length or with a common front can meet.
    #[must_use]
    pub fn block_hash(&self) -> BlockHash {
        let mut hasher = blake3::Hasher::new_derive_key("kvtier lmcache block v1");
        hasher.update(&(self.chunk_hash.len() as u64).to_le_bytes());
        hasher.update(&self.chunk_hash);
        hasher.update(&self.rank.to_le_bytes());
        hasher.update(&self.group.to_le_bytes());
        let digest = hasher.finalize();
        let mut hash = [0; 16];
        hash.copy_from_slice(&digest.as_bytes()[..16]);
        BlockHash(hash)
    }

    /// Whether `next` may follow this key in one prefix.
    #[must_use]
    pub fn is_in_row_of(&self, next: &ObjectKey) -> bool {
        self.rank == next.rank && self.group == next.group && self.salt == next.salt && self.model == next.model
    }
}

/// What must be the same for the bytes of an object to be usable, besides what [`ObjectKey::block_hash`] holds.
#[must_use]
pub(super) fn realization(model: &str, bytes: u64) -> Realization {
    Realization::digest(&[("lmcache model", model), ("object bytes", &bytes.to_string())])
}

/// The name of a salt's namespace.
#[must_use]
pub(super) fn namespace_of(settings: &AdapterSettings, salt: &str) -> String {
    if let Some(name) = settings.namespaces.get(salt) {
        return name.clone();
    }
    let prefix = &settings.namespace_prefix;
    let plain = prefix.len() + salt.len() <= crate::wire::NAME_BYTES_MAX && !salt.contains('/');
    if plain && !settings.hide_salts {
        return format!("{prefix}{salt}");
    }
    let mut hasher = blake3::Hasher::new_derive_key("kvtier lmcache salt v1");
    hasher.update(salt.as_bytes());
    format!("{prefix}{}", &hasher.finalize().to_hex()[..32])
}

/// Namespace and form of some keys: what one connection has one handle for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) salt: Arc<str>,
    pub(super) model: Arc<str>,
    pub(super) bytes: u64,
}

impl Hash for Place {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.salt.hash(state);
        self.model.hash(state);
        self.bytes.hash(state);
    }
}

impl Place {
    pub(super) fn of(key: &ObjectKey, bytes: u64) -> Place {
        Place {
            salt: Arc::clone(&key.salt),
            model: Arc::clone(&key.model),
            bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(chunk: &[u8], rank: i64, group: u32) -> ObjectKey {
        ObjectKey {
            salt: "s".into(),
            model: "m".into(),
            group,
            rank,
            chunk_hash: chunk.into(),
        }
    }

    #[test]
    fn hash_rank_and_group_all_name_the_block() {
        let one = key(&[1; 32], 0, 0).block_hash();
        assert_eq!(one, key(&[1; 32], 0, 0).block_hash());
        for other in [
            key(&[1; 16], 0, 0),
            key(&[1; 33], 0, 0),
            key(&[1; 32], 1, 0),
            key(&[1; 32], 0, 1),
            key(&[1; 32], -1, 0),
        ] {
            assert_ne!(one, other.block_hash(), "{other:?}");
        }
    }

    #[test]
    fn form_is_model_and_bytes() {
        assert_eq!(realization("a", 1), realization("a", 1));
        assert_ne!(realization("a", 1), realization("a", 2));
        assert_ne!(realization("a", 1), realization("a1", 1));
    }

    #[test]
    fn a_salt_is_its_own_namespace_unless_it_is_mapped_or_hidden() {
        let mut settings = AdapterSettings::default();
        assert_eq!(namespace_of(&settings, ""), "lmcache:");
        assert_eq!(namespace_of(&settings, "a"), "lmcache:a");
        settings.namespaces.insert("a".into(), "tenant-a".into());
        settings.namespaces.insert(String::new(), "everybody".into());
        assert_eq!(namespace_of(&settings, "a"), "tenant-a");
        assert_eq!(namespace_of(&settings, ""), "everybody");
        settings.hide_salts = true;
        let hidden = namespace_of(&settings, "b");
        assert_eq!(hidden.len(), "lmcache:".len() + 32);
        assert!(!hidden[8..].contains("b\0"));
        assert_ne!(hidden, namespace_of(&settings, "c"));
    }

    #[test]
    fn a_salt_that_no_name_can_hold_is_digested() {
        let settings = AdapterSettings::default();
        let long = "\u{1f600}".repeat(128);
        let name = namespace_of(&settings, &long);
        assert_eq!(name.len(), 40);
        assert_eq!(namespace_of(&settings, "a/b").len(), 40, "a name has no '/'");
    }
}
