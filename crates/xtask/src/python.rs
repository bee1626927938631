//! The Python wheel: an environment of pinned packages that is kept between runs, the wheel built and installed into it,
//! and the suite and the bench that use it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use crate::built::Built;
use crate::daemon::Site;
use crate::outcome::{Failure, SKIPPED, Tally};
use crate::process;
use crate::workspace::Workspace;

/// What a suite of the wheel needs besides the wheel, each at one version.
const PINS: [&str; 6] = [
    "maturin==1.16.0",
    "pytest==9.2.0",
    "pluggy==1.7.0",
    "iniconfig==2.3.1",
    "packaging==26.3",
    "pygments==2.21.0",
];

/// The oldest Python that the stable ABI of the wheel allows.
const OLDEST: (u32, u32) = (3, 11);

const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);
const INSTALL_LIMIT: Duration = Duration::from_secs(15 * 60);
const TESTS_LIMIT: Duration = Duration::from_secs(10 * 60);

/// `cargo xtask test python`. Without a Python it is skipped, in words.
pub(crate) fn test(workspace: &Workspace) -> Result<Tally, Failure> {
    let environment = match ready(workspace, Profile::Test) {
        Err(Failure { message, code: SKIPPED }) => {
            println!("{message}");
            return Ok(Tally {
                skipped: 1,
                ..Tally::default()
            });
        }
        environment => environment?,
    };
    let programs = Built::daemon(workspace)?.directory()?;
    let stage = tempfile::Builder::new().prefix("kvp-").tempdir()?;
    let mut pytest = environment.python();
    pytest
        .args(["-m", "pytest", "-rfEs", "--color=no", "-p", "no:cacheprovider"])
        .arg("--basetemp")
        .arg(stage.path().join("t"))
        .arg("ffi/python/tests/client")
        .current_dir(&workspace.root)
        .env("KVTIER_BIN_DIR", &programs);
    let mut report = Report::default();
    let status = process::stream(&mut pytest, "python tests", TESTS_LIMIT, |_, line| {
        report.read(line);
        println!("{line}");
    })?;
    report.close(status.success())
}

/// `cargo xtask bench python`.
pub(crate) fn bench(workspace: &Workspace, arguments: &[String]) -> Result<(), Failure> {
    let environment = ready(workspace, Profile::Release)?;
    let programs = daemon(workspace)?;
    let stage = tempfile::Builder::new().prefix("kvp-").tempdir()?;
    let site = Site {
        programs: &programs,
        directory: stage.path(),
    };
    let daemon = site.serve(&["--host-bytes", "256MiB", "--nvme-bytes", "0"])?;
    let mut python = environment.python();
    python
        .arg(workspace.root.join("ffi/python/benches/client.py"))
        .arg("--socket")
        .arg(site.socket())
        .arg("--echo-server")
        .arg(programs.join("kvctl"))
        .args(arguments);
    let result = process::hand_over(&mut python, "bench python");
    daemon.drain().map_err(|failure| site.explain(failure))?;
    result
}

/// For tests the code is optimised a little and built soon; for figures it is what ships.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Profile {
    Test,
    Release,
}

/// An environment that holds the wheel of this tree.
fn ready(workspace: &Workspace, profile: Profile) -> Result<Environment, Failure> {
    let interpreter = Interpreter::find()?;
    let environment = Environment::make(&interpreter, "python", &PINS)?;
    environment.install_wheel(workspace, profile)?;
    Ok(environment)
}

/// Where the release daemon lies, built.
fn daemon(workspace: &Workspace) -> Result<PathBuf, Failure> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--quiet", "--release", "--package", "kv-daemon", "--bins"]);
    process::succeed_quietly(&mut cargo, "release build", BUILD_LIMIT)?;
    Ok(workspace.target_directory()?.join("release"))
}

/// A Python that can run the wheel and make environments.
pub(crate) struct Interpreter {
    program: PathBuf,
    version: String,
}

impl Interpreter {
    /// The first that is new enough: `KVTIER_PYTHON`, `python3`, or one of the versions by name.
    pub(crate) fn find() -> Result<Interpreter, Failure> {
        let named = std::env::var_os("KVTIER_PYTHON").map(PathBuf::from);
        let versions = (OLDEST.1..=OLDEST.1 + 9).map(|minor| PathBuf::from(format!("python{}.{minor}", OLDEST.0)));
        let candidates = named.into_iter().chain([PathBuf::from("python3")]).chain(versions);
        let mut refused = Vec::new();
        for program in candidates {
            match probe(&program) {
                Ok(version) => return Ok(Interpreter { program, version }),
                Err(Some(reason)) => refused.push(reason),
                Err(None) => {}
            }
        }
        let refused = if refused.is_empty() {
            String::new()
        } else {
            format!(" ({})", refused.join("; "))
        };
        Err(Failure::skipped(format!(
            "skipped: python: no python3 of version {}.{} or newer with the module venv{refused}: install one \
             (apt-get install python3-venv), or name one in KVTIER_PYTHON",
            OLDEST.0, OLDEST.1
        )))
    }
}

