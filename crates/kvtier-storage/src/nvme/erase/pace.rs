use std::cell::Cell;
use std::thread;
use std::time::{Duration, Instant};

/// What is overwritten gently: a small namespace is gone in seconds all the same.
const GENTLE_BYTES: u64 = 256 << 20;
/// A read or write is followed by a pause of so many times what it took...
const GENTLE_PAUSES: u32 = 6;
/// ...or of so many, once there is much to do.
const PAUSES: u32 = 3;
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
/// Much is overwritten at a quarter of the device's speed, the first of it at a seventh. A flush holds up every reader of a device
/// that serves one request at a time, as virtual disks do: several in a short time would be felt.
#[derive(Default)]
pub(super) struct Pace {
    overwritten: Cell<u64>,
    rested_since: Cell<Option<Instant>>,
}

impl Pace {
    /// There is work again.
    pub(super) fn resume(&self) {
        if self.rested_since.get().is_none_or(|since| since.elapsed() > REST) {
            self.overwritten.set(0);
        }
    }

    pub(super) fn wrote(&self, bytes: u64) {
        self.overwritten.set(self.overwritten.get().saturating_add(bytes));
    }

    /// After a read or write.
    pub(super) fn pause(&self, took: Duration) {
        let pauses = if self.is_gentle() { GENTLE_PAUSES } else { PAUSES };
        self.sleep((took * pauses).min(PAUSE_MAX));
    }

    pub(super) fn pause_after_flush(&self, took: Duration) {
        if self.is_gentle() {
            self.sleep((took * GENTLE_PAUSES_AFTER_FLUSH).min(GENTLE_PAUSE_AFTER_FLUSH_MAX));
        } else {
            self.pause(took);
        }
    }

    fn is_gentle(&self) -> bool {
        self.overwritten.get() < GENTLE_BYTES
    }

    fn sleep(&self, pause: Duration) {
        thread::sleep(pause);
        self.rested_since.set(Some(Instant::now()));
    }
}
