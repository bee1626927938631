//! What a node says of itself, the same over HTTP and over the socket.

use std::time::Duration;

use kvtier_core::{DomainStatistics, Statistics};
use kvtier_storage::nvme::NvmeStatistics;
use serde::{Deserialize, Serialize};

use super::peers::ClusterStatus;
use super::remote_status::RemoteStatus;
use super::watchers::Processor;

macro_rules! mirror {
    ($(#[$meta:meta])* $name:ident of $source:ident { $($(#[$doc:meta])* $field:ident,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct $name { $($(#[$doc])* pub $field: u64,)* }

        impl From<&$source> for $name {
            fn from(source: &$source) -> $name {
                $name { $($field: source.$field,)* }
            }
        }

        impl $name {
            /// Every field's name and value, in a fixed order.
            #[must_use]
            pub fn fields(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field),)*]
            }
        }
    };
}

mirror! {
    /// The tier manager's counters and gauges, for JSON.
    Counters of Statistics {
        /// Blocks with at least one copy. Gauge.
        blocks,
        /// Blocks with a copy in host memory. Gauge.
        host_blocks,
        /// Blocks with a copy on NVMe. Gauge.
        nvme_blocks,
        /// Blocks with a copy in device memory. Gauge.
        hbm_blocks,
        /// Blocks of older generations, hidden and not yet forgotten. Gauge.
        hidden_blocks,
        /// Bytes of host slots that are not free. Gauge.
        host_used_bytes,
        /// Host budget, bytes.
        host_capacity_bytes,
        /// Bytes of device slots that are not free. Gauge.
        hbm_used_bytes,
        /// Budget of device memory, bytes.
        hbm_capacity_bytes,
        /// Live payload on NVMe, bytes (4 KiB-aligned). Gauge.
        nvme_used_bytes,
        /// NVMe payload capacity, bytes: what live payload may reach.
        nvme_capacity_bytes,
        /// Host segments, those being opened or closed included. Gauge.
        host_segments,
        /// Device segments, those being opened or closed included. Gauge.
        hbm_segments,
        /// NVMe segments, those being opened or closed included. Gauge.
        nvme_segments,
        /// Clients, those that are quarantined included. Gauge.
        clients,
        /// Namespaces. Gauge.
        namespaces,
        /// Leases, expired ones included. Gauge.
        leases,
        /// Leases held past their time. Gauge.
        leases_expired,
        /// Reservations and grants, expired ones included. Gauge.
        reservations,
        /// Expired leases and reservations, and all of lost but living clients. Gauge.
        quarantined_slots,
        /// Their slots' bytes. Gauge.
        quarantined_bytes,
        /// Fetches and reserves that wait. Gauge.
        waiting,
        /// Actions that await their event. Gauge.
        operations_in_flight,
        /// Memory of all tables: index, policy, slots, records, leases, reservations. Gauge.
        index_bytes,
        /// Keys fetched from host memory.
        fetch_hits_host,
        /// Keys fetched from device memory.
        fetch_hits_hbm,
        /// Keys fetched from NVMe.
        fetch_hits_nvme,
        /// Keys fetched that were not here (keys after the first miss of a prefix fetch not counted).
        fetch_misses,
        /// Keys whose bytes came too late for the fetch that asked.
        fetch_late,
        /// Blocks published.
        puts_published,
        /// Copies of other nodes' blocks published.
        copies_published,
        /// Keys of reserves and seals that were present already.
        puts_present,
        /// Seals that were stale.
        puts_stale,
        /// Keys of reserves and seals that found no room.
        puts_busy,
        /// Blocks written to NVMe.
        demotions,
        /// Their payload, bytes.
        demoted_bytes,
        /// Blocks read from NVMe.
        promotions,
        /// Their payload, bytes.
        promoted_bytes,
        /// Blocks copied to device memory.
        hbm_promotions,
        /// Their payload, bytes.
        hbm_promoted_bytes,
        /// Blocks read from NVMe, or about to be, before anybody asked for them.
        prefetches,
        /// Of these, blocks that were in host memory when somebody did.
        prefetch_hits,
        /// Records copied between NVMe segments.
        relocations,
        /// Their payload, bytes.
        relocated_bytes,
        /// Host copies dropped to make room.
        evictions_host,
        /// Copies in device memory dropped to make room.
        evictions_hbm,
        /// NVMe copies dropped to make room.
        evictions_nvme,
        /// Blocks whose last copy went, for whatever reason.
        forgotten,
        /// Payloads that failed their check, and records and segments that the start found damaged.
        corrupt,
        /// Errors of the NVMe device.
        io_errors,
        /// Errors of the GPU, memory that it had none of included.
        hbm_errors,
        /// Tier resets begun.
        resets,
        /// Events for operations unknown or already answered.
        late_events,
        /// Generations raised.
        invalidations,
        /// 1 while NVMe is in service.
        nvme_in_service,
        /// Segments emptied to be used anew.
        segments_reclaimed,
        /// Blocks published or restored that every label's purge takes, because their labels are more than two, too many of one
        /// namespace, or not known.
        blocks_of_any_label,
        /// Lease and reservation ids that were stale, unknown or another client's.
        foreign_ids,
    }
}

