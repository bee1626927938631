//! Drives the tier manager: commands in under one lock, actions out to the tiers, completions back as events.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use kvtier_core::{
    Action, ClientId, Completion, Event, Failure, Generation, NamespaceId, OperationId, PurgeEvidence, SegmentId, Tier,
    TierManager, Time, TrustDomain,
};
use kvtier_storage::hbm::{HbmAction, HbmTier};
use kvtier_storage::host::{HostError, HostTier};
use kvtier_storage::nvme::{NvmeTier, StorageAction};
use parking_lot::{Condvar, Mutex};

use super::clock::NodeClock;
use super::domains::Domains;
use super::outbox::{Notice, Outbox};
use super::peers;
use super::peers::versions::{Cause, VersionBook};
use super::recorder::{Job, Recorder};
use super::remote::Remote;
use super::status::{Durability, Purges};
use super::traffic::Traffic;
use super::watchers::{Confirmations, Watchers};
use crate::settings::CheckedSettings;

/// Who waits for an operation.
pub(crate) enum Waiter {
    /// A request of a connection.
    Session { outbox: Arc<Outbox>, request: u64 },
    /// A thread of this process.
    Caller(Sender<Settled>),
    /// A thread that reserves for what it reads from peers.
    Reader(Sender<Vec<kvtier_core::Reserved>>),
    /// A peer's connection.
    Peer(Box<dyn FnOnce(Vec<kvtier_core::Fetched>) + Send>),
}

/// The end of an invalidation or a flush, for a caller in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    Invalidated(Generation),
    Flushed { written: u64, left_out: u64 },
    Destroyed(PurgeEvidence),
    Forgotten { blocks: u64, of_any_label: u64 },
}

/// The tier manager and who waits for what: one lock, so that no answer can overtake its registration.
pub(crate) struct Decider {
    pub(crate) manager: TierManager,
    waiting: HashMap<OperationId, Waiter>,
}

impl Decider {
    /// Remembers whom to tell when `operation` ends.
    pub(crate) fn wait(&mut self, operation: OperationId, waiter: Waiter) {
        self.waiting.insert(operation, waiter);
    }
}

/// A connection, as far as the driver must know it.
struct Connection {
    domain: TrustDomain,
    outbox: Weak<Outbox>,
}

/// The tiers of a node, open.
pub(crate) struct Tiers {
    pub(crate) host: Arc<HostTier>,
    pub(crate) hbm: Option<HbmTier>,
    pub(crate) nvme: Option<NvmeTier>,
}

