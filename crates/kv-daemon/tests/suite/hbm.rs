//! Copies of blocks in device memory: of the daemon's, read by other processes of the same device. On the software device.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier::client::blocking::{Client, DeviceCache, Namespace};
use kvtier::client::{ClientOptions, FetchScope, GetOutcome, PutOutcome};
use kvtier::gpu::{Copy, Cuda, DeviceSlice, Gpu, KvLayout, KvOrder, KvParts, Place};
use kvtier::memory::MemoryRegion;
use kvtier::{BlockHash, ErrorKind, Parent, Realization, Tier};
use rustix::process::Signal;

use crate::daemon::{Daemon, PATIENCE, command, directory, wait, words};
use crate::purge::{only_receipt, purge};

/// What the software devices do, by their number: see `kvtier_softgpu`.
const WELL: usize = 0;
const SLOW: usize = 1;
const SMALL: usize = 2;

const LAYOUT: KvLayout = KvLayout {
    layers: 2,
    parts: KvParts::KeysAndValues,
    order: KvOrder::PartsOuter,
    one_tensor: false,
    pages: 8,
    page_tokens: 16,
    heads: 2,
    head_elements: 32,
    element_bytes: 2,
};
const ROW: usize = 16 * 2 * 32 * 2;
const PAGE: u32 = 2 * 2 * ROW as u32;

/// Of the child: the daemon's socket.
const SOCKET: &str = "KVTIER_TEST_HBM_SOCKET";

/// The software device's driver; none where `KVTIER_GPU=real` asks for the system's.
fn library() -> Option<PathBuf> {
    if std::env::var("KVTIER_GPU").is_ok_and(|kind| kind == "real") {
        return None;
    }
    let program = std::env::current_exe().expect("a program");
    Some(program.with_file_name("libkvtier_softgpu.so"))
}

/// Whether there are devices that do what a case needs; says so where there are not.
fn is_software() -> bool {
    let is_software = library().is_some();
    if !is_software {
        println!("not executed: a real device cannot be made to be so");
    }
    is_software
}

fn cuda() -> Cuda {
    match library() {
        Some(library) => Cuda::open_at(&library).expect("the software device"),
        None => Cuda::open().expect("KVTIER_GPU=real was asked for"),
    }
}

fn settings(device: usize) -> String {
    let library = library().map_or_else(String::new, |path| format!("hbm_library = {path:?}\n"));
    format!("hbm_bytes = \"4MiB\"\nhbm_segment_bytes = \"2MiB\"\nhbm_device = {device}\n{library}")
}

fn daemon(device: usize) -> Daemon {
    Daemon::start_with(&["--nvme-bytes", "16MiB"], &settings(device))
}

fn hash(number: u32) -> BlockHash {
    let mut bytes = [0x5a; 16];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    BlockHash(bytes)
}

/// An engine in this process, whose pages are told apart by their seed.
struct Engine {
    gpu: Arc<Gpu>,
    tensors: Vec<DeviceSlice>,
    _client: Client,
    namespace: Namespace,
}

impl Engine {
    fn new(socket: PathBuf, device: usize, seed: usize) -> Engine {
        let gpu = cuda().device(device).expect("a device");
        let (count, bytes) = LAYOUT.tensors().expect("a layout");
        let tensor = |_| gpu.allocate(bytes).expect("memory").slice(0, bytes).expect("all");
        let tensors: Vec<DeviceSlice> = (0..count).map(tensor).collect();
        let client = Client::connect(ClientOptions::new(socket)).expect("connected");
        let namespace = client.namespace("tenant", Realization::default()).expect("opened");
        let engine = Engine {
            gpu,
            tensors,
            _client: client,
            namespace,
        };
        for (number, tensor) in engine.tensors.iter().enumerate() {
            let rows: Vec<u8> = (0..2 * 8)
                .flat_map(|row| vec![((seed * 101 + number * 37 + row * 3) % 251) as u8; ROW])
                .collect();
            let source = MemoryRegion::anonymous(bytes.next_multiple_of(4096)).expect("memory");
            let source = source.slice(0, bytes).expect("inside");
            source.copy_from_slice(&rows).expect("equal");
            engine.copy(Place::Host(source), Place::Device(tensor.clone()));
        }
        engine
    }

