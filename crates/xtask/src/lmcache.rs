//! `cargo xtask test lmcache` and `cargo xtask bench lmcache`: the adapter in the real LMCache.
//!
//! LMCache, torch and what they need are pinned and installed once into an environment that is kept. torch's wheel wants
//! CUDA's libraries, gigabytes that a machine without a GPU has no use for: stubs stand in for them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::built::Built;
use crate::outcome::{Failure, Tally};
use crate::process;
use crate::suite::together;
use crate::workspace::Workspace;

/// Every package with its version, as `pip freeze` prints them.
const PINS: &str = include_str!("lmcache/requirements.txt");
const STUBS: &str = include_str!("lmcache/stubs.py");
const MATURIN: &str = "maturin==1.16.0";
/// A rival that LMCache ships apart.
const RAW_BLOCK: &str = "lmcache-rust-raw-block-io==0.5.7rc2";

/// Half a gigabyte of torch over a slow line.
const INSTALL_LIMIT: Duration = Duration::from_secs(30 * 60);
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);
const SUITE_LIMIT: Duration = Duration::from_secs(15 * 60);
const BENCH_LIMIT: Duration = Duration::from_secs(60 * 60);

/// Upstream's tests of its mock adapter, within its source archive; and the one of them that measures the mock's own delay.
const UPSTREAM: &str = "tests/v1/distributed/test_mock_l2_adapter.py";
const UPSTREAM_DELAY: &str = "test_store_completion_is_delayed_by_bandwidth";
const UPSTREAM_TESTS: u64 = 43;

/// Runs upstream's adapter tests, our own, and LMCache's acceptance run, each against real daemons.
pub(crate) fn test(workspace: &Workspace) -> Result<Tally, Failure> {
    let environment = Environment::prepare()?;
    let programs = environment.install(workspace, Build::Test)?;
    let upstream = environment.tests().join(UPSTREAM);
    let without_delay = format!("not {UPSTREAM_DELAY}");
    let first = environment.pytest(
        workspace,
        &programs,
        "upstream's adapter tests",
        &[
            "-p".into(),
            "upstream".into(),
            upstream.into(),
            "-k".into(),
            without_delay.into(),
        ],
    );
    // Some may not have been found: then those that ran say little.
    let first = first.and_then(|counted| match counted.passed + counted.skipped {
        UPSTREAM_TESTS => Ok(counted),
        _ => Err(Failure::new(format!(
            "upstream's tests: {counted}, but {UPSTREAM_TESTS} were to run"
        ))),
    });
    // Ours run whatever became of those.
    let second = environment.pytest(workspace, &programs, "our tests in LMCache", &[".".into()]);
    let tally = together(vec![first, second])?;
    println!("{tally}");
    if tally.skipped > 0 {
        return Err(Failure::skipped("a suite named on the command line skipped a part"));
    }
    Ok(tally)
}

/// Makes the environment that the suite needs, where it is not there.
pub(crate) fn prepare() -> Result<(), Failure> {
    Environment::prepare().map(drop)
}

/// LMCache's own benchmark over adapters in turn.
pub(crate) fn bench(workspace: &Workspace, arguments: &[String]) -> Result<(), Failure> {
    let environment = Environment::prepare()?;
    let programs = environment.install(workspace, Build::Measure)?;
    environment.pip(&["install", "--quiet", "--no-deps", RAW_BLOCK])?;
    let mut python = environment.python();
    python
        .arg(workspace.root.join("ffi/python/benches/lmcache_l2.py"))
        .args(arguments)
        .env("KVTIER_BIN", programs);
    process::succeed(&mut python, "bench lmcache", BENCH_LIMIT)
}

/// For tests the code is optimised a little and built soon; for figures it is what ships.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Build {
    Test,
    Measure,
}

/// A Python environment with LMCache in it.
struct Environment {
    directory: PathBuf,
}

impl Environment {
    /// The environment of these pins, made if it is not there.
    fn prepare() -> Result<Environment, Failure> {
        let cache = match std::env::var_os("KVTIER_CACHE") {
            Some(directory) => PathBuf::from(directory),
            None => match std::env::var_os("HOME") {
                Some(home) => PathBuf::from(home).join(".cache/kvtier"),
                None => return Err(Failure::usage("neither KVTIER_CACHE nor HOME is set")),
            },
        };
        let environment = Environment {
            directory: cache.join(format!("lmcache-{:016x}", digest([PINS, MATURIN].concat().as_bytes()))),
        };
        if !environment.ready().is_file() {
            environment.make()?;
        }
        Ok(environment)
    }

