//! Memory of devices and copies: the same cases on the software device and on a real one.
//!
//! The software device is a driver library of ours, see `kvtier_softgpu`, which cargo builds beside this program. With
//! `KVTIER_GPU=real` the system's driver is used; what only the software device can be made to do is not executed there, and
//! says so.

mod kernels;
mod processes;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_transfer::gpu::{
    Copy, Cuda, DeviceRegion, DeviceSlice, Gpu, GpuError, KvLayout, KvOrder, KvParts, LayoutError, PinnedRegions,
    Place, Stream,
};
use kvtier_transfer::memory::{Access, MemoryRegion, MemorySlice, PageRequest};
use kvtier_transfer::{Cause, Transfer};

const MIB: usize = 1 << 20;

/// What a software device does, see `kvtier_softgpu`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Well,
    Slow,
    Small,
    Breaks,
    Refuses,
    /// A real device does, too.
    Kernels,
    LaunchesNone,
    WrongKernels,
}

fn is_real() -> bool {
    std::env::var("KVTIER_GPU").is_ok_and(|kind| kind == "real")
}

fn software() -> PathBuf {
    let program = std::env::current_exe().expect("a program");
    program.with_file_name("libkvtier_softgpu.so")
}

/// The device that a case needs; `None` where a real one cannot be made to do that.
fn gpu(kind: Kind) -> Option<Arc<Gpu>> {
    if is_real() {
        if !matches!(kind, Kind::Well | Kind::Kernels) {
            println!("not executed: a real device cannot be made to fail so");
            return None;
        }
        let cuda = Cuda::open().expect("KVTIER_GPU=real was asked for");
        return Some(cuda.device(0).expect("a device"));
    }
    let cuda = Cuda::open_at(&software()).expect("the software device");
    Some(cuda.device(kind as usize).expect("a device"))
}

fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| ((at * 7 + seed * 31) % 251) as u8).collect()
}

fn host(bytes: usize) -> MemorySlice {
    let region = MemoryRegion::anonymous(bytes.next_multiple_of(4096)).expect("memory");
    region.slice(0, bytes).expect("inside")
}

fn filled(seed: usize, bytes: usize) -> MemorySlice {
    let slice = host(bytes);
    slice.copy_from_slice(&pattern(seed, bytes)).expect("equal");
    slice
}

fn run(stream: &Stream, copies: Vec<Copy>) {
    stream.submit(copies).expect("taken").wait().expect("copied");
}

