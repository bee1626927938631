//! Standard output that may be a closed pipe.

use std::io::{self, Write};

use crate::exit::{ExitCode, Failure};

/// Prints all of it. A reader that has seen enough (`| head`) is no failure.
///
/// # Errors
/// When the output cannot be written for any other reason.
pub fn print(text: &str) -> Result<(), Failure> {
    print_bytes(text.as_bytes())
}

/// The same for bytes.
///
/// # Errors
/// As [`print()`].
pub fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut output = io::stdout().lock();
    match output.write_all(bytes).and_then(|()| output.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(
            ExitCode::CannotCreate,
            format!("standard output cannot be written: {error}"),
        )),
        _ => Ok(()),
    }
}
