//! What a restart must not forget: generations, names, keys.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

use crate::daemon::{Daemon, binary, chat_trace, command, words};

const NVME: [&str; 2] = ["--nvme-bytes", "16MiB"];

fn put(daemon: &Daemon, namespace: &str) {
    let block = daemon.directory.path().join("block");
    fs::write(&block, [3; 10_000]).unwrap();
    daemon.ask(&["--namespace", namespace, "put", "key", block.to_str().unwrap()]);
}

fn generation(daemon: &Daemon, namespace: &str) -> Value {
    daemon.ask(&["invalidate", namespace])["generation"].clone()
}

#[test]
fn a_generation_that_was_acknowledged_is_still_raised_after_kill_9() {
    let mut daemon = Daemon::start(&NVME);
    let mut expected = 1;
    for _ in 0..5 {
        put(&daemon, "n");
        assert_eq!(daemon.ask(&["flush"])["left_out"], 0);
        expected += 1;
        // Killed as soon as the answer is here.
        assert_eq!(generation(&daemon, "n"), expected);
        daemon = Daemon::start_in(daemon.kill(), &NVME);
        let miss = daemon
            .kvctl()
            .args(["--namespace", "n", "exists", "key"])
            .output()
            .unwrap();
        assert_eq!(
            miss.status.code(),
            Some(1),
            "nothing of an older generation: {}",
            words(&miss)
        );
    }
    assert_eq!(generation(&daemon, "n"), expected + 1);
}

#[test]
fn the_same_name_in_two_domains_keeps_apart_across_a_restart() {
    let tokens = crate::daemon::directory();
    let names = ["first", "second"];
    let settings: String = names
        .iter()
        .map(|name| {
            let path = tokens.path().join(name);
            fs::write(&path, format!("the token of the {name} domain\n")).unwrap();
            format!("[[domains]]\nname = {name:?}\ntoken_file = {path:?}\n")
        })
        .collect();
    let kvctl = |daemon: &Daemon, domain: &str, arguments: &[&str]| -> Output {
        let token = tokens.path().join(domain);
        let mut kvctl = daemon.kvctl();
        let kvctl = kvctl.arg("--json").arg("--token-file").arg(token).args(arguments);
        kvctl.output().unwrap()
    };
    let raise = |daemon: &Daemon, domain: &str| {
        let output = kvctl(daemon, domain, &["invalidate", "same"]);
        assert!(output.status.success(), "{}", words(&output));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["generation"].clone()
    };
    let daemon = Daemon::start_with(&NVME, &settings);
    let block = daemon.directory.path().join("block");
    fs::write(&block, [3; 10_000]).unwrap();
    for domain in names {
        let output = kvctl(
            &daemon,
            domain,
            &["--namespace", "same", "put", "key", block.to_str().unwrap()],
        );
        assert!(output.status.success(), "{}", words(&output));
    }
    assert_eq!(raise(&daemon, "second"), 2);
    assert_eq!(raise(&daemon, "second"), 3);
    let started = Daemon::try_start_in(daemon.kill(), &NVME, &settings);
    let daemon = started.unwrap_or_else(|(log, _)| panic!("{log}"));
    assert_eq!(raise(&daemon, "first"), 2);
    assert_eq!(raise(&daemon, "second"), 4);
    assert_eq!(daemon.count("namespaces"), 2);
}

/// What is in the directory's files that a refused start must leave alone.
fn durable_files(state: &Path) -> Vec<Vec<u8>> {
    ["register", "realizations", "master.key"]
        .iter()
        .map(|name| fs::read(state.join(name)).unwrap())
        .collect()
}

#[test]
fn a_state_directory_of_a_later_version_is_refused_in_words() {
    let daemon = Daemon::start(&NVME);
    put(&daemon, "n");
    let state = daemon.state();
    let mut directory = daemon.stop_and_keep();
    for (file, place) in [("register", 8), ("realizations", 8)] {
        let path = state.join(file);
        let whole = fs::read(&path).unwrap();
        let mut newer = whole.clone();
        newer[place] = 9;
        fs::write(&path, &newer).unwrap();
        let before = durable_files(&state);
        let (log, kept) = Daemon::try_start_in(directory, &NVME, "").err().expect("refused");
        assert!(log.contains("exit status: 65"), "{log}");
        assert!(log.contains("version 9") && log.contains("newer program"), "{log}");
        assert_eq!(durable_files(&state), before);
        fs::write(&path, &whole).unwrap();
        directory = kept;
    }
    Daemon::start_in(directory, &NVME);
}

