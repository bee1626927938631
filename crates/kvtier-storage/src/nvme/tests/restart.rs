//! What is found again after a restart, a kill or a power cut, and what must not be.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kvtier_core::{
    BlockHash, Completion, Event, Extent, Failure, Generation, Label, Labels, NamespaceId, OperationId, Parent,
    RealizationId, RecordLabel, SegmentId,
};
use kvtier_transfer::memory::MemorySlice;

use super::super::format::{self, Entry, Header, Seal};
use super::super::keys::RecordKeys;
use super::super::sealing::RecordCipher;
use super::super::{Encryption, EngineChoice, Found, NvmeError, NvmeSettings, NvmeTier, StorageAction};
use super::{TestKeys, memory, pattern};

pub(super) const SEGMENT_BYTES: u64 = 1 << 20;
pub(super) const LENGTH: usize = 10_000;
pub(super) const BOTH: [Encryption; 2] = [Encryption::Aes256Gcm, Encryption::None];

pub(super) struct Run {
    pub(super) tier: NvmeTier,
    pub(super) found: Found,
    events: Receiver<Event>,
}

pub(super) fn settings(directory: &Path, encryption: Encryption) -> NvmeSettings {
    NvmeSettings {
        engine: EngineChoice::Threads,
        encryption,
        // Nothing is written unasked, unless a test wants it.
        flush_interval: Duration::from_secs(3600),
        ..NvmeSettings::new(directory.to_owned(), 64 << 20, TestKeys::all())
    }
}

impl Run {
    pub(super) fn start(settings: NvmeSettings) -> Run {
        let (report, events) = channel();
        let (tier, found) = NvmeTier::open(
            settings,
            Arc::new(move |event| {
                let _ = report.send(event);
            }),
        )
        .expect("the tier opens");
        Run { tier, found, events }
    }

    pub(super) fn ask(&self, action: StorageAction) -> Result<Completion, Failure> {
        self.tier.submit(action);
        self.events
            .recv_timeout(Duration::from_secs(30))
            .expect("an event")
            .outcome
    }

    pub(super) fn open(&self, segment: u32) {
        let opened = self.ask(StorageAction::Open {
            operation: OperationId(1),
            segment: SegmentId(segment),
            bytes: SEGMENT_BYTES,
        });
        assert_eq!(opened, Ok(Completion::Done));
    }

