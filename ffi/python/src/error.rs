use kvtier::ErrorKind;
use kvtier::client::ClientError;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

pyo3::create_exception!(kvtier, Error, PyException, "A call that was not carried out.");
pyo3::create_exception!(kvtier, Invalid, Error, "Fix the call.");
pyo3::create_exception!(kvtier, Busy, Error, "Back off, or recompute.");
pyo3::create_exception!(kvtier, Unavailable, Error, "The node is away or late: recompute.");
pyo3::create_exception!(kvtier, Stale, Error, "Look up again.");
pyo3::create_exception!(kvtier, Corrupt, Error, "The bytes failed their check: recompute.");
pyo3::create_exception!(
    kvtier,
    Closed,
    Error,
    "The client or the block is gone, or of another process: stop."
);
pyo3::create_exception!(kvtier, Internal, Error, "A rule of kvtier is broken: report a bug.");
pyo3::create_exception!(kvtier, Denied, Error, "Wrong credentials.");

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("Error", py.get_type::<Error>())?;
    module.add("Invalid", py.get_type::<Invalid>())?;
    module.add("Busy", py.get_type::<Busy>())?;
    module.add("Unavailable", py.get_type::<Unavailable>())?;
    module.add("Stale", py.get_type::<Stale>())?;
    module.add("Corrupt", py.get_type::<Corrupt>())?;
    module.add("Closed", py.get_type::<Closed>())?;
    module.add("Internal", py.get_type::<Internal>())?;
    module.add("Denied", py.get_type::<Denied>())
}

/// The exception of an error's kind.
pub(crate) fn raised(error: ClientError) -> PyErr {
    let message = error.message;
    match error.kind {
        ErrorKind::Invalid => Invalid::new_err(message),
        ErrorKind::Busy => Busy::new_err(message),
        ErrorKind::Unavailable => Unavailable::new_err(message),
        ErrorKind::Stale => Stale::new_err(message),
        ErrorKind::Corrupt => Corrupt::new_err(message),
        ErrorKind::Closed => Closed::new_err(message),
        ErrorKind::Internal => Internal::new_err(message),
        ErrorKind::Denied => Denied::new_err(message),
    }
}
