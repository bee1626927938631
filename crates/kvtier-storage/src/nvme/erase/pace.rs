use std::cell::Cell;
use std::thread;
use std::time::{Duration, Instant};

/// What is overwritten gently: a small namespace is gone in seconds all the same.
const GENTLE_BYTES: u64 = 256 << 20;
/// A read or write is followed by a pause of so many times what it took.
const GENTLE_PAUSES: u32 = 6;
/// After that, of so many as long as the work has lasted less than this: a slow device or a large namespace is hurried, so that
/// millions of blocks are gone in a minute.
const PAUSES: [(Duration, u32); 3] = [
    (Duration::from_secs(30), 4),
    (Duration::from_secs(45), 3),
    (Duration::MAX, 1),
];
/// Longest pause after a read or write.
const PAUSE_MAX: Duration = Duration::from_millis(20);
/// A flush is followed by a pause of so many times what it took.
const GENTLE_PAUSES_AFTER_FLUSH: u32 = 20;
/// Longest pause after a flush.
const GENTLE_PAUSE_AFTER_FLUSH_MAX: Duration = Duration::from_millis(200);
/// After so long without work the next is a new one.
const REST: Duration = Duration::from_secs(1);

/// How fast records are overwritten: so that whoever reads finds the device free for most of the time.
///
/// Little is overwritten at a seventh of the device's speed, more at a fifth, and what lasts longer at up to half. A flush holds up every reader of a device
/// that serves one request at a time, as virtual disks do: several in a short time would be felt.
#[derive(Default)]
pub(super) struct Pace {
    overwritten: Cell<u64>,
    begun: Cell<Option<Instant>>,
    rested_since: Cell<Option<Instant>>,
}

impl Pace {
    /// There is work again.
    pub(super) fn resume(&self) {
        if self.rested_since.get().is_none_or(|since| since.elapsed() > REST) {
            self.overwritten.set(0);
            self.begun.set(Some(Instant::now()));
        }
    }

    pub(super) fn wrote(&self, bytes: u64) {
        self.overwritten.set(self.overwritten.get().saturating_add(bytes));
    }

    /// After a read or write.
    pub(super) fn pause(&self, took: Duration) {
        let lasted = self.begun.get().map_or(Duration::ZERO, |begun| begun.elapsed());
        self.sleep((took * self.pauses(lasted)).min(PAUSE_MAX));
    }

    pub(super) fn pause_after_flush(&self, took: Duration) {
        if self.is_gentle() {
            self.sleep((took * GENTLE_PAUSES_AFTER_FLUSH).min(GENTLE_PAUSE_AFTER_FLUSH_MAX));
        } else {
            self.pause(took);
        }
    }

    fn pauses(&self, lasted: Duration) -> u32 {
        if self.is_gentle() {
            return GENTLE_PAUSES;
        }
        let step = PAUSES.iter().find(|(until, _)| lasted < *until);
        step.map_or(1, |(_, pauses)| *pauses)
    }

    fn is_gentle(&self) -> bool {
        self.overwritten.get() < GENTLE_BYTES
    }

    fn sleep(&self, pause: Duration) {
        thread::sleep(pause);
        self.rested_since.set(Some(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_is_overwritten_gently_and_what_lasts_is_hurried() {
        let pace = Pace::default();
        pace.resume();
        assert_eq!(pace.pauses(Duration::from_secs(50)), GENTLE_PAUSES);
        pace.wrote(GENTLE_BYTES);
        let pauses = [0, 29, 30, 44, 45, 500].map(|seconds| pace.pauses(Duration::from_secs(seconds)));
        assert_eq!(pauses, [4, 4, 3, 3, 1, 1]);
        // A pause a moment ago: the same piece of work goes on.
        pace.pause(Duration::from_micros(1));
        pace.resume();
        assert_eq!(pace.pauses(Duration::ZERO), 4);
    }
}
