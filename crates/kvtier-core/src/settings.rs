use std::time::Duration;

use crate::{EvictionPolicy, LeafFirstLru, ReuseHazard};

/// Which blocks go when room is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Eviction {
    /// Those used longest ago, leaves first: [`LeafFirstLru`].
    #[default]
    Lru,
    /// Those that are least likely to be used soon, as far as that was learned, leaves first: [`ReuseHazard`].
    Hazard,
}

/// Sizes and bounds of a [`crate::TierManager`]. Plain data; [`CoreSettings::check`] once.
#[derive(Clone, Debug)]
pub struct CoreSettings {
    /// Host memory for blocks, bytes, all domains together.
    pub host_bytes: u64,
    /// Base size of a host segment, bytes (multiple of 4 KiB). Blocks that would leave more than a quarter of a base segment to one slot get
    /// segments of their own size.
    pub host_segment_bytes: u64,
    /// Device memory for copies of blocks, bytes, all domains together. 0: no tier there.
    pub hbm_bytes: u64,
    /// Base size of a device segment, bytes (multiple of 4 KiB). Blocks larger than a quarter of it get segments of four.
    pub hbm_segment_bytes: u64,
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
    /// Slots of a host group that are free, clean or on their way to it whatever the shares say, as far as they are a
    /// quarter of it.
    pub host_clean_slots_min: u32,
    /// Whether the policy says what is worth writing to NVMe. Without it everything is written, to see what that gains.
    pub nvme_admission: bool,
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
    /// Sets of labels that blocks of one namespace carry at once, at most 65,534 (each up to 64 bytes). Past it a block counts
    /// as put under every label: a purge by label takes too much, never too little.
    pub label_sets_per_namespace_max: usize,
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
    /// Copies to device memory in flight.
    pub hbm_promotions_in_flight_max: usize,
    /// Blocks after those of a request that are read from NVMe ahead of it. 0: none.
    pub prefetch_blocks: usize,
    /// Keys in one request.
    pub batch_keys_max: usize,
    /// Which blocks go when room is needed.
    pub eviction: Eviction,
    /// Evicted blocks that [`Eviction::Hazard`] remembers, 16 bytes each and up to 48 for the visits that they belong to. Their
    /// table grows as they come. It should hold what is put within the time after which blocks are still used again.
    pub ghosts_max: usize,
    /// For [`Eviction::Hazard`]: how much longer the next token of a prompt takes to compute for each token before it, as a share of what the
    /// first takes. 0: all tokens are worth the same.
    pub depth_cost: f64,
    /// Seeds the lookup table, so that who does not know it cannot aim keys at one bucket. Any number; a secret one where
    /// clients are not trusted.
    pub index_seed: u64,
    /// A planted bug (feature `mutants`).
    #[cfg(feature = "mutants")]
    pub mutant: Option<crate::Mutant>,
}

