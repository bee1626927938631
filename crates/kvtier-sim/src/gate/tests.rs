use kvtier_core::Eviction;

use super::life::{LifeReport, Setup, live};
use super::local::LocalSetup;
use super::prompt::prompts;
use super::{
    Baseline, GateHardware, GateOptions, GateProfile, Input, Kind, NvmeHardware, Prices, RemoteHardware, Verdict,
    render, replay_gate,
};
use crate::family::Family;
use crate::trace::TOKENS_PER_ID;
use crate::{ChatWorkload, TraceRequest};

const MIB: u64 = 1 << 20;

/// 512 tokens of 2 KiB are a block of 1 MiB; 10 ms and a tenth of a millisecond a token.
fn profile() -> GateProfile {
    let mut profile = GateProfile::preset("llama-3.1-8b/h100").expect("a preset");
    profile.kv_bytes_per_token = 2048;
    profile.coefficients.overhead_s = 0.01;
    profile.coefficients.s_per_token = 1e-4;
    profile.coefficients.s_per_pair = 0.0;
    profile
}

/// Room for 64 blocks in host memory, at a MiB a millisecond after a millisecond.
fn hardware() -> GateHardware {
    let mut hardware = GateHardware::preset("idle").expect("a preset");
    hardware.host.gib = 64.0 / 1024.0;
    hardware.host.gb_per_s = MIB as f64 * 1e3 / 1e9;
    hardware.host.latency_ms = 1.0;
    hardware.nvme = None;
    hardware.remote.clear();
    hardware
}

/// A remote without chance.
fn remote(gb_per_s: f64) -> RemoteHardware {
    RemoteHardware {
        name: "peer".to_string(),
        gb_per_s,
        latency_ms: 0.0,
        gib: None,
        spread: 0.0,
        failure_probability: 0.0,
        gib_month: 0.0,
        gb_moved: 0.0,
    }
}

fn request(timestamp_ms: u64, hash_ids: std::ops::Range<u64>) -> TraceRequest {
    TraceRequest {
        timestamp_ms,
        input_tokens: (hash_ids.end - hash_ids.start) * 512,
        output_tokens: 1,
        hash_ids: hash_ids.collect(),
    }
}

fn lru(nvme: bool) -> Setup {
    Setup {
        local: Some(LocalSetup {
            nvme,
            eviction: Eviction::Lru,
        }),
        remotes: Vec::new(),
    }
}

fn nothing() -> Setup {
    Setup {
        local: None,
        remotes: Vec::new(),
    }
}

fn of(requests: &[TraceRequest], hardware: &GateHardware, setup: &Setup) -> LifeReport {
    let prompts = prompts(requests, TOKENS_PER_ID);
    live(&prompts, TOKENS_PER_ID, &profile(), hardware, setup, 1, &mut || ()).expect("sound hardware")
}

fn ttft_ms(life: &LifeReport) -> Vec<f64> {
    life.outcomes.iter().map(|outcome| outcome.ttft_s * 1e3).collect()
}

#[track_caller]
fn assert_ms(life: &LifeReport, expected: &[f64]) {
    let found = ttft_ms(life);
    let close = found
        .iter()
        .zip(expected)
        .all(|(found, expected)| (found - expected).abs() < 1e-3);
    assert!(close && found.len() == expected.len(), "{found:?}, not {expected:?}");
}

#[test]
fn an_idle_gpu_takes_what_the_profile_says() {
    // 10 ms, and 1,024 or 2,048 tokens of a tenth of a millisecond; the same at the same time, for nobody waits.
    let requests = [request(0, 0..2), request(0, 0..4), request(500, 0..2)];
    assert_ms(&of(&requests, &hardware(), &nothing()), &[112.4, 214.8, 112.4]);
}

#[test]
fn a_queue_for_gpus_is_first_come_first_served() {
    let mut hardware = hardware();
    hardware.gpu_servers = 1;
    let requests = [
        request(0, 0..2),
        request(10, 0..2),
        request(20, 0..2),
        request(1_000, 0..2),
    ];
    // Each takes 112.4 ms; the second waits for the first, the third for both.
    assert_ms(&of(&requests, &hardware, &nothing()), &[112.4, 214.8, 317.2, 112.4]);
    hardware.gpu_servers = 2;
    assert_ms(&of(&requests, &hardware, &nothing()), &[112.4, 112.4, 204.8, 112.4]);
}

