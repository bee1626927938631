//! How purges reach everybody.

use super::*;

fn reached(generation: u64, operation: OperationId, reach: Reach) -> ClusterAction {
    ClusterAction::Reached {
        operation,
        generation: Generation(generation),
        reach,
    }
}

#[test]
fn a_purge_has_reached_when_all_have_confirmed() {
    let mut network = Network::renewed(&settings(3, true));
    let operation = network.raise(1, "a", 1, 100);
    let reach = Reach::Fenced {
        confirmed: members(&[0, 1, 2]),
        expired: members(&[]),
    };
    assert_eq!(
        network.told_of(1, operation),
        [reached(1, operation, reach), ClusterAction::Completed { operation }]
    );
    assert_eq!((network.generation(0, "a"), network.generation(2, "a")), (1, 1));
    assert_eq!(network.members[1].statistics().operations, 0);
}

#[test]
fn a_purge_waits_for_the_lease_of_a_member_that_is_cut_off_and_for_the_drift_of_its_clock() {
    let mut network = Network::renewed(&settings(3, true));
    network.isolate(2);
    let operation = network.raise(0, "a", 1, 100);
    network.pass(1099);
    assert_eq!(network.told_of(0, operation), []);
    assert!(!network.serves(2));
    network.pass(2);
    let reach = Reach::Fenced {
        confirmed: members(&[0, 1]),
        expired: members(&[2]),
    };
    assert_eq!(network.told_of(0, operation), [reached(1, operation, reach)]);

    network.cut.clear();
    network.pass(500);
    assert!(network.serves(2));
    assert_eq!(network.generation(2, "a"), 1);
    assert_eq!(
        network.told_of(0, operation),
        [
            ClusterAction::Confirmed {
                operation,
                member: MemberId(2)
            },
            ClusterAction::Completed { operation }
        ]
    );
}

#[test]
fn a_purge_that_no_majority_has_says_so_at_its_deadline_and_goes_on() {
    let mut network = Network::renewed(&settings(3, true));
    network.isolate(0);
    let operation = network.raise(0, "a", 1, 100);
    network.pass(99);
    assert_eq!(network.told_of(0, operation), []);
    network.pass(1);
    let reach = Reach::NotStored {
        confirmed: members(&[0]),
        unconfirmed: members(&[1, 2]),
    };
    assert_eq!(network.told_of(0, operation), [reached(1, operation, reach)]);
    network.pass(5000);
    assert_eq!(network.told_of(0, operation), []);
    network.cut.clear();
    network.pass(500);
    let reach = Reach::Fenced {
        confirmed: members(&[0, 1, 2]),
        expired: members(&[]),
    };
    assert_eq!(
        network.told_of(0, operation),
        [reached(1, operation, reach), ClusterAction::Completed { operation }]
    );
}

#[test]
fn a_member_confirms_only_what_is_recorded() {
    let mut network = Network::renewed(&settings(3, true));
    network.holding.extend([1, 2]);
    let operation = network.raise(0, "a", 1, 100);
    network.pass(100);
    assert!(matches!(
        network.told_of(0, operation)[..],
        [ClusterAction::Reached {
            reach: Reach::NotStored { .. },
            ..
        }]
    ));
    // However often it was sent, each member records it once.
    assert_eq!(network.records.iter().filter(|(own, _)| *own == MemberId(1)).count(), 1);
    for (own, operation) in std::mem::take(&mut network.records) {
        network.answer(own, operation, own == MemberId(1));
    }
    network.settle();
    network.holding.clear();
    network.pass(1000);
    let told = network.told_of(0, operation);
    assert!(matches!(
        told[..],
        [
            ClusterAction::Reached {
                reach: Reach::Fenced { .. },
                ..
            },
            ClusterAction::Completed { .. }
        ]
    ));
    assert!(network.members[2].statistics().record_failures > 0);
}

/// Two coordinators that chose the same generation would each hide behind the other's: blocks written under it before the second purge would stay.
#[test]
fn a_purge_goes_above_a_generation_that_others_have_already() {
    let mut network = Network::renewed(&settings(3, true));
    network.isolate(0);
    network.raise(1, "a", 1, 100);
    network.pass(1500);
    network.told.clear();
    network.cut.clear();
    // Member 0 has not heard of it when it is asked for a purge of its own.
    let operation = network.raise(0, "a", 1, 100);
    let told = network.told_of(0, operation);
    assert!(
        matches!(
            told[0],
            ClusterAction::Reached {
                generation: Generation(2),
                ..
            }
        ),
        "{told:?}"
    );
    for own in 0..3 {
        assert_eq!(network.generation(own, "a"), 2);
    }
    assert_eq!(network.members[0].statistics().outbid, 1);
}

