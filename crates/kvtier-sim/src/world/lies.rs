//! What clients claim that is not so. Nothing may come of it but a refusal.

use kvtier_core::{
    ClientId, Departure, FetchScope, Generation, LeaseId, Parent, Refusal, ReservationId, SealItem, SealRequest, Sealed,
};

use super::World;
use crate::oracle::{Check, Key, found};
use crate::plan::Plan;

impl World {
    /// Names what is not its own. Nothing may come of it.
    pub(super) fn lie(&mut self, client: ClientId) -> Check {
        match self.random.below(7) {
            0 => self.lie_about_leases(client),
            1 => self.lie_about_slots(client),
            2 => self.lie_about_lengths(client),
            3 => self.lie_about_namespace(client),
            4 => self.lie_about_size(client),
            5 => self.give_back_twice(client),
            _ => self.lie_about_itself(),
        }
    }

    pub(super) fn lie_about_leases(&mut self, client: ClientId) -> Check {
        let mut foreign: Vec<LeaseId> = self
            .clients
            .iter()
            .filter(|(other, _)| **other != client)
            .flat_map(|(_, other)| other.held.iter().map(|held| held.lease))
            .collect();
        foreign.truncate(3);
        foreign.push(LeaseId(self.random.next_u64()));
        let unknown = self.manager.release(client, &foreign, self.now);
        self.note(|| format!("{client:?} lies: release {foreign:?}: {unknown} unknown"));
        if unknown as usize != foreign.len() {
            return found(format!(
                "{client:?} releases {} leases that are not its own, {unknown} are refused",
                foreign.len()
            ));
        }
        self.pump()
    }

    /// Each lease and each slot can be given back once.
    pub(super) fn give_back_twice(&mut self, client: ClientId) -> Check {
        if let Some(held) = self.client(client).held.pop() {
            self.memory(held.memory).end_read(&held.extent);
            let unknown = self.manager.release(client, &[held.lease, held.lease], self.now);
            self.note(|| format!("{client:?} lies: release {:?} twice: {unknown} unknown", held.lease));
            if unknown != 1 {
                return found(format!(
                    "{client:?} releases {:?} twice at once, {unknown} are refused",
                    held.lease
                ));
            }
            self.pump()?;
        }
        if let Some(slot) = self.client(client).slots.pop() {
            self.host.end_write(&slot.extent);
            let unknown = self
                .manager
                .abandon(client, &[slot.reservation, slot.reservation], self.now);
            self.note(|| {
                format!(
                    "{client:?} lies: abandon {:?} twice: {unknown} unknown",
                    slot.reservation
                )
            });
            if unknown != 1 {
                return found(format!(
                    "{client:?} abandons {:?} twice at once, {unknown} are refused",
                    slot.reservation
                ));
            }
            self.pump()?;
        }
        Ok(())
    }

    pub(super) fn lie_about_slots(&mut self, client: ClientId) -> Check {
        let foreign: Vec<ReservationId> = self
            .clients
            .iter()
            .filter(|(other, _)| **other != client)
            .flat_map(|(_, other)| other.slots.iter().map(|slot| slot.reservation))
            .take(3)
            .collect();
        let unknown = self.manager.abandon(client, &foreign, self.now);
        self.note(|| format!("{client:?} lies: abandon {foreign:?}: {unknown} unknown"));
        if unknown as usize != foreign.len() {
            return found(format!(
                "{client:?} abandons {} slots that are not its own, {unknown} are refused",
                foreign.len()
            ));
        }
        let key = self.draw_keys(client)[0];
        let generation = self.generation(key.space)?;
        let items: Vec<SealItem> = foreign
            .iter()
            .map(|reservation| SealItem {
                reservation: *reservation,
                hash: Plan::hash(key.node),
                parent: Parent::Root,
                length: 1,
                tokens: 1,
            })
            .collect();
        self.check_nothing_sealed(client, key, generation, &items)
    }

