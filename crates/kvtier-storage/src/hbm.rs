//! The tier in device memory: segments that processes of one device can map, each an allocation of its own.
//!
//! One thread does what it is asked in the order in which it is asked; copies that wait together overlap. What was copied is
//! read back and compared before anybody is told of it: it crossed a bus. Nothing here survives the process.

use std::cell::Cell;
use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use kvtier_core::{Completion, Event, Extent, Failure, OperationId, SegmentId};
use kvtier_transfer::Transfer;
use kvtier_transfer::gpu::{
    Copy, Cuda, DeviceRegion, DeviceSlice, DeviceUuid, Gpu, GpuError, HostRegistration, PinnedRegions, Place, Stream,
    Unavailable,
};
use kvtier_transfer::memory::{MemoryError, MemoryRegion, MemorySlice, PAGE_BYTES};
use parking_lot::Mutex;

/// What is read back at a time; two of these are pinned.
const PIECE_BYTES: usize = 2 << 20;
/// How long who closes a host segment waits for who pins one.
const LET_GO_WAIT: Duration = Duration::from_secs(1);
/// Copies that overlap.
const COPIES_AT_ONCE: usize = 32;

/// Which device.
#[derive(Clone, Debug, Default)]
pub struct HbmSettings {
    /// Its number.
    pub device: usize,
    /// Where CUDA's driver lies; `None`: where the system has it.
    pub library: Option<PathBuf>,
}

/// Why there is no such tier, or why it did not do something.
#[derive(Debug, thiserror::Error)]
pub enum HbmError {
    /// No driver, or no device.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// What the driver says.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A copy failed.
    #[error("{0}")]
    Copy(String),
    /// What is to be copied is not what its checksum says.
    #[error("what lies in host memory is not what its checksum says")]
    Corrupt,
    /// No such segment, or a range outside of it.
    #[error("device segment {segment:?}: {words}")]
    Extent {
        /// Which.
        segment: SegmentId,
        /// What is wrong.
        words: String,
    },
    /// No memory to read back into.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No thread.
    #[error("no thread for the device: {0}")]
    Thread(std::io::Error),
}

/// What the tier is asked to do; each but `Pin` is answered with an [`Event`].
#[derive(Debug)]
pub enum HbmAction {
    /// Pin a host segment that was mapped, if it is still there then, so that its first copy need not wait for that.
    Pin {
        /// Its memory.
        region: Weak<MemoryRegion>,
    },
    /// Make a segment: zeroed, and to be mapped by others.
    Open {
        /// Answer with this.
        operation: OperationId,
        /// Which.
        segment: SegmentId,
        /// Its size.
        bytes: u64,
    },
    /// Zero a segment and give its memory back.
    Close {
        /// Answer with this.
        operation: OperationId,
        /// Which.
        segment: SegmentId,
    },
    /// Copy, zero the rest of the last page, read back and compare.
    Promote {
        /// Answer with this.
        operation: OperationId,
        /// In host memory.
        source: MemorySlice,
        /// In a segment.
        target: Extent,
        /// CRC32C of the bytes, where it is known.
        checksum: Option<u32>,
    },
    /// Zero ranges of a segment.
    Zero {
        /// Answer with this.
        operation: OperationId,
        /// Which.
        segment: SegmentId,
        /// Bytes.
        ranges: Vec<Range<u64>>,
    },
}

/// Takes the answers.
pub type Completions = Arc<dyn Fn(Event) + Send + Sync>;

/// See the module.
#[derive(Debug)]
pub struct HbmTier {
    shared: Arc<Shared>,
    queue: Sender<HbmAction>,
}

#[derive(Debug)]
struct Shared {
    gpu: Arc<Gpu>,
    segments: Mutex<HashMap<SegmentId, HbmSegment>>,
    /// Host segments that are pinned for it.
    pinned: PinnedRegions,
}

/// An open segment.
#[derive(Clone, Debug)]
pub struct HbmSegment {
    /// Its memory.
    pub region: Arc<DeviceRegion>,
    /// Whoever has it can map the memory.
    pub file: Arc<OwnedFd>,
}

impl HbmTier {
    /// Opens the device. The thread ends with the tier, and is not waited for: a device may hang.
    ///
    /// # Errors
    /// Why there is none.
    pub fn start(settings: &HbmSettings, completions: Completions) -> Result<HbmTier, HbmError> {
        let cuda = match &settings.library {
            Some(library) => Cuda::open_at(library)?,
            None => Cuda::open()?,
        };
        let gpu = cuda.device(settings.device)?;
        let shared = Arc::new(Shared {
            pinned: PinnedRegions::new(&gpu),
            gpu,
            segments: Mutex::default(),
        });
        let worker = Worker::new(&shared, completions)?;
        // Unbounded, yet the manager bounds what is in flight.
        let (queue, work) = crossbeam_channel::unbounded();
        std::thread::Builder::new()
            .name("kvtier-hbm".into())
            .spawn(move || worker.run(&work))
            .map_err(HbmError::Thread)?;
        Ok(HbmTier { shared, queue })
    }

