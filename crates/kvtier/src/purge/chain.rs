use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use super::moment::rfc3339;
use super::receipt::{ReceiptBody, SignedLine, VERSION, canonical, digest_of, hex, named_digest, signed_bytes};
use super::signing::{KeySet, SigningKey};
use super::verify::{Link, Verifier};
use crate::keys::KeyError;
use crate::keys::disk::{self, Disk};

const CHAIN_FILE: &str = "chain.jsonl";
pub(super) const KEY_FILE: &str = "signing.key";
pub(super) const NEXT_KEY_FILE: &str = "signing.key.next";
const PUBLIC_FILE: &str = "keys.json";

/// The receipts of a node: a file of one signed line each, every line naming the digest of the one before.
pub struct ReceiptLog {
    directory: PathBuf,
    state: Mutex<State>,
}

struct State {
    file: Box<dyn Disk>,
    bytes: u64,
    key: SigningKey,
    keys: KeySet,
    head: Option<Link>,
    /// By the job's id.
    of_job: HashMap<String, Place>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    offset: u64,
    bytes: usize,
}

impl ReceiptLog {
    /// Opens the receipts in `directory`; makes it, and a signing key, at the first start. A line that a crash cut short is
    /// put aside and said to be. Every line's signature and link is checked.
    ///
    /// # Errors
    /// In words and with the remedy: a chain that was altered, or a key that is not there.
    pub fn open(directory: &Path, notes: &mut Vec<String>) -> Result<ReceiptLog, KeyError> {
        if !directory.is_dir() {
            std::fs::DirBuilder::new()
                .create(directory)
                .map_err(KeyError::io("make", directory))?;
            disk::sync_directory_of(directory)?;
        }
        let path = directory.join(CHAIN_FILE);
        let file: Box<dyn Disk> = Box::new(disk::open_private(&path)?);
        ReceiptLog::load(file, directory, notes)
    }

    fn load(file: Box<dyn Disk>, directory: &Path, notes: &mut Vec<String>) -> Result<ReceiptLog, KeyError> {
        let path = directory.join(CHAIN_FILE);
        let (keys_path, key_path) = (directory.join(PUBLIC_FILE), directory.join(KEY_FILE));
        finish_rotation(directory)?;
        let key = match SigningKey::read(&key_path)? {
            Some(key) => key,
            None if file.bytes().map_err(KeyError::io("look at", &path))? == 0 => {
                notes.push(format!("made a key that signs receipts: {}", key_path.display()));
                SigningKey::make(&key_path)?
            }
            // No other key takes over in silence.
            None => return Err(KeyError::NoKeyFile { path: key_path }),
        };
        let mut keys = read_keys(&keys_path)?;
        if keys.find(&key.jwk.kid).is_none() {
            keys.keys.push(key.jwk.clone());
            write_keys(&keys_path, &keys)?;
        }
        let scan = Scan::of(&*file, &path, &keys)?;
        if let Some(torn) = &scan.torn {
            let aside = directory.join(format!("torn-at-{}", scan.bytes));
            disk::remove(&aside)?;
            disk::write_whole(&aside, torn)?;
            file.cut(scan.bytes)
                .and_then(|()| file.sync())
                .map_err(KeyError::io("cut", &path))?;
            notes.push(format!(
                "{}: the last line was cut short by a crash; what there was of it lies in {}",
                path.display(),
                aside.display()
            ));
        }
        Ok(ReceiptLog {
            directory: directory.to_owned(),
            state: Mutex::new(State {
                file,
                bytes: scan.bytes,
                key,
                keys,
                head: scan.head,
                of_job: scan.of_job,
            }),
        })
    }

    /// Signs a receipt, links it to the one before, and returns once it is durable. A job has one receipt: asked again, this
    /// answers the one there is; [`ReceiptLog::reissue`] follows it with another.
    ///
    /// # Errors
    /// When it cannot be written; ask again.
    pub fn issue(&self, body: &ReceiptBody) -> Result<SignedLine, KeyError> {
        let mut state = self.state.lock();
        if let Some(place) = state.of_job.get(&body.purge).copied() {
            return self.line_at(&state, place);
        }
        let broken = |error: serde_json::Error| KeyError::io("write", &self.directory)(error.into());
        let Value::Object(fields) = serde_json::to_value(body).map_err(broken)? else {
            unreachable!("a receipt is an object");
        };
        let line = self.append(&mut state, "purge_receipt", "rcp_", fields)?;
        Ok(line)
    }

    /// Signs another receipt of a job, which names the one that it supersedes.
    ///
    /// # Errors
    /// When it cannot be written; ask again.
    pub fn reissue(&self, body: &ReceiptBody) -> Result<SignedLine, KeyError> {
        let mut state = self.state.lock();
        let broken = |error: serde_json::Error| KeyError::io("write", &self.directory)(error.into());
        let Value::Object(fields) = serde_json::to_value(body).map_err(broken)? else {
            unreachable!("a receipt is an object");
        };
        self.append(&mut state, "purge_receipt", "rcp_", fields)
    }

