//! Every developer command of kvtier: `cargo xtask --help`.
//!
//! Read [`ci`] first: it is the list of everything that must hold. [`lint`] keeps the house rules, [`suite`] runs the
//! tests and says what was skipped, [`confined`] runs them again as a stranger on a locked-down machine.
#![forbid(unsafe_code)]

mod built;
mod ci;
mod confine;
mod confined;
mod daemon;
mod deploy;
mod gpu;
mod lint;
mod lmcache;
mod outcome;
mod process;
mod python;
mod radosgw;
mod remote;
mod replay;
mod restart;
mod runner;
mod seccomp;
mod suite;
mod torture;
mod transfer;
mod verbs_world;
mod workspace;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::outcome::Failure;
use crate::workspace::Workspace;

/// Developer commands of kvtier.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Formatting, clippy, and the rules of the house.
    Lint {
        /// Only the rules that need no compiler.
        #[arg(long)]
        rules: bool,
    },
    /// Run the tests; name suites to insist on them (exit 69 when a part of a named suite is skipped).
    Test {
        /// Suites to run: the crates by name, `python`, `lmcache`, `deploy`, `transfer`, `gpu`, `rdma`, or `remote`.
        suites: Vec<String>,
        /// Print the cases of the suite `transfer` by transport, and what a transport cannot have.
        #[arg(long)]
        list: bool,
        /// Run everything as an ordinary user, with io_uring denied and 64 KiB of lockable memory.
        #[arg(long)]
        confined: bool,
        /// Which device the `gpu` suite is to insist on: `real` or `simulated`. Without it, both where both are.
        #[arg(long, value_name = "KIND")]
        device: Option<String>,
    },
    /// Run the simulator: seeded worlds with faults, an oracle and planted mutants.
    Sim(Simulation),
    /// Mutate messages and feed them to a decoder.
    Fuzz(Fuzzing),
    /// Measure: `kvctl bench client` in a release build, `core`, the tier manager alone, `cost`, the cost model alone,
    /// `python`, the wheel's client, `lmcache`, the adapter beside LMCache's own, or `verbs`, RDMA in the verbs world;
    /// arguments are passed on.
    Bench {
        /// Arguments of `kvctl bench client`; or `core`, `cost`, `python`, `lmcache` or `verbs` and arguments of its harness.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Kill a daemon over and over, or change bytes of its files, and compare everything that comes back.
    Torture(Torture),
    /// Replay a trace with the daemon killed in the middle, and once more without: both must find the same.
    RestartReplay(Restart),
    /// Everything that must hold before a change is merged.
    Ci,
    /// (used by `test --confined`) Give up rights, then become PROGRAM.
    #[command(hide = true)]
    Confine {
        /// Report what this process is denied instead of running a program.
        #[arg(long, conflicts_with = "program")]
        probe: bool,
        /// Allow the system calls of this profile and no others; give up nothing else.
        #[arg(long, value_name = "FILE", requires = "program")]
        profile: Option<std::path::PathBuf>,
        /// The program and its arguments.
        #[arg(last = true, value_name = "PROGRAM")]
        program: Vec<std::ffi::OsString>,
    },
}

/// Arguments of `cargo xtask sim`.
#[derive(Args, Clone, Default)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Simulation {
    #[command(subcommand)]
    kind: Option<SimulationKind>,
    /// How many seeds to run.
    #[arg(long)]
    seeds: Option<u64>,
    /// Replay this one seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Plant this bug; the run succeeds only if it is found.
    #[arg(long, value_name = "NAME")]
    mutant: Option<String>,
    /// Plant every bug in turn.
    #[arg(long)]
    mutants: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Further arguments of the simulator.
    #[arg(last = true)]
    more: Vec<String>,
}

