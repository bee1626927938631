//! A node and its clients in one process: what an engine sees.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kvtier::client::blocking::{Client, Namespace};
use kvtier::client::{ClientOptions, PutOutcome};
use kvtier::node::Node;
use kvtier::settings::{DomainSettings, NvmeEngine, Settings};
use kvtier::{BlockHash, ErrorKind, Parent, Realization, Tier};
use kvtier_core::FetchScope;

const MIB: u64 = 1 << 20;
const BLOCK: usize = 64 << 10;

struct Directory(PathBuf);

impl Directory {
    fn new() -> Directory {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "kvtier-node-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Directory(path)
    }

    fn settings(&self) -> Settings {
        Settings {
            state_dir: self.0.clone(),
            host_bytes: 16 * MIB,
            nvme_bytes: 64 * MIB,
            nvme_engine: NvmeEngine::Threads,
            lock_memory: false,
            ..Settings::default()
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn start(settings: Settings) -> Node {
    Node::start(settings.check().expect("good settings"), Box::new(|_| {})).expect("a node starts")
}

fn connect(node: &Node) -> Client {
    Client::connect(ClientOptions::new(node.socket())).expect("a client connects")
}

fn namespace(client: &Client, name: &str) -> Namespace {
    client
        .namespace(name, Realization::digest(&[("model", "test")]))
        .expect("a namespace opens")
}

fn hash(number: u64) -> BlockHash {
    let mut hash = [0; 16];
    hash[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    hash[8..].copy_from_slice(&number.to_le_bytes());
    BlockHash(hash)
}

fn bytes(number: u64, length: usize) -> Vec<u8> {
    let mut state = number | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn put(namespace: &Namespace, numbers: std::ops::Range<u64>, length: usize) -> Vec<PutOutcome> {
    let payloads: Vec<(BlockHash, Vec<u8>)> = numbers.map(|number| (hash(number), bytes(number, length))).collect();
    let items: Vec<(BlockHash, &[u8])> = payloads.iter().map(|(hash, bytes)| (*hash, bytes.as_slice())).collect();
    namespace.put_from(Parent::Root, &items, 16).expect("a put is answered")
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_was_put_is_got_back_in_place_and_copied() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    let space = namespace(&client, "tenant");
    assert!(
        put(&space, 0..8, BLOCK)
            .iter()
            .all(|outcome| *outcome == PutOutcome::Published)
    );
    let hashes: Vec<BlockHash> = (0..10).map(hash).collect();
    let handles = space.get(&hashes, FetchScope::Prefix).expect("a get is answered");
    for (number, handle) in (0..).zip(&handles) {
        match handle {
            Some(handle) => assert!(
                number < 8 && handle.slice().to_vec() == bytes(number, BLOCK),
                "block {number}"
            ),
            None => assert!(number >= 8, "block {number} is missing"),
        }
    }
    drop(handles);
    let mut target = vec![0; BLOCK];
    let outcomes = space
        .get_into(&[hash(3)], &mut [&mut target])
        .expect("a get is answered");
    assert!(outcomes[0].is_hit());
    assert_eq!(target, bytes(3, BLOCK));
    assert!(space.delete(&[hash(3)]).expect("a delete is answered")[0]);
    assert!(!space.exists(hash(3)).expect("answered"));
    client.goodbye().expect("goodbye");
    // The farewell is sent before the node has given everything back.
    wait_until("nothing is held any more", || {
        let counters = node.status().counters;
        (counters.leases, counters.reservations, counters.quarantined_slots) == (0, 0, 0)
    });
}

#[test]
fn putting_a_present_key_publishes_nothing() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    let space = namespace(&client, "tenant");
    put(&space, 0..4, BLOCK);
    assert!(
        put(&space, 0..4, BLOCK)
            .iter()
            .all(|outcome| *outcome == PutOutcome::Present)
    );
    assert_eq!(node.status().counters.puts_published, 4);
}

#[test]
fn blocks_move_to_nvme_and_back_with_the_same_bytes() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    let space = namespace(&client, "tenant");
    // Twice the host memory: the first blocks must have gone down.
    let count = 2 * 16 * MIB / BLOCK as u64;
    for first in (0..count).step_by(16) {
        let outcomes = put(&space, first..first + 16, BLOCK);
        assert!(
            outcomes.iter().all(|outcome| *outcome == PutOutcome::Published),
            "{outcomes:?}"
        );
    }
    let status = node.status().counters;
    assert!(status.demotions > 0 && status.nvme_blocks > 0, "{status:?}");
    let mut from_nvme = 0;
    for number in 0..count {
        let handles = space.get(&[hash(number)], FetchScope::Each).expect("a get is answered");
        let handle = handles[0]
            .as_ref()
            .unwrap_or_else(|| panic!("block {number} was lost with room to spare"));
        from_nvme += u64::from(handle.tier() == Tier::Nvme);
        assert_eq!(handle.slice().to_vec(), bytes(number, BLOCK), "block {number}");
    }
    // Asked for one after the other, some are read ahead.
    let ahead = node.status().counters.prefetch_hits;
    assert!(from_nvme + ahead > count / 4, "{from_nvme} and {ahead} of {count}");
}

#[test]
fn an_invalidated_namespace_misses_and_a_late_seal_is_stale() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    let (space, other) = (namespace(&client, "a"), namespace(&client, "b"));
    put(&space, 0..4, BLOCK);
    put(&other, 0..4, BLOCK);
    let writer = space.writer(hash(9), Parent::Unknown, 4096, 16).expect("a slot");
    let kvtier::client::Writing::Open(writer) = writer else {
        panic!("a slot was there")
    };
    node.invalidate("a", Duration::from_secs(5)).expect("recorded");
    assert!(space.lookup(&[hash(0)]).expect("answered")[0].is_none());
    assert!(other.lookup(&[hash(0)]).expect("answered")[0].is_some());
    assert_eq!(writer.seal().expect("answered"), PutOutcome::Stale);
    assert!(
        put(&space, 0..4, BLOCK)
            .iter()
            .all(|outcome| *outcome == PutOutcome::Published)
    );
}

#[test]
fn a_watch_is_answered_when_a_namespace_is_invalidated_and_when_its_time_is_over() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let (client, watcher) = (connect(&node), connect(&node));
    let space = namespace(&client, "a");
    put(&space, 0..4, BLOCK);
    let long = Duration::from_secs(9);
    let first = watcher.watch(0, long).expect("answered");
    assert!(first.namespaces.is_empty(), "nothing was invalidated yet");
    let begun = Instant::now();
    let again = watcher
        .watch(first.sequence, Duration::from_millis(50))
        .expect("answered");
    assert_eq!(again, first);
    assert!(begun.elapsed() >= Duration::from_millis(50), "it waited");

    let watching = std::thread::spawn({
        let watcher = watcher.clone();
        move || (watcher.watch(first.sequence, long), Instant::now())
    });
    std::thread::sleep(Duration::from_millis(50));
    let raised = client.invalidate("a").expect("answered");
    let invalidated = Instant::now();
    let (told, at) = watching.join().expect("no panic");
    let told = told.expect("answered");
    assert_eq!(told.namespaces, [("a".to_owned(), raised)]);
    assert!(
        at.saturating_duration_since(invalidated) < Duration::from_secs(5),
        "not only when the time was over"
    );
    assert_ne!(told.sequence, first.sequence);
    // Of another run's sequence nothing is known.
    assert_eq!(watcher.watch(first.sequence, long).expect("answered"), told);
}

#[test]
fn a_cache_is_listed_as_unconfirmed_until_it_confirms_the_generation_in_force() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    let space = namespace(&client, "a");
    let present = space.generation().expect("answered");
    assert_eq!(client.confirm("a", present, "lmcache-l1").expect("answered"), present);
    let raised = client.invalidate("a").expect("answered");
    let listed = || {
        let domains = node.status().domains;
        let processors = domains.into_iter().flat_map(|domain| domain.processors);
        processors
            .map(|cache| (cache.processor, cache.confirmed_generation, cache.generation))
            .collect::<Vec<_>>()
    };
    assert_eq!(listed(), [("lmcache-l1".to_owned(), present.0, raised.0)]);
    client.confirm("a", raised, "lmcache-l1").expect("answered");
    assert_eq!(listed(), [("lmcache-l1".to_owned(), raised.0, raised.0)]);
    for (name, generation) in [("a", kvtier::Generation(raised.0 + 1)), ("nobody", raised)] {
        let refused = client.confirm(name, generation, "lmcache-l1").expect_err("cannot be");
        assert_eq!(refused.kind, ErrorKind::Invalid);
    }
}

