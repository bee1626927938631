//! Traces of three schemas, read whole, bad lines skipped.
//!
//! | schema | told by | time | prompt | blocks |
//! |---|---|---|---|---|
//! | Mooncake | `hash_ids` alone | `timestamp`, ms | `input_length` | `hash_ids`, 512 tokens each |
//! | Qwen-Bailian | `chat_id` beside `hash_ids` | `timestamp`, s | `input_length` | `hash_ids`, 16 tokens each |
//! | recorded | `block_tokens` beside `hash_ids` | `timestamp`, ms | `input_length` | `hash_ids`, `block_tokens` each |
//! | replay | `schedule` | `schedule.arrival_offset_ms` | `observed.input_tokens` (or `prompt_tokens`, `input_length`) | `observed.hash_ids`, or else derived |
//!
//! A replay trace of a control plane may say nothing of contents. Then the prompts of one `session_id` are taken to
//! continue each other, 512 tokens a block. What sessions share with each other cannot be seen; a line without a session shares nothing.

use std::collections::BTreeMap;
use std::io::{self, BufRead};

use serde::Deserialize;
use serde_json::Value;

use super::{LINE_BYTES_MAX, TOKENS_PER_ID, TraceError, TraceRequest};

/// How a trace is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Schema {
    /// As published with Mooncake (FAST '25).
    Mooncake,
    /// As published with "KVCache Cache in the Wild" (USENIX ATC '25).
    QwenBailian,
    /// As a daemon records what it is asked (`record_trace`), with blocks of so many tokens.
    Recorded(u32),
    /// As a control plane records what it scheduled.
    Replay,
}

impl Schema {
    /// Tokens that one id of `hash_ids` stands for.
    #[must_use]
    pub fn tokens_per_id(self) -> u32 {
        match self {
            Schema::Mooncake | Schema::Replay => TOKENS_PER_ID,
            Schema::QwenBailian => 16,
            Schema::Recorded(tokens) => tokens,
        }
    }
}

/// A trace, as far as it could be read.
#[derive(Debug)]
pub struct Trace {
    /// Of all its lines.
    pub schema: Schema,
    /// In the order of the file.
    pub requests: Vec<TraceRequest>,
    /// Lines that were skipped, and why.
    pub skipped: Vec<TraceError>,
}

/// Reads a whole trace in the schema of its first good line.
///
/// # Errors
/// Where the source cannot be read, or more than `bad_lines_max` lines are no requests: the one that was too many. Where there
/// is no request at all.
pub fn read_trace(source: impl BufRead, bad_lines_max: usize) -> Result<Trace, TraceError> {
    let mut reader = Lines { source, line: 0 };
    let mut schema = None;
    let mut sessions = BTreeMap::new();
    let mut trace = Trace {
        schema: Schema::Mooncake,
        requests: Vec::new(),
        skipped: Vec::new(),
    };
    while let Some(text) = reader.next()? {
        let line = reader.line;
        let parsed = text.and_then(|text| {
            let value: Value = serde_json::from_slice(&text).map_err(|error| without_line(&error))?;
            let is = schema_of(&value)?;
            if schema.is_some_and(|schema| schema != is) {
                return Err("of another schema than the lines before".to_string());
            }
            let request = parse(is, value, line, &mut sessions)?;
            Ok((is, request))
        });
        match parsed {
            Ok((is, request)) => {
                schema = Some(is);
                trace.requests.push(request);
            }
            Err(reason) => {
                let error = TraceError::Parse { line, reason };
                if trace.skipped.len() >= bad_lines_max {
                    return Err(error);
                }
                trace.skipped.push(error);
            }
        }
    }
    trace.schema = schema.ok_or_else(|| {
        let reason = "the trace holds no request".to_string();
        trace.skipped.pop().unwrap_or(TraceError::Parse {
            line: reader.line,
            reason,
        })
    })?;
    Ok(trace)
}

struct Lines<R> {
    source: R,
    line: u64,
}

impl<R: BufRead> Lines<R> {
    /// The next line that is not empty, or why it cannot be taken.
    fn next(&mut self) -> Result<Option<Result<Vec<u8>, String>>, TraceError> {
        loop {
            let mut text = Vec::new();
            self.line += 1;
            let line = self.line;
            let read = io::Read::take(&mut self.source, LINE_BYTES_MAX).read_until(b'\n', &mut text);
            let read = read.map_err(|error| TraceError::Read { line, error })?;
            if read == 0 {
                return Ok(None);
            }
            if read as u64 == LINE_BYTES_MAX && text.last() != Some(&b'\n') {
                self.skip_line().map_err(|error| TraceError::Read { line, error })?;
                return Ok(Some(Err(format!("longer than {LINE_BYTES_MAX} bytes"))));
            }
            let text = text.trim_ascii();
            if !text.is_empty() {
                return Ok(Some(Ok(text.to_vec())));
            }
        }
    }

