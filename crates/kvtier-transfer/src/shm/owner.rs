//! The side that owns regions: passes their files, remembers who mapped what, and asks for it back.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::receive_frame;
use super::wire::{FRAME_BYTES, Frame};
use crate::memory::MemoryRegion;
use crate::remote::{RegionId, RemoteAccess};
use crate::socket::{peer_credentials, send_all_with_fds};
use crate::transport::{Revoke, RevokeError};

/// How long a peer may take to let go of a mapping.
const PATIENCE: Duration = Duration::from_secs(2);
/// A peer that does not read for so long is cut off.
const SEND_TIMEOUT: Duration = Duration::from_millis(500);
/// Connections at a time.
const SESSIONS_MAX: usize = 256;

pub(super) struct Owner {
    state: Mutex<State>,
    released: Condvar,
    closed: AtomicBool,
}

#[derive(Default)]
struct State {
    regions: HashMap<RegionId, Shared>,
    sessions: HashMap<u64, Session>,
    next_session: u64,
}

struct Shared {
    region: Arc<MemoryRegion>,
    file: OwnedFd,
    access: RemoteAccess,
}

struct Session {
    stream: Arc<UnixStream>,
    /// What the peer has mapped, or is about to.
    holds: HashSet<RegionId>,
}

impl Owner {
    pub(super) fn start(listener: UnixListener) -> io::Result<Arc<Owner>> {
        let owner = Arc::new(Owner {
            state: Mutex::default(),
            released: Condvar::new(),
            closed: AtomicBool::new(false),
        });
        std::thread::Builder::new()
            .name("kvtier-shm-accept".to_owned())
            .spawn({
                let owner = Arc::clone(&owner);
                move || owner.accept(&listener)
            })?;
        Ok(owner)
    }

    pub(super) fn insert(&self, id: RegionId, region: Arc<MemoryRegion>, file: OwnedFd, access: RemoteAccess) {
        self.state.lock().regions.insert(id, Shared { region, file, access });
    }

    pub(super) fn revoker(self: &Arc<Self>, id: RegionId) -> Box<dyn Revoke> {
        Box::new(Revoker {
            owner: Arc::clone(self),
            id,
        })
    }

    /// Ends every connection and stops accepting.
    pub(super) fn close(&self, path: &Path) {
        self.closed.store(true, Ordering::Release);
        // Wakes the accepting thread; if nobody listens any more there is nothing to wake.
        let _ = UnixStream::connect(path);
        for session in self.state.lock().sessions.values() {
            let _ = session.stream.shutdown(std::net::Shutdown::Both);
        }
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming() {
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            // A connection that ended before it was accepted, or no descriptor left: the peer sees it closed.
            let Ok(stream) = stream else { continue };
            if self.admit(stream).is_err() {
                continue;
            }
        }
    }

    fn admit(self: &Arc<Self>, stream: UnixStream) -> io::Result<()> {
        if peer_credentials(&stream)?.uid != rustix::process::geteuid().as_raw() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        stream.set_write_timeout(Some(SEND_TIMEOUT))?;
        let stream = Arc::new(stream);
        let number = {
            let mut state = self.state.lock();
            if state.sessions.len() >= SESSIONS_MAX {
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            state.next_session += 1;
            let number = state.next_session;
            let session = Session {
                stream: Arc::clone(&stream),
                holds: HashSet::new(),
            };
            state.sessions.insert(number, session);
            number
        };
        let owner = Arc::clone(self);
        let serving = std::thread::Builder::new()
            .name("kvtier-shm-serve".to_owned())
            .spawn(move || {
                // Ends with the connection; why does not matter, the peer is gone for us.
                let _ = owner.serve(number, &stream);
                owner.forget(number);
            });
        if serving.is_err() {
            self.forget(number);
        }
        serving.map(drop)
    }

    fn serve(&self, number: u64, stream: &UnixStream) -> io::Result<()> {
        let mut bytes = [0; FRAME_BYTES];
        loop {
            match receive_frame(stream, &mut bytes)?.0 {
                Frame::Attach { id } => self.pass(number, stream, id)?,
                Frame::Released { id } => {
                    if let Some(session) = self.state.lock().sessions.get_mut(&number) {
                        session.holds.remove(&id);
                    }
                    self.released.notify_all();
                }
                Frame::Attached { .. } | Frame::Revoke { .. } => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
    }

    fn pass(&self, number: u64, stream: &UnixStream, id: RegionId) -> io::Result<()> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let Some(shared) = state.regions.get(&id) else {
            let none = Frame::Attached {
                id,
                access: RemoteAccess::Read,
                bytes: 0,
            };
            return send_all_with_fds(stream, &none.encode(), &[]);
        };
        if let Some(session) = state.sessions.get_mut(&number) {
            session.holds.insert(id);
        }
        let frame = Frame::Attached {
            id,
            access: shared.access,
            bytes: shared.region.bytes() as u64,
        };
        // Under the lock: a revocation that follows is also sent after it.
        send_all_with_fds(stream, &frame.encode(), &[shared.file.as_fd()])
    }

    fn forget(&self, number: u64) {
        self.state.lock().sessions.remove(&number);
        self.released.notify_all();
    }

    fn revoke(&self, id: RegionId) -> Result<(), RevokeError> {
        let until = Instant::now() + PATIENCE;
        let mut state = self.state.lock();
        // Kept mapped here while a peer may still write it.
        let Some(shared) = state.regions.remove(&id) else {
            return Ok(());
        };
        for session in state.sessions.values().filter(|session| session.holds.contains(&id)) {
            // One that cannot be told is one that does not answer.
            let _ = send_all_with_fds(&*session.stream, &Frame::Revoke { id }.encode(), &[]);
        }
        loop {
            let holders = state
                .sessions
                .values()
                .filter(|session| session.holds.contains(&id))
                .count();
            if holders == 0 {
                return Ok(());
            }
            if self.released.wait_until(&mut state, until).timed_out() {
                // Whoever holds it maps the file; ours may go, the memory stays with them.
                drop(shared);
                return Err(RevokeError(format!(
                    "{holders} processes have not let go of their mapping"
                )));
            }
        }
    }
}

struct Revoker {
    owner: Arc<Owner>,
    id: RegionId,
}

impl Revoke for Revoker {
    fn revoke(&mut self) -> Result<(), RevokeError> {
        self.owner.revoke(self.id)
    }
}
