use proptest::prelude::*;

use super::{RecomputeCoefficients, RecomputeModel};

const TRUE: RecomputeCoefficients = RecomputeCoefficients {
    overhead_s: 12e-3,
    s_per_token: 70e-6,
    s_per_pair: 1.3e-9,
};

/// Prefills of all lengths, short ones more often, after prefixes of all lengths.
fn prefills(seed: u64) -> impl Iterator<Item = (u32, u32, f64)> {
    let mut state = seed;
    let mut uniform = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    std::iter::repeat_with(move || {
        let tokens = (16.0 * 8_000f64.powf(uniform())) as u32;
        let before = (120_000.0 * uniform()) as u32;
        (tokens, before, 2.0 * uniform() - 1.0)
    })
}

fn off(learned: f64, real: f64) -> f64 {
    (learned / real - 1.0).abs()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// From a profile that is off by up to a factor of three, with three per cent of noise.
    #[test]
    fn what_is_learned_comes_within_five_percent_of_every_coefficient(
        seed: u64,
        wrong in (0.33f64..3.0, 0.33f64..3.0, 0.33f64..3.0),
    ) {
        let mut model = RecomputeModel::new(RecomputeCoefficients {
            overhead_s: TRUE.overhead_s * wrong.0,
            s_per_token: TRUE.s_per_token * wrong.1,
            s_per_pair: TRUE.s_per_pair * wrong.2,
        });
        for (tokens, before, noise) in prefills(seed).take(2_000) {
            model.observe(tokens, before, TRUE.seconds(tokens, before) * (1.0 + 0.03 * noise));
        }
        let learned = model.coefficients();
        prop_assert!(off(learned.overhead_s, TRUE.overhead_s) < 0.05, "{learned:?}");
        prop_assert!(off(learned.s_per_token, TRUE.s_per_token) < 0.05, "{learned:?}");
        prop_assert!(off(learned.s_per_pair, TRUE.s_per_pair) < 0.05, "{learned:?}");
    }
}

#[test]
fn equal_prompts_teach_what_they_cost_and_do_not_unsettle_the_rest() {
    let profile = RecomputeCoefficients {
        s_per_token: 140e-6,
        ..TRUE
    };
    let mut model = RecomputeModel::new(profile);
    for _ in 0..20_000 {
        model.observe(8_000, 0, TRUE.seconds(8_000, 0));
    }
    assert!(off(model.seconds(8_000, 0), TRUE.seconds(8_000, 0)) < 0.01);
    // Of these three thousand tokens alone nothing was ever seen: the answer stays in sight of the profile.
    let guessed = model.seconds(3_000, 0);
    assert!(
        guessed > 0.5 * TRUE.seconds(3_000, 0) && guessed < 1.1 * profile.seconds(3_000, 0),
        "{guessed}"
    );
    model.observe(1_000, 0, TRUE.seconds(1_000, 0));
    assert!(off(model.seconds(8_000, 0), TRUE.seconds(8_000, 0)) < 0.02);
}

#[test]
fn a_gpu_that_becomes_slower_is_known_after_three_hundred_prefills() {
    let mut model = RecomputeModel::new(TRUE);
    for (tokens, before, _) in prefills(1).take(500) {
        model.observe(tokens, before, TRUE.seconds(tokens, before));
    }
    for (tokens, before, _) in prefills(2).take(300) {
        model.observe(tokens, before, 2.0 * TRUE.seconds(tokens, before));
    }
    assert!(off(model.seconds(10_000, 0), 2.0 * TRUE.seconds(10_000, 0)) < 0.05);
}

#[test]
fn what_cannot_be_measured_is_ignored_and_no_coefficient_becomes_negative() {
    let mut model = RecomputeModel::new(TRUE);
    for nonsense in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
        model.observe(1_000, 0, nonsense);
    }
    model.observe(0, 1_000, 1.0);
    assert_eq!(model.measured(), 0);
    assert_eq!(model.coefficients(), RecomputeModel::new(TRUE).coefficients());
    for (tokens, before, _) in prefills(3).take(200) {
        model.observe(tokens, before, 1e-9);
    }
    let learned = model.coefficients();
    assert!(learned.overhead_s >= 0.0 && learned.s_per_token >= 0.0 && learned.s_per_pair >= 0.0);
    assert_eq!(model.seconds(0, 5), 0.0);
}
