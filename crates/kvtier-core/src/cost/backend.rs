use crate::Time;

use super::bandwidth::Bandwidth;
use super::failure::FailureRate;
use super::latency::Latency;
use super::quantile::Quantile;

/// What a backend is expected to be before it was measured, and how it moves bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackendProfile {
    /// Before the first byte of a fetch, seconds. Learned.
    pub lookup_s: f64,
    /// Bandwidth, bytes a second. Learned.
    pub bytes_per_s: f64,
    /// Stored bytes for each byte of keys and values: 1 where nothing is compressed. Learned.
    pub stored_ratio: f64,
    /// Decompression, bytes of keys and values a second; infinite where nothing is compressed. It runs beside the
    /// transfer. Learned.
    pub decompress_bytes_per_s: f64,
    /// What each operation costs beside its bytes, seconds.
    pub operation_s: f64,
    /// Bytes of keys and values that one operation brings; 0 where operations cost nothing.
    pub operation_bytes: u64,
    /// Operations at a time.
    pub parallel_operations: u32,
    /// Fetches at a time: more of them wait for each other's lookups.
    pub parallel_fetches: u32,
    /// What a fetch may take, seconds: one that is expected to take longer is not begun.
    pub limit_s: f64,
}

impl Default for BackendProfile {
    /// A gigabyte a second after five milliseconds, nothing compressed, one fetch at a time.
    fn default() -> BackendProfile {
        BackendProfile {
            lookup_s: 5e-3,
            bytes_per_s: 1e9,
            stored_ratio: 1.0,
            decompress_bytes_per_s: f64::INFINITY,
            operation_s: 0.0,
            operation_bytes: 0,
            parallel_operations: 1,
            parallel_fetches: 1,
            limit_s: f64::INFINITY,
        }
    }
}

/// How long a fetch will take, with what and how surely.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Forecast {
    /// Until the backend answers, seconds.
    pub lookup_s: f64,
    /// Behind what is in flight, seconds.
    pub queue_s: f64,
    /// The bytes and their operations, seconds.
    pub transfer_s: f64,
    /// Decompression that the transfer does not hide, seconds.
    pub decompression_s: f64,
    /// One in two fetches takes at most this, seconds.
    pub p50_s: f64,
    /// Nine in ten take at most this, seconds.
    pub p90_s: f64,
    /// 99 in a hundred take at most this, seconds.
    pub p99_s: f64,
    /// Deviation of the logarithm that the quantiles were made with.
    pub(super) deviation: f64,
    /// Their middle before it was corrected by what happened, seconds.
    pub(super) raw_s: f64,
}

impl Forecast {
    /// The four terms together, seconds.
    #[must_use]
    pub fn expected_s(&self) -> f64 {
        self.lookup_s + self.queue_s + self.transfer_s + self.decompression_s
    }
}

/// A backend as an operator sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackendReport {
    /// Whether its bandwidth was measured, or is what the settings say.
    pub measured: bool,
    /// Bandwidth, bytes a second: the median.
    pub bytes_per_s: f64,
    /// Standard deviation of its logarithm.
    pub bandwidth_deviation: f64,
    /// Lookup, seconds: the mean.
    pub lookup_s: f64,
    /// 95 of a hundred lookups are shorter, seconds.
    pub lookup_p95_s: f64,
    /// Probability that a fetch fails.
    pub failure_probability: f64,
    /// How long it takes to learn of a failure, seconds; nothing where none was seen.
    pub failure_known_after_s: Option<f64>,
    /// Stored bytes asked for that have not arrived.
    pub inflight_bytes: u64,
    /// Fetches that have not ended.
    pub inflight_fetches: u32,
}

/// Decisions use a bandwidth that is half a deviation below the middle: an overestimate costs more than an underestimate.
const PESSIMISM_DEVIATIONS: f64 = 0.5;

/// What no estimate of a fetch's logarithm is surer than.
const DEVIATION_MIN: f64 = 0.02;

/// How far a quantile moves by one fetch, in deviations.
const QUANTILE_STEP: f64 = 0.2;

/// Weight of one block in what is stored on average.
const STORED_WEIGHT: f64 = 1.0 / 16.0;

/// Everything learned of one backend.
#[derive(Clone, Debug)]
pub(super) struct Backend {
    pub(super) profile: BackendProfile,
    pub(super) bandwidth: Bandwidth,
    pub(super) latency: Latency,
    pub(super) failures: FailureRate,
    /// Of (log actual - log forecast) / deviation.
    quantiles: [Quantile; 3],
    pub(super) inflight_bytes: u64,
    pub(super) inflight_fetches: u32,
    /// Of those, how many have not got their first byte.
    pub(super) unanswered_fetches: u32,
    /// When something last arrived, or began to be waited for.
    pub(super) progress_at: Time,
    /// How much arrived then.
    progress_bytes: u64,
}

impl Backend {
    pub(super) fn new(profile: BackendProfile) -> Backend {
        Backend {
            profile,
            bandwidth: Bandwidth::new(profile.bytes_per_s),
            latency: Latency::new(profile.lookup_s),
            failures: FailureRate::new(),
            quantiles: [
                Quantile::new(0.5, QUANTILE_STEP, 0.0),
                Quantile::new(0.9, QUANTILE_STEP, 1.3),
                Quantile::new(0.99, QUANTILE_STEP, 2.3),
            ],
            inflight_bytes: 0,
            inflight_fetches: 0,
            unanswered_fetches: 0,
            progress_at: Time::ZERO,
            progress_bytes: 0,
        }
    }

