//! One machine's tiers behind one socket.
//!
//! A [`Node`] owns the host memory, the NVMe tier, the tier manager that decides over them, and the Unix socket on which
//! clients ask. It runs a thread for each connection, one timer, one for host segments, one that makes names and
//! generations durable, and those of the NVMe engine; when nobody asks, all of them sleep.

mod attempt;
mod clock;
mod copying;
mod domains;
mod driver;
mod learned;
mod listener;
mod outbox;
mod peers;
mod purging;
mod recorder;
mod restart;
mod session;
mod status;
mod traffic;
mod watchers;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvtier_core::{Generation, NamespaceId, OperationId, TierManager, TrustDomain};
use kvtier_storage::hbm::{HbmError, HbmSettings, HbmTier};
use kvtier_storage::host::{HostError, HostSettings, HostTier};
use kvtier_storage::nvme::{EngineChoice, Found, NvmeError, NvmeSettings, NvmeTier, RecordKeys};
use kvtier_transfer::direct::{DeviceLink, DirectPath};
use kvtier_transfer::rdma::Verbs;

use self::clock::NodeClock;
use self::domains::Domains;
use self::driver::{Decider, Driver, Settled, Tiers, Waiter};
use self::learned::Keeper;
use self::listener::Listener;
use self::traffic::TrafficRecorder;
#[cfg(feature = "remote")]
mod remote;
#[cfg(not(feature = "remote"))]
#[path = "node/remote_absent.rs"]
mod remote;
mod remote_status;

use self::peers::versions::{Cause, VersionBook};
pub use self::peers::{
    ClusterStatus, ExplainedPeer, ExplainedQuestion, ExplainedTerms, Explanation, PeerStatus, RailStatus,
    TermComparison,
};
use self::peers::{MemberKey, Peers};
use self::purging::Purging;
pub use self::purging::STEPS as PURGE_STEPS;
use self::recorder::Recorder;
use self::remote::Remote;
pub use self::remote_status::RemoteStatus;
pub use self::status::{Counters, Device, DomainCounters, DomainStatus, Durability, Durations, Purges, Status};
pub use self::watchers::Processor;
use crate::error::ErrorKind;
use crate::keys::{self, Anchor, KeyError, StateFiles};
use crate::purge::{KeySet, NamespaceSettings, NamespaceStatus, PurgeError, PurgeJob, PurgeReach, PurgeRequest};
use crate::settings::{CheckedSettings, Clock, Encryption, HugePages, NvmeEngine};

