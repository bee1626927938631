//! The audit log: one line for each guarded call, each line chained to the one before it.
//!
//! `audit.jsonl` in the state directory, mode 0600, only ever appended to. A call that changes something has two lines: its
//! `intent`, synced before anything changes, and its `outcome`. Past its size the file becomes
//! `audit-SEQUENCE.jsonl`, named by its first line, and the next one goes on with the chain; nothing is ever deleted.
//! What the chain cannot show by itself: that lines at its end were cut off. Keep the hash of a line elsewhere to see that.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use aws_lc_rs::digest::{SHA256, digest};
use serde::Serialize;

use self::chain::{Chain, Link, NOTHING};
use super::tokens::hex;
use crate::{rfc3339, state_file};

pub mod chain;

/// The file that is written, in the state directory.
pub const AUDIT_FILE: &str = "audit.jsonl";

/// Bytes of a text that came from outside; what is longer is cut, so that a line stays below
/// [`chain::LINE_BYTES_MAX`] whatever is sent.
const TEXT_BYTES_MAX: usize = 512;

/// Which of the two lines of a call this is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The call will change something now.
    Intent,
    /// The call was answered.
    #[default]
    Outcome,
    /// The log speaks of itself.
    Log,
}

/// What a line says, without the chain's own members.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Which of the lines of a call.
    pub stage: Stage,
    /// Id of the token, never the token; `None`: no good one was shown.
    pub token: Option<String>,
    /// Of the token.
    pub role: Option<&'static str>,
    /// HTTP method.
    pub method: String,
    /// Path, as it was sent.
    pub path: String,
    /// Namespace that the call names.
    pub namespace: Option<String>,
    /// Of a purge.
    pub request_id: Option<String>,
    /// HTTP status of the answer; `None` in an intent.
    pub status: Option<u16>,
    /// Calls of this token (or without a good one) that the rate limit refused since its last line.
    #[serde(skip_serializing_if = "is_zero")]
    pub refused_before: u64,
    /// What the log says of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[derive(Serialize)]
struct Line<'a> {
    sequence: u64,
    time: String,
    #[serde(flatten)]
    entry: &'a Entry,
    previous: &'a str,
}

/// The log of a running daemon.
#[derive(Debug)]
pub struct AuditLog {
    directory: PathBuf,
    file_bytes_max: u64,
    head: Mutex<Head>,
}

#[derive(Debug)]
struct Head {
    file: File,
    bytes: u64,
    /// Sequence of the file's first line.
    first: u64,
    next: u64,
    previous: String,
    /// A line may lie half written behind `bytes`.
    torn: bool,
}

impl AuditLog {
    /// Verifies the log of a state directory and goes on with it. A broken one is set aside, and a new chain begins that says
    /// so in its first line. The second value is what to warn of.
    ///
    /// # Errors
    /// When the directory or a file in it cannot be used.
    pub fn open(directory: &Path, file_bytes_max: u64) -> io::Result<(AuditLog, Vec<String>)> {
        let path = directory.join(AUDIT_FILE);
        let mut warnings = Vec::new();
        let mut note = None;
        let before = last_rotated(directory)?;
        let (chain, previous) = match read_file(&path)? {
            None => (Chain::default(), before.unwrap_or_else(beginning)),
            Some(Ok(chain)) => match (&chain.first, before) {
                // Of a file that begins a chain anew, its own first line says why.
                (Some((_, follows)), Some(before)) if *follows != before.sha256 && follows != NOTHING => {
                    let what = format!(
                        "line 1 does not follow line {} of the file before it, {}",
                        before.sequence, before.sha256
                    );
                    let set_aside = set_aside(directory, chain.first.as_ref().map_or(0, |first| first.0))?;
                    note = Some(format!("a new chain, as {set_aside} is broken: {what}"));
                    let next = chain.last.map_or(before, |last| Link {
                        sha256: NOTHING.into(),
                        ..last
                    });
                    (
                        Chain::default(),
                        Link {
                            sha256: NOTHING.into(),
                            ..next
                        },
                    )
                }
                (_, before) => {
                    let last = chain.last.clone().or(before).unwrap_or_else(beginning);
                    (chain, last)
                }
            },
            Some(Err(broken)) => {
                let last = broken.before.last.clone().or(before).unwrap_or_else(beginning);
                let set_aside = set_aside(directory, broken.before.first.as_ref().map_or(0, |first| first.0))?;
                note = Some(format!(
                    "a new chain, as {set_aside} is broken at line {}: {}; the last good line is {} with {}",
                    broken.line, broken.what, last.sequence, last.sha256
                ));
                (
                    Chain::default(),
                    Link {
                        sha256: NOTHING.into(),
                        ..last
                    },
                )
            }
        };
        if let Some(note) = &note {
            warnings.push(format!(
                "AUDIT LOG {}: {note}: somebody altered it, or the disk did; find out who could write there",
                path.display()
            ));
        }
        if chain.torn_bytes > 0 {
            let words = format!(
                "an unfinished line of {} bytes was cut off the end: its call was never answered",
                chain.torn_bytes
            );
            warnings.push(format!("audit log {}: {words}", path.display()));
            note = Some(words);
        }
        let mut head = Head {
            file: open_file(&path)?,
            bytes: chain.bytes,
            first: chain.first.as_ref().map_or(previous.sequence + 1, |first| first.0),
            next: previous.sequence + 1,
            previous: previous.sha256,
            torn: chain.torn_bytes > 0,
        };
        if let Some(note) = note {
            let entry = Entry {
                stage: Stage::Log,
                note: Some(note),
                ..Entry::default()
            };
            head.append(&entry, true)?;
        }
        state_file::sync_directory(directory)?;
        let log = AuditLog {
            directory: directory.to_path_buf(),
            file_bytes_max,
            head: Mutex::new(head),
        };
        Ok((log, warnings))
    }

