use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::BenchError;

/// A `kv-daemon serve` that lives as long as this value.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) socket: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts `program` with `host_bytes` of memory and no NVMe tier, and waits until its socket answers.
    ///
    /// Settings of this machine (a file, the environment) do not count: what is measured is what the flags say.
    pub(crate) fn start(program: &Path, directory: &Path, host_bytes: u64) -> Result<Daemon, BenchError> {
        let socket = directory.join("kvtier.sock");
        let log = directory.join("daemon.log");
        let output = File::create(&log).map_err(BenchError::system(format!("creation of {}", log.display())))?;
        let mut command = Command::new(program);
        for (variable, _) in std::env::vars_os() {
            if variable.to_str().is_some_and(|name| name.starts_with("KVTIER_")) {
                command.env_remove(variable);
            }
        }
        let child = command
            .arg("serve")
            .arg("--state-dir")
            .arg(directory.join("state"))
            .arg("--socket")
            .arg(&socket)
            .args([
                "--http",
                "127.0.0.1:0",
                "--exit-with-parent",
                "--nvme-bytes",
                "0",
                "--host-bytes",
            ])
            .arg(host_bytes.to_string())
            .env("KVTIER_CONFIG", "/dev/null")
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(BenchError::system("the daemon's log"))?)
            .stderr(output)
            .spawn()
            .map_err(BenchError::system(format!("start of {}", program.display())))?;
        let mut daemon = Daemon { child, socket, log };
        let started = Instant::now();
        while UnixStream::connect(&daemon.socket).is_err() {
            let ended = daemon
                .child
                .try_wait()
                .map_err(BenchError::system("a look at the daemon"))?;
            if let Some(status) = ended {
                return Err(BenchError::Daemon(format!(
                    "{status} before it listened: {}",
                    daemon.last_words()
                )));
            }
            if started.elapsed() > Duration::from_secs(120) {
                return Err(BenchError::Daemon(format!(
                    "does not listen after two minutes: {}",
                    daemon.last_words()
                )));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(daemon)
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// The end of its log: what to show when something went wrong.
    pub(crate) fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(6)..].join("\n")
    }

    /// Asks it to stop and waits until it has.
    pub(crate) fn stop(mut self) -> Result<(), BenchError> {
        if let Some(process) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(process, Signal::TERM);
        }
        let asked = Instant::now();
        loop {
            match self
                .child
                .try_wait()
                .map_err(BenchError::system("the end of the daemon"))?
            {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    return Err(BenchError::Daemon(format!(
                        "ended with {status}: {}",
                        self.last_words()
                    )));
                }
                None if asked.elapsed() > Duration::from_secs(30) => {
                    let _ = self.child.kill();
                    let _ = self.child.wait();
                    return Err(BenchError::Daemon(format!(
                        "did not stop within 30 s: {}",
                        self.last_words()
                    )));
                }
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        }
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

/// Bytes of ordinary (not shared) memory of a process that are resident: everything but its segments.
pub(crate) fn resident_private_bytes(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    kib_field(&status, "RssAnon:").map(|kib| kib << 10)
}

fn kib_field(status: &str, name: &str) -> Option<u64> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))?
        .trim()
        .strip_suffix("kB")?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_private_memory_is_read_from_the_kernels_text() {
        assert_eq!(
            kib_field("VmRSS:\t  900 kB\nRssAnon:\t     812 kB\n", "RssAnon:"),
            Some(812)
        );
        assert_eq!(kib_field("VmRSS:\t  900 kB\n", "RssAnon:"), None);
        assert!(resident_private_bytes(std::process::id()).is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn a_daemon_that_ends_at_once_is_reported_with_its_last_words() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let program = directory.path().join("broken");
        std::fs::write(&program, "#!/bin/sh\necho no memory today >&2\nexit 3\n").expect("a script");
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("a mode");
        let error = Daemon::start(&program, directory.path(), 64 << 20)
            .err()
            .expect("no daemon");
        let words = error.to_string();
        assert!(words.contains("no memory today") && words.contains('3'), "{words}");
    }
}
