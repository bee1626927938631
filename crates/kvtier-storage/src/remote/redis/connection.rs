//! One connection: commands out, answers in (RESP2, <https://redis.io/docs/latest/develop/reference/protocol-spec/>).
//!
//! The client library's own connection waits anew for each piece that arrives, so a server that dribbles outlives every deadline, and it
//! gathers an answer before it copies it. Here each wait ends with the call, no length is believed beyond a bound, and an object is read
//! into the vector that is handed out.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustls::{ClientConnection, StreamOwned};

use super::server::Server;

/// What a string of Redis may have.
pub(super) const STRING_BYTES_MAX: usize = 512 << 20;
/// A number, a status or an error.
const LINE_BYTES_MAX: u64 = 16 << 10;
/// Answers within one answer: keys of a step of a scan, many times over.
const ARRAY_MAX: usize = 1 << 16;
/// How deep arrays lie in arrays: a scan's keys lie in its answer.
const DEPTH_MAX: usize = 2;
/// Memory that a connection keeps between two objects.
const SPARE_BYTES_MAX: usize = 64 << 20;
/// Small things are gathered to this before they are sent, and received in steps of it.
const BUFFER_BYTES: usize = 64 << 10;

/// Why a connection did not do what was asked.
#[derive(Debug)]
pub(super) enum Fault {
    /// The call's time is over.
    Late,
    /// The socket's word.
    Socket(io::Error),
    /// The server answers an error. The connection goes on if nothing else is awaited.
    Refused(String),
    /// No answer of a Redis server.
    Garbled(&'static str),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        Fault::Socket(error)
    }
}

impl Fault {
    /// Whether this is how a connection looks that the server closed while nobody used it.
    pub(super) fn is_closed(&self) -> bool {
        let Fault::Socket(error) = self else { return false };
        matches!(
            error.kind(),
            ErrorKind::UnexpectedEof
                | ErrorKind::ConnectionReset
                | ErrorKind::ConnectionAborted
                | ErrorKind::BrokenPipe
        )
    }
}

/// What a server says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Status(String),
    Number(i64),
    String(Option<Vec<u8>>),
    Array(Vec<Answer>),
}

pub(super) struct Connection {
    stream: BufReader<Stream>,
    unsent: Vec<u8>,
    /// Commands whose answers have not come.
    awaited: usize,
    /// Since it was last taken up.
    answered: usize,
    /// Memory of the object before, for the next: fresh pages for each cost as much as opening it.
    spare: Vec<u8>,
}

impl Connection {
    /// Connects and shows the password.
    pub(super) fn open(server: &Server, until: Instant) -> Result<Connection, Fault> {
        let socket = server.connect(until)?;
        socket.set_nodelay(true)?;
        let line = Line {
            socket,
            until,
            patience: server.patience,
        };
        let stream = match &server.tls {
            None => Stream::Plain(line),
            Some(tls) => {
                let session = ClientConnection::new(tls.config.clone(), tls.name.clone()).map_err(io::Error::other)?;
                Stream::Tls(Box::new(StreamOwned::new(session, line)))
            }
        };
        let mut connection = Connection {
            stream: BufReader::with_capacity(BUFFER_BYTES, stream),
            unsent: Vec::new(),
            awaited: 0,
            answered: 0,
            spare: Vec::new(),
        };
        connection.introduce(server)?;
        Ok(connection)
    }

    fn introduce(&mut self, server: &Server) -> Result<(), Fault> {
        if let Some(password) = &server.password {
            match &server.user {
                Some(user) => self.ask(&[b"AUTH", user.as_bytes(), password.as_bytes()])?,
                None => self.ask(&[b"AUTH", password.as_bytes()])?,
            }
            self.flush()?;
            self.done().map_err(|fault| match fault {
                // A server may say what it was asked: only its first word is passed on.
                Fault::Refused(reason) => Fault::Refused(format!(
                    "{}: the user and the password are not accepted, see user and password in its address",
                    reason.split(' ').next().unwrap_or_default()
                )),
                other => other,
            })?;
        }
        if server.database != 0 {
            self.ask(&[b"SELECT", server.database.to_string().as_bytes()])?;
            self.flush()?;
            self.done()?;
        }
        Ok(())
    }

    /// Every wait from now on ends then.
    pub(super) fn begin(&mut self, until: Instant) {
        self.stream.get_mut().line_mut().until = until;
        self.answered = 0;
    }

    /// Whether the server has not closed it, nor said anything unasked, as far as can be told at once.
    pub(super) fn is_quiet(&mut self) -> bool {
        let is_tls = matches!(self.stream.get_ref(), Stream::Tls(_));
        let socket = &self.stream.get_mut().line_mut().socket;
        let looked = socket.set_nonblocking(true).and_then(|()| {
            let looked = socket.peek(&mut [0]);
            socket.set_nonblocking(false)?;
            looked
        });
        match looked {
            // A session ticket may have come after the handshake.
            Ok(bytes) => bytes > 0 && is_tls,
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        }
    }