#[test]
fn clients_of_another_token_see_nothing_of_a_domain() {
    let directory = Directory::new();
    let domain = |name: &str, token: &str| {
        DomainSettings {
            name: name.into(),
            ..Default::default()
        }
        .with_token(token)
    };
    let domains = vec![domain("a", "token-a"), domain("b", "token-b")];
    let node = start(Settings {
        domains,
        ..directory.settings()
    });
    let with = |token: &str| Client::connect(ClientOptions::new(node.socket()).with_token(token));
    let (first, second) = (with("token-a").expect("a"), with("token-b").expect("b"));
    let (space, same_name) = (namespace(&first, "tenant"), namespace(&second, "tenant"));
    put(&space, 0..4, BLOCK);
    assert!(same_name.lookup(&[hash(0)]).expect("answered")[0].is_none());
    assert!(same_name.get(&[hash(0)], FetchScope::Each).expect("answered")[0].is_none());
    node.invalidate("b/tenant", Duration::from_secs(5)).expect("recorded");
    assert!(space.exists(hash(0)).expect("answered"));
    let error = with("token-c").expect_err("nobody's token");
    assert_eq!(error.kind, ErrorKind::Denied);
}

#[test]
fn a_client_that_vanishes_leaves_nothing_behind() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    let space = namespace(&client, "tenant");
    put(&space, 0..4, BLOCK);
    let handles = space.get(&[hash(0), hash(1)], FetchScope::Prefix).expect("answered");
    assert_eq!(node.status().counters.leases, 2);
    drop(handles);
    drop(space);
    drop(client);
    wait_until("leases and reservations are given back", || {
        let counters = node.status().counters;
        counters.leases + counters.reservations + counters.quarantined_slots + counters.clients == 0
    });
}

