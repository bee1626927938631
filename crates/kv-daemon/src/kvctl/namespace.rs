//! `kvctl namespace`.

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::Connection;
use super::administration::{Administration, percent};
use super::purge::text;
use crate::exit::{ExitCode, Failure};
use crate::{output, size};

#[derive(Clone, Debug, Subcommand)]
pub(super) enum NamespaceCommand {
    /// Every namespace that the token sees
    List {
        #[command(flatten)]
        administration: Administration,
    },
    /// One namespace
    Show {
        /// DOMAIN/NAME, or NAME where only one trust domain has it
        name: String,
        #[command(flatten)]
        administration: Administration,
    },
    /// Serve a namespace again, empty, that is refused because the anchor knows a later generation of it
    Advance {
        /// DOMAIN/NAME, or NAME where only one trust domain has it
        name: String,
        #[command(flatten)]
        administration: Administration,
    },
    /// Change the quota or labels of a namespace; what is not named stays
    Set(SetOptions),
}

#[derive(Clone, Debug, Args)]
pub(super) struct SetOptions {
    /// DOMAIN/NAME, or NAME where only one trust domain has it
    name: String,
    /// Bytes that it may use, such as 64MiB, or none
    #[arg(long, value_name = "SIZE")]
    quota_bytes: Option<String>,
    /// A label to set; may be given again
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// A label to remove; may be given again
    #[arg(long, value_name = "KEY")]
    remove_label: Vec<String>,
    #[command(flatten)]
    administration: Administration,
}

pub(super) fn run(connection: &Connection, command: &NamespaceCommand) -> Result<(), Failure> {
    match command {
        NamespaceCommand::List { administration } => {
            let client = administration.client(connection)?;
            let list = client.ask_json("GET", "/v1/namespaces", None)?;
            if connection.json {
                return output::print(&format!("{}\n", list["namespaces"]));
            }
            let lines: String = list["namespaces"]
                .as_array()
                .into_iter()
                .flatten()
                .map(describe)
                .collect();
            output::print(&lines)
        }
        NamespaceCommand::Show { name, administration } => {
            let status = administration.client(connection)?.ask_json("GET", &path(name), None)?;
            show(connection, &status)
        }
        NamespaceCommand::Advance { name, administration } => {
            let client = administration.client(connection)?;
            let status = client.ask_json("POST", &format!("{}/advance", path(name)), None)?;
            show(connection, &status)
        }
        NamespaceCommand::Set(options) => set(connection, options),
    }
}

fn set(connection: &Connection, options: &SetOptions) -> Result<(), Failure> {
    let client = options.administration.client(connection)?;
    let now = client.ask_json("GET", &path(&options.name), None)?;
    let quota_bytes = match options.quota_bytes.as_deref() {
        None => now["quota_bytes"].clone(),
        Some("none") => Value::Null,
        Some(text) => {
            let bytes = size::parse(text)
                .map_err(|words| Failure::new(ExitCode::Usage, format!("--quota-bytes {text}: {words}")))?;
            json!(bytes)
        }
    };
    let mut labels: Map<String, Value> = now["labels"].as_object().cloned().unwrap_or_default();
    for key in &options.remove_label {
        labels.remove(key);
    }
    for label in &options.label {
        let (key, value) = label
            .split_once('=')
            .ok_or_else(|| Failure::new(ExitCode::Usage, format!("--label {label}: write KEY=VALUE")))?;
        labels.insert(key.to_string(), json!(value));
    }
    let settings = json!({"quota_bytes": quota_bytes, "labels": labels});
    // By its full name: a bare one may come to stand for another meanwhile.
    let full = path(&text(&now, "namespace"));
    show(connection, &client.ask_json("PUT", &full, Some(&settings))?)
}

fn path(name: &str) -> String {
    format!("/v1/namespaces/{}", percent(name))
}

fn show(connection: &Connection, status: &Value) -> Result<(), Failure> {
    if connection.json {
        return output::print(&format!("{status}\n"));
    }
    output::print(&describe(status))
}

fn describe(status: &Value) -> String {
    let number = |name: &str| status[name].as_u64().unwrap_or(0);
    let quota = match status["quota_bytes"].as_u64() {
        Some(bytes) => format!(" of {}", size::rounded(bytes)),
        None => String::new(),
    };
    let labels: String = status["labels"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("  {key}={}", value.as_str().unwrap_or_default()))
        .collect();
    let refused = match status["refused"].as_str() {
        Some(why) => format!("  NOT SERVED: {why}"),
        None => String::new(),
    };
    format!(
        "{}  generation {}  {} blocks ({} host, {} NVMe)  {}{quota}{labels}{refused}\n",
        text(status, "namespace"),
        number("generation"),
        number("blocks"),
        number("host_blocks"),
        number("nvme_blocks"),
        size::rounded(number("used_bytes"))
    )
}