fn copy(source: Place, target: Place) -> Copy {
    Copy { source, target }
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_machine_without_a_driver_says_so_in_words() {
    let nowhere = Cuda::open_at("/nowhere/libcuda.so.1".as_ref()).expect_err("no such file");
    let words = nowhere.to_string();
    assert!(
        words.starts_with("cuda unavailable: ") && words.contains("NVIDIA's driver"),
        "{words}"
    );
}

#[test]
fn a_device_has_a_name_and_memory() {
    let Some(gpu) = gpu(Kind::Well) else { return };
    let (free, all) = gpu.memory().expect("an answer");
    assert!(!gpu.name().is_empty() && free <= all && all > 0, "{gpu:?}");
    assert!(!gpu.is_lost());
    println!("device: {}", gpu.name());
}

#[test]
fn a_number_gives_one_device_and_what_is_no_number_none() {
    if is_real() {
        return println!("not executed: a real machine has as many devices as it has");
    }
    let cuda = Cuda::open_at(&software()).expect("the software device");
    assert_eq!((cuda.devices(), cuda.version()), (8, (12, 8)));
    let gpu = cuda.device(1).expect("a device");
    assert!(Arc::ptr_eq(&gpu, &cuda.device(1).expect("the same")));
    assert_eq!(gpu.name(), "software: slow");
    let uuid = gpu.uuid().to_string();
    assert_eq!((&uuid[..4], uuid.len()), ("GPU-", 40), "{uuid}");
    assert_ne!(cuda.device(0).expect("another").uuid(), gpu.uuid());
    let error = cuda.device(8).expect_err("there are eight");
    assert!(error.to_string().contains("INVALID_DEVICE"), "{error}");
}

#[test]
fn bytes_go_up_and_come_back() {
    let Some(gpu) = gpu(Kind::Well) else { return };
    let stream = gpu.stream().expect("a stream");
    let device = gpu.allocate(4 * MIB).expect("memory");
    for (offset, length) in [(0, 1), (1, 4095), (4096, 65_536), (12_345, MIB), (0, 4 * MIB)] {
        let there = device.slice(offset, length).expect("inside");
        let (source, target) = (filled(offset, length), host(length));
        let up = copy(Place::Host(source.clone()), Place::Device(there.clone()));
        let down = copy(Place::Device(there), Place::Host(target.clone()));
        run(&stream, vec![up]);
        run(&stream, vec![down]);
        assert!(target.to_vec() == source.to_vec(), "{length} bytes at {offset}");
    }
}

#[test]
fn pages_that_lie_apart_are_gathered_into_one_block_and_scattered_again() {
    const PAGE: usize = 16 << 10;
    let Some(gpu) = gpu(Kind::Well) else { return };
    let stream = gpu.stream().expect("a stream");
    let (pages, again) = (
        gpu.allocate(4 * MIB).expect("memory"),
        gpu.allocate(4 * MIB).expect("memory"),
    );
    let all = filled(1, 4 * MIB);
    let up = copy(
        Place::Host(all.clone()),
        Place::Device(pages.slice(0, 4 * MIB).expect("inside")),
    );
    run(&stream, vec![up]);
    let order: Vec<usize> = (0..64).map(|at| at * 37 % 256).collect();
    let block = host(64 * PAGE);
    let part = |at: usize| block.subslice(at * PAGE, PAGE).expect("inside");
    let page = |at: usize| pages.slice(order[at] * PAGE, PAGE).expect("inside");
    run(
        &stream,
        (0..64)
            .map(|at| copy(Place::Device(page(at)), Place::Host(part(at))))
            .collect(),
    );
    let (bytes, wanted) = (block.to_vec(), all.to_vec());
    for (at, from) in order.iter().enumerate() {
        assert!(
            bytes[at * PAGE..][..PAGE] == wanted[from * PAGE..][..PAGE],
            "page {from} at {at}"
        );
    }
    let back = |at: usize| again.slice(order[at] * PAGE, PAGE).expect("inside");
    run(
        &stream,
        (0..64)
            .map(|at| copy(Place::Host(part(at)), Place::Device(back(at))))
            .collect(),
    );
    let one = host(PAGE);
    run(&stream, vec![copy(Place::Device(back(63)), Place::Host(one.clone()))]);
    assert!(one.to_vec() == bytes[63 * PAGE..]);
}

#[test]
fn zeroes_cover_what_was_there() {
    let Some(gpu) = gpu(Kind::Well) else { return };
    let stream = gpu.stream().expect("a stream");
    let device = gpu.allocate(MIB).expect("memory");
    let all = device.slice(0, MIB).expect("inside");
    run(
        &stream,
        vec![copy(Place::Host(filled(3, MIB)), Place::Device(all.clone()))],
    );
    let zeroed = stream.zero(&device.slice(4096, 8192).expect("inside")).expect("taken");
    let got = host(MIB);
    run(&stream, vec![copy(Place::Device(all), Place::Host(got.clone()))]);
    assert_eq!(zeroed.wait(), Ok(()));
    let mut wanted = pattern(3, MIB);
    wanted[4096..12_288].fill(0);
    assert!(got.to_vec() == wanted);
}

#[test]
fn a_stream_that_comes_after_another_sees_what_that_one_wrote() {
    let Some(slow) = gpu(if is_real() { Kind::Well } else { Kind::Slow }) else {
        return;
    };
    let (writes, reads) = (slow.stream().expect("a stream"), slow.stream().expect("a stream"));
    let device = slow.allocate(MIB).expect("memory");
    let there = || Place::Device(device.slice(0, MIB).expect("inside"));
    for seed in 0..3 {
        let source = filled(seed, MIB);
        let written = writes
            .submit(vec![copy(Place::Host(source.clone()), there())])
            .expect("taken");
        reads.after(&writes).expect("taken");
        let target = host(MIB);
        run(&reads, vec![copy(there(), Place::Host(target.clone()))]);
        assert!(target.to_vec() == source.to_vec(), "round {seed}");
        assert_eq!(written.outcome(), Some(Ok(())), "what came before is done");
    }
}

#[test]
fn an_engines_stream_waits_for_copies_and_copies_for_it() {
    let Some(slow) = gpu(if is_real() { Kind::Well } else { Kind::Slow }) else {
        return;
    };
    let (ours, theirs) = (slow.stream().expect("a stream"), slow.stream().expect("a stream"));
    let device = slow.allocate(MIB).expect("memory");
    let there = |at: usize| Place::Device(device.slice(at * 4096, 4096).expect("inside"));
    let default = slow.default_stream();
    // The engine's own stream is one that we know as such.
    let first = filled(1, 4096);
    let up = theirs
        .submit(vec![copy(Place::Host(first.clone()), there(0))])
        .expect("taken");
    let mark = theirs.mark().expect("marked");
    default.wait_for(&mark).expect("it waits");
    ours.after_engine(&default).expect("it waits, too");
    let got = host(4096);
    let down = ours
        .submit(vec![copy(there(0), Place::Host(got.clone()))])
        .expect("taken");
    down.wait().expect("copied");
    assert!(got.to_vec() == first.to_vec(), "it was read before it was there");
    up.wait().expect("copied");
}

#[test]
fn many_copies_begin_with_one_call_or_one_by_one_and_arrive_either_way() {
    // The one that refuses has no call for many, but one for rows.
    for kind in [Kind::Well, Kind::Refuses] {
        let Some(gpu) = gpu(kind) else { continue };
        let stream = gpu.stream().expect("a stream");
        let device = gpu.allocate(MIB).expect("memory");
        for count in [1, 3, 4, 200] {
            let source = filled(count, count * 1024);
            let piece = |slice: &MemorySlice, at: usize| Place::Host(slice.subslice(at * 1024, 1024).expect("inside"));
            let there = |at: usize| Place::Device(device.slice((count - at) * 2048, 1024).expect("inside"));
            run(
                &stream,
                (0..count).map(|at| copy(piece(&source, at), there(at))).collect(),
            );
            let target = host(count * 1024);
            run(
                &stream,
                (0..count).map(|at| copy(there(at), piece(&target, at))).collect(),
            );
            assert!(target.to_vec() == source.to_vec(), "{count} copies");
        }
    }
}

#[test]
fn pieces_in_rows_arrive_with_or_without_a_call_for_them() {
    // One has a call for many, one a call for rows, one neither.
    for kind in [Kind::Well, Kind::Refuses, Kind::Slow] {
        let Some(gpu) = gpu(kind) else { continue };
        let stream = gpu.stream().expect("a stream");
        let device = gpu.allocate(MIB).expect("memory");
        let source = filled(9, 12 * 1000);
        let piece = |slice: &MemorySlice, at: usize| Place::Host(slice.subslice(at * 1000, 1000).expect("inside"));
        // Rows of four, every third kilobyte; then four that lie together; then four backwards.
        let place = |at: usize| match at {
            0..4 => at * 3072,
            4..8 => 20_000 + at * 1000,
            _ => 100_000 - at * 2000,
        };
        let there = |at: usize| Place::Device(device.slice(place(at), 1000).expect("inside"));
        run(&stream, (0..12).map(|at| copy(piece(&source, at), there(at))).collect());
        let target = host(12 * 1000);
        run(&stream, (0..12).map(|at| copy(there(at), piece(&target, at))).collect());
        assert!(target.to_vec() == source.to_vec(), "on {}", gpu.name());
    }
}

#[test]
fn bytes_go_from_one_device_to_another() {
    if is_real() {
        return println!("not executed: a machine may have one device");
    }
    let cuda = Cuda::open_at(&software()).expect("the software device");
    let (one, other) = (cuda.device(0).expect("a device"), cuda.device(1).expect("a device"));
    let stream = one.stream().expect("a stream");
    let (here, there) = (one.allocate(MIB).expect("memory"), other.allocate(MIB).expect("memory"));
    let part = |region: &Arc<DeviceRegion>, at: usize| Place::Device(region.slice(at * 4096, 4096).expect("inside"));
    let source = filled(8, 8 * 4096);
    let piece = |slice: &MemorySlice, at: usize| Place::Host(slice.subslice(at * 4096, 4096).expect("inside"));
    run(
        &stream,
        (0..8).map(|at| copy(piece(&source, at), part(&here, at))).collect(),
    );
    run(
        &stream,
        (0..8).map(|at| copy(part(&here, at), part(&there, 7 - at))).collect(),
    );
    // And back, by the other's queue, after what is in this one.
    let second = other.stream().expect("a stream");
    let up = second.submit((0..8).map(|at| copy(part(&there, at), part(&here, 16 + at))).collect());
    drop((there, up.expect("taken")));
    stream.after(&second).expect("in order");
    let target = host(8 * 4096);
    run(
        &stream,
        (0..8)
            .map(|at| copy(part(&here, 16 + at), piece(&target, 7 - at)))
            .collect(),
    );
    assert!(target.to_vec() == source.to_vec());
    let refused = second.submit(vec![copy(part(&here, 0), part(&here, 1))]);
    let refused = refused.expect_err("it is not there at all").to_string();
    assert!(refused.contains("no side of it is on this device"), "{refused}");
}

#[test]
fn a_future_is_woken_by_the_device() {
    struct Count(std::sync::atomic::AtomicUsize);
    impl std::task::Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    }
    let Some(slow) = gpu(if is_real() { Kind::Well } else { Kind::Slow }) else {
        return;
    };
    let stream = slow.stream().expect("a stream");
    let device = slow.allocate(MIB).expect("memory");
    let source = filled(2, MIB);
    let mut transfer = stream
        .submit(vec![copy(
            Place::Host(source),
            Place::Device(device.slice(0, MIB).expect("inside")),
        )])
        .expect("taken");
    let count = Arc::new(Count(0.into()));
    let waker = std::task::Waker::from(Arc::clone(&count));
    let mut context = std::task::Context::from_waker(&waker);
    let mut poll = || std::future::Future::poll(std::pin::Pin::new(&mut transfer), &mut context);
    let first = poll();
    assert!(first.is_pending() || is_real(), "30 ms are not over yet");
    if first.is_pending() {
        until("it is woken", || count.0.load(std::sync::atomic::Ordering::SeqCst) > 0);
        assert_eq!(poll(), std::task::Poll::Ready(Ok(())));
    }
}

