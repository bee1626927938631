use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvtier_core::NamespaceId;

use super::KeyError;
use super::disk::{self, Disk};
use super::master::{KeyId, MasterKey};
use super::realizations::{Found, Realizations};
use super::register::Register;

const REGISTER_FILE: &str = "register";
const REALIZATIONS_FILE: &str = "realizations";
const MASTER_KEY_FILE: &str = "master.key";
/// Where a new master key waits until every data key is wrapped by it.
const NEXT_MASTER_KEY_FILE: &str = "master.key.next";

/// The durable names and keys of one state directory, ours alone while this lives.
pub struct StateFiles {
    /// Namespaces, generations, data keys.
    pub register: Arc<Register>,
    /// Realizations.
    pub realizations: Realizations,
    /// What an operator should know: what was made or finished.
    pub notes: Vec<String>,
    /// What was lost.
    pub warnings: Vec<String>,
}

/// Where the files of a state directory lie.
struct Places {
    directory: PathBuf,
    register: PathBuf,
    own_key: PathBuf,
    next_key: PathBuf,
}

impl Places {
    fn of(directory: &Path) -> Places {
        Places {
            directory: directory.to_owned(),
            register: directory.join(REGISTER_FILE),
            own_key: directory.join(MASTER_KEY_FILE),
            next_key: directory.join(NEXT_MASTER_KEY_FILE),
        }
    }

    /// A file of the operator's, unless it is the directory's own under another name.
    fn named<'a>(&self, path: Option<&'a Path>) -> Option<&'a Path> {
        path.filter(|path| !same_file(path, &self.own_key))
    }

    /// The master key in use, as far as its file says: the one named, or the directory's own.
    fn key_in_use(&self, named: Option<&Path>) -> Result<Option<MasterKey>, KeyError> {
        match named {
            Some(path) => match MasterKey::read(path)? {
                None => Err(KeyError::NoKeyFile { path: path.to_owned() }),
                found => Ok(found),
            },
            // An empty one was destroyed by a rotation that was cut short just before its end.
            None if !self.has_own_key() => Ok(None),
            None => MasterKey::read(&self.own_key),
        }
    }

    fn has_own_key(&self) -> bool {
        self.own_key.metadata().is_ok_and(|metadata| metadata.len() > 0)
    }

    /// Puts the new master key in the place of the directory's own, whose bytes are overwritten before they go.
    fn promote_next_key(&self, named: Option<&Path>, step: &mut Step<'_>) -> Result<(), KeyError> {
        if named.is_none() && self.has_own_key() {
            step("overwrite the old key")?;
            disk::wipe(&self.own_key)?;
        }
        step("rename the new key")?;
        disk::rename(&self.next_key, &self.own_key)
    }
}

/// Called before each step that changes a file other than the register; a test may stop there.
type Step<'a> = dyn FnMut(&'static str) -> Result<(), KeyError> + 'a;

impl StateFiles {
    /// Locks the register and reads what is there; makes all of it at the first start. A rotation of the master key that
    /// was cut short is finished where the directory holds both keys.
    ///
    /// `master_key_file`: where the master key lies, if it is not the directory's own.
    ///
    /// # Errors
    /// In words and with the remedy. What was there is as it was.
    pub fn open(directory: &Path, master_key_file: Option<&Path>) -> Result<StateFiles, KeyError> {
        let places = Places::of(directory);
        let file = disk::open_locked(&places.register)?;
        let mut notes = Vec::new();
        let named = places.named(master_key_file);
        let next = MasterKey::read(&places.next_key)?;
        let in_use = places.key_in_use(named)?;
        let register = match (next, in_use) {
            (Some(next), in_use) => {
                let register = Register::load(Box::new(file), &places.register, next, in_use.as_slice())?;
                register.rewrap()?;
                places.promote_next_key(named, &mut |_| Ok(()))?;
                notes.push(format!(
                    "a rotation of the master key was cut short and is finished now: the key lies in {}{}",
                    places.own_key.display(),
                    if named.is_some() {
                        "; start without --master-key-file from now on"
                    } else {
                        ""
                    }
                ));
                register
            }
            (None, Some(master)) => places.load(file, master)?,
            (None, None) => match Register::wrapped_by(&file, &places.register)? {
                Some(wrapped_by) => {
                    return Err(KeyError::NoMasterKey {
                        path: places.register,
                        wrapped_by,
                        missing: places.own_key,
                    });
                }
                None => {
                    disk::remove(&places.own_key)?;
                    let master = MasterKey::make(&places.own_key)?;
                    notes.push(format!(
                        "made a master key: {}; without it what lies on NVMe cannot be read",
                        places.own_key.display()
                    ));
                    places.load(file, master)?
                }
            },
        };
        let mut warnings = Vec::from_iter(note_of_lost(&places.register, register.lost()));
        if let Err(error) = register.settle() {
            warnings.push(format!(
                "{}: {error}; it will be tried again",
                places.register.display()
            ));
        }
        let realizations = open_realizations(&directory.join(REALIZATIONS_FILE), &register, &mut warnings)?;
        Ok(StateFiles {
            register: Arc::new(register),
            realizations,
            notes,
            warnings,
        })
    }
}

