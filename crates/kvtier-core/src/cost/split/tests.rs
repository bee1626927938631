use proptest::prelude::*;

use super::{RecomputeCoefficients, SplitTerms, best_front_tokens};

fn terms() -> impl Strategy<Value = SplitTerms> {
    (
        (0.0f64..0.05, 1e-6f64..2e-4, prop_oneof![Just(0.0), 1e-11f64..5e-9]),
        (
            0u32..100_000,
            1u32..200_000,
            prop_oneof![Just(1u32), Just(16), Just(256), Just(512)],
        ),
        (0.0f64..5.0, 0.0f64..10.0, 1e-7f64..1e-3),
    )
        .prop_map(
            |((overhead_s, s_per_token, s_per_pair), (local, matched, block), (wait_s, start_s, per_token_s))| {
                SplitTerms {
                    recompute: RecomputeCoefficients {
                        overhead_s,
                        s_per_token,
                        s_per_pair,
                    },
                    local_tokens: local,
                    matched_tokens: matched,
                    block_tokens: block,
                    queue_wait_s: wait_s,
                    fetch_start_s: start_s,
                    fetch_s_per_token: per_token_s,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_closed_form_is_as_fast_as_the_best_split_of_all(terms in terms()) {
        let front = best_front_tokens(&terms);
        prop_assert!(front <= terms.matched_tokens);
        prop_assert!(front.is_multiple_of(terms.block_tokens) || front == terms.matched_tokens);
        let grid = (0..=terms.matched_tokens / terms.block_tokens)
            .map(|block| block * terms.block_tokens)
            .chain([terms.matched_tokens]);
        let best_s = grid.map(|front| terms.seconds(front)).fold(f64::INFINITY, f64::min);
        let chosen_s = terms.seconds(front);
        prop_assert!(chosen_s <= best_s * (1.0 + 1e-9), "{front}: {chosen_s} s, best {best_s} s");
    }
}

#[test]
fn without_attention_a_split_takes_the_product_over_the_sum() {
    let terms = SplitTerms {
        recompute: RecomputeCoefficients {
            overhead_s: 0.0,
            s_per_token: 70e-6,
            s_per_pair: 0.0,
        },
        local_tokens: 0,
        matched_tokens: 10_000,
        block_tokens: 1,
        queue_wait_s: 0.0,
        fetch_start_s: 0.0,
        fetch_s_per_token: 30e-6,
    };
    let front = best_front_tokens(&terms);
    assert_eq!(front, 3_000);
    let (recompute_s, fetch_s) = (0.7, 0.3);
    assert!((terms.seconds(front) - recompute_s * fetch_s / (recompute_s + fetch_s)).abs() < 1e-9);
}

#[test]
fn who_waits_for_a_gpu_anyway_fetches_and_who_waits_for_a_link_computes() {
    let mut terms = SplitTerms {
        recompute: RecomputeCoefficients {
            overhead_s: 0.01,
            s_per_token: 70e-6,
            s_per_pair: 1e-9,
        },
        local_tokens: 0,
        matched_tokens: 8_192,
        block_tokens: 512,
        queue_wait_s: 60.0,
        fetch_start_s: 0.1,
        fetch_s_per_token: 300e-6,
    };
    assert_eq!(best_front_tokens(&terms), 0);
    terms.queue_wait_s = 0.0;
    terms.fetch_start_s = 60.0;
    assert_eq!(best_front_tokens(&terms), 8_192);
}

#[test]
fn terms_that_are_no_numbers_end_in_some_plan() {
    let terms = SplitTerms {
        recompute: RecomputeCoefficients::default(),
        local_tokens: 0,
        matched_tokens: 100,
        block_tokens: 0,
        queue_wait_s: f64::NAN,
        fetch_start_s: f64::INFINITY,
        fetch_s_per_token: f64::NAN,
    };
    assert!(best_front_tokens(&terms) <= 100);
}
