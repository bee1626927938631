//! The io_uring engine: one ring on a thread of its own.
//!
//! Requests come through a bounded queue. The ring thread starts as many pieces as the disk's depth allows, and sleeps
//! in the kernel until one completes or an eventfd, which is itself read through the ring, says that there is more; the
//! eventfd is written only while the thread sleeps.
//!
//! What is told of a finished request may be as long as a check of its bytes: between any two of them the thread looks
//! after the device, so that it never waits for more than one. Where requests come one after another it lingers for a
//! moment before it sleeps, since being woken costs more than that.
#![expect(
    unsafe_code,
    reason = "gives the kernel pointers into memory that the ring owns until their completions arrive"
)]

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use parking_lot::Mutex;

use super::engine::{Direction, EngineError, EngineSettings, NvmeEngine, Priority, Request, SWEEP_INTERVAL};
use super::queue::{FOREGROUND_TURNS, RequestQueue, is_late};

/// Pieces start at multiples of this.
const ALIGNMENT: usize = 4096;
/// Completion of the eventfd read.
const WAKE: u64 = u64::MAX;
/// More than this finished and not told yet is left to other threads to check: the device comes first.
const BACKLOG_BYTES_MAX: usize = 4 << 20;
/// How long the thread waits for a request before it sleeps, if the one before came that soon.
const LINGER: Duration = Duration::from_micros(100);
/// As measured by a thread that slept, being woken included.
const SOON: Duration = Duration::from_micros(150);
/// The kernel may ask for a piece to be tried again; not for ever.
const RETRIES_MAX: u32 = 1000;

/// One io_uring ring on its own thread.
pub struct UringEngine {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    queue: RequestQueue,
    /// The ring thread is in the kernel, or about to be, and would not see a new request by itself.
    sleeping: AtomicBool,
    wake: OwnedFd,
}

