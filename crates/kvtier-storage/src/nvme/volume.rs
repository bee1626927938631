use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use kvtier_core::SegmentId;

use super::device::Device;
use super::directory::Directory;
use super::{NvmeError, NvmeSettings};

/// Where segments lie: each in a file of its own, or all in one device or file.
pub(super) enum Volume {
    Directory(Directory),
    Device(Device),
}

/// The place of one segment.
#[derive(Debug)]
pub(super) struct Room {
    pub(super) file: Arc<File>,
    /// Where in the file it begins.
    pub(super) base: u64,
    pub(super) bytes: u64,
}

impl Volume {
    pub(super) fn open(settings: &NvmeSettings) -> Result<Volume, NvmeError> {
        Ok(match &settings.device {
            Some(path) => Volume::Device(Device::open(path, settings.capacity_bytes, settings.discard)?),
            None => Volume::Directory(Directory::open(&settings.directory)?),
        })
    }

    pub(super) fn segments(&self) -> Result<Vec<SegmentId>, NvmeError> {
        match self {
            Volume::Directory(directory) => directory.segments(),
            Volume::Device(device) => Ok(device.segments()),
        }
    }

    /// Whether direct I/O is used.
    pub(super) fn is_direct(&self) -> bool {
        match self {
            Volume::Directory(directory) => directory.direct,
            Volume::Device(device) => device.direct,
        }
    }

    /// Bytes that segments may take, those that are there included; `taken` is what these take.
    pub(super) fn room_bytes(&self, taken: u64) -> Option<u64> {
        match self {
            Volume::Directory(directory) => directory.free_bytes().map(|free| free + taken),
            Volume::Device(device) => Some(device.room_bytes()),
        }
    }

    /// For messages.
    pub(super) fn path_of(&self, segment: SegmentId) -> PathBuf {
        match self {
            Volume::Directory(directory) => directory.segment_path(segment),
            Volume::Device(device) => device.path().join(format!("segment {:08x}", segment.0)),
        }
    }

    /// Room for a new segment. In a file of its own its space is taken; what a device holds there is of earlier segments.
    pub(super) fn create(&self, segment: SegmentId, bytes: u64) -> io::Result<Room> {
        match self {
            Volume::Directory(directory) => {
                let path = directory.segment_path(segment);
                let file = directory.create(&path)?;
                let taken = match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
                    // A file system that cannot take space ahead: a full one is met by the writes.
                    Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(bytes),
                    other => other.map_err(io::Error::from),
                };
                if let Err(error) = taken {
                    self.remove(segment);
                    return Err(error);
                }
                Ok(Room {
                    file: Arc::new(file),
                    base: 0,
                    bytes,
                })
            }
            Volume::Device(device) => device.create(segment, bytes),
        }
    }

    /// The place of a segment that is there.
    pub(super) fn reopen(&self, segment: SegmentId) -> io::Result<Room> {
        match self {
            Volume::Directory(directory) => {
                let file = directory.reopen(&directory.segment_path(segment))?;
                Ok(Room {
                    bytes: file.metadata()?.len(),
                    file: Arc::new(file),
                    base: 0,
                })
            }
            Volume::Device(device) => device.reopen(segment),
        }
    }

    /// Gives a segment's place back; that it is gone is durable with the next [`Volume::sync`].
    pub(super) fn remove(&self, segment: SegmentId) {
        let removed = match self {
            Volume::Directory(directory) => directory.remove(segment),
            Volume::Device(device) => device.remove(segment),
        };
        if let Err(error) = removed {
            let path = self.path_of(segment);
            tracing::warn!(path = %path.display(), %error, "cannot remove a segment; the next start tries again");
        }
    }

    /// Makes which segments there are survive a power cut.
    pub(super) fn sync(&self) -> io::Result<()> {
        match self {
            Volume::Directory(directory) => directory.sync(),
            Volume::Device(device) => device.sync(),
        }
    }
}
