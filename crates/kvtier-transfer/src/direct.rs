//! Bytes between peers and memory of a GPU: past the host's memory where NICs reach the device, through pinned memory of the host where
//! none does.
//!
//! Which it is, is found out by trying when a link is made. NICs that register the device's memory must also bring the right bytes
//! there and back, each a part of them, over a connection of this node to itself, before they are relied upon. Bytes that come past the host's memory are
//! checked by nobody here: whoever reads them into a device has to.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use crate::gpu::{Copy, DeviceRegion, DeviceSlice, DirectWrites, Gpu, GpuError, HostRegistration, Stream};
use crate::memory::{MemoryRegion, MemorySlice};
use crate::rdma::DirectWay;
use crate::remote::{RemoteAccess, RemoteSlice};
use crate::transfer::{Cause, Direction, PIECES_MAX, Piece, Refusal, Transfer, TransferError};
use crate::transport::{Peer, RegisterError, Registration, Transport, TransportKind};

/// What is staged at a time, and how many of these there are: one is filled by the network while others are copied.
const SLOT_BYTES: usize = 1 << 20;
const SLOTS: usize = 4;
/// What a trial moves: enough that every NIC has a part of it.
const TRIAL_BYTES: usize = 4 << 20;
/// How often it does, at most, until every NIC had one.
const TRIALS: usize = 4;
const TRIAL_PATIENCE: Duration = Duration::from_secs(5);

/// How bytes get between peers and the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectPath {
    /// NICs reach the device's memory.
    Direct(DirectWay),
    /// Through pinned memory of the host.
    Staged,
}

impl DirectPath {
    /// As it is written in metrics and settings.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DirectPath::Direct(DirectWay::DmaBuf) => "dma_buf",
            DirectPath::Direct(DirectWay::PeerMemory) => "peer_memory",
            DirectPath::Staged => "staged",
        }
    }
}

/// The way between one transport's peers and one device.
pub struct DeviceLink {
    gpu: Arc<Gpu>,
    transport: Arc<dyn Transport>,
    path: DirectPath,
    /// Why not a way that comes before it.
    refused: Vec<String>,
    stage: Mutex<Stage>,
}

impl fmt::Debug for DeviceLink {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("DeviceLink")
            .field("gpu", &self.gpu.name())
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for DeviceLink {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.path.name())?;
        match self.refused.is_empty() {
            true => Ok(()),
            false => write!(formatter, " ({})", self.refused.join("; ")),
        }
    }
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// What the driver says.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// No memory to stage in.
    #[error("no memory to stage in: {0}")]
    Memory(String),
    /// The NICs do not take that memory.
    #[error(transparent)]
    Register(#[from] RegisterError),
}

impl DeviceLink {
    /// Finds out how, by trying: DMA-BUF, then the GPU's peer memory module, then by way of the host, which always works. Some tens of
    /// milliseconds and 4 MiB of the device's memory with NICs, nothing with other transports.
    ///
    /// # Errors
    /// No memory to stage in, or a device that is lost.
    pub fn choose(gpu: &Arc<Gpu>, transport: Arc<dyn Transport>) -> Result<DeviceLink, LinkError> {
        let mut link = DeviceLink {
            stage: Mutex::new(Stage::new(gpu, &*transport)?),
            gpu: Arc::clone(gpu),
            transport,
            path: DirectPath::Staged,
            refused: Vec::new(),
        };
        if link.transport.kind() != TransportKind::Verbs {
            link.refused.push(format!("{} has no NICs", link.transport.kind()));
            return Ok(link);
        }
        if gpu.sees_direct_writes() == DirectWrites::Unordered {
            link.refused
                .push("the device does not say when it sees what a NIC wrote".to_owned());
            return Ok(link);
        }
        for way in [DirectWay::DmaBuf, DirectWay::PeerMemory] {
            match link.try_way(way) {
                Ok(()) => {
                    link.path = DirectPath::Direct(way);
                    break;
                }
                Err(words) => link
                    .refused
                    .push(format!("{}: {words}", DirectPath::Direct(way).name())),
            }
        }
        Ok(link)
    }

    /// What was chosen.
    #[must_use]
    pub fn path(&self) -> DirectPath {
        self.path
    }

