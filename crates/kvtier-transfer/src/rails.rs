//! Which way to a peer is taken, and how one that failed comes back: arithmetic without clocks or devices.

use std::time::{Duration, Instant};

use crate::remote::draw_u64;

const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Growing pauses between attempts, each shortened by chance so that many do not come at the same moment.
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    failures: u32,
    due: Option<Instant>,
}

impl Backoff {
    /// Whether an attempt may be made.
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        self.due.is_none_or(|due| now >= due)
    }

    /// An attempt failed at `now`.
    pub fn fail(&mut self, now: Instant) {
        let pause = PAUSE_MIN.saturating_mul(1 << self.failures.min(16)).min(PAUSE_MAX);
        self.failures = self.failures.saturating_add(1);
        self.due = Some(now + jittered(pause));
    }

    /// An attempt succeeded.
    pub fn succeed(&mut self) {
        *self = Backoff::default();
    }
}

/// Between half of `pause` and all of it.
fn jittered(pause: Duration) -> Duration {
    let chance = draw_u64() >> 32;
    let chance = u32::try_from(chance).unwrap_or(u32::MAX);
    pause / 2 + pause.mul_f64(0.5 * f64::from(chance) / f64::from(u32::MAX))
}

/// How a rail stands: healthy, paused, or on probation.
#[derive(Clone, Debug)]
pub struct Health {
    failures: u32,
    paused_until: Option<Instant>,
    probing: bool,
    /// Moving average; 0 before the first measurement.
    bytes_per_second: f64,
}

/// Whether a rail takes work now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// As much as it can.
    Full,
    /// Its pause is over: one slice, to see whether it works.
    Probe,
    /// Nothing.
    None,
}

/// The first pause of a rail that failed, doubled by each failure that follows without a success in between.
const COOLDOWN_MIN: Duration = Duration::from_millis(100);
const COOLDOWN_MAX: Duration = Duration::from_secs(30);
/// Weight of a new measurement of bandwidth.
const MEASUREMENT_WEIGHT: f64 = 0.2;
/// What a rail without a measurement is taken for, so that each is tried.
const ASSUMED_BYTES_PER_SECOND: f64 = 1e10;

impl Default for Health {
    fn default() -> Health {
        Health {
            failures: 0,
            paused_until: None,
            probing: false,
            bytes_per_second: 0.0,
        }
    }
}

impl Health {
    /// What it may be used for.
    #[must_use]
    pub fn usable(&self, now: Instant) -> Use {
        match self.paused_until {
            None => Use::Full,
            Some(until) if now < until => Use::None,
            Some(_) if self.probing => Use::None,
            Some(_) => Use::Probe,
        }
    }

    /// The one slice of a probe is on its way.
    pub fn begin_probe(&mut self) {
        self.probing = true;
    }

    /// What was on its way was stopped without an answer. A probe that ends so has failed: without this nobody would ever
    /// probe again.
    pub fn stop(&mut self, now: Instant) {
        if self.probing {
            self.fail(now);
        }
    }

    /// A failure of its own: it pauses.
    pub fn fail(&mut self, now: Instant) {
        // What was in flight when it failed fails with it: one failure, not many.
        if self.paused_until.is_some_and(|until| now < until) {
            return;
        }
        let pause = COOLDOWN_MIN
            .saturating_mul(1 << self.failures.min(16))
            .min(COOLDOWN_MAX);
        self.failures = self.failures.saturating_add(1);
        self.paused_until = Some(now + jittered(pause));
        self.probing = false;
        // What it was before it failed says nothing about how it comes back.
        self.bytes_per_second = 0.0;
    }

    /// It moved something: that ends any pause.
    pub fn succeed(&mut self) {
        self.failures = 0;
        self.paused_until = None;
        self.probing = false;
    }

    /// It moved `bytes` while it was busy for `elapsed`: long enough to mean something, as completions come in bursts.
    pub fn measure(&mut self, bytes: u64, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        if seconds > 0.0 {
            #[expect(clippy::cast_precision_loss, reason = "a measurement of bandwidth")]
            let measured = bytes as f64 / seconds;
            self.bytes_per_second = if self.bytes_per_second == 0.0 {
                measured
            } else {
                self.bytes_per_second + MEASUREMENT_WEIGHT * (measured - self.bytes_per_second)
            };
        }
    }

