use super::{TierManager, mutant_is};
use crate::index::{NONE, flag};
use crate::{BlockKey, Label, Labels, Parent, Refusal, ReservationId, SealItem, SealRequest, Sealed, Time};

/// Where the bytes of a slot come from.
#[derive(Clone, Copy)]
pub(super) enum Origin {
    /// A client, who put them under this label.
    Put(Option<Label>),
    /// Another node's copy, which was put under these.
    Copy(Labels),
}

impl Origin {
    fn labels(self) -> Labels {
        match self {
            Origin::Put(label) => Labels::given(label),
            Origin::Copy(labels) => labels,
        }
    }

    fn adds_nothing_to(self, manager: &TierManager, block: u32) -> bool {
        match self {
            Origin::Put(label) => manager.carries(block, label),
            // Nobody put it here under those.
            Origin::Copy(_) => true,
        }
    }
}

impl TierManager {
    /// Publishes written slots under the generation that the caller wrote them for. Whatever the answer but `Invalid`, the
    /// reservation is over. A block that is cached and was not put under this label yet is published anew, under all its labels.
    ///
    /// # Errors
    /// `Denied`, `UnknownClient` or `Invalid`; nothing changed then.
    pub fn seal(&mut self, request: &SealRequest<'_>, now: Time) -> Result<Vec<Sealed>, Refusal> {
        self.advance(now);
        let SealRequest {
            client,
            namespace,
            realization,
            generation,
            label,
            items,
        } = *request;
        let place = self.admit(client, namespace)?;
        if items.len() > self.settings.batch_keys_max {
            return Err(Refusal::Invalid("more items than a batch may have"));
        }
        if realization.0 as usize >= self.realizations.len() {
            return Err(Refusal::Invalid("open the realization first"));
        }
        let current =
            generation == self.namespaces.at(namespace.0).generation || mutant_is!(self, SealIgnoresGeneration);
        let mut answers = Vec::with_capacity(items.len());
        for item in items {
            let key = BlockKey {
                namespace,
                realization,
                hash: item.hash,
            };
            let answer = self.seal_one(place, key, current, Origin::Put(label), item);
            match answer {
                Sealed::Published => self.counters.puts_published += 1,
                Sealed::Present => self.counters.puts_present += 1,
                Sealed::Stale => self.counters.puts_stale += 1,
                Sealed::Busy => self.counters.puts_busy += 1,
                Sealed::Invalid => {}
            }
            answers.push(answer);
        }
        self.pump();
        Ok(answers)
    }

    pub(super) fn seal_one(
        &mut self,
        client: u32,
        key: BlockKey,
        current: bool,
        origin: Origin,
        item: &SealItem,
    ) -> Sealed {
        let ReservationId(reservation) = item.reservation;
        let Some(holding) = self.reservations.find(reservation) else {
            self.counters.foreign_ids += 1;
            return Sealed::Stale;
        };
        if holding.client != client {
            self.counters.foreign_ids += 1;
            return Sealed::Invalid;
        }
        let (segment, slot) = (holding.segment, holding.slot);
        if item.length == 0
            || item.length > self.settings.block_bytes_max
            || u64::from(item.length) > self.host.slot_bytes(segment)
        {
            return Sealed::Invalid;
        }
        let stale = !current || holding.fenced || holding.expired || holding.expires <= self.now;
        let holding = self.end_reservation(reservation);
        if holding.is_published() {
            return Sealed::Published;
        }
        let allowed = if stale {
            Err(Sealed::Stale)
        } else {
            self.may_publish(key, origin, item)
        };
        let labels = match allowed {
            Ok(labels) => labels,
            Err(answer) => {
                self.give_back_slot(&holding);
                return answer;
            }
        };
        let parent = match item.parent {
            Parent::Unknown | Parent::Root => NONE,
            Parent::Block(hash) => {
                let epoch = self.namespaces.at(key.namespace.0).epoch;
                self.index.find(BlockKey { hash, ..key }, epoch).unwrap_or(NONE)
            }
        };
        self.publish(key, parent, (segment, slot), item.length, item.tokens, labels);
        Sealed::Published
    }