/// What a starting node is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartProgress {
    /// Host memory is being faulted in.
    Prefault {
        /// Bytes done.
        done_bytes: u64,
        /// Bytes to do.
        total_bytes: u64,
    },
    /// Something an operator should read once.
    Note(String),
    /// Something that was lost.
    Warning(String),
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory cannot be used.
    #[error("state_dir {path}: {source}: name a directory that this user can write")]
    StateDirectory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Keys, register or realizations cannot be opened.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// Names of an earlier run have no place in this one.
    #[error("the {count} {what} of earlier runs do not fit: {remedy}")]
    Names {
        /// How many there are.
        count: usize,
        /// Of what.
        what: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// Host memory cannot be had.
    #[error("host memory: {0}")]
    Host(#[from] HostError),
    /// There is no device for the tier in its memory.
    #[error("hbm_bytes is set, but {0}: correct hbm_device and hbm_library, or set hbm_bytes = 0")]
    Hbm(#[from] HbmError),
    /// Memory of the device is shared in other units.
    #[error("hbm_segment_bytes = {bytes}: {device} shares memory in multiples of {unit} bytes: choose one")]
    HbmSegment {
        /// What the setting says.
        bytes: u64,
        /// What the device is called.
        device: String,
        /// Its unit.
        unit: u64,
    },
    /// The NVMe tier cannot be opened.
    #[error("NVMe tier: {0}")]
    Nvme(#[from] NvmeError),
    /// The socket cannot be made.
    #[error("socket {path}: {source}: choose another path, or remove what is there")]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another daemon answers on the socket.
    #[error("socket {path}: another daemon answers there: stop it, or choose another --socket")]
    SocketInUse {
        /// Which.
        path: PathBuf,
    },
    /// Peers cannot be listened to.
    #[error("peers, {address}: {source}: choose another address or file")]
    Peers {
        /// Which address or file.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The remote tier cannot be had as the settings say.
    #[error("the remote tier, {address}: {source}: correct the settings")]
    Remote {
        /// Which setting or server.
        address: String,
        /// What it said.
        source: std::io::Error,
    },
    /// Requests cannot be recorded.
    #[error("record_trace {path}: {source}: name a file in a directory that this user can write")]
    Trace {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A fenced cluster's list lacks this node.
    #[error("peers: the list does not name this node, {own}: with cluster_fence it must")]
    NotAMember {
        /// As `peer_address` says.
        own: String,
    },
    /// RDMA is wanted and is not to be had.
    #[error("peer_transport = verbs: {0}")]
    Rdma(String),
    /// A thread or descriptor could not be made.
    #[error("this process may not start what it needs: {0}: raise its limits of threads and open files")]
    Resources(#[source] std::io::Error),
}

impl StartError {
    /// Whether the state directory was written by a later version of this program.
    #[must_use]
    pub fn is_of_a_later_version(&self) -> bool {
        matches!(
            self,
            StartError::Keys(KeyError::Newer { .. }) | StartError::Nvme(NvmeError::Newer { .. })
        )
    }
}

/// Why a command to a node was not carried out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CommandError {
    /// The remedy.
    pub kind: ErrorKind,
    /// What to do next, in words.
    pub message: String,
}

/// What a flush achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FlushReport {
    /// Blocks written to NVMe for it.
    pub written: u64,
    /// Blocks that stayed in host memory only.
    pub left_out: u64,
}

/// What a drain achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DrainReport {
    /// Leases that clients still held, and requests that still waited, when time was up.
    pub held: u64,
    /// The closing flush; `None` when it did not end in time.
    pub flush: Option<FlushReport>,
}

/// One machine's tiers behind one socket. Dropping it stops it without draining.
pub struct Node {
    driver: Arc<Driver>,
    listener: Option<Listener>,
    domains: Arc<Domains>,
    purging: Arc<Purging>,
    peers: Option<Arc<Peers>>,
    remote: Option<Arc<Remote>>,
    learned: Option<Keeper>,
    traffic: Option<TrafficRecorder>,
    threads: Vec<JoinHandle<()>>,
    settings: CheckedSettings,
}

impl Node {
    /// Opens the tiers, faults in the host memory, and listens. Blocks until clients can connect.
    ///
    /// # Errors
    /// Names what could not be had and the remedy. What the state directory held is as it was; a new one may hold a key and
    /// an empty register.
    pub fn start(
        settings: CheckedSettings,
        observer: Box<dyn Fn(StartProgress) + Send + Sync>,
    ) -> Result<Node, StartError> {
        let state_directory = |source| StartError::StateDirectory {
            path: settings.state_dir.clone(),
            source,
        };
        std::fs::create_dir_all(&settings.state_dir).map_err(state_directory)?;
        // First of all, for it says whether the directory is ours.
        let files = StateFiles::open(&settings.state_dir, settings.master_key_file.as_deref())?;
        for note in files.notes {
            observer(StartProgress::Note(note));
        }
        for warning in files.warnings {
            observer(StartProgress::Warning(warning));
        }
        let socket = Listener::bind(&settings.socket, settings.socket_mode)?;

        let host = HostTier::start(
            HostSettings {
                capacity_bytes: settings.host_bytes,
                base_segment_bytes: settings.host_segment_bytes,
                numa_node: settings.numa_node,
                lock: settings.lock_memory,
                huge: match settings.huge_pages {
                    HugePages::Auto => kvtier_storage::host::HugePages::Auto,
                    HugePages::Never => kvtier_storage::host::HugePages::Never,
                    HugePages::Require => kvtier_storage::host::HugePages::Require,
                },
            },
            &|done_bytes, total_bytes| {
                observer(StartProgress::Prefault {
                    done_bytes,
                    total_bytes,
                })
            },
        )?;
        let host = Arc::new(host);
        observer(StartProgress::Note(host.page_note()));

        let cell: Arc<OnceLock<Weak<Driver>>> = Arc::new(OnceLock::new());
        let begun = Instant::now();
        let (nvme, found) = match settings.nvme_bytes {
            0 => (None, Found::default()),
            capacity_bytes => {
                let cell = Arc::clone(&cell);
                let completions = Arc::new(move |event| {
                    if let Some(driver) = cell.get().and_then(Weak::upgrade) {
                        driver.handle_event(event);
                    }
                });
                let keys = Arc::clone(&files.register) as Arc<dyn RecordKeys>;
                let nvme = nvme_settings(&settings, capacity_bytes, keys);
                let (tier, found) = NvmeTier::open(nvme, completions)?;
                for note in tier.notes() {
                    observer(StartProgress::Note(note.clone()));
                }
                (Some(tier), found)
            }
        };
        let hbm = match settings.hbm_bytes {
            0 => None,
            _ => {
                let cell = Arc::clone(&cell);
                let completions = Arc::new(move |event| {
                    if let Some(driver) = cell.get().and_then(Weak::upgrade) {
                        driver.handle_event(event);
                    }
                });
                Some(open_hbm(&settings, completions, &*observer)?)
            }
        };
        let clock = NodeClock::new(settings.clock);
        if settings.clock == Clock::Client {
            observer(StartProgress::Note(
                "clock = client: clients drive the time. This is a test mode: never serve an engine with it".into(),
            ));
        }
        let mut notes = Vec::new();
        let anchor = match &settings.anchor_file {
            Some(path) => {
                let anchor = Anchor::open(path, &settings.state_dir, &mut notes)?;
                let registered = files.register.namespaces();
                let registered = registered.iter().flatten();
                let raised = anchor.catch_up(registered.map(|(label, generation)| (label, *generation)))?;
                if raised > 0 {
                    notes.push(format!(
                        "the anchor did not know the latest generation of {raised} namespaces: it does now"
                    ));
                }
                Some(anchor)
            }
            None => None,
        };
        let is_anchor_missing = anchor.is_none() && Anchor::was_used(&settings.state_dir);
        if is_anchor_missing {
            let words = format!(
                "this state directory was served with an anchor, and none is named now: nothing would notice an older copy of it. Name it \
                 (--anchor FILE), or remove {} if that is meant",
                settings.state_dir.join(keys::ANCHORED_FILE).display()
            );
            tracing::warn!("{words}");
            notes.push(words);
        }
        let (recorder, recorder_jobs) = Recorder::new(files.register, files.realizations, anchor, is_anchor_missing);
        let domains = Arc::new(Domains::new(&settings.domains, rustix::process::geteuid().as_raw()));
        let versions = match settings.peer_listen.is_some() || settings.remote().is_some() {
            true => {
                let identity = recorder.register.identity();
                let own = MemberKey::parse(&identity).expect("an identity has 32 digits");
                Some(Arc::new(VersionBook::open(&settings.state_dir, own)?))
            }
            false => None,
        };
        let (driver, segment_work) = Driver::new(
            &settings,
            clock,
            Tiers { host, hbm, nvme },
            recorder,
            Arc::clone(&domains),
            versions.clone(),
        );
        let driver = Arc::new(driver);
        // The cell is set once, here, before anything can complete.
        let _ = cell.set(Arc::downgrade(&driver));

        let learned = Keeper::start(&driver, &settings.state_dir, &*observer)?;
        let traffic = match &settings.record_trace {
            Some(path) => {
                let recorder = TrafficRecorder::start(path, &*observer)?;
                let _ = driver.traffic.set(Arc::clone(recorder.traffic()));
                Some(recorder)
            }
            None => None,
        };
        restart::restore_names(&driver, &domains)?;
        restart::restore_segments(&driver, found, begun, &*observer);
        let timer = Arc::clone(&driver);
        let segments = Arc::clone(&driver);
        let records = Arc::clone(&driver);
        let mut threads = Vec::new();
        threads.push(spawn("kvtier-register", move || records.run_recorder(&recorder_jobs))?);
        threads.push(spawn("kvtier-timer", move || timer.run_timer())?);
        threads.push(spawn("kvtier-segment", move || {
            segments.run_segment_work(&segment_work)
        })?);
        let (purging, purging_jobs) =
            Purging::open(Arc::clone(&driver), Arc::clone(&domains), settings.clone(), &mut notes)?;
        for note in notes {
            observer(StartProgress::Note(note));
        }
        let purging = Arc::new(purging);
        let peers = match &versions {
            Some(versions) => {
                let told = |progress| observer(progress);
                Peers::start(&settings, &driver, &domains, versions, &told)?
            }
            None => None,
        };
        if let Some(peers) = &peers {
            peers.bind(&purging);
            // What they ask and tell is known before the first client is.
            let _ = driver.peers.set(Arc::downgrade(peers.shared()));
            let learnt = peers.learn();
            observer(StartProgress::Note(format!(
                "{learnt} peers told what they invalidated"
            )));
        }
        if let Some(hbm) = &driver.hbm {
            let verbs = peers.as_ref().and_then(|peers| peers.shared().verbs());
            let (name, words) = device_path(hbm, verbs);
            observer(StartProgress::Note(format!("NICs could reach the GPU: {words}")));
            let _ = driver.hbm_path.set((name, words));
        }
        let remote = {
            let told = |progress| observer(progress);
            Remote::start(&settings, &driver, &domains, versions.as_ref(), &told)?
        };
        if let Some(remote) = &remote {
            let _ = driver.remote.set(Arc::downgrade(remote));
        }
        let purger = Arc::clone(&purging);
        threads.push(spawn("kvtier-purge", move || purger.run(&purging_jobs))?);
        // Before any client: nobody sees what a purge of an earlier run was to hide.
        let resumed = purging.resume();
        if resumed > 0 {
            observer(StartProgress::Note(format!(
                "resumed {resumed} purges of an earlier run"
            )));
        }
        let listener = Listener::start(socket, &settings, Arc::clone(&driver), Arc::clone(&domains))?;
        Ok(Node {
            driver,
            listener: Some(listener),
            domains,
            purging,
            peers,
            remote,
            learned,
            traffic,
            threads,
            settings,
        })
    }

    /// Where clients connect.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.settings.socket
    }

    /// The whole node's status.
    #[must_use]
    pub fn status(&self) -> Status {
        status_of(&self.driver, &self.domains)
    }

    /// Raises the generation of a namespace: `DOMAIN/NAME`, or a bare `NAME` for that name in every domain. Returns once no
    /// read that starts later sees an older block.
    ///
    /// # Errors
    /// `Invalid` when no domain knows the name, `Unavailable` when the generation could not be recorded in time.
    pub fn invalidate(&self, namespace: &str, timeout: Duration) -> Result<Vec<(String, Generation)>, CommandError> {
        let (only, name) = match namespace.split_once('/') {
            Some((domain, name)) => (Some(domain), name),
            None => (None, namespace),
        };
        let found: Vec<(String, NamespaceId)> = self
            .domains
            .all()
            .into_iter()
            .filter(|(domain, _)| only.is_none_or(|only| only == domain))
            .filter_map(|(label, domain)| {
                let found = self.driver.look(|manager| manager.find_namespace(domain, name))?;
                Some((format!("{label}/{name}"), found.0))
            })
            .collect();
        if found.is_empty() {
            return Err(CommandError {
                kind: ErrorKind::Invalid,
                message: format!("no namespace {namespace:?}: nothing was stored under that name"),
            });
        }
        let deadline = Instant::now() + timeout;
        let mut raised = Vec::new();
        for (label, namespace) in found {
            let settled = self.settle(deadline, |decider, now| {
                self.driver.raise(decider, namespace, None, Cause::Own, now)
            });
            match settled {
                Some(Settled::Invalidated(generation)) => raised.push((label, generation)),
                _ => {
                    return Err(CommandError {
                        kind: ErrorKind::Unavailable,
                        message: format!("{label}: its generation was not recorded in time: ask again"),
                    });
                }
            }
        }
        Ok(raised)
    }

    /// Begins a purge and returns once nothing older can be read any more, durably. The second value: whether the job is new.
    ///
    /// # Errors
    /// Nothing was changed, but for `Unavailable`: then the purge may go on.
    pub fn purge(&self, request: PurgeRequest) -> Result<(PurgeJob, bool), PurgeError> {
        if request.reach == Some(PurgeReach::Part) {
            return Err(PurgeError::Invalid("reach: give \"node\" or \"cluster\"".into()));
        }
        self.purging.purge(request)
    }

    /// The purge with this id.
    #[must_use]
    pub fn purge_job(&self, id: &str) -> Option<PurgeJob> {
        self.purging.job(id)
    }

    /// Purges, oldest first: of one `DOMAIN/NAME`, or all that are remembered.
    #[must_use]
    pub fn purge_jobs(&self, namespace: Option<&str>) -> Vec<PurgeJob> {
        self.purging.jobs(namespace)
    }

    /// The signed receipt of a purge, as it was signed; `None` while there is none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn purge_receipt(&self, id: &str) -> Result<Option<String>, KeyError> {
        self.purging.receipt(id)
    }

    /// The public keys of receipts.
    #[must_use]
    pub fn receipt_keys(&self) -> KeySet {
        self.purging.keys()
    }

    /// What became of purges after this event: numbers that only grow, and JSON objects. The last thousand are kept.
    #[must_use]
    pub fn purge_events_after(&self, sequence: u64) -> Vec<(u64, String)> {
        self.purging.events_after(sequence)
    }

    /// Every namespace, in the order of their names.
    #[must_use]
    pub fn namespaces(&self) -> Vec<NamespaceStatus> {
        self.purging.namespace_statuses()
    }

    /// Sets a namespace, durably.
    ///
    /// # Errors
    /// Nothing was changed.
    pub fn set_namespace(&self, namespace: &str, settings: NamespaceSettings) -> Result<NamespaceStatus, PurgeError> {
        self.purging.set_namespace(namespace, settings)
    }

    /// Serves a namespace again, empty, that the anchor knows at a higher generation than the state directory.
    ///
    /// # Errors
    /// When it is not known, or cannot be made durable.
    pub fn advance_namespace(&self, namespace: &str) -> Result<NamespaceStatus, PurgeError> {
        self.purging.advance(namespace)
    }

    /// Writes every block sealed before now to NVMe. `None` when that did not end within `timeout`.
    #[must_use]
    pub fn flush(&self, timeout: Duration) -> Option<FlushReport> {
        match self.settle(Instant::now() + timeout, |decider, now| {
            decider.manager.flush(None, now)
        }) {
            Some(Settled::Flushed { written, left_out }) => Some(FlushReport { written, left_out }),
            _ => None,
        }
    }

    /// Stops in order: no new leases, transfers in flight end, what is cached is flushed, connections close.
    pub fn drain_and_stop(mut self, timeout: Duration) -> DrainReport {
        let deadline = Instant::now() + timeout;
        if let Some(listener) = &mut self.listener {
            listener.refuse_new();
        }
        self.driver.drain();
        // Half of the time is for readers, the rest for the flush. Slots granted ahead are no transfers: they are not waited for.
        let readers_until = Instant::now() + timeout / 2;
        let held = loop {
            let statistics = self.driver.look(kvtier_core::TierManager::statistics);
            let held = statistics.leases + statistics.waiting;
            if held == 0 || Instant::now() >= readers_until {
                break held;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let flush = self.flush(deadline.saturating_duration_since(Instant::now()));
        self.stop();
        DrainReport { held, flush }
    }

    fn settle(
        &self,
        deadline: Instant,
        command: impl FnOnce(&mut Decider, kvtier_core::Time) -> OperationId,
    ) -> Option<Settled> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        self.driver.with(|decider, now| {
            let operation = command(decider, now);
            decider.wait(operation, Waiter::Caller(sender));
        });
        receiver.recv_deadline(deadline).ok()
    }

    fn stop(&mut self) {
        if let Some(listener) = self.listener.take() {
            listener.stop();
        }
        self.purging.stop();
        if let Some(peers) = self.peers.take() {
            peers.stop();
        }
        if let Some(remote) = self.remote.take() {
            remote.stop();
        }
        if let Some(learned) = self.learned.take() {
            learned.stop();
        }
        if let Some(traffic) = self.traffic.take() {
            traffic.stop();
        }
        self.driver.stop();
        for thread in self.threads.drain(..) {
            // A thread that panicked has already said so.
            let _ = thread.join();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop();
    }
}

/// How bytes would get between NICs and the device, by trying. Blocks of peers land in host memory all the same, where they are checked.
fn device_path(hbm: &HbmTier, verbs: Option<Arc<Verbs>>) -> (&'static str, String) {
    let staged = |why: &dyn std::fmt::Display| {
        let name = DirectPath::Staged.name();
        (name, format!("{name} ({why})"))
    };
    match verbs.map(|verbs| DeviceLink::choose(hbm.gpu(), verbs)) {
        None => staged(&"no RDMA between nodes"),
        Some(Err(error)) => staged(&error),
        Some(Ok(link)) => (link.path().name(), link.to_string()),
    }
}

fn open_hbm(
    settings: &CheckedSettings,
    completions: kvtier_storage::hbm::Completions,
    observer: &dyn Fn(StartProgress),
) -> Result<HbmTier, StartError> {
    let device = HbmSettings {
        device: settings.hbm_device as usize,
        library: settings.hbm_library.clone(),
    };
    let hbm = HbmTier::start(&device, completions)?;
    let unit = hbm.segment_unit()?;
    let name = hbm.gpu().name().to_owned();
    if !settings.hbm_segment_bytes.is_multiple_of(unit) {
        return Err(StartError::HbmSegment {
            bytes: settings.hbm_segment_bytes,
            device: name,
            unit,
        });
    }
    observer(StartProgress::Note(format!(
        "up to {} MiB of the memory of {name} ({}) hold copies of blocks, for clients on the same device",
        settings.hbm_bytes >> 20,
        hbm.uuid()
    )));
    Ok(hbm)
}

fn nvme_settings(settings: &CheckedSettings, capacity_bytes: u64, keys: Arc<dyn RecordKeys>) -> NvmeSettings {
    let mut nvme = NvmeSettings::new(settings.state_dir.join("nvme"), capacity_bytes, keys);
    nvme.device = settings.nvme_device.clone();
    nvme.discard = settings.nvme_discard;
    nvme.engine = match settings.nvme_engine {
        NvmeEngine::Auto => EngineChoice::Auto,
        NvmeEngine::IoUring => EngineChoice::IoUring,
        NvmeEngine::Threads => EngineChoice::Threads,
    };
    nvme.bounds.queue_depth = settings.nvme_queue_depth as usize;
    nvme.bounds.threads = settings.nvme_threads as usize;
    nvme.request_deadline = Duration::from_millis(settings.operation_deadline_ms);
    nvme.encryption = match settings.encryption {
        Encryption::Aes256Gcm => kvtier_storage::nvme::Encryption::Aes256Gcm,
        Encryption::None => kvtier_storage::nvme::Encryption::None,
    };
    nvme.flush_interval = Duration::from_millis(settings.nvme_flush_interval_ms);
    nvme
}

/// The status of every domain.
fn status_of(driver: &Driver, domains: &Domains) -> Status {
    let (statistics, domain_statistics) = driver.look(|manager| {
        let domains = domains
            .all()
            .into_iter()
            .map(|(name, domain)| domain_status(driver, manager, domain, name));
        (manager.statistics(), domains.collect::<Vec<_>>())
    });
    let restored = driver.restored.get().cloned().unwrap_or_default();
    let mut counters = Counters::from(&statistics);
    // What the start found damaged failed a check like any other.
    counters.corrupt += restored.restored_damaged;
    let register = &driver.recorder.register;
    let (register_syncs, register_failures) = register.counts();
    let durability = Durability {
        namespaces_lost: register.lost().len() as u64,
        anchor_missing: u64::from(driver.recorder.is_anchor_missing()),
        register_syncs,
        register_failures,
        ..restored
    };
    let device = driver
        .nvme()
        .map_or_else(Device::default, |nvme| nvme.statistics().into());
    let ratio = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    Status {
        version: env!("CARGO_PKG_VERSION").to_string(),
        uptime_seconds: driver.clock.uptime_seconds(),
        state: if driver.is_draining() { "draining" } else { "serving" }.to_string(),
        nvme_engine: driver.nvme().map_or("none", NvmeTier::engine_name).to_string(),
        hbm_device: driver.hbm.as_ref().map_or_else(
            || "none".to_owned(),
            |hbm| format!("{} ({})", hbm.gpu().name(), hbm.uuid()),
        ),
        hbm_path: driver
            .hbm_path
            .get()
            .map_or_else(|| "none".to_owned(), |(_, words)| words.clone()),
        host_pages: driver.host.page_note(),
        page_kib: driver.host.page_kib(),
        index_bytes_per_block: ratio(counters.index_bytes, counters.blocks),
        write_amplification: ratio(device.device_written_bytes, device.device_admitted_bytes),
        counters,
        durability,
        device,
        purges: driver.purges.lock().clone(),
        cluster: driver.peers().map(|peers| peers.status()),
        remote: driver.remote().map(|remote| remote.status()),
        domains: domain_statistics,
    }
}

fn domain_status(driver: &Driver, manager: &TierManager, domain: TrustDomain, name: String) -> DomainStatus {
    let generation = |domain, name: &str| Some(manager.find_namespace(domain, name)?.1);
    DomainStatus {
        domain: name,
        counters: DomainCounters::from(&manager.domain_statistics(domain)),
        processors: driver.confirmations.of(domain, generation),
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StartError> {
    std::thread::Builder::new()
        .name(name.to_string())
        .spawn(body)
        .map_err(StartError::Resources)
}
