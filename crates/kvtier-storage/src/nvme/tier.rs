use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use kvtier_core::{Completion, Event, Extent, Failure, NamespaceId, OperationId, RestoredSegment, SegmentId};
use parking_lot::{Mutex, RwLock};

use super::action::StorageAction;
use super::bounce::{Bounce, BouncePool};
use super::engine::{EngineError, NvmeEngine, Priority};
use super::erase::{self, Erasure};
use super::format::Encryption;
use super::keeper::{self, Chore, Chores};
use super::segment::Segment;
use super::settings::{EngineChoice, NvmeError, NvmeSettings, uring_remedy};
use super::threads::ThreadsEngine;
use super::uring::UringEngine;
use super::volume::Volume;

mod moves;
mod restore;

/// Told each answer, on a thread of the tier or the one that submitted. Keep it short, and do not shut the tier down
/// from it.
pub type Events = Arc<dyn Fn(Event) + Send + Sync>;

/// Counters since the tier opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NvmeStatistics {
    /// Payload bytes promoted.
    pub read_bytes: u64,
    /// Payload bytes demoted.
    pub written_bytes: u64,
    /// Payload bytes relocated.
    pub relocated_bytes: u64,
    /// Bytes that the device was given in all: payloads, padding, headers, indexes.
    pub device_written_bytes: u64,
    /// Payloads that failed their check.
    pub corrupt: u64,
    /// Requests that the device failed.
    pub io_errors: u64,
    /// Actions refused because a queue was full.
    pub busy: u64,
    /// Requests whose deadline passed before the device was asked, or that a reset cancelled.
    pub late: u64,
    /// Memory that is kept for records, bytes.
    pub index_bytes: u64,
}

/// What the tier found in its directory when it opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Its segments and their records, by id, for the core to restore.
    pub segments: Vec<RestoredSegment>,
    /// Bytes read to know that.
    pub read_bytes: u64,
    /// Segments and records that could not be read: damaged, or torn by a crash.
    pub damaged: u64,
    /// Records whose key is not to be had any more: of an older generation, or of a namespace that is unknown.
    pub sealed_off: u64,
}

/// Segment files behind an engine: core actions in, events out.
///
/// The directory or device is ours alone while the tier is open. What an earlier run left there is found again when it opens.
pub struct NvmeTier {
    inner: Arc<Inner>,
    workers: Mutex<Workers>,
}

#[derive(Default)]
struct Workers {
    checker: Option<JoinHandle<()>>,
    keeper: Option<JoinHandle<()>>,
    eraser: Option<JoinHandle<()>>,
}

impl NvmeTier {
    /// Locks the directory, reads headers and indexes of the segments that are there, and starts the engine.
    ///
    /// # Errors
    /// Names what could not be had and the remedy. Segments that are damaged are removed; those of a later version are
    /// not, and refuse the start.
    pub fn open(settings: NvmeSettings, events: Events) -> Result<(NvmeTier, Found), NvmeError> {
        NvmeTier::open_around(settings, events, |engine| engine)
    }

    /// The same with something between the tier and its engine, such as an engine that fails on purpose.
    #[cfg(any(test, feature = "faults"))]
    pub fn open_wrapped(
        settings: NvmeSettings,
        events: Events,
        wrap: impl FnOnce(Arc<dyn NvmeEngine>) -> Arc<dyn NvmeEngine>,
    ) -> Result<(NvmeTier, Found), NvmeError> {
        NvmeTier::open_around(settings, events, wrap)
    }