    /// Whether every answer came and nothing else, so that the next one belongs to the next command.
    pub(super) fn is_settled(&self) -> bool {
        self.awaited == 0 && self.unsent.is_empty() && self.stream.buffer().is_empty()
    }

    /// Answers since it was taken up.
    pub(super) fn answered(&self) -> usize {
        self.answered
    }

    /// Puts a command behind those that are to be sent; a long part goes at once, without being copied.
    pub(super) fn ask(&mut self, parts: &[&[u8]]) -> Result<(), Fault> {
        self.awaited += 1;
        write!(self.unsent, "*{}\r\n", parts.len())?;
        for part in parts {
            write!(self.unsent, "${}\r\n", part.len())?;
            if part.len() + self.unsent.len() > BUFFER_BYTES {
                self.flush()?;
                self.stream.get_mut().write_all(part)?;
            } else {
                self.unsent.extend_from_slice(part);
            }
            self.unsent.extend_from_slice(b"\r\n");
        }
        Ok(())
    }

    /// Sends what was asked.
    pub(super) fn flush(&mut self) -> Result<(), Fault> {
        let stream = self.stream.get_mut();
        stream.write_all(&self.unsent)?;
        self.unsent.clear();
        // What TLS holds back is sent, too.
        Ok(stream.flush()?)
    }

    /// The next answer.
    pub(super) fn answer(&mut self) -> Result<Answer, Fault> {
        assert!(self.awaited > 0, "an answer to nothing");
        let answer = read_answer(&mut self.stream, &mut self.spare, 0);
        if matches!(answer, Ok(_) | Err(Fault::Refused(_))) {
            self.awaited -= 1;
            self.answered += 1;
        }
        answer
    }

    /// The next answer, which says that it was done.
    pub(super) fn done(&mut self) -> Result<(), Fault> {
        match self.answer()? {
            Answer::Status(_) => Ok(()),
            _ => Err(Fault::Garbled("something else than a status")),
        }
    }

    /// The next answer, a count.
    pub(super) fn number(&mut self) -> Result<u64, Fault> {
        match self.answer()? {
            Answer::Number(number) => u64::try_from(number).map_err(|_| Fault::Garbled("a count below zero")),
            _ => Err(Fault::Garbled("something else than a number")),
        }
    }

    /// The next answer, a string or none.
    pub(super) fn string(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        match self.answer()? {
            Answer::String(string) => Ok(string),
            _ => Err(Fault::Garbled("something else than a string")),
        }
    }

    /// Takes a string back whose memory nobody needs any more.
    pub(super) fn keep(&mut self, string: Vec<u8>) {
        if !string.is_empty() && string.capacity() <= SPARE_BYTES_MAX {
            self.spare = string;
        }
    }
}

/// An error that the server answers is one only outside an array.
fn read_answer(stream: &mut impl BufRead, spare: &mut Vec<u8>, depth: usize) -> Result<Answer, Fault> {
    let line = read_line(stream)?;
    let (kind, rest) = line.split_first().ok_or(Fault::Garbled("an empty line"))?;
    let text = || String::from_utf8_lossy(rest).into_owned();
    match kind {
        b'+' => Ok(Answer::Status(text())),
        b'-' if depth == 0 => Err(Fault::Refused(text())),
        b':' => Ok(Answer::Number(number(rest)?)),
        b'$' => match number(rest)? {
            -1 => Ok(Answer::String(None)),
            length => read_string(stream, spare, length).map(|string| Answer::String(Some(string))),
        },
        b'*' if depth < DEPTH_MAX => {
            let count = usize::try_from(number(rest)?).ok().filter(|count| *count <= ARRAY_MAX);
            let count = count.ok_or(Fault::Garbled("an array of no such length"))?;
            (0..count)
                .map(|_| read_answer(stream, spare, depth + 1))
                .collect::<Result<Vec<_>, _>>()
                .map(Answer::Array)
        }
        _ => Err(Fault::Garbled("no answer of this protocol")),
    }
}

fn read_line(stream: &mut impl BufRead) -> Result<Vec<u8>, Fault> {
    let mut line = Vec::new();
    stream.take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
    match line.strip_suffix(b"\r\n") {
        Some(text) => {
            line.truncate(text.len());
            Ok(line)
        }
        None if line.last() == Some(&b'\n') || line.len() as u64 == LINE_BYTES_MAX => {
            Err(Fault::Garbled("a line that does not end as lines do"))
        }
        None => Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
    }
}

fn read_string(stream: &mut impl BufRead, spare: &mut Vec<u8>, length: i64) -> Result<Vec<u8>, Fault> {
    let length = usize::try_from(length)
        .ok()
        .filter(|length| *length <= STRING_BYTES_MAX)
        .ok_or(Fault::Garbled("a string of no such length"))?;
    let mut string = std::mem::take(spare);
    if string.capacity() < length {
        // Zeroed memory takes no pages before something is read into it, so a length alone costs nothing.
        string = vec![0; length];
    }
    string.resize(length, 0);
    stream.read_exact(&mut string)?;
    let mut end = [0; 2];
    stream.read_exact(&mut end)?;
    if end != *b"\r\n" {
        return Err(Fault::Garbled("a string that does not end where it should"));
    }
    Ok(string)
}

