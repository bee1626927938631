//! A peer and the connections to it: who takes which slice, what becomes of one that broke, and the thread that watches
//! deadlines.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::channel::Channel;
use super::connection::{Connection, Loss, Owner, Slice};
use super::greet::{introduce_caller, within};
use super::{NotGreeted, TcpSettings, prepare};
use crate::rails::Backoff;
use crate::transfer::{self, Batch, Cause, Drive, Piece, Refusal, Refused, Transfer};
use crate::transport::{ConnectError, Peer, RailReport};

/// How often deadlines are looked at, and whether anybody reads.
const TICK: Duration = Duration::from_millis(2);
/// Ticks with nothing in flight before the thread sleeps until it is called.
const IDLE_TICKS: u32 = 50;
/// Connections that may break under a slice before the peer counts as gone; one that never answered counts for four. A cut
/// through all of them hits some slices on each, and on those that were made while it went on.
const ATTEMPTS_MAX: u32 = 16;
const UNANSWERED: u32 = 4;
/// For one attempt to connect anew.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(2);

pub(super) struct TcpPeer {
    shared: Arc<Shared>,
}

struct Shared {
    address: SocketAddr,
    settings: Arc<TcpSettings>,
    this: Weak<Shared>,
    slots: Mutex<Slots>,
    in_flight: AtomicUsize,
    bytes: AtomicU64,
    errors: AtomicU64,
    reconnects: AtomicU64,
    closed: AtomicBool,
    idle: Mutex<bool>,
    called: Condvar,
}

struct Slots {
    slots: Vec<Slot>,
    /// Slices without a connection, while one is being made.
    waiting: VecDeque<Slice>,
    backoff: Backoff,
    last_error: String,
}

enum Slot {
    Up(Arc<Connection>),
    Connecting,
    Down,
}

impl TcpPeer {
    pub(super) fn connect(
        address: SocketAddr,
        settings: Arc<TcpSettings>,
        patience: Duration,
    ) -> Result<TcpPeer, ConnectError> {
        let until = Instant::now() + patience;
        let shared = Arc::new_cyclic(|this: &Weak<Shared>| Shared {
            address,
            this: Weak::clone(this),
            slots: Mutex::new(Slots {
                slots: Vec::new(),
                waiting: VecDeque::new(),
                backoff: Backoff::default(),
                last_error: String::new(),
            }),
            settings,
            in_flight: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            idle: Mutex::new(false),
            called: Condvar::new(),
        });
        for _ in 0..shared.settings.connections {
            let connection = shared.make(until.saturating_duration_since(Instant::now()))?;
            shared.slots.lock().slots.push(Slot::Up(connection));
        }
        let watching = std::thread::Builder::new().name("kvtier-tcp-watch".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.watch()
        });
        watching.map_err(|error| shared.unreachable(error.to_string()))?;
        Ok(TcpPeer { shared })
    }
}

impl Drop for TcpPeer {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.call();
        for connection in self.shared.up() {
            connection.cut(Loss::Closed);
        }
    }
}

impl Peer for TcpPeer {
    fn submit(&self, pieces: Vec<Piece>, deadline: Duration) -> Result<Transfer, Refused> {
        let shared = &self.shared;
        if let Err(reason) = transfer::check_host(&pieces).and_then(|()| shared.admit(pieces.len())) {
            return Err(Refused { reason, pieces });
        }
        let lengths = pieces.iter().map(|piece| piece.local.len());
        let unit = shared.unit(lengths.sum());
        let counts = pieces.iter().map(|piece| piece.local.len().div_ceil(unit));
        let parts: usize = counts.sum();
        // Counted before they are split, corrected now that their number is known.
        shared.in_flight.fetch_add(parts - pieces.len(), Ordering::Relaxed);
        let batch = Batch::new(pieces.clone(), parts, Instant::now() + deadline);
        batch.driven_by(Arc::clone(shared) as Arc<dyn Drive>);
        let mut slices = Vec::with_capacity(parts);
        for (at, piece) in pieces.iter().enumerate() {
            for offset in (0..piece.local.len()).step_by(unit) {
                let length = unit.min(piece.local.len() - offset);
                slices.push(Slice {
                    batch: Arc::clone(&batch),
                    piece: at,
                    local: piece.host().subslice(offset, length).expect("within the piece"),
                    region: piece.remote.region().id,
                    offset: piece.remote.offset() + offset as u64,
                    direction: piece.direction,
                    attempts: 0,
                });
            }
        }
        drop(pieces);
        shared.dispatch(slices);
        shared.wake_if_idle();
        Ok(Transfer::new(batch))
    }

    fn rails(&self) -> Vec<RailReport> {
        vec![RailReport {
            name: self.shared.address.to_string(),
            usable: !self.shared.up().is_empty(),
            bytes: self.shared.bytes.load(Ordering::Relaxed),
            bytes_per_second: 0.0,
            errors: self.shared.errors.load(Ordering::Relaxed),
            reconnects: self.shared.reconnects.load(Ordering::Relaxed),
        }]
    }
}

