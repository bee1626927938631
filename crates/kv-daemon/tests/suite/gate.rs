//! `kvctl simulate` and `kvctl replay-gate`: traces judged without a daemon.

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;
use tempfile::TempDir;

use crate::daemon::{Daemon, command, directory, words};

/// A chat workload of the project's own, by its own command.
fn workload(directory: &TempDir, sessions: u32) -> PathBuf {
    let path = directory.path().join("chat.jsonl");
    let output = kvctl(&[
        "workload",
        "--sessions",
        &sessions.to_string(),
        "--output",
        path.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", words(&output));
    path
}

fn kvctl(arguments: &[&str]) -> Output {
    command("kvctl").args(arguments).output().expect("kvctl runs")
}

fn gate(trace: &Path, report: &Path, more: &[&str]) -> Output {
    let mut arguments = vec!["--json", "replay-gate", trace.to_str().unwrap(), "--resamples", "200"];
    arguments.extend(["--report", report.to_str().unwrap()]);
    arguments.extend(more);
    kvctl(&arguments)
}

fn answer(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", words(output)))
}

fn verdict<'a>(report: &'a Value, option: &str) -> &'a str {
    let options = report["options"].as_array().unwrap();
    let found = options.iter().find(|row| row["option"] == option);
    found.unwrap_or_else(|| panic!("no option {option}"))["verdict"]
        .as_str()
        .unwrap()
}

#[test]
fn policies_are_compared_on_a_generated_trace_and_none_beats_the_one_that_knows_the_future() {
    let directory = directory();
    let trace = workload(&directory, 120);
    let name = trace.to_str().unwrap();
    let output = kvctl(&[
        "simulate",
        name,
        "--policy",
        "all",
        "--capacity",
        "2%,25%,100%",
        "--json",
    ]);
    assert!(output.status.success(), "{}", words(&output));
    let rows = answer(&output);
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 9 * 3);
    let ratio = |policy: &str, capacity: &str| {
        let row = rows
            .iter()
            .find(|row| row["policy"] == policy && row["capacity"] == capacity);
        row.unwrap()["prefix_hit_token_ratio"].as_f64().unwrap()
    };
    for row in rows {
        assert_eq!(row["trace"], name);
        let (policy, capacity) = (row["policy"].as_str().unwrap(), row["capacity"].as_str().unwrap());
        assert!(ratio(policy, capacity) <= ratio("opt", capacity) + 1e-12, "{row}");
        assert!(row["block_hit_ratio"].as_f64().unwrap() <= 1.0, "{row}");
    }
    assert!(ratio("opt", "2%") < ratio("opt", "25%"));
    assert_eq!(
        ratio("lru", "100%"),
        ratio("opt", "100%"),
        "where everything fits nothing is chosen"
    );
    let table = kvctl(&["simulate", name, "--capacity", "25%"]);
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.contains("hazard") && table.contains("lru") && table.contains("25%"),
        "{table}"
    );
}

#[test]
fn bad_lines_of_a_trace_are_named_and_too_many_end_it() {
    let directory = directory();
    let trace = workload(&directory, 120);
    let text = std::fs::read_to_string(&trace).unwrap();
    let broken = directory.path().join("broken.jsonl");
    let (first, rest) = text.split_once('\n').unwrap();
    std::fs::write(&broken, format!("{first}\nnot a request\n{rest}")).unwrap();
    let name = broken.to_str().unwrap();
    let page = directory.path().join("gate.html");
    let commands: [&[&str]; 2] = [
        &["simulate", name, "--policy", "lru", "--capacity", "5%"],
        &[
            "replay-gate",
            name,
            "--profile",
            "llama-3.1-8b/h100",
            "--report",
            page.to_str().unwrap(),
        ],
    ];
    for arguments in commands {
        let output = kvctl(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(errors.contains("skipped line 2"), "{errors}");
        assert_ne!(output.status.code(), Some(65), "{errors}");
        let strict = command("kvctl")
            .args(arguments)
            .args(["--bad-lines-max", "0"])
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&strict.stderr).into_owned();
        assert_eq!(strict.status.code(), Some(65), "{errors}");
        assert!(
            errors.contains("line 2") && errors.contains("--bad-lines-max 0"),
            "{errors}"
        );
    }
}

