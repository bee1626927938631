use super::TierManager;
use super::operation::Operation;
use super::promote::Stage;
use super::waiting::WaitingKind;
use crate::hbm_table::HbmSlotState;
use crate::host_table::{HostSegmentState, SlotState, pages};
use crate::index::{NONE, flag};
use crate::{BlockId, Labels, ListId, Plane};
use std::collections::BTreeMap;

type Place = (u32, u32);

impl TierManager {
    /// Panics where tables contradict each other: copies, lists, slots, leases, bytes, extents. Looks at everything: for
    /// tests and simulation.
    pub fn check_invariants(&self) {
        self.policy.check_invariants();
        self.index.check_invariants();
        self.leases.check_invariants();
        self.reservations.check_invariants();
        self.check_entries();
        self.check_slots();
        self.check_groups();
        self.check_nvme();
        self.check_hbm();
        self.check_clients();
        self.check_waiting();
    }

    fn live_entries(&self) -> impl Iterator<Item = (u32, &crate::index::Entry)> {
        (0..self.index.places())
            .map(|block| (block, self.index.entry(block)))
            .filter(|(_, entry)| entry.is(flag::LIVE))
    }

    fn check_entries(&self) {
        let mut children = BTreeMap::<u32, u32>::new();
        let (mut blocks, mut in_host, mut on_nvme, mut enrolled, mut hidden) = (0, 0, 0, 0, 0);
        let mut used = vec![0_u64; self.namespaces.len()];
        let mut labelled = vec![0_u64; self.namespaces.len()];
        for (block, entry) in self.live_entries() {
            if entry.parent != NONE {
                assert!(
                    self.index.entry(entry.parent).is(flag::LIVE),
                    "the parent of block {block} is gone"
                );
                *children.entry(entry.parent).or_default() += 1;
            }
            if entry.is_ghost() {
                assert!(entry.children > 0, "ghost {block} has no children");
                assert_eq!(entry.flags, flag::LIVE, "ghost {block} is on the move");
                assert_eq!(entry.labels, 0, "ghost {block} has labels");
                continue;
            }
            blocks += 1;
            in_host += u64::from(entry.in_host());
            on_nvme += u64::from(entry.on_nvme());
            used[entry.namespace as usize] += u64::from(entry.length);
            labelled[entry.namespace as usize] +=
                u64::from(matches!(self.labels_of(entry), Labels::One(_) | Labels::Two(..)));
            let namespace = self.namespaces.at(entry.namespace);
            hidden += u64::from(entry.epoch != namespace.epoch);
            assert_eq!(
                entry.is(flag::ENROLLED),
                namespace.quota_bytes.is_some(),
                "block {block} and its quota"
            );
            if entry.is(flag::ENROLLED) {
                enrolled += 1;
                let list = ListId {
                    plane: Plane::Namespace,
                    index: entry.namespace,
                };
                assert!(
                    self.policy.contains(list, BlockId(block)),
                    "block {block} is not on its namespace's list"
                );
            }
            if entry.in_host() {
                let slot = self.host.slot(entry.host_segment, entry.host_slot);
                assert_eq!(
                    (slot.state, slot.owner),
                    (SlotState::Block, block),
                    "the slot of block {block}"
                );
                assert!(
                    self.policy.contains(self.host_list(entry), BlockId(block)),
                    "block {block} is on no host list"
                );
            }
            if entry.on_nvme() {
                let list = TierManager::nvme_list(entry.is(flag::REDUNDANT));
                assert!(
                    self.policy.contains(list, BlockId(block)),
                    "block {block} is on no NVMe list"
                );
            }
            assert!(
                !entry.is(flag::CLEAN) || (entry.in_host() && entry.on_nvme()),
                "block {block} is not clean"
            );
            assert!(
                !entry.is(flag::REDUNDANT) || (entry.in_host() && entry.on_nvme()),
                "block {block} is not redundant"
            );
            assert!(
                !entry.is(flag::CLEAN) || !entry.is(flag::REDUNDANT),
                "block {block} is clean and redundant"
            );
            assert!(
                !entry.is(flag::DEMOTING) || (entry.in_host() && !entry.on_nvme()),
                "block {block} is demoted twice"
            );
            let writing = entry.is(flag::DEMOTING | flag::RELOCATING);
            assert_eq!(
                self.writes.at(u64::from(block)).is_some(),
                writing,
                "the write of block {block}"
            );
        }
        for (block, entry) in self.live_entries() {
            assert_eq!(
                entry.children,
                children.get(&block).copied().unwrap_or(0),
                "children of block {block}"
            );
        }
        let counted = (
            self.counters.blocks,
            self.counters.host_blocks,
            self.counters.nvme_blocks,
        );
        assert_eq!(counted, (blocks, in_host, on_nvme), "blocks, in host memory, on NVMe");
        for holding in self.reservations.iter().filter(|holding| holding.namespace != NONE) {
            used[holding.namespace as usize] += u64::from(holding.length);
        }
        for (place, namespace) in self.namespaces.iter().enumerate() {
            assert_eq!(namespace.used_bytes, used[place], "bytes used by namespace {place}");
            assert_eq!(
                namespace.labels.blocks(),
                labelled[place],
                "labelled blocks of namespace {place}"
            );
        }
        let sum = |of: fn(&crate::namespace_table::Namespace) -> u64| self.namespaces.iter().map(of).sum::<u64>();
        let counted = (sum(|n| n.blocks), sum(|n| n.host_blocks), sum(|n| n.nvme_blocks));
        assert_eq!(counted, (blocks, in_host, on_nvme), "blocks of namespaces");
        let counted = (self.counters.hidden_blocks, sum(|n| n.hidden_blocks));
        assert_eq!(counted, (hidden, hidden), "blocks of older generations");
        let listed: usize = (0..)
            .take(self.namespaces.len())
            .map(|index| {
                self.policy.length(ListId {
                    plane: Plane::Namespace,
                    index,
                })
            })
            .sum();
        assert_eq!(listed, enrolled, "blocks on namespaces' lists");
    }

