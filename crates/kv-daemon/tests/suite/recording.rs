//! A daemon's own record of what it was asked, and what can be done with it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::Value;

use crate::daemon::{Daemon, chat_trace, words};

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).expect("recorded");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("a line is JSON"))
        .collect()
}

fn replay(daemon: &Daemon, trace: &Path) -> Value {
    let report = daemon.ask(&[
        "replay",
        trace.to_str().expect("a path"),
        "--block-bytes",
        "16KiB",
        "--virtual-time",
    ]);
    assert_eq!(report["wrong_bytes"], 0, "{report:#}");
    report
}

#[test]
fn what_a_daemon_was_asked_can_be_simulated_as_if_it_were_the_trace_itself() {
    let place = tempfile::tempdir().expect("a directory");
    let file = place.path().join("recorded.jsonl");
    let flags = [
        "--host-bytes",
        "64MiB",
        "--nvme-bytes",
        "0",
        "--clock",
        "client",
        "--record-trace",
        file.to_str().expect("a path"),
    ];
    let daemon = Daemon::start(&flags);
    let trace = chat_trace(daemon.directory.path(), 9, 40);
    replay(&daemon, &trace);
    let sent = lines(&trace);
    let (directory, log) = {
        let (status, log, directory) = daemon.stop_with_log();
        assert!(status.success(), "{log}");
        (directory, log)
    };
    assert!(log.contains("recorded in") && log.contains("no contents"), "{log}");
    let recorded = lines(&file);
    assert_eq!(recorded.len(), sent.len(), "a line for each request");
    assert_eq!(
        std::fs::metadata(&file).expect("there").permissions().mode() & 0o777,
        0o600
    );
    for (recorded, sent) in recorded.iter().zip(&sent) {
        assert_eq!(recorded["timestamp"], sent["timestamp"], "in their order");
        assert_eq!(recorded["input_length"], sent["input_length"]);
        assert_eq!(recorded["output_length"], sent["output_length"]);
        let ids = |line: &Value| line["hash_ids"].as_array().expect("ids").clone();
        assert_eq!(ids(recorded).len(), ids(sent).len());
        assert!(ids(recorded).iter().all(|id| !ids(sent).contains(id)), "ids are keyed");
    }
    // What is shared is shared, and nothing else.
    let simulate = |path: &Path| {
        let mut kvctl = crate::daemon::command("kvctl");
        kvctl.args(["--json", "simulate"]).arg(path);
        let output = kvctl
            .args(["--policy", "lru", "--capacity", "10%,50%"])
            .output()
            .expect("kvctl runs");
        assert!(output.status.success(), "{}", words(&output));
        serde_json::from_slice::<Value>(&output.stdout).expect("rows")
    };
    let (own, given) = (simulate(&file), simulate(&trace));
    let rows = |value: &Value| {
        let rows = value.as_array().expect("rows").iter();
        rows.map(|row| (row["capacity"].clone(), row["prefix_hit_token_ratio"].clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(rows(&own), rows(&given));

    // The next start has another key and another file.
    let daemon = Daemon::start_in(directory, &flags);
    replay(&daemon, &trace);
    daemon.stop();
    let again = lines(&place.path().join("recorded.jsonl.2"));
    assert_eq!(again.len(), sent.len());
    assert_ne!(again[0]["hash_ids"], recorded[0]["hash_ids"]);
    assert_eq!(lines(&file).len(), sent.len(), "the first is as it was");
}

#[test]
fn a_recording_that_cannot_be_made_is_said_before_anyone_is_served() {
    let refused = Daemon::try_start(&["--record-trace", "/proc/no/such/file"], "")
        .err()
        .expect("refused");
    assert!(refused.contains("record_trace /proc/no/such/file"), "{refused}");
}
