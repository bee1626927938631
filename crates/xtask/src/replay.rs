//! The product from outside: the release daemon, a generated workload through `kvctl replay`, a clean end on SIGTERM.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::daemon::Site;
use crate::outcome::Failure;
use crate::process;
use crate::workspace::Workspace;

const WORKLOAD_LIMIT: Duration = Duration::from_secs(120);
const REPLAY_LIMIT: Duration = Duration::from_secs(10 * 60);

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
        WORKLOAD_LIMIT,
    )?;

    let site = Site {
        programs: &programs,
        directory: stage.path(),
    };
    let mut flags = vec!["--nvme-engine", engine];
    flags.extend(TIERS);
    let outcome = site.serve(&flags).and_then(|daemon| {
        let arguments = [
            "replay".as_ref(),
            trace.as_os_str(),
            "--block-bytes".as_ref(),
            "16KiB".as_ref(),
        ];
        judge(&site.kvctl().answer(&arguments, REPLAY_LIMIT)?)?;
        daemon.drain()
    });
    outcome.map_err(|failure| site.explain(failure))
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
