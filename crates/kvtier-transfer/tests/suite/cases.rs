//! What every transport must do, each case under its name.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use kvtier_transfer::tcp::Secret;
use kvtier_transfer::{
    Cause, ConnectError, Direction, Peer, PeerAddress, Refusal, RegionId, RemoteAccess, RemoteRegion, TransferError,
};

use crate::child::{SEED, Start};
use crate::stand::{Kind, Memory, PATIENCE, POISON, Site, Stand, Wishes, pattern, piece, site};

const MIB: usize = 1 << 20;
/// How much later than its deadline an outcome may come: what stopping takes, on a machine that is busy.
const SLACK: Duration = Duration::from_millis(1500);

pub(crate) fn bytes_read_are_the_owner_s(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let owned = stand.owned(4 * MIB, RemoteAccess::Read);
    let local = stand.local(4 * MIB);
    let remote = owned.remote();
    for (offset, length) in [
        (0, 1),
        (1, 4095),
        (4096, 16_384),
        (7, 65_537),
        (12_345, MIB),
        (0, 4 * MIB),
    ] {
        let target = 4 * MIB - length;
        let read = piece(&local, target, &remote, offset, length, Direction::Read);
        assert_eq!(stand.run(vec![read]), Ok(()));
        assert!(
            local.bytes(target, length) == pattern(7, offset, length),
            "{length} bytes from {offset}"
        );
        if target > 0 && length < MIB {
            assert_eq!(local.bytes(target - 1, 1), [POISON], "the byte before the target");
        }
        let _ = local.all().copy_from_slice(&vec![POISON; 4 * MIB]);
    }
}

pub(crate) fn bytes_written_arrive_and_nothing_beside_them_changes(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let owned = stand.owned(2 * MIB, RemoteAccess::ReadWrite);
    let local = Memory::new(2 * MIB).fill(8).register(&stand.caller, RemoteAccess::Read);
    let remote = owned.remote();
    for (offset, length) in [(100, 1), (200, 64), (4000, 5000), (MIB / 2, MIB)] {
        let write = piece(&local, 0, &remote, offset, length, Direction::Write);
        assert_eq!(stand.run(vec![write]), Ok(()));
        assert!(owned.bytes(offset, length) == pattern(8, 0, length), "{length} bytes");
        assert_eq!(owned.bytes(offset - 8, 8), pattern(7, offset - 8, 8));
        assert_eq!(owned.bytes(offset + length, 8), pattern(7, offset + length, 8));
    }
}

pub(crate) fn a_batch_of_many_pieces_moves_both_ways(kind: Kind) {
    const PIECES: usize = 500;
    const LENGTH: usize = 3000;
    let Some(stand) = Stand::set_up(kind) else { return };
    let owned = stand.owned(4 * MIB, RemoteAccess::ReadWrite);
    let (into, from) = (
        stand.local(2 * MIB),
        Memory::new(2 * MIB).fill(9).register(&stand.caller, RemoteAccess::Read),
    );
    let remote = owned.remote();
    let mut pieces = Vec::new();
    for at in 0..PIECES {
        pieces.push(piece(&into, at * LENGTH, &remote, at * LENGTH, LENGTH, Direction::Read));
        pieces.push(piece(
            &from,
            at * LENGTH,
            &remote,
            2 * MIB + at * LENGTH,
            LENGTH,
            Direction::Write,
        ));
    }
    assert_eq!(stand.run(pieces), Ok(()));
    assert!(
        into.bytes(0, PIECES * LENGTH) == pattern(7, 0, PIECES * LENGTH),
        "what was read"
    );
    assert!(
        owned.bytes(2 * MIB, PIECES * LENGTH) == pattern(9, 0, PIECES * LENGTH),
        "what was written"
    );
}

pub(crate) fn a_large_piece_arrives_whole(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let length = 32 * MIB;
    let owned = stand.owned(length, RemoteAccess::Read);
    let local = stand.local(length);
    let read = piece(&local, 0, &owned.remote(), 0, length, Direction::Read);
    assert_eq!(stand.run(vec![read]), Ok(()));
    assert!(local.bytes(0, length) == pattern(7, 0, length));
    let moved: u64 = stand.peer.rails().iter().map(|rail| rail.bytes).sum();
    assert_eq!(
        moved,
        length as u64,
        "every byte is counted once: {:?}",
        stand.peer.rails()
    );
}

