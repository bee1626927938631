//! Purges of a part of a namespace.

use kvtier::Parent;
use kvtier::client::{PutOutcome, Writing};
use serde_json::Value;

use super::scan::{Needles, Sightings};
use super::{
    Block, NVME, answer, await_completed, blocks, cached, cached_as, connect, flush, namespace, only_receipt, purge,
    put, put_as, realization,
};
use crate::daemon::Daemon;

/// Two forms of the same blocks, and another namespace with them.
fn populate(daemon: &Daemon) {
    put(daemon, "mine", &blocks("chain"));
    put_as(daemon, "mine", realization("another"), &blocks("chain"));
    put(daemon, "mine", &blocks("elsewhere"));
    put(daemon, "other", &blocks("chain"));
    flush(daemon);
}

/// Of the two forms, of the chain that was not named, and of the other namespace.
fn found(daemon: &Daemon) -> [Vec<bool>; 4] {
    [
        cached(daemon, "mine", &blocks("chain")),
        cached_as(daemon, "mine", realization("another"), &blocks("chain")),
        cached(daemon, "mine", &blocks("elsewhere")),
        cached(daemon, "other", &blocks("chain")),
    ]
}

/// Asks for a purge, and no more than that: the job as it was acknowledged.
fn acknowledged(daemon: &Daemon, arguments: &[&str]) -> Value {
    answer(daemon, &[&["purge", "mine"], arguments].concat())
}

#[test]
fn named_blocks_go_with_all_that_extend_them_and_stay_gone() {
    for mode in ["invalidate", "physical"] {
        let daemon = Daemon::start(&NVME);
        populate(&daemon);
        assert_eq!(found(&daemon).concat(), [true; 12]);
        let generation = namespace(&daemon, "mine")["generation"].clone();
        let job = acknowledged(&daemon, &["--mode", mode, "--hash", &blocks("chain")[1].hex()]);
        assert_ne!(job["state"], "requested", "{job}");
        assert!(job["generation"].is_null(), "{job}");
        // As soon as it is acknowledged.
        let daemon = Daemon::start_in(daemon.kill(), &NVME);
        let expected = [
            vec![true, false, false],
            vec![true, false, false],
            vec![true; 3],
            vec![true; 3],
        ];
        assert_eq!(found(&daemon), expected, "{mode}");
        let id = job["id"].as_str().unwrap();
        let job = await_completed(&daemon, id);
        assert!(job["blocks"].as_u64() >= Some(4), "{job}");
        let receipt = only_receipt(&daemon, id);
        // The namespace's key stays: what the device keeps of its own could still be opened.
        assert_eq!(receipt["guarantee"], "verified_namespace_invalidation", "{receipt:#}");
        assert!(receipt["generation"].is_null(), "{receipt:#}");
        assert_eq!(receipt["processors"][0]["evidence"][0]["objects"], 4, "{receipt:#}");
        assert_eq!(namespace(&daemon, "mine")["generation"], generation);
        // Neither job nor receipt says which blocks they were.
        let hash = blocks("chain")[1].hex();
        assert!(!job.to_string().contains(&hash) && !receipt.to_string().contains(&hash));
        let mut needles = Needles::default();
        needles.add("a hash in hex", hash.as_bytes());
        needles.add("a hash", &blocks("chain")[1].hash.0);
        assert_eq!(needles.in_files(&daemon.state()), Sightings::new());
        put(&daemon, "mine", &blocks("chain")[1..]);
        assert_eq!(
            cached(&daemon, "mine", &blocks("chain")),
            [true; 3],
            "they can be put again"
        );
        flush(&daemon);
        let daemon = Daemon::start_in(daemon.kill(), &NVME);
        assert_eq!(cached(&daemon, "mine", &blocks("chain")), [true; 3], "and stay");
    }
}