    pub(super) fn write(&self, segment: u32, number: u32) -> u32 {
        let source = memory(LENGTH);
        source.copy_from_slice(&payload(number)).expect("as long");
        match self.ask(StorageAction::Demote {
            operation: OperationId(2),
            source,
            target: place(segment, number),
            label: label(number),
        }) {
            Ok(Completion::Written { checksum }) => checksum,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn write_all(&self, segment: u32, numbers: std::ops::Range<u32>) {
        for number in numbers {
            self.write(segment, number);
        }
    }

    pub(super) fn read(&self, segment: u32, number: u32, checksum: u32) -> (Result<Completion, Failure>, MemorySlice) {
        let target = memory(LENGTH);
        target.copy_from_slice(&[0x5a; LENGTH]).expect("as long");
        let outcome = self.ask(StorageAction::Promote {
            operation: OperationId(3),
            source: place(segment, number),
            target: target.clone(),
            checksum,
            label: label(number),
        });
        (outcome, target)
    }

    pub(super) fn sync(&self) {
        let operation = OperationId(4);
        assert_eq!(self.ask(StorageAction::Sync { operation }), Ok(Completion::Done));
    }

    pub(super) fn seal(&self, segment: u32) {
        let sealed = self.ask(StorageAction::Seal {
            operation: OperationId(5),
            segment: SegmentId(segment),
        });
        assert_eq!(sealed, Ok(Completion::Done));
    }

    pub(super) fn numbers(&self) -> Vec<u32> {
        let records = self.found.segments.iter().flat_map(|segment| &segment.records);
        let mut numbers: Vec<u32> = records
            .map(|record| u32::from_le_bytes(*record.label.hash.0.first_chunk().expect("16 bytes")))
            .collect();
        numbers.sort_unstable();
        numbers
    }
}

pub(super) fn payload(number: u32) -> Vec<u8> {
    pattern(u64::from(number) + 1, LENGTH)
}

pub(super) fn hash(number: u32) -> BlockHash {
    let mut bytes = [0xcd; 16];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    BlockHash(bytes)
}

pub(super) fn label(number: u32) -> RecordLabel {
    RecordLabel {
        namespace: NamespaceId(3),
        generation: Generation(5),
        realization: RealizationId(1),
        hash: hash(number),
        parent: match number {
            0 => Parent::Root,
            1 => Parent::Unknown,
            later => Parent::Block(hash(later - 1)),
        },
        tokens: 256,
        labels: match number % 4 {
            0 => Labels::None,
            1 => Labels::One(Label(u64::from(number))),
            2 => Labels::Two(Label(u64::from(number)), Label(u64::MAX)),
            _ => Labels::Any,
        },
    }
}

pub(super) fn place(segment: u32, number: u32) -> Extent {
    Extent {
        segment: SegmentId(segment),
        offset: format::HEADER_BYTES + u64::from(number) * format::padded(LENGTH as u64),
        length: LENGTH as u32,
    }
}

/// The directory as a kill would leave it at this moment.
fn image(directory: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a temporary directory");
    for entry in fs::read_dir(directory).expect("the directory") {
        let entry = entry.expect("an entry");
        if entry.file_name() != "lock" {
            fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("copied");
        }
    }
    copy
}

fn file(directory: &Path, segment: u32) -> std::path::PathBuf {
    directory.join(format!("segment-{segment:08x}.kvs"))
}

#[test]
fn sealed_and_open_segments_are_found_with_all_that_their_records_say() {
    for encryption in BOTH {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let run = Run::start(settings(directory.path(), encryption));
        run.open(1);
        run.open(2);
        let mut checksums: Vec<u32> = (0..40).map(|number| run.write(1, number)).collect();
        run.seal(1);
        checksums.extend((40..45).map(|number| run.write(2, number)));
        run.sync();
        let copy = image(directory.path());
        let again = Run::start(settings(copy.path(), encryption));
        assert_eq!(again.numbers(), (0..45).collect::<Vec<u32>>());
        assert_eq!((again.found.damaged, again.found.sealed_off), (0, 0));
        for segment in &again.found.segments {
            assert_eq!(segment.bytes, SEGMENT_BYTES);
            for record in &segment.records {
                let number = u32::from_le_bytes(*record.label.hash.0.first_chunk().expect("16 bytes"));
                assert_eq!(record.label, label(number));
                let extent = Extent {
                    segment: segment.segment,
                    offset: record.offset,
                    length: record.length,
                };
                assert_eq!(extent, place(segment.segment.0, number));
                assert_eq!(record.checksum, checksums[number as usize]);
                let (outcome, target) = again.read(segment.segment.0, number, record.checksum);
                assert_eq!(outcome, Ok(Completion::Done));
                assert!(target.to_vec() == payload(number));
            }
        }
        // A segment of an earlier run takes no more records: its nonces are used up to a place that nobody knows.
        let target = place(2, 50);
        let refused = again.ask(StorageAction::Demote {
            operation: OperationId(9),
            source: memory(LENGTH),
            target,
            label: label(50),
        });
        assert_eq!(refused, Err(Failure::Io));
    }
}

/// The file as version 2 of the format would have it.
fn as_version_2(path: &Path) {
    let mut bytes = fs::read(path).expect("read");
    let header = Header::decode(&bytes).expect("a header");
    let old = Header { version: 2, ..header };
    let page = format::ALIGNMENT as usize;
    if let Some(seal) = Seal::decode(&bytes[page..], &header).expect("a seal page") {
        let seal = Seal { version: 2, ..seal };
        bytes[page..2 * page].copy_from_slice(&seal.encode());
    }
    let most = format::entries_max(header.bytes) as usize;
    for (ordinal, entry) in format::decode_index(&bytes, &header, most).0 {
        let (namespace, generation) = (NamespaceId(entry.namespace), Generation(entry.generation));
        let key = TestKeys::all().data_key(namespace, generation).expect("its key");
        let cipher = RecordCipher::derive(&key, &header.incarnation);
        let name = cipher.open_name(&entry, header.segment).expect("its name");
        let blank = Entry {
            version: 2,
            name: [0; format::NAME_BYTES],
            ..entry
        };
        let entry = cipher
            .seal_name(blank, header.segment, &name)
            .encode(&header.incarnation);
        let end = bytes.len() - ordinal as usize * entry.len();
        bytes[end - entry.len()..end].copy_from_slice(&entry);
    }
    bytes[..page].copy_from_slice(&old.encode());
    fs::write(path, bytes).expect("written");
}

#[test]
fn segments_of_version_2_are_read_and_their_labels_are_not_known() {
    for encryption in BOTH {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let run = Run::start(settings(directory.path(), encryption));
        run.open(1);
        run.open(2);
        let mut checksums: Vec<u32> = (0..40).map(|number| run.write(1, number)).collect();
        run.seal(1);
        checksums.extend((40..45).map(|number| run.write(2, number)));
        run.sync();
        drop(run);
        for segment in [1, 2] {
            as_version_2(&file(directory.path(), segment));
        }
        let again = Run::start(settings(directory.path(), encryption));
        assert_eq!(again.numbers(), (0..45).collect::<Vec<u32>>());
        assert_eq!((again.found.damaged, again.found.sealed_off), (0, 0));
        for segment in &again.found.segments {
            for record in &segment.records {
                let number = u32::from_le_bytes(*record.label.hash.0.first_chunk().expect("16 bytes"));
                let labels = Labels::Any;
                assert_eq!(
                    record.label,
                    RecordLabel {
                        labels,
                        ..label(number)
                    }
                );
                let (outcome, target) = again.read(segment.segment.0, number, checksums[number as usize]);
                assert_eq!(outcome, Ok(Completion::Done));
                assert!(target.to_vec() == payload(number));
            }
        }
        // What is overwritten in such a file is found by what its entries say.
        assert_eq!(again.found.segments.len(), 2);
        let erased = again.ask(StorageAction::Erase {
            operation: OperationId(6),
            segment: SegmentId(1),
            pages: 0..u32::MAX,
            namespace: NamespaceId(3),
            keep: Vec::new(),
        });
        assert!(
            matches!(erased, Ok(Completion::Erased { records: 40, .. })),
            "{erased:?}"
        );
    }
}

#[test]
fn what_was_not_synced_is_lost_or_whole_and_what_was_is_there() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(settings(directory.path(), Encryption::Aes256Gcm));
    run.open(1);
    run.write_all(1, 0..10);
    run.sync();
    run.write_all(1, 10..20);
    let again = Run::start(settings(image(directory.path()).path(), Encryption::Aes256Gcm));
    assert_eq!(again.numbers(), (0..10).collect::<Vec<u32>>());
    // An end in order leaves everything findable.
    drop(run);
    let last = Run::start(settings(directory.path(), Encryption::Aes256Gcm));
    assert_eq!(last.numbers(), (0..20).collect::<Vec<u32>>());
}

#[test]
fn records_become_durable_by_themselves() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(NvmeSettings {
        flush_interval: Duration::from_millis(20),
        ..settings(directory.path(), Encryption::Aes256Gcm)
    });
    run.open(1);
    run.write_all(1, 0..5);
    let started = Instant::now();
    loop {
        let again = Run::start(settings(image(directory.path()).path(), Encryption::Aes256Gcm));
        if again.numbers() == (0..5).collect::<Vec<u32>>() {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", again.numbers());
    }
}

#[test]
fn a_power_cut_between_any_two_writes_leaves_records_that_are_whole_or_absent() {
    // Every prefix of the bytes of an index that is being rewritten, over what was there before.
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(settings(directory.path(), Encryption::Aes256Gcm));
    run.open(1);
    run.write_all(1, 0..3);
    run.sync();
    let before = fs::read(file(directory.path(), 1)).expect("the segment");
    run.write_all(1, 3..6);
    run.seal(1);
    let after = fs::read(file(directory.path(), 1)).expect("the segment");
    let changed: Vec<usize> = (0..after.len() / 512)
        .filter(|sector| before[sector * 512..][..512] != after[sector * 512..][..512])
        .collect();
    assert!(changed.len() > 3);
    let copy = tempfile::tempdir().expect("a temporary directory");
    for cut in 0..64u64 {
        // Sectors of 512 bytes reach the device in any order: a seeded choice of them.
        let choice = (cut + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut image = before.clone();
        for (number, sector) in changed.iter().enumerate() {
            if choice.rotate_left(number as u32) & 1 == 1 {
                image[sector * 512..][..512].copy_from_slice(&after[sector * 512..][..512]);
            }
        }
        fs::write(file(copy.path(), 1), &image).expect("written");
        let again = Run::start(settings(copy.path(), Encryption::Aes256Gcm));
        assert!(again.numbers().starts_with(&[0, 1, 2]), "{:?}", again.numbers());
        for record in again.found.segments.iter().flat_map(|segment| &segment.records) {
            let number = u32::from_le_bytes(*record.label.hash.0.first_chunk().expect("16 bytes"));
            let (outcome, target) = again.read(1, number, record.checksum);
            match outcome {
                Ok(_) => assert!(target.to_vec() == payload(number)),
                Err(failure) => {
                    assert_eq!(failure, Failure::Corrupt);
                    assert!(number >= 3, "what was synced is whole");
                    assert!(target.to_vec().iter().all(|byte| *byte == 0));
                }
            }
        }
    }
}

#[test]
fn a_deleted_record_stays_deleted_in_open_and_sealed_segments() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(settings(directory.path(), Encryption::Aes256Gcm));
    run.open(1);
    run.open(2);
    run.write_all(1, 0..4);
    run.seal(1);
    run.write_all(2, 4..8);
    run.sync();
    for (segment, number) in [(1, 1), (2, 6)] {
        run.tier.submit(StorageAction::ForgetRecord {
            target: place(segment, number),
        });
    }
    // The keeper carries out one thing after another.
    run.sync();
    let again = Run::start(settings(image(directory.path()).path(), Encryption::Aes256Gcm));
    assert_eq!(again.numbers(), [0, 2, 3, 4, 5, 7]);
    assert_eq!(again.found.damaged, 0);
}

#[test]
fn records_of_an_older_generation_are_sealed_off() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(settings(directory.path(), Encryption::None));
    run.open(1);
    run.write(1, 0);
    drop(run);
    let keys = TestKeys::all();
    let run = Run::start(NvmeSettings {
        keys: keys.clone(),
        ..settings(directory.path(), Encryption::Aes256Gcm)
    });
    assert_eq!(run.numbers(), [0]);
    run.open(2);
    let sealed = run.write(2, 1);
    keys.from.store(6, Ordering::Relaxed);
    let (outcome, target) = run.read(2, 1, sealed);
    assert_eq!(outcome, Err(Failure::Corrupt), "its key is gone");
    assert!(target.to_vec().iter().all(|byte| *byte == 0));
    assert_eq!(
        run.ask(StorageAction::Demote {
            operation: OperationId(9),
            source: memory(LENGTH),
            target: place(2, 9),
            label: label(9),
        }),
        Err(Failure::Busy),
        "a generation without a durable key is written later"
    );
    drop(run);
    let run = Run::start(NvmeSettings {
        keys,
        ..settings(directory.path(), Encryption::Aes256Gcm)
    });
    assert_eq!((run.numbers(), run.found.sealed_off), (vec![], 2));
}