/// The version of a usable interpreter; why it is none, unless there is no such program.
fn probe(program: &Path) -> Result<String, Option<String>> {
    let script = "import sys, venv, ensurepip; print(sys.version_info[0], sys.version_info[1], sys.base_prefix)";
    let output = Command::new(program)
        .args(["-I", "-c", script])
        .stdin(Stdio::null())
        .output()
        .map_err(|_| None)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut words = text.split_whitespace();
    let version = words.next().zip(words.next());
    let numbers = version.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    match numbers {
        Some(found) if found >= OLDEST => Ok(text.trim().to_owned()),
        Some((major, minor)) => Err(Some(format!("{} is {major}.{minor}", program.display()))),
        None => Err(Some(format!("{} has no venv", program.display()))),
    }
}

/// A virtual environment of pinned packages, kept between runs. One run at a time has it: another tree's would install its
/// own wheel under the tests of this one.
pub(crate) struct Environment {
    directory: PathBuf,
    /// Its lock goes with the file.
    _lock: File,
}

impl Environment {
    /// The one of these pins, under `KVTIER_CACHE` or `~/.cache/kvtier`: made at the first call, with network, and then used
    /// again.
    pub(crate) fn make(interpreter: &Interpreter, kind: &str, pins: &[&str]) -> Result<Environment, Failure> {
        let digest = digest(interpreter, pins);
        let directory = cache()?.join(format!("{kind}-{digest:016x}"));
        fs::create_dir_all(&directory)?;
        let environment = Environment {
            _lock: lock(&directory)?,
            directory,
        };
        let done = environment.directory.join("ready");
        if !done.exists() {
            eprintln!("making a Python environment in {}", environment.directory.display());
            let venv = environment.directory.join("venv");
            if venv.exists() {
                fs::remove_dir_all(&venv)?;
            }
            let mut python = Command::new(&interpreter.program);
            process::succeed(python.args(["-m", "venv"]).arg(&venv), "venv", INSTALL_LIMIT)?;
            let mut pip = environment.pip();
            pip.args(["install", "--no-deps"]).args(pins);
            process::succeed_quietly(&mut pip, "pip install", INSTALL_LIMIT).map_err(|failure| {
                Failure::new(format!(
                    "{}; packages come from PyPI at the first run: it needs the network, or PIP_INDEX_URL",
                    failure.message
                ))
            })?;
            fs::write(done, pins.join("\n"))?;
        }
        Ok(environment)
    }

    /// Its interpreter, knowing nothing of the caller's Python settings.
    pub(crate) fn python(&self) -> Command {
        let mut command = Command::new(self.directory.join("venv/bin/python"));
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        for name in ["PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV"] {
            command.env_remove(name);
        }
        command
    }

