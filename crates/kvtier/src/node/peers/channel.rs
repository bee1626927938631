//! An authenticated channel of messages to one peer, over TCP.
//!
//! Little-endian. Each side draws a nonce and proves that it knows the secret of the cluster, before anything else is
//! said; a frame carries a code under a key of its connection, direction and place, so that none can be altered, repeated
//! or left out. All of it lies within TLS where the settings name certificates; otherwise nothing is encrypted.
//!
//! ```text
//! greeting, both ways   "kvtierP1" (8), nonce (32)
//! proof                 keyed BLAKE3 of the side's name and both nonces (32); the listener's first
//! frame                 length u32, code (16), body (length bytes)
//! ```

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use kvtier_transfer::tcp::{self, Tls};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Longest body of a frame, bytes.
pub(super) const FRAME_BYTES_MAX: usize = 4 << 20;

const MAGIC: &[u8; 8] = b"kvtierP1";
/// What a record of TLS begins with that says why nothing follows.
const TLS_ALERT: u8 = 21;
const NONCE_BYTES: usize = 32;
const CODE_BYTES: usize = 16;

/// What all members of a cluster know, and nobody else.
#[derive(Clone)]
pub(crate) struct ClusterSecret(Zeroizing<[u8; 32]>);

impl ClusterSecret {
    /// From what the operator wrote. The settings always name one.
    pub(crate) fn new(bytes: Option<&[u8]>) -> ClusterSecret {
        ClusterSecret(Zeroizing::new(blake3::derive_key(
            "kvtier peers 2026-11 cluster secret",
            bytes.unwrap_or_default(),
        )))
    }

    /// For the transport that moves the bytes.
    pub(crate) fn for_transport(&self) -> [u8; 32] {
        blake3::derive_key("kvtier peers 2026-11 transport secret", &*self.0)
    }

    /// Names something to members alone.
    #[cfg(feature = "remote")]
    pub(super) fn print_of(&self, name: &str) -> [u8; 32] {
        let key = blake3::derive_key("kvtier peers 2026-11 names of shared objects", &*self.0);
        blake3::keyed_hash(&key, name.as_bytes()).into()
    }

    fn prove(&self, side: &[u8], nonces: &[u8; 2 * NONCE_BYTES]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(side);
        hasher.update(nonces);
        hasher.finalize().into()
    }
}

/// One end of a connection, not yet split into its two directions.
pub(super) struct Channel {
    stream: Arc<tcp::Channel>,
    outgoing: [u8; 32],
    incoming: [u8; 32],
}

/// Sends frames.
pub(super) struct FrameWriter {
    stream: Arc<tcp::Channel>,
    key: [u8; 32],
    sent: u64,
}

/// Receives frames.
pub(super) struct FrameReader {
    stream: Arc<tcp::Channel>,
    key: [u8; 32],
    received: u64,
    buffer: Vec<u8>,
}

/// What both ends have to know, or to show.
#[derive(Clone)]
pub(super) struct Credentials {
    pub(super) secret: ClusterSecret,
    pub(super) tls: Option<Tls>,
}

impl Channel {
    /// The side that called `address`.
    pub(super) fn call(
        stream: TcpStream,
        address: SocketAddr,
        credentials: &Credentials,
        patience: Duration,
    ) -> io::Result<Channel> {
        let stream = Arc::new(prepared(stream, patience)?);
        let stream = tcp::Channel::call(stream, credentials.tls.as_ref(), address)?;
        Channel::introduce(stream, &credentials.secret, true)
    }

    /// The side that was called.
    pub(super) fn answer(stream: TcpStream, credentials: &Credentials, patience: Duration) -> io::Result<Channel> {
        let stream = Arc::new(prepared(stream, patience)?);
        let stream = tcp::Channel::answer(stream, credentials.tls.as_ref())?;
        Channel::introduce(stream, &credentials.secret, false)
    }

    fn introduce(stream: tcp::Channel, secret: &ClusterSecret, calls: bool) -> io::Result<Channel> {
        let mut mine = [0; NONCE_BYTES];
        getrandom::fill(&mut mine).map_err(io::Error::other)?;
        let mut greeting = MAGIC.to_vec();
        greeting.extend(mine);
        (&stream).write_all(&greeting)?;
        let mut theirs = [0; 8 + NONCE_BYTES];
        // With TLS 1.3 whoever calls learns here that its certificate is refused.
        (&stream).read_exact(&mut theirs[..1])?;
        if theirs[0] != TLS_ALERT {
            (&stream).read_exact(&mut theirs[1..8])?;
        }
        if theirs[0] == TLS_ALERT {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "it wants TLS: give this node peer_tls_certificate_file, peer_tls_key_file and peer_tls_ca_file",
            ));
        }
        (&stream).read_exact(&mut theirs[8..])?;
        if &theirs[..8] != MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "what answers there is no kvtier peer, or of another version",
            ));
        }
        let mut nonces = [0; 2 * NONCE_BYTES];
        let (first, second) = nonces.split_at_mut(NONCE_BYTES);
        let (caller, listener) = if calls { (first, second) } else { (second, first) };
        caller.copy_from_slice(&mine);
        listener.copy_from_slice(&theirs[8..]);
        let (own_side, other_side): (&[u8], &[u8]) = if calls {
            (b"caller", b"listener")
        } else {
            (b"listener", b"caller")
        };
        let own = secret.prove(own_side, &nonces);
        let expected = secret.prove(other_side, &nonces);
        let mut shown = [0; 32];
        if !calls {
            (&stream).write_all(&own)?;
        }
        (&stream).read_exact(&mut shown)?;
        if !bool::from(shown.ct_eq(&expected)) {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "it does not know the cluster's secret: give every member the same peer_secret_file",
            ));
        }
        if calls {
            (&stream).write_all(&own)?;
        }
        stream.stream().set_read_timeout(None)?;
        let key = |side: &[u8]| {
            let proved = secret.prove(&[b"frames of the ", side].concat(), &nonces);
            blake3::derive_key("kvtier peers 2026-11 frames", &proved)
        };
        Ok(Channel {
            stream: Arc::new(stream),
            outgoing: key(own_side),
            incoming: key(other_side),
        })
    }

    /// Its two directions, and a handle that ends both.
    pub(super) fn split(self) -> (FrameWriter, FrameReader, Arc<TcpStream>) {
        let writer = FrameWriter {
            stream: Arc::clone(&self.stream),
            key: self.outgoing,
            sent: 0,
        };
        let reader = FrameReader {
            stream: Arc::clone(&self.stream),
            key: self.incoming,
            received: 0,
            buffer: Vec::new(),
        };
        (writer, reader, Arc::clone(self.stream.stream()))
    }
}

