use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fake_node::FakeNode;
use crate::{bytes, hash};
use kvtier::client::blocking::Client;
use kvtier::client::{
    ClientOptions, Completion, FetchScope, ForeignSlice, GetOutcome, Lineage, PutOutcome, SubmissionOptions,
    Submissions,
};
use kvtier::{BlockHash, ErrorKind, Realization, Tier};
use kvtier_transfer::memory::{MemoryRegion, MemorySlice};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Somebody's memory, and a look at it.
struct Page {
    slice: MemorySlice,
    foreign: ForeignSlice,
    /// Told of by others: whether this page was let go of.
    alive: Arc<()>,
}

impl Page {
    fn new(length: usize) -> Page {
        let region = MemoryRegion::anonymous(length.next_multiple_of(4096)).expect("a region");
        let slice = region.slice(0, length).expect("in it");
        let foreign = ForeignSlice::of(&slice).expect("writable");
        let alive = Arc::default();
        Page { slice, foreign, alive }
    }
}

impl AsRef<ForeignSlice> for Page {
    fn as_ref(&self) -> &ForeignSlice {
        &self.foreign
    }
}

const LENGTH: usize = 10_000;

fn filled(name: &str, count: u32) -> FakeNode {
    let node = FakeNode::start(name);
    let client = Client::connect(ClientOptions::new(node.socket())).expect("connected");
    let namespace = client.namespace("tenant", Realization::default()).expect("opened");
    let pages: Vec<Page> = (0..count).map(|_| Page::new(LENGTH)).collect();
    let blocks: Vec<(BlockHash, ForeignSlice)> = (0..count)
        .zip(&pages)
        .map(|(number, page)| {
            page.slice.copy_from_slice(&bytes(number, LENGTH)).expect("as long");
            (hash(number), page.foreign.clone())
        })
        .collect();
    let outcomes = namespace.put_from_foreign(Lineage::default(), &blocks, 1);
    assert_eq!(outcomes.expect("answered"), vec![PutOutcome::Published; blocks.len()]);
    node
}

fn start(node: &FakeNode, options: SubmissionOptions) -> Submissions<Page> {
    let client = ClientOptions::new(node.socket()).with_timeout(Duration::from_secs(5));
    Submissions::start(client, "tenant", Realization::default(), options).expect("started")
}

fn is_readable(submissions: &Submissions<Page>, seconds: i64) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(submissions.event(), PollFlags::IN)];
    let limit = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    poll(&mut polled, Some(&limit)).expect("polled") == 1
}

fn collect(submissions: &Submissions<Page>, count: usize) -> Vec<Completion<Page>> {
    let mut completed = Vec::new();
    while completed.len() < count {
        assert!(is_readable(submissions, 60), "{} of {count} completed", completed.len());
        completed.extend(submissions.completed().expect("this process"));
    }
    completed
}

#[test]
fn blocks_move_from_and_into_memory_of_somebody_else() {
    let node = filled("foreign", 3);
    let client = Client::connect(ClientOptions::new(node.socket())).expect("connected");
    let namespace = client.namespace("tenant", Realization::default()).expect("opened");
    let pages = [Page::new(LENGTH), Page::new(LENGTH - 1), Page::new(LENGTH + 1)];
    let targets: Vec<ForeignSlice> = pages.iter().map(|page| page.foreign.clone()).collect();
    let hashes = [hash(0), hash(1), hash(2)];
    let outcomes = namespace
        .get_into_foreign(&hashes, &targets, FetchScope::Each)
        .expect("answered");
    let length = u32::try_from(LENGTH).expect("short");
    let hit = GetOutcome::Hit {
        length,
        tier: Tier::Host,
    };
    assert_eq!(outcomes, [hit, GetOutcome::TooSmall { length }, hit]);
    assert_eq!(pages[0].slice.to_vec(), bytes(0, LENGTH));
    assert_eq!(pages[1].slice.to_vec(), vec![0; LENGTH - 1]);
    assert_eq!(pages[2].slice.to_vec()[..LENGTH], bytes(2, LENGTH));
    let few = namespace.get_into_foreign(&hashes, &targets[..2], FetchScope::Each);
    assert_eq!(few.expect_err("a key without a target").kind, ErrorKind::Invalid);
}

#[test]
fn submitted_gets_end_in_completions_that_hand_their_targets_back() {
    let node = filled("submitted", 8);
    let submissions = start(&node, SubmissionOptions::default());
    assert!(!is_readable(&submissions, 0));
    let submit = |number| {
        let pages = vec![Page::new(LENGTH), Page::new(LENGTH)];
        let hashes = vec![hash(number), hash(99)];
        submissions.submit(hashes, pages, FetchScope::Each).expect("room")
    };
    let tickets: Vec<u64> = (0..8).map(submit).collect();
    for completion in collect(&submissions, 8) {
        let at = tickets.iter().position(|ticket| *ticket == completion.ticket);
        let number = u32::try_from(at.expect("a ticket of ours")).expect("few");
        let outcomes = completion.outcomes.expect("answered");
        assert!(outcomes[0].is_hit() && outcomes[1] == GetOutcome::Miss);
        assert_eq!(completion.targets[0].slice.to_vec(), bytes(number, LENGTH));
    }
    assert!(!is_readable(&submissions, 0), "quiet when all is collected");
}

