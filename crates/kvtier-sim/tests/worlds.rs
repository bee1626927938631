//! Worlds through the public face: a hundred seeds, the same seed twice, and those that once broke a rule.

use kvtier_sim::{RunOptions, run_seed, run_seeds};

/// Seeds that found a bug, each kept with the fix of it. They are cheap: none is ever taken out.
const REGRESSIONS: &[u64] = &[
    5, 20, 24, 226, 374, 375, 706, 901, 2745, 3394, 3766, 5427, 7426, 9441, 11_792, 15_000, 15_590, 18_178, 27_232,
    30_890, 34_783,
];

#[test]
fn a_hundred_worlds_keep_every_rule() {
    let report = run_seeds(0..100, RunOptions::default(), &mut |_| {});
    if let Some((seed, outcome)) = report.failed {
        panic!(
            "seed {seed}: {}\n{}",
            outcome.finding.unwrap_or_default(),
            outcome.log.join("\n")
        );
    }
}

#[test]
fn worlds_that_once_broke_a_rule_keep_it_now() {
    for seed in REGRESSIONS {
        let outcome = run_seed(*seed, RunOptions::default());
        assert_eq!(outcome.finding, None, "seed {seed}");
    }
}

#[test]
fn the_same_seed_lives_the_same_life() {
    for seed in 0..5 {
        let (once, again) = (
            run_seed(seed, RunOptions::default()),
            run_seed(seed, RunOptions::default().logged()),
        );
        assert_eq!(
            (once.trace_hash, once.actions, once.counts),
            (again.trace_hash, again.actions, again.counts),
            "seed {seed}"
        );
        assert!(!again.log.is_empty());
    }
    assert_ne!(
        run_seed(0, RunOptions::default()).trace_hash,
        run_seed(1, RunOptions::default()).trace_hash
    );
}

#[cfg(feature = "mutants")]
#[test]
fn a_planted_bug_is_found_and_an_unknown_one_is_refused() {
    let outcome = kvtier_sim::find_mutant("seal_before_write", 0, 200).expect("it has that name");
    assert!(outcome.found.is_some(), "not found in {} seeds", outcome.seeds);
    assert_eq!(kvtier_sim::find_mutant("no_such_bug", 0, 1), None);
}
