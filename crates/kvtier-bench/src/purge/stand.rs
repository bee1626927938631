use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvtier::client::blocking::{Client, Namespace};
use kvtier::client::{ClientError, ClientOptions, PutOutcome};
use kvtier::node::Node;
use kvtier::purge::{PurgeJob, PurgeMode, PurgeRequest, PurgeScope, PurgeState};
use kvtier::settings::Settings;
use kvtier::{BlockHash, Parent, Realization};

use super::{BLOCK_BYTES, MIB};
use crate::{BenchError, pattern};

/// Blocks of one put.
const BATCH: u64 = 512;
/// Blocks of the tenant whose gets are timed, that are got from host memory, over and over.
pub(super) const HOT: u64 = 1024;
/// The same from NVMe, each once in a filling.
pub(super) const COLD: u64 = 1 << 16;
/// Host memory of the large node. The small one's is smaller than its blocks, too.
const HOST_BYTES_MAX: u64 = 1 << 30;
const NEARBY: &str = "foreground";
const PROBE: &str = "probe";
const TENANT: &str = "tenant";
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(600);

/// Blocks from NVMe: as many as a small node's purge has use for.
pub(super) fn cold(blocks: u64) -> u64 {
    COLD.min(blocks.max(2 * HOT))
}

/// Room on NVMe for a tenant of so many blocks, the other tenant, and what is being reclaimed.
pub(super) fn nvme_bytes(blocks: u64) -> u64 {
    let payload = (blocks + cold(blocks) + HOT) * BLOCK_BYTES as u64;
    (payload * 3 / 2).max(512 * MIB).next_multiple_of(64 * MIB)
}

fn host_bytes(blocks: u64) -> u64 {
    (blocks * BLOCK_BYTES as u64 / 2)
        .next_multiple_of(MIB)
        .clamp(16 * MIB, HOST_BYTES_MAX)
}

/// A node of its own, and what was put there.
pub(super) struct Stand {
    pub(super) blocks: u64,
    pub(super) node: Node,
    directory: PathBuf,
    requests: std::cell::Cell<u64>,
}

pub(super) fn failed(what: &'static str) -> impl FnOnce(ClientError) -> BenchError {
    move |error| BenchError::Client {
        what,
        message: error.to_string(),
    }
}

fn refused(what: &'static str, error: &impl ToString) -> BenchError {
    BenchError::Client {
        what,
        message: error.to_string(),
    }
}

impl Stand {
    pub(super) fn start(directory: &Path, blocks: u64) -> Result<Stand, BenchError> {
        let settings = Settings {
            state_dir: directory.to_owned(),
            socket: directory.join("kvtier.sock"),
            host_bytes: host_bytes(blocks),
            nvme_bytes: nvme_bytes(blocks),
            // Half of the gets are to wait for the device.
            prefetch_blocks: 0,
            lock_memory: false,
            ..Settings::default()
        };
        let settings = settings.check().map_err(|error| refused("settings", &error))?;
        let node = Node::start(settings, Box::new(|_| {})).map_err(|error| refused("start of a node", &error))?;
        Ok(Stand {
            blocks,
            node,
            directory: directory.to_owned(),
            requests: std::cell::Cell::new(0),
        })
    }

    /// Another node in the place of this one, filled. In one that was purged the other tenant's blocks are the oldest, and
    /// go when room is made for the tenant's.
    pub(super) fn anew(self) -> Result<Stand, BenchError> {
        let Stand {
            blocks,
            node,
            directory,
            requests,
        } = self;
        drop(node);
        std::fs::remove_dir_all(&directory).map_err(BenchError::system(directory.display().to_string()))?;
        let mut stand = Stand::start(&directory, blocks)?;
        stand.requests = requests;
        stand.fill()?;
        Ok(stand)
    }

    fn connect(&self) -> Result<Client, BenchError> {
        let options = ClientOptions::new(self.node.socket()).with_timeout(PATIENCE);
        Client::connect(options).map_err(failed("connection"))
    }

    /// The tenant whose gets are timed.
    pub(super) fn nearby(&self) -> Result<(Client, Namespace), BenchError> {
        let client = self.connect()?;
        let namespace = client
            .namespace(NEARBY, Realization::digest(&[]))
            .map_err(failed("namespace"))?;
        Ok((client, namespace))
    }

