use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use kvtier_core::{Completion, Extent, Failure, RecordLabel};
use kvtier_transfer::memory::{MemorySlice, Opening, PAGE_BYTES};
use parking_lot::Mutex;

use super::super::bounce::Bounce;
use super::super::engine::{Arrived, Direction, EngineError, Finished, Priority, Request};
use super::super::format::{self, Encryption, Entry, Name};
use super::super::sealing::RecordCipher;
use super::super::segment::{Segment, Writing};
use super::{Inner, Ticket, add};

/// Up to this size a checksum costs less than waking another thread.
const CHECK_HERE_BYTES: usize = 16 << 10;

/// A record to be written: its place, its name, the keys for it, and the promise that its segment is not sealed
/// meanwhile.
struct Record {
    writing: Writing,
    place: Extent,
    label: RecordLabel,
    cipher: Arc<RecordCipher>,
}

/// A payload as it goes to the device.
struct Payload {
    /// Whole pages.
    memory: MemorySlice,
    bounce: Option<Bounce>,
    /// CRC32C of the plaintext.
    checksum: u32,
    tag: [u8; 16],
}

impl Record {
    fn commit(&self, checksum: u32, tag: [u8; 16]) {
        let entry = Entry {
            version: format::VERSION,
            tag,
            generation: self.label.generation.0,
            namespace: self.label.namespace.0,
            offset: self.place.offset,
            length: self.place.length,
            name: [0; format::NAME_BYTES],
            name_tag: [0; 16],
        };
        let name = Name {
            hash: self.label.hash,
            parent: self.label.parent,
            realization: self.label.realization.0,
            tokens: self.label.tokens,
            checksum,
            labels: self.label.labels,
        };
        let segment = self.writing.segment();
        self.writing.commit(&self.cipher.seal_name(entry, segment.id.0, &name));
    }

    fn is_sealed(&self) -> bool {
        self.writing.segment().encryption() == Encryption::Aes256Gcm
    }
}

impl Inner {
    pub(super) fn demote(self: &Arc<Self>, ticket: Ticket, source: MemorySlice, target: Extent, label: RecordLabel) {
        let record = match self.record(target, label) {
            Ok(record) if source.len() == target.length as usize => record,
            Ok(_) | Err(Failure::Io) => return self.refuse(ticket, "demote to an extent that cannot be"),
            Err(failure) => return ticket.answer(Err(failure)),
        };
        let own = if record.is_sealed() { None } else { own_pages(&source) };
        match own {
            Some(memory) if source.is_writable() || memory.len() == source.len() => {
                // What an earlier owner of the slot left there must not reach the disk.
                if memory.len() > source.len() {
                    zero_tail(&memory, source.len());
                }
                self.check(memory.len(), false, move |inner| {
                    let payload = Payload {
                        checksum: source.crc32c(),
                        tag: [0; 16],
                        memory,
                        bounce: None,
                    };
                    drop(source);
                    inner.write(ticket, record, payload, Written::Demoted);
                });
            }
            _ => {
                let then = move |inner: &Arc<Inner>, ticket: Ticket, bounce: Bounce| {
                    inner.check(source.len(), false, move |inner| {
                        let payload = record.bounced(&source, bounce, None);
                        drop(source);
                        inner.write(ticket, record, payload, Written::Demoted);
                    });
                };
                self.with_bounce(
                    ticket,
                    padded(target.length as usize),
                    Priority::Background,
                    Box::new(then),
                );
            }
        }
    }

    pub(super) fn promote(
        self: &Arc<Self>,
        ticket: Ticket,
        source: Extent,
        target: MemorySlice,
        checksum: u32,
        label: RecordLabel,
    ) {
        let Some(stored) = self
            .readable(source)
            .filter(|_| target.len() == source.length as usize && target.is_writable())
        else {
            return self.refuse(ticket, "promote from an extent that cannot be");
        };
        let Some(stored) = self.stored(stored, source, checksum, label) else {
            target.zero();
            return self.promoted(ticket, source, false);
        };
        let own = if stored.seal.is_some() {
            None
        } else {
            own_pages(&target)
        };
        match own {
            Some(memory) => self.promote_through(ticket, stored, memory, target, None),
            None => {
                let then = move |inner: &Arc<Inner>, ticket: Ticket, bounce: Bounce| {
                    let memory = bounce.slice().clone();
                    inner.promote_through(ticket, stored, memory, target, Some(bounce));
                };
                self.with_bounce(
                    ticket,
                    padded(source.length as usize),
                    Priority::Foreground,
                    Box::new(then),
                );
            }
        }
    }

