//! The client data path against memcpy and an echo: what `kvctl bench client` runs.
//!
//! How it measures, and why that is fair:
//!
//! - This process is the client, with one thread that calls. The daemon is another process, the echo server a third. The
//!   client is pinned to one core and both others to a second one (the same when there is only one); the rows say so.
//! - A round visits every case once: memcpy of the case's shape, echoes, then the case. A case is compared with the
//!   baselines of its own round, and a row holds medians over rounds: load that comes and goes falls on both.
//! - Every copy cycles through a working set of at least 1 GiB on both sides: the shared blocks (the daemon's segments; for
//!   memcpy a memfd of the same page kind, made the same way) and the private buffer (the same one for memcpy and for the
//!   case). Nothing is in a cache because the call before it left it there.
//! - Puts are of fresh keys into a tier that is already full, so each one makes the daemon forget the oldest blocks, as in a
//!   cache that has run for a while. The blocks that gets read are read often enough to stay.
//! - Every byte that a timed `get_into` wrote is compared after its round; before it, a word of every page is spoilt. Blocks
//!   that were put are sampled and read back.
//! - CPU time is that of both processes, ended threads included. Nobody polls: see `cpu_us` of `echo` and `lookup`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::baseline::process_cpu_time;
use crate::daemon::Daemon;
use crate::echo::{ECHO_BYTES, Echo};
use crate::placement::Placement;
use crate::{BenchError, Row, load, meets};

mod lookups;
mod samples;
mod session;
mod transfers;
mod working_set;

use samples::{Calls, Round, Samples};
use session::Session;

/// Cases that ask a daemon, as [`Options::cases`] spells them.
pub const CASES: [&str; 4] = ["get_into", "put_from", "get_in_place", "lookup"];

/// What to measure, and against which daemon.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A daemon that runs already. Its placement is left alone. `None`: one is started for each part, of the size it needs.
    pub socket: Option<PathBuf>,
    /// The token that joins a trust domain of that daemon.
    pub token: Option<String>,
    /// Path of the `kv-daemon` to start when there is no socket.
    pub daemon: Option<PathBuf>,
    /// Program and arguments that run [`crate::echo_server_main`] with one more argument: the socket's path.
    pub echo_command: Vec<String>,
    /// Small working sets and few rounds: shows that everything runs; the figures mean little.
    pub quick: bool,
    /// Rounds behind each median. `None`: 15, or 3 when quick.
    pub rounds: Option<u32>,
    /// Which of [`CASES`]; empty: all. Baselines are measured beside whatever is chosen.
    pub cases: Vec<String>,
    /// Bytes to cycle through. `None`: 1 GiB, or 64 MiB when quick.
    pub working_set_bytes: Option<u64>,
    /// Blocks resident for lookups. `None`: 2^20, or 2^16 when quick.
    pub lookup_blocks: Option<u64>,
}

impl Options {
    fn wants(&self, case: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|wanted| wanted == case)
    }

    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 3 } else { 15 }).max(1)
    }

    fn working_set_bytes(&self) -> u64 {
        self.working_set_bytes
            .unwrap_or(if self.quick { 64 << 20 } else { 1 << 30 })
            .max(64 << 20)
    }

    fn lookup_blocks(&self) -> u64 {
        self.lookup_blocks
            .unwrap_or(if self.quick { 1 << 16 } else { 1 << 20 })
            .next_multiple_of(session::BATCH_KEYS_MAX as u64)
    }

    fn check(&self) -> Result<(), BenchError> {
        if let Some(unknown) = self.cases.iter().find(|case| !CASES.contains(&case.as_str())) {
            return Err(BenchError::Options(format!(
                "unknown case {unknown}: choose among {}",
                CASES.join(", ")
            )));
        }
        if self.socket.is_none() && self.daemon.is_none() {
            return Err(BenchError::Options(
                "without a socket, the path of kv-daemon is needed".to_owned(),
            ));
        }
        Ok(())
    }
}

/// Measures, and tells `progress` in words what is going on and, at the end, which promised figures are met.
///
/// Needs, at full size and without a socket, about 4.5 GiB of memory and a minute.
///
/// # Errors
/// When the daemon or the echo server does not start, the client answers with an error, or bytes are wrong. A figure that is
/// not met is no error.
pub fn run(options: Options, progress: &mut dyn FnMut(&str)) -> Result<Vec<Row>, BenchError> {
    options.check()?;
    let directory = tempfile::Builder::new()
        .prefix("kvtier-bench")
        .tempdir()
        .map_err(BenchError::system("a temporary directory"))?;
    let mut rows = Vec::new();
    let mut bench = Bench {
        directory: directory.path().to_owned(),
        echo_samples: Samples::default(),
        described: String::new(),
        options,
        progress,
    };
    for shapes in transfers::PARTS {
        rows.extend(transfers::measure(&mut bench, shapes)?);
    }
    rows.extend(lookups::measure(&mut bench)?);
    let echo = Row {
        case: "echo",
        bytes: ECHO_BYTES as u64,
        batch: 1,
        placement: bench.described.clone(),
        ..Row::default()
    };
    let echo = bench.echo_samples.fill(echo, false);
    rows.insert(0, echo);
    for bar in meets(&rows) {
        (bench.progress)(&bar.to_string());
    }
    Ok(rows)
}