#[test]
fn a_drained_node_flushes_and_refuses_new_leases() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    let space = namespace(&client, "tenant");
    put(&space, 0..4, BLOCK);
    drop((space, client));
    let report = node.drain_and_stop(Duration::from_secs(10));
    let flush = report.flush.expect("the flush ended");
    assert_eq!((report.held, flush.written, flush.left_out), (0, 4, 0));
}

#[test]
fn a_second_node_on_the_same_directory_refuses() {
    let directory = Directory::new();
    let _node = start(directory.settings());
    let socket = directory.0.join("other.sock");
    let again = Settings {
        socket,
        ..directory.settings()
    }
    .check()
    .expect("good settings");
    let error = Node::start(again, Box::new(|_| {}))
        .err()
        .expect("the directory is taken");
    assert!(error.to_string().contains("in use"), "{error}");
}

#[test]
fn a_socket_is_its_owners_alone_or_as_wide_as_the_settings_say() {
    use std::os::unix::fs::PermissionsExt;
    for mode in [0o600, 0o666] {
        let directory = Directory::new();
        let settings = Settings {
            socket_mode: mode,
            nvme_bytes: 0,
            ..directory.settings()
        };
        let node = start(settings);
        let found = std::fs::metadata(node.socket()).expect("a socket").permissions().mode();
        assert_eq!(found & 0o777, mode, "{found:o}");
    }
}

/// A node that the same user starts again where another one was.
fn restart(node: Node, settings: Settings) -> Node {
    drop(node);
    start(settings)
}

#[test]
fn a_generation_is_still_raised_after_a_restart() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    namespace(&client, "kept");
    let space = namespace(&client, "raised");
    put(&space, 0..4, BLOCK);
    for expected in [2, 3] {
        let raised = node.invalidate("raised", Duration::from_secs(5)).expect("recorded");
        assert_eq!(raised[0].1.0, expected);
    }
    drop((space, client));
    let node = restart(node, directory.settings());
    assert_eq!(node.status().counters.namespaces, 2);
    let raised = node.invalidate("raised", Duration::from_secs(5)).expect("recorded");
    assert_eq!(raised[0].1.0, 4, "it goes on where it was");
    let raised = node.invalidate("kept", Duration::from_secs(5)).expect("recorded");
    assert_eq!(raised[0].1.0, 2);
}

#[test]
fn the_same_name_in_two_domains_stays_two_namespaces_across_a_restart() {
    let directory = Directory::new();
    let domain = |name: &str| {
        DomainSettings {
            name: name.into(),
            ..Default::default()
        }
        .with_token(&format!("token-{name}"))
    };
    let settings = |names: &[&str]| Settings {
        domains: names.iter().map(|name| domain(name)).collect(),
        ..directory.settings()
    };
    let open_in = |node: &Node, name: &str| {
        let options = ClientOptions::new(node.socket()).with_token(format!("token-{name}"));
        let client = Client::connect(options).expect("a client connects");
        let space = namespace(&client, "tenant");
        (client, space)
    };
    let node = start(settings(&["a", "b"]));
    let (first, second) = (open_in(&node, "a"), open_in(&node, "b"));
    put(&first.1, 0..2, BLOCK);
    node.invalidate("b/tenant", Duration::from_secs(5)).expect("recorded");
    drop((first, second));
    // The other way round, and with one more before them: domains are told by name, not by place.
    let node = restart(node, settings(&["c", "b", "a"]));
    assert_eq!(node.status().counters.namespaces, 2);
    let (first, second) = (open_in(&node, "a"), open_in(&node, "b"));
    assert_eq!(node.status().counters.namespaces, 2, "both were there already");
    put(&first.1, 0..2, BLOCK);
    assert!(!second.1.exists(hash(0)).expect("answered"));
    let raised = |name: &str| node.invalidate(name, Duration::from_secs(5)).expect("recorded")[0].1.0;
    assert_eq!((raised("a/tenant"), raised("b/tenant")), (2, 3));
}

