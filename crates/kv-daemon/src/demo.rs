//! `kv-daemon demo`: the whole of it in under a minute, for somebody who has never seen it.
//!
//! Three processes, as in real use: this one, a daemon, and a client that replays a generated chat workload. The other two
//! are this binary again. Everything lies in one temporary directory, which goes when this process ends, also on Ctrl-C;
//! should this process be killed outright, the kernel stops the other two.

mod table;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use kvtier_sim::trace::write_trace;
use kvtier_sim::workload::ChatWorkload;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};

use crate::exit::{ExitCode, Failure};
use crate::replay::Report;
use crate::size;

const HOST_BYTES: u64 = 128 << 20;
const NVME_BYTES: u64 = 512 << 20;
const BLOCK_BYTES: u64 = 64 << 10;

/// Disk space that the demo wants beside its NVMe tier.
const SPARE_BYTES: u64 = 64 << 20;

/// How long the daemon may take to be ready, and to stop.
const PATIENCE: Duration = Duration::from_secs(30);

/// What can be chosen about the demo.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Fixes the workload
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Chats in the workload
    #[arg(long, default_value_t = 1200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    sessions: u32,
    /// Print the report as JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Runs it.
///
/// # Errors
/// In words: what was missing, or what the daemon or the client said last.
pub fn run(options: &Options) -> Result<(), Failure> {
    let stopped = watch_signals()?;
    let place = Place::choose()?;
    say(
        options,
        &format!(
            "starting a daemon with {} of host memory and {} on disk at {}",
            size::rounded(HOST_BYTES),
            size::rounded(NVME_BYTES),
            place.directory.path().display()
        ),
    );
    // Many chats at once, whose readers think for a minute: more than host memory holds, so that disk has its part.
    let workload = ChatWorkload {
        seed: options.seed,
        sessions: options.sessions,
        session_gap_ms: 400,
        turn_gap_ms: 60_000,
        ..ChatWorkload::default()
    };
    let trace = place.directory.path().join("chat.jsonl");
    let requests = write_workload(&workload, &trace)?;
    let mut daemon = Process::start_daemon(&place, &stopped)?;
    say(
        options,
        &format!(
            "replaying {requests} requests of {} chats from another process, every byte checked",
            options.sessions
        ),
    );
    let report = replay(&place, &trace, &mut daemon, &stopped);
    let ended = daemon.stop();
    let report = report?;
    ended?;
    drop(place);
    if options.json {
        let json = serde_json::to_string_pretty(&report).map_err(|error| internal(&error))?;
        crate::output::print(&format!("{json}\n"))?;
    } else {
        crate::output::print(&table::render(&report, HOST_BYTES, NVME_BYTES))?;
    }
    if report.wrong_bytes > 0 {
        return Err(Failure::new(
            ExitCode::No,
            format!(
                "{} bytes were wrong: report a bug with the seed {}",
                report.wrong_bytes, options.seed
            ),
        ));
    }
    Ok(())
}

fn say(options: &Options, line: &str) {
    if !options.json {
        eprintln!("{line}");
    }
}

fn internal(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(ExitCode::Internal, format!("{error}: report a bug"))
}

