//! The LMCache adapter against a node in this process.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kvtier::adapter::{Adapter, AdapterSettings, FailedStores, Notice, ObjectKey, StoreResult, TaskId};
use kvtier::client::ClientOptions;
use kvtier::client::blocking::Client;
use kvtier::node::Node;
use kvtier::settings::{NvmeEngine, Settings};
use kvtier_transfer::memory::{ForeignSlice, MemoryRegion, MemorySlice};

const MIB: u64 = 1 << 20;
const BYTES: usize = 96 << 10;
/// Longer than anything here takes, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

struct Directory(PathBuf);

impl Directory {
    fn new() -> Directory {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kvtier-adapter-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Directory(path)
    }

    fn node(&self, host_bytes: u64, nvme_bytes: u64) -> Node {
        let settings = Settings {
            state_dir: self.0.clone(),
            host_bytes,
            nvme_bytes,
            // Room for the largest object here; a segment of a 64th would be too small for it.
            nvme_segment_bytes: if nvme_bytes == 0 { 0 } else { 80 * MIB },
            nvme_engine: NvmeEngine::Threads,
            lock_memory: false,
            ..Settings::default()
        };
        Node::start(settings.check().expect("good settings"), Box::new(|_| {})).expect("a node starts")
    }

    fn settings(&self) -> AdapterSettings {
        AdapterSettings {
            socket: self.0.join("kvtier.sock"),
            copy_threads: 2,
            ..AdapterSettings::default()
        }
    }

