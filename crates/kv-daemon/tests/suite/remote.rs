//! The remote tier, on a real Redis server.

mod bucket;
mod cluster;
mod proxy;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use self::proxy::Proxy;
use crate::daemon::{self, Daemon, signal_process, words};
use crate::peers::{bytes_of, get, purge, put, receipts, until};
use crate::redis::Redis;

/// A node that keeps blocks in memory and at this server, and nowhere else.
fn settings(redis: &Redis, url: &str, more: &str) -> String {
    let uid = rustix::process::geteuid().as_raw();
    format!(
        "remote_redis = {url:?}\nremote_redis_password_file = {:?}\n{more}\n[[domains]]\nname = \"team\"\nuids = [{uid}]\n",
        redis.password_file(),
    )
}

fn start(redis: &Redis, directory: TempDir) -> Daemon {
    let settings = settings(redis, &redis.url(), "");
    Daemon::start_in_with(directory, &["--nvme-bytes", "0"], &settings)
}

fn remote(daemon: &Daemon) -> Value {
    daemon.ask(&["remote"])
}

fn count(daemon: &Daemon, field: &str) -> u64 {
    remote(daemon)[field].as_u64().expect("a number")
}

/// Puts blocks, waits until the server has them, and takes the node's memory away.
fn put_and_restart(redis: &Redis, keys: &[&str]) -> Daemon {
    let daemon = start(redis, daemon::directory());
    for key in keys {
        put(&daemon, key);
    }
    until("they are written behind", || {
        count(&daemon, "written") == keys.len() as u64
    });
    start(redis, daemon.stop_and_keep())
}

fn objects(redis: &Redis) -> Vec<(String, Vec<u8>)> {
    redis.content()
}

#[test]
fn a_block_that_left_the_node_comes_back_and_the_server_can_read_nothing_of_it() {
    let Some(redis) = Redis::start(None) else { return };
    let daemon = put_and_restart(&redis, &["one", "two"]);
    let exists = daemon.ask(&["exists", "one"]);
    assert!(exists.to_string().contains("remote"), "{exists}");
    assert_eq!(get(&daemon, "one").as_deref(), Some("remote"));
    assert_eq!(get(&daemon, "one").as_deref(), Some("host"));
    assert_eq!(get(&daemon, "two").as_deref(), Some("remote"));
    assert_eq!(get(&daemon, "three"), None);
    assert_eq!(count(&daemon, "blocks"), 2);
    // Neither the tenant nor the content: not a run of sixteen bytes of the block.
    let content = objects(&redis);
    assert_eq!(content.len(), 2);
    let block = bytes_of("one");
    for (key, object) in &content {
        assert!(
            key.starts_with("kvtier:1:") && !key.contains("team") && !key.contains("default"),
            "{key}"
        );
        assert!(object.len() > block.len());
        let seen = |part: &[u8]| object.windows(part.len()).any(|window| window == part);
        assert!(
            !block.chunks_exact(16).step_by(997).any(seen),
            "a part of the block is readable"
        );
    }
}

#[test]
fn what_was_invalidated_or_deleted_does_not_come_back() {
    let Some(redis) = Redis::start(None) else { return };
    let daemon = put_and_restart(&redis, &["deleted", "kept"]);
    let deleted = daemon.ask(&["delete", "deleted"]);
    assert!(deleted.to_string().contains("true"), "{deleted}");
    assert_eq!(get(&daemon, "deleted"), None);
    assert_eq!(get(&daemon, "kept").as_deref(), Some("remote"));
    assert_eq!(objects(&redis).len(), 1, "its object is gone from the server");
    daemon.ask(&["invalidate", "default"]);
    assert_eq!(get(&daemon, "kept"), None);
    // The object is there still, and nobody finds it, in the next run neither.
    assert_eq!(objects(&redis).len(), 1);
    let daemon = start(&redis, daemon.stop_and_keep());
    assert_eq!(get(&daemon, "kept"), None);
    put(&daemon, "kept");
    assert_eq!(get(&daemon, "kept").as_deref(), Some("host"));
}

