use super::counts::ClusterCounts;
use super::plan::Plan;
use super::world::World;
use crate::runner::quietly;

/// How to run seeds of the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterOptions {
    /// Keep the last things that happened, to read.
    pub log: bool,
    /// A bug to plant.
    #[cfg(feature = "mutants")]
    pub mutant: Option<kvtier_core::cluster::ClusterMutant>,
}

impl ClusterOptions {
    /// The same run, keeping the last things that happen.
    #[must_use]
    pub fn logged(mut self) -> ClusterOptions {
        self.log = true;
        self
    }
}

/// What became of one seed.
#[derive(Clone, Debug, Default)]
pub struct ClusterOutcome {
    /// Of every action with its time: equal for equal seeds.
    pub trace_hash: u64,
    /// Actions in the trace.
    pub actions: u64,
    /// What occurred.
    pub counts: ClusterCounts,
    /// The rule that was broken, in words; `None` where all held.
    pub finding: Option<String>,
    /// The last things that happened, with [`ClusterOptions::log`].
    pub log: Vec<String>,
}

/// Runs one world. A panic inside it is a finding like any other.
#[must_use]
pub fn run_cluster_seed(seed: u64, options: ClusterOptions) -> ClusterOutcome {
    let adjust = move |plan: &mut Plan| plant(plan, options);
    let mut world = World::new(seed, &adjust, options.log);
    let finding = match quietly(|| world.live()) {
        Ok(Ok(())) => None,
        Ok(Err(finding)) => Some(finding.0),
        Err(text) => Some(format!("panic: {text}")),
    };
    ClusterOutcome {
        trace_hash: world.trace_hash,
        actions: world.actions,
        counts: world.counts.clone(),
        finding,
        log: world.log.take().map(Vec::from).unwrap_or_default(),
    }
}

#[cfg(feature = "mutants")]
fn plant(plan: &mut Plan, options: ClusterOptions) {
    plan.settings.mutant = options.mutant;
}

#[cfg(not(feature = "mutants"))]
fn plant(_plan: &mut Plan, _options: ClusterOptions) {}

/// What became of many seeds.
#[derive(Clone, Debug, Default)]
pub struct ClusterReport {
    /// Seeds run.
    pub seeds: u64,
    /// Actions of all worlds.
    pub actions: u64,
    /// What occurred in all worlds.
    pub counts: ClusterCounts,
    /// The first seed that broke a rule.
    pub failed: Option<(u64, ClusterOutcome)>,
}

/// One seed in this many is run twice, to see that it acts the same.
const REPLAY_EVERY: u64 = 50;

/// Runs `seeds` until one breaks a rule. `progress` is told how many have been run.
pub fn run_cluster_seeds(
    seeds: std::ops::Range<u64>,
    options: ClusterOptions,
    progress: &mut dyn FnMut(u64),
) -> ClusterReport {
    let mut report = ClusterReport::default();
    for seed in seeds {
        let mut outcome = run_cluster_seed(seed, options);
        if outcome.finding.is_none() && report.seeds.is_multiple_of(REPLAY_EVERY) {
            let again = run_cluster_seed(seed, options);
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
            // Once more with a log: the world is the same, only watched.
            outcome.log = run_cluster_seed(seed, options.logged()).log;
            report.failed = Some((seed, outcome));
            break;
        }
    }
    report
}

/// The first of `seeds_max` seeds from `first` on that finds the bug of this name; `None` for a name that no bug has.
#[cfg(feature = "mutants")]
#[must_use]
pub fn find_cluster_mutant(name: &str, first: u64, seeds_max: u64) -> Option<crate::MutantOutcome> {
    let (name, mutant) = kvtier_core::cluster::ClusterMutant::ALL
        .iter()
        .find(|(known, _)| *known == name)
        .copied()?;
    let options = ClusterOptions {
        mutant: Some(mutant),
        log: false,
    };
    let found = (first..first + seeds_max).find_map(|seed| Some((seed, run_cluster_seed(seed, options).finding?)));
    Some(crate::MutantOutcome {
        name,
        seeds: found.as_ref().map_or(seeds_max, |(seed, _)| seed - first + 1),
        found,
    })
}
