//! The demo, as a newcomer runs it.

use std::time::{Duration, Instant};

use crate::daemon::{PATIENCE, command, directory, signal_process, wait, words};
use rustix::process::Signal;
use serde_json::Value;

#[test]
fn the_demo_prints_its_table_and_leaves_nothing_behind() {
    let place = directory();
    let output = command("kv-daemon")
        .args(["demo", "--sessions", "300"])
        .env("TMPDIR", place.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", words(&output));
    let text = String::from_utf8_lossy(&output.stdout);
    for word in [
        "found in host memory",
        "found on disk",
        "memcpy",
        "p99",
        "prompt tokens were found",
        "all of them right",
        "What to do next",
    ] {
        assert!(text.contains(word), "{word:?} is not in:\n{text}");
    }
    assert_eq!(
        std::fs::read_dir(place.path()).unwrap().count(),
        0,
        "the temporary directory is empty again"
    );
}

#[test]
fn the_demo_speaks_json() {
    let place = directory();
    let output = command("kv-daemon")
        .args(["demo", "--json", "--sessions", "40"])
        .env("TMPDIR", place.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", words(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["wrong_bytes"], 0, "{report:#}");
    assert!(
        report["verified_bytes"].as_u64().unwrap() > 0 && report["memcpy_gbps"].as_f64().unwrap() > 0.0,
        "{report:#}"
    );
}

#[test]
fn an_interrupted_demo_cleans_up_and_fails() {
    let place = directory();
    let mut demo = command("kv-daemon")
        .args(["demo", "--sessions", "100000"])
        .env("TMPDIR", place.path())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while std::fs::read_dir(place.path()).unwrap().count() == 0 {
        assert!(begun.elapsed() < PATIENCE, "the demo does not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(700));
    signal_process(&demo, Signal::INT);
    let status = wait(&mut demo);
    assert_eq!(status.code(), Some(75), "{status}");
    assert_eq!(
        std::fs::read_dir(place.path()).unwrap().count(),
        0,
        "the temporary directory is empty again"
    );
}
