use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Parser;

use crate::engine::Engine;
use crate::values::VALUE_BYTES;

/// kvtier's NVMe tier beside foyer: 1 MiB values, direct I/O, 16 readers.
#[derive(Clone, Debug, Parser)]
#[command(name = "cargo bench --manifest-path benches/rivals/Cargo.toml --")]
pub(crate) struct Options {
    /// Directory on a file system with direct I/O; all that is written into it is removed again. Default: a temporary one
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// Rounds behind each median
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Values of 1 MiB that each engine writes and reads in a round
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=16384))]
    pub(crate) values: u32,
    /// Print rows of JSON, one a line
    #[arg(long)]
    pub(crate) json: bool,
    /// Only these engines
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) engines: Vec<Engine>,
    /// Measure this engine once, in this process: what each round starts
    #[arg(long, hide = true)]
    pub(crate) once: Option<Engine>,
    /// Orders the reads of one measurement
    #[arg(long, hide = true, default_value_t = 0)]
    pub(crate) seed: u32,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    /// The directory to measure in: it takes direct I/O and has the space.
    pub(crate) fn directory(&self) -> anyhow::Result<PathBuf> {
        let directory = match &self.dir {
            Some(directory) => {
                check_direct_io(directory)?;
                directory.clone()
            }
            // Where the system keeps temporary files in memory, cargo's directory for them is usually on a disk.
            None => [std::env::temp_dir(), PathBuf::from(env!("CARGO_TARGET_TMPDIR"))]
                .into_iter()
                .find(|directory| check_direct_io(directory).is_ok())
                .context("no temporary directory takes direct I/O: name one on a disk with --dir")?,
        };
        let directory = directory.canonicalize()?;
        let system = rustix::fs::statvfs(&directory)?;
        let free = system.f_bavail.saturating_mul(system.f_frsize);
        // foyer's blocks are not filled to the last byte, and it wants some in reserve.
        let needed = u64::from(self.values) * VALUE_BYTES as u64 * 3 + (3 << 30);
        if free < needed {
            bail!(
                "{} has {} MiB free and the measurement needs {}: name another with --dir, or fewer --values",
                directory.display(),
                free >> 20,
                needed >> 20
            );
        }
        Ok(directory)
    }
}

fn check_direct_io(directory: &Path) -> anyhow::Result<()> {
    let probe = tempfile::Builder::new().make_in(directory, |path| {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
    });
    match probe {
        Ok(_) if !is_memory(directory) => Ok(()),
        Err(error) if error.kind() != std::io::ErrorKind::InvalidInput => {
            Err(error).with_context(|| directory.display().to_string())
        }
        _ => bail!(
            "{} does not take direct I/O (it is a tmpfs or the like): name a directory on ext4 or xfs with --dir",
            directory.display()
        ),
    }
}

/// Newer kernels take the flag on a tmpfs too, and keep the bytes in memory all the same.
fn is_memory(directory: &Path) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    rustix::fs::statfs(directory).is_ok_and(|system| [TMPFS, RAMFS].contains(&system.f_type))
}