    /// Its installer.
    pub(crate) fn pip(&self) -> Command {
        let mut command = self.python();
        command.args(["-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]);
        command
    }

    /// Builds the wheel of this tree and installs it.
    fn install_wheel(&self, workspace: &Workspace, profile: Profile) -> Result<(), Failure> {
        let wheels = tempfile::Builder::new().prefix("kvw-").tempdir()?;
        let mut maturin = self.python();
        maturin
            .args(["-m", "maturin", "build", "--quiet", "--locked", "--manifest-path"])
            .arg(workspace.root.join("ffi/python/Cargo.toml"))
            .arg("--out")
            .arg(wheels.path())
            .current_dir(&workspace.root);
        if profile == Profile::Release {
            maturin.arg("--release");
        }
        process::succeed_quietly(&mut maturin, "building the wheel", BUILD_LIMIT)?;
        let mut pip = self.pip();
        pip.args(["install", "--no-deps", "--no-index", "--force-reinstall"]);
        for entry in fs::read_dir(wheels.path())? {
            pip.arg(entry?.path());
        }
        process::succeed_quietly(&mut pip, "installing the wheel", INSTALL_LIMIT)
    }
}

/// Waits until no other run has the environment in `directory`.
fn lock(directory: &Path) -> Result<File, Failure> {
    let file = File::create(directory.join("lock"))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        eprintln!("waiting for another run that uses {}", directory.display());
        flock(&file, FlockOperation::LockExclusive).map_err(std::io::Error::from)?;
    }
    Ok(file)
}

/// Where things are kept between runs and outside the tree.
fn cache() -> Result<PathBuf, Failure> {
    if let Some(cache) = std::env::var_os("KVTIER_CACHE") {
        return Ok(cache.into());
    }
    let home = std::env::var_os("HOME").ok_or_else(|| Failure::usage("neither KVTIER_CACHE nor HOME is set"))?;
    Ok(PathBuf::from(home).join(".cache/kvtier"))
}

/// Names an environment: other pins or another interpreter are another one. FNV-1a.
fn digest(interpreter: &Interpreter, pins: &[&str]) -> u64 {
    let words = [interpreter.version.as_str()].into_iter().chain(pins.iter().copied());
    words
        .flat_map(|word| word.bytes().chain([0]))
        .fold(0xcbf2_9ce4_8422_2325, |digest, byte| {
            (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

/// What pytest says at its end.
#[derive(Default)]
pub(crate) struct Report {
    tally: Option<Tally>,
    /// `FAILED tests/x.py::name - what`, and `ERROR` likewise.
    failures: Vec<String>,
}

impl Report {
    pub(crate) fn read(&mut self, line: &str) {
        if let Some(tally) = counts(line) {
            self.tally = Some(tally);
        }
        // `SKIPPED [1] tests/x.py:12: NAME: REASON`, said as all suites say it.
        if let Some((_, reason)) = line.strip_prefix("SKIPPED [").and_then(|rest| rest.split_once(": ")) {
            println!("skipped: {reason}");
        }
        if ["FAILED ", "ERROR "].iter().any(|word| line.starts_with(word)) && line.contains("::") {
            self.failures.push(line.to_owned());
        }
    }

    /// Failures are an error that names them. A run that failed without a failed test, or that ran none, is one too.
    pub(crate) fn close(self, success: bool) -> Result<Tally, Failure> {
        let mut tally = self.tally.unwrap_or_default();
        if tally.failed == 0 && (!success || tally.passed + tally.skipped == 0) {
            tally.failed = 1;
        }
        if tally.failed == 0 {
            return Ok(tally);
        }
        let mut message = tally.to_string();
        for failure in &self.failures {
            message.push_str(&format!("\n{failure}"));
        }
        Err(Failure::new(message))
    }
}

/// The numbers in `=== 1 failed, 12 passed, 2 skipped, 1 error in 3.45s ===`.
fn counts(line: &str) -> Option<Tally> {
    let inner = line.strip_prefix('=')?.trim_matches('=').trim();
    let (results, seconds) = inner.rsplit_once(" in ")?;
    seconds
        .starts_with(|character: char| character.is_ascii_digit())
        .then_some(())?;
    let mut tally = Tally::default();
    for part in results.split(", ") {
        let (number, word) = part.split_once(' ')?;
        let number: u64 = number.parse().ok()?;
        match word {
            "passed" | "xpassed" => tally.passed += number,
            "failed" | "error" | "errors" => tally.failed += number,
            "skipped" | "xfailed" => tally.skipped += number,
            _ => {}
        }
    }
    Some(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(passed: u64, failed: u64, skipped: u64) -> Tally {
        Tally {
            passed,
            failed,
            skipped,
        }
    }

    #[test]
    fn the_last_line_of_pytest_is_counted_and_no_other() {
        let line = "=========== 1 failed, 12 passed, 2 skipped, 3 warnings, 1 error in 3.45s ===========";
        assert_eq!(counts(line), Some(tally(12, 2, 2)));
        assert_eq!(
            counts("====== 7 passed in 63.00s (0:01:03) ======"),
            Some(tally(7, 0, 0))
        );
        for other in [
            "12 passed in 3.45s",
            "===== test session starts =====",
            "=== FAILURES ===",
        ] {
            assert_eq!(counts(other), None, "{other}");
        }
    }

    #[test]
    fn a_run_that_ended_badly_or_ran_nothing_is_a_failure() {
        let close = |line: &str, success| {
            let mut report = Report::default();
            report.read(line);
            report.close(success).map_err(|failure| failure.message)
        };
        assert_eq!(close("= 7 passed in 1.00s =", true), Ok(tally(7, 0, 0)));
        assert_eq!(close("= 7 passed in 1.00s =", false), Err(tally(7, 1, 0).to_string()));
        assert_eq!(close("", true), Err(tally(0, 1, 0).to_string()));
        let failed = close("FAILED tests/x.py::name - assert 1 == 2", false).expect_err("it failed");
        assert!(
            failed.ends_with("\nFAILED tests/x.py::name - assert 1 == 2"),
            "{failed}"
        );
    }

    #[test]
    fn other_pins_or_another_interpreter_are_another_environment() {
        let interpreter = |version: &str| Interpreter {
            program: "python3".into(),
            version: version.to_owned(),
        };
        let first = digest(&interpreter("3 11"), &["a==1", "b==2"]);
        assert_eq!(first, digest(&interpreter("3 11"), &["a==1", "b==2"]));
        assert_ne!(first, digest(&interpreter("3 12"), &["a==1", "b==2"]));
        assert_ne!(first, digest(&interpreter("3 11"), &["a==1b==2"]));
    }

    #[test]
    fn one_run_at_a_time_has_an_environment() {
        let directory = tempfile::tempdir().expect("a directory");
        let held = lock(directory.path()).expect("nobody has it");
        let is_free = || {
            let file = File::create(directory.path().join("lock")).expect("a file");
            flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        };
        assert!(!is_free());
        drop(held);
        assert!(is_free());
    }

    #[test]
    fn what_is_no_python_is_refused_in_words_and_what_is_missing_is_passed_over() {
        assert_eq!(probe(Path::new("a-program-that-does-not-exist")), Err(None));
        let refused = probe(Path::new("true")).expect_err("it prints no version");
        assert!(refused.is_some_and(|reason| reason.contains("true")));
    }
}
