//! Clients: they ask, read in place, write, stall, lie and die. Each remembers what it truly maps and may touch,
//! whatever the manager believes.

use std::collections::BTreeMap;
use std::time::Duration;

use kvtier_core::{
    ClientId, Departure, Extent, FetchScope, Generation, LeaseId, OperationId, Refusal, ReservationId, Tier, Time,
    TrustDomain,
};

use super::{Happening, World};
use crate::counts::Fault;
use crate::memory::{Holder, PAGE_BYTES, Tag};
use crate::oracle::{Check, Finding, Key, found};
use crate::random::mix;

/// Bytes that a client reads in place.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) lease: LeaseId,
    /// Device memory, or host memory.
    pub(super) memory: Tier,
    pub(super) extent: Extent,
    pub(super) tag: Tag,
}

/// A slot that a client may write.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) reservation: ReservationId,
    pub(super) extent: Extent,
    pub(super) holder: Holder,
    /// What it is for; a slot granted ahead is for anything.
    pub(super) key: Option<Key>,
    /// When the client asked for it.
    pub(super) since: u64,
    /// The namespace's generation when the client asked.
    pub(super) generation: Generation,
    /// What the put is part of.
    pub(super) label: Option<u8>,
    /// Content and length, once writing began.
    pub(super) content: Option<(Tag, u32)>,
    pub(super) pages_written: usize,
}

impl Slot {
    pub(super) fn pages(&self) -> usize {
        u64::from(self.extent.length).div_ceil(PAGE_BYTES) as usize
    }

    pub(super) fn is_written(&self) -> bool {
        self.content.is_some() && self.pages_written >= self.pages()
    }
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) domain: TrustDomain,
    /// It can read device memory.
    pub(super) device: bool,
    /// Its connection is lost, its process lives.
    pub(super) lost: bool,
    pub(super) held: Vec<Held>,
    pub(super) slots: Vec<Slot>,
    /// Leases and slots at most that it was given in answers which its broken connection never brought.
    pub(super) never_told: (usize, usize),
    /// Its process is stopped until then.
    pub(super) stalled_until: Time,
}

/// What a pending answer is about.
#[derive(Debug)]
pub(super) enum Asked {
    Fetch {
        scope: FetchScope,
    },
    Reserve {
        lengths: Vec<u32>,
        generation: Generation,
        label: Option<u8>,
    },
}

/// A client's request that was not answered at once.
#[derive(Debug)]
pub(super) struct Wait {
    pub(super) client: ClientId,
    pub(super) deadline: Time,
    pub(super) start: u64,
    pub(super) keys: Vec<Key>,
    pub(super) asked: Asked,
}

impl World {
    /// A new client connects and begins to act.
    pub(super) fn arrive(&mut self) -> Result<ClientId, Finding> {
        let client = ClientId(self.next_client);
        self.next_client += 1;
        let domain = TrustDomain(self.random.below(u64::from(self.plan.domains)) as u32);
        self.step += 1;
        self.note(|| format!("connect {client:?} {domain:?}"));
        match self.manager.connect(client, domain, self.now) {
            Ok(()) => {}
            // Those that went missing still count until they are gone.
            Err(Refusal::Busy) => {
                let delay_ns = self.plan.step_gap_ns * 20;
                self.next_client += 1;
                self.after(delay_ns, Happening::Step(ClientId(self.next_client - 1)));
                return Ok(client);
            }
            Err(refusal) => return found(format!("a client of {domain:?} is refused: {refusal:?}")),
        }
        self.clients.insert(
            client,
            Client {
                domain,
                device: !mix(client.0).is_multiple_of(4),
                lost: false,
                held: Vec::new(),
                slots: Vec::new(),
                never_told: (0, 0),
                stalled_until: Time::ZERO,
            },
        );
        self.pump()?;
        let delay_ns = self.random.exponential(self.plan.step_gap_ns);
        self.after(delay_ns, Happening::Step(client));
        Ok(client)
    }

