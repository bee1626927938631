//! Copies in device memory: for callers that can read them, of blocks that are used again, and never the only ones.

use crate::world::{DOMAIN, KIB, ME, OTHER, SECOND, STRANGER, World, hash, hashes, leases, name, settings};
use kvtier_core::{
    Action, BlockHash, CoreSettings, Departure, Failure, FetchScope, Fetched, Generation, Tier, TrustDomain,
};

const BLOCK: u32 = 8 * KIB;
const HBM: Option<Tier> = Some(Tier::Hbm);
const HOST: Option<Tier> = Some(Tier::Host);

/// Eight slots of host memory to a segment, four of device memory.
fn with(hbm_bytes: u64) -> CoreSettings {
    CoreSettings {
        hbm_bytes,
        hbm_segment_bytes: 32 << 10,
        ..settings(256 << 10, 1 << 20)
    }
}

fn new(hbm_bytes: u64) -> World {
    let mut world = World::new(with(hbm_bytes));
    world.device = true;
    world
}

/// Fetches until nothing more goes to the device.
fn warm(world: &mut World, numbers: impl IntoIterator<Item = u64>) {
    let numbers: Vec<u64> = numbers.into_iter().collect();
    for _ in 0..3 {
        for &number in &numbers {
            world.fetch(&hashes([number]));
        }
    }
}

fn bytes(world: &World) -> Vec<BlockHash> {
    world.hbm.values().copied().collect()
}

fn hold_fetch(world: &mut World, number: u64) -> Vec<Fetched> {
    world.fetch_as(ME, &hashes([number]), FetchScope::Prefix)
}

fn raise(world: &mut World) {
    world.invalidate();
    for _ in 0..40 {
        world.pass(SECOND / 500);
    }
    world.generation = world.core.generation(world.namespace);
}

#[test]
fn a_block_that_is_fetched_again_is_copied_and_read_there() {
    let mut world = new(64 << 10);
    world.put(&hashes([1]), BLOCK);
    assert_eq!(world.fetch(&hashes([1])), [HOST]);
    assert_eq!(world.hbm.len(), 0, "one use is no reason");
    // The first to ask finds no memory, which is opened then.
    world.fetch(&hashes([1]));
    assert_eq!(world.fetch(&hashes([1])), [HOST]);
    assert_eq!(world.fetch(&hashes([1])), [HBM]);
    assert_eq!(world.lookup(&hashes([1])), [HBM]);
    let statistics = world.core.statistics();
    assert_eq!(
        (
            statistics.hbm_blocks,
            statistics.hbm_promotions,
            statistics.fetch_hits_hbm
        ),
        (1, 1, 1)
    );
    assert_eq!(
        (statistics.hbm_used_bytes, statistics.hbm_segments),
        (u64::from(BLOCK), 1)
    );
    world.core.check_invariants();
}

#[test]
fn who_cannot_read_device_memory_is_given_none() {
    let mut world = new(64 << 10);
    world.put(&hashes([1]), BLOCK);
    warm(&mut world, [1]);
    world.device = false;
    assert_eq!(world.fetch(&hashes([1])), [HOST]);
    assert_eq!(world.lookup(&hashes([1])), [HOST]);
    let mut world = World::new(with(64 << 10));
    world.put(&hashes([1]), BLOCK);
    warm(&mut world, [1]);
    assert_eq!(world.seen.get("promote to hbm"), None, "nobody could read it");
}

#[test]
fn a_copy_outlives_the_host_copy_but_not_the_block() {
    let mut world = new(64 << 10);
    world.put(&hashes([1]), BLOCK);
    world.flush();
    warm(&mut world, [1]);
    // The host copy makes room: the block is on NVMe and on the device.
    world.put(&hashes(100..140), BLOCK);
    world.device = false;
    assert_eq!(world.lookup(&hashes([1])), [Some(Tier::Nvme)]);
    world.device = true;
    assert_eq!(world.fetch(&hashes([1])), [HBM]);
    assert_eq!(
        world.core.statistics().promotions,
        0,
        "nothing is read from NVMe for it"
    );
    assert_eq!(world.delete(&hashes([1])), [true]);
    assert_eq!(world.fetch(&hashes([1])), [None]);
    assert_eq!(world.core.statistics().hbm_blocks, 0);
    world.core.check_invariants();
}