#[test]
fn memory_of_a_copy_that_nobody_waits_for_stays_until_the_device_is_done() {
    let Some(slow) = gpu(Kind::Slow) else { return };
    let stream = slow.stream().expect("a stream");
    let (_, all) = slow.memory().expect("an answer");
    let device = slow.allocate(100 * MIB).expect("memory");
    let target = host(MIB);
    let region = Arc::downgrade(target.region());
    let down = copy(
        Place::Device(device.slice(0, MIB).expect("inside")),
        Place::Host(target),
    );
    let transfer = stream.submit(vec![down]).expect("taken");
    // The software device ends the process where any of these lets go of memory in flight.
    drop((transfer, device, stream));
    assert!(region.upgrade().is_some(), "the device may still write it");
    assert!(slow.memory().expect("an answer").0 <= all - 100 * MIB);
    until("it is freed at last", || region.upgrade().is_none());
}

#[test]
fn more_memory_than_there_is_is_refused_and_nothing_leaks() {
    let Some(small) = gpu(Kind::Small) else { return };
    let before = small.memory().expect("an answer");
    let held = small.allocate(MIB / 2).expect("memory");
    let error = small.allocate(MIB).expect_err("more than there is");
    assert!(error.to_string().contains("OUT_OF_MEMORY"), "{error}");
    assert!(!small.is_lost(), "that is no reason to give up");
    drop(held);
    assert_eq!(small.memory().expect("an answer"), before);
    for _ in 0..100 {
        drop(small.allocate(MIB).expect("what was let go of is there again"));
    }
}

