//! `kvctl replay`: a trace through a daemon, as an engine would send it, with every byte checked.
//!
//! For each request: lease the longest cached prefix of its blocks in place, compare every byte with what the block's id
//! says it must be, let go, then put the rest; and when the answer would be complete, or at the end, say how long it was. Requests go in the
//! order of the trace, over one connection or several.

mod pace;
mod report;
mod worker;

use std::fs::File;
use std::io::{self, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use kvtier_sim::trace::{TraceReader, TraceRequest};
use serde_json::Value;

use self::pace::Pace;
use self::report::Tally;
pub use self::report::{Report, TierReport};
use self::worker::Worker;
use crate::content::Content;
use crate::exit::{ExitCode, Failure};
use crate::kvctl::{Connection, failure};
use crate::output;
use crate::size;

/// Blocks fetched or put in one call at most: enough to hide a trip, few enough to leave room for others.
const CHUNK_BLOCKS_MAX: usize = 64;

/// What to send, and how fast.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// The trace, one JSON request a line (timestamp, input_length, output_length, hash_ids); - for standard input
    trace: PathBuf,
    /// Bytes of each block, such as 16KiB
    #[arg(long, value_name = "SIZE", value_parser = block_bytes)]
    block_bytes: usize,
    /// As fast as it goes (max), or at this multiple of the trace's own pace
    #[arg(long, value_name = "max|FACTOR", default_value = "max", value_parser = Pace::parse)]
    speed: Pace,
    /// As fast as it goes, while the trace's timestamps drive the clock of a daemon served with --clock client
    #[arg(long, conflicts_with = "speed")]
    virtual_time: bool,
    /// Only these requests of the trace, from 0, the end not included
    #[arg(long, value_name = "A..B", value_parser = range)]
    requests: Option<(u64, u64)>,
    /// Connections that take turns
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    connections: u32,
    /// Blocks fetched or put in one call at most, as engines that move a prompt in pieces do
    #[arg(long, value_name = "N", default_value_t = CHUNK_BLOCKS_MAX, value_parser = chunk)]
    chunk_blocks: usize,
    /// How long a put is tried again while the daemon has no room, milliseconds
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    busy_deadline_ms: u64,
    /// Do not say how long answers were, as engines that say nothing of them (it is a message more for each request, which counts in seconds and rates)
    #[arg(long)]
    no_answers: bool,
    /// Measure a memcpy of such blocks, too
    #[arg(long)]
    memcpy: bool,
}

/// What the demo gives its client.
#[derive(Clone, Debug, Args)]
pub struct ClientArguments {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    options: Options,
}

impl ClientArguments {
    /// Runs it as `kvctl replay` would.
    ///
    /// # Errors
    /// As `kvctl replay`: when the trace cannot be read, the daemon answers with an error, or bytes were wrong.
    pub fn run(&self) -> Result<(), Failure> {
        run_command(&self.connection, &self.options)
    }
}

fn block_bytes(text: &str) -> Result<usize, String> {
    match size::parse(text)? {
        bytes @ 1..=0x400_0000 => usize::try_from(bytes).map_err(|error| error.to_string()),
        _ => Err("a block has 1 byte to 64MiB".to_string()),
    }
}

fn chunk(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(blocks @ 1..=CHUNK_BLOCKS_MAX) => Ok(blocks),
        _ => Err(format!("a call moves 1 to {CHUNK_BLOCKS_MAX} blocks")),
    }
}

fn range(text: &str) -> Result<(u64, u64), String> {
    let expected = || format!("{text:?} is no range: write 0..1000, 1000.. or ..1000");
    let (from, to) = text.split_once("..").ok_or_else(expected)?;
    let bound = |text: &str, open: u64| {
        if text.is_empty() {
            Ok(open)
        } else {
            text.parse().map_err(|_| expected())
        }
    };
    let (from, to) = (bound(from, 0)?, bound(to, u64::MAX)?);
    if from < to { Ok((from, to)) } else { Err(expected()) }
}

/// Replays and prints the report.
///
/// # Errors
/// When the trace cannot be read, the daemon answers with an error, or bytes were wrong.
pub(crate) fn run_command(connection: &Connection, options: &Options) -> Result<(), Failure> {
    let report = run(connection, options)?;
    if connection.json {
        let json = serde_json::to_string_pretty(&report)
            .map_err(|error| Failure::new(ExitCode::Internal, error.to_string()))?;
        output::print(&format!("{json}\n"))?;
    } else {
        output::print(&report.to_string())?;
    }
    if report.wrong_bytes > 0 {
        let words = format!(
            "{} of {} bytes were not what was stored; first: {}",
            report.wrong_bytes,
            report.verified_bytes + report.wrong_bytes,
            report.first_wrong.as_deref().unwrap_or("unknown"),
        );
        return Err(Failure::new(ExitCode::No, words));
    }
    Ok(())
}

