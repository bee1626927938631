use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvtier_core::{Realization, RealizationId};
use kvtier_transfer::crc32c;
use parking_lot::Mutex;

use super::disk::Disk;
use super::slot::Incarnation;
use super::{KeyError, RecordError};

const MAGIC: [u8; 8] = *b"kvtier\x01Z";
const VERSION: u32 = 1;
const RECORD_BYTES: usize = 64;
const HEADER_BYTES: usize = 4096;

type Record = [u8; RECORD_BYTES];

/// Realizations in the order in which they were first seen: a position is an id. Append-only.
///
/// A record that is not whole keeps its position from ever being used: another realization under an id that records on
/// NVMe carry would be another model's bytes.
pub struct Realizations {
    disk: Box<dyn Disk>,
    incarnation: Incarnation,
    entries: Mutex<Vec<Option<Realization>>>,
    /// How many of them are durable.
    durable: AtomicUsize,
}

/// What a file of realizations is to a register.
pub(super) enum Found {
    /// Its own.
    Own(Realizations),
    /// None, or another register's: ids given out before mean nothing any more.
    None(Box<dyn Disk>),
}

impl Realizations {
    /// Reads them all. Writes nothing.
    pub(super) fn load(disk: Box<dyn Disk>, path: &Path, incarnation: &Incarnation) -> Result<Found, KeyError> {
        let failed = || KeyError::io("read", path);
        let bytes = disk.bytes().map_err(failed())?;
        let mut header: Record = [0; RECORD_BYTES];
        disk.read_at(&mut header, 0).map_err(failed())?;
        let version = u32::from_le_bytes(bytes_at(&header, 8));
        if header[..8] == MAGIC && version > VERSION {
            return Err(KeyError::Newer {
                path: path.to_owned(),
                version,
                known: VERSION,
            });
        }
        // Whole, or cut short while it was first written.
        let torn = header
            .iter()
            .zip(MAGIC)
            .all(|(found, written)| *found == 0 || *found == written);
        if header != header_of(incarnation) {
            return if torn {
                Ok(Found::None(disk))
            } else {
                Err(KeyError::Unreadable {
                    path: path.to_owned(),
                    what: "list of realizations",
                })
            };
        }
        let count = bytes.saturating_sub(HEADER_BYTES as u64).div_ceil(RECORD_BYTES as u64);
        let mut records = vec![
            0;
            usize::try_from(count)
                .unwrap_or(usize::MAX)
                .saturating_mul(RECORD_BYTES)
        ];
        disk.read_at(&mut records, HEADER_BYTES as u64).map_err(failed())?;
        let (records, _) = records.as_chunks::<RECORD_BYTES>();
        let used = records
            .iter()
            .rposition(|record| record.iter().any(|byte| *byte != 0))
            .map_or(0, |last| last + 1);
        let mut seen = BTreeSet::new();
        let entries: Vec<_> = records[..used]
            .iter()
            .zip(0..)
            .map(|(record, position)| decode(record, position, incarnation).filter(|found| seen.insert(*found)))
            .collect();
        Ok(Found::Own(Realizations {
            disk,
            incarnation: *incarnation,
            durable: AtomicUsize::new(entries.len()),
            entries: Mutex::new(entries),
        }))
    }

    /// Begins anew, whatever was there.
    pub(super) fn begin(disk: Box<dyn Disk>, path: &Path, incarnation: &Incarnation) -> Result<Realizations, KeyError> {
        let bytes = usize::try_from(disk.bytes().map_err(KeyError::io("read", path))?).unwrap_or(usize::MAX);
        let header = header_of(incarnation);
        // Nothing that was there may be taken for a record of the new list: it goes before the header comes.
        let blank = vec![0; bytes.max(HEADER_BYTES)];
        disk.write_at(&blank, 0)
            .and_then(|()| disk.sync())
            .and_then(|()| disk.write_at(&header, 0))
            .and_then(|()| disk.sync())
            .map_err(KeyError::io("write", path))?;
        Ok(Realizations {
            disk,
            incarnation: *incarnation,
            entries: Mutex::new(Vec::new()),
            durable: AtomicUsize::new(0),
        })
    }

