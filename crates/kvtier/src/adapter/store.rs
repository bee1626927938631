use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use kvtier_core::{BlockHash, Generation, Parent};
use kvtier_transfer::memory::ForeignSlice;
use tokio::task::JoinSet;

use super::copying::{Copying, Direction, Held};
use super::engine::{Ended, Engine, STORE_PUBLISH_PATIENCE, Transfer, count};
use super::key::{ObjectKey, Place};
use super::results::Notice;
use super::settings::FailedStores;
use super::{StoreResult, TaskId};
use crate::client::{Lineage, PutOutcome, Writing};

const FAILED: u8 = 0;
const PUBLISHED: u8 = 1;
const PRESENT: u8 = 2;

/// A store that finds no room asks again after this, and then after twice as long each time.
const ROOM_PAUSE: Duration = Duration::from_millis(5);
const ROOM_PAUSE_LONGEST: Duration = Duration::from_millis(100);

/// One store: what to bring to the node.
pub(super) struct Store {
    keys: Vec<ObjectKey>,
    pages: Vec<ForeignSlice>,
    /// What each object's namespace was clean for when the store began.
    began_under: Vec<Option<Generation>>,
    until: Instant,
    transfer: Arc<Transfer>,
    outcomes: Vec<AtomicU8>,
}

impl Engine {
    /// Called by LMCache's thread, so that what is invalidated from here on makes the store stale.
    pub(super) fn begin_store(&self, keys: Vec<ObjectKey>, pages: Vec<ForeignSlice>) -> Arc<Store> {
        if !self.is_up() {
            self.note(&keys);
        }
        let began_under = {
            let generations = self.generations.lock();
            let name = |key: &ObjectKey| super::key::namespace_of(&self.settings, &key.salt);
            keys.iter().map(|key| generations.clean(&name(key))).collect()
        };
        Arc::new(Store {
            outcomes: keys.iter().map(|_| AtomicU8::new(FAILED)).collect(),
            keys,
            pages,
            began_under,
            until: Instant::now() + Duration::from_millis(self.settings.store_timeout_ms),
            transfer: Transfer::new(),
        })
    }

    pub(super) async fn store(self: Arc<Engine>, task: TaskId, store: Arc<Store>) {
        if self.is_up() {
            let ended = self.within(store.until, self.store_all(&store)).await;
            if ended == Ended::Late {
                count(&self.counters.store_deadlines, 1);
                if store.transfer.asked.load(Ordering::Acquire) > 0 {
                    self.stalled();
                }
            }
            store.transfer.close().await;
        } else {
            count(&self.counters.unreachable, 1);
        }
        let (mut bytes, mut kept) = (0, Vec::new());
        for (at, outcome) in store.outcomes.iter().enumerate() {
            let length = store.pages[at].len() as u64;
            match outcome.load(Ordering::Acquire) {
                PUBLISHED => bytes += length,
                PRESENT => {}
                _ => continue,
            }
            kept.push((at, length));
        }
        let failed = store.keys.len() - kept.len();
        count(&self.counters.stored_objects, kept.len() as u64);
        count(&self.counters.stored_bytes, bytes);
        count(&self.counters.store_failures, failed as u64);
        if !kept.is_empty() {
            let known = self.learn(&store.keys, kept.into_iter());
            self.announce(task, Notice::Stored { task, known }, STORE_PUBLISH_PATIENCE)
                .await;
        }
        // Nothing points at the pages when LMCache hears of it.
        drop(store);
        let success = failed == 0 || self.settings.failed_stores == FailedStores::Drop;
        self.stores.put(task, StoreResult { success, bytes });
    }

