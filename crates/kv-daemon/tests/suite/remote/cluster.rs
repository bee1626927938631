//! Members of a cluster that keep blocks at one server: each reads what another wrote, and a purge takes that from all.

use serde_json::Value;
use tempfile::TempDir;

use super::{count, objects};
use crate::daemon::{self, Daemon, words};
use crate::peers::{Plan, await_connected, bytes_of, get, purge, put, sum_of_peers, until};
use crate::redis::Redis;

/// Starts a member that keeps blocks in memory and at this server, and nowhere else.
fn start(plan: &Plan, redis: &Redis, member: usize, directory: TempDir) -> Daemon {
    let mut flags = plan.flags_of(member);
    flags.extend(["--nvme-bytes".to_owned(), "0".to_owned()]);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Daemon::start_in_with(directory, &flags, &super::settings(redis, &redis.url(), ""))
}

fn start_two(plan: &Plan, redis: &Redis) -> [Daemon; 2] {
    let nodes = [0, 1].map(|member| start(plan, redis, member, daemon::directory()));
    nodes.iter().for_each(|node| await_connected(node, 1));
    nodes
}

/// Takes a member's memory away.
fn restarted(plan: &Plan, redis: &Redis, member: usize, daemon: Daemon) -> Daemon {
    let daemon = start(plan, redis, member, daemon.stop_and_keep());
    await_connected(&daemon, 1);
    daemon
}

fn written(daemon: &Daemon, blocks: u64) {
    until("they are written behind", || count(daemon, "written") == blocks);
}

fn server_of(receipt: &Value) -> &Value {
    let processors = receipt["processors"].as_array().expect("processors");
    let server = processors.iter().find(|report| report["kind"] == "remote_store");
    server.expect("the server is one")
}

/// Purges physically, and waits for the receipt.
fn purged(daemon: &Daemon, more: &[&str]) -> Value {
    let output = purge(daemon, &[&["--mode", "physical", "--wait"], more].concat());
    assert!(output.status.success(), "{}", words(&output));
    serde_json::from_slice(&output.stdout).expect("a receipt")
}

#[test]
fn what_one_member_wrote_another_reads_and_the_server_cannot() {
    let Some(redis) = Redis::start(None) else { return };
    let plan = Plan::on_loopback(2);
    let [first, second] = start_two(&plan, &redis);
    for key in ["one", "two"] {
        put(&first, key);
    }
    written(&first, 2);
    let first = restarted(&plan, &redis, 0, first);
    await_connected(&second, 1);
    until("the other member reads it", || get(&second, "one").is_some());
    assert_eq!(count(&second, "blocks"), 1);
    assert_eq!(sum_of_peers(&second, "blocks"), 0, "and not from the first's memory");
    let block = bytes_of("one");
    for (key, object) in objects(&redis) {
        assert!(!key.contains("team") && !key.contains("default"), "{key}");
        let seen = |part: &[u8]| object.windows(part.len()).any(|window| window == part);
        assert!(
            !block.chunks_exact(16).step_by(997).any(seen),
            "a part of the block is readable"
        );
    }

    // Who has its key goes on without it.
    let away = first.stop_and_keep();
    assert_eq!(get(&second, "two").as_deref(), Some("remote"));
    assert_eq!(count(&second, "blocks"), 2);
    put(&second, "three");
    written(&second, 1);
    // The other way round, once it has asked.
    let first = start(&plan, &redis, 0, away);
    await_connected(&first, 1);
    until("it has the second's key", || {
        let _ = get(&first, "nothing");
        count(&first, "shared_groups") == 1
    });
    drop(second);
    assert_eq!(get(&first, "three").as_deref(), Some("remote"));
}

#[test]
fn a_purge_of_the_cluster_takes_the_keys_from_all_and_the_objects_from_the_server() {
    let Some(redis) = Redis::start(None) else { return };
    let plan = Plan::on_loopback(2);
    let [first, second] = start_two(&plan, &redis);
    put(&first, "one");
    written(&first, 1);
    let first = restarted(&plan, &redis, 0, first);
    until("the other member reads it", || get(&second, "one").is_some());
    assert_eq!(count(&second, "shared_groups"), 1);
    let stolen = objects(&redis);
    let purged = purged(&first, &[]);
    assert_eq!(purged["guarantee"], "verified_physical_purge", "{purged}");
    assert_eq!(server_of(&purged)["status"], "confirmed");
    assert!(objects(&redis).is_empty());
    assert_eq!(count(&second, "shared_groups"), 0);
    // A server that had kept a copy cannot bring it back.
    for (key, object) in &stolen {
        redis.set(key, object);
    }
    for _ in 0..5 {
        assert_eq!(get(&first, "one"), None);
        assert_eq!(get(&second, "one"), None);
    }
    put(&second, "one");
    written(&second, 1);
    let second = restarted(&plan, &redis, 1, second);
    until("later blocks are shared again", || get(&first, "one").is_some());
    drop(second);
}

#[test]
fn a_purge_of_one_member_does_not_claim_what_only_all_can() {
    let Some(redis) = Redis::start(None) else { return };
    let plan = Plan::on_loopback(2);
    let [first, second] = start_two(&plan, &redis);
    put(&first, "one");
    written(&first, 1);
    let purged = purged(&first, &["--reach", "node"]);
    let server = server_of(&purged);
    assert_eq!(server["status"], "confirmed");
    assert_eq!(server["guarantee"], "verified_namespace_invalidation", "{purged}");
    assert!(server["reason"].to_string().contains("cluster"), "{purged}");
    // It is out of reach for the other all the same, once it has heard of it; and its objects are gone.
    assert!(objects(&redis).is_empty());
    until("the other has heard of it", || get(&second, "one").is_none());
}
