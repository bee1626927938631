use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvtier::client::blocking::Namespace;

use super::BLOCK_BYTES;
use super::stand::{HOT, failed, hash};
use crate::ranks::percentile;
use crate::{BenchError, pattern};

/// Between the beginnings of two gets.
const PACE: Duration = Duration::from_millis(1);

/// Gets of one stretch of time, microseconds.
#[derive(Default)]
pub(super) struct Gets {
    pub(super) host: Vec<f64>,
    pub(super) nvme: Vec<f64>,
}

impl Gets {
    pub(super) fn all(&self, share: f64) -> f64 {
        percentile([self.host.as_slice(), &self.nvme].concat(), share)
    }

    pub(super) fn of_host(&self, share: f64) -> f64 {
        percentile(self.host.clone(), share)
    }

    pub(super) fn add(&mut self, other: Gets) {
        self.host.extend(other.host);
        self.nvme.extend(other.nvme);
    }

    pub(super) fn count(&self) -> u64 {
        (self.host.len() + self.nvme.len()) as u64
    }
}

/// Gets blocks one at a time: those below [`HOT`] from host memory, those behind from NVMe, each once.
pub(super) struct Foreground<'a> {
    namespace: &'a Namespace,
    next_cold: u64,
    cold: u64,
    next: u64,
}

impl<'a> Foreground<'a> {
    /// Brings the hot blocks into host memory.
    pub(super) fn begin(namespace: &'a Namespace, cold: u64) -> Result<Foreground<'a>, BenchError> {
        let foreground = Foreground {
            namespace,
            next_cold: 0,
            cold,
            next: 0,
        };
        for number in 0..HOT {
            foreground.get(number)?;
        }
        Ok(foreground)
    }

    /// Gets at a steady rate until told to stop. One that comes late delays those that follow, as one caller's would.
    pub(super) fn run(&mut self, stop: &AtomicBool) -> Result<Gets, BenchError> {
        let mut gets = Gets::default();
        let mut due = Instant::now();
        // Both kinds at least once, however short the stretch.
        while !stop.load(Ordering::Acquire) || gets.nvme.is_empty() {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            due = Instant::now().max(due) + PACE;
            self.next += 1;
            if self.next.is_multiple_of(2) {
                let number = HOT + self.next_cold % self.cold;
                self.next_cold += 1;
                gets.nvme.push(self.get(number)?);
            } else {
                gets.host.push(self.get(self.next / 2 % HOT)?);
            }
        }
        Ok(gets)
    }

    fn get(&self, number: u64) -> Result<f64, BenchError> {
        let mut block = [0; BLOCK_BYTES];
        let begun = Instant::now();
        let outcomes = self
            .namespace
            .get_into(&[hash(number)], &mut [&mut block])
            .map_err(failed("get_into"))?;
        let time = begun.elapsed();
        let is_hit = outcomes.first().is_some_and(|outcome| outcome.is_hit());
        if !is_hit {
            return Err(BenchError::Client {
                what: "get_into",
                message: format!("block {number} of the other tenant is not cached any more"),
            });
        }
        if !pattern::matches(number, &block) {
            return Err(BenchError::WrongBytes {
                case: "purge",
                block: number,
            });
        }
        Ok(time.as_secs_f64() * 1e6)
    }
}