#[test]
fn a_deletion_while_the_server_stands_still_is_kept_all_the_same() {
    let Some(redis) = Redis::start(None) else { return };
    let daemon = put_and_restart(&redis, &["deleted"]);
    signal_process(&redis.child, Signal::STOP);
    // Nobody can say whether it was there; that it is gone is what counts.
    let deleted = daemon.kvctl().args(["delete", "deleted"]).output().expect("kvctl runs");
    assert_eq!(deleted.status.code(), Some(1), "{}", words(&deleted));
    signal_process(&redis.child, Signal::CONT);
    until("it answers again", || {
        put(&daemon, "another");
        get(&daemon, "deleted").is_none() && remote(&daemon)["state"] == "in service"
    });
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(get(&daemon, "deleted"), None);
}

#[test]
fn altered_swapped_and_cut_objects_are_misses() {
    let Some(redis) = Redis::start(None) else { return };
    let daemon = put_and_restart(&redis, &["a", "b", "c", "d"]);
    let content = objects(&redis);
    let mut altered = content[0].1.clone();
    let middle = altered.len() / 2;
    altered[middle] ^= 1;
    redis.set(&content[0].0, &altered);
    redis.set(&content[1].0, &content[2].1);
    redis.set(&content[2].0, &content[1].1);
    redis.set(&content[3].0, &content[3].1[..content[3].1.len() - 1]);
    for key in ["a", "b", "c", "d"] {
        assert_eq!(get(&daemon, key), None, "{key}");
    }
    assert_eq!(count(&daemon, "corrupt"), 4);
    assert_eq!(count(&daemon, "blocks"), 0);
    // What is put again is right again.
    put(&daemon, "a");
    assert_eq!(get(&daemon, "a").as_deref(), Some("host"));
}

#[test]
fn a_purge_deletes_the_objects_lists_the_server_and_says_so() {
    let Some(redis) = Redis::start(None) else { return };
    let daemon = put_and_restart(&redis, &["one", "two", "three"]);
    daemon
        .kvctl()
        .args(["--namespace", "other", "put", "x", "/etc/hostname"])
        .output()
        .expect("kvctl runs");
    until("the other tenant's is written, too", || objects(&redis).len() == 4);
    let output = purge(&daemon, &["--mode", "physical", "--wait"]);
    assert!(output.status.success(), "{}", words(&output));
    assert_eq!(get(&daemon, "one"), None);
    assert_eq!(objects(&redis).len(), 1, "another tenant's object stays");
    let chain = std::fs::read_to_string(daemon.state().join("receipts/chain.jsonl")).expect("a chain");
    let receipt: Value = serde_json::from_str(chain.lines().last().expect("a receipt")).expect("JSON");
    let processors = receipt["processors"].as_array().expect("processors");
    let server = processors
        .iter()
        .find(|report| report["kind"] == "remote_store")
        .expect("the server is one");
    assert_eq!(server["status"], "confirmed", "{receipt}");
    assert_eq!(server["guarantee"], "verified_physical_purge");
    assert_eq!(server["evidence"][0]["tier"], "remote");
    assert_eq!(server["evidence"][0]["objects"].to_string().trim_matches('"'), "3");
    assert_eq!(server["evidence"][0]["verified"], true);
    assert_eq!(receipt["guarantee"], "verified_physical_purge");
}

#[test]
fn a_narrow_purge_leaves_nothing_behind_at_the_server() {
    let Some(redis) = Redis::start(None) else { return };
    let daemon = put_and_restart(&redis, &["one", "two"]);
    let exists = daemon.ask(&["exists", "one"]).to_string();
    let mut words_of = exists.split(|c: char| !c.is_ascii_hexdigit());
    let hash = words_of.find(|part| part.len() == 32).expect("a key").to_owned();
    let output = purge(&daemon, &["--hash", &hash, "--wait"]);
    assert!(output.status.success(), "{}", words(&output));
    assert_eq!(get(&daemon, "one"), None);
    // The whole namespace's: a server's objects do not tell what extends what.
    assert_eq!(get(&daemon, "two"), None);
    assert_eq!(objects(&redis).len(), 0);
}

