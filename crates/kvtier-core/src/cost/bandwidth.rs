use crate::Time;

/// How fast the logarithm of a bandwidth wanders, variance a second.
const WANDER_PER_S: f64 = 1.5e-3;

/// Variance of the logarithm of one measurement: 5 %, and more for one of few bytes.
const NOISE: f64 = 2.5e-3;

/// At this size a measurement is twice as noisy.
const NOISY_BYTES: f64 = 1e6;

/// A measurement this many deviations off says that the link has become another one.
const JUMP_DEVIATIONS: f64 = 4.0;

/// Before anything is known of a link: a factor of seven either way.
const UNKNOWN_VARIANCE: f64 = 4.0;

/// A link's bandwidth: a Kalman filter of its logarithm, which wanders.
///
/// A measurement far outside what was thought possible is a change of regime, not noise, and is believed at once: waiting for
/// an average to come round costs a request each time.
#[derive(Clone, Debug)]
pub(super) struct Bandwidth {
    log_mean: f64,
    variance: f64,
    at: Time,
    measured: bool,
}

impl Bandwidth {
    pub(super) fn new(expected_bytes_per_s: f64) -> Bandwidth {
        Bandwidth {
            log_mean: expected_bytes_per_s.max(1.0).ln(),
            variance: UNKNOWN_VARIANCE,
            at: Time::ZERO,
            measured: false,
        }
    }

    pub(super) fn is_measured(&self) -> bool {
        self.measured
    }

    /// Median, bytes a second.
    pub(super) fn bytes_per_s(&self) -> f64 {
        self.log_mean.exp()
    }

    /// Standard deviation of the logarithm, `ahead_s` after `now`.
    pub(super) fn deviation(&self, now: Time, ahead_s: f64) -> f64 {
        let age_s = now.since(self.at).as_secs_f64() + ahead_s;
        (self.variance + WANDER_PER_S * age_s).min(UNKNOWN_VARIANCE).sqrt()
    }

    pub(super) fn observe(&mut self, now: Time, bytes: u64, measured_s: f64) {
        let log = (bytes as f64 / measured_s).ln();
        let noise = NOISE * (1.0 + NOISY_BYTES / bytes as f64);
        let before = self.deviation(now, 0.0).powi(2);
        let innovation = log - self.log_mean;
        let jumped = innovation * innovation > JUMP_DEVIATIONS * JUMP_DEVIATIONS * (before + noise);
        let prior = if jumped { innovation * innovation } else { before };
        let gain = if self.measured { prior / (prior + noise) } else { 1.0 };
        self.log_mean += gain * innovation;
        self.variance = if self.measured { (1.0 - gain) * prior } else { noise };
        self.at = self.at.max(now);
        self.measured = true;
    }
}
