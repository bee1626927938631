//! The numbers of a node as Prometheus reads them.
//!
//! Each scrape asks the node once and encodes that answer; nothing is counted twice, here and in the core.

mod cluster;
mod remote;
mod terms;

use std::collections::BTreeMap;
use std::fmt;

use kvtier::node::{ClusterStatus, Durations, Purges, RemoteStatus, Status};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

/// What a number does over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It only grows.
    Counter,
    /// It is what it is now.
    Gauge,
}

/// A number of the status and how it is published.
struct Metric {
    /// Its name in the status.
    source: &'static str,
    /// Its published name, without `kvtier_`, unit and `_total`.
    name: &'static str,
    kind: Kind,
    bytes: bool,
    help: &'static str,
}

const fn gauge(source: &'static str, help: &'static str) -> Metric {
    Metric {
        source,
        name: source,
        kind: Kind::Gauge,
        bytes: false,
        help,
    }
}

const fn gauge_bytes(source: &'static str, name: &'static str, help: &'static str) -> Metric {
    Metric {
        source,
        name,
        kind: Kind::Gauge,
        bytes: true,
        help,
    }
}

const fn counter(source: &'static str, help: &'static str) -> Metric {
    Metric {
        source,
        name: source,
        kind: Kind::Counter,
        bytes: false,
        help,
    }
}

const fn counter_bytes(source: &'static str, name: &'static str, help: &'static str) -> Metric {
    Metric {
        source,
        name,
        kind: Kind::Counter,
        bytes: true,
        help,
    }
}

