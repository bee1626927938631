//! The remote tier, in a bucket of a real S3 server.

use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::proxy::Proxy;
use super::{count, remote};
use crate::bucket::Bucket;
use crate::daemon::{self, Daemon, words};
use crate::peers::{bytes_of, get, purge, put, receipts, until};

/// A listing may take longer than an answer of Redis, and a server that shares two processors with everybody longer than one of its own.
const PATIENT: &str = "remote_query_timeout_ms = 5000\nremote_fetch_timeout_ms = 10000";

fn settings(bucket: &Bucket, port: u16, more: &str) -> String {
    let uid = rustix::process::geteuid().as_raw();
    format!(
        "remote_s3 = \"s3://{}/some/where\"\nremote_s3_endpoint = \"http://127.0.0.1:{port}\"\nremote_s3_credentials_file = {:?}\n{more}\n[[domains]]\nname = \"team\"\nuids = [{uid}]\n",
        bucket.name, bucket.credentials
    )
}

fn start_with(settings: &str, directory: TempDir) -> Daemon {
    Daemon::start_in_with(directory, &["--nvme-bytes", "0"], settings)
}

fn start(bucket: &Bucket, directory: TempDir) -> Daemon {
    start_with(&settings(bucket, bucket.port, PATIENT), directory)
}

/// Puts blocks, waits until the bucket has them, and takes the node's memory away.
fn put_and_restart(bucket: &Bucket, keys: &[&str]) -> Daemon {
    let daemon = start(bucket, daemon::directory());
    for key in keys {
        put(&daemon, key);
    }
    until("they are written behind", || {
        count(&daemon, "written") == keys.len() as u64
    });
    start(bucket, daemon.stop_and_keep())
}

#[test]
fn a_block_that_left_the_node_comes_back_and_the_bucket_can_read_nothing_of_it() {
    let Some(bucket) = Bucket::start("comes-back") else {
        return;
    };
    let daemon = put_and_restart(&bucket, &["one", "two", "three"]);
    let exists = daemon.ask(&["exists", "one"]);
    assert!(exists.to_string().contains("remote"), "{exists}");
    for key in ["one", "two", "three"] {
        assert_eq!(get(&daemon, key).as_deref(), Some("remote"), "{key}");
        assert_eq!(get(&daemon, key).as_deref(), Some("host"), "{key}");
    }
    assert_eq!(get(&daemon, "four"), None);
    let status = remote(&daemon);
    assert_eq!(
        (&status["backend"], &status["indexed"]),
        (&Value::from("s3"), &Value::from(3)),
        "{status}"
    );
    assert!(
        status["address"]
            .as_str()
            .is_some_and(|address| address.ends_with(&bucket.name)),
        "{status}"
    );
    // Neither the tenant nor the content, and not a request for each block.
    let content = bucket.content();
    assert!(content.len() < 3, "{}", content.len());
    let block = bytes_of("one");
    for (key, pack) in &content {
        assert!(
            key.starts_with("some/where/kvtier/1/") && !key.contains("team") && !key.contains("default"),
            "{key}"
        );
        let seen = |part: &[u8]| pack.windows(part.len()).any(|window| window == part);
        assert!(
            !block.chunks_exact(16).step_by(997).any(seen),
            "a part of the block is readable"
        );
    }
}

#[test]
fn what_was_invalidated_or_deleted_does_not_come_back() {
    let Some(bucket) = Bucket::start("deleted") else { return };
    let daemon = start(&bucket, daemon::directory());
    for (written, key) in (1..).zip(["deleted", "kept"]) {
        put(&daemon, key);
        until("it is written behind, by itself", || {
            count(&daemon, "written") == written
        });
    }
    let daemon = start(&bucket, daemon.stop_and_keep());
    let deleted = daemon.ask(&["delete", "deleted"]);
    assert!(deleted.to_string().contains("true"), "{deleted}");
    assert_eq!(get(&daemon, "deleted"), None);
    assert_eq!(get(&daemon, "kept").as_deref(), Some("remote"));
    assert_eq!(bucket.keys().len(), 1, "its pack is gone from the bucket");
    daemon.ask(&["invalidate", "default"]);
    assert_eq!(get(&daemon, "kept"), None);
    // The pack is there still, and nobody finds it, in the next run neither.
    assert_eq!(bucket.keys().len(), 1);
    let daemon = start(&bucket, daemon.stop_and_keep());
    assert_eq!(get(&daemon, "kept"), None);
}

