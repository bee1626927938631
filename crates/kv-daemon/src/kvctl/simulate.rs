//! `kvctl simulate`: what policies would hit on a trace, without a daemon.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use kvtier_sim::simulate::{Policy, Prompts, Simulated, simulate};
use kvtier_sim::trace::{Trace, TraceError, read_trace};
use serde_json::{Value, json};

use super::Connection;
use crate::exit::{ExitCode, Failure};
use crate::output;

/// Skipped lines that are named; the others are counted.
const NAMED_MAX: usize = 10;

#[derive(Clone, Debug, Args)]
pub(super) struct SimulateOptions {
    /// The trace, one JSON request a line: Mooncake's schema, Qwen-Bailian's, or a replay trace; - for standard input
    trace: PathBuf,
    /// Policies: opt, hazard, lru, lfu, s3-fifo, sieve, arc, lirs, w-tinylfu, or all
    #[arg(long, value_name = "POLICY", value_delimiter = ',', default_value = "hazard,lru,opt", value_parser = policies)]
    policy: Vec<Chosen>,
    /// Sizes of the cache: blocks, or a share of the distinct blocks such as 5%
    #[arg(long, value_name = "SIZE", value_delimiter = ',', default_value = "1%,5%,10%,25%,50%", value_parser = Capacity::from_str)]
    capacity: Vec<Capacity>,
    /// Do not tell policies how long answers were, as engines that say nothing of them (as those whose recording has lengths only of answers that they stored)
    #[arg(long)]
    no_answers: bool,
    /// Lines that may be skipped because they are no requests
    #[arg(long, value_name = "N", default_value_t = 100)]
    bad_lines_max: usize,
}

/// What `--policy` names.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Chosen {
    All,
    One(Policy),
}

fn policies(text: &str) -> Result<Chosen, String> {
    match text {
        "all" => Ok(Chosen::All),
        name => name.parse().map(Chosen::One),
    }
}

/// How large a cache is.
#[derive(Clone, Debug, PartialEq)]
enum Capacity {
    Blocks(usize),
    /// Of the distinct blocks; as it was written, and in percent.
    Share(String, f64),
}

impl FromStr for Capacity {
    type Err = String;

    fn from_str(text: &str) -> Result<Capacity, String> {
        let expected = || format!("{text:?} is no size: write 5% or a number of blocks, at least 1");
        match text.strip_suffix('%') {
            Some(percent) => {
                let share: f64 = percent.parse().map_err(|_| expected())?;
                if share > 0.0 && share <= 100.0 {
                    Ok(Capacity::Share(text.to_string(), share))
                } else {
                    Err(expected())
                }
            }
            None => match text.parse() {
                Ok(0) | Err(_) => Err(expected()),
                Ok(blocks) => Ok(Capacity::Blocks(blocks)),
            },
        }
    }
}

impl Capacity {
    fn blocks(&self, distinct: usize) -> usize {
        match self {
            Capacity::Blocks(blocks) => *blocks,
            Capacity::Share(_, percent) => ((distinct as f64 * percent / 100.0) as usize).max(1),
        }
    }

    fn text(&self) -> String {
        match self {
            Capacity::Blocks(blocks) => blocks.to_string(),
            Capacity::Share(text, _) => text.clone(),
        }
    }
}

struct Row {
    policy: Policy,
    capacity: String,
    simulated: Simulated,
}

pub(super) fn run(connection: &Connection, options: &SimulateOptions) -> Result<(), Failure> {
    let trace = read(options)?;
    report_skipped(&trace);
    let mut prompts = Prompts::new(&trace.requests, trace.schema.tokens_per_id());
    if options.no_answers {
        prompts = prompts.without_answers();
    }
    let rows = rows(options, &prompts);
    if connection.json {
        let name = options.trace.display().to_string();
        let values: Vec<Value> = rows.iter().map(|row| value(row, &name)).collect();
        return output::print(&format!("{:#}\n", Value::from(values)));
    }
    output::print(&table(options, &prompts, &rows))
}

