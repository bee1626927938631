//! The admin server and the life of the daemon.

use std::os::unix::net::UnixDatagram;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::daemon::{Daemon, PATIENCE, command, words};
use kvtier::client::blocking::{Client, Namespace};
use kvtier::client::{BlockHandle, ClientOptions, FetchScope, Lineage, PutOutcome};
use kvtier::{BlockHash, ErrorKind, Parent, Realization};
use rustix::process::Signal;

#[test]
fn health_is_for_everyone_and_numbers_are_for_the_token() {
    let daemon = Daemon::start(&["--nvme-bytes", "16MiB"]);
    for path in ["/healthz", "/readyz"] {
        assert_eq!(daemon.http_with("GET", path, &[]).0, 200, "{path}");
    }
    for (method, path) in [
        ("GET", "/metrics"),
        ("GET", "/v1/status"),
        ("POST", "/v1/flush"),
        ("POST", "/v1/namespaces/uid-0/a/invalidate"),
        ("POST", "/v1/namespaces/a/invalidate"),
    ] {
        let (code, answer) = daemon.http_with(method, path, &[]);
        assert_eq!(code, 401, "{path}: {answer}");
        assert!(
            answer.contains("application/problem+json") && answer.contains("www-authenticate"),
            "{answer}"
        );
        for wrong in [
            "Bearer ",
            "Bearer 00",
            &format!("Basic {}", daemon.token()),
            &daemon.token(),
        ] {
            assert_eq!(
                daemon.http_with(method, path, &[("Authorization", wrong)]).0,
                401,
                "{path} with {wrong:?}"
            );
        }
    }
    let (code, metrics) = daemon.http("GET", "/metrics");
    assert_eq!(code, 200, "{metrics}");
    for name in [
        "kvtier_fetch_hits_host_total",
        "kvtier_host_capacity_bytes 16777216",
        "# HELP kvtier_leases ",
    ] {
        assert!(metrics.contains(name), "{name}: {metrics}");
    }
    assert_eq!(daemon.count("host_capacity_bytes"), 16 << 20);
    let (code, answer) = daemon.http("POST", "/v1/flush");
    assert_eq!(code, 200, "{answer}");
    let (_, log) = daemon.stop();
    assert!(!log.is_empty());
}

#[test]
fn what_is_not_there_is_said_as_problem_json() {
    let daemon = Daemon::start(&[]);
    for (method, path, expected) in [
        ("GET", "/nothing", 404),
        ("POST", "/v1/status", 405),
        ("GET", "/v1/flush", 405),
        ("POST", "/healthz", 405),
        ("POST", "/v1/namespaces/uid-0/never-seen/invalidate", 404),
    ] {
        let (code, answer) = daemon.http(method, path);
        assert_eq!(code, expected, "{path}: {answer}");
        assert!(answer.contains("application/problem+json"), "{path}: {answer}");
    }
    let token = format!("Bearer {}", daemon.token());
    let (code, answer) = daemon.http_with(
        "GET",
        "/v1/status",
        &[("Authorization", &token), ("Host", "evil.example:80")],
    );
    assert_eq!(code, 421, "a name that was pointed at loopback must not work: {answer}");
}

#[test]
fn the_token_is_private_and_never_logged() {
    use std::os::unix::fs::MetadataExt;
    let daemon = Daemon::start(&["--log-level", "trace", "--log-format", "json"]);
    let token = daemon.token();
    assert_eq!(token.len(), 64);
    assert_eq!(
        std::fs::metadata(daemon.state().join("admin.token")).unwrap().mode() & 0o777,
        0o600
    );
    assert_eq!(daemon.http("GET", "/v1/status").0, 200);
    let (status, log) = daemon.stop();
    assert!(status.success(), "{log}");
    assert!(!log.contains(&token), "the token is in the log");
    for line in log.lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    }
}

#[test]
fn a_second_daemon_on_the_same_directory_is_refused_and_harms_nothing() {
    let daemon = Daemon::start(&["--nvme-bytes", "16MiB"]);
    let second = command("kv-daemon")
        .args(["serve", "--http", "off", "--host-bytes", "16MiB", "--state-dir"])
        .arg(daemon.state())
        .arg("--socket")
        .arg(daemon.directory.path().join("other"))
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(73), "{}", words(&second));
    assert!(
        String::from_utf8_lossy(&second.stderr).contains("another kv-daemon"),
        "{}",
        words(&second)
    );
    let elsewhere = command("kv-daemon")
        .args(["serve", "--http", "off", "--host-bytes", "16MiB", "--state-dir"])
        .arg(daemon.directory.path().join("elsewhere"))
        .arg("--socket")
        .arg(daemon.socket())
        .output()
        .unwrap();
    assert_eq!(elsewhere.status.code(), Some(73), "{}", words(&elsewhere));
    assert!(
        String::from_utf8_lossy(&elsewhere.stderr).contains("socket"),
        "{}",
        words(&elsewhere)
    );
    assert_eq!(daemon.ask(&["status"])["state"], "serving");
}