impl Shared {
    fn wake(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // Can fail only when 2^64 - 2 wakes are unread.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

impl UringEngine {
    /// Sets up a ring and starts its thread. Fails where the kernel, a container or a limit denies io_uring.
    pub fn start(settings: EngineSettings) -> io::Result<UringEngine> {
        let wake = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
        let shared = Arc::new(Shared {
            queue: RequestQueue::new(settings.queue_max),
            sleeping: AtomicBool::new(false),
            wake,
        });
        let (report, started) = crossbeam_channel::bounded(1);
        let thread = thread::Builder::new().name("kvtier-nvme-ring".into()).spawn({
            let shared = Arc::clone(&shared);
            // Made on its own thread: a ring with a single issuer belongs to whoever made it.
            move || match Ring::new(&shared, settings) {
                Ok(mut ring) => {
                    let _ = report.send(Ok(()));
                    ring.run();
                }
                Err(error) => {
                    let _ = report.send(Err(error));
                }
            }
        })?;
        let engine = UringEngine {
            shared,
            thread: Mutex::new(Some(thread)),
        };
        started
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the ring thread ended")))?;
        Ok(engine)
    }
}

impl NvmeEngine for UringEngine {
    fn submit(&self, request: Request) -> Result<(), Request> {
        self.shared.queue.push(request)?;
        self.shared.wake();
        Ok(())
    }

    fn cancel_queued(&self) {
        self.shared.queue.cancel();
    }

    fn shutdown(&self) {
        self.shared.queue.close();
        self.shared.queue.cancel();
        self.shared.wake();
        if let Some(thread) = self.thread.lock().take() {
            // A panic of that thread was reported when it happened.
            let _ = thread.join();
        }
    }

    fn name(&self) -> &'static str {
        "io_uring"
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// A request that the device works on, at least in part.
struct Active {
    request: Request,
    /// Bytes that pieces were made for.
    issued: usize,
    /// Pieces in flight.
    pieces: usize,
    /// Bytes from the front that arrived, and how many of them were told.
    front: usize,
    told: usize,
    /// Pieces that arrived behind the front.
    islands: Vec<Range<usize>>,
    failed: Option<EngineError>,
}

impl Active {
    /// Notes that a range is there; true if the front moved and somebody wants to know.
    fn arrive(&mut self, range: Range<usize>) -> bool {
        if self.request.arrived.is_none() {
            return false;
        }
        self.islands.push(range);
        let before = self.front;
        while let Some(next) = self.islands.iter().position(|island| island.start == self.front) {
            self.front = self.islands.swap_remove(next).end;
        }
        self.front > before
    }
}

/// What the device was asked for in one go.
#[derive(Clone, Copy)]
struct Piece {
    active: usize,
    start: usize,
    length: usize,
    retries: u32,
}

/// The ring thread's state.
struct Ring<'shared> {
    shared: &'shared Shared,
    ring: IoUring,
    settings: EngineSettings,
    /// Memory that the kernel may write or read: given up only when nothing is in flight.
    owned: ManuallyDrop<Owned>,
    free_pieces: Vec<usize>,
    free_actives: Vec<usize>,
    /// At most one request of each lane is issued in part.
    partial_foreground: Option<usize>,
    partial_background: Option<usize>,
    /// Pieces started in the foreground since one was in the background.
    foreground_streak: u32,
    /// Pieces to ask for again.
    again: VecDeque<usize>,
    /// Requests whose front moved; some may be gone meanwhile.
    arrivals: VecDeque<usize>,
    pieces_in_flight: usize,
    wake_armed: bool,
    finished: VecDeque<(Request, Result<(), EngineError>)>,
    /// Bytes that were read for what is in `finished`.
    finished_bytes: usize,
    swept: Instant,
    /// How long nothing was to be done before the last request came.
    lull: Duration,
    may_linger: bool,
}

struct Owned {
    actives: Vec<Option<Active>>,
    pieces: Vec<Option<Piece>>,
    wake_count: Box<u64>,
}

impl<'shared> Ring<'shared> {
    fn new(shared: &'shared Shared, settings: EngineSettings) -> io::Result<Ring<'shared>> {
        let depth = settings.queue_depth.clamp(1, 4096);
        let entries = u32::try_from((depth + 2).next_power_of_two()).expect("at most 8192");
        let mut ring = build(entries)?;
        if !ring.params().is_feature_ext_arg() {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        // Setting up may be allowed and entering denied.
        // SAFETY: a no-op refers to no memory.
        unsafe { ring.submission().push(&opcode::Nop::new().build()) }.map_err(io::Error::other)?;
        ring.submit_and_wait(1)?;
        while ring.completion().next().is_some() {}
        Ok(Ring {
            shared,
            ring,
            settings: EngineSettings {
                queue_depth: depth,
                piece_bytes: settings.piece_bytes.next_multiple_of(ALIGNMENT).max(ALIGNMENT),
                ..settings
            },
            owned: ManuallyDrop::new(Owned {
                actives: Vec::new(),
                pieces: Vec::new(),
                wake_count: Box::new(0),
            }),
            free_pieces: Vec::new(),
            free_actives: Vec::new(),
            partial_foreground: None,
            partial_background: None,
            foreground_streak: 0,
            again: VecDeque::new(),
            arrivals: VecDeque::new(),
            pieces_in_flight: 0,
            wake_armed: false,
            finished: VecDeque::new(),
            finished_bytes: 0,
            swept: Instant::now(),
            lull: Duration::MAX,
            // Elsewhere it would keep away whoever is to bring the next request.
            may_linger: thread::available_parallelism().is_ok_and(|cores| cores.get() > 1),
        })
    }

    fn run(&mut self) {
        loop {
            self.reap();
            self.fill();
            if let Some((request, outcome)) = self.next_finished() {
                self.keep_device_busy();
                let behind = self.finished_bytes > BACKLOG_BYTES_MAX;
                request.finish(outcome, !behind);
                continue;
            }
            if self.tell_arrived() {
                continue;
            }
            if self.pieces_in_flight > 0 {
                self.sleep();
                continue;
            }
            if self.shared.queue.is_closed() && self.shared.queue.is_empty() {
                return;
            }
            let idle_since = Instant::now();
            if !self.linger(idle_since) {
                self.sleep();
            }
            self.lull = idle_since.elapsed();
        }
    }

    /// Before a callback runs, which may take a while.
    fn keep_device_busy(&mut self) {
        if !self.ring.submission().is_empty() || self.ring.submission().taskrun() {
            self.enter(0, None);
        }
    }

    /// Tells one request of its progress; false where there is none to tell of.
    fn tell_arrived(&mut self) -> bool {
        while let Some(index) = self.arrivals.pop_front() {
            let active = self.owned.actives[index].as_ref();
            if active.is_none_or(|active| active.failed.is_some() || active.told == active.front) {
                continue;
            }
            self.keep_device_busy();
            let active = self.owned.actives[index].as_mut().expect("looked at above");
            active.told = active.front;
            if let Some(arrived) = &mut active.request.arrived {
                arrived(active.front);
            }
            return true;
        }
        false
    }

    /// Waits a moment for a request, if that is likely to be enough.
    fn linger(&self, idle_since: Instant) -> bool {
        if !self.may_linger || self.lull > SOON {
            return false;
        }
        while self.shared.queue.is_empty() {
            if idle_since.elapsed() >= LINGER {
                return false;
            }
            for _ in 0..16 {
                std::hint::spin_loop();
            }
        }
        true
    }

    /// Waits for a completion or a request. While the device is full and something waits, only for a while: should the
    /// device be stuck, what waits must still meet its deadlines.
    fn sleep(&mut self) {
        self.arm_wake();
        let full = self.pieces_in_flight >= self.settings.queue_depth;
        self.shared.sleeping.store(true, Ordering::SeqCst);
        // Looked at after the store: who pushes later sees `sleeping` and writes the eventfd.
        let waiting = !self.shared.queue.is_empty();
        if full && waiting {
            self.shared.sleeping.store(false, Ordering::SeqCst);
            self.enter(1, Some(SWEEP_INTERVAL));
            let now = Instant::now();
            if now - self.swept >= SWEEP_INTERVAL {
                self.swept = now;
                self.shared.queue.expire(now);
            }
        } else {
            let ending = self.pieces_in_flight == 0 && self.shared.queue.is_closed();
            if !waiting && !ending {
                self.enter(1, None);
            }
        }
        self.shared.sleeping.store(false, Ordering::SeqCst);
    }

    /// Submits what was pushed and waits for `completions`.
    fn enter(&mut self, completions: usize, timeout: Option<Duration>) {
        let entered = match timeout {
            None => self.ring.submit_and_wait(completions),
            Some(timeout) => {
                let timeout = types::Timespec::from(timeout);
                self.ring
                    .submitter()
                    .submit_with_args(completions, &types::SubmitArgs::new().timespec(&timeout))
            }
        };
        if let Err(error) = entered
            && !matches!(
                error.raw_os_error(),
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)
            )
        {
            tracing::error!(%error, "io_uring_enter failed; trying again");
            thread::sleep(SWEEP_INTERVAL);
        }
    }

    fn arm_wake(&mut self) {
        if self.wake_armed {
            return;
        }
        let target: *mut u64 = &raw mut *self.owned.wake_count;
        let entry = opcode::Read::new(types::Fd(self.shared.wake.as_raw_fd()), target.cast(), 8)
            .build()
            .user_data(WAKE);
        self.wake_armed = self.push(&entry);
    }

    /// `false` when the submission queue is full, which its size excludes.
    fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: entries made here point into `self.owned`, which outlives their completions (see `drop`).
        let pushed = unsafe { self.ring.submission().push(entry) };
        debug_assert!(pushed.is_ok(), "the submission queue has room for the whole depth");
        pushed.is_ok()
    }

    fn reap(&mut self) {
        loop {
            let next = self.ring.completion().next();
            let Some(completion) = next else { return };
            match completion.user_data() {
                WAKE => self.wake_armed = false,
                piece => self.complete(usize::try_from(piece).expect("an index of ours"), completion.result()),
            }
        }
    }

    fn complete(&mut self, index: usize, result: i32) {
        let Owned { actives, pieces, .. } = &mut *self.owned;
        let piece = pieces[index].as_mut().expect("a completion for a piece in flight");
        self.pieces_in_flight -= 1;
        let active = actives[piece.active].as_mut().expect("a piece of an active request");
        let outcome = match (usize::try_from(result), active.request.direction) {
            (Ok(0), Direction::Read) => Err(EngineError::EndOfFile),
            (Ok(0), Direction::Write) => Err(EngineError::Io(io::ErrorKind::WriteZero.into())),
            (Ok(moved), _) if moved >= piece.length => Ok(0),
            // Go on at an aligned place; where that would be where this piece began, the file ends in the middle of a
            // page.
            (Ok(moved), _) => Ok(if moved >= ALIGNMENT {
                moved - moved % ALIGNMENT
            } else {
                moved
            }),
            (Err(_), _) => Err(EngineError::Io(io::Error::from_raw_os_error(-result))),
        };
        let outcome = match outcome {
            Err(EngineError::Io(error))
                if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) && piece.retries < RETRIES_MAX =>
            {
                piece.retries += 1;
                self.again.push_back(index);
                return;
            }
            Ok(moved) if moved > 0 => {
                if active.arrive(piece.start..piece.start + moved) {
                    self.arrivals.push_back(piece.active);
                }
                piece.start += moved;
                piece.length -= moved;
                self.again.push_back(index);
                return;
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        let owner = piece.active;
        if outcome.is_ok() && active.arrive(piece.start..piece.start + piece.length) {
            self.arrivals.push_back(owner);
        }
        pieces[index] = None;
        self.free_pieces.push(index);
        active.pieces -= 1;
        if let Err(error) = outcome {
            active.failed.get_or_insert(error);
            // What was not asked for yet never will be.
            for partial in [&mut self.partial_foreground, &mut self.partial_background] {
                partial.take_if(|partial| *partial == owner);
            }
        }
        self.retire(owner);
    }

    /// Moves a request that needs the device no more to `finished`.
    fn retire(&mut self, index: usize) {
        let active = self.owned.actives[index].as_ref().expect("an active request");
        let complete = active.issued == active.request.memory.len() || active.failed.is_some();
        if active.pieces > 0 || !complete {
            return;
        }
        let active = self.owned.actives[index].take().expect("an active request");
        self.free_actives.push(index);
        self.end(active.request, active.failed.map_or(Ok(()), Err));
    }

    fn end(&mut self, request: Request, outcome: Result<(), EngineError>) {
        self.finished_bytes += read_bytes(&request);
        self.finished.push_back((request, outcome));
    }

    fn next_finished(&mut self) -> Option<(Request, Result<(), EngineError>)> {
        let (request, outcome) = self.finished.pop_front()?;
        self.finished_bytes -= read_bytes(&request);
        Some((request, outcome))
    }

    /// Starts pieces while the disk's depth allows.
    fn fill(&mut self) {
        while self.pieces_in_flight < self.settings.queue_depth {
            if let Some(piece) = self.again.pop_front() {
                self.start(piece);
                continue;
            }
            if self.foreground_streak >= FOREGROUND_TURNS
                && let Some(active) = self.partial_background
            {
                self.start_piece_of(active);
                continue;
            }
            let next = self.partial_foreground.or_else(|| {
                // A request cut in the background does not hold up the foreground.
                let request = self.shared.queue.take(self.partial_background.is_none())?;
                self.activate(request)
            });
            match next.or(self.partial_background) {
                Some(active) => self.start_piece_of(active),
                // Either nothing waits or what waited was late or empty.
                None if self.shared.queue.is_empty() => return,
                None => {}
            }
        }
    }

    /// `None` when the request ended here.
    fn activate(&mut self, request: Request) -> Option<usize> {
        if is_late(&request, Instant::now()) {
            self.end(request, Err(EngineError::Deadline));
            return None;
        }
        if request.memory.is_empty() {
            self.end(request, Ok(()));
            return None;
        }
        let active = Some(Active {
            request,
            issued: 0,
            pieces: 0,
            front: 0,
            told: 0,
            islands: Vec::new(),
            failed: None,
        });
        Some(match self.free_actives.pop() {
            Some(index) => {
                self.owned.actives[index] = active;
                index
            }
            None => {
                self.owned.actives.push(active);
                self.owned.actives.len() - 1
            }
        })
    }

    fn start_piece_of(&mut self, index: usize) {
        let active = self.owned.actives[index].as_mut().expect("an active request");
        let rest = active.request.memory.len() - active.issued;
        let length = rest.min(self.settings.piece_bytes);
        let piece = Some(Piece {
            active: index,
            start: active.issued,
            length,
            retries: 0,
        });
        active.issued += length;
        active.pieces += 1;
        let unfinished = (length < rest).then_some(index);
        match active.request.priority {
            Priority::Foreground => {
                self.partial_foreground = unfinished;
                self.foreground_streak += 1;
            }
            Priority::Background => {
                self.partial_background = unfinished;
                self.foreground_streak = 0;
            }
        }
        let slot = match self.free_pieces.pop() {
            Some(slot) => {
                self.owned.pieces[slot] = piece;
                slot
            }
            None => {
                self.owned.pieces.push(piece);
                self.owned.pieces.len() - 1
            }
        };
        self.start(slot);
    }

    fn start(&mut self, index: usize) {
        let piece = self.owned.pieces[index].expect("a piece to start");
        let request = &self.owned.actives[piece.active]
            .as_ref()
            .expect("a piece of an active request")
            .request;
        let memory = request
            .memory
            .subslice(piece.start, piece.length)
            .expect("a piece lies in its request");
        let file = types::Fd(request.file.as_raw_fd());
        let offset = request.offset + piece.start as u64;
        let length = u32::try_from(piece.length).expect("pieces are smaller than 4 GiB");
        let entry = match request.direction {
            Direction::Read => opcode::Read::new(file, memory.as_mut_ptr(), length)
                .offset(offset)
                .build(),
            Direction::Write => opcode::Write::new(file, memory.as_ptr(), length).offset(offset).build(),
        };
        self.pieces_in_flight += 1;
        let pushed = self.push(&entry.user_data(index as u64));
        assert!(pushed, "the submission queue has room for the whole depth");
    }
}

impl Drop for Ring<'_> {
    /// Also when the thread panics: nothing may be freed while the kernel can touch it.
    fn drop(&mut self) {
        self.shared.queue.close();
        self.shared.queue.cancel();
        if self.wake_armed {
            let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        }
        while self.pieces_in_flight > 0 || self.wake_armed {
            if let Err(error) = self.ring.submit_and_wait(1)
                && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
            {
                // Keep the memory for ever rather than let a device write into somebody else's.
                tracing::error!(%error, "the ring cannot be drained; its memory stays allocated");
                return;
            }
            while let Some(completion) = self.ring.completion().next() {
                match completion.user_data() {
                    WAKE => self.wake_armed = false,
                    _ => self.pieces_in_flight -= 1,
                }
            }
        }
        // SAFETY: nothing is in flight, and `owned` is used no more after this.
        let owned = unsafe { ManuallyDrop::take(&mut self.owned) };
        for active in owned.actives.into_iter().flatten() {
            active.request.finish(Err(EngineError::Cancelled), false);
        }
    }
}

/// What there may be to check of a finished request.
fn read_bytes(request: &Request) -> usize {
    match request.direction {
        Direction::Read => request.memory.len(),
        Direction::Write => 0,
    }
}

/// The cheapest kind of ring that this kernel has.
fn build(entries: u32) -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .build(entries)
        .or_else(|_| IoUring::builder().setup_coop_taskrun().build(entries))
        .or_else(|_| IoUring::builder().build(entries))
}
