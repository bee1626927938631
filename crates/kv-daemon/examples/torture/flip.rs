//! Bytes of the segment files are changed, some before each start, and everything is read: right, or a counted miss.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kv_daemon::content::Content;
use kv_daemon::exit::{ExitCode, Failure};
use kvtier::client::{ClientError, Lineage, PutOutcome};
use kvtier_sim::Random;
use serde_json::json;

use crate::daemon::{Daemon, Stage, system};
use crate::key::{Key, NAMESPACES};
use crate::ledger::{Ledger, State};
use crate::plan::Shape;
use crate::reader::Comparison;
use crate::report::print;
use crate::verify::{self, Check, read_everything};

const MIB: u64 = 1 << 20;

/// Bytes changed before one start.
const FLIPS_A_START: u64 = 20;

/// Payload in each namespace.
const FILL_BYTES: usize = 24 << 20;

/// Blocks in one put.
const BATCH: u32 = 8;

/// How long one put may find no room.
const BUSY_LIMIT: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Figures {
    flips: u64,
    starts: u64,
    came_back_blocks: u64,
    missed_blocks: u64,
    corrupt: u64,
    uncounted: u64,
    comparison: Comparison,
}

/// Changes `flips` bytes, half of them in files with encryption, half without.
pub(crate) fn run(stage: &Stage, flips: u64, seed: u64, json: bool) -> Result<(), Failure> {
    let begun = Instant::now();
    let mut random = Random::new(seed);
    let mut figures = Figures::default();
    for (encryption, share) in [("aes-256-gcm", flips.div_ceil(2)), ("none", flips / 2)] {
        let mut found = flip(stage, encryption, share, &mut random)?;
        eprintln!(
            "{encryption}: {} flips before {} starts; {} blocks missed, {} counted as corrupt",
            found.flips, found.starts, found.missed_blocks, found.corrupt
        );
        figures.flips += found.flips;
        figures.starts += found.starts;
        figures.came_back_blocks += found.came_back_blocks;
        figures.missed_blocks += found.missed_blocks;
        figures.corrupt += found.corrupt;
        figures.uncounted += found.uncounted;
        figures.comparison.add(std::mem::take(&mut found.comparison));
    }
    let Comparison {
        verified_bytes,
        wrong_bytes,
        mixed_targets,
        ..
    } = figures.comparison;
    let printed = json!({
        "flips": figures.flips,
        "starts": figures.starts,
        "came_back_blocks": figures.came_back_blocks,
        "verified_bytes": verified_bytes,
        "wrong_bytes": wrong_bytes,
        "mixed_targets": mixed_targets,
        "missed_blocks": figures.missed_blocks,
        "corrupt": figures.corrupt,
        "uncounted": figures.uncounted,
        "seed": seed,
        "seconds": begun.elapsed().as_secs(),
    });
    print(&printed, json);
    let mut complaints = Vec::new();
    for (count, what) in [
        (wrong_bytes, "bytes were wrong"),
        (mixed_targets, "targets were a mixture"),
        (figures.uncounted, "losses were not counted as corrupt, or the reverse"),
    ] {
        if count > 0 {
            complaints.push(format!("{count} {what}"));
        }
    }
    if figures.corrupt == 0 || verified_bytes == 0 {
        complaints.push("no flip was found or no byte was right, so nothing is proved".to_string());
    }
    complaints.extend(figures.comparison.first_wrong);
    if complaints.is_empty() {
        Ok(())
    } else {
        Err(Failure::new(ExitCode::No, complaints.join("; ")))
    }
}

fn flip(stage: &Stage, encryption: &'static str, flips: u64, random: &mut Random) -> Result<Figures, Failure> {
    let state = stage.state();
    if state.exists() {
        fs::remove_dir_all(&state).map_err(|error| system("the earlier state directory", &error))?;
    }
    let mut shape = Shape {
        host_bytes: 32 * MIB,
        nvme_bytes: 96 * MIB,
        segment_bytes: 2 * MIB,
        engine: "auto",
        encryption,
    };
    let (ledger, content) = (Ledger::default(), Content::default());
    let daemon = stage.start(&shape)?;
    fill(&daemon, &ledger, &content)?;
    daemon.stop()?;
    let image = Image::take(&state)?;
    let mut figures = Figures::default();
    let (blocks, check) = start_and_read(stage, &shape, &ledger, &content, random)?;
    let all = ledger.keys().len() as u64;
    if blocks != all || check.corrupt > 0 {
        let words = format!(
            "without any flip {blocks} of {all} blocks came back, and {} were corrupt",
            check.corrupt
        );
        return Err(Failure::new(ExitCode::No, words));
    }
    while figures.flips < flips {
        image.put_back()?;
        let count = FLIPS_A_START.min(flips - figures.flips);
        for _ in 0..count {
            image.flip_one(random)?;
        }
        shape.engine = random.pick(&["auto", "threads"]);
        let (blocks, check) = start_and_read(stage, &shape, &ledger, &content, random)?;
        figures.flips += count;
        figures.starts += 1;
        figures.came_back_blocks += blocks;
        figures.missed_blocks += all - blocks;
        figures.corrupt += check.corrupt;
        // A block that a lookup found and a get did not is one payload that failed its check. Those that not even a lookup
        // found went with a header or an index that failed its own.
        let found_by_gets = check.corrupt - check.corrupt_at_start;
        figures.uncounted += check.vanished.abs_diff(found_by_gets);
        let lost_at_start = all - blocks - check.vanished;
        figures.uncounted += u64::from(lost_at_start > 0 && check.corrupt_at_start == 0);
        figures.comparison.add(check.comparison);
    }
    image.put_back()?;
    Ok(figures)
}

