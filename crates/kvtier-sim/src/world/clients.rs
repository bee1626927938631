//! Clients: they ask, read in place, write, stall, lie and die. Each remembers what it truly maps and may touch,
//! whatever the manager believes.

use std::time::Duration;

use kvtier_core::{
    Answer, ClientId, Departure, Extent, FetchScope, Fetched, Generation, LeaseId, OperationId, Parent, Refusal, ReservationId, Reserved, SealItem, Sealed, Tier, Time,
    TrustDomain,
};

use super::{Happening, World};
use crate::counts::Fault;
use crate::memory::{Holder, PAGE_BYTES, Tag};
use crate::oracle::{Check, Finding, Key, found};
use crate::plan::Plan;

/// Bytes that a client reads in place.
#[derive(Debug)]
struct Held {
    lease: LeaseId,
    extent: Extent,
    tag: Tag,
}

/// A slot that a client may write.
#[derive(Debug)]
struct Slot {
    reservation: ReservationId,
    extent: Extent,
    holder: Holder,
    /// What it is for; a slot granted ahead is for anything.
    key: Option<Key>,
    /// The namespace's generation when the client asked.
    generation: Generation,
    /// Content and length, once writing began.
    content: Option<(Tag, u32)>,
    pages_written: usize,
}

impl Slot {
    fn pages(&self) -> usize {
        u64::from(self.extent.length).div_ceil(PAGE_BYTES) as usize
    }

    fn is_written(&self) -> bool {
        self.content.is_some() && self.pages_written >= self.pages()
    }
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) domain: TrustDomain,
    /// Its connection is lost, its process lives.
    pub(super) lost: bool,
    held: Vec<Held>,
    slots: Vec<Slot>,
    /// Its process is stopped until then.
    pub(super) stalled_until: Time,
}

/// What a pending answer is about.
#[derive(Debug)]
enum Asked {
    Fetch { scope: FetchScope },
    Reserve { lengths: Vec<u32>, generation: Generation },
}

/// A client's request that was not answered at once.
#[derive(Debug)]
pub(super) struct Wait {
    client: ClientId,
    pub(super) deadline: Time,
    start: u64,
    keys: Vec<Key>,
    asked: Asked,
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
        self.clients.insert(client, Client { domain, lost: false, held: Vec::new(), slots: Vec::new(), stalled_until: Time::ZERO });
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