    fn open_around(
        settings: NvmeSettings,
        events: Events,
        wrap: impl FnOnce(Arc<dyn NvmeEngine>) -> Arc<dyn NvmeEngine>,
    ) -> Result<(NvmeTier, Found), NvmeError> {
        settings.check()?;
        let volume = Volume::open(&settings)?;
        let mut notes = Vec::new();
        if !volume.is_direct() {
            notes.push(format!(
                "{} does not take direct I/O: reads and writes go through the page cache; put it on ext4 or xfs for full speed",
                settings.place().display()
            ));
        }
        let restored = restore::restore(&volume, &*settings.keys)?;
        let taken: u64 = restored.segments.values().map(|segment| segment.bytes).sum();
        if let Some(free) = volume.room_bytes(taken).filter(|free| *free < settings.capacity_bytes) {
            notes.push(format!(
                "{} has {free} bytes free, less than the {} that the tier may take: it will fill up early; lower nvme_bytes or free space",
                settings.place().display(),
                settings.capacity_bytes
            ));
        }
        let engine = wrap(start_engine(&settings, &mut notes)?);
        for note in &notes {
            tracing::warn!("{note}");
        }
        let (chores, chores_of_keeper) = crossbeam_channel::unbounded();
        let (checks, checks_of_checker) = crossbeam_channel::unbounded();
        let (erasures, erasures_of_eraser) = crossbeam_channel::unbounded();
        let inner = Arc::new(Inner {
            volume,
            engine,
            events,
            segments: RwLock::new(restored.segments),
            sync_is_due: AtomicBool::new(false),
            relocated: AtomicBool::new(false),
            chores,
            checks,
            erasures,
            bounces: BouncePool::new(settings.bounce_bytes),
            waiting: Mutex::default(),
            pumps: AtomicUsize::new(0),
            outstanding: Mutex::new(Outstanding::default()),
            epoch: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            counters: Counters::default(),
            complaints: Mutex::new(None),
            notes,
            settings,
        });
        // Dropping the tier on the way out ends what was started.
        let tier = NvmeTier {
            inner: Arc::clone(&inner),
            workers: Mutex::new(Workers::default()),
        };
        let keeper = thread::Builder::new()
            .name("kvtier-nvme-dir".into())
            .spawn(move || keeper::run(&inner, &chores_of_keeper));
        tier.workers.lock().keeper = Some(keeper.map_err(NvmeError::Thread)?);
        let checker = thread::Builder::new().name("kvtier-nvme-crc".into()).spawn(move || {
            while let Ok(Some(check)) = checks_of_checker.recv() {
                check();
            }
        });
        tier.workers.lock().checker = Some(checker.map_err(NvmeError::Thread)?);
        let erasing = Arc::clone(&tier.inner);
        let eraser = thread::Builder::new()
            .name("kvtier-nvme-era".into())
            .spawn(move || erase::run(&erasing, &erasures_of_eraser));
        tier.workers.lock().eraser = Some(eraser.map_err(NvmeError::Thread)?);
        Ok((tier, restored.found))
    }

    /// Takes an action. Never blocks; the answer comes through the events, possibly before this returns and on this
    /// thread.
    pub fn submit(&self, action: StorageAction) {
        let inner = &self.inner;
        let operation = action.operation();
        match action {
            StorageAction::Reset { operation } => return inner.reset(operation),
            StorageAction::ForgetRecord { target } => return inner.forget_record(target),
            _ => {}
        }
        let ticket = match inner.admit(operation, action.moves_bytes()) {
            Ok(ticket) => ticket,
            Err(failure) => {
                return (inner.events)(Event {
                    operation,
                    outcome: Err(failure),
                });
            }
        };
        match action {
            StorageAction::Open { segment, bytes, .. } => inner.chore(Chore::Open { ticket, segment, bytes }),
            StorageAction::Close { segment, .. } => inner.chore(Chore::Close { ticket, segment }),
            StorageAction::Seal { segment, .. } => inner.seal(ticket, segment),
            StorageAction::Sync { .. } => inner.chore(Chore::Sync { ticket }),
            StorageAction::Erase {
                segment,
                pages,
                namespace,
                keep,
                ..
            } => inner.erase(ticket, segment, pages, namespace, keep),
            StorageAction::Demote {
                source, target, label, ..
            } => inner.demote(ticket, source, target, label),
            StorageAction::Promote {
                source,
                target,
                checksum,
                label,
                ..
            } => inner.promote(ticket, source, target, checksum, label),
            StorageAction::Relocate {
                source,
                target,
                checksum,
                label,
                ..
            } => inner.relocate(ticket, source, target, checksum, label),
            StorageAction::Reset { .. } | StorageAction::ForgetRecord { .. } => unreachable!("done above"),
        }
    }

    /// `io_uring` or `threads`.
    #[must_use]
    pub fn engine_name(&self) -> &'static str {
        self.inner.engine.name()
    }

    /// What an operator should know: why not io_uring, why not direct I/O. Logged at open, too.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.inner.notes
    }

    /// Counters.
    #[must_use]
    pub fn statistics(&self) -> NvmeStatistics {
        let segments = self.inner.segments.read();
        NvmeStatistics {
            index_bytes: segments.values().map(|segment| segment.memory_bytes()).sum(),
            ..self.inner.counters.read()
        }
    }

    /// Cancels what is queued, waits for what is in flight, ends the threads; every action is answered before this
    /// returns. Idempotent, and done on drop.
    pub fn shutdown(&self) {
        let inner = &self.inner;
        inner.closed.store(true, Ordering::SeqCst);
        inner.epoch.fetch_add(1, Ordering::SeqCst);
        let workers = std::mem::take(&mut *self.workers.lock());
        // In this order: the engine's last completions leave checks, the last checks leave chores.
        inner.engine.shutdown();
        inner.pump();
        let _ = inner.checks.send(None);
        join(workers.checker);
        let _ = inner.erasures.send(None);
        join(workers.eraser);
        inner.chore(Chore::Stop);
        join(workers.keeper);
        // What was written is found again by the next run; that it also survives a power cut nobody asked for.
        inner.write_indexes();
    }
}

