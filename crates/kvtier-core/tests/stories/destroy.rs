//! Destruction: what is not cached any more is overwritten, what is stays, and what could not be is said.

use crate::world::{DOMAIN, KIB, ME, OTHER, SECOND, World, extents, granted, hash, hashes, leases, name, settings};
use kvtier_core::{
    Action, BlockHash, Failure, FetchScope, ForgetScope, Generation, Parent, PurgeEvidence, Realization, SealItem,
    Sealed, SegmentId, Time,
};

const BLOCK: u32 = 8 * KIB;

fn new() -> World {
    World::new(settings(128 << 10, 1 << 20))
}

/// Invalidates, and goes on in the new generation.
fn raise(world: &mut World) {
    world.invalidate();
    // The sweep takes bounded steps.
    for _ in 0..40 {
        world.pass(SECOND / 500);
    }
    world.generation = world.core.generation(world.namespace);
}

/// Hashes of which bytes lie in host memory or on NVMe.
fn left(world: &World) -> Vec<BlockHash> {
    let mut left: Vec<BlockHash> = world.host.values().chain(world.nvme.values()).copied().collect();
    left.sort_unstable();
    left.dedup();
    left
}

fn items(granted: &[(kvtier_core::ReservationId, kvtier_core::Extent)], first: u64) -> Vec<SealItem> {
    let item = |(number, (reservation, extent)): (u64, &(kvtier_core::ReservationId, kvtier_core::Extent))| SealItem {
        reservation: *reservation,
        hash: hash(number),
        parent: Parent::Root,
        length: extent.length,
        tokens: 512,
    };
    (first..).zip(granted).map(item).collect()
}

#[test]
fn what_an_invalidation_left_behind_is_overwritten_everywhere() {
    let mut world = new();
    world.put(&hashes(0..6), BLOCK);
    world.flush();
    raise(&mut world);
    assert_eq!(left(&world).len(), 6, "hidden, and still there");
    let destroyed = world.destroy(0);
    let evidence = world.destroyed[&destroyed];
    assert_eq!(left(&world), []);
    assert!(evidence.host_slots >= 6 && evidence.host_bytes >= u64::from(6 * BLOCK));
    assert_eq!(
        (evidence.nvme_records, evidence.host_left, evidence.nvme_left),
        (6, 0, 0)
    );
    assert!(world.log.values().all(|segment| segment.records.is_empty()));
    world.core.check_invariants();
}

#[test]
fn survivors_stay_in_memory_and_on_the_device() {
    let mut world = new();
    let (other, generation) = world.core.open_namespace(DOMAIN, "other").unwrap();
    world.put(&hashes(0..4), BLOCK);
    let story = std::mem::replace(&mut world.namespace, other);
    let older = std::mem::replace(&mut world.generation, generation);
    world.put(&hashes(20..22), BLOCK);
    world.namespace = story;
    world.generation = older;
    world.flush();
    raise(&mut world);
    world.put(&hashes(10..13), BLOCK);
    world.flush();
    let destroyed = world.destroy(0);
    assert_eq!(world.destroyed[&destroyed].nvme_records, 4);
    assert_eq!(left(&world), hashes((10..13).chain(20..22)));
    assert_eq!(world.fetch(&hashes(10..13)).iter().flatten().count(), 3);
    let settings = settings(128 << 10, 1 << 20);
    let records: usize = world.log.values().map(|segment| segment.records.len()).sum();
    assert_eq!(records, 5, "three of this namespace and two of the other");
    let (mut world, _) = world.restart(settings);
    assert_eq!(world.present(0..30), [10, 11, 12]);
}

