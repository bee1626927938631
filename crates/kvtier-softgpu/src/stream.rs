//! Streams, each a thread, and events.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::device::Device;
use crate::ptx::{Grid, Kernel};

/// What a stream is to do.
pub(crate) enum Operation {
    Copy {
        target: u64,
        source: u64,
        bytes: usize,
    },
    /// Between two devices.
    PeerCopy {
        target: PeerSide,
        source: PeerSide,
        bytes: usize,
    },
    Fill {
        target: u64,
        value: u8,
        bytes: usize,
    },
    Launch {
        kernel: Arc<Kernel>,
        grid: Grid,
        parameters: Vec<u8>,
    },
    Record(Arc<Mark>),
    Wait(Arc<Mark>),
}

/// Memory of a device.
pub(crate) struct PeerSide {
    pub(crate) device: &'static Device,
    pub(crate) address: u64,
}

/// A queue and its thread.
pub(crate) struct Stream {
    device: &'static Device,
    queue: Mutex<Queue>,
    filled: Condvar,
}

#[derive(Default)]
struct Queue {
    operations: VecDeque<Operation>,
    closed: bool,
}

impl Stream {
    /// A new one, owned by who asked until it is destroyed.
    pub(crate) fn start(device: &'static Device) -> Option<*mut c_void> {
        let stream = Arc::new(Stream {
            device,
            queue: Mutex::default(),
            filled: Condvar::new(),
        });
        let thread = std::thread::Builder::new().name("softgpu".to_owned()).spawn({
            let stream = Arc::clone(&stream);
            move || stream.run()
        });
        thread.ok()?;
        Some(Arc::into_raw(stream).cast_mut().cast())
    }

    /// 0 to 2 are the device's default stream by its several names.
    pub(crate) fn of<'a>(device: &'static Device, stream: *mut c_void) -> Option<&'a Stream> {
        if stream as usize <= 2 {
            return Stream::of(device, device.default_stream()?);
        }
        // SAFETY: made by `start` and not destroyed yet, as the caller of the C function promises.
        unsafe { stream.cast::<Stream>().as_ref() }
    }

    /// What is in its queue is still done.
    pub(crate) fn destroy(stream: *mut c_void) -> bool {
        if stream.is_null() {
            return false;
        }
        // SAFETY: made by `start`, and destroyed once, as the caller of the C function promises.
        let stream = unsafe { Arc::from_raw(stream.cast::<Stream>()) };
        stream.queue.lock().closed = true;
        stream.filled.notify_all();
        true
    }

    pub(crate) fn push(&self, operation: Operation) {
        self.queue.lock().operations.push_back(operation);
        self.filled.notify_all();
    }

    fn run(&self) {
        loop {
            let operation = {
                let mut queue = self.queue.lock();
                loop {
                    if let Some(operation) = queue.operations.pop_front() {
                        break operation;
                    }
                    if queue.closed {
                        return;
                    }
                    self.filled.wait(&mut queue);
                }
            };
            self.execute(operation);
        }
    }

    fn execute(&self, operation: Operation) {
        let delay = self.device.delay();
        match operation {
            Operation::Copy { target, source, bytes } => {
                std::thread::sleep(delay);
                if self.device.may_copy() {
                    // SAFETY: both ranges are allocated, registered or the caller's, as it promises until an event says that
                    // they are done with; they may overlap.
                    unsafe { std::ptr::copy(source as *const u8, target as *mut u8, bytes) };
                    self.device.leave(target, bytes);
                    self.device.leave(source, bytes);
                }
            }
            Operation::PeerCopy { target, source, bytes } => {
                std::thread::sleep(delay);
                if self.device.may_copy() {
                    // SAFETY: as for a copy within a device.
                    unsafe { std::ptr::copy(source.address as *const u8, target.address as *mut u8, bytes) };
                    target.device.leave(target.address, bytes);
                    source.device.leave(source.address, bytes);
                }
            }
            Operation::Launch {
                kernel,
                grid,
                parameters,
            } => {
                std::thread::sleep(delay);
                if self.device.may_copy() {
                    kernel.run(self.device, grid, &parameters);
                }
            }
            Operation::Fill { target, value, bytes } => {
                std::thread::sleep(delay);
                if !self.device.is_broken() {
                    // SAFETY: as for a copy.
                    unsafe { std::ptr::write_bytes(target as *mut u8, value, bytes) };
                    self.device.leave(target, bytes);
                }
            }
            Operation::Record(mark) => mark.happen(),
            Operation::Wait(mark) => mark.wait(),
        }
    }
}

/// One recording of an event.
#[derive(Default)]
pub(crate) struct Mark {
    happened: Mutex<bool>,
    changed: Condvar,
}

impl Mark {
    fn happen(&self) {
        *self.happened.lock() = true;
        self.changed.notify_all();
    }

    pub(crate) fn has_happened(&self) -> bool {
        *self.happened.lock()
    }

    pub(crate) fn wait(&self) {
        let mut happened = self.happened.lock();
        while !*happened {
            self.changed.wait(&mut happened);
        }
    }
}

/// An event: its last recording.
pub(crate) struct Event(Mutex<Arc<Mark>>);

impl Event {
    /// One that was not recorded, which counts as having happened.
    pub(crate) fn make(_: &'static Device) -> *mut c_void {
        let mark = Mark::default();
        mark.happen();
        let event = Event(Mutex::new(Arc::new(mark)));
        Box::into_raw(Box::new(event)).cast()
    }

    pub(crate) fn of<'a>(event: *mut c_void) -> Option<&'a Event> {
        // SAFETY: made by `make` and not destroyed yet, as the caller of the C function promises.
        unsafe { event.cast::<Event>().as_ref() }
    }

    pub(crate) fn destroy(event: *mut c_void) -> bool {
        if event.is_null() {
            return false;
        }
        // SAFETY: made by `make`, and destroyed once, as the caller of the C function promises.
        drop(unsafe { Box::from_raw(event.cast::<Event>()) });
        true
    }

    pub(crate) fn mark(&self) -> Arc<Mark> {
        Arc::clone(&self.0.lock())
    }

    pub(crate) fn record(&self) -> Arc<Mark> {
        let mark = Arc::new(Mark::default());
        *self.0.lock() = Arc::clone(&mark);
        mark
    }
}
