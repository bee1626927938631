//! Other nodes: reading blocks from their memory, lending them ours, and keeping what each invalidated from coming back.
//!
//! A block of a peer is leased, read by a one-sided transfer into a reserved slot, compared with the checksum that came with
//! the lease, sealed here and given back there. A peer that is slow, dead, cut off or sends other bytes costs at most the time
//! that the settings grant, and is a miss. Between nodes only trust domains that the settings name are shared.
//!
//! Read first: [`Peers`]; [`reading`] and [`serving`] are the two sides, [`versions`] says when a peer's block may be read at all.

mod channel;
mod cluster_wire;
mod comparing;
#[cfg(feature = "redis")]
mod directory;
mod explaining;
mod generations;
mod link;
mod message;
mod reading;
mod regions;
mod sampling;
mod serving;
#[cfg_attr(not(feature = "remote"), allow(dead_code, reason = "who asks is the remote tier"))]
mod sharing;
mod summing;
mod tables;
pub(crate) mod versions;
pub(super) mod weighing;

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvtier_core::cluster::ClusterSettings;
use kvtier_core::{ClientId, NamespaceId, OperationId, TrustDomain};
use kvtier_transfer::PeerAddress;
use kvtier_transfer::Transport;
use kvtier_transfer::rdma::{Verbs, VerbsSettings};
use kvtier_transfer::tcp::{Secret, Tcp, TcpSettings, Tls, TlsError};
use parking_lot::{Condvar, Mutex, RwLock};
use serde::{Deserialize, Serialize};

use self::channel::{ClusterSecret, Credentials};
pub use self::comparing::TermComparison;
pub use self::explaining::{ExplainedPeer, ExplainedQuestion, ExplainedTerms, Explanation};
use self::generations::Generations;
pub(crate) use self::generations::Progress;
use self::link::{Link, Surroundings};
use self::message::Introduction;
pub(crate) use self::message::MemberKey;
pub(in crate::node) use self::message::Versions;
pub(crate) use self::reading::{FetchJob, LookupJob, Scope};
use self::reading::{Job, Reading};
use self::regions::{Regions, Way};
#[cfg(feature = "remote")]
pub(in crate::node) use self::serving::request;
use self::serving::{Connections, Given, Server};
pub(in crate::node) use self::sharing::SharedGroup;
use self::summing::Summing;
use self::versions::{Counter, VersionBook};
use self::weighing::Weighing;
use super::attempt::Patience;
use super::copying::Copying;
use super::domains::Domains;
use super::driver::Driver;
use super::purging::Purging;
use super::{StartError, StartProgress, spawn};
use crate::settings::{CheckedSettings, PeerTransport};

/// Clients of the tier manager that are peers are numbered from here; connections count from 1.
const FIRST_CLIENT: u64 = 1 << 63;
/// How often names of members are looked up.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long a member that is found nowhere any more stays one.
const MEMBER_EXPIRY: Duration = Duration::from_secs(15);
/// How long a start waits for members to tell what they invalidated meanwhile.
const LEARN_TIMEOUT: Duration = Duration::from_secs(2);

/// How one peer fares.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PeerStatus {
    /// As the settings or the directory name it.
    pub address: String,
    /// Of its state directory; empty until it was reached.
    pub member: String,
    /// `connected`, or `away`.
    pub state: String,
    /// Why it is away; empty when it is connected.
    pub trouble: String,
    /// How its memory is read: `verbs` or `tcp`.
    pub transport: String,
    /// Connections so far.
    pub connections: u64,
    /// Blocks read from it and found right.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Questions that it did not answer in time.
    pub late: u64,
    /// Reads that failed.
    pub failed: u64,
    /// Blocks whose bytes were not what it said.
    pub corrupt: u64,
    /// Answers that were of no use because invalidations are not known to both.
    pub stale: u64,
    /// Fetches that took so long that recomputing was expected to be faster: their clients were answered before they ended.
    pub given_up: u64,
    /// Blocks that came after their fetch was answered, and were kept.
    pub late_blocks: u64,
    /// Whether the cost model lets it be asked; empty where no model is named.
    pub gate: String,
    /// Bytes a second that the cost model counts with.
    pub expected_bytes_per_second: u64,
    /// Time until it answers that the cost model counts with, microseconds.
    pub expected_lookup_us: u64,
    /// The latest decision about its blocks, term by term.
    pub latest_decision: String,
    /// The ways to its memory.
    pub rails: Vec<RailStatus>,
}

