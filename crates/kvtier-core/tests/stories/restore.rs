//! Restore: what a restart finds on NVMe is cached again, as far as it may and can be.

use crate::world::{DOMAIN, KIB, ME, SECOND, World, checksum, hash, hashes, name, settings};
use kvtier_core::{
    Action, BlockHash, CoreSettings, Generation, Labels, LeafFirstLru, NamespaceId, Parent, Realization, RealizationId,
    RecordLabel, Refusal, Restored, RestoredRecord, RestoredSegment, Sealed, SegmentId, Tier, TierManager, Time,
    TrustDomain,
};

const BLOCK: u32 = 8 * KIB;
const GENERATION: Generation = Generation(3);

fn record(number: u64, parent: Parent, place: u64) -> RestoredRecord {
    RestoredRecord {
        label: RecordLabel {
            namespace: NamespaceId(0),
            generation: GENERATION,
            realization: RealizationId(0),
            hash: hash(number),
            parent,
            tokens: 512,
            labels: Labels::None,
        },
        offset: 4096 + place * u64::from(BLOCK),
        length: BLOCK,
        checksum: checksum(hash(number)),
    }
}

/// A segment of independent blocks.
fn segment(id: u32, numbers: impl IntoIterator<Item = u64>) -> RestoredSegment {
    let records = (0..)
        .zip(numbers)
        .map(|(place, number)| record(number, Parent::Root, place));
    of_records(id, records)
}

fn of_records(id: u32, records: impl IntoIterator<Item = RestoredRecord>) -> RestoredSegment {
    RestoredSegment {
        segment: SegmentId(id),
        bytes: 128 << 10,
        records: records.into_iter().collect(),
    }
}

fn roomy() -> CoreSettings {
    settings(1 << 20, 1 << 20)
}

fn found(segments: Vec<RestoredSegment>) -> (World, Restored) {
    World::found(roomy(), GENERATION, segments)
}

#[test]
fn a_restart_brings_back_what_was_written_and_a_fetch_promotes_it() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    world.put(&hashes(0..8), BLOCK);
    world.put(&hashes(100..104), 5 * KIB);
    let flush = world.flush();
    assert_eq!(world.flushed[&flush].1, 0);
    let (mut world, restored) = world.restart(settings(128 << 10, 1 << 20));
    assert_eq!((restored.blocks, restored.left_out), (12, 0));
    assert_eq!(restored.bytes, u64::from(8 * BLOCK + 4 * 5 * KIB));
    assert_eq!(world.fetch(&hashes(0..8)), [Some(Tier::Nvme); 8]);
    assert_eq!(world.fetch(&hashes(0..8)), [Some(Tier::Host); 8]);
    assert_eq!(world.fetch(&hashes(100..104)), [Some(Tier::Nvme); 4]);
    world.core.check_invariants();
}

#[test]
fn a_restored_segment_is_never_appended_to_and_new_ids_are_above() {
    let (mut world, _) = found(vec![segment(70, 0..2), segment(9, 10..12)]);
    world.put(&hashes(20..24), BLOCK);
    world.hold = |action| name(action) == "demote";
    world.core.flush(None, world.now);
    world.run();
    assert_eq!(world.held.len(), 4);
    for action in &world.held {
        let Action::Demote { target, .. } = action else {
            panic!("only demotions are held")
        };
        assert!(target.segment > SegmentId(70), "{target:?}");
    }
    world.let_go();
}

#[test]
fn children_find_parents_that_come_later_in_the_log() {
    let child_first = of_records(
        1,
        [
            record(2, Parent::Block(hash(1)), 0),
            record(1, Parent::Block(hash(0)), 1),
            record(0, Parent::Root, 2),
        ],
    );
    let (mut world, restored) = found(vec![child_first]);
    assert_eq!(restored.blocks, 3);
    for left in [vec![0, 1], vec![0], vec![]] {
        // Quota room is made by forgetting, and that goes leaf by leaf.
        let bytes = left.len() as u64 * u64::from(BLOCK) + 4096;
        world.core.set_quota(world.namespace, Some(bytes));
        world.put(&hashes([1000 + left.len() as u64]), 4 * KIB);
        assert_eq!(world.present(0..3), left);
        world.core.check_invariants();
        world.delete(&hashes([1000 + left.len() as u64]));
    }
}