    fn ready(&self) -> PathBuf {
        self.directory.join("ready")
    }

    fn program(&self, name: &str) -> PathBuf {
        self.directory.join("bin").join(name)
    }

    /// Where upstream's tests lie; they are not part of its wheel.
    fn tests(&self) -> PathBuf {
        self.directory.join("upstream")
    }

    fn make(&self) -> Result<(), Failure> {
        println!("making {} (half a gigabyte to fetch)", self.directory.display());
        std::fs::create_dir_all(&self.directory)?;
        let mut venv = Command::new(base_python()?);
        process::succeed(
            venv.args(["-m", "venv", "--clear"]).arg(&self.directory),
            "venv",
            INSTALL_LIMIT,
        )?;
        let (pins, stubs) = (self.directory.join("requirements.txt"), self.directory.join("stubs.py"));
        std::fs::write(&pins, PINS)?;
        std::fs::write(&stubs, STUBS)?;
        let pins = pins.display().to_string();
        self.pip(&["install", "--quiet", "--no-deps", "--requirement", &pins])?;
        self.pip(&["install", "--quiet", "--no-deps", MATURIN])?;
        let mut packages = self.python();
        packages.args(["-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]);
        let packages = String::from_utf8_lossy(&packages.output()?.stdout).trim().to_owned();
        process::succeed(self.python().arg(&stubs).arg(packages), "stub libraries", INSTALL_LIMIT)?;
        self.fetch_upstream_tests()?;
        let mut imports = self.python();
        imports.args(["-c", "import torch, lmcache, lmcache.lmcache_native"]);
        process::succeed(&mut imports, "importing lmcache", INSTALL_LIMIT)?;
        std::fs::write(self.ready(), "")?;
        Ok(())
    }

    /// pip unpacks the source archive to ask for its metadata, which needs a compiler for GPUs and fails: what it unpacked
    /// is kept all the same.
    fn fetch_upstream_tests(&self) -> Result<(), Failure> {
        let lmcache = PINS.lines().find(|line| line.starts_with("lmcache=="));
        let lmcache = lmcache.ok_or_else(|| Failure::new("lmcache is not pinned"))?;
        let work = tempfile::Builder::new().prefix("kvtier-lmcache-").tempdir()?;
        let mut pip = self.python();
        pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--no-clean"])
            .args(["--no-build-isolation", "--no-binary", "lmcache", lmcache])
            .current_dir(work.path())
            .env("TMPDIR", work.path());
        process::stream(&mut pip, "pip download", INSTALL_LIMIT, |_, _| {})?;
        let found = find(work.path(), UPSTREAM, 4)
            .ok_or_else(|| Failure::new(format!("the source archive of {lmcache} has no {UPSTREAM}")))?;
        let target = self.tests().join(UPSTREAM);
        std::fs::create_dir_all(target.parent().unwrap_or(&self.directory))?;
        std::fs::copy(found, target)?;
        Ok(())
    }

    fn python(&self) -> Command {
        let mut python = Command::new(self.program("python"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut paths = vec![self.directory.join("bin")];
        paths.extend(std::env::split_paths(&path));
        python
            .env("PATH", std::env::join_paths(paths).unwrap_or(path))
            .env("VIRTUAL_ENV", &self.directory)
            .env_remove("PYTHONPATH")
            // It reports its use to a server otherwise.
            .env("LMCACHE_TRACK_USAGE", "false")
            .env("LMCACHE_DISABLE_BANNER", "1");
        python
    }

    fn pip(&self, arguments: &[&str]) -> Result<(), Failure> {
        process::succeed(self.python().args(["-m", "pip"]).args(arguments), "pip", INSTALL_LIMIT)
    }

    /// Builds the programs and the wheel, and installs the wheel. Where the programs are.
    fn install(&self, workspace: &Workspace, build: Build) -> Result<PathBuf, Failure> {
        let programs = match build {
            Build::Test => Built::daemon(workspace)?.directory()?,
            Build::Measure => {
                let mut cargo = workspace.cargo();
                cargo.args(["build", "--release", "--package", "kv-daemon"]);
                process::succeed(&mut cargo, "kv-daemon", BUILD_LIMIT)?;
                workspace.target_directory()?.join("release")
            }
        };
        let wheels = tempfile::Builder::new().prefix("kvtier-wheel-").tempdir()?;
        let mut maturin = self.python();
        maturin
            .args(["-m", "maturin", "build", "--quiet", "--interpreter", "python"])
            .arg("--manifest-path")
            .arg(workspace.root.join("ffi/python/Cargo.toml"))
            .arg("--out")
            .arg(wheels.path());
        if build == Build::Measure {
            maturin.arg("--release");
        }
        process::succeed(&mut maturin, "the wheel", BUILD_LIMIT)?;
        let wheel = std::fs::read_dir(wheels.path())?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .ok_or_else(|| Failure::new("maturin left no wheel"))?;
        let wheel = wheel.display().to_string();
        self.pip(&["install", "--quiet", "--no-deps", "--force-reinstall", &wheel])?;
        Ok(programs)
    }

    fn pytest(
        &self,
        workspace: &Workspace,
        programs: &Path,
        name: &str,
        arguments: &[OsString],
    ) -> Result<Tally, Failure> {
        println!("\n=== {name}");
        let report = tempfile::Builder::new().prefix("kvtier-junit-").tempdir()?;
        let report = report.path().join("report.xml");
        let tests = workspace.root.join("ffi/python/tests/lmcache");
        let mut pytest = self.python();
        pytest
            .args([
                "-m",
                "pytest",
                "--verbose",
                "--timeout",
                "300",
                "-p",
                "no:cacheprovider",
            ])
            .args(["--disable-warnings", "--show-capture=no"])
            .arg(format!("--junit-xml={}", report.display()))
            .args(arguments)
            .current_dir(&tests)
            .env("PYTHONPATH", &tests)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("KVTIER_BIN", programs);
        let mut failures = String::new();
        let status = process::stream(&mut pytest, name, SUITE_LIMIT, |_, line| {
            println!("{line}");
            if ["FAILED ", "ERROR "].iter().any(|word| line.starts_with(word)) && line.contains("::") {
                failures.push('\n');
                failures.push_str(line);
            }
        })?;
        let tally = counts(&std::fs::read_to_string(&report).unwrap_or_default())
            .ok_or_else(|| Failure::new(format!("{name}: {status}, and no report")))?;
        if !status.success() && tally.failed == 0 {
            return Err(Failure::new(format!("{name}: {status}")));
        }
        if tally.failed > 0 {
            return Err(Failure::new(format!("{name}: {tally}{failures}")));
        }
        Ok(tally)
    }
}

/// LMCache's libraries are built for this version.
fn base_python() -> Result<&'static str, Failure> {
    ["python3.11", "python3"]
        .into_iter()
        .find(|name| {
            let asked = Command::new(name)
                .args(["-c", "import sys; sys.exit(sys.version_info[:2] != (3, 11))"])
                .status();
            asked.is_ok_and(|status| status.success())
        })
        .ok_or_else(|| Failure::skipped("the suite `lmcache` needs Python 3.11 with venv"))
}

/// The totals of a JUnit report: attributes of its first `testsuite`.
fn counts(report: &str) -> Option<Tally> {
    let start = report.find("<testsuite ")?;
    let head = &report[start..start + report[start..].find('>')?];
    let number = |name: &str| -> Option<u64> {
        let start = head.find(&format!(" {name}=\""))? + name.len() + 3;
        head[start..].split('"').next()?.parse().ok()
    };
    let failed = number("failures")? + number("errors")?;
    let skipped = number("skipped")?;
    Some(Tally {
        passed: number("tests")?.saturating_sub(failed + skipped),
        failed,
        skipped,
    })
}

/// A file by the end of its path, so many directories below `directory` at most.
fn find(directory: &Path, end: &str, depth: usize) -> Option<PathBuf> {
    let here = directory.join(end);
    if here.is_file() {
        return Some(here);
    }
    let below = std::fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path());
    below
        .filter(|path| depth > 0 && path.is_dir())
        .find_map(|path| find(&path, end, depth - 1))
}

/// FNV-1a: names a directory, guards nothing.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_counted_by_its_first_suite() {
        let report = r#"<?xml version="1.0"?><testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10" time="1.0"><testcase/></testsuite></testsuites>"#;
        let tally = Tally {
            passed: 4,
            failed: 3,
            skipped: 3,
        };
        assert_eq!(counts(report), Some(tally));
        assert_eq!(counts("no report"), None);
    }

    #[test]
    fn every_package_is_pinned() {
        let loose: Vec<&str> = PINS.lines().filter(|line| !line.contains("==")).collect();
        assert!(loose.is_empty(), "{loose:?}");
    }
}
