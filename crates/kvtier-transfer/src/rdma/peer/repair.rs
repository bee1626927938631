//! The thread that watches a peer: deadlines, lanes that do not flush, and rails that are to be connected.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::lane::{Lane, Place};
use super::rail::Slot;
use super::{Shared, Slice, State};
use crate::rails::Use;
use crate::rdma::nic::draw_psn;
use crate::rdma::wire::{Answer, Question};
use crate::transfer::Cause;

/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(2);
/// Ticks with nothing in flight before the thread sleeps until it is called.
const IDLE_TICKS: u32 = 50;
/// How long a stopped queue pair may take to flush before it is destroyed.
const FLUSH_PATIENCE: Duration = Duration::from_millis(100);
/// For one question to the peer.
const QUESTION_PATIENCE: Duration = Duration::from_secs(2);

/// Why a lane could not be connected.
enum Failed {
    /// The peer does not answer.
    Peer(String),
    /// A NIC of this node or of the peer.
    Rail(String),
}

impl Shared {
    /// Connects rails that are preferred, at first; one lane is enough to begin.
    pub(super) fn connect_first(&self, patience: Duration) -> Result<(), String> {
        let until = Instant::now() + patience;
        let preferred: Vec<usize> = {
            let state = self.state.lock();
            let rails = state.rails.iter().enumerate();
            rails.filter(|(_, rail)| rail.preferred).map(|(at, _)| at).collect()
        };
        for rail in preferred {
            if Instant::now() < until {
                self.connect_rail(rail);
            }
        }
        let state = self.state.lock();
        if state.rails.iter().any(super::Rail::has_lane_up) {
            return Ok(());
        }
        Err(state.last_error.clone())
    }

    /// Connects every lane of a rail that is down.
    fn connect_rail(&self, rail: usize) {
        for slot in 0..self.transport.settings.lanes {
            {
                let mut state = self.state.lock();
                let slot = &mut state.rails[rail].slots[slot];
                if !matches!(slot, Slot::Down) {
                    continue;
                }
                *slot = Slot::Connecting;
            }
            let made = self.connect_lane(rail, slot);
            let now = Instant::now();
            let mut state = self.state.lock();
            match made {
                Ok(lane) => {
                    state.backoff.succeed();
                    state.rails[rail].connected(slot, lane);
                    let finished = self.pump(&mut state, now);
                    drop(state);
                    self.tell(finished);
                }
                Err(failed) => {
                    state.rails[rail].slots[slot] = Slot::Down;
                    let gone = match failed {
                        Failed::Rail(what) => {
                            state.rails[rail].fail(now);
                            state.last_error = what;
                            Vec::new()
                        }
                        Failed::Peer(what) => {
                            state.backoff.fail(now);
                            state.last_error = what;
                            abandon_if_cut_off(&mut state)
                        }
                    };
                    let what = state.last_error.clone();
                    drop(state);
                    let gone = gone
                        .into_iter()
                        .map(|slice| (slice, Err(Cause::PeerGone(what.clone()))));
                    self.tell(gone.collect());
                    return;
                }
            }
        }
    }

    fn connect_lane(&self, rail: usize, slot: usize) -> Result<Arc<Lane>, Failed> {
        let (local, remote) = {
            let state = self.state.lock();
            (state.rails[rail].local, state.rails[rail].remote)
        };
        let nic = &self.transport.nics[local];
        let settings = &self.transport.settings;
        nic.check_active().map_err(Failed::Rail)?;
        let on_nic = |error: std::io::Error| Failed::Rail(format!("{}: {error}", nic.name()));
        let claim = nic
            .claim(settings.queue_depth)
            .ok_or_else(|| Failed::Rail(format!("{}: no room for completions of another queue pair", nic.name())))?;
        let pair = nic.queue_pair(claim.depth).map_err(on_nic)?;
        let psn = draw_psn();
        let question = Question::Connect {
            nic: u16::try_from(remote).expect("few NICs"),
            lane: u32::try_from(rail << 16 | slot).expect("few rails and lanes"),
            end: nic.end(pair.number(), psn),
        };
        let answer = self
            .exchange
            .ask(&question.encode(), QUESTION_PATIENCE)
            .map_err(|error| Failed::Peer(error.to_string()))?;
        let end = match Answer::decode(&answer) {
            Some(Answer::Connected(end)) => end,
            Some(Answer::Refused(why)) => return Err(Failed::Rail(format!("the peer: {why}"))),
            _ => return Err(Failed::Peer("it answered something else".to_owned())),
        };
        nic.connect(&pair, psn, &end, settings, QUESTION_PATIENCE)
            .map_err(Failed::Rail)?;
        let place = Place { rail, slot, local };
        Ok(Lane::new(place, pair, nic, claim, &self.this))
    }

    pub(super) fn watch(self: &Arc<Self>) {
        let mut quiet = 0;
        while !self.closed.load(Ordering::Acquire) {
            let now = Instant::now();
            self.look(now);
            let ended = self.sending.look(now);
            self.in_flight.fetch_sub(ended, Ordering::Relaxed);
            self.connect_what_is_due(now);
            quiet = if self.in_flight.load(Ordering::Relaxed) == 0 {
                quiet + 1
            } else {
                0
            };
            let mut idle = self.idle.lock();
            // Looked at once more under the lock: whoever began something since found this thread awake.
            if quiet > IDLE_TICKS && self.in_flight.load(Ordering::Relaxed) == 0 {
                *idle = true;
                while *idle && !self.closed.load(Ordering::Acquire) {
                    self.called.wait(&mut idle);
                }
                quiet = 0;
            } else {
                self.called.wait_for(&mut idle, TICK);
            }
        }
        self.close();
    }

