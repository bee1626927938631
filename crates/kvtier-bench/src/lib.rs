//! MEASURE: baselines, and the harness behind `kvctl bench`.
//!
//! A figure here is never an absolute: each case runs interleaved with its baselines (memcpy of the same shape, an echo
//! over a Unix socket) under the same placement, waits, pages and working set. Absent on purpose: anything that the
//! product needs to run, and any pass or fail decided by a time.
//!
//! Read first: [`client::Options`], [`client::run`] (the whole measurement) and [`Row`] (one line of its answer).

pub mod baseline;
pub mod client;
mod daemon;
mod echo;
pub mod gpu;
pub mod nvme;
mod pattern;
mod placement;
pub mod purge;
mod ranks;
mod row;
pub mod transfer;

pub use echo::echo_server_main;
pub use row::{Bar, Row, meets};

/// A measurement that could not be made, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The system refused something that the harness needs.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The daemon under measurement did not start, or ended early.
    #[error("daemon: {0}")]
    Daemon(String),
    /// The client library answered with an error.
    #[error("{what}: {message}")]
    Client {
        /// What was asked.
        what: &'static str,
        /// The answer.
        message: String,
    },
    /// The NVMe tier failed.
    #[error("{what}: {message}")]
    Storage {
        /// What was asked.
        what: &'static str,
        /// The answer.
        message: String,
    },
    /// There is no GPU here, or it failed.
    #[error("{0}")]
    Gpu(String),
    /// Bytes that were read are not those that were put.
    #[error("wrong bytes in block {block} read by {case}")]
    WrongBytes {
        /// Which case read them.
        case: &'static str,
        /// Which block of the working set.
        block: u64,
    },
    /// The daemon holds too little for the measurement.
    #[error(
        "the daemon has {capacity_bytes} bytes of host memory and the smallest working set needs {needed_bytes}: start it with more --host-bytes, or leave --socket out"
    )]
    TooSmall {
        /// What it has.
        capacity_bytes: u64,
        /// What is needed.
        needed_bytes: u64,
    },
    /// The options contradict each other or name something unknown.
    #[error("{0}")]
    Options(String),
}

impl BenchError {
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> BenchError {
        let what = what.into();
        move |source| BenchError::System { what, source }
    }
}

/// The machine's load average over a minute, for the reader who wonders about odd figures.
pub(crate) fn load() -> String {
    std::fs::read_to_string("/proc/loadavg").map_or_else(
        |_| "unknown".to_owned(),
        |text| text.split(' ').next().unwrap_or("").to_owned(),
    )
}
