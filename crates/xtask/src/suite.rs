//! `cargo xtask test`: runs the tests, then says by name what was skipped and what was not run.

use std::collections::VecDeque;
use std::time::Duration;

use serde_json::Value;

use crate::deploy;
use crate::gpu;
use crate::lmcache;
use crate::outcome::{Failure, SKIPPED, Tally};
use crate::process::{self, Stream};
use crate::python;
use crate::remote;
use crate::transfer;
use crate::workspace::Workspace;

/// A cold build of everything on two slow cores, and the tests after it.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// Lines of a test that failed that are repeated at the end of a run.
const LAST_WORDS: usize = 24;

/// Runs a suite, on the kind of device that was named, and says what it came to; tests that failed are an error that names them.
type Beside = fn(&Workspace, Option<&str>) -> Result<Tally, Failure>;

/// Suites that need more than cargo. They run when they are named, and a run that names none lists them.
const BESIDE: [(&str, Beside, &str); 7] = [
    (
        "python",
        |workspace, _| python::test(workspace),
        "needs a Python and, at its first run, its package index",
    ),
    (
        "lmcache",
        |workspace, _| lmcache::test(workspace),
        "needs a Python and, at its first run, its package index, half a gigabyte of it",
    ),
    (
        "deploy",
        |workspace, _| deploy::run(workspace),
        "needs root, a Python and, at its first run, its package index",
    ),
    (
        "transfer",
        |workspace, _| transfer::test(workspace),
        "is among the tests of kvtier-transfer; by this name it insists on loopback, shm and tcp",
    ),
    (
        "gpu",
        gpu::test,
        "is among the tests of kvtier-transfer, on a software device; by this name it runs on a real one, too",
    ),
    (
        "remote",
        |workspace, _| remote::test(workspace),
        "needs a Redis server and an S3 server, which its first run takes from Debian's packages",
    ),
    (
        "rdma",
        |workspace, _| transfer::rdma(workspace),
        "boots a kernel of its own, which its first run builds from Debian's source",
    ),
];

/// Runs every suite that cargo alone can run, or insists on the named ones.
pub(crate) fn run(workspace: &Workspace, suites: &[String], device: Option<&str>) -> Result<Tally, Failure> {
    let unknown_device = |device| !matches!(device, "real" | "simulated") || !suites.iter().any(|suite| suite == "gpu");
    if device.is_some_and(unknown_device) {
        return Err(Failure::usage("--device real | simulated belongs to the suite `gpu`"));
    }
    let packages = package_names(&workspace.metadata()?);
    let mut cargo = workspace.cargo();
    cargo.args(["test", "--no-fail-fast"]);
    let mut chosen = Vec::new();
    let mut beside = Vec::new();
    if suites.is_empty() {
        cargo.arg("--workspace");
    }
    for suite in suites {
        if let Some((_, run, _)) = BESIDE.iter().find(|(name, ..)| name == suite) {
            beside.push(run);
        } else if packages.contains(suite) {
            cargo.args(["--package", suite]);
            chosen.push(suite.clone());
        } else {
            return Err(Failure::usage(format!(
                "no suite `{suite}`; there are {} and {}",
                packages.join(", "),
                BESIDE.map(|(name, ..)| name).join(", ")
            )));
        }
    }

    let mut report = Report::default();
    if suites.is_empty() || beside.len() < suites.len() {
        cargo.args(workspace.features(&chosen)?);
        cargo.args(["--", "--show-output"]);
        let status = process::stream(&mut cargo, "tests", LIMIT, |stream, line| {
            if report.read(stream, line) {
                println!("{line}");
            }
        })?;
        report.close(status.success());
    }
    report.print_skipped();
    if suites.is_empty() {
        println!("suites not run:");
        for (name, _, reason) in BESIDE {
            println!("  {name}: {reason}: cargo xtask test {name}");
        }
    }
    // One that fails keeps no other from running; cargo ran nothing where only suites beside it were named.
    let mut ended = vec![report.ended()];
    ended.extend(beside.into_iter().map(|run| run(workspace, device)));
    verdict(together(ended)?, !suites.is_empty())
}

/// The sum of what several runs came to, or everything that failed in any of them.
pub(crate) fn together(ended: Vec<Result<Tally, Failure>>) -> Result<Tally, Failure> {
    let mut tally = Tally::default();
    let mut failures: Vec<Failure> = Vec::new();
    for ended in ended {
        match ended {
            Ok(one) => tally += one,
            Err(failure) => failures.push(failure),
        }
    }
    // A failure before what is only missing here.
    failures.sort_by_key(|failure| failure.code == SKIPPED);
    let Some(first) = failures.first() else {
        return Ok(tally);
    };
    let messages: Vec<&str> = failures.iter().map(|failure| failure.message.as_str()).collect();
    Err(Failure {
        code: first.code,
        message: messages.join("\n"),
    })
}

