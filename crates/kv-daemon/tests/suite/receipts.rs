//! `kvctl receipt verify`, on what a daemon wrote: receipts as they are pass, and nothing else does.

use std::fs;
use std::path::{Path, PathBuf};

use crate::daemon::{Daemon, command, words};
use serde_json::Value;

/// What a node leaves to whoever checks it: its chain and its public keys.
struct Left {
    daemon: Daemon,
    chain: PathBuf,
    keys: PathBuf,
}

/// Three purges of one namespace.
fn purged() -> Left {
    let daemon = Daemon::start(&[]);
    let block = daemon.directory.path().join("block");
    fs::write(&block, [7; 5000]).unwrap();
    daemon.ask(&["--namespace", "n", "put", "k", block.to_str().unwrap()]);
    for number in 0..3 {
        let output = command("kvctl")
            .env("KVTIER_STATE_DIR", daemon.state())
            .args(["--json", "purge", "n", "--wait", "--request-id", &format!("r{number}")])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", words(&output));
    }
    let (code, answer) = daemon.http("GET", "/v1/keys");
    assert_eq!(code, 200, "{answer}");
    let keys = daemon.directory.path().join("keys.json");
    fs::write(&keys, answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    Left {
        chain: daemon.state().join("receipts/chain.jsonl"),
        daemon,
        keys,
    }
}

/// The exit code, and what was said.
fn verify(keys: &str, files: &[&Path]) -> (i32, String) {
    let mut kvctl = command("kvctl");
    kvctl.args(["receipt", "verify", "--keys", keys]).args(files);
    let output = kvctl.output().unwrap();
    (output.status.code().unwrap(), words(&output))
}

#[test]
fn receipts_as_they_were_issued_pass_offline_and_with_the_daemons_keys() {
    let left = purged();
    let keys = left.keys.to_str().unwrap();
    let (code, words) = verify(keys, &[&left.chain]);
    assert_eq!(code, 0, "{words}");
    assert_eq!(words.matches("verified").count(), 3, "{words}");
    // One by one, in any order, a file named twice; the link that leads out of them is said.
    let text = fs::read_to_string(&left.chain).unwrap();
    let files: Vec<PathBuf> = text
        .lines()
        .zip(1..)
        .map(|(line, number)| {
            let file = left.daemon.directory.path().join(format!("{number}.json"));
            fs::write(&file, line).unwrap();
            file
        })
        .collect();
    let (code, words) = verify(keys, &[&files[2], &files[1], &files[2]]);
    assert_eq!(code, 0, "{words}");
    assert_eq!(words.matches("was not given").count(), 1, "{words}");
    let (code, words) = verify(keys, &[&files[0], &files[2]]);
    assert_eq!((code, words.matches("was not given").count()), (0, 1), "{words}");
    let url = format!("http://{}", left.daemon.http_address());
    let (code, words) = verify(&url, &[&files[0]]);
    assert_eq!(code, 0, "{words}");
    let output = command("kvctl")
        .args(["--json", "receipt", "verify", "--keys", keys])
        .arg(&left.chain)
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&report["verified"], report["lines"].as_array().unwrap().len()),
        (&true.into(), 3)
    );
    // And without the node.
    let copies = tempfile::tempdir().unwrap();
    let [chain, kept] = ["chain.jsonl", "keys.json"].map(|name| copies.path().join(name));
    fs::copy(&left.chain, &chain).unwrap();
    fs::copy(&left.keys, &kept).unwrap();
    drop(left);
    assert_eq!(verify(kept.to_str().unwrap(), &[&chain]).0, 0);
}

#[test]
fn altered_missing_and_reordered_receipts_and_wrong_keys_end_with_65_and_are_named() {
    let left = purged();
    let keys = left.keys.to_str().unwrap();
    let whole = fs::read_to_string(&left.chain).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    let file = left.daemon.directory.path().join("given.jsonl");
    let given = |text: String| {
        fs::write(&file, text).unwrap();
        verify(keys, &[&file])
    };
    for (text, said) in [
        (whole.replacen("\"r1\"", "\"r2\"", 1), "altered"),
        (whole.replacen(',', ", ", 1), "RFC 8785"),
        (format!("{}\n{}\n", lines[0], lines[2]), "missing: numbers 2 to 2"),
        (format!("{}\n{}\n", lines[1], lines[0]), "reordered"),
        (format!("{}\n{}\n", lines[0], lines[0]), "repeated"),
        (format!("{}\n{}", lines[0], &lines[1][..300]), "JSON"),
        (String::new(), "no receipt"),
        ("{}".to_string(), "object"),
    ] {
        let (code, words) = given(text);
        assert_eq!(code, 65, "{words}");
        assert!(words.contains(said), "{said}: {words}");
    }
    let other = purged();
    let (code, words) = verify(other.keys.to_str().unwrap(), &[&left.chain]);
    assert_eq!(code, 65, "{words}");
    assert!(words.contains("not among the keys"), "{words}");
    let (code, words) = verify(left.chain.to_str().unwrap(), &[&left.chain]);
    assert_eq!(code, 65, "{words}");
}

#[test]
fn what_is_not_there_or_not_on_this_machine_is_said_with_what_to_do() {
    let left = purged();
    let keys = left.keys.to_str().unwrap();
    let nowhere = Path::new("/nowhere/at/all");
    let (code, words) = verify(keys, &[&left.chain, nowhere]);
    assert_eq!(code, 66, "{words}");
    assert!(words.contains("/nowhere/at/all"), "{words}");
    assert_eq!(verify("/nowhere/keys", &[&left.chain]).0, 66);
    for url in [
        "http://192.0.2.1:9640",
        "https://127.0.0.1:9640",
        "http://example.org",
        "ftp://127.0.0.1",
    ] {
        let (code, words) = verify(url, &[&left.chain]);
        assert_eq!(code, 64, "{url}: {words}");
    }
    let (_, words) = verify("http://192.0.2.1:9640", &[&left.chain]);
    assert!(words.contains("name the file"), "{words}");
    let (code, words) = verify("http://127.0.0.1:1", &[&left.chain]);
    assert_eq!(code, 69, "{words}");
    let output = command("kvctl")
        .args(["receipt", "verify"])
        .arg(&left.chain)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64), "{}", crate::daemon::words(&output));
    assert!(crate::daemon::words(&output).contains("--keys"));
}
