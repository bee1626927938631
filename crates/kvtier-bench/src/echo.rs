use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::BenchError;
use crate::placement::Core;

/// Bytes of one message, each way.
pub(crate) const ECHO_BYTES: usize = 64;

/// The other end of the echo baseline: listens at `path`, serves one connection with blocking reads and writes, returns
/// when it closes. Meant to be all that its process does.
///
/// # Errors
/// When the socket cannot be made or the connection breaks in mid-message.
pub fn echo_server_main(path: &Path) -> std::io::Result<()> {
    let listener = UnixListener::bind(path)?;
    let (mut connection, _) = listener.accept()?;
    let mut message = [0; ECHO_BYTES];
    loop {
        match connection.read_exact(&mut message) {
            Ok(()) => connection.write_all(&message)?,
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// The near end: one blocking round trip at a time to another process.
pub(crate) struct Echo {
    connection: Option<UnixStream>,
    server: Child,
    path: PathBuf,
}

impl Echo {
    /// Starts `command` with the socket's path as its last argument, on `core`.
    pub(crate) fn start(command: &[String], directory: &Path, core: Option<Core>) -> Result<Echo, BenchError> {
        let path = directory.join("echo.sock");
        let (program, arguments) = command.split_first().ok_or_else(|| {
            BenchError::Options("the echo baseline needs a command that runs echo_server_main".to_owned())
        })?;
        let server = Command::new(program)
            .args(arguments)
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(BenchError::system(format!("start of the echo server {program}")))?;
        let mut echo = Echo {
            connection: None,
            server,
            path,
        };
        if let Some(core) = core {
            core.pin_process(echo.server.id())
                .map_err(BenchError::system("placement of the echo server"))?;
        }
        let started = Instant::now();
        loop {
            match UnixStream::connect(&echo.path) {
                Ok(connection) => {
                    echo.connection = Some(connection);
                    return Ok(echo);
                }
                Err(error) if started.elapsed() > Duration::from_secs(10) => {
                    return Err(BenchError::System {
                        what: format!("connection to the echo server {}", command.join(" ")),
                        source: error,
                    });
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    pub(crate) fn round_trip(&mut self) -> Result<Duration, BenchError> {
        let connection = self.connection.as_mut().expect("connected from start to drop");
        let mut message = [0x5a; ECHO_BYTES];
        let started = Instant::now();
        connection
            .write_all(&message)
            .and_then(|()| connection.read_exact(&mut message))
            .map_err(BenchError::system("echo"))?;
        Ok(started.elapsed())
    }

    pub(crate) fn process(&self) -> u32 {
        self.server.id()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // Closing the connection ends the server; one that never accepted has to be told.
        if self.connection.take().is_none() {
            let _ = self.server.kill();
        }
        let _ = self.server.wait();
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_echo_server_answers_each_message_and_ends_with_its_connection() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("echo.sock");
        let server = std::thread::spawn({
            let path = path.clone();
            move || echo_server_main(&path)
        });
        let mut connection = loop {
            match UnixStream::connect(&path) {
                Ok(connection) => break connection,
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        for round in 0..3u8 {
            let mut answer = [0; ECHO_BYTES];
            connection.write_all(&[round; ECHO_BYTES]).expect("a write");
            connection.read_exact(&mut answer).expect("an answer");
            assert_eq!(answer, [round; ECHO_BYTES]);
        }
        drop(connection);
        server.join().expect("no panic").expect("a clean end");
    }
}
