//! Memory of a GPU and a peer: past the host's memory where NICs reach it, through it elsewhere. On the software device.

use std::sync::Arc;

use kvtier_transfer::direct::{DeviceLink, DirectPath};
use kvtier_transfer::gpu::{Copy, Cuda, DeviceRegion, DeviceSlice, Gpu};
use kvtier_transfer::memory::MemoryRegion;
use kvtier_transfer::rdma::DirectWay;
use kvtier_transfer::{Direction, Piece, Refusal, RemoteAccess, Transport};

use crate::stand::{Kind, PATIENCE, Stand, pattern};

/// See `kvtier_softgpu`.
const WELL: usize = 0;
/// When it sees what NICs wrote, it does not say.
const SMALL: usize = 2;
const BREAKS: usize = 3;
/// It sees what NICs wrote after a call.
const KERNELS: usize = 5;

const MIB: usize = 1 << 20;

fn gpu(number: usize) -> Arc<Gpu> {
    let program = std::env::current_exe().expect("a program");
    let cuda = Cuda::open_at(&program.with_file_name("libkvtier_softgpu.so")).expect("the software device");
    cuda.device(number).expect("a device")
}

fn link(gpu: &Arc<Gpu>, transport: &Arc<dyn Transport>) -> DeviceLink {
    DeviceLink::choose(gpu, Arc::clone(transport)).expect("memory to stage in")
}

fn fill(slice: &DeviceSlice, bytes: &[u8]) {
    let region = MemoryRegion::anonymous(bytes.len().next_multiple_of(4096)).expect("memory");
    let source = region.slice(0, bytes.len()).expect("inside");
    source.copy_from_slice(bytes).expect("equal");
    let copy = Copy {
        source: source.into(),
        target: slice.clone().into(),
    };
    let stream = slice.region().gpu().stream().expect("a stream");
    stream.submit(vec![copy]).expect("taken").wait().expect("copied");
}

fn bytes_of(slice: &DeviceSlice) -> Vec<u8> {
    let region = MemoryRegion::anonymous(slice.len().next_multiple_of(4096)).expect("memory");
    let target = region.slice(0, slice.len()).expect("inside");
    let copy = Copy {
        source: slice.clone().into(),
        target: target.clone().into(),
    };
    let stream = slice.region().gpu().stream().expect("a stream");
    stream.submit(vec![copy]).expect("taken").wait().expect("copied");
    target.to_vec()
}

/// There and back, with what lies beside it. Which way it went.
fn there_and_back(stand: &Stand, gpu: &Arc<Gpu>, device: &Arc<DeviceRegion>) -> (DirectPath, String) {
    let link = link(gpu, &stand.caller.transport);
    let registered = link.register(device, RemoteAccess::Read).expect("registered");
    assert_eq!(registered.is_some(), link.path() != DirectPath::Staged);
    let owned = stand.owned(8 * MIB, RemoteAccess::ReadWrite);
    let all = device.slice(0, device.bytes()).expect("all of it");
    let before = pattern(1, 0, device.bytes());
    fill(&all, &before);
    // Longer than what is staged at a time, and neither at pages nor of pages.
    let there = |offset: usize, length: usize| device.slice(offset, length).expect("inside");
    let from = |offset: u64, length: usize| owned.remote().slice(offset, length as u64).expect("inside");
    let long = device.bytes() / 2 + 13;
    let pairs = [
        (there(5, 100), from(77, 100)),
        (there(4096, long), from(4099, long)),
        (there(device.bytes() - 1, 1), from(0, 1)),
    ];
    link.read(&*stand.peer, &pairs, PATIENCE).expect("read");
    let mut wanted = before;
    let source = pattern(7, 0, 8 * MIB);
    wanted[5..105].copy_from_slice(&source[77..177]);
    wanted[4096..4096 + long].copy_from_slice(&source[4099..4099 + long]);
    wanted[device.bytes() - 1] = source[0];
    assert!(
        bytes_of(&all) == wanted,
        "what arrived is not what was sent, or went elsewhere"
    );

    let sent = [
        (there(9, long), from(5 * MIB as u64 + 1, long)),
        (there(1, 7), from(1, 7)),
    ];
    link.write(&*stand.peer, &sent, PATIENCE).expect("written");
    let mut expected = source;
    expected[5 * MIB + 1..][..long].copy_from_slice(&wanted[9..9 + long]);
    expected[1..8].copy_from_slice(&wanted[1..8]);
    assert!(owned.bytes(0, 8 * MIB) == expected);
    (link.path(), link.to_string())
}

