use std::time::{Duration, Instant};

use crate::fake_node::{FakeNode, State};
use crate::{bytes, hash};
use kvtier::client::blocking::{Client, Namespace};
use kvtier::client::{ClientOptions, FetchScope, GetOutcome, Lineage, PutOutcome, Writing};
use kvtier::wire::Kind;
use kvtier::{BlockHash, ErrorKind, Hints, Parent, Realization, Tier};

fn connect(node: &FakeNode) -> (Client, Namespace) {
    connect_with(node, |options| options)
}

fn connect_with(node: &FakeNode, change: impl Fn(ClientOptions) -> ClientOptions) -> (Client, Namespace) {
    let options = ClientOptions::new(node.socket()).with_timeout(Duration::from_secs(5));
    let client = Client::connect(change(options)).expect("connected");
    let namespace = client.namespace("tenant", Realization::default()).expect("opened");
    (client, namespace)
}

fn put(namespace: &Namespace, numbers: std::ops::Range<u32>, length: usize) -> Vec<PutOutcome> {
    let sources: Vec<Vec<u8>> = numbers.clone().map(|number| bytes(number, length)).collect();
    let blocks: Vec<(BlockHash, &[u8])> = numbers.map(hash).zip(sources.iter().map(Vec::as_slice)).collect();
    namespace.put_from(Parent::Root, &blocks, 512).expect("answered")
}

fn read(namespace: &Namespace, numbers: std::ops::Range<u32>, length: usize) {
    let hashes: Vec<BlockHash> = numbers.clone().map(hash).collect();
    let mut targets = vec![vec![0; length + 3]; hashes.len()];
    let mut slices: Vec<&mut [u8]> = targets.iter_mut().map(Vec::as_mut_slice).collect();
    let outcomes = namespace.get_into(&hashes, &mut slices).expect("answered");
    let hit = GetOutcome::Hit {
        length: u32::try_from(length).expect("short"),
        tier: Tier::Host,
    };
    assert_eq!(outcomes, vec![hit; hashes.len()]);
    for (number, target) in numbers.zip(&targets) {
        assert_eq!(target[..length], bytes(number, length));
        assert_eq!(target[length..], [0, 0, 0], "nothing is written past the block");
    }
}

#[test]
fn what_was_put_is_read_back_and_misses_are_answers() {
    let node = FakeNode::start("round");
    let (_client, namespace) = connect(&node);
    assert_eq!(put(&namespace, 0..5, 10_000), vec![PutOutcome::Published; 5]);
    read(&namespace, 0..5, 10_000);
    assert_eq!(
        namespace.lookup(&[hash(0), hash(77)]).expect("answered"),
        vec![Some(Tier::Host), None]
    );
    assert!(namespace.exists(hash(4)).expect("answered"));
    let mut short = [0; 10];
    let mut targets: [&mut [u8]; 2] = [&mut [], &mut short];
    let outcomes = namespace
        .get_into(&[hash(99), hash(1)], &mut targets)
        .expect("answered");
    assert_eq!(
        outcomes,
        vec![GetOutcome::Miss, GetOutcome::TooSmall { length: 10_000 }]
    );
    assert_eq!(short, [0; 10], "a target that is too small is not touched");
    assert_eq!(
        namespace.delete(&[hash(0), hash(99)]).expect("answered"),
        vec![true, false]
    );
}

#[test]
fn a_batch_carries_each_blocks_parent_and_tokens() {
    let node = FakeNode::start("parents");
    let (_client, namespace) = connect(&node);
    put(&namespace, 0..3, 4096);
    let data = bytes(9, 4096);
    namespace
        .put_from(Lineage::Independent, &[(hash(8), &data), (hash(9), &data)], 1)
        .expect("answered");
    let items = node.state().items.clone();
    let parents: Vec<Parent> = items.iter().map(|item| item.parent).collect();
    assert_eq!(
        parents,
        [
            Parent::Root,
            Parent::Block(hash(0)),
            Parent::Block(hash(1)),
            Parent::Unknown,
            Parent::Unknown
        ]
    );
    assert_eq!(items[0].tokens, 512);
}

#[test]
fn the_second_small_put_takes_one_trip() {
    let node = FakeNode::start("one-trip");
    let (_client, namespace) = connect(&node);
    assert_eq!(put(&namespace, 0..1, 65_536), [PutOutcome::Published]);
    let before = node.state().requests.len();
    assert_eq!(put(&namespace, 1..2, 65_536), [PutOutcome::Published]);
    assert_eq!(node.state().requests[before..], [Kind::Seal]);
    read(&namespace, 0..2, 65_536);
}

