use std::fmt;
use std::sync::Arc;

use kvtier_core::{Generation, NamespaceId};
use zeroize::Zeroizing;

/// The secret of one namespace in one generation: everything of it that leaves host memory hangs on this. Zeroed when
/// dropped; never shown.
pub struct DataKey(Zeroizing<[u8; 32]>);

impl DataKey {
    /// Of these bytes, which are random.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> DataKey {
        DataKey(Zeroizing::new(bytes))
    }

    /// The bytes, to derive from or to wrap.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("DataKey(..)")
    }
}

/// Who knows data keys.
pub trait RecordKeys: Send + Sync {
    /// The key of a namespace in a generation; `None` where it is unknown, not durable yet, or destroyed.
    fn data_key(&self, namespace: NamespaceId, generation: Generation) -> Option<Arc<DataKey>>;
}
