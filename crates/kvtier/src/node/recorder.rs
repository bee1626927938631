//! Makes names and generations durable, on a thread of its own: whoever waits for that holds no lock meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender};
use kvtier_core::{Completion, Failure, Generation, NamespaceId, OperationId, Realization, RealizationId};

use crate::keys::{Anchor, Change, Label, Realizations, RecordError, Register};

/// Jobs that share a sync at most.
const BATCH_MAX: usize = 1024;

/// Something to make durable, and whom to tell.
pub(crate) enum Job {
    Open {
        namespace: NamespaceId,
        label: Label,
        realization: (RealizationId, Realization),
        reply: Sender<Result<(), RecordError>>,
    },
    Raise {
        operation: OperationId,
        namespace: NamespaceId,
        generation: Generation,
    },
    Stop,
}

/// The register and the realizations, and the queue of what must go into them.
pub(crate) struct Recorder {
    pub(crate) register: Arc<Register>,
    pub(crate) realizations: Realizations,
    anchor: Option<Anchor>,
    /// The state directory had one, and none is named now.
    is_anchor_missing: bool,
    /// Unbounded, yet each connection waits for one at a time, and each namespace has one generation on its way.
    jobs: Sender<Job>,
    failing: AtomicBool,
}

impl Recorder {
    /// With what its thread must work on. The caller starts that.
    pub(crate) fn new(
        register: Arc<Register>,
        realizations: Realizations,
        anchor: Option<Anchor>,
        is_anchor_missing: bool,
    ) -> (Recorder, Receiver<Job>) {
        let (jobs, work) = crossbeam_channel::unbounded();
        let recorder = Recorder {
            register,
            realizations,
            anchor,
            is_anchor_missing,
            jobs,
            failing: AtomicBool::new(false),
        };
        (recorder, work)
    }

    /// Makes a namespace and a realization durable; `None` when they are. Call it under the lock under which the manager
    /// chose their ids: new ones are recorded in order.
    pub(crate) fn open(
        &self,
        namespace: NamespaceId,
        (domain, name): (&str, &str),
        realization: (RealizationId, Realization),
    ) -> Option<Receiver<Result<(), RecordError>>> {
        if self.register.contains(namespace) && self.realizations.contains(realization.0) {
            return None;
        }
        let (reply, answer) = crossbeam_channel::bounded(1);
        let label = Label {
            domain: domain.to_owned(),
            name: name.to_owned(),
        };
        // After the end nobody takes it, and whoever waits sees its other end go.
        let _ = self.jobs.send(Job::Open {
            namespace,
            label,
            realization,
            reply,
        });
        Some(answer)
    }

    /// Makes a generation durable; the answer comes from [`Recorder::run`].
    pub(crate) fn raise(&self, operation: OperationId, namespace: NamespaceId, generation: Generation) {
        let _ = self.jobs.send(Job::Raise {
            operation,
            namespace,
            generation,
        });
    }

    /// Whether something outside the state directory remembers generations.
    pub(crate) fn is_anchored(&self) -> bool {
        self.anchor.is_some()
    }

    /// Whether the state directory was served with an anchor before, and is not now.
    pub(crate) fn is_anchor_missing(&self) -> bool {
        self.is_anchor_missing
    }

    /// What the anchor remembers of a namespace; 0 without one.
    pub(crate) fn anchored_generation(&self, domain: &str, name: &str) -> u64 {
        let label = Label {
            domain: domain.to_owned(),
            name: name.to_owned(),
        };
        self.anchor.as_ref().map_or(0, |anchor| anchor.generation(&label))
    }

    /// What the next invalidation has to raise a namespace of this generation to; `None`: the next one will do. What the anchor
    /// knows was in force and acknowledged once: in force anew, it would be served, and an image of then could not be told
    /// from one of now.
    pub(crate) fn above_anchor(&self, domain: &str, name: &str, generation: Generation) -> Option<Generation> {
        let anchored = self.anchored_generation(domain, name);
        (generation.0 + 1 == anchored).then_some(Generation(anchored + 1))
    }

