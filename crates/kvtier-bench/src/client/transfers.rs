use super::samples::{Calls, Round, Samples};
use super::session::{Keys, Session};
use super::working_set::{CHAIN_BLOCKS, Cursor, WorkingSet};
use super::{Bench, Stand, cpu_time, spent, timed};
use crate::{BenchError, Row, pattern};

/// How often a daemon is filled before its working set must stay.
pub(super) const FILLINGS_MAX: u32 = 20;

/// How bytes are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    GetInto,
    PutFrom,
    GetInPlace,
}

impl Way {
    fn case(self) -> &'static str {
        match self {
            Way::GetInto => "get_into",
            Way::PutFrom => "put_from",
            Way::GetInPlace => "get_in_place",
        }
    }

    fn direction(self) -> Direction {
        if self == Way::PutFrom {
            Direction::Put
        } else {
            Direction::Get
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Get,
    Put,
}

/// One case: how, how many blocks a call, how many bytes a round at a working set of 1 GiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    way: Way,
    batch: u64,
    round_bytes: u64,
}

/// The cases that share a block size, and so a daemon.
pub(super) struct Part {
    name: &'static str,
    block_bytes: usize,
    shapes: &'static [Shape],
}

const MIB: u64 = 1 << 20;

const fn shape(way: Way, batch: u64, round_bytes: u64) -> Shape {
    Shape {
        way,
        batch,
        round_bytes,
    }
}

/// Everything that moves bytes.
pub(super) const PARTS: [&Part; 3] = [
    &Part {
        name: "blocks-1mib",
        block_bytes: 1 << 20,
        shapes: &[
            shape(Way::GetInto, 16, 256 * MIB),
            shape(Way::PutFrom, 16, 256 * MIB),
            shape(Way::GetInPlace, 16, 256 * MIB),
            shape(Way::GetInto, 1, 64 * MIB),
            shape(Way::PutFrom, 1, 64 * MIB),
            shape(Way::GetInPlace, 1, 64 * MIB),
        ],
    },
    &Part {
        name: "blocks-4mib",
        block_bytes: 4 << 20,
        shapes: &[shape(Way::GetInto, 4, 256 * MIB), shape(Way::PutFrom, 4, 256 * MIB)],
    },
    &Part {
        name: "blocks-64kib",
        block_bytes: 64 << 10,
        shapes: &[shape(Way::GetInto, 1, 16 * MIB), shape(Way::PutFrom, 1, 16 * MIB)],
    },
];

/// One case of a part, with what it has measured so far.
struct Case {
    shape: Shape,
    operations: u64,
    cursor: Cursor,
    samples: Samples,
    /// Where the memcpy of the same shape goes on, and what it has given.
    memcpy: usize,
}

struct Memcpy {
    direction: Direction,
    batch: u64,
    cursor: Cursor,
    samples: Samples,
}

