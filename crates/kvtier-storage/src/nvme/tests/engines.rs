use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::super::{Direction, EngineError, EngineSettings, Finished, NvmeEngine, Priority, Request};
use super::{memory, pattern};
use kvtier_transfer::memory::MemorySlice;

const PATIENCE: Duration = Duration::from_secs(30);

fn small() -> EngineSettings {
    EngineSettings {
        queue_depth: 4,
        queue_max: 8,
        threads: 2,
        piece_bytes: 64 << 10,
    }
}

fn alone() -> EngineSettings {
    EngineSettings {
        queue_depth: 1,
        queue_max: 8,
        threads: 1,
        piece_bytes: 64 << 10,
    }
}

/// A request that reports its outcome, with `tag`, on `report`.
fn request(
    direction: Direction,
    file: &Arc<File>,
    offset: u64,
    memory: &MemorySlice,
    tag: u64,
    report: &Sender<(u64, Finished)>,
) -> Request {
    let report = report.clone();
    Request {
        direction,
        priority: Priority::Foreground,
        file: Arc::clone(file),
        offset,
        memory: memory.clone(),
        deadline: None,
        arrived: None,
        done: Box::new(move |finished| drop(report.send((tag, finished)))),
    }
}

fn take(reports: &Receiver<(u64, Finished)>) -> (u64, Finished) {
    reports.recv_timeout(PATIENCE).expect("an answer")
}

/// Occupies an engine of one thread and depth until the returned sender is used or dropped.
fn block(engine: &dyn NvmeEngine, file: &Arc<File>) -> Sender<()> {
    let (unblock, blocked) = channel::<()>();
    let (entered, entering) = channel();
    let occupy = Request {
        direction: Direction::Write,
        priority: Priority::Foreground,
        file: Arc::clone(file),
        offset: 0,
        memory: memory(1),
        deadline: None,
        arrived: None,
        done: Box::new(move |_| {
            let _ = entered.send(());
            let _ = blocked.recv_timeout(PATIENCE);
        }),
    };
    engine.submit(occupy).expect("an empty queue takes a request");
    entering.recv_timeout(PATIENCE).expect("the engine runs the callback");
    unblock
}

fn scratch() -> Arc<File> {
    Arc::new(tempfile::tempfile().expect("a temporary file"))
}

/// What is told of a read's progress is true when it is told: never too early, never backwards, and never after the end.
fn progress_is_told_only_of_bytes_that_are_there(engine: &dyn NvmeEngine) -> usize {
    let file = scratch();
    let (report, reports) = channel();
    let length = 4 << 20;
    let written = memory(length);
    written.copy_from_slice(&pattern(9, length)).expect("equal lengths");
    engine
        .submit(request(Direction::Write, &file, 0, &written, 0, &report))
        .expect("room");
    take(&reports).1.outcome.expect("the write succeeds");
    let mut told = 0;
    for _ in 0..20 {
        let read = memory(length);
        let (front, fronts) = channel();
        let (seen, expected) = (read.clone(), pattern(9, length));
        let mut last = 0;
        let mut asked = request(Direction::Read, &file, 0, &read, 0, &report);
        asked.arrived = Some(Box::new(move |arrived| {
            let there = seen.subslice(last, arrived - last).expect("inside").to_vec();
            let right = arrived > last && there == expected[last..arrived];
            last = arrived;
            let _ = front.send(right);
        }));
        engine.submit(asked).expect("room");
        take(&reports).1.outcome.expect("the read succeeds");
        // The engine has dropped the sender: the end comes at once.
        for right in fronts {
            assert!(right, "told of bytes that were not there");
            told += 1;
        }
    }
    told
}

#[test]
fn the_ring_tells_of_a_reads_progress_and_threads_need_not() {
    if let Some(ring) = super::uring(small()) {
        let told = progress_is_told_only_of_bytes_that_are_there(&*ring);
        assert!(told > 0, "no progress in twenty reads");
    }
    if let Some(threads) = super::threads(small()) {
        progress_is_told_only_of_bytes_that_are_there(&*threads);
    }
}

