use serde::Serialize;

use super::flight::Outcome;
use crate::cost::is_harm;
use crate::random::Random;

/// Blocks of sessions that are drawn from at most: neighbours in time stay together.
const BLOCKS_MAX: usize = 200;

/// A figure and where it lies with 95 % probability, as far as the sessions of the trace show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Estimate {
    /// Of the whole trace.
    pub value: f64,
    /// 2.5 % of the resamples are below.
    pub low: f64,
    /// 2.5 % of the resamples are above.
    pub high: f64,
}

/// Two lives of the same requests, compared request by request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Comparison {
    /// Share of the GPU seconds of prefills that is saved.
    pub prefill_saving: Estimate,
    /// Share of the seconds to first tokens that is saved.
    pub ttft_saving: Estimate,
    /// Median time to the first token over that of the other life.
    pub ttft_p50_ratio: Estimate,
    /// The same of the 95th percentile.
    pub ttft_p95_ratio: Estimate,
    /// The same of the 99th percentile.
    pub ttft_p99_ratio: Estimate,
    /// Share of the requests that took longer than 1.05 times and 2 ms more.
    pub harmed: Estimate,
    /// Blocks of sessions that were drawn from.
    pub blocks: usize,
}

/// The block of each request: sessions one after another, in at most 200 blocks of as many sessions each.
pub(super) fn blocks(sessions: &[u32]) -> (Vec<u32>, usize) {
    let count = sessions.iter().max().map_or(0, |last| *last as usize + 1);
    let each = count.div_ceil(BLOCKS_MAX).max(1);
    let of = sessions.iter().map(|session| session / each as u32).collect();
    (of, count.div_ceil(each))
}

/// The value at `share` of sorted values.
pub(super) fn quantile(sorted: &[f64], share: f64) -> f64 {
    match sorted.len() {
        0 => 0.0,
        length => sorted[((length as f64 * share).ceil() as usize).clamp(1, length) - 1],
    }
}

