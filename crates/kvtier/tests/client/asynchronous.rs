//! The client for tasks.

use std::time::Duration;

use kvtier::client::{Client, ClientOptions, FetchScope, GetOutcome, Namespace, PutOutcome, Writing};
use kvtier::wire::Kind;
use kvtier::{BlockHash, ErrorKind, Parent, Realization, Tier};

use crate::fake_node::FakeNode;
use crate::{bytes, hash};

async fn connect(node: &FakeNode) -> (Client, Namespace) {
    let options = ClientOptions::new(node.socket()).with_timeout(Duration::from_secs(5));
    let client = Client::connect(options).await.expect("connected");
    let namespace = client
        .namespace("tenant", Realization::default())
        .await
        .expect("opened");
    (client, namespace)
}

async fn put(namespace: &Namespace, numbers: std::ops::Range<u32>, length: usize) -> Vec<PutOutcome> {
    let sources: Vec<Vec<u8>> = numbers.clone().map(|number| bytes(number, length)).collect();
    let blocks: Vec<(BlockHash, &[u8])> = numbers.map(hash).zip(sources.iter().map(Vec::as_slice)).collect();
    namespace.put_from(Parent::Root, &blocks, 512).await.expect("answered")
}

async fn read(namespace: &Namespace, numbers: std::ops::Range<u32>, length: usize) {
    let hashes: Vec<BlockHash> = numbers.clone().map(hash).collect();
    let mut targets = vec![vec![0; length]; hashes.len()];
    let mut slices: Vec<&mut [u8]> = targets.iter_mut().map(Vec::as_mut_slice).collect();
    let outcomes = namespace.get_into(&hashes, &mut slices).await.expect("answered");
    let hit = GetOutcome::Hit {
        length: u32::try_from(length).expect("short"),
        tier: Tier::Host,
    };
    assert_eq!(outcomes, vec![hit; hashes.len()]);
    for (number, target) in numbers.zip(&targets) {
        assert_eq!(*target, bytes(number, length));
    }
}