/// Failures fail; a skipped part of a suite that was asked for by name exits 69.
pub(crate) fn verdict(tally: Tally, named: bool) -> Result<Tally, Failure> {
    if tally.failed > 0 {
        return Err(Failure::new(tally.to_string()));
    }
    if named && tally.skipped > 0 {
        println!("ran {}, skipped {}", tally.passed, tally.skipped);
        return Err(Failure::skipped("a suite named on the command line skipped a part"));
    }
    println!("{tally}");
    Ok(tally)
}

fn package_names(metadata: &Value) -> Vec<String> {
    let packages = metadata["packages"].as_array().map_or(&[][..], Vec::as_slice);
    // One without a program of tests cannot be run as a suite.
    let is_tested = |package: &&Value| {
        let targets = package["targets"].as_array().map_or(&[][..], Vec::as_slice);
        targets.iter().any(|target| target["test"] == true)
    };
    packages
        .iter()
        .filter(is_tested)
        .filter_map(|package| package["name"].as_str())
        .map(str::to_owned)
        .collect()
}

/// What the output of test programs run with `--show-output` says.
#[derive(Default)]
pub(crate) struct Report {
    /// As the programs count: a test that skipped something is among the passed.
    counted: Tally,
    /// Parts that were skipped: the test, and `NAME: REASON`.
    skipped: Vec<(String, String)>,
    failures: Vec<String>,
    /// The last lines that each test which failed printed, under its name.
    last_words: Vec<(String, VecDeque<String>)>,
    current: String,
    within_successes: bool,
    within_failures: bool,
    programs: u64,
    broken: u64,
}

impl Report {
    /// Takes one line; true if a reader wants to see it. The output of tests that passed is read and not shown.
    pub(crate) fn read(&mut self, stream: Stream, line: &str) -> bool {
        if let Some(part) = line.strip_prefix("skipped: ") {
            let test = if self.within_successes {
                self.current.clone()
            } else {
                String::new()
            };
            if !self.skipped.iter().any(|(other, what)| *other == test && what == part) {
                self.skipped.push((test, part.to_owned()));
            }
            return false;
        }
        if stream == Stream::Error {
            return true;
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            self.within_successes = false;
            self.within_failures = false;
            self.programs += 1;
            self.counted += counts(result);
            return true;
        }
        if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
        match line {
            "successes:" => self.within_successes = true,
            "failures:" => {
                self.within_successes = false;
                self.within_failures = true;
                return true;
            }
            _ => {}
        }
        let heading = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"));
        if let Some(test) = heading {
            test.clone_into(&mut self.current);
            if self.within_failures {
                self.last_words.push((test.to_owned(), VecDeque::new()));
            }
        } else if self.within_failures {
            self.hear(line);
        }
        !self.within_successes
    }

    /// The programs have ended. A run that failed without a failed test (it did not build, or a program crashed) is a
    /// failure too.
    pub(crate) fn close(&mut self, success: bool) {
        if (!success && self.counted.failed == 0) || self.programs == 0 {
            self.broken += 1;
        }
    }

    /// A line of the test that failed last. The names of all that failed follow the last of them, indented.
    fn hear(&mut self, line: &str) {
        let is_listed = line
            .strip_prefix("    ")
            .is_some_and(|name| self.failures.iter().any(|failed| failed == name));
        if let Some((_, words)) = self.last_words.last_mut()
            && !line.is_empty()
            && !is_listed
        {
            if words.len() == LAST_WORDS {
                words.pop_front();
            }
            words.push_back(line.to_owned());
        }
    }

    /// What the run came to; failures are an error that names each test and repeats its last words, because of a long run
    /// often only the end is kept.
    pub(crate) fn ended(&self) -> Result<Tally, Failure> {
        let tally = self.tally();
        if tally.failed == 0 {
            return Ok(tally);
        }
        let mut message = tally.to_string();
        for test in &self.failures {
            message.push_str(&format!("\nfailed: {test}"));
            let said = self.last_words.iter().filter(|(name, _)| name == test);
            for line in said.flat_map(|(_, words)| words) {
                message.push_str(&format!("\n  {line}"));
            }
        }
        if self.broken > 0 {
            message.push_str("\nfailed: a run ended badly without naming a test");
        }
        Err(Failure::new(message))
    }

    pub(crate) fn tally(&self) -> Tally {
        let mut tests: Vec<&str> = self
            .skipped
            .iter()
            .map(|(test, _)| test.as_str())
            .filter(|test| !test.is_empty())
            .collect();
        tests.sort_unstable();
        tests.dedup();
        let skipping = u64::try_from(tests.len()).unwrap_or(u64::MAX);
        let nameless = self.skipped.iter().filter(|(test, _)| test.is_empty()).count();
        Tally {
            passed: self.counted.passed.saturating_sub(skipping),
            failed: self.counted.failed + self.broken,
            skipped: self.counted.skipped + skipping + u64::try_from(nameless).unwrap_or(u64::MAX),
        }
    }

    pub(crate) fn print_skipped(&self) {
        for (test, part) in &self.skipped {
            println!(
                "skipped: {part}{}",
                if test.is_empty() {
                    String::new()
                } else {
                    format!(" ({test})")
                }
            );
        }
        for test in &self.failures {
            println!("failed: {test}");
        }
        if self.broken > 0 {
            println!("failed: {} run(s) ended badly without naming a test", self.broken);
        }
    }
}