/// One way to a peer's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RailStatus {
    /// `rxe0 to rxe1`, `10.0.0.2:7412`.
    pub name: String,
    /// Whether it takes transfers now.
    pub usable: bool,
    /// Bytes moved.
    pub bytes: u64,
    /// Measured while busy.
    pub bytes_per_second: u64,
    /// Failures that were its own.
    pub errors: u64,
    /// How often it was connected anew.
    pub reconnects: u64,
}

/// The node among its peers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterStatus {
    /// This node's address among them.
    pub address: String,
    /// Of its state directory.
    pub member: String,
    /// A majority of a fixed list must renew a member's lease, or it serves nothing.
    pub fenced: bool,
    /// Whether it serves now.
    pub serving: bool,
    /// Members, this node included.
    pub members: Vec<String>,
    /// Why memory is not read by RDMA; empty when it is.
    pub rdma: String,
    /// Blocks leased to peers.
    pub leased_blocks: u64,
    /// Their bytes.
    pub leased_bytes: u64,
    /// Blocks whose checksum was taken before a peer asked for them.
    pub summed_ahead: u64,
    /// Leases that peers did not give back in time.
    pub leases_expired: u64,
    /// Questions of peers that were refused.
    pub refused: u64,
    /// Requests whose blocks were worth fetching from a peer.
    pub decisions_fetch: u64,
    /// Requests whose blocks peers had and were not worth fetching.
    pub decisions_recompute: u64,
    /// What the cost model expected of fetches and prefills, and what they took; empty where none is named.
    pub terms: Vec<TermComparison>,
    /// Segments registered for peers. Gauge.
    pub segments_registered: u64,
    /// Renewals that this node asked for.
    pub renewals: u64,
    /// How often its lease lapsed.
    pub lapses: u64,
    /// Purges that some member has not confirmed. Gauge.
    pub purges_open: u64,
    /// The others.
    pub peers: Vec<PeerStatus>,
}

/// What everything here shares.
pub(crate) struct Shared {
    driver: Arc<Driver>,
    domains: Arc<Domains>,
    versions: Arc<VersionBook>,
    regions: Regions,
    verbs: Option<Arc<Verbs>>,
    /// Why there is no RDMA.
    rdma: String,
    credentials: Credentials,
    introduction: Introduction,
    generations: Generations,
    reading: Reading,
    summing: Summing,
    /// `None`: peers are read from unasked.
    weighing: Option<Weighing>,
    patience: Patience,
    links: RwLock<Vec<Arc<Link>>>,
    given: Given,
    connections: Connections,
    lease_ttl: Duration,
    fetch_timeout: Duration,
    query_timeout: Duration,
    next_client: AtomicU64,
    stopping: AtomicBool,
    purging: OnceLock<Weak<Purging>>,
    copying: Copying,
}

/// See the module.
pub(crate) struct Peers {
    shared: Arc<Shared>,
    server: Server,
    surroundings: Arc<Surroundings>,
    members: Members,
    threads: Mutex<Vec<JoinHandle<()>>>,
    wake: Arc<(Mutex<bool>, Condvar)>,
}

/// Where the list of members comes from.
struct Members {
    own: String,
    listed: Vec<String>,
    dns: Option<String>,
    #[cfg(feature = "redis")]
    directory: Option<Mutex<directory::Directory>>,
    /// When each of those that are not listed was last there. A name that is missing once, or a server that lost what it had, ends
    /// no membership.
    seen: Mutex<BTreeMap<String, Instant>>,
}

