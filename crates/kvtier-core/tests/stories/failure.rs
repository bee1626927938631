//! Failures: a device that refuses, errs, lies or never answers costs hits, never bytes.

use crate::world::{KIB, ME, SECOND, World, answered, hashes, name, settings};
use kvtier_core::{Action, Completion, Event, Failure, Fetched, Sealed, Tier, Time};

/// Host memory of sixteen blocks over a roomy NVMe tier, with eight chains of four put.
fn filled() -> World {
    let mut world = World::new(settings(256 << 10, 4 << 20));
    for chain in 0..8 {
        world.put(&hashes(chain * 10..chain * 10 + 4), 16 * KIB);
    }
    world
}

#[test]
fn a_block_whose_demotion_fails_stays_in_host_memory() {
    let mut world = World::new(settings(256 << 10, 4 << 20));
    world.fail = |action| (name(action) == "demote").then_some(Failure::Busy);
    world.put(&hashes(0..16), 16 * KIB);
    world.pass(SECOND / 10);
    let statistics = world.core.statistics();
    assert_eq!((statistics.host_blocks, statistics.nvme_blocks), (16, 0));
    assert!(world.seen["demote"] > 1, "it is tried again");
    world.fail = |_| None;
    assert_eq!(world.put(&hashes(100..104), 16 * KIB), [Sealed::Published; 4]);
    assert_eq!(world.present(0..16).len(), 16);
    world.core.check_invariants();
}

#[test]
fn a_corrupt_copy_is_a_miss_and_is_not_read_again() {
    let mut world = filled();
    world.fail = |action| (name(action) == "promote").then_some(Failure::Corrupt);
    assert_eq!(world.fetch(&hashes([0])), [None]);
    assert_eq!(world.core.statistics().corrupt, 1);
    assert_eq!(world.present([0]), []);
    assert_eq!(
        world.core.statistics().nvme_in_service,
        1,
        "one bad record is no bad device"
    );
    world.core.check_invariants();
}

#[test]
fn errors_in_a_row_take_the_tier_out_of_service_and_it_comes_back() {
    let mut world = filled();
    world.fail = |action| (name(action) == "promote").then_some(Failure::Io);
    for number in 0..3 {
        assert_eq!(world.fetch(&hashes([number])), [None]);
        world.pass(SECOND / 10);
    }
    assert_eq!(world.core.statistics().nvme_in_service, 0);
    assert_eq!(world.fetch(&hashes([0])), [None]);
    // Without it host memory serves alone: the oldest are forgotten.
    assert_eq!(world.put(&hashes(100..108), 16 * KIB), [Sealed::Published; 8]);
    world.fail = |_| None;
    world.pass(2 * SECOND);
    assert_eq!(world.core.statistics().nvme_in_service, 1);
    assert_eq!(
        world.fetch(&hashes([0])),
        [Some(Tier::Nvme)],
        "its records are still good"
    );
    world.core.check_invariants();
}

#[test]
fn each_further_time_out_of_service_is_longer() {
    let mut world = filled();
    world.fail = |action| (name(action) == "promote").then_some(Failure::Io);
    let mut lengths = Vec::new();
    for _ in 0..4 {
        while world.core.statistics().nvme_in_service == 1 {
            world.fetch(&hashes([0]));
            world.pass(SECOND / 100);
        }
        let left = world.now;
        while world.core.statistics().nvme_in_service == 0 {
            world.pass(SECOND / 10);
        }
        lengths.push(world.now.since(left).as_secs());
    }
    assert!(
        lengths.is_sorted() && lengths[3] >= 4 * lengths[0].max(1),
        "{lengths:?}"
    );
}

#[test]
fn an_operation_that_is_never_answered_resets_the_tier_once() {
    let mut world = filled();
    world.hold = |action| matches!(name(action), "promote" | "reset");
    let operation = world.fetch_later(&hashes([0]));
    world.pass(9 * SECOND);
    assert_eq!(
        world.fetched[&operation],
        [Fetched::Miss],
        "the client did not wait for it"
    );
    assert_eq!(world.core.statistics().resets, 0);
    world.pass(2 * SECOND);
    assert_eq!(
        (world.core.statistics().resets, world.core.statistics().nvme_in_service),
        (1, 0)
    );
    let promotion = world.held.remove(0);
    let used = world.core.statistics().host_used_bytes;
    world.let_go();
    assert_eq!(
        world.core.statistics().host_used_bytes,
        used - (16 << 10),
        "now its slot is free"
    );
    let late = Event {
        operation: answered(&promotion).unwrap(),
        outcome: Ok(Completion::Done),
    };
    world.core.handle_event(late, world.now);
    assert_eq!(world.core.statistics().late_events, 1);
    world.pass(2 * SECOND);
    assert_eq!(world.fetch(&hashes([0])), [Some(Tier::Nvme)]);
    world.core.check_invariants();
}

#[test]
fn until_a_reset_is_answered_no_slot_in_flight_is_free() {
    let mut world = filled();
    world.hold = |action| matches!(name(action), "demote" | "reset");
    world.put(&hashes(100..104), 16 * KIB);
    world.pass(11 * SECOND);
    let writing: Vec<_> = world
        .held
        .iter()
        .filter_map(|action| {
            if let Action::Demote { source, .. } = action {
                Some(*source)
            } else {
                None
            }
        })
        .collect();
    assert!(!writing.is_empty());
    for number in 200..230 {
        let reserved = world.reserve_as(ME, &hashes([number]), 16 * KIB);
        for (_, extent) in crate::world::granted(&reserved) {
            assert!(
                writing
                    .iter()
                    .all(|busy| (busy.segment, busy.offset) != (extent.segment, extent.offset))
            );
        }
    }
    world.core.check_invariants();
}

