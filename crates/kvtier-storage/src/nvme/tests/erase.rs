//! What a purge overwrites, what it leaves alone, and that neither comes back wrong.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kvtier_core::{Completion, Failure, NamespaceId, OperationId, SegmentId};

use super::super::format;
use super::super::{Encryption, StorageAction};
use super::restart::{BOTH, LENGTH, Run, SEGMENT_BYTES, label, payload, place, settings};

const OURS: NamespaceId = NamespaceId(3);
const ALL: Range<u32> = 0..(SEGMENT_BYTES / 4096) as u32;

fn segment_file(directory: &Path, segment: u32) -> PathBuf {
    directory.join(format!("segment-{segment:08x}.kvs"))
}

/// Where a record lies, in pages.
fn pages(number: u32) -> Range<u32> {
    let place = place(1, number);
    let first = (place.offset / 4096) as u32;
    first..first + place.length.div_ceil(4096)
}

fn erase(run: &Run, pages: Range<u32>, namespace: NamespaceId, keep: &[Range<u32>]) -> Result<Completion, Failure> {
    run.ask(StorageAction::Erase {
        operation: OperationId(9),
        segment: SegmentId(1),
        pages,
        namespace,
        keep: keep.to_vec(),
    })
}

fn erased(run: &Run, pages: Range<u32>, keep: &[Range<u32>]) -> (u32, u64) {
    match erase(run, pages, OURS, keep) {
        Ok(Completion::Erased { records, bytes }) => (records, bytes),
        other => panic!("{other:?}"),
    }
}

/// What is on the device of a record.
fn on_device(directory: &Path, number: u32) -> Vec<u8> {
    let place = place(1, number);
    let mut bytes = vec![1; (place.length as usize).next_multiple_of(4096)];
    let file = fs::File::open(segment_file(directory, 1)).expect("the segment file");
    file.read_exact_at(&mut bytes, place.offset).expect("its bytes");
    bytes
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

#[test]
fn every_record_of_the_namespace_goes_but_those_that_are_kept() {
    for encryption in BOTH {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let run = Run::start(settings(directory.path(), encryption));
        run.open(1);
        let checksums: Vec<u32> = (0..10).map(|number| run.write(1, number)).collect();
        run.seal(1);
        if encryption == Encryption::None {
            assert_eq!(
                on_device(directory.path(), 2)[..LENGTH],
                payload(2),
                "it is there before"
            );
        }
        let (records, bytes) = erased(&run, ALL, &[pages(4), pages(7)]);
        assert_eq!(records, 8);
        assert!(bytes >= 8 * LENGTH as u64, "{bytes}");
        for number in 0..10 {
            let (outcome, target) = run.read(1, number, checksums[number as usize]);
            if [4, 7].contains(&number) {
                assert_eq!(outcome, Ok(Completion::Done), "{encryption:?} {number}");
                assert!(target.to_vec() == payload(number));
            } else {
                assert_eq!(outcome, Err(Failure::Corrupt), "{encryption:?} {number}");
                assert!(is_zero(&target.to_vec()) && is_zero(&on_device(directory.path(), number)));
            }
        }
        drop(run);
        let run = Run::start(settings(directory.path(), encryption));
        assert_eq!(run.numbers(), [4, 7], "nor does a restart bring them back");
        assert_eq!(
            run.found
                .segments
                .iter()
                .map(|segment| segment.records.len())
                .sum::<usize>(),
            2
        );
    }
}

#[test]
fn another_namespace_keeps_everything_and_what_nothing_names_goes() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(settings(directory.path(), Encryption::None));
    run.open(1);
    let checksums: Vec<u32> = (0..6).map(|number| run.write(1, number)).collect();
    run.tier.submit(StorageAction::ForgetRecord { target: place(1, 3) });
    run.seal(1);
    let other = NamespaceId(4);
    assert_eq!(label(0).namespace, OURS);
    let (records, bytes) = match erase(&run, ALL, other, &[]) {
        Ok(Completion::Erased { records, bytes }) => (records, bytes),
        outcome => panic!("{outcome:?}"),
    };
    assert_eq!(records, 0);
    assert!(bytes >= LENGTH as u64);
    assert!(is_zero(&on_device(directory.path(), 3)), "a deleted record");
    for number in [0, 1, 2, 4, 5] {
        let (outcome, target) = run.read(1, number, checksums[number as usize]);
        assert_eq!(outcome, Ok(Completion::Done), "{number}");
        assert!(target.to_vec() == payload(number));
    }
}

#[test]
fn a_part_of_a_segment_touches_no_record_that_begins_elsewhere() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(settings(directory.path(), Encryption::Aes256Gcm));
    run.open(1);
    let checksums: Vec<u32> = (0..10).map(|number| run.write(1, number)).collect();
    run.seal(1);
    let middle = pages(3).start..pages(6).start;
    assert_eq!(erased(&run, middle, &[]).0, 3);
    for number in [0, 1, 2, 6, 9] {
        assert_eq!(
            run.read(1, number, checksums[number as usize]).0,
            Ok(Completion::Done),
            "{number}"
        );
    }
    assert_eq!(erased(&run, ALL, &[]).0, 7, "the rest, another time");
}

#[test]
fn what_a_kill_left_unsealed_is_overwritten_to_its_end() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(settings(directory.path(), Encryption::None));
    run.open(1);
    run.write_all(1, 0..5);
    run.sync();
    drop(run);
    let path = segment_file(directory.path(), 1);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("the segment file");
    // A write that was under way, and never got an entry.
    let torn = place(1, 5).offset;
    file.write_all_at(&[0x77; 4096], torn).expect("written");
    file.sync_all().expect("on disk");
    let run = Run::start(settings(directory.path(), Encryption::None));
    assert_eq!(run.numbers(), [0, 1, 2, 3, 4]);
    assert_eq!(erased(&run, ALL, &[]).0, 5);
    drop(run);
    let bytes = fs::read(&path).expect("the segment file");
    let payloads = &bytes[usize::try_from(format::HEADER_BYTES).expect("small")..];
    assert!(is_zero(payloads), "payloads, the torn one included, and the index");
}

#[test]
fn a_segment_that_still_takes_records_is_refused() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = Run::start(settings(directory.path(), Encryption::None));
    run.open(1);
    let checksum = run.write(1, 0);
    assert_eq!(erase(&run, ALL, OURS, &[]), Err(Failure::Io));
    assert_eq!(run.read(1, 0, checksum).0, Ok(Completion::Done));
    run.seal(1);
    let elsewhere = StorageAction::Erase {
        operation: OperationId(9),
        segment: SegmentId(2),
        pages: ALL,
        namespace: OURS,
        keep: Vec::new(),
    };
    assert_eq!(run.ask(elsewhere), Err(Failure::Io), "a segment that is not there");
}
