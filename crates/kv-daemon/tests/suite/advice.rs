//! What clients say of the future of their sessions, with the hazard policy.

use std::time::Duration;

use kvtier::client::blocking::{Client, Namespace};
use kvtier::client::{Advice, ClientOptions};
use kvtier::{BlockHash, ErrorKind, Parent, Realization};

use crate::daemon::Daemon;

const BLOCK_BYTES: usize = 256 << 10;
/// Blocks of one prompt.
const PROMPT: u32 = 4;

/// Room for eight prompts.
const FLAGS: [&str; 6] = [
    "--host-bytes",
    "8MiB",
    "--nvme-bytes",
    "0",
    "--eviction-policy",
    "hazard",
];

fn connect(daemon: &Daemon) -> Namespace {
    let client = Client::connect(ClientOptions::new(daemon.socket())).expect("connected");
    client.namespace("tenant", Realization::default()).expect("opened")
}

fn prompt(session: u32) -> Vec<BlockHash> {
    let hash = |block: u32| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&(u64::from(session) << 32 | u64::from(block)).to_le_bytes());
        BlockHash(bytes)
    };
    (0..PROMPT).map(hash).collect()
}

fn put(namespace: &Namespace, session: u32) {
    let bytes = vec![session as u8; BLOCK_BYTES];
    let blocks: Vec<(BlockHash, &[u8])> = prompt(session).into_iter().map(|hash| (hash, &*bytes)).collect();
    namespace.put_from(Parent::Root, &blocks, 512).expect("put");
}

fn cached(namespace: &Namespace, session: u32) -> usize {
    let tiers = namespace.lookup(&prompt(session)).expect("looked up");
    tiers.iter().flatten().count()
}

#[test]
fn what_is_pinned_or_expected_stays_and_what_is_closed_goes_first() {
    let daemon = Daemon::start(&FLAGS);
    let namespace = connect(&daemon);
    for session in 0..6 {
        put(&namespace, session);
    }
    let minute = Duration::from_secs(60);
    assert_eq!(
        namespace.advise(&prompt(0), Advice::Pinned(minute)).expect("taken"),
        PROMPT
    );
    assert_eq!(
        namespace.advise(&prompt(1), Advice::Expected(minute)).expect("taken"),
        PROMPT
    );
    assert_eq!(namespace.advise(&prompt(5), Advice::Closed).expect("taken"), PROMPT);
    assert_eq!(
        namespace.advise(&prompt(99), Advice::Closed).expect("taken"),
        0,
        "nobody's"
    );
    for session in 100..103 {
        put(&namespace, session);
    }
    assert_eq!(cached(&namespace, 5), 0, "the youngest of the six, and closed");
    for session in 200..230 {
        put(&namespace, session);
    }
    let kept = [0, 1, 2, 3].map(|session| cached(&namespace, session));
    assert_eq!(kept, [4, 4, 0, 0]);

    // Taken back, it is what it is: the oldest there.
    for session in 0..2 {
        namespace
            .advise(&prompt(session), Advice::Pinned(Duration::ZERO))
            .expect("taken");
    }
    for session in 300..330 {
        put(&namespace, session);
    }
    assert_eq!([0, 1].map(|session| cached(&namespace, session)), [0, 0]);

    // How long an answer was is no time.
    let answered = namespace.advise(&prompt(329), Advice::Answered(u32::MAX));
    assert_eq!(answered.expect("taken"), PROMPT);
    let error = namespace
        .advise(&prompt(0), Advice::Pinned(Duration::from_secs(3601)))
        .expect_err("too long");
    assert_eq!(error.kind, ErrorKind::Invalid);
    assert!(error.to_string().contains("3600000 ms"), "{error}");
}
