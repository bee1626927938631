use super::{TierManager, mutant_is};
use crate::host_table::{HostTable, SlotState, pages};
use crate::index::{BlockIndex, Entry, NONE, flag};
use crate::label_table::LabelTable;
use crate::{
    Action, Advice, BlockId, Extent, Generation, Labels, ListId, NamespaceId, Parent, Plane, RealizationId,
    RecordLabel, Refusal, Request, Time, Use, Verdict,
};

/// Blocks before those used in one call that are used with them at most.
const ANCESTORS_MAX: usize = 1024;

/// Whether a block may be forgotten to make room: not while it is held, not before its cached children.
pub(super) fn judge_forget(index: &BlockIndex, host: &HostTable, block: u32, careless: bool) -> Verdict {
    let entry = index.entry(block);
    if is_held(host, entry) {
        Verdict::Shelve
    } else if entry.children > 0 && !careless {
        Verdict::Park
    } else {
        Verdict::Take
    }
}

/// Somebody reads the block, or a device moves it.
pub(super) fn is_held(host: &HostTable, entry: &Entry) -> bool {
    entry.is(flag::DEMOTING | flag::RELOCATING | flag::PROMOTING)
        || (entry.in_host() && host.slot(entry.host_segment, entry.host_slot).is_held())
}

/// A record on NVMe that counts no more, until its segment is closed.
#[derive(Clone, Copy, Debug)]
pub(super) struct StaleRecord {
    /// Place of the segment.
    pub(super) segment: u32,
    pub(super) page: u32,
    pub(super) length: u32,
}

impl TierManager {
    /// The list of a group: of blocks in use, or of those that can be dropped at once.
    pub(super) fn group_list(group: u32, clean: bool) -> ListId {
        ListId {
            plane: Plane::Host,
            index: group * 2 + u32::from(clean),
        }
    }

    pub(super) fn host_list(&self, entry: &Entry) -> ListId {
        TierManager::group_list(self.host.segment(entry.host_segment).group, entry.is(flag::CLEAN))
    }

    pub(super) fn nvme_list(redundant: bool) -> ListId {
        ListId {
            plane: Plane::Nvme,
            index: u32::from(redundant),
        }
    }

    fn namespace_list(entry: &Entry) -> ListId {
        ListId {
            plane: Plane::Namespace,
            index: entry.namespace,
        }
    }

    pub(super) fn host_extent(&self, segment: u32, slot: u32, length: u32) -> Extent {
        let offset = u64::from(slot) * self.host.slot_bytes(segment);
        Extent {
            segment: self.host.segment(segment).id,
            offset,
            length,
        }
    }

    pub(super) fn label(&self, entry: &Entry) -> RecordLabel {
        RecordLabel {
            namespace: NamespaceId(entry.namespace),
            generation: self.generation_of(entry),
            realization: RealizationId(u32::from(entry.realization)),
            hash: entry.hash,
            parent: match entry.parent {
                NONE => Parent::Unknown,
                parent => Parent::Block(self.index.entry(parent).hash),
            },
            tokens: u32::from(entry.tokens),
            labels: self.labels_of(entry),
        }
    }

    pub(super) fn labels_of(&self, entry: &Entry) -> Labels {
        self.namespaces.at(entry.namespace).labels.at(entry.labels)
    }

    /// A block that gets its first copy carries these from now on, until the last one is gone.
    pub(super) fn attach_labels(&mut self, block: u32, labels: Labels) {
        let sets_max = self.settings.label_sets_per_namespace_max;
        let entry = self.index.entry_mut(block);
        assert_eq!(entry.labels, 0, "block {block} has labels already");
        let table = &mut self.namespaces.at_mut(entry.namespace).labels;
        entry.labels = table.take(labels, sets_max);
        self.counters.blocks_of_any_label += u64::from(LabelTable::is_any(entry.labels));
    }

    fn generation_of(&self, entry: &Entry) -> Generation {
        let namespace = self.namespaces.at(entry.namespace);
        if mutant_is!(self, SkippedGenerationCheck) {
            return namespace.generation;
        }
        assert_eq!(
            entry.epoch, namespace.epoch,
            "only blocks of the generation in force are written or read"
        );
        namespace.generation
    }

