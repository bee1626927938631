//! The mutation loop behind `cargo xtask fuzz wire`: valid random messages, mutated with knowledge of the format, and the
//! properties that every input must keep.
//!
//! * Nothing panics.
//! * What decodes, encodes to the same bytes, so that no byte is read twice, skipped or read past the end.
//! * A view holds no more records than its bytes have room for: no count in the input sizes an allocation.
//! * However a stream is cut, the same frames come out of it, and a broken stream stays broken.

mod generate;
mod mutate;
#[cfg(feature = "mutants")]
pub(super) mod planted;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::{DecodeError, Envelope, Frame, FrameStream, HEADER_BYTES, KEYS_MAX, Kind, Reply, Request};
use generate::Random;

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FuzzReport {
    /// Inputs tried.
    pub executions: u64,
    /// Those among them that are whole valid messages.
    pub decoded: u64,
    /// The first broken property, with the input in hex.
    pub finding: Option<String>,
}

/// Runs until `seconds` are over or a property breaks. The same seed tries the same inputs. With `mutant` the decoder
/// has a planted bug, which the loop must find; that needs the feature `mutants`.
///
/// # Panics
/// With `mutant` and without that feature.
#[must_use]
pub fn run(seed: u64, seconds: f64, mutant: bool) -> FuzzReport {
    #[cfg(feature = "mutants")]
    let _planted = planted::plant(mutant);
    #[cfg(not(feature = "mutants"))]
    assert!(!mutant, "the planted bug needs the feature `mutants`");
    let until = Instant::now() + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::ZERO);
    let mut random = Random::new(seed);
    let mut report = FuzzReport::default();
    let (mut input, mut spare) = (Vec::new(), Vec::new());
    while report.finding.is_none() {
        // The clock is asked once in a while: most inputs take less time than it does.
        if report.executions.is_multiple_of(64) && Instant::now() >= until {
            break;
        }
        input.clear();
        generate::message(&mut random, &mut input);
        // A third stays as it is: what is only nearly valid exercises the refusals, not the readers.
        if random.below(3) > 0 {
            spare.clear();
            generate::message(&mut random, &mut spare);
            mutate::mutate(&mut random, &mut input, &spare);
        }
        report.executions += 1;
        let checked = catch_unwind(AssertUnwindSafe(|| check(&mut random, &input)));
        match checked {
            Ok(Ok(decoded)) => report.decoded += u64::from(decoded),
            Ok(Err(broken)) => report.finding = Some(format!("{broken}: {}", hex(&input))),
            Err(_) => report.finding = Some(format!("a panic: {}", hex(&input))),
        }
    }
    report
}

/// Checks every property for one input; whether it is one whole valid message.
fn check(random: &mut Random, input: &[u8]) -> Result<bool, &'static str> {
    let decoded = match Frame::decode(input) {
        Ok(Some(frame)) => {
            if frame.header.frame_bytes() > input.len() || frame.header.frame_bytes() < HEADER_BYTES {
                return Err("a frame longer than the input");
            }
            let decoded = check_message(&frame, &input[..frame.header.frame_bytes()])?;
            decoded && frame.header.frame_bytes() == input.len()
        }
        Ok(None) | Err(_) => false,
    };
    check_stream(random, input)?;
    Ok(decoded)
}

