/// Counters and gauges of a [`crate::TierManager`]. Counters never fall within a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Blocks with at least one copy. Gauge.
    pub blocks: u64,
    /// Blocks with a copy in host memory. Gauge.
    pub host_blocks: u64,
    /// Blocks with a copy on NVMe. Gauge.
    pub nvme_blocks: u64,
    /// Blocks with a copy in device memory. Gauge.
    pub hbm_blocks: u64,
    /// Blocks of older generations, hidden and not yet forgotten. Gauge.
    pub hidden_blocks: u64,
    /// Bytes of host slots that are not free. Gauge.
    pub host_used_bytes: u64,
    /// Host budget, bytes.
    pub host_capacity_bytes: u64,
    /// Bytes of device slots that are not free. Gauge.
    pub hbm_used_bytes: u64,
    /// Budget of device memory, bytes.
    pub hbm_capacity_bytes: u64,
    /// Live payload on NVMe, bytes (4 KiB-aligned). Gauge.
    pub nvme_used_bytes: u64,
    /// NVMe payload capacity, bytes: what live payload may reach.
    pub nvme_capacity_bytes: u64,
    /// Host segments, those being opened or closed included. Gauge.
    pub host_segments: u64,
    /// Device segments, those being opened or closed included. Gauge.
    pub hbm_segments: u64,
    /// NVMe segments, those being opened or closed included. Gauge.
    pub nvme_segments: u64,
    /// Clients, those that are quarantined included. Gauge.
    pub clients: u64,
    /// Namespaces. Gauge.
    pub namespaces: u64,
    /// Leases, expired ones included. Gauge.
    pub leases: u64,
    /// Leases held past their time. Gauge.
    pub leases_expired: u64,
    /// Reservations and grants, expired ones included. Gauge.
    pub reservations: u64,
    /// Expired leases and reservations, and all of lost but living clients. Gauge.
    pub quarantined_slots: u64,
    /// Their slots' bytes. Gauge.
    pub quarantined_bytes: u64,
    /// Fetches and reserves that wait. Gauge.
    pub waiting: u64,
    /// Actions that await their event. Gauge.
    pub operations_in_flight: u64,
    /// Memory of all tables: index, policy, slots, records, leases, reservations. Gauge.
    pub index_bytes: u64,
    /// Keys fetched from host memory.
    pub fetch_hits_host: u64,
    /// Keys fetched from device memory.
    pub fetch_hits_hbm: u64,
    /// Keys fetched from NVMe.
    pub fetch_hits_nvme: u64,
    /// Keys fetched that were not here (keys after the first miss of a prefix fetch not counted).
    pub fetch_misses: u64,
    /// Keys whose bytes came too late for the fetch that asked.
    pub fetch_late: u64,
    /// Blocks published.
    pub puts_published: u64,
    /// Copies of other nodes' blocks published.
    pub copies_published: u64,
    /// Keys of reserves and seals that were present already.
    pub puts_present: u64,
    /// Seals that were stale.
    pub puts_stale: u64,
    /// Keys of reserves and seals that found no room.
    pub puts_busy: u64,
    /// Blocks written to NVMe.
    pub demotions: u64,
    /// Their payload, bytes.
    pub demoted_bytes: u64,
    /// Blocks forgotten because the policy did not admit them to NVMe.
    pub admissions_refused: u64,
    /// Blocks read from NVMe.
    pub promotions: u64,
    /// Their payload, bytes.
    pub promoted_bytes: u64,
    /// Blocks copied to device memory.
    pub hbm_promotions: u64,
    /// Their payload, bytes.
    pub hbm_promoted_bytes: u64,
    /// Blocks read from NVMe, or about to be, before anybody asked for them.
    pub prefetches: u64,
    /// Of these, blocks that were in host memory when somebody did.
    pub prefetch_hits: u64,
    /// Records copied between NVMe segments.
    pub relocations: u64,
    /// Their payload, bytes.
    pub relocated_bytes: u64,
    /// Host copies dropped to make room.
    pub evictions_host: u64,
    /// Copies in device memory dropped to make room.
    pub evictions_hbm: u64,
    /// NVMe copies dropped to make room.
    pub evictions_nvme: u64,
    /// Blocks whose last copy went, for whatever reason.
    pub forgotten: u64,
    /// Payloads that failed their check.
    pub corrupt: u64,
    /// Errors of the NVMe device.
    pub io_errors: u64,
    /// Errors of the GPU, memory that it had none of included.
    pub hbm_errors: u64,
    /// Tier resets begun.
    pub resets: u64,
    /// Events for operations unknown or already answered.
    pub late_events: u64,
    /// Generations raised.
    pub invalidations: u64,
    /// 1 while NVMe is in service.
    pub nvme_in_service: u64,
    /// Segments emptied to be used anew.
    pub segments_reclaimed: u64,
    /// Blocks published or restored that every label's purge takes, because their labels are more than two, too many of one
    /// namespace, or not known.
    pub blocks_of_any_label: u64,
    /// Lease and reservation ids that were stale, unknown or another client's.
    pub foreign_ids: u64,
}

/// What one trust domain uses. Says nothing of other domains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DomainStatistics {
    /// Blocks with at least one copy.
    pub blocks: u64,
    /// Blocks with a copy in host memory.
    pub host_blocks: u64,
    /// Blocks with a copy on NVMe.
    pub nvme_blocks: u64,
    /// Bytes of cached and reserved blocks, each counted once.
    pub used_bytes: u64,
    /// Leases, expired ones included.
    pub leases: u64,
    /// Reservations and grants, expired ones included.
    pub reservations: u64,
    /// Expired leases and reservations, and all of lost but living clients.
    pub quarantined_slots: u64,
    /// Their slots' bytes.
    pub quarantined_bytes: u64,
}