    fn check_slots(&self) {
        let mut leases = BTreeMap::<Place, u16>::new();
        for holding in self.leases.iter().filter(|holding| !holding.on_device) {
            *leases.entry((holding.segment, holding.slot)).or_default() += 1;
        }
        let mut reserved = BTreeMap::<Place, ()>::new();
        for holding in self.reservations.iter().filter(|holding| !holding.is_published()) {
            assert!(
                reserved.insert((holding.segment, holding.slot), ()).is_none(),
                "two reservations of one slot"
            );
        }
        let mut operations = BTreeMap::<Place, u8>::new();
        for issued in self.operations.values() {
            match &issued.operation {
                Operation::Demote(demotion) => {
                    *operations
                        .entry((demotion.host_segment, demotion.host_slot))
                        .or_default() += 1;
                }
                Operation::Promote { segment, slot, .. } => *operations.entry((*segment, *slot)).or_default() += 1,
                Operation::PromoteToHbm {
                    host_segment,
                    host_slot,
                    ..
                } => *operations.entry((*host_segment, *host_slot)).or_default() += 1,
                Operation::Zero { segment, slots } => {
                    for slot in slots {
                        *operations.entry((*segment, *slot)).or_default() += 1;
                    }
                }
                _ => {}
            }
        }
        let filling: Vec<Place> = self
            .promotions
            .iter()
            .filter_map(|promotion| match promotion.stage {
                Stage::Ready { segment, slot } | Stage::Reading { segment, slot } => Some((segment, slot)),
                Stage::NeedsSlot => None,
            })
            .collect();
        let (mut used, mut opened, mut filled) = (0, 0, 0);
        for (place, segment) in (0..).zip(&self.host.segments) {
            let Some(segment) = segment else { continue };
            opened += segment.bytes;
            let mut free = 0;
            for (slot, memory) in (0..).zip(&segment.slots) {
                let at = (place, slot);
                assert_eq!(memory.leases, leases.remove(&at).unwrap_or(0), "leases of slot {at:?}");
                assert_eq!(
                    memory.operations,
                    operations.remove(&at).unwrap_or(0),
                    "operations on slot {at:?}"
                );
                match memory.state {
                    SlotState::Free => free += 1,
                    SlotState::Reserved => assert!(reserved.remove(&at).is_some(), "slot {at:?} is reserved by nobody"),
                    SlotState::Filling => filled += 1,
                    SlotState::Block => {
                        let entry = self.index.entry(memory.owner);
                        assert_eq!((entry.host_segment, entry.host_slot), at, "the block in slot {at:?}");
                    }
                    SlotState::Orphan => assert!(
                        memory.is_held() || self.host.tainted.contains(&at),
                        "slot {at:?} is held by nobody"
                    ),
                }
                if memory.state != SlotState::Free {
                    used += self.host.slot_bytes(place);
                }
            }
            assert_eq!(segment.free, free, "free slots of segment {place}");
        }
        assert!(
            leases.is_empty() && reserved.is_empty() && operations.is_empty(),
            "holders of no slot"
        );
        assert_eq!(filled, filling.len(), "slots being filled");
        for (segment, slot) in filling {
            assert_eq!(
                self.host.slot(segment, slot).state,
                SlotState::Filling,
                "the slot of a promotion"
            );
        }
        assert_eq!(
            (self.host.used_bytes, self.host.opened_bytes),
            (used, opened),
            "host bytes"
        );
        assert!(opened <= self.settings.host_bytes, "{opened} host bytes opened");
    }

