//! What only a ring can show, for it reads pipes: a device that does not answer.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use super::super::{Direction, EngineError, EngineSettings, Priority, Request};
use super::memory;

#[test]
fn a_stuck_device_keeps_its_memory_and_lets_others_meet_their_deadline() {
    let Some(engine) = super::uring(EngineSettings {
        queue_depth: 1,
        ..EngineSettings::default()
    }) else {
        return;
    };
    let (stuck, feed) = rustix::pipe::pipe().expect("a pipe");
    let (report, reports) = channel();
    let request = |file: &Arc<File>, memory, deadline| {
        let report = report.clone();
        let done = Box::new(move |finished: super::super::Finished| {
            drop(report.send((finished.memory.to_vec(), finished.outcome)))
        });
        Request {
            direction: Direction::Read,
            priority: Priority::Foreground,
            file: Arc::clone(file),
            offset: 0,
            memory,
            deadline,
            arrived: None,
            done,
        }
    };
    let stuck = Arc::new(File::from(stuck));
    let held = memory(5);
    let region = Arc::downgrade(held.region());
    engine.submit(request(&stuck, held, None)).expect("room");
    // Until the ring has started it, the second request would be the one that is started.
    thread::sleep(Duration::from_millis(20));
    engine
        .submit(request(&stuck, memory(5), Some(Instant::now())))
        .expect("room");
    let (_, outcome) = reports
        .recv_timeout(Duration::from_secs(30))
        .expect("an answer while the device is stuck");
    assert!(matches!(outcome, Err(EngineError::Deadline)));

    let closing = thread::spawn({
        let engine = Arc::clone(&engine);
        move || engine.shutdown()
    });
    thread::sleep(Duration::from_millis(20));
    assert!(region.upgrade().is_some(), "memory that a device may write was freed");
    assert!(!closing.is_finished(), "shutdown did not wait for the device");
    File::from(feed).write_all(b"bytes").expect("the pipe has room");
    closing.join().expect("shutdown ends");
    let (bytes, outcome) = reports.try_recv().expect("answered before shutdown returned");
    outcome.expect("the device answered in the end");
    assert_eq!(bytes, b"bytes");
    assert!(region.upgrade().is_none(), "the memory is given up at last");
}

#[test]
fn a_ring_that_idles_uses_no_processor_time() {
    let Some(engine) = super::uring(EngineSettings::default()) else {
        return;
    };
    let spent = || {
        let usage = std::fs::read_dir("/proc/self/task")
            .expect("threads")
            .filter_map(|task| {
                let task = task.ok()?.path();
                let name = std::fs::read_to_string(task.join("comm")).ok()?;
                (name.trim() == "kvtier-nvme-ring").then(|| std::fs::read_to_string(task.join("schedstat")).ok())?
            });
        usage
            .filter_map(|line| line.split(' ').next()?.parse::<u64>().ok())
            .sum::<u64>()
    };
    // Other tests' rings share the name: only rings that do nothing are alone for a moment.
    let shares = (0..20).map(|_| {
        let (before, started) = (spent(), Instant::now());
        thread::sleep(Duration::from_millis(50));
        spent().saturating_sub(before) * 100 / u64::try_from(started.elapsed().as_nanos()).expect("short")
    });
    assert!(shares.min() == Some(0), "the ring thread spins");
    drop(engine);
}
