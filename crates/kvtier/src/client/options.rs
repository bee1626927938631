use std::path::PathBuf;
use std::time::Duration;

/// How to reach a node, and how long to wait for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// Path of the node's Unix socket.
    pub socket: PathBuf,
    /// Names a trust domain by its token; `None`: the user id does.
    pub token: Option<Vec<u8>>,
    /// How long one request may take, at the node and on the way. Default 10 s.
    pub timeout: Duration,
    /// How long a flush may take: it writes everything. Default 10 minutes.
    pub flush_timeout: Duration,
    /// Bytes of slots held ready for each block size, so that small puts take one trip. Default 1 MiB; 0 asks for none.
    ///
    /// The node counts them as reservations of this client. Those unused for 2 s, or for half of their lifetime, are given back.
    pub ahead_bytes_max: u32,
    /// Most bytes that one trip of a put holds unsealed; larger puts take several. Default 32 MiB.
    pub put_bytes_max: usize,
    /// Keys remembered as present, so that putting them again moves no bytes. Default 65,536, about 3 MiB when full.
    pub known_keys_max: usize,
}

impl ClientOptions {
    /// The defaults for a socket.
    pub fn new(socket: impl Into<PathBuf>) -> ClientOptions {
        ClientOptions {
            socket: socket.into(),
            token: None,
            timeout: Duration::from_secs(10),
            flush_timeout: Duration::from_secs(600),
            ahead_bytes_max: 1 << 20,
            put_bytes_max: 32 << 20,
            known_keys_max: 65_536,
        }
    }

    /// The same with a token.
    #[must_use]
    pub fn with_token(self, token: impl Into<Vec<u8>>) -> ClientOptions {
        ClientOptions {
            token: Some(token.into()),
            ..self
        }
    }

    /// The same with another timeout.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> ClientOptions {
        ClientOptions { timeout, ..self }
    }
}