#[test]
fn altered_swapped_and_cut_packs_are_misses() {
    let Some(bucket) = Bucket::start("altered") else { return };
    let keys = ["a", "b", "c", "d"];
    let daemon = start(&bucket, daemon::directory());
    for (written, key) in (1..).zip(keys) {
        put(&daemon, key);
        until("it is written behind, by itself", || {
            count(&daemon, "written") == written
        });
    }
    let content = bucket.content();
    assert_eq!(content.len(), 4);
    let mut altered = content[0].1.clone();
    let middle = altered.len() / 2;
    altered[middle] ^= 1;
    bucket.set(&content[0].0, &altered);
    bucket.set(&content[1].0, &content[2].1);
    bucket.set(&content[2].0, &content[1].1);
    bucket.set(&content[3].0, &content[3].1[..content[3].1.len() - 1]);
    // To a node that has read the fronts of what is there now, two that changed places are where they are found.
    let daemon = start(&bucket, daemon.stop_and_keep());
    let found = keys.iter().filter(|key| get(&daemon, key).is_some()).count();
    assert_eq!((found, count(&daemon, "corrupt")), (2, 1));
    for key in keys {
        put(&daemon, key);
    }
    assert!(keys.iter().all(|key| get(&daemon, key).as_deref() == Some("host")));
}

#[test]
fn a_pack_that_changes_under_a_node_that_knows_it_is_a_miss() {
    let Some(bucket) = Bucket::start("swapped") else { return };
    let daemon = start(&bucket, daemon::directory());
    for (written, key) in (1..).zip(["a", "b"]) {
        put(&daemon, key);
        until("it is written behind, by itself", || {
            count(&daemon, "written") == written
        });
    }
    let daemon = start(&bucket, daemon.stop_and_keep());
    assert!(daemon.ask(&["exists", "a"]).to_string().contains("remote"));
    let content = bucket.content();
    bucket.set(&content[0].0, &content[1].1);
    bucket.set(&content[1].0, &content[0].1);
    assert_eq!((get(&daemon, "a"), get(&daemon, "b")), (None, None));
    assert_eq!(count(&daemon, "corrupt"), 2);
}

#[test]
fn a_purge_deletes_the_packs_lists_the_bucket_and_says_so() {
    let Some(bucket) = Bucket::start("purged") else { return };
    let daemon = put_and_restart(&bucket, &["one", "two", "three"]);
    daemon
        .kvctl()
        .args(["--namespace", "other", "put", "x", "/etc/hostname"])
        .output()
        .expect("kvctl runs");
    until("the other tenant's is written, too", || count(&daemon, "written") == 1);
    let packs = bucket.keys().len();
    let output = purge(&daemon, &["--mode", "physical", "--wait"]);
    assert!(output.status.success(), "{}", words(&output));
    assert_eq!(get(&daemon, "one"), None);
    assert_eq!(bucket.keys().len(), 1, "another tenant's pack stays");
    let chain = std::fs::read_to_string(daemon.state().join("receipts/chain.jsonl")).expect("a chain");
    let receipt: Value = serde_json::from_str(chain.lines().last().expect("a receipt")).expect("JSON");
    let mut processors = receipt["processors"].as_array().expect("processors").iter();
    let server = processors
        .find(|report| report["kind"] == "remote_store")
        .expect("the server is one");
    assert_eq!(server["status"], "confirmed", "{receipt}");
    assert_eq!(server["guarantee"], "verified_physical_purge");
    let deleted = server["evidence"][0]["objects"].to_string();
    assert_eq!(deleted.trim_matches('"'), (packs - 1).to_string());
    assert_eq!(server["evidence"][0]["verified"], true);
    assert_eq!(receipt["guarantee"], "verified_physical_purge");
}