#[test]
fn a_put_of_a_present_key_asks_first_and_seals_nothing() {
    let node = FakeNode::start("present");
    let (_client, namespace) = connect(&node);
    put(&namespace, 0..4, 8192);
    let before = node.state().requests.len();
    assert_eq!(put(&namespace, 0..4, 8192), vec![PutOutcome::Present; 4]);
    assert_eq!(node.state().requests[before..], [Kind::Reserve]);
}

#[test]
fn releases_ride_in_the_next_request() {
    let node = FakeNode::start("ride");
    let (_client, namespace) = connect(&node);
    put(&namespace, 0..3, 4096);
    let handles = namespace
        .get(&[hash(0), hash(1), hash(2)], FetchScope::Each)
        .expect("answered");
    assert_eq!(node.state().leases.len(), 3);
    let handle = handles[1].as_ref().expect("a hit");
    let mut target = vec![0; 5000];
    assert_eq!(handle.copy_to(&mut target).expect("copied"), 4096);
    assert_eq!(target[..4096], bytes(1, 4096));
    assert!(handle.touch_pages().is_ok());
    let before = node.state().count(Kind::Release);
    drop(handles);
    namespace.lookup(&[hash(0)]).expect("answered");
    let state = node.state();
    assert_eq!((state.leases.len(), state.foreign), (0, 0));
    // The keeper may have been as quick, on a machine that stalls for 10 ms between two lines.
    assert!(state.count(Kind::Release) <= before + 1);
}

#[test]
fn releases_that_no_request_takes_along_are_sent_alone() {
    let node = FakeNode::start("alone");
    let (client, namespace) = connect(&node);
    put(&namespace, 0..1, 4096);
    for _ in 0..3 {
        read(&namespace, 0..1, 4096);
        node.wait("the release", |state| state.leases.is_empty());
        // Long enough for the keeper to fall asleep: the next one must wake it.
        std::thread::sleep(Duration::from_millis(150));
    }
    assert_eq!(node.state().foreign, 0);
    drop(client);
}

#[test]
fn a_stale_generation_is_learnt_and_the_put_asked_again() {
    let node = FakeNode::start("stale");
    let (_client, namespace) = connect(&node);
    put(&namespace, 0..2, 4096);
    {
        let mut state = node.state();
        state.generation = 9;
        state.blocks.clear();
    }
    assert_eq!(put(&namespace, 2..4, 4096), vec![PutOutcome::Published; 2]);
    assert_eq!(namespace.generation().expect("open").0, 9);
    read(&namespace, 2..4, 4096);
    // What was known of the older generation is forgotten.
    assert_eq!(put(&namespace, 0..2, 4096), vec![PutOutcome::Published; 2]);
}

#[test]
fn a_writer_opened_before_an_invalidation_seals_stale() {
    let node = FakeNode::start("writer");
    let (client, namespace) = connect(&node);
    let open = |number| match namespace.writer(hash(number), Parent::Root, 6000, 7).expect("answered") {
        Writing::Open(writer) => writer,
        other => panic!("a slot, not {other:?}"),
    };
    let mut writer = open(0);
    writer.write(0, &bytes(0, 6000)).expect("fits");
    assert_eq!(
        writer.write(5999, &[1, 2]).expect_err("too long").kind,
        ErrorKind::Invalid
    );
    assert_eq!(writer.seal().expect("answered"), PutOutcome::Published);
    read(&namespace, 0..1, 6000);
    assert!(matches!(
        namespace.writer(hash(0), Parent::Root, 6000, 7).expect("answered"),
        Writing::Present
    ));
    let late = open(1);
    client.invalidate("tenant").expect("answered");
    assert_eq!(late.seal().expect("answered"), PutOutcome::Stale);
    // Dropped unsealed: the slot goes back.
    drop(open(2));
    node.wait("the slot", |state| {
        state.abandoned == 1 && state.reservations.is_empty()
    });
    assert_eq!(node.state().foreign, 0);
}

#[test]
fn a_put_larger_than_the_nodes_bound_goes_in_rounds() {
    let node = FakeNode::start("rounds");
    node.state().slots_max = 3;
    let (_client, namespace) = connect(&node);
    assert_eq!(put(&namespace, 0..10, 4096), vec![PutOutcome::Published; 10]);
    read(&namespace, 0..10, 4096);
}