#[test]
fn parents_that_name_each_other_are_no_circle() {
    let circle = of_records(
        1,
        [
            record(0, Parent::Block(hash(2)), 0),
            record(1, Parent::Block(hash(0)), 1),
            record(2, Parent::Block(hash(1)), 2),
            record(3, Parent::Block(hash(3)), 3),
            record(4, Parent::Block(hash(0)), 4),
            record(5, Parent::Block(hash(99)), 5),
        ],
    );
    let (mut world, restored) = found(vec![circle]);
    assert_eq!(restored.blocks, 6);
    world.core.set_quota(world.namespace, Some(0));
    world.core.set_quota(world.namespace, Some(4096));
    assert_eq!(world.put(&hashes([1000]), 4 * KIB), [Sealed::Published]);
    assert_eq!(world.present(0..6), [], "all of them can go");
    world.core.check_invariants();
}

#[test]
fn the_newest_copy_of_a_key_counts() {
    let mut older = segment(5, [1, 2]);
    older.records[0].length = 4 * KIB;
    older.records[0].checksum = 0xbad;
    // In one segment the later record is the newer one.
    let mut newer = segment(6, [3, 1, 3]);
    newer.records[0].checksum = 0xbad;
    let (mut world, restored) = found(vec![newer, older]);
    assert_eq!((restored.blocks, restored.left_out), (3, 2));
    assert_eq!(world.fetch(&hashes([1])), [Some(Tier::Nvme)]);
    assert_eq!(world.fetch(&hashes([3])), [Some(Tier::Nvme)]);
}

#[test]
fn other_generations_unknown_namespaces_and_realizations_are_left_out() {
    let mut log = segment(1, 0..5);
    log.records[0].label.generation = Generation(2);
    log.records[1].label.generation = Generation(4);
    log.records[2].label.namespace = NamespaceId(1);
    log.records[3].label.realization = RealizationId(1);
    let (mut world, restored) = found(vec![log]);
    assert_eq!((restored.blocks, restored.left_out), (1, 4));
    assert_eq!(world.present(0..5), [4]);
}

#[test]
fn impossible_and_overlapping_extents_are_left_out() {
    let mut log = segment(1, 0..10);
    log.records[0].offset = 0;
    log.records[1].offset += 1;
    log.records[2].length = 0;
    log.records[3].length = u32::MAX;
    log.records[4].offset = 124 << 10;
    log.records[5].offset = u64::MAX - 4095;
    log.records[6].length = BLOCK + 1;
    // The seventh overlaps the record before it, the last fills its segment so that its own entry has no room.
    log.records[9].offset = 120 << 10;
    let (mut world, restored) = found(vec![log]);
    assert_eq!(world.present(0..10), [6, 8]);
    assert_eq!((restored.blocks, restored.left_out), (2, 8));
}

#[test]
fn a_block_too_large_for_the_settings_of_now_is_left_out() {
    let (mut world, restored) = World::found(
        CoreSettings {
            block_bytes_max: BLOCK - 1,
            ..roomy()
        },
        GENERATION,
        vec![segment(1, 0..3)],
    );
    assert_eq!((restored.blocks, restored.left_out), (0, 3));
    assert_eq!(world.seen["close"], 1, "nothing is left of the segment");
    assert_eq!(world.core.statistics().nvme_segments, 0);
    assert_eq!(world.put(&hashes([1]), 4 * KIB), [Sealed::Published]);
}