    fn copy(&self, source: Place, target: Place) {
        let stream = self.gpu.stream().expect("a stream");
        let copies = vec![Copy { source, target }];
        stream.submit(copies).expect("taken").wait().expect("copied");
    }

    fn cache(&self) -> DeviceCache {
        DeviceCache::new(&self.gpu, LAYOUT, self.tensors.clone()).expect("it fits")
    }

    /// The bytes of a page: each layer's keys and values.
    fn page(&self, page: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for tensor in &self.tensors {
            for part in 0..2 {
                let region = MemoryRegion::anonymous(4096).expect("memory");
                let target = region.slice(0, ROW).expect("inside");
                let source = tensor.subslice((part * 8 + page) * ROW, ROW).expect("inside");
                self.copy(Place::Device(source), Place::Host(target.clone()));
                bytes.extend(target.to_vec());
            }
        }
        bytes
    }

    fn put(&self, first: u32, pages: &[u32]) {
        let pages: Vec<[u32; 1]> = pages.iter().map(|page| [*page]).collect();
        let blocks: Vec<(BlockHash, &[u32])> = (first..).map(hash).zip(pages.iter().map(|page| &page[..])).collect();
        let outcomes = self
            .cache()
            .put(&self.namespace, Parent::Root, &blocks, 16)
            .expect("put");
        assert!(
            outcomes.iter().all(|outcome| *outcome == PutOutcome::Published),
            "{outcomes:?}"
        );
    }

    /// Gets one block into one page.
    fn get(&self, cache: &DeviceCache, number: u32, page: u32) -> Option<Tier> {
        let outcomes = cache.get(&self.namespace, &[(hash(number), &[page])], FetchScope::Prefix);
        match outcomes.expect("answered")[..] {
            [GetOutcome::Hit { tier, length: PAGE }] => Some(tier),
            [GetOutcome::Miss] => None,
            ref other => panic!("{other:?}"),
        }
    }

