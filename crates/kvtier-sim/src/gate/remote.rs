use kvtier_core::cost::{BackendId, BackendProfile};

use super::hardware::RemoteHardware;
use super::link::Link;
use crate::cost::{normal, uniform};
use crate::lru::LeafLru;
use crate::random::{Random, mix};

/// Spread of the logarithm of a latency.
const LATENCY_SPREAD: f64 = 0.4;

/// What waits to be stored may take this long at most, seconds; then nothing is stored: a put never holds an engine up.
const BACKLOG_MAX_S: f64 = 10.0;

/// What chance has in store for one fetch: the same whatever else is switched on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Luck {
    pub(super) fails: bool,
    pub(super) latency_s: f64,
    pub(super) share: f64,
}

/// A store elsewhere: what it holds, and the way there and back.
pub(super) struct Remote {
    /// Its place in the hardware.
    pub(super) place: usize,
    pub(super) backend: BackendId,
    hardware: RemoteHardware,
    seed: u64,
    held: LeafLru,
    pub(super) down: Link,
    up: Link,
    stored_until_s: f64,
    probes: u64,
}

impl Remote {
    pub(super) fn new(
        place: usize,
        hardware: &RemoteHardware,
        backend: BackendId,
        seed: u64,
        block_bytes: u64,
    ) -> Remote {
        let capacity = hardware.gib.map_or(usize::MAX, |gib| {
            (gib * (1u64 << 30) as f64 / block_bytes as f64) as usize
        });
        Remote {
            place,
            backend,
            hardware: hardware.clone(),
            seed: mix(seed ^ mix(place as u64)),
            held: LeafLru::new(capacity),
            down: Link::new(hardware.gb_per_s, hardware.latency_ms),
            up: Link::new(hardware.gb_per_s, hardware.latency_ms),
            stored_until_s: 0.0,
            probes: 0,
        }
    }

    /// What the cost model is told before anything was measured.
    pub(super) fn profile(hardware: &RemoteHardware) -> BackendProfile {
        BackendProfile {
            lookup_s: hardware.latency_ms.max(1e-3) * 1e-3,
            bytes_per_s: hardware.gb_per_s * 1e9,
            ..BackendProfile::default()
        }
    }

    /// How many of the prompt's first blocks it has.
    pub(super) fn matched(&self, ids: &[u64]) -> usize {
        self.held.matched(ids)
    }

    /// The luck of the fetch of this name.
    pub(super) fn luck(&self, name: u64) -> Luck {
        let mut random = Random::new(mix(self.seed ^ mix(name)));
        Luck {
            fails: uniform(&mut random) < self.hardware.failure_probability,
            latency_s: self.hardware.latency_ms * 1e-3 * (LATENCY_SPREAD * normal(&mut random)).exp(),
            share: (self.hardware.spread * normal(&mut random)).exp(),
        }
    }

    /// The luck of the next probe.
    pub(super) fn probe_luck(&mut self) -> Luck {
        self.probes += 1;
        self.luck(u64::MAX - self.probes)
    }

    /// Sends what it lacks of a prompt; when it will be there, nothing where too much waits already.
    pub(super) fn store(&mut self, at_s: f64, lacking_bytes: u64) -> Option<f64> {
        if self.stored_until_s - at_s > BACKLOG_MAX_S {
            return None;
        }
        self.stored_until_s = self.up.pass(at_s, lacking_bytes);
        Some(self.stored_until_s)
    }

    /// The prompt's blocks are there, and were used.
    pub(super) fn stored(&mut self, ids: &[u64]) {
        self.held.request(ids);
    }

    pub(super) fn name(&self) -> &str {
        &self.hardware.name
    }

    /// Blocks that it holds.
    pub(super) fn held_blocks(&self) -> usize {
        self.held.length()
    }

    pub(super) fn up(&self) -> &Link {
        &self.up
    }
}
