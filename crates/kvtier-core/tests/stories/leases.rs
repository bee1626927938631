//! Leases, reservations and quarantine: no slot is used again while somebody may still touch it.

use crate::world::{DOMAIN, KIB, ME, OTHER, SECOND, World, extents, granted, hash, hashes, leases, name, settings};
use kvtier_core::{
    Answer, CoreSettings, Departure, Failure, FetchScope, Fetched, LeaseId, Parent, Refusal, Reserved, SealItem, Sealed,
};

const MINUTE: u64 = 60 * SECOND;

fn two_clients(settings: CoreSettings) -> World {
    let mut world = World::new(settings);
    world.core.connect(OTHER, DOMAIN, world.now).unwrap();
    world
}

/// Every slot of host memory that another client can get.
fn fill(world: &mut World) -> Vec<kvtier_core::Extent> {
    let mut all = Vec::new();
    loop {
        let slots = world.grant(OTHER, 16 * KIB, 16);
        if slots.is_empty() {
            return all;
        }
        all.extend(slots.into_iter().map(|(_, extent)| extent));
    }
}

#[test]
fn a_leased_slot_is_not_given_out_even_after_its_block_is_deleted() {
    let mut world = two_clients(settings(256 << 10, 0));
    world.put(&hashes([1]), 16 * KIB);
    let results = world.fetch_as(ME, &hashes([1]), FetchScope::Each);
    world.delete(&hashes([1]));
    let leased = extents(&results)[0];
    let slots = fill(&mut world);
    assert_eq!(slots.len(), 15);
    assert!(
        slots
            .iter()
            .all(|slot| (slot.segment, slot.offset) != (leased.segment, leased.offset))
    );
    world.check_and_release(&hashes([1]), &results);
    let last = fill(&mut world);
    assert_eq!((last[0].segment, last[0].offset), (leased.segment, leased.offset));
}

#[test]
fn an_expired_lease_is_quarantined_until_its_holder_releases_it() {
    let mut world = two_clients(settings(256 << 10, 0));
    world.put(&hashes([1]), 16 * KIB);
    let results = world.fetch_as(ME, &hashes([1]), FetchScope::Each);
    world.pass(MINUTE);
    let statistics = world.core.statistics();
    assert_eq!(
        (
            statistics.leases_expired,
            statistics.quarantined_slots,
            statistics.quarantined_bytes
        ),
        (1, 1, 16 << 10)
    );
    assert_eq!(
        fill(&mut world).len(),
        15,
        "time alone frees nothing that a live process maps"
    );
    world.check_and_release(&hashes([1]), &results);
    assert_eq!(world.core.statistics().quarantined_slots, 0);
    world.core.check_invariants();
}

#[test]
fn a_lost_client_keeps_its_slots_until_it_is_gone() {
    let mut world = two_clients(settings(256 << 10, 0));
    world.put(&hashes([1]), 16 * KIB);
    world.fetch_as(ME, &hashes([1]), FetchScope::Each);
    world.reserve_as(ME, &hashes([2]), 16 * KIB);
    world.leave(ME, Departure::Alive);
    assert_eq!(world.core.statistics().quarantined_slots, 2);
    assert!(world.core.holds_anything(ME));
    assert_eq!(
        world.core.connect(ME, DOMAIN, world.now),
        Err(Refusal::Invalid("this client is connected already"))
    );
    assert_eq!(fill(&mut world).len(), 14);
    world.leave(ME, Departure::Gone);
    assert_eq!(world.core.statistics().quarantined_slots, 0);
    assert_eq!(fill(&mut world).len(), 2);
    assert_eq!(world.core.statistics().clients, 1);
}

#[test]
fn a_client_that_leaves_cleanly_leaves_nothing_behind() {
    let mut world = two_clients(settings(256 << 10, 0));
    world.put(&hashes(1..4), 16 * KIB);
    world.fetch_as(ME, &hashes(1..4), FetchScope::Each);
    world.reserve_as(ME, &hashes(5..9), 16 * KIB);
    world.grant(ME, 4 * KIB, 3);
    world.leave(ME, Departure::Clean);
    let statistics = world.core.statistics();
    assert_eq!(
        (statistics.leases, statistics.reservations, statistics.quarantined_slots),
        (0, 0, 0)
    );
    assert_eq!(statistics.host_used_bytes, 3 * (16 << 10), "the blocks stay");
}

