//! Memory of GPUs and copies to, from and within it, through CUDA's driver API.
//!
//! The driver is opened at run time: where it, or a device, is missing, [`Cuda::open`] says "cuda unavailable: …" and the
//! binary is the same. Whatever a device may touch is owned here: a copy in flight holds both of its sides, and the
//! registration of its host side, until the device says that it is done. A copy that a device has begun cannot be called
//! back, so the outcome of a batch comes when it is at rest and not at a deadline.
//!
//! A device that fails for good (CUDA's sticky errors) takes its context with it: everything in flight fails, later calls are
//! refused in words, and memory that it may still reach is kept for the rest of the process.
#![expect(
    unsafe_code,
    reason = "calls CUDA's driver, which was opened at run time, and hands it addresses that it owns until they are at rest"
)]

mod compute;
mod device;
mod driver;
mod engine;
mod kernel;
mod layout;
mod memory;
mod pinning;
mod raw;
mod rows;
mod shared;
mod stream;

pub use compute::Multiplications;
pub(crate) use device::DirectWrites;
pub use device::{Cuda, DeviceUuid, Gpu};
pub use driver::{GpuError, IpcHandle, Unavailable};
pub use engine::{EngineStream, Mark};
pub use kernel::{PieceMover, PieceMoverChosen, PieceMoverWanted};
pub use layout::{KvLayout, KvOrder, KvParts, LayoutError};
pub use memory::{DeviceRegion, DeviceSlice};
pub use pinning::{HostRegistration, PinnedRegions};
pub use raw::RawCopies;
pub use stream::{Copy, CopyRefused, Place, Stream};