    fn skip_line(&mut self) -> io::Result<()> {
        loop {
            let buffer = self.source.fill_buf()?;
            if buffer.is_empty() {
                return Ok(());
            }
            let end = buffer.iter().position(|byte| *byte == b'\n');
            let length = end.map_or(buffer.len(), |end| end + 1);
            self.source.consume(length);
            if end.is_some() {
                return Ok(());
            }
        }
    }
}

fn schema_of(value: &Value) -> Result<Schema, String> {
    if value.get("schedule").is_some() {
        Ok(Schema::Replay)
    } else if value.get("chat_id").is_some() || value.get("parent_chat_id").is_some() {
        Ok(Schema::QwenBailian)
    } else if value.get("hash_ids").is_some() {
        match value.get("block_tokens") {
            None => Ok(Schema::Mooncake),
            Some(tokens) => {
                let tokens = tokens.as_u64().and_then(|tokens| u32::try_from(tokens).ok());
                let tokens = tokens
                    .filter(|tokens| *tokens > 0)
                    .ok_or("block_tokens: no number of tokens")?;
                Ok(Schema::Recorded(tokens))
            }
        }
    } else {
        Err("neither hash_ids nor schedule: of no known schema".to_string())
    }
}

#[derive(Deserialize)]
struct QwenLine {
    timestamp: f64,
    input_length: u64,
    #[serde(default)]
    output_length: u64,
    hash_ids: Vec<u64>,
}

#[derive(Deserialize)]
struct ReplayLine {
    schedule: Schedule,
    #[serde(default)]
    session_id: Value,
    #[serde(default)]
    observed: Observed,
}

#[derive(Deserialize)]
struct Schedule {
    arrival_offset_ms: f64,
}

#[derive(Default, Deserialize)]
struct Observed {
    #[serde(alias = "prompt_tokens", alias = "input_length")]
    input_tokens: Option<u64>,
    #[serde(alias = "completion_tokens", alias = "output_length")]
    output_tokens: Option<u64>,
    hash_ids: Option<Vec<u64>>,
}

/// Sessions of a replay trace by name, numbered.
type Sessions = BTreeMap<String, u64>;

fn parse(schema: Schema, value: Value, line: u64, sessions: &mut Sessions) -> Result<TraceRequest, String> {
    let request = match schema {
        Schema::Mooncake | Schema::Recorded(_) => serde_json::from_value(value).map_err(|error| error.to_string())?,
        Schema::QwenBailian => {
            let line: QwenLine = serde_json::from_value(value).map_err(|error| error.to_string())?;
            TraceRequest {
                timestamp_ms: milliseconds("timestamp", line.timestamp * 1000.0)?,
                input_tokens: line.input_length,
                output_tokens: line.output_length,
                hash_ids: line.hash_ids,
            }
        }
        Schema::Replay => {
            let read: ReplayLine = serde_json::from_value(value).map_err(|error| error.to_string())?;
            replayed(read, line, sessions)?
        }
    };
    let each = u64::from(schema.tokens_per_id());
    let covered = (request.hash_ids.len() as u64).saturating_mul(each);
    if request.input_tokens > covered.saturating_add(each) {
        return Err(format!(
            "a prompt of {} tokens is more than its {} hash_ids of {each} tokens cover",
            request.input_tokens,
            request.hash_ids.len()
        ));
    }
    Ok(request)
}

fn replayed(read: ReplayLine, line: u64, sessions: &mut Sessions) -> Result<TraceRequest, String> {
    let input_tokens = read.observed.input_tokens.ok_or("observed says no input_tokens")?;
    if input_tokens > LINE_BYTES_MAX * 64 {
        return Err(format!("a prompt of {input_tokens} tokens"));
    }
    let output_tokens = read.observed.output_tokens.unwrap_or(0);
    let timestamp_ms = milliseconds("schedule.arrival_offset_ms", read.schedule.arrival_offset_ms)?;
    let hash_ids = read.observed.hash_ids.unwrap_or_else(|| {
        let name = match read.session_id {
            Value::Null => format!("line {line}"),
            Value::String(name) => format!("session {name}"),
            other => format!("session {other}"),
        };
        let number = sessions.len() as u64;
        let number = *sessions.entry(name).or_insert(number);
        let spans = input_tokens.div_ceil(u64::from(TOKENS_PER_ID));
        let ids = (0..spans).map(|span| {
            // What is full stays; the last span, where it is not, will be another one next time.
            let end = (span + 1) * u64::from(TOKENS_PER_ID);
            let last = if end > input_tokens { 1 + line } else { 0 };
            last << 44 ^ number << 20 ^ span
        });
        ids.collect()
    });
    Ok(TraceRequest {
        timestamp_ms,
        input_tokens,
        output_tokens,
        hash_ids,
    })
}

fn milliseconds(field: &str, value: f64) -> Result<u64, String> {
    // A century and a half: what is more is no time but a mistake.
    if (0.0..5e12).contains(&value) {
        Ok(value.round() as u64)
    } else {
        Err(format!("{field} is {value}"))
    }
}

