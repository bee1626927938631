//! The side that peers ask: leases blocks to them, and says what it has.
//!
//! A peer is a client of the tier manager, one for each trust domain it asks about. Time alone governs it: a lease that it
//! does not give back ends by itself, and what a lost connection held ends no earlier than the peer would have stopped
//! reading. Two threads a connection: one receives, one answers, so that a block that is read from NVMe first holds nobody up.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use kvtier_core::{
    Answer, BlockHash, ClientId, Departure, FetchScope, Fetched, Hints, LeaseId, NamespaceId, Realization,
    RealizationId, Request, TrustDomain,
};
use kvtier_transfer::rdma::Session as RdmaSession;
use parking_lot::Mutex;

use super::Shared;
use super::channel::{Channel, FrameReader, FrameWriter};
use super::message::{Acquired, Held, Introduction, Keys, Message, Versions};
use super::regions::Way;
use crate::node::driver::Waiter;

/// How long a stranger may take to introduce itself.
const GREETING_PATIENCE: Duration = Duration::from_secs(2);
/// Connections of peers at once.
const CONNECTIONS_MAX: usize = 1024;
/// How often leases are looked at.
const TICK: Duration = Duration::from_millis(100);
/// Blocks of so many bytes are described by the thread that was asked.
const DESCRIBED_AT_ONCE_BYTES: u64 = 1 << 20;
/// Replies that wait to be sent on one connection; past it the connection ends.
const REPLIES_MAX: usize = 4096;

/// The accepting thread and the connections it made.
pub(super) struct Server {
    address: SocketAddr,
    closed: Arc<AtomicBool>,
    accepting: Mutex<Option<JoinHandle<()>>>,
    shared: Weak<Shared>,
}

/// Connections of peers, by number.
pub(super) type Connections = Mutex<HashMap<u64, Arc<Served>>>;

/// What peers were given.
#[derive(Default)]
pub(super) struct Given {
    pub(super) blocks: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) expired: AtomicU64,
    pub(super) refused: AtomicU64,
    /// Blocks summed before a peer asked.
    pub(super) summed: AtomicU64,
}

/// One connection of a peer.
pub(super) struct Served {
    shared: Arc<Shared>,
    stream: Arc<TcpStream>,
    peer: Introduction,
    way: Way,
    writer: Mutex<FrameWriter>,
    replies: Sender<Reply>,
    clients: Mutex<HashMap<TrustDomain, Leases>>,
    rdma: Option<RdmaSession>,
}

/// What a peer holds in one domain, the earliest first.
struct Leases {
    client: ClientId,
    held: VecDeque<(Instant, LeaseId)>,
}

/// Work of the answering thread.
enum Reply {
    Ready(u64, Message),
    /// A fetch is decided: describe what was leased.
    Fetched(Box<Asked>, Vec<Fetched>),
    Stop,
}

/// An acquisition under way.
struct Asked {
    number: u64,
    versions: Versions,
    client: ClientId,
    domain: TrustDomain,
    name: String,
}

