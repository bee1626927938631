//! A small HTTP/1.1 client for the admin server: one request a connection, bounded in time and size.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// Bytes of a head; a longer one is no answer of ours.
const HEAD_BYTES_MAX: u64 = 64 << 10;

/// Bytes of a body: a list of every job or namespace fits.
const BODY_BYTES_MAX: u64 = 256 << 20;

/// Where a server is: `http://HOST[:PORT]` or `https://HOST[:PORT]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    tls: bool,
    host: String,
    port: u16,
}

impl Origin {
    /// Reads a URL without a path; without a scheme it is `http`.
    ///
    /// # Errors
    /// In words.
    pub(super) fn parse(text: &str) -> Result<Origin, String> {
        let (tls, rest) = match text.split_once("://") {
            None => (false, text),
            Some(("http", rest)) => (false, rest),
            Some(("https", rest)) => (true, rest),
            Some((scheme, _)) => return Err(format!("{scheme} is not spoken here: write http:// or https://")),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                let port = port.parse().map_err(|_| format!("{port:?} is no port"))?;
                (host, port)
            }
            _ => (authority, if tls { 443 } else { 80 }),
        };
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if bare.is_empty() || bare.contains(['/', '?', '#', '@', ' ', '\r', '\n']) {
            return Err("write http://HOST:PORT or https://HOST:PORT".to_string());
        }
        Ok(Origin {
            tls,
            host: bare.to_string(),
            port,
        })
    }

    /// Whether what is sent there can be read on the way.
    pub(super) fn is_in_the_clear(&self) -> bool {
        let on_this_machine = self.host.eq_ignore_ascii_case("localhost")
            || self.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        !self.tls && !on_this_machine
    }

    /// Whether it speaks TLS.
    pub(super) fn is_tls(&self) -> bool {
        self.tls
    }

    fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }
}

/// What a server said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The status code.
    pub(super) status: u16,
    /// The body.
    pub(super) body: Vec<u8>,
}

/// Whom to believe, and what to show, in TLS.
///
/// # Errors
/// In words: which file cannot be used.
pub(super) fn tls_config(ca: &Path, client: Option<(&Path, &Path)>) -> Result<ClientConfig, String> {
    let certificates = |path: &Path| -> Result<Vec<CertificateDer<'static>>, String> {
        CertificateDer::pem_file_iter(path)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| format!("{}: no certificates in PEM can be read: {error}", path.display()))
    };
    let mut roots = RootCertStore::empty();
    for root in certificates(ca)? {
        roots.add(root).map_err(|error| format!("{}: {error}", ca.display()))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    match client {
        None => Ok(builder.with_no_client_auth()),
        Some((certificate, key)) => {
            let secret = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| format!("{}: no private key in PEM can be read: {error}", key.display()))?;
            builder
                .with_client_auth_cert(certificates(certificate)?, secret)
                .map_err(|error| format!("{}: {error}", certificate.display()))
        }
    }
}

/// Sends one request and reads its answer.
///
/// # Errors
/// When there is no server, or none that speaks HTTP.
pub(super) fn ask(
    origin: &Origin,
    tls: Option<&Arc<ClientConfig>>,
    timeout: Duration,
    (method, path): (&str, &str),
    token: Option<&str>,
    body: Option<&str>,
) -> io::Result<Answer> {
    let stream = connect(origin, timeout)?;
    let mut request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n",
        origin.authority()
    );
    if let Some(token) = token {
        request.push_str(&format!("Authorization: Bearer {token}\r\n"));
    }
    if body.is_some() {
        request.push_str("Content-Type: application/json\r\n");
    }
    let body = body.unwrap_or_default();
    request.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
    match tls {
        Some(config) if origin.tls => {
            let name = ServerName::try_from(origin.host.clone()).map_err(io::Error::other)?;
            let session = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
            exchange(StreamOwned::new(session, stream), &request)
        }
        None if origin.tls => Err(io::Error::other("an https server needs the certificates to believe")),
        _ => exchange(stream, &request),
    }
}

