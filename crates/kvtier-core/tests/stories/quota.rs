//! Quotas: a namespace pays for its own growth with its own oldest leaves.

use crate::world::{KIB, ME, World, hashes, settings};
use kvtier_core::{FetchScope, Reserved, Sealed};

#[test]
fn a_namespace_over_its_quota_forgets_its_own_oldest_leaves() {
    let mut world = World::new(settings(1 << 20, 0));
    world.core.set_quota(world.namespace, Some(128 << 10));
    for chain in 0..4 {
        assert_eq!(
            world.put(&hashes(chain * 10..chain * 10 + 4), 16 * KIB),
            [Sealed::Published; 4]
        );
        assert!(world.core.domain_statistics(crate::world::DOMAIN).used_bytes <= 128 << 10);
    }
    assert_eq!(world.present(0..50), [20, 21, 22, 23, 30, 31, 32, 33]);
    world.core.check_invariants();
}

#[test]
fn another_namespace_is_left_alone() {
    let mut world = World::new(settings(1 << 20, 0));
    world.put(&hashes(0..8), 16 * KIB);
    let first = world.namespace;
    let (second, generation) = world.core.open_namespace(crate::world::DOMAIN, "small").unwrap();
    world.core.set_quota(second, Some(32 << 10));
    world.namespace = second;
    world.generation = generation;
    for number in 100..120 {
        world.put(&hashes([number]), 16 * KIB);
    }
    assert_eq!(world.present(100..120), [118, 119]);
    world.namespace = first;
    assert_eq!(world.present(0..8).len(), 8);
}

#[test]
fn a_block_is_counted_once_whatever_its_copies() {
    let mut world = World::new(settings(128 << 10, 4 << 20));
    world.core.set_quota(world.namespace, Some(1 << 20));
    for number in 0..32 {
        world.put(&hashes([number]), 16 * KIB);
    }
    world.fetch(&hashes([0]));
    let used = world.core.domain_statistics(crate::world::DOMAIN);
    assert_eq!(used.used_bytes, 32 * (16 << 10));
    assert!(used.host_blocks + used.nvme_blocks > used.blocks);
}

#[test]
fn what_cannot_fit_is_busy_and_costs_nothing() {
    let mut world = World::new(settings(1 << 20, 0));
    world.core.set_quota(world.namespace, Some(40 << 10));
    world.put(&hashes([1, 2]), 16 * KIB);
    assert_eq!(world.reserve_as(ME, &hashes([9]), 48 * KIB), [Reserved::Busy]);
    assert_eq!(world.present([1, 2]), [1, 2]);
}

#[test]
fn leased_blocks_are_not_what_pays() {
    let mut world = World::new(settings(1 << 20, 0));
    world.core.set_quota(world.namespace, Some(32 << 10));
    world.put(&hashes([1, 2]), 16 * KIB);
    let results = world.fetch_as(ME, &hashes([1, 2]), FetchScope::Each);
    assert_eq!(world.reserve_as(ME, &hashes([3]), 16 * KIB), [Reserved::Busy]);
    world.check_and_release(&hashes([1, 2]), &results);
    assert!(matches!(
        world.reserve_as(ME, &hashes([3]), 16 * KIB)[..],
        [Reserved::Granted { .. }]
    ));
}

#[test]
fn reservations_count_from_the_moment_they_are_given() {
    let mut world = World::new(settings(1 << 20, 0));
    world.core.set_quota(world.namespace, Some(32 << 10));
    let reserved = world.reserve_as(ME, &hashes([1, 2, 3]), 16 * KIB);
    assert_eq!(reserved.iter().filter(|result| **result == Reserved::Busy).count(), 1);
    assert_eq!(world.core.domain_statistics(crate::world::DOMAIN).used_bytes, 32 << 10);
}

#[test]
fn a_quota_set_later_binds_what_is_there_already() {
    let mut world = World::new(settings(1 << 20, 0));
    world.put(&hashes(0..8), 16 * KIB);
    world.core.set_quota(world.namespace, Some(64 << 10));
    world.put(&hashes([20]), 16 * KIB);
    assert_eq!(world.core.domain_statistics(crate::world::DOMAIN).used_bytes, 64 << 10);
    assert_eq!(world.present(0..8), [0, 1, 2]);
    world.core.set_quota(world.namespace, None);
    world.put(&hashes(30..40), 16 * KIB);
    assert_eq!(world.core.statistics().blocks, 14);
    world.core.check_invariants();
}
