use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvtier_core::{BlockHash, FetchScope, Generation, Tier};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot, watch};

use super::copying::{Copiers, Copying};
use super::directory::Directory;
use super::generations::Generations;
use super::key::{ObjectKey, Place, namespace_of};
use super::link::{Health, Link, PlaceError};
use super::locks::Locks;
use super::results::{Notice, Notices, Results};
use super::{AdapterSettings, StoreResult, TaskId};
use crate::client::{ClientError, Namespace};

/// What the semaphores count.
const ROOM_UNIT: u64 = 64 << 10;
/// How often leases and locks are looked after.
const TICK: Duration = Duration::from_millis(500);
/// A notice that nobody acts on holds its completion back no longer than this.
pub(super) const PUBLISH_PATIENCE: Duration = Duration::from_millis(50);
/// As long for a store: nobody computes until it ends, and LMCache's accounts are wrong where nobody was told.
pub(super) const STORE_PUBLISH_PATIENCE: Duration = Duration::from_millis(500);
/// Keys of one request.
const WINDOW_KEYS_MAX: usize = 1024;

/// What all tasks share. The tasks run on one thread, copies on others.
pub(super) struct Engine {
    pub(super) settings: AdapterSettings,
    pub(super) link: Link,
    pub(super) locks: Mutex<Locks>,
    pub(super) directory: Mutex<Directory>,
    pub(super) generations: Mutex<Generations>,
    pub(super) stores: Results<StoreResult>,
    pub(super) lookups: Results<Vec<bool>>,
    pub(super) loads: Results<Vec<bool>>,
    pub(super) notices: Notices,
    pub(super) counters: Counters,
    /// Objects whose next store is refused: their bytes were begun under an older generation.
    pub(super) refused: Mutex<HashSet<ObjectKey>>,
    copiers: Mutex<Option<Copiers>>,
    load_room: Semaphore,
    store_room: Semaphore,
    publishing: Mutex<std::collections::HashMap<TaskId, oneshot::Sender<()>>>,
    stopping: watch::Sender<bool>,
    pub(super) tasks: AtomicUsize,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What happened since the start.
        #[derive(Default)]
        pub(super) struct Counters { $($(#[$doc])* pub(super) $name: AtomicU64,)* }

        impl Counters {
            pub(super) fn fields(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    /// Objects stored or found present.
    stored_objects,
    /// Bytes copied to the node.
    stored_bytes,
    /// Objects that could not be stored.
    store_failures,
    /// Objects refused because they were begun under an older generation.
    store_stale,
    /// Objects found by lookups.
    lookup_hits,
    /// Objects not found.
    lookup_misses,
    /// Objects loaded.
    loaded_objects,
    /// Their bytes.
    loaded_bytes,
    /// Objects of loads that were not there, or not in this form.
    load_misses,
    /// Loads that reached their deadline.
    load_deadlines,
    /// Lookups that reached their deadline.
    lookup_deadlines,
    /// Stores that reached their deadline.
    store_deadlines,
    /// Tasks answered at once because the node was not reachable.
    unreachable,
    /// Tasks refused because too many were in flight.
    refused_tasks,
    /// Namespaces invalidated while in use.
    invalidations,
}

pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Engine {
    pub(super) fn new(settings: AdapterSettings) -> io::Result<Engine> {
        let units = usize::try_from(settings.in_flight_bytes_max.div_ceil(ROOM_UNIT)).unwrap_or(usize::MAX);
        let units = units.clamp(1, Semaphore::MAX_PERMITS);
        Ok(Engine {
            link: Link::new(&settings),
            locks: Mutex::default(),
            directory: Mutex::new(Directory::new(settings.directory_keys_max)),
            generations: Mutex::default(),
            stores: Results::new()?,
            lookups: Results::new()?,
            loads: Results::new()?,
            notices: Notices::default(),
            counters: Counters::default(),
            refused: Mutex::default(),
            copiers: Mutex::new(Some(Copiers::start(settings.copy_threads)?)),
            load_room: Semaphore::new(units),
            store_room: Semaphore::new(units),
            publishing: Mutex::default(),
            stopping: watch::Sender::new(false),
            tasks: AtomicUsize::new(0),
            settings,
        })
    }

    /// The background: connects, looks after leases, and ends when told to, once no task is left.
    pub(super) async fn run(self: Arc<Engine>) {
        tokio::spawn(Arc::clone(&self).connect());
        let mut stopping = self.stopping.subscribe();
        loop {
            tokio::select! {
                _ = stopping.wait_for(|stopping| *stopping) => break,
                () = tokio::time::sleep(TICK) => self.look_after_locks(),
            }
        }
        while self.tasks.load(Ordering::Acquire) > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.locks.lock().clear();
        self.link.close();
    }

    pub(super) fn stop(&self) {
        self.stopping.send_replace(true);
    }

    pub(super) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    pub(super) fn stop_copiers(&self) {
        let copiers = self.copiers.lock().take();
        if let Some(copiers) = copiers {
            copiers.stop();
        }
    }

    fn copy(&self, copying: &Arc<Copying>) -> bool {
        match &*self.copiers.lock() {
            Some(copiers) => {
                copiers.submit(copying);
                true
            }
            None => false,
        }
    }

    async fn connect(self: Arc<Engine>) {
        // What was leased over an earlier connection is of no use.
        self.locks.lock().clear();
        self.link.connect().await;
    }

    /// A call failed: says so to the link, which may have to connect anew.
    pub(super) fn failed(self: &Arc<Engine>, error: &ClientError) {
        if self.link.failed(error) && !self.is_stopping() {
            tracing::warn!(%error, "kvtier is not reachable: LMCache goes on without it until it is");
            tokio::spawn(Arc::clone(self).connect());
        }
    }

    /// A deadline passed while an answer was outstanding.
    pub(super) fn stalled(self: &Arc<Engine>) {
        if self.link.stalled() && !self.is_stopping() {
            tracing::warn!("kvtier does not answer in time: LMCache goes on without it until it does");
            let engine = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = engine.link.probe().await {
                    engine.failed(&error);
                }
            });
        }
    }

    pub(super) async fn place(self: &Arc<Engine>, place: &Place) -> Option<Namespace> {
        match self.link.place(&self.settings, place).await {
            Ok(namespace) => {
                match namespace.generation().await {
                    Ok(generation) => self.enter(place, generation),
                    Err(error) => {
                        self.failed(&error);
                        return None;
                    }
                }
                Some(namespace)
            }
            Err(PlaceError::Unreachable) => None,
            Err(PlaceError::Client(error)) => {
                self.failed(&error);
                None
            }
        }
    }

    fn enter(&self, place: &Place, generation: Generation) {
        let name = self.name_of(place);
        self.observe(&name, generation);
        self.generations.lock().enter(&name, &place.salt, generation);
    }

    pub(super) fn name_of(&self, place: &Place) -> String {
        namespace_of(&self.settings, &place.salt)
    }

    /// The node spoke of a generation: what is older is forgotten here, and whoever listens is told.
    pub(super) fn observe(&self, name: &str, generation: Generation) {
        let salts = self.generations.lock().observe(name, generation);
        if let Some(salts) = salts {
            self.invalidated(name, generation, &salts);
        }
    }

    /// The node listed all generations: those that it has lost are forgotten here too.
    pub(super) fn rebase(&self, listed: &[(String, Generation)]) {
        let lost = self.generations.lock().rebase(listed);
        for (name, generation, salts) in lost {
            tracing::warn!(
                namespace = name,
                "kvtier has lost its state: what LMCache holds of it counts as invalidated"
            );
            self.invalidated(&name, generation, &salts);
        }
    }

    /// Notes whose bytes LMCache's memory may hold while the node cannot be asked about them.
    pub(super) fn note(&self, keys: &[ObjectKey]) {
        let mut generations = self.generations.lock();
        let mut before: Option<&Arc<str>> = None;
        for key in keys {
            if before.is_none_or(|before| *before != key.salt) {
                generations.note(&namespace_of(&self.settings, &key.salt), &key.salt);
                before = Some(&key.salt);
            }
        }
    }

    fn invalidated(&self, name: &str, generation: Generation, salts: &[Arc<str>]) {
        count(&self.counters.invalidations, 1);
        let mut gone = Vec::new();
        for salt in salts {
            gone.extend(self.directory.lock().remove_salt(salt));
        }
        if !self.settings.notices {
            return;
        }
        if !gone.is_empty() {
            self.notices.push(Notice::Gone { objects: gone });
        }
        self.notices.push(Notice::Invalidated {
            namespace: name.to_owned(),
            salts: salts.iter().map(|salt| salt.to_string()).collect(),
            generation: generation.0,
        });
    }

    pub(super) async fn load_room(&self, bytes: u64) -> Option<SemaphorePermit<'_>> {
        room(&self.load_room, self.settings.in_flight_bytes_max, bytes).await
    }

    pub(super) async fn store_room(&self, bytes: u64) -> Option<SemaphorePermit<'_>> {
        room(&self.store_room, self.settings.in_flight_bytes_max, bytes).await
    }

