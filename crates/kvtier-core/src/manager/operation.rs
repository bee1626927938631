use super::TierManager;
use super::demote::Demotion;
use super::mutant_is;
use super::nvme_reclaim::Relocation;
use crate::{Action, Completion, Event, Failure, Generation, NamespaceId, OperationId, Tier, Time};

/// Why a block is written to NVMe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Its slot will be needed.
    Room,
    /// Its host segment is being emptied.
    Drain,
    /// It has to survive.
    Flush(OperationId),
}

/// What an event will answer.
#[derive(Clone, Debug)]
pub(super) enum Operation {
    OpenHost {
        segment: u32,
    },
    CloseHost {
        segment: u32,
    },
    OpenNvme {
        segment: u32,
    },
    CloseNvme {
        segment: u32,
    },
    SealNvme {
        segment: u32,
    },
    Demote(Demotion),
    Promote {
        promotion: u64,
        #[cfg(feature = "mutants")]
        block: u32,
        segment: u32,
        slot: u32,
        nvme_segment: u32,
        nvme_page: u32,
        length: u32,
    },
    Relocate(Relocation),
    Sync,
    Reset,
    Record {
        namespace: NamespaceId,
        generation: Generation,
    },
    Zero {
        segment: u32,
        slots: Vec<u32>,
    },
    OpenHbm {
        segment: u32,
    },
    CloseHbm {
        segment: u32,
        /// Else it waits to be asked for again.
        is_asked: bool,
    },
    PromoteToHbm {
        segment: u32,
        slot: u32,
        host_segment: u32,
        host_slot: u32,
        length: u32,
    },
    ZeroHbm {
        segment: u32,
        slots: Vec<u32>,
    },
    Erase {
        segment: u32,
    },
}

impl Operation {
    pub(super) fn is_nvme(&self) -> bool {
        match self {
            Operation::OpenNvme { .. }
            | Operation::CloseNvme { .. }
            | Operation::SealNvme { .. }
            | Operation::Demote(_)
            | Operation::Promote { .. }
            | Operation::Relocate(_)
            | Operation::Erase { .. }
            | Operation::Sync => true,
            Operation::OpenHost { .. }
            | Operation::CloseHost { .. }
            | Operation::Zero { .. }
            | Operation::OpenHbm { .. }
            | Operation::CloseHbm { .. }
            | Operation::PromoteToHbm { .. }
            | Operation::ZeroHbm { .. }
            | Operation::Reset
            | Operation::Record { .. } => false,
        }
    }
}

/// An operation in flight.
#[derive(Debug)]
pub(super) struct Issued {
    pub(super) operation: Operation,
    pub(super) at: Time,
    /// Its deadline passed and a reset was asked for.
    pub(super) overdue: bool,
    /// Failed by a reset already (a planted bug keeps it).
    #[cfg(feature = "mutants")]
    pub(super) failed: bool,
}

impl TierManager {
    pub(super) fn issue(&mut self, operation: Operation) -> OperationId {
        let id = self.take_operation_id();
        if operation.is_nvme() {
            self.nvme_mut().operations += 1;
        }
        let issued = Issued {
            operation,
            at: self.now,
            overdue: false,
            #[cfg(feature = "mutants")]
            failed: false,
        };
        self.operations.insert(id, issued);
        id
    }

    /// Takes the answer to an [`Action`]. Answers to operations unknown, already answered or failed are ignored and counted.
    pub fn handle_event(&mut self, event: Event, now: Time) {
        self.advance(now);
        #[cfg(feature = "mutants")]
        if self
            .operations
            .get(&event.operation)
            .is_some_and(|issued| issued.failed)
        {
            let issued = self.operations.remove(&event.operation).expect("found above");
            self.accept_late(&issued.operation, event.outcome);
            self.pump();
            return;
        }
        match self.operations.remove(&event.operation) {
            None => self.counters.late_events += 1,
            Some(issued) => self.answered(event.operation, issued.operation, event.outcome, false),
        }
        self.pump();
    }

    /// `lost`: a reset failed the operation; the device may have carried it out all the same.
    fn answered(&mut self, id: OperationId, operation: Operation, outcome: Result<Completion, Failure>, lost: bool) {
        if operation.is_nvme() {
            let nvme = self.nvme_mut();
            nvme.operations -= 1;
            nvme.attention = true;
            if !lost {
                self.note_nvme_outcome(outcome);
            }
        }
        match operation {
            Operation::OpenHost { segment } => self.host_opened(segment, outcome),
            Operation::CloseHost { segment } => self.host_closed(segment, outcome),
            Operation::OpenNvme { segment } => self.nvme_opened(segment, outcome, lost),
            Operation::CloseNvme { segment } => self.nvme_closed(segment, outcome),
            Operation::SealNvme { segment } => self.nvme_sealed(segment, outcome),
            Operation::Demote(demotion) => self.demotion_answered(id, &demotion, outcome),
            Operation::Promote {
                promotion,
                segment,
                slot,
                nvme_segment,
                nvme_page,
                ..
            } => {
                let source = (nvme_segment, nvme_page);
                self.promotion_answered(promotion, (segment, slot), source, outcome.map(|_| ()));
            }
            Operation::Relocate(relocation) => self.relocation_answered(id, &relocation, outcome, lost),
            Operation::Sync => self.sync_answered(outcome.is_ok()),
            Operation::Reset => self.reset_answered(outcome),
            Operation::Record { namespace, generation } => self.record_answered(namespace, generation, outcome.is_ok()),
            Operation::Zero { segment, slots } => self.zeroed(segment, &slots, outcome),
            Operation::OpenHbm { segment } => self.hbm_opened(segment, outcome),
            Operation::CloseHbm { segment, .. } => self.hbm_closed(segment, outcome),
            Operation::PromoteToHbm {
                segment,
                slot,
                host_segment,
                host_slot,
                length,
            } => self.promoted_to_hbm((segment, slot), (host_segment, host_slot), length, outcome),
            Operation::ZeroHbm { segment, slots } => self.hbm_zeroed(segment, &slots, outcome),
            Operation::Erase { segment } => self.erased(segment, outcome),
        }
    }

