//! Copies between host memory that a node shares and a GPU, beside the barest ones: what `kvctl bench gpu` runs.
//!
//! Each round runs ours and the bare way one after the other, the same bytes each. The bare way is one `cuMemcpyAsync` for each
//! block between memory that the driver allocated, on one stream, waited for once. Ours is the same blocks between a region like
//! a node's segments, pinned by registration, as one batch; `gather` and `scatter` move the same bytes in pages of 16 KiB that lie
//! apart on the device. `put`, `get` and `get_hbm` are calls of a client of a node: from arrays on the device, into them from host
//! memory, and into them from the node's own memory on the device, whose bare way is a copy within the device. `compute` is a stream of
//! multiplications of matrices while pages are copied without a pause, beside the same alone: bytes of matrices a second, and the ratio is
//! what copies leave of it. What arrived is
//! compared once for each case, outside the measured time.

mod node;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvtier_transfer::gpu::{
    Copy, Cuda, DeviceSlice, Gpu, GpuError, HostRegistration, Multiplications, PieceMover, PieceMoverWanted, Place,
    RawCopies, Stream,
};
use kvtier_transfer::memory::{MemoryRegion, MemorySlice, PageRequest};
use serde::Serialize;

use crate::{BenchError, load, pattern};

/// Bytes on either side.
const WORKING_SET_BYTES: usize = 64 << 20;
const SIZES: [usize; 2] = [1 << 20, 16 << 20];
const PAGE_BYTES: usize = 16 << 10;

/// What to measure.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Which device.
    pub device: usize,
    /// A driver library instead of the system's.
    pub library: Option<PathBuf>,
    /// Short rounds and few: shows that everything runs; the figures mean little.
    pub quick: bool,
    /// Rounds of each case. `None`: 9, or 2 when quick.
    pub rounds: Option<u32>,
}

/// One case.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// `h2d`, `d2h`, `scatter` (h2d in pages), `gather` (d2h in pages); of a client `put`, `get` (from host memory) or `get_hbm`
    /// (from memory of the device); `compute`, where the device runs kernels.
    pub case: &'static str,
    /// Of a block.
    pub bytes: u64,
    /// Of a piece on the device: the block, or a page.
    pub piece_bytes: u64,
    /// What moved pages: `kernel` or `copy_engines`, whichever was found to be faster before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub piece_mover: Option<&'static str>,
    /// GB/s.
    pub gbps: f64,
    /// GB/s of the bare way.
    pub bare_gbps: f64,
    /// Median of the rounds' ratios.
    pub ratio: f64,
    /// The device's name.
    pub device: String,
    /// Rounds behind each median.
    pub rounds: u32,
    /// One-minute load average before.
    pub load: String,
}

struct Stand {
    /// Keeps the region pinned.
    _registration: HostRegistration,
    stream: Stream,
    device: DeviceSlice,
    host: MemorySlice,
    bare: RawCopies,
}