/// What a peer would send that guesses, or remembers what was taken back.
fn forged(region: &RemoteRegion) -> Arc<RemoteRegion> {
    let mut forged = region.clone();
    forged.id = RegionId(region.id.0 ^ 1);
    forged.remote_keys.iter_mut().for_each(|key| *key ^= 0x5500);
    Arc::new(forged)
}

fn is_denied(outcome: &Result<(), TransferError>) -> bool {
    matches!(outcome, Err(error) if matches!(error.cause, Cause::Denied(_)))
}

pub(crate) fn a_region_that_was_never_registered_is_refused_and_the_peer_goes_on(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let owned = stand.owned(MIB, RemoteAccess::ReadWrite);
    let local = stand.local(MIB);
    let (right, wrong) = (owned.remote(), forged(&owned.remote()));
    for direction in [Direction::Read, Direction::Write] {
        let good = || piece(&local, 0, &right, 0, 4096, Direction::Read);
        let bad = piece(&local, 8192, &wrong, 8192, 65_536, direction);
        let outcome = stand.run(vec![good(), bad]);
        assert!(is_denied(&outcome), "{outcome:?}");
        assert_eq!(outcome.expect_err("denied").piece, 1, "the first failed piece");
        assert_eq!(local.bytes(8192, 65_536), vec![POISON; 65_536]);
        assert!(
            owned.bytes(8192, 65_536) == pattern(7, 8192, 65_536),
            "nothing was written"
        );
        assert_eq!(stand.run(vec![good()]), Ok(()), "the peer goes on");
    }
}

pub(crate) fn a_revoked_region_is_refused_and_another_still_serves(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let mut revoked = stand.owned(MIB, RemoteAccess::ReadWrite);
    let kept = stand.owned(MIB, RemoteAccess::Read);
    let local = stand.local(MIB);
    let (gone, here) = (revoked.remote(), kept.remote());
    let read = |remote| vec![piece(&local, 0, remote, 0, 65_536, Direction::Read)];
    assert_eq!(stand.run(read(&gone)), Ok(()));
    let registration = revoked.registration.take().expect("registered");
    assert_eq!(registration.revoke(), Ok(()));
    revoked.region.zero();
    let poisoned = local.poison();
    let read = |remote| vec![piece(&poisoned, 0, remote, 0, 65_536, Direction::Read)];
    for _ in 0..3 {
        assert!(is_denied(&stand.run(read(&gone))));
        assert_eq!(poisoned.bytes(0, 65_536), vec![POISON; 65_536]);
    }
    let write = piece(&poisoned, 0, &gone, 0, 65_536, Direction::Write);
    assert!(is_denied(&stand.run(vec![write])));
    assert_eq!(
        revoked.bytes(0, 65_536),
        vec![0; 65_536],
        "whoever has the memory now is left alone"
    );
    assert_eq!(stand.run(read(&here)), Ok(()));
    assert!(poisoned.bytes(0, 65_536) == pattern(7, 0, 65_536));
}

pub(crate) fn a_range_past_the_end_is_refused(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let owned = stand.owned(MIB, RemoteAccess::Read);
    let local = stand.local(MIB);
    let mut longer = (*owned.remote()).clone();
    longer.bytes *= 2;
    let longer = Arc::new(longer);
    for offset in [MIB - 4096, MIB, MIB + 4096] {
        let read = piece(&local, 0, &longer, offset, 8192, Direction::Read);
        let outcome = stand.run(vec![read]);
        assert!(is_denied(&outcome), "{outcome:?}");
    }
    let inside = piece(&local, 0, &longer, MIB - 8192, 8192, Direction::Read);
    assert_eq!(stand.run(vec![inside]), Ok(()));
}

