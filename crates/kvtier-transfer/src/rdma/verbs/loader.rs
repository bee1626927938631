//! System libraries opened at run time.

use std::ffi::{CStr, CString, c_void};

/// A pointer that is only passed on.
pub(crate) type Opaque = *mut c_void;

/// Opens a library for good. `remedy` says what to install where it is missing.
pub(crate) fn open(file: &CStr, remedy: &str) -> Result<Opaque, String> {
    // SAFETY: a name that ends in zero; the library's initialisers are those of a system library.
    let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        return Err(format!("{} ({remedy})", loader_error()));
    }
    Ok(handle)
}

/// A function of an open library.
pub(crate) fn symbol(handle: Opaque, file: &CStr, name: &str) -> Result<Opaque, String> {
    let terminated = CString::new(name).map_err(|error| error.to_string())?;
    // SAFETY: an open library and a name that ends in zero.
    let symbol = unsafe { libc::dlsym(handle, terminated.as_ptr()) };
    if symbol.is_null() {
        let file = file.to_string_lossy();
        return Err(format!("{file} has no {name}: {}", loader_error()));
    }
    Ok(symbol)
}

fn loader_error() -> String {
    // SAFETY: takes no argument; the answer belongs to this thread until its next call of the loader.
    let words = unsafe { libc::dlerror() };
    if words.is_null() {
        return "unknown".to_owned();
    }
    // SAFETY: a string of the loader that ends in zero.
    unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
}
