//! Request traces in Mooncake's schema: one JSON object a line,
//! `{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [..]}`.
//!
//! An id stands for 512 tokens and everything before them (ids are prefix-chained: equal ids, equal prefixes).
//! Published with "Mooncake: A KVCache-centric Disaggregated Architecture for LLM Serving" (FAST '25).

mod answers;
mod schema;

pub use answers::{ANSWER_TOKEN_MS, TraceAnswer, TraceAnswers};
pub use schema::{Schema, Trace, read_trace};

use std::io::{self, BufRead, Write};

use kvtier_core::{BlockHash, Parent};
use serde::{Deserialize, Serialize};

use crate::random::mix;

#[cfg(test)]
mod tests;

/// Tokens that one id of a trace stands for.
pub const TOKENS_PER_ID: u32 = 512;

/// One request of a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRequest {
    /// When it arrived, milliseconds since the trace began.
    #[serde(rename = "timestamp")]
    pub timestamp_ms: u64,
    /// Prompt length in tokens.
    #[serde(rename = "input_length")]
    pub input_tokens: u64,
    /// Answer length in tokens.
    #[serde(rename = "output_length")]
    pub output_tokens: u64,
    /// One id for each 512 tokens of the prompt, in prefix order; the last may cover fewer.
    pub hash_ids: Vec<u64>,
}

impl TraceRequest {
    /// Tokens of the prompt that the id at `index` covers: 512, fewer at the end of the prompt.
    #[must_use]
    pub fn tokens_at(&self, index: usize) -> u32 {
        let before = (index as u64).saturating_mul(u64::from(TOKENS_PER_ID));
        self.input_tokens.saturating_sub(before).min(u64::from(TOKENS_PER_ID)) as u32
    }

    /// The block hashes of the prompt, in prefix order.
    #[must_use]
    pub fn block_hashes(&self) -> Vec<BlockHash> {
        self.hash_ids.iter().map(|id| block_hash(*id)).collect()
    }

    /// What comes before the id at `index`.
    #[must_use]
    pub fn parent_at(&self, index: usize) -> Parent {
        match index.checked_sub(1).and_then(|before| self.hash_ids.get(before)) {
            Some(id) => Parent::Block(block_hash(*id)),
            None => Parent::Root,
        }
    }
}

/// The block hash that stands for an id of a trace. Distinct ids have distinct hashes.
#[must_use]
pub fn block_hash(id: u64) -> BlockHash {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&mix(id ^ 0x5bd1_e995).to_le_bytes());
    bytes[8..].copy_from_slice(&id.to_le_bytes());
    BlockHash(bytes)
}

/// A line of a trace that cannot be used.
#[derive(Debug)]
pub enum TraceError {
    /// The source could not be read.
    Read {
        /// Line number, from 1.
        line: u64,
        /// Why.
        error: io::Error,
    },
    /// The line is not a request.
    Parse {
        /// Line number, from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
}

impl std::fmt::Display for TraceError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TraceError::Read { line, error } => write!(formatter, "line {line}: cannot be read: {error}"),
            TraceError::Parse { line, reason } => write!(formatter, "line {line}: {reason}"),
        }
    }
}

impl std::error::Error for TraceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            TraceError::Read { error, .. } => Some(error),
            TraceError::Parse { .. } => None,
        }
    }
}

/// Longest line taken, bytes: a request of about a million blocks.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// Reads a trace line by line. Empty lines are skipped; nothing but the current line is held.
#[derive(Debug)]
pub struct TraceReader<R> {
    source: R,
    line: u64,
    text: Vec<u8>,
    ended: bool,
}

impl<R: BufRead> TraceReader<R> {
    /// A reader at the start of `source`.
    #[must_use]
    pub fn new(source: R) -> TraceReader<R> {
        TraceReader {
            source,
            line: 0,
            text: Vec::new(),
            ended: false,
        }
    }

    /// Number of the line last read, from 1; 0 before the first.
    #[must_use]
    pub fn line(&self) -> u64 {
        self.line
    }
}

impl<R: BufRead> Iterator for TraceReader<R> {
    type Item = Result<TraceRequest, TraceError>;

    /// The next request; after an error, nothing.
    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            self.text.clear();
            self.line += 1;
            let line = self.line;
            match io::Read::take(&mut self.source, LINE_BYTES_MAX).read_until(b'\n', &mut self.text) {
                Ok(0) => self.ended = true,
                Ok(bytes) if bytes as u64 == LINE_BYTES_MAX && self.text.last() != Some(&b'\n') => {
                    self.ended = true;
                    return Some(Err(TraceError::Parse {
                        line,
                        reason: format!("longer than {LINE_BYTES_MAX} bytes"),
                    }));
                }
                Ok(_) => {
                    let text = self.text.trim_ascii();
                    if text.is_empty() {
                        continue;
                    }
                    let parsed = parse(text).map_err(|reason| TraceError::Parse { line, reason });
                    self.ended = parsed.is_err();
                    return Some(parsed);
                }
                Err(error) => {
                    self.ended = true;
                    return Some(Err(TraceError::Read { line, error }));
                }
            }
        }
        None
    }
}

fn parse(text: &[u8]) -> Result<TraceRequest, String> {
    let request: TraceRequest = serde_json::from_slice(text).map_err(|error| {
        // serde_json counts lines within what it was given, which is always one: its column alone is useful.
        let reason = error.to_string();
        match reason.rsplit_once(" at line ") {
            Some((reason, _)) => format!("{reason} (column {})", error.column()),
            None => reason,
        }
    })?;
    let covered = (request.hash_ids.len() as u64).saturating_mul(u64::from(TOKENS_PER_ID));
    if request.input_tokens > covered.saturating_add(u64::from(TOKENS_PER_ID)) {
        return Err(format!(
            "input_length {} is more than its {} hash_ids of {TOKENS_PER_ID} tokens cover",
            request.input_tokens,
            request.hash_ids.len()
        ));
    }
    Ok(request)
}

/// Writes requests in the schema that [`TraceReader`] reads.
pub fn write_trace<'a>(requests: impl IntoIterator<Item = &'a TraceRequest>, target: &mut dyn Write) -> io::Result<()> {
    for request in requests {
        serde_json::to_writer(&mut *target, request)?;
        target.write_all(b"\n")?;
    }
    Ok(())
}