impl Default for CoreSettings {
    fn default() -> Self {
        CoreSettings {
            host_bytes: 64 << 20,
            host_segment_bytes: 2 << 20,
            hbm_bytes: 0,
            hbm_segment_bytes: 32 << 20,
            nvme_bytes: 0,
            nvme_segment_bytes: 4 << 20,
            nvme_segment_header_bytes: 4096,
            nvme_record_index_bytes: 64,
            block_bytes_max: 64 << 20,
            namespace_quota_bytes: None,
            host_clean_low_permille: 50,
            host_clean_high_permille: 100,
            host_clean_slots_min: 8,
            nvme_admission: true,
            nvme_live_permille: 1000,
            lease_ttl: Duration::from_secs(30),
            reservation_ttl: Duration::from_secs(30),
            operation_deadline: Duration::from_secs(10),
            tier_retry_backoff: Duration::from_secs(1),
            clients_max: 1024,
            namespaces_max: 65_536,
            realizations_max: 4096,
            label_sets_per_namespace_max: 16_384,
            blocks_max: 64 << 20,
            leases_per_client_max: 65_536,
            reserved_bytes_per_client_max: 1 << 30,
            quarantine_bytes_per_client_max: 1 << 30,
            waiting_max: 65_536,
            waiting_per_client_max: 1024,
            demotions_in_flight_max: 64,
            promotions_in_flight_max: 256,
            hbm_promotions_in_flight_max: 32,
            prefetch_blocks: 0,
            batch_keys_max: 4096,
            eviction: Eviction::Lru,
            ghosts_max: 1 << 20,
            depth_cost: 0.0,
            index_seed: 0x6b76_7469_6572,
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

impl CoreSettings {
    /// Refuses what cannot be, naming the field, its value and the remedy.
    ///
    /// # Errors
    /// The first field that cannot be.
    pub fn check(self) -> Result<CheckedCoreSettings, SettingsError> {
        const PAGE: u64 = 4096;
        let wrong = |field, value: u64, remedy: &str| {
            Err(SettingsError {
                field,
                value: value.to_string(),
                remedy: remedy.to_owned(),
            })
        };
        if self.host_segment_bytes < PAGE || !self.host_segment_bytes.is_multiple_of(PAGE) {
            return wrong(
                "host_segment_bytes",
                self.host_segment_bytes,
                "give a multiple of 4 KiB",
            );
        }
        if self.host_bytes < self.host_segment_bytes {
            return wrong("host_bytes", self.host_bytes, "give at least one host segment");
        }
        if self.host_bytes > 1 << 50 {
            return wrong("host_bytes", self.host_bytes, "give at most 1 PiB");
        }
        if self.hbm_bytes > 0 {
            if self.hbm_segment_bytes < PAGE
                || !self.hbm_segment_bytes.is_multiple_of(PAGE)
                || self.hbm_segment_bytes > 1 << 32
            {
                return wrong(
                    "hbm_segment_bytes",
                    self.hbm_segment_bytes,
                    "give a multiple of 4 KiB, at most 4 GiB",
                );
            }
            if self.hbm_bytes < self.hbm_segment_bytes {
                return wrong(
                    "hbm_bytes",
                    self.hbm_bytes,
                    "give at least one device segment, or 0 for none",
                );
            }
            if self.hbm_bytes > 1 << 44 {
                return wrong("hbm_bytes", self.hbm_bytes, "give at most 16 TiB");
            }
        }
        if self.block_bytes_max == 0 || u64::from(self.block_bytes_max) > 1 << 30 {
            return wrong(
                "block_bytes_max",
                u64::from(self.block_bytes_max),
                "give 1 byte to 1 GiB",
            );
        }
        if self.nvme_bytes > 0 {
            if !self.nvme_segment_bytes.is_multiple_of(PAGE) || self.nvme_segment_bytes > 1 << 40 {
                return wrong(
                    "nvme_segment_bytes",
                    self.nvme_segment_bytes,
                    "give a multiple of 4 KiB, at most 1 TiB",
                );
            }
            if !self.nvme_segment_header_bytes.is_multiple_of(PAGE) {
                return wrong(
                    "nvme_segment_header_bytes",
                    self.nvme_segment_header_bytes,
                    "give a multiple of 4 KiB",
                );
            }
            if self.nvme_segment_bytes < self.nvme_segment_header_bytes + self.nvme_record_index_bytes + PAGE {
                return wrong(
                    "nvme_segment_bytes",
                    self.nvme_segment_bytes,
                    "give room for the header and one block",
                );
            }
            if self.nvme_bytes / self.nvme_segment_bytes < 4 {
                return wrong(
                    "nvme_bytes",
                    self.nvme_bytes,
                    "give at least four NVMe segments, or 0 for no NVMe tier",
                );
            }
            if self.nvme_bytes / self.nvme_segment_bytes > 1 << 24 {
                return wrong(
                    "nvme_segment_bytes",
                    self.nvme_segment_bytes,
                    "give larger segments: at most 16 M fit in the tables",
                );
            }
        }
        for (field, value) in [
            ("host_clean_low_permille", self.host_clean_low_permille),
            ("host_clean_high_permille", self.host_clean_high_permille),
            ("nvme_live_permille", self.nvme_live_permille),
        ] {
            if value > 1000 {
                return wrong(field, u64::from(value), "give thousandths, at most 1000");
            }
        }
        if self.host_clean_low_permille > self.host_clean_high_permille {
            return wrong(
                "host_clean_low_permille",
                u64::from(self.host_clean_low_permille),
                "give at most host_clean_high_permille",
            );
        }
        for (field, duration) in [
            ("lease_ttl", self.lease_ttl),
            ("reservation_ttl", self.reservation_ttl),
            ("operation_deadline", self.operation_deadline),
            ("tier_retry_backoff", self.tier_retry_backoff),
        ] {
            if duration < Duration::from_millis(1) || duration > Duration::from_secs(86_400) {
                return Err(SettingsError {
                    field,
                    value: format!("{duration:?}"),
                    remedy: "give 1 ms to 1 day".to_owned(),
                });
            }
        }
        for (field, value, most) in [
            ("clients_max", self.clients_max, 1 << 20),
            ("namespaces_max", self.namespaces_max, 1 << 30),
            ("realizations_max", self.realizations_max, 1 << 16),
            (
                "label_sets_per_namespace_max",
                self.label_sets_per_namespace_max,
                65_534,
            ),
            ("blocks_max", self.blocks_max, 1 << 31),
            ("leases_per_client_max", self.leases_per_client_max, 1 << 24),
            ("waiting_max", self.waiting_max, 1 << 24),
            ("waiting_per_client_max", self.waiting_per_client_max, 1 << 24),
            ("demotions_in_flight_max", self.demotions_in_flight_max, 1 << 20),
            ("promotions_in_flight_max", self.promotions_in_flight_max, 1 << 20),
            (
                "hbm_promotions_in_flight_max",
                self.hbm_promotions_in_flight_max,
                1 << 16,
            ),
            ("batch_keys_max", self.batch_keys_max, 1 << 20),
        ] {
            if value == 0 || value > most {
                return Err(SettingsError {
                    field,
                    value: value.to_string(),
                    remedy: format!("give 1 to {most}"),
                });
            }
        }
        if !(0.0..=1.0).contains(&self.depth_cost) {
            return Err(SettingsError {
                field: "depth_cost",
                value: self.depth_cost.to_string(),
                remedy: "give 0 to 1".to_owned(),
            });
        }
        if self.prefetch_blocks > 4096 {
            return wrong(
                "prefetch_blocks",
                self.prefetch_blocks as u64,
                "give at most 4096, or 0 for none",
            );
        }
        if self.ghosts_max > 1 << 31 {
            return wrong("ghosts_max", self.ghosts_max as u64, "give at most 2^31");
        }
        Ok(CheckedCoreSettings(self))
    }
}

/// Settings that were checked.
#[derive(Clone, Debug)]
pub struct CheckedCoreSettings(CoreSettings);

impl CheckedCoreSettings {
    /// A policy of the kind that [`CoreSettings::eviction`] names, that knows no block yet.
    #[must_use]
    pub fn policy(&self) -> Box<dyn EvictionPolicy> {
        match self.eviction {
            Eviction::Lru => Box::new(LeafFirstLru::new()),
            Eviction::Hazard => Box::new(ReuseHazard::weighed(self.ghosts_max, self.depth_cost)),
        }
    }
}

impl std::ops::Deref for CheckedCoreSettings {
    type Target = CoreSettings;
    fn deref(&self) -> &CoreSettings {
        &self.0
    }
}
