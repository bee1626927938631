//! `cargo xtask torture`: builds the daemon and the program that kills it, and hands over.

use std::process::Command;

use crate::built::Built;
use crate::outcome::{Failure, Tally};
use crate::process;
use crate::workspace::Workspace;
use crate::{Torture, ci};

/// Rounds of the torture in `ci`: each kind three times.
const CI_ROUNDS: u64 = 12;

/// Changed bytes in `ci`.
const CI_FLIPS: u64 = 100;

pub(crate) fn run(workspace: &Workspace, torture: &Torture) -> Result<(), Failure> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--quiet", "--release", "--package", "kv-daemon", "--bins"]);
    process::hand_over(&mut cargo, "build")?;
    let mut cargo = workspace.cargo();
    cargo.args(["run", "--quiet", "--release", "--package", "kv-daemon"]);
    cargo.args(["--example", "torture", "--"]);
    process::hand_over(arguments(&mut cargo, torture), "torture")
}

/// A bounded run, and proof that it finds what it is for.
pub(crate) fn check(workspace: &Workspace) -> Result<Tally, Failure> {
    let built = Built::of(workspace, &["build", "--bins", "--example", "torture"])?;
    built.directory()?;
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
        let mut torture = Command::new(built.program("torture")?);
        process::succeed(arguments(&mut torture, run), "torture", ci::STEP_LIMIT)?;
        tally.passed += 1;
    }
    Ok(tally)
}

/// Adds what the program of the torture is asked for.
fn arguments<'a>(command: &'a mut Command, torture: &Torture) -> &'a mut Command {
    let numbers = [
        ("--rounds", torture.rounds),
        ("--flips", torture.flip),
        ("--seed", torture.seed),
    ];
    for (flag, number) in numbers.into_iter().filter_map(|(flag, number)| Some((flag, number?))) {
        command.args([flag, &number.to_string()]);
    }
    if let Some(harm) = &torture.plant {
        command.args(["--plant", harm]);
    }
    if torture.device {
        command.arg("--device");
    }
    if torture.json {
        command.arg("--json");
    }
    command
}
