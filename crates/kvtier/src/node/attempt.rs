//! A client's fetch while blocks are read for it from elsewhere, and who has it answered early.
//!
//! A fetch that the cost model decided on has a soft deadline. One that is over it is judged: where what is left would take longer than a
//! recomputation the client is answered with what is here, and the reading thread goes on. What still arrives is sealed as ever, so that
//! the next fetch finds it. A thread of its own judges, as one that reads may be moving bytes itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::driver::Driver;
use super::peers::FetchJob;
use super::peers::weighing::{Fetching, Overdue, Weighing};

/// See the module. It is answered once.
pub(super) struct Attempt {
    pub(super) job: FetchJob,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    answered: bool,
    /// Goes up when a backend begins or ends: who judges may be late.
    round: u32,
    /// Places among the client's keys of what came from peers before the answer.
    copied: Vec<usize>,
}

/// Of one backend: what became of fetches that were over their soft deadline.
#[derive(Default)]
pub(super) struct Late {
    /// Fetches whose clients were answered before they ended.
    pub(super) given_up: AtomicU64,
    /// Blocks that came after the answer.
    pub(super) blocks: AtomicU64,
}

/// Attempts that are to be judged: one for each reading thread at most, and for a moment those that have just ended.
#[derive(Default)]
pub(super) struct Patience {
    watched: Mutex<Vec<Watched>>,
    changed: Condvar,
}

struct Watched {
    attempt: Arc<Attempt>,
    round: u32,
    late: Arc<Late>,
    overdue: Overdue,
    at: Instant,
}

impl Attempt {
    pub(super) fn new(job: FetchJob) -> Arc<Attempt> {
        Arc::new(Attempt {
            job,
            state: Mutex::default(),
        })
    }

    /// Whether the client has its answer.
    pub(super) fn is_answered(&self) -> bool {
        self.state.lock().answered
    }

    /// Answers with what is here, unless that was done.
    pub(super) fn answer(&self, driver: &Driver) {
        self.answer_now(driver, &mut self.state.lock());
    }

    fn answer_now(&self, driver: &Driver, state: &mut State) {
        if !std::mem::replace(&mut state.answered, true) {
            self.job.answer(driver, &state.copied);
        }
    }

    /// Keeps what `seal` publishes: for the answer, or where that was given, for the next fetch.
    pub(super) fn keep(&self, late: &Late, seal: impl FnOnce() -> Vec<usize>) {
        // Under the lock, so that what is published is in the answer or counted as late, and never both.
        let mut state = self.state.lock();
        let sealed = seal();
        if state.answered {
            late.blocks.fetch_add(sealed.len() as u64, Ordering::Relaxed);
        } else {
            state.copied.extend(sealed);
        }
    }
}

impl Patience {
    /// Has an attempt judged when it is over its soft deadline.
    pub(super) fn watch(&self, attempt: &Arc<Attempt>, late: &Arc<Late>, fetching: &Fetching) {
        let overdue = fetching.overdue();
        let round = {
            let mut state = attempt.state.lock();
            state.round += 1;
            state.round
        };
        let watched = Watched {
            attempt: Arc::clone(attempt),
            round,
            late: Arc::clone(late),
            at: overdue.at.min(attempt.job.deadline),
            overdue,
        };
        self.watched.lock().push(watched);
        self.changed.notify_all();
    }

    /// Before the model learns that it ended: what it does not know any more it would give up.
    pub(super) fn end(&self, attempt: &Arc<Attempt>) {
        attempt.state.lock().round += 1;
        self.watched
            .lock()
            .retain(|watched| !Arc::ptr_eq(&watched.attempt, attempt));
    }

    pub(super) fn stop(&self) {
        let _watched = self.watched.lock();
        self.changed.notify_all();
    }
}

impl Patience {
    /// The judging thread.
    pub(super) fn judge_attempts(&self, weighing: &Weighing, driver: &Driver, is_stopping: impl Fn() -> bool) {
        let mut watched = self.watched.lock();
        while !is_stopping() {
            let first = (0..watched.len()).min_by_key(|&place| watched[place].at);
            match first {
                None => self.changed.wait(&mut watched),
                Some(place) if watched[place].at <= Instant::now() => {
                    let mut due = watched.swap_remove(place);
                    drop(watched);
                    let again = judge(weighing, driver, &due);
                    watched = self.watched.lock();
                    if let Some(at) = again {
                        due.at = at;
                        watched.push(due);
                    }
                }
                Some(place) => {
                    let at = watched[place].at;
                    self.changed.wait_until(&mut watched, at);
                }
            }
        }
    }
}

/// When to judge again; `None`: the client is answered.
fn judge(weighing: &Weighing, driver: &Driver, watched: &Watched) -> Option<Instant> {
    let attempt = &watched.attempt;
    let mut state = attempt.state.lock();
    if state.answered || state.round != watched.round {
        return None;
    }
    // The client's own patience ends, too.
    if Instant::now() < attempt.job.deadline {
        if let Some(again) = weighing.judge(driver.clock.now(), &watched.overdue) {
            return Some(again.min(attempt.job.deadline));
        }
        watched.late.given_up.fetch_add(1, Ordering::Relaxed);
    }
    attempt.answer_now(driver, &mut state);
    None
}