#[test]
fn a_server_that_stands_still_leaves_a_receipt_unconfirmed_until_it_confirms() {
    let Some(redis) = Redis::start(None) else { return };
    let daemon = put_and_restart(&redis, &["one", "two"]);
    signal_process(&redis.child, Signal::STOP);
    let output = purge(&daemon, &["--mode", "invalidate"]);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", words(&output)));
    let id = answer["id"]
        .as_str()
        .or(answer["purge"].as_str())
        .expect("a purge")
        .to_owned();
    until("there is a receipt", || !receipts(&daemon, &id).is_empty());
    let first = receipts(&daemon, &id).remove(0);
    assert_eq!(first["guarantee"], "unconfirmed", "{first}");
    assert_eq!(get(&daemon, "one"), None);
    signal_process(&redis.child, Signal::CONT);
    until("a receipt follows", || receipts(&daemon, &id).len() == 2);
    let second = receipts(&daemon, &id).remove(1);
    assert_eq!(second["supersedes"], first["id"]);
    assert_eq!(second["guarantee"], "verified_namespace_invalidation", "{second}");
    assert_eq!(objects(&redis).len(), 0);
}

#[test]
fn a_node_killed_before_the_server_confirmed_completes_the_receipt_in_its_next_run() {
    let Some(redis) = Redis::start(None) else { return };
    let daemon = put_and_restart(&redis, &["one", "two"]);
    signal_process(&redis.child, Signal::STOP);
    let output = purge(&daemon, &["--mode", "physical"]);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", words(&output)));
    let id = answer["id"].as_str().expect("a purge").to_owned();
    until("there is a receipt", || !receipts(&daemon, &id).is_empty());
    assert_eq!(receipts(&daemon, &id)[0]["guarantee"], "unconfirmed");
    let directory = daemon.kill();
    signal_process(&redis.child, Signal::CONT);
    let daemon = start(&redis, directory);
    assert_eq!(get(&daemon, "one"), None);
    until("a receipt follows", || receipts(&daemon, &id).len() == 2);
    let second = receipts(&daemon, &id).remove(1);
    assert_eq!(second["guarantee"], "verified_physical_purge", "{second}");
    assert_eq!(objects(&redis).len(), 0);
}

#[test]
fn a_write_that_was_given_up_keeps_a_purge_from_being_confirmed_at_once() {
    let Some(redis) = Redis::start(None) else { return };
    let daemon = start(&redis, daemon::directory());
    signal_process(&redis.child, Signal::STOP);
    put(&daemon, "late");
    until("its write is given up", || count(&daemon, "failed") > 0);
    signal_process(&redis.child, Signal::CONT);
    let output = purge(&daemon, &["--mode", "physical"]);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", words(&output)));
    let id = answer["id"].as_str().expect("a purge").to_owned();
    until("there is a receipt", || !receipts(&daemon, &id).is_empty());
    let first = receipts(&daemon, &id).remove(0);
    assert_eq!(first["guarantee"], "unconfirmed", "{first}");
    assert!(
        first.to_string().contains("a write that was given up may still arrive"),
        "{first}"
    );
    // Half a minute later nothing is on its way any more.
    until("a receipt follows", || receipts(&daemon, &id).len() == 2);
    let second = receipts(&daemon, &id).remove(1);
    assert_eq!(second["guarantee"], "verified_physical_purge", "{second}");
    assert_eq!(objects(&redis).len(), 0);
}

#[test]
fn a_server_without_room_still_gives_what_it_has() {
    let Some(redis) = Redis::start(None) else { return };
    let daemon = put_and_restart(&redis, &["one"]);
    redis.fill_up();
    put(&daemon, "more");
    until("it refuses the block", || count(&daemon, "failed") > 0);
    assert_eq!(remote(&daemon)["state"], "in service");
    assert_eq!(get(&daemon, "one").as_deref(), Some("remote"));
    assert_eq!(get(&daemon, "more").as_deref(), Some("host"));
}

