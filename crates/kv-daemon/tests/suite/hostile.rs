//! Clients that die, stall or lie: each harms only itself.
//!
//! The clients are this test binary again: [`as_a_child_this_binary_is_a_client`] becomes one when its environment says so.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::daemon::{Daemon, PATIENCE, chat_trace, signal_process, wait};
use crate::raw::{self, Raw};
use kv_daemon::content::Content;
use kvtier::client::blocking::{Client, Namespace};
use kvtier::client::{ClientOptions, FetchScope, Lineage, PutOutcome};
use kvtier::{BlockHash, Parent, Realization};
use kvtier_sim::trace::block_hash;
use rustix::process::Signal;
use serde_json::json;

const BLOCK_BYTES: usize = 16 << 10;

/// Which client a child becomes, and where its daemon listens.
const ROLE: &str = "KVTIER_HOSTILE_ROLE";
const SOCKET: &str = "KVTIER_HOSTILE_SOCKET";
const SEED: &str = "KVTIER_HOSTILE_SEED";

/// A child says this when it is in the middle of what its role is about.
const UNDER_WAY: &str = "under way";

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn connect(socket: &Path) -> Namespace {
    let options = ClientOptions::new(socket).with_timeout(Duration::from_secs(20));
    let client = Client::connect(options).expect("the daemon answers");
    client
        .namespace("hostile", Realization::digest(&[]))
        .expect("a namespace")
}

/// Puts blocks; each outcome must be one of those that a busy cache may give.
fn put(namespace: &Namespace, content: &Content, ids: &[u64]) -> usize {
    let blocks: Vec<Vec<u8>> = ids
        .iter()
        .map(|id| {
            let mut bytes = vec![0; BLOCK_BYTES];
            content.fill(*id, &mut bytes);
            bytes
        })
        .collect();
    let items: Vec<(BlockHash, &[u8])> = ids
        .iter()
        .map(|id| block_hash(*id))
        .zip(blocks.iter().map(Vec::as_slice))
        .collect();
    let outcomes = namespace
        .put_from(Lineage::Chain(Parent::Unknown), &items, 512)
        .expect("a put is answered");
    assert!(
        outcomes.iter().all(|outcome| *outcome != PutOutcome::Invalid),
        "{outcomes:?}"
    );
    outcomes
        .iter()
        .filter(|outcome| **outcome == PutOutcome::Published)
        .count()
}

/// Gets blocks and compares every byte of those that are there.
fn verify(namespace: &Namespace, content: &Content, ids: &[u64]) -> usize {
    let hashes: Vec<BlockHash> = ids.iter().map(|id| block_hash(*id)).collect();
    let handles = namespace.get(&hashes, FetchScope::Each).expect("a get is answered");
    let mut bytes = vec![0; BLOCK_BYTES];
    let mut found = 0;
    for (id, handle) in ids.iter().zip(&handles) {
        let Some(handle) = handle else { continue };
        assert_eq!(handle.copy_to(&mut bytes), Ok(BLOCK_BYTES));
        assert_eq!(
            content.wrong_bytes(*id, &bytes),
            0,
            "block {id} holds {:?}",
            Content::claimed_id(&bytes)
        );
        found += 1;
    }
    found
}

#[test]
fn as_a_child_this_binary_is_a_client() {
    let Ok(role) = std::env::var(ROLE) else { return };
    // Whatever becomes of the test, its children go with it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).expect("the kernel takes it");
    let socket = std::env::var_os(SOCKET).expect("a socket");
    let socket = Path::new(&socket);
    let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    match role.as_str() {
        "busy" => be_busy(socket, seed),
        "reader" => be_a_slow_reader(socket),
        "writer" => be_a_slow_writer(socket),
        "liar" => be_a_liar(socket, seed),
        "flood" => be_a_flood(socket),
        role => panic!("no such role: {role}"),
    }
}

struct ChildClient {
    child: Child,
    output: BufReader<ChildStdout>,
    input: ChildStdin,
}

