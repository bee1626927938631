//! What moves many small pieces.

use std::sync::Arc;

use kvtier_transfer::gpu::{Copy, Gpu, PieceMover, PieceMoverWanted, Place, Stream};
use kvtier_transfer::memory::{MemoryRegion, MemorySlice};

use crate::{Kind, MIB, copy, filled, gpu, host, is_real, pattern, run};

/// A device whose small pieces a kernel moves, and host memory that it may go to.
fn with_kernel() -> (Arc<Gpu>, Stream) {
    let gpu = gpu(Kind::Kernels).expect("a real device runs it, too");
    let chosen = gpu.choose_piece_mover(PieceMoverWanted::Kernel);
    assert_eq!(chosen.mover, PieceMover::Kernel, "{chosen}");
    if !is_real() {
        println!("not executed: the kernel as a device's own code: what its PTX says was carried out here");
    }
    let stream = gpu.stream().expect("a stream");
    (gpu, stream)
}

#[test]
fn a_kernel_moves_small_pieces_wherever_they_lie() {
    let (gpu, stream) = with_kernel();
    let region = MemoryRegion::anonymous(2 * MIB).expect("memory");
    let _registered = gpu.register(&region).expect("registered");
    let device = gpu.allocate(4 * MIB).expect("memory");
    // Lengths with and without a tail, on either side of what fits one launch and of what one block of threads takes at a time.
    for (count, length, shift) in [
        (4, 1, 0),
        (5, 15, 0),
        (129, 4096, 0),
        (300, 1000, 0),
        (9, 16 << 10, 3),
        (20, 33_000, 0),
        (16, 33_000, 5),
        (128, 2048, 8),
        (128, 2048, 16),
        (7, 20_001, 32),
    ] {
        let distance = usize::next_multiple_of(length + shift, 16);
        let sent = pattern(count + length, count * distance);
        let half = |at: usize| region.slice(at * MIB, count * distance).expect("inside");
        half(0).copy_from_slice(&sent).expect("equal");
        half(1).copy_from_slice(&vec![0xEE; count * distance]).expect("equal");
        let piece =
            |at: usize, half: &MemorySlice| Place::Host(half.subslice(at * distance + shift, length).expect("inside"));
        let there = |at: usize| {
            let place = (count - 1 - at) * (distance + 16) + shift;
            Place::Device(device.slice(place, length).expect("inside"))
        };
        let before = gpu.batches_by_kernel();
        run(
            &stream,
            (0..count).map(|at| copy(piece(at, &half(0)), there(at))).collect(),
        );
        run(
            &stream,
            (0..count).map(|at| copy(there(at), piece(at, &half(1)))).collect(),
        );
        // What begins between its words is no work for it.
        let by_kernel = if shift % 16 == 0 { 2 } else { 0 };
        assert_eq!(gpu.batches_by_kernel() - before, by_kernel, "{count} of {length}");
        let came = half(1).to_vec();
        for (at, byte) in came.iter().enumerate() {
            let within = at % distance;
            let wanted = match (shift..shift + length).contains(&within) {
                true => sent[at],
                false => 0xEE,
            };
            assert_eq!(*byte, wanted, "byte {at} of {count} pieces of {length}, {shift} on");
        }
    }
}

#[test]
fn a_kernel_moves_pieces_within_the_device() {
    let (gpu, stream) = with_kernel();
    let device = gpu.allocate(2 * MIB).expect("memory");
    let there = |offset: usize, length: usize| Place::Device(device.slice(offset, length).expect("inside"));
    let source = filled(3, MIB);
    run(&stream, vec![copy(Place::Host(source.clone()), there(0, MIB))]);
    let before = gpu.batches_by_kernel();
    let pieces = |at: usize| copy(there(at * 4096, 4096), there(MIB + (255 - at) * 4096, 4096));
    run(&stream, (0..256).map(pieces).collect());
    assert_eq!(gpu.batches_by_kernel() - before, 1);
    let target = host(MIB);
    run(&stream, vec![copy(there(MIB, MIB), Place::Host(target.clone()))]);
    let (came, sent) = (target.to_vec(), source.to_vec());
    assert!((0..256).all(|at| came[(255 - at) * 4096..][..4096] == sent[at * 4096..][..4096]));
}