#[test]
fn what_a_client_waited_for_goes_with_it() {
    let mut world = two_clients(settings(256 << 10, 0));
    world.put(&hashes(0..16), 16 * KIB);
    let results = world.fetch_as(ME, &hashes(0..16), FetchScope::Each);
    let operation = world.reserve_later(OTHER, &hashes([50]), 16 * KIB);
    world.leave(OTHER, Departure::Gone);
    assert_eq!(world.core.statistics().waiting, 0);
    world.check_and_release(&hashes(0..16), &results);
    assert!(!world.reserved.contains_key(&operation));
    world.core.check_invariants();
}

#[test]
fn a_reservation_that_expired_is_stale_and_its_slot_free_once_the_holder_spoke() {
    let mut world = two_clients(settings(256 << 10, 0));
    let reserved = world.reserve_as(ME, &hashes([1, 2]), 16 * KIB);
    world.pass(MINUTE);
    assert_eq!(world.core.statistics().quarantined_slots, 2);
    assert_eq!(fill(&mut world).len(), 14);
    assert_eq!(
        world.seal_granted(&reserved[..1], &hashes([1]), Parent::Root),
        [Sealed::Stale]
    );
    let (second, _) = granted(&reserved)[1];
    assert_eq!(world.core.abandon(ME, &[second], world.now), 0);
    assert_eq!(fill(&mut world).len(), 2);
    assert_eq!(world.present([1, 2]), []);
}

#[test]
fn a_client_with_too_much_in_quarantine_is_refused_and_others_are_not() {
    let mut world = two_clients(CoreSettings {
        quarantine_bytes_per_client_max: 40 << 10,
        ..settings(256 << 10, 0)
    });
    world.put(&hashes(0..4), 16 * KIB);
    let results = world.fetch_as(ME, &hashes(0..4), FetchScope::Each);
    world.pass(MINUTE);
    let keys = hashes([0]);
    let (mine, others) = (world.request(ME, &keys), world.request(OTHER, &keys));
    assert_eq!(world.core.fetch(&mine, FetchScope::Each, world.now), Err(Refusal::Busy));
    assert_eq!(world.core.reserve(&mine, &[1], world.now), Err(Refusal::Busy));
    assert_eq!(world.core.grant(ME, 4 * KIB, 1, world.now), []);
    assert!(world.core.fetch(&others, FetchScope::Each, world.now).is_ok());
    world.check_and_release(&hashes(0..4), &results);
    assert!(world.core.fetch(&mine, FetchScope::Each, world.now).is_ok());
}

#[test]
fn foreign_stale_and_invented_ids_are_counted_and_harmless() {
    let mut world = two_clients(settings(256 << 10, 0));
    world.put(&hashes([1]), 16 * KIB);
    let results = world.fetch_as(ME, &hashes([1]), FetchScope::Each);
    let lease = leases(&results)[0];
    assert_eq!(world.core.release(OTHER, &[lease], world.now), 1);
    assert_eq!(world.core.release(ME, &[LeaseId(0), LeaseId(u64::MAX)], world.now), 2);
    assert_eq!(world.core.statistics().leases, 1);
    assert_eq!(
        world.core.release(ME, &[lease, lease], world.now),
        1,
        "the second time it is stale"
    );
    let again = world.fetch_as(ME, &hashes([1]), FetchScope::Each);
    assert_ne!(leases(&again)[0], lease, "its place is used again, its id is not");
    assert_eq!(world.core.release(ME, &[lease], world.now), 1);
    assert_eq!(world.core.statistics().foreign_ids, 5);
}

#[test]
fn a_seal_with_a_wrong_length_or_of_another_client_changes_nothing() {
    let mut world = two_clients(settings(256 << 10, 0));
    let reserved = world.reserve_as(OTHER, &hashes([1]), 5 * KIB);
    let (reservation, _) = granted(&reserved)[0];
    let item = SealItem {
        reservation,
        hash: hash(1),
        parent: Parent::Root,
        length: 5 * KIB,
        tokens: 1,
    };
    assert_eq!(world.seal(&[item]), [Sealed::Invalid]);
    let mut seal = |length| {
        let items = [SealItem { length, ..item }];
        let request = world.seal_request(OTHER, &items);
        world.core.seal(&request, world.now).unwrap()
    };
    assert_eq!(seal(8 * KIB + 1), [Sealed::Invalid]);
    assert_eq!(seal(0), [Sealed::Invalid]);
    assert_eq!(seal(5 * KIB), [Sealed::Published]);
    assert_eq!(seal(5 * KIB), [Sealed::Stale]);
}

