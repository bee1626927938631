//! MOVE: bytes between memory regions, and file descriptors between processes.
//!
//! Memory that another process may write is reached through pointers kept in one corner: callers hold checked ranges
//! and copy, they never get a `&[u8]`. Absent on purpose: block keys, tiers, policy.
//!
//! Read first: [`memory::MemoryRegion`] (owns a mapping), [`memory::MemorySlice`] (a checked range of one) and
//! [`socket::send_with_fds`] (how a mapping reaches another process).

pub mod memory;
pub mod socket;

pub use memory::crc32c;