pub(crate) fn a_write_to_what_was_registered_for_reads_is_refused(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let owned = stand.owned(MIB, RemoteAccess::Read);
    let local = stand.local(MIB);
    let write = |remote| vec![piece(&local, 0, remote, 0, 4096, Direction::Write)];
    let right = owned.remote();
    let refused = stand
        .peer
        .submit(write(&right), PATIENCE)
        .expect_err("it says so itself");
    assert!(matches!(refused.reason, Refusal::Invalid { piece: 0, .. }));
    assert_eq!(refused.pieces.len(), 1);
    let mut claimed = (*owned.remote()).clone();
    claimed.access = RemoteAccess::ReadWrite;
    let claimed = Arc::new(claimed);
    assert!(is_denied(&stand.run(write(&claimed))));
    assert!(owned.bytes(0, 4096) == pattern(7, 0, 4096));
}

pub(crate) fn a_dropped_transfer_keeps_its_memory_until_it_is_at_rest(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let owned = stand.owned(8 * MIB, RemoteAccess::Read);
    let remote = owned.remote();
    let mut watched = Vec::new();
    for _ in 0..8 {
        let local = stand.local(8 * MIB);
        let read = piece(&local, 0, &remote, 0, 8 * MIB, Direction::Read);
        drop(stand.submit(vec![read]));
        watched.push(Arc::downgrade(&local.region));
        // With NICs this also takes the region from the device, in the middle of it.
        drop(local);
    }
    let until = Instant::now() + PATIENCE;
    while watched.iter().any(|region| region.upgrade().is_some()) {
        assert!(Instant::now() < until, "nobody has let go of the memory");
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Wakes {
    count: AtomicUsize,
    thread: std::thread::Thread,
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.thread.unpark();
    }
}

pub(crate) fn a_future_is_woken(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let owned = stand.owned(8 * MIB, RemoteAccess::Read);
    let local = stand.local(8 * MIB);
    let wakes = Arc::new(Wakes {
        count: AtomicUsize::new(0),
        thread: std::thread::current(),
    });
    let waker = Waker::from(Arc::clone(&wakes));
    for round in 0..20 {
        let read = piece(&local, 0, &owned.remote(), 0, 8 * MIB, Direction::Read);
        let mut transfer = stand.submit(vec![read]);
        let until = Instant::now() + PATIENCE;
        loop {
            match Pin::new(&mut transfer).poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(outcome) => break assert_eq!(outcome, Ok(())),
                Poll::Pending => std::thread::park_timeout(PATIENCE),
            }
            assert!(Instant::now() < until, "round {round}: nobody woke us");
        }
    }
    assert!(local.bytes(0, 8 * MIB) == pattern(7, 0, 8 * MIB));
}

pub(crate) fn many_threads_read_at_once(kind: Kind) {
    const THREADS: usize = 6;
    const ROUNDS: usize = 60;
    let Some(stand) = Stand::set_up(kind) else { return };
    let owned = stand.owned(4 * MIB, RemoteAccess::Read);
    let remote = owned.remote();
    let stand = &stand;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let remote = Arc::clone(&remote);
            scope.spawn(move || {
                let local = stand.local(256 << 10);
                for round in 0..ROUNDS {
                    let length = 1 + (round * 4241 + thread * 977) % (200 << 10);
                    let offset = (round * 70_001 + thread * 131) % (3 * MIB);
                    let read = piece(&local, 0, &remote, offset, length, Direction::Read);
                    assert_eq!(stand.run(vec![read]), Ok(()));
                    assert!(
                        local.bytes(0, length) == pattern(7, offset, length),
                        "{length} from {offset}"
                    );
                }
            });
        }
    });
}

