//! A kernel that copies pieces, for batches of many small ones, of each of which a device's copy engines have the whole overhead. Which
//! is faster on a device is measured there.

use std::ffi::{CStr, c_void};
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::device::Gpu;
use super::driver::{Address, Driver, GpuError, Opaque};
use super::pinning::HostRegistration;
use super::stream::{By, Copy, Place, Stream};
use crate::memory::MemoryRegion;

/// Compiled from `kernel/pieces.cu`; any driver from CUDA 11.1 on makes its device's code of it.
const PTX: &str = concat!(include_str!("kernel/pieces.ptx"), "\0");
const NAME: &CStr = c"kvtier_copy_pieces";

/// `Pieces` of the source.
#[repr(C)]
struct Pieces {
    count: u64,
    all: [Piece; PIECES],
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Piece {
    source: Address,
    target: Address,
    bytes: u64,
}

/// Pieces of one launch: parameters of a kernel may have 4,096 bytes.
const PIECES: usize = 128;
const _: () = assert!(size_of::<Pieces>() == 3080);

/// What one block of threads copies at a time, so that a long piece among short ones does not keep one of them.
const PIECE_BYTES: usize = 32 << 10;
/// Blocks of threads: 8 times 512 threads with four loads of 16 bytes each have 256 KiB under way, more than a bus with a latency of 2 µs
/// can carry meanwhile, and leave all but a few of the device's processors to the engine.
const BLOCKS: u32 = 8;
const THREADS: u32 = 512;

/// Batches whose pieces are smaller on average are the kernel's.
const SMALL_BYTES: usize = 64 << 10;
/// And that have at least so many.
const MANY: usize = 4;
/// What a thread moves at a time; pieces begin at multiples of it.
const WORD_BYTES: u64 = 16;

/// What moves batches of small pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceMover {
    /// The device's copy engines, as everything else.
    CopyEngines,
    /// A kernel, where both sides of every piece can be reached from the device: its own memory, and registered host memory.
    Kernel,
}

/// What it is to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PieceMoverWanted {
    /// Whichever is found to be faster.
    #[default]
    Faster,
    /// The kernel, where it works.
    Kernel,
    /// The copy engines. No kernel is loaded.
    CopyEngines,
}

/// What was chosen, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct PieceMoverChosen {
    /// What moves them from now on.
    pub mover: PieceMover,
    /// Bytes a second that the kernel was found to move, up and down together; none where it was not tried or does not work.
    pub kernel_rate: Option<f64>,
    /// The same of the copy engines.
    pub engines_rate: Option<f64>,
    /// Why not the kernel.
    pub reason: Option<String>,
}

impl PieceMoverChosen {
    /// Copy engines, and why.
    pub(super) fn without(reason: String) -> PieceMoverChosen {
        PieceMoverChosen {
            mover: PieceMover::CopyEngines,
            kernel_rate: None,
            engines_rate: None,
            reason: Some(reason),
        }
    }
}

impl fmt::Display for PieceMoverChosen {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self.mover {
            PieceMover::CopyEngines => "copy_engines",
            PieceMover::Kernel => "kernel",
        })?;
        if let (Some(kernel), Some(engines)) = (self.kernel_rate, self.engines_rate) {
            write!(
                formatter,
                " (pieces of 16 KiB: kernel {:.1} GB/s, copy engines {:.1} GB/s)",
                kernel / 1e9,
                engines / 1e9
            )?;
        }
        match &self.reason {
            Some(reason) => write!(formatter, " ({reason})"),
            None => Ok(()),
        }
    }
}

/// A kernel on one device.
pub(super) struct Kernel {
    module: NonNull<c_void>,
    function: NonNull<c_void>,
}