    /// Makes memory of the device usable for [`DeviceLink::read`] and [`DeviceLink::write`], while the answer lives; peers may read, or
    /// write, it with that, where it is direct. `None`: bytes are staged, and nothing need be registered.
    ///
    /// # Errors
    /// What a NIC or the driver says.
    pub fn register(
        &self,
        region: &Arc<DeviceRegion>,
        access: RemoteAccess,
    ) -> Result<Option<Registration>, RegisterError> {
        match self.path {
            DirectPath::Direct(way) => self.transport.register_device(region, way, access).map(Some),
            DirectPath::Staged => Ok(None),
        }
    }

    /// Reads a peer's bytes into memory of the device, and waits until the device can see them. The two sides of each pair have one
    /// length. Work of the device's on the same memory must be over.
    ///
    /// # Errors
    /// As for any batch, the pair in the place of the piece: what lies in the targets is unspecified then, and nobody writes there any more.
    pub fn read(
        &self,
        peer: &dyn Peer,
        pairs: &[(DeviceSlice, RemoteSlice)],
        deadline: Duration,
    ) -> Result<(), TransferError> {
        let until = Instant::now() + deadline;
        check(pairs)?;
        match self.path {
            DirectPath::Direct(_) => {
                self.move_directly(peer, pairs, Direction::Read, deadline)?;
                match self.gpu.sees_direct_writes() {
                    DirectWrites::Seen => Ok(()),
                    _ => self.gpu.flush_direct_writes().map_err(|error| local(0, &error)),
                }
            }
            DirectPath::Staged => self.stage(until)?.read(peer, pairs, until),
        }
    }

    /// Writes memory of the device to a peer, and waits. Work of the device's that writes it must be over.
    ///
    /// # Errors
    /// As for any batch, the pair in the place of the piece.
    pub fn write(
        &self,
        peer: &dyn Peer,
        pairs: &[(DeviceSlice, RemoteSlice)],
        deadline: Duration,
    ) -> Result<(), TransferError> {
        let until = Instant::now() + deadline;
        check(pairs)?;
        match self.path {
            DirectPath::Direct(_) => self.move_directly(peer, pairs, Direction::Write, deadline),
            DirectPath::Staged => self.stage(until)?.write(peer, pairs, until),
        }
    }

    /// One call at a time stages.
    fn stage(&self, until: Instant) -> Result<MutexGuard<'_, Stage>, TransferError> {
        self.stage.try_lock_until(until).ok_or(TransferError {
            piece: 0,
            cause: Cause::Deadline,
        })
    }

    fn move_directly(
        &self,
        peer: &dyn Peer,
        pairs: &[(DeviceSlice, RemoteSlice)],
        direction: Direction,
        deadline: Duration,
    ) -> Result<(), TransferError> {
        let piece = |(local, remote): &(DeviceSlice, RemoteSlice)| Piece {
            local: local.clone().into(),
            remote: remote.clone(),
            direction,
        };
        submit(peer, pairs.iter().map(piece).collect(), deadline)?.wait()
    }

    /// Bytes from host memory into the device's by NICs, back by the GPU; and by NICs once more.
    fn try_way(&self, way: DirectWay) -> Result<(), String> {
        let words = |error: &dyn fmt::Display| error.to_string();
        let device = self.gpu.allocate(TRIAL_BYTES).map_err(|error| words(&error))?;
        let registered = self.transport.register_device(&device, way, RemoteAccess::Read);
        let _registered = registered.map_err(|error| words(&error))?;
        let host = MemoryRegion::anonymous(2 * TRIAL_BYTES).map_err(|error| words(&error))?;
        let told = self.transport.register(&host, None, RemoteAccess::ReadWrite);
        let told = told.map_err(|error| words(&error))?;
        let peer = self.transport.connect(&self.transport.address(), TRIAL_PATIENCE);
        let peer = peer.map_err(|error| words(&error))?;
        let sent: Vec<u8> = (0..TRIAL_BYTES).map(|at| (at * 13 % 251) as u8).collect();
        let half = |at: usize| host.slice(at * TRIAL_BYTES, TRIAL_BYTES).expect("half of it");
        half(0).copy_from_slice(&sent).map_err(|error| words(&error))?;
        let there = device.slice(0, TRIAL_BYTES).expect("all of it");
        let remote = |at: u64| {
            let region = Arc::new(told.remote().clone());
            region.slice(at * TRIAL_BYTES as u64, TRIAL_BYTES as u64)
        };
        let move_piece = |at: u64, direction| {
            let piece = Piece {
                local: there.clone().into(),
                remote: remote(at).map_err(|error| words(&error))?,
                direction,
            };
            let moved = submit(&*peer, vec![piece], TRIAL_PATIENCE).and_then(Transfer::wait);
            moved.map_err(|error| words(&error))
        };
        let stage = self.stage.lock();
        for _ in 0..TRIALS {
            stage.zero(&there).map_err(|error| words(&error))?;
            half(1).zero();
            move_piece(0, Direction::Read)?;
            self.gpu.flush_direct_writes().map_err(|error| words(&error))?;
            let came = stage.look(&there).map_err(|error| words(&error))?;
            move_piece(1, Direction::Write)?;
            if came != sent || half(1).to_vec() != sent {
                return Err("other bytes arrived".to_owned());
            }
            let rails = peer.rails();
            if let Some(rail) = rails.iter().find(|rail| rail.errors > 0 || !rail.usable) {
                return Err(format!("{} failed", rail.name));
            }
            if rails.iter().all(|rail| rail.bytes > 0) {
                return Ok(());
            }
        }
        Err("a NIC had no part in it".to_owned())
    }
}

