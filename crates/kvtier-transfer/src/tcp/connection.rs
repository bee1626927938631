//! One connection to a peer: what is in flight on it, and whoever reads from it.
//!
//! Answers come in the order of the requests. Reading is done by whoever waits for a batch; only when nobody who waits
//! reads does the connection's own thread. A connection that failed gives its slices back when nobody reads into them.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::channel::Channel;
use super::wire::{ANSWER_BYTES, Answer, REQUEST_BYTES, Request};
use crate::memory::MemorySlice;
use crate::remote::RegionId;
use crate::socket::{PARTS_MAX, Part, WhenFull};
use crate::transfer::{Batch, Cause, Direction};

/// A part of a piece, small enough to share the connections.
#[derive(Clone)]
pub(super) struct Slice {
    pub(super) batch: Arc<Batch>,
    pub(super) piece: usize,
    pub(super) local: MemorySlice,
    pub(super) region: RegionId,
    pub(super) offset: u64,
    pub(super) direction: Direction,
    /// Connections that failed with it.
    pub(super) attempts: u32,
}

impl Slice {
    fn length(&self) -> u64 {
        self.local.len() as u64
    }
}

/// Who gets what a connection has to say.
pub(super) trait Owner: Send + Sync {
    /// A slice is at rest.
    fn done(&self, slice: &Slice, result: Result<(), Cause>);
    /// The connection is of no more use; nobody touches the memory of these slices.
    fn lost(&self, connection: &Arc<Connection>, slices: Vec<Slice>, loss: Loss);
}

/// Why a connection was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// It broke.
    Broken(String),
    /// It was cut because a batch on it was late.
    Late,
    /// The peer was dropped.
    Closed,
}

pub(super) struct Connection {
    channel: Channel,
    owner: Weak<dyn Owner>,
    flight: Mutex<Flight>,
    /// Held by whoever reads.
    reading: Mutex<()>,
    outgoing: Mutex<Outgoing>,
    /// For the thread that sends what did not fit at once.
    to_send: Condvar,
    kicked: Mutex<bool>,
    to_read: Condvar,
    outstanding_bytes: AtomicU64,
    /// It has brought an answer.
    answered: AtomicBool,
}

#[derive(Default)]
struct Flight {
    queue: VecDeque<(u32, Slice)>,
    next_tag: u32,
    loss: Option<Loss>,
    /// The lost slices were given back.
    drained: bool,
}

#[derive(Default)]
struct Outgoing {
    queue: VecDeque<Message>,
    /// The sending thread is at it: everybody else only queues.
    active: bool,
    closed: bool,
}

struct Message {
    head: [u8; REQUEST_BYTES],
    body: Option<MemorySlice>,
    /// Bytes of both that have been sent.
    skipped: usize,
}

impl Message {
    fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        std::iter::once(Part::Bytes(&self.head)).chain(self.body.as_ref().map(Part::Memory))
    }

    fn len(&self) -> usize {
        REQUEST_BYTES + self.body.as_ref().map_or(0, MemorySlice::len)
    }
}

impl Connection {
    pub(super) fn start(channel: Channel, owner: Weak<dyn Owner>) -> io::Result<Arc<Connection>> {
        let connection = Arc::new(Connection {
            channel,
            owner,
            flight: Mutex::default(),
            reading: Mutex::new(()),
            outgoing: Mutex::default(),
            to_send: Condvar::new(),
            kicked: Mutex::new(false),
            to_read: Condvar::new(),
            outstanding_bytes: AtomicU64::new(0),
            answered: AtomicBool::new(false),
        });
        let named = |name: &str| std::thread::Builder::new().name(name.to_owned());
        named("kvtier-tcp-read").spawn({
            let connection = Arc::clone(&connection);
            move || connection.read_when_kicked()
        })?;
        let sender = named("kvtier-tcp-send").spawn({
            let connection = Arc::clone(&connection);
            move || connection.send_queued()
        });
        if let Err(error) = sender {
            connection.cut(Loss::Closed);
            return Err(error);
        }
        Ok(connection)
    }

    /// Whether it ever brought an answer: if so, that it broke says little about its peer.
    pub(super) fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Bytes in flight, to choose the least loaded.
    pub(super) fn outstanding_bytes(&self) -> u64 {
        self.outstanding_bytes.load(Ordering::Relaxed)
    }

