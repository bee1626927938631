//! Copies by the processor, for transports that map both sides: by the caller that waits, else by a thread of ours.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::memory::MemorySlice;
use crate::transfer::{Batch, Cause, Direction, Drive, Piece, TransferError};

/// Between two of these the deadline is looked at: about a millisecond.
const STRIDE_BYTES: usize = 4 << 20;
/// A batch of so many bytes is copied in the background from the start. Waking a thread takes as long as copying a good part
/// of a smaller one, which therefore begins when somebody waits for it, looks for its outcome, or lets go of it.
const BACKGROUND_BYTES: usize = 4 << 20;
/// A batch of at most so many bytes is over before it is handed out, where nothing must be asked first: queueing it would
/// cost as much as copying a good part of it.
const AT_ONCE_BYTES: usize = 256 << 10;

/// When a lookup has to be over.
#[derive(Clone, Copy)]
pub(crate) enum Patience {
    /// It may not wait for anybody.
    None,
    /// It may ask the peer, until then.
    Until(Instant),
}

/// Finds a peer's bytes in this process.
pub(crate) trait Resolve: Send + Sync {
    /// Calls `copy` with the range, which stays reachable until it returns. `None`: that takes more patience.
    fn with(
        &self,
        piece: &Piece,
        patience: Patience,
        copy: &mut dyn FnMut(&MemorySlice) -> Result<(), Cause>,
    ) -> Option<Result<(), Cause>>;
}

/// Copies a small batch in the calling thread. `None`: it is not small, or somebody must be asked first; what was copied
/// may be copied again.
pub(crate) fn at_once(pieces: &[Piece], bytes: u64, resolve: &dyn Resolve) -> Option<Result<(), TransferError>> {
    if bytes > AT_ONCE_BYTES as u64 {
        return None;
    }
    for (at, piece) in pieces.iter().enumerate() {
        let copied = resolve.with(piece, Patience::None, &mut |remote| {
            copy(piece.direction, piece.host(), remote)
        })?;
        if let Err(cause) = copied {
            return Some(Err(TransferError { piece: at, cause }));
        }
    }
    Some(Ok(()))
}

/// A queue of batches and the thread that copies what nobody waits for.
pub(crate) struct Copier {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    filled: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Arc<Job>>,
    closed: bool,
}

struct Job {
    batch: Mutex<Option<Arc<Batch>>>,
    pieces: Vec<Piece>,
    resolve: Arc<dyn Resolve>,
    claimed: AtomicBool,
    queued: AtomicBool,
    shared: Arc<Shared>,
    this: Weak<Job>,
    on_done: Box<dyn Fn() + Send + Sync>,
}

impl Copier {
    pub(crate) fn start(name: &str) -> std::io::Result<Copier> {
        let shared = Arc::new(Shared::default());
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.run()
        })?;
        Ok(Copier {
            shared,
            thread: Some(thread),
        })
    }

    /// Queues a batch; `on_done` is called once its copies have ended.
    pub(crate) fn submit(
        &self,
        pieces: Vec<Piece>,
        deadline: Instant,
        resolve: Arc<dyn Resolve>,
        on_done: Box<dyn Fn() + Send + Sync>,
    ) -> Arc<Batch> {
        // The job owns the pieces, and the batch the job, until the copies have ended.
        let batch = Batch::new(Vec::new(), 1, deadline);
        let bytes: usize = pieces.iter().map(|piece| piece.local.len()).sum();
        let job = Arc::new_cyclic(|this| Job {
            batch: Mutex::new(Some(Arc::clone(&batch))),
            pieces,
            resolve,
            claimed: AtomicBool::new(false),
            queued: AtomicBool::new(false),
            shared: Arc::clone(&self.shared),
            this: Weak::clone(this),
            on_done,
        });
        batch.driven_by(Arc::clone(&job) as Arc<dyn Drive>);
        if bytes >= BACKGROUND_BYTES {
            job.hand_over();
        }
        batch
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        self.shared.queue.lock().closed = true;
        self.shared.filled.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // It panics only on a broken rule of ours, which has been printed.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        loop {
            let job = {
                let mut queue = self.queue.lock();
                loop {
                    if let Some(job) = queue.jobs.pop_front() {
                        break job;
                    }
                    if queue.closed {
                        return;
                    }
                    self.filled.wait(&mut queue);
                }
            };
            job.run();
        }
    }
}

impl Job {
    /// Copies everything, unless somebody has begun to.
    fn run(&self) {
        if self.claimed.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(batch) = self.batch.lock().take() else { return };
        let result = self.copy(&batch);
        (self.on_done)();
        match result {
            Ok(()) => batch.finish(0, Ok(())),
            Err((piece, cause)) => batch.finish(piece, Err(cause)),
        }
    }

    fn copy(&self, batch: &Batch) -> Result<(), (usize, Cause)> {
        let mut pace = Pace {
            deadline: batch.deadline,
            left: 0,
        };
        for (at, piece) in self.pieces.iter().enumerate() {
            self.resolve
                .with(piece, Patience::Until(batch.deadline), &mut |remote| {
                    copy_piece(piece, remote, &mut pace)
                })
                .unwrap_or(Err(Cause::Deadline))
                .map_err(|cause| (at, cause))?;
        }
        Ok(())
    }
}

