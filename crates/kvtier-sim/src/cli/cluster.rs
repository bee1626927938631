use std::io::{self, Write};

use serde_json::json;

use super::{Failure, SEEDS_FOR_COUNTS, SimArgs};
use crate::cluster::{ClusterOptions, ClusterReport, run_cluster_seeds};

/// Runs worlds of the cluster as `args` say and writes the report to `target`; progress goes to `progress`, a line at a time.
///
/// # Errors
/// [`Failure`], after the report was written.
pub fn run_cluster(args: &SimArgs, target: &mut dyn Write, progress: &mut dyn Write) -> Result<(), Failure> {
    match &args.mutant {
        Some(name) => mutants(args, name, target, progress),
        None => worlds(args, target, progress),
    }
}

fn worlds(args: &SimArgs, target: &mut dyn Write, progress: &mut dyn Write) -> Result<(), Failure> {
    let seeds = args.first..args.first.saturating_add(args.seeds);
    let report = run_cluster_seeds(seeds, ClusterOptions::default(), &mut |done| {
        if args.progress && done.is_multiple_of(1000) {
            // Progress that cannot be shown is no reason to stop.
            let _ = writeln!(progress, "{done} of {} seeds", args.seeds);
        }
    });
    let missing = if report.seeds >= SEEDS_FOR_COUNTS {
        report.counts.missing()
    } else {
        Vec::new()
    };
    let passed = report.failed.is_none() && missing.is_empty();
    if args.json {
        let failed = report
            .failed
            .as_ref()
            .map(|(seed, outcome)| json!({"seed": seed, "finding": outcome.finding, "log": outcome.log}));
        let row = json!({
            "seeds": report.seeds,
            "actions": report.actions,
            "passed": passed,
            "counts": report.counts.json(),
            "missing": missing,
            "failed": failed,
        });
        writeln!(target, "{row}")?;
    } else {
        as_text(&report, &missing, target)?;
    }
    if passed { Ok(()) } else { Err(Failure::Found) }
}

fn as_text(report: &ClusterReport, missing: &[&str], target: &mut dyn Write) -> io::Result<()> {
    if let Some((seed, outcome)) = &report.failed {
        for line in &outcome.log {
            writeln!(target, "{line}")?;
        }
        let finding = outcome.finding.as_deref().unwrap_or_default();
        writeln!(target, "seed {seed} failed: {finding}")?;
        return writeln!(target, "replay it with: cargo xtask sim -- cluster --seed {seed}");
    }
    write!(target, "{}", report.counts.table())?;
    for missing in missing {
        writeln!(target, "never occurred: {missing}")?;
    }
    let verdict = if missing.is_empty() {
        "no finding"
    } else {
        "but not everything occurred"
    };
    writeln!(target, "{} seeds, {} actions, {verdict}", report.seeds, report.actions)
}

#[cfg(feature = "mutants")]
fn mutants(args: &SimArgs, name: &str, target: &mut dyn Write, progress: &mut dyn Write) -> Result<(), Failure> {
    let all = kvtier_core::cluster::ClusterMutant::ALL;
    let chosen: Vec<&str> = all
        .iter()
        .map(|(known, _)| *known)
        .filter(|known| name == "all" || name == *known)
        .collect();
    if chosen.is_empty() {
        let known: Vec<&str> = all.iter().map(|(known, _)| *known).collect();
        return Err(Failure::Usage(format!(
            "no mutant is called {name}; there are: all, {}",
            known.join(", ")
        )));
    }
    let mut rows = Vec::new();
    for name in &chosen {
        let Some(outcome) = crate::cluster::find_cluster_mutant(name, args.first, args.seeds) else {
            continue;
        };
        if args.progress {
            // Progress that cannot be shown is no reason to stop.
            let _ = writeln!(progress, "{name}: {} seeds", outcome.seeds);
        }
        if !args.json {
            match &outcome.found {
                Some((seed, finding)) => writeln!(
                    target,
                    "{name:<26} found after {:>4} seeds, by seed {seed}: {finding}",
                    outcome.seeds
                )?,
                None => writeln!(target, "{name:<26} NOT FOUND in {} seeds", outcome.seeds)?,
            }
        }
        rows.push(outcome);
    }
    let found = rows.iter().filter(|outcome| outcome.found.is_some()).count();
    let passed = found == rows.len();
    if args.json {
        let rows: Vec<serde_json::Value> = rows
            .iter()
            .map(|outcome| {
                let (seed, finding) = outcome.found.clone().unzip();
                json!({"mutant": outcome.name, "seeds": outcome.seeds, "seed": seed, "finding": finding})
            })
            .collect();
        writeln!(target, "{}", json!({"passed": passed, "mutants": rows}))?;
    } else {
        writeln!(target, "{found} of {} mutants found", rows.len())?;
    }
    if passed { Ok(()) } else { Err(Failure::Found) }
}

#[cfg(not(feature = "mutants"))]
fn mutants(_args: &SimArgs, name: &str, _target: &mut dyn Write, _progress: &mut dyn Write) -> Result<(), Failure> {
    Err(Failure::Usage(format!(
        "no mutant can be planted in this build, {name} neither: build with --features mutants"
    )))
}
