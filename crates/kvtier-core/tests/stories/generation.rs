//! Generations: an invalidation hides everything older at once, and is acknowledged when it is durable.

use crate::world::{KIB, ME, SECOND, World, hash, hashes, name, settings};
use kvtier_core::{Failure, FetchScope, Fetched, Generation, Parent, Sealed};

#[test]
fn an_invalidated_block_is_gone_at_once_and_its_memory_follows() {
    let mut world = World::new(settings(1 << 20, 0));
    world.put(&hashes(0..8), 16 * KIB);
    let operation = world.invalidate();
    assert_eq!(world.invalidated, [operation]);
    assert_eq!(world.present(0..8), []);
    world.pass(SECOND);
    let statistics = world.core.statistics();
    assert_eq!((statistics.blocks, statistics.host_used_bytes), (0, 0));
}

#[test]
fn an_invalidation_hides_at_once_but_is_acknowledged_only_when_recorded() {
    let mut world = World::new(settings(1 << 20, 0));
    world.put(&hashes(0..2), 16 * KIB);
    world.hold = |action| name(action) == "record";
    world.invalidate();
    assert_eq!(world.present(0..2), []);
    assert!(world.invalidated.is_empty());
    world.let_go();
    assert_eq!(world.invalidated.len(), 1);
}

#[test]
fn a_generation_that_cannot_be_recorded_is_tried_again_and_never_acknowledged() {
    let mut world = World::new(settings(1 << 20, 0));
    world.fail = |action| (name(action) == "record").then_some(Failure::Io);
    let operation = world.invalidate();
    world.pass(5 * SECOND);
    assert!(world.invalidated.is_empty());
    assert!(world.seen["record"] > 3);
    world.fail = |_| None;
    world.pass(5 * SECOND);
    assert_eq!(world.invalidated, [operation]);
}

#[test]
fn a_record_that_is_never_answered_is_asked_for_again() {
    let mut world = World::new(settings(1 << 20, 0));
    world.hold = |action| name(action) == "record";
    let operation = world.invalidate();
    world.held.clear();
    world.hold = |_| false;
    world.pass(30 * SECOND);
    assert_eq!(world.invalidated, [operation]);
}

#[test]
fn the_generation_never_falls_and_a_target_it_has_reached_is_acknowledged() {
    let mut world = World::new(settings(1 << 20, 0));
    let far = world
        .core
        .invalidate(world.namespace, Some(Generation(1 << 40)), world.now);
    world.run();
    let near = world.core.invalidate(world.namespace, Some(Generation(7)), world.now);
    world.run();
    assert_eq!(world.invalidated, [far, near]);
    assert_eq!(world.core.generation(world.namespace), Generation(1 << 40));
    assert_eq!(world.seen["record"], 1);
    assert_eq!(world.core.statistics().invalidations, 1);
}

#[test]
fn invalidations_that_come_while_one_is_recorded_share_the_next_record() {
    let mut world = World::new(settings(1 << 20, 0));
    world.hold = |action| name(action) == "record";
    for _ in 0..5 {
        world.invalidate();
    }
    assert_eq!(world.held.len(), 1);
    world.let_go();
    assert_eq!(world.invalidated.len(), 5);
    assert_eq!(world.seen["record"], 2);
}

#[test]
fn bytes_written_for_an_older_generation_are_not_published() {
    let mut world = World::new(settings(1 << 20, 0));
    let reserved = world.reserve_as(ME, &hashes([1]), 16 * KIB);
    world.invalidate();
    assert_eq!(
        world.seal_granted(&reserved, &hashes([1]), Parent::Root),
        [Sealed::Stale]
    );
    assert_eq!(world.present([1]), []);
    assert_eq!(world.core.statistics().host_used_bytes, 0, "the slot is free again");
}

#[test]
fn a_promotion_that_ends_after_an_invalidation_is_a_miss() {
    let mut world = World::new(settings(256 << 10, 4 << 20));
    for chain in 0..8 {
        world.put(&hashes(chain * 10..chain * 10 + 4), 16 * KIB);
    }
    world.hold = |action| name(action) == "promote";
    let keys = hashes([0]);
    let operation = world.fetch_later(&keys);
    world.invalidate();
    world.let_go();
    assert_eq!(world.fetched[&operation], [Fetched::Miss]);
    world.pass(SECOND);
    assert_eq!(world.core.statistics().blocks, 0);
    world.core.check_invariants();
}

#[test]
fn a_block_being_written_to_nvme_does_not_outlive_its_generation() {
    let mut world = World::new(settings(256 << 10, 4 << 20));
    world.hold = |action| name(action) == "demote";
    world.put(&hashes(0..16), 16 * KIB);
    assert!(!world.held.is_empty());
    world.invalidate();
    world.let_go();
    world.pass(SECOND);
    let statistics = world.core.statistics();
    assert_eq!(
        (
            statistics.blocks,
            statistics.nvme_used_bytes,
            statistics.host_used_bytes
        ),
        (0, 0, 0)
    );
    world.core.check_invariants();
}

#[test]
fn a_key_of_the_new_generation_lives_beside_what_is_left_of_the_old() {
    let mut world = World::new(settings(1 << 20, 0));
    world.put(&hashes(0..4), 16 * KIB);
    let results = world.fetch_as(ME, &hashes([0]), FetchScope::Each);
    world.invalidate();
    world.generation = world.core.generation(world.namespace);
    assert_eq!(world.put(&hashes(0..4), 16 * KIB), [Sealed::Published; 4]);
    assert_eq!(world.fetch(&hashes(0..4)).len(), 4);
    world.pass(SECOND);
    assert_eq!(world.core.statistics().blocks, 4);
    world.check_and_release(&hashes([0]), &results);
    assert_eq!(world.core.statistics().host_used_bytes, 64 << 10);
    assert_eq!(world.lookup(&[hash(0)]).iter().flatten().count(), 1);
}
