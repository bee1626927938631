use std::collections::BTreeSet;

use kvtier_core::cost::RecomputeCoefficients;

use crate::TraceRequest;
use crate::trace::TOKENS_PER_ID;

/// Requests with less in common with those before are left out where GPUs are idle.
const MATCHED_TOKENS_MIN: u32 = 1_024;

/// What the GPU really takes.
pub(super) const GPU: RecomputeCoefficients = RecomputeCoefficients {
    overhead_s: 12e-3,
    s_per_token: 70e-6,
    s_per_pair: 1.3e-9,
};

/// Keys and values of one token, bytes.
pub(super) const KV_BYTES_PER_TOKEN: u64 = 327_680;

/// Worlds end here, seconds.
pub(super) const END_S: f64 = 3_600.0;

/// One request of the trace, as far as a link is concerned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    pub(super) at_s: f64,
    pub(super) prompt_tokens: u32,
    pub(super) matched_tokens: u32,
}

impl Arrival {
    /// What is computed after the matched tokens, in any case.
    pub(super) fn rest_s(&self) -> f64 {
        // An answer needs at least the last token computed.
        let rest = self.prompt_tokens.saturating_sub(self.matched_tokens).max(1);
        GPU.seconds(rest, self.prompt_tokens.saturating_sub(rest))
    }

    pub(super) fn is_worth_a_thought(&self) -> bool {
        self.matched_tokens >= MATCHED_TOKENS_MIN
    }
}

/// Every request with what an unbounded cache would have of it.
pub(super) fn arrivals(requests: &[TraceRequest]) -> Vec<Arrival> {
    let mut seen = BTreeSet::new();
    let mut arrivals = Vec::new();
    for request in requests {
        let at_s = request.timestamp_ms as f64 * 1e-3;
        if at_s >= END_S {
            continue;
        }
        let blocks = request.hash_ids.iter().take_while(|id| seen.contains(*id)).count() as u64;
        seen.extend(request.hash_ids.iter().copied());
        let prompt = request.input_tokens.min(u64::from(u32::MAX));
        arrivals.push(Arrival {
            at_s,
            prompt_tokens: prompt as u32,
            matched_tokens: (blocks * u64::from(TOKENS_PER_ID)).min(prompt) as u32,
        });
    }
    arrivals
}