#[test]
fn a_file_of_a_later_version_refuses_the_start_and_stays() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(settings(directory.path(), Encryption::None));
    run.open(1);
    drop(run);
    let path = file(directory.path(), 1);
    let mut bytes = fs::read(&path).expect("the segment");
    bytes[8] = 200;
    let sum = kvtier_transfer::crc32c(&bytes[..4092]);
    bytes[4092..4096].copy_from_slice(&sum.to_le_bytes());
    fs::write(&path, &bytes).expect("written");
    let refused = NvmeTier::open(settings(directory.path(), Encryption::None), Arc::new(|_| {}))
        .err()
        .expect("refused");
    assert!(matches!(refused, NvmeError::Newer { .. }), "{refused}");
    assert!(path.exists());
}

#[test]
fn what_is_not_a_segment_is_left_alone_and_a_segment_without_a_header_goes() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(settings(directory.path(), Encryption::None));
    run.open(1);
    run.open(2);
    run.write(2, 3);
    drop(run);
    fs::write(directory.path().join("notes.txt"), "mine").expect("a file");
    fs::create_dir(file(directory.path(), 9)).expect("a directory with a name of ours");
    fs::write(file(directory.path(), 3), [0; 100]).expect("a file cut short");
    let first = fs::OpenOptions::new()
        .write(true)
        .open(file(directory.path(), 1))
        .expect("a segment");
    first.write_all_at(b"damage", 20).expect("written");
    let run = Run::start(settings(directory.path(), Encryption::None));
    assert_eq!((run.numbers(), run.found.damaged), (vec![3], 2));
    let mut left: Vec<_> = fs::read_dir(directory.path())
        .expect("the directory")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    left.sort();
    assert_eq!(
        left,
        ["lock", "notes.txt", "segment-00000002.kvs", "segment-00000009.kvs"]
    );
}

