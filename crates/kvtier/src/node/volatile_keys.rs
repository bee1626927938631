use std::sync::Arc;

use kvtier_core::{Generation, NamespaceId};
use kvtier_storage::nvme::{DataKey, RecordKeys};

/// Keys of this run only: what an earlier run left cannot be opened.
pub(super) struct VolatileKeys([u8; 32]);

impl VolatileKeys {
    pub(super) fn draw() -> std::io::Result<VolatileKeys> {
        let mut root = [0; 32];
        getrandom::fill(&mut root).map_err(|error| std::io::Error::other(error.to_string()))?;
        Ok(VolatileKeys(root))
    }
}

impl RecordKeys for VolatileKeys {
    fn data_key(&self, namespace: NamespaceId, generation: Generation) -> Option<Arc<DataKey>> {
        let mut name = [0; 12];
        name[..4].copy_from_slice(&namespace.0.to_le_bytes());
        name[4..].copy_from_slice(&generation.0.to_le_bytes());
        Some(Arc::new(DataKey::new(*blake3::keyed_hash(&self.0, &name).as_bytes())))
    }
}
