//! `kvctl receipt verify`: is a receipt what its node wrote, without asking that node.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use kvtier::purge::{KeySet, VerifyReport, verify, verify_documents};

use super::Connection;
use super::http::{self, Origin};
use crate::exit::{ExitCode, Failure};
use crate::output;

/// Longest file that is read, bytes.
const FILE_BYTES_MAX: u64 = 1 << 30;

#[derive(Clone, Debug, Subcommand)]
pub(super) enum ReceiptCommand {
    /// Check digests, signatures and the links between receipts; anything wrong ends with 65
    Verify {
        /// Files of one receipt, or of one in each line; - for standard input
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The node's public keys: a file that was fetched from GET /v1/keys, or http://127.0.0.1:PORT to fetch them from
        #[arg(long, value_name = "FILE|URL")]
        keys: String,
        /// They are signed reports of replay-gate instead
        #[arg(long)]
        report: bool,
    },
}

pub(super) fn run(connection: &Connection, command: &ReceiptCommand) -> Result<(), Failure> {
    let ReceiptCommand::Verify { files, keys, report } = command;
    let checked = if *report { verify_documents } else { verify };
    let keys = read_keys(keys, Duration::from_millis(connection.timeout_ms))?;
    let mut lines = Vec::new();
    for (index, file) in files.iter().enumerate() {
        // Named twice, it says nothing more.
        if files[..index].contains(file) {
            continue;
        }
        let text = read(file)?;
        let found = text.split(|&byte| byte == b'\n').zip(1..);
        let found: Vec<(String, Vec<u8>)> = found
            .filter(|(line, _)| !line.is_empty())
            .map(|(line, number)| (format!("{}:{number}", file.display()), line.to_vec()))
            .collect();
        if found.is_empty() {
            let what = if *report { "report" } else { "receipt" };
            let words = format!("{}: there is no {what} in it", file.display());
            return Err(Failure::new(ExitCode::DataFormat, words));
        }
        lines.extend(found);
    }
    let report = checked(&lines, &keys);
    if connection.json {
        let text = serde_json::to_string(&report).map_err(|error| {
            Failure::new(
                ExitCode::Internal,
                format!("the report is no JSON ({error}): report a bug"),
            )
        })?;
        output::print(&format!("{text}\n"))?;
    } else {
        output::print(&describe(&report))?;
    }
    if report.verified {
        return Ok(());
    }
    let wrong = report.lines.iter().filter(|line| line.problem.is_some()).count() + report.chain_problems.len();
    Err(Failure::new(
        ExitCode::DataFormat,
        format!("not verified: {wrong} of these things are wrong"),
    ))
}

fn describe(report: &VerifyReport) -> String {
    let mut words = String::new();
    for line in &report.lines {
        let number = line
            .sequence
            .map_or_else(String::new, |sequence| format!(" (number {sequence})"));
        match &line.problem {
            None => {
                let name = line.id.as_deref().or(line.object.as_deref()).unwrap_or("?");
                words.push_str(&format!("{}: {name}{number} verified\n", line.place));
            }
            Some(problem) => words.push_str(&format!("{}: {problem}\n", line.place)),
        }
    }
    for problem in &report.chain_problems {
        words.push_str(&format!("chain: {problem}\n"));
    }
    for unchecked in &report.unchecked {
        words.push_str(&format!("not checked: {unchecked}\n"));
    }
    words
}

fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    let cannot = |error: std::io::Error| Failure::new(ExitCode::NoInput, format!("{}: {error}", file.display()));
    let mut text = Vec::new();
    if file == Path::new("-") {
        std::io::stdin()
            .lock()
            .take(FILE_BYTES_MAX)
            .read_to_end(&mut text)
            .map_err(cannot)?;
    } else {
        let file = std::fs::File::open(file).map_err(cannot)?;
        file.take(FILE_BYTES_MAX).read_to_end(&mut text).map_err(cannot)?;
    }
    Ok(text)
}

/// Keys come from a file, or from a server on this machine: what a far one says, nobody vouches for.
fn read_keys(keys: &str, timeout: Duration) -> Result<KeySet, Failure> {
    let text = if keys.contains("://") {
        let refuse = |words: String| Failure::new(ExitCode::Usage, format!("--keys {keys}: {words}"));
        let origin = Origin::parse(keys).map_err(refuse)?;
        if origin.is_tls() || origin.is_in_the_clear() {
            return Err(refuse(
                "only http on this machine is fetched: get GET /v1/keys from the node in a way that you trust, and name the file".into(),
            ));
        }
        let answer = http::ask(&origin, None, timeout, ("GET", "/v1/keys"), None, None)
            .map_err(|error| Failure::new(ExitCode::Unavailable, format!("--keys {keys}: {error}")))?;
        if answer.status != 200 {
            let words = format!("--keys {keys}: the server answered {}", answer.status);
            return Err(Failure::new(ExitCode::Unavailable, words));
        }
        answer.body
    } else {
        read(Path::new(keys))?
    };
    serde_json::from_slice(&text).map_err(|error| {
        Failure::new(
            ExitCode::DataFormat,
            format!("--keys {keys}: no JSON Web Key Set: {error}"),
        )
    })
}
