//! Where settings come from: defaults, then a TOML file, then `KVTIER_*`, then flags. Later layers win, field by field.
//!
//! Every field remembers who set it, so that an error can name the place to change. The fields themselves, their defaults
//! and their bounds belong to [`kvtier::settings::Settings`]; the few that only a process needs are in [`DaemonSettings`].

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use kvtier::settings::{CheckedSettings, Clock, Settings};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::exit::{ExitCode, Failure};
use crate::size;

/// The file read when `--config` and `KVTIER_CONFIG` name none.
pub const DEFAULT_FILE: &str = "/etc/kvtier/kv-daemon.toml";

/// Variables that begin with `KVTIER_` and are no setting.
const OTHER_VARIABLES: [&str; 6] = [
    "KVTIER_ADMIN_TOKEN_FILE",
    "KVTIER_ADMIN_URL",
    "KVTIER_CONFIG",
    "KVTIER_NAMESPACE",
    "KVTIER_TOKEN_FILE",
    "KVTIER_BIN_DIR",
];

/// Fields that a text separated by commas may stand for.
const LISTS: [&str; 2] = ["peers", "peer_devices"];

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What a process needs beside a node. In the file, the environment and the flags these stand beside the node's settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DaemonSettings {
    /// Address of the admin HTTP server; port 0 takes a free one; "off" starts none. Beyond loopback it needs TLS.
    /// Default 127.0.0.1:9640.
    pub http: String,
    /// Connections of the admin server at once; more wait. Default 32. Each may cost 64 KiB.
    pub http_connections_max: u32,
    /// Certificate chain that the admin server shows, PEM, its own first. With it the server speaks TLS 1.3 only.
    /// Default none.
    pub http_tls_certificate_file: Option<PathBuf>,
    /// Private key of that certificate, PEM. Default none.
    pub http_tls_key_file: Option<PathBuf>,
    /// Authorities, PEM, of which a client must show a certificate, beside its token. Default none: the token suffices.
    pub http_tls_client_ca_file: Option<PathBuf>,
    /// Calls a second that one token may make over time; more are answered with 429. Default 50.
    pub http_requests_per_second_max: u32,
    /// Calls that one token may make at once. Default 100. A bucket for each token, 100 bytes.
    pub http_requests_burst_max: u32,
    /// Calls a second without a good token, all together, over time; four times as many at once. Default 20. Good tokens are
    /// not kept out by them.
    pub http_failed_authentications_per_second_max: u32,
    /// Clients that listen to events at once, each holding a connection. Default 8. Each may cost 64 KiB.
    pub http_event_subscribers_max: u32,
    /// Size past which the audit log goes on in a new file; the old ones are kept. Default 16 MiB.
    pub audit_file_bytes_max: u64,
    /// How log lines look. Default `text`.
    pub log_format: LogFormat,
    /// Which log lines are written: a level, or directives as `tracing` reads them. Default `info`.
    pub log_level: String,
    /// How long a stop may take before the rest is dropped, milliseconds. Default 30,000.
    pub drain_timeout_ms: u64,
}

impl Default for DaemonSettings {
    fn default() -> Self {
        DaemonSettings {
            http: "127.0.0.1:9640".to_string(),
            http_connections_max: 32,
            http_tls_certificate_file: None,
            http_tls_key_file: None,
            http_tls_client_ca_file: None,
            http_requests_per_second_max: 50,
            http_requests_burst_max: 100,
            http_failed_authentications_per_second_max: 20,
            http_event_subscribers_max: 8,
            audit_file_bytes_max: 16 << 20,
            log_format: LogFormat::Text,
            log_level: "info".to_string(),
            drain_timeout_ms: 30_000,
        }
    }
}

/// Who set a field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// Nobody.
    #[default]
    Default,
    /// A settings file.
    File(PathBuf),
    /// An environment variable.
    Environment(String),
    /// A flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => formatter.write_str("default"),
            Origin::File(path) => write!(formatter, "{}", path.display()),
            Origin::Environment(variable) => write!(formatter, "environment variable {variable}"),
            Origin::Flag(flag) => write!(formatter, "flag {flag}"),
        }
    }
}