fn read(options: &SimulateOptions) -> Result<Trace, Failure> {
    let path = options.trace.as_path();
    let source: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        let file = File::open(path)
            .map_err(|error| Failure::new(ExitCode::NoInput, format!("trace {}: {error}", path.display())))?;
        Box::new(BufReader::new(file))
    };
    read_trace(source, options.bad_lines_max).map_err(|error| {
        let code = match error {
            TraceError::Read { .. } => ExitCode::NoInput,
            TraceError::Parse { .. } => ExitCode::DataFormat,
        };
        Failure::new(
            code,
            format!(
                "trace {}: {error} (--bad-lines-max {})",
                path.display(),
                options.bad_lines_max
            ),
        )
    })
}

pub(super) fn report_skipped(trace: &Trace) {
    for error in trace.skipped.iter().take(NAMED_MAX) {
        eprintln!("skipped {error}");
    }
    if trace.skipped.len() > NAMED_MAX {
        eprintln!("skipped {} lines in all", trace.skipped.len());
    }
}

fn rows(options: &SimulateOptions, prompts: &Prompts) -> Vec<Row> {
    let mut chosen: Vec<Policy> = Vec::new();
    for policy in &options.policy {
        let named: &[Policy] = match policy {
            Chosen::All => &Policy::ALL,
            Chosen::One(policy) => std::slice::from_ref(policy),
        };
        for policy in named {
            if !chosen.contains(policy) {
                chosen.push(*policy);
            }
        }
    }
    let steps = chosen.len() * options.capacity.len() * prompts.requests();
    let progress = progress_bar(steps as u64);
    let mut rows = Vec::new();
    for policy in chosen {
        for capacity in &options.capacity {
            let blocks = capacity.blocks(prompts.blocks());
            rows.push(Row {
                policy,
                capacity: capacity.text(),
                simulated: simulate(prompts, policy, blocks, &mut || progress.inc(1)),
            });
        }
    }
    progress.finish_and_clear();
    rows
}

fn progress_bar(length: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = "  simulate [{bar:40}] {percent:>3} %  {elapsed} of about {duration}";
    ProgressBar::new(length)
        .with_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn value(row: &Row, trace: &str) -> Value {
    json!({
        "trace": trace,
        "policy": row.policy.name(),
        "capacity": row.capacity,
        "prefix_hit_token_ratio": row.simulated.token_ratio(),
        "block_hit_ratio": row.simulated.block_ratio(),
    })
}

/// Policies down, sizes across: prefix-hit tokens in percent.
fn table(options: &SimulateOptions, prompts: &Prompts, rows: &[Row]) -> String {
    let mut text = format!(
        "{} requests, {} distinct blocks; prompt tokens hit as a cached prefix, %\n\n{:<10}",
        prompts.requests(),
        prompts.blocks(),
        "policy"
    );
    for capacity in &options.capacity {
        text.push_str(&format!("{:>9}", capacity.text()));
    }
    for policy_rows in rows.chunks(options.capacity.len()) {
        text.push_str(&format!("\n{:<10}", policy_rows[0].policy));
        for row in policy_rows {
            text.push_str(&format!("{:>9.2}", row.simulated.token_ratio() * 100.0));
        }
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_blocks_or_a_share() {
        assert_eq!("5%".parse(), Ok(Capacity::Share("5%".to_string(), 5.0)));
        assert_eq!("0.5%".parse::<Capacity>().expect("a share").blocks(1000), 5);
        assert_eq!("0.01%".parse::<Capacity>().expect("a share").blocks(10), 1);
        assert_eq!("70".parse(), Ok(Capacity::Blocks(70)));
        for text in ["0", "0%", "-1%", "101%", "NaN%", "five", ""] {
            let error = text.parse::<Capacity>().expect_err("no size");
            assert!(error.contains("5%"), "{error}");
        }
    }

    #[test]
    fn a_policy_is_named_or_all() {
        assert_eq!(policies("all"), Ok(Chosen::All));
        assert_eq!(policies("lru"), Ok(Chosen::One(Policy::Lru)));
        assert!(policies("fifo").expect_err("no policy").contains("w-tinylfu"));
    }

    #[test]
    fn a_row_says_what_was_simulated_in_documented_fields() {
        let row = Row {
            policy: Policy::Hazard,
            capacity: "5%".to_string(),
            simulated: Simulated {
                hit_tokens: 1,
                tokens: 4,
                hit_blocks: 1,
                blocks: 2,
            },
        };
        let expected = json!({"trace": "t", "policy": "hazard", "capacity": "5%", "prefix_hit_token_ratio": 0.25, "block_hit_ratio": 0.5});
        assert_eq!(value(&row, "t"), expected);
    }
}
