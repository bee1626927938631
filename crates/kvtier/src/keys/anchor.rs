use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kvtier_core::Generation;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::slot::Label;
use super::{KeyError, disk};

const VERSION: u32 = 1;
/// In the state directory: it was served with an anchor.
pub(crate) const MARKER_FILE: &str = "anchored";
/// What every namespace begins with: nothing was invalidated yet.
const FIRST: Generation = Generation(1);

/// A file outside the state directory that remembers the highest generation of every namespace that was invalidated. A state
/// directory restored from an older copy is behind it, and is not served.
///
/// JSON: `{"version": 1, "generations": {"DOMAIN/NAME": 7}}`, replaced as a whole.
pub(crate) struct Anchor {
    path: PathBuf,
    generations: Mutex<BTreeMap<String, u64>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    version: u32,
    generations: BTreeMap<String, u64>,
}

impl Anchor {
    /// Reads the file. The first time for a state directory it is made if it is not there; later that is refused, for an
    /// empty one knows of no purge.
    pub(crate) fn open(path: &Path, state_directory: &Path, notes: &mut Vec<String>) -> Result<Anchor, KeyError> {
        let marker = state_directory.join(MARKER_FILE);
        let generations = match std::fs::read(path) {
            Ok(text) => read(path, &text)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                if marker.exists() {
                    return Err(KeyError::NoAnchor {
                        path: path.to_owned(),
                        marker,
                    });
                }
                notes.push(format!(
                    "made an anchor, {}: it must not be restored together with the state directory",
                    path.display()
                ));
                write(path, &BTreeMap::new())?;
                BTreeMap::new()
            }
            Err(error) => return Err(KeyError::io("read", path)(error)),
        };
        if !marker.exists() {
            let words = b"Served with an anchor: a start that names one finds it, or is refused.\n";
            disk::write_whole(&marker, words)?;
        }
        Ok(Anchor {
            path: path.to_owned(),
            generations: Mutex::new(generations),
        })
    }

    /// Whether a state directory was served with an anchor.
    pub(crate) fn was_used(state_directory: &Path) -> bool {
        state_directory.join(MARKER_FILE).exists()
    }

    /// Before anybody is served: notes generations of the register that it does not know. A crash came between the two, or a run
    /// without an anchor raised them. Not noted, they would be in force, and an older copy would not be told from them.
    pub(crate) fn catch_up<'a>(
        &self,
        registered: impl IntoIterator<Item = (&'a Label, Generation)>,
    ) -> Result<usize, KeyError> {
        let mut generations = self.generations.lock();
        let mut raised = generations.clone();
        let mut count = 0;
        for (label, generation) in registered.into_iter().filter(|(_, generation)| *generation > FIRST) {
            let known = raised.entry(named(label)).or_default();
            if *known < generation.0 {
                *known = generation.0;
                count += 1;
            }
        }
        if count > 0 {
            write(&self.path, &raised)?;
            *generations = raised;
        }
        Ok(count)
    }

    /// The highest generation that was ever acknowledged; 0: none was.
    pub(crate) fn generation(&self, label: &Label) -> u64 {
        self.generations.lock().get(&named(label)).copied().unwrap_or(0)
    }

    /// Notes a maximum, durably.
    pub(crate) fn raise(&self, label: &Label, generation: u64) -> Result<(), KeyError> {
        let mut generations = self.generations.lock();
        let name = named(label);
        if generations.get(&name).is_some_and(|known| *known >= generation) {
            return Ok(());
        }
        let mut raised = generations.clone();
        raised.insert(name, generation);
        write(&self.path, &raised)?;
        *generations = raised;
        Ok(())
    }
}

fn named(label: &Label) -> String {
    format!("{}/{}", label.domain, label.name)
}

fn read(path: &Path, text: &[u8]) -> Result<BTreeMap<String, u64>, KeyError> {
    let damaged = |_| KeyError::BadAnchor { path: path.to_owned() };
    let content: Content = serde_json::from_slice(text).map_err(damaged)?;
    if content.version != VERSION {
        return Err(KeyError::Newer {
            path: path.to_owned(),
            version: content.version,
            known: VERSION,
        });
    }
    Ok(content.generations)
}

