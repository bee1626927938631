//! Regions whose pages a device holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::MemoryRegion;

/// Keeps a region, and tells whoever owns its file that a device holds its pages: they must be zeroed where they lie. A hole
/// in the file would leave the old bytes in pages that only the device still reaches.
#[derive(Debug)]
pub struct Pinned(Arc<MemoryRegion>);

/// How many hold a region so.
#[derive(Debug, Default)]
pub(super) struct Pins(AtomicUsize);

impl Pinned {
    /// From before the device is told until it has let go.
    #[must_use]
    pub fn new(region: &Arc<MemoryRegion>) -> Pinned {
        region.pins.0.fetch_add(1, Ordering::AcqRel);
        Pinned(Arc::clone(region))
    }

    /// What is held.
    #[must_use]
    pub fn region(&self) -> &Arc<MemoryRegion> {
        &self.0
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.0.pins.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl MemoryRegion {
    /// Whether a device holds its pages: see [`Pinned`].
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.pins.0.load(Ordering::Acquire) > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_pinned_until_the_last_device_has_let_go() {
        let region = MemoryRegion::anonymous(4096).expect("memory");
        assert!(!region.is_pinned());
        let (first, second) = (Pinned::new(&region), Pinned::new(&region));
        drop(first);
        assert!(region.is_pinned());
        drop(second);
        assert!(!region.is_pinned());
    }
}
