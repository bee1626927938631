use crate::Time;

use super::backend::Forecast;
use super::model::Served;
use super::{
    Candidate, Decision, FetchPlan, FetchTerms, Question, Reason, RecomputeModel, SplitTerms, best_front_tokens,
};

/// A fetch must save at least this share of the recomputation, and this much, seconds.
const GAIN_SHARE_MIN: f64 = 0.02;
const GAIN_MIN_S: f64 = 1e-3;

/// Soft deadlines lie at most this many recomputations after the wait for a GPU.
const DEADLINE_RECOMPUTES: f64 = 2.0;

/// A wait of some recomputations says that about as many requests queue for the GPU, and that others will: a second that is not
/// asked of it spares those behind this share of a second each. One of them counts as the request itself. At most two
/// recomputations of patience, for the sake of others.
const RELIEF_SHARE: f64 = 0.7;
const RELIEF_RECOMPUTES_MAX: f64 = 2.0;

/// Where the link has a queue too, its seconds are taken from others: this share of the queue is set against the relief.
const RELIEF_QUEUE_SHARE: f64 = 0.3;

/// What `candidate` is worth to this request, whatever its gate says.
pub(super) fn weigh(
    recompute: &RecomputeModel,
    served: &Served,
    now: Time,
    question: &Question,
    candidate: Candidate,
) -> Decision {
    let backend = &served.backend;
    let local = question.local_prefix_tokens;
    let matched = candidate
        .matched_tokens
        .min(question.prompt_tokens)
        .saturating_sub(local);
    let wait_s = question.wait_s();
    let bytes_of = |tokens: u32| u64::from(tokens).saturating_mul(question.kv_bytes_per_token);
    let computed_s = recompute.seconds(matched, local);
    let recompute_s = wait_s + computed_s;
    let forecast = backend.forecast(now, bytes_of(matched));
    let probability = backend.failures.probability();
    let deadline_s = |forecast: &Forecast| {
        forecast
            .p99_s
            .min(wait_s + DEADLINE_RECOMPUTES * computed_s)
            .max(wait_s)
    };
    let with_risk = |arrives_s: f64, fails_s: f64| arrives_s + probability * (fails_s - arrives_s).max(0.0);

    let arrives_s = forecast.expected_s().max(wait_s);
    let fails_s = deadline_s(&forecast) + computed_s;
    let usual_s = served.gate.recompute_s();
    // Who fetched in vain is late beyond the seconds of it: it counts as one more recomputation of the usual size. A failure
    // that is known before a GPU is free makes nobody late.
    let regret_s = if deadline_s(&forecast) > wait_s { usual_s } else { 0.0 };
    let fetch_s = with_risk(arrives_s, fails_s) + probability * regret_s;
    let behind = if usual_s > 0.0 {
        (wait_s / usual_s - 1.0).max(0.0)
    } else {
        0.0
    };
    let relief_s =
        computed_s * (RELIEF_SHARE * behind).min(RELIEF_RECOMPUTES_MAX) - RELIEF_QUEUE_SHARE * forecast.queue_s;
    let mut decision = Decision {
        plan: FetchPlan::Recompute,
        reason: Reason::RecomputeIsFaster,
        backend: Some(candidate.backend),
        matched_tokens: matched,
        fetch_tokens: 0,
        fetch_bytes: 0,
        queue_wait_s: wait_s,
        recompute_s,
        expected_s: recompute_s,
        relief_s: 0.0,
        terms: terms(&forecast, fetch_s - arrives_s),
        forecast,
        failure_probability: probability,
        soft_deadline_s: deadline_s(&forecast),
    };
    if matched == 0 {
        return decision;
    }
    let relief_s = relief_s.max(0.0);
    if fetch_s - relief_s < recompute_s {
        decision.plan = FetchPlan::Fetch;
        decision.reason = if fetch_s < recompute_s {
            Reason::FetchIsFaster
        } else {
            Reason::FetchSparesOthers
        };
        decision.expected_s = fetch_s;
        decision.relief_s = relief_s;
        decision.fetch_tokens = matched;
    }
    if question.can_split {
        let per_token_s = (forecast.transfer_s + forecast.decompression_s) / f64::from(matched);
        let front = best_front_tokens(&SplitTerms {
            recompute: recompute.coefficients(),
            local_tokens: local,
            matched_tokens: matched,
            block_tokens: question.block_tokens,
            queue_wait_s: wait_s,
            fetch_start_s: forecast.lookup_s + forecast.queue_s,
            fetch_s_per_token: per_token_s,
        });
        if front > 0 && front < matched {
            let part = backend.forecast(now, bytes_of(matched - front));
            let meets_s = part.expected_s().max(wait_s + recompute.seconds(front, local));
            // Where the rest does not come the engine has gone on computing: it loses nothing.
            let split_s = with_risk(meets_s, recompute_s);
            if split_s < decision.expected_s - decision.relief_s {
                decision.plan = FetchPlan::Split {
                    compute_front_tokens: front,
                };
                decision.reason = Reason::SplitIsFastest;
                decision.expected_s = split_s;
                decision.relief_s = 0.0;
                decision.fetch_tokens = matched - front;
                decision.terms = terms(&part, split_s - meets_s);
                decision.forecast = part;
                decision.soft_deadline_s = deadline_s(&part);
            }
        }
    }
    if decision.plan != FetchPlan::Recompute && decision.forecast.expected_s() > backend.profile.limit_s {
        decision.recompute_instead(Reason::FetchIsTooSlow);
    }
    if decision.saved_s() < GAIN_MIN_S.max(GAIN_SHARE_MIN * computed_s) {
        let reason = match decision.reason {
            Reason::FetchIsTooSlow => Reason::FetchIsTooSlow,
            _ => Reason::RecomputeIsFaster,
        };
        decision.recompute_instead(reason);
    }
    decision.fetch_bytes = bytes_of(decision.fetch_tokens);
    decision
}

fn terms(forecast: &Forecast, risk_s: f64) -> FetchTerms {
    FetchTerms {
        lookup_s: forecast.lookup_s,
        queue_s: forecast.queue_s,
        transfer_s: forecast.transfer_s,
        decompression_s: forecast.decompression_s,
        risk_s,
    }
}