    /// Reads a record's pages to `memory`, and from there, checked piece by piece as they arrive, to `target`, which may
    /// be the same memory.
    fn promote_through(
        self: &Arc<Self>,
        ticket: Ticket,
        stored: Stored,
        memory: MemorySlice,
        target: MemorySlice,
        bounce: Option<Bounce>,
    ) {
        let source = stored.place;
        let segment = Arc::clone(&stored.segment);
        let checking = Arc::new(Mutex::new(Checking::begin(stored, &memory, target.clone())));
        let arrived = {
            let checking = Arc::clone(&checking);
            Box::new(move |front: usize| checking.lock().advance(front))
        };
        self.read(
            ticket,
            (&segment, source),
            memory,
            target,
            (Priority::Foreground, Some(arrived)),
            move |inner, ticket, memory, idle| {
                let left = checking.lock().left();
                inner.check(left, idle, move |inner| {
                    let verified = checking.lock().finish();
                    drop((memory, checking));
                    drop(bounce);
                    inner.promoted(ticket, source, verified);
                });
            },
        );
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
        let stored = self
            .readable(source)
            .filter(|_| source.length == target.length)
            .ok_or(Failure::Io)
            .and_then(|segment| self.stored(segment, source, checksum, label).ok_or(Failure::Corrupt));
        let (stored, record) = match (stored, self.record(target, label)) {
            (Ok(stored), Ok(record)) => (stored, record),
            (Err(Failure::Io), _) | (_, Err(Failure::Io)) => {
                return self.refuse(ticket, "relocate between extents that cannot be");
            }
            (Err(failure), _) | (_, Err(failure)) => return ticket.answer(Err(failure)),
        };
        let then = move |inner: &Arc<Inner>, ticket: Ticket, bounce: Bounce| {
            let memory = bounce.slice().clone();
            let segment = Arc::clone(&stored.segment);
            inner.read(
                ticket,
                (&segment, source),
                memory.clone(),
                memory,
                (Priority::Background, None),
                move |inner, ticket, memory, idle| {
                    inner.check(memory.len(), idle, move |inner| {
                        let plain = memory.subslice(0, source.length as usize).expect("padding only adds");
                        drop(memory);
                        // Opened in place and sealed again in place, for its new one.
                        if !Checking::begin(stored, &plain, plain.clone()).finish() {
                            drop((plain, bounce, record));
                            return ticket.answer(Err(Failure::Corrupt));
                        }
                        let payload = record.bounced(&plain, bounce, Some(checksum));
                        drop(plain);
                        inner.write(ticket, record, payload, Written::Relocated);
                    });
                },
            );
        };
        self.with_bounce(
            ticket,
            padded(source.length as usize),
            Priority::Background,
            Box::new(then),
        );
    }

    fn record(&self, place: Extent, label: RecordLabel) -> Result<Record, Failure> {
        let segment = self.readable(place).ok_or(Failure::Io)?;
        // A generation that was just raised has no key before it is durable: the block can be written then.
        let cipher = segment
            .cipher(&*self.settings.keys, label.namespace, label.generation)
            .ok_or(Failure::Busy)?;
        Ok(Record {
            writing: segment.begin_write(place.offset).ok_or(Failure::Io)?,
            place,
            label,
            cipher,
        })
    }