    fn act(&mut self, client: ClientId) -> Check {
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
            let until = self.now.after(Duration::from_nanos(self.random.between(ttl / 2, ttl * 2)));
            self.note(|| format!("{client:?} stalls until {until:?}"));
            if let Some(state) = self.clients.get_mut(&client) {
                state.stalled_until = until;
            }
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
            if self.random.chance(200) { self.grant_ahead(client) } else { self.reserve(client) }
        } else if draw < put + self.plan.delete_permille {
            self.delete(client)
        } else if draw < put + self.plan.delete_permille + 60 {
            self.lookup(client)
        } else {
            self.fetch(client)
        }
    }

    /// A namespace of the client's domain, a realization and a prompt in them.
    fn draw_keys(&mut self, client: ClientId) -> Vec<Key> {
        let domain = self.clients[&client].domain;
        let own: Vec<u32> = (0..self.spaces.len() as u32).filter(|space| self.spaces[*space as usize].domain == domain).collect();
        let space = own[self.random.index(own.len())];
        let realization = self.random.below(u64::from(self.plan.realizations)) as u32;
        let node = self.random.index(self.plan.lengths.len()) as u32;
        let mut prompt = self.plan.prompt(node);
        prompt.truncate(self.plan.settings.batch_keys_max);
        if self.random.chance(50) {
            let from = self.random.index(prompt.len());
            prompt.drain(..from);
        }
        prompt.into_iter().map(|node| Key { space, realization, node }).collect()
    }

    fn draw_deadline(&mut self) -> Time {
        let longest = self.random.pick(&[0, 100_000, 1_000_000, 5_000_000, 20_000_000]);
        self.now.after(Duration::from_nanos(self.random.below(longest + 1)))
    }

    fn refused(&mut self, refusal: Refusal) -> Check {
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

    pub(super) fn fetch(&mut self, client: ClientId) -> Check {
        let keys = self.draw_keys(client);
        let scope = if self.random.chance(700) { FetchScope::Prefix } else { FetchScope::Each };
        let deadline = self.draw_deadline();
        self.fetch_keys(client, keys, scope, deadline)
    }

    pub(super) fn fetch_keys(&mut self, client: ClientId, keys: Vec<Key>, scope: FetchScope, deadline: Time) -> Check {
        let nodes: Vec<u32> = keys.iter().map(|key| key.node).collect();
        let hashes = Self::hashes(&nodes);
        let request = self.request(client, keys[0].space, keys[0].realization, &hashes, deadline);
        self.step += 1;
        let start = self.step;
        let answer = self.manager.fetch(&request, scope, self.now);
        self.note(|| format!("{client:?} fetch {scope:?} {}/{} {nodes:?} by {deadline:?}: {answer:?}", keys[0].space, keys[0].realization));
        match answer {
            Ok(Answer::Ready(results)) => self.fetched(client, start, &keys, scope, &results)?,
            Ok(Answer::Pending(operation)) => {
                self.tally.answer("fetch_waited");
                self.wait(operation, Wait { client, deadline, start, keys, asked: Asked::Fetch { scope } })?;
            }
            Err(refusal) => self.refused(refusal)?,
        }
        self.pump()
    }

    fn wait(&mut self, operation: OperationId, wait: Wait) -> Check {
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

    pub(super) fn fetch_done(&mut self, operation: OperationId, client: ClientId, results: &[Fetched]) -> Check {
        match self.waits.remove(&operation) {
            Some(Wait { client: asker, start, keys, asked: Asked::Fetch { scope }, .. }) if asker == client => self.fetched(client, start, &keys, scope, results),
            _ => found(format!("{client:?} is told of the fetch {operation:?}, for which nobody waits")),
        }
    }

    fn fetched(&mut self, client: ClientId, start: u64, keys: &[Key], scope: FetchScope, results: &[Fetched]) -> Check {
        if results.len() != keys.len() {
            return found(format!("{} results for {} keys", results.len(), keys.len()));
        }
        let mut ended = false;
        for (key, result) in keys.iter().zip(results) {
            match *result {
                Fetched::Miss | Fetched::Busy => {
                    ended = true;
                    self.tally.answer(if matches!(result, Fetched::Miss) { "fetched_miss" } else { "fetched_busy" });
                }
                Fetched::Leased { lease, extent, tier, checksum } => {
                    if ended && scope == FetchScope::Prefix {
                        return found(format!("a prefix fetch leases {key:?} after a miss"));
                    }
                    self.tally.answer(if tier == Tier::Host { "fetched_from_host" } else { "fetched_from_nvme" });
                    let domain = self.clients[&client].domain;
                    if self.host.domain(&extent) != Some(domain) {
                        return found(format!("{client:?} of {domain:?} is given {extent:?} of {:?}", self.host.domain(&extent)));
                    }
                    self.host.begin_read(&extent)?;
                    let tag = self.ledger.check_seen(*key, self.host.content(&extent), extent.length, start)?;
                    if checksum.is_some_and(|checksum| checksum != self.host.checksum(&extent)) {
                        return found(format!("the lease of {key:?} carries a checksum that its bytes do not have"));
                    }
                    if tier == Tier::Nvme && checksum.is_none() {
                        return found(format!("{key:?} crossed a device, but its lease carries no checksum"));
                    }
                    if self.clients.values().any(|other| other.held.iter().any(|held| held.lease == lease)) {
                        return found(format!("{lease:?} is given out twice"));
                    }
                    self.client(client).held.push(Held { lease, extent, tag });
                }
            }
        }
        let held = self.clients[&client].held.len();
        if held > self.plan.settings.leases_per_client_max {
            return found(format!("{client:?} holds {held} leases, the bound is {}", self.plan.settings.leases_per_client_max));
        }
        Ok(())
    }

    fn client(&mut self, client: ClientId) -> &mut Client {
        self.clients.get_mut(&client).expect("its caller looked it up")
    }

    /// Every lease still shows what it showed when it was given.
    pub(super) fn read_in_place(&self, client: ClientId) -> Check {
        for held in &self.clients[&client].held {
            let content = self.host.content(&held.extent);
            if content != Some(held.tag) {
                return found(format!("{client:?} holds {:?} of write {}, but {:?} shows {content:?}", held.lease, held.tag, held.extent));
            }
        }
        Ok(())
    }

    fn release_some(&mut self, client: ClientId) -> Check {
        let count = self.random.between(1, 8) as usize;
        let oldest = self.random.chance(700);
        let state = self.client(client);
        let count = count.min(state.held.len());
        let from = if oldest { 0 } else { state.held.len() - count };
        let held: Vec<Held> = state.held.drain(from..from + count).collect();
        self.release(client, held)
    }

    fn release(&mut self, client: ClientId, held: Vec<Held>) -> Check {
        for held in &held {
            self.host.end_read(&held.extent);
        }
        let leases: Vec<LeaseId> = held.iter().map(|held| held.lease).collect();
        self.step += 1;
        let unknown = self.manager.release(client, &leases, self.now);
        self.note(|| format!("{client:?} release {leases:?}: {unknown} unknown"));
        if unknown != 0 {
            return found(format!("{client:?} releases {leases:?}, which it holds, but {unknown} are unknown"));
        }
        self.pump()
    }

    fn reserve(&mut self, client: ClientId) -> Check {
        let keys = self.draw_keys(client);
        let deadline = self.draw_deadline();
        let lengths = keys.iter().map(|key| self.plan.lengths[key.node as usize]).collect();
        self.reserve_keys(client, keys, lengths, deadline)
    }

    pub(super) fn reserve_keys(&mut self, client: ClientId, keys: Vec<Key>, lengths: Vec<u32>, deadline: Time) -> Check {
        let nodes: Vec<u32> = keys.iter().map(|key| key.node).collect();
        let hashes = Self::hashes(&nodes);
        let request = self.request(client, keys[0].space, keys[0].realization, &hashes, deadline);
        let generation = self.generation(keys[0].space)?;
        self.step += 1;
        let start = self.step;
        let answer = self.manager.reserve(&request, &lengths, self.now);
        self.note(|| format!("{client:?} reserve {}/{} {nodes:?} {lengths:?} by {deadline:?}: {answer:?}", keys[0].space, keys[0].realization));
        match answer {
            Ok(Answer::Ready(results)) => self.reserved(client, start, &keys, &lengths, generation, &results)?,
            Ok(Answer::Pending(operation)) => {
                self.tally.answer("reserve_waited");
                self.wait(operation, Wait { client, deadline, start, keys, asked: Asked::Reserve { lengths, generation } })?;
            }
            Err(refusal) => self.refused(refusal)?,
        }
        self.pump()
    }

    /// The generation in force, which never falls below an acknowledged one.
    pub(super) fn generation(&self, space: u32) -> Result<Generation, Finding> {
        let open = &self.spaces[space as usize];
        match self.manager.find_namespace(open.domain, self.plan.spaces[space as usize].name) {
            Some((id, generation)) if id == open.id && generation >= open.acknowledged => Ok(generation),
            other => found(format!("namespace {space} is {other:?}, was {:?} with {:?} acknowledged", open.id, open.acknowledged)),
        }
    }

    pub(super) fn reserve_done(&mut self, operation: OperationId, client: ClientId, results: &[Reserved]) -> Check {
        match self.waits.remove(&operation) {
            Some(Wait { client: asker, start, keys, asked: Asked::Reserve { lengths, generation }, .. }) if asker == client => {
                self.reserved(client, start, &keys, &lengths, generation, results)
            },
            _ => found(format!("{client:?} is told of the reserve {operation:?}, for which nobody waits")),
        }
    }

    fn reserved(&mut self, client: ClientId, start: u64, keys: &[Key], lengths: &[u32], generation: Generation, results: &[Reserved]) -> Check {
        if results.len() != keys.len() {
            return found(format!("{} results for {} keys", results.len(), keys.len()));
        }
        for ((key, length), result) in keys.iter().zip(lengths).zip(results) {
            match *result {
                Reserved::Present => {
                    self.tally.answer("reserved_present");
                    if !self.ledger.showed_since(*key, start) {
                        return found(format!("{key:?} is called present, but nothing that may be seen was published for it"));
                    }
                }
                Reserved::Busy => self.tally.answer("reserved_busy"),
                Reserved::Granted { reservation, extent } => {
                    self.tally.answer("reserved_granted");
                    if extent.length != *length {
                        return found(format!("{length} bytes were asked for, {extent:?} is given"));
                    }
                    self.take_slot(client, reservation, extent, Some(*key), generation)?;
                }
            }
        }
        let bytes: u64 = self.clients[&client].slots.iter().map(|slot| u64::from(slot.extent.length)).sum();
        if bytes > self.plan.settings.reserved_bytes_per_client_max {
            return found(format!("{client:?} has {bytes} bytes reserved, the bound is {}", self.plan.settings.reserved_bytes_per_client_max));
        }
        Ok(())
    }

    fn take_slot(&mut self, client: ClientId, reservation: ReservationId, extent: Extent, key: Option<Key>, generation: Generation) -> Check {
        let domain = self.clients[&client].domain;
        if self.host.domain(&extent) != Some(domain) {
            return found(format!("{client:?} of {domain:?} may write {extent:?} of {:?}", self.host.domain(&extent)));
        }
        if self.clients.values().any(|other| other.slots.iter().any(|slot| slot.reservation == reservation)) {
            return found(format!("{reservation:?} is given out twice"));
        }
        let holder = self.new_holder();
        self.host.begin_write(&extent, holder)?;
        self.client(client).slots.push(Slot { reservation, extent, holder, key, generation, content: None, pages_written: 0 });
        Ok(())
    }

    fn grant_ahead(&mut self, client: ClientId) -> Check {
        let node = self.random.index(self.plan.lengths.len());
        let length = self.plan.lengths[node];
        let count = self.random.between(1, 4) as u32;
        self.step += 1;
        let granted = self.manager.grant(client, length, count, self.now);
        self.note(|| format!("{client:?} grant {count} x {length}: {granted:?}"));
        if granted.len() > count as usize || (self.draining && !granted.is_empty()) {
            return found(format!("{count} slots were asked for ahead, {} are given (draining: {})", granted.len(), self.draining));
        }
        for (reservation, extent) in granted {
            self.tally.answer("granted_ahead");
            if extent.length != length {
                return found(format!("{length} bytes were asked for ahead, {extent:?} is given"));
            }
            self.take_slot(client, reservation, extent, None, Generation(0))?;
        }
        self.pump()
    }

    /// Writes a little, or everything, or seals what is written, or gives up.
    fn work_on_slots(&mut self, client: ClientId) -> Check {
        let draw = self.random.below(1000);
        if draw < 50 {
            return self.abandon(client);
        }
        let halfway = draw < 200;
        for index in 0..self.clients[&client].slots.len() {
            self.write_slot(client, index, halfway)?;
        }
        if halfway { Ok(()) } else { self.seal_slots(client) }
    }

    fn write_slot(&mut self, client: ClientId, index: usize, halfway: bool) -> Check {
        if self.clients[&client].slots[index].key.is_none() {
            let Some((key, generation)) = self.draw_put(client, index)? else { return Ok(()) };
            let slot = &mut self.client(client).slots[index];
            (slot.key, slot.generation) = (Some(key), generation);
        }
        let slot = &self.clients[&client].slots[index];
        let (extent, holder, pages, from) = (slot.extent, slot.holder, slot.pages(), slot.pages_written);
        let Some(key) = slot.key else { return Ok(()) };
        let (tag, length) = match slot.content {
            Some(content) => content,
            None => {
                let generation = slot.generation;
                // Sometimes less than was asked for, down to the slot's last page.
                let shorter = if self.random.chance(100) { self.random.below(u64::from(extent.length - 1) % PAGE_BYTES + 1) as u32 } else { 0 };
                let length = extent.length - shorter;
                (self.ledger.begin(key, generation, length), length)
            }
        };
        let to = if halfway { from.max(pages / 2) } else { pages };
        self.host.write(&extent, holder, tag, from..to)?;
        let slot = &mut self.client(client).slots[index];
        slot.content = Some((tag, length));
        slot.pages_written = to;
        Ok(())
    }

    /// What to put into a slot that was granted ahead: some block of its size.
    fn draw_put(&mut self, client: ClientId, index: usize) -> Result<Option<(Key, Generation)>, Finding> {
        let length = self.clients[&client].slots[index].extent.length;
        let keys = self.draw_keys(client);
        let fitting = keys.into_iter().rev().find(|key| self.plan.lengths[key.node as usize] == length);
        match fitting {
            Some(key) => Ok(Some((key, self.generation(key.space)?))),
            None => Ok(None),
        }
    }

    fn parent_of(&mut self, key: Key) -> Parent {
        match self.plan.parents[key.node as usize] {
            _ if self.random.chance(80) => Parent::Unknown,
            Some(parent) => Parent::Block(Plan::hash(parent)),
            None => Parent::Root,
        }
    }

    /// Seals the written slots of one namespace, realization and generation.
    fn seal_slots(&mut self, client: ClientId) -> Check {
        let Some(first) = self.clients[&client].slots.iter().find(|slot| slot.is_written()) else { return Ok(()) };
        let (Some(place), generation) = (first.key, first.generation) else { return Ok(()) };
        let most = self.random.between(1, 32) as usize;
        let state = self.client(client);
        let mut chosen = Vec::new();
        let mut rest = Vec::new();
        for slot in state.slots.drain(..) {
            let same = slot.key.is_some_and(|key| key.space == place.space && key.realization == place.realization) && slot.generation == generation;
            if same && slot.is_written() && chosen.len() < most { chosen.push(slot) } else { rest.push(slot) }
        }
        state.slots = rest;
        if self.random.chance(100) {
            chosen.reverse();
        }
        self.seal(client, place, generation, chosen)
    }

    fn seal(&mut self, client: ClientId, place: Key, generation: Generation, slots: Vec<Slot>) -> Check {
        let mut items = Vec::new();
        for slot in &slots {
            let (Some(key), Some((_, length))) = (slot.key, slot.content) else { continue };
            let parent = self.parent_of(key);
            items.push(SealItem { reservation: slot.reservation, hash: Plan::hash(key.node), parent, length, tokens: 16 });
        }
        // From here on the client touches these slots no more, whatever becomes of them.
        for slot in &slots {
            self.host.end_write(&slot.extent);
        }
        let (namespace, realization) = (self.spaces[place.space as usize].id, self.realizations[place.realization as usize]);
        self.step += 1;
        let answer = self.manager.seal(client, namespace, realization, generation, &items, self.now);
        self.note(|| format!("{client:?} seal {}/{} {generation:?} {items:?}: {answer:?}", place.space, place.realization));
        let outcomes = match answer {
            Ok(outcomes) => outcomes,
            Err(refusal) => return found(format!("a sound seal is refused: {refusal:?}")),
        };
        if outcomes.len() != items.len() {
            return found(format!("{} outcomes for {} items", outcomes.len(), items.len()));
        }
        let mut published = Vec::new();
        for ((slot, item), outcome) in slots.iter().zip(&items).zip(&outcomes) {
            let (Some(key), Some((tag, _))) = (slot.key, slot.content) else { continue };
            match outcome {
                Sealed::Published => {
                    self.tally.answer("sealed_published");
                    let current = self.generation(key.space)?;
                    if generation < current {
                        return found(format!("{key:?} of {generation:?} is published although {current:?} is in force"));
                    }
                    self.ledger.publish(tag, self.step);
                    published.push((key, item.parent));
                }
                Sealed::Present => {
                    self.tally.answer("sealed_present");
                    if self.ledger.live(key).is_none() {
                        return found(format!("{key:?} is called present, but nothing that may be seen was published for it"));
                    }
                }
                Sealed::Stale => self.tally.answer("sealed_stale"),
                Sealed::Busy => self.tally.answer("sealed_busy"),
                Sealed::Invalid => return found(format!("the client's own slot {:?} is called invalid", slot.reservation)),
            }
        }
        self.link(client, place, &published)?;
        self.pump()
    }

    /// Remembers which of the published had their parent cached.
    fn link(&mut self, client: ClientId, place: Key, published: &[(Key, Parent)]) -> Check {
        let parents: Vec<(Key, u32)> = published
            .iter()
            .enumerate()
            .filter_map(|(index, (key, parent))| {
                let Parent::Block(_) = parent else { return None };
                let above = self.plan.parents[key.node as usize]?;
                // A parent that comes later in the same batch was not there yet.
                let later = published[index..].iter().any(|(other, _)| other.node == above);
                (!later).then_some((*key, above))
            })
            .collect();
        if parents.is_empty() {
            return Ok(());
        }
        let nodes: Vec<u32> = parents.iter().map(|(_, above)| *above).collect();
        let hashes = Self::hashes(&nodes);
        let request = self.request(client, place.space, place.realization, &hashes, self.now);
        match self.manager.lookup(&request, self.now) {
            Ok(found) => {
                for ((key, above), tier) in parents.iter().zip(found) {
                    if tier.is_some() {
                        self.ledger.link(*key, Key { node: *above, ..place });
                    }
                }
                Ok(())
            }
            Err(refusal) => found(format!("a sound lookup is refused: {refusal:?}")),
        }
    }

    fn abandon(&mut self, client: ClientId) -> Check {
        let count = self.random.between(1, 4) as usize;
        let state = self.client(client);
        let count = count.min(state.slots.len());
        let slots: Vec<Slot> = state.slots.drain(..count).collect();
        self.abandon_slots(client, &slots)
    }

    fn abandon_slots(&mut self, client: ClientId, slots: &[Slot]) -> Check {
        for slot in slots {
            self.host.end_write(&slot.extent);
        }
        let reservations: Vec<ReservationId> = slots.iter().map(|slot| slot.reservation).collect();
        self.step += 1;
        let unknown = self.manager.abandon(client, &reservations, self.now);
        self.note(|| format!("{client:?} abandon {reservations:?}: {unknown} unknown"));
        if unknown != 0 {
            return found(format!("{client:?} abandons {reservations:?}, which it holds, but {unknown} are unknown"));
        }
        self.pump()
    }

    fn delete(&mut self, client: ClientId) -> Check {
        let mut keys = self.draw_keys(client);
        let from = self.random.index(keys.len());
        keys.drain(..from);
        self.delete_keys(client, &keys)
    }

    pub(super) fn delete_keys(&mut self, client: ClientId, keys: &[Key]) -> Check {
        let nodes: Vec<u32> = keys.iter().map(|key| key.node).collect();
        let hashes = Self::hashes(&nodes);
        let request = self.request(client, keys[0].space, keys[0].realization, &hashes, self.now);
        self.step += 1;
        let answer = self.manager.delete(&request, self.now);
        self.note(|| format!("{client:?} delete {}/{} {nodes:?}: {answer:?}", keys[0].space, keys[0].realization));
        match answer {
            Ok(deleted) if deleted.len() == keys.len() => {
                for (key, deleted) in keys.iter().zip(deleted) {
                    if deleted {
                        self.tally.answer("deleted");
                        if self.ledger.live(*key).is_none() {
                            return found(format!("{key:?} is called deleted, but nothing that may be seen was published for it"));
                        }
                    }
                    self.ledger.forget(*key, self.step);
                    self.seen.remove(key);
                }
            }
            Ok(deleted) => return found(format!("{} results for {} keys", deleted.len(), keys.len())),
            Err(refusal) => self.refused(refusal)?,
        }
        self.pump()
    }

    fn lookup(&mut self, client: ClientId) -> Check {
        let keys = self.draw_keys(client);
        self.check_lookup(client, &keys).map(drop)
    }

    /// Looks keys of one namespace and realization up; only what may be seen may be there.
    pub(super) fn check_lookup(&mut self, client: ClientId, keys: &[Key]) -> Result<Vec<Option<Tier>>, Finding> {
        let nodes: Vec<u32> = keys.iter().map(|key| key.node).collect();
        let hashes = Self::hashes(&nodes);
        let request = self.request(client, keys[0].space, keys[0].realization, &hashes, self.now);
        match self.manager.lookup(&request, self.now) {
            Ok(tiers) if tiers.len() == keys.len() => {
                for (key, tier) in keys.iter().zip(&tiers) {
                    if tier.is_some() && self.ledger.live(*key).is_none() {
                        return found(format!("{key:?} is listed in {tier:?} but nothing that may be seen was published for it"));
                    }
                }
                Ok(tiers)
            }
            other => found(format!("a sound lookup is answered {other:?}")),
        }
    }

    /// Names what is not its own. Nothing may come of it.
    fn lie(&mut self, client: ClientId) -> Check {
        match self.random.below(6) {
            0 => self.lie_about_leases(client),
            1 => self.lie_about_slots(client),
            2 => self.lie_about_lengths(client),
            3 => self.lie_about_namespace(client),
            4 => self.lie_about_size(client),
            _ => self.lie_about_itself(),
        }
    }

    fn lie_about_leases(&mut self, client: ClientId) -> Check {
        let mut foreign: Vec<LeaseId> = self.clients.iter().filter(|(other, _)| **other != client).flat_map(|(_, other)| other.held.iter().map(|held| held.lease)).collect();
        foreign.truncate(3);
        foreign.push(LeaseId(self.random.next_u64()));
        let unknown = self.manager.release(client, &foreign, self.now);
        self.note(|| format!("{client:?} lies: release {foreign:?}: {unknown} unknown"));
        if unknown as usize != foreign.len() {
            return found(format!("{client:?} releases {} leases that are not its own, {unknown} are refused", foreign.len()));
        }
        self.pump()
    }

    fn lie_about_slots(&mut self, client: ClientId) -> Check {
        let foreign: Vec<ReservationId> =
            self.clients.iter().filter(|(other, _)| **other != client).flat_map(|(_, other)| other.slots.iter().map(|slot| slot.reservation)).take(3).collect();
        let unknown = self.manager.abandon(client, &foreign, self.now);
        self.note(|| format!("{client:?} lies: abandon {foreign:?}: {unknown} unknown"));
        if unknown as usize != foreign.len() {
            return found(format!("{client:?} abandons {} slots that are not its own, {unknown} are refused", foreign.len()));
        }
        let key = self.draw_keys(client)[0];
        let generation = self.generation(key.space)?;
        let items: Vec<SealItem> =
            foreign.iter().map(|reservation| SealItem { reservation: *reservation, hash: Plan::hash(key.node), parent: Parent::Root, length: 1, tokens: 1 }).collect();
        self.check_nothing_sealed(client, key, generation, &items)
    }

    fn lie_about_lengths(&mut self, client: ClientId) -> Check {
        let key = self.draw_keys(client)[0];
        let generation = self.generation(key.space)?;
        let items: Vec<SealItem> = self.clients[&client]
            .slots
            .iter()
            .take(2)
            .map(|slot| SealItem { reservation: slot.reservation, hash: Plan::hash(key.node), parent: Parent::Root, length: slot.extent.length.next_multiple_of(4096) + 1, tokens: 1 })
            .collect();
        self.check_nothing_sealed(client, key, generation, &items)
    }

    fn check_nothing_sealed(&mut self, client: ClientId, key: Key, generation: Generation, items: &[SealItem]) -> Check {
        let (namespace, realization) = (self.spaces[key.space as usize].id, self.realizations[key.realization as usize]);
        self.step += 1;
        let answer = self.manager.seal(client, namespace, realization, generation, items, self.now);
        self.note(|| format!("{client:?} lies: seal {items:?}: {answer:?}"));
        match answer {
            Ok(outcomes) if outcomes.iter().all(|outcome| matches!(outcome, Sealed::Invalid | Sealed::Stale)) => {
                for (item, outcome) in items.iter().zip(outcomes) {
                    self.tally.answer(if outcome == Sealed::Invalid { "sealed_invalid" } else { "sealed_stale" });
                    // Stale: the slot had expired, and this was its end.
                    if outcome == Sealed::Stale
                        && let Some(index) = self.client(client).slots.iter().position(|slot| slot.reservation == item.reservation)
                    {
                        let slot = self.client(client).slots.remove(index);
                        self.host.end_write(&slot.extent);
                    }
                }
                self.pump()
            }
            other => found(format!("a lying seal is answered {other:?}")),
        }
    }

    fn lie_about_namespace(&mut self, client: ClientId) -> Check {
        let domain = self.clients[&client].domain;
        let foreign = (0..self.spaces.len()).find(|space| self.spaces[*space].domain != domain);
        let hashes = Self::hashes(&[0, 1]);
        let mut request = self.request(client, foreign.unwrap_or(0) as u32, 0, &hashes, self.now);
        if foreign.is_none() {
            request.namespace = kvtier_core::NamespaceId(9_999);
        }
        let refusals = [
            self.manager.lookup(&request, self.now).err(),
            self.manager.fetch(&request, FetchScope::Each, self.now).err(),
            self.manager.reserve(&request, &[4096, 4096], self.now).err(),
            self.manager.delete(&request, self.now).err(),
            self.manager.seal(client, request.namespace, request.realization, Generation(1), &[], self.now).err(),
        ];
        for refusal in refusals {
            match refusal {
                Some(Refusal::Denied) => self.tally.answer("refused_denied"),
                Some(Refusal::Draining) if self.draining => {}
                other => return found(format!("{client:?} of {domain:?} asks {:?} and is answered {other:?}", request.namespace)),
            }
        }
        self.pump()
    }

    fn lie_about_size(&mut self, client: ClientId) -> Check {
        let key = self.draw_keys(client)[0];
        let hashes = Self::hashes(&[key.node]);
        let request = self.request(client, key.space, key.realization, &hashes, self.now);
        for lengths in [&[0][..], &[u32::MAX], &[4096, 4096]] {
            match self.manager.reserve(&request, lengths, self.now) {
                Err(Refusal::Invalid(_)) => self.tally.answer("refused_invalid"),
                Err(Refusal::Draining) if self.draining => {}
                other => return found(format!("a reserve of lengths {lengths:?} for one key is answered {other:?}")),
            }
        }
        if !self.manager.grant(client, u32::MAX, 1, self.now).is_empty() || !self.manager.grant(client, 0, 1, self.now).is_empty() {
            return found("a slot of impossible size is granted".to_owned());
        }
        self.pump()
    }

    fn lie_about_itself(&mut self) -> Check {
        let hashes = Self::hashes(&[0]);
        let nobody = ClientId(u64::MAX);
        let request = self.request(nobody, 0, 0, &hashes, self.now);
        match self.manager.fetch(&request, FetchScope::Each, self.now) {
            Err(Refusal::UnknownClient) => self.tally.answer("refused_unknown_client"),
            other => return found(format!("a client that never connected is answered {other:?}")),
        }
        self.manager.disconnect(nobody, Departure::Gone, self.now);
        self.pump()
    }

    /// The connection breaks; the process lives on, maps what it mapped, and reads and writes on.
    fn lose(&mut self, client: ClientId) -> Check {
        self.note(|| format!("{client:?} is lost but alive"));
        self.step += 1;
        self.waits.retain(|_, wait| wait.client != client);
        self.client(client).lost = true;
        self.manager.disconnect(client, Departure::Alive, self.now);
        self.pump()?;
        let delay_ns = self.random.exponential(self.plan.step_gap_ns * 4);
        self.after(delay_ns, Happening::Step(client));
        self.arrive().map(drop)
    }

    fn lost_step(&mut self, client: ClientId) -> Check {
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
        let Some(state) = self.clients.remove(&client) else { return Ok(()) };
        self.step += 1;
        self.note(|| format!("{client:?} departs: {departure:?}"));
        self.waits.retain(|_, wait| wait.client != client);
        for held in &state.held {
            self.host.end_read(&held.extent);
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
        self.clients.get(&client).map_or((0, 0), |state| (state.held.len(), state.slots.len()))
    }

    /// Writes and seals everything it has reserved.
    pub(super) fn finish_puts(&mut self, client: ClientId) -> Check {
        for index in 0..self.clients[&client].slots.len() {
            self.write_slot(client, index, false)?;
        }
        while self.clients[&client].slots.iter().any(Slot::is_written) {
            self.seal_slots(client)?;
        }
        Ok(())
    }
}
