//! The NVMe tier against a raw io_uring ring: what `kvctl bench nvme` runs.
//!
//! How it measures, and why that is fair:
//!
//! - Both sides run in this process, one after the other in each round, and take turns at going first; a row holds medians
//!   over rounds of what both did in the same round.
//! - The raw ring reads the very segment files that the tier wrote, other records of them in the same round, in random
//!   order, with direct I/O wherever the tier has it. It writes files made as the tier makes its own, front to back.
//! - Both let the device touch the same memory: the slots of a region made as host memory is made, cycled through. Sealed
//!   records are read into private memory and opened into those slots, so there the raw ring cycles through private memory
//!   of the same kind: as in the other rows, to where no byte is still warm from the read before.
//! - The tier has its default engine and bounds. A record counts from its submission to its answer, checks included. With a
//!   depth of one a thread waits for each answer, as it does for the raw ring; else whoever brings an answer submits the next
//!   action, as a node does.
//! - CPU time is that of the whole process over each part. Beside it stands what the check alone costs (CRC32C, or AES-GCM
//!   from where the disk put the bytes to the caller's slot; sealing, for writes), over memory that the disk filled right
//!   before.
//! - After filling the files the disk gets time to settle. Samples of what was read and written are compared byte by byte;
//!   wrong bytes end the run.

use std::path::PathBuf;
use std::time::Duration;

use crate::BenchError;

mod check;
mod keys;
mod memory;
mod reopen;
mod row;
mod samples;
mod stand;
mod transfers;

pub use row::{Reopen, Row, Transfer, meets};

/// What can be measured, as [`Options::cases`] spells it.
pub const CASES: [&str; 3] = ["read", "write", "reopen"];

/// What to measure, and where.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Everything is written into a new directory in here, which is removed at the end.
    pub directory: PathBuf,
    /// Small files and few rounds: shows that everything runs; the figures mean little.
    pub quick: bool,
    /// Rounds behind each median. `None`: 15, or 2 when quick.
    pub rounds: Option<u32>,
    /// Bytes of records of each size. `None`: 1 GiB, or 32 MiB when quick.
    pub file_bytes: Option<u64>,
    /// Which of [`CASES`]; empty: all.
    pub cases: Vec<String>,
    /// Blocks of 4 KiB that are found again. `None`: 2^20, or 2^14 when quick.
    pub reopen_blocks: Option<u64>,
}

const MIB: u64 = 1 << 20;

impl Options {
    fn wants(&self, case: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|wanted| wanted == case)
    }

    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 2 } else { 15 }).max(1)
    }

    fn file_bytes(&self) -> u64 {
        self.file_bytes
            .unwrap_or(if self.quick { 32 * MIB } else { 1024 * MIB })
            .max(32 * MIB)
            .next_multiple_of(16 * MIB)
    }

    /// Each side moves this much in a round.
    fn round_bytes(&self) -> u64 {
        self.file_bytes() / 4
    }

    /// Host memory that is cycled through.
    fn memory_bytes(&self) -> u64 {
        self.file_bytes()
    }

    fn segment_bytes(&self) -> u64 {
        if self.quick { 8 * MIB } else { 256 * MIB }
    }

    fn settling(&self) -> Duration {
        Duration::from_secs(if self.quick { 0 } else { 20 })
    }

    fn reopen_blocks(&self) -> u64 {
        self.reopen_blocks
            .unwrap_or(if self.quick { 1 << 14 } else { 1 << 20 })
            .max(1)
    }

    /// Disk space that is needed at a time.
    fn disk_bytes(&self) -> u64 {
        let records = self.wants("read").then(|| 3 * self.file_bytes());
        let written = self
            .wants("write")
            .then(|| 2 * u64::from(self.rounds()) * self.round_bytes());
        let reopened = self.wants("reopen").then(|| self.reopen_blocks() * 4096);
        let transfers = records.unwrap_or(0) + written.unwrap_or(0) + 5 * transfers::CHECKED_BYTES_MAX;
        // Headers and indexes, and what the file system needs for itself.
        transfers.max(reopened.unwrap_or(0)) / 16 * 17 + 256 * MIB
    }

    fn check(&self) -> Result<(), BenchError> {
        if let Some(unknown) = self.cases.iter().find(|case| !CASES.contains(&case.as_str())) {
            return Err(BenchError::Options(format!(
                "unknown case {unknown}: choose among {}",
                CASES.join(", ")
            )));
        }
        let system = rustix::fs::statvfs(&self.directory)
            .map_err(std::io::Error::from)
            .map_err(BenchError::system(self.directory.display().to_string()))?;
        let free = system.f_bavail.saturating_mul(system.f_frsize);
        if free < self.disk_bytes() {
            return Err(BenchError::Options(format!(
                "{} has {} MiB free and the measurement needs {}: name another directory, or less with --file-bytes or --rounds",
                self.directory.display(),
                free / MIB,
                self.disk_bytes() / MIB
            )));
        }
        Ok(())
    }
}

/// Measures, and tells `progress` in words what is going on and, at the end, which promised figures are met.
///
/// # Errors
/// When the directory is too small or io_uring is denied, when the tier or the disk fails, or bytes are wrong. A figure that
/// is not met is no error.
pub fn run(options: &Options, progress: &mut dyn FnMut(&str)) -> Result<Vec<Row>, BenchError> {
    options.check()?;
    let directory = tempfile::Builder::new()
        .prefix("kvtier-bench")
        .tempdir_in(&options.directory)
        .map_err(BenchError::system("a directory of its own"))?;
    let mut rows = Vec::new();
    if options.wants("read") || options.wants("write") {
        rows.extend(transfers::measure(options, directory.path(), progress)?);
    }
    if options.wants("reopen") {
        rows.push(Row::Reopen(reopen::measure(options, directory.path(), progress)?));
    }
    for bar in meets(&rows) {
        progress(&bar.to_string());
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_cannot_be_are_refused_with_the_remedy() {
        let options = |cases: &[&str], file_bytes| Options {
            directory: std::env::temp_dir(),
            cases: cases.iter().map(|&case| case.to_owned()).collect(),
            file_bytes,
            ..Options::default()
        };
        let refused = |options: Options| options.check().expect_err("refused").to_string();
        assert!(refused(options(&["get"], None)).contains("read, write, reopen"));
        assert!(refused(options(&[], Some(1 << 50))).contains("--file-bytes"));
    }
}
