//! `kvctl purge` and `kvctl purges`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::Connection;
use super::administration::{AdminClient, Administration, percent, refusal};
use crate::exit::{ExitCode, Failure};
use crate::{output, size};

/// How often a job that is waited for is looked at.
const INTERVAL: Duration = Duration::from_millis(250);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Nothing older can be read any more
    Invalidate,
    /// The same, and what is left is destroyed and the destruction verified
    Physical,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Reach {
    /// This node
    Node,
    /// Every member of the cluster
    Cluster,
}

#[derive(Clone, Debug, Args)]
pub(super) struct PurgeOptions {
    /// DOMAIN/NAME, or NAME where only one trust domain has it
    name: String,
    /// How far it goes
    #[arg(long, value_enum, default_value = "invalidate")]
    mode: Mode,
    /// Which nodes it reaches [default: the cluster where there is one, else this node]
    #[arg(long, value_enum)]
    reach: Option<Reach>,
    /// Only blocks of this realization, 64 hex digits; costs a walk over the index
    #[arg(long, value_name = "HEX", conflicts_with_all = ["hash", "label"])]
    scope_realization: Option<String>,
    /// Only this block, 32 hex digits, and what extends it; may be given again
    #[arg(long, value_name = "HEX", conflicts_with = "label")]
    hash: Vec<String>,
    /// Only blocks that were put under this label, and what extends them; costs a walk over the index
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// Names the request: asked again under the same id it is the same purge [default: drawn]
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// For the receipt
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Wait until there is a receipt, and print it
    #[arg(long)]
    wait: bool,
    /// How long to wait, seconds; then it ends with 75, and the purge goes on
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, requires = "wait")]
    wait_max: u64,
    /// Where the receipt goes, byte for byte [default: standard output]
    #[arg(short, long, value_name = "FILE", requires = "wait")]
    output: Option<PathBuf>,
    #[command(flatten)]
    administration: Administration,
}

pub(super) fn purge(connection: &Connection, options: &PurgeOptions) -> Result<(), Failure> {
    let client = options.administration.client(connection)?;
    let request = request(options)?;
    let job = client.ask_json("POST", "/v1/purges", Some(&request))?;
    if !options.wait {
        return show(connection, &job);
    }
    let id = text(&job, "id");
    let (job, receipt) = wait(&client, &job, options)?;
    match options.output.as_deref().filter(|path| *path != Path::new("-")) {
        Some(path) => {
            std::fs::write(path, &receipt)
                .map_err(|error| Failure::new(ExitCode::CannotCreate, format!("{}: {error}", path.display())))?;
            show(connection, &job)
        }
        None => {
            if !connection.json {
                eprintln!("{id}: {}", progress(&job));
            }
            output::print_bytes(&receipt)?;
            output::print("\n")
        }
    }
}

fn request(options: &PurgeOptions) -> Result<Value, Failure> {
    let scope = if let Some(digest) = &options.scope_realization {
        json!({"realization": digest})
    } else if let Some(label) = &options.label {
        json!({"label": label})
    } else if options.hash.is_empty() {
        json!("all")
    } else {
        json!({"hashes": options.hash})
    };
    let request_id = match &options.request_id {
        Some(id) => id.clone(),
        None => {
            let mut random = [0; 16];
            getrandom::fill(&mut random)
                .map_err(|error| Failure::new(ExitCode::Unavailable, format!("no randomness: {error}")))?;
            let digits: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("kvctl-{digits}")
        }
    };
    let reach = options.reach.map(|reach| match reach {
        Reach::Node => "node",
        Reach::Cluster => "cluster",
    });
    Ok(json!({
        "namespace": options.name,
        "scope": scope,
        "reach": reach,
        "mode": if options.mode == Mode::Physical { "physical" } else { "invalidate" },
        "request_id": request_id,
        "reason": options.reason,
    }))
}