#[test]
fn a_bucket_out_of_reach_leaves_a_receipt_unconfirmed_until_it_confirms() {
    let Some(bucket) = Bucket::start("unconfirmed") else {
        return;
    };
    let proxy = Proxy::start(bucket.port);
    let settings = settings(&bucket, proxy.port(), PATIENT);
    let daemon = start_with(&settings, daemon::directory());
    put(&daemon, "one");
    until("it is written behind", || count(&daemon, "written") == 1);
    proxy.break_after(0);
    let output = purge(&daemon, &["--mode", "physical"]);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", words(&output)));
    let id = answer["id"].as_str().expect("a purge").to_owned();
    until("there is a receipt", || !receipts(&daemon, &id).is_empty());
    let first = receipts(&daemon, &id).remove(0);
    assert_eq!(first["guarantee"], "unconfirmed", "{first}");
    assert_eq!(get(&daemon, "one"), None);
    assert_eq!(bucket.keys().len(), 1);
    proxy.break_after(u64::MAX);
    until("a receipt follows", || receipts(&daemon, &id).len() == 2);
    let second = receipts(&daemon, &id).remove(1);
    assert_eq!(second["supersedes"], first["id"]);
    assert_eq!(second["guarantee"], "verified_physical_purge", "{second}");
    assert_eq!(bucket.keys().len(), 0);
}

#[test]
fn a_bucket_that_is_away_at_the_start_is_a_warning_and_used_once_it_is_there() {
    let Some(bucket) = Bucket::start("away") else { return };
    let proxy = Proxy::start(bucket.port);
    proxy.break_after(0);
    let begun = Instant::now();
    let daemon = start_with(&settings(&bucket, proxy.port(), ""), daemon::directory());
    assert!(begun.elapsed() < Duration::from_secs(20));
    put(&daemon, "early");
    assert_eq!(get(&daemon, "early").as_deref(), Some("host"));
    assert_eq!(get(&daemon, "nothing"), None);
    assert_eq!(remote(&daemon)["state"], "away");
    proxy.break_after(u64::MAX);
    let mut number = 0;
    until("puts are written", || {
        number += 1;
        put(&daemon, &format!("late {number}"));
        count(&daemon, "written") > 0
    });
    assert_eq!(remote(&daemon)["state"], "in service");
}

