//! Notices: a number that one end tells the other, as immediate data of a message without bytes.
//!
//! Reads and writes leave the other processor out; who pushes bytes has to say so. Each notice takes a receive that the other end
//! has posted, and whoever takes the notice posts it again: no more wait to be taken than [`RECEIVES`] for each peer, and what is
//! sent beyond that waits at the sender until its deadline. They travel over a queue pair of their own, so that an owner who takes
//! none holds up no reads.
//!
//! No lock is held while the peer is asked or a queue pair is destroyed: the thread that takes completions serves everybody.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::Shared as Transport;
use super::exchange::Exchange;
use super::nic::{Claim, Completed, Nic, draw_psn, draw_taker};
use super::verbs::{Completion, QueuePair, Status};
use super::wire::{Answer, End, Question};
use crate::rails::Backoff;
use crate::transfer::{Batch, Cause, Refusal};

/// Notices of one peer that wait to be taken.
pub(super) const RECEIVES: u32 = 16;
/// Notices on their way to one peer.
const SENDS: u32 = 64;
/// The lane for notices: no rail has it.
pub(super) const LANE: u32 = u32::MAX - 1;
/// For the peer to connect the queue pair of notices.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// 4.096 µs times two to this power, 0.27 s, until an unanswered notice is sent again, seven times: a receiver that is not ready
/// is waited for, and Soft-RoCE counts that, too.
const ACK_TIMEOUT: u8 = 16;
const RETRIES: u8 = 7;
/// `rnr_retry`: the sender waits for a receive for as long as it takes.
const FOR_EVER: u8 = 7;

/// What peers told this node and nobody has taken yet.
#[derive(Default)]
pub struct Notices {
    arrived: Mutex<VecDeque<(u32, Arc<Credit>)>>,
    changed: Condvar,
}

impl Notices {
    /// The next one, in the order of arrival; those of one peer arrive in the order in which it sent them. `None`: none came in
    /// time.
    #[must_use]
    pub fn next(&self, patience: Duration) -> Option<u32> {
        let until = Instant::now() + patience;
        let mut arrived = self.arrived.lock();
        let (note, credit) = loop {
            if let Some(first) = arrived.pop_front() {
                break first;
            }
            if self.changed.wait_until(&mut arrived, until).timed_out() {
                break arrived.pop_front()?;
            }
        };
        drop(arrived);
        credit.give_back();
        Some(note)
    }
}

/// What one peer may send before somebody takes it, over whichever queue pair it has here now.
#[derive(Default)]
pub(super) struct Credit(Mutex<Held>);

#[derive(Default)]
struct Held {
    /// Notices that arrived and were not taken.
    waiting: u32,
    receiving: Weak<Receiving>,
}

impl Credit {
    fn give_back(&self) {
        let mut held = self.0.lock();
        held.waiting -= 1;
        if let Some(receiving) = held.receiving.upgrade() {
            // One that is gone needs none.
            let _ = receiving.post();
        }
    }
}

/// The end of a queue pair over which a peer sends notices.
pub(super) struct Receiving {
    /// None once ended.
    pair: Mutex<Option<Arc<QueuePair>>>,
    number: u32,
    nic: Arc<Nic>,
    _claim: Claim,
    notices: Arc<Notices>,
    credit: Arc<Credit>,
}

impl Receiving {
    /// A queue pair with as many receives as the peer has credits left, and the pair to connect.
    pub(super) fn new(
        nic: &Arc<Nic>,
        notices: &Arc<Notices>,
        credit: &Arc<Credit>,
    ) -> Result<(Arc<Receiving>, Arc<QueuePair>), String> {
        let refused = |error: io::Error| format!("{}: {error}", nic.name());
        if !nic.is_ordered() {
            return Err("iWARP has no immediate data".to_owned());
        }
        let no_room = || format!("{}: no room for completions of notices", nic.name());
        let claim = nic.claim(RECEIVES).ok_or_else(no_room)?;
        let pair = Arc::new(nic.receiving_pair(RECEIVES).map_err(refused)?);
        let receiving = Arc::new(Receiving {
            pair: Mutex::new(Some(Arc::clone(&pair))),
            number: draw_taker(),
            nic: Arc::clone(nic),
            _claim: claim,
            notices: Arc::clone(notices),
            credit: Arc::clone(credit),
        });
        let taker: Weak<dyn Completed> = Arc::downgrade(&receiving) as _;
        nic.deliver(receiving.number, taker);
        let mut held = credit.0.lock();
        held.receiving = Arc::downgrade(&receiving);
        for _ in held.waiting..RECEIVES {
            receiving.post().map_err(refused)?;
        }
        drop(held);
        Ok((receiving, pair))
    }