/// serde_json counts lines within what it was given, which is always one: its column alone is useful.
fn without_line(error: &serde_json::Error) -> String {
    let reason = error.to_string();
    match reason.rsplit_once(" at line ") {
        Some((reason, _)) => format!("{reason} (column {})", error.column()),
        None => reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, bad_lines_max: usize) -> Result<Trace, TraceError> {
        read_trace(text.as_bytes(), bad_lines_max)
    }

    #[test]
    fn mooncakes_schema_is_read() {
        let line = r#"{"timestamp": 27, "input_length": 1025, "output_length": 4, "hash_ids": [0, 1, 7]}"#;
        let trace = read(line, 0).expect("a trace");
        assert_eq!((trace.schema, trace.schema.tokens_per_id()), (Schema::Mooncake, 512));
        assert_eq!(trace.requests[0].timestamp_ms, 27);
        assert_eq!(trace.requests[0].hash_ids, [0, 1, 7]);
    }

    #[test]
    fn what_a_daemon_recorded_is_read_with_its_own_blocks() {
        let line = |tokens: &str| {
            format!(
                r#"{{"timestamp": 27, "input_length": 40, "output_length": 0, "hash_ids": [1, 2, 3], "block_tokens": {tokens}}}"#
            )
        };
        let trace = read(&format!("{}\n{}\n{}", line("16"), line("0"), line("256")), 2).expect("a trace");
        assert_eq!((trace.schema, trace.schema.tokens_per_id()), (Schema::Recorded(16), 16));
        assert_eq!(
            (trace.requests.len(), trace.skipped.len()),
            (1, 2),
            "one form of blocks at a time"
        );
    }

    #[test]
    fn qwen_bailians_schema_is_read_in_seconds_and_sixteen_tokens() {
        let line = r#"{"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 33, "output_length": 8,
            "type": "text", "turn": 1, "hash_ids": [1089, 1090, 6326]}"#;
        let trace = read(&line.replace('\n', " "), 0).expect("a trace");
        assert_eq!((trace.schema, trace.schema.tokens_per_id()), (Schema::QwenBailian, 16));
        let request = &trace.requests[0];
        assert_eq!((request.timestamp_ms, request.input_tokens), (61_114, 33));
    }

    #[test]
    fn a_replay_trace_without_contents_continues_its_sessions() {
        let line = |at: u32, session: &str, tokens: u32| {
            format!(
                r#"{{"schedule": {{"arrival_offset_ms": {at}.0}}, "session_id": {session}, "observed": {{"input_tokens": {tokens}, "output_tokens": 10}}}}"#
            )
        };
        let text = [
            line(0, "\"a\"", 1200),
            line(5, "\"b\"", 1200),
            line(9, "\"a\"", 2048),
            line(10, "null", 600),
            line(11, "null", 600),
        ];
        let trace = read(&text.join("\n"), 0).expect("a trace");
        assert_eq!(trace.schema, Schema::Replay);
        let ids: Vec<&[u64]> = trace.requests.iter().map(|request| &request.hash_ids[..]).collect();
        assert_eq!((ids[0].len(), ids[2].len()), (3, 4));
        assert_eq!(ids[0][..2], ids[2][..2]);
        assert_ne!(ids[0][2], ids[2][2], "the unfinished span is another one now");
        assert!(ids[1].iter().all(|id| !ids[0].contains(id)));
        assert!(ids[3].iter().all(|id| !ids[4].contains(id)));
    }

    #[test]
    fn bad_lines_are_counted_and_named_up_to_a_limit() {
        let good = r#"{"timestamp": 1, "input_length": 5, "output_length": 4, "hash_ids": [0]}"#;
        let other = r#"{"chat_id": 1, "timestamp": 1, "input_length": 5, "hash_ids": [0]}"#;
        let text = format!("nonsense\n\n{good}\n{{}}\n{other}\n{good}\n");
        let trace = read(&text, 3).expect("a trace");
        assert_eq!(trace.requests.len(), 2);
        let skipped: Vec<String> = trace.skipped.iter().map(ToString::to_string).collect();
        assert!(skipped[0].starts_with("line 1: "), "{skipped:?}");
        assert!(skipped[1].starts_with("line 4: neither"), "{skipped:?}");
        assert!(skipped[2].starts_with("line 5: of another schema"), "{skipped:?}");
        let error = read(&text, 2).expect_err("one too many").to_string();
        assert!(error.starts_with("line 5: "), "{error}");
    }

    #[test]
    fn a_prompt_longer_than_its_ids_cover_and_times_that_cannot_be_are_bad_lines() {
        let long = r#"{"timestamp": 1, "input_length": 5000, "output_length": 4, "hash_ids": [0]}"#;
        assert!(read(long, 9).is_err());
        let before = r#"{"chat_id": 1, "timestamp": -1.0, "input_length": 5, "hash_ids": [0]}"#;
        assert!(
            read(before, 9)
                .expect_err("no request")
                .to_string()
                .contains("timestamp")
        );
        assert!(read("", 9).expect_err("no request").to_string().contains("no request"));
    }
}