impl Peers {
    /// Listens, and begins to connect to the others. `None` where the settings name no address to listen at.
    pub(super) fn start(
        settings: &CheckedSettings,
        driver: &Arc<Driver>,
        domains: &Arc<Domains>,
        versions: &Arc<VersionBook>,
        observer: &dyn Fn(StartProgress),
    ) -> Result<Option<Arc<Peers>>, StartError> {
        let Some(listen) = settings.peer_listen else {
            return Ok(None);
        };
        let refused = |address: String| move |source: io::Error| StartError::Peers { address, source };
        let secret = match &settings.peer_secret_file {
            Some(path) => Some(read_secret(path).map_err(refused(path.display().to_string()))?),
            None => None,
        };
        let listener = TcpListener::bind(listen).map_err(refused(listen.to_string()))?;
        let bound = listener.local_addr().map_err(refused(listen.to_string()))?;
        let own = settings.peer_address.clone().unwrap_or_else(|| bound.to_string());
        let secret = ClusterSecret::new(secret.as_deref().map(Vec::as_slice));
        let transport_secret = Secret::new(&secret.for_transport());
        let data_listen = SocketAddr::new(bound.ip(), settings.peer_data_port);
        let tls = open_tls(settings)?;
        let tcp = Tcp::start(TcpSettings {
            tls: tls.clone(),
            listen: data_listen,
            connections: settings.peer_connections as usize,
            secret: Some(transport_secret.clone()),
            ..TcpSettings::default()
        })
        .map_err(refused(data_listen.to_string()))?;
        let tcp = Arc::new(tcp);
        let credentials = Credentials {
            secret: secret.clone(),
            tls,
        };
        let (verbs, rdma) = open_verbs(settings, &transport_secret)?;
        if let Some(words) = rdma.as_ref() {
            observer(StartProgress::Note(format!("{words}: peers are read over TCP")));
        }
        let PeerAddress::Tcp(data) = tcp.address() else {
            unreachable!("the address of a TCP transport")
        };
        let mut incarnation = [0; 8];
        getrandom::fill(&mut incarnation).map_err(|error| StartError::Resources(io::Error::other(error)))?;
        let introduction = Introduction {
            member: versions.own().to_string(),
            address: own.clone(),
            incarnation: u64::from_le_bytes(incarnation),
            tcp: data.to_string(),
            verbs: verbs.is_some(),
        };
        let members = Members {
            own: own.clone(),
            listed: settings.peers.clone(),
            dns: settings.peers_dns.clone(),
            #[cfg(feature = "redis")]
            directory: open_directory(settings, &introduction)?,
            seen: Mutex::default(),
        };
        if settings.cluster_fence && !settings.peers.contains(&own) {
            return Err(StartError::NotAMember { own });
        }
        let (generations, queue) = Generations::new(
            own,
            members.now().unwrap_or_else(|| vec![members.own.clone()]),
            ClusterSettings {
                fenced: settings.cluster_fence,
                lease_ttl: Duration::from_millis(settings.cluster_lease_ms),
                renew_every: Duration::from_millis(settings.cluster_renew_ms),
                name_bytes_max: cluster_wire::NAME_BYTES_MAX,
                ..ClusterSettings::default()
            },
        );
        let (reading, work) = Reading::new(settings.peer_readers as usize);
        let (summing, to_sum) = Summing::new(settings.peer_sums_ahead);
        let shared = Arc::new(Shared {
            regions: Regions::new(Arc::clone(&driver.host), Arc::clone(&tcp), verbs.clone()),
            driver: Arc::clone(driver),
            domains: Arc::clone(domains),
            versions: Arc::clone(versions),
            verbs: verbs.clone(),
            rdma: rdma.unwrap_or_default(),
            credentials: credentials.clone(),
            introduction: introduction.clone(),
            generations,
            reading,
            summing,
            weighing: Weighing::new(
                settings,
                settings.peer_gate,
                Duration::from_millis(settings.peer_fetch_timeout_ms),
            ),
            patience: Patience::default(),
            links: RwLock::default(),
            given: Given::default(),
            connections: Connections::default(),
            lease_ttl: Duration::from_millis(settings.peer_lease_ttl_ms),
            fetch_timeout: Duration::from_millis(settings.peer_fetch_timeout_ms),
            query_timeout: Duration::from_millis(settings.peer_query_timeout_ms),
            next_client: AtomicU64::new(FIRST_CLIENT),
            stopping: AtomicBool::new(false),
            purging: OnceLock::new(),
            copying: Copying::default(),
        });
        shared.generations.bind(&shared);
        let surroundings = Arc::new(Surroundings {
            credentials,
            own: introduction,
            tcp,
            with_verbs: verbs.is_some(),
            verbs,
        });
        let mut threads = Vec::new();
        let machine = Arc::clone(&shared);
        threads.push(spawn("kvtier-cluster", move || machine.generations.run(&queue))?);
        for reader in 0..settings.peer_readers {
            let (shared, work) = (Arc::clone(&shared), work.clone());
            threads.push(spawn(&format!("kvtier-read-{reader}"), move || shared.read(&work))?);
        }
        if let Some(to_sum) = to_sum {
            let shared = Arc::clone(&shared);
            threads.push(spawn("kvtier-sums", move || shared.sum(&to_sum))?);
        }
        if shared.weighing.is_some() {
            let probing = Arc::clone(&shared);
            threads.push(spawn("kvtier-probe", move || probing.probe_peers())?);
            let judging = Arc::clone(&shared);
            threads.push(spawn("kvtier-judge", move || {
                if let Some(weighing) = &judging.weighing {
                    let is_stopping = || judging.is_stopping();
                    judging.patience.judge_attempts(weighing, &judging.driver, is_stopping);
                }
            })?);
        } else {
            observer(StartProgress::Note(
                "cost_model names no model: peers are read from without asking whether it pays".into(),
            ));
        }
        let server = Server::start(listener, &shared).map_err(StartError::Resources)?;
        let peers = Arc::new(Peers {
            shared,
            server,
            surroundings,
            members,
            threads: Mutex::new(threads),
            wake: Arc::default(),
        });
        peers.follow(&peers.shared.generations.members());
        if peers.members.is_dynamic() {
            let (following, wake) = (Arc::downgrade(&peers), Arc::clone(&peers.wake));
            let thread = spawn("kvtier-members", move || {
                loop {
                    let mut stop = wake.0.lock();
                    if !*stop {
                        wake.1.wait_for(&mut stop, RESOLVE_INTERVAL);
                    }
                    if *stop {
                        return;
                    }
                    drop(stop);
                    let Some(peers) = following.upgrade() else { return };
                    let Some(members) = peers.members.now() else { continue };
                    peers.shared.generations.set_members(members.clone());
                    peers.follow(&members);
                }
            })?;
            peers.threads.lock().push(thread);
        }
        Ok(Some(peers))
    }

