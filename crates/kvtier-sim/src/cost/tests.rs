use super::life::live;
use super::requests::{Arrival, arrivals};
use super::tally::LifeReport;
use super::{CostPlan, CostRow, CostWorld, judge, simulate};
use crate::{ChatWorkload, TraceRequest};

fn world(name: &str) -> CostWorld {
    CostWorld::all()
        .into_iter()
        .find(|world| world.name == name)
        .expect("a world of ours")
}

/// Twenty minutes of chats with long prompts, spread so that an hour has requests throughout.
fn chats() -> Vec<TraceRequest> {
    ChatWorkload {
        sessions: 700,
        session_gap_ms: 4_500,
        system_prompt_tokens: 6_000,
        question_tokens: 2_500,
        ..ChatWorkload::default()
    }
    .generate()
}

fn once(name: &str, plan: CostPlan) -> LifeReport {
    live(&world(name), 7, plan, &arrivals(&chats()))
}

fn mean_s(report: &LifeReport) -> f64 {
    report.seconds / report.requests as f64
}

#[test]
fn the_same_seed_lives_the_same_life_and_another_one_another() {
    let arrivals = arrivals(&chats());
    let live = |seed| live(&world("failures"), seed, CostPlan::GatedBinary, &arrivals);
    assert_eq!(format!("{:?}", live(3)), format!("{:?}", live(3)));
    assert_ne!(format!("{:?}", live(3)), format!("{:?}", live(4)));
}

#[test]
fn every_request_is_counted_once_whatever_the_plan() {
    let all = arrivals(&chats());
    let matched = all.iter().filter(|arrival| arrival.is_worth_a_thought()).count() as u64;
    for plan in CostPlan::ALL {
        assert_eq!(once("failures", plan).requests, matched, "{}", plan.name());
        assert_eq!(
            once("contended_failures", plan).requests,
            all.len() as u64,
            "{}",
            plan.name()
        );
    }
}

#[test]
fn a_request_alone_takes_what_the_parameters_say() {
    let arrival = Arrival {
        at_s: 10.0,
        prompt_tokens: 20_000,
        matched_tokens: 10_000,
    };
    let flat = CostWorld {
        spread: 0.0,
        failure_probability: 0.0,
        ..world("healthy")
    };
    let recompute = live(&flat, 1, CostPlan::Recompute, &[arrival]);
    // 12 ms + 0.7 s + 65 ms.
    assert!((recompute.seconds - 0.777).abs() < 1e-9, "{}", recompute.seconds);
    let fetch = live(&flat, 1, CostPlan::AlwaysFetch, &[arrival]);
    // 3.2768 GB at 12 GB/s, after about 2 ms.
    assert!((fetch.seconds - 0.2751).abs() < 5e-3, "{}", fetch.seconds);
    assert!((fetch.ttft_s - fetch.seconds - arrival.rest_s()).abs() < 1e-6);
    let dead = CostWorld {
        failure_probability: 1.0,
        ..flat
    };
    let failed = live(&dead, 1, CostPlan::AlwaysFetch, &[arrival]);
    assert!((failed.seconds - 2.777).abs() < 1e-6, "{}", failed.seconds);
    assert_eq!((failed.harmed, failed.failed), (1, 1));
}

#[test]
fn an_oracle_is_never_slower_than_recomputing_and_one_that_splits_never_slower_than_one_that_does_not() {
    for name in ["healthy", "random_walk", "regimes", "failures", "s3_like", "self_slow"] {
        let [recompute, binary, split] =
            [CostPlan::Recompute, CostPlan::OracleBinary, CostPlan::OracleSplit].map(|plan| mean_s(&once(name, plan)));
        assert!(binary <= recompute * (1.0 + 1e-9), "{name}: {binary} {recompute}");
        assert!(split <= binary * (1.0 + 1e-9), "{name}: {split} {binary}");
    }
}

#[test]
fn the_gate_comes_near_the_oracle_where_a_plan_without_one_collapses() {
    for (name, most) in [
        ("healthy", 0.01),
        ("random_walk", 0.03),
        ("regimes", 0.08),
        ("failures", 0.15),
        ("s3_like", 0.01),
    ] {
        let oracle = mean_s(&once(name, CostPlan::OracleBinary));
        let gated = once(name, CostPlan::GatedBinary);
        let regret = mean_s(&gated) / oracle - 1.0;
        assert!(regret < most, "{name}: {regret}");
        assert!(
            gated.harmed as f64 / (gated.requests as f64) < 0.02,
            "{name}: {}",
            gated.harmed
        );
        assert!(gated.probe_bytes as f64 / gated.capacity_bytes < 0.003, "{name}");
    }
    let blind = mean_s(&once("s3_like", CostPlan::AlwaysFetch)) / mean_s(&once("s3_like", CostPlan::OracleBinary));
    assert!(blind > 2.0, "{blind}");
}

#[test]
fn after_a_step_of_the_link_decisions_are_right_within_two_probes_and_the_dwell() {
    for name in ["step_up", "step_down"] {
        let settle_s = once(name, CostPlan::GatedBinary)
            .settle_s
            .expect("requests follow the step");
        assert!(settle_s <= 11.0, "{name}: {settle_s}");
    }
}

