//! Bytes between a stream socket and memory regions, without a buffer in between.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::memory::MemorySlice;

/// Most parts that one system call takes here.
pub const PARTS_MAX: usize = 64;

/// Something to send.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// Bytes of ours.
    Bytes(&'a [u8]),
    /// Bytes of a region, as they are when the kernel takes them.
    Memory(&'a MemorySlice),
}

impl Part<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Part::Bytes(bytes) => bytes.len(),
            Part::Memory(slice) => slice.len(),
        }
    }

    /// The `iovec` of all but the first `skipped` bytes.
    fn vector(&self, skipped: usize) -> libc::iovec {
        let base = match self {
            Part::Bytes(bytes) => bytes.as_ptr(),
            Part::Memory(slice) => slice.as_ptr(),
        };
        libc::iovec {
            iov_base: base.wrapping_add(skipped).cast_mut().cast(),
            iov_len: self.len() - skipped,
        }
    }
}

/// How to meet a full socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// Wait for room.
    Wait,
    /// Return what has been sent so far.
    Return,
}

/// Sends the parts one after the other, from byte `skipped` of them all on. Returns the number of bytes behind the
/// beginning of the first part that have been sent: all of them, unless the socket is full and `when_full` says to return.
///
/// # Errors
/// What the system says; a peer that is gone is an error, not a signal.
pub fn send_parts(socket: impl AsFd, parts: &[Part<'_>], skipped: usize, when_full: WhenFull) -> io::Result<usize> {
    let mut flags = libc::MSG_NOSIGNAL;
    if when_full == WhenFull::Return {
        flags |= libc::MSG_DONTWAIT;
    }
    let total: usize = parts.iter().map(Part::len).sum();
    let mut sent = skipped;
    let mut vectors = Vec::with_capacity(parts.len().min(PARTS_MAX));
    while sent < total {
        fill(&mut vectors, parts, sent);
        match send_vectors(&socket, &mut vectors, flags) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && when_full == WhenFull::Return => {
                return Ok(sent);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(sent)
}

/// Sends all parts with `flags`, and tells of each call whether it took anything so. False where the kernel may lock no more
/// pages for `MSG_ZEROCOPY`: from there on the rest was sent without.
pub(super) fn send_parts_flagged(
    socket: impl AsFd,
    parts: &[Part<'_>],
    flags: libc::c_int,
    tell: &mut dyn FnMut(bool),
) -> io::Result<bool> {
    let total: usize = parts.iter().map(Part::len).sum();
    let (mut sent, mut flags, mut has_room) = (0, flags, true);
    let mut vectors = Vec::with_capacity(parts.len().min(PARTS_MAX));
    while sent < total {
        fill(&mut vectors, parts, sent);
        match send_vectors(&socket, &mut vectors, libc::MSG_NOSIGNAL | flags) {
            Ok(count) => {
                tell(count > 0 && has_room);
                sent += count;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The pages would be locked, and this process may lock no more (`RLIMIT_MEMLOCK`): copied, they are not.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) && flags & libc::MSG_ZEROCOPY != 0 => {
                flags &= !libc::MSG_ZEROCOPY;
                has_room = false;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(has_room)
}

/// What one call takes of all but the first `sent` bytes.
fn fill(vectors: &mut Vec<libc::iovec>, parts: &[Part<'_>], sent: usize) {
    vectors.clear();
    let mut before = 0;
    for part in parts {
        let skip = sent.saturating_sub(before).min(part.len());
        before += part.len();
        if skip < part.len() && vectors.len() < PARTS_MAX {
            vectors.push(part.vector(skip));
        }
    }
}

fn send_vectors(socket: impl AsFd, vectors: &mut [libc::iovec], flags: libc::c_int) -> io::Result<usize> {
    // SAFETY: every field of a msghdr may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    // SAFETY: the vectors lie within parts that the caller borrows across this call, slices of regions keep theirs mapped;
    // the kernel only reads them.
    let count = unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, flags) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Fills all of `target` from the socket, straight into the memory.
///
/// # Errors
/// `UnexpectedEof` when the peer closes before; otherwise what the system says. The bytes that came stay.
pub fn receive_exactly(socket: impl AsFd, target: &MemorySlice) -> io::Result<()> {
    if !target.is_writable() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let mut filled = 0;
    while filled < target.len() {
        let base = target.as_mut_ptr().wrapping_add(filled);
        // SAFETY: the kernel writes at most the bytes from `base` to the end of the slice, whose region the slice keeps
        // mapped, before the call returns.
        let count = unsafe {
            libc::recv(
                socket.as_fd().as_raw_fd(),
                base.cast(),
                target.len() - filled,
                libc::MSG_WAITALL,
            )
        };
        match usize::try_from(count) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