mirror! {
    /// One trust domain's counts, for JSON.
    DomainCounters of DomainStatistics {
        /// Blocks with at least one copy.
        blocks,
        /// Blocks with a copy in host memory.
        host_blocks,
        /// Blocks with a copy on NVMe.
        nvme_blocks,
        /// Bytes of cached and reserved blocks, each counted once.
        used_bytes,
        /// Leases, expired ones included.
        leases,
        /// Reservations and grants, expired ones included.
        reservations,
        /// Expired leases and reservations, and all of lost but living clients.
        quarantined_slots,
        /// Their slots' bytes.
        quarantined_bytes,
    }
}

/// What came back at the start, and what was made durable since, for JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Durability {
    /// Blocks of an earlier run that are cached again.
    pub restored_blocks: u64,
    /// Their payload, bytes.
    pub restored_bytes: u64,
    /// Records of an earlier run that are not: older copies, older generations, of unknown namespaces, or without room.
    pub restored_left_out: u64,
    /// Records and segments of an earlier run that were damaged, or torn by a crash.
    pub restored_damaged: u64,
    /// Namespaces of earlier runs whose names and keys are lost to damage. Gauge.
    pub namespaces_lost: u64,
    /// 1 where the state directory was served with an anchor before and none is named now. Gauge.
    pub anchor_missing: u64,
    /// Syncs of the register of namespaces and generations.
    pub register_syncs: u64,
    /// Writes and syncs of it that failed.
    pub register_failures: u64,
}

impl Durability {
    /// Every field's name and value, in a fixed order.
    #[must_use]
    pub fn fields(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("restored_blocks", self.restored_blocks),
            ("restored_bytes", self.restored_bytes),
            ("restored_left_out", self.restored_left_out),
            ("restored_damaged", self.restored_damaged),
            ("namespaces_lost", self.namespaces_lost),
            ("anchor_missing", self.anchor_missing),
            ("register_syncs", self.register_syncs),
            ("register_failures", self.register_failures),
        ]
    }
}

/// What the NVMe device was given to do since the start, for JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Device {
    /// Payload bytes admitted to NVMe.
    pub device_admitted_bytes: u64,
    /// Bytes that the device was given: payloads, those that reclaim moved, padding, headers, indexes.
    pub device_written_bytes: u64,
    /// Operations refused because its queue was full.
    pub device_busy: u64,
    /// Operations whose deadline passed before the device was asked.
    pub device_late: u64,
    /// Memory beside the block index that records on NVMe take, bytes. Gauge.
    pub nvme_index_bytes: u64,
}

impl Device {
    /// Every field's name and value, in a fixed order.
    #[must_use]
    pub fn fields(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("device_admitted_bytes", self.device_admitted_bytes),
            ("device_written_bytes", self.device_written_bytes),
            ("device_busy", self.device_busy),
            ("device_late", self.device_late),
            ("nvme_index_bytes", self.nvme_index_bytes),
        ]
    }
}

impl From<NvmeStatistics> for Device {
    fn from(statistics: NvmeStatistics) -> Device {
        Device {
            device_admitted_bytes: statistics.written_bytes,
            device_written_bytes: statistics.device_written_bytes,
            device_busy: statistics.busy,
            device_late: statistics.late,
            nvme_index_bytes: statistics.index_bytes,
        }
    }
}

