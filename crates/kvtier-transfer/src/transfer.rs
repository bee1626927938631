//! A batch of copies in flight: its pieces, its one deadline and its one outcome.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::gpu::Place;
use crate::memory::MemorySlice;
use crate::remote::{RemoteAccess, RemoteSlice};

/// Most pieces of one batch.
pub const PIECES_MAX: usize = 4096;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the peer into local memory.
    Read,
    /// From local memory to the peer.
    Write,
}

/// One copy between local memory and a peer's. Both sides have the same length.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Local side; for a transport with NICs in a registered region. Memory of a device only they reach.
    pub local: Place,
    /// The peer's side.
    pub remote: RemoteSlice,
    /// Which way.
    pub direction: Direction,
}

/// Why a batch was not taken. Nothing of it has been or will be moved; the pieces come back.
#[derive(Debug)]
pub struct Refused {
    /// What was wrong.
    pub reason: Refusal,
    /// What was handed in.
    pub pieces: Vec<Piece>,
}

/// What was wrong with a batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A piece that cannot be right.
    #[error("piece {piece}: {what}")]
    Invalid {
        /// Which one, from 0.
        piece: usize,
        /// Why.
        what: &'static str,
    },
    /// As much is in flight to this peer as its settings allow: back off, or take another source.
    #[error("{in_flight} pieces are in flight to this peer, {limit} at most")]
    Busy {
        /// Pieces in flight.
        in_flight: usize,
        /// The limit.
        limit: usize,
    },
    /// The peer was not to be reached a moment ago and no new attempt is due yet.
    #[error("the peer is gone: {0}")]
    Gone(String),
}

/// Why a batch failed: its first failed piece. Target bytes of the batch are unspecified; nobody writes them any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("piece {piece}: {cause}")]
pub struct TransferError {
    /// The first piece that failed, from 0.
    pub piece: usize,
    /// Why.
    pub cause: Cause,
}

/// Why a piece failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// The batch's deadline passed.
    #[error("the deadline passed")]
    Deadline,
    /// The peer does not (or no longer) let us: an unknown or revoked key, a range or an access it did not register.
    #[error("the peer refuses: {0}")]
    Denied(String),
    /// The peer cannot be reached, or broke the protocol.
    #[error("the peer is gone: {0}")]
    PeerGone(String),
    /// Something on this node: memory that is not registered, a device that failed.
    #[error("local: {0}")]
    Local(String),
}

/// Checks what can be checked without the peer.
pub(crate) fn check(pieces: &[Piece]) -> Result<(), Refusal> {
    let invalid = |piece, what| Err(Refusal::Invalid { piece, what });
    if pieces.is_empty() {
        return invalid(0, "an empty batch");
    }
    if pieces.len() > PIECES_MAX {
        return invalid(PIECES_MAX, "more pieces than a batch can have");
    }
    for (at, piece) in pieces.iter().enumerate() {
        if piece.local.len() as u64 != piece.remote.len() {
            return invalid(at, "the two sides differ in length");
        }
        if piece.local.is_empty() {
            return invalid(at, "an empty piece");
        }
        match piece.direction {
            Direction::Read if !is_writable(&piece.local) => return invalid(at, "the target is mapped read-only"),
            Direction::Write if piece.remote.region().access == RemoteAccess::Read => {
                return invalid(at, "the peer registered the target for reads only");
            }
            _ => {}
        }
    }
    Ok(())
}

fn is_writable(place: &Place) -> bool {
    match place {
        Place::Host(slice) => slice.is_writable(),
        Place::Device(_) => true,
    }
}

/// The same for a transport where the processor touches the bytes.
pub(crate) fn check_host(pieces: &[Piece]) -> Result<(), Refusal> {
    check(pieces)?;
    match pieces.iter().position(|piece| matches!(piece.local, Place::Device(_))) {
        None => Ok(()),
        Some(piece) => Err(Refusal::Invalid {
            piece,
            what: "its local side is memory of a device, which only NICs reach",
        }),
    }
}

impl Piece {
    /// The local side of a piece that `check_host` let pass.
    pub(crate) fn host(&self) -> &MemorySlice {
        match &self.local {
            Place::Host(slice) => slice,
            Place::Device(_) => unreachable!("refused before it got here"),
        }
    }
}

/// A batch in flight.
///
/// The outcome arrives when no device, kernel or thread touches the batch's memory any more, so that a caller may reuse
/// it at once: at the deadline plus the short time that stopping takes, at the latest. Dropping it abandons interest in
/// the outcome, never the memory: the pieces stay owned until the same moment.
#[must_use = "an outcome that nobody looks at may be a failure"]
pub struct Transfer(Stage);

enum Stage {
    /// It was done before it was handed out.
    Done(Result<(), TransferError>),
    Running(Arc<Batch>),
}

impl Transfer {
    pub(crate) fn new(batch: Arc<Batch>) -> Transfer {
        Transfer(Stage::Running(batch))
    }

    /// One that is over: nothing touches its memory any more.
    pub(crate) fn done(outcome: Result<(), TransferError>) -> Transfer {
        Transfer(Stage::Done(outcome))
    }

    /// Waits for the outcome. The calling thread moves bytes itself where the transport allows that, which saves waking
    /// another one.
    ///
    /// # Errors
    /// The first failed piece and why.
    pub fn wait(mut self) -> Result<(), TransferError> {
        match &mut self.0 {
            Stage::Done(outcome) => std::mem::replace(outcome, Ok(())),
            Stage::Running(batch) => batch.wait(),
        }
    }

