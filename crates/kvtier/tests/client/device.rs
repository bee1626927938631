//! Blocks between an engine's pages on a device and a node, on the software device.

use std::sync::Arc;
use std::time::Duration;

use crate::fake_node::FakeNode;
use crate::hash;
use kvtier::client::blocking::{Client, DeviceCache, Namespace};
use kvtier::client::{ClientOptions, FetchScope, GetOutcome, PutOutcome};
use kvtier::wire::Kind;
use kvtier::{ErrorKind, Parent, Realization, Tier};
use kvtier_transfer::gpu::{Copy, Cuda, DeviceSlice, Gpu, KvLayout, KvOrder, KvParts, Place};
use kvtier_transfer::memory::MemoryRegion;

const WELL: usize = 0;
const BREAKS: usize = 3;
const REFUSES: usize = 4;

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

/// Whether the software device's driver is there to do what a case needs; says so where the system's is asked for.
fn is_software() -> bool {
    let is_software = !std::env::var("KVTIER_GPU").is_ok_and(|kind| kind == "real");
    if !is_software {
        println!("not executed: it is about what the software device does");
    }
    is_software
}

fn gpu(number: usize) -> Arc<Gpu> {
    let program = std::env::current_exe().expect("a program");
    let cuda = Cuda::open_at(&program.with_file_name("libkvtier_softgpu.so")).expect("the software device");
    cuda.device(number).expect("a device")
}

fn connect(node: &FakeNode) -> (Client, Namespace) {
    let options = ClientOptions::new(node.socket()).with_timeout(Duration::from_secs(5));
    let client = Client::connect(options).expect("connected");
    let namespace = client.namespace("tenant", Realization::default()).expect("opened");
    (client, namespace)
}

/// An engine's tensors, with what lies in them.
struct Engine {
    gpu: Arc<Gpu>,
    tensors: Vec<DeviceSlice>,
}

impl Engine {
    fn new(number: usize, seed: usize) -> Engine {
        let gpu = gpu(number);
        let (count, bytes) = LAYOUT.tensors().expect("a layout");
        let tensor = |_| gpu.allocate(bytes).expect("memory").slice(0, bytes).expect("all");
        let tensors: Vec<DeviceSlice> = (0..count).map(tensor).collect();
        let engine = Engine { gpu, tensors };
        let stream = engine.gpu.stream().expect("a stream");
        for (number, tensor) in engine.tensors.iter().enumerate() {
            let region = MemoryRegion::anonymous(bytes.next_multiple_of(4096)).expect("memory");
            let source = region.slice(0, bytes).expect("inside");
            let rows: Vec<u8> = (0..2 * 8)
                .flat_map(|row| vec![((seed * 101 + number * 37 + row * 3) % 251) as u8; ROW])
                .collect();
            source.copy_from_slice(&rows).expect("equal");
            let copy = Copy {
                source: Place::Host(source),
                target: Place::Device(tensor.clone()),
            };
            stream.submit(vec![copy]).expect("taken").wait().expect("copied");
        }
        engine
    }

    fn cache(&self) -> DeviceCache {
        DeviceCache::new(&self.gpu, LAYOUT, self.tensors.clone()).expect("it fits")
    }

    /// The bytes of a page: each layer's keys and values.
    fn page(&self, page: usize) -> Vec<u8> {
        let stream = self.gpu.stream().expect("a stream");
        let mut bytes = Vec::new();
        for tensor in &self.tensors {
            for part in 0..2 {
                let region = MemoryRegion::anonymous(4096).expect("memory");
                let target = region.slice(0, ROW).expect("inside");
                let source = tensor.subslice((part * 8 + page) * ROW, ROW).expect("inside");
                let copy = Copy {
                    source: Place::Device(source),
                    target: Place::Host(target.clone()),
                };
                stream.submit(vec![copy]).expect("taken").wait().expect("copied");
                bytes.extend(target.to_vec());
            }
        }
        bytes
    }
}

fn hit(pages: u32) -> GetOutcome {
    GetOutcome::Hit {
        length: pages * PAGE,
        tier: Tier::Host,
    }
}

#[test]
fn pages_of_one_engine_come_back_into_pages_of_another() {
    if !is_software() {
        return;
    }
    let node = FakeNode::start("device-pages");
    let (_client, namespace) = connect(&node);
    // Whether or not the node's memory can be pinned.
    for (number, first) in [(WELL, 0), (REFUSES, 10)] {
        let (from, into) = (Engine::new(number, 1), Engine::new(number, 2));
        let before: Vec<Vec<u8>> = (0..8).map(|page| into.page(page)).collect();
        let outcomes = from.cache().put(
            &namespace,
            Parent::Root,
            &[(hash(first), &[3, 4]), (hash(first + 1), &[7])],
            32,
        );
        assert_eq!(outcomes.expect("put"), [PutOutcome::Published, PutOutcome::Published]);
        let outcomes = into.cache().get(
            &namespace,
            &[(hash(first), &[6, 1]), (hash(first + 1), &[0])],
            FetchScope::Prefix,
        );
        assert_eq!(outcomes.expect("got"), [hit(2), hit(1)]);
        for (target, source) in [(6, 3), (1, 4), (0, 7)] {
            assert!(into.page(target) == from.page(source), "page {source} in {target}");
        }
        for page in [2, 3, 4, 5, 7] {
            assert!(into.page(page) == before[page], "page {page} was not named");
        }
    }
}

