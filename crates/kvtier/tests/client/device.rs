//! Blocks between an engine's pages on a device and a node, on the software device.

use std::sync::Arc;
use std::time::Duration;

use crate::fake_node::FakeNode;
use crate::hash;
use kvtier::client::blocking::{Client, DeviceArrays, DeviceCache, Namespace};
use kvtier::client::{ClientOptions, FetchScope, GetOutcome, PutOutcome};
use kvtier::wire::Kind;
use kvtier::{ErrorKind, Parent, Realization, Tier};
use kvtier_transfer::gpu::{
    Copy, Cuda, DeviceSlice, Gpu, KvLayout, KvOrder, KvParts, PieceMover, PieceMoverWanted, Place,
};
use kvtier_transfer::memory::MemoryRegion;

const WELL: usize = 0;
const SLOW: usize = 1;
const BREAKS: usize = 3;
const REFUSES: usize = 4;
const KERNELS: usize = 5;

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
fn a_kernel_moves_pages_where_it_was_chosen() {
    if !is_software() {
        return;
    }
    let node = FakeNode::start("device-kernel");
    let (_client, namespace) = connect(&node);
    let (from, into) = (Engine::new(KERNELS, 1), Engine::new(KERNELS, 2));
    assert!(from.gpu.piece_mover().is_none(), "nobody has needed it");
    for engine in [&from, &into] {
        let chosen = engine.gpu.choose_piece_mover(PieceMoverWanted::Kernel);
        assert_eq!(chosen.mover, PieceMover::Kernel, "{chosen}");
    }
    let moved = || (from.gpu.batches_by_kernel(), into.gpu.batches_by_kernel());
    let tried = moved();
    let put = from.cache().put(&namespace, Parent::Root, &[(hash(1), &[3, 6])], 32);
    assert_eq!(put.expect("put"), [PutOutcome::Published]);
    let got = into.cache().get(&namespace, &[(hash(1), &[5, 0])], FetchScope::Each);
    assert_eq!(got.expect("got"), [hit(2)]);
    assert!(into.page(5) == from.page(3) && into.page(0) == from.page(6));
    assert_eq!(moved(), (tried.0 + 1, tried.1 + 2), "one put, and a get of two layers");
    let chosen = from.gpu.piece_mover().expect("chosen before");
    assert_eq!(chosen.mover, PieceMover::Kernel, "a cache leaves it");
    let untried = Engine::new(WELL, 3);
    drop(untried.cache());
    let chosen = untried.gpu.piece_mover().expect("a cache needs it");
    assert!(chosen.reason.is_some_and(|words| words.contains("cuModuleLoadData")));
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

/// Copies of one tensor's page, queued behind whatever the engine's default stream was given.
fn queue_on(engine: &Engine, source: Place, target: Place) -> kvtier_transfer::Transfer {
    // A stream of ours plays the engine's: the default stream waits for it, as if it were queued there.
    let stream = engine.gpu.stream().expect("a stream");
    let transfer = stream.submit(vec![Copy { source, target }]).expect("taken");
    let mark = stream.mark().expect("marked");
    engine.gpu.default_stream().wait_for(&mark).expect("it waits");
    transfer
}

#[test]
fn a_put_reads_what_the_engine_was_still_writing_and_a_get_is_waited_for_layer_by_layer() {
    if !is_software() {
        return;
    }
    let node = FakeNode::start("device-order");
    let (_client, namespace) = connect(&node);
    // Each copy takes 30 ms: whoever does not wait is seen.
    let (from, into) = (Engine::new(SLOW, 1), Engine::new(SLOW, 2));
    let region = MemoryRegion::anonymous(4096).expect("memory");
    let row = region.slice(0, ROW).expect("inside");
    row.copy_from_slice(&vec![77; ROW]).expect("equal");
    let keys_of_page_3 = from.tensors[0].subslice(3 * ROW, ROW).expect("inside");
    let written = queue_on(&from, Place::Host(row), Place::Device(keys_of_page_3));
    let engine = from.gpu.default_stream();
    let cache = from.cache();
    let saving = cache
        .begin_put(
            &namespace,
            Parent::Root,
            &[(hash(1), &[3])],
            16,
            std::slice::from_ref(&engine),
        )
        .expect("begun");
    saving.hold(&engine).expect("it waits");
    assert_eq!(node.state().count(Kind::Seal), 0, "nothing is published yet");
    assert_eq!(saving.finish().expect("put"), [PutOutcome::Published]);
    written.wait().expect("copied");

    let cache = into.cache();
    let engine = into.gpu.default_stream();
    let loading = cache
        .begin_get(
            &namespace,
            &[(hash(1), &[6])],
            FetchScope::Prefix,
            std::slice::from_ref(&engine),
        )
        .expect("begun");
    assert_eq!(loading.outcomes(), [hit(1)]);
    let backwards = std::ops::Range { start: 2, end: 1 };
    assert_eq!(
        loading.hold(&engine, backwards).expect_err("no layers").kind,
        ErrorKind::Invalid
    );
    assert_eq!(
        loading.hold(&engine, 0..3).expect_err("two layers").kind,
        ErrorKind::Invalid
    );
    loading.hold(&engine, 0..0).expect("none to wait for");
    loading.hold(&engine, 0..1).expect("it waits");
    // What the engine does with the first layer now comes after it.
    let region = MemoryRegion::anonymous(4096).expect("memory");
    let seen = region.slice(0, ROW).expect("inside");
    let keys_of_page_6 = into.tensors[0].subslice(6 * ROW, ROW).expect("inside");
    let stream = into.gpu.stream().expect("a stream");
    stream.after_engine(&engine).expect("it waits");
    let read = stream.submit(vec![Copy {
        source: Place::Device(keys_of_page_6),
        target: Place::Host(seen.clone()),
    }]);
    read.expect("taken").wait().expect("copied");
    assert!(
        seen.to_vec() == vec![77; ROW],
        "the first layer was used before it was there"
    );
    assert_eq!(loading.finish().expect("got"), [hit(1)]);
    assert!(into.page(6) == from.page(3));
}

#[test]
fn what_is_dropped_under_way_is_waited_for_and_gives_back_what_it_held() {
    if !is_software() {
        return;
    }
    let node = FakeNode::start("device-dropped");
    let (_client, namespace) = connect(&node);
    let engine = Engine::new(SLOW, 1);
    let cache = engine.cache();
    let saving = cache.begin_put(&namespace, Parent::Root, &[(hash(1), &[3])], 16, &[]);
    drop(saving.expect("begun"));
    assert!(!namespace.exists(hash(1)).expect("answered"), "nothing was published");
    let begun = std::time::Instant::now();
    while !node.state().reservations.is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(20), "its slot is kept");
        std::thread::sleep(Duration::from_millis(5));
    }
    cache
        .put(&namespace, Parent::Root, &[(hash(1), &[3])], 16)
        .expect("put");
    // The software device ends the process where memory goes under a copy.
    drop(
        cache
            .begin_get(&namespace, &[(hash(1), &[5])], FetchScope::Prefix, &[])
            .expect("begun"),
    );
    assert!(engine.page(5) == engine.page(3), "it was waited for");
}

