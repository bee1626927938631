use kvtier_core::{BlockHash, NamespaceId, RealizationId};

/// Names blocks outside host memory: a digest under a key per namespace, so that files of one tenant tell nothing about
/// another's prompts, nor whether two tenants hold the same one.
///
/// The key is drawn at start and never leaves memory.
pub(super) struct Fingerprints {
    key: [u8; 32],
}

impl Fingerprints {
    pub(super) fn new(key: [u8; 32]) -> Fingerprints {
        Fingerprints { key }
    }

    pub(super) fn of(&self, namespace: NamespaceId, realization: RealizationId, hash: BlockHash) -> [u8; 16] {
        let namespace_key = blake3::keyed_hash(&self.key, &namespace.0.to_le_bytes());
        let mut name = [0; 20];
        name[..4].copy_from_slice(&realization.0.to_le_bytes());
        name[4..].copy_from_slice(&hash.0);
        let digest = blake3::keyed_hash(namespace_key.as_bytes(), &name);
        *digest.as_bytes().first_chunk().expect("32 bytes begin with 16")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_blocks_of_two_namespaces_have_unlike_fingerprints() {
        let fingerprints = Fingerprints::new([1; 32]);
        let hash = BlockHash([7; 16]);
        let first = fingerprints.of(NamespaceId(1), RealizationId(1), hash);
        assert_eq!(first, fingerprints.of(NamespaceId(1), RealizationId(1), hash));
        assert_ne!(first, fingerprints.of(NamespaceId(2), RealizationId(1), hash));
        assert_ne!(first, fingerprints.of(NamespaceId(1), RealizationId(2), hash));
        assert_ne!(
            first,
            Fingerprints::new([2; 32]).of(NamespaceId(1), RealizationId(1), hash)
        );
    }
}
