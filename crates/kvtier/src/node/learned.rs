//! What the eviction policy learned, kept in the state directory across restarts.
//!
//! Who starts with nothing asks its peers once what they learned. A help and no more: what cannot be read or written costs hits, never a start. The file says how often what kind of prompt was used
//! again, and nothing of any block, key or client.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use kvtier_core::{LearnedTables, TierManager};

use super::driver::Driver;
use super::{StartError, StartProgress, spawn};
use crate::keys::{KeyError, disk};

/// In the state directory.
const FILE: &str = "reuse.tables";

/// A kill loses what was learned in this time at most.
const INTERVAL: Duration = Duration::from_secs(60);

/// Who has learned nothing yet asks peers what they did, once in this time,
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// for so long at most, and until it has seen so many returns itself.
const ASK_FOR: Duration = Duration::from_secs(600);

const KNOWS_RETURNS: f64 = 100.0;

/// No image is longer, bytes.
const IMAGE_BYTES_MAX: u64 = 1 << 20;

/// Writes what was learned every minute, and at the end.
pub(super) struct Keeper {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Gives the policy what earlier runs learned, and keeps what this one learns. Nothing where the policy learns nothing: a file that is there
    /// stays for the day when it does.
    pub(super) fn start(
        driver: &Arc<Driver>,
        state_directory: &Path,
        observer: &dyn Fn(StartProgress),
    ) -> Result<Option<Keeper>, StartError> {
        if driver.look(TierManager::learned).is_none() {
            return Ok(None);
        }
        let path = state_directory.join(FILE);
        let mut knows = false;
        match read(&path) {
            Ok(None) => {}
            Ok(Some(tables)) => {
                driver.with(|decider, _| decider.manager.learn(&tables));
                knows = !tables.is_empty();
                observer(StartProgress::Note(
                    "what earlier runs learned of reuse is known again".into(),
                ));
            }
            Err(reason) => {
                let words = format!("{}: {reason}: what is used again is learned anew", path.display());
                observer(StartProgress::Warning(words));
            }
        }
        let (stop, stopped) = bounded(0);
        let driver = Arc::clone(driver);
        let thread = spawn("kvtier-learned", move || {
            let asks_until = (!knows).then(|| Instant::now() + ASK_FOR);
            keep(&driver, &path, asks_until, &stopped);
        })?;
        Ok(Some(Keeper {
            stop: Some(stop),
            thread: Some(thread),
        }))
    }

    /// Writes once more; returns when that is durable, or has failed.
    pub(super) fn stop(mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has already said so.
            let _ = thread.join();
        }
    }
}

fn keep(driver: &Driver, path: &Path, mut asks_until: Option<Instant>, stopped: &Receiver<()>) {
    let mut written = Vec::new();
    let mut failing = false;
    let mut asked = HashMap::new();
    let mut due = Instant::now() + INTERVAL;
    loop {
        let now = Instant::now();
        // What peers learned from this node would count twice.
        let knows = || {
            let learned = driver.look(TierManager::learned);
            learned.is_some_and(|tables| tables.returns() > KNOWS_RETURNS)
        };
        asks_until = asks_until.filter(|until| now < *until && !knows());
        let wait = due.saturating_duration_since(now);
        let wait = if asks_until.is_some() {
            wait.min(ASK_INTERVAL)
        } else {
            wait
        };
        let ended = !matches!(stopped.recv_timeout(wait), Err(RecvTimeoutError::Timeout));
        if asks_until.is_some()
            && !ended
            && let Some((peer, tables)) = driver.peers().and_then(|peers| peers.learned_elsewhere(&mut asked))
        {
            driver.with(|decider, _| decider.manager.learn(&tables));
            tracing::info!(peer, "what a peer learned of reuse is known here now");
            asks_until = None;
            due = Instant::now();
        }
        if !ended && Instant::now() < due {
            continue;
        }
        due = Instant::now() + INTERVAL;
        let tables = driver.look(TierManager::learned).filter(|tables| !tables.is_empty());
        let image = tables.map(|tables| tables.encode()).unwrap_or_default();
        if image != written {
            match write(path, &image) {
                Ok(()) => {
                    written = image;
                    failing = false;
                }
                // Said once: it will not be better in a minute.
                Err(error) if !failing => {
                    failing = true;
                    tracing::warn!(%error, "what was learned of reuse is not kept: after a restart it is learned anew");
                }
                Err(_) => {}
            }
        }
        if ended {
            return;
        }
    }
}

/// The tables in the file; nothing where there is none, and why where it holds none.
fn read(path: &Path) -> Result<Option<LearnedTables>, String> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let mut image = Vec::new();
    file.take(IMAGE_BYTES_MAX + 1)
        .read_to_end(&mut image)
        .map_err(|error| error.to_string())?;
    LearnedTables::decode(&image)
        .map(Some)
        .map_err(|error| error.to_string())
}

/// Replaces the file at once: whoever reads it sees the older tables or these, whole.
fn write(path: &Path, image: &[u8]) -> Result<(), KeyError> {
    let aside: PathBuf = path.with_extension("next");
    disk::remove(&aside)?;
    disk::write_whole(&aside, image)?;
    disk::rename(&aside, path)
}

#[cfg(test)]
mod tests {
    use kvtier_core::{BlockId, EvictionPolicy, ReuseHazard, Time, Use};

    use super::{LearnedTables, read, write};

    /// Prompts of one block, each used again ten seconds later.
    fn learned() -> LearnedTables {
        let mut policy = ReuseHazard::new(1 << 10);
        for number in 0..200_u32 {
            let usage = Use {
                parent: None,
                tokens: 512,
                bytes: 0,
                namespace: kvtier_core::NamespaceId(0),
                fingerprint: u64::from(number) + 1,
            };
            let at = u64::from(number) * 20_000_000_000;
            policy.appeared(BlockId(number), usage, Time(at));
            policy.used(BlockId(number), usage, Time(at + 10_000_000_000));
        }
        policy.learned().expect("it learns")
    }

    #[test]
    fn what_was_written_is_read_and_written_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("reuse.tables");
        assert!(read(&path).unwrap().is_none(), "no file, no tables");
        let tables = learned();
        assert!(!tables.is_empty());
        write(&path, &LearnedTables::default().encode()).unwrap();
        write(&path, &tables.encode()).unwrap();
        assert_eq!(read(&path).unwrap().unwrap().encode(), tables.encode());
        assert_eq!(
            std::fs::read_dir(directory.path()).unwrap().count(),
            1,
            "nothing is left aside"
        );
    }

    #[test]
    fn a_write_that_was_cut_short_leaves_the_older_tables_and_the_next_one_succeeds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("reuse.tables");
        let tables = learned();
        write(&path, &tables.encode()).unwrap();
        std::fs::write(path.with_extension("next"), b"kvtre").unwrap();
        assert_eq!(read(&path).unwrap().unwrap().encode(), tables.encode());
        write(&path, &LearnedTables::default().encode()).unwrap();
        assert!(read(&path).unwrap().unwrap().is_empty());
    }

    #[test]
    fn a_damaged_file_is_told_apart_from_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("reuse.tables");
        let image = learned().encode();
        let mut flipped = image.clone();
        flipped[40] ^= 1;
        for damaged in [&image[..image.len() - 1], &flipped, b"", &vec![0; 3 << 20]] {
            std::fs::write(&path, damaged).unwrap();
            assert!(read(&path).is_err());
        }
    }
}
