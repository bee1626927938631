use std::sync::Arc;

use kvtier_core::{Generation, Labels, NamespaceId, Parent, RealizationId, RecordLabel};
use kvtier_storage::nvme::{DataKey, RecordKeys};

use crate::pattern;

/// The namespace, its generation and the realization that all records are of.
pub(super) const NAMESPACE: NamespaceId = NamespaceId(0);
pub(super) const GENERATION: Generation = Generation(1);
pub(super) const REALIZATION: RealizationId = RealizationId(0);

/// One key for everything: what is measured is nobody's secret.
struct FixedKey(Arc<DataKey>);

impl RecordKeys for FixedKey {
    fn data_key(&self, namespace: NamespaceId, generation: Generation) -> Option<Arc<DataKey>> {
        ((namespace, generation) == (NAMESPACE, GENERATION)).then(|| Arc::clone(&self.0))
    }
}

pub(super) fn fixed_key() -> Arc<dyn RecordKeys> {
    Arc::new(FixedKey(Arc::new(DataKey::new([7; 32]))))
}

/// What record `number` says.
pub(super) fn label(number: u64) -> RecordLabel {
    RecordLabel {
        namespace: NAMESPACE,
        generation: GENERATION,
        realization: REALIZATION,
        hash: pattern::hash(0, number),
        parent: Parent::Root,
        tokens: 0,
        labels: Labels::None,
    }
}