#[test]
fn blocks_are_published_under_a_generation_only_once_a_majority_has_it() {
    let mut network = Network::renewed(&settings(3, true));
    assert!(network.members[0].is_settled("a", Generation(0)));
    network.isolate(0);
    network.raise(0, "a", 1, 100);
    assert!(!network.members[0].is_settled("a", Generation(1)));
    assert!(!network.members[1].is_settled("a", Generation(1)));
    network.cut.clear();
    network.pass(400);
    for own in 0..3 {
        assert!(network.members[own].is_settled("a", Generation(1)), "member {own}");
        assert!(!network.members[own].is_settled("a", Generation(2)));
    }
}

/// Between the record and its answer the generation is in force and not told to those who ask: their purges hid behind it.
#[test]
fn without_a_fence_blocks_are_published_once_the_record_is_answered() {
    let mut network = Network::renewed(&settings(2, false));
    network.holding.insert(1);
    network.raise(0, "a", 1, 100);
    assert!(network.members[0].is_settled("a", Generation(1)));
    assert!(!network.members[1].is_settled("a", Generation(1)));
    for (own, operation) in std::mem::take(&mut network.records) {
        network.answer(own, operation, true);
    }
    assert!(network.members[1].is_settled("a", Generation(1)));
}

#[test]
fn a_generation_raised_for_no_purge_spreads_and_settles() {
    let mut network = Network::renewed(&settings(5, true));
    network.members[3]
        .note(&name("a"), Generation(4), network.now)
        .expect("there is room");
    assert!(!network.members[3].is_settled("a", Generation(4)));
    network.pass(401);
    for own in 0..5 {
        assert_eq!(network.generation(own, "a"), 4);
        assert!(
            network.members[own as usize].is_settled("a", Generation(4)),
            "member {own}"
        );
    }
}

#[test]
fn without_a_fence_who_does_not_answer_is_unconfirmed_until_it_does() {
    let mut network = Network::renewed(&settings(3, false));
    network.isolate(2);
    let operation = network.raise(0, "a", 1, 100);
    network.pass(100);
    let reach = Reach::Unfenced {
        confirmed: members(&[0, 1]),
        unconfirmed: members(&[2]),
    };
    assert_eq!(network.told_of(0, operation), [reached(1, operation, reach)]);
    assert!(network.serves(2));
    network.cut.clear();
    network.pass(500);
    assert_eq!(
        network.told_of(0, operation),
        [
            ClusterAction::Confirmed {
                operation,
                member: MemberId(2)
            },
            ClusterAction::Completed { operation }
        ]
    );
}

#[test]
fn a_cluster_of_one_has_reached_at_once() {
    let mut network = Network::new(&settings(1, false));
    let operation = network.raise(0, "a", 1, 100);
    let reach = Reach::Unfenced {
        confirmed: members(&[0]),
        unconfirmed: members(&[]),
    };
    assert_eq!(
        network.told_of(0, operation),
        [reached(1, operation, reach), ClusterAction::Completed { operation }]
    );
}

#[test]
fn a_coordinator_that_starts_again_goes_on_where_it_was() {
    let mut network = Network::renewed(&settings(3, true));
    network.isolate(2);
    let operation = network.raise(0, "a", 1, 100);
    network.pass(1500);
    assert_eq!(network.told_of(0, operation).len(), 1);

    network.members[0] = start(settings(3, true), 0, 1000, &[("a", 1)], network.now);
    let mut again = request("a", 1, network.now);
    again.reached = Some(members(&[0, 1]));
    let operation = network.members[0].raise(again, network.now).expect("there is room");
    network.pass(500);
    assert_eq!(network.told_of(0, operation), []);
    network.cut.clear();
    network.pass(500);
    assert_eq!(
        network.told_of(0, operation),
        [
            ClusterAction::Confirmed {
                operation,
                member: MemberId(2)
            },
            ClusterAction::Completed { operation }
        ]
    );
}

