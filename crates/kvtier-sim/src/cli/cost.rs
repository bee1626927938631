use std::io::{self, Write};

use super::Failure;
use crate::cost::{CostRow, CostWorld, SEEDS, is_reference_trace, judge, simulate};
use crate::trace::TraceRequest;

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct CostArgs {
    /// Whose requests.
    pub requests: Vec<TraceRequest>,
    /// Worlds in place of ours.
    pub worlds: Option<Vec<CostWorld>>,
    /// Only the worlds of these names; empty means all.
    pub only: Vec<String>,
    /// Seeds in place of ours; empty means ours.
    pub seeds: Vec<u64>,
    /// One JSON array of rows instead of a table.
    pub json: bool,
    /// Say how far it is.
    pub progress: bool,
}

/// Runs what `args` say and writes a row for each world and plan to `target`. Of our worlds, seeds and the reference trace the figures
/// are held to their bounds; what is beyond one is told to `progress`.
///
/// # Errors
/// [`Failure::Found`] where a figure is beyond its bound, after the report was written.
pub fn run_cost(args: &CostArgs, target: &mut dyn Write, progress: &mut dyn Write) -> Result<(), Failure> {
    let mut worlds = args.worlds.clone().unwrap_or_else(CostWorld::all);
    if let Some(unknown) = args
        .only
        .iter()
        .find(|name| worlds.iter().all(|world| world.name != **name))
    {
        let known: Vec<&str> = worlds.iter().map(|world| world.name.as_str()).collect();
        return Err(Failure::Usage(format!(
            "no world is called {unknown}; there are {}",
            known.join(", ")
        )));
    }
    worlds.retain(|world| args.only.is_empty() || args.only.contains(&world.name));
    let seeds = if args.seeds.is_empty() { &SEEDS[..] } else { &args.seeds };
    let rows = simulate(&worlds, seeds, &args.requests, |world| {
        if args.progress {
            // Progress that cannot be shown is no reason to stop.
            let _ = writeln!(progress, "{world}");
        }
    });
    if args.json {
        write_json(&rows, target)?;
    } else {
        write_table(&rows, target)?;
    }
    if args.worlds.is_some() || !args.seeds.is_empty() || !is_reference_trace(&rows) {
        writeln!(
            progress,
            "not held to any bound: other worlds, seeds or requests than the reference"
        )?;
        return Ok(());
    }
    let beyond = judge(&rows);
    for sentence in &beyond {
        writeln!(progress, "{sentence}")?;
    }
    if beyond.is_empty() { Ok(()) } else { Err(Failure::Found) }
}

/// An array with a row a line: for programs, and still to be read.
fn write_json(rows: &[CostRow], target: &mut dyn Write) -> Result<(), Failure> {
    for (index, row) in rows.iter().enumerate() {
        let row = serde_json::to_string(row).map_err(io::Error::from)?;
        writeln!(target, "{}{row}", if index == 0 { "[" } else { "," })?;
    }
    writeln!(target, "{}", if rows.is_empty() { "[]" } else { "]" })?;
    Ok(())
}

fn write_table(rows: &[CostRow], target: &mut dyn Write) -> Result<(), Failure> {
    writeln!(
        target,
        "{:<22} {:<13} {:>9} {:>9} {:>7} {:>6} {:>8} {:>7} {:>8} {:>9} {:>7}",
        "world", "plan", "mean_s", "regret", "harmed", "flips", "probes", "calibr.", "settle_s", "ttft_s", "fetched"
    )?;
    let or_dash = |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
    for row in rows {
        writeln!(
            target,
            "{:<22} {:<13} {:>9.3} {:>9.4} {:>7.4} {:>6.2} {:>8.5} {:>7} {:>8} {:>9.3} {:>7.3}",
            row.world,
            row.plan,
            row.mean_s,
            row.regret,
            row.harmed,
            row.flips_per_min,
            row.probe_share,
            or_dash(row.calibration_error, 3),
            or_dash(row.settle_s, 1),
            row.ttft_mean_s,
            row.fetched,
        )?;
    }
    Ok(())
}
