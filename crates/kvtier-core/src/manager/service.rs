use super::TierManager;
use crate::namespace_table::backoff;
use crate::nvme_table::Service;
use crate::{Completion, Failure};
use std::time::Duration;

/// Errors in a row that take the tier out of service.
const ERRORS_MAX: u32 = 3;
/// First pause after the device refused an operation.
const PAUSE: Duration = Duration::from_millis(1);

impl TierManager {
    /// Counts what the device answered, and pauses or stops using it where it fails.
    pub(super) fn note_nvme_outcome(&mut self, outcome: Result<Completion, Failure>) {
        let now = self.now;
        let nvme = self.nvme.as_mut().expect("an NVMe tier");
        match outcome {
            Ok(_) => {
                nvme.errors = 0;
                nvme.attempts = 0;
            }
            // The bytes are bad, not the device's willingness; a deadline of the caller's is nobody's fault.
            Err(Failure::Corrupt) => self.counters.corrupt += 1,
            Err(Failure::Deadline) => {}
            Err(Failure::Busy) => {
                nvme.not_before = now.after(PAUSE);
                nvme.paused = true;
            }
            Err(Failure::Io | Failure::Full) => {
                self.counters.io_errors += 1;
                nvme.not_before = backoff(now, PAUSE, nvme.errors);
                nvme.paused = true;
                nvme.errors += 1;
                if nvme.errors >= ERRORS_MAX && nvme.service == Service::In {
                    self.take_nvme_out();
                }
            }
        }
    }

    /// Stops using the device for a while, longer each time.
    fn take_nvme_out(&mut self) {
        let now = self.now;
        let first = self.settings.tier_retry_backoff;
        let nvme = self.nvme_mut();
        nvme.errors = 0;
        nvme.service = Service::Out(backoff(now, first, nvme.attempts));
        nvme.attempts += 1;
        self.left_service();
    }

    fn left_service(&mut self) {
        self.cancel_waiting_promotions();
        self.abort_flush();
        self.attend_all();
    }

    /// An operation is overdue: until the driver says that nothing can touch memory any more, the tier is not used.
    pub(super) fn begin_reset(&mut self) {
        if matches!(self.nvme_ref().service, Service::Resetting) {
            return;
        }
        self.issue_reset();
        self.nvme_mut().service = Service::Resetting;
        self.left_service();
    }

    /// The driver did not answer: ask again.
    pub(super) fn reset_overdue(&mut self) {
        self.issue_reset();
        self.nvme_mut().service = Service::Resetting;
    }

    pub(super) fn reset_answered(&mut self, outcome: Result<Completion, Failure>) {
        if outcome.is_err() {
            // It is asked again when this one is overdue.
            self.retry_later(super::operation::Operation::Reset);
            return;
        }
        self.fail_nvme_operations();
        self.take_nvme_out();
    }

    /// Tries the device again once its pause is over.
    pub(super) fn check_service(&mut self) {
        let now = self.now;
        let Some(nvme) = &mut self.nvme else { return };
        match nvme.service {
            Service::Out(until) if until <= now => {
                nvme.service = Service::In;
                nvme.not_before = now;
                self.attend_all();
            }
            Service::In if nvme.not_before <= now => {
                nvme.paused = false;
                nvme.attention = true;
            }
            Service::In | Service::Out(_) | Service::Resetting => {}
        }
    }
}
