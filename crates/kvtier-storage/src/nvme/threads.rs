use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use parking_lot::Mutex;

use super::engine::{Direction, EngineError, EngineSettings, NvmeEngine, Request};
use super::queue::{RequestQueue, is_late};

/// A pool of threads, each of which reads or writes one request at a time: for systems that deny io_uring.
pub struct ThreadsEngine {
    queue: Arc<RequestQueue>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl ThreadsEngine {
    /// Starts the threads.
    pub fn start(settings: EngineSettings) -> io::Result<ThreadsEngine> {
        let engine = ThreadsEngine {
            queue: Arc::new(RequestQueue::new(settings.queue_max)),
            threads: Mutex::new(Vec::new()),
        };
        for _ in 0..settings.threads.max(1) {
            engine.spawn("kvtier-nvme-io", |queue| {
                while let Some(request) = queue.wait() {
                    serve(request, queue);
                }
            })?;
        }
        engine.spawn("kvtier-nvme-due", RequestQueue::watch_deadlines)?;
        Ok(engine)
    }

    fn spawn(&self, name: &str, work: impl FnOnce(&RequestQueue) + Send + 'static) -> io::Result<()> {
        let queue = Arc::clone(&self.queue);
        // On failure dropping the engine ends the threads that did start.
        let thread = thread::Builder::new().name(name.into()).spawn(move || work(&queue))?;
        self.threads.lock().push(thread);
        Ok(())
    }
}

impl NvmeEngine for ThreadsEngine {
    fn submit(&self, request: Request) -> Result<(), Request> {
        self.queue.push(request)
    }

    fn cancel_queued(&self) {
        self.queue.cancel();
    }

    fn shutdown(&self) {
        self.queue.close();
        self.queue.cancel();
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            // A panic of that thread was reported when it happened.
            let _ = thread.join();
        }
    }

    fn name(&self) -> &'static str {
        "threads"
    }
}

impl Drop for ThreadsEngine {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn serve(request: Request, queue: &RequestQueue) {
    if is_late(&request, Instant::now()) {
        return request.finish(Err(EngineError::Deadline), false);
    }
    let outcome = transfer(&request);
    request.finish(outcome, queue.is_empty());
}

fn transfer(request: &Request) -> Result<(), EngineError> {
    let length = request.memory.len();
    let mut done = 0;
    while done < length {
        let rest = request
            .memory
            .subslice(done, length - done)
            .expect("a rest lies in its whole");
        let at = request.offset + done as u64;
        let moved = match request.direction {
            Direction::Read => rest.read_at(&*request.file, at),
            Direction::Write => rest.write_at(&*request.file, at),
        };
        match (moved, request.direction) {
            (Ok(0), Direction::Read) => return Err(EngineError::EndOfFile),
            (Ok(0), Direction::Write) => return Err(EngineError::Io(io::ErrorKind::WriteZero.into())),
            (Ok(count), _) => done += count,
            (Err(error), _) if error.kind() == io::ErrorKind::Interrupted => {}
            (Err(error), _) => return Err(EngineError::Io(error)),
        }
    }
    Ok(())
}
