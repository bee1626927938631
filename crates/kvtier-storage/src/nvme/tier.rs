use std::sync::Arc;

use kvtier_core::{Event, Extent, Failure, OperationId, RecordLabel, SegmentId};
use kvtier_transfer::memory::MemorySlice;

use super::{NvmeError, NvmeSettings};

/// A core action for this tier, with memory in place of host extents. Each is answered by exactly one event.
///
/// A slice that starts at a multiple of 4 KiB in its region owns its bytes up to the next multiple: host slots are made so. Reads may scribble on that
/// tail and writes carry it, zeroed, to the disk.
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

/// Told each answer, on a thread of the tier or the one that submitted. Keep it short.
pub type Events = Arc<dyn Fn(Event) + Send + Sync>;

/// Counters since start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NvmeStatistics {
    /// Payload bytes read.
    pub read_bytes: u64,
    /// Payload bytes written.
    pub written_bytes: u64,
    /// Bytes written to the device in all: padding, headers, indexes.
    pub device_written_bytes: u64,
}

/// Segment files behind an engine.
pub struct NvmeTier {
    events: Events,
}

impl NvmeTier {
    /// Opens the tier: locks the directory, empties it, starts the engine.
    pub fn open(settings: NvmeSettings, events: Events) -> Result<NvmeTier, NvmeError> {
        let _ = settings;
        Ok(NvmeTier { events })
    }

    /// Takes an action. Never blocks; the answer comes through the events, possibly before this returns and on this thread.
    pub fn submit(&self, action: StorageAction) {
        let operation = match action {
            StorageAction::Open { operation, .. } | StorageAction::Close { operation, .. } | StorageAction::Seal { operation, .. } | StorageAction::Demote { operation, .. } | StorageAction::Promote { operation, .. } | StorageAction::Relocate { operation, .. } | StorageAction::Sync { operation } | StorageAction::Reset { operation } => operation,
        };
        (self.events)(Event { operation, outcome: Err(Failure::Io) });
    }

    /// `io_uring` or `threads`.
    #[must_use]
    pub fn engine_name(&self) -> &'static str {
        "none"
    }

    /// What an operator should know about this tier: which engine and why, whether I/O is direct. Logged at open, too.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Counters.
    #[must_use]
    pub fn statistics(&self) -> NvmeStatistics {
        NvmeStatistics::default()
    }

    /// Cancels what is queued, waits for what is in flight, ends the threads. Idempotent; dropping does it too.
    pub fn shutdown(&self) {}
}
