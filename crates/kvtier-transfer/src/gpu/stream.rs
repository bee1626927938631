use std::collections::VecDeque;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::device::Gpu;
use super::driver::{
    Address, CopyAttributes, CopyRows, CopySide, Driver, EVENT_FLAGS, GpuError, Opaque, STREAM_NON_BLOCKING, SUCCESS,
};
use super::engine::{EngineStream, Mark};
use super::kernel::{self, Kernel};
use super::memory::DeviceSlice;
use super::pinning::InFlight;
use super::rows::{self, Rows};
use crate::memory::{MemorySlice, OutOfRange};
use crate::transfer::{Batch, Cause, Drive, PIECES_MAX, Transfer};

/// Batches of a device have no deadline, see the module: this one never comes.
const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// How long a device may refuse to say whether it is done before it counts as lost.
const UNSURE: Duration = Duration::from_secs(10);

/// Copies from which on one call begins them all.
const TOGETHER_MIN: usize = 4;

/// One side of a copy.
#[derive(Clone, Debug)]
pub enum Place {
    /// Host memory. Without a registration the driver copies it through buffers of its own, and [`Stream::submit`] may take as
    /// long as that takes.
    Host(MemorySlice),
    /// Memory of the device.
    Device(DeviceSlice),
}

impl Place {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Place::Host(slice) => slice.len(),
            Place::Device(slice) => slice.len(),
        }
    }

    /// Whether it holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `length` bytes from `offset` on.
    pub fn part(&self, offset: usize, length: usize) -> Result<Place, OutOfRange> {
        match self {
            Place::Host(slice) => slice.subslice(offset, length).map(Place::Host),
            Place::Device(slice) => slice.subslice(offset, length).map(Place::Device),
        }
    }
}

/// Bytes to copy from one place to another of the same length.
#[derive(Clone, Debug)]
pub struct Copy {
    /// Where they are.
    pub source: Place,
    /// Where they go.
    pub target: Place,
}

impl Place {
    /// Of its first byte, as devices know it.
    pub(crate) fn address(&self) -> u64 {
        match self {
            Place::Host(slice) => slice.as_ptr() as u64,
            Place::Device(slice) => slice.address(),
        }
    }

    /// Tells its region from every other that lives.
    pub(crate) fn region_key(&self) -> usize {
        match self {
            Place::Host(slice) => Arc::as_ptr(slice.region()) as usize,
            Place::Device(slice) => Arc::as_ptr(slice.region()) as usize,
        }
    }
}

impl From<MemorySlice> for Place {
    fn from(slice: MemorySlice) -> Place {
        Place::Host(slice)
    }
}

impl From<DeviceSlice> for Place {
    fn from(slice: DeviceSlice) -> Place {
        Place::Device(slice)
    }
}

impl Copy {
    pub(super) fn source_address(&self) -> Address {
        match &self.source {
            Place::Host(slice) => slice.as_ptr() as Address,
            Place::Device(slice) => slice.address(),
        }
    }

    /// The device of a side that is not on this one.
    fn other_device(&self, gpu: &Arc<Gpu>) -> Option<&Arc<Gpu>> {
        [&self.source, &self.target].into_iter().find_map(|place| match place {
            Place::Device(slice) => Some(slice.region().gpu()).filter(|other| !Arc::ptr_eq(other, gpu)),
            Place::Host(_) => None,
        })
    }

    pub(super) fn target_address(&self) -> Address {
        match &self.target {
            Place::Host(slice) => slice.as_mut_ptr() as Address,
            Place::Device(slice) => slice.address(),
        }
    }
}

/// A batch that was not taken: nothing of it has been or will be copied.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct CopyRefused {
    /// Why.
    pub reason: String,
    /// What was handed in.
    pub copies: Vec<Copy>,
}

/// A queue of a device: what is submitted to it happens in order. Queues do not wait for each other unless told to.
pub struct Stream {
    raw: Arc<RawStream>,
    endings: Arc<Ender>,
}

impl fmt::Debug for Stream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Stream")
            .field("gpu", &self.raw.gpu.name())
            .finish_non_exhaustive()
    }
}

