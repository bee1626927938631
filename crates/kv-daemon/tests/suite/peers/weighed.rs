//! What the cost model says of peers' blocks.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::net::Network;
use super::{BLOCK_BYTES, Plan, await_connected, cluster_of, get, put, sum_of_peers, until};
use crate::daemon::{Daemon, words};

/// Block hashes as `kvctl explain` reads them, which `kvctl put` takes as keys.
const HASHES: [&str; 3] = [
    "00000000000000000000000000000001",
    "00000000000000000000000000000002",
    "00000000000000000000000000000003",
];

/// A token of 1 KiB takes next to nothing to move, and 405 B parameters take long to meet it.
fn settings(gate: &str) -> String {
    format!(
        "cost_model = \"llama-3.1-405b\"\ncost_gpu = \"l40s\"\nkv_bytes_per_token = 1024\npeer_gate = {gate:?}\n{}",
        Plan::settings()
    )
}

/// The second of two members with a model, its gate as told.
fn pair(gate: &str) -> (Plan, Daemon, Daemon) {
    let plan = Plan::on_loopback(2);
    let holder = plan.start(0);
    let flags = plan.flags_of(1);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let asker = Daemon::start_with(&flags, &settings(gate));
    await_connected(&holder, 1);
    await_connected(&asker, 1);
    (plan, holder, asker)
}

fn explain(daemon: &Daemon, lines: &str, arguments: &[&str]) -> std::process::Output {
    let file = daemon.directory.path().join("hashes");
    std::fs::write(&file, lines).expect("written");
    let mut kvctl = daemon.kvctl();
    kvctl
        .args(["explain", "--prompt-tokens", "1000", "--hashes-from"])
        .arg(&file);
    kvctl.args(arguments).output().expect("kvctl runs")
}

fn decisions(daemon: &Daemon) -> (u64, u64) {
    let cluster = cluster_of(daemon);
    let number = |name: &str| cluster[name].as_u64().expect("a number");
    (number("decisions_fetch"), number("decisions_recompute"))
}

#[test]
fn what_recomputing_takes_is_learned_from_engines_and_not_from_those_that_mislead() {
    let (_plan, holder, asker) = pair("on");
    put(&holder, HASHES[0]);
    let explained = || -> Value {
        let output = explain(&asker, HASHES[0], &["--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", words(&output)))
    };
    until("the peer is known", || explained()["matched_tokens"] == 256);
    let number = |explained: &Value, name: &str| explained[name].as_f64().expect("a number");
    let before = explained();
    assert_eq!(before["recompute_measured"], 0, "{before:#}");
    let promised = number(&before, "recompute_s");
    let options = kvtier::client::ClientOptions::new(asker.socket());
    let client = kvtier::client::blocking::Client::connect(options).expect("connected");
    // Far from anything that this model on this GPU could take: of another, or by somebody who wants others to wait.
    for share in [0.001, 1000.0] {
        let took = Duration::from_secs_f64(promised * share);
        client.report_computed(256, 0, took).expect("taken");
    }
    assert_eq!(explained()["recompute_measured"], 0);
    for round in 0..20 {
        let tokens = 256 * (1 + round % 4);
        let took = Duration::from_secs_f64(2.0 * promised * f64::from(tokens) / 256.0);
        client.report_computed(tokens, 0, took).expect("taken");
    }
    let after = explained();
    assert_eq!(after["recompute_measured"], 20, "{after:#}");
    let learned = number(&after, "recompute_s") / promised;
    assert!((1.8..2.2).contains(&learned), "{learned} of {promised} s: {after:#}");
}