#[test]
fn a_namespace_whose_domain_left_the_settings_keeps_its_number() {
    let directory = Directory::new();
    let domain = DomainSettings {
        name: "gone".into(),
        ..Default::default()
    }
    .with_token("token");
    let node = start(Settings {
        domains: vec![domain],
        ..directory.settings()
    });
    let client = Client::connect(ClientOptions::new(node.socket()).with_token("token")).expect("connects");
    namespace(&client, "tenant");
    drop(client);
    let node = restart(node, directory.settings());
    let client = connect(&node);
    let space = namespace(&client, "tenant");
    put(&space, 0..2, BLOCK);
    assert_eq!(node.status().counters.namespaces, 2);
    node.invalidate("gone/tenant", Duration::from_secs(5))
        .expect("an administrator may");
    assert!(space.exists(hash(0)).expect("answered"), "that was the other one");
}

#[test]
fn a_damaged_slot_is_counted_and_its_number_is_nobodys() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    for name in ["a", "b", "c"] {
        namespace(&client, name);
    }
    drop(client);
    drop(node);
    let path = directory.0.join("register");
    let mut bytes = std::fs::read(&path).expect("a register");
    for half in [4096 * 3, 4096 * 4] {
        bytes[half + 200] ^= 1;
    }
    std::fs::write(&path, bytes).expect("written");
    let warnings = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = std::sync::Arc::clone(&warnings);
    let observer = move |step| {
        if let kvtier::node::StartProgress::Warning(words) = step {
            seen.lock().expect("not poisoned").push(words);
        }
    };
    let node = Node::start(directory.settings().check().expect("good settings"), Box::new(observer));
    let node = node.expect("a node starts");
    let warnings = warnings.lock().expect("not poisoned");
    assert!(
        warnings.len() == 1 && warnings[0].contains("damaged slots 1:"),
        "{warnings:?}"
    );
    assert_eq!(node.status().durability.namespaces_lost, 1);
    let client = connect(&node);
    let spaces = ["a", "b", "c"].map(|name| namespace(&client, name));
    assert_eq!(node.status().counters.namespaces, 4, "b is a new one");
    for (space, first) in spaces.iter().zip([0, 10, 20]) {
        put(space, first..first + 2, BLOCK);
    }
    assert!(!spaces[0].exists(hash(10)).expect("answered"));
    assert!(spaces[1].exists(hash(10)).expect("answered"));
}

#[test]
fn a_node_does_not_start_with_the_wrong_master_key_or_a_newer_register_and_changes_nothing() {
    use std::os::unix::fs::PermissionsExt;
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    for name in ["one", "two"] {
        namespace(&client, name);
    }
    drop(client);
    drop(node);
    let key = directory.0.join("other.key");
    std::fs::write(&key, "5a".repeat(32)).expect("written");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).expect("its mode");
    let register = directory.0.join("register");
    let before = std::fs::read(&register).expect("a register");
    let refusal = |settings: Settings| {
        let settings = settings.check().expect("good settings");
        let refused = Node::start(settings, Box::new(|_| {})).err();
        refused.expect("refused").to_string()
    };
    let words = refusal(Settings {
        master_key_file: Some(key),
        ..directory.settings()
    });
    assert!(words.contains("wraps its keys by master key"), "{words}");
    assert_eq!(std::fs::read(&register).expect("a register"), before);
    let mut newer = before.clone();
    newer[8] = 2;
    std::fs::write(&register, &newer).expect("written");
    let words = refusal(directory.settings());
    assert!(words.contains("version 2"), "{words}");
    assert_eq!(std::fs::read(&register).expect("a register"), newer);
    std::fs::write(&register, &before).expect("written");
    let words = refusal(Settings {
        namespaces_max: 1,
        ..directory.settings()
    });
    assert!(
        words.contains("2 namespaces") && words.contains("raise namespaces_max"),
        "{words}"
    );
    start(directory.settings());
}

