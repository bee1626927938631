//! Worlds for the cluster: three or five real [`kvtier_core::cluster::Cluster`]s, each with a driver, a register, a clock and blocks of its own, and a
//! network that loses, delays, repeats and reorders.
//!
//! - Clocks start anywhere and run at rates that differ by up to the drift that the members are set to.
//! - A record becomes durable and in force some time after it was asked for and is answered some time after that. A kill in between loses what was not
//!   durable, and keeps what was although nobody was told.
//! - Members are cut off (both ways or one), killed and started again, stopped for longer than a lease; records fail, or fail and are recorded all the same.
//! - The oracle knows real time, the members do not. Once a fenced purge was acknowledged, nobody who serves has an older generation in force or shows a block that was
//!   written before the purge was asked for; without a fence, nobody who confirmed does. Generations never fall, tables are bounded, and once faults stop
//!   everybody serves and has confirmed.

mod clock;
mod counts;
mod member;
mod oracle;
mod plan;
mod runner;
mod world;

pub use counts::ClusterCounts;
#[cfg(feature = "mutants")]
pub use runner::find_cluster_mutant;
pub use runner::{ClusterOptions, ClusterOutcome, ClusterReport, run_cluster_seed, run_cluster_seeds};