    /// Puts the other tenant's blocks, then the tenant's: of the former none is left in host memory, of the latter some are.
    pub(super) fn fill(&self) -> Result<(), BenchError> {
        self.put(NEARBY, HOT + cold(self.blocks))?;
        self.put(TENANT, self.blocks)?;
        // More than there is host memory for.
        let rest = host_bytes(self.blocks) / BLOCK_BYTES as u64 + 2 * BATCH;
        self.put(TENANT, self.blocks.max(rest))
    }

    /// A few blocks to invalidate.
    pub(super) fn fill_probe(&self) -> Result<(), BenchError> {
        self.put(PROBE, 16)
    }

    fn put(&self, name: &str, count: u64) -> Result<(), BenchError> {
        let client = self.connect()?;
        let namespace = client
            .namespace(name, Realization::digest(&[]))
            .map_err(failed("namespace"))?;
        let begun = Instant::now();
        let mut bytes = vec![0; BLOCK_BYTES * BATCH as usize];
        for first in (0..count).step_by(BATCH as usize) {
            let numbers = first..count.min(first + BATCH);
            let mut missing: Vec<(BlockHash, &[u8])> = Vec::new();
            for (number, block) in numbers.zip(bytes.chunks_mut(BLOCK_BYTES)) {
                pattern::write(number, block);
                missing.push((hash(number), block));
            }
            while !missing.is_empty() {
                let outcomes = namespace
                    .put_from(Parent::Root, &missing, 16)
                    .map_err(failed("put_from"))?;
                let mut outcomes = outcomes.into_iter();
                missing.retain(|_| !matches!(outcomes.next(), Some(PutOutcome::Published | PutOutcome::Present)));
                if begun.elapsed() > PATIENCE {
                    return Err(refused("put_from", &"the node has no room within ten minutes"));
                }
            }
        }
        client.flush().map_err(failed("flush"))?;
        // Slots granted ahead go back.
        client.goodbye().map_err(failed("goodbye"))
    }

    pub(super) fn invalidate_probe(&self) -> Result<Duration, BenchError> {
        let begun = Instant::now();
        self.node
            .invalidate(PROBE, PATIENCE)
            .map_err(|error| refused("invalidation", &error))?;
        Ok(begun.elapsed())
    }

    /// Invalidates the probe by a purge; how long that took. Returns once its receipt is written.
    pub(super) fn purge_probe(&self) -> Result<Duration, BenchError> {
        let begun = Instant::now();
        let job = self.purge(PROBE, PurgeMode::Invalidate)?;
        let acknowledged = begun.elapsed();
        self.await_receipt(&job)?;
        Ok(acknowledged)
    }

    /// Begins the physical purge of the tenant.
    pub(super) fn purge_tenant(&self) -> Result<PurgeJob, BenchError> {
        self.purge(TENANT, PurgeMode::Physical)
    }

    fn purge(&self, namespace: &str, mode: PurgeMode) -> Result<PurgeJob, BenchError> {
        self.requests.set(self.requests.get() + 1);
        let request = PurgeRequest {
            namespace: namespace.to_owned(),
            scope: PurgeScope::All,
            reach: None,
            mode,
            request_id: format!("bench-{}", self.requests.get()),
            reason: "measured".to_owned(),
        };
        let (job, _) = self.node.purge(request).map_err(|error| refused("purge", &error))?;
        Ok(job)
    }

    /// The receipt.
    pub(super) fn await_receipt(&self, job: &PurgeJob) -> Result<serde_json::Value, BenchError> {
        let begun = Instant::now();
        loop {
            let state = self.node.purge_job(&job.id).map(|job| job.state);
            if state == Some(PurgeState::Completed) {
                let text = self
                    .node
                    .purge_receipt(&job.id)
                    .map_err(|error| refused("receipt", &error))?;
                let text = text.ok_or_else(|| refused("receipt", &"there is none"))?;
                return serde_json::from_str(&text).map_err(|error| refused("receipt", &error));
            }
            if begun.elapsed() > PATIENCE {
                return Err(refused("purge", &"it is not done within ten minutes"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Of a block in any of the namespaces.
pub(super) fn hash(number: u64) -> BlockHash {
    pattern::hash(1, number)
}
