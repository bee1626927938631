use serde::{Deserialize, Serialize};

use super::peers::TermComparison;

/// What an erasure of a namespace's objects came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Erasure {
    /// Objects that were deleted.
    pub(crate) deleted: u64,
    /// Objects that a second look found.
    pub(crate) left: u64,
    /// A write that was given up lately may still arrive: this was not the last look.
    pub(crate) may_arrive: bool,
}

/// The tier as the status shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RemoteStatus {
    /// `redis` or `s3`.
    pub backend: String,
    /// Where it is.
    pub address: String,
    /// On how many servers objects lie, as far as is known: more than one in a cluster.
    pub servers: u64,
    /// `in service`, or `away`.
    pub state: String,
    /// Why it is away; empty when it is not.
    pub trouble: String,
    /// Blocks read and found right.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks written.
    pub written: u64,
    /// Their bytes, as stored.
    pub written_bytes: u64,
    /// Those of them that were compressed.
    pub compressed: u64,
    /// Bytes of the blocks written, before they were compressed and sealed.
    pub written_block_bytes: u64,
    /// Blocks that were not written: too many waited, or the server was away.
    pub dropped: u64,
    /// Blocks that were not written because they are never worth fetching.
    pub declined: u64,
    /// Objects that did not open.
    pub corrupt: u64,
    /// Questions, reads and writes that failed.
    pub failed: u64,
    /// Objects deleted by purges and deletions.
    pub deleted: u64,
    /// Fetches that took so long that recomputing was expected to be faster: their clients were answered before they ended.
    pub given_up: u64,
    /// Blocks that came after their fetch was answered, and were kept.
    pub late_blocks: u64,
    /// Keys of other members that this node reads objects with, one for each member and namespace. Gauge.
    pub shared_groups: u64,
    /// Blocks on the server whose place is kept in memory here, where that is not asked of the server. Gauge.
    pub indexed: u64,
    /// Whether the cost model lets it be asked; empty where no model is named.
    pub gate: String,
    /// Requests that were worth fetching.
    pub decisions_fetch: u64,
    /// Requests that it had and that were not.
    pub decisions_recompute: u64,
    /// What the cost model expected of fetches and prefills, and what they took; empty where none is named.
    pub terms: Vec<TermComparison>,
    /// Bytes a second that the cost model counts with.
    pub expected_bytes_per_second: u64,
    /// Time until it answers that the cost model counts with, microseconds.
    pub expected_lookup_us: u64,
    /// The latest decision, term by term.
    pub latest_decision: String,
}
