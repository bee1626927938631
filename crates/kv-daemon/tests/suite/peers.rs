//! Nodes that read each other's blocks, and what one invalidates reaching all.

mod cluster;
mod coordinator;
mod directory;
mod faults;
mod full;
mod net;
mod rdma;
mod secure;
mod weighed;

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::daemon::{self, Daemon, PATIENCE, words};

const BLOCK_BYTES: usize = 300_000;

/// A member to be: where it is reached, and what all members have in common.
pub(crate) struct Plan {
    pub(crate) addresses: Vec<String>,
    pub(crate) flags: Vec<String>,
    secret: tempfile::NamedTempFile,
}

impl Plan {
    /// Members on this machine's loopback.
    pub(crate) fn on_loopback(members: usize) -> Plan {
        let ports: Vec<TcpListener> = (0..members)
            .map(|_| TcpListener::bind("127.0.0.1:0").expect("a port"))
            .collect();
        Plan::of(
            ports
                .iter()
                .map(|port| port.local_addr().expect("bound").to_string())
                .collect(),
        )
    }

    pub(crate) fn of(addresses: Vec<String>) -> Plan {
        let secret = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(secret.path(), "a secret of sixteen bytes and more\n").expect("written");
        Plan {
            addresses,
            flags: Vec::new(),
            secret,
        }
    }

    pub(crate) fn with(mut self, flags: &[&str]) -> Plan {
        self.flags.extend(flags.iter().map(|flag| (*flag).to_owned()));
        self
    }

    pub(crate) fn flags_of(&self, member: usize) -> Vec<String> {
        let mut flags: Vec<String> = [
            "--peer-listen",
            &self.addresses[member],
            "--peer-address",
            &self.addresses[member],
            "--peers",
            &self.addresses.join(","),
            "--peer-secret-file",
            &self.secret.path().display().to_string(),
        ]
        .map(str::to_owned)
        .to_vec();
        flags.extend(self.flags.iter().cloned());
        flags
    }

    pub(crate) fn settings() -> String {
        let uid = rustix::process::geteuid().as_raw();
        format!("[[domains]]\nname = \"team\"\nuids = [{uid}]\n")
    }

    pub(crate) fn start(&self, member: usize) -> Daemon {
        self.start_in(member, daemon::directory())
    }

    pub(crate) fn start_in(&self, member: usize, directory: tempfile::TempDir) -> Daemon {
        let flags = self.flags_of(member);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        Daemon::start_in_with(directory, &flags, &Plan::settings())
    }

    /// All of them, once each has reached each.
    pub(crate) fn start_all(&self) -> Vec<Daemon> {
        let daemons: Vec<Daemon> = (0..self.addresses.len()).map(|member| self.start(member)).collect();
        for daemon in &daemons {
            await_connected(daemon, self.addresses.len() - 1);
        }
        daemons
    }
}

pub(crate) fn cluster_of(daemon: &Daemon) -> Value {
    daemon.ask(&["peers"])
}

/// Peers that are connected now.
pub(crate) fn connected(daemon: &Daemon) -> usize {
    let cluster = cluster_of(daemon);
    let peers = cluster["peers"].as_array().expect("a list").clone();
    peers.iter().filter(|peer| peer["state"] == "connected").count()
}

pub(crate) fn await_connected(daemon: &Daemon, count: usize) {
    until("peers are connected", || connected(daemon) == count);
}

pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A number that the node says of one peer, all peers together.
pub(crate) fn sum_of_peers(daemon: &Daemon, field: &str) -> u64 {
    let cluster = cluster_of(daemon);
    let peers = cluster["peers"].as_array().expect("a list");
    peers.iter().map(|peer| peer[field].as_u64().expect("a number")).sum()
}

pub(crate) fn bytes_of(key: &str) -> Vec<u8> {
    key.bytes()
        .cycle()
        .enumerate()
        .map(|(at, byte)| byte ^ (at / 251) as u8)
        .take(BLOCK_BYTES)
        .collect()
}