/// What else the simulator does.
#[derive(Subcommand, Clone)]
pub(crate) enum SimulationKind {
    /// The cost model in its worlds: fetch or recompute, beside an oracle.
    Cost {
        /// Whose requests [default: a generated chat workload]
        #[arg(long, value_name = "FILE")]
        trace: Option<std::path::PathBuf>,
        /// Worlds in place of the named ones, in TOML.
        #[arg(long, value_name = "FILE")]
        worlds: Option<std::path::PathBuf>,
        /// Only this world; may be given several times.
        #[arg(long, value_name = "NAME")]
        world: Vec<String>,
        /// Seeds in place of the named ones, with commas between.
        #[arg(long, value_name = "SEEDS")]
        seeds: Option<String>,
        /// Print one JSON array of rows.
        #[arg(long)]
        json: bool,
    },
}

/// Arguments of `cargo xtask fuzz`.
#[derive(Args, Clone)]
pub(crate) struct Fuzzing {
    /// What to fuzz.
    #[arg(value_parser = ["wire", "record"])]
    target: String,
    /// For how long.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// The seed of the mutation loop.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Plant a bug; the run succeeds only if it is found.
    #[arg(long)]
    mutant: bool,
}

/// Arguments of `cargo xtask torture`.
#[derive(Args, Clone, Default)]
pub(crate) struct Torture {
    /// How often the daemon is killed [default: 100]
    #[arg(long)]
    rounds: Option<u64>,
    /// Change this many bytes of the segment files instead [default: 1000]
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "1000", conflicts_with_all = ["rounds", "plant"])]
    flip: Option<u64>,
    /// Fixes every choice [default: 1]
    #[arg(long)]
    seed: Option<u64>,
    /// The NVMe tier is one file in place of a directory of them.
    #[arg(long, conflicts_with_all = ["flip", "plant"])]
    device: bool,
    /// Do this harm between a kill and the next start; the run succeeds only if it is found.
    #[arg(long, value_name = "HARM", value_parser = ["segment", "register"])]
    plant: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Arguments of `cargo xtask restart-replay`.
#[derive(Args, Clone, Default)]
pub(crate) struct Restart {
    /// The trace [default: a generated chat workload, and less room]
    trace: Option<std::path::PathBuf>,
    /// How many requests come before the restart [default: half of them]
    #[arg(long, value_name = "REQUESTS")]
    half: Option<u64>,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("xtask: {}", failure.message);
            ExitCode::from(failure.code)
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    if let Command::Confine {
        probe,
        profile,
        program,
    } = command
    {
        return match profile {
            _ if probe => confine::probe(),
            Some(profile) => confine::become_profiled(&program, &profile),
            None => confine::become_program(&program),
        };
    }
    let mut workspace = Workspace::find()?;
    workspace.has_heavy_features = match &command {
        Command::Test { suites, .. } => suites.iter().any(|suite| suite == "remote"),
        Command::Ci => true,
        _ => false,
    };
    match command {
        Command::Lint { rules } => lint::run(&workspace, rules).map(drop),
        Command::Test { suites, list: true, .. } if suites == ["transfer"] => transfer::list(&workspace),
        Command::Test { list: true, .. } => Err(Failure::usage("--list belongs to the suite `transfer`")),
        Command::Test {
            suites, confined: true, ..
        } if suites.is_empty() => confined::run(&workspace).map(drop),
        Command::Test { confined: true, .. } => Err(Failure::usage("--confined runs the whole suite: name no suite")),
        Command::Test { suites, device, .. } => suite::run(&workspace, &suites, device.as_deref()).map(drop),
        Command::Sim(simulation) => runner::simulate(&workspace, &simulation),
        Command::Fuzz(fuzzing) => runner::fuzz(&workspace, &fuzzing),
        Command::Bench { arguments } => runner::bench(&workspace, &arguments),
        Command::Torture(torture) => torture::run(&workspace, &torture),
        Command::RestartReplay(restart) => restart::run(&workspace, &restart),
        Command::Ci => ci::run(&workspace),
        Command::Confine { .. } => unreachable!("handled before the workspace is looked for"),
    }
}