/// The numbers in `ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s`.
fn counts(result: &str) -> Tally {
    let mut tally = Tally::default();
    for part in result.split(['.', ';']) {
        if let Some((number, word)) = part.trim().split_once(' ') {
            let number = number.parse().unwrap_or(0);
            match word {
                "passed" => tally.passed = number,
                "failed" => tally.failed = number,
                "ignored" => tally.skipped = number,
                _ => {}
            }
        }
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &str, success: bool) -> Report {
        let mut report = Report::default();
        for line in lines.lines() {
            report.read(Stream::Output, line);
        }
        report.close(success);
        report
    }

    const PASSING: &str = "running 3 tests\ntest a ... ok\ntest b ... ok\ntest c ... ok\n\nsuccesses:\n\n\
        ---- b stdout ----\nnoise\nskipped: io_uring: denied\nskipped: huge pages: none reserved\n\nsuccesses:\n    a\n\n\
        test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";

    #[test]
    fn a_test_that_skips_a_part_counts_as_skipped_and_not_as_passed() {
        let report = read(PASSING, true);
        assert_eq!(
            report.tally(),
            Tally {
                passed: 2,
                failed: 0,
                skipped: 1
            }
        );
        assert_eq!(report.skipped.len(), 2);
        assert_eq!(report.skipped[0], ("b".to_owned(), "io_uring: denied".to_owned()));
    }

    #[test]
    fn output_of_tests_that_passed_is_hidden_and_of_those_that_failed_is_shown() {
        let mut report = Report::default();
        let shown: Vec<&str> = PASSING
            .lines()
            .chain(["failures:", "boom"])
            .filter(|line| report.read(Stream::Output, line))
            .collect();
        assert!(!shown.contains(&"noise"));
        assert!(shown.contains(&"test a ... ok"));
        assert!(shown.contains(&"boom"));
    }

    #[test]
    fn failures_of_several_programs_add_up_and_are_named() {
        let second =
            "test x::y ... FAILED\ntest result: FAILED. 1 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out\n";
        let report = read(&format!("{PASSING}{second}"), false);
        assert_eq!(
            report.tally(),
            Tally {
                passed: 3,
                failed: 1,
                skipped: 3
            }
        );
        assert_eq!(report.failures, ["x::y"]);
    }

    #[test]
    fn what_failed_is_repeated_with_its_last_words() {
        let failing = "test x::y ... FAILED\n\nsuccesses:\n\n---- a stdout ----\nnot this\n\nsuccesses:\n    a\n\nfailures:\n\n\
            ---- x::y stdout ----\nthread panicked at here\nleft: 1\n\n\nfailures:\n    x::y\n\n\
            test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let many: String = (0..100).map(|line| format!("line {line}\n")).collect();
        let failing = failing.replace("thread panicked", &format!("{many}thread panicked"));
        let failure = read(&failing, false).ended().expect_err("a test failed");
        let lines: Vec<&str> = failure.message.lines().collect();
        assert_eq!(lines[..2], ["1 passed, 1 failed, 0 skipped", "failed: x::y"]);
        assert_eq!(lines[lines.len() - 2..], ["  thread panicked at here", "  left: 1"]);
        assert_eq!(lines.len(), 2 + LAST_WORDS);
        assert!(!failure.message.contains("not this"));
    }

    #[test]
    fn suites_that_fail_are_told_together_and_one_that_is_missing_after_them() {
        let passed = || Tally {
            passed: 2,
            ..Tally::default()
        };
        assert_eq!(
            together(vec![Ok(passed()), Ok(passed())])
                .map(|tally| tally.passed)
                .ok(),
            Some(4)
        );
        let ended = vec![
            Err(Failure::skipped("no GPU")),
            Ok(passed()),
            Err(Failure::new("a broke")),
            Err(Failure::new("b broke")),
        ];
        let failure = together(ended).expect_err("two broke");
        assert_eq!(
            (failure.message.as_str(), failure.code),
            ("a broke\nb broke\nno GPU", 1)
        );
        assert_eq!(
            together(vec![Err(Failure::skipped("no GPU"))])
                .expect_err("missing")
                .code,
            SKIPPED
        );
    }

    #[test]
    fn a_run_that_ends_badly_or_ran_nothing_is_a_failure() {
        assert_eq!(read(PASSING, false).tally().failed, 1);
        assert_eq!(read("", true).tally().failed, 1);
    }

    #[test]
    fn a_named_suite_that_skips_exits_69_and_an_unnamed_one_does_not() {
        let skipping = Tally {
            passed: 2,
            failed: 0,
            skipped: 1,
        };
        assert_eq!(verdict(skipping, true).expect_err("it skipped").code, 69);
        assert!(verdict(skipping, false).is_ok());
        assert_eq!(
            verdict(Tally { failed: 1, ..skipping }, true)
                .expect_err("a test failed")
                .code,
            1
        );
    }
}
