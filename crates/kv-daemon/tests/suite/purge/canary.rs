//! Known bytes are put, purged and looked for wherever the daemon could have left them.

use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};

use super::scan::{Needles, Sightings};
use super::{Block, flush, hex, kvctl, namespace, only_receipt, purge};
use crate::daemon::{Daemon, words};

const FLAGS: [&str; 2] = ["--nvme-bytes", "64MiB"];
const SETTINGS: &str = "nvme_segment_bytes = \"4MiB\"\n";
/// Blocks of a MiB that push the others out of 16 MiB of host memory.
const FILLERS: usize = 13;

fn doomed() -> Vec<Block> {
    let lengths = [4096, 10_007, 65_536, 262_145, 777_777, 1 << 20];
    let block = |length| Block::new(&format!("doomed {length}"), length);
    lengths.into_iter().map(block).collect()
}

fn kept() -> Vec<Block> {
    let block = |length| Block::new(&format!("kept {length}"), length);
    [4096, 5001, 300_001, 1 << 20].into_iter().map(block).collect()
}

fn fillers() -> Vec<Block> {
    let block = |index| Block::new(&format!("filler {index}"), 1 << 20);
    (0..FILLERS).map(block).collect()
}

/// By a process of its own, which is gone when this returns.
fn put(daemon: &Daemon, name: &str, block: &Block) {
    let file = daemon.directory.path().join("block");
    std::fs::write(&file, &block.bytes).unwrap();
    daemon.ask(&["--namespace", name, "put", &block.hex(), file.to_str().unwrap()]);
    std::fs::remove_file(&file).unwrap();
}

/// By a process of its own: whether it is there, and then it is what was put.
fn is_there(daemon: &Daemon, name: &str, block: &Block) -> bool {
    let got = daemon
        .kvctl()
        .args(["--namespace", name, "get", &block.hex()])
        .output()
        .unwrap();
    match got.status.code() {
        Some(0) => {
            assert!(got.stdout == block.bytes, "wrong bytes of {}", block.hex());
            true
        }
        Some(1) => false,
        _ => panic!("{}", words(&got)),
    }
}

fn needles(blocks: &[Block]) -> Needles {
    let mut needles = Needles::default();
    for block in blocks {
        needles.of_block(&format!("{} bytes", block.bytes.len()), &block.bytes);
    }
    needles
}

/// What the files of the state directory know of a namespace's key.
struct Keys {
    data: Vec<[u8; 32]>,
    /// Keys of records in the segments there are, as the ciphers hold them.
    records: Vec<[u8; 32]>,
    /// Nonce and wrapped key, of either half.
    wrapped: Vec<[u8; 60]>,
    /// Digits of the master key.
    master: String,
    /// What is derived of it, as the cipher holds it.
    wrapping: [u8; 32],
}

/// Length of a key for HKDF.
struct KeyBytes;

impl KeyType for KeyBytes {
    fn len(&self) -> usize {
        32
    }
}

fn record_key(data: &[u8; 32], incarnation: &[u8], purpose: &[u8]) -> [u8; 32] {
    let mut key = [0; 32];
    let derived = Salt::new(HKDF_SHA256, incarnation).extract(data);
    derived.expand(&[purpose], KeyBytes).unwrap().fill(&mut key).unwrap();
    key
}

/// Reads the register as its documentation draws it.
fn keys_of(state: &Path, name: &str) -> Keys {
    let register = std::fs::read(state.join("register")).unwrap();
    let master = std::fs::read_to_string(state.join("master.key"))
        .unwrap()
        .trim()
        .to_string();
    let master_bytes: Vec<u8> = (0..64)
        .step_by(2)
        .map(|place| u8::from_str_radix(&master[place..place + 2], 16).unwrap())
        .collect();
    let wrapping = blake3::derive_key("kvtier v1 master key wraps data keys", &master_bytes);
    let mut keys = Keys {
        data: Vec::new(),
        records: Vec::new(),
        wrapped: Vec::new(),
        master,
        wrapping,
    };
    for half in register.chunks(4096).skip(1) {
        let length = usize::from(u16::from_le_bytes([half[30], half[31]]));
        if &half[..4] != b"kv\x01S" || &half[192..192 + length] != name.as_bytes() {
            continue;
        }
        let wrapped: [u8; 60] = half[448..508].try_into().unwrap();
        let cipher = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &wrapping).unwrap());
        let nonce = Nonce::try_assume_unique_for_key(&wrapped[..12]).unwrap();
        let mut inside = wrapped[12..].to_vec();
        let opened = cipher
            .open_in_place(nonce, Aad::from(&half[..448]), &mut inside)
            .unwrap();
        keys.data.push((&*opened).try_into().unwrap());
        keys.wrapped.push(wrapped);
    }
    assert!(!keys.wrapped.is_empty(), "{name} is in the register");
    for segment in segments(state) {
        let header = std::fs::read(segment).unwrap();
        for purpose in [&b"kvtier record v1"[..], b"kvtier entry v1"] {
            keys.records.push(record_key(&keys.data[0], &header[16..48], purpose));
        }
    }
    keys
}

