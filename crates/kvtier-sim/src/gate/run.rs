use std::collections::BTreeMap;

use kvtier_core::Eviction;

use super::bootstrap::{blocks, compare, quantile, sorted_ttft};
use super::flight::{Kind, Outcome};
use super::hardware::{GateHardware, Prices};
use super::life::{LifeReport, Setup, live};
use super::local::LocalSetup;
use super::profile::GateProfile;
use super::prompt::{Prompt, prompts};
use super::report::{
    CostPerDay, GateOfRemote, GateReport, HitRatio, HitsBySize, Input, LinkBytes, OptionReport, TimeSlice, Ttft,
    TurnSaving,
};
use super::sessions::{Turn, turns};
use super::verdict::{Verdict, judge};
use super::{Baseline, GateError};
use crate::TraceRequest;
use crate::simulate::{Policy, Prompts, simulate};

/// Sizes of the caches in the plot of hits, shares of the distinct blocks.
const SIZES: [f64; 7] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5];
const POLICIES: [Policy; 3] = [Policy::Opt, Policy::Hazard, Policy::Lru];

/// Turns that are told apart; the last stands for all that follow too.
const TURNS: u32 = 10;
/// Slices of the trace's time.
const SLICES: usize = 60;
/// Points of a curve.
const POINTS: usize = 100;

const DAY_S: f64 = 86_400.0;
/// Longest time that is lived through, days: remotes are probed all along.
const DAYS_MAX: f64 = 92.0;
const GIB: f64 = (1u64 << 30) as f64;

/// How a gate is run.
#[derive(Clone, Debug)]
pub struct GateOptions {
    /// What there was before.
    pub baseline: Baseline,
    /// Fixes luck and resamples.
    pub seed: u64,
    /// Resamples behind each interval.
    pub resamples: usize,
    /// What the report says of its inputs.
    pub inputs: Vec<Input>,
    /// Lines of the trace that were skipped.
    pub skipped_lines: usize,
}

impl Default for GateOptions {
    fn default() -> GateOptions {
        GateOptions {
            baseline: Baseline::Recompute,
            seed: 1,
            resamples: 1_000,
            inputs: Vec::new(),
            skipped_lines: 0,
        }
    }
}

/// How often `progress` is called for a trace of so many requests, at most.
#[must_use]
pub fn steps(requests: usize, hardware: &GateHardware) -> u64 {
    let lives = 3 + hardware.remote.len() + usize::from(hardware.nvme.is_some());
    (requests * (lives + SIZES.len() * POLICIES.len())) as u64
}