#[test]
fn shared_memory_is_the_same_bytes_for_whoever_maps_it_and_stays_while_anybody_does() {
    let Some(gpu) = gpu(Kind::Well) else { return };
    let stream = gpu.stream().expect("a stream");
    let unit = gpu.share_bytes().expect("an answer");
    let (ours, descriptor) = gpu.share(2 * unit).expect("memory");
    let theirs = gpu.map(descriptor.as_fd(), 2 * unit).expect("mapped");
    drop(descriptor);
    let there = |region: &Arc<DeviceRegion>| Place::Device(region.slice(unit + 100, 5000).expect("inside"));
    let source = filled(3, 5000);
    run(&stream, vec![copy(Place::Host(source.clone()), there(&ours))]);
    drop(ours);
    let target = host(5000);
    run(&stream, vec![copy(there(&theirs), Place::Host(target.clone()))]);
    assert!(target.to_vec() == source.to_vec());
}

#[test]
fn what_is_no_shared_memory_of_this_device_is_refused_and_nothing_leaks() {
    let Some(gpu) = gpu(Kind::Well) else { return };
    let unit = gpu.share_bytes().expect("an answer");
    let (region, descriptor) = gpu.share(unit).expect("memory");
    assert!(gpu.map(descriptor.as_fd(), 2 * unit).is_err(), "more than it has");
    let (_, file) = MemoryRegion::create("no device's", unit, PageRequest::Auto).expect("memory");
    let error = gpu.map(file.as_fd(), unit).expect_err("host memory");
    assert!(error.to_string().contains("cuMemImport"), "{error}");
    assert!(gpu.share(unit + 4096).is_err(), "no multiple of the unit");
    assert!(!gpu.is_lost());
    drop(region);
}