#[test]
fn forecasts_hold_as_often_as_they_say() {
    let gated = once("failures", CostPlan::GatedSplit);
    assert!(gated.forecasts > 500, "{}", gated.forecasts);
    for (within, share) in gated.within.into_iter().zip([0.5, 0.9, 0.99]) {
        let seen = within as f64 / gated.forecasts as f64;
        assert!((seen - share).abs() < 0.05, "{share}: {seen}");
    }
}

#[test]
fn an_s3_like_link_pays_where_gpus_are_queued_for() {
    let busy = CostWorld {
        servers: 1,
        ..world("contended_s3_like")
    };
    let arrivals = arrivals(&chats());
    let recompute = live(&busy, 7, CostPlan::Recompute, &arrivals);
    let gated = live(&busy, 7, CostPlan::GatedBinary, &arrivals);
    assert!(gated.fetches > 100, "{}", gated.fetches);
    assert!(
        gated.ttft_s < 0.9 * recompute.ttft_s,
        "{} {}",
        gated.ttft_s,
        recompute.ttft_s
    );
    assert_eq!(
        once("s3_like", CostPlan::GatedBinary).fetches,
        0,
        "on idle GPUs it never does"
    );
}

#[test]
fn a_world_from_a_file_runs_and_a_wrong_one_is_refused_in_words() {
    let text = r#"
        [[world]]
        name = "mine"
        gb_per_s = [8, 2]
        spread = 0.1
        regime_mean_s = 60
        failure_probability = 0.01
        latency_ms = 1.5
        burst = { probability = 0.3, when = { from_s = 60, for_s = 30, every_s = 300 } }
        outage = { for_s = 10, every_s = 600 }
        stall = { latency_ms = 100, when = { for_s = 5, every_s = 60 } }
    "#;
    let worlds = CostWorld::parse(text).expect("a world");
    let single = CostWorld::parse(&text.replace("[8, 2]", "8")).expect("a world");
    assert_eq!(single[0].gb_per_s, [8.0]);
    let rows = simulate(&worlds, &[1], &chats(), |_| {});
    assert_eq!(rows.len(), CostPlan::ALL.len());
    assert!(rows.iter().all(|row| row.world == "mine" && row.mean_s > 0.0));
    for (wrong, word) in [
        (text.replace("gb_per_s = [8, 2]", "gb_per_s = []"), "gb_per_s"),
        (text.replace("gb_per_s = [8, 2]", "gb_per_s = [0]"), "gb_per_s"),
        (
            text.replace("failure_probability = 0.01", "failure_probability = 2"),
            "failure_probability",
        ),
        (text.replace("latency_ms = 1.5", "latency_ms = nan"), "latency_ms"),
        (text.replace("spread", "sprad"), "sprad"),
        (String::new(), "world"),
    ] {
        let error = CostWorld::parse(&wrong).expect_err("a wrong file");
        assert!(error.to_string().contains(word), "{error}");
    }
}

fn row(world: &str, plan: CostPlan) -> CostRow {
    CostRow {
        world: world.to_owned(),
        plan: plan.name(),
        mean_s: 0.986,
        regret: -0.5,
        harmed: 0.0,
        flips_per_min: 0.0,
        probe_share: 0.0,
        calibration_error: Some(0.0),
        settle_s: None,
        ttft_mean_s: 1.0,
        fetched: 0.5,
        requests: 1,
    }
}

#[test]
fn every_figure_beyond_its_bound_is_told() {
    let fine = row("regimes", CostPlan::GatedBinary);
    assert_eq!(judge(std::slice::from_ref(&fine)), Vec::<String>::new());
    for (wrong, word) in [
        (
            CostRow {
                regret: 0.081,
                ..fine.clone()
            },
            "regret",
        ),
        (
            CostRow {
                harmed: 0.016,
                ..fine.clone()
            },
            "harmed",
        ),
        (
            CostRow {
                flips_per_min: 6.1,
                ..fine.clone()
            },
            "flips_per_min",
        ),
        (
            CostRow {
                probe_share: 0.0031,
                ..fine.clone()
            },
            "probe_share",
        ),
        (
            CostRow {
                calibration_error: Some(0.051),
                ..fine.clone()
            },
            "calibration_error",
        ),
        (
            CostRow {
                settle_s: Some(12.0),
                ..fine.clone()
            },
            "settle_s",
        ),
        (
            CostRow {
                regret: f64::NAN,
                ..fine
            },
            "regret",
        ),
        (
            CostRow {
                regret: -0.19,
                ..row("regimes", CostPlan::GatedSplit)
            },
            "regret",
        ),
        (
            CostRow {
                mean_s: 0.7,
                ..row("regimes", CostPlan::OracleBinary)
            },
            "reference",
        ),
    ] {
        let told = judge(std::slice::from_ref(&wrong));
        assert!(told.len() == 1 && told[0].contains(word), "{told:?}");
    }
    let queue = [
        row("contended_s3_like", CostPlan::Recompute),
        row("contended_s3_like", CostPlan::GatedSplit),
    ];
    assert!(judge(&queue)[0].contains("ttft"), "as slow as recomputing");
}
