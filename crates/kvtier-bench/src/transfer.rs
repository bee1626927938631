//! Transports against the rawest way to move the same bytes: what `kvctl bench transfer` runs.
//!
//! How it measures, and why that is fair:
//!
//! - Both ends of both ways run in this process, so that its CPU time is that of both ends. Sources and targets are regions
//!   of the same pages and the same working set, larger than the caches, every page present.
//! - `tcp` against a socket with the same number of connections on the loopback interface, a thread a connection on each
//!   side, receiving straight into the target; one piece at a time with the sides on a core each. `loopback` and `shm` against memcpy by one thread; `verbs`, where a device
//!   is, against a loop of RDMA reads of the same size over one queue pair of the same device.
//! - Each round runs ours and the raw way one after the other, for the same time; the ratio is of one round. Load that comes
//!   and goes falls on both.
//! - `nodes`: a client gets blocks that another node has: question, lease, read, check, seal and answer, beside that raw socket.
//! - What was read is compared once for each case, outside the measured time.

mod nodes;
mod row;
mod stand;

use std::time::{Duration, Instant};

pub use row::{Row, meets};

use crate::baseline::process_cpu_time;
use crate::{BenchError, load};
use stand::Stand;

/// What to measure.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Short rounds and few: shows that everything runs; the figures mean little.
    pub quick: bool,
    /// Rounds of each case. `None`: 9, or 2 when quick.
    pub rounds: Option<u32>,
    /// Transports; empty: all that this machine has.
    pub transports: Vec<String>,
    /// Sizes of a piece, bytes; empty: 16 KiB, 64 KiB, 1 MiB and 4 MiB.
    pub bytes: Vec<usize>,
}

/// Bytes of sources and of targets.
pub(crate) const WORKING_SET_BYTES: usize = 128 << 20;
const TRANSPORTS: [&str; 4] = ["loopback", "shm", "tcp", "verbs"];
const SIZES: [usize; 4] = [16 << 10, 64 << 10, 1 << 20, 4 << 20];
const BATCH: usize = 16;

/// Pieces of a batch and connections.
struct Shape {
    batch: usize,
    connections: usize,
}

impl Options {
    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 2 } else { 9 }).max(1)
    }

    /// How long each way runs in a round.
    fn turn(&self) -> Duration {
        Duration::from_millis(if self.quick { 20 } else { 300 })
    }
}

/// Measures every case. `say` hears what is going on.
///
/// # Errors
/// When a transport does not start, fails, or moves wrong bytes.
pub fn run(options: &Options, say: &mut dyn FnMut(&str)) -> Result<Vec<Row>, BenchError> {
    if let Some(unknown) = options
        .transports
        .iter()
        .find(|name| !TRANSPORTS.contains(&name.as_str()) && *name != "nodes")
    {
        return Err(BenchError::Options(format!(
            "no transport {unknown}: there are {}, and nodes for whole nodes over TCP",
            TRANSPORTS.join(", ")
        )));
    }
    let sizes = if options.bytes.is_empty() {
        SIZES.to_vec()
    } else {
        options.bytes.clone()
    };
    if let Some(size) = sizes
        .iter()
        .find(|size| **size == 0 || **size * BATCH > WORKING_SET_BYTES)
    {
        return Err(BenchError::Options(format!(
            "{size} bytes: a piece has at least one, and {BATCH} of them fit {WORKING_SET_BYTES}"
        )));
    }
    let mut rows = Vec::new();
    for transport in TRANSPORTS {
        let wanted = options.transports.is_empty() || options.transports.iter().any(|name| name == transport);
        if !wanted {
            continue;
        }
        for shape in shapes(transport) {
            let apart = transport == "tcp" && shape.batch == 1;
            let mut stand = match Stand::set_up(transport, shape.connections, apart) {
                Ok(stand) => stand,
                // Without a device there is nothing to measure; asked for by name, that is an error.
                Err(BenchError::Options(why)) if options.transports.is_empty() => {
                    say(&format!("{transport}: not measured: {why}"));
                    break;
                }
                Err(error) => return Err(error),
            };
            for bytes in &sizes {
                let row = measure(&mut stand, transport, *bytes, &shape, options)?;
                say(&format!(
                    "{transport}, {bytes} bytes, batch {}, {} connections: {:.2} GB/s, {:.2} of {:.2}",
                    shape.batch, shape.connections, row.gbps, row.ratio_to_raw, row.raw_gbps
                ));
                rows.push(row);
            }
        }
    }
    if options.transports.is_empty() || options.transports.iter().any(|name| name == "nodes") {
        rows.extend(nodes::run(&sizes, options.rounds(), options.quick, say)?);
    }
    Ok(rows)
}