    /// Waits a while for the members that can be reached to say what they invalidated while this node was away.
    pub(super) fn learn(&self) -> usize {
        let others = self.shared.generations.members().len().saturating_sub(1);
        let until = Instant::now() + LEARN_TIMEOUT;
        self.shared.generations.await_learnt(others, until)
    }

    pub(super) fn bind(&self, purging: &Arc<Purging>) {
        let _ = self.shared.purging.set(Arc::downgrade(purging));
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        *self.wake.0.lock() = true;
        self.wake.1.notify_all();
        self.members.leave();
        self.server.close();
        for link in self.shared.links.write().drain(..) {
            link.close();
        }
        self.shared.generations.stop();
        self.shared.reading.stop();
        self.shared.summing.stop();
        self.shared.patience.stop();
        for thread in self.threads.lock().drain(..) {
            // One that panicked has already said so.
            let _ = thread.join();
        }
    }

    /// Connects to who is new, and lets go of who is a member no more.
    fn follow(&self, members: &[String]) {
        let mut links = self.shared.links.write();
        links.retain(|link| {
            let stays = members.contains(&link.address);
            if !stays {
                link.close();
            }
            stays
        });
        for address in members.iter().filter(|address| **address != self.members.own) {
            if links.iter().any(|link| link.address == *address) {
                continue;
            }
            match Link::start(address.clone(), Arc::clone(&self.surroundings)) {
                Ok(link) => links.push(link),
                Err(error) => tracing::warn!(%error, "no thread for a peer: raise the limit of processes"),
            }
        }
    }
}

