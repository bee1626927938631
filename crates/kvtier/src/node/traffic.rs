//! Records what clients ask as a trace that `kvctl simulate` and `kvctl replay-gate` read. Only where the settings name a file.
//!
//! A line says when a prompt came, how long it was and which blocks it had. A block's id is a keyed hash of its name, and the key is never
//! written: whoever has the file learns which prompts begin alike, and neither a name, a content nor a hash that an engine uses.
//!
//! Sessions hand over what they see and never wait: what does not fit the queue is not recorded, and that is said at the end.

mod episodes;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use aws_lc_rs::hmac;
use crossbeam_channel::{Receiver, Sender, bounded, select, tick};
use kvtier_core::{BlockHash, NamespaceId, RealizationId};
use serde::Serialize;

use self::episodes::{Episodes, Prompt};
pub(crate) use self::episodes::{Kind, Sight};
use super::{StartError, StartProgress, spawn};

/// What waits to be recorded at most: with 4,096 keys each, 80 MiB.
const QUEUE: usize = 1024;
/// What is recorded is on its way to the file within this time.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// No more is written to one file, bytes: what reads traces reads no longer ones.
const FILE_BYTES_MAX: u64 = 4 << 30;
/// Names that are tried where there is a file already.
const NAMES_MAX: u32 = 1_000_000;

/// Where sessions leave what they see.
pub(crate) struct Traffic {
    sights: Sender<Sight>,
    dropped: AtomicU64,
    /// Nothing more is written.
    ended: AtomicBool,
}

impl Traffic {
    /// Whether somebody looks.
    pub(crate) fn is_recorded(&self) -> bool {
        !self.ended.load(Ordering::Relaxed)
    }

    pub(crate) fn see(&self, sight: Sight) {
        if self.sights.try_send(sight).is_err() && self.dropped.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!("requests come faster than they are recorded: the recording has gaps");
        }
    }
}