/// Measures one part: every round visits every case, each right after its own baselines.
pub(super) fn measure(bench: &mut Bench<'_>, part: &Part) -> Result<Vec<Row>, BenchError> {
    let shapes: Vec<Shape> = part
        .shapes
        .iter()
        .copied()
        .filter(|shape| bench.options.wants(shape.way.case()))
        .collect();
    if shapes.is_empty() {
        return Ok(Vec::new());
    }
    // The working set stays while as much again and a half passes by it: see `puts_between_two_reads`.
    let wanted = bench.options.working_set_bytes();
    let needed_bytes = wanted / 4 * 11;
    let mut stand = bench.stand(part.name, needed_bytes)?;
    let capacity_bytes = stand.capacity_bytes(needed_bytes)?.min(needed_bytes.max(wanted * 4));
    let working_set_bytes = wanted.min(capacity_bytes / 11 * 4);
    if working_set_bytes < (CHAIN_BLOCKS * part.block_bytes as u64).max(16 * MIB) {
        return Err(BenchError::TooSmall {
            capacity_bytes,
            needed_bytes,
        });
    }
    if working_set_bytes < wanted {
        bench.say(&format!(
            "{}: the daemon's {} MiB allow a working set of only {} MiB",
            part.name,
            capacity_bytes >> 20,
            working_set_bytes >> 20
        ));
    }
    let mut set = WorkingSet::create(working_set_bytes, part.block_bytes)?;
    bench.say(&format!("{}: filling {} MiB", part.name, capacity_bytes >> 20));
    fill(&stand.session, &mut set, capacity_bytes)?;
    let (mut cases, mut memcpys) = plan(&shapes, &set);
    let rounds = bench.options.rounds();
    for round in 0..rounds {
        for case in &mut cases {
            let memcpy = memcpys[case.memcpy].round(&mut set, case.operations);
            let echo = bench.echoes(&mut stand)?;
            let calls = case.round(&mut stand, &mut set)?;
            case.samples.add(&calls, Some(memcpy), Some(echo));
        }
        bench.say(&format!("{}: round {} of {rounds}", part.name, round + 1));
    }
    let row = Row {
        bytes: part.block_bytes as u64,
        page_kib: Some(set.shared.page_kib()),
        working_set_bytes: set.bytes(),
        placement: bench.described.clone(),
        ..Row::default()
    };
    stand.end()?;
    let memcpys = memcpys.iter().map(|memcpy| {
        memcpy.samples.fill(
            Row {
                case: "memcpy",
                batch: memcpy.batch,
                direction: Some(memcpy.direction.name()),
                ..row.clone()
            },
            true,
        )
    });
    let cases = cases.iter().map(|case| {
        case.samples.fill(
            Row {
                case: case.shape.way.case(),
                batch: case.shape.batch,
                ..row.clone()
            },
            true,
        )
    });
    Ok(memcpys.chain(cases).collect())
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Direction::Get => "get",
            Direction::Put => "put",
        }
    }
}

/// Fills the daemon to the brim, then puts the working set, then reads it once. So every segment is open and mapped before
/// anything is timed, every byte of the working set is checked, and what later puts push out is the filling.
///
/// A daemon that held blocks of another size gives their memory over little by little: it is filled again until the working
/// set stays.
fn fill(session: &Session, set: &mut WorkingSet, capacity_bytes: u64) -> Result<(), BenchError> {
    let chain_bytes = CHAIN_BLOCKS * set.block_bytes as u64;
    let mut left = FILLINGS_MAX;
    loop {
        left -= 1;
        for _ in 0..capacity_bytes.div_ceil(chain_bytes) {
            let (first, keys) = set.fresh_keys(CHAIN_BLOCKS);
            session.put_from(keys.parent, &set.blocks_of(first, &keys.hashes))?;
        }
        let chains: Vec<u64> = (0..set.blocks).step_by(CHAIN_BLOCKS as usize).collect();
        for &first in &chains {
            let keys = set.keys(first, CHAIN_BLOCKS);
            session.put_missing(keys.parent, &set.blocks_of(first, &keys.hashes))?;
        }
        let mut kept = 0;
        for &first in &chains {
            kept += read_and_compare(session, set, first, CHAIN_BLOCKS)?;
        }
        if kept == set.blocks {
            return Ok(());
        }
        if left == 0 {
            let message = format!("only {kept} of {} blocks that were just put are there", set.blocks);
            return Err(BenchError::Client {
                what: "the first read",
                message,
            });
        }
        set.rewrite();
    }
}

/// Reads a chain, compares what was there, and says how many leading blocks that were.
fn read_and_compare(session: &Session, set: &mut WorkingSet, first: u64, batch: u64) -> Result<u64, BenchError> {
    let keys = set.keys(first, batch);
    for block in first..first + batch {
        pattern::spoil(set.block_mut(block));
    }
    let hits = session.get_into(&keys.hashes, &mut set.targets(first, batch))?;
    compare(set, first, hits, "get_into")?;
    Ok(hits)
}

