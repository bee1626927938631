//! Unix sockets that carry file descriptors, and who is at the other end.
#![expect(
    unsafe_code,
    reason = "rustix has no SO_PEERPIDFD, its peer credentials cannot express a peer of another pid namespace, and regions are sent and received by pointer"
)]

mod stream;
mod zerocopy;

pub use stream::{PARTS_MAX, Part, WhenFull, receive_exactly, send_parts};
pub(crate) use zerocopy::ZeroCopy;

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Most descriptors in one message.
pub const FDS_MAX: usize = 32;

/// Who is at the other end of a Unix socket, as the kernel saw it when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process id; `None` when the peer lives in a pid namespace that this process cannot see.
    pub pid: Option<u32>,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Sends `bytes` with `fds`, in one message. Returns how many bytes went; the descriptors went with the first of them,
/// so a caller that must send the rest sends it without.
///
/// On a non-blocking socket it fails with `WouldBlock`; then nothing was sent. A peer that is gone is an error, not a
/// signal.
///
/// # Errors
/// `InvalidInput` with more than [`FDS_MAX`] descriptors, or descriptors without a byte to carry them.
pub fn send_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > FDS_MAX || (bytes.is_empty() && !fds.is_empty()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    loop {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            let fits = control.push(SendAncillaryMessage::ScmRights(fds));
            assert!(fits, "the buffer has room for {FDS_MAX} descriptors");
        }
        match sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(count) => return Ok(count),
        }
    }
}

/// Sends all of `bytes`, `fds` with the first part. Waits when the socket is full, non-blocking ones too.
///
/// # Errors
/// `TimedOut` when a blocking socket's send timeout passes; otherwise what the system says.
pub fn send_all_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut rest = bytes;
    let mut fds = fds;
    loop {
        match send_with_fds(&socket, rest, fds) {
            Ok(count) => {
                rest = &rest[count..];
                fds = &[];
                if rest.is_empty() {
                    return Ok(());
                }
                if count == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // A blocking socket says so only when its own send timeout has passed: the peer does not read.
                if !rustix::fs::fcntl_getfl(&socket)?.contains(rustix::fs::OFlags::NONBLOCK) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                let mut polled = [PollFd::new(&socket, PollFlags::OUT)];
                match rustix::event::poll(&mut polled, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// Receives up to `bytes.len()` bytes, and appends the descriptors that came with them to `fds` (closed on exec). 0
/// bytes: the peer has closed.
///
/// # Errors `InvalidData` when the message carried more than [`FDS_MAX`] descriptors or anything else that had to be
/// cut off; what did arrive is closed.
pub fn receive_with_fds(socket: impl AsFd, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    loop {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = match recvmsg(
            &socket,
            &mut [IoSliceMut::new(bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(received) => received,
        };
        if received.flags.contains(ReturnFlags::CTRUNC) {
            // Dropping the buffer closes every descriptor that did fit.
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a message with more descriptors than agreed",
            ));
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        return Ok(received.bytes);
    }
}

/// Who is at the other end.
pub fn peer_credentials(socket: impl AsFd) -> io::Result<PeerCredentials> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>()).expect("12 bytes");
    // SAFETY: the kernel writes at most `length` bytes, which is the size of `credentials`.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    let pid = u32::try_from(credentials.pid).ok().filter(|pid| *pid != 0);
    Ok(PeerCredentials {
        pid,
        uid: credentials.uid,
        gid: credentials.gid,
    })
}

/// A descriptor of the process that connected, which says when that process is gone and cannot be fooled by a reused
/// pid.
///
/// From the socket itself on Linux 6.5 and later; before that by the pid, and only as long as the connection is open
/// after it was looked up, which means that the pid still belonged to the peer.
pub fn peer_pidfd(socket: impl AsFd) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut pidfd: libc::c_int = -1;
    let mut length = libc::socklen_t::try_from(size_of::<libc::c_int>()).expect("4 bytes");
    // SAFETY: the kernel writes at most `length` bytes, which is the size of `pidfd`.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut pidfd).cast(),
            &raw mut length,
        )
    };
    if answer == 0 && pidfd >= 0 {
        // SAFETY: the kernel just made this descriptor for us and nobody else knows its number.
        return Ok(unsafe { OwnedFd::from_raw_fd(pidfd) });
    }
    peer_pidfd_by_pid(socket.as_fd())
}

fn peer_pidfd_by_pid(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let pid = peer_credentials(socket)?.pid.ok_or(io::ErrorKind::NotFound)?;
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::NotFound)?;
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let mut polled = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
    rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    if polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) || process_is_gone(&pidfd) {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(pidfd)
}

/// Whether the process of a pidfd has ended. A zombie has.
#[must_use]
pub fn process_is_gone(pidfd: impl AsFd) -> bool {
    let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
    // An error means that the descriptor is none: report life, the side that keeps memory.
    rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
        .is_ok_and(|ready| ready == 1 && polled[0].revents().contains(PollFlags::IN))
}

#[cfg(test)]
mod tests;
