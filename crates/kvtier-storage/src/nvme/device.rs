//! One raw device, or one file, with all segments in it.
//!
//! ```text
//! 0          65536      1 MiB                                    end
//! | table A  | table B  | (zero) | segments and gaps ...         |
//! ```
//!
//! A table says which segments there are and where; the newer one that is whole counts. Only one of the two is ever
//! written between two syncs, so that the other, which is durable, stays: a power cut loses no more than what came since
//! the last sync. A segment whose header is not its own was overwritten later, and is no segment.
//!
//! Table (64 KiB, little-endian):
//! ```text
//!     0  8  magic "kvtier\x01T"
//!     8  4  version (1)
//!    12  4  segments, at most 2,044
//!    16  8  sequence: rises with each table written
//!    24 40  reserved
//!    64 24  for each segment: id 4, reserved 4, offset 8, bytes 8, each a multiple of 4 KiB
//! 65532  4  CRC32C of bytes 0..65532
//! ```

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvtier_core::SegmentId;
use kvtier_transfer::crc32c;
use kvtier_transfer::memory::{MemoryRegion, MemorySlice};
use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, FlockOperation};

use super::NvmeError;
use super::format::ALIGNMENT;
use super::volume::Room;

const MAGIC: [u8; 8] = *b"kvtier\x01T";
const VERSION: u32 = 1;
const TABLE: usize = 64 << 10;
const HEAD: usize = 64;
const ROW: usize = 24;
const SEGMENTS_MAX: usize = (TABLE - HEAD - 4) / ROW;
/// Where the first segment may lie.
const FIRST: u64 = 1 << 20;

/// See the module. Ours alone while this lives.
pub(super) struct Device {
    path: PathBuf,
    file: Arc<File>,
    bytes: u64,
    pub(super) direct: bool,
    /// Freed extents are given back to the device.
    discard: bool,
    table: Mutex<Table>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    offset: u64,
    bytes: u64,
}

struct Table {
    extents: BTreeMap<SegmentId, Extent>,
    sequence: u64,
    /// Which of the two is durable: 0 or 1.
    durable: u64,
    /// The other one was written since the last sync.
    changed: bool,
}