// SAFETY: the driver's objects may be used from any thread, it locks for itself.
unsafe impl Send for Kernel {}
// SAFETY: as for `Send`.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// The one that moves pieces.
    pub(super) fn of_pieces(gpu: &Gpu) -> Result<Kernel, GpuError> {
        Kernel::load(gpu, PTX, NAME)
    }

    /// The kernel `name` of a text that ends in zero.
    pub(super) fn load(gpu: &Gpu, text: &'static str, name: &CStr) -> Result<Kernel, GpuError> {
        debug_assert!(text.ends_with('\0'), "the library looks for it");
        let driver = gpu.current()?;
        let mut module: Opaque = std::ptr::null_mut();
        // SAFETY: the library reads a text that ends in zero and writes one pointer.
        let answer = unsafe { (driver.functions.module_load)(&raw mut module, text.as_ptr().cast()) };
        gpu.check("cuModuleLoadData", answer)?;
        let module = some("cuModuleLoadData", module)?;
        let mut function: Opaque = std::ptr::null_mut();
        // SAFETY: a live module; the library reads a text that ends in zero and writes one pointer.
        let answer = unsafe { (driver.functions.module_function)(&raw mut function, module.as_ptr(), name.as_ptr()) };
        let found = gpu.check("cuModuleGetFunction", answer);
        let function = found.and_then(|()| some("cuModuleGetFunction", function));
        match function {
            Ok(function) => Ok(Kernel { module, function }),
            Err(error) => {
                // SAFETY: loaded above, and nothing of it is used.
                let _ = unsafe { (driver.functions.module_unload)(module.as_ptr()) };
                Err(error)
            }
        }
    }

    /// Gives it back. Nothing that was launched is under way.
    pub(super) fn unload(&self, driver: &Driver) {
        // SAFETY: loaded once, and nothing of it is used from now on.
        let _ = unsafe { (driver.functions.module_unload)(self.module.as_ptr()) };
    }

    fn launch_pieces(&self, gpu: &Gpu, driver: &Driver, stream: Opaque, pieces: &Pieces) -> Result<(), GpuError> {
        let blocks = BLOCKS.min(u32::try_from(pieces.count).unwrap_or(BLOCKS));
        let mut parameters: [Opaque; 1] = [std::ptr::from_ref(pieces).cast_mut().cast()];
        // SAFETY: the kernel has one parameter of this type. It reads and writes the pieces that are named there and nothing else, see its
        // source: memory that the batch's flight holds until the device is done with it, and that the device reaches: its own, or
        // registered and not unregistered before the flight is over.
        unsafe { self.launch(gpu, driver, stream, (blocks, THREADS), &mut parameters) }
    }

    /// Queues so many blocks of so many threads.
    ///
    /// # Safety
    /// As many parameters, of the types, as the kernel has: the library copies them before it returns. What the kernel goes to is in
    /// memory that the device reaches, and stays there until it is done with it.
    pub(super) unsafe fn launch(
        &self,
        gpu: &Gpu,
        driver: &Driver,
        stream: Opaque,
        (blocks, threads): (u32, u32),
        parameters: &mut [Opaque],
    ) -> Result<(), GpuError> {
        // SAFETY: a live function and stream; the rest is the caller's promise.
        let answer = unsafe {
            (driver.functions.launch)(
                self.function.as_ptr(),
                blocks,
                1,
                1,
                threads,
                1,
                1,
                0,
                stream,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        gpu.check("cuLaunchKernel", answer)
    }
}

fn some(call: &'static str, pointer: Opaque) -> Result<NonNull<c_void>, GpuError> {
    NonNull::new(pointer).ok_or_else(|| failed(call, "nothing".to_owned()))
}

/// Whether a batch is many small pieces.
pub(super) fn is_for_it(copies: &[Copy]) -> bool {
    let bytes: usize = copies.iter().map(|copy| copy.source.len()).sum();
    copies.len() >= MANY && bytes < SMALL_BYTES * copies.len()
}

impl Kernel {
    /// Queues a batch that is one for the kernel. False where it does not reach all of it, and nothing was queued.
    ///
    /// # Errors
    /// What the driver says: some of it may be queued.
    pub(super) fn begin(
        &self,
        gpu: &Gpu,
        driver: &Driver,
        stream: Opaque,
        copies: &[Copy],
        reach: impl Fn(&Place) -> Option<Address>,
    ) -> Result<bool, GpuError> {
        let mut sides = Vec::with_capacity(copies.len());
        for copy in copies {
            let (Some(source), Some(target)) = (reach(&copy.source), reach(&copy.target)) else {
                return Ok(false);
            };
            // Byte by byte it is slower than anything.
            if (source | target) % WORD_BYTES != 0 {
                return Ok(false);
            }
            sides.push((source, target, copy.source.len()));
        }
        let mut pieces = Pieces::none();
        for (source, target, bytes) in sides {
            for offset in (0..bytes).step_by(PIECE_BYTES) {
                if pieces.count as usize == PIECES {
                    self.launch_pieces(gpu, driver, stream, &pieces)?;
                    pieces.count = 0;
                }
                pieces.all[pieces.count as usize] = Piece {
                    source: source + offset as Address,
                    target: target + offset as Address,
                    bytes: PIECE_BYTES.min(bytes - offset) as u64,
                };
                pieces.count += 1;
            }
        }
        self.launch_pieces(gpu, driver, stream, &pieces).map(|()| true)
    }
}

impl Pieces {
    fn none() -> Pieces {
        let piece = Piece {
            source: 0,
            target: 0,
            bytes: 0,
        };
        Pieces {
            count: 0,
            all: [piece; PIECES],
        }
    }
}

impl Gpu {
    /// Chooses what moves batches of small pieces on this device from now on, by trying. The first attempt loads a kernel, which takes some
    /// tens of milliseconds; the trial uses 2 MiB of host memory and of the device's. Unless it is called small pieces are moved as
    /// everything else.
    ///
    /// A device that the trial fails on for good is lost, as with every copy.
    pub fn choose_piece_mover(self: &Arc<Self>, wanted: PieceMoverWanted) -> PieceMoverChosen {
        let mut chosen = match wanted {
            PieceMoverWanted::CopyEngines => PieceMoverChosen::without("as asked for".to_owned()),
            _ => self
                .try_kernel()
                .unwrap_or_else(|error| PieceMoverChosen::without(error.to_string())),
        };
        if wanted == PieceMoverWanted::Kernel && chosen.kernel_rate.is_some() {
            chosen.mover = PieceMover::Kernel;
        }
        self.launch_pieces(chosen.mover == PieceMover::Kernel);
        self.note_piece_mover(&chosen);
        chosen
    }

    fn try_kernel(self: &Arc<Self>) -> Result<PieceMoverChosen, GpuError> {
        let kernel = self.kernel_or_load()?;
        let trial = Trial::new(self)?;
        let mut times = [Vec::new(), Vec::new()];
        // In turns, so that whatever else the bus does meets both. The first round does not count: what is lazy is made then.
        for round in 0..TRIAL_ROUNDS {
            for (which, kernel) in [None, Some(kernel)].into_iter().enumerate() {
                let time = trial.run(kernel, round * 2 + which)?;
                if round > 0 {
                    times[which].push(time);
                }
            }
        }
        let [engines, kernel] = times.map(|mut times| {
            times.sort_unstable();
            2.0 * TRIAL_BYTES as f64 / times[times.len() / 2].as_secs_f64().max(1e-9)
        });
        Ok(PieceMoverChosen {
            // What is as fast needs no processors of the engine's.
            mover: if kernel > engines * 1.1 {
                PieceMover::Kernel
            } else {
                PieceMover::CopyEngines
            },
            kernel_rate: Some(kernel),
            engines_rate: Some(engines),
            reason: None,
        })
    }
}

const TRIAL_ROUNDS: usize = 6;
const TRIAL_PIECE: usize = 16 << 10;
const TRIAL_PIECES: usize = 64;
const TRIAL_BYTES: usize = TRIAL_PIECE * TRIAL_PIECES;

/// Pieces up to the device and down again, and a look at whether they arrived.
struct Trial {
    stream: Stream,
    host: Arc<MemoryRegion>,
    up: Vec<Copy>,
    down: Vec<Copy>,
    _registered: HostRegistration,
}

impl Trial {
    fn new(gpu: &Arc<Gpu>) -> Result<Trial, GpuError> {
        let host = MemoryRegion::anonymous(TRIAL_BYTES * 2).map_err(|error| failed("mmap", error.to_string()))?;
        let registered = gpu.register(&host)?;
        let device = gpu.allocate(TRIAL_BYTES * 2)?;
        let (mut up, mut down) = (Vec::new(), Vec::new());
        for at in 0..TRIAL_PIECES {
            let piece = |offset: usize| Place::Host(host.slice(offset, TRIAL_PIECE).expect("inside"));
            // Every second page, in no order: neither one piece nor rows.
            let page = (at * 37) % TRIAL_PIECES * 2;
            let page = Place::Device(device.slice(page * TRIAL_PIECE, TRIAL_PIECE).expect("inside"));
            up.push(Copy {
                source: piece(at * TRIAL_PIECE),
                target: page.clone(),
            });
            down.push(Copy {
                source: page,
                target: piece(TRIAL_BYTES + at * TRIAL_PIECE),
            });
        }
        Ok(Trial {
            stream: gpu.stream()?,
            host,
            up,
            down,
            _registered: registered,
        })
    }

    /// How long it took.
    fn run(&self, kernel: Option<&Kernel>, seed: usize) -> Result<Duration, GpuError> {
        let half = |at: usize| self.host.slice(at * TRIAL_BYTES, TRIAL_BYTES).expect("inside");
        let sent: Vec<u8> = (0..TRIAL_BYTES).map(|at| ((at / 7 + seed * 31) % 251) as u8).collect();
        half(0).copy_from_slice(&sent).expect("as long");
        half(1).zero();
        let begun = Instant::now();
        for copies in [&self.up, &self.down] {
            // What the kernel does not take must not count as its own.
            let taken = self
                .stream
                .submit_by(copies.clone(), kernel.map_or(By::CopyEngines, By::Kernel));
            let taken = taken.map_err(|refused| failed("trial", refused.reason))?;
            taken.wait().map_err(|error| failed("trial", error.to_string()))?;
        }
        let took = begun.elapsed();
        let mut came = vec![0; TRIAL_BYTES];
        half(1).copy_to_slice(&mut came).expect("as long");
        match came == sent {
            true => Ok(took),
            false => Err(failed("trial", "other bytes came back".to_owned())),
        }
    }
}

fn failed(call: &'static str, words: String) -> GpuError {
    GpuError { call, code: 0, words }
}

#[cfg(test)]
mod tests {
    use super::PTX;

    #[test]
    fn the_kernel_was_compiled_from_the_source_beside_it() {
        let source = blake3::hash(include_bytes!("kernel/pieces.cu"));
        let said = format!("// BLAKE3 of the source: {source}\n");
        assert!(PTX.contains(&said), "compile it again: {said}");
    }
}