    /// Why a namespace of this generation is not served; `None`: it is.
    pub(crate) fn refusal(&self, domain: &str, name: &str, generation: Generation) -> Option<String> {
        let anchored = self.anchored_generation(domain, name);
        (generation.0 < anchored).then(|| {
            format!(
                "{domain}/{name} is at generation {}, the anchor knows {anchored}: the state directory is older than a purge; `kvctl namespace advance {domain}/{name}` serves it again, empty",
                generation.0
            )
        })
    }

    /// Ends [`Recorder::run`] once it has done what was asked before.
    pub(crate) fn stop(&self) {
        let _ = self.jobs.send(Job::Stop);
    }

    /// The recording thread. What came while it wrote shares the next sync.
    pub(crate) fn run(
        &self,
        jobs: &Receiver<Job>,
        answer: impl Fn(OperationId, (NamespaceId, Generation), Result<Completion, Failure>),
    ) {
        while let Ok(first) = jobs.recv() {
            let batch: Vec<Job> = std::iter::once(first)
                .chain(jobs.try_iter().take(BATCH_MAX - 1))
                .collect();
            let stop = batch.iter().any(|job| matches!(job, Job::Stop));
            self.record(batch, &answer);
            if jobs.is_empty() {
                // Nobody waits: now is the time to overwrite the older halves.
                self.note_outcome(self.register.settle().err().as_ref());
            }
            if stop {
                return;
            }
        }
    }

    fn record(
        &self,
        batch: Vec<Job>,
        answer: &impl Fn(OperationId, (NamespaceId, Generation), Result<Completion, Failure>),
    ) {
        let wanted: Vec<_> = batch
            .iter()
            .filter_map(|job| match job {
                Job::Open { realization, .. } => Some(*realization),
                _ => None,
            })
            .collect();
        let listed = self.realizations.append(&wanted);
        let changes: Vec<Change> = batch
            .iter()
            .filter_map(|job| match job {
                Job::Open { namespace, label, .. } => Some(Change::Open {
                    namespace: *namespace,
                    label: label.clone(),
                }),
                Job::Raise {
                    namespace, generation, ..
                } => Some(Change::Raise {
                    namespace: *namespace,
                    generation: *generation,
                }),
                Job::Stop => None,
            })
            .collect();
        let mut recorded = self.register.commit(&changes).into_iter();
        for job in batch {
            match job {
                Job::Stop => {}
                Job::Open { reply, .. } => {
                    let outcome = recorded.next().expect("an answer for each change").and(listed.clone());
                    self.note_outcome(outcome.as_ref().err());
                    // Whoever asked may have stopped waiting.
                    let _ = reply.try_send(outcome);
                }
                Job::Raise {
                    operation,
                    namespace,
                    generation,
                } => {
                    let outcome = recorded.next().expect("an answer for each change");
                    let outcome = outcome.and_then(|()| self.note_in_anchor(namespace, generation));
                    self.note_outcome(outcome.as_ref().err());
                    answer(
                        operation,
                        (namespace, generation),
                        match outcome {
                            Ok(()) => Ok(Completion::Done),
                            Err(_) => Err(Failure::Io),
                        },
                    );
                }
            }
        }
    }

    /// After the register: what is not durable there was never acknowledged.
    fn note_in_anchor(&self, namespace: NamespaceId, generation: Generation) -> Result<(), RecordError> {
        let (Some(anchor), Some(label)) = (&self.anchor, self.register.label(namespace)) else {
            return Ok(());
        };
        anchor
            .raise(&label, generation.0)
            .map_err(|error| RecordError::Io(Arc::new(std::io::Error::other(error.to_string()))))
    }

    /// Logs the first failure after a success: the rest is counted.
    fn note_outcome(&self, error: Option<&RecordError>) {
        let was_failing = self.failing.swap(error.is_some(), Ordering::Relaxed);
        if let Some(error) = error
            && !was_failing
        {
            tracing::error!(%error, "namespaces and generations cannot be made durable: free space in the state directory, or see dmesg");
        }
    }
}
