//! How two ends of a connection introduce themselves: see [`super::wire`].

use std::borrow::Cow;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::wire::{GREETING_BYTES, Greeting, PROOF_BYTES, Secret, proof};

/// Why a connection is not used.
#[derive(Debug)]
pub(crate) enum Refused {
    /// It ended, or took too long.
    System(io::Error),
    /// One side does not accept the other.
    Denied(Cow<'static, str>),
}

impl Refused {
    fn denied(words: &'static str) -> Refused {
        Refused::Denied(Cow::Borrowed(words))
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Refused {
        match error.kind() {
            // TLS does: with 1.3 a caller learns during the introduction that its certificate is refused.
            io::ErrorKind::PermissionDenied => Refused::Denied(Cow::Owned(error.to_string())),
            _ => Refused::System(error),
        }
    }
}

/// Introduces the side that called.
pub(crate) fn greet_as_caller(stream: &TcpStream, secret: Option<&Secret>, patience: Duration) -> Result<(), Refused> {
    within(stream, patience, || introduce_caller(stream, secret))
}

/// The same over anything that carries bytes; who gives it limits each wait.
pub(super) fn introduce_caller(mut stream: impl Read + Write, secret: Option<&Secret>) -> Result<(), Refused> {
    let mine = Greeting::draw(secret.is_some());
    stream.write_all(&mine.encode())?;
    let theirs = receive_greeting(&mut stream)?;
    same_terms(&mine, &theirs)?;
    let mut shown = [0; PROOF_BYTES];
    stream.read_exact(&mut shown)?;
    if blake3::Hash::from_bytes(shown) != proof(secret, "listener", &mine, &theirs) {
        return Err(Refused::denied("it does not know the secret"));
    }
    stream.write_all(proof(secret, "caller", &mine, &theirs).as_bytes())?;
    Ok(())
}

/// Introduces the side that listened.
pub(crate) fn greet_as_listener(
    stream: &TcpStream,
    secret: Option<&Secret>,
    patience: Duration,
) -> Result<(), Refused> {
    within(stream, patience, || introduce_listener(stream, secret))
}

/// As [`introduce_caller`], of the other side.
pub(super) fn introduce_listener(mut stream: impl Read + Write, secret: Option<&Secret>) -> Result<(), Refused> {
    let theirs = receive_greeting(&mut stream)?;
    let mine = Greeting::draw(secret.is_some());
    // Sent in any case, so that the caller learns on what terms.
    stream.write_all(&mine.encode())?;
    same_terms(&mine, &theirs)?;
    stream.write_all(proof(secret, "listener", &theirs, &mine).as_bytes())?;
    let mut shown = [0; PROOF_BYTES];
    stream.read_exact(&mut shown)?;
    if blake3::Hash::from_bytes(shown) != proof(secret, "caller", &theirs, &mine) {
        return Err(Refused::denied("it does not know the secret"));
    }
    Ok(())
}

fn receive_greeting(stream: &mut impl Read) -> Result<Greeting, Refused> {
    let mut bytes = [0; GREETING_BYTES];
    stream.read_exact(&mut bytes)?;
    Greeting::decode(&bytes).map_err(Refused::denied)
}

fn same_terms(mine: &Greeting, theirs: &Greeting) -> Result<(), Refused> {
    match (mine.secret, theirs.secret) {
        (true, false) => Err(Refused::denied("it has no secret and this side has one")),
        (false, true) => Err(Refused::denied("it has a secret and this side has none")),
        _ => Ok(()),
    }
}

/// With a limit on each wait, taken off again afterwards.
pub(super) fn within<T>(
    stream: &TcpStream,
    patience: Duration,
    greet: impl FnOnce() -> Result<T, Refused>,
) -> Result<T, Refused> {
    let patience = patience.max(Duration::from_millis(1));
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let done = greet()?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(done)
}
