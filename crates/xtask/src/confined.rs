//! `cargo xtask test --confined`: every test program once more, as an ordinary user on a machine that denies io_uring
//! and locks 64 KiB of memory at most.
//!
//! The programs are built first and copied to where that user may read them; the source tree and the build directory
//! may be closed to it. Documentation tests need the compiler and run only unconfined.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::built::Built;
use crate::confine::STRANGER;
use crate::outcome::{Failure, Tally};
use crate::process;
use crate::suite::Report;
use crate::workspace::Workspace;
use rustix::process::getuid;

const PROGRAM_LIMIT: Duration = Duration::from_secs(10 * 60);

/// Builds, copies, proves the confinement, runs.
pub(crate) fn run(workspace: &Workspace) -> Result<Tally, Failure> {
    let built = Built::all(workspace)?;
    let binaries = [built.program("kv-daemon")?, built.program("kvctl")?];

    // Short: the path of a Unix socket below it must stay under 108 bytes.
    let stage = tempfile::Builder::new().prefix("kvc-").tempdir()?;
    fs::set_permissions(stage.path(), Permissions::from_mode(0o755))?;
    let room = Room::furnish(stage.path())?;
    for (binary, name) in binaries.into_iter().zip(["kv-daemon", "kvctl"]) {
        room.copy(binary, name)?;
    }
    let xtask = room.copy(Path::new("/proc/self/exe"), "xtask")?;

    let mut probe = room.confined(&xtask, &xtask);
    probe.args(["confine", "--probe"]);
    process::succeed(&mut probe, "proof of confinement", PROGRAM_LIMIT).map_err(|failure| {
        Failure::new(format!(
            "{} (is {} open to other users?)",
            failure.message,
            stage.path().display()
        ))
    })?;

    if let Some(beside) = built.tests().find_map(|test| test.path.parent()) {
        // The software device, which tests look for beside themselves.
        room.copy(&beside.join("libkvtier_softgpu.so"), "libkvtier_softgpu.so")?;
    }
    let mut tally = Tally::default();
    let mut failed = Vec::new();
    for test in built.tests() {
        println!("     Running {} (confined)", test.name);
        let copy = room.copy(&test.path, "test")?;
        let mut report = Report::default();
        let mut command = room.confined(&xtask, &copy);
        command.arg("--show-output");
        let status = process::stream(&mut command, &test.name, PROGRAM_LIMIT, |stream, line| {
            if report.read(stream, line) {
                println!("{line}");
            }
        });
        if let Err(failure) = &status {
            println!("{}", failure.message);
        }
        report.close(status.as_ref().is_ok_and(std::process::ExitStatus::success));
        report.print_skipped();
        if let Err(failure) = report.ended() {
            failed.push(format!("{}: {}", test.name, failure.message));
        }
        tally += report.tally();
        fs::remove_file(copy)?;
    }
    println!(
        "confined: ran {}, failed {}, skipped {}",
        tally.passed + tally.failed,
        tally.failed,
        tally.skipped
    );
    if tally.failed == 0 {
        Ok(tally)
    } else {
        Err(Failure::new(format!("confined: {tally}: {}", failed.join("\n"))))
    }
}

/// Directories laid out for the stranger: programs it may run, and two places that it owns.
struct Room {
    programs: PathBuf,
    home: PathBuf,
    scratch: PathBuf,
}

impl Room {
    fn furnish(stage: &Path) -> Result<Room, Failure> {
        let room = Room {
            programs: stage.join("bin"),
            home: stage.join("home"),
            scratch: stage.join("t"),
        };
        for directory in [&room.programs, &room.home, &room.scratch] {
            fs::create_dir(directory)?;
            fs::set_permissions(directory, Permissions::from_mode(0o755))?;
        }
        if getuid().is_root() {
            for owned in [&room.home, &room.scratch] {
                chown(owned, Some(STRANGER), Some(STRANGER))?;
            }
        }
        Ok(room)
    }

    fn copy(&self, program: &Path, name: &str) -> Result<PathBuf, Failure> {
        let copy = self.programs.join(name);
        fs::copy(program, &copy)
            .map_err(|error| Failure::new(format!("cannot copy {}: {error}", program.display())))?;
        fs::set_permissions(&copy, Permissions::from_mode(0o755))?;
        Ok(copy)
    }

    /// `xtask confine -- program`, knowing nothing of our environment.
    fn confined(&self, xtask: &Path, program: &Path) -> Command {
        let mut command = Command::new(xtask);
        command
            .args(["confine", "--"])
            .arg(program)
            .stdin(Stdio::null())
            .current_dir(&self.scratch)
            .env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("RUST_BACKTRACE", "1");
        command.env("KVTIER_BIN_DIR", &self.programs);
        for name in [
            "HOME",
            "XDG_STATE_HOME",
            "XDG_CONFIG_HOME",
            "XDG_CACHE_HOME",
            "XDG_DATA_HOME",
        ] {
            command.env(name, &self.home);
        }
        for name in ["TMPDIR", "XDG_RUNTIME_DIR"] {
            command.env(name, &self.scratch);
        }
        command
    }
}