    fn check_groups(&self) {
        let mut listed = 0;
        for (place, group) in (0..).zip(&self.host.groups) {
            let Some(group) = group else { continue };
            let (mut slots, mut free, mut opening, mut available) = (0, 0, 0, Vec::new());
            for &segment in &group.segments {
                let entry = self.host.segment(segment);
                assert_eq!(entry.group, place, "the group of segment {segment}");
                let count = u32::try_from(entry.slots.len()).expect("slots of a segment");
                match entry.state {
                    HostSegmentState::Active => {
                        slots += count;
                        free += entry.free;
                        if entry.free > 0 {
                            available.push(segment);
                        }
                    }
                    HostSegmentState::Opening => opening += count,
                    HostSegmentState::Draining | HostSegmentState::Closing => {}
                }
            }
            available.sort_unstable();
            let mut stack = group.available.clone();
            stack.sort_unstable();
            assert_eq!(
                (group.slots, group.free, group.opening),
                (slots, free, opening),
                "slots of group {place}"
            );
            assert_eq!(stack, available, "segments of group {place} with free slots");
            listed += self.policy.length(TierManager::group_list(place, false));
            listed += self.policy.length(TierManager::group_list(place, true));
        }
        assert_eq!(listed as u64, self.counters.host_blocks, "blocks on host lists");
    }