/// A setting that cannot be: which, who set it to what, and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("setting {field} = {value} (from {origin}): {remedy}")]
pub struct ConfigurationError {
    /// Which field, as it is spelled in the file; a whole file when that cannot be read.
    pub field: String,
    /// Its value.
    pub value: String,
    /// Who set it.
    pub origin: Origin,
    /// What to do.
    pub remedy: String,
}

impl From<ConfigurationError> for Failure {
    fn from(error: ConfigurationError) -> Failure {
        Failure::new(ExitCode::Configuration, error.to_string())
    }
}

/// What settings are made from. Plain data, so that a test can say what the environment is.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// `--config`.
    pub file: Option<PathBuf>,
    /// Every environment variable; those that do not begin with `KVTIER_` only choose the default state directory.
    pub environment: BTreeMap<String, String>,
    /// Field, spelling of its flag, value.
    pub flags: Vec<(&'static str, &'static str, String)>,
    /// Whether the process runs as root: it chooses the default state directory.
    pub root: bool,
}

/// Checked settings and who set them.
#[derive(Clone, Debug)]
pub struct Configuration {
    /// Of the process.
    pub daemon: DaemonSettings,
    /// Where the admin server listens; `None`: nowhere.
    pub http: Option<SocketAddr>,
    /// Of the node.
    pub node: CheckedSettings,
    /// Who set each field that is not a default.
    pub origins: BTreeMap<String, Origin>,
    /// What to tell the operator once logging works.
    pub warnings: Vec<String>,
}

impl Sources {
    /// The sources of this process, without flags.
    #[must_use]
    pub fn of_this_process() -> Sources {
        Sources {
            file: None,
            environment: environment(),
            flags: Vec::new(),
            root: rustix::process::geteuid().is_root(),
        }
    }

    /// Reads and checks every layer.
    ///
    /// # Errors
    /// The first setting that cannot be.
    pub fn load(self) -> Result<Configuration, ConfigurationError> {
        let mut draft = Draft::new();
        if let Some(path) = self.settings_file()? {
            draft.apply_file(&path)?;
        }
        for (variable, text) in &self.environment {
            draft.apply_variable(variable, text)?;
        }
        for (field, flag, text) in &self.flags {
            draft.apply_text(field, text, Origin::Flag((*flag).to_string()))?;
        }
        draft.finish(|| default_state_dir(&self.environment, self.root))
    }

    fn settings_file(&self) -> Result<Option<PathBuf>, ConfigurationError> {
        let named = match (
            &self.file,
            self.environment.get("KVTIER_CONFIG").filter(|path| !path.is_empty()),
        ) {
            (Some(path), _) => Some((path.clone(), Origin::Flag("--config".into()))),
            (None, Some(path)) => Some((PathBuf::from(path), Origin::Environment("KVTIER_CONFIG".into()))),
            (None, None) => None,
        };
        match named {
            // Not only regular files: /dev/null stands for no settings at all.
            Some((path, _)) if path.exists() && !path.is_dir() => Ok(Some(path)),
            Some((path, origin)) => Err(ConfigurationError {
                field: "config".into(),
                value: path.display().to_string(),
                origin,
                remedy: "there is no such file: name an existing one, or leave it out to use defaults".into(),
            }),
            None => Ok(Some(PathBuf::from(DEFAULT_FILE)).filter(|path| path.is_file())),
        }
    }
}

/// Settings in the making: JSON objects that always deserialize, one field replaced at a time.
struct Draft {
    daemon: Map<String, Value>,
    node: Map<String, Value>,
    origins: BTreeMap<String, Origin>,
    warnings: Vec<String>,
}

impl Draft {
    fn new() -> Draft {
        Draft {
            daemon: object(&DaemonSettings::default()),
            node: object(&Settings::default()),
            origins: BTreeMap::new(),
            warnings: Vec::new(),
        }
    }