    /// Whether the block's generation is in force.
    pub(super) fn is_current(&self, entry: &Entry) -> bool {
        entry.epoch == self.namespaces.at(entry.namespace).epoch || mutant_is!(self, SkippedGenerationCheck)
    }

    /// A host copy exists from now on; the slot becomes the block's.
    pub(super) fn attach_host(&mut self, block: u32, segment: u32, slot: u32) {
        let entry = self.host.slot_mut(segment, slot);
        entry.state = SlotState::Block;
        entry.owner = block;
        self.count_first_copy(block);
        let entry = self.index.entry_mut(block);
        assert!(!entry.in_host(), "block {block} is in host memory already");
        entry.host_segment = segment;
        entry.host_slot = slot;
        self.namespaces.at_mut(entry.namespace).host_blocks += 1;
        self.counters.host_blocks += 1;
        let list = TierManager::group_list(self.host.segment(segment).group, false);
        let beside = self.beside(block, list);
        self.policy.insert(list, BlockId(block), beside, self.now);
    }

    /// An NVMe copy exists from now on. `redundant`: the host copy is in use, so this one may go first.
    pub(super) fn attach_nvme(&mut self, block: u32, segment: u32, page: u32, redundant: bool) {
        let entry = self.index.entry_mut(block);
        assert!(!entry.on_nvme(), "block {block} is on NVMe already");
        entry.nvme_segment = segment;
        entry.nvme_page = page;
        if redundant {
            entry.set(flag::REDUNDANT);
        }
        self.namespaces.at_mut(entry.namespace).nvme_blocks += 1;
        self.counters.nvme_blocks += 1;
        let length = entry.length;
        self.nvme_mut().used_bytes += pages(length);
        if redundant {
            self.nvme_mut().mark_redundant(segment, length, true);
        }
        self.policy
            .insert(TierManager::nvme_list(redundant), BlockId(block), None, self.now);
    }

    pub(super) fn count_first_copy(&mut self, block: u32) {
        let entry = self.index.entry_mut(block);
        if !entry.is_ghost() {
            return;
        }
        let namespace = self.namespaces.at_mut(entry.namespace);
        namespace.blocks += 1;
        namespace.used_bytes += u64::from(entry.length);
        self.counters.blocks += 1;
        let has_quota = namespace.quota_bytes.is_some();
        self.policy.appeared(BlockId(block), self.usage(block), self.now);
        if has_quota {
            let entry = self.index.entry_mut(block);
            entry.set(flag::ENROLLED);
            let list = TierManager::namespace_list(entry);
            let beside = self.beside(block, list);
            self.policy.insert(list, BlockId(block), beside, self.now);
        }
    }

    fn usage(&self, block: u32) -> Use {
        let entry = self.index.entry(block);
        Use {
            parent: (entry.parent != NONE).then_some(BlockId(entry.parent)),
            tokens: entry.tokens,
            bytes: u32::try_from(pages(entry.length)).unwrap_or(u32::MAX),
            namespace: NamespaceId(entry.namespace),
            fingerprint: self.index.fingerprint(block),
        }
    }

    /// A request uses the block, after those before it in its prefix.
    pub(super) fn use_block(&mut self, block: u32) {
        self.note_succession(block);
        self.policy.used(BlockId(block), self.usage(block), self.now);
        self.touch(block);
    }

    /// A client says what becomes of the session that these blocks, in prefix order, are the prompt of. Answers how many of them are
    /// cached here.
    ///
    /// # Errors
    /// `Denied`, `UnknownClient` or `Invalid`.
    pub fn advise(&mut self, request: &Request<'_>, advice: Advice, now: Time) -> Result<usize, Refusal> {
        self.advance(now);
        self.admit_request(request)?;
        let found = self.find_all(request).into_iter();
        let cached = found.filter(|&block| block != NONE && !self.index.entry(block).is_ghost());
        let cached: Vec<BlockId> = cached.map(BlockId).collect();
        self.policy.advise(&cached, advice, self.now);
        Ok(cached.len())
    }

