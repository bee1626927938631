//! Prefetch: who fetches a prompt in pieces finds the later ones in host memory.

use crate::world::{KIB, World, hash, hashes, settings};
use kvtier_core::{Action, CoreSettings, Failure, Tier};

/// Sixteen slots, and room for a hundred blocks on NVMe.
fn ahead(blocks: usize) -> CoreSettings {
    CoreSettings {
        prefetch_blocks: blocks,
        host_clean_low_permille: 500,
        host_clean_high_permille: 500,
        ..settings(256 << 10, 2 << 20)
    }
}

/// A prompt of 32 blocks was put and used; what came after it left NVMe alone with most of it.
fn cold(settings: CoreSettings) -> World {
    let mut world = World::new(settings);
    world.put(&hashes(0..32), 16 * KIB);
    world.pass(1_000_000_000);
    world.put(&hashes(100..116), 16 * KIB);
    assert_eq!(world.fetch(&hashes(0..2)), [Some(Tier::Nvme); 2]);
    world
}

fn promotes(action: &Action) -> bool {
    matches!(action, Action::Promote { .. })
}

#[test]
fn what_follows_a_fetch_is_read_before_it_is_asked_for() {
    let mut world = cold(ahead(4));
    assert_eq!(world.core.statistics().prefetches, 4);
    assert_eq!(world.core.statistics().prefetch_hits, 0);
    assert_eq!(world.fetch(&hashes(2..6)), [Some(Tier::Host); 4]);
    let statistics = world.core.statistics();
    assert_eq!((statistics.prefetches, statistics.prefetch_hits), (8, 4));
    assert_eq!(
        world.fetch(&hashes(5..6)),
        [Some(Tier::Host)],
        "a hit is counted once: it is a block like any other then"
    );
    assert_eq!(world.core.statistics().prefetch_hits, 4);
    world.core.check_invariants();
}

#[test]
fn without_it_each_piece_waits_for_nvme() {
    let mut world = cold(ahead(0));
    assert_eq!(world.fetch(&hashes(2..6)), [Some(Tier::Nvme); 4]);
    assert_eq!(world.core.statistics().prefetches, 0);
}

#[test]
fn a_request_that_goes_another_way_reads_nothing_ahead() {
    let mut world = cold(ahead(4));
    let before = world.core.statistics().promotions;
    let other = [hash(0), hash(1), hash(2), hash(777)];
    assert_eq!(world.fetch(&other)[3], None);
    assert_eq!(
        world.core.statistics().promotions,
        before,
        "block 2 was read ahead already"
    );
}

#[test]
fn who_asks_for_a_block_that_is_being_read_ahead_waits_for_that_read() {
    let mut world = World::new(ahead(4));
    world.put(&hashes(0..32), 16 * KIB);
    world.pass(1_000_000_000);
    world.put(&hashes(100..116), 16 * KIB);
    world.hold = promotes;
    let first = world.fetch_later(&hashes(0..2));
    assert_eq!(world.held.len(), 6);
    let second = world.fetch_later(&hashes(2..4));
    assert_eq!(
        world.held.iter().filter(|action| promotes(action)).count(),
        6 + 2,
        "two more ahead"
    );
    world.let_go();
    for operation in [first, second] {
        let results = world.fetched.remove(&operation).expect("answered");
        let asked = if operation == first { hashes(0..2) } else { hashes(2..4) };
        let tiers = world.check_and_release(&asked, &results[..2]);
        assert_eq!(tiers, [Some(Tier::Nvme); 2]);
    }
    assert_eq!(world.core.statistics().prefetch_hits, 0, "they were late");
    world.core.check_invariants();
}

#[test]
fn what_was_read_ahead_and_not_asked_for_goes_first_and_without_a_write() {
    let mut world = cold(ahead(4));
    let demotions = world.core.statistics().demotions;
    world.put(&hashes(200..204), 16 * KIB);
    world.put(&hashes(300..304), 16 * KIB);
    assert!(world.core.statistics().demotions - demotions <= 16);
    // Their NVMe copies are where they were.
    let found = world.fetch(&hashes(2..6));
    assert!(found.iter().all(Option::is_some), "{found:?}");
    world.core.check_invariants();
}

#[test]
fn a_read_ahead_that_fails_costs_nobody_anything() {
    let mut world = World::new(ahead(4));
    world.put(&hashes(0..32), 16 * KIB);
    world.pass(1_000_000_000);
    world.put(&hashes(100..116), 16 * KIB);
    world.hold = promotes;
    let asked = world.fetch_later(&hashes(0..2));
    world.hold = |_| false;
    let held = std::mem::take(&mut world.held);
    for (position, action) in held.iter().enumerate() {
        world.fail = if position < 2 { |_| None } else { |_| Some(Failure::Io) };
        world.answer(action);
    }
    world.fail = |_| None;
    world.run();
    let results = world.fetched.remove(&asked).expect("answered");
    assert_eq!(world.check_and_release(&hashes(0..2), &results), [Some(Tier::Nvme); 2]);
    world.core.check_invariants();
}

#[test]
fn nothing_is_read_ahead_of_an_older_generation() {
    let mut world = cold(ahead(4));
    let before = world.core.statistics().prefetches;
    world.invalidate();
    world.put(&hashes(0..2), 16 * KIB);
    world.fetch(&hashes(0..2));
    assert_eq!(world.core.statistics().prefetches, before);
    world.core.check_invariants();
}