#[test]
fn a_second_daemon_on_the_same_state_directory_is_refused_without_an_nvme_tier_too() {
    let daemon = Daemon::start(&[]);
    let other = crate::daemon::directory();
    // The lock of the daemon guards the directory; that of the register guards it from whoever knows only the library.
    fs::remove_file(daemon.state().join("daemon.lock")).unwrap();
    let output = command("kv-daemon")
        .args(["serve", "--http", "off", "--host-bytes", "16MiB", "--state-dir"])
        .arg(daemon.state())
        .arg("--socket")
        .arg(other.path().join("s"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(73), "{}", words(&output));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("register is in use"), "{said}");
    put(&daemon, "n");
}

fn key_file(directory: &Path, name: &str, digits: &str) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, digits.repeat(32)).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    path
}

#[test]
fn a_wrong_open_or_missing_master_key_is_refused_and_changes_nothing() {
    let daemon = Daemon::start(&NVME);
    put(&daemon, "n");
    let state = daemon.state();
    let mut directory = daemon.stop_and_keep();
    let wrong = key_file(directory.path(), "wrong", "5a");
    let open = key_file(directory.path(), "open", "5a");
    fs::set_permissions(&open, PermissionsExt::from_mode(0o644)).unwrap();
    let short = key_file(directory.path(), "short", "5");
    let absent = directory.path().join("absent");
    let before = durable_files(&state);
    for (file, said) in [
        (&wrong, "leave it out"),
        (&open, "chmod 0600"),
        (&short, "64 hexadecimal digits"),
        (&absent, "no such file"),
    ] {
        let flags = [NVME[0], NVME[1], "--master-key-file", file.to_str().unwrap()];
        let (log, kept) = Daemon::try_start_in(directory, &flags, "").err().expect("refused");
        assert!(log.contains("exit status: 78") && log.contains(said), "{log}");
        assert!(!log.contains("5a5a"), "a key is never shown: {log}");
        assert_eq!(durable_files(&state), before);
        directory = kept;
    }
    let daemon = Daemon::start_in(directory, &NVME);
    assert_eq!(generation(&daemon, "n"), 2);
}

#[test]
fn the_master_key_is_private_never_logged_and_can_lie_elsewhere() {
    let daemon = Daemon::start(&["--log-level", "trace"]);
    put(&daemon, "n");
    let path = daemon.state().join("master.key");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let key = fs::read_to_string(&path).unwrap();
    let (status, log) = daemon.stop();
    assert!(status.success() && !log.contains(key.trim()), "{log}");

    let directory = crate::daemon::directory();
    let elsewhere = key_file(directory.path(), "key", "c3");
    let flags = ["--master-key-file", elsewhere.to_str().unwrap()];
    let daemon = Daemon::start_in(directory, &flags);
    assert!(!daemon.state().join("master.key").exists());
    put(&daemon, "n");
    assert_eq!(generation(&daemon, "n"), 2);
    let daemon = Daemon::start_in(daemon.kill(), &flags);
    assert_eq!(generation(&daemon, "n"), 3);
}

fn rotate(state: &Path, arguments: &[&str]) -> Output {
    let mut rotate = command("kv-daemon");
    let rotate = rotate.arg("rotate-master-key").arg("--state-dir").arg(state);
    rotate.args(arguments).output().unwrap()
}

#[test]
fn rotating_the_master_key_keeps_names_and_generations() {
    let daemon = Daemon::start(&NVME);
    put(&daemon, "n");
    assert_eq!(generation(&daemon, "n"), 2);
    let state = daemon.state();
    let output = rotate(&state, &[]);
    assert_eq!(output.status.code(), Some(73), "{}", words(&output));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("in use"),
        "{}",
        words(&output)
    );
    let directory = daemon.stop_and_keep();
    let before = fs::read(state.join("master.key")).unwrap();
    let output = rotate(&state, &["--json"]);
    assert!(output.status.success(), "{}", words(&output));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&answer["rewrapped"], &answer["must_be_named"]),
        (&json!(1), &json!(false))
    );
    assert_ne!(fs::read(state.join("master.key")).unwrap(), before);
    let daemon = Daemon::start_in(directory, &NVME);
    assert_eq!(generation(&daemon, "n"), 3);

    let directory = daemon.stop_and_keep();
    let elsewhere = directory.path().join("elsewhere");
    let output = rotate(&state, &["--new-master-key-file", elsewhere.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && said.contains("--master-key-file"),
        "{}",
        words(&output)
    );
    let (log, directory) = Daemon::try_start_in(directory, &NVME, "")
        .err()
        .expect("the key is named now");
    assert!(
        log.contains("exit status: 78") && log.contains("--master-key-file"),
        "{log}"
    );
    let flags = [NVME[0], NVME[1], "--master-key-file", elsewhere.to_str().unwrap()];
    let daemon = Daemon::start_in(directory, &flags);
    assert_eq!(generation(&daemon, "n"), 4);

    let nowhere = rotate(&daemon.directory.path().join("nowhere"), &[]);
    assert_eq!(nowhere.status.code(), Some(78), "{}", words(&nowhere));
}