/// Runs the gate over a trace in which an id stands for `tokens_per_id` tokens.
///
/// # Errors
/// Where the hardware has no room for blocks of this profile, or the trace covers more than 92 days.
pub fn replay_gate(
    requests: &[TraceRequest],
    tokens_per_id: u32,
    profile: &GateProfile,
    hardware: &GateHardware,
    options: &GateOptions,
    progress: &mut dyn FnMut(),
) -> Result<GateReport, GateError> {
    let turns = turns(requests);
    let sessions: Vec<u32> = turns.iter().map(|turn| turn.session).collect();
    let (block_of, block_count) = blocks(&sessions);
    let gate = Gate {
        prompts: prompts(requests, tokens_per_id),
        turns,
        block_of,
        block_count,
        block_tokens: tokens_per_id,
        profile,
        hardware,
        options,
    };
    if gate.duration_s() > DAYS_MAX * DAY_S {
        return Err(GateError(format!(
            "from its first request to its last are {:.0} days: give a trace of at most {DAYS_MAX}",
            gate.duration_s() / DAY_S
        )));
    }
    let mut reports = Vec::new();
    let baseline = Setup {
        local: match options.baseline {
            Baseline::Recompute => None,
            Baseline::LruHost => Some(LocalSetup {
                nvme: false,
                eviction: Eviction::Lru,
            }),
        },
        remotes: Vec::new(),
    };
    let before = gate.live(&baseline, progress)?;
    let with = |nvme, remotes| Setup {
        local: Some(LocalSetup {
            nvme,
            eviction: Eviction::Hazard,
        }),
        remotes,
    };
    let host = with(false, Vec::new());
    let host_life = gate.live(&host, progress)?;
    let baseline_words = match options.baseline {
        Baseline::Recompute => "computing every prompt whole",
        Baseline::LruHost => "host memory with the least recently used going first",
    };
    reports.push(gate.report("host", baseline_words, (&baseline, &before), (&host, &host_life)));
    if hardware.nvme.is_some() {
        let both = with(true, Vec::new());
        let life = gate.live(&both, progress)?;
        let words = "host memory with reuse hazards, without NVMe";
        reports.push(gate.report("nvme", words, (&host, &host_life), (&both, &life)));
    }
    for (place, remote) in hardware.remote.iter().enumerate() {
        let setup = Setup {
            remotes: vec![place],
            ..baseline.clone()
        };
        let life = gate.live(&setup, progress)?;
        reports.push(gate.report(&remote.name, baseline_words, (&baseline, &before), (&setup, &life)));
    }
    let worth = |name: &str| {
        let worth = |report: &&OptionReport| report.option == name && report.verdict == Verdict::WorthEnabling;
        reports.iter().find(worth).is_some()
    };
    let nvme = worth("nvme");
    let local = nvme || worth("host");
    let together = Setup {
        local: if local {
            with(nvme, Vec::new()).local
        } else {
            baseline.local
        },
        remotes: (0..hardware.remote.len())
            .filter(|place| worth(&hardware.remote[*place].name))
            .collect(),
    };
    let mut settings = String::new();
    let verdict = if local || !together.remotes.is_empty() {
        let life = gate.live(&together, progress)?;
        let report = gate.report("together", baseline_words, (&baseline, &before), (&together, &life));
        let verdict = report.verdict;
        reports.push(report);
        if verdict == Verdict::WorthEnabling {
            settings = gate.settings(&together, local);
        }
        verdict
    } else if reports
        .iter()
        .any(|report| report.verdict == Verdict::InsufficientEvidence)
    {
        Verdict::InsufficientEvidence
    } else {
        Verdict::NotWorthEnabling
    };
    Ok(GateReport {
        format: "kvtier replay gate 1".to_string(),
        inputs: options.inputs.clone(),
        profile: profile.name.clone(),
        hardware: hardware.clone(),
        baseline: options.baseline.name().to_string(),
        seed: options.seed,
        resamples: options.resamples,
        requests: requests.len(),
        skipped_lines: options.skipped_lines,
        sessions: sessions.iter().max().map_or(0, |last| *last as usize + 1),
        prompt_tokens: gate.prompt_tokens(),
        duration_s: gate.duration_s(),
        block_tokens: tokens_per_id,
        block_bytes: u64::from(tokens_per_id) * profile.kv_bytes_per_token,
        verdict,
        settings,
        options: reports,
        hit_ratio_by_capacity: hits_by_size(requests, tokens_per_id, progress),
        decisions: Kind::ALL.to_vec(),
    })
}

struct Gate<'a> {
    prompts: Vec<Prompt>,
    turns: Vec<Turn>,
    block_of: Vec<u32>,
    block_count: usize,
    block_tokens: u32,
    profile: &'a GateProfile,
    hardware: &'a GateHardware,
    options: &'a GateOptions,
}

