//! `kvctl audit verify`: does a chain of audit lines hold, without a daemon.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde_json::json;

use super::Connection;
use crate::admin::audit::chain::{self, Chain, Link, NOTHING};
use crate::exit::{ExitCode, Failure};
use crate::output;

#[derive(Clone, Debug, Subcommand)]
pub(super) enum AuditCommand {
    /// Check every line of audit logs, and that each file follows the one before it; a break ends with 65
    Verify {
        /// The files of one log, in any order: audit-*.jsonl audit.jsonl
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

pub(super) fn run(connection: &Connection, command: &AuditCommand) -> Result<(), Failure> {
    let AuditCommand::Verify { files } = command;
    let found = verify(files)?;
    if connection.json {
        let answer = json!({
            "lines": found.lines,
            "first_sequence": found.first,
            "last_sequence": found.last.as_ref().map(|last| last.sequence),
            "last_sha256": found.last.as_ref().map(|last| &last.sha256),
            "breaks": found.breaks,
            "notes": found.notes,
        });
        output::print(&format!("{answer}\n"))?;
    } else {
        let mut text = String::new();
        for note in &found.notes {
            text.push_str(&format!("note: {note}\n"));
        }
        if let (Some(first), Some(last)) = (found.first, &found.last) {
            text.push_str(&format!(
                "{} lines, {first} to {}, the last is {}\n",
                found.lines, last.sequence, last.sha256
            ));
        } else {
            text.push_str("no lines\n");
        }
        output::print(&text)?;
    }
    match found.breaks.first() {
        None => Ok(()),
        Some(_) => Err(Failure::new(
            ExitCode::DataFormat,
            format!("the chain is broken:\n  {}", found.breaks.join("\n  ")),
        )),
    }
}

#[derive(Debug, Default)]
struct Found {
    lines: u64,
    first: Option<u64>,
    last: Option<Link>,
    breaks: Vec<String>,
    notes: Vec<String>,
}

fn verify(files: &[PathBuf]) -> Result<Found, Failure> {
    let mut found = Found::default();
    let mut chains: Vec<(&Path, Chain)> = Vec::new();
    for path in files {
        match read(path)? {
            Ok(chain) => chains.push((path, chain)),
            Err(broken) => {
                found
                    .breaks
                    .push(format!("{} line {}: {}", path.display(), broken.line, broken.what));
                chains.push((path, broken.before));
            }
        }
    }
    chains.sort_by_key(|(_, chain)| chain.first.as_ref().map_or(u64::MAX, |first| first.0));
    let count = chains.len();
    for (place, (path, chain)) in chains.into_iter().enumerate() {
        let path = path.display();
        found.lines += chain.lines;
        found
            .notes
            .extend(chain.notes.iter().map(|note| format!("{path}: {note}")));
        if chain.torn_bytes > 0 && place + 1 < count {
            found
                .breaks
                .push(format!("{path}: it ends within a line, and another file follows"));
        } else if chain.torn_bytes > 0 {
            let words = format!("{path}: its last line is unfinished: a daemon is writing it, or was killed");
            found.notes.push(words);
        }
        let Some((sequence, previous)) = chain.first else {
            continue;
        };
        match &found.last {
            None => {
                found.first = Some(sequence);
                if previous != NOTHING {
                    found.notes.push(format!("{path}: it goes on after line {}, {previous}", sequence.saturating_sub(1)));
                }
            }
            Some(last) if last.sha256 == previous && last.sequence.checked_add(1) == Some(sequence) => {}
            Some(last) if previous == NOTHING => found.breaks.push(format!(
                "{path} line 1: a new chain begins with {sequence}, after line {} of the file before it",
                last.sequence
            )),
            Some(last) => found.breaks.push(format!(
                "{path} line 1: {sequence} does not follow {}, the last of the file before it: a file is missing or was altered",
                last.sequence
            )),
        }
        found.last = chain.last.or(found.last);
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Result<Chain, Box<chain::Break>>, Failure> {
    let cannot = |error: std::io::Error| Failure::new(ExitCode::NoInput, format!("{}: {error}", path.display()));
    let file: Box<dyn Read> = match path == Path::new("-") {
        true => Box::new(std::io::stdin()),
        false => Box::new(File::open(path).map_err(cannot)?),
    };
    chain::read(BufReader::new(file)).map_err(cannot)
}