impl ChildClient {
    fn start(daemon: &Daemon, role: &str, seed: u64) -> ChildClient {
        let mut child = Command::new(std::env::current_exe().expect("this binary"))
            .args([
                "--exact",
                "hostile::as_a_child_this_binary_is_a_client",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(ROLE, role)
            .env(SOCKET, daemon.socket())
            .env(SEED, seed.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("a child");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let input = child.stdin.take().expect("a pipe");
        ChildClient { child, output, input }
    }

    /// Reads lines until one holds `word`.
    fn wait_for(&mut self, word: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            let read = self.output.read_line(&mut line).expect("a line");
            assert!(read > 0, "the child ended before it said {word:?}");
            if line.contains(word) {
                return line.trim().to_string();
            }
        }
    }

    fn go_on(&mut self) {
        self.input.write_all(b"\n").expect("the child reads");
    }

    fn kill(mut self) -> Option<i32> {
        self.child.kill().expect("a child");
        wait(&mut self.child).signal()
    }

    fn end(mut self) {
        let status = wait(&mut self.child);
        assert!(status.success(), "{status}");
    }
}

fn say(words: &str) {
    println!("{words}");
    std::io::stdout().flush().expect("the parent reads");
}

fn wait_for_parent() {
    std::io::stdin().lock().read_exact(&mut [0]).expect("the parent lives");
}

const BUSY_IDS: u64 = 2000;

/// Gets and puts without a pause, in place and copied, until killed.
fn be_busy(socket: &Path, seed: u64) {
    let content = Content::default();
    let namespace = connect(socket);
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    say(UNDER_WAY);
    loop {
        let first = random.below(BUSY_IDS);
        let ids: Vec<u64> = (first..first + 1 + random.below(12)).collect();
        match random.below(3) {
            0 => {
                verify(&namespace, &content, &ids);
            }
            1 => {
                put(&namespace, &content, &ids);
            }
            _ => put_in_place(&namespace, &content, &ids, &mut random),
        }
    }
}

/// Reserves, writes in place, and seals some, so that a kill finds slots in every state.
fn put_in_place(namespace: &Namespace, content: &Content, ids: &[u64], random: &mut Random) {
    let wanted: Vec<(BlockHash, u32)> = ids.iter().map(|id| (block_hash(*id), BLOCK_BYTES as u32)).collect();
    let writings = namespace
        .writers(Lineage::Chain(Parent::Unknown), &wanted, 512)
        .expect("a reserve is answered");
    let mut bytes = vec![0; BLOCK_BYTES];
    let mut written = Vec::new();
    for (id, writing) in ids.iter().zip(writings) {
        let Some(mut writer) = writing.writer() else { continue };
        content.fill(*id, &mut bytes);
        writer.write(0, &bytes).expect("a slot is written");
        if random.below(4) > 0 {
            written.push(writer);
        }
    }
    namespace.seal(written).expect("a seal is answered");
}

#[test]
fn two_hundred_clients_killed_in_the_middle_of_puts_and_gets_leave_nothing_behind() {
    let daemon = Daemon::start(&[
        "--nvme-bytes",
        "64MiB",
        "--lease-ttl-ms",
        "60000",
        "--reservation-ttl-ms",
        "60000",
    ]);
    let mut random = Random(0x5eed_0001);
    for round in 0..50 {
        let children: Vec<ChildClient> = (0..4)
            .map(|place| {
                let mut child = ChildClient::start(&daemon, "busy", 4 * round + place + 1);
                child.wait_for(UNDER_WAY);
                child
            })
            .collect();
        std::thread::sleep(Duration::from_millis(5 + random.below(25)));
        for child in children {
            assert_eq!(
                child.kill(),
                Some(Signal::KILL.as_raw()),
                "a client ended by itself: it read wrong bytes"
            );
        }
    }
    let status = daemon.settle();
    for work in ["puts_published", "fetch_hits_host", "evictions_host"] {
        assert!(
            status[work].as_u64().is_some_and(|count| count > 0),
            "{work}: the clients did nothing: {status:#}"
        );
    }
    assert_eq!(status["corrupt"], 0, "{status:#}");
    let content = Content::default();
    let namespace = connect(&daemon.socket());
    let found: usize = (0..BUSY_IDS)
        .step_by(50)
        .map(|first| verify(&namespace, &content, &Vec::from_iter(first..first + 50)))
        .sum();
    assert!(found > 0, "something of what they put is there, and right");
    drop(namespace);
    let trace = chat_trace(daemon.directory.path(), 11, 40);
    let report = daemon.ask(&["replay", trace.to_str().unwrap(), "--block-bytes", "16KiB"]);
    assert_eq!(
        (&report["wrong_bytes"], &report["put_busy"]),
        (&json!(0), &json!(0)),
        "{report:#}"
    );
    assert!(report["verified_bytes"].as_u64().unwrap() > 0, "{report:#}");
    daemon.settle();
}

/// Blocks of the slow clients; nobody else uses these ids.
const READ_IDS: [u64; 4] = [1 << 40, (1 << 40) + 1, (1 << 40) + 2, (1 << 40) + 3];
const WRITE_ID: u64 = 1 << 41;

/// Leases blocks in place, copies half of each, waits to be told, and reads the rest.
fn be_a_slow_reader(socket: &Path) {
    let content = Content::default();
    let namespace = connect(socket);
    let handles = namespace
        .get(&READ_IDS.map(block_hash), FetchScope::Each)
        .expect("a get is answered");
    let mut halves = vec![vec![0; BLOCK_BYTES]; READ_IDS.len()];
    for (handle, bytes) in handles.iter().zip(&mut halves) {
        let slice = handle.as_ref().expect("a hit").slice();
        let front = slice.subslice(0, BLOCK_BYTES / 2).expect("a half");
        front.copy_to_slice(&mut bytes[..BLOCK_BYTES / 2]).expect("a copy");
    }
    say(UNDER_WAY);
    wait_for_parent();
    let mut wrong = 0;
    for ((id, handle), bytes) in READ_IDS.iter().zip(&handles).zip(&mut halves) {
        let slice = handle.as_ref().expect("a hit").slice();
        let back = slice.subslice(BLOCK_BYTES / 2, BLOCK_BYTES / 2).expect("a half");
        back.copy_to_slice(&mut bytes[BLOCK_BYTES / 2..]).expect("a copy");
        wrong += content.wrong_bytes(*id, bytes);
    }
    say(&format!("wrong bytes: {wrong}"));
    wait_for_parent();
}

/// Reserves a slot, writes half of it, waits to be told, writes the rest and seals.
fn be_a_slow_writer(socket: &Path) {
    let content = Content::default();
    let namespace = connect(socket);
    let mut bytes = vec![0; BLOCK_BYTES];
    content.fill(WRITE_ID, &mut bytes);
    let writing = namespace
        .writer(block_hash(WRITE_ID), Parent::Unknown, BLOCK_BYTES as u32, 512)
        .expect("an answer");
    let mut writer = writing.writer().expect("a slot");
    writer.write(0, &bytes[..BLOCK_BYTES / 2]).expect("the first half");
    say(UNDER_WAY);
    wait_for_parent();
    writer
        .write(BLOCK_BYTES / 2, &bytes[BLOCK_BYTES / 2..])
        .expect("the second half");
    say(&format!("sealed: {:?}", writer.seal().expect("an answer")));
    wait_for_parent();
}

#[test]
fn a_client_stopped_past_every_deadline_reads_its_own_bytes_and_publishes_nothing() {
    let ttl = Duration::from_millis(300);
    let daemon = Daemon::start(&[
        "--nvme-bytes",
        "32MiB",
        "--lease-ttl-ms",
        "300",
        "--reservation-ttl-ms",
        "300",
    ]);
    let content = Content::default();
    let namespace = connect(&daemon.socket());
    assert_eq!(put(&namespace, &content, &READ_IDS), READ_IDS.len());

    let mut reader = ChildClient::start(&daemon, "reader", 1);
    let mut writer = ChildClient::start(&daemon, "writer", 1);
    reader.wait_for(UNDER_WAY);
    writer.wait_for(UNDER_WAY);
    signal_process(&reader.child, Signal::STOP);
    signal_process(&writer.child, Signal::STOP);
    let stopped = Instant::now();

    // Four times what both tiers hold passes through them meanwhile.
    let churn = 4 * (48 << 20) / BLOCK_BYTES as u64;
    let mut published = 0;
    for first in (0..churn).step_by(32) {
        let ids: Vec<u64> = (first..first + 32).collect();
        published += put(&namespace, &content, &ids);
        verify(&namespace, &content, &ids);
    }
    assert!(
        published as u64 > churn / 2,
        "{published} of {churn} blocks were stored around the stalled clients"
    );
    std::thread::sleep((4 * ttl).saturating_sub(stopped.elapsed()));
    let status = daemon.status();
    let number = |name: &str| status[name].as_u64().unwrap();
    assert!(number("leases_expired") >= READ_IDS.len() as u64, "{status:#}");
    assert!(
        number("quarantined_slots") > READ_IDS.len() as u64,
        "leases and the reservation: {status:#}"
    );
    assert!(
        number("evictions_host") > 0 && number("evictions_nvme") > 0,
        "{status:#}"
    );
    drop(namespace);

    signal_process(&reader.child, Signal::CONT);
    signal_process(&writer.child, Signal::CONT);
    reader.go_on();
    assert_eq!(reader.wait_for("wrong bytes"), "wrong bytes: 0");
    writer.go_on();
    assert_eq!(writer.wait_for("sealed"), "sealed: Stale");

    let namespace = connect(&daemon.socket());
    let mut found = 0;
    for first in (0..churn).step_by(64) {
        found += verify(&namespace, &content, &Vec::from_iter(first..first + 64));
    }
    assert!(found > 0, "blocks of others are there and right");
    assert_eq!(
        verify(&namespace, &content, &[WRITE_ID]),
        0,
        "a stale seal publishes nothing"
    );
    drop(namespace);
    reader.go_on();
    writer.go_on();
    reader.end();
    writer.end();
    daemon.settle();
}

/// Says what no client should, over many connections, until killed.
fn be_a_liar(socket: &Path, seed: u64) {
    let mut random = Random(seed | 1);
    let mut open = Vec::new();
    say(UNDER_WAY);
    loop {
        let mut connection = match random.below(3) {
            0 => Raw::connect(socket),
            _ => Raw::greet(socket, b""),
        };
        // Whatever happens to the connection is what it deserves; the daemon is looked at from outside.
        let _ = tell_lies(&mut connection, &mut random);
        if random.below(4) == 0 {
            open.push(connection);
        }
        if open.len() > 32 {
            open.clear();
        }
    }
}

fn tell_lies(connection: &mut Raw, random: &mut Random) -> std::io::Result<()> {
    let hash = [3; 16];
    let noise = |random: &mut Random, bytes: u64| -> Vec<u8> { (0..bytes).map(|_| random.below(256) as u8).collect() };
    match random.below(12) {
        // Garbage, and a header whose length is beyond every limit.
        0 => connection.stream.write_all(&noise(random, 200)),
        1 => connection.stream.write_all(&[0xff; 64]),
        // Half a message, left open.
        2 => connection
            .stream
            .write_all(&raw::frame(raw::LOOKUP, 1, &[], &raw::keys(0, &[hash]))[..50]),
        // More keys than the body holds.
        3 => {
            let mut body = raw::keys(0, &[hash]);
            body[24..28].copy_from_slice(&4000_u32.to_le_bytes());
            connection.call(raw::LOOKUP, &body).map(drop)
        }
        // Leases and reservations that somebody else may hold.
        4 => {
            let leases: Vec<u64> = (0..64).map(|_| random.below(1 << 20)).collect();
            connection.call_releasing(raw::STATUS, &leases, &[]).map(drop)
        }
        5 => {
            let (handle, generation) = connection.open("hostile")?;
            let body = raw::seal(handle, generation, random.below(1 << 20), hash, BLOCK_BYTES as u32);
            connection.call(raw::SEAL, &body).map(drop)
        }
        6 => {
            let mut body = 64_u32.to_le_bytes().to_vec();
            body.extend((0..64).flat_map(|_| random.below(1 << 20).to_le_bytes()));
            connection.stream.write_all(&raw::frame(raw::ABANDON, 9, &[], &body))
        }
        // More slots than there can be, and a release that nobody answers.
        8 => connection.call(raw::GRANT, &[0xff; 8]).map(drop),
        9 => connection
            .stream
            .write_all(&raw::frame(raw::RELEASE, 2, &[0, 1, u64::MAX], &[])),
        10 => connection
            .call(raw::INVALIDATE, &raw::text("a name of nothing"))
            .map(drop),
        // A handle that was never given, and a block of impossible size.
        7 => connection.call(raw::FETCH, &raw::fetch(77, &[hash])).map(drop),
        _ => {
            let (handle, _) = connection.open("hostile")?;
            connection
                .call(raw::RESERVE, &raw::reserve(handle, &[hash], u32::MAX))
                .map(drop)
        }
    }
}

/// Sends long lookups for ever and never reads an answer.
fn be_a_flood(socket: &Path) {
    let mut connection = Raw::greet(socket, b"");
    let (handle, _) = connection.open("hostile").expect("a namespace");
    let frame = raw::frame(raw::LOOKUP, 5, &[], &raw::keys(handle, &vec![[9; 16]; 4096]));
    say(UNDER_WAY);
    while connection.stream.write_all(&frame).is_ok() {}
    say("cut off");
}

#[test]
fn clients_that_lie_harm_only_themselves() {
    let daemon = Daemon::start(&["--nvme-bytes", "32MiB"]);
    let content = Content::default();
    let ids: Vec<u64> = (0..200).collect();

    // A well-behaved client works all the while, and must not notice.
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Raised also when an assertion fails, so that the good client's thread ends.
        let ending = Raise(&done);
        let good = scope.spawn(|| {
            let namespace = connect(&daemon.socket());
            let mut rounds = 0;
            while !done.load(Ordering::Acquire) || rounds < 3 {
                for ids in ids.chunks(20) {
                    put(&namespace, &content, ids);
                    assert_eq!(
                        verify(&namespace, &content, ids),
                        ids.len(),
                        "its blocks fit, so they stay"
                    );
                }
                rounds += 1;
            }
            rounds
        });
        let liars: Vec<ChildClient> = (0..2)
            .map(|seed| {
                let mut liar = ChildClient::start(&daemon, "liar", 77 + seed);
                liar.wait_for(UNDER_WAY);
                liar
            })
            .collect();
        let mut flood = ChildClient::start(&daemon, "flood", 1);
        flood.wait_for(UNDER_WAY);
        foreign_ids_move_nothing(&daemon);
        flood.wait_for("cut off");
        std::thread::sleep(Duration::from_secs(1));
        for liar in liars {
            liar.kill();
        }
        flood.end();
        drop(ending);
        assert!(good.join().expect("the good client sees only right bytes") >= 3);
    });
    let status = daemon.settle();
    assert!(status["foreign_ids"].as_u64().unwrap() > 0, "{status:#}");
    let begun = Instant::now();
    while daemon.count("clients") > 0 {
        assert!(begun.elapsed() < PATIENCE, "connections of the dead remain");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (status, log) = daemon.stop();
    assert!(status.success(), "{status}: {log}");
    assert!(!log.contains("panicked"), "{log}");
}

struct Raise<'a>(&'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// One connection tries to release, seal and abandon what another of the same domain holds.
fn foreign_ids_move_nothing(daemon: &Daemon) {
    let (shared, fresh) = ([0xa0; 16], [0xa1; 16]);
    let mut holder = Raw::greet(&daemon.socket(), b"");
    let (handle, generation) = holder.open("foreign").unwrap();
    let granted = |answer: &raw::Answer| answer.records(8, 32)[0].clone();
    let id = |record: &[u8], offset: usize| u64::from_le_bytes(record[offset..offset + 8].try_into().unwrap());

    // The holder puts one block and leases it, and holds a second slot unsealed.
    let slot = granted(
        &holder
            .call(raw::RESERVE, &raw::reserve(handle, &[shared], 4096))
            .unwrap(),
    );
    assert_eq!(slot[0], 2, "granted");
    let sealed = holder
        .call(raw::SEAL, &raw::seal(handle, generation, id(&slot, 8), shared, 4096))
        .unwrap();
    assert_eq!(sealed.body[12], 0, "published: {sealed:?}");
    let lease = granted(&holder.call(raw::FETCH, &raw::fetch(handle, &[shared])).unwrap());
    assert_eq!(lease[0], 2, "leased");
    let lease = id(&lease, 8);
    let slot = granted(
        &holder
            .call(raw::RESERVE, &raw::reserve(handle, &[fresh], 4096))
            .unwrap(),
    );
    let reservation = id(&slot, 8);

    let mut thief = Raw::greet(&daemon.socket(), b"");
    let (stolen_handle, _) = thief.open("foreign").unwrap();
    let before = daemon.count("foreign_ids");
    thief.call_releasing(raw::STATUS, &[lease, lease], &[]).unwrap();
    let mut abandoned = 1_u32.to_le_bytes().to_vec();
    abandoned.extend(reservation.to_le_bytes());
    thief
        .stream
        .write_all(&raw::frame(raw::ABANDON, 9, &[], &abandoned))
        .unwrap();
    let sealed = thief
        .call(
            raw::SEAL,
            &raw::seal(stolen_handle, generation, reservation, fresh, 4096),
        )
        .unwrap();
    assert_ne!(sealed.body[12], 0, "a foreign slot is not published: {sealed:?}");
    assert!(daemon.count("foreign_ids") >= before + 3, "they are counted");

    // The holder still holds both: its own seal publishes, its own release is known.
    let sealed = holder
        .call(raw::SEAL, &raw::seal(handle, generation, reservation, fresh, 4096))
        .unwrap();
    assert_eq!(sealed.body[12], 0, "published: {sealed:?}");
    holder.call_releasing(raw::STATUS, &[lease], &[]).unwrap();
    holder.call(raw::GOODBYE, &[]).unwrap();
}

#[test]
fn an_administrator_who_sends_too_much_hears_so_and_others_are_served() {
    use std::io::{Read, Write};
    let daemon = Daemon::start(&[]);
    let (address, token) = (daemon.http_address(), daemon.token());
    let head = |path: &str, length: usize| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        )
    };
    for path in ["/v1/purges", "/v1/tokens", "/v1/flush"] {
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(crate::daemon::PATIENCE)).unwrap();
        stream.write_all(head(path, 10_000_000).as_bytes()).unwrap();
        // All of it, before the answer is read, as simple clients do.
        stream.write_all(&vec![b' '; 10_000_000]).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
        assert!(answer.contains("application/problem+json"), "{answer}");
    }
    // Those who promise a body and send none hold their own connections only.
    let waiting: Vec<_> = (0..8)
        .map(|_| {
            let mut stream = std::net::TcpStream::connect(&address).unwrap();
            stream.write_all(head("/v1/tokens", 1000).as_bytes()).unwrap();
            stream
        })
        .collect();
    assert_eq!(daemon.http("GET", "/v1/status").0, 200);
    drop(waiting);
    assert_eq!(
        daemon.http("GET", "/v1/tokens").1.matches("tok_").count(),
        1,
        "no token was made"
    );
}
