//! Which time it is for the tier manager.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kvtier_core::Time;

use crate::settings::Clock;

/// The node's clock: the machine's monotonic one, or the largest time that a client has sent.
#[derive(Debug)]
pub(crate) struct NodeClock {
    started: Instant,
    client: Option<AtomicU64>,
}

impl NodeClock {
    pub(crate) fn new(clock: Clock) -> NodeClock {
        NodeClock {
            started: Instant::now(),
            client: match clock {
                Clock::System => None,
                Clock::Client => Some(AtomicU64::new(0)),
            },
        }
    }

    pub(crate) fn is_client(&self) -> bool {
        self.client.is_some()
    }

    /// A client's time, from a request. It never goes back, and it is ignored unless clients drive the clock.
    pub(crate) fn observe(&self, client_ns: u64) {
        if let Some(client) = &self.client {
            client.fetch_max(client_ns, Ordering::Relaxed);
        }
    }

    pub(crate) fn now(&self) -> Time {
        match &self.client {
            Some(client) => Time(client.load(Ordering::Relaxed)),
            None => Time(u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)),
        }
    }

    /// Seconds since the node started, by the machine's clock.
    pub(crate) fn uptime_seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_clock_never_goes_back_and_a_system_clock_ignores_clients() {
        let clock = NodeClock::new(Clock::Client);
        clock.observe(7);
        clock.observe(3);
        assert_eq!(clock.now(), Time(7));
        let clock = NodeClock::new(Clock::System);
        clock.observe(u64::MAX);
        assert!(clock.now() < Time(u64::MAX));
    }
}
