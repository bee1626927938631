//! Replies that are decided after their request: how they find the connection's own thread.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kvtier_core::{Fetched, Generation, Reserved, SegmentId, Tier};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

/// What a connection's thread still has to tell its client.
#[derive(Debug)]
pub(crate) enum Notice {
    /// A fetch that waited is decided.
    Fetched { request: u64, results: Vec<Fetched> },
    /// A lookup that asked peers is answered.
    Found {
        request: u64,
        generation: Generation,
        tiers: Vec<Option<Tier>>,
    },
    /// What would be decided about a fetch; `Err`: why nothing would be.
    Explained { request: u64, json: Result<String, String> },
    /// A reserve that waited is decided.
    Reserved { request: u64, results: Vec<Reserved> },
    /// An invalidation is durable.
    Invalidated { request: u64, generation: Generation },
    /// A flush is done.
    Flushed { request: u64, written: u64, left_out: u64 },
    /// What a watch waits for.
    Changed { request: u64 },
    /// A host segment is gone: unmap it.
    SegmentRemoved { segment: SegmentId },
}

/// A connection's queue of notices. Bounded by what waits: each decided request leaves one, each closed segment one.
#[derive(Debug)]
pub(crate) struct Outbox {
    notices: Mutex<VecDeque<Notice>>,
    wake: OwnedFd,
}

impl Outbox {
    pub(crate) fn new() -> std::io::Result<Outbox> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Outbox {
            notices: Mutex::new(VecDeque::new()),
            wake,
        })
    }

    /// Queues a notice and wakes the thread if it waits in [`Outbox::wake_fd`].
    pub(crate) fn push(&self, notice: Notice) {
        self.notices.lock().push_back(notice);
        self.wake();
    }

    /// Queues a notice that can wait for the connection's next request.
    pub(crate) fn push_quietly(&self, notice: Notice) {
        self.notices.lock().push_back(notice);
    }

    pub(crate) fn wake(&self) {
        // A full counter already wakes; nothing else can go wrong with an eventfd of our own.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(crate) fn drain(&self) -> VecDeque<Notice> {
        let mut counter = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut counter);
        std::mem::take(&mut *self.notices.lock())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.notices.lock().is_empty()
    }

    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
