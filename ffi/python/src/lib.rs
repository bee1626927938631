//! The extension module `_kvtier` of the Python wheel: it translates, and decides nothing.
//!
//! Absent on purpose: logic. State machines live in `kvtier`; what a caller sees is `python/kvtier`.
//!
//! Read first: [`adapter`].
mod adapter;

use pyo3::prelude::*;

#[pymodule]
fn _kvtier(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<adapter::LmcacheAdapter>()
}