/// How many blocks a daemon on these files still has, all compared.
fn start_and_read(
    stage: &Stage,
    shape: &Shape,
    ledger: &Ledger,
    content: &Content,
    random: &mut Random,
) -> Result<(u64, Check), Failure> {
    let daemon = stage.start(shape)?;
    let check = read_everything(&daemon, ledger, content, random)?;
    daemon.kill()?;
    Ok((check.comparison.hits, check))
}

/// Puts blocks of every length into both namespaces, and flushes.
fn fill(daemon: &Daemon, ledger: &Ledger, content: &Content) -> Result<(), Failure> {
    let client = daemon.connect()?;
    let failed = |error: ClientError| daemon.failure(&format!("takes no blocks: {error}"));
    let namespaces = verify::open(&client, &mut Random::new(0)).map_err(failed)?;
    // Not the first generation, so that a block of another one would be noticed.
    client.invalidate(NAMESPACES[1]).map_err(failed)?;
    for (namespace, open) in namespaces.iter().enumerate() {
        let generation = open.generation().map_err(failed)?.0;
        ledger.acknowledge(namespace, generation);
        let (mut number, mut bytes) = (0, 0);
        while bytes < FILL_BYTES {
            let keys: Vec<Key> = (number..number + BATCH)
                .map(|number| Key {
                    namespace,
                    worker: 0,
                    number,
                })
                .collect();
            number += BATCH;
            ledger.lane(namespace, 0).resize(number as usize, State::default());
            for key in keys {
                let mut block = vec![0; key.length()];
                content.fill(key.id(generation), &mut block);
                bytes += block.len();
                let begun = Instant::now();
                loop {
                    let lineage = Lineage::Chain(key.parent());
                    let put = open.put_from(lineage, &[(key.hash(), &block)], 512).map_err(failed)?;
                    match put.first() {
                        Some(PutOutcome::Published | PutOutcome::Present) => break,
                        _ if begun.elapsed() > BUSY_LIMIT => return Err(daemon.failure("takes no blocks")),
                        _ => std::thread::sleep(Duration::from_millis(1)),
                    }
                }
                ledger.change(key, |state| {
                    (state.tried_at, state.sealed_at) = (ledger.tick(), ledger.tick())
                });
            }
        }
    }
    let flushed = client.flush().map_err(failed)?;
    if flushed.left_out > 0 {
        return Err(daemon.failure(&format!("left {} blocks out of a flush", flushed.left_out)));
    }
    Ok(())
}

/// All files of a state directory, to be put back.
struct Image {
    directory: PathBuf,
    files: BTreeMap<PathBuf, Vec<u8>>,
    segments: Vec<(PathBuf, u64)>,
}

impl Image {
    fn take(directory: &Path) -> Result<Image, Failure> {
        let mut files = BTreeMap::new();
        for path in walk(directory)? {
            let bytes = fs::read(&path).map_err(|error| system(&path.display().to_string(), &error))?;
            files.insert(path, bytes);
        }
        let segments = files.iter().filter(|(path, _)| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with("segment-")
        });
        let segments: Vec<_> = segments
            .map(|(path, bytes)| (path.clone(), bytes.len() as u64))
            .collect();
        if segments.is_empty() {
            let words = format!("no segment files in {}", directory.display());
            return Err(Failure::new(ExitCode::No, words));
        }
        Ok(Image {
            directory: directory.to_path_buf(),
            files,
            segments,
        })
    }

    /// Whatever a daemon made of the directory, it is as it was.
    fn put_back(&self) -> Result<(), Failure> {
        for path in walk(&self.directory)? {
            if !self.files.contains_key(&path) {
                fs::remove_file(&path).map_err(|error| system(&path.display().to_string(), &error))?;
            }
        }
        for (path, bytes) in &self.files {
            if fs::read(path).is_ok_and(|now| now == *bytes) {
                continue;
            }
            fs::write(path, bytes).map_err(|error| system(&path.display().to_string(), &error))?;
        }
        Ok(())
    }

    /// Changes one byte, any with equal chances.
    fn flip_one(&self, random: &mut Random) -> Result<(), Failure> {
        use std::os::unix::fs::FileExt;
        let total: u64 = self.segments.iter().map(|(_, bytes)| bytes).sum();
        let mut place = random.below(total);
        for (path, bytes) in &self.segments {
            let Some(beyond) = place.checked_sub(*bytes) else {
                let change = || {
                    let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
                    let mut byte = [0];
                    file.read_exact_at(&mut byte, place)?;
                    byte[0] ^= u8::try_from(random.between(1, 255)).unwrap_or(1);
                    file.write_all_at(&byte, place)
                };
                let mut change = change;
                return change().map_err(|error| system(&path.display().to_string(), &error));
            };
            place = beyond;
        }
        Ok(())
    }
}

/// Regular files below a directory.
fn walk(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = |error: std::io::Error| system(&directory.display().to_string(), &error);
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() {
            files.extend(walk(&entry.path())?);
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(files)
}
