use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use kvtier_transfer::loopback::Loopback;
use kvtier_transfer::memory::{MemoryRegion, MemorySlice, PageRequest};
use kvtier_transfer::rdma::{RawReads, Verbs, VerbsSettings};
use kvtier_transfer::shm::Shm;
use kvtier_transfer::tcp::{Tcp, TcpSettings};
use kvtier_transfer::{Direction, Peer, PeerAddress, Piece, Registration, RemoteAccess, RemoteRegion, Transport};

use super::WORKING_SET_BYTES;
use crate::BenchError;
use crate::baseline::{RawSockets, copy};
use crate::placement::Placement;

const PATIENCE: Duration = Duration::from_secs(30);

/// Both ends of a transport, and the raw way between the same two regions.
pub(super) struct Stand {
    transport: &'static str,
    peer: Box<dyn Peer>,
    remote: Arc<RemoteRegion>,
    source: MemorySlice,
    target: MemorySlice,
    raw: Raw,
    _registrations: Vec<Registration>,
    _ends: [Arc<dyn Transport>; 2],
    _directory: tempfile::TempDir,
    _placement: Option<Placement>,
}

enum Raw {
    Memcpy,
    Sockets(RawSockets),
    Reads(RawReads),
}

impl Stand {
    /// `apart`: each side's threads, ours and raw, keep to a core of their own, as two hosts do. Left to the scheduler, one
    /// request at a time takes 10 µs where both sides meet on one core and 80 elsewhere, and goes to and fro between the two.
    pub(super) fn set_up(transport: &'static str, connections: usize, apart: bool) -> Result<Stand, BenchError> {
        let placement = apart.then(Placement::take);
        let directory = tempfile::tempdir().map_err(BenchError::system("a directory"))?;
        let region = |name| {
            let (region, file) = MemoryRegion::create(name, WORKING_SET_BYTES, PageRequest::Small).map_err(failed)?;
            region.prefault(&|_| {}).map_err(failed)?;
            let all = region.slice(0, WORKING_SET_BYTES).map_err(failed)?;
            Ok::<_, BenchError>((region, file, all))
        };
        let (source_region, source_file, source) = region("kvtier-bench-source")?;
        let (target_region, target_file, target) = region("kvtier-bench-target")?;
        fill(&source)?;
        let mut raw = Raw::Memcpy;
        let mut ends: Vec<Arc<dyn Transport>> = Vec::new();
        let at_the_owner = |start: &mut dyn FnMut() -> Result<(), BenchError>| match &placement {
            Some(placement) => placement.at_the_other(start).map_err(BenchError::system("a core"))?,
            None => start(),
        };
        for name in ["owner", "caller"] {
            ends.push(match transport {
                "loopback" => Arc::new(Loopback::start().map_err(BenchError::system("a thread"))?),
                "shm" => Arc::new(Shm::start(&directory.path().join(name)).map_err(BenchError::system("a socket"))?),
                "tcp" => {
                    let settings = TcpSettings {
                        connections,
                        ..TcpSettings::default()
                    };
                    let start = || Tcp::start(settings.clone()).map_err(BenchError::system("a port"));
                    let mut tcp = None;
                    if name == "owner" {
                        at_the_owner(&mut || start().map(|started| tcp = Some(started)))?;
                    }
                    Arc::new(tcp.map_or_else(start, Ok)?)
                }
                _ => {
                    let settings = VerbsSettings {
                        lanes: connections,
                        ..VerbsSettings::default()
                    };
                    let verbs = Verbs::start(settings).map_err(|why| BenchError::Options(why.to_string()))?;
                    let verbs = Arc::new(verbs);
                    if let Some(PeerAddress::Verbs(owner)) = ends.first().map(|end| end.address()) {
                        raw = Raw::Reads(verbs.raw_reads(owner).map_err(BenchError::system("raw reads"))?);
                    }
                    verbs
                }
            });
        }
        if transport == "tcp" {
            at_the_owner(&mut || {
                let sockets = RawSockets::start(connections, &source).map_err(BenchError::system("raw sockets"))?;
                raw = Raw::Sockets(sockets);
                Ok(())
            })?;
        }
        let [owner, caller] =
            <[Arc<dyn Transport>; 2]>::try_from(ends).map_err(|_| BenchError::Options("two ends".to_owned()))?;
        let owned = owner
            .register(&source_region, Some(source_file.as_fd()), RemoteAccess::Read)
            .map_err(failed)?;
        let local = caller
            .register(&target_region, Some(target_file.as_fd()), RemoteAccess::Read)
            .map_err(failed)?;
        let peer = caller.connect(&owner.address(), PATIENCE).map_err(failed)?;
        Ok(Stand {
            transport,
            peer,
            remote: Arc::new(owned.remote().clone()),
            source,
            target,
            raw,
            _registrations: vec![owned, local],
            _ends: [owner, caller],
            _directory: directory,
            _placement: placement,
        })
    }