    /// Looks for operations past their deadline.
    pub(super) fn check_operations(&mut self) {
        let deadline = self.settings.operation_deadline;
        let due: Vec<OperationId> = self
            .operations
            .iter()
            .filter(|(_, issued)| !issued.overdue && issued.at.after(deadline) <= self.now)
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            // One reset may have failed them all.
            let Some(issued) = self.operations.get_mut(&id) else {
                continue;
            };
            issued.overdue = true;
            if issued.operation.is_nvme() {
                self.begin_reset();
                continue;
            }
            if matches!(
                issued.operation,
                Operation::Zero { .. }
                    | Operation::OpenHbm { .. }
                    | Operation::CloseHbm { is_asked: true, .. }
                    | Operation::PromoteToHbm { .. }
                    | Operation::ZeroHbm { .. }
            ) {
                // The memory is touched until it is answered.
                continue;
            }
            let Some(issued) = self.operations.remove(&id) else {
                continue;
            };
            match issued.operation {
                Operation::OpenHost { segment } => self.host_open_overdue(segment),
                Operation::CloseHost { segment } => self.close_host(segment),
                Operation::CloseHbm { segment, .. } => self.close_hbm(segment),
                Operation::Reset => self.reset_overdue(),
                Operation::Record { namespace, generation } => self.record_answered(namespace, generation, false),
                _ => unreachable!("the rest are NVMe operations"),
            }
        }
    }

    /// When the next operation is overdue.
    pub(super) fn next_operation_deadline(&self) -> Option<Time> {
        let first = self.operations.values().find(|issued| !issued.overdue)?;
        Some(first.at.after(self.settings.operation_deadline))
    }

    /// Issues an operation again that the driver refused: the deadline of the new one paces the attempts.
    pub(super) fn retry_later(&mut self, operation: Operation) {
        // Nothing is asked of the driver until the operation is overdue, when it is issued for good.
        self.issue(operation);
    }

    /// No operation of the tier can touch memory any more: all of them failed.
    pub(super) fn fail_nvme_operations(&mut self) {
        let ids: Vec<OperationId> = self
            .operations
            .iter()
            .filter(|(_, issued)| issued.operation.is_nvme())
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let Some(issued) = self.operations.remove(&id) else {
                continue;
            };
            if mutant_is!(self, LateCompletionAccepted) {
                self.keep_failed(id, &issued);
            }
            self.answered(id, issued.operation, Err(Failure::Io), true);
        }
    }

    pub(super) fn issue_reset(&mut self) {
        let operation = self.issue(Operation::Reset);
        self.counters.resets += 1;
        self.actions.push_back(Action::ResetTier {
            operation,
            tier: Tier::Nvme,
        });
    }

    #[cfg(not(feature = "mutants"))]
    #[expect(clippy::unused_self, reason = "only a planted bug keeps anything")]
    fn keep_failed(&mut self, _id: OperationId, _issued: &Issued) {}

    /// The planted bug `LateCompletionAccepted`: an operation that a reset failed stays known.
    #[cfg(feature = "mutants")]
    fn keep_failed(&mut self, id: OperationId, issued: &Issued) {
        if matches!(issued.operation, Operation::Promote { .. }) {
            let kept = Issued {
                operation: issued.operation.clone(),
                at: self.now,
                overdue: true,
                failed: true,
            };
            self.operations.insert(id, kept);
        }
    }

    /// The planted bug `LateCompletionAccepted`: the slot of a failed promotion becomes the block's, whoever has it now.
    #[cfg(feature = "mutants")]
    fn accept_late(&mut self, operation: &Operation, outcome: Result<Completion, Failure>) {
        let Operation::Promote {
            block, segment, slot, ..
        } = *operation
        else {
            return;
        };
        let entry = self.index.entry(block);
        let fits = entry.is(crate::index::flag::LIVE) && entry.on_nvme() && !entry.in_host();
        if outcome.is_ok() && fits && self.host.segments[segment as usize].is_some() {
            self.attach_host(block, segment, slot);
        }
    }
}