pub(crate) fn put(daemon: &Daemon, key: &str) {
    let file: PathBuf = daemon.directory.path().join("block");
    std::fs::write(&file, bytes_of(key)).expect("written");
    let put = daemon.ask(&["put", key, &file.display().to_string(), "--tokens", "16"]);
    assert!(put["outcome"] == "published" || put["outcome"] == "present", "{put}");
}

/// The tier where the block was found, after its bytes were compared; `None` for a miss.
pub(crate) fn get(daemon: &Daemon, key: &str) -> Option<String> {
    let file = daemon.directory.path().join("got");
    let _ = std::fs::remove_file(&file);
    let output: Output = daemon
        .kvctl()
        .args(["--json", "get", key, "--output"])
        .arg(&file)
        .output()
        .expect("kvctl runs");
    match output.status.code() {
        Some(0) => {
            assert!(
                std::fs::read(&file).expect("written") == bytes_of(key),
                "{key}: wrong bytes"
            );
            let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            Some(answer["tier"].as_str().expect("a tier").to_owned())
        }
        Some(1) => None,
        _ => panic!("get {key}: {}", words(&output)),
    }
}

/// `kvctl purge team/default`, with these arguments.
pub(crate) fn purge(daemon: &Daemon, arguments: &[&str]) -> Output {
    let mut kvctl = daemon.kvctl();
    kvctl
        .args(["--json", "purge", "team/default", "--state-dir"])
        .arg(daemon.state());
    kvctl.args(arguments).output().expect("kvctl runs")
}

/// Every receipt that the daemon has signed for a purge, oldest first.
pub(crate) fn receipts(daemon: &Daemon, purge: &str) -> Vec<Value> {
    let chain = std::fs::read_to_string(daemon.state().join("receipts/chain.jsonl")).unwrap_or_default();
    // A line without its end is not there yet: whoever is killed now has given it to nobody, and forgets it.
    let whole = chain.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let lines = whole.filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|entry| entry["purge"] == purge).collect()
}

#[test]
fn a_block_of_one_node_is_read_by_a_client_of_the_other() {
    let plan = Plan::on_loopback(2);
    let nodes = plan.start_all();
    put(&nodes[0], "shared");
    let exists = nodes[1].ask(&["exists", "shared"]);
    assert!(exists.to_string().contains("remote"), "{exists}");
    assert_eq!(get(&nodes[1], "shared").as_deref(), Some("remote"));
    // It is a block of its own now.
    assert_eq!(get(&nodes[1], "shared").as_deref(), Some("host"));
    assert_eq!(sum_of_peers(&nodes[1], "blocks"), 1);
    assert_eq!(sum_of_peers(&nodes[1], "bytes"), BLOCK_BYTES as u64);
    let cluster = cluster_of(&nodes[1]);
    assert_eq!(cluster["peers"][0]["transport"], "tcp", "{cluster}");
    let moved: u64 = cluster["peers"][0]["rails"]
        .as_array()
        .expect("rails")
        .iter()
        .map(|rail| rail["bytes"].as_u64().expect("a number"))
        .sum();
    assert!(moved >= BLOCK_BYTES as u64, "{cluster}");
    assert_eq!(cluster_of(&nodes[0])["leased_blocks"], 1);
    let (_, metrics) = nodes[1].http("GET", "/metrics");
    for name in ["kvtier_peer_read_blocks_total{", "kvtier_peer_rail_bytes_total{"] {
        let line = metrics.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in {metrics}"));
        assert!(line.contains("transport=\"tcp\""), "{line}");
    }
    // Leases were given back; nothing is held on either side.
    nodes[0].settle();
    nodes[1].settle();
}

