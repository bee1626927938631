/// One level of the hierarchy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// A pool in the memory of a GPU: copies of blocks that have another copy too, mapped by clients of the same device.
    Hbm,
    /// Host memory: segments mapped by clients.
    Host,
    /// Local NVMe: segment files written front to back.
    Nvme,
    /// Another node's memory or device, as peers tell. The tier manager itself never answers it.
    Remote,
}

/// A segment of one tier: the unit of allocation and reclaim. Never reused for other memory: a new segment, a new id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub u32);

impl SegmentId {
    /// Whether it names device memory: no segment of host memory has such an id.
    #[must_use]
    pub fn is_on_device(self) -> bool {
        self.0 >= 1 << 31
    }
}

/// Where one copy lies inside its tier: a segment, a byte offset in it, and the exact length of the payload in bytes.
///
/// Offsets are multiples of 4 KiB in every tier; the space taken is the length rounded up to 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// Which segment of the tier.
    pub segment: SegmentId,
    /// Byte offset of the payload in the segment.
    pub offset: u64,
    /// Payload length in bytes.
    pub length: u32,
}