    fn append(
        &self,
        state: &mut State,
        object: &str,
        prefix: &str,
        mut fields: Map<String, Value>,
    ) -> Result<SignedLine, KeyError> {
        let path = self.directory.join(CHAIN_FILE);
        let broken = |error: serde_json::Error| KeyError::io("write", &path)(error.into());
        let mut number = [0; 16];
        getrandom::fill(&mut number).map_err(|error| KeyError::Randomness(std::io::Error::other(error.to_string())))?;
        let id = format!("{prefix}{}", hex(&number));
        let sequence = state.head.as_ref().map_or(1, |head| head.sequence + 1);
        let job = fields.get("purge").and_then(Value::as_str).map(str::to_owned);
        fields.insert("object".into(), json!(object));
        fields.insert("version".into(), json!(VERSION));
        fields.insert("id".into(), json!(id));
        fields.insert("sequence".into(), json!(sequence));
        let previous = state.head.as_ref().map(|head| head.digest.clone());
        fields.insert("previous_digest".into(), json!(previous));
        fields.insert("key_id".into(), json!(state.key.jwk.kid));
        let mut entry = Value::Object(fields);
        let bare = digest_of(&entry).map_err(broken)?;
        let digest = named_digest(&bare);
        entry["digest"] = json!(digest);
        entry["signature"] = json!(state.key.sign(&signed_bytes(&bare)));
        let text = canonical(&entry).map_err(broken)?;
        write_line(&*state.file, &text, state.bytes).map_err(KeyError::io("write", &path))?;
        let place = Place {
            offset: state.bytes,
            bytes: text.len(),
        };
        state.bytes += text.len() as u64 + 1;
        state.head = Some(Link {
            sequence,
            digest: digest.clone(),
        });
        if let Some(job) = job {
            state.of_job.insert(job, place);
        }
        Ok(SignedLine { text, id, digest })
    }

    fn line_at(&self, state: &State, place: Place) -> Result<SignedLine, KeyError> {
        let path = self.directory.join(CHAIN_FILE);
        let mut bytes = vec![0; place.bytes];
        state
            .file
            .read_at(&mut bytes, place.offset)
            .map_err(KeyError::io("read", &path))?;
        let altered = || KeyError::ChainAltered {
            path: path.clone(),
            problem: "a line was changed while the node ran".into(),
        };
        let text = String::from_utf8(bytes).map_err(|_| altered())?;
        let entry: Value = serde_json::from_str(&text).map_err(|_| altered())?;
        let field = |name: &str| entry[name].as_str().map(str::to_owned).ok_or_else(altered);
        let (id, digest) = (field("id")?, field("digest")?);
        Ok(SignedLine { text, id, digest })
    }

    /// The receipt of a job.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of_job(&self, job: &str) -> Result<Option<SignedLine>, KeyError> {
        let state = self.state.lock();
        let place = state.of_job.get(job).copied();
        place.map(|place| self.line_at(&state, place)).transpose()
    }

    /// Every public key that signed here, oldest first.
    #[must_use]
    pub fn keys(&self) -> KeySet {
        self.state.lock().keys.clone()
    }

    /// Draws a new signing key; the old one signs that it takes over, as an entry of the chain, and is destroyed.
    ///
    /// # Errors
    /// When something cannot be written. The next start finishes or forgets what was begun.
    pub fn rotate(&self, now: SystemTime) -> Result<(), KeyError> {
        let mut state = self.state.lock();
        let (path, next_path) = (self.directory.join(KEY_FILE), self.directory.join(NEXT_KEY_FILE));
        disk::remove(&next_path)?;
        let next = SigningKey::make(&next_path)?;
        let mut keys = state.keys.clone();
        keys.keys.push(next.jwk.clone());
        write_keys(&self.directory.join(PUBLIC_FILE), &keys)?;
        state.keys = keys;
        let fields = json!({"rotated_at": rfc3339(now), "new_key": next.jwk});
        let Value::Object(fields) = fields else { return Ok(()) };
        self.append(&mut state, "key_rotation", "rot_", fields)?;
        state.key = next;
        disk::wipe(&path)?;
        disk::rename(&next_path, &path)
    }
}

/// Draws a new key that signs the receipts of a state directory; the old one signs that it takes over. No daemon may run on the
/// directory. The ids of the old key and the new one.
///
/// # Errors
/// In words and with the remedy.
pub fn rotate_signing_key(state_directory: &Path, now: SystemTime) -> Result<(String, String), KeyError> {
    let register = state_directory.join("register");
    if !register.exists() {
        return Err(KeyError::NothingToRotate {
            directory: state_directory.to_owned(),
        });
    }
    let _locked = disk::open_locked(&register)?;
    let log = ReceiptLog::open(&state_directory.join(super::RECEIPTS_DIRECTORY), &mut Vec::new())?;
    let id = |log: &ReceiptLog| log.state.lock().key.jwk.kid.clone();
    let old = id(&log);
    log.rotate(now)?;
    Ok((old, id(&log)))
}

