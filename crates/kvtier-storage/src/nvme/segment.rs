use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use kvtier_core::SegmentId;
use kvtier_transfer::memory::MemoryRegion;
use parking_lot::Mutex;

use super::directory::Directory;
use super::format::{self, ALIGNMENT, Entry, Header, Incarnation, Seal};
use super::tier::Ticket;

/// An open segment file and, until it is sealed, what its records are.
pub(super) struct Segment {
    pub(super) id: SegmentId,
    pub(super) file: Arc<File>,
    pub(super) bytes: u64,
    path: PathBuf,
    incarnation: Incarnation,
    /// Written since the last sync.
    pub(super) dirty: AtomicBool,
    records: Mutex<Records>,
}

#[derive(Default)]
struct Records {
    entries: Vec<Entry>,
    /// Writes that may still add an entry.
    writing: usize,
    /// Waits for them.
    seal: Option<Ticket>,
    sealed: bool,
}

/// One write of a record: the segment is not sealed before it is dropped.
pub(super) struct Writing {
    segment: Arc<Segment>,
}

impl Segment {
    /// Makes the file: its space is taken and its header written when this returns.
    pub(super) fn create(directory: &Directory, id: SegmentId, bytes: u64) -> io::Result<Segment> {
        let path = directory.segment_path(id);
        let bytes = bytes.next_multiple_of(ALIGNMENT);
        if bytes < format::HEADER_BYTES + ALIGNMENT {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut incarnation = Incarnation::default();
        getrandom::fill(&mut incarnation).map_err(|error| io::Error::other(error.to_string()))?;
        let file = Arc::new(directory.create(&path)?);
        let segment = Segment {
            id,
            file,
            bytes,
            path,
            incarnation,
            dirty: AtomicBool::new(true),
            records: Mutex::new(Records::default()),
        };
        segment.prepare().inspect_err(|_| segment.remove())?;
        Ok(segment)
    }

    fn prepare(&self) -> io::Result<()> {
        match rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::empty(), 0, self.bytes) {
            Ok(()) => {}
            // A file system that cannot take space ahead: a full one is met by the writes.
            Err(rustix::io::Errno::OPNOTSUPP) => self.file.set_len(self.bytes)?,
            Err(error) => return Err(error.into()),
        }
        self.write(0, &self.header().encode())
    }

    fn header(&self) -> Header {
        Header {
            segment: self.id.0,
            incarnation: self.incarnation,
            bytes: self.bytes,
            opened_ms: now_ms(),
        }
    }

    /// Writes the index and the seal page. Only once no write is left that could add a record.
    pub(super) fn write_seal(&self) -> io::Result<u64> {
        let entries = {
            let mut records = self.records.lock();
            assert!(records.writing == 0, "sealing a segment that is being written");
            records.sealed = true;
            std::mem::take(&mut records.entries)
        };
        let (index, index_checksum) =
            format::encode_index(&entries, self.bytes, &self.incarnation).ok_or(io::ErrorKind::InvalidData)?;
        let payload_end = entries
            .iter()
            .map(|entry| entry.offset + format::padded(u64::from(entry.length)))
            .max()
            .unwrap_or(0);
        if payload_end > self.bytes - index.len() as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the records leave no room for their index",
            ));
        }
        let count = u32::try_from(entries.len()).map_err(|_| io::ErrorKind::InvalidData)?;
        let seal = Seal {
            segment: self.id.0,
            incarnation: self.incarnation,
            entries: count,
            index_checksum,
            sealed_ms: now_ms(),
        };
        if !index.is_empty() {
            self.write(self.bytes - index.len() as u64, &index)?;
        }
        self.write(ALIGNMENT, &seal.encode())?;
        Ok(index.len() as u64 + ALIGNMENT)
    }

    /// Lengths and offsets are multiples of 4 KiB.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let memory = MemoryRegion::anonymous(bytes.len())
            .map_err(io::Error::other)?
            .slice(0, bytes.len())
            .map_err(io::Error::other)?;
        memory.copy_from_slice(bytes).map_err(io::Error::other)?;
        self.dirty.store(true, Ordering::Release);
        match memory.write_at(&*self.file, offset)? {
            written if written == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Makes everything written so far survive a power cut.
    pub(super) fn sync(&self) -> io::Result<()> {
        if self.dirty.swap(false, Ordering::AcqRel) {
            self.file
                .sync_data()
                .inspect_err(|_| self.dirty.store(true, Ordering::Release))?;
        }
        Ok(())
    }

    /// Removes the file's name; its space goes when the last request on it is done.
    pub(super) fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a segment file; the next start tries again");
        }
    }

    /// Announces a write; `None` once the segment is sealed or about to be.
    pub(super) fn begin_write(self: &Arc<Self>) -> Option<Writing> {
        let mut records = self.records.lock();
        if records.sealed || records.seal.is_some() {
            return None;
        }
        records.writing += 1;
        Some(Writing {
            segment: Arc::clone(self),
        })
    }

    /// Hands the ticket back when the segment can be sealed now; else it is kept until the last write has ended. A
    /// second seal is refused.
    pub(super) fn seal_after_writes(&self, ticket: Ticket) -> Result<Option<Ticket>, Ticket> {
        let mut records = self.records.lock();
        if records.sealed || records.seal.is_some() {
            return Err(ticket);
        }
        if records.writing == 0 {
            return Ok(Some(ticket));
        }
        records.seal = Some(ticket);
        Ok(None)
    }
}

impl Writing {
    pub(super) fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// The record is on the device.
    pub(super) fn commit(&self, entry: Entry) {
        self.segment.dirty.store(true, Ordering::Release);
        self.segment.records.lock().entries.push(entry);
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let seal = {
            let mut records = self.segment.records.lock();
            records.writing -= 1;
            if records.writing == 0 {
                records.seal.take()
            } else {
                None
            }
        };
        if let Some(ticket) = seal {
            ticket.seal(&self.segment);
        }
    }
}

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
