//! `kvctl token`.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::Connection;
use super::administration::{Administration, percent};
use super::purge::text;
use crate::exit::{ExitCode, Failure};
use crate::{output, rfc3339};

#[derive(Clone, Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Make a token; it is shown this once
    Create(CreateOptions),
    /// Every token, without the tokens themselves
    List {
        #[command(flatten)]
        administration: Administration,
    },
    /// Make a token good no more
    Revoke {
        /// Its id, from list
        id: String,
        #[command(flatten)]
        administration: Administration,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RoleName {
    /// Look
    Read,
    /// Look and purge
    Purge,
    /// Look, purge, set namespaces; unbound also manage tokens
    Admin,
}

#[derive(Clone, Debug, Args)]
pub(super) struct CreateOptions {
    /// What it is for
    #[arg(long, value_enum)]
    role: RoleName,
    /// A namespace to bind it to, DOMAIN/NAME or NAME of any domain; may be given again [default: none, it sees all]
    #[arg(long, value_name = "NAME")]
    namespace: Vec<String>,
    /// How long it is good, such as 12h or 30d [default: until it is revoked]
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// Words to know it by
    #[arg(long, value_name = "TEXT", default_value = "")]
    label: String,
    /// A new file for the token, mode 0600 [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    administration: Administration,
}

pub(super) fn run(connection: &Connection, command: &TokenCommand) -> Result<(), Failure> {
    match command {
        TokenCommand::Create(options) => create(connection, options),
        TokenCommand::List { administration } => {
            let list = administration.client(connection)?.ask_json("GET", "/v1/tokens", None)?;
            if connection.json {
                return output::print(&format!("{}\n", list["tokens"]));
            }
            let lines: String = list["tokens"].as_array().into_iter().flatten().map(describe).collect();
            output::print(&lines)
        }
        TokenCommand::Revoke { id, administration } => {
            let path = format!("/v1/tokens/{}", percent(id));
            administration.client(connection)?.ask("DELETE", &path, None)?;
            match connection.json {
                true => output::print(&format!("{}\n", json!({"id": id, "revoked": true}))),
                false => output::print(&format!("{id} is revoked\n")),
            }
        }
    }
}

fn create(connection: &Connection, options: &CreateOptions) -> Result<(), Failure> {
    let client = options.administration.client(connection)?;
    let expires_at = match &options.expires {
        None => None,
        Some(text) => {
            let time = parse_time(text).ok_or_else(|| {
                Failure::new(
                    ExitCode::Usage,
                    format!("--expires {text}: write a number and s, m, h, d or w, such as 30d"),
                )
            })?;
            Some(rfc3339::format(SystemTime::now() + time))
        }
    };
    let namespaces = Some(&options.namespace).filter(|names| !names.is_empty());
    let role = match options.role {
        RoleName::Read => "read",
        RoleName::Purge => "purge",
        RoleName::Admin => "admin",
    };
    let new = json!({"role": role, "namespaces": namespaces, "label": options.label, "expires_at": expires_at});
    // Made before the token is: one that cannot be kept must not come to be.
    let file = options
        .output
        .as_ref()
        .map(|path| {
            let mut open = std::fs::OpenOptions::new();
            let opened = open.create_new(true).write(true).mode(0o600).open(path);
            opened.map_err(|error| Failure::new(ExitCode::CannotCreate, format!("{}: {error}", path.display())))
        })
        .transpose()?;
    let made = client.ask_json("POST", "/v1/tokens", Some(&new));
    let (mut made, mut file) = match (made, file) {
        (Ok(made), file) => (made, file),
        (Err(failure), file) => {
            if let (Some(_), Some(path)) = (file, &options.output) {
                // It is ours and empty.
                let _ = std::fs::remove_file(path);
            }
            return Err(failure);
        }
    };
    let token = text(&made, "token");
    if let Some(file) = &mut file {
        let written = file
            .write_all(format!("{token}\n").as_bytes())
            .and_then(|()| file.sync_all());
        if let Err(error) = written {
            let words = format!(
                "the token's file cannot be written ({error}): revoke {}",
                text(&made, "id")
            );
            return Err(Failure::new(ExitCode::CannotCreate, words));
        }
        if let Some(members) = made.as_object_mut() {
            members.remove("token");
        }
    }
    if connection.json {
        return output::print(&format!("{made}\n"));
    }
    if file.is_some() {
        return output::print(&describe(&made));
    }
    eprint!("{}", describe(&made));
    output::print(&format!("{token}\n"))
}

/// A number and a unit: `s`, `m`, `h`, `d` or `w`.
fn parse_time(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        'w' => 604_800,
        _ => return None,
    };
    let digits = text.strip_suffix(unit)?;
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // A hundred years are as good as ever.
    let number: u64 = digits.parse().ok()?;
    let seconds = number
        .checked_mul(seconds)
        .filter(|seconds| (1..=3_155_760_000).contains(seconds))?;
    Some(Duration::from_secs(seconds))
}

fn describe(token: &Value) -> String {
    let bound = match token["namespaces"].as_array() {
        None => "all namespaces".to_string(),
        Some(names) => names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
    };
    let expires = match token["expires_at"].as_str() {
        Some(time) => format!("  until {time}"),
        None => String::new(),
    };
    format!(
        "{}  {}  {bound}{expires}  {}\n",
        text(token, "id"),
        text(token, "role"),
        text(token, "label")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_a_number_and_a_unit() {
        assert_eq!(parse_time("30d"), Some(Duration::from_secs(30 * 86_400)));
        assert_eq!(parse_time("12h"), Some(Duration::from_secs(43_200)));
        for wrong in [
            "",
            "d",
            "30",
            "-1d",
            "1.5h",
            "0s",
            "1y",
            "99999999999999999999w",
            "9999999w",
            "3ü",
        ] {
            assert_eq!(parse_time(wrong), None, "{wrong}");
        }
    }
}
