//! A peer over RDMA: its rails, which slice goes where, and what becomes of one that failed.
//!
//! One lock covers a peer's rails and queues. A request that fails takes its queue pair with it: everything else on it comes
//! back as flushed, nothing of it is running any more, and it goes over another. Which requests fail for whose fault
//! decides: a refused key ends its batch, an unanswered one pauses the rail, a flushed one only goes again.

mod lane;
mod rail;
mod repair;

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::Shared as Transport;
use super::exchange::Exchange;
use super::nic::LocalRegion;
use super::notices::{Sender, Sending};
use super::verbs::{Completion, Status, Work};
use super::wire::{Answer, End, Question};
use crate::gpu::Place;
use crate::rails::{Backoff, Use};
use crate::remote::{REMOTE_KEYS_MAX, RemoteRegion};
use crate::transfer::{self, Batch, Cause, Direction, Piece, Refusal, Refused, Transfer};
use crate::transport::{ConnectError, Peer, RailReport};
use lane::{Flight, Lane};
use rail::{Rail, Slot};

/// How often a slice may go unanswered, over whichever rail, before the peer counts as gone.
const ATTEMPTS_MAX: u32 = 4;
/// On iWARP: how often a slice that is alone on a connection may end it before the peer counts as refusing it.
const REFUSALS_MAX: u32 = 2;
/// `IBV_WC_LOC_QP_OP_ERR`: what an iWARP device calls the request that it was sending when its connection ended.
const LOCAL_QP_ERROR: u32 = 2;
/// Slices grow with their piece up to this.
const SLICE_BYTES_MAX: usize = 1 << 20;
/// What a batch is cut into for each lane, as long as slices stay below that: enough to keep each busy to the end. One
/// more request costs both devices more than its bytes.
const SLICES_A_LANE: usize = 8;
/// A NIC of another NUMA node than the memory counts as so many times slower: it helps when the near ones are busy.
const FAR_NIC: f64 = 2.0;
/// Rails between two nodes: pairs of NICs.
const RAILS_MAX: usize = 64;

/// A part of a piece: one work request.
struct Slice {
    batch: Arc<Batch>,
    piece: usize,
    local: Place,
    /// The local region with each local NIC.
    region: LocalRegion,
    remote: Arc<RemoteRegion>,
    remote_address: u64,
    direction: Direction,
    attempts: u32,
    /// It was on an iWARP connection that ended, which does not tell over what: it must have the next one to itself.
    alone: bool,
    /// Connections that ended when it was alone on them.
    refusals: u32,
}

impl Slice {
    fn bytes(&self) -> u64 {
        self.local.len() as u64
    }

    /// An iWARP connection that it was on is over. Why it fails, if it was refused.
    fn connection_ended(&mut self, by_peer: bool) -> Option<Cause> {
        if self.alone && by_peer {
            self.refusals += 1;
        }
        self.alone = true;
        (self.refusals >= REFUSALS_MAX).then(|| Cause::Denied("it ends the connection over this request".to_owned()))
    }

    fn key_for(&self, remote_nic: usize) -> Option<u32> {
        self.remote.remote_keys.get(remote_nic).copied().filter(|key| *key != 0)
    }
}

/// Slices at rest and how each ended, to be told once no lock is held.
type Finished = Vec<(Slice, Result<(), Cause>)>;

struct VerbsPeer {
    shared: Arc<Shared>,
}

/// What the peer, its lanes and its threads share.
struct Shared {
    transport: Arc<Transport>,
    name: String,
    exchange: Box<dyn Exchange>,
    this: Weak<Shared>,
    state: Mutex<State>,
    sending: Sending,
    in_flight: AtomicUsize,
    closed: AtomicBool,
    idle: Mutex<bool>,
    called: Condvar,
}

struct State {
    rails: Vec<Rail>,
    pending: VecDeque<Slice>,
    /// Lanes that are done with, to be destroyed by the watching thread: that can take a quarter of a second, which the
    /// thread that takes completions for everybody does not have.
    retired: Vec<Arc<Lane>>,
    backoff: Backoff,
    last_error: String,
}

