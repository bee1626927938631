//! Blocks on a server beside the node: written behind puts, sealed, and read back where that is expected to be faster than recomputing.
//!
//! Objects of a namespace lie in a group that the node's key and what is known of the namespace's invalidations make: after one the next
//! group begins, empty, at once, whether or not the server can be reached. What lies in earlier groups is under a key or a name that nobody
//! has any more; a purge deletes it and looks again. Only trust domains that the settings name leave the node.
//!
//! Read first: [`Remote`]; [`reading`] and [`writing`] are its two ways.

mod compressing;
mod opening;
mod probing;
mod reading;
mod sharing;
mod writing;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvtier_core::{BlockHash, ClientId, Generation, NamespaceId, Realization, RealizationId, TrustDomain};
use kvtier_storage::nvme::RecordKeys;
use kvtier_storage::remote::{ObjectGroup, ObjectKey, ObjectName, ObjectStore, StoreError};
use parking_lot::Mutex;

use self::compressing::Compressing;
use self::reading::Reading;
use self::sharing::Sharing;
use self::writing::{Offer, Writing};
use super::attempt::{Late, Patience};
use super::copying::Copying;
use super::domains::Domains;
use super::driver::Driver;
use super::peers::versions::VersionBook;
use super::peers::weighing::Weighing;
use super::peers::{SharedGroup, Versions};
use super::remote_status::{Erasure, RemoteStatus};
use super::{StartError, StartProgress, spawn};
use crate::settings::CheckedSettings;

/// Clients of the tier manager that are this room are numbered from here; connections count from 1, peers from 2^63.
const FIRST_CLIENT: u64 = 1 << 62;
/// First pause after the server failed; it doubles up to [`AWAY_MAX`].
const AWAY: Duration = Duration::from_millis(500);
const AWAY_MAX: Duration = Duration::from_secs(10);
/// How long after a write was given up the server may still do it.
const WRITE_GRACE: Duration = Duration::from_secs(30);
/// How long a deletion may wait for the server before the namespace is set apart instead.
const FORGET_PATIENCE: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Counts {
    blocks: AtomicU64,
    bytes: AtomicU64,
    written: AtomicU64,
    written_bytes: AtomicU64,
    compressed: AtomicU64,
    written_block_bytes: AtomicU64,
    dropped: AtomicU64,
    declined: AtomicU64,
    corrupt: AtomicU64,
    failed: AtomicU64,
    deleted: AtomicU64,
}

/// When the server is asked again after it failed.
#[derive(Default)]
struct Outage {
    until: Option<Instant>,
    pause: Duration,
    trouble: String,
}

/// Where a namespace's objects lie in one generation, and their key.
struct Place {
    group: ObjectGroup,
    key: ObjectKey,
    realization: Realization,
}

