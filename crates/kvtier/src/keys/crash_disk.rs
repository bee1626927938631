//! A disk in memory that stops after so many writes and syncs, and what may be on it then.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::disk::Disk;

/// Two images of one file: what the running system sees, and what a power cut leaves.
#[derive(Clone, Default)]
pub(crate) struct CrashDisk(Arc<Mutex<Images>>);

#[derive(Default)]
struct Images {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// Since the last sync.
    pending: Vec<Change>,
    /// The one that was stopped.
    stopped: Option<Change>,
    /// Writes and syncs until it stops.
    budget: Option<usize>,
    syncs: usize,
    operations: usize,
}

#[derive(Clone)]
enum Change {
    /// At an offset.
    Write(usize, Vec<u8>),
    /// Down to a length.
    Cut(usize),
}

/// How much of a write that was never synced is there after a power cut.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Tear {
    Nothing,
    Everything,
    First(usize),
    Last(usize),
}

impl CrashDisk {
    pub(crate) fn of(image: Vec<u8>) -> CrashDisk {
        let disk = CrashDisk::default();
        {
            let mut images = disk.0.lock();
            images.live.clone_from(&image);
            images.durable = image;
        }
        disk
    }

    /// Stops after so many writes and syncs; `None`: goes on.
    pub(crate) fn stop_after(&self, operations: Option<usize>) {
        self.0.lock().budget = operations;
    }

    pub(crate) fn syncs(&self) -> usize {
        self.0.lock().syncs
    }

    pub(crate) fn operations(&self) -> usize {
        self.0.lock().operations
    }

    /// The file as it is.
    pub(crate) fn image(&self) -> Vec<u8> {
        self.0.lock().live.clone()
    }

    fn change_by(&self, change: Change) -> io::Result<()> {
        let mut images = self.0.lock();
        if !images.may_go_on() {
            images.stopped.get_or_insert(change);
            return Err(io::Error::other("stopped"));
        }
        put(&mut images.live, &change, Tear::Everything);
        images.pending.push(change);
        Ok(())
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut images = self.0.lock();
        change(&mut images.live);
        images.durable = images.live.clone();
    }

    /// What a killed process leaves: everything written, and a part of the write that was stopped.
    pub(crate) fn killed(&self, tear: Tear) -> Vec<u8> {
        let images = self.0.lock();
        let mut image = images.live.clone();
        if let Some(change) = &images.stopped {
            put(&mut image, change, tear);
        }
        image
    }

    /// What a power cut leaves: everything synced, and of the rest whatever `tear` says of each write.
    pub(crate) fn unpowered(&self, mut tear: impl FnMut() -> Tear) -> Vec<u8> {
        let images = self.0.lock();
        let mut image = images.durable.clone();
        for change in images.pending.iter().chain(&images.stopped) {
            put(&mut image, change, tear());
        }
        image
    }

    /// How many writes a power cut decides over.
    pub(crate) fn undecided(&self) -> usize {
        let images = self.0.lock();
        images.pending.len() + usize::from(images.stopped.is_some())
    }
}

fn put(image: &mut Vec<u8>, change: &Change, tear: Tear) {
    let (offset, bytes) = match (change, tear) {
        (_, Tear::Nothing) => return,
        // The length of a file is changed whole or not at all.
        (Change::Cut(length), _) => {
            image.truncate(*length);
            return;
        }
        (Change::Write(offset, bytes), _) => (offset, bytes),
    };
    let range = match tear {
        Tear::Nothing | Tear::Everything => 0..bytes.len(),
        Tear::First(count) => 0..count.min(bytes.len()),
        Tear::Last(count) => bytes.len() - count.min(bytes.len())..bytes.len(),
    };
    let end = offset + range.end;
    if image.len() < end {
        image.resize(end, 0);
    }
    image[offset + range.start..end].copy_from_slice(&bytes[range]);
}

impl Images {
    fn may_go_on(&mut self) -> bool {
        self.operations += 1;
        match &mut self.budget {
            None => true,
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
        }
    }
}

impl Disk for CrashDisk {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.lock().live.len() as u64)
    }

    fn read_at(&self, target: &mut [u8], offset: u64) -> io::Result<()> {
        let images = self.0.lock();
        let start = usize::try_from(offset).unwrap().min(images.live.len());
        let there = &images.live[start..images.live.len().min(start + target.len())];
        target[..there.len()].copy_from_slice(there);
        target[there.len()..].fill(0);
        Ok(())
    }

    fn write_at(&self, source: &[u8], offset: u64) -> io::Result<()> {
        self.change_by(Change::Write(usize::try_from(offset).unwrap(), source.to_vec()))
    }

    fn cut(&self, bytes: u64) -> io::Result<()> {
        self.change_by(Change::Cut(usize::try_from(bytes).unwrap()))
    }

    fn sync(&self) -> io::Result<()> {
        let mut images = self.0.lock();
        if !images.may_go_on() {
            return Err(io::Error::other("stopped"));
        }
        images.syncs += 1;
        images.pending.clear();
        images.durable = images.live.clone();
        Ok(())
    }
}