    /// Sends requests. Gives the slices back when the connection is lost already.
    pub(super) fn submit(&self, slices: Vec<Slice>) -> Result<(), Vec<Slice>> {
        // Held while both queues grow, so that answers come in the order of the flight.
        let mut outgoing = self.outgoing.lock();
        let mut messages = Vec::with_capacity(slices.len());
        {
            let mut flight = self.flight.lock();
            if flight.loss.is_some() {
                return Err(slices);
            }
            for slice in slices {
                let tag = flight.next_tag;
                flight.next_tag = tag.wrapping_add(1);
                let request = Request {
                    direction: slice.direction,
                    tag,
                    region: slice.region,
                    offset: slice.offset,
                    length: slice.length(),
                };
                messages.push(Message {
                    head: request.encode(),
                    body: (slice.direction == Direction::Write).then(|| slice.local.clone()),
                    skipped: 0,
                });
                self.outstanding_bytes.fetch_add(slice.length(), Ordering::Relaxed);
                flight.queue.push_back((tag, slice));
            }
        }
        outgoing.queue.extend(messages);
        if outgoing.active {
            return Ok(());
        }
        match self.send_now(&mut outgoing) {
            Ok(true) => {}
            Ok(false) => {
                outgoing.active = true;
                self.to_send.notify_one();
            }
            Err(error) => {
                drop(outgoing);
                self.cut(Loss::Broken(error.to_string()));
            }
        }
        Ok(())
    }