/// What every part of a run shares.
struct Bench<'a> {
    options: Options,
    directory: PathBuf,
    echo_samples: Samples,
    described: String,
    progress: &'a mut dyn FnMut(&str),
}

/// A daemon under measurement, an echo server beside it, and this thread pinned. Ends in that order's reverse.
struct Stand {
    session: Session,
    echo: Echo,
    placement: Placement,
    daemon: Option<Daemon>,
}

impl Bench<'_> {
    fn say(&mut self, words: &str) {
        (self.progress)(words);
    }

    /// Brings up what one part needs: a daemon of `host_bytes`, or the one that was named.
    fn stand(&mut self, part: &str, host_bytes: u64) -> Result<Stand, BenchError> {
        let daemon = match (&self.options.socket, &self.options.daemon) {
            (None, Some(program)) => {
                let directory = self.directory.join(part);
                std::fs::create_dir(&directory).map_err(BenchError::system("a directory for the daemon"))?;
                let program = program.clone();
                self.say(&format!(
                    "{part}: starting a daemon with {} MiB of host memory",
                    host_bytes >> 20
                ));
                Some(Daemon::start(&program, &directory, host_bytes)?)
            }
            _ => None,
        };
        let socket = daemon
            .as_ref()
            .map(|daemon| daemon.socket.clone())
            .or_else(|| self.options.socket.clone());
        let socket = socket.expect("checked: a socket or a daemon");
        let token = self.options.token.clone();
        session::wait_until_serving(&socket, token.as_deref())?;
        // Pinned only now: the daemon's memory is made ready on every core. Threads that connections start inherit it.
        let placement = Placement::take();
        if let (Some(daemon), Some(core)) = (&daemon, placement.other) {
            core.pin_process(daemon.process())
                .map_err(BenchError::system("placement of the daemon"))?;
        }
        let session = Session::connect(&socket, token.as_deref())?;
        let echo = Echo::start(&self.options.echo_command, &self.directory, placement.other)?;
        self.described = placement.describe(daemon.is_some());
        let described = format!("{part}: {}; load {}", self.described, load());
        self.say(&described);
        Ok(Stand {
            session,
            echo,
            placement,
            daemon,
        })
    }

    /// A round of echoes.
    fn echoes(&mut self, stand: &mut Stand) -> Result<Round, BenchError> {
        let server = stand.echo.process();
        let before = cpu_time(&[Some(server)]);
        let mut times = Vec::with_capacity(64);
        for _ in 0..64 {
            times.push(stand.echo.round_trip()?);
        }
        let cpu = spent(before, cpu_time(&[Some(server)]));
        Ok(self.echo_samples.add(
            &Calls {
                times,
                bytes_per_call: ECHO_BYTES as u64,
                cpu,
            },
            None,
            None,
        ))
    }
}

impl Stand {
    /// Calls `call` for each of `inputs`, timing each, with the CPU time of client and daemon around them.
    fn calls<T>(
        &mut self,
        bytes_per_call: u64,
        inputs: impl IntoIterator<Item = T>,
        mut call: impl FnMut(&Session, T) -> Result<Option<Duration>, BenchError>,
    ) -> Result<Calls, BenchError> {
        let daemon = self.session.daemon_process();
        let before = cpu_time(&[daemon]);
        let mut times = Vec::new();
        for input in inputs {
            times.extend(call(&self.session, input)?);
        }
        let cpu = daemon.and_then(|_| spent(before, cpu_time(&[daemon])));
        Ok(Calls {
            times,
            bytes_per_call,
            cpu,
        })
    }

    /// Host memory for blocks; `wanted_bytes` where this user may not see it.
    fn capacity_bytes(&self, wanted_bytes: u64) -> Result<u64, BenchError> {
        Ok(self
            .session
            .status()?
            .map_or(wanted_bytes, |status| status.counters.host_capacity_bytes))
    }

    fn end(self) -> Result<(), BenchError> {
        let Stand {
            session,
            echo,
            placement,
            daemon,
        } = self;
        session.forget_everything()?;
        drop((echo, placement));
        daemon.map_or(Ok(()), Daemon::stop)
    }
}

/// CPU time so far of this process and `others`; `None` when one of them cannot be asked.
fn cpu_time(others: &[Option<u32>]) -> Option<Duration> {
    let mut total = process_cpu_time(std::process::id())?;
    for other in others.iter().flatten() {
        total += process_cpu_time(*other)?;
    }
    Some(total)
}

fn spent(before: Option<Duration>, after: Option<Duration>) -> Option<Duration> {
    after?.checked_sub(before?)
}

/// Times one call.
fn timed<R>(call: impl FnOnce() -> Result<R, BenchError>) -> Result<(R, Duration), BenchError> {
    let started = Instant::now();
    let result = call()?;
    Ok((result, started.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_cannot_be_are_refused_with_the_remedy() {
        let unknown = Options {
            cases: vec!["get".to_owned()],
            socket: Some("s".into()),
            ..Options::default()
        };
        assert!(unknown.check().unwrap_err().to_string().contains("get_into"));
        assert!(
            Options::default()
                .check()
                .unwrap_err()
                .to_string()
                .contains("kv-daemon")
        );
    }

    #[test]
    fn a_full_run_cycles_through_a_gib_and_looks_among_a_million_blocks() {
        let options = Options::default();
        assert_eq!(
            (options.working_set_bytes(), options.lookup_blocks()),
            (1 << 30, 1 << 20)
        );
    }
}