/// Asks the peer what NICs it has and connects at least one rail.
pub(super) fn connect(
    transport: &Arc<Transport>,
    name: String,
    exchange: Box<dyn Exchange>,
    patience: Duration,
) -> Result<Box<dyn Peer>, ConnectError> {
    let remote = describe(&name, &*exchange, patience)?;
    let rails = rails_between(transport.nics.len(), remote.len(), transport.settings.lanes);
    let shared = Arc::new_cyclic(|this: &Weak<Shared>| Shared {
        transport: Arc::clone(transport),
        name: name.clone(),
        exchange,
        this: Weak::clone(this),
        state: Mutex::new(State {
            rails,
            pending: VecDeque::new(),
            retired: Vec::new(),
            backoff: Backoff::default(),
            last_error: String::new(),
        }),
        sending: Sending::default(),
        in_flight: AtomicUsize::new(0),
        closed: AtomicBool::new(false),
        idle: Mutex::new(false),
        called: Condvar::new(),
    });
    let unreachable = |what: String| ConnectError::Unreachable {
        address: name.clone(),
        what,
    };
    shared.connect_first(patience).map_err(unreachable)?;
    let watching = std::thread::Builder::new().name("kvtier-rdma-watch".to_owned()).spawn({
        let shared = Arc::clone(&shared);
        move || shared.watch()
    });
    watching.map_err(|error| unreachable(error.to_string()))?;
    Ok(Box::new(VerbsPeer { shared }))
}

fn describe(name: &str, exchange: &dyn Exchange, patience: Duration) -> Result<Vec<End>, ConnectError> {
    let answer = exchange.ask(&Question::Describe.encode(), patience).map_err(|error| {
        let (address, what) = (name.to_owned(), error.to_string());
        match error.kind() {
            io::ErrorKind::PermissionDenied => ConnectError::Denied { address, what },
            _ => ConnectError::Unreachable { address, what },
        }
    })?;
    let denied = |what: String| ConnectError::Denied {
        address: name.to_owned(),
        what,
    };
    match Answer::decode(&answer) {
        Some(Answer::Described(nics)) if !nics.is_empty() && nics.len() <= REMOTE_KEYS_MAX => Ok(nics),
        Some(Answer::Refused(why)) => Err(denied(why)),
        _ => Err(denied("it answered something else".to_owned())),
    }
}

/// Every pair of NICs; of each local one the pair that is taken first is another remote one.
fn rails_between(local: usize, remote: usize, lanes: usize) -> Vec<Rail> {
    let pairs = (0..remote).flat_map(|turn| (0..local).map(move |nic| (nic, (nic + turn) % remote, turn == 0)));
    pairs
        .take(RAILS_MAX)
        .map(|(local, remote, preferred)| Rail::new(local, remote, preferred, lanes))
        .collect()
}

impl Peer for VerbsPeer {
    fn submit(&self, pieces: Vec<Piece>, deadline: Duration) -> Result<Transfer, Refused> {
        let prepared = transfer::check(&pieces).and_then(|()| self.shared.prepare(&pieces, deadline));
        let (batch, slices) = match prepared {
            Ok(prepared) => prepared,
            Err(reason) => return Err(Refused { reason, pieces }),
        };
        drop(pieces);
        let finished = {
            let mut state = self.shared.state.lock();
            state.pending.extend(slices);
            self.shared.pump(&mut state, Instant::now())
        };
        self.shared.tell(finished);
        self.shared.wake_if_idle();
        Ok(Transfer::new(batch))
    }

    fn notify(&self, note: u32, deadline: Duration) -> Result<Transfer, Refused> {
        let shared = &self.shared;
        let until = Instant::now() + deadline;
        // Counted first: it may be at rest before this returns.
        shared.in_flight.fetch_add(1, Ordering::Relaxed);
        let peer: Weak<dyn Sender> = Weak::clone(&shared.this) as _;
        let sent = shared
            .sending
            .send(&shared.transport, &*shared.exchange, &peer, note, until);
        match sent {
            Ok(batch) => {
                shared.wake_if_idle();
                Ok(Transfer::new(batch))
            }
            Err(reason) => {
                shared.in_flight.fetch_sub(1, Ordering::Relaxed);
                // A line that failed is destroyed by the watching thread.
                shared.call();
                let pieces = Vec::new();
                Err(Refused { reason, pieces })
            }
        }
    }

    fn rails(&self) -> Vec<RailReport> {
        let state = self.shared.state.lock();
        let now = Instant::now();
        let shown = state.rails.iter().filter(|rail| rail.preferred || rail.was_used());
        shown
            .map(|rail| {
                let nic = self.shared.transport.nics[rail.local].name();
                rail.report(format!("{nic} to {}#{}", self.shared.name, rail.remote), now)
            })
            .collect()
    }
}

impl Sender for Shared {
    fn at_rest(&self, count: usize) {
        self.in_flight.fetch_sub(count, Ordering::Relaxed);
        self.wake_if_idle();
    }
}

