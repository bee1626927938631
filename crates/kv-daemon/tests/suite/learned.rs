//! What the hazard policy learned, across restarts.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::daemon::{Daemon, chat_trace};
use crate::peers::{Plan, await_connected, until};

const FLAGS: [&str; 6] = [
    "--nvme-bytes",
    "16MiB",
    "--clock",
    "client",
    "--eviction-policy",
    "hazard",
];

fn replay(daemon: &Daemon, trace: &Path, range: &str) -> Value {
    let report = daemon.ask(&[
        "replay",
        trace.to_str().unwrap(),
        "--block-bytes",
        "16KiB",
        "--virtual-time",
        "--requests",
        range,
    ]);
    assert_eq!(report["wrong_bytes"], 0, "{report:#}");
    report
}

#[test]
fn a_restart_knows_what_earlier_runs_learned_and_starts_without_it_where_it_is_damaged() {
    let daemon = Daemon::start(&FLAGS);
    let trace = chat_trace(daemon.directory.path(), 5, 60);
    replay(&daemon, &trace, "..");
    let directory = daemon.stop_and_keep();
    let file = directory.path().join("state/reuse.tables");
    let image = std::fs::read(&file).expect("tables were written");
    assert!(image.starts_with(b"kvtreuse") && image.len() > 1_000, "{}", image.len());

    let daemon = Daemon::start_in(directory, &FLAGS);
    replay(&daemon, &trace, "..20");
    let (directory, log) = stopped(daemon);
    assert!(
        log.contains("what earlier runs learned of reuse is known again"),
        "{log}"
    );
    let grown = std::fs::read(&file).expect("tables are still there");
    assert!(
        grown.len() >= image.len(),
        "it learned on: {} of {}",
        grown.len(),
        image.len()
    );

    std::fs::write(&file, &grown[..grown.len() / 2]).unwrap();
    let daemon = Daemon::start_in(directory, &FLAGS);
    replay(&daemon, &trace, "..20");
    let (directory, log) = stopped(daemon);
    assert!(log.contains("is learned anew"), "{log}");
    let anew = std::fs::read(&file).expect("tables are written again");
    assert!(anew.starts_with(b"kvtreuse"));

    // Another policy neither reads nor touches them.
    std::fs::write(&file, b"anything").unwrap();
    let daemon = Daemon::start_in(directory, &FLAGS[..4]);
    replay(&daemon, &trace, "..20");
    let (_directory, log) = stopped(daemon);
    assert!(!log.contains("learned"), "{log}");
    assert_eq!(std::fs::read(&file).unwrap(), b"anything");
}

/// Stops a daemon, which must end well.
fn stopped(daemon: Daemon) -> (tempfile::TempDir, String) {
    let (status, log, directory) = daemon.stop_with_log();
    assert!(status.success(), "{status}: {log}");
    (directory, log)
}

#[test]
fn a_restart_in_the_middle_of_a_trace_hits_as_if_nothing_had_happened() {
    let ratio = |report: &Value| report["prefix_hit_token_ratio"].as_f64().unwrap();
    let daemon = Daemon::start(&FLAGS);
    let trace = chat_trace(daemon.directory.path(), 6, 120);
    replay(&daemon, &trace, "..300");
    let without = ratio(&replay(&daemon, &trace, "300.."));
    drop(daemon);

    let daemon = Daemon::start(&FLAGS);
    let trace = chat_trace(daemon.directory.path(), 6, 120);
    replay(&daemon, &trace, "..300");
    let daemon = Daemon::start_in(daemon.stop_and_keep(), &FLAGS);
    let with = ratio(&replay(&daemon, &trace, "300.."));
    assert!(without > 0.2, "{without}");
    assert!(
        (with - without).abs() < 0.02,
        "{with} with a restart, {without} without"
    );
}

#[test]
fn who_starts_with_nothing_learned_learns_from_a_peer_and_once() {
    let plan = Plan::on_loopback(2).with(&["--eviction-policy", "hazard"]);
    let teacher = plan.start(0);
    let trace = chat_trace(teacher.directory.path(), 5, 30);
    teacher.ask(&["replay", trace.to_str().unwrap(), "--block-bytes", "16KiB"]);
    let pupil = plan.start(1);
    let file = pupil.state().join("reuse.tables");
    until("the peer's tables are written here", || file.exists());
    let (status, log, directory) = pupil.stop_with_log();
    assert!(
        status.success() && log.contains("what a peer learned of reuse is known here now"),
        "{log}"
    );
    let image = std::fs::read(directory.path().join("state/reuse.tables")).expect("kept");
    assert!(image.starts_with(b"kvtreuse") && image.len() > 100, "{}", image.len());

    let pupil = plan.start_in(1, directory);
    await_connected(&pupil, 1);
    std::thread::sleep(Duration::from_millis(1500));
    let (_directory, log) = stopped(pupil);
    assert!(log.contains("what earlier runs learned"), "{log}");
    assert!(!log.contains("what a peer learned"), "it would count twice: {log}");
}