    fn check_nvme(&self) {
        let Some(nvme) = &self.nvme else {
            assert_eq!(self.counters.nvme_blocks, 0, "no NVMe tier");
            return;
        };
        // Records that are live, by segment: pages and lengths.
        let mut records = BTreeMap::<u32, Vec<Place>>::new();
        let mut redundant = BTreeMap::<u32, u64>::new();
        let mut used = 0;
        for (_, entry) in self.live_entries().filter(|(_, entry)| entry.on_nvme()) {
            used += pages(entry.length);
            if entry.is(flag::REDUNDANT) {
                *redundant.entry(entry.nvme_segment).or_default() += nvme.cost(entry.length);
            }
            records
                .entry(entry.nvme_segment)
                .or_default()
                .push((entry.nvme_page, entry.length));
        }
        assert_eq!(nvme.used_bytes, used, "live payload on NVMe");
        let (mut writes, mut reads) = (BTreeMap::<u32, u32>::new(), BTreeMap::<u32, u32>::new());
        let mut operations = 0;
        for issued in self.operations.values() {
            operations += u32::from(issued.operation.is_nvme());
            match &issued.operation {
                Operation::Demote(demotion) => {
                    records
                        .entry(demotion.nvme_segment)
                        .or_default()
                        .push((demotion.page, demotion.length));
                    *writes.entry(demotion.nvme_segment).or_default() += 1;
                }
                Operation::Relocate(relocation) => {
                    records
                        .entry(relocation.segment)
                        .or_default()
                        .push((relocation.page, relocation.length));
                    *writes.entry(relocation.segment).or_default() += 1;
                    *reads.entry(relocation.source_segment).or_default() += 1;
                }
                Operation::Promote { nvme_segment, .. } => *reads.entry(*nvme_segment).or_default() += 1,
                Operation::Erase { segment } => *reads.entry(*segment).or_default() += 1,
                _ => {}
            }
        }
        assert_eq!(nvme.operations, operations, "NVMe operations");
        let (mut live, mut opened, mut bytes, mut closing) = (0, 0, 0, 0);
        for (place, segment) in (0..).zip(&nvme.segments) {
            let Some(segment) = segment else { continue };
            opened += 1;
            bytes += segment.bytes;
            closing += if segment.will_close() { segment.bytes } else { 0 };
            let mut extents = records.remove(&place).unwrap_or_default();
            extents.sort_unstable();
            let mut end = nvme.header_bytes;
            for &(page, length) in &extents {
                let start = u64::from(page) * crate::host_table::PAGE;
                assert!(start >= end, "records overlap in segment {place}");
                end = start + pages(length);
            }
            assert!(end <= segment.end, "a record behind the end of segment {place}");
            assert!(
                segment.end + segment.records.len() as u64 * nvme.record_bytes <= segment.bytes,
                "segment {place}"
            );
            let cost: u64 = extents.iter().map(|&(_, length)| nvme.cost(length)).sum();
            assert_eq!(segment.live, cost, "live bytes of segment {place}");
            live += cost;
            let marked = redundant.get(&place).copied().unwrap_or(0);
            assert_eq!(segment.redundant, marked, "redundant bytes of segment {place}");
            let moving = (segment.writes, segment.reads);
            let counted = (writes.remove(&place).unwrap_or(0), reads.remove(&place).unwrap_or(0));
            assert_eq!(moving, counted, "writes and reads of segment {place}");
        }
        assert!(
            records.is_empty() && writes.is_empty() && reads.is_empty(),
            "records in no segment"
        );
        let counted = (nvme.live, nvme.opened, nvme.opened_bytes);
        assert_eq!(counted, (live, opened, bytes), "live bytes, segments and their bytes");
        assert_eq!(nvme.redundant, redundant.values().sum::<u64>(), "redundant bytes");
        assert!(bytes - closing <= nvme.bytes_max, "{bytes} bytes of NVMe segments");
        let listed =
            self.policy.length(TierManager::nvme_list(false)) + self.policy.length(TierManager::nvme_list(true));
        assert_eq!(listed as u64, self.counters.nvme_blocks, "blocks on NVMe lists");
    }