/// Measures every case. `say` hears what is going on.
///
/// # Errors
/// `Unavailable` where there is no driver or device; wrong bytes.
pub fn run(options: &Options, say: &mut dyn FnMut(&str)) -> Result<Vec<Row>, BenchError> {
    let cuda = match &options.library {
        None => Cuda::open(),
        Some(library) => Cuda::open_at(library),
    };
    let cuda = cuda.map_err(|why| BenchError::Gpu(why.to_string()))?;
    let gpu = cuda.device(options.device).map_err(failed)?;
    say(&format!("device {}: {}", options.device, gpu.name()));
    let stand = Stand::set_up(&gpu)?;
    let chosen = gpu.choose_piece_mover(PieceMoverWanted::Faster);
    say(&format!("pages are moved by: {chosen}"));
    let piece_mover = match chosen.mover {
        PieceMover::Kernel => "kernel",
        PieceMover::CopyEngines => "copy_engines",
    };
    let rounds = options.rounds.unwrap_or(if options.quick { 2 } else { 9 }).max(1);
    let turn = Duration::from_millis(if options.quick { 20 } else { 300 });
    let work = Multiplications::new(&gpu);
    if let Err(error) = &work {
        say(&format!("not executed: compute beside copies: {error}"));
    }
    let work = work.ok();
    let mut rows = Vec::new();
    let mut add = |case, (bytes, piece): (usize, usize), turns: &[(f64, f64)], load| {
        let row = Row {
            case,
            bytes: bytes as u64,
            piece_bytes: piece as u64,
            piece_mover: (piece == PAGE_BYTES).then_some(piece_mover),
            gbps: median(turns.iter().map(|(ours, _)| *ours)),
            bare_gbps: median(turns.iter().map(|(_, bare)| *bare)),
            ratio: median(turns.iter().map(|(ours, bare)| ours / bare)),
            device: gpu.name().to_owned(),
            rounds,
            load,
        };
        say(&format!(
            "{case}, {bytes} bytes in pieces of {piece}: {:.2} GB/s, {:.2} of {:.2}",
            row.gbps, row.ratio, row.bare_gbps
        ));
        rows.push(row);
    };
    for bytes in SIZES {
        for (case, up, piece) in [
            ("h2d", true, bytes),
            ("d2h", false, bytes),
            ("scatter", true, PAGE_BYTES),
            ("gather", false, PAGE_BYTES),
        ] {
            let load = load();
            stand.check(case, piece)?;
            let mut turns = Vec::new();
            for _ in 0..rounds {
                let ours = rate(turn, || stand.copy(up, piece))?;
                let bare = rate(turn, || stand.bare.run(up, bytes).map_err(failed))?;
                turns.push((ours, bare));
            }
            add(case, (bytes, piece), &turns, load);
        }
    }
    if let Some(work) = work {
        let load = load();
        let turns = stand.compute(&work, turn, rounds)?;
        add("compute", (Multiplications::BYTES, PAGE_BYTES), &turns, load);
    }
    drop(stand);
    let mut stand = node::Stand::start(options, &gpu)?;
    for bytes in SIZES {
        for (case, call) in node::Call::ALL {
            let load = load();
            let turns = stand.measure(call, bytes, turn, rounds)?;
            add(case, (bytes, bytes), &turns, load);
        }
    }
    Ok(rows)
}

impl Stand {
    fn set_up(gpu: &Arc<Gpu>) -> Result<Stand, BenchError> {
        let (region, _file) =
            MemoryRegion::create("kvtier-bench-gpu", WORKING_SET_BYTES, PageRequest::Auto).map_err(failed)?;
        region.prefault(&|_| {}).map_err(failed)?;
        let device = gpu.allocate(WORKING_SET_BYTES).map_err(failed)?;
        Ok(Stand {
            _registration: gpu.register(&region).map_err(failed)?,
            stream: gpu.stream().map_err(failed)?,
            device: device.slice(0, WORKING_SET_BYTES).map_err(failed)?,
            host: region.slice(0, WORKING_SET_BYTES).map_err(failed)?,
            bare: RawCopies::new(gpu, WORKING_SET_BYTES).map_err(failed)?,
        })
    }

    /// Where piece `at` lies on the device: pages are spread by a step that meets each once.
    fn place(at: usize, piece: usize) -> usize {
        const STEP: usize = 1663;
        let count = WORKING_SET_BYTES / piece;
        if piece == PAGE_BYTES { at * STEP % count } else { at }
    }

    fn copy(&self, up: bool, piece: usize) -> Result<(), BenchError> {
        let mut copies = Vec::with_capacity(WORKING_SET_BYTES / piece);
        for at in 0..WORKING_SET_BYTES / piece {
            let host = Place::Host(self.host.subslice(at * piece, piece).map_err(failed)?);
            let there = self.device.subslice(Stand::place(at, piece) * piece, piece);
            let there = Place::Device(there.map_err(failed)?);
            let (source, target) = if up { (host, there) } else { (there, host) };
            copies.push(Copy { source, target });
        }
        self.stream.submit(copies).map_err(failed)?.wait().map_err(failed)
    }

