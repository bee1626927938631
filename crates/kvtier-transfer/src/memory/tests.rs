use super::*;
use crate::crc32c;
use std::cell::Cell;

fn region(bytes: usize) -> Arc<MemoryRegion> {
    MemoryRegion::create("kvtier-test", bytes, PageRequest::Auto)
        .expect("memory")
        .0
}

fn counting(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251).to_le_bytes()[0]).collect()
}

#[test]
fn bytes_copied_in_come_back_out_and_nothing_else_changes() {
    for region in [region(1 << 20), MemoryRegion::anonymous(1 << 20).expect("memory")] {
        let slice = region.slice(4000, 10_001).expect("in range");
        slice.copy_from_slice(&counting(10_001)).expect("equal lengths");
        assert_eq!(slice.to_vec(), counting(10_001));
        let mut out = vec![0; 10_001];
        slice.copy_to_slice(&mut out).expect("equal lengths");
        assert_eq!(out, counting(10_001));
        assert_eq!(region.slice(0, 4000).expect("in range").to_vec(), [0; 4000]);
        assert_eq!(region.slice(14_001, 1000).expect("in range").to_vec(), [0; 1000]);
        slice.zero();
        assert_eq!(slice.to_vec(), [0; 10_001]);
    }
}

#[test]
fn ranges_outside_a_region_cannot_be_made() {
    let region = region(8192);
    for (offset, length) in [(0, 8193), (8192, 1), (8193, 0), (usize::MAX, 2), (1, usize::MAX)] {
        assert_eq!(
            region.slice(offset, length).err(),
            Some(OutOfRange {
                offset,
                length,
                bytes: 8192
            })
        );
    }
    let slice = region.slice(4096, 100).expect("in range");
    assert!(
        slice.subslice(50, 51).is_err(),
        "not past the slice, though within the region"
    );
    assert!(slice.subslice(50, 50).is_ok());
    assert!(slice.with_length(4096).is_ok());
    assert!(slice.with_length(4097).is_err());
    assert!(region.slice(8192, 0).expect("empty, at the end").is_empty());
}

#[test]
fn copies_between_unequal_lengths_are_refused_and_copy_nothing() {
    let slice = region(4096).slice(0, 10).expect("in range");
    assert_eq!(
        slice.copy_from_slice(&[1; 9]),
        Err(CopyError::Length { slice: 10, other: 9 })
    );
    assert_eq!(
        slice.copy_to_slice(&mut [1; 11]),
        Err(CopyError::Length { slice: 10, other: 11 })
    );
    assert_eq!(
        slice.copy_to(&slice.subslice(0, 5).expect("in range")),
        Err(CopyError::Length { slice: 10, other: 5 })
    );
    assert_eq!(slice.to_vec(), [0; 10]);
}

#[test]
fn overlapping_ranges_of_one_region_copy_as_if_by_way_of_a_buffer() {
    let region = region(4096);
    region
        .slice(0, 1000)
        .expect("in range")
        .copy_from_slice(&counting(1000))
        .expect("equal lengths");
    let (source, target) = (
        region.slice(0, 900).expect("in range"),
        region.slice(100, 900).expect("in range"),
    );
    source.copy_to(&target).expect("equal lengths");
    assert_eq!(target.to_vec(), counting(900));
}

#[test]
fn sizes_that_no_region_can_have_are_refused() {
    for bytes in [0, 1, 4095, 4097, usize::MAX, usize::MAX - 4095] {
        assert!(
            matches!(
                MemoryRegion::create("x", bytes, PageRequest::Auto),
                Err(MemoryError::Size { .. })
            ),
            "{bytes}"
        );
        assert!(
            matches!(MemoryRegion::anonymous(bytes), Err(MemoryError::Size { .. })),
            "{bytes}"
        );
    }
}

#[test]
fn an_attached_region_shares_bytes_and_outlives_its_maker() {
    let (maker, file) = MemoryRegion::create("kvtier-test", 8192, PageRequest::Auto).expect("memory");
    let writer =
        MemoryRegion::attach(file.try_clone().expect("a descriptor"), 8192, Access::ReadWrite, true).expect("attached");
    let reader = MemoryRegion::attach(file, 8192, Access::ReadOnly, true).expect("attached");
    writer
        .slice(0, 5)
        .expect("in range")
        .copy_from_slice(b"hello")
        .expect("equal lengths");
    assert_eq!(maker.slice(0, 5).expect("in range").to_vec(), b"hello");
    drop((maker, writer));
    assert_eq!(reader.slice(0, 5).expect("in range").to_vec(), b"hello");
}