#[test]
fn an_older_generation_is_not_read_there() {
    let mut world = new(64 << 10);
    world.put(&hashes([1]), BLOCK);
    warm(&mut world, [1]);
    world.invalidate();
    assert_eq!(world.fetch(&hashes([1])), [None], "before anything was swept");
    raise(&mut world);
    world.put(&hashes([1]), BLOCK);
    assert_eq!(world.fetch(&hashes([1])), [HOST]);
    world.core.check_invariants();
}

#[test]
fn the_copy_used_longest_ago_makes_room_and_one_that_is_held_does_not() {
    let mut world = new(32 << 10);
    world.put(&hashes(0..6), BLOCK);
    warm(&mut world, 0..4);
    let held = hold_fetch(&mut world, 0);
    assert!(matches!(held[0], Fetched::Leased { tier: Tier::Hbm, .. }));
    world.fetch(&hashes([1]));
    warm(&mut world, [4]);
    assert_eq!(world.fetch(&hashes([4])), [HBM]);
    assert_eq!(world.lookup(&hashes(0..4)), [HBM, HBM, HOST, HBM]);
    warm(&mut world, [5, 2, 3]);
    assert_eq!(world.lookup(&hashes([0])), [HBM], "it is held");
    assert_eq!(world.check_and_release(&hashes([0]), &held), [HBM]);
    assert_eq!(world.core.statistics().evictions_hbm, 4);
    world.core.check_invariants();
}

#[test]
fn a_slot_that_somebody_holds_is_not_written_although_its_block_is_gone() {
    let mut world = new(32 << 10);
    world.put(&hashes(0..6), BLOCK);
    warm(&mut world, 0..4);
    let held = hold_fetch(&mut world, 0);
    world.delete(&hashes([0]));
    warm(&mut world, [4, 5]);
    // The bytes are where they were.
    assert_eq!(world.check_and_release(&hashes([0]), &held), [HBM]);
    world.core.check_invariants();
    warm(&mut world, [4, 5]);
    assert_eq!(world.lookup(&hashes([4, 5])), [HBM, HBM]);
}

#[test]
fn a_lease_that_expired_keeps_the_slot_until_its_holder_is_gone() {
    let mut world = new(32 << 10);
    world.put(&hashes(0..6), BLOCK);
    warm(&mut world, 0..4);
    world.core.connect(OTHER, DOMAIN, world.now).unwrap();
    let held = world.fetch_as(OTHER, &hashes([0]), FetchScope::Prefix);
    assert_eq!(leases(&held).len(), 1);
    world.delete(&hashes([0]));
    world.leave(OTHER, Departure::Alive);
    world.pass(60 * SECOND);
    warm(&mut world, 1..6);
    assert!(bytes(&world).contains(&hash(0)), "its process may still read");
    assert_eq!(world.core.statistics().quarantined_bytes, u64::from(BLOCK));
    world.leave(OTHER, Departure::Gone);
    warm(&mut world, 1..6);
    assert!(!bytes(&world).contains(&hash(0)));
    assert_eq!(world.core.statistics().quarantined_bytes, 0);
    world.core.check_invariants();
}