#[test]
fn a_lookup_is_explained_term_by_term_and_nothing_is_decided() {
    let (plan, holder, asker) = pair("on");
    put(&asker, HASHES[0]);
    put(&holder, HASHES[1]);
    let lines = format!("# a prompt\n{}\n", HASHES.join("\n"));
    let mut explained = Value::Null;
    until("the peer is known", || {
        let output = explain(&asker, &lines, &["--queue-wait-us", "2000", "--json"]);
        assert!(output.status.success(), "{}", words(&output));
        explained = serde_json::from_slice(&output.stdout).expect("JSON");
        explained["backend"] == plan.addresses[0].as_str()
    });
    for (name, value) in [
        ("blocks", 3),
        ("here", 1),
        ("here_prefix", 1),
        ("matched_tokens", 256),
        ("fetch_tokens", 256),
    ] {
        assert_eq!(explained[name], value, "{name}: {explained:#}");
    }
    let (question, peer) = (&explained["question"], &explained["peers"][0]);
    assert_eq!(question["prompt_tokens"], 1000, "{explained:#}");
    assert_eq!(question["queue_wait_s"], 0.002, "{explained:#}");
    assert_eq!(
        (&peer["blocks"], &peer["prefix"]),
        (&1.into(), &2.into()),
        "{explained:#}"
    );
    assert_eq!(peer["gate_reason"], "it was switched on by hand", "{explained:#}");
    let second = |value: &Value| value.as_f64().expect("seconds");
    let terms = ["lookup_s", "queue_s", "transfer_s", "decompression_s", "risk_s"];
    let terms: Vec<f64> = terms.iter().map(|name| second(&explained["terms"][name])).collect();
    assert!(terms[0] > 0.0 && terms[2] > 0.0 && terms[4] > 0.0, "{explained:#}");
    // The wait for a GPU hides the fetch, as far as it goes.
    let arrives = terms[..4].iter().sum::<f64>().max(0.002);
    assert!(
        (second(&explained["expected_s"]) - arrives - terms[4]).abs() < 1e-9,
        "{explained:#}"
    );
    assert!(second(&explained["recompute_s"]) > 0.02, "{explained:#}");
    assert_eq!(explained["plan"], "fetch", "{explained:#}");

    let output = explain(&asker, &lines, &[]);
    let text = words(&output);
    for name in [
        "lookup",
        "queue",
        "transfer",
        "decompression",
        "risk",
        "R, recompute",
        "expected",
        "plan: fetch: ",
    ] {
        assert!(
            text.lines().any(|line| line.trim_start().starts_with(name)),
            "{name}: {text}"
        );
    }
    assert_eq!(decisions(&asker), (0, 0));
    assert_eq!(sum_of_peers(&asker, "blocks"), 0);
    let (_, metrics) = asker.http("GET", "/metrics");
    for name in ["kvtier_peer_given_up_total{", "kvtier_peer_late_blocks_total{"] {
        assert!(metrics.lines().any(|line| line.starts_with(name)), "{name} {metrics}");
    }
    // What the engine has already is not fetched.
    let output = explain(&asker, &lines, &["--local-prefix-tokens", "768", "--json"]);
    let explained: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(explained["matched_tokens"], 0, "{explained:#}");
    assert_eq!(explained["plan"], "recompute", "{explained:#}");
}

#[test]
fn what_cannot_be_explained_is_said_with_the_remedy() {
    let (_plan, holder, asker) = pair("auto");
    let bad = explain(&asker, &format!("{}\n\nnonsense\n", HASHES[0]), &[]);
    assert_eq!(bad.status.code(), Some(65), "{}", words(&bad));
    assert!(words(&bad).contains("line 3: \"nonsense\""), "{}", words(&bad));
    let missing = asker
        .kvctl()
        .args(["explain", "--prompt-tokens", "1", "--hashes-from", "/nowhere"])
        .output()
        .expect("kvctl runs");
    assert_eq!(missing.status.code(), Some(66), "{}", words(&missing));
    let without = explain(&holder, HASHES[0], &[]);
    assert_eq!(without.status.code(), Some(69), "{}", words(&without));
    assert!(words(&without).contains("set cost_model"), "{}", words(&without));
    let alone = Daemon::start_with(&[], &settings("auto"));
    let none = explain(&alone, HASHES[0], &[]);
    assert_eq!(none.status.code(), Some(69), "{}", words(&none));
    assert!(words(&none).contains("no backend"), "{}", words(&none));
    drop(holder);
    until("the peer is missed", || {
        let away = explain(&asker, HASHES[0], &[]);
        away.status.code() == Some(69) && words(&away).contains("no peer is connected")
    });
}