/// One replay: what its workers share.
struct Replay<'a> {
    options: &'a Options,
    namespace: String,
    content: Content,
    chunk_blocks: usize,
    source: Mutex<Source<'a>>,
    progress: ProgressBar,
    started: Instant,
    stop: AtomicBool,
}

fn run(connection: &Connection, options: &Options) -> Result<Report, Failure> {
    let client = connection.connect()?;
    let welcome = client.welcome().map_err(failure)?;
    if options.block_bytes > welcome.block_bytes_max as usize {
        let most = size::exact(welcome.block_bytes_max.into());
        return Err(Failure::new(
            ExitCode::Usage,
            format!("--block-bytes: this daemon takes blocks of at most {most}"),
        ));
    }
    if options.virtual_time && !welcome.client_clock {
        let words = "--virtual-time: this daemon runs on its own clock: serve it with --clock client";
        return Err(Failure::new(ExitCode::Usage, words));
    }
    let before = status(&client)?;
    drop(client);
    let replay = Replay {
        options,
        namespace: connection
            .namespace
            .clone()
            .unwrap_or_else(|| format!("replay-{}", size::exact(options.block_bytes as u64))),
        content: Content::default(),
        chunk_blocks: chunk_blocks(&before, options),
        progress: progress_bar(&options.trace),
        source: Mutex::new(Source::open(options)?),
        started: Instant::now(),
        stop: AtomicBool::new(false),
    };
    let tallies: Vec<Result<Tally, Failure>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..options.connections)
            .map(|_| scope.spawn(|| replay.work(connection)))
            .collect();
        let join = |worker: thread::ScopedJoinHandle<'_, _>| {
            worker
                .join()
                .unwrap_or_else(|_| Err(Failure::new(ExitCode::Internal, "a worker panicked: report a bug")))
        };
        workers.into_iter().map(join).collect()
    });
    let seconds = replay.started.elapsed().as_secs_f64();
    replay.progress.finish_and_clear();
    let mut total = Tally::default();
    for tally in tallies {
        total.add(tally?);
    }
    let mut report = total.report(seconds, options.block_bytes as u64);
    let after = status(&connection.connect()?)?;
    report.write_amplification = write_amplification(&before, &after);
    report.prefetched_share = prefetched_share(&before, &after, report.hit_blocks_nvme);
    if options.memcpy {
        report.memcpy_gbps = Some(memcpy_gbps(&replay.content, options.block_bytes));
    }
    Ok(report)
}

impl Replay<'_> {
    /// One connection's part.
    fn work(&self, connection: &Connection) -> Result<Tally, Failure> {
        let result = Worker::new(self, connection).and_then(|mut worker| {
            while !self.stop.load(Ordering::Acquire) {
                let Some(request) = self.next()? else { break };
                worker.request(&request)?;
            }
            worker.end()
        });
        if result.is_err() {
            self.stop.store(true, Ordering::Release);
        }
        result
    }

    /// The next request, when it is due.
    fn next(&self) -> Result<Option<TraceRequest>, Failure> {
        let (request, first_ms) = {
            let mut source = self.source.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let Some(request) = source.next()? else { return Ok(None) };
            self.progress.set_position(source.position());
            let first_ms = *source.first_ms.get_or_insert(request.timestamp_ms);
            (request, first_ms)
        };
        let due = self
            .options
            .speed
            .due(Duration::from_millis(request.timestamp_ms.saturating_sub(first_ms)));
        if let Some(wait) = due.and_then(|due| due.checked_sub(self.started.elapsed())) {
            thread::sleep(wait);
        }
        Ok(Some(request))
    }
}

/// The requests that were chosen, read as they are needed.
struct Source<'a> {
    reader: TraceReader<BufReader<Counted>>,
    path: &'a Path,
    range: (u64, u64),
    index: u64,
    position: std::sync::Arc<std::sync::atomic::AtomicU64>,
    first_ms: Option<u64>,
}

