//! What a node says of its peers.

use std::fmt;

use kvtier::node::ClusterStatus;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

/// A number and the labels that tell it from others of its name.
type Labelled = (Vec<(&'static str, String)>, u64);

pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, cluster: &ClusterStatus) -> fmt::Result {
    let bytes = Some(&Unit::Bytes);
    let own = |value: u64| vec![(Vec::new(), value)];
    counter(
        encoder,
        "peer_leased_blocks",
        "Blocks leased to peers",
        None,
        &own(cluster.leased_blocks),
    )?;
    counter(
        encoder,
        "peer_leased",
        "Bytes of blocks leased to peers",
        bytes,
        &own(cluster.leased_bytes),
    )?;
    let help = "Blocks whose checksum was taken before a peer asked for them";
    counter(encoder, "peer_summed_blocks", help, None, &own(cluster.summed_ahead))?;
    let help = "Leases that peers did not give back in time";
    counter(encoder, "peer_leases_expired", help, None, &own(cluster.leases_expired))?;
    let help = "Questions of peers that were refused";
    counter(encoder, "peer_questions_refused", help, None, &own(cluster.refused))?;
    let help = "Renewals that this member asked for";
    counter(encoder, "cluster_renewals", help, None, &own(cluster.renewals))?;
    let help = "How often this member's lease lapsed";
    counter(encoder, "cluster_lapses", help, None, &own(cluster.lapses))?;
    let help = "Whether this member serves; 0 while no majority renews its lease";
    gauge(encoder, "cluster_serving", help, &own(u64::from(cluster.serving)))?;
    gauge(
        encoder,
        "cluster_members",
        "Members, this one included",
        &own(cluster.members.len() as u64),
    )?;
    let help = "Purges that some member has not confirmed";
    gauge(encoder, "cluster_purges_open", help, &own(cluster.purges_open))?;
    let help = "Host segments registered for peers";
    gauge(
        encoder,
        "peer_segments_registered",
        help,
        &own(cluster.segments_registered),
    )?;

    let decisions = vec![
        (vec![("plan", "fetch".to_owned())], cluster.decisions_fetch),
        (vec![("plan", "recompute".to_owned())], cluster.decisions_recompute),
    ];
    let help = "Requests whose blocks a peer had, by what the cost model decided";
    counter(encoder, "cost_decisions", help, None, &decisions)?;

    let of_peers = |value: &dyn Fn(&kvtier::node::PeerStatus) -> u64| -> Vec<Labelled> {
        let labels = |peer: &kvtier::node::PeerStatus| {
            vec![("peer", peer.address.clone()), ("transport", peer.transport.clone())]
        };
        cluster.peers.iter().map(|peer| (labels(peer), value(peer))).collect()
    };
    let connected = of_peers(&|peer| u64::from(peer.state == "connected"));
    gauge(encoder, "peer_connected", "Whether a peer is connected", &connected)?;
    let blocks = of_peers(&|peer| peer.blocks);
    counter(
        encoder,
        "peer_read_blocks",
        "Blocks read from a peer and found right",
        None,
        &blocks,
    )?;
    let read = of_peers(&|peer| peer.bytes);
    counter(encoder, "peer_read", "Bytes of blocks read from a peer", bytes, &read)?;
    let late = of_peers(&|peer| peer.late);
    counter(
        encoder,
        "peer_late",
        "Questions that a peer did not answer in time",
        None,
        &late,
    )?;
    let failed = of_peers(&|peer| peer.failed);
    counter(encoder, "peer_failed", "Reads from a peer that failed", None, &failed)?;
    let corrupt = of_peers(&|peer| peer.corrupt);
    let help = "Blocks whose bytes were not what a peer said it sends";
    counter(encoder, "peer_corrupt", help, None, &corrupt)?;
    let stale = of_peers(&|peer| peer.stale);
    let help = "Answers of no use because invalidations were not known to both";
    counter(encoder, "peer_stale", help, None, &stale)?;
    let given_up = of_peers(&|peer| peer.given_up);
    let help = "Fetches from a peer whose clients were answered before they ended, as recomputing was expected to be faster by then";
    counter(encoder, "peer_given_up", help, None, &given_up)?;
    let late_blocks = of_peers(&|peer| peer.late_blocks);
    let help = "Blocks of a peer that came after their fetch was answered, and were kept";
    counter(encoder, "peer_late_blocks", help, None, &late_blocks)?;

    let open = of_peers(&|peer| u64::from(peer.gate.starts_with("open")));
    gauge(
        encoder,
        "cost_gate_open",
        "Whether the cost model lets a peer be asked",
        &open,
    )?;

    let of_rails = |value: &dyn Fn(&kvtier::node::RailStatus) -> u64| -> Vec<Labelled> {
        let rails = cluster
            .peers
            .iter()
            .flat_map(|peer| peer.rails.iter().map(move |rail| (peer, rail)));
        let labels = |peer: &kvtier::node::PeerStatus, rail: &kvtier::node::RailStatus| {
            vec![
                ("peer", peer.address.clone()),
                ("transport", peer.transport.clone()),
                ("rail", rail.name.clone()),
            ]
        };
        rails.map(|(peer, rail)| (labels(peer, rail), value(rail))).collect()
    };
    gauge(
        encoder,
        "peer_rail_usable",
        "Whether a rail takes transfers",
        &of_rails(&|rail| u64::from(rail.usable)),
    )?;
    counter(
        encoder,
        "peer_rail",
        "Bytes moved over a rail",
        bytes,
        &of_rails(&|rail| rail.bytes),
    )?;
    counter(
        encoder,
        "peer_rail_errors",
        "Failures of a rail",
        None,
        &of_rails(&|rail| rail.errors),
    )?;
    let help = "How often a rail was connected anew";
    counter(
        encoder,
        "peer_rail_reconnects",
        help,
        None,
        &of_rails(&|rail| rail.reconnects),
    )
}

pub(super) fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    values: &[Labelled],
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
    for (labels, value) in values {
        ConstCounter::new(*value).encode(family.encode_family(&spelled(labels))?)?;
    }
    Ok(())
}

pub(super) fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, values: &[Labelled]) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        let value = i64::try_from(*value).unwrap_or(i64::MAX);
        ConstGauge::new(value).encode(family.encode_family(&spelled(labels))?)?;
    }
    Ok(())
}

fn spelled(labels: &[(&'static str, String)]) -> Vec<(&'static str, String)> {
    labels.to_vec()
}
