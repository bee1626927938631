use super::samples::Samples;
use super::session::{BATCH_KEYS_MAX, Keys, Session, nanoseconds_since_1970};
use super::transfers::FILLINGS_MAX;
use super::{Bench, timed};
use crate::daemon::resident_private_bytes;
use crate::{BenchError, Row, pattern};
use kvtier::Parent;

/// Smallest blocks: what counts here is how many there are.
const BLOCK_BYTES: usize = 4096;

/// Keys in one call, and calls in one round.
const SHAPES: [(u64, u64); 2] = [(1, 128), (256, 64)];

/// Measures lookups among many resident blocks, and what their index costs in memory.
pub(super) fn measure(bench: &mut Bench<'_>) -> Result<Vec<Row>, BenchError> {
    if !bench.options.wants("lookup") {
        return Ok(Vec::new());
    }
    let part = "lookups";
    let batch = BATCH_KEYS_MAX as u64;
    let wanted = bench.options.lookup_blocks();
    let block_bytes = BLOCK_BYTES as u64;
    let needed_bytes = wanted * block_bytes + (wanted * block_bytes / 16).max(32 << 20);
    let mut stand = bench.stand(part, needed_bytes)?;
    let capacity_bytes = stand.capacity_bytes(needed_bytes)?;
    let blocks = wanted.min(capacity_bytes / block_bytes / 17 * 16) / batch * batch;
    if blocks == 0 {
        return Err(BenchError::TooSmall {
            capacity_bytes,
            needed_bytes,
        });
    }
    let stream = (u64::from(std::process::id()) << 32) ^ nanoseconds_since_1970();
    let resident = |process: Option<u32>| process.and_then(resident_private_bytes);
    let daemon = stand.session.daemon_process();
    let empty = resident(daemon);
    bench.say(&format!("{part}: putting {blocks} blocks of 4 KiB"));
    let source: Vec<u8> = (0..BATCH_KEYS_MAX * BLOCK_BYTES)
        .map(|byte| (byte >> 12) as u8 | 1)
        .collect();
    let mut left = FILLINGS_MAX;
    while put_all(&stand.session, stream, blocks, &source)? < blocks {
        left -= 1;
        if left == 0 {
            let message = format!("{blocks} blocks of {BLOCK_BYTES} bytes do not stay");
            return Err(BenchError::Client {
                what: "put_from",
                message,
            });
        }
    }
    let full = resident(daemon);
    let reported = stand.session.status()?.map(|status| status.index_bytes_per_block);
    let mut samples: Vec<Samples> = SHAPES.iter().map(|_| Samples::default()).collect();
    let rounds = bench.options.rounds();
    let mut draw = 0;
    for round in 0..rounds {
        for ((batch, operations), samples) in SHAPES.iter().zip(&mut samples) {
            let asked: Vec<Keys> = (0..*operations)
                .map(|_| {
                    draw += 1;
                    // Anywhere among the blocks, on a multiple of the batch: a prefix that no cache has seen for long.
                    keys(stream, pattern::draw(draw) % (blocks / batch) * batch, *batch)
                })
                .collect();
            let echo = bench.echoes(&mut stand)?;
            let calls = stand.calls(0, &asked, |session, keys| {
                let (found, time) = timed(|| session.lookup(&keys.hashes))?;
                if found < keys.hashes.len() as u64 {
                    return Err(BenchError::Client {
                        what: "lookup",
                        message: format!("{found} of {} resident keys found", keys.hashes.len()),
                    });
                }
                Ok(Some(time))
            })?;
            samples.add(&calls, None, Some(echo));
        }
        bench.say(&format!("{part}: round {} of {rounds}", round + 1));
    }
    let row = Row {
        bytes: block_bytes,
        working_set_bytes: blocks * block_bytes,
        placement: bench.described.clone(),
        ..Row::default()
    };
    stand.end()?;
    let mut rows: Vec<Row> = SHAPES
        .iter()
        .zip(&samples)
        .map(|((batch, _), samples)| {
            samples.fill(
                Row {
                    case: "lookup",
                    batch: *batch,
                    ..row.clone()
                },
                false,
            )
        })
        .collect();
    if let (Some(empty), Some(full)) = (empty, full) {
        let bytes = full.saturating_sub(empty).div_ceil(blocks);
        bench.say(&format!(
            "{part}: memory beside segments: {} KiB empty, {} KiB with {blocks} blocks",
            empty >> 10,
            full >> 10
        ));
        rows.push(Row {
            case: "index",
            bytes,
            batch: blocks,
            status_bytes_per_block: reported,
            rounds: 1,
            ..row
        });
    }
    Ok(rows)
}

/// Puts what is not there yet, and says how many of all are there then.
fn put_all(session: &Session, stream: u64, blocks: u64, source: &[u8]) -> Result<u64, BenchError> {
    let batches = || {
        (0..blocks)
            .step_by(BATCH_KEYS_MAX)
            .map(|first| keys(stream, first, BATCH_KEYS_MAX as u64))
    };
    for keys in batches() {
        let blocks: Vec<_> = keys
            .hashes
            .iter()
            .copied()
            .zip(source.chunks_exact(BLOCK_BYTES))
            .collect();
        session.put_missing(keys.parent, &blocks)?;
    }
    batches().try_fold(0, |found, keys| Ok(found + session.lookup(&keys.hashes)?))
}

/// `batch` keys from `first` on, in chains of the largest batch.
fn keys(stream: u64, first: u64, batch: u64) -> Keys {
    let starts_a_chain = first.is_multiple_of(BATCH_KEYS_MAX as u64);
    let parent = if starts_a_chain {
        Parent::Root
    } else {
        Parent::Block(pattern::hash(stream, first - 1))
    };
    Keys {
        parent,
        hashes: (first..first + batch)
            .map(|block| pattern::hash(stream, block))
            .collect(),
    }
}
