//! The way to one peer: a channel on which this node asks, and a transport that reads the peer's memory.
//!
//! A thread of its own connects, receives what is answered, and connects again after a pause that grows. Whoever asks meanwhile is told at
//! once that nobody is there. A peer that lets several questions pass unanswered is left alone for a while, too.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use kvtier_transfer::rails::Backoff;
use kvtier_transfer::rdma::{Exchange, Verbs};
use kvtier_transfer::tcp::Tcp;
use kvtier_transfer::{Peer, PeerAddress, RailReport, Transport};
use parking_lot::{Condvar, Mutex, RwLock};

use super::channel::{Channel, Credentials, FrameReader, FrameWriter};
use super::message::{Introduction, Message};
use super::regions::Way;
use crate::node::attempt::Late;

/// How long a connection may take to be made.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// Unanswered questions in a row after which a peer is left alone.
const UNANSWERED_MAX: u32 = 3;
/// Questions that wait for their answers.
const PENDING_MAX: usize = 4096;

/// What a link needs of its node.
pub(super) struct Surroundings {
    pub(super) credentials: Credentials,
    pub(super) own: Introduction,
    pub(super) tcp: Arc<Tcp>,
    pub(super) verbs: Option<Arc<Verbs>>,
    /// Whether RDMA is wanted at all.
    pub(super) with_verbs: bool,
}

/// Why a question has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// Nobody is connected, or it was left alone after it did not answer.
    Away,
    /// Not in time.
    Late,
}

/// See the module.
pub(super) struct Link {
    pub(super) address: String,
    surroundings: Arc<Surroundings>,
    live: RwLock<Option<Arc<Live>>>,
    closed: AtomicBool,
    wake: (Mutex<()>, Condvar),
    unanswered: Mutex<Quiet>,
    /// Why it is not connected.
    trouble: Mutex<String>,
    pub(super) counts: Counts,
    pub(super) late: Arc<Late>,
}

/// What became of questions and reads.
#[derive(Default)]
pub(super) struct Counts {
    pub(super) connections: AtomicU64,
    pub(super) late: AtomicU64,
    pub(super) blocks: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) corrupt: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) stale: AtomicU64,
    /// Of the latest block: how many are worth asking for at a time.
    pub(super) block_bytes: AtomicU64,
}

#[derive(Default)]
struct Quiet {
    in_row: u32,
    backoff: Backoff,
}

/// A connection while it lasts.
pub(super) struct Live {
    pub(super) peer: Introduction,
    pub(super) way: Way,
    pub(super) data: Box<dyn Peer>,
    writer: Mutex<FrameWriter>,
    stream: Arc<TcpStream>,
    pending: Mutex<HashMap<u64, Sender<Message>>>,
    next: AtomicU64,
    ended: AtomicBool,
}

impl Link {
    pub(super) fn start(address: String, surroundings: Arc<Surroundings>) -> io::Result<Arc<Link>> {
        let link = Arc::new(Link {
            address,
            surroundings,
            live: RwLock::new(None),
            closed: AtomicBool::new(false),
            wake: (Mutex::new(()), Condvar::new()),
            unanswered: Mutex::default(),
            trouble: Mutex::new("not reached yet".into()),
            counts: Counts::default(),
            late: Arc::default(),
        });
        let mine = Arc::clone(&link);
        std::thread::Builder::new()
            .name("kvtier-peer".into())
            .spawn(move || mine.keep_connected())?;
        Ok(link)
    }