    /// What a stream of multiplications comes to while pages are scattered and gathered without a pause, and alone.
    fn compute(&self, work: &Multiplications, turn: Duration, rounds: u32) -> Result<Vec<(f64, f64)>, BenchError> {
        const AT_ONCE: u32 = 8;
        let rate = || -> Result<f64, GpuError> {
            let begun = Instant::now();
            let mut count = 0;
            while count == 0 || begun.elapsed() < turn {
                work.run(AT_ONCE)?;
                count += AT_ONCE;
            }
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            let gigabytes = Multiplications::BYTES as f64 / 1e9 * f64::from(count);
            Ok(gigabytes / begun.elapsed().as_secs_f64())
        };
        rate().map_err(failed)?;
        let mut turns = Vec::new();
        for _ in 0..rounds {
            let is_over = AtomicBool::new(false);
            let beside = std::thread::scope(|scope| {
                let computing = scope.spawn(|| {
                    let beside = rate();
                    is_over.store(true, Ordering::Relaxed);
                    beside
                });
                let mut up = true;
                let mut copied = Ok(());
                while copied.is_ok() && !is_over.load(Ordering::Relaxed) {
                    copied = self.copy(up, PAGE_BYTES);
                    up = !up;
                }
                let beside = computing.join().expect("computing does not panic");
                copied.and_then(|()| beside.map_err(failed))
            });
            turns.push((beside?, rate().map_err(failed)?));
        }
        Ok(turns)
    }

    /// Once there and back with the bytes compared.
    fn check(&self, case: &'static str, piece: usize) -> Result<(), BenchError> {
        const BLOCK: usize = 1 << 20;
        let mut block = vec![0; BLOCK];
        for at in 0..WORKING_SET_BYTES / BLOCK {
            pattern::write(at as u64, &mut block);
            let part = self.host.subslice(at * BLOCK, BLOCK).map_err(failed)?;
            part.copy_from_slice(&block).map_err(failed)?;
        }
        self.copy(true, piece)?;
        self.host.zero();
        self.copy(false, piece)?;
        for at in 0..WORKING_SET_BYTES / BLOCK {
            let part = self.host.subslice(at * BLOCK, BLOCK).map_err(failed)?;
            if !pattern::matches(at as u64, &part.to_vec()) {
                let block = at as u64;
                return Err(BenchError::WrongBytes { case, block });
            }
        }
        Ok(())
    }
}

/// GB/s of repeating `once`, which moves the working set, for `length`.
fn rate(length: Duration, mut once: impl FnMut() -> Result<(), BenchError>) -> Result<f64, BenchError> {
    let begun = Instant::now();
    let mut count = 0u32;
    while count == 0 || begun.elapsed() < length {
        once()?;
        count += 1;
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let gigabytes = WORKING_SET_BYTES as f64 / 1e9 * f64::from(count);
    Ok(gigabytes / begun.elapsed().as_secs_f64())
}

fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn failed(error: impl std::fmt::Display) -> BenchError {
    BenchError::Gpu(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_runs_on_the_software_device() {
        let program = std::env::current_exe().expect("a program");
        let options = Options {
            library: Some(program.with_file_name("libkvtier_softgpu.so")),
            quick: true,
            rounds: Some(1),
            ..Options::default()
        };
        let rows = run(&options, &mut |_| {}).expect("measured");
        assert_eq!(rows.len(), 14);
        for row in rows {
            assert!(row.gbps > 0.0 && row.bare_gbps > 0.0 && row.ratio > 0.0, "{row:?}");
        }
    }

    #[test]
    fn pages_are_spread_so_that_each_place_is_met_once() {
        let count = WORKING_SET_BYTES / PAGE_BYTES;
        let places: std::collections::HashSet<usize> = (0..count).map(|at| Stand::place(at, PAGE_BYTES)).collect();
        assert_eq!(places.len(), count);
    }

    #[test]
    fn no_driver_is_told_in_words() {
        let options = Options {
            library: Some("/nowhere/libcuda.so.1".into()),
            ..Options::default()
        };
        let error = run(&options, &mut |_| {}).expect_err("no such file");
        assert!(error.to_string().starts_with("cuda unavailable: "), "{error}");
    }
}
