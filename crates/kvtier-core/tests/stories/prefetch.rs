//! Prefetch: who fetches a prompt in pieces finds the later ones in host memory.

use crate::world::{KIB, World, hash, hashes, settings};
use kvtier_core::{Action, CoreSettings, Failure, Tier};

/// Sixteen slots, and room for a hundred blocks on NVMe.
fn ahead(blocks: usize) -> CoreSettings {
    CoreSettings {
        prefetch_blocks: blocks,
        host_clean_low_permille: 250,
        host_clean_high_permille: 750,
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
    assert!(statistics.prefetches > 4, "as far as there are slots to spare");
    assert_eq!(statistics.prefetch_hits, 4);
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
fn what_was_read_ahead_and_not_asked_for_goes_before_what_is_in_use_and_makes_nothing_be_written() {
    let ran = |prefetch_blocks| {
        let mut world = cold(ahead(prefetch_blocks));
        world.put(&hashes(200..208), 16 * KIB);
        world.core.check_invariants();
        let in_host = |numbers: std::ops::Range<u64>| {
            world
                .host
                .values()
                .filter(|hash| hashes(numbers.clone()).contains(hash))
                .count()
        };
        (
            world.core.statistics().demotions,
            in_host(2..6),
            in_host(200..208),
            world.core.statistics().prefetches,
        )
    };
    let (with, without) = (ran(4), ran(0));
    assert_eq!((with.3, without.3), (4, 0));
    assert!(with.0 <= without.0, "{} demotions, {} without", with.0, without.0);
    assert_eq!((with.2, without.2), (8, 8), "what is in use stays");
}

#[test]
fn who_wants_a_slot_takes_it_from_a_read_that_nobody_waits_for() {
    let mut world = World::new(ahead(8));
    world.put(&hashes(0..32), 16 * KIB);
    world.pass(1_000_000_000);
    world.put(&hashes(100..116), 16 * KIB);
    // The device does not answer: slots stay with what is being read.
    world.hold = |action| promotes(action) || matches!(action, Action::Demote { .. });
    let asked = world.fetch_later(&hashes(0..2));
    let begun = world.core.statistics().prefetches;
    assert!(begun > 0, "{begun}");
    let put = world.reserve_later(crate::world::ME, &hashes(300..308), 16 * KIB);
    world.core.check_invariants();
    world.let_go();
    assert!(
        world.reserved[&put]
            .iter()
            .all(|reserved| matches!(reserved, kvtier_core::Reserved::Granted { .. }))
    );
    assert!(world.fetched.contains_key(&asked));
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
    let before = world.core.statistics().promotions;
    // Under way when the generation is raised.
    world.hold = promotes;
    let asked = world.fetch_later(&hashes(6..8));
    assert!(
        world.held.iter().filter(|action| promotes(action)).count() > 2,
        "some are ahead"
    );
    world.invalidate();
    world.let_go();
    assert!(world.fetched.contains_key(&asked));
    assert_eq!(world.core.statistics().promotions, before, "none of them counts");
    world.generation = world.core.generation(world.namespace);
    world.put(&hashes(0..8), 16 * KIB);
    let found = world.fetch(&hashes(0..8));
    assert!(found.iter().all(|tier| *tier == Some(Tier::Host)), "{found:?}");
    assert_eq!(world.core.statistics().promotions, before);
    world.core.check_invariants();
}