#[test]
fn shared_memory_counts_until_the_last_copy_of_it_is_done() {
    let Some(slow) = gpu(Kind::Slow) else { return };
    let stream = slow.stream().expect("a stream");
    let unit = slow.share_bytes().expect("an answer");
    let (region, descriptor) = slow.share(unit).expect("memory");
    let weak = Arc::downgrade(&region);
    let target = host(MIB);
    let down = copy(
        Place::Device(region.slice(0, MIB).expect("inside")),
        Place::Host(target),
    );
    let transfer = stream.submit(vec![down]).expect("taken");
    // The software device ends the process where memory is unmapped under a copy.
    drop((transfer, region, descriptor));
    assert!(weak.upgrade().is_some(), "the device still reads it");
    until("it is unmapped at last", || weak.upgrade().is_none());
}

#[test]
fn a_device_without_room_shares_nothing() {
    let Some(small) = gpu(Kind::Small) else { return };
    let unit = small.share_bytes().expect("an answer");
    let error = small.share(unit).expect_err("more than there is");
    assert!(error.to_string().contains("OUT_OF_MEMORY"), "{error}");
    assert!(!small.is_lost());
}

#[test]
fn a_device_that_breaks_fails_what_is_in_flight_and_refuses_what_comes_after() {
    let Some(breaks) = gpu(Kind::Breaks) else { return };
    let stream = breaks.stream().expect("a stream");
    let device = breaks.allocate(MIB).expect("memory");
    let there = |at: usize| Place::Device(device.slice(at * 4096, 4096).expect("inside"));
    run(&stream, vec![copy(Place::Host(filled(1, 4096)), there(0))]);
    let targets: Vec<MemorySlice> = (0..8).map(|_| host(4096)).collect();
    let regions: Vec<_> = targets.iter().map(|target| Arc::downgrade(target.region())).collect();
    let copies = targets
        .into_iter()
        .map(|target| copy(there(0), Place::Host(target)))
        .collect();
    let failed = stream.submit(copies).expect("taken").wait().expect_err("it breaks");
    assert!(
        matches!(&failed.cause, Cause::Local(words) if words.contains("ILLEGAL_ADDRESS")),
        "{failed}"
    );
    assert!(breaks.is_lost());
    assert!(
        regions.iter().all(|region| region.upgrade().is_some()),
        "nobody can tell whether the device still writes them"
    );
    let refused = stream.submit(vec![copy(Place::Host(filled(1, 4096)), there(0))]);
    let refused = refused.expect_err("it is lost");
    assert!(refused.to_string().contains("restart"), "{refused}");
    assert_eq!(refused.copies.len(), 1, "the batch comes back");
    assert!(breaks.allocate(4096).is_err() && breaks.stream().is_err());
}

#[test]
fn a_registered_region_is_pinned_until_the_last_copy_is_done() {
    let Some(slow) = gpu(if is_real() { Kind::Well } else { Kind::Slow }) else {
        return;
    };
    let stream = slow.stream().expect("a stream");
    let (region, _file) = MemoryRegion::create("gpu-test", 4 * MIB, PageRequest::Small).expect("memory");
    let registration = slow.register(&region).expect("pinned");
    assert!(region.is_pinned());
    let again = slow.register(&region).expect("the same");
    drop(again);
    assert!(region.is_pinned(), "who asked first still wants it");
    let device = slow.allocate(MIB).expect("memory");
    let up = copy(
        Place::Host(region.slice(MIB, MIB).expect("inside")),
        Place::Device(device.slice(0, MIB).expect("inside")),
    );
    let transfer: Transfer = stream.submit(vec![up]).expect("taken");
    // The software device ends the process when memory is unregistered under a copy.
    // On a thread that has no context, as whoever drops things last may be.
    std::thread::spawn(move || drop(registration)).join().expect("no panic");
    if !is_real() {
        assert!(region.is_pinned(), "the copy holds it");
    }
    assert_eq!(transfer.wait(), Ok(()));
    assert!(!region.is_pinned(), "it is let go of before the outcome is told");
    // And once more, let go of by a thread without a context while nothing is in flight.
    let registration = slow.register(&region).expect("pinned");
    std::thread::spawn(move || drop(registration)).join().expect("no panic");
    assert!(!region.is_pinned());
}

