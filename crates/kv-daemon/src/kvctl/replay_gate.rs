//! `kvctl replay-gate`: whether a trace's traffic gains by the cache, without a daemon.

use std::fs::File;
use std::io::{self, Cursor, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use aws_lc_rs::digest::{SHA256, digest};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use kvtier::keys::KeyError;
use kvtier::purge::{DocumentKey, REPLAY_GATE_REPORT};
use kvtier_sim::gate::{
    Baseline, GateError, GateHardware, GateOptions, GateProfile, GateReport, Input, OptionReport, Verdict, render,
    replay_gate, steps,
};
use kvtier_sim::trace::{Trace, TraceError, read_trace};
use serde_json::Value;

use super::{Connection, simulate};
use crate::exit::{ExitCode, Failure};
use crate::output;

/// Longest trace that is read, bytes: it is held in memory.
const TRACE_BYTES_MAX: u64 = 4 << 30;
/// Longest profile or hardware, bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(Clone, Debug, Args)]
pub(super) struct ReplayGateOptions {
    /// The trace, one JSON request a line: Mooncake's schema, Qwen-Bailian's, or a replay trace; - for standard input
    trace: PathBuf,
    /// The model on its GPUs: a preset such as llama-3.3-70b/4xh100, or a TOML file
    #[arg(long, value_name = "FILE|PRESET")]
    profile: String,
    /// The node and what it reaches: idle (a GPU is always free), busy (four groups of GPUs), or a TOML file
    #[arg(long, value_name = "FILE|PRESET", default_value = "idle")]
    hardware: String,
    /// What it is compared with: recompute, or lru-host
    #[arg(long, value_name = "BASELINE", default_value = "recompute", value_parser = str::parse::<Baseline>)]
    baseline: Baseline,
    /// Where the report goes: one HTML file that fetches nothing
    #[arg(long, value_name = "FILE")]
    report: PathBuf,
    /// Sign the JSON as receipts are signed, with the key of this daemon's state directory; kvctl receipt verify --report checks it
    #[arg(long, value_name = "STATE_DIR")]
    sign_with: Option<PathBuf>,
    /// Fixes luck and resamples
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(..1 << 53))]
    seed: u64,
    /// Resamples behind each interval
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(100..=100_000))]
    resamples: u32,
    /// Lines that may be skipped because they are no requests
    #[arg(long, value_name = "N", default_value_t = 100)]
    bad_lines_max: usize,
}

/// Ends with 0 where it is worth enabling, with 1 where it is not, with 75 where the trace does not say.
pub(super) fn run(connection: &Connection, options: &ReplayGateOptions) -> Result<(), Failure> {
    if options.sign_with.is_some() && !connection.json {
        let words = "--sign-with: it is the JSON that is signed: give --json too";
        return Err(Failure::new(ExitCode::Usage, words));
    }
    // Before the work, too.
    let key = match &options.sign_with {
        Some(directory) => Some(DocumentKey::open(directory).map_err(|error| key_failure(&error))?),
        None => None,
    };
    let (profile, profile_input) = choose(
        "profile",
        &options.profile,
        GateProfile::preset,
        GateProfile::parse,
        GateProfile::presets,
    )?;
    let presets = || GateHardware::PRESETS.join(", ");
    let (mut hardware, hardware_input) = choose(
        "hardware",
        &options.hardware,
        GateHardware::preset,
        GateHardware::parse,
        presets,
    )?;
    if hardware.name.is_empty() {
        hardware.name.clone_from(&options.hardware);
    }
    let (trace, trace_input) = read(options)?;
    simulate::report_skipped(&trace);
    let gate = GateOptions {
        baseline: options.baseline,
        seed: options.seed,
        resamples: options.resamples as usize,
        inputs: vec![trace_input, profile_input, hardware_input],
        skipped_lines: trace.skipped.len(),
    };
    // Made before the work, so that a path that cannot be is said at once.
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&options.report)
        .map_err(|error| cannot_create(&options.report, &error))?;
    let progress = progress_bar(steps(trace.requests.len(), &hardware));
    let report = replay_gate(
        &trace.requests,
        trace.schema.tokens_per_id(),
        &profile,
        &hardware,
        &gate,
        &mut || progress.inc(1),
    )
    .map_err(|GateError(words)| {
        let words = format!(
            "trace {} on hardware {}: {words}",
            options.trace.display(),
            options.hardware
        );
        Failure::new(ExitCode::DataFormat, words)
    })?;
    progress.finish_and_clear();
    // What is no file, such as a pipe, has no length to set.
    let _ = file.set_len(0);
    file.write_all(render(&report).as_bytes())
        .map_err(|error| cannot_create(&options.report, &error))?;
    if connection.json {
        output::print(&format!("{}\n", json_of(&report, key.as_ref())?))?;
    } else {
        output::print(&table(&report, &options.report))?;
    }
    match report.verdict {
        Verdict::WorthEnabling => Ok(()),
        Verdict::NotWorthEnabling => Err(Failure::new(ExitCode::No, "")),
        Verdict::InsufficientEvidence => Err(Failure::new(ExitCode::TryAgain, "")),
    }
}