    /// The parent of a block, where it is on the same list and was used together with it: whoever uses a block uses all
    /// before it too, and of a prefix the end has to go first, however many calls it came in.
    fn beside(&self, block: u32, list: ListId) -> Option<BlockId> {
        let parent = self.index.entry(block).parent;
        if parent == NONE {
            return None;
        }
        let entry = self.index.entry(parent);
        let same = match list.plane {
            Plane::Host => entry.in_host() && self.host_list(entry) == list,
            Plane::Nvme => entry.on_nvme() && TierManager::nvme_list(entry.is(flag::REDUNDANT)) == list,
            Plane::Namespace => entry.is(flag::ENROLLED),
        };
        (same && self.policy.is_recent(BlockId(parent), self.now)).then_some(BlockId(parent))
    }

    /// Those before the block that are only in host memory and were not used lately are used now.
    pub(super) fn touch_ancestors(&mut self, block: u32) {
        let mut ancestors = Vec::new();
        let mut ancestor = self.index.entry(block).parent;
        while ancestor != NONE && ancestors.len() < ANCESTORS_MAX {
            let entry = self.index.entry(ancestor);
            let fresh = !entry.in_host() || entry.is(flag::CLEAN | flag::DEMOTING);
            if fresh || self.policy.is_recent(BlockId(ancestor), self.now) {
                break;
            }
            ancestors.push(ancestor);
            ancestor = entry.parent;
        }
        for ancestor in ancestors.into_iter().rev() {
            self.use_block(ancestor);
        }
    }

    /// The block goes last, on every list.
    pub(super) fn touch(&mut self, block: u32) {
        let now = self.now;
        let id = BlockId(block);
        let entry = self.index.entry(block);
        if entry.is(flag::ENROLLED) {
            let list = TierManager::namespace_list(entry);
            self.policy.touch(list, id, self.beside(block, list), now);
        }
        if !entry.in_host() {
            if entry.on_nvme() {
                let list = TierManager::nvme_list(entry.is(flag::REDUNDANT));
                self.policy.touch(list, id, self.beside(block, list), now);
            }
            return;
        }
        if entry.is(flag::CLEAN) {
            self.move_to_used(block);
            self.move_to_redundant(block);
            return;
        }
        let list = self.host_list(entry);
        self.policy.touch(list, id, self.beside(block, list), now);
        if entry.is(flag::DEMOTING) {
            self.index.entry_mut(block).set(flag::USED);
        }
    }

    /// From the clean list to the newest end of the list of blocks in use.
    fn move_to_used(&mut self, block: u32) {
        let list = self.host_list(self.index.entry(block));
        self.policy.remove(list, BlockId(block));
        self.index.entry_mut(block).clear(flag::CLEAN);
        let list = self.host_list(self.index.entry(block));
        let beside = self.beside(block, list);
        self.policy.insert(list, BlockId(block), beside, self.now);
    }

    /// From the list of blocks in use to the clean list: the next victims. The NVMe copy is what will be left.
    pub(super) fn move_to_clean(&mut self, block: u32) {
        let list = self.host_list(self.index.entry(block));
        self.policy.remove(list, BlockId(block));
        let entry = self.index.entry_mut(block);
        entry.set(flag::CLEAN);
        entry.clear(flag::USED);
        let list = self.host_list(self.index.entry(block));
        self.policy.insert(list, BlockId(block), None, self.now);
        self.keep_on_nvme(block);
    }

    /// The host copy is in use: should NVMe run out of room, the NVMe copy goes first.
    pub(super) fn move_to_redundant(&mut self, block: u32) {
        let entry = self.index.entry_mut(block);
        if entry.on_nvme() && !entry.is(flag::REDUNDANT) {
            entry.set(flag::REDUNDANT);
            let (segment, length) = (entry.nvme_segment, entry.length);
            self.nvme_mut().mark_redundant(segment, length, true);
            self.policy.remove(TierManager::nvme_list(false), BlockId(block));
            self.policy
                .insert(TierManager::nvme_list(true), BlockId(block), None, self.now);
        }
    }

