use proptest::prelude::*;

use crate::Time;
use crate::cost::{
    BackendId, BackendProfile, Candidate, CostModel, Decision, FetchId, FetchPlan, GateMode, GateReason, GateSettings,
    Patience, Question, Reason, RecomputeCoefficients,
};

const GPU: RecomputeCoefficients = RecomputeCoefficients {
    overhead_s: 12e-3,
    s_per_token: 70e-6,
    s_per_pair: 1.3e-9,
};

const KV: u64 = 327_680;

fn at(seconds: f64) -> Time {
    Time((seconds * 1e9) as u64)
}

fn question(tokens: u32) -> Question {
    Question {
        prompt_tokens: tokens,
        local_prefix_tokens: 0,
        block_tokens: 16,
        kv_bytes_per_token: KV,
        queue_wait_s: 0.0,
        can_split: false,
    }
}

/// A model with a backend of this bandwidth, measured by a probe at the origin and opened by one request.
fn measured(bytes_per_s: f64) -> (CostModel, BackendId) {
    let mut model = CostModel::new(GPU);
    let backend = model
        .add_backend(BackendProfile::default(), GateSettings::default())
        .unwrap();
    let (probed, probe) = model.poll_probe(at(0.0)).expect("a probe of the unknown");
    assert_eq!(probed, backend);
    model.observe_probed(at(0.1), backend, 3e-3, probe.bytes, probe.bytes as f64 / bytes_per_s);
    (model, backend)
}

fn decide(model: &mut CostModel, now: Time, question: &Question, backend: BackendId, matched: u32) -> Decision {
    model.decide(
        now,
        question,
        &[Candidate {
            backend,
            matched_tokens: matched,
        }],
    )
}

/// Lets a decided fetch arrive in one piece.
fn arrive(model: &mut CostModel, now_s: f64, id: u64, decision: &Decision, took_s: f64) {
    model.begin_fetch(at(now_s), FetchId(id), decision);
    model.observe_lookup(at(now_s + 3e-3), FetchId(id), 3e-3);
    model.observe_progress(at(now_s + took_s), FetchId(id), decision.fetch_bytes, took_s - 3e-3);
    model.observe_fetched(at(now_s + took_s), FetchId(id), took_s);
}

#[test]
fn a_fast_backend_is_fetched_from_and_a_slow_one_is_not() {
    for (bytes_per_s, plan) in [(12e9, FetchPlan::Fetch), (1e9, FetchPlan::Recompute)] {
        let (mut model, backend) = measured(bytes_per_s);
        let decision = decide(&mut model, at(0.2), &question(8_192), backend, 8_192);
        assert_eq!(decision.plan, plan, "{decision}");
        let candidates = [Candidate {
            backend,
            matched_tokens: 8_192,
        }];
        let explained = model.explain(at(0.3), &question(8_192), &candidates);
        assert_eq!(explained, model.decide(at(0.3), &question(8_192), &candidates));
    }
}

#[test]
fn an_unmeasured_backend_is_not_asked() {
    let mut model = CostModel::new(GPU);
    let backend = model
        .add_backend(
            BackendProfile {
                bytes_per_s: 100e9,
                ..BackendProfile::default()
            },
            GateSettings::default(),
        )
        .unwrap();
    let decision = decide(&mut model, at(0.0), &question(8_192), backend, 8_192);
    assert_eq!(decision.reason, Reason::GateClosed(GateReason::Unmeasured));
    model.set_gate_mode(backend, GateMode::On);
    let decision = decide(&mut model, at(0.0), &question(8_192), backend, 8_192);
    assert_eq!(decision.plan, FetchPlan::Fetch);
}

#[test]
fn a_backend_that_never_pays_on_an_idle_gpu_is_used_where_the_queue_is_long() {
    let (mut model, backend) = measured(1e9);
    for index in 0..100 {
        let decision = decide(&mut model, at(0.2), &question(8_192), backend, 8_192);
        assert_eq!(decision.plan, FetchPlan::Recompute, "{index}: {decision}");
    }
    let waiting = Question {
        queue_wait_s: 5.0,
        ..question(8_192)
    };
    model.observe_probed(at(3.0), backend, 3e-3, 6_000_000, 6e-3);
    let plans: Vec<FetchPlan> = (0..5)
        .map(|_| decide(&mut model, at(3.1), &waiting, backend, 8_192).plan)
        .collect();
    assert_eq!(plans.last(), Some(&FetchPlan::Fetch));
}