#[test]
fn traffic_with_reuse_passes_the_gate_and_its_settings_start_a_daemon() {
    let directory = directory();
    let trace = workload(&directory, 300);
    let page = directory.path().join("gate.html");
    let output = gate(&trace, &page, &["--profile", "llama-3.3-70b/4xh100"]);
    assert_eq!(output.status.code(), Some(0), "{}", words(&output));
    let report = answer(&output);
    assert_eq!(report["verdict"], "worth_enabling");
    assert_eq!(verdict(&report, "host"), "worth_enabling");
    assert_eq!(verdict(&report, "peer"), "worth_enabling");
    assert_eq!(verdict(&report, "s3"), "not_worth_enabling");
    for input in report["inputs"].as_array().unwrap() {
        assert_eq!(input["sha256"].as_str().unwrap().len(), 64, "{input}");
    }
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.starts_with("<!doctype html>") && html.trim_end().ends_with("</html>"));
    assert!(html.contains("Worth enabling") && html.contains("<svg"));
    for fetched in ["<script", "http:", "https:", "src=", "@import"] {
        assert!(!html.contains(fetched), "{fetched}");
    }
    let again = gate(&trace, &page, &["--profile", "llama-3.3-70b/4xh100"]);
    assert_eq!(again.stdout, output.stdout, "the same inputs give the same report");
    assert_eq!(std::fs::read_to_string(&page).unwrap(), html);

    // As large as a test may be, and otherwise as they were written.
    let settings = report["settings"].as_str().unwrap();
    let small: String = settings
        .lines()
        .map(|line| match line.split_once(" = ") {
            Some((name @ ("host_bytes" | "nvme_bytes"), bytes)) if bytes != "0" => format!("{name} = {}\n", 64 << 20),
            _ => format!("{line}\n"),
        })
        .collect();
    assert!(
        small.contains("host_bytes") && small.contains("eviction_policy = \"hazard\""),
        "{settings}"
    );
    let daemon = Daemon::start_with(&[], &small);
    daemon.settle();

    // Signed with that daemon's key, while it runs.
    let (state, keys) = (daemon.state(), daemon.state().join("receipts/keys.json"));
    let signed = [
        "--profile",
        "llama-3.3-70b/4xh100",
        "--sign-with",
        state.to_str().unwrap(),
    ];
    let line = gate(&trace, &page, &signed).stdout;
    let file = directory.path().join("signed.json");
    let verify = |line: &[u8]| {
        std::fs::write(&file, line).unwrap();
        let verify = [
            "--json",
            "receipt",
            "verify",
            "--report",
            file.to_str().unwrap(),
            "--keys",
        ];
        let output = command("kvctl").args(verify).arg(&keys).output().unwrap();
        (output.status.code(), answer(&output))
    };
    let (code, checked) = verify(&line);
    assert_eq!(code, Some(0), "{checked:#}");
    assert_eq!(checked["lines"][0]["object"], "replay_gate_report");
    let claimed = String::from_utf8(line)
        .unwrap()
        .replace("not_worth_enabling", "worth_enabling");
    assert_eq!(verify(claimed.as_bytes()).0, Some(65));

    let as_receipt = [
        "receipt",
        "verify",
        file.to_str().unwrap(),
        "--keys",
        keys.to_str().unwrap(),
    ];
    assert_eq!(kvctl(&as_receipt).status.code(), Some(65), "a report is no receipt");

    let text = command("kvctl")
        .args([
            "replay-gate",
            trace.to_str().unwrap(),
            "--report",
            page.to_str().unwrap(),
        ])
        .args(signed)
        .output()
        .unwrap();
    assert_eq!(text.status.code(), Some(64), "it is the JSON that is signed");
    let nowhere = gate(
        &trace,
        &page,
        &["--profile", "llama-3.1-8b/h100", "--sign-with", "/proc"],
    );
    assert_eq!(nowhere.status.code(), Some(78), "{}", words(&nowhere));
}