#[test]
fn a_flipped_byte_anywhere_is_never_served() {
    for encryption in BOTH {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let run = Run::start(settings(directory.path(), encryption));
        run.open(1);
        let records = 16;
        run.write_all(1, 0..records);
        run.seal(1);
        drop(run);
        let path = file(directory.path(), 1);
        let whole = fs::read(&path).expect("the segment");
        let used = place(1, records).offset as usize;
        let mut state = 1u64;
        let mut corrupt = 0;
        for round in 0..150 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // Half of the flips in payloads, the rest in header, seal and index.
            let at = match round % 4 {
                0 => (state >> 33) as usize % 8192,
                1 => whole.len() - 1 - (state >> 33) as usize % (records as usize * 128),
                _ => 8192 + (state >> 33) as usize % (used - 8192),
            };
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (round % 8);
            fs::write(&path, &damaged).expect("written");
            let run = Run::start(settings(directory.path(), encryption));
            for record in run.found.segments.iter().flat_map(|segment| &segment.records) {
                let number = u32::from_le_bytes(*record.label.hash.0.first_chunk().expect("16 bytes"));
                let (outcome, target) = run.read(1, number, record.checksum);
                match outcome {
                    Ok(_) => assert!(target.to_vec() == payload(number), "byte {at}"),
                    Err(_) => assert!(target.to_vec().iter().all(|byte| *byte == 0), "byte {at}"),
                }
            }
            corrupt += run.tier.statistics().corrupt + run.found.damaged;
        }
        assert!(corrupt > 75, "{corrupt}");
    }
}

