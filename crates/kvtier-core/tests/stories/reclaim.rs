//! Reclaim: whole segments are emptied, of host memory for who starves, of NVMe for what comes next.

use crate::world::{KIB, ME, SECOND, STRANGER, World, granted, hash, hashes, name, settings};
use kvtier_core::{
    Action, CoreSettings, Eviction, FetchScope, Parent, Reserved, Sealed, Tier, TierManager, TrustDomain,
};

#[test]
fn nvme_segments_are_emptied_and_parents_of_cached_blocks_move() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    world.put(&hashes([7]), 8 * KIB);
    // Out of host memory with it.
    world.pass(SECOND);
    world.put(&hashes(9000..9020), 8 * KIB);
    for round in 1..60 {
        // Never fetched again, but never without cached children either.
        world.put_after(Parent::Block(hash(7)), &hashes(round * 10..round * 10 + 4), 8 * KIB);
        assert_eq!(world.present([7]), [7]);
        world.core.check_invariants();
    }
    assert!(world.seen["relocate"] > 0 && world.seen["close"] > 8 && world.seen["seal"] > 8);
    let statistics = world.core.statistics();
    assert!(statistics.nvme_segments <= 8);
    assert!(statistics.nvme_used_bytes <= statistics.nvme_capacity_bytes * 940 / 1000);
    assert_eq!(world.fetch(&hashes([7])), [Some(Tier::Nvme)]);
}

#[test]
fn an_nvme_segment_is_sealed_once_its_last_write_is_answered() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    world.hold = |action| name(action) == "demote";
    for round in 0..10 {
        let keys = hashes(round * 10..round * 10 + 8);
        world
            .core
            .fetch(&world.request(ME, &keys), FetchScope::Prefix, world.now)
            .unwrap();
        world.reserve_as(ME, &keys, 8 * KIB);
    }
    assert_eq!(world.seen.get("seal"), None);
    world.let_go();
    world.core.check_invariants();
}

#[test]
fn a_segment_that_is_read_from_is_not_closed() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    for round in 0..10 {
        world.put(&hashes(round * 10..round * 10 + 4), 8 * KIB);
    }
    world.hold = |action| name(action) == "promote";
    let operation = world.fetch_later(&hashes([0]));
    let Action::Promote { source, .. } = world.held[0] else {
        panic!("a promotion is held")
    };
    world.core.invalidate(world.namespace, None, world.now);
    world.run();
    world.generation = world.core.generation(world.namespace);
    world.pass(SECOND / 2);
    for round in 100..160 {
        world.put(&hashes(round * 10..round * 10 + 4), 8 * KIB);
    }
    assert!(
        world.nvme.keys().any(|(segment, _)| *segment == source.segment),
        "the segment is still there"
    );
    world.let_go();
    assert!(world.fetched.contains_key(&operation));
    world.core.check_invariants();
}

#[test]
fn blocks_of_another_size_get_a_segment_of_those_that_are_older() {
    let mut world = World::new(settings(256 << 10, 0));
    world.put(&hashes(0..16), 16 * KIB);
    world.pass(SECOND);
    assert_eq!(world.put(&hashes(100..104), 12 * KIB), [Sealed::Published; 4]);
    let statistics = world.core.statistics();
    assert_eq!(statistics.segments_reclaimed, 1);
    assert_eq!(world.present(0..16).len(), 12);
    world.core.check_invariants();
}

#[test]
fn a_starving_group_takes_no_block_with_cached_children_before_them() {
    let mut world = World::new(settings(256 << 10, 0));
    world.put(&hashes(0..16), 16 * KIB);
    for number in 0..3 {
        assert_eq!(world.put(&hashes([100 + number]), 12 * KIB), [Sealed::Published]);
        let cached = world.present(0..16);
        assert_eq!(
            cached,
            (0..).take(cached.len()).collect::<Vec<_>>(),
            "a chain loses its end first"
        );
        world.pass(SECOND);
    }
}