#[test]
fn what_cannot_be_made_durable_is_unavailable_until_it_can() {
    // A file that may not grow stands for a full disk; it must come as an error, not as a signal.
    let mut patient = Command::new("sh");
    patient
        .args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""])
        .arg(binary("kv-daemon"));
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("KVTIER_")) {
        patient.env_remove(variable);
    }
    let started = Daemon::try_launch(patient, crate::daemon::directory(), &[], "");
    let daemon = started.unwrap_or_else(|(log, _)| panic!("{log}"));
    put(&daemon, "before");
    let process = Pid::from_raw(i32::try_from(daemon.child.id()).unwrap());
    let limit = |bytes: Option<u64>| {
        let maximum = getrlimit(Resource::Fsize).maximum;
        let limits = Rlimit {
            current: bytes,
            maximum,
        };
        prlimit(process, Resource::Fsize, limits).expect("a limit");
    };
    limit(Some(4096));
    let output = daemon
        .kvctl()
        .args(["--timeout-ms", "2000", "--namespace", "after", "exists", "key"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(69), "{}", words(&output));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("cannot be made durable"), "{said}");
    assert!(daemon.count("register_failures") > 0);
    // An invalidation hides at once, but is acknowledged only when it is durable.
    let waiting = daemon
        .kvctl()
        .args(["--timeout-ms", "300", "invalidate", "before"])
        .output()
        .unwrap();
    assert!(!waiting.status.success(), "{}", words(&waiting));
    let miss = daemon
        .kvctl()
        .args(["--namespace", "before", "exists", "key"])
        .output()
        .unwrap();
    assert_eq!(miss.status.code(), Some(1), "{}", words(&miss));
    limit(None);
    put(&daemon, "after");
    assert_eq!(generation(&daemon, "before"), 3);
    let daemon = Daemon::start_in(daemon.kill(), &[]);
    assert_eq!(generation(&daemon, "before"), 4);
    assert_eq!(generation(&daemon, "after"), 2);
}

#[test]
fn a_trace_in_two_parts_hits_as_one_in_one_piece() {
    let ratio = |parts: &[&str]| {
        let daemon = Daemon::start(&["--nvme-bytes", "64MiB", "--clock", "client"]);
        let trace = chat_trace(daemon.directory.path(), 5, 60);
        let (mut hits, mut tokens, mut requests) = (0, 0, 0);
        for part in parts {
            let report = daemon.ask(&[
                "replay",
                trace.to_str().unwrap(),
                "--block-bytes",
                "16KiB",
                "--virtual-time",
                "--requests",
                part,
            ]);
            assert_eq!(report["wrong_bytes"], 0, "{report:#}");
            hits += report["hit_tokens"].as_u64().unwrap();
            tokens += report["input_tokens"].as_u64().unwrap();
            requests += report["requests"].as_u64().unwrap();
        }
        (requests, tokens, hits)
    };
    let whole = ratio(&["0.."]);
    assert!(whole.2 > 0, "{whole:?}");
    let (requests, tokens, hits) = ratio(&["..100", "100..101", "101.."]);
    assert_eq!((requests, tokens), (whole.0, whole.1));
    let difference = hits.abs_diff(whole.2) as f64 / whole.1 as f64;
    assert!(difference < 0.01, "{hits} of {tokens} against {}", whole.2);
}