/// See the module.
pub(crate) struct Driver {
    decider: Mutex<Decider>,
    pub(crate) host: Arc<HostTier>,
    pub(crate) hbm: Option<HbmTier>,
    nvme: Option<NvmeTier>,
    pub(crate) recorder: Recorder,
    /// What was invalidated where; there with peers only.
    pub(crate) versions: Option<Arc<VersionBook>>,
    pub(crate) domains: Arc<Domains>,
    /// Set once they are reached, if there are any.
    pub(crate) peers: OnceLock<Weak<peers::Shared>>,
    /// Set once, too, where the settings name a server.
    pub(crate) remote: OnceLock<Weak<Remote>>,
    /// What came back from NVMe at the start.
    pub(crate) restored: OnceLock<Durability>,
    /// How bytes would get between NICs and the GPU whose memory holds copies: the way's name, and why.
    pub(crate) hbm_path: OnceLock<(&'static str, String)>,
    pub(crate) clock: NodeClock,
    /// Set once, where requests are recorded.
    pub(crate) traffic: OnceLock<Arc<Traffic>>,
    pub(crate) watchers: Watchers,
    pub(crate) confirmations: Confirmations,
    /// What became of purges so far.
    pub(crate) purges: Mutex<Purges>,
    connections: Mutex<HashMap<ClientId, Connection>>,
    segment_domains: Mutex<HashMap<SegmentId, TrustDomain>>,
    segment_work: Sender<Action>,
    /// When the timer thread will next wake, as nanoseconds of the node's clock.
    armed: AtomicU64,
    timer: Mutex<()>,
    timer_changed: Condvar,
    draining: AtomicBool,
    stopping: AtomicBool,
}

impl Driver {
    /// A driver over open tiers, and what its segment thread must work on. The caller starts the threads.
    pub(crate) fn new(
        settings: &CheckedSettings,
        clock: NodeClock,
        tiers: Tiers,
        recorder: Recorder,
        domains: Arc<Domains>,
        versions: Option<Arc<VersionBook>>,
    ) -> (Driver, Receiver<Action>) {
        let Tiers { host, hbm, nvme } = tiers;
        // Unbounded, yet the manager opens or closes each segment once at a time.
        let (segment_work, work) = crossbeam_channel::unbounded();
        let driver = Driver {
            decider: Mutex::new(Decider {
                manager: TierManager::new(settings.core().clone(), settings.core().policy()),
                waiting: HashMap::new(),
            }),
            host,
            hbm,
            nvme,
            recorder,
            versions,
            domains,
            peers: OnceLock::new(),
            remote: OnceLock::new(),
            restored: OnceLock::new(),
            hbm_path: OnceLock::new(),
            clock,
            traffic: OnceLock::new(),
            watchers: Watchers::new(),
            confirmations: Confirmations::default(),
            purges: Mutex::default(),
            connections: Mutex::new(HashMap::new()),
            segment_domains: Mutex::new(HashMap::new()),
            segment_work,
            armed: AtomicU64::new(u64::MAX),
            timer: Mutex::new(()),
            timer_changed: Condvar::new(),
            draining: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        };
        (driver, work)
    }

    /// Runs one command against the manager and carries out what it decided.
    pub(crate) fn with<R>(&self, command: impl FnOnce(&mut Decider, Time) -> R) -> R {
        let mut actions = Vec::new();
        let mut told = Vec::new();
        let mut changed = Vec::new();
        let now = self.clock.now();
        let (result, next) = {
            let mut decider = self.decider.lock();
            let result = command(&mut decider, now);
            if self.clock.is_client() {
                // Nobody else sees a client's clock leap: what fell due is done here, in bounded steps.
                for _ in 0..4 {
                    if decider.manager.poll_timeout().is_none_or(|due| due > now) {
                        break;
                    }
                    decider.manager.handle_timeout(now);
                }
            }
            while let Some(action) = decider.manager.poll_action() {
                if let Action::Invalidated { namespace, .. } = &action {
                    changed.push(decider.manager.domain_of(*namespace));
                }
                match settle(&mut decider.waiting, action) {
                    Ok(settled) => told.extend(settled),
                    Err(action) => actions.push(action),
                }
            }
            (result, decider.manager.poll_timeout())
        };
        if let Some(next) = next
            && next.0 < self.armed.load(Ordering::Acquire)
        {
            let _guard = self.timer.lock();
            self.timer_changed.notify_one();
        }
        for domain in changed {
            self.watchers.changed(domain);
        }
        for (waiter, told) in told {
            tell(waiter, told);
        }
        for action in actions {
            self.carry_out(action);
        }
        result
    }

    /// Raises a namespace's generation, as [`TierManager::invalidate`] does, and remembers for peers who asked for it.
    pub(crate) fn raise(
        &self,
        decider: &mut Decider,
        namespace: NamespaceId,
        target: Option<Generation>,
        cause: Cause,
        now: Time,
    ) -> OperationId {
        let operation = decider.manager.invalidate(namespace, target, now);
        if let Some(versions) = &self.versions
            && self.domains.is_shared(decider.manager.domain_of(namespace))
        {
            versions.begin(namespace, decider.manager.generation(namespace), cause);
        }
        operation
    }

    /// The peers, where there are any.
    pub(crate) fn peers(&self) -> Option<Arc<peers::Shared>> {
        self.peers.get().and_then(Weak::upgrade)
    }

