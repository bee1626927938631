use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use kvtier_core::SegmentId;
use kvtier_transfer::memory::MemoryRegion;
use rustix::fs::FlockOperation;

use super::NvmeError;

const LOCK_NAME: &str = "lock";
/// A segment that no core opens: tells whether files here take direct I/O.
const PROBE: SegmentId = SegmentId(u32::MAX);

/// The directory of segment files, ours alone while this lives.
pub(super) struct Directory {
    path: PathBuf,
    handle: File,
    /// Whether segment files are opened for direct I/O.
    pub(super) direct: bool,
    /// A file was made since the directory was last synced.
    changed: AtomicBool,
    _lock: File,
}

impl Directory {
    /// Makes it if absent and locks it. What is not ours stays.
    pub(super) fn open(path: &Path) -> Result<Directory, NvmeError> {
        let failed = |doing: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| NvmeError::Directory { doing, path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(failed("make the directory", path))?;
        let handle = File::open(path).map_err(failed("open the directory", path))?;
        let lock = lock(path)?;
        let mut directory = Directory {
            path: path.to_owned(),
            handle,
            direct: true,
            changed: AtomicBool::new(true),
            _lock: lock,
        };
        // A start that was killed may have left it.
        let _ = fs::remove_file(directory.segment_path(PROBE));
        let probe = directory.segment_path(PROBE);
        directory.direct = directory
            .takes_direct_writes(&probe)
            .map_err(failed("write to", &probe))?;
        Ok(directory)
    }

    /// The segment files that are there, by id.
    pub(super) fn segments(&self) -> Result<Vec<SegmentId>, NvmeError> {
        let failed = |source: io::Error| NvmeError::Directory {
            doing: "list the directory",
            path: self.path.clone(),
            source,
        };
        let mut segments = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let segment = name.to_str().and_then(parse_name);
            match segment.filter(|_| entry.file_type().is_ok_and(|kind| kind.is_file())) {
                Some(segment) => segments.push(segment),
                None if name == LOCK_NAME => {}
                None => tracing::warn!(path = %entry.path().display(), "left alone: not a segment file"),
            }
        }
        segments.sort_unstable();
        Ok(segments)
    }

    /// Removes a segment's file; its space goes when the last request on it is done.
    pub(super) fn remove(&self, segment: SegmentId) -> io::Result<()> {
        fs::remove_file(self.segment_path(segment))?;
        self.changed.store(true, Ordering::Release);
        Ok(())
    }

    /// Free bytes of the file system for us.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        let system = rustix::fs::fstatvfs(&self.handle).ok()?;
        Some(system.f_bavail.saturating_mul(system.f_frsize))
    }

    pub(super) fn segment_path(&self, segment: SegmentId) -> PathBuf {
        self.path.join(format!("segment-{:08x}.kvs", segment.0))
    }

    /// A file that is there.
    pub(super) fn reopen(&self, path: &Path) -> io::Result<File> {
        self.options().open(path)
    }

    fn options(&self) -> OpenOptions {
        let mut options = OpenOptions::new();
        let flags = if self.direct { libc::O_DIRECT } else { 0 };
        options.read(true).write(true).custom_flags(flags);
        options
    }

    /// A new, empty file.
    pub(super) fn create(&self, path: &Path) -> io::Result<File> {
        let file = self.options().create_new(true).mode(0o600).open(path)?;
        self.changed.store(true, Ordering::Release);
        Ok(file)
    }

    /// Makes new names, and the absence of removed ones, survive a power cut.
    pub(super) fn sync(&self) -> io::Result<()> {
        if self.changed.swap(false, Ordering::AcqRel) {
            self.handle
                .sync_all()
                .inspect_err(|_| self.changed.store(true, Ordering::Release))?;
        }
        Ok(())
    }

    /// Some file systems refuse direct I/O at open, some only when it is tried.
    fn takes_direct_writes(&self, probe: &Path) -> io::Result<bool> {
        let tried = self.create(probe).and_then(|file| {
            let page = MemoryRegion::anonymous(4096)
                .map_err(io::Error::other)?
                .slice(0, 4096)
                .map_err(io::Error::other)?;
            page.write_at(&file, 0)
        });
        let _ = fs::remove_file(probe);
        match tried {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => Ok(false),
            // A full file system says nothing about direct I/O; opening segments will report it.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

fn lock(directory: &Path) -> Result<File, NvmeError> {
    let path = directory.join(LOCK_NAME);
    let failed = |doing: &'static str| {
        let path = path.clone();
        move |source: io::Error| NvmeError::Directory { doing, path, source }
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(failed("open the lock file"))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            return Err(NvmeError::InUse {
                directory: directory.to_owned(),
                holder: holder.trim().parse().ok(),
            });
        }
        Err(error) => return Err(failed("lock")(error.into())),
    }
    // For the message of whoever comes second; the lock does not depend on it.
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

fn parse_name(name: &str) -> Option<SegmentId> {
    let digits = name.strip_prefix("segment-")?.strip_suffix(".kvs")?;
    let ours = digits.len() == 8 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    ours.then(|| u32::from_str_radix(digits, 16).ok().map(SegmentId))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_we_give_are_ours() {
        assert_eq!(parse_name("segment-0000002a.kvs"), Some(SegmentId(42)));
        for foreign in [
            "segment-2a.kvs",
            "segment-0000002A.kvs",
            "segment-0000002a.kvs.bak",
            "segment-+000002a.kvs",
            "notes.txt",
        ] {
            assert_eq!(parse_name(foreign), None, "{foreign}");
        }
    }
}
