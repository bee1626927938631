use std::cell::Cell;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicUsize, Ordering};

use kvtier_core::{Generation, Realization, RealizationId};
use kvtier_storage::nvme::RecordKeys;
use tempfile::TempDir;

use super::*;

fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn open(directory: &TempDir) -> StateFiles {
    StateFiles::open(directory.path(), None).expect("a state directory opens")
}

fn key_file(directory: &TempDir, name: &str, byte: &str) -> PathBuf {
    let path = directory.path().join(name);
    fs::write(&path, byte.repeat(32)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

/// Three namespaces of a directory, and their keys.
fn fill(files: &StateFiles) -> Vec<[u8; 32]> {
    for (slot, (domain, name)) in (0..).zip([("uid-0", "a"), ("team", "a"), ("team", "b")]) {
        files.register.open(NamespaceId(slot), domain, name).unwrap();
    }
    files.register.raise(NamespaceId(1), Generation(4)).unwrap();
    files
        .realizations
        .append(&[(RealizationId(0), Realization([5; 32]))])
        .unwrap();
    keys(files)
}

fn keys(files: &StateFiles) -> Vec<[u8; 32]> {
    let namespaces = files.register.namespaces();
    let keys = (0..).zip(&namespaces).map(|(slot, named)| {
        let (_, generation) = named.as_ref().expect("named");
        *files
            .register
            .data_key(NamespaceId(slot), *generation)
            .expect("a key")
            .bytes()
    });
    keys.collect()
}

/// Every file of a directory with its content.
fn contents(directory: &TempDir) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(directory.path()).unwrap();
    let mut found: Vec<_> = entries
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.clone(), fs::read(path).unwrap())
        })
        .collect();
    found.sort();
    found
}