fn compare(set: &WorkingSet, first: u64, batch: u64, case: &'static str) -> Result<(), BenchError> {
    match (first..first + batch).find(|&block| !pattern::matches(block, set.block(block))) {
        None => Ok(()),
        Some(block) => Err(BenchError::WrongBytes { case, block }),
    }
}

fn plan(shapes: &[Shape], set: &WorkingSet) -> (Vec<Case>, Vec<Memcpy>) {
    let mut memcpys: Vec<Memcpy> = Vec::new();
    let mut cases = Vec::new();
    for (number, shape) in (0u64..).zip(shapes) {
        let direction = shape.way.direction();
        let known = memcpys
            .iter()
            .position(|memcpy| (memcpy.direction, memcpy.batch) == (direction, shape.batch));
        // Every cycle starts elsewhere, so that no case finds in a cache what another has just used.
        let start = |eighths: u64| set.blocks / CHAIN_BLOCKS * (eighths % 8) / 8 * CHAIN_BLOCKS;
        let memcpy = known.unwrap_or_else(|| {
            let cursor = Cursor {
                next: start(number + 4),
                blocks: set.blocks,
            };
            memcpys.push(Memcpy {
                direction,
                batch: shape.batch,
                cursor,
                samples: Samples::default(),
            });
            memcpys.len() - 1
        });
        let round_bytes = ((u128::from(shape.round_bytes) * u128::from(set.bytes())) >> 30) as u64;
        let operations = (round_bytes / (shape.batch * set.block_bytes as u64)).max(4);
        cases.push(Case {
            shape: *shape,
            operations,
            cursor: Cursor {
                next: start(number),
                blocks: set.blocks,
            },
            samples: Samples::default(),
            memcpy,
        });
    }
    (cases, memcpys)
}

impl Memcpy {
    /// As many calls as the case makes, of one memcpy a block.
    fn round(&mut self, set: &mut WorkingSet, operations: u64) -> Round {
        let before = cpu_time(&[]);
        let mut times = Vec::with_capacity(operations as usize);
        for _ in 0..operations {
            let first = self.cursor.advance(self.batch);
            let started = std::time::Instant::now();
            for block in first..first + self.batch {
                match self.direction {
                    Direction::Get => set.copy_out(block),
                    Direction::Put => set.copy_in(block),
                }
            }
            times.push(started.elapsed());
        }
        let cpu = spent(before, cpu_time(&[]));
        self.samples.add(
            &Calls {
                times,
                bytes_per_call: self.batch * set.block_bytes as u64,
                cpu,
            },
            None,
            None,
        )
    }
}

impl Case {
    fn round(&mut self, stand: &mut Stand, set: &mut WorkingSet) -> Result<Calls, BenchError> {
        let batch = self.shape.batch;
        let bytes = batch * set.block_bytes as u64;
        match self.shape.way {
            Way::PutFrom => {
                let asked: Vec<(u64, Keys)> = (0..self.operations).map(|_| set.fresh_keys(batch)).collect();
                let calls = stand.calls(bytes, &asked, |session, (first, keys)| {
                    let blocks = set.blocks_of(*first, &keys.hashes);
                    timed(|| session.put_from(keys.parent, &blocks)).map(|((), time)| Some(time))
                })?;
                for (first, keys) in asked.iter().step_by(asked.len().div_ceil(2)) {
                    self.read_back(&stand.session, set, *first, keys)?;
                }
                Ok(calls)
            }
            Way::GetInto => {
                let asked: Vec<(u64, Keys)> = (0..self.operations)
                    .map(|_| self.cursor.advance(batch))
                    .map(|first| (first, set.keys(first, batch)))
                    .collect();
                for (first, _) in &asked {
                    (*first..first + batch).for_each(|block| pattern::spoil(set.block_mut(block)));
                }
                let mut missed = Vec::new();
                let calls = stand.calls(bytes, &asked, |session, (first, keys)| {
                    let mut targets = set.targets(*first, batch);
                    let (hits, time) = timed(|| session.get_into(&keys.hashes, &mut targets))?;
                    missed.extend((hits < batch).then_some(*first));
                    Ok((hits == batch).then_some(time))
                })?;
                restore(&stand.session, set, &missed, batch)?;
                for (first, _) in asked.iter().filter(|(first, _)| !missed.contains(first)) {
                    compare(set, *first, batch, self.shape.way.case())?;
                }
                Ok(calls)
            }
            Way::GetInPlace => {
                let asked: Vec<(u64, Keys)> = (0..self.operations)
                    .map(|_| self.cursor.advance(batch))
                    .map(|first| (first, set.keys(first, batch)))
                    .collect();
                let mut missed = Vec::new();
                let calls = stand.calls(bytes, &asked, |session, (first, keys)| {
                    let (hits, time) = timed(|| session.touch_in_place(&keys.hashes))?;
                    missed.extend((hits < batch).then_some(*first));
                    Ok((hits == batch).then_some(time))
                })?;
                restore(&stand.session, set, &missed, batch)?;
                Ok(calls)
            }
        }
    }

