//! Who touches LMCache's pages, and when nobody does any more.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, select_biased, unbounded};
use kvtier_transfer::memory::{ForeignSlice, MemorySlice};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::client::{BlockHandle, BlockWriter};

/// What one thread copies at a time: large enough for the copy to run at its full speed, small enough that a large object
/// is shared out over the threads and a deadline waits for no longer than such a copy takes.
const PIECE_BYTES: usize = 1 << 20;

const WAITING: u8 = 0;
const CLAIMED: u8 = 1;
const COPIED: u8 = 2;
const CANCELLED: u8 = 3;
const FAILED: u8 = 4;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From LMCache's page to a slot of the node.
    Store,
    /// From a leased block to LMCache's page.
    Load,
}

/// What must not be given back before the copying has ended.
pub(super) enum Held {
    #[expect(dead_code, reason = "blocks are held, not looked at: the pieces have their memory")]
    Blocks(Vec<BlockHandle>),
    Slots(Vec<BlockWriter>),
}

struct Piece {
    state: AtomicU8,
    page: ForeignSlice,
    offset: usize,
    slice: MemorySlice,
}

/// Some copies between pages and the node's memory.
///
/// A thread claims a piece before it touches the page. [`Copying::cancel`] takes the pieces that nobody has claimed, and
/// [`Copying::settled`] waits for those that somebody has: once it returns, no thread touches the pages again.
pub(super) struct Copying {
    direction: Direction,
    pieces: Vec<Piece>,
    /// Pieces that are neither copied nor cancelled.
    left: AtomicUsize,
    settled: Notify,
    held: Mutex<Option<Held>>,
}

impl Copying {
    /// Of pages and the memory each is copied from or to; both sides have the same length.
    pub(super) fn new(direction: Direction, pairs: Vec<(ForeignSlice, MemorySlice)>, held: Held) -> Arc<Copying> {
        let mut pieces = Vec::with_capacity(pairs.len());
        for (page, slice) in pairs {
            assert_eq!(page.len(), slice.len(), "both sides of a copy have one length");
            let mut offset = 0;
            while offset < page.len() {
                let length = PIECE_BYTES.min(page.len() - offset);
                let part = slice.subslice(offset, length).expect("within the slice");
                pieces.push(Piece {
                    state: AtomicU8::new(WAITING),
                    page: page.clone(),
                    offset,
                    slice: part,
                });
                offset += length;
            }
        }
        Arc::new(Copying {
            direction,
            left: AtomicUsize::new(pieces.len()),
            pieces,
            settled: Notify::new(),
            held: Mutex::new(Some(held)),
        })
    }

    fn run(&self, number: usize) {
        let piece = &self.pieces[number];
        let claim = |from, to| {
            piece
                .state
                .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        };
        if !claim(WAITING, CLAIMED) {
            return;
        }
        let copied = match self.direction {
            Direction::Store => piece.page.copy_to(piece.offset, &piece.slice),
            Direction::Load => piece.page.copy_from(piece.offset, &piece.slice),
        };
        let state = if copied.is_ok() { COPIED } else { FAILED };
        piece.state.store(state, Ordering::Release);
        self.settle(1);
    }

    fn settle(&self, count: usize) {
        if count > 0 && self.left.fetch_sub(count, Ordering::AcqRel) == count {
            self.settled.notify_one();
        }
    }

