//! What the daemon does with its settings before it serves.

use std::process::Output;

use crate::daemon::{command, directory, words};

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    command("kv-daemon")
        .args(arguments)
        .envs(environment.iter().copied())
        .output()
        .expect("kv-daemon runs")
}

#[test]
fn a_setting_that_cannot_be_ends_with_78_and_names_field_value_place_and_remedy() {
    for (arguments, environment, expected) in [
        (
            &["serve", "--host-bytes", "lots"][..],
            &[][..],
            &["host_bytes", "lots", "--host-bytes", "64MiB"][..],
        ),
        (
            &["serve"],
            &[("KVTIER_NVME_ENGINE", "warp")],
            &["nvme_engine", "warp", "KVTIER_NVME_ENGINE", "threads"],
        ),
        (
            &["serve", "--http", "0.0.0.0:80"],
            &[],
            &["http", "0.0.0.0:80", "loopback", "TLS"],
        ),
        (&["serve", "--socket-mode", "9"], &[], &["socket_mode", "octal"]),
        (
            &["serve", "--host-bytes", "1MiB"],
            &[],
            &["host_bytes", "1048576", "8 MiB"],
        ),
        (
            &["serve", "--config", "/nowhere/at.toml"],
            &[],
            &["config", "/nowhere/at.toml", "no such file"],
        ),
    ] {
        let output = run(arguments, environment);
        assert_eq!(output.status.code(), Some(78), "{arguments:?}: {}", words(&output));
        let said = String::from_utf8_lossy(&output.stderr);
        for word in expected {
            assert!(said.contains(word), "{arguments:?} does not say {word:?}: {said}");
        }
    }
}

#[test]
fn a_wrong_command_line_ends_with_64() {
    for arguments in [
        &["serve", "--no-such-flag"][..],
        &["no-such-command"],
        &["completion", "klingon"],
    ] {
        let output = run(arguments, &[]);
        assert_eq!(output.status.code(), Some(64), "{}", words(&output));
    }
    let output = command("kvctl").arg("frobnicate").output().unwrap();
    assert_eq!(output.status.code(), Some(64), "{}", words(&output));
}

#[test]
fn the_effective_settings_are_a_file_that_reads_back() {
    let directory = directory();
    let state = directory.path().join("state");
    let arguments = [
        "settings",
        "--host-bytes",
        "64MiB",
        "--state-dir",
        state.to_str().unwrap(),
    ];
    let first = run(&arguments, &[("KVTIER_LEASE_TTL_MS", "1234")]);
    assert!(first.status.success(), "{}", words(&first));
    let file = directory.path().join("read-back.toml");
    std::fs::write(&file, &first.stdout).unwrap();
    let again = run(&["settings", "--json", "--config", file.to_str().unwrap()], &[]);
    assert!(again.status.success(), "{}", words(&again));
    let settings: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(settings["host_bytes"], 64 << 20);
    assert_eq!(settings["lease_ttl_ms"], 1234);
    assert!(!state.exists(), "printing settings makes nothing");
}

#[test]
fn a_state_directory_that_cannot_be_made_ends_with_73() {
    let directory = directory();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = run(
        &[
            "serve",
            "--http",
            "off",
            "--state-dir",
            file.join("state").to_str().unwrap(),
        ],
        &[],
    );
    assert_eq!(output.status.code(), Some(73), "{}", words(&output));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("state_dir"),
        "{}",
        words(&output)
    );
}

#[test]
fn both_binaries_have_a_version_help_and_completions() {
    for name in ["kv-daemon", "kvctl"] {
        for arguments in [
            &["--version"][..],
            &["--help"],
            &["completion", "bash"],
            &["completion", "zsh"],
            &["completion", "fish"],
        ] {
            let output = command(name).args(arguments).output().unwrap();
            assert!(
                output.status.success() && !output.stdout.is_empty(),
                "{name} {arguments:?}: {}",
                words(&output)
            );
        }
    }
}