    pub(super) fn lie_about_lengths(&mut self, client: ClientId) -> Check {
        let key = self.draw_keys(client)[0];
        let generation = self.generation(key.space)?;
        let items: Vec<SealItem> = self.clients[&client]
            .slots
            .iter()
            .take(2)
            .map(|slot| SealItem {
                reservation: slot.reservation,
                hash: Plan::hash(key.node),
                parent: Parent::Root,
                length: slot.extent.length.next_multiple_of(4096) + 1,
                tokens: 1,
            })
            .collect();
        self.check_nothing_sealed(client, key, generation, &items)
    }

    pub(super) fn check_nothing_sealed(
        &mut self,
        client: ClientId,
        key: Key,
        generation: Generation,
        items: &[SealItem],
    ) -> Check {
        let (namespace, realization) = (
            self.spaces[key.space as usize].id,
            self.realizations[key.realization as usize],
        );
        self.step += 1;
        let request = SealRequest {
            client,
            namespace,
            realization,
            generation,
            label: None,
            items,
        };
        let answer = self.manager.seal(&request, self.now);
        self.note(|| format!("{client:?} lies: seal {items:?}: {answer:?}"));
        match answer {
            Ok(outcomes)
                if outcomes
                    .iter()
                    .all(|outcome| matches!(outcome, Sealed::Invalid | Sealed::Stale)) =>
            {
                for (item, outcome) in items.iter().zip(outcomes) {
                    self.tally.answer(if outcome == Sealed::Invalid {
                        "sealed_invalid"
                    } else {
                        "sealed_stale"
                    });
                    // Stale: the slot had expired, and this was its end.
                    if outcome == Sealed::Stale
                        && let Some(index) = self
                            .client(client)
                            .slots
                            .iter()
                            .position(|slot| slot.reservation == item.reservation)
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

    pub(super) fn lie_about_namespace(&mut self, client: ClientId) -> Check {
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
            self.manager
                .seal(
                    &SealRequest {
                        client,
                        namespace: request.namespace,
                        realization: request.realization,
                        generation: Generation(1),
                        label: None,
                        items: &[],
                    },
                    self.now,
                )
                .err(),
        ];
        for refusal in refusals {
            match refusal {
                Some(Refusal::Denied) => self.tally.answer("refused_denied"),
                Some(Refusal::Draining) if self.draining => {}
                other => {
                    return found(format!(
                        "{client:?} of {domain:?} asks {:?} and is answered {other:?}",
                        request.namespace
                    ));
                }
            }
        }
        self.pump()
    }

    pub(super) fn lie_about_size(&mut self, client: ClientId) -> Check {
        let key = self.draw_keys(client)[0];
        let hashes = Self::hashes(&[key.node]);
        let request = self.request(client, key.space, key.realization, &hashes, self.now);
        for lengths in [&[0][..], &[u32::MAX], &[4096, 4096]] {
            match self.manager.reserve(&request, lengths, self.now) {
                Err(Refusal::Invalid(_)) => self.tally.answer("refused_invalid"),
                // A client with too much in quarantine is refused before anything else.
                Err(Refusal::Busy) => self.tally.answer("refused_busy"),
                Err(Refusal::Draining) if self.draining => {}
                other => {
                    return found(format!(
                        "a reserve of lengths {lengths:?} for one key is answered {other:?}"
                    ));
                }
            }
        }
        let many = vec![hashes[0]; self.plan.settings.batch_keys_max + 1];
        let request = self.request(client, key.space, key.realization, &many, self.now);
        match self.manager.lookup(&request, self.now) {
            Err(Refusal::Invalid(_)) => self.tally.answer("refused_invalid"),
            other => return found(format!("a lookup of {} keys is answered {other:?}", many.len())),
        }
        if !self.manager.grant(client, u32::MAX, 1, self.now).is_empty()
            || !self.manager.grant(client, 0, 1, self.now).is_empty()
        {
            return found("a slot of impossible size is granted".to_owned());
        }
        self.pump()
    }

    pub(super) fn lie_about_itself(&mut self) -> Check {
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
}