#[test]
fn the_end_of_a_slot_behind_a_block_is_zeroed_too() {
    let mut world = new();
    let slots = world.grant(ME, BLOCK, 1);
    world.write(&slots[0].1, hash(1));
    let mut items = items(&slots, 1);
    items[0].length = 5 * KIB;
    assert_eq!(world.seal(&items), [Sealed::Published]);
    world.hold = |action| name(action) == "zero";
    world.destroy(0);
    let ranges: Vec<_> = world
        .held
        .iter()
        .filter_map(|action| match action {
            Action::ZeroSegment { ranges, .. } => Some(ranges.clone()),
            _ => None,
        })
        .flatten()
        .collect();
    let start = slots[0].1.offset;
    let behind = start + u64::from(5 * KIB)..start + u64::from(BLOCK);
    assert!(
        ranges
            .iter()
            .any(|range| range.start <= behind.start && behind.end <= range.end),
        "{behind:?} is not in {ranges:?}"
    );
    assert!(
        !ranges.iter().any(|range| range.contains(&start)),
        "the block itself stays"
    );
    world.let_go();
    assert_eq!(world.present([1]), [1]);
    world.core.check_invariants();
}

#[test]
fn a_slot_that_is_being_zeroed_is_given_to_nobody() {
    let mut world = World::new(settings(64 << 10, 0));
    world.put(&hashes(0..8), BLOCK);
    raise(&mut world);
    world.hold = |action| name(action) == "zero";
    let destroyed = world.destroy(0);
    assert_eq!(
        world.core.grant(ME, BLOCK, 8, world.now),
        [],
        "all eight are being zeroed"
    );
    assert!(!world.destroyed.contains_key(&destroyed));
    world.let_go();
    assert!(world.destroyed.contains_key(&destroyed));
    assert_eq!(world.core.grant(ME, BLOCK, 8, world.now).len(), 8);
    world.core.check_invariants();
}

#[test]
fn a_held_slot_is_waited_for_and_zeroed_when_it_comes_free() {
    let mut world = new();
    world.put(&hashes(0..2), BLOCK);
    let held = world.fetch_as(ME, &hashes([0]), FetchScope::Prefix);
    raise(&mut world);
    let destroyed = world.destroy(SECOND);
    world.pass(SECOND / 2);
    assert!(!world.destroyed.contains_key(&destroyed));
    assert_eq!(left(&world), hashes([0]), "the other one is gone");
    world.core.release(ME, &leases(&held), world.now);
    world.run();
    assert_eq!(world.destroyed[&destroyed].host_left, 0);
    assert_eq!(left(&world), []);
    world.core.check_invariants();
}

#[test]
fn a_slot_held_for_longer_than_the_grace_is_said_to_be_left() {
    let mut world = new();
    world.put(&hashes(0..2), BLOCK);
    let held = world.fetch_as(ME, &hashes([0]), FetchScope::Prefix);
    raise(&mut world);
    let destroyed = world.destroy(SECOND);
    world.pass(SECOND + SECOND / 10);
    assert_eq!(world.destroyed[&destroyed].host_left, 1);
    assert_eq!(left(&world), hashes([0]));
    let extent = extents(&held)[0];
    assert!(
        world.host.contains_key(&(extent.segment, extent.offset)),
        "never under its reader"
    );
    world.core.release(ME, &leases(&held), world.now);
    world.run();
    let again = world.destroy(0);
    assert_eq!(world.destroyed[&again].host_left, 0);
    assert_eq!(left(&world), []);
    world.core.check_invariants();
}

#[test]
fn a_reservation_counts_as_held() {
    let mut world = new();
    let slots = world.grant(ME, BLOCK, 1);
    world.write(&slots[0].1, hash(7));
    let destroyed = world.destroy(SECOND);
    assert!(!world.destroyed.contains_key(&destroyed));
    assert_eq!(world.core.abandon(ME, &[slots[0].0], world.now), 0);
    world.run();
    assert_eq!(world.destroyed[&destroyed].host_left, 0);
    assert_eq!(left(&world), []);
}

