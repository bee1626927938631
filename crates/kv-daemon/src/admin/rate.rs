//! How often a token may ask, and how often anyone may show a wrong one.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Buckets kept at once; a full one says nothing and is dropped first.
const BUCKETS_MAX: usize = 2048;

/// A rate and how much may come at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Calls a second, over time. Above 0.
    pub per_second: f64,
    /// Calls at once. At least 1.
    pub burst: f64,
}

/// The answer of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Go on. So many were refused since the last one that went on.
    Admitted {
        /// For the audit log: refused calls have no entry of their own, or a flood of them would bury the rest.
        refused_before: u64,
    },
    /// Not now.
    Refused {
        /// Whole seconds until the next may come, at least 1.
        retry_after_s: u64,
    },
}

/// A bucket for each token, and one for all wrong ones.
#[derive(Debug)]
pub struct Limits {
    rate: Rate,
    failure_rate: Rate,
    buckets: Mutex<Buckets>,
}

#[derive(Debug, Default)]
struct Buckets {
    tokens: HashMap<String, Bucket>,
    failures: Option<Bucket>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f64,
    filled: Instant,
    refused: u64,
}

impl Limits {
    /// Limits of these rates.
    #[must_use]
    pub fn new(rate: Rate, failure_rate: Rate) -> Limits {
        Limits {
            rate,
            failure_rate,
            buckets: Mutex::default(),
        }
    }

    /// A call with a good token. Wrong tokens of others never stand in its way.
    pub fn admit(&self, token: &str, now: Instant) -> Admission {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.tokens.len() >= BUCKETS_MAX && !buckets.tokens.contains_key(token) {
            let rate = self.rate;
            buckets
                .tokens
                .retain(|_, bucket| bucket.refused > 0 || bucket.level(rate, now) < rate.burst);
        }
        match buckets.tokens.get_mut(token) {
            Some(bucket) => bucket.take(self.rate, now),
            None => {
                let mut bucket = Bucket::full(self.rate, now);
                let admission = bucket.take(self.rate, now);
                buckets.tokens.insert(token.to_string(), bucket);
                admission
            }
        }
    }

    /// A call without a good token.
    pub fn fail(&self, now: Instant) -> Admission {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = self.failure_rate;
        buckets
            .failures
            .get_or_insert_with(|| Bucket::full(rate, now))
            .take(rate, now)
    }
}

impl Bucket {
    fn full(rate: Rate, now: Instant) -> Bucket {
        Bucket {
            left: rate.burst,
            filled: now,
            refused: 0,
        }
    }

    fn level(&self, rate: Rate, now: Instant) -> f64 {
        let since: Duration = now.saturating_duration_since(self.filled);
        (self.left + since.as_secs_f64() * rate.per_second).min(rate.burst)
    }

    fn take(&mut self, rate: Rate, now: Instant) -> Admission {
        self.left = self.level(rate, now);
        self.filled = self.filled.max(now);
        if self.left >= 1.0 {
            self.left -= 1.0;
            let refused_before = std::mem::take(&mut self.refused);
            return Admission::Admitted { refused_before };
        }
        self.refused += 1;
        let wait = Duration::from_secs_f64(((1.0 - self.left) / rate.per_second).clamp(0.0, 3600.0));
        let whole = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        Admission::Refused {
            retry_after_s: whole.max(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: Rate = Rate {
        per_second: 2.0,
        burst: 3.0,
    };

    fn refused(admission: Admission) -> bool {
        matches!(admission, Admission::Refused { .. })
    }

    #[test]
    fn a_burst_passes_then_the_rate_holds_and_the_refused_are_counted() {
        let limits = Limits::new(SLOW, SLOW);
        let start = Instant::now();
        for _ in 0..3 {
            assert_eq!(limits.admit("a", start), Admission::Admitted { refused_before: 0 });
        }
        assert_eq!(limits.admit("a", start), Admission::Refused { retry_after_s: 1 });
        assert!(refused(limits.admit("a", start + Duration::from_millis(400))));
        let later = start + Duration::from_millis(500);
        assert_eq!(limits.admit("a", later), Admission::Admitted { refused_before: 2 });
        assert!(refused(limits.admit("a", later)));
        assert_eq!(
            limits.admit("b", later),
            Admission::Admitted { refused_before: 0 },
            "each token has its own"
        );
        let much_later = start + Duration::from_secs(600);
        let passed = (0..10).filter(|_| !refused(limits.admit("a", much_later))).count();
        assert_eq!(passed, 3, "no more than the burst is saved up");
    }

    #[test]
    fn wrong_tokens_do_not_keep_good_ones_out() {
        let limits = Limits::new(SLOW, SLOW);
        let now = Instant::now();
        while !refused(limits.fail(now)) {}
        assert!(!refused(limits.admit("a", now)));
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_nothing_away() {
        let limits = Limits::new(SLOW, SLOW);
        let now = Instant::now() + Duration::from_secs(10);
        for _ in 0..3 {
            assert!(!refused(limits.admit("a", now)));
        }
        assert!(refused(limits.admit("a", now - Duration::from_secs(5))));
        assert!(refused(limits.admit("a", now)));
    }

    #[test]
    fn buckets_of_idle_tokens_are_dropped() {
        let limits = Limits::new(SLOW, SLOW);
        let start = Instant::now();
        for number in 0..BUCKETS_MAX * 3 {
            let now = start + Duration::from_millis(number as u64);
            assert!(!refused(limits.admit(&number.to_string(), now)));
        }
        assert!(limits.buckets.lock().unwrap().tokens.len() <= BUCKETS_MAX);
    }
}
