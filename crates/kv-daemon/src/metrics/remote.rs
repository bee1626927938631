//! What a node says of its remote tier.

use std::fmt;

use kvtier::node::RemoteStatus;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Unit;

use super::cluster::{counter, gauge};

pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, remote: &RemoteStatus) -> fmt::Result {
    let of = |value: u64| vec![(vec![("backend", remote.backend.clone())], value)];
    let bytes = Some(&Unit::Bytes);
    let up = of(u64::from(remote.trouble.is_empty()));
    gauge(encoder, "remote_up", "Whether the remote tier answers", &up)?;
    for (name, help, unit, value) in [
        (
            "remote_read_blocks",
            "Blocks read from the remote tier and found right",
            None,
            remote.blocks,
        ),
        (
            "remote_read",
            "Bytes of blocks read from the remote tier",
            bytes,
            remote.bytes,
        ),
        (
            "remote_written_blocks",
            "Blocks written to the remote tier",
            None,
            remote.written,
        ),
        (
            "remote_written",
            "Bytes written to the remote tier, as stored",
            bytes,
            remote.written_bytes,
        ),
        (
            "remote_written_block",
            "Bytes of the blocks written to the remote tier, before they were compressed and sealed",
            bytes,
            remote.written_block_bytes,
        ),
        (
            "remote_compressed_blocks",
            "Blocks written to the remote tier compressed",
            None,
            remote.compressed,
        ),
        (
            "remote_dropped_blocks",
            "Blocks not written to the remote tier: too many waited, or it was away",
            None,
            remote.dropped,
        ),
        (
            "remote_declined_blocks",
            "Blocks not written to the remote tier: never worth fetching",
            None,
            remote.declined,
        ),
        (
            "remote_corrupt",
            "Objects of the remote tier that did not open",
            None,
            remote.corrupt,
        ),
        (
            "remote_failed",
            "Questions, reads and writes that the remote tier failed",
            None,
            remote.failed,
        ),
        (
            "remote_given_up",
            "Fetches from the remote tier that took longer than recomputing was expected to: answered before they ended",
            None,
            remote.given_up,
        ),
        (
            "remote_late_blocks",
            "Blocks of the remote tier that came after their fetch was answered, and were kept",
            None,
            remote.late_blocks,
        ),
        (
            "remote_deleted_objects",
            "Objects of the remote tier that purges and deletions removed",
            None,
            remote.deleted,
        ),
    ] {
        counter(encoder, name, help, unit, &of(value))?;
    }
    gauge(
        encoder,
        "remote_indexed_blocks",
        "Blocks of the remote tier whose place is kept in memory, where the server is not asked for it",
        &of(remote.indexed),
    )?;
    if remote.gate.is_empty() {
        return Ok(());
    }
    let open = of(u64::from(remote.gate.starts_with("open")));
    gauge(
        encoder,
        "remote_gate_open",
        "Whether the cost model lets the remote tier be asked",
        &open,
    )?;
    let decision = |plan: &str, value: u64| {
        let labels = vec![("backend", remote.backend.clone()), ("plan", plan.to_owned())];
        (labels, value)
    };
    let decisions = vec![
        decision("fetch", remote.decisions_fetch),
        decision("recompute", remote.decisions_recompute),
    ];
    let help = "Requests whose blocks the remote tier had, by what the cost model decided";
    counter(encoder, "remote_decisions", help, None, &decisions)
}
