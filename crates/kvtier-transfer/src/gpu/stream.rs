use std::collections::VecDeque;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::device::Gpu;
use super::driver::{Address, EVENT_FLAGS, GpuError, NOT_READY, Opaque, STREAM_NON_BLOCKING};
use super::memory::{DeviceSlice, HostRegistration};
use crate::memory::{MemorySlice, OutOfRange};
use crate::transfer::{Batch, Cause, Drive, PIECES_MAX, Transfer};

/// Batches of a device have no deadline, see the module: this one never comes.
const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// One side of a copy.
#[derive(Clone, Debug)]
pub enum Place {
    /// Host memory. Without a registration the driver copies it through buffers of its own.
    Host(MemorySlice),
    /// Memory of the device.
    Device(DeviceSlice),
}

impl Place {
    pub(super) fn len(&self) -> usize {
        match self {
            Place::Host(slice) => slice.len(),
            Place::Device(slice) => slice.len(),
        }
    }

    pub(super) fn part(&self, offset: usize, length: usize) -> Result<Place, OutOfRange> {
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
        let driver = self.current()?;
        let mut raw: Opaque = std::ptr::null_mut();
        // SAFETY: the library writes one pointer.
        let answer = unsafe { (driver.functions.stream_create)(&raw mut raw, STREAM_NON_BLOCKING) };
        self.check("cuStreamCreate", answer)?;
        let nothing = |what: &str| GpuError {
            call: "cuStreamCreate",
            code: 0,
            words: what.to_owned(),
        };
        let raw = NonNull::new(raw).ok_or_else(|| nothing("no stream"))?;
        let gpu = Arc::clone(self);
        let raw = Arc::new(RawStream { gpu, raw });
        let endings = Arc::new(Endings::default());
        let thread = std::thread::Builder::new().name("kvtier-gpu".to_owned()).spawn({
            let endings = Arc::clone(&endings);
            move || endings.run()
        });
        thread.map_err(|error| nothing(&error.to_string()))?;
        let endings = Arc::new(Ender(endings));
        Ok(Stream { raw, endings })
    }
}

impl Stream {
    /// Queues a batch of copies. Each has a side on this stream's device.
    ///
    /// # Errors
    /// What is wrong with the batch, or why the device takes none.
    pub fn submit(&self, copies: Vec<Copy>) -> Result<Transfer, CopyRefused> {
        if let Err(reason) = check(&copies, &self.raw.gpu) {
            return Err(CopyRefused { reason, copies });
        }
        let gpu = &self.raw.gpu;
        let event = match gpu.current().and_then(|_| Event::new(gpu)) {
            Ok(event) => event,
            Err(error) => {
                let reason = error.to_string();
                return Err(CopyRefused { reason, copies });
            }
        };
        let registrations = copies
            .iter()
            .flat_map(|copy| [&copy.source, &copy.target])
            .filter_map(|place| match place {
                Place::Host(slice) => gpu.registrations.of(slice.region()),
                Place::Device(_) => None,
            })
            .collect();
        let mut failed = None;
        for (at, copy) in copies.iter().enumerate() {
            if let Err(error) = self.begin(copy) {
                failed = Some((at, Cause::Local(error.to_string())));
                break;
            }
        }
        Ok(self.flight(event, copies, registrations, failed))
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
        let answer = unsafe { (driver.functions.fill)(target.address(), 0, target.len(), self.raw.raw.as_ptr()) };
        let failed = gpu.check("cuMemsetD8Async", answer).err();
        let held = Copy {
            source: Place::Device(target.clone()),
            target: Place::Device(target.clone()),
        };
        let failed = failed.map(|error| (0, Cause::Local(error.to_string())));
        Ok(self.flight(event, vec![held], Vec::new(), failed))
    }

    /// What is submitted here from now on waits for everything that was submitted to `other` before.
    ///
    /// # Errors
    /// What the driver says.
    pub fn after(&self, other: &Stream) -> Result<(), GpuError> {
        let event = Event::new(&other.raw.gpu)?;
        event.record(&other.raw)?;
        let driver = self.raw.gpu.current()?;
        // SAFETY: a live stream and an event that was recorded; the driver keeps what it needs of it.
        let answer = unsafe { (driver.functions.stream_wait)(self.raw.raw.as_ptr(), event.raw.as_ptr(), 0) };
        self.raw.gpu.check("cuStreamWaitEvent", answer)
    }

    fn begin(&self, copy: &Copy) -> Result<(), GpuError> {
        let driver = self.raw.gpu.current()?;
        let source = match &copy.source {
            Place::Host(slice) => slice.as_ptr() as Address,
            Place::Device(slice) => slice.address(),
        };
        let target = match &copy.target {
            Place::Host(slice) => slice.as_mut_ptr() as Address,
            Place::Device(slice) => slice.address(),
        };
        // SAFETY: both ranges have the copy's length, which was checked, and lie in memory that the batch's flight holds until
        // the device is done with it, or for good where nobody can tell.
        let answer = unsafe { (driver.functions.copy)(target, source, copy.source.len(), self.raw.raw.as_ptr()) };
        self.raw.gpu.check("cuMemcpyAsync", answer)
    }

    /// Marks the end of what was begun.
    fn flight(
        &self,
        event: Event,
        copies: Vec<Copy>,
        registrations: Vec<Arc<HostRegistration>>,
        failed: Option<(usize, Cause)>,
    ) -> Transfer {
        let batch = Batch::new(Vec::new(), 1, Instant::now() + NEVER);
        let recorded = event.record(&self.raw).is_ok();
        let flight = Arc::new_cyclic(|this| Flight {
            event,
            recorded,
            stream: Arc::clone(&self.raw),
            held: Mutex::new(Some(Held {
                batch: Arc::clone(&batch),
                copies,
                _registrations: registrations,
            })),
            failed,
            endings: Arc::clone(&self.endings),
            queued: AtomicBool::new(false),
            this: Weak::clone(this),
        });
        batch.driven_by(flight);
        Transfer::new(batch)
    }
}

