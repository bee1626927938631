use std::fmt;

use super::{BackendId, Forecast, GateReason, Question};

/// What to do about the blocks that a backend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FetchPlan {
    /// Compute them: the backend is not asked.
    Recompute,
    /// Fetch all of them, then compute what follows.
    Fetch,
    /// Compute the first tokens while the others are fetched from the back. The engine goes on computing until both meet.
    Split {
        /// Tokens to compute, beyond what the engine has; a multiple of a block.
        compute_front_tokens: u32,
    },
}

/// The five terms of a fetch, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FetchTerms {
    /// Until the backend answers.
    pub lookup_s: f64,
    /// Behind what is in flight.
    pub queue_s: f64,
    /// The bytes.
    pub transfer_s: f64,
    /// Decompression that the transfer does not hide.
    pub decompression_s: f64,
    /// What failing costs, times its probability.
    pub risk_s: f64,
}

impl FetchTerms {
    /// The five together.
    #[must_use]
    pub fn total_s(&self) -> f64 {
        self.lookup_s + self.queue_s + self.transfer_s + self.decompression_s + self.risk_s
    }
}

/// Why a plan was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Fetching is expected to be faster.
    FetchIsFaster,
    /// Fetching is expected to be slower for this request, by less than it spares those who wait for a GPU.
    FetchSparesOthers,
    /// Computing a part while the rest is fetched is expected to be fastest.
    SplitIsFastest,
    /// Recomputing is expected to be as fast, or the gain is not worth the risk.
    RecomputeIsFaster,
    /// Fetching is expected to take longer than a fetch from there may: it would be cut short.
    FetchIsTooSlow,
    /// The backend's gate is closed.
    GateClosed(GateReason),
    /// No backend has anything beyond what the engine has.
    NothingMatched,
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::FetchIsFaster => formatter.write_str("fetching is expected to be faster"),
            Reason::FetchSparesOthers => formatter
                .write_str("fetching is expected to be slower, by less than it spares those who wait for a GPU"),
            Reason::SplitIsFastest => {
                formatter.write_str("computing a part while the rest is fetched is expected to be fastest")
            }
            Reason::RecomputeIsFaster => formatter.write_str("recomputing is expected to be faster"),
            Reason::FetchIsTooSlow => formatter.write_str("fetching is expected to take longer than a fetch may"),
            Reason::GateClosed(reason) => write!(formatter, "the backend is not asked: {reason}"),
            Reason::NothingMatched => formatter.write_str("nothing is cached beyond what the engine has"),
        }
    }
}

/// A plan with everything that led to it.
///
/// `recompute_s` and `expected_s` cover the matched tokens alone: what follows them is computed whatever is decided.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// What to do.
    pub plan: FetchPlan,
    /// Why.
    pub reason: Reason,
    /// From where; the backend that was weighed also where the plan is to recompute.
    pub backend: Option<BackendId>,
    /// Tokens that the backend offers beyond what the engine has.
    pub matched_tokens: u32,
    /// Tokens to fetch.
    pub fetch_tokens: u32,
    /// Bytes of keys and values to fetch.
    pub fetch_bytes: u64,
    /// The request's wait for a GPU, seconds: a fetch hides behind it.
    pub queue_wait_s: f64,
    /// Recomputing the matched tokens, with that wait, seconds.
    pub recompute_s: f64,
    /// The plan, with that wait, seconds.
    pub expected_s: f64,
    /// What a fetch spares those who wait for a GPU, as far as it counted, seconds. Zero where nobody waits.
    pub relief_s: f64,
    /// A fetch of all matched tokens (of a split: of its part), term by term.
    pub terms: FetchTerms,
    /// Quantiles of the same fetch.
    pub forecast: Forecast,
    /// Probability that it fails.
    pub failure_probability: f64,
    /// After this a fetch that has not ended is to be judged again, seconds after its start.
    pub soft_deadline_s: f64,
}

impl Decision {
    /// The decision where no backend has anything.
    pub(super) fn nothing(question: &Question) -> Decision {
        let wait_s = question.wait_s();
        Decision {
            plan: FetchPlan::Recompute,
            reason: Reason::NothingMatched,
            backend: None,
            matched_tokens: 0,
            fetch_tokens: 0,
            fetch_bytes: 0,
            queue_wait_s: wait_s,
            recompute_s: wait_s,
            expected_s: wait_s,
            relief_s: 0.0,
            terms: FetchTerms::default(),
            forecast: Forecast::default(),
            failure_probability: 0.0,
            soft_deadline_s: 0.0,
        }
    }

    /// What the plan is expected to save, for this request and for others, seconds.
    #[must_use]
    pub fn saved_s(&self) -> f64 {
        self.recompute_s - self.expected_s + self.relief_s
    }

    /// Whether a failure would cost nothing: the engine computes meanwhile, or knows of it before a GPU is free.
    #[must_use]
    pub fn is_harmless(&self) -> bool {
        match self.plan {
            FetchPlan::Recompute | FetchPlan::Split { .. } => true,
            FetchPlan::Fetch => self.soft_deadline_s <= self.queue_wait_s,
        }
    }

    /// The plan is not carried out, for this reason.
    pub(super) fn recompute_instead(&mut self, reason: Reason) {
        self.plan = FetchPlan::Recompute;
        self.reason = reason;
        self.fetch_tokens = 0;
        self.fetch_bytes = 0;
        self.expected_s = self.recompute_s;
        self.relief_s = 0.0;
    }
}

impl fmt::Display for FetchPlan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FetchPlan::Recompute => formatter.write_str("recompute"),
            FetchPlan::Fetch => formatter.write_str("fetch"),
            FetchPlan::Split { compute_front_tokens } => {
                write!(formatter, "compute {compute_front_tokens} tokens, fetch the rest")
            }
        }
    }
}

/// A line for the plan and one for each term, in milliseconds.
impl fmt::Display for Decision {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "{}: {}", self.plan, self.reason)?;
        for (name, seconds) in [
            ("recompute, with the wait for a GPU", self.recompute_s),
            ("wait for a GPU", self.queue_wait_s),
            ("lookup", self.terms.lookup_s),
            ("queue", self.terms.queue_s),
            ("transfer", self.terms.transfer_s),
            ("decompression", self.terms.decompression_s),
            ("risk", self.terms.risk_s),
            ("expected", self.expected_s),
            ("relief of others", self.relief_s),
        ] {
            writeln!(formatter, "{name:<36}{:>12.3} ms", seconds * 1e3)?;
        }
        Ok(())
    }
}