    /// As much as the socket takes; whether that was all. What was begun stays at the front, cut to what is left of it.
    fn send_now(&self, outgoing: &mut Outgoing) -> io::Result<bool> {
        while !outgoing.queue.is_empty() {
            let count = outgoing.queue.len().min(PARTS_MAX / 2);
            let parts: Vec<Part<'_>> = outgoing.queue.iter().take(count).flat_map(Message::parts).collect();
            let sent = self.channel.send(&parts, 0, WhenFull::Return)?;
            let mut left = sent;
            while let Some(message) = outgoing.queue.front()
                && left >= message.len()
            {
                left -= message.len();
                outgoing.queue.pop_front();
            }
            if let Some(message) = outgoing.queue.front_mut()
                && (left > 0 || sent == 0)
            {
                // The rest of it must go before anything else: a thread of ours waits for room.
                message.skipped = left;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn send_queued(&self) {
        loop {
            let message = {
                let mut outgoing = self.outgoing.lock();
                loop {
                    if outgoing.closed {
                        return;
                    }
                    if outgoing.active {
                        match outgoing.queue.pop_front() {
                            Some(message) => break message,
                            None => outgoing.active = false,
                        }
                    }
                    self.to_send.wait(&mut outgoing);
                }
            };
            let parts: Vec<Part<'_>> = message.parts().collect();
            if let Err(error) = self.channel.send(&parts, message.skipped, WhenFull::Wait) {
                self.cut(Loss::Broken(error.to_string()));
                return;
            }
        }
    }

    /// Ends the connection: whoever reads sees it, and its slices go back once nobody reads.
    pub(super) fn cut(&self, loss: Loss) {
        self.flight.lock().loss.get_or_insert(loss);
        self.channel.shut();
        let mut outgoing = self.outgoing.lock();
        outgoing.closed = true;
        self.to_send.notify_all();
        drop(outgoing);
        self.kick();
    }

    /// Lets the connection's own thread read.
    pub(super) fn kick(&self) {
        *self.kicked.lock() = true;
        self.to_read.notify_one();
    }

    fn read_when_kicked(self: &Arc<Self>) {
        loop {
            {
                let mut kicked = self.kicked.lock();
                while !*kicked {
                    self.to_read.wait(&mut kicked);
                }
                *kicked = false;
            }
            let reading = self.reading.lock();
            while self.step(&reading) {}
            drop(reading);
            if self.flight.lock().drained {
                return;
            }
        }
    }

    /// Reads for a caller until `batch` has nothing left here. False when somebody else reads.
    pub(super) fn read_for(self: &Arc<Self>, batch: &Arc<Batch>) -> bool {
        let Some(reading) = self.reading.try_lock() else {
            return false;
        };
        while self.carries(batch) && self.step(&reading) {}
        drop(reading);
        let flight = self.flight.lock();
        // Somebody went to sleep while we read: hand over. Looked at after reading was let go of, as sleepers try to
        // read once more after they have announced themselves.
        if flight.queue.iter().any(|(_, slice)| slice.batch.has_sleeper()) || (flight.loss.is_some() && !flight.drained)
        {
            drop(flight);
            self.kick();
        }
        true
    }

    /// Whether slices of this batch are in flight here.
    pub(super) fn carries(&self, batch: &Arc<Batch>) -> bool {
        let flight = self.flight.lock();
        flight.queue.iter().any(|(_, slice)| Arc::ptr_eq(&slice.batch, batch))
    }

    /// Whether a batch in flight here is late.
    pub(super) fn is_late(&self, now: Instant) -> bool {
        self.flight
            .lock()
            .queue
            .iter()
            .any(|(_, slice)| slice.batch.is_late(now))
    }

    /// The tag at the front while nobody reads: if it stays the same, somebody should.
    pub(super) fn unread(&self) -> Option<u32> {
        let _nobody = self.reading.try_lock()?;
        self.flight.lock().queue.front().map(|(tag, _)| *tag)
    }

    /// Takes one answer. False when nothing is in flight, or the connection is lost: then its slices went back.
    fn step(self: &Arc<Self>, _reading: &MutexGuard<'_, ()>) -> bool {
        let front = {
            let flight = self.flight.lock();
            match (&flight.loss, flight.queue.front()) {
                (Some(_), _) => None,
                (None, Some((tag, slice))) => Some((*tag, slice.clone())),
                (None, None) => return false,
            }
        };
        let taken = match front {
            Some((tag, slice)) => self.take_answer(tag, &slice).map(|result| (slice, result)),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        match taken {
            Ok((slice, result)) => {
                self.answered.store(true, Ordering::Relaxed);
                self.flight.lock().queue.pop_front();
                self.outstanding_bytes.fetch_sub(slice.length(), Ordering::Relaxed);
                if let Some(owner) = self.owner.upgrade() {
                    owner.done(&slice, result);
                } else {
                    slice.batch.finish(slice.piece, result);
                }
                true
            }
            Err(error) => {
                self.cut(Loss::Broken(words(&error)));
                self.give_back();
                false
            }
        }
    }

    fn take_answer(&self, tag: u32, slice: &Slice) -> io::Result<Result<(), Cause>> {
        let mut bytes = [0; ANSWER_BYTES];
        (&self.channel).read_exact(&mut bytes)?;
        let answer = Answer::decode(&bytes).ok_or(io::ErrorKind::InvalidData)?;
        let body = match (answer.result, slice.direction) {
            (Ok(()), Direction::Read) => slice.length(),
            _ => 0,
        };
        if answer.tag != tag || answer.length != body {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if body > 0 {
            self.channel.receive_exactly(&slice.local)?;
        }
        Ok(answer.result.map_err(|denied| Cause::Denied(denied.words().to_owned())))
    }

    /// Called by whoever reads, after the loss is known: from here on nobody reads into these slices.
    fn give_back(self: &Arc<Self>) {
        let (slices, loss) = {
            let mut flight = self.flight.lock();
            if flight.drained {
                return;
            }
            flight.drained = true;
            let slices: Vec<Slice> = flight.queue.drain(..).map(|(_, slice)| slice).collect();
            (slices, flight.loss.clone().unwrap_or(Loss::Closed))
        };
        self.outstanding_bytes.store(0, Ordering::Relaxed);
        match self.owner.upgrade() {
            Some(owner) => owner.lost(self, slices, loss),
            None => slices.iter().for_each(|slice| {
                let cause = Cause::PeerGone("the connection was dropped".to_owned());
                slice.batch.finish(slice.piece, Err(cause));
            }),
        }
        // Ends the reading thread if it is not us.
        self.kick();
    }
}

fn words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "it closed the connection".to_owned(),
        io::ErrorKind::InvalidData => "it broke the protocol".to_owned(),
        _ => error.to_string(),
    }
}
