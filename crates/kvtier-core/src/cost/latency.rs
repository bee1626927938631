use super::quantile::Quantile;

/// Weight of the newest value.
const WEIGHT: f64 = 0.2;

/// A value this many times off is not noise: the backend has become another one, and it is believed at once.
const JUMP: f64 = 4.0;

/// How long a backend takes before the first byte.
#[derive(Clone, Debug)]
pub(super) struct Latency {
    mean_s: f64,
    log_p95: Quantile,
    deviation_s: f64,
    measured: bool,
}

impl Latency {
    pub(super) fn new(expected_s: f64) -> Latency {
        let expected_s = expected_s.max(1e-6);
        Latency {
            mean_s: expected_s,
            log_p95: Quantile::new(0.95, 0.2, (2.0 * expected_s).ln()),
            deviation_s: 0.5 * expected_s,
            measured: false,
        }
    }

    /// Expected, seconds.
    pub(super) fn mean_s(&self) -> f64 {
        self.mean_s
    }

    /// Spread, seconds.
    pub(super) fn deviation_s(&self) -> f64 {
        self.deviation_s
    }

    /// 95 of a hundred are shorter, seconds.
    pub(super) fn p95_s(&self) -> f64 {
        self.log_p95.value().exp()
    }

    pub(super) fn observe(&mut self, seen_s: f64) {
        if !seen_s.is_finite() || seen_s < 0.0 {
            return;
        }
        let seen_s = seen_s.max(1e-9);
        if !self.measured {
            *self = Latency::new(seen_s);
            self.measured = true;
        }
        if seen_s > JUMP * self.mean_s || seen_s < self.mean_s / JUMP {
            self.mean_s = seen_s;
        }
        let off_s = seen_s - self.mean_s;
        self.mean_s += WEIGHT * off_s;
        // Of a normal distribution the mean distance is 0.8 of the standard deviation.
        self.deviation_s += WEIGHT * (off_s.abs() / 0.8 - self.deviation_s);
        self.log_p95.observe(seen_s.ln());
    }
}