impl Drop for VerbsPeer {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.call();
    }
}

impl Shared {
    fn prepare(&self, pieces: &[Piece], deadline: Duration) -> Result<(Arc<Batch>, Vec<Slice>), Refusal> {
        let mut cut = Vec::new();
        let total = pieces.iter().map(|piece| piece.local.len()).sum();
        let unit = unit_of(total, self.lanes(), self.transport.settings.slice_bytes);
        for (at, piece) in pieces.iter().enumerate() {
            let invalid = |what| Refusal::Invalid { piece: at, what };
            let registered = self.transport.regions.get(piece.local.region_key());
            let registered = registered.ok_or_else(|| invalid("its local region is not registered with the NICs"))?;
            if piece.remote.region().remote_keys.iter().all(|key| *key == 0) {
                return Err(invalid("its remote region has no key for a NIC"));
            }
            for (offset, length) in slices_of(piece.local.len(), unit) {
                cut.push((at, offset, length, registered.clone()));
            }
        }
        self.admit(cut.len())?;
        let batch = Batch::new(pieces.to_vec(), cut.len(), Instant::now() + deadline);
        let slices = cut.into_iter().map(|(at, offset, length, region)| Slice {
            batch: Arc::clone(&batch),
            piece: at,
            local: pieces[at].local.part(offset, length).expect("within the piece"),
            region,
            remote: Arc::clone(pieces[at].remote.region()),
            remote_address: pieces[at].remote.address() + offset as u64,
            direction: pieces[at].direction,
            attempts: 0,
            alone: false,
            refusals: 0,
        });
        let slices = slices.collect();
        Ok((batch, slices))
    }

    /// Lanes that share a batch when all is well.
    fn lanes(&self) -> usize {
        self.transport.settings.lanes * self.transport.nics.len()
    }

    fn admit(&self, slices: usize) -> Result<(), Refusal> {
        {
            let state = self.state.lock();
            let is_cut_off = state.rails.iter().all(Rail::is_down);
            if is_cut_off && !state.backoff.is_due(Instant::now()) {
                return Err(Refusal::Gone(state.last_error.clone()));
            }
        }
        let limit = self.transport.settings.in_flight_max;
        let in_flight = self.in_flight.fetch_add(slices, Ordering::Relaxed);
        if in_flight + slices > limit {
            self.in_flight.fetch_sub(slices, Ordering::Relaxed);
            return Err(Refusal::Busy { in_flight, limit });
        }
        Ok(())
    }

    /// Posts what waits, as far as queue pairs have room: each slice on the rail that would be done with it first.
    fn pump(&self, state: &mut State, now: Instant) -> Finished {
        let mut finished = Vec::new();
        let mut posts: Vec<(usize, usize, Vec<Slice>)> = Vec::new();
        while let Some(slice) = state.pending.pop_front() {
            if slice.batch.has_failed() {
                finished.push((slice, Err(Cause::Local("another piece failed".to_owned()))));
                continue;
            }
            let Some((rail, lane)) = choose(&state.rails, &slice, now) else {
                state.pending.push_front(slice);
                break;
            };
            state.rails[rail].take(lane, &slice, now);
            match posts.iter_mut().find(|(r, l, _)| (*r, *l) == (rail, lane)) {
                Some((.., slices)) => slices.push(slice),
                None => posts.push((rail, lane, vec![slice])),
            }
        }
        for (rail, lane, slices) in posts {
            self.post(state, rail, lane, slices, now);
        }
        finished
    }