#[test]
fn an_open_segment_is_filled_up_and_sealed_before_it_is_overwritten() {
    let mut world = new();
    world.put(&hashes(0..2), BLOCK);
    world.flush();
    raise(&mut world);
    world.hold = |action| name(action) == "seal";
    let destroyed = world.destroy(0);
    assert_eq!((world.held.len(), world.seen.get("erase")), (1, None));
    world.put(&hashes(50..52), BLOCK);
    world.core.flush(None, world.now);
    let into = |action: &Action| match action {
        Action::Demote { target, .. } => Some(target.segment),
        _ => None,
    };
    world.hold = |action| matches!(name(action), "seal" | "demote" | "sync");
    world.run();
    let Some(Action::SealSegment { segment, .. }) = world.held.first().cloned() else {
        panic!("it is being sealed")
    };
    let targets: Vec<SegmentId> = world.held.iter().filter_map(into).collect();
    assert!(
        targets.iter().all(|target| *target != segment),
        "nothing more comes into it"
    );
    world.let_go();
    assert_eq!(world.destroyed[&destroyed].nvme_records, 2);
    assert_eq!(left(&world), hashes(50..52));
    world.core.check_invariants();
}

#[test]
fn moves_in_flight_are_waited_for() {
    let mut world = new();
    world.put(&hashes(0..2), BLOCK);
    world.hold = |action| name(action) == "demote";
    world.flush();
    assert_eq!(world.held.len(), 2);
    raise(&mut world);
    let destroyed = world.destroy(0);
    world.pass(SECOND / 10);
    assert_eq!((world.seen.get("zero"), world.seen.get("erase")), (None, None));
    world.let_go();
    assert_eq!(world.destroyed[&destroyed].host_left, 0);
    assert_eq!(left(&world), [], "what the writes brought there is gone too");
}

#[test]
fn a_refused_overwriting_is_tried_again() {
    let mut world = new();
    world.put(&hashes(0..2), BLOCK);
    world.flush();
    raise(&mut world);
    world.fail = |action| matches!(action, Action::EraseRecords { .. }).then_some(Failure::Busy);
    let destroyed = world.destroy(0);
    world.pass(SECOND / 100);
    assert!(!world.destroyed.contains_key(&destroyed));
    world.fail = |_| None;
    world.pass(SECOND);
    let evidence = world.destroyed[&destroyed];
    assert_eq!((evidence.nvme_records, evidence.nvme_left), (2, 0));
    assert_eq!(left(&world), []);
}

#[test]
fn what_cannot_be_overwritten_is_said_to_be_left() {
    let mut world = new();
    world.put(&hashes(0..2), BLOCK);
    world.flush();
    raise(&mut world);
    world.fail = |action| matches!(action, Action::EraseRecords { .. }).then_some(Failure::Io);
    let destroyed = world.destroy(0);
    world.pass(600 * SECOND);
    let evidence = world.destroyed[&destroyed];
    assert_eq!((evidence.nvme_records, evidence.nvme_left), (0, 1));
    assert!(world.seen["erase"] >= 10, "{} attempts", world.seen["erase"]);
    world.fail = |_| None;
    world.pass(600 * SECOND);
    let again = world.destroy(0);
    world.pass(SECOND);
    assert_eq!(world.destroyed[&again].nvme_left, 0);
    assert_eq!(left(&world), []);
    world.core.check_invariants();
}

#[test]
fn a_block_read_while_its_segment_is_overwritten_keeps_its_record() {
    let mut world = new();
    world.put(&hashes(0..4), BLOCK);
    world.flush();
    world.delete(&hashes([3]));
    for round in 1..5 {
        world.put(&hashes(round * 100..round * 100 + 12), BLOCK);
    }
    world.hold = |action| name(action) == "erase";
    let destroyed = world.destroy(0);
    let fetched = world.fetch(&hashes(0..3));
    assert_eq!(fetched.iter().flatten().count(), 3);
    world.let_go();
    assert!(world.destroyed.contains_key(&destroyed));
    assert_eq!(world.fetch(&hashes(0..3)).iter().flatten().count(), 3);
    assert!(!left(&world).contains(&hash(3)));
    world.core.check_invariants();
}

#[test]
fn destructions_run_one_after_another() {
    let mut world = new();
    world.put(&hashes(0..2), BLOCK);
    raise(&mut world);
    world.hold = |action| name(action) == "zero";
    let (first, second) = (world.destroy(0), world.destroy(0));
    assert_eq!(world.held.len(), 1);
    let zero = world.held.remove(0);
    world.answer(&zero);
    world.run();
    assert!(world.destroyed.contains_key(&first) && !world.destroyed.contains_key(&second));
    world.let_go();
    assert!(world.destroyed.contains_key(&second));
}