/// Looks at a job until it has a receipt.
fn wait(client: &AdminClient, job: &Value, options: &PurgeOptions) -> Result<(Value, Vec<u8>), Failure> {
    let id = text(job, "id");
    let path = format!("/v1/purges/{}", percent(&id));
    let bar = bar(client, job, options);
    let begun = Instant::now();
    let mut job = job.clone();
    let result = loop {
        bar.set_position(job["blocks"].as_u64().unwrap_or(0));
        bar.set_message(text(&job, "state"));
        if job["state"] == "completed" && !job["receipt"].is_null() {
            break client.ask("GET", &format!("{path}/receipt"), None);
        }
        if begun.elapsed() >= Duration::from_secs(options.wait_max) {
            let words = format!(
                "{id} is not completed after {} s and goes on: ask again with the same --request-id, {}",
                options.wait_max,
                text(&job, "request_id")
            );
            break Err(Failure::new(ExitCode::TryAgain, words));
        }
        std::thread::sleep(INTERVAL);
        let answer = client.answer("GET", &path, None)?;
        match answer.status {
            200 => job = serde_json::from_slice(&answer.body).unwrap_or(job),
            // Not now is no reason to give up what goes on.
            429 | 503 => {}
            _ => break Err(refusal(&answer)),
        }
    };
    bar.finish_and_clear();
    result.map(|receipt| (job, receipt))
}

/// A bar on a terminal: over the blocks of the namespace when all of them go, else only of what was done.
fn bar(client: &AdminClient, job: &Value, options: &PurgeOptions) -> ProgressBar {
    let whole = options.mode == Mode::Physical && job["scope"] == "all";
    let path = format!("/v1/namespaces/{}", percent(&text(job, "namespace")));
    let total = whole
        .then(|| client.ask_json("GET", &path, None).ok()?["blocks"].as_u64())
        .flatten()
        .map(|left| left + job["blocks"].as_u64().unwrap_or(0))
        .filter(|total| *total > 0);
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{msg} {wide_bar} {pos}/{len} blocks {elapsed}"),
        None => (ProgressBar::new_spinner(), "{msg} {spinner} {pos} blocks {elapsed}"),
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.with_style(style)
}

#[derive(Clone, Debug, Args)]
pub(super) struct PurgesOptions {
    #[command(flatten)]
    administration: Administration,
}

pub(super) fn purges(connection: &Connection, options: &PurgesOptions) -> Result<(), Failure> {
    let client = options.administration.client(connection)?;
    let path = match &connection.namespace {
        Some(name) => format!("/v1/purges?namespace={}", percent(name)),
        None => "/v1/purges".to_string(),
    };
    let jobs = client.ask_json("GET", &path, None)?;
    if connection.json {
        return output::print(&format!("{}\n", jobs["purges"]));
    }
    let lines: String = jobs["purges"].as_array().into_iter().flatten().map(describe).collect();
    output::print(&lines)
}

fn show(connection: &Connection, job: &Value) -> Result<(), Failure> {
    if connection.json {
        return output::print(&format!("{job}\n"));
    }
    output::print(&describe(job))
}

fn describe(job: &Value) -> String {
    format!(
        "{}  {}  {} {}  {}  request_id {}\n",
        text(job, "id"),
        text(job, "requested_at"),
        text(job, "mode"),
        text(job, "namespace"),
        progress(job),
        text(job, "request_id")
    )
}

fn progress(job: &Value) -> String {
    let number = |name: &str| job[name].as_u64().unwrap_or(0);
    let mut words = text(job, "state");
    if let Some(generation) = job["generation"].as_u64() {
        words.push_str(&format!(" at generation {generation}"));
    }
    if number("blocks") > 0 {
        words.push_str(&format!(
            ", {} blocks ({}) destroyed",
            number("blocks"),
            size::rounded(number("bytes"))
        ));
    }
    match number("resumed") {
        0 => {}
        1 => words.push_str(", resumed by a restart"),
        times => words.push_str(&format!(", resumed by {times} restarts")),
    }
    words
}

pub(super) fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_default().to_string()
}
