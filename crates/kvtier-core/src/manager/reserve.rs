use super::waiting::{ReserveItem, Waiting, WaitingKind};
use super::{TierManager, mutant_is};
use crate::holding::Holding;
use crate::host_table::{SlotState, Want, pages};
use crate::index::NONE;
use crate::{Answer, ClientId, Extent, OperationId, Refusal, Request, ReservationId, Reserved, Time};

impl TierManager {
    /// One slot for each key that is not cached, or not under the hint's label, of the length given. Where there is no room the answer is `Pending`, and
    /// at the latest when the deadline passes `ReserveDone` says what was had.
    ///
    /// # Errors
    /// `Denied`, `UnknownClient`, `Invalid`, `Draining`, or `Busy` for a client with too much in quarantine.
    pub fn reserve(
        &mut self,
        request: &Request<'_>,
        lengths: &[u32],
        now: Time,
    ) -> Result<Answer<Vec<Reserved>>, Refusal> {
        self.advance(now);
        let client = self.admit_request(request)?;
        self.may_hold_more(client)?;
        if lengths.len() != request.hashes.len() {
            return Err(Refusal::Invalid("one length for each key"));
        }
        if lengths
            .iter()
            .any(|&length| length == 0 || length > self.settings.block_bytes_max)
        {
            return Err(Refusal::Invalid("a block has 1 to block_bytes_max bytes"));
        }
        let namespace = request.namespace.0;
        let domain = self.clients.at(client).domain;
        let may_wait = self.may_wait(client) && request.deadline > self.now;
        let mut results = vec![Reserved::Busy; lengths.len()];
        let mut items: Vec<ReserveItem> = Vec::new();
        // What waits counts against the client's bound too, or it could wait for more than it may ever hold.
        let mut waiting_bytes = 0;
        let known = self.find_all(request);
        for (position, (&hash, &length)) in (0..).zip(request.hashes.iter().zip(lengths)) {
            // Room made for one key may have cost another of them.
            if known[position as usize] != NONE
                && let Some(block) = self.find(request.namespace, request.realization, hash)
                && self.carries(block, request.hints.label)
            {
                self.counters.puts_present += 1;
                results[position as usize] = Reserved::Present;
                continue;
            }
            let bytes = pages(length);
            if !self.may_reserve(client, bytes + waiting_bytes)
                || self.segment_bytes(bytes) > self.settings.host_bytes
                || !self.make_quota_room(namespace, u64::from(length))
            {
                self.counters.puts_busy += 1;
                continue;
            }
            let group = self.host.open_group(domain, bytes);
            if let Some((segment, slot)) = self.find_slot(group) {
                let granted = self.hold_slot(client, (segment, slot), length, namespace);
                self.publish_early(request, hash, granted);
                results[position as usize] = granted;
            } else if may_wait {
                waiting_bytes += bytes;
                items.push(ReserveItem {
                    position,
                    group,
                    length,
                    hash,
                    decided: false,
                });
            } else {
                self.counters.puts_busy += 1;
                self.host.group_mut(group).refused_at = Some(self.now);
                self.host.attend(group);
            }
        }
        if items.is_empty() {
            self.pump();
            return Ok(Answer::Ready(results));
        }
        let operation = self.take_operation_id();
        let outstanding = u32::try_from(items.len()).expect("batches are bounded");
        for item in &items {
            let group = self.host.group_mut(item.group);
            group.wanted += 1;
            if group.wants.back() != Some(&Want::Reserve(operation)) {
                group.wants.push_back(Want::Reserve(operation));
            }
            self.host.attend(item.group);
        }
        let kind = WaitingKind::Reserve {
            namespace,
            realization: request.realization,
            label: request.hints.label,
            results,
            items,
        };
        let waiting = Waiting {
            client,
            client_id: request.client,
            deadline: request.deadline,
            outstanding,
            kind,
        };
        self.start_waiting(operation, waiting);
        self.pump();
        Ok(Answer::Pending(operation))
    }

