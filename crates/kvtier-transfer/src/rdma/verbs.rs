//! libibverbs behind safe types: a device, memory registered with it, completion queues and reliable connections.
//!
//! Whatever a device may touch is owned here: a queue pair holds the memory of each request until its completion or its own
//! end, a registration holds its region until the device has let go.
#![expect(
    unsafe_code,
    reason = "calls libibverbs, which was opened at run time, and hands it addresses that it owns until they are at rest"
)]

mod device;
mod ffi;
mod interface;
pub(crate) mod loader;
mod manager;
mod queue;

pub use device::DirectWay;
pub(crate) use device::{Device, Port, Registered, device_names};
pub(crate) use interface::addresses_of;
pub(crate) use manager::{Call, Ends, Listener};
pub(crate) use queue::{Completion, CompletionQueue, Destination, Path, PostError, QueuePair, Status, Work};

#[cfg(test)]
mod tests;
