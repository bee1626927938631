//! The state machine of an LMCache L2 adapter: stores, lookups and loads that LMCache submits and fetches the results of.
//!
//! No call here waits for the node. Each task ends in a completion, a failure too, and each has a deadline. One thread
//! runs all tasks over one connection; other threads copy between LMCache's pages and memory that the node shares. **Who
//! reports a completion has made sure that no thread touches its pages any more.**
//!
//! While the node is away or does not answer, stores fail and lookups and loads miss at once; the connection is made
//! anew in the background.
//!
//! # Names
//! An object's `cache_salt` decides its namespace: [`AdapterSettings::namespaces`] names it, or it is the prefix and the
//! salt. Model and bytes of an object are its realization: an object of another size is another object, so a changed layout
//! is a miss. Chunk hash, rank and group are digested into the block's hash, so that one request asks for all ranks.
//!
//! Read first: [`Adapter`], [`AdapterSettings`], [`ObjectKey`].

mod copying;
mod directory;
mod engine;
mod event;
mod generations;
mod key;
mod link;
mod load;
mod locks;
mod lookup;
mod results;
mod settings;
mod store;
mod watcher;

use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvtier_core::Generation;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::runtime::{Builder, Handle};

use engine::{Engine, count};
use load::Load;
use lookup::Lookup;
use watcher::Watcher;

pub use key::ObjectKey;
pub use kvtier_transfer::memory::ForeignSlice;
pub use results::Notice;
pub use settings::{AdapterSettings, AdapterSettingsError, FailedStores};

/// Names a task among those of one kind and one adapter.
pub type TaskId = u64;

/// How long a caller of [`Adapter::delete`] waits at most.
const DELETE_PATIENCE: Duration = Duration::from_secs(2);

/// What became of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreResult {
    /// Every object is at the node.
    pub success: bool,
    /// Bytes that were copied for it.
    pub bytes: u64,
}

/// See the module. Dropping it closes it.
pub struct Adapter {
    engine: Arc<Engine>,
    handle: Handle,
    next_task: AtomicU64,
    threads: Mutex<Option<Threads>>,
}

struct Threads {
    tasks: JoinHandle<()>,
    watcher: Watcher,
}

impl Adapter {
    /// Starts the threads. The node may be away: it is connected to in the background.
    ///
    /// # Errors
    /// A setting that cannot be, or no thread or descriptor.
    pub fn start(settings: AdapterSettings) -> io::Result<Adapter> {
        let settings = settings.check().map_err(io::Error::other)?;
        let engine = Arc::new(Engine::new(settings)?);
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let running = Arc::clone(&engine);
        let tasks = thread::Builder::new()
            .name("kvtier-tasks".into())
            .spawn(move || runtime.block_on(running.run()))?;
        let watcher = Watcher::start(&engine, handle.clone())?;
        Ok(Adapter {
            engine,
            handle,
            next_task: AtomicU64::new(0),
            threads: Mutex::new(Some(Threads { tasks, watcher })),
        })
    }

    /// Readable once a store has ended. Three different descriptors, valid until [`Adapter::close`].
    #[must_use]
    pub fn store_fd(&self) -> RawFd {
        self.engine.stores.descriptor()
    }

    /// Readable once a lookup has ended.
    #[must_use]
    pub fn lookup_fd(&self) -> RawFd {
        self.engine.lookups.descriptor()
    }

    /// Readable once a load has ended.
    #[must_use]
    pub fn load_fd(&self) -> RawFd {
        self.engine.loads.descriptor()
    }

    /// Begins a store of objects, one page each, in prefix order.
    ///
    /// # Panics
    /// Unless there are as many pages as keys.
    pub fn submit_store(&self, keys: Vec<ObjectKey>, pages: Vec<ForeignSlice>) -> TaskId {
        assert_eq!(keys.len(), pages.len(), "one page for each key");
        let task = self.task();
        if !self.admit() {
            self.engine.note(&keys);
            let success = self.engine.settings.failed_stores == FailedStores::Drop;
            self.engine.stores.put(task, StoreResult { success, bytes: 0 });
            return task;
        }
        let store = self.engine.begin_store(keys, pages);
        self.spawn(Arc::clone(&self.engine).store(task, store));
        task
    }

    /// Stores that have ended.
    pub fn completed_stores(&self) -> Vec<(TaskId, StoreResult)> {
        self.engine.stores.take_all()
    }

