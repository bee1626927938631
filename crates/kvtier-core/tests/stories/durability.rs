//! Durability: what is acknowledged is durable first, whatever the order in which devices answer.

use crate::world::{KIB, SECOND, World, hash, hashes, name, settings};
use kvtier_core::{Action, Failure, Parent};

const BLOCK: u32 = 8 * KIB;

/// A world in which block 7 was just copied to another segment.
fn moved() -> World {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    world.put(&hashes([7]), BLOCK);
    world.pass(SECOND);
    world.put(&hashes(9000..9020), BLOCK);
    world.hold = |action| name(action) == "relocate";
    for round in 1..60 {
        world.put_after(Parent::Block(hash(7)), &hashes(round * 10..round * 10 + 4), BLOCK);
        if world
            .held
            .iter()
            .any(|action| matches!(action, Action::Relocate { label, .. } if label.hash == hash(7)))
        {
            world.hold = |action| name(action) == "sync";
            for action in std::mem::take(&mut world.held) {
                world.answer(&action);
            }
            world.run();
            return world;
        }
    }
    panic!("it was never moved");
}

/// Records of block 7 that a restart would find.
fn copies(world: &World) -> usize {
    let records = world.log.values().flat_map(|segment| &segment.records);
    records.filter(|record| record.label.hash == hash(7)).count()
}

#[test]
fn a_segment_whose_records_were_copied_is_closed_after_a_sync() {
    let mut world = moved();
    for round in 100..110 {
        world.put_after(Parent::Block(hash(7)), &hashes(round * 10..round * 10 + 4), BLOCK);
    }
    assert_eq!(world.held.len(), 1, "one sync is asked for");
    assert_eq!(copies(&world), 2);
    world.let_go();
    assert_eq!(copies(&world), 1);
    assert_eq!(world.present([7]), [7]);
    world.core.check_invariants();
}

#[test]
fn a_sync_that_fails_is_asked_for_again_before_the_segment_is_closed() {
    let mut world = moved();
    world.fail = |action| matches!(action, Action::SyncTier { .. }).then_some(Failure::Busy);
    world.let_go();
    world.pass(SECOND / 100);
    assert_eq!(copies(&world), 2);
    world.fail = |_| None;
    world.pass(SECOND);
    assert_eq!(copies(&world), 1);
    world.core.check_invariants();
}

#[test]
fn a_flush_during_a_sync_waits_for_one_that_covers_its_writes() {
    let mut world = moved();
    for round in 100..110 {
        world.put_after(Parent::Block(hash(7)), &hashes(round * 10..round * 10 + 4), BLOCK);
    }
    let flush = world.flush();
    let syncs = world.seen["sync"];
    assert_eq!(world.held.len(), 1, "a sync is under way");
    assert!(!world.flushed.contains_key(&flush));
    let sync = world.held.remove(0);
    world.answer(&sync);
    world.run();
    assert!(
        !world.flushed.contains_key(&flush),
        "the first one was asked for too early"
    );
    assert_eq!(world.seen["sync"], syncs + 1);
    world.let_go();
    assert_eq!(world.flushed[&flush].1, 0);
}

#[test]
fn nothing_of_a_generation_is_written_before_it_is_on_record() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    world.hold = |action| name(action) == "record";
    world.invalidate();
    world.generation = world.core.generation(world.namespace);
    world.put(&hashes(0..10), BLOCK);
    let flush = world.flush();
    assert_eq!(world.seen.get("demote"), None);
    assert!(!world.flushed.contains_key(&flush));
    world.let_go();
    assert_eq!(world.flushed[&flush], (10, 0));
}

#[test]
fn where_a_generation_cannot_be_recorded_room_is_made_by_forgetting() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    world.fail = |action| matches!(action, Action::RecordGeneration { .. }).then_some(Failure::Io);
    world.invalidate();
    world.generation = world.core.generation(world.namespace);
    for round in 0..10 {
        world.put(&hashes(round * 10..round * 10 + 4), BLOCK);
    }
    assert_eq!(world.present(90..94), [90, 91, 92, 93]);
    let flush = world.flush();
    let (written, left_out) = world.flushed[&flush];
    assert!(written == 0 && left_out > 0);
    assert_eq!(world.seen.get("demote"), None);
    world.core.check_invariants();
}