    /// Runs `work` until it ends, `until` passes or the adapter stops. Dropped work has given back nothing that a copy
    /// still needs: see [`Transfer::close`].
    pub(super) async fn within(&self, until: Instant, work: impl Future<Output = ()>) -> Ended {
        let mut stopping = self.stopping.subscribe();
        tokio::select! {
            biased;
            () = work => Ended::Done,
            () = tokio::time::sleep_until(until.into()) => Ended::Late,
            _ = stopping.wait_for(|stopping| *stopping) => Ended::Stopped,
        }
    }

    /// Lets whoever takes notices hear of a completion before it is out.
    pub(super) async fn announce(&self, task: TaskId, notice: Notice, patience: Duration) {
        if !self.settings.notices || self.is_stopping() {
            return;
        }
        let (sender, published) = oneshot::channel();
        self.publishing.lock().insert(task, sender);
        self.notices.push(notice);
        let mut stopping = self.stopping.subscribe();
        tokio::select! {
            _ = tokio::time::timeout(patience, published) => {}
            _ = stopping.wait_for(|stopping| *stopping) => {}
        }
        self.publishing.lock().remove(&task);
    }

    pub(super) fn publish(&self, task: TaskId) {
        if let Some(sender) = self.publishing.lock().remove(&task) {
            let _ = sender.send(());
        }
    }