#[test]
fn without_nvme_destroying_and_forgetting_end() {
    let mut world = World::new(settings(128 << 10, 0));
    world.put(&hashes(0..4), BLOCK);
    let forgotten = world.forget_scope(&ForgetScope::Hashes(&hashes([2])));
    assert_eq!(world.forgotten[&forgotten], 2, "and the one behind it");
    let destroyed = world.destroy(0);
    assert_eq!(
        world.destroyed[&destroyed],
        PurgeEvidence {
            host_slots: world.destroyed[&destroyed].host_slots,
            host_bytes: world.destroyed[&destroyed].host_bytes,
            ..PurgeEvidence::default()
        }
    );
    assert_eq!(left(&world), hashes(0..2));
}

#[test]
fn forgetting_hashes_takes_all_that_extends_them_and_nothing_else() {
    let mut world = new();
    world.put(&hashes(0..4), BLOCK);
    world.put_after(Parent::Block(hash(1)), &hashes(10..12), BLOCK);
    world.put(&hashes(20..22), BLOCK);
    let forgotten = world.forget_scope(&ForgetScope::Hashes(&hashes([1, 99])));
    assert_eq!(world.forgotten[&forgotten], 5);
    assert_eq!(world.present(0..30), [0, 20, 21]);
    world.core.check_invariants();
}

#[test]
fn forgetting_a_realization_leaves_the_others() {
    let mut world = new();
    world.put(&hashes(0..3), BLOCK);
    let first = world.realization;
    world.realization = world
        .core
        .open_realization(Realization::digest(&[("model", "n")]))
        .unwrap();
    world.put(&hashes(0..3), BLOCK);
    let forgotten = world.forget_scope(&ForgetScope::Realization(first));
    assert_eq!(world.forgotten[&forgotten], 3);
    assert_eq!(world.present(0..3), [0, 1, 2]);
    world.realization = first;
    assert_eq!(world.present(0..3), []);
}

#[test]
fn writers_that_began_before_are_refused_and_those_after_are_not() {
    let mut world = new();
    world.core.connect(OTHER, DOMAIN, world.now).unwrap();
    let reserved = granted(&world.reserve_as(ME, &hashes(1..3), BLOCK));
    let ahead = world.grant(ME, BLOCK, 1);
    let (other, generation) = world.core.open_namespace(DOMAIN, "other").unwrap();
    let elsewhere = std::mem::replace(&mut world.namespace, other);
    let unconcerned = granted(&world.reserve_as(ME, &hashes([30]), BLOCK));
    world.namespace = elsewhere;
    world.forget_scope(&ForgetScope::Hashes(&hashes([77])));
    assert_eq!(world.seal(&items(&reserved, 1)), [Sealed::Stale; 2]);
    assert_eq!(world.seal(&items(&ahead, 5)), [Sealed::Stale]);
    world.namespace = other;
    world.generation = generation;
    for (_, extent) in &unconcerned {
        world.write(extent, hash(30));
    }
    assert_eq!(world.seal(&items(&unconcerned, 30)), [Sealed::Published]);
    world.namespace = elsewhere;
    world.generation = world.core.generation(elsewhere);
    assert_eq!(world.put(&hashes(1..3), BLOCK), [Sealed::Published; 2]);
    world.core.check_invariants();
}

#[test]
fn a_reserve_that_waited_meanwhile_began_before() {
    let mut world = World::new(settings(64 << 10, 0));
    let all = world.grant(ME, BLOCK, 8);
    assert_eq!(all.len(), 8);
    let waiting = world.reserve_later(ME, &hashes([1]), BLOCK);
    world.forget_scope(&ForgetScope::Hashes(&hashes([1])));
    world.core.abandon(ME, &[all[0].0], world.now);
    world.run();
    let slots = granted(&world.reserved.remove(&waiting).expect("it has a slot now"));
    world.write(&slots[0].1, hash(1));
    assert_eq!(world.seal(&items(&slots, 1)), [Sealed::Stale]);
    assert_eq!(world.put(&hashes([1]), BLOCK), [Sealed::Published]);
    world.core.check_invariants();
}