/// The report for machines: signed, one line of canonical JSON.
fn json_of(report: &GateReport, key: Option<&DocumentKey>) -> Result<String, Failure> {
    let no_json = |error: serde_json::Error| {
        let words = format!("the report is no JSON ({error}): report a bug");
        Failure::new(ExitCode::Internal, words)
    };
    let Some(key) = key else {
        return serde_json::to_string_pretty(report).map_err(no_json);
    };
    let Value::Object(fields) = serde_json::to_value(report).map_err(no_json)? else {
        unreachable!("a report is an object");
    };
    key.sign(REPLAY_GATE_REPORT, fields, SystemTime::now())
        .map_err(|error| key_failure(&error))
}

fn key_failure(error: &KeyError) -> Failure {
    Failure::new(crate::serve::key_code(error), error.to_string())
}

fn cannot_create(path: &Path, error: &io::Error) -> Failure {
    Failure::new(ExitCode::CannotCreate, format!("report {}: {error}", path.display()))
}

/// A preset of that name, or else the file.
fn choose<T>(
    what: &str,
    text: &str,
    preset: impl Fn(&str) -> Option<T>,
    parse: impl Fn(&str) -> Result<T, GateError>,
    presets: impl Fn() -> String,
) -> Result<(T, Input), Failure> {
    if let Some(chosen) = preset(text) {
        return Ok((chosen, input(what, text, text.as_bytes())));
    }
    let bytes = File::open(text)
        .and_then(|file| bytes_of(file, FILE_BYTES_MAX))
        .map_err(|error| {
            let words = format!(
                "{what} {text}: neither a preset ({}) nor a file that can be read: {error}",
                presets()
            );
            Failure::new(ExitCode::NoInput, words)
        })?;
    let wrong = |words: String| Failure::new(ExitCode::DataFormat, format!("{what} {text}: {words}"));
    let words = std::str::from_utf8(&bytes).map_err(|error| wrong(error.to_string()))?;
    let chosen = parse(words).map_err(|GateError(words)| wrong(words))?;
    Ok((chosen, input(what, text, &bytes)))
}

fn input(what: &str, name: &str, bytes: &[u8]) -> Input {
    Input {
        what: what.to_string(),
        name: name.to_string(),
        sha256: digest(&SHA256, bytes)
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
    }
}

fn bytes_of(source: impl Read, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::other(format!("it is longer than {most} bytes")));
    }
    Ok(bytes)
}

fn read(options: &ReplayGateOptions) -> Result<(Trace, Input), Failure> {
    let path = options.trace.as_path();
    let bytes = if path == Path::new("-") {
        bytes_of(io::stdin().lock(), TRACE_BYTES_MAX)
    } else {
        File::open(path).and_then(|file| bytes_of(file, TRACE_BYTES_MAX))
    };
    let bytes = bytes.map_err(|error| Failure::new(ExitCode::NoInput, format!("trace {}: {error}", path.display())))?;
    let input = input("trace", &path.display().to_string(), &bytes);
    let trace = read_trace(Cursor::new(bytes), options.bad_lines_max).map_err(|error| {
        let code = match error {
            TraceError::Read { .. } => ExitCode::NoInput,
            TraceError::Parse { .. } => ExitCode::DataFormat,
        };
        let words = format!(
            "trace {}: {error} (--bad-lines-max {})",
            path.display(),
            options.bad_lines_max
        );
        Failure::new(code, words)
    })?;
    Ok((trace, input))
}

fn progress_bar(length: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = "  replay-gate [{bar:40}] {percent:>3} %  {elapsed} of about {duration}";
    ProgressBar::new(length)
        .with_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn table(report: &GateReport, path: &Path) -> String {
    let mut text = format!(
        "{} requests in {} sessions, {} prompt tokens; {} against {}\n\n",
        report.requests, report.sessions, report.prompt_tokens, report.profile, report.baseline
    );
    let width = report.options.iter().map(|option| option.option.chars().count()).max();
    let width = width.unwrap_or(0).clamp(8, 24);
    text.push_str(&format!(
        "{:<width$}  {:<22}{:>22}{:>10}{:>10}{:>10}{:>9}\n",
        "option", "verdict", "saving of prefills, %", "p50, ms", "p99, ms", "harmed, %", "hits, %"
    ));
    for option in &report.options {
        text.push_str(&row(option, width));
    }
    text.push_str(&format!("\n{}\n", report.verdict));
    for option in &report.options {
        for reason in option
            .reasons
            .iter()
            .filter(|_| option.verdict != Verdict::WorthEnabling)
        {
            text.push_str(&format!("  {}: {reason}\n", plain(&option.option)));
        }
    }
    for line in report.settings.lines() {
        text.push_str(&format!("  {line}\n"));
    }
    text.push_str(&format!("\nreport: {}\n", path.display()));
    text
}

fn row(option: &OptionReport, width: usize) -> String {
    let saving = option.comparison.prefill_saving;
    let interval = format!(
        "{:.1} ({:.1} to {:.1})",
        saving.value * 100.0,
        saving.low * 100.0,
        saving.high * 100.0
    );
    let hits: f64 = option.hit_ratio_by_tier.iter().map(|tier| tier.ratio).sum();
    format!(
        "{:<width$}  {:<22}{interval:>22}{:>10.0}{:>10.0}{:>10.2}{:>9.1}\n",
        plain(&option.option),
        option.verdict,
        option.ttft_after.p50_s * 1e3,
        option.ttft_after.p99_s * 1e3,
        option.comparison.harmed.value * 100.0,
        hits * 100.0
    )
}

/// A name from a file, without what a terminal would act on.
fn plain(name: &str) -> String {
    name.chars()
        .map(|letter| if letter.is_control() { '\u{fffd}' } else { letter })
        .collect()
}
