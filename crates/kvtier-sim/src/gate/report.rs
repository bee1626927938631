use serde::Serialize;

use super::bootstrap::Comparison;
use super::flight::Kind;
use super::hardware::GateHardware;
use super::verdict::Verdict;

/// Something that a report was made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Input {
    /// `trace`, `profile` or `hardware`.
    pub what: String,
    /// The file, or the preset.
    pub name: String,
    /// SHA-256 of the bytes read: of the file, or of the preset's name.
    pub sha256: String,
}

/// Percentiles of the time to the first token, seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ttft {
    /// Mean.
    pub mean_s: f64,
    /// Median.
    pub p50_s: f64,
    /// 95th percentile.
    pub p95_s: f64,
    /// 99th percentile.
    pub p99_s: f64,
}

/// Share of all prompt tokens that came from one place.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HitRatio {
    /// `host`, `nvme`, or a remote's name.
    pub tier: String,
    /// The share.
    pub ratio: f64,
}

/// What a link carried in the whole trace.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinkBytes {
    /// In words.
    pub link: String,
    /// Bytes.
    pub bytes: u64,
    /// Share of the time in which it carried something; over 1 where it was behind.
    pub busy: f64,
}

/// What a day of such traffic costs at the prices given.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CostPerDay {
    /// As the prices write it.
    pub currency: String,
    /// Without this option.
    pub before: f64,
    /// With it.
    pub after: f64,
}

/// How the gate of a remote's cost model stood in the end.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GateOfRemote {
    /// Which remote.
    pub remote: String,
    /// Whether it was asked.
    pub open: bool,
    /// Why.
    pub reason: String,
    /// What having it as an option saves, as a share of what recomputing takes.
    pub value: f64,
    /// Times that it opened or closed.
    pub flips: u64,
    /// Bytes of probes.
    pub probe_bytes: u64,
}

/// What the turns of sessions save.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TurnSaving {
    /// From 1; the last stands for all that follow too.
    pub turn: u32,
    /// Requests.
    pub requests: u64,
    /// Share of their time to first tokens that is saved.
    pub ttft_saving: f64,
    /// Share of their prefill seconds that is saved.
    pub prefill_saving: f64,
}

/// What was done for the requests of one slice of the trace's time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TimeSlice {
    /// Its start, seconds.
    pub from_s: f64,
    /// Requests by what was done, in the order of [`Kind::ALL`].
    pub requests: Vec<u64>,
}

/// One thing that may be switched on, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OptionReport {
    /// `host`, `nvme`, a remote's name, or `together`.
    pub option: String,
    /// What is switched on, in words.
    pub switched_on: String,
    /// What it is compared with, in words.
    pub compared_with: String,
    /// Whether it should be switched on.
    pub verdict: Verdict,
    /// Why.
    pub reasons: Vec<String>,
    /// Prefill seconds saved in the whole trace.
    pub prefill_seconds_saved: f64,
    /// The figures of the verdict.
    pub comparison: Comparison,
    /// Without it.
    pub ttft_before: Ttft,
    /// With it.
    pub ttft_after: Ttft,
    /// From where tokens came.
    pub hit_ratio_by_tier: Vec<HitRatio>,
    /// What links carried.
    pub links: Vec<LinkBytes>,
    /// Written to NVMe in a day of such traffic, bytes.
    pub nvme_written_bytes_per_day: f64,
    /// The same in capacities of the disk; nothing without one.
    pub nvme_drive_writes_per_day: Option<f64>,
    /// Where prices were given.
    pub cost_per_day: Option<CostPerDay>,
    /// Gates of its remotes.
    pub gates: Vec<GateOfRemote>,
    /// By turn of the session.
    pub saving_by_turn: Vec<TurnSaving>,
    /// What was done when.
    pub decisions_over_time: Vec<TimeSlice>,
    /// Time to the first token at shares of 0 to 1, seconds: the share, without it, with it.
    pub ttft_curve: Vec<(f64, f64, f64)>,
}

/// What caches of several sizes would hit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HitsBySize {
    /// Share of the distinct blocks that fit.
    pub capacity: f64,
    /// The policy: `opt` knows the future.
    pub policy: String,
    /// Share of prompt tokens hit as a cached prefix.
    pub prefix_hit_token_ratio: f64,
}

/// Everything that a gate says.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GateReport {
    /// `kvtier replay gate 1`.
    pub format: String,
    /// What it was made of.
    pub inputs: Vec<Input>,
    /// The model on its GPUs.
    pub profile: String,
    /// The node.
    pub hardware: GateHardware,
    /// What it is compared with.
    pub baseline: String,
    /// Fixes luck and resamples.
    pub seed: u64,
    /// Resamples behind each interval.
    pub resamples: usize,
    /// Requests of the trace.
    pub requests: usize,
    /// Lines that were skipped because they are no requests.
    pub skipped_lines: usize,
    /// Sessions as far as the trace shows them.
    pub sessions: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// From the first request to the last, seconds.
    pub duration_s: f64,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Of everything that is worth enabling, together.
    pub verdict: Verdict,
    /// Settings of the daemon that switch that on, as TOML.
    pub settings: String,
    /// Each by itself, then together.
    pub options: Vec<OptionReport>,
    /// By size of the cache and policy.
    pub hit_ratio_by_capacity: Vec<HitsBySize>,
    /// Kinds of decisions in the order of each time slice.
    pub decisions: Vec<Kind>,
}