#[test]
fn a_write_of_unknown_outcome_that_arrives_after_a_deletion_brings_nothing_back() {
    let Some(redis) = Redis::start(None) else { return };
    let daemon = start(&redis, daemon::directory());
    put(&daemon, "early");
    until("it is written behind", || count(&daemon, "written") == 1);
    let (key, object) = objects(&redis).remove(0);
    signal_process(&redis.child, Signal::STOP);
    put(&daemon, "late");
    until("its write is given up", || count(&daemon, "failed") > 0);
    signal_process(&redis.child, Signal::CONT);
    until("the server answers again", || {
        let _ = get(&daemon, "nothing");
        remote(&daemon)["state"] == "in service"
    });
    daemon.ask(&["delete", "early"]);
    // What was on its way all the time arrives now.
    redis.set(&key, &object);
    assert_eq!(get(&daemon, "early"), None);
}

#[test]
fn a_server_that_is_away_at_the_start_is_a_warning_and_used_once_it_is_there() {
    let Some(redis) = Redis::start(None) else { return };
    let (url, password) = (redis.url(), settings(&redis, &redis.url(), ""));
    let port = redis.port;
    signal_process(&redis.child, Signal::KILL);
    let begun = Instant::now();
    let daemon = Daemon::start_in_with(daemon::directory(), &["--nvme-bytes", "0"], &password);
    assert!(begun.elapsed() < Duration::from_secs(20));
    put(&daemon, "early");
    assert_eq!(get(&daemon, "early").as_deref(), Some("host"));
    assert_eq!(get(&daemon, "nothing"), None);
    assert_eq!(remote(&daemon)["state"], "away");
    let again = Redis::start(Some(port)).expect("it was there before");
    assert_eq!(again.url(), url);
    let mut number = 0;
    until("puts are written", || {
        number += 1;
        put(&daemon, &format!("late {number}"));
        count(&daemon, "written") > 0
    });
    assert_eq!(remote(&daemon)["state"], "in service");
}

#[test]
fn a_server_that_slows_down_is_asked_no_more_and_once_it_heals_it_is_again() {
    let Some(redis) = Redis::start(None) else { return };
    let proxy = Proxy::start(redis.port);
    let kv_bytes = bytes_of("x").len() / 256;
    let model = format!("cost_model = \"llama-3.1-405b\"\ncost_gpu = \"l40s\"\nkv_bytes_per_token = {kv_bytes}");
    let settings = settings(&redis, &proxy.url(), &model);
    let daemon = Daemon::start_in_with(daemon::directory(), &["--nvme-bytes", "0"], &settings);
    let keys: Vec<String> = (0..40).map(|number| format!("block {number}")).collect();
    for key in &keys {
        put(&daemon, key);
    }
    until("they are written behind", || count(&daemon, "written") >= 40);
    let daemon = Daemon::start_in_with(daemon.stop_and_keep(), &["--nvme-bytes", "0"], &settings);
    let offered = |key: &str| {
        let exists = daemon.kvctl().args(["--json", "exists", key]).output();
        words(&exists.expect("kvctl runs")).contains("\"remote\"")
    };
    until("it is measured, and asked", || offered(&keys[0]));
    assert_eq!(get(&daemon, &keys[0]).as_deref(), Some("remote"));
    let (_, metrics) = daemon.http("GET", "/metrics");
    let value = |name: &str| -> f64 {
        let line = metrics.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("{name}: {metrics}"));
        line.rsplit(' ')
            .next()
            .and_then(|value| value.parse().ok())
            .expect("a number")
    };
    // What was expected of the fetch stands beside what it took, term by term.
    for term in ["lookup", "transfer"] {
        let of = |what: &str| value(&format!("kvtier_cost_{what}{{backend=\"redis\",term=\"{term}\"}}"));
        assert!(
            of("expected_seconds_total") > 0.0 && of("actual_seconds_total") > 0.0,
            "{term}"
        );
        assert!(of("compared_total") >= 1.0, "{term}");
    }
    assert!(value("kvtier_cost_expected_failures_total{backend=\"redis\"}") > 0.0);
    assert!(value("kvtier_cost_failures_total{backend=\"redis\"}") < 1.0);
    proxy.slow(Duration::from_millis(400), 200_000);
    let begun = Instant::now();
    let mut next = 1;
    until("lookups offer it no more", || {
        next += 1;
        !offered(&keys[next % 30 + 1])
    });
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    // Once it is closed, nobody waits for it.
    until("requests are quick", || {
        let begun = Instant::now();
        let _ = offered(&keys[35]);
        begun.elapsed() < Duration::from_millis(300)
    });
    proxy.slow(Duration::ZERO, u64::MAX);
    until("it is asked again", || offered(&keys[36]));
    assert_eq!(get(&daemon, &keys[36]).as_deref(), Some("remote"));
}