/// Decodes a frame as what its kind says and encodes it again.
fn check_message(frame: &Frame<'_>, bytes: &[u8]) -> Result<bool, &'static str> {
    let is_request = Kind::from_code(frame.header.kind).is_none_or(Kind::is_request);
    let mut again = Vec::with_capacity(bytes.len());
    if is_request {
        let Ok((request, extensions)) = Request::decode(&frame.header, frame.body) else {
            return Ok(false);
        };
        if !request_is_bounded(&request, frame.body) {
            return Err("more records than the body has bytes for");
        }
        let envelope = Envelope {
            request: frame.header.request,
            deadline_us: frame.header.deadline_us,
            clock_ns: frame.header.clock_ns,
            releases: frame.releases,
            extensions,
        };
        if request.encode(&envelope, &mut again).is_err() {
            return Err("a request decodes and does not encode");
        }
    } else {
        let Ok((reply, extensions)) = Reply::decode(&frame.header, frame.body) else {
            return Ok(false);
        };
        if reply.encode_with(frame.header.request, extensions, &mut again).is_err() {
            return Err("a reply decodes and does not encode");
        }
    }
    if again == bytes {
        Ok(true)
    } else {
        Err("a message encodes to other bytes than it came from")
    }
}

fn request_is_bounded(request: &Request<'_>, body: &[u8]) -> bool {
    let count = match request {
        Request::Lookup(keys) | Request::Delete(keys) | Request::Explain(keys) | Request::Fetch { keys, .. } => {
            keys.hashes.len()
        }
        Request::Reserve { keys, lengths } if keys.hashes.len() == lengths.len() => lengths.len(),
        Request::Reserve { .. } => return false,
        Request::Seal { items, .. } => items.len(),
        Request::Abandon { reservations } => reservations.len(),
        _ => 0,
    };
    count <= KEYS_MAX && count <= body.len()
}

/// What a stream yields: frames by their bytes, and how it ended.
#[derive(PartialEq)]
struct Yield {
    frames: Vec<Vec<u8>>,
    broken: Option<DecodeError>,
    left: usize,
}

/// Feeds the input whole, and in pieces of random sizes.
fn check_stream(random: &mut Random, input: &[u8]) -> Result<(), &'static str> {
    let mut whole = Yield {
        frames: Vec::new(),
        broken: None,
        left: 0,
    };
    let mut rest = input;
    loop {
        match Frame::decode(rest) {
            Ok(Some(frame)) => {
                let (frame, later) = rest.split_at(frame.header.frame_bytes());
                whole.frames.push(frame.to_vec());
                rest = later;
            }
            Ok(None) => break,
            Err(error) => {
                whole.broken = Some(error);
                break;
            }
        }
    }
    whole.left = rest.len();
    let mut cut = Yield {
        frames: Vec::new(),
        broken: None,
        left: 0,
    };
    let mut stream = FrameStream::new(1 + random.below(256));
    let mut rest = input;
    while !rest.is_empty() && cut.broken.is_none() {
        let space = stream.space();
        if space.is_empty() {
            return Err("a stream without room for the next byte");
        }
        // Mostly small pieces: they cut headers. Large inputs take large ones, or one input would take seconds.
        let piece = 1 + random.below(if input.len() > 4096 { 8192 } else { 48 });
        let count = piece.min(space.len()).min(rest.len());
        let (now, later) = rest.split_at(count);
        space[..count].copy_from_slice(now);
        stream.advance(count);
        rest = later;
        loop {
            let ready = stream.is_ready();
            match stream.next() {
                Ok(Some(frame)) => cut.frames.push(bytes_of(&frame)),
                Ok(None) if ready => return Err("a stream that says it is ready and is not"),
                Ok(None) => break,
                Err(error) => {
                    cut.broken = Some(error);
                    break;
                }
            }
        }
    }
    if cut.broken.is_some() && stream.next().is_ok() {
        return Err("a broken stream that goes on");
    }
    cut.left = stream.held_bytes() + rest.len();
    if cut == whole {
        Ok(())
    } else {
        Err("a stream that was cut yields other frames")
    }
}

/// The bytes that a frame came from, put together from its parts.
fn bytes_of(frame: &Frame<'_>) -> Vec<u8> {
    let header = &frame.header;
    let mut bytes = Vec::with_capacity(header.frame_bytes());
    bytes.extend_from_slice(&header.length.to_le_bytes());
    bytes.extend_from_slice(&header.kind.to_le_bytes());
    bytes.extend_from_slice(&header.flags.to_le_bytes());
    for value in [header.request, header.deadline_us, header.clock_ns] {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    bytes.extend_from_slice(&header.releases.to_le_bytes());
    bytes.extend_from_slice(&header.reserved.to_le_bytes());
    frame
        .releases
        .iter()
        .for_each(|lease| bytes.extend_from_slice(&lease.0.to_le_bytes()));
    bytes.extend_from_slice(frame.body);
    bytes
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let shown = &bytes[..bytes.len().min(2048)];
    let mut text = String::with_capacity(shown.len() * 2);
    for byte in shown {
        let _ = write!(text, "{byte:02x}");
    }
    if shown.len() < bytes.len() {
        let _ = write!(text, "... ({} bytes)", bytes.len());
    }
    text
}
