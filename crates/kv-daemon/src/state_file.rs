//! Small files of the state directory: read without following links, replaced whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// Puts these bytes in the place of the file: written aside, synced and renamed, so that a crash leaves the old ones or these.
///
/// # Errors
/// As the file system says. The file is what it was.
pub(crate) fn replace(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = directory.join(format!("{name}.new"));
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(mode)
        .open(&aside)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&aside, path)?;
    sync_directory(directory)
}

/// Makes names durable.
///
/// # Errors
/// As the file system says.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// The text of a file that only this user may read, at most `bytes_max` of it; `None` when there is no file.
///
/// # Errors
/// When it is longer, a link, another user's, or readable by others.
pub(crate) fn read_private(path: &Path, bytes_max: u64) -> io::Result<Option<String>> {
    let file = match OpenOptions::new().read(true).custom_flags(no_follow()).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    check_private(&file)?;
    let mut text = String::new();
    let length = file.take(bytes_max + 1).read_to_string(&mut text)?;
    if length as u64 > bytes_max {
        return Err(io::Error::other(format!("it is longer than {bytes_max} bytes")));
    }
    Ok(Some(text))
}

/// Refuses a file that others may read or write, or that belongs to somebody else.
///
/// # Errors
/// In words that say what to do.
pub(crate) fn check_private(file: &File) -> io::Result<()> {
    let metadata = file.metadata()?;
    if metadata.mode() & 0o077 != 0 || metadata.uid() != rustix::process::geteuid().as_raw() {
        let words = "others may read it, or it belongs to another user: chmod 0600 it";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, words));
    }
    Ok(())
}

/// The flag that refuses a symbolic link as the last part of a path.
pub(crate) fn no_follow() -> i32 {
    i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0)
}
