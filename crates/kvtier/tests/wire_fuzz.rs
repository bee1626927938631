//! The mutation loop itself: it decodes enough, finds nothing, and finds the planted bug.
#![cfg(feature = "fuzz")]

use kvtier::wire::fuzz;

#[test]
fn a_third_of_the_inputs_decode_and_nothing_is_found() {
    let report = fuzz::run(1, 2.0, false);
    assert_eq!(report.finding, None);
    assert!(
        report.executions > 0 && report.decoded * 3 >= report.executions,
        "{report:?}"
    );
}

#[cfg(feature = "mutants")]
#[test]
fn the_planted_bug_is_found() {
    for seed in 0..3 {
        let report = fuzz::run(seed, 60.0, true);
        assert!(report.finding.is_some(), "seed {seed}: {} inputs", report.executions);
    }
}
