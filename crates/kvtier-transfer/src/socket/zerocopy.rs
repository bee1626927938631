//! Sending without a copy into the kernel: the pages of a region are on their way until the kernel says that they are not.
//!
//! `Documentation/networking/msg_zerocopy.rst`: each call that sends this way is numbered from 0, and the socket's queue of
//! errors tells ranges of numbers that are done, also whether the kernel copied after all.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::stream::{Part, send_parts_flagged};

/// `SO_EE_ORIGIN_ZEROCOPY` and `SO_EE_CODE_ZEROCOPY_COPIED` of `linux/errqueue.h`.
const ORIGIN_ZEROCOPY: u8 = 5;
const CODE_COPIED: u8 = 1;

/// One socket's zero-copy sends.
#[derive(Debug)]
pub(crate) struct ZeroCopy {
    sent: u32,
    done: u32,
    copied: bool,
    aborted: bool,
}

impl ZeroCopy {
    /// Asks for it; an error where the kernel has none.
    pub(crate) fn enable(socket: impl AsFd) -> io::Result<ZeroCopy> {
        let on: libc::c_int = 1;
        let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).expect("4 bytes");
        // SAFETY: the kernel reads `length` bytes, which is the size of `on`.
        let answer = unsafe {
            libc::setsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ZEROCOPY,
                (&raw const on).cast(),
                length,
            )
        };
        if answer != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(ZeroCopy {
            sent: 0,
            done: 0,
            copied: false,
            aborted: false,
        })
    }

    /// Whether the kernel copied all the same, as it does between processes of one node: then there is nothing to gain.
    pub(crate) fn was_copied(&self) -> bool {
        self.copied
    }

    /// Sends all parts. Their memory is the kernel's until [`ZeroCopy::settle`] has returned `Ok`.
    pub(crate) fn send(&mut self, socket: impl AsFd, parts: &[Part<'_>]) -> io::Result<()> {
        let sent = &mut self.sent;
        let has_room = send_parts_flagged(socket, parts, libc::MSG_ZEROCOPY, &mut |taken| {
            if taken {
                *sent = sent.wrapping_add(1);
            }
        })?;
        // A process that may lock no more pages copies from now on.
        self.copied |= !has_room;
        Ok(())
    }

    /// Waits until the kernel holds no page of what was sent.
    ///
    /// # Errors
    /// `TimedOut`; `NotConnected` for a connection that somebody cut: its queue may still hold pages, and send them.
    pub(crate) fn settle(&mut self, socket: impl AsFd, patience: Duration) -> io::Result<()> {
        let until = Instant::now() + patience;
        while self.done != self.sent {
            if self.take_one(&socket)? {
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let limit = Timespec {
                tv_sec: left.as_secs().cast_signed(),
                tv_nsec: left.subsec_nanos().into(),
            };
            // The queue of errors counts as one, which is always polled for.
            let mut polled = [PollFd::new(&socket, PollFlags::empty())];
            match rustix::event::poll(&mut polled, Some(&limit)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if polled[0].revents().contains(PollFlags::HUP) {
                // It stays ready from now on.
                std::thread::sleep(Duration::from_millis(1));
                if !self.take_one(&socket)? && !self.aborted {
                    return Err(io::ErrorKind::NotConnected.into());
                }
            }
        }
        Ok(())
    }

    /// Throws away what is queued and waits until no page of it is held: nothing of it is sent, or sent again, after this.
    pub(crate) fn abort(&mut self, socket: impl AsFd, patience: Duration) -> io::Result<()> {
        self.aborted = true;
        rustix::net::connect_unspec(&socket)?;
        self.settle(socket, patience)
    }

    /// One entry of the queue of errors; false when there is none.
    fn take_one(&mut self, socket: impl AsFd) -> io::Result<bool> {
        let mut control = [0u64; 32];
        // SAFETY: every field of a msghdr may be zero.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
        // SAFETY: no data is asked for, and the control buffer lives across the call.
        let count = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, flags) };
        if count < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                _ => Err(error),
            };
        }
        // SAFETY: the kernel filled the message's control buffer.
        let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        while !header.is_null() {
            // SAFETY: a header within the control buffer.
            let data = unsafe { libc::CMSG_DATA(header) };
            // SAFETY: extended errors are the only thing that this socket queues; the copy needs no alignment, and the
            // buffer is longer than one whatever the header says.
            let told = unsafe { data.cast::<libc::sock_extended_err>().read_unaligned() };
            if told.ee_origin == ORIGIN_ZEROCOPY {
                self.done = self
                    .done
                    .wrapping_add(told.ee_data.wrapping_sub(told.ee_info).wrapping_add(1));
                self.copied |= told.ee_code & CODE_COPIED != 0;
            }
            // SAFETY: as above.
            header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
        }
        Ok(true)
    }
}