impl Device {
    /// Opens and locks a block device or a file. A path where nothing is becomes a file of `capacity_bytes`.
    pub(super) fn open(path: &Path, capacity_bytes: u64, discard: bool) -> Result<Device, NvmeError> {
        let failed = |doing: &'static str| {
            let path = path.to_owned();
            move |source: io::Error| NvmeError::Directory { doing, path, source }
        };
        // A device's name with a slip in it must not become a file in memory.
        if path.starts_with("/dev") && !path.exists() {
            return Err(failed("find")(io::ErrorKind::NotFound.into()));
        }
        let with = |flags: i32| {
            let mut options = OpenOptions::new();
            options
                .read(true)
                .write(true)
                .create(true)
                .mode(0o600)
                .custom_flags(flags);
            options.truncate(false).open(path)
        };
        // Some file systems refuse direct I/O at open.
        let (mut file, direct) = match with(libc::O_DIRECT) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (with(0).map_err(failed("open"))?, false),
            opened => (opened.map_err(failed("open"))?, true),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(NvmeError::InUse {
                    directory: path.to_owned(),
                    holder: None,
                });
            }
            Err(error) => return Err(failed("lock")(error.into())),
        }
        let kind = file.metadata().map_err(failed("look at"))?.file_type();
        let is_block_device = kind.is_block_device();
        if !is_block_device && !kind.is_file() {
            let source = io::Error::other("neither a block device nor a file");
            return Err(failed("use")(source));
        }
        let mut bytes = file.seek(SeekFrom::End(0)).map_err(failed("measure"))?;
        if bytes == 0 && !is_block_device {
            bytes = FIRST + capacity_bytes.next_multiple_of(ALIGNMENT);
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
                Ok(()) => {}
                Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(bytes).map_err(failed("make"))?,
                Err(error) => return Err(failed("make")(error.into())),
            }
        }
        if bytes < 2 * FIRST {
            let source = io::Error::other("it has fewer than 2 MiB");
            return Err(failed("use")(source));
        }
        let table = read_table(&file).map_err(failed("read"))?.map_err(|words| {
            let source = io::Error::other(words);
            failed("use")(source)
        })?;
        // The table that counts may be one that a killed run did not sync: the next one overwrites the other.
        file.sync_data().map_err(failed("sync"))?;
        Ok(Device {
            path: path.to_owned(),
            file: Arc::new(file),
            bytes: bytes - bytes % ALIGNMENT,
            direct,
            discard,
            table: Mutex::new(table),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn segments(&self) -> Vec<SegmentId> {
        self.table.lock().extents.keys().copied().collect()
    }

    /// Bytes for segments, taken ones included.
    pub(super) fn room_bytes(&self) -> u64 {
        self.bytes - FIRST
    }

    pub(super) fn reopen(&self, id: SegmentId) -> io::Result<Room> {
        let extent = self.table.lock().extents.get(&id).copied();
        let extent = extent.ok_or(io::ErrorKind::NotFound)?;
        Ok(self.room(extent))
    }

    fn room(&self, extent: Extent) -> Room {
        Room {
            file: Arc::clone(&self.file),
            base: extent.offset,
            bytes: extent.bytes,
        }
    }

    /// Finds room for a new segment: the first gap that is large enough. What lies there is of earlier ones.
    pub(super) fn create(&self, id: SegmentId, bytes: u64) -> io::Result<Room> {
        let mut table = self.table.lock();
        if table.extents.contains_key(&id) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if table.extents.len() >= SEGMENTS_MAX {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let offset = table
            .gap(bytes, self.bytes)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        let extent = Extent { offset, bytes };
        table.extents.insert(id, extent);
        if let Err(error) = self.write_table(&mut table) {
            table.extents.remove(&id);
            return Err(error);
        }
        Ok(self.room(extent))
    }

    /// Gives a segment's room back. It may be used anew once that is durable.
    pub(super) fn remove(&self, id: SegmentId) -> io::Result<()> {
        let mut table = self.table.lock();
        let Some(extent) = table.extents.remove(&id) else {
            return Ok(());
        };
        if let Err(error) = self.write_table(&mut table) {
            table.extents.insert(id, extent);
            return Err(error);
        }
        // Under the lock: nobody has got the room meanwhile.
        self.sync_table(&mut table)?;
        if self.discard
            && let Err(error) = self.discard(extent)
        {
            tracing::warn!(path = %self.path.display(), %error, "the device takes no discards");
        }
        Ok(())
    }

    fn discard(&self, extent: Extent) -> io::Result<()> {
        // In a file this makes a hole; on a block device it is a discard after which zeroes are read.
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, extent.offset, extent.bytes)?)
    }

    /// Makes the table survive a power cut.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.sync_table(&mut self.table.lock())
    }

    fn sync_table(&self, table: &mut Table) -> io::Result<()> {
        if table.changed {
            self.file.sync_data()?;
            table.durable = 1 - table.durable;
            table.changed = false;
        }
        Ok(())
    }

    fn write_table(&self, table: &mut Table) -> io::Result<()> {
        let bytes = table.encode(table.sequence + 1);
        let memory = aligned(TABLE)?;
        memory.copy_from_slice(&bytes).map_err(io::Error::other)?;
        let offset = (1 - table.durable) * TABLE as u64;
        if memory.write_at(&*self.file, offset)? != TABLE {
            return Err(io::ErrorKind::WriteZero.into());
        }
        table.sequence += 1;
        table.changed = true;
        Ok(())
    }
}

/// A table's sequence and extents.
type Rows = (u64, BTreeMap<SegmentId, Extent>);

