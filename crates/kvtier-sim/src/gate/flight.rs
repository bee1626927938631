use kvtier_core::LeaseId;
use kvtier_core::cost::{FetchPlan, RecomputeCoefficients};
use serde::Serialize;

/// What was done for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Nothing of it was cached: all was computed.
    Computed,
    /// Found in host memory.
    Host,
    /// A part was found on NVMe.
    Nvme,
    /// A part was fetched from a remote.
    Fetched,
    /// A part was computed while another was fetched from a remote.
    Split,
    /// A remote had a part, and it was computed all the same.
    Declined,
    /// A fetch failed or was given up, and its part was computed.
    Failed,
}

impl Kind {
    /// All of them, in the order of a report.
    pub const ALL: [Kind; 7] = [
        Kind::Host,
        Kind::Nvme,
        Kind::Fetched,
        Kind::Split,
        Kind::Declined,
        Kind::Failed,
        Kind::Computed,
    ];

    /// In words.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Kind::Computed => "nothing cached: computed",
            Kind::Host => "from host memory",
            Kind::Nvme => "from NVMe",
            Kind::Fetched => "fetched from a remote",
            Kind::Split => "fetched and computed at once",
            Kind::Declined => "cached remotely, but computing is faster",
            Kind::Failed => "fetch failed or given up: computed",
        }
    }
}

/// What came of one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Outcome {
    /// From its arrival to its first token, seconds.
    pub(super) ttft_s: f64,
    /// While it had a GPU, seconds.
    pub(super) prefill_s: f64,
    pub(super) host_tokens: u32,
    pub(super) nvme_tokens: u32,
    /// Tokens that came from a remote.
    pub(super) remote_tokens: u32,
    /// Which remote, by its place in the hardware.
    pub(super) remote: Option<usize>,
    pub(super) kind: Kind,
}

impl Outcome {
    pub(super) fn of(kind: Kind) -> Outcome {
        Outcome {
            ttft_s: 0.0,
            prefill_s: 0.0,
            host_tokens: 0,
            nvme_tokens: 0,
            remote_tokens: 0,
            remote: None,
            kind,
        }
    }
}

/// A request between its arrival and its first token.
#[derive(Clone, Debug)]
pub(super) struct Flight {
    /// What it was told of the queue for a GPU when it arrived, seconds.
    pub(super) wait_s: f64,
    /// The node's own tiers have answered.
    pub(super) answered: bool,
    /// Blocks are on their way to the GPU.
    pub(super) loading: bool,
    pub(super) leases: Vec<LeaseId>,
    pub(super) local_blocks: usize,
    pub(super) host_tokens: u32,
    pub(super) nvme_tokens: u32,
    /// It waits for a remote's answer that it has nothing.
    pub(super) asks_in_vain: bool,
    /// It waits for a remote's bytes.
    pub(super) fetching: bool,
    /// A remote had more, and was not taken up on it.
    pub(super) declined: bool,
    pub(super) failed: bool,
    pub(super) plan: FetchPlan,
    pub(super) remote: Option<usize>,
    /// Tokens from the first that are cached where the remote's are there.
    pub(super) remote_tokens: u32,
    /// When the remote's bytes are there, where they come, seconds.
    pub(super) arrives_at_s: Option<f64>,
    pub(super) started: bool,
    pub(super) prefill_s: f64,
}

impl Flight {
    pub(super) fn new(wait_s: f64) -> Flight {
        Flight {
            wait_s,
            answered: false,
            loading: false,
            leases: Vec::new(),
            local_blocks: 0,
            host_tokens: 0,
            nvme_tokens: 0,
            asks_in_vain: false,
            fetching: false,
            declined: false,
            failed: false,
            plan: FetchPlan::Recompute,
            remote: None,
            remote_tokens: 0,
            arrives_at_s: None,
            started: false,
            prefill_s: 0.0,
        }
    }

    pub(super) fn local_tokens(&self) -> u32 {
        self.host_tokens + self.nvme_tokens
    }

    /// Whether a GPU could begin.
    pub(super) fn is_ready(&self) -> bool {
        self.answered && !self.loading && !self.asks_in_vain && !self.fetching && !self.started
    }

    /// How long it has a GPU from `start_s` on, seconds. An answer needs at least the last token computed.
    pub(super) fn prefill_s(&self, coefficients: &RecomputeCoefficients, tokens: u32, start_s: f64) -> f64 {
        let after = |cached: u32| {
            let left = tokens.saturating_sub(cached).max(1);
            coefficients.seconds(left, tokens - left)
        };
        let local = self.local_tokens();
        match (self.plan, self.arrives_at_s) {
            (FetchPlan::Fetch, _) => after(self.remote_tokens),
            // The engine goes on computing from the front until the rest is there.
            (FetchPlan::Split { compute_front_tokens }, Some(arrives_at_s)) => {
                let front_s = coefficients.seconds(compute_front_tokens, local);
                (front_s.max(arrives_at_s - start_s) + after(self.remote_tokens)).min(after(local))
            }
            (FetchPlan::Recompute | FetchPlan::Split { .. }, _) => after(local),
        }
    }

    /// Tokens that were computed after how many, where nothing was waited for meanwhile.
    pub(super) fn computed(&self, tokens: u32) -> Option<(u32, u32)> {
        let cached = match self.plan {
            FetchPlan::Recompute => self.local_tokens(),
            FetchPlan::Fetch => self.remote_tokens,
            FetchPlan::Split { .. } => return None,
        };
        let left = tokens.saturating_sub(cached).max(1);
        Some((left, tokens - left))
    }

    /// What came of it, but for the time of its first token.
    pub(super) fn outcome(&self, tokens: u32) -> Outcome {
        let local = self.local_tokens();
        let remote_tokens = match self.plan {
            FetchPlan::Recompute => 0,
            FetchPlan::Fetch => self.remote_tokens.min(tokens) - local,
            FetchPlan::Split { compute_front_tokens } => {
                let came = if self.arrives_at_s.is_some() {
                    self.remote_tokens.min(tokens)
                } else {
                    local
                };
                came.saturating_sub(local + compute_front_tokens)
            }
        };
        let kind = match self.plan {
            _ if self.failed => Kind::Failed,
            FetchPlan::Fetch => Kind::Fetched,
            FetchPlan::Split { .. } if self.arrives_at_s.is_none() => Kind::Failed,
            FetchPlan::Split { .. } => Kind::Split,
            FetchPlan::Recompute if self.nvme_tokens > 0 => Kind::Nvme,
            FetchPlan::Recompute if self.host_tokens > 0 => Kind::Host,
            FetchPlan::Recompute if self.declined => Kind::Declined,
            FetchPlan::Recompute => Kind::Computed,
        };
        Outcome {
            ttft_s: 0.0,
            prefill_s: self.prefill_s,
            host_tokens: self.host_tokens,
            nvme_tokens: self.nvme_tokens,
            remote_tokens,
            remote: self.remote.filter(|_| remote_tokens > 0),
            kind,
        }
    }
}
