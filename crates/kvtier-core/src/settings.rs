use std::time::Duration;

/// Sizes and bounds of a [`crate::TierManager`]. Plain data; [`CoreSettings::check`] once.
#[derive(Clone, Debug)]
pub struct CoreSettings {
    /// Host memory for blocks, bytes, all domains together.
    pub host_bytes: u64,
    /// Base size of a host segment, bytes (multiple of 4 KiB). Blocks that would leave more than a quarter of a base segment to one slot get
    /// segments of their own size.
    pub host_segment_bytes: u64,
    /// NVMe space, bytes, headers and indexes included. 0: no NVMe tier.
    pub nvme_bytes: u64,
    /// Size of an NVMe segment, bytes, header and index included.
    pub nvme_segment_bytes: u64,
    /// Bytes at the front of an NVMe segment that hold no payload (its header).
    pub nvme_segment_header_bytes: u64,
    /// Bytes of index footer that each record costs at the end of its NVMe segment.
    pub nvme_record_index_bytes: u64,
    /// Largest block, bytes.
    pub block_bytes_max: u32,
    /// Default byte quota of a namespace; `None`: no quota. Counts each cached or reserved block once.
    pub namespace_quota_bytes: Option<u64>,
    /// Below this share of free or clean (also on NVMe, unleased) bytes in a host group, demotion starts. Thousandths.
    pub host_clean_low_permille: u32,
    /// Demotion stops at this share. Thousandths.
    pub host_clean_high_permille: u32,
    /// Live payload allowed on NVMe as a share of its payload capacity; the rest is room for reclaim. Thousandths.
    pub nvme_live_permille: u32,
    /// How long a lease promises.
    pub lease_ttl: Duration,
    /// How long an unsealed reservation or grant lives.
    pub reservation_ttl: Duration,
    /// How long a device operation may take before its tier is reset.
    pub operation_deadline: Duration,
    /// First wait before a tier out of service is tried again; doubles up to 64 times that.
    pub tier_retry_backoff: Duration,
    /// Bounds. Full means `Busy`, never an endless wait.
    pub clients_max: usize,
    /// Namespaces, all domains together.
    pub namespaces_max: usize,
    /// Realizations.
    pub realizations_max: usize,
    /// Blocks in the index (each costs up to 128 bytes).
    pub blocks_max: usize,
    /// Leases held by one client.
    pub leases_per_client_max: usize,
    /// Bytes of reservations and grants held by one client.
    pub reserved_bytes_per_client_max: u64,
    /// Bytes of expired leases and reservations that one live client still maps; past it the client is refused.
    pub quarantine_bytes_per_client_max: u64,
    /// Fetches and reserves that wait, all clients together.
    pub waiting_max: usize,
    /// Fetches and reserves that wait, of one client.
    pub waiting_per_client_max: usize,
    /// Demotions and relocations in flight.
    pub demotions_in_flight_max: usize,
    /// Promotions in flight.
    pub promotions_in_flight_max: usize,
    /// Keys in one request.
    pub batch_keys_max: usize,
    /// A planted bug (feature `mutants`).
    #[cfg(feature = "mutants")]
    pub mutant: Option<crate::Mutant>,
}

impl Default for CoreSettings {
    fn default() -> Self {
        CoreSettings {
            host_bytes: 64 << 20,
            host_segment_bytes: 2 << 20,
            nvme_bytes: 0,
            nvme_segment_bytes: 4 << 20,
            nvme_segment_header_bytes: 4096,
            nvme_record_index_bytes: 64,
            block_bytes_max: 64 << 20,
            namespace_quota_bytes: None,
            host_clean_low_permille: 100,
            host_clean_high_permille: 200,
            nvme_live_permille: 940,
            lease_ttl: Duration::from_secs(30),
            reservation_ttl: Duration::from_secs(30),
            operation_deadline: Duration::from_secs(10),
            tier_retry_backoff: Duration::from_secs(1),
            clients_max: 1024,
            namespaces_max: 65_536,
            realizations_max: 4096,
            blocks_max: 64 << 20,
            leases_per_client_max: 65_536,
            reserved_bytes_per_client_max: 1 << 30,
            quarantine_bytes_per_client_max: 1 << 30,
            waiting_max: 65_536,
            waiting_per_client_max: 1024,
            demotions_in_flight_max: 64,
            promotions_in_flight_max: 256,
            batch_keys_max: 4096,
            #[cfg(feature = "mutants")]
            mutant: None,
        }
    }
}

/// A setting that cannot be, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {value}: {remedy}")]
pub struct SettingsError {
    /// Which field.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// What to do.
    pub remedy: String,
}

/// Settings that were checked.
#[derive(Clone, Debug)]
pub struct CheckedCoreSettings(CoreSettings);

impl std::ops::Deref for CheckedCoreSettings {
    type Target = CoreSettings;
    fn deref(&self) -> &CoreSettings {
        &self.0
    }
}
