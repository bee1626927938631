use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;
use kvtier_transfer::memory::Access;

const MIB: u64 = 1 << 20;

fn settings(capacity_bytes: u64) -> HostSettings {
    HostSettings {
        capacity_bytes,
        base_segment_bytes: MIB,
        numa_node: None,
        lock: false,
        huge: HugePages::Auto,
    }
}

fn tier(capacity_bytes: u64) -> HostTier {
    HostTier::start(settings(capacity_bytes), &|_, _| {}).expect("memory")
}

fn whole(segment: SegmentId, length: u64) -> Extent {
    Extent {
        segment,
        offset: 0,
        length: u32::try_from(length).expect("small"),
    }
}

/// Background work settles within moments; what it settles to is what counts.
fn settles(tier: &HostTier, expected: HostUsage) {
    let started = Instant::now();
    while tier.usage() != expected && started.elapsed() < Duration::from_secs(30) {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(tier.usage(), expected);
}

#[test]
fn a_start_makes_the_whole_pool_present_and_says_how_far_it_is() {
    let seen = AtomicU64::new(0);
    let tier = HostTier::start(settings(10 * MIB + 4096), &|done, total| {
        assert_eq!(total, 10 * MIB);
        seen.fetch_max(done, Ordering::Relaxed);
    })
    .expect("memory");
    assert_eq!(seen.load(Ordering::Relaxed), 10 * MIB);
    assert_eq!(
        tier.usage(),
        HostUsage {
            segments: 0,
            segment_bytes: 0,
            pool_bytes: 10 * MIB
        }
    );
    assert!(tier.page_note().contains("pages"), "{}", tier.page_note());
}

#[test]
fn an_opened_segment_is_zeroed_shared_and_its_own_file() {
    let tier = tier(4 * MIB);
    for segment in [SegmentId(1), SegmentId(2)] {
        tier.open(segment, MIB).expect("room");
        let slice = tier.slice(&whole(segment, MIB)).expect("open");
        assert!(slice.to_vec().iter().all(|byte| *byte == 0));
    }
    let file = tier
        .file(SegmentId(1))
        .expect("open")
        .try_clone()
        .expect("a descriptor");
    let client =
        MemoryRegion::attach(file, MIB as usize, Access::ReadWrite, true).expect("sealed and as large as said");
    client
        .slice(5, 3)
        .expect("a part")
        .copy_from_slice(b"abc")
        .expect("equal lengths");
    assert_eq!(
        tier.slice(&Extent {
            segment: SegmentId(1),
            offset: 5,
            length: 3
        })
        .expect("open")
        .to_vec(),
        b"abc"
    );
    assert!(
        tier.slice(&whole(SegmentId(2), MIB))
            .expect("open")
            .to_vec()
            .iter()
            .all(|byte| *byte == 0),
        "the other is another file"
    );
}

#[test]
fn other_sizes_take_memory_from_the_pool_and_never_exceed_the_capacity() {
    let tier = tier(8 * MIB);
    tier.open(SegmentId(1), 5 * MIB).expect("room");
    settles(
        &tier,
        HostUsage {
            segments: 1,
            segment_bytes: 5 * MIB,
            pool_bytes: 3 * MIB,
        },
    );
    tier.open(SegmentId(2), 3 * MIB).expect("room");
    settles(
        &tier,
        HostUsage {
            segments: 2,
            segment_bytes: 8 * MIB,
            pool_bytes: 0,
        },
    );
    assert!(matches!(tier.open(SegmentId(3), MIB), Err(HostError::Full { .. })));
    assert!(matches!(tier.open(SegmentId(3), 4096), Err(HostError::Full { .. })));
    tier.close(SegmentId(1)).expect("open");
    settles(
        &tier,
        HostUsage {
            segments: 1,
            segment_bytes: 3 * MIB,
            pool_bytes: 5 * MIB,
        },
    );
    tier.open(SegmentId(4), 4096).expect("room");
    settles(
        &tier,
        HostUsage {
            segments: 2,
            segment_bytes: 3 * MIB + 4096,
            pool_bytes: 4 * MIB,
        },
    );
}

#[test]
fn whoever_still_maps_a_closed_segment_sees_zeroes_and_never_its_successor() {
    let tier = tier(2 * MIB);
    tier.open(SegmentId(1), MIB).expect("room");
    let file = tier
        .file(SegmentId(1))
        .expect("open")
        .try_clone()
        .expect("a descriptor");
    let client = MemoryRegion::attach(file, MIB as usize, Access::ReadWrite, false).expect("attached");
    let mapped = client.slice(0, 4096).expect("a part");
    tier.slice(&whole(SegmentId(1), 4096))
        .expect("open")
        .copy_from_slice(&[7; 4096])
        .expect("equal lengths");
    tier.close(SegmentId(1)).expect("open");
    assert_eq!(mapped.to_vec(), [0; 4096]);
    // Twice the capacity: the memory came back, or this would not fit.
    for segment in 2..6 {
        tier.open(SegmentId(segment), MIB).expect("room");
        tier.slice(&whole(SegmentId(segment), 4096))
            .expect("open")
            .copy_from_slice(&[9; 4096])
            .expect("equal lengths");
        assert_eq!(mapped.to_vec(), [0; 4096]);
        tier.close(SegmentId(segment)).expect("open");
    }
}

#[test]
fn a_slice_that_outlives_its_segment_keeps_its_memory() {
    let tier = tier(2 * MIB);
    tier.open(SegmentId(1), MIB).expect("room");
    let slice = tier.slice(&whole(SegmentId(1), 4096)).expect("open");
    tier.close(SegmentId(1)).expect("open");
    drop(tier);
    assert_eq!(slice.to_vec(), [0; 4096]);
}

#[test]
fn wrong_ids_and_extents_are_refused() {
    let tier = tier(2 * MIB);
    tier.open(SegmentId(1), MIB).expect("room");
    assert!(matches!(tier.open(SegmentId(1), MIB), Err(HostError::AlreadyOpen(_))));
    assert!(matches!(tier.open(SegmentId(2), 0), Err(HostError::Memory(_))));
    assert!(matches!(tier.open(SegmentId(2), 4097), Err(HostError::Memory(_))));
    assert!(matches!(tier.close(SegmentId(2)), Err(HostError::NotOpen(_))));
    assert!(matches!(
        tier.slice(&whole(SegmentId(2), 1)),
        Err(HostError::NotOpen(_))
    ));
    let beyond = Extent {
        segment: SegmentId(1),
        offset: MIB - 1,
        length: 2,
    };
    assert!(matches!(tier.slice(&beyond), Err(HostError::Extent { .. })));
    assert!(matches!(
        tier.slice(&Extent {
            offset: u64::MAX,
            ..beyond
        }),
        Err(HostError::Extent { .. })
    ));
}

#[test]
fn a_closed_segment_that_a_device_holds_is_zeroed_where_it_lies_and_never_punched() {
    let tier = tier(2 * MIB);
    tier.open(SegmentId(1), MIB).expect("room");
    let all = tier.slice(&whole(SegmentId(1), MIB)).expect("open");
    all.copy_from_slice(&[7; MIB as usize]).expect("equal lengths");
    let pinned = kvtier_transfer::memory::Pinned::new(all.region());
    let file = tier
        .file(SegmentId(1))
        .expect("open")
        .try_clone()
        .expect("a descriptor");
    let pages_before = rustix::fs::fstat(&file).expect("a file").st_blocks;
    tier.close(SegmentId(1)).expect("open");
    assert!(
        all.to_vec().iter().all(|byte| *byte == 0),
        "what the device reaches is zero"
    );
    let pages_after = rustix::fs::fstat(&file).expect("a file").st_blocks;
    assert_eq!(pages_after, pages_before, "its pages are still the file's");
    drop(pinned);
}

#[test]
fn threads_that_open_and_close_all_sizes_at_once_stay_within_the_capacity() {
    let tier = tier(8 * MIB);
    let sizes = [MIB, MIB, 3 * MIB, 8192, 2 * MIB];
    thread::scope(|scope| {
        for worker in 0..3u32 {
            let tier = &tier;
            scope.spawn(move || {
                for (round, bytes) in (0..).zip(sizes.iter().cycle().take(60)) {
                    let segment = SegmentId(worker * 1000 + round);
                    match tier.open(segment, *bytes) {
                        Ok(()) => tier.close(segment).expect("open"),
                        Err(HostError::Full { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                    let usage = tier.usage();
                    assert!(usage.segment_bytes + usage.pool_bytes <= 8 * MIB, "{usage:?}");
                }
            });
        }
    });
    settles(
        &tier,
        HostUsage {
            segments: 0,
            segment_bytes: 0,
            pool_bytes: 8 * MIB,
        },
    );
}

#[test]
fn settings_that_cannot_be_name_the_field() {
    let cases = [
        HostSettings {
            base_segment_bytes: 0,
            ..settings(MIB)
        },
        HostSettings {
            base_segment_bytes: 5000,
            ..settings(MIB)
        },
        HostSettings {
            capacity_bytes: 4096,
            ..settings(MIB)
        },
        HostSettings {
            huge: HugePages::Require,
            ..settings(MIB)
        },
    ];
    let fields: HashSet<&str> = cases
        .into_iter()
        .map(|case| match HostTier::start(case.clone(), &|_, _| {}) {
            Err(HostError::Settings { field, .. }) => field,
            other => panic!("{case:?}: {:?}", other.err()),
        })
        .collect();
    assert_eq!(fields, HashSet::from(["base_segment_bytes", "capacity_bytes"]));
}

#[test]
fn memory_that_may_not_be_locked_is_said_in_the_note() {
    let tier = HostTier::start(
        HostSettings {
            lock: true,
            ..settings(16 * MIB)
        },
        &|_, _| {},
    )
    .expect("locking is a wish");
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let locked = tier.shared.locked.load(Ordering::Relaxed);
    assert_eq!(tier.page_note().contains("LimitMEMLOCK"), !locked);
    if limit.is_none_or(|limit| limit >= 64 * MIB) {
        assert!(locked, "16 MiB under a limit of {limit:?}");
    }
}