impl Members {
    fn is_dynamic(&self) -> bool {
        #[cfg(feature = "redis")]
        if self.directory.is_some() {
            return true;
        }
        self.dns.is_some()
    }

    /// Addresses of all members, this node included, in an order that all of them share; `None` while whoever knows them does not
    /// answer: they stay as they were.
    fn now(&self) -> Option<Vec<String>> {
        let mut found = Vec::new();
        if let Some(name) = &self.dns {
            match name.to_socket_addrs() {
                Ok(addresses) => found.extend(addresses.map(|address| address.to_string())),
                Err(error) => {
                    tracing::warn!(name, %error, "the members' name cannot be looked up");
                    return None;
                }
            }
        }
        #[cfg(feature = "redis")]
        if let Some(directory) = &self.directory {
            let mut directory = directory.lock();
            match directory.exchange() {
                Ok(members) => found.extend(members),
                Err(error) => {
                    tracing::warn!(server = directory.name, %error, "the directory of members does not answer");
                    return None;
                }
            }
        }
        let now = Instant::now();
        let mut seen = self.seen.lock();
        seen.extend(found.into_iter().map(|member| (member, now)));
        seen.retain(|_, last| now.duration_since(*last) < MEMBER_EXPIRY);
        let mut members = self.listed.clone();
        members.extend(seen.keys().cloned());
        members.push(self.own.clone());
        members.sort_unstable();
        members.dedup();
        Some(members)
    }

    fn leave(&self) {
        #[cfg(feature = "redis")]
        if let Some(directory) = &self.directory {
            directory.lock().leave();
        }
    }
}

impl Shared {
    /// The RDMA transport, where there is one.
    pub(crate) fn verbs(&self) -> Option<Arc<Verbs>> {
        self.verbs.clone()
    }