#[test]
fn domains_have_segments_of_their_own_and_take_those_that_nobody_uses() {
    let mut world = new(32 << 10);
    world.put(&hashes(0..4), BLOCK);
    warm(&mut world, 0..4);
    let mine = world.namespace;
    let (theirs, generation) = world.core.open_namespace(TrustDomain(9), "theirs").unwrap();
    world.core.connect(STRANGER, TrustDomain(9), world.now).unwrap();
    let first = std::mem::replace(&mut world.generation, generation);
    world.namespace = theirs;
    // Their block, put and fetched by them.
    let granted = world.grant(STRANGER, BLOCK, 1);
    world.write(&granted[0].1, hash(50));
    let items = [kvtier_core::SealItem {
        reservation: granted[0].0,
        hash: hash(50),
        parent: kvtier_core::Parent::Root,
        length: BLOCK,
        tokens: 512,
    }];
    let request = world.seal_request(STRANGER, &items);
    world.core.seal(&request, world.now).unwrap();
    world.run();
    let ask = |world: &mut World| {
        let results = world.fetch_as(STRANGER, &hashes([50]), FetchScope::Prefix);
        world.core.release(STRANGER, &leases(&results), world.now);
        world.run();
        matches!(results[0], Fetched::Leased { tier: Tier::Hbm, .. })
    };
    for _ in 0..4 {
        assert!(!ask(&mut world), "the memory is somebody else's, who used it just now");
    }
    for _ in 0..8 {
        ask(&mut world);
    }
    assert!(ask(&mut world), "nobody else used it meanwhile");
    world.namespace = mine;
    world.generation = first;
    assert_eq!(world.lookup(&hashes(0..4)), [HOST; 4]);
    assert_eq!(bytes(&world), hashes([50]), "their memory is not ours with other bytes");
    world.core.check_invariants();
}

#[test]
fn a_device_without_memory_costs_nothing_but_the_copies() {
    let mut world = new(64 << 10);
    world.put(&hashes(0..3), BLOCK);
    world.fail = |action| {
        let is_hbm = matches!(action, Action::OpenSegment { tier: Tier::Hbm, .. });
        is_hbm.then_some(Failure::Full)
    };
    warm(&mut world, 0..3);
    assert_eq!(world.fetch(&hashes([0])), [HOST]);
    let statistics = world.core.statistics();
    assert_eq!(
        (statistics.hbm_segments, statistics.hbm_errors),
        (0, 1),
        "it is not asked at each fetch"
    );
    world.fail = |_| None;
    world.pass(2 * SECOND);
    warm(&mut world, 0..3);
    assert_eq!(world.fetch(&hashes([0])), [HBM]);
    world.core.check_invariants();
}

#[test]
fn a_failed_copy_is_no_copy_and_a_device_that_fails_again_is_given_up() {
    let mut world = new(64 << 10);
    world.put(&hashes(0..8), BLOCK);
    warm(&mut world, [0]);
    world.fail = |action| (name(action) == "promote to hbm").then_some(Failure::Io);
    for number in 1..4 {
        warm(&mut world, [number]);
        assert_eq!(world.fetch(&hashes([number])), [HOST]);
    }
    let statistics = world.core.statistics();
    assert_eq!(
        (statistics.hbm_errors, statistics.hbm_blocks),
        (3, 0),
        "nobody knows what became of the rest"
    );
    world.fail = |_| None;
    warm(&mut world, [5]);
    assert_eq!(world.fetch(&hashes([5])), [HOST], "for a while");
    world.pass(2 * SECOND);
    warm(&mut world, [5]);
    assert_eq!(world.fetch(&hashes([5])), [HBM]);
    world.core.check_invariants();
}

#[test]
fn a_copy_in_flight_holds_both_its_sides_and_is_nobodys_once_its_block_is_gone() {
    let mut world = new(64 << 10);
    world.put(&hashes(0..8), BLOCK);
    warm(&mut world, [7]);
    world.hold = |action| name(action) == "promote to hbm";
    warm(&mut world, [0]);
    assert_eq!(world.held.len(), 1, "once, however often it is fetched");
    world.delete(&hashes([0]));
    world.core.check_invariants();
    // Neither its slot in host memory nor the one on the device is given out.
    world.put(&hashes(100..140), BLOCK);
    world.core.check_invariants();
    world.let_go();
    world.put(&hashes([0]), BLOCK);
    assert_eq!(world.fetch(&hashes([0])), [HOST]);
    world.core.check_invariants();
}