#[test]
fn a_read_only_mapping_refuses_every_write() {
    let (maker, file) = MemoryRegion::create("kvtier-test", 8192, PageRequest::Auto).expect("memory");
    let reader = MemoryRegion::attach(file, 8192, Access::ReadOnly, false).expect("attached");
    let slice = reader.slice(0, 4).expect("in range");
    assert_eq!(slice.copy_from_slice(&[1; 4]), Err(CopyError::ReadOnly));
    assert_eq!(
        maker.slice(0, 4).expect("in range").copy_to(&slice),
        Err(CopyError::ReadOnly)
    );
    let source = tempfile_with(b"data");
    assert_eq!(
        slice.read_at(&source, 0).map_err(|error| error.kind()),
        Err(io::ErrorKind::PermissionDenied)
    );
    assert!(std::panic::catch_unwind(|| slice.zero()).is_err());
    assert!(std::panic::catch_unwind(|| slice.as_mut_ptr()).is_err());
    assert_eq!(slice.to_vec(), [0; 4]);
}

#[test]
fn a_file_of_another_size_than_claimed_is_refused() {
    let (_, file) = MemoryRegion::create("kvtier-test", 8192, PageRequest::Auto).expect("memory");
    for claimed in [4096, 12_288] {
        let refused = MemoryRegion::attach(
            file.try_clone().expect("a descriptor"),
            claimed,
            Access::ReadWrite,
            false,
        );
        assert!(
            matches!(refused, Err(MemoryError::SizeMismatch { actual: 8192, .. })),
            "{claimed}"
        );
    }
}

#[test]
fn a_file_that_may_shrink_is_refused_for_touching_it_could_kill() {
    let unsealed = rustix::fs::memfd_create("kvtier-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .expect("a memory file");
    rustix::fs::ftruncate(&unsealed, 8192).expect("sized");
    rustix::fs::fcntl_add_seals(&unsealed, SealFlags::GROW).expect("sealed against growth only");
    assert!(matches!(
        MemoryRegion::attach(unsealed, 8192, Access::ReadWrite, false),
        Err(MemoryError::NotSealed)
    ));
    let ordinary: OwnedFd = tempfile_with(&[0; 8192]).into();
    assert!(matches!(
        MemoryRegion::attach(ordinary, 8192, Access::ReadWrite, false),
        Err(MemoryError::NotSealed)
    ));
}

#[test]
fn nobody_can_change_the_size_of_what_is_passed_on() {
    let (_region, file) = MemoryRegion::create("kvtier-test", 8192, PageRequest::Auto).expect("memory");
    for bytes in [0, 4096, 1 << 20] {
        assert_eq!(rustix::fs::ftruncate(&file, bytes), Err(rustix::io::Errno::PERM));
    }
    assert_eq!(
        rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE),
        Err(rustix::io::Errno::PERM),
        "nor its seals"
    );
}

#[test]
fn prefaulting_makes_every_page_present_keeps_the_bytes_and_reports() {
    let region = region(64 << 20);
    let slice = region.slice(5000, 5).expect("in range");
    slice.copy_from_slice(b"bytes").expect("equal lengths");
    let (last, calls) = (Cell::new(0), Cell::new(0));
    let report = |done| {
        assert!(done > last.replace(done));
        calls.set(calls.get() + 1);
    };
    region.prefault(&report).expect("memory");
    assert_eq!((last.get(), calls.get()), (64 << 20, 2));
    assert_eq!(slice.to_vec(), b"bytes");
    // What a kernel without the advice gets.
    region.touch_for_write(0, 64 << 20);
    assert_eq!(slice.to_vec(), b"bytes");
}

#[test]
fn the_checksum_of_a_slice_is_that_of_its_bytes() {
    let region = region(1 << 20);
    let all = region.slice(0, 1 << 20).expect("all of it");
    all.copy_from_slice(&counting(1 << 20)).expect("equal lengths");
    for (offset, length) in [
        (0, 0),
        (1, 1),
        (3, 8191),
        (0, 8192),
        (7, 8193),
        (4096, 16_384),
        (11, 1_000_003),
    ] {
        let slice = region.slice(offset, length).expect("in range");
        assert_eq!(
            slice.crc32c(),
            crc32c(&counting(1 << 20)[offset..offset + length]),
            "{length} bytes at {offset}"
        );
    }
}

fn tempfile_with(bytes: &[u8]) -> std::fs::File {
    use std::io::Write;
    let path = std::env::temp_dir().join(format!("kvtier-memory-test-{}-{:p}", std::process::id(), bytes));
    let mut file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .expect("a temporary file");
    std::fs::remove_file(&path).expect("ours");
    file.write_all(bytes).expect("written");
    file
}

#[test]
fn files_are_read_and_written_straight_from_the_mapping() {
    let file = tempfile_with(b"0123456789");
    let region = region(4096);
    let slice = region.slice(100, 6).expect("in range");
    assert_eq!(slice.read_at(&file, 2).expect("read"), 6);
    assert_eq!(slice.to_vec(), b"234567");
    assert_eq!(slice.read_at(&file, 7).expect("read"), 3, "as much as there is");
    assert_eq!(slice.read_at(&file, 10).expect("read"), 0, "the end");
    assert_eq!(slice.write_at(&file, 4).expect("written"), 6);
    assert!(slice.read_at(&file, u64::MAX).is_err());
    let check = region.slice(0, 10).expect("in range");
    check.read_at(&file, 0).expect("read");
    assert_eq!(check.to_vec(), b"0123789567");
}

