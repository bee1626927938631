//! `kvctl peers`: the node among its peers.

use kvtier::node::{ClusterStatus, Status};

use super::{Connection, failure};
use crate::exit::{ExitCode, Failure};
use crate::{output, size};

pub(super) fn peers(connection: &Connection) -> Result<(), Failure> {
    let text = connection.connect()?.status().map_err(failure)?;
    let status: Status = serde_json::from_str(&text).map_err(|error| {
        Failure::new(
            ExitCode::Denied,
            format!("only the daemon's own user sees its peers ({error})"),
        )
    })?;
    let Some(cluster) = status.cluster else {
        return Err(Failure::new(
            ExitCode::Configuration,
            "this node has no peers: set peer_listen and peers",
        ));
    };
    if connection.json {
        let json = serde_json::to_string_pretty(&cluster)
            .map_err(|error| Failure::new(ExitCode::Internal, error.to_string()))?;
        return output::print(&format!("{json}\n"));
    }
    output::print(&describe(&cluster))
}

fn describe(cluster: &ClusterStatus) -> String {
    let mut lines = vec![format!(
        "{} (member {}), {}{}",
        cluster.address,
        cluster.member,
        if cluster.serving {
            "serving"
        } else {
            "NOT SERVING: no majority renews its lease"
        },
        if cluster.fenced { ", fenced" } else { "" }
    )];
    if !cluster.rdma.is_empty() {
        lines.push(cluster.rdma.clone());
    }
    lines.push(format!(
        "leased {} blocks, {}, to peers",
        cluster.leased_blocks,
        size::rounded(cluster.leased_bytes)
    ));
    for peer in &cluster.peers {
        let state = if peer.trouble.is_empty() {
            format!("{} by {}", peer.state, peer.transport)
        } else {
            format!("{}: {}", peer.state, peer.trouble)
        };
        lines.push(format!(
            "{:<24} {state}; read {} blocks, {}; {} late, {} failed, {} corrupt, {} stale",
            peer.address,
            peer.blocks,
            size::rounded(peer.bytes),
            peer.late,
            peer.failed,
            peer.corrupt,
            peer.stale
        ));
        if !peer.gate.is_empty() {
            lines.push(format!(
                "  gate {}; expected {}/s after {} us; {} fetches given up, {} blocks late",
                peer.gate,
                size::rounded(peer.expected_bytes_per_second),
                peer.expected_lookup_us,
                peer.given_up,
                peer.late_blocks
            ));
        }
        for line in peer.latest_decision.lines() {
            lines.push(format!("    {line}"));
        }
        for rail in &peer.rails {
            lines.push(format!(
                "  {:<22} {}; {}, {}/s, {} errors, {} reconnects",
                rail.name,
                if rail.usable { "up" } else { "DOWN" },
                size::rounded(rail.bytes),
                size::rounded(rail.bytes_per_second),
                rail.errors,
                rail.reconnects
            ));
        }
    }
    lines.join("\n") + "\n"
}
