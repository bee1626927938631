//! Commands that build another program of the workspace in release and hand over to it.

use std::process::Command;

use crate::lmcache;
use crate::outcome::Failure;
use crate::process;
use crate::python;
use crate::workspace::Workspace;
use crate::{Fuzzing, Simulation, SimulationKind};

pub(crate) fn simulate(workspace: &Workspace, simulation: &Simulation) -> Result<(), Failure> {
    process::hand_over(&mut simulator(workspace, simulation), "sim")
}

pub(crate) fn fuzz(workspace: &Workspace, fuzzing: &Fuzzing) -> Result<(), Failure> {
    process::hand_over(&mut fuzzer(workspace, fuzzing), "fuzz")
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

/// The simulator, always with its planted bugs compiled in: without naming one, none acts.
pub(crate) fn simulator(workspace: &Workspace, simulation: &Simulation) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args([
        "run",
        "--quiet",
        "--release",
        "--package",
        "kvtier-sim",
        "--features",
        "mutants",
    ]);
    cargo.args(["--bin", "kvtier-sim", "--"]);
    if let Some(SimulationKind::Cost {
        trace,
        worlds,
        world,
        seeds,
        json,
    }) = &simulation.kind
    {
        cargo.arg("cost");
        for (flag, path) in [("--trace", trace), ("--worlds", worlds)] {
            if let Some(path) = path {
                // The simulator runs at the root, wherever this was typed.
                cargo
                    .arg(flag)
                    .arg(std::path::absolute(path).unwrap_or_else(|_| path.clone()));
            }
        }
        for name in world {
            cargo.args(["--world", name]);
        }
        if let Some(seeds) = seeds {
            cargo.args(["--seeds", seeds]);
        }
        if *json {
            cargo.arg("--json");
        }
        return cargo;
    }
    let numbers = [("--seeds", simulation.seeds), ("--seed", simulation.seed)];
    for (flag, number) in numbers.into_iter().filter_map(|(flag, number)| Some((flag, number?))) {
        cargo.args([flag, &number.to_string()]);
    }
    if let Some(mutant) = &simulation.mutant {
        cargo.args(["--mutant", mutant]);
    }
    for (flag, _) in [("--mutants", simulation.mutants), ("--json", simulation.json)]
        .iter()
        .filter(|(_, set)| *set)
    {
        cargo.arg(flag);
    }
    cargo.args(&simulation.more);
    cargo
}

/// The fuzzer of a format, always with its planted bug compiled in: without `--mutant` it does not act.
pub(crate) fn fuzzer(workspace: &Workspace, fuzzing: &Fuzzing) -> Command {
    let mut cargo = workspace.cargo();
    let package = match fuzzing.target.as_str() {
        "record" => "kvtier-storage",
        _ => "kvtier",
    };
    cargo.args([
        "run",
        "--quiet",
        "--release",
        "--package",
        package,
        "--features",
        "fuzz,mutants",
    ]);
    cargo.args(["--example", &format!("fuzz_{}", fuzzing.target), "--"]);
    cargo.args([
        "--seconds",
        &fuzzing.seconds.to_string(),
        "--seed",
        &fuzzing.seed.to_string(),
    ]);
    if fuzzing.mutant {
        cargo.arg("--mutant");
    }
    cargo
}