#[test]
fn what_never_pays_on_an_idle_gpu_stays_off_and_is_used_while_requests_wait_for_one() {
    let Some(redis) = Redis::start(None) else { return };
    let proxy = Proxy::start(redis.port);
    // A small model: recomputing 256 tokens is a matter of milliseconds, and a tenth of a second on the way is not.
    let kv_bytes = bytes_of("x").len() / 256;
    let model = format!(
        "cost_model = \"llama-3.1-8b\"\ncost_gpu = \"h100\"\nkv_bytes_per_token = {kv_bytes}\nremote_query_timeout_ms = 1000\nremote_fetch_timeout_ms = 10000"
    );
    let plain = settings(&redis, &proxy.url(), "");
    let daemon = Daemon::start_in_with(daemon::directory(), &["--nvme-bytes", "0"], &plain);
    put(&daemon, "one");
    until("it is written behind", || count(&daemon, "written") == 1);
    proxy.slow(Duration::from_millis(100), u64::MAX);
    let weighed = settings(&redis, &proxy.url(), &model);
    let daemon = Daemon::start_in_with(daemon.stop_and_keep(), &["--nvme-bytes", "0"], &weighed);
    let hashes = daemon.directory.path().join("hashes");
    let raw = daemon.ask(&["exists", "one", "--raw"]);
    assert!(raw.to_string().contains("remote"), "{raw}");
    let hash = raw.to_string();
    let mut parts = hash.split(|c: char| !c.is_ascii_hexdigit());
    let hash = parts.find(|part| part.len() == 32).expect("a key").to_owned();
    std::fs::write(&hashes, format!("# one block\n{hash}\n")).expect("written");
    for _ in 0..10 {
        let exists = daemon.kvctl().args(["--json", "exists", "one"]).output();
        assert!(
            words(&exists.expect("kvctl runs")).contains("null"),
            "it is not offered"
        );
        std::thread::sleep(Duration::from_millis(300));
    }
    let explain = |more: &[&str]| {
        let mut arguments = vec![
            "explain",
            "--prompt-tokens",
            "256",
            "--hashes-from",
            hashes.to_str().expect("a path"),
        ];
        arguments.extend(more);
        daemon.ask(&arguments)
    };
    let explained = explain(&[]);
    assert_eq!(explained["plan"], "recompute", "{explained}");
    assert_eq!(explained["peers"][0]["address"], "redis", "{explained}");
    assert_eq!(explained["peers"][0]["blocks"], 1, "{explained}");
    assert_eq!(explained["peers"][0]["gate_open"], false, "{explained}");
    for term in ["lookup_s", "queue_s", "transfer_s", "decompression_s", "risk_s"] {
        assert!(explained["terms"][term].is_number(), "{explained}");
    }
    assert_eq!(get(&daemon, "one"), None);

    // A request that waits three seconds for a GPU loses nothing by fetching meanwhile.
    let wait = ["--queue-wait-us", "3000000"];
    let explained = explain(&wait);
    assert_eq!(explained["question"]["queue_wait_s"], 3.0, "{explained}");
    let exists = |more: &[&str]| {
        let mut kvctl = daemon.kvctl();
        let output = kvctl.args(["--json", "exists", "one"]).args(more).output();
        words(&output.expect("kvctl runs"))
    };
    until("those that wait are offered it", || {
        exists(&wait).contains("\"remote\"")
    });
    assert_eq!(explain(&wait)["plan"], "fetch");
    // And still nobody else is.
    assert!(exists(&[]).contains("null"));
    assert_eq!(explain(&[])["plan"], "recompute");
    assert_eq!(get(&daemon, "one"), None);
    until("one that waits gets it", || {
        let fetched = daemon.kvctl().args(["--json", "get", "one"]).args(wait).output();
        words(&fetched.expect("kvctl runs")).contains("\"tier\":\"remote\"")
    });
    assert_eq!(get(&daemon, "one").as_deref(), Some("host"));
    assert!(count(&daemon, "decisions_fetch") >= 2, "the lookup and the get");
}