    async fn store_all(self: &Arc<Engine>, store: &Arc<Store>) {
        let refused: Vec<bool> = {
            let mut refused = self.refused.lock();
            store
                .keys
                .iter()
                .map(|key| !refused.is_empty() && refused.remove(key))
                .collect()
        };
        let places = store.keys.iter().zip(&store.pages).enumerate();
        let places = places
            .filter(|(at, _)| !refused[*at])
            .map(|(at, (key, page))| (at, Place::of(key, page.len() as u64)));
        let mut windows = JoinSet::new();
        for (place, positions) in self.windows(places, self.settings.window_bytes) {
            windows.spawn(Arc::clone(self).store_window(Arc::clone(store), place, positions));
        }
        while windows.join_next().await.is_some() {}
    }

    async fn store_window(self: Arc<Engine>, store: Arc<Store>, place: Place, positions: Vec<usize>) {
        let Some(_room) = self.store_room(place.bytes * positions.len() as u64).await else {
            return;
        };
        let Some(namespace) = store.transfer.ask(self.place(&place)).await else {
            return;
        };
        let room_patience = Duration::from_millis(self.settings.store_room_ms);
        let namespace = namespace.with_deadline(room_patience);
        let room_until = Instant::now() + room_patience;
        let length = u32::try_from(place.bytes).unwrap_or(u32::MAX);
        let (mut positions, mut pause) = (positions, ROOM_PAUSE);
        loop {
            let blocks: Vec<(BlockHash, u32)> = positions
                .iter()
                .map(|at| (store.keys[*at].block_hash(), length))
                .collect();
            let asked = namespace.writers(Lineage::Independent, &blocks, self.settings.tokens_per_chunk);
            let slots = match store.transfer.ask(asked).await {
                Ok(slots) => slots,
                Err(error) => {
                    self.failed(&error);
                    return;
                }
            };
            let (mut pairs, mut held, mut writing, mut without_room) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            for (at, slot) in positions.into_iter().zip(slots) {
                match slot {
                    Writing::Present => store.outcomes[at].store(PRESENT, Ordering::Release),
                    Writing::Busy => without_room.push(at),
                    Writing::Open(writer) => {
                        let generation = writer.generation();
                        if store.began_under[at].is_some_and(|began| began != generation) {
                            count(&self.counters.store_stale, 1);
                            self.observe(&self.name_of(&place), generation);
                            continue;
                        }
                        pairs.push((store.pages[at].clone(), writer.slice().clone()));
                        held.push(writer.behind(store.parent(at)));
                        writing.push(at);
                    }
                }
            }
            let progress = !writing.is_empty();
            if progress {
                let copying = Copying::new(Direction::Store, pairs, Held::Slots(held));
                if !store.transfer.copy(&self, &copying).await {
                    return;
                }
                let Some(Held::Slots(written)) = copying.take_held() else {
                    return;
                };
                match store.transfer.ask(namespace.seal(written)).await {
                    Ok(outcomes) => {
                        for (at, outcome) in writing.into_iter().zip(outcomes) {
                            let outcome = match outcome {
                                PutOutcome::Published => PUBLISHED,
                                PutOutcome::Present => PRESENT,
                                PutOutcome::Stale => {
                                    count(&self.counters.store_stale, 1);
                                    FAILED
                                }
                                PutOutcome::Busy | PutOutcome::Invalid => FAILED,
                            };
                            store.outcomes[at].store(outcome, Ordering::Release);
                        }
                    }
                    Err(error) => {
                        self.failed(&error);
                        return;
                    }
                }
            }
            if without_room.is_empty() || (!progress && Instant::now() >= room_until) {
                return;
            }
            if !progress {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(ROOM_PAUSE_LONGEST);
            }
            positions = without_room;
        }
    }
}

impl Store {
    /// LMCache gives keys in prefix order; a row begins where model, rank, group or salt change.
    fn parent(&self, at: usize) -> Parent {
        let Some(before) = at.checked_sub(1) else {
            return Parent::Unknown;
        };
        if self.keys[before].is_in_row_of(&self.keys[at]) {
            Parent::Block(self.keys[before].block_hash())
        } else {
            Parent::Unknown
        }
    }
}
