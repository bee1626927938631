//! Namespaces as an administrator sees and sets them.

use std::time::Instant;

use kvtier_core::TrustDomain;

use super::{ACKNOWLEDGE_TIMEOUT, Cause, Purging, Settled, split};
use crate::purge::{NamespaceSettings, NamespaceStatus, PurgeError};

impl Purging {
    pub(in crate::node) fn namespace_statuses(&self) -> Vec<NamespaceStatus> {
        let mut statuses = Vec::new();
        for (label, domain) in self.domains.all() {
            let names: Vec<String> = self
                .driver
                .look(|manager| manager.namespaces_of(domain).map(|(name, _)| name.to_owned()).collect());
            statuses.extend(
                names
                    .iter()
                    .filter_map(|name| self.namespace_status(&label, domain, name)),
            );
        }
        statuses.sort_by(|one, other| one.namespace.cmp(&other.namespace));
        statuses
    }

    fn namespace_status(&self, label: &str, domain: TrustDomain, name: &str) -> Option<NamespaceStatus> {
        let (generation, statistics, quota_bytes) = self.driver.look(|manager| {
            let (namespace, generation) = manager.find_namespace(domain, name)?;
            let (statistics, quota_bytes) = manager.namespace_statistics(namespace);
            Some((generation, statistics, quota_bytes))
        })?;
        let namespace = format!("{label}/{name}");
        Some(NamespaceStatus {
            labels: self.namespaces.of(&namespace).labels,
            refused: self.driver.recorder.refusal(label, name, generation),
            namespace,
            generation: generation.0,
            blocks: statistics.blocks,
            host_blocks: statistics.host_blocks,
            nvme_blocks: statistics.nvme_blocks,
            used_bytes: statistics.used_bytes,
            quota_bytes,
        })
    }

    pub(in crate::node) fn set_namespace(
        &self,
        namespace: &str,
        settings: NamespaceSettings,
    ) -> Result<NamespaceStatus, PurgeError> {
        let long = |text: &String| text.len() > 64;
        if settings.labels.len() > 16 || settings.labels.iter().any(|(key, value)| long(key) || long(value)) {
            return Err(PurgeError::Invalid(
                "labels: give at most 16, keys and values of at most 64 bytes".into(),
            ));
        }
        let (name, id, domain) = self.resolve(namespace)?;
        let quota_bytes = settings.quota_bytes.or(self.settings.namespace_quota_bytes);
        self.namespaces
            .set(&name, settings)
            .map_err(|error| PurgeError::Unavailable(error.to_string()))?;
        self.driver
            .with(|decider, _| decider.manager.set_quota(id, quota_bytes));
        let (label, bare) = split(&name);
        self.namespace_status(label, domain, bare)
            .ok_or(PurgeError::UnknownNamespace(name.clone()))
    }

    pub(super) fn apply_namespace_settings(&self) {
        for (name, settings) in self.namespaces.all() {
            // One that the register lost has no blocks either.
            if let Ok((_, id, _)) = self.resolve(&name)
                && let Some(quota_bytes) = settings.quota_bytes
            {
                self.driver
                    .with(|decider, _| decider.manager.set_quota(id, Some(quota_bytes)));
            }
        }
    }

    /// Raises a namespace above what the anchor knows, so that it is served again, empty.
    pub(in crate::node) fn advance(&self, namespace: &str) -> Result<NamespaceStatus, PurgeError> {
        let (name, id, domain) = self.resolve(namespace)?;
        let (label, bare) = split(&name);
        let anchored = self.driver.recorder.anchored_generation(label, bare);
        let target = kvtier_core::Generation(anchored + 1);
        let deadline = Some(Instant::now() + ACKNOWLEDGE_TIMEOUT);
        let settled = self.settle(deadline, |decider, now| {
            self.driver.raise(decider, id, Some(target), Cause::Own, now)
        });
        let Some(Settled::Invalidated(_)) = settled else {
            return Err(PurgeError::Unavailable(
                "its generation was not recorded in time: ask again".into(),
            ));
        };
        self.namespace_status(label, domain, bare)
            .ok_or(PurgeError::UnknownNamespace(name.clone()))
    }
}