#[test]
fn duplicate_and_unknown_events_are_counted_and_ignored() {
    let mut world = filled();
    world.hold = |action| name(action) == "promote";
    world.fetch_later(&hashes([0]));
    let event = Event {
        operation: answered(&world.held[0]).unwrap(),
        outcome: Err(Failure::Io),
    };
    world.let_go();
    world.core.handle_event(event, world.now);
    world.core.handle_event(
        Event {
            operation: kvtier_core::OperationId(1 << 60),
            ..event
        },
        world.now,
    );
    assert_eq!(world.core.statistics().late_events, 2);
    assert_eq!(world.core.statistics().io_errors, 0);
    assert_eq!(world.fetch(&hashes([0])), [Some(Tier::Host)]);
}

#[test]
fn a_relocation_that_cannot_be_read_loses_that_block_only() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    world.fail = |action| (name(action) == "relocate").then_some(Failure::Corrupt);
    for round in 0..60 {
        assert_eq!(
            world.put(&hashes(round * 10..round * 10 + 4), 8 * KIB),
            [Sealed::Published; 4]
        );
        world.fetch(&hashes(0..4));
    }
    assert!(world.seen["close"] > 8, "segments are emptied all the same");
    world.core.check_invariants();
}

#[test]
fn host_memory_that_cannot_be_had_is_asked_for_again() {
    let mut world = World::new(settings(256 << 10, 0));
    world.fail = |action| (name(action) == "open").then_some(Failure::Full);
    assert_eq!(world.put(&hashes([1]), 16 * KIB), [Sealed::Busy]);
    world.fail = |_| None;
    world.pass(SECOND);
    assert_eq!(world.put(&hashes([1]), 16 * KIB), [Sealed::Published]);
}

#[test]
fn a_flush_writes_what_only_host_memory_has_and_syncs() {
    let mut world = World::new(settings(256 << 10, 4 << 20));
    world.put(&hashes(0..8), 16 * KIB);
    let operation = world.flush();
    assert_eq!(world.flushed[&operation], (8, 0));
    assert_eq!(world.seen["sync"], 1);
    assert_eq!(world.core.statistics().nvme_blocks, 8);
    let again = world.flush();
    assert_eq!(world.flushed[&again], (0, 0));
}

#[test]
fn a_flush_says_how_much_it_could_not_write() {
    let mut world = World::new(settings(1 << 20, 0));
    world.put(&hashes(0..8), 16 * KIB);
    let operation = world.flush();
    assert_eq!(world.flushed[&operation], (0, 8), "there is no NVMe tier");

    let mut world = World::new(settings(1 << 20, 640 << 10));
    world.put(&hashes(0..40), 16 * KIB);
    let operation = world.flush();
    let (written, left_out) = world.flushed[&operation];
    assert!(
        written > 0 && left_out > 0 && written + left_out == 40,
        "{written} written, {left_out} left out"
    );

    let mut world = World::new(settings(1 << 20, 4 << 20));
    world.fail = |action| (name(action) == "demote").then_some(Failure::Io);
    world.put(&hashes(0..8), 16 * KIB);
    let operation = world.flush();
    world.pass(SECOND);
    assert_eq!(world.flushed[&operation], (0, 8), "the device fails");
}

#[test]
fn a_flush_of_a_full_tier_gives_up_what_is_only_there_and_writes_each_block_once() {
    let mut world = World::new(kvtier_core::CoreSettings {
        host_clean_low_permille: 0,
        host_clean_slots_min: 0,
        host_clean_high_permille: 0,
        ..settings(512 << 10, 1 << 20)
    });
    for number in 0..300 {
        world.put(&hashes([number]), 8 * KIB);
    }
    let cold: Vec<u64> = world.present(0..236);
    assert!(cold.len() > 40, "{cold:?}");
    // Copies in both tiers: without a flush those on NVMe are the next to go.
    for number in &cold[cold.len() - 24..] {
        world.fetch(&hashes([*number]));
    }
    let before = world.core.statistics();
    let in_both = before.host_blocks + before.nvme_blocks - before.blocks;
    assert!(in_both > 0, "{in_both}");
    let operation = world.flush();
    assert_eq!(world.flushed[&operation], (before.host_blocks - in_both, 0));
    let after = world.core.statistics();
    assert_eq!(after.demotions - before.demotions, before.host_blocks - in_both);
    assert_eq!(after.host_blocks + after.nvme_blocks - after.blocks, after.host_blocks);
    world.core.check_invariants();
}

#[test]
fn a_flush_is_not_done_before_its_sync_is_answered() {
    let mut world = World::new(settings(256 << 10, 4 << 20));
    world.put(&hashes(0..2), 16 * KIB);
    world.hold = |action| name(action) == "sync";
    let operation = world.flush();
    world.pass(SECOND);
    assert!(world.flushed.is_empty());
    world.let_go();
    assert_eq!(world.flushed[&operation], (2, 0));
}

/// A command whose time was past the pause hid its end: nobody looked again, and what waited for the device waited on.
#[test]
fn the_end_of_a_pause_is_noticed_although_a_command_came_first() {
    let mut world = World::new(settings(128 << 10, 1 << 20));
    world.put(&hashes(0..4), 8 * KIB);
    world.fail = |action| (name(action) == "demote").then_some(Failure::Busy);
    let flush = world.flush();
    world.fail = |_| None;
    world.now = Time(world.now.0 + SECOND / 2);
    world.lookup(&hashes([0]));
    assert!(world.core.poll_timeout().is_some_and(|due| due <= world.now));
    world.pass(0);
    assert_eq!(world.flushed[&flush], (4, 0));
}