impl<'a> Source<'a> {
    fn open(options: &'a Options) -> Result<Source<'a>, Failure> {
        let path = options.trace.as_path();
        let source: Box<dyn Read + Send> = if path == Path::new("-") {
            Box::new(io::stdin())
        } else {
            let file = File::open(path)
                .map_err(|error| Failure::new(ExitCode::NoInput, format!("trace {}: {error}", path.display())))?;
            Box::new(file)
        };
        let position = std::sync::Arc::default();
        let counted = Counted {
            source,
            position: std::sync::Arc::clone(&position),
        };
        let range = options.requests.unwrap_or((0, u64::MAX));
        Ok(Source {
            reader: TraceReader::new(BufReader::new(counted)),
            path,
            range,
            index: 0,
            position,
            first_ms: None,
        })
    }

    fn next(&mut self) -> Result<Option<TraceRequest>, Failure> {
        while self.index < self.range.1 {
            let Some(request) = self.reader.next() else {
                return Ok(None);
            };
            let request = request.map_err(|error| {
                Failure::new(ExitCode::DataFormat, format!("trace {}: {error}", self.path.display()))
            })?;
            self.index += 1;
            if self.index > self.range.0 {
                return Ok(Some(request));
            }
        }
        Ok(None)
    }

    fn position(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }
}

/// Counts what was read, for the progress bar.
struct Counted {
    source: Box<dyn Read + Send>,
    position: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let bytes = self.source.read(target)?;
        self.position.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}

fn progress_bar(trace: &Path) -> ProgressBar {
    let length = std::fs::metadata(trace).map_or(0, |metadata| metadata.len());
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = "  replay [{bar:40}] {percent:>3} %  {elapsed} of about {duration}";
    ProgressBar::new(length)
        .with_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// How many blocks to hold at once: an eighth of the host tier at most, shared by all connections.
fn chunk_blocks(status: &Value, options: &Options) -> usize {
    let Some(capacity_bytes) = status["host_capacity_bytes"].as_u64() else {
        return (CHUNK_BLOCKS_MAX / 4).min(options.chunk_blocks);
    };
    let share = usize::try_from(capacity_bytes / 8 / u64::from(options.connections)).unwrap_or(usize::MAX);
    (share / options.block_bytes.next_multiple_of(4096)).clamp(1, options.chunk_blocks)
}

fn status(client: &kvtier::client::blocking::Client) -> Result<Value, Failure> {
    let text = client.status().map_err(failure)?;
    serde_json::from_str(&text)
        .map_err(|error| Failure::new(ExitCode::Internal, format!("the daemon's status is no JSON: {error}")))
}

/// Of the blocks that came from NVMe, those that were read ahead.
#[expect(clippy::cast_precision_loss, reason = "a ratio")]
fn prefetched_share(before: &Value, after: &Value, waited_for: u64) -> Option<f64> {
    let name = "prefetch_hits";
    let ahead = after[name].as_u64()?.saturating_sub(before[name].as_u64()?);
    (ahead + waited_for > 0).then(|| ahead as f64 / (ahead + waited_for) as f64)
}

/// Bytes that the device wrote for each byte kept there, over this replay. `None` when the caller may not see it.
#[expect(clippy::cast_precision_loss, reason = "a ratio")]
fn write_amplification(before: &Value, after: &Value) -> Option<f64> {
    let grown = |name: &str| Some(after[name].as_u64()?.saturating_sub(before[name].as_u64()?));
    let (admitted, written) = (grown("device_admitted_bytes")?, grown("device_written_bytes")?);
    (admitted > 0).then(|| written as f64 / admitted as f64)
}

/// The rate of copies of this size over a working set of 64 MiB, median of a few rounds.
#[expect(clippy::cast_precision_loss, reason = "a rate")]
fn memcpy_gbps(content: &Content, block_bytes: usize) -> f64 {
    let bytes = (64usize << 20).next_multiple_of(block_bytes);
    let mut source = vec![0; bytes];
    content.fill(0, &mut source);
    let mut target = vec![0; bytes];
    let mut rounds: Vec<f64> = (0..5)
        .map(|_| {
            let begun = Instant::now();
            for (target, source) in target
                .chunks_exact_mut(block_bytes)
                .zip(source.chunks_exact(block_bytes))
            {
                target.copy_from_slice(std::hint::black_box(source));
            }
            std::hint::black_box(&target);
            bytes as f64 / begun.elapsed().as_secs_f64() / 1e9
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[rounds.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::{block_bytes, range};

    #[test]
    fn ranges_are_half_open_and_may_lack_an_end() {
        assert_eq!(range("3..7"), Ok((3, 7)));
        assert_eq!(range("..7"), Ok((0, 7)));
        assert_eq!(range("3.."), Ok((3, u64::MAX)));
        for text in ["3", "7..3", "3..3", "a..b", "-1..2"] {
            assert!(range(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_block_has_a_size_that_a_daemon_can_take() {
        assert_eq!(block_bytes("16KiB"), Ok(16384));
        assert_eq!(block_bytes("64MiB"), Ok(64 << 20));
        for text in ["0", "65MiB", "x"] {
            assert!(block_bytes(text).is_err(), "{text}");
        }
    }
}
