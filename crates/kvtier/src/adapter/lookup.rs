use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_core::BlockHash;
use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::TaskId;
use super::engine::{Ended, Engine, Transfer, count};
use super::key::{ObjectKey, Place};
use super::results::Notice;

/// One lookup. `bytes` are the sizes that LMCache says the objects have, where it does.
pub(super) struct Lookup {
    keys: Vec<ObjectKey>,
    bytes: Vec<Option<u64>>,
    until: Instant,
    found: Mutex<Vec<Option<u64>>>,
}

impl Lookup {
    pub(super) fn new(keys: Vec<ObjectKey>, bytes: Vec<Option<u64>>, timeout: Duration) -> Arc<Lookup> {
        Arc::new(Lookup {
            found: Mutex::new(vec![None; keys.len()]),
            bytes,
            keys,
            until: Instant::now() + timeout,
        })
    }
}

impl Engine {
    pub(super) async fn lookup(self: Arc<Engine>, task: TaskId, lookup: Arc<Lookup>) {
        let mut ended = Ended::Stopped;
        if self.is_up() {
            let transfer = Transfer::new();
            ended = self.within(lookup.until, self.look_up(&lookup, &transfer)).await;
            if ended == Ended::Late {
                count(&self.counters.lookup_deadlines, 1);
                self.stalled();
            }
        } else {
            count(&self.counters.unreachable, 1);
        }
        let found = std::mem::take(&mut *lookup.found.lock());
        let hits: Vec<ObjectKey> = {
            let hits = found.iter().zip(&lookup.keys).filter(|(found, _)| found.is_some());
            hits.map(|(_, key)| key.clone()).collect()
        };
        count(&self.counters.lookup_hits, hits.len() as u64);
        count(&self.counters.lookup_misses, (found.len() - hits.len()) as u64);
        {
            let now = Instant::now();
            let mut locks = self.locks.lock();
            hits.iter().for_each(|key| locks.lock(key, now));
        }
        self.lookups.put(task, found.iter().map(Option::is_some).collect());
        if ended == Ended::Done && self.is_up() {
            self.correct(&lookup.keys, &found);
            if !hits.is_empty() {
                let patience = Duration::from_millis(self.settings.load_timeout_ms);
                let lease = Arc::clone(&self).lease(hits);
                // Nobody waits for it: where it is late the load asks for itself.
                self.within(Instant::now() + patience, lease).await;
            }
        }
    }

    /// What was known and is not there any more is forgotten.
    fn correct(&self, keys: &[ObjectKey], found: &[Option<u64>]) {
        let mut gone = Vec::new();
        {
            let mut directory = self.directory.lock();
            for (key, found) in keys.iter().zip(found) {
                if found.is_none()
                    && let Some(bytes) = directory.remove(key)
                {
                    gone.push((key.clone(), bytes));
                }
            }
        }
        if !gone.is_empty() && self.settings.notices {
            self.notices.push(Notice::Gone { objects: gone });
        }
    }

    async fn look_up(self: &Arc<Engine>, lookup: &Arc<Lookup>, transfer: &Arc<Transfer>) {
        // Each key is looked for in the one size that LMCache says, or in those that are known, the likeliest first.
        let mut candidates: Vec<Vec<u64>> = {
            let mut directory = self.directory.lock();
            let keys = lookup.keys.iter().zip(&lookup.bytes);
            let sizes = keys.map(|(key, bytes)| match bytes {
                Some(bytes) => {
                    directory.learn(key, *bytes);
                    vec![*bytes]
                }
                None => directory.sizes(key),
            });
            sizes.collect()
        };
        candidates.iter_mut().for_each(|sizes| sizes.reverse());
        loop {
            let next: Vec<(usize, Place)> = {
                let found = lookup.found.lock();
                let open = (0..lookup.keys.len()).filter(|at| found[*at].is_none());
                open.filter_map(|at| Some((at, Place::of(&lookup.keys[at], candidates[at].pop()?))))
                    .collect()
            };
            if next.is_empty() {
                return;
            }
            let mut windows = self.windows(next.into_iter(), u64::MAX);
            let Some((place, positions)) = windows.pop() else {
                return;
            };
            // All are on their way before the first is waited for.
            let mut others = JoinSet::new();
            for (place, positions) in windows {
                let (engine, lookup, transfer) = (Arc::clone(self), Arc::clone(lookup), Arc::clone(transfer));
                others.spawn(async move { engine.look_up_window(&lookup, &transfer, &place, &positions).await });
            }
            self.look_up_window(lookup, transfer, &place, &positions).await;
            while others.join_next().await.is_some() {}
        }
    }

    async fn look_up_window(
        self: &Arc<Engine>,
        lookup: &Lookup,
        transfer: &Transfer,
        place: &Place,
        positions: &[usize],
    ) {
        let Some(namespace) = transfer.ask(self.place(place)).await else {
            return;
        };
        let hashes: Vec<BlockHash> = positions.iter().map(|at| lookup.keys[*at].block_hash()).collect();
        match transfer.ask(namespace.lookup(&hashes)).await {
            Ok(tiers) => {
                let mut found = lookup.found.lock();
                for (at, tier) in positions.iter().zip(tiers) {
                    if tier.is_some() && found.get(*at).is_some() {
                        found[*at] = Some(place.bytes);
                    }
                }
            }
            Err(error) => self.failed(&error),
        }
    }
}