impl Shared {
    fn admit(&self, pieces: usize) -> Result<(), Refusal> {
        let limit = self.settings.in_flight_max;
        let in_flight = self.in_flight.fetch_add(pieces, Ordering::Relaxed);
        let refusal = if in_flight + pieces > limit {
            Some(Refusal::Busy { in_flight, limit })
        } else {
            let slots = self.slots.lock();
            let down = slots.slots.iter().all(|slot| matches!(slot, Slot::Down));
            (down && !slots.backoff.is_due(Instant::now())).then(|| Refusal::Gone(slots.last_error.clone()))
        };
        match refusal {
            Some(refusal) => {
                self.in_flight.fetch_sub(pieces, Ordering::Relaxed);
                Err(refusal)
            }
            None => Ok(()),
        }
    }

    /// How long a slice of a batch of `total` bytes is: everything in one for a small batch.
    fn unit(&self, total: usize) -> usize {
        if self.settings.connections == 1 || total <= self.settings.slice_bytes {
            return usize::MAX >> 1;
        }
        self.settings.slice_bytes
    }

    fn up(&self) -> Vec<Arc<Connection>> {
        let slots = self.slots.lock();
        let up = slots.slots.iter().filter_map(|slot| match slot {
            Slot::Up(connection) => Some(Arc::clone(connection)),
            _ => None,
        });
        up.collect()
    }

    /// Gives each slice to the connection with the least in flight; without one they wait for one.
    fn dispatch(&self, mut slices: Vec<Slice>) {
        loop {
            let up = self.up();
            if up.is_empty() {
                return self.park(slices);
            }
            let mut load: Vec<u64> = up.iter().map(|connection| connection.outstanding_bytes()).collect();
            let mut shares: Vec<Vec<Slice>> = up.iter().map(|_| Vec::new()).collect();
            for slice in slices.drain(..) {
                let least = (0..up.len()).min_by_key(|at| load[*at]).expect("at least one");
                load[least] += slice.local.len() as u64;
                shares[least].push(slice);
            }
            for (connection, share) in up.iter().zip(shares) {
                if share.is_empty() {
                    continue;
                }
                if let Err(returned) = connection.submit(share) {
                    self.take_down(connection);
                    slices.extend(returned);
                }
            }
            if slices.is_empty() {
                return;
            }
        }
    }

    fn park(&self, parked: Vec<Slice>) {
        {
            let mut slots = self.slots.lock();
            if !self.closed.load(Ordering::Acquire) {
                slots.waiting.extend(parked);
                drop(slots);
                self.call();
                return;
            }
        }
        for slice in parked {
            self.done(&slice, Err(Cause::PeerGone("the peer was dropped".to_owned())));
        }
    }

    fn take_down(&self, lost: &Arc<Connection>) {
        for slot in &mut self.slots.lock().slots {
            if matches!(slot, Slot::Up(connection) if Arc::ptr_eq(connection, lost)) {
                *slot = Slot::Down;
            }
        }
    }

    fn unreachable(&self, what: String) -> ConnectError {
        ConnectError::Unreachable {
            address: self.address.to_string(),
            what,
        }
    }

    fn make(&self, patience: Duration) -> Result<Arc<Connection>, ConnectError> {
        let unreachable = |error: std::io::Error| self.unreachable(error.to_string());
        let patience = patience.max(Duration::from_millis(1));
        let stream = TcpStream::connect_timeout(&self.address, patience).map_err(unreachable)?;
        prepare(&stream).map_err(unreachable)?;
        let stream = Arc::new(stream);
        let greeted = within(&stream, patience, || {
            let channel = Channel::call(Arc::clone(&stream), self.settings.tls.as_ref(), self.address)?;
            introduce_caller(&channel, self.settings.secret.as_ref())?;
            Ok(channel)
        });
        let channel = match greeted {
            Ok(channel) => channel,
            Err(NotGreeted::System(error)) => return Err(unreachable(error)),
            Err(NotGreeted::Denied(what)) => {
                return Err(ConnectError::Denied {
                    address: self.address.to_string(),
                    what: what.into_owned(),
                });
            }
        };
        let owner: Weak<dyn Owner> = Weak::clone(&self.this) as _;
        Connection::start(channel, owner).map_err(unreachable)
    }

    /// Makes the watching thread look now.
    fn call(&self) {
        *self.idle.lock() = false;
        self.called.notify_all();
    }

    fn wake_if_idle(&self) {
        let idle = *self.idle.lock();
        if idle {
            self.call();
        }
    }

    fn watch(self: &Arc<Self>) {
        let (mut quiet, mut unread) = (0, Vec::new());
        while !self.closed.load(Ordering::Acquire) {
            let now = Instant::now();
            self.look(now, &mut unread);
            self.repair(now);
            quiet = if self.in_flight.load(Ordering::Relaxed) == 0 {
                quiet + 1
            } else {
                0
            };
            let mut idle = self.idle.lock();
            if quiet > IDLE_TICKS {
                *idle = true;
                // A connection that broke while idle is found by the next transfer, at the latest.
                while *idle && !self.closed.load(Ordering::Acquire) {
                    self.called.wait(&mut idle);
                }
                quiet = 0;
            } else {
                self.called.wait_for(&mut idle, TICK);
            }
        }
        let waiting: Vec<Slice> = self.slots.lock().waiting.drain(..).collect();
        for slice in waiting {
            self.done(&slice, Err(Cause::PeerGone("the peer was dropped".to_owned())));
        }
    }