    /// Seconds for each byte of keys and values once they flow, at `bytes_per_s`.
    pub(super) fn s_per_byte(&self, bytes_per_s: f64) -> f64 {
        let profile = &self.profile;
        let operation_s = if profile.operation_bytes == 0 {
            0.0
        } else {
            profile.operation_s / (profile.operation_bytes as f64 * f64::from(profile.parallel_operations.max(1)))
        };
        profile.stored_ratio / bytes_per_s + operation_s
    }

    /// Decompression beyond what the transfer hides, seconds a byte of keys and values.
    pub(super) fn unhidden_s_per_byte(&self, moved_s_per_byte: f64) -> f64 {
        (1.0 / self.profile.decompress_bytes_per_s - moved_s_per_byte).max(0.0)
    }

    /// Bandwidth to plan with, bytes a second.
    pub(super) fn planned_bytes_per_s(&self, now: Time) -> f64 {
        let bytes_per_s =
            self.bandwidth.bytes_per_s() * (-PESSIMISM_DEVIATIONS * self.bandwidth.deviation(now, 0.0)).exp();
        bytes_per_s.min(self.stalled_bytes_per_s(now))
    }

    /// What the link can be at most, as nothing has arrived for so long.
    fn stalled_bytes_per_s(&self, now: Time) -> f64 {
        if self.inflight_fetches == 0 || self.progress_bytes == 0 {
            return f64::INFINITY;
        }
        let silent_s = now.since(self.progress_at).as_secs_f64() - self.latency.p95_s();
        if silent_s <= 0.0 {
            return f64::INFINITY;
        }
        self.progress_bytes as f64 / silent_s
    }

    /// Seconds before the first byte of a fetch that begins now: what is in flight, then the lookup.
    pub(super) fn queue_s(&self, bytes_per_s: f64) -> f64 {
        let lookups = f64::from(self.unanswered_fetches) / f64::from(self.profile.parallel_fetches.max(1));
        self.inflight_bytes as f64 / bytes_per_s + lookups * self.latency.mean_s()
    }

    /// A fetch of `bytes` of keys and values that begins `now`.
    pub(super) fn forecast(&self, now: Time, bytes: u64) -> Forecast {
        let bytes_per_s = self.planned_bytes_per_s(now);
        let bytes = bytes as f64;
        let moved_s_per_byte = self.s_per_byte(bytes_per_s);
        let mut forecast = Forecast {
            lookup_s: self.latency.mean_s(),
            queue_s: self.queue_s(bytes_per_s),
            transfer_s: bytes * moved_s_per_byte,
            decompression_s: bytes * self.unhidden_s_per_byte(moved_s_per_byte),
            ..Forecast::default()
        };
        let expected_s = forecast.expected_s();
        // Half of the way ahead on average lies between now and a byte's arrival.
        let moving_s = (expected_s - forecast.lookup_s) * self.bandwidth.deviation(now, expected_s / 2.0);
        let waiting_s = self.latency.deviation_s();
        let share = (moving_s * moving_s + waiting_s * waiting_s).sqrt() / expected_s.max(1e-9);
        forecast.deviation = share.max(DEVIATION_MIN);
        forecast.raw_s = expected_s;
        let [p50_s, p90_s, p99_s] = self
            .quantiles
            .map(|quantile| expected_s * (quantile.value() * forecast.deviation).clamp(-5.0, 5.0).exp());
        forecast.p50_s = p50_s;
        forecast.p90_s = p90_s.max(p50_s);
        forecast.p99_s = p99_s.max(forecast.p90_s);
        forecast
    }

    pub(super) fn report(&self, now: Time) -> BackendReport {
        BackendReport {
            measured: self.bandwidth.is_measured(),
            bytes_per_s: self.bandwidth.bytes_per_s(),
            bandwidth_deviation: self.bandwidth.deviation(now, 0.0),
            lookup_s: self.latency.mean_s(),
            lookup_p95_s: self.latency.p95_s(),
            failure_probability: self.failures.probability(),
            failure_known_after_s: self.failures.known_after_s(),
            inflight_bytes: self.inflight_bytes,
            inflight_fetches: self.inflight_fetches,
        }
    }

    /// Learns how far `forecast` was off.
    pub(super) fn calibrate(&mut self, forecast: &Forecast, actual_s: f64) {
        if forecast.raw_s > 0.0 && actual_s > 0.0 {
            let off = (actual_s / forecast.raw_s).ln() / forecast.deviation;
            self.quantiles.iter_mut().for_each(|quantile| quantile.observe(off));
        }
    }

    /// A block of `bytes` was stored as `stored_bytes`, and took `decompress_s` to decompress.
    pub(super) fn stored(&mut self, bytes: u64, stored_bytes: u64, decompress_s: f64) {
        if bytes == 0 || !decompress_s.is_finite() || decompress_s < 0.0 {
            return;
        }
        let profile = &mut self.profile;
        let learned = |before: f64, seen: f64| before + STORED_WEIGHT * (seen - before);
        let ratio = (stored_bytes as f64 / bytes as f64).clamp(1e-3, 2.0);
        profile.stored_ratio = learned(profile.stored_ratio, ratio);
        profile.decompress_bytes_per_s =
            1.0 / learned(1.0 / profile.decompress_bytes_per_s, decompress_s / bytes as f64);
    }

    /// `stored_bytes` arrived over `took_s`; of those in flight they were `expected_bytes`.
    pub(super) fn progress(&mut self, now: Time, expected_bytes: u64, stored_bytes: u64, took_s: f64) {
        self.inflight_bytes = self.inflight_bytes.saturating_sub(expected_bytes);
        self.progress_at = self.progress_at.max(now);
        if stored_bytes > 0 && took_s > 0.0 && took_s.is_finite() {
            self.progress_bytes = stored_bytes;
            self.bandwidth.observe(now, stored_bytes, took_s);
        }
    }
}
