//! A file of entries that are durable one by one: what a purge intends, before it does it. Little-endian; what is reserved
//! is zero.
//!
//! ```text
//! 0        4096
//! | header | frame | frame | ... | zeros |
//! ```
//! Header: magic `"kvtier\x01J"` (8), version 1 (4), zeros. Frame, padded to a multiple of 8 bytes:
//! ```text
//! 0  4  bytes of the entry, not 0
//! 4  4  CRC32C of bytes 0..4 and the entry
//! 8  n  the entry, JSON
//! ```
//! The file is grown by zeros ahead of need, so that an append changes no metadata and one fdatasync makes it durable. The
//! first frame that is not whole ends the journal: it was being written when the process died, and nobody was told of it.
//! With a whole frame behind it, it had been acknowledged: that is damage, and the journal is refused. No text of an entry
//! passes for a frame: four of its bytes are a length beyond any.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::keys::KeyError;
use crate::keys::disk::{self, Disk};

const MAGIC: &[u8; 8] = b"kvtier\x01J";
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 4096;
const FRAME_BYTES: usize = 8;
/// Frames begin at multiples of it.
const ALIGNMENT: usize = 8;
/// What the file grows by.
const STEP_BYTES: u64 = 64 << 10;
/// Longest entry, bytes.
const ENTRY_BYTES_MAX: usize = 8 << 20;

/// See the module.
pub(crate) struct Journal {
    path: PathBuf,
    disk: Box<dyn Disk>,
    end: u64,
    capacity: u64,
}

impl Journal {
    /// Opens the journal and reads its entries, oldest first; makes it if it is not there.
    pub(crate) fn open<T: DeserializeOwned>(path: &Path) -> Result<(Journal, Vec<T>), KeyError> {
        clear_leftovers(path)?;
        let file = disk::open_private(path)?;
        Journal::load(Box::new(file), path)
    }

    fn load<T: DeserializeOwned>(disk: Box<dyn Disk>, path: &Path) -> Result<(Journal, Vec<T>), KeyError> {
        let capacity = disk.bytes().map_err(KeyError::io("look at", path))?;
        let mut bytes = vec![0; usize::try_from(capacity).unwrap_or(0)];
        disk.read_at(&mut bytes, 0).map_err(KeyError::io("read", path))?;
        let mut journal = Journal {
            path: path.to_owned(),
            disk,
            end: HEADER_BYTES,
            capacity,
        };
        // A header that is not whole is older than the first append.
        if bytes.len() < HEADER_BYTES as usize || bytes[..8].iter().all(|&byte| byte == 0) {
            journal.begin()?;
            return Ok((journal, Vec::new()));
        }
        if &bytes[..8] != MAGIC {
            return Err(KeyError::Unreadable {
                path: path.to_owned(),
                what: "journal of purges",
            });
        }
        let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if version != VERSION {
            return Err(KeyError::Newer {
                path: path.to_owned(),
                version,
                known: VERSION,
            });
        }
        let mut entries = Vec::new();
        let mut rest = &bytes[HEADER_BYTES as usize..];
        while let Some((entry, frame)) = next_frame(rest) {
            let entry = serde_json::from_slice(entry).map_err(|error| KeyError::ChainAltered {
                path: path.to_owned(),
                problem: format!("an entry is not what this program writes ({error})"),
            })?;
            entries.push(entry);
            journal.end += frame as u64;
            rest = &rest[frame..];
        }
        let mut behind = (ALIGNMENT..rest.len()).step_by(ALIGNMENT);
        if behind.any(|at| next_frame(&rest[at..]).is_some()) {
            return Err(KeyError::ChainAltered {
                path: path.to_owned(),
                problem: format!("the entry at byte {} is damaged, and whole ones follow it", journal.end),
            });
        }
        Ok((journal, entries))
    }

    fn begin(&mut self) -> Result<(), KeyError> {
        let mut first = vec![0; usize::try_from(HEADER_BYTES + STEP_BYTES).unwrap_or(0)];
        first[..8].copy_from_slice(MAGIC);
        first[8..12].copy_from_slice(&VERSION.to_le_bytes());
        self.disk
            .write_at(&first, 0)
            .and_then(|()| self.disk.sync())
            .map_err(KeyError::io("write", &self.path))?;
        self.capacity = first.len() as u64;
        self.end = HEADER_BYTES;
        Ok(())
    }