    /// Cuts what is late, and lets connections read for themselves where nobody does.
    fn look(&self, now: Instant, before: &mut Vec<Option<u32>>) {
        let up = self.up();
        before.resize(up.len(), None);
        for (connection, before) in up.iter().zip(before) {
            if connection.is_late(now) {
                connection.cut(Loss::Late);
            }
            let unread = connection.unread();
            if unread.is_some() && unread == *before {
                connection.kick();
            }
            *before = unread;
        }
        let late: Vec<Slice> = {
            let mut slots = self.slots.lock();
            let (late, waiting): (Vec<Slice>, Vec<Slice>) =
                slots.waiting.drain(..).partition(|slice| slice.batch.is_late(now));
            slots.waiting = waiting.into();
            late
        };
        for slice in late {
            self.done(&slice, Err(Cause::Deadline));
        }
    }

    /// Starts to connect what is down and due: at once when somebody waits for it the first time, later with growing
    /// pauses.
    fn repair(self: &Arc<Self>, now: Instant) {
        let mut slots = self.slots.lock();
        if !slots.backoff.is_due(now) {
            return;
        }
        for at in 0..slots.slots.len() {
            if !matches!(slots.slots[at], Slot::Down) {
                continue;
            }
            slots.slots[at] = Slot::Connecting;
            let shared = Arc::clone(self);
            let connecting = std::thread::Builder::new()
                .name("kvtier-tcp-connect".to_owned())
                .spawn(move || shared.reconnect(at));
            if connecting.is_err() {
                slots.slots[at] = Slot::Down;
                slots.backoff.fail(now);
            }
        }
    }

    fn reconnect(&self, at: usize) {
        let made = self.make(RECONNECT_PATIENCE);
        let mut slots = self.slots.lock();
        let waiting: Vec<Slice> = match made {
            Ok(connection) => {
                self.reconnects.fetch_add(1, Ordering::Relaxed);
                slots.backoff.succeed();
                if self.closed.load(Ordering::Acquire) {
                    connection.cut(Loss::Closed);
                }
                slots.slots[at] = Slot::Up(connection);
                let waiting = slots.waiting.drain(..).collect();
                drop(slots);
                return self.dispatch(waiting);
            }
            Err(error) => {
                slots.slots[at] = Slot::Down;
                slots.backoff.fail(Instant::now());
                slots.last_error = error.to_string();
                let hopeless = slots.slots.iter().all(|slot| matches!(slot, Slot::Down));
                if hopeless {
                    slots.waiting.drain(..).collect()
                } else {
                    Vec::new()
                }
            }
        };
        let what = slots.last_error.clone();
        drop(slots);
        for slice in waiting {
            self.done(&slice, Err(Cause::PeerGone(what.clone())));
        }
    }
}

impl Owner for Shared {
    fn done(&self, slice: &Slice, result: Result<(), Cause>) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        if result.is_ok() {
            self.bytes.fetch_add(slice.local.len() as u64, Ordering::Relaxed);
        }
        slice.batch.finish(slice.piece, result);
    }

    fn lost(&self, connection: &Arc<Connection>, slices: Vec<Slice>, loss: Loss) {
        self.take_down(connection);
        if let Loss::Broken(what) = &loss {
            self.errors.fetch_add(1, Ordering::Relaxed);
            self.slots.lock().last_error.clone_from(what);
        }
        let now = Instant::now();
        let mut again = Vec::new();
        for mut slice in slices {
            let cause = match &loss {
                _ if slice.batch.is_late(now) => Some(Cause::Deadline),
                Loss::Closed => Some(Cause::PeerGone("the peer was dropped".to_owned())),
                _ if slice.batch.has_failed() => Some(Cause::PeerGone("another piece failed".to_owned())),
                Loss::Late => None,
                Loss::Broken(what) => {
                    slice.attempts += if connection.has_answered() { 1 } else { UNANSWERED };
                    (slice.attempts >= ATTEMPTS_MAX).then(|| Cause::PeerGone(what.clone()))
                }
            };
            match cause {
                Some(cause) => self.done(&slice, Err(cause)),
                None => again.push(slice),
            }
        }
        if !again.is_empty() {
            self.dispatch(again);
        }
        self.call();
    }
}

impl Drive for Shared {
    fn drive(&self, batch: &Arc<Batch>) {
        let carrying: Vec<_> = self
            .up()
            .into_iter()
            .filter(|connection| connection.carries(batch))
            .collect();
        // One for this thread, the others read for themselves.
        for connection in carrying.iter().skip(1) {
            connection.kick();
        }
        for connection in &carrying {
            if batch.is_done() {
                return;
            }
            if !connection.read_for(batch) {
                batch.announce_sleeper();
                if !connection.read_for(batch) {
                    return;
                }
            }
        }
    }

    fn hand_over(&self) {
        for connection in self.up() {
            connection.kick();
        }
    }
}
