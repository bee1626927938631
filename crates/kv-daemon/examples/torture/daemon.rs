//! A daemon of its own, and the directory that outlives it.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kv_daemon::exit::{ExitCode, Failure};
use kvtier::client::ClientOptions;
use kvtier::client::blocking::Client;
use kvtier::node::Status;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::plan::Shape;

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// The program under torture and its directory.
#[derive(Debug)]
pub(crate) struct Stage {
    program: PathBuf,
    directory: PathBuf,
    temporary: Option<TempDir>,
    /// What the NVMe tier lies in, if not in the state directory.
    device: Option<PathBuf>,
}

/// More than any shape's NVMe space.
const DEVICE_BYTES: u64 = 1 << 30;

impl Stage {
    /// Makes a directory in `parent`, or where temporary ones are made.
    pub(crate) fn set(program: PathBuf, parent: Option<&Path>) -> Result<Stage, Failure> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("kvt");
        let made = match parent {
            Some(parent) => std::fs::create_dir_all(parent).and_then(|()| builder.tempdir_in(parent)),
            None => builder.tempdir(),
        };
        let temporary = made.map_err(|error| {
            let words = format!("no directory for the daemon's state: {error}: name another with --directory");
            Failure::new(ExitCode::CannotCreate, words)
        })?;
        Ok(Stage {
            program,
            directory: temporary.path().to_path_buf(),
            temporary: Some(temporary),
            device: None,
        })
    }

    /// From here on the NVMe tier is one file, larger than any shape asks for.
    pub(crate) fn use_device(&mut self) -> Result<(), Failure> {
        let path = self.directory.join("device");
        File::create(&path)
            .and_then(|file| file.set_len(DEVICE_BYTES))
            .map_err(|error| system("the file for the NVMe tier", &error))?;
        self.device = Some(path);
        Ok(())
    }

    /// Leaves the directory behind.
    pub(crate) fn keep(&mut self) {
        if let Some(temporary) = self.temporary.take() {
            let _ = temporary.keep();
        }
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The daemon's state directory.
    pub(crate) fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    fn log(&self) -> PathBuf {
        self.directory.join("daemon.log")
    }

    /// Starts a daemon on the state directory and waits until it answers.
    pub(crate) fn start(&self, shape: &Shape) -> Result<Daemon, Failure> {
        let log = OpenOptions::new().create(true).append(true).open(self.log());
        let log = log.map_err(|error| system("the daemon's log", &error))?;
        let mut command = Command::new(&self.program);
        // What is tortured is what the flags say, not the settings of this machine.
        for (variable, _) in std::env::vars_os() {
            if variable.to_str().is_some_and(|name| name.starts_with("KVTIER_")) {
                command.env_remove(variable);
            }
        }
        let socket = self.directory.join("s");
        let begun = Instant::now();
        let child = command
            .args(["serve", "--exit-with-parent", "--http", "off", "--log-level", "warn"])
            .arg("--state-dir")
            .arg(self.state())
            .arg("--socket")
            .arg(&socket)
            .args(["--nvme-engine", shape.engine, "--encryption", shape.encryption])
            .args(["--host-bytes", &shape.host_bytes.to_string()])
            .args(["--nvme-bytes", &shape.nvme_bytes.to_string()])
            .args(
                self.device
                    .iter()
                    .flat_map(|path| ["--nvme-discard".as_ref(), "--nvme-device".as_ref(), path.as_os_str()]),
            )
            .env("KVTIER_NVME_SEGMENT_BYTES", shape.segment_bytes.to_string())
            .env("KVTIER_CONFIG", "/dev/null")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|error| system(&format!("start of {}", self.program.display()), &error))?;
        let mut daemon = Daemon {
            child,
            options: ClientOptions::new(socket),
            log: self.log(),
            ready_after: Duration::ZERO,
        };
        loop {
            if Client::connect(daemon.options.clone()).is_ok() {
                daemon.ready_after = begun.elapsed();
                return Ok(daemon);
            }
            if let Some(status) = daemon.child.try_wait().map_err(|error| system("a look", &error))? {
                return Err(daemon.failure(&format!("ended with {status} before it answered")));
            }
            if begun.elapsed() > START_LIMIT {
                return Err(daemon.failure("does not answer"));
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    }
}

/// A running `kv-daemon serve`. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    options: ClientOptions,
    log: PathBuf,
    /// How long it took to answer.
    pub(crate) ready_after: Duration,
}

impl Daemon {
    pub(crate) fn connect(&self) -> Result<Client, Failure> {
        Client::connect(self.options.clone()).map_err(|error| self.failure(&format!("refused a client: {error}")))
    }

    /// Kills it with -9 and waits until it is gone.
    pub(crate) fn kill(mut self) -> Result<(), Failure> {
        let killed = self.child.kill().and_then(|()| self.child.wait());
        killed
            .map(drop)
            .map_err(|error| system("kill -9 of the daemon", &error))
    }

    /// Asks it to stop in order and waits until it has.
    pub(crate) fn stop(mut self) -> Result<(), Failure> {
        let process = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(process) = process {
            kill_process(process, Signal::TERM).map_err(|error| system("SIGTERM", &error.into()))?;
        }
        let asked = Instant::now();
        while asked.elapsed() < STOP_LIMIT {
            match self.child.try_wait().map_err(|error| system("a look", &error))? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(self.failure(&format!("ended with {status} instead of stopping in order"))),
                None => std::thread::sleep(Duration::from_millis(3)),
            }
        }
        Err(self.failure("does not stop"))
    }

    /// What happened, with the end of the daemon's log.
    pub(crate) fn failure(&self, words: &str) -> Failure {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(8)..].join("\n");
        Failure::new(ExitCode::No, format!("the daemon {words}; its last lines:\n{tail}"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The daemon's counters.
pub(crate) fn status(client: &Client) -> Result<Status, Failure> {
    let text = client.status().map_err(|error| {
        let words = format!("the daemon does not say how it is: {error}");
        Failure::new(ExitCode::No, words)
    })?;
    serde_json::from_str(&text)
        .map_err(|error| Failure::new(ExitCode::Internal, format!("the daemon's status is no JSON: {error}")))
}

/// The system refused something that no daemon is to blame for.
pub(crate) fn system(what: &str, error: &std::io::Error) -> Failure {
    Failure::new(ExitCode::Unavailable, format!("{what}: {error}"))
}
