//! `cargo xtask restart-replay`: a trace with the daemon killed in the middle, against the same without.
//!
//! Both runs replay the first half and flush. One daemon is then killed with -9 and started again on its directory. The
//! share of prompt tokens that the second half finds must be the same, to a hundredth.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Restart;
use crate::daemon::Site;
use crate::outcome::Failure;
use crate::process;
use crate::workspace::Workspace;

const BUILD_LIMIT: Duration = Duration::from_secs(15 * 60);
const WORKLOAD_LIMIT: Duration = Duration::from_secs(120);
const REPLAY_LIMIT: Duration = Duration::from_secs(20 * 60);
const FLUSH_LIMIT: Duration = Duration::from_secs(120);

/// How far the two ratios may be apart.
const DIFFERENCE_MAX: f64 = 0.01;

/// Room for the generated workload: smaller than it, so that blocks move between both tiers.
const SMALL: [&str; 4] = ["--host-bytes", "8MiB", "--nvme-bytes", "64MiB"];

/// Room for a trace that somebody names.
const LARGE: [&str; 4] = ["--host-bytes", "64MiB", "--nvme-bytes", "300MiB"];

/// Builds, then runs it both ways and prints one JSON object.
pub(crate) fn run(workspace: &Workspace, restart: &Restart) -> Result<(), Failure> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--quiet", "--release", "--package", "kv-daemon", "--bins"]);
    process::succeed(&mut cargo, "release build", BUILD_LIMIT)?;
    let programs = workspace.target_directory()?.join("release");
    let stage = tempfile::Builder::new().prefix("kvr-").tempdir()?;
    let trace = match &restart.trace {
        Some(trace) => trace.clone(),
        None => generate(&programs, stage.path())?,
    };
    let requests = std::fs::read_to_string(&trace)
        .map_err(|error| Failure::usage(format!("trace {}: {error}", trace.display())))?
        .lines()
        .count() as u64;
    let half = restart.half.unwrap_or(requests / 2);
    let tiers = if restart.trace.is_some() { &LARGE } else { &SMALL };
    let twice = Twice {
        programs: &programs,
        stage: stage.path(),
        trace: &trace,
        half,
        tiers,
    };
    let undisturbed = twice.replay(false)?;
    let restarted = twice.replay(true)?;
    judge(half, &undisturbed, &restarted)
}

/// One trace, to be replayed with a restart and without.
struct Twice<'a> {
    programs: &'a Path,
    stage: &'a Path,
    trace: &'a Path,
    half: u64,
    tiers: &'a [&'a str],
}

impl Twice<'_> {
    /// What the second half found.
    fn replay(&self, restart: bool) -> Result<Value, Failure> {
        let directory = self.stage.join(if restart { "restarted" } else { "undisturbed" });
        std::fs::create_dir(&directory)?;
        let site = Site {
            programs: self.programs,
            directory: &directory,
        };
        self.replay_at(&site, restart).map_err(|failure| site.explain(failure))
    }

    fn replay_at(&self, site: &Site<'_>, restart: bool) -> Result<Value, Failure> {
        let kvctl = site.kvctl();
        let replay = |requests: String| {
            let arguments: [&OsStr; 6] = [
                "replay".as_ref(),
                self.trace.as_os_str(),
                "--block-bytes".as_ref(),
                "16KiB".as_ref(),
                "--requests".as_ref(),
                requests.as_ref(),
            ];
            kvctl.answer(&arguments, REPLAY_LIMIT)
        };
        let mut daemon = site.serve(self.tiers)?;
        replay(format!("0..{}", self.half))?;
        let flushed = kvctl.answer(&["flush".as_ref()], FLUSH_LIMIT)?;
        println!("flushed: {flushed}");
        if restart {
            daemon.kill()?;
            daemon = site.serve(self.tiers)?;
        }
        let report = replay(format!("{}..", self.half))?;
        daemon.drain()?;
        Ok(report)
    }
}

fn generate(programs: &Path, stage: &Path) -> Result<PathBuf, Failure> {
    let trace = stage.join("chat.jsonl");
    let mut kvctl = Command::new(programs.join("kvctl"));
    kvctl.args(["workload", "--seed", "1", "--output"]).arg(&trace);
    process::succeed(&mut kvctl, "workload", WORKLOAD_LIMIT)?;
    Ok(trace)
}

/// The second halves found about the same, and nothing wrong.
fn judge(half: u64, undisturbed: &Value, restarted: &Value) -> Result<(), Failure> {
    let number = |report: &Value, name: &str| {
        report[name]
            .as_f64()
            .ok_or_else(|| Failure::new(format!("the report of the replay has no {name}")))
    };
    let ratio = |report| number(report, "prefix_hit_token_ratio");
    let (without, with) = (ratio(undisturbed)?, ratio(restarted)?);
    let wrong = number(undisturbed, "wrong_bytes")? + number(restarted, "wrong_bytes")?;
    let figures = json!({
        "half": half,
        "requests": restarted["requests"],
        "ratio_undisturbed": without,
        "ratio_restarted": with,
        "verified_bytes": restarted["verified_bytes"],
        "wrong_bytes": wrong,
    });
    println!("{figures}");
    if number(restarted, "requests")? == 0.0 || without == 0.0 {
        return Err(Failure::new("the replay proves nothing: no requests, or no hits"));
    }
    if wrong > 0.0 {
        return Err(Failure::new(format!("{wrong} bytes were wrong")));
    }
    if (without - with).abs() > DIFFERENCE_MAX {
        return Err(Failure::new(format!(
            "the second half found {with:.4} of its tokens after a restart, {without:.4} without one"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(ratio: f64, wrong: u64) -> Value {
        json!({ "requests": 9, "prefix_hit_token_ratio": ratio, "verified_bytes": 1, "wrong_bytes": wrong })
    }

    #[test]
    fn a_restart_that_costs_more_than_a_point_of_the_ratio_is_refused() {
        assert!(judge(1, &report(0.40, 0), &report(0.395, 0)).is_ok());
        assert!(judge(1, &report(0.40, 0), &report(0.38, 0)).is_err());
        assert!(
            judge(1, &report(0.40, 0), &report(0.42, 0)).is_err(),
            "too good to be true"
        );
        assert!(judge(1, &report(0.40, 0), &report(0.40, 1)).is_err());
        assert!(
            judge(1, &report(0.0, 0), &report(0.0, 0)).is_err(),
            "no hits prove nothing"
        );
        assert!(
            judge(1, &json!({}), &report(0.4, 0)).is_err(),
            "a field that is missing is no zero"
        );
    }
}
