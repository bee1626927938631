//! What was asked of the daemon and what it acknowledged, in an order that all threads agree on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use crate::key::{Key, NAMESPACES, WORKERS};

/// A moment: each is later than those that were given before. 0 is never.
pub(crate) type Tick = u64;

/// What is known of one key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    /// When a put of it last began.
    pub(crate) tried_at: Tick,
    /// When it was acknowledged as published.
    pub(crate) sealed_at: Tick,
    /// Under which generation that was.
    pub(crate) generation: u64,
    /// When a delete of it last began.
    pub(crate) doomed_at: Tick,
    /// When a delete of it was last acknowledged.
    pub(crate) deleted_at: Tick,
    /// It was there after the latest restart.
    pub(crate) present: bool,
}

impl State {
    /// Published under this generation and, as far as this side knows, not taken back.
    pub(crate) fn is_sealed_under(&self, generation: u64) -> bool {
        self.sealed_at > self.doomed_at && self.generation == generation
    }

    /// Deleted, and not put again since.
    pub(crate) fn is_deleted(&self) -> bool {
        self.deleted_at > self.tried_at
    }
}

/// Everything that all threads know.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    clock: AtomicU64,
    /// When the latest flush that has ended began.
    flushed_at: AtomicU64,
    lanes: [[Mutex<Vec<State>>; WORKERS]; NAMESPACES.len()],
    generations: [Generations; NAMESPACES.len()],
}

/// One namespace's invalidations.
#[derive(Debug, Default)]
struct Generations {
    acknowledged: AtomicU64,
    begun_at: AtomicU64,
    /// Held by an invalidation; shared by puts that must know their generation beforehand.
    changing: RwLock<()>,
}

impl Ledger {
    pub(crate) fn tick(&self) -> Tick {
        self.clock.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// The keys of one worker in one namespace, by number.
    pub(crate) fn lane(&self, namespace: usize, worker: usize) -> MutexGuard<'_, Vec<State>> {
        self.lanes[namespace][worker]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Every key that a put was ever begun for, with its state.
    pub(crate) fn keys(&self) -> Vec<(Key, State)> {
        let lanes = (0..NAMESPACES.len()).flat_map(|namespace| (0..WORKERS).map(move |worker| (namespace, worker)));
        let states = lanes.flat_map(|(namespace, worker)| {
            let states = self.lane(namespace, worker).clone();
            (0..).zip(states).map(move |(number, state)| {
                let key = Key {
                    namespace,
                    worker,
                    number,
                };
                (key, state)
            })
        });
        states.filter(|(_, state)| state.tried_at > 0).collect()
    }

    pub(crate) fn state(&self, key: Key) -> State {
        self.lane(key.namespace, key.worker)[key.number as usize]
    }

    pub(crate) fn change(&self, key: Key, change: impl FnOnce(&mut State)) {
        change(&mut self.lane(key.namespace, key.worker)[key.number as usize]);
    }

    /// A flush has ended that began then.
    pub(crate) fn flushed(&self, begun: Tick) {
        self.flushed_at.fetch_max(begun, Ordering::SeqCst);
    }

    /// Whether a flush that has ended began after this.
    pub(crate) fn is_flushed(&self, tick: Tick) -> bool {
        tick < self.flushed_at.load(Ordering::SeqCst)
    }

    /// The highest generation that was acknowledged.
    pub(crate) fn generation(&self, namespace: usize) -> u64 {
        self.generations[namespace].acknowledged.load(Ordering::SeqCst)
    }

    /// A generation was seen to be in force. False where it is below one that was acknowledged.
    pub(crate) fn acknowledge(&self, namespace: usize, generation: u64) -> bool {
        let before = self.generations[namespace]
            .acknowledged
            .fetch_max(generation, Ordering::SeqCst);
        generation >= before
    }

    /// Runs an invalidation, while no put that must know its generation is under way.
    pub(crate) fn invalidating<E>(&self, namespace: usize, call: impl FnOnce() -> Result<u64, E>) -> Result<(), E> {
        let generations = &self.generations[namespace];
        let _alone = generations.changing.write().unwrap_or_else(PoisonError::into_inner);
        generations.begun_at.store(self.tick(), Ordering::SeqCst);
        let generation = call()?;
        self.acknowledge(namespace, generation);
        Ok(())
    }

    /// Runs a put whose bytes were made for the generation in force.
    pub(crate) fn under_generation<T>(&self, namespace: usize, call: impl FnOnce(u64) -> T) -> T {
        let changing = self.generations[namespace].changing.read();
        let _shared = changing.unwrap_or_else(PoisonError::into_inner);
        call(self.generation(namespace))
    }

    /// Whether an invalidation of the namespace began after this.
    pub(crate) fn invalidated_after(&self, namespace: usize, tick: Tick) -> bool {
        self.generations[namespace].begun_at.load(Ordering::SeqCst) > tick
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delete_that_began_takes_a_seal_back_and_a_new_seal_counts_again() {
        let ledger = Ledger::default();
        let mut state = State {
            tried_at: ledger.tick(),
            sealed_at: ledger.tick(),
            generation: 3,
            ..State::default()
        };
        assert!(state.is_sealed_under(3) && !state.is_sealed_under(4) && !state.is_deleted());
        state.doomed_at = ledger.tick();
        assert!(!state.is_sealed_under(3) && !state.is_deleted());
        state.deleted_at = ledger.tick();
        assert!(state.is_deleted());
        state.tried_at = ledger.tick();
        state.sealed_at = ledger.tick();
        assert!(state.is_sealed_under(3) && !state.is_deleted());
    }

    #[test]
    fn a_generation_below_an_acknowledged_one_is_seen() {
        let ledger = Ledger::default();
        assert!(ledger.acknowledge(1, 5));
        assert!(ledger.acknowledge(1, 5));
        assert!(!ledger.acknowledge(1, 4));
        assert_eq!((ledger.generation(0), ledger.generation(1)), (0, 5));
        let before = ledger.tick();
        ledger.invalidating(1, || Ok::<u64, ()>(6)).expect("acknowledged");
        assert!(ledger.invalidated_after(1, before) && !ledger.invalidated_after(0, before));
    }
}