/// Pinned memory between the network and the device. One call at a time has it.
struct Stage {
    stream: Stream,
    slots: Vec<MemorySlice>,
    _pinned: Option<HostRegistration>,
    /// NICs move only what they know.
    _registered: Option<Registration>,
}

/// A part of a pair that fits a slot.
struct Part {
    pair: usize,
    device: DeviceSlice,
    remote: RemoteSlice,
}

impl Stage {
    fn new(gpu: &Arc<Gpu>, transport: &dyn Transport) -> Result<Stage, LinkError> {
        let region = MemoryRegion::anonymous(SLOTS * SLOT_BYTES);
        let region = region.map_err(|error| LinkError::Memory(error.to_string()))?;
        let registered = match transport.kind() {
            TransportKind::Verbs => Some(transport.register(&region, None, RemoteAccess::Read)?),
            _ => None,
        };
        let slot = |at: usize| region.slice(at * SLOT_BYTES, SLOT_BYTES).expect("within it");
        Ok(Stage {
            stream: gpu.stream()?,
            slots: (0..SLOTS).map(slot).collect(),
            // Without it the driver copies through buffers of its own.
            _pinned: gpu.register(&region).ok(),
            _registered: registered,
        })
    }

    fn read(
        &mut self,
        peer: &dyn Peer,
        pairs: &[(DeviceSlice, RemoteSlice)],
        until: Instant,
    ) -> Result<(), TransferError> {
        self.run(pairs, |slot, part, stream| {
            let piece = piece(slot, part, Direction::Read);
            let came = submit(peer, vec![piece], left(until));
            let copy = Copy {
                source: slot.clone().into(),
                target: part.device.clone().into(),
            };
            (came, Then::Copy(copy, stream))
        })
    }

    fn write(
        &mut self,
        peer: &dyn Peer,
        pairs: &[(DeviceSlice, RemoteSlice)],
        until: Instant,
    ) -> Result<(), TransferError> {
        self.run(pairs, |slot, part, stream| {
            let copy = Copy {
                source: part.device.clone().into(),
                target: slot.clone().into(),
            };
            let came = begin_copy(stream, copy);
            (came, Then::Send(piece(slot, part, Direction::Write), peer, until))
        })
    }

