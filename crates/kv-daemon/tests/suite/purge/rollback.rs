//! A state directory that is restored from before a purge.

use std::path::{Path, PathBuf};

use kvtier::ErrorKind;
use tempfile::TempDir;

use super::{NVME, answer, blocks, cached, connect, copy, flush, namespace, purge, put, realization, run};
use crate::daemon::{Daemon, directory, words};

/// A daemon with an anchor that lies elsewhere.
struct Anchored {
    _elsewhere: TempDir,
    anchor: PathBuf,
}

impl Anchored {
    fn new() -> Anchored {
        let elsewhere = directory();
        let anchor = elsewhere.path().join("anchor");
        Anchored {
            _elsewhere: elsewhere,
            anchor,
        }
    }

    fn flags(&self) -> Vec<&str> {
        [&NVME[..], &["--anchor", self.anchor.to_str().unwrap()]].concat()
    }

    fn start_in(&self, directory: TempDir) -> Daemon {
        Daemon::start_in(directory, &self.flags())
    }

    fn refused_in(&self, directory: TempDir) -> (String, TempDir) {
        match Daemon::try_start_in(directory, &self.flags(), "") {
            Ok(_) => panic!("it started"),
            Err(refused) => refused,
        }
    }
}

fn backup_of(directory: &TempDir) -> PathBuf {
    let backup = directory.path().join("backup");
    copy(&directory.path().join("state"), &backup);
    backup
}

fn restore(directory: &TempDir, backup: &Path) {
    copy(backup, &directory.path().join("state"));
}

/// Two namespaces with blocks on NVMe.
fn populate(daemon: &Daemon) {
    put(daemon, "purged", &blocks("purged"));
    put(daemon, "other", &blocks("other"));
    flush(daemon);
}

#[test]
fn with_an_anchor_an_older_state_directory_is_refused_until_it_is_advanced() {
    let anchored = Anchored::new();
    let daemon = anchored.start_in(directory());
    populate(&daemon);
    let label = namespace(&daemon, "purged")["namespace"].as_str().unwrap().to_string();
    let directory = daemon.stop_and_keep();
    let backup = backup_of(&directory);

    let daemon = anchored.start_in(directory);
    assert_eq!(cached(&daemon, "purged", &blocks("purged")), [true; 3]);
    let receipt = purge(&daemon, &["purged", "--mode", "physical"]);
    assert_eq!(receipt["rollback_protection"], "anchor", "{receipt:#}");
    assert_eq!(receipt["guarantee"], "verified_physical_purge", "{receipt:#}");
    assert!(
        !receipt["not_covered"]
            .to_string()
            .contains("copies of the state directory")
    );
    let purged_at = receipt["generation"]["to"].as_u64().unwrap();
    let directory = daemon.stop_and_keep();

    restore(&directory, &backup);
    let daemon = anchored.start_in(directory);
    let client = connect(&daemon);
    for name in ["purged", "purged"] {
        let refused = client
            .namespace(name, realization("a model"))
            .expect_err("it is refused");
        assert_eq!(refused.kind, ErrorKind::Unavailable, "{refused}");
        let said = refused.to_string();
        let command = format!("kvctl namespace advance {label}");
        assert!(said.contains("anchor") && said.contains(&command), "{said}");
    }
    assert_eq!(
        cached(&daemon, "other", &blocks("other")),
        [true; 3],
        "others are served"
    );
    let listed = answer(&daemon, &["namespace", "list"]);
    let refusals: Vec<bool> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|status| status["refused"].is_string())
        .collect();
    assert_eq!(refusals, [false, true], "{listed}");
    let plain = super::kvctl(&daemon).args(["namespace", "list"]).output().unwrap();
    assert!(
        String::from_utf8_lossy(&plain.stdout).contains("NOT SERVED"),
        "{}",
        words(&plain)
    );
    // Not even by another kind of call.
    let put = daemon
        .kvctl()
        .args(["--namespace", "purged", "exists", "key"])
        .output()
        .unwrap();
    assert_eq!(put.status.code(), Some(69), "{}", words(&put));

    let status = answer(&daemon, &["namespace", "advance", &label]);
    assert!(status["refused"].is_null(), "{status}");
    assert!(status["generation"].as_u64().unwrap() > purged_at, "{status}");
    let expected = [[false; 3], [true; 3]];
    assert_eq!(cached(&daemon, "purged", &blocks("purged")), expected[0], "it is empty");
    put_again(&daemon);
    assert_eq!(
        cached(&daemon, "purged", &blocks("new")),
        expected[1],
        "and can be used"
    );
    flush(&daemon);
    let daemon = anchored.start_in(daemon.kill());
    assert_eq!(
        cached(&daemon, "purged", &blocks("purged")),
        expected[0],
        "after a restart, too"
    );
    assert_eq!(cached(&daemon, "purged", &blocks("new")), expected[1]);
    assert_eq!(cached(&daemon, "other", &blocks("other")), expected[1]);
    let status = namespace(&daemon, "purged");
    assert!(status["refused"].is_null(), "{status}");
}

