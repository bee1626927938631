//! ASK: the library. It drives the pure core with real memory and real devices, serves the client protocol, and speaks it.
//!
//! Absent on purpose: policy arithmetic (in `kvtier-core`), `unsafe` (in the corners of `kvtier-transfer` and
//! `kvtier-storage`), environment variables and files of settings (in `kv-daemon`).
//!
//! Read first: [`node::Node`] (one machine's tiers behind one socket), [`client::blocking::Client`] (how an engine asks) and
//! [`wire`] (what goes between them).
#![forbid(unsafe_code)]

pub mod adapter;
pub mod client;
pub mod error;
pub mod keys;
pub mod node;
pub mod purge;
pub mod settings;
pub mod wire;

pub use error::ErrorKind;
pub use kvtier_core::{BlockHash, Generation, Hints, Label, Parent, Realization, Tier};
/// What the client's calls take: memory of hosts and of GPUs.
pub use kvtier_transfer::{gpu, memory};

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
