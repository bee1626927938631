//! What a fetch and a recomputation would take, and which of them a request should wait for.
//!
//! Seconds, bytes and tokens; every name ends in its unit. A recomputation of `d` tokens after `x` cached ones takes
//! `c0 + a·d + b·d·(x + d/2)`; a fetch of them lookup + queue + transfer + decompression, and the risk that it fails. Both are
//! learned from what happened; until then the first comes from a [`ComputeProfile`] and the second from a probe.
//!
//! Read first: [`CostModel`] (decides, observes), [`Decision`] (the answer with every term of it), [`GateReport`].

mod backend;
mod bandwidth;
mod check;
mod decision;
mod failure;
mod gate;
mod latency;
mod model;
mod profile;
mod quantile;
mod question;
mod recompute;
mod split;
mod weigh;

pub use backend::{BackendProfile, BackendReport, Forecast};
pub use decision::{Decision, FetchPlan, FetchTerms, Reason};
pub use gate::{GateMode, GateReason, GateReport, GateSettings, Probe};
pub use model::{BackendId, CostModel, FetchId, Patience};
pub use profile::{ComputeProfile, GpuProfile, ModelProfile};
pub use question::{Candidate, Question};
pub use recompute::{RecomputeCoefficients, RecomputeModel};
pub use split::{SplitTerms, best_front_tokens};