impl Gpu {
    /// A new queue.
    ///
    /// # Errors
    /// What the driver says; no thread for it.
    pub fn stream(self: &Arc<Self>) -> Result<Stream, GpuError> {
        let raw = RawStream::new(self)?;
        let endings = Arc::new(Endings::default());
        let thread = std::thread::Builder::new().name("kvtier-gpu".to_owned()).spawn({
            let endings = Arc::clone(&endings);
            move || endings.run()
        });
        thread.map_err(|error| nothing("a thread", &error.to_string()))?;
        let endings = Arc::new(Ender(endings));
        Ok(Stream { raw, endings })
    }
}

impl Stream {
    /// Queues a batch of copies. Each has a side on this stream's device; the other may be on another device of the same driver. They happen in any order, also at once: none may read or
    /// write what another of them writes. Batches happen in the order in which they were submitted.
    ///
    /// # Errors
    /// What is wrong with the batch, or why the device takes none.
    pub fn submit(&self, copies: Vec<Copy>) -> Result<Transfer, CopyRefused> {
        let by = self.raw.gpu.piece_kernel().map_or(By::CopyEngines, By::KernelOrEngines);
        self.submit_by(copies, by)
    }

    /// The same, by what the caller says.
    pub(super) fn submit_by(&self, copies: Vec<Copy>, by: By<'_>) -> Result<Transfer, CopyRefused> {
        if let Err(reason) = check(&copies, &self.raw.gpu) {
            return Err(CopyRefused { reason, copies });
        }
        let gpu = &self.raw.gpu;
        let begun = gpu.current().and_then(|driver| Ok((driver, Event::new(gpu)?)));
        let (driver, event) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                let reason = error.to_string();
                return Err(CopyRefused { reason, copies });
            }
        };
        let mut regions: Vec<InFlight> = Vec::new();
        for place in copies.iter().flat_map(|copy| [&copy.source, &copy.target]) {
            if let Place::Host(slice) = place
                && !regions.iter().any(|known| known.is_of(slice.region()))
            {
                regions.push(InFlight::new(slice.region()));
            }
        }
        let by_kernel = match by {
            By::CopyEngines => Ok(false),
            By::Kernel(kernel) | By::KernelOrEngines(kernel) => self.begin_by(kernel, &driver, &copies, &regions),
        };
        match (&by_kernel, by) {
            (Ok(true), _) => gpu.count_by_kernel(),
            (Ok(false), By::Kernel(_)) => {
                let reason = "a batch that the kernel cannot move".to_owned();
                return Err(CopyRefused { reason, copies });
            }
            // Whatever of it was launched brings the same bytes to the same places as what follows, or comes to nothing with the device.
            (Err(error), By::Kernel(_)) => {
                let reason = error.to_string();
                return Err(CopyRefused { reason, copies });
            }
            (Err(error), _) => gpu.stop_launching(error),
            (Ok(false), _) => {}
        }
        let is_begun = matches!(by_kernel, Ok(true)) || self.begin_together(&driver, &copies);
        let failed = match is_begun {
            true => None,
            false => self.begin_in_turn(&driver, &copies),
        };
        Ok(self.flight(
            event,
            Held {
                _copies: copies,
                _regions: regions,
            },
            failed,
        ))
    }

    /// Queues zeroes for all of `target`.
    ///
    /// # Errors
    /// What the driver says.
    pub fn zero(&self, target: &DeviceSlice) -> Result<Transfer, GpuError> {
        let gpu = &self.raw.gpu;
        let driver = gpu.current()?;
        let event = Event::new(gpu)?;
        // SAFETY: the range lies in memory of the device that the flight below holds until it is at rest.
        let answer = unsafe { (driver.functions.fill)(target.address(), 0, target.len(), self.raw.raw) };
        let failed = gpu.check("cuMemsetD8Async", answer).err();
        let held = Held {
            _copies: vec![Copy {
                source: Place::Device(target.clone()),
                target: Place::Device(target.clone()),
            }],
            _regions: Vec::new(),
        };
        let failed = failed.map(|error| (0, Cause::Local(error.to_string())));
        Ok(self.flight(event, held, failed))
    }

    /// What is submitted here from now on waits for everything that was submitted to `other` before.
    ///
    /// # Errors
    /// What the driver says.
    pub fn after(&self, other: &Stream) -> Result<(), GpuError> {
        self.raw.wait_for(&Event::recorded(&other.raw)?)
    }

    /// The same of everything that an engine put into a stream of its own before. It must not be recording a graph with it.
    ///
    /// # Errors
    /// What the driver says.
    pub fn after_engine(&self, engine: &EngineStream) -> Result<(), GpuError> {
        self.raw.wait_for(&Event::recorded(engine.raw())?)
    }

    /// What was submitted here so far, for others to wait for.
    ///
    /// # Errors
    /// What the driver says.
    pub fn mark(&self) -> Result<Mark, GpuError> {
        Ok(Mark(Event::recorded(&self.raw)?))
    }

    /// Begins copies of many small pieces as a kernel. False where they are to be begun otherwise.
    fn begin_by(
        &self,
        kernel: &Kernel,
        driver: &Driver,
        copies: &[Copy],
        regions: &[InFlight],
    ) -> Result<bool, GpuError> {
        let gpu = &self.raw.gpu;
        if !kernel::is_for_it(copies) {
            return Ok(false);
        }
        let reached: Vec<Option<Address>> = regions.iter().map(|known| known.address_on(gpu)).collect();
        let reach = |place: &Place| match place {
            Place::Host(slice) => {
                let known = regions.iter().position(|known| known.is_of(slice.region()))?;
                Some(reached[known]? + slice.offset() as Address)
            }
            Place::Device(slice) => Arc::ptr_eq(slice.region().gpu(), gpu).then(|| slice.address()),
        };
        kernel.begin(gpu, driver, self.raw.raw, copies, reach)
    }

    /// Begins many copies with one call, where the driver has it. False where they are to be begun one by one: begun twice is
    /// no harm, the same bytes go to the same places.
    fn begin_together(&self, driver: &Driver, copies: &[Copy]) -> bool {
        let gpu = &self.raw.gpu;
        let are_here = || copies.iter().all(|copy| copy.other_device(gpu).is_none());
        let Some(copy_batch) = driver
            .functions
            .copy_batch
            .filter(|_| copies.len() >= TOGETHER_MIN && gpu.batches() && are_here())
        else {
            return false;
        };
        let mut targets: Vec<Address> = copies.iter().map(Copy::target_address).collect();
        let mut sources: Vec<Address> = copies.iter().map(Copy::source_address).collect();
        let mut sizes: Vec<usize> = copies.iter().map(|copy| copy.source.len()).collect();
        let mut attributes = CopyAttributes::in_stream_order();
        let (mut first, mut failed) = (0, 0);
        // SAFETY: as many targets, sources and sizes as said, one set of attributes from the first copy on; all ranges have the
        // copies' lengths, which were checked, and lie in memory that the batch's flight holds until the device is done with it.
        let answer = unsafe {
            copy_batch(
                targets.as_mut_ptr(),
                sources.as_mut_ptr(),
                sizes.as_mut_ptr(),
                copies.len(),
                &raw mut attributes,
                &raw mut first,
                1,
                &raw mut failed,
                self.raw.raw,
            )
        };
        let begun = gpu.check("cuMemcpyBatchAsync", answer).is_ok();
        if !begun {
            gpu.never_batch();
        }
        begun
    }

    /// Begins copies one after another, those that lie in rows with one call. Which of them could not be begun, and why.
    fn begin_in_turn(&self, driver: &Driver, copies: &[Copy]) -> Option<(usize, Cause)> {
        let mut at = 0;
        while at < copies.len() {
            let rows = rows::of(&copies[at..]);
            if rows.count < 2
                || copies[at].other_device(&self.raw.gpu).is_some()
                || !self.begin_rows(driver, &copies[at], &rows)
            {
                for (beside, copy) in copies[at..at + rows.count].iter().enumerate() {
                    if let Err(error) = self.begin(driver, copy) {
                        return Some((at + beside, Cause::Local(error.to_string())));
                    }
                }
            }
            at += rows.count;
        }
        None
    }

    /// False where they are to be begun one by one.
    fn begin_rows(&self, driver: &Driver, first: &Copy, rows: &Rows) -> bool {
        let gpu = &self.raw.gpu;
        if !gpu.copies_rows() {
            return false;
        }
        let side = |place: &Place, address: Address, pitch: usize| match place {
            Place::Host(_) => CopySide::host(address, pitch),
            Place::Device(_) => CopySide::device(address, pitch),
        };
        let copy = CopyRows {
            source: side(&first.source, first.source_address(), rows.source_pitch),
            target: side(&first.target, first.target_address(), rows.target_pitch),
            row_bytes: first.source.len(),
            rows: rows.count,
        };
        // SAFETY: the library reads one structure; each row is a copy of the batch, whose length was checked, in memory that the
        // batch's flight holds until the device is done with it.
        let answer = unsafe { (driver.functions.copy_rows)(&raw const copy, self.raw.raw) };
        let begun = gpu.check("cuMemcpy2DAsync", answer).is_ok();
        if !begun {
            gpu.never_copy_rows();
        }
        begun
    }

    fn begin(&self, driver: &Driver, copy: &Copy) -> Result<(), GpuError> {
        let (source, target) = (copy.source_address(), copy.target_address());
        if copy.other_device(&self.raw.gpu).is_some()
            && let (Place::Device(from), Place::Device(to)) = (&copy.source, &copy.target)
        {
            let context = |slice: &DeviceSlice| slice.region().gpu().context();
            // SAFETY: as below; each range lies in memory of the device whose context is named, which that memory keeps.
            let answer = unsafe {
                (driver.functions.copy_peer)(target, context(to), source, context(from), to.len(), self.raw.raw)
            };
            return self.raw.gpu.check("cuMemcpyPeerAsync", answer);
        }
        // SAFETY: both ranges have the copy's length, which was checked, and lie in memory that the batch's flight holds until
        // the device is done with it, or for good where nobody can tell.
        let answer = unsafe { (driver.functions.copy)(target, source, copy.source.len(), self.raw.raw) };
        self.raw.gpu.check("cuMemcpyAsync", answer)
    }

    /// Marks the end of what was begun.
    fn flight(&self, event: Event, held: Held, failed: Option<(usize, Cause)>) -> Transfer {
        let batch = Batch::new(Vec::new(), 1, Instant::now() + NEVER);
        let recorded = event.record(&self.raw);
        let flight = Arc::new_cyclic(|this| Flight {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            event,
            recorded,
            stream: Arc::clone(&self.raw),
            held: Mutex::new(Some((Arc::clone(&batch), held))),
            failed,
            endings: Arc::clone(&self.endings),
            queued: AtomicBool::new(false),
            this: Weak::clone(this),
        });
        batch.driven_by(flight);
        Transfer::new(batch)
    }
}