#[test]
fn what_lies_in_host_memory_comes_over_its_link_and_the_rest_is_computed() {
    let requests = [request(0, 0..2), request(1_000, 0..3), request(2_000, 0..3)];
    let life = of(&requests, &hardware(), &lru(false));
    // 1 ms and 2 MiB, then 512 tokens; 1 ms and 3 MiB, then the last token.
    assert_ms(&life, &[112.4, 3.0 + 61.2, 4.0 + 10.1]);
    let hits: Vec<u32> = life.outcomes.iter().map(|outcome| outcome.host_tokens).collect();
    assert_eq!(hits, [0, 1024, 1536]);
    assert_eq!(life.links[0].bytes, 5 * MIB);
    assert_eq!(life.links[1].bytes, 3 * MIB, "each block is put once");
    let kinds: Vec<Kind> = life.outcomes.iter().map(|outcome| outcome.kind).collect();
    assert_eq!(kinds, [Kind::Computed, Kind::Host, Kind::Host]);
}

#[test]
fn a_group_of_gpus_has_a_way_to_host_memory_of_its_own() {
    let requests = [request(0, 0..4), request(1_000, 0..4), request(1_000, 0..4)];
    // 1 ms, 4 MiB, and the last token.
    let alone = 5.0 + 10.1;
    assert_ms(&of(&requests, &hardware(), &lru(false)), &[214.8, alone, alone]);
    let mut hardware = hardware();
    hardware.gpu_servers = 2;
    assert_ms(&of(&requests, &hardware, &lru(false)), &[214.8, alone, alone]);
    // One group: the second load comes 4 ms after the first and is there before the GPU is free.
    hardware.gpu_servers = 1;
    assert_ms(&of(&requests, &hardware, &lru(false)), &[214.8, alone, alone + 10.1]);
}

#[test]
fn a_block_is_cached_once_it_was_computed_and_not_before() {
    let requests = [request(0, 0..2), request(50, 0..2), request(200, 0..2)];
    let life = of(&requests, &hardware(), &lru(false));
    assert_ms(&life, &[112.4, 112.4, 3.0 + 10.1]);
}

#[test]
fn what_left_host_memory_for_nvme_is_read_and_then_loaded() {
    let mut hardware = hardware();
    hardware.nvme = Some(NvmeHardware {
        gib: 1.0,
        read_gb_per_s: MIB as f64 * 500.0 / 1e9,
        write_gb_per_s: 10.0,
        latency_ms: 5.0,
    });
    let mut requests = vec![request(0, 0..8)];
    requests.extend((1..20).map(|number| request(number * 2_000, 100 * number..100 * number + 8)));
    requests.push(request(100_000, 0..8));
    let life = of(&requests, &hardware, &lru(true));
    let last = life.outcomes[20];
    assert_eq!(
        (last.host_tokens, last.nvme_tokens, last.kind),
        (0, 8 * 512, Kind::Nvme)
    );
    // 5 ms and 8 MiB at half a MiB a millisecond, 1 ms and 8 MiB at one, and the last token.
    assert!(
        (last.ttft_s * 1e3 - (5.0 + 16.0 + 1.0 + 8.0 + 10.1)).abs() < 1e-3,
        "{last:?}"
    );
    let carried = |name: &str| life.links.iter().find(|link| link.link == name).map(|link| link.bytes);
    assert_eq!(carried("read from NVMe"), Some(8 * MIB));
    assert_eq!(carried("written to NVMe"), Some(life.nvme_written_bytes));
    assert!(life.nvme_written_bytes >= 96 * MIB, "{}", life.nvme_written_bytes);
    let without = of(&requests, &hardware, &lru(false));
    assert_eq!(without.outcomes[20].kind, Kind::Computed);
}