fn connect(origin: &Origin, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (origin.host.as_str(), origin.port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => {
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn exchange(mut stream: impl Read + Write, request: &str) -> io::Result<Answer> {
    stream.write_all(request.as_bytes())?;
    stream.flush()?;
    read_answer(BufReader::new(stream))
}

fn read_answer(mut reader: impl BufRead) -> io::Result<Answer> {
    loop {
        let mut head = reader.by_ref().take(HEAD_BYTES_MAX);
        let status = read_line(&mut head)?
            .strip_prefix("HTTP/1.")
            .and_then(|rest| rest.get(2..5)?.parse::<u16>().ok())
            .ok_or_else(|| bad("the other end speaks no HTTP/1.1"))?;
        let mut length = None;
        let mut chunked = false;
        loop {
            let line = read_line(&mut head)?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').ok_or_else(|| bad("a header without a name"))?;
            let value = value.trim();
            if name.eq_ignore_ascii_case("content-length") {
                length = Some(value.parse::<u64>().map_err(|_| bad("a length that is no number"))?);
            }
            if name.eq_ignore_ascii_case("transfer-encoding") {
                chunked = value.eq_ignore_ascii_case("chunked");
            }
        }
        if (100..200).contains(&status) {
            continue;
        }
        let body = match length {
            _ if chunked => read_chunks(&mut reader)?,
            _ if status == 204 => Vec::new(),
            Some(length) => read_exactly(&mut reader, length, 0)?,
            None => read_to_end(&mut reader)?,
        };
        return Ok(Answer { status, body });
    }
}

fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return Err(bad("the answer ended early, or its head is too long"));
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    String::from_utf8(line).map_err(|_| bad("a head that is no text"))
}

fn read_chunks(reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = read_line(&mut reader.by_ref().take(HEAD_BYTES_MAX))?;
        let digits = line.split(';').next().unwrap_or_default().trim();
        let length = u64::from_str_radix(digits, 16).map_err(|_| bad("a chunk without a length"))?;
        if length == 0 {
            while !read_line(&mut reader.by_ref().take(HEAD_BYTES_MAX))?.is_empty() {}
            return Ok(body);
        }
        let chunk = read_exactly(reader, length, body.len() as u64)?;
        body.extend_from_slice(&chunk);
        if !read_line(&mut reader.by_ref().take(HEAD_BYTES_MAX))?.is_empty() {
            return Err(bad("a chunk that is longer than it says"));
        }
    }
}

fn read_exactly(reader: &mut impl BufRead, length: u64, before: u64) -> io::Result<Vec<u8>> {
    if length.checked_add(before).is_none_or(|total| total > BODY_BYTES_MAX) {
        return Err(bad("the answer is too long"));
    }
    let mut bytes = Vec::new();
    reader.by_ref().take(length).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != length {
        return Err(bad("the answer ended early"));
    }
    Ok(bytes)
}

fn read_to_end(reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let length = reader.by_ref().take(BODY_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if length as u64 > BODY_BYTES_MAX {
        return Err(bad("the answer is too long"));
    }
    Ok(bytes)
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> io::Result<Answer> {
        read_answer(text.as_bytes())
    }

    fn body(text: &str) -> Vec<u8> {
        read(text).unwrap().body
    }

    #[test]
    fn bodies_are_read_by_length_in_chunks_and_to_the_end() {
        assert_eq!(body("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcd"), b"abc");
        assert_eq!(
            body(
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nt: 1\r\n\r\n"
            ),
            b"abc0123456789"
        );
        assert_eq!(body("HTTP/1.0 200 OK\n\nabc"), b"abc");
        let answer = read("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n").unwrap();
        assert_eq!((answer.status, answer.body.len()), (204, 0));
    }

    #[test]
    fn what_is_no_answer_is_an_error_and_never_an_endless_read() {
        for text in [
            "",
            "SSH-2.0-x\r\n",
            "HTTP/1.1 2",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab",
            "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
            "HTTP/1.1 ü00\r\n\r\n",
        ] {
            assert!(read(text).is_err(), "{text:?}");
        }
        let endless = format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(1 << 20));
        assert!(read(&endless).is_err());
    }

    #[test]
    fn origins_are_read_and_tokens_travel_in_the_clear_on_this_machine_only() {
        let origin = |text: &str| Origin::parse(text).unwrap();
        assert_eq!(origin("127.0.0.1:9640").authority(), "127.0.0.1:9640");
        assert_eq!(origin("http://[::1]:80/").authority(), "[::1]:80");
        assert_eq!(origin("https://kv.example.org").authority(), "kv.example.org:443");
        for (text, clear) in [
            ("127.0.0.1:1", false),
            ("http://localhost:1", false),
            ("http://[::1]", false),
            ("http://kv.example.org", true),
            ("http://10.0.0.1:80", true),
            ("https://kv.example.org", false),
        ] {
            assert_eq!(origin(text).is_in_the_clear(), clear, "{text}");
        }
        for wrong in [
            "",
            "ftp://a",
            "http://a:x",
            "http://a/b",
            "http://u@a",
            "http://:1",
            "a b:1",
        ] {
            assert!(Origin::parse(wrong).is_err(), "{wrong}");
        }
    }
}
