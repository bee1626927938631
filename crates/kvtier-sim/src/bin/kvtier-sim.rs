//! `kvtier-sim [--seeds N] [--first S] [--seed S] [--mutant NAME] [--mutants] [--json]`: runs simulated worlds.
//!
//! Exits 0 when every rule held (with a mutant: when it was found), 1 when not, 2 on wrong arguments.
#![forbid(unsafe_code)]

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use kvtier_sim::cli::{Failure, SimArgs, run};

const USAGE: &str = "usage: kvtier-sim [--seeds N] [--first S] [--seed S] [--mutant NAME] [--mutants] [--json]";

fn parse(mut words: impl Iterator<Item = String>) -> Result<SimArgs, String> {
    let mut args = SimArgs {
        progress: io::stderr().is_terminal(),
        ..SimArgs::default()
    };
    while let Some(word) = words.next() {
        let mut number = || {
            let value = words.next().ok_or_else(|| format!("{word} needs a number"))?;
            value.parse::<u64>().map_err(|error| format!("{word} {value}: {error}"))
        };
        match word.as_str() {
            "--seeds" => args.seeds = number()?,
            "--first" => args.first = number()?,
            "--seed" => (args.first, args.seeds) = (number()?, 1),
            "--mutant" => args.mutant = Some(words.next().ok_or_else(|| "--mutant needs a name".to_owned())?),
            "--mutants" => args.mutant = Some("all".to_owned()),
            "--json" => args.json = true,
            other => return Err(format!("unknown argument {other}")),
        }
    }
    Ok(args)
}

fn main() -> ExitCode {
    let args = match parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(reason) => {
            eprintln!("{reason}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&args, &mut io::stdout().lock(), &mut io::stderr()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Found) => ExitCode::from(1),
        Err(Failure::Usage(reason)) => {
            eprintln!("{reason}");
            ExitCode::from(2)
        }
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(1)
        }
    }
}