#[test]
fn a_flushed_trace_hits_after_kill_9_as_if_nothing_had_happened() {
    let flags = ["--nvme-bytes", "64MiB", "--clock", "client"];
    let part = |daemon: &Daemon, trace: &Path, range: &str| {
        let report = daemon.ask(&[
            "replay",
            trace.to_str().unwrap(),
            "--block-bytes",
            "16KiB",
            "--virtual-time",
            "--requests",
            range,
        ]);
        assert_eq!(report["wrong_bytes"], 0, "{report:#}");
        report
    };
    let ratio = |report: &Value| report["prefix_hit_token_ratio"].as_f64().unwrap();
    let daemon = Daemon::start(&flags);
    let trace = chat_trace(daemon.directory.path(), 5, 60);
    part(&daemon, &trace, "..150");
    let without = part(&daemon, &trace, "150..");

    let daemon = Daemon::start(&flags);
    let trace = chat_trace(daemon.directory.path(), 5, 60);
    part(&daemon, &trace, "..150");
    assert_eq!(daemon.ask(&["flush"])["left_out"], 0);
    let blocks = daemon.count("blocks");
    let daemon = Daemon::start_in(daemon.kill(), &flags);
    assert_eq!(daemon.count("restored_blocks"), blocks);
    let with = part(&daemon, &trace, "150..");
    assert!(ratio(&without) > 0.2, "{without:#}");
    assert!(
        (ratio(&with) - ratio(&without)).abs() < 0.01,
        "{} with a restart, {} without",
        ratio(&with),
        ratio(&without)
    );
}

/// Whether any file under a directory holds these bytes.
fn holds(directory: &Path, bytes: &[u8]) -> bool {
    fs::read_dir(directory).unwrap().any(|entry| {
        let content = fs::read(entry.unwrap().path()).unwrap();
        content.windows(bytes.len()).any(|window| window == bytes)
    })
}

#[test]
fn a_known_block_lies_in_the_segment_files_only_without_encryption() {
    let secret = b"the quick brown fox, in clear".repeat(400);
    for (encryption, found) in [("aes-256-gcm", false), ("none", true)] {
        let flags = [NVME[0], NVME[1], "--encryption", encryption];
        let daemon = Daemon::start(&flags);
        let block = daemon.directory.path().join("block");
        fs::write(&block, &secret).unwrap();
        let put = daemon.ask(&["--namespace", "n", "put", "key", block.to_str().unwrap()]);
        let digits = put["key"].as_str().unwrap().to_owned();
        let hash: Vec<u8> = (0..32)
            .step_by(2)
            .map(|place| u8::from_str_radix(&digits[place..place + 2], 16).unwrap())
            .collect();
        daemon.ask(&["flush"]);
        let daemon = Daemon::start_in(daemon.kill(), &flags);
        let nvme = daemon.state().join("nvme");
        assert_eq!(holds(&nvme, &secret[..100]), found, "{encryption}");
        assert!(!holds(&nvme, &hash), "what names a block is sealed always");
        let got = daemon
            .kvctl()
            .args(["--namespace", "n", "get", "key"])
            .output()
            .unwrap();
        assert!(got.status.success() && got.stdout == secret, "{}", words(&got));
    }
    // What one setting wrote the other reads.
    let daemon = Daemon::start(&[NVME[0], NVME[1], "--encryption", "none"]);
    put(&daemon, "n");
    daemon.ask(&["flush"]);
    let daemon = Daemon::start_in(daemon.kill(), &NVME);
    let got = daemon
        .kvctl()
        .args(["--namespace", "n", "get", "key"])
        .output()
        .unwrap();
    assert!(got.status.success() && got.stdout == [3; 10_000], "{}", words(&got));
}

#[test]
fn a_rotated_master_key_still_opens_what_was_flushed_before() {
    let daemon = Daemon::start(&NVME);
    put(&daemon, "n");
    daemon.ask(&["flush"]);
    let state = daemon.state();
    let directory = daemon.kill();
    let segments = || {
        let mut files: Vec<_> = fs::read_dir(state.join("nvme"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "kvs"))
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .collect();
        files.sort();
        files
    };
    let before = segments();
    let output = rotate(&state, &[]);
    assert!(output.status.success(), "{}", words(&output));
    assert!(!before.is_empty() && segments() == before, "no data are touched");
    let daemon = Daemon::start_in(directory, &NVME);
    let got = daemon
        .kvctl()
        .args(["--namespace", "n", "get", "key"])
        .output()
        .unwrap();
    assert!(got.status.success() && got.stdout == [3; 10_000], "{}", words(&got));
}
