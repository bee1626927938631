//! Who may serve, and what he learns before he does.

use super::*;

#[test]
fn a_member_serves_once_a_majority_has_granted_its_renewal() {
    let mut network = Network::new(&settings(3, true));
    assert!(!network.serves(0));
    network.isolate(0);
    network.pass(1);
    assert!(!network.serves(0));
    assert!(network.serves(1) && network.serves(2));
    network.cut.clear();
    network.pass(200);
    assert!(network.serves(0));
}

#[test]
fn a_member_that_is_cut_off_serves_until_its_lease_is_over_and_no_longer() {
    let mut network = Network::renewed(&settings(3, true));
    network.isolate(2);
    network.pass(900);
    assert!(network.serves(2));
    network.pass(100);
    assert!(!network.serves(2));
    assert!(network.serves(0) && network.serves(1));
    let lapsed = (MemberId(2), ClusterAction::Serving { serving: false });
    assert!(network.told.contains(&lapsed), "{:?}", network.told);
    assert_eq!(network.members[2].statistics().lapses, 1);
}

#[test]
fn without_a_fence_everybody_serves() {
    let network = Network::new(&settings(2, false));
    assert!(network.serves(0) && network.serves(1));
    assert_eq!(network.members[0].lease_until(), None);
}

/// A lease that counted from the answer would outlive the wait of a purge that was stored after the answer was given.
#[test]
fn a_grant_that_comes_late_gives_a_lease_from_when_it_was_asked_for() {
    let mut member = start(settings(3, true), 0, 7, &[], Time::ZERO);
    member.handle_timeout(Time::ZERO);
    let grant = Message::Grant {
        to: Incarnation(7),
        round: Round(1),
        known: Known::default(),
        complete: true,
        raised: Vec::new(),
    };
    let late = Time(600 * MILLISECOND);
    member.handle_message(MemberId(1), grant.clone(), late);
    assert_eq!(member.lease_until(), Some(Time(1000 * MILLISECOND)));
    assert!(!member.is_serving(Time(1000 * MILLISECOND)));

    let mut member = start(settings(3, true), 0, 7, &[], Time::ZERO);
    member.handle_timeout(Time::ZERO);
    member.handle_message(MemberId(1), grant, Time(1001 * MILLISECOND));
    assert!(!member.is_serving(Time(1001 * MILLISECOND)));
}

#[test]
fn a_grant_of_an_earlier_run_or_of_a_round_to_come_does_not_count() {
    let mut member = start(settings(3, true), 0, 7, &[], Time::ZERO);
    member.handle_timeout(Time::ZERO);
    let grant = |to, round| Message::Grant {
        to: Incarnation(to),
        round: Round(round),
        known: Known::default(),
        complete: true,
        raised: Vec::new(),
    };
    member.handle_message(MemberId(1), grant(6, 1), Time(1));
    assert_eq!(member.statistics().late_messages, 1);
    member.handle_message(MemberId(1), grant(7, 2), Time(1));
    member.handle_message(MemberId(0), grant(7, 1), Time(1));
    member.handle_message(MemberId(3), grant(7, 1), Time(1));
    assert_eq!(member.statistics().invalid_messages, 3);
    assert!(!member.is_serving(Time(1)));
    member.handle_message(MemberId(1), grant(7, 1), Time(1));
    assert!(member.is_serving(Time(1)));
}

#[test]
fn a_grant_counts_only_once_what_it_carried_is_recorded() {
    let mut network = Network::renewed(&settings(3, true));
    network.isolate(2);
    network.raise(0, "a", 1, 100);
    network.pass(1500);
    assert!(!network.serves(2));
    network.holding.insert(2);
    network.cut.clear();
    network.pass(200);
    assert!(!network.serves(2));
    assert_eq!(network.generation(2, "a"), 0);

    // A record that fails is no record: the next renewal brings it again.
    for (own, operation) in std::mem::take(&mut network.records) {
        network.answer(own, operation, false);
    }
    network.settle();
    assert!(!network.serves(2));
    network.pass(200);
    assert!(!network.serves(2));

    for (own, operation) in std::mem::take(&mut network.records) {
        network.answer(own, operation, true);
    }
    network.settle();
    assert!(network.serves(2));
    assert_eq!(network.generation(2, "a"), 1);
}

#[test]
fn many_names_come_in_pieces_and_the_last_one_grants() {
    let mut small = settings(3, true);
    small.entries_per_message_max = 2;
    let mut network = Network::renewed(&small);
    network.isolate(2);
    for index in 0..7 {
        network.members[0]
            .note(&name(&format!("n{index}")), Generation(1), network.now)
            .expect("there is room");
    }
    network.pass(1500);
    assert!(!network.serves(2));
    network.cut.clear();
    network.pass(200);
    assert!(network.serves(2));
    assert_eq!(network.members[2].statistics().names, 7);
    assert!(network.members[0].statistics().continuations >= 3);
}

#[test]
fn where_nothing_changed_a_grant_carries_nothing() {
    let mut network = Network::renewed(&settings(3, true));
    network.raise(0, "a", 1, 100);
    network.pass(1000);
    for own in 0..3 {
        network.members[own].handle_timeout(Time(network.now.0 + 200 * MILLISECOND));
        network.drain(MemberId(own as u32));
    }
    while let Some((from, to, message)) = network.mail.pop_front() {
        if let Message::Grant { raised, .. } = &message {
            assert_eq!(raised, &[]);
        }
        network.members[to.0 as usize].handle_message(from, message, network.now);
        network.drain(to);
    }
}

/// Versions count anew in each run: those of the last one would hide whatever was raised before it.
#[test]
fn a_member_that_started_again_is_asked_for_everything() {
    let mut network = Network::renewed(&settings(3, false));
    network.isolate(2);
    for index in 0..4 {
        network.members[0]
            .note(&name(&format!("n{index}")), Generation(1), network.now)
            .expect("there is room");
    }
    network.pass(400);
    let register = [("n0", 1), ("n1", 1), ("n2", 1), ("n3", 1), ("n4", 9)];
    network.members[0] = start(settings(3, false), 0, 1000, &register, network.now);
    network.pass(400);
    assert_eq!(network.generation(1, "n4"), 9);
    network.cut.clear();
    network.pass(400);
    assert_eq!(network.generation(2, "n4"), 9);
    assert_eq!(network.generation(2, "n0"), 1);
}

#[test]
fn names_beyond_the_table_are_refused_and_who_sends_them_renews_nothing() {
    let mut network = Network::new(&settings(3, true));
    let mut small = settings(3, true);
    small.names_max = 1;
    network.members[2] = start(small, 2, 102, &[], Time::ZERO);
    for text in ["a", "b"] {
        for own in 0..2 {
            network.members[own]
                .note(&name(text), Generation(1), Time::ZERO)
                .expect("there is room");
        }
    }
    network.pass(100);
    assert!(network.serves(0) && network.serves(1));
    assert!(!network.serves(2));
    assert!(network.members[2].statistics().names_refused > 0);
}

#[test]
fn a_register_with_a_name_that_is_too_long_is_refused() {
    let settings = settings(3, true).check().expect("these can be");
    let long = [(name(&"x".repeat(513)), Generation(1))];
    let error = Cluster::new(settings, Incarnation(1), long, Time::ZERO).err();
    assert_eq!(error.expect("it is too long").field, "name_bytes_max");
}