/// What begins copies.
#[derive(Clone, Copy)]
pub(super) enum By<'a> {
    CopyEngines,
    /// Where it can, and the copy engines elsewhere.
    KernelOrEngines(&'a Kernel),
    /// It, or nothing.
    Kernel(&'a Kernel),
}

/// Flights in the order of submission, about: of those that two threads submit at once either may be first.
static NEXT: AtomicU64 = AtomicU64::new(0);

fn check(copies: &[Copy], gpu: &Arc<Gpu>) -> Result<(), String> {
    if copies.is_empty() {
        return Err("an empty batch".to_owned());
    }
    if copies.len() > PIECES_MAX {
        return Err(format!("{} copies: a batch has {PIECES_MAX} at most", copies.len()));
    }
    let is_here = |slice: &DeviceSlice| Arc::ptr_eq(slice.region().gpu(), gpu);
    let is_foreign = |slice: &DeviceSlice| !slice.region().gpu().has_driver_of(gpu);
    for (at, Copy { source, target }) in copies.iter().enumerate() {
        let what = match (source, target) {
            _ if source.len() != target.len() => "the two sides differ in length",
            _ if source.is_empty() => "an empty copy",
            (Place::Host(_), Place::Host(_)) => "no side of it is on the device",
            (Place::Device(slice), _) | (_, Place::Device(slice)) if is_foreign(slice) => {
                "memory of another driver's device"
            }
            (_, Place::Device(slice)) if is_foreign(slice) => "memory of another driver's device",
            (Place::Device(one), Place::Device(other)) if !is_here(one) && !is_here(other) => {
                "no side of it is on this device"
            }
            (Place::Device(slice), Place::Host(_)) | (Place::Host(_), Place::Device(slice)) if !is_here(slice) => {
                "memory of another device, to or from the host"
            }
            (_, Place::Host(slice)) if !slice.is_writable() => "the target is mapped read-only",
            _ => continue,
        };
        return Err(format!("copy {at}: {what}"));
    }
    Ok(())
}

fn nothing(call: &'static str, words: &str) -> GpuError {
    GpuError {
        call,
        code: 0,
        words: words.to_owned(),
    }
}

/// The driver's object, ours or an engine's.
pub(super) struct RawStream {
    gpu: Arc<Gpu>,
    raw: Opaque,
    is_ours: bool,
}

impl RawStream {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Arc<RawStream>, GpuError> {
        let driver = gpu.current()?;
        let mut raw: Opaque = std::ptr::null_mut();
        // SAFETY: the library writes one pointer.
        let answer = unsafe { (driver.functions.stream_create)(&raw mut raw, STREAM_NON_BLOCKING) };
        gpu.check("cuStreamCreate", answer)?;
        Ok(Arc::new(RawStream {
            gpu: Arc::clone(gpu),
            raw,
            is_ours: true,
        }))
    }

    pub(super) fn of_an_engine(gpu: &Arc<Gpu>, handle: u64) -> RawStream {
        RawStream {
            gpu: Arc::clone(gpu),
            raw: handle as Opaque,
            is_ours: false,
        }
    }

    pub(super) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    pub(super) fn raw(&self) -> Opaque {
        self.raw
    }

    /// What comes into it from now on waits until the event has happened.
    pub(super) fn wait_for(&self, event: &Event) -> Result<(), GpuError> {
        let driver = self.gpu.current()?;
        // SAFETY: a live stream and an event that was recorded; the driver keeps what it needs of it.
        let answer = unsafe { (driver.functions.stream_wait)(self.raw, event.raw.as_ptr(), 0) };
        self.gpu.check("cuStreamWaitEvent", answer)
    }
}

// SAFETY: the driver's objects may be used from any thread, it locks for itself.
unsafe impl Send for RawStream {}
// SAFETY: as for `Send`.
unsafe impl Sync for RawStream {}

impl Drop for RawStream {
    fn drop(&mut self) {
        if let (true, Ok(driver)) = (self.is_ours, self.gpu.current()) {
            // SAFETY: made there, destroyed once; what is still in it goes on to its end.
            let answer = unsafe { (driver.functions.stream_destroy)(self.raw) };
            let _ = self.gpu.check("cuStreamDestroy", answer);
        }
    }
}

/// The driver's object.
pub(super) struct Event {
    gpu: Arc<Gpu>,
    raw: NonNull<std::ffi::c_void>,
}

// SAFETY: the driver's objects may be used from any thread, it locks for itself.
unsafe impl Send for Event {}
// SAFETY: as for `Send`.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Event, GpuError> {
        let driver = gpu.current()?;
        let mut raw: Opaque = std::ptr::null_mut();
        // SAFETY: the library writes one pointer.
        let answer = unsafe { (driver.functions.event_create)(&raw mut raw, EVENT_FLAGS) };
        gpu.check("cuEventCreate", answer)?;
        let raw = NonNull::new(raw).ok_or_else(|| nothing("cuEventCreate", "no event"))?;
        let gpu = Arc::clone(gpu);
        Ok(Event { gpu, raw })
    }

    /// One that happens once everything that is in `stream` now is done.
    fn recorded(stream: &RawStream) -> Result<Event, GpuError> {
        let event = Event::new(&stream.gpu)?;
        event.record(stream)?;
        Ok(event)
    }

    /// It happens once everything that is in `stream` now is done.
    pub(super) fn record(&self, stream: &RawStream) -> Result<(), GpuError> {
        let driver = self.gpu.current()?;
        // SAFETY: a live event and a live stream.
        let answer = unsafe { (driver.functions.event_record)(self.raw.as_ptr(), stream.raw) };
        self.gpu.check("cuEventRecord", answer)
    }

    /// Sleeps until it has happened. An error means that nobody can tell, and the device is lost.
    pub(super) fn wait(&self) -> Result<(), GpuError> {
        let begun = Instant::now();
        loop {
            let driver = self.gpu.current()?;
            // SAFETY: a live event.
            let answer = unsafe { (driver.functions.event_synchronize)(self.raw.as_ptr()) };
            drop(driver);
            match self.gpu.check("cuEventSynchronize", answer) {
                Err(error) if self.gpu.is_lost() || begun.elapsed() > UNSURE => {
                    self.gpu.lose();
                    return Err(error);
                }
                // Such as another thread that records a graph, which forbids to wait meanwhile.
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
                Ok(()) => return Ok(()),
            }
        }
    }

    /// Whether it has happened, or never will.
    fn is_over(&self) -> bool {
        let Ok(driver) = self.gpu.current() else {
            return self.gpu.is_lost();
        };
        // SAFETY: a live event.
        let answer = unsafe { (driver.functions.event_query)(self.raw.as_ptr()) };
        answer == SUCCESS
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(driver) = self.gpu.current() {
            // SAFETY: made there, destroyed once; the driver lets go of it once it has happened.
            let answer = unsafe { (driver.functions.event_destroy)(self.raw.as_ptr()) };
            let _ = self.gpu.check("cuEventDestroy", answer);
        }
    }
}

