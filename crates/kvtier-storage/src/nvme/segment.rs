use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvtier_core::{Generation, NamespaceId, SegmentId};
use kvtier_transfer::memory::{MemoryRegion, MemorySlice};
use parking_lot::Mutex;

use super::format::{self, ALIGNMENT, ENTRY_BYTES, Encryption, Entry, FormatError, HEADER_BYTES, Header, Seal};
use super::keys::RecordKeys;
use super::sealing::RecordCipher;
use super::tier::Ticket;
use super::volume::{Room, Volume};

const ENTRY: usize = ENTRY_BYTES as usize;
/// Pages of an index that one read or write covers when records are forgotten.
const INDEX_PAGES_AT_ONCE: usize = 32;
const ENTRIES_A_PAGE: usize = ALIGNMENT as usize / ENTRY;

/// A segment file and what is known of its records.
pub(super) struct Segment {
    pub(super) id: SegmentId,
    pub(super) file: Arc<File>,
    /// Where in the file it begins.
    pub(super) base: u64,
    pub(super) bytes: u64,
    header: Header,
    /// Something was written since the last sync, or the index in memory is ahead of the file's.
    dirty: AtomicBool,
    records: Mutex<Records>,
    ciphers: Mutex<HashMap<(NamespaceId, Generation), Arc<RecordCipher>>>,
    /// Held while entries are erased in the file of a sealed segment.
    erasing: Mutex<()>,
}

/// What the index of a sealed segment named, some of which it names no more.
pub(super) struct Named {
    /// Offset of its first page.
    pub(super) index_starts_at: u64,
    pub(super) forgotten: u32,
    /// What was written for that.
    pub(super) bytes: u64,
}

/// Told how long the device was kept from others, between two pieces of a longer work.
pub(super) type Pause<'a> = &'a dyn Fn(Duration);

#[derive(Default)]
struct Records {
    /// The index, entry 0 first, while records may be added.
    entries: Vec<[u8; ENTRY]>,
    /// Entries before this one are on the file as they are in memory.
    written: usize,
    /// How often an entry was erased in memory.
    erasures: u64,
    /// Entries to zero in the file of a sealed segment.
    erased: Vec<u32>,
    /// Where records lie, by place.
    places: Vec<Place>,
    /// Places that a write was announced for: each is written once.
    begun: BTreeSet<u32>,
    /// Writes that may still add an entry.
    writing: usize,
    /// Waits for them.
    seal: Option<Ticket>,
    /// No more records.
    sealed: bool,
    /// The file says so too, and the index is no longer kept in memory.
    complete: bool,
}

#[derive(Clone, Copy)]
struct Place {
    /// Offset in units of 4 KiB.
    place: u32,
    ordinal: u32,
    tag: [u8; 16],
}

/// One write of a record: the segment is not sealed before it is dropped.
pub(super) struct Writing {
    segment: Arc<Segment>,
}

/// A segment file of an earlier run.
pub(super) struct Reopened {
    pub(super) segment: Segment,
    pub(super) entries: Vec<Entry>,
    /// Entries that could not be read.
    pub(super) damaged: u32,
}