const METRICS: &[Metric] = &[
    gauge("blocks", "Blocks that can be found, in any tier"),
    gauge("host_blocks", "Blocks with a copy in host memory"),
    gauge("hbm_blocks", "Blocks with a copy in memory of the GPU"),
    gauge("nvme_blocks", "Blocks with a copy on NVMe"),
    gauge("hidden_blocks", "Blocks that an invalidation hid and nobody swept yet"),
    gauge_bytes(
        "host_used_bytes",
        "host_used",
        "Host memory that holds blocks or is reserved for them",
    ),
    gauge_bytes("host_capacity_bytes", "host_capacity", "Host memory for blocks"),
    gauge_bytes("hbm_used_bytes", "hbm_used", "Memory of the GPU that holds copies"),
    gauge_bytes(
        "hbm_capacity_bytes",
        "hbm_capacity",
        "Memory of the GPU that copies may take",
    ),
    gauge_bytes("nvme_used_bytes", "nvme_used", "Live payload on NVMe"),
    gauge_bytes("nvme_capacity_bytes", "nvme_capacity", "NVMe space for blocks"),
    gauge("host_segments", "Open host segments"),
    gauge("hbm_segments", "Open segments in memory of the GPU"),
    gauge("nvme_segments", "NVMe segments that hold records"),
    gauge("clients", "Connected clients"),
    gauge("namespaces", "Namespaces seen since the start"),
    gauge("leases", "Leases held"),
    gauge("leases_expired", "Leases held past their time by live clients"),
    gauge("reservations", "Slots reserved and not sealed"),
    gauge("quarantined_slots", "Slots that a stalled client may still touch"),
    gauge_bytes("quarantined_bytes", "quarantined", "Bytes of those slots"),
    gauge("waiting", "Requests that wait for a device or for room"),
    gauge("operations_in_flight", "Operations that a device has not answered"),
    gauge_bytes("index_bytes", "index", "Memory of the block index"),
    gauge(
        "nvme_in_service",
        "1 when the NVMe tier takes requests, 0 when it is out of service or absent",
    ),
    counter("fetch_hits_host", "Blocks fetched from host memory"),
    counter("fetch_hits_hbm", "Blocks fetched from memory of the GPU"),
    counter("fetch_hits_nvme", "Blocks fetched from NVMe"),
    counter("fetch_misses", "Blocks asked for and not there"),
    counter(
        "fetch_late",
        "Blocks that NVMe delivered after the deadline of who asked",
    ),
    counter("puts_published", "Blocks published"),
    counter("copies_published", "Copies of other nodes' blocks published"),
    counter("puts_present", "Blocks put that were there already"),
    counter(
        "puts_stale",
        "Blocks put too late: the generation had moved or the reservation expired",
    ),
    counter("puts_busy", "Blocks refused for want of room, quota or index"),
    counter("demotions", "Blocks written to NVMe"),
    counter_bytes("demoted_bytes", "demoted", "Bytes written to NVMe by demotion"),
    counter("promotions", "Blocks read from NVMe into host memory"),
    counter_bytes("promoted_bytes", "promoted", "Bytes read from NVMe into host memory"),
    counter("hbm_promotions", "Blocks copied to memory of the GPU"),
    counter_bytes(
        "hbm_promoted_bytes",
        "hbm_promoted",
        "Bytes copied to memory of the GPU",
    ),
    counter("prefetches", "Blocks read from NVMe before anybody asked for them"),
    counter(
        "prefetch_hits",
        "Blocks read ahead that were in host memory when somebody asked for them",
    ),
    counter("relocations", "Blocks moved between NVMe segments by reclaim"),
    counter_bytes(
        "relocated_bytes",
        "relocated",
        "Bytes moved between NVMe segments by reclaim",
    ),
    counter("evictions_host", "Copies dropped from host memory"),
    counter("evictions_hbm", "Copies dropped from memory of the GPU"),
    counter("evictions_nvme", "Copies dropped from NVMe"),
    counter("forgotten", "Blocks whose last copy was dropped"),
    counter(
        "corrupt",
        "Blocks that failed their check and became a miss, and records and segments found damaged at the start",
    ),
    counter("io_errors", "Operations that a device answered with an error"),
    counter(
        "hbm_errors",
        "Operations that the GPU answered with an error, or for which it had no memory",
    ),
    counter("resets", "Times a tier was reset because an operation took too long"),
    counter(
        "late_events",
        "Completions that came after their operation was given up",
    ),
    counter("invalidations", "Namespaces invalidated"),
    counter("segments_reclaimed", "Segments emptied and given back"),
    counter(
        "blocks_of_any_label",
        "Blocks published or restored that every label's purge takes",
    ),
    counter(
        "foreign_ids",
        "Lease and reservation ids that a client sent and does not own",
    ),
    gauge("restored_blocks", "Blocks that the start took over from NVMe"),
    gauge_bytes("restored_bytes", "restored", "Their bytes"),
    gauge(
        "restored_left_out",
        "Records that the start found on NVMe and left out: older, unknown or without room",
    ),
    gauge(
        "restored_damaged",
        "Records and segments that the start found on NVMe damaged, or torn by a crash",
    ),
    gauge(
        "namespaces_lost",
        "Namespaces of earlier runs whose names and keys were lost to damage",
    ),
    gauge(
        "anchor_missing",
        "1 where the state directory was served with an anchor before and none is named now",
    ),
    counter("register_syncs", "Syncs of the register of namespaces and generations"),
    counter_bytes(
        "device_admitted_bytes",
        "nvme_admitted",
        "Payload bytes admitted to NVMe",
    ),
    counter_bytes(
        "device_written_bytes",
        "nvme_written",
        "Bytes that the NVMe device was given, all included: over those admitted, the write amplification",
    ),
    counter("device_busy", "NVMe operations refused because the queue was full"),
    counter(
        "device_late",
        "NVMe operations whose deadline passed before the device was asked",
    ),
    gauge_bytes(
        "nvme_index_bytes",
        "nvme_index",
        "Memory beside the block index that records on NVMe take",
    ),
    counter("register_failures", "Writes and syncs of the register that failed"),
    gauge("purges_running", "Purges that are not done"),
    counter("purges_completed", "Purges with a receipt since the start"),
    counter("purged_blocks", "Blocks and records that purges destroyed"),
    counter_bytes(
        "purged_bytes",
        "purged",
        "Bytes that purges zeroed in memory and overwrote on NVMe",
    ),
];

