use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_core::{Completion, SegmentId};
use kvtier_storage::nvme::{Direction, Encryption, NvmeSettings, StorageAction};
use kvtier_transfer::memory::MemorySlice;

use super::check::{Check, Pass};
use super::keys::{fixed_key, label};
use super::memory::Memory;
use super::row::{Row, Transfer};
use super::samples::{Samples, Side};
use super::stand::{Driven, Places, Stand};
use super::{MIB, Options};
use crate::baseline::{RawRequest, RawRing, process_cpu_time};
use crate::{BenchError, load, pattern};

/// One shape of reads or writes.
#[derive(Clone, Copy, Debug)]
struct Shape {
    bytes: usize,
    depth: u32,
}

const KIB: usize = 1 << 10;
const SIZES: [usize; 3] = [128 * KIB, 1024 * KIB, 4096 * KIB];
const READS: [Shape; 4] = [
    Shape {
        bytes: SIZES[0],
        depth: 32,
    },
    Shape {
        bytes: SIZES[1],
        depth: 8,
    },
    Shape {
        bytes: SIZES[2],
        depth: 8,
    },
    Shape {
        bytes: SIZES[1],
        depth: 1,
    },
];
const WRITE: Shape = Shape {
    bytes: SIZES[1],
    depth: 8,
};
/// Records a round whose bytes are compared.
const COMPARED: usize = 16;
/// The check is measured over at most this much a round.
pub(super) const CHECKED_BYTES_MAX: u64 = 64 * MIB;
/// The device comes back to private memory only after this many times what is in flight: memory that a disk fills again
/// and again while nobody looks at it stays in the caches of whoever copies for a virtual disk, and no reader has such.
const CYCLES_MIN: u64 = 4;
/// Fill and read-back are not measured.
const DEPTH_UNMEASURED: usize = 8;

/// Records of one size that lie on the disk.
struct Records {
    bytes: usize,
    places: Places,
    checksums: Vec<u32>,
    /// Number of the first one's pattern.
    first: u64,
    files: HashMap<SegmentId, Arc<File>>,
}

/// One kind of encryption under measurement.
struct Part<'a> {
    options: &'a Options,
    encryption: Encryption,
    directory: PathBuf,
    stand: Stand,
    /// What the caller's blocks lie in.
    host: Memory,
    /// What a device touches in place of them where records are sealed.
    private: Memory,
    progress: &'a mut dyn FnMut(&str),
}

pub(super) fn measure(
    options: &Options,
    directory: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<Row>, BenchError> {
    let host = Memory::shared(options.memory_bytes())?;
    let private_bytes = READS.iter().map(|shape| shape.bytes as u64 * u64::from(shape.depth));
    let private = Memory::private(CYCLES_MIN * private_bytes.max().unwrap_or(MIB))?;
    let mut rows = Vec::new();
    for encryption in [Encryption::None, Encryption::Aes256Gcm] {
        let directory = directory.join(name(encryption));
        fs::create_dir(&directory).map_err(BenchError::system("a directory"))?;
        let settings = NvmeSettings {
            encryption,
            ..NvmeSettings::new(directory.join("nvme"), options.disk_bytes(), fixed_key())
        };
        let mut part = Part {
            options,
            encryption,
            stand: Stand::open(settings)?.0,
            directory: directory.clone(),
            host: host.clone(),
            private: private.clone(),
            progress,
        };
        part.say(&format!("engine {}", part.stand.tier().engine_name()));
        for note in part.stand.tier().notes().to_vec() {
            part.say(&note);
        }
        if options.wants("read") {
            rows.extend(part.measure_reads()?.into_iter().map(Row::Transfer));
        }
        if options.wants("write") {
            rows.push(Row::Transfer(part.measure_writes()?));
        }
        drop(part);
        fs::remove_dir_all(&directory).map_err(BenchError::system("a directory that is done with"))?;
    }
    Ok(rows)
}

fn name(encryption: Encryption) -> &'static str {
    match encryption {
        Encryption::None => "none",
        Encryption::Aes256Gcm => "aes-256-gcm",
    }
}

