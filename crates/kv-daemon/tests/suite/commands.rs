//! `kvctl` against a daemon: one block at a time, and whole traces.

use crate::daemon::{Daemon, chat_trace, words};
use serde_json::{Value, json};

#[test]
fn a_block_goes_round_and_every_answer_is_json() {
    let daemon = Daemon::start(&["--nvme-bytes", "16MiB"]);
    let block = daemon.directory.path().join("block");
    let bytes: Vec<u8> = (0..300_001_u32)
        .map(|place| (place.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    std::fs::write(&block, &bytes).unwrap();
    let file = block.to_str().unwrap();

    let put = daemon.ask(&["put", "a text key", file, "--tokens", "512"]);
    assert_eq!((&put["outcome"], &put["bytes"]), (&json!("published"), &json!(300_001)));
    let hash = put["key"].as_str().unwrap().to_string();
    assert_eq!(hash.len(), 32);
    assert_eq!(
        daemon.ask(&["put", &hash, file])["outcome"],
        "present",
        "its hex digits name the same key"
    );

    let output = daemon.kvctl().args(["get", "a text key"]).output().unwrap();
    assert!(output.status.success() && output.stdout == bytes, "{}", output.status);
    let target = daemon.directory.path().join("out");
    let got = daemon.ask(&["get", &hash, "-o", target.to_str().unwrap()]);
    assert_eq!(
        got,
        json!({"key": hash, "found": true, "tier": "host", "bytes": 300_001})
    );
    assert_eq!(std::fs::read(&target).unwrap(), bytes);

    let flushed = daemon.ask(&["flush"]);
    assert_eq!(flushed["left_out"], 0, "{flushed}");
    assert_eq!(daemon.count("nvme_blocks"), 1, "a flush leaves a copy on NVMe");

    let miss = daemon.kvctl().args(["--json", "get", "another key"]).output().unwrap();
    assert_eq!(miss.status.code(), Some(1), "{}", words(&miss));
    let answer: Value = serde_json::from_slice(&miss.stdout).unwrap();
    assert_eq!(answer["found"], false);

    let both = daemon
        .kvctl()
        .args(["--json", "exists", "a text key", "another key"])
        .output()
        .unwrap();
    assert_eq!(both.status.code(), Some(1), "one of two is a miss");
    let answer: Value = serde_json::from_slice(&both.stdout).unwrap();
    assert_eq!(
        (&answer[0]["found"], &answer[1]["found"], &answer[1]["tier"]),
        (&json!(true), &json!(false), &Value::Null)
    );

    assert_eq!(daemon.ask(&["delete", "a text key"])[0]["deleted"], true);
    let again = daemon.kvctl().args(["delete", "a text key"]).output().unwrap();
    assert_eq!(again.status.code(), Some(1), "{}", words(&again));

    daemon.ask(&["--namespace", "n", "put", "k", file]);
    assert_eq!(daemon.ask(&["--namespace", "n", "exists", "k"])[0]["tier"], "host");
    let elsewhere = daemon
        .kvctl()
        .args(["--namespace", "m", "exists", "k"])
        .output()
        .unwrap();
    assert_eq!(elsewhere.status.code(), Some(1), "a key is of its namespace");
    let otherwise = daemon
        .kvctl()
        .args(["--namespace", "n", "--realization", "fp8", "exists", "k"])
        .output()
        .unwrap();
    assert_eq!(otherwise.status.code(), Some(1), "a key is of its form");
    assert_eq!(daemon.ask(&["invalidate", "n"])["generation"], 2);
    let after = daemon
        .kvctl()
        .args(["--namespace", "n", "exists", "k"])
        .output()
        .unwrap();
    assert_eq!(after.status.code(), Some(1), "nothing of the older generation is read");
    daemon.settle();
}

#[test]
fn an_administrator_invalidates_by_domain_and_name() {
    let daemon = Daemon::start(&[]);
    let block = daemon.directory.path().join("block");
    std::fs::write(&block, [1; 5000]).unwrap();
    daemon.ask(&["--namespace", "n", "put", "k", block.to_str().unwrap()]);
    let domain = daemon.status()["domains"][0]["domain"].as_str().unwrap().to_string();
    for path in [
        format!("/v1/namespaces/{domain}/n/invalidate"),
        "/v1/namespaces/n/invalidate".to_string(),
    ] {
        let (code, answer) = daemon.http("POST", &path);
        assert_eq!(code, 200, "{answer}");
        assert!(answer.contains(&format!("{domain}/n")), "{answer}");
    }
    let after = daemon
        .kvctl()
        .args(["--namespace", "n", "exists", "k"])
        .output()
        .unwrap();
    assert_eq!(after.status.code(), Some(1), "{}", words(&after));
}

#[test]
fn wrong_files_are_said_in_words() {
    let daemon = Daemon::start(&[]);
    let empty = daemon.directory.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let broken = daemon.directory.path().join("broken.jsonl");
    std::fs::write(
        &broken,
        "{\"timestamp\": 0, \"input_length\": 5, \"output_length\": 1, \"hash_ids\": [0]}\nnot json\n",
    )
    .unwrap();
    for (arguments, code, word) in [
        (vec!["put", "k", empty.to_str().unwrap()], 65, "1 byte"),
        (vec!["put", "k", "/nowhere/at/all"], 66, "/nowhere/at/all"),
        (
            vec!["replay", broken.to_str().unwrap(), "--block-bytes", "4KiB"],
            65,
            "line 2",
        ),
        (
            vec!["replay", "/nowhere/at/all", "--block-bytes", "4KiB"],
            66,
            "/nowhere/at/all",
        ),
        (
            vec!["replay", broken.to_str().unwrap(), "--block-bytes", "64MiB"],
            64,
            "--block-bytes",
        ),
        (
            vec![
                "replay",
                broken.to_str().unwrap(),
                "--block-bytes",
                "4KiB",
                "--virtual-time",
            ],
            64,
            "--clock client",
        ),
    ] {
        let output = daemon.kvctl().args(&arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", words(&output));
        assert!(
            String::from_utf8_lossy(&output.stderr).contains(word),
            "{arguments:?}: {}",
            words(&output)
        );
    }
}

/// A working set that overflows host memory but not NVMe: hits must come from both, and every byte must be right.
fn replay_with(engine: &str) {
    let started = Daemon::try_start(&["--nvme-bytes", "128MiB", "--nvme-engine", engine], "");
    let daemon = match started {
        Err(log) if engine == "io-uring" && log.contains("io_uring") => {
            eprintln!("skipped: io_uring: {}", log.lines().last().unwrap_or_default());
            return;
        }
        started => started.unwrap_or_else(|log| panic!("{log}")),
    };
    let trace = chat_trace(daemon.directory.path(), 7, 220);
    let report = daemon.ask(&[
        "replay",
        trace.to_str().unwrap(),
        "--block-bytes",
        "64KiB",
        "--connections",
        "2",
    ]);
    assert_eq!(report["wrong_bytes"], 0, "{report:#}");
    let number = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{name}: {report:#}"));
    let requests = std::fs::read_to_string(&trace).unwrap().lines().count() as u64;
    assert_eq!(number("requests"), requests);
    assert!(
        number("hit_blocks_host") > 0 && number("hit_blocks_nvme") > 0,
        "hits from both tiers: {report:#}"
    );
    assert_eq!(
        number("verified_bytes"),
        65536 * (number("hit_blocks_host") + number("hit_blocks_nvme"))
    );
    assert_eq!(
        number("blocks"),
        number("hit_blocks_host") + number("hit_blocks_nvme") + number("miss_blocks")
    );
    assert_eq!(
        number("miss_blocks"),
        number("put_blocks") + number("put_present") + number("put_busy")
    );
    assert_eq!(number("put_busy"), 0, "{report:#}");
    let ratio = report["prefix_hit_token_ratio"].as_f64().unwrap();
    assert!((0.3..1.0).contains(&ratio), "{ratio}");
    let status = daemon.settle();
    assert_eq!(status["corrupt"], 0, "{status:#}");
    assert_eq!(status["nvme_engine"].as_str().unwrap().replace('_', "-"), engine);

    let again = daemon.ask(&[
        "replay",
        trace.to_str().unwrap(),
        "--block-bytes",
        "64KiB",
        "--requests",
        "..100",
    ]);
    assert_eq!((&again["requests"], &again["wrong_bytes"]), (&json!(100), &json!(0)));
}

#[test]
fn a_replay_verifies_every_byte_from_both_tiers_with_threads() {
    replay_with("threads");
}

#[test]
fn a_replay_verifies_every_byte_from_both_tiers_with_io_uring() {
    replay_with("io-uring");
}

#[test]
fn virtual_time_is_the_traces_time() {
    let daemon = Daemon::start(&["--nvme-bytes", "32MiB", "--clock", "client"]);
    let trace = chat_trace(daemon.directory.path(), 3, 40);
    let report = daemon.ask(&[
        "replay",
        trace.to_str().unwrap(),
        "--block-bytes",
        "4KiB",
        "--virtual-time",
    ]);
    assert_eq!(report["wrong_bytes"], 0, "{report:#}");
    assert!(report["prefix_hit_token_ratio"].as_f64().unwrap() > 0.3, "{report:#}");
    let (_, log) = daemon.stop();
    assert!(log.contains("clock = client"), "the test mode warns: {log}");
}

#[test]
fn bytes_that_are_not_the_ids_end_a_replay_with_1() {
    use kv_daemon::content::Content;
    let daemon = Daemon::start(&[]);
    let trace = daemon.directory.path().join("one.jsonl");
    std::fs::write(
        &trace,
        "{\"timestamp\": 0, \"input_length\": 600, \"output_length\": 1, \"hash_ids\": [4, 5]}\n",
    )
    .unwrap();
    let block = daemon.directory.path().join("block");
    let mut bytes = vec![0; 8192];
    Content::default().fill(6, &mut bytes);
    std::fs::write(&block, &bytes).unwrap();
    let hash: String = kvtier_sim::trace::block_hash(4)
        .0
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    daemon.ask(&["--namespace", "lies", "put", &hash, block.to_str().unwrap()]);
    let output = daemon
        .kvctl()
        .args([
            "--namespace",
            "lies",
            "--json",
            "replay",
            trace.to_str().unwrap(),
            "--block-bytes",
            "8KiB",
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", words(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["wrong_bytes"].as_u64().unwrap() > 8000, "{report:#}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("id 4") && said.contains("id 6"), "{said}");
}

#[test]
fn a_workload_is_a_trace_and_its_seed_fixes_it() {
    let run = |seed: &str| {
        crate::daemon::command("kvctl")
            .args(["workload", "--seed", seed, "--sessions", "20"])
            .output()
            .unwrap()
    };
    let (first, same, other) = (run("1"), run("1"), run("2"));
    assert!(first.status.success(), "{}", words(&first));
    assert_eq!(first.stdout, same.stdout);
    assert_ne!(first.stdout, other.stdout);
    for line in first
        .stdout
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let request: Value = serde_json::from_slice(line).unwrap();
        assert!(
            request["timestamp"].is_u64() && !request["hash_ids"].as_array().unwrap().is_empty(),
            "{request}"
        );
    }
}

#[test]
fn a_bench_starts_its_own_daemon_and_prints_rows() {
    let output = crate::daemon::command("kvctl")
        .args([
            "--json",
            "bench",
            "client",
            "--quick",
            "--rounds",
            "1",
            "--cases",
            "lookup",
            "--lookup-blocks",
            "8192",
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", words(&output));
    let rows: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = rows.as_array().unwrap();
    let cases: Vec<&str> = rows.iter().map(|row| row["case"].as_str().unwrap()).collect();
    assert!(cases.contains(&"echo") && cases.contains(&"lookup"), "{cases:?}");
    for row in rows {
        for key in [
            "bytes",
            "batch",
            "gbps",
            "ratio_to_memcpy",
            "p50_us",
            "p99_us",
            "cpu_s_per_gb",
            "echo_p50_us",
            "page_kib",
        ] {
            assert!(row.get(key).is_some(), "{key} is not in {row}");
        }
    }
    let wrong = crate::daemon::command("kvctl")
        .args(["bench", "client", "--cases", "juggling"])
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(64), "{}", words(&wrong));
}

#[test]
fn a_machine_without_a_gpu_is_told_so_and_ends_with_69() {
    let none = crate::daemon::command("kvctl")
        .args(["bench", "gpu", "--quick", "--library", "/nowhere/libcuda.so.1"])
        .output()
        .unwrap();
    assert_eq!(none.status.code(), Some(69), "{}", words(&none));
    assert!(words(&none).contains("cuda unavailable: "), "{}", words(&none));
}
