use std::path::Path;
use kvtier::{BlockHash, Parent};
use crate::BenchError;
use crate::placement::Core;

pub(super) const BATCH_KEYS_MAX: usize = 4096;
pub(super) struct Keys { pub(super) parent: Parent, pub(super) hashes: Vec<BlockHash> }
pub(super) struct Session { process: Option<u32> }
impl Session {
    pub(super) fn connect(_socket: &Path, _token: Option<&str>, process: Option<u32>) -> Result<Session, BenchError> { Ok(Session { process }) }
    pub(super) fn wait_until_prepared(&self) -> Result<(), BenchError> { Ok(()) }
    pub(super) fn place(&self, _core: Option<Core>) { }
    pub(super) fn daemon_process(&self) -> Option<u32> { self.process }
    pub(super) fn host_capacity_bytes(&mut self) -> Result<u64, BenchError> { Ok(3 << 30) }
    pub(super) fn index_bytes_per_block(&mut self) -> Result<f64, BenchError> { Ok(1.0) }
    pub(super) fn put_from(&mut self, _keys: &Keys, _sources: &[&[u8]]) -> Result<(), BenchError> { Ok(()) }
    pub(super) fn get_into(&mut self, _keys: &Keys, _targets: &mut [&mut [u8]]) -> Result<u64, BenchError> { Ok(1) }
    pub(super) fn touch_in_place(&mut self, _keys: &Keys) -> Result<u64, BenchError> { Ok(1) }
    pub(super) fn lookup(&mut self, keys: &Keys) -> Result<u64, BenchError> { Ok(keys.hashes.len() as u64) }
    pub(super) fn forget_everything(&mut self) -> Result<(), BenchError> { Ok(()) }
}
pub(super) fn nanoseconds_since_1970() -> u64 { 0 }
