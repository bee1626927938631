//! A daemon that is killed in the middle of a purge, at each step of it.

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use kvtier::client::FetchScope;
use kvtier::client::blocking::Client;
use kvtier::node::PURGE_STEPS;

use super::scan::{Needles, Sightings};
use super::{
    Block, NVME, await_completed, blocks, cached, flush, jobs, only_receipt, options, put, realization, run, words,
};
use crate::daemon::{Daemon, wait};

/// What is purged of the namespace.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    All,
    /// The second block, and with it the third.
    Hashes,
    Realization,
}

impl Scope {
    fn arguments(self, doomed: &[Block]) -> Vec<String> {
        match self {
            Scope::All => Vec::new(),
            Scope::Hashes => vec!["--hash".into(), doomed[1].hex()],
            Scope::Realization => vec!["--scope-realization".into(), super::hex(&realization("a model").0)],
        }
    }

    fn survivors(self) -> [bool; 3] {
        [self == Scope::Hashes, false, false]
    }

    /// The key of the whole namespace can only go with all of it.
    fn guarantee(self) -> &'static str {
        match self {
            Scope::All => "verified_physical_purge",
            Scope::Hashes | Scope::Realization => "verified_namespace_invalidation",
        }
    }

    /// The steps that it comes by.
    fn steps(self) -> impl Iterator<Item = &'static str> {
        let narrow = self != Scope::All;
        let of_keys = |step: &&str| step.starts_with("key_");
        PURGE_STEPS.into_iter().filter(move |step| !(narrow && of_keys(step)))
    }
}

fn killed_at(step: &str, scope: Scope) {
    let fail_point = format!("purge_fail_point = {step:?}\n");
    let mut daemon = Daemon::start_with(&NVME, &fail_point);
    let (doomed, kept) = (blocks("doomed"), blocks("kept"));
    put(&daemon, "doomed", &doomed);
    put(&daemon, "kept", &kept);
    flush(&daemon);

    let scope_arguments = scope.arguments(&doomed);
    let mut arguments = vec![
        "purge",
        "doomed",
        "--mode",
        "physical",
        "--request-id",
        "the-request",
        "--wait",
    ];
    arguments.extend(scope_arguments.iter().map(String::as_str));
    let output = run(&daemon, &arguments);
    let status = wait(&mut daemon.child);
    assert_eq!(status.signal(), Some(9), "{step}: {status}: {}", words(&output));
    if step != "completed" {
        assert_eq!(
            output.status.code(),
            Some(69),
            "{step}: the connection broke: {}",
            words(&output)
        );
    }

    // From the first moment on that anybody is let in.
    let watcher = Watcher::start(&daemon, &doomed, scope.survivors());
    let daemon = Daemon::start_in(daemon.ended(), &NVME);
    assert_eq!(cached(&daemon, "doomed", &doomed), scope.survivors(), "{step}");
    let found = jobs(&daemon);
    assert_eq!(found.len(), 1, "{step}: {found:?}");
    let id = found[0]["id"].as_str().unwrap();
    let job = await_completed(&daemon, id);
    watcher.end();

    let receipt = only_receipt(&daemon, id);
    assert_eq!(receipt["guarantee"], scope.guarantee(), "{step}: {receipt:#}");
    assert_eq!(receipt["request_id"], "the-request");
    assert_eq!(job["receipt"], receipt["id"], "{step}");
    let resumed = |value: &serde_json::Value| value["resumed"].as_u64().unwrap();
    match step {
        // Nothing was left to do but to note that it was done.
        "receipted" => assert_eq!((resumed(&job), resumed(&receipt)), (1, 0), "{step}"),
        "completed" => assert_eq!((resumed(&job), resumed(&receipt)), (0, 0), "{step}"),
        _ => assert_eq!((resumed(&job), resumed(&receipt)), (1, 1), "{step}"),
    }
    assert_eq!(cached(&daemon, "kept", &kept), [true; 3], "{step}: another namespace");
    assert_eq!(cached(&daemon, "doomed", &doomed), scope.survivors(), "{step}");

    // Nothing says any more which blocks they were.
    let mut needles = Needles::default();
    needles.add("a hash in hex", doomed[1].hex().as_bytes());
    needles.add("a hash", &doomed[1].hash.0);
    assert_eq!(needles.in_files(&daemon.state()), Sightings::new(), "{step}");

    // Asked once more, it is the same purge; and what is put now stays.
    let output = run(&daemon, &arguments);
    let again: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(again, receipt, "{step}: {}", words(&output));
    put(&daemon, "doomed", &doomed[1..2]);
    assert!(cached(&daemon, "doomed", &doomed)[1], "{step}: it can be used again");
    flush(&daemon);
    let daemon = Daemon::start_in(daemon.kill(), &NVME);
    assert_eq!(jobs(&daemon)[0], job, "{step}: it is not begun once more");
    assert!(cached(&daemon, "doomed", &doomed)[1], "{step}");
}

