//! The product from outside: the release daemon, a generated workload through `kvctl replay`, a clean end on SIGTERM.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::outcome::Failure;
use crate::process;
use crate::workspace::Workspace;

const READY_LIMIT: Duration = Duration::from_secs(120);
const REPLAY_LIMIT: Duration = Duration::from_secs(10 * 60);
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// Smaller than the workload, so that blocks move between both tiers and segments are reclaimed.
const TIERS: [&str; 4] = ["--host-bytes", "8MiB", "--nvme-bytes", "64MiB"];

/// Replays the workload through a daemon with this NVMe engine and judges the answer.
pub(crate) fn run(workspace: &Workspace, engine: &str) -> Result<(), Failure> {
    let programs = workspace.target_directory()?.join("release");
    let stage = tempfile::Builder::new().prefix("kvr-").tempdir()?;
    let trace = stage.path().join("chat.jsonl");
    let mut kvctl = Command::new(programs.join("kvctl"));
    process::succeed(
        kvctl.args(["workload", "--seed", "1", "--output"]).arg(&trace),
        "workload",
        READY_LIMIT,
    )?;

    let socket = stage.path().join("s");
    let log = stage.path().join("log");
    let daemon = Command::new(programs.join("kv-daemon"))
        .args(["serve", "--http", "127.0.0.1:0", "--nvme-engine", engine])
        .args(TIERS)
        .arg("--state-dir")
        .arg(stage.path().join("state"))
        .arg("--socket")
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log)?)
        .spawn()
        .map_err(|error| Failure::new(format!("cannot start kv-daemon: {error}")))?;
    let mut daemon = Daemon { process: daemon };
    let kvctl = Kvctl {
        program: programs.join("kvctl"),
        socket,
    };

    let outcome = daemon.wait_until_ready(&kvctl).and_then(|()| {
        let arguments = [
            "replay".as_ref(),
            trace.as_os_str(),
            "--block-bytes".as_ref(),
            "16KiB".as_ref(),
        ];
        judge(&kvctl.answer(&arguments, REPLAY_LIMIT)?)?;
        daemon.drain()
    });
    outcome.map_err(|failure| {
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(20).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        Failure::new(format!(
            "{}\nthe daemon's last lines:\n{}",
            failure.message,
            tail.join("\n")
        ))
    })
}

/// Every byte of every hit was checked, both tiers had hits, and no byte was wrong.
fn judge(report: &Value) -> Result<(), Failure> {
    println!("replay: {report}");
    let number = |name: &str| {
        report[name]
            .as_f64()
            .ok_or_else(|| Failure::new(format!("the report of the replay has no {name}")))
    };
    for name in [
        "requests",
        "verified_bytes",
        "prefix_hit_token_ratio",
        "hit_blocks_host",
        "hit_blocks_nvme",
    ] {
        if number(name)? <= 0.0 {
            return Err(Failure::new(format!("the replay proves nothing: {name} is 0")));
        }
    }
    match number("wrong_bytes")? {
        0.0 => Ok(()),
        wrong => Err(Failure::new(format!("{wrong} bytes were wrong"))),
    }
}

struct Kvctl {
    program: PathBuf,
    socket: PathBuf,
}

impl Kvctl {
    /// Runs one command with `--json` and parses what it printed.
    fn answer(&self, arguments: &[&std::ffi::OsStr], limit: Duration) -> Result<Value, Failure> {
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
struct Daemon {
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
    fn drain(&mut self) -> Result<(), Failure> {
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
}

impl Drop for Daemon {
    fn drop(&mut self) {
        process::kill_tree(&mut self.process);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_replay_without_hits_from_both_tiers_or_with_wrong_bytes_is_refused() {
        let good = json!({
            "requests": 10, "verified_bytes": 4096, "wrong_bytes": 0, "prefix_hit_token_ratio": 0.3, "hit_blocks_host": 1,
            "hit_blocks_nvme": 1,
        });
        assert!(judge(&good).is_ok());
        for field in [
            "requests",
            "verified_bytes",
            "prefix_hit_token_ratio",
            "hit_blocks_host",
            "hit_blocks_nvme",
        ] {
            let mut bad = good.clone();
            bad[field] = json!(0);
            assert!(judge(&bad).is_err(), "{field}");
        }
        let mut bad = good.clone();
        bad["wrong_bytes"] = json!(1);
        assert!(judge(&bad).is_err());
        bad["wrong_bytes"] = json!(null);
        assert!(judge(&bad).is_err(), "a field that is missing is no zero");
    }
}
