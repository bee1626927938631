use std::sync::Arc;
use std::time::Instant;

use kvtier_core::{Completion, Extent, Failure, RecordLabel};
use kvtier_transfer::memory::{MemorySlice, PAGE_BYTES};

use super::super::bounce::Bounce;
use super::super::engine::{Direction, EngineError, Finished, Priority, Request};
use super::super::format::{self, Entry};
use super::super::segment::{Segment, Writing};
use super::{Inner, Ticket, add};

/// Up to this size a checksum costs less than waking another thread.
const CHECK_HERE_BYTES: usize = 16 << 10;

/// A record to be written: its place, its name, and the promise that its segment is not sealed meanwhile.
struct Record {
    writing: Writing,
    place: Extent,
    fingerprint: [u8; 16],
    label: RecordLabel,
}

impl Record {
    fn commit(&self, checksum: u32) {
        self.writing.commit(Entry {
            fingerprint: self.fingerprint,
            tag: [0; 16],
            generation: self.label.generation.0,
            offset: self.place.offset,
            length: self.place.length,
            checksum,
            namespace: self.label.namespace.0,
        });
    }
}

impl Inner {
    pub(super) fn demote(self: &Arc<Self>, ticket: Ticket, source: MemorySlice, target: Extent, label: RecordLabel) {
        let Some(record) = self
            .record(target, label)
            .filter(|_| source.len() == target.length as usize)
        else {
            return self.refuse(ticket, "demote to an extent that cannot be");
        };
        match own_pages(&source) {
            Some(memory) if source.is_writable() || memory.len() == source.len() => {
                if memory.len() > source.len() {
                    // What an earlier owner of the slot left there must not reach the disk.
                    memory
                        .subslice(source.len(), memory.len() - source.len())
                        .expect("the tail of the last page")
                        .zero();
                }
                self.write_with_checksum(ticket, record, memory, None);
            }
            _ => {
                let bytes = padded(source.len());
                let then = move |inner: &Arc<Inner>, ticket: Ticket, bounce: Bounce| {
                    let memory = bounce.slice().clone();
                    memory.zero();
                    let payload = memory.subslice(0, source.len()).expect("padding only adds");
                    source.copy_to(&payload).expect("equal lengths");
                    inner.write_with_checksum(ticket, record, memory, Some(bounce));
                };
                self.with_bounce(ticket, bytes, Box::new(then));
            }
        }
    }

    pub(super) fn promote(self: &Arc<Self>, ticket: Ticket, source: Extent, target: MemorySlice, checksum: u32) {
        let Some(segment) = self
            .readable(source)
            .filter(|_| target.len() == source.length as usize && target.is_writable())
        else {
            return self.refuse(ticket, "promote from an extent that cannot be");
        };
        match own_pages(&target) {
            Some(memory) => self.read(
                ticket,
                &segment,
                source,
                memory,
                Priority::Foreground,
                move |inner, ticket, memory, idle| {
                    inner.check(memory.len(), idle, move |inner| {
                        let verified = inner.verified(&memory, source.length, checksum);
                        drop(memory);
                        inner.promoted(ticket, source, verified);
                    });
                },
            ),
            None => {
                let then = move |inner: &Arc<Inner>, ticket: Ticket, bounce: Bounce| {
                    let memory = bounce.slice().clone();
                    inner.read(
                        ticket,
                        &segment,
                        source,
                        memory,
                        Priority::Foreground,
                        move |inner, ticket, memory, idle| {
                            inner.check(memory.len(), idle, move |inner| {
                                let verified = inner.verified(&memory, source.length, checksum);
                                let payload = memory.subslice(0, target.len()).expect("padding only adds");
                                // Zeroes, if the check failed.
                                payload.copy_to(&target).expect("equal lengths");
                                drop((memory, payload, target, bounce));
                                inner.promoted(ticket, source, verified);
                            });
                        },
                    );
                };
                self.with_bounce(ticket, padded(source.length as usize), Box::new(then));
            }
        }
    }

    /// The ticket goes last: once it is answered, nothing here holds the caller's memory.
    fn promoted(&self, ticket: Ticket, source: Extent, verified: bool) {
        if verified {
            add(&self.counters.read_bytes, u64::from(source.length));
        }
        ticket.answer(if verified {
            Ok(Completion::Done)
        } else {
            Err(Failure::Corrupt)
        });
    }

    pub(super) fn relocate(
        self: &Arc<Self>,
        ticket: Ticket,
        source: Extent,
        target: Extent,
        checksum: u32,
        label: RecordLabel,
    ) {
        let from = self.readable(source).filter(|_| source.length == target.length);
        let (Some(segment), Some(record)) = (from, self.record(target, label)) else {
            return self.refuse(ticket, "relocate between extents that cannot be");
        };
        let then = move |inner: &Arc<Inner>, ticket: Ticket, bounce: Bounce| {
            let memory = bounce.slice().clone();
            inner.read(
                ticket,
                &segment,
                source,
                memory,
                Priority::Background,
                move |inner, ticket, memory, idle| {
                    inner.check(memory.len(), idle, move |inner| {
                        if !inner.verified(&memory, source.length, checksum) {
                            drop((memory, bounce, record));
                            return ticket.answer(Err(Failure::Corrupt));
                        }
                        zero_tail(&memory, source.length as usize);
                        add(&inner.counters.relocated_bytes, u64::from(source.length));
                        inner.write(ticket, record, memory, Some(bounce), checksum, Completion::Done);
                    });
                },
            );
        };
        self.with_bounce(ticket, padded(source.length as usize), Box::new(then));
    }