/// A batch on the device.
struct Flight {
    number: u64,
    event: Event,
    /// Whether the event tells the end of it.
    recorded: Result<(), GpuError>,
    stream: Arc<RawStream>,
    /// Until it is at rest.
    held: Mutex<Option<(Arc<Batch>, Held)>>,
    /// What the device refused to begin.
    failed: Option<(usize, Cause)>,
    endings: Arc<Ender>,
    queued: AtomicBool,
    this: Weak<Flight>,
}

/// What a batch reads and writes.
pub(super) struct Held {
    _copies: Vec<Copy>,
    _regions: Vec<InFlight>,
}

impl Flight {
    /// Waits for the device, then tells the outcome. Several threads may: one of them tells.
    fn end(&self) {
        let gpu = &self.stream.gpu;
        let waited = self.recorded.clone().and_then(|()| self.event.wait());
        let Some((batch, held)) = self.held.lock().take() else {
            return;
        };
        let result = match waited {
            Ok(()) => {
                // At rest: it is let go of before anybody hears.
                drop(held);
                Ok(())
            }
            Err(error) => {
                // Nobody can tell what it still writes.
                gpu.lose();
                gpu.keep(held);
                Err((0, Cause::Local(error.to_string())))
            }
        };
        match self.failed.clone().map_or(result, Err) {
            Ok(()) => batch.finish(0, Ok(())),
            Err((at, cause)) => batch.finish(at, Err(cause)),
        }
    }
}