#[test]
fn a_remote_is_fetched_from_at_its_bandwidth_where_that_is_faster() {
    let mut hardware = hardware();
    hardware.remote = vec![remote(MIB as f64 * 100.0 / 1e9), remote(MIB as f64 * 5.0 / 1e9)];
    let with = |place| Setup {
        remotes: vec![place],
        ..nothing()
    };
    let requests = [request(1_000, 0..8), request(2_000, 0..8)];
    // 8 MiB at a tenth of a MiB a millisecond, and the last token; computing takes 419.6.
    let life = of(&requests, &hardware, &with(0));
    assert_ms(&life, &[419.6, 80.0 + 10.1]);
    assert_eq!(
        (life.outcomes[1].remote, life.outcomes[1].remote_tokens),
        (Some(0), 4096)
    );
    // Of the slow one it would take 1,600, once it is there.
    let requests = [request(1_000, 0..8), request(9_000, 0..8)];
    let life = of(&requests, &hardware, &with(1));
    assert_ms(&life, &[419.6, 419.6]);
    assert_eq!(life.outcomes[1].kind, Kind::Declined);
}

#[test]
fn an_engine_that_splits_computes_the_front_while_the_rest_is_fetched() {
    let mut hardware = hardware();
    hardware.engine_can_split = true;
    // A block takes 51.2 ms to compute and 50 ms to fetch.
    hardware.remote = vec![remote(MIB as f64 * 20.0 / 1e9)];
    let setup = Setup {
        remotes: vec![0],
        ..nothing()
    };
    let life = of(&[request(1_000, 0..8), request(2_000, 0..8)], &hardware, &setup);
    let split = life.outcomes[1];
    assert_eq!(split.kind, Kind::Split);
    // Four blocks each: the front takes 10 ms more than its four, and the last token 10.1.
    assert!((split.ttft_s * 1e3 - (214.8 + 10.1)).abs() < 1e-3, "{split:?}");
    assert_eq!(split.remote_tokens, 4 * 512);
}

#[test]
fn a_remote_that_always_fails_is_hardly_asked_and_harms_next_to_nobody() {
    let mut hardware = hardware();
    hardware.remote = vec![RemoteHardware {
        failure_probability: 1.0,
        ..remote(12.0)
    }];
    let requests: Vec<TraceRequest> = (0..400).map(|number| request(number * 1_000, 0..8)).collect();
    let setup = Setup {
        remotes: vec![0],
        ..nothing()
    };
    let life = of(&requests, &hardware, &setup);
    // Before the breaker opens somebody learns of it.
    let harmed = ttft_ms(&life).iter().filter(|ms| (*ms - 419.6).abs() > 1e-3).count();
    assert!(harmed <= 4, "{harmed} of 400");
    assert!(!life.gates[0].1.open);
}

#[test]
fn a_remote_without_room_forgets_what_was_used_longest_ago() {
    let mut hardware = hardware();
    hardware.remote = vec![RemoteHardware {
        gib: Some(12.0 / 1024.0),
        ..remote(12.0)
    }];
    let setup = Setup {
        remotes: vec![0],
        ..nothing()
    };
    let requests = [
        request(0, 0..8),
        request(1_000, 100..108),
        request(2_000, 0..8),
        request(3_000, 0..8),
    ];
    let life = of(&requests, &hardware, &setup);
    let tokens: Vec<u32> = life.outcomes.iter().map(|outcome| outcome.remote_tokens).collect();
    // The second prompt pushed the end of the first out; after the third all of it is there again.
    assert_eq!(tokens, [0, 0, 4 * 512, 4096]);
    assert_eq!(life.held_bytes, [(0, 12 * MIB)]);
}

/// Enough sessions of ours for a verdict.
fn chat(sessions: u32) -> Vec<TraceRequest> {
    ChatWorkload {
        sessions,
        ..ChatWorkload::default()
    }
    .generate()
}

/// No prompt has a block of another.
fn without_reuse(requests: u64) -> Vec<TraceRequest> {
    (0..requests)
        .map(|number| request(number * 700, number * 100..number * 100 + 8))
        .collect()
}

fn gate(requests: &[TraceRequest], hardware: &GateHardware, baseline: Baseline) -> super::GateReport {
    let profile = GateProfile::preset("llama-3.3-70b/4xh100").expect("a preset");
    let options = GateOptions {
        baseline,
        resamples: 200,
        ..GateOptions::default()
    };
    replay_gate(requests, TOKENS_PER_ID, &profile, hardware, &options, &mut || ()).expect("sound hardware")
}

