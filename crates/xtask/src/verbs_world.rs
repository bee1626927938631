//! A machine with RDMA verbs in an ordinary process: a user-mode Linux kernel with Soft-RoCE, and a first file system
//! with just enough in it. No root, no KVM, no hardware.
//!
//! Everything is made once and kept in the cache. The kernel is built from the newest `linux-source` of Debian's unstable
//! release; whoever has one built already puts it there as `verbs-world/linux`.

mod archive;
mod image;
mod kernel;
pub(crate) mod packages;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::outcome::Failure;
use crate::process::{self, Stream};

const INIT: &str = include_str!("verbs_world/init");
const CONFIGURATION: &str = include_str!("verbs_world/uml.config");
/// Memory of the guest: a gibibyte that is registered, and room for everything else.
const MEMORY: &str = "mem=2600M";
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// A kernel and a first file system that were seen to boot.
pub(crate) struct VerbsWorld {
    kernel: PathBuf,
    image: PathBuf,
}

impl VerbsWorld {
    /// From the cache, or made.
    ///
    /// # Errors
    /// Exit status 69 with the reason where this machine cannot have it.
    pub(crate) fn prepare() -> Result<VerbsWorld, Failure> {
        let directory = cache()?.join("verbs-world");
        std::fs::create_dir_all(&directory)?;
        let world = VerbsWorld {
            image: image::prepare(&directory)?,
            kernel: kernel::prepare(&directory)?,
        };
        world.check()?;
        Ok(world)
    }

    /// Boots it with nothing to do: a kernel that starts on another machine may not on this one.
    fn check(&self) -> Result<(), Failure> {
        let directory = tempfile::Builder::new().prefix("kvtier-world-").tempdir()?;
        let script = "grep -q rxe /proc/kallsyms || exit 9; /bin/ip link add d0 type dummy && /bin/ip link set d0 up && /bin/rdma link add rxe0 type rxe netdev d0\n";
        std::fs::write(directory.path().join("run.sh"), script)?;
        let mut said = Vec::new();
        let status = self.run(directory.path(), BOOT_LIMIT, |_, line| said.push(line.to_owned()));
        match status {
            Ok(0) => Ok(()),
            other => {
                let why = other.map_or_else(|failure| failure.message, |status| format!("status {status}"));
                Err(Failure::skipped(format!(
                    "the verbs world does not boot here ({why}):\n{}",
                    said.join("\n")
                )))
            }
        }
    }

    /// Boots it and runs `run.sh` of `directory`, which the guest sees as `/host`. The script's exit status.
    pub(crate) fn run(
        &self,
        directory: &Path,
        limit: Duration,
        on_line: impl FnMut(Stream, &str),
    ) -> Result<u8, Failure> {
        let status = directory.join("status");
        let mut kernel = Command::new(&self.kernel);
        kernel
            .args([
                MEMORY,
                "ncpus=2",
                "seccomp=auto",
                "root=/dev/ram0",
                "con=fd:0,fd:1",
                "ssl=null",
                // Requests that fail are part of the tests: only a kernel in trouble is to be heard.
                "loglevel=2",
            ])
            .arg(format!("initrd={}", self.image.display()))
            .arg(format!("hostdir={}", directory.display()));
        process::stream(&mut kernel, "verbs world", limit, on_line)?;
        let left = std::fs::read_to_string(&status).unwrap_or_default();
        left.trim()
            .parse()
            .map_err(|_| Failure::new("the guest ended without a status"))
    }
}

/// Whether a kernel is there, so that nothing needs to be built.
pub(crate) fn has_kernel() -> Result<bool, Failure> {
    Ok(cache()?.join("verbs-world/linux").exists())
}

/// Where what was made once is kept.
pub(crate) fn cache() -> Result<PathBuf, Failure> {
    match (std::env::var_os("KVTIER_CACHE"), std::env::var_os("HOME")) {
        (Some(directory), _) => Ok(PathBuf::from(directory)),
        (None, Some(home)) => Ok(PathBuf::from(home).join(".cache/kvtier")),
        (None, None) => Err(Failure::usage("neither KVTIER_CACHE nor HOME is set")),
    }
}

/// Whether a program is to be had.
pub(crate) fn is_program(name: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|at| at.join(name).is_file()))
}

/// FNV-1a: names a file, guards nothing.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