impl Drive for Job {
    fn drive(&self, _: &Arc<Batch>) {
        self.run();
    }

    fn hand_over(&self) {
        if self.claimed.load(Ordering::Acquire) || self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Some(job) = self.this.upgrade() {
            let mut queue = self.shared.queue.lock();
            if queue.closed {
                drop(queue);
                // The thread may have ended.
                return job.run();
            }
            queue.jobs.push_back(job);
            self.shared.filled.notify_one();
        }
    }
}

/// Looks at the clock once a stride, over all pieces of a batch.
struct Pace {
    deadline: Instant,
    left: usize,
}

impl Pace {
    fn go_on(&mut self, bytes: usize) -> Result<(), Cause> {
        if self.left == 0 {
            if Instant::now() >= self.deadline {
                return Err(Cause::Deadline);
            }
            self.left = STRIDE_BYTES;
        }
        self.left = self.left.saturating_sub(bytes);
        Ok(())
    }
}

fn copy_piece(piece: &Piece, remote: &MemorySlice, pace: &mut Pace) -> Result<(), Cause> {
    let local = piece.host();
    if local.len() <= STRIDE_BYTES {
        pace.go_on(local.len())?;
        return copy(piece.direction, local, remote);
    }
    let mut done = 0;
    while done < local.len() {
        let length = STRIDE_BYTES.min(local.len() - done);
        pace.go_on(length)?;
        let part = |slice: &MemorySlice| {
            slice
                .subslice(done, length)
                .map_err(|error| Cause::Local(error.to_string()))
        };
        copy(piece.direction, &part(local)?, &part(remote)?)?;
        done += length;
    }
    Ok(())
}

fn copy(direction: Direction, local: &MemorySlice, remote: &MemorySlice) -> Result<(), Cause> {
    let copied = match direction {
        Direction::Read => remote.copy_to(local),
        Direction::Write => local.copy_to(remote),
    };
    copied.map_err(|error| Cause::Local(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryRegion;
    use crate::remote::{RegionId, RemoteAccess, RemoteRegion};
    use std::sync::atomic::AtomicUsize;

    /// Knows a region from the `known_from`th look on, unless somebody may wait.
    struct Known {
        slice: MemorySlice,
        known_from: usize,
        looks: AtomicUsize,
    }

    impl Resolve for Known {
        fn with(
            &self,
            _: &Piece,
            patience: Patience,
            copy: &mut dyn FnMut(&MemorySlice) -> Result<(), Cause>,
        ) -> Option<Result<(), Cause>> {
            let look = self.looks.fetch_add(1, Ordering::Relaxed);
            match patience {
                Patience::None if look < self.known_from => None,
                _ => Some(copy(&self.slice)),
            }
        }
    }

    fn known(bytes: usize, known_from: usize) -> Known {
        let slice = MemoryRegion::anonymous(bytes).expect("memory").slice(0, bytes);
        let slice = slice.expect("inside");
        slice.copy_from_slice(&vec![7; bytes]).expect("equal");
        Known {
            slice,
            known_from,
            looks: AtomicUsize::new(0),
        }
    }

    fn read(bytes: usize) -> Piece {
        let remote = RemoteRegion {
            id: RegionId(1),
            address: 0,
            bytes: bytes as u64,
            access: RemoteAccess::Read,
            remote_keys: Vec::new(),
        };
        Piece {
            local: MemoryRegion::anonymous(bytes)
                .expect("memory")
                .slice(0, bytes)
                .expect("inside")
                .into(),
            remote: Arc::new(remote).slice(0, bytes as u64).expect("inside"),
            direction: Direction::Read,
        }
    }

    #[test]
    fn a_small_batch_is_copied_at_once_and_a_large_one_is_not() {
        let small = read(4096);
        assert_eq!(
            at_once(std::slice::from_ref(&small), 4096, &known(4096, 0)),
            Some(Ok(()))
        );
        assert_eq!(small.host().to_vec(), [7; 4096]);
        let bytes = AT_ONCE_BYTES + 4096;
        let large = read(bytes);
        assert_eq!(
            at_once(std::slice::from_ref(&large), bytes as u64, &known(bytes, 0)),
            None
        );
        assert_eq!(large.host().to_vec(), vec![0; bytes]);
    }

    #[test]
    fn a_batch_that_must_ask_first_is_queued() {
        let pieces = [read(4096), read(4096)];
        let resolve = known(4096, 2);
        assert_eq!(at_once(&pieces, 8192, &resolve), None);
        assert_eq!(resolve.looks.load(Ordering::Relaxed), 1, "it stops at the first");
    }

    #[test]
    fn a_small_batch_names_the_piece_that_failed() {
        // The range that is found is shorter than what is asked for.
        let pieces = [read(4096), read(8192)];
        match at_once(&pieces, 12_288, &known(4096, 0)) {
            Some(Err(TransferError {
                piece: 1,
                cause: Cause::Local(_),
            })) => {}
            other => panic!("{other:?}"),
        }
    }
}
