//! What only a TCP connection can suffer: something between the two ends.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvtier_transfer::{Cause, Direction, PeerAddress, RemoteAccess, Transport};

use crate::stand::{Kind, Memory, PATIENCE, Site, Wishes, pattern, piece, site};

const MIB: usize = 1 << 20;
/// What a listener says first, greeting and proof. It is not changed: who is not proven to know the secret is refused for
/// good, and a connection made anew while a test goes on would bring that upon the next transfer.
const INTRODUCTION_BYTES: usize = 24 + 32;

/// Passes bytes on, and can cut every connection, or change bytes on their way to the caller.
struct Between {
    address: SocketAddr,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    /// Bytes of answers after which one is changed; `usize::MAX`: none.
    change_at: Arc<AtomicUsize>,
}

impl Between {
    fn start(owner: &dyn Transport) -> Between {
        let PeerAddress::Tcp(target) = owner.address() else {
            unreachable!("a TCP transport")
        };
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let between = Between {
            address: listener.local_addr().expect("bound"),
            streams: Arc::default(),
            change_at: Arc::new(AtomicUsize::new(usize::MAX)),
        };
        let (streams, change_at) = (Arc::clone(&between.streams), Arc::clone(&between.change_at));
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(target) else { return };
                let both = [&near, &far].map(|stream| stream.try_clone().expect("a descriptor"));
                streams.lock().expect("no panic").extend(both);
                let clones = (near.try_clone().expect("fd"), far.try_clone().expect("fd"));
                std::thread::spawn(move || pass(near, far, &AtomicUsize::new(usize::MAX)));
                let change_at = Arc::clone(&change_at);
                std::thread::spawn(move || pass(clones.1, clones.0, &change_at));
            }
        });
        between
    }

    fn cut_all(&self) {
        for stream in self.streams.lock().expect("no panic").drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, change_at: &AtomicUsize) {
    let (mut bytes, mut passed) = (vec![0; 64 << 10], 0);
    loop {
        let count = match from.read(&mut bytes) {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        let first = INTRODUCTION_BYTES.saturating_sub(passed).min(count);
        passed += count;
        let (answers, left) = (&mut bytes[first..count], change_at.load(Ordering::SeqCst));
        if left < answers.len() {
            answers[left] ^= 0xff;
            change_at.store(usize::MAX, Ordering::SeqCst);
        } else if left != usize::MAX {
            change_at.store(left - answers.len(), Ordering::SeqCst);
        }
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

fn sites() -> (Site, Site) {
    let site = || site(Kind::Tcp, &Wishes::default()).expect("TCP is everywhere");
    (site(), site())
}

#[test]
fn an_idle_connection_that_was_cut_never_fails_the_next_transfer() {
    let (owner, caller) = sites();
    let between = Between::start(&*owner.transport);
    let peer = caller
        .transport
        .connect(&PeerAddress::Tcp(between.address), PATIENCE)
        .expect("connected");
    let owned = Memory::new(MIB).fill(7).register(&owner, RemoteAccess::Read);
    let local = Memory::new(MIB).poison();
    for _ in 0..5 {
        let read = piece(&local, 0, &owned.remote(), 0, MIB, Direction::Read);
        assert_eq!(peer.submit(vec![read], PATIENCE).expect("taken").wait(), Ok(()));
        assert!(local.bytes(0, MIB) == pattern(7, 0, MIB));
        let _ = local.all().copy_from_slice(&vec![0; MIB]);
        between.cut_all();
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn connections_cut_in_the_middle_lose_no_transfer() {
    let (owner, caller) = sites();
    let between = Between::start(&*owner.transport);
    let peer = caller
        .transport
        .connect(&PeerAddress::Tcp(between.address), PATIENCE)
        .expect("connected");
    let owned = Memory::new(16 * MIB).fill(7).register(&owner, RemoteAccess::ReadWrite);
    let local = Memory::new(16 * MIB).poison();
    for round in 0..4 {
        let read = piece(&local, 0, &owned.remote(), 0, 16 * MIB, Direction::Read);
        let transfer = peer.submit(vec![read], PATIENCE).expect("taken");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(1 + 2 * round));
                between.cut_all();
            });
            assert_eq!(transfer.wait(), Ok(()));
        });
        assert!(local.bytes(0, 16 * MIB) == pattern(7, 0, 16 * MIB));
        let _ = local.all().copy_from_slice(&vec![0; 16 * MIB]);
    }
    let reconnects: u64 = peer.rails().iter().map(|rail| rail.reconnects).sum();
    assert!(reconnects > 0, "nothing was cut in time");
}

#[test]
fn an_answer_that_breaks_the_protocol_ends_its_connection_and_not_the_transfer() {
    let (owner, caller) = sites();
    let between = Between::start(&*owner.transport);
    let peer = caller
        .transport
        .connect(&PeerAddress::Tcp(between.address), PATIENCE)
        .expect("connected");
    let owned = Memory::new(MIB).fill(7).register(&owner, RemoteAccess::Read);
    let local = Memory::new(MIB).poison();
    // Each byte of an answer's head: a changed one must never be taken for another answer.
    for at in 0..64 {
        between.change_at.store(at, Ordering::SeqCst);
        let read = piece(&local, 0, &owned.remote(), 4096, 65_536, Direction::Read);
        match peer.submit(vec![read], PATIENCE).expect("taken").wait() {
            Ok(()) => assert!(local.bytes(0, 65_536) == pattern(7, 4096, 65_536), "byte {at}"),
            // A status that exists: the peer refuses, as far as anybody can tell.
            Err(error) => assert!(matches!(error.cause, Cause::Denied(_)), "byte {at}: {error}"),
        }
        let _ = local.all().copy_from_slice(&vec![0; MIB]);
    }
}

#[test]
fn something_else_at_the_port_is_told_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
        }
    });
    let (_, caller) = sites();
    let refused = caller.transport.connect(&PeerAddress::Tcp(address), PATIENCE).map(drop);
    let words = refused.expect_err("it does not speak our protocol").to_string();
    assert!(words.contains("does not speak this protocol"), "{words}");
}

#[test]
fn a_revocation_does_not_wait_for_a_caller_that_does_not_read() {
    let (owner, _) = sites();
    let PeerAddress::Tcp(address) = owner.transport.address() else {
        unreachable!("a TCP transport")
    };
    let mut owned = Memory::new(64 * MIB).fill(7).register(&owner, RemoteAccess::Read);
    let region = owned.remote();
    // A caller by hand: greets, asks for everything, and reads nothing of it.
    let mut stream = TcpStream::connect(address).expect("connected");
    let mut greeting = b"KVTX\x01\0\0\0".to_vec();
    greeting.extend([0; 16]);
    stream.write_all(&greeting).expect("sent");
    stream.read_exact(&mut [0; 56]).expect("greeted");
    stream.write_all(&[0; 32]).expect("sent");
    let mut request = vec![1, 0, 0, 0, 0, 0, 0, 0];
    request.extend(region.id.0.to_le_bytes());
    request.extend(0u64.to_le_bytes());
    request.extend((64 * MIB as u64).to_le_bytes());
    stream.write_all(&request).expect("sent");
    std::thread::sleep(Duration::from_millis(100));
    let begun = std::time::Instant::now();
    let registration = owned.registration.take().expect("registered");
    assert_eq!(registration.revoke(), Ok(()));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}