#[test]
fn an_engine_that_can_split_is_left_the_front_while_the_rest_is_fetched() {
    let Some(redis) = Redis::start(None) else { return };
    let proxy = Proxy::start(redis.port);
    let keys: Vec<String> = (0..8).map(|number| format!("block {number}")).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let daemon = put_and_restart(&redis, &keys);
    let kv_bytes = bytes_of("x").len() / 256;
    let model = format!(
        "cost_model = \"llama-3.1-405b\"\ncost_gpu = \"l40s\"\nkv_bytes_per_token = {kv_bytes}\nremote_gate = \"on\"\nremote_compression = \"off\"\nremote_fetch_timeout_ms = 60000\nremote_query_timeout_ms = 5000"
    );
    let settings = settings(&redis, &proxy.url(), &model);
    // Recomputing eight blocks takes some ten seconds, and fetching them somewhat less.
    let rate = bytes_of("x").len() as u64 * 8 / 6;
    proxy.slow(Duration::ZERO, rate);
    let daemon = Daemon::start_in_with(daemon.stop_and_keep(), &["--nvme-bytes", "0"], &settings);
    until("the way is measured", || {
        (1..rate * 3).contains(&count(&daemon, "expected_bytes_per_second"))
    });
    let exists = |more: &[&str]| -> (Vec<Value>, Vec<Value>) {
        let output = daemon
            .kvctl()
            .args(["--json", "exists"])
            .args(&keys)
            .args(more)
            .output();
        let rows: Value = serde_json::from_slice(&output.expect("kvctl runs").stdout).expect("JSON");
        let column = |name: &str| {
            rows.as_array()
                .expect("rows")
                .iter()
                .map(|row| row[name].clone())
                .collect()
        };
        (column("tier"), column("hash"))
    };
    let (whole, hashes) = exists(&[]);
    assert!(
        whole.iter().all(|tier| tier == "remote"),
        "{whole:?} {}",
        remote(&daemon)
    );
    let (split, _) = exists(&["--can-split"]);
    let front = split
        .iter()
        .position(|tier| tier == "remote")
        .expect("a part is fetched");
    assert!((1..8).contains(&front), "{split:?}");
    assert!(split[front..].iter().all(|tier| tier == "remote"), "{split:?}");

    let file = daemon.directory.path().join("hashes");
    let lines: Vec<&str> = hashes.iter().map(|hash| hash.as_str().expect("a hash")).collect();
    std::fs::write(&file, lines.join("\n")).expect("written");
    let explain = |more: &[&str]| {
        let file = file.to_str().expect("a path");
        let mut arguments = vec!["explain", "--prompt-tokens", "2048", "--hashes-from", file];
        arguments.extend(more);
        daemon.ask(&arguments)
    };
    let (plain, parted) = (explain(&[]), explain(&["--can-split"]));
    assert_eq!(
        (&plain["plan"], &parted["plan"]),
        (&"fetch".into(), &"split".into()),
        "{parted}"
    );
    let number = |explained: &Value, name: &str| explained[name].as_f64().expect("a number");
    let (computed, fetched) = (number(&parted, "compute_front_tokens"), number(&parted, "fetch_tokens"));
    assert!(
        computed > 0.0 && fetched > 0.0 && (computed + fetched - 2048.0).abs() < 0.5,
        "{parted}"
    );
    // Each does about half of the work.
    assert!(
        number(&parted, "expected_s") < 0.8 * number(&plain, "expected_s"),
        "{plain} {parted}"
    );

    // Fetched together, without a prefix: the back comes, and the front is left alone.
    let options = kvtier::client::ClientOptions::new(daemon.socket()).with_timeout(Duration::from_secs(60));
    let client = kvtier::client::blocking::Client::connect(options);
    let namespace = client
        .expect("connected")
        .namespace("default", kvtier::Realization::digest(&[("form", "kvctl")]));
    let namespace = namespace.expect("a namespace").with_hints(kvtier::Hints {
        can_split: true,
        ..kvtier::Hints::default()
    });
    let parse = |hash: &&str| {
        let byte = |at: usize| u8::from_str_radix(&hash[2 * at..2 * at + 2], 16).expect("hexadecimal");
        kvtier::BlockHash(std::array::from_fn(byte))
    };
    let hashes: Vec<kvtier::BlockHash> = lines.iter().map(parse).collect();
    let got = namespace
        .get(&hashes, kvtier::client::FetchScope::Each)
        .expect("answered");
    let there: Vec<bool> = got.iter().map(Option::is_some).collect();
    let front = there.iter().position(|there| *there).expect("a part came");
    assert!(
        (1..8).contains(&front) && there[front..].iter().all(|there| *there),
        "{there:?}"
    );
    drop(got);
    // Who wants a prefix gets no gap in front of it.
    let (tiers, _) = exists(&[]);
    assert!(tiers[..front].iter().all(|tier| tier == "remote"), "{tiers:?}");
    assert!(tiers[front..].iter().all(|tier| tier == "host"), "{tiers:?}");
}