fn put_again(daemon: &Daemon) {
    put(daemon, "purged", &blocks("new"));
}

#[test]
fn a_refused_namespace_is_not_served_again_by_one_that_only_asks() {
    let anchored = Anchored::new();
    let daemon = anchored.start_in(directory());
    populate(&daemon);
    let directory = daemon.stop_and_keep();
    let backup = backup_of(&directory);
    let daemon = anchored.start_in(directory);
    for _ in 0..3 {
        purge(&daemon, &["purged"]);
    }
    let directory = daemon.stop_and_keep();
    restore(&directory, &backup);
    let daemon = anchored.start_in(directory);
    // A purge of it is no harm, and no way around.
    purge(&daemon, &["purged", "--mode", "physical"]);
    assert_eq!(cached(&daemon, "other", &blocks("other")), [true; 3]);
    let client = connect(&daemon);
    let refusal = client.namespace("purged", realization("a model"));
    assert!(refusal.is_err(), "generation 2 is below the anchor's 4");
    let daemon = anchored.start_in(daemon.kill());
    assert!(connect(&daemon).namespace("purged", realization("a model")).is_err());
    answer(&daemon, &["namespace", "advance", "purged"]);
    assert_eq!(cached(&daemon, "purged", &blocks("purged")), [false; 3]);
    // Once more, it has nothing to fear.
    answer(&daemon, &["namespace", "advance", "purged"]);
    assert_eq!(run(&daemon, &["namespace", "advance", "nobody"]).status.code(), Some(1));
}

#[test]
fn a_generation_that_the_anchor_knows_is_not_in_force_a_second_time() {
    let anchored = Anchored::new();
    let daemon = anchored.start_in(directory());
    populate(&daemon);
    let directory = daemon.stop_and_keep();
    let backup = backup_of(&directory);
    let daemon = anchored.start_in(directory);
    let first = purge(&daemon, &["purged"])["generation"]["to"].as_u64().unwrap();
    let directory = daemon.stop_and_keep();
    restore(&directory, &backup);
    let daemon = anchored.start_in(directory);
    let second = purge(&daemon, &["purged"])["generation"]["to"].as_u64().unwrap();
    assert_eq!(second, first + 1);
    assert_eq!(cached(&daemon, "purged", &blocks("purged")), [false; 3]);
}

#[test]
fn without_an_anchor_the_receipt_has_said_that_nothing_would_notice() {
    let daemon = Daemon::start(&NVME);
    populate(&daemon);
    let directory = daemon.stop_and_keep();
    let backup = backup_of(&directory);
    let daemon = Daemon::start_in(directory, &NVME);
    let receipt = purge(&daemon, &["purged", "--mode", "physical"]);
    assert_eq!(receipt["rollback_protection"], "none", "{receipt:#}");
    assert!(
        receipt["not_covered"]
            .to_string()
            .contains("copies of the state directory")
    );
    let directory = daemon.stop_and_keep();
    restore(&directory, &backup);
    let daemon = Daemon::start_in(directory, &NVME);
    // This is what it has warned of.
    assert_eq!(cached(&daemon, "purged", &blocks("purged")), [true; 3]);
}

#[test]
fn an_anchor_does_not_cover_a_narrower_purge_and_the_receipt_says_so() {
    let anchored = Anchored::new();
    let daemon = anchored.start_in(directory());
    populate(&daemon);
    let one = blocks("purged")[2].hex();
    let receipt = purge(&daemon, &["purged", "--mode", "physical", "--hash", &one]);
    assert_eq!(receipt["rollback_protection"], "none", "{receipt:#}");
    assert!(
        receipt["not_covered"]
            .to_string()
            .contains("copies of the state directory")
    );
}

