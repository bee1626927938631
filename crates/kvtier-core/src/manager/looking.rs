use super::TierManager;
use crate::{DomainStatistics, NamespaceId, Statistics, TrustDomain};

impl TierManager {
    /// Counters and gauges.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let quarantined = |of: fn(&crate::client_table::Client) -> u64| self.clients.iter().map(|(_, c)| of(c)).sum();
        let nvme = self.nvme.as_ref();
        let hbm = self.hbm.as_ref();
        Statistics {
            host_used_bytes: self.host.used_bytes,
            host_capacity_bytes: self.settings.host_bytes,
            hbm_blocks: hbm.map_or(0, |hbm| hbm.blocks),
            hbm_used_bytes: hbm.map_or(0, |hbm| hbm.used_bytes),
            hbm_capacity_bytes: hbm.map_or(0, |hbm| hbm.bytes_max),
            hbm_segments: hbm.map_or(0, |hbm| hbm.segments.iter().flatten().count() as u64),
            nvme_used_bytes: nvme.map_or(0, |nvme| nvme.used_bytes),
            nvme_capacity_bytes: nvme.map_or(0, crate::nvme_table::NvmeTable::payload_capacity),
            host_segments: self.host.segments.iter().flatten().count() as u64,
            nvme_segments: nvme.map_or(0, |nvme| u64::from(nvme.opened)),
            clients: self.clients.len() as u64,
            namespaces: self.namespaces.len() as u64,
            leases: self.leases.len() as u64,
            leases_expired: self.leases.expired() as u64,
            reservations: self.reservations.len() as u64,
            quarantined_slots: quarantined(|client| client.quarantined_slots),
            quarantined_bytes: quarantined(|client| client.quarantined_bytes),
            waiting: self.waiting.len() as u64,
            operations_in_flight: self.operations.len() as u64,
            index_bytes: self.memory_bytes(),
            nvme_in_service: u64::from(self.nvme_in_service()),
            ..self.counters
        }
    }

    /// What one trust domain uses.
    #[must_use]
    pub fn domain_statistics(&self, domain: TrustDomain) -> DomainStatistics {
        let mut sum = DomainStatistics::default();
        for namespace in self.namespaces.iter().filter(|namespace| namespace.domain == domain) {
            sum.blocks += namespace.blocks;
            sum.host_blocks += namespace.host_blocks;
            sum.nvme_blocks += namespace.nvme_blocks;
            sum.used_bytes += namespace.used_bytes;
        }
        for (_, client) in self.clients.iter().filter(|(_, client)| client.domain == domain) {
            sum.leases += u64::from(client.leases);
            sum.reservations += u64::from(client.reservations);
            sum.quarantined_slots += client.quarantined_slots;
            sum.quarantined_bytes += client.quarantined_bytes;
        }
        sum
    }

    /// What one namespace uses, and its quota.
    ///
    /// # Panics
    /// Where the namespace was never opened.
    #[must_use]
    pub fn namespace_statistics(&self, namespace: NamespaceId) -> (DomainStatistics, Option<u64>) {
        let entry = self.namespaces.entry(namespace).expect("a namespace that was opened");
        let statistics = DomainStatistics {
            blocks: entry.blocks,
            host_blocks: entry.host_blocks,
            nvme_blocks: entry.nvme_blocks,
            used_bytes: entry.used_bytes,
            ..DomainStatistics::default()
        };
        (statistics, entry.quota_bytes)
    }

    /// Memory of all tables.
    fn memory_bytes(&self) -> u64 {
        self.index.memory_bytes()
            + self.policy.memory_bytes()
            + self.host.memory_bytes()
            + self.hbm.as_ref().map_or(0, crate::hbm_table::HbmTable::memory_bytes)
            + self.nvme.as_ref().map_or(0, crate::nvme_table::NvmeTable::memory_bytes)
            + self.leases.memory_bytes()
            + self.reservations.memory_bytes()
            + self.promotions.memory_bytes()
            + self.successors.memory_bytes()
            + self.waiting.memory_bytes()
            + self.writes.memory_bytes()
            + self.stale.memory_bytes()
            + self.namespaces.memory_bytes()
            + self.clients.memory_bytes()
    }
}
