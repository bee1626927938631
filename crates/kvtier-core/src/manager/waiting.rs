use super::TierManager;
use crate::host_table::Want;
use crate::{Action, BlockHash, ClientId, FetchScope, Fetched, Label, OperationId, RealizationId, Reserved, Time};

/// A command that waits, for bytes or for room.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Place of the client.
    pub(super) client: u32,
    pub(super) client_id: ClientId,
    pub(super) deadline: Time,
    /// Keys that are not decided yet.
    pub(super) outstanding: u32,
    pub(super) kind: WaitingKind,
}

#[derive(Debug)]
pub(super) enum WaitingKind {
    Fetch {
        scope: FetchScope,
        results: Vec<Fetched>,
    },
    Reserve {
        namespace: u32,
        realization: RealizationId,
        label: Option<Label>,
        results: Vec<Reserved>,
        items: Vec<ReserveItem>,
    },
}

/// A key of a reserve that waits for a slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReserveItem {
    pub(super) position: u32,
    pub(super) group: u32,
    pub(super) length: u32,
    pub(super) hash: BlockHash,
    pub(super) decided: bool,
}

impl TierManager {
    pub(super) fn take_operation_id(&mut self) -> OperationId {
        let operation = OperationId(self.next_operation);
        self.next_operation += 1;
        operation
    }

    /// Whether one more command of this client may wait.
    pub(super) fn may_wait(&self, client: u32) -> bool {
        if super::mutant_is!(self, UnboundedWaiting) {
            return true;
        }
        self.waiting.len() < self.settings.waiting_max
            && self.clients.at(client).waiting.len() < self.settings.waiting_per_client_max
    }

    pub(super) fn start_waiting(&mut self, operation: OperationId, waiting: Waiting) {
        self.clients.at_mut(waiting.client).waiting.push(operation);
        self.deadlines.insert((waiting.deadline, operation));
        self.waiting.put(operation.0, waiting);
    }

    /// Ends the wait and tells the client. Keys that are not decided are answered as they stand.
    pub(super) fn finish_waiting(&mut self, operation: OperationId) {
        let Some(waiting) = self.stop_waiting(operation) else {
            return;
        };
        let client = waiting.client_id;
        let action = match waiting.kind {
            WaitingKind::Fetch { scope, mut results } => {
                self.settle_fetch(waiting.client, scope, &mut results);
                Action::FetchDone {
                    operation,
                    client,
                    results,
                }
            }
            WaitingKind::Reserve { results, .. } => Action::ReserveDone {
                operation,
                client,
                results,
            },
        };
        self.actions.push_back(action);
    }

    /// Ends the wait of a client that is gone. What it was given already is among its leases and reservations.
    pub(super) fn drop_waiting(&mut self, operation: OperationId) {
        self.stop_waiting(operation);
    }

    fn stop_waiting(&mut self, operation: OperationId) -> Option<Waiting> {
        let waiting = self.waiting.take(operation.0)?;
        self.deadlines.remove(&(waiting.deadline, operation));
        self.clients
            .at_mut(waiting.client)
            .waiting
            .retain(|&other| other != operation);
        if let WaitingKind::Reserve { items, .. } = &waiting.kind {
            for item in items.iter().filter(|item| !item.decided) {
                self.host.group_mut(item.group).wanted -= 1;
            }
            for item in items.iter().filter(|item| !item.decided) {
                self.drop_stale_wants(item.group);
            }
        }
        Some(waiting)
    }

    /// Commands whose deadline passed.
    pub(super) fn expire_waiting(&mut self) {
        while let Some(&(deadline, operation)) = self.deadlines.first() {
            if deadline > self.now {
                return;
            }
            if let Some(waiting) = self.waiting.at(operation.0) {
                match waiting.kind {
                    WaitingKind::Fetch { .. } => self.counters.fetch_late += u64::from(waiting.outstanding),
                    WaitingKind::Reserve { .. } => self.counters.puts_busy += u64::from(waiting.outstanding),
                }
            }
            self.finish_waiting(operation);
        }
    }

    /// Keeps a group's queue within a multiple of those that really wait in it.
    pub(super) fn drop_stale_wants(&mut self, group: u32) {
        let entry = self.host.group(group);
        if entry.wants.len() as u64 <= 2 * entry.wanted + 32 {
            return;
        }
        let mut wants = std::mem::take(&mut self.host.group_mut(group).wants);
        wants.retain(|want| match want {
            Want::Reserve(operation) => self.waiting.at(operation.0).is_some(),
            Want::Promotion(promotion) => self.promotions.at(*promotion).is_some(),
        });
        self.host.group_mut(group).wants = wants;
    }

    /// Notes the outcome of one key of a reserve that waits.
    pub(super) fn decide_reserve(&mut self, operation: OperationId, item: usize, outcome: Reserved) {
        let Some(waiting) = self.waiting.at_mut(operation.0) else {
            return;
        };
        let WaitingKind::Reserve { results, items, .. } = &mut waiting.kind else {
            return;
        };
        assert!(!items[item].decided, "a key is decided once");
        items[item].decided = true;
        results[items[item].position as usize] = outcome;
        let group = items[item].group;
        waiting.outstanding -= 1;
        let done = waiting.outstanding == 0;
        self.host.group_mut(group).wanted -= 1;
        if done {
            self.finish_waiting(operation);
        }
    }

    /// Notes the outcome of one key of a fetch that waits.
    pub(super) fn decide_fetch(&mut self, operation: OperationId, position: u32, outcome: Fetched) {
        let Some(waiting) = self.waiting.at_mut(operation.0) else {
            return;
        };
        let WaitingKind::Fetch { results, .. } = &mut waiting.kind else {
            return;
        };
        results[position as usize] = outcome;
        waiting.outstanding -= 1;
        if waiting.outstanding == 0 {
            self.finish_waiting(operation);
        }
    }
}
