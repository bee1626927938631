//! A pair of NICs, one of each node, and the lanes between them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Slice;
use super::lane::Lane;
use crate::rails::{Health, Use};
use crate::transport::RailReport;

/// Bandwidth is measured over so much busy time.
const MEASURED_OVER: Duration = Duration::from_millis(5);

pub(super) struct Rail {
    /// Indexes of the NICs.
    pub(super) local: usize,
    pub(super) remote: usize,
    /// Of each local NIC one rail is used; the others stand in for it.
    pub(super) preferred: bool,
    pub(super) health: Health,
    pub(super) slots: Vec<Slot>,
    /// Posted or about to be.
    pub(super) in_flight_bytes: u64,
    /// Slices chosen for each slot that are not posted yet.
    taken: Vec<usize>,
    /// Chosen for a slice that is to be alone there, which is not posted yet.
    reserved: Vec<bool>,
    busy_since: Instant,
    /// Since the last measurement: how long it was busy, and what it moved.
    busy: Duration,
    moved: u64,
    bytes: u64,
    errors: u64,
    connects: u64,
}

/// A lane's place.
pub(super) enum Slot {
    Down,
    Connecting,
    Up(Arc<Lane>),
    /// Being flushed since then.
    Stopping(Arc<Lane>, Instant),
}

impl Rail {
    pub(super) fn new(local: usize, remote: usize, preferred: bool, lanes: usize) -> Rail {
        Rail {
            local,
            remote,
            preferred,
            health: Health::default(),
            slots: (0..lanes).map(|_| Slot::Down).collect(),
            in_flight_bytes: 0,
            taken: vec![0; lanes],
            reserved: vec![false; lanes],
            busy_since: Instant::now(),
            busy: Duration::ZERO,
            moved: 0,
            bytes: 0,
            errors: 0,
            connects: 0,
        }
    }

    pub(super) fn is_down(&self) -> bool {
        self.slots.iter().all(|slot| matches!(slot, Slot::Down))
    }

    pub(super) fn has_lane_up(&self) -> bool {
        self.slots.iter().any(|slot| matches!(slot, Slot::Up(_)))
    }

    pub(super) fn was_used(&self) -> bool {
        self.connects > 0
    }

    /// The lane with the most room, if any has; one with nothing else in flight for a slice that is to be alone.
    pub(super) fn free_lane(&self, alone: bool) -> Option<usize> {
        let room = |at: usize| match &self.slots[at] {
            Slot::Up(lane) => {
                let flight = lane.flight.lock();
                let taken = flight.queue.len() + self.taken[at];
                let is_reserved = self.reserved[at] || flight.queue.front().is_some_and(|(_, slice)| slice.alone);
                match (alone, taken, is_reserved) {
                    (_, _, true) | (true, 1.., _) => 0,
                    _ => lane.depth.saturating_sub(taken),
                }
            }
            _ => 0,
        };
        let most = (0..self.slots.len())
            .map(|at| (room(at), at))
            .max_by_key(|(room, at)| (*room, std::cmp::Reverse(*at)));
        most.filter(|(room, _)| *room > 0).map(|(_, at)| at)
    }

    /// A slice will be posted on it.
    pub(super) fn take(&mut self, slot: usize, slice: &Slice, now: Instant) {
        if self.health.usable(now) == Use::Probe {
            self.health.begin_probe();
        }
        if self.in_flight_bytes == 0 {
            self.busy_since = now;
        }
        self.in_flight_bytes += slice.bytes();
        self.taken[slot] += 1;
        self.reserved[slot] |= slice.alone;
    }

    pub(super) fn forget_taken(&mut self, slot: usize, slices: usize) {
        self.taken[slot] -= slices;
        self.reserved[slot] = false;
    }

    pub(super) fn succeed(&mut self, bytes: u64, now: Instant) {
        self.in_flight_bytes -= bytes;
        self.bytes += bytes;
        self.health.succeed();
        self.busy += now.saturating_duration_since(self.busy_since);
        self.busy_since = now;
        self.moved += bytes;
        if self.busy >= MEASURED_OVER {
            self.health.measure(self.moved, self.busy);
            self.busy = Duration::ZERO;
            self.moved = 0;
        }
    }

    pub(super) fn fail(&mut self, now: Instant) {
        self.errors += 1;
        self.health.fail(now);
    }

    pub(super) fn connected(&mut self, slot: usize, lane: Arc<Lane>) {
        self.connects += 1;
        self.slots[slot] = Slot::Up(lane);
    }

    /// Stops a lane; its slices come back as completions or, where the device does not send them, when it is destroyed.
    pub(super) fn stop(&mut self, slot: usize, now: Instant) {
        if let Slot::Up(lane) = &self.slots[slot] {
            let lane = Arc::clone(lane);
            lane.stop();
            self.slots[slot] = Slot::Stopping(lane, now);
            self.health.stop(now);
        }
    }

    /// Nobody answers on one lane: the others lead to the same NIC, or to queue pairs of a process that is no more.
    pub(super) fn stop_all(&mut self, now: Instant) {
        (0..self.slots.len()).for_each(|slot| self.stop(slot, now));
    }

    /// A stopped lane whose flight has come back leaves its slot.
    pub(super) fn release_if_empty(&mut self, lane: &Arc<Lane>) -> Option<Arc<Lane>> {
        match &self.slots[lane.slot] {
            Slot::Stopping(stopping, _) if Arc::ptr_eq(stopping, lane) && lane.flight.lock().queue.is_empty() => {
                match std::mem::replace(&mut self.slots[lane.slot], Slot::Down) {
                    Slot::Stopping(lane, _) => Some(lane),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// Lanes that were stopped `patience` ago and have not been flushed, or are empty. Their slots are free.
    pub(super) fn overdue(&mut self, now: Instant, patience: Duration) -> Vec<Arc<Lane>> {
        let mut overdue = Vec::new();
        for slot in &mut self.slots {
            let due = match slot {
                Slot::Stopping(lane, since) => {
                    now.saturating_duration_since(*since) >= patience || lane.flight.lock().queue.is_empty()
                }
                _ => false,
            };
            if due && let Slot::Stopping(lane, _) = std::mem::replace(slot, Slot::Down) {
                overdue.push(lane);
            }
        }
        overdue
    }

    pub(super) fn report(&self, name: String, now: Instant) -> RailReport {
        RailReport {
            name,
            usable: self.has_lane_up() && self.health.usable(now) != Use::None,
            bytes: self.bytes,
            bytes_per_second: self.health.bytes_per_second(),
            errors: self.errors,
            reconnects: self.connects.saturating_sub(self.slots.len() as u64),
        }
    }
}