    /// Takes back what peers hold of a domain: when they have given it back, or after `grace`. Then its memory is registered
    /// with no peer. False where one may still reach it.
    pub(crate) fn cut(&self, domain: TrustDomain, grace: Duration) -> bool {
        let until = Instant::now() + grace.min(self.lease_ttl);
        while self.connections.lock().values().any(|served| served.holds(domain)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        let revoked = self.regions.revoke(domain);
        for served in self.connections.lock().values() {
            served.end_leases(domain);
        }
        revoked
    }

    fn links(&self) -> Vec<Arc<Link>> {
        self.links.read().clone()
    }

    fn next_client(&self) -> ClientId {
        ClientId(self.next_client.fetch_add(1, Ordering::Relaxed))
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Whether this node may answer anything but misses.
    pub(crate) fn is_serving(&self) -> bool {
        self.generations.is_serving()
    }

    /// Whether blocks that this node does not have may be had from peers.
    pub(crate) fn may_help(&self, domain: TrustDomain) -> bool {
        self.domains.is_shared(domain) && self.links.read().iter().any(|link| link.live().is_some())
    }

    /// Takes a fetch over; false when too many wait.
    pub(crate) fn fetch_from_peers(&self, job: FetchJob) -> bool {
        self.reading.submit(Job::Fetch(job))
    }

    /// Takes a lookup over; false when too many wait.
    pub(crate) fn look_at_peers(&self, job: LookupJob) -> bool {
        self.reading.submit(Job::Lookup(job))
    }

    /// Takes a question about a lookup over; false when too many wait.
    pub(crate) fn explain_to(&self, job: LookupJob) -> bool {
        self.reading.submit(Job::Explain(job))
    }

    /// Host memory is about to be given back. False where a peer may still reach it.
    pub(crate) fn close_segment(&self, segment: kvtier_core::SegmentId) -> bool {
        self.regions.close(segment)
    }

    /// This node's counters changed: others are told.
    pub(crate) fn note(&self, counters: &[Counter]) {
        self.generations.note(counters);
    }

    /// Keeps what is deleted from a namespace from being read again from peers: what was under way before has ended when this
    /// returns, and nothing that peers hold of the namespace is read until they have learned of it.
    pub(crate) fn set_apart(&self, namespace: NamespaceId, name: &str) -> Result<(), crate::keys::KeyError> {
        let counter = self.versions.set_apart(name)?;
        self.generations.note(&[counter]);
        self.copying.wait_for_earlier(namespace);
        Ok(())
    }

    /// Carries this node's latest invalidation of a namespace to every member.
    pub(crate) fn raise(&self, name: &str, within: Duration) -> Option<OperationId> {
        self.generations.raise(self.versions.own_counter(name)?, within)
    }

    pub(crate) fn await_reached(&self, operation: OperationId, until: Instant) -> Option<Progress> {
        self.generations.await_reached(operation, until)
    }

    pub(crate) fn progress(&self, operation: OperationId) -> Option<Progress> {
        self.generations.progress(operation)
    }

    pub(crate) fn members(&self) -> Vec<String> {
        self.generations.members()
    }

    /// How this node is called among its members.
    pub(crate) fn address(&self) -> &str {
        &self.introduction.address
    }

    /// Has a member do something, and waits for its answer.
    pub(crate) fn command_to(&self, address: &str, json: String, until: Instant) -> Option<String> {
        let link = self.links().into_iter().find(|link| link.address == address)?;
        match link.ask(&message::Message::Command(json), until) {
            Ok(message::Message::Answered(answer)) => Some(answer),
            Ok(_) | Err(_) => None,
        }
    }

    /// Whether members serve only while a majority renews them.
    pub(crate) fn is_fenced(&self) -> bool {
        self.generations.is_fenced()
    }

    fn command(&self, json: &str) -> String {
        match self.purging.get().and_then(Weak::upgrade) {
            Some(purging) => purging.command_of_peer(json),
            None => r#"{"error":"the node starts"}"#.into(),
        }
    }

    pub(crate) fn status(&self) -> ClusterStatus {
        let statistics = self.generations.statistics();
        let decisions = self.weighing.as_ref().map_or((0, 0), Weighing::decisions);
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let peers = self.links().into_iter().map(|link| {
            let peer = link.peer();
            let rail = |rail: kvtier_transfer::RailReport| RailStatus {
                name: rail.name,
                usable: rail.usable,
                bytes: rail.bytes,
                bytes_per_second: rail.bytes_per_second as u64,
                errors: rail.errors,
                reconnects: rail.reconnects,
            };
            let now = self.driver.clock.now();
            let gate = self
                .weighing
                .as_ref()
                .and_then(|weighing| weighing.gate(now, &link.address));
            let gate = gate.unwrap_or_default();
            PeerStatus {
                gate: match (gate.open, gate.reason.as_str()) {
                    (_, "") => String::new(),
                    (true, reason) => format!("open: {reason} ({:.3})", gate.value),
                    (false, reason) => format!("closed: {reason} ({:.3})", gate.value),
                },
                expected_bytes_per_second: gate.bytes_per_second,
                expected_lookup_us: gate.lookup_us,
                latest_decision: gate.latest,
                address: link.address.clone(),
                state: if peer.is_some() { "connected" } else { "away" }.into(),
                trouble: if peer.is_some() { String::new() } else { link.trouble() },
                member: peer.map(|peer| peer.member).unwrap_or_default(),
                transport: match link.way() {
                    Some(Way::Verbs) => "verbs".into(),
                    Some(Way::Tcp) => "tcp".into(),
                    None => String::new(),
                },
                connections: load(&link.counts.connections),
                blocks: load(&link.counts.blocks),
                bytes: load(&link.counts.bytes),
                late: load(&link.counts.late),
                failed: load(&link.counts.failed),
                corrupt: load(&link.counts.corrupt),
                stale: load(&link.counts.stale),
                given_up: load(&link.late.given_up),
                late_blocks: load(&link.late.blocks),
                rails: link.rails().into_iter().map(rail).collect(),
            }
        });
        ClusterStatus {
            address: self.introduction.address.clone(),
            member: self.introduction.member.clone(),
            fenced: self.is_fenced(),
            serving: self.is_serving(),
            members: self.members(),
            rdma: self.rdma.clone(),
            leased_blocks: load(&self.given.blocks),
            leased_bytes: load(&self.given.bytes),
            summed_ahead: load(&self.given.summed),
            leases_expired: load(&self.given.expired),
            refused: load(&self.given.refused),
            decisions_fetch: decisions.0,
            decisions_recompute: decisions.1,
            terms: self.weighing.as_ref().map_or_else(Vec::new, Weighing::terms),
            segments_registered: self.regions.count() as u64,
            renewals: statistics.rounds,
            lapses: statistics.lapses,
            purges_open: statistics.operations,
            peers: peers.collect(),
        }
    }
}

fn read_secret(path: &Path) -> io::Result<zeroize::Zeroizing<Vec<u8>>> {
    let bytes = zeroize::Zeroizing::new(std::fs::read(path)?);
    let trimmed = zeroize::Zeroizing::new(bytes.trim_ascii().to_vec());
    if trimmed.len() < 16 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a cluster's secret has at least 16 bytes",
        ));
    }
    Ok(trimmed)
}

