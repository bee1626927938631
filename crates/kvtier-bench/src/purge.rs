//! Purges against fdatasync and against undisturbed gets: what `kvctl bench purge` runs.
//!
//! How it measures, and why that is fair:
//!
//! - A small and a large node run in this process, each with directories of its own on the disk that is measured, sealed with
//!   AES-256-GCM. A tenant fills each with its number of 4 KiB blocks; all of them are on NVMe, the latest in host memory too.
//! - Acknowledgements: a second namespace of each node gets a few blocks and is invalidated, over and over, while the tenant's
//!   blocks stay in the index. Rounds alternate the small node, the large one and a 4 KiB overwrite with fdatasync in a file
//!   beside them: load that comes and goes falls on all. No purge runs while the overwrite is timed. `ack_*` is
//!   `Node::purge` (journalled, fenced); `invalidate_*` is `Node::invalidate`, without a journal.
//! - The acknowledgement of invalidating the full namespace itself is `first_ack_ms`: it can be had once for each filling, so
//!   it is the median of few, which differ by twice within one size (0.50 to 1.12 ms in seven fillings with 10,000 blocks). What
//!   the size costs is judged by the fastest of each size.
//! - Then the tenant is purged physically while another tenant gets blocks one at a time at a steady rate, half from host
//!   memory and half from NVMe (each once, so that it is there and nowhere else). The same gets right before and
//!   right after, with nothing else going on, are the undisturbed ones: a disk that others share has better and worse minutes.
//!   This is done for each round, on a node started and filled anew; a row holds medians.
//! - The key is destroyed when the half of its register slot that still held it is overwritten and synced; that is what the
//!   node itself counts, from the request on.

use std::path::PathBuf;

use crate::BenchError;

mod acknowledgements;
mod foreground;
mod physical;
mod row;
mod stand;

pub use row::{Row, meets};
use stand::Stand;

/// What to measure, and where.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Everything is written into a new directory in here, which is removed at the end. Not a memory file system.
    pub directory: PathBuf,
    /// Few blocks and few rounds: shows that everything runs; the figures mean little.
    pub quick: bool,
    /// Physical purges of each size. `None`: 3, or 1 when quick.
    pub rounds: Option<u32>,
    /// Acknowledgements of each size. `None`: 300, or 10 when quick.
    pub acknowledgements: Option<u32>,
    /// Sizes, blocks. Empty: 10,000 and 1,000,000, or 500 and 5,000 when quick.
    pub blocks: Vec<u64>,
}

/// Bytes of every block.
const BLOCK_BYTES: usize = 4096;
/// `f_type` of tmpfs and ramfs.
const MEMORY_FILE_SYSTEMS: [i64; 2] = [0x0102_1994, 0x8584_58f6];
const MIB: u64 = 1 << 20;

impl Options {
    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { 3 }).max(1)
    }

    fn acknowledgements(&self) -> u32 {
        self.acknowledgements
            .unwrap_or(if self.quick { 10 } else { 300 })
            .max(1)
    }

    fn blocks(&self) -> Vec<u64> {
        let mut blocks = match (self.blocks.is_empty(), self.quick) {
            (false, _) => self.blocks.clone(),
            (true, false) => vec![10_000, 1_000_000],
            (true, true) => vec![500, 5_000],
        };
        blocks.sort_unstable();
        blocks
    }

    fn disk_bytes(&self) -> u64 {
        self.blocks().into_iter().map(stand::nvme_bytes).sum::<u64>() + 256 * MIB
    }

    fn check(&self) -> Result<(), BenchError> {
        if self.blocks().contains(&0) {
            return Err(BenchError::Options("--blocks: give sizes of at least 1".to_owned()));
        }
        let shown = || self.directory.display().to_string();
        let of_directory = rustix::fs::statfs(&self.directory)
            .map_err(std::io::Error::from)
            .map_err(BenchError::system(shown()))?;
        if MEMORY_FILE_SYSTEMS.contains(&of_directory.f_type) {
            return Err(BenchError::Options(format!(
                "{} is in memory, where a sync costs nothing: name a directory on a disk with --dir",
                shown()
            )));
        }
        let free = of_directory
            .f_bavail
            .saturating_mul(of_directory.f_bsize.unsigned_abs());
        if free < self.disk_bytes() {
            return Err(BenchError::Options(format!(
                "{} has {} MiB free and the measurement needs {}: name another directory, or fewer --blocks",
                shown(),
                free / MIB,
                self.disk_bytes() / MIB
            )));
        }
        Ok(())
    }
}

/// Measures, and tells `progress` in words what is going on and, at the end, which promised figures are met.
///
/// Needs, at full size, 2 GiB of memory, 9 GiB of disk and some minutes.
///
/// # Errors
/// When the directory will not do, a node does not start, or bytes are wrong. A figure that is not met is no error.
pub fn run(options: &Options, progress: &mut dyn FnMut(&str)) -> Result<Vec<Row>, BenchError> {
    options.check()?;
    let directory = tempfile::Builder::new()
        .prefix("kvtier-bench")
        .tempdir_in(&options.directory)
        .map_err(BenchError::system("a directory of its own"))?;
    let mut stands = Vec::new();
    for blocks in options.blocks() {
        progress(&format!("filling a node with {blocks} blocks"));
        let stand = Stand::start(&directory.path().join(blocks.to_string()), blocks)?;
        stand.fill()?;
        stands.push(stand);
    }
    progress(&format!(
        "{} acknowledgements of each size; load {}",
        options.acknowledgements(),
        crate::load()
    ));
    let mut rows = acknowledgements::measure(options, directory.path(), &stands)?;
    for (stand, row) in stands.into_iter().zip(&mut rows) {
        physical::measure(options, stand, row, progress)?;
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
        let refused = |options: Options| options.check().expect_err("refused").to_string();
        let here = || std::env::current_dir().expect("a directory");
        let of = |directory: PathBuf, blocks: &[u64]| Options {
            directory,
            blocks: blocks.to_vec(),
            ..Options::default()
        };
        assert!(refused(of("/dev/shm".into(), &[1])).contains("--dir"));
        assert!(refused(of(here(), &[1 << 40])).contains("--blocks"));
        assert!(refused(of(here(), &[0])).contains("at least 1"));
    }

    #[test]
    fn a_small_measurement_has_every_figure() {
        // The sources lie on a disk, and may be somebody else's.
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).or_else(|_| tempfile::tempdir());
        let directory = directory.expect("a directory on a disk");
        let options = Options {
            directory: directory.path().to_owned(),
            quick: true,
            acknowledgements: Some(2),
            blocks: vec![200, 300],
            ..Options::default()
        };
        let rows = run(&options, &mut |_| {}).expect("a measurement");
        assert_eq!(rows.iter().map(|row| row.blocks).collect::<Vec<_>>(), [200, 300]);
        for row in &rows {
            assert!(row.verified, "{row:?}");
            for figure in [
                row.ack_p50_ms,
                row.first_ack_ms,
                row.first_ack_min_ms,
                row.fdatasync_p99_ms,
                row.key_destroyed_ms,
                row.physical_seconds,
                row.foreground_p99_ratio,
                row.invalidate_p50_ms,
            ] {
                assert!(figure > 0.0, "{row:?}");
            }
        }
    }
}