    /// The outcome, if it is there. If not, a thread of the transport sees to it from now on.
    #[must_use]
    pub fn outcome(&self) -> Option<Result<(), TransferError>> {
        match &self.0 {
            Stage::Done(outcome) => Some(outcome.clone()),
            Stage::Running(batch) => {
                let outcome = batch.outcome();
                if outcome.is_some() {
                    return outcome;
                }
                batch.hand_over();
                // Whoever was handed it may have found it done.
                batch.outcome()
            }
        }
    }
}

impl Future for Transfer {
    type Output = Result<(), TransferError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let batch = match &self.0 {
            Stage::Done(outcome) => return Poll::Ready(outcome.clone()),
            Stage::Running(batch) => batch,
        };
        {
            let mut state = batch.state.lock();
            if let Some(outcome) = state.outcome() {
                return Poll::Ready(outcome);
            }
            state.waker = Some(context.waker().clone());
        }
        batch.hand_over();
        Poll::Pending
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if let Stage::Running(batch) = &self.0
            && batch.outcome().is_none()
        {
            batch.hand_over();
        }
    }
}

impl fmt::Debug for Transfer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match &self.0 {
            Stage::Done(outcome) => Some(outcome.clone()),
            Stage::Running(batch) => batch.outcome(),
        };
        formatter
            .debug_struct("Transfer")
            .field("outcome", &outcome)
            .finish_non_exhaustive()
    }
}

/// What a waiting caller can do to get its own batch done.
pub(crate) trait Drive: Send + Sync {
    /// Moves bytes until `batch` is done or nothing is left for this thread to do.
    fn drive(&self, batch: &Arc<Batch>);
    /// Nobody will wait in a thread of their own: a thread of the transport must do the work.
    fn hand_over(&self);
}

/// The shared side of a [`Transfer`].
pub(crate) struct Batch {
    pub(crate) deadline: Instant,
    /// A thread sleeps until this batch is done: whoever stops driving must see to it that somebody goes on.
    sleeping: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    drive: Mutex<Option<Arc<dyn Drive>>>,
}

struct State {
    /// Owned here until nothing touches their memory.
    pieces: Vec<Piece>,
    /// Parts that are not at rest yet.
    left: usize,
    failed: Option<TransferError>,
    waker: Option<Waker>,
}

impl State {
    fn outcome(&self) -> Option<Result<(), TransferError>> {
        (self.left == 0).then(|| self.failed.clone().map_or(Ok(()), Err))
    }
}

impl Batch {
    /// `parts`: how often [`Batch::finish`] will be called.
    pub(crate) fn new(pieces: Vec<Piece>, parts: usize, deadline: Instant) -> Arc<Batch> {
        assert!(parts > 0, "a batch has a part");
        Arc::new(Batch {
            deadline,
            sleeping: AtomicBool::new(false),
            state: Mutex::new(State {
                pieces,
                left: parts,
                failed: None,
                waker: None,
            }),
            changed: Condvar::new(),
            drive: Mutex::new(None),
        })
    }

    pub(crate) fn driven_by(&self, drive: Arc<dyn Drive>) {
        *self.drive.lock() = Some(drive);
    }

    /// One part is at rest: nothing touches its memory any more.
    pub(crate) fn finish(&self, piece: usize, result: Result<(), Cause>) {
        let mut state = self.state.lock();
        if let Err(cause) = result {
            state.failed.get_or_insert(TransferError { piece, cause });
        }
        assert!(state.left > 0, "a part that finishes twice");
        state.left -= 1;
        if state.left > 0 {
            return;
        }
        let pieces = std::mem::take(&mut state.pieces);
        let waker = state.waker.take();
        drop(state);
        self.changed.notify_all();
        // A region may be unmapped here, and a waker may run anything: not under the lock.
        drop(pieces);
        *self.drive.lock() = None;
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.state.lock().left == 0
    }

    /// Whether it has failed already, so that moving the rest is of no use.
    pub(crate) fn has_failed(&self) -> bool {
        self.state.lock().failed.is_some()
    }

    pub(crate) fn is_late(&self, now: Instant) -> bool {
        now >= self.deadline
    }

    pub(crate) fn has_sleeper(&self) -> bool {
        self.sleeping.load(Ordering::SeqCst)
    }

    pub(crate) fn outcome(&self) -> Option<Result<(), TransferError>> {
        self.state.lock().outcome()
    }

    fn hand_over(&self) {
        self.sleeping.store(true, Ordering::SeqCst);
        let drive = self.drive.lock().clone();
        if let Some(drive) = drive {
            drive.hand_over();
        }
    }

    fn wait(self: &Arc<Self>) -> Result<(), TransferError> {
        let drive = self.drive.lock().clone();
        if let Some(drive) = drive
            && !self.is_done()
        {
            drive.drive(self);
        }
        let mut state = self.state.lock();
        loop {
            if let Some(outcome) = state.outcome() {
                return outcome;
            }
            self.sleeping.store(true, Ordering::SeqCst);
            self.changed.wait(&mut state);
        }
    }

    /// For a driver whose connection another thread drives: marks the batch as waited for. The caller must look once more
    /// whether it can drive after this.
    pub(crate) fn announce_sleeper(&self) {
        self.sleeping.store(true, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests;
