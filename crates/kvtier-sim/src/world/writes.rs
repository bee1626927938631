//! What clients write: reservations, slots granted ahead, seals, deletions.

use kvtier_core::{
    Answer, ClientId, Extent, Generation, OperationId, Parent, ReservationId, Reserved, SealItem, SealRequest, Sealed,
    Time,
};

use super::World;
use super::clients::{Asked, Slot, Wait};
use crate::memory::PAGE_BYTES;
use crate::oracle::{Check, Finding, Key, found};
use crate::plan::Plan;

impl World {
    pub(super) fn reserve(&mut self, client: ClientId) -> Check {
        let keys = self.draw_keys(client);
        let deadline = self.draw_deadline();
        let lengths = keys.iter().map(|key| self.plan.lengths[key.node as usize]).collect();
        self.reserve_keys(client, keys, lengths, deadline)
    }

    pub(super) fn reserve_keys(
        &mut self,
        client: ClientId,
        keys: Vec<Key>,
        lengths: Vec<u32>,
        deadline: Time,
    ) -> Check {
        let nodes: Vec<u32> = keys.iter().map(|key| key.node).collect();
        let hashes = Self::hashes(&nodes);
        let mut request = self.request(client, keys[0].space, keys[0].realization, &hashes, deadline);
        let label = self.draw_label();
        request.hints.label = label.map(Self::label);
        let generation = self.generation(keys[0].space)?;
        self.step += 1;
        let start = self.step;
        let answer = self.manager.reserve(&request, &lengths, self.now);
        self.note(|| {
            format!(
                "{client:?} reserve {}/{} {nodes:?} {lengths:?} under {label:?} by {deadline:?}: {answer:?}",
                keys[0].space, keys[0].realization
            )
        });
        match answer {
            Ok(Answer::Ready(results)) => {
                for (key, _) in keys
                    .iter()
                    .zip(&results)
                    .filter(|(_, result)| **result == Reserved::Present)
                {
                    self.put_under(*key, label);
                }
                self.reserved(client, start, &keys, &lengths, (generation, label), &results)?;
            }
            Ok(Answer::Pending(operation)) => {
                self.tally.answer("reserve_waited");
                self.wait(
                    operation,
                    Wait {
                        client,
                        deadline,
                        start,
                        keys,
                        asked: Asked::Reserve {
                            lengths,
                            generation,
                            label,
                        },
                    },
                )?;
            }
            Err(refusal) => self.refused(refusal)?,
        }
        self.pump()
    }

    /// The generation in force, which never falls below an acknowledged one.
    pub(super) fn generation(&self, space: u32) -> Result<Generation, Finding> {
        let open = &self.spaces[space as usize];
        match self
            .manager
            .find_namespace(open.domain, self.plan.spaces[space as usize].name)
        {
            Some((id, generation)) if id == open.id && (generation >= open.acknowledged || self.is_refused(space)) => {
                Ok(generation)
            }
            other => found(format!(
                "namespace {space} is {other:?}, was {:?} with {:?} acknowledged",
                open.id, open.acknowledged
            )),
        }
    }

    pub(super) fn reserve_done(&mut self, operation: OperationId, client: ClientId, results: &[Reserved]) -> Check {
        match self.waits.remove(&operation) {
            Some(Wait {
                client: asker,
                start,
                keys,
                asked:
                    Asked::Reserve {
                        lengths,
                        generation,
                        label,
                    },
                ..
            }) if asker == client => self.reserved(client, start, &keys, &lengths, (generation, label), results),
            _ => found(format!(
                "{client:?} is told of the reserve {operation:?}, for which nobody waits"
            )),
        }
    }

