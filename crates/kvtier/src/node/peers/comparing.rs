//! What the cost model expected of each term, and what it took: sums, so that their ratio over any span of time says how far its word goes.

use kvtier_core::cost::Decision;
use serde::{Deserialize, Serialize};

/// One term over all fetches that were decided on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TermComparison {
    /// `lookup`; `transfer`, with the queue in front of it; `decompression`; `recompute`, of prefills that engines reported; or `failure`, in
    /// millionths of fetches in place of microseconds.
    pub term: String,
    /// What was expected, together; of failures, the sum of their probabilities.
    pub expected_us: u64,
    /// What it took, together; of failures, how many there were.
    pub actual_us: u64,
    /// How often both are known.
    pub count: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    expected_s: f64,
    actual_s: f64,
    count: u64,
}

impl Sum {
    fn add(&mut self, expected_s: f64, actual_s: f64) {
        self.expected_s += expected_s;
        self.actual_s += actual_s;
        self.count += 1;
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Comparing {
    lookup: Sum,
    transfer: Sum,
    decompression: Sum,
    recompute: Sum,
    failure: Sum,
}

/// What is expected of a fetch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected {
    lookup_s: f64,
    transfer_s: f64,
    decompression_s: f64,
    failures: f64,
}

impl Expected {
    pub(super) fn of(decision: &Decision) -> Expected {
        let terms = &decision.terms;
        Expected {
            lookup_s: terms.lookup_s,
            transfer_s: terms.queue_s + terms.transfer_s,
            decompression_s: terms.decompression_s,
            failures: decision.failure_probability,
        }
    }
}

impl Comparing {
    /// A fetch ended: when it was answered and when it was done, after it began, and what of that went into decompression. `None`: it failed.
    pub(super) fn ended(&mut self, expected: &Expected, took: Option<(f64, f64, f64)>) {
        self.failure
            .add(expected.failures, if took.is_none() { 1.0 } else { 0.0 });
        if let Some((answered_s, done_s, decompressed_s)) = took {
            self.lookup.add(expected.lookup_s, answered_s);
            self.transfer
                .add(expected.transfer_s, (done_s - answered_s - decompressed_s).max(0.0));
            self.decompression.add(expected.decompression_s, decompressed_s);
        }
    }

    pub(super) fn recomputed(&mut self, expected_s: f64, took_s: f64) {
        self.recompute.add(expected_s, took_s);
    }

    pub(super) fn terms(&self) -> Vec<TermComparison> {
        let terms = [
            ("lookup", self.lookup),
            ("transfer", self.transfer),
            ("decompression", self.decompression),
            ("recompute", self.recompute),
            ("failure", self.failure),
        ];
        terms
            .map(|(term, sum)| TermComparison {
                term: term.to_owned(),
                expected_us: (sum.expected_s * 1e6) as u64,
                actual_us: (sum.actual_s * 1e6) as u64,
                count: sum.count,
            })
            .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_and_what_failed_are_counted_apart() {
        let mut comparing = Comparing::default();
        let expected = Expected {
            lookup_s: 0.01,
            transfer_s: 0.1,
            decompression_s: 0.02,
            failures: 0.25,
        };
        comparing.ended(&expected, Some((0.02, 0.13, 0.03)));
        comparing.ended(&expected, None);
        comparing.recomputed(1.0, 2.0);
        let terms = comparing.terms();
        let of = |name: &str| {
            let term = terms.iter().find(|term| term.term == name).expect("a term");
            (term.expected_us / 1000, term.actual_us / 1000, term.count)
        };
        assert_eq!(of("lookup"), (10, 20, 1));
        assert_eq!(of("transfer"), (100, 80, 1));
        assert_eq!(of("decompression"), (20, 30, 1));
        assert_eq!(of("recompute"), (1000, 2000, 1));
        assert_eq!(of("failure"), (500, 1000, 2));
    }
}
