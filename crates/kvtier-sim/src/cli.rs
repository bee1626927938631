//! The simulator's report, for people and for programs.

use std::io::{self, Write};

use serde_json::json;

use crate::runner::{RunOptions, RunReport, run_seeds};

mod cluster;
mod cost;

pub use cluster::run_cluster;
pub use cost::{CostArgs, run_cost};

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimArgs {
    /// How many seeds.
    pub seeds: u64,
    /// The first of them.
    pub first: u64,
    /// Plant this bug and find it; `all` plants one after the other.
    pub mutant: Option<String>,
    /// One JSON object instead of text.
    pub json: bool,
    /// Say how far it is.
    pub progress: bool,
}

impl Default for SimArgs {
    fn default() -> Self {
        SimArgs {
            seeds: 2_000,
            first: 0,
            mutant: None,
            json: false,
            progress: false,
        }
    }
}

/// Why a report is not a success.
#[derive(Debug)]
pub enum Failure {
    /// A world broke a rule, something never occurred, or a planted bug was not found. The report said so.
    Found,
    /// The arguments cannot be; in words.
    Usage(String),
    /// The report could not be written.
    Write(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Write(error)
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Found => write!(formatter, "the simulation failed: see its report"),
            Failure::Usage(reason) => write!(formatter, "{reason}"),
            Failure::Write(error) => write!(formatter, "the report cannot be written: {error}"),
        }
    }
}

impl std::error::Error for Failure {}

/// Below this many seeds it means nothing that something never occurred.
const SEEDS_FOR_COUNTS: u64 = 500;

/// Runs what `args` say and writes the report to `target`; progress goes to `progress`, a line at a time.
///
/// # Errors
/// [`Failure`], after the report was written.
pub fn run(args: &SimArgs, target: &mut dyn Write, progress: &mut dyn Write) -> Result<(), Failure> {
    match &args.mutant {
        Some(name) => mutants(args, name, target, progress),
        None => worlds(args, target, progress),
    }
}

fn worlds(args: &SimArgs, target: &mut dyn Write, progress: &mut dyn Write) -> Result<(), Failure> {
    let mut tell = |done: u64| {
        if args.progress && done.is_multiple_of(100) {
            // Progress that cannot be shown is no reason to stop.
            let _ = writeln!(progress, "{done} of {} seeds", args.seeds);
        }
    };
    let report = run_seeds(
        args.first..args.first.saturating_add(args.seeds),
        RunOptions::default(),
        &mut tell,
    );
    let missing = if report.seeds >= SEEDS_FOR_COUNTS {
        report.counts.missing()
    } else {
        Vec::new()
    };
    let passed = report.failed.is_none() && missing.is_empty();
    if args.json {
        writeln!(target, "{}", as_json(&report, &missing, passed))?;
    } else {
        as_text(&report, &missing, target)?;
    }
    if passed { Ok(()) } else { Err(Failure::Found) }
}

fn as_json(report: &RunReport, missing: &[String], passed: bool) -> serde_json::Value {
    let failed = report
        .failed
        .as_ref()
        .map(|(seed, outcome)| json!({"seed": seed, "finding": outcome.finding, "log": outcome.log}));
    json!({
        "seeds": report.seeds,
        "actions": report.actions,
        "passed": passed,
        "counts": report.counts.json(),
        "missing": missing,
        "failed": failed,
    })
}

fn as_text(report: &RunReport, missing: &[String], target: &mut dyn Write) -> io::Result<()> {
    if let Some((seed, outcome)) = &report.failed {
        for line in &outcome.log {
            writeln!(target, "{line}")?;
        }
        writeln!(
            target,
            "seed {seed} failed: {}",
            outcome.finding.as_deref().unwrap_or_default()
        )?;
        writeln!(target, "replay it with: cargo xtask sim --seed {seed}")?;
        return Ok(());
    }
    write!(target, "{}", report.counts.table())?;
    for missing in missing {
        writeln!(target, "never occurred: {missing}")?;
    }
    writeln!(
        target,
        "{} seeds, {} actions, {}",
        report.seeds,
        report.actions,
        if missing.is_empty() {
            "no finding"
        } else {
            "but not everything occurred"
        }
    )
}

#[cfg(feature = "mutants")]
fn mutants(args: &SimArgs, name: &str, target: &mut dyn Write, progress: &mut dyn Write) -> Result<(), Failure> {
    let known: Vec<&str> = kvtier_core::Mutant::ALL.iter().map(|(name, _)| *name).collect();
    let chosen: Vec<&str> = known
        .iter()
        .copied()
        .filter(|known| name == "all" || name == *known)
        .collect();
    if chosen.is_empty() {
        return Err(Failure::Usage(format!(
            "no mutant is called {name}; there are: all, {}",
            known.join(", ")
        )));
    }
    let mut outcomes = Vec::new();
    for name in chosen {
        let Some(outcome) = crate::runner::find_mutant(name, args.first, args.seeds) else {
            continue;
        };
        if args.progress {
            let _ = writeln!(
                progress,
                "{name}: {}",
                if outcome.found.is_some() { "found" } else { "not found" }
            );
        }
        if !args.json && args.seeds == 1 {
            // One seed with one bug: somebody wants to read how it shows.
            for line in crate::runner::read_along(name, args.first) {
                writeln!(target, "{line}")?;
            }
        }
        if !args.json {
            match &outcome.found {
                Some((seed, finding)) => writeln!(
                    target,
                    "{name:<34} found after {:>4} seeds, by seed {seed}: {finding}",
                    outcome.seeds
                )?,
                None => writeln!(target, "{name:<34} NOT FOUND in {} seeds", outcome.seeds)?,
            }
        }
        outcomes.push(outcome);
    }
    let passed = outcomes.iter().all(|outcome| outcome.found.is_some());
    if args.json {
        let rows: Vec<serde_json::Value> = outcomes
            .iter()
            .map(|outcome| json!({"mutant": outcome.name, "seeds": outcome.seeds, "seed": outcome.found.as_ref().map(|(seed, _)| seed), "finding": outcome.found.as_ref().map(|(_, finding)| finding)}))
            .collect();
        writeln!(target, "{}", json!({"passed": passed, "mutants": rows}))?;
    } else {
        let found = outcomes.iter().filter(|outcome| outcome.found.is_some()).count();
        writeln!(target, "{found} of {} mutants found", outcomes.len())?;
    }
    if passed { Ok(()) } else { Err(Failure::Found) }
}

#[cfg(not(feature = "mutants"))]
fn mutants(_args: &SimArgs, name: &str, _target: &mut dyn Write, _progress: &mut dyn Write) -> Result<(), Failure> {
    Err(Failure::Usage(format!(
        "no mutant can be planted in this build, {name} neither: build with --features mutants"
    )))
}