    /// Slots of one length ahead of any key, so that a put is one trip: what is there at once, which may be fewer.
    pub fn grant(&mut self, client: ClientId, length: u32, count: u32, now: Time) -> Vec<(ReservationId, Extent)> {
        self.advance(now);
        let Ok(place) = self.client_place(client) else {
            return Vec::new();
        };
        if self.may_hold_more(place).is_err() || length == 0 || length > self.settings.block_bytes_max {
            return Vec::new();
        }
        let bytes = pages(length);
        if self.segment_bytes(bytes) > self.settings.host_bytes {
            return Vec::new();
        }
        let group = self.host.open_group(self.clients.at(place).domain, bytes);
        let mut granted = Vec::new();
        for _ in 0..count {
            if !self.may_reserve(place, bytes) {
                break;
            }
            let Some((segment, slot)) = self.find_slot(group) else {
                self.host.group_mut(group).refused_at = Some(self.now);
                break;
            };
            match self.hold_slot(place, (segment, slot), length, NONE) {
                Reserved::Granted { reservation, extent } => granted.push((reservation, extent)),
                Reserved::Present | Reserved::Busy => break,
            }
        }
        self.host.attend(group);
        self.pump();
        granted
    }

    /// Items of a waiting reserve get the slots that there are now. True where all of this group's were decided.
    pub(super) fn serve_reserve(&mut self, group: u32, operation: OperationId) -> bool {
        loop {
            let Some(waiting) = self.waiting.at(operation.0) else {
                return true;
            };
            let WaitingKind::Reserve {
                namespace,
                realization,
                label,
                items,
                ..
            } = &waiting.kind
            else {
                return true;
            };
            let (client, namespace, realization, label) = (waiting.client, *namespace, *realization, *label);
            let next = items.iter().position(|item| item.group == group && !item.decided);
            let Some(position) = next else { return true };
            let item = items[position];
            // Someone may have put the block meanwhile.
            if let Some(block) = self.find(crate::NamespaceId(namespace), realization, item.hash)
                && self.carries(block, label)
            {
                self.counters.puts_present += 1;
                self.decide_reserve(operation, position, Reserved::Present);
                continue;
            }
            if !self.may_reserve(client, pages(item.length)) || !self.make_quota_room(namespace, u64::from(item.length))
            {
                self.counters.puts_busy += 1;
                self.decide_reserve(operation, position, Reserved::Busy);
                continue;
            }
            let Some(slot) = self.acquire(group) else { return false };
            let granted = self.hold_slot(client, slot, item.length, namespace);
            let is_fenced = operation < self.namespaces.at(namespace).fence;
            if let Reserved::Granted { reservation, .. } = granted
                && is_fenced
                && let Some(holding) = self.reservations.find_mut(reservation.0)
            {
                holding.fenced = true;
            }
            self.decide_reserve(operation, position, granted);
        }
    }

    /// A slot at once, for who does not wait: none while others wait.
    fn find_slot(&mut self, group: u32) -> Option<(u32, u32)> {
        if self.host.group(group).wanted > 0 {
            None
        } else {
            self.acquire(group)
        }
    }

    fn may_reserve(&self, client: u32, bytes: u64) -> bool {
        self.clients.at(client).reserved_bytes + bytes <= self.settings.reserved_bytes_per_client_max
    }

    /// Makes a slot just taken the client's to write.
    fn hold_slot(&mut self, client: u32, place: (u32, u32), length: u32, namespace: u32) -> Reserved {
        let (segment, slot) = place;
        let expires = self.now.after(self.settings.reservation_ttl);
        let holding = Holding {
            length,
            namespace,
            ..Holding::new(client, segment, slot, expires)
        };
        let reservation = self.reservations.insert(holding);
        let memory = self.host.slot_mut(segment, slot);
        assert_eq!(memory.state, SlotState::Reserved, "a slot taken for a reservation");
        let bytes = self.host.slot_bytes(segment);
        let holder = self.clients.at_mut(client);
        holder.reservations += 1;
        holder.reserved_bytes += bytes;
        if namespace != NONE {
            self.namespaces.at_mut(namespace).used_bytes += u64::from(length);
        }
        Reserved::Granted {
            reservation: ReservationId(reservation),
            extent: self.host_extent(segment, slot, length),
        }
    }

    /// The planted bug `SealBeforeWrite`: the block is visible before its bytes are written.
    fn publish_early(&mut self, request: &Request<'_>, hash: crate::BlockHash, granted: Reserved) {
        if !mutant_is!(self, SealBeforeWrite) {
            return;
        }
        #[cfg(feature = "mutants")]
        {
            let Reserved::Granted { reservation, extent } = granted else {
                return;
            };
            let holding = self.reservations.find_mut(reservation.0).expect("just made");
            holding.published = true;
            let place = (holding.segment, holding.slot);
            let key = crate::BlockKey {
                namespace: request.namespace,
                realization: request.realization,
                hash,
            };
            self.publish(key, NONE, place, extent.length, 0, crate::Labels::None);
        }
        #[cfg(not(feature = "mutants"))]
        let _ = (request, hash, granted);
    }
}
