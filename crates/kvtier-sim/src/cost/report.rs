use serde::Serialize;

use super::life::live;
use super::plan::CostPlan;
use super::requests::{END_S, arrivals};
use super::tally::LifeReport;
use super::world::CostWorld;
use crate::TraceRequest;

/// The seeds that a report is made with unless others are named.
pub const SEEDS: [u64; 5] = [11, 222, 3333, 44444, 555_555];

/// Fewer forecasts than this say nothing of their calibration.
const FORECASTS_MIN: u64 = 200;

/// What one plan came to in one world, over all seeds.
#[derive(Clone, Debug, Serialize)]
pub struct CostRow {
    /// Which world.
    pub world: String,
    /// Which plan.
    pub plan: &'static str,
    /// Mean time of a request, seconds: of its matched part, or to its first token where GPUs are queued for.
    pub mean_s: f64,
    /// `mean_s` over that of `oracle_binary`, less 1.
    pub regret: f64,
    /// Share of the requests slower than 1.05 times recomputing and 2 ms.
    pub harmed: f64,
    /// Times that the gate turned, a minute.
    pub flips_per_min: f64,
    /// Bytes of probes over what the link could have carried.
    pub probe_share: f64,
    /// The worst of |P(F ≤ F_q) − q| for q = 0.5, 0.9, 0.99; nothing where too little was forecast.
    pub calibration_error: Option<f64>,
    /// From a step of the world to the last wrong decision in the minute after it, seconds; the worst seed's.
    pub settle_s: Option<f64>,
    /// Mean time to the first token, seconds.
    pub ttft_mean_s: f64,
    /// Share of the requests that fetched.
    pub fetched: f64,
    /// Requests of all seeds.
    pub requests: u64,
}

/// Runs every plan in every world with every seed.
pub fn simulate(
    worlds: &[CostWorld],
    seeds: &[u64],
    requests: &[TraceRequest],
    mut tell: impl FnMut(&str),
) -> Vec<CostRow> {
    let arrivals = arrivals(requests);
    let mut rows = Vec::new();
    for world in worlds {
        tell(&world.name);
        let mut reports: Vec<(CostPlan, Vec<LifeReport>)> = Vec::new();
        for plan in CostPlan::ALL {
            let lives = seeds.iter().map(|seed| live(world, *seed, plan, &arrivals)).collect();
            reports.push((plan, lives));
        }
        let (recomputing, others) = reports.split_at_mut(1);
        for (_, lives) in others {
            for (life, recomputing) in lives.iter_mut().zip(&recomputing[0].1) {
                life.compare(recomputing);
            }
        }
        let oracle_s = reports
            .iter()
            .find(|(plan, _)| *plan == CostPlan::OracleBinary)
            .map(|(_, lives)| mean_s(lives));
        for (plan, lives) in &reports {
            rows.push(row(world, *plan, lives, oracle_s.unwrap_or_default()));
        }
    }
    rows
}

fn sum(lives: &[LifeReport], of: impl Fn(&LifeReport) -> f64) -> f64 {
    lives.iter().map(of).sum()
}

fn mean_s(lives: &[LifeReport]) -> f64 {
    sum(lives, |life| life.seconds) / sum(lives, |life| life.requests as f64).max(1.0)
}

fn row(world: &CostWorld, plan: CostPlan, lives: &[LifeReport], oracle_s: f64) -> CostRow {
    let requests = sum(lives, |life| life.requests as f64).max(1.0);
    let forecasts: u64 = lives.iter().map(|life| life.forecasts).sum();
    let calibration_error = (forecasts >= FORECASTS_MIN).then(|| {
        [0.5, 0.9, 0.99]
            .into_iter()
            .enumerate()
            .fold(0.0, |worst: f64, (index, share)| {
                let within: u64 = lives.iter().map(|life| life.within[index]).sum();
                worst.max((within as f64 / forecasts as f64 - share).abs())
            })
    });
    CostRow {
        world: world.name.clone(),
        plan: plan.name(),
        mean_s: mean_s(lives),
        regret: mean_s(lives) / oracle_s - 1.0,
        harmed: sum(lives, |life| life.harmed as f64) / requests,
        flips_per_min: sum(lives, |life| life.flips as f64) / (lives.len() as f64 * END_S / 60.0),
        probe_share: sum(lives, |life| life.probe_bytes as f64) / sum(lives, |life| life.capacity_bytes),
        calibration_error,
        settle_s: lives.iter().filter_map(|life| life.settle_s).reduce(f64::max),
        ttft_mean_s: sum(lives, |life| life.ttft_s) / requests,
        fetched: sum(lives, |life| life.fetches as f64) / requests,
        requests: requests as u64,
    }
}

