//! Purges from the outside: what is left of a namespace, and what a receipt may say about it.

mod canary;
mod killed;
mod labels;
mod leases;
mod refused;
mod rollback;
mod scan;
mod scopes;
mod tenants;
mod trouble;

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use kvtier::client::blocking::{Client, Namespace};
use kvtier::client::{ClientOptions, FetchScope, Lineage, PutOutcome};
use kvtier::{BlockHash, Hints, Label, Parent, Realization};
use serde_json::Value;

use crate::daemon::{Daemon, PATIENCE, command, words};

const NVME: [&str; 2] = ["--nvme-bytes", "16MiB"];

/// A block whose bytes nobody can guess and nothing compresses.
#[derive(Clone, Debug)]
struct Block {
    hash: BlockHash,
    bytes: Vec<u8>,
}

impl Block {
    /// The same label and length give the same block.
    fn new(label: &str, length: usize) -> Block {
        let mut bytes = vec![0; length];
        let mut reader = blake3::Hasher::new().update(label.as_bytes()).finalize_xof();
        let mut hash = [0; 16];
        reader.fill(&mut hash);
        reader.fill(&mut bytes);
        Block {
            hash: BlockHash(hash),
            bytes,
        }
    }

    fn hex(&self) -> String {
        hex(&self.hash.0)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Blocks of one namespace, each extending the one before.
fn blocks(label: &str) -> Vec<Block> {
    let lengths = [4096, 10_001, 70_000];
    let block = |(index, length)| Block::new(&format!("{label} {index}"), length);
    lengths.into_iter().enumerate().map(block).collect()
}

fn realization(name: &str) -> Realization {
    Realization::digest(&[("model", name)])
}

/// A connection that holds no slots ahead: what it holds is what a test says.
fn connect(daemon: &Daemon) -> Client {
    Client::connect(options(&daemon.socket())).unwrap()
}

fn options(socket: &Path) -> ClientOptions {
    ClientOptions {
        ahead_bytes_max: 0,
        ..ClientOptions::new(socket)
    }
}

/// Puts a chain of blocks over a connection of its own.
fn put(daemon: &Daemon, name: &str, blocks: &[Block]) {
    put_as(daemon, name, realization("a model"), blocks);
}

fn put_as(daemon: &Daemon, name: &str, realization: Realization, blocks: &[Block]) {
    let client = connect(daemon);
    let namespace = client.namespace(name, realization).unwrap();
    let pairs: Vec<_> = blocks.iter().map(|block| (block.hash, &block.bytes[..])).collect();
    let outcomes = namespace.put_from(Lineage::Chain(Parent::Root), &pairs, 64).unwrap();
    assert!(
        outcomes.iter().all(|outcome| *outcome == PutOutcome::Published),
        "{outcomes:?}"
    );
    drop(namespace);
    client.goodbye().unwrap();
}

/// Puts a chain of blocks under a label behind a parent: what became of each.
fn put_under(daemon: &Daemon, name: &str, label: &str, parent: Parent, blocks: &[Block]) -> Vec<PutOutcome> {
    let client = connect(daemon);
    let namespace = client.namespace(name, realization("a model")).unwrap();
    let namespace = namespace.with_hints(Hints {
        label: Some(Label::of(label)),
        ..Hints::default()
    });
    let pairs: Vec<_> = blocks.iter().map(|block| (block.hash, &block.bytes[..])).collect();
    let outcomes = namespace.put_from(Lineage::Chain(parent), &pairs, 64).unwrap();
    drop(namespace);
    client.goodbye().unwrap();
    outcomes
}

fn read(namespace: &Namespace, block: &Block) -> Option<Vec<u8>> {
    let handle = namespace
        .get(&[block.hash], FetchScope::Each)
        .unwrap()
        .pop()
        .flatten()?;
    let mut bytes = vec![0; handle.len()];
    assert_eq!(handle.copy_to(&mut bytes), Ok(bytes.len()));
    Some(bytes)
}

/// Which of the blocks are cached; those that are must be what they were.
fn cached(daemon: &Daemon, name: &str, blocks: &[Block]) -> Vec<bool> {
    cached_as(daemon, name, realization("a model"), blocks)
}

fn cached_as(daemon: &Daemon, name: &str, realization: Realization, blocks: &[Block]) -> Vec<bool> {
    let client = connect(daemon);
    let namespace = client.namespace(name, realization).unwrap();
    let is_cached = |block: &Block| match read(&namespace, block) {
        Some(bytes) => {
            assert!(bytes == block.bytes, "wrong bytes of {}", block.hex());
            true
        }
        None => false,
    };
    let found = blocks.iter().map(is_cached).collect();
    drop(namespace);
    client.goodbye().unwrap();
    found
}

fn flush(daemon: &Daemon) {
    assert_eq!(daemon.ask(&["flush"])["left_out"], 0);
}

/// `kvctl` as an administrator has it.
fn kvctl(daemon: &Daemon) -> Command {
    let mut kvctl = command("kvctl");
    kvctl.env("KVTIER_STATE_DIR", daemon.state());
    kvctl
}

fn run(daemon: &Daemon, arguments: &[&str]) -> Output {
    kvctl(daemon).arg("--json").args(arguments).output().unwrap()
}

/// The JSON of a `kvctl` that must succeed.
fn answer(daemon: &Daemon, arguments: &[&str]) -> Value {
    let output = run(daemon, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", words(&output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", words(&output)))
}

/// Purges and waits: the receipt.
pub(crate) fn purge(daemon: &Daemon, arguments: &[&str]) -> Value {
    answer(daemon, &[&["purge", "--wait"], arguments].concat())
}

fn jobs(daemon: &Daemon) -> Vec<Value> {
    answer(daemon, &["purges"]).as_array().unwrap().clone()
}

fn namespace(daemon: &Daemon, name: &str) -> Value {
    answer(daemon, &["namespace", "show", name])
}

/// Waits until a job has a receipt.
fn await_completed(daemon: &Daemon, id: &str) -> Value {
    let begun = Instant::now();
    loop {
        let jobs = jobs(daemon);
        let job = jobs
            .iter()
            .find(|job| job["id"] == id)
            .unwrap_or_else(|| panic!("no {id}"));
        if job["state"] == "completed" {
            return job.clone();
        }
        assert!(begun.elapsed() < PATIENCE, "not completed: {job}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Every entry of the chain of receipts, after `kvctl receipt verify` found nothing wrong with it, offline.
fn verified_receipts(daemon: &Daemon) -> Vec<Value> {
    let keys = daemon.directory.path().join("keys.json");
    let (code, answer) = daemon.http("GET", "/v1/keys");
    assert_eq!(code, 200, "{answer}");
    std::fs::write(&keys, answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    let chain = daemon.state().join("receipts/chain.jsonl");
    let output = command("kvctl")
        .args(["--json", "receipt", "verify", "--keys"])
        .args([&keys, &chain])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", words(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["verified"], true, "{report}");
    let text = std::fs::read_to_string(&chain).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The one receipt of a job.
pub(crate) fn only_receipt(daemon: &Daemon, id: &str) -> Value {
    let receipts = verified_receipts(daemon);
    let mut of_job = receipts.into_iter().filter(|receipt| receipt["purge"] == id);
    let receipt = of_job.next().unwrap_or_else(|| panic!("no receipt of {id}"));
    assert_eq!(of_job.next(), None, "two receipts of {id}");
    receipt
}

/// Copies a directory as it is, in place of whatever is there.
fn copy(from: &Path, to: &Path) {
    if to.exists() {
        std::fs::remove_dir_all(to).unwrap();
    }
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(copied.success(), "{copied}");
}
