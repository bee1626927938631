use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvtier_core::{Completion, Event, Extent, Failure, OperationId, SegmentId};
use kvtier_storage::nvme::format::{ENTRY_BYTES, HEADER_BYTES, padded};
use kvtier_storage::nvme::{Found, NvmeSettings, NvmeTier, StorageAction};

use crate::BenchError;

/// No action takes this long on a device that works.
const PATIENCE: Duration = Duration::from_secs(120);

/// The tier under measurement, and what drives it: as in a node, whoever brings an answer submits what comes next.
pub(super) struct Stand {
    tier: Arc<NvmeTier>,
    directory: PathBuf,
    course: Arc<Mutex<Option<Course>>>,
    operations: u64,
    segments: u32,
}

/// A run of actions, so many at a time.
struct Course {
    action: Box<dyn FnMut(usize, OperationId) -> StorageAction + Send>,
    /// The operation of action 0.
    first: u64,
    count: usize,
    next: usize,
    under_way: usize,
    started: Vec<Instant>,
    times: Vec<Duration>,
    completions: Vec<Completion>,
    failure: Option<Failure>,
    ended: Sender<()>,
}

/// What became of a run of actions.
pub(super) struct Driven {
    /// How long each took.
    pub(super) times: Vec<Duration>,
    /// From the first submission to the last answer.
    pub(super) elapsed: Duration,
    /// What each was answered with.
    pub(super) completions: Vec<Completion>,
}

/// Records that one course wrote or will write, in the order of their numbers.
pub(super) struct Places {
    pub(super) extents: Vec<Extent>,
    pub(super) segments: Vec<SegmentId>,
}

impl Course {
    fn submit_next(&mut self) -> Option<StorageAction> {
        if self.failure.is_some() || self.next == self.count {
            return None;
        }
        let index = self.next;
        self.next += 1;
        self.under_way += 1;
        let action = (self.action)(index, OperationId(self.first + index as u64));
        self.started[index] = Instant::now();
        Some(action)
    }

    /// The next action, if there is one.
    fn answered(&mut self, event: Event) -> Option<StorageAction> {
        let now = Instant::now();
        let index = event.operation.0.checked_sub(self.first).map(|index| index as usize)?;
        self.under_way -= 1;
        self.times[index] = now - self.started[index];
        match event.outcome {
            Ok(completion) => self.completions[index] = completion,
            Err(failure) => self.failure = Some(failure),
        }
        let next = self.submit_next();
        if self.under_way == 0 {
            // Nobody waits any more only when the harness gave up.
            let _ = self.ended.send(());
        }
        next
    }
}

impl Stand {
    /// A tier, and what it found in its directory.
    pub(super) fn open(settings: NvmeSettings) -> Result<(Stand, Found), BenchError> {
        let directory = settings.directory.clone();
        let course: Arc<Mutex<Option<Course>>> = Arc::new(Mutex::new(None));
        let opened: Arc<OnceLock<Weak<NvmeTier>>> = Arc::new(OnceLock::new());
        let events = {
            let (course, opened) = (Arc::clone(&course), Arc::clone(&opened));
            move |event| {
                let next = course
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .as_mut()
                    .and_then(|course| course.answered(event));
                if let Some(action) = next
                    && let Some(tier) = opened.get().and_then(Weak::upgrade)
                {
                    tier.submit(action);
                }
            }
        };
        let (tier, found) = NvmeTier::open(settings, Arc::new(events)).map_err(|error| BenchError::Storage {
            what: "the tier does not open",
            message: error.to_string(),
        })?;
        let tier = Arc::new(tier);
        let _ = opened.set(Arc::downgrade(&tier));
        let stand = Stand {
            tier,
            directory,
            course,
            operations: 0,
            segments: 0,
        };
        Ok((stand, found))
    }

    pub(super) fn tier(&self) -> &NvmeTier {
        &self.tier
    }

    /// Where the product keeps a segment.
    pub(super) fn segment_path(&self, segment: SegmentId) -> PathBuf {
        segment_path(&self.directory, segment)
    }

    /// Carries out `count` actions, `depth` at a time. With a depth of one the calling thread waits for each answer and
    /// submits the next; else the thread that brings an answer does.
    pub(super) fn drive(
        &mut self,
        what: &'static str,
        depth: usize,
        count: usize,
        mut action: impl FnMut(usize, OperationId) -> StorageAction + Send + 'static,
    ) -> Result<Driven, BenchError> {
        if depth > 1 || count <= 1 {
            return self.run(what, depth, count, Box::new(action));
        }
        let mut driven = Driven {
            times: Vec::with_capacity(count),
            elapsed: Duration::ZERO,
            completions: Vec::with_capacity(count),
        };
        let (ended, end) = channel();
        let started = Instant::now();
        for index in 0..count {
            let first = self.operations;
            self.operations += 1;
            let next = action(index, OperationId(first));
            let submitted = Instant::now();
            self.begin(
                Course::new(first, 1, ended.clone(), Box::new(move |_, _| next.clone())),
                1,
            );
            self.wait(what, &end)?;
            driven.times.push(submitted.elapsed());
            driven.completions.extend(self.end(what)?.completions);
        }
        driven.elapsed = started.elapsed();
        Ok(driven)
    }