    /// Returns once the entry is durable.
    pub(crate) fn append(&mut self, entry: &impl Serialize) -> Result<(), KeyError> {
        let frame = frame(entry).map_err(KeyError::io("write", &self.path))?;
        let end = self.end + frame.len() as u64;
        // Behind the frame there are zeros, which end the journal.
        let mut written = frame;
        if end + FRAME_BYTES as u64 > self.capacity {
            let grown = (end + STEP_BYTES).next_multiple_of(STEP_BYTES);
            written.resize(usize::try_from(grown - self.end).unwrap_or(0), 0);
        }
        self.disk
            .write_at(&written, self.end)
            .and_then(|()| self.disk.sync())
            .map_err(KeyError::io("write", &self.path))?;
        self.capacity = self.capacity.max(self.end + written.len() as u64);
        self.end = end;
        Ok(())
    }

    /// Bytes of entries, those that later ones replaced included.
    pub(crate) fn bytes(&self) -> u64 {
        self.end - HEADER_BYTES
    }

    /// Puts a file of these entries in the place of the present one, durably, and overwrites what the present one held.
    pub(crate) fn compact<T: Serialize>(
        path: &Path,
        entries: impl IntoIterator<Item = T>,
    ) -> Result<Journal, KeyError> {
        clear_leftovers(path)?;
        let aside = path.with_extension("next");
        let file: File = disk::open_private(&aside)?;
        let mut journal = Journal {
            path: aside.clone(),
            disk: Box::new(file),
            end: HEADER_BYTES,
            capacity: 0,
        };
        journal.begin()?;
        for entry in entries {
            journal.append(&entry)?;
        }
        let old = path.with_extension("old");
        if path.exists() {
            // Under two names until the new one has its place: one of them is there at any moment.
            std::fs::hard_link(path, &old).map_err(KeyError::io("name", &old))?;
        }
        disk::rename(&aside, path)?;
        if old.exists() {
            disk::wipe(&old)?;
            disk::remove(&old)?;
        }
        journal.path = path.to_owned();
        Ok(journal)
    }
}

/// Overwrites what a compaction that was cut short left behind.
fn clear_leftovers(path: &Path) -> Result<(), KeyError> {
    for leftover in [path.with_extension("old"), path.with_extension("next")] {
        let Ok(metadata) = leftover.symlink_metadata() else {
            continue;
        };
        let present = path.symlink_metadata().map_err(KeyError::io("look at", path))?;
        // Until the new one has its place both names are of one file.
        if (metadata.dev(), metadata.ino()) != (present.dev(), present.ino()) {
            disk::wipe(&leftover)?;
        }
        disk::remove(&leftover)?;
    }
    Ok(())
}

fn frame(entry: &impl Serialize) -> std::io::Result<Vec<u8>> {
    let json = serde_json::to_vec(entry)?;
    if json.is_empty() || json.len() > ENTRY_BYTES_MAX {
        return Err(std::io::Error::other("an entry is too long for the journal"));
    }
    let length = u32::try_from(json.len()).map_err(std::io::Error::other)?.to_le_bytes();
    let mut frame = Vec::with_capacity(FRAME_BYTES + json.len() + 8);
    frame.extend_from_slice(&length);
    frame.extend_from_slice(&checksum(length, &json).to_le_bytes());
    frame.extend_from_slice(&json);
    frame.resize(frame.len().next_multiple_of(ALIGNMENT), 0);
    Ok(frame)
}

fn checksum(length: [u8; 4], json: &[u8]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&length);
    digest.update(json);
    u32::try_from(digest.finalize()).unwrap_or(0)
}