#[test]
fn a_block_that_is_there_moves_no_bytes_and_a_miss_touches_no_page() {
    if !is_software() {
        return;
    }
    let node = FakeNode::start("device-present");
    let (_client, namespace) = connect(&node);
    let engine = Engine::new(WELL, 3);
    let cache = engine.cache();
    let put = |blocks: &[(kvtier::BlockHash, &[u32])]| cache.put(&namespace, Parent::Root, blocks, 16).expect("put");
    assert_eq!(put(&[(hash(1), &[1])]), [PutOutcome::Published]);
    let before = node.state().count(Kind::Seal);
    assert_eq!(put(&[(hash(1), &[1])]), [PutOutcome::Present]);
    assert_eq!(node.state().count(Kind::Seal), before, "there was nothing to publish");
    let pages: Vec<Vec<u8>> = (0..8).map(|page| engine.page(page)).collect();
    let outcomes = cache.get(&namespace, &[(hash(99), &[2])], FetchScope::Each);
    assert_eq!(outcomes.expect("answered"), [GetOutcome::Miss]);
    assert!((0..8).all(|page| engine.page(page) == pages[page]));
}

#[test]
fn what_does_not_fit_is_refused_before_the_node_hears_of_it() {
    if !is_software() {
        return;
    }
    let node = FakeNode::start("device-invalid");
    let (_client, namespace) = connect(&node);
    let engine = Engine::new(WELL, 4);
    let cache = engine.cache();
    let seen = node.state().requests.len();
    let beyond = cache.put(&namespace, Parent::Root, &[(hash(1), &[8])], 16);
    assert_eq!(beyond.expect_err("there are eight").kind, ErrorKind::Invalid);
    let nothing = cache.put(&namespace, Parent::Root, &[(hash(1), &[])], 16);
    assert_eq!(nothing.expect_err("no pages").kind, ErrorKind::Invalid);
    let beyond = cache.get(&namespace, &[(hash(1), &[8])], FetchScope::Each);
    assert_eq!(beyond.expect_err("there are eight").kind, ErrorKind::Invalid);
    assert_eq!(node.state().requests.len(), seen);
    let short = DeviceCache::new(&engine.gpu, LAYOUT, engine.tensors[..1].to_vec());
    assert_eq!(short.expect_err("two layers").kind, ErrorKind::Invalid);
    let elsewhere = DeviceCache::new(&gpu(REFUSES), LAYOUT, engine.tensors.clone());
    assert_eq!(elsewhere.expect_err("of another device").kind, ErrorKind::Invalid);
    // Another size than its pages.
    cache
        .put(&namespace, Parent::Root, &[(hash(1), &[1, 2])], 32)
        .expect("put");
    let error = cache
        .get(&namespace, &[(hash(1), &[1])], FetchScope::Each)
        .expect_err("two pages");
    assert!(
        error.kind == ErrorKind::Invalid && error.message.contains("realization"),
        "{error}"
    );
}

#[test]
fn a_device_that_breaks_publishes_nothing_and_keeps_its_slots() {
    if !is_software() {
        return;
    }
    let node = FakeNode::start("device-breaks");
    let (client, namespace) = connect(&node);
    // Two copies fill the engine's tensors; the third breaks the device.
    let engine = Engine::new(BREAKS, 5);
    let cache = engine.cache();
    let error = cache.put(&namespace, Parent::Root, &[(hash(1), &[1]), (hash(2), &[2])], 16);
    assert_eq!(error.expect_err("it breaks").kind, ErrorKind::Unavailable);
    // Whatever rides in front of the next request is there after it.
    assert!(!namespace.exists(hash(1)).expect("answered"));
    let state = node.state();
    assert_eq!(state.count(Kind::Seal), 0);
    assert_eq!(
        (state.abandoned, state.reservations.len()),
        (0, 2),
        "the device may still write them"
    );
    let seen = state.requests.len();
    drop(state);
    for _ in 0..10 {
        let error = cache.put(&namespace, Parent::Root, &[(hash(3), &[3])], 16);
        assert!(error.expect_err("it is lost").message.contains("restart"));
        let error = cache.get(&namespace, &[(hash(1), &[3])], FetchScope::Each);
        assert!(error.expect_err("it is lost").message.contains("restart"));
    }
    let state = node.state();
    assert_eq!(state.requests.len(), seen, "the node is not asked in vain");
    assert_eq!(state.reservations.len(), 2);
    drop(state);
    drop(client);
}