impl Places {
    fn load(&self, file: File, master: MasterKey) -> Result<Register, KeyError> {
        Register::load(Box::new(file), &self.register, master, &[]).map_err(|error| self.with_hint(error))
    }

    /// Says so when the directory's own key would have been the right one.
    fn with_hint(&self, error: KeyError) -> KeyError {
        match error {
            KeyError::WrongMasterKey {
                path,
                wrapped_by,
                given,
                ..
            } => {
                let fits = |key: &MasterKey| key.id() == wrapped_by;
                let hint = match MasterKey::read(&self.own_key) {
                    Ok(Some(key)) if fits(&key) => format!(", or leave it out: {} has it", self.own_key.display()),
                    _ => String::new(),
                };
                KeyError::WrongMasterKey {
                    path,
                    wrapped_by,
                    given,
                    hint,
                }
            }
            error => error,
        }
    }
}

fn note_of_lost(path: &Path, lost: &[NamespaceId]) -> Option<String> {
    let numbers: Vec<String> = lost.iter().map(|slot| slot.0.to_string()).collect();
    (!lost.is_empty()).then(|| {
        format!(
            "{}: damaged slots {}: the names and keys of these namespaces are lost, and what lies on NVMe of them cannot be read",
            path.display(),
            numbers.join(", ")
        )
    })
}

fn open_realizations(path: &Path, register: &Register, warnings: &mut Vec<String>) -> Result<Realizations, KeyError> {
    let file = disk::open_private(path)?;
    let found = Realizations::load(Box::new(file), path, register.incarnation())?;
    let realizations = match found {
        Found::Own(realizations) => realizations,
        Found::None(disk) => {
            if !register.namespaces().is_empty() {
                // Ids will be given out anew: nothing that was written under the old ones may be found under them.
                register.raise_all()?;
                warnings.push(format!(
                    "{} was missing or another register's: what lies on NVMe cannot be told apart any more and is given up",
                    path.display()
                ));
            }
            return Realizations::begin(disk, path, register.incarnation());
        }
    };
    let damaged = realizations.entries().iter().filter(|entry| entry.is_none()).count();
    if damaged > 0 {
        warnings.push(format!(
            "{}: {damaged} damaged records: what lies on NVMe of these realizations cannot be found",
            path.display()
        ));
    }
    Ok(realizations)
}

/// What a rotation did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Of the key in use until then.
    pub from: Option<KeyId>,
    /// Of the key in use now.
    pub to: KeyId,
    /// Data keys that were wrapped anew.
    pub rewrapped: u32,
    /// Where the key in use lies.
    pub key_file: PathBuf,
    /// Whether a start must name it.
    pub must_be_named: bool,
}