#[test]
fn segments_of_which_nothing_is_left_are_closed() {
    let (mut world, restored) = found(vec![segment(1, 0..4), of_records(2, []), segment(3, 0..4)]);
    assert_eq!((restored.blocks, restored.left_out), (4, 4));
    assert_eq!(world.seen["close"], 2);
    assert_eq!(world.core.statistics().nvme_segments, 1);
    assert_eq!(world.present(0..4).len(), 4);
}

/// Segment `n` holds blocks `100 n` to `100 n + 9`.
fn ten_segments() -> Vec<RestoredSegment> {
    (1..=10)
        .map(|id| segment(id, (0..10).map(|number| u64::from(id) * 100 + number)))
        .collect()
}

#[test]
fn a_smaller_tier_keeps_the_newest_segments_and_goes_on() {
    let bytes = 6 * (128 << 10) + 5000;
    let (mut world, restored) = World::found(settings(128 << 10, bytes), GENERATION, ten_segments());
    assert_eq!((restored.blocks, restored.left_out), (50, 50));
    assert_eq!(world.seen["close"], 5);
    assert_eq!(world.present((1..=5).map(|id| id * 100)), []);
    assert_eq!(world.present((6..=10).map(|id| id * 100)).len(), 5);
    for round in 100..160 {
        world.put(&hashes(round * 100..round * 100 + 4), BLOCK);
        world.core.check_invariants();
    }
    let statistics = world.core.statistics();
    assert!(statistics.demotions > 100 && statistics.nvme_segments <= 6);
}

#[test]
fn a_larger_tier_keeps_everything_and_grows() {
    let (mut world, restored) = World::found(settings(128 << 10, 20 * (128 << 10)), GENERATION, ten_segments());
    assert_eq!((restored.blocks, restored.left_out), (100, 0));
    for round in 100..130 {
        world.put(&hashes(round * 100..round * 100 + 4), BLOCK);
    }
    assert_eq!(world.present((1..=10).map(|id| id * 100)).len(), 10);
    assert!(world.core.statistics().nvme_segments > 15);
    world.core.check_invariants();
}

#[test]
fn segments_of_another_size_count_by_their_bytes() {
    for nvme_segment_bytes in [64 << 10, 128 << 10, 192 << 10] {
        let now = CoreSettings {
            nvme_segment_bytes,
            ..settings(128 << 10, 1 << 20)
        };
        let (mut world, restored) = World::found(now, GENERATION, ten_segments());
        assert_eq!(restored.blocks + restored.left_out, 100);
        assert!(restored.blocks >= 60, "{restored:?}");
        for round in 100..160 {
            world.put_after(Parent::Block(hash(1009)), &hashes(round * 100..round * 100 + 4), BLOCK);
            assert_eq!(world.present([1009]), [1009], "its children are cached");
            world.core.check_invariants();
        }
        assert!(world.core.statistics().demotions > 100);
    }
}

#[test]
fn a_full_tier_loses_nothing_where_only_a_relocation_was_cut_short() {
    // The last free segment took in copies of what another one still holds.
    let mut log: Vec<RestoredSegment> = (1..=7)
        .map(|id| segment(id, (0..10).map(|number| u64::from(id) * 100 + number)))
        .collect();
    log.push(segment(8, 300..305));
    let (mut world, restored) = World::found(settings(128 << 10, 1 << 20), GENERATION, log);
    assert_eq!((restored.blocks, restored.left_out), (70, 5));
    assert_eq!(world.core.statistics().nvme_segments, 7);
    assert_eq!(world.fetch(&hashes([301])), [Some(Tier::Nvme)]);
    for round in 100..160 {
        world.put(&hashes(round * 100..round * 100 + 4), BLOCK);
        world.core.check_invariants();
    }
}

