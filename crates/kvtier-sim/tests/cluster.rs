//! Worlds of the cluster through the public face: some hundred seeds, the same seed twice, and every planted bug.

use kvtier_sim::cluster::{ClusterOptions, run_cluster_seed, run_cluster_seeds};

/// Seeds that found a bug, each kept with the fix of it. They are cheap: none is ever taken out.
const REGRESSIONS: &[u64] = &[104_281];

#[test]
fn worlds_that_once_broke_a_rule_keep_it_now() {
    for seed in REGRESSIONS {
        let outcome = run_cluster_seed(*seed, ClusterOptions::default());
        assert_eq!(outcome.finding, None, "seed {seed}");
    }
}

#[test]
fn every_world_keeps_every_rule_and_everything_occurs() {
    let report = run_cluster_seeds(0..500, ClusterOptions::default(), &mut |_| {});
    if let Some((seed, outcome)) = report.failed {
        panic!(
            "seed {seed}: {}\n{}",
            outcome.finding.unwrap_or_default(),
            outcome.log.join("\n")
        );
    }
    assert_eq!(report.counts.missing(), [""; 0], "\n{}", report.counts.table());
}

#[test]
fn the_same_seed_lives_the_same_life() {
    for seed in 0..5 {
        let (once, again) = (
            run_cluster_seed(seed, ClusterOptions::default()),
            run_cluster_seed(seed, ClusterOptions::default().logged()),
        );
        assert_eq!(
            (once.trace_hash, once.actions, once.counts),
            (again.trace_hash, again.actions, again.counts),
            "seed {seed}"
        );
        assert!(!again.log.is_empty());
    }
    assert_ne!(
        run_cluster_seed(0, ClusterOptions::default()).trace_hash,
        run_cluster_seed(1, ClusterOptions::default()).trace_hash
    );
}

#[cfg(feature = "mutants")]
#[test]
fn every_planted_bug_is_found_and_an_unknown_one_is_refused() {
    for (name, _) in kvtier_core::cluster::ClusterMutant::ALL {
        let outcome = kvtier_sim::cluster::find_cluster_mutant(name, 0, 5000).expect("it has that name");
        assert!(
            outcome.found.is_some(),
            "{name} is not found in {} seeds",
            outcome.seeds
        );
    }
    assert_eq!(kvtier_sim::cluster::find_cluster_mutant("no_such_bug", 0, 1), None);
}