#[test]
fn a_raw_lookup_finds_what_is_not_worth_fetching() {
    let (_plan, holder, asker) = pair("off");
    put(&holder, "there");
    let exists = |arguments: &[&str]| {
        let output = asker
            .kvctl()
            .arg("exists")
            .args(arguments)
            .output()
            .expect("kvctl runs");
        (output.status.code(), String::from_utf8(output.stdout).expect("text"))
    };
    assert_eq!(exists(&["there"]), (Some(1), "there\tmiss\n".into()));
    let weighed = decisions(&asker);
    assert_eq!(exists(&["--raw", "there"]), (Some(0), "there\tremote\n".into()));
    assert_eq!(exists(&["--raw", "nowhere"]), (Some(1), "nowhere\tmiss\n".into()));
    // It weighs nothing, and opens no way to the bytes.
    assert_eq!(decisions(&asker), weighed);
    assert_eq!(get(&asker, "there"), None);
    assert_eq!(sum_of_peers(&asker, "blocks"), 0);
}

/// How fast a slow holder sends: a block takes a second and a half.
const SLOW_BITS_PER_S: u64 = BLOCK_BYTES as u64 * 8 * 2 / 3;

/// By the socket: the admin server is in another network.
fn is_idle(daemon: &Daemon) -> bool {
    let status = daemon.ask(&["status"]);
    ["leases", "reservations", "operations_in_flight", "waiting"]
        .iter()
        .all(|name| status[*name] == 0)
}

/// A holder and one who asks it, far more patient with peers than the model. The holder's link becomes slow just after it was seen
/// to be fast, so that no probe is due.
fn slowed(network: &Network) -> Option<(Daemon, Daemon)> {
    let patient = "peer_fetch_timeout_ms = 20000\npeer_lease_ttl_ms = 30000\nlease_ttl_ms = 60000\npeer_query_timeout_ms = 5000\n";
    let model = "cost_model = \"llama-3.1-405b\"\ncost_gpu = \"l40s\"\nkv_bytes_per_token = 1024\npeer_gate = \"on\"\n";
    let plan = network.plan().with(&["--peer-transport", "tcp"]);
    let holder = network.start_with(&plan, 0, patient);
    let asker = network.start_with(&plan, 1, &format!("{patient}{model}"));
    await_connected(&holder, 1);
    await_connected(&asker, 1);
    put(&holder, "fast");
    put(&holder, "slow");
    until("the link is seen to be fast", || get(&asker, "fast").is_some());
    network.slow(0, SLOW_BITS_PER_S).then_some((holder, asker))
}

#[test]
fn a_fetch_that_takes_too_long_is_answered_early_and_what_comes_late_is_found_here() {
    let Some(network) = Network::new(2) else { return };
    let Some((holder, asker)) = slowed(&network) else {
        return;
    };
    let begun = Instant::now();
    assert_eq!(get(&asker, "slow"), None);
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(1), "the block alone takes longer: {took:?}");
    assert_eq!(
        (sum_of_peers(&asker, "given_up"), sum_of_peers(&asker, "late_blocks")),
        (1, 0)
    );
    until("the block has come", || sum_of_peers(&asker, "late_blocks") == 1);
    assert!(begun.elapsed() > Duration::from_secs(1), "{:?}", begun.elapsed());
    network.cut(0);
    assert_eq!(get(&asker, "slow").as_deref(), Some("host"));
    until("nothing is under way", || is_idle(&asker));
    drop(holder);
}

#[test]
fn what_comes_late_is_dropped_where_the_namespace_was_invalidated_meanwhile() {
    let Some(network) = Network::new(2) else { return };
    let Some((holder, asker)) = slowed(&network) else {
        return;
    };
    assert_eq!(get(&asker, "slow"), None);
    let invalidated = asker
        .kvctl()
        .args(["invalidate", "default"])
        .output()
        .expect("kvctl runs");
    assert!(invalidated.status.success(), "{}", words(&invalidated));
    // The bytes have come and were right.
    until("the block has come", || sum_of_peers(&asker, "blocks") == 2);
    until("nothing is under way", || is_idle(&asker));
    assert_eq!(sum_of_peers(&asker, "late_blocks"), 0);
    assert_eq!(get(&asker, "slow"), None);
    drop(holder);
}
