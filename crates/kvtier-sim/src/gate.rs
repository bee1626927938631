//! Whether a trace's traffic gains by a cache: the replay gate.
//!
//! The requests of a trace live through a node several times, as a simulation of discrete events: once without the cache (the
//! [`Baseline`]), and once with each tier and each remote switched on. The tier manager of `kvtier-core` decides what lies in host memory and on
//! NVMe, its cost model whether a remote is asked; devices, links and GPUs are simulated and no byte moves. The two lives are
//! compared request by request, and blocks of sessions are resampled to say how sure that is.
//!
//! - A GPU takes what the profile says. Where GPUs are queued for, who arrived first among those whose bytes are there goes first.
//! - A link is first come, first served, each direction by itself; latencies overlap. Each group of GPUs has its own way to host memory; where one is
//!   always idle, so is its way.
//! - A prompt's blocks are cached once it was computed, and answers as far as a later prompt has them. What remotes lack is sent to them
//!   beside the requests; what would queue for more than ten seconds is not sent.
//! - What is found on the node is used, as the daemon does; a remote is asked where the cost model expects to gain.
//!
//! Read first: [`replay_gate`], [`GateReport`], [`Verdict`]. The same inputs and seed give the same report.

mod bootstrap;
mod flight;
mod hardware;
mod html;
mod life;
mod link;
mod local;
mod profile;
mod prompt;
mod remote;
mod report;
mod run;
mod sessions;
mod verdict;

#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

pub use bootstrap::{Comparison, Estimate};
pub use flight::Kind;
pub use hardware::{GateHardware, HostHardware, NvmeHardware, Prices, RemoteHardware};
pub use html::render;
pub use profile::GateProfile;
pub use report::{
    CostPerDay, GateOfRemote, GateReport, HitRatio, HitsBySize, Input, LinkBytes, OptionReport, TimeSlice, Ttft,
    TurnSaving,
};
pub use run::{GateOptions, replay_gate, steps};
pub use verdict::{BLOCKS_MIN, HARMED_MAX, P99_RATIO_MAX, REQUESTS_MIN, SAVING_MIN, Verdict};

/// Why nothing can be simulated, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateError(pub String);

impl fmt::Display for GateError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for GateError {}

/// What there was before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Baseline {
    /// Every prompt is computed whole.
    #[default]
    Recompute,
    /// Host memory keeps what was used last, leaves first going first.
    LruHost,
}

impl Baseline {
    /// How a command line and a report name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Baseline::Recompute => "recompute",
            Baseline::LruHost => "lru-host",
        }
    }
}

impl FromStr for Baseline {
    type Err = String;

    fn from_str(text: &str) -> Result<Baseline, String> {
        match text {
            "recompute" => Ok(Baseline::Recompute),
            "lru-host" => Ok(Baseline::LruHost),
            _ => Err(format!("{text:?} is no baseline: recompute or lru-host")),
        }
    }
}
