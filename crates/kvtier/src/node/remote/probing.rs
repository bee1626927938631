use std::time::{Duration, Instant};

use kvtier_storage::remote::{ObjectGroup, ObjectName};

use super::{Remote, first_half};

/// Bytes of a probe at most.
const PROBE_BYTES: u64 = 2 << 20;
/// Of one after others that failed, at least: a slow server brings so much in time.
const PROBE_BYTES_MIN: u64 = 16 << 10;
/// How long a probe may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks whether one is due.
const PAUSE: Duration = Duration::from_millis(100);
/// How long the server keeps what is read by probes.
const TTL: Duration = Duration::from_secs(3600);

impl Remote {
    /// The probing thread: reads an object of no content where nothing was read for a while, so that the gate knows.
    pub(super) fn probe_server(&self) {
        let Some(weighing) = &self.weighing else { return };
        let mut most = PROBE_BYTES;
        while !self.is_stopping() {
            std::thread::sleep(PAUSE);
            let Some(bytes) = weighing.poll_probe(self.driver.clock.now(), self.name) else {
                continue;
            };
            let begun = Instant::now();
            let outcome = self.probe(bytes.clamp(1, most));
            most = match outcome {
                Some(_) => (most * 2).min(PROBE_BYTES),
                None => (most / 8).max(PROBE_BYTES_MIN),
            };
            weighing.probed(self.driver.clock.now(), self.name, begun, outcome);
        }
    }

    /// How long the answer took, and the bytes.
    fn probe(&self, bytes: u64) -> Option<(Duration, u64, Duration)> {
        let identity = self.driver.recorder.register.identity();
        let print = blake3::derive_key("kvtier v1 probe of remote objects", identity.as_bytes());
        let group = ObjectGroup {
            namespace: first_half(&print),
            generation: [0; 16],
        };
        let until = Instant::now() + PATIENCE;
        let mut name = [0; 16];
        name[..8].copy_from_slice(&bytes.to_le_bytes());
        let name = ObjectName(name);
        let there = self.noted(self.store.exists(&[(group, name)], until)).ok()?;
        if there != [true] {
            let content = vec![0x6b; usize::try_from(bytes).ok()?];
            let put = self.store.put(&group, &[(name, content)], Some(TTL), until);
            self.noted(put).ok()?;
        }
        let begun = Instant::now();
        self.noted(self.store.ping(until)).ok()?;
        let lookup = begun.elapsed();
        let begun = Instant::now();
        let mut arrived = 0;
        let fetched = self.store.fetch(&[(group, name)], until, &mut |_, object| {
            arrived = object.map_or(0, |object| object.len() as u64);
        });
        self.noted(fetched).ok()?;
        let took = begun.elapsed().saturating_sub(lookup);
        (arrived == bytes).then_some((lookup, bytes, took.max(Duration::from_micros(1))))
    }
}