    fn post(&self, state: &mut State, rail: usize, slot: usize, slices: Vec<Slice>, now: Instant) {
        let rail = &mut state.rails[rail];
        let Slot::Up(lane) = &rail.slots[slot] else {
            unreachable!("chosen because it is up, under the same lock")
        };
        let lane = Arc::clone(lane);
        if lane.has_ended() {
            rail.forget_taken(slot, slices.len());
            rail.stop(slot, now);
            rail.in_flight_bytes -= slices.iter().map(Slice::bytes).sum::<u64>();
            slices
                .into_iter()
                .rev()
                .for_each(|slice| state.pending.push_front(slice));
            return;
        }
        let mut flight = lane.flight.lock();
        let mut works = Vec::with_capacity(slices.len());
        // Without an order among completions nobody can speak for another.
        let signal_every = match lane.is_ordered {
            true => self.transport.settings.signal_every,
            false => 1,
        };
        let last = slices.len() - 1;
        for (at, slice) in slices.iter().enumerate() {
            let signalled = flight.signal(at == last, signal_every);
            works.push(Work {
                id: flight.draw(lane.number),
                local: slice.local.clone(),
                registered: Arc::clone(&slice.region.with[rail.local]),
                remote_address: slice.remote_address,
                remote_key: slice.key_for(rail.remote).expect("chosen because it has one"),
                direction: slice.direction,
                signalled,
            });
        }
        let ids: Vec<u64> = works.iter().map(|work| work.id).collect();
        let (posted, failed) = match lane.post(&works) {
            Ok(()) => (works.len(), None),
            Err(error) => (error.posted, Some(error.source)),
        };
        drop(works);
        rail.forget_taken(slot, slices.len());
        let mut rest = Vec::new();
        for (at, (id, slice)) in ids.into_iter().zip(slices).enumerate() {
            if at < posted {
                flight.queue.push_back((id, slice));
            } else {
                rail.in_flight_bytes -= slice.bytes();
                rest.push(slice);
            }
        }
        drop(flight);
        if let Some(error) = failed {
            // The last one posted may be unsignalled: only stopping brings its end.
            rail.stop(slot, now);
            rail.fail(now);
            state.last_error = error.to_string();
        }
        rest.into_iter().rev().for_each(|slice| state.pending.push_front(slice));
    }

    /// Completions of one lane, in order. An error and what it flushed come together: all are taken.
    fn completed(&self, lane: &Arc<Lane>, completions: &[Completion]) {
        let now = Instant::now();
        let mut finished = Vec::new();
        let mut state = self.state.lock();
        let mut done_bytes = 0;
        let mut broke = false;
        for completion in completions {
            let ended: Vec<Slice> = lane.flight.lock().end(completion.id, lane.is_ordered);
            lane.complete(completion.id);
            let Some((this, before)) = split_last(ended) else {
                continue;
            };
            for slice in before {
                done_bytes += slice.bytes();
                finished.push((slice, Ok(())));
            }
            if completion.status == Status::Done {
                done_bytes += this.bytes();
                finished.push((this, Ok(())));
                continue;
            }
            broke = true;
            state.rails[lane.rail].in_flight_bytes -= this.bytes();
            self.judge(&mut state, lane, this, completion.status, now, &mut finished);
        }
        let rail = &mut state.rails[lane.rail];
        if done_bytes > 0 {
            rail.succeed(done_bytes, now);
        }
        if broke {
            rail.stop(lane.slot, now);
        }
        let retired = rail.release_if_empty(lane);
        state.retired.extend(retired);
        finished.extend(self.pump(&mut state, now));
        if self.closed.load(Ordering::Acquire) {
            // Lanes that are being destroyed may flush into this; who watched waits for nothing any more.
            let gone = || Err(Cause::PeerGone("the peer was dropped".to_owned()));
            finished.extend(state.pending.drain(..).map(|slice| (slice, gone())));
        }
        drop(state);
        self.tell(finished);
        if broke {
            self.call();
        }
    }

    /// What becomes of a slice that was not done.
    fn judge(
        &self,
        state: &mut State,
        lane: &Lane,
        mut slice: Slice,
        status: Status,
        now: Instant,
        finished: &mut Finished,
    ) {
        let rail = &mut state.rails[lane.rail];
        let cause = match status {
            _ if slice.batch.is_late(now) => Some(Cause::Deadline),
            // Its connection has ended.
            Status::Flushed | Status::Local(LOCAL_QP_ERROR) if !lane.is_ordered => {
                slice.connection_ended(matches!(rail.slots[lane.slot], Slot::Up(_)))
            }
            Status::Local(_) => Some(Cause::Local(status.words())),
            Status::RemoteAccess(_) => Some(Cause::Denied(status.words())),
            Status::Unanswered(_) | Status::Device(_) => {
                rail.fail(now);
                rail.stop_all(now);
                state.last_error = format!("{}: {}", self.transport.nics[lane.local].name(), status.words());
                slice.attempts += 1;
                (slice.attempts >= ATTEMPTS_MAX).then(|| Cause::PeerGone(status.words()))
            }
            Status::Flushed | Status::Done => None,
        };
        match cause {
            Some(cause) => finished.push((slice, Err(cause))),
            None => state.pending.push_back(slice),
        }
    }

    /// Ends parts, with no lock held: a waker may run anything.
    fn tell(&self, finished: Finished) {
        for (slice, result) in finished {
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            let Slice { batch, piece, .. } = slice;
            batch.finish(piece, result);
        }
    }

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
}

