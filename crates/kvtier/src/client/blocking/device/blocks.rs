use std::sync::Arc;

use kvtier_core::BlockHash;
use kvtier_transfer::gpu::{Copy, DeviceSlice, Gpu, KvLayout, Place};

use super::{DeviceArray, Pages};
use crate::client::ClientError;

/// Blocks, and where on a device their bytes are or go.
pub(super) trait Blocks {
    fn hashes(&self) -> Vec<BlockHash>;
    /// Bytes of each: what a put takes, and what a get has room for.
    fn rooms(&self, gpu: &Arc<Gpu>) -> Result<Vec<u32>, ClientError>;
    /// Whether a block of `given` bytes may be got into `room` bytes.
    fn takes(&self, given: usize, room: u32) -> Result<bool, ClientError>;
    /// Steps that a get takes one after another.
    fn steps(&self) -> u32;
    /// What brings a block together in its slot.
    fn gather(&self, at: usize, slot: &Place) -> Result<Vec<Copy>, ClientError>;
    /// What spreads the part of a block that belongs to a step.
    fn scatter(&self, at: usize, step: u32, block: &Place) -> Result<Vec<Copy>, ClientError>;
}

/// Pages of an engine's cache; a step is a layer.
pub(super) struct Paged<'a> {
    pub(super) layout: &'a KvLayout,
    pub(super) tensors: &'a [DeviceSlice],
    pub(super) blocks: &'a [Pages<'a>],
}

impl Blocks for Paged<'_> {
    fn hashes(&self) -> Vec<BlockHash> {
        self.blocks.iter().map(|(hash, _)| *hash).collect()
    }

    fn rooms(&self, _: &Arc<Gpu>) -> Result<Vec<u32>, ClientError> {
        let room = |(_, pages): &Pages<'_>| {
            self.layout.check_pages(pages)?;
            length(self.layout.block_bytes(pages.len())?)
        };
        self.blocks.iter().map(room).collect()
    }

    fn takes(&self, given: usize, room: u32) -> Result<bool, ClientError> {
        if given == room as usize {
            return Ok(true);
        }
        Err(ClientError::invalid(format!(
            "the block has {given} bytes, its pages {room}: engines with other layouts need another realization"
        )))
    }

    fn steps(&self) -> u32 {
        self.layout.layers
    }

    fn gather(&self, at: usize, slot: &Place) -> Result<Vec<Copy>, ClientError> {
        let layers = 0..self.layout.layers;
        Ok(self.layout.gather(self.tensors, self.blocks[at].1, layers, slot)?)
    }

    fn scatter(&self, at: usize, step: u32, block: &Place) -> Result<Vec<Copy>, ClientError> {
        let bytes = block.len() / self.layout.layers as usize;
        let layer = block.part(step as usize * bytes, bytes);
        let layer = layer.map_err(|error| ClientError::invalid(error.to_string()))?;
        let pages = self.blocks[at].1;
        Ok(self.layout.scatter(&layer, self.tensors, pages, step..step + 1)?)
    }
}

/// Arrays of a block each, in one step.
pub(super) struct Arrays<'a>(pub(super) &'a [DeviceArray]);

impl Blocks for Arrays<'_> {
    fn hashes(&self) -> Vec<BlockHash> {
        self.0.iter().map(|(hash, _)| *hash).collect()
    }

    fn rooms(&self, gpu: &Arc<Gpu>) -> Result<Vec<u32>, ClientError> {
        let room = |(_, array): &DeviceArray| {
            if !Arc::ptr_eq(array.region().gpu(), gpu) {
                return Err(ClientError::invalid("an array is memory of another device"));
            }
            length(array.len())
        };
        self.0.iter().map(room).collect()
    }

    fn takes(&self, given: usize, room: u32) -> Result<bool, ClientError> {
        Ok(given <= room as usize)
    }

    fn steps(&self) -> u32 {
        1
    }

    fn gather(&self, at: usize, slot: &Place) -> Result<Vec<Copy>, ClientError> {
        Ok(vec![Copy {
            source: Place::Device(self.0[at].1.clone()),
            target: slot.clone(),
        }])
    }

    fn scatter(&self, at: usize, _: u32, block: &Place) -> Result<Vec<Copy>, ClientError> {
        let front = self.0[at].1.subslice(0, block.len());
        Ok(vec![Copy {
            source: block.clone(),
            target: Place::Device(front.map_err(|error| ClientError::invalid(error.to_string()))?),
        }])
    }
}

fn length(bytes: usize) -> Result<u32, ClientError> {
    u32::try_from(bytes).map_err(|_| ClientError::invalid(format!("a block of {bytes} bytes is over any limit")))
}