pub(crate) fn a_dropped_peer_ends_its_transfers(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let owned = stand.owned(32 * MIB, RemoteAccess::Read);
    let local = stand.local(32 * MIB);
    let transfers: Vec<_> = (0..4)
        .map(|_| stand.submit(vec![piece(&local, 0, &owned.remote(), 0, 32 * MIB, Direction::Read)]))
        .collect();
    let Stand { peer, caller, owner } = stand;
    drop(peer);
    let begun = Instant::now();
    for transfer in transfers {
        // Moved in full or not: but told, soon, and never a success with wrong bytes.
        match transfer.wait() {
            Ok(()) => assert!(local.bytes(0, MIB) == pattern(7, 0, MIB)),
            Err(error) => assert!(matches!(error.cause, Cause::PeerGone(_)), "{error}"),
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop((caller, owner));
}

pub(crate) fn an_owner_that_is_gone_is_told_as_a_failure(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let owned = stand.owned(MIB, RemoteAccess::Read);
    let local = stand.local(MIB);
    let remote = owned.remote();
    let read = || vec![piece(&local, 0, &remote, 0, MIB, Direction::Read)];
    assert_eq!(stand.run(read()), Ok(()));
    let Stand { peer, caller, owner } = stand;
    drop(owned);
    drop(owner);
    let begun = Instant::now();
    let outcome = peer
        .submit(read(), Duration::from_secs(3))
        .map(kvtier_transfer::Transfer::wait);
    match outcome {
        Ok(Err(error)) => assert!(!matches!(error.cause, Cause::Local(_)), "{error}"),
        Err(refused) => assert!(matches!(refused.reason, Refusal::Gone(_)), "{:?}", refused.reason),
        Ok(Ok(())) => panic!("read from an owner that is gone"),
    }
    assert!(begun.elapsed() < Duration::from_secs(3) + SLACK);
    drop(caller);
}

pub(crate) fn a_gibibyte_is_registered(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let length = 1 << 30;
    let owned = Memory::new(length).register(&stand.owner, RemoteAccess::Read);
    let local = stand.local(MIB);
    let end = owned.region.slice(length - MIB, MIB).expect("inside");
    end.copy_from_slice(&pattern(3, 0, MIB)).expect("equal");
    let read = piece(&local, 0, &owned.remote(), length - MIB, MIB, Direction::Read);
    assert_eq!(stand.run(vec![read]), Ok(()));
    assert!(local.bytes(0, MIB) == pattern(3, 0, MIB));
}

pub(crate) fn a_batch_past_the_limit_is_refused_as_busy_with_its_pieces(kind: Kind) {
    let wishes = Wishes {
        in_flight_max: Some(8),
        ..Wishes::default()
    };
    let Some(stand) = Stand::with(kind, &wishes) else {
        return;
    };
    let owned = stand.owned(MIB, RemoteAccess::Read);
    let local = stand.local(MIB);
    let batch = |pieces: usize| -> Vec<_> {
        let read = |at: usize| piece(&local, at * 4096, &owned.remote(), at * 4096, 4096, Direction::Read);
        (0..pieces).map(read).collect()
    };
    let refused = stand
        .peer
        .submit(batch(9), PATIENCE)
        .expect_err("nine are more than eight");
    assert!(
        matches!(refused.reason, Refusal::Busy { limit: 8, .. }),
        "{:?}",
        refused.reason
    );
    assert_eq!(refused.pieces.len(), 9);
    for _ in 0..10 {
        assert_eq!(stand.run(batch(8)), Ok(()), "what was refused or is done leaves room");
    }
}

fn caller(kind: Kind) -> Option<Site> {
    site(kind, &Wishes::default())
}

pub(crate) fn a_peer_killed_in_the_middle_of_a_thousand_transfers(kind: Kind) {
    const TRANSFERS: usize = 1000;
    const LENGTH: usize = 64 << 10;
    const KILL_AT: usize = 300;
    let Some(caller) = caller(kind) else { return };
    let mut child = Start::here(kind, 4 * MIB).run();
    let peer = caller.transport.connect(&child.address, PATIENCE).expect("connected");
    let local = Memory::new(TRANSFERS * LENGTH)
        .register(&caller, RemoteAccess::Read)
        .poison();
    let offset_of = |at: usize| (at * 20_483) % (3 * MIB);
    let (mut in_flight, mut right, mut failed) = (Vec::new(), 0, Vec::new());
    let mut settle = |at: usize, outcome: Result<(), TransferError>| match outcome {
        Ok(()) => {
            assert!(
                local.bytes(at * LENGTH, LENGTH) == pattern(SEED, offset_of(at), LENGTH),
                "transfer {at} succeeded with wrong bytes"
            );
            right += 1;
        }
        Err(_) => {
            // The memory is ours again: whoever still writes it is found below.
            let target = local.region.slice(at * LENGTH, LENGTH).expect("inside");
            target.copy_from_slice(&vec![POISON; LENGTH]).expect("equal");
            failed.push(at);
        }
    };
    for at in 0..TRANSFERS {
        if at == KILL_AT {
            child.kill();
        }
        let read = piece(
            &local,
            at * LENGTH,
            &child.region,
            offset_of(at),
            LENGTH,
            Direction::Read,
        );
        match peer.submit(vec![read], Duration::from_secs(5)) {
            Ok(transfer) => in_flight.push((at, transfer)),
            Err(refused) => {
                assert_eq!(refused.pieces.len(), 1);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        if in_flight.len() >= 16 {
            let (at, transfer) = in_flight.remove(0);
            settle(at, transfer.wait());
        }
    }
    for (at, transfer) in in_flight {
        settle(at, transfer.wait());
    }
    assert!(right >= KILL_AT - 16, "those that had ended before: {right}");
    if kind != Kind::Shm {
        assert!(right < TRANSFERS, "a dead peer goes on answering");
    }
    std::thread::sleep(Duration::from_millis(300));
    for at in failed {
        assert!(
            local.bytes(at * LENGTH, LENGTH).iter().all(|byte| *byte == POISON),
            "the memory of transfer {at} was written after its outcome"
        );
    }
}

pub(crate) fn a_stopped_peer_costs_at_most_the_deadline(kind: Kind) {
    let Some(caller) = caller(kind) else { return };
    let child = Start::here(kind, 4 * MIB).run();
    let peer = caller.transport.connect(&child.address, PATIENCE).expect("connected");
    let local = Memory::new(4 * MIB).register(&caller, RemoteAccess::Read).poison();
    let read = || vec![piece(&local, 0, &child.region, 0, 4 * MIB, Direction::Read)];
    let run = |deadline| peer.submit(read(), deadline).map(kvtier_transfer::Transfer::wait);
    assert_eq!(run(PATIENCE).expect("taken"), Ok(()));
    child.stop();
    for _ in 0..2 {
        let (begun, deadline) = (Instant::now(), Duration::from_millis(300));
        match run(deadline) {
            Ok(outcome) => assert_eq!(outcome.expect_err("nobody answers").cause, Cause::Deadline),
            Err(refused) => assert!(matches!(refused.reason, Refusal::Gone(_))),
        }
        assert!(begun.elapsed() < deadline + SLACK, "{:?}", begun.elapsed());
    }
    // Ours again: nobody may write it now.
    local.all().copy_from_slice(&vec![POISON; 4 * MIB]).expect("equal");
    child.go_on();
    std::thread::sleep(Duration::from_millis(300));
    assert!(
        local.bytes(0, 4 * MIB).iter().all(|byte| *byte == POISON),
        "written after its outcome"
    );
    until_it_succeeds(|| run(PATIENCE).is_ok_and(|outcome| outcome.is_ok()));
    assert!(local.bytes(0, 4 * MIB) == pattern(SEED, 0, 4 * MIB));
}

/// One-sided: the process does not take part.
pub(crate) fn a_stopped_peer_still_serves_what_is_mapped(kind: Kind) {
    let Some(caller) = caller(kind) else { return };
    let child = Start::here(kind, MIB).run();
    let peer = caller.transport.connect(&child.address, PATIENCE).expect("connected");
    let local = Memory::new(MIB).register(&caller, RemoteAccess::Read).poison();
    let read = || vec![piece(&local, 0, &child.region, 0, MIB, Direction::Read)];
    let run = || peer.submit(read(), PATIENCE).expect("taken").wait();
    assert_eq!(run(), Ok(()));
    child.stop();
    let _ = local.all().copy_from_slice(&vec![POISON; MIB]);
    assert_eq!(run(), Ok(()));
    assert!(local.bytes(0, MIB) == pattern(SEED, 0, MIB));
    child.go_on();
}

fn until_it_succeeds(attempt: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !attempt() {
        assert!(Instant::now() < until, "it does not come back");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn a_peer_that_was_restarted_is_used_again(kind: Kind) {
    let Some(caller) = caller(kind) else { return };
    let mut child = Start::here(kind, MIB).run();
    let peer = caller.transport.connect(&child.address, PATIENCE).expect("connected");
    let local = Memory::new(MIB).register(&caller, RemoteAccess::Read).poison();
    for _ in 0..3 {
        let region = Arc::clone(&child.region);
        let read = || vec![piece(&local, 0, &region, 0, MIB, Direction::Read)];
        let run = || {
            peer.submit(read(), Duration::from_secs(2))
                .map(kvtier_transfer::Transfer::wait)
        };
        until_it_succeeds(|| run().is_ok_and(|outcome| outcome.is_ok()));
        assert!(local.bytes(0, MIB) == pattern(SEED, 0, MIB));
        let port = child.port();
        child.kill();
        let outcome = run();
        assert!(!matches!(outcome, Ok(Ok(()))), "a dead peer answers");
        child = Start {
            listen: &format!("127.0.0.1:{port}"),
            ..Start::here(kind, MIB)
        }
        .run();
        let _ = local.all().copy_from_slice(&vec![POISON; MIB]);
    }
}

pub(crate) fn sixty_four_peers_survive_a_storm_of_reconnects(kind: Kind) {
    const PEERS: usize = 64;
    const STORMS: usize = 2;
    const LENGTH: usize = 16 << 10;
    let Some(caller) = caller(kind) else { return };
    let mut child = Start::here(kind, MIB).run();
    let connect = |_| caller.transport.connect(&child.address, PATIENCE).expect("connected");
    let begun = Instant::now();
    let peers: Vec<Box<dyn Peer>> = (0..PEERS).map(connect).collect();
    println!("connected after {:?}", begun.elapsed());
    let local = Memory::new(PEERS * LENGTH)
        .register(&caller, RemoteAccess::Read)
        .poison();
    for storm in 0..=STORMS {
        let region = Arc::clone(&child.region);
        let read = |at: usize| vec![piece(&local, at * LENGTH, &region, at * 512, LENGTH, Direction::Read)];
        for (at, peer) in peers.iter().enumerate() {
            let run = || {
                peer.submit(read(at), Duration::from_secs(5))
                    .map(kvtier_transfer::Transfer::wait)
            };
            until_it_succeeds(|| run().is_ok_and(|outcome| outcome.is_ok()));
            assert!(
                local.bytes(at * LENGTH, LENGTH) == pattern(SEED, at * 512, LENGTH),
                "peer {at} after storm {storm}"
            );
        }
        println!("storm {storm} is over after {:?}", begun.elapsed());
        local
            .all()
            .copy_from_slice(&vec![POISON; PEERS * LENGTH])
            .expect("equal");
        if storm < STORMS {
            let port = child.port();
            child.kill();
            println!("killed after {:?}", begun.elapsed());
            child = Start {
                listen: &format!("127.0.0.1:{port}"),
                ..Start::here(kind, MIB)
            }
            .run();
            println!("started again after {:?}", begun.elapsed());
        }
    }
    let reconnects: u64 = peers
        .iter()
        .flat_map(|peer| peer.rails())
        .map(|rail| rail.reconnects)
        .sum();
    // Two connections or lanes a peer and storm, and as many again for attempts that met the dying process.
    assert!(reconnects >= (PEERS * STORMS) as u64, "{reconnects}");
    assert!(
        reconnects <= (PEERS * STORMS * 4) as u64,
        "{reconnects} are a storm of their own"
    );
}

pub(crate) fn who_does_not_know_the_secret_is_refused(kind: Kind) {
    let with = |secret: Option<&[u8]>| Wishes {
        secret: secret.map(Secret::new),
        ..Wishes::default()
    };
    let Some(owner) = site(kind, &with(Some(b"right"))) else {
        return;
    };
    let connect = |secret: Option<&[u8]>, address: &PeerAddress| {
        let caller = site(kind, &with(secret)).expect("as the owner");
        caller.transport.connect(address, PATIENCE).map(drop)
    };
    let address = owner.transport.address();
    assert_eq!(connect(Some(b"right"), &address), Ok(()));
    for secret in [Some(&b"wrong"[..]), None] {
        let refused = connect(secret, &address).expect_err("it does not know the secret");
        let is_told = matches!(refused, ConnectError::Denied { .. } | ConnectError::Unreachable { .. });
        assert!(is_told, "{refused}");
    }
    let open = site(kind, &with(None)).expect("as the owner");
    let refused = connect(Some(b"right"), &open.transport.address()).expect_err("the owner proves nothing");
    assert!(matches!(refused, ConnectError::Denied { .. }), "{refused}");
}

pub(crate) fn notices_arrive_once_and_in_order_behind_what_they_are_about(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let notices = stand.owner.transport.notices().expect("it carries notices");
    let owned = stand.owned(MIB, RemoteAccess::ReadWrite);
    let remote = owned.remote();
    let local = stand.local(MIB).fill(3);
    std::thread::scope(|scope| {
        let taking = scope.spawn(|| {
            for expected in 0..300u32 {
                assert_eq!(notices.next(PATIENCE), Some(expected));
                let (offset, length) = (expected as usize * 1024, 1024);
                assert!(
                    owned.bytes(offset, length) == pattern(3, offset, length),
                    "notice {expected}"
                );
            }
        });
        for note in 0..300u32 {
            let offset = note as usize * 1024;
            let write = piece(&local, offset, &remote, offset, 1024, Direction::Write);
            assert_eq!(stand.run(vec![write]), Ok(()));
            let sent = stand.peer.notify(note, PATIENCE).map_err(|refused| refused.reason);
            assert_eq!(sent.expect("taken").wait(), Ok(()));
        }
        taking.join().expect("all of them");
    });
    assert_eq!(notices.next(Duration::from_millis(50)), None);
}

pub(crate) fn notices_that_nobody_takes_wait_for_their_deadline_and_reads_go_on(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let notices = stand.owner.transport.notices().expect("it carries notices");
    let owned = stand.owned(MIB, RemoteAccess::Read);
    let local = stand.local(MIB);
    let send = |note: u32, deadline: Duration| {
        let sent = stand.peer.notify(note, deadline).map_err(|refused| refused.reason);
        sent.expect("taken")
    };
    // Connected, with one credit gone.
    assert_eq!(send(0, PATIENCE).wait(), Ok(()));
    let deadline = Duration::from_millis(500);
    let begun = Instant::now();
    let sent: Vec<_> = (1..24).map(|note| send(note, deadline)).collect();
    let read = piece(&local, 0, &owned.remote(), 0, MIB, Direction::Read);
    assert_eq!(stand.run(vec![read]), Ok(()), "beside notices that wait");
    let outcomes: Vec<_> = sent.into_iter().map(kvtier_transfer::Transfer::wait).collect();
    assert!(begun.elapsed() < deadline + SLACK, "{:?}", begun.elapsed());
    let there = outcomes.iter().take_while(|outcome| outcome.is_ok()).count();
    assert_eq!(there, 15, "as many as the other end has room for: {outcomes:?}");
    let late = outcomes[there].as_ref().expect_err("not taken");
    assert_eq!(late.cause, Cause::Deadline);
    // Those behind it end with it.
    assert!(outcomes[there..].iter().all(Result::is_err), "{outcomes:?}");
    for expected in 0..16 {
        assert_eq!(notices.next(PATIENCE), Some(expected));
    }
    // There is room again, over a new connection.
    for note in 100..140 {
        let sent = send(note, PATIENCE);
        assert_eq!(notices.next(PATIENCE), Some(note));
        assert_eq!(sent.wait(), Ok(()));
    }
    assert_eq!(notices.next(Duration::from_millis(50)), None);
}

pub(crate) fn a_notice_is_refused_in_words(kind: Kind) {
    let Some(stand) = Stand::set_up(kind) else { return };
    let sent = stand.peer.notify(7, PATIENCE).map_err(|refused| refused.reason);
    let Err(Refusal::Invalid { what, .. }) = sent else {
        panic!("{sent:?}")
    };
    assert!(what.contains("notices"), "{what}");
}
