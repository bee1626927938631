//! What only a device can show, below the transport: two queue pairs of one NIC, connected to each other.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Completion, QueuePair, Registered, Status, Work};
use crate::memory::MemoryRegion;
use crate::rdma::VerbsSettings;
use crate::rdma::nic::{Completed, Nic, draw_psn};
use crate::remote::RemoteAccess;
use crate::transfer::Direction;

const BYTES: usize = 1 << 20;
/// Longer than any retry here takes.
const PATIENCE: Duration = Duration::from_secs(5);

/// Completions in the order of arrival.
#[derive(Default)]
struct Arrived(Mutex<Vec<Completion>>);

impl Completed for Arrived {
    fn completed(&self, completions: &[Completion]) {
        self.0.lock().extend(completions);
    }
}

struct Bench {
    nic: Arc<Nic>,
    pair: QueuePair,
    _other: Arc<QueuePair>,
    source: Arc<MemoryRegion>,
    target: Arc<MemoryRegion>,
    from: Arc<Registered>,
    into: Arc<Registered>,
    arrived: Arc<Arrived>,
    number: u32,
}

static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0xf000_0000);

impl Bench {
    /// None, with the reason printed, where there is no device.
    fn set_up() -> Option<Bench> {
        let settings = VerbsSettings::default();
        let opened = super::device_names().and_then(|names| {
            let mut refused = "no device".to_owned();
            for name in names {
                match Nic::open(&name, &settings) {
                    Ok(nic) => return Ok(nic),
                    Err(why) => refused = why,
                }
            }
            Err(refused)
        });
        let nic = match opened {
            Ok(nic) => nic,
            Err(why) => {
                println!("skipped: rdma: rdma unavailable: {why}");
                return None;
            }
        };
        let region = || MemoryRegion::anonymous(BYTES).expect("memory");
        let (source, target) = (region(), region());
        source
            .slice(0, BYTES)
            .expect("all")
            .copy_from_slice(&vec![0x5a; BYTES])
            .expect("equal");
        let from = nic.register(&source, RemoteAccess::Read).expect("registered");
        let into = nic.register(&target, RemoteAccess::Read).expect("registered");
        let (pair, other) = connected(&nic, &settings);
        let arrived = Arc::new(Arrived::default());
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let taker: Weak<dyn Completed> = Arc::downgrade(&arrived) as _;
        nic.deliver(number, taker);
        Some(Bench {
            nic,
            pair,
            _other: other,
            source,
            target,
            from,
            into,
            arrived,
            number,
        })
    }

    fn id(&self, number: u32) -> u64 {
        u64::from(self.number) << 32 | u64::from(number)
    }

    fn read(&self, number: u32, signalled: bool) -> Work {
        Work {
            id: self.id(number),
            local: self.target.slice(0, 4096).expect("inside").into(),
            registered: Arc::clone(&self.into),
            remote_address: self.source.slice(0, 0).expect("start").as_ptr() as u64,
            remote_key: self.from.remote_key,
            direction: Direction::Read,
            signalled,
        }
    }

    fn wait_for(&self, count: usize) -> Vec<Status> {
        let until = Instant::now() + PATIENCE;
        while self.arrived.0.lock().len() < count && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        let arrived = self.arrived.0.lock();
        arrived.iter().map(|completion| completion.status).collect()
    }
}

fn connected(nic: &Arc<Nic>, settings: &VerbsSettings) -> (QueuePair, Arc<QueuePair>) {
    let pair = nic.queue_pair(64).expect("a queue pair");
    let other = Arc::new(nic.queue_pair(64).expect("a queue pair"));
    let psn = draw_psn();
    let asking = nic.end(pair.number(), psn);
    let answering = nic.accept(&other, &asking, settings).expect("taken");
    nic.connect(&pair, psn, &answering, settings, PATIENCE)
        .expect("connected");
    (pair, other)
}

