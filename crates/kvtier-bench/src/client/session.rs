use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvtier::client::blocking::{Client, Namespace};
use kvtier::client::{ClientError, ClientOptions, FetchScope, PutOutcome};
use kvtier::node::Status;
use kvtier::{BlockHash, Parent, Realization};

use crate::BenchError;

/// Most keys in one message.
pub(super) const BATCH_KEYS_MAX: usize = 4096;

/// Longest time that a daemon may take to make its memory ready.
const READY_WITHIN: Duration = Duration::from_secs(300);

/// Tokens that a block is said to hold. Nothing here depends on it.
const BLOCK_TOKENS: u32 = 16;

/// Keys of one call in prefix order, and what comes before them.
pub(super) struct Keys {
    pub(super) parent: Parent,
    pub(super) hashes: Vec<BlockHash>,
}

/// A connection to the daemon under measurement, in a namespace that nobody else uses.
pub(super) struct Session {
    client: Client,
    namespace: Namespace,
    name: String,
    process: Option<u32>,
}

fn failed(what: &'static str) -> impl FnOnce(ClientError) -> BenchError {
    move |error| BenchError::Client {
        what,
        message: error.to_string(),
    }
}

fn options(socket: &Path, token: Option<&str>) -> ClientOptions {
    let options = ClientOptions::new(socket);
    match token {
        Some(token) => options.with_token(token),
        None => options,
    }
}

/// Waits until the daemon serves: it listens before its memory is ready.
pub(super) fn wait_until_serving(socket: &Path, token: Option<&str>) -> Result<(), BenchError> {
    let client = Client::connect(options(socket, token).with_timeout(READY_WITHIN)).map_err(failed("connection"))?;
    client.goodbye().map_err(failed("goodbye"))
}

impl Session {
    pub(super) fn connect(socket: &Path, token: Option<&str>) -> Result<Session, BenchError> {
        let process = UnixStream::connect(socket)
            .and_then(|stream| Ok(rustix::net::sockopt::socket_peercred(&stream)?))
            .map_err(BenchError::system(format!("a look at who serves {}", socket.display())))?;
        let client = Client::connect(options(socket, token)).map_err(failed("connection"))?;
        let name = format!("bench-{}-{}", std::process::id(), nanoseconds_since_1970());
        let namespace = client
            .namespace(&name, Realization::digest(&[("kvtier-bench", "1")]))
            .map_err(failed("namespace"))?;
        let process = u32::try_from(process.pid.as_raw_nonzero().get()).ok();
        Ok(Session {
            client,
            namespace,
            name,
            process,
        })
    }

    /// The daemon's process id, where this process can see it.
    pub(super) fn daemon_process(&self) -> Option<u32> {
        self.process
            .filter(|process| crate::baseline::process_cpu_time(*process).is_some())
    }

    /// The daemon's whole status; `None` where this user may only see its own domain's.
    pub(super) fn status(&self) -> Result<Option<Status>, BenchError> {
        let json = self.client.status().map_err(failed("status"))?;
        let value: serde_json::Value = serde_json::from_str(&json).map_err(|error| BenchError::Client {
            what: "status",
            message: error.to_string(),
        })?;
        if value.get("host_capacity_bytes").is_none() {
            return Ok(None);
        }
        serde_json::from_value(value)
            .map(Some)
            .map_err(|error| BenchError::Client {
                what: "status",
                message: error.to_string(),
            })
    }

    /// As [`Session::put_from`], where some of the blocks may be cached already.
    pub(super) fn put_missing(&self, parent: Parent, blocks: &[(BlockHash, &[u8])]) -> Result<(), BenchError> {
        self.put(parent, blocks, &[PutOutcome::Published, PutOutcome::Present])
    }

    /// Puts blocks that nobody has.
    pub(super) fn put_from(&self, parent: Parent, blocks: &[(BlockHash, &[u8])]) -> Result<(), BenchError> {
        self.put(parent, blocks, &[PutOutcome::Published])
    }

    fn put(&self, parent: Parent, blocks: &[(BlockHash, &[u8])], fine: &[PutOutcome]) -> Result<(), BenchError> {
        let outcomes = self
            .namespace
            .put_from(parent, blocks, BLOCK_TOKENS)
            .map_err(failed("put_from"))?;
        match outcomes.iter().position(|outcome| !fine.contains(outcome)) {
            None => Ok(()),
            Some(block) => Err(BenchError::Client {
                what: "put_from",
                message: format!("block {block} of {}: {:?}", blocks.len(), outcomes[block]),
            }),
        }
    }

    /// How many of the leading blocks were copied into their targets.
    pub(super) fn get_into(&self, hashes: &[BlockHash], targets: &mut [&mut [u8]]) -> Result<u64, BenchError> {
        let outcomes = self.namespace.get_into(hashes, targets).map_err(failed("get_into"))?;
        Ok(outcomes.iter().take_while(|outcome| outcome.is_hit()).count() as u64)
    }

    /// Leases blocks, reads one byte of each page where they lie, and lets go. How many leading blocks were there.
    pub(super) fn touch_in_place(&self, hashes: &[BlockHash]) -> Result<u64, BenchError> {
        let handles = self.namespace.get(hashes, FetchScope::Each).map_err(failed("get"))?;
        let mut hits = 0;
        for handle in handles.iter().map_while(Option::as_ref) {
            std::hint::black_box(handle.touch_pages().map_err(failed("a touch"))?);
            hits += 1;
        }
        Ok(hits)
    }

    /// How many keys are cached.
    pub(super) fn lookup(&self, hashes: &[BlockHash]) -> Result<u64, BenchError> {
        let found = self.namespace.lookup(hashes).map_err(failed("lookup"))?;
        Ok(found.iter().flatten().count() as u64)
    }

    /// Leaves nothing behind in a daemon that outlives the measurement.
    pub(super) fn forget_everything(self) -> Result<(), BenchError> {
        self.client.invalidate(&self.name).map_err(failed("invalidation"))?;
        Ok(())
    }
}

pub(super) fn nanoseconds_since_1970() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}