    fn adapter(&self) -> Adapter {
        adapter(self.settings())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn adapter(settings: AdapterSettings) -> Adapter {
    let adapter = Adapter::start(settings).expect("an adapter starts");
    until("the adapter connects", || adapter.is_healthy());
    adapter
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn key_of(number: u32, salt: &str, rank: i64) -> ObjectKey {
    ObjectKey {
        salt: salt.into(),
        model: "model".into(),
        group: 0,
        rank,
        chunk_hash: [[7; 28].as_slice(), &number.to_le_bytes()].concat().into(),
    }
}

fn keys(numbers: std::ops::Range<u32>) -> Vec<ObjectKey> {
    numbers.map(|number| key_of(number, "", 0)).collect()
}

/// Pages as LMCache's arena would be: one region, cut into objects.
fn pages(count: usize, bytes: usize) -> Vec<MemorySlice> {
    let region = MemoryRegion::anonymous((count * bytes).next_multiple_of(4096)).expect("memory");
    (0..count)
        .map(|at| region.slice(at * bytes, bytes).expect("in range"))
        .collect()
}

fn fill(pages: &[MemorySlice], seed: u8) {
    for (at, page) in pages.iter().enumerate() {
        let bytes: Vec<u8> = (0..page.len()).map(|byte| pattern(seed, at, byte)).collect();
        page.copy_from_slice(&bytes).expect("same length");
    }
}

fn pattern(seed: u8, at: usize, byte: usize) -> u8 {
    (byte as u32).wrapping_mul(2_654_435_761).rotate_left(9).to_le_bytes()[0]
        .wrapping_add(seed)
        .wrapping_add(at.to_le_bytes()[0])
}

fn foreign(pages: &[MemorySlice]) -> Vec<ForeignSlice> {
    pages
        .iter()
        .map(|page| ForeignSlice::of(page).expect("writable"))
        .collect()
}

fn store(adapter: &Adapter, keys: &[ObjectKey], pages: &[MemorySlice]) -> StoreResult {
    let task = adapter.submit_store(keys.to_vec(), foreign(pages));
    let mut result = None;
    until("a store ends", || {
        result = result.or_else(|| adapter.completed_stores().into_iter().find(|(id, _)| *id == task));
        result.is_some()
    });
    result.expect("it ended").1
}

fn wait<T>(what: &str, mut take: impl FnMut() -> Option<T>) -> T {
    let mut taken = None;
    until(what, || {
        taken = take();
        taken.is_some()
    });
    taken.expect("it was taken")
}

fn lookup(adapter: &Adapter, keys: &[ObjectKey], bytes: Option<usize>) -> Vec<bool> {
    let sizes = vec![bytes.map(|bytes| bytes as u64); keys.len()];
    let task = adapter.submit_lookup(keys.to_vec(), sizes);
    wait("a lookup ends", || adapter.lookup_result(task))
}

fn load(adapter: &Adapter, keys: &[ObjectKey], pages: &[MemorySlice]) -> Vec<bool> {
    let task = adapter.submit_load(keys.to_vec(), foreign(pages));
    wait("a load ends", || adapter.load_result(task))
}

fn check(pages: &[MemorySlice], seed: u8) {
    for (at, page) in pages.iter().enumerate() {
        let wrong = page
            .to_vec()
            .iter()
            .enumerate()
            .position(|(byte, value)| *value != pattern(seed, at, byte));
        assert_eq!(wrong, None, "page {at}");
    }
}

fn counter(adapter: &Adapter, name: &str) -> u64 {
    adapter.report()[name].as_u64().expect("a counter")
}

#[test]
fn what_was_stored_is_found_and_loaded() {
    let directory = Directory::new();
    let _node = directory.node(32 * MIB, 0);
    let adapter = directory.adapter();
    let source = pages(9, BYTES);
    fill(&source, 3);
    let bytes = (9 * BYTES) as u64;
    assert_eq!(
        store(&adapter, &keys(0..9), &source),
        StoreResult { success: true, bytes }
    );
    assert_eq!(
        lookup(&adapter, &keys(0..10), Some(BYTES)),
        [vec![true; 9], vec![false]].concat()
    );
    let target = pages(10, BYTES);
    assert_eq!(
        load(&adapter, &keys(0..10), &target),
        [vec![true; 9], vec![false]].concat()
    );
    check(&target[..9], 3);
    assert_eq!(target[9].to_vec(), vec![0; BYTES], "the page of a miss is not touched");
    assert_eq!(
        store(&adapter, &keys(0..9), &source),
        StoreResult {
            success: true,
            bytes: 0
        },
        "what is present moves no bytes"
    );
}

#[test]
fn another_salt_rank_or_size_is_another_object() {
    let directory = Directory::new();
    let _node = directory.node(32 * MIB, 0);
    let adapter = directory.adapter();
    let source = pages(1, BYTES);
    fill(&source, 1);
    let key = key_of(1, "alice", 0);
    assert!(store(&adapter, std::slice::from_ref(&key), &source).success);
    for other in [
        key_of(1, "bob", 0),
        key_of(1, "", 0),
        key_of(1, "alice", 1),
        key_of(2, "alice", 0),
    ] {
        assert_eq!(
            lookup(&adapter, std::slice::from_ref(&other), Some(BYTES)),
            [false],
            "{other:?}"
        );
        assert_eq!(load(&adapter, &[other], &pages(1, BYTES)), [false]);
    }
    assert_eq!(
        lookup(&adapter, std::slice::from_ref(&key), Some(BYTES - 4096)),
        [false]
    );
    assert_eq!(
        load(&adapter, std::slice::from_ref(&key), &pages(1, BYTES - 4096)),
        [false]
    );
    assert_eq!(
        load(&adapter, std::slice::from_ref(&key), &pages(1, BYTES + 4096)),
        [false]
    );
    assert_eq!(
        lookup(&adapter, &[key], None),
        [true],
        "a size that LMCache does not say is known from the store"
    );
}

#[test]
fn objects_of_32_mib_and_more_than_all_host_memory_go_through() {
    let directory = Directory::new();
    let _node = directory.node(256 * MIB, 1024 * MIB);
    let adapter = directory.adapter();
    let bytes = 32 << 20;
    let source = pages(3, bytes);
    for round in 0..4u32 {
        fill(&source, round.to_le_bytes()[0]);
        let stored = store(&adapter, &keys(round * 3..round * 3 + 3), &source);
        assert!(stored.success, "round {round}: {stored:?} {}", adapter.report());
    }
    let target = pages(3, bytes);
    for round in 0..4u32 {
        let loaded = load(&adapter, &keys(round * 3..round * 3 + 3), &target);
        assert_eq!(loaded, [true; 3], "round {round}: {}", adapter.report());
        check(&target, round.to_le_bytes()[0]);
    }
}

#[test]
fn without_a_node_everything_misses_at_once_and_comes_back_by_itself() {
    let directory = Directory::new();
    let adapter = Adapter::start(directory.settings()).expect("it starts without a node");
    let source = pages(2, BYTES);
    fill(&source, 9);
    let begun = Instant::now();
    assert!(!store(&adapter, &keys(0..2), &source).success);
    assert_eq!(lookup(&adapter, &keys(0..2), Some(BYTES)), [false; 2]);
    assert_eq!(load(&adapter, &keys(0..2), &pages(2, BYTES)), [false; 2]);
    // Far less than any of the deadlines.
    assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
    let node = directory.node(32 * MIB, 0);
    until("the adapter connects", || adapter.is_healthy());
    assert!(store(&adapter, &keys(0..2), &source).success);
    drop(node);
    until("the adapter sees the end", || {
        !lookup(&adapter, &keys(0..2), Some(BYTES))[0]
    });
    assert!(!adapter.is_healthy());
    let _node = directory.node(32 * MIB, 0);
    until("the adapter connects anew", || adapter.is_healthy());
    assert!(store(&adapter, &keys(0..2), &source).success);
    let target = pages(2, BYTES);
    assert_eq!(load(&adapter, &keys(0..2), &target), [true; 2]);
    check(&target, 9);
}

#[test]
fn a_failed_store_may_be_reported_as_dropped() {
    let directory = Directory::new();
    let settings = AdapterSettings {
        failed_stores: FailedStores::Drop,
        ..directory.settings()
    };
    let adapter = Adapter::start(settings).expect("it starts without a node");
    let result = store(&adapter, &keys(0..2), &pages(2, BYTES));
    assert_eq!(
        result,
        StoreResult {
            success: true,
            bytes: 0
        }
    );
}

#[test]
fn locks_lease_until_they_are_given_back() {
    let directory = Directory::new();
    let node = directory.node(32 * MIB, 0);
    let adapter = directory.adapter();
    assert!(store(&adapter, &keys(0..4), &pages(4, BYTES)).success);
    let leases = || node.status().counters.leases;
    assert_eq!(lookup(&adapter, &keys(0..4), Some(BYTES)), [true; 4]);
    until("the blocks are leased", || leases() == 4);
    lookup(&adapter, &keys(0..1), Some(BYTES));
    adapter.unlock(&keys(0..4));
    until("three are given back", || leases() == 1);
    adapter.unlock(&keys(0..1));
    until("all are given back", || leases() == 0);
    adapter.unlock(&keys(0..9));
    assert_eq!(counter(&adapter, "locked_keys"), 0);
}

#[test]
fn leases_of_locks_do_not_starve_stores() {
    let directory = Directory::new();
    let _node = directory.node(32 * MIB, 0);
    let settings = AdapterSettings {
        locked_bytes_max: 4 * MIB,
        ..directory.settings()
    };
    let adapter = adapter(settings);
    let source = pages(20, MIB as usize);
    fill(&source, 5);
    assert!(store(&adapter, &keys(0..20), &source).success);
    lookup(&adapter, &keys(0..20), Some(MIB as usize));
    until("some are leased", || counter(&adapter, "leased_bytes") > 0);
    assert!(counter(&adapter, "leased_bytes") <= 4 * MIB);
    assert!(store(&adapter, &keys(100..120), &source).success);
}

#[test]
fn deleting_names_what_was_there() {
    let directory = Directory::new();
    let _node = directory.node(32 * MIB, 0);
    let adapter = directory.adapter();
    assert!(store(&adapter, &keys(0..3), &pages(3, BYTES)).success);
    assert_eq!(adapter.delete(keys(2..5)), [(0, BYTES as u64)]);
    assert_eq!(lookup(&adapter, &keys(0..3), Some(BYTES)), [true, true, false]);
    assert_eq!(adapter.usage(), [(Arc::from(""), 2 * BYTES as u64)]);
    let listed = adapter.list(Some("model"), 10, None);
    assert_eq!(
        listed.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>(),
        keys(0..2)
    );
    assert_eq!(adapter.list(None, 10, Some(&listed[0].0)).len(), 1);
}

/// Runs an adapter's notices as LMCache's listeners would be told them.
fn notices(adapter: &Adapter) -> Vec<Notice> {
    let notices = adapter.take_notices(Duration::from_millis(5)).unwrap_or_default();
    for notice in &notices {
        if let Notice::Stored { task, .. } | Notice::Loaded { task, .. } = notice {
            adapter.publish(*task);
        }
    }
    notices
}

#[test]
fn listeners_hear_of_a_completion_before_it_is_out() {
    let directory = Directory::new();
    let _node = directory.node(32 * MIB, 0);
    let settings = AdapterSettings {
        notices: true,
        ..directory.settings()
    };
    let adapter = adapter(settings);
    let task: TaskId = adapter.submit_store(keys(0..2), foreign(&pages(2, BYTES)));
    let notices = wait("a notice comes", || {
        adapter
            .take_notices(Duration::from_millis(1))
            .filter(|notices| !notices.is_empty())
    });
    let known = vec![(0, BYTES as u64), (1, BYTES as u64)];
    assert_eq!(notices, [Notice::Stored { task, known }]);
    adapter.publish(task);
    wait("the completion comes", || adapter.completed_stores().pop());
}

#[test]
fn an_invalidation_is_heard_and_stores_begun_before_the_purge_are_refused() {
    let directory = Directory::new();
    let node = directory.node(32 * MIB, 0);
    let settings = AdapterSettings {
        notices: true,
        namespaces: BTreeMap::from([("a".to_owned(), "tenant-a".to_owned())]),
        ..directory.settings()
    };
    let adapter = adapter(settings);
    adapter.expect_purger("lmcache-test");
    let source = pages(1, BYTES);
    let (a, b) = ([key_of(1, "a", 0)], [key_of(1, "b", 0)]);
    assert!(store(&adapter, &a, &source).success);
    assert!(store(&adapter, &b, &source).success);
    let client = Client::connect(ClientOptions::new(node.socket())).expect("connected");
    let processors = || node.status().domains.into_iter().flat_map(|domain| domain.processors);
    until("the purger is listed", || {
        processors().any(|processor| processor.processor == "lmcache-test" && processor.namespace == "tenant-a")
    });
    notices(&adapter);
    let generation = client.invalidate("tenant-a").expect("invalidated").0;
    let mut heard = Vec::new();
    until("the invalidation is heard", || {
        heard.extend(notices(&adapter));
        heard.iter().any(|notice| matches!(notice, Notice::Invalidated { .. }))
    });
    let invalidated = Notice::Invalidated {
        namespace: "tenant-a".into(),
        salts: vec!["a".into()],
        generation,
    };
    assert!(heard.contains(&invalidated), "{heard:?}");
    let gone = Notice::Gone {
        objects: vec![(a[0].clone(), BYTES as u64)],
    };
    assert!(heard.contains(&gone), "{heard:?}");
    assert_eq!(lookup(&adapter, &a, Some(BYTES)), [false]);
    assert_eq!(lookup(&adapter, &b, Some(BYTES)), [true]);
    assert!(
        !store(&adapter, &a, &source).success,
        "LMCache's memory is not purged yet"
    );
    adapter.purged("tenant-a", generation);
    assert!(store(&adapter, &a, &source).success);
    adapter.refuse_stores(vec![key_of(2, "a", 0)]);
    assert!(!store(&adapter, &[key_of(2, "a", 0)], &source).success);
    assert!(store(&adapter, &[key_of(2, "a", 0)], &source).success, "once");
    until("the purge is confirmed", || {
        processors().any(|processor| processor.namespace == "tenant-a" && processor.confirmed_generation == generation)
    });
}

/// The node's generations begin anew and stay before those that the adapter had seen: its stores were stale and its
/// invalidations unheard from then on.
#[test]
fn a_node_that_lost_its_state_is_stored_to_and_heard_again() {
    for purger in [true, false] {
        let directory = Directory::new();
        let node = directory.node(32 * MIB, 0);
        let settings = AdapterSettings {
            notices: true,
            ..directory.settings()
        };
        let adapter = adapter(settings);
        if purger {
            adapter.expect_purger("lmcache-test");
        }
        let (a, source) = ([key_of(1, "a", 0)], pages(1, BYTES));
        assert!(store(&adapter, &a, &source).success);
        let client = Client::connect(ClientOptions::new(node.socket())).expect("connected");
        client.invalidate("lmcache:a").expect("invalidated");
        let generation = client.invalidate("lmcache:a").expect("invalidated").0;
        hear(&adapter, generation);
        adapter.purged("lmcache:a", generation);
        assert!(store(&adapter, &a, &source).success);
        drop((client, node));
        std::fs::remove_dir_all(&directory.0).expect("removed");
        std::fs::create_dir_all(&directory.0).expect("made");
        let node = directory.node(32 * MIB, 0);
        hear(&adapter, 1);
        until("the adapter connects anew", || adapter.is_healthy());
        if purger {
            assert!(!store(&adapter, &a, &source).success, "not purged yet");
            adapter.purged("lmcache:a", 1);
        }
        until("stores are taken", || store(&adapter, &a, &source).success);
        let stalls = counter(&adapter, "stalls");
        std::thread::sleep(Duration::from_millis(700));
        assert!(adapter.is_healthy(), "{}", adapter.report());
        assert_eq!(counter(&adapter, "stalls"), stalls, "what the node refuses is no stall");
        let client = Client::connect(ClientOptions::new(node.socket())).expect("connected");
        let generation = client.invalidate("lmcache:a").expect("invalidated").0;
        hear(&adapter, generation);
    }
}

#[test]
fn what_was_kept_while_the_node_was_away_is_purged_if_it_may_have_been_invalidated() {
    let directory = Directory::new();
    let node = directory.node(32 * MIB, 0);
    let source = pages(1, BYTES);
    let first = directory.adapter();
    for salt in ["a", "b"] {
        assert!(store(&first, &[key_of(1, salt, 0)], &source).success);
    }
    let client = Client::connect(ClientOptions::new(node.socket())).expect("connected");
    let generation = client.invalidate("lmcache:a").expect("invalidated").0;
    drop((first, client, node));
    let settings = AdapterSettings {
        notices: true,
        ..directory.settings()
    };
    let adapter = Adapter::start(settings).expect("it starts without a node");
    adapter.expect_purger("lmcache-test");
    for salt in ["a", "b"] {
        assert!(!store(&adapter, &[key_of(1, salt, 0)], &source).success);
    }
    let _node = directory.node(32 * MIB, 0);
    hear(&adapter, generation);
    until("the adapter connects", || adapter.is_healthy());
    assert!(
        !store(&adapter, &[key_of(1, "a", 0)], &source).success,
        "not purged yet"
    );
    assert!(
        store(&adapter, &[key_of(1, "b", 0)], &source).success,
        "never invalidated"
    );
    adapter.purged("lmcache:a", generation);
    assert!(store(&adapter, &[key_of(1, "a", 0)], &source).success);
}

/// Takes notices until one says that the namespace of salt `a` was invalidated, at this generation.
fn hear(adapter: &Adapter, wanted: u64) {
    until(&format!("an invalidation at {wanted} is heard"), || {
        notices(adapter).iter().any(|notice| {
            matches!(notice, Notice::Invalidated { namespace, generation, .. }
                if namespace == "lmcache:a" && *generation == wanted)
        })
    });
}

#[test]
fn closing_ends_every_task_and_touches_no_page_afterwards() {
    let directory = Directory::new();
    let _node = directory.node(64 * MIB, 0);
    let adapter = directory.adapter();
    let source = pages(32, MIB as usize);
    fill(&source, 1);
    assert!(store(&adapter, &keys(0..32), &source).success);
    let target = pages(32, MIB as usize);
    let tasks: Vec<TaskId> = (0..8)
        .map(|_| adapter.submit_load(keys(0..32), foreign(&target)))
        .collect();
    adapter.close();
    for page in &target {
        page.zero();
    }
    for task in tasks {
        assert!(adapter.load_result(task).is_some(), "task {task} has a completion");
    }
    std::thread::sleep(Duration::from_millis(50));
    assert!(target.iter().all(|page| page.to_vec().iter().all(|byte| *byte == 0)));
    let late = adapter.submit_load(keys(0..1), foreign(&target[..1]));
    assert_eq!(
        adapter.load_result(late),
        Some(vec![false]),
        "after closing everything misses"
    );
}

#[test]
fn too_many_tasks_fail_at_once() {
    let directory = Directory::new();
    let _node = directory.node(32 * MIB, 0);
    let settings = AdapterSettings {
        tasks_max: 1,
        ..directory.settings()
    };
    let adapter = adapter(settings);
    let source = pages(16, MIB as usize);
    let tasks: Vec<TaskId> = (0..4)
        .map(|_| adapter.submit_store(keys(0..16), foreign(&source)))
        .collect();
    let mut done = Vec::new();
    until("all end", || {
        done.extend(adapter.completed_stores());
        done.len() == tasks.len()
    });
    assert!(done.iter().any(|(_, result)| !result.success));
    assert!(counter(&adapter, "refused_tasks") > 0);
}