    pub(super) fn reserved(
        &mut self,
        client: ClientId,
        start: u64,
        keys: &[Key],
        lengths: &[u32],
        (generation, label): (Generation, Option<u8>),
        results: &[Reserved],
    ) -> Check {
        if results.len() != keys.len() {
            return found(format!("{} results for {} keys", results.len(), keys.len()));
        }
        for ((key, length), result) in keys.iter().zip(lengths).zip(results) {
            match *result {
                Reserved::Present => {
                    self.tally.answer("reserved_present");
                    if !self.ledger.showed_since(*key, start) {
                        return found(format!(
                            "{key:?} is called present, but nothing that may be seen was published for it"
                        ));
                    }
                }
                Reserved::Busy => self.tally.answer("reserved_busy"),
                Reserved::Granted { reservation, extent } => {
                    self.tally.answer("reserved_granted");
                    if extent.length != *length {
                        return found(format!("{length} bytes were asked for, {extent:?} is given"));
                    }
                    self.take_slot(client, reservation, extent, Some((*key, label)), (generation, start))?;
                }
            }
        }
        let bytes: u64 = self.clients[&client]
            .slots
            .iter()
            .map(|slot| u64::from(slot.extent.length))
            .sum();
        if bytes > self.plan.settings.reserved_bytes_per_client_max {
            return found(format!(
                "{client:?} has {bytes} bytes reserved, the bound is {}",
                self.plan.settings.reserved_bytes_per_client_max
            ));
        }
        Ok(())
    }

    pub(super) fn take_slot(
        &mut self,
        client: ClientId,
        reservation: ReservationId,
        extent: Extent,
        place: Option<(Key, Option<u8>)>,
        (generation, since): (Generation, u64),
    ) -> Check {
        let domain = self.clients[&client].domain;
        if self.host.domain(&extent) != Some(domain) {
            return found(format!(
                "{client:?} of {domain:?} may write {extent:?} of {:?}",
                self.host.domain(&extent)
            ));
        }
        if self
            .clients
            .values()
            .any(|other| other.slots.iter().any(|slot| slot.reservation == reservation))
        {
            return found(format!("{reservation:?} is given out twice"));
        }
        let holder = self.new_holder();
        self.host.begin_write(&extent, holder)?;
        self.client(client).slots.push(Slot {
            reservation,
            extent,
            holder,
            key: place.map(|(key, _)| key),
            since,
            generation,
            label: place.and_then(|(_, label)| label),
            content: None,
            pages_written: 0,
        });
        Ok(())
    }

    pub(super) fn grant_ahead(&mut self, client: ClientId) -> Check {
        let node = self.random.index(self.plan.lengths.len());
        let length = self.plan.lengths[node];
        let count = self.random.between(1, 4) as u32;
        self.step += 1;
        let granted = self.manager.grant(client, length, count, self.now);
        self.note(|| format!("{client:?} grant {count} x {length}: {granted:?}"));
        if granted.len() > count as usize || (self.draining && !granted.is_empty()) {
            return found(format!(
                "{count} slots were asked for ahead, {} are given (draining: {})",
                granted.len(),
                self.draining
            ));
        }
        for (reservation, extent) in granted {
            self.tally.answer("granted_ahead");
            if extent.length != length {
                return found(format!("{length} bytes were asked for ahead, {extent:?} is given"));
            }
            self.take_slot(client, reservation, extent, None, (Generation(0), self.step))?;
        }
        self.pump()
    }