fn shapes(transport: &str) -> Vec<Shape> {
    let shape = |batch, connections| Shape { batch, connections };
    match transport {
        "tcp" => vec![shape(1, 1), shape(BATCH, 1), shape(BATCH, 2)],
        "verbs" => vec![shape(BATCH, 1)],
        _ => vec![shape(1, 0), shape(BATCH, 0)],
    }
}

/// One way's figures in one round.
struct Turn {
    gbps: f64,
    cpu_s_per_gb: f64,
}

fn measure(
    stand: &mut Stand,
    transport: &'static str,
    bytes: usize,
    shape: &Shape,
    options: &Options,
) -> Result<Row, BenchError> {
    let load = load();
    stand.check(bytes, shape.batch)?;
    let (mut times, mut raw_times) = (Vec::new(), Vec::new());
    let (mut turns, mut raw_turns) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds() {
        turns.push(turn(options.turn(), bytes * shape.batch, &mut times, |at| {
            stand.read(bytes, shape.batch, at)
        })?);
        raw_turns.push(turn(options.turn(), bytes * shape.batch, &mut raw_times, |at| {
            stand.read_raw(bytes, shape.batch, at)
        })?);
    }
    let of = |turns: &[Turn], figure: fn(&Turn) -> f64| median(turns.iter().map(figure).collect());
    let ratios = turns.iter().zip(&raw_turns).map(|(ours, raw)| ours.gbps / raw.gbps);
    Ok(Row {
        case: "read",
        transport,
        bytes: bytes as u64,
        batch: shape.batch as u64,
        connections: shape.connections as u64,
        gbps: of(&turns, |turn| turn.gbps),
        raw_gbps: of(&raw_turns, |turn| turn.gbps),
        ratio_to_raw: median(ratios.collect()),
        p50_us: percentile(&mut times, 0.5),
        raw_p50_us: percentile(&mut raw_times, 0.5),
        p99_us: percentile(&mut times, 0.99),
        cpu_s_per_gb: of(&turns, |turn| turn.cpu_s_per_gb),
        raw_cpu_s_per_gb: of(&raw_turns, |turn| turn.cpu_s_per_gb),
        rounds: options.rounds(),
        load,
    })
}

/// Repeats `once` for `length`, and three times at least.
fn turn(
    length: Duration,
    bytes: usize,
    times: &mut Vec<f64>,
    mut once: impl FnMut(usize) -> Result<(), BenchError>,
) -> Result<Turn, BenchError> {
    let cpu = || process_cpu_time(std::process::id()).unwrap_or_default();
    let (begun, cpu_before) = (Instant::now(), cpu());
    let mut count = 0;
    while count < 3 || begun.elapsed() < length {
        let before = Instant::now();
        once(count)?;
        times.push(before.elapsed().as_secs_f64() * 1e6);
        count += 1;
    }
    let seconds = begun.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let gigabytes = (count * bytes) as f64 / 1e9;
    Ok(Turn {
        gbps: gigabytes / seconds,
        cpu_s_per_gb: (cpu() - cpu_before).as_secs_f64() / gigabytes,
    })
}

fn percentile(times: &mut [f64], part: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index"
    )]
    let at = ((times.len() - 1) as f64 * part).round() as usize;
    times[at]
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_transport_of_this_machine_is_measured_beside_its_raw_way() {
        let options = Options {
            quick: true,
            rounds: Some(1),
            bytes: vec![64 << 10],
            transports: ["loopback", "shm", "tcp"].map(str::to_owned).to_vec(),
        };
        let rows = run(&options, &mut |_| {}).expect("measured");
        assert_eq!(rows.len(), 7);
        for row in rows {
            assert!(
                row.gbps > 0.0 && row.raw_gbps > 0.0 && row.ratio_to_raw > 0.0,
                "{row:?}"
            );
            assert!(row.p50_us > 0.0 && row.p99_us >= row.p50_us, "{row:?}");
        }
    }

    #[test]
    fn what_cannot_be_measured_is_told() {
        let options = Options {
            transports: vec!["pigeon".to_owned()],
            ..Options::default()
        };
        assert!(matches!(run(&options, &mut |_| {}), Err(BenchError::Options(_))));
    }
}