/// Asks for purged blocks as often as it can, from before the start on.
struct Watcher {
    ended: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Watcher {
    fn start(daemon: &Daemon, doomed: &[Block], survivors: [bool; 3]) -> Watcher {
        let (ended, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let options = options(&daemon.socket());
        let hashes: Vec<_> = doomed.iter().map(|block| block.hash).collect();
        let (is_over, count) = (Arc::clone(&ended), Arc::clone(&asked));
        let thread = std::thread::spawn(move || {
            while !is_over.load(Ordering::Acquire) {
                let got = Client::connect(options.clone())
                    .and_then(|client| client.namespace("doomed", realization("a model")))
                    .and_then(|namespace| namespace.get(&hashes, FetchScope::Each));
                match got {
                    Ok(got) => {
                        let got: Vec<bool> = got.iter().map(Option::is_some).collect();
                        let purged = |(got, survives): (&bool, bool)| *got && !survives;
                        assert!(
                            !got.iter().zip(survivors).any(purged),
                            "read after the restart: {got:?}"
                        );
                        count.fetch_add(1, Ordering::AcqRel);
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        Watcher { ended, asked, thread }
    }

    fn end(self) {
        self.ended.store(true, Ordering::Release);
        self.thread.join().expect("nothing was read");
        assert!(self.asked.load(Ordering::Acquire) > 0, "it asked");
    }
}

#[test]
fn a_purge_that_is_killed_before_it_is_acknowledged_is_completed_by_the_next_start() {
    killed_at("journalled", Scope::All);
    killed_at("fenced", Scope::All);
}

#[test]
fn a_purge_that_is_killed_around_the_key_is_completed_by_the_next_start() {
    killed_at("acknowledged", Scope::All);
    killed_at("key_settled", Scope::All);
    killed_at("key_destroyed", Scope::All);
}

#[test]
fn a_purge_that_is_killed_around_its_receipt_is_completed_by_the_next_start() {
    killed_at("destroyed", Scope::All);
    killed_at("receipted", Scope::All);
    killed_at("completed", Scope::All);
}

#[test]
fn a_purge_of_hashes_that_is_killed_at_any_step_is_completed_by_the_next_start() {
    Scope::Hashes.steps().for_each(|step| killed_at(step, Scope::Hashes));
}

#[test]
fn a_purge_of_a_realization_that_is_killed_at_any_step_is_completed_by_the_next_start() {
    Scope::Realization
        .steps()
        .for_each(|step| killed_at(step, Scope::Realization));
}

#[test]
fn every_step_is_killed_at() {
    assert_eq!(Scope::All.steps().count(), 8);
    assert_eq!(Scope::Hashes.steps().count(), 6);
    let log = Daemon::try_start(&NVME, "purge_fail_point = \"nowhere\"\n")
        .err()
        .expect("refused");
    assert!(log.contains("exit status: 78") && log.contains("journalled"), "{log}");
}
