use kvtier_transfer::memory::{ForeignCopyError, ForeignSlice, MemorySlice};

use super::ClientError;

/// What a put copies from.
pub(super) trait Source {
    fn len(&self) -> usize;
    /// Copies the bytes from `offset` on into all of `target`.
    fn copy_to(&self, offset: usize, target: &MemorySlice) -> Result<(), ClientError>;
}

/// What a get copies into.
pub(super) trait Target {
    /// Most bytes of a block that fits.
    fn room(&self) -> usize;
    /// Copies a block that fits to the front.
    fn copy_from(&mut self, block: &MemorySlice) -> Result<(), ClientError>;
}

impl Source for &[u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    fn copy_to(&self, offset: usize, target: &MemorySlice) -> Result<(), ClientError> {
        Ok(target.copy_from_slice(&self[offset..offset + target.len()])?)
    }
}

impl Target for &mut [u8] {
    fn room(&self) -> usize {
        self.len()
    }

    fn copy_from(&mut self, block: &MemorySlice) -> Result<(), ClientError> {
        Ok(block.copy_to_slice(&mut self[..block.len()])?)
    }
}

impl Source for ForeignSlice {
    fn len(&self) -> usize {
        ForeignSlice::len(self)
    }

    fn copy_to(&self, offset: usize, target: &MemorySlice) -> Result<(), ClientError> {
        Ok(ForeignSlice::copy_to(self, offset, target)?)
    }
}

impl Target for &ForeignSlice {
    fn room(&self) -> usize {
        self.len()
    }

    fn copy_from(&mut self, block: &MemorySlice) -> Result<(), ClientError> {
        Ok(ForeignSlice::copy_from(self, 0, block)?)
    }
}

impl From<ForeignCopyError> for ClientError {
    fn from(error: ForeignCopyError) -> Self {
        ClientError::invalid(error.to_string())
    }
}
