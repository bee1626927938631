#![expect(
    unsafe_code,
    reason = "takes the memory of objects by Python's buffer protocol, in whatever format it is"
)]

use std::ptr::NonNull;

use kvtier::client::ForeignSlice;
use pyo3::ffi;
use pyo3::prelude::*;

/// The contiguous bytes of an object, which Python keeps in place while this exists. Other threads may write them.
pub(crate) struct Buffer {
    view: Box<ffi::Py_buffer>,
    slice: ForeignSlice,
}

// SAFETY: the view is only given back, which takes the interpreter's lock; the slice may go anywhere.
unsafe impl Send for Buffer {}
// SAFETY: as for `Send`: nothing is done with the view through a shared reference.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// To copy from.
    pub(crate) fn readable(object: &Bound<'_, PyAny>) -> PyResult<Buffer> {
        Buffer::take(object, ffi::PyBUF_SIMPLE)
    }

    /// To copy into.
    pub(crate) fn writable(object: &Bound<'_, PyAny>) -> PyResult<Buffer> {
        Buffer::take(object, ffi::PyBUF_WRITABLE)
    }

    /// Asks for neither a format nor a shape: an exporter then gives plain contiguous bytes or refuses.
    fn take(object: &Bound<'_, PyAny>, flags: i32) -> PyResult<Buffer> {
        let mut view = Box::new(ffi::Py_buffer::new());
        // SAFETY: the interpreter's lock is held, the object lives, and the view is writable and at a fixed place.
        let taken = unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), &raw mut *view, flags) };
        if taken != 0 {
            return Err(PyErr::fetch(object.py()));
        }
        // An empty buffer may have no address.
        let address = NonNull::new(view.buf.cast::<u8>()).unwrap_or(NonNull::dangling());
        let length = usize::try_from(view.len).unwrap_or(0);
        // SAFETY: the exporter keeps these bytes in place until the view is released, which only the drop of the `Buffer`
        // does; whoever clones the slice keeps the `Buffer`. No Rust reference to them exists. They may lie in a region
        // when the object is a view of a leased block, which that view keeps leased and mapped; the copies allow overlap.
        let slice = unsafe { ForeignSlice::new(address, length) };
        Ok(Buffer { view, slice })
    }
}

impl AsRef<ForeignSlice> for Buffer {
    fn as_ref(&self) -> &ForeignSlice {
        &self.slice
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // When the interpreter is gone there is nothing left to give it back to.
        Python::try_attach(|_| {
            // SAFETY: the interpreter's lock is held, and the view was filled by PyObject_GetBuffer and not released.
            unsafe { ffi::PyBuffer_Release(&raw mut *self.view) }
        });
    }
}