    /// What a client does next, and when it does something again.
    pub(super) fn client_step(&mut self, client: ClientId) -> Check {
        if self.steps_left == 0 {
            return Ok(());
        }
        let Some(state) = self.clients.get(&client) else {
            // It was refused when it came: it tries again under a new name.
            if client.0 + 1 == self.next_client {
                self.arrive()?;
            }
            return Ok(());
        };
        if state.stalled_until > self.now {
            let until = state.stalled_until;
            self.at(until, Happening::Step(client));
            return Ok(());
        }
        if state.lost {
            return self.lost_step(client);
        }
        self.steps_left -= 1;
        self.step += 1;
        self.act(client)?;
        if self.step.is_multiple_of(24) {
            self.audit()?;
        }
        if self.clients.contains_key(&client) {
            let delay_ns = self.random.exponential(self.plan.step_gap_ns);
            self.after(delay_ns, Happening::Step(client));
        }
        Ok(())
    }

    pub(super) fn act(&mut self, client: ClientId) -> Check {
        let rates = self.plan.rates;
        if self.strikes(rates.gone) {
            self.tally.fault(Fault::ClientGone);
            self.depart(client, Departure::Gone)?;
            return self.arrive().map(drop);
        }
        if self.strikes(rates.disconnected) {
            self.tally.fault(Fault::ClientLost);
            return self.lose(client);
        }
        if self.strikes(rates.stalled) {
            self.tally.fault(Fault::ClientStalled);
            let ttl = (self.plan.settings.lease_ttl + self.plan.settings.reservation_ttl).as_nanos() as u64;
            let until = self
                .now
                .after(Duration::from_nanos(self.random.between(ttl / 2, ttl * 2)));
            self.note(|| format!("{client:?} stalls until {until:?}"));
            if let Some(state) = self.clients.get_mut(&client) {
                state.stalled_until = until;
            }
            return Ok(());
        }
        if self.served(self.clients[&client].domain).is_empty() {
            return Ok(());
        }
        if self.strikes(rates.lies) {
            self.tally.fault(Fault::ClientLies);
            return self.lie(client);
        }
        if self.random.chance(4) {
            self.depart(client, Departure::Clean)?;
            return self.arrive().map(drop);
        }
        self.read_in_place(client)?;
        let holding = self.clients[&client].held.len();
        if holding > self.plan.hold_max || self.random.chance(150) {
            self.release_some(client)?;
        }
        // Progress on what was begun comes before new work.
        if !self.clients[&client].slots.is_empty() && self.random.chance(600) {
            return self.work_on_slots(client);
        }
        let draw = self.random.below(1000);
        let put = self.plan.put_permille;
        if draw < put {
            if self.random.chance(200) {
                self.grant_ahead(client)
            } else {
                self.reserve(client)
            }
        } else if draw < put + self.plan.delete_permille {
            self.delete(client)
        } else if draw < put + self.plan.delete_permille + 60 {
            self.lookup(client)
        } else {
            self.fetch(client)
        }
    }

    /// A served namespace of the client's domain, of which there is one, a realization and a prompt in them.
    pub(super) fn draw_keys(&mut self, client: ClientId) -> Vec<Key> {
        let domain = self.clients[&client].domain;
        let own = self.served(domain);
        // Half of all that is asked for is asked for by many: without hits there is little to get wrong.
        let (space, realization) = if self.random.chance(500) {
            (own[0], 0)
        } else {
            (
                own[self.random.index(own.len())],
                self.random.below(u64::from(self.plan.realizations)) as u32,
            )
        };
        let node = self.random.index(self.plan.lengths.len()) as u32;
        let mut prompt = self.plan.prompt(node);
        prompt.truncate(self.plan.settings.batch_keys_max);
        if self.random.chance(50) {
            let from = self.random.index(prompt.len());
            prompt.drain(..from);
        }
        if self.random.chance(20) {
            // The same key twice in one request: odd, but not wrong.
            prompt.push(prompt[0]);
        }
        prompt
            .into_iter()
            .map(|node| Key {
                space,
                realization,
                node,
            })
            .collect()
    }

    pub(super) fn draw_deadline(&mut self) -> Time {
        let longest = self.random.pick(&[0, 100_000, 1_000_000, 5_000_000, 20_000_000]);
        self.now.after(Duration::from_nanos(self.random.below(longest + 1)))
    }

