use super::{TierManager, mutant_is};
use crate::holding::Holding;
use crate::host_table::SlotState;
use crate::index::{NONE, flag};
use crate::{ClientId, Extent, Fetched, LeaseId, ReservationId, Tier, Time};

impl TierManager {
    /// Gives leases back. Answers how many were stale, unknown or another client's; those change nothing.
    pub fn release(&mut self, client: ClientId, leases: &[LeaseId], now: Time) -> u32 {
        self.advance(now);
        let Ok(place) = self.client_place(client) else {
            return self.count_foreign(leases.len());
        };
        let mut foreign = 0;
        for lease in leases {
            let held = self.leases.find(lease.0).is_some_and(|holding| holding.client == place);
            let accepted = held || (self.leases.find(lease.0).is_some() && mutant_is!(self, ForeignReleaseAccepted));
            if accepted {
                if mutant_is!(self, DoubleRelease) {
                    self.count_release_once_more(lease.0);
                }
                self.end_lease(lease.0);
            } else {
                foreign += 1;
            }
        }
        self.pump();
        self.count_foreign(foreign)
    }

    /// Gives reserved slots back unwritten. Answers how many were stale, unknown or another client's.
    pub fn abandon(&mut self, client: ClientId, reservations: &[ReservationId], now: Time) -> u32 {
        self.advance(now);
        let Ok(place) = self.client_place(client) else {
            return self.count_foreign(reservations.len());
        };
        let mut foreign = 0;
        for reservation in reservations {
            if self
                .reservations
                .find(reservation.0)
                .is_some_and(|holding| holding.client == place)
            {
                let holding = self.end_reservation(reservation.0);
                self.give_back_slot(&holding);
            } else {
                foreign += 1;
            }
        }
        self.pump();
        self.count_foreign(foreign)
    }

    /// Leases the host copy of a block.
    pub(super) fn lease(&mut self, client: u32, block: u32, tier: Tier) -> Fetched {
        let entry = self.index.entry(block);
        let (segment, slot, length) = (entry.host_segment, entry.host_slot, entry.length);
        let checksum = entry.is(flag::CHECKSUM).then_some(entry.checksum);
        let extent = self.host_extent(segment, slot, length);
        if entry.on_nvme() {
            self.index.entry_mut(block).set(flag::AGAIN);
        }
        self.lease_slot(client, segment, slot, extent, tier, checksum)
    }

    pub(super) fn lease_slot(
        &mut self,
        client: u32,
        segment: u32,
        slot: u32,
        extent: Extent,
        tier: Tier,
        checksum: Option<u32>,
    ) -> Fetched {
        let fetched = self.lease_slot_quietly(client, segment, slot, extent, tier, checksum);
        match (&fetched, tier) {
            (Fetched::Leased { .. }, Tier::Host) => self.counters.fetch_hits_host += 1,
            (Fetched::Leased { .. }, Tier::Nvme) => self.counters.fetch_hits_nvme += 1,
            (Fetched::Leased { .. }, Tier::Hbm | Tier::Remote) => unreachable!("leases are on memory of ours"),
            (Fetched::Miss | Fetched::Busy, _) => {}
        }
        fetched
    }

    /// As [`TierManager::lease_slot`], of what nobody asked for: it counts as no hit.
    pub(super) fn lease_slot_quietly(
        &mut self,
        client: u32,
        segment: u32,
        slot: u32,
        extent: Extent,
        tier: Tier,
        checksum: Option<u32>,
    ) -> Fetched {
        let holder = self.clients.at_mut(client);
        let memory = self.host.slot_mut(segment, slot);
        if holder.leases as usize >= self.settings.leases_per_client_max || memory.leases == u16::MAX {
            return Fetched::Busy;
        }
        holder.leases += 1;
        memory.leases += 1;
        let expires = self.now.after(self.settings.lease_ttl);
        let lease = self.leases.insert(Holding::new(client, segment, slot, expires));
        Fetched::Leased {
            lease: LeaseId(lease),
            extent,
            tier,
            checksum,
        }
    }