#[test]
fn a_promotion_of_a_forgotten_block_is_a_miss() {
    let mut world = new();
    world.put(&hashes([1]), BLOCK);
    world.flush();
    let (mut world, _) = world.restart(settings(128 << 10, 1 << 20));
    world.hold = |action| name(action) == "promote";
    let fetch = world.fetch_later(&hashes([1]));
    world.forget_scope(&ForgetScope::Hashes(&hashes([1])));
    world.let_go();
    assert_eq!(world.fetched.remove(&fetch), Some(vec![kvtier_core::Fetched::Miss]));
    let destroyed = world.destroy(0);
    assert_eq!(world.destroyed[&destroyed].nvme_left, 0);
    assert_eq!(left(&world), []);
}

#[test]
fn forgetting_is_acknowledged_after_a_sync_that_was_asked_for_later() {
    let mut world = new();
    world.put(&hashes(0..2), BLOCK);
    world.hold = |action| name(action) == "sync";
    world.flush();
    assert_eq!(world.held.len(), 1, "the flush's own");
    let forgotten = world.forget_scope(&ForgetScope::Hashes(&hashes([1])));
    assert_eq!(world.present(0..2), [0], "gone at once");
    let sync = world.held.remove(0);
    world.answer(&sync);
    world.run();
    assert!(
        !world.forgotten.contains_key(&forgotten),
        "that one was asked for too early"
    );
    world.fail = |action| matches!(action, Action::SyncTier { .. }).then_some(Failure::Io);
    let sync = world.held.remove(0);
    world.answer(&sync);
    world.fail = |_| None;
    world.pass(SECOND);
    assert!(!world.forgotten.contains_key(&forgotten), "that one failed");
    world.let_go();
    world.pass(SECOND);
    assert_eq!(world.forgotten[&forgotten], 1);
}

#[test]
fn after_forgetting_and_destroying_no_restart_brings_a_block_back() {
    let mut world = new();
    world.put(&hashes(0..3), BLOCK);
    world.flush();
    let forgotten = world.forget_scope(&ForgetScope::Hashes(&hashes([1])));
    let destroyed = world.destroy(0);
    assert_eq!(world.forgotten[&forgotten], 2);
    assert_eq!(world.destroyed[&destroyed].nvme_left, 0);
    assert_eq!(left(&world), hashes([0]));
    let (mut world, restored) = world.restart(settings(128 << 10, 1 << 20));
    assert_eq!((restored.blocks, world.present(0..3)), (1, vec![0]));
}

#[test]
fn orphans_of_a_deletion_cut_short_are_forgotten_by_who_goes_on_with_it() {
    let mut world = new();
    world.put(&hashes(0..4), BLOCK);
    world.put(&hashes(20..22), BLOCK);
    world.flush();
    // Of the deletion of 1 and all behind it, only 1's own got to the device.
    for segment in world.log.values_mut() {
        segment.records.retain(|record| record.label.hash != hash(1));
    }
    let (mut world, _) = world.restart(settings(128 << 10, 1 << 20));
    assert_eq!(world.present(0..30), [0, 2, 3, 20, 21]);
    let nothing = world.forget_scope(&ForgetScope::Hashes(&hashes([1])));
    assert_eq!(world.forgotten[&nothing], 0, "nothing is known to extend it");
    let forgotten = world.forget_scope(&ForgetScope::Orphans);
    assert_eq!(world.forgotten[&forgotten], 2);
    assert_eq!(world.present(0..30), [0, 20, 21]);
    world.core.check_invariants();
}

#[test]
fn a_namespace_that_was_never_written_to_is_destroyed_at_once() {
    let mut world = new();
    let destroyed = world.destroy(SECOND);
    assert_eq!(world.destroyed[&destroyed], PurgeEvidence::default());
    assert_eq!((world.generation, world.now), (Generation(1), Time(SECOND)));
}