impl Gate<'_> {
    fn live(&self, setup: &Setup, progress: &mut dyn FnMut()) -> Result<LifeReport, GateError> {
        let seed = self.options.seed;
        live(
            &self.prompts,
            self.block_tokens,
            self.profile,
            self.hardware,
            setup,
            seed,
            progress,
        )
    }

    fn prompt_tokens(&self) -> u64 {
        self.prompts.iter().map(|prompt| u64::from(prompt.tokens)).sum()
    }

    fn duration_s(&self) -> f64 {
        self.prompts.last().map_or(0.0, |prompt| prompt.at_s)
    }

    /// What a total of the trace comes to in a day.
    fn per_day(&self, total: f64) -> f64 {
        total * DAY_S / self.duration_s().max(1.0)
    }

    fn report(
        &self,
        option: &str,
        compared_with: &str,
        (setup_before, before): (&Setup, &LifeReport),
        (setup, after): (&Setup, &LifeReport),
    ) -> OptionReport {
        let blocks = (&self.block_of[..], self.block_count);
        let comparison = compare(
            &before.outcomes,
            &after.outcomes,
            blocks,
            self.options.resamples,
            self.options.seed,
        );
        let (verdict, reasons) = judge(&comparison, self.prompts.len());
        let sorted = [sorted_ttft(&before.outcomes), sorted_ttft(&after.outcomes)];
        let written = self.per_day(after.nvme_written_bytes as f64);
        let disk = self.hardware.nvme.as_ref();
        let disk = disk.filter(|_| setup.local.is_some_and(|local| local.nvme));
        OptionReport {
            option: option.to_string(),
            switched_on: self.words(setup),
            compared_with: compared_with.to_string(),
            verdict,
            reasons,
            prefill_seconds_saved: prefill_s(before) - prefill_s(after),
            comparison,
            ttft_before: ttft(&sorted[0]),
            ttft_after: ttft(&sorted[1]),
            hit_ratio_by_tier: self.hits(after),
            links: self.links(after),
            nvme_written_bytes_per_day: written,
            nvme_drive_writes_per_day: disk.map(|disk| written / (disk.gib * GIB)),
            cost_per_day: self.hardware.prices.as_ref().map(|prices| CostPerDay {
                currency: prices.currency.clone(),
                before: self.cost(prices, setup_before, before),
                after: self.cost(prices, setup, after),
            }),
            gates: self.gates(after),
            saving_by_turn: self.by_turn(&before.outcomes, &after.outcomes),
            decisions_over_time: self.over_time(&after.outcomes),
            ttft_curve: (0..=POINTS)
                .map(|point| {
                    let share = point as f64 / POINTS as f64;
                    (share, quantile(&sorted[0], share), quantile(&sorted[1], share))
                })
                .collect(),
        }
    }

    fn words(&self, setup: &Setup) -> String {
        let mut words = Vec::new();
        if let Some(local) = setup.local {
            let policy = match local.eviction {
                Eviction::Lru => "lru",
                Eviction::Hazard => "hazard",
            };
            words.push(format!("host memory of {} GiB ({policy})", self.hardware.host.gib));
            if let Some(nvme) = self.hardware.nvme.as_ref().filter(|_| local.nvme) {
                words.push(format!("NVMe of {} GiB", nvme.gib));
            }
        }
        for place in &setup.remotes {
            let remote = &self.hardware.remote[*place];
            words.push(format!("{} at {} GB/s", remote.name, remote.gb_per_s));
        }
        words.join(", ")
    }

    fn hits(&self, life: &LifeReport) -> Vec<HitRatio> {
        let mut tokens: BTreeMap<(usize, &str), u64> = BTreeMap::new();
        tokens.insert((0, "host"), 0);
        tokens.insert((1, "nvme"), 0);
        for (place, _) in &life.gates {
            tokens.insert((2 + place, &self.hardware.remote[*place].name), 0);
        }
        for outcome in &life.outcomes {
            *tokens.entry((0, "host")).or_default() += u64::from(outcome.host_tokens);
            *tokens.entry((1, "nvme")).or_default() += u64::from(outcome.nvme_tokens);
            if let Some(place) = outcome.remote {
                let name = &self.hardware.remote[place].name;
                *tokens.entry((2 + place, name)).or_default() += u64::from(outcome.remote_tokens);
            }
        }
        let all = (self.prompt_tokens() as f64).max(1.0);
        let ratio = |((_, tier), tokens): ((usize, &str), u64)| HitRatio {
            tier: tier.to_string(),
            ratio: tokens as f64 / all,
        };
        tokens.into_iter().map(ratio).collect()
    }

    fn links(&self, life: &LifeReport) -> Vec<LinkBytes> {
        let duration_s = self.duration_s().max(1.0);
        let links = life.links.iter().map(|carried| LinkBytes {
            link: carried.link.clone(),
            bytes: carried.bytes,
            busy: carried.busy_s / duration_s,
        });
        links.collect()
    }

    fn cost(&self, prices: &Prices, setup: &Setup, life: &LifeReport) -> f64 {
        let gpu_hours = self.per_day(prefill_s(life)) / 3_600.0 * f64::from(self.profile.gpus);
        let mut cost = gpu_hours * prices.gpu_hour;
        if let Some(local) = setup.local {
            cost += self.hardware.host.gib * prices.host_gib_month / 30.0;
            if let Some(nvme) = self.hardware.nvme.as_ref().filter(|_| local.nvme) {
                cost += nvme.gib * prices.nvme_gib_month / 30.0;
            }
        }
        for (place, bytes) in &life.held_bytes {
            cost += *bytes as f64 / GIB * self.hardware.remote[*place].gib_month / 30.0;
        }
        for (place, bytes) in &life.fetched_bytes {
            cost += self.per_day(*bytes as f64) / 1e9 * self.hardware.remote[*place].gb_moved;
        }
        cost
    }

    fn gates(&self, life: &LifeReport) -> Vec<GateOfRemote> {
        let gates = life.gates.iter().map(|(place, gate)| GateOfRemote {
            remote: self.hardware.remote[*place].name.clone(),
            open: gate.open,
            reason: gate.reason.to_string(),
            value: gate.value,
            flips: gate.flips,
            probe_bytes: gate.probe_bytes,
        });
        gates.collect()
    }

    fn by_turn(&self, before: &[Outcome], after: &[Outcome]) -> Vec<TurnSaving> {
        let mut sums: BTreeMap<u32, (u64, [f64; 4])> = BTreeMap::new();
        for (place, turn) in self.turns.iter().enumerate() {
            let (requests, seconds) = sums.entry((turn.turn + 1).min(TURNS)).or_default();
            let (before, after) = (&before[place], &after[place]);
            *requests += 1;
            let of = [before.ttft_s, after.ttft_s, before.prefill_s, after.prefill_s];
            seconds.iter_mut().zip(of).for_each(|(sum, more)| *sum += more);
        }
        let saving = |before: f64, after: f64| if before > 0.0 { 1.0 - after / before } else { 0.0 };
        let turns = sums.into_iter().map(|(turn, (requests, seconds))| TurnSaving {
            turn,
            requests,
            ttft_saving: saving(seconds[0], seconds[1]),
            prefill_saving: saving(seconds[2], seconds[3]),
        });
        turns.collect()
    }

    fn over_time(&self, outcomes: &[Outcome]) -> Vec<TimeSlice> {
        let slice_s = (self.duration_s() / SLICES as f64).max(1e-3);
        let mut slices: Vec<TimeSlice> = (0..SLICES)
            .map(|slice| TimeSlice {
                from_s: slice as f64 * slice_s,
                requests: vec![0; Kind::ALL.len()],
            })
            .collect();
        for (prompt, outcome) in self.prompts.iter().zip(outcomes) {
            let slice = ((prompt.at_s / slice_s) as usize).min(SLICES - 1);
            if let Some(kind) = Kind::ALL.iter().position(|kind| *kind == outcome.kind) {
                slices[slice].requests[kind] += 1;
            }
        }
        slices
    }

    /// What the daemon's settings file says to switch this on.
    fn settings(&self, setup: &Setup, local: bool) -> String {
        let mut text = String::new();
        let bytes = |gib: f64| (gib * GIB) as u64;
        if let Some(tiers) = setup.local.filter(|_| local) {
            text.push_str("eviction_policy = \"hazard\"\n");
            text.push_str(&format!("host_bytes = {}\n", bytes(self.hardware.host.gib)));
            let nvme = self.hardware.nvme.as_ref().filter(|_| tiers.nvme);
            text.push_str(&format!("nvme_bytes = {}\n", nvme.map_or(0, |nvme| bytes(nvme.gib))));
        }
        for place in &setup.remotes {
            // A name may hold anything, a comment ends with its line.
            let name = self.hardware.remote[*place].name.replace(char::is_control, " ");
            text.push_str(&format!(
                "# remote {name:?}: worth enabling; nodes that read each other's memory name their members in `peers`\n"
            ));
        }
        text
    }
}

fn prefill_s(life: &LifeReport) -> f64 {
    life.outcomes.iter().map(|outcome| outcome.prefill_s).sum()
}

fn ttft(sorted: &[f64]) -> Ttft {
    Ttft {
        mean_s: sorted.iter().sum::<f64>() / (sorted.len() as f64).max(1.0),
        p50_s: quantile(sorted, 0.5),
        p95_s: quantile(sorted, 0.95),
        p99_s: quantile(sorted, 0.99),
    }
}

fn hits_by_size(requests: &[TraceRequest], tokens_per_id: u32, progress: &mut dyn FnMut()) -> Vec<HitsBySize> {
    // Few engines say how long their answers were: what a gate promises does not depend on it.
    let prompts = Prompts::new(requests, tokens_per_id).without_answers();
    let mut rows = Vec::new();
    for policy in POLICIES {
        for capacity in SIZES {
            let blocks = ((prompts.blocks() as f64 * capacity) as usize).max(1);
            rows.push(HitsBySize {
                capacity,
                policy: policy.name().to_string(),
                prefix_hit_token_ratio: simulate(&prompts, policy, blocks, progress).token_ratio(),
            });
        }
    }
    rows
}
