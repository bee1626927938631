//! The NVMe tier: segments, each a file in a directory or all in one device, written front to back, moved by an engine.
//!
//! [`NvmeTier`] turns the core's actions into requests of an [`NvmeEngine`] and their completions into events. It keeps
//! no index of blocks: the core says where each one lies.

mod action;
mod bounce;
mod device;
mod directory;
mod engine;
mod erase;
pub mod format;
mod keeper;
mod keys;
mod queue;
mod sealing;
mod segment;
mod settings;
mod threads;
mod tier;
mod uring;
mod volume;

#[cfg(any(test, feature = "faults"))]
pub mod faults;

pub use action::StorageAction;
pub use engine::{Arrived, Direction, Done, EngineError, EngineSettings, Finished, NvmeEngine, Priority, Request};
pub use format::Encryption;
pub use keys::{DataKey, RecordKeys};
pub use settings::{EngineChoice, NvmeError, NvmeSettings};
pub use threads::ThreadsEngine;
pub use tier::{Events, Found, NvmeStatistics, NvmeTier};
pub use uring::UringEngine;

#[cfg(test)]
mod tests;
