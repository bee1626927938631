use std::ops::Range;

use crate::{
    BlockHash, Extent, Fetched, Generation, Labels, NamespaceId, Parent, PurgeEvidence, RealizationId, Reserved,
    SegmentId, Tier, TrustDomain,
};

/// A connected client. Never reused within a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(pub u64);

/// One thing asked of the driver or awaited by a client. Never reused within a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OperationId(pub u64);

/// A time-bounded promise not to reclaim one block. Carries a version: a stale id is refused, not misread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// An unpublished slot that one client may write. Carries a version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReservationId(pub u64);

/// What a record outside host memory says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLabel {
    /// Owner.
    pub namespace: NamespaceId,
    /// Owner's generation when the block was sealed.
    pub generation: Generation,
    /// Form.
    pub realization: RealizationId,
    /// Prefix hash.
    pub hash: BlockHash,
    /// The block before it, so that a restart links the two again; [`Parent::Unknown`] where the index has none. Says nothing
    /// about the payload: not compared when the record is read.
    pub parent: Parent,
    /// Tokens in the block, at most 65,535. Not compared either.
    pub tokens: u32,
    /// What it was put under, so that a purge by label finds it after a restart. Not compared either.
    pub labels: Labels,
}

/// What the driver must do. Those with an `operation` and marked *answered* come back as an [`Event`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Answered. Make a segment of `bytes` ready (device memory and host: mapped, zeroed, prefaulted,
    /// owned by `domain`; NVMe: preallocated).
    OpenSegment {
        /// Answer with this.
        operation: OperationId,
        /// Device memory, host or NVMe.
        tier: Tier,
        /// The new segment's id.
        segment: SegmentId,
        /// Its size.
        bytes: u64,
        /// Owner of a segment in memory; `None` on NVMe.
        domain: Option<TrustDomain>,
    },
    /// Answered. Zero (memory) or discard (NVMe) a segment that nothing refers to and give its memory back.
    CloseSegment {
        /// Answer with this.
        operation: OperationId,
        /// Device memory, host or NVMe.
        tier: Tier,
        /// Which.
        segment: SegmentId,
    },
    /// Answered. An NVMe segment is full: write its index footer.
    SealSegment {
        /// Answer with this.
        operation: OperationId,
        /// Which.
        segment: SegmentId,
    },
    /// Answered with [`Completion::Written`]. Write a host copy to NVMe. The source stays valid until the answer.
    Demote {
        /// Answer with this.
        operation: OperationId,
        /// Host extent.
        source: Extent,
        /// NVMe extent.
        target: Extent,
        /// What the record says.
        label: RecordLabel,
    },
    /// Answered. Read an NVMe copy into a host slot and check it against `checksum` (CRC32C of the payload); a failed
    /// check zeroes the target and answers [`Failure::Corrupt`].
    Promote {
        /// Answer with this.
        operation: OperationId,
        /// NVMe extent.
        source: Extent,
        /// Host extent.
        target: Extent,
        /// CRC32C of the payload.
        checksum: u32,
        /// What the record must say.
        label: RecordLabel,
    },
    /// Answered with [`Completion::Written`]. Copy a host copy to device memory, zero the rest of its last page there, and check
    /// what arrived: against `checksum` where it is given, against the source where it is not. [`Failure::Corrupt`] where the source
    /// is not what its checksum says: the block is forgotten then. Both sides stay as they are until the answer.
    PromoteToHbm {
        /// Answer with this.
        operation: OperationId,
        /// Host extent.
        source: Extent,
        /// Extent in device memory.
        target: Extent,
        /// CRC32C of the payload, where it is known.
        checksum: Option<u32>,
    },
    /// Answered. Copy a record between NVMe segments (reinsertion), checking it on the way.
    Relocate {
        /// Answer with this.
        operation: OperationId,
        /// NVMe extent.
        source: Extent,
        /// NVMe extent.
        target: Extent,
        /// CRC32C of the payload.
        checksum: u32,
        /// What the record must say, and says again.
        label: RecordLabel,
    },
    /// Answered. Everything answered before must survive a power cut (fdatasync).
    SyncTier {
        /// Answer with this.
        operation: OperationId,
        /// NVMe.
        tier: Tier,
    },
    /// Answered once no operation in flight on this tier can touch memory any more. The core fails them all then.
    ResetTier {
        /// Answer with this.
        operation: OperationId,
        /// NVMe.
        tier: Tier,
    },
    /// Answered. Make a raised generation durable before it is acknowledged.
    RecordGeneration {
        /// Answer with this.
        operation: OperationId,
        /// Whose.
        namespace: NamespaceId,
        /// The new value.
        generation: Generation,
    },
    /// Not answered. A restart must not bring this record back: its block was deleted. A record that is not there, because
    /// its write failed or its segment is closed by now, is ignored.
    ForgetRecord {
        /// NVMe extent.
        target: Extent,
    },
    /// Answered. Zero bytes of a segment in memory; nobody else touches them meanwhile.
    ZeroSegment {
        /// Answer with this.
        operation: OperationId,
        /// Device memory or host.
        tier: Tier,
        /// Which segment.
        segment: SegmentId,
        /// Byte ranges within it, ascending.
        ranges: Vec<Range<u64>>,
    },
    /// Answered with [`Completion::Erased`] once it is durable and verified. Overwrite what lies within `pages` of an NVMe
    /// segment that takes no more records: every record of the namespace but those at `keep`, and whatever no record
    /// names.
    EraseRecords {
        /// Answer with this.
        operation: OperationId,
        /// Which segment.
        segment: SegmentId,
        /// In units of 4 KiB from its start. Records that begin before and end within are another action's.
        pages: Range<u32>,
        /// Whose records.
        namespace: NamespaceId,
        /// Where its cached blocks lie, and what is being read, in units of 4 KiB, ascending: not to be touched.
        keep: Vec<Range<u32>>,
    },
    /// A pending fetch is decided: tell the client. Not answered.
    FetchDone {
        /// From [`crate::Answer::Pending`].
        operation: OperationId,
        /// Whom to tell.
        client: ClientId,
        /// One per key asked for.
        results: Vec<Fetched>,
    },
    /// A pending reserve is decided: tell the client. Not answered.
    ReserveDone {
        /// From [`crate::Answer::Pending`].
        operation: OperationId,
        /// Whom to tell.
        client: ClientId,
        /// One per item asked for.
        results: Vec<Reserved>,
    },
    /// An invalidation is durable: tell whoever asked. Not answered.
    Invalidated {
        /// From [`crate::TierManager::invalidate`].
        operation: OperationId,
        /// Whose.
        namespace: NamespaceId,
        /// Now in force.
        generation: Generation,
    },
    /// A destruction is done. Not answered.
    Destroyed {
        /// From [`crate::TierManager::destroy`].
        operation: OperationId,
        /// Whose.
        namespace: NamespaceId,
        /// What was done.
        evidence: PurgeEvidence,
    },
    /// Blocks were deleted and no restart brings them back. Not answered.
    Forgotten {
        /// From [`crate::TierManager::forget_scope`].
        operation: OperationId,
        /// How many.
        blocks: u64,
        /// Those among them of [`Labels::Any`], where the scope was a label: it is not known whether they were put under it.
        of_any_label: u64,
    },
    /// A flush is done. Not answered.
    Flushed {
        /// From [`crate::TierManager::flush`].
        operation: OperationId,
        /// Blocks that were written for it and now survive.
        written: u64,
        /// Blocks in its scope that could not be written (no room, too large, device out of service).
        left_out: u64,
    },
}

/// How the driver answers an [`Action`]. Unknown and late ids are ignored on purpose and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Of the action answered.
    pub operation: OperationId,
    /// What became of it.
    pub outcome: Result<Completion, Failure>,
}

/// An action that was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// Done.
    Done,
    /// A [`Action::Demote`] or [`Action::PromoteToHbm`] was written; `checksum` is the CRC32C of the payload that was written.
    Written {
        /// CRC32C of the payload.
        checksum: u32,
    },
    /// An [`Action::EraseRecords`] was carried out.
    Erased {
        /// Records that were overwritten.
        records: u32,
        /// Bytes that were overwritten.
        bytes: u64,
    },
}

/// An action that was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// The queue is full: try again later.
    Busy,
    /// The device answered with an error.
    Io,
    /// The payload failed its check; the target was zeroed.
    Corrupt,
    /// No space or memory.
    Full,
    /// The request's own deadline passed before the device was asked.
    Deadline,
}
