//! What one member invalidates, and the fence.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::net::Network;
use super::{Plan, await_connected, cluster_of, get, purge, put, receipts, until};
use crate::daemon::{Daemon, words};

fn job(output: &std::process::Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", words(output)))
}

/// The latest receipt of a purge, once there is one.
fn receipt(daemon: &Daemon, purge: &str) -> Value {
    let mut found = None;
    until("there is a receipt", || {
        found = receipts(daemon, purge).pop();
        found.is_some()
    });
    found.expect("just seen")
}

fn processors(receipt: &Value) -> Vec<(String, String, String)> {
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let processors = receipt["processors"].as_array().expect("a list");
    processors
        .iter()
        .map(|one| (text(&one["processor"]), text(&one["status"]), text(&one["guarantee"])))
        .collect()
}

#[test]
fn a_purge_of_the_cluster_hides_the_block_on_every_member() {
    let plan = Plan::on_loopback(3);
    let nodes = plan.start_all();
    put(&nodes[0], "tenant's");
    for node in &nodes[1..] {
        assert_eq!(get(node, "tenant's").as_deref(), Some("remote"));
    }
    let purged = purge(&nodes[0], &["--wait"]);
    assert!(purged.status.success(), "{}", words(&purged));
    for node in &nodes {
        assert_eq!(get(node, "tenant's"), None);
    }
    let receipt = job(&purged);
    assert_eq!(receipt["reach"], "cluster", "{receipt}");
    let processors = processors(&receipt);
    assert_eq!(processors.len(), 3, "{receipt}");
    assert!(
        processors.iter().all(|(_, status, _)| status == "confirmed"),
        "{receipt}"
    );
    // Whoever stores it anew shares it anew.
    put(&nodes[1], "tenant's");
    until("both know the same invalidations", || {
        get(&nodes[2], "tenant's").is_some()
    });
}

#[test]
fn a_purge_of_one_node_hides_what_peers_still_have_from_its_clients() {
    let plan = Plan::on_loopback(2);
    let nodes = plan.start_all();
    put(&nodes[0], "old");
    assert_eq!(get(&nodes[1], "old").as_deref(), Some("remote"));
    let purged = purge(&nodes[1], &["--reach", "node", "--wait"]);
    assert!(purged.status.success(), "{}", words(&purged));
    for _ in 0..20 {
        assert_eq!(get(&nodes[1], "old"), None);
    }
}

#[test]
fn a_physical_purge_destroys_on_every_member() {
    let plan = Plan::on_loopback(2).with(&["--nvme-bytes", "16MiB"]);
    let nodes = plan.start_all();
    put(&nodes[0], "secret");
    assert_eq!(get(&nodes[1], "secret").as_deref(), Some("remote"));
    for node in &nodes {
        node.ask(&["flush"]);
    }
    let purged = purge(&nodes[0], &["--mode", "physical", "--wait"]);
    assert!(purged.status.success(), "{}", words(&purged));
    let receipt = job(&purged);
    let processors = processors(&receipt);
    assert_eq!(processors.len(), 2, "{receipt}");
    let destroyed = |(_, _, guarantee): &(String, String, String)| guarantee == "verified_physical_purge";
    assert!(processors.iter().all(destroyed), "{receipt}");
    assert_eq!(receipt["guarantee"], "verified_physical_purge");
}

#[test]
fn a_narrow_purge_is_not_undone_by_a_peer() {
    let plan = Plan::on_loopback(2);
    let nodes = plan.start_all();
    put(&nodes[0], "named");
    put(&nodes[0], "other");
    assert_eq!(get(&nodes[1], "named").as_deref(), Some("remote"));
    assert_eq!(get(&nodes[1], "other").as_deref(), Some("remote"));
    let exists = nodes[1].ask(&["exists", "named"]);
    let hash = exists.to_string();
    let hash: String = hash.chars().skip_while(|c| !c.is_ascii_hexdigit()).collect();
    let hash = hash
        .split(|c: char| !c.is_ascii_hexdigit())
        .find(|part| part.len() == 32)
        .unwrap_or_else(|| panic!("no key in {exists}"));
    let purged = purge(&nodes[1], &["--hash", hash, "--wait"]);
    assert!(purged.status.success(), "{}", words(&purged));
    for _ in 0..20 {
        assert_eq!(get(&nodes[1], "named"), None);
    }
    // What was not named stays here.
    assert_eq!(get(&nodes[1], "other").as_deref(), Some("host"));
}