    /// The remote tier, where there is one.
    pub(crate) fn remote(&self) -> Option<Arc<Remote>> {
        self.remote.get().and_then(Weak::upgrade)
    }

    /// An engine computed so many tokens behind others in so long: for whoever weighs fetching against it.
    /// Whose blocks never leave the node has nothing to weigh, and no word in what others' are weighed by.
    pub(crate) fn computed(&self, domain: TrustDomain, tokens: u32, before_tokens: u32, took: Duration) {
        if !self.domains.is_shared(domain) {
            return;
        }
        if let Some(peers) = self.peers() {
            peers.computed(tokens, before_tokens, took);
        }
        if let Some(remote) = self.remote() {
            remote.computed(tokens, before_tokens, took);
        }
    }

    /// Looks at the manager without commanding it.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&TierManager) -> R) -> R {
        look(&self.decider.lock().manager)
    }

    /// A completion from a tier.
    pub(crate) fn handle_event(&self, event: Event) {
        self.with(|decider, now| decider.manager.handle_event(event, now));
    }

    pub(crate) fn register(&self, client: ClientId, domain: TrustDomain, outbox: &Arc<Outbox>) {
        self.connections.lock().insert(
            client,
            Connection {
                domain,
                outbox: Arc::downgrade(outbox),
            },
        );
    }

    pub(crate) fn forget(&self, client: ClientId) {
        self.connections.lock().remove(&client);
    }

    /// Who owns a host segment.
    pub(crate) fn segment_domain(&self, segment: SegmentId) -> Option<TrustDomain> {
        self.segment_domains.lock().get(&segment).copied()
    }

    /// The size of a segment in memory, and what maps it.
    pub(crate) fn segment_file(&self, segment: SegmentId) -> Option<(u64, Arc<OwnedFd>)> {
        if segment.is_on_device() {
            let open = self.hbm.as_ref()?.segment(segment)?;
            return Some((open.region.bytes() as u64, open.file));
        }
        let open = self.host.segment(segment)?;
        Some((open.region.bytes() as u64, open.file))
    }

    /// Whether a device is the one whose memory holds copies of blocks.
    pub(crate) fn is_device(&self, uuid: Option<[u8; 16]>) -> bool {
        let hbm = self.hbm.as_ref();
        hbm.is_some_and(|hbm| uuid == Some(hbm.uuid().0))
    }

    pub(crate) fn nvme(&self) -> Option<&NvmeTier> {
        self.nvme.as_ref()
    }

    fn answer(&self, operation: OperationId, outcome: Result<Completion, Failure>) {
        self.handle_event(Event { operation, outcome });
    }