/// See the module.
pub(crate) struct Remote {
    driver: Arc<Driver>,
    domains: Arc<Domains>,
    versions: Arc<VersionBook>,
    store: Box<dyn ObjectStore>,
    /// How this backend is called where more than one is weighed.
    name: &'static str,
    address: String,
    /// `None`: it is read from unasked.
    weighing: Option<Weighing>,
    reading: Reading,
    patience: Patience,
    late: Arc<Late>,
    writing: Writing,
    compressing: Compressing,
    sharing: Sharing,
    copying: Copying,
    /// Namespaces with a write of unknown outcome: it may arrive at the server after a deletion that was sent later.
    unsettled: Mutex<HashSet<NamespaceId>>,
    /// When the latest of them was given up, whatever was deleted since.
    given_up_writes: Mutex<HashMap<NamespaceId, Instant>>,
    clients: Mutex<HashMap<TrustDomain, ClientId>>,
    next_client: AtomicU64,
    outage: Mutex<Outage>,
    counts: Counts,
    ttl: Duration,
    fetch_timeout: Duration,
    query_timeout: Duration,
    stopping: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Remote {
    /// Starts the threads. `None` where the settings name no server; one that is away is no error.
    pub(super) fn start(
        settings: &CheckedSettings,
        driver: &Arc<Driver>,
        domains: &Arc<Domains>,
        versions: Option<&Arc<VersionBook>>,
        observer: &dyn Fn(StartProgress),
    ) -> Result<Option<Arc<Remote>>, StartError> {
        let Some(versions) = versions else {
            return Ok(None);
        };
        let Some(store) = opening::open(settings)? else {
            return Ok(None);
        };
        let (reading, jobs) = Reading::new(settings.remote_readers as usize);
        let (writing, offers) = Writing::new(settings.remote_writes_max as usize);
        let remote = Arc::new(Remote {
            driver: Arc::clone(driver),
            domains: Arc::clone(domains),
            versions: Arc::clone(versions),
            name: store.kind(),
            address: store.address().to_owned(),
            store,
            weighing: Weighing::new(
                settings,
                settings.remote_gate,
                Duration::from_millis(settings.remote_fetch_timeout_ms),
            ),
            reading,
            patience: Patience::default(),
            late: Arc::default(),
            writing,
            compressing: Compressing::new(settings.remote_compression),
            sharing: Sharing::new(settings.remote_shared && settings.peer_listen.is_some()),
            copying: Copying::default(),
            unsettled: Mutex::default(),
            given_up_writes: Mutex::default(),
            clients: Mutex::default(),
            next_client: AtomicU64::new(FIRST_CLIENT),
            outage: Mutex::default(),
            counts: Counts::default(),
            ttl: Duration::from_secs(settings.remote_ttl_s),
            fetch_timeout: Duration::from_millis(settings.remote_fetch_timeout_ms),
            query_timeout: Duration::from_millis(settings.remote_query_timeout_ms),
            stopping: AtomicBool::new(false),
            threads: Mutex::default(),
        });
        if let Err(error) = remote.store.ping(Instant::now() + remote.query_timeout.max(AWAY)) {
            remote.failed(&error);
            observer(StartProgress::Warning(format!(
                "the remote tier at {} is away: {error}. The node serves without it, and asks again",
                remote.address
            )));
        }
        if remote.weighing.is_none() {
            observer(StartProgress::Note(
                "no cost_model is named: blocks of the remote tier are fetched whether or not that is faster than recomputing them".into(),
            ));
        }
        let mut threads = Vec::new();
        for reader in 0..settings.remote_readers {
            let (remote, jobs) = (Arc::clone(&remote), jobs.clone());
            threads.push(spawn(&format!("kvtier-fetch-{reader}"), move || remote.read(&jobs))?);
        }
        let writer = Arc::clone(&remote);
        threads.push(spawn("kvtier-store", move || writer.write(&offers))?);
        if remote.weighing.is_some() {
            let prober = Arc::clone(&remote);
            threads.push(spawn("kvtier-sound", move || prober.probe_server())?);
            let judging = Arc::clone(&remote);
            threads.push(spawn("kvtier-late", move || {
                if let Some(weighing) = &judging.weighing {
                    let is_stopping = || judging.is_stopping();
                    judging.patience.judge_attempts(weighing, &judging.driver, is_stopping);
                }
            })?);
        }
        *remote.threads.lock() = threads;
        Ok(Some(remote))
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.reading.stop();
        self.writing.stop();
        self.patience.stop();
        for thread in self.threads.lock().drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the remote tier panicked: report this");
            }
        }
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Whether blocks that this node does not have may be found at the server.
    pub(crate) fn may_help(&self, domain: TrustDomain) -> bool {
        self.domains.is_shared(domain) && !self.is_away()
    }