#[test]
fn touching_reads_one_byte_of_each_page() {
    let region = region(16_384);
    region
        .slice(0, 16_384)
        .expect("all of it")
        .copy_from_slice(&counting(16_384))
        .expect("equal lengths");
    let expected: u64 = [0, 4096, 8192, 12_288]
        .iter()
        .map(|at| u64::from(counting(16_384)[*at]))
        .sum();
    assert_eq!(region.slice(0, 16_384).expect("all of it").touch_pages(), expected);
    assert_eq!(
        region.slice(0, 12_288).expect("in range").touch_pages(),
        expected - u64::from(counting(16_384)[12_288])
    );
}

#[test]
fn a_numa_node_that_is_not_there_is_refused_in_words() {
    let region = region(4096);
    let refused = region.bind(1000).expect_err("no machine has a node 1000").to_string();
    assert!(
        refused.contains("1000") && refused.contains("/sys/devices/system/node"),
        "{refused}"
    );
    match region.bind(0) {
        Ok(()) => region.prefault(&|_| {}).expect("memory"),
        Err(error) => eprintln!("skipped: NUMA policy: {error}"),
    }
}

#[test]
fn required_huge_pages_are_had_or_refused_with_the_remedy() {
    match MemoryRegion::create("kvtier-test", HUGE_PAGE_BYTES, PageRequest::Huge) {
        Ok((region, file)) => {
            assert_eq!(region.pages(), PageKind::Huge);
            region.zero();
            let attached = MemoryRegion::attach(file, HUGE_PAGE_BYTES, Access::ReadWrite, true).expect("attached");
            assert_eq!(attached.page_kib(), 2048);
        }
        Err(error) => assert!(error.to_string().contains("vm.nr_hugepages"), "{error}"),
    }
    assert!(matches!(
        MemoryRegion::create("kvtier-test", 4096, PageRequest::Huge),
        Err(MemoryError::NoHugePages { .. })
    ));
    assert_eq!(region(4096).page_kib(), 4, "a small region lies on small pages");
}

#[test]
fn a_forked_child_does_not_inherit_the_mapping() {
    let region = region(8192);
    let start = region.slice(0, 1).expect("in range").as_ptr() as usize;
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let of_region = smaps
        .split_once(&format!("{start:08x}-"))
        .expect("the mapping is listed")
        .1;
    let flags = of_region
        .lines()
        .find(|line| line.starts_with("VmFlags:"))
        .expect("flags");
    assert!(
        flags.split_whitespace().any(|flag| flag == "dc"),
        "do not copy on fork: {flags}"
    );
}

#[test]
fn foreign_memory_is_copied_within_its_bounds_only() {
    let region = MemoryRegion::anonymous(2 * PAGE_BYTES).expect("memory");
    let page = region.slice(0, PAGE_BYTES).expect("in range");
    let foreign = ForeignSlice::of(&page).expect("writable");
    let other = MemoryRegion::anonymous(PAGE_BYTES).expect("memory");
    let source = other.slice(0, 100).expect("in range");
    source.copy_from_slice(&[7; 100]).expect("same length");
    foreign.copy_from(PAGE_BYTES - 100, &source).expect("fits");
    assert_eq!(page.to_vec()[PAGE_BYTES - 101..], [&[0][..], &[7; 100]].concat());
    assert!(foreign.copy_from(PAGE_BYTES - 99, &source).is_err(), "one byte too far");
    assert!(foreign.copy_from(usize::MAX, &source).is_err(), "an offset that wraps");
    let back = other.slice(200, 100).expect("in range");
    foreign.copy_to(PAGE_BYTES - 100, &back).expect("fits");
    assert_eq!(back.to_vec(), [7; 100]);
    assert!(foreign.copy_to(PAGE_BYTES - 1, &back).is_err());
    let beside = region.slice(PAGE_BYTES, PAGE_BYTES).expect("in range").to_vec();
    assert_eq!(beside, vec![0; PAGE_BYTES], "nothing is written past its end");
}

#[test]
fn a_read_only_region_is_no_foreign_target() {
    let (_region, file) = MemoryRegion::create("kvtier-test", PAGE_BYTES, PageRequest::Small).expect("memory");
    let attached = MemoryRegion::attach(file, PAGE_BYTES, Access::ReadOnly, false).expect("attached");
    let slice = attached.slice(0, PAGE_BYTES).expect("in range");
    assert_eq!(ForeignSlice::of(&slice).expect_err("read-only"), CopyError::ReadOnly);
}

#[test]
fn a_region_lies_on_a_node_that_the_system_has() {
    let region = region(1 << 20);
    region.zero();
    let node = |number: u32| std::path::PathBuf::from(format!("/sys/devices/system/node/node{number}"));
    match region.numa_node() {
        Some(number) => assert!(number == 0 || node(number).exists(), "node {number}"),
        None => assert!(!node(1).exists(), "a system with several nodes tells where memory lies"),
    }
}
