//! A real Redis server. `cargo xtask test remote` names one in `KVTIER_REDIS_SERVER`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::peers::until;

pub(crate) const PASSWORD: &str = "the servers password";

/// A server of one test. Killed when dropped.
pub(crate) struct Redis {
    pub(crate) child: Child,
    pub(crate) port: u16,
    directory: TempDir,
}

impl Redis {
    /// On a port of its own, or on this one; `None` where there is no server to start.
    pub(crate) fn start(port: Option<u16>) -> Option<Redis> {
        let Some(program) = std::env::var_os("KVTIER_REDIS_SERVER") else {
            eprintln!("skipped: redis: no server is named; cargo xtask test remote brings one");
            return None;
        };
        let port = port.unwrap_or_else(|| {
            let free = TcpListener::bind("127.0.0.1:0").expect("a port");
            free.local_addr().expect("bound").port()
        });
        let directory = crate::daemon::directory();
        let file = directory.path().join("redis.conf");
        let settings = format!("bind 127.0.0.1\nport {port}\nsave \"\"\nrequirepass \"{PASSWORD}\"\n");
        std::fs::write(&file, settings).expect("written");
        std::fs::write(directory.path().join("password"), PASSWORD).expect("written");
        let mut command = Command::new(program);
        if let Some(libraries) = std::env::var_os("KVTIER_REDIS_LIBRARIES") {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        let child = command
            .arg(&file)
            .current_dir(directory.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server starts");
        let redis = Redis { child, port, directory };
        until("redis listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Some(redis)
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(crate) fn password_file(&self) -> std::path::PathBuf {
        Path::join(self.directory.path(), "password")
    }

    pub(crate) fn kill(mut self) -> u16 {
        self.child.kill().expect("killed");
        self.child.wait().expect("gone");
        self.port
    }

    /// Everything that it keeps, by key.
    pub(crate) fn content(&self) -> Vec<(String, Vec<u8>)> {
        let mut session = Session::open(self.port);
        let keys = session.ask(&[b"KEYS", b"*"]);
        keys.into_iter()
            .map(|key| {
                let value = session.ask(&[b"GET", &key]).remove(0);
                (String::from_utf8(key).expect("printable"), value)
            })
            .collect()
    }

    /// Has it refuse whatever would take more memory.
    pub(crate) fn fill_up(&self) {
        Session::open(self.port).ask(&[b"CONFIG", b"SET", b"maxmemory", b"1"]);
    }

    pub(crate) fn set(&self, key: &str, value: &[u8]) {
        Session::open(self.port).ask(&[b"SET", key.as_bytes(), value]);
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// As much of the protocol as a test needs.
struct Session(BufReader<TcpStream>);

impl Session {
    fn open(port: u16) -> Session {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("connected");
        let mut session = Session(BufReader::new(stream));
        session.ask(&[b"AUTH", PASSWORD.as_bytes()]);
        session
    }

    fn ask(&mut self, words: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut question = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            question.extend(format!("${}\r\n", word.len()).bytes());
            question.extend_from_slice(word);
            question.extend(b"\r\n");
        }
        self.0.get_mut().write_all(&question).expect("sent");
        let first = self.line();
        let count = |line: &str| line[1..].parse::<usize>().expect("a count");
        match first.as_bytes()[0] {
            b'*' => (0..count(&first)).map(|_| self.string()).collect(),
            b'$' => vec![self.body(count(&first))],
            b'+' | b':' => Vec::new(),
            _ => panic!("{first}"),
        }
    }

    fn string(&mut self) -> Vec<u8> {
        let line = self.line();
        self.body(line[1..].parse().expect("a length"))
    }

    fn body(&mut self, length: usize) -> Vec<u8> {
        let mut body = vec![0; length + 2];
        self.0.read_exact(&mut body).expect("a body");
        body.truncate(length);
        body
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }
}