#[test]
fn what_was_flushed_is_got_back_after_a_restart_in_its_generation_and_form_only() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    let (kept, raised) = (namespace(&client, "kept"), namespace(&client, "raised"));
    let form = Realization::digest(&[("model", "another")]);
    let other = client.namespace("kept", form).expect("a namespace opens");
    put(&kept, 0..8, BLOCK);
    put(&raised, 0..8, BLOCK);
    put(&other, 100..104, BLOCK);
    let flushed = node.flush(Duration::from_secs(20)).expect("a flush ends");
    assert_eq!(flushed.left_out, 0, "{flushed:?}");
    node.invalidate("raised", Duration::from_secs(5)).expect("recorded");
    assert!(kept.delete(&[hash(7)]).expect("answered")[0]);
    node.flush(Duration::from_secs(20)).expect("a flush ends");
    drop((kept, raised, other, client));
    drop(node);

    let notes = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = std::sync::Arc::clone(&notes);
    let observer = move |step| {
        if let kvtier::node::StartProgress::Note(words) = step {
            seen.lock().expect("not poisoned").push(words);
        }
    };
    let settings = directory.settings().check().expect("good settings");
    let node = Node::start(settings, Box::new(observer)).expect("a node starts");
    let notes = notes.lock().expect("not poisoned");
    assert!(
        notes.iter().any(|note| note.starts_with("restored 11 blocks")),
        "{notes:?}"
    );
    let durability = node.status().durability;
    assert_eq!(durability.restored_blocks, 11, "{durability:?}");
    assert_eq!(durability.restored_bytes, 11 * BLOCK as u64);
    assert!(durability.restored_left_out >= 8, "{durability:?}");
    assert_eq!(durability.restored_damaged, 0, "{durability:?}");
    let client = connect(&node);
    let (kept, raised) = (namespace(&client, "kept"), namespace(&client, "raised"));
    let other = client.namespace("kept", form).expect("a namespace opens");
    let handles = kept
        .get(&(0..8).map(hash).collect::<Vec<_>>(), FetchScope::Each)
        .expect("answered");
    for (number, handle) in (0..).zip(&handles) {
        assert_eq!(handle.is_some(), number < 7, "block {number}");
        if let Some(handle) = handle {
            assert_eq!(handle.tier(), Tier::Nvme);
            assert_eq!(handle.slice().to_vec(), bytes(number, BLOCK), "block {number}");
        }
    }
    for number in 0..8 {
        assert!(
            !raised.exists(hash(number)).expect("answered"),
            "block {number} was invalidated"
        );
    }
    assert!(!other.exists(hash(0)).expect("answered"), "of another form");
    assert!(other.exists(hash(100)).expect("answered"));
    assert!(!kept.exists(hash(100)).expect("answered"), "of another form");
}

#[test]
fn without_its_keys_nothing_of_an_earlier_run_is_found() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    let space = namespace(&client, "tenant");
    put(&space, 0..8, BLOCK);
    node.flush(Duration::from_secs(20)).expect("a flush ends");
    drop((space, client));
    drop(node);
    for name in ["register", "realizations", "master.key"] {
        std::fs::remove_file(directory.0.join(name)).expect("removed");
    }
    let node = start(directory.settings());
    let durability = node.status().durability;
    assert_eq!(
        (durability.restored_blocks, durability.restored_left_out),
        (0, 8),
        "{durability:?}"
    );
    let client = connect(&node);
    let space = namespace(&client, "tenant");
    assert!(!space.exists(hash(0)).expect("answered"));
    put(&space, 0..8, BLOCK);
    node.flush(Duration::from_secs(20)).expect("a flush ends");
    drop((space, client));
    let node = restart(node, directory.settings());
    assert_eq!(node.status().durability.restored_blocks, 8);
}

#[test]
fn a_lost_list_of_realizations_never_shows_one_models_bytes_as_anothers() {
    let directory = Directory::new();
    let node = start(directory.settings());
    let client = connect(&node);
    let form = |name: &str| Realization::digest(&[("model", name)]);
    let space = client.namespace("tenant", form("first")).expect("opens");
    put(&space, 0..8, BLOCK);
    node.flush(Duration::from_secs(20)).expect("a flush ends");
    drop((space, client));
    drop(node);
    std::fs::remove_file(directory.0.join("realizations")).expect("removed");
    let node = start(directory.settings());
    let client = connect(&node);
    // It gets the id that the first one had.
    let space = client.namespace("tenant", form("second")).expect("opens");
    for number in 0..8 {
        assert!(!space.exists(hash(number)).expect("answered"), "block {number}");
    }
    assert_eq!(node.status().durability.restored_blocks, 0);
}
