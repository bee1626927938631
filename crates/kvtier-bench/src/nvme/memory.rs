use std::sync::Arc;

use kvtier_transfer::memory::{HUGE_PAGE_BYTES, MemoryError, MemoryRegion, MemorySlice, PageRequest};

use crate::BenchError;

/// A populated region that blocks of any size are cycled through.
#[derive(Clone)]
pub(super) struct Memory {
    region: Arc<MemoryRegion>,
}

impl Memory {
    /// Made as the host tier makes its segments.
    pub(super) fn shared(bytes: u64) -> Result<Memory, BenchError> {
        Memory::populated(bytes, |bytes| {
            MemoryRegion::create("kvtier-bench", bytes, PageRequest::Auto).map(|(region, _)| region)
        })
    }

    /// Made as the tier makes the memory that it reads sealed records into: private, on huge pages where they can be had.
    pub(super) fn private(bytes: u64) -> Result<Memory, BenchError> {
        Memory::populated(bytes, MemoryRegion::anonymous)
    }

    fn populated(
        bytes: u64,
        make: impl FnOnce(usize) -> Result<Arc<MemoryRegion>, MemoryError>,
    ) -> Result<Memory, BenchError> {
        let failed = |error: MemoryError| BenchError::System {
            what: format!("{bytes} bytes of memory"),
            source: std::io::Error::other(error.to_string()),
        };
        let bytes = usize::try_from(bytes)
            .map_err(|_| BenchError::Options("more memory than this machine has addresses".to_owned()))?;
        let region = make(bytes.next_multiple_of(HUGE_PAGE_BYTES)).map_err(failed)?;
        region.prefault(&|_| {}).map_err(failed)?;
        Ok(Memory { region })
    }

    pub(super) fn page_kib(&self) -> u32 {
        self.region.page_kib()
    }

    /// How many blocks of this size there are.
    pub(super) fn slots(&self, bytes: usize) -> usize {
        self.region.bytes() / bytes
    }

    /// The `index`th block of this size; it begins again at the end.
    pub(super) fn slot(&self, index: usize, bytes: usize) -> MemorySlice {
        let slot = index % self.slots(bytes);
        self.region.slice(slot * bytes, bytes).expect("a slot in the region")
    }
}