    fn carry_out(&self, action: Action) {
        match action {
            Action::OpenSegment { tier: Tier::Hbm, .. }
            | Action::CloseSegment { tier: Tier::Hbm, .. }
            | Action::ZeroSegment { tier: Tier::Hbm, .. }
            | Action::PromoteToHbm { .. } => self.carry_out_on_device(action),
            Action::OpenSegment { tier: Tier::Host, .. }
            | Action::CloseSegment { tier: Tier::Host, .. }
            | Action::ZeroSegment { .. } => {
                // The segment thread ends only after the last driver call, so a refusal is a stop in progress.
                let _ = self.segment_work.send(action);
            }
            Action::OpenSegment {
                operation,
                tier: Tier::Nvme,
                segment,
                bytes,
                ..
            } => {
                self.submit(
                    operation,
                    StorageAction::Open {
                        operation,
                        segment,
                        bytes,
                    },
                );
            }
            Action::CloseSegment {
                operation,
                tier: Tier::Nvme,
                segment,
            } => {
                self.submit(operation, StorageAction::Close { operation, segment });
            }
            Action::SealSegment { operation, segment } => {
                self.submit(operation, StorageAction::Seal { operation, segment });
            }
            Action::OpenSegment { tier: Tier::Remote, .. } | Action::CloseSegment { tier: Tier::Remote, .. } => {
                unreachable!("segments are of this node's tiers")
            }
            Action::Demote {
                operation,
                source,
                target,
                label,
            } => match self.host.slice(&source) {
                Ok(source) => self.submit(
                    operation,
                    StorageAction::Demote {
                        operation,
                        source,
                        target,
                        label,
                    },
                ),
                Err(error) => self.answer_impossible(operation, &error),
            },
            Action::Promote {
                operation,
                source,
                target,
                checksum,
                label,
            } => match self.host.slice(&target) {
                Ok(target) => {
                    self.submit(
                        operation,
                        StorageAction::Promote {
                            operation,
                            source,
                            target,
                            checksum,
                            label,
                        },
                    );
                }
                Err(error) => self.answer_impossible(operation, &error),
            },
            Action::Relocate {
                operation,
                source,
                target,
                checksum,
                label,
            } => {
                self.submit(
                    operation,
                    StorageAction::Relocate {
                        operation,
                        source,
                        target,
                        checksum,
                        label,
                    },
                );
            }
            Action::EraseRecords {
                operation,
                segment,
                pages,
                namespace,
                keep,
            } => {
                self.submit(
                    operation,
                    StorageAction::Erase {
                        operation,
                        segment,
                        pages,
                        namespace,
                        keep,
                    },
                );
            }
            Action::SyncTier { operation, .. } => self.submit(operation, StorageAction::Sync { operation }),
            Action::ResetTier { operation, .. } => {
                tracing::warn!("the NVMe tier did not answer in time: taken out of service until its queue is empty");
                self.submit(operation, StorageAction::Reset { operation });
            }
            Action::RecordGeneration {
                operation,
                namespace,
                generation,
            } => self.recorder.raise(operation, namespace, generation),
            Action::ForgetRecord { target } => {
                if let Some(nvme) = &self.nvme {
                    nvme.submit(StorageAction::ForgetRecord { target });
                }
            }
            Action::FetchDone { .. }
            | Action::ReserveDone { .. }
            | Action::Invalidated { .. }
            | Action::Destroyed { .. }
            | Action::Forgotten { .. }
            | Action::Flushed { .. } => {
                unreachable!("told to its waiter under the lock")
            }
        }
    }

    fn carry_out_on_device(&self, action: Action) {
        let hbm = self.hbm.as_ref().expect("the manager uses a tier that there is");
        hbm.submit(match action {
            Action::OpenSegment {
                operation,
                segment,
                bytes,
                domain,
                ..
            } => {
                let domain = domain.expect("a segment of device memory belongs to a domain");
                self.segment_domains.lock().insert(segment, domain);
                HbmAction::Open {
                    operation,
                    segment,
                    bytes,
                }
            }
            Action::CloseSegment { operation, segment, .. } => {
                if let Some(domain) = self.segment_domains.lock().remove(&segment) {
                    self.announce_removal(domain, segment);
                }
                HbmAction::Close { operation, segment }
            }
            Action::ZeroSegment {
                operation,
                segment,
                ranges,
                ..
            } => HbmAction::Zero {
                operation,
                segment,
                ranges,
            },
            Action::PromoteToHbm {
                operation,
                source,
                target,
                checksum,
            } => match self.host.slice(&source) {
                Ok(source) => HbmAction::Promote {
                    operation,
                    source,
                    target,
                    checksum,
                },
                Err(error) => return self.answer_impossible(operation, &error),
            },
            _ => unreachable!("sorted by its caller"),
        });
    }

    fn answer_impossible(&self, operation: OperationId, error: &HostError) {
        tracing::error!(%error, "the tier manager named memory that is not there: report this");
        self.answer(operation, Err(Failure::Io));
    }

    fn submit(&self, operation: OperationId, action: StorageAction) {
        match &self.nvme {
            Some(nvme) => nvme.submit(action),
            None => self.answer(operation, Err(Failure::Io)),
        }
    }