#[test]
fn an_anchor_that_is_missing_or_damaged_keeps_the_daemon_from_starting() {
    let anchored = Anchored::new();
    let daemon = anchored.start_in(directory());
    populate(&daemon);
    purge(&daemon, &["purged"]);
    let mut directory = daemon.stop_and_keep();
    let whole = std::fs::read(&anchored.anchor).unwrap();
    let newer = String::from_utf8(whole.clone())
        .unwrap()
        .replacen("\"version\":1", "\"version\":9", 1);
    for damaged in [&b""[..], b"{}", &whole[..whole.len() / 2], newer.as_bytes()] {
        std::fs::write(&anchored.anchor, damaged).unwrap();
        let (log, remains) = anchored.refused_in(directory);
        assert!(log.contains("exit status: 65"), "{log}");
        assert!(log.contains(anchored.anchor.to_str().unwrap()), "{log}");
        assert_eq!(std::fs::read(&anchored.anchor).unwrap(), damaged, "it is left as it is");
        directory = remains;
    }
    std::fs::remove_file(&anchored.anchor).unwrap();
    let (log, remains) = anchored.refused_in(directory);
    assert!(log.contains("exit status: 78"), "{log}");
    assert!(log.contains("anchor") && log.contains("put it back"), "{log}");
    assert!(!anchored.anchor.exists(), "no empty one takes its place");

    std::fs::write(&anchored.anchor, &whole).unwrap();
    let daemon = anchored.start_in(remains);
    assert_eq!(cached(&daemon, "purged", &blocks("purged")), [false; 3]);
    assert_eq!(cached(&daemon, "other", &blocks("other")), [true; 3]);
}

#[test]
fn a_generation_that_a_crash_kept_from_the_anchor_is_in_it_after_the_next_start() {
    let anchored = Anchored::new();
    let daemon = anchored.start_in(directory());
    populate(&daemon);
    let kept = daemon.stop_and_keep();
    let backup = backup_of(&kept);
    let daemon = anchored.start_in(kept);
    // The register gets it, the anchor cannot: where its next version would lie is a directory.
    let in_the_way = anchored.anchor.with_extension("next");
    std::fs::create_dir(&in_the_way).unwrap();
    let mut asking = daemon.kvctl().args(["invalidate", "purged"]).spawn().unwrap();
    let begun = std::time::Instant::now();
    while cached(&daemon, "purged", &blocks("purged")) != [false; 3] {
        assert!(begun.elapsed() < crate::daemon::PATIENCE, "it is hidden");
    }
    // Written, and tried again for the anchor's sake.
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(asking.try_wait().unwrap().is_none(), "it is not acknowledged");
    let kept = daemon.kill();
    asking.wait().unwrap();
    let (log, kept) = anchored.refused_in(kept);
    assert!(log.contains("anchor.next"), "no start without it: {log}");
    std::fs::remove_dir(&in_the_way).unwrap();
    let daemon = anchored.start_in(kept);
    assert_eq!(namespace(&daemon, "purged")["generation"], 2);
    put_again(&daemon);
    let kept = daemon.kill();
    restore(&kept, &backup);
    let daemon = anchored.start_in(kept);
    let refused = connect(&daemon).namespace("purged", realization("a model"));
    assert!(refused.is_err(), "generation 2 was in force");
    assert_eq!(cached(&daemon, "other", &blocks("other")), [true; 3]);
}

#[test]
fn a_start_without_the_anchor_that_there_was_says_so_and_so_does_every_receipt() {
    let anchored = Anchored::new();
    let daemon = anchored.start_in(directory());
    populate(&daemon);
    assert_eq!(daemon.count("anchor_missing"), 0);
    let daemon = Daemon::start_in(daemon.stop_and_keep(), &NVME);
    assert_eq!(daemon.count("anchor_missing"), 1);
    let (code, metrics) = daemon.http("GET", "/metrics");
    assert!(code == 200 && metrics.contains("kvtier_anchor_missing 1"), "{metrics}");
    let receipt = purge(&daemon, &["purged", "--mode", "physical"]);
    assert_eq!(receipt["rollback_protection"], "none", "{receipt:#}");
    let not_covered = receipt["not_covered"].to_string();
    assert!(
        not_covered.contains("the anchor that this state directory was served with"),
        "{not_covered}"
    );
    let (status, log) = daemon.stop();
    assert!(status.success() && log.contains("--anchor FILE"), "{log}");
}

#[test]
fn an_anchor_that_is_named_again_knows_what_was_purged_without_it() {
    let anchored = Anchored::new();
    let daemon = anchored.start_in(directory());
    populate(&daemon);
    let kept = daemon.stop_and_keep();
    let backup = backup_of(&kept);
    let daemon = Daemon::start_in(kept, &NVME);
    purge(&daemon, &["purged", "--mode", "physical"]);
    let daemon = anchored.start_in(daemon.kill());
    assert_eq!(daemon.count("anchor_missing"), 0);
    let kept = daemon.kill();
    restore(&kept, &backup);
    let daemon = anchored.start_in(kept);
    assert!(connect(&daemon).namespace("purged", realization("a model")).is_err());
    assert_eq!(cached(&daemon, "other", &blocks("other")), [true; 3]);
}
