use std::cmp::Reverse;
use std::collections::BinaryHeap;

use kvtier_core::Time;

/// What may happen beside an arrival. Fetches and requests are named by their place in the trace.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub(super) enum Happening {
    /// The backend answered.
    FirstByte { fetch: u64, lookup_s: f64 },
    /// A block arrived.
    Part { fetch: u64, bytes: u64, took_s: f64 },
    /// Everything arrived.
    Fetched { fetch: u64, actual_s: f64 },
    /// It is known to have failed.
    Failed { fetch: u64 },
    /// A probe arrived.
    Probed { lookup_s: f64, bytes: u64, took_s: f64 },
    /// It is known that a probe failed.
    ProbeFailed,
    /// A fetch of the plan `ewma` ended.
    Averaged { lookup_s: f64, bytes_per_s: f64 },
    /// A fetch is over its soft deadline.
    Overdue { fetch: u64 },
    /// A GPU is free.
    ServerFree,
    /// A backend said that it has nothing.
    Answered { request: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Event {
    pub(super) at: Time,
    order: u64,
    pub(super) what: Happening,
}

impl Eq for Event {}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Event) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Event {
    fn cmp(&self, other: &Event) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// What will happen, in order; of two things at one time the one that was announced first.
#[derive(Default)]
pub(super) struct Events {
    heap: BinaryHeap<Reverse<Event>>,
    announced: u64,
}

impl Events {
    pub(super) fn push(&mut self, at: Time, what: Happening) {
        self.announced += 1;
        let order = self.announced;
        self.heap.push(Reverse(Event { at, order, what }));
    }

    /// When the next one is.
    pub(super) fn next_at(&self) -> Option<Time> {
        self.heap.peek().map(|Reverse(event)| event.at)
    }

    pub(super) fn pop(&mut self) -> Option<Event> {
        self.heap.pop().map(|Reverse(event)| event)
    }
}
