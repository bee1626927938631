//! What a decision of the cost model costs: one request of 256 blocks, two backends that have some of them.

use std::hint::black_box;

use criterion::Criterion;
use kvtier_core::Time;
use kvtier_core::cost::{
    BackendId, BackendProfile, Candidate, ComputeProfile, CostModel, FetchId, GateSettings, GpuProfile, ModelProfile,
    Question,
};

const BLOCKS: u32 = 256;
const BLOCK_TOKENS: u32 = 16;

/// A model with two measured backends and eight fetches in flight.
fn model() -> (CostModel, [BackendId; 2], ModelProfile) {
    let profile = ModelProfile::preset("llama-3.1-8b").expect("a preset");
    let compute = ComputeProfile {
        model: profile,
        gpu: GpuProfile::preset("h100").expect("a preset"),
        gpus: 1,
        utilization: 0.5,
        overhead_s: 0.01,
    };
    let mut model = CostModel::new(compute.coefficients());
    let backends = [12e9, 5e9].map(|bytes_per_s| {
        let backend = model
            .add_backend(BackendProfile::default(), GateSettings::default())
            .expect("defaults hold");
        model.observe_probed(Time(1), backend, 2e-3, 8_000_000, 8e6 / bytes_per_s);
        backend
    });
    for fetch in 0..8 {
        let decision = model.decide(Time(2), &question(&profile, false), &candidates(backends));
        model.begin_fetch(Time(2), FetchId(fetch), &decision);
    }
    (model, backends, profile)
}

fn question(profile: &ModelProfile, can_split: bool) -> Question {
    Question {
        prompt_tokens: BLOCKS * BLOCK_TOKENS + 100,
        local_prefix_tokens: 0,
        block_tokens: BLOCK_TOKENS,
        kv_bytes_per_token: profile.kv_bytes_per_token,
        queue_wait_s: 0.0,
        can_split,
    }
}

fn candidates(backends: [BackendId; 2]) -> [Candidate; 2] {
    [
        Candidate {
            backend: backends[0],
            matched_tokens: BLOCKS / 2 * BLOCK_TOKENS,
        },
        Candidate {
            backend: backends[1],
            matched_tokens: BLOCKS * BLOCK_TOKENS,
        },
    ]
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("cost");
    for (name, can_split) in [("decide_256_blocks", false), ("decide_256_blocks_split", true)] {
        let (mut model, backends, profile) = model();
        let (question, candidates) = (question(&profile, can_split), candidates(backends));
        let mut now = 3;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                now += 1;
                black_box(model.decide(Time(now), black_box(&question), black_box(&candidates)))
            });
        });
    }
    group.finish();
    criterion.final_summary();
}
