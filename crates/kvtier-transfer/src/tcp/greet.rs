//! How two ends of a connection introduce themselves: see [`super::wire`].

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
    Denied(&'static str),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Refused {
        Refused::System(error)
    }
}

/// Introduces the side that called.
pub(crate) fn greet_as_caller(stream: &TcpStream, secret: Option<&Secret>, patience: Duration) -> Result<(), Refused> {
    within(stream, patience, |mut stream| {
        let mine = Greeting::draw(secret.is_some());
        stream.write_all(&mine.encode())?;
        let theirs = receive_greeting(stream)?;
        same_terms(&mine, &theirs)?;
        let mut shown = [0; PROOF_BYTES];
        stream.read_exact(&mut shown)?;
        if blake3::Hash::from_bytes(shown) != proof(secret, "listener", &mine, &theirs) {
            return Err(Refused::Denied("it does not know the secret"));
        }
        stream.write_all(proof(secret, "caller", &mine, &theirs).as_bytes())?;
        Ok(())
    })
}

/// Introduces the side that listened.
pub(crate) fn greet_as_listener(
    stream: &TcpStream,
    secret: Option<&Secret>,
    patience: Duration,
) -> Result<(), Refused> {
    within(stream, patience, |mut stream| {
        let theirs = receive_greeting(stream)?;
        let mine = Greeting::draw(secret.is_some());
        // Sent in any case, so that the caller learns on what terms.
        stream.write_all(&mine.encode())?;
        same_terms(&mine, &theirs)?;
        stream.write_all(proof(secret, "listener", &theirs, &mine).as_bytes())?;
        let mut shown = [0; PROOF_BYTES];
        stream.read_exact(&mut shown)?;
        if blake3::Hash::from_bytes(shown) != proof(secret, "caller", &theirs, &mine) {
            return Err(Refused::Denied("it does not know the secret"));
        }
        Ok(())
    })
}

fn receive_greeting(mut stream: &TcpStream) -> Result<Greeting, Refused> {
    let mut bytes = [0; GREETING_BYTES];
    stream.read_exact(&mut bytes)?;
    Greeting::decode(&bytes).map_err(Refused::Denied)
}

fn same_terms(mine: &Greeting, theirs: &Greeting) -> Result<(), Refused> {
    match (mine.secret, theirs.secret) {
        (true, false) => Err(Refused::Denied("it has no secret and this side has one")),
        (false, true) => Err(Refused::Denied("it has a secret and this side has none")),
        _ => Ok(()),
    }
}

/// With a limit on each wait, taken off again afterwards.
fn within(
    stream: &TcpStream,
    patience: Duration,
    greet: impl FnOnce(&TcpStream) -> Result<(), Refused>,
) -> Result<(), Refused> {
    let patience = patience.max(Duration::from_millis(1));
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    greet(stream)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(())
}
