use std::collections::VecDeque;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::engine::{EngineError, Priority, Request, SWEEP_INTERVAL};

/// After this many foreground requests in a row one of the background goes, if one waits: it must not starve.
pub(super) const FOREGROUND_TURNS: u32 = 16;

/// Requests that the device was not asked for yet: bounded, foreground first. Both engines take from it.
pub(super) struct RequestQueue {
    lanes: Mutex<Lanes>,
    /// For who takes requests.
    changed: Condvar,
    /// For who watches over deadlines.
    watched: Condvar,
    capacity: usize,
}

#[derive(Default)]
struct Lanes {
    foreground: VecDeque<Request>,
    background: VecDeque<Request>,
    foreground_turns: u32,
    closed: bool,
    /// The thread that watches deadlines waits for a first request.
    watcher_asleep: bool,
}

impl Lanes {
    fn len(&self) -> usize {
        self.foreground.len() + self.background.len()
    }

    fn take(&mut self, background_allowed: bool) -> Option<Request> {
        let background_turn = self.foreground.is_empty() || self.foreground_turns >= FOREGROUND_TURNS;
        if background_allowed
            && background_turn
            && let Some(request) = self.background.pop_front()
        {
            self.foreground_turns = 0;
            return Some(request);
        }
        self.foreground_turns = self.foreground_turns.saturating_add(1);
        self.foreground.pop_front()
    }
}

impl RequestQueue {
    pub(super) fn new(capacity: usize) -> RequestQueue {
        RequestQueue {
            lanes: Mutex::new(Lanes::default()),
            changed: Condvar::new(),
            watched: Condvar::new(),
            capacity: capacity.max(1),
        }
    }

    /// Hands the request back when the queue is full or closed.
    pub(super) fn push(&self, request: Request) -> Result<(), Request> {
        let mut lanes = self.lanes.lock();
        if lanes.closed || lanes.len() >= self.capacity {
            return Err(request);
        }
        match request.priority {
            Priority::Foreground => lanes.foreground.push_back(request),
            Priority::Background => lanes.background.push_back(request),
        }
        let wake_watcher = std::mem::take(&mut lanes.watcher_asleep);
        drop(lanes);
        self.changed.notify_one();
        if wake_watcher {
            self.watched.notify_one();
        }
        Ok(())
    }

    /// The next request, without waiting. With `background_allowed` false only from the foreground.
    pub(super) fn take(&self, background_allowed: bool) -> Option<Request> {
        self.lanes.lock().take(background_allowed)
    }

    /// The next request; `None` once the queue is closed and empty.
    pub(super) fn wait(&self) -> Option<Request> {
        let mut lanes = self.lanes.lock();
        loop {
            if let Some(request) = lanes.take(true) {
                return Some(request);
            }
            if lanes.closed {
                return None;
            }
            self.changed.wait(&mut lanes);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lanes.lock().len() == 0
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lanes.lock().closed
    }

    /// Refuses what comes later.
    pub(super) fn close(&self) {
        self.lanes.lock().closed = true;
        self.changed.notify_all();
        self.watched.notify_all();
    }

    /// Finishes late requests while others hold up the device, until the queue is closed. Sleeps while nothing waits.
    pub(super) fn watch_deadlines(&self) {
        loop {
            {
                let mut lanes = self.lanes.lock();
                while lanes.len() == 0 && !lanes.closed {
                    lanes.watcher_asleep = true;
                    self.watched.wait(&mut lanes);
                }
                lanes.watcher_asleep = false;
                if lanes.closed {
                    return;
                }
                let next = Instant::now() + SWEEP_INTERVAL;
                while !lanes.closed && !self.watched.wait_until(&mut lanes, next).timed_out() {}
            }
            self.expire(Instant::now());
        }
    }

    /// Finishes everything that waits.
    pub(super) fn cancel(&self) {
        let cancelled: Vec<Request> = {
            let mut lanes = self.lanes.lock();
            let Lanes {
                foreground, background, ..
            } = &mut *lanes;
            foreground.drain(..).chain(background.drain(..)).collect()
        };
        for request in cancelled {
            request.finish(Err(EngineError::Cancelled), false);
        }
    }

    /// Finishes what waited past its deadline.
    pub(super) fn expire(&self, now: Instant) {
        let mut expired = Vec::new();
        {
            let mut lanes = self.lanes.lock();
            let Lanes {
                foreground, background, ..
            } = &mut *lanes;
            for lane in [foreground, background] {
                for _ in 0..lane.len() {
                    let Some(request) = lane.pop_front() else { break };
                    if is_late(&request, now) {
                        expired.push(request)
                    } else {
                        lane.push_back(request)
                    }
                }
            }
        }
        for request in expired {
            request.finish(Err(EngineError::Deadline), false);
        }
    }
}

pub(super) fn is_late(request: &Request, now: Instant) -> bool {
    request.deadline.is_some_and(|deadline| deadline <= now)
}