impl Keys {
    /// What must not be on the disk any more.
    fn on_disk(&self) -> Needles {
        let mut needles = Needles::default();
        for wrapped in &self.wrapped {
            needles.add("nonce of a wrapped key", &wrapped[..24]);
            needles.add("wrapped key", &wrapped[12..36]);
            needles.add("tag of a wrapped key", &wrapped[36..]);
        }
        for data in &self.data {
            needles.add("data key", data);
            needles.add("data key in hex", &hex(data).as_bytes()[..32]);
        }
        needles.add("master key", &self.master.as_bytes()[..32]);
        needles.add("end of the master key", &self.master.as_bytes()[32..]);
        needles
    }

    /// What must not be in memory any more.
    fn in_memory(&self) -> Needles {
        let mut needles = Needles::default();
        for data in &self.data {
            needles.add("data key", data);
        }
        for record in &self.records {
            needles.add("record key", record);
        }
        needles.add("master key", &self.master.as_bytes()[..32]);
        needles.add("wrapping key", &self.wrapping);
        needles
    }
}

fn segments(state: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(state.join("nvme")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let segments: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "kvs"))
        .collect();
    assert!(!segments.is_empty());
    segments
}

fn nothing() -> Sightings {
    Sightings::new()
}

/// Puts what is to be purged and what is to stay, on both tiers, with some of it evicted and read back. Which of the doomed
/// blocks are in host memory again.
fn populate(daemon: &Daemon) -> Vec<Block> {
    for block in doomed() {
        put(daemon, "doomed", &block);
    }
    for block in kept() {
        put(daemon, "kept", &block);
    }
    flush(daemon);
    for block in fillers() {
        put(daemon, "filler", &block);
    }
    flush(daemon);
    let status = namespace(daemon, "doomed");
    assert_eq!(status["nvme_blocks"], 6, "{status}");
    assert!(
        status["host_blocks"].as_u64().unwrap() < 6,
        "some were evicted: {status}"
    );
    let read_back: Vec<Block> = doomed().into_iter().step_by(2).collect();
    for block in &read_back {
        assert!(is_there(daemon, "doomed", block));
    }
    let status = daemon.settle();
    assert!(status["promotions"].as_u64() != Some(0), "{status}");
    read_back
}

fn canary(encryption: &str, engine: &str) {
    let flags = [&FLAGS[..], &["--encryption", encryption, "--nvme-engine", engine]].concat();
    let daemon = Daemon::start_with(&flags, SETTINGS);
    let read_back = populate(&daemon);
    let (state, process) = (daemon.state(), daemon.child.id());

    // What is looked for can be found.
    let in_memory = needles(&read_back).in_memory_of(process);
    assert_eq!(in_memory.len(), 3 * read_back.len(), "{in_memory:#?}");
    let blocks = needles(&doomed());
    let on_disk = blocks.in_files(&state);
    let readable = if encryption == "none" { 3 * doomed().len() } else { 0 };
    assert_eq!(on_disk.len(), readable, "{on_disk:#?}");
    let keys = keys_of(&state, "doomed");
    let on_disk = keys.on_disk().in_files(&state);
    assert!(
        on_disk.contains_key("wrapped key") && on_disk.contains_key("master key"),
        "{on_disk:#?}"
    );
    let in_memory = keys.in_memory().in_memory_of(process);
    for key in ["data key", "record key", "wrapping key"] {
        assert!(in_memory.contains_key(key), "{key}: {in_memory:#?}");
    }
    let before = daemon.directory.path().join("before");
    std::fs::create_dir(&before).unwrap();
    for segment in segments(&state) {
        std::fs::copy(&segment, before.join(segment.file_name().unwrap())).unwrap();
    }

    let receipt = purge(&daemon, &["doomed", "--mode", "physical", "--reason", "canary"]);
    let guarantee = match encryption {
        "none" => "verified_namespace_invalidation",
        _ => "verified_physical_purge",
    };
    assert_eq!(receipt["guarantee"], guarantee, "{receipt:#}");
    assert_eq!(only_receipt(&daemon, receipt["purge"].as_str().unwrap()), receipt);

    assert_eq!(blocks.in_memory_of(process), nothing(), "in memory");
    assert_eq!(blocks.in_files(&state), nothing(), "in the state directory");
    assert_eq!(blocks.in_shared_memory(), nothing(), "in shared memory");
    assert_eq!(keys.on_disk().in_files(&state), nothing(), "in the state directory");
    assert_eq!(keys.in_memory().in_memory_of(process), nothing(), "in memory");
    for block in doomed() {
        assert!(!is_there(&daemon, "doomed", &block));
    }
    for block in kept() {
        assert!(is_there(&daemon, "kept", &block), "what is not purged stays");
    }
    let there = fillers()
        .iter()
        .filter(|block| is_there(&daemon, "filler", block))
        .count();
    assert_eq!(there, FILLERS, "what is not purged stays");
    // Also what reading the others back brought into memory.
    assert_eq!(blocks.in_memory_of(process), nothing(), "in memory");

    // What somebody copied off the device before, put back beside all that is left.
    let directory = daemon.stop_and_keep();
    for segment in std::fs::read_dir(&before).unwrap().flatten() {
        std::fs::copy(segment.path(), state.join("nvme").join(segment.file_name())).unwrap();
    }
    let daemon = Daemon::start_in_with(directory, &flags, SETTINGS);
    for block in doomed() {
        assert!(!is_there(&daemon, "doomed", &block), "{} bytes", block.bytes.len());
    }
    let status = namespace(&daemon, "doomed");
    assert_eq!(status["blocks"], 0, "{status}");
    // They are there or not, and never what they were not.
    for block in kept() {
        is_there(&daemon, "kept", &block);
    }
    assert_eq!(keys.on_disk().in_files(&daemon.state()), nothing());
}

