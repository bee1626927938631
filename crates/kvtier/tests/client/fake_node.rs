//! A peer that speaks the wire from a thread: answers by the book, counts what it is asked, and misbehaves on request.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use kvtier::wire::{FrameStream, Kind, Reply, Request, Slot, Welcome};
use kvtier::{BlockHash, ErrorKind, Generation, Tier};
use kvtier_core::{ClientId, Extent, Fetched, LeaseId, ReservationId, Reserved, SealItem, Sealed, SegmentId};
use kvtier_transfer::memory::{MemoryRegion, PageRequest};
use kvtier_transfer::socket::send_all_with_fds;

pub(crate) const SEGMENT_BYTES: usize = 32 << 20;

/// What the node knows; tests look at it and turn its knobs.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) blocks: HashMap<BlockHash, Extent>,
    pub(crate) items: Vec<SealItem>,
    pub(crate) leases: HashSet<LeaseId>,
    pub(crate) reservations: HashMap<ReservationId, Extent>,
    pub(crate) requests: Vec<Kind>,
    pub(crate) abandoned: usize,
    pub(crate) foreign: usize,
    pub(crate) generation: u64,
    pub(crate) connections: usize,
    pub(crate) clock_ns: u64,
    /// Lookups of what exists.
    pub(crate) raw: usize,
    /// Requests of these kinds are not answered.
    pub(crate) mute: Vec<Kind>,
    /// How long an answer waits.
    pub(crate) delay: Duration,
    /// At most this many slots exist at once; 0: any number.
    pub(crate) slots_max: usize,
    /// How long an unsealed slot lives.
    pub(crate) reservation_ttl_ms: u64,
    /// Answers name a segment that was never sent.
    pub(crate) lies: bool,
    next_offset: u64,
    next_id: u64,
}

impl State {
    fn slot(&mut self, length: u32) -> Option<(ReservationId, Extent)> {
        if self.slots_max > 0 && self.reservations.len() >= self.slots_max {
            return None;
        }
        self.next_id += 1;
        let extent = Extent {
            segment: SegmentId(if self.lies { 99 } else { 7 }),
            offset: self.next_offset,
            length,
        };
        self.next_offset += u64::from(length).next_multiple_of(4096);
        assert!(
            self.next_offset <= SEGMENT_BYTES as u64,
            "the test needs a larger segment"
        );
        self.reservations.insert(ReservationId(self.next_id), extent);
        Some((ReservationId(self.next_id), extent))
    }

    pub(crate) fn count(&self, kind: Kind) -> usize {
        self.requests.iter().filter(|seen| **seen == kind).count()
    }
}

pub(crate) struct FakeNode {
    pub(crate) state: Arc<Mutex<State>>,
    directory: PathBuf,
}