#[test]
fn a_destruction_zeroes_what_lies_on_the_device_and_says_so() {
    let mut world = new(64 << 10);
    let (other, generation) = world.core.open_namespace(DOMAIN, "other").unwrap();
    world.put(&hashes(0..3), BLOCK);
    warm(&mut world, 0..3);
    let story = std::mem::replace(&mut world.namespace, other);
    let older = std::mem::replace(&mut world.generation, generation);
    world.put(&hashes([20]), BLOCK);
    warm(&mut world, [20]);
    world.namespace = story;
    world.generation = older;
    raise(&mut world);
    assert_eq!(bytes(&world).len(), 4, "hidden, and still there");
    let destroyed = world.destroy(0);
    let evidence = world.destroyed[&destroyed];
    assert_eq!(bytes(&world), hashes([20]), "another namespace's stays");
    assert_eq!(
        (evidence.hbm_slots, evidence.hbm_bytes, evidence.hbm_left),
        (3, u64::from(3 * BLOCK), 0)
    );
    world.namespace = other;
    world.generation = Generation(generation.0);
    assert_eq!(world.fetch(&hashes([20])), [HBM]);
    world.core.check_invariants();
}

#[test]
fn a_destruction_waits_for_holders_of_device_memory_and_then_counts_them() {
    let mut world = new(64 << 10);
    world.put(&hashes(0..2), BLOCK);
    warm(&mut world, 0..2);
    let held = hold_fetch(&mut world, 0);
    raise(&mut world);
    let patient = world.destroy(10 * SECOND);
    assert!(!world.destroyed.contains_key(&patient));
    assert_eq!(bytes(&world), hashes([0]), "only what is held is left");
    world.core.release(ME, &leases(&held), world.now);
    world.run();
    let evidence = world.destroyed[&patient];
    assert_eq!((evidence.hbm_slots, evidence.hbm_left), (2, 0));
    assert_eq!(bytes(&world), []);

    world.put(&hashes(0..2), BLOCK);
    warm(&mut world, 0..2);
    hold_fetch(&mut world, 0);
    raise(&mut world);
    let hasty = world.destroy(SECOND);
    world.pass(2 * SECOND);
    let evidence = world.destroyed[&hasty];
    assert_eq!((evidence.hbm_slots, evidence.hbm_left), (1, 1));
    world.core.check_invariants();
}

/// Refuses to zero device memory, and to close it where `closing` is refused too.
fn refuse_to_zero(action: &Action) -> Option<Failure> {
    let is_zero = matches!(action, Action::ZeroSegment { tier: Tier::Hbm, .. });
    is_zero.then_some(Failure::Io)
}

#[test]
fn what_cannot_be_zeroed_goes_with_its_segment() {
    let mut world = new(64 << 10);
    world.put(&hashes(0..2), BLOCK);
    warm(&mut world, 0..2);
    raise(&mut world);
    world.fail = refuse_to_zero;
    let destroyed = world.destroy(SECOND);
    let evidence = world.destroyed[&destroyed];
    assert_eq!((evidence.hbm_slots, evidence.hbm_left), (2, 0));
    assert_eq!(bytes(&world), [], "the segment went, with all that lay in it");
    assert_eq!(world.core.statistics().hbm_segments, 0);
    world.core.check_invariants();
}

#[test]
fn what_can_neither_be_zeroed_nor_closed_is_counted_as_left_once_the_grace_is_over() {
    let mut world = new(64 << 10);
    world.put(&hashes(0..2), BLOCK);
    warm(&mut world, 0..2);
    raise(&mut world);
    world.fail = |action| {
        let is_close = matches!(action, Action::CloseSegment { tier: Tier::Hbm, .. });
        refuse_to_zero(action).or(is_close.then_some(Failure::Io))
    };
    let destroyed = world.destroy(SECOND);
    assert!(!world.destroyed.contains_key(&destroyed));
    world.pass(2 * SECOND);
    let evidence = world.destroyed[&destroyed];
    assert_eq!(
        (evidence.hbm_slots, evidence.hbm_left),
        (0, 2),
        "two of four slots were used"
    );
    world.fail = |_| None;
    world.pass(30 * SECOND);
    assert_eq!(world.core.statistics().hbm_segments, 0, "it is tried again");
    world.core.check_invariants();
}

