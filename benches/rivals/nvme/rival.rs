use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use foyer::{
    BlockEngineConfig, Code, DeviceBuilder as _, FsDeviceBuilder, HybridCache, IoEngineConfig, Load,
    PsyncIoEngineConfig, RecoverMode, UringIoEngineConfig,
};
use kvtier_transfer::memory::crc32c;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::cache::{Cache, Pending, Read};
use crate::once::WARM;
use crate::values::{VALUE_BYTES, Values};

/// foyer's hybrid cache, with as little memory tier as it can have: puts go to its storage engine, and reads are served
/// by that directly.
pub(crate) struct Foyer {
    cache: HybridCache<u64, Paced>,
    room: Arc<Semaphore>,
    values: Arc<Values>,
}

/// How foyer is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setup {
    io: Io,
    flushers: usize,
    block_bytes: usize,
    buffer_pool_bytes: usize,
    queue_bytes: usize,
    /// Values that foyer has taken and not yet written or dropped. `None`: its `insert` returns at once, and so do the
    /// writers' puts.
    under_way_max: Option<usize>,
}

/// Which of its engines moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Io {
    Psync,
    Uring,
}

impl Setup {
    /// The best that was found on two cores: two, four and eight flushers and a larger pool do alike, one flusher costs
    /// writes a quarter.
    pub(crate) const PSYNC: Setup = Setup {
        io: Io::Psync,
        flushers: 4,
        block_bytes: 64 << 20,
        buffer_pool_bytes: 256 << 20,
        queue_bytes: 512 << 20,
        under_way_max: Some(64),
    };

    /// The same with its io_uring engine, one thread and a depth of 64; a second thread gained nothing.
    pub(crate) const URING: Setup = Setup {
        io: Io::Uring,
        ..Setup::PSYNC
    };

    /// Its own defaults, and no more under way than its buffer holds.
    pub(crate) const DEFAULT: Setup = Setup {
        io: Io::Psync,
        flushers: 1,
        block_bytes: 16 << 20,
        buffer_pool_bytes: 16 << 20,
        queue_bytes: 16 << 20,
        under_way_max: Some(8),
    };

    /// [`Setup::PSYNC`] with writers that do not wait, as its interface has it: what finds no room is dropped, and nobody
    /// is told.
    pub(crate) const UNPACED: Setup = Setup {
        under_way_max: None,
        ..Setup::PSYNC
    };
}

const PAGE_BYTES: usize = 4096;

/// A value, and the room that it takes in foyer's write buffers until foyer lets go of it. foyer offers nothing to wait
/// for; that it drops the value is how a writer learns that the next may come.
struct Paced {
    bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

impl Code for Paced {
    fn encode(&self, writer: &mut impl io::Write) -> foyer::Result<()> {
        self.bytes.encode(writer)
    }

    fn decode(reader: &mut impl io::Read) -> foyer::Result<Paced> {
        Ok(Paced {
            bytes: Bytes::decode(reader)?,
            _room: None,
        })
    }

    fn estimated_size(&self) -> usize {
        self.bytes.estimated_size()
    }
}

impl Foyer {
    /// An empty cache in `directory`, with room for all values and a quarter more.
    pub(crate) async fn open(directory: &Path, setup: Setup, values: &Arc<Values>) -> anyhow::Result<Foyer> {
        // An entry has a header and takes whole pages; a block begins with an index.
        let values_each = (setup.block_bytes - PAGE_BYTES) / (VALUE_BYTES + PAGE_BYTES);
        let blocks = (values.count() + WARM).div_ceil(values_each) * 5 / 4 + 4 * setup.flushers + 4;
        let device = FsDeviceBuilder::new(directory)
            .with_capacity(blocks * setup.block_bytes)
            .with_direct(true)
            .build()?;
        let engine = BlockEngineConfig::new(device)
            .with_block_size(setup.block_bytes)
            .with_flushers(setup.flushers)
            .with_buffer_pool_size(setup.buffer_pool_bytes)
            .with_submit_queue_size_threshold(setup.queue_bytes);
        let io: Box<dyn IoEngineConfig> = match setup.io {
            Io::Psync => PsyncIoEngineConfig::new().boxed(),
            Io::Uring => UringIoEngineConfig::new().boxed(),
        };
        let cache = HybridCache::builder()
            .memory(1)
            .with_shards(1)
            .storage()
            .with_io_engine_config(io)
            .with_engine_config(engine)
            .with_recover_mode(RecoverMode::None)
            .build()
            .await?;
        Ok(Foyer {
            cache,
            room: Arc::new(Semaphore::new(setup.under_way_max.unwrap_or(Semaphore::MAX_PERMITS))),
            values: Arc::clone(values),
        })
    }
}

impl Cache for Foyer {
    fn put(&self, index: usize) -> Pending<'_, ()> {
        Box::pin(async move {
            let room = Arc::clone(&self.room).acquire_owned().await?;
            let value = Paced {
                bytes: self.values.buffer(index),
                _room: Some(room),
            };
            self.cache.storage_writer(index as u64).force().insert(value);
            Ok(())
        })
    }

    /// Waits for its flushers. They do not sync, and nobody does it for them.
    fn settle(&self) -> Pending<'_, ()> {
        Box::pin(async move {
            self.cache.storage().wait().await;
            Ok(())
        })
    }

    fn read(&self, index: usize) -> Pending<'_, Read> {
        Box::pin(async move {
            Ok(match self.cache.storage().load(&(index as u64)).await? {
                Load::Entry { value, .. } => self.values.compare(index, crc32c(&value.bytes)),
                Load::Piece { piece, .. } => self.values.compare(index, crc32c(&piece.value().bytes)),
                Load::Throttled | Load::Miss => Read::Absent,
            })
        })
    }

    fn close(&self) -> Pending<'_, ()> {
        Box::pin(async move { Ok(self.cache.close().await?) })
    }
}