#[test]
fn what_its_owner_took_back_is_let_go_of_by_everybody_who_had_it_pinned() {
    let Some(gpu) = gpu(Kind::Well) else { return };
    let (one, other) = (PinnedRegions::new(&gpu), PinnedRegions::new(&gpu));
    let region = MemoryRegion::anonymous(MIB).expect("memory");
    assert!(one.pin(&region) && other.pin(&region) && one.pin(&region));
    one.tidy();
    other.let_go(&region, Duration::from_secs(1));
    assert!(region.is_pinned(), "its owner has it, and one of them");
    assert!(other.pin(&region));
    let weak = Arc::downgrade(&region);
    drop(region);
    // Neither is the last that has it; together they are.
    one.tidy();
    assert!(weak.upgrade().is_some(), "the other's is still there");
    other.tidy();
    assert!(weak.upgrade().is_none(), "nobody needs it");
}

#[test]
fn regions_are_pinned_and_let_go_of_while_others_copy_them() {
    let Some(gpu) = gpu(Kind::Well) else { return };
    let (region, _file) = MemoryRegion::create("gpu-test", MIB, PageRequest::Small).expect("memory");
    let device = gpu.allocate(4 * MIB).expect("memory");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (gpu, device, region) = (&gpu, &device, &region);
            scope.spawn(move || {
                let stream = gpu.stream().expect("a stream");
                let here = Place::Host(region.slice(thread * 4096, 4096).expect("its own part"));
                let there = Place::Device(device.slice(thread * MIB, 4096).expect("its own part"));
                for round in 0..200 {
                    let registration = (round % 3 > 0).then(|| gpu.register(region).expect("pinned"));
                    // The software device ends the process when memory is unregistered under a copy.
                    drop(stream.submit(vec![copy(here.clone(), there.clone())]).expect("taken"));
                    drop(registration);
                    run(&stream, vec![copy(there.clone(), here.clone())]);
                }
            });
        }
    });
    // Batches that nobody waited for are let go of by the stream's thread.
    until("it is let go of", || !region.is_pinned());
}

#[test]
fn memory_that_cannot_be_pinned_is_copied_all_the_same() {
    let Some(refuses) = gpu(Kind::Refuses) else { return };
    let region = MemoryRegion::anonymous(MIB).expect("memory");
    let error: GpuError = refuses.register(&region).expect_err("it refuses");
    assert!(error.to_string().contains("NOT_SUPPORTED"), "{error}");
    assert!(!region.is_pinned(), "nothing holds it");
    let stream = refuses.stream().expect("a stream");
    let device = refuses.allocate(MIB).expect("memory");
    let there = device.slice(0, MIB).expect("inside");
    let source = filled(5, MIB);
    run(
        &stream,
        vec![copy(Place::Host(source.clone()), Place::Device(there.clone()))],
    );
    let target = region.slice(0, MIB).expect("inside");
    run(&stream, vec![copy(Place::Device(there), Place::Host(target.clone()))]);
    assert!(target.to_vec() == source.to_vec());
}

#[test]
fn batches_that_cannot_be_right_are_refused_and_come_back() {
    let Some(gpu) = gpu(Kind::Well) else { return };
    let stream = gpu.stream().expect("a stream");
    let device = gpu.allocate(MIB).expect("memory");
    let there = |length: usize| Place::Device(device.slice(0, length).expect("inside"));
    let here = |length: usize| Place::Host(host(length));
    let (_, file) = MemoryRegion::create("gpu-test", 4096, PageRequest::Small).expect("memory");
    let read_only = MemoryRegion::attach(file, 4096, Access::ReadOnly, false).expect("mapped");
    let read_only = Place::Host(read_only.slice(0, 4096).expect("inside"));
    let words = |copies: Vec<Copy>| {
        let count = copies.len();
        let refused = stream.submit(copies).expect_err("it cannot be right");
        assert_eq!(refused.copies.len(), count);
        refused.to_string()
    };
    assert!(words(Vec::new()).contains("empty batch"));
    let good = || copy(here(64), there(64));
    assert!(words(vec![good(), copy(here(64), there(65))]).contains("copy 1: the two sides differ"));
    let nothing = Place::Host(host(64).subslice(0, 0).expect("inside"));
    assert!(words(vec![copy(nothing, there(0))]).contains("empty copy"));
    assert!(words(vec![copy(here(64), here(64))]).contains("no side of it"));
    assert!(words(vec![copy(there(4096), read_only)]).contains("read-only"));
    assert!(words(vec![good(); 4097]).contains("4096 at most"));
    assert!(device.slice(1, MIB).is_err(), "past the end");
    let Some(other) = self::gpu(Kind::Refuses) else { return };
    let elsewhere = other.allocate(4096).expect("memory").slice(0, 4096).expect("inside");
    assert!(words(vec![copy(here(4096), Place::Device(elsewhere))]).contains("another device"));
}