    /// Writes a line; with `sync`, returns once it is on the disk. Its sequence.
    ///
    /// # Errors
    /// The line is not there. Later ones may be.
    pub fn append(&self, entry: &Entry, sync: bool) -> io::Result<u64> {
        let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        head.mend()?;
        if head.bytes >= self.file_bytes_max {
            self.rotate(&mut head)?;
        }
        head.append(entry, sync)
    }

    fn rotate(&self, head: &mut Head) -> io::Result<()> {
        head.file.sync_data()?;
        let path = self.directory.join(AUDIT_FILE);
        let kept = self.directory.join(format!("audit-{:020}.jsonl", head.first));
        // Not there when an earlier attempt got as far as this and no further.
        if path.try_exists()? {
            if kept.try_exists()? {
                return Err(io::Error::other(format!("{} is in the way", kept.display())));
            }
            fs::rename(&path, &kept)?;
        }
        head.file = open_file(&path)?;
        head.bytes = 0;
        head.first = head.next;
        state_file::sync_directory(&self.directory)
    }
}

#[cfg(test)]
impl AuditLog {
    /// Writes lines until the next one goes into a new file.
    pub(super) fn fill(&self) {
        while self.head.lock().unwrap_or_else(PoisonError::into_inner).bytes < self.file_bytes_max {
            let _ = self.append(&Entry::default(), false);
        }
    }
}

impl Head {
    /// Cuts off what a failed write may have left.
    fn mend(&mut self) -> io::Result<()> {
        if self.torn {
            self.file.set_len(self.bytes)?;
            self.torn = false;
        }
        Ok(())
    }

    fn append(&mut self, entry: &Entry, sync: bool) -> io::Result<u64> {
        self.mend()?;
        let line = Line {
            sequence: self.next,
            time: rfc3339::format(SystemTime::now()),
            entry: &cut(entry),
            previous: &self.previous,
        };
        let mut text = serde_json::to_string(&line)?;
        text.pop();
        let sha256 = hex(digest(&SHA256, text.as_bytes()).as_ref());
        text.push_str(&format!(",\"sha256\":\"{sha256}\"}}\n"));
        self.torn = true;
        self.file.write_all(text.as_bytes())?;
        if sync {
            self.file.sync_data()?;
        }
        self.torn = false;
        self.bytes += text.len() as u64;
        let sequence = self.next;
        self.next += 1;
        self.previous = sha256;
        Ok(sequence)
    }
}

fn beginning() -> Link {
    Link {
        sequence: 0,
        sha256: NOTHING.to_string(),
    }
}

fn cut(entry: &Entry) -> Entry {
    let short = |text: &String| {
        let mut end = text.len().min(TEXT_BYTES_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text[..end].to_string()
    };
    Entry {
        method: short(&entry.method),
        path: short(&entry.path),
        namespace: entry.namespace.as_ref().map(short),
        request_id: entry.request_id.as_ref().map(short),
        ..entry.clone()
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(state_file::no_follow())
        .open(path)?;
    state_file::check_private(&file)?;
    Ok(file)
}

fn read_file(path: &Path) -> io::Result<Option<Result<Chain, Box<chain::Break>>>> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(state_file::no_follow())
        .open(path);
    match file {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
        Ok(file) => chain::read(BufReader::new(file)).map(Some),
    }
}

/// The last line of the file that was rotated last, if it can be read.
fn last_rotated(directory: &Path) -> io::Result<Option<Link>> {
    let mut newest: Option<PathBuf> = None;
    for item in fs::read_dir(directory)? {
        let path = item?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let number = name.strip_prefix("audit-").and_then(|rest| rest.strip_suffix(".jsonl"));
        let numbered =
            number.is_some_and(|digits| digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit()));
        if numbered && newest.as_ref().is_none_or(|newest| *newest < path) {
            newest = Some(path);
        }
    }
    Ok(match newest.map(|path| read_file(&path)).transpose()?.flatten() {
        Some(Ok(chain)) => chain.last,
        Some(Err(broken)) => broken.before.last,
        None => None,
    })
}

/// Moves a broken log out of the way, under a name of its own.
fn set_aside(directory: &Path, first: u64) -> io::Result<String> {
    for attempt in 0..u32::MAX {
        let name = format!("audit-broken-{first:020}-{attempt}.jsonl");
        let target = directory.join(&name);
        if !target.try_exists()? {
            fs::rename(directory.join(AUDIT_FILE), target)?;
            return Ok(name);
        }
    }
    Err(io::Error::other("too many broken audit logs"))
}

#[cfg(test)]
mod tests;