impl Drop for NvmeTier {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn join(worker: Option<JoinHandle<()>>) {
    if let Some(worker) = worker {
        // A panic of that thread was reported when it happened.
        let _ = worker.join();
    }
}

fn start_engine(settings: &NvmeSettings, notes: &mut Vec<String>) -> Result<Arc<dyn NvmeEngine>, NvmeError> {
    if settings.engine != EngineChoice::Threads {
        match UringEngine::start(settings.bounds) {
            Ok(engine) => return Ok(Arc::new(engine)),
            Err(source) if settings.engine == EngineChoice::IoUring => return Err(NvmeError::Uring { source }),
            Err(source) => notes.push(format!(
                "NVMe through threads, for io_uring cannot be used: {source} ({})",
                uring_remedy(&source)
            )),
        }
    }
    Ok(Arc::new(
        ThreadsEngine::start(settings.bounds).map_err(NvmeError::Thread)?,
    ))
}

/// What all threads of the tier share.
pub(super) struct Inner {
    pub(super) volume: Volume,
    engine: Arc<dyn NvmeEngine>,
    events: Events,
    segments: RwLock<HashMap<SegmentId, Arc<Segment>>>,
    /// The keeper knows that a sync is due.
    sync_is_due: AtomicBool,
    /// Records were copied between segments since the last sync.
    relocated: AtomicBool,
    chores: Chores,
    /// Checksum work for the second thread; `None` ends it. Bounded by what is admitted.
    checks: Sender<Option<Check>>,
    /// What is to be overwritten; `None` ends the thread. The core asks for one at a time.
    erasures: Sender<Option<Erasure>>,
    bounces: Arc<BouncePool>,
    /// What waits for bounce memory, foreground and background. Bounded by what is admitted.
    waiting: Mutex<[VecDeque<Waiting>; 2]>,
    pumps: AtomicUsize,
    outstanding: Mutex<Outstanding>,
    /// Raised by a reset: tickets of an earlier one go no further than they are.
    epoch: AtomicU64,
    closed: AtomicBool,
    counters: Counters,
    /// When a failure was last logged.
    complaints: Mutex<Option<Instant>>,
    notes: Vec<String>,
    settings: NvmeSettings,
}

type Check = Box<dyn FnOnce() + Send>;
type WithBounce = Box<dyn FnOnce(&Arc<Inner>, Ticket, Bounce) + Send>;

struct Waiting {
    ticket: Ticket,
    bytes: usize,
    then: WithBounce,
}

/// Actions that were admitted and not answered.
#[derive(Default)]
struct Outstanding {
    count: usize,
    moving: usize,
    resets: Vec<OperationId>,
}

#[derive(Default)]
struct Counters {
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    relocated_bytes: AtomicU64,
    device_written_bytes: AtomicU64,
    corrupt: AtomicU64,
    io_errors: AtomicU64,
    busy: AtomicU64,
    late: AtomicU64,
}

impl Counters {
    fn read(&self) -> NvmeStatistics {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NvmeStatistics {
            read_bytes: read(&self.read_bytes),
            written_bytes: read(&self.written_bytes),
            relocated_bytes: read(&self.relocated_bytes),
            device_written_bytes: read(&self.device_written_bytes),
            corrupt: read(&self.corrupt),
            io_errors: read(&self.io_errors),
            busy: read(&self.busy),
            late: read(&self.late),
            index_bytes: 0,
        }
    }
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

/// The duty to answer one action. Dropped unanswered (a thread died), it answers with an I/O failure: the core never
/// waits in vain.
pub(super) struct Ticket {
    inner: Arc<Inner>,
    operation: OperationId,
    epoch: u64,
    moving: bool,
    answer: Result<Completion, Failure>,
}

impl Ticket {
    /// Nothing of this action may touch memory or files after this.
    pub(super) fn answer(mut self, outcome: Result<Completion, Failure>) {
        self.answer = outcome;
    }

    /// A reset came after it.
    pub(super) fn is_cancelled(&self) -> bool {
        self.epoch != self.inner.epoch.load(Ordering::SeqCst)
    }