/// The thread that writes.
pub(super) struct TrafficRecorder {
    traffic: Arc<Traffic>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What a recording came to.
#[derive(Debug, Default)]
struct Written {
    requests: u64,
    /// Left out: how many tokens their blocks have was never said.
    without_tokens: u64,
    /// Left out: blocks of another size than the first one's.
    other_blocks: u64,
}

impl TrafficRecorder {
    /// Begins a recording in a new file, readable by this user alone: `path`, or where there is one already, `path` with the first free
    /// number behind it, as each start begins anew.
    pub(super) fn start(path: &Path, observer: &dyn Fn(StartProgress)) -> Result<TrafficRecorder, StartError> {
        let (file, path) = create(path).map_err(|source| StartError::Trace {
            path: path.to_owned(),
            source,
        })?;
        observer(StartProgress::Note(format!(
            "requests are recorded in {}: times, lengths and keyed hashes, no contents",
            path.display()
        )));
        let mut key = [0; 32];
        aws_lc_rs::rand::fill(&mut key).map_err(|_| StartError::Trace {
            path: path.clone(),
            source: io::Error::other("the system has no random bytes"),
        })?;
        let (sights, seen) = bounded(QUEUE);
        let (stop, stopped) = bounded(0);
        let traffic = Arc::new(Traffic {
            sights,
            dropped: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        let mut recording = Recording {
            episodes: Episodes::default(),
            key: hmac::Key::new(hmac::HMAC_SHA256, &key),
            file: BufWriter::new(file),
            path,
            bytes: 0,
            block_tokens: None,
            traffic: Arc::clone(&traffic),
            written: Written::default(),
        };
        let thread = spawn("kvtier-traffic", move || {
            recording.run(&seen, &stopped);
            let Written {
                requests,
                without_tokens,
                other_blocks,
            } = recording.written;
            let dropped = recording.traffic.dropped.load(Ordering::Relaxed);
            tracing::info!(
                requests,
                without_tokens,
                other_blocks,
                dropped,
                "the recording of requests has ended"
            );
        })?;
        Ok(TrafficRecorder {
            traffic,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    pub(super) fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// Writes what is left.
    pub(super) fn stop(mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has already said so.
            let _ = thread.join();
        }
    }
}

fn create(path: &Path) -> io::Result<(File, PathBuf)> {
    let open = |path: &Path| File::options().write(true).create_new(true).mode(0o600).open(path);
    let mut tried = path.to_owned();
    for number in 2..NAMES_MAX {
        match open(&tried) {
            Ok(file) => return Ok((file, tried)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let mut name = path.as_os_str().to_owned();
                name.push(format!(".{number}"));
                tried = PathBuf::from(name);
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other(format!("there are {NAMES_MAX} such files already")))
}

/// A line, in Mooncake's schema, with the tokens of a block beside it.
#[derive(Serialize)]
struct Line<'a> {
    timestamp: u64,
    input_length: u64,
    output_length: u64,
    hash_ids: &'a [u64],
    block_tokens: u32,
}

struct Recording {
    episodes: Episodes,
    key: hmac::Key,
    file: BufWriter<File>,
    path: PathBuf,
    bytes: u64,
    /// Of the first line, and so of all.
    block_tokens: Option<u32>,
    traffic: Arc<Traffic>,
    written: Written,
}

impl Recording {
    fn run(&mut self, seen: &Receiver<Sight>, stopped: &Receiver<()>) {
        let ticks = tick(FLUSH_EVERY);
        loop {
            select! {
                recv(seen) -> sight => {
                    let Ok(sight) = sight else { break };
                    self.episodes.see(sight);
                    self.write();
                }
                recv(stopped) -> _ => break,
                recv(ticks) -> _ => {
                    self.episodes.let_time_pass(FLUSH_EVERY);
                    self.write();
                    self.flush();
                }
            }
        }
        while let Ok(sight) = seen.try_recv() {
            self.episodes.see(sight);
        }
        self.episodes.end();
        self.write();
        self.flush();
    }

    fn write(&mut self) {
        while let Some(prompt) = self.episodes.next_finished() {
            if !self.traffic.is_recorded() {
                continue;
            }
            if prompt.block_tokens == 0 {
                self.written.without_tokens += 1;
                continue;
            }
            if *self.block_tokens.get_or_insert(prompt.block_tokens) != prompt.block_tokens {
                self.written.other_blocks += 1;
                continue;
            }
            let result = self.write_one(&prompt);
            self.note(result);
        }
    }

    fn write_one(&mut self, prompt: &Prompt) -> io::Result<()> {
        let ids: Vec<u64> = prompt.hashes.iter().map(|hash| self.id(prompt.scope, *hash)).collect();
        let line = Line {
            timestamp: prompt.at_ms,
            input_length: prompt.input_tokens,
            output_length: prompt.output_tokens,
            hash_ids: &ids,
            block_tokens: prompt.block_tokens,
        };
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        self.bytes += text.len() as u64;
        if self.bytes > FILE_BYTES_MAX {
            return Err(io::Error::other(format!("it has {FILE_BYTES_MAX} bytes")));
        }
        self.file.write_all(&text)?;
        self.written.requests += 1;
        Ok(())
    }

    /// 53 bits, which every reader of JSON keeps.
    fn id(&self, (namespace, realization): (NamespaceId, RealizationId), hash: BlockHash) -> u64 {
        let mut named = [0; 24];
        named[..4].copy_from_slice(&namespace.0.to_le_bytes());
        named[4..8].copy_from_slice(&realization.0.to_le_bytes());
        named[8..].copy_from_slice(&hash.0);
        let tag = hmac::sign(&self.key, &named);
        let front = tag.as_ref().first_chunk().expect("a tag has 32 bytes");
        u64::from_le_bytes(*front) >> 11
    }

    fn flush(&mut self) {
        if self.traffic.is_recorded() {
            let result = self.file.flush();
            self.note(result);
        }
    }

    /// What cannot be written ends the recording and nothing else.
    fn note(&mut self, result: io::Result<()>) {
        if let Err(error) = result {
            self.traffic.ended.store(true, Ordering::Relaxed);
            tracing::warn!(%error, path = %self.path.display(), "requests are recorded no more");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_start_has_a_file_of_its_own_that_others_cannot_read() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace.jsonl");
        let (_, first) = create(&path).unwrap();
        let (_, second) = create(&path).unwrap();
        let (_, third) = create(&path).unwrap();
        assert_eq!(first, path);
        assert_eq!(second, directory.path().join("trace.jsonl.2"));
        assert_eq!(third, directory.path().join("trace.jsonl.3"));
        let mode = std::fs::metadata(&first).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(create(&directory.path().join("no/such")).is_err());
    }
}