#[test]
fn arrays_hold_a_block_each_whatever_lies_in_them() {
    if !is_software() {
        return;
    }
    let node = FakeNode::start("device-arrays");
    let (_client, namespace) = connect(&node);
    let engine = Engine::new(WELL, 6);
    let arrays = DeviceArrays::new(&engine.gpu).expect("a stream");
    let array = |number: usize, at: usize, length: usize| engine.tensors[number].subslice(at, length).expect("inside");
    let put = [(hash(1), array(0, 0, 5000)), (hash(2), array(1, 100, ROW))];
    let saving = arrays
        .begin_put(&namespace, Parent::Root, &put, 16, &[])
        .expect("begun");
    assert_eq!(saving.finish().expect("put"), [PutOutcome::Published; 2]);
    let room = engine.gpu.allocate(3 * 8192).expect("memory");
    let into = |at: usize, length: usize| room.slice(at * 8192, length).expect("inside");
    let get = [
        (hash(1), into(0, 8192)),
        (hash(2), into(1, 100)),
        (hash(3), into(2, 10)),
    ];
    let loading = arrays
        .begin_get(&namespace, &get, FetchScope::Each, &[])
        .expect("begun");
    let outcomes = loading.finish().expect("got");
    assert_eq!(
        outcomes,
        [
            GetOutcome::Hit {
                length: 5000,
                tier: Tier::Host
            },
            GetOutcome::TooSmall { length: ROW as u32 },
            GetOutcome::Miss
        ]
    );
    let read = |slice: DeviceSlice| {
        let region = MemoryRegion::anonymous(8192).expect("memory");
        let target = region.slice(0, slice.len()).expect("inside");
        let copy = Copy {
            source: Place::Device(slice),
            target: Place::Host(target.clone()),
        };
        let stream = engine.gpu.stream().expect("a stream");
        stream.submit(vec![copy]).expect("taken").wait().expect("copied");
        target.to_vec()
    };
    assert!(read(into(0, 5000)) == read(array(0, 0, 5000)));
    let elsewhere = gpu(REFUSES).allocate(4096).expect("memory");
    let foreign = [(hash(9), elsewhere.slice(0, 4096).expect("all"))];
    let refused = arrays.begin_put(&namespace, Parent::Root, &foreign, 16, &[]);
    assert_eq!(refused.expect_err("of another device").kind, ErrorKind::Invalid);
}
