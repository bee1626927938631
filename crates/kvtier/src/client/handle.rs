use std::fmt;
use std::sync::Arc;

use kvtier_core::{Generation, LeaseId, Parent, ReservationId, SealItem, Sealed, Tier};
use kvtier_transfer::memory::MemorySlice;

use super::ClientError;
use super::returns::Home;
use super::session::{Leased, Leasehold};

/// A leased block, in place: shared memory that holds it and is not reclaimed before this is dropped.
///
/// Dropping it queues the release, which rides in front of the next request. Drop it well within the lease's time: a
/// block that is held longer stays where it is, but counts against what this client may hold.
pub struct BlockHandle {
    slice: MemorySlice,
    tier: Tier,
    guard: LeaseGuard,
}

/// A leased block, in whatever memory.
#[derive(Debug)]
pub(super) struct LeasedBlock {
    pub(super) place: Leasehold,
    /// Where it was found.
    pub(super) tier: Tier,
    pub(super) guard: LeaseGuard,
}

/// Gives a lease back when it is dropped.
pub(super) struct LeaseGuard {
    lease: LeaseId,
    epoch: u64,
    home: Arc<dyn Home>,
}

impl LeaseGuard {
    pub(super) fn new(lease: LeaseId, epoch: u64, home: Arc<dyn Home>) -> LeaseGuard {
        home.returns().hand_out();
        LeaseGuard { lease, epoch, home }
    }

    /// Whether the connection is still the one over which it was leased.
    pub(super) fn check(&self) -> Result<(), ClientError> {
        self.home.returns().check_epoch(self.epoch)
    }
}

impl fmt::Debug for LeaseGuard {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("LeaseGuard")
            .field("lease", &self.lease)
            .finish_non_exhaustive()
    }
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        self.home.returns().take_in();
        self.home.returns().release(self.epoch, [self.lease]);
    }
}

impl BlockHandle {
    /// `None` for device memory, which nobody asked for.
    pub(super) fn of(leased: Leased, epoch: u64, home: &Arc<dyn Home>) -> Option<BlockHandle> {
        let guard = LeaseGuard::new(leased.lease, epoch, Arc::clone(home));
        match leased.place {
            Leasehold::Host(slice) => Some(BlockHandle {
                slice,
                tier: leased.tier,
                guard,
            }),
            Leasehold::Device(_) => None,
        }
    }

    /// Bytes of the block.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slice.len()
    }

    /// Whether the block has no bytes: never, by the protocol.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slice.is_empty()
    }

    /// Where it was found.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// The memory itself. In a forked child it is not mapped; [`BlockHandle::copy_to`] checks that.
    #[must_use]
    pub fn slice(&self) -> &MemorySlice {
        &self.slice
    }

    /// Whether the bytes may still be read in place.
    ///
    /// # Errors
    /// `Closed` when the connection is gone or the process forked.
    pub fn check(&self) -> Result<(), ClientError> {
        self.guard.check()
    }

    /// Copies the block into the front of `target` and says how many bytes.
    ///
    /// # Errors
    /// `Invalid` when the target is shorter than the block; `Closed` when the connection is gone or the process forked.
    pub fn copy_to(&self, target: &mut [u8]) -> Result<usize, ClientError> {
        self.guard.check()?;
        let bytes = target.len();
        let Some(front) = target.get_mut(..self.slice.len()) else {
            return Err(ClientError::invalid(format!(
                "the target has {bytes} bytes, the block {}",
                self.slice.len()
            )));
        };
        self.slice.copy_to_slice(front)?;
        Ok(front.len())
    }

    /// Reads one byte of each page, as somebody who uses the block in place would, and returns their sum.
    ///
    /// # Errors
    /// `Closed` when the connection is gone or the process forked.
    pub fn touch_pages(&self) -> Result<u64, ClientError> {
        self.guard.check()?;
        Ok(self.slice.touch_pages())
    }
}

impl fmt::Debug for BlockHandle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("BlockHandle")
            .field("len", &self.len())
            .field("tier", &self.tier)
            .finish_non_exhaustive()
    }
}

/// A slot that this client may write. Dropping it unsealed gives it back.
pub(super) struct HeldSlot {
    pub(super) reservation: ReservationId,
    pub(super) slice: MemorySlice,
    pub(super) epoch: u64,
    home: Arc<dyn Home>,
    sealed: bool,
}

impl HeldSlot {
    pub(super) fn new(reservation: ReservationId, slice: MemorySlice, epoch: u64, home: Arc<dyn Home>) -> HeldSlot {
        home.returns().hand_out();
        HeldSlot {
            reservation,
            slice,
            epoch,
            home,
            sealed: false,
        }
    }

    /// The node decided about it: there is nothing to give back.
    pub(super) fn settle(&mut self) {
        self.sealed = true;
    }

    pub(super) fn check(&self) -> Result<(), ClientError> {
        self.home.returns().check_epoch(self.epoch)
    }
}

impl Drop for HeldSlot {
    fn drop(&mut self) {
        self.home.returns().take_in();
        if !self.sealed {
            self.home.returns().abandon(self.epoch, [self.reservation]);
        }
    }
}

impl fmt::Debug for HeldSlot {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("HeldSlot")
            .field("slice", &self.slice)
            .finish_non_exhaustive()
    }
}

/// A slot that a caller writes in place: what both clients' writers hold.
#[derive(Debug)]
pub(super) struct OpenSlot {
    held: HeldSlot,
    /// In force when the slot was given: what it must be sealed under.
    pub(super) generation: Generation,
    item: SealItem,
}

impl OpenSlot {
    pub(super) fn new(held: HeldSlot, generation: Generation, item: SealItem) -> OpenSlot {
        OpenSlot { held, generation, item }
    }

    pub(super) fn slice(&self) -> &MemorySlice {
        &self.held.slice
    }

    pub(super) fn write(&mut self, offset: usize, source: &[u8]) -> Result<(), ClientError> {
        self.held.check()?;
        let target = self.held.slice.subslice(offset, source.len());
        Ok(target
            .map_err(|error| ClientError::invalid(error.to_string()))?
            .copy_from_slice(source)?)
    }

    /// What the block will be called.
    pub(super) fn item(&self) -> SealItem {
        self.item
    }

    pub(super) fn follow(&mut self, parent: Parent) {
        self.item.parent = parent;
    }

    /// What to seal, as long as the connection is the one that the slot was given over.
    pub(super) fn checked_item(&self) -> Result<SealItem, ClientError> {
        self.held.check()?;
        Ok(self.item)
    }

    pub(super) fn settle(&mut self, sealed: Sealed) {
        // The node keeps a slot whose seal is invalid: dropping it gives it back.
        if sealed != Sealed::Invalid {
            self.held.settle();
        }
    }
}