/// One scrape's numbers, by their name in the status.
struct Scrape {
    numbers: BTreeMap<&'static str, u64>,
    purges: Option<Purges>,
    cluster: Option<ClusterStatus>,
    remote: Option<RemoteStatus>,
    /// How bytes could get between NICs and the GPU, where there is a tier in its memory.
    hbm_path: Option<String>,
    uptime_seconds: f64,
    version: &'static str,
}

impl fmt::Debug for Scrape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Scrape")
            .field("numbers", &self.numbers.len())
            .finish_non_exhaustive()
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for metric in METRICS {
            let Some(value) = self.numbers.get(metric.source).copied() else {
                continue;
            };
            let unit = metric.bytes.then_some(&Unit::Bytes);
            match metric.kind {
                Kind::Counter => {
                    let counter = ConstCounter::new(value);
                    counter.encode(encoder.encode_descriptor(
                        metric.name,
                        metric.help,
                        unit,
                        MetricType::Counter,
                    )?)?;
                }
                Kind::Gauge => {
                    let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
                    gauge.encode(encoder.encode_descriptor(metric.name, metric.help, unit, MetricType::Gauge)?)?;
                }
            }
        }
        if let Some(purges) = &self.purges {
            encode_durations(&mut encoder, purges)?;
        }
        if let Some(cluster) = &self.cluster {
            cluster::encode(&mut encoder, cluster)?;
        }
        if let Some(remote) = &self.remote {
            remote::encode(&mut encoder, remote)?;
        }
        let peers = self.cluster.as_ref().map(|cluster| ("peers", &cluster.terms));
        let remote = self
            .remote
            .as_ref()
            .map(|remote| (remote.backend.as_str(), &remote.terms));
        let compared: Vec<_> = peers
            .into_iter()
            .chain(remote)
            .filter(|(_, terms)| !terms.is_empty())
            .collect();
        if !compared.is_empty() {
            terms::encode(&mut encoder, &compared)?;
        }
        let uptime = ConstGauge::new(self.uptime_seconds);
        uptime.encode(encoder.encode_descriptor(
            "uptime",
            "Time since the daemon started",
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?)?;
        if let Some(path) = &self.hbm_path {
            let path = prometheus_client::metrics::info::Info::new(vec![("path", path.as_str())]);
            path.encode(encoder.encode_descriptor(
                "hbm_network",
                "How bytes could get between NICs and the GPU: dma_buf, peer_memory or staged; blocks of peers land in host memory",
                None,
                MetricType::Info,
            )?)?;
        }
        let build = prometheus_client::metrics::info::Info::new(vec![("version", self.version)]);
        build.encode(encoder.encode_descriptor("build", "Version of the daemon", None, MetricType::Info)?)
    }
}