#[test]
fn many_keys_are_read_in_one_trip_and_from_whoever_has_them() {
    let plan = Plan::on_loopback(3);
    let nodes = plan.start_all();
    for key in ["a", "b"] {
        put(&nodes[0], key);
    }
    put(&nodes[1], "c");
    for key in ["a", "b", "c"] {
        assert_eq!(get(&nodes[2], key).as_deref(), Some("remote"), "{key}");
    }
    assert_eq!(get(&nodes[2], "nobody's"), None);
    let cluster = cluster_of(&nodes[2]);
    let blocks = |address: &str| {
        let peers = cluster["peers"].as_array().expect("a list");
        let peer = peers.iter().find(|peer| peer["address"] == address).expect("listed");
        peer["blocks"].as_u64().expect("a number")
    };
    assert_eq!((blocks(&plan.addresses[0]), blocks(&plan.addresses[1])), (2, 1));
}

#[test]
fn what_is_put_is_summed_before_a_peer_asks_unless_the_settings_say_not() {
    let summed = |node: &Daemon| cluster_of(node)["summed_ahead"].as_u64().expect("a number");
    let nodes = Plan::on_loopback(2).start_all();
    put(&nodes[0], "large");
    let until = Instant::now() + PATIENCE;
    while summed(&nodes[0]) < 1 {
        assert!(Instant::now() < until, "nobody sums");
        std::thread::sleep(Duration::from_millis(10));
    }
    // Not a use of it, and nothing is held.
    nodes[0].settle();
    let (_, metrics) = nodes[0].http("GET", "/metrics");
    assert!(metrics.contains("\nkvtier_fetch_hits_host_total 0\n"), "{metrics}");
    assert!(get(&nodes[1], "large").is_some());
    // What was copied from a peer came with its checksum.
    assert_eq!((summed(&nodes[0]), summed(&nodes[1])), (1, 0));
    let plan = Plan::on_loopback(2);
    let settings = format!("peer_sums_ahead = false\n{}", Plan::settings());
    let start = |member| {
        let flags = plan.flags_of(member);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        Daemon::start_in_with(daemon::directory(), &flags, &settings)
    };
    let later = [start(0), start(1)];
    await_connected(&later[1], 1);
    put(&later[0], "large");
    assert!(get(&later[1], "large").is_some());
    assert_eq!(summed(&later[0]), 0);
}

#[test]
fn a_block_on_a_peers_nvme_is_promoted_there_and_read() {
    let plan = Plan::on_loopback(2).with(&["--nvme-bytes", "64MiB", "--peer-transport", "tcp"]);
    let nodes = plan.start_all();
    // More than fits its host memory.
    let keys: Vec<String> = (0..80).map(|number| format!("key {number}")).collect();
    for key in &keys {
        put(&nodes[0], key);
    }
    let remote = keys.iter().filter(|key| get(&nodes[1], key).is_some()).count();
    assert!(remote > 60, "{remote} of {} were read", keys.len());
    assert!(nodes[0].count("promotions") > 0);
}

#[test]
fn domains_of_users_and_unknown_names_are_shared_with_nobody() {
    let plan = Plan::on_loopback(2);
    let flags = |member| plan.flags_of(member);
    let start = |member| {
        let flags: Vec<String> = flags(member);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        // Without a domain in the settings: the user's own, `uid-N`.
        Daemon::start(&flags)
    };
    let nodes = [start(0), start(1)];
    await_connected(&nodes[0], 1);
    await_connected(&nodes[1], 1);
    put(&nodes[0], "own");
    assert_eq!(get(&nodes[1], "own"), None);
    assert_eq!(cluster_of(&nodes[0])["leased_blocks"], 0);
}

#[test]
fn who_does_not_know_the_secret_is_refused_and_said_so() {
    let plan = Plan::on_loopback(2);
    let other = Plan::of(plan.addresses.clone());
    std::fs::write(other.secret.path(), "another secret of sixteen bytes\n").expect("written");
    let nodes = [plan.start(0), other.start(1)];
    put(&nodes[0], "hidden");
    until("the refusal is seen", || {
        let cluster = cluster_of(&nodes[1]);
        cluster["peers"][0]["trouble"]
            .as_str()
            .is_some_and(|trouble| trouble.contains("secret"))
    });
    assert_eq!(get(&nodes[1], "hidden"), None);
}

