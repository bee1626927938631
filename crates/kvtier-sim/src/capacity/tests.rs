use kvtier_core::{CheckedCoreSettings, CoreSettings, Eviction};

use super::{CapacityReport, Pace, replay, replay_paced, replay_restarted};
use crate::family::Family;
use crate::lru;
use crate::simulate::{Policy, Prompts, simulate};
use crate::trace::TraceRequest;
use crate::workload::ChatWorkload;
use std::time::Duration;

const BLOCK_BYTES: u32 = 16 << 10;

fn settings(host_bytes: u64, nvme_bytes: u64) -> CheckedCoreSettings {
    CoreSettings {
        host_bytes,
        host_segment_bytes: 1 << 20,
        nvme_bytes,
        nvme_segment_bytes: 1 << 20,
        ..CoreSettings::default()
    }
    .check()
    .expect("sound settings")
}

#[test]
fn room_for_everything_hits_what_an_endless_cache_hits() {
    let requests = ChatWorkload {
        sessions: 120,
        ..ChatWorkload::default()
    }
    .generate();
    let unique = lru::unique_blocks(&requests);
    let report = replay(
        &requests,
        settings(unique as u64 * u64::from(BLOCK_BYTES) * 2, 0),
        BLOCK_BYTES,
    );
    assert_eq!(report.tokens, lru::replay(&requests, unique));
    assert_eq!(report.busy, 0);
}

#[test]
fn two_tiers_hit_nearly_what_an_exact_cache_of_their_joint_size_hits() {
    let requests = ChatWorkload {
        sessions: 300,
        ..ChatWorkload::default()
    }
    .generate();
    let host_blocks = lru::unique_blocks(&requests) as u64 / 20;
    let block = u64::from(BLOCK_BYTES);
    let report = replay(
        &requests,
        settings(host_blocks * block, host_blocks * 4 * block),
        BLOCK_BYTES,
    );
    let exact = lru::replay(&requests, host_blocks as usize * 5).ratio();
    let reached = report.tokens.ratio();
    assert!(report.hits_host > 0 && report.hits_nvme > 0, "{report:?}");
    assert!(reached > exact * 0.85, "{reached:.3} of {exact:.3}: {report:?}");
    assert_eq!(report.busy, 0, "{report:?}");
}

/// Writes used to grow to more than twice what was demoted where prompts came in several calls: the start of a prompt lay
/// before its end in the log, and was copied on because of children that were no younger.
#[test]
fn little_is_written_twice_and_the_hits_are_those_of_an_exact_cache_whatever_the_latency() {
    let requests = long_chats();
    let block = u64::from(BLOCK_BYTES);
    let (host_bytes, nvme_bytes) = (16 << 20, 128 << 20);
    let exact = lru::replay(&requests, ((host_bytes + nvme_bytes) / block) as usize).ratio();
    let pace = |latency_us, device_bytes_per_second| Pace {
        latency: Duration::from_micros(latency_us),
        device_bytes_per_second,
        trip: Duration::from_micros(30),
        block: Duration::from_micros(5),
    };
    for pace in [Pace::default(), pace(100, 2_000_000_000), pace(2_000, 1_000_000_000)] {
        let report = replay_paced(&requests, settings(host_bytes, nvme_bytes), BLOCK_BYTES, pace);
        let (reached, written) = (report.tokens.ratio(), report.write_amplification());
        assert!(report.hits_nvme > 10_000 && report.relocated_bytes > 0, "{report:?}");
        assert!(written <= 1.3, "{written:.2} at {pace:?}: {report:?}");
        assert!(
            reached >= exact - 0.01,
            "{reached:.3} of {exact:.3} at {pace:?}: {report:?}"
        );
    }
}

/// Chats of long prompts, whose readers think until much of the cache has changed.
fn long_chats() -> Vec<TraceRequest> {
    ChatWorkload {
        sessions: 3_000,
        session_gap_ms: 4_000,
        turns_mean: 2,
        turn_gap_ms: 110_000,
        question_tokens: 8_000,
        context_tokens_max: 120_000,
        ..ChatWorkload::default()
    }
    .generate()
}

#[test]
fn after_a_flush_and_a_restart_the_hits_are_those_of_a_run_without() {
    let requests = long_chats();
    let half = requests.len() / 2;
    let settings = settings(16 << 20, 128 << 20);
    let pace = Pace::default();
    let second = |whole: CapacityReport, first: CapacityReport| {
        let (hit, total) = (
            whole.tokens.hit - first.tokens.hit,
            whole.tokens.total - first.tokens.total,
        );
        lru::HitTokens { hit, total }.ratio()
    };
    let without = second(
        replay_paced(&requests, settings.clone(), BLOCK_BYTES, pace),
        replay_paced(&requests[..half], settings.clone(), BLOCK_BYTES, pace),
    );
    let restarted = replay_restarted(&requests, half, &settings, BLOCK_BYTES, pace);
    let with = restarted.tokens.ratio();
    assert!(
        (with - without).abs() < 0.01,
        "{with:.4} after a restart, {without:.4} without"
    );
}

fn with_hazards(settings: CheckedCoreSettings) -> CheckedCoreSettings {
    let settings = CoreSettings {
        eviction: Eviction::Hazard,
        ..(*settings).clone()
    };
    settings.check().expect("sound settings")
}

