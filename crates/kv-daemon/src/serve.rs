//! The life of the daemon: prepare the state directory, start the node, say so, wait, drain.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, IsTerminal};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use kvtier::keys::KeyError;
use kvtier::node::{Node, StartError, StartProgress};
use rustix::fs::{FlockOperation, flock};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::admin::audit::{AUDIT_FILE, AuditLog};
use crate::admin::host::HostNames;
use crate::admin::rate::{Limits, Rate};
use crate::admin::tls::Tls;
use crate::admin::tokens::TokenRegister;
use crate::admin::{Admin, Parts, Phase};
use crate::configuration::{Configuration, DaemonSettings, LogFormat};
use crate::exit::{ExitCode, Failure};
use crate::{size, state_file};

/// File in the state directory that holds the admin server's address while the daemon runs; its URL when it speaks TLS.
pub const HTTP_ADDRESS_FILE: &str = "http.addr";

/// File in the state directory that holds the admin server's bearer token.
pub const ADMIN_TOKEN_FILE: &str = "admin.token";

const ADMIN_TOKEN_BYTES_MAX: u64 = 4096;

/// File in the state directory that a running daemon holds locked.
const LOCK_FILE: &str = "daemon.lock";

/// Runs until a signal asks to stop, then drains.
///
/// # Errors
/// In words and with a code: what could not be had, and what to do.
pub fn run(configuration: Configuration) -> Result<(), Failure> {
    start_logging(&configuration);
    for warning in &configuration.warnings {
        tracing::warn!("{warning}");
    }
    let state = StateDirectory::prepare(&configuration.node.state_dir, configuration.node.socket_mode)?;
    let http = configuration
        .http
        .map(|address| Door::open(&configuration.daemon, address))
        .transpose()?;
    let admin = Admin::new(admin_parts(&configuration.daemon, &state, http.as_ref())?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .build()
        .map_err(|error| {
            Failure::new(
                ExitCode::Unavailable,
                format!("the process may not start what it needs: {error}"),
            )
        })?;
    let result = runtime.block_on(live(configuration, &state, admin, http));
    state.forget_http_address();
    // What is left are connections of the admin server and, after a failed start, nothing.
    runtime.shutdown_timeout(Duration::from_millis(100));
    result
}

async fn live(
    configuration: Configuration,
    state: &StateDirectory,
    admin: Admin,
    http: Option<Door>,
) -> Result<(), Failure> {
    let mut stops = Stops::new()?;
    let http_url = match http {
        None => None,
        Some(Door { listener, address, tls }) => {
            let broken = |error: io::Error| Failure::new(ExitCode::Unavailable, format!("admin HTTP server: {error}"));
            let listener = tokio::net::TcpListener::from_std(listener).map_err(broken)?;
            state.remember_http_address(address, tls.is_some())?;
            let server = admin.clone();
            let scheme = if tls.is_some() { "https" } else { "http" };
            let connections_max = configuration.daemon.http_connections_max;
            tokio::spawn(async move {
                if let Err(error) = server.serve(listener, connections_max, tls.as_ref()).await {
                    tracing::error!("the admin HTTP server ended: {error}");
                }
            });
            Some(format!("{scheme}://{address}"))
        }
    };

    let drain_timeout = Duration::from_millis(configuration.daemon.drain_timeout_ms);
    let node_settings = configuration.node;
    let progress = StartReport::default();
    let starting =
        tokio::task::spawn_blocking(move || Node::start(node_settings, Box::new(move |step| progress.show(&step))));
    let node = tokio::select! {
        started = starting => match started {
            Ok(started) => started.map_err(|error| start_failure(&error))?,
            Err(_) => return Err(Failure::new(ExitCode::Internal, "the node panicked while it started: report a bug")),
        },
        name = stops.next() => {
            tracing::info!("{name} before the node was ready: stopped, nothing was served");
            state.forget_http_address();
            // The starting thread cannot be interrupted, and nobody has seen anything of it yet.
            process::exit(0);
        }
    };
    let socket = node.socket().to_path_buf();
    admin.slot().fill(node);
    admin.set_phase(Phase::Ready);
    notify(&[NotifyState::Ready]);
    say_ready(&socket, http_url.as_deref(), state.path());

    let name = stops.next().await;
    tracing::info!(
        "{name}: draining for at most {} ms; another signal stops at once",
        drain_timeout.as_millis()
    );
    notify(&[NotifyState::Stopping]);
    admin.set_phase(Phase::Draining);
    let drainer = admin.clone();
    let draining =
        tokio::task::spawn_blocking(move || drainer.slot().take().map(|node| node.drain_and_stop(drain_timeout)));
    tokio::select! {
        drained = draining => {
            match drained {
                Ok(Some(report)) => tell_drained(&report),
                _ => return Err(Failure::new(ExitCode::Internal, "the node panicked while it drained: report a bug")),
            }
            Ok(())
        }
        name = stops.next() => {
            tracing::warn!("{name} again: stopped without draining");
            state.forget_http_address();
            process::exit(ExitCode::No as i32);
        }
    }
}

fn tell_drained(report: &kvtier::node::DrainReport) {
    let held = report.held;
    match report.flush {
        Some(flush) => tracing::info!(held, written = flush.written, left_out = flush.left_out, "drained"),
        None => tracing::warn!(
            held,
            "stopped before all blocks were written: raise drain_timeout_ms to wait longer"
        ),
    }
}

/// The signals that ask to stop.
struct Stops {
    terminate: Signal,
    interrupt: Signal,
}

impl Stops {
    fn new() -> Result<Stops, Failure> {
        let failed =
            |error: io::Error| Failure::new(ExitCode::Unavailable, format!("signals cannot be received: {error}"));
        Ok(Stops {
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Tells systemd, when it listens.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("systemd was not told: {error}");
    }
}

fn say_ready(socket: &Path, http: Option<&str>, state: &Path) {
    let admin = http.unwrap_or("off");
    let line = format!(
        "kv-daemon ready: socket {}, admin {admin}, state {}\n",
        socket.display(),
        state.display()
    );
    // Whoever started us may have closed our output; the log still says it.
    let _ = crate::output::print(&line);
    tracing::info!(socket = %socket.display(), admin, "ready");
}

fn start_failure(error: &StartError) -> Failure {
    let code = match error {
        StartError::StateDirectory { .. }
        | StartError::Trace { .. }
        | StartError::Socket { .. }
        | StartError::SocketInUse { .. } => ExitCode::CannotCreate,
        StartError::Keys(error) => key_code(error),
        error if error.is_of_a_later_version() => ExitCode::DataFormat,
        StartError::Names { .. } | StartError::Remote { .. } | StartError::HbmSegment { .. } => ExitCode::Configuration,
        _ => ExitCode::Unavailable,
    };
    Failure::new(code, error.to_string())
}

/// A file that cannot be had, one that is not what it should be, or a setting that names the wrong one.
pub(crate) fn key_code(error: &KeyError) -> ExitCode {
    match error {
        KeyError::InUse { .. } | KeyError::Io { .. } => ExitCode::CannotCreate,
        KeyError::Randomness(_) => ExitCode::Unavailable,
        KeyError::Newer { .. } | KeyError::Unreadable { .. } | KeyError::BadAnchor { .. } => ExitCode::DataFormat,
        _ => ExitCode::Configuration,
    }
}

/// Where the admin server listens, and in what.
struct Door {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<Tls>,
}

impl Door {
    fn open(settings: &DaemonSettings, address: SocketAddr) -> Result<Door, Failure> {
        let tls = match (&settings.http_tls_certificate_file, &settings.http_tls_key_file) {
            (Some(certificate), Some(key)) => {
                if fs::metadata(key).is_ok_and(|metadata| metadata.mode() & 0o007 != 0) {
                    tracing::warn!(
                        "http_tls_key_file {}: others may read it: chmod o-rwx it",
                        key.display()
                    );
                }
                let client_ca = settings.http_tls_client_ca_file.as_deref();
                let tls = Tls::load(certificate, key, client_ca)
                    .map_err(|error| Failure::new(ExitCode::Configuration, error.to_string()))?;
                Some(tls)
            }
            _ => None,
        };
        let bound = TcpListener::bind(address).and_then(|listener| {
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok(Door { listener, address, tls })
        });
        bound.map_err(|error| {
            let words = format!(
                "setting http = {address}: {error}: choose another --http address, port 0 for a free one, or off"
            );
            Failure::new(ExitCode::Unavailable, words)
        })
    }
}

fn admin_parts(settings: &DaemonSettings, state: &StateDirectory, door: Option<&Door>) -> Result<Parts, Failure> {
    let tokens = TokenRegister::open(state.path(), &state.admin_token()?)
        .map_err(|words| Failure::new(ExitCode::CannotCreate, words))?;
    let (audit, warnings) = AuditLog::open(state.path(), settings.audit_file_bytes_max).map_err(|error| {
        let words = format!(
            "audit log {}: {error}: put it right, or move it away to begin a new one",
            state.path().join(AUDIT_FILE).display()
        );
        Failure::new(ExitCode::CannotCreate, words)
    })?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let failures = f64::from(settings.http_failed_authentications_per_second_max);
    let limits = Limits::new(
        Rate {
            per_second: f64::from(settings.http_requests_per_second_max),
            burst: f64::from(settings.http_requests_burst_max),
        },
        Rate {
            per_second: failures,
            burst: failures * 4.0,
        },
    );
    let hosts = door.map_or_else(HostNames::default, |door| {
        HostNames::new(door.address, door.tls.as_ref().map(|tls| tls.certificate().clone()))
    });
    Ok(Parts {
        tokens,
        audit,
        limits,
        hosts,
        event_subscribers_max: settings.http_event_subscribers_max,
        purges: Box::new(crate::admin::node::of_slot),
    })
}

fn start_logging(configuration: &Configuration) {
    let filter = EnvFilter::try_new(&configuration.daemon.log_level).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    // A second call in one process (a test) keeps the first subscriber, which is as good.
    let _ = match configuration.daemon.log_format {
        LogFormat::Text => builder.with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

/// Start progress: a bar on a terminal, two log lines elsewhere.
#[derive(Default)]
struct StartReport(Mutex<Option<ProgressBar>>);

impl StartReport {
    fn show(&self, step: &StartProgress) {
        let mut bar = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match step {
            StartProgress::Note(note) => tracing::info!("{note}"),
            StartProgress::Warning(warning) => tracing::warn!("{warning}"),
            StartProgress::Prefault {
                done_bytes,
                total_bytes,
            } => {
                let bar = bar.get_or_insert_with(|| {
                    if !io::stderr().is_terminal() {
                        tracing::info!("faulting in {} of host memory", size::rounded(*total_bytes));
                        return ProgressBar::hidden();
                    }
                    let style = ProgressStyle::with_template("  host memory [{bar:32}] {bytes} of {total_bytes}")
                        .unwrap_or_else(|_| ProgressStyle::default_bar());
                    ProgressBar::new(*total_bytes).with_style(style)
                });
                bar.set_position(*done_bytes);
                if done_bytes >= total_bytes && !bar.is_finished() {
                    bar.finish_and_clear();
                }
            }
        }
    }
}

/// The state directory, locked for as long as this lives.
struct StateDirectory {
    path: PathBuf,
    _lock: File,
}

impl StateDirectory {
    /// Makes the directory if need be and locks it. A new one is closed to others, or passable (0711) when the socket in it
    /// is meant for them.
    fn prepare(path: &Path, socket_mode: u32) -> Result<StateDirectory, Failure> {
        let cannot = |what: &str, error: &dyn std::fmt::Display| {
            let words = format!(
                "state_dir {}: {what}: {error}: name a directory that this user can write",
                path.display()
            );
            Failure::new(ExitCode::CannotCreate, words)
        };
        let others = socket_mode & 0o077 != 0;
        let mode = if others { 0o711 } else { 0o700 };
        DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(path)
            .map_err(|error| cannot("it cannot be made", &error))?;
        let metadata = fs::metadata(path).map_err(|error| cannot("it cannot be looked at", &error))?;
        if metadata.mode() & 0o022 != 0 && metadata.mode() & 0o1000 == 0 {
            tracing::warn!(
                "state_dir {} can be written by other users: chmod go-w it",
                path.display()
            );
        }
        if others && metadata.mode() & 0o011 == 0 {
            tracing::warn!(
                "others cannot pass state_dir {}: chmod 0711 it if the socket lies there",
                path.display()
            );
        }
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(state_file::no_follow())
            .open(path.join(LOCK_FILE))
            .map_err(|error| cannot("its lock cannot be made", &error))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            let words = match error {
                rustix::io::Errno::WOULDBLOCK => format!(
                    "state_dir {}: another kv-daemon runs there: stop it, or choose another --state-dir",
                    path.display()
                ),
                error => format!("state_dir {}: it cannot be locked: {error}", path.display()),
            };
            Failure::new(ExitCode::CannotCreate, words)
        })?;
        Ok(StateDirectory {
            path: path.to_path_buf(),
            _lock: lock,
        })
    }

    fn path(&self) -> &Path {
        &self.path
    }

    /// The admin token: read, or drawn and written at first start.
    fn admin_token(&self) -> Result<String, Failure> {
        let path = self.path.join(ADMIN_TOKEN_FILE);
        let cannot = |what: String| {
            let words = format!(
                "admin token {}: {what}; remove the file to have a new one made",
                path.display()
            );
            Failure::new(ExitCode::CannotCreate, words)
        };
        match state_file::read_private(&path, ADMIN_TOKEN_BYTES_MAX).map_err(|error| cannot(error.to_string()))? {
            Some(text) => {
                let token = text.trim();
                if token.len() < 32 || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
                    return Err(cannot(
                        "it must hold one token of at least 32 visible characters".into(),
                    ));
                }
                Ok(token.to_string())
            }
            None => {
                let mut random = [0; 32];
                getrandom::fill(&mut random).map_err(|error| cannot(error.to_string()))?;
                let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
                state_file::replace(&path, 0o600, format!("{token}\n").as_bytes())
                    .map_err(|error| cannot(error.to_string()))?;
                Ok(token)
            }
        }
    }

    fn remember_http_address(&self, address: SocketAddr, tls: bool) -> Result<(), Failure> {
        let scheme = if tls { "https://" } else { "" };
        let text = format!("{scheme}{address}\n");
        state_file::replace(&self.path.join(HTTP_ADDRESS_FILE), 0o644, text.as_bytes()).map_err(|error| {
            let words = format!(
                "state_dir {}: {HTTP_ADDRESS_FILE} cannot be written: {error}",
                self.path.display()
            );
            Failure::new(ExitCode::CannotCreate, words)
        })
    }

    fn forget_http_address(&self) {
        // Not there when no server was started.
        let _ = fs::remove_file(self.path.join(HTTP_ADDRESS_FILE));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_second_daemon_is_refused_and_the_token_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let state = StateDirectory::prepare(&path, 0o600).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        let refused = StateDirectory::prepare(&path, 0o600).err().expect("locked");
        assert_eq!(refused.code, ExitCode::CannotCreate);
        assert!(refused.message.contains("another kv-daemon"), "{refused}");
        let token = state.admin_token().unwrap();
        assert_eq!(token.len(), 64);
        assert_eq!(fs::metadata(path.join(ADMIN_TOKEN_FILE)).unwrap().mode() & 0o777, 0o600);
        assert_eq!(state.admin_token().unwrap(), token);
        drop(state);
        StateDirectory::prepare(&path, 0o600).expect("the lock went with its holder");
    }

    #[test]
    fn a_token_that_others_can_read_or_that_is_short_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDirectory::prepare(&directory.path().join("s"), 0o666).unwrap();
        assert_eq!(
            fs::metadata(state.path()).unwrap().mode() & 0o777,
            0o711,
            "others may pass to the socket"
        );
        let path = state.path().join(ADMIN_TOKEN_FILE);
        fs::write(&path, "a".repeat(64)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(state.admin_token().unwrap_err().message.contains("others may read it"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(state.admin_token().unwrap(), "a".repeat(64));
        fs::write(&path, "short").unwrap();
        assert!(state.admin_token().unwrap_err().message.contains("at least 32"));
    }
}
