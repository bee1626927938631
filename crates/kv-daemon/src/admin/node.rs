use std::sync::Arc;

use kvtier::node::Node;
use kvtier::purge::{NamespaceSettings, NamespaceStatus, PurgeError, PurgeJob, PurgeRequest};

use super::purges::Purges;

impl Purges for Node {
    fn purge(&self, request: PurgeRequest) -> Result<(PurgeJob, bool), PurgeError> {
        Node::purge(self, request)
    }

    fn job(&self, id: &str) -> Option<PurgeJob> {
        self.purge_job(id)
    }

    fn jobs(&self, namespace: Option<&str>) -> Vec<PurgeJob> {
        self.purge_jobs(namespace)
    }

    fn receipt(&self, id: &str) -> Option<String> {
        self.purge_receipt(id).unwrap_or_else(|error| {
            tracing::error!(%error, "a receipt cannot be read");
            None
        })
    }

    fn namespaces(&self) -> Vec<NamespaceStatus> {
        Node::namespaces(self)
    }

    fn set_namespace(&self, namespace: &str, settings: NamespaceSettings) -> Result<NamespaceStatus, PurgeError> {
        Node::set_namespace(self, namespace, settings)
    }

    fn advance(&self, namespace: &str) -> Result<NamespaceStatus, PurgeError> {
        self.advance_namespace(namespace)
    }

    fn keys(&self) -> String {
        serde_json::to_string(&self.receipt_keys()).unwrap_or_default()
    }

    fn events_after(&self, sequence: u64) -> Vec<(u64, String)> {
        self.purge_events_after(sequence)
    }
}

/// Where the admin server finds who purges: the node, once there is one.
pub(crate) fn of_slot(slot: &super::NodeSlot) -> Option<Arc<dyn Purges>> {
    slot.node().map(|node| node as Arc<dyn Purges>)
}