fn prepared(stream: TcpStream, patience: Duration) -> io::Result<TcpStream> {
    keep_alive(&stream)?;
    stream.set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
    stream.set_write_timeout(Some(patience.max(Duration::from_millis(1))))?;
    Ok(stream)
}

/// No delays, a sign of life while idle, an end when the network has gone silent.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(2))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, 10_000)?;
    Ok(())
}

fn code(key: &[u8; 32], place: u64, body: &[u8]) -> [u8; CODE_BYTES] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&place.to_le_bytes());
    hasher.update(body);
    let mut code = [0; CODE_BYTES];
    code.copy_from_slice(&hasher.finalize().as_bytes()[..CODE_BYTES]);
    code
}

impl FrameWriter {
    /// Sends one frame.
    pub(super) fn send(&mut self, body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(body.len()).map_err(io::Error::other)?;
        if body.len() > FRAME_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a frame that is too long"));
        }
        let mut frame = Vec::with_capacity(4 + CODE_BYTES + body.len());
        frame.extend(length.to_le_bytes());
        frame.extend(code(&self.key, self.sent, body));
        frame.extend(body);
        self.sent += 1;
        (&*self.stream).write_all(&frame).inspect_err(|_| {
            // Half a frame may be out: nothing can follow it.
            let _ = self.stream.stream().shutdown(Shutdown::Both);
        })
    }
}

impl FrameReader {
    /// The next frame's body. Waits for it.
    pub(super) fn receive(&mut self) -> io::Result<&[u8]> {
        let mut head = [0; 4 + CODE_BYTES];
        (&*self.stream).read_exact(&mut head)?;
        let (length, shown) = head.split_at(4);
        let length = u32::from_le_bytes(length.try_into().unwrap_or_default()) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame that is too long"));
        }
        self.buffer.resize(length, 0);
        (&*self.stream).read_exact(&mut self.buffer)?;
        let expected = code(&self.key, self.received, &self.buffer);
        if !bool::from(expected.as_slice().ct_eq(shown)) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame that was altered"));
        }
        self.received += 1;
        Ok(&self.buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn knowing(secret: Option<&[u8]>) -> Credentials {
        Credentials {
            secret: ClusterSecret::new(secret),
            tls: None,
        }
    }

    fn both(
        caller: Option<&'static [u8]>,
        listener: Option<&'static [u8]>,
    ) -> (io::Result<Channel>, io::Result<Channel>) {
        let socket = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let address = socket.local_addr().expect("bound");
        let answering = thread::spawn(move || {
            let (stream, _) = socket.accept().expect("a caller");
            Channel::answer(stream, &knowing(listener), PATIENCE)
        });
        let stream = TcpStream::connect(address).expect("listening");
        let called = Channel::call(stream, address, &knowing(caller), PATIENCE);
        (called, answering.join().expect("no panic"))
    }

    #[test]
    fn both_ends_with_the_secret_talk() {
        let (caller, listener) = both(Some(b"one"), Some(b"one"));
        let (mut writer, _, _) = caller.expect("accepted").split();
        let (_, mut reader, _) = listener.expect("accepted").split();
        for body in [&b"first"[..], b"", &[7; 100_000]] {
            writer.send(body).expect("sent");
            assert_eq!(reader.receive().expect("received"), body);
        }
    }

    #[test]
    fn another_secret_or_none_is_refused_before_anything_is_said() {
        for listener in [None, Some(&b"two"[..])] {
            let (caller, answering) = both(Some(b"one"), listener);
            let denied = caller.err().expect("refused");
            assert_eq!(denied.kind(), io::ErrorKind::PermissionDenied);
            assert!(answering.is_err());
        }
    }

    #[test]
    fn a_frame_that_was_altered_repeated_or_dropped_is_refused() {
        let key = [1; 32];
        let whole = code(&key, 0, b"body");
        assert_ne!(whole, code(&key, 0, b"bodx"));
        assert_ne!(whole, code(&key, 1, b"body"));
        let (caller, listener) = both(None, None);
        let (mut writer, _, stream) = caller.expect("accepted").split();
        let (_, mut reader, _) = listener.expect("accepted").split();
        writer.send(b"once").expect("sent");
        assert!(reader.receive().is_ok());
        let mut again = 4u32.to_le_bytes().to_vec();
        again.extend(code(&writer.key, 0, b"once"));
        again.extend(b"once");
        (&*stream).write_all(&again).expect("sent");
        assert_eq!(
            reader.receive().expect_err("repeated").kind(),
            io::ErrorKind::InvalidData
        );
    }
}