fn bytes_come_back_at_odd_lengths_and_offsets(engine: &dyn NvmeEngine) {
    let file = scratch();
    let (report, reports) = channel();
    for (length, offset) in [
        (1, 0),
        (4095, 1),
        (4096, 4096),
        (65_537, 3),
        (1_000_003, 12_345),
        (300_000, 1 << 20),
    ] {
        let written = memory(length);
        written
            .copy_from_slice(&pattern(length as u64, length))
            .expect("equal lengths");
        engine
            .submit(request(Direction::Write, &file, offset, &written, 0, &report))
            .expect("room");
        take(&reports).1.outcome.expect("the write succeeds");
        let read = memory(length);
        engine
            .submit(request(Direction::Read, &file, offset, &read, 0, &report))
            .expect("room");
        let finished = take(&reports).1;
        finished.outcome.expect("the read succeeds");
        assert!(
            finished.memory.to_vec() == pattern(length as u64, length),
            "{length} bytes at {offset}"
        );
    }
}

fn many_requests_at_once_each_get_their_own_bytes(engine: &dyn NvmeEngine) {
    const BLOCK: usize = 200_000;
    let file = scratch();
    let (report, reports) = channel();
    for direction in [Direction::Write, Direction::Read] {
        let mut waiting = Vec::new();
        for tag in 0..40u64 {
            let target = memory(BLOCK);
            if direction == Direction::Write {
                target.copy_from_slice(&pattern(tag, BLOCK)).expect("equal lengths");
            }
            waiting.push(request(direction, &file, tag * BLOCK as u64, &target, tag, &report));
        }
        let mut answered = 0;
        while answered < 40 {
            while let Some(next) = waiting.pop() {
                if let Err(refused) = engine.submit(next) {
                    waiting.push(refused);
                    break;
                }
            }
            let (tag, finished) = take(&reports);
            finished.outcome.expect("it succeeds");
            assert!(finished.memory.to_vec() == pattern(tag, BLOCK), "block {tag}");
            answered += 1;
        }
    }
}

fn a_read_past_the_end_fails(engine: &dyn NvmeEngine) {
    let file = scratch();
    file.set_len(10_000).expect("a longer file");
    let (report, reports) = channel();
    for (offset, length) in [(0, 10_001), (8192, 4096), (10_000, 1), (1 << 30, 4096), (4096, 200_000)] {
        engine
            .submit(request(Direction::Read, &file, offset, &memory(length), 0, &report))
            .expect("room");
        let outcome = take(&reports).1.outcome;
        assert!(
            matches!(outcome, Err(EngineError::EndOfFile)),
            "{length} bytes at {offset}: {outcome:?}"
        );
    }
}

fn an_error_of_the_system_comes_back(engine: &dyn NvmeEngine) {
    let read_only = tempfile::NamedTempFile::new().expect("a temporary file");
    let file = Arc::new(File::open(read_only.path()).expect("it opens"));
    let (report, reports) = channel();
    // In several pieces: all of them fail, the request once.
    engine
        .submit(request(Direction::Write, &file, 0, &memory(300_000), 0, &report))
        .expect("room");
    let outcome = take(&reports).1.outcome;
    assert!(
        matches!(&outcome, Err(EngineError::Io(error)) if error.raw_os_error() == Some(libc::EBADF)),
        "{outcome:?}"
    );
    assert!(
        reports.recv_timeout(Duration::from_millis(20)).is_err(),
        "answered twice"
    );
}

fn a_full_queue_hands_the_request_back(engine: &dyn NvmeEngine) {
    let file = scratch();
    let (report, reports) = channel();
    let unblock = block(engine, &file);
    for tag in 0..8 {
        engine
            .submit(request(Direction::Write, &file, 0, &memory(4096), tag, &report))
            .expect("room for 8");
    }
    let refused = engine
        .submit(request(Direction::Write, &file, 0, &memory(4096), 99, &report))
        .expect_err("the ninth does not fit");
    assert_eq!(refused.memory.len(), 4096);
    drop(unblock);
    for _ in 0..8 {
        let (tag, finished) = take(&reports);
        assert!(tag < 8);
        finished.outcome.expect("what was taken is done");
    }
}

fn the_foreground_goes_first(engine: &dyn NvmeEngine) {
    let file = scratch();
    let (report, reports) = channel();
    let unblock = block(engine, &file);
    for tag in 0..3 {
        let background = Request {
            priority: Priority::Background,
            ..request(Direction::Write, &file, 0, &memory(4096), 100 + tag, &report)
        };
        engine.submit(background).expect("room");
    }
    for tag in 0..3 {
        engine
            .submit(request(Direction::Write, &file, 0, &memory(4096), tag, &report))
            .expect("room");
    }
    drop(unblock);
    let order: Vec<u64> = (0..6).map(|_| take(&reports).0).collect();
    assert_eq!(order, [0, 1, 2, 100, 101, 102]);
}