/// Wraps every data key by another master key, and touches no data. No daemon may run on the directory. What is cut short
/// is finished by the next start, or by another call with the same files.
///
/// `old`: where the key in use lies, if it is not the directory's own. `new`: where the new one lies, drawn if there is no
/// such file; without it the new one is drawn and becomes the directory's own. The directory's own old key is destroyed;
/// a file that the operator named is left to the operator.
///
/// # Errors
/// In words and with the remedy.
pub fn rotate_master_key(directory: &Path, old: Option<&Path>, new: Option<&Path>) -> Result<Rotation, KeyError> {
    let places = Places::of(directory);
    if !places.register.exists() {
        return Err(KeyError::NothingToRotate {
            directory: directory.to_owned(),
        });
    }
    let file = disk::open_locked(&places.register)?;
    rotate(&places, Box::new(file), old, new, &mut |_| Ok(()))
}

fn rotate(
    places: &Places,
    register: Box<dyn Disk>,
    old: Option<&Path>,
    new: Option<&Path>,
    step: &mut Step<'_>,
) -> Result<Rotation, KeyError> {
    // A key that waits was drawn by a rotation that was cut short.
    let old = places.named(old);
    let next = MasterKey::read(&places.next_key)?;
    let in_use = places.key_in_use(old)?;
    let from = in_use.as_ref().map(MasterKey::id);
    if next.is_none() && in_use.is_none() {
        return Err(match Register::wrapped_by(&*register, &places.register)? {
            Some(wrapped_by) => KeyError::NoMasterKey {
                path: places.register.clone(),
                wrapped_by,
                missing: places.own_key.clone(),
            },
            None => KeyError::NothingToRotate {
                directory: places.directory.clone(),
            },
        });
    }
    let mut others: Vec<MasterKey> = in_use.into_iter().collect();
    let target = match (new, next) {
        (Some(path), next) => {
            others.extend(next);
            read_or_make(path, step)?
        }
        (None, Some(next)) => next,
        (None, None) => {
            if old.is_some() && places.has_own_key() {
                return Err(KeyError::KeyFileTaken {
                    path: places.own_key.clone(),
                });
            }
            step("make the new key")?;
            MasterKey::make(&places.next_key)?
        }
    };
    let to = target.id();
    if Some(to) == from {
        return Err(KeyError::SameMasterKey { id: to });
    }
    let register = Register::load(register, &places.register, target, &others)?;
    let rewrapped = register.rewrap()?;
    let (key_file, must_be_named) = match new {
        None => {
            places.promote_next_key(old, step)?;
            (places.own_key.clone(), false)
        }
        Some(path) => {
            for retired in [&places.next_key, &places.own_key] {
                let is_new = same_file(retired, path);
                let is_operators = old.is_some() && *retired == places.own_key;
                if retired.exists() && !is_new && !is_operators {
                    step("overwrite a retired key")?;
                    disk::wipe(retired)?;
                    step("remove a retired key")?;
                    disk::remove(retired)?;
                }
            }
            (path.to_owned(), !same_file(&places.own_key, path))
        }
    };
    Ok(Rotation {
        from,
        to,
        rewrapped,
        key_file,
        must_be_named,
    })
}

/// Draws another master key for a register that is in use and wraps every data key by it; the directory's own old key is
/// destroyed. Does nothing, and says so by `None`, where the key is a file that the operator named: that one is out of reach.
///
/// # Errors
/// When something cannot be written. What was cut short is finished by another call or by the next start.
pub fn rotate_in_use(
    directory: &Path,
    register: &Register,
    master_key_file: Option<&Path>,
) -> Result<Option<KeyId>, KeyError> {
    let places = Places::of(directory);
    if places.named(master_key_file).is_some() {
        return Ok(None);
    }
    let next = match MasterKey::read(&places.next_key)? {
        Some(next) => next,
        None => MasterKey::make(&places.next_key)?,
    };
    let id = next.id();
    register.rewrap_by(next)?;
    places.promote_next_key(None, &mut |_| Ok(()))?;
    Ok(Some(id))
}

fn read_or_make(path: &Path, step: &mut Step<'_>) -> Result<MasterKey, KeyError> {
    if let Some(key) = MasterKey::read(path)? {
        return Ok(key);
    }
    step("make the new key")?;
    MasterKey::make(path)
}

fn same_file(left: &Path, right: &Path) -> bool {
    match (left.canonicalize(), right.canonicalize()) {
        (Ok(left), Ok(right)) => left == right,
        _ => left == right,
    }
}

#[cfg(test)]
mod tests;
