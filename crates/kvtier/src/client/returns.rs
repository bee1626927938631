use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::locks::{Condvar, Mutex};
use kvtier_core::{LeaseId, ReservationId};

use super::ClientError;
use crate::wire::{Array, Envelope, KEYS_MAX, Request};

/// How long something may wait for a request to ride in front of.
pub(super) const FLUSH_AFTER: Duration = Duration::from_millis(10);
/// From this many on it no longer waits.
const PENDING_MAX: usize = 256;
/// The keeper goes to sleep after this many ticks without anything to do.
const QUIET_TICKS_MAX: u32 = 10;

/// What leases and slots belong to: it outlives them, and says goodbye when the last of them is gone.
pub(super) trait Home: Send + Sync {
    /// Where they are given back.
    fn returns(&self) -> &Returns;
}

/// How the keeper is told that there is something to do.
pub(super) enum Alarm {
    /// It is a thread.
    Thread(Condvar),
    /// It is a task.
    Task(Arc<tokio::sync::Notify>),
}

#[derive(Default)]
struct Queue {
    leases: Vec<LeaseId>,
    reservations: Vec<ReservationId>,
    /// Counts takings, so that the keeper sees whether requests carry the returns away.
    takings: u64,
    awake: bool,
    urgent: bool,
    stopped: bool,
}

/// What is given back and not yet sent.
pub(super) struct Returns {
    queue: Mutex<Queue>,
    alarm: Alarm,
    /// Which connection ids are of. An id of an earlier one means nothing to the node any more.
    epoch: AtomicU64,
    outstanding: AtomicUsize,
    process: u32,
}

/// What one request takes along.
#[derive(Default, Debug)]
pub(super) struct Taken {
    pub(super) leases: Vec<LeaseId>,
    pub(super) reservations: Vec<ReservationId>,
}

impl Taken {
    pub(super) fn is_empty(&self) -> bool {
        self.leases.is_empty() && self.reservations.is_empty()
    }

    /// Slots given back unsealed go in front, in a frame that nobody answers.
    pub(super) fn encode_abandoned(&self, frames: &mut Vec<u8>) -> Result<(), ClientError> {
        if self.reservations.is_empty() {
            return Ok(());
        }
        let request = Request::Abandon {
            reservations: Array::from(&self.reservations),
        };
        Ok(request.encode(&Envelope::default(), frames)?)
    }
}

impl Returns {
    pub(super) fn new(alarm: Alarm) -> Returns {
        Returns {
            queue: Mutex::default(),
            alarm,
            epoch: AtomicU64::new(0),
            outstanding: AtomicUsize::new(0),
            process: std::process::id(),
        }
    }