fn verdicts(report: &super::GateReport) -> Vec<(&str, Verdict)> {
    report
        .options
        .iter()
        .map(|option| (option.option.as_str(), option.verdict))
        .collect()
}

#[test]
fn traffic_without_reuse_gains_nothing_and_fails() {
    let hardware = GateHardware::preset("idle").expect("a preset");
    let report = gate(&without_reuse(1_000), &hardware, Baseline::Recompute);
    assert_eq!(report.verdict, Verdict::NotWorthEnabling, "{:?}", verdicts(&report));
    assert!(report.settings.is_empty());
    assert_eq!(report.sessions, 1_000);
    for option in &report.options {
        assert_eq!(option.verdict, Verdict::NotWorthEnabling, "{}", option.option);
        assert!(option.prefill_seconds_saved.abs() < 1e-6, "{}", option.option);
    }
}

#[test]
fn traffic_with_much_reuse_passes_and_a_slow_remote_does_not() {
    let hardware = GateHardware::preset("idle").expect("a preset");
    let report = gate(&chat(300), &hardware, Baseline::Recompute);
    let expected = [
        ("host", Verdict::WorthEnabling),
        ("peer", Verdict::WorthEnabling),
        ("s3", Verdict::NotWorthEnabling),
        ("together", Verdict::WorthEnabling),
    ];
    let found = verdicts(&report);
    for pair in expected {
        assert!(found.contains(&pair), "{found:?}");
    }
    assert_eq!(report.verdict, Verdict::WorthEnabling);
    assert!(report.settings.contains("eviction_policy = \"hazard\""));
    let host = &report.options[0];
    assert!(host.comparison.ttft_saving.low > 0.2, "{:?}", host.comparison);
    assert!(host.saving_by_turn[0].ttft_saving < host.saving_by_turn[3].ttft_saving);
    let counted: u64 = host.decisions_over_time.iter().flat_map(|slice| &slice.requests).sum();
    assert_eq!(counted as usize, report.requests);
}

#[test]
fn fifty_requests_say_nothing_whatever_they_save() {
    let hardware = GateHardware::preset("idle").expect("a preset");
    for requests in [&chat(300)[..50], &without_reuse(50)] {
        let report = gate(requests, &hardware, Baseline::Recompute);
        assert_eq!(report.verdict, Verdict::InsufficientEvidence);
        assert!(
            report
                .options
                .iter()
                .all(|option| option.verdict == Verdict::InsufficientEvidence)
        );
    }
}

#[test]
fn beside_a_cache_that_holds_everything_another_policy_gains_nothing() {
    let mut hardware = GateHardware::preset("idle").expect("a preset");
    hardware.host.gib = 100_000.0;
    hardware.remote.clear();
    let report = gate(&chat(200), &hardware, Baseline::LruHost);
    assert_eq!(report.verdict, Verdict::NotWorthEnabling, "{:?}", verdicts(&report));
    assert!(report.options[0].prefill_seconds_saved.abs() < 1e-6);
}

#[test]
fn every_family_lives_through_busy_gpus_and_all_options() {
    let mut hardware = GateHardware::preset("busy").expect("a preset");
    hardware.host.gib = 16.0;
    if let Some(nvme) = &mut hardware.nvme {
        nvme.gib = 64.0;
    }
    hardware.engine_can_split = true;
    hardware.prices = Some(Prices {
        currency: "USD".to_string(),
        gpu_hour: 2.0,
        host_gib_month: 3.0,
        nvme_gib_month: 0.1,
    });
    for family in [Family::Scan, Family::Agent] {
        let requests = &family.generate(3)[..800];
        let report = gate(requests, &hardware, Baseline::LruHost);
        let tokens: f64 = report.prompt_tokens as f64;
        for option in &report.options {
            let hits: f64 = option.hit_ratio_by_tier.iter().map(|tier| tier.ratio).sum();
            assert!(
                (0.0..=1.0).contains(&hits) && tokens > 0.0,
                "{family:?} {}",
                option.option
            );
            assert!(option.ttft_after.p50_s > 0.0 && option.ttft_after.p99_s >= option.ttft_after.p50_s);
            assert!(option.cost_per_day.as_ref().is_some_and(|cost| cost.after > 0.0));
        }
        let busy: f64 = report
            .options
            .iter()
            .flat_map(|option| &option.links)
            .map(|link| link.busy)
            .sum();
        assert!(busy > 0.0);
    }
}

