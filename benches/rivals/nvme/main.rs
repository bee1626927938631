//! kvtier's NVMe tier beside foyer's disk cache: 1 MiB values, direct I/O, 16 readers.
//!
//! How it measures, and why that is fair:
//!
//! - Each engine writes and reads the same values in a new directory of the same file system, one engine after the other in
//!   each round, each in a process of its own: foyer's io_uring thread spins on after its cache is gone, and would spin
//!   beside whoever comes next. Who goes first changes with the round. Rows hold medians over rounds, ratios are of one
//!   round.
//! - 16 tasks on one tokio runtime put or read, each with one operation under way, whatever the engine. Reads are in random
//!   order. Every value that is read is summed up by its reader, on the clock, and compared with what was put.
//! - Writes count from the first put until all is on the device: ours is synced, so that a power cut loses nothing; foyer's
//!   flushers are waited for, which sync nothing. Some puts before that are not measured, so that foyer's buffers are
//!   touched. What was lost does not count as written.
//! - foyer runs with the best settings that were found (`rival::Setup`), on jemalloc as its own benchmarks do. Nobody waits
//!   inside its `insert`, and what finds no room there is dropped in silence; here its writers wait until it lets go of an
//!   earlier value. `foyer unpaced` shows what happens otherwise. Its reads go to its storage engine directly.
//! - Ours has its default engine and bounds. Its memory is made as host memory is made; each reader's block is read into
//!   again, as the allocator hands foyer's buffers out again.
//!
//! It ends with an error when a key that ours took is not readable or its bytes are wrong.

mod cache;
mod engine;
mod once;
mod options;
mod ours;
mod rival;
mod row;
mod values;

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Parser as _, ValueEnum as _};

use engine::Engine;
use once::Once;
use options::Options;
use row::{Rounds, Row, Table};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// After a directory was removed, the device has this much time to forget what lay there.
const REST: Duration = Duration::from_secs(1);

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let directory = options.directory()?;
    if let Some(engine) = options.once {
        let measured = once::measure(engine, &directory, options.values as usize, options.seed)?;
        println!("{}", serde_json::to_string(&measured)?);
        return Ok(());
    }
    let rows = row::rows(&measure(&options, &directory)?);
    if options.json {
        for row in &rows {
            println!("{}", serde_json::to_string(row)?);
        }
    } else {
        print!("{}", Table(&rows));
    }
    for verdict in row::verdicts(&rows) {
        eprintln!("{verdict}");
    }
    check_ours(&rows)
}

fn measure(options: &Options, directory: &Path) -> anyhow::Result<Vec<Rounds>> {
    let engines = if options.engines.is_empty() {
        Engine::value_variants()
    } else {
        &options.engines
    };
    let mut measured: Vec<Rounds> = engines.iter().map(|engine| (*engine, Vec::new())).collect();
    for round in 0..options.rounds {
        let count = measured.len();
        for turn in 0..count {
            let (engine, rounds) = &mut measured[(turn + round as usize) % count];
            let once = in_process(*engine, directory, options.values, round)?;
            eprintln!(
                "round {} of {}: {} {}: wrote in {:.2} s, read in {:.2} s, {} of {} keys; load {}",
                round + 1,
                options.rounds,
                engine.name(),
                engine.encryption(),
                once.write.seconds,
                once.read.seconds,
                once.tally.right,
                options.values,
                load()
            );
            rounds.push(once);
            rustix::fs::sync();
            thread::sleep(REST);
        }
    }
    Ok(measured)
}

/// One engine in one round, in a process of its own.
fn in_process(engine: Engine, directory: &Path, values: u32, seed: u32) -> anyhow::Result<Once> {
    let name = engine.to_possible_value().context("every engine has a name")?;
    let output = Command::new(std::env::current_exe()?)
        .args(["--once", name.get_name(), "--dir"])
        .arg(directory)
        .args(["--values", &values.to_string(), "--seed", &seed.to_string()])
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(
        output.status.success(),
        "{} ended with {}",
        name.get_name(),
        output.status
    );
    serde_json::from_slice(&output.stdout).context("what a measurement says")
}

fn check_ours(rows: &[Row]) -> anyhow::Result<()> {
    for row in rows.iter().filter(|row| row.engine == Engine::Kvtier.name()) {
        ensure!(
            row.keys_readable == row.keys_put && row.wrong_bytes == 0,
            "{} of {} keys that kvtier took are readable, {} bytes are wrong",
            row.keys_readable,
            row.keys_put,
            row.wrong_bytes
        );
    }
    Ok(())
}

/// The machine's load average over a minute, for the reader who wonders about odd figures.
fn load() -> String {
    std::fs::read_to_string("/proc/loadavg").map_or_else(
        |_| "unknown".to_owned(),
        |text| text.split(' ').next().unwrap_or_default().to_owned(),
    )
}