    /// A client's blocks were published: they are written when their turn comes.
    pub(crate) fn offer(
        &self,
        domain: TrustDomain,
        namespace: NamespaceId,
        realization: RealizationId,
        hashes: Vec<BlockHash>,
    ) {
        if hashes.is_empty() || !self.domains.is_shared(domain) {
            return;
        }
        let count = hashes.len() as u64;
        let offer = Offer {
            domain,
            namespace,
            realization,
            hashes,
        };
        if !self.writing.submit(offer) {
            self.counts.dropped.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// A client deleted these blocks here. When this returns, none of them comes back from the server. Which were there, as far as that is
    /// known.
    pub(crate) fn forget(
        &self,
        domain: TrustDomain,
        namespace: NamespaceId,
        realization: RealizationId,
        hashes: &[BlockHash],
    ) -> Result<Vec<bool>, crate::keys::KeyError> {
        if !self.domains.is_shared(domain) {
            return Ok(Vec::new());
        }
        let until = Instant::now() + FORGET_PATIENCE;
        let removed = (|| {
            // A write under way may be of these very blocks.
            let _writing = self.writing.exclusive(until)?;
            if self.unsettled.lock().contains(&namespace) {
                return None;
            }
            let generation = self.driver.look(|manager| manager.generation(namespace));
            let places = self.places(namespace, realization, generation)?;
            if self.is_away() {
                return None;
            }
            let mut removed = vec![false; hashes.len()];
            for place in &places {
                let names: Vec<ObjectName> = hashes.iter().map(|&hash| place.name(hash)).collect();
                let there = match self.store.remove(&place.group, &names, until) {
                    // That is no fault of the server's.
                    Err(StoreError::Unsure { .. }) => return None,
                    other => self.noted(other).ok()?,
                };
                removed
                    .iter_mut()
                    .zip(there)
                    .for_each(|(removed, there)| *removed |= there);
            }
            Some(removed)
        })();
        match removed {
            Some(removed) => {
                let count = removed.iter().filter(|removed| **removed).count() as u64;
                self.counts.deleted.fetch_add(count, Ordering::Relaxed);
                self.copying.wait_for_earlier(namespace);
                Ok(removed)
            }
            // Nothing of the namespace is found there any more.
            None => self.set_apart(namespace).map(|()| Vec::new()),
        }
    }

    /// Nothing that lies on the server of a namespace is read from now on, and what was under way before has ended.
    pub(crate) fn set_apart(&self, namespace: NamespaceId) -> Result<(), crate::keys::KeyError> {
        if let Some(name) = self.shared_name(namespace) {
            match self.driver.peers() {
                Some(peers) => peers.set_apart(namespace, &name)?,
                None => drop(self.versions.set_apart(&name)?),
            }
            // What was written before lies in a group that is over now, whenever it arrives.
            self.unsettled.lock().remove(&namespace);
            self.copying.wait_for_earlier(namespace);
        }
        Ok(())
    }

    /// Deletes everything of a namespace that lies on the server, and looks again. `None`: nothing of it may be there.
    pub(crate) fn erase(&self, namespace: NamespaceId, until: Instant) -> Option<Result<Erasure, String>> {
        let name = self.shared_name(namespace)?;
        // Whatever comes of the server: nobody reads there with another member's key from here.
        self.sharing.drop_handed_over(namespace);
        let (common, own) = (
            self.namespace_print(namespace, &name),
            self.own_namespace_print(namespace),
        );
        let erase = |print: &[u8; 16]| {
            self.noted(self.store.erase_namespace(print, until))
                .map_err(|error| error.to_string())
        };
        let outcome = (|| {
            let _writing = self.writing.exclusive(until).ok_or("it was busy for too long")?;
            let begun = Instant::now();
            let mut erased = erase(&common)?;
            if own != common {
                let more = erase(&own)?;
                erased.deleted += more.deleted;
                erased.left += more.left;
            }
            let mut given_up = self.given_up_writes.lock();
            let may_arrive = given_up
                .get(&namespace)
                .is_some_and(|then| begun.saturating_duration_since(*then) < WRITE_GRACE);
            if !may_arrive {
                given_up.remove(&namespace);
            }
            Ok(Erasure {
                deleted: erased.deleted,
                left: erased.left,
                may_arrive,
            })
        })();
        if let Ok(erased) = &outcome {
            self.counts.deleted.fetch_add(erased.deleted, Ordering::Relaxed);
        }
        Some(outcome)
    }

    /// An engine computed so many tokens behind others in so long.
    pub(crate) fn computed(&self, tokens: u32, before_tokens: u32, took: Duration) {
        if let Some(weighing) = &self.weighing {
            weighing.computed(tokens, before_tokens, took);
        }
    }

    /// What it is: one word.
    pub(crate) fn kind(&self) -> &str {
        self.name
    }

    /// Where it is, without a password.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn status(&self) -> RemoteStatus {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let outage = self.outage.lock();
        let now = self.driver.clock.now();
        let gate = self
            .weighing
            .as_ref()
            .and_then(|weighing| weighing.gate(now, self.name));
        let decisions = self.weighing.as_ref().map_or((0, 0), Weighing::decisions);
        RemoteStatus {
            backend: self.name.into(),
            address: self.address.clone(),
            servers: self.store.servers() as u64,
            state: if outage.trouble.is_empty() {
                "in service"
            } else {
                "away"
            }
            .into(),
            trouble: outage.trouble.clone(),
            blocks: load(&self.counts.blocks),
            bytes: load(&self.counts.bytes),
            written: load(&self.counts.written),
            written_bytes: load(&self.counts.written_bytes),
            compressed: load(&self.counts.compressed),
            written_block_bytes: load(&self.counts.written_block_bytes),
            dropped: load(&self.counts.dropped),
            declined: load(&self.counts.declined),
            corrupt: load(&self.counts.corrupt),
            failed: load(&self.counts.failed),
            deleted: load(&self.counts.deleted),
            given_up: load(&self.late.given_up),
            late_blocks: load(&self.late.blocks),
            shared_groups: self.sharing.count(),
            indexed: self.store.indexed(),
            gate: gate.as_ref().map_or_else(String::new, |gate| {
                format!("{}: {}", if gate.open { "open" } else { "closed" }, gate.reason)
            }),
            decisions_fetch: decisions.0,
            decisions_recompute: decisions.1,
            terms: self.weighing.as_ref().map_or_else(Vec::new, Weighing::terms),
            expected_bytes_per_second: gate.as_ref().map_or(0, |gate| gate.bytes_per_second),
            expected_lookup_us: gate.as_ref().map_or(0, |gate| gate.lookup_us),
            latest_decision: gate.map_or_else(String::new, |gate| gate.latest),
        }
    }

    /// `DOMAIN/NAME` of a namespace that may leave the node.
    fn shared_name(&self, namespace: NamespaceId) -> Option<String> {
        let label = self.driver.recorder.register.label(namespace)?;
        self.domains.shared(&label.domain)?;
        Some(format!("{}/{}", label.domain, label.name))
    }

    fn place_of(
        &self,
        namespace: NamespaceId,
        name: &str,
        realization: RealizationId,
        group: &SharedGroup,
    ) -> Option<Place> {
        let realizations = self.driver.recorder.realizations.entries();
        Some(Place {
            group: ObjectGroup {
                namespace: self.namespace_print(namespace, name),
                generation: group.generation,
            },
            key: ObjectKey::new(&group.key),
            realization: (*realizations.get(realization.0 as usize)?)?,
        })
    }

    /// The group of this node's own key.
    fn own_group(&self, namespace: NamespaceId, generation: Generation, versions: &Versions) -> Option<SharedGroup> {
        let register = &self.driver.recorder.register;
        let data_key = register.data_key(namespace, generation)?;
        let mut print = blake3::Hasher::new_derive_key("kvtier v1 group of remote objects");
        print.update(register.identity().as_bytes());
        print.update(&namespace.0.to_le_bytes());
        print.update(&generation.0.to_le_bytes());
        for (member, count) in &versions.0 {
            print.update(&member.0);
            print.update(&count.to_le_bytes());
        }
        let print = print.finalize();
        let mut key = blake3::Hasher::new_derive_key("kvtier v1 key of remote objects");
        key.update(data_key.bytes());
        key.update(print.as_bytes());
        let mut derived = zeroize::Zeroizing::new([0; 32]);
        key.finalize_xof().fill(&mut *derived);
        Some(SharedGroup {
            generation: first_half(print.as_bytes()),
            key: derived,
        })
    }

    /// What a purge deletes by: where groups are shared the same on every member, else the same for as long as the state directory lives.
    fn namespace_print(&self, namespace: NamespaceId, name: &str) -> [u8; 16] {
        match self.sharing_peers() {
            Some(peers) => first_half(&peers.print_of(name)),
            None => self.own_namespace_print(namespace),
        }
    }

    /// What lies there of before groups were shared has this.
    fn own_namespace_print(&self, namespace: NamespaceId) -> [u8; 16] {
        let mut print = blake3::Hasher::new_derive_key("kvtier v1 namespace of remote objects");
        print.update(self.driver.recorder.register.identity().as_bytes());
        print.update(&namespace.0.to_le_bytes());
        first_half(print.finalize().as_bytes())
    }

    /// Whether the server is worth asking, as far as is known.
    pub(crate) fn is_open(&self) -> bool {
        let now = self.driver.clock.now();
        let weighing = self.weighing.as_ref();
        weighing.is_none_or(|weighing| weighing.is_open(now, self.name))
    }

    fn is_away(&self) -> bool {
        self.outage.lock().until.is_some_and(|until| Instant::now() < until)
    }

    /// Passes an answer of the server on, and remembers how it fared.
    fn noted<T>(&self, outcome: Result<T, StoreError>) -> Result<T, StoreError> {
        match &outcome {
            Ok(_) => {
                let mut outage = self.outage.lock();
                if !outage.trouble.is_empty() {
                    tracing::info!(address = self.address, "the remote tier answers again");
                }
                *outage = Outage::default();
            }
            Err(error) => self.failed(error),
        }
        outcome
    }

    fn failed(&self, error: &StoreError) {
        self.counts.failed.fetch_add(1, Ordering::Relaxed);
        let mut outage = self.outage.lock();
        if outage.trouble.is_empty() {
            tracing::warn!(address = self.address, %error, "the remote tier is away: blocks are neither read there nor written");
        }
        outage.pause = (outage.pause * 2).clamp(AWAY, AWAY_MAX);
        outage.until = Some(Instant::now() + outage.pause);
        outage.trouble = error.to_string();
    }

    /// This room as a client of a domain.
    fn own_client(&self, domain: TrustDomain) -> Option<ClientId> {
        let mut clients = self.clients.lock();
        if let Some(client) = clients.get(&domain) {
            return Some(*client);
        }
        let client = ClientId(self.next_client.fetch_add(1, Ordering::Relaxed));
        let connected = self
            .driver
            .with(|decider, now| decider.manager.connect(client, domain, now));
        connected.ok()?;
        clients.insert(domain, client);
        Some(client)
    }
}

impl Place {
    fn name(&self, hash: BlockHash) -> ObjectName {
        self.key.name(&self.realization.0, hash)
    }
}

fn first_half(digest: &[u8; 32]) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&digest[..16]);
    half
}
