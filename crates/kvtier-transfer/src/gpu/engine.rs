use std::fmt;
use std::sync::Arc;

use super::device::Gpu;
use super::driver::GpuError;
use super::stream::{Event, RawStream};

/// A stream that an engine of this process works with.
pub struct EngineStream(RawStream);

impl fmt::Debug for EngineStream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("EngineStream")
            .field("gpu", &self.0.gpu().name())
            .finish_non_exhaustive()
    }
}

impl Gpu {
    /// The device's default stream, which an engine uses that names no other.
    #[must_use]
    pub fn default_stream(self: &Arc<Self>) -> EngineStream {
        EngineStream(RawStream::of_an_engine(self, 0))
    }

    /// A stream by the number that CUDA knows it by (`CUstream`, `cudaStream_t`, `torch.cuda.Stream.cuda_stream`); 0 is the default
    /// stream. It is not destroyed here.
    ///
    /// # Safety
    /// It is a stream of this device's primary context, and is not destroyed before the answer is dropped.
    #[must_use]
    pub unsafe fn engine_stream(self: &Arc<Self>, handle: u64) -> EngineStream {
        EngineStream(RawStream::of_an_engine(self, handle))
    }
}

impl EngineStream {
    /// What the engine puts into it from now on waits for what was marked. The calling thread does not.
    ///
    /// # Errors
    /// What the driver says.
    pub fn wait_for(&self, mark: &Mark) -> Result<(), GpuError> {
        self.0.wait_for(&mark.0)
    }

    pub(super) fn raw(&self) -> &RawStream {
        &self.0
    }
}

/// Everything that was submitted to a [`super::Stream`] before it was marked.
pub struct Mark(pub(super) Event);

impl fmt::Debug for Mark {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Mark").finish_non_exhaustive()
    }
}
