use std::collections::BTreeMap;

/// A request was harmed when it took longer than this share of recomputing, and this much more, seconds.
const HARM: (f64, f64) = (1.05, 2e-3);

/// What one plan came to in one world with one seed.
#[derive(Clone, Debug, Default)]
pub(super) struct LifeReport {
    pub(super) requests: u64,
    /// Of the matched part; where GPUs are queued for, of the whole prompt.
    pub(super) seconds: f64,
    pub(super) ttft_s: f64,
    pub(super) harmed: u64,
    /// Fetches and splits.
    pub(super) fetches: u64,
    pub(super) failed: u64,
    pub(super) flips: u64,
    pub(super) probe_bytes: u64,
    pub(super) capacity_bytes: f64,
    /// Unfailed fetches, and how many of them took at most their forecast's quantiles.
    pub(super) forecasts: u64,
    pub(super) within: [u64; 3],
    /// Time of each request, seconds, by its place in the trace; only where GPUs are queued for.
    pub(super) times_s: BTreeMap<u64, f64>,
    /// From the step to the last wrong decision after it, seconds.
    pub(super) settle_s: Option<f64>,
}

/// Whether a request that recomputing had answered in `recompute_s` was harmed by taking `took_s`.
pub(crate) fn is_harm(took_s: f64, recompute_s: f64) -> bool {
    took_s > HARM.0 * recompute_s + HARM.1
}

impl LifeReport {
    /// Counts who took longer than in `recomputing`, the life in which nobody fetched: where GPUs are queued for, what one
    /// request takes depends on what the others did.
    pub(super) fn compare(&mut self, recomputing: &LifeReport) {
        let harmed = self.times_s.iter().filter(|(name, took_s)| {
            recomputing
                .times_s
                .get(*name)
                .is_some_and(|recompute_s| is_harm(**took_s, *recompute_s))
        });
        self.harmed += harmed.count() as u64;
    }
}
