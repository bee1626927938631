use std::fmt;

use serde::Serialize;

use super::bootstrap::Comparison;

/// What must be saved at least, as a share.
pub const SAVING_MIN: f64 = 0.02;
/// How much worse the 99th percentile may get.
pub const P99_RATIO_MAX: f64 = 1.02;
/// Share of the requests that may be harmed.
pub const HARMED_MAX: f64 = 0.01;
/// With fewer requests a 99th percentile is an anecdote.
pub const REQUESTS_MIN: usize = 200;
/// With fewer blocks of sessions their spread is not known.
pub const BLOCKS_MIN: usize = 20;

/// Whether something should be switched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It pays, and harms next to nobody.
    WorthEnabling,
    /// It does not pay, or harms too many.
    NotWorthEnabling,
    /// The trace does not say.
    InsufficientEvidence,
}

impl Verdict {
    /// How a report writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Verdict::WorthEnabling => "worth_enabling",
            Verdict::NotWorthEnabling => "not_worth_enabling",
            Verdict::InsufficientEvidence => "insufficient_evidence",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

/// The verdict, and why.
pub(super) fn judge(compared: &Comparison, requests: usize) -> (Verdict, Vec<String>) {
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    if requests < REQUESTS_MIN || compared.blocks < BLOCKS_MIN {
        let words = format!(
            "{requests} requests in {} blocks of sessions: at least {REQUESTS_MIN} in {BLOCKS_MIN} are needed",
            compared.blocks
        );
        return (Verdict::InsufficientEvidence, vec![words]);
    }
    let mut refused = Vec::new();
    let mut unsure = Vec::new();
    for (what, saving) in [
        ("of prefill seconds", compared.prefill_saving),
        ("of the time to first tokens", compared.ttft_saving),
    ] {
        let between = format!("between {} and {} {what}", percent(saving.low), percent(saving.high));
        if saving.high < SAVING_MIN {
            refused.push(format!("it saves {between}: less than {}", percent(SAVING_MIN)));
        } else if saving.low < SAVING_MIN {
            unsure.push(format!(
                "it saves {between}: that may be less than {}",
                percent(SAVING_MIN)
            ));
        }
    }
    let p99 = compared.ttft_p99_ratio;
    if p99.value > P99_RATIO_MAX {
        let words = format!(
            "the 99th percentile of the time to the first token is {:.3} times what it was: at most {P99_RATIO_MAX}",
            p99.value
        );
        if p99.low > P99_RATIO_MAX {
            &mut refused
        } else {
            &mut unsure
        }
        .push(words);
    }
    let harmed = compared.harmed;
    if harmed.value > HARMED_MAX {
        let words = format!(
            "{} of the requests take longer than before: at most {}",
            percent(harmed.value),
            percent(HARMED_MAX)
        );
        if harmed.low > HARMED_MAX {
            &mut refused
        } else {
            &mut unsure
        }
        .push(words);
    }
    if !refused.is_empty() {
        refused.extend(unsure);
        return (Verdict::NotWorthEnabling, refused);
    }
    if !unsure.is_empty() {
        return (Verdict::InsufficientEvidence, unsure);
    }
    let words = format!(
        "it saves at least {} of prefill seconds and {} of the time to first tokens, and {} of the requests take longer",
        percent(compared.prefill_saving.low),
        percent(compared.ttft_saving.low),
        percent(harmed.value)
    );
    (Verdict::WorthEnabling, vec![words])
}

#[cfg(test)]
mod tests {
    use super::{Verdict, judge};
    use crate::gate::bootstrap::{Comparison, Estimate};

    fn estimate(low: f64, value: f64, high: f64) -> Estimate {
        Estimate { value, low, high }
    }

    fn good() -> Comparison {
        Comparison {
            prefill_saving: estimate(0.1, 0.12, 0.14),
            ttft_saving: estimate(0.03, 0.05, 0.07),
            ttft_p99_ratio: estimate(0.98, 1.0, 1.04),
            harmed: estimate(0.0, 0.005, 0.012),
            blocks: 50,
            ..Comparison::default()
        }
    }

    #[test]
    fn all_three_conditions_make_it_worth_enabling() {
        assert_eq!(judge(&good(), 1_000).0, Verdict::WorthEnabling);
    }

    #[test]
    fn a_saving_that_may_be_less_is_no_evidence_and_one_that_is_less_is_not_worth_it() {
        let unsure = Comparison {
            ttft_saving: estimate(0.019, 0.05, 0.07),
            ..good()
        };
        assert_eq!(judge(&unsure, 1_000).0, Verdict::InsufficientEvidence);
        let little = Comparison {
            ttft_saving: estimate(-0.01, 0.0, 0.019),
            ..good()
        };
        assert_eq!(judge(&little, 1_000).0, Verdict::NotWorthEnabling);
    }

    #[test]
    fn a_worse_tail_or_harm_to_many_outweighs_any_saving() {
        let tail = |low, value| Comparison {
            ttft_p99_ratio: estimate(low, value, 1.2),
            ..good()
        };
        assert_eq!(judge(&tail(1.03, 1.1), 1_000).0, Verdict::NotWorthEnabling);
        assert_eq!(judge(&tail(0.99, 1.03), 1_000).0, Verdict::InsufficientEvidence);
        let harm = |low, value| Comparison {
            harmed: estimate(low, value, 0.1),
            ..good()
        };
        assert_eq!(judge(&harm(0.011, 0.02), 1_000).0, Verdict::NotWorthEnabling);
        assert_eq!(judge(&harm(0.008, 0.02), 1_000).0, Verdict::InsufficientEvidence);
    }

    #[test]
    fn few_requests_or_few_sessions_say_nothing() {
        assert_eq!(judge(&good(), 199).0, Verdict::InsufficientEvidence);
        let few = Comparison { blocks: 19, ..good() };
        assert_eq!(judge(&few, 1_000).0, Verdict::InsufficientEvidence);
    }
}