/// The entry at the front of `bytes`, and what its frame takes.
fn next_frame(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    let count = u32::from_le_bytes(*length) as usize;
    if count == 0 || count > ENTRY_BYTES_MAX {
        return None;
    }
    let json = rest.get(..count)?;
    let whole = u32::from_le_bytes(*sum) == checksum(*length, json);
    whole.then(|| (json, (FRAME_BYTES + count).next_multiple_of(ALIGNMENT)))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn open(path: &Path) -> (Journal, Vec<String>) {
        Journal::open(path).expect("the journal opens")
    }

    #[test]
    fn what_was_appended_is_there_again_and_a_torn_entry_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("journal");
        let (mut journal, entries) = open(&path);
        assert!(entries.is_empty());
        let written: Vec<String> = (0..300).map(|number| "x".repeat(number * 7)).collect();
        for entry in &written {
            journal.append(entry).expect("appended");
        }
        let end = journal.end;
        drop(journal);
        assert_eq!(open(&path).1, written);
        let whole = fs::read(&path).expect("the file");
        // Whatever of the next entry a crash left, those before it are there and it is not.
        let next = frame(&"the next entry, which is being written").expect("a frame");
        for torn in 0..next.len() {
            let mut image = whole.clone();
            image[end as usize..end as usize + torn].copy_from_slice(&next[..torn]);
            fs::write(&path, &image).expect("written");
            let (mut journal, entries) = open(&path);
            let expected = written.len() + usize::from(next[torn..].iter().all(|&byte| byte == 0));
            assert_eq!(entries.len(), expected, "{torn} bytes");
            journal.append(&"after").expect("appended");
            drop(journal);
            assert_eq!(open(&path).1.last().map(String::as_str), Some("after"), "{torn} bytes");
        }
    }

    #[test]
    fn an_entry_that_was_acknowledged_and_is_damaged_is_reported_and_nothing_is_changed() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("journal");
        let (mut journal, _) = open(&path);
        let mut starts = Vec::new();
        for entry in ["the first entry", "the second one", "the third"] {
            starts.push(usize::try_from(journal.end).expect("small"));
            journal.append(&entry).expect("appended");
        }
        drop(journal);
        let whole = fs::read(&path).expect("the file");
        for position in starts[0]..starts[2] {
            let mut image = whole.clone();
            image[position] ^= 4;
            fs::write(&path, &image).expect("written");
            match Journal::open::<String>(&path) {
                Err(KeyError::ChainAltered { problem, .. }) => assert!(problem.contains("damaged"), "{problem}"),
                Err(error) => panic!("byte {position}: {error}"),
                // What fills up a frame means nothing.
                Ok((_, entries)) => assert!(entries.len() == 3 && whole[position] == 0, "byte {position}"),
            }
            assert_eq!(fs::read(&path).expect("the file"), image, "byte {position}");
        }
        // A hole where a sector was lost.
        let mut image = whole;
        image[starts[1]..starts[2]].fill(0);
        fs::write(&path, &image).expect("written");
        assert!(matches!(
            Journal::open::<String>(&path),
            Err(KeyError::ChainAltered { .. })
        ));
    }

    #[test]
    fn what_a_failed_append_left_is_neither_read_nor_taken_for_damage() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("journal");
        let (mut journal, _) = open(&path);
        journal.append(&"first").expect("appended");
        let end = journal.end;
        // Written whole, never acknowledged, and then overwritten by a shorter one.
        journal.append(&"\u{1}x\u{0}".repeat(500)).expect("appended");
        journal.end = end;
        journal.append(&"second").expect("appended");
        drop(journal);
        assert_eq!(open(&path).1, ["first", "second"]);
        let (mut journal, _) = open(&path);
        journal.append(&"third").expect("appended");
        drop(journal);
        assert_eq!(open(&path).1, ["first", "second", "third"]);
    }

    #[test]
    fn compaction_keeps_what_it_is_given_and_overwrites_the_rest() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("journal");
        let (mut journal, _) = open(&path);
        for entry in ["secret", "kept"] {
            journal.append(&entry).expect("appended");
        }
        let held = fs::File::open(&path).expect("the old file");
        let mut journal = Journal::compact(&path, ["kept"]).expect("compacted");
        journal.append(&"later").expect("appended");
        assert_eq!(open(&path).1, ["kept", "later"]);
        let mut old = vec![1; 8192];
        let read = FileExt::read_at(&held, &mut old, 0).expect("read");
        assert!(
            old[..read].iter().all(|&byte| byte == 0),
            "whoever still holds the old file"
        );
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
    }

    #[test]
    fn a_compaction_that_was_cut_short_leaves_the_journal_whole_and_nothing_beside_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("journal");
        let (mut journal, _) = open(&path);
        journal.append(&"kept").expect("appended");
        // Before the new one got its place: the old one has two names.
        fs::hard_link(&path, path.with_extension("old")).expect("linked");
        fs::write(path.with_extension("next"), "half of a secret").expect("written");
        let half = fs::File::open(path.with_extension("next")).expect("the new file");
        assert_eq!(open(&path).1, ["kept"]);
        assert_eq!(half.metadata().expect("its length").len(), 0, "overwritten");
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
        // After that: the old one is a file of its own.
        fs::copy(&path, path.with_extension("old")).expect("copied");
        let old = fs::File::open(path.with_extension("old")).expect("the old file");
        assert_eq!(open(&path).1, ["kept"]);
        assert_eq!(old.metadata().expect("its length").len(), 0, "overwritten");
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
    }

    #[test]
    fn a_file_of_something_else_or_of_a_later_version_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("journal");
        drop(open(&path));
        let file = fs::OpenOptions::new().write(true).open(&path).expect("the file");
        file.write_all_at(&[9], 8).expect("written");
        assert!(matches!(
            Journal::open::<String>(&path),
            Err(KeyError::Newer { version: 9, .. })
        ));
        file.write_all_at(b"something", 0).expect("written");
        assert!(matches!(
            Journal::open::<String>(&path),
            Err(KeyError::Unreadable { .. })
        ));
    }
}