/// How long purges took. Histograms, so that quantiles can be had over many nodes.
fn encode_durations(encoder: &mut DescriptorEncoder<'_>, purges: &Purges) -> fmt::Result {
    let steps = || Durations::STEPS_SECONDS.into_iter().chain([f64::INFINITY]);
    let buckets = |durations: &Durations| -> Vec<(f64, u64)> {
        let counts = durations.by_step.iter().copied().chain(std::iter::repeat(0));
        steps().zip(counts).collect()
    };
    let plain = [
        (
            "purge_acknowledge",
            "Time from the request for a purge to its acknowledgement",
            &purges.purge_acknowledge,
        ),
        (
            "purge_key_destroyed",
            "Time from the request for a physical purge to the older key overwritten and synced",
            &purges.purge_key_destroyed,
        ),
    ];
    for (name, help, durations) in plain {
        let mut metric = encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        metric.encode_histogram::<NoLabelSet>(durations.sum_seconds, durations.count, &buckets(durations), None)?;
    }
    let help = "Time from the request for a purge to its receipt, by mode";
    let mut family = encoder.encode_descriptor("purge_duration", help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for (mode, durations) in [
        ("invalidate", &purges.purge_invalidate),
        ("physical", &purges.purge_physical),
    ] {
        let labels = [("mode", mode)];
        let mut metric = family.encode_family(&labels)?;
        metric.encode_histogram::<NoLabelSet>(durations.sum_seconds, durations.count, &buckets(durations), None)?;
    }
    Ok(())
}

/// The way's name without the reasons.
fn hbm_path(words: &str) -> Option<String> {
    let name = words.split(' ').next().unwrap_or_default();
    (!matches!(name, "" | "none")).then(|| name.to_owned())
}

/// The text of one scrape. Without a status (no node yet, or none any more) only the process speaks.
///
/// # Errors
/// When the encoder refuses, which is a bug.
pub fn exposition(status: Option<&Status>, uptime_seconds: f64) -> Result<String, fmt::Error> {
    // A registry a scrape: collectors must be `'static`, and the status is an answer, not a thing that lives on.
    let mut registry = Registry::with_prefix("kvtier");
    registry.register_collector(Box::new(Scrape {
        numbers: status
            .map(|status| status.fields().into_iter().collect())
            .unwrap_or_default(),
        purges: status.map(|status| status.purges.clone()),
        cluster: status.and_then(|status| status.cluster.clone()),
        remote: status.and_then(|status| status.remote.clone()),
        hbm_path: status.and_then(|status| hbm_path(&status.hbm_path)),
        uptime_seconds,
        version: env!("CARGO_PKG_VERSION"),
    }));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

/// The content type that goes with [`exposition`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[cfg(test)]
mod tests {
    use kvtier::node::Status;

    use super::{METRICS, exposition};

    #[test]
    fn every_number_of_the_status_has_a_help_line_a_prefix_and_a_unit() {
        let mut status = Status::default();
        status.counters.fetch_hits_host = 20;
        status.counters.host_used_bytes = 3;
        status.purges.purge_physical.count = 1;
        status.purges.purge_physical.sum_seconds = 30.0;
        status.purges.purge_physical.by_step = vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];
        let text = exposition(Some(&status), 1.5).unwrap();
        assert!(
            text.contains("# HELP kvtier_fetch_hits_host Blocks fetched from host memory\n"),
            "{text}"
        );
        assert!(text.contains("\nkvtier_fetch_hits_host_total 20\n"), "{text}");
        assert!(text.contains("\nkvtier_demoted_bytes_total 0\n"), "{text}");
        assert!(text.contains("\nkvtier_host_used_bytes 3\n"), "{text}");
        for line in [
            "kvtier_purge_duration_seconds_sum{mode=\"physical\"} 30.0",
            "kvtier_purge_duration_seconds_count{mode=\"physical\"} 1",
            "kvtier_purge_duration_seconds_bucket{le=\"20.0\",mode=\"physical\"} 0",
            "kvtier_purge_duration_seconds_bucket{le=\"60.0\",mode=\"physical\"} 1",
            "kvtier_purge_duration_seconds_bucket{le=\"+Inf\",mode=\"physical\"} 1",
            "kvtier_purge_acknowledge_seconds_count 0",
        ] {
            assert!(text.contains(&format!("\n{line}\n")), "{line}: {text}");
        }
        assert!(text.contains("\nkvtier_uptime_seconds 1.5\n"), "{text}");
        assert!(text.contains("kvtier_build_info{version="), "{text}");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            assert!(line.starts_with("kvtier_"), "{line}");
        }
        assert_eq!(text.matches("# HELP").count(), METRICS.len() + 5);
        let mut counted: Vec<&str> = status.fields().into_iter().map(|(name, _)| name).collect();
        let mut published: Vec<&str> = METRICS.iter().map(|metric| metric.source).collect();
        counted.sort_unstable();
        published.sort_unstable();
        assert_eq!(counted, published, "the status and the metrics name the same numbers");
    }

    #[test]
    fn without_a_node_the_process_still_answers() {
        let text = exposition(None, 0.0).unwrap();
        assert!(
            text.contains("kvtier_build_info") && !text.contains("kvtier_blocks"),
            "{text}"
        );
    }
}