    fn record(&self, place: Extent, label: RecordLabel) -> Option<Record> {
        let segment = self.readable(place)?;
        let fingerprint = self.fingerprints.of(label.namespace, label.realization, label.hash);
        Some(Record {
            writing: segment.begin_write()?,
            place,
            fingerprint,
            label,
        })
    }

    /// The segment of an extent, if it is open and the extent may lie in it.
    fn readable(&self, extent: Extent) -> Option<Arc<Segment>> {
        self.segment(extent.segment)
            .filter(|segment| format::is_payload_range(segment.bytes, extent.offset, extent.length))
    }

    /// Runs `work` here when that is cheap or delays nobody, else on the second thread.
    fn check(self: &Arc<Self>, bytes: usize, idle: bool, work: impl FnOnce(&Arc<Inner>) + Send + 'static) {
        if idle || bytes <= CHECK_HERE_BYTES {
            return work(self);
        }
        let inner = Arc::clone(self);
        self.later(move || work(&inner));
    }

    /// Whether the payload is what was written. If not, its memory holds zeroes now.
    fn verified(&self, memory: &MemorySlice, length: u32, checksum: u32) -> bool {
        let payload = memory.subslice(0, length as usize).expect("padding only adds");
        let verified = payload.crc32c() == checksum;
        if !verified {
            memory.zero();
        }
        verified
    }

    fn write_with_checksum(
        self: &Arc<Self>,
        ticket: Ticket,
        record: Record,
        memory: MemorySlice,
        bounce: Option<Bounce>,
    ) {
        self.check(memory.len(), false, move |inner| {
            let length = record.place.length;
            let checksum = memory.subslice(0, length as usize).expect("padding only adds").crc32c();
            inner.write(
                ticket,
                record,
                memory,
                bounce,
                checksum,
                Completion::Written { checksum },
            );
        });
    }

    fn write(
        self: &Arc<Self>,
        ticket: Ticket,
        record: Record,
        memory: MemorySlice,
        bounce: Option<Bounce>,
        checksum: u32,
        completion: Completion,
    ) {
        if ticket.is_cancelled() {
            drop((record, memory, bounce));
            return ticket.answer(Err(Failure::Deadline));
        }
        let inner = Arc::clone(self);
        let file = Arc::clone(&record.writing.segment().file);
        let offset = record.place.offset;
        let done = move |finished: Finished| {
            let bytes = finished.memory.len() as u64;
            drop((finished.memory, bounce));
            match finished.outcome {
                Ok(()) => {
                    record.commit(checksum);
                    inner.count_device_write(bytes);
                    if matches!(completion, Completion::Written { .. }) {
                        add(&inner.counters.written_bytes, u64::from(record.place.length));
                    }
                    ticket.answer(Ok(completion));
                    // Only now may the segment be sealed.
                    drop(record);
                }
                Err(error) => {
                    drop(record);
                    inner.fail(ticket, "write a record", error);
                }
            }
        };
        self.submit(Request {
            direction: Direction::Write,
            priority: Priority::Background,
            file,
            offset,
            memory,
            deadline: Some(Instant::now() + self.settings.request_deadline),
            done: Box::new(done),
        });
    }

    /// Reads a record's pages, then runs `then` with the memory and whether the engine is idle. A failed read leaves
    /// zeroes.
    fn read(
        self: &Arc<Self>,
        ticket: Ticket,
        segment: &Arc<Segment>,
        source: Extent,
        memory: MemorySlice,
        priority: Priority,
        then: impl FnOnce(&Arc<Inner>, Ticket, MemorySlice, bool) + Send + 'static,
    ) {
        let inner = Arc::clone(self);
        let done = move |finished: Finished| match finished.outcome {
            Ok(()) => then(&inner, ticket, finished.memory, finished.idle),
            Err(error) => {
                finished.memory.zero();
                drop((finished.memory, then));
                inner.fail(ticket, "read a record", error);
            }
        };
        self.submit(Request {
            direction: Direction::Read,
            priority,
            file: Arc::clone(&segment.file),
            offset: source.offset,
            memory,
            deadline: Some(Instant::now() + self.settings.request_deadline),
            done: Box::new(done),
        });
    }

    fn submit(&self, request: Request) {
        if let Err(refused) = self.engine.submit(request) {
            refused.finish(Err(EngineError::Busy), false);
        }
    }
}

/// The slice up to the end of its last page, if it starts on one: such slices own that page.
fn own_pages(slice: &MemorySlice) -> Option<MemorySlice> {
    if !slice.offset().is_multiple_of(PAGE_BYTES) {
        return None;
    }
    slice.with_length(padded(slice.len())).ok()
}

fn zero_tail(memory: &MemorySlice, length: usize) {
    memory
        .subslice(length, memory.len() - length)
        .expect("padding only adds")
        .zero();
}

fn padded(length: usize) -> usize {
    length.next_multiple_of(PAGE_BYTES)
}