    pub(super) fn refused(&mut self, refusal: Refusal) -> Check {
        self.tally.answer(match refusal {
            Refusal::Denied => "refused_denied",
            Refusal::Busy => "refused_busy",
            Refusal::Draining => "refused_draining",
            Refusal::Invalid(_) => "refused_invalid",
            Refusal::UnknownClient => "refused_unknown_client",
        });
        match refusal {
            Refusal::Busy => Ok(()),
            Refusal::Draining if self.draining => Ok(()),
            _ => found(format!("a sound request is refused: {refusal:?}")),
        }
    }

    pub(super) fn wait(&mut self, operation: OperationId, wait: Wait) -> Check {
        let client = wait.client;
        if self.waits.insert(operation, wait).is_some() {
            return found(format!("{operation:?} is used for a second wait"));
        }
        let settings = &self.plan.settings;
        let own = self.waits.values().filter(|wait| wait.client == client).count();
        if self.waits.len() > settings.waiting_max || own > settings.waiting_per_client_max {
            return found(format!(
                "{} requests wait, {own} of {client:?}; the bounds are {} and {}",
                self.waits.len(),
                settings.waiting_max,
                settings.waiting_per_client_max
            ));
        }
        Ok(())
    }

    pub(super) fn client(&mut self, client: ClientId) -> &mut Client {
        self.clients.get_mut(&client).expect("its caller looked it up")
    }

    /// The connection breaks; the process lives on, maps what it mapped, and reads and writes on.
    pub(super) fn lose(&mut self, client: ClientId) -> Check {
        self.note(|| format!("{client:?} is lost but alive"));
        self.step += 1;
        let (dropped, kept) = std::mem::take(&mut self.waits)
            .into_iter()
            .partition(|(_, wait)| wait.client == client);
        self.waits = kept;
        let dropped: BTreeMap<OperationId, Wait> = dropped;
        for wait in dropped.into_values() {
            let never_told = &mut self.client(client).never_told;
            match wait.asked {
                Asked::Fetch { .. } => never_told.0 += wait.keys.len(),
                Asked::Reserve { .. } => never_told.1 += wait.keys.len(),
            }
        }
        self.client(client).lost = true;
        self.manager.disconnect(client, Departure::Alive, self.now);
        self.pump()?;
        let delay_ns = self.random.exponential(self.plan.step_gap_ns * 4);
        self.after(delay_ns, Happening::Step(client));
        self.arrive().map(drop)
    }

    pub(super) fn lost_step(&mut self, client: ClientId) -> Check {
        self.steps_left -= 1;
        self.step += 1;
        self.read_in_place(client)?;
        for index in 0..self.clients[&client].slots.len() {
            self.write_slot(client, index, true)?;
        }
        if self.random.chance(150) {
            return self.depart(client, Departure::Gone);
        }
        let delay_ns = self.random.exponential(self.plan.step_gap_ns * 4);
        self.after(delay_ns, Happening::Step(client));
        Ok(())
    }

    /// The client leaves and touches nothing any more.
    pub(super) fn depart(&mut self, client: ClientId, departure: Departure) -> Check {
        self.read_in_place(client)?;
        let Some(state) = self.clients.remove(&client) else {
            return Ok(());
        };
        self.step += 1;
        self.note(|| format!("{client:?} departs: {departure:?}"));
        self.waits.retain(|_, wait| wait.client != client);
        for held in &state.held {
            self.memory(held.memory).end_read(&held.extent);
        }
        for slot in &state.slots {
            self.host.end_write(&slot.extent);
        }
        self.manager.disconnect(client, departure, self.now);
        self.pump()
    }

    /// Gives back everything it holds, politely.
    pub(super) fn let_go(&mut self, client: ClientId) -> Check {
        self.read_in_place(client)?;
        let state = self.client(client);
        let held = std::mem::take(&mut state.held);
        let slots = std::mem::take(&mut state.slots);
        self.release(client, held)?;
        self.abandon_slots(client, &slots)
    }

    /// What a client may still touch: leases and slots.
    pub(super) fn holdings(&self, client: ClientId) -> (usize, usize) {
        self.clients
            .get(&client)
            .map_or((0, 0), |state| (state.held.len(), state.slots.len()))
    }
}
