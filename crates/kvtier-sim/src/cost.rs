//! Worlds for the cost model: one remote link, a trace of requests, and plans that decide whether to use it.
//!
//! The plans `gated_*` are [`kvtier_core::cost::CostModel`] itself, told what it would be told in a node: first bytes, blocks as they
//! arrive, ends, failures, probes. A plan of an oracle knows what this request's fetch would take, and nothing of those to
//! come. A seed fixes bandwidth, latencies and failures for all plans alike; each plan's own fetches make its queue.
//!
//! - GPU: 12 ms + 70 µs a token + 1.3 ns a pair; 327,680 bytes of keys and values a token.
//! - Arrivals are the trace's; what is matched is what an unbounded cache would have. Where GPUs are idle, requests with fewer than
//!   1,024 matched tokens are left out, and a request's time is that of its matched part. In a contended world whole prompts
//!   queue for the GPUs, first come first served, and it is the time to the first token.
//! - The link is first come, first served: a transfer starts one latency after both its arrival and a free link. A fetch that fails
//!   uses no link and is known to have failed after 2 s; then its tokens are computed.
//! - A request is harmed when it takes longer than 1.05 times recomputing and 2 ms; in a contended world, than the same request where
//!   nobody fetches.
//! - A link that slows itself counts the fetches under way when one arrives, that one included.
//!
//! Runs of one build repeat to the last digit; the logarithms of another platform may differ in it.

mod events;
mod gpus;
mod life;
mod plan;
mod report;
mod requests;
mod tally;
mod waiting;
mod weather;
mod world;

#[cfg(test)]
mod tests;

pub(crate) use gpus::Gpus;
pub(crate) use tally::is_harm;
pub(crate) use weather::{normal, uniform};

pub use plan::CostPlan;
pub use report::{CostRow, SEEDS, is_reference_trace, judge, simulate};
pub use world::{Burst, CostWorld, Stall, Step, Window, WorldError};
