//! SERVE: the two binaries. `kv-daemon` is the process that keeps blocks; `kvctl` is the operator's tool.
//!
//! Absent on purpose: cache logic. What could be decided without a process (what to keep, where, for whom) is in
//! `kvtier-core`; how bytes move is in `kvtier`. Only this room reads settings files and environment variables.
//!
//! Read first: [`configuration::Configuration`] (where settings come from), [`serve::run`] (the life of the process) and
//! [`replay`] (a trace with every byte checked).
#![forbid(unsafe_code)]

pub mod admin;
pub mod arguments;
pub mod configuration;
pub mod content;
pub mod demo;
pub mod exit;
pub mod kvctl;
pub mod metrics;
pub mod output;
pub mod replay;
pub mod rfc3339;
pub mod rotation;
pub mod serve;
pub mod size;
mod state_file;