fn check(copies: &[Copy], gpu: &Arc<Gpu>) -> Result<(), String> {
    if copies.is_empty() {
        return Err("an empty batch".to_owned());
    }
    if copies.len() > PIECES_MAX {
        return Err(format!("{} copies: a batch has {PIECES_MAX} at most", copies.len()));
    }
    let is_here = |slice: &DeviceSlice| Arc::ptr_eq(slice.region().gpu(), gpu);
    for (at, Copy { source, target }) in copies.iter().enumerate() {
        let what = match (source, target) {
            _ if source.len() != target.len() => "the two sides differ in length",
            _ if source.len() == 0 => "an empty copy",
            (Place::Host(_), Place::Host(_)) => "no side of it is on the device",
            (Place::Device(slice), _) | (_, Place::Device(slice)) if !is_here(slice) => "memory of another device",
            (_, Place::Device(slice)) if !is_here(slice) => "memory of another device",
            (_, Place::Host(slice)) if !slice.is_writable() => "the target is mapped read-only",
            _ => continue,
        };
        return Err(format!("copy {at}: {what}"));
    }
    Ok(())
}

struct RawStream {
    gpu: Arc<Gpu>,
    raw: NonNull<std::ffi::c_void>,
}

// SAFETY: the driver's objects may be used from any thread, it locks for itself.
unsafe impl Send for RawStream {}
// SAFETY: as for `Send`.
unsafe impl Sync for RawStream {}

impl Drop for RawStream {
    fn drop(&mut self) {
        if let Ok(driver) = self.gpu.current() {
            // SAFETY: made there, destroyed once; what is still in it goes on to its end.
            let answer = unsafe { (driver.functions.stream_destroy)(self.raw.as_ptr()) };
            let _ = self.gpu.check("cuStreamDestroy", answer);
        }
    }
}

struct Event {
    gpu: Arc<Gpu>,
    raw: NonNull<std::ffi::c_void>,
}

// SAFETY: the driver's objects may be used from any thread, it locks for itself.
unsafe impl Send for Event {}
// SAFETY: as for `Send`.
unsafe impl Sync for Event {}

impl Event {
    fn new(gpu: &Arc<Gpu>) -> Result<Event, GpuError> {
        let driver = gpu.current()?;
        let mut raw: Opaque = std::ptr::null_mut();
        // SAFETY: the library writes one pointer.
        let answer = unsafe { (driver.functions.event_create)(&raw mut raw, EVENT_FLAGS) };
        gpu.check("cuEventCreate", answer)?;
        let raw = NonNull::new(raw).ok_or_else(|| GpuError {
            call: "cuEventCreate",
            code: 0,
            words: "no event".to_owned(),
        })?;
        let gpu = Arc::clone(gpu);
        Ok(Event { gpu, raw })
    }

    /// It happens once everything that is in `stream` now is done.
    fn record(&self, stream: &RawStream) -> Result<(), GpuError> {
        let driver = self.gpu.current()?;
        // SAFETY: a live event and a live stream.
        let answer = unsafe { (driver.functions.event_record)(self.raw.as_ptr(), stream.raw.as_ptr()) };
        self.gpu.check("cuEventRecord", answer)
    }

    fn wait(&self) -> Result<(), GpuError> {
        let driver = self.gpu.current()?;
        // SAFETY: a live event.
        let answer = unsafe { (driver.functions.event_synchronize)(self.raw.as_ptr()) };
        self.gpu.check("cuEventSynchronize", answer)
    }

    /// Whether it has happened, or never will.
    fn is_over(&self) -> bool {
        let Ok(driver) = self.gpu.current() else { return true };
        // SAFETY: a live event.
        let answer = unsafe { (driver.functions.event_query)(self.raw.as_ptr()) };
        answer != NOT_READY
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
    event: Event,
    /// Whether the event tells the end of it.
    recorded: bool,
    stream: Arc<RawStream>,
    held: Mutex<Option<Held>>,
    /// What the device refused to begin.
    failed: Option<(usize, Cause)>,
    endings: Arc<Ender>,
    queued: AtomicBool,
    this: Weak<Flight>,
}

/// What is let go of when it is at rest.
struct Held {
    batch: Arc<Batch>,
    copies: Vec<Copy>,
    _registrations: Vec<Arc<HostRegistration>>,
}

impl Flight {
    /// Waits for the device, then tells the outcome. Several threads may: one of them tells.
    fn end(&self) {
        let gpu = &self.stream.gpu;
        let waited = match self.recorded {
            true => self.event.wait().map_err(|error| error.to_string()),
            false => Err("the device takes no more".to_owned()),
        };
        let Some(held) = self.held.lock().take() else { return };
        let Held { batch, copies, .. } = held;
        match waited {
            Ok(()) => {
                // At rest: it may be freed before anybody hears.
                drop(copies);
                match &self.failed {
                    None => batch.finish(0, Ok(())),
                    Some((at, cause)) => batch.finish(*at, Err(cause.clone())),
                }
            }
            Err(words) => {
                // Nobody can tell what it still writes.
                gpu.lose();
                gpu.keep(copies);
                let (at, cause) = self.failed.clone().unwrap_or((0, Cause::Local(words)));
                batch.finish(at, Err(cause));
            }
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
            self.endings.0.queue.lock().flights.push_back(flight);
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
