//! PROVE: seeded worlds, faults, an oracle, planted mutants, workloads and traces.
//!
//! A seed is a world: one real [`kvtier_core::TierManager`] among simulated devices, clients and an operator that all
//! misbehave as the seed says, watched by an oracle that knows whose bytes lie where. The same seed lives the same life.
//! Absent on purpose: real time, real I/O, threads, and mocks of our own crates.
//!
//! Worlds of other kinds are in [`cost`]: one link, and plans that decide whether to use it; and in [`cluster`]: members that carry purges to
//! each other. [`gate`] puts the tier manager and the cost model together and says whether a trace's traffic gains by them.
//!
//! Read first: [`run_seed`] (one world), [`TraceRequest`] (one request of a trace) and [`ChatWorkload`] (many of ours).
#![forbid(unsafe_code)]

pub mod capacity;
pub mod cli;
pub mod cluster;
pub mod cost;
mod counts;
pub mod family;
pub mod gate;
pub mod lru;
mod memory;
mod oracle;
mod plan;
mod random;
mod runner;
pub mod simulate;
pub mod trace;
pub mod workload;
mod world;

pub use counts::{Counts, Fault};
pub use random::Random;
#[cfg(feature = "mutants")]
pub use runner::{MutantOutcome, find_mutant};
pub use runner::{RunOptions, RunReport, SeedOutcome, run_seed, run_seeds};
pub use trace::{TraceError, TraceReader, TraceRequest};
pub use workload::ChatWorkload;