    /// Takes away what no thread has begun.
    pub(super) fn cancel(&self) {
        let taken = self.pieces.iter().filter(|piece| {
            piece
                .state
                .compare_exchange(WAITING, CANCELLED, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        });
        self.settle(taken.count());
    }

    /// Waits until no thread will touch the pages again. One waiter at a time.
    pub(super) async fn settled(&self) {
        while self.left.load(Ordering::Acquire) > 0 {
            self.settled.notified().await;
        }
    }

    /// Whether every byte was copied.
    pub(super) fn is_complete(&self) -> bool {
        self.pieces
            .iter()
            .all(|piece| piece.state.load(Ordering::Acquire) == COPIED)
    }

    /// What it held. Only once it has settled.
    pub(super) fn take_held(&self) -> Option<Held> {
        assert_eq!(self.left.load(Ordering::Acquire), 0, "a copy is still under way");
        self.held.lock().take()
    }
}

struct Job {
    copying: Arc<Copying>,
    piece: usize,
}

/// The threads that copy: loads first, for an engine waits for them.
pub(super) struct Copiers {
    loads: Sender<Job>,
    stores: Sender<Job>,
    threads: Vec<JoinHandle<()>>,
}

impl Copiers {
    pub(super) fn start(count: u32) -> io::Result<Copiers> {
        let (loads, load_jobs) = unbounded();
        let (stores, store_jobs) = unbounded();
        let threads = (0..count)
            .map(|number| {
                let (load_jobs, store_jobs) = (load_jobs.clone(), store_jobs.clone());
                thread::Builder::new()
                    .name(format!("kvtier-copy-{number}"))
                    .spawn(move || work(&load_jobs, &store_jobs))
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Copiers { loads, stores, threads })
    }

    /// Hands all pieces out. How many may wait is bounded by who calls: what is leased or reserved is.
    pub(super) fn submit(&self, copying: &Arc<Copying>) {
        let queue = match copying.direction {
            Direction::Store => &self.stores,
            Direction::Load => &self.loads,
        };
        for piece in 0..copying.pieces.len() {
            let copying = Arc::clone(copying);
            queue
                .send(Job { copying, piece })
                .expect("the threads live as long as this");
        }
    }

    /// Ends the threads, each after the copy it is at.
    pub(super) fn stop(self) {
        drop((self.loads, self.stores));
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

fn work(loads: &Receiver<Job>, stores: &Receiver<Job>) {
    loop {
        let job = select_biased! {
            recv(loads) -> job => job,
            recv(stores) -> job => job,
        };
        // Both ends are dropped together.
        let Ok(job) = job else { return };
        job.copying.run(job.piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvtier_transfer::memory::MemoryRegion;

    const BYTES: usize = 3 * PIECE_BYTES + 4096;

    fn pair() -> (MemorySlice, ForeignSlice, MemorySlice) {
        let memory = |bytes| MemoryRegion::anonymous(bytes).expect("memory");
        let page = memory(BYTES).slice(0, BYTES).expect("in range");
        let block = memory(BYTES).slice(0, BYTES).expect("in range");
        block.copy_from_slice(&vec![7; BYTES]).expect("same length");
        let foreign = ForeignSlice::of(&page).expect("writable");
        (page, foreign, block)
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime")
    }

    #[test]
    fn a_large_object_is_copied_in_pieces_to_its_last_byte() {
        let (page, foreign, block) = pair();
        let copying = Copying::new(Direction::Load, vec![(foreign, block)], Held::Blocks(Vec::new()));
        assert_eq!(copying.pieces.len(), 4);
        let copiers = Copiers::start(2).expect("threads");
        copiers.submit(&copying);
        runtime().block_on(copying.settled());
        assert!(copying.is_complete());
        assert!(copying.take_held().is_some());
        assert_eq!(page.to_vec(), vec![7; BYTES]);
        copiers.stop();
    }

    #[test]
    fn what_was_cancelled_is_never_copied() {
        let (page, foreign, block) = pair();
        let copying = Copying::new(Direction::Load, vec![(foreign, block)], Held::Blocks(Vec::new()));
        copying.run(1);
        copying.cancel();
        runtime().block_on(copying.settled());
        assert!(!copying.is_complete());
        (0..4).for_each(|piece| copying.run(piece));
        let bytes = page.to_vec();
        assert!(bytes[..PIECE_BYTES].iter().all(|byte| *byte == 0));
        assert!(bytes[PIECE_BYTES..2 * PIECE_BYTES].iter().all(|byte| *byte == 7));
        assert!(bytes[2 * PIECE_BYTES..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn settling_waits_for_a_claimed_piece() {
        let (_page, foreign, block) = pair();
        let copying = Copying::new(Direction::Load, vec![(foreign, block)], Held::Blocks(Vec::new()));
        copying.pieces[0].state.store(CLAIMED, Ordering::Release);
        copying.cancel();
        runtime().block_on(async {
            let early = tokio::time::timeout(std::time::Duration::from_millis(20), copying.settled()).await;
            assert!(early.is_err(), "a piece is still being copied");
        });
    }
}