impl Table {
    fn gap(&self, bytes: u64, end: u64) -> Option<u64> {
        let mut taken: Vec<Extent> = self.extents.values().copied().collect();
        taken.sort_unstable_by_key(|extent| extent.offset);
        let mut at = FIRST;
        for extent in taken {
            if extent.offset.saturating_sub(at) >= bytes {
                return Some(at);
            }
            at = at.max(extent.offset + extent.bytes);
        }
        (end.saturating_sub(at) >= bytes).then_some(at)
    }

    fn encode(&self, sequence: u64) -> Vec<u8> {
        let mut bytes = vec![0; TABLE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let count = u32::try_from(self.extents.len()).expect("at most SEGMENTS_MAX");
        bytes[12..16].copy_from_slice(&count.to_le_bytes());
        bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
        for ((id, extent), row) in self.extents.iter().zip(bytes[HEAD..].chunks_exact_mut(ROW)) {
            row[..4].copy_from_slice(&id.0.to_le_bytes());
            row[8..16].copy_from_slice(&extent.offset.to_le_bytes());
            row[16..].copy_from_slice(&extent.bytes.to_le_bytes());
        }
        let sum = crc32c(&bytes[..TABLE - 4]);
        bytes[TABLE - 4..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// `None`: not a whole table.
    fn decode(bytes: &[u8]) -> Option<Result<Rows, u32>> {
        let word = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let wide = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        if bytes.len() != TABLE || bytes[..8] != MAGIC || word(TABLE - 4)? != crc32c(&bytes[..TABLE - 4]) {
            return None;
        }
        let version = word(8)?;
        if version != VERSION {
            return Some(Err(version));
        }
        let count = word(12)? as usize;
        if count > SEGMENTS_MAX {
            return None;
        }
        let mut extents = BTreeMap::new();
        for at in (0..count).map(|row| HEAD + row * ROW) {
            let extent = Extent {
                offset: wide(at + 8)?,
                bytes: wide(at + 16)?,
            };
            extents.insert(SegmentId(word(at)?), extent);
        }
        Some(Ok((wide(16)?, extents)))
    }
}

/// The newer whole table; an empty one for a device that is empty. In words, why it is not to be used.
fn read_table(file: &File) -> io::Result<Result<Table, String>> {
    let memory = aligned(2 * TABLE)?;
    let mut done = 0;
    while done < memory.len() {
        let rest = memory.subslice(done, memory.len() - done).map_err(io::Error::other)?;
        match rest.read_at(file, done as u64)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    let bytes = memory.to_vec();
    let mut newest: Option<Table> = None;
    for (place, half) in (0..).zip(bytes.chunks_exact(TABLE)) {
        match Table::decode(half) {
            Some(Ok((sequence, extents))) if newest.as_ref().is_none_or(|other| other.sequence < sequence) => {
                newest = Some(Table {
                    extents,
                    sequence,
                    durable: place,
                    changed: false,
                });
            }
            Some(Ok(_)) | None => {}
            Some(Err(version)) => {
                return Ok(Err(format!(
                    "a later version of this program wrote it (table version {version}): start that version again, or wipe it"
                )));
            }
        }
    }
    if let Some(table) = newest {
        return Ok(Ok(table));
    }
    if bytes.iter().any(|byte| *byte != 0) {
        let words = "something else is on it: if it may go, wipe its first MiB (dd if=/dev/zero bs=1M count=1)";
        return Ok(Err(words.to_owned()));
    }
    Ok(Ok(Table {
        extents: BTreeMap::new(),
        sequence: 0,
        durable: 1,
        changed: false,
    }))
}

fn aligned(bytes: usize) -> io::Result<MemorySlice> {
    MemoryRegion::anonymous(bytes)
        .map_err(io::Error::other)?
        .slice(0, bytes)
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn open(path: &Path) -> Device {
        Device::open(path, 8 * MIB, false).expect("it opens")
    }

    fn places(device: &Device) -> Vec<(u32, u64)> {
        let table = device.table.lock();
        table
            .extents
            .iter()
            .map(|(id, extent)| (id.0, extent.offset / MIB))
            .collect()
    }

    #[test]
    fn room_is_given_front_to_back_in_gaps_too_and_found_again() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("tier");
        let device = open(&path);
        for id in 0..4 {
            device.create(SegmentId(id), 2 * MIB).expect("room");
        }
        assert_eq!(places(&device), [(0, 1), (1, 3), (2, 5), (3, 7)]);
        let full = device.create(SegmentId(4), MIB).expect_err("full");
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
        device.remove(SegmentId(1)).expect("removed");
        device.create(SegmentId(5), MIB).expect("room");
        device.create(SegmentId(6), MIB).expect("room");
        assert_eq!(places(&device), [(0, 1), (2, 5), (3, 7), (5, 3), (6, 4)]);
        drop(device);
        assert_eq!(places(&open(&path)), [(0, 1), (2, 5), (3, 7), (5, 3), (6, 4)]);
    }

    #[test]
    fn a_torn_table_leaves_the_one_that_was_synced() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("tier");
        let device = open(&path);
        device.create(SegmentId(1), MIB).expect("room");
        device.sync().expect("synced");
        // Many changes without a sync: all in the same place.
        for id in 2..6 {
            device.create(SegmentId(id), MIB).expect("room");
        }
        let torn = (1 - device.table.lock().durable) * TABLE as u64;
        drop(device);
        use std::os::unix::fs::FileExt;
        let file = OpenOptions::new().write(true).open(&path).expect("a file");
        file.write_all_at(&[0xff; 512], torn + 128).expect("written");
        assert_eq!(places(&open(&path)), [(1, 1)]);
    }

    #[test]
    fn what_is_not_ours_is_not_touched() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("tier");
        std::fs::write(&path, vec![7; 4 << 20]).expect("a file");
        let refused = Device::open(&path, MIB, false).map(|_| ()).expect_err("something else");
        assert!(refused.to_string().contains("wipe its first MiB"), "{refused}");
        assert_eq!(std::fs::read(&path).expect("the file"), vec![7; 4 << 20]);
        std::fs::write(&path, vec![0; 1 << 20]).expect("a file");
        let refused = Device::open(&path, MIB, false).map(|_| ()).expect_err("too small");
        assert!(refused.to_string().contains("fewer than 2 MiB"), "{refused}");
    }

    #[test]
    fn a_device_that_is_not_there_is_not_made() {
        let path = Path::new("/dev/kvtier-no-such-device");
        let refused = Device::open(path, MIB, false).map(|_| ()).expect_err("not there");
        assert!(
            refused.to_string().contains("cannot find /dev/kvtier-no-such-device"),
            "{refused}"
        );
        assert!(!path.exists());
    }

    #[test]
    fn a_second_owner_and_a_later_version_are_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("tier");
        let device = open(&path);
        device.create(SegmentId(1), MIB).expect("room");
        let second = Device::open(&path, MIB, false).map(|_| ()).expect_err("in use");
        assert!(matches!(second, NvmeError::InUse { .. }), "{second}");
        let mut later = device.table.lock().encode(99);
        drop(device);
        later[8..12].copy_from_slice(&7u32.to_le_bytes());
        let sum = crc32c(&later[..TABLE - 4]);
        later[TABLE - 4..].copy_from_slice(&sum.to_le_bytes());
        use std::os::unix::fs::FileExt;
        let file = OpenOptions::new().write(true).open(&path).expect("a file");
        file.write_all_at(&later, TABLE as u64).expect("written");
        let refused = Device::open(&path, MIB, false).map(|_| ()).expect_err("newer");
        assert!(refused.to_string().contains("later version"), "{refused}");
    }

    #[test]
    fn discarded_room_takes_no_space() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("tier");
        let blocks = || std::fs::metadata(&path).expect("the file").blocks();
        for (discard, freed) in [(false, false), (true, true)] {
            let _ = std::fs::remove_file(&path);
            let device = Device::open(&path, 8 * MIB, discard).expect("it opens");
            device.create(SegmentId(1), 4 * MIB).expect("room");
            let before = blocks();
            device.remove(SegmentId(1)).expect("removed");
            assert_eq!(blocks() < before, freed);
        }
    }
}