/// How often something took how long, for JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Durations {
    /// How often.
    pub count: u64,
    /// How long all of them took together.
    pub sum_seconds: f64,
    /// How many took at most [`Durations::STEPS_SECONDS`], each counted once, at its smallest; the last took longer.
    pub by_step: Vec<u64>,
}

impl Durations {
    /// What [`Durations::by_step`] counts up to.
    pub const STEPS_SECONDS: [f64; 14] = [
        0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0, 20.0, 60.0, 300.0,
    ];

    pub(crate) fn add(&mut self, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        self.count += 1;
        self.sum_seconds += seconds;
        self.by_step.resize(Durations::STEPS_SECONDS.len() + 1, 0);
        self.by_step[Durations::STEPS_SECONDS.partition_point(|&step| step < seconds)] += 1;
    }
}

/// Purges since the start, for JSON. Those of an earlier run count once they are done, without a duration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Purges {
    /// Purges that are not done. Gauge.
    pub purges_running: u64,
    /// Purges with a receipt.
    pub purges_completed: u64,
    /// Blocks and records that they destroyed.
    pub purged_blocks: u64,
    /// Bytes that they zeroed in memory and overwrote on NVMe.
    pub purged_bytes: u64,
    /// From a request to its acknowledgement.
    pub purge_acknowledge: Durations,
    /// From the request for a physical purge to the older wrapped key overwritten and synced.
    pub purge_key_destroyed: Durations,
    /// From a request in mode `invalidate` to its receipt.
    pub purge_invalidate: Durations,
    /// From a request in mode `physical` to its receipt.
    pub purge_physical: Durations,
}

impl Purges {
    /// Every counter's name and value, in a fixed order.
    #[must_use]
    pub fn fields(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("purges_running", self.purges_running),
            ("purges_completed", self.purges_completed),
            ("purged_blocks", self.purged_blocks),
            ("purged_bytes", self.purged_bytes),
        ]
    }
}

/// The whole node, as its administrator sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Seconds since the node started.
    pub uptime_seconds: f64,
    /// `serving` or `draining`.
    pub state: String,
    /// `io_uring`, `threads`, or `none` without an NVMe tier.
    pub nvme_engine: String,
    /// The GPU whose memory holds copies; `none` without such a tier.
    pub hbm_device: String,
    /// How bytes could get between NICs and that GPU, as was found at the start: `dma_buf`, `peer_memory` or `staged`, and in brackets why
    /// no earlier of them; `none` without such a tier. Blocks of peers land in host memory all the same.
    pub hbm_path: String,
    /// Which pages host memory has, and the remedy when they are small.
    pub host_pages: String,
    /// KiB of a host memory page.
    pub page_kib: u32,
    /// Bytes that indexes take for each block in them; 0 with no block.
    pub index_bytes_per_block: f64,
    /// Bytes that the NVMe device was given over payload bytes admitted there; 0 before the first.
    pub write_amplification: f64,
    /// The tier manager's counters.
    #[serde(flatten)]
    pub counters: Counters,
    /// What came back at the start, and what was made durable since.
    #[serde(flatten)]
    pub durability: Durability,
    /// What the NVMe device was given to do.
    #[serde(flatten)]
    pub device: Device,
    /// Purges since the start.
    #[serde(flatten)]
    pub purges: Purges,
    /// The node among its peers; none where it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterStatus>,
    /// The remote tier; absent where the settings name none.
    pub remote: Option<RemoteStatus>,
    /// Each trust domain's part.
    pub domains: Vec<DomainStatus>,
}

impl Status {
    /// Every counter's name and value, in a fixed order.
    #[must_use]
    pub fn fields(&self) -> Vec<(&'static str, u64)> {
        let mut fields = self.counters.fields();
        fields.extend(self.durability.fields());
        fields.extend(self.device.fields());
        fields.extend(self.purges.fields());
        fields
    }
}

/// One trust domain, as its members see it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DomainStatus {
    /// Name of the domain.
    pub domain: String,
    /// Its counts.
    #[serde(flatten)]
    pub counters: DomainCounters,
    /// Caches that said which generations they hold.
    pub processors: Vec<Processor>,
}