    fn apply_file(&mut self, path: &Path) -> Result<(), ConfigurationError> {
        let origin = Origin::File(path.to_path_buf());
        let whole_file = |remedy: String| ConfigurationError {
            field: "config".into(),
            value: path.display().to_string(),
            origin: origin.clone(),
            remedy,
        };
        let text = std::fs::read_to_string(path)
            .map_err(|error| whole_file(format!("it cannot be read ({error}): check its permissions")))?;
        let table: toml::Table = text
            .parse()
            .map_err(|error: toml::de::Error| whole_file(format!("it is no TOML: {}", one_line(&error.to_string()))))?;
        for (field, value) in table {
            let value = serde_json::to_value(value).map_err(|error| whole_file(error.to_string()))?;
            match value {
                Value::String(text) => self.apply_text(&field, &text, origin.clone())?,
                value => self.apply(&field, &value.to_string(), vec![Ok(value.clone())], origin.clone())?,
            }
        }
        Ok(())
    }

    fn apply_variable(&mut self, variable: &str, text: &str) -> Result<(), ConfigurationError> {
        let Some(name) = variable.strip_prefix("KVTIER_") else {
            return Ok(());
        };
        if text.is_empty() || OTHER_VARIABLES.contains(&variable) {
            return Ok(());
        }
        let field = name.to_ascii_lowercase();
        if !self.daemon.contains_key(&field) && !self.node.contains_key(&field) {
            // Orchestrators set variables of their own after a service's name, so a stranger is no error.
            self.warnings.push(format!(
                "environment variable {variable} names no setting and is ignored"
            ));
            return Ok(());
        }
        self.apply_text(&field, text, Origin::Environment(variable.to_string()))
    }

    /// A value written as text may stand for a size, a mode, a number, a switch or itself, as its field will have it.
    fn apply_text(&mut self, field: &str, text: &str, origin: Origin) -> Result<(), ConfigurationError> {
        let mut candidates = Vec::new();
        if field == "socket_mode" {
            let digits = text.trim_start_matches("0o");
            candidates.push(
                u32::from_str_radix(digits, 8)
                    .map(Value::from)
                    .map_err(|_| "write octal permission bits, such as 0600".to_string()),
            );
        } else if is_size(field) {
            candidates.push(size::parse(text).map(Value::from));
        } else {
            candidates.push(Ok(Value::String(text.to_string())));
            if LISTS.contains(&field) && !text.starts_with('[') {
                let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
                candidates.push(Ok(Value::from(parts.collect::<Vec<_>>())));
            }
            if let Ok(value) = serde_json::from_str::<Value>(text) {
                candidates.push(Ok(value));
            }
        }
        self.apply(field, &format!("{text:?}"), candidates, origin)
    }

    fn apply(
        &mut self,
        field: &str,
        shown: &str,
        candidates: Vec<Result<Value, String>>,
        origin: Origin,
    ) -> Result<(), ConfigurationError> {
        let refuse = |remedy: String| ConfigurationError {
            field: field.to_string(),
            value: shown.to_string(),
            origin: origin.clone(),
            remedy,
        };
        let in_daemon = self.daemon.contains_key(field);
        if !in_daemon && !self.node.contains_key(field) {
            let known: Vec<&String> = self.daemon.keys().chain(self.node.keys()).collect();
            let remedy = match closest(field, &known) {
                Some(near) => format!("there is no such setting; did you mean {near}?"),
                None => "there is no such setting; `kv-daemon settings` lists them all".to_string(),
            };
            return Err(refuse(remedy));
        }
        let mut reason = String::new();
        for candidate in candidates {
            let value = match candidate {
                Ok(value) => value,
                Err(words) => {
                    reason = words;
                    continue;
                }
            };
            let target = if in_daemon { &mut self.daemon } else { &mut self.node };
            let mut changed = target.clone();
            changed.insert(field.to_string(), value);
            let outcome = if in_daemon {
                serde_json::from_value::<DaemonSettings>(Value::Object(changed.clone())).map(drop)
            } else {
                serde_json::from_value::<Settings>(Value::Object(changed.clone())).map(drop)
            };
            match outcome {
                Ok(()) => {
                    *target = changed;
                    self.origins.insert(field.to_string(), origin);
                    return Ok(());
                }
                Err(error) => reason = one_line(&error.to_string()),
            }
        }
        Err(refuse(reason))
    }

