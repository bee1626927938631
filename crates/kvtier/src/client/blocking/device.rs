//! Blocks between a node and memory of a GPU: an engine's paged cache, or arrays of a block each.

mod blocks;
mod moving;

use std::sync::Arc;

use kvtier_core::{BlockHash, FetchScope};
use kvtier_transfer::gpu::{DeviceSlice, EngineStream, Gpu, KvLayout, LayoutError, PieceMoverWanted};

pub use moving::{Loading, Saving};

use self::blocks::{Arrays, Paged};
use self::moving::Mover;
use super::Namespace;
use crate::client::{ClientError, GetOutcome, Lineage, PutOutcome};

/// A block and the engine's pages that hold, or are to hold, its bytes.
pub type Pages<'a> = (BlockHash, &'a [u32]);

/// A block and the memory that holds, or is to hold, its bytes.
pub type DeviceArray = (BlockHash, DeviceSlice);

/// An engine's KV cache on a GPU, as the source of puts and the target of gets.
///
/// A block is some of the engine's pages, all layers of them, in the order that [`KvLayout`] describes. Bytes go straight between
/// the pages and the memory that the node shares: host memory, which is pinned for the device where the system allows that, or memory
/// of the same device, where the node keeps copies of blocks that are used again.
///
/// [`DeviceCache::put`] and [`DeviceCache::get`] wait for the device; the engine's own work on the same pages must be done before a
/// put and must not begin before a get has returned. [`DeviceCache::begin_put`] and [`DeviceCache::begin_get`] order themselves with
/// a stream of the engine's instead, and return when the device has been told.
#[derive(Debug)]
pub struct DeviceCache {
    mover: Arc<Mover>,
    layout: KvLayout,
    tensors: Vec<DeviceSlice>,
}

impl DeviceCache {
    /// The cache that lies in `tensors`. Pages are small: what moves them is tried for the first cache of a device, see
    /// [`Gpu::choose_piece_mover`], unless the caller chose before; best while the device is idle.
    ///
    /// # Errors
    /// `Invalid` when they do not fit the layout; `Unavailable` when the device has no stream.
    pub fn new(gpu: &Arc<Gpu>, layout: KvLayout, tensors: Vec<DeviceSlice>) -> Result<DeviceCache, ClientError> {
        layout.check(&tensors)?;
        if tensors.iter().any(|tensor| !Arc::ptr_eq(tensor.region().gpu(), gpu)) {
            return Err(ClientError::invalid("a tensor is memory of another device"));
        }
        if gpu.piece_mover().is_none() {
            let chosen = gpu.choose_piece_mover(PieceMoverWanted::Faster);
            tracing::info!(device = gpu.name(), "small pages are moved by: {chosen}");
        }
        Ok(DeviceCache {
            mover: Mover::new(gpu)?,
            layout,
            tensors,
        })
    }

    /// Puts blocks from the engine's pages, keys in prefix order. One outcome each; a block that is cached moves no bytes.
    ///
    /// # Errors
    /// `Invalid` for pages that the layout does not have; `Unavailable` when the device fails, and nothing is published then;
    /// otherwise as any call.
    pub fn put(
        &self,
        namespace: &Namespace,
        lineage: impl Into<Lineage>,
        blocks: &[Pages<'_>],
        tokens: u32,
    ) -> Result<Vec<PutOutcome>, ClientError> {
        self.begin_put(namespace, lineage, blocks, tokens, &[])?.finish()
    }

    /// Begins a put: pages are read once what `engines` were given before is done. Nothing is published before
    /// [`Saving::finish`].
    ///
    /// # Errors
    /// As [`DeviceCache::put`].
    pub fn begin_put(
        &self,
        namespace: &Namespace,
        lineage: impl Into<Lineage>,
        blocks: &[Pages<'_>],
        tokens: u32,
        engines: &[EngineStream],
    ) -> Result<Saving, ClientError> {
        let paged = self.paged(blocks);
        self.mover.begin_put(namespace, lineage.into(), &paged, tokens, engines)
    }

    /// Gets blocks into the engine's pages, keys in prefix order; with [`FetchScope::Prefix`] nothing behind the first miss is
    /// read.
    ///
    /// # Errors
    /// `Invalid` for pages that the layout does not have, or a block of another size than its pages; `Unavailable` when the device
    /// fails; otherwise as any call. On an error the bytes of all pages that were named are unspecified.
    pub fn get(
        &self,
        namespace: &Namespace,
        blocks: &[Pages<'_>],
        scope: FetchScope,
    ) -> Result<Vec<GetOutcome>, ClientError> {
        self.begin_get(namespace, blocks, scope, &[])?.finish()
    }

    /// Begins a get, layer by layer: pages are written once what `engines` were given before is done. What the engine does with a
    /// layer has to wait for it, see [`Loading::hold`].
    ///
    /// # Errors
    /// As [`DeviceCache::get`].
    pub fn begin_get(
        &self,
        namespace: &Namespace,
        blocks: &[Pages<'_>],
        scope: FetchScope,
        engines: &[EngineStream],
    ) -> Result<Loading, ClientError> {
        self.mover.begin_get(namespace, &self.paged(blocks), scope, engines)
    }

    fn paged<'a>(&'a self, blocks: &'a [Pages<'a>]) -> Paged<'a> {
        Paged {
            layout: &self.layout,
            tensors: &self.tensors,
            blocks,
        }
    }
}

/// Arrays on a GPU, each of which holds a block: whatever layout their bytes have is the caller's business.
#[derive(Debug)]
pub struct DeviceArrays {
    mover: Arc<Mover>,
}

impl DeviceArrays {
    /// Arrays in memory of this device.
    ///
    /// # Errors
    /// `Unavailable` when the device has no stream.
    pub fn new(gpu: &Arc<Gpu>) -> Result<DeviceArrays, ClientError> {
        Ok(DeviceArrays {
            mover: Mover::new(gpu)?,
        })
    }

    /// Begins a put of whole arrays, keys in prefix order, as [`DeviceCache::begin_put`] does.
    ///
    /// # Errors
    /// `Invalid` for memory of another device; otherwise as [`DeviceCache::put`].
    pub fn begin_put(
        &self,
        namespace: &Namespace,
        lineage: impl Into<Lineage>,
        arrays: &[DeviceArray],
        tokens: u32,
        engines: &[EngineStream],
    ) -> Result<Saving, ClientError> {
        let arrays = Arrays(arrays);
        self.mover
            .begin_put(namespace, lineage.into(), &arrays, tokens, engines)
    }

    /// Begins a get into the front of arrays, each at least as long as its block, as [`DeviceCache::begin_get`] does. One that is
    /// shorter is not touched: [`GetOutcome::TooSmall`].
    ///
    /// # Errors
    /// `Invalid` for memory of another device; otherwise as [`DeviceCache::get`].
    pub fn begin_get(
        &self,
        namespace: &Namespace,
        arrays: &[DeviceArray],
        scope: FetchScope,
        engines: &[EngineStream],
    ) -> Result<Loading, ClientError> {
        self.mover.begin_get(namespace, &Arrays(arrays), scope, engines)
    }
}

impl From<LayoutError> for ClientError {
    fn from(error: LayoutError) -> Self {
        ClientError::invalid(error.to_string())
    }
}
