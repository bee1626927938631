//! `cargo xtask torture`: a daemon that is killed over and over, and every byte that comes back compared.
//!
//! One state directory lives through all rounds. In each, several clients put, get, delete and invalidate; one flush ends
//! at a random moment; a while later the daemon is killed with -9, started again on the same directory, and every key ever
//! put is read. What a finished flush covered must be there, unless it was evicted, deleted or invalidated; what comes
//! back must be right, and of the generation in force. With `--flips`, bytes of the segment files are changed instead.
//!
//! Read first: [`round::Torture`] (one round after the other), [`ledger::Ledger`] (what may be expected), [`plan::Plan`].
#![forbid(unsafe_code)]

mod daemon;
mod flip;
mod key;
mod ledger;
mod plan;
mod reader;
mod report;
mod round;
mod verify;
mod worker;

use std::path::PathBuf;

use clap::Parser;
use kv_daemon::exit::{ExitCode, Failure, report};

use crate::daemon::Stage;
use crate::plan::Plant;

/// Kills a daemon over and over and compares everything that comes back.
#[derive(Debug, Parser)]
#[command(name = "torture")]
struct Arguments {
    /// How often the daemon is killed.
    #[arg(long, default_value_t = 100)]
    rounds: u64,
    /// Change this many bytes of the segment files instead, some of them before each start.
    #[arg(long, value_name = "N", conflicts_with = "plant")]
    flips: Option<u64>,
    /// Fixes every choice; what the threads make of them is up to the machine.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Do harm between a kill and the next start; the run succeeds only if it is found.
    #[arg(long, value_name = "HARM")]
    plant: Option<Plant>,
    /// Where the state directory is made and, after a failure, left [default: a temporary directory]
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// The daemon [default: the kv-daemon that was built beside this program]
    #[arg(long, value_name = "PROGRAM")]
    daemon: Option<PathBuf>,
    /// The NVMe tier is one file in place of a directory of them.
    #[arg(long, conflicts_with_all = ["flips", "plant"])]
    device: bool,
    /// Print one JSON object at the end; lines of rounds go to standard error.
    #[arg(long)]
    json: bool,
}

fn main() -> std::process::ExitCode {
    report("torture", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let program = match &arguments.daemon {
        Some(program) => program.clone(),
        None => beside_this_program()?,
    };
    let mut stage = Stage::set(program, arguments.directory.as_deref())?;
    if arguments.device {
        stage.use_device()?;
    }
    let outcome = match arguments.flips {
        Some(flips) => flip::run(&stage, flips, arguments.seed, arguments.json),
        None => round::run(
            &stage,
            arguments.rounds,
            arguments.seed,
            arguments.plant,
            arguments.json,
        ),
    };
    outcome.map_err(|failure| {
        stage.keep();
        let words = format!("{failure}\nleft for a look: {}", stage.directory().display());
        Failure::new(failure.code, words)
    })
}

/// `target/release/examples/torture` was built beside `target/release/kv-daemon`.
fn beside_this_program() -> Result<PathBuf, Failure> {
    let program = std::env::current_exe().map_err(|error| {
        let words = format!("this program cannot find its own file ({error}): name the daemon with --daemon");
        Failure::new(ExitCode::Unavailable, words)
    })?;
    let built = program.ancestors().skip(1).map(|directory| directory.join("kv-daemon"));
    built.take(2).find(|path| path.is_file()).ok_or_else(|| {
        let words = "no kv-daemon beside this program: build it in the same profile, or name it with --daemon";
        Failure::new(ExitCode::Unavailable, words)
    })
}
