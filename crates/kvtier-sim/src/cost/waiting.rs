use kvtier_core::cost::FetchPlan;

use super::requests::{Arrival, GPU};

/// A request between its arrival and its first token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) arrival: Arrival,
    pub(super) plan: FetchPlan,
    /// When the bytes arrive, where they do.
    pub(super) arrives_at_s: Option<f64>,
    /// It waits for bytes.
    pub(super) fetching: bool,
    /// Computing all of it, seconds.
    pub(super) whole_s: f64,
}

impl Waiting {
    /// When its first token is there, where a GPU has it from `start_s` on and its bytes, if it waited for any, are there.
    pub(super) fn computes_until_s(&self, start_s: f64) -> f64 {
        let matched_s = GPU.seconds(self.arrival.matched_tokens, 0);
        let rest_s = self.arrival.rest_s();
        match (self.plan, self.arrives_at_s) {
            (FetchPlan::Fetch, _) => start_s + rest_s,
            // The engine goes on computing from the front until the rest is there.
            (FetchPlan::Split { compute_front_tokens }, Some(arrives_at_s)) => {
                let met_at_s = (start_s + GPU.seconds(compute_front_tokens, 0)).max(arrives_at_s);
                met_at_s.min(start_s + matched_s) + rest_s
            }
            (FetchPlan::Recompute | FetchPlan::Split { .. }, _) => start_s + self.whole_s,
        }
    }
}