    /// Positions of keys by namespace and form, in order, each group no larger than one request.
    pub(super) fn windows(
        &self,
        keys: impl Iterator<Item = (usize, Place)>,
        window_bytes: u64,
    ) -> Vec<(Place, Vec<usize>)> {
        let mut windows: Vec<(Place, Vec<usize>)> = Vec::new();
        let mut open: std::collections::HashMap<Place, usize> = std::collections::HashMap::new();
        for (position, place) in keys {
            if let Some(&at) = open.get(&place) {
                let positions = &mut windows[at].1;
                let bytes = place.bytes.saturating_mul(positions.len() as u64 + 1);
                if bytes <= window_bytes && positions.len() < WINDOW_KEYS_MAX {
                    positions.push(position);
                    continue;
                }
            }
            open.insert(place.clone(), windows.len());
            windows.push((place, vec![position]));
        }
        windows
    }

    fn look_after_locks(self: &Arc<Engine>) {
        let lease_ttl = self.link.lease_ttl().unwrap_or(Duration::from_secs(10));
        let lock_age = Duration::from_millis(self.settings.lock_ms_max);
        let again = self.locks.lock().expire(Instant::now(), lease_ttl / 2, lock_age);
        if !again.is_empty() {
            tokio::spawn(Arc::clone(self).lease(again));
        }
    }

    /// Leases what was found and locked, so that it is in host memory when the load comes. Nobody waits for it.
    pub(super) async fn lease(self: Arc<Engine>, keys: Vec<ObjectKey>) {
        let places: Vec<(usize, Place)> = {
            let (locks, directory) = (self.locks.lock(), self.directory.lock());
            let mut left = self.settings.locked_bytes_max.saturating_sub(locks.leased_bytes());
            let wanted = keys.iter().enumerate().filter(|(_, key)| locks.wants_lease(key));
            wanted
                .filter_map(|(at, key)| Some((at, Place::of(key, *directory.sizes(key).first()?))))
                .take_while(|(_, place)| {
                    let fits = place.bytes <= left;
                    left = left.saturating_sub(place.bytes);
                    fits
                })
                .collect()
        };
        for (place, positions) in self.windows(places.into_iter(), self.settings.window_bytes) {
            let Some(namespace) = self.place(&place).await else {
                return;
            };
            let hashes: Vec<BlockHash> = positions.iter().map(|at| keys[*at].block_hash()).collect();
            let patience = Duration::from_millis(self.settings.load_timeout_ms);
            match namespace.with_deadline(patience).get(&hashes, FetchScope::Each).await {
                Ok(handles) => {
                    let now = Instant::now();
                    let mut locks = self.locks.lock();
                    for (at, handle) in positions.into_iter().zip(handles) {
                        if let Some(handle) = handle {
                            locks.keep(&keys[at], handle, now);
                        }
                    }
                }
                Err(error) => {
                    self.failed(&error);
                    return;
                }
            }
        }
    }