    /// Writes a little, or everything, or seals what is written, or gives up.
    pub(super) fn work_on_slots(&mut self, client: ClientId) -> Check {
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

    pub(super) fn write_slot(&mut self, client: ClientId, index: usize, halfway: bool) -> Check {
        if self.clients[&client].slots[index].key.is_none() {
            let Some((key, generation)) = self.draw_put(client, index)? else {
                return Ok(());
            };
            let label = self.draw_label();
            let slot = &mut self.client(client).slots[index];
            (slot.key, slot.generation, slot.label) = (Some(key), generation, label);
        }
        let slot = &self.clients[&client].slots[index];
        let (extent, holder, pages, from) = (slot.extent, slot.holder, slot.pages(), slot.pages_written);
        let Some(key) = slot.key else { return Ok(()) };
        let (tag, length) = match slot.content {
            Some(content) => content,
            None => {
                let generation = slot.generation;
                // Sometimes less than was asked for, down to the slot's last page.
                let shorter = if self.random.chance(100) {
                    self.random.below(u64::from(extent.length - 1) % PAGE_BYTES + 1) as u32
                } else {
                    0
                };
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
    pub(super) fn draw_put(&mut self, client: ClientId, index: usize) -> Result<Option<(Key, Generation)>, Finding> {
        let length = self.clients[&client].slots[index].extent.length;
        if self.served(self.clients[&client].domain).is_empty() {
            return Ok(None);
        }
        let keys = self.draw_keys(client);
        let fitting = keys
            .into_iter()
            .rev()
            .find(|key| self.plan.lengths[key.node as usize] == length);
        match fitting {
            Some(key) => Ok(Some((key, self.generation(key.space)?))),
            None => Ok(None),
        }
    }

    pub(super) fn parent_of(&mut self, key: Key) -> Parent {
        match self.plan.parents[key.node as usize] {
            _ if self.random.chance(80) => Parent::Unknown,
            Some(parent) => Parent::Block(Plan::hash(parent)),
            None => Parent::Root,
        }
    }

    /// Seals the written slots of one namespace, realization and generation.
    pub(super) fn seal_slots(&mut self, client: ClientId) -> Check {
        let Some(first) = self.clients[&client].slots.iter().find(|slot| slot.is_written()) else {
            return Ok(());
        };
        let (Some(place), generation, label) = (first.key, first.generation, first.label) else {
            return Ok(());
        };
        let mut most = self.random.between(1, 32) as usize;
        if label.is_some() && self.label_random.chance(500) {
            // Alone, it is known what it finds.
            most = 1;
        }
        let state = self.client(client);
        let mut chosen = Vec::new();
        let mut rest = Vec::new();
        for slot in state.slots.drain(..) {
            let same = slot
                .key
                .is_some_and(|key| key.space == place.space && key.realization == place.realization)
                && (slot.generation, slot.label) == (generation, label);
            if same && slot.is_written() && chosen.len() < most {
                chosen.push(slot)
            } else {
                rest.push(slot)
            }
        }
        state.slots = rest;
        if self.random.chance(100) {
            chosen.reverse();
        }
        self.seal(client, place, (generation, label), chosen)
    }

    /// The block of a key was put under a label and is called present: so it is one of that label.
    fn put_under(&mut self, key: Key, label: Option<u8>) {
        if let Some(label) = label {
            self.tally.answer("present_under_label");
            self.ledger.label(key, 1 << label);
        }
    }

    pub(super) fn seal(
        &mut self,
        client: ClientId,
        place: Key,
        (generation, label): (Generation, Option<u8>),
        slots: Vec<Slot>,
    ) -> Check {
        let mut items = Vec::new();
        for slot in &slots {
            let (Some(key), Some((_, length))) = (slot.key, slot.content) else {
                continue;
            };
            let parent = self.parent_of(key);
            items.push(SealItem {
                reservation: slot.reservation,
                hash: Plan::hash(key.node),
                parent,
                length,
                tokens: 16,
            });
        }
        // From here on the client touches these slots no more, whatever becomes of them.
        for slot in &slots {
            self.host.end_write(&slot.extent);
        }
        let (namespace, realization) = (
            self.spaces[place.space as usize].id,
            self.realizations[place.realization as usize],
        );
        let (mut labels, mut was_cached) = (label.map_or(0, |label| 1 << label), false);
        if let ([Slot { key: Some(key), .. }], true) = (&slots[..], labels > 0) {
            // Of a longer batch one may make room that another's block was in.
            was_cached = self.tier_of(*key)?.is_some();
            labels |= if was_cached { self.ledger.labels(*key) } else { 0 };
        }
        self.step += 1;
        let request = SealRequest {
            client,
            namespace,
            realization,
            generation,
            label: label.map(Self::label),
            items: &items,
        };
        let answer = self.manager.seal(&request, self.now);
        self.note(|| {
            format!(
                "{client:?} seal {}/{} {generation:?} {items:?} under {label:?}: {answer:?}",
                place.space, place.realization
            )
        });
        let outcomes = match answer {
            Ok(outcomes) => outcomes,
            Err(refusal) => return found(format!("a sound seal is refused: {refusal:?}")),
        };
        if outcomes.len() != items.len() {
            return found(format!("{} outcomes for {} items", outcomes.len(), items.len()));
        }
        let mut published = Vec::new();
        for ((slot, item), outcome) in slots.iter().zip(&items).zip(&outcomes) {
            let (Some(key), Some((tag, _))) = (slot.key, slot.content) else {
                continue;
            };
            match outcome {
                Sealed::Published => {
                    self.tally.answer("sealed_published");
                    let current = self.generation(key.space)?;
                    if generation < current {
                        return found(format!(
                            "{key:?} of {generation:?} is published although {current:?} is in force"
                        ));
                    }
                    let forgot_at = self.spaces[key.space as usize].forgot_at;
                    if slot.since < forgot_at {
                        return found(format!(
                            "{key:?} is published, which was begun at step {}, before blocks were deleted at step {forgot_at}",
                            slot.since
                        ));
                    }
                    if was_cached {
                        self.tally.answer("sealed_over_another");
                    }
                    self.ledger.publish(tag, self.step);
                    self.ledger.label(key, labels);
                    published.push((key, item.parent));
                }
                Sealed::Present => {
                    self.tally.answer("sealed_present");
                    if self.ledger.live(key).is_none() {
                        return found(format!(
                            "{key:?} is called present, but nothing that may be seen was published for it"
                        ));
                    }
                    self.put_under(key, label);
                }
                Sealed::Stale => self.tally.answer("sealed_stale"),
                Sealed::Busy => self.tally.answer("sealed_busy"),
                Sealed::Invalid => {
                    return found(format!(
                        "the client's own slot {:?} is called invalid",
                        slot.reservation
                    ));
                }
            }
        }
        self.link(client, place, &published)?;
        self.pump()
    }

    /// Remembers which of the published had their parent cached.
    pub(super) fn link(&mut self, client: ClientId, place: Key, published: &[(Key, Parent)]) -> Check {
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

    pub(super) fn abandon(&mut self, client: ClientId) -> Check {
        let count = self.random.between(1, 4) as usize;
        let state = self.client(client);
        let count = count.min(state.slots.len());
        let slots: Vec<Slot> = state.slots.drain(..count).collect();
        self.abandon_slots(client, &slots)
    }

    pub(super) fn abandon_slots(&mut self, client: ClientId, slots: &[Slot]) -> Check {
        for slot in slots {
            self.host.end_write(&slot.extent);
        }
        let reservations: Vec<ReservationId> = slots.iter().map(|slot| slot.reservation).collect();
        self.step += 1;
        let unknown = self.manager.abandon(client, &reservations, self.now);
        self.note(|| format!("{client:?} abandon {reservations:?}: {unknown} unknown"));
        if unknown != 0 {
            return found(format!(
                "{client:?} abandons {reservations:?}, which it holds, but {unknown} are unknown"
            ));
        }
        self.pump()
    }

    pub(super) fn delete(&mut self, client: ClientId) -> Check {
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
        self.note(|| {
            format!(
                "{client:?} delete {}/{} {nodes:?}: {answer:?}",
                keys[0].space, keys[0].realization
            )
        });
        match answer {
            Ok(deleted) if deleted.len() == keys.len() => {
                for (key, deleted) in keys.iter().zip(deleted) {
                    if deleted {
                        self.tally.answer("deleted");
                        if self.ledger.live(*key).is_none() {
                            return found(format!(
                                "{key:?} is called deleted, but nothing that may be seen was published for it"
                            ));
                        }
                    }
                    if deleted {
                        self.ledger.delete(*key, self.step);
                    } else {
                        self.ledger.forget(*key, self.step);
                    }
                    self.seen.remove(key);
                }
            }
            Ok(deleted) => return found(format!("{} results for {} keys", deleted.len(), keys.len())),
            Err(refusal) => self.refused(refusal)?,
        }
        self.pump()
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