#[test]
fn a_bucket_that_slows_down_is_asked_no_more_and_once_it_heals_it_is_again() {
    let Some(bucket) = Bucket::start("slow") else { return };
    let proxy = Proxy::start(bucket.port);
    let kv_bytes = bytes_of("x").len() / 256;
    let model = format!(
        "cost_model = \"llama-3.1-405b\"\ncost_gpu = \"l40s\"\nkv_bytes_per_token = {kv_bytes}\nremote_compression = \"off\""
    );
    let settings = settings(&bucket, proxy.port(), &model);
    let daemon = start_with(&settings, daemon::directory());
    let keys: Vec<String> = (0..40).map(|number| format!("block {number}")).collect();
    for key in &keys {
        put(&daemon, key);
    }
    until("they are written behind", || count(&daemon, "written") >= 40);
    let daemon = start_with(&settings, daemon.stop_and_keep());
    let offered = |key: &str| {
        let exists = daemon.kvctl().args(["--json", "exists", key]).output();
        words(&exists.expect("kvctl runs")).contains("\"remote\"")
    };
    until("it is measured, and asked", || offered(&keys[0]));
    assert_eq!(get(&daemon, &keys[0]).as_deref(), Some("remote"));
    proxy.slow(Duration::from_millis(400), 200_000);
    let (begun, mut next) = (Instant::now(), 1);
    until("lookups offer it no more", || {
        next += 1;
        // What is known from memory says nothing of the way there: a fetch does.
        let _ = get(&daemon, &keys[next % 30 + 1]);
        !offered(&keys[next % 30 + 2])
    });
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
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
fn what_never_pays_on_an_idle_gpu_stays_off_and_its_five_terms_say_why() {
    let Some(bucket) = Bucket::start("idle") else { return };
    let proxy = Proxy::start(bucket.port);
    let kv_bytes = bytes_of("x").len() / 256;
    let model = format!(
        "cost_model = \"llama-3.1-8b\"\ncost_gpu = \"h100\"\nkv_bytes_per_token = {kv_bytes}\nremote_query_timeout_ms = 5000"
    );
    let daemon = start_with(&settings(&bucket, proxy.port(), ""), daemon::directory());
    put(&daemon, "one");
    until("it is written behind", || count(&daemon, "written") == 1);
    proxy.slow(Duration::from_millis(100), u64::MAX);
    let daemon = start_with(&settings(&bucket, proxy.port(), &model), daemon.stop_and_keep());
    let raw = daemon.ask(&["exists", "one", "--raw"]).to_string();
    assert!(raw.contains("remote"), "{raw}");
    let mut parts = raw.split(|c: char| !c.is_ascii_hexdigit());
    let hash = parts.find(|part| part.len() == 32).expect("a key");
    let hashes = daemon.directory.path().join("hashes");
    std::fs::write(&hashes, hash).expect("written");
    for _ in 0..5 {
        let exists = daemon.kvctl().args(["--json", "exists", "one"]).output();
        assert!(
            words(&exists.expect("kvctl runs")).contains("null"),
            "it is not offered"
        );
        std::thread::sleep(Duration::from_millis(300));
    }
    let path = hashes.to_str().expect("a path");
    let explained = daemon.ask(&["explain", "--prompt-tokens", "256", "--hashes-from", path]);
    assert_eq!(explained["plan"], "recompute", "{explained}");
    assert_eq!(explained["peers"][0]["address"], "s3", "{explained}");
    assert_eq!(explained["peers"][0]["blocks"], 1, "{explained}");
    for term in ["lookup_s", "queue_s", "transfer_s", "decompression_s", "risk_s"] {
        assert!(explained["terms"][term].is_number(), "{explained}");
    }
    assert_eq!(get(&daemon, "one"), None);
}

#[test]
fn connections_that_break_amid_a_pack_are_misses_and_the_next_one_works() {
    let Some(bucket) = Bucket::start("breaks") else { return };
    let proxy = Proxy::start(bucket.port);
    let settings = settings(&bucket, proxy.port(), PATIENT);
    let daemon = start_with(&settings, daemon::directory());
    put(&daemon, "one");
    until("it is written behind", || count(&daemon, "written") == 1);
    let daemon = start_with(&settings, daemon.stop_and_keep());
    assert!(daemon.ask(&["exists", "one"]).to_string().contains("remote"));
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

#[test]
fn settings_of_a_bucket_that_cannot_be_meant_are_refused_with_a_remedy() {
    let directory = daemon::directory();
    let keys = directory.path().join("keys");
    std::fs::write(
        &keys,
        "[default]\naws_access_key_id = AK\naws_secret_access_key = hush\n",
    )
    .expect("written");
    let file = directory.path().join("kvtier.toml");
    let refused = |lines: &str| {
        let domain = "[[domains]]\nname = \"team\"\nuids = [1]\n";
        std::fs::write(&file, format!("{lines}\n{domain}")).expect("written");
        let mut command = daemon::command("kv-daemon");
        command
            .args(["serve", "--state-dir"])
            .arg(directory.path().join("state"))
            .arg("--config")
            .arg(&file);
        let output = command.output().expect("it runs");
        assert_eq!(output.status.code(), Some(78), "{lines}: {}", words(&output));
        let words = words(&output);
        assert!(!words.contains("hush"), "{words}");
        words
    };
    let keys = keys.display();
    if !cfg!(feature = "s3") {
        assert!(refused("remote_s3 = \"s3://bucket\"").contains("--features s3"));
        return;
    }
    assert!(refused("remote_s3 = \"bucket\"").contains("s3://BUCKET"));
    let keyed = refused("remote_s3 = \"s3://AK:hush@bucket\"");
    assert!(keyed.contains("s3://BUCKET"), "{keyed}");
    assert!(refused("remote_s3 = \"s3://bucket\"").contains("remote_s3_credentials_file"));
    let both =
        format!("remote_s3 = \"s3://bucket\"\nremote_s3_credentials_file = \"{keys}\"\nremote_redis = \"redis://h\"");
    assert!(refused(&both).contains("one remote tier"));
    assert!(refused(&format!("remote_s3_credentials_file = \"{keys}\"")).contains("remote_s3"));
    let nobody = "remote_s3 = \"s3://bucket\"\nremote_s3_credentials_file = \"/nonexistent\"";
    assert!(refused(nobody).contains("aws configure"));
}