#[test]
fn traffic_without_reuse_fails_and_fifty_requests_are_not_enough() {
    let directory = directory();
    let line = |number: u64| {
        let ids: Vec<String> = (0..8).map(|block| (number * 8 + block).to_string()).collect();
        format!(
            "{{\"timestamp\": {}, \"input_length\": 4096, \"output_length\": 9, \"hash_ids\": [{}]}}\n",
            number * 900,
            ids.join(",")
        )
    };
    let page = directory.path().join("gate.html");
    for (requests, code, expected) in [(600, 1, "not_worth_enabling"), (50, 75, "insufficient_evidence")] {
        let trace = directory.path().join("alone.jsonl");
        std::fs::write(&trace, (0..requests).map(line).collect::<String>()).unwrap();
        for baseline in ["recompute", "lru-host"] {
            let more = [
                "--profile",
                "llama-3.1-8b/h100",
                "--hardware",
                "busy",
                "--baseline",
                baseline,
            ];
            let output = gate(&trace, &page, &more);
            assert_eq!(output.status.code(), Some(code), "{}", words(&output));
            let report = answer(&output);
            assert_eq!(
                (&report["verdict"], &report["baseline"]),
                (&expected.into(), &baseline.into())
            );
            assert_eq!(report["settings"], "");
        }
    }
}

#[test]
fn a_profile_and_hardware_of_ones_own_are_files_and_hostile_names_in_them_are_text() {
    let directory = directory();
    let trace = workload(&directory, 120);
    let page = directory.path().join("gate.html");
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    let profile = write(
        "profile.toml",
        "name = \"<script>alert(1)</script>\"\nmodel = \"qwen3-8b\"\ngpu = \"l40s\"\nutilization = 0.4\n",
    );
    let hardware = write(
        "hardware.toml",
        "[host]\ngib = 64\ngb_per_s = 20\n[[remote]]\nname = \"<img src=x onerror=y>\\u001b[31m\"\ngb_per_s = 20\nlatency_ms = 1\n\
         [prices]\ncurrency = \"EUR\"\ngpu_hour = 2\nhost_gib_month = 3\n",
    );
    let chosen = ["--profile", &profile, "--hardware", &hardware];
    let output = gate(&trace, &page, &chosen);
    assert!(matches!(output.status.code(), Some(0 | 1 | 75)), "{}", words(&output));
    let report = answer(&output);
    assert_eq!(report["profile"], "<script>alert(1)</script>");
    assert!(report["options"][0]["cost_per_day"]["before"].as_f64().unwrap() > 0.0);
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(!html.contains("<script") && !html.contains("<img") && !html.contains('\u{1b}'));
    assert!(html.contains("&lt;script&gt;alert(1)"));
    let arguments = [
        "replay-gate",
        trace.to_str().unwrap(),
        "--report",
        page.to_str().unwrap(),
    ];
    let output = command("kvctl").args(arguments).args(chosen).output().unwrap();
    assert!(!output.stdout.contains(&0x1b), "{}", words(&output));
}

#[test]
fn what_cannot_be_read_or_written_is_said_with_its_code() {
    let directory = directory();
    let trace = workload(&directory, 20);
    let trace = trace.to_str().unwrap();
    let page = directory.path().join("gate.html");
    let page = page.to_str().unwrap();
    let bad = directory.path().join("bad.toml");
    std::fs::write(&bad, "[host]\ngib = 0.5\ngb_per_s = 40\n").unwrap();
    let bad = bad.to_str().unwrap();
    let preset = "llama-3.3-70b/4xh100";
    for (arguments, code, word) in [
        (
            vec![trace, "--profile", "nobody/h100", "--report", page],
            66,
            "llama-3.1-8b",
        ),
        (vec![trace, "--profile", bad, "--report", page], 65, "host"),
        (
            vec![trace, "--profile", preset, "--hardware", bad, "--report", page],
            65,
            "host.gib = 0.5",
        ),
        (
            vec![trace, "--profile", preset, "--hardware", "/nowhere", "--report", page],
            66,
            "idle, busy",
        ),
        (
            vec![trace, "--profile", preset, "--report", "/nowhere/gate.html"],
            73,
            "/nowhere",
        ),
        (vec!["/nowhere", "--profile", preset, "--report", page], 66, "/nowhere"),
        (
            vec!["/dev/null", "--profile", preset, "--report", page],
            65,
            "no request",
        ),
        (vec![trace, "--profile", preset], 64, "--report"),
        (
            vec![trace, "--profile", preset, "--baseline", "luck", "--report", page],
            64,
            "lru-host",
        ),
    ] {
        let output = command("kvctl").arg("replay-gate").args(&arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", words(&output));
        assert!(words(&output).contains(word), "{arguments:?}: {}", words(&output));
    }
}
