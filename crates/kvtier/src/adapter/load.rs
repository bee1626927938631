use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvtier_core::{BlockHash, FetchScope};
use kvtier_transfer::memory::ForeignSlice;
use tokio::task::JoinSet;

use super::TaskId;
use super::copying::{Copying, Direction, Held};
use super::engine::{Ended, Engine, PUBLISH_PATIENCE, Transfer, count};
use super::key::{ObjectKey, Place};
use super::results::Notice;

/// One load: what to bring, and where to.
pub(super) struct Load {
    pub(super) keys: Vec<ObjectKey>,
    pub(super) pages: Vec<ForeignSlice>,
    pub(super) until: Instant,
    transfer: Arc<Transfer>,
    loaded: Vec<AtomicBool>,
}

impl Load {
    pub(super) fn new(keys: Vec<ObjectKey>, pages: Vec<ForeignSlice>, timeout: Duration) -> Arc<Load> {
        Arc::new(Load {
            loaded: keys.iter().map(|_| AtomicBool::new(false)).collect(),
            keys,
            pages,
            until: Instant::now() + timeout,
            transfer: Transfer::new(),
        })
    }
}

impl Engine {
    pub(super) async fn load(self: Arc<Engine>, task: TaskId, load: Arc<Load>) {
        if self.is_up() {
            let ended = self.within(load.until, self.load_all(&load)).await;
            if ended == Ended::Late {
                count(&self.counters.load_deadlines, 1);
                if load.transfer.asked.load(Ordering::Acquire) > 0 {
                    self.stalled();
                }
            }
            load.transfer.close().await;
        } else {
            count(&self.counters.unreachable, 1);
        }
        let loaded: Vec<bool> = load
            .loaded
            .iter()
            .map(|loaded| loaded.load(Ordering::Acquire))
            .collect();
        let hits: Vec<usize> = (0..loaded.len()).filter(|at| loaded[*at]).collect();
        let bytes = hits.iter().map(|at| load.pages[*at].len() as u64).sum();
        count(&self.counters.loaded_objects, hits.len() as u64);
        count(&self.counters.loaded_bytes, bytes);
        count(&self.counters.load_misses, (loaded.len() - hits.len()) as u64);
        if !hits.is_empty() {
            let known = self.learn(&load.keys, hits.iter().map(|at| (*at, load.pages[*at].len() as u64)));
            let notice = Notice::Loaded {
                task,
                loaded: hits,
                known,
            };
            self.announce(task, notice, PUBLISH_PATIENCE).await;
        }
        // Nothing points at the pages when LMCache hears of it.
        drop(load);
        self.loads.put(task, loaded);
    }

    /// Notes objects that were stored or found; those that were not known.
    pub(super) fn learn(&self, keys: &[ObjectKey], found: impl Iterator<Item = (usize, u64)>) -> Vec<(usize, u64)> {
        let mut directory = self.directory.lock();
        found
            .filter(|(at, bytes)| directory.insert(&keys[*at], *bytes))
            .collect()
    }

    async fn load_all(self: &Arc<Engine>, load: &Arc<Load>) {
        let places = load.keys.iter().zip(&load.pages).enumerate();
        let places = places.map(|(at, (key, page))| (at, Place::of(key, page.len() as u64)));
        let mut windows = JoinSet::new();
        for (place, positions) in self.windows(places, self.settings.window_bytes) {
            windows.spawn(Arc::clone(self).load_window(Arc::clone(load), place, positions));
        }
        while windows.join_next().await.is_some() {}
    }

    async fn load_window(self: Arc<Engine>, load: Arc<Load>, place: Place, positions: Vec<usize>) {
        let Some(_room) = self.load_room(place.bytes * positions.len() as u64).await else {
            return;
        };
        let Some(namespace) = load.transfer.ask(self.place(&place)).await else {
            return;
        };
        let name = self.name_of(&place);
        // In force before the node is asked: whatever is newer when the copy has ended makes it a miss.
        let before = self.generations.lock().seen(&name);
        let hashes: Vec<BlockHash> = positions.iter().map(|at| load.keys[*at].block_hash()).collect();
        let patience = load.until.saturating_duration_since(Instant::now());
        let namespace = namespace.with_deadline(patience.max(Duration::from_millis(1)));
        let handles = match load.transfer.ask(namespace.get(&hashes, FetchScope::Each)).await {
            Ok(handles) => handles,
            Err(error) => {
                self.failed(&error);
                return;
            }
        };
        let (mut pairs, mut held, mut found) = (Vec::new(), Vec::new(), Vec::new());
        for (at, handle) in positions.into_iter().zip(handles) {
            let page = &load.pages[at];
            if let Some(handle) = handle.filter(|handle| handle.len() == page.len()) {
                pairs.push((page.clone(), handle.slice().clone()));
                held.push(handle);
                found.push(at);
            }
        }
        if let Ok(generation) = namespace.generation().await {
            self.observe(&name, generation);
        }
        let copying = Copying::new(Direction::Load, pairs, Held::Blocks(held));
        if !load.transfer.copy(&self, &copying).await {
            return;
        }
        if self.generations.lock().seen(&name) == before {
            for at in found {
                load.loaded[at].store(true, Ordering::Release);
            }
        }
        drop(copying.take_held());
    }
}