#[test]
fn settings_that_cannot_be_are_refused_with_the_remedy() {
    for (flags, remedy) in [
        (&["--peer-listen", "0.0.0.0:7411"][..], "peer_secret_file"),
        // Other users of this machine reach loopback.
        (&["--peer-listen", "127.0.0.1:0"][..], "peer_secret_file"),
        (&["--peers", "10.0.0.1:7411"][..], "peer_listen"),
        (
            &[
                "--peer-listen",
                "127.0.0.1:0",
                "--peer-secret-file",
                "/nowhere",
                "--peer-tls-certificate-file",
                "/certificate",
            ][..],
            "peer_tls_ca_file together",
        ),
        (
            &[
                "--peer-listen",
                "127.0.0.1:0",
                "--peer-secret-file",
                "/nowhere",
                "--peers",
                "nonsense",
            ][..],
            "HOST:PORT",
        ),
        (
            &[
                "--peer-listen",
                "127.0.0.1:0",
                "--peer-secret-file",
                "/nowhere",
                "--peer-address",
                "a:1",
                "--peers",
                "a:1,b:1",
                "--cluster-fence",
            ][..],
            "three members",
        ),
    ] {
        let refused = Daemon::try_start(flags, "").map(drop).expect_err("refused");
        assert!(refused.contains(remedy), "{flags:?}: {refused}");
        assert!(refused.contains("78"), "{flags:?}: {refused}");
    }
}

#[test]
fn what_is_not_worth_fetching_is_a_miss_and_what_is_is_fetched() {
    let settings = |kv_bytes: u64, gate: &str| {
        format!(
            "cost_model = \"llama-3.1-405b\"\ncost_gpu = \"l40s\"\nkv_bytes_per_token = {kv_bytes}\npeer_gate = {gate:?}\n{}",
            Plan::settings()
        )
    };
    let plan = Plan::on_loopback(4);
    let flags: Vec<Vec<String>> = (0..4).map(|member| plan.flags_of(member)).collect();
    let start = |member: usize, settings: &str| {
        let flags: Vec<&str> = flags[member].iter().map(String::as_str).collect();
        Daemon::start_with(&flags, settings)
    };
    // A token of 64 MiB takes longer to move than 405 B parameters take to meet it; one of 1 KiB does not.
    let holder = start(0, &settings(1 << 10, "auto"));
    let dear = start(1, &settings(64 << 20, "on"));
    let cheap = start(2, &settings(1 << 10, "auto"));
    let off = start(3, &settings(1 << 10, "off"));
    for node in [&holder, &dear, &cheap, &off] {
        await_connected(node, 3);
    }
    put(&holder, "weighed");
    // Nothing is fetched before a probe has shown how fast the peer is, and that asking it pays.
    until("asking pays", || get(&cheap, "weighed").is_some());
    let cluster = cluster_of(&cheap);
    assert!(cluster["decisions_fetch"].as_u64().expect("a number") > 0, "{cluster}");
    let peers = cluster["peers"].as_array().expect("a list");
    assert!(
        peers
            .iter()
            .any(|peer| peer["gate"].as_str().expect("text").starts_with("open")),
        "{cluster}"
    );
    assert!(
        cluster.to_string().contains("fetching is expected to be faster"),
        "{cluster}"
    );
    for node in [&dear, &off] {
        let exists = node
            .kvctl()
            .args(["--json", "exists", "weighed"])
            .output()
            .expect("kvctl runs");
        assert_eq!(exists.status.code(), Some(1), "{}", words(&exists));
        assert_eq!(get(node, "weighed"), None);
        assert_eq!(sum_of_peers(node, "blocks"), 0);
    }
    let weighed = cluster_of(&dear);
    assert!(
        weighed["decisions_recompute"].as_u64().expect("a number") > 0,
        "{weighed}"
    );
    assert!(
        weighed.to_string().contains("recomputing is expected to be faster"),
        "{weighed}"
    );
}
