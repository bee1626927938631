//! Purges while something else goes wrong: a disk that is full, an anchor that cannot be written, a long purge in front.

use std::process::Stdio;
use std::time::{Duration, Instant};

use kvtier::client::FetchScope;
use kvtier::client::blocking::{Client, Namespace};
use serde_json::Value;

use super::{
    NVME, answer, await_completed, blocks, cached, connect, flush, jobs, kvctl, only_receipt, put, put_under,
    realization, run, words,
};
use crate::daemon::{Daemon, PATIENCE, directory, told_of_full_disks};

fn start(flags: &[&str]) -> Daemon {
    let flags = [&NVME[..], flags].concat();
    let launched = Daemon::try_launch(told_of_full_disks(), directory(), &flags, "");
    launched.unwrap_or_else(|(log, _)| panic!("not ready: {log}"))
}

/// From here on no file of the daemon can be written, or all can again.
fn fill_disk(daemon: &Daemon, full: bool) {
    daemon.limit_files(full.then_some(0));
}

fn populate(daemon: &Daemon) {
    put(daemon, "mine", &blocks("mine"));
    put(daemon, "other", &blocks("other"));
    flush(daemon);
}

/// Holds one block of a namespace leased.
fn lease(daemon: &Daemon, name: &str) -> (kvtier::client::BlockHandle, Namespace, Client) {
    let client = connect(daemon);
    let namespace = client.namespace(name, realization("a model")).unwrap();
    let hashes = [blocks(name)[2].hash];
    let mut handles = namespace.get(&hashes, FetchScope::Each).unwrap();
    (handles.pop().flatten().expect("it is cached"), namespace, client)
}

fn state_of(daemon: &Daemon, id: &str) -> Value {
    let jobs = jobs(daemon);
    let job = jobs
        .iter()
        .find(|job| job["id"] == id)
        .unwrap_or_else(|| panic!("no {id}"));
    job["state"].clone()
}

#[test]
fn on_a_full_disk_a_purge_is_refused_and_nothing_is_changed() {
    let daemon = start(&[]);
    populate(&daemon);
    fill_disk(&daemon, true);
    for mode in ["invalidate", "physical"] {
        let output = run(&daemon, &["purge", "mine", "--mode", mode, "--request-id", mode]);
        assert_eq!(output.status.code(), Some(75), "{}", words(&output));
    }
    assert_eq!(cached(&daemon, "mine", &blocks("mine")), [true; 3]);
    fill_disk(&daemon, false);
    assert_eq!(jobs(&daemon), Vec::<Value>::new());
    assert_eq!(cached(&daemon, "mine", &blocks("mine")), [true; 3]);
    let receipt = super::purge(&daemon, &["mine", "--mode", "physical", "--request-id", "physical"]);
    assert_eq!(receipt["guarantee"], "verified_physical_purge", "{receipt:#}");
    assert_eq!(cached(&daemon, "mine", &blocks("mine")), [false; 3]);
}

#[test]
fn a_disk_that_fills_up_in_the_middle_of_a_purge_delays_it_and_no_more() {
    let daemon = start(&["--purge-lease-grace-ms", "60000"]);
    populate(&daemon);
    let held = lease(&daemon, "mine");
    let job = answer(&daemon, &["purge", "mine", "--mode", "physical"]);
    let id = job["id"].as_str().unwrap();
    assert_eq!(state_of(&daemon, id), "invalidated", "it waits for the lease");
    fill_disk(&daemon, true);
    drop(held);
    // Nothing can be overwritten, and no receipt be written: it is tried again and again, and readers are served.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        assert_eq!(cached(&daemon, "mine", &blocks("mine")), [false; 3]);
        assert_eq!(cached(&daemon, "other", &blocks("other")), [true; 3]);
        std::thread::sleep(Duration::from_millis(100));
    }
    fill_disk(&daemon, false);
    assert_ne!(state_of(&daemon, id), "completed");
    await_completed(&daemon, id);
    let receipt = only_receipt(&daemon, id);
    assert_eq!(receipt["guarantee"], "verified_physical_purge", "{receipt:#}");
    let daemon = Daemon::start_in(daemon.kill(), &NVME);
    assert_eq!(cached(&daemon, "mine", &blocks("mine")), [false; 3]);
    assert_eq!(cached(&daemon, "other", &blocks("other")), [true; 3]);
    assert_eq!(only_receipt(&daemon, id), receipt);
}