impl Part<'_> {
    fn say(&mut self, words: &str) {
        let words = format!("nvme, encryption {}: {words}", name(self.encryption));
        (self.progress)(&words);
    }

    fn settle(&mut self) {
        let settling = self.options.settling();
        if !settling.is_zero() {
            self.say(&format!("the disk settles for {} s", settling.as_secs()));
            std::thread::sleep(settling);
        }
    }

    fn is_sealed(&self) -> bool {
        self.encryption == Encryption::Aes256Gcm
    }

    /// What the device reads or writes.
    fn touched(&self) -> &Memory {
        if self.is_sealed() { &self.private } else { &self.host }
    }

    fn row(&self, case: &'static str, shape: Shape) -> Transfer {
        Transfer {
            case,
            bytes: shape.bytes as u64,
            depth: shape.depth,
            encryption: name(self.encryption),
            page_kib: self.touched().page_kib(),
            ..Transfer::default()
        }
    }

    fn measure_reads(&mut self) -> Result<Vec<Transfer>, BenchError> {
        let mut sets = Vec::new();
        for bytes in SIZES {
            let records = self.fill(bytes)?;
            let pass = if self.is_sealed() { Pass::Open } else { Pass::Sum };
            let check = self.prepare_check(pass, bytes, &format!("check-{bytes}"))?;
            sets.push((records, check));
        }
        self.settle();
        let mut samples: Vec<Samples> = READS.iter().map(|_| Samples::default()).collect();
        for round in 0..self.options.rounds() {
            for (shape, samples) in READS.iter().zip(&mut samples) {
                let (records, check) = sets
                    .iter()
                    .find(|(records, _)| records.bytes == shape.bytes)
                    .expect("a set of each size");
                self.read_round(round, *shape, records, check, samples)?;
            }
            self.say(&format!("round {} of reads; load {}", round + 1, load()));
        }
        for (records, _) in sets {
            self.stand.close(records.places)?;
        }
        Ok(READS
            .iter()
            .zip(samples)
            .map(|(shape, samples)| samples.fill(self.row("read", *shape)))
            .collect())
    }

    /// Blocks for the check, with what lies in host memory.
    fn prepare_check(&mut self, pass: Pass, bytes: usize, name: &str) -> Result<Check, BenchError> {
        let most = CHECKED_BYTES_MAX.min(self.options.round_bytes());
        let blocks = (most / bytes as u64).max(1) as usize;
        let file = self.new_file(name, bytes, blocks)?;
        let mut ring = raw_ring(length(DEPTH_UNMEASURED))?;
        Check::prepare(pass, file, (bytes, blocks), &mut ring, (&self.host, &self.private))
    }

    /// Writes the records of one size.
    fn fill(&mut self, bytes: usize) -> Result<Records, BenchError> {
        let count = (self.options.file_bytes() / bytes as u64) as usize;
        let places = self
            .stand
            .make_room(count, length(bytes), self.options.segment_bytes())?;
        let first = bytes as u64 * 1_000_000;
        let mut checksums = Vec::with_capacity(count);
        let slots = self.host.slots(bytes);
        let mut buffer = vec![0; bytes];
        for start in (0..count).step_by(slots) {
            let chunk = start..(start + slots).min(count);
            for record in chunk.clone() {
                pattern::write(first + record as u64, &mut buffer);
                self.host
                    .slot(record - start, bytes)
                    .copy_from_slice(&buffer)
                    .expect("equal lengths");
            }
            let driven = self.demote(DEPTH_UNMEASURED, bytes, first, &places, chunk)?;
            checksums.extend(driven.completions.into_iter().map(checksum));
        }
        self.stand.seal(&places)?;
        let mut files = HashMap::new();
        for segment in &places.segments {
            files.insert(*segment, open_file(&self.stand.segment_path(*segment), false)?);
        }
        Ok(Records {
            bytes,
            places,
            checksums,
            first,
            files,
        })
    }

    /// Writes `records` from the first slots of host memory on.
    fn demote(
        &mut self,
        depth: usize,
        bytes: usize,
        first: u64,
        places: &Places,
        records: Range<usize>,
    ) -> Result<Driven, BenchError> {
        let host = self.host.clone();
        let extents = places.extents[records.clone()].to_vec();
        self.stand
            .drive("demote", depth, extents.len(), move |index, operation| {
                StorageAction::Demote {
                    operation,
                    source: host.slot(index, bytes),
                    target: extents[index],
                    label: label(first + (records.start + index) as u64),
                }
            })
    }

    /// Reads records in the order given, into the slots from the first on.
    fn promote(
        &mut self,
        depth: usize,
        records: &Records,
        order: &[usize],
        memory: &Memory,
    ) -> Result<Driven, BenchError> {
        let (memory, bytes, first) = (memory.clone(), records.bytes, records.first);
        let wanted: Vec<_> = order
            .iter()
            .map(|&record| (record, records.places.extents[record], records.checksums[record]))
            .collect();
        self.stand
            .drive("promote", depth, wanted.len(), move |index, operation| {
                let (record, source, checksum) = wanted[index];
                StorageAction::Promote {
                    operation,
                    source,
                    target: memory.slot(index, bytes),
                    checksum,
                    label: label(first + record as u64),
                }
            })
    }

    fn read_round(
        &mut self,
        round: u32,
        shape: Shape,
        records: &Records,
        check: &Check,
        samples: &mut Samples,
    ) -> Result<(), BenchError> {
        let Shape { bytes, depth } = shape;
        let order = shuffled(records.places.extents.len(), u64::from(round) << 8 | u64::from(depth));
        let count = (self.options.round_bytes() / bytes as u64) as usize;
        let (for_ours, for_raw) = (&order[..count], &order[count..2 * count]);
        let mut ring = raw_ring(depth)?;
        let mut sides = [None, None];
        for turn in [round % 2, (round + 1) % 2] {
            self.spoil(bytes, count);
            let side = if turn == 0 {
                let ours = side(bytes * count, || {
                    let host = self.host.clone();
                    let driven = self.promote(depth as usize, records, for_ours, &host)?;
                    Ok((driven.times, driven.elapsed))
                })?;
                self.compare(records, for_ours)?;
                ours
            } else {
                let mut next = for_raw.iter().enumerate();
                let raw = side(bytes * count, || {
                    run_raw(&mut ring, Direction::Read, |_| {
                        let (index, &record) = next.next()?;
                        Some(records.raw(record, self.touched().slot(index, bytes)))
                    })
                })?;
                if !self.is_sealed() {
                    self.compare(records, for_raw)?;
                }
                raw
            };
            sides[turn as usize] = Some(side);
        }
        let check = check.measure(&mut ring, depth as usize, (&self.host, &self.private))?;
        if let [Some(ours), Some(raw)] = sides {
            samples.add(&ours, &raw, check);
        }
        Ok(())
    }

    /// Spoils the slots that are compared after a read of `count` records.
    fn spoil(&self, bytes: usize, count: usize) {
        for index in compared(count, self.host.slots(bytes)) {
            self.host.slot(index, bytes).zero();
        }
    }

    fn compare(&self, records: &Records, order: &[usize]) -> Result<(), BenchError> {
        for index in compared(order.len(), self.host.slots(records.bytes)) {
            let block = records.first + order[index] as u64;
            if !pattern::matches(block, &self.host.slot(index, records.bytes).to_vec()) {
                return Err(BenchError::WrongBytes { case: "read", block });
            }
        }
        Ok(())
    }

    fn measure_writes(&mut self) -> Result<Transfer, BenchError> {
        let Shape { bytes, depth } = WRITE;
        let first = 1 << 40;
        let count = (self.options.round_bytes() / bytes as u64) as usize;
        let mut buffer = vec![0; bytes];
        for slot in 0..count {
            pattern::write(first + slot as u64, &mut buffer);
            self.host
                .slot(slot, bytes)
                .copy_from_slice(&buffer)
                .expect("equal lengths");
        }
        let mut ring = raw_ring(depth)?;
        // The same bytes that lie in memory: the check leaves them as they are.
        let pass = if self.is_sealed() { Pass::Seal } else { Pass::Sum };
        let check = self.prepare_check(pass, bytes, "check-writes")?;
        self.settle();
        let mut samples = Samples::default();
        let mut written = Vec::new();
        for round in 0..self.options.rounds() {
            let places = self
                .stand
                .make_room(count, length(bytes), self.options.segment_bytes())?;
            let file = self.new_file(&format!("raw-{round}"), bytes, count)?;
            let mut sides = [None, None];
            for turn in [round % 2, (round + 1) % 2] {
                let side = if turn == 0 {
                    let mut completions = Vec::new();
                    let ours = side(bytes * count, || {
                        let driven = self.demote(depth as usize, bytes, first, &places, 0..count)?;
                        completions = driven.completions;
                        Ok((driven.times, driven.elapsed))
                    })?;
                    self.read_back(&places, completions, first)?;
                    ours
                } else {
                    let mut next = 0..count;
                    side(bytes * count, || {
                        run_raw(&mut ring, Direction::Write, |_| {
                            let block = next.next()?;
                            Some(RawRequest {
                                file: Arc::clone(&file),
                                offset: (block * bytes) as u64,
                                memory: self.touched().slot(block, bytes),
                            })
                        })
                    })?
                };
                sides[turn as usize] = Some(side);
            }
            let check = check.measure(&mut ring, depth as usize, (&self.host, &self.private))?;
            if let [Some(ours), Some(raw)] = sides {
                samples.add(&ours, &raw, check);
            }
            written.push(places);
            self.say(&format!("round {} of writes; load {}", round + 1, load()));
        }
        // Only now: what discards cost the disk would fall on the rounds.
        for places in written {
            self.stand.close(places)?;
        }
        Ok(samples.fill(self.row("write", WRITE)))
    }

    /// Reads a sample of what was written into memory of its own and compares it.
    fn read_back(&mut self, places: &Places, completions: Vec<Completion>, first: u64) -> Result<(), BenchError> {
        let records = Records {
            bytes: WRITE.bytes,
            places: Places {
                extents: places.extents.clone(),
                segments: Vec::new(),
            },
            checksums: completions.into_iter().map(checksum).collect(),
            first,
            files: HashMap::new(),
        };
        let count = records.checksums.len();
        let sample = &shuffled(count, 0)[..COMPARED.min(count)];
        let memory = Memory::shared((sample.len() * WRITE.bytes) as u64)?;
        self.promote(DEPTH_UNMEASURED, &records, sample, &memory)?;
        for (index, record) in sample.iter().enumerate() {
            let block = first + *record as u64;
            if !pattern::matches(block, &memory.slot(index, WRITE.bytes).to_vec()) {
                return Err(BenchError::WrongBytes { case: "write", block });
            }
        }
        Ok(())
    }

    /// A file made as the tier makes its segments: its space is taken, nothing is written.
    fn new_file(&self, name: &str, block_bytes: usize, blocks: usize) -> Result<Arc<File>, BenchError> {
        let path = self.directory.join(name);
        let file = open_file(&path, true)?;
        let bytes = (blocks * block_bytes) as u64;
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::OPNOTSUPP) => {
                file.set_len(bytes).map_err(BenchError::system("a file of its own"))?;
                Ok(file)
            }
            Err(error) => Err(BenchError::System {
                what: path.display().to_string(),
                source: error.into(),
            }),
        }
    }
}