    /// The segment's last write has ended.
    pub(super) fn seal(self, segment: &Arc<Segment>) {
        let inner = Arc::clone(&self.inner);
        inner.chore(Chore::Seal {
            ticket: self,
            segment: Arc::clone(segment),
        });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let counters = &self.inner.counters;
        match self.answer {
            Ok(_) => {}
            Err(Failure::Busy) => add(&counters.busy, 1),
            Err(Failure::Corrupt) => add(&counters.corrupt, 1),
            Err(Failure::Deadline) => add(&counters.late, 1),
            Err(Failure::Io | Failure::Full) => add(&counters.io_errors, 1),
        }
        (self.inner.events)(Event {
            operation: self.operation,
            outcome: self.answer,
        });
        let resets = {
            let mut outstanding = self.inner.outstanding.lock();
            outstanding.count -= 1;
            outstanding.moving -= usize::from(self.moving);
            if outstanding.count == 0 {
                std::mem::take(&mut outstanding.resets)
            } else {
                Vec::new()
            }
        };
        for operation in resets {
            (self.inner.events)(Event {
                operation,
                outcome: Ok(Completion::Done),
            });
        }
        self.inner.pump();
    }
}

impl Inner {
    fn admit(self: &Arc<Self>, operation: OperationId, moving: bool) -> Result<Ticket, Failure> {
        let mut outstanding = self.outstanding.lock();
        if self.closed.load(Ordering::SeqCst) || (moving && outstanding.moving >= self.settings.bounds.queue_max) {
            drop(outstanding);
            add(&self.counters.busy, 1);
            return Err(Failure::Busy);
        }
        outstanding.count += 1;
        outstanding.moving += usize::from(moving);
        let epoch = self.epoch.load(Ordering::SeqCst);
        Ok(Ticket {
            inner: Arc::clone(self),
            operation,
            epoch,
            moving,
            answer: Err(Failure::Io),
        })
    }

    fn reset(self: &Arc<Self>, operation: OperationId) {
        let idle = {
            let mut outstanding = self.outstanding.lock();
            self.epoch.fetch_add(1, Ordering::SeqCst);
            if outstanding.count > 0 {
                outstanding.resets.push(operation);
            }
            outstanding.count == 0
        };
        if idle {
            return (self.events)(Event {
                operation,
                outcome: Ok(Completion::Done),
            });
        }
        self.engine.cancel_queued();
        self.pump();
    }

    fn chore(&self, chore: Chore) {
        // After the end there is nobody to take it: its ticket answers as it is dropped.
        drop(self.chores.send(chore));
    }

    /// Runs `check` on the second thread.
    fn later(&self, check: impl FnOnce() + Send + 'static) {
        drop(self.checks.send(Some(Box::new(check))));
    }

    fn seal(&self, ticket: Ticket, segment: SegmentId) {
        let Some(segment) = self.segment(segment) else {
            return self.refuse(ticket, "seal a segment that is not open");
        };
        match segment.seal_after_writes(ticket) {
            Ok(Some(ticket)) => ticket.seal(&segment),
            Ok(None) => {}
            Err(ticket) => self.refuse(ticket, "seal a segment twice"),
        }
    }

    fn erase(
        &self,
        ticket: Ticket,
        segment: SegmentId,
        pages: Range<u32>,
        namespace: NamespaceId,
        keep: Vec<Range<u32>>,
    ) {
        let Some(segment) = self.segment(segment) else {
            return self.refuse(ticket, "erase records of a segment that is not open");
        };
        // After the end nobody takes it: its ticket answers as it is dropped.
        drop(self.erasures.send(Some(Erasure {
            ticket,
            segment,
            pages,
            namespace,
            keep,
        })));
    }

    fn segment(&self, segment: SegmentId) -> Option<Arc<Segment>> {
        self.segments.read().get(&segment).cloned()
    }

    pub(super) fn add_segment(&self, segment: Segment) {
        self.segments.write().insert(segment.id, Arc::new(segment));
    }

    pub(super) fn remove_segment(&self, segment: SegmentId) -> Option<Arc<Segment>> {
        self.segments.write().remove(&segment)
    }

    /// Makes everything answered so far survive a power cut.
    pub(super) fn sync(&self) -> io::Result<()> {
        let relocated = self.relocated.swap(false, Ordering::AcqRel);
        let segments: Vec<_> = self.segments.read().values().cloned().collect();
        let synced = self.volume.sync().and_then(|()| {
            segments.iter().try_for_each(|segment| {
                let bytes = segment.sync()?;
                self.count_device_write(bytes);
                Ok(())
            })
        });
        if synced.is_err() && relocated {
            self.relocated.store(true, Ordering::Release);
        }
        synced
    }

