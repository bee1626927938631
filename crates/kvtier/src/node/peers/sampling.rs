use kvtier_core::cost::Decision;

/// Picks each n-th decision for the log, its terms in milliseconds.
#[derive(Debug)]
pub(super) struct Sampling {
    every: u32,
    seen: u64,
}

impl Sampling {
    /// `every` 0 picks none.
    pub(super) fn new(every: u32) -> Sampling {
        Sampling { every, seen: 0 }
    }

    /// Whether one more decision is picked.
    #[must_use]
    pub(super) fn pick(&mut self) -> bool {
        self.seen += 1;
        self.every > 0 && self.seen.is_multiple_of(self.every.into())
    }

    /// Counts a decision and logs it if it is picked; `peer` is the one that was weighed, if one was.
    pub(super) fn see(&mut self, decision: &Decision, peer: Option<&str>) {
        if !self.pick() {
            return;
        }
        let ms = |seconds: f64| format!("{:.3}", seconds * 1e3);
        let terms = &decision.terms;
        tracing::info!(
            decision = self.seen,
            peer = peer.unwrap_or("none"),
            plan = %decision.plan,
            reason = %decision.reason,
            matched_tokens = decision.matched_tokens,
            lookup_ms = ms(terms.lookup_s),
            queue_ms = ms(terms.queue_s),
            transfer_ms = ms(terms.transfer_s),
            decompression_ms = ms(terms.decompression_s),
            risk_ms = ms(terms.risk_s),
            recompute_ms = ms(decision.recompute_s),
            expected_ms = ms(decision.expected_s),
            "a decision of the cost model"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::Sampling;

    #[test]
    fn each_nth_decision_is_picked_and_none_where_n_is_zero() {
        let picked = |every: u32| -> Vec<u32> {
            let mut sampling = Sampling::new(every);
            (1..=9).filter(|_| sampling.pick()).collect()
        };
        assert!(picked(0).is_empty());
        assert_eq!(picked(1), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(picked(4), [4, 8]);
    }
}