impl Drive for Flight {
    fn drive(&self, _: &Arc<Batch>) {
        self.end();
    }

    fn hand_over(&self) {
        if self.event.is_over() {
            return self.end();
        }
        if !self.queued.swap(true, Ordering::AcqRel)
            && let Some(flight) = self.this.upgrade()
        {
            let mut queue = self.endings.0.queue.lock();
            // What was submitted first is done first.
            let place = queue.flights.partition_point(|other| other.number < flight.number);
            queue.flights.insert(place, flight);
            drop(queue);
            self.endings.0.filled.notify_one();
        }
    }
}

/// Batches that nobody waits for, and the thread that does.
#[derive(Default)]
struct Endings {
    queue: Mutex<Queue>,
    filled: Condvar,
}

/// The right to hand batches over: the thread ends with the last one, and is not waited for, as a device may hang.
struct Ender(Arc<Endings>);

impl Drop for Ender {
    fn drop(&mut self) {
        self.0.queue.lock().closed = true;
        self.0.filled.notify_all();
    }
}

#[derive(Default)]
struct Queue {
    flights: VecDeque<Arc<Flight>>,
    closed: bool,
}

impl Endings {
    fn run(&self) {
        loop {
            let flight = {
                let mut queue = self.queue.lock();
                loop {
                    if let Some(flight) = queue.flights.pop_front() {
                        break flight;
                    }
                    if queue.closed {
                        return;
                    }
                    self.filled.wait(&mut queue);
                }
            };
            flight.end();
        }
    }
}
