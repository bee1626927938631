//! Clients that hold memory while it is purged.

use std::time::Duration;

use kvtier::client::FetchScope;

use super::{NVME, blocks, cached, connect, flush, options, purge, put, realization};
use crate::daemon::Daemon;

fn start(grace_ms: u32) -> Daemon {
    let grace_ms = grace_ms.to_string();
    let daemon = Daemon::start(&[&NVME[..], &["--purge-lease-grace-ms", &grace_ms]].concat());
    put(&daemon, "mine", &blocks("mine"));
    put(&daemon, "other", &blocks("other"));
    flush(&daemon);
    daemon
}

#[test]
fn a_lease_that_outlives_the_grace_lowers_the_guarantee_and_is_named() {
    let daemon = start(200);
    let client = connect(&daemon);
    let namespace = client.namespace("mine", realization("a model")).unwrap();
    let block = &blocks("mine")[2];
    let handle = namespace
        .get(&[block.hash], FetchScope::Each)
        .unwrap()
        .pop()
        .flatten()
        .unwrap();
    let receipt = purge(&daemon, &["mine", "--mode", "physical"]);
    assert_eq!(receipt["guarantee"], "verified_namespace_invalidation", "{receipt:#}");
    let own = &receipt["processors"][0];
    assert!(
        own["reason"].as_str().unwrap().contains("purge_lease_grace_ms"),
        "{own:#}"
    );
    let evidence = own["evidence"].as_array().unwrap();
    let host = evidence.iter().find(|entry| entry["tier"] == "host").unwrap();
    assert_eq!(host["verified"], false, "{host:#}");
    assert!(host["action"].as_str().unwrap().contains("1 left"), "{host:#}");
    // What it leased it may read to the end; nobody gets it any more.
    let mut bytes = vec![0; block.bytes.len()];
    assert_eq!(handle.copy_to(&mut bytes), Ok(bytes.len()));
    assert!(bytes == block.bytes);
    assert_eq!(cached(&daemon, "mine", &blocks("mine")), [false; 3]);
    drop((handle, namespace));
    client.goodbye().unwrap();
    // Once it let go, the next purge finds and destroys what was left.
    daemon.settle();
    let receipt = purge(&daemon, &["mine", "--mode", "physical"]);
    assert_eq!(receipt["guarantee"], "verified_physical_purge", "{receipt:#}");
    let mut needles = super::scan::Needles::default();
    needles.of_block("leased", &block.bytes);
    assert_eq!(needles.in_memory_of(daemon.child.id()).len(), 0);
}

#[test]
fn a_lease_that_ends_within_the_grace_is_waited_for() {
    let daemon = start(30_000);
    let client = connect(&daemon);
    let namespace = client.namespace("mine", realization("a model")).unwrap();
    let block = blocks("mine").remove(2);
    let handle = namespace
        .get(&[block.hash], FetchScope::Each)
        .unwrap()
        .pop()
        .flatten()
        .unwrap();
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        drop(handle);
        (namespace, client)
    });
    let receipt = purge(&daemon, &["mine", "--mode", "physical"]);
    assert_eq!(receipt["guarantee"], "verified_physical_purge", "{receipt:#}");
    let still_connected = reader.join().unwrap();
    let mut needles = super::scan::Needles::default();
    needles.of_block("leased", &block.bytes);
    assert_eq!(needles.in_memory_of(daemon.child.id()).len(), 0);
    assert_eq!(cached(&daemon, "other", &blocks("other")), [true; 3]);
    drop(still_connected);
}

#[test]
fn a_lease_of_another_namespace_or_of_another_domain_holds_nothing_up() {
    let daemon = start(200);
    let client = connect(&daemon);
    let other = client.namespace("other", realization("a model")).unwrap();
    let hashes: Vec<_> = blocks("other").iter().map(|block| block.hash).collect();
    let handles = other.get(&hashes, FetchScope::Each).unwrap();
    assert!(handles.iter().all(Option::is_some));
    let receipt = purge(&daemon, &["mine", "--mode", "physical"]);
    assert_eq!(receipt["guarantee"], "verified_physical_purge", "{receipt:#}");
    for (handle, block) in handles.iter().flatten().zip(blocks("other")) {
        let mut bytes = vec![0; block.bytes.len()];
        assert_eq!(handle.copy_to(&mut bytes), Ok(bytes.len()));
        assert!(bytes == block.bytes, "what lies beside it is as it was");
    }
}

#[test]
fn an_engine_that_put_and_stays_connected_does_not_lower_the_guarantee() {
    let daemon = start(5000);
    // It holds slots ahead, as every client does.
    let client = kvtier::client::blocking::Client::connect(kvtier::client::ClientOptions {
        ahead_bytes_max: 1 << 20,
        ..options(&daemon.socket())
    })
    .unwrap();
    let namespace = client.namespace("mine", realization("a model")).unwrap();
    let more = blocks("more");
    let pairs: Vec<_> = more.iter().map(|block| (block.hash, &block.bytes[..])).collect();
    namespace.put_from(kvtier::Parent::Root, &pairs, 64).unwrap();
    let receipt = purge(&daemon, &["mine", "--mode", "physical"]);
    assert_eq!(receipt["guarantee"], "verified_physical_purge", "{receipt:#}");
    drop((namespace, client));
}
