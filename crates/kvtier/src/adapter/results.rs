use std::collections::{HashMap, VecDeque};
use std::os::fd::RawFd;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::TaskId;
use super::event::Event;
use super::key::ObjectKey;

/// Completions that nobody has fetched yet. LMCache fetches each; a caller who does not is bounded here.
const RESULTS_MAX: usize = 1 << 16;
/// Notices that nobody has taken yet.
const NOTICES_MAX: usize = 1 << 16;

/// Completed tasks of one kind, and the descriptor that says so.
pub(super) struct Results<T> {
    done: Mutex<HashMap<TaskId, T>>,
    event: Event,
}

impl<T> Results<T> {
    pub(super) fn new() -> std::io::Result<Results<T>> {
        Ok(Results {
            done: Mutex::default(),
            event: Event::new()?,
        })
    }

    pub(super) fn put(&self, task: TaskId, result: T) {
        {
            let mut done = self.done.lock();
            if done.len() >= RESULTS_MAX {
                // Tasks are numbered in order: the oldest is the least likely to be asked for.
                if let Some(oldest) = done.keys().min().copied() {
                    done.remove(&oldest);
                }
            }
            done.insert(task, result);
        }
        self.event.signal();
    }

    pub(super) fn take(&self, task: TaskId) -> Option<T> {
        self.done.lock().remove(&task)
    }

    pub(super) fn take_all(&self) -> Vec<(TaskId, T)> {
        self.done.lock().drain().collect()
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.event.descriptor()
    }
}

/// Something that LMCache's listeners are to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A store ended. [`super::Adapter::publish`] lets its completion out.
    Stored {
        /// Which.
        task: TaskId,
        /// Objects that are newly known: position in the task, bytes.
        known: Vec<(usize, u64)>,
    },
    /// A load ended. [`super::Adapter::publish`] lets its completion out.
    Loaded {
        /// Which.
        task: TaskId,
        /// Positions of the objects that were loaded.
        loaded: Vec<usize>,
        /// Objects that are newly known: position in the task, bytes.
        known: Vec<(usize, u64)>,
    },
    /// Objects that the node does not have any more, with their sizes.
    Gone {
        /// Which.
        objects: Vec<(ObjectKey, u64)>,
    },
    /// A namespace was invalidated: nothing older is served, and nothing older may stay in anybody's memory.
    Invalidated {
        /// Its name.
        namespace: String,
        /// The salts of it that this process has used.
        salts: Vec<String>,
        /// In force now.
        generation: u64,
    },
}

/// Notices on their way to one taker.
#[derive(Default)]
pub(super) struct Notices {
    queue: Mutex<(VecDeque<Notice>, bool)>,
    waiting: Condvar,
}

impl Notices {
    pub(super) fn push(&self, notice: Notice) {
        let mut queue = self.queue.lock();
        if queue.0.len() < NOTICES_MAX {
            queue.0.push_back(notice);
        }
        drop(queue);
        self.waiting.notify_one();
    }

    /// All there are, or what comes within `wait`; `None` once closed.
    pub(super) fn take(&self, wait: Duration) -> Option<Vec<Notice>> {
        let mut queue = self.queue.lock();
        if queue.0.is_empty() && !queue.1 {
            self.waiting
                .wait_while_for(&mut queue, |queue| queue.0.is_empty() && !queue.1, wait);
        }
        if queue.0.is_empty() && queue.1 {
            return None;
        }
        Some(queue.0.drain(..).collect())
    }

    pub(super) fn close(&self) {
        self.queue.lock().1 = true;
        self.waiting.notify_all();
    }
}