    /// Stops what is late, destroys what does not flush, ends what waits past its deadline.
    fn look(self: &Arc<Self>, now: Instant) {
        let (mut late, mut overdue) = (Vec::new(), Vec::new());
        let retired;
        {
            let mut state = self.state.lock();
            retired = std::mem::take(&mut state.retired);
            for rail in &mut state.rails {
                for slot in 0..rail.slots.len() {
                    let is_over = match &rail.slots[slot] {
                        Slot::Up(lane) => {
                            let is_late = |(_, slice): &(u64, Slice)| slice.batch.is_late(now);
                            lane.flight.lock().queue.iter().any(is_late) || lane.has_ended()
                        }
                        _ => false,
                    };
                    if is_over {
                        rail.stop(slot, now);
                    }
                }
                overdue.extend(rail.overdue(now, FLUSH_PATIENCE));
            }
            let (ended, waiting): (Vec<Slice>, Vec<Slice>) =
                state.pending.drain(..).partition(|slice| slice.batch.is_late(now));
            state.pending = waiting.into();
            late.extend(ended);
        }
        let mut finished: Vec<_> = late
            .into_iter()
            .map(|slice: Slice| (slice, Err(Cause::Deadline)))
            .collect();
        for lane in overdue {
            // Nothing of it runs any more once this returns.
            let ended = lane.has_ended();
            let slices = lane.destroy();
            let mut state = self.state.lock();
            for mut slice in slices {
                state.rails[lane.rail].in_flight_bytes -= slice.bytes();
                let cause = match slice.batch.is_late(now) {
                    true => Some(Cause::Deadline),
                    false if lane.is_ordered => None,
                    false => slice.connection_ended(ended),
                };
                match cause {
                    Some(cause) => finished.push((slice, Err(cause))),
                    None => state.pending.push_back(slice),
                }
            }
            finished.extend(self.pump(&mut state, now));
        }
        let mut state = self.state.lock();
        finished.extend(self.pump(&mut state, now));
        drop(state);
        self.tell(finished);
        if !retired.is_empty() {
            // What is due to be connected is started first.
            self.connect_what_is_due(now);
            retired.iter().for_each(|lane| drop(lane.destroy()));
        }
    }

    /// Starts to connect rails whose pause is over: the preferred ones, and a stand-in where the preferred one of a NIC is
    /// out of use and something waits.
    fn connect_what_is_due(self: &Arc<Self>, now: Instant) {
        let due: Vec<usize> = {
            let state = self.state.lock();
            if !state.backoff.is_due(now) {
                return;
            }
            let in_use = |local: usize| {
                let mut rails = state.rails.iter().filter(|rail| rail.local == local);
                rails.any(|rail| rail.has_lane_up() && rail.health.usable(now) == Use::Full)
            };
            let wanted = |rail: &super::Rail| rail.preferred || (!in_use(rail.local) && !state.pending.is_empty());
            let is_due = |rail: &super::Rail| {
                let has_down = rail.slots.iter().any(|slot| matches!(slot, Slot::Down));
                let connecting = rail.slots.iter().any(|slot| matches!(slot, Slot::Connecting));
                has_down && !connecting && rail.health.usable(now) != Use::None && wanted(rail)
            };
            let rails = state.rails.iter().enumerate();
            rails.filter(|(_, rail)| is_due(rail)).map(|(at, _)| at).collect()
        };
        for rail in due {
            let shared = Arc::clone(self);
            let connecting = std::thread::Builder::new()
                .name("kvtier-rdma-connect".to_owned())
                .spawn(move || shared.connect_rail(rail));
            if connecting.is_err() {
                self.state.lock().backoff.fail(now);
            }
        }
    }

    /// The peer was dropped: nothing of it runs when this returns.
    fn close(&self) {
        let (mut slices, lanes) = {
            let mut state = self.state.lock();
            let mut lanes = std::mem::take(&mut state.retired);
            for rail in &mut state.rails {
                for slot in &mut rail.slots {
                    match std::mem::replace(slot, Slot::Down) {
                        Slot::Up(lane) | Slot::Stopping(lane, _) => lanes.push(lane),
                        Slot::Down | Slot::Connecting => {}
                    }
                }
            }
            (state.pending.drain(..).collect::<Vec<_>>(), lanes)
        };
        for lane in lanes {
            slices.extend(lane.destroy());
        }
        let ended = self.sending.close();
        self.in_flight.fetch_sub(ended, Ordering::Relaxed);
        let gone = || Err(Cause::PeerGone("the peer was dropped".to_owned()));
        self.tell(slices.into_iter().map(|slice| (slice, gone())).collect());
    }
}

/// With no lane left and a peer that does not answer, what waits has nothing to wait for.
fn abandon_if_cut_off(state: &mut State) -> Vec<Slice> {
    let has_lane = state
        .rails
        .iter()
        .flat_map(|rail| &rail.slots)
        .any(|slot| matches!(slot, Slot::Up(_) | Slot::Stopping(..)));
    if has_lane {
        Vec::new()
    } else {
        state.pending.drain(..).collect()
    }
}