    /// Ends the connection and the thread.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        if let Some(live) = self.live.write().take() {
            live.end();
        }
        let _guard = self.wake.0.lock();
        self.wake.1.notify_all();
    }

    /// The connection, if there is one and the peer is not being left alone.
    pub(super) fn live(&self) -> Option<Arc<Live>> {
        let live = self.live.read().clone()?;
        self.unanswered.lock().backoff.is_due(Instant::now()).then_some(live)
    }

    /// Who is at the other end, or was.
    pub(super) fn peer(&self) -> Option<Introduction> {
        self.live.read().as_ref().map(|live| live.peer.clone())
    }

    pub(super) fn rails(&self) -> Vec<RailReport> {
        self.live
            .read()
            .as_ref()
            .map_or_else(Vec::new, |live| live.data.rails())
    }

    pub(super) fn way(&self) -> Option<Way> {
        self.live.read().as_ref().map(|live| live.way)
    }

    pub(super) fn trouble(&self) -> String {
        self.trouble.lock().clone()
    }

    /// The answer to a question that was asked on this link, or why there is none.
    pub(super) fn answer(
        &self,
        asked: Result<Receiver<Message>, Unanswered>,
        until: Instant,
    ) -> Result<Message, Unanswered> {
        let outcome = match asked?.recv_deadline(until) {
            Ok(message) => Ok(message),
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => Err(Unanswered::Late),
            Err(crossbeam_channel::RecvTimeoutError::Disconnected) => Err(Unanswered::Away),
        };
        let mut quiet = self.unanswered.lock();
        match &outcome {
            Ok(_) => *quiet = Quiet::default(),
            Err(Unanswered::Late) => {
                self.counts.late.fetch_add(1, Ordering::Relaxed);
                quiet.in_row += 1;
                if quiet.in_row >= UNANSWERED_MAX {
                    quiet.backoff.fail(Instant::now());
                }
            }
            Err(Unanswered::Away) => {}
        }
        outcome
    }

    /// Asks and waits.
    pub(super) fn ask(&self, message: &Message, until: Instant) -> Result<Message, Unanswered> {
        let asked = self.live().ok_or(Unanswered::Away).and_then(|live| live.ask(message));
        self.answer(asked, until)
    }

    /// Says something that has no answer, if somebody is there.
    pub(super) fn tell(&self, message: &Message) {
        // Not through `live`: what keeps a cluster together is said to a slow member too.
        if let Some(live) = self.live.read().clone() {
            live.tell(message);
        }
    }

    fn keep_connected(self: Arc<Self>) {
        let mut backoff = Backoff::default();
        while !self.closed.load(Ordering::Acquire) {
            match self.connect() {
                Ok((live, mut reader)) => {
                    backoff = Backoff::default();
                    self.counts.connections.fetch_add(1, Ordering::Relaxed);
                    *self.unanswered.lock() = Quiet::default();
                    *self.live.write() = Some(Arc::clone(&live));
                    self.trouble.lock().clear();
                    tracing::info!(peer = self.address, member = live.peer.member, way = ?live.way, "a peer was reached");
                    let why = live.receive(&mut reader);
                    *self.live.write() = None;
                    live.end();
                    if !self.closed.load(Ordering::Acquire) {
                        tracing::warn!(peer = self.address, %why, "a peer was lost");
                    }
                    *self.trouble.lock() = why.to_string();
                }
                Err(error) => {
                    let words = error.to_string();
                    let mut trouble = self.trouble.lock();
                    if *trouble != words && !words.is_empty() {
                        tracing::warn!(peer = self.address, %error, "a peer cannot be reached");
                        *trouble = words;
                    }
                }
            }
            backoff.fail(Instant::now());
            let mut guard = self.wake.0.lock();
            while !self.closed.load(Ordering::Acquire) && !backoff.is_due(Instant::now()) {
                self.wake.1.wait_for(&mut guard, Duration::from_millis(20));
            }
        }
    }

    fn connect(self: &Arc<Self>) -> io::Result<(Arc<Live>, FrameReader)> {
        let wants_verbs = self.surroundings.with_verbs && self.surroundings.verbs.is_some();
        if wants_verbs {
            match self.connect_by(Way::Verbs) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    tracing::warn!(peer = self.address, %error, "RDMA is not used to a peer: TCP is");
                }
                connected => return connected,
            }
        }
        self.connect_by(Way::Tcp)
    }

    fn connect_by(self: &Arc<Self>, wanted: Way) -> io::Result<(Arc<Live>, FrameReader)> {
        let surroundings = &self.surroundings;
        let (stream, remote) = self.open()?;
        let channel = Channel::call(stream, remote, &surroundings.credentials, CONNECT_PATIENCE)?;
        let (mut writer, mut reader, stream) = channel.split();
        let hello = Message::Hello(Introduction {
            verbs: wanted == Way::Verbs,
            ..surroundings.own.clone()
        });
        writer.send(&hello.encode(0).map_err(io::Error::other)?)?;
        stream.set_read_timeout(Some(CONNECT_PATIENCE))?;
        let (_, answer) = Message::decode(reader.receive()?).map_err(io::Error::other)?;
        let Message::Welcome(peer) = answer else {
            return Err(io::Error::other("it does not introduce itself"));
        };
        if peer.member == surroundings.own.member {
            return Err(io::Error::other("it is this node itself"));
        }
        let way = if peer.verbs { wanted } else { Way::Tcp };
        // The handshake of RDMA goes over this connection, which must be received from meanwhile.
        let handshake = Arc::new(Handshake::default());
        let data: Box<dyn Peer> = match (way, &surroundings.verbs) {
            (Way::Verbs, Some(verbs)) => {
                handshake.put(writer, reader);
                let exchange = LinkExchange {
                    link: Arc::downgrade(self),
                    first: Arc::clone(&handshake),
                };
                let made = verbs.connect_through(self.address.clone(), Box::new(exchange), CONNECT_PATIENCE);
                let Some(both) = handshake.take() else {
                    return Err(io::Error::other("the connection broke during the RDMA handshake"));
                };
                (writer, reader) = both;
                made.map_err(|error| io::Error::new(io::ErrorKind::Unsupported, error.to_string()))?
            }
            _ => {
                let address = data_address(&peer.tcp, remote)?;
                surroundings
                    .tcp
                    .connect(&PeerAddress::Tcp(address), CONNECT_PATIENCE)
                    .map_err(|error| io::Error::other(error.to_string()))?
            }
        };
        stream.set_read_timeout(None)?;
        let live = Live {
            peer,
            way,
            data,
            writer: Mutex::new(writer),
            stream,
            pending: Mutex::default(),
            next: AtomicU64::new(1),
            ended: AtomicBool::new(false),
        };
        Ok((Arc::new(live), reader))
    }

    fn open(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in self.address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT_PATIENCE) {
                Ok(stream) => return Ok((stream, address)),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

impl Live {
    /// Asks; the answer comes on the channel.
    pub(super) fn ask(&self, message: &Message) -> Result<Receiver<Message>, Unanswered> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = crossbeam_channel::bounded(1);
        {
            let mut pending = self.pending.lock();
            if self.ended.load(Ordering::Acquire) || pending.len() >= PENDING_MAX {
                return Err(Unanswered::Away);
            }
            pending.insert(number, sender);
        }
        if !self.send(number, message) {
            self.pending.lock().remove(&number);
            return Err(Unanswered::Away);
        }
        Ok(receiver)
    }

    pub(super) fn tell(&self, message: &Message) {
        self.send(0, message);
    }

    fn send(&self, number: u64, message: &Message) -> bool {
        match message.encode(number) {
            Ok(body) => self.writer.lock().send(&body).is_ok(),
            Err(error) => {
                tracing::error!(%error, "a message to a peer does not fit: report this");
                false
            }
        }
    }

    /// Receives until the connection ends; says why.
    fn receive(&self, reader: &mut FrameReader) -> io::Error {
        loop {
            let decoded = match reader.receive() {
                Ok(body) => Message::decode(body),
                Err(error) => return error,
            };
            match decoded {
                Ok((number, message)) if message.is_reply() => {
                    // One that nobody waits for any more is late.
                    if let Some(sender) = self.pending.lock().remove(&number) {
                        let _ = sender.try_send(message);
                    }
                }
                Ok(_) => return io::Error::other("it asks where it is to answer"),
                Err(error) => return io::Error::other(error),
            }
        }
    }

    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        let _ = self.stream.shutdown(Shutdown::Both);
        // Whoever waits sees the other end go.
        self.pending.lock().clear();
    }
}