impl Records {
    fn raw(&self, record: usize, memory: MemorySlice) -> RawRequest {
        let place = self.places.extents[record];
        RawRequest {
            file: Arc::clone(&self.files[&place.segment]),
            offset: place.offset,
            memory,
        }
    }
}

/// Measures one side of a round.
fn side(
    bytes: usize,
    work: impl FnOnce() -> Result<(Vec<Duration>, Duration), BenchError>,
) -> Result<Side, BenchError> {
    let cpu_time = || process_cpu_time(std::process::id()).unwrap_or_default();
    let before = cpu_time();
    let (times, elapsed) = work()?;
    Ok(Side {
        times,
        elapsed,
        bytes: bytes as u64,
        cpu: cpu_time().saturating_sub(before),
    })
}

fn raw_ring(depth: u32) -> Result<RawRing, BenchError> {
    RawRing::build(depth).map_err(BenchError::system(
        "the raw ring, which everything is compared with, needs io_uring",
    ))
}

fn run_raw(
    ring: &mut RawRing,
    direction: Direction,
    next: impl FnMut(usize) -> Option<RawRequest>,
) -> Result<(Vec<Duration>, Duration), BenchError> {
    let started = Instant::now();
    let times = ring.run(direction, next).map_err(BenchError::system("the raw ring"))?;
    Ok((times, started.elapsed()))
}

