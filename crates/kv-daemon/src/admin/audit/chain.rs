//! Reading a chain of audit lines: does each follow the one before it, and is each what it was.
//!
//! A line is one JSON object that ends with its own hash: `{"sequence":N,…,"previous":"HEX","sha256":"HEX"}`. `sha256` is the
//! SHA-256 of the line's bytes before `,"sha256":`; `previous` is that of the line before, 64 zeros in the first of a chain.

use std::io::{self, BufRead, Read};

use aws_lc_rs::digest::{SHA256, digest};
use serde::Deserialize;

use crate::admin::tokens::hex;

/// No line of ours is longer; a longer one is none of ours.
pub(crate) const LINE_BYTES_MAX: u64 = 16 << 10;

/// `previous` of the first line of a chain.
pub(crate) const NOTHING: &str = "0000000000000000000000000000000000000000000000000000000000000000";

const HASH_MEMBER: &str = ",\"sha256\":\"";

/// A line that was read and is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub sequence: u64,
    /// Its hash, 64 hexadecimal digits.
    pub sha256: String,
}

/// What the lines of one file say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Lines that hold.
    pub lines: u64,
    /// The sequence of the first line, and the hash that it follows.
    pub first: Option<(u64, String)>,
    /// The last line.
    pub last: Option<Link>,
    /// Bytes after the last whole line: a write that a crash cut short.
    pub torn_bytes: u64,
    /// Bytes of the whole lines.
    pub bytes: u64,
    /// What lines say about breaks and torn ends of earlier files.
    pub notes: Vec<String>,
}

/// Where a chain does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Break {
    /// Which line, from 1.
    pub line: u64,
    /// What is wrong.
    pub what: String,
    /// What held before it.
    pub before: Chain,
}

#[derive(Deserialize)]
struct Members {
    sequence: u64,
    previous: String,
    #[serde(default)]
    note: Option<String>,
}

/// Reads a chain to its end, in memory that does not depend on its length.
///
/// # Errors
/// The outer one when the reader breaks, the inner one when the chain does.
pub fn read(mut reader: impl BufRead) -> io::Result<Result<Chain, Box<Break>>> {
    let mut chain = Chain::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = reader.by_ref().take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut line)? as u64;
        if length == 0 {
            return Ok(Ok(chain));
        }
        let broken = |what: &str, before: Chain| {
            Ok(Err(Box::new(Break {
                line: before.lines + 1,
                what: what.to_string(),
                before,
            })))
        };
        if line.last() != Some(&b'\n') {
            if length > LINE_BYTES_MAX {
                return broken("it is longer than any line of an audit log", chain);
            }
            chain.torn_bytes = length;
            return Ok(Ok(chain));
        }
        line.pop();
        match follow(&line, &mut chain) {
            Ok(()) => chain.bytes += length,
            Err(what) => return broken(what, chain),
        }
    }
}

fn follow(line: &[u8], chain: &mut Chain) -> Result<(), &'static str> {
    let text = std::str::from_utf8(line).map_err(|_| "it is no text")?;
    let (body, end) = text.rsplit_once(HASH_MEMBER).ok_or("it has no hash at its end")?;
    let sha256 = end.strip_suffix("\"}").ok_or("it has no hash at its end")?;
    if hex(digest(&SHA256, body.as_bytes()).as_ref()) != sha256 {
        return Err("its bytes are not those that were hashed: it was altered");
    }
    let members: Members = serde_json::from_str(text).map_err(|_| "it is no entry of an audit log")?;
    match &chain.last {
        None => chain.first = Some((members.sequence, members.previous.clone())),
        Some(last) if members.previous != last.sha256 => {
            return Err("it does not follow the line before it: lines were removed, added or moved");
        }
        Some(last) if Some(members.sequence) != last.sequence.checked_add(1) => {
            return Err("its sequence is not the next");
        }
        Some(_) => {}
    }
    chain.notes.extend(members.note);
    chain.lines += 1;
    chain.last = Some(Link {
        sequence: members.sequence,
        sha256: sha256.to_string(),
    });
    Ok(())
}
