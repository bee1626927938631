//! One queue pair to a peer and what is in flight on it.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::{Shared, Slice};
use crate::rdma::nic::{Claim, Completed, Nic, draw_taker};
use crate::rdma::verbs::{Completion, PostError, QueuePair, Work};

pub(super) struct Lane {
    pub(super) number: u32,
    /// Index of the rail and of the slot in it.
    pub(super) rail: usize,
    pub(super) slot: usize,
    /// Index of the local NIC.
    pub(super) local: usize,
    pub(super) flight: Mutex<Flight>,
    /// None once destroyed: from then on the device touches nothing of its flight.
    pair: Mutex<Option<QueuePair>>,
    pub(super) depth: usize,
    /// Whether completions come in the order of requests.
    pub(super) is_ordered: bool,
    nic: Arc<Nic>,
    _claim: Claim,
    peer: Weak<Shared>,
    this: Weak<Lane>,
}

#[derive(Default)]
pub(super) struct Flight {
    /// In the order of posting.
    pub(super) queue: VecDeque<(u64, Slice)>,
    next: u32,
    unsignalled: u32,
}

impl Flight {
    /// The id of the next request.
    pub(super) fn draw(&mut self, number: u32) -> u64 {
        self.next = self.next.wrapping_add(1);
        u64::from(number) << 32 | u64::from(self.next)
    }

    /// Whether the next request is to report its completion.
    pub(super) fn signal(&mut self, is_last: bool, every: u32) -> bool {
        self.unsignalled += 1;
        let signalled = is_last || self.unsignalled >= every;
        if signalled {
            self.unsignalled = 0;
        }
        signalled
    }
}

/// Where a lane belongs.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) rail: usize,
    pub(super) slot: usize,
    pub(super) local: usize,
}

impl Lane {
    pub(super) fn new(place: Place, pair: QueuePair, nic: &Arc<Nic>, claim: Claim, peer: &Weak<Shared>) -> Arc<Lane> {
        let lane = Arc::new_cyclic(|this| Lane {
            number: draw_taker(),
            rail: place.rail,
            slot: place.slot,
            local: place.local,
            flight: Mutex::default(),
            pair: Mutex::new(Some(pair)),
            depth: nic.lane_depth(claim.depth),
            is_ordered: nic.is_ordered(),
            nic: Arc::clone(nic),
            _claim: claim,
            peer: Weak::clone(peer),
            this: Weak::clone(this),
        });
        let taker: Weak<dyn Completed> = Arc::downgrade(&lane) as _;
        nic.deliver(lane.number, taker);
        lane
    }

    pub(super) fn post(&self, works: &[Work]) -> Result<(), PostError> {
        match &*self.pair.lock() {
            Some(pair) => pair.post(works),
            None => Err(PostError {
                posted: 0,
                source: std::io::ErrorKind::NotConnected.into(),
            }),
        }
    }

    /// Lets go of the memory of a request and all before it.
    pub(super) fn complete(&self, id: u64) {
        if let Some(pair) = &*self.pair.lock() {
            pair.complete(id);
        }
    }

    /// Whether the peer has ended its connection; only iWARP has one.
    pub(super) fn has_ended(&self) -> bool {
        !self.is_ordered && self.pair.lock().as_ref().is_some_and(QueuePair::has_ended)
    }

    /// Asks the device to flush it. If it cannot, destroying it later does.
    pub(super) fn stop(&self) {
        if let Some(pair) = &*self.pair.lock() {
            let _ = pair.stop();
        }
    }

    /// Destroys the queue pair. What was in flight is at rest now, and comes back.
    pub(super) fn destroy(&self) -> Vec<Slice> {
        drop(self.pair.lock().take());
        self.flight.lock().queue.drain(..).map(|(_, slice)| slice).collect()
    }
}

impl Completed for Lane {
    fn completed(&self, completions: &[Completion]) {
        if let (Some(peer), Some(lane)) = (self.peer.upgrade(), self.this.upgrade()) {
            peer.completed(&lane, completions);
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.nic.undeliver(self.number);
    }
}