#[test]
fn where_a_queue_is_long_a_request_waits_longer_for_the_sake_of_others_and_says_so() {
    let (mut model, backend) = measured(1.5e9);
    model.set_gate_mode(backend, GateMode::On);
    let mut asked = question(8_192);
    decide(&mut model, at(0.2), &asked, backend, 8_192);
    asked.queue_wait_s = 0.6;
    assert_eq!(
        decide(&mut model, at(0.2), &asked, backend, 8_192).plan,
        FetchPlan::Recompute
    );
    asked.queue_wait_s = 1.05;
    let decision = decide(&mut model, at(0.2), &asked, backend, 8_192);
    assert_eq!(decision.reason, Reason::FetchSparesOthers, "{decision}");
    assert!(
        decision.expected_s > decision.recompute_s && decision.saved_s() > 0.0,
        "{decision}"
    );
    // Never for more than two recomputations.
    asked.queue_wait_s = 1e6;
    let decision = decide(&mut model, at(0.2), &asked, backend, 8_192);
    assert!(
        decision.relief_s <= 2.0 * (decision.recompute_s - decision.queue_wait_s) + 1e-9,
        "{decision}"
    );
}

#[test]
fn the_terms_of_a_fetch_add_up_to_what_is_expected_of_it() {
    let (mut model, backend) = measured(12e9);
    let first = decide(&mut model, at(0.2), &question(16_384), backend, 16_384);
    model.begin_fetch(at(0.2), FetchId(1), &first);
    let second = decide(&mut model, at(0.2), &question(65_536), backend, 65_536);
    assert_eq!(second.plan, FetchPlan::Fetch, "{second}");
    assert!(second.terms.queue_s > 0.4, "it stands behind five gigabytes: {second}");
    assert!((second.terms.total_s() - second.expected_s).abs() < 1e-9, "{second}");
    assert!(second.forecast.p50_s <= second.forecast.p90_s && second.forecast.p90_s <= second.forecast.p99_s);
    let text = second.to_string();
    for word in [
        "fetch: fetching is expected to be faster",
        "lookup",
        "queue",
        "transfer",
        "decompression",
        "risk",
    ] {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn a_link_that_became_ten_times_slower_is_believed_after_one_measurement() {
    let (mut model, backend) = measured(12e9);
    for index in 0..20 {
        let now_s = 0.2 + f64::from(index);
        let decision = decide(&mut model, at(now_s), &question(8_192), backend, 8_192);
        arrive(&mut model, now_s, u64::from(index as u32), &decision, 0.23);
    }
    let decision = decide(&mut model, at(21.0), &question(8_192), backend, 8_192);
    assert_eq!(decision.plan, FetchPlan::Fetch);
    arrive(&mut model, 21.0, 100, &decision, 2.3);
    assert_eq!(
        decide(&mut model, at(24.0), &question(8_192), backend, 8_192).plan,
        FetchPlan::Recompute
    );
}

#[test]
fn a_link_that_has_fallen_silent_counts_as_slow_before_its_fetch_ends() {
    let (mut model, backend) = measured(12e9);
    let decision = decide(&mut model, at(0.2), &question(8_192), backend, 8_192);
    model.begin_fetch(at(0.2), FetchId(1), &decision);
    model.observe_lookup(at(0.203), FetchId(1), 3e-3);
    model.observe_progress(at(0.21), FetchId(1), 84_000_000, 7e-3);
    assert_eq!(
        decide(&mut model, at(0.22), &question(16_384), backend, 16_384).plan,
        FetchPlan::Fetch
    );
    assert_eq!(
        decide(&mut model, at(1.2), &question(16_384), backend, 16_384).plan,
        FetchPlan::Recompute
    );
}

#[test]
fn an_overdue_fetch_is_waited_for_while_its_bytes_come_and_given_up_when_none_do() {
    let (mut model, backend) = measured(12e9);
    let decision = decide(&mut model, at(0.2), &question(8_192), backend, 8_192);
    model.begin_fetch(at(0.2), FetchId(1), &decision);
    let overdue = at(0.2 + decision.soft_deadline_s);
    model.observe_lookup(overdue, FetchId(1), 3e-3);
    model.observe_progress(overdue, FetchId(1), decision.fetch_bytes * 9 / 10, 0.2);
    assert!(matches!(model.judge(overdue, FetchId(1), 0.6), Patience::Wait { until } if until > overdue));

    model.begin_fetch(overdue, FetchId(2), &decision);
    model.observe_fetched(overdue, FetchId(1), 0.3);
    let before = model.backend(backend, overdue).unwrap().inflight_bytes;
    assert_eq!(model.judge(at(2.0), FetchId(2), 0.6), Patience::GiveUp);
    let after = model.backend(backend, overdue).unwrap().inflight_bytes;
    assert_eq!(before - after, decision.fetch_bytes, "what is lost holds nobody up");
    // What comes late is still learned from.
    model.observe_progress(at(3.0), FetchId(2), decision.fetch_bytes, 2.0);
    model.observe_fetched(at(3.0), FetchId(2), 2.5);
    assert_eq!(model.backend(backend, at(3.0)).unwrap().inflight_fetches, 0);
    assert!(model.backend(backend, at(3.0)).unwrap().bytes_per_s < 2e9);
}

#[test]
fn an_engine_that_can_overlap_gets_a_split_that_beats_both() {
    let (mut model, backend) = measured(4e9);
    let splitting = Question {
        can_split: true,
        ..question(32_768)
    };
    let split = decide(&mut model, at(0.2), &splitting, backend, 32_768);
    let FetchPlan::Split { compute_front_tokens } = split.plan else {
        panic!("{split}");
    };
    assert_eq!(compute_front_tokens % 16, 0);
    assert_eq!(split.fetch_tokens, 32_768 - compute_front_tokens);
    let whole = decide(&mut model, at(0.2), &question(32_768), backend, 32_768);
    assert!(split.expected_s < 0.7 * whole.expected_s, "{split}{whole}");
}

#[test]
fn of_two_backends_the_one_that_saves_more_is_chosen() {
    let (mut model, slow) = measured(5e9);
    let fast = model
        .add_backend(BackendProfile::default(), GateSettings::default())
        .unwrap();
    model.observe_probed(at(0.1), fast, 3e-3, 8_000_000, 8e6 / 20e9);
    let candidates = [
        Candidate {
            backend: slow,
            matched_tokens: 16_384,
        },
        Candidate {
            backend: fast,
            matched_tokens: 12_288,
        },
    ];
    let decision = model.decide(at(0.2), &question(16_384), &candidates);
    assert_eq!(
        (decision.backend, decision.plan),
        (Some(fast), FetchPlan::Fetch),
        "{decision}"
    );
    model.set_gate_mode(fast, GateMode::Off);
    let decision = model.decide(at(0.2), &question(16_384), &candidates);
    assert_eq!(decision.backend, Some(slow), "{decision}");
}

#[test]
fn what_the_engine_has_already_is_neither_fetched_nor_counted() {
    let (mut model, backend) = measured(12e9);
    let mut asked = question(8_192);
    asked.local_prefix_tokens = 8_192;
    let decision = decide(&mut model, at(0.2), &asked, backend, 8_192);
    assert_eq!(decision.reason, Reason::NothingMatched);
    asked.local_prefix_tokens = 4_096;
    let decision = decide(&mut model, at(0.2), &asked, backend, 8_192);
    assert_eq!(decision.fetch_bytes, 4_096 * KV);
}

#[test]
fn compression_pays_on_a_slow_link_only() {
    let (model, backend) = measured(1e9);
    assert!(model.compression_pays(backend, 0.7, 2.5e9));
    let (model, backend) = measured(10e9);
    assert!(!model.compression_pays(backend, 0.7, 2.5e9));
    assert!(!model.compression_pays(BackendId(7), 0.7, 2.5e9));
}

#[test]
fn a_backend_that_decompresses_slower_than_its_link_shows_it_as_a_term() {
    let mut model = CostModel::new(GPU);
    let profile = BackendProfile {
        stored_ratio: 0.5,
        decompress_bytes_per_s: 8e9,
        ..BackendProfile::default()
    };
    let backend = model.add_backend(profile, GateSettings::default()).unwrap();
    model.observe_probed(at(0.1), backend, 3e-3, 8_000_000, 8e6 / 12e9);
    let decision = decide(&mut model, at(0.2), &question(16_384), backend, 16_384);
    assert!(decision.terms.decompression_s > 0.0, "{decision}");
    let whole_s = decision.terms.transfer_s + decision.terms.decompression_s;
    assert!((whole_s - decision.fetch_bytes as f64 / 8e9).abs() < 1e-6, "{decision}");
}

#[test]
fn a_fetch_that_would_be_cut_short_is_not_begun_however_long_a_request_waits() {
    let asked = |limit_s: f64| {
        let mut model = CostModel::new(GPU);
        let profile = BackendProfile {
            limit_s,
            ..BackendProfile::default()
        };
        let backend = model.add_backend(profile, GateSettings::default()).unwrap();
        model.set_gate_mode(backend, GateMode::On);
        model.observe_probed(at(0.1), backend, 3e-3, 8_000_000, 8e6 / 1e8);
        let mut asked = question(8_192);
        asked.queue_wait_s = 100.0;
        let decision = decide(&mut model, at(0.2), &asked, backend, 8_192);
        (decision.plan, decision.reason, decision.forecast.expected_s())
    };
    let (plan, reason, expected_s) = asked(f64::INFINITY);
    assert_eq!((plan, reason), (FetchPlan::Fetch, Reason::FetchIsFaster));
    assert_eq!(asked(expected_s * 1.01).0, FetchPlan::Fetch);
    let (plan, reason, _) = asked(expected_s * 0.99);
    assert_eq!((plan, reason), (FetchPlan::Recompute, Reason::FetchIsTooSlow));
}

#[test]
fn what_is_stored_there_is_learned_and_forgotten_again() {
    let (mut model, backend) = measured(1e9);
    let terms_s = |model: &CostModel| {
        let offered = Candidate {
            backend,
            matched_tokens: 8_192,
        };
        let decision = model.explain(at(0.2), &question(8_192), &[offered]);
        (decision.terms.transfer_s, decision.terms.decompression_s)
    };
    let (plain_s, none_s) = terms_s(&model);
    assert_eq!(none_s, 0.0);
    // Compressed to six tenths, and decompressed at half the link's speed, which the transfer does not hide.
    let decompress_s = 1_000_000.0 / (0.5 * (8_192 * KV) as f64 / plain_s);
    for _ in 0..200 {
        model.observe_stored(backend, 1_000_000, 600_000, decompress_s);
    }
    let (moved_s, rest_s) = terms_s(&model);
    assert!((moved_s / plain_s - 0.6).abs() < 0.01, "{moved_s} {plain_s}");
    assert!(
        ((moved_s + rest_s) / plain_s - 2.0).abs() < 0.01,
        "{moved_s} {rest_s} {plain_s}"
    );
    for _ in 0..200 {
        model.observe_stored(backend, 1_000_000, 1_000_000, 0.0);
    }
    let (moved_s, rest_s) = terms_s(&model);
    assert!(
        (moved_s / plain_s - 1.0).abs() < 0.01 && rest_s < 1e-9,
        "{moved_s} {rest_s}"
    );
    // Nonsense teaches nothing.
    model.observe_stored(backend, 0, 10, 1.0);
    model.observe_stored(backend, 10, 10, f64::NAN);
    model.observe_stored(BackendId(9), 10, 10, 0.0);
    assert_eq!(terms_s(&model), (moved_s, rest_s));
}

#[derive(Clone, Debug)]
enum Step {
    Decide { tokens: u32, wait_s: f64, split: bool },
    Lookup(u8, f64),
    Progress(u8, u64, f64),
    Fetched(u8, f64),
    Failed(u8, f64),
    Judge(u8),
    Probe(bool),
    Recomputed(u32, u32, f64),
}

fn number() -> impl Strategy<Value = f64> {
    prop_oneof![8 => 1e-6f64..100.0, 1 => Just(f64::NAN), 1 => Just(f64::INFINITY), 1 => Just(-1.0), 1 => Just(0.0)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<u32>(), number(), any::<bool>())
            .prop_map(|(tokens, wait_s, split)| Step::Decide { tokens, wait_s, split }),
        2 => (any::<u8>(), number()).prop_map(|(id, value)| Step::Lookup(id % 16, value)),
        2 => (any::<u8>(), any::<u64>(), number()).prop_map(|(id, bytes, value)| Step::Progress(id % 16, bytes, value)),
        2 => (any::<u8>(), number()).prop_map(|(id, value)| Step::Fetched(id % 16, value)),
        1 => (any::<u8>(), number()).prop_map(|(id, value)| Step::Failed(id % 16, value)),
        1 => any::<u8>().prop_map(|id| Step::Judge(id % 16)),
        1 => any::<bool>().prop_map(Step::Probe),
        1 => (any::<u32>(), any::<u32>(), number()).prop_map(|(d, x, value)| Step::Recomputed(d, x, value)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is told to it, in whatever order.
    #[test]
    fn every_decision_is_finite_and_explained(steps in prop::collection::vec(step(), 1..120)) {
        let mut model = CostModel::new(GPU);
        let backend = model.add_backend(BackendProfile::default(), GateSettings::default()).unwrap();
        let mut begun = 0u64;
        for (index, step) in steps.into_iter().enumerate() {
            let now = at(index as f64 * 0.7);
            match step {
                Step::Decide { tokens, wait_s, split } => {
                    let asked = Question { queue_wait_s: wait_s, can_split: split, ..question(tokens) };
                    let decision = decide(&mut model, now, &asked, backend, tokens);
                    prop_assert!(decision.expected_s.is_finite() && decision.recompute_s.is_finite(), "{decision:?}");
                    prop_assert!(decision.expected_s <= decision.recompute_s + decision.relief_s, "{decision:?}");
                    prop_assert!(decision.soft_deadline_s.is_finite(), "{decision:?}");
                    for term in [decision.terms.lookup_s, decision.terms.queue_s, decision.terms.transfer_s,
                        decision.terms.decompression_s, decision.terms.risk_s] {
                        prop_assert!(term.is_finite() && term >= 0.0, "{decision:?}");
                    }
                    prop_assert_eq!(decision.plan == FetchPlan::Recompute, decision.fetch_tokens == 0);
                    if decision.plan != FetchPlan::Recompute {
                        model.begin_fetch(now, FetchId(begun % 16), &decision);
                        begun += 1;
                    }
                }
                Step::Lookup(id, value) => model.observe_lookup(now, FetchId(u64::from(id)), value),
                Step::Progress(id, bytes, value) => model.observe_progress(now, FetchId(u64::from(id)), bytes, value),
                Step::Fetched(id, value) => model.observe_fetched(now, FetchId(u64::from(id)), value),
                Step::Failed(id, value) => model.observe_failed(now, FetchId(u64::from(id)), value),
                Step::Judge(id) => drop(model.judge(now, FetchId(u64::from(id)), 1.0)),
                Step::Probe(works) => {
                    if let Some((backend, probe)) = model.poll_probe(now) {
                        if works {
                            model.observe_probed(now, backend, 1e-3, probe.bytes, 1e-2);
                        } else {
                            model.observe_probe_failed(now, backend, 2.0);
                        }
                    }
                }
                Step::Recomputed(tokens, before, value) => model.observe_recompute(tokens, before, value),
            }
            let report = model.backend(backend, now).unwrap();
            prop_assert!(report.inflight_fetches <= 16);
            prop_assert!((0.0..=1.0).contains(&report.failure_probability));
            prop_assert!(report.bytes_per_s > 0.0 && report.lookup_s.is_finite());
        }
    }
}