#[test]
fn a_stop_drains_and_leaves_no_socket_and_no_address() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut daemon = Daemon::start(&["--nvme-bytes", "16MiB"]);
        let block = daemon.directory.path().join("block");
        std::fs::write(&block, vec![7; 100_000]).unwrap();
        daemon.ask(&["put", "a block", block.to_str().unwrap()]);
        let (socket, address) = (daemon.socket(), daemon.state().join("http.addr"));
        assert!(socket.exists() && address.exists());
        daemon.signal(signal);
        let status = crate::daemon::wait(&mut daemon.child);
        assert!(status.success(), "{status}");
        assert!(
            !socket.exists() && !address.exists(),
            "{signal:?} left something behind"
        );
    }
}

/// A client that holds the lease of one block, and the bytes that it must hold.
fn holder(daemon: &Daemon) -> (Namespace, BlockHandle, Vec<u8>) {
    let client = Client::connect(ClientOptions::new(daemon.socket())).unwrap();
    let namespace = client.namespace("held", Realization::digest(&[])).unwrap();
    let bytes = vec![9; 40_000];
    let hash = BlockHash([9; 16]);
    let put = namespace
        .put_from(Lineage::Chain(Parent::Root), &[(hash, &bytes[..])], 512)
        .unwrap();
    assert_eq!(put, [PutOutcome::Published]);
    let handle = namespace
        .get(&[hash], FetchScope::Each)
        .unwrap()
        .pop()
        .flatten()
        .expect("a hit");
    (namespace, handle, bytes)
}

fn wait_until_draining(daemon: &Daemon) {
    let begun = Instant::now();
    while daemon.http_with("GET", "/readyz", &[]).0 != 503 {
        assert!(begun.elapsed() < PATIENCE, "the daemon does not drain");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_drain_lets_a_reader_end_and_leases_nothing_new() {
    let mut daemon = Daemon::start(&["--nvme-bytes", "16MiB", "--drain-timeout-ms", "600000"]);
    let (namespace, handle, bytes) = holder(&daemon);
    daemon.signal(Signal::TERM);
    wait_until_draining(&daemon);
    assert_eq!(
        daemon.http_with("GET", "/healthz", &[]).0,
        200,
        "it lives as long as it drains"
    );
    let refused = namespace
        .get(&[BlockHash([9; 16])], FetchScope::Each)
        .expect_err("no new leases");
    assert_eq!(refused.kind, ErrorKind::Unavailable, "{refused}");
    let mut found = vec![0; bytes.len()];
    assert_eq!(handle.copy_to(&mut found), Ok(bytes.len()));
    assert_eq!(found, bytes, "what was leased can be read to the end");
    assert!(daemon.child.try_wait().unwrap().is_none(), "it waits for the lease");
    drop((handle, namespace));
    let status = crate::daemon::wait(&mut daemon.child);
    assert!(status.success(), "{status}");
}

#[test]
fn a_second_signal_stops_at_once_and_says_so_by_its_code() {
    let mut daemon = Daemon::start(&["--drain-timeout-ms", "600000"]);
    let (_namespace, _handle, _) = holder(&daemon);
    daemon.signal(Signal::TERM);
    wait_until_draining(&daemon);
    daemon.signal(Signal::TERM);
    let status = crate::daemon::wait(&mut daemon.child);
    assert_eq!(status.code(), Some(1), "{status}");
}

#[test]
fn systemd_hears_when_the_daemon_is_ready_and_when_it_stops() {
    let directory = crate::daemon::directory();
    let path = directory.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut daemon = command("kv-daemon")
        .args([
            "serve",
            "--http",
            "off",
            "--host-bytes",
            "16MiB",
            "--lock-memory",
            "false",
            "--state-dir",
        ])
        .arg(directory.path().join("state"))
        .env("NOTIFY_SOCKET", &path)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let hear = || {
        let mut bytes = [0; 256];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    };
    let ready = hear();
    assert!(ready.contains("READY=1"), "{ready}");
    crate::daemon::signal_process(&daemon, Signal::TERM);
    let stopping = hear();
    assert!(stopping.contains("STOPPING=1"), "{stopping}");
    assert!(crate::daemon::wait(&mut daemon).success());
}

#[test]
fn an_idle_daemon_sleeps() {
    let daemon = Daemon::start(&["--nvme-bytes", "16MiB"]);
    daemon.ask(&["status"]);
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.child.id())).unwrap();
        let fields: Vec<u64> = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split(' ')
            .filter_map(|field| field.parse().ok())
            .collect();
        // User and system time are the 14th and 15th field of the line; state and name are no numbers.
        fields[10] + fields[11]
    };
    std::thread::sleep(Duration::from_millis(300));
    let before = ticks();
    std::thread::sleep(Duration::from_secs(3));
    // A tick is 10 ms: 1 % of a core over 3 s is 3 ticks.
    assert!(
        ticks() - before <= 3,
        "{} ticks of CPU in 3 idle seconds",
        ticks() - before
    );
}

#[test]
fn without_a_daemon_kvctl_ends_with_69_and_says_what_to_do() {
    let directory = crate::daemon::directory();
    let socket = directory.path().join("nobody");
    for arguments in [&["status"][..], &["get", "key"], &["flush"]] {
        let output = command("kvctl")
            .arg("--socket")
            .arg(&socket)
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(69), "{}", words(&output));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("nobody") && said.contains("kv-daemon serve"), "{said}");
    }
}
