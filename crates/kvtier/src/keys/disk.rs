//! The little that the files of this room ask of a file system.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock};

use super::KeyError;

/// A file that is read and overwritten in place.
pub(crate) trait Disk: Send + Sync {
    /// How long it is.
    fn bytes(&self) -> io::Result<u64>;
    /// Fills `target` from `offset`; what lies behind the end reads as zeros.
    fn read_at(&self, target: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `source` at `offset`; the file grows where it must.
    fn write_at(&self, source: &[u8], offset: u64) -> io::Result<()>;
    /// Cuts off what lies behind `bytes`.
    fn cut(&self, bytes: u64) -> io::Result<()>;
    /// Returns once every write before it survives a power cut.
    fn sync(&self) -> io::Result<()>;
}

impl Disk for File {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, target: &mut [u8], offset: u64) -> io::Result<()> {
        let mut filled = 0;
        while filled < target.len() {
            match FileExt::read_at(self, &mut target[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        target[filled..].fill(0);
        Ok(())
    }

    fn write_at(&self, source: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(source, offset)
    }

    fn cut(&self, bytes: u64) -> io::Result<()> {
        self.set_len(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// Opens a file of ours, made if absent, and locks it for as long as it stays open.
pub(crate) fn open_locked(path: &Path) -> Result<File, KeyError> {
    let file = open_private(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(KeyError::InUse { path: path.to_owned() }),
        Err(error) => Err(KeyError::io("lock", path)(error.into())),
    }
}

/// Opens a file of ours for reading and writing, made if absent.
pub(crate) fn open_private(path: &Path) -> Result<File, KeyError> {
    let existed = path.symlink_metadata().is_ok();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(no_follow())
        .open(path)
        .map_err(KeyError::io("open", path))?;
    if !existed {
        sync_directory_of(path)?;
    }
    Ok(file)
}

/// A new file with this text, whole and durable under its name before this returns. Nothing may have that name yet.
pub(crate) fn write_whole(path: &Path, text: &[u8]) -> Result<(), KeyError> {
    let aside = aside(path);
    remove_if_there(&aside)?;
    let mut file = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&aside)
        .map_err(KeyError::io("make", &aside))?;
    let written = file
        .set_permissions(fs::Permissions::from_mode(0o600))
        .and_then(|()| file.write_all(text))
        .and_then(|()| file.sync_all())
        .map_err(KeyError::io("write", &aside))
        .and_then(|()| name_if_absent(&aside, path));
    if written.is_err() {
        // It would hold what nobody will ever use.
        let _ = fs::remove_file(&aside);
    }
    written?;
    sync_directory_of(path)
}

fn name_if_absent(aside: &Path, path: &Path) -> Result<(), KeyError> {
    // A file that somebody made meanwhile stays.
    match rustix::fs::renameat_with(CWD, aside, CWD, path, RenameFlags::NOREPLACE) {
        // This file system cannot say "only if absent" of a rename, but it can of a link.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            fs::hard_link(aside, path).map_err(KeyError::io("make", path))?;
            remove_if_there(aside)
        }
        renamed => renamed.map_err(|error| KeyError::io("make", path)(error.into())),
    }
}

/// Gives a file another name, whatever had it before, durably.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), KeyError> {
    fs::rename(from, to).map_err(KeyError::io("rename", from))?;
    sync_directory_of(to)
}

/// Overwrites a file in place and empties it, so that what it held is gone whoever still knows a way to it.
pub(crate) fn wipe(path: &Path) -> Result<(), KeyError> {
    let wiped = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(no_follow())
        .open(path)
        .and_then(|mut file| {
            let mut held = Vec::new();
            file.read_to_end(&mut held)?;
            let zeros = vec![0; held.len()];
            zeroize::Zeroize::zeroize(&mut held);
            file.write_all_at(&zeros, 0)?;
            file.sync_all()?;
            file.set_len(0)?;
            file.sync_all()
        });
    wiped.map_err(KeyError::io("overwrite", path))
}

/// Removes a file durably; that it is not there is as good.
pub(crate) fn remove(path: &Path) -> Result<(), KeyError> {
    remove_if_there(path)?;
    sync_directory_of(path)
}

fn remove_if_there(path: &Path) -> Result<(), KeyError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(KeyError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

pub(crate) fn sync_directory_of(path: &Path) -> Result<(), KeyError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(KeyError::io("sync", directory))
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

pub(crate) fn no_follow() -> i32 {
    i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0)
}
