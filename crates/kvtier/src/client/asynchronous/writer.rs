use std::sync::Arc;

use kvtier_core::{BlockHash, Generation, Parent, SealItem};
use kvtier_transfer::memory::MemorySlice;

use super::{Namespace, Shared};
use crate::client::batch::unexpected;
use crate::client::handle::OpenSlot;
use crate::client::{ClientError, PutOutcome};

/// An unpublished block in shared memory that only this writer may write. Dropping it gives the slot back.
#[derive(Debug)]
pub struct BlockWriter {
    namespace: Namespace,
    slot: OpenSlot,
}

impl BlockWriter {
    pub(super) fn new(namespace: &Namespace, slot: OpenSlot) -> BlockWriter {
        BlockWriter {
            namespace: namespace.clone(),
            slot,
        }
    }

    /// What the block will be called.
    #[must_use]
    pub fn hash(&self) -> BlockHash {
        self.slot.item().hash
    }

    /// Bytes of the block.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slot.slice().len()
    }

    /// Whether the block has no bytes: never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slot.slice().is_empty()
    }

    /// The memory itself. In a forked child it is not mapped; [`BlockWriter::write`] checks that.
    #[must_use]
    pub fn slice(&self) -> &MemorySlice {
        self.slot.slice()
    }

    /// Copies `source` to `offset`.
    ///
    /// # Errors
    /// `Invalid` when it does not fit; `Closed` when the connection is gone or the process forked.
    pub fn write(&mut self, offset: usize, source: &[u8]) -> Result<(), ClientError> {
        self.slot.write(offset, source)
    }

    /// Says what comes before the block in its prefix, where that was not said when the slot was asked for.
    #[must_use]
    pub fn behind(mut self, parent: Parent) -> BlockWriter {
        self.slot.follow(parent);
        self
    }

    /// The generation in force when the slot was given. A seal under a later one is refused as stale.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.slot.generation
    }

    /// Publishes the block. Everything up to its length must have been written: what was not is what the slot held before.
    ///
    /// # Errors
    /// `Closed` when the connection that the slot was granted over is gone; otherwise as any call.
    pub async fn seal(self) -> Result<PutOutcome, ClientError> {
        let namespace = self.namespace.clone();
        let mut outcomes = namespace.seal(vec![self]).await?;
        outcomes.pop().ok_or_else(unexpected)
    }

    pub(super) fn belongs_to(&self, shared: &Arc<Shared>, index: usize) -> bool {
        self.namespace.is(shared, index)
    }

    pub(super) fn checked_item(&self) -> Result<SealItem, ClientError> {
        self.slot.checked_item()
    }

    pub(super) fn slot(&mut self) -> &mut OpenSlot {
        &mut self.slot
    }
}
