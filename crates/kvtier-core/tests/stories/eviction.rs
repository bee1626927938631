//! Eviction: the least recently used goes first, leaves before their parents, what is held not at all.

use crate::world::{KIB, ME, World, hash, hashes, leases, settings};
use kvtier_core::{FetchScope, Fetched, Parent, Reserved, Sealed, Tier};

/// Host memory of sixteen blocks, no NVMe.
fn sixteen() -> World {
    World::new(settings(256 << 10, 0))
}

#[test]
fn the_least_recently_used_prefix_goes_first() {
    let mut world = sixteen();
    for chain in 0..4 {
        world.put(&hashes(chain * 10..chain * 10 + 4), 16 * KIB);
    }
    world.fetch(&hashes(0..4));
    world.put(&hashes(40..44), 16 * KIB);
    assert_eq!(world.present(0..4).len(), 4, "it was used since");
    assert_eq!(world.present(10..14), []);
    assert_eq!(world.present(20..24).len(), 4);
}

#[test]
fn a_lease_to_copy_a_block_elsewhere_is_no_use_of_it_and_holds_it_all_the_same() {
    let mut world = sixteen();
    for chain in 0..4 {
        world.put(&hashes(chain * 10..chain * 10 + 4), 16 * KIB);
    }
    let copied = hashes(0..4);
    let request = world.request(ME, &copied);
    let results = world.core.lease_unused(&request, world.now).unwrap();
    assert!(
        results
            .iter()
            .all(|result| matches!(result, Fetched::Leased { tier: Tier::Host, .. }))
    );
    world.put(&hashes(40..44), 16 * KIB);
    assert_eq!(world.present(0..4).len(), 4, "they are leased");
    assert_eq!(world.check_and_release(&copied, &results).len(), 4);
    world.put(&hashes(50..54), 16 * KIB);
    assert_eq!(world.present(0..4), [], "the oldest, as if nobody had leased them");
    assert_eq!(world.core.statistics().fetch_hits_host, 0, "nobody asked for them");
    let absent = hashes(90..91);
    let request = world.request(ME, &absent);
    assert_eq!(world.core.lease_unused(&request, world.now).unwrap(), [Fetched::Miss]);
    world.core.check_invariants();
}

#[test]
fn what_has_a_checksum_is_not_leased_for_one_again() {
    let mut world = sixteen();
    world.put(&hashes(0..2), 16 * KIB);
    let both = hashes(0..2);
    let request = world.request(ME, &both);
    let leased = world.core.lease_unsummed(&request, world.now).unwrap();
    let Fetched::Leased { lease, .. } = leased[0] else {
        panic!("{leased:?}")
    };
    world.core.note_checksum(ME, lease, 7);
    assert_eq!(world.check_and_release(&both, &leased).len(), 2);
    let request = world.request(ME, &both);
    let again = world.core.lease_unsummed(&request, world.now).unwrap();
    assert_eq!(again[0], Fetched::Miss);
    assert!(matches!(again[1], Fetched::Leased { checksum: None, .. }), "{again:?}");
    assert_eq!(world.check_and_release(&both[1..], &again[1..]).len(), 1);
    world.core.check_invariants();
}

#[test]
fn a_block_is_not_forgotten_before_its_cached_children() {
    let mut world = sixteen();
    world.put(&hashes(0..8), 16 * KIB);
    // The children alone are used from now on: the parents are the oldest, and stay.
    for _ in 0..3 {
        let results = world.fetch_as(ME, &hashes(4..8), FetchScope::Each);
        world.check_and_release(&hashes(4..8), &results);
    }
    world.put(&hashes(100..112), 16 * KIB);
    let left = world.present(0..8);
    assert_eq!(
        left,
        (0..u64::try_from(left.len()).unwrap()).collect::<Vec<_>>(),
        "leaves go first"
    );
    assert_eq!(left.len(), 4);
    world.core.check_invariants();
}

#[test]
fn a_chain_longer_than_the_cache_keeps_its_beginning() {
    let mut world = sixteen();
    let mut parent = Parent::Root;
    for start in (0..40).step_by(4) {
        world.put_after(parent, &hashes(start..start + 4), 16 * KIB);
        parent = Parent::Block(hash(start + 3));
        let cached = world.present(0..(start + 4).min(16));
        assert_eq!(
            cached,
            (0..).take(cached.len()).collect::<Vec<_>>(),
            "leaves went first"
        );
    }
    assert_eq!(world.present(0..40).len(), 16, "no slot is idle");
    world.core.check_invariants();
}

#[test]
fn a_leased_block_is_not_evicted_and_is_next_once_it_is_released() {
    let mut world = sixteen();
    let kept = hashes([0]);
    world.put(&kept, 16 * KIB);
    let results = world.fetch_as(ME, &kept, FetchScope::Each);
    for number in 1..40 {
        assert_eq!(world.put(&hashes([number]), 16 * KIB), [Sealed::Published]);
    }
    assert_eq!(world.present([0]), [0]);
    world.check_and_release(&kept, &results);
    world.put(&hashes([40]), 16 * KIB);
    assert_eq!(world.present([0]), []);
}