    /// Offsets of batch number `at`: sources and targets are walked through at different paces.
    fn places(bytes: usize, batch: usize, at: usize) -> impl Iterator<Item = (usize, usize)> {
        let slots = WORKING_SET_BYTES / bytes;
        (0..batch).map(move |piece| {
            let number = at * batch + piece;
            ((number % slots) * bytes, ((number + slots / 2) % slots) * bytes)
        })
    }

    pub(super) fn read(&mut self, bytes: usize, batch: usize, at: usize) -> Result<(), BenchError> {
        let mut pieces = Vec::with_capacity(batch);
        for (from, into) in Stand::places(bytes, batch, at) {
            pieces.push(Piece {
                local: self.target.subslice(into, bytes).map_err(failed)?.into(),
                remote: self.remote.slice(from as u64, bytes as u64).map_err(failed)?,
                direction: Direction::Read,
            });
        }
        let transfer = self
            .peer
            .submit(pieces, PATIENCE)
            .map_err(|refused| failed(refused.reason))?;
        transfer.wait().map_err(failed)
    }

    pub(super) fn read_raw(&mut self, bytes: usize, batch: usize, at: usize) -> Result<(), BenchError> {
        let mut wanted = Vec::with_capacity(batch);
        for (from, into) in Stand::places(bytes, batch, at) {
            wanted.push((from, self.target.subslice(into, bytes).map_err(failed)?));
        }
        match &mut self.raw {
            Raw::Memcpy => {
                for (from, target) in &wanted {
                    copy(&self.source.subslice(*from, bytes).map_err(failed)?, target);
                }
                Ok(())
            }
            Raw::Sockets(sockets) => {
                let wanted: Vec<_> = wanted.into_iter().map(|(from, target)| (from as u64, target)).collect();
                sockets.fetch(&wanted).map_err(BenchError::system("raw sockets"))
            }
            Raw::Reads(reads) => {
                let mut ranges = Vec::with_capacity(batch);
                for (from, target) in wanted {
                    ranges.push((self.remote.slice(from as u64, bytes as u64).map_err(failed)?, target));
                }
                reads.read(&ranges).map_err(BenchError::system("raw reads"))
            }
        }
    }

    /// One batch each way with the bytes compared.
    pub(super) fn check(&mut self, bytes: usize, batch: usize) -> Result<(), BenchError> {
        for raw in [false, true] {
            self.target.zero();
            if raw {
                self.read_raw(bytes, batch, 0)?;
            } else {
                self.read(bytes, batch, 0)?;
            }
            for (piece, (from, into)) in (0u64..).zip(Stand::places(bytes, batch, 0)) {
                let got = self.target.subslice(into, bytes).map_err(failed)?.to_vec();
                if got != self.source.subslice(from, bytes).map_err(failed)?.to_vec() {
                    return Err(BenchError::WrongBytes {
                        case: self.transport,
                        block: piece,
                    });
                }
            }
        }
        Ok(())
    }
}

fn fill(source: &MemorySlice) -> Result<(), BenchError> {
    const BLOCK: usize = 1 << 20;
    let mut block = vec![0; BLOCK];
    for at in 0..WORKING_SET_BYTES / BLOCK {
        crate::pattern::write(at as u64, &mut block);
        source
            .subslice(at * BLOCK, BLOCK)
            .map_err(failed)?
            .copy_from_slice(&block)
            .map_err(failed)?;
    }
    Ok(())
}

fn failed(error: impl std::fmt::Display) -> BenchError {
    BenchError::Client {
        what: "transfer",
        message: error.to_string(),
    }
}
