use crate::{BlockHash, Label, RealizationId};

/// What a destruction did, unsigned. Counts are of this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PurgeEvidence {
    /// Slots of host memory that were zeroed, wholly or behind the block that stays in them.
    pub host_slots: u64,
    /// Bytes that were zeroed there.
    pub host_bytes: u64,
    /// Slots that clients held for longer than the grace: not zeroed.
    pub host_left: u64,
    /// Slots of device memory that were zeroed.
    pub hbm_slots: u64,
    /// Bytes that were zeroed there.
    pub hbm_bytes: u64,
    /// Slots there that clients held for longer than the grace, or that the device did not zero.
    pub hbm_left: u64,
    /// Segments of NVMe that were gone through.
    pub nvme_segments: u64,
    /// Records that were overwritten and verified.
    pub nvme_records: u64,
    /// Bytes that were overwritten there, what lay between records included.
    pub nvme_bytes: u64,
    /// Parts of segments that could not be overwritten or verified.
    pub nvme_left: u64,
}

/// Less than a whole namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForgetScope<'a> {
    /// Every block of a realization.
    Realization(RealizationId),
    /// These blocks, whatever their realization, and every block known to extend them.
    Hashes(&'a [BlockHash]),
    /// Blocks that were put under this label, or may have been ([`crate::Labels::Any`]), and every block known to extend them.
    Label(Label),
    /// Blocks that a restart found without the parent that they name. They may extend what a run before deleted that ended
    /// before all of it was durable: whoever goes on with [`ForgetScope::Hashes`] or
    /// [`ForgetScope::Label`] after a restart begins with these.
    Orphans,
}
