//! One suite for both engines, and the tier on each of them.

mod engines;
mod erase;
mod restart;
mod ring;
mod tier;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvtier_core::{Generation, NamespaceId};
use kvtier_transfer::memory::{MemoryRegion, MemorySlice};

use super::{DataKey, EngineSettings, NvmeEngine, RecordKeys, ThreadsEngine, UringEngine};

/// Keys of every namespace, from one generation on.
struct TestKeys {
    from: AtomicU64,
}

impl TestKeys {
    fn all() -> Arc<TestKeys> {
        Arc::new(TestKeys {
            from: AtomicU64::new(0),
        })
    }
}

impl RecordKeys for TestKeys {
    fn data_key(&self, namespace: NamespaceId, generation: Generation) -> Option<Arc<DataKey>> {
        let mut key = [7; 32];
        key[..4].copy_from_slice(&namespace.0.to_le_bytes());
        key[4..12].copy_from_slice(&generation.0.to_le_bytes());
        (generation.0 >= self.from.load(Ordering::Relaxed)).then(|| Arc::new(DataKey::new(key)))
    }
}

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