    fn check_hbm(&self) {
        let Some(hbm) = &self.hbm else { return };
        hbm.check_invariants();
        let mut leases = BTreeMap::<Place, u32>::new();
        for holding in self.leases.iter().filter(|holding| holding.on_device) {
            *leases.entry((holding.segment, holding.slot)).or_default() += 1;
        }
        for (place, segment) in (0..).zip(&hbm.segments) {
            let Some(segment) = segment else { continue };
            for (slot, memory) in (0..).zip(&segment.slots) {
                let held = leases.remove(&(place, slot)).unwrap_or(0);
                assert_eq!(memory.leases, held, "leases of device slot {slot} of segment {place}");
                if memory.state == HbmSlotState::Block {
                    let entry = self.index.entry(memory.owner);
                    assert!(
                        entry.is(flag::LIVE) && !entry.is_ghost(),
                        "the copy of block {} in device memory is its only one",
                        memory.owner
                    );
                    let domain = self.namespaces.at(entry.namespace).domain;
                    assert_eq!(
                        (domain, pages(entry.length)),
                        segment.shape,
                        "the device segment of block {}",
                        memory.owner
                    );
                }
            }
        }
        assert!(leases.is_empty(), "leases on no device slot");
        let filling = self.operations.values();
        let filling = filling.filter(|issued| matches!(issued.operation, Operation::PromoteToHbm { .. }));
        assert_eq!(filling.count(), hbm.filling, "copies to device memory in flight");
    }

    fn check_clients(&self) {
        for (place, client) in self.clients.iter() {
            let mut leases = 0;
            let (mut slots, mut bytes) = (0, 0);
            for holding in self.leases.iter().filter(|holding| holding.client == place) {
                leases += 1;
                slots += u64::from(holding.expired);
                bytes += self.held_bytes(holding) * u64::from(holding.expired);
            }
            let (mut reservations, mut reserved) = (0, 0);
            for holding in self.reservations.iter().filter(|holding| holding.client == place) {
                reservations += 1;
                reserved += self.host.slot_bytes(holding.segment);
                slots += u64::from(holding.expired);
                bytes += self.host.slot_bytes(holding.segment) * u64::from(holding.expired);
            }
            let counted = (client.leases, client.reservations, client.reserved_bytes);
            assert_eq!(counted, (leases, reservations, reserved), "what {:?} holds", client.id);
            let counted = (client.quarantined_slots, client.quarantined_bytes);
            assert_eq!(counted, (slots, bytes), "the quarantine of {:?}", client.id);
            assert!(
                reserved <= self.settings.reserved_bytes_per_client_max,
                "{:?} reserved too much",
                client.id
            );
            assert!(
                leases as usize <= self.settings.leases_per_client_max,
                "{:?} leased too much",
                client.id
            );
        }
        let clients = self
            .clients
            .iter()
            .map(|(_, client)| u64::from(client.leases))
            .sum::<u64>();
        assert_eq!(clients, self.leases.len() as u64, "leases of clients");
    }

    fn check_waiting(&self) {
        assert_eq!(self.waiting.len(), self.deadlines.len(), "deadlines of those who wait");
        let mut wanted = BTreeMap::<u32, u64>::new();
        for promotion in self
            .promotions
            .iter()
            .filter(|promotion| promotion.stage == Stage::NeedsSlot)
        {
            *wanted.entry(promotion.group).or_default() += 1;
        }
        for (_, waiting) in self.waiting.iter() {
            assert!(waiting.outstanding > 0, "a command waits for nothing");
            if let WaitingKind::Reserve { items, .. } = &waiting.kind {
                for item in items.iter().filter(|item| !item.decided) {
                    *wanted.entry(item.group).or_default() += 1;
                }
            }
        }
        let mut ahead = BTreeMap::<u32, u32>::new();
        for promotion in self.promotions.iter().filter(|promotion| promotion.is_ahead()) {
            *ahead.entry(promotion.group).or_default() += 1;
        }
        let begun = ahead.values().sum::<u32>() as usize;
        assert_eq!(self.promotions.ahead_in_flight(), begun, "promotions for nobody");
        for (place, group) in (0..).zip(&self.host.groups) {
            if let Some(group) = group {
                let filled = ahead.remove(&place).unwrap_or(0);
                assert_eq!(group.ahead, filled, "slots of group {place} that are filled ahead");
                assert_eq!(
                    group.wanted,
                    wanted.remove(&place).unwrap_or(0),
                    "slots wanted of group {place}"
                );
            }
        }
        assert!(wanted.is_empty(), "slots wanted of no group");
        assert!(ahead.is_empty(), "slots filled ahead of no group");
    }
}
