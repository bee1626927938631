use std::time::{Duration, Instant};

use super::locks::Condvar;
use kvtier_core::{BlockHash, Extent, LeaseId, ReservationId, SegmentId};

use super::known::KnownKeys;
use super::returns::{Alarm, Look, Returns, Rounds, Taken};
use super::slots::Slots;
use crate::ErrorKind;
use crate::wire::{KEYS_MAX, Slot};

fn returns() -> Returns {
    Returns::new(Alarm::Thread(Condvar::new()))
}

fn taken(returns: &Returns) -> usize {
    let mut taken = Taken::default();
    returns.take(&mut taken);
    taken.leases.len()
}

#[test]
fn a_forked_child_is_refused_and_gives_nothing_back() {
    let returns = returns().of_process(1);
    assert_eq!(returns.check_process().expect_err("not ours").kind, ErrorKind::Closed);
    assert_eq!(returns.check_epoch(0).expect_err("not ours").kind, ErrorKind::Closed);
    returns.release(0, [LeaseId(1)]);
    assert_eq!(taken(&returns), 0);
}

#[test]
fn a_lease_of_an_earlier_connection_is_not_released_over_a_later_one() {
    let returns = returns();
    returns.release(0, [LeaseId(1)]);
    let epoch = returns.begin_epoch();
    returns.release(0, [LeaseId(2)]);
    assert_eq!(taken(&returns), 0);
    returns.release(epoch, [LeaseId(3)]);
    assert_eq!(taken(&returns), 1);
}

#[test]
fn the_keeper_leaves_releases_to_requests_and_sleeps_when_all_is_quiet() {
    let returns = returns();
    let mut rounds = Rounds::default();
    returns.release(0, [LeaseId(1)]);
    assert_eq!(returns.look(&mut rounds), Look::Wait, "a request may come");
    assert_eq!(taken(&returns), 1);
    returns.release(0, [LeaseId(2)]);
    assert_eq!(returns.look(&mut rounds), Look::Wait, "one came");
    assert_eq!(returns.look(&mut rounds), Look::Flush, "none came");
    assert_eq!(taken(&returns), 1);
    let ticks = (0..100)
        .take_while(|_| returns.look(&mut rounds) != Look::Sleep)
        .count();
    assert!(ticks < 20, "asleep after {ticks} ticks");
    returns.release(0, (0..300).map(LeaseId));
    assert_eq!(returns.look(&mut rounds), Look::Flush, "many do not wait");
    returns.stop();
    assert_eq!(returns.look(&mut rounds), Look::Stop);
}

#[test]
fn one_request_takes_no_more_leases_than_fit_its_header() {
    let returns = returns();
    returns.release(0, (0..KEYS_MAX as u64 + 5).map(LeaseId));
    assert_eq!([taken(&returns), taken(&returns), taken(&returns)], [KEYS_MAX, 5, 0]);
}

#[test]
fn known_keys_forget_the_oldest_and_stay_within_their_bound() {
    let hash = |number: u8| BlockHash([number; 16]);
    let mut known = KnownKeys::new(10);
    (0..100).for_each(|number| known.insert(1, hash(number)));
    let held = (0..100).filter(|number| known.contains(1, hash(*number))).count();
    assert!((5..=10).contains(&held), "{held}");
    assert!(known.contains(1, hash(99)) && !known.contains(2, hash(99)) && !known.contains(1, hash(0)));
    known.remove(1, hash(99));
    assert!(!known.contains(1, hash(99)));
    let mut none = KnownKeys::new(0);
    none.insert(1, hash(1));
    assert!(!none.contains(1, hash(1)));
}

#[test]
fn a_slot_is_used_in_the_first_half_of_its_life_only() {
    let slot = |number: u64| Slot {
        reservation: ReservationId(number),
        extent: Extent {
            segment: SegmentId(1),
            offset: 0,
            length: 8192,
        },
    };
    let start = Instant::now();
    let mut slots = Slots::new(1 << 20, 1000);
    slots.put([slot(1)].into_iter(), start);
    slots.put([slot(2)].into_iter(), start + Duration::from_millis(300));
    assert_eq!(slots.take(8193, start), None, "another class");
    assert_eq!(
        slots.expires_in(start + Duration::from_millis(400)),
        Some(Duration::from_millis(100))
    );
    let mut expired = Vec::new();
    slots.expire(start + Duration::from_millis(500), &mut expired);
    assert_eq!(expired, [ReservationId(1)]);
    assert_eq!(slots.take(5000, start + Duration::from_millis(799)), Some(slot(2)));
    assert_eq!(slots.expires_in(start), None);
}

#[test]
fn slots_are_asked_for_up_to_their_bound() {
    let slots = Slots::new(1 << 20, 1000);
    let count = |length, blocks| slots.wanted(length, blocks).count;
    assert_eq!((count(65_536, 3), count(65_536, 100), count(1 << 20, 16)), (3, 16, 1));
    assert_eq!((count(4 << 20, 4), count((4 << 20) + 1, 4), count(0, 4)), (1, 0, 0));
    assert_eq!(slots.wanted(5000, 1).length, 8192);
    assert_eq!(Slots::new(0, 1000).wanted(5000, 1).count, 0);
}
