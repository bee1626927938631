use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use super::driver::{
    Address, CAPTURE_RELAXED, Driver, FLUSH_BY_HOST, FLUSH_CURRENT, FLUSH_OPTIONS, FLUSH_TO_OWNER, GpuError,
    ORDERED_FOR_OWNER, Opaque, SUCCESS, Unavailable, WRITES_ORDERING, is_for_good, unavailable,
};
use super::kernel::{Kernel, PieceMoverChosen};
use super::stream::Held;

/// CUDA's driver, open.
pub struct Cuda {
    driver: Arc<Driver>,
    devices: usize,
    open: Mutex<HashMap<usize, Weak<Gpu>>>,
}

impl fmt::Debug for Cuda {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Cuda")
            .field("version", &self.driver.version)
            .field("devices", &self.devices)
            .finish()
    }
}

impl Cuda {
    /// The system's driver.
    ///
    /// # Errors
    /// Why there is none: no library, no device, or a driver that does not start.
    pub fn open() -> Result<Cuda, Unavailable> {
        Cuda::with(Driver::open(None)?)
    }

    /// A driver at a path: one that lies elsewhere, or a software device for tests. Its initialisers run in this process.
    ///
    /// # Errors
    /// As for [`Cuda::open`].
    pub fn open_at(library: &Path) -> Result<Cuda, Unavailable> {
        Cuda::with(Driver::open(Some(library))?)
    }

    fn with(driver: Driver) -> Result<Cuda, Unavailable> {
        let mut count: c_int = 0;
        // SAFETY: the library writes one number.
        let answer = unsafe { (driver.functions.device_count)(&raw mut count) };
        driver.check("cuDeviceGetCount", answer).map_err(unavailable)?;
        let devices = usize::try_from(count).unwrap_or(0);
        if devices == 0 {
            return Err(Unavailable("the driver has no device".to_owned()));
        }
        Ok(Cuda {
            driver: Arc::new(driver),
            devices,
            open: Mutex::default(),
        })
    }

    /// How many devices there are.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.devices
    }

    /// What CUDA version the driver speaks: (major, minor).
    #[must_use]
    pub fn version(&self) -> (u32, u32) {
        let version = u32::try_from(self.driver.version).unwrap_or(0);
        (version / 1000, version % 1000 / 10)
    }

    /// A device by its number, in its primary context: the one that an engine in this process uses, too. While it is open the
    /// same number gives the same device.
    ///
    /// # Errors
    /// What the driver says.
    pub fn device(&self, number: usize) -> Result<Arc<Gpu>, GpuError> {
        let mut open = self.open.lock();
        if let Some(gpu) = open.get(&number).and_then(Weak::upgrade) {
            return Ok(gpu);
        }
        let gpu = self.open_device(number)?;
        open.insert(number, Arc::downgrade(&gpu));
        Ok(gpu)
    }

    fn open_device(&self, number: usize) -> Result<Arc<Gpu>, GpuError> {
        let driver = Arc::clone(&self.driver);
        let number = c_int::try_from(number).unwrap_or(c_int::MAX);
        let mut handle: c_int = 0;
        // SAFETY: the library writes one number.
        let answer = unsafe { (driver.functions.device_get)(&raw mut handle, number) };
        driver.check("cuDeviceGet", answer)?;
        let mut name = [0 as c_char; 256];
        // SAFETY: room for as many characters as said, of which the last is a zero.
        let answer = unsafe { (driver.functions.device_name)(name.as_mut_ptr(), 256, handle) };
        driver.check("cuDeviceGetName", answer)?;
        name[255] = 0;
        // SAFETY: ends in zero, see above.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let mut uuid = [0; 16];
        // SAFETY: the library writes sixteen bytes.
        let answer = unsafe { (driver.functions.device_uuid)(&raw mut uuid, handle) };
        driver.check("cuDeviceGetUuid", answer)?;
        let mut context: Opaque = std::ptr::null_mut();
        // SAFETY: the library writes one pointer.
        let answer = unsafe { (driver.functions.primary_retain)(&raw mut context, handle) };
        driver.check("cuDevicePrimaryCtxRetain", answer)?;
        let context = NonNull::new(context).ok_or_else(|| GpuError {
            call: "cuDevicePrimaryCtxRetain",
            code: 0,
            words: "no context".to_owned(),
        })?;
        Ok(Arc::new(Gpu {
            driver,
            handle,
            context,
            name,
            uuid: DeviceUuid(uuid),
            lost: AtomicBool::new(false),
            refuses_batches: AtomicBool::new(false),
            refuses_rows: AtomicBool::new(false),
            kernel: OnceLock::new(),
            launches: AtomicBool::new(false),
            launched: AtomicU64::new(0),
            chosen: Mutex::default(),
            kept: Mutex::default(),
        }))
    }
}

/// What it takes for a device to see what NICs wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DirectWrites {
    /// Nothing.
    Seen,
    /// A call, see [`Gpu::flush_direct_writes`].
    Flushed,
    /// Nobody can tell when it does.
    Unordered,
}

/// Names a device for good. Shown as the driver's tools do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceUuid(pub [u8; 16]);