/// The rail and lane that would be done with `slice` first.
fn choose(rails: &[Rail], slice: &Slice, now: Instant) -> Option<(usize, usize)> {
    let mut best: Option<(f64, usize, usize)> = None;
    let fastest = rails
        .iter()
        .map(|rail| rail.health.bytes_per_second())
        .fold(0.0, f64::max);
    for (at, rail) in rails.iter().enumerate() {
        if slice.key_for(rail.remote).is_none() {
            continue;
        }
        let admitted = match rail.health.usable(now) {
            Use::Full => true,
            Use::Probe => rail.in_flight_bytes == 0,
            Use::None => false,
        };
        let Some(lane) = rail.free_lane(slice.alone).filter(|_| admitted) else {
            continue;
        };
        let distance = if slice.region.near[rail.local] { 1.0 } else { FAR_NIC };
        let seconds = distance * rail.health.seconds_for(rail.in_flight_bytes, slice.bytes(), fastest);
        if best.is_none_or(|(least, ..)| seconds < least) {
            best = Some((seconds, at, lane));
        }
    }
    best.map(|(_, rail, lane)| (rail, lane))
}

fn split_last(mut slices: Vec<Slice>) -> Option<(Slice, Vec<Slice>)> {
    let last = slices.pop()?;
    Some((last, slices))
}

/// How long the slices of a batch are: `least`, and longer where that is enough for every lane.
fn unit_of(total: usize, lanes: usize, least: usize) -> usize {
    (total / (lanes * SLICES_A_LANE))
        .next_multiple_of(4096)
        .clamp(least, SLICE_BYTES_MAX.max(least))
}

/// Offsets and lengths: slices of `unit` bytes; the last takes a rest of up to a quarter more.
fn slices_of(length: usize, unit: usize) -> Vec<(usize, usize)> {
    let mut slices = Vec::with_capacity(length / unit + 1);
    let mut offset = 0;
    while offset < length {
        let left = length - offset;
        let take = if left <= unit + unit / 4 { left } else { unit };
        slices.push((offset, take));
        offset += take;
    }
    slices
}

impl Flight {
    /// The slices that a completion of `id` ends: that one, last, and all before it where there is an order.
    fn end(&mut self, id: u64, is_ordered: bool) -> Vec<Slice> {
        let Some(at) = self.queue.iter().position(|(other, _)| *other == id) else {
            return Vec::new();
        };
        let first = if is_ordered { 0 } else { at };
        self.queue.drain(first..=at).map(|(_, slice)| slice).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_a_piece_without_a_short_rest() {
        for length in [
            1,
            4096,
            65_536,
            65_537,
            81_920,
            81_921,
            1 << 20,
            (1 << 20) + 5,
            64 << 20,
        ] {
            let slices = slices_of(length, 64 << 10);
            let mut next = 0;
            for (offset, take) in &slices {
                assert_eq!(*offset, next);
                assert!(*take > 0 && *take <= (SLICE_BYTES_MAX * 5) / 4);
                next += take;
            }
            assert_eq!(next, length);
        }
        assert_eq!(
            slices_of(81_920, 64 << 10),
            [(0, 81_920)],
            "a rest of 16 KiB joins the last"
        );
        assert_eq!(slices_of(1 << 20, 64 << 10).len(), 16);
    }

    #[test]
    fn a_batch_is_cut_for_its_lanes_and_no_finer() {
        assert_eq!(unit_of(64 << 10, 1, 64 << 10), 64 << 10);
        assert_eq!(unit_of(1 << 20, 1, 64 << 10), 128 << 10);
        assert_eq!(
            unit_of(16 << 20, 1, 64 << 10),
            1 << 20,
            "whole pieces of a mebibyte on one lane"
        );
        assert_eq!(unit_of(16 << 20, 4, 64 << 10), 512 << 10);
        assert_eq!(unit_of(1 << 30, 1, 64 << 10), 1 << 20, "never longer");
    }

    #[test]
    fn rails_pair_every_nic_and_prefer_one_peer_nic_each() {
        let pairs = |local, remote| -> Vec<(usize, usize, bool)> {
            let rails = rails_between(local, remote, 1);
            rails
                .iter()
                .map(|rail| (rail.local, rail.remote, rail.preferred))
                .collect()
        };
        assert_eq!(pairs(2, 2), [(0, 0, true), (1, 1, true), (0, 1, false), (1, 0, false)]);
        assert_eq!(pairs(2, 1), [(0, 0, true), (1, 0, true)]);
        assert_eq!(pairs(1, 2), [(0, 0, true), (0, 1, false)]);
    }
}