    /// The NVMe copy will be the only one: it becomes the last to go.
    fn keep_on_nvme(&mut self, block: u32) {
        let entry = self.index.entry_mut(block);
        if entry.is(flag::REDUNDANT) {
            entry.clear(flag::REDUNDANT);
            let (segment, length) = (entry.nvme_segment, entry.length);
            self.nvme_mut().mark_redundant(segment, length, false);
            self.policy.remove(TierManager::nvme_list(true), BlockId(block));
            self.policy
                .insert(TierManager::nvme_list(false), BlockId(block), None, self.now);
        } else {
            self.policy
                .touch(TierManager::nvme_list(false), BlockId(block), None, self.now);
        }
    }

    /// What kept the block off the order is gone.
    pub(super) fn unpark(&mut self, block: u32) {
        let id = BlockId(block);
        let entry = self.index.entry(block);
        if entry.in_host() {
            let segment = entry.host_segment;
            self.policy.unpark(self.host_list(entry), id);
            if let Some(drain) = self.host_reclaim.as_mut().filter(|drain| drain.segment == segment) {
                drain.again = true;
                self.host.attend(drain.group);
            }
        }
        let entry = self.index.entry(block);
        if entry.on_nvme() {
            self.policy
                .unpark(TierManager::nvme_list(entry.is(flag::REDUNDANT)), id);
        }
        if entry.is(flag::ENROLLED) {
            self.policy.unpark(TierManager::namespace_list(entry), id);
        }
    }

    /// Drops the host copy. Its slot is free, or free once nobody holds it. The last copy takes the block with it.
    pub(super) fn drop_host(&mut self, block: u32) {
        self.unlink_host(block);
        let entry = self.index.entry(block);
        if entry.is_ghost() {
            self.vanish(block);
        } else {
            self.keep_on_nvme(block);
        }
    }

    fn unlink_host(&mut self, block: u32) {
        let list = self.host_list(self.index.entry(block));
        self.policy.remove(list, BlockId(block));
        let entry = self.index.entry_mut(block);
        let (segment, slot) = (entry.host_segment, entry.host_slot);
        entry.host_segment = NONE;
        entry.host_slot = NONE;
        entry.clear(flag::CLEAN | flag::USED | flag::PREFETCHED);
        self.namespaces.at_mut(entry.namespace).host_blocks -= 1;
        self.counters.host_blocks -= 1;
        let leak = self.index.entry(block).is_ghost() && mutant_is!(self, ForgetLeaksSlot);
        let early = mutant_is!(self, EarlySlotReuse);
        let memory = self.host.slot_mut(segment, slot);
        memory.state = SlotState::Orphan;
        memory.owner = NONE;
        if early && memory.operations == 0 {
            memory.leases = 0;
        }
        if !leak {
            self.host.settle_slot(segment, slot);
        }
    }

    /// Drops the NVMe copy. The last copy takes the block with it.
    pub(super) fn drop_nvme(&mut self, block: u32) {
        let entry = self.index.entry(block);
        let record = StaleRecord {
            segment: entry.nvme_segment,
            page: entry.nvme_page,
            length: entry.length,
        };
        self.unlink_nvme(block);
        if self.index.entry(block).is_ghost() {
            self.vanish(block);
            return;
        }
        self.note_stale(block, record);
        let entry = self.index.entry(block);
        if entry.is(flag::CLEAN) {
            // Nothing else holds the bytes now: it has to be written again before it may go.
            let list = self.host_list(self.index.entry(block));
            self.policy.remove(list, BlockId(block));
            self.index.entry_mut(block).clear(flag::CLEAN);
            let list = self.host_list(self.index.entry(block));
            self.policy.insert_oldest(list, BlockId(block));
        }
        // A relocation that held it is for nobody now.
        self.unpark(block);
        self.flush_again(block);
    }