/// A flag that rises with the first SIGINT or SIGTERM. From then on this process ends by itself, in order.
fn watch_signals() -> Result<Arc<AtomicBool>, Failure> {
    let failed =
        |error: std::io::Error| Failure::new(ExitCode::Unavailable, format!("signals cannot be received: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    let flag = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&flag);
    let (mut interrupt, mut terminate) = {
        let _context = runtime.enter();
        (
            signal(SignalKind::interrupt()).map_err(failed)?,
            signal(SignalKind::terminate()).map_err(failed)?,
        )
    };
    let wait = move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        raised.store(true, Ordering::Release);
    };
    std::thread::Builder::new()
        .name("demo-signals".into())
        .spawn(wait)
        .map_err(failed)?;
    Ok(flag)
}

/// Where the demo lives.
struct Place {
    directory: TempDir,
    /// Only when the directory's own path is too long for a socket.
    socket_directory: Option<TempDir>,
}

impl Place {
    /// The first of the usual temporary places with enough room: `$TMPDIR` or `/tmp`, `/var/tmp`, the user's own state.
    fn choose() -> Result<Place, Failure> {
        let environment = crate::configuration::environment();
        let mut candidates = vec![std::env::temp_dir(), PathBuf::from("/var/tmp")];
        candidates.extend(
            crate::configuration::default_state_dir(&BTreeMap::from_iter(environment), false)
                .and_then(|path| path.parent().map(Path::to_path_buf)),
        );
        candidates.extend(std::env::current_dir().ok());
        let mut tried = Vec::new();
        for candidate in candidates {
            match Place::at(&candidate) {
                Ok(place) => return Ok(place),
                Err(reason) => tried.push(format!("{}: {reason}", candidate.display())),
            }
        }
        let needed = size::rounded(NVME_BYTES + SPARE_BYTES);
        let words = format!(
            "no place with {needed} free ({}): set TMPDIR to a directory with room",
            tried.join("; ")
        );
        Err(Failure::new(ExitCode::CannotCreate, words))
    }

    fn at(parent: &Path) -> Result<Place, String> {
        let space = rustix::fs::statvfs(parent).map_err(|error| error.to_string())?;
        let free_bytes = space.f_bavail.saturating_mul(space.f_frsize);
        if free_bytes < NVME_BYTES + SPARE_BYTES {
            return Err(format!("{} free", size::rounded(free_bytes)));
        }
        let directory = tempfile::Builder::new()
            .prefix("kvtier-demo-")
            .tempdir_in(parent)
            .map_err(|error| error.to_string())?;
        let mut place = Place {
            directory,
            socket_directory: None,
        };
        if place.socket().as_os_str().len() > 100 {
            let short = tempfile::Builder::new().prefix("kv").tempdir_in("/tmp");
            place.socket_directory =
                Some(short.map_err(|error| format!("too long a path for a socket, and /tmp: {error}"))?);
        }
        Ok(place)
    }

    fn socket(&self) -> PathBuf {
        self.socket_directory
            .as_ref()
            .unwrap_or(&self.directory)
            .path()
            .join("kvtier.sock")
    }
}

fn write_workload(workload: &ChatWorkload, path: &Path) -> Result<usize, Failure> {
    let requests = workload.generate();
    let written = File::create(path).and_then(|file| {
        let mut target = BufWriter::new(file);
        write_trace(&requests, &mut target)?;
        target.flush()
    });
    written.map_err(|error| Failure::new(ExitCode::CannotCreate, format!("{}: {error}", path.display())))?;
    Ok(requests.len())
}

/// A child process and where its last words go.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// This binary again, untouched by settings of the machine.
    fn command() -> Result<Command, Failure> {
        let program = std::env::current_exe().map_err(|error| {
            Failure::new(
                ExitCode::Unavailable,
                format!("this program cannot find its own file ({error}): start it from where it lies"),
            )
        })?;
        let mut command = Command::new(program);
        for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("KVTIER_")) {
            command.env_remove(variable);
        }
        command.env("KVTIER_CONFIG", "/dev/null").stdin(Stdio::null());
        Ok(command)
    }

    fn start_daemon(place: &Place, stopped: &AtomicBool) -> Result<Process, Failure> {
        let log = place.directory.path().join("daemon.log");
        let log_file = File::create(&log)
            .map_err(|error| Failure::new(ExitCode::CannotCreate, format!("{}: {error}", log.display())))?;
        let child = Process::command()?
            .args([
                "serve",
                "--exit-with-parent",
                "--http",
                "127.0.0.1:0",
                "--log-level",
                "info",
            ])
            .args([
                "--host-bytes",
                &HOST_BYTES.to_string(),
                "--nvme-bytes",
                &NVME_BYTES.to_string(),
            ])
            .arg("--state-dir")
            .arg(place.directory.path().join("state"))
            .arg("--socket")
            .arg(place.socket())
            .stdout(Stdio::piped())
            .stderr(log_file)
            .spawn()
            .map_err(|error| Failure::new(ExitCode::Unavailable, format!("the daemon cannot be started: {error}")))?;
        let mut daemon = Process { child, log };
        daemon.wait_until_ready(stopped)?;
        Ok(daemon)
    }

    /// The daemon says one line when it is ready. It is awaited on a thread, so that a signal is seen meanwhile.
    fn wait_until_ready(&mut self, stopped: &AtomicBool) -> Result<(), Failure> {
        let Some(output) = self.child.stdout.take() else {
            return Err(internal(&"no pipe from the daemon"));
        };
        let reader = std::thread::spawn(move || {
            let mut line = String::new();
            let read = BufReader::new(output).read_line(&mut line);
            read.is_ok() && line.contains("ready")
        });
        let begun = Instant::now();
        while !reader.is_finished() {
            check(stopped)?;
            if begun.elapsed() > PATIENCE {
                return Err(self.failure("is not ready after 30 s"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        match reader.join() {
            Ok(true) => Ok(()),
            _ => Err(self.failure("ended before it was ready")),
        }
    }

    fn failure(&self, what: &str) -> Failure {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(8)..].join("\n  ");
        Failure::new(
            ExitCode::Unavailable,
            format!("the daemon {what}. Its last words:\n  {last}"),
        )
    }

    /// Asks the daemon to stop and waits for it.
    fn stop(&mut self) -> Result<(), Failure> {
        signal_child(&self.child);
        let asked = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(self.failure(&format!("ended with {status}"))),
                Ok(None) if asked.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(5)),
                Ok(None) => return Err(self.failure("does not stop")),
                Err(error) => return Err(internal(&error)),
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            signal_child(&self.child);
            // Long enough for a drain; then nothing of the demo may stay.
            for _ in 0..400 {
                std::thread::sleep(Duration::from_millis(5));
                if !matches!(self.child.try_wait(), Ok(None)) {
                    return;
                }
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn signal_child(child: &Child) {
    if let Some(process) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It may have ended by itself, which is what is wanted.
        let _ = kill_process(process, Signal::TERM);
    }
}

fn check(stopped: &AtomicBool) -> Result<(), Failure> {
    if stopped.load(Ordering::Acquire) {
        return Err(Failure {
            code: ExitCode::TryAgain,
            message: "stopped; nothing was left behind".into(),
        });
    }
    Ok(())
}

fn replay(place: &Place, trace: &Path, daemon: &mut Process, stopped: &AtomicBool) -> Result<Report, Failure> {
    let mut child = Process::command()?
        .arg("demo-client")
        .arg(trace)
        .arg("--socket")
        .arg(place.socket())
        .args(["--block-bytes", &BLOCK_BYTES.to_string(), "--json", "--memcpy"])
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| Failure::new(ExitCode::Unavailable, format!("the client cannot be started: {error}")))?;
    let output = child.stdout.take();
    let mut client = Process {
        child,
        log: daemon.log.clone(),
    };
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let read = output.map(|mut output| output.read_to_string(&mut text));
        read.and_then(Result::ok).map(|_| text).unwrap_or_default()
    });
    let status = loop {
        check(stopped)?;
        if let Ok(Some(status)) = daemon.child.try_wait() {
            return Err(daemon.failure(&format!("ended with {status} under its client")));
        }
        match client.child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => std::thread::sleep(Duration::from_millis(10)),
            Err(error) => return Err(internal(&error)),
        }
    };
    let text = reader.join().unwrap_or_default();
    match serde_json::from_str::<Report>(&text) {
        Ok(report) => Ok(report),
        Err(_) => Err(Failure::new(
            ExitCode::Unavailable,
            format!("the client ended with {status} and no report; what it said stands above"),
        )),
    }
}
