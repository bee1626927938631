use serde::{Deserialize, Serialize};

/// What a purge, or one processor of it, vouches for. The weaker is the smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guarantee {
    /// Nothing: the processor did not confirm.
    Unconfirmed,
    /// No read that started after the acknowledgement returned anything older.
    VerifiedNamespaceInvalidation,
    /// The same, and every byte that lay in memory, on flash or in a store is destroyed: zeroed, or under a destroyed key.
    VerifiedPhysicalPurge,
}

/// How state was made unreachable or destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// A higher generation is in force, durably.
    GenerationFence,
    /// The only key of the bytes was overwritten, durably (NIST SP 800-88r2, cryptographic erase).
    KeyDestroyed,
    /// The bytes were written over, and a sample was read back.
    Overwritten,
    /// Memory was zeroed.
    Zeroised,
    /// The device was told to give them up.
    Discarded,
    /// Objects were removed from a store.
    Deleted,
}

/// One thing that was done to one tier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// `namespace`, `keys`, `host` or `nvme`.
    pub tier: String,
    /// In words.
    pub action: String,
    /// Blocks, records, slots or keys.
    #[serde(with = "super::number")]
    pub objects: u64,
    /// Their bytes.
    #[serde(with = "super::number")]
    pub bytes: u64,
    /// How.
    pub method: Method,
    /// RFC 3339, UTC.
    pub started_at: String,
    /// RFC 3339, UTC.
    pub completed_at: String,
    /// For how long something may still be left, seconds.
    #[serde(with = "super::number")]
    pub residual_window_s: u64,
    /// Whether it was checked afterwards that nothing is left.
    pub verified: bool,
}

/// Whether a processor confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It did.
    Confirmed,
    /// It did not, or not yet.
    Unconfirmed,
}

/// What one that held state of the namespace did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessorReport {
    /// Its name: `kv-daemon`, or what a cache called itself.
    pub processor: String,
    /// `byoc_runtime`, or `cache` for one that reported to the node.
    pub kind: String,
    /// Whether it confirmed.
    pub status: Standing,
    /// What it vouches for.
    pub guarantee: Guarantee,
    /// Why no more than that, in words; empty where there is no more.
    pub reason: String,
    /// Tier by tier.
    pub evidence: Vec<Evidence>,
}

/// What all of them together vouch for: what the weakest does. Nobody vouches for nothing.
#[must_use]
pub fn weakest(processors: &[ProcessorReport]) -> Guarantee {
    let guarantees = processors.iter().map(|processor| processor.guarantee);
    guarantees.min().unwrap_or(Guarantee::Unconfirmed)
}