    fn run(
        &mut self,
        what: &'static str,
        depth: usize,
        count: usize,
        action: Box<dyn FnMut(usize, OperationId) -> StorageAction + Send>,
    ) -> Result<Driven, BenchError> {
        let (ended, end) = channel();
        let first = self.operations;
        self.operations += count as u64;
        let started = Instant::now();
        if count > 0 {
            self.begin(Course::new(first, count, ended, action), depth);
            self.wait(what, &end)?;
        }
        let elapsed = started.elapsed();
        if count == 0 {
            return Ok(Driven {
                times: Vec::new(),
                elapsed,
                completions: Vec::new(),
            });
        }
        let course = self.end(what)?;
        Ok(Driven {
            times: course.times,
            elapsed,
            completions: course.completions,
        })
    }

    /// Submits the first `depth` actions.
    fn begin(&self, course: Course, depth: usize) {
        *self.lock() = Some(course);
        for _ in 0..depth {
            let next = self.lock().as_mut().and_then(Course::submit_next);
            match next {
                Some(action) => self.tier.submit(action),
                None => return,
            }
        }
    }

    fn wait(&self, what: &'static str, end: &Receiver<()>) -> Result<(), BenchError> {
        end.recv_timeout(PATIENCE).map_err(|_| BenchError::Storage {
            what,
            message: format!("no answer within {} s", PATIENCE.as_secs()),
        })
    }

    fn end(&self, what: &'static str) -> Result<Course, BenchError> {
        let course = self.lock().take().expect("a course was begun");
        match course.failure {
            Some(failure) => Err(BenchError::Storage {
                what,
                message: format!("{failure:?}; see the log, and the free space of the file system"),
            }),
            None => Ok(course),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Course>> {
        self.course.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes segments of at most `segment_bytes` for `count` records of `bytes`, and says where each record goes.
    pub(super) fn make_room(&mut self, count: usize, bytes: u32, segment_bytes: u64) -> Result<Places, BenchError> {
        let each = padded(u64::from(bytes)) + ENTRY_BYTES;
        let fit = usize::try_from((segment_bytes - HEADER_BYTES) / each)
            .unwrap_or(usize::MAX)
            .max(1);
        let segment_bytes = segment_bytes.max(HEADER_BYTES + each);
        let mut places = Places {
            extents: Vec::with_capacity(count),
            segments: Vec::new(),
        };
        while places.extents.len() < count {
            self.segments += 1;
            let segment = SegmentId(self.segments);
            places.segments.push(segment);
            let records = fit.min(count - places.extents.len()) as u64;
            places.extents.extend((0..records).map(|record| Extent {
                segment,
                offset: HEADER_BYTES + record * padded(u64::from(bytes)),
                length: bytes,
            }));
        }
        let segments = places.segments.clone();
        self.drive("open a segment", 1, segments.len(), move |index, operation| {
            StorageAction::Open {
                operation,
                segment: segments[index],
                bytes: segment_bytes.next_multiple_of(4096),
            }
        })?;
        Ok(places)
    }

    /// Writes the indexes of segments, and all of them to where a power cut does not reach.
    pub(super) fn seal(&mut self, places: &Places) -> Result<(), BenchError> {
        let segments = places.segments.clone();
        self.drive("seal a segment", 1, segments.len(), move |index, operation| {
            StorageAction::Seal {
                operation,
                segment: segments[index],
            }
        })?;
        self.drive("sync", 1, 1, |_, operation| StorageAction::Sync { operation })?;
        Ok(())
    }

    /// Removes segments.
    pub(super) fn close(&mut self, places: Places) -> Result<(), BenchError> {
        let segments = places.segments;
        self.drive("close a segment", 1, segments.len(), move |index, operation| {
            StorageAction::Close {
                operation,
                segment: segments[index],
            }
        })?;
        Ok(())
    }
}

impl Drop for Stand {
    /// The tier ends here and not on one of its own threads.
    fn drop(&mut self) {
        self.tier.shutdown();
    }
}

impl Course {
    fn new(
        first: u64,
        count: usize,
        ended: Sender<()>,
        action: Box<dyn FnMut(usize, OperationId) -> StorageAction + Send>,
    ) -> Course {
        let now = Instant::now();
        Course {
            action,
            first,
            count,
            next: 0,
            under_way: 0,
            started: vec![now; count],
            times: vec![Duration::ZERO; count],
            completions: vec![Completion::Done; count],
            failure: None,
            ended,
        }
    }
}

fn segment_path(directory: &Path, segment: SegmentId) -> PathBuf {
    directory.join(format!("segment-{:08x}.kvs", segment.0))
}