impl fmt::Display for DeviceUuid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("GPU")?;
        for (at, byte) in self.0.iter().enumerate() {
            let dash = if matches!(at, 0 | 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(formatter, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

/// One device and its primary context, retained while this lives.
pub struct Gpu {
    driver: Arc<Driver>,
    handle: c_int,
    context: NonNull<std::ffi::c_void>,
    name: String,
    uuid: DeviceUuid,
    lost: AtomicBool,
    /// The driver refused a batch of copies.
    refuses_batches: AtomicBool,
    /// The driver refused a copy of rows.
    refuses_rows: AtomicBool,
    /// What copies pieces, once it was tried.
    kernel: OnceLock<Kernel>,
    /// Whether it does.
    launches: AtomicBool,
    launched: AtomicU64,
    chosen: Mutex<Option<PieceMoverChosen>>,
    /// What a lost device may still read and write.
    kept: Mutex<Vec<Held>>,
}

// SAFETY: the driver's objects may be used from any thread, it locks for itself.
unsafe impl Send for Gpu {}
// SAFETY: as for `Send`.
unsafe impl Sync for Gpu {}

impl fmt::Debug for Gpu {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Gpu")
            .field("name", &self.name)
            .field("lost", &self.is_lost())
            .finish_non_exhaustive()
    }
}

impl Gpu {
    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What tells it from every other device, in every process: of a part of a divided device, the part's.
    #[must_use]
    pub fn uuid(&self) -> DeviceUuid {
        self.uuid
    }

    pub(super) fn handle(&self) -> c_int {
        self.handle
    }

    /// Whether it failed for good: nothing works on it until the process is started anew.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Bytes of its memory: (free, all).
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory(&self) -> Result<(usize, usize), GpuError> {
        let driver = self.current()?;
        let (mut free, mut all) = (0, 0);
        // SAFETY: the library writes two numbers.
        let answer = unsafe { (driver.functions.memory_info)(&raw mut free, &raw mut all) };
        self.check("cuMemGetInfo", answer)?;
        Ok((free, all))
    }

    /// What the device can.
    pub(super) fn attribute(&self, which: c_int) -> Result<c_int, GpuError> {
        let mut value = 0;
        // SAFETY: the library writes one number.
        let answer = unsafe { (self.driver.functions.attribute)(&raw mut value, which, self.handle) };
        self.check("cuDeviceGetAttribute", answer).map(|()| value)
    }

    /// Whether what NICs write into its memory can be seen by it, and what that takes.
    pub(crate) fn sees_direct_writes(&self) -> DirectWrites {
        match (self.attribute(WRITES_ORDERING), self.attribute(FLUSH_OPTIONS)) {
            (Ok(ordering), _) if ordering >= ORDERED_FOR_OWNER => DirectWrites::Seen,
            (_, Ok(options)) if options & FLUSH_BY_HOST != 0 && self.driver.functions.flush_writes.is_some() => {
                DirectWrites::Flushed
            }
            _ => DirectWrites::Unordered,
        }
    }

    /// What NICs have written so far can be seen by the device when this returns.
    pub(crate) fn flush_direct_writes(&self) -> Result<(), GpuError> {
        let driver = self.current()?;
        let Some(flush) = driver.functions.flush_writes else {
            return Ok(());
        };
        // SAFETY: takes no pointer.
        let answer = unsafe { flush(FLUSH_CURRENT, FLUSH_TO_OWNER) };
        self.check("cuFlushGPUDirectRDMAWrites", answer)
    }

    /// The NUMA node that it is attached to, where the system tells.
    #[must_use]
    pub fn numa_node(&self) -> Option<u32> {
        let mut address = [0 as c_char; 32];
        // SAFETY: room for as many characters as said, of which the last is a zero.
        let answer = unsafe { (self.driver.functions.bus_address)(address.as_mut_ptr(), 32, self.handle) };
        self.driver.check("cuDeviceGetPCIBusId", answer).ok()?;
        address[31] = 0;
        // SAFETY: ends in zero, see above.
        let address = unsafe { CStr::from_ptr(address.as_ptr()) }
            .to_string_lossy()
            .to_lowercase();
        let text = std::fs::read_to_string(format!("/sys/bus/pci/devices/{address}/numa_node")).ok()?;
        // -1 where the firmware does not say.
        text.trim().parse().ok()
    }

    /// Where this device has what is registered at a host address, if it may go there by itself.
    pub(super) fn reaches(&self, host: usize) -> Option<Address> {
        let driver = self.current().ok()?;
        let mut address: Address = 0;
        // SAFETY: the library writes one number, and knows an address that is not registered.
        let answer = unsafe { (driver.functions.host_address)(&raw mut address, host as Opaque, 0) };
        self.check("cuMemHostGetDevicePointer", answer).ok().map(|()| address)
    }

    /// Makes the context this thread's, until the answer is dropped, and hands out the driver.
    pub(super) fn current(&self) -> Result<Current<'_>, GpuError> {
        if self.is_lost() {
            return Err(GpuError {
                call: "none",
                code: 0,
                words: format!("{} failed for good: restart the process", self.name),
            });
        }
        // SAFETY: a context that is retained while `self` lives.
        let answer = unsafe { (self.driver.functions.push_current)(self.context.as_ptr()) };
        self.check("cuCtxPushCurrent", answer)?;
        let mut capture = CAPTURE_RELAXED;
        // SAFETY: the library reads one number and writes another.
        let answer = unsafe { (self.driver.functions.capture_mode)(&raw mut capture) };
        let current = Current {
            driver: &self.driver,
            capture: (answer == SUCCESS).then_some(capture),
            thread: PhantomData,
        };
        self.check("cuThreadExchangeStreamCaptureMode", answer)?;
        Ok(current)
    }

    /// The answer of a call on this device; notes that it is lost.
    pub(super) fn check(&self, call: &'static str, answer: c_int) -> Result<(), GpuError> {
        let checked = self.driver.check(call, answer);
        if checked.as_ref().is_err_and(|error| is_for_good(error.code)) {
            self.lose();
        }
        checked
    }

    /// It failed for good.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Whether many copies may be begun with one call.
    pub(super) fn batches(&self) -> bool {
        !self.refuses_batches.load(Ordering::Relaxed)
    }

    /// They may not from now on.
    pub(super) fn never_batch(&self) {
        self.refuses_batches.store(true, Ordering::Relaxed);
    }

    /// Whether copies in rows may be begun with one call.
    pub(super) fn copies_rows(&self) -> bool {
        !self.refuses_rows.load(Ordering::Relaxed)
    }

    /// They may not from now on.
    pub(super) fn never_copy_rows(&self) {
        self.refuses_rows.store(true, Ordering::Relaxed);
    }

    /// What moves batches of small pieces, where that was chosen.
    #[must_use]
    pub fn piece_mover(&self) -> Option<PieceMoverChosen> {
        self.chosen.lock().clone()
    }

    pub(super) fn note_piece_mover(&self, chosen: &PieceMoverChosen) {
        *self.chosen.lock() = Some(chosen.clone());
    }

    /// What copies pieces, if it was chosen to.
    pub(super) fn piece_kernel(&self) -> Option<&Kernel> {
        self.kernel.get().filter(|_| self.launches.load(Ordering::Relaxed))
    }

    /// It does not any more.
    pub(super) fn stop_launching(&self, error: &GpuError) {
        self.launch_pieces(false);
        self.note_piece_mover(&PieceMoverChosen::without(error.to_string()));
    }

    /// Whether it does from now on.
    pub(super) fn launch_pieces(&self, launches: bool) {
        self.launches.store(launches, Ordering::Relaxed);
    }

    /// Batches that the kernel moved, or is moving.
    #[must_use]
    pub fn batches_by_kernel(&self) -> u64 {
        self.launched.load(Ordering::Relaxed)
    }

    pub(super) fn count_by_kernel(&self) {
        self.launched.fetch_add(1, Ordering::Relaxed);
    }

    /// The kernel; loads it at first.
    pub(super) fn kernel_or_load(&self) -> Result<&Kernel, GpuError> {
        if self.kernel.get().is_none() {
            let loaded = Kernel::of_pieces(self)?;
            if let Err(second) = self.kernel.set(loaded) {
                second.unload(&*self.current()?);
            }
        }
        Ok(self.kernel.get().expect("set above"))
    }

    /// Whether one driver has both.
    pub(super) fn has_driver_of(&self, other: &Gpu) -> bool {
        // A library that was opened twice is one.
        std::ptr::fn_addr_eq(self.driver.functions.init, other.driver.functions.init)
    }

    pub(super) fn context(&self) -> Opaque {
        self.context.as_ptr()
    }

    /// Holds on to memory that nobody can tell to be at rest.
    pub(super) fn keep(&self, held: Held) {
        self.kept.lock().push(held);
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if let (Some(kernel), Ok(driver)) = (self.kernel.get(), self.current()) {
            kernel.unload(&driver);
        }
        // Whoever keeps copies for good keeps this, too: each has a side that lies in memory of this device.
        // SAFETY: retained once; every object of the context holds this, so none is left. Its answer changes nothing.
        let _ = unsafe { (self.driver.functions.primary_release)(self.handle) };
    }
}

/// The calling thread's context is a device's while this lives; then it is what it was. An engine's threads have their own, and
/// may be recording a graph.
pub(super) struct Current<'a> {
    driver: &'a Driver,
    /// What the thread's mode was.
    capture: Option<c_int>,
    /// It belongs to the thread that made it.
    thread: PhantomData<*const ()>,
}

impl Deref for Current<'_> {
    type Target = Driver;

    fn deref(&self) -> &Driver {
        self.driver
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if let Some(mut capture) = self.capture {
            // SAFETY: the library reads one number and writes another.
            let _ = unsafe { (self.driver.functions.capture_mode)(&raw mut capture) };
        }
        let mut context: Opaque = std::ptr::null_mut();
        // SAFETY: the library writes one pointer.
        let _ = unsafe { (self.driver.functions.pop_current)(&raw mut context) };
    }
}