    /// Asks for something.
    pub fn submit(&self, action: HbmAction) {
        // The thread ends after the last sender.
        let _ = self.queue.send(action);
    }

    /// The device.
    #[must_use]
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.shared.gpu
    }

    /// What names the device in every process.
    #[must_use]
    pub fn uuid(&self) -> DeviceUuid {
        self.shared.gpu.uuid()
    }

    /// Segments are multiples of so many bytes.
    ///
    /// # Errors
    /// What the driver says.
    pub fn segment_unit(&self) -> Result<u64, HbmError> {
        Ok(self.shared.gpu.share_bytes()? as u64)
    }

    /// An open segment.
    #[must_use]
    pub fn segment(&self, segment: SegmentId) -> Option<HbmSegment> {
        self.shared.segments.lock().get(&segment).cloned()
    }

    /// A host segment is about to go: it is not pinned for the device any more. No copy of it is in flight.
    pub fn let_go(&self, region: &Arc<MemoryRegion>) {
        self.shared.pinned.let_go(region, LET_GO_WAIT);
    }
}

impl Shared {
    fn slice(&self, segment: SegmentId, offset: u64, length: u64) -> Result<DeviceSlice, HbmError> {
        let wrong = |words: String| HbmError::Extent { segment, words };
        let segments = self.segments.lock();
        let open = segments.get(&segment).ok_or_else(|| wrong("it is not open".into()))?;
        let (Ok(offset), Ok(length)) = (usize::try_from(offset), usize::try_from(length)) else {
            return Err(wrong("a range outside of it".into()));
        };
        open.region
            .slice(offset, length)
            .map_err(|error| wrong(error.to_string()))
    }
}

/// Source, target, the copy, and zeroes behind it.
type Begun = (MemorySlice, DeviceSlice, Transfer, Option<Transfer>);

/// A copy under way.
struct Copying {
    operation: OperationId,
    source: MemorySlice,
    target: DeviceSlice,
    checksum: Option<u32>,
    transfer: Transfer,
    /// Zeroes behind the block.
    padding: Option<Transfer>,
}

struct Worker {
    shared: Arc<Shared>,
    completions: Completions,
    up: Stream,
    down: Stream,
    /// Two pieces to read back into, and what keeps them pinned.
    pieces: [MemorySlice; 2],
    _pinned: Option<HostRegistration>,
    told_lost: Cell<bool>,
}

impl Worker {
    fn new(shared: &Arc<Shared>, completions: Completions) -> Result<Worker, HbmError> {
        let region = MemoryRegion::anonymous(2 * PIECE_BYTES)?;
        let piece = |at: usize| region.slice(at * PIECE_BYTES, PIECE_BYTES).expect("half of it");
        Ok(Worker {
            up: shared.gpu.stream()?,
            down: shared.gpu.stream()?,
            pieces: [piece(0), piece(1)],
            _pinned: shared.gpu.register(&region).ok(),
            shared: Arc::clone(shared),
            completions,
            told_lost: Cell::new(false),
        })
    }

    fn run(&self, work: &Receiver<HbmAction>) {
        let mut next = work.recv().ok();
        while let Some(action) = next.take() {
            if !matches!(action, HbmAction::Promote { .. }) {
                self.shared.pinned.tidy();
                self.carry_out(action);
                next = work.recv().ok();
                continue;
            }
            let mut copies = Vec::new();
            let mut following = Some(action);
            while let Some(HbmAction::Promote { .. }) = &following {
                copies.extend(following.take());
                if copies.len() == COPIES_AT_ONCE {
                    break;
                }
                following = work.try_recv().ok();
            }
            self.promote(copies);
            next = following.or_else(|| work.recv().ok());
        }
    }

    fn answer(&self, operation: OperationId, what: &str, result: Result<Completion, HbmError>) {
        let outcome = result.map_err(|error| {
            // A device that is lost refuses everything from then on: that is said once.
            if !self.told_lost.get() {
                tracing::warn!(%error, "{what}");
            }
            self.told_lost.set(self.shared.gpu.is_lost());
            match error {
                HbmError::Corrupt => Failure::Corrupt,
                HbmError::Gpu(error) if error.is_out_of_memory() => Failure::Full,
                _ => Failure::Io,
            }
        });
        (self.completions)(Event { operation, outcome });
    }

    fn carry_out(&self, action: HbmAction) {
        match action {
            HbmAction::Open {
                operation,
                segment,
                bytes,
            } => {
                let opened = self.open(segment, bytes).map(|()| Completion::Done);
                self.answer(operation, "a segment of device memory could not be opened", opened);
            }
            HbmAction::Close { operation, segment } => {
                let closed = self.close(segment).map(|()| Completion::Done);
                self.answer(operation, "device memory could not be zeroed and is kept", closed);
            }
            HbmAction::Zero {
                operation,
                segment,
                ranges,
            } => {
                let zeroed = self.zero(segment, &ranges).map(|()| Completion::Done);
                self.answer(operation, "device memory could not be zeroed", zeroed);
            }
            HbmAction::Pin { region } => {
                if let Some(region) = region.upgrade() {
                    self.shared.pinned.pin(&region);
                }
                // It may have been closed meanwhile, by who found nothing to let go of.
                self.shared.pinned.tidy();
            }
            HbmAction::Promote { .. } => unreachable!("copied in batches"),
        }
    }