pub(super) fn sorted_ttft(outcomes: &[Outcome]) -> Vec<f64> {
    let mut sorted: Vec<f64> = outcomes.iter().map(|outcome| outcome.ttft_s).collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// What one block adds up to.
#[derive(Clone, Copy, Default)]
struct Sums {
    requests: u64,
    prefill_s: [f64; 2],
    ttft_s: [f64; 2],
    harmed: u64,
}

impl Sums {
    fn add(&mut self, other: &Sums, times: u32) {
        self.requests += other.requests * u64::from(times);
        self.harmed += other.harmed * u64::from(times);
        for side in 0..2 {
            self.prefill_s[side] += other.prefill_s[side] * f64::from(times);
            self.ttft_s[side] += other.ttft_s[side] * f64::from(times);
        }
    }
}

/// Times to the first token in order, each with its block.
struct Ranked(Vec<(f64, u32)>);

impl Ranked {
    fn new(outcomes: &[Outcome], block_of: &[u32]) -> Ranked {
        let mut ranked: Vec<(f64, u32)> = outcomes
            .iter()
            .zip(block_of)
            .map(|(outcome, block)| (outcome.ttft_s, *block))
            .collect();
        ranked.sort_by(|left, right| left.0.total_cmp(&right.0));
        Ranked(ranked)
    }

    /// The values at `shares`, ascending, where each block counts so many times.
    fn quantiles<const N: usize>(&self, times: &[u32], requests: u64, shares: [f64; N]) -> [f64; N] {
        let mut values = [0.0; N];
        let (mut passed, mut next) = (0, 0);
        for (ttft_s, block) in &self.0 {
            passed += u64::from(times[*block as usize]);
            while next < N && passed as f64 >= (requests as f64 * shares[next]).ceil().max(1.0) {
                values[next] = *ttft_s;
                next += 1;
            }
            if next == N {
                break;
            }
        }
        values
    }
}

/// Figures of one resample, in the order of [`Comparison`].
fn figures(sums: &Sums, ranked: &[Ranked; 2], times: &[u32]) -> [f64; 6] {
    let share = |pair: [f64; 2]| if pair[0] > 0.0 { 1.0 - pair[1] / pair[0] } else { 0.0 };
    let shares = [0.5, 0.95, 0.99];
    let before = ranked[0].quantiles(times, sums.requests, shares);
    let after = ranked[1].quantiles(times, sums.requests, shares);
    let ratio = |index: usize| {
        if before[index] > 0.0 {
            after[index] / before[index]
        } else {
            1.0
        }
    };
    [
        share(sums.prefill_s),
        share(sums.ttft_s),
        ratio(0),
        ratio(1),
        ratio(2),
        sums.harmed as f64 / (sums.requests as f64).max(1.0),
    ]
}

/// Compares two lives by resampling blocks of sessions, with replacement.
pub(super) fn compare(
    before: &[Outcome],
    after: &[Outcome],
    (block_of, blocks): (&[u32], usize),
    resamples: usize,
    seed: u64,
) -> Comparison {
    let mut sums = vec![Sums::default(); blocks];
    for ((before, after), block) in before.iter().zip(after).zip(block_of) {
        sums[*block as usize].add(
            &Sums {
                requests: 1,
                prefill_s: [before.prefill_s, after.prefill_s],
                ttft_s: [before.ttft_s, after.ttft_s],
                harmed: u64::from(is_harm(after.ttft_s, before.ttft_s)),
            },
            1,
        );
    }
    let ranked = [Ranked::new(before, block_of), Ranked::new(after, block_of)];
    let of = |times: &[u32]| {
        let mut total = Sums::default();
        sums.iter().zip(times).for_each(|(sum, times)| total.add(sum, *times));
        figures(&total, &ranked, times)
    };
    let whole = of(&vec![1; blocks]);
    let mut random = Random::new(seed);
    let mut drawn: [Vec<f64>; 6] = std::array::from_fn(|_| Vec::with_capacity(resamples));
    let mut times = vec![0; blocks];
    for _ in 0..resamples {
        times.fill(0);
        (0..blocks).for_each(|_| times[random.index(blocks)] += 1);
        for (values, value) in drawn.iter_mut().zip(of(&times)) {
            values.push(value);
        }
    }
    let estimates: [Estimate; 6] = std::array::from_fn(|index| {
        drawn[index].sort_by(f64::total_cmp);
        let value = whole[index];
        let bound = |share| {
            if drawn[index].is_empty() {
                value
            } else {
                quantile(&drawn[index], share)
            }
        };
        Estimate {
            value,
            low: bound(0.025),
            high: bound(0.975),
        }
    });
    let [
        prefill_saving,
        ttft_saving,
        ttft_p50_ratio,
        ttft_p95_ratio,
        ttft_p99_ratio,
        harmed,
    ] = estimates;
    Comparison {
        prefill_saving,
        ttft_saving,
        ttft_p50_ratio,
        ttft_p95_ratio,
        ttft_p99_ratio,
        harmed,
        blocks,
    }
}

#[cfg(test)]
mod tests {
    use super::{blocks, compare, quantile};
    use crate::gate::flight::{Kind, Outcome};

    fn outcome(ttft_s: f64) -> Outcome {
        Outcome {
            ttft_s,
            prefill_s: ttft_s,
            ..Outcome::of(Kind::Computed)
        }
    }

    #[test]
    fn sessions_that_began_one_after_another_share_a_block() {
        assert_eq!(blocks(&[0, 1, 0, 2]), (vec![0, 1, 0, 2], 3));
        let sessions: Vec<u32> = (0..1_000).collect();
        let (of, count) = blocks(&sessions);
        assert_eq!((of[0], of[4], of[5], of[999], count), (0, 0, 1, 199, 200));
        assert_eq!(blocks(&[]), (vec![], 0));
    }

    #[test]
    fn a_quantile_is_the_smallest_value_that_has_so_many_at_or_below_it() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(
            [0.5, 0.95, 0.99, 1.0].map(|share| quantile(&values, share)),
            [50.0, 95.0, 99.0, 100.0]
        );
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn what_every_session_saves_alike_is_certain() {
        let before: Vec<Outcome> = (0..400).map(|number| outcome(1.0 + f64::from(number % 7))).collect();
        let after: Vec<Outcome> = before.iter().map(|before| outcome(before.ttft_s * 0.75)).collect();
        let block_of: Vec<u32> = (0..400).map(|number| number / 8).collect();
        let compared = compare(&before, &after, (&block_of, 50), 200, 1);
        for saving in [compared.prefill_saving, compared.ttft_saving] {
            assert!((saving.value - 0.25).abs() < 1e-12);
            assert!(
                (saving.low - 0.25).abs() < 1e-12 && (saving.high - 0.25).abs() < 1e-12,
                "{saving:?}"
            );
        }
        assert_eq!(compared.harmed.high, 0.0);
        assert!((compared.ttft_p99_ratio.value - 0.75).abs() < 1e-12);
    }

    #[test]
    fn what_one_session_in_ten_saves_is_less_certain_and_lies_within_its_bounds() {
        let before: Vec<Outcome> = (0..400).map(|_| outcome(1.0)).collect();
        let block_of: Vec<u32> = (0..400).map(|number| number / 8).collect();
        let after: Vec<Outcome> = block_of
            .iter()
            .map(|block| outcome(if block % 10 == 0 { 0.5 } else { 1.0 }))
            .collect();
        let compared = compare(&before, &after, (&block_of, 50), 2_000, 1);
        let saving = compared.ttft_saving;
        assert!((saving.value - 0.05).abs() < 1e-12);
        // Five of fifty blocks: a binomial of mean 5 and deviation 2.1, times a hundredth.
        assert!(
            (0.008..=0.022).contains(&saving.low) && (0.085..=0.105).contains(&saving.high),
            "{saving:?}"
        );
        assert_eq!(compare(&before, &after, (&block_of, 50), 2_000, 1), compared);
    }

    #[test]
    fn who_takes_a_fifth_longer_is_harmed() {
        let before: Vec<Outcome> = (0..100).map(|_| outcome(1.0)).collect();
        let after: Vec<Outcome> = (0..100)
            .map(|number| outcome(if number < 3 { 1.2 } else { 1.04 }))
            .collect();
        let block_of: Vec<u32> = (0..100).collect();
        let compared = compare(&before, &after, (&block_of, 100), 500, 1);
        assert!((compared.harmed.value - 0.03).abs() < 1e-12);
        assert!(compared.harmed.low < 0.03 && compared.harmed.high > 0.03);
        assert!((compared.ttft_p99_ratio.value - 1.2).abs() < 1e-12);
    }
}
