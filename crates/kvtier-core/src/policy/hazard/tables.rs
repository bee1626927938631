//! What was learned: how often, by class and age, a visit was followed by another.

use super::ages::{BINS, EDGES, SECOND, bin_of, width};
use super::class::{ANSWER, CLASSES, Class, FEATURES, VALUES, VALUES_MAX};

/// Ages at which a feature may mean something else: within a minute, within nine, later.
pub(super) const PHASES: usize = 3;
const PHASE_ENDS: [f64; PHASES - 1] = [60.0, 500.0];
/// Sweeps over baseline and factors in one fit; the last fit's values are where the next one starts.
const SWEEPS: usize = 2;
/// Visits that the prior of the baseline counts as, in each bin.
const PRIOR_VISITS: f64 = 8.0;
/// Prior of the baseline: this share of what is left comes back in each e-fold of age, older than ten seconds; past five
/// minutes ever less.
const PRIOR_SHARE: f64 = 0.15;
const PRIOR_OFFSET_SECONDS: f64 = 10.0;
const PRIOR_PAUSE_SECONDS: f64 = 300.0;
/// Returns that pull a factor to what is less particular.
pub(super) const PRIOR_RETURNS: f64 = 30.0;
/// The same of the last phase, when few return: who seldom returns soon need not return late more seldom than others, so age
/// decides until much is known.
const PRIOR_RETURNS_LATE: f64 = 300.0;
/// But for how long the answer was: where that is known it says most about who returns late.
const PRIOR_RETURNS_LATE_OF_ANSWER: f64 = 10.0;
/// The unfinished last block of a prompt comes back this much more rarely, as long as nothing is known.
const PARTIAL_SHARE: f64 = 0.1;
/// The same of what a visit left behind.
const LEFT_SHARE: f64 = 0.1;
/// Past this weight of returns and expiries everything learned counts half, so that the tables follow a change.
const WEIGHT_MAX: f64 = 65_536.0;

const UNKNOWN: i16 = i16::MIN;
const NONE: u16 = u16::MAX;

/// Counts of one class by age.
#[derive(Clone, Debug)]
pub(super) struct Counts {
    /// Returns, as shares of a visit.
    pub(super) returns: [f32; BINS],
    /// Visits times ticks at risk of a return.
    pub(super) at_risk: [f32; BINS],
}

#[derive(Clone, Debug)]
struct Row {
    class: Class,
    counts: Counts,
    /// Visits that are in this bin now, and the sum of when each entered it.
    open: [f32; BINS],
    entered: [f64; BINS],
    /// Levels as of the last fit, [`UNKNOWN`] until asked for.
    levels: [i16; BINS],
}

/// Counts by class, and the model that is fitted to them.
///
/// The hazard of a class is a baseline by age times a factor for each feature and phase. So a class that was hardly seen
/// borrows from all that share a property with it.
#[derive(Debug)]
pub(super) struct Tables {
    rows: Vec<Row>,
    row_of: Box<[u16]>,
    baseline: [f64; BINS],
    factors: [[[f64; PHASES]; VALUES_MAX]; FEATURES],
    /// Returns and visits that ended, since the last halving.
    weight: f64,
}

impl Tables {
    pub(super) fn new() -> Tables {
        let mut tables = Tables {
            rows: Vec::new(),
            row_of: vec![NONE; CLASSES].into_boxed_slice(),
            baseline: [0.0; BINS],
            factors: [[[1.0; PHASES]; VALUES_MAX]; FEATURES],
            weight: 0.0,
        };
        tables.fit(0);
        tables
    }

    fn row(&mut self, class: Class) -> &mut Row {
        let place = &mut self.row_of[usize::from(class.0)];
        if *place == NONE {
            *place = self.rows.len() as u16;
            self.rows.push(Row {
                class,
                counts: Counts {
                    returns: [0.0; BINS],
                    at_risk: [0.0; BINS],
                },
                open: [0.0; BINS],
                entered: [0.0; BINS],
                levels: [UNKNOWN; BINS],
            });
        }
        &mut self.rows[usize::from(*place)]
    }

    /// A visit, or this share of it, is in the bin from `entered` on.
    pub(super) fn enter(&mut self, class: Class, bin: usize, share: f32, entered: u64) {
        let row = self.row(class);
        row.open[bin] += share;
        row.entered[bin] += f64::from(share) * entered as f64;
    }

    /// What [`Tables::enter`] said holds no more; nothing was learned from it.
    pub(super) fn withdraw(&mut self, class: Class, bin: usize, share: f32, entered: u64) {
        self.enter(class, bin, -share, entered);
    }

