//! One suite for both engines, and the tier on each of them.

mod engines;
mod ring;
mod tier;

use std::sync::Arc;

use kvtier_transfer::memory::{MemoryRegion, MemorySlice};

use super::{EngineSettings, NvmeEngine, ThreadsEngine, UringEngine};

/// Both engines, or one and a line that says why not the other.
fn uring(settings: EngineSettings) -> Option<Arc<dyn NvmeEngine>> {
    match UringEngine::start(settings) {
        Ok(engine) => Some(Arc::new(engine)),
        Err(error) => {
            let denied = [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::ENOMEM];
            assert!(
                error.raw_os_error().is_some_and(|number| denied.contains(&number)),
                "io_uring failed for no reason of the system: {error}"
            );
            eprintln!("skipped: io_uring: {error}");
            None
        }
    }
}

fn threads(settings: EngineSettings) -> Option<Arc<dyn NvmeEngine>> {
    Some(Arc::new(ThreadsEngine::start(settings).expect("threads start")))
}

fn memory(bytes: usize) -> MemorySlice {
    MemoryRegion::anonymous(bytes.next_multiple_of(4096))
        .expect("memory")
        .slice(0, bytes)
        .expect("as long as asked for")
}

/// Bytes that differ at every place and between seeds.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