    /// The holder spoke, or is gone: the lease ends, and with the last one the slot is free to go.
    pub(super) fn end_lease(&mut self, lease: u64) {
        let Some(holding) = self.leases.remove(lease) else {
            return;
        };
        let bytes = self.held_bytes(&holding);
        let client = self.clients.at_mut(holding.client);
        client.leases -= 1;
        if holding.expired {
            client.quarantined_slots -= 1;
            client.quarantined_bytes -= bytes;
        }
        if holding.on_device {
            self.end_hbm_lease(&holding);
            return;
        }
        let planted = cfg!(feature = "mutants");
        let memory = self.host.slot_mut(holding.segment, holding.slot);
        assert!(memory.leases > 0 || planted, "a lease on a slot that counts none");
        memory.leases = memory.leases.saturating_sub(1);
        if memory.leases > 0 {
            return;
        }
        match memory.state {
            SlotState::Block => {
                let block = memory.owner;
                self.unpark(block);
                self.host.attend(self.host.segment(holding.segment).group);
            }
            SlotState::Orphan => self.host.settle_slot(holding.segment, holding.slot),
            SlotState::Free | SlotState::Reserved | SlotState::Filling => {
                assert!(planted, "a lease on unpublished memory")
            }
        }
    }

    /// The lease is past its time, or its holder is lost: the slot stays until the holder speaks or is gone.
    pub(super) fn quarantine_lease(&mut self, lease: u64) {
        if mutant_is!(self, SkipQuarantine) {
            self.end_lease(lease);
            return;
        }
        if !self.leases.expire(lease) {
            return;
        }
        let holding = self.leases.find(lease).expect("just expired");
        let bytes = self.held_bytes(holding);
        let client = self.clients.at_mut(holding.client);
        client.quarantined_slots += 1;
        client.quarantined_bytes += bytes;
    }

    pub(super) fn quarantine_reservation(&mut self, reservation: u64) {
        if mutant_is!(self, SkipQuarantine) {
            let holding = self.end_reservation(reservation);
            self.give_back_slot(&holding);
            return;
        }
        if !self.reservations.expire(reservation) {
            return;
        }
        let holding = self.reservations.find(reservation).expect("just expired");
        let bytes = self.host.slot_bytes(holding.segment);
        let client = self.clients.at_mut(holding.client);
        client.quarantined_slots += 1;
        client.quarantined_bytes += bytes;
    }

    /// The reservation is over. What becomes of its slot is the caller's to say.
    pub(super) fn end_reservation(&mut self, reservation: u64) -> Holding {
        let holding = self
            .reservations
            .remove(reservation)
            .expect("a reservation that was found");
        let bytes = self.host.slot_bytes(holding.segment);
        let client = self.clients.at_mut(holding.client);
        client.reservations -= 1;
        client.reserved_bytes -= bytes;
        if holding.expired {
            client.quarantined_slots -= 1;
            client.quarantined_bytes -= bytes;
        }
        if holding.namespace != NONE {
            self.namespaces.at_mut(holding.namespace).used_bytes -= u64::from(holding.length);
        }
        holding
    }

    /// Frees the slot of a reservation that is over.
    pub(super) fn give_back_slot(&mut self, holding: &Holding) {
        if holding.is_published() {
            return;
        }
        self.host.free_slot(holding.segment, holding.slot);
    }

    fn count_foreign(&mut self, count: usize) -> u32 {
        self.counters.foreign_ids += count as u64;
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// The planted bug `DoubleRelease`: the slot forgets one lease more than was released.
    fn count_release_once_more(&mut self, lease: u64) {
        let holding = self.leases.find(lease).expect("found by the caller");
        if holding.on_device {
            return;
        }
        let memory = self.host.slot_mut(holding.segment, holding.slot);
        memory.leases = memory.leases.saturating_sub(1).max(1);
    }
}