/// Where a peer's bytes are read: what it says, at the address it was reached at where it names none.
fn data_address(told: &str, reached: SocketAddr) -> io::Result<SocketAddr> {
    let mut address: SocketAddr = told
        .parse()
        .map_err(|_| io::Error::other(format!("it names {told:?} as the address of its data")))?;
    if address.ip().is_unspecified() {
        address.set_ip(reached.ip());
    }
    Ok(address)
}

/// The connection while its RDMA handshake goes on, before anybody else uses it.
#[derive(Default)]
struct Handshake(Mutex<Option<(FrameWriter, FrameReader)>>);

impl Handshake {
    fn put(&self, writer: FrameWriter, reader: FrameReader) {
        *self.0.lock() = Some((writer, reader));
    }

    fn take(&self) -> Option<(FrameWriter, FrameReader)> {
        self.0.lock().take()
    }

    /// `None`: the connection is in general use by now.
    fn ask(&self, question: &[u8]) -> Option<io::Result<Vec<u8>>> {
        let mut both = self.0.lock();
        let (writer, reader) = both.as_mut()?;
        let mut exchange = || {
            let body = Message::Connect(question.to_vec()).encode(u64::MAX);
            writer.send(&body.map_err(io::Error::other)?)?;
            match Message::decode(reader.receive()?).map_err(io::Error::other)? {
                (_, Message::Connected(answer)) => Ok(answer),
                _ => Err(io::Error::other("no answer to a step of the RDMA handshake")),
            }
        };
        let answer = exchange();
        if answer.is_err() {
            *both = None;
        }
        Some(answer)
    }
}

/// Carries the RDMA handshake, also when a rail is connected again later.
struct LinkExchange {
    link: Weak<Link>,
    first: Arc<Handshake>,
}

impl Exchange for LinkExchange {
    fn ask(&self, question: &[u8], patience: Duration) -> io::Result<Vec<u8>> {
        if let Some(answer) = self.first.ask(question) {
            return answer;
        }
        let away = |_| io::Error::from(io::ErrorKind::NotConnected);
        let link = self.link.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        let live = link.live.read().clone().ok_or(io::ErrorKind::NotConnected)?;
        let answer = live.ask(&Message::Connect(question.to_vec())).map_err(away)?;
        match answer.recv_timeout(patience) {
            Ok(Message::Connected(bytes)) => Ok(bytes),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}
