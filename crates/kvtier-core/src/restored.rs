use crate::{RecordLabel, SegmentId};

/// A record of an earlier run, as the index of its segment tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestoredRecord {
    /// What it says about itself.
    pub label: RecordLabel,
    /// Byte offset of the payload in its segment; a multiple of 4 KiB.
    pub offset: u64,
    /// Payload length in bytes.
    pub length: u32,
    /// CRC32C of the payload.
    pub checksum: u32,
}

/// An NVMe segment of an earlier run. Nothing is appended to it any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoredSegment {
    /// Its id then and now. Ids grow in the order in which segments were opened.
    pub segment: SegmentId,
    /// Its size, header and index included; another than that of new segments where the setting changed.
    pub bytes: u64,
    /// Those that were not forgotten, in any order.
    pub records: Vec<RestoredRecord>,
}

/// What came of [`crate::TierManager::restore`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Blocks that are cached again.
    pub blocks: u64,
    /// Their payload, bytes.
    pub bytes: u64,
    /// Records that are not: older copies, older generations, unknown or impossible ones, and those without room.
    pub left_out: u64,
}