#[test]
fn compressed_objects_are_smaller_and_come_back_whatever_the_settings_say_now() {
    let Some(redis) = Redis::start(None) else { return };
    let compressing = settings(&redis, &redis.url(), "remote_compression = \"bytes\"");
    let daemon = Daemon::start_in_with(daemon::directory(), &["--nvme-bytes", "0"], &compressing);
    put(&daemon, "small");
    until("it is written behind", || count(&daemon, "written") == 1);
    let block = bytes_of("small").len();
    let objects = objects(&redis);
    assert!(objects[0].1.len() < block / 2, "{} of {block}", objects[0].1.len());
    assert_eq!(count(&daemon, "compressed"), 1);
    assert_eq!(count(&daemon, "written_block_bytes"), block as u64);
    assert_eq!(count(&daemon, "written_bytes"), objects[0].1.len() as u64);
    let plain = settings(&redis, &redis.url(), "remote_compression = \"off\"");
    let daemon = Daemon::start_in_with(daemon.stop_and_keep(), &["--nvme-bytes", "0"], &plain);
    assert_eq!(get(&daemon, "small").as_deref(), Some("remote"));
    put(&daemon, "large");
    until("it is written behind", || count(&daemon, "written") == 1);
    assert_eq!(count(&daemon, "compressed"), 0);
    assert!(self::objects(&redis).iter().any(|(_, object)| object.len() > block));
    // One that was changed on its way is a miss, as any other.
    let (key, mut object) = objects.into_iter().next().expect("one object");
    let middle = object.len() / 2;
    object[middle] ^= 1;
    redis.set(&key, &object);
    let daemon = Daemon::start_in_with(daemon.stop_and_keep(), &["--nvme-bytes", "0"], &plain);
    assert_eq!(get(&daemon, "small"), None);
    assert_eq!(count(&daemon, "corrupt"), 1);
}

