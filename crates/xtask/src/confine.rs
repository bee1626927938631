//! Giving up rights for good: what a container or an ordinary account would deny.
//!
//! [`become_program`] is the inner step of `cargo xtask test --confined`; [`probe`] runs behind it and reports whether
//! the confinement took.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use io_uring::IoUring;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, getuid, setrlimit};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use crate::outcome::Failure;
use crate::seccomp::Profile;

/// Lockable memory of an ordinary process on many systems.
pub(crate) const MEMLOCK_BYTES: u64 = 64 * 1024;

/// `nobody` and `nogroup` on Debian; what matters is that nothing belongs to it.
pub(crate) const STRANGER: u32 = 65534;

/// io_uring_setup, io_uring_enter, io_uring_register: the same numbers on every architecture.
const IO_URING_CALLS: [i64; 3] = [425, 426, 427];

/// Limits lockable memory, denies io_uring with EPERM, drops root and every group, and becomes the program. Returns
/// only on failure.
pub(crate) fn become_program(program: &[OsString]) -> Result<(), Failure> {
    let Some((program, arguments)) = program.split_first() else {
        return Err(Failure::usage("confine -- PROGRAM [ARGUMENT]…"));
    };
    let limit = Some(MEMLOCK_BYTES);
    setrlimit(
        Resource::Memlock,
        Rlimit {
            current: limit,
            maximum: limit,
        },
    )
    .map_err(|error| Failure::new(format!("cannot limit lockable memory: {error}")))?;
    // The filter also sets no_new_privs, so that nothing below regains what is dropped here.
    seccompiler::apply_filter(&io_uring_filter()?)
        .map_err(|error| Failure::new(format!("cannot install the seccomp filter: {error}")))?;
    let mut command = Command::new(program);
    command.args(arguments);
    if getuid().is_root() {
        // Dropping root this way also clears the supplementary groups.
        command.uid(STRANGER).gid(STRANGER);
    }
    Err(Failure::new(format!(
        "cannot become {}: {}",
        program.display(),
        command.exec()
    )))
}

/// Becomes the program with nothing but the system calls of a profile. Returns only on failure.
pub(crate) fn become_profiled(program: &[OsString], profile: &Path) -> Result<(), Failure> {
    let Some((program, arguments)) = program.split_first() else {
        return Err(Failure::usage("confine --profile FILE -- PROGRAM [ARGUMENT]…"));
    };
    Profile::read(profile)?.apply()?;
    let error = Command::new(program).args(arguments).exec();
    Err(Failure::new(format!("cannot become {}: {error}", program.display())))
}

fn io_uring_filter() -> Result<BpfProgram, Failure> {
    let broken = |error: &dyn std::fmt::Display| Failure::new(format!("seccomp filter: {error}"));
    let architecture = std::env::consts::ARCH
        .try_into()
        .map_err(|error: seccompiler::BackendError| broken(&error))?;
    let calls: BTreeMap<i64, _> = IO_URING_CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let denied = SeccompAction::Errno(Errno::PERM.raw_os_error().unsigned_abs());
    SeccompFilter::new(calls, SeccompAction::Allow, denied, architecture)
        .and_then(BpfProgram::try_from)
        .map_err(|error| broken(&error))
}

/// Prints what this process may not do; fails unless that is everything [`become_program`] promises.
pub(crate) fn probe() -> Result<(), Failure> {
    let ring = IoUring::new(4)
        .map(drop)
        .map_err(|error| error.raw_os_error().unwrap_or_default());
    let memlock = getrlimit(Resource::Memlock);
    let status = std::fs::read_to_string("/proc/self/status")?;
    let missing = missing_confinement(ring, memlock.maximum, &status);
    if missing.is_empty() {
        println!(
            "confined: io_uring EPERM, lockable memory {MEMLOCK_BYTES} B, uid {}",
            getuid().as_raw()
        );
        Ok(())
    } else {
        Err(Failure::new(format!("not confined: {}", missing.join("; "))))
    }
}

/// What is not denied though it should be, in words.
fn missing_confinement(ring: Result<(), i32>, memlock_max: Option<u64>, status: &str) -> Vec<String> {
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let mut missing = Vec::new();
    if ring != Err(Errno::PERM.raw_os_error()) {
        missing.push(format!("io_uring_setup gave {ring:?} instead of EPERM"));
    }
    if memlock_max != Some(MEMLOCK_BYTES) {
        missing.push(format!(
            "lockable memory is {memlock_max:?} B instead of {MEMLOCK_BYTES}"
        ));
    }
    for (name, wanted) in [("NoNewPrivs", "1"), ("Seccomp", "2")] {
        if field(name) != wanted {
            missing.push(format!("{name} is {:?} instead of {wanted:?}", field(name)));
        }
    }
    let ids = field("Uid");
    if ids.is_empty() || ids.split_whitespace().any(|id| id == "0") {
        missing.push(format!("it runs as root: uids {ids:?}"));
    }
    if field("Groups").split_whitespace().any(|group| group == "0") {
        missing.push("it is in the group of root".to_owned());
    }
    let capabilities = field("CapEff");
    if capabilities.is_empty() || capabilities.chars().any(|digit| digit != '0') {
        missing.push(format!("it has capabilities {capabilities:?}"));
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFINED: &str =
        "Uid:\t65534\t65534\t65534\t65534\nGroups:\t\nNoNewPrivs:\t1\nSeccomp:\t2\nCapEff:\t0000000000000000\n";
    const DENIED: Result<(), i32> = Err(1);
    const MEMLOCK: Option<u64> = Some(MEMLOCK_BYTES);

    #[test]
    fn a_confined_process_lacks_nothing() {
        assert_eq!(missing_confinement(DENIED, MEMLOCK, CONFINED), Vec::<String>::new());
    }

    #[test]
    fn each_right_that_was_not_given_up_is_reported() {
        let count = |ring, memlock, status: &str| missing_confinement(ring, memlock, status).len();
        assert_eq!(count(Ok(()), MEMLOCK, CONFINED), 1, "io_uring works");
        assert_eq!(
            count(Err(38), MEMLOCK, CONFINED),
            1,
            "io_uring is absent, which is not the filter's doing"
        );
        assert_eq!(count(DENIED, None, CONFINED), 1, "lockable memory is unlimited");
        assert_eq!(
            count(DENIED, MEMLOCK, &CONFINED.replace("NoNewPrivs:\t1", "NoNewPrivs:\t0")),
            1
        );
        assert_eq!(
            count(DENIED, MEMLOCK, &CONFINED.replace("Seccomp:\t2", "Seccomp:\t0")),
            1
        );
        assert_eq!(
            count(DENIED, MEMLOCK, &CONFINED.replace("\t65534\n", "\t0\n")),
            1,
            "saved uid 0"
        );
        assert_eq!(
            count(DENIED, MEMLOCK, &CONFINED.replace("Groups:\t", "Groups:\t0 27")),
            1
        );
        assert_eq!(count(DENIED, MEMLOCK, &CONFINED.replace("CapEff:\t0", "CapEff:\t3")), 1);
        assert_eq!(count(DENIED, MEMLOCK, ""), 4, "an unreadable status proves nothing");
    }

    #[test]
    fn the_filter_compiles_for_this_machine() {
        assert!(!io_uring_filter().expect("a supported architecture").is_empty());
    }
}
