use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::format::Encryption;
use super::{EngineSettings, RecordKeys};

/// Which engine moves the bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring if the system allows it, else threads, with one line that says why.
    #[default]
    Auto,
    /// io_uring, or the tier does not open.
    IoUring,
    /// Threads.
    Threads,
}

/// Where an NVMe tier lies and its bounds.
#[derive(Clone)]
pub struct NvmeSettings {
    /// The directory of the segment files, made if absent and locked while the tier is open.
    pub directory: PathBuf,
    /// One block device or file for all segments, in place of files in the directory.
    pub device: Option<PathBuf>,
    /// Whether the room of emptied segments on [`NvmeSettings::device`] is given back to it.
    pub discard: bool,
    /// Bytes of all segment files together. The core keeps to it; here it is compared with the space on the file
    /// system.
    pub capacity_bytes: u64,
    /// Which engine.
    pub engine: EngineChoice,
    /// Its bounds.
    pub bounds: EngineSettings,
    /// Memory for copies between segments and for unaligned memory, bytes; or three times the largest
    /// record in use, where that is more.
    pub bounce_bytes: u64,
    /// A request that the device was not asked for within this time fails.
    pub request_deadline: Duration,
    /// How payloads of new segments are protected. Segments of an earlier run stay as they are.
    pub encryption: Encryption,
    /// What was written survives a power cut after this time at the latest, without a sync being asked for.
    pub flush_interval: Duration,
    /// Who knows the keys of namespaces.
    pub keys: Arc<dyn RecordKeys>,
}

impl fmt::Debug for NvmeSettings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("NvmeSettings")
            .field("directory", &self.directory)
            .field("device", &self.device)
            .field("capacity_bytes", &self.capacity_bytes)
            .field("engine", &self.engine)
            .field("bounds", &self.bounds)
            .field("encryption", &self.encryption)
            .field("flush_interval", &self.flush_interval)
            .finish_non_exhaustive()
    }
}

impl NvmeSettings {
    /// Settings with the default engine and bounds.
    #[must_use]
    pub fn new(directory: PathBuf, capacity_bytes: u64, keys: Arc<dyn RecordKeys>) -> NvmeSettings {
        NvmeSettings {
            directory,
            device: None,
            discard: false,
            capacity_bytes,
            engine: EngineChoice::Auto,
            bounds: EngineSettings::default(),
            bounce_bytes: 32 << 20,
            request_deadline: Duration::from_secs(10),
            encryption: Encryption::default(),
            flush_interval: Duration::from_secs(1),
            keys,
        }
    }

    /// For messages.
    pub(super) fn place(&self) -> &Path {
        self.device.as_deref().unwrap_or(&self.directory)
    }

    pub(super) fn check(&self) -> Result<(), NvmeError> {
        let refuse = |field, value: usize, remedy| {
            Err(NvmeError::Settings {
                field,
                value: value as u64,
                remedy,
            })
        };
        let bounds = &self.bounds;
        if !(1..=4096).contains(&bounds.queue_depth) {
            return refuse("queue_depth", bounds.queue_depth, "must be between 1 and 4096");
        }
        if bounds.queue_max == 0 {
            return refuse("queue_max", bounds.queue_max, "must be at least 1");
        }
        if !(1..=1024).contains(&bounds.threads) {
            return refuse("threads", bounds.threads, "must be between 1 and 1024");
        }
        if bounds.piece_bytes == 0 || !bounds.piece_bytes.is_multiple_of(4096) {
            return refuse(
                "piece_bytes",
                bounds.piece_bytes,
                "must be a positive multiple of 4 KiB",
            );
        }
        Ok(())
    }
}

/// Why an NVMe tier did not open.
#[derive(Debug, thiserror::Error)]
pub enum NvmeError {
    /// A setting that cannot be.
    #[error("{field} = {value}: {remedy}")]
    Settings {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What to do.
        remedy: &'static str,
    },
    /// Another process has the directory.
    #[error("{} is in use{}: stop that process or choose another state directory", .directory.display(), .holder.map(|pid| format!(" by process {pid}")).unwrap_or_default())]
    InUse {
        /// Which directory.
        directory: PathBuf,
        /// Who, if it said so.
        holder: Option<u32>,
    },
    /// The directory cannot be made, read, locked or emptied.
    #[error("cannot {doing} {}: {source}", .path.display())]
    Directory {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A segment file that a later version of this program wrote.
    #[error("{}: {error}: start that version again, or remove the directory to begin with an empty tier", .path.display())]
    Newer {
        /// Which file.
        path: PathBuf,
        /// What it is.
        error: super::format::FormatError,
    },
    /// io_uring was asked for by name and is not to be had.
    #[error(
        "io_uring cannot be used: {source} ({}); set the engine to auto or threads to go on without",
        uring_remedy(source)
    )]
    Uring {
        /// The kernel's answer.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start a thread for the NVMe tier: {0}")]
    Thread(io::Error),
    /// No randomness or memory for buffers.
    #[error("cannot prepare the NVMe tier: {0}")]
    Prepare(io::Error),
}

/// What an operator can do about a kernel that refuses io_uring.
pub(crate) fn uring_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel or a seccomp profile has no io_uring",
        Some(libc::EPERM | libc::EACCES) => {
            "a seccomp profile or sysctl kernel.io_uring_disabled forbids it: allow io_uring_setup, io_uring_enter and io_uring_register"
        }
        Some(libc::ENOMEM) => "RLIMIT_MEMLOCK is too small on this kernel: raise LimitMEMLOCK",
        Some(libc::EMFILE | libc::ENFILE) => "too many open files: raise LimitNOFILE",
        _ => "see dmesg",
    }
}