    /// A share of a visit was at risk for so many ticks in this bin and left it, by growing older or by a return.
    pub(super) fn observe(&mut self, class: Class, bin: usize, share: f32, ticks: f64, returned: bool) {
        let row = self.row(class);
        row.counts.at_risk[bin] += (f64::from(share) * ticks) as f32;
        if returned {
            row.counts.returns[bin] += share;
            self.weight += f64::from(share);
        }
    }

    /// A share of a visit will not be watched any more.
    pub(super) fn lose(&mut self, share: f32) {
        self.weight += f64::from(share);
    }

    /// Fits baseline and factors to what was counted until `now`.
    pub(super) fn fit(&mut self, now: u64) {
        if self.weight > WEIGHT_MAX {
            self.weight /= 2.0;
            for row in &mut self.rows {
                row.counts.halve();
            }
        }
        let seen: Vec<Seen> = self
            .rows
            .iter()
            .filter(|row| row.class.is_conversation())
            .map(|row| Seen::of(row, now))
            .collect();
        for _ in 0..SWEEPS {
            self.fit_baseline(&seen);
            for feature in 0..FEATURES {
                self.fit_factor(feature, &seen);
            }
        }
        for row in &mut self.rows {
            row.levels = [UNKNOWN; BINS];
        }
    }

    fn fit_baseline(&mut self, seen: &[Seen]) {
        let mut returns = [0.0; BINS];
        let mut at_risk = [0.0; BINS];
        for row in seen {
            let factors = self.product(&row.values, FEATURES);
            for bin in 0..BINS {
                returns[bin] += row.returns[bin];
                at_risk[bin] += row.at_risk[bin] * factors[phase(bin)];
            }
        }
        for bin in 0..BINS {
            let prior_risk = PRIOR_VISITS * width(bin);
            self.baseline[bin] = (returns[bin] + prior_risk * prior(bin)) / (at_risk[bin] + prior_risk);
        }
    }

    fn fit_factor(&mut self, feature: usize, seen: &[Seen]) {
        let mut returns = [[0.0; PHASES]; VALUES_MAX];
        let mut expected = [[0.0; PHASES]; VALUES_MAX];
        for row in seen {
            let value = row.values[feature];
            let others = self.product(&row.values, feature);
            for bin in 0..BINS {
                let phase = phase(bin);
                returns[value][phase] += row.returns[bin];
                expected[value][phase] += row.at_risk[bin] * self.baseline[bin] * others[phase];
            }
        }
        let late = if feature == ANSWER {
            PRIOR_RETURNS_LATE_OF_ANSWER
        } else {
            PRIOR_RETURNS_LATE
        };
        for value in 0..VALUES[feature] {
            let ratio =
                |returns: f64, expected: f64, weight: f64, prior: f64| (returns + weight * prior) / (expected + weight);
            let (all, all_expected) = (returns[value].iter().sum(), expected[value].iter().sum());
            let overall = ratio(all, all_expected, PRIOR_RETURNS, 1.0);
            for phase in 0..PHASES {
                let is_last = phase + 1 == PHASES;
                let (weight, prior) = if is_last { (late, 1.0) } else { (PRIOR_RETURNS, overall) };
                let (returns, expected) = (returns[value][phase], expected[value][phase]);
                self.factors[feature][value][phase] = ratio(returns, expected, weight, prior);
            }
        }
    }

    /// The factors of all features but one, multiplied, in each phase.
    fn product(&self, values: &[usize; FEATURES], but: usize) -> [f64; PHASES] {
        let mut product = [1.0; PHASES];
        for (feature, value) in values.iter().enumerate().filter(|(feature, _)| *feature != but) {
            for (factor, by) in product.iter_mut().zip(&self.factors[feature][*value]) {
                *factor *= by;
            }
        }
        product
    }

    /// Returns in a tick for each visit of this age that is left.
    fn hazards(&self, row: &Row, from: usize) -> [f64; BINS] {
        let mut hazards = [0.0; BINS];
        let factors = if row.class.is_conversation() {
            self.product(&row.class.values(), FEATURES)
        } else if row.class == Class::PARTIAL {
            [PARTIAL_SHARE; PHASES]
        } else if row.class == Class::LEFT {
            [LEFT_SHARE; PHASES]
        } else {
            [1.0; PHASES]
        };
        for bin in from..BINS {
            let model = self.baseline[bin] * factors[phase(bin)];
            hazards[bin] = if row.class.is_conversation() {
                model
            } else {
                let prior_risk = PRIOR_VISITS * width(bin);
                let returns = f64::from(row.counts.returns[bin]);
                (returns + prior_risk * model) / (f64::from(row.counts.at_risk[bin]) + prior_risk)
            };
        }
        hazards
    }

    /// The level of a visit of this class in this bin of age: what goes first has the lowest. The caller sees to it that it is one.
    pub(super) fn level(&mut self, class: Class, bin: usize) -> i16 {
        let known = self.row(class).levels[bin];
        if known != UNKNOWN {
            return known;
        }
        let row = &self.rows[usize::from(self.row_of[usize::from(class.0)])];
        let level = level_of(worth(&self.hazards(row, bin), bin));
        self.row(class).levels[bin] = level;
        level
    }