#[test]
fn what_is_no_work_for_a_kernel_goes_through_the_copy_engines() {
    let (gpu, stream) = with_kernel();
    let region = MemoryRegion::anonymous(2 * MIB).expect("memory");
    let device = gpu.allocate(2 * MIB).expect("memory");
    let pair = |host: &Arc<MemoryRegion>, at: usize, length: usize| {
        copy(
            Place::Host(host.slice(at * length, length).expect("inside")),
            Place::Device(device.slice(at * length, length).expect("inside")),
        )
    };
    let moved_by_kernel = |copies: Vec<Copy>| {
        let before = gpu.batches_by_kernel();
        run(&stream, copies);
        gpu.batches_by_kernel() - before
    };
    let small = |host: &Arc<MemoryRegion>| (0..8).map(|at| pair(host, at, 4096)).collect::<Vec<_>>();
    assert_eq!(
        moved_by_kernel(small(&region)),
        0,
        "the device may not go there by itself"
    );
    let registered = gpu.register(&region).expect("registered");
    assert_eq!(moved_by_kernel(small(&region)), 1);
    assert_eq!(moved_by_kernel(small(&region)[..3].to_vec()), 0, "three are not many");
    let large = (0..8).map(|at| pair(&region, at, 64 << 10)).collect();
    assert_eq!(moved_by_kernel(large), 0, "copy engines are as fast with these");
    let other = MemoryRegion::anonymous(MIB).expect("memory");
    let mixed = small(&region).into_iter().chain([pair(&other, 9, 4096)]).collect();
    assert_eq!(moved_by_kernel(mixed), 0, "one of them cannot be reached");
    drop(registered);
    assert_eq!(moved_by_kernel(small(&region)), 0, "nor now");
    assert_eq!(
        gpu.choose_piece_mover(PieceMoverWanted::CopyEngines).mover,
        PieceMover::CopyEngines
    );
    let _registered = gpu.register(&region).expect("registered");
    assert_eq!(moved_by_kernel(small(&region)), 0, "it is not wanted");
}

#[test]
fn what_moves_pieces_is_chosen_by_trying_and_said() {
    let Some(kernels) = gpu(Kind::Kernels) else { return };
    let chosen = kernels.choose_piece_mover(PieceMoverWanted::Faster);
    let (kernel, engines) = (chosen.kernel_rate, chosen.engines_rate);
    assert!(
        kernel.is_some_and(|rate| rate > 0.0) && engines.is_some_and(|rate| rate > 0.0),
        "{chosen}"
    );
    assert_eq!(
        chosen.mover == PieceMover::Kernel,
        kernel > engines.map(|rate| rate * 1.1)
    );
    assert!(chosen.to_string().contains("pieces of 16 KiB: kernel "), "{chosen}");
    println!("chosen: {chosen}");
    // One that takes no kernel, one without the memory to try it, one that launches none, one whose kernel brings other bytes.
    for (kind, words) in [
        (Kind::Well, "cuModuleLoadData: CUDA_ERROR_NOT_SUPPORTED"),
        (Kind::Small, "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY"),
        (Kind::LaunchesNone, "cuLaunchKernel: CUDA_ERROR_NOT_SUPPORTED"),
        (Kind::WrongKernels, "other bytes came back"),
        (Kind::Refuses, "cuMemHostRegister"),
    ] {
        if is_real() {
            println!("not executed: a real device cannot be made to refuse kernels");
            return;
        }
        let Some(gpu) = gpu(kind) else { return };
        for wanted in [PieceMoverWanted::Faster, PieceMoverWanted::Kernel] {
            let chosen = gpu.choose_piece_mover(wanted);
            assert_eq!((chosen.mover, chosen.kernel_rate), (PieceMover::CopyEngines, None));
            assert!(chosen.to_string().contains(words), "{chosen}");
            if kind != Kind::WrongKernels {
                assert_eq!(
                    gpu.batches_by_kernel(),
                    0,
                    "what others moved does not count as the kernel's"
                );
            }
            assert_eq!(gpu.piece_mover(), Some(chosen));
        }
        assert!(!gpu.is_lost());
    }
}