#[test]
fn an_error_and_everything_it_flushed_arrive_without_a_loss() {
    let Some(bench) = Bench::set_up() else { return };
    let mut works: Vec<Work> = (0..32).map(|number| bench.read(number, false)).collect();
    works[7].remote_key ^= 0x5500;
    bench.pair.post(&works).expect("posted");
    // Those before the error are unsignalled successes, of which nobody hears.
    let statuses = bench.wait_for(25);
    if !bench.nic.is_ordered() {
        // iWARP does not say which it was, and may flush what it had not answered before it.
        assert!(statuses.len() >= 25, "{statuses:?}");
        assert!(statuses.iter().all(|status| *status == Status::Flushed), "{statuses:?}");
        return;
    }
    assert_eq!(statuses.len(), 25, "{statuses:?}");
    assert!(matches!(statuses[0], Status::RemoteAccess(_)), "{:?}", statuses[0]);
    assert!(
        statuses[1..].iter().all(|status| *status == Status::Flushed),
        "{statuses:?}"
    );
}

#[test]
fn a_message_that_the_peer_has_no_room_for_fails_and_never_completes_as_done() {
    let Some(bench) = Bench::set_up() else { return };
    bench.pair.post_send_message(&bench.read(1, true)).expect("posted");
    let statuses = bench.wait_for(1);
    assert_eq!(statuses, [Status::Unanswered(13)], "receiver not ready");
}

#[test]
fn a_local_key_that_was_taken_back_fails_the_request() {
    let Some(bench) = Bench::set_up() else { return };
    bench.into.deregister().expect("let go");
    bench.pair.post(&[bench.read(1, true)]).expect("posted");
    let statuses = bench.wait_for(1);
    // The specification says a local error; Soft-RoCE says flushed.
    assert!(
        matches!(statuses[..], [Status::Local(_) | Status::Flushed]),
        "{statuses:?}"
    );
}

#[test]
fn a_queue_pair_holds_memory_until_its_completion_or_its_end() {
    let Some(mut bench) = Bench::set_up() else { return };
    let other = MemoryRegion::anonymous(BYTES).expect("memory");
    let registered = bench.nic.register(&other, RemoteAccess::Read).expect("registered");
    let weak = Arc::downgrade(&other);
    let work = Work {
        local: other.slice(0, 4096).expect("inside").into(),
        registered,
        ..bench.read(1, false)
    };
    bench.pair.post(&[work]).expect("posted");
    drop(other);
    assert!(weak.upgrade().is_some(), "the device may be writing it");
    let (pair, _second) = connected(&bench.nic, &VerbsSettings::default());
    bench.pair = pair;
    assert!(weak.upgrade().is_none(), "the queue pair is gone");
}

#[test]
fn a_peer_s_memory_that_was_taken_back_is_out_of_reach() {
    let Some(bench) = Bench::set_up() else { return };
    bench.pair.post(&[bench.read(1, true)]).expect("posted");
    assert_eq!(bench.wait_for(1), [Status::Done]);
    // First zeroed, then taken back: in between a peer reads zeroes.
    bench.source.zero();
    bench.pair.post(&[bench.read(3, true)]).expect("posted");
    assert_eq!(bench.wait_for(2), [Status::Done; 2]);
    assert_eq!(bench.target.slice(0, 4096).expect("inside").to_vec(), [0; 4096]);
    assert!(
        bench.source.is_pinned(),
        "a hole under it would leave the device the old bytes"
    );
    bench.from.deregister().expect("let go");
    assert!(!bench.source.is_pinned());
    bench.pair.post(&[bench.read(2, true)]).expect("posted");
    let refused = bench.wait_for(3)[2];
    // iWARP ends the connection instead of saying so.
    let is_refused = match bench.nic.is_ordered() {
        true => matches!(refused, Status::RemoteAccess(_)),
        false => refused == Status::Flushed,
    };
    assert!(is_refused, "{refused:?}");
}

/// A table of ours that read the answer from a wrong place would tell neither apart.
#[test]
fn soft_roce_pages_in_on_demand_and_siw_does_not() {
    let Some(bench) = Bench::set_up() else { return };
    match bench.nic.name().trim_end_matches(|c: char| c.is_ascii_digit()) {
        "rxe" => assert!(bench.nic.pages_on_demand()),
        "siw" => assert!(!bench.nic.pages_on_demand()),
        other => println!("nothing is known of {other}: {}", bench.nic.pages_on_demand()),
    }
}