#[test]
fn the_oldest_records_are_the_first_to_go() {
    let (mut world, _) = World::found(settings(128 << 10, 1 << 20), GENERATION, ten_segments()[3..].to_vec());
    let mut gone = Vec::new();
    for round in 100..130 {
        world.put(&hashes(round * 100..round * 100 + 4), BLOCK);
        let present = world.present((4..=10).map(|id| id * 100 + 5));
        gone.extend(
            (4..=10)
                .map(|id| id * 100 + 5)
                .filter(|number| !present.contains(number) && !gone.contains(number))
                .collect::<Vec<_>>(),
        );
    }
    assert!(gone.len() > 2 && gone.is_sorted(), "{gone:?}");
}

#[test]
fn the_index_takes_no_more_than_it_may_and_the_newest_come_first() {
    let small = CoreSettings {
        blocks_max: 25,
        ..roomy()
    };
    let (mut world, restored) = World::found(small, GENERATION, ten_segments()[6..].to_vec());
    assert_eq!((restored.blocks, restored.left_out), (25, 15));
    assert_eq!(world.present(1000..1010).len() + world.present(900..910).len(), 20);
    assert_eq!(world.present(800..810), [805, 806, 807, 808, 809]);
    assert_eq!(world.put(&hashes([1]), BLOCK), [Sealed::Published]);
    world.core.check_invariants();
}

#[test]
fn a_quota_counts_what_came_back() {
    let quota = CoreSettings {
        namespace_quota_bytes: Some(u64::from(6 * BLOCK)),
        ..roomy()
    };
    let (mut world, restored) = World::found(quota, GENERATION, vec![segment(1, 0..6)]);
    assert_eq!(restored.blocks, 6);
    assert_eq!(world.put(&hashes(10..12), BLOCK), [Sealed::Published; 2]);
    assert_eq!(world.present(0..20), [2, 3, 4, 5, 10, 11]);
    assert_eq!(world.core.domain_statistics(DOMAIN).used_bytes, u64::from(6 * BLOCK));
    world.core.check_invariants();
}

#[test]
fn namespaces_come_back_in_order_with_their_generation_on_record() {
    let mut core = TierManager::new(roomy().check().unwrap(), Box::new(LeafFirstLru::new()));
    for (number, generation) in (0..).zip([7, 1, 40]) {
        let name = format!("tenant {number}");
        let namespace = core.restore_namespace(TrustDomain(number), &name, Generation(generation));
        assert_eq!(namespace, Ok(NamespaceId(number)));
    }
    assert_eq!(
        core.open_namespace(TrustDomain(2), "tenant 2"),
        Ok((NamespaceId(2), Generation(40)))
    );
    assert!(matches!(
        core.restore_namespace(TrustDomain(2), "tenant 2", Generation(41)),
        Err(Refusal::Invalid(_))
    ));
    core.invalidate(NamespaceId(0), Some(Generation(7)), Time(1));
    assert!(
        matches!(
            core.poll_action(),
            Some(Action::Invalidated {
                generation: Generation(7),
                ..
            })
        ),
        "it is on record already"
    );
}

#[test]
fn without_nvme_everything_is_left_out() {
    let (mut world, restored) = World::found(settings(128 << 10, 0), GENERATION, vec![segment(1, 0..4)]);
    assert_eq!((restored.blocks, restored.left_out), (0, 4));
    assert_eq!(world.put(&hashes([1]), BLOCK), [Sealed::Published]);
}

fn put_and_flush(world: &mut World, numbers: std::ops::Range<u64>) {
    world.put(&hashes(numbers), BLOCK);
    world.flush();
}

#[test]
fn a_deleted_block_stays_gone_after_a_restart() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    put_and_flush(&mut world, 0..8);
    assert_eq!(world.delete(&hashes([7, 99])), [true, false]);
    assert_eq!(world.seen["forget"], 1);
    let (mut world, restored) = world.restart(settings(128 << 10, 1 << 20));
    assert_eq!(restored.blocks, 7);
    assert_eq!(world.present(0..8), [0, 1, 2, 3, 4, 5, 6]);
}