#[test]
fn a_large_put_seals_its_last_block_apart_with_what_was_copied_meanwhile() {
    let node = FakeNode::start("apart");
    let (_client, namespace) = connect(&node);
    let length = (1 << 20) + 12_345;
    assert_eq!(put(&namespace, 0..4, length), vec![PutOutcome::Published; 4]);
    let puts = |state: &State| {
        let is_put = |kind: &&Kind| matches!(kind, Kind::Reserve | Kind::Seal);
        state.requests.iter().filter(is_put).copied().collect::<Vec<Kind>>()
    };
    assert_eq!(puts(&node.state()), [Kind::Reserve, Kind::Seal, Kind::Seal]);
    let parents: Vec<Parent> = node.state().items.iter().map(|item| item.parent).collect();
    assert_eq!(parents[3], Parent::Block(hash(2)));
    read(&namespace, 0..4, length);
}

#[test]
fn a_batch_over_the_message_limit_is_cut() {
    let node = FakeNode::start("large");
    let (_client, namespace) = connect_with(&node, |options| ClientOptions {
        put_bytes_max: 1 << 20,
        ..options
    });
    assert_eq!(put(&namespace, 0..5000, 1024), vec![PutOutcome::Published; 5000]);
    let hashes: Vec<BlockHash> = (0..9000).map(hash).collect();
    let found = namespace.lookup(&hashes).expect("answered");
    assert_eq!(found.iter().filter(|tier| tier.is_some()).count(), 5000);
    assert_eq!(node.state().count(Kind::Lookup), 3);
    let prefix = namespace.get(&hashes, FetchScope::Prefix).expect("answered");
    assert_eq!((prefix.len(), prefix.iter().flatten().count()), (9000, 5000));
    assert_eq!(
        node.state().count(Kind::Fetch),
        2,
        "nothing behind the first miss is asked for"
    );
}

#[test]
fn an_empty_or_oversized_block_is_invalid_and_the_others_go() {
    let node = FakeNode::start("invalid");
    let (_client, namespace) = connect(&node);
    let (good, huge) = (bytes(1, 4096), vec![0; (8 << 20) + 1]);
    let blocks: [(BlockHash, &[u8]); 3] = [(hash(0), &[]), (hash(1), &good), (hash(2), &huge)];
    let outcomes = namespace.put_from(Parent::Unknown, &blocks, 16).expect("answered");
    assert_eq!(
        outcomes,
        [PutOutcome::Invalid, PutOutcome::Published, PutOutcome::Invalid]
    );
    assert_eq!(
        namespace.get_into(&[hash(1)], &mut []).expect_err("no target").kind,
        ErrorKind::Invalid
    );
}

#[test]
fn a_node_that_does_not_answer_is_unavailable_and_the_next_call_connects_again() {
    let node = FakeNode::start("mute");
    let (_client, namespace) = connect_with(&node, |options| ClientOptions {
        timeout: Duration::from_millis(400),
        ..options
    });
    put(&namespace, 0..1, 4096);
    let handle = namespace
        .get(&[hash(0)], FetchScope::Each)
        .expect("answered")
        .remove(0)
        .expect("a hit");
    node.state().mute = vec![Kind::Lookup];
    let start = Instant::now();
    let error = namespace.lookup(&[hash(0)]).expect_err("nobody answers");
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
    assert!(start.elapsed() >= Duration::from_millis(400));
    node.state().mute.clear();
    assert_eq!(
        namespace.lookup(&[hash(0)]).expect("connected again"),
        [Some(Tier::Host)]
    );
    assert_eq!(node.state().connections, 2);
    // What was leased over the first connection is refused, yet still mapped.
    assert_eq!(handle.copy_to(&mut [0; 4096]).expect_err("old").kind, ErrorKind::Closed);
    assert_eq!(handle.slice().to_vec(), bytes(0, 4096));
    drop(handle);
    read(&namespace, 0..1, 4096);
    assert_eq!(
        node.state().foreign,
        0,
        "an old lease is not released over the new connection"
    );
}

#[test]
fn a_node_that_names_memory_it_did_not_share_is_refused() {
    let node = FakeNode::start("lies");
    let (_client, namespace) = connect(&node);
    node.state().lies = true;
    let data = bytes(0, 4096);
    let error = namespace
        .put_from(Parent::Root, &[(hash(0), &data)], 1)
        .expect_err("a lie");
    assert_eq!(error.kind, ErrorKind::Internal, "{error}");
    node.state().lies = false;
    assert_eq!(put(&namespace, 0..1, 4096), [PutOutcome::Published]);
}

