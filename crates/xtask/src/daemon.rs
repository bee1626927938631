//! A daemon of its own for one command, and `kvctl` to ask it.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::outcome::Failure;
use crate::process;

const READY_LIMIT: Duration = Duration::from_secs(120);
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// Where a daemon's state, socket and log lie, and the programs that were built.
pub(crate) struct Site<'a> {
    pub(crate) programs: &'a Path,
    pub(crate) directory: &'a Path,
}

impl Site<'_> {
    fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.join("s")
    }

    pub(crate) fn kvctl(&self) -> Kvctl {
        Kvctl {
            program: self.programs.join("kvctl"),
            socket: self.socket(),
        }
    }

    /// Starts `kv-daemon serve` with these flags on the site's state directory and waits until it answers.
    pub(crate) fn serve(&self, flags: &[&str]) -> Result<Daemon, Failure> {
        let log = OpenOptions::new().create(true).append(true).open(self.log())?;
        let child = Command::new(self.programs.join("kv-daemon"))
            .args(["serve", "--http", "127.0.0.1:0"])
            .args(flags)
            .arg("--state-dir")
            .arg(self.directory.join("state"))
            .arg("--socket")
            .arg(self.socket())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|error| Failure::new(format!("cannot start kv-daemon: {error}")))?;
        let mut daemon = Daemon { process: child };
        daemon.wait_until_ready(&self.kvctl())?;
        Ok(daemon)
    }

    /// The same failure with the last that the daemon said.
    pub(crate) fn explain(&self, failure: Failure) -> Failure {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        Failure {
            message: format!("{}\nthe daemon's last lines:\n{tail}", failure.message),
            ..failure
        }
    }
}

/// The operator's tool, asked for JSON.
pub(crate) struct Kvctl {
    program: PathBuf,
    socket: PathBuf,
}

impl Kvctl {
    /// Runs one command with `--json` and parses what it printed.
    pub(crate) fn answer(&self, arguments: &[&OsStr], limit: Duration) -> Result<Value, Failure> {
        let mut command = Command::new(&self.program);
        command.arg("--socket").arg(&self.socket).args(arguments).arg("--json");
        let (mut output, mut errors) = (String::new(), String::new());
        let status = process::stream(&mut command, "kvctl", limit, |stream, line| {
            let kept = if stream == process::Stream::Output {
                &mut output
            } else {
                &mut errors
            };
            kept.push_str(line);
            kept.push('\n');
        })?;
        if !status.success() {
            return Err(Failure::new(format!("kvctl: {status}\n{errors}{output}")));
        }
        serde_json::from_str(&output).map_err(|error| Failure::new(format!("kvctl printed no JSON: {error}\n{output}")))
    }
}

/// A daemon that does not outlive its test.
pub(crate) struct Daemon {
    process: Child,
}

impl Daemon {
    fn wait_until_ready(&mut self, kvctl: &Kvctl) -> Result<(), Failure> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait()? {
                return Err(Failure::new(format!("kv-daemon ended before it was ready: {status}")));
            }
            match kvctl.answer(&["status".as_ref()], READY_LIMIT) {
                Ok(_) => return Ok(()),
                Err(failure) if started.elapsed() > READY_LIMIT => {
                    return Err(Failure::new(format!(
                        "kv-daemon does not become ready: {}",
                        failure.message
                    )));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// SIGTERM ends it with status 0, in bounded time.
    pub(crate) fn drain(mut self) -> Result<(), Failure> {
        let process = i32::try_from(self.process.id()).ok().and_then(Pid::from_raw);
        let process = process.ok_or_else(|| Failure::new("kv-daemon has no process id"))?;
        kill_process(process, Signal::TERM)
            .map_err(|error| Failure::new(format!("cannot signal kv-daemon: {error}")))?;
        let started = Instant::now();
        while started.elapsed() < DRAIN_LIMIT {
            match self.process.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(Failure::new(format!("kv-daemon did not drain: {status}"))),
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        Err(Failure::new(format!(
            "kv-daemon still runs {} s after SIGTERM",
            DRAIN_LIMIT.as_secs()
        )))
    }

    /// Kills it with -9 and waits until it is gone.
    pub(crate) fn kill(mut self) -> Result<(), Failure> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        process::kill_tree(&mut self.process);
    }
}