#[test]
fn the_state_machine_hits_by_hazards_what_the_simulator_says() {
    let requests = ChatWorkload::default().generate();
    let prompts = Prompts::new(&requests, 512);
    for share in [5, 10, 25] {
        let host_blocks = prompts.blocks() as u64 * share / 100;
        let host_bytes = (host_blocks * u64::from(BLOCK_BYTES)).next_multiple_of(1 << 20);
        let capacity_blocks = (host_bytes / u64::from(BLOCK_BYTES)) as usize;
        let simulated = simulate(&prompts, Policy::Hazard, capacity_blocks, &mut || ()).token_ratio();
        let report = replay(&requests, with_hazards(settings(host_bytes, 0)), BLOCK_BYTES);
        let reached = report.tokens.ratio();
        assert!(
            (reached - simulated).abs() < 0.01,
            "{share} %: {reached:.4}, {simulated:.4}"
        );
    }
}

#[test]
fn what_is_not_worth_writing_to_nvme_is_not_written_and_nothing_is_lost_by_that() {
    let requests = ChatWorkload::default().generate();
    let host_blocks = lru::unique_blocks(&requests) as u64 / 100;
    let host_bytes = (host_blocks * u64::from(BLOCK_BYTES)).next_multiple_of(1 << 20);
    let sizes = settings(host_bytes.max(4 << 20), host_bytes.max(4 << 20) * 5);
    let everything = CoreSettings {
        nvme_admission: false,
        ..(*sizes).clone()
    };
    let everything = with_hazards(everything.check().expect("sound settings"));
    let recency = replay(&requests, sizes.clone(), BLOCK_BYTES);
    let all = replay(&requests, everything, BLOCK_BYTES);
    let judged = replay(&requests, with_hazards(sizes), BLOCK_BYTES);
    let written = |report: &CapacityReport| report.demoted_bytes + report.relocated_bytes;
    assert!(judged.refused > 0 && all.refused == 0, "{judged:?} {all:?}");
    assert!(written(&judged) * 10 < written(&all) * 8, "{judged:?} {all:?}");
    assert!(
        judged.demoted_bytes * 10 < recency.demoted_bytes * 9,
        "{judged:?} {recency:?}"
    );
    assert!(judged.tokens.ratio() > recency.tokens.ratio(), "{judged:?} {recency:?}");
}

/// Copies of what is in use in host memory take no room that something else could have, and of a segment only what is worth
/// it is copied: so little is lost to the log.
#[test]
fn two_tiers_hit_by_hazards_what_the_simulator_says_of_their_joint_size() {
    let block = u64::from(BLOCK_BYTES);
    for family in [Family::Agent, Family::Chat, Family::Scan] {
        let requests = family.generate(1);
        let prompts = Prompts::new(&requests, 512);
        let host_bytes = prompts.blocks() as u64 / 24 * block;
        let sizes = CoreSettings {
            host_segment_bytes: 8 * block,
            nvme_segment_bytes: 17 * block,
            ..(*settings(host_bytes.next_multiple_of(1 << 20), host_bytes * 5)).clone()
        };
        let blocks = (sizes.host_bytes + sizes.nvme_bytes) / block;
        let simulated = simulate(&prompts, Policy::Hazard, blocks as usize, &mut || ()).token_ratio();
        let everything = CoreSettings {
            nvme_admission: false,
            ..sizes.clone()
        };
        let report = replay(
            &requests,
            with_hazards(sizes.check().expect("sound settings")),
            BLOCK_BYTES,
        );
        let all = replay(
            &requests,
            with_hazards(everything.check().expect("sound settings")),
            BLOCK_BYTES,
        );
        let reached = report.tokens.ratio();
        assert!(
            (reached - simulated).abs() < 0.01,
            "{family:?}: {reached:.4}, {simulated:.4}: {report:?}"
        );
        assert!(report.blocks_mean * 10 > blocks * 9, "{family:?}: {report:?}");
        // Segments of sixteen blocks and a tier this full: chats copy most, 2.8 bytes for each that came from host memory.
        assert!(report.write_amplification() < 3.0, "{family:?}: {report:?}");
        let written = |report: &CapacityReport| report.demoted_bytes + report.relocated_bytes;
        assert!(
            all.refused == 0 && written(&all) >= written(&report),
            "{family:?}: {report:?} {all:?}"
        );
        assert!(
            (all.tokens.ratio() - reached).abs() < 0.01,
            "{family:?}: {report:?} {all:?}"
        );
    }
}

#[test]
fn answers_to_prompts_longer_than_one_message_are_told_by_their_end() {
    let prompt = |timestamp_ms: u64, first: u64| TraceRequest {
        timestamp_ms,
        input_tokens: 8 * 6_000,
        output_tokens: 40,
        hash_ids: (first..first + 6_000).collect(),
    };
    let requests = [prompt(0, 0), prompt(60_000, 10_000), prompt(120_000, 0)];
    let settings = CoreSettings {
        host_bytes: 64 << 20,
        host_segment_bytes: 1 << 20,
        nvme_bytes: 0,
        eviction: Eviction::Hazard,
        ..CoreSettings::default()
    };
    let report = replay(&requests, settings.check().expect("sound settings"), 4096);
    assert_eq!((report.requests, report.busy), (3, 0));
    assert_eq!(report.tokens.hit, 8 * 6_000);
}
