use super::{TierManager, mutant_is};
use crate::index::{NONE, flag};
use crate::{
    BlockId, ClientId, Departure, Generation, ListId, NamespaceId, Plane, Realization, RealizationId, Refusal, Request,
    Time, TrustDomain,
};

impl TierManager {
    /// Interns a namespace of a domain. The same name in two domains names two namespaces. Its generation starts at 1.
    ///
    /// # Errors
    /// `Busy` where `namespaces_max` is reached.
    pub fn open_namespace(&mut self, domain: TrustDomain, name: &str) -> Result<(NamespaceId, Generation), Refusal> {
        if let Some(found) = self.find_namespace(domain, name) {
            return Ok(found);
        }
        if self.namespaces.len() >= self.settings.namespaces_max {
            return Err(Refusal::Busy);
        }
        let namespace = self.namespaces.insert(
            domain,
            name,
            self.settings.namespace_quota_bytes,
            self.settings.index_seed,
        );
        Ok((namespace, Generation(1)))
    }

    /// A namespace that was opened before, and its generation in force.
    #[must_use]
    pub fn find_namespace(&self, domain: TrustDomain, name: &str) -> Option<(NamespaceId, Generation)> {
        let namespace = self.namespaces.find(domain, name)?;
        Some((namespace, self.namespaces.at(namespace.0).generation))
    }

    /// A namespace's generation in force.
    ///
    /// # Panics
    /// Where the namespace was never opened.
    #[must_use]
    pub fn generation(&self, namespace: NamespaceId) -> Generation {
        self.namespaces.at(namespace.0).generation
    }

    /// The namespaces of a domain, with their generations in force, in the order in which they came.
    pub fn namespaces_of(&self, domain: TrustDomain) -> impl Iterator<Item = (&str, Generation)> {
        let named = self.namespaces.iter().filter(move |entry| entry.domain == domain);
        named.map(|entry| (entry.name(), entry.generation))
    }

    /// Whose a namespace is.
    ///
    /// # Panics
    /// Where the namespace was never opened.
    #[must_use]
    pub fn domain_of(&self, namespace: NamespaceId) -> TrustDomain {
        self.namespaces.at(namespace.0).domain
    }

    /// Whether a client holds leases or reservations, expired ones included.
    #[must_use]
    pub fn holds_anything(&self, client: ClientId) -> bool {
        self.clients.find(client).is_some_and(|place| {
            let client = self.clients.at(place);
            client.leases > 0 || client.reservations > 0
        })
    }

    /// Bounds what a namespace may use; `None`: no bound. What it uses beyond goes when it next asks for more.
    ///
    /// The first quota of a namespace with blocks looks at every block once.
    pub fn set_quota(&mut self, namespace: NamespaceId, quota_bytes: Option<u64>) {
        if self.namespaces.entry(namespace).is_none() {
            return;
        }
        self.namespaces.at_mut(namespace.0).quota_bytes = quota_bytes;
        if self.namespaces.at(namespace.0).blocks == 0 {
            return;
        }
        for block in 0..self.index.places() {
            let entry = self.index.entry(block);
            if !entry.is(flag::LIVE) || entry.namespace != namespace.0 || entry.is_ghost() {
                continue;
            }
            let list = ListId {
                plane: Plane::Namespace,
                index: namespace.0,
            };
            if quota_bytes.is_some() && !entry.is(flag::ENROLLED) {
                self.index.entry_mut(block).set(flag::ENROLLED);
                self.policy.insert(list, BlockId(block), None, self.now);
            } else if quota_bytes.is_none() && entry.is(flag::ENROLLED) {
                self.index.entry_mut(block).clear(flag::ENROLLED);
                self.policy.remove(list, BlockId(block));
            }
        }
    }

    /// Interns a realization.
    ///
    /// # Errors
    /// `Busy` where `realizations_max` is reached.
    pub fn open_realization(&mut self, realization: Realization) -> Result<RealizationId, Refusal> {
        if let Some(found) = self.realizations.find(realization) {
            return Ok(found);
        }
        if self.realizations.len() >= self.settings.realizations_max {
            return Err(Refusal::Busy);
        }
        Ok(self.realizations.insert(realization))
    }

