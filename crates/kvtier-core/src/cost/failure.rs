/// How much of what was seen one more fetch leaves: twenty are remembered.
const DECAY: f64 = 0.95;

/// How often a backend's fetches fail: a Beta distribution that forgets.
#[derive(Clone, Debug)]
pub(super) struct FailureRate {
    failed: f64,
    succeeded: f64,
    /// How long it took to learn of a failure, seconds: an average.
    known_after_s: Option<f64>,
}

impl FailureRate {
    pub(super) fn new() -> FailureRate {
        FailureRate {
            failed: 1.0,
            succeeded: 99.0,
            known_after_s: None,
        }
    }

    /// Between 0 and 1.
    pub(super) fn probability(&self) -> f64 {
        self.failed / (self.failed + self.succeeded)
    }

    /// Seconds until a failure was known, where one was seen.
    pub(super) fn known_after_s(&self) -> Option<f64> {
        self.known_after_s
    }

    pub(super) fn succeed(&mut self) {
        self.failed *= DECAY;
        self.succeeded = self.succeeded * DECAY + 1.0;
    }

    pub(super) fn fail(&mut self, after_s: f64) {
        self.failed = self.failed * DECAY + 1.0;
        self.succeeded *= DECAY;
        if !after_s.is_finite() || after_s < 0.0 {
            return;
        }
        self.known_after_s = Some(
            self.known_after_s
                .map_or(after_s, |known| known + 0.2 * (after_s - known)),
        );
    }
}