#[test]
fn nothing_of_a_purged_namespace_is_found_anywhere() {
    canary("aes-256-gcm", "auto");
}

#[test]
fn nothing_of_a_purged_namespace_is_found_anywhere_where_payloads_are_not_encrypted() {
    canary("none", "threads");
}

#[test]
fn a_namespace_that_has_the_device_to_itself_leaves_nothing_either() {
    for (encryption, engine) in [("none", "auto"), ("aes-256-gcm", "threads")] {
        let flags = [&FLAGS[..], &["--encryption", encryption, "--nvme-engine", engine]].concat();
        let daemon = Daemon::start_with(&flags, SETTINGS);
        let block = Block::new("alone", 300_001);
        put(&daemon, "doomed", &block);
        flush(&daemon);
        assert!(is_there(&daemon, "doomed", &block));
        let keys = keys_of(&daemon.state(), "doomed");
        let needles = needles(std::slice::from_ref(&block));
        let on_disk = needles.in_files(&daemon.state());
        assert_eq!(on_disk.len(), if encryption == "none" { 3 } else { 0 }, "{on_disk:#?}");
        purge(&daemon, &["doomed", "--mode", "physical"]);
        assert_eq!(needles.in_files(&daemon.state()), nothing(), "{encryption}");
        assert_eq!(needles.in_memory_of(daemon.child.id()), nothing(), "{encryption}");
        assert_eq!(keys.on_disk().in_files(&daemon.state()), nothing(), "{encryption}");
        assert_eq!(
            keys.in_memory().in_memory_of(daemon.child.id()),
            nothing(),
            "{encryption}"
        );
    }
}

#[test]
fn what_a_crash_left_behind_is_purged_as_well() {
    let directory = Daemon::start_with(&FLAGS, SETTINGS);
    populate(&directory);
    // Records of two runs, the first of which ended as it was.
    let daemon = Daemon::start_in_with(directory.kill(), &FLAGS, SETTINGS);
    let late = Block::new("late", 50_000);
    put(&daemon, "doomed", &late);
    let keys = keys_of(&daemon.state(), "doomed");
    let receipt = purge(&daemon, &["doomed", "--mode", "physical"]);
    assert_eq!(receipt["guarantee"], "verified_physical_purge", "{receipt:#}");
    let mut blocks = doomed();
    blocks.push(late);
    let blocks = needles(&blocks);
    assert_eq!(blocks.in_memory_of(daemon.child.id()), nothing());
    assert_eq!(keys.in_memory().in_memory_of(daemon.child.id()), nothing());
    assert_eq!(keys.on_disk().in_files(&daemon.state()), nothing());
    for block in kept() {
        assert!(is_there(&daemon, "kept", &block));
    }
}

#[test]
fn a_namespace_without_blocks_or_without_nvme_is_purged_too() {
    for flags in [&[][..], &FLAGS] {
        let daemon = Daemon::start_with(flags, SETTINGS);
        let block = Block::new("only", 30_000);
        put(&daemon, "doomed", &block);
        for _ in 0..2 {
            let receipt = purge(&daemon, &["doomed", "--mode", "physical"]);
            assert_eq!(receipt["guarantee"], "verified_physical_purge", "{receipt:#}");
            assert_eq!(
                needles(std::slice::from_ref(&block)).in_memory_of(daemon.child.id()),
                nothing()
            );
        }
        let unknown = kvctl(&daemon).args(["purge", "never", "--wait"]).output().unwrap();
        assert_eq!(unknown.status.code(), Some(1), "{}", words(&unknown));
    }
}
