//! A member whose disk is full when it has to remember what was invalidated.

use std::time::Duration;

use kvtier::client::ClientOptions;
use kvtier::client::blocking::Client;

use super::{Plan, await_connected, get, purge, put, until};
use crate::daemon::{self, Daemon, told_of_full_disks, words};

#[test]
fn what_cannot_be_counted_on_a_full_disk_is_neither_acknowledged_nor_told_nor_read_until_it_is() {
    let plan = Plan::on_loopback(2);
    let flags = plan.flags_of(0);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let launched = Daemon::try_launch(told_of_full_disks(), daemon::directory(), &flags, &Plan::settings());
    let node = launched.unwrap_or_else(|(log, _)| panic!("not ready: {log}"));
    let other = plan.start(1);
    await_connected(&node, 1);
    await_connected(&other, 1);
    put(&node, "doomed");
    assert_eq!(get(&other, "doomed").as_deref(), Some("remote"));

    // Until the file of the counters is longer than the register: then the limit is one on that file alone.
    let length = |name: &str| std::fs::metadata(node.state().join(name)).expect("there").len();
    let options = ClientOptions::new(node.socket()).with_timeout(Duration::from_secs(2));
    let client = Client::connect(options).expect("it listens");
    put(&node, "of the default namespace");
    let filler = client
        .namespace("filler", kvtier::Realization::digest(&[]))
        .expect("a namespace");
    while length("peers.versions") <= length("register") {
        client.invalidate("filler").expect("there is room");
    }
    drop(filler);
    let filled = length("peers.versions");
    while length("peers.versions") == filled {
        client.invalidate("filler").expect("there is room");
    }
    // It grows ahead of what is written.
    node.limit_files(Some(filled));

    let refused = node
        .kvctl()
        .args(["--timeout-ms", "2000", "invalidate", "default"])
        .output()
        .expect("runs");
    assert!(!refused.status.success(), "{}", words(&refused));
    let purged = purge(&node, &[]);
    assert_eq!(purged.status.code(), Some(75), "{}", words(&purged));
    // In force here; and what is put now is not for a peer, who cannot know whether it is of before or after.
    assert_eq!(get(&node, "doomed"), None);
    put(&node, "later");
    put(&other, "theirs");
    assert_eq!(get(&other, "later"), None);
    assert_eq!(get(&node, "theirs"), None);
    assert_eq!(get(&node, "later").as_deref(), Some("host"));

    node.limit_files(None);
    let purged = purge(&node, &["--wait"]);
    assert!(purged.status.success(), "{}", words(&purged));
    for daemon in [&node, &other] {
        assert_eq!(get(daemon, "doomed"), None);
    }
    put(&node, "shared");
    until("they read each other again", || get(&other, "shared").is_some());
}