#[test]
fn a_record_put_back_at_another_place_does_not_open() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(settings(directory.path(), Encryption::Aes256Gcm));
    run.open(1);
    let checksums = [run.write(1, 0), run.write(1, 1)];
    run.seal(1);
    let segment = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(file(directory.path(), 1))
        .expect("the segment");
    let mut first = vec![0; LENGTH];
    segment.read_exact_at(&mut first, place(1, 0).offset).expect("read");
    segment.write_all_at(&first, place(1, 1).offset).expect("written");
    segment.sync_all().expect("on disk");
    assert_eq!(run.read(1, 0, checksums[0]).0, Ok(Completion::Done));
    assert_eq!(run.read(1, 1, checksums[1]).0, Err(Failure::Corrupt));
}

#[test]
fn plaintext_lies_on_the_device_only_where_encryption_is_off() {
    for (encryption, expected) in [(Encryption::Aes256Gcm, false), (Encryption::None, true)] {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let run = Run::start(settings(directory.path(), encryption));
        run.open(1);
        run.write(1, 7);
        run.seal(1);
        run.sync();
        let bytes = fs::read(file(directory.path(), 1)).expect("the segment");
        let (needle, name) = (&payload(7)[100..164], hash(7).0);
        assert_eq!(bytes.windows(64).any(|window| window == needle), expected);
        assert!(!bytes.windows(16).any(|window| window == name), "the hash is nowhere");
        assert!(!bytes.windows(16).any(|window| window == hash(6).0), "nor its parent's");
    }
}

