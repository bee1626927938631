use std::fmt::{self, Write as _};

use serde::Serialize;

use crate::cache::READERS;
use crate::engine::Engine;
use crate::once::{Once, Part};
use crate::values::VALUE_BYTES;

/// One line of the answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    /// `read` or `write`.
    pub(crate) case: &'static str,
    pub(crate) engine: &'static str,
    pub(crate) encryption: &'static str,
    /// Of each value.
    pub(crate) bytes: usize,
    /// Readers, or writers.
    pub(crate) readers: usize,
    /// 10^9 bytes a second of values that were there afterwards: median over rounds.
    pub(crate) gbps: f64,
    /// Rate by that of the better of foyer's two engines in the same round: median over rounds. `None` without foyer.
    pub(crate) ratio_to_foyer: Option<f64>,
    /// CPU seconds of the process for 10^9 bytes: median over rounds.
    pub(crate) cpu_s_per_gb: f64,
    /// Over all rounds.
    pub(crate) keys_put: usize,
    /// Over all rounds: those whose value was read and is right.
    pub(crate) keys_readable: usize,
    /// Over all rounds and all that was read.
    pub(crate) wrong_bytes: usize,
    pub(crate) rounds: usize,
}

/// What one engine did in every round.
pub(crate) type Rounds = (Engine, Vec<Once>);

#[derive(Clone, Copy)]
enum Case {
    Read,
    Write,
}

impl Case {
    fn part(self, once: &Once) -> Part {
        match self {
            Case::Read => once.read,
            Case::Write => once.write,
        }
    }

    fn rate(self, once: &Once) -> f64 {
        once.gigabytes() / self.part(once).seconds
    }
}

impl Once {
    /// Of values that were there afterwards.
    fn gigabytes(&self) -> f64 {
        (self.tally.right * VALUE_BYTES) as f64 / 1e9
    }
}

/// Reads first, in the order of the engines.
pub(crate) fn rows(measured: &[Rounds]) -> Vec<Row> {
    [Case::Read, Case::Write]
        .into_iter()
        .flat_map(|case| {
            let rates = |rounds: &[Once]| rounds.iter().map(|once| case.rate(once)).collect::<Vec<_>>();
            let best = measured
                .iter()
                .filter(|(engine, _)| engine.is_rival())
                .map(|(_, rounds)| rates(rounds))
                .max_by(|one, other| median(one.clone()).total_cmp(&median(other.clone())));
            measured
                .iter()
                .map(move |(engine, rounds)| row(case, *engine, rounds, best.as_deref()))
        })
        .collect()
}

fn row(case: Case, engine: Engine, rounds: &[Once], best: Option<&[f64]>) -> Row {
    let ratios = |best: &[f64]| {
        rounds
            .iter()
            .zip(best)
            .map(|(once, best)| case.rate(once) / best)
            .collect()
    };
    let sum = |figure: fn(&Once) -> usize| rounds.iter().map(figure).sum::<usize>();
    Row {
        case: match case {
            Case::Read => "read",
            Case::Write => "write",
        },
        engine: engine.name(),
        encryption: engine.encryption(),
        bytes: VALUE_BYTES,
        readers: READERS,
        gbps: median(rounds.iter().map(|once| case.rate(once)).collect()),
        ratio_to_foyer: best.map(|best| median(ratios(best))),
        cpu_s_per_gb: median(
            rounds
                .iter()
                .map(|once| case.part(once).cpu_seconds / once.gigabytes())
                .collect(),
        ),
        keys_put: sum(|once| once.tally.right + once.tally.wrong + once.tally.absent),
        keys_readable: sum(|once| once.tally.right),
        wrong_bytes: sum(|once| once.tally.wrong + once.wrong_again) * VALUE_BYTES,
        rounds: rounds.len(),
    }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match figures.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => figures[middle],
        _ => f64::midpoint(figures[middle - 1], figures[middle]),
    }
}

/// The rows, for people.
pub(crate) struct Table<'a>(pub(crate) &'a [Row]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:5}  {:14}  {:11}  {:>5}  {:>8}  {:>8}  {:>9}  {:>9}  {:>6}",
            "case", "engine", "encryption", "GB/s", "to foyer", "CPU s/GB", "keys put", "readable", "wrong"
        )?;
        for row in self.0 {
            let mut ratio = String::new();
            match row.ratio_to_foyer {
                Some(figure) => write!(ratio, "{figure:.2}")?,
                None => ratio.push('-'),
            }
            writeln!(
                f,
                "{:5}  {:14}  {:11}  {:5.2}  {ratio:>8}  {:8.2}  {:9}  {:9}  {:6}",
                row.case,
                row.engine,
                row.encryption,
                row.gbps,
                row.cpu_s_per_gb,
                row.keys_put,
                row.keys_readable,
                row.wrong_bytes
            )?;
        }
        Ok(())
    }
}

/// The promised figures, and whether they are met. For people, never for a test.
pub(crate) fn verdicts(rows: &[Row]) -> Vec<String> {
    rows.iter()
        .filter(|row| row.engine == Engine::Kvtier.name())
        .filter_map(|row| {
            let limit = if row.case == "read" { 2.0 } else { 1.5 };
            let ratio = row.ratio_to_foyer?;
            let verdict = if ratio >= limit { "meets" } else { "MISSES" };
            Some(format!(
                "{verdict}: {} {}: {ratio:.2} of foyer's rate (at least {limit:.1})",
                row.case, row.encryption
            ))
        })
        .collect()
}