    /// The sync that comes by itself some time after something was written.
    pub(super) fn sync_unasked(&self) -> io::Result<()> {
        self.sync_is_due.store(false, Ordering::SeqCst);
        self.sync()
    }

    /// Something was written that is to be synced some time.
    pub(super) fn written(&self) {
        if !self.sync_is_due.swap(true, Ordering::SeqCst) {
            self.chore(Chore::SyncLater);
        }
    }

    pub(super) fn has_relocated(&self) -> bool {
        self.relocated.load(Ordering::Acquire)
    }

    pub(super) fn encryption(&self) -> Encryption {
        self.settings.encryption
    }

    pub(super) fn flush_interval(&self) -> Duration {
        self.settings.flush_interval
    }

    fn forget_record(&self, target: Extent) {
        if let Some(segment) = self.segment(target.segment) {
            segment.forget_record(target.offset);
            self.chore(Chore::WriteIndex { segment });
        }
    }

    fn write_indexes(&self) {
        for segment in self.segments.read().values() {
            if let Err(error) = segment.write_out() {
                self.complain("write the index of a segment", &error.into());
            }
        }
    }

    /// What earlier payloads and keys left in the memory of this process.
    pub(super) fn clear_traces(&self) {
        self.bounces.clear();
        for segment in self.segments.read().values() {
            segment.forget_ciphers(&*self.settings.keys);
        }
    }

    pub(super) fn count_device_write(&self, bytes: u64) {
        add(&self.counters.device_written_bytes, bytes);
    }

    /// Runs `then` with bounce memory, now or when there is some.
    fn with_bounce(self: &Arc<Self>, ticket: Ticket, bytes: usize, priority: Priority, then: WithBounce) {
        self.waiting.lock()[priority as usize].push_back(Waiting { ticket, bytes, then });
        self.pump();
    }

    /// Serves what waits for bounce memory. Whoever comes while it runs only makes it look again, so that answers given
    /// from within do not pile up on the stack.
    fn pump(self: &Arc<Self>) {
        if self.pumps.fetch_add(1, Ordering::SeqCst) > 0 {
            return;
        }
        let mut seen = 1;
        loop {
            while self.serve_waiting() {}
            let asked = self.pumps.fetch_sub(seen, Ordering::SeqCst);
            if asked == seen {
                return;
            }
            seen = asked - seen;
        }
    }

    /// Serves one that waits, foreground first; false where there is nobody who can be served.
    fn serve_waiting(self: &Arc<Self>) -> bool {
        let mut lanes = self.waiting.lock();
        for priority in [Priority::Foreground, Priority::Background] {
            let lane = &mut lanes[priority as usize];
            let Some(first) = lane.front() else { continue };
            let bounce = if first.ticket.is_cancelled() {
                None
            } else {
                match self.bounces.take(first.bytes, priority) {
                    Ok(None) => continue,
                    taken => Some(taken),
                }
            };
            let Some(Waiting { ticket, then, .. }) = lane.pop_front() else {
                return false;
            };
            drop(lanes);
            match bounce {
                None => ticket.answer(Err(Failure::Deadline)),
                Some(Ok(Some(bounce))) => then(self, ticket, bounce),
                Some(_) => ticket.answer(Err(Failure::Full)),
            }
            return true;
        }
        false
    }

    /// The core asked for what cannot be: our bug, and a miss for the caller.
    fn refuse(&self, ticket: Ticket, what: &str) {
        tracing::error!(operation = ticket.operation.0, "refused to {what}");
        ticket.answer(Err(Failure::Io));
    }

    pub(super) fn fail(&self, ticket: Ticket, doing: &str, error: impl Into<EngineError>) {
        let error = error.into();
        if matches!(error, EngineError::Io(_) | EngineError::EndOfFile) {
            self.complain(doing, &error);
        }
        ticket.answer(Err(failure(&error)));
    }

    /// Logs a failure, at most one a second: the rest is counted.
    pub(super) fn complain(&self, doing: &str, error: &EngineError) {
        let now = Instant::now();
        let mut last = self.complaints.lock();
        if last.is_none_or(|last| now - last >= Duration::from_secs(1)) {
            *last = Some(now);
            tracing::warn!(directory = %self.settings.place().display(), %error, "cannot {doing}");
        }
    }
}

fn failure(error: &EngineError) -> Failure {
    match error {
        EngineError::Io(error) if matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::ENOMEM)) => {
            Failure::Full
        }
        EngineError::Io(_) | EngineError::EndOfFile => Failure::Io,
        EngineError::Busy => Failure::Busy,
        EngineError::Deadline | EngineError::Cancelled => Failure::Deadline,
    }
}