    /// Measured bandwidth; 0 before the first measurement.
    #[must_use]
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes_per_second
    }

    /// Seconds until `bytes` more would have gone, behind `in_flight` others: the rail with the least takes them. `best` is
    /// the speed of the fastest rail: none counts as slower than a sixteenth of it, so that each is measured again.
    #[must_use]
    pub fn seconds_for(&self, in_flight: u64, bytes: u64, best: f64) -> f64 {
        let speed = if self.bytes_per_second == 0.0 {
            ASSUMED_BYTES_PER_SECOND.min(best.max(1.0))
        } else {
            self.bytes_per_second
        };
        let speed = speed.max(best / 16.0);
        #[expect(clippy::cast_precision_loss, reason = "a prediction")]
        let waiting = (in_flight + bytes) as f64;
        waiting / speed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_rail_pauses_longer_each_time_and_a_probe_that_succeeds_ends_it() {
        let (mut health, mut now) = (Health::default(), Instant::now());
        let mut last = Duration::ZERO;
        for round in 0..6 {
            assert_ne!(health.usable(now), Use::None, "round {round}");
            health.fail(now);
            assert_eq!(health.usable(now), Use::None);
            let mut pause = Duration::ZERO;
            while health.usable(now + pause) == Use::None {
                pause += Duration::from_millis(1);
            }
            // Each is drawn from the upper half of twice the one before.
            assert!(
                pause >= last / 2 + Duration::from_millis(25),
                "{pause:?} after {last:?}"
            );
            (last, now) = (pause, now + pause);
            assert_eq!(health.usable(now), Use::Probe);
        }
        health.begin_probe();
        assert_eq!(health.usable(now), Use::None, "one probe at a time");
        health.succeed();
        assert_eq!(health.usable(now), Use::Full);
    }

    #[test]
    fn a_probe_that_was_stopped_without_an_answer_is_followed_by_another() {
        let (mut health, now) = (Health::default(), Instant::now());
        health.fail(now);
        let later = now + COOLDOWN_MIN;
        assert_eq!(health.usable(later), Use::Probe);
        health.begin_probe();
        health.stop(later);
        assert_eq!(health.usable(later), Use::None, "it pauses again");
        assert_eq!(health.usable(later + COOLDOWN_MAX), Use::Probe, "and is probed again");
    }

    #[test]
    fn what_fails_together_counts_once() {
        let (mut many, mut one, now) = (Health::default(), Health::default(), Instant::now());
        (0..100).for_each(|_| many.fail(now));
        one.fail(now);
        assert_eq!(many.failures, one.failures);
    }

    #[test]
    fn the_faster_rail_takes_more_in_proportion() {
        let (mut fast, mut slow) = (Health::default(), Health::default());
        fast.measure(4_000_000, Duration::from_millis(1));
        slow.measure(1_000_000, Duration::from_millis(1));
        let best = fast.bytes_per_second();
        let (mut on_fast, mut on_slow) = (0u64, 0u64);
        for _ in 0..1000 {
            if fast.seconds_for(on_fast, 65_536, best) <= slow.seconds_for(on_slow, 65_536, best) {
                on_fast += 65_536;
            } else {
                on_slow += 65_536;
            }
        }
        let share = on_fast / on_slow;
        assert!((3..=5).contains(&share), "{share}");
    }

    #[test]
    fn a_rail_that_was_once_slow_or_failed_still_gets_a_share() {
        let (mut fast, mut slow, mut back) = (Health::default(), Health::default(), Health::default());
        fast.measure(8_000_000_000, Duration::from_secs(1));
        slow.measure(1, Duration::from_secs(1));
        back.measure(1, Duration::from_secs(1));
        back.fail(Instant::now());
        back.succeed();
        let best = fast.bytes_per_second();
        let seconds = fast.seconds_for(16 << 20, 65_536, best);
        assert!(slow.seconds_for(0, 65_536, best) < seconds);
        assert!(back.seconds_for(0, 65_536, best) <= fast.seconds_for(0, 65_536, best));
    }

    #[test]
    fn pauses_between_attempts_grow_and_stay_bounded() {
        let (mut backoff, now) = (Backoff::default(), Instant::now());
        assert!(backoff.is_due(now));
        for _ in 0..40 {
            backoff.fail(now);
            assert!(!backoff.is_due(now));
            assert!(backoff.is_due(now + PAUSE_MAX));
        }
        assert!(!backoff.is_due(now + PAUSE_MAX / 2 - Duration::from_millis(1)));
        backoff.succeed();
        assert!(backoff.is_due(now));
    }
}