fn write(path: &Path, generations: &BTreeMap<String, u64>) -> Result<(), KeyError> {
    let content = Content {
        version: VERSION,
        generations: generations.clone(),
    };
    let text = serde_json::to_vec(&content).map_err(|error| KeyError::io("write", path)(error.into()))?;
    let mut aside = path.as_os_str().to_owned();
    aside.push(".next");
    let aside = PathBuf::from(aside);
    OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&aside)
        .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
        .map_err(KeyError::io("write", &aside))?;
    disk::rename(&aside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_anchor_catches_up_with_the_register_and_never_falls_behind_itself() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, state) = (directory.path().join("anchor"), directory.path().join("state"));
        std::fs::create_dir(&state).expect("made");
        assert!(!Anchor::was_used(&state));
        let label = |name: &str| Label {
            domain: "uid-1".into(),
            name: name.into(),
        };
        let anchor = Anchor::open(&path, &state, &mut Vec::new()).expect("made");
        anchor.raise(&label("older"), 5).expect("raised");
        let names = ["older", "newer", "new", "never raised"].map(label);
        let registered = names.iter().zip([3, 4, 2, 1].map(Generation));
        assert_eq!(anchor.catch_up(registered.clone()).expect("caught up"), 2);
        assert_eq!(anchor.catch_up(registered).expect("nothing to do"), 0);
        drop(anchor);
        let anchor = Anchor::open(&path, &state, &mut Vec::new()).expect("read");
        assert_eq!(names.each_ref().map(|label| anchor.generation(label)), [5, 4, 2, 0]);
        assert!(Anchor::was_used(&state));
    }

    #[test]
    fn an_anchor_that_cannot_be_written_says_so_and_stays_as_it_was() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, state) = (directory.path().join("anchor"), directory.path().join("state"));
        std::fs::create_dir(&state).expect("made");
        let label = Label {
            domain: "uid-1".into(),
            name: "a".into(),
        };
        let anchor = Anchor::open(&path, &state, &mut Vec::new()).expect("made");
        anchor.raise(&label, 5).expect("raised");
        // Whoever runs the tests: nobody writes a file where a directory is.
        let in_the_way = directory.path().join("anchor.next");
        std::fs::create_dir(&in_the_way).expect("made");
        assert!(anchor.raise(&label, 6).is_err());
        assert!(anchor.catch_up([(&label, Generation(7))]).is_err());
        assert_eq!(anchor.generation(&label), 5);
        std::fs::remove_dir(&in_the_way).expect("removed");
        anchor.raise(&label, 6).expect("raised");
        assert_eq!(anchor.generation(&label), 6);
    }

    #[test]
    fn an_anchor_only_rises_and_is_read_again() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, state) = (directory.path().join("anchor"), directory.path().join("state"));
        std::fs::create_dir(&state).expect("made");
        let label = |name: &str| Label {
            domain: "uid-1".into(),
            name: name.into(),
        };
        let mut notes = Vec::new();
        let anchor = Anchor::open(&path, &state, &mut notes).expect("made");
        assert_eq!(notes.len(), 1);
        anchor.raise(&label("a"), 5).expect("raised");
        anchor.raise(&label("a"), 3).expect("nothing to do");
        anchor.raise(&label("b"), 2).expect("raised");
        drop(anchor);
        let anchor = Anchor::open(&path, &state, &mut notes).expect("read");
        assert_eq!(notes.len(), 1);
        let generations = ["a", "b", "c"].map(|name| anchor.generation(&label(name)));
        assert_eq!(generations, [5, 2, 0]);
        std::fs::write(&path, "{}").expect("written");
        let refused = |notes: &mut Vec<String>| Anchor::open(&path, &state, notes).err().expect("refused");
        assert!(
            matches!(refused(&mut notes), KeyError::BadAnchor { .. }),
            "never taken for an empty one"
        );
        std::fs::remove_file(&path).expect("removed");
        assert!(
            matches!(refused(&mut notes), KeyError::NoAnchor { .. }),
            "nor is an empty one made"
        );
        assert!(!path.exists());
    }
}
