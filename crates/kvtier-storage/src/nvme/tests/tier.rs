use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use kvtier_core::{
    BlockHash, Completion, Event, Extent, Failure, Generation, Labels, NamespaceId, OperationId, Parent, RealizationId,
    RecordLabel, SegmentId,
};
use kvtier_transfer::crc32c;
use kvtier_transfer::memory::{MemoryRegion, MemorySlice};

use super::super::faults::{Fault, FaultyEngine};
use super::super::format::{self, Header, Seal};
use super::super::{
    Direction, Encryption, EngineChoice, EngineSettings, NvmeError, NvmeSettings, NvmeTier, StorageAction,
};
use super::{TestKeys, pattern};

const PATIENCE: Duration = Duration::from_secs(30);
const SEGMENT_BYTES: u64 = 4 << 20;
const FIRST: SegmentId = SegmentId(1);

/// A tier in a directory of its own, on one engine, that can be made to fail.
struct Rig {
    tier: NvmeTier,
    faults: Arc<FaultyEngine>,
    events: Receiver<Event>,
    operations: AtomicU64,
    directory: tempfile::TempDir,
}

fn settings(directory: &Path, engine: EngineChoice) -> NvmeSettings {
    NvmeSettings {
        engine,
        bounce_bytes: 1 << 20,
        ..NvmeSettings::new(directory.join("nvme"), 64 << 20, TestKeys::all())
    }
}

impl Rig {
    fn new(engine: EngineChoice) -> Option<Rig> {
        Rig::with(engine, |settings| settings)
    }

