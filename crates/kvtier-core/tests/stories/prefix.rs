//! Prefixes: what is put is found again, parents first, up to the first gap.

use crate::world::{KIB, ME, STRANGER, World, hash, hashes, leases, settings};
use kvtier_core::{FetchScope, Fetched, Hints, Parent, Refusal, Request, Reserved, Sealed, Tier, TrustDomain};

#[test]
fn a_prefix_that_was_put_is_fetched_up_to_the_first_gap() {
    let mut world = World::new(settings(1 << 20, 0));
    let chain = hashes(1..=6);
    assert_eq!(world.put(&chain[..4], 16 * KIB), [Sealed::Published; 4]);
    let found = world.fetch(&chain);
    assert_eq!(
        found,
        [
            Some(Tier::Host),
            Some(Tier::Host),
            Some(Tier::Host),
            Some(Tier::Host),
            None,
            None
        ]
    );
    assert_eq!(world.core.statistics().fetch_misses, 1);
}

#[test]
fn after_a_gap_a_prefix_fetch_leases_nothing_and_an_each_fetch_goes_on() {
    let mut world = World::new(settings(1 << 20, 0));
    let chain = hashes(1..=4);
    world.put(&chain, 16 * KIB);
    assert_eq!(world.delete(&chain[1..2]), [true]);
    let prefix = world.fetch_as(ME, &chain, FetchScope::Prefix);
    assert_eq!(leases(&prefix).len(), 1);
    let each = world.fetch_as(ME, &chain, FetchScope::Each);
    assert_eq!(leases(&each).len(), 3);
    assert_eq!(each[1], Fetched::Miss);
}

#[test]
fn a_block_is_invisible_until_it_is_sealed() {
    let mut world = World::new(settings(1 << 20, 0));
    let reserved = world.reserve_as(ME, &hashes([1]), 4 * KIB);
    assert!(matches!(reserved[..], [Reserved::Granted { .. }]));
    assert_eq!(world.present([1]), []);
    assert_eq!(world.fetch(&hashes([1])), [None]);
}

#[test]
fn a_key_that_is_present_gets_no_slot() {
    let mut world = World::new(settings(1 << 20, 0));
    world.put(&hashes([1, 2]), 4 * KIB);
    let reserved = world.reserve_as(ME, &hashes([1, 2, 3]), 4 * KIB);
    assert!(matches!(
        reserved[..],
        [Reserved::Present, Reserved::Present, Reserved::Granted { .. }]
    ));
}

#[test]
fn of_two_writers_of_one_key_the_first_to_seal_publishes() {
    let mut world = World::new(settings(1 << 20, 0));
    let (mine, other) = (
        world.reserve_as(ME, &hashes([1]), 4 * KIB),
        world.reserve_as(ME, &hashes([1]), 4 * KIB),
    );
    assert_eq!(
        world.seal_granted(&mine, &hashes([1]), Parent::Root),
        [Sealed::Published]
    );
    assert_eq!(
        world.seal_granted(&other, &hashes([1]), Parent::Root),
        [Sealed::Present]
    );
    assert_eq!(world.core.statistics().reservations, 0);
    assert_eq!(world.core.statistics().host_used_bytes, 4 << 10);
}

#[test]
fn a_prefix_on_nvme_is_promoted_and_then_found_in_host_memory() {
    let mut world = World::new(settings(256 << 10, 4 << 20));
    for chain in 0..8 {
        world.put(&hashes(chain * 10..chain * 10 + 4), 16 * KIB);
    }
    let chain = hashes(0..4);
    assert_eq!(world.lookup(&chain), [Some(Tier::Nvme); 4]);
    assert_eq!(world.fetch(&chain), [Some(Tier::Nvme); 4]);
    assert_eq!(world.fetch(&chain), [Some(Tier::Host); 4]);
    assert_eq!(world.core.statistics().promotions, 4);
    world.core.check_invariants();
}

#[test]
fn fetches_of_one_block_share_its_promotion() {
    let mut world = World::new(settings(256 << 10, 4 << 20));
    for chain in 0..8 {
        world.put(&hashes(chain * 10..chain * 10 + 4), 16 * KIB);
    }
    world.hold = |action| crate::world::name(action) == "promote";
    let keys = hashes([0]);
    let first = world.fetch_later(&keys);
    let second = world.fetch_later(&keys);
    assert_eq!(world.held.len(), 1, "one read serves both");
    world.let_go();
    assert_eq!(leases(&world.fetched[&first]).len(), 1);
    assert_eq!(leases(&world.fetched[&second]).len(), 1);
}

#[test]
fn bytes_that_come_too_late_are_a_miss_now_and_a_hit_next_time() {
    let mut world = World::new(settings(256 << 10, 4 << 20));
    for chain in 0..8 {
        world.put(&hashes(chain * 10..chain * 10 + 4), 16 * KIB);
    }
    world.hold = |action| crate::world::name(action) == "promote";
    let keys = hashes([0]);
    let operation = world.fetch_later(&keys);
    world.pass(crate::world::SECOND + 1);
    assert_eq!(world.fetched[&operation], [Fetched::Miss]);
    world.let_go();
    assert_eq!(world.fetch(&keys), [Some(Tier::Host)]);
    assert_eq!(world.core.statistics().fetch_late, 1);
}

#[test]
fn a_namespace_of_another_domain_is_denied_like_one_that_does_not_exist() {
    let mut world = World::new(settings(1 << 20, 0));
    let (foreign, _) = world.core.open_namespace(TrustDomain(99), "story").unwrap();
    assert_ne!(foreign, world.namespace, "a name is scoped to its domain");
    let keys = hashes([1]);
    for namespace in [foreign, kvtier_core::NamespaceId(1000)] {
        let request = Request {
            namespace,
            hints: Hints::default(),
            ..world.request(ME, &keys)
        };
        assert_eq!(world.core.lookup(&request, world.now), Err(Refusal::Denied));
        assert_eq!(
            world.core.fetch(&request, FetchScope::Each, world.now),
            Err(Refusal::Denied)
        );
        assert_eq!(world.core.reserve(&request, &[1], world.now), Err(Refusal::Denied));
        assert_eq!(world.core.delete(&request, world.now), Err(Refusal::Denied));
    }
}

#[test]
fn domains_share_no_segment() {
    let mut world = World::new(settings(1 << 20, 0));
    world.core.connect(STRANGER, TrustDomain(99), world.now).unwrap();
    let mine = world.grant(ME, 4 * KIB, 2);
    let theirs = world.grant(STRANGER, 4 * KIB, 2);
    for (_, mine) in &mine {
        assert!(theirs.iter().all(|(_, theirs)| theirs.segment != mine.segment));
    }
    assert_eq!((mine.len(), theirs.len()), (2, 2));
}

#[test]
fn a_deleted_parent_hides_itself_and_its_children_stay() {
    let mut world = World::new(settings(1 << 20, 0));
    let chain = hashes(1..=3);
    world.put(&chain, 4 * KIB);
    assert_eq!(world.delete(&[hash(1), hash(9)]), [true, false]);
    assert_eq!(world.present(1..=3), [2, 3]);
    assert_eq!(world.put(&chain[..1], 4 * KIB), [Sealed::Published]);
    assert_eq!(world.fetch(&chain), [Some(Tier::Host); 3]);
    world.core.check_invariants();
}
