//! An engine that fails on purpose, for tests of what lies above it.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kvtier_transfer::memory::{MemoryRegion, MemorySlice, PAGE_BYTES};
use parking_lot::Mutex;

use super::{Direction, EngineError, NvmeEngine, Request};

/// What goes wrong with one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The device answers with this error number.
    Error(i32),
    /// The file ends before the request does.
    EndOfFile,
    /// This bit of what is read or written is wrong, and nobody says so.
    FlipBit(usize),
    /// Only the first half (whole pages) reaches the disk, and nobody says so. Writes only.
    Torn,
    /// The device takes this long before it begins.
    Delay(Duration),
    /// The device keeps the request until [`FaultyEngine::release`].
    Hold,
}

/// An engine around another one.
pub struct FaultyEngine {
    inner: Arc<dyn NvmeEngine>,
    script: Mutex<VecDeque<(Direction, Fault)>>,
    held: Mutex<Vec<Request>>,
}

impl FaultyEngine {
    /// Faultless until told otherwise.
    #[must_use]
    pub fn new(inner: Arc<dyn NvmeEngine>) -> Arc<FaultyEngine> {
        Arc::new(FaultyEngine {
            inner,
            script: Mutex::new(VecDeque::new()),
            held: Mutex::new(Vec::new()),
        })
    }

    /// The next request in this direction that has no fault yet gets this one.
    pub fn inject(&self, direction: Direction, fault: Fault) {
        self.script.lock().push_back((direction, fault));
    }

    /// How many requests are held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.lock().len()
    }

    /// Lets go of what is held.
    pub fn release(&self) {
        let held = std::mem::take(&mut *self.held.lock());
        for request in held {
            self.pass(request);
        }
    }

    fn pass(&self, request: Request) {
        if let Err(refused) = self.inner.submit(request) {
            refused.finish(Err(EngineError::Busy), false);
        }
    }

    fn fault(&self, direction: Direction) -> Option<Fault> {
        let mut script = self.script.lock();
        let position = script.iter().position(|(of, _)| *of == direction)?;
        script.remove(position).map(|(_, fault)| fault)
    }

    /// Writes `memory` in place of the request's own, which its owner gets back.
    fn write_instead(&self, request: Request, memory: MemorySlice) -> Result<(), Request> {
        let Request {
            memory: original, done, ..
        } = request;
        let done = Box::new(move |mut finished: super::Finished| {
            finished.memory = original;
            done(finished);
        });
        self.inner.submit(Request {
            memory,
            done,
            ..request
        })
    }
}

impl NvmeEngine for FaultyEngine {
    fn submit(&self, request: Request) -> Result<(), Request> {
        let Some(fault) = self.fault(request.direction) else {
            return self.inner.submit(request);
        };
        match fault {
            Fault::Error(number) => request.finish(Err(EngineError::Io(io::Error::from_raw_os_error(number))), false),
            Fault::EndOfFile => request.finish(Err(EngineError::EndOfFile), false),
            Fault::FlipBit(bit) => match request.direction {
                Direction::Read => {
                    let done = request.done;
                    let done = Box::new(move |finished: super::Finished| {
                        flip(&finished.memory, bit);
                        done(finished);
                    });
                    return self.inner.submit(Request { done, ..request });
                }
                Direction::Write => {
                    let damaged = copy_of(&request.memory);
                    flip(&damaged, bit);
                    return self.write_instead(request, damaged);
                }
            },
            Fault::Torn => {
                let half = (request.memory.len() / 2)
                    .next_multiple_of(PAGE_BYTES)
                    .min(request.memory.len());
                let first = request.memory.subslice(0, half).expect("a half lies in its whole");
                return self.write_instead(request, first);
            }
            Fault::Delay(delay) => {
                let inner = Arc::clone(&self.inner);
                thread::spawn(move || {
                    thread::sleep(delay);
                    if let Err(refused) = inner.submit(request) {
                        refused.finish(Err(EngineError::Busy), false);
                    }
                });
            }
            Fault::Hold => self.held.lock().push(request),
        }
        Ok(())
    }

    fn cancel_queued(&self) {
        self.inner.cancel_queued();
    }

    fn shutdown(&self) {
        self.release();
        self.inner.shutdown();
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }
}

fn copy_of(memory: &MemorySlice) -> MemorySlice {
    let region = MemoryRegion::anonymous(memory.len().next_multiple_of(PAGE_BYTES)).expect("memory for a copy");
    let copy = region.slice(0, memory.len()).expect("the region is as long");
    memory.copy_to(&copy).expect("equal lengths");
    copy
}

fn flip(memory: &MemorySlice, bit: usize) {
    let bit = bit % (memory.len() * 8);
    let byte = memory.subslice(bit / 8, 1).expect("a byte of it");
    let mut value = [0];
    byte.copy_to_slice(&mut value).expect("one byte");
    value[0] ^= 1 << (bit % 8);
    byte.copy_from_slice(&value).expect("one byte");
}