#[test]
fn a_first_start_makes_private_files_that_the_next_one_reads() {
    let directory = directory();
    let files = open(&directory);
    assert!(files.notes[0].contains("made a master key"), "{:?}", files.notes);
    let made = fill(&files);
    drop(files);
    for name in ["master.key", "register", "realizations"] {
        let mode = fs::metadata(directory.path().join(name)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    assert_eq!(contents(&directory).len(), 3);
    let files = open(&directory);
    assert_eq!(keys(&files), made);
    assert_eq!(files.realizations.entries(), [Some(Realization([5; 32]))]);
    assert_eq!(files.notes, Vec::<String>::new());
}

#[test]
fn a_second_opener_is_refused_until_the_first_is_gone() {
    let directory = directory();
    let files = open(&directory);
    let words = StateFiles::open(directory.path(), None)
        .err()
        .expect("refused")
        .to_string();
    assert!(words.contains("in use"), "{words}");
    let words = rotate_master_key(directory.path(), None, None).unwrap_err().to_string();
    assert!(words.contains("in use"), "{words}");
    drop(files);
    open(&directory);
}

#[test]
fn a_missing_or_wrong_master_key_is_refused_and_no_other_is_made_in_its_place() {
    let directory = directory();
    fill(&open(&directory));
    let wrong = key_file(&directory, "wrong", "ab");
    let before = contents(&directory);
    let words = StateFiles::open(directory.path(), Some(&wrong))
        .err()
        .expect("refused")
        .to_string();
    assert!(
        words.contains("leave it out") && words.contains("nothing was changed"),
        "{words}"
    );
    let absent = directory.path().join("absent");
    let words = StateFiles::open(directory.path(), Some(&absent))
        .err()
        .expect("refused")
        .to_string();
    assert!(words.contains("there is no such file"), "{words}");
    assert_eq!(contents(&directory), before);
    let aside = directory.path().join("aside");
    fs::rename(directory.path().join("master.key"), &aside).unwrap();
    let before = contents(&directory);
    let words = StateFiles::open(directory.path(), None)
        .err()
        .expect("refused")
        .to_string();
    assert!(words.contains("put it back"), "{words}");
    assert_eq!(contents(&directory), before);
    StateFiles::open(directory.path(), Some(&aside)).expect("the right key under another name");
}

#[test]
fn without_its_list_of_realizations_every_namespace_starts_over() {
    let directory = directory();
    let made = fill(&open(&directory));
    fs::remove_file(directory.path().join("realizations")).unwrap();
    let files = open(&directory);
    assert!(files.warnings[0].contains("given up"), "{:?}", files.warnings);
    let generations: Vec<u64> = files
        .register
        .namespaces()
        .iter()
        .map(|named| named.as_ref().unwrap().1.0)
        .collect();
    assert_eq!(generations, [2, 5, 2]);
    assert!(keys(&files).iter().all(|key| !made.contains(key)));
    assert_eq!(files.realizations.entries(), []);
    drop(files);
    assert_eq!(open(&directory).warnings, Vec::<String>::new());
}

#[test]
fn a_rotation_wraps_the_same_keys_anew_and_destroys_the_old_master_key() {
    let directory = directory();
    let made = fill(&open(&directory));
    let own = directory.path().join("master.key");
    let old = fs::read(&own).unwrap();
    // Whoever held on to the old file finds nothing in it any more.
    let held = directory.path().join("held");
    fs::hard_link(&own, &held).unwrap();
    let rotation = rotate_master_key(directory.path(), None, None).unwrap();
    assert_eq!((rotation.rewrapped, rotation.must_be_named), (3, false));
    assert_ne!(rotation.from, Some(rotation.to));
    assert_ne!(fs::read(&own).unwrap(), old);
    assert_eq!(fs::read(&held).unwrap(), b"");
    fs::remove_file(&held).unwrap();
    let from = rotation.from.unwrap();
    for (path, content) in contents(&directory) {
        let finds = |bytes: &[u8]| content.windows(bytes.len()).any(|window| window == bytes);
        assert!(
            !finds(&from.0) && !finds(&old[..64]),
            "{} still has the old key",
            path.display()
        );
    }
    let files = open(&directory);
    assert_eq!(keys(&files), made);
    assert_eq!(files.register.master_key(), rotation.to);
}

#[test]
fn a_rotation_goes_between_files_of_the_operator_and_the_directory() {
    let directory = directory();
    let made = fill(&open(&directory));
    let own = directory.path().join("master.key");
    // Out of the directory, to a file that is made on the way.
    let first = directory.path().join("first");
    let rotation = rotate_master_key(directory.path(), None, Some(&first)).unwrap();
    assert!(rotation.must_be_named && !own.exists() && first.exists());
    let words = StateFiles::open(directory.path(), None)
        .err()
        .expect("refused")
        .to_string();
    assert!(words.contains("--master-key-file"), "{words}");
    assert_eq!(keys(&StateFiles::open(directory.path(), Some(&first)).unwrap()), made);
    // From one to another that is there.
    let second = key_file(&directory, "second", "cd");
    rotate_master_key(directory.path(), Some(&first), Some(&second)).unwrap();
    assert!(first.exists(), "the operator's own file is left alone");
    assert_eq!(keys(&StateFiles::open(directory.path(), Some(&second)).unwrap()), made);
    // And back in.
    let rotation = rotate_master_key(directory.path(), Some(&second), None).unwrap();
    assert!(!rotation.must_be_named && own.exists());
    assert_eq!(keys(&open(&directory)), made);
    // What cannot be.
    for (old, new, words) in [
        (Some(&second), None, "--new-master-key-file"),
        (None, Some(&own), "the old one"),
        (Some(&second), Some(&first), "nothing was changed"),
    ] {
        let before = contents(&directory);
        let error = rotate_master_key(directory.path(), old.map(PathBuf::as_path), new.map(PathBuf::as_path));
        let error = error.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(contents(&directory), before);
    }
    let empty = tempfile::tempdir().unwrap();
    let words = rotate_master_key(empty.path(), None, None).unwrap_err().to_string();
    assert!(words.contains("nothing to rotate"), "{words}");
    assert_eq!(contents(&empty), []);
}

/// A file that stops for good after so many writes and syncs, counted together with the steps of a rotation.
struct Fused {
    file: File,
    left: Arc<AtomicUsize>,
}

fn burn(left: &AtomicUsize) -> std::io::Result<()> {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
        .map(drop)
        .map_err(|_| std::io::Error::other("stopped"))
}

impl Disk for Fused {
    fn bytes(&self) -> std::io::Result<u64> {
        Disk::bytes(&self.file)
    }

    fn read_at(&self, target: &mut [u8], offset: u64) -> std::io::Result<()> {
        Disk::read_at(&self.file, target, offset)
    }

    fn write_at(&self, source: &[u8], offset: u64) -> std::io::Result<()> {
        burn(&self.left)?;
        Disk::write_at(&self.file, source, offset)
    }

    fn cut(&self, bytes: u64) -> std::io::Result<()> {
        burn(&self.left)?;
        Disk::cut(&self.file, bytes)
    }

    fn sync(&self) -> std::io::Result<()> {
        burn(&self.left)?;
        Disk::sync(&self.file)
    }
}

/// Rotates, stopping after `stop` writes, syncs and steps. Whether it came to its end.
fn rotate_until(directory: &Path, old: Option<&Path>, new: Option<&Path>, stop: usize) -> bool {
    let places = Places::of(directory);
    let left = Arc::new(AtomicUsize::new(stop));
    let file = disk::open_locked(&places.register).unwrap();
    let fused = Fused {
        file,
        left: Arc::clone(&left),
    };
    let ended = Cell::new(false);
    let mut step = |what: &'static str| burn(&left).map_err(KeyError::io(what, directory));
    ended.set(rotate(&places, Box::new(fused), old, new, &mut step).is_ok());
    ended.get()
}

#[test]
fn a_rotation_that_is_cut_short_anywhere_is_finished_by_the_next_start() {
    for stop in 0.. {
        let directory = directory();
        let made = fill(&open(&directory));
        let old = fs::read(directory.path().join("master.key")).unwrap();
        let ended = rotate_until(directory.path(), None, None, stop);
        let files = open(&directory);
        assert_eq!(keys(&files), made, "stopped after {stop}");
        drop(files);
        let began = stop > 0;
        assert_eq!(
            fs::read(directory.path().join("master.key")).unwrap() != old,
            began,
            "{stop}"
        );
        assert!(!directory.path().join("master.key.next").exists());
        assert_eq!(keys(&open(&directory)), made);
        if ended {
            assert!(stop > 8, "{stop}");
            break;
        }
    }
}

#[test]
fn a_rotation_between_files_that_is_cut_short_anywhere_is_finished_by_the_same_command() {
    for from_own in [true, false] {
        for stop in 0.. {
            let directory = directory();
            let files = if from_own {
                open(&directory)
            } else {
                let old = key_file(&directory, "old", "ab");
                StateFiles::open(directory.path(), Some(&old)).unwrap()
            };
            let made = fill(&files);
            drop(files);
            let old = directory.path().join("old");
            let old = (!from_own).then_some(old.as_path());
            let new = directory.path().join("new");
            let ended = rotate_until(directory.path(), old, Some(&new), stop);
            // Whichever key fits or not: what opens has the same keys, and what does not says what to do.
            for key in [old, Some(new.as_path())] {
                match StateFiles::open(directory.path(), key) {
                    Ok(files) => assert_eq!(keys(&files), made, "{stop}"),
                    Err(error) => {
                        let words = error.to_string();
                        let remedies = ["rotate-master-key", "--master-key-file", "no such file"];
                        assert!(remedies.iter().any(|remedy| words.contains(remedy)), "{words}");
                    }
                }
            }
            if !ended {
                match rotate_master_key(directory.path(), old, Some(&new)) {
                    Ok(_) => {}
                    // The last step was cut off: the old key is gone already, as it should be.
                    Err(KeyError::NoMasterKey { .. }) if from_own => {}
                    Err(error) => panic!("stopped after {stop}: {error}"),
                }
            }
            assert_eq!(
                keys(&StateFiles::open(directory.path(), Some(&new)).unwrap()),
                made,
                "{stop}"
            );
            if ended {
                assert!(stop > 8, "{stop}");
                break;
            }
        }
    }
}

#[test]
fn a_damaged_slot_is_reported_once_the_directory_opens() {
    let directory = directory();
    let files = open(&directory);
    fill(&files);
    files.register.settle().unwrap();
    drop(files);
    let path = directory.path().join("register");
    let mut bytes = fs::read(&path).unwrap();
    for half in [4096 * 3, 4096 * 4] {
        bytes[half + 70] ^= 1;
    }
    fs::write(&path, bytes).unwrap();
    let files = open(&directory);
    assert!(files.warnings[0].contains("damaged slots 1:"), "{:?}", files.warnings);
    assert_eq!(files.register.lost(), [NamespaceId(1)]);
}