    fn with(engine: EngineChoice, adjust: impl FnOnce(NvmeSettings) -> NvmeSettings) -> Option<Rig> {
        if engine == EngineChoice::IoUring {
            super::uring(EngineSettings::default())?;
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (report, events) = channel();
        let mut faults = None;
        let tier = NvmeTier::open_wrapped(
            adjust(settings(directory.path(), engine)),
            Arc::new(move |event| {
                let _ = report.send(event);
            }),
            |engine| {
                let faulty = FaultyEngine::new(engine);
                faults = Some(Arc::clone(&faulty));
                faulty
            },
        );
        let (tier, _) = tier.expect("the tier opens");
        let rig = Rig {
            tier,
            faults: faults.expect("wrapped"),
            events,
            operations: AtomicU64::new(1),
            directory,
        };
        assert_eq!(
            rig.ask(|operation| StorageAction::Open {
                operation,
                segment: FIRST,
                bytes: SEGMENT_BYTES
            }),
            Ok(Completion::Done)
        );
        Some(rig)
    }

    fn submit(&self, action: impl FnOnce(OperationId) -> StorageAction) -> OperationId {
        let operation = OperationId(self.operations.fetch_add(1, Ordering::Relaxed));
        self.tier.submit(action(operation));
        operation
    }

    fn next(&self) -> Event {
        self.events.recv_timeout(PATIENCE).expect("an event")
    }

    /// Submits one action while nothing else is under way.
    fn ask(&self, action: impl FnOnce(OperationId) -> StorageAction) -> Result<Completion, Failure> {
        let operation = self.submit(action);
        let event = self.next();
        assert_eq!(event.operation, operation);
        event.outcome
    }

    fn demote(&self, source: MemorySlice, target: Extent) -> Result<Completion, Failure> {
        self.ask(|operation| StorageAction::Demote {
            operation,
            source,
            target,
            label: label(),
        })
    }

    fn promote(&self, source: Extent, target: MemorySlice, checksum: u32) -> Result<Completion, Failure> {
        self.ask(|operation| StorageAction::Promote {
            operation,
            source,
            target,
            checksum,
            label: label(),
        })
    }

    fn write(&self, target: Extent, bytes: &[u8]) -> u32 {
        let source = filled(bytes);
        assert_eq!(
            self.demote(source, target),
            Ok(Completion::Written {
                checksum: crc32c(bytes)
            })
        );
        crc32c(bytes)
    }

    fn path(&self, segment: SegmentId) -> PathBuf {
        self.directory
            .path()
            .join(format!("nvme/segment-{:08x}.kvs", segment.0))
    }
}

fn label() -> RecordLabel {
    RecordLabel {
        namespace: NamespaceId(3),
        generation: Generation(5),
        realization: RealizationId(1),
        hash: BlockHash([0xAB; 16]),
        parent: Parent::Root,
        tokens: 512,
        labels: Labels::None,
    }
}

fn at(offset: u64, length: usize) -> Extent {
    Extent {
        segment: FIRST,
        offset: format::HEADER_BYTES + offset,
        length: u32::try_from(length).expect("small"),
    }
}

/// A slot as the host tier has them: whole pages, of which the slice is the payload. Past it lies what an earlier owner
/// left.
fn slot(length: usize) -> MemorySlice {
    let region = MemoryRegion::anonymous(length.next_multiple_of(4096)).expect("memory");
    let all = region.slice(0, region.bytes()).expect("all of it");
    all.copy_from_slice(&vec![0xEE; all.len()]).expect("equal lengths");
    region.slice(0, length).expect("a part of it")
}

fn filled(bytes: &[u8]) -> MemorySlice {
    let slot = slot(bytes.len());
    slot.copy_from_slice(bytes).expect("equal lengths");
    slot
}

fn records_come_back_at_every_length(rig: &Rig) {
    let mut offset = 0;
    for length in [1, 4095, 4096, 4097, 16_384, 16_385, 100_001, 1 << 20, 1_500_000] {
        let bytes = pattern(length as u64, length);
        let place = at(offset, length);
        let checksum = rig.write(place, &bytes);
        let target = slot(length);
        assert_eq!(rig.promote(place, target.clone(), checksum), Ok(Completion::Done));
        assert!(target.to_vec() == bytes, "{length} bytes");
        offset += length.next_multiple_of(4096) as u64;
    }
    assert_eq!(rig.tier.statistics().corrupt, 0);
}

fn memory_that_starts_inside_a_page_keeps_its_neighbours(rig: &Rig) {
    let region = MemoryRegion::anonymous(64 << 10).expect("memory");
    let all = region.slice(0, 64 << 10).expect("all of it");
    all.copy_from_slice(&pattern(1, 64 << 10)).expect("equal lengths");
    let source = region.slice(100, 20_000).expect("a part of it");
    let place = at(0, 20_000);
    let Ok(Completion::Written { checksum }) = rig.demote(source.clone(), place) else {
        panic!("the write succeeds")
    };
    source.zero();
    assert_eq!(rig.promote(place, source, checksum), Ok(Completion::Done));
    assert!(
        all.to_vec() == pattern(1, 64 << 10),
        "as before, the neighbours included"
    );
}

fn what_an_earlier_owner_left_behind_the_payload_stays_off_the_disk(rig: &Rig) {
    rig.write(at(0, 5000), &pattern(1, 5000));
    let file = fs::read(rig.path(FIRST)).expect("the segment file");
    let tail = &file[usize::try_from(format::HEADER_BYTES).expect("small") + 5000..][..3192];
    assert!(tail.iter().all(|byte| *byte == 0));
}

fn a_damaged_payload_is_a_miss_and_its_target_holds_zeroes(rig: &Rig) {
    for (offset, length) in [(0, 5000), (8192, 300_000)] {
        let place = at(offset, length);
        let checksum = rig.write(place, &pattern(7, length));
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(rig.path(FIRST))
            .expect("the segment file");
        // What lies there is sealed, so any value may be there: the byte is changed, whatever it is.
        let middle = place.offset + length as u64 / 2;
        let mut byte = [0];
        file.read_exact_at(&mut byte, middle).expect("there");
        file.write_all_at(&[!byte[0]], middle).expect("damaged");
        file.sync_all().expect("on disk");
        let target = slot(length);
        assert_eq!(rig.promote(place, target.clone(), checksum), Err(Failure::Corrupt));
        assert!(
            target.to_vec().iter().all(|byte| *byte == 0),
            "neither damaged nor old bytes"
        );
    }
    assert_eq!(rig.tier.statistics().corrupt, 2);
}

fn silent_faults_of_the_device_are_caught_by_the_check(rig: &Rig) {
    const LENGTH: usize = 50_000;
    let bytes = pattern(3, LENGTH);
    for (number, direction, fault) in [
        (0, Direction::Read, Fault::FlipBit(399_999)),
        (1, Direction::Write, Fault::FlipBit(0)),
        (2, Direction::Write, Fault::Torn),
    ] {
        let place = at(number * 65_536, LENGTH);
        rig.faults.inject(direction, fault);
        let checksum = rig.write(place, &bytes);
        let target = slot(LENGTH);
        assert_eq!(
            rig.promote(place, target.clone(), checksum),
            Err(Failure::Corrupt),
            "{direction:?} {fault:?}"
        );
        assert!(target.to_vec().iter().all(|byte| *byte == 0));
    }
}

fn errors_of_the_device_have_names(rig: &Rig) {
    let cases = [
        (Fault::Error(libc::EIO), Failure::Io),
        (Fault::Error(libc::ENOSPC), Failure::Full),
        (Fault::Error(libc::ENODEV), Failure::Io),
        (Fault::EndOfFile, Failure::Io),
    ];
    let checksum = rig.write(at(0, 9000), &pattern(1, 9000));
    for (number, (fault, failure)) in (1..).zip(cases) {
        rig.faults.inject(Direction::Write, fault);
        let place = at(number * 16_384, 9000);
        assert_eq!(rig.demote(slot(9000), place), Err(failure), "{fault:?}");
        rig.faults.inject(Direction::Read, fault);
        let target = slot(9000);
        assert_eq!(
            rig.promote(at(0, 9000), target.clone(), checksum),
            Err(failure),
            "{fault:?}"
        );
        assert!(
            target.to_vec().iter().all(|byte| *byte == 0),
            "no part of a failed read is left"
        );
    }
    assert_eq!(rig.tier.statistics().io_errors, 8);
}

fn a_relocated_record_is_checked_and_then_the_same(rig: &Rig) {
    let second = SegmentId(2);
    assert_eq!(
        rig.ask(|operation| StorageAction::Open {
            operation,
            segment: second,
            bytes: SEGMENT_BYTES
        }),
        Ok(Completion::Done)
    );
    for (offset, length) in [(0, 3000), (4096, 16_384), (20_480, 1_200_000)] {
        let source = at(offset, length);
        let target = Extent {
            segment: second,
            ..source
        };
        let checksum = rig.write(source, &pattern(9, length));
        let relocate = |operation| StorageAction::Relocate {
            operation,
            source,
            target,
            checksum,
            label: label(),
        };
        assert_eq!(rig.ask(relocate), Ok(Completion::Done));
        let read = slot(length);
        assert_eq!(rig.promote(target, read.clone(), checksum), Ok(Completion::Done));
        assert!(read.to_vec() == pattern(9, length));
        rig.faults.inject(Direction::Read, Fault::FlipBit(12_345));
        let again = |operation| StorageAction::Relocate {
            operation,
            source,
            target: Extent {
                offset: target.offset + (2 << 20),
                ..target
            },
            checksum,
            label: label(),
        };
        assert_eq!(rig.ask(again), Err(Failure::Corrupt));
    }
}

fn relocations_beyond_the_bounce_memory_wait_their_turn(rig: &Rig) {
    let second = SegmentId(2);
    assert_eq!(
        rig.ask(|operation| StorageAction::Open {
            operation,
            segment: second,
            bytes: SEGMENT_BYTES
        }),
        Ok(Completion::Done)
    );
    let checksum = rig.write(at(0, 500_000), &pattern(9, 500_000));
    for number in 0..7 {
        let target = Extent {
            segment: second,
            ..at(number * 503_808, 500_000)
        };
        rig.submit(|operation| StorageAction::Relocate {
            operation,
            source: at(0, 500_000),
            target,
            checksum,
            label: label(),
        });
    }
    for _ in 0..7 {
        assert_eq!(rig.next().outcome, Ok(Completion::Done));
    }
    assert_eq!(rig.tier.statistics().relocated_bytes, 3_500_000);
}

fn a_sealed_segment_says_what_it_holds(rig: &Rig) {
    let lengths = [16_384, 5000, 70_000];
    let mut offset = 0;
    let mut sums = Vec::new();
    for length in lengths {
        sums.push((
            format::HEADER_BYTES + offset,
            rig.write(at(offset, length), &pattern(length as u64, length)),
        ));
        offset += format::padded(length as u64);
    }
    // A seal waits for the writes before it.
    rig.faults
        .inject(Direction::Write, Fault::Delay(Duration::from_millis(50)));
    let last = at(offset, 4096);
    let demote = rig.submit(|operation| StorageAction::Demote {
        operation,
        source: filled(&[1; 4096]),
        target: last,
        label: label(),
    });
    let seal = rig.submit(|operation| StorageAction::Seal {
        operation,
        segment: FIRST,
    });
    let order = [rig.next(), rig.next()];
    assert_eq!(order.map(|event| event.operation), [demote, seal]);
    assert!(order.iter().all(|event| event.outcome.is_ok()), "{order:?}");
    sums.push((last.offset, crc32c(&[1; 4096])));

    let file = fs::read(rig.path(FIRST)).expect("the segment file");
    assert_eq!(file.len() as u64, SEGMENT_BYTES);
    let header = Header::decode(&file).expect("a header");
    let seal = Seal::decode(&file[4096..], &header)
        .expect("a seal page")
        .expect("sealed");
    assert_eq!(seal.entries, 4);
    let (entries, damaged) = format::decode_index(&file[4 << 19..], &header, 4);
    assert_eq!(damaged, 0);
    assert_eq!(
        entries.iter().map(|(_, entry)| entry.offset).collect::<Vec<_>>(),
        sums.iter().map(|(offset, _)| *offset).collect::<Vec<_>>()
    );
    for (_, entry) in &entries {
        assert_eq!((entry.generation, entry.namespace), (5, 3));
    }
    assert!(
        !file.windows(16).any(|window| window == label().hash.0),
        "the hash is nowhere in the file"
    );
    assert_eq!(
        rig.demote(slot(4096), at(1 << 20, 4096)),
        Err(Failure::Io),
        "a sealed segment takes no more"
    );
    assert_eq!(
        rig.promote(at(0, 16_384), slot(16_384), sums[0].1),
        Ok(Completion::Done),
        "and can be read"
    );
}

fn a_closed_segment_leaves_no_file(rig: &Rig) {
    let checksum = rig.write(at(0, 4096), &[1; 4096]);
    assert!(rig.path(FIRST).exists());
    assert_eq!(
        rig.ask(|operation| StorageAction::Close {
            operation,
            segment: FIRST
        }),
        Ok(Completion::Done)
    );
    assert!(!rig.path(FIRST).exists());
    assert_eq!(rig.promote(at(0, 4096), slot(4096), checksum), Err(Failure::Io));
    assert_eq!(
        rig.ask(|operation| StorageAction::Sync { operation }),
        Ok(Completion::Done)
    );
}

fn extents_that_cannot_be_are_refused(rig: &Rig) {
    let beyond = Extent {
        segment: FIRST,
        offset: SEGMENT_BYTES - 4096,
        length: 4096,
    };
    let header = Extent {
        segment: FIRST,
        offset: 4096,
        length: 4096,
    };
    let crooked = Extent {
        segment: FIRST,
        offset: format::HEADER_BYTES + 512,
        length: 4096,
    };
    let unknown = Extent {
        segment: SegmentId(77),
        ..at(0, 4096)
    };
    for target in [beyond, header, crooked, unknown, at(0, 4095)] {
        assert_eq!(rig.demote(slot(4096), target), Err(Failure::Io), "{target:?}");
        assert_eq!(rig.promote(target, slot(4096), 0), Err(Failure::Io), "{target:?}");
    }
    let file = fs::read(rig.path(FIRST)).expect("the segment file");
    Header::decode(&file).expect("the header is whole");
}

fn a_reset_is_answered_last_and_only_when_no_device_holds_memory(rig: &Rig) {
    let checksum = rig.write(at(0, 8192), &pattern(1, 8192));
    rig.faults.inject(Direction::Read, Fault::Hold);
    let target = slot(8192);
    let region = Arc::downgrade(target.region());
    let held = rig.submit(|operation| StorageAction::Promote {
        operation,
        source: at(0, 8192),
        target,
        checksum,
        label: label(),
    });
    let seal_waits = rig.submit(|operation| StorageAction::Demote {
        operation,
        source: slot(1 << 20),
        target: at(1 << 20, 1 << 20),
        label: label(),
    });
    let reset = rig.submit(|operation| StorageAction::Reset { operation });
    let demoted = rig.next();
    assert_eq!(demoted.operation, seal_waits);
    assert!(
        matches!(demoted.outcome, Ok(_) | Err(Failure::Deadline)),
        "written or cancelled: {demoted:?}"
    );
    assert!(
        rig.events.recv_timeout(Duration::from_millis(50)).is_err(),
        "the device still holds memory"
    );
    assert!(region.upgrade().is_some());
    rig.faults.release();
    assert_eq!([rig.next().operation, rig.next().operation], [held, reset]);
    assert!(region.upgrade().is_none());
    assert_eq!(
        rig.ask(|operation| StorageAction::Reset { operation }),
        Ok(Completion::Done),
        "with nothing under way at once"
    );
    rig.write(at(1 << 19, 8192), &pattern(2, 8192));
}

fn full_means_busy(rig: &Rig) {
    let bounds = 4;
    for _ in 0..bounds {
        rig.faults.inject(Direction::Write, Fault::Hold);
    }
    for number in 0..bounds {
        let target = at(number * 8192, 8192);
        rig.submit(|operation| StorageAction::Demote {
            operation,
            source: slot(8192),
            target,
            label: label(),
        });
    }
    assert_eq!(rig.demote(slot(8192), at(1 << 20, 8192)), Err(Failure::Busy));
    assert_eq!(rig.promote(at(0, 8192), slot(8192), 0), Err(Failure::Busy));
    assert_eq!(rig.tier.statistics().busy, 2);
    while rig.faults.held() < 4 {
        std::thread::yield_now();
    }
    rig.faults.release();
    for _ in 0..bounds {
        rig.next().outcome.expect("what was taken is done");
    }
    rig.write(at(2 << 20, 8192), &pattern(1, 8192));
}

fn shutting_down_answers_every_action(rig: &Rig) {
    for _ in 0..3 {
        rig.faults.inject(Direction::Write, Fault::Hold);
    }
    let mut asked = 0;
    for number in 0..20 {
        let target = at(number * 131_072, 131_072);
        rig.submit(|operation| StorageAction::Demote {
            operation,
            source: slot(131_072),
            target,
            label: label(),
        });
        asked += 1;
    }
    for _ in 0..3 {
        let target = at(3 << 20, 100);
        rig.submit(|operation| StorageAction::Relocate {
            operation,
            source: at(0, 100),
            target,
            checksum: 0,
            label: label(),
        });
        asked += 1;
    }
    rig.submit(|operation| StorageAction::Seal {
        operation,
        segment: FIRST,
    });
    rig.submit(|operation| StorageAction::Sync { operation });
    rig.tier.shutdown();
    let answered = rig.events.try_iter().count();
    assert_eq!(answered, asked + 2);
    rig.tier.shutdown();
    assert_eq!(
        rig.demote(slot(4096), at(0, 4096)),
        Err(Failure::Busy),
        "a closed tier takes nothing"
    );
}

macro_rules! suite {
    ($($test:ident),+; bounded: $($bounded:ident),+) => {
        mod on_uring {
            suite!(@tests IoUring Aes256Gcm; $($test),+; $($bounded),+);
        }
        mod on_uring_in_the_clear {
            suite!(@tests IoUring None; $($test),+; $($bounded),+);
        }
        mod on_threads {
            suite!(@tests Threads Aes256Gcm; $($test),+; $($bounded),+);
        }
        mod on_threads_in_the_clear {
            suite!(@tests Threads None; $($test),+; $($bounded),+);
        }
    };
    (@tests $engine:ident $encryption:ident; $($test:ident),+; $($bounded:ident),+) => {
        use super::{Encryption, EngineChoice, EngineSettings, NvmeSettings, Rig};
        const ENCRYPTION: Encryption = Encryption::$encryption;
        $(#[test]
        fn $test() {
            let chosen = |settings: NvmeSettings| NvmeSettings { encryption: ENCRYPTION, ..settings };
            if let Some(rig) = Rig::with(EngineChoice::$engine, chosen) {
                super::$test(&rig);
            }
        })+
        $(#[test]
        fn $bounded() {
            let bounded = |settings: NvmeSettings| NvmeSettings {
                bounds: EngineSettings { queue_max: 4, ..settings.bounds },
                encryption: ENCRYPTION,
                ..settings
            };
            if let Some(rig) = Rig::with(EngineChoice::$engine, bounded) {
                super::$bounded(&rig);
            }
        })+
    };
}

suite! {
    records_come_back_at_every_length, memory_that_starts_inside_a_page_keeps_its_neighbours,
    what_an_earlier_owner_left_behind_the_payload_stays_off_the_disk, a_damaged_payload_is_a_miss_and_its_target_holds_zeroes,
    silent_faults_of_the_device_are_caught_by_the_check, errors_of_the_device_have_names, a_relocated_record_is_checked_and_then_the_same,
    relocations_beyond_the_bounce_memory_wait_their_turn, a_sealed_segment_says_what_it_holds, a_closed_segment_leaves_no_file,
    extents_that_cannot_be_are_refused, a_reset_is_answered_last_and_only_when_no_device_holds_memory, shutting_down_answers_every_action;
    bounded: full_means_busy
}

#[test]
fn a_second_tier_on_one_directory_is_told_who_has_it() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let quiet: super::super::Events = Arc::new(|_| {});
    let first =
        NvmeTier::open(settings(directory.path(), EngineChoice::Threads), Arc::clone(&quiet)).expect("the first opens");
    let refused = NvmeTier::open(settings(directory.path(), EngineChoice::Threads), Arc::clone(&quiet))
        .err()
        .expect("the second is refused");
    let NvmeError::InUse { holder, .. } = &refused else {
        panic!("{refused}")
    };
    assert_eq!(*holder, Some(std::process::id()));
    assert!(
        refused
            .to_string()
            .contains(directory.path().to_str().expect("a plain path")),
        "{refused}"
    );
    drop(first);
    NvmeTier::open(settings(directory.path(), EngineChoice::Threads), quiet).expect("free again");
}

#[test]
fn automatic_choice_always_finds_an_engine_and_says_why_not_the_first() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (tier, _) = NvmeTier::open(settings(directory.path(), EngineChoice::Auto), Arc::new(|_| {})).expect("it opens");
    let available = super::uring(EngineSettings::default()).is_some();
    assert_eq!(tier.engine_name(), if available { "io_uring" } else { "threads" });
    assert_eq!(
        tier.notes().iter().any(|note| note.contains("io_uring")),
        !available,
        "{:?}",
        tier.notes()
    );
}

#[test]
fn a_segment_that_cannot_be_made_leaves_no_file() {
    let Some(rig) = Rig::new(EngineChoice::Threads) else {
        return;
    };
    let answer = rig.ask(|operation| StorageAction::Open {
        operation,
        segment: SegmentId(5),
        bytes: 1 << 60,
    });
    assert!(matches!(answer, Err(Failure::Full | Failure::Io)), "{answer:?}");
    assert!(!rig.path(SegmentId(5)).exists());
}