#[test]
fn a_segment_reclaimed_over_nvme_loses_nothing() {
    let mut world = World::new(settings(256 << 10, 4 << 20));
    world.put(&hashes(0..16), 16 * KIB);
    assert_eq!(world.put(&hashes(100..104), 12 * KIB), [Sealed::Published; 4]);
    assert_eq!(world.present(0..16).len(), 16);
    assert!(world.core.statistics().segments_reclaimed > 0);
    world.core.check_invariants();
}

#[test]
fn memory_goes_from_one_domain_to_another_only_by_closing_a_segment() {
    let mut world = World::new(settings(256 << 10, 0));
    world.put(&hashes(0..16), 16 * KIB);
    world.core.connect(STRANGER, TrustDomain(99), world.now).unwrap();
    let (namespace, generation) = world.core.open_namespace(TrustDomain(99), "theirs").unwrap();
    (world.namespace, world.generation) = (namespace, generation);
    let reserved = world.reserve_as(STRANGER, &hashes([1]), 16 * KIB);
    let [(_, extent)] = granted(&reserved)[..] else {
        panic!("there is room: {reserved:?}")
    };
    assert!(world.seen["close"] >= 1);
    assert!(
        world.host.keys().all(|(segment, _)| *segment != extent.segment),
        "a segment of its own, never written"
    );
}

#[test]
fn a_segment_with_a_leased_block_is_not_reclaimed_and_the_attempt_ends() {
    let mut world = World::new(settings(64 << 10, 0));
    world.put(&hashes(0..4), 16 * KIB);
    let results = world.fetch_as(ME, &hashes([0]), FetchScope::Each);
    assert_eq!(world.reserve_as(ME, &hashes([100]), 12 * KIB), [Reserved::Busy]);
    assert_eq!(world.seen.get("close"), None);
    world.pass(2 * SECOND);
    world.check_and_release(&hashes([0]), &results);
    assert!(matches!(
        world.reserve_as(ME, &hashes([100]), 12 * KIB)[..],
        [Reserved::Granted { .. }]
    ));
    world.core.check_invariants();
}

#[test]
fn blocks_of_any_size_fit_without_external_fragmentation() {
    let mut world = World::new(settings(2 << 20, 0));
    for (number, length) in (0..).zip([
        1,
        4 * KIB,
        5 * KIB,
        20 * KIB,
        64 * KIB,
        200 * KIB,
        1024 * KIB,
        2048 * KIB,
    ]) {
        assert_eq!(
            world.put(&hashes([number]), length),
            [Sealed::Published],
            "{length} bytes"
        );
        assert_eq!(world.fetch(&hashes([number])), [Some(Tier::Host)]);
        world.core.check_invariants();
    }
}

#[test]
fn by_hazards_the_segment_with_the_least_to_copy_is_emptied_and_not_the_oldest() {
    let settings = CoreSettings {
        eviction: Eviction::Hazard,
        ..settings(128 << 10, 1 << 20)
    };
    let settings = settings.check().unwrap();
    let policy = settings.policy();
    let mut world = World::with(TierManager::new(settings, policy));
    // A segment holds 15 of them.
    let mut number = 0;
    while world.log.len() < 4 {
        world.put(&hashes([number]), 8 * KIB);
        world.pass(SECOND);
        number += 1;
    }
    let ids: Vec<_> = world.log.keys().copied().collect();
    let second: Vec<_> = world.log[&ids[1]]
        .records
        .iter()
        .map(|record| record.label.hash)
        .collect();
    world.delete(&second);
    while !world.seen.contains_key("close") {
        world.put(&hashes([number]), 8 * KIB);
        world.pass(SECOND);
        number += 1;
    }
    assert!(world.log.contains_key(&ids[0]) && !world.log.contains_key(&ids[1]));
    world.core.check_invariants();
}
