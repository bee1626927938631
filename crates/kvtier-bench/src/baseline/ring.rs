//! The rawest way to a disk: one io_uring ring, filled and emptied by the thread that calls, over memory and files that
//! are not registered.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use kvtier_storage::nvme::Direction;
use kvtier_transfer::memory::MemorySlice;

/// One read or write.
pub struct RawRequest {
    /// The file.
    pub file: Arc<File>,
    /// Where in it.
    pub offset: u64,
    /// Where in memory, and how much.
    pub memory: MemorySlice,
}

/// A ring and the memory that the kernel may touch. Belongs to the thread that made it.
pub struct RawRing {
    ring: IoUring,
    /// What is in flight, and since when: given up only when its completion arrived.
    slots: Vec<Option<(RawRequest, Instant)>>,
}

impl RawRing {
    /// A ring for up to `depth` requests at a time, of the same kind as the product's.
    ///
    /// # Errors
    /// Where the kernel, a container or a limit denies io_uring.
    ///
    /// # Panics
    /// When `depth` is 0.
    pub fn build(depth: u32) -> io::Result<RawRing> {
        assert!(depth > 0, "a ring that may hold nothing");
        let entries = depth.next_power_of_two();
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .build(entries)
            .or_else(|_| IoUring::builder().setup_coop_taskrun().build(entries))
            .or_else(|_| IoUring::builder().build(entries))?;
        Ok(RawRing {
            ring,
            slots: (0..depth).map(|_| None).collect(),
        })
    }

    /// Carries out requests in order, as many at a time as the ring is deep, each asked for whole. `next` makes each one
    /// when there is room for it: its argument is below the depth and differs among those in flight. Returns how long each
    /// took, in the order in which they ended.
    ///
    /// # Errors
    /// The first failure; one that moved less than was asked for is a failure.
    pub fn run(
        &mut self,
        direction: Direction,
        mut next: impl FnMut(usize) -> Option<RawRequest>,
    ) -> io::Result<Vec<Duration>> {
        let mut free: Vec<usize> = (0..self.slots.len())
            .filter(|slot| self.slots[*slot].is_none())
            .collect();
        let mut times = Vec::new();
        let mut failure = None;
        loop {
            while failure.is_none()
                && let Some(&slot) = free.last()
                && let Some(request) = next(slot)
            {
                free.pop();
                self.start(slot, direction, request);
            }
            if free.len() == self.slots.len() {
                return failure.map_or(Ok(times), Err);
            }
            self.wait()?;
            let now = Instant::now();
            while let Some((slot, moved)) = self.next_completion() {
                let (request, started) = self.slots[slot].take().expect("a completion of what is in flight");
                free.push(slot);
                match moved {
                    Ok(moved) if moved == request.memory.len() => times.push(now - started),
                    Ok(moved) => {
                        let words = format!("{moved} bytes of {} moved", request.memory.len());
                        failure = Some(io::Error::other(words));
                    }
                    Err(error) => failure = Some(error),
                }
            }
        }
    }

    fn start(&mut self, slot: usize, direction: Direction, request: RawRequest) {
        let file = types::Fd(request.file.as_raw_fd());
        let length = u32::try_from(request.memory.len()).expect("requests are smaller than 4 GiB");
        let entry = match direction {
            Direction::Read => opcode::Read::new(file, request.memory.as_mut_ptr(), length)
                .offset(request.offset)
                .build(),
            Direction::Write => opcode::Write::new(file, request.memory.as_ptr(), length)
                .offset(request.offset)
                .build(),
        };
        self.slots[slot] = Some((request, Instant::now()));
        let entry = entry.user_data(slot as u64);
        // SAFETY: file and memory lie in `self.slots` until the completion arrives; `drop` waits for it, too.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the ring has room for its depth");
    }

    fn wait(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn next_completion(&mut self) -> Option<(usize, io::Result<usize>)> {
        let completion = self.ring.completion().next()?;
        let slot = usize::try_from(completion.user_data()).expect("a slot of ours");
        let result = completion.result();
        let moved = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        Some((slot, moved))
    }
}

impl Drop for RawRing {
    fn drop(&mut self) {
        while self.slots.iter().any(Option::is_some) {
            if self.wait().is_err() {
                // Keep the memory for ever rather than let a device write into somebody else's.
                self.slots.drain(..).for_each(|slot| {
                    let _ = std::mem::ManuallyDrop::new(slot);
                });
                return;
            }
            while let Some((slot, _)) = self.next_completion() {
                self.slots[slot] = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kvtier_transfer::memory::MemoryRegion;

    use super::*;

    /// A ring, or a word that this system has none.
    fn ring(depth: u32) -> Option<RawRing> {
        RawRing::build(depth)
            .inspect_err(|error| println!("skipped: raw ring: {error}"))
            .ok()
    }

    #[test]
    fn what_was_written_is_read_back_whatever_the_depth() {
        const BLOCK: usize = 8192;
        for depth in [1, 3, 8] {
            let Some(mut ring) = ring(depth) else { return };
            let file = Arc::new(tempfile::tempfile().expect("a temporary file"));
            let region = MemoryRegion::anonymous(20 * BLOCK).expect("memory");
            let request = |block: usize, slot: usize| RawRequest {
                file: Arc::clone(&file),
                offset: (block * BLOCK) as u64,
                memory: region.slice(slot * BLOCK, BLOCK).expect("in range"),
            };
            for block in 0..10u8 {
                let memory = request(usize::from(block), usize::from(block)).memory;
                memory.copy_from_slice(&[block + 1; BLOCK]).expect("equal lengths");
            }
            let mut writes = (0..10).map(|block| request(block, block));
            let times = ring.run(Direction::Write, |_| writes.next());
            assert_eq!(times.expect("written").len(), 10);
            let mut reads = (0..10).map(|block| request(block, 10 + block));
            let times = ring.run(Direction::Read, |slot| reads.next().filter(|_| slot < depth as usize));
            assert_eq!(times.expect("read").len(), 10);
            for block in 0..10u8 {
                let memory = request(0, 10 + usize::from(block)).memory;
                assert_eq!(memory.to_vec(), [block + 1; BLOCK], "block {block} at depth {depth}");
            }
        }
    }

    #[test]
    fn a_read_past_the_end_is_a_failure_and_the_ring_goes_on() {
        let Some(mut ring) = ring(4) else { return };
        let file = Arc::new(tempfile::tempfile().expect("a temporary file"));
        file.set_len(4096).expect("sized");
        let region = MemoryRegion::anonymous(4096).expect("memory");
        let read = |offset| RawRequest {
            file: Arc::clone(&file),
            offset,
            memory: region.slice(0, 4096).expect("all of it"),
        };
        let mut reads = [read(0), read(4096)].into_iter();
        assert!(ring.run(Direction::Read, |_| reads.next()).is_err());
        let mut reads = [read(0)].into_iter();
        assert_eq!(ring.run(Direction::Read, |_| reads.next()).expect("read").len(), 1);
    }
}