    fn unlink_nvme(&mut self, block: u32) {
        if self.index.entry(block).is(flag::RELOCATING) {
            self.detach_write(block);
        }
        let entry = self.index.entry_mut(block);
        let redundant = entry.is(flag::REDUNDANT);
        self.policy.remove(TierManager::nvme_list(redundant), BlockId(block));
        let (segment, length) = (entry.nvme_segment, entry.length);
        entry.nvme_segment = NONE;
        entry.clear(flag::REDUNDANT | flag::AGAIN);
        self.namespaces.at_mut(entry.namespace).nvme_blocks -= 1;
        self.counters.nvme_blocks -= 1;
        let nvme = self.nvme_mut();
        nvme.used_bytes -= pages(length);
        if redundant {
            nvme.mark_redundant(segment, length, false);
        }
        nvme.kill(segment, length);
    }

    /// Drops all copies.
    pub(super) fn forget(&mut self, block: u32) {
        let entry = self.index.entry(block);
        let (in_host, on_nvme) = (entry.in_host(), entry.on_nvme());
        if in_host {
            self.unlink_host(block);
        }
        if on_nvme {
            self.unlink_nvme(block);
        }
        self.vanish(block);
    }

    /// Drops all copies, and sees to it that no restart brings the block back.
    pub(super) fn forget_for_good(&mut self, block: u32) {
        let entry = self.index.entry(block);
        let copy = entry.on_nvme().then_some(StaleRecord {
            segment: entry.nvme_segment,
            page: entry.nvme_page,
            length: entry.length,
        });
        let older = self.stale.take(u64::from(block)).unwrap_or_default();
        for record in older.into_iter().chain(copy) {
            self.forget_record(record);
        }
        let misses = mutant_is!(self, DeleteMissesWrite);
        if self.index.entry(block).is(flag::DEMOTING | flag::RELOCATING) && !misses {
            self.mark_deleted(block);
        }
        self.forget(block);
    }

    pub(super) fn forget_record(&mut self, record: StaleRecord) {
        let target = self.nvme_extent(record.segment, record.page, record.length);
        self.actions.push_back(Action::ForgetRecord { target });
    }

    /// A record of a block that stays cached counts no more, but lies there until its segment is closed.
    pub(super) fn note_stale(&mut self, block: u32, record: StaleRecord) {
        match self.stale.at_mut(u64::from(block)) {
            Some(records) => records.push(record),
            None => self.stale.put(u64::from(block), vec![record]),
        }
    }

    /// The last copy is gone. Moves in flight go on for nobody; the entry stays while it has children.
    fn vanish(&mut self, block: u32) {
        if self.index.entry(block).is(flag::DEMOTING | flag::RELOCATING) {
            self.detach_write(block);
        }
        if self.index.entry(block).is(flag::PROMOTING) {
            self.detach_promotion(block);
        }
        self.drop_hbm(block);
        self.stale.take(u64::from(block));
        let entry = self.index.entry_mut(block);
        if entry.is(flag::ENROLLED) {
            self.policy.remove(TierManager::namespace_list(entry), BlockId(block));
        }
        entry.flags = flag::LIVE;
        let fingerprint = self.index.fingerprint(block);
        self.policy.forgotten(BlockId(block), fingerprint);
        let entry = self.index.entry_mut(block);
        let namespace = self.namespaces.at_mut(entry.namespace);
        namespace.labels.give_back(std::mem::take(&mut entry.labels));
        if entry.epoch != namespace.epoch {
            namespace.hidden_blocks -= 1;
            self.counters.hidden_blocks -= 1;
        }
        namespace.blocks -= 1;
        namespace.used_bytes -= u64::from(entry.length);
        self.counters.blocks -= 1;
        self.counters.forgotten += 1;
        if entry.children == 0 {
            self.remove_entry(block);
        }
    }

    /// Removes an entry without copies or children, and its ghost ancestors that were kept for it.
    pub(super) fn remove_entry(&mut self, block: u32) {
        let mut block = block;
        loop {
            let parent = self.index.entry(block).parent;
            self.index.remove(block);
            if parent == NONE {
                return;
            }
            let entry = self.index.entry_mut(parent);
            entry.children -= 1;
            if entry.children > 0 {
                return;
            }
            if !entry.is_ghost() {
                self.unpark(parent);
                return;
            }
            block = parent;
        }
    }
}