    /// The segment thread: opens and closes host segments, which may fault in or zero many pages.
    pub(crate) fn run_segment_work(&self, work: &Receiver<Action>) {
        while let Ok(action) = work.recv() {
            if self.is_stopping() {
                return;
            }
            match action {
                Action::OpenSegment {
                    operation,
                    segment,
                    bytes,
                    domain,
                    ..
                } => {
                    let opened = self.host.open(segment, bytes);
                    if let (Some(hbm), Some(opened)) = (&self.hbm, self.host.segment(segment)) {
                        hbm.submit(HbmAction::Pin {
                            region: Arc::downgrade(&opened.region),
                        });
                    }
                    if let Some(domain) = domain {
                        self.segment_domains.lock().insert(segment, domain);
                    }
                    self.answer(
                        operation,
                        match opened {
                            Ok(()) => Ok(Completion::Done),
                            Err(error) => {
                                tracing::warn!(%error, bytes, "a host segment could not be opened");
                                Err(Failure::Full)
                            }
                        },
                    );
                }
                Action::CloseSegment { operation, segment, .. } => {
                    // Peers first: what a NIC may still reach is never given back to the system.
                    let is_ours = self.peers().is_none_or(|peers| peers.close_segment(segment));
                    if let (Some(hbm), Some(closing)) = (&self.hbm, self.host.segment(segment)) {
                        hbm.let_go(&closing.region);
                    }
                    if !is_ours {
                        tracing::error!("a peer may still reach a host segment: its memory is kept");
                    } else if let Err(error) = self.host.close(segment) {
                        tracing::error!(%error, "a host segment could not be closed");
                    }
                    if let Some(domain) = self.segment_domains.lock().remove(&segment) {
                        self.announce_removal(domain, segment);
                    }
                    self.answer(operation, Ok(Completion::Done));
                }
                Action::ZeroSegment {
                    operation,
                    segment,
                    ranges,
                    ..
                } => {
                    let zeroed = self.host.zero(segment, &ranges);
                    if let Err(error) = &zeroed {
                        tracing::error!(%error, "memory could not be zeroed: report this");
                    }
                    self.answer(operation, zeroed.map(|()| Completion::Done).map_err(|_| Failure::Io));
                }
                _ => unreachable!("only host segments are worked on here"),
            }
        }
    }

    /// The recording thread: makes names and generations durable.
    pub(crate) fn run_recorder(&self, jobs: &Receiver<Job>) {
        self.recorder.run(jobs, |operation, raised, outcome| {
            let outcome = outcome.and_then(|completion| self.settle_versions(raised).map(|()| completion));
            self.answer(operation, outcome);
        });
    }

    /// A generation is durable: what peers compare follows.
    fn settle_versions(&self, (namespace, generation): (NamespaceId, Generation)) -> Result<(), Failure> {
        let (Some(versions), Some(label)) = (&self.versions, self.recorder.register.label(namespace)) else {
            return Ok(());
        };
        let name = format!("{}/{}", label.domain, label.name);
        let changed = versions.settle(namespace, &name, generation).map_err(|_| Failure::Io)?;
        if let Some(peers) = self.peers() {
            peers.note(&changed);
        }
        Ok(())
    }

    fn announce_removal(&self, domain: TrustDomain, segment: SegmentId) {
        for connection in self
            .connections
            .lock()
            .values()
            .filter(|connection| connection.domain == domain)
        {
            if let Some(outbox) = connection.outbox.upgrade() {
                outbox.push_quietly(Notice::SegmentRemoved { segment });
            }
        }
    }

    /// The timer thread: calls the manager when its next deadline falls due.
    pub(crate) fn run_timer(&self) {
        while !self.is_stopping() {
            self.with(|decider, now| {
                if decider.manager.poll_timeout().is_some_and(|due| due <= now) {
                    decider.manager.handle_timeout(now);
                }
            });
            let mut guard = self.timer.lock();
            let due = self.look(TierManager::poll_timeout);
            self.armed.store(due.map_or(u64::MAX, |due| due.0), Ordering::Release);
            // A command may have set an earlier deadline before `armed` was stored: look once more.
            let again = self.look(TierManager::poll_timeout);
            if self.is_stopping() || again < due && again.is_some() {
                continue;
            }
            match due {
                None => self.timer_changed.wait(&mut guard),
                Some(due) if self.clock.is_client() => {
                    let pause = if due <= self.clock.now() {
                        Duration::from_millis(1)
                    } else {
                        Duration::from_millis(500)
                    };
                    self.timer_changed.wait_for(&mut guard, pause);
                }
                Some(due) => {
                    let pause = due.since(self.clock.now());
                    if !pause.is_zero() {
                        self.timer_changed.wait_until(&mut guard, Instant::now() + pause);
                    }
                }
            }
        }
    }