    /// Makes the node take keys for used, without moving any bytes.
    pub(super) async fn touch(self: Arc<Engine>, keys: Vec<ObjectKey>) {
        let places: Vec<(usize, Place)> = {
            let directory = self.directory.lock();
            let known = keys.iter().enumerate();
            known
                .filter_map(|(at, key)| Some((at, Place::of(key, *directory.sizes(key).first()?))))
                .collect()
        };
        for (place, positions) in self.windows(places.into_iter(), u64::MAX) {
            let Some(namespace) = self.place(&place).await else {
                return;
            };
            let hashes: Vec<BlockHash> = positions.iter().map(|at| keys[*at].block_hash()).collect();
            let touched = async {
                let tiers = namespace.lookup(&hashes).await?;
                // Leasing what lies on NVMe would read it.
                let in_host = |(hash, tier): (&BlockHash, Option<Tier>)| (tier == Some(Tier::Host)).then_some(*hash);
                let in_host: Vec<BlockHash> = hashes.iter().zip(tiers).filter_map(in_host).collect();
                namespace.get(&in_host, FetchScope::Each).await
            };
            if let Err(error) = touched.await {
                self.failed(&error);
                return;
            }
        }
    }

    /// Makes the node forget keys; those that it had, with their sizes.
    pub(super) async fn delete(self: Arc<Engine>, keys: Vec<ObjectKey>) -> Vec<(usize, u64)> {
        let places: Vec<(usize, Place)> = {
            let directory = self.directory.lock();
            let sizes = keys.iter().enumerate().map(|(at, key)| (at, key, directory.sizes(key)));
            sizes
                .flat_map(|(at, key, sizes)| sizes.into_iter().map(move |bytes| (at, Place::of(key, bytes))))
                .collect()
        };
        let mut removed = Vec::new();
        for (place, positions) in self.windows(places.into_iter(), u64::MAX) {
            let Some(namespace) = self.place(&place).await else {
                break;
            };
            let hashes: Vec<BlockHash> = positions.iter().map(|at| keys[*at].block_hash()).collect();
            match namespace.delete(&hashes).await {
                Ok(had) => {
                    for (at, _) in positions.into_iter().zip(had).filter(|(_, had)| *had) {
                        self.directory.lock().remove(&keys[at]);
                        self.locks.lock().forget(&keys[at]);
                        removed.push((at, place.bytes));
                    }
                }
                Err(error) => {
                    self.failed(&error);
                    break;
                }
            }
        }
        removed
    }

    pub(super) fn is_up(&self) -> bool {
        self.link.health() == Health::Up
    }
}

async fn room(room: &Semaphore, most: u64, bytes: u64) -> Option<SemaphorePermit<'_>> {
    let units = bytes.min(most).div_ceil(ROOM_UNIT).max(1);
    room.acquire_many(u32::try_from(units).unwrap_or(u32::MAX)).await.ok()
}

/// How a task's work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Done,
    Late,
    Stopped,
}

/// The copies of one task.
#[derive(Default)]
pub(super) struct Transfer {
    /// `None` once closed.
    parts: Mutex<Option<Vec<Arc<Copying>>>>,
    /// Requests that the node has not answered.
    pub(super) asked: AtomicUsize,
}

impl Transfer {
    pub(super) fn new() -> Arc<Transfer> {
        Arc::new(Transfer {
            parts: Mutex::new(Some(Vec::new())),
            asked: AtomicUsize::new(0),
        })
    }

    /// Hands copies to the threads and waits until they are made; false if the task was closed first.
    pub(super) async fn copy(&self, engine: &Engine, copying: &Arc<Copying>) -> bool {
        {
            let mut parts = self.parts.lock();
            let Some(parts) = parts.as_mut() else { return false };
            parts.push(Arc::clone(copying));
            if !engine.copy(copying) {
                copying.cancel();
            }
        }
        copying.settled().await;
        copying.is_complete()
    }

    /// Waits for an answer of the node's, counted so that a deadline knows why it passed.
    pub(super) async fn ask<T>(&self, answer: impl Future<Output = T>) -> T {
        self.asked.fetch_add(1, Ordering::AcqRel);
        let answer = answer.await;
        self.asked.fetch_sub(1, Ordering::AcqRel);
        answer
    }

    /// Takes away every copy that no thread has begun and waits for those that one has. Once it returns, no page of this
    /// task is touched again. What the copies hold is held until then.
    pub(super) async fn close(&self) {
        let parts = self.parts.lock().take().unwrap_or_default();
        parts.iter().for_each(|part| part.cancel());
        for part in &parts {
            part.settled().await;
        }
    }
}
