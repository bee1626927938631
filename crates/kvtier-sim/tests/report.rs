//! The report: what it says, and when it fails.

use kvtier_sim::cli::{Failure, SimArgs, run};

fn report(args: &SimArgs) -> (Result<(), Failure>, String) {
    let mut text = Vec::new();
    let outcome = run(args, &mut text, &mut std::io::sink());
    (outcome, String::from_utf8(text).expect("reports are text"))
}

#[test]
fn a_report_counts_every_action_event_answer_and_fault() {
    let (outcome, text) = report(&SimArgs {
        seeds: 3,
        first: 20,
        ..SimArgs::default()
    });
    assert!(outcome.is_ok(), "{text}");
    for line in [
        "action  promote",
        "event   corrupt",
        "answer  sealed_published",
        "fault   client_stalled",
        "3 seeds, ",
    ] {
        assert!(text.contains(line), "no {line:?} in\n{text}");
    }
}

#[test]
fn a_report_for_programs_is_one_object() {
    let (outcome, text) = report(&SimArgs {
        seeds: 2,
        json: true,
        ..SimArgs::default()
    });
    assert!(outcome.is_ok(), "{text}");
    let value: serde_json::Value = serde_json::from_str(&text).expect("one JSON object");
    assert_eq!(value["seeds"], 2);
    assert_eq!(value["passed"], true);
    assert!(value["counts"]["action"]["demote"].is_u64(), "{text}");
}

#[test]
fn a_mutant_that_does_not_exist_is_a_wrong_argument() {
    let (outcome, _) = report(&SimArgs {
        seeds: 1,
        mutant: Some("no_such_bug".to_owned()),
        ..SimArgs::default()
    });
    assert!(matches!(outcome, Err(Failure::Usage(_))));
}
