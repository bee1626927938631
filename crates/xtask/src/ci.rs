//! `cargo xtask ci`: everything that must hold, in one table at the end.

use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::built::Built;
use crate::outcome::{Failure, Tally};
use crate::workspace::Workspace;
use crate::{
    Fuzzing, Restart, Simulation, confined, lint, lmcache, process, python, replay, restart, runner, suite, torture,
    verbs_world,
};

/// What a whole run may take; a step that would start later is reported as not run, and that fails.
const BUDGET: Duration = Duration::from_secs(44 * 60);

/// For one step that hands over to a program: its build and its run.
pub(crate) const STEP_LIMIT: Duration = Duration::from_secs(15 * 60);

const SEEDS: u64 = 2000;
const FUZZ_SECONDS: u64 = 20;

type Step<'a> = (&'a str, Box<dyn Fn() -> Result<Tally, Failure> + 'a>);

/// Runs every step, also after one has failed, so that one run tells everything.
pub(crate) fn run(workspace: &Workspace) -> Result<(), Failure> {
    let beside = Beside::begin();
    let steps: Vec<Step<'_>> = vec![
        ("lint", Box::new(|| lint::run(workspace, false))),
        (
            "test",
            Box::new(|| {
                let tested = suite::run(workspace, &[], None);
                beside.build_release(workspace);
                tested
            }),
        ),
        (
            "test python",
            Box::new(|| python::test(workspace).and_then(|tally| suite::verdict(tally, false))),
        ),
        (
            "test lmcache",
            Box::new(|| {
                beside.await_environment();
                suite::run(workspace, &["lmcache".to_owned()], None)
            }),
        ),
        ("test --confined", Box::new(|| confined::run(workspace))),
        (
            "test deploy",
            Box::new(|| suite::run(workspace, &["deploy".to_owned()], None)),
        ),
        (
            "test remote",
            Box::new(|| suite::run(workspace, &["remote".to_owned()], None)),
        ),
        ("test rdma", Box::new(|| rdma(workspace))),
        ("sim", Box::new(|| simulate(workspace, false))),
        ("sim, every mutant", Box::new(|| simulate(workspace, true))),
        ("fuzz wire", Box::new(|| fuzz(workspace, "wire", false))),
        ("fuzz wire, its mutant", Box::new(|| fuzz(workspace, "wire", true))),
        ("fuzz record", Box::new(|| fuzz(workspace, "record", false))),
        ("fuzz record, its mutant", Box::new(|| fuzz(workspace, "record", true))),
        (
            "demo",
            Box::new(|| {
                beside.await_release();
                demo(workspace)
            }),
        ),
        (
            "replay, io_uring or what the machine allows",
            Box::new(|| replay::run(workspace, "auto").map(one)),
        ),
        (
            "replay, threads",
            Box::new(|| replay::run(workspace, "threads").map(one)),
        ),
        (
            "replay, killed in the middle",
            Box::new(|| restart::run(workspace, &Restart::default()).map(one)),
        ),
        ("torture and flips", Box::new(|| torture::check(workspace))),
    ];
    let started = Instant::now();
    let results: Vec<Row> = steps.iter().map(|(name, step)| take(name, step, started)).collect();
    println!();
    for row in &results {
        println!("{row}");
    }
    let tally = total(&results);
    println!(
        "tests of both runs, and one for each check of the other steps, in {} s:",
        started.elapsed().as_secs()
    );
    // The last line of a run, for people and for machines that look for it.
    println!("{tally}");
    match results.iter().find(|row| row.failure.is_some()) {
        None => Ok(()),
        Some(row) => Err(Failure::new(format!("ci: {} failed first", row.name))),
    }
}

/// What goes on beside the steps: half a gigabyte comes while the compiler is busy, and the release is built while suites wait for daemons.
/// How either ends is told by the step that wants it, which does it again where it failed.
struct Beside {
    environment: Mutex<Option<JoinHandle<()>>>,
    release: Mutex<Option<Child>>,
}

impl Beside {
    fn begin() -> Beside {
        let prepare = || drop(lmcache::prepare());
        Beside {
            environment: Mutex::new(Some(std::thread::spawn(prepare))),
            release: Mutex::new(None),
        }
    }

    fn await_environment(&self) {
        if let Some(making) = held(&self.environment).take() {
            let _ = making.join();
        }
    }

    /// Behind everybody else for the processors.
    fn build_release(&self, workspace: &Workspace) {
        let cargo = workspace.cargo();
        let mut nice = Command::new("nice");
        nice.args(["-n", "19"])
            .arg(cargo.get_program())
            .args(["build", "--quiet", "--release"])
            .current_dir(&workspace.root);
        for (name, value) in cargo.get_envs() {
            match value {
                Some(value) => nice.env(name, value),
                None => nice.env_remove(name),
            };
        }
        let quiet = nice.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        *held(&self.release) = quiet.spawn().ok();
    }