    /// Gets it until it comes from device memory.
    fn warm(&self, cache: &DeviceCache, number: u32, page: u32) {
        let begun = Instant::now();
        while self.get(cache, number, page) != Some(Tier::Hbm) {
            assert!(begun.elapsed() < PATIENCE, "block {number} never lies in device memory");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[test]
fn blocks_that_are_used_again_are_read_from_device_memory_of_the_daemon() {
    let daemon = daemon(WELL);
    let (from, into) = (
        Engine::new(daemon.socket(), WELL, 1),
        Engine::new(daemon.socket(), WELL, 2),
    );
    from.put(1, &[3, 4, 7]);
    let cache = into.cache();
    assert_eq!(into.get(&cache, 1, 0), Some(Tier::Host));
    for (number, page) in [(1, 0), (2, 1), (3, 2)] {
        into.warm(&cache, number, page);
    }
    for (target, source) in [(0, 3), (1, 4), (2, 7)] {
        assert!(into.page(target) == from.page(source), "page {source} in {target}");
    }
    // One of another engine reads the same copies; one that has no device reads host memory.
    let other = Engine::new(daemon.socket(), WELL, 3);
    assert_eq!(other.get(&other.cache(), 2, 5), Some(Tier::Hbm));
    assert!(other.page(5) == from.page(4));
    let handles = into.namespace.get(&[hash(1)], FetchScope::Each).expect("answered");
    assert_eq!(handles[0].as_ref().map(|handle| handle.tier()), Some(Tier::Host));
    drop(handles);
    let status = daemon.settle();
    assert_eq!(
        (&status["hbm_blocks"], &status["hbm_promotions"]),
        (&3.into(), &3.into())
    );
    assert_eq!(status["hbm_used_bytes"], 3 * u64::from(PAGE));
    assert!(
        status["hbm_device"]
            .as_str()
            .unwrap_or("")
            .starts_with("software: well (GPU-"),
        "{status}"
    );
    assert_eq!(status["hbm_path"], "staged (no RDMA between nodes)");
    let (_, metrics) = daemon.http("GET", "/metrics");
    assert!(metrics.contains("kvtier_hbm_blocks 3"), "{metrics}");
    assert!(
        metrics.contains("kvtier_hbm_network_info{path=\"staged\"} 1"),
        "{metrics}"
    );
    let told = daemon.kvctl().arg("status").output().expect("kvctl runs");
    assert!(
        words(&told).contains("GPU memory    24.0 KiB of 4.00 MiB, 3 blocks"),
        "{}",
        words(&told)
    );
}

#[test]
fn a_client_of_another_device_is_given_no_memory_of_this_one() {
    if !is_software() {
        return;
    }
    let daemon = daemon(WELL);
    let engine = Engine::new(daemon.socket(), SLOW, 1);
    engine.put(1, &[3]);
    let cache = engine.cache();
    for _ in 0..4 {
        assert_eq!(engine.get(&cache, 1, 0), Some(Tier::Host));
    }
    assert_eq!(daemon.count("hbm_segments"), 0);
}

#[test]
fn a_purge_zeroes_device_copies_and_the_receipt_says_so() {
    let daemon = daemon(WELL);
    let engine = Engine::new(daemon.socket(), WELL, 1);
    engine.put(1, &[3, 4]);
    let cache = engine.cache();
    engine.warm(&cache, 1, 0);
    engine.warm(&cache, 2, 1);
    let receipt = purge(&daemon, &["tenant", "--mode", "physical"]);
    assert_eq!(engine.get(&cache, 1, 0), None);
    // It is in the chain, whose signatures hold.
    let id = receipt["purge"].as_str().expect("an id");
    assert_eq!(only_receipt(&daemon, id)["id"], receipt["id"]);
    let text = receipt.to_string();
    assert!(text.contains("\"verified_physical_purge\""), "{text}");
    let processors = receipt["processors"].as_array().expect("processors");
    let entries = processors.iter().flat_map(|processor| processor["evidence"].as_array());
    let entry = entries
        .flatten()
        .find(|entry| entry["tier"] == "hbm")
        .unwrap_or_else(|| panic!("nothing about device memory in {text}"));
    assert_eq!(
        (&entry["objects"], &entry["bytes"], &entry["verified"]),
        (&2.into(), &(2 * u64::from(PAGE)).into(), &true.into()),
        "{entry}"
    );
    assert_eq!(daemon.count("hbm_blocks"), 0);
    // It goes on.
    engine.put(1, &[5]);
    engine.warm(&cache, 1, 0);
    assert!(engine.page(0) == engine.page(5));
}

/// What lies in device memory that a daemon shares, whoever maps it; kept open, so that it can be looked at once the daemon has let go.
struct SharedMemory(Vec<File>);

impl SharedMemory {
    fn of(daemon: &Daemon) -> SharedMemory {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).expect("our own child");
        let is_shared = |path: &PathBuf| {
            std::fs::read_link(path).is_ok_and(|file| file.to_string_lossy().contains("softgpu of software"))
        };
        let paths = descriptors.flatten().map(|entry| entry.path());
        let open = |path: PathBuf| File::open(path).expect("memory");
        SharedMemory(paths.filter(is_shared).map(open).collect())
    }

    /// In how many of its descriptors these bytes are found.
    fn holds(&self, bytes: &[u8]) -> usize {
        let holds = |file: &File| {
            let length = file.metadata().expect("its size").len();
            let mut all = vec![0; usize::try_from(length).expect("it fits")];
            file.read_exact_at(&mut all, 0).expect("readable");
            // Slots begin at pages.
            all.chunks(4096)
                .enumerate()
                .any(|(page, _)| all[page * 4096..].starts_with(bytes))
        };
        self.0.iter().filter(|file| holds(file)).count()
    }
}

#[test]
fn not_a_byte_of_what_was_purged_is_left_in_shared_device_memory() {
    if !is_software() {
        return;
    }
    let daemon = daemon(WELL);
    let engine = Engine::new(daemon.socket(), WELL, 77);
    engine.put(1, &[3, 4, 7]);
    let cache = engine.cache();
    for number in [1, 2, 3] {
        engine.warm(&cache, number, number - 1);
    }
    let memory = SharedMemory::of(&daemon);
    let blocks = [3, 4, 7].map(|page| engine.page(page));
    for block in &blocks {
        assert!(memory.holds(block) > 0, "it lies there, where this looks for it");
    }
    // Deleting hides; the bytes go when somebody needs the room, or all of them with a purge.
    assert_eq!(engine.namespace.delete(&[hash(2)]).expect("answered"), [true]);
    purge(&daemon, &["tenant", "--mode", "physical"]);
    for block in &blocks {
        assert_eq!(memory.holds(block), 0);
        // Nor any of its rows.
        assert_eq!(memory.holds(&block[..64]), 0);
    }
}

#[test]
fn a_client_killed_with_copies_in_flight_keeps_its_slots_until_it_is_gone_and_no_longer() {
    if !is_software() {
        return;
    }
    let daemon = daemon(SLOW);
    let mut child = start_child(&daemon);
    let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut line = String::new();
    while !line.contains("copying") {
        line.clear();
        assert!(output.read_line(&mut line).expect("a line") > 0, "the child ended");
    }
    let engine = Engine::new(daemon.socket(), SLOW, 2);
    // What it copies goes; the memory does not, while it may still be read. It takes a moment to meet it in the middle.
    let held = (0..50).find_map(|_| {
        let begun = Instant::now();
        while daemon.count("leases") == 0 {
            assert!(begun.elapsed() < PATIENCE, "it copies nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(engine.namespace.delete(&[hash(1)]).expect("answered"), [true]);
        let status = daemon.status();
        if status["leases"] == 1 {
            return Some(status);
        }
        engine.put(1, &[3]);
        None
    });
    let held = held.expect("a copy takes long enough to be met");
    assert_eq!((&held["blocks"], &held["hbm_blocks"]), (&0.into(), &0.into()), "{held}");
    let kept = held["hbm_used_bytes"].as_u64().unwrap_or(0) + held["host_used_bytes"].as_u64().unwrap_or(0);
    assert!(
        kept >= u64::from(PAGE),
        "its memory was given away under a reader: {held}"
    );
    child.kill().expect("a child");
    wait(&mut child);
    let status = daemon.settle();
    assert_eq!(
        (&status["hbm_used_bytes"], &status["leases"]),
        (&0.into(), &0.into()),
        "{status}"
    );
    engine.put(1, &[3]);
    let cache = engine.cache();
    engine.warm(&cache, 1, 0);
    assert!(engine.page(0) == engine.page(3), "whoever is next reads what was put");
}

#[test]
fn memory_of_a_daemon_that_was_killed_is_an_error_and_its_successor_shares_anew() {
    let mut daemon = daemon(WELL);
    let engine = Engine::new(daemon.socket(), WELL, 1);
    engine.put(1, &[3]);
    let cache = engine.cache();
    engine.warm(&cache, 1, 0);
    daemon.child.kill().expect("a child");
    wait(&mut daemon.child);
    let blocks: [(BlockHash, &[u32]); 1] = [(hash(1), &[0])];
    let error = cache
        .get(&engine.namespace, &blocks, FetchScope::Prefix)
        .expect_err("it is gone");
    assert!(
        matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Closed),
        "{error}"
    );
    let (_, directory) = daemon.into_remains();
    let daemon = Daemon::start_in_with(directory, &["--nvme-bytes", "16MiB"], &settings(WELL));
    assert_eq!(
        engine.get(&cache, 1, 0),
        None,
        "nothing was flushed, and device memory does not last"
    );
    engine.put(1, &[4]);
    engine.warm(&cache, 1, 0);
    assert!(engine.page(0) == engine.page(4));
    assert_eq!(daemon.count("hbm_blocks"), 1);
}

#[test]
fn a_context_that_is_lost_in_mid_copy_costs_the_copies_and_nothing_else() {
    if !is_software() {
        return;
    }
    let mut program = command("kv-daemon");
    // The daemon's device, not that of this process: each of its copies to the device is one more that reads it back.
    program.env("SOFTGPU_BREAKS_AT", "6");
    let daemon = Daemon::try_launch(program, directory(), &["--nvme-bytes", "16MiB"], &settings(WELL));
    let daemon = daemon.unwrap_or_else(|(log, _)| panic!("not ready: {log}"));
    let engine = Engine::new(daemon.socket(), WELL, 1);
    engine.put(1, &[3, 4, 5, 6]);
    let cache = engine.cache();
    engine.warm(&cache, 1, 0);
    engine.warm(&cache, 2, 1);
    let begun = Instant::now();
    while daemon.count("hbm_blocks") > 0 || daemon.count("hbm_errors") < 3 {
        assert!(begun.elapsed() < PATIENCE, "{}", daemon.status());
        for number in 1..=4 {
            assert!(
                engine.get(&cache, number, 7).is_some(),
                "block {number} lies in host memory, too"
            );
        }
    }
    for (number, page) in [(1, 3), (2, 4), (3, 5), (4, 6)] {
        assert_eq!(engine.get(&cache, number, 0), Some(Tier::Host));
        assert!(engine.page(0) == engine.page(page), "block {number}");
    }
    // A purge cannot zero what the device took with it, and says so.
    let receipt = purge(&daemon, &["tenant", "--mode", "physical"]).to_string();
    assert!(!receipt.contains("\"verified_physical_purge\""), "{receipt}");
    assert!(receipt.contains("could not be zeroed"), "{receipt}");
    assert_eq!(engine.get(&cache, 1, 0), None);
    // Its memory is kept, and the rest goes on.
    engine.put(9, &[3]);
    assert_eq!(engine.get(&cache, 9, 0), Some(Tier::Host));
}

#[test]
fn a_device_without_room_serves_from_host_memory_and_says_why() {
    if !is_software() {
        return;
    }
    let daemon = daemon(SMALL);
    let engine = Engine::new(daemon.socket(), SMALL, 1);
    engine.put(1, &[3]);
    let cache = engine.cache();
    for _ in 0..5 {
        assert_eq!(engine.get(&cache, 1, 0), Some(Tier::Host));
    }
    assert!(engine.page(0) == engine.page(3));
    let begun = Instant::now();
    while daemon.count("hbm_errors") == 0 {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!((daemon.count("hbm_blocks"), daemon.count("hbm_segments")), (0, 0));
}

#[test]
fn without_the_device_that_the_settings_name_the_daemon_does_not_start_and_says_what_to_do() {
    let start = |settings: &str| {
        let directory = directory();
        let file = directory.path().join("kv-daemon.toml");
        std::fs::write(&file, settings).expect("a settings file");
        let output = command("kv-daemon")
            .args(["serve", "--http", "off", "--host-bytes", "16MiB", "--config"])
            .arg(&file)
            .arg("--state-dir")
            .arg(directory.path().join("state"))
            .output()
            .expect("kv-daemon runs");
        (output.status.code(), words(&output))
    };
    let (code, text) = start("hbm_bytes = \"4MiB\"\nhbm_library = \"/nowhere/libcuda.so.1\"\n");
    assert_eq!(code, Some(69), "{text}");
    assert!(
        text.contains("cuda unavailable") && text.contains("hbm_bytes = 0"),
        "{text}"
    );
    let (code, text) = start(&settings(99));
    assert_eq!(code, Some(69), "{text}");
    assert!(text.contains("INVALID_DEVICE"), "{text}");
    let (code, text) = start("hbm_bytes = \"1MiB\"\n");
    assert_eq!(code, Some(78), "{text}");
    assert!(text.contains("hbm_bytes"), "{text}");
}

fn start_child(daemon: &Daemon) -> Child {
    Command::new(std::env::current_exe().expect("this binary"))
        .args([
            "--exact",
            "hbm::as_a_child_this_binary_reads_device_memory_slowly",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(SOCKET, daemon.socket())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("a child")
}

#[test]
fn as_a_child_this_binary_reads_device_memory_slowly() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    // Whatever becomes of the test, its child goes with it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).expect("the kernel takes it");
    let engine = Engine::new(socket.into(), SLOW, 1);
    engine.put(1, &[3]);
    let cache = engine.cache();
    engine.warm(&cache, 1, 0);
    println!("copying");
    // Eight copies of 30 ms each, again and again.
    loop {
        engine.get(&cache, 1, 0);
    }
}