/// Certificates of members, where the settings name some.
fn open_tls(settings: &CheckedSettings) -> Result<Option<Tls>, StartError> {
    let (Some(certificate), Some(key), Some(authorities)) = (
        &settings.peer_tls_certificate_file,
        &settings.peer_tls_key_file,
        &settings.peer_tls_ca_file,
    ) else {
        return Ok(None);
    };
    let read = |path: &Path| {
        std::fs::read(path).map_err(|source| StartError::Peers {
            address: path.display().to_string(),
            source,
        })
    };
    let secret = zeroize::Zeroizing::new(read(key)?);
    let name = settings.peer_tls_name.as_deref();
    let tls = Tls::new(&read(certificate)?, &secret, &read(authorities)?, name);
    let refused = |error: TlsError| StartError::Peers {
        address: certificate.display().to_string(),
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    };
    tls.map(Some).map_err(refused)
}

#[cfg(feature = "redis")]
fn open_directory(
    settings: &CheckedSettings,
    own: &Introduction,
) -> Result<Option<Mutex<directory::Directory>>, StartError> {
    let Some(url) = &settings.peers_redis else {
        return Ok(None);
    };
    let refused = |source| StartError::Peers {
        address: "peers_redis".into(),
        source,
    };
    let password = settings.peers_redis_password_file.as_ref().map(std::fs::read_to_string);
    let password = password.transpose().map_err(refused)?.map(zeroize::Zeroizing::new);
    let password = password.as_ref().map(|text| text.trim());
    let directory = directory::Directory::new(url, password, &settings.cluster_name, own).map_err(refused)?;
    Ok(Some(Mutex::new(directory)))
}

fn open_verbs(settings: &CheckedSettings, secret: &Secret) -> Result<(Option<Arc<Verbs>>, Option<String>), StartError> {
    if settings.peer_transport == PeerTransport::Tcp {
        return Ok((None, None));
    }
    if settings.peer_transport == PeerTransport::Auto && settings.peer_tls_certificate_file.is_some() {
        // Whether there is a device or not: one could appear between two looks.
        let words = "RDMA carries plain bytes and the settings ask for TLS (peer_transport = \"verbs\" has both)";
        return Ok((None, Some(words.to_owned())));
    }
    // Handshakes go over the peers' own channel; this port is for those of the transport itself.
    let opened = Verbs::start(VerbsSettings {
        devices: settings.peer_devices.clone(),
        secret: Some(secret.clone()),
        ..VerbsSettings::default()
    });
    match opened {
        Ok(verbs) => Ok((Some(Arc::new(verbs)), None)),
        Err(error) if settings.peer_transport == PeerTransport::Verbs => Err(StartError::Rdma(error.to_string())),
        Err(error) => Ok((None, Some(error.to_string()))),
    }
}