/// It stayed readable when a get ended while others were collected.
#[test]
fn the_descriptor_is_quiet_as_soon_as_all_is_collected() {
    let node = filled("quiet", 1);
    let submissions = start(&node, SubmissionOptions::default());
    for round in 0..300 {
        let gets = 6;
        for _ in 0..gets {
            submissions
                .submit(vec![hash(0)], vec![Page::new(LENGTH)], FetchScope::Each)
                .expect("room");
        }
        // Without waiting for the descriptor, so that a get may end at any moment of a collection.
        let mut collected = 0;
        while collected < gets {
            collected += submissions.completed().expect("this process").len();
        }
        assert!(!is_readable(&submissions, 0), "round {round}");
    }
}

#[test]
fn more_than_the_bound_is_busy_until_some_are_collected() {
    let node = filled("bound", 1);
    let options = SubmissionOptions {
        threads: 1,
        gets_max: 2,
    };
    let submissions = start(&node, options);
    let submit = || submissions.submit(vec![hash(0)], vec![Page::new(LENGTH)], FetchScope::Each);
    submit().expect("room");
    submit().expect("room");
    assert_eq!(submit().expect_err("no room").kind, ErrorKind::Busy);
    collect(&submissions, 2);
    submit().expect("room again");
}

#[test]
fn dropping_submissions_waits_for_no_node_and_nothing_lands_afterwards() {
    let node = filled("dropped", 1);
    let submissions = start(
        &node,
        SubmissionOptions {
            threads: 1,
            gets_max: 8,
        },
    );
    let submit = |page| {
        submissions
            .submit(vec![hash(0)], vec![page], FetchScope::Each)
            .expect("room")
    };
    submit(Page::new(LENGTH));
    collect(&submissions, 1);
    let delay = Duration::from_millis(800);
    node.state().delay = delay;
    let page = Page::new(LENGTH);
    let (kept, before) = (page.slice.clone(), node.state().requests.len());
    submit(page);
    while node.state().requests.len() == before {
        std::thread::sleep(Duration::from_millis(1));
    }
    let begun = Instant::now();
    drop(submissions);
    let took = begun.elapsed();
    // Now it is somebody else's again.
    kept.copy_from_slice(&[7; LENGTH]).expect("as long");
    std::thread::sleep(delay + Duration::from_millis(200));
    assert_eq!(kept.to_vec(), vec![7; LENGTH]);
    assert!(took < delay, "the drop waited {took:?}");
}

/// A get that ended while the drop was under way went to a list that nobody would empty before the thread was gone.
#[test]
fn a_drop_lets_go_of_every_target_before_it_returns() {
    let node = filled("let-go", 1);
    for round in 0..400 {
        let submissions = start(&node, SubmissionOptions::default());
        let pages: Vec<Page> = (0..6).map(|_| Page::new(LENGTH)).collect();
        let alive: Vec<Arc<()>> = pages.iter().map(|page| Arc::clone(&page.alive)).collect();
        for page in pages {
            submissions
                .submit(vec![hash(0)], vec![page], FetchScope::Each)
                .expect("room");
        }
        // Each round drops at another moment of the gets.
        std::thread::sleep(Duration::from_micros(round * 3));
        drop(submissions);
        let held = alive.iter().filter(|alive| Arc::strong_count(alive) > 1).count();
        assert_eq!(held, 0, "round {round}");
    }
}

#[test]
fn a_node_that_is_away_fails_the_get_and_not_the_next_one() {
    let node = filled("away", 1);
    let socket = node.socket();
    let client = ClientOptions::new(socket.with_extension("gone")).with_timeout(Duration::from_secs(1));
    let submissions =
        Submissions::start(client, "tenant", Realization::default(), SubmissionOptions::default()).expect("started");
    submissions
        .submit(vec![hash(0)], vec![Page::new(LENGTH)], FetchScope::Each)
        .expect("room");
    let completed = collect(&submissions, 1);
    assert_eq!(
        completed[0].outcomes.as_ref().expect_err("nobody there").kind,
        ErrorKind::Unavailable
    );
    std::os::unix::fs::symlink(&socket, socket.with_extension("gone")).expect("a link");
    submissions
        .submit(vec![hash(0)], vec![Page::new(LENGTH)], FetchScope::Each)
        .expect("room");
    let completed = collect(&submissions, 1);
    assert!(completed[0].outcomes.as_ref().expect("answered")[0].is_hit());
}
