//! `cargo xtask torture`: builds the daemon and the program that kills it, and hands over.

use std::process::Command;

use crate::outcome::{Failure, Tally};
use crate::process;
use crate::workspace::Workspace;
use crate::{Torture, ci};

/// Rounds of the torture in `ci`: each kind three times.
const CI_ROUNDS: u64 = 12;

/// Changed bytes in `ci`.
const CI_FLIPS: u64 = 100;

pub(crate) fn run(workspace: &Workspace, torture: &Torture) -> Result<(), Failure> {
    process::hand_over(&mut build(workspace), "build")?;
    process::hand_over(&mut program(workspace, torture), "torture")
}

/// A bounded run, and proof that it finds what it is for.
pub(crate) fn check(workspace: &Workspace) -> Result<Tally, Failure> {
    process::succeed(&mut build(workspace), "release build", ci::STEP_LIMIT)?;
    let rounds = |rounds| Torture {
        rounds: Some(rounds),
        ..Torture::default()
    };
    let plant = |harm: &str| Torture {
        plant: Some(harm.to_owned()),
        ..rounds(CI_ROUNDS)
    };
    let flips = Torture {
        flip: Some(CI_FLIPS),
        ..Torture::default()
    };
    let device = Torture {
        device: true,
        ..rounds(CI_ROUNDS)
    };
    let runs = [rounds(CI_ROUNDS), device, plant("segment"), plant("register"), flips];
    let mut tally = Tally::default();
    for run in &runs {
        process::succeed(&mut program(workspace, run), "torture", ci::STEP_LIMIT)?;
        tally.passed += 1;
    }
    Ok(tally)
}

fn build(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--quiet", "--release", "--package", "kv-daemon", "--bins"]);
    cargo
}

fn program(workspace: &Workspace, torture: &Torture) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["run", "--quiet", "--release", "--package", "kv-daemon"]);
    cargo.args(["--example", "torture", "--"]);
    let numbers = [
        ("--rounds", torture.rounds),
        ("--flips", torture.flip),
        ("--seed", torture.seed),
    ];
    for (flag, number) in numbers.into_iter().filter_map(|(flag, number)| Some((flag, number?))) {
        cargo.args([flag, &number.to_string()]);
    }
    if let Some(harm) = &torture.plant {
        cargo.args(["--plant", harm]);
    }
    if torture.device {
        cargo.arg("--device");
    }
    if torture.json {
        cargo.arg("--json");
    }
    cargo
}
