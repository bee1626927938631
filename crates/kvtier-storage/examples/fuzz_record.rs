//! The program behind `cargo xtask fuzz record`: `fuzz_record [--seconds N] [--seed S] [--mutant]`.
//!
//! Exits 0 when nothing was found and enough of the inputs were valid; with `--mutant`, when the planted bug was
//! found. Otherwise 1, and 64 for arguments it does not know.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use kvtier_storage::nvme::format::fuzz::{FuzzReport, run};

/// One input in so many must decode, or the loop only tests the first checks of the decoder.
const DECODED_ONE_IN: u64 = 3;

struct Arguments {
    seconds: f64,
    seed: u64,
    mutant: bool,
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments {
        seconds: 60.0,
        seed: 1,
        mutant: false,
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a number"));
        let wrong = |error: &dyn std::fmt::Display| format!("{word}: {error}");
        match word.as_str() {
            "--seconds" => arguments.seconds = value()?.parse().map_err(|error| wrong(&error))?,
            "--seed" => arguments.seed = value()?.parse().map_err(|error| wrong(&error))?,
            "--mutant" => arguments.mutant = true,
            _ => return Err(format!("unknown argument {word}")),
        }
    }
    Ok(arguments)
}

/// Why this run fails, if it does.
fn verdict(report: &FuzzReport, mutant: bool) -> Result<(), String> {
    match (&report.finding, mutant) {
        (Some(_), true) => Ok(()),
        (None, true) => Err("the planted bug was not found".to_owned()),
        (Some(finding), false) => Err(format!("found: {finding}")),
        (None, false) if report.executions == 0 => Err("nothing was executed".to_owned()),
        (None, false) if report.decoded * DECODED_ONE_IN < report.executions => {
            Err(format!("fewer than one input in {DECODED_ONE_IN} decodes"))
        }
        (None, false) => Ok(()),
    }
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(reason) => {
            eprintln!("{reason}\nusage: fuzz_record [--seconds N] [--seed S] [--mutant]");
            return ExitCode::from(64);
        }
    };
    if arguments.mutant && !cfg!(feature = "mutants") {
        eprintln!("--mutant needs the feature `mutants`");
        return ExitCode::from(64);
    }
    let started = Instant::now();
    let report = run(arguments.seed, arguments.seconds, arguments.mutant);
    let share = report.decoded as f64 / report.executions.max(1) as f64;
    println!(
        "record: {} executions in {:.1} s from seed {}, {:.1} % decode",
        report.executions,
        started.elapsed().as_secs_f64(),
        arguments.seed,
        share * 100.0
    );
    if let (true, Some(finding)) = (arguments.mutant, &report.finding) {
        println!("the planted bug was found: {finding}");
    }
    match verdict(&report, arguments.mutant) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            println!("{reason}");
            ExitCode::FAILURE
        }
    }
}