#[test]
fn a_copied_directory_and_the_original_never_use_one_nonce_twice_under_one_key() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(settings(directory.path(), Encryption::Aes256Gcm));
    run.open(1);
    run.write_all(1, 0..6);
    run.sync();
    let copy = image(directory.path());
    let before = sealed(directory.path());
    // The original writes on in its open segment; the copy is a restart, twice.
    run.write_all(1, 6..9);
    run.open(2);
    run.write_all(2, 0..4);
    drop(run);
    for segment in [2, 3] {
        let again = Run::start(settings(copy.path(), Encryption::Aes256Gcm));
        again.open(segment);
        again.write_all(segment, 0..4);
    }
    let (original, copied) = (sealed(directory.path()), sealed(copy.path()));
    // The key of a record is derived from the incarnation; its nonce is its place.
    let common: HashSet<_> = original.intersection(&copied).copied().collect();
    assert_eq!(common, before, "only what was there before they parted");
    assert_eq!((original.len(), copied.len()), (6 + 3 + 4, 6 + 4 + 4));
    let pairs = |records: &HashSet<([u8; 32], u32, [u8; 16])>| {
        records
            .iter()
            .map(|(salt, place, _)| (*salt, *place))
            .collect::<HashSet<_>>()
    };
    let all: HashSet<_> = original.union(&copied).copied().collect();
    assert_eq!(pairs(&all).len(), all.len(), "one ciphertext for each key and nonce");
}

/// (salt, place, tag) of every record in a directory.
fn sealed(directory: &Path) -> HashSet<([u8; 32], u32, [u8; 16])> {
    let mut found = HashSet::new();
    for entry in fs::read_dir(directory).expect("the directory") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "kvs") {
            continue;
        }
        let bytes = fs::read(path).expect("a segment");
        let header = Header::decode(&bytes).expect("a header");
        let index = &bytes[8192..];
        let most = format::entries_max(bytes.len() as u64) as usize;
        for (_, entry) in format::decode_index(index, &header, most).0 {
            found.insert((header.incarnation, entry.place(), entry.tag));
        }
    }
    found
}

#[test]
fn segments_in_one_file_are_found_again_and_what_was_there_before_them_is_not() {
    for encryption in BOTH {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let on = |path: &Path| NvmeSettings {
            device: Some(path.to_owned()),
            discard: encryption == Encryption::None,
            ..settings(directory.path(), encryption)
        };
        let path = directory.path().join("tier");
        let run = Run::start(on(&path));
        assert!(!directory.path().join("lock").exists(), "the directory is not used");
        run.open(1);
        run.open(2);
        let mut checksums: Vec<u32> = (0..6).map(|number| run.write(1, number)).collect();
        run.write_all(2, 10..13);
        run.seal(1);
        run.sync();
        let killed = directory.path().join("killed");
        fs::copy(&path, &killed).expect("copied");
        drop(run);
        for file in [&path, &killed] {
            let run = Run::start(on(file));
            assert_eq!(run.numbers(), [0, 1, 2, 3, 4, 5, 10, 11, 12]);
            assert_eq!(run.found.damaged, 0);
            for (number, checksum) in (0..).zip(&checksums) {
                let (outcome, target) = run.read(1, number, *checksum);
                assert_eq!(outcome, Ok(Completion::Done));
                assert!(target.to_vec() == payload(number));
            }
        }
        // Another segment takes the room of the first, with fewer records: those of the first stay gone.
        let run = Run::start(on(&path));
        let operation = OperationId(6);
        let segment = SegmentId(1);
        assert_eq!(
            run.ask(StorageAction::Close { operation, segment }),
            Ok(Completion::Done)
        );
        run.open(3);
        checksums = vec![run.write(3, 20)];
        drop(run);
        let run = Run::start(on(&path));
        assert_eq!(run.numbers(), [10, 11, 12, 20]);
        assert_eq!(run.found.damaged, 0, "what an earlier segment left is not damage");
        let (outcome, target) = run.read(3, 20, checksums[0]);
        assert_eq!(outcome, Ok(Completion::Done));
        assert!(target.to_vec() == payload(20));
    }
}

#[test]
fn one_file_that_is_full_answers_so_and_takes_more_when_something_went() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(NvmeSettings {
        device: Some(directory.path().join("tier")),
        capacity_bytes: 2 * SEGMENT_BYTES,
        ..settings(directory.path(), Encryption::None)
    });
    run.open(1);
    run.open(2);
    let open = |segment| {
        run.ask(StorageAction::Open {
            operation: OperationId(1),
            segment: SegmentId(segment),
            bytes: SEGMENT_BYTES,
        })
    };
    assert_eq!(open(3), Err(Failure::Full));
    let (operation, segment) = (OperationId(6), SegmentId(1));
    assert_eq!(
        run.ask(StorageAction::Close { operation, segment }),
        Ok(Completion::Done)
    );
    assert_eq!(open(3), Ok(Completion::Done));
}
