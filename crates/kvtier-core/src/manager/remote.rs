use super::TierManager;
use super::seal::Origin;
use crate::host_table::SlotState;
use crate::index::{Entry, NONE, flag};
use crate::{
    BlockKey, ClientId, Fetched, Labels, LeaseId, Parent, Refusal, Request, SealItem, SealRequest, Sealed, Tier, Time,
};

/// What another node needs to know of a leased block to keep a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Described {
    /// The block before it, where it is cached here.
    pub parent: Parent,
    /// Tokens in the block.
    pub tokens: u32,
    /// What it was put under.
    pub labels: Labels,
    /// CRC32C of the payload; `None` until the block leaves host memory or [`TierManager::note_checksum`] says it.
    pub checksum: Option<u32>,
}

/// Another node's block, written into a reserved slot and checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// The slot, and what the block is.
    pub item: SealItem,
    /// What it was put under there.
    pub labels: Labels,
    /// CRC32C of the payload.
    pub checksum: u32,
}

impl TierManager {
    /// What is known of a block that this client leases; `None` for a lease that is not its, or whose block is forgotten.
    #[must_use]
    pub fn described(&self, client: ClientId, lease: LeaseId) -> Option<Described> {
        let entry = self.index.entry(self.block_of_lease(client, lease)?);
        let parent = match entry.parent {
            NONE => Parent::Unknown,
            parent => Parent::Block(self.index.entry(parent).hash),
        };
        Some(Described {
            parent,
            tokens: u32::from(entry.tokens),
            labels: self.labels_of(entry),
            checksum: entry.is(flag::CHECKSUM).then_some(entry.checksum),
        })
    }

    /// Leases what lies in host memory, to copy it to another tier: that is no use of a block, and eviction learns nothing from it.
    ///
    /// # Errors
    /// `Denied`, `UnknownClient`, `Invalid`, or `Busy` for a client that holds too much.
    pub fn lease_unused(&mut self, request: &Request<'_>, now: Time) -> Result<Vec<Fetched>, Refusal> {
        self.lease_quietly(request, now, |_| true)
    }

    /// The same of those whose checksum is not known; the others are misses here.
    ///
    /// # Errors
    /// As there.
    pub fn lease_unsummed(&mut self, request: &Request<'_>, now: Time) -> Result<Vec<Fetched>, Refusal> {
        self.lease_quietly(request, now, |entry| !entry.is(flag::CHECKSUM))
    }

    fn lease_quietly(
        &mut self,
        request: &Request<'_>,
        now: Time,
        is_wanted: impl Fn(&Entry) -> bool,
    ) -> Result<Vec<Fetched>, Refusal> {
        self.advance(now);
        let client = self.admit_request(request)?;
        self.may_hold_more(client)?;
        let found = self.find_all(request);
        let mut results = Vec::with_capacity(found.len());
        for block in found {
            let is_there = block != NONE && self.is_readable(block) && self.index.entry(block).in_host();
            if !is_there || !is_wanted(self.index.entry(block)) {
                results.push(Fetched::Miss);
                continue;
            }
            let entry = self.index.entry(block);
            let (segment, slot, length) = (entry.host_segment, entry.host_slot, entry.length);
            let checksum = entry.is(flag::CHECKSUM).then_some(entry.checksum);
            let extent = self.host_extent(segment, slot, length);
            results.push(self.lease_slot_quietly(client, segment, slot, extent, Tier::Host, checksum));
        }
        self.pump();
        Ok(results)
    }

    /// Remembers the CRC32C of a block that this client leases: it is computed once.
    pub fn note_checksum(&mut self, client: ClientId, lease: LeaseId, checksum: u32) {
        let Some(block) = self.block_of_lease(client, lease) else {
            return;
        };
        let entry = self.index.entry_mut(block);
        if !entry.is(flag::CHECKSUM) {
            entry.checksum = checksum;
            entry.set(flag::CHECKSUM);
        }
    }

    /// Publishes copies of another node's blocks, as [`TierManager::seal`] publishes puts. One that is cached stays as it is.
    ///
    /// # Errors
    /// `Denied`, `UnknownClient` or `Invalid`; nothing changed then.
    pub fn seal_copies(
        &mut self,
        request: &SealRequest<'_>,
        copies: &[Copied],
        now: Time,
    ) -> Result<Vec<Sealed>, Refusal> {
        self.advance(now);
        let place = self.admit(request.client, request.namespace)?;
        if copies.len() > self.settings.batch_keys_max {
            return Err(Refusal::Invalid("more items than a batch may have"));
        }
        if request.realization.0 as usize >= self.realizations.len() {
            return Err(Refusal::Invalid("open the realization first"));
        }
        let current = request.generation == self.namespaces.at(request.namespace.0).generation;
        let mut answers = Vec::with_capacity(copies.len());
        for copy in copies {
            let key = BlockKey {
                namespace: request.namespace,
                realization: request.realization,
                hash: copy.item.hash,
            };
            let answer = self.seal_one(place, key, current, Origin::Copy(copy.labels), &copy.item);
            if answer == Sealed::Published {
                self.counters.copies_published += 1;
                if let Some(block) = self.find(key.namespace, key.realization, key.hash) {
                    let entry = self.index.entry_mut(block);
                    entry.checksum = copy.checksum;
                    entry.set(flag::CHECKSUM);
                }
            }
            answers.push(answer);
        }
        self.pump();
        Ok(answers)
    }

    fn block_of_lease(&self, client: ClientId, lease: LeaseId) -> Option<u32> {
        let place = self.clients.find(client)?;
        let holding = self.leases.find(lease.0)?;
        if holding.client != place || holding.on_device {
            return None;
        }
        let slot = self.host.slot(holding.segment, holding.slot);
        let block = (slot.state == SlotState::Block).then_some(slot.owner)?;
        let entry = self.index.entry(block);
        self.is_current(entry).then_some(block)
    }
}