impl Server {
    pub(super) fn start(listener: TcpListener, shared: &Arc<Shared>) -> io::Result<Server> {
        let address = listener.local_addr()?;
        let closed = Arc::new(AtomicBool::new(false));
        let server = Server {
            address,
            closed: Arc::clone(&closed),
            accepting: Mutex::new(None),
            shared: Arc::downgrade(shared),
        };
        let weak = Arc::downgrade(shared);
        let thread = std::thread::Builder::new().name("kvtier-peers".into()).spawn(move || {
            let mut next = 0;
            for stream in listener.incoming() {
                if closed.load(Ordering::Acquire) {
                    return;
                }
                let (Ok(stream), Some(shared)) = (stream, weak.upgrade()) else {
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                };
                if shared.connections.lock().len() >= CONNECTIONS_MAX {
                    continue;
                }
                next += 1;
                let number = next;
                let spawned = std::thread::Builder::new()
                    .name("kvtier-peer-ask".into())
                    .spawn(move || welcome(&shared, stream, number));
                if let Err(error) = spawned {
                    tracing::warn!(%error, "no thread for a peer: raise the limit of processes");
                }
            }
        })?;
        *server.accepting.lock() = Some(thread);
        Ok(server)
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let mut local = self.address;
        if local.ip().is_unspecified() {
            local.set_ip(match local {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        // Wakes the accepting thread.
        let _ = TcpStream::connect_timeout(&local, Duration::from_secs(1));
        if let Some(shared) = self.shared.upgrade() {
            for served in shared.connections.lock().values() {
                let _ = served.stream.shutdown(Shutdown::Both);
            }
        }
        if let Some(thread) = self.accepting.lock().take() {
            let _ = thread.join();
        }
    }
}

fn welcome(shared: &Arc<Shared>, stream: TcpStream, number: u64) {
    let from = stream
        .peer_addr()
        .map_or_else(|_| "?".to_owned(), |address| address.to_string());
    let channel = match Channel::answer(stream, &shared.credentials, GREETING_PATIENCE) {
        Ok(channel) => channel,
        Err(error) => {
            if error.kind() == io::ErrorKind::PermissionDenied {
                tracing::warn!(from, %error, "somebody who is no member was refused");
            }
            return;
        }
    };
    let (writer, mut reader, stream) = channel.split();
    if let Some((served, replies)) = introduce(shared, writer, &mut reader, &stream) {
        let served = Arc::new(served);
        shared.connections.lock().insert(number, Arc::clone(&served));
        let answering = Arc::clone(&served);
        let answerer = std::thread::Builder::new()
            .name("kvtier-peer-tell".into())
            .spawn(move || answering.answer(&replies));
        if answerer.is_ok() {
            let why = served.receive(&mut reader);
            tracing::debug!(from, member = served.peer.member, %why, "a peer's connection ended");
        }
        let _ = served.stream.shutdown(Shutdown::Both);
        let _ = served.replies.send(Reply::Stop);
        served.outlive();
        shared.connections.lock().remove(&number);
    }
}

/// Takes the first message, and has the reply to it sent.
fn introduce(
    shared: &Arc<Shared>,
    writer: FrameWriter,
    reader: &mut FrameReader,
    stream: &Arc<TcpStream>,
) -> Option<(Served, Receiver<Reply>)> {
    stream.set_read_timeout(Some(GREETING_PATIENCE)).ok()?;
    let (number, message) = Message::decode(reader.receive().ok()?).ok()?;
    stream.set_read_timeout(None).ok()?;
    let Message::Hello(peer) = message else { return None };
    let rdma = shared
        .verbs
        .as_ref()
        .filter(|_| peer.verbs)
        .map(|verbs| verbs.session());
    let way = if rdma.is_some() { Way::Verbs } else { Way::Tcp };
    // Bounded by what a connection may ask at once; the receiving side checks.
    let (replies, work) = crossbeam_channel::unbounded();
    let own = Introduction {
        verbs: rdma.is_some(),
        ..shared.introduction.clone()
    };
    let _ = replies.send(Reply::Ready(number, Message::Welcome(own)));
    let served = Served {
        shared: Arc::clone(shared),
        stream: Arc::clone(stream),
        peer,
        way,
        writer: Mutex::new(writer),
        replies,
        clients: Mutex::default(),
        rdma,
    };
    Some((served, work))
}

impl Served {
    /// Receives until the connection ends; says why.
    fn receive(self: &Arc<Self>, reader: &mut FrameReader) -> io::Error {
        loop {
            let decoded = match reader.receive() {
                Ok(body) => Message::decode(body),
                Err(error) => return error,
            };
            if self.replies.len() > REPLIES_MAX {
                return io::Error::other("it does not read what it is answered");
            }
            match decoded {
                Ok((number, message)) => {
                    if let Err(error) = self.serve(number, message) {
                        return error;
                    }
                }
                Err(error) => return io::Error::other(error),
            }
        }
    }

    fn serve(self: &Arc<Self>, number: u64, message: Message) -> io::Result<()> {
        let reply = match message {
            Message::Locate(keys) => self.locate(&keys),
            Message::Acquire { wait_ms, keys } => {
                return self.acquire(number, wait_ms, &keys);
            }
            Message::Release(leases) => {
                self.release(&leases);
                return Ok(());
            }
            Message::Connect(question) => match &self.rdma {
                Some(rdma) => Message::Connected(rdma.answer(&question)),
                None => return Err(io::Error::other("it wants RDMA, which was not agreed on")),
            },
            Message::Cluster(bytes) => {
                self.shared.generations.heard(&self.peer.address, &bytes);
                return Ok(());
            }
            Message::Probe => Message::Probed(self.shared.regions.probe(self.way).map_err(io::Error::other)?),
            Message::Learned => Message::Tables(self.shared.tables()),
            Message::Command(json) => return self.command(number, json),
            Message::Share {
                namespace,
                versions,
                public,
            } => Message::Shared(self.shared.share_group(&namespace, &versions, &public)),
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::Located { .. }
            | Message::Leased { .. }
            | Message::Connected(_)
            | Message::Answered(_)
            | Message::Shared(_)
            | Message::Tables(_)
            | Message::Probed(_) => return Err(io::Error::other("it says what nobody asked it")),
        };
        self.send(number, &reply)
    }

    fn send(&self, number: u64, message: &Message) -> io::Result<()> {
        let body = message.encode(number).map_err(io::Error::other)?;
        self.writer.lock().send(&body)
    }

    /// A purge may take its time: on a thread of its own.
    fn command(self: &Arc<Self>, number: u64, json: String) -> io::Result<()> {
        let mine = Arc::clone(self);
        let answering = std::thread::Builder::new()
            .name("kvtier-peer-do".into())
            .spawn(move || {
                let answer = Message::Answered(mine.shared.command(&json));
                let _ = mine.replies.send(Reply::Ready(number, answer));
            });
        answering.map(drop)
    }

    /// Ids of what keys name; `None` where this node does not share it, has never heard of it, or may not serve it now.
    fn resolve(&self, keys: &Keys) -> Option<(TrustDomain, NamespaceId, RealizationId, Versions)> {
        let (domain_name, name) = keys.namespace.split_once('/')?;
        let domain = self.shared.domains.shared(domain_name)?;
        let driver = &self.shared.driver;
        let (namespace, generation) = driver.look(|manager| manager.find_namespace(domain, name))?;
        if driver.recorder.refusal(domain_name, name, generation).is_some() || !self.shared.generations.is_serving() {
            return None;
        }
        let realization = driver.recorder.realizations.find(Realization(keys.realization))?;
        // Before anything is looked up: what is found then is of this list or of a later one.
        let versions = self.shared.versions.of(namespace, &keys.namespace)?;
        Some((domain, namespace, realization, versions))
    }

    fn locate(&self, keys: &Keys) -> Message {
        let nothing = Message::Located {
            versions: Versions::default(),
            tiers: vec![None; keys.hashes.len()],
        };
        let Some((domain, namespace, realization, versions)) = self.resolve(keys) else {
            return nothing;
        };
        let Some(client) = self.client(domain) else {
            return nothing;
        };
        let found = self.shared.driver.with(|decider, now| {
            let asked = request(client, namespace, realization, &keys.hashes, now);
            decider.manager.lookup(&asked, now)
        });
        match found {
            Ok(tiers) => Message::Located { versions, tiers },
            Err(_) => nothing,
        }
    }

    fn acquire(self: &Arc<Self>, number: u64, wait_ms: u32, keys: &Keys) -> io::Result<()> {
        let refuse = || {
            self.shared.given.refused.fetch_add(1, Ordering::Relaxed);
            let nothing = Message::Leased {
                versions: Versions::default(),
                regions: Vec::new(),
                outcomes: vec![Acquired::Absent; keys.hashes.len()],
            };
            self.send(number, &nothing)
        };
        let Some((domain, namespace, realization, versions)) = self.resolve(keys) else {
            return refuse();
        };
        let Some(client) = self.client(domain) else {
            return refuse();
        };
        let asked = Box::new(Asked {
            number,
            versions,
            client,
            domain,
            name: keys.namespace.clone(),
        });
        let wait = Duration::from_millis(wait_ms.into());
        let answer = self.shared.driver.with(|decider, now| {
            let request = Request {
                deadline: now.after(wait),
                ..request(client, namespace, realization, &keys.hashes, now)
            };
            match decider.manager.fetch(&request, FetchScope::Each, now) {
                Ok(Answer::Ready(results)) => Some((asked, results)),
                Ok(Answer::Pending(operation)) => {
                    let replies = self.replies.clone();
                    let told = move |results| drop(replies.send(Reply::Fetched(asked, results)));
                    decider.wait(operation, Waiter::Peer(Box::new(told)));
                    None
                }
                Err(_) => {
                    let absent = vec![Fetched::Miss; keys.hashes.len()];
                    Some((asked, absent))
                }
            }
        });
        match answer {
            // Where checksums may take their time the other thread takes them, and this one the next question.
            Some((asked, results)) if bytes_of(&results) > DESCRIBED_AT_ONCE_BYTES => {
                let _ = self.replies.send(Reply::Fetched(asked, results));
                Ok(())
            }
            Some((asked, results)) => self.send(number, &self.describe(&asked, &results)),
            None => Ok(()),
        }
    }

    /// The answering thread.
    fn answer(self: &Arc<Self>, work: &Receiver<Reply>) {
        loop {
            let (number, message) = match work.recv_timeout(TICK) {
                Ok(Reply::Ready(number, message)) => (number, message),
                Ok(Reply::Fetched(asked, results)) => (asked.number, self.describe(&asked, &results)),
                Ok(Reply::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    self.expire(Instant::now());
                    continue;
                }
            };
            if let Err(error) = self.send(number, &message) {
                tracing::debug!(%error, "a peer cannot be answered");
                let _ = self.stream.shutdown(Shutdown::Both);
                return;
            }
            self.expire(Instant::now());
        }
    }

    /// What the peer needs to read each block that was leased, its checksum among it.
    fn describe(&self, asked: &Asked, results: &[Fetched]) -> Message {
        let shared = &self.shared;
        let mut regions: Vec<Arc<Vec<u8>>> = Vec::new();
        let mut outcomes = Vec::with_capacity(results.len());
        let (mut held, mut unused) = (Vec::new(), Vec::new());
        let mut bytes = 0;
        for result in results {
            let Fetched::Leased { lease, extent, .. } = *result else {
                outcomes.push(if *result == Fetched::Busy {
                    Acquired::Busy
                } else {
                    Acquired::Absent
                });
                continue;
            };
            let described = shared
                .driver
                .look(|manager| manager.described(asked.client, lease))
                .and_then(|described| {
                    let checksum = match described.checksum {
                        Some(checksum) => checksum,
                        None => {
                            let computed = shared.driver.host.slice(&extent).ok()?.crc32c();
                            let note = |decider: &mut crate::node::driver::Decider, _| {
                                decider.manager.note_checksum(asked.client, lease, computed);
                            };
                            shared.driver.with(note);
                            computed
                        }
                    };
                    let region = match shared.regions.of(extent.segment, asked.domain, self.way) {
                        Ok(region) => region,
                        Err(error) => {
                            tracing::warn!(%error, "a segment cannot be registered for peers");
                            return None;
                        }
                    };
                    let place = regions.iter().position(|other| Arc::ptr_eq(other, &region));
                    let place = place.unwrap_or_else(|| {
                        regions.push(region);
                        regions.len() - 1
                    });
                    Some(Held {
                        lease: lease.0,
                        region: u32::try_from(place).unwrap_or(u32::MAX),
                        offset: extent.offset,
                        length: extent.length,
                        checksum,
                        tokens: described.tokens,
                        parent: described.parent,
                        labels: described.labels,
                    })
                });
            match described {
                Some(block) => {
                    bytes += u64::from(block.length);
                    held.push(lease);
                    outcomes.push(Acquired::Held(block));
                }
                None => {
                    unused.push(lease);
                    outcomes.push(Acquired::Absent);
                }
            }
        }
        shared.given.blocks.fetch_add(held.len() as u64, Ordering::Relaxed);
        shared.given.bytes.fetch_add(bytes, Ordering::Relaxed);
        let until = Instant::now() + shared.lease_ttl;
        let mut clients = self.clients.lock();
        if let Some(leases) = clients.get_mut(&asked.domain) {
            leases.held.extend(held.into_iter().map(|lease| (until, lease)));
        }
        drop(clients);
        self.give_back(asked.client, &unused);
        tracing::trace!(name = asked.name, bytes, "leased to a peer");
        Message::Leased {
            versions: asked.versions.clone(),
            regions: regions.iter().map(|region| (**region).clone()).collect(),
            outcomes,
        }
    }

    fn client(&self, domain: TrustDomain) -> Option<ClientId> {
        let mut clients = self.clients.lock();
        if let Some(leases) = clients.get(&domain) {
            return Some(leases.client);
        }
        let client = self.shared.next_client();
        let connected = self
            .shared
            .driver
            .with(|decider, now| decider.manager.connect(client, domain, now));
        connected.ok()?;
        clients.insert(
            domain,
            Leases {
                client,
                held: VecDeque::new(),
            },
        );
        Some(client)
    }

    fn give_back(&self, client: ClientId, leases: &[LeaseId]) {
        if !leases.is_empty() {
            self.shared
                .driver
                .with(|decider, now| decider.manager.release(client, leases, now));
        }
    }

    fn release(&self, leases: &[u64]) {
        let given: Vec<LeaseId> = leases.iter().map(|lease| LeaseId(*lease)).collect();
        let mut clients = self.clients.lock();
        for entry in clients.values_mut() {
            let mine: Vec<LeaseId> = entry
                .held
                .iter()
                .filter(|(_, lease)| given.contains(lease))
                .map(|(_, lease)| *lease)
                .collect();
            entry.held.retain(|(_, lease)| !mine.contains(lease));
            self.give_back(entry.client, &mine);
        }
    }

    /// Ends leases whose time is over.
    fn expire(&self, now: Instant) {
        let mut clients = self.clients.lock();
        for entry in clients.values_mut() {
            let due = entry.held.iter().take_while(|(until, _)| *until <= now).count();
            if due == 0 {
                continue;
            }
            let leases: Vec<LeaseId> = entry.held.drain(..due).map(|(_, lease)| lease).collect();
            self.shared.given.expired.fetch_add(due as u64, Ordering::Relaxed);
            self.give_back(entry.client, &leases);
        }
    }

    pub(super) fn holds(&self, domain: TrustDomain) -> bool {
        let clients = self.clients.lock();
        clients.get(&domain).is_some_and(|leases| !leases.held.is_empty())
    }

    pub(super) fn end_leases(&self, domain: TrustDomain) {
        let mut clients = self.clients.lock();
        if let Some(entry) = clients.get_mut(&domain) {
            let leases: Vec<LeaseId> = entry.held.drain(..).map(|(_, lease)| lease).collect();
            self.give_back(entry.client, &leases);
        }
    }

    /// The connection is gone; the peer may be reading still. What it held ends with its time.
    fn outlive(&self) {
        loop {
            let now = Instant::now();
            self.expire(now);
            let last = {
                let clients = self.clients.lock();
                clients.values().filter_map(|leases| Some(leases.held.back()?.0)).max()
            };
            match last {
                Some(last) if !self.shared.is_stopping() => {
                    std::thread::sleep(last.saturating_duration_since(now).min(TICK));
                }
                _ => break,
            }
        }
        let driver = &self.shared.driver;
        for (_, leases) in self.clients.lock().drain() {
            driver.with(|decider, now| decider.manager.disconnect(leases.client, Departure::Gone, now));
        }
    }
}

fn bytes_of(results: &[Fetched]) -> u64 {
    let bytes = |result: &Fetched| match result {
        Fetched::Leased { extent, .. } => u64::from(extent.length),
        Fetched::Miss | Fetched::Busy => 0,
    };
    results.iter().map(bytes).sum()
}

/// A question about these keys.
pub(in crate::node) fn request(
    client: ClientId,
    namespace: NamespaceId,
    realization: RealizationId,
    hashes: &[BlockHash],
    now: kvtier_core::Time,
) -> Request<'_> {
    Request {
        client,
        namespace,
        realization,
        hashes,
        hints: Hints::default(),
        deadline: now,
    }
}
