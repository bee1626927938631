use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_transfer::memory::MemorySlice;

/// Which way a request moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// File to memory.
    Read,
    /// Memory to file.
    Write,
}

/// Which requests go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Somebody waits for it.
    Foreground,
    /// Goes when nothing in the foreground waits, and then and again, so that it never starves.
    Background,
}

/// Called once, with the outcome and the request's memory, when no device touches it any more. Runs on the engine's
/// thread: keep it short, and never call [`NvmeEngine::shutdown`] from it.
pub type Done = Box<dyn FnOnce(Finished) + Send>;

/// Told, while the engine has nothing else to do, how many bytes from the front of a read have arrived: work on them then
/// hides behind the bytes still to come. It may never be called. Runs on the engine's thread, before [`Done`].
pub type Arrived = Box<dyn FnMut(usize) + Send>;

/// One read or write of a file.
///
/// The engine owns the memory from submission until [`Request::done`] runs. With direct I/O, `offset` and the memory's
/// address and length are multiples of 4 KiB; elsewhere anything goes.
pub struct Request {
    /// Which way.
    pub direction: Direction,
    /// Which lane.
    pub priority: Priority,
    /// The file.
    pub file: Arc<File>,
    /// Where in the file.
    pub offset: u64,
    /// Where in memory, and how much.
    pub memory: MemorySlice,
    /// Fails with [`EngineError::Deadline`] if the device was not asked by then.
    pub deadline: Option<Instant>,
    /// Told of a read's progress, if there is a use for it.
    pub arrived: Option<Arrived>,
    /// Told the outcome.
    pub done: Done,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("direction", &self.direction)
            .field("priority", &self.priority)
            .field("offset", &self.offset)
            .field("length", &self.memory.len())
            .finish_non_exhaustive()
    }
}

impl Request {
    pub(crate) fn finish(self, outcome: Result<(), EngineError>, idle: bool) {
        // What it holds must be gone when `done` says that nothing is touched any more.
        drop(self.arrived);
        (self.done)(Finished {
            memory: self.memory,
            outcome,
            idle,
        });
    }
}

/// What became of a request.
#[derive(Debug)]
pub struct Finished {
    /// The memory, which no device touches any more. After a failed read its bytes are anything.
    pub memory: MemorySlice,
    /// The outcome; all or nothing.
    pub outcome: Result<(), EngineError>,
    /// The engine has nothing else to do at this moment, so that work done here delays nobody.
    pub idle: bool,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The device or file system answered with an error.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The file ended before the bytes did.
    #[error("the file ended before the request")]
    EndOfFile,
    /// Its deadline passed before the device was asked.
    #[error("the deadline passed before the device was asked")]
    Deadline,
    /// The queue was full: what its owner finishes a request with that was handed back.
    #[error("the queue is full")]
    Busy,
    /// It was cancelled before the device was asked.
    #[error("cancelled before the device was asked")]
    Cancelled,
}

/// Moves bytes between files and memory. Two of them: `uring` and `threads`, the same in behaviour.
///
/// The queue is bounded; foreground requests go before background ones; each request's `done` runs exactly once.
pub trait NvmeEngine: Send + Sync {
    /// Queues a request, or hands it back at once when the queue is full or the engine is shut down.
    fn submit(&self, request: Request) -> Result<(), Request>;

    /// Finishes every request that the device was not asked for yet with [`EngineError::Cancelled`], on the calling
    /// thread.
    fn cancel_queued(&self);

    /// Cancels what is queued, waits for what is in flight, ends the threads. Later submissions are handed back.
    /// Idempotent.
    fn shutdown(&self);

    /// `io_uring` or `threads`.
    fn name(&self) -> &'static str;
}

/// Bounds of an engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineSettings {
    /// Requests (or pieces of large ones) that the device works on at a time.
    pub queue_depth: usize,
    /// Requests that wait, both lanes together.
    pub queue_max: usize,
    /// Threads of the `threads` engine.
    pub threads: usize,
    /// The ring asks for large requests in pieces of this many bytes, a multiple of 4 KiB.
    pub piece_bytes: usize,
}

impl Default for EngineSettings {
    fn default() -> Self {
        EngineSettings {
            queue_depth: 32,
            queue_max: 1024,
            threads: 8,
            piece_bytes: 512 << 10,
        }
    }
}

/// How often a stuck engine looks for requests whose deadline passed.
pub(crate) const SWEEP_INTERVAL: Duration = Duration::from_millis(50);