#[test]
fn a_member_that_is_away_is_unconfirmed_and_completes_the_receipt_when_it_is_back() {
    let plan = Plan::on_loopback(2);
    let mut nodes = plan.start_all();
    put(&nodes[0], "old");
    assert_eq!(get(&nodes[1], "old").as_deref(), Some("remote"));
    let away = nodes.remove(1).stop_and_keep();
    let purged = purge(&nodes[0], &[]);
    assert!(purged.status.success(), "{}", words(&purged));
    let id = job(&purged)["id"].as_str().expect("an id").to_owned();
    let first = receipt(&nodes[0], &id);
    assert_eq!(first["guarantee"], "unconfirmed", "{first}");
    let back = plan.start_in(1, away);
    // It learned before it served.
    assert_eq!(get(&back, "old"), None);
    until("the receipt is complete", || {
        receipt(&nodes[0], &id)["guarantee"] == "verified_namespace_invalidation"
    });
    let second = receipt(&nodes[0], &id);
    assert_eq!(second["supersedes"], first["id"], "{second}");
    let keys = nodes[0].directory.path().join("keys");
    std::fs::write(
        &keys,
        nodes[0]
            .http("GET", "/v1/keys")
            .1
            .split_once("\r\n\r\n")
            .expect("a body")
            .1,
    )
    .expect("written");
    let mut verify = nodes[0].kvctl();
    verify.args(["receipt", "verify", "--keys"]).arg(keys);
    let verified = verify
        .arg(nodes[0].state().join("receipts/chain.jsonl"))
        .output()
        .expect("runs");
    assert!(verified.status.success(), "{}", words(&verified));
}

#[test]
fn two_nodes_in_network_namespaces_read_each_other() {
    let Some(network) = Network::new(2) else { return };
    let plan = network.plan();
    let nodes = network.start_all(&plan);
    put(&nodes[0], "far");
    assert_eq!(get(&nodes[1], "far").as_deref(), Some("remote"));
    assert!(cluster_of(&nodes[1])["peers"][0]["rails"].to_string().contains("10."));
    // A cable that is pulled is a miss, and nothing waits for it for long.
    put(&nodes[0], "unreachable");
    network.cut(0);
    let begun = Instant::now();
    assert_eq!(get(&nodes[1], "unreachable"), None);
    assert!(begun.elapsed() < Duration::from_secs(10));
    network.join(0);
    until("it is read once the cable is back", || {
        get(&nodes[1], "unreachable").is_some()
    });
}

#[test]
fn reads_while_the_namespace_is_purged_never_return_what_was_purged_before() {
    let Some(network) = Network::new(2) else { return };
    let plan = network.plan();
    let nodes = network.start_all(&plan);
    purge_while_reading(&network, &nodes, 5);
}

/// Purges at the first node while a client of the second reads, so often.
pub(super) fn purge_while_reading(network: &Network, nodes: &[Daemon], rounds: u32) {
    for round in 0..rounds {
        let keys: Vec<String> = (0..4).map(|key| format!("{round} {key}")).collect();
        for key in &keys {
            put(&nodes[0], key);
        }
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| keys.iter().filter(|key| get(&nodes[1], key).is_some()).count());
            let purged = network.purge(0, &nodes[0], &[]);
            assert!(purged.status.success(), "{}", words(&purged));
            // Acknowledged: no read that starts now returns any of them, whatever the earlier ones do.
            for key in &keys {
                assert_eq!(get(&nodes[0], key), None, "round {round}");
            }
            let _ = reading.join().expect("no panic");
        });
        for key in &keys {
            assert_eq!(get(&nodes[1], key), None, "round {round}");
        }
    }
}

#[test]
fn a_fenced_purge_waits_for_the_lease_of_a_member_that_is_cut_off_which_serves_only_misses_until_it_has_learned() {
    let Some(network) = Network::new(3) else { return };
    let plan = network.plan().with(&["--cluster-fence"]);
    let nodes = network.start_all(&plan);
    until("all serve", || {
        nodes.iter().all(|node| cluster_of(node)["serving"] == true)
    });
    put(&nodes[0], "fenced");
    assert_eq!(get(&nodes[2], "fenced").as_deref(), Some("remote"));
    network.cut(2);
    let begun = Instant::now();
    let purged = network.purge(0, &nodes[0], &[]);
    assert!(purged.status.success(), "{}", words(&purged));
    // Acknowledged, so its lease is over.
    assert_eq!(get(&nodes[2], "fenced"), None, "after {:?}", begun.elapsed());
    assert_eq!(cluster_of(&nodes[2])["serving"], false);
    // It may not even serve what it stores itself.
    put(&nodes[2], "own");
    assert_eq!(get(&nodes[2], "own"), None);
    let id = job(&purged)["id"].as_str().expect("an id").to_owned();
    let first = receipt(&nodes[0], &id).to_string();
    assert!(first.contains("its lease is over"), "{first}");
    network.join(2);
    await_connected(&nodes[2], 2);
    until("it serves again", || cluster_of(&nodes[2])["serving"] == true);
    assert_eq!(get(&nodes[2], "fenced"), None, "it learned before it served");
    until("the receipt is complete", || {
        let receipt = receipt(&nodes[0], &id).to_string();
        receipt.contains("supersedes") && !receipt.contains("unconfirmed")
    });
    // A majority that cannot be had: the purge says so, and goes on.
    network.cut(1);
    network.cut(2);
    let alone = network.purge(0, &nodes[0], &[]);
    assert!(!alone.status.success(), "{}", words(&alone));
    assert!(words(&alone).contains("majority"), "{}", words(&alone));
}
