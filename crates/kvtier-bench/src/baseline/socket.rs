//! The rawest way to fetch bytes over TCP: a thread a connection on both sides, a request of 32 bytes, the answer received
//! in one system call straight into its target.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use kvtier_transfer::memory::MemorySlice;

const REQUEST_BYTES: usize = 32;

/// Connections to a server in this process, each driven by a thread of its own unless there is only one.
pub struct RawSockets {
    /// Driven by the caller.
    first: TcpStream,
    others: Vec<Other>,
}

struct Other {
    work: Option<Sender<Vec<(u64, MemorySlice)>>>,
    done: Receiver<io::Result<()>>,
    thread: Option<JoinHandle<()>>,
}

impl RawSockets {
    /// Serves ranges of `source` and connects to that.
    ///
    /// # Errors
    /// When sockets or threads cannot be had.
    pub fn start(connections: usize, source: &MemorySlice) -> io::Result<RawSockets> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let mut streams = Vec::new();
        for _ in 0..connections {
            let near = TcpStream::connect(address)?;
            let (far, _) = listener.accept()?;
            near.set_nodelay(true)?;
            far.set_nodelay(true)?;
            let source = source.clone();
            std::thread::Builder::new()
                .name("raw-serve".to_owned())
                .spawn(move || serve(far, &source))?;
            streams.push(near);
        }
        let mut streams = streams.into_iter();
        let first = streams.next().ok_or(io::ErrorKind::InvalidInput)?;
        let others = streams.map(Other::start).collect::<io::Result<_>>()?;
        Ok(RawSockets { first, others })
    }

    /// Fetches each range: offset in the source and target, spread over the connections, all requests of a connection
    /// before its first answer.
    ///
    /// # Errors
    /// What the system says.
    pub fn fetch(&mut self, wanted: &[(u64, MemorySlice)]) -> io::Result<()> {
        let count = 1 + self.others.len();
        let share = |at: usize| -> Vec<(u64, MemorySlice)> { wanted.iter().skip(at).step_by(count).cloned().collect() };
        for (at, other) in self.others.iter().enumerate() {
            let work = other.work.as_ref().ok_or(io::ErrorKind::NotConnected)?;
            work.send(share(at + 1)).map_err(io::Error::other)?;
        }
        fetch_over(&mut self.first, &share(0))?;
        for other in &self.others {
            other.done.recv().map_err(io::Error::other)??;
        }
        Ok(())
    }
}

impl Other {
    fn start(mut stream: TcpStream) -> io::Result<Other> {
        let (work, wanted) = channel::<Vec<(u64, MemorySlice)>>();
        let (tell, done) = channel();
        let thread = std::thread::Builder::new()
            .name("raw-fetch".to_owned())
            .spawn(move || {
                while let Ok(wanted) = wanted.recv() {
                    if tell.send(fetch_over(&mut stream, &wanted)).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Other {
            work: Some(work),
            done,
            thread: Some(thread),
        })
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            // Its panic has been printed.
            let _ = thread.join();
        }
    }
}

fn fetch_over(stream: &mut TcpStream, wanted: &[(u64, MemorySlice)]) -> io::Result<()> {
    let mut requests = Vec::with_capacity(wanted.len() * REQUEST_BYTES);
    for (offset, target) in wanted {
        let mut request = [0; REQUEST_BYTES];
        request[..8].copy_from_slice(&offset.to_le_bytes());
        request[8..16].copy_from_slice(&(target.len() as u64).to_le_bytes());
        requests.extend(request);
    }
    stream.write_all(&requests)?;
    wanted.iter().try_for_each(|(_, target)| receive(stream, target))
}

fn receive(stream: &TcpStream, target: &MemorySlice) -> io::Result<()> {
    let mut filled = 0;
    while filled < target.len() {
        let base = target.as_mut_ptr().wrapping_add(filled);
        // SAFETY: the kernel writes at most the bytes from `base` to the end of the slice, which keeps its region mapped.
        let count = unsafe {
            libc::recv(
                stream.as_raw_fd(),
                base.cast(),
                target.len() - filled,
                libc::MSG_WAITALL,
            )
        };
        match usize::try_from(count) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

/// Until the other side closes.
fn serve(mut stream: TcpStream, source: &MemorySlice) {
    let mut request = [0; REQUEST_BYTES];
    while stream.read_exact(&mut request).is_ok() {
        let number = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().expect("8 bytes"));
        let (offset, length) = (number(0), number(8));
        let (Ok(offset), Ok(length)) = (usize::try_from(offset), usize::try_from(length)) else {
            return;
        };
        let Ok(range) = source.subslice(offset, length) else {
            return;
        };
        let mut sent = 0;
        while sent < length {
            let base = range.as_ptr().wrapping_add(sent);
            // SAFETY: the kernel reads at most the bytes from `base` to the end of the range, which keeps its region mapped.
            let count = unsafe { libc::send(stream.as_raw_fd(), base.cast(), length - sent, libc::MSG_NOSIGNAL) };
            match usize::try_from(count) {
                Ok(count) => sent += count,
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvtier_transfer::memory::MemoryRegion;

    #[test]
    fn what_is_fetched_over_several_connections_is_what_was_asked_for() {
        const BYTES: usize = 1 << 20;
        let region = || {
            MemoryRegion::anonymous(BYTES)
                .expect("memory")
                .slice(0, BYTES)
                .expect("all")
        };
        let (source, target) = (region(), region());
        let bytes: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
        source.copy_from_slice(&bytes).expect("equal");
        let mut raw = RawSockets::start(2, &source).expect("sockets");
        let wanted: Vec<(u64, MemorySlice)> = (0..4)
            .map(|at| {
                let target = target.subslice(at * 100_000, 100_000).expect("inside");
                (at as u64 * 7, target)
            })
            .collect();
        raw.fetch(&wanted).expect("fetched");
        for at in 0..4 {
            let got = target.subslice(at * 100_000, 100_000).expect("inside").to_vec();
            assert!(got == bytes[at * 7..at * 7 + 100_000], "range {at}");
        }
    }
}
