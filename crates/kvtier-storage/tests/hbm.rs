//! The tier in device memory, on the software device; with `KVTIER_GPU=real` on the system's.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Receiver;
use kvtier_core::{Completion, Event, Extent, Failure, OperationId, SegmentId};
use kvtier_storage::hbm::{Completions, HbmAction, HbmSettings, HbmTier};
use kvtier_transfer::gpu::{Copy, Place};
use kvtier_transfer::memory::{MemoryRegion, MemorySlice};

const MIB: u64 = 1 << 20;

/// What the software devices do, by their number: see `kvtier_softgpu`.
const WELL: usize = 0;
const SMALL: usize = 2;
const BREAKS: usize = 3;
const REFUSES: usize = 4;

struct Tier {
    tier: HbmTier,
    answers: Receiver<Event>,
    next: u64,
}

fn library() -> Option<PathBuf> {
    if std::env::var("KVTIER_GPU").is_ok_and(|kind| kind == "real") {
        return None;
    }
    let program = std::env::current_exe().expect("a program");
    Some(program.with_file_name("libkvtier_softgpu.so"))
}

/// The device that a case needs; `None` where a real one cannot be made to do that.
fn tier(device: usize) -> Option<Tier> {
    let library = library();
    if library.is_none() && device != WELL {
        println!("not executed: a real device cannot be made to fail so");
        return None;
    }
    let (sender, answers) = crossbeam_channel::unbounded();
    let settings = HbmSettings { device, library };
    let completions: Completions = Arc::new(move |event| {
        let _ = sender.send(event);
    });
    let tier = HbmTier::start(&settings, completions).expect("the software device");
    Some(Tier { tier, answers, next: 1 })
}

impl Tier {
    fn number(&mut self) -> OperationId {
        self.next += 1;
        OperationId(self.next)
    }

    fn ask(&mut self, action: impl FnOnce(OperationId) -> HbmAction) -> OperationId {
        let operation = self.number();
        self.tier.submit(action(operation));
        operation
    }

    fn answer(&self) -> (OperationId, Result<Completion, Failure>) {
        let event = self.answers.recv_timeout(Duration::from_secs(20)).expect("an answer");
        (event.operation, event.outcome)
    }

    fn open(&mut self, segment: u32, bytes: u64) -> Result<Completion, Failure> {
        let segment = SegmentId(segment);
        let operation = self.ask(|operation| HbmAction::Open {
            operation,
            segment,
            bytes,
        });
        let (answered, outcome) = self.answer();
        assert_eq!(answered, operation);
        outcome
    }

    fn promote(&mut self, source: &MemorySlice, target: Extent, checksum: Option<u32>) -> OperationId {
        self.ask(|operation| HbmAction::Promote {
            operation,
            source: source.clone(),
            target,
            checksum,
        })
    }

    /// What another process would see.
    fn read(&self, extent: Extent) -> Vec<u8> {
        let segment = self.tier.segment(extent.segment).expect("an open segment");
        let gpu = self.tier.gpu();
        let mapped = gpu
            .map(std::os::fd::AsFd::as_fd(&*segment.file), segment.region.bytes())
            .expect("mapped");
        let target = host(extent.length as usize);
        let copy = Copy {
            source: Place::Device(
                mapped
                    .slice(extent.offset as usize, extent.length as usize)
                    .expect("inside"),
            ),
            target: Place::Host(target.clone()),
        };
        let stream = gpu.stream().expect("a stream");
        stream.submit(vec![copy]).expect("taken").wait().expect("copied");
        target.to_vec()
    }
}

fn host(bytes: usize) -> MemorySlice {
    let region = MemoryRegion::anonymous(bytes.next_multiple_of(4096)).expect("memory");
    region.slice(0, bytes).expect("inside")
}

fn block(seed: usize, bytes: usize) -> MemorySlice {
    let slice = host(bytes);
    let pattern: Vec<u8> = (0..bytes).map(|at| ((at * 13 + seed * 7) % 251) as u8).collect();
    slice.copy_from_slice(&pattern).expect("equal");
    slice
}

fn extent(segment: u32, offset: u64, length: usize) -> Extent {
    Extent {
        segment: SegmentId(segment),
        offset,
        length: length as u32,
    }
}

#[test]
fn blocks_are_copied_checked_and_seen_by_whoever_maps_the_segment() {
    let Some(mut tier) = tier(WELL) else { return };
    let unit = tier.tier.segment_unit().expect("an answer");
    assert_eq!(tier.open(1, 8 * unit), Ok(Completion::Done));
    // What lay in a slot before is not seen behind a shorter block.
    tier.promote(&block(9, 8192), extent(1, 4096, 8192), None);
    assert!(tier.answer().1.is_ok());
    // Whole pages, a short last page, and more than is read back at a time.
    let lengths = [4096, 5000, 5 << 20];
    let mut offset = 0;
    let mut asked = Vec::new();
    for (seed, length) in lengths.into_iter().enumerate() {
        let source = block(seed, length);
        let checksum = (seed % 2 == 0).then(|| source.crc32c());
        let target = extent(1, offset, length);
        asked.push((tier.promote(&source, target, checksum), source, target));
        offset += (length as u64).next_multiple_of(4096);
    }
    for (operation, source, target) in asked {
        let checksum = source.crc32c();
        assert_eq!(tier.answer(), (operation, Ok(Completion::Written { checksum })));
        assert!(tier.read(target) == source.to_vec(), "{target:?}");
    }
    let padded = tier.read(extent(1, 4096, 8192));
    assert!(padded[5000..].iter().all(|byte| *byte == 0), "the rest of a page");
}

