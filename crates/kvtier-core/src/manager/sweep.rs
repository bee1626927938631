use super::TierManager;
use crate::Time;
use crate::index::flag;
use std::time::Duration;

/// Entries looked at in one step.
const STEP: u32 = 256;
/// Between steps.
const PAUSE: Duration = Duration::from_millis(1);

/// Forgets blocks of older generations, a bounded number of entries at a time.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    cursor: u32,
    remaining: u32,
    due: Time,
}

impl Sweep {
    /// Looks at every entry once more.
    pub(super) fn start(&mut self, places: u32) {
        if self.remaining == 0 {
            self.due = Time::ZERO;
        }
        self.remaining = places;
    }

    pub(super) fn due(&self) -> Option<Time> {
        (self.remaining > 0).then_some(self.due)
    }
}

impl TierManager {
    pub(super) fn sweep_step(&mut self) {
        if self.sweep.due().is_none_or(|due| due > self.now) {
            return;
        }
        let places = self.index.places();
        for _ in 0..STEP.min(self.sweep.remaining) {
            let block = self.sweep.cursor;
            self.sweep.cursor = if block + 1 >= places { 0 } else { block + 1 };
            self.sweep.remaining -= 1;
            let entry = self.index.entry(block);
            if entry.is(flag::LIVE) && !entry.is_ghost() && !self.is_current(entry) {
                self.forget(block);
            }
        }
        self.sweep.due = self.now.after(PAUSE);
    }
}