/// Appends a line, durable before this returns. Its end is written when the rest is durable: a line with an end is whole
/// whatever a power cut tears, and one without was given to nobody.
fn write_line(file: &dyn Disk, text: &str, offset: u64) -> std::io::Result<()> {
    // What a write that failed has left would stand behind a shorter line.
    if file.bytes()? > offset {
        file.cut(offset)?;
        file.sync()?;
    }
    file.write_at(text.as_bytes(), offset)?;
    file.sync()?;
    file.write_at(b"\n", offset + text.len() as u64)?;
    file.sync()
}

/// A key that waits has taken over if the chain says so; else nobody will ever have seen its signature.
fn finish_rotation(directory: &Path) -> Result<(), KeyError> {
    let (path, next_path) = (directory.join(KEY_FILE), directory.join(NEXT_KEY_FILE));
    let Some(next) = SigningKey::read(&next_path)? else {
        return Ok(());
    };
    let chain_path = directory.join(CHAIN_FILE);
    let chain = File::open(&chain_path).map_err(KeyError::io("open", &chain_path))?;
    let mut took_over = false;
    for line in BufReader::new(chain).split(b'\n') {
        let line = line.map_err(KeyError::io("read", &chain_path))?;
        // Whether each line is what it was is looked at later; one that was cut short is none.
        let entry: Value = serde_json::from_slice(&line).unwrap_or(Value::Null);
        // Receipts may have followed it, if only the old key's file could not be replaced.
        took_over |= entry["new_key"]["kid"] == json!(next.jwk.kid);
    }
    if took_over {
        if path.exists() {
            disk::wipe(&path)?;
        }
        return disk::rename(&next_path, &path);
    }
    disk::wipe(&next_path)?;
    disk::remove(&next_path)
}

fn read_keys(path: &Path) -> Result<KeySet, KeyError> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| KeyError::io("read", path)(error.into())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(KeySet::default()),
        Err(error) => Err(KeyError::io("read", path)(error)),
    }
}

fn write_keys(path: &Path, keys: &KeySet) -> Result<(), KeyError> {
    let text = serde_json::to_vec(keys).map_err(|error| KeyError::io("write", path)(error.into()))?;
    let aside = path.with_extension("json.next");
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&aside)
        .map_err(KeyError::io("make", &aside))?;
    file.write_all(&text)
        .and_then(|()| file.sync_all())
        .map_err(KeyError::io("write", &aside))?;
    disk::rename(&aside, path)
}

/// What a chain file holds.
struct Scan {
    bytes: u64,
    torn: Option<Vec<u8>>,
    head: Option<Link>,
    of_job: HashMap<String, Place>,
}

impl Scan {
    fn of(file: &dyn Disk, path: &Path, keys: &KeySet) -> Result<Scan, KeyError> {
        let end = file.bytes().map_err(KeyError::io("look at", path))?;
        let mut reader = BufReader::new(FromFront { file, offset: 0, end });
        let mut verifier = Verifier::new(keys.clone());
        let (mut bytes, mut torn, mut of_job) = (0, None, HashMap::new());
        loop {
            let mut line = Vec::new();
            let read = reader
                .read_until(b'\n', &mut line)
                .map_err(KeyError::io("read", path))?;
            if read == 0 {
                break;
            }
            if line.pop() != Some(b'\n') {
                // Only a crash leaves a line without an end, and only at the end.
                let mut rest = vec![0; usize::try_from(end - bytes).unwrap_or(0)];
                file.read_at(&mut rest, bytes).map_err(KeyError::io("read", path))?;
                torn = Some(rest);
                break;
            }
            let checked = verifier.next(&line).map_err(|problem| KeyError::ChainAltered {
                path: path.to_owned(),
                problem: format!("at byte {bytes}: {problem}"),
            })?;
            if let Some(job) = checked.job {
                let place = Place {
                    offset: bytes,
                    bytes: line.len(),
                };
                of_job.insert(job, place);
            }
            bytes += read as u64;
        }
        Ok(Scan {
            bytes,
            torn,
            head: verifier.into_head(),
            of_job,
        })
    }
}

/// Reads a file once.
struct FromFront<'a> {
    file: &'a dyn Disk,
    offset: u64,
    end: u64,
}

impl Read for FromFront<'_> {
    fn read(&mut self, target: &mut [u8]) -> std::io::Result<usize> {
        let left = usize::try_from(self.end - self.offset).unwrap_or(usize::MAX);
        let count = left.min(target.len());
        self.file.read_at(&mut target[..count], self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