#[test]
fn many_threads_copy_at_once() {
    let Some(gpu) = gpu(Kind::Well) else { return };
    let device = gpu.allocate(8 * MIB).expect("memory");
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (gpu, device) = (&gpu, &device);
            scope.spawn(move || {
                let stream = gpu.stream().expect("a stream");
                let there = device.slice(thread * MIB, MIB).expect("its own part");
                for round in 0..20 {
                    let source = filled(thread * 100 + round, MIB);
                    let target = host(MIB);
                    let up = copy(Place::Host(source.clone()), Place::Device(there.clone()));
                    drop(stream.submit(vec![up]).expect("taken"));
                    let down = copy(Place::Device(there.clone()), Place::Host(target.clone()));
                    run(&stream, vec![down]);
                    assert!(target.to_vec() == source.to_vec(), "thread {thread}, round {round}");
                }
            });
        }
    });
}

/// A cache of an engine whose every byte tells where it lies, and the same bytes by layer, part, page and place in the page.
struct Engine {
    layout: KvLayout,
    tensors: Vec<DeviceSlice>,
    row: usize,
}

impl Engine {
    fn new(gpu: &Arc<Gpu>, layout: KvLayout) -> Engine {
        let (count, bytes) = layout.tensors().expect("a layout");
        let tensor = |_| gpu.allocate(bytes).expect("memory").slice(0, bytes).expect("all");
        let tokens = layout.page_tokens * layout.heads;
        Engine {
            layout,
            tensors: (0..count).map(tensor).collect(),
            row: (tokens * layout.head_elements * layout.element_bytes) as usize,
        }
    }

    fn parts(&self) -> usize {
        if self.layout.parts == KvParts::Latent { 1 } else { 2 }
    }

    /// Written without the library's arithmetic: index by index, as the engine's tensors are declared.
    fn fill(&self, stream: &Stream, seed: usize) {
        let (layers, pages) = (self.layout.layers as usize, self.layout.pages as usize);
        let mut tensors = vec![Vec::new(); self.tensors.len()];
        for layer in 0..layers {
            let tensor = if self.layout.one_tensor { 0 } else { layer };
            let rows: Vec<(usize, usize)> = match self.layout.order {
                KvOrder::PartsOuter => (0..self.parts())
                    .flat_map(|part| (0..pages).map(move |page| (part, page)))
                    .collect(),
                KvOrder::PagesOuter => (0..pages)
                    .flat_map(|page| (0..self.parts()).map(move |part| (part, page)))
                    .collect(),
            };
            for (part, page) in rows {
                tensors[tensor].extend(self.page(seed, layer, part, page));
            }
        }
        for (device, bytes) in self.tensors.iter().zip(tensors) {
            let source = host(bytes.len());
            source.copy_from_slice(&bytes).expect("equal");
            run(stream, vec![copy(Place::Host(source), Place::Device(device.clone()))]);
        }
    }

    fn page(&self, seed: usize, layer: usize, part: usize, page: usize) -> Vec<u8> {
        pattern(seed + layer * 1009 + part * 503 + page * 17, self.row)
    }

    fn wanted(&self, seed: usize, pages: &[u32], layers: std::ops::Range<u32>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for layer in layers {
            for part in 0..self.parts() {
                for page in pages {
                    bytes.extend(self.page(seed, layer as usize, part, *page as usize));
                }
            }
        }
        bytes
    }
}