/// Mean seconds of `recompute` and `oracle_binary` in the first worlds, to which a simulator of the same worlds comes within 3 %.
const REFERENCE_S: [(&str, f64, f64); 5] = [
    ("healthy", 0.986, 0.522),
    ("random_walk", 0.986, 0.931),
    ("regimes", 0.986, 0.783),
    ("failures", 0.986, 0.709),
    ("s3_like", 0.986, 0.986),
];

const REFERENCE_SHARE: f64 = 0.03;

/// Whether the requests are those that the reference figures were made with: recomputing them takes as long.
#[must_use]
pub fn is_reference_trace(rows: &[CostRow]) -> bool {
    rows.iter()
        .filter(|row| row.plan == CostPlan::Recompute.name())
        .any(|row| row.world == REFERENCE_S[0].0 && (row.mean_s / REFERENCE_S[0].1 - 1.0).abs() < 1e-2)
}

/// What rows of the reference trace are held to; a sentence for each figure beyond its bound.
#[must_use]
pub fn judge(rows: &[CostRow]) -> Vec<String> {
    let mut beyond = Vec::new();
    for row in rows {
        let mut hold = |what: &str, value: f64, most: f64| {
            if value.is_nan() || value > most {
                beyond.push(format!(
                    "{} {}: {what} is {value:.4}, at most {most}",
                    row.world, row.plan
                ));
            }
        };
        let contended = row.world.starts_with("contended_");
        let reference = REFERENCE_S.iter().find(|(world, ..)| *world == row.world);
        if let Some((_, recompute_s, oracle_s)) = reference {
            let off = |reference_s: f64| (row.mean_s / reference_s - 1.0).abs();
            match row.plan {
                "recompute" => hold("distance from the reference", off(*recompute_s), REFERENCE_SHARE),
                "oracle_binary" => hold("distance from the reference", off(*oracle_s), REFERENCE_SHARE),
                _ => {}
            }
        }
        if !row.plan.starts_with("gated_") {
            continue;
        }
        hold("flips_per_min", row.flips_per_min, 6.0);
        hold("probe_share", row.probe_share, 0.003);
        if let (Some(error), true) = (row.calibration_error, reference.is_some()) {
            hold("calibration_error", error, 0.05);
        }
        if let Some(settle_s) = row.settle_s {
            // Two probes three seconds apart, and the longer dwell.
            hold("settle_s", settle_s, 11.0);
        }
        if !contended {
            hold("harmed", row.harmed, 0.015);
        }
        match (row.plan, row.world.as_str()) {
            ("gated_binary", "healthy" | "s3_like") => hold("regret", row.regret, 0.01),
            ("gated_binary", "random_walk") => hold("regret", row.regret, 0.03),
            ("gated_binary", "regimes") => hold("regret", row.regret, 0.08),
            ("gated_binary", "failures") => hold("regret", row.regret, 0.07),
            ("gated_binary", _) if !contended => hold("regret", row.regret, 0.05),
            ("gated_split", "healthy" | "random_walk" | "regimes" | "failures") => hold("regret", row.regret, -0.20),
            ("gated_split", "s3_like") => hold("regret", row.regret, -0.12),
            (_, "contended_s3_like") => {
                let recompute_s = rows
                    .iter()
                    .find(|other| other.world == row.world && other.plan == "recompute");
                let share = row.ttft_mean_s / recompute_s.map_or(f64::NAN, |recompute| recompute.ttft_mean_s);
                hold("ttft_mean_s over that of recompute", share, 0.6);
            }
            _ => {}
        }
    }
    beyond
}