#[test]
fn what_is_not_what_its_checksum_says_is_corrupt() {
    let Some(mut tier) = tier(WELL) else { return };
    let unit = tier.tier.segment_unit().expect("an answer");
    assert_eq!(tier.open(1, unit), Ok(Completion::Done));
    let source = block(1, 4096);
    let operation = tier.promote(&source, extent(1, 0, 4096), Some(source.crc32c() ^ 1));
    assert_eq!(tier.answer(), (operation, Err(Failure::Corrupt)));
}

#[test]
fn new_and_zeroed_memory_is_zero_and_a_closed_segment_is_gone() {
    let Some(mut tier) = tier(WELL) else { return };
    let unit = tier.tier.segment_unit().expect("an answer");
    assert_eq!(tier.open(1, unit), Ok(Completion::Done));
    assert!(tier.read(extent(1, 0, 1 << 20)).iter().all(|byte| *byte == 0));
    let source = block(1, 65_536);
    tier.promote(&source, extent(1, 0, 65_536), None);
    assert!(tier.answer().1.is_ok());
    let segment = SegmentId(1);
    let ranges = vec![4096..8192, 32_768..40_960];
    tier.ask(|operation| HbmAction::Zero {
        operation,
        segment,
        ranges,
    });
    assert_eq!(tier.answer().1, Ok(Completion::Done));
    let (bytes, mut wanted) = (tier.read(extent(1, 0, 65_536)), source.to_vec());
    wanted[4096..8192].fill(0);
    wanted[32_768..40_960].fill(0);
    assert!(bytes == wanted);

    let open = tier.tier.segment(segment).expect("open");
    tier.ask(|operation| HbmAction::Close { operation, segment });
    assert_eq!(tier.answer().1, Ok(Completion::Done));
    assert!(tier.tier.segment(segment).is_none());
    // Who still maps it sees zeroes.
    let target = host(65_536);
    let copy = Copy {
        source: Place::Device(open.region.slice(0, 65_536).expect("inside")),
        target: Place::Host(target.clone()),
    };
    let stream = tier.tier.gpu().stream().expect("a stream");
    stream.submit(vec![copy]).expect("taken").wait().expect("copied");
    assert!(target.to_vec().iter().all(|byte| *byte == 0));
    // Closing once more is no error: the manager asks again where no answer came.
    tier.ask(|operation| HbmAction::Close { operation, segment });
    assert_eq!(tier.answer().1, Ok(Completion::Done));
}

#[test]
fn a_device_without_room_says_that_it_is_full() {
    let Some(mut tier) = tier(SMALL) else { return };
    assert_eq!(tier.open(1, 2 * MIB), Err(Failure::Full));
    let outside = tier.promote(&block(1, 4096), extent(9, 0, 4096), None);
    assert_eq!(tier.answer(), (outside, Err(Failure::Io)), "no such segment");
}

#[test]
fn a_device_that_breaks_fails_whatever_it_is_asked() {
    let Some(mut tier) = tier(BREAKS) else { return };
    assert_eq!(tier.open(1, 2 * MIB), Ok(Completion::Done));
    let operations: Vec<OperationId> = (0..4)
        .map(|at| tier.promote(&block(at, 4096), extent(1, at as u64 * 4096, 4096), None))
        .collect();
    let answers: Vec<_> = operations.iter().map(|_| tier.answer()).collect();
    assert!(answers[1..].iter().all(|(_, outcome)| outcome.is_err()), "{answers:?}");
    let segment = SegmentId(1);
    let ranges = vec![0..4096, 8192..12_288];
    tier.ask(|operation| HbmAction::Zero {
        operation,
        segment,
        ranges,
    });
    assert_eq!(tier.answer().1, Err(Failure::Io));
    tier.ask(|operation| HbmAction::Close { operation, segment });
    assert_eq!(tier.answer().1, Err(Failure::Io), "it cannot be zeroed");
    assert!(tier.tier.gpu().is_lost());
    assert_eq!(tier.open(2, 2 * MIB), Err(Failure::Io));
}

#[test]
fn memory_that_cannot_be_pinned_is_copied_all_the_same() {
    let Some(mut tier) = tier(REFUSES) else { return };
    assert_eq!(tier.open(1, 2 * MIB), Ok(Completion::Done));
    let source = block(5, 100_000);
    tier.promote(&source, extent(1, 0, 100_000), None);
    assert!(tier.answer().1.is_ok());
    assert!(tier.read(extent(1, 0, 100_000)) == source.to_vec());
}

#[test]
fn a_host_segment_is_pinned_until_it_is_let_go_of() {
    let Some(mut tier) = tier(WELL) else { return };
    assert_eq!(tier.open(1, 2 * MIB), Ok(Completion::Done));
    let source = block(1, 4096);
    tier.promote(&source, extent(1, 0, 4096), None);
    assert!(tier.answer().1.is_ok());
    assert!(source.region().is_pinned());
    tier.tier.let_go(source.region());
    assert!(!source.region().is_pinned());
}

#[test]
fn a_machine_without_a_driver_has_no_such_tier() {
    let settings = HbmSettings {
        device: 0,
        library: Some("/nowhere/libcuda.so.1".into()),
    };
    let refused = HbmTier::start(&settings, Arc::new(|_| {})).expect_err("no driver");
    assert!(refused.to_string().starts_with("cuda unavailable: "), "{refused}");
}