impl FakeNode {
    pub(crate) fn start(name: &str) -> FakeNode {
        let directory = std::env::temp_dir().join(format!("kvtier-fake-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let listener = UnixListener::bind(directory.join("s")).expect("a socket");
        let state = Arc::new(Mutex::new(State {
            generation: 1,
            reservation_ttl_ms: 30_000,
            ..State::default()
        }));
        let (region, fd) = MemoryRegion::create("fake", SEGMENT_BYTES, PageRequest::Small).expect("a segment");
        drop(region);
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let (state, fd) = (Arc::clone(&shared), fd.try_clone().expect("a descriptor"));
                state.lock().expect("state").connections += 1;
                std::thread::spawn(move || serve(&stream, &state, &fd));
            }
        });
        FakeNode { state, directory }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.join("s")
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }

    /// Waits until `done`, or fails the test after ten seconds.
    pub(crate) fn wait(&self, what: &str, done: impl Fn(&State) -> bool) {
        for _ in 0..2000 {
            if done(&self.state()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("waited for: {what}");
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        remove(&self.directory);
    }
}

fn remove(directory: &Path) {
    let _ = std::fs::remove_dir_all(directory);
}

fn serve(socket: &UnixStream, state: &Mutex<State>, segment: &OwnedFd) {
    let mut stream = FrameStream::new(4096);
    let mut told = false;
    loop {
        let mut socket_ref = socket;
        let count = match std::io::Read::read(&mut socket_ref, stream.space()) {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        stream.advance(count);
        while let Some(frame) = stream.next().expect("the client keeps the protocol") {
            let (request, extensions) =
                Request::decode(&frame.header, frame.body).expect("the client keeps the protocol");
            let mut out = Vec::new();
            let mut guard = state.lock().expect("state");
            let node = &mut *guard;
            node.requests.push(request.kind());
            node.raw += usize::from(extensions.raw);
            node.clock_ns = node.clock_ns.max(frame.header.clock_ns);
            for lease in frame.releases {
                node.foreign += usize::from(!node.leases.remove(&lease));
            }
            if !told
                && matches!(
                    request,
                    Request::Fetch { .. } | Request::Reserve { .. } | Request::Seal { .. }
                )
            {
                told = true;
                let notice = Reply::SegmentAdded {
                    segment: SegmentId(7),
                    bytes: SEGMENT_BYTES as u64,
                };
                let mut bytes = Vec::new();
                notice.encode(0, &mut bytes).expect("short");
                send_all_with_fds(socket, &bytes, &[segment.as_fd()]).expect("sent");
            }
            answer(node, &request, frame.header.request, &mut out);
            let delay = if node.mute.contains(&request.kind()) {
                None
            } else {
                Some(node.delay)
            };
            drop(guard);
            let Some(delay) = delay else { continue };
            std::thread::sleep(delay);
            if !out.is_empty() && send_all_with_fds(socket, &out, &[]).is_err() {
                return;
            }
        }
    }
}

fn answer(node: &mut State, request: &Request<'_>, number: u64, out: &mut Vec<u8>) {
    let generation = Generation(node.generation);
    let encoded = match *request {
        Request::Hello { token: b"wrong", .. } => Reply::Error {
            kind: ErrorKind::Denied,
            message: "no domain has this token",
        }
        .encode(number, out),
        Request::Hello { .. } => Reply::Welcome(Welcome {
            version: 1,
            client_clock: true,
            batch_keys_max: 4096,
            block_bytes_max: 8 << 20,
            client: ClientId(1),
            lease_ttl_ms: 30_000,
            reservation_ttl_ms: node.reservation_ttl_ms,
        })
        .encode(number, out),
        Request::OpenNamespace { .. } => Reply::NamespaceOpened { handle: 3, generation }.encode(number, out),
        Request::Lookup(keys) => {
            let found = keys
                .hashes
                .iter()
                .map(|hash| node.blocks.get(&hash).map(|_| Tier::Host));
            let tiers: Vec<Option<Tier>> = found.collect();
            Reply::Found {
                generation,
                tiers: (&tiers).into(),
            }
            .encode(number, out)
        }
        Request::Fetch { keys, .. } => {
            let fetch = |hash: BlockHash| {
                let Some(extent) = node.blocks.get(&hash).copied() else {
                    return Fetched::Miss;
                };
                node.next_id += 1;
                node.leases.insert(LeaseId(node.next_id));
                Fetched::Leased {
                    lease: LeaseId(node.next_id),
                    extent,
                    tier: Tier::Host,
                    checksum: None,
                }
            };
            let outcomes: Vec<Fetched> = keys.hashes.iter().map(fetch).collect();
            Reply::Fetched {
                generation,
                outcomes: (&outcomes).into(),
            }
            .encode(number, out)
        }
        Request::Reserve { keys, lengths } => {
            let mut outcomes = Vec::new();
            for (hash, length) in keys.hashes.iter().zip(lengths) {
                outcomes.push(if node.blocks.contains_key(&hash) {
                    Reserved::Present
                } else {
                    node.slot(length)
                        .map_or(Reserved::Busy, |(reservation, extent)| Reserved::Granted {
                            reservation,
                            extent,
                        })
                });
            }
            Reply::Reserved {
                generation,
                outcomes: (&outcomes).into(),
            }
            .encode(number, out)
        }
        Request::Seal {
            generation: sealed,
            ahead,
            items,
            ..
        } => {
            let mut outcomes = Vec::new();
            for item in items {
                let extent = node.reservations.remove(&item.reservation);
                outcomes.push(match extent {
                    None => Sealed::Stale,
                    Some(_) if sealed != generation => Sealed::Stale,
                    Some(_) if node.blocks.contains_key(&item.hash) => Sealed::Present,
                    Some(extent) => {
                        node.blocks.insert(
                            item.hash,
                            Extent {
                                length: item.length,
                                ..extent
                            },
                        );
                        node.items.push(item);
                        Sealed::Published
                    }
                });
            }
            let slots = (0..ahead.count).map_while(|_| node.slot(ahead.length));
            let granted: Vec<Slot> = slots
                .map(|(reservation, extent)| Slot { reservation, extent })
                .collect();
            Reply::Sealed {
                generation,
                outcomes: (&outcomes).into(),
                granted: (&granted).into(),
            }
            .encode(number, out)
        }
        Request::Grant(_) => Reply::Granted {
            slots: [].as_slice().into(),
        }
        .encode(number, out),
        Request::Advise { keys, .. } => {
            let cached = keys.hashes.iter().filter(|hash| node.blocks.contains_key(hash));
            let blocks = u32::try_from(cached.count()).expect("a message's keys");
            Reply::Advised { blocks }.encode(number, out)
        }
        Request::Release => Ok(()),
        Request::Abandon { reservations } => {
            for reservation in reservations {
                node.abandoned += 1;
                node.foreign += usize::from(node.reservations.remove(&reservation).is_none());
            }
            Ok(())
        }
        Request::Delete(keys) => {
            let removed: Vec<bool> = keys
                .hashes
                .iter()
                .map(|hash| node.blocks.remove(&hash).is_some())
                .collect();
            Reply::Deleted {
                generation,
                removed: (&removed).into(),
            }
            .encode(number, out)
        }
        Request::Invalidate { .. } => {
            node.generation += 1;
            node.blocks.clear();
            Reply::Invalidated {
                generation: Generation(node.generation),
            }
            .encode(number, out)
        }
        Request::Flush => Reply::Flushed {
            written: 5,
            left_out: 1,
        }
        .encode(number, out),
        Request::Status => Reply::Status { json: "{\"blocks\":0}" }.encode(number, out),
        Request::Watch { since, .. } => Reply::Watched {
            sequence: since + 1,
            json: "[[\"a\",3]]",
        }
        .encode(number, out),
        Request::Computed { .. } => Reply::Counted.encode(number, out),
        Request::Explain(keys) => Reply::Explained {
            json: &format!("{{\"blocks\":{}}}", keys.hashes.len()),
        }
        .encode(number, out),
        Request::Confirm { .. } => Reply::Confirmed { generation }.encode(number, out),
        Request::Goodbye => {
            node.leases.clear();
            node.reservations.clear();
            Reply::Farewell.encode(number, out)
        }
    };
    encoded.expect("within the limits");
}