    /// No new leases and reservations from here on.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.with(|decider, now| decider.manager.drain(now));
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Ends the threads; nothing is decided after that.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        {
            let _guard = self.timer.lock();
            self.timer_changed.notify_all();
        }
        // Wakes the segment thread, which sees that it must stop before it looks at what this names.
        let _ = self.segment_work.send(Action::SealSegment {
            operation: OperationId::default(),
            segment: SegmentId::default(),
        });
        if let Some(nvme) = &self.nvme {
            nvme.shutdown();
        }
        self.recorder.stop();
    }
}

/// What a waiter is told.
enum Told {
    Fetched(Vec<kvtier_core::Fetched>),
    Reserved(Vec<kvtier_core::Reserved>),
    Settled(Settled),
}

/// Pairs an answer with whoever waits for it (`Ok`), or hands the action back to be carried out.
#[expect(
    clippy::result_large_err,
    reason = "an action that nobody waits for goes on as it is"
)]
fn settle(waiting: &mut HashMap<OperationId, Waiter>, action: Action) -> Result<Option<(Waiter, Told)>, Action> {
    let (operation, told) = match action {
        Action::FetchDone { operation, results, .. } => (operation, Told::Fetched(results)),
        Action::ReserveDone { operation, results, .. } => (operation, Told::Reserved(results)),
        Action::Invalidated {
            operation, generation, ..
        } => (operation, Told::Settled(Settled::Invalidated(generation))),
        Action::Flushed {
            operation,
            written,
            left_out,
        } => (operation, Told::Settled(Settled::Flushed { written, left_out })),
        Action::Destroyed {
            operation, evidence, ..
        } => (operation, Told::Settled(Settled::Destroyed(evidence))),
        Action::Forgotten {
            operation,
            blocks,
            of_any_label,
        } => (operation, Told::Settled(Settled::Forgotten { blocks, of_any_label })),
        action => return Err(action),
    };
    Ok(waiting.remove(&operation).map(|waiter| (waiter, told)))
}

fn tell(waiter: Waiter, told: Told) {
    match (waiter, told) {
        (Waiter::Session { outbox, request }, Told::Fetched(results)) => {
            outbox.push(Notice::Fetched { request, results })
        }
        (Waiter::Session { outbox, request }, Told::Reserved(results)) => {
            outbox.push(Notice::Reserved { request, results });
        }
        (Waiter::Session { outbox, request }, Told::Settled(Settled::Invalidated(generation))) => {
            outbox.push(Notice::Invalidated { request, generation });
        }
        (Waiter::Session { outbox, request }, Told::Settled(Settled::Flushed { written, left_out })) => {
            outbox.push(Notice::Flushed {
                request,
                written,
                left_out,
            });
        }
        (Waiter::Reader(sender), Told::Reserved(results)) => drop(sender.try_send(results)),
        (Waiter::Peer(told), Told::Fetched(results)) => told(results),
        // A caller that stopped waiting has closed its end.
        (Waiter::Caller(sender), Told::Settled(settled)) => drop(sender.try_send(settled)),
        (Waiter::Session { .. }, Told::Settled(Settled::Destroyed(_) | Settled::Forgotten { .. })) => {
            unreachable!("connections do not ask for it")
        }
        (Waiter::Caller(_) | Waiter::Reader(_) | Waiter::Peer(_), _) => {
            unreachable!("each is told what it asked for")
        }
    }
}