    /// Moves every part in two steps, several at a time, each in a slot of its own. Whatever happens, all is at rest in the end.
    fn run<'a>(
        &'a self,
        pairs: &[(DeviceSlice, RemoteSlice)],
        begin: impl Fn(&MemorySlice, &Part, &'a Stream) -> (Result<Transfer, TransferError>, Then<'a>),
    ) -> Result<(), TransferError> {
        let mut result = Ok(());
        let mut note = |pair: usize, done: Result<(), TransferError>| {
            if let (Err(error), true) = (done, result.is_ok()) {
                result = Err(TransferError { piece: pair, ..error });
                return false;
            }
            true
        };
        let mut first: VecDeque<(usize, usize, Transfer, Then<'a>)> = VecDeque::new();
        let mut second: VecDeque<(usize, usize, Transfer)> = VecDeque::new();
        let mut free: Vec<usize> = (0..self.slots.len()).collect();
        let mut parts = parts(pairs)?.into_iter();
        let mut goes_on = true;
        loop {
            // As much under way as there are slots.
            while goes_on && !free.is_empty() {
                let Some(part) = parts.next() else { break };
                let at = free.pop().expect("one is free");
                let slot = self.slots[at]
                    .subslice(0, part.device.len())
                    .expect("parts are no longer than slots");
                match begin(&slot, &part, &self.stream) {
                    (Ok(begun), then) => first.push_back((at, part.pair, begun, then)),
                    (Err(error), _) => goes_on = note(part.pair, Err(error)) && goes_on,
                }
            }
            if let Some((at, pair, begun, then)) = first.pop_front() {
                match begun.wait() {
                    Ok(()) if goes_on => match then.begin() {
                        Ok(begun) => second.push_back((at, pair, begun)),
                        Err(error) => goes_on = note(pair, Err(error)) && goes_on,
                    },
                    waited => goes_on = note(pair, waited) && goes_on,
                }
            } else if let Some((at, pair, begun)) = second.pop_front() {
                goes_on = note(pair, begun.wait()) && goes_on;
                free.push(at);
            } else {
                return result;
            }
        }
    }

    fn zero(&self, there: &DeviceSlice) -> Result<(), TransferError> {
        self.stream.zero(there).map_err(|error| local(0, &error))?.wait()
    }

    /// What lies there.
    fn look(&self, there: &DeviceSlice) -> Result<Vec<u8>, TransferError> {
        let slot = &self.slots[0];
        let mut bytes = Vec::with_capacity(there.len());
        for offset in (0..there.len()).step_by(slot.len()) {
            let length = slot.len().min(there.len() - offset);
            let target = slot.subslice(0, length).expect("within the slot");
            let copy = Copy {
                source: there.subslice(offset, length).expect("within it").into(),
                target: target.clone().into(),
            };
            begin_copy(&self.stream, copy)?.wait()?;
            bytes.extend(target.to_vec());
        }
        Ok(bytes)
    }
}

/// The second step of a part.
enum Then<'a> {
    Copy(Copy, &'a Stream),
    Send(Piece, &'a dyn Peer, Instant),
}

impl Then<'_> {
    fn begin(self) -> Result<Transfer, TransferError> {
        match self {
            Then::Copy(copy, stream) => begin_copy(stream, copy),
            Then::Send(piece, peer, until) => submit(peer, vec![piece], left(until)),
        }
    }
}

/// What either way refuses alike.
fn check(pairs: &[(DeviceSlice, RemoteSlice)]) -> Result<(), TransferError> {
    if pairs.is_empty() {
        return Err(local(0, &"an empty batch"));
    }
    if pairs.len() > PIECES_MAX {
        return Err(local(PIECES_MAX, &"more pairs than a batch can have"));
    }
    for (pair, (device, remote)) in pairs.iter().enumerate() {
        if device.len() as u64 != remote.len() {
            return Err(local(pair, &"the two sides differ in length"));
        }
        if device.is_empty() {
            return Err(local(pair, &"an empty pair"));
        }
    }
    Ok(())
}

fn parts(pairs: &[(DeviceSlice, RemoteSlice)]) -> Result<Vec<Part>, TransferError> {
    let mut parts = Vec::new();
    for (pair, (device, remote)) in pairs.iter().enumerate() {
        for offset in (0..device.len()).step_by(SLOT_BYTES) {
            let length = SLOT_BYTES.min(device.len() - offset);
            let device = device.subslice(offset, length).expect("within it");
            let remote = remote.region().slice(remote.offset() + offset as u64, length as u64);
            let remote = remote.map_err(|error| local(pair, &error))?;
            parts.push(Part { pair, device, remote });
        }
    }
    Ok(parts)
}

fn piece(slot: &MemorySlice, part: &Part, direction: Direction) -> Piece {
    Piece {
        local: slot.clone().into(),
        remote: part.remote.clone(),
        direction,
    }
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

fn submit(peer: &dyn Peer, pieces: Vec<Piece>, deadline: Duration) -> Result<Transfer, TransferError> {
    peer.submit(pieces, deadline).map_err(|refused| {
        let piece = match refused.reason {
            Refusal::Invalid { piece, .. } => piece,
            _ => 0,
        };
        local(piece, &refused.reason)
    })
}

fn begin_copy(stream: &Stream, copy: Copy) -> Result<Transfer, TransferError> {
    stream.submit(vec![copy]).map_err(|refused| local(0, &refused.reason))
}

fn local(piece: usize, error: &dyn fmt::Display) -> TransferError {
    TransferError {
        piece,
        cause: Cause::Local(error.to_string()),
    }
}
