//! `kvtier-sim [--seeds N] [--first S] [--seed S] [--mutant NAME] [--mutants] [--json]`: runs simulated worlds.
//!
//! `kvtier-sim cluster` with the same arguments: worlds of the cluster, where purges have to reach every member.
//!
//! `kvtier-sim cost [--trace FILE] [--worlds FILE] [--world NAME]... [--seeds A,B,...] [--json]`: the cost model in its worlds.
//!
//! Exits 0 when every rule held (with a mutant: when it was found), 1 when not, 2 on wrong arguments.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, BufReader, IsTerminal};
use std::process::ExitCode;

use kvtier_sim::cli::{CostArgs, Failure, SimArgs, run, run_cluster, run_cost};
use kvtier_sim::cost::CostWorld;
use kvtier_sim::{ChatWorkload, TraceReader, TraceRequest};

const USAGE: &str =
    "usage: kvtier-sim [cluster] [--seeds N] [--first S] [--seed S] [--mutant NAME] [--mutants] [--json]
       kvtier-sim cost [--trace FILE] [--worlds FILE] [--world NAME]... [--seeds A,B,...] [--json]";

fn parse_cost(mut words: impl Iterator<Item = String>) -> Result<CostArgs, String> {
    let mut args = CostArgs {
        progress: io::stderr().is_terminal(),
        ..CostArgs::default()
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        match word.as_str() {
            "--trace" => args.requests = read_trace(&value()?)?,
            "--worlds" => {
                let path = value()?;
                let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
                args.worlds = Some(CostWorld::parse(&text).map_err(|error| format!("{path}: {error}"))?);
            }
            "--world" => args.only.push(value()?),
            "--seeds" => {
                let value = value()?;
                let seeds = value.split(',').map(str::parse).collect::<Result<_, _>>();
                args.seeds = seeds.map_err(|error| format!("{word} {value}: {error}"))?;
            }
            "--json" => args.json = true,
            other => return Err(format!("unknown argument {other}")),
        }
    }
    if args.requests.is_empty() {
        args.requests = ChatWorkload::default().generate();
    }
    Ok(args)
}

fn read_trace(path: &str) -> Result<Vec<TraceRequest>, String> {
    let file = File::open(path).map_err(|error| format!("{path}: {error}"))?;
    let requests: Result<Vec<_>, _> = TraceReader::new(BufReader::new(file)).collect();
    match requests {
        Ok(requests) if requests.is_empty() => Err(format!("{path}: no request in it")),
        Ok(requests) => Ok(requests),
        Err(error) => Err(format!("{path}: {error}")),
    }
}

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
    let mut words = std::env::args().skip(1).peekable();
    let (mut target, mut progress) = (io::stdout().lock(), io::stderr());
    let outcome = if words.next_if(|word| word == "cost").is_some() {
        parse_cost(words).map(|args| run_cost(&args, &mut target, &mut progress))
    } else if words.next_if(|word| word == "cluster").is_some() {
        parse(words).map(|args| run_cluster(&args, &mut target, &mut progress))
    } else {
        parse(words).map(|args| run(&args, &mut target, &mut progress))
    };
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(Failure::Found)) => ExitCode::from(1),
        Ok(Err(Failure::Usage(reason))) => {
            eprintln!("{reason}");
            ExitCode::from(2)
        }
        Ok(Err(failure)) => {
            eprintln!("{failure}");
            ExitCode::from(1)
        }
        Err(reason) => {
            eprintln!("{reason}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}