    /// Whether a put under this label has nothing to add to a block that is cached.
    pub(super) fn carries(&self, block: u32, label: Option<Label>) -> bool {
        let entry = self.index.entry(block);
        // A label that only memory knows would not survive a restart.
        let carries = |label| self.labels_of(entry).may_include(label) && !entry.is(flag::UNDERSTATED);
        label.is_none_or(carries) || mutant_is!(self, PresentKeepsLabels)
    }

    /// The labels to publish it under, or the answer where it may not be.
    fn may_publish(&mut self, key: BlockKey, origin: Origin, item: &SealItem) -> Result<Labels, Sealed> {
        if let Some(block) = self.find(key.namespace, key.realization, key.hash)
            && origin.adds_nothing_to(self, block)
        {
            return Err(Sealed::Present);
        }
        let mut labels = origin.labels();
        let length = u64::from(item.length);
        let mut room = length;
        if let Some(block) = self.find_cached(key) {
            let entry = self.index.entry(block);
            labels = labels.and(self.labels_of(entry));
            room = length.saturating_sub(u64::from(entry.length));
        }
        // Room first: a block whose place is not to be had must not go before its children.
        if !self.make_quota_room(key.namespace.0, room) {
            return Err(Sealed::Busy);
        }
        if self.find_cached(key).is_none() {
            if !self.make_quota_room(key.namespace.0, length) {
                return Err(Sealed::Busy);
            }
            while self.index.len() >= self.settings.blocks_max {
                if !self.forget_nvme_leaf() && !self.forget_any_leaf() {
                    return Err(Sealed::Busy);
                }
            }
        }
        if let Some(block) = self.find(key.namespace, key.realization, key.hash) {
            // What its record says cannot be changed: it goes, and the new bytes are the block, under all its labels.
            self.forget_for_good(block);
        }
        // A copy on a tier out of service cannot be read: the new bytes take its place.
        if let Some(block) = self.find_cached(key) {
            self.forget(block);
        }
        Ok(labels)
    }

    /// The block of this key, on whichever tier, in service or not.
    fn find_cached(&self, key: BlockKey) -> Option<u32> {
        let epoch = self.namespaces.at(key.namespace.0).epoch;
        let found = self.index.find(key, epoch);
        found.filter(|&block| !self.index.entry(block).is_ghost())
    }

    /// Makes a written slot the host copy of a block that is not cached.
    pub(super) fn publish(
        &mut self,
        key: BlockKey,
        parent: u32,
        place: (u32, u32),
        length: u32,
        tokens: u32,
        labels: Labels,
    ) {
        let epoch = self.namespaces.at(key.namespace.0).epoch;
        let block = match self.index.find(key, epoch) {
            Some(ghost) => ghost,
            None => self.index.insert(key, epoch),
        };
        let entry = self.index.entry_mut(block);
        assert!(entry.is_ghost(), "a block that is published is not cached");
        entry.flags = flag::LIVE;
        entry.length = length;
        entry.tokens = u16::try_from(tokens).unwrap_or(u16::MAX);
        if entry.parent == NONE && parent != NONE && !self.descends_from(parent, block) {
            self.index.entry_mut(block).parent = parent;
            self.index.entry_mut(parent).children += 1;
        }
        self.attach_labels(block, labels);
        self.note_succession(block);
        self.touch_ancestors(block);
        self.attach_host(block, place.0, place.1);
        self.host.attend(self.host.segment(place.0).group);
    }

    /// Whether `ancestor` comes before `block`, or is it. Only a ghost has descendants when it is published again.
    fn descends_from(&self, block: u32, ancestor: u32) -> bool {
        if self.index.entry(ancestor).children == 0 {
            return block == ancestor;
        }
        let mut block = block;
        while block != NONE && block != ancestor {
            block = self.index.entry(block).parent;
        }
        block == ancestor
    }
}
