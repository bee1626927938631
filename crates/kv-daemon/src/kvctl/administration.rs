//! How `kvctl` reaches the admin server, and what its answers mean for a shell.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use rustls::ClientConfig;
use serde_json::Value;

use super::Connection;
use super::http::{self, Answer, Origin};
use crate::configuration::{default_state_dir, environment};
use crate::exit::{ExitCode, Failure};
use crate::serve::{ADMIN_TOKEN_FILE, HTTP_ADDRESS_FILE};

/// Where the admin server is and how to be let in. Tokens are named by their file, never written on a command line.
#[derive(Clone, Debug, Args)]
pub(crate) struct Administration {
    /// The admin server, http://HOST:PORT or https://HOST:PORT [default: http.addr in the state directory]
    #[arg(long, value_name = "URL", env = "KVTIER_ADMIN_URL")]
    http: Option<String>,
    /// File whose first line is an admin API token [default: admin.token in the state directory]
    #[arg(long, value_name = "FILE", env = "KVTIER_ADMIN_TOKEN_FILE")]
    admin_token_file: Option<PathBuf>,
    /// The daemon's state directory [default: that of this user]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Authorities that the server's certificate must come from, PEM; needed for https
    #[arg(long, value_name = "FILE")]
    http_ca_file: Option<PathBuf>,
    /// Certificate to show, PEM, when the server asks for one
    #[arg(long, value_name = "FILE", requires = "http_client_key_file")]
    http_client_certificate_file: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", requires = "http_client_certificate_file")]
    http_client_key_file: Option<PathBuf>,
}

/// The admin server, ready to be asked.
pub(super) struct AdminClient {
    origin: Origin,
    tls: Option<Arc<ClientConfig>>,
    token: String,
    timeout: Duration,
}

impl Administration {
    /// Finds the server and the token.
    ///
    /// # Errors
    /// In words: which is missing.
    pub(super) fn client(&self, connection: &Connection) -> Result<AdminClient, Failure> {
        let url = match &self.http {
            Some(url) => url.clone(),
            None => {
                let path = self.state_file(HTTP_ADDRESS_FILE)?;
                let text = std::fs::read_to_string(&path).map_err(|error| {
                    let words = format!(
                        "{}: {error}: no admin server runs there; start one with `kv-daemon serve`, or name it with --http \
                         or its --state-dir",
                        path.display()
                    );
                    Failure::new(ExitCode::Unavailable, words)
                })?;
                text.trim().to_string()
            }
        };
        let origin =
            Origin::parse(&url).map_err(|words| Failure::new(ExitCode::Usage, format!("--http {url}: {words}")))?;
        if origin.is_in_the_clear() {
            let words = format!("--http {url}: the token would travel in the clear: use https, or forward the port");
            return Err(Failure::new(ExitCode::Usage, words));
        }
        let tls = match (&self.http_ca_file, origin.is_tls()) {
            (_, false) => None,
            (None, true) => {
                let words = format!("{url}: name the authorities of its certificate with --http-ca-file");
                return Err(Failure::new(ExitCode::Usage, words));
            }
            (Some(ca), true) => {
                let client = self
                    .http_client_certificate_file
                    .as_deref()
                    .zip(self.http_client_key_file.as_deref());
                let config = http::tls_config(ca, client).map_err(|words| Failure::new(ExitCode::NoInput, words))?;
                Some(Arc::new(config))
            }
        };
        Ok(AdminClient {
            origin,
            tls,
            token: self.token()?,
            timeout: Duration::from_millis(connection.timeout_ms.max(1)),
        })
    }

    fn token(&self) -> Result<String, Failure> {
        let path = match &self.admin_token_file {
            Some(path) => path.clone(),
            None => self.state_file(ADMIN_TOKEN_FILE)?,
        };
        let text = std::fs::read_to_string(&path).map_err(|error| {
            let words = format!(
                "admin token {}: {error}: name a token's file with --admin-token-file",
                path.display()
            );
            Failure::new(ExitCode::NoInput, words)
        })?;
        let token = text.lines().next().map(str::trim).unwrap_or_default();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            let words = format!("admin token {}: its first line must be a token", path.display());
            return Err(Failure::new(ExitCode::DataFormat, words));
        }
        Ok(token.to_string())
    }

    fn state_file(&self, name: &str) -> Result<PathBuf, Failure> {
        let root = rustix::process::geteuid().is_root();
        let directory = self
            .state_dir
            .clone()
            .or_else(|| default_state_dir(&environment(), root));
        directory.map(|directory| directory.join(name)).ok_or_else(|| {
            Failure::new(
                ExitCode::Usage,
                "no state directory: neither HOME nor KVTIER_STATE_DIR is set: name one with --state-dir",
            )
        })
    }
}

impl AdminClient {
    /// Asks, and takes only success for an answer.
    ///
    /// # Errors
    /// What the server had against it, with the code of its status.
    pub(super) fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Vec<u8>, Failure> {
        let answer = self.answer(method, path, body)?;
        match answer.status {
            200..300 => Ok(answer.body),
            _ => Err(refusal(&answer)),
        }
    }

    /// The same for an answer in JSON.
    ///
    /// # Errors
    /// The same.
    pub(super) fn ask_json(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        let bytes = self.ask(method, path, body)?;
        serde_json::from_slice(&bytes).map_err(|error| {
            Failure::new(
                ExitCode::Internal,
                format!("the answer is no JSON ({error}): report a bug"),
            )
        })
    }

    /// Asks, whatever the status of the answer.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn answer(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Answer, Failure> {
        let body = body.map(Value::to_string);
        let asked = http::ask(
            &self.origin,
            self.tls.as_ref(),
            self.timeout,
            (method, path),
            Some(&self.token),
            body.as_deref(),
        );
        asked.map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                let words = format!("the admin server did not answer in {} ms", self.timeout.as_millis());
                Failure::new(ExitCode::TryAgain, words)
            }
            _ => {
                let words =
                    format!("the admin server cannot be asked: {error}\n  is the daemon there, and is --http right?");
                Failure::new(ExitCode::Unavailable, words)
            }
        })
    }
}

/// A refusal in the words of the server.
pub(super) fn refusal(answer: &Answer) -> Failure {
    let problem: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    let words = match problem["detail"].as_str() {
        Some(detail) => detail.to_string(),
        None => format!("the admin server answered with {}", answer.status),
    };
    let code = match answer.status {
        401 | 403 => ExitCode::Denied,
        404 => ExitCode::No,
        429 | 503 => ExitCode::TryAgain,
        400..500 => ExitCode::DataFormat,
        _ => ExitCode::Internal,
    };
    Failure::new(code, words)
}

/// A name as one part of a path or a value of a query.
pub(super) fn percent(text: &str) -> String {
    let keep = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| {
            if keep(byte) {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

#[cfg(test)]
mod tests;
