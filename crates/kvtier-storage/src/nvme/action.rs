use std::ops::Range;

use kvtier_core::{Extent, NamespaceId, OperationId, RecordLabel, SegmentId};
use kvtier_transfer::memory::MemorySlice;

/// A core action for this tier, with memory in place of host extents. Each is answered by exactly one event, unless it
/// says otherwise.
///
/// A slice that starts at a multiple of 4 KiB in its region owns its bytes up to the next multiple: host slots are made
/// so. Reads may scribble on that tail and writes carry it, zeroed, to the disk.
#[derive(Clone, Debug)]
pub enum StorageAction {
    /// Make a segment file of `bytes`.
    Open {
        /// Answer with this.
        operation: OperationId,
        /// Which.
        segment: SegmentId,
        /// Its size.
        bytes: u64,
    },
    /// Remove a segment file.
    Close {
        /// Answer with this.
        operation: OperationId,
        /// Which.
        segment: SegmentId,
    },
    /// Write a segment's index.
    Seal {
        /// Answer with this.
        operation: OperationId,
        /// Which.
        segment: SegmentId,
    },
    /// Write memory to a record; answered with its checksum.
    Demote {
        /// Answer with this.
        operation: OperationId,
        /// The payload.
        source: MemorySlice,
        /// Where it goes.
        target: Extent,
        /// What the record says.
        label: RecordLabel,
    },
    /// Read a record into memory and check it.
    Promote {
        /// Answer with this.
        operation: OperationId,
        /// Where it lies.
        source: Extent,
        /// Where it goes; as long as the payload.
        target: MemorySlice,
        /// What it must sum up to.
        checksum: u32,
        /// What the record must say.
        label: RecordLabel,
    },
    /// Copy a record to another segment, checking it on the way.
    Relocate {
        /// Answer with this.
        operation: OperationId,
        /// Where it lies.
        source: Extent,
        /// Where it goes.
        target: Extent,
        /// What it must sum up to.
        checksum: u32,
        /// What the record says.
        label: RecordLabel,
    },
    /// A record's block was deleted: a restart must not bring it back. Not answered.
    ForgetRecord {
        /// Where it lies.
        target: Extent,
    },
    /// Overwrite what a purge left in a sealed segment; answered once it is durable and a sample was read back. See
    /// [`kvtier_core::Action::EraseRecords`].
    Erase {
        /// Answer with this.
        operation: OperationId,
        /// Which.
        segment: SegmentId,
        /// In units of 4 KiB from its start.
        pages: Range<u32>,
        /// Whose records.
        namespace: NamespaceId,
        /// What is not to be touched, in units of 4 KiB, ascending.
        keep: Vec<Range<u32>>,
    },
    /// Make everything answered before survive a power cut.
    Sync {
        /// Answer with this.
        operation: OperationId,
    },
    /// Cancel what can be, and answer once nothing submitted before touches memory or files any more.
    Reset {
        /// Answer with this.
        operation: OperationId,
    },
}

impl StorageAction {
    /// The id that the answer carries; of one that is not answered, none.
    #[must_use]
    pub fn operation(&self) -> OperationId {
        match self {
            StorageAction::Open { operation, .. }
            | StorageAction::Close { operation, .. }
            | StorageAction::Seal { operation, .. }
            | StorageAction::Demote { operation, .. }
            | StorageAction::Promote { operation, .. }
            | StorageAction::Relocate { operation, .. }
            | StorageAction::Erase { operation, .. }
            | StorageAction::Sync { operation }
            | StorageAction::Reset { operation } => *operation,
            StorageAction::ForgetRecord { .. } => OperationId::default(),
        }
    }

    /// Whether it reads or writes payloads: those are refused when too many are under way, the rest is rare and always
    /// taken.
    pub(super) fn moves_bytes(&self) -> bool {
        matches!(
            self,
            StorageAction::Demote { .. } | StorageAction::Promote { .. } | StorageAction::Relocate { .. }
        )
    }
}
