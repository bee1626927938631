use super::TierManager;
use crate::Time;
use crate::nvme_table::Service;

impl TierManager {
    /// Time passed: leases and reservations expire, waits end, overdue operations are dealt with, reclaim goes on.
    pub fn handle_timeout(&mut self, now: Time) {
        self.advance(now);
        self.expire_waiting();
        self.check_operations();
        self.check_service();
        self.check_host_drain();
        self.retry_records();
        self.sweep_step();
        self.attend_waiting();
        self.pump();
    }

    /// When to call [`TierManager::handle_timeout`]; earlier does no harm.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let waits = self.host.groups.iter().flatten().any(|group| group.wanted > 0);
        let paused = |at: Time| (at > self.now).then_some(at);
        [
            self.leases.first_due().map(|(_, at)| at),
            self.reservations.first_due().map(|(_, at)| at),
            self.deadlines.first().map(|&(at, _)| at),
            self.next_operation_deadline(),
            self.record_retries.first().map(|&(at, _)| at),
            self.sweep.due(),
            self.destruction_due(),
            self.host_reclaim
                .as_ref()
                .map(super::host_reclaim::HostDrain::gives_up_at),
            self.nvme.as_ref().and_then(|nvme| match nvme.service {
                Service::Out(until) => Some(until),
                // Even where a command's time is past it already: a command does not look.
                Service::In => nvme.paused.then_some(nvme.not_before),
                Service::Resetting => None,
            }),
            paused(self.host_reclaim_not_before).filter(|_| waits),
            paused(self.host.open_not_before).filter(|_| waits),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Takes the time from a command or event, and lets expire what is due. Time that runs backwards stands still.
    pub(super) fn advance(&mut self, now: Time) {
        self.now = self.now.max(now);
        while let Some((lease, at)) = self.leases.first_due() {
            if at > self.now {
                break;
            }
            self.quarantine_lease(lease);
        }
        while let Some((reservation, at)) = self.reservations.first_due() {
            if at > self.now {
                break;
            }
            self.quarantine_reservation(reservation);
        }
    }
}
