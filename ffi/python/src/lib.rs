//! The extension module `_kvtier` of the Python wheel: it translates, and decides nothing.
//!
//! Absent on purpose: logic. State machines live in `kvtier`; what a caller sees is `python/kvtier`.
//!
//! Read first: `client`, `block` (a lease as a buffer), `buffer` (the caller's memory), `device` (its memory on a GPU), `adapter`.

mod adapter;
mod argument;
mod block;
mod buffer;
mod client;
mod device;
mod error;
mod outcome;

use pyo3::prelude::*;

#[pymodule]
fn _kvtier(module: &Bound<'_, PyModule>) -> PyResult<()> {
    error::register(module)?;
    module.add_class::<client::Client>()?;
    module.add_class::<block::Block>()?;
    module.add_class::<device::Device>()?;
    module.add_class::<device::DeviceCache>()?;
    module.add_class::<device::DeviceGet>()?;
    module.add_class::<device::DevicePut>()?;
    module.add_class::<device::IpcArray>()?;
    module.add_class::<device::KvLayout>()?;
    module.add_class::<outcome::Got>()?;
    module.add_class::<outcome::Found>()?;
    module.add_class::<outcome::Flushed>()?;
    module.add_class::<adapter::LmcacheAdapter>()
}