    fn finish(self, default_state_dir: impl FnOnce() -> Option<PathBuf>) -> Result<Configuration, ConfigurationError> {
        let origin_of = |field: &str| self.origins.get(field).cloned().unwrap_or_default();
        let refuse = |field: &str, value: String, remedy: String| ConfigurationError {
            field: field.to_string(),
            value,
            origin: origin_of(field),
            remedy,
        };
        let internal = |error: serde_json::Error| refuse("settings", String::new(), error.to_string());
        let daemon: DaemonSettings = serde_json::from_value(Value::Object(self.daemon.clone())).map_err(internal)?;
        let mut node: Settings = serde_json::from_value(Value::Object(self.node.clone())).map_err(internal)?;
        if node.state_dir.as_os_str().is_empty() {
            node.state_dir = default_state_dir().ok_or_else(|| {
                refuse(
                    "state_dir",
                    "\"\"".into(),
                    "neither HOME nor XDG_STATE_HOME is set: name one with --state-dir".into(),
                )
            })?;
        }
        let http = match daemon.http.as_str() {
            "off" | "" => None,
            text => {
                let tls = daemon.http_tls_certificate_file.is_some();
                Some(admin_address(text, tls).map_err(|remedy| refuse("http", format!("{text:?}"), remedy))?)
            }
        };
        check_tls(&daemon).map_err(|(field, remedy)| refuse(field, "none".into(), remedy.into()))?;
        for (field, value, max) in [
            ("http_connections_max", daemon.http_connections_max, 4096),
            (
                "http_requests_per_second_max",
                daemon.http_requests_per_second_max,
                1_000_000,
            ),
            ("http_requests_burst_max", daemon.http_requests_burst_max, 1_000_000),
            (
                "http_failed_authentications_per_second_max",
                daemon.http_failed_authentications_per_second_max,
                1000,
            ),
            ("http_event_subscribers_max", daemon.http_event_subscribers_max, 4096),
        ] {
            if !(1..=max).contains(&value) {
                return Err(refuse(field, value.to_string(), format!("between 1 and {max}")));
            }
        }
        if daemon.http_event_subscribers_max >= daemon.http_connections_max.max(2) {
            return Err(refuse(
                "http_event_subscribers_max",
                daemon.http_event_subscribers_max.to_string(),
                "below http_connections_max, or listeners could keep everybody else out".into(),
            ));
        }
        if !(64 << 10..=1 << 40).contains(&daemon.audit_file_bytes_max) {
            return Err(refuse(
                "audit_file_bytes_max",
                daemon.audit_file_bytes_max.to_string(),
                "between 64KiB and 1TiB".into(),
            ));
        }
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&daemon.log_level) {
            let remedy =
                format!("{error}; write error, warn, info, debug, trace or directives such as info,kvtier=debug");
            return Err(refuse("log_level", format!("{:?}", daemon.log_level), remedy));
        }
        for domain in &mut node.domains {
            if let Some(path) = domain.token_file.take() {
                let shown = format!("{:?} with token_file {}", domain.name, path.display());
                let digest = token_digest(&path).map_err(|remedy| refuse("domains", shown, remedy))?;
                domain.token_blake3 = Some(digest);
            }
        }
        let node = node
            .check()
            .map_err(|error| refuse(error.field, error.value.clone(), error.remedy.clone()))?;
        let mut warnings = self.warnings;
        if node.clock == Clock::Client {
            warnings
                .push("clock = client: time is what clients say it is; a test mode, not for production".to_string());
        }
        Ok(Configuration {
            daemon,
            http,
            node,
            origins: self.origins,
            warnings,
        })
    }
}

impl Configuration {
    /// The effective settings as one JSON object, process and node together, numbers in bytes and milliseconds.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut all = object(&self.daemon);
        all.extend(object(&*self.node));
        if let Some(mode) = all.get_mut("socket_mode") {
            *mode = Value::String(format!("{:04o}", self.node.socket_mode));
        }
        Value::Object(all)
    }

    /// The effective settings as a file that reads back to them, with who set what.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut tables = String::new();
        let Value::Object(all) = self.to_json() else {
            return text;
        };
        for (field, value) in all {
            let origin = self.origins.get(&field).cloned().unwrap_or_default();
            let shown = match &value {
                Value::Null => {
                    text.push_str(&format!("# {field} is not set\n"));
                    continue;
                }
                Value::Number(bytes) if is_size(&field) => format!("\"{}\"", size::exact(bytes.as_u64().unwrap_or(0))),
                Value::Array(items) if field == "domains" => {
                    for item in items {
                        tables.push_str("\n[[domains]]\n");
                        let Value::Object(fields) = item else { continue };
                        for (name, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
                            tables.push_str(&format!("{name} = {value}\n"));
                        }
                    }
                    continue;
                }
                value => value.to_string(),
            };
            text.push_str(&format!("{field} = {shown}  # {origin}\n"));
        }
        text + &tables
    }
}