#[test]
fn the_same_inputs_give_the_same_report_and_another_seed_other_luck() {
    let hardware = GateHardware::preset("idle").expect("a preset");
    let requests = chat(100);
    let text = |seed| {
        let profile = GateProfile::preset("llama-3.1-8b/h100").expect("a preset");
        let options = GateOptions {
            seed,
            resamples: 100,
            ..GateOptions::default()
        };
        let report =
            replay_gate(&requests, TOKENS_PER_ID, &profile, &hardware, &options, &mut || ()).expect("sound hardware");
        (serde_json::to_string(&report).expect("JSON"), render(&report))
    };
    let first = text(7);
    assert_eq!(first, text(7));
    assert_ne!(first.0, text(8).0);
}

#[test]
fn hostile_names_are_text_and_the_report_fetches_nothing() {
    let hostile = "<script>alert(1)</script>\"'\u{202e}\n<img src=x onerror=y>";
    let mut hardware = GateHardware::preset("idle").expect("a preset");
    hardware.name = hostile.to_string();
    hardware.remote[0].name = hostile.to_string();
    hardware.prices = Some(Prices {
        currency: hostile.to_string(),
        gpu_hour: 1.0,
        ..Prices::default()
    });
    let mut profile = GateProfile::preset("llama-3.1-8b/h100").expect("a preset");
    profile.name = hostile.to_string();
    let options = GateOptions {
        resamples: 100,
        inputs: vec![Input {
            what: "trace".to_string(),
            name: hostile.to_string(),
            sha256: hostile.to_string(),
        }],
        ..GateOptions::default()
    };
    let report =
        replay_gate(&chat(120), TOKENS_PER_ID, &profile, &hardware, &options, &mut || ()).expect("sound hardware");
    assert!(
        report
            .settings
            .lines()
            .all(|line| line.starts_with('#') || line.contains(" = ")),
        "{}",
        report.settings
    );
    let page = render(&report);
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#39;"));
    for markup in [
        "<script", "<img", "<link", "<iframe", "\u{202e}", "src=", "href=", "url(", "http:", "https:", "@import",
    ] {
        let found = page.find(markup).map(|at| &page[at.saturating_sub(40)..]);
        // The hostile name itself holds some of these, as text.
        let as_text = markup == "src=" && page.matches("src=").count() == page.matches("&lt;img src=x").count();
        assert!(
            found.is_none() || as_text,
            "{markup}: {:?}",
            found.map(|rest| rest.chars().take(90).collect::<String>())
        );
    }
}

#[test]
fn hardware_without_room_for_blocks_is_refused_in_words() {
    let mut hardware = GateHardware::preset("idle").expect("a preset");
    hardware.host.gib = 1.0;
    let profile = GateProfile::preset("llama-3.3-70b/4xh100").expect("a preset");
    let refused = replay_gate(
        &chat(10),
        TOKENS_PER_ID,
        &profile,
        &hardware,
        &GateOptions::default(),
        &mut || (),
    );
    let error = refused.expect_err("six blocks are no cache");
    assert!(
        error.0.contains("host.gib = 1") && error.0.contains("at least 16"),
        "{error}"
    );
}

#[test]
fn a_trace_of_a_century_is_refused_and_not_probed_through() {
    let hardware = GateHardware::preset("idle").expect("a preset");
    let profile = GateProfile::preset("llama-3.1-8b/h100").expect("a preset");
    let requests = [request(0, 0..2), request(3_000_000_000_000, 0..2)];
    let refused = replay_gate(
        &requests,
        TOKENS_PER_ID,
        &profile,
        &hardware,
        &GateOptions::default(),
        &mut || (),
    );
    let error = refused.expect_err("longer than anyone waits");
    assert!(error.0.contains("34722 days"), "{error}");
}