    /// Begins to look objects up, and to lock those that are found. `bytes` are the objects' sizes, where they are known.
    ///
    /// # Panics
    /// Unless there are as many sizes as keys.
    pub fn submit_lookup(&self, keys: Vec<ObjectKey>, bytes: Vec<Option<u64>>) -> TaskId {
        assert_eq!(keys.len(), bytes.len(), "one size for each key");
        let task = self.task();
        if !self.admit() {
            self.engine.lookups.put(task, vec![false; keys.len()]);
            return task;
        }
        let timeout = Duration::from_millis(self.engine.settings.lookup_timeout_ms);
        let lookup = Lookup::new(keys, bytes, timeout);
        self.spawn_begun(Box::pin(Arc::clone(&self.engine).lookup(task, lookup)));
        task
    }

    /// Which objects were found, once.
    pub fn lookup_result(&self, task: TaskId) -> Option<Vec<bool>> {
        self.engine.lookups.take(task)
    }

    /// Gives one lock of each object back.
    pub fn unlock(&self, keys: &[ObjectKey]) {
        let mut locks = self.engine.locks.lock();
        keys.iter().for_each(|key| locks.unlock(key));
    }

    /// Begins to load objects, one page each.
    ///
    /// # Panics
    /// Unless there are as many pages as keys.
    pub fn submit_load(&self, keys: Vec<ObjectKey>, pages: Vec<ForeignSlice>) -> TaskId {
        assert_eq!(keys.len(), pages.len(), "one page for each key");
        let task = self.task();
        if !self.admit() {
            self.engine.loads.put(task, vec![false; keys.len()]);
            return task;
        }
        let timeout = Duration::from_millis(self.engine.settings.load_timeout_ms);
        self.spawn(Arc::clone(&self.engine).load(task, Load::new(keys, pages, timeout)));
        task
    }

    /// Which objects were loaded, once. The pages of those that were not hold anything.
    pub fn load_result(&self, task: TaskId) -> Option<Vec<bool>> {
        self.engine.loads.take(task)
    }

    /// A store that the caller could not even describe, completed as a failure.
    pub fn fail_store(&self) -> TaskId {
        let task = self.task();
        let result = StoreResult {
            success: false,
            bytes: 0,
        };
        self.engine.stores.put(task, result);
        task
    }

    /// A lookup that the caller could not even describe, completed as misses.
    pub fn fail_lookup(&self, keys: usize) -> TaskId {
        let task = self.task();
        self.engine.lookups.put(task, vec![false; keys]);
        task
    }

    /// A load that the caller could not even describe, completed as misses.
    pub fn fail_load(&self, keys: usize) -> TaskId {
        let task = self.task();
        self.engine.loads.put(task, vec![false; keys]);
        task
    }