/// Every variable of the environment that is UTF-8.
#[must_use]
pub fn environment() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// Where state lies when nobody says: `KVTIER_STATE_DIR`, else `/var/lib/kvtier` for root, else the user's state home.
#[must_use]
pub fn default_state_dir(environment: &BTreeMap<String, String>, root: bool) -> Option<PathBuf> {
    let named = |variable: &str| {
        environment
            .get(variable)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(path) = named("KVTIER_STATE_DIR") {
        return Some(path);
    }
    if root {
        return Some(PathBuf::from("/var/lib/kvtier"));
    }
    let home = named("XDG_STATE_HOME").filter(|path| path.is_absolute());
    home.or_else(|| named("HOME").map(|home| home.join(".local/state")))
        .map(|path| path.join("kvtier"))
}

/// The socket that both binaries use when nobody says.
#[must_use]
pub fn default_socket(environment: &BTreeMap<String, String>, root: bool) -> Option<PathBuf> {
    default_state_dir(environment, root).map(|directory| directory.join("kvtier.sock"))
}

/// Where the admin server may listen: anywhere with TLS, on loopback without.
fn admin_address(text: &str, tls: bool) -> Result<SocketAddr, String> {
    let text = text
        .strip_prefix("localhost:")
        .map_or_else(|| text.to_string(), |port| format!("127.0.0.1:{port}"));
    let address: SocketAddr = text
        .parse()
        .map_err(|_| "write an address and a port, such as 127.0.0.1:9640, or off".to_string())?;
    if tls || address.ip().is_loopback() {
        Ok(address)
    } else {
        Err(
            "beyond loopback tokens would travel in the clear without TLS: set http_tls_certificate_file and \
             http_tls_key_file, or bind 127.0.0.1 or [::1] and forward the port over a channel you trust"
                .to_string(),
        )
    }
}

/// Files of TLS come together. The field that is missing, and the remedy.
fn check_tls(daemon: &DaemonSettings) -> Result<(), (&'static str, &'static str)> {
    let (certificate, key) = (&daemon.http_tls_certificate_file, &daemon.http_tls_key_file);
    match (certificate, key, &daemon.http_tls_client_ca_file) {
        (Some(_), None, _) => Err((
            "http_tls_key_file",
            "http_tls_certificate_file is set: name the file of its private key",
        )),
        (None, Some(_), _) => Err((
            "http_tls_certificate_file",
            "http_tls_key_file is set: name the file of its certificate",
        )),
        (None, None, Some(_)) => Err((
            "http_tls_certificate_file",
            "http_tls_client_ca_file is set, and only TLS can ask for certificates: name the server's own certificate and \
             key as well",
        )),
        _ => Ok(()),
    }
}

/// The digest of the token on the first line of a file. The token itself goes no further.
fn token_digest(path: &Path) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("it cannot be read: {error}"))?;
    match text.lines().next().map(str::trim) {
        Some(token) if token.len() >= 16 => Ok(blake3::hash(token.as_bytes()).to_hex().to_string()),
        _ => Err("its first line must be a token of at least 16 characters".to_string()),
    }
}

fn is_size(field: &str) -> bool {
    field.ends_with("_bytes") || field.ends_with("_bytes_max") || field.ends_with("_bytes_per_client_max")
}

fn object(settings: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(settings) {
        Ok(Value::Object(map)) => map,
        other => unreachable!("settings are plain data: {other:?}"),
    }
}

fn one_line(text: &str) -> String {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The known name that differs by the fewest single-letter edits, if that is at most a third of its letters.
fn closest<'a>(name: &str, known: &[&'a String]) -> Option<&'a String> {
    let near = known
        .iter()
        .map(|candidate| (edits(name, candidate), *candidate))
        .min()?;
    (near.0 <= name.len().max(near.1.len()) / 3).then_some(near.1)
}

fn edits(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (line, letter) in left.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (column, other) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *other);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests;