#[test]
fn a_purged_realization_is_gone_and_the_others_are_not() {
    let daemon = Daemon::start(&NVME);
    populate(&daemon);
    let digest = super::hex(&realization("another").0);
    acknowledged(&daemon, &["--mode", "physical", "--scope-realization", &digest]);
    let daemon = Daemon::start_in(daemon.kill(), &NVME);
    let expected = [vec![true; 3], vec![false; 3], vec![true; 3], vec![true; 3]];
    assert_eq!(found(&daemon), expected);
    // One that nobody ever used has no blocks.
    let receipt = purge(&daemon, &["mine", "--scope-realization", &"ab".repeat(32)]);
    assert_eq!(receipt["processors"][0]["evidence"][0]["objects"], 0, "{receipt:#}");
    assert_eq!(found(&daemon), expected);
    let receipt = purge(&daemon, &["mine", "--hash", &"cd".repeat(16)]);
    assert_eq!(receipt["scope"]["hashes"], 1, "{receipt:#}");
    assert_eq!(found(&daemon), expected);
}

#[test]
fn nothing_of_named_blocks_is_found_anywhere() {
    for encryption in ["aes-256-gcm", "none"] {
        let daemon = Daemon::start(&[&NVME[..], &["--encryption", encryption]].concat());
        populate(&daemon);
        let gone = &blocks("elsewhere")[1..];
        let needles = |blocks: &[Block]| {
            let mut needles = Needles::default();
            for block in blocks {
                needles.of_block(&block.hex(), &block.bytes);
            }
            needles
        };
        let needles_of_gone = needles(gone);
        assert_eq!(needles_of_gone.in_memory_of(daemon.child.id()).len(), 6);
        let on_disk = needles_of_gone.in_files(&daemon.state());
        assert_eq!(on_disk.len(), if encryption == "none" { 6 } else { 0 }, "{on_disk:#?}");
        let receipt = purge(&daemon, &["mine", "--mode", "physical", "--hash", &gone[0].hex()]);
        let expected = [vec![true; 3], vec![true; 3], vec![true, false, false], vec![true; 3]];
        assert_eq!(found(&daemon), expected);
        assert_eq!(
            needles_of_gone.in_memory_of(daemon.child.id()),
            Sightings::new(),
            "{receipt:#}"
        );
        assert_eq!(
            needles_of_gone.in_files(&daemon.state()),
            Sightings::new(),
            "{receipt:#}"
        );
    }
}

#[test]
fn a_put_that_began_before_a_purge_is_refused_as_stale() {
    let daemon = Daemon::start(&NVME);
    populate(&daemon);
    let late = Block::new("late", 30_000);
    let hash = blocks("chain")[0].hex();
    let digest = super::hex(&realization("another").0);
    for scope in [
        &["--hash", &hash][..],
        &["--scope-realization", &digest],
        &[],
        &["--mode", "physical"],
    ] {
        let client = connect(&daemon);
        let mine = client.namespace("mine", realization("a model")).unwrap();
        let other = client.namespace("other", realization("a model")).unwrap();
        let writer = |namespace: &super::Namespace| {
            let length = u32::try_from(late.bytes.len()).unwrap();
            let Writing::Open(mut writer) = namespace.writer(late.hash, Parent::Root, length, 64).unwrap() else {
                panic!("a slot");
            };
            writer.write(0, &late.bytes).unwrap();
            writer
        };
        let (begun, others) = (writer(&mine), writer(&other));
        acknowledged(&daemon, scope);
        assert_eq!(begun.seal().unwrap(), PutOutcome::Stale, "{scope:?}");
        assert!(!mine.exists(late.hash).unwrap(), "{scope:?}");
        assert_eq!(
            others.seal().unwrap(),
            PutOutcome::Published,
            "{scope:?}: of another namespace"
        );
        assert_eq!(
            writer(&mine).seal().unwrap(),
            PutOutcome::Published,
            "{scope:?}: begun after it"
        );
        assert_eq!(mine.delete(&[late.hash]).unwrap(), [true]);
        assert_eq!(other.delete(&[late.hash]).unwrap(), [true]);
    }
}