    /// Capacity that LMCache is told, bytes; 0: none.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.engine.settings.capacity_bytes
    }

    /// Makes the node forget objects. The positions of those that it had, and their sizes. Waits for at most two seconds.
    pub fn delete(&self, keys: Vec<ObjectKey>) -> Vec<(usize, u64)> {
        let (sender, answer) = crossbeam_channel::bounded(1);
        if !self.admit() {
            return Vec::new();
        }
        let delete = Arc::clone(&self.engine).delete(keys);
        self.spawn(async move {
            let removed = tokio::time::timeout(DELETE_PATIENCE, delete).await.unwrap_or_default();
            let _ = sender.send(removed);
        });
        answer.recv_timeout(DELETE_PATIENCE * 2).unwrap_or_default()
    }

    /// Makes the node take objects for used.
    pub fn touch(&self, keys: Vec<ObjectKey>) {
        if self.admit() {
            let engine = Arc::clone(&self.engine);
            let until = Instant::now() + Duration::from_millis(engine.settings.lookup_timeout_ms);
            self.spawn(async move {
                engine.within(until, Arc::clone(&engine).touch(keys)).await;
            });
        }
    }

    /// Up to `count` objects known by name behind `after`, with their sizes.
    #[must_use]
    pub fn list(&self, model: Option<&str>, count: usize, after: Option<&ObjectKey>) -> Vec<(ObjectKey, u64)> {
        self.engine.directory.lock().page(model, count, after)
    }

    /// Bytes of objects known by name, by salt.
    #[must_use]
    pub fn usage(&self) -> Vec<(Arc<str>, u64)> {
        self.engine.directory.lock().usage()
    }

    /// What LMCache's listeners are to be told: all there is, or what comes within `wait`; `None` once closed.
    pub fn take_notices(&self, wait: Duration) -> Option<Vec<Notice>> {
        self.engine.notices.take(wait)
    }

    /// The listeners were told of this task: its completion may be seen.
    pub fn publish(&self, task: TaskId) {
        self.engine.publish(task);
    }

    /// Somebody purges LMCache's own memory: after an invalidation, stores of that namespace are refused until
    /// [`Adapter::purged`]. `processor` names it at the node.
    pub fn expect_purger(&self, processor: &str) {
        self.engine.generations.lock().expect_purger();
        if let Some(threads) = &*self.threads.lock() {
            threads.watcher.confirm_as(processor);
        }
    }

    /// LMCache's memory holds nothing of a namespace older than `generation`. The node is told so.
    pub fn purged(&self, namespace: &str, generation: u64) {
        self.engine.generations.lock().purged(namespace, Generation(generation));
    }

    /// The bytes of these objects were begun under an older generation: their next store is refused.
    pub fn refuse_stores(&self, keys: Vec<ObjectKey>) {
        let mut refused = self.engine.refused.lock();
        if refused.len() < self.engine.settings.directory_keys_max {
            refused.extend(keys);
        }
    }

    /// The namespace of a salt.
    #[must_use]
    pub fn namespace_of(&self, salt: &str) -> String {
        key::namespace_of(&self.engine.settings, salt)
    }

    /// Whether the node answers.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.engine.is_up()
    }

    /// State and counters, a JSON object.
    #[must_use]
    pub fn report(&self) -> Value {
        let engine = &self.engine;
        let (why, reconnects, stalls) = engine.link.story();
        let mut report = Map::new();
        report.insert("is_healthy".into(), json!(engine.is_up()));
        report.insert(
            "state".into(),
            json!(format!("{:?}", engine.link.health()).to_lowercase()),
        );
        report.insert("why".into(), json!(why));
        report.insert("socket".into(), json!(engine.settings.socket.display().to_string()));
        // The threads of this process copy; the direct path does not exist yet.
        report.insert("path".into(), json!("copy"));
        report.insert("copy_threads".into(), json!(engine.settings.copy_threads));
        report.insert("reconnects".into(), json!(reconnects));
        report.insert("stalls".into(), json!(stalls));
        report.insert("tasks".into(), json!(engine.tasks.load(Ordering::Relaxed)));
        {
            let locks = engine.locks.lock();
            report.insert("locked_keys".into(), json!(locks.len()));
            report.insert("leased_bytes".into(), json!(locks.leased_bytes()));
        }
        report.insert("known_keys".into(), json!(engine.directory.lock().len()));
        for (name, value) in engine.counters.fields() {
            report.insert(name.into(), json!(value));
        }
        Value::Object(report)
    }

    /// Ends every task, the unfinished ones as failures and misses, and all threads. Once it returns nothing touches a page.
    pub fn close(&self) {
        let Some(threads) = self.threads.lock().take() else {
            return;
        };
        self.engine.stop();
        self.engine.notices.close();
        let _ = threads.tasks.join();
        threads.watcher.stop();
        self.engine.stop_copiers();
    }

    fn task(&self) -> TaskId {
        self.next_task.fetch_add(1, Ordering::Relaxed)
    }

    fn admit(&self) -> bool {
        let tasks = &self.engine.tasks;
        if tasks.fetch_add(1, Ordering::AcqRel) < self.engine.settings.tasks_max && !self.engine.is_stopping() {
            return true;
        }
        tasks.fetch_sub(1, Ordering::AcqRel);
        count(&self.engine.counters.refused_tasks, 1);
        false
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let ended = Ended(Arc::clone(&self.engine));
        self.handle.spawn(async move {
            let _ended = ended;
            task.await;
        });
    }

    /// Spawns a task after a first step on the caller's thread: its request is then on its way before the other thread wakes.
    fn spawn_begun(&self, mut task: Pin<Box<dyn Future<Output = ()> + Send>>) {
        let _context = self.handle.enter();
        let begun = task.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        if begun == Poll::Ready(()) {
            drop(Ended(Arc::clone(&self.engine)));
        } else {
            self.spawn(task);
        }
    }
}

/// Counts a task out, also when its future is dropped.
struct Ended(Arc<Engine>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.tasks.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        self.close();
    }
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Adapter")
            .field("socket", &self.engine.settings.socket)
            .finish_non_exhaustive()
    }
}