    fn await_release(&self) {
        if let Some(mut building) = held(&self.release).take() {
            let _ = building.wait();
        }
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if let Some(mut building) = held(&self.release).take() {
            process::kill_tree(&mut building);
        }
    }
}

fn held<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the kernel of the verbs world was made before: to build it takes as long as the rest of a run.
fn rdma(workspace: &Workspace) -> Result<Tally, Failure> {
    if verbs_world::has_kernel()? {
        return suite::run(workspace, &["rdma".to_owned()], None);
    }
    println!("not run: no kernel of the verbs world in the cache: cargo xtask test rdma builds one");
    Ok(Tally::default())
}

/// How one step ended.
struct Row {
    name: String,
    tally: Tally,
    failure: Option<String>,
    seconds: u64,
}

impl std::fmt::Display for Row {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = if self.failure.is_none() { "ok" } else { "FAILED" };
        write!(
            formatter,
            "{verdict:<7} {:>5} s  {:<44} {}",
            self.seconds, self.name, self.tally
        )?;
        if let Some(message) = &self.failure {
            write!(
                formatter,
                "\n                 {}",
                message.replace('\n', "\n                 ")
            )?;
        }
        Ok(())
    }
}

fn take(name: &str, step: &dyn Fn() -> Result<Tally, Failure>, started: Instant) -> Row {
    println!("\n=== {name}");
    let begun = Instant::now();
    let result = if started.elapsed() < BUDGET {
        step()
    } else {
        Err(Failure::new(format!(
            "not run: the {} minutes of a whole run are over",
            BUDGET.as_secs() / 60
        )))
    };
    let (tally, failure) = match result {
        Ok(tally) => (tally, None),
        Err(failure) => (
            Tally {
                failed: 1,
                ..Tally::default()
            },
            Some(failure.message),
        ),
    };
    if let Some(message) = &failure {
        println!("{name}: {message}");
    }
    Row {
        name: name.to_owned(),
        tally,
        failure,
        seconds: begun.elapsed().as_secs(),
    }
}

fn total(rows: &[Row]) -> Tally {
    let mut total = Tally::default();
    rows.iter().for_each(|row| total += row.tally);
    total
}

/// A step that is one check.
fn one((): ()) -> Tally {
    Tally {
        passed: 1,
        ..Tally::default()
    }
}

fn simulate(workspace: &Workspace, mutants: bool) -> Result<Tally, Failure> {
    let simulation = Simulation {
        seeds: Some(SEEDS),
        mutants,
        ..Simulation::default()
    };
    // With the optimisation of the tests: less than it takes to build it in release.
    let built = Built::all(workspace)?;
    let mut command = Command::new(built.program("kvtier-sim")?);
    command.current_dir(&workspace.root);
    process::succeed(runner::simulator(&mut command, &simulation), "sim", STEP_LIMIT).map(one)
}

fn fuzz(workspace: &Workspace, target: &str, mutant: bool) -> Result<Tally, Failure> {
    let fuzzing = Fuzzing {
        target: target.to_owned(),
        seconds: FUZZ_SECONDS,
        seed: 1,
        mutant,
    };
    let built = Built::all(workspace)?;
    let mut command = Command::new(built.program(&format!("fuzz_{target}"))?);
    process::succeed(runner::fuzzer(&mut command, &fuzzing), "fuzz", STEP_LIMIT).map(one)
}

/// A newcomer's first command, which also builds what the replays use.
fn demo(workspace: &Workspace) -> Result<Tally, Failure> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--release"]);
    process::succeed(&mut cargo, "release build", STEP_LIMIT)?;
    let mut cargo = workspace.cargo();
    cargo.args(["run", "--quiet", "--release", "--", "demo"]);
    process::succeed(&mut cargo, "demo", STEP_LIMIT).map(one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_counts_as_one_failure_and_keeps_its_words() {
        let row = take("lint", &|| Err(Failure::new("three\nviolations")), Instant::now());
        assert_eq!(
            row.tally,
            Tally {
                passed: 0,
                failed: 1,
                skipped: 0
            }
        );
        assert!(row.to_string().contains("FAILED"));
        assert!(row.to_string().contains("violations"));
    }

    #[test]
    fn tallies_add_up_over_the_steps() {
        let passed = take(
            "a",
            &|| {
                Ok(Tally {
                    passed: 7,
                    failed: 0,
                    skipped: 2,
                })
            },
            Instant::now(),
        );
        let failed = take("b", &|| Err(Failure::new("x")), Instant::now());
        assert_eq!(
            total(&[passed, failed]),
            Tally {
                passed: 7,
                failed: 1,
                skipped: 2
            }
        );
    }

    #[test]
    fn a_step_past_the_budget_is_not_run_and_fails() {
        let Some(started) = Instant::now().checked_sub(BUDGET + Duration::from_secs(1)) else {
            eprintln!("skipped: budget of a run: this machine has been up for less than that");
            return;
        };
        let row = take("late", &|| unreachable!("it is too late to start"), started);
        assert!(row.failure.is_some_and(|message| message.contains("not run")));
    }
}