#[test]
fn a_disk_that_fills_up_before_a_narrow_purge_is_acknowledged_keeps_it_from_being() {
    let daemon = start(&["--purge-lease-grace-ms", "60000"]);
    populate(&daemon);
    put_under(&daemon, "other", "doc", kvtier::Parent::Root, &blocks("document"));
    flush(&daemon);
    let held = lease(&daemon, "mine");
    answer(&daemon, &["purge", "mine", "--mode", "physical"]);
    // Behind the first one, which waits for the lease.
    let mut asking = kvctl(&daemon)
        .args([
            "--json",
            "purge",
            "other",
            "--label",
            "doc",
            "--request-id",
            "narrow",
            "--wait",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    await_job(&daemon, "narrow");
    fill_disk(&daemon, true);
    drop(held);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(cached(&daemon, "other", &blocks("other")), [true; 3]);
    fill_disk(&daemon, false);
    let job = await_job(&daemon, "narrow");
    assert_eq!(
        job["state"], "requested",
        "records could come back with a restart: {job}"
    );
    await_completed(&daemon, job["id"].as_str().unwrap());
    assert!(asking.wait().unwrap().success());
    assert_eq!(cached(&daemon, "other", &blocks("document")), [false; 3]);
    let daemon = Daemon::start_in(daemon.kill(), &NVME);
    assert_eq!(cached(&daemon, "other", &blocks("document")), [false; 3]);
    assert_eq!(cached(&daemon, "other", &blocks("other")), [true; 3]);
    assert_eq!(super::verified_receipts(&daemon).len(), 2);
}

/// The job of a request, once the node knows of it.
fn await_job(daemon: &Daemon, request_id: &str) -> Value {
    let begun = Instant::now();
    loop {
        let job = jobs(daemon).into_iter().find(|job| job["request_id"] == request_id);
        if let Some(job) = job {
            return job;
        }
        assert!(begun.elapsed() < PATIENCE, "no job of {request_id}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_narrow_purge_behind_a_long_physical_one_waits_for_it_and_is_told_so() {
    let daemon = Daemon::start(&[&NVME[..], &["--purge-lease-grace-ms", "2500"]].concat());
    populate(&daemon);
    put_under(&daemon, "other", "doc", kvtier::Parent::Root, &blocks("document"));
    flush(&daemon);
    let held = lease(&daemon, "mine");
    let long = answer(&daemon, &["purge", "mine", "--mode", "physical"]);
    let begun = Instant::now();
    // Its caller waits until it is acknowledged: that takes a pass over NVMe, and the first one has to end before.
    let narrow = answer(&daemon, &["purge", "other", "--label", "doc"]);
    assert!(begun.elapsed() > Duration::from_secs(2), "{narrow}");
    assert_ne!(narrow["state"], "requested", "{narrow}");
    assert_eq!(cached(&daemon, "other", &blocks("document")), [false; 3]);
    assert_eq!(cached(&daemon, "other", &blocks("other")), [true; 3]);
    let [long, narrow] = [&long, &narrow].map(|job| {
        let id = job["id"].as_str().unwrap();
        await_completed(&daemon, id);
        only_receipt(&daemon, id)
    });
    assert_eq!(
        long["guarantee"], "verified_namespace_invalidation",
        "the lease: {long:#}"
    );
    assert!(
        long["sequence"].as_u64() < narrow["sequence"].as_u64(),
        "{long:#} {narrow:#}"
    );
    drop(held);
}

#[test]
fn a_purge_is_not_acknowledged_while_the_anchor_cannot_be_written() {
    let elsewhere = directory();
    let anchor = elsewhere.path().join("anchor");
    let flags = [&NVME[..], &["--anchor", anchor.to_str().unwrap()]].concat();
    let daemon = Daemon::start(&flags);
    populate(&daemon);
    // Whoever runs the tests: nobody writes a file where a directory is.
    let in_the_way = elsewhere.path().join("anchor.next");
    std::fs::create_dir(&in_the_way).unwrap();
    let mut asking = kvctl(&daemon)
        .args(["--json", "purge", "mine", "--request-id", "anchored"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let id = await_job(&daemon, "anchored")["id"].as_str().unwrap().to_owned();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(state_of(&daemon, &id), "requested");
    assert!(asking.try_wait().unwrap().is_none(), "its caller waits");
    assert_eq!(
        cached(&daemon, "mine", &blocks("mine")),
        [false; 3],
        "hidden all the same"
    );
    std::fs::remove_dir(&in_the_way).unwrap();
    assert!(asking.wait().unwrap().success());
    await_completed(&daemon, &id);
    let receipt = only_receipt(&daemon, &id);
    assert_eq!(receipt["rollback_protection"], "anchor", "{receipt:#}");
    let known = std::fs::read_to_string(&anchor).unwrap();
    let raised = format!("/mine\":{}", receipt["generation"]["to"]);
    assert!(known.contains(&raised), "{known}");
}