#[test]
fn blocks_leave_host_memory_for_nvme_before_they_are_forgotten() {
    let mut world = World::new(settings(256 << 10, 2 << 20));
    for chain in 0..12 {
        assert_eq!(
            world.put(&hashes(chain * 10..chain * 10 + 4), 16 * KIB),
            [Sealed::Published; 4]
        );
    }
    let statistics = world.core.statistics();
    assert_eq!(statistics.blocks, 48, "nothing is lost while there is room below");
    assert!(statistics.nvme_blocks >= 32);
    for chain in 0..12 {
        assert!(
            world
                .fetch(&hashes(chain * 10..chain * 10 + 4))
                .iter()
                .all(Option::is_some)
        );
    }
}

#[test]
fn a_promoted_block_leaves_host_memory_again_without_a_write() {
    let mut world = World::new(settings(256 << 10, 8 << 20));
    for chain in 0..8 {
        world.put(&hashes(chain * 10..chain * 10 + 4), 16 * KIB);
    }
    world.fetch(&hashes(0..4));
    let written = world.core.statistics().demotions;
    for chain in 1..4 {
        world.fetch(&hashes(chain * 10..chain * 10 + 4));
    }
    for chain in 0..4 {
        world.fetch(&hashes(chain * 10..chain * 10 + 4));
    }
    let statistics = world.core.statistics();
    assert!(statistics.promotions >= 16);
    assert!(
        statistics.demotions - written <= 16,
        "only blocks never written before are written"
    );
    assert_eq!(statistics.blocks, 32);
}

#[test]
fn on_nvme_too_the_leaves_go_first() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    for chain in 0..30 {
        world.put(&hashes(chain * 10..chain * 10 + 8), 8 * KIB);
        for chain in 0..=chain {
            let cached = world.present(chain * 10..chain * 10 + 8);
            let prefix: Vec<u64> = (chain * 10..).take(cached.len()).collect();
            assert_eq!(cached, prefix, "what is cached of a chain is a prefix of it");
        }
    }
    assert!(world.core.statistics().evictions_nvme > 0);
    world.core.check_invariants();
}

#[test]
fn a_block_too_large_for_an_nvme_segment_is_forgotten() {
    let mut world = World::new(settings(1 << 20, 2 << 20));
    for number in 0..20 {
        assert_eq!(world.put(&hashes([number]), 200 * KIB), [Sealed::Published]);
    }
    let statistics = world.core.statistics();
    assert_eq!((statistics.demotions, statistics.nvme_blocks), (0, 0));
    assert!(statistics.forgotten >= 15);
}

#[test]
fn a_batch_waits_for_room_instead_of_dropping_blocks() {
    let mut world = World::new(settings(256 << 10, 4 << 20));
    world.put(&hashes(0..16), 16 * KIB);
    let reserved = world.reserve_as(ME, &hashes(100..112), 16 * KIB);
    assert!(reserved.iter().all(|result| matches!(result, Reserved::Granted { .. })));
    assert_eq!(world.core.statistics().forgotten, 0);
    assert_eq!(world.present(0..16).len(), 16);
}

#[test]
fn who_waits_in_vain_is_told_busy_at_the_deadline() {
    let mut world = sixteen();
    world.put(&hashes(0..16), 16 * KIB);
    let results = world.fetch_as(ME, &hashes(0..16), FetchScope::Each);
    assert_eq!(leases(&results).len(), 16);
    assert_eq!(world.reserve_as(ME, &hashes([100]), 16 * KIB), [Reserved::Busy]);
    assert_eq!(world.core.statistics().waiting, 0);
    world.check_and_release(&hashes(0..16), &results);
    assert!(matches!(
        world.reserve_as(ME, &hashes([100]), 16 * KIB)[..],
        [Reserved::Granted { .. }]
    ));
}

#[test]
fn hits_come_from_both_tiers_of_a_working_set_larger_than_host_memory() {
    let mut world = World::new(settings(256 << 10, 2 << 20));
    let (mut host, mut nvme) = (0, 0);
    for round in 0..4 {
        for chain in 0..10 {
            let keys = hashes(chain * 10..chain * 10 + 5);
            let found = world.fetch(&keys);
            host += found.iter().filter(|tier| **tier == Some(Tier::Host)).count();
            nvme += found.iter().filter(|tier| **tier == Some(Tier::Nvme)).count();
            world.put(&keys, 16 * KIB);
            if round > 0 {
                assert!(world.fetch(&keys).iter().all(|tier| *tier == Some(Tier::Host)));
            }
        }
    }
    assert_eq!(host + nvme, 150);
    assert!(nvme > 0);
}
