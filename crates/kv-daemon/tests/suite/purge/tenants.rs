//! What administrators set of namespaces, and purges of several of them.

use serde_json::json;

use super::{
    NVME, answer, await_completed, blocks, cached, jobs, kvctl, namespace, purge, put, run, verified_receipts,
};
use crate::daemon::{Daemon, words};

#[test]
fn quotas_and_labels_survive_a_restart() {
    let daemon = Daemon::start(&NVME);
    put(&daemon, "mine", &blocks("mine"));
    put(&daemon, "other", &blocks("other"));
    let set = answer(
        &daemon,
        &[
            "namespace",
            "set",
            "mine",
            "--quota-bytes",
            "256KiB",
            "--label",
            "team=blue",
            "--label",
            "cost=low",
        ],
    );
    let daemon = Daemon::start_in(daemon.kill(), &NVME);
    let status = namespace(&daemon, "mine");
    assert_eq!(status["quota_bytes"], 256 << 10, "{status}");
    assert_eq!(status["labels"], json!({"team": "blue", "cost": "low"}));
    assert_eq!(set["labels"], status["labels"]);
    let status = namespace(&daemon, "other");
    assert_eq!((&status["quota_bytes"], &status["labels"]), (&json!(null), &json!({})));
    // It is in force, not only listed.
    for index in 0..8 {
        let file = daemon.directory.path().join("block");
        std::fs::write(&file, vec![index; 100_000]).unwrap();
        let key = format!("key {index}");
        let arguments = ["--namespace", "mine", "put", &key, file.to_str().unwrap()];
        daemon.kvctl().args(arguments).output().unwrap();
    }
    let status = namespace(&daemon, "mine");
    assert!(status["used_bytes"].as_u64().unwrap() <= 256 << 10, "{status}");

    answer(
        &daemon,
        &[
            "namespace",
            "set",
            "mine",
            "--quota-bytes",
            "none",
            "--remove-label",
            "cost",
        ],
    );
    purge(&daemon, &["mine", "--mode", "physical"]);
    let daemon = Daemon::start_in(daemon.kill(), &NVME);
    let status = namespace(&daemon, "mine");
    assert_eq!(status["quota_bytes"], json!(null), "{status}");
    assert_eq!(status["labels"], json!({"team": "blue"}), "a purge is of blocks");
    let output = run(&daemon, &["namespace", "set", "unknown", "--label", "a=b"]);
    assert_eq!(output.status.code(), Some(1), "{}", words(&output));
}

#[test]
fn the_same_request_is_the_same_purge_after_a_restart_too() {
    let daemon = Daemon::start(&NVME);
    put(&daemon, "mine", &blocks("mine"));
    let request = ["mine", "--mode", "physical", "--request-id", "once", "--reason", "why"];
    let receipt = purge(&daemon, &request);
    put(&daemon, "mine", &blocks("mine"));
    assert_eq!(purge(&daemon, &request), receipt);
    let daemon = Daemon::start_in(daemon.kill(), &NVME);
    assert_eq!(purge(&daemon, &request), receipt);
    put(&daemon, "mine", &blocks("new"));
    assert_eq!(purge(&daemon, &request), receipt);
    assert_eq!(
        cached(&daemon, "mine", &blocks("new")),
        [true; 3],
        "nothing is purged twice"
    );
    assert_eq!(jobs(&daemon).len(), 1);
    let other = run(
        &daemon,
        &["purge", "mine", "--request-id", "once", "--reason", "another"],
    );
    assert_eq!(other.status.code(), Some(65), "{}", words(&other));
    assert!(
        String::from_utf8_lossy(&other.stderr).contains("another body"),
        "{}",
        words(&other)
    );
    assert_eq!(verified_receipts(&daemon).len(), 1);
}

#[test]
fn purges_of_several_namespaces_at_once_each_get_their_receipt() {
    let daemon = Daemon::start(&NVME);
    let names = ["first", "second", "third"];
    for name in names.iter().chain(&["kept"]) {
        put(&daemon, name, &blocks(name));
    }
    super::flush(&daemon);
    let running = names.map(|name| {
        let mut purge = kvctl(&daemon);
        purge.args(["--json", "purge", name, "--mode", "physical", "--wait"]);
        purge.stdout(std::process::Stdio::piped()).spawn().unwrap()
    });
    for (child, name) in running.into_iter().zip(names) {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", words(&output));
        let receipt: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(receipt["namespace"].as_str().unwrap().ends_with(name), "{receipt:#}");
        assert_eq!(receipt["guarantee"], "verified_physical_purge", "{receipt:#}");
        assert_eq!(cached(&daemon, name, &blocks(name)), [false; 3]);
    }
    assert_eq!(cached(&daemon, "kept", &blocks("kept")), [true; 3]);
    assert_eq!(verified_receipts(&daemon).len(), 3);
}

#[test]
fn several_purges_that_a_kill_cut_short_are_all_completed() {
    // The first one waits for a client until the end.
    let daemon = Daemon::start(&[&NVME[..], &["--purge-lease-grace-ms", "60000"]].concat());
    let names = ["first", "second", "third"];
    for name in names.iter().chain(&["kept"]) {
        put(&daemon, name, &blocks(name));
    }
    super::flush(&daemon);
    let client = super::connect(&daemon);
    let first = client.namespace("first", super::realization("a model")).unwrap();
    let hashes = [blocks("first")[0].hash];
    let held = first.get(&hashes, kvtier::client::FetchScope::Each).unwrap();
    assert!(held[0].is_some());
    let begun = names.map(|name| answer(&daemon, &["purge", name, "--mode", "physical"]));
    assert!(
        jobs(&daemon).iter().all(|job| job["state"] == "invalidated"),
        "{:?}",
        jobs(&daemon)
    );
    let daemon = Daemon::start_in(daemon.kill(), &NVME);
    drop((held, first, client));
    for (job, name) in begun.iter().zip(names) {
        assert_eq!(cached(&daemon, name, &blocks(name)), [false; 3]);
        let id = job["id"].as_str().unwrap();
        assert_eq!(await_completed(&daemon, id)["resumed"], 1);
        let receipt = super::only_receipt(&daemon, id);
        assert_eq!(receipt["guarantee"], "verified_physical_purge", "{receipt:#}");
    }
    assert_eq!(cached(&daemon, "kept", &blocks("kept")), [true; 3]);
}
