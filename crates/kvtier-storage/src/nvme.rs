//! The NVMe tier: segment files in a directory, written front to back, moved by an engine.
//!
//! [`NvmeTier`] turns the core's actions into requests of an [`NvmeEngine`] and their completions into events. It keeps no index of blocks: the core
//! says where each one lies.

mod engine;
mod fingerprint;
pub mod format;
mod queue;
mod settings;
mod threads;
mod tier;
mod uring;

pub use engine::{Direction, Done, EngineError, EngineSettings, Finished, NvmeEngine, Priority, Request};
pub use settings::{EngineChoice, NvmeError, NvmeSettings};
pub use threads::ThreadsEngine;
pub use tier::{Events, NvmeStatistics, NvmeTier, StorageAction};
pub use uring::UringEngine;