#[test]
fn wrong_credentials_and_a_missing_node_name_the_remedy() {
    let node = FakeNode::start("denied");
    let denied = Client::connect(ClientOptions::new(node.socket()).with_token("wrong")).expect_err("denied");
    assert_eq!(denied.kind, ErrorKind::Denied);
    let missing = Client::connect(ClientOptions::new("/nonexistent/kvtier.sock")).expect_err("nobody");
    assert_eq!(missing.kind, ErrorKind::Unavailable);
    assert!(missing.message.contains("kv-daemon"), "{missing}");
}

#[test]
fn goodbye_waits_for_handles_and_then_closes_every_clone() {
    let node = FakeNode::start("goodbye");
    let (client, namespace) = connect(&node);
    put(&namespace, 0..1, 4096);
    let handles = namespace.get(&[hash(0)], FetchScope::Each).expect("answered");
    assert_eq!(
        client.clone().goodbye().expect_err("a handle exists").kind,
        ErrorKind::Invalid
    );
    drop(handles);
    client.goodbye().expect("answered");
    let state = node.state();
    assert_eq!((state.leases.len(), state.reservations.len()), (0, 0));
    drop(state);
    assert_eq!(
        namespace.lookup(&[hash(0)]).expect_err("closed").kind,
        ErrorKind::Closed
    );
}

#[test]
fn the_last_handle_says_goodbye() {
    let node = FakeNode::start("last");
    let (client, namespace) = connect(&node);
    put(&namespace, 0..1, 4096);
    let handles = namespace.get(&[hash(0)], FetchScope::Each).expect("answered");
    drop((client, namespace));
    assert_eq!(node.state().count(Kind::Goodbye), 0);
    assert_eq!(handles[0].as_ref().expect("a hit").slice().to_vec(), bytes(0, 4096));
    drop(handles);
    node.wait("goodbye", |state| state.count(Kind::Goodbye) == 1);
}

#[test]
fn hints_clock_status_and_flush_pass_through() {
    let node = FakeNode::start("rest");
    let (client, namespace) = connect(&node);
    client.set_clock(123_456);
    namespace
        .with_hints(Hints {
            session: Some(7),
            ..Hints::default()
        })
        .lookup(&[hash(0)])
        .expect("answered");
    assert_eq!(node.state().clock_ns, 123_456);
    assert_eq!(client.status().expect("answered"), "{\"blocks\":0}");
    let flushed = client.flush().expect("answered");
    assert_eq!((flushed.written, flushed.left_out), (5, 1));
    assert_eq!(client.welcome().expect("connected").batch_keys_max, 4096);
    assert_eq!(
        client.namespace("", Realization::default()).expect_err("no name").kind,
        ErrorKind::Invalid
    );
}

#[test]
fn what_exists_is_asked_on_request_only_and_a_lookup_is_explained() {
    let node = FakeNode::start("raw");
    let (_client, namespace) = connect(&node);
    put(&namespace, 0..1, 4096);
    assert!(namespace.exists(hash(0)).expect("answered"));
    assert_eq!(node.state().raw, 0);
    let found = namespace.lookup_raw(&[hash(0), hash(1)]).expect("answered");
    assert_eq!((found[0].is_some(), found[1].is_some()), (true, false));
    assert_eq!(node.state().raw, 1);
    assert_eq!(
        namespace.explain(&[hash(0), hash(1)]).expect("answered"),
        "{\"blocks\":2}"
    );
    let many = vec![hash(0); 4097];
    assert_eq!(namespace.explain(&many).expect_err("refused").kind, ErrorKind::Invalid);
    assert_eq!(node.state().raw, 1);
}

#[test]
fn threads_share_one_connection() {
    let node = FakeNode::start("threads");
    let (_client, namespace) = connect(&node);
    std::thread::scope(|scope| {
        for thread in 0..4u32 {
            let namespace = &namespace;
            scope.spawn(move || {
                for round in 0..20 {
                    let first = thread * 1000 + round * 4;
                    assert_eq!(put(namespace, first..first + 4, 4096), vec![PutOutcome::Published; 4]);
                    read(namespace, first..first + 4, 4096);
                }
            });
        }
    });
    assert_eq!(node.state().foreign, 0);
}

#[test]
fn slots_that_nobody_uses_are_given_back_before_they_expire() {
    let node = FakeNode::start("unused");
    node.state().reservation_ttl_ms = 400;
    let (_client, namespace) = connect(&node);
    put(&namespace, 0..3, 4096);
    assert_eq!(node.state().reservations.len(), 3, "granted ahead");
    node.wait("the slots", |state| state.reservations.is_empty());
    assert_eq!(node.state().abandoned, 3);
    assert_eq!(node.state().foreign, 0);
    assert_eq!(put(&namespace, 3..6, 4096), vec![PutOutcome::Published; 3]);
}