    fn open(&self, segment: SegmentId, bytes: u64) -> Result<(), HbmError> {
        let bytes = usize::try_from(bytes).map_err(|_| HbmError::Copy("more bytes than can be".into()))?;
        let (region, file) = self.shared.gpu.share(bytes)?;
        self.zero_slice(&region.slice(0, bytes).expect("all of it"))?;
        let file = Arc::new(file);
        self.shared.segments.lock().insert(segment, HbmSegment { region, file });
        Ok(())
    }

    /// A client may still map it: it sees zeroes, and the memory is free once it lets go. One that cannot be zeroed is kept.
    fn close(&self, segment: SegmentId) -> Result<(), HbmError> {
        let Some(closing) = self.shared.segments.lock().get(&segment).cloned() else {
            return Ok(());
        };
        self.zero_slice(&closing.region.slice(0, closing.region.bytes()).expect("all of it"))?;
        self.shared.segments.lock().remove(&segment);
        Ok(())
    }

    fn zero(&self, segment: SegmentId, ranges: &[Range<u64>]) -> Result<(), HbmError> {
        for range in ranges {
            self.zero_slice(&self.shared.slice(segment, range.start, range.end - range.start)?)?;
        }
        Ok(())
    }

    fn zero_slice(&self, slice: &DeviceSlice) -> Result<(), HbmError> {
        self.up.zero(slice)?.wait().map_err(copy_failed)?;
        Ok(())
    }

    fn promote(&self, actions: Vec<HbmAction>) {
        const WHAT: &str = "a block could not be copied to the device";
        let mut copies = Vec::with_capacity(actions.len());
        for action in actions {
            let HbmAction::Promote {
                operation,
                source,
                target,
                checksum,
            } = action
            else {
                unreachable!("collected by its kind")
            };
            match self.begin(source, &target) {
                Ok((source, target, transfer, padding)) => copies.push(Copying {
                    operation,
                    source,
                    target,
                    checksum,
                    transfer,
                    padding,
                }),
                Err(error) => self.answer(operation, WHAT, Err(error)),
            }
        }
        for copying in copies {
            let operation = copying.operation;
            let finished = self.finish(copying);
            self.answer(
                operation,
                WHAT,
                finished.map(|checksum| Completion::Written { checksum }),
            );
        }
    }

    fn begin(&self, source: MemorySlice, target: &Extent) -> Result<Begun, HbmError> {
        self.shared.pinned.pin(source.region());
        let length = u64::from(target.length);
        let padded = length.next_multiple_of(PAGE_BYTES as u64);
        let slot = self.shared.slice(target.segment, target.offset, padded)?;
        let block = slot.subslice(0, source.len()).map_err(copy_failed)?;
        let mut padding = None;
        if padded > length {
            let rest = slot
                .subslice(source.len(), slot.len() - source.len())
                .map_err(copy_failed)?;
            padding = Some(self.up.zero(&rest)?);
        }
        let copy = Copy {
            source: Place::Host(source.clone()),
            target: Place::Device(block.clone()),
        };
        let transfer = self.up.submit(vec![copy]).map_err(copy_failed)?;
        Ok((source, block, transfer, padding))
    }

    /// The checksum of what arrived, which is what was to.
    fn finish(&self, copying: Copying) -> Result<u32, HbmError> {
        let Copying {
            source,
            target,
            checksum,
            transfer,
            padding,
            ..
        } = copying;
        // While the device copies.
        let expected = checksum.unwrap_or_else(|| source.crc32c());
        transfer.wait().map_err(copy_failed)?;
        if let Some(padding) = padding {
            padding.wait().map_err(copy_failed)?;
        }
        let mut sum = 0;
        let mut reading: Option<(MemorySlice, Transfer)> = None;
        for (number, offset) in (0..target.len()).step_by(PIECE_BYTES).enumerate() {
            let length = PIECE_BYTES.min(target.len() - offset);
            let here = self.pieces[number % 2].subslice(0, length).map_err(copy_failed)?;
            let copy = Copy {
                source: Place::Device(target.subslice(offset, length).map_err(copy_failed)?),
                target: Place::Host(here.clone()),
            };
            let next = self.down.submit(vec![copy]).map_err(copy_failed)?;
            if let Some((piece, read)) = reading.replace((here, next)) {
                read.wait().map_err(copy_failed)?;
                sum = piece.crc32c_after(sum);
                // A purge looks for nothing here.
                piece.zero();
            }
        }
        if let Some((piece, read)) = reading {
            read.wait().map_err(copy_failed)?;
            sum = piece.crc32c_after(sum);
            piece.zero();
        }
        if sum == expected {
            Ok(expected)
        } else if source.crc32c() == expected {
            Err(copy_failed(
                "what was read back from the device is not what was written",
            ))
        } else {
            Err(HbmError::Corrupt)
        }
    }
}

fn copy_failed(error: impl std::fmt::Display) -> HbmError {
    HbmError::Copy(error.to_string())
}