    /// Reads what was just put into the place it was put from, and compares.
    fn read_back(&self, session: &Session, set: &mut WorkingSet, first: u64, keys: &Keys) -> Result<(), BenchError> {
        let batch = self.shape.batch;
        (first..first + batch).for_each(|block| pattern::spoil(set.block_mut(block)));
        let hits = session.get_into(&keys.hashes, &mut set.targets(first, batch))?;
        if hits < batch {
            return Err(BenchError::Client {
                what: "read back",
                message: format!("only {hits} of {batch} blocks that were just put are there"),
            });
        }
        compare(set, first, batch, self.shape.way.case())
    }
}

/// Blocks that somebody else's puts pushed out are put again; their calls were not counted.
fn restore(session: &Session, set: &mut WorkingSet, missed: &[u64], batch: u64) -> Result<(), BenchError> {
    for &first in missed {
        for block in first..first + batch {
            pattern::write(block, set.block_mut(block));
        }
        let keys = set.keys(first, batch);
        session.put_missing(keys.parent, &set.blocks_of(first, &keys.hashes))?;
    }
    Ok(())
}

/// How many bytes of fresh blocks arrive, in the worst part, between two reads of the same block of the working set, per
/// byte of it: what the daemon must hold beside the working set.
#[cfg(test)]
fn puts_between_two_reads(part: &Part) -> f64 {
    let bytes = |way: Way| {
        part.shapes
            .iter()
            .filter(move |shape| shape.way == way)
            .map(|shape| shape.round_bytes as f64)
    };
    let rounds_a_cycle = f64::from(1 << 30) / bytes(Way::GetInto).fold(0.0, f64::max);
    bytes(Way::PutFrom).sum::<f64>() * rounds_a_cycle / f64::from(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filling_is_larger_than_what_is_put_between_two_reads_of_a_block() {
        for part in PARTS {
            assert!(
                puts_between_two_reads(part) < 1.5,
                "{} would push its own working set out",
                part.name
            );
        }
    }

    #[test]
    fn a_case_is_planned_with_the_memcpy_of_its_shape_and_direction() {
        let set = WorkingSet::create(64 << 20, 1 << 20).expect("64 MiB twice");
        let (cases, memcpys) = plan(PARTS[0].shapes, &set);
        assert_eq!(memcpys.len(), 4, "two directions, two batches");
        for case in &cases {
            let memcpy = &memcpys[case.memcpy];
            assert_eq!(
                (memcpy.batch, memcpy.direction),
                (case.shape.batch, case.shape.way.direction())
            );
            assert_eq!(case.cursor.next % CHAIN_BLOCKS, 0);
            assert!(case.operations >= 4);
        }
    }
}