#[test]
fn a_block_deleted_while_it_is_written_is_forgotten_once_that_is_answered() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    world.put(&hashes(0..2), BLOCK);
    world.hold = |action| name(action) == "demote";
    world.flush();
    world.delete(&hashes([1]));
    assert_eq!(world.seen.get("forget"), None, "there is no record yet");
    world.let_go();
    assert_eq!(world.seen["forget"], 1);
    let (mut world, _) = world.restart(settings(128 << 10, 1 << 20));
    assert_eq!(world.present(0..2), [0]);
}

#[test]
fn a_block_deleted_after_it_was_moved_is_forgotten_in_both_places() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    world.put(&hashes([7]), BLOCK);
    world.pass(SECOND);
    world.put(&hashes(9000..9020), BLOCK);
    world.hold = |action| name(action) == "close";
    for round in 1..60 {
        world.put_after(Parent::Block(hash(7)), &hashes(round * 10..round * 10 + 4), BLOCK);
        let copies = |world: &World| {
            let records = world.log.values().flat_map(|segment| &segment.records);
            records.filter(|record| record.label.hash == hash(7)).count()
        };
        if copies(&world) == 2 {
            world.delete(&hashes([7]));
            assert_eq!(copies(&world), 0);
            return;
        }
    }
    panic!("it was never moved");
}

#[test]
fn a_deleted_block_leaves_no_older_copy_that_an_earlier_restart_saw() {
    // A restart found two copies of each: of one in two segments, of the other in one.
    let (mut world, restored) = found(vec![segment(5, [1, 2]), segment(6, [3, 1, 3])]);
    assert_eq!((restored.blocks, restored.left_out), (3, 2));
    assert_eq!(world.seen.get("forget"), None);
    world.delete(&hashes([1, 3]));
    assert_eq!(world.seen["forget"], 4, "each copy of each");
    world.core.check_invariants();
}

#[test]
fn evicted_and_invalidated_blocks_are_not_forgotten_on_the_device() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    for round in 0..60 {
        world.put(&hashes(round * 10..round * 10 + 4), BLOCK);
    }
    world.invalidate();
    world.pass(SECOND);
    assert!(world.core.statistics().evictions_nvme > 0);
    assert_eq!(world.seen.get("forget"), None);
}

#[test]
fn a_million_blocks_come_back() {
    let hash_of = |number: u64| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        bytes[8..].copy_from_slice(&number.to_le_bytes());
        BlockHash(bytes)
    };
    let segments: Vec<RestoredSegment> = (0..250)
        .map(|id| RestoredSegment {
            segment: SegmentId(id),
            bytes: 64 << 20,
            records: (0..4000)
                .map(|place| {
                    let number = u64::from(id) * 4000 + place;
                    let mut record = record(0, Parent::Root, 0);
                    record.label.hash = hash_of(number);
                    if !number.is_multiple_of(100) {
                        record.label.parent = Parent::Block(hash_of(number - 1));
                    }
                    record.offset = 4096 + place * (16 << 10);
                    record.length = 16 << 10;
                    record
                })
                .collect(),
        })
        .collect();
    let large = CoreSettings {
        nvme_segment_bytes: 64 << 20,
        ..settings(1 << 20, 256 * (64 << 20))
    };
    let mut core = TierManager::new(large.check().unwrap(), Box::new(LeafFirstLru::new()));
    core.restore_namespace(DOMAIN, "story", GENERATION).unwrap();
    core.open_realization(Realization::default()).unwrap();
    let restored = core.restore(segments, Time(1));
    assert_eq!((restored.blocks, restored.left_out), (1_000_000, 0));
    core.connect(ME, DOMAIN, Time(1)).unwrap();
    assert_eq!(core.statistics().nvme_blocks, 1_000_000);
}