    /// Returns in a tick for each visit of a conversation of this class and bin, as the model of all has it.
    pub(super) fn hazard(&self, class: Class, bin: usize) -> f64 {
        self.baseline[bin] * self.product(&class.values(), FEATURES)[phase(bin)]
    }

    /// The share of visits of this class and bin that return within so many ticks, if they do `factor` times as often as the class says.
    pub(super) fn return_share(&mut self, class: Class, bin: usize, ticks: u32, factor: f64) -> f64 {
        self.row(class);
        let row = &self.rows[usize::from(self.row_of[usize::from(class.0)])];
        let hazards = self.hazards(row, bin);
        let end = EDGES[bin].saturating_add(ticks);
        let mut left = 1.0;
        for (at, hazard) in hazards.iter().enumerate().take(bin_of(end) + 1).skip(bin) {
            let spent = f64::from(end.min(EDGES[at + 1]) - EDGES[at].max(EDGES[bin]));
            left /= 1.0 + factor * hazard * spent;
        }
        1.0 - left
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        (self.rows.capacity() * size_of::<Row>() + self.row_of.len() * size_of::<u16>()) as u64
    }

    /// Counts by class, in order of class.
    pub(super) fn counts(&self) -> impl Iterator<Item = (Class, &Counts)> {
        let rows = self.row_of.iter().filter(|row| **row != NONE);
        rows.map(|row| {
            let row = &self.rows[usize::from(*row)];
            (row.class, &row.counts)
        })
    }

    /// Adds counts that were made elsewhere or earlier.
    pub(super) fn add(&mut self, class: Class, counts: &Counts) {
        let row = self.row(class);
        row.counts.add(counts);
        self.weight += counts.returns.iter().copied().map(f64::from).sum::<f64>();
    }
}

impl Counts {
    pub(super) fn add(&mut self, other: &Counts) {
        for (count, more) in self.returns.iter_mut().zip(other.returns) {
            *count += more;
        }
        for (count, more) in self.at_risk.iter_mut().zip(other.at_risk) {
            *count += more;
        }
    }

    /// Visits times ticks that they were watched.
    pub(super) fn ticks(&self) -> f32 {
        self.at_risk.iter().sum()
    }

    fn halve(&mut self) {
        for count in self.returns.iter_mut().chain(&mut self.at_risk) {
            *count /= 2.0;
        }
    }
}

/// A row as the fit sees it: with what is open counted until now.
struct Seen {
    values: [usize; FEATURES],
    returns: [f64; BINS],
    at_risk: [f64; BINS],
}

impl Seen {
    fn of(row: &Row, now: u64) -> Seen {
        let mut seen = Seen {
            values: row.class.values(),
            returns: row.counts.returns.map(f64::from),
            at_risk: row.counts.at_risk.map(f64::from),
        };
        for bin in 0..BINS {
            let open = f64::from(row.open[bin]) * now as f64 - row.entered[bin];
            seen.at_risk[bin] += open.max(0.0);
        }
        seen
    }
}

pub(super) fn phase(bin: usize) -> usize {
    let age = f64::from(EDGES[bin]) / SECOND;
    PHASE_ENDS.iter().take_while(|end| age >= **end).count()
}

fn prior(bin: usize) -> f64 {
    let age = f64::from(EDGES[bin]) / SECOND;
    let pauses = age / PRIOR_PAUSE_SECONDS;
    PRIOR_SHARE / ((age + PRIOR_OFFSET_SECONDS) * (1.0 + pauses * pauses.sqrt())) / SECOND
}

/// The most returns that a place yields in a tick, over all times to wait: sup over h of P(return within h) / E[time spent
/// until then]. (Gittins' index of a job that may be given up.)
fn worth(hazards: &[f64; BINS], from: usize) -> f64 {
    let (mut left, mut time, mut best) = (1.0, 0.0, 0.0_f64);
    for (bin, hazard) in hazards.iter().enumerate().skip(from) {
        // Who is asked about is half-way through the bin.
        let ticks = if bin == from { width(bin) / 2.0 } else { width(bin) };
        let after = left / (1.0 + hazard * ticks);
        time += ticks * f64::midpoint(left, after);
        left = after;
        best = best.max((1.0 - left) / time);
    }
    best
}

/// Eight levels an octave, counted from 2^-40 returns in a tick; below that it is negative. What is no number is the least.
fn level_of(worth: f64) -> i16 {
    let bits = (worth as f32).to_bits();
    // Exponent and the first three bits after the point.
    (i64::from(bits >> 20) - (127 - 40) * 8) as i16
}

#[cfg(test)]
mod tests;