fn layouts() -> Vec<KvLayout> {
    let mut layouts = Vec::new();
    for parts in [KvParts::KeysAndValues, KvParts::Latent] {
        for order in [KvOrder::PartsOuter, KvOrder::PagesOuter] {
            for one_tensor in [false, true] {
                layouts.push(KvLayout {
                    layers: 3,
                    parts,
                    order,
                    one_tensor,
                    pages: 11,
                    page_tokens: 16,
                    heads: 2,
                    head_elements: 24,
                    element_bytes: 2,
                });
            }
        }
    }
    layouts
}

#[test]
fn pages_of_every_layout_become_a_block_and_pages_again() {
    let Some(gpu) = gpu(Kind::Well) else { return };
    let stream = gpu.stream().expect("a stream");
    for (seed, layout) in layouts().into_iter().enumerate() {
        let (engine, other) = (Engine::new(&gpu, layout), Engine::new(&gpu, layout));
        engine.fill(&stream, seed);
        other.fill(&stream, seed + 100);
        let pages = [4, 5, 6, 0, 10, 2];
        let bytes = layout.block_bytes(pages.len()).expect("a size");
        let block = host(bytes);
        let there = Place::Host(block.clone());
        let gathered = layout.gather(&engine.tensors, &pages, 0..3, &there).expect("it fits");
        run(&stream, gathered);
        assert!(block.to_vec() == engine.wanted(seed, &pages, 0..3), "{layout:?}");
        // Into other pages of another cache: those alone change.
        let into = [1, 2, 9, 8, 0, 5];
        run(
            &stream,
            layout.scatter(&there, &other.tensors, &into, 0..3).expect("it fits"),
        );
        let again = host(bytes);
        let there = Place::Host(again.clone());
        run(
            &stream,
            layout.gather(&other.tensors, &into, 0..3, &there).expect("it fits"),
        );
        assert!(again.to_vec() == block.to_vec(), "{layout:?}");
        let untouched = [3, 4, 6, 7, 10];
        let bytes = layout.block_bytes(untouched.len()).expect("a size");
        let rest = host(bytes);
        let there = Place::Host(rest.clone());
        run(
            &stream,
            layout
                .gather(&other.tensors, &untouched, 0..3, &there)
                .expect("it fits"),
        );
        assert!(
            rest.to_vec() == other.wanted(seed + 100, &untouched, 0..3),
            "{layout:?}"
        );
    }
}

#[test]
fn one_layer_of_a_block_is_loaded_by_itself_on_the_device() {
    let Some(gpu) = gpu(Kind::Well) else { return };
    let stream = gpu.stream().expect("a stream");
    let layout = layouts()[0];
    let engine = Engine::new(&gpu, layout);
    engine.fill(&stream, 7);
    let pages = [2, 3];
    let bytes = layout.block_bytes(pages.len()).expect("a size") / 3;
    let block = gpu.allocate(bytes).expect("memory").slice(0, bytes).expect("all");
    let there = Place::Device(block);
    run(
        &stream,
        layout.gather(&engine.tensors, &pages, 1..2, &there).expect("it fits"),
    );
    let got = host(bytes);
    run(&stream, vec![copy(there, Place::Host(got.clone()))]);
    assert!(got.to_vec() == engine.wanted(7, &pages, 1..2));
}

#[test]
fn memory_that_does_not_fit_a_layout_is_refused_with_what_was_wrong() {
    let Some(gpu) = gpu(Kind::Well) else { return };
    let layout = layouts()[0];
    let engine = Engine::new(&gpu, layout);
    let block = Place::Host(host(4096));
    let gather = |tensors: &[DeviceSlice], pages: &[u32]| layout.gather(tensors, pages, 0..3, &block);
    let error = gather(&engine.tensors[..2], &[1]).expect_err("too few");
    assert_eq!(error, LayoutError::Tensors { given: 2, wanted: 3 });
    let short = engine.tensors[0].subslice(0, 100).expect("inside");
    let mixed = [engine.tensors[0].clone(), short, engine.tensors[2].clone()];
    let error = gather(&mixed, &[1]).expect_err("too short");
    assert!(
        matches!(
            error,
            LayoutError::TensorBytes {
                tensor: 1,
                given: 100,
                ..
            }
        ),
        "{error}"
    );
    let error = gather(&engine.tensors, &[1]).expect_err("another size");
    assert!(matches!(error, LayoutError::BlockBytes { given: 4096, .. }), "{error}");
    assert!(gather(&engine.tensors, &[11]).is_err());
}