    /// A record as it lies on the device; `None` where it can no longer be opened.
    fn stored(&self, segment: Arc<Segment>, place: Extent, checksum: u32, label: RecordLabel) -> Option<Stored> {
        let seal = match segment.encryption() {
            Encryption::None => None,
            Encryption::Aes256Gcm => {
                let cipher = segment.cipher(&*self.settings.keys, label.namespace, label.generation)?;
                Some((cipher, segment.tag(place.offset)?))
            }
        };
        Some(Stored {
            segment,
            place,
            checksum,
            label,
            seal,
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

    fn write(self: &Arc<Self>, ticket: Ticket, record: Record, payload: Payload, written: Written) {
        let Payload {
            memory,
            bounce,
            checksum,
            tag,
        } = payload;
        if ticket.is_cancelled() {
            drop((record, memory, bounce));
            return ticket.answer(Err(Failure::Deadline));
        }
        let inner = Arc::clone(self);
        let file = Arc::clone(&record.writing.segment().file);
        let offset = record.writing.segment().base + record.place.offset;
        let done = move |finished: Finished| {
            let bytes = finished.memory.len() as u64;
            drop((finished.memory, bounce));
            match finished.outcome {
                Ok(()) => {
                    record.commit(checksum, tag);
                    inner.count_device_write(bytes);
                    let length = u64::from(record.place.length);
                    let completion = match written {
                        Written::Demoted => {
                            add(&inner.counters.written_bytes, length);
                            Completion::Written { checksum }
                        }
                        Written::Relocated => {
                            add(&inner.counters.relocated_bytes, length);
                            inner.relocated.store(true, Ordering::Release);
                            Completion::Done
                        }
                    };
                    inner.written();
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
            arrived: None,
            done: Box::new(done),
        });
    }

    /// Reads a record's pages to `memory`, then runs `then` with it and whether the engine is idle. A failed read leaves
    /// zeroes in `target`, where the payload was to go.
    fn read(
        self: &Arc<Self>,
        ticket: Ticket,
        (segment, source): (&Arc<Segment>, Extent),
        memory: MemorySlice,
        target: MemorySlice,
        (priority, arrived): (Priority, Option<Arrived>),
        then: impl FnOnce(&Arc<Inner>, Ticket, MemorySlice, bool) + Send + 'static,
    ) {
        let inner = Arc::clone(self);
        let done = move |finished: Finished| match finished.outcome {
            Ok(()) => {
                drop(target);
                then(&inner, ticket, finished.memory, finished.idle);
            }
            Err(error) => {
                // Also the pages around it: what the device left there was never checked.
                finished.memory.zero();
                target.zero();
                drop((finished.memory, target, then));
                inner.fail(ticket, "read a record", error);
            }
        };
        self.submit(Request {
            direction: Direction::Read,
            priority,
            file: Arc::clone(&segment.file),
            offset: segment.base + source.offset,
            memory,
            deadline: Some(Instant::now() + self.settings.request_deadline),
            arrived,
            done: Box::new(done),
        });
    }

    fn submit(&self, request: Request) {
        if let Err(refused) = self.engine.submit(request) {
            refused.finish(Err(EngineError::Busy), false);
        }
    }
}

/// What a write was for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Written {
    Demoted,
    Relocated,
}

impl Record {
    /// The payload in bounce memory, sealed if this segment's are. `source` may be that memory.
    fn bounced(&self, source: &MemorySlice, bounce: Bounce, checksum: Option<u32>) -> Payload {
        let memory = bounce.slice().clone();
        let body = memory.subslice(0, source.len()).expect("padding only adds");
        let checksum = checksum.unwrap_or_else(|| source.crc32c());
        let tag = if self.is_sealed() {
            self.cipher.seal(&self.place, &self.label, source, &body)
        } else {
            source.copy_to(&body).expect("equal lengths");
            [0; 16]
        };
        zero_tail(&memory, source.len());
        Payload {
            memory,
            bounce: Some(bounce),
            checksum,
            tag,
        }
    }
}

/// A record on the device, and what it takes to trust its bytes.
struct Stored {
    segment: Arc<Segment>,
    place: Extent,
    checksum: u32,
    label: RecordLabel,
    seal: Option<(Arc<RecordCipher>, [u8; 16])>,
}

/// The check of a record whose bytes arrive from the front, and their way into the target.
///
/// Until [`Checking::finish`] has said yes the target is not to be looked at.
struct Checking {
    /// What the device fills, whole pages of it.
    memory: MemorySlice,
    /// The payload in there.
    body: MemorySlice,
    target: MemorySlice,
    /// Bytes from the front that went through the check.
    done: usize,
    pass: Pass,
}

enum Pass {
    Sum {
        so_far: u32,
        expected: u32,
    },
    /// `None` once it has ended.
    Open {
        opening: Option<Opening>,
        tag: [u8; 16],
    },
}

impl Checking {
    fn begin(stored: Stored, memory: &MemorySlice, target: MemorySlice) -> Checking {
        let pass = match stored.seal {
            Some((cipher, tag)) => Pass::Open {
                opening: Some(cipher.opening(&stored.place, &stored.label)),
                tag,
            },
            None => Pass::Sum {
                so_far: 0,
                expected: stored.checksum,
            },
        };
        Checking {
            memory: memory.clone(),
            body: memory
                .subslice(0, stored.place.length as usize)
                .expect("padding only adds"),
            target,
            done: 0,
            pass,
        }
    }

    fn left(&self) -> usize {
        self.body.len() - self.done
    }

    /// Takes the bytes before `front`, which are not written any more, through the check.
    fn advance(&mut self, front: usize) {
        let front = front.min(self.body.len());
        if front <= self.done {
            return;
        }
        let part = |of: &MemorySlice| of.subslice(self.done, front - self.done).expect("inside the payload");
        match &mut self.pass {
            Pass::Sum { so_far, .. } => *so_far = part(&self.body).crc32c_after(*so_far),
            Pass::Open { opening, .. } => {
                if let Some(opening) = opening {
                    opening.decrypt(&part(&self.body), &part(&self.target));
                }
            }
        }
        self.done = front;
    }

    /// Everything has arrived. False: it is not what was written, and the target holds zeroes.
    fn finish(&mut self) -> bool {
        self.advance(self.body.len());
        match &mut self.pass {
            Pass::Sum { so_far, expected } => {
                let verified = so_far == expected;
                if !verified {
                    self.memory.zero();
                    self.target.zero();
                } else if self.body.as_ptr() != self.target.as_ptr() {
                    self.body.copy_to(&self.target).expect("equal lengths");
                }
                verified
            }
            Pass::Open { opening, tag } => {
                let verified = opening.take().is_some_and(|opening| opening.finish(tag).is_ok());
                if !verified {
                    self.target.zero();
                }
                verified
            }
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