/// As [`FakeNode::wait`], without holding up the runtime that the client's tasks run in.
async fn wait(node: &FakeNode, what: &str, done: impl Fn(&FakeNode) -> bool) {
    for _ in 0..2000 {
        if done(node) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("waited for: {what}");
}

#[tokio::test]
async fn what_was_put_is_read_back_and_a_second_put_takes_one_trip() {
    let node = FakeNode::start("async-round");
    let (client, namespace) = connect(&node).await;
    assert_eq!(put(&namespace, 0..5, 10_000).await, vec![PutOutcome::Published; 5]);
    read(&namespace, 0..5, 10_000).await;
    let before = node.state().requests.len();
    assert_eq!(put(&namespace, 5..6, 10_000).await, [PutOutcome::Published]);
    assert_eq!(node.state().requests[before..], [Kind::Seal]);
    assert_eq!(put(&namespace, 5..6, 10_000).await, [PutOutcome::Present]);
    assert_eq!(
        namespace.lookup(&[hash(0), hash(77)]).await.expect("answered"),
        [Some(Tier::Host), None]
    );
    assert_eq!(
        namespace.delete(&[hash(0), hash(77)]).await.expect("answered"),
        [true, false]
    );
    assert_eq!(client.status().await.expect("answered"), "{\"blocks\":0}");
    assert_eq!(client.flush().await.expect("answered").written, 5);
    client.goodbye().await.expect("answered");
    assert_eq!(
        namespace.exists(hash(1)).await.expect_err("closed").kind,
        ErrorKind::Closed
    );
    assert_eq!(node.state().foreign, 0);
}

#[tokio::test]
async fn many_requests_are_in_flight_on_one_connection() {
    let node = FakeNode::start("async-many");
    let (_client, namespace) = connect(&node).await;
    let tasks: Vec<_> = (0..32u32)
        .map(|task| {
            let namespace = namespace.clone();
            tokio::spawn(async move {
                let numbers = task * 100..task * 100 + 3;
                assert_eq!(
                    put(&namespace, numbers.clone(), 4096).await,
                    vec![PutOutcome::Published; 3]
                );
                read(&namespace, numbers, 4096).await;
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    let state = node.state();
    assert_eq!((state.connections, state.foreign), (1, 0));
}

#[tokio::test]
async fn a_dropped_future_gives_back_what_its_answer_leases() {
    let node = FakeNode::start("async-dropped");
    let (_client, namespace) = connect(&node).await;
    put(&namespace, 0..3, 4096).await;
    node.state().delay = Duration::from_millis(40);
    let hashes = [hash(0), hash(1), hash(2)];
    let fetch = namespace.get(&hashes, FetchScope::Each);
    tokio::time::timeout(Duration::from_millis(10), fetch)
        .await
        .expect_err("the answer takes longer");
    let data = bytes(9, 4096);
    let blocks: [(BlockHash, &[u8]); 1] = [(hash(9), &data)];
    let writing = namespace.put_from(Parent::Root, &blocks, 1);
    tokio::time::timeout(Duration::from_millis(10), writing)
        .await
        .expect_err("the answer takes longer");
    let opening = namespace.writer(hash(10), Parent::Root, 4096, 1);
    tokio::time::timeout(Duration::from_millis(10), opening)
        .await
        .expect_err("the answer takes longer");
    wait(&node, "all three", |node| node.state().count(Kind::Reserve) == 2).await;
    wait(&node, "the leases", |node| node.state().leases.is_empty()).await;
    wait(&node, "the slot", |node| node.state().abandoned > 0).await;
    node.state().delay = Duration::ZERO;
    read(&namespace, 0..3, 4096).await;
}

#[tokio::test]
async fn a_writer_publishes_what_it_wrote_in_place() {
    let node = FakeNode::start("async-writer");
    let (client, namespace) = connect(&node).await;
    let blocks = [(hash(0), 6000), (hash(1), 5000)];
    let mut writers = Vec::new();
    for writing in namespace.writers(Parent::Root, &blocks, 7).await.expect("answered") {
        let Writing::Open(writer) = writing else {
            panic!("a slot, not {writing:?}")
        };
        writers.push(writer);
    }
    writers[0].write(0, &bytes(0, 6000)).expect("fits");
    writers[1].write(0, &bytes(1, 5000)).expect("fits");
    assert_eq!(
        client.clone().goodbye().await.expect_err("writers exist").kind,
        ErrorKind::Invalid
    );
    assert_eq!(
        namespace.seal(writers).await.expect("answered"),
        [PutOutcome::Published, PutOutcome::Published]
    );
    read(&namespace, 0..1, 6000).await;
    read(&namespace, 1..2, 5000).await;
    let parents: Vec<Parent> = node.state().items.iter().map(|item| item.parent).collect();
    assert_eq!(parents, [Parent::Root, Parent::Block(hash(0))]);
}

#[tokio::test]
async fn a_silent_node_is_unavailable_and_the_next_call_connects_again() {
    let node = FakeNode::start("async-mute");
    let options = ClientOptions::new(node.socket()).with_timeout(Duration::from_millis(400));
    let client = Client::connect(options).await.expect("connected");
    let namespace = client
        .namespace("tenant", Realization::default())
        .await
        .expect("opened");
    put(&namespace, 0..1, 4096).await;
    let handle = namespace
        .get(&[hash(0)], FetchScope::Each)
        .await
        .expect("answered")
        .remove(0)
        .expect("a hit");
    node.state().mute = vec![Kind::Lookup];
    assert_eq!(
        namespace.lookup(&[hash(0)]).await.expect_err("late").kind,
        ErrorKind::Unavailable
    );
    node.state().mute.clear();
    assert!(namespace.exists(hash(0)).await.expect("connected again"));
    assert_eq!(node.state().connections, 2);
    assert_eq!(handle.copy_to(&mut [0; 4096]).expect_err("old").kind, ErrorKind::Closed);
    drop(handle);
    read(&namespace, 0..1, 4096).await;
    assert_eq!(node.state().foreign, 0);
}

#[tokio::test]
async fn what_exists_is_asked_on_request_only_and_a_lookup_is_explained() {
    let node = FakeNode::start("async-raw");
    let (_client, namespace) = connect(&node).await;
    put(&namespace, 0..1, 4096).await;
    assert!(namespace.exists(hash(0)).await.expect("answered"));
    assert_eq!(node.state().raw, 0);
    let found = namespace.lookup_raw(&[hash(0), hash(1)]).await.expect("answered");
    assert_eq!((found[0].is_some(), found[1].is_some()), (true, false));
    assert_eq!(node.state().raw, 1);
    let explained = namespace.explain(&[hash(0), hash(1)]).await;
    assert_eq!(explained.expect("answered"), "{\"blocks\":2}");
    let many = vec![hash(0); 4097];
    let refused = namespace.explain(&many).await.expect_err("refused");
    assert_eq!(refused.kind, kvtier::ErrorKind::Invalid);
}

#[tokio::test]
async fn releases_are_sent_alone_and_the_last_handle_says_goodbye() {
    let node = FakeNode::start("async-last");
    let (client, namespace) = connect(&node).await;
    put(&namespace, 0..1, 4096).await;
    for _ in 0..2 {
        read(&namespace, 0..1, 4096).await;
        wait(&node, "the release", |node| node.state().leases.is_empty()).await;
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    let handles = namespace.get(&[hash(0)], FetchScope::Each).await.expect("answered");
    drop((client, namespace));
    assert_eq!(node.state().count(Kind::Goodbye), 0);
    drop(handles);
    wait(&node, "goodbye", |node| node.state().count(Kind::Goodbye) == 1).await;
}

#[tokio::test]
async fn slots_that_nobody_uses_are_given_back_before_they_expire() {
    let node = FakeNode::start("async-unused");
    node.state().reservation_ttl_ms = 400;
    let (_client, namespace) = connect(&node).await;
    put(&namespace, 0..3, 4096).await;
    assert_eq!(node.state().reservations.len(), 3, "granted ahead");
    wait(&node, "the slots", |node| node.state().reservations.is_empty()).await;
    assert_eq!(node.state().abandoned, 3);
    assert_eq!(node.state().foreign, 0);
}