fn a_steady_foreground_does_not_starve_the_background(engine: &dyn NvmeEngine) {
    let file = scratch();
    let (report, reports) = channel();
    let unblock = block(engine, &file);
    let background = Request {
        priority: Priority::Background,
        ..request(Direction::Write, &file, 0, &memory(4096), 1000, &report)
    };
    engine.submit(background).expect("room");
    for tag in 0..4 {
        engine
            .submit(request(Direction::Write, &file, 0, &memory(4096), tag, &report))
            .expect("room");
    }
    drop(unblock);
    for tag in 4..500 {
        if take(&reports).0 == 1000 {
            return;
        }
        engine
            .submit(request(Direction::Write, &file, 0, &memory(4096), tag, &report))
            .expect("room");
    }
    panic!("500 foreground requests went before one in the background");
}

fn a_request_that_waited_too_long_fails_unasked(engine: &dyn NvmeEngine) {
    let file = scratch();
    let (report, reports) = channel();
    let unblock = block(engine, &file);
    let target = memory(4096);
    target.copy_from_slice(&[7; 4096]).expect("equal lengths");
    let late = Request {
        deadline: Some(Instant::now()),
        ..request(Direction::Read, &file, 0, &target, 1, &report)
    };
    engine.submit(late).expect("room");
    drop(unblock);
    let finished = take(&reports).1;
    assert!(matches!(finished.outcome, Err(EngineError::Deadline)));
    assert_eq!(finished.memory.to_vec(), [7; 4096], "the device was not asked");
}

fn what_is_queued_can_be_cancelled(engine: &dyn NvmeEngine) {
    let file = scratch();
    let (report, reports) = channel();
    let unblock = block(engine, &file);
    for tag in 0..5 {
        engine
            .submit(request(Direction::Write, &file, 0, &memory(4096), tag, &report))
            .expect("room");
    }
    engine.cancel_queued();
    for _ in 0..5 {
        assert!(matches!(take(&reports).1.outcome, Err(EngineError::Cancelled)));
    }
    drop(unblock);
    engine
        .submit(request(Direction::Write, &file, 0, &memory(4096), 9, &report))
        .expect("the engine goes on");
    take(&reports).1.outcome.expect("it succeeds");
}

fn shutting_down_answers_everything(engine: &dyn NvmeEngine) {
    let file = scratch();
    let (report, reports) = channel();
    let mut taken = 0;
    for tag in 0..8 {
        taken += u64::from(
            engine
                .submit(request(
                    Direction::Write,
                    &file,
                    tag << 20,
                    &memory(1 << 20),
                    tag,
                    &report,
                ))
                .is_ok(),
        );
    }
    engine.shutdown();
    for _ in 0..taken {
        let outcome = reports.try_recv().expect("answered before shutdown returned").1.outcome;
        assert!(matches!(outcome, Ok(()) | Err(EngineError::Cancelled)), "{outcome:?}");
    }
    assert!(
        engine
            .submit(request(Direction::Write, &file, 0, &memory(1), 0, &report))
            .is_err(),
        "a closed engine takes nothing"
    );
    engine.shutdown();
}

/// Every test of this file on both engines.
macro_rules! suite {
    ($($settings:ident: $($test:ident),+;)+) => {
        mod on_uring {
            $($(#[test]
            fn $test() {
                if let Some(engine) = super::super::uring(super::$settings()) {
                    super::$test(&*engine);
                }
            })+)+
        }
        mod on_threads {
            $($(#[test]
            fn $test() {
                if let Some(engine) = super::super::threads(super::$settings()) {
                    super::$test(&*engine);
                }
            })+)+
        }
    };
}

suite! {
    small: bytes_come_back_at_odd_lengths_and_offsets, many_requests_at_once_each_get_their_own_bytes, a_read_past_the_end_fails,
        an_error_of_the_system_comes_back, shutting_down_answers_everything;
    alone: a_full_queue_hands_the_request_back, the_foreground_goes_first, a_steady_foreground_does_not_starve_the_background,
        a_request_that_waited_too_long_fails_unasked, what_is_queued_can_be_cancelled;
}

#[test]
fn threads_stuck_in_the_device_still_let_others_meet_their_deadline() {
    let engine = super::threads(alone()).expect("threads start");
    let file = scratch();
    let (report, reports) = channel();
    let unblock = block(&*engine, &file);
    let late = Request {
        deadline: Some(Instant::now()),
        ..request(Direction::Read, &file, 0, &memory(4096), 1, &report)
    };
    engine.submit(late).expect("room");
    assert!(
        matches!(take(&reports).1.outcome, Err(EngineError::Deadline)),
        "while the only thread is stuck"
    );
    drop(unblock);
}