    /// Every position in order, or nothing where its record is damaged. The caller keeps such an id from being used.
    #[must_use]
    pub fn entries(&self) -> Vec<Option<Realization>> {
        self.entries.lock().clone()
    }

    /// The id of a realization that is listed.
    #[must_use]
    pub fn find(&self, realization: Realization) -> Option<RealizationId> {
        let entries = self.entries.lock();
        let position = entries.iter().position(|entry| *entry == Some(realization))?;
        u32::try_from(position).ok().map(RealizationId)
    }

    /// Whether an id is durable.
    #[must_use]
    pub fn contains(&self, id: RealizationId) -> bool {
        (id.0 as usize) < self.durable.load(Ordering::Acquire)
    }

    /// Makes these durable with one sync, at the ids that they have. New ids come in order, without gaps; those that are
    /// durable are skipped.
    ///
    /// # Errors
    /// When they cannot be written. What came before is durable all the same; ask again.
    pub fn append(&self, wanted: &[(RealizationId, Realization)]) -> Result<(), RecordError> {
        let mut entries = self.entries.lock();
        for (id, realization) in wanted {
            let position = id.0 as usize;
            assert!(position <= entries.len(), "realizations are interned in order");
            if position == entries.len() {
                entries.push(Some(*realization));
            }
        }
        let durable = self.durable.load(Ordering::Acquire);
        if entries.len() == durable {
            return Ok(());
        }
        let records: Vec<u8> = entries[durable..]
            .iter()
            .zip(durable..)
            .flat_map(|(realization, position)| {
                let realization = realization.as_ref().expect("only what was read can be damaged");
                encode(realization, position, &self.incarnation)
            })
            .collect();
        let written = self.disk.write_at(&records, place(durable));
        written
            .and_then(|()| self.disk.sync())
            .map_err(|error| RecordError::Io(Arc::new(error)))?;
        self.durable.store(entries.len(), Ordering::Release);
        Ok(())
    }
}

fn place(position: usize) -> u64 {
    (HEADER_BYTES + position * RECORD_BYTES) as u64
}

fn header_of(incarnation: &Incarnation) -> Record {
    let mut record = [0; RECORD_BYTES];
    record[..8].copy_from_slice(&MAGIC);
    record[8..12].copy_from_slice(&VERSION.to_le_bytes());
    record[16..32].copy_from_slice(incarnation);
    close(&mut record, incarnation);
    record
}

fn encode(realization: &Realization, position: usize, incarnation: &Incarnation) -> Record {
    let mut record = [0; RECORD_BYTES];
    let position = u32::try_from(position).expect("fewer than 2^32 realizations");
    record[..4].copy_from_slice(&position.to_le_bytes());
    record[8..40].copy_from_slice(&realization.0);
    close(&mut record, incarnation);
    record
}

fn decode(record: &Record, position: usize, incarnation: &Incarnation) -> Option<Realization> {
    let realization = Realization(bytes_at(record, 8));
    (*record == encode(&realization, position, incarnation)).then_some(realization)
}

fn close(record: &mut Record, incarnation: &Incarnation) {
    let mut bound = incarnation.to_vec();
    bound.extend_from_slice(&record[..RECORD_BYTES - 4]);
    record[RECORD_BYTES - 4..].copy_from_slice(&crc32c(&bound).to_le_bytes());
}

fn bytes_at<const N: usize>(record: &Record, at: usize) -> [u8; N] {
    record[at..at + N].try_into().expect("inside a record")
}

/// A realization that no client can name, for a position whose own is damaged.
#[must_use]
pub fn placeholder(position: usize) -> Realization {
    Realization::digest(&[("a damaged record of the list of realizations", &position.to_string())])
}

#[cfg(test)]
mod tests;