    /// As another process sees it.
    #[cfg(test)]
    pub(super) fn of_process(self, process: u32) -> Returns {
        Returns { process, ..self }
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// A new connection begins, or the old one is gone: what waits is of no use to the node.
    pub(super) fn begin_epoch(&self) -> u64 {
        let mut queue = self.queue.lock();
        queue.leases.clear();
        queue.reservations.clear();
        self.epoch.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Refuses to work in a forked child.
    pub(super) fn check_process(&self) -> Result<(), ClientError> {
        if std::process::id() == self.process {
            Ok(())
        } else {
            Err(ClientError::forked())
        }
    }

    /// Refuses what belongs to a connection that is gone.
    pub(super) fn check_epoch(&self, epoch: u64) -> Result<(), ClientError> {
        self.check_process()?;
        if self.epoch() == epoch {
            return Ok(());
        }
        Err(ClientError::closed(
            "the connection that this block was leased over is gone: get it again",
        ))
    }

    /// How many leases and slots are in callers' hands.
    pub(super) fn outstanding(&self) -> usize {
        self.outstanding.load(Ordering::Acquire)
    }

    pub(super) fn hand_out(&self) {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn take_in(&self) {
        self.outstanding.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn release(&self, epoch: u64, leases: impl IntoIterator<Item = LeaseId>) {
        self.push(epoch, |queue| queue.leases.extend(leases));
    }

    pub(super) fn abandon(&self, epoch: u64, reservations: impl IntoIterator<Item = ReservationId>) {
        self.push(epoch, |queue| queue.reservations.extend(reservations));
    }

    fn push(&self, epoch: u64, push: impl FnOnce(&mut Queue)) {
        if std::process::id() != self.process {
            return;
        }
        let mut queue = self.queue.lock();
        if self.epoch() != epoch {
            return;
        }
        push(&mut queue);
        let pending = queue.leases.len() + queue.reservations.len();
        let urgent = pending >= PENDING_MAX && !queue.urgent;
        if pending == 0 || (queue.awake && !urgent) {
            return;
        }
        queue.awake = true;
        queue.urgent |= urgent;
        drop(queue);
        self.ring();
    }

    /// Something that the keeper should look at in time, such as slots that will expire.
    pub(super) fn rouse(&self) {
        let mut queue = self.queue.lock();
        if !queue.awake {
            queue.awake = true;
            drop(queue);
            self.ring();
        }
    }

    pub(super) fn stop(&self) {
        // In a forked child there is no keeper, and a thread that does not exist there may hold the queue.
        if self.check_process().is_err() {
            return;
        }
        self.queue.lock().stopped = true;
        self.ring();
    }

    fn ring(&self) {
        match &self.alarm {
            Alarm::Thread(condition) => {
                condition.notify_all();
            }
            Alarm::Task(notify) => notify.notify_one(),
        }
    }

    /// Up to one frame's worth for a request to take along.
    pub(super) fn take(&self, taken: &mut Taken) {
        taken.leases.clear();
        taken.reservations.clear();
        let mut queue = self.queue.lock();
        queue.takings += 1;
        queue.urgent = false;
        take_front(&mut queue.leases, &mut taken.leases);
        take_front(&mut queue.reservations, &mut taken.reservations);
    }

    /// One look of the keeper's.
    pub(super) fn look(&self, rounds: &mut Rounds) -> Look {
        let mut queue = self.queue.lock();
        if queue.stopped {
            return Look::Stop;
        }
        let pending = !queue.leases.is_empty() || !queue.reservations.is_empty();
        let moved = queue.takings != rounds.takings;
        rounds.takings = queue.takings;
        if pending && (queue.urgent || (rounds.was_pending && !moved)) {
            rounds.was_pending = false;
            rounds.quiet = 0;
            return Look::Flush;
        }
        rounds.was_pending = pending;
        rounds.quiet = if pending || moved { 0 } else { rounds.quiet + 1 };
        if rounds.quiet < QUIET_TICKS_MAX {
            return Look::Wait;
        }
        rounds.quiet = 0;
        queue.awake = false;
        Look::Sleep
    }

    /// Waits, as the keeper thread, for a tick or an alarm.
    pub(super) fn wait(&self, longest: Option<Duration>, asleep: bool) {
        let Alarm::Thread(condition) = &self.alarm else { return };
        let mut queue = self.queue.lock();
        let ready = |queue: &mut Queue| queue.stopped || queue.urgent || (asleep && queue.awake);
        match longest {
            Some(longest) => {
                condition.wait_while_for(&mut queue, |queue| !ready(queue), longest);
            }
            None => condition.wait_while(&mut queue, |queue| !ready(queue)),
        }
    }
}

/// What the keeper remembers between two looks.
#[derive(Default)]
pub(super) struct Rounds {
    takings: u64,
    was_pending: bool,
    quiet: u32,
}

/// What the keeper does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Send what waits.
    Flush,
    /// Look again after [`FLUSH_AFTER`].
    Wait,
    /// Nothing to do until the alarm rings.
    Sleep,
    /// The client is gone.
    Stop,
}

fn take_front<T>(queue: &mut Vec<T>, taken: &mut Vec<T>) {
    if queue.len() <= KEYS_MAX {
        std::mem::swap(queue, taken);
    } else {
        taken.extend(queue.drain(..KEYS_MAX));
    }
}