fn number(digits: &[u8]) -> Result<i64, Fault> {
    std::str::from_utf8(digits)
        .ok()
        .and_then(|digits| digits.parse().ok())
        .ok_or(Fault::Garbled("a number that is none"))
}

enum Stream {
    Plain(Line),
    Tls(Box<StreamOwned<ClientConnection, Line>>),
}

impl Stream {
    fn line_mut(&mut self) -> &mut Line {
        match self {
            Stream::Plain(line) => line,
            Stream::Tls(stream) => &mut stream.sock,
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(line) => line.read(buffer),
            Stream::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(line) => line.write(bytes),
            Stream::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(_) => Ok(()),
            Stream::Tls(stream) => stream.flush(),
        }
    }
}

/// A socket on which each wait ends: with the call, or before it when the server stalls.
struct Line {
    socket: TcpStream,
    until: Instant,
    patience: Duration,
}

impl Line {
    fn left(&self) -> io::Result<Duration> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        Ok(left.min(self.patience))
    }
}

/// A socket whose time limit passed says that it would block.
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
        _ => error,
    }
}

impl Read for Line {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(self.left()?))?;
        self.socket.read(buffer).map_err(timed_out)
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(self.left()?))?;
        self.socket.write(bytes).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(mut bytes: &[u8]) -> Result<Answer, Fault> {
        let answer = read_answer(&mut bytes, &mut Vec::new(), 0)?;
        assert!(bytes.is_empty(), "{} bytes are left", bytes.len());
        Ok(answer)
    }

    #[test]
    fn answers_are_read_as_the_protocol_has_them() {
        let string = |text: &str| Answer::String(Some(text.as_bytes().to_vec()));
        assert_eq!(read(b"+OK\r\n").unwrap(), Answer::Status("OK".to_owned()));
        assert_eq!(read(b":-7\r\n").unwrap(), Answer::Number(-7));
        assert_eq!(read(b"$-1\r\n").unwrap(), Answer::String(None));
        assert_eq!(read(b"$0\r\n\r\n").unwrap(), string(""));
        assert_eq!(read(b"$4\r\na\r\nb\r\n").unwrap(), string("a\r\nb"));
        let scan = Answer::Array(vec![string("17"), Answer::Array(vec![string("a"), string("b")])]);
        assert_eq!(read(b"*2\r\n$2\r\n17\r\n*2\r\n$1\r\na\r\n$1\r\nb\r\n").unwrap(), scan);
        assert!(matches!(read(b"-OOM not now\r\n"), Err(Fault::Refused(reason)) if reason == "OOM not now"));
    }

    #[test]
    fn memory_that_is_used_again_holds_nothing_of_what_was_in_it() {
        let mut spare = Vec::new();
        for text in ["abcdef", "xy", "", "0123456789", "pqr"] {
            let bytes = format!("${}\r\n{text}\r\n", text.len());
            let answer = read_answer(&mut bytes.as_bytes(), &mut spare, 0).unwrap();
            let Answer::String(Some(string)) = answer else {
                panic!("{answer:?}")
            };
            assert_eq!(string, text.as_bytes());
            spare = string;
        }
        spare = b"secret".to_vec();
        assert!(read_answer(&mut &b"$4\r\nab"[..], &mut spare, 0).is_err());
        assert!(spare.is_empty());
    }

    #[test]
    fn what_no_server_says_is_refused_before_memory_is_taken() {
        let line = [b"+", "x".repeat(20_000).as_bytes(), b"\r\n"].concat();
        let deep = "*1\r\n".repeat(1000);
        for bytes in [
            &b"HTTP/1.1 400 Bad Request\r\n"[..],
            b"\r\n",
            b"+OK\n",
            b"$536870913\r\n",
            b"$-2\r\n",
            b"$x\r\n",
            b"$1\r\nab\r\n",
            b"*-1\r\n",
            b"*65537\r\n",
            b":\r\n",
            b"*1\r\n-ERR within\r\n",
            &line,
            deep.as_bytes(),
        ] {
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]);
            assert!(matches!(read(bytes), Err(Fault::Garbled(_))), "{text:?}");
        }
        for cut in [&b""[..], b"+O", b"$5\r\nab", b"$2\r\nab\r", b"*2\r\n:1\r\n"] {
            assert!(read(cut).is_err_and(|fault| fault.is_closed()), "{cut:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), first in 0..6usize) {
            let bytes = [&b"+-:$*x"[first..=first], &bytes].concat();
            let _ = read_answer(&mut &bytes[..], &mut Vec::new(), 0);
        }
    }
}
