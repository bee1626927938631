//! The Unix socket: binding it, taking connections up to the bound, and ending them all.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use kvtier_core::ClientId;
use kvtier_transfer::socket;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use super::domains::Domains;
use super::driver::Driver;
use super::session::Session;
use super::{StartError, spawn};
use crate::settings::CheckedSettings;

/// Connections that may wait to be taken.
const BACKLOG: i32 = 128;
/// How often connections are checked for a process that died and left its socket to a child.
const WATCH_INTERVAL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// A socket that is bound, with where it lies.
pub(crate) struct BoundSocket {
    listener: UnixListener,
    path: PathBuf,
}

/// The accepting thread and the connections it made.
pub(crate) struct Listener {
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
    path: PathBuf,
}

/// What connections know of the listener.
pub(crate) struct Shared {
    pub(crate) driver: Arc<Driver>,
    pub(crate) domains: Arc<Domains>,
    pub(crate) settings: CheckedSettings,
    /// Readable once everything must end; never read, so that all who wait see it.
    pub(crate) stop: OwnedFd,
    refusing: AtomicBool,
    next_client: AtomicU64,
    connections: Mutex<HashMap<ClientId, Connection>>,
}

/// An open connection, or one whose client left while its process still maps our memory.
struct Connection {
    stream: Arc<UnixStream>,
    process: Arc<OwnedFd>,
    uid: u32,
    thread: JoinHandle<()>,
}

impl Listener {
    /// Binds `path` with these permission bits. A socket that nobody answers on is replaced.
    pub(crate) fn bind(path: &Path, mode: u32) -> Result<BoundSocket, StartError> {
        let refused = |source| StartError::Socket {
            path: path.to_path_buf(),
            source,
        };
        if let Ok(metadata) = std::fs::symlink_metadata(path) {
            if !metadata.file_type().is_socket() {
                return Err(refused(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    "something that is no socket is there",
                )));
            }
            if UnixStream::connect(path).is_ok() {
                return Err(StartError::SocketInUse {
                    path: path.to_path_buf(),
                });
            }
            std::fs::remove_file(path).map_err(refused)?;
        }
        let listener = bind_private(path).map_err(|error| refused(error.into()))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        Ok(BoundSocket {
            listener,
            path: path.to_path_buf(),
        })
    }

    pub(crate) fn start(
        socket: BoundSocket,
        settings: &CheckedSettings,
        driver: Arc<Driver>,
        domains: Arc<Domains>,
    ) -> Result<Listener, StartError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| StartError::Resources(error.into()))?;
        let shared = Arc::new(Shared {
            driver,
            domains,
            settings: settings.clone(),
            stop,
            refusing: AtomicBool::new(false),
            next_client: AtomicU64::new(1),
            connections: Mutex::new(HashMap::new()),
        });
        let accepting = Arc::clone(&shared);
        let listener = socket.listener;
        let accepting = spawn("kvtier-accept", move || accept(&accepting, &listener))?;
        Ok(Listener {
            shared,
            accepting: Some(accepting),
            path: socket.path,
        })
    }

    /// Connections made from now on are closed at once.
    pub(crate) fn refuse_new(&self) {
        self.shared.refusing.store(true, Ordering::Release);
    }

    /// Ends the accepting thread and every connection, and removes the socket.
    pub(crate) fn stop(mut self) {
        // Gone first, so that a client that reconnects does not reach a daemon that is on its way out.
        let _ = std::fs::remove_file(&self.path);
        let _ = rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes());
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let connections = std::mem::take(&mut *self.shared.connections.lock());
        for connection in connections.values() {
            // Wakes a thread that reads; one that waits for a process sees `stop`.
            let _ = connection.stream.shutdown(std::net::Shutdown::Both);
        }
        for connection in connections.into_values() {
            let _ = connection.thread.join();
        }
    }
}

/// A listening socket that only its owner can reach until its permissions are widened. The mode of the socket itself
/// bounds that of the path it is bound to (unix(7)); the umask, which is the whole process's, stays as it is.
fn bind_private(path: &Path) -> rustix::io::Result<UnixListener> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    loop {
        let mut descriptors = [
            PollFd::new(&shared.stop, PollFlags::IN),
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
        ];
        // A child that inherited the socket keeps it open after its parent died: look at the processes, too.
        let pause = if shared.connections.lock().is_empty() {
            None
        } else {
            Some(&WATCH_INTERVAL)
        };
        match poll(&mut descriptors, pause) {
            Ok(0) => shared.close_orphans(),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "no connection can be taken any more");
                return;
            }
        }
        if !descriptors[0].revents().is_empty() {
            return;
        }
        match listener.accept() {
            Ok((stream, _)) => welcome(shared, stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                // Out of descriptors: taking turns with those who will close theirs beats spinning.
                tracing::warn!(%error, "a connection could not be taken");
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
        }
    }
}

impl Shared {
    /// Closes connections whose process is gone though something still holds their other end.
    fn close_orphans(&self) {
        for connection in self.connections.lock().values() {
            if socket::process_is_gone(&connection.process) {
                let _ = connection.stream.shutdown(std::net::Shutdown::Both);
            }
        }
    }

    /// Why one more connection of this user is one too many.
    fn refusal(&self, uid: u32, connections: &HashMap<ClientId, Connection>) -> Option<&'static str> {
        let clients_max = self.settings.clients_max as usize;
        let same_user = connections.values().filter(|connection| connection.uid == uid).count();
        if self.refusing.load(Ordering::Acquire) {
            Some("the daemon drains")
        } else if connections.len() >= clients_max {
            Some("clients_max connections are open")
        } else if same_user >= clients_max.div_ceil(4) * 3 {
            Some("three quarters of clients_max are this user's")
        } else {
            None
        }
    }
}

fn welcome(shared: &Arc<Shared>, stream: UnixStream) {
    let identified = socket::peer_credentials(&stream).and_then(|peer| Ok((peer.uid, socket::peer_pidfd(&stream)?)));
    let (uid, process) = match identified {
        Ok((uid, process)) => (uid, Arc::new(process)),
        Err(error) => {
            // Without a handle on the process nobody could say when it stops using what it maps.
            tracing::warn!(%error, "a connection was refused: its process cannot be watched (is it in a foreign pid namespace?)");
            return;
        }
    };
    let mut connections = shared.connections.lock();
    if let Some(why) = shared.refusal(uid, &connections) {
        tracing::warn!(uid, "a connection was refused: {why}");
        return;
    }
    let client = ClientId(shared.next_client.fetch_add(1, Ordering::Relaxed));
    let stream = Arc::new(stream);
    let session = Session::new(
        Arc::clone(shared),
        client,
        Arc::clone(&stream),
        Arc::clone(&process),
        uid,
    );
    let mine = Arc::clone(shared);
    let spawned = session.and_then(|session| {
        std::thread::Builder::new()
            .name(format!("kvtier-client-{}", client.0))
            .spawn(move || {
                session.run();
                // Dropping one's own handle detaches a thread that is about to end.
                drop(mine.connections.lock().remove(&client));
            })
    });
    match spawned {
        Ok(thread) => {
            connections.insert(
                client,
                Connection {
                    stream,
                    process,
                    uid,
                    thread,
                },
            );
        }
        Err(error) => {
            tracing::warn!(%error, "no thread for a connection: raise the limits of processes and open files")
        }
    }
}