#[test]
fn a_device_that_hangs_holds_no_purge_up_for_ever() {
    let mut world = new(64 << 10);
    world.put(&hashes(0..3), BLOCK);
    warm(&mut world, 0..2);
    // A copy that never ends, and zeroes that never come.
    world.hold = |action| matches!(name(action), "promote to hbm" | "zero");
    warm(&mut world, [2]);
    world.hold = |action| {
        let is_zero = matches!(action, Action::ZeroSegment { tier: Tier::Hbm, .. });
        is_zero || name(action) == "promote to hbm"
    };
    raise(&mut world);
    let destroyed = world.destroy(SECOND);
    assert!(!world.destroyed.contains_key(&destroyed));
    world.pass(30 * SECOND);
    let evidence = world.destroyed[&destroyed];
    assert_eq!((evidence.hbm_slots, evidence.hbm_left), (0, 3));
    assert!(evidence.host_left > 0, "the copy still reads its source");
    world.core.check_invariants();
    world.let_go();
    world.core.check_invariants();
    let again = world.destroy(SECOND);
    assert_eq!(world.destroyed[&again].hbm_left, 0);
    assert_eq!(bytes(&world), []);
}

#[test]
fn a_purge_ends_although_others_go_on_using_the_tier() {
    let mut world = new(64 << 10);
    world.put(&hashes(0..2), BLOCK);
    warm(&mut world, 0..2);
    raise(&mut world);
    world.put(&hashes(10..20), BLOCK);
    // A copy of a live block is under way all the time.
    world.hold = |action| name(action) == "promote to hbm";
    warm(&mut world, [10]);
    let destroyed = world.destroy(10 * SECOND);
    assert!(
        !world.destroyed.contains_key(&destroyed),
        "its slot may have been a purged block's"
    );
    for number in 11..15 {
        let first = world.held.remove(0);
        warm(&mut world, [number]);
        world.answer(&first);
        world.run();
    }
    let evidence = world.destroyed[&destroyed];
    assert_eq!(evidence.hbm_left, 0, "what began later is not waited for");
    world.let_go();
    assert_eq!(
        bytes(&world).iter().filter(|hash| hashes(0..2).contains(hash)).count(),
        0
    );
    world.core.check_invariants();
}

#[test]
fn a_block_whose_bytes_are_bad_is_forgotten_and_nobody_else_pays() {
    let mut world = new(64 << 10);
    world.put(&hashes(0..8), BLOCK);
    warm(&mut world, [0]);
    world.fail = |action| (name(action) == "promote to hbm").then_some(Failure::Corrupt);
    for number in 1..6 {
        warm(&mut world, [number]);
        assert_eq!(
            world.fetch(&hashes([number])),
            [None],
            "host memory does not hold what was put"
        );
    }
    world.fail = |_| None;
    assert_eq!(world.fetch(&hashes([0])), [HBM], "the device did nothing wrong");
    assert_eq!(world.core.statistics().corrupt, 5);
    world.core.check_invariants();
}

#[test]
fn a_fetch_does_not_take_the_room_of_what_it_finds() {
    let mut world = new(32 << 10);
    world.put(&hashes(0..5), BLOCK);
    world.flush();
    warm(&mut world, 1..5);
    // The first is in host memory only and would take the slot of the one used longest ago, which this fetch wants as well.
    world.fetch(&hashes([0]));
    assert_eq!(world.fetch(&hashes(0..5)), [HOST, HBM, HBM, HBM, HBM]);
    world.core.check_invariants();
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let refused = |settings: CoreSettings| settings.check().unwrap_err().field;
    assert_eq!(refused(with(16 << 10)), "hbm_bytes");
    let odd = CoreSettings {
        hbm_segment_bytes: 5000,
        ..with(64 << 10)
    };
    assert_eq!(refused(odd), "hbm_segment_bytes");
    let none = CoreSettings {
        hbm_promotions_in_flight_max: 0,
        ..with(64 << 10)
    };
    assert_eq!(refused(none), "hbm_promotions_in_flight_max");
}
