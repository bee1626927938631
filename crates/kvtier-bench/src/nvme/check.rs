use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use kvtier_storage::nvme::Direction;
use kvtier_transfer::memory::{CIPHER_NONCE_BYTES, CIPHER_TAG_BYTES, Cipher, MemorySlice};
use rustix::time::{ClockId, clock_gettime};

use super::memory::Memory;
use crate::BenchError;
use crate::baseline::{RawRequest, RawRing};

/// The check of a record by itself: blocks on the disk, and what to do with them once the disk filled memory with them.
pub(super) struct Check {
    file: Arc<File>,
    bytes: usize,
    work: Work,
}

/// What is done to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// A sum over the block, where it lies.
    Sum,
    /// Opened from private memory into the caller's slot.
    Open,
    /// Sealed from the caller's slot into private memory.
    Seal,
}

enum Work {
    Sum {
        blocks: usize,
    },
    Open {
        cipher: Cipher,
        tags: Vec<[u8; CIPHER_TAG_BYTES]>,
    },
    Seal {
        cipher: Cipher,
        blocks: usize,
    },
}

const KEY: [u8; 32] = [9; 32];

impl Check {
    /// Writes `blocks` blocks of `bytes` to an empty file, as they lie in the first slots of `host`.
    pub(super) fn prepare(
        pass: Pass,
        file: Arc<File>,
        (bytes, blocks): (usize, usize),
        ring: &mut RawRing,
        (host, private): (&Memory, &Memory),
    ) -> Result<Check, BenchError> {
        let mut next = 0..blocks;
        let mut check = Check {
            file: Arc::clone(&file),
            bytes,
            work: match pass {
                Pass::Sum => Work::Sum { blocks },
                Pass::Open => Work::Open {
                    cipher: Cipher::new(&KEY),
                    tags: Vec::with_capacity(blocks),
                },
                Pass::Seal => Work::Seal {
                    cipher: Cipher::new(&KEY),
                    blocks,
                },
            },
        };
        let request = |place| {
            let block = next.next()?;
            let mut memory = host.slot(block, bytes);
            if let Work::Open { cipher, tags } = &mut check.work {
                let sealed = private.slot(place, bytes);
                tags.push(cipher.seal(&nonce(block), &[], &memory, &sealed));
                memory = sealed;
            }
            Some(request(&file, block, memory))
        };
        ring.run(Direction::Write, request)
            .map_err(BenchError::system("the raw ring"))?;
        Ok(check)
    }

    fn blocks(&self) -> usize {
        match &self.work {
            Work::Sum { blocks } | Work::Seal { blocks, .. } => *blocks,
            Work::Open { tags, .. } => tags.len(),
        }
    }

    /// Lets the disk fill `depth` buffers, does the work on them, and so on. Returns the CPU seconds that the work alone
    /// takes for 10^9 bytes.
    pub(super) fn measure(
        &self,
        ring: &mut RawRing,
        depth: usize,
        (host, private): (&Memory, &Memory),
    ) -> Result<f64, BenchError> {
        let mut spent = Duration::ZERO;
        let blocks: Vec<usize> = (0..self.blocks()).collect();
        for wave in blocks.chunks(depth) {
            let filled: Vec<(usize, MemorySlice, MemorySlice)> = wave
                .iter()
                .enumerate()
                .map(|(place, &block)| (block, host.slot(block, self.bytes), private.slot(place, self.bytes)))
                .collect();
            let mut next = filled.iter();
            let request = |_| {
                let (block, slot, private) = next.next()?;
                let into = match self.work {
                    Work::Open { .. } => private,
                    Work::Sum { .. } | Work::Seal { .. } => slot,
                };
                Some(request(&self.file, *block, into.clone()))
            };
            ring.run(Direction::Read, request)
                .map_err(BenchError::system("the raw ring"))?;
            let before = thread_cpu_time();
            for (block, slot, private) in &filled {
                self.work(*block, slot, private)?;
            }
            spent += thread_cpu_time().saturating_sub(before);
        }
        Ok(spent.as_secs_f64() / ((blocks.len() * self.bytes) as f64 / 1e9))
    }

    fn work(&self, block: usize, slot: &MemorySlice, private: &MemorySlice) -> Result<(), BenchError> {
        match &self.work {
            Work::Sum { .. } => {
                std::hint::black_box(slot.crc32c());
            }
            Work::Open { cipher, tags } => {
                cipher
                    .open(&nonce(block), &[], private, &tags[block], slot)
                    .map_err(|_| BenchError::WrongBytes {
                        case: "check",
                        block: block as u64,
                    })?;
            }
            Work::Seal { cipher, .. } => {
                std::hint::black_box(cipher.seal(&nonce(block), &[], slot, private));
            }
        }
        Ok(())
    }
}

fn request(file: &Arc<File>, block: usize, memory: MemorySlice) -> RawRequest {
    RawRequest {
        file: Arc::clone(file),
        offset: (block * memory.len()) as u64,
        memory,
    }
}

fn nonce(block: usize) -> [u8; CIPHER_NONCE_BYTES] {
    let mut nonce = [0; CIPHER_NONCE_BYTES];
    nonce[..8].copy_from_slice(&(block as u64).to_le_bytes());
    nonce
}

fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
