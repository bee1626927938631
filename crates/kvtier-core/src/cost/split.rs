use super::RecomputeCoefficients;

#[cfg(test)]
mod tests;

/// What a split of a matched prefix is weighed by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SplitTerms {
    /// What computing takes.
    pub recompute: RecomputeCoefficients,
    /// Tokens that the engine has already.
    pub local_tokens: u32,
    /// Tokens that can be had, beyond those.
    pub matched_tokens: u32,
    /// Tokens of a block: the split lies between two.
    pub block_tokens: u32,
    /// Before the GPU begins, seconds.
    pub queue_wait_s: f64,
    /// Before the first byte arrives, seconds: lookup and what is in flight.
    pub fetch_start_s: f64,
    /// For each token fetched, seconds.
    pub fetch_s_per_token: f64,
}

impl SplitTerms {
    /// Seconds until both have met when the engine computes `front_tokens` and the rest is fetched from the back.
    #[must_use]
    pub fn seconds(&self, front_tokens: u32) -> f64 {
        let front = front_tokens.min(self.matched_tokens);
        let compute_s = self.queue_wait_s + self.recompute.seconds(front, self.local_tokens);
        if front == self.matched_tokens {
            return compute_s;
        }
        let fetch_s = self.fetch_start_s + self.fetch_s_per_token * f64::from(self.matched_tokens - front);
        if front == 0 {
            fetch_s.max(self.queue_wait_s)
        } else {
            compute_s.max(fetch_s)
        }
    }
}

/// How many of the matched tokens to compute at the front while the rest is fetched: where both end together, at a block's end.
/// 0 is a fetch of everything, `matched_tokens` a recomputation (Cake: "Compute or Load KV Cache? Why Not Both?", ICML '25).
#[must_use]
pub fn best_front_tokens(terms: &SplitTerms) -> u32 {
    let RecomputeCoefficients {
        overhead_s,
        s_per_token,
        s_per_pair,
    } = terms.recompute;
    let slope = s_per_token + s_per_pair * f64::from(terms.local_tokens) + terms.fetch_s_per_token;
    let ahead_s = terms.fetch_start_s + f64::from(terms.matched_tokens) * terms.fetch_s_per_token
        - overhead_s
        - terms.queue_wait_s;
    // The root of b/2·s² + slope·s = ahead, in the form that has no cancellation and holds for b = 0.
    let even = if ahead_s <= 0.0 {
        0.0
    } else {
        2.0 * ahead_s / (slope + (slope * slope + 2.0 * s_per_pair * ahead_s).sqrt())
    };
    let block = terms.block_tokens.max(1);
    let last = terms.matched_tokens;
    // A not-a-number becomes 0 here, and is then weighed like any other.
    let below = ((even / f64::from(block)) as u32).saturating_mul(block).min(last);
    let candidates = [0, below, below.saturating_add(block).min(last), last];
    candidates
        .into_iter()
        .min_by(|left, right| terms.seconds(*left).total_cmp(&terms.seconds(*right)))
        .unwrap_or(last)
}