#[test]
fn blocks_are_compressed_once_the_way_there_was_measured_to_be_slow() {
    let Some(redis) = Redis::start(None) else { return };
    let proxy = Proxy::start(redis.port);
    proxy.slow(Duration::ZERO, 10_000_000);
    let kv_bytes = bytes_of("x").len() / 256;
    let model = format!("cost_model = \"llama-3.1-405b\"\ncost_gpu = \"l40s\"\nkv_bytes_per_token = {kv_bytes}");
    let settings = settings(&redis, &proxy.url(), &model);
    let daemon = Daemon::start_in_with(daemon::directory(), &["--nvme-bytes", "0"], &settings);
    until("the way is measured", || {
        (1..60_000_000).contains(&count(&daemon, "expected_bytes_per_second"))
    });
    put(&daemon, "one");
    until("it is written behind", || count(&daemon, "written") == 1);
    assert_eq!(count(&daemon, "compressed"), 1);
    let daemon = Daemon::start_in_with(daemon.stop_and_keep(), &["--nvme-bytes", "0"], &settings);
    until("it is offered", || {
        let exists = daemon.kvctl().args(["--json", "exists", "one"]).output();
        words(&exists.expect("kvctl runs")).contains("\"remote\"")
    });
    assert_eq!(get(&daemon, "one").as_deref(), Some("remote"));
}

#[test]
fn a_fetch_that_turns_out_slow_is_answered_at_once_and_what_comes_late_is_kept() {
    let Some(redis) = Redis::start(None) else { return };
    let proxy = Proxy::start(redis.port);
    let kv_bytes = bytes_of("x").len() / 256;
    // Recomputing takes two seconds and a half.
    let model = format!(
        "cost_model = \"llama-3.1-405b\"\ncost_gpu = \"l40s\"\nkv_bytes_per_token = {kv_bytes}\nremote_compression = \"off\"\nremote_fetch_timeout_ms = 30000"
    );
    let settings = settings(&redis, &proxy.url(), &model);
    let daemon = Daemon::start_in_with(daemon::directory(), &["--nvme-bytes", "0"], &settings);
    put(&daemon, "one");
    until("it is written behind", || count(&daemon, "written") == 1);
    let daemon = Daemon::start_in_with(daemon.stop_and_keep(), &["--nvme-bytes", "0"], &settings);
    until("it is offered", || {
        let exists = daemon.kvctl().args(["--json", "exists", "one"]).output();
        words(&exists.expect("kvctl runs")).contains("\"remote\"")
    });
    // Five seconds for the block, from now on.
    proxy.slow(Duration::ZERO, bytes_of("one").len() as u64 / 5);
    let begun = Instant::now();
    assert_eq!(get(&daemon, "one"), None);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert_eq!(count(&daemon, "given_up"), 1);
    until("it came all the same", || count(&daemon, "late_blocks") == 1);
    assert_eq!(get(&daemon, "one").as_deref(), Some("host"));
}

#[test]
fn connections_that_break_amid_an_object_are_misses_and_the_next_one_works() {
    let Some(redis) = Redis::start(None) else { return };
    let proxy = Proxy::start(redis.port);
    let settings = settings(&redis, &proxy.url(), "");
    let daemon = Daemon::start_in_with(daemon::directory(), &["--nvme-bytes", "0"], &settings);
    put(&daemon, "one");
    until("it is written behind", || count(&daemon, "written") == 1);
    let daemon = Daemon::start_in_with(daemon.stop_and_keep(), &["--nvme-bytes", "0"], &settings);
    proxy.break_after(150_000);
    assert_eq!(get(&daemon, "one"), None);
    proxy.corrupt(true);
    proxy.break_after(u64::MAX);
    until("altered on the way: a miss", || {
        assert_eq!(get(&daemon, "one"), None);
        count(&daemon, "corrupt") + count(&daemon, "failed") > 1
    });
    proxy.corrupt(false);
    until("it comes", || get(&daemon, "one").as_deref() == Some("remote"));
}
