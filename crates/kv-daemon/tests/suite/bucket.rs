//! A bucket of a real S3 server. `cargo xtask test remote` names one in `KVTIER_S3_ENDPOINT`, and its keys in `KVTIER_S3_CREDENTIALS`. Requests
//! are signed here by hand (Signature Version 4): what the daemon's library believes of the protocol is not taken for granted.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::SystemTime;

use aws_lc_rs::{digest, hmac};

/// A bucket of one test.
pub(crate) struct Bucket {
    pub(crate) port: u16,
    pub(crate) name: String,
    pub(crate) credentials: PathBuf,
    key: String,
    secret: String,
}

impl Bucket {
    /// `None` where there is no server.
    pub(crate) fn start(name: &str) -> Option<Bucket> {
        let (Ok(endpoint), Ok(credentials)) = (
            std::env::var("KVTIER_S3_ENDPOINT"),
            std::env::var("KVTIER_S3_CREDENTIALS"),
        ) else {
            eprintln!("skipped: S3: no server is named; cargo xtask test remote brings one");
            return None;
        };
        let text = std::fs::read_to_string(&credentials).expect("its keys");
        let value = |wanted: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once('='));
            let found = lines.find(|(name, _)| name.trim() == wanted).expect("a line for it");
            found.1.trim().to_owned()
        };
        let bucket = Bucket {
            port: endpoint
                .rsplit_once(':')
                .and_then(|(_, port)| port.parse().ok())
                .expect("a port"),
            name: format!("daemon-{name}-{}", std::process::id()),
            credentials: credentials.into(),
            key: value("aws_access_key_id"),
            secret: value("aws_secret_access_key"),
        };
        bucket.ask("PUT", "", "", &[]);
        // A server that was just started makes its pools when the first object comes: seconds that are no node's.
        bucket.set("first", b"object");
        bucket.ask("DELETE", "first", "", &[]);
        Some(bucket)
    }

    /// Everything that it keeps, by key.
    pub(crate) fn content(&self) -> Vec<(String, Vec<u8>)> {
        let keys = self.keys();
        keys.into_iter()
            .map(|key| (key.clone(), self.ask("GET", &key, "", &[])))
            .collect()
    }

    pub(crate) fn keys(&self) -> Vec<String> {
        let page = String::from_utf8(self.ask("GET", "", "list-type=2", &[])).expect("text");
        let mut parts = page.split("<Key>");
        parts.next();
        parts
            .filter_map(|part| Some(part.split_once("</Key>")?.0.to_owned()))
            .collect()
    }

    pub(crate) fn set(&self, key: &str, content: &[u8]) {
        self.ask("PUT", key, "", content);
    }

    /// The body of the answer, which must be a good one.
    fn ask(&self, method: &str, key: &str, query: &str, body: &[u8]) -> Vec<u8> {
        let host = format!("127.0.0.1:{}", self.port);
        let path = if key.is_empty() {
            format!("/{}", self.name)
        } else {
            format!("/{}/{key}", self.name)
        };
        let (time, sum) = (basic_time(), hex(digest::digest(&digest::SHA256, body).as_ref()));
        let canonical = format!(
            "{method}\n{path}\n{query}\nhost:{host}\nx-amz-content-sha256:{sum}\nx-amz-date:{time}\n\nhost;x-amz-content-sha256;x-amz-date\n{sum}"
        );
        let day = &time[..8];
        let scope = format!("{day}/us-east-1/s3/aws4_request");
        let digest = hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref());
        let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{digest}");
        let mut signing = format!("AWS4{}", self.secret).into_bytes();
        for part in [day, "us-east-1", "s3", "aws4_request"] {
            signing = sign(&signing, part.as_bytes());
        }
        let signature = hex(&sign(&signing, text.as_bytes()));
        let target = if query.is_empty() {
            path
        } else {
            format!("{path}?{query}")
        };
        let head = format!(
            "{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {}\r\nx-amz-content-sha256: {sum}\r\nx-amz-date: {time}\r\nAuthorization: AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders=host;x-amz-content-sha256;x-amz-date, Signature={signature}\r\n\r\n",
            body.len(),
            self.key
        );
        let mut stream = TcpStream::connect(&host).expect("connected");
        stream.write_all(head.as_bytes()).expect("sent");
        stream.write_all(body).expect("sent");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("an answer");
        let end = answer
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .expect("a head");
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        assert!(head.starts_with("HTTP/1.1 2"), "{method} {key}: {head}");
        let body = answer.split_off(end + 4);
        if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
            unchunked(&body)
        } else {
            body
        }
    }
}

fn unchunked(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|window| window == b"\r\n") {
        let length = usize::from_str_radix(std::str::from_utf8(&rest[..end]).expect("text"), 16).expect("a length");
        body.extend_from_slice(&rest[end + 2..end + 2 + length]);
        rest = &rest[end + 2 + length + 2..];
        if length == 0 {
            break;
        }
    }
    body
}

fn sign(key: &[u8], text: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text)
        .as_ref()
        .to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("memory");
        text
    })
}

/// `20261129T213000Z`
fn basic_time() -> String {
    let now = kvtier::purge::rfc3339(SystemTime::now());
    let digits: String = now.chars().filter(|character| !"-:".contains(*character)).collect();
    format!("{}Z", digits.split(['.', 'Z']).next().expect("seconds"))
}
