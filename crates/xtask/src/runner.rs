//! Commands that build another program of the workspace in release and hand over to it.

use std::process::Command;

use crate::lmcache;
use crate::outcome::Failure;
use crate::process;
use crate::python;
use crate::transfer;
use crate::workspace::Workspace;
use crate::{Fuzzing, Simulation, SimulationKind};

/// The simulator always has its planted bugs compiled in: without naming one, none acts.
pub(crate) fn simulate(workspace: &Workspace, simulation: &Simulation) -> Result<(), Failure> {
    let mut cargo = workspace.cargo();
    cargo.args(["run", "--quiet", "--release", "--package", "kvtier-sim"]);
    cargo.args(["--features", "mutants", "--bin", "kvtier-sim", "--"]);
    process::hand_over(simulator(&mut cargo, simulation), "sim")
}

/// A fuzzer, too, has its planted bug compiled in: without `--mutant` it does not act.
pub(crate) fn fuzz(workspace: &Workspace, fuzzing: &Fuzzing) -> Result<(), Failure> {
    let package = match fuzzing.target.as_str() {
        "record" => "kvtier-storage",
        _ => "kvtier",
    };
    let mut cargo = workspace.cargo();
    cargo.args(["run", "--quiet", "--release", "--package", package]);
    cargo.args(["--features", "fuzz,mutants"]);
    cargo.args(["--example", &format!("fuzz_{}", fuzzing.target), "--"]);
    process::hand_over(fuzzer(&mut cargo, fuzzing), "fuzz")
}

pub(crate) fn bench(workspace: &Workspace, arguments: &[String]) -> Result<(), Failure> {
    let mut cargo = workspace.cargo();
    if let Some((bench @ ("core" | "cost"), more)) = arguments.split_first().map(|(first, more)| (first.as_str(), more))
    {
        cargo.args(["bench", "--package", "kvtier-bench", "--bench", bench, "--"]);
        return process::hand_over(cargo.args(more), "bench");
    }
    if let Some(("python", more)) = arguments.split_first().map(|(first, more)| (first.as_str(), more)) {
        return python::bench(workspace, more);
    }
    if let Some(("lmcache", more)) = arguments.split_first().map(|(first, more)| (first.as_str(), more)) {
        return lmcache::bench(workspace, more);
    }
    if let Some(("verbs", more)) = arguments.split_first().map(|(first, more)| (first.as_str(), more)) {
        return transfer::bench(workspace, more);
    }
    // The measuring program starts kv-daemon, which is built beside it.
    process::hand_over(cargo.args(["build", "--release", "--package", "kv-daemon"]), "build")?;
    let mut cargo = workspace.cargo();
    cargo.args([
        "run",
        "--quiet",
        "--release",
        "--package",
        "kv-daemon",
        "--bin",
        "kvctl",
        "--",
        "bench",
        "client",
    ]);
    process::hand_over(cargo.args(arguments), "bench")
}

/// Adds what the simulator is asked for.
pub(crate) fn simulator<'a>(command: &'a mut Command, simulation: &Simulation) -> &'a mut Command {
    if let Some(SimulationKind::Cost {
        trace,
        worlds,
        world,
        seeds,
        json,
    }) = &simulation.kind
    {
        command.arg("cost");
        for (flag, path) in [("--trace", trace), ("--worlds", worlds)] {
            if let Some(path) = path {
                // The simulator runs at the root, wherever this was typed.
                command
                    .arg(flag)
                    .arg(std::path::absolute(path).unwrap_or_else(|_| path.clone()));
            }
        }
        for name in world {
            command.args(["--world", name]);
        }
        if let Some(seeds) = seeds {
            command.args(["--seeds", seeds]);
        }
        if *json {
            command.arg("--json");
        }
        return command;
    }
    let numbers = [("--seeds", simulation.seeds), ("--seed", simulation.seed)];
    for (flag, number) in numbers.into_iter().filter_map(|(flag, number)| Some((flag, number?))) {
        command.args([flag, &number.to_string()]);
    }
    if let Some(mutant) = &simulation.mutant {
        command.args(["--mutant", mutant]);
    }
    for (flag, _) in [("--mutants", simulation.mutants), ("--json", simulation.json)]
        .iter()
        .filter(|(_, set)| *set)
    {
        command.arg(flag);
    }
    command.args(&simulation.more);
    command
}

/// Adds what a fuzzer is asked for.
pub(crate) fn fuzzer<'a>(command: &'a mut Command, fuzzing: &Fuzzing) -> &'a mut Command {
    command.args(["--seconds", &fuzzing.seconds.to_string()]);
    command.args(["--seed", &fuzzing.seed.to_string()]);
    if fuzzing.mutant {
        command.arg("--mutant");
    }
    command
}