    fn post(&self) -> io::Result<()> {
        match &*self.pair.lock() {
            Some(pair) => pair.post_receive(u64::from(self.number) << 32),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Destroys the queue pair, on the thread that calls it.
    pub(super) fn end(&self) {
        let pair = self.pair.lock().take();
        drop(pair);
    }
}

impl Completed for Receiving {
    fn completed(&self, completions: &[Completion]) {
        // What is flushed when the queue pair goes carries none.
        let notes = completions
            .iter()
            .filter(|completion| completion.status == Status::Done);
        let notes: Vec<u32> = notes.filter_map(|completion| completion.note).collect();
        self.credit.0.lock().waiting += u32::try_from(notes.len()).unwrap_or(RECEIVES);
        let mut arrived = self.notices.arrived.lock();
        arrived.extend(notes.into_iter().map(|note| (note, Arc::clone(&self.credit))));
        drop(arrived);
        self.notices.changed.notify_all();
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.nic.undeliver(self.number);
    }
}

/// The sending end: connected when the first notice is sent, and anew after one was not taken in time.
#[derive(Default)]
pub(super) struct Sending {
    line: Mutex<Option<Arc<Line>>>,
    /// Held by whoever connects.
    connecting: Mutex<(Backoff, String)>,
    /// Lines that failed, to be ended by the watching thread.
    retired: Mutex<Vec<Arc<Line>>>,
}

/// One queue pair and what is on its way over it.
struct Line {
    number: u32,
    pair: Mutex<Option<QueuePair>>,
    /// In the order of sending.
    flight: Mutex<VecDeque<(u64, Arc<Batch>)>>,
    next: AtomicU32,
    /// It is of no more use.
    broke: AtomicBool,
    /// Why, in the device's words.
    failure: Mutex<Option<String>>,
    nic: Arc<Nic>,
    _claim: Claim,
    peer: Weak<dyn Sender>,
}

/// Whose notices they are.
pub(super) trait Sender: Send + Sync {
    /// As many notices are at rest, or a line is to be ended.
    fn at_rest(&self, count: usize);
}

impl Sending {
    /// Sends a notice; the outcome comes once the peer's NIC has taken it.
    pub(super) fn send(
        &self,
        transport: &Arc<Transport>,
        exchange: &dyn Exchange,
        peer: &Weak<dyn Sender>,
        note: u32,
        deadline: Instant,
    ) -> Result<Arc<Batch>, Refusal> {
        if transport.nics.iter().all(|nic| !nic.is_ordered()) {
            return Err(Refusal::Invalid {
                piece: 0,
                what: "iWARP has no immediate data, and no notices",
            });
        }
        let line = match self.usable() {
            Some(line) => line,
            None => self.connect(transport, exchange, peer, deadline)?,
        };
        let batch = Batch::new(Vec::new(), 1, deadline);
        let mut flight = line.flight.lock();
        let (in_flight, limit) = (flight.len(), SENDS as usize);
        if in_flight >= limit {
            return Err(Refusal::Busy { in_flight, limit });
        }
        let id = u64::from(line.number) << 32 | u64::from(line.next.fetch_add(1, Ordering::Relaxed));
        let posted = match &*line.pair.lock() {
            Some(pair) => pair.post_note(id, note),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        if let Err(error) = posted {
            drop(flight);
            line.fail(error.to_string());
            return Err(Refusal::Gone(error.to_string()));
        }
        flight.push_back((id, Arc::clone(&batch)));
        Ok(batch)
    }

    /// The line, unless it broke: then it is one to be ended.
    fn usable(&self) -> Option<Arc<Line>> {
        let mut current = self.line.lock();
        if current.as_ref().is_some_and(|line| line.broke.load(Ordering::Acquire)) {
            self.retired.lock().extend(current.take());
        }
        current.clone()
    }

    fn connect(
        &self,
        transport: &Arc<Transport>,
        exchange: &dyn Exchange,
        peer: &Weak<dyn Sender>,
        deadline: Instant,
    ) -> Result<Arc<Line>, Refusal> {
        let slow = || Refusal::Gone("it takes too long to connect a queue pair for notices".to_owned());
        let mut connecting = self.connecting.try_lock_until(deadline).ok_or_else(slow)?;
        // Somebody else did it meanwhile.
        if let Some(line) = self.usable() {
            return Ok(line);
        }
        let (backoff, why) = &mut *connecting;
        if !backoff.is_due(Instant::now()) {
            return Err(Refusal::Gone(why.clone()));
        }
        match Line::connect(transport, exchange, peer, deadline) {
            Ok(line) => {
                backoff.succeed();
                *self.line.lock() = Some(Arc::clone(&line));
                Ok(line)
            }
            Err(words) => {
                backoff.fail(Instant::now());
                why.clone_from(&words);
                Err(Refusal::Gone(words))
            }
        }
    }

    /// Ends lines that broke or have a notice that is late, with all that is on them. How many notices are at rest by that.
    pub(super) fn look(&self, now: Instant) -> usize {
        if let Some(line) = self.usable()
            && line.flight.lock().iter().any(|(_, batch)| batch.is_late(now))
        {
            line.fail("a notice of the same connection was not taken in time".to_owned());
            let _ = self.usable();
        }
        self.end_retired(now)
    }

    /// Ends everything.
    pub(super) fn close(&self) -> usize {
        if let Some(line) = self.line.lock().take() {
            line.fail("the peer was dropped".to_owned());
            self.retired.lock().push(line);
        }
        self.end_retired(Instant::now())
    }

    fn end_retired(&self, now: Instant) -> usize {
        let retired = std::mem::take(&mut *self.retired.lock());
        retired.iter().map(|line| line.end(now)).sum()
    }
}

impl Line {
    /// Over the first pair of NICs that connects.
    fn connect(
        transport: &Arc<Transport>,
        exchange: &dyn Exchange,
        peer: &Weak<dyn Sender>,
        deadline: Instant,
    ) -> Result<Arc<Line>, String> {
        let ask = |question: &Question| {
            let left = deadline.saturating_duration_since(Instant::now());
            let answer = exchange.ask(&question.encode(), left.min(CONNECT_PATIENCE));
            let answer = answer.map_err(|error| error.to_string())?;
            Answer::decode(&answer).ok_or_else(|| "it answered something else".to_owned())
        };
        let Answer::Described(remote) = ask(&Question::Describe)? else {
            return Err("it does not say what NICs it has".to_owned());
        };
        let mut why = "it has no NIC".to_owned();
        for at in 0..remote.len() {
            for nic in transport.nics.iter().filter(|nic| nic.is_ordered()) {
                if Instant::now() >= deadline {
                    return Err(why);
                }
                match Line::connect_by(transport, nic, at, &ask, peer) {
                    Ok(line) => return Ok(line),
                    Err(words) => why = words,
                }
            }
        }
        Err(why)
    }

    fn connect_by(
        transport: &Arc<Transport>,
        nic: &Arc<Nic>,
        remote: usize,
        ask: &dyn Fn(&Question) -> Result<Answer, String>,
        peer: &Weak<dyn Sender>,
    ) -> Result<Arc<Line>, String> {
        nic.check_active()?;
        let on_nic = |error: io::Error| format!("{}: {error}", nic.name());
        let no_room = || format!("{}: no room for completions of notices", nic.name());
        let claim = nic.claim(SENDS).ok_or_else(no_room)?;
        let pair = nic.queue_pair(claim.depth).map_err(on_nic)?;
        let psn = draw_psn();
        let question = Question::Connect {
            nic: u16::try_from(remote).unwrap_or(u16::MAX),
            lane: LANE,
            end: nic.end(pair.number(), psn),
        };
        let end: End = match ask(&question)? {
            Answer::Connected(end) => end,
            Answer::Refused(why) => return Err(format!("the peer: {why}")),
            Answer::Described(_) => return Err("it answered something else".to_owned()),
        };
        let mut path = nic.path(&end, &transport.settings)?;
        path.receiver_retries = FOR_EVER;
        path.timeout = path.timeout.max(ACK_TIMEOUT);
        path.retries = RETRIES;
        pair.connect(&path, psn, &end.destination).map_err(on_nic)?;
        let line = Arc::new(Line {
            number: draw_taker(),
            pair: Mutex::new(Some(pair)),
            flight: Mutex::default(),
            next: AtomicU32::new(0),
            broke: AtomicBool::new(false),
            failure: Mutex::default(),
            nic: Arc::clone(nic),
            _claim: claim,
            peer: Weak::clone(peer),
        });
        let taker: Weak<dyn Completed> = Arc::downgrade(&line) as _;
        nic.deliver(line.number, taker);
        Ok(line)
    }

    /// The first reason counts.
    fn fail(&self, why: String) {
        self.failure.lock().get_or_insert(why);
        self.broke.store(true, Ordering::Release);
    }

    /// Destroys the queue pair: nothing of it is under way any more.
    fn end(&self, now: Instant) -> usize {
        let pair = self.pair.lock().take();
        drop(pair);
        let why = self.failure.lock().clone().unwrap_or_default();
        let left = std::mem::take(&mut *self.flight.lock());
        let count = left.len();
        for (_, batch) in left {
            let cause = match batch.is_late(now) {
                true => Cause::Deadline,
                false => Cause::PeerGone(why.clone()),
            };
            batch.finish(0, Err(cause));
        }
        count
    }
}

impl Completed for Line {
    fn completed(&self, completions: &[Completion]) {
        let mut ended = Vec::new();
        {
            let mut flight = self.flight.lock();
            for completion in completions {
                if completion.status != Status::Done {
                    self.fail(completion.status.words());
                    break;
                }
                while let Some((id, batch)) = flight.pop_front() {
                    ended.push(batch);
                    if id == completion.id {
                        break;
                    }
                }
            }
        }
        let count = ended.len();
        for batch in ended {
            batch.finish(0, Ok(()));
        }
        if let Some(peer) = self.peer.upgrade() {
            peer.at_rest(count);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.nic.undeliver(self.number);
    }
}
