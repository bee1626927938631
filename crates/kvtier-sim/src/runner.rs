//! Runs worlds, one seed after the other, and tells what was found.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

use crate::counts::Counts;
use crate::plan::Plan;
use crate::world::World;

/// How to run seeds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunOptions {
    /// Keep the last things that happened, to read.
    pub log: bool,
    /// A bug to plant.
    #[cfg(feature = "mutants")]
    pub mutant: Option<kvtier_core::Mutant>,
}

impl RunOptions {
    /// The same run, keeping the last things that happen.
    #[must_use]
    pub fn logged(mut self) -> RunOptions {
        self.log = true;
        self
    }
}

/// What became of one seed.
#[derive(Clone, Debug, Default)]
pub struct SeedOutcome {
    /// Of every action with its time: equal for equal seeds.
    pub trace_hash: u64,
    /// Actions in the trace.
    pub actions: u64,
    /// What occurred.
    pub counts: Counts,
    /// The rule that was broken, in words; `None` where all held.
    pub finding: Option<String>,
    /// The last things that happened, with [`RunOptions::log`].
    pub log: Vec<String>,
}

/// Runs one world. A panic inside it is a finding like any other.
#[must_use]
pub fn run_seed(seed: u64, options: RunOptions) -> SeedOutcome {
    let adjust = move |plan: &mut Plan| plant(plan, options);
    let mut world = match World::new(seed, &adjust, options.log) {
        Ok(world) => world,
        Err(finding) => {
            return SeedOutcome {
                finding: Some(finding.0),
                ..SeedOutcome::default()
            };
        }
    };
    let lived = quietly(|| world.live());
    let finding = match lived {
        Ok(Ok(())) => None,
        Ok(Err(finding)) => Some(finding.0),
        Err(text) => Some(format!("panic: {text}")),
    };
    SeedOutcome {
        trace_hash: world.trace_hash,
        actions: world.actions,
        counts: world.tally.counts(),
        finding,
        log: world.log.take().map(Vec::from).unwrap_or_default(),
    }
}

#[cfg(feature = "mutants")]
fn plant(plan: &mut Plan, options: RunOptions) {
    plan.settings.mutant = options.mutant;
}

#[cfg(not(feature = "mutants"))]
fn plant(_plan: &mut Plan, _options: RunOptions) {}

thread_local! {
    /// This thread runs a world: its panics are findings, reported as such.
    static LAST_PANIC: std::cell::RefCell<Option<Option<String>>> = const { std::cell::RefCell::new(None) };
}

/// Keeps panics of worlds off the terminal; all others are reported as before.
fn hush_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |report| {
            let ours = LAST_PANIC.with(|last| {
                let mut last = last.borrow_mut();
                last.as_mut()
                    .map(|text| *text = Some(report.to_string().replace('\n', " ")))
                    .is_some()
            });
            if !ours {
                before(report);
            }
        }));
    });
}

/// Runs a world; a panic inside it is handed back in words.
pub(crate) fn quietly<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    hush_panics();
    LAST_PANIC.with(|last| *last.borrow_mut() = Some(None));
    let outcome = panic::catch_unwind(AssertUnwindSafe(run));
    let text = LAST_PANIC.with(|last| last.borrow_mut().take()).flatten();
    outcome.map_err(|_| text.unwrap_or_else(|| "without a message".to_owned()))
}

/// What became of many seeds.
#[derive(Clone, Debug, Default)]
pub struct RunReport {
    /// Seeds run.
    pub seeds: u64,
    /// Actions of all worlds.
    pub actions: u64,
    /// What occurred in all worlds.
    pub counts: Counts,
    /// The first seed that broke a rule.
    pub failed: Option<(u64, SeedOutcome)>,
}

/// One seed in this many is run twice, to see that it acts the same.
const REPLAY_EVERY: u64 = 50;

/// Runs `seeds` until one breaks a rule. `progress` is told how many have been run.
pub fn run_seeds(seeds: std::ops::Range<u64>, options: RunOptions, progress: &mut dyn FnMut(u64)) -> RunReport {
    let mut report = RunReport::default();
    for seed in seeds {
        let mut outcome = run_seed(seed, options);
        if outcome.finding.is_none() && report.seeds.is_multiple_of(REPLAY_EVERY) {
            let again = run_seed(seed, options);
            if again.trace_hash != outcome.trace_hash {
                outcome.finding = Some(format!(
                    "not deterministic: the trace hash is {:#018x}, then {:#018x}",
                    outcome.trace_hash, again.trace_hash
                ));
            }
        }
        report.seeds += 1;
        report.actions += outcome.actions;
        report.counts.add(&outcome.counts);
        progress(report.seeds);
        if outcome.finding.is_some() {
            // Once more with a log: the world is the same, only watched more closely.
            let logged = run_seed(seed, options.logged());
            outcome.log = logged.log;
            report.failed = Some((seed, outcome));
            break;
        }
    }
    report
}

/// How a planted bug was found.
#[cfg(feature = "mutants")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MutantOutcome {
    /// The bug.
    pub name: &'static str,
    /// The seed that shows it, and the rule it breaks there; `None` where none did.
    pub found: Option<(u64, String)>,
    /// Seeds run.
    pub seeds: u64,
}

/// The first of `seeds_max` seeds from `first` on that finds the bug of this name; `None` for a name that no bug has.
#[cfg(feature = "mutants")]
#[must_use]
pub fn find_mutant(name: &str, first: u64, seeds_max: u64) -> Option<MutantOutcome> {
    let (name, mutant) = kvtier_core::Mutant::ALL
        .iter()
        .find(|(known, _)| *known == name)
        .copied()?;
    let options = RunOptions {
        mutant: Some(mutant),
        log: false,
    };
    let report = (first..first + seeds_max)
        .map(|seed| (seed, run_seed(seed, options)))
        .find(|(_, outcome)| outcome.finding.is_some());
    Some(match report {
        Some((seed, outcome)) => MutantOutcome {
            name,
            found: outcome.finding.map(|finding| (seed, finding)),
            seeds: seed - first + 1,
        },
        None => MutantOutcome {
            name,
            found: None,
            seeds: seeds_max,
        },
    })
}

/// The last things that happen in a world with the bug of this name.
#[cfg(feature = "mutants")]
pub(crate) fn read_along(name: &str, seed: u64) -> Vec<String> {
    let mutant = kvtier_core::Mutant::ALL
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, mutant)| *mutant);
    run_seed(seed, RunOptions { log: true, mutant }).log
}