#[test]
fn every_bound_is_busy_and_not_an_endless_wait() {
    let bounds = CoreSettings {
        leases_per_client_max: 2,
        reserved_bytes_per_client_max: 32 << 10,
        waiting_per_client_max: 1,
        batch_keys_max: 8,
        clients_max: 2,
        ..settings(256 << 10, 0)
    };
    let mut world = two_clients(bounds);
    world.put(&hashes([1, 2]), 16 * KIB);
    world.put(&hashes([3]), 16 * KIB);
    let results = world.fetch_as(ME, &hashes([1, 2, 3]), FetchScope::Each);
    assert_eq!((leases(&results).len(), results[2]), (2, Fetched::Busy));
    let reserved = world.reserve_as(ME, &hashes([4, 5, 6]), 16 * KIB);
    assert_eq!((granted(&reserved).len(), reserved[2]), (2, Reserved::Busy));
    assert_eq!(
        world.core.connect(kvtier_core::ClientId(9), DOMAIN, world.now),
        Err(Refusal::Busy)
    );
    let keys = hashes(0..9);
    let request = world.request(ME, &keys);
    assert!(matches!(
        world.core.lookup(&request, world.now),
        Err(Refusal::Invalid(_))
    ));
}

#[test]
fn only_so_many_may_wait() {
    let mut world = two_clients(CoreSettings {
        waiting_per_client_max: 2,
        waiting_max: 3,
        ..settings(256 << 10, 0)
    });
    world.put(&hashes(0..16), 16 * KIB);
    world.fetch_as(ME, &hashes(0..16), FetchScope::Each);
    for number in 0..2 {
        world.reserve_later(ME, &hashes([50 + number]), 16 * KIB);
    }
    let keys = hashes([60]);
    let (mine, others) = (world.request(ME, &keys), world.request(OTHER, &keys));
    let busy = Ok(Answer::Ready(vec![Reserved::Busy]));
    assert_eq!(world.core.reserve(&mine, &[16 * KIB], world.now), busy);
    assert!(matches!(
        world.core.reserve(&others, &[16 * KIB], world.now),
        Ok(Answer::Pending(_))
    ));
    assert_eq!(world.core.reserve(&others, &[16 * KIB], world.now), busy);
    assert_eq!(world.core.statistics().waiting, 3);
}

#[test]
fn while_draining_nothing_new_is_held_and_what_is_held_can_be_finished() {
    let mut world = World::new(settings(256 << 10, 0));
    world.put(&hashes([1]), 16 * KIB);
    let results = world.fetch_as(ME, &hashes([1]), FetchScope::Each);
    let reserved = world.reserve_as(ME, &hashes([2]), 16 * KIB);
    world.core.drain(world.now);
    let keys = hashes([1]);
    let request = world.request(ME, &keys);
    assert_eq!(
        world.core.fetch(&request, FetchScope::Each, world.now),
        Err(Refusal::Draining)
    );
    assert_eq!(world.core.reserve(&request, &[1], world.now), Err(Refusal::Draining));
    assert_eq!(world.core.grant(ME, 4 * KIB, 1, world.now), []);
    assert_eq!(
        world.seal_granted(&reserved, &hashes([2]), Parent::Root),
        [Sealed::Published]
    );
    assert!(world.check_and_release(&hashes([1]), &results)[0].is_some());
    assert!(world.core.lookup(&request, world.now).is_ok());
}

#[test]
fn a_slot_that_a_device_reads_is_not_given_out() {
    let mut world = two_clients(settings(256 << 10, 4 << 20));
    world.hold = |action| name(action) == "demote";
    world.put(&hashes(0..16), 16 * KIB);
    let writing = world.held.len();
    assert!(writing > 0);
    world.delete(&hashes(0..16));
    assert_eq!(fill(&mut world).len(), 16 - writing);
    world.fail = |action| (name(action) == "demote").then_some(Failure::Io);
    world.let_go();
    assert_eq!(fill(&mut world).len(), writing);
    world.core.check_invariants();
}
