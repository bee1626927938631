//! The whole client measurement, small, against a node in this process.

use std::path::PathBuf;

use kvtier::node::Node;
use kvtier::settings::Settings;
use kvtier_bench::client::{Options, run};

/// Set for the process that the measurement starts as its echo server.
const ECHO_SERVER: &str = "KVTIER_BENCH_ECHO_SERVER";

/// Checks nothing by itself: it is the echo server of the other test. The last argument is the socket's path.
#[test]
fn echo_server_process() {
    if std::env::var_os(ECHO_SERVER).is_none() {
        return;
    }
    let path = std::env::args_os().next_back().map(PathBuf::from).expect("a path");
    kvtier_bench::echo_server_main(&path).expect("an echo until the other end closes");
}

fn options(socket: PathBuf) -> Options {
    let this = std::env::current_exe().expect("a path").display().to_string();
    let role = format!("{ECHO_SERVER}=1");
    Options {
        socket: Some(socket),
        echo_command: ["env", &role, &this, "--exact", "echo_server_process"]
            .map(str::to_owned)
            .to_vec(),
        quick: true,
        rounds: Some(1),
        working_set_bytes: Some(64 << 20),
        lookup_blocks: Some(1 << 13),
        ..Options::default()
    }
}

#[test]
fn a_small_run_measures_every_case_and_says_which_figures_are_met() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let settings = Settings {
        state_dir: directory.path().join("state"),
        socket: directory.path().join("k.sock"),
        host_bytes: 184 << 20,
        ..Settings::default()
    };
    let node = Node::start(settings.check().expect("settings that can be"), Box::new(|_| {})).expect("a node");
    let mut said = Vec::new();
    let rows = run(options(node.socket().to_owned()), &mut |words| {
        said.push(words.to_owned())
    })
    .unwrap_or_else(|e| panic!("{e}"));
    let count = |case: &str| rows.iter().filter(|row| row.case == case).count();
    let cases = [
        "echo",
        "memcpy",
        "get_into",
        "put_from",
        "get_in_place",
        "lookup",
        "index",
    ];
    assert_eq!(cases.map(count), [1, 8, 4, 4, 2, 2, 1], "{rows:#?}");
    for row in rows.iter().filter(|row| row.case != "index") {
        assert!(row.p50_us.is_some_and(|time| time > 0.0), "{row:?}");
        assert!(row.p99_us >= row.p50_us || row.rounds > 1, "{row:?}");
        let moves_bytes = ["memcpy", "get_into", "put_from", "get_in_place"].contains(&row.case);
        assert_eq!(row.gbps.is_some(), moves_bytes, "{row:?}");
        assert!(
            row.placement.contains("core") || row.placement.contains("not pinned"),
            "{row:?}"
        );
    }
    let verdicts = said.iter().filter(|words| words.contains("limit")).count();
    assert!(verdicts >= 10, "{said:#?}");
    let left = node.status().counters;
    assert_eq!(
        (left.leases, left.clients),
        (0, 0),
        "a finished measurement holds nothing"
    );
}

#[test]
fn a_daemon_without_room_is_refused_in_words() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let settings = Settings {
        state_dir: directory.path().join("state"),
        socket: directory.path().join("k.sock"),
        host_bytes: 8 << 20,
        ..Settings::default()
    };
    let node = Node::start(settings.check().expect("settings that can be"), Box::new(|_| {})).expect("a node");
    let error = run(options(node.socket().to_owned()), &mut |_| {}).expect_err("8 MiB are too little");
    assert!(error.to_string().contains("--host-bytes"), "{error}");
}
