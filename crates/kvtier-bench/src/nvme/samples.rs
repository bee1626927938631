use std::time::Duration;

use super::row::Transfer;
use crate::ranks::{median, percentile, rounded};

/// What one side did in one round.
pub(super) struct Side {
    pub(super) times: Vec<Duration>,
    pub(super) elapsed: Duration,
    pub(super) bytes: u64,
    pub(super) cpu: Duration,
}

/// All rounds of one shape.
#[derive(Default)]
pub(super) struct Samples {
    rounds: Vec<Round>,
    times_us: Vec<f64>,
}

struct Round {
    gbps: f64,
    raw_gbps: f64,
    p50_us: f64,
    raw_p50_us: f64,
    cpu: f64,
    raw_cpu: f64,
    check: f64,
}

impl Side {
    fn gbps(&self) -> f64 {
        self.bytes as f64 / self.elapsed.as_secs_f64() / 1e9
    }

    fn times_us(&self) -> Vec<f64> {
        self.times.iter().map(|time| time.as_secs_f64() * 1e6).collect()
    }

    fn cpu_s_per_gb(&self) -> f64 {
        self.cpu.as_secs_f64() / (self.bytes as f64 / 1e9)
    }
}

impl Samples {
    /// Adds a round: the tier, the raw ring, and what the check of 10^9 bytes cost.
    pub(super) fn add(&mut self, ours: &Side, raw: &Side, check_cpu_s_per_gb: f64) {
        self.rounds.push(Round {
            gbps: ours.gbps(),
            raw_gbps: raw.gbps(),
            p50_us: median(ours.times_us()),
            raw_p50_us: median(raw.times_us()),
            cpu: ours.cpu_s_per_gb(),
            raw_cpu: raw.cpu_s_per_gb(),
            check: check_cpu_s_per_gb,
        });
        self.times_us.extend(ours.times_us());
    }

    /// Medians over the rounds, in a row that already says what was measured.
    pub(super) fn fill(self, row: Transfer) -> Transfer {
        let over = |value: fn(&Round) -> f64| rounded(median(self.rounds.iter().map(value).collect()));
        Transfer {
            gbps: over(|round| round.gbps),
            raw_gbps: over(|round| round.raw_gbps),
            ratio_to_raw: over(|round| round.gbps / round.raw_gbps),
            p50_us: over(|round| round.p50_us),
            raw_p50_us: over(|round| round.raw_p50_us),
            p99_us: rounded(percentile(self.times_us.clone(), 0.99)),
            cpu_s_per_gb: over(|round| round.cpu),
            raw_cpu_s_per_gb: over(|round| round.raw_cpu),
            check_cpu_s_per_gb: over(|round| round.check),
            rounds: u32::try_from(self.rounds.len()).unwrap_or(u32::MAX),
            ..row
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_holds_medians_of_rounds_and_ratios_within_rounds() {
        let side = |milliseconds: u64| Side {
            times: vec![Duration::from_millis(milliseconds)],
            elapsed: Duration::from_millis(milliseconds),
            bytes: 1_000_000,
            cpu: Duration::from_micros(milliseconds),
        };
        let mut samples = Samples::default();
        // The machine is three times slower in the second round: the ratio must not see it.
        for (ours, raw) in [(2, 1), (6, 3), (2, 1)] {
            samples.add(&side(ours), &side(raw), 0.05);
        }
        let row = samples.fill(Transfer::default());
        assert_eq!((row.gbps, row.raw_gbps, row.ratio_to_raw), (0.5, 1.0, 0.5));
        assert_eq!((row.p50_us, row.raw_p50_us, row.p99_us), (2000.0, 1000.0, 6000.0));
        assert_eq!((row.cpu_s_per_gb, row.check_cpu_s_per_gb, row.rounds), (0.002, 0.05, 3));
    }
}
