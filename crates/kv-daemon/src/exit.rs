//! How a process of this package ends when it cannot do what it was asked: one line of words, one code of sysexits.

use std::fmt;

/// Exit codes, by the meaning that `sysexits.h` gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The answer is no: a miss, or bytes that were wrong.
    No = 1,
    /// The command line cannot be read.
    Usage = 64,
    /// An input file cannot be read as what it should be.
    DataFormat = 65,
    /// An input file cannot be opened.
    NoInput = 66,
    /// The daemon, or what it needs, is not there.
    Unavailable = 69,
    /// A rule of ours is broken: report a bug.
    Internal = 70,
    /// An output cannot be made.
    CannotCreate = 73,
    /// Try again later.
    TryAgain = 75,
    /// Not allowed.
    Denied = 77,
    /// A setting cannot be.
    Configuration = 78,
}

/// Why the process ends, in words for the person who started it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What the shell sees.
    pub code: ExitCode,
    /// What the person sees: what went wrong, then what to do.
    pub message: String,
}

impl Failure {
    /// A failure with this code and these words.
    #[must_use]
    pub fn new(code: ExitCode, message: impl Into<String>) -> Failure {
        Failure {
            code,
            message: message.into(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Ends `main`: prints the failure under the program's name and turns it into the process's exit code.
#[must_use]
pub fn report(program: &str, result: Result<(), Failure>) -> std::process::ExitCode {
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                eprintln!("{program}: {}", failure.message);
            }
            std::process::ExitCode::from(failure.code as u8)
        }
    }
}