impl Segment {
    /// Finds room for it and writes its header.
    pub(super) fn create(volume: &Volume, id: SegmentId, bytes: u64, encryption: Encryption) -> io::Result<Segment> {
        let bytes = bytes.next_multiple_of(ALIGNMENT);
        if bytes < HEADER_BYTES + ALIGNMENT {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut header = Header {
            version: format::VERSION,
            segment: id.0,
            incarnation: [0; 32],
            bytes,
            opened_ms: now_ms(),
            encryption,
        };
        getrandom::fill(&mut header.incarnation).map_err(|error| io::Error::other(error.to_string()))?;
        let room = volume.create(id, bytes)?;
        let segment = Segment::of(room, header, Records::default());
        segment.prepare().inspect_err(|_| volume.remove(id))?;
        Ok(segment)
    }

    fn of(room: Room, header: Header, records: Records) -> Segment {
        Segment {
            id: SegmentId(header.segment),
            file: room.file,
            base: room.base,
            bytes: header.bytes,
            header,
            dirty: AtomicBool::new(true),
            records: Mutex::new(records),
            ciphers: Mutex::new(HashMap::new()),
            erasing: Mutex::new(()),
        }
    }

    fn prepare(&self) -> io::Result<()> {
        if self.base > 0 {
            // What an earlier segment left here names another incarnation, and is not to pass for damage to this one.
            let zeroes = [0; ALIGNMENT as usize];
            self.write(self.bytes - ALIGNMENT, &zeroes)?;
            self.write(ALIGNMENT, &zeroes)?;
        }
        self.write(0, &self.header.encode())
    }

    /// Reads the header and the index of a file of an earlier run, never its payloads. No record is added to it any
    /// more: its keys and nonces are as they were left. Also says how many bytes were read.
    pub(super) fn reopen(volume: &Volume, id: SegmentId) -> io::Result<Result<(Reopened, u64), FormatError>> {
        let room = volume.reopen(id)?;
        let bytes = room.bytes;
        if bytes < HEADER_BYTES + ALIGNMENT {
            return Ok(Err(FormatError::Short("file")));
        }
        let front = read(&room.file, room.base, HEADER_BYTES)?;
        let header = match Header::decode(&front) {
            Ok(header) if header.segment != id.0 || header.bytes != bytes => {
                return Ok(Err(FormatError::Foreign("header")));
            }
            Ok(header) => header,
            Err(error) => return Ok(Err(error)),
        };
        // A seal that cannot be read says nothing: the segment is read like one that was open.
        let (seal, mut damaged) = match Seal::decode(&front[ALIGNMENT as usize..], &header) {
            Ok(seal) => (seal, 0),
            Err(_) => (None, 1),
        };
        let entries = seal.map_or_else(|| format::entries_max(bytes), |seal| seal.entries);
        let index_start = match entries {
            0 => bytes,
            entries => format::index_page(bytes, entries - 1),
        };
        let index = match bytes - index_start {
            0 => Vec::new(),
            length => read(&room.file, room.base + index_start, length)?,
        };
        let (found, unreadable) = format::decode_index(&index, &header, entries as usize);
        damaged += match seal {
            Some(_) => unreadable,
            None => format::damaged_in_open_index(&index, &header),
        };
        let mut places: Vec<Place> = found
            .iter()
            .map(|(ordinal, entry)| Place {
                place: entry.place(),
                ordinal: *ordinal,
                tag: entry.tag,
            })
            .collect();
        places.sort_unstable_by_key(|place| place.place);
        let records = Records {
            places,
            sealed: true,
            complete: true,
            ..Records::default()
        };
        let segment = Segment::of(room, header, records);
        // The run that wrote it may not have synced it: the first sync of this one does.
        let entries = found.into_iter().map(|(_, entry)| entry).collect();
        let reopened = Reopened {
            segment,
            entries,
            damaged,
        };
        Ok(Ok((reopened, HEADER_BYTES + bytes - index_start)))
    }

    pub(super) fn encryption(&self) -> Encryption {
        self.header.encryption
    }

    /// The cipher of a namespace's records here; `None` where its key is not to be had.
    pub(super) fn cipher(
        &self,
        keys: &dyn RecordKeys,
        namespace: NamespaceId,
        generation: Generation,
    ) -> Option<Arc<RecordCipher>> {
        let key = keys.data_key(namespace, generation);
        let mut ciphers = self.ciphers.lock();
        let Some(key) = key else {
            ciphers.remove(&(namespace, generation));
            return None;
        };
        let cipher = ciphers
            .entry((namespace, generation))
            .or_insert_with(|| RecordCipher::derive(&key, &self.header.incarnation));
        Some(Arc::clone(cipher))
    }

    /// Forgets derived keys whose data key is gone.
    pub(super) fn forget_ciphers(&self, keys: &dyn RecordKeys) {
        let gone =
            |(namespace, generation): &(NamespaceId, Generation)| keys.data_key(*namespace, *generation).is_none();
        self.ciphers.lock().retain(|of, _| !gone(of));
    }

    /// Writes what the file's index lacks; how many bytes.
    fn write_index(&self) -> io::Result<u64> {
        let mut bytes = 0;
        let (erasures, first, end, page) = {
            let records = self.records.lock();
            let (first, end) = (records.written, records.entries.len());
            // Whole pages: from the one that the last new entry is on to the end of that of the first.
            let from = first / ENTRIES_A_PAGE * ENTRIES_A_PAGE;
            let mut page = vec![0; ((end - from) * ENTRY).next_multiple_of(ALIGNMENT as usize)];
            for (entry, place) in records.entries[from..].iter().zip(page.rchunks_exact_mut(ENTRY)) {
                place.copy_from_slice(entry);
            }
            (records.erasures, first, end, page)
        };
        if end > first {
            let last = u32::try_from(end - 1).map_err(|_| io::ErrorKind::InvalidData)?;
            self.write(format::index_page(self.bytes, last), &page)?;
            bytes += page.len() as u64;
            let mut records = self.records.lock();
            // What was erased meanwhile is to be written once more.
            if records.erasures == erasures {
                records.written = end;
            }
        }
        let _erasing = self.erasing.lock();
        let erased = std::mem::take(&mut self.records.lock().erased);
        for ordinal in erased {
            let written = self.erase(ordinal);
            if written.is_err() {
                self.records.lock().erased.push(ordinal);
            }
            bytes += written?;
        }
        Ok(bytes)
    }

    fn erase(&self, ordinal: u32) -> io::Result<u64> {
        let offset = format::index_page(self.bytes, ordinal);
        let mut page = read(&self.file, self.base + offset, ALIGNMENT)?;
        let start = usize::try_from(self.bytes - (u64::from(ordinal) + 1) * ENTRY_BYTES - offset)
            .map_err(|_| io::ErrorKind::InvalidData)?;
        page[start..start + ENTRY].fill(0);
        self.write(offset, &page)?;
        Ok(ALIGNMENT)
    }

    /// Forgets those records of a sealed segment that `is_chosen` says, in memory and in the file. Not synced.
    pub(super) fn forget_chosen(
        &self,
        mut is_chosen: impl FnMut(&Entry) -> bool,
        pause: Pause<'_>,
    ) -> io::Result<Named> {
        // Deletions that the file lacks.
        let mut written = self.write_index()?;
        let _erasing = self.erasing.lock();
        if !self.records.lock().complete {
            return Err(io::Error::other("the segment still takes records"));
        }
        let (mut index, count) = self.read_index(pause)?;
        let (entries, _) = format::decode_index(&index, &self.header, count);
        // Of one that nobody sealed it is not written down where the index ends: with the last record it has.
        let last = entries.iter().map(|&(ordinal, _)| ordinal).max();
        let index_starts_at = last.map_or(self.bytes, |last| format::index_page(self.bytes, last));
        let mut changed = BTreeSet::new();
        let mut gone = vec![false; index.len() / ENTRY];
        let mut forgotten = 0;
        for (ordinal, entry) in &entries {
            if !is_chosen(entry) {
                continue;
            }
            let from_end = (*ordinal as usize + 1) * ENTRY;
            let start = index.len().checked_sub(from_end).ok_or(io::ErrorKind::InvalidData)?;
            index[start..start + ENTRY].fill(0);
            gone[*ordinal as usize] = true;
            changed.insert(start / ALIGNMENT as usize);
            forgotten += 1;
        }
        if forgotten > 0 {
            // Readers ask for tags meanwhile: one pass, without a search for each.
            let is_gone = |ordinal: u32| gone.get(ordinal as usize).is_some_and(|&gone| gone);
            self.records.lock().places.retain(|place| !is_gone(place.ordinal));
            written += self.write_pages(&index, changed, pause)?;
            self.dirty.store(true, Ordering::Release);
        }
        Ok(Named {
            index_starts_at,
            forgotten,
            bytes: written,
        })
    }

    /// Writes these pages of an index; how many bytes.
    fn write_pages(&self, index: &[u8], pages: BTreeSet<usize>, pause: Pause<'_>) -> io::Result<u64> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for page in pages {
            match runs.last_mut() {
                Some(run) if run.end == page && run.len() < INDEX_PAGES_AT_ONCE => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        let index_at = self.bytes - index.len() as u64;
        let mut written = 0;
        for run in runs {
            let (start, end) = (run.start * ALIGNMENT as usize, run.end * ALIGNMENT as usize);
            let begun = Instant::now();
            self.write(index_at + start as u64, &index[start..end])?;
            pause(begun.elapsed());
            written += (end - start) as u64;
        }
        Ok(written)
    }

    /// The end of the file where entries lie, and how many there may be.
    fn read_index(&self, pause: Pause<'_>) -> io::Result<(Vec<u8>, usize)> {
        let page = read(&self.file, self.base + ALIGNMENT, ALIGNMENT)?;
        let count = match Seal::decode(&page, &self.header) {
            Ok(Some(seal)) => seal.entries,
            Ok(None) | Err(_) => format::entries_max(self.bytes),
        };
        let start = match count {
            0 => self.bytes,
            count => format::index_page(self.bytes, count - 1),
        };
        let mut index = Vec::with_capacity(usize::try_from(self.bytes - start).map_err(io::Error::other)?);
        let mut offset = start;
        while offset < self.bytes {
            let length = (self.bytes - offset).min(INDEX_PAGES_AT_ONCE as u64 * ALIGNMENT);
            let begun = Instant::now();
            index.extend(read(&self.file, self.base + offset, length)?);
            pause(begun.elapsed());
            offset += length;
        }
        Ok((index, count as usize))
    }

    /// Writes from the start of `zeroes`. Lengths and offsets are multiples of 4 KiB.
    pub(super) fn overwrite(&self, offset: u64, length: u64, zeroes: &MemorySlice) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let rest = usize::try_from(length - done).map_err(io::Error::other)?;
            let zeroes = zeroes.subslice(0, rest).map_err(io::Error::other)?;
            match zeroes.write_at(&*self.file, self.base + offset + done) {
                Ok(count) if (count as u64) < ALIGNMENT => return Err(io::ErrorKind::WriteZero.into()),
                // Direct I/O goes on where a page starts.
                Ok(count) => done += (count as u64) / ALIGNMENT * ALIGNMENT,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes what was overwritten survive a power cut.
    pub(super) fn sync_payloads(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Whether a page is zero on the device.
    pub(super) fn is_zero_at(&self, offset: u64) -> io::Result<bool> {
        let page = read(&self.file, self.base + offset, ALIGNMENT)?;
        Ok(page.iter().all(|&byte| byte == 0))
    }

    /// Writes the rest of the index and the seal page. Only once no write is left that could add a record.
    pub(super) fn write_seal(&self) -> io::Result<u64> {
        let count = {
            let mut records = self.records.lock();
            assert!(records.writing == 0, "sealing a segment that is being written");
            records.sealed = true;
            u32::try_from(records.entries.len()).map_err(|_| io::ErrorKind::InvalidData)?
        };
        let mut bytes = self.write_index()?;
        let seal = Seal {
            version: self.header.version,
            segment: self.id.0,
            incarnation: self.header.incarnation,
            entries: count,
            sealed_ms: now_ms(),
        };
        self.write(ALIGNMENT, &seal.encode())?;
        self.dirty.store(true, Ordering::Release);
        loop {
            {
                let mut records = self.records.lock();
                if records.written == records.entries.len() {
                    records.entries = Vec::new();
                    records.written = 0;
                    records.begun = BTreeSet::new();
                    records.places.shrink_to_fit();
                    records.complete = true;
                    return Ok(bytes + ALIGNMENT);
                }
            }
            // A record was deleted while this was written.
            bytes += self.write_index()?;
        }
    }

    /// Lengths and offsets are multiples of 4 KiB.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let memory = aligned(bytes.len())?;
        memory.copy_from_slice(bytes).map_err(io::Error::other)?;
        match memory.write_at(&*self.file, self.base + offset)? {
            written if written == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Memory kept for its records.
    pub(super) fn memory_bytes(&self) -> u64 {
        let records = self.records.lock();
        (records.entries.capacity() * ENTRY + records.places.capacity() * size_of::<Place>()) as u64
    }

    /// Writes the index as far as it is known, without a sync: it survives this process, not a power cut.
    pub(super) fn write_out(&self) -> io::Result<u64> {
        let bytes = self.write_index()?;
        if bytes > 0 {
            self.dirty.store(true, Ordering::Release);
        }
        Ok(bytes)
    }

    /// Makes everything committed so far survive a power cut; how many bytes that took.
    pub(super) fn sync(&self) -> io::Result<u64> {
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(0);
        }
        let again = |_: &io::Error| self.dirty.store(true, Ordering::Release);
        // What is committed from here on makes it dirty again.
        let bytes = self.write_index().inspect_err(again)?;
        self.file.sync_data().inspect_err(again)?;
        Ok(bytes)
    }

    /// Announces a write at a place; `None` once the segment is sealed or about to be, and for a place that was written
    /// before.
    pub(super) fn begin_write(self: &Arc<Self>, offset: u64) -> Option<Writing> {
        let mut records = self.records.lock();
        if records.sealed || records.seal.is_some() || !records.begun.insert(format::place_of(offset)) {
            return None;
        }
        records.writing += 1;
        Some(Writing {
            segment: Arc::clone(self),
        })
    }

    /// The authentication tag of the record at a place.
    pub(super) fn tag(&self, offset: u64) -> Option<[u8; 16]> {
        let records = self.records.lock();
        let found = records.find(format::place_of(offset)).ok()?;
        Some(records.places[found].tag)
    }

    /// Forgets the record at a place, in memory now and in the file when the index is written next.
    pub(super) fn forget_record(&self, offset: u64) {
        let mut records = self.records.lock();
        let Ok(found) = records.find(format::place_of(offset)) else {
            return;
        };
        let ordinal = records.places.remove(found).ordinal;
        match records.entries.get_mut(ordinal as usize) {
            Some(entry) => {
                *entry = [0; ENTRY];
                records.written = records.written.min(ordinal as usize);
                records.erasures += 1;
            }
            None => records.erased.push(ordinal),
        }
        self.dirty.store(true, Ordering::Release);
    }

    /// Hands the ticket back when the segment can be sealed now; else it is kept until the last write has ended. A
    /// second seal is refused.
    pub(super) fn seal_after_writes(&self, ticket: Ticket) -> Result<Option<Ticket>, Ticket> {
        let mut records = self.records.lock();
        if records.seal.is_some() || records.complete {
            return Err(ticket);
        }
        if records.writing == 0 {
            return Ok(Some(ticket));
        }
        records.seal = Some(ticket);
        Ok(None)
    }
}

impl Records {
    fn find(&self, place: u32) -> Result<usize, usize> {
        self.places.binary_search_by_key(&place, |known| known.place)
    }
}

impl Writing {
    pub(super) fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// The record is on the device.
    pub(super) fn commit(&self, entry: &Entry) {
        let segment = &self.segment;
        let bytes = entry.encode(&segment.header.incarnation);
        let mut records = segment.records.lock();
        let place = Place {
            place: entry.place(),
            ordinal: u32::try_from(records.entries.len()).expect("a segment has fewer than 2^32 records"),
            tag: entry.tag,
        };
        records.entries.push(bytes);
        if let Err(at) = records.find(place.place) {
            records.places.insert(at, place);
        }
        drop(records);
        segment.dirty.store(true, Ordering::Release);
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

pub(super) fn aligned(bytes: usize) -> io::Result<MemorySlice> {
    MemoryRegion::anonymous(bytes)
        .map_err(io::Error::other)?
        .slice(0, bytes)
        .map_err(io::Error::other)
}

/// Offset and length are multiples of 4 KiB.
fn read(file: &File, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
    let memory = aligned(length)?;
    let mut done = 0;
    while done < length {
        let rest = memory.subslice(done, length - done).map_err(io::Error::other)?;
        match rest.read_at(file, offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(memory.to_vec())
}

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
