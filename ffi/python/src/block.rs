#![expect(
    unsafe_code,
    reason = "lends the memory of a leased block by Python's buffer protocol"
)]

use std::os::raw::c_int;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvtier::client::BlockHandle;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::error::{Closed, raised};
use crate::outcome::tier_name;

/// A leased block, in place: `memoryview(block)`, `bytes(block)` and whatever else takes a buffer, read-only.
///
/// The lease is given back with the object, which its views keep alive, or by `release` or the end of a `with`. It outlives
/// its client. Once the connection that it was leased over is gone, or in a forked child, it raises Closed.
#[pyclass(frozen, weakref, module = "kvtier")]
pub(crate) struct Block {
    state: Mutex<State>,
}

struct State {
    handle: Option<BlockHandle>,
    views: usize,
}

#[pymethods]
impl Block {
    /// Where it was found: "host", "nvme" or "remote" (another node).
    #[getter]
    fn tier(&self) -> PyResult<&'static str> {
        self.with(|handle| tier_name(handle.tier()))
    }

    /// Gives the lease back now. BufferError while views of it exist.
    fn release(&self) -> PyResult<()> {
        let mut state = self.state();
        if state.views > 0 {
            return Err(PyBufferError::new_err(format!(
                "{} views of the block still exist",
                state.views
            )));
        }
        state.handle = None;
        Ok(())
    }

    fn __len__(&self) -> PyResult<usize> {
        self.with(BlockHandle::len)
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, PyAny>) -> PyResult<()> {
        self.release()
    }

    fn __repr__(&self) -> String {
        match &self.state().handle {
            Some(handle) => format!(
                "<kvtier.Block of {} bytes from {}>",
                handle.len(),
                tier_name(handle.tier())
            ),
            None => "<kvtier.Block, released>".to_owned(),
        }
    }

    /// # Safety
    /// Python calls it with the interpreter's lock and a view to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let block = slf.get();
        let (address, length) = block.with(|handle| (handle.slice().as_ptr(), handle.len()))?;
        let length = ffi::Py_ssize_t::try_from(length)?;
        // SAFETY: the block holds the lease and the mapping while views of it exist; the last argument but one makes the
        // view read-only, so that nobody writes through the pointer.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), address.cast_mut().cast(), length, 1, flags) };
        if filled != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        block.state().views += 1;
        Ok(())
    }

    /// # Safety
    /// Python calls it with the interpreter's lock, once for each view.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.state().views -= 1;
    }
}

impl Block {
    pub(crate) fn new(handle: BlockHandle) -> Block {
        let state = Mutex::new(State {
            handle: Some(handle),
            views: 0,
        });
        Block { state }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<R>(&self, look: impl FnOnce(&BlockHandle) -> R) -> PyResult<R> {
        let state = self.state();
        let handle = state.handle.as_ref();
        let handle = handle.ok_or_else(|| Closed::new_err("this block was released: get it again"))?;
        handle.check().map_err(raised)?;
        Ok(look(handle))
    }
}