    /// A client arrives and is of `domain` for as long as it stays.
    ///
    /// # Errors
    /// `Invalid` where the id is in use (a lost client's too); `Busy` where `clients_max` is reached.
    pub fn connect(&mut self, client: ClientId, domain: TrustDomain, now: Time) -> Result<(), Refusal> {
        self.advance(now);
        if self.clients.find(client).is_some() {
            return Err(Refusal::Invalid("this client is connected already"));
        }
        if self.clients.len() >= self.settings.clients_max {
            return Err(Refusal::Busy);
        }
        self.clients.insert(client, domain);
        Ok(())
    }

    /// A client leaves; see [`Departure`]. What waited for it is dropped unanswered.
    pub fn disconnect(&mut self, client: ClientId, departure: Departure, now: Time) {
        self.advance(now);
        let Some(place) = self.clients.find(client) else { return };
        for operation in std::mem::take(&mut self.clients.at_mut(place).waiting) {
            self.drop_waiting(operation);
        }
        if departure == Departure::Alive {
            self.clients.at_mut(place).lost = true;
            for lease in self.leases.of_client(place) {
                self.quarantine_lease(lease);
            }
            for reservation in self.reservations.of_client(place) {
                self.quarantine_reservation(reservation);
            }
        } else {
            for lease in self.leases.of_client(place) {
                self.end_lease(lease);
            }
            if !mutant_is!(self, LeakedReservationOnDisconnect) {
                for reservation in self.reservations.of_client(place) {
                    let holding = self.end_reservation(reservation);
                    self.give_back_slot(&holding);
                }
                self.clients.remove(place);
            } else if self.clients.at(place).reservations == 0 {
                self.clients.remove(place);
            }
        }
        self.pump();
    }

    /// The place of a client that may ask. A lost one may not.
    pub(super) fn client_place(&self, client: ClientId) -> Result<u32, Refusal> {
        let place = self.clients.find(client).ok_or(Refusal::UnknownClient)?;
        if self.clients.at(place).lost {
            Err(Refusal::UnknownClient)
        } else {
            Ok(place)
        }
    }

    /// The client's place, where the namespace is one of its domain. Absent and foreign namespaces get the same answer.
    pub(super) fn admit(&self, client: ClientId, namespace: NamespaceId) -> Result<u32, Refusal> {
        let place = self.client_place(client)?;
        match self.namespaces.entry(namespace) {
            Some(entry) if entry.domain == self.clients.at(place).domain => Ok(place),
            _ => Err(Refusal::Denied),
        }
    }

    /// The same for a request, whose size is checked too.
    pub(super) fn admit_request(&self, request: &Request<'_>) -> Result<u32, Refusal> {
        let place = self.admit(request.client, request.namespace)?;
        if request.hashes.len() > self.settings.batch_keys_max {
            return Err(Refusal::Invalid("more keys than a batch may have"));
        }
        if request.realization.0 as usize >= self.realizations.len() {
            return Err(Refusal::Invalid("open the realization first"));
        }
        Ok(place)
    }

    /// Whether the client may hold more: not while draining, nor while it sits on too much that expired.
    pub(super) fn may_hold_more(&self, place: u32) -> Result<(), Refusal> {
        if self.refuses_new {
            return Err(Refusal::Draining);
        }
        if self.clients.at(place).quarantined_bytes > self.settings.quarantine_bytes_per_client_max {
            return Err(Refusal::Busy);
        }
        Ok(())
    }

    /// Makes `bytes` more fit the namespace's quota by forgetting its own blocks, leaf first. False where they cannot fit.
    pub(super) fn make_quota_room(&mut self, namespace: u32, bytes: u64) -> bool {
        loop {
            let entry = self.namespaces.at(namespace);
            let Some(quota) = entry.quota_bytes else { return true };
            if bytes > quota {
                return false;
            }
            if entry.used_bytes + bytes <= quota {
                return true;
            }
            let list = ListId {
                plane: Plane::Namespace,
                index: namespace,
            };
            let careless = mutant_is!(self, EvictParentBeforeChild);
            let TierManager {
                policy, index, host, ..
            } = self;
            let victim = policy.victim(list, false, &mut |block| {
                super::copies::judge_forget(index, host, block.0, careless)
            });
            let Some(victim) = victim else { return false };
            self.count_evictions(victim.0);
            self.forget(victim.0);
        }
    }

    /// Counts the copies that are about to be dropped to make room.
    pub(super) fn count_evictions(&mut self, block: u32) {
        let entry = self.index.entry(block);
        self.counters.evictions_host += u64::from(entry.host_segment != NONE);
        self.counters.evictions_nvme += u64::from(entry.nvme_segment != NONE);
    }
}
