//! A member that is killed in the middle of a purge of the cluster that it carries out.

use std::os::unix::process::ExitStatusExt;

use serde_json::Value;

use super::{Plan, await_connected, cluster_of, get, purge, put, receipts, until};
use crate::daemon::{self, Daemon, wait, words};

fn confirmed(receipt: &Value) -> usize {
    let processors = receipt["processors"].as_array().expect("a list");
    processors.iter().filter(|one| one["status"] == "confirmed").count()
}

/// `is_everywhere`: the purge was in force on every member before the kill.
fn killed_at(step: &str, is_everywhere: bool) {
    let plan = Plan::on_loopback(3).with(&["--cluster-fence"]);
    let flags = plan.flags_of(0);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let settings = format!("purge_fail_point = {step:?}\n{}", Plan::settings());
    let mut coordinator = Daemon::start_in_with(daemon::directory(), &flags, &settings);
    let others = [plan.start(1), plan.start(2)];
    for node in others.iter().chain([&coordinator]) {
        await_connected(node, 2);
        until("it serves", || cluster_of(node)["serving"] == true);
    }
    put(&coordinator, "doomed");
    for node in &others {
        assert_eq!(get(node, "doomed").as_deref(), Some("remote"), "{step}");
    }
    let arguments = ["--request-id", "the-request", "--wait"];
    let cut = purge(&coordinator, &arguments);
    let status = wait(&mut coordinator.child);
    assert_eq!(status.signal(), Some(9), "{step}: {status}: {}", words(&cut));
    if is_everywhere {
        for node in &others {
            assert_eq!(get(node, "doomed"), None, "{step}: before its coordinator is back");
        }
    }
    // The others are a majority: they carry on.
    put(&others[0], "fresh");
    until("they read each other", || get(&others[1], "fresh").is_some());

    let back = plan.start_in(0, coordinator.ended());
    let purged = purge(&back, &arguments);
    assert!(purged.status.success(), "{step}: {}", words(&purged));
    let state = back.state().display().to_string();
    let jobs = back.ask(&["purges", "--state-dir", &state]);
    assert_eq!(
        jobs.as_array().map(Vec::len),
        Some(1),
        "{step}: it is the same purge: {jobs}"
    );
    let id = jobs[0]["id"].as_str().expect("an id");
    until("every member has confirmed", || {
        let latest = receipts(&back, id).pop();
        latest.is_some_and(|receipt| confirmed(&receipt) == 3 && receipt["reach"] == "cluster")
    });
    for node in others.iter().chain([&back]) {
        assert_eq!(get(node, "doomed"), None, "{step}");
    }
    await_connected(&back, 2);
    until("what is put now is read", || {
        put(&back, "later");
        others.iter().all(|node| get(node, "later").is_some())
    });
}

#[test]
fn a_coordinator_that_is_killed_before_anybody_was_told_completes_the_purge_when_it_is_back() {
    killed_at("journalled", false);
}

#[test]
fn a_coordinator_that_is_killed_once_all_have_it_changes_nothing_and_gives_the_receipt_when_it_is_back() {
    killed_at("fenced", true);
    killed_at("acknowledged", true);
}

#[test]
fn a_coordinator_that_is_killed_around_the_receipt_is_no_second_purge() {
    killed_at("receipted", true);
    killed_at("completed", true);
}