#[test]
fn a_confirmation_that_answers_an_earlier_run_does_not_count() {
    let mut network = Network::renewed(&settings(3, true));
    network.isolate(0);
    let operation = network.raise(0, "a", 1, 100);
    let stored = |to| Message::Stored {
        to: Incarnation(to),
        operation,
        generation: Generation(1),
    };
    for from in [1, 2] {
        network.members[0].handle_message(MemberId(from), stored(99), network.now);
    }
    network.pass(100);
    assert!(matches!(
        network.told_of(0, operation)[..],
        [ClusterAction::Reached {
            reach: Reach::NotStored { .. },
            ..
        }]
    ));
}

#[test]
fn full_means_busy_until_one_is_complete_or_abandoned() {
    let mut small = settings(3, true);
    small.operations_max = 2;
    let mut network = Network::renewed(&small);
    network.isolate(2);
    let first = network.raise(0, "a", 1, 100);
    network.raise(0, "b", 1, 100);
    let third = request("c", 1, network.now);
    assert_eq!(
        network.members[0].raise(third.clone(), network.now),
        Err(RaiseRefusal::Busy)
    );
    assert!(network.members[0].abandon(first, network.now));
    assert!(!network.members[0].abandon(first, network.now));
    assert!(network.members[0].raise(third, network.now).is_ok());
    network.pass(3000);
    assert_eq!(network.told_of(0, first), []);
}

/// Records of abandoned raises were counted nowhere: raising and abandoning in turn had any number of them in flight.
#[test]
fn an_abandoned_raise_takes_its_place_until_its_record_is_answered() {
    let mut small = settings(3, true);
    small.operations_max = 1;
    let mut network = Network::renewed(&small);
    for own in 1..3 {
        let noted = network.members[own].note(&name("a"), Generation(1), network.now);
        assert_eq!(noted, Ok(()));
    }
    network.holding.insert(0);
    let first = network.raise(0, "a", 1, 100);
    assert_eq!(network.records.len(), 1);
    assert!(network.members[0].abandon(first, network.now));
    let second = request("b", 1, network.now);
    assert_eq!(
        network.members[0].raise(second.clone(), network.now),
        Err(RaiseRefusal::Busy)
    );
    for (own, operation) in std::mem::take(&mut network.records) {
        network.answer(own, operation, true);
    }
    assert!(network.members[0].raise(second, network.now).is_ok());
    assert_eq!(network.generation(0, "a"), 2);
}

/// A generation that was in force and not in the table was not told to those who asked, and their purges hid behind it.
#[test]
fn a_generation_that_there_was_no_room_to_carry_is_told_all_the_same() {
    let mut small = settings(2, false);
    small.operations_max = 1;
    let mut network = Network::renewed(&small);
    network.isolate(1);
    network.raise(1, "a", 1, 100);
    let second = request("a", 2, network.now);
    assert_eq!(network.members[1].raise(second, network.now), Err(RaiseRefusal::Busy));
    network.cut.clear();
    let operation = network.raise(0, "a", 2, 100);
    let told = network.told_of(0, operation);
    assert!(
        matches!(
            told[0],
            ClusterAction::Reached {
                generation: Generation(3),
                ..
            }
        ),
        "{told:?}"
    );
}

#[test]
fn records_of_others_stores_are_bounded() {
    let mut small = settings(3, true);
    small.records_in_flight_max = 1;
    let mut network = Network::renewed(&small);
    network.holding.insert(2);
    network.raise(0, "a", 1, 100);
    network.raise(0, "b", 1, 100);
    assert_eq!(network.records.len(), 1);
    assert_eq!(network.members[2].statistics().busy_messages, 1);
}

#[test]
fn names_that_cannot_be_are_refused() {
    let mut network = Network::renewed(&settings(3, true));
    let long = "x".repeat(513);
    for (text, generation) in [("", 1), (long.as_str(), 1), ("a", 0), ("a", u64::MAX)] {
        let request = request(text, generation, network.now);
        assert_eq!(
            network.members[0].raise(request, network.now),
            Err(RaiseRefusal::Invalid)
        );
        let store = Message::Store {
            incarnation: Incarnation(1),
            operation: OperationId(1),
            name: name(text),
            generation: Generation(generation),
        };
        network.members[1].handle_message(MemberId(0), store, network.now);
    }
    assert_eq!(network.members[1].statistics().invalid_messages, 4);
    network.answer(MemberId(0), OperationId(77), true);
    assert_eq!(network.members[0].statistics().late_events, 1);
}
