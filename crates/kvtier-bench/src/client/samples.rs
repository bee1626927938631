use std::time::Duration;

use crate::Row;
use crate::ranks::{median, percentile, rounded};

/// What one round of one case gave.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Round {
    pub(super) p50_us: f64,
    pub(super) gbps: f64,
    pub(super) cpu_s_per_gb: f64,
    pub(super) cpu_us: f64,
    pub(super) ratio: Option<f64>,
    pub(super) echo_p50_us: Option<f64>,
}

/// The calls of one round, and the CPU time that went into them.
pub(super) struct Calls {
    pub(super) times: Vec<Duration>,
    pub(super) bytes_per_call: u64,
    pub(super) cpu: Option<Duration>,
}

/// All rounds of one case.
#[derive(Debug, Default)]
pub(super) struct Samples {
    times_us: Vec<f64>,
    rounds: Vec<Round>,
}

impl Samples {
    /// Adds a round, beside the baselines of the same round.
    pub(super) fn add(&mut self, calls: &Calls, memcpy: Option<Round>, echo: Option<Round>) -> Round {
        if calls.times.is_empty() {
            return Round::default();
        }
        let times: Vec<f64> = calls.times.iter().map(|time| time.as_secs_f64() * 1e6).collect();
        let total: f64 = times.iter().sum();
        let bytes = calls.bytes_per_call as f64 * times.len() as f64;
        let gbps = bytes / total / 1e3;
        let cpu = calls.cpu.map_or(f64::NAN, |cpu| cpu.as_secs_f64());
        let p50_us = median(times.clone());
        let round = Round {
            p50_us,
            gbps,
            cpu_s_per_gb: cpu / (bytes / 1e9),
            cpu_us: cpu * 1e6 / times.len() as f64,
            // Times, not rates: a core that slept through a wake-up now and then is in `gbps` and in `p99_us`.
            ratio: memcpy.map(|memcpy| memcpy.p50_us / p50_us),
            echo_p50_us: echo.map(|echo| echo.p50_us),
        };
        self.times_us.extend(times);
        self.rounds.push(round);
        round
    }

    /// Medians over the rounds, in a row that already says what was measured. Rates only when bytes moved.
    pub(super) fn fill(&self, row: Row, moves_bytes: bool) -> Row {
        let over = |value: &dyn Fn(&Round) -> Option<f64>| {
            let values: Vec<f64> = self
                .rounds
                .iter()
                .filter_map(value)
                .filter(|value| value.is_finite())
                .collect();
            (!values.is_empty()).then(|| rounded(median(values)))
        };
        Row {
            gbps: over(&|round| moves_bytes.then_some(round.gbps)),
            ratio_to_memcpy: over(&|round| round.ratio),
            p50_us: over(&|round| Some(round.p50_us)),
            p99_us: (!self.times_us.is_empty()).then(|| rounded(percentile(self.times_us.clone(), 0.99))),
            cpu_s_per_gb: over(&|round| moves_bytes.then_some(round.cpu_s_per_gb)),
            echo_p50_us: over(&|round| round.echo_p50_us),
            cpu_us: over(&|round| Some(round.cpu_us)),
            rounds: u32::try_from(self.rounds.len()).unwrap_or(u32::MAX),
            ..row
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(micros: &[u64]) -> Calls {
        Calls {
            times: micros.iter().map(|&time| Duration::from_micros(time)).collect(),
            bytes_per_call: 1000,
            cpu: Some(Duration::from_micros(10)),
        }
    }

    #[test]
    fn a_row_holds_medians_of_rounds_and_ratios_within_rounds() {
        let mut memcpy = Samples::default();
        let mut case = Samples::default();
        // The machine is three times slower in the second round: the ratio must not see it.
        for (baseline, measured) in [([1, 1], [2, 2]), ([3, 3], [6, 6]), ([1, 1], [2, 2])] {
            let beside = memcpy.add(&calls(&baseline), None, None);
            case.add(&calls(&measured), Some(beside), None);
        }
        let row = case.fill(Row::default(), true);
        assert_eq!(
            (row.p50_us, row.p99_us, row.ratio_to_memcpy, row.rounds),
            (Some(2.0), Some(6.0), Some(0.5), 3)
        );
        assert_eq!(row.gbps, Some(0.5));
        assert_eq!(case.fill(Row::default(), false).gbps, None);
    }

    #[test]
    fn a_case_without_rounds_has_no_figures() {
        let row = Samples::default().fill(Row::default(), true);
        assert_eq!((row.gbps, row.p50_us, row.p99_us), (None, None, None));
    }
}
