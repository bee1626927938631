//! `kvctl remote`: the remote tier.

use kvtier::node::{RemoteStatus, Status};

use super::{Connection, failure};
use crate::exit::{ExitCode, Failure};
use crate::{output, size};

pub(super) fn remote(connection: &Connection) -> Result<(), Failure> {
    let text = connection.connect()?.status().map_err(failure)?;
    let status: Status = serde_json::from_str(&text).map_err(|error| {
        Failure::new(
            ExitCode::Denied,
            format!("only the daemon's own user sees its remote tier ({error})"),
        )
    })?;
    let Some(remote) = status.remote else {
        return Err(Failure::new(
            ExitCode::Configuration,
            "this node has no remote tier: set remote_redis or remote_s3",
        ));
    };
    if connection.json {
        let json = serde_json::to_string_pretty(&remote)
            .map_err(|error| Failure::new(ExitCode::Internal, error.to_string()))?;
        return output::print(&format!("{json}\n"));
    }
    output::print(&describe(&remote))
}

fn describe(remote: &RemoteStatus) -> String {
    let trouble = if remote.trouble.is_empty() {
        String::new()
    } else {
        format!(": {}", remote.trouble)
    };
    let mut lines = vec![
        format!(
            "{} at {}{}, {}{trouble}",
            remote.backend,
            remote.address,
            if remote.servers > 1 {
                format!(" and {} servers more of its cluster", remote.servers - 1)
            } else {
                String::new()
            },
            remote.state
        ),
        format!(
            "read {} blocks, {}; wrote {}, {} as {}, {} of them compressed; {} left out, {} never worth fetching",
            remote.blocks,
            size::rounded(remote.bytes),
            remote.written,
            size::rounded(remote.written_block_bytes),
            size::rounded(remote.written_bytes),
            remote.compressed,
            remote.dropped,
            remote.declined
        ),
        format!(
            "{} objects did not open, {} requests failed, {} objects deleted",
            remote.corrupt, remote.failed, remote.deleted
        ),
    ];
    if remote.given_up > 0 {
        lines.push(format!(
            "{} fetches took too long and were answered before they ended; {} blocks came late and were kept",
            remote.given_up, remote.late_blocks
        ));
    }
    if remote.indexed > 0 {
        lines.push(format!("knows where {} blocks lie", remote.indexed));
    }
    if remote.shared_groups > 0 {
        lines.push(format!("reads with {} keys of other members", remote.shared_groups));
    }
    if !remote.gate.is_empty() {
        lines.push(format!(
            "gate {}; expected {}/s after {} us; {} requests fetched, {} recomputed",
            remote.gate,
            size::rounded(remote.expected_bytes_per_second),
            remote.expected_lookup_us,
            remote.decisions_fetch,
            remote.decisions_recompute
        ));
    }
    for line in remote.latest_decision.lines() {
        lines.push(format!("  {line}"));
    }
    lines.push(String::new());
    lines.join("\n")
}
