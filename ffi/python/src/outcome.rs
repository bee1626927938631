use kvtier::Tier;
use kvtier::client::{GetOutcome, PutOutcome};
use pyo3::prelude::*;

/// What became of one key of a `get_into`.
#[pyclass(frozen, eq, hash, module = "kvtier")]
#[derive(PartialEq, Eq, Hash)]
pub(crate) struct Got {
    outcome: GetOutcome,
}

#[pymethods]
impl Got {
    /// "hit", "miss", "busy" or "too_small".
    #[getter]
    fn status(&self) -> &'static str {
        match self.outcome {
            GetOutcome::Hit { .. } => "hit",
            GetOutcome::Miss => "miss",
            GetOutcome::Busy => "busy",
            GetOutcome::TooSmall { .. } => "too_small",
        }
    }

    /// Bytes of the block; None when it was not found.
    #[getter]
    fn length(&self) -> Option<u32> {
        match self.outcome {
            GetOutcome::Hit { length, .. } | GetOutcome::TooSmall { length } => Some(length),
            GetOutcome::Miss | GetOutcome::Busy => None,
        }
    }

    /// Where a hit was found: "hbm" (memory of the GPU), "host", "nvme" or "remote".
    #[getter]
    fn tier(&self) -> Option<&'static str> {
        match self.outcome {
            GetOutcome::Hit { tier, .. } => Some(tier_name(tier)),
            GetOutcome::Miss | GetOutcome::Busy | GetOutcome::TooSmall { .. } => None,
        }
    }

    fn __bool__(&self) -> bool {
        self.outcome.is_hit()
    }

    fn __repr__(&self) -> String {
        match self.outcome {
            GetOutcome::Hit { length, tier } => format!("<kvtier.Got hit, {length} bytes from {}>", tier_name(tier)),
            GetOutcome::TooSmall { length } => format!("<kvtier.Got too_small, the block has {length} bytes>"),
            GetOutcome::Miss | GetOutcome::Busy => format!("<kvtier.Got {}>", self.status()),
        }
    }
}

impl From<GetOutcome> for Got {
    fn from(outcome: GetOutcome) -> Got {
        Got { outcome }
    }
}

/// What was found by a `lookup`.
#[pyclass(frozen, get_all, module = "kvtier")]
pub(crate) struct Found {
    /// How many of the first keys are cached.
    pub(crate) prefix: usize,
    /// For each key "host", "nvme", "remote" or None.
    pub(crate) tiers: Vec<Option<&'static str>>,
}

#[pymethods]
impl Found {
    fn __repr__(&self) -> String {
        format!("<kvtier.Found prefix of {} of {} keys>", self.prefix, self.tiers.len())
    }
}

/// What a `flush` wrote.
#[pyclass(frozen, get_all, module = "kvtier")]
pub(crate) struct Flushed {
    /// Blocks that were written for it.
    pub(crate) written: u64,
    /// Blocks that could not be written.
    pub(crate) left_out: u64,
}

#[pymethods]
impl Flushed {
    fn __repr__(&self) -> String {
        format!("<kvtier.Flushed {} written, {} left out>", self.written, self.left_out)
    }
}

pub(crate) fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Hbm => "hbm",
        Tier::Host => "host",
        Tier::Nvme => "nvme",
        Tier::Remote => "remote",
    }
}

pub(crate) fn put_name(outcome: PutOutcome) -> &'static str {
    match outcome {
        PutOutcome::Published => "published",
        PutOutcome::Present => "present",
        PutOutcome::Stale => "stale",
        PutOutcome::Busy => "busy",
        PutOutcome::Invalid => "invalid",
    }
}
