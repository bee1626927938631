//! Between processes of one node: the owner passes its memory file, the peer maps it and copies.
//!
//! A mapping cannot be taken away from a process, so a revocation asks for it and waits: a peer that does not let go in
//! time is named, and the memory is not to be reused. Peers of this transport therefore trust each other, and must be of
//! the same user. A peer that is stopped still serves: its memory is there.

mod owner;
mod wire;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::copier::{Copier, Patience, Resolve};
use crate::loopback::{Counters, submit_copies};
use crate::memory::{Access, MemoryRegion, MemorySlice};
use crate::registry::{Denied, Registry};
use crate::remote::{RegionId, RemoteAccess, RemoteRegion};
use crate::socket::{peer_credentials, receive_with_fds, send_all_with_fds};
use crate::transfer::{Cause, Piece, Refused, Transfer};
use crate::transport::{
    ConnectError, Peer, PeerAddress, RailReport, RegisterError, Registration, Transport, TransportKind,
};
use owner::Owner;
use wire::{FRAME_BYTES, Frame};

/// Moves bytes between processes of one node and one user.
pub struct Shm {
    path: PathBuf,
    owner: Arc<Owner>,
    copier: Arc<Copier>,
}

impl Shm {
    /// Serves its regions at a Unix socket, which only this user may open. A socket file that is there is replaced.
    ///
    /// # Errors
    /// When the socket cannot be made or no thread can be started.
    pub fn start(path: &Path) -> io::Result<Shm> {
        if path.exists() {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        let owner = Owner::start(listener)?;
        Ok(Shm {
            path: path.to_owned(),
            owner,
            copier: Arc::new(Copier::start("kvtier-shm-copy")?),
        })
    }
}

impl Drop for Shm {
    fn drop(&mut self) {
        self.owner.close(&self.path);
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Transport for Shm {
    fn kind(&self) -> TransportKind {
        TransportKind::Shm
    }

    fn address(&self) -> PeerAddress {
        PeerAddress::Shm(self.path.clone())
    }

    fn register(
        &self,
        region: &Arc<MemoryRegion>,
        file: Option<BorrowedFd<'_>>,
        access: RemoteAccess,
    ) -> Result<Registration, RegisterError> {
        if access == RemoteAccess::ReadWrite && region.access() == Access::ReadOnly {
            return Err(RegisterError::ReadOnly);
        }
        let file = file.ok_or(RegisterError::NoFile)?;
        let file = file_for(file, access).map_err(|error| RegisterError::File(error.to_string()))?;
        let id = RegionId::draw();
        self.owner.insert(id, Arc::clone(region), file, access);
        let remote = RemoteRegion {
            id,
            address: 0,
            bytes: region.bytes() as u64,
            access,
            remote_keys: Vec::new(),
        };
        Ok(Registration::new(remote, self.owner.revoker(id)))
    }

    fn connect(&self, address: &PeerAddress, _patience: Duration) -> Result<Box<dyn Peer>, ConnectError> {
        let PeerAddress::Shm(path) = address else {
            return Err(ConnectError::WrongKind {
                transport: TransportKind::Shm,
                address: format!("{address:?}"),
            });
        };
        let words = path.display().to_string();
        let unreachable = |error: io::Error| ConnectError::Unreachable {
            address: words.clone(),
            what: error.to_string(),
        };
        let stream = UnixStream::connect(path).map_err(unreachable)?;
        let uid = peer_credentials(&stream).map_err(unreachable)?.uid;
        if uid != rustix::process::geteuid().as_raw() {
            return Err(ConnectError::Denied {
                address: words,
                what: format!("it belongs to user {uid}"),
            });
        }
        let shared = Mapped::start(stream).map_err(unreachable)?;
        Ok(Box::new(ShmPeer {
            name: words,
            mapped: shared,
            copier: Arc::clone(&self.copier),
            counters: Arc::default(),
        }))
    }
}

/// A descriptor that allows no more than `access`.
fn file_for(file: BorrowedFd<'_>, access: RemoteAccess) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    if access == RemoteAccess::ReadWrite {
        return file.try_clone_to_owned();
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(std::fs::File::open(path)?.into())
}

struct ShmPeer {
    name: String,
    mapped: Arc<Mapped>,
    copier: Arc<Copier>,
    counters: Arc<Counters>,
}

impl Peer for ShmPeer {
    fn submit(&self, pieces: Vec<Piece>, deadline: Duration) -> Result<Transfer, Refused> {
        submit_copies(
            pieces,
            deadline,
            &self.counters,
            &self.copier,
            Arc::clone(&self.mapped) as _,
        )
    }

    fn rails(&self) -> Vec<RailReport> {
        vec![RailReport {
            name: self.name.clone(),
            usable: !self.mapped.gone.load(Ordering::Acquire),
            bytes: self.counters.bytes.load(Ordering::Relaxed),
            bytes_per_second: 0.0,
            errors: 0,
            reconnects: 0,
        }]
    }
}

/// What this process has mapped of one peer.
struct Mapped {
    regions: Registry,
    /// One question at a time.
    asking: Mutex<()>,
    answer: Mutex<Option<(RegionId, Result<(), Cause>)>>,
    answered: Condvar,
    gone: AtomicBool,
    stream: UnixStream,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // The last copy has ended. Unmap before the owner learns that we are gone.
        self.regions = Registry::default();
        // Ends the thread that listens.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

impl Mapped {
    fn start(stream: UnixStream) -> io::Result<Arc<Mapped>> {
        let listening = stream.try_clone()?;
        let mapped = Arc::new(Mapped {
            regions: Registry::default(),
            asking: Mutex::new(()),
            answer: Mutex::new(None),
            answered: Condvar::new(),
            gone: AtomicBool::new(false),
            stream,
        });
        let weak = Arc::downgrade(&mapped);
        std::thread::Builder::new()
            .name("kvtier-shm-peer".to_owned())
            .spawn(move || listen(&listening, &weak))?;
        Ok(mapped)
    }

    /// Asks for a region's file and maps it.
    fn attach(&self, id: RegionId, deadline: Instant) -> Result<(), Cause> {
        let _turn = self.asking.try_lock_until(deadline).ok_or(Cause::Deadline)?;
        if self.gone.load(Ordering::Acquire) {
            return Err(gone());
        }
        *self.answer.lock() = None;
        send_all_with_fds(&self.stream, &Frame::attach(id).encode(), &[])
            .map_err(|error| Cause::PeerGone(error.to_string()))?;
        let mut answer = self.answer.lock();
        loop {
            match answer.take() {
                Some((answered, result)) if answered == id => return result,
                // An answer to a question that was given up at its deadline.
                _ if self.gone.load(Ordering::Acquire) => return Err(gone()),
                _ => {}
            }
            if self.answered.wait_until(&mut answer, deadline).timed_out() {
                return Err(Cause::Deadline);
            }
        }
    }

    fn take(&self, frame: Frame, file: Option<OwnedFd>) -> io::Result<()> {
        match frame {
            Frame::Attached { id, access, bytes } => {
                let result = match (bytes, file) {
                    (0, _) => Err(Cause::Denied(Denied::Unknown.words().to_owned())),
                    (_, None) => Err(Cause::PeerGone("an answer without a descriptor".to_owned())),
                    (bytes, Some(file)) => self.map(id, access, bytes, file),
                };
                *self.answer.lock() = Some((id, result));
                self.answered.notify_all();
            }
            Frame::Revoke { id } => {
                if self.regions.revoke(id).is_ok() {
                    send_all_with_fds(&self.stream, &Frame::Released { id }.encode(), &[])?;
                }
            }
            Frame::Attach { .. } | Frame::Released { .. } => return Err(io::ErrorKind::InvalidData.into()),
        }
        Ok(())
    }

    fn map(&self, id: RegionId, access: RemoteAccess, bytes: u64, file: OwnedFd) -> Result<(), Cause> {
        let local = match access {
            RemoteAccess::Read => Access::ReadOnly,
            RemoteAccess::ReadWrite => Access::ReadWrite,
        };
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let region = MemoryRegion::attach(file, bytes, local, true).map_err(|error| Cause::Local(error.to_string()))?;
        self.regions.insert_as(id, &region, access);
        Ok(())
    }
}

fn gone() -> Cause {
    Cause::PeerGone("its process has ended or closed the connection".to_owned())
}

/// Takes what the owner says until it or the last user of the mappings is gone.
fn listen(stream: &UnixStream, mapped: &Weak<Mapped>) {
    let mut bytes = [0; FRAME_BYTES];
    loop {
        let received = receive_frame(stream, &mut bytes);
        let Some(mapped) = mapped.upgrade() else { return };
        let taken = received.and_then(|(frame, file)| mapped.take(frame, file));
        if taken.is_err() {
            mapped.gone.store(true, Ordering::Release);
            let _answer = mapped.answer.lock();
            mapped.answered.notify_all();
            return;
        }
    }
}

/// One frame and the descriptor that came with it.
fn receive_frame(stream: &UnixStream, bytes: &mut [u8; FRAME_BYTES]) -> io::Result<(Frame, Option<OwnedFd>)> {
    let (mut filled, mut files) = (0, Vec::new());
    while filled < FRAME_BYTES {
        let count = receive_with_fds(stream, &mut bytes[filled..], &mut files)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        filled += count;
    }
    let frame = Frame::decode(bytes).ok_or(io::ErrorKind::InvalidData)?;
    Ok((frame, files.pop()))
}

impl Resolve for Mapped {
    fn with(
        &self,
        piece: &Piece,
        patience: Patience,
        copy: &mut dyn FnMut(&MemorySlice) -> Result<(), Cause>,
    ) -> Option<Result<(), Cause>> {
        let (remote, direction) = (&piece.remote, piece.direction);
        let id = remote.region().id;
        if self.gone.load(Ordering::Acquire) {
            return Some(Err(gone()));
        }
        let begin = || self.regions.begin(id, remote.offset(), remote.len(), direction, None);
        let range = match (begin(), patience) {
            (Err(Denied::Unknown), Patience::None) => return None,
            (Err(Denied::Unknown), Patience::Until(deadline)) => {
                if let Err(cause) = self.attach(id, deadline) {
                    return Some(Err(cause));
                }
                begin()
            }
            (known, _) => known,
        };
        Some(match range {
            Ok(range) => copy(&range.slice),
            Err(denied) => Err(Cause::Denied(denied.words().to_owned())),
        })
    }
}