pub(crate) fn memory_of_a_device_is_read_into_and_written_from(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    // The first sees at once what NICs wrote, the second after a call, the third nobody knows when.
    for number in [WELL, KERNELS, SMALL] {
        let gpu = gpu(number);
        let device = match number {
            SMALL => gpu.allocate(512 << 10),
            _ => gpu.allocate(5 * MIB),
        };
        let (path, words) = there_and_back(&stand, &gpu, &device.expect("memory"));
        match (kind, number) {
            (Kind::Verbs, WELL | KERNELS) => {
                assert_eq!(path, DirectPath::Direct(DirectWay::PeerMemory), "{words}");
                assert!(words.starts_with("peer_memory (dma_buf: "), "{words}");
                assert!(words.contains("NOT_SUPPORTED"), "{words}");
            }
            (Kind::Verbs | Kind::Iwarp, SMALL) => {
                assert_eq!(path, DirectPath::Staged);
                assert!(words.contains("does not say when it sees"), "{words}");
            }
            (Kind::Iwarp, _) => {
                assert_eq!(path, DirectPath::Staged);
                assert!(words.contains("peer_memory: ") && words.contains("iWARP"), "{words}");
            }
            _ => {
                assert_eq!(path, DirectPath::Staged);
                assert!(
                    words.starts_with("staged (") && words.ends_with("has no NICs)"),
                    "{words}"
                );
            }
        }
    }
    // Memory that processes share, as a tier's is.
    let gpu = gpu(WELL);
    let (device, _file) = gpu.share(4 * MIB).expect("memory");
    there_and_back(&stand, &gpu, &device);
}

pub(crate) fn what_cannot_go_into_a_device_is_an_error_and_the_next_read_is_none(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let gpu = gpu(WELL);
    let link = link(&gpu, &stand.caller.transport);
    let device = gpu.allocate(4 * MIB).expect("memory");
    let all = device.slice(0, 4 * MIB).expect("all of it");
    let owned = stand.owned(4 * MIB, RemoteAccess::Read);
    let whole = owned.remote().slice(0, 4 * MIB as u64).expect("inside");
    if link.path() != DirectPath::Staged {
        let error = link.read(&*stand.peer, &[(all.clone(), whole.clone())], PATIENCE);
        let error = error.expect_err("the NIC does not know it");
        assert!(error.to_string().contains("not registered"), "{error}");
    }
    let _registered = link.register(&device, RemoteAccess::Read).expect("registered");
    let first = (
        device.slice(0, 64).expect("inside"),
        owned.remote().slice(0, 64).expect("inside"),
    );
    let uneven = (all.clone(), owned.remote().slice(0, 64).expect("inside"));
    let error = link.read(&*stand.peer, &[first.clone(), uneven], PATIENCE);
    let error = error.expect_err("the sides differ").to_string();
    assert!(error.contains("differ in length"), "{error}");
    let nothing = (
        device.slice(0, 0).expect("inside"),
        owned.remote().slice(0, 0).expect("inside"),
    );
    let error = link.write(&*stand.peer, &[first.clone(), nothing], PATIENCE);
    assert_eq!(error.expect_err("no bytes").piece, 1);
    let error = link.read(&*stand.peer, &[], PATIENCE).expect_err("nothing at all");
    assert!(error.to_string().contains("an empty batch"), "{error}");
    // What the owner took back; the second of two, and long.
    let gone = stand.owned(4 * MIB, RemoteAccess::Read);
    let pair = (all.clone(), gone.remote().slice(0, 4 * MIB as u64).expect("inside"));
    gone.registration
        .expect("registered")
        .revoke()
        .expect("nobody reads it");
    link.read(&*stand.peer, &[first, pair], PATIENCE)
        .expect_err("it was taken back");
    link.read(&*stand.peer, &[(all.clone(), whole)], PATIENCE)
        .expect("read");
    assert!(bytes_of(&all) == pattern(7, 0, 4 * MIB));
    // A transport whose processor copies does not touch device memory by itself.
    if link.path() == DirectPath::Staged && !matches!(kind, Kind::Verbs | Kind::Iwarp) {
        let piece = Piece {
            local: device.slice(0, 64).expect("inside").into(),
            remote: owned.remote().slice(0, 64).expect("inside"),
            direction: Direction::Read,
        };
        let refused = stand.peer.submit(vec![piece], PATIENCE).expect_err("it cannot");
        assert!(matches!(refused.reason, Refusal::Invalid { piece: 0, what } if what.contains("only NICs")));
        let refused = stand
            .caller
            .transport
            .register_device(&device, DirectWay::PeerMemory, RemoteAccess::Read);
        assert!(refused.expect_err("no NIC").to_string().contains("only NICs"));
    }
}

pub(crate) fn a_device_that_breaks_in_a_read_fails_it_and_nothing_hangs(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let gpu = gpu(BREAKS);
    let device = gpu.allocate(16 * MIB).expect("memory");
    let link = link(&gpu, &stand.caller.transport);
    let _registered = link.register(&device, RemoteAccess::Read).expect("registered");
    let owned = stand.owned(16 * MIB, RemoteAccess::Read);
    let pair = (
        device.slice(0, 16 * MIB).expect("all of it"),
        owned.remote().slice(0, 16 * MIB as u64).expect("inside"),
    );
    let read = link.read(&*stand.peer, std::slice::from_ref(&pair), PATIENCE);
    // Its third copy.
    read.expect_err("it broke");
    assert!(gpu.is_lost());
    link.read(&*stand.peer, &[pair], PATIENCE).expect_err("for good");
}