/// With direct I/O where the file system takes it.
fn open_file(path: &Path, new: bool) -> Result<Arc<File>, BenchError> {
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(new)
            .mode(0o600)
            .custom_flags(flags)
            .open(path)
    };
    open(libc::O_DIRECT)
        .or_else(|error| match error.kind() {
            io::ErrorKind::InvalidInput => open(0),
            _ => Err(error),
        })
        .map(Arc::new)
        .map_err(BenchError::system(path.display().to_string()))
}

/// The places, in the order of reading, whose bytes are still there and are compared.
fn compared(count: usize, slots: usize) -> impl Iterator<Item = usize> {
    let there = count.min(slots);
    let step = there.div_ceil(COMPARED).max(1);
    (count - there..count).step_by(step)
}

/// The numbers below `count` in an order that `seed` fixes.
fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        let other = pattern::draw((seed << 32) ^ last as u64) % (last as u64 + 1);
        order.swap(last, other as usize);
    }
    order
}

fn checksum(completion: Completion) -> u32 {
    match completion {
        Completion::Written { checksum } => checksum,
        _ => 0,
    }
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("records are smaller than 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shuffled_order_visits_everything_once_and_differs_by_seed() {
        let mut order = shuffled(100, 1);
        assert_ne!(order, shuffled(100, 2));
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_compared_is_what_was_not_read_over() {
        assert_eq!(compared(3, 10).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(compared(100, 10).all(|index| index >= 90));
        assert_eq!(compared(1000, 1000).count(), COMPARED);
    }
}
