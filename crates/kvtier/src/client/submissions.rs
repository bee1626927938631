use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use super::locks::{Condvar, Mutex};
use kvtier_core::{BlockHash, FetchScope, Realization};
use rustix::event::{EventfdFlags, eventfd};

use super::batch::{check_targets, copy_out};
use super::blocking::{Client, Namespace};
use super::session::Got;
use super::{ClientError, ClientOptions, ForeignSlice, GetOutcome};
use crate::ErrorKind;

/// Names a get among those of one [`Submissions`].
pub type Ticket = u64;

/// How many gets run beside each other, and how many there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubmissionOptions {
    /// Threads, each with a connection of its own. Default 2.
    pub threads: usize,
    /// Most gets that were submitted and not yet collected. Default 1,024.
    pub gets_max: usize,
}

impl Default for SubmissionOptions {
    fn default() -> Self {
        SubmissionOptions {
            threads: 2,
            gets_max: 1024,
        }
    }
}

/// A get that has ended. It hands back what it was given.
#[derive(Debug)]
pub struct Completion<T> {
    /// What [`Submissions::submit`] returned for it.
    pub ticket: Ticket,
    /// One outcome for each key, or why there is none.
    pub outcomes: Result<Vec<GetOutcome>, ClientError>,
    /// Its targets, which no thread touches any more.
    pub targets: Vec<T>,
}

/// Gets of one namespace on threads of their own: submitted here, announced by a descriptor, and collected.
///
/// Dropping it cancels what is not collected. Once the drop returns no thread touches or holds a target; it waits for no
/// node, only for copies that have begun.
pub struct Submissions<T: AsRef<ForeignSlice> + Send + 'static> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    options: ClientOptions,
    name: String,
    realization: Realization,
    gets_max: usize,
    event: OwnedFd,
    queue: Mutex<Queue<T>>,
    work: Condvar,
    process: u32,
}

struct Queue<T> {
    next: Ticket,
    waiting: VecDeque<Arc<Get<T>>>,
    /// Taken by a thread and not yet completed.
    running: HashMap<Ticket, Arc<Get<T>>>,
    completed: Vec<Completion<T>>,
    stopped: bool,
}

struct Get<T> {
    ticket: Ticket,
    hashes: Vec<BlockHash>,
    scope: FetchScope,
    /// Whoever copies holds the lock; `None` once they were taken back.
    targets: Mutex<Option<Vec<T>>>,
}

impl<T: AsRef<ForeignSlice> + Send + 'static> Submissions<T> {
    /// Starts the threads. Each connects when it has something to do.
    ///
    /// # Errors
    /// `Invalid` without a thread; `Unavailable` when there is no thread or descriptor to be had.
    pub fn start(
        client: ClientOptions,
        name: &str,
        realization: Realization,
        options: SubmissionOptions,
    ) -> Result<Submissions<T>, ClientError> {
        if options.threads == 0 || options.gets_max == 0 {
            return Err(ClientError::invalid("submissions need a thread and room for one get"));
        }
        let none =
            |what, error| ClientError::new(ErrorKind::Unavailable, format!("no {what} for submissions: {error}"));
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            options: client,
            name: name.to_owned(),
            realization,
            gets_max: options.gets_max,
            event: event.map_err(|error| none("descriptor", error.to_string()))?,
            queue: Mutex::new(Queue {
                next: 0,
                waiting: VecDeque::new(),
                running: HashMap::new(),
                completed: Vec::new(),
                stopped: false,
            }),
            work: Condvar::new(),
            process: std::process::id(),
        });
        // Dropped on an error, it stops the threads that were started.
        let submissions = Submissions { shared };
        for _ in 0..options.threads {
            let shared = Arc::clone(&submissions.shared);
            thread::Builder::new()
                .name("kvtier-gets".into())
                .spawn(move || shared.work())
                .map_err(|error| none("thread", error.to_string()))?;
        }
        Ok(submissions)
    }

    /// Readable while something is to be collected.
    #[must_use]
    pub fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    /// Begins a get, one target for each key. It says when it has ended through [`Submissions::event`].
    ///
    /// # Errors
    /// `Invalid` unless there are as many targets as keys; `Busy` when too many are uncollected; `Closed` after a fork.
    pub fn submit(&self, hashes: Vec<BlockHash>, targets: Vec<T>, scope: FetchScope) -> Result<Ticket, ClientError> {
        self.shared.check_process()?;
        check_targets(targets.len(), hashes.len())?;
        let mut queue = self.shared.queue.lock();
        let uncollected = queue.waiting.len() + queue.running.len() + queue.completed.len();
        if uncollected >= self.shared.gets_max {
            return Err(ClientError::new(
                ErrorKind::Busy,
                format!("{uncollected} gets are not collected yet: collect some first"),
            ));
        }
        let ticket = queue.next;
        queue.next += 1;
        queue.waiting.push_back(Arc::new(Get {
            ticket,
            hashes,
            scope,
            targets: Mutex::new(Some(targets)),
        }));
        drop(queue);
        self.shared.work.notify_one();
        Ok(ticket)
    }

    /// Everything that has ended since the last call, in the order of ending.
    ///
    /// # Errors
    /// `Closed` after a fork.
    pub fn completed(&self) -> Result<Vec<Completion<T>>, ClientError> {
        self.shared.check_process()?;
        let mut queue = self.shared.queue.lock();
        // Under the lock, as it is written: it is readable exactly while the list has something.
        let _ = rustix::io::read(&self.shared.event, &mut [0; 8]);
        Ok(std::mem::take(&mut queue.completed))
    }
}

impl<T: AsRef<ForeignSlice> + Send + 'static> Drop for Submissions<T> {
    fn drop(&mut self) {
        // In a forked child no thread runs, and one that does not exist there may hold a lock.
        if self.shared.check_process().is_err() {
            return;
        }
        let mut queue = self.shared.queue.lock();
        queue.stopped = true;
        let gets: Vec<Arc<Get<T>>> = queue.waiting.drain(..).collect();
        let running: Vec<Arc<Get<T>>> = queue.running.values().map(Arc::clone).collect();
        let completed = std::mem::take(&mut queue.completed);
        drop(queue);
        self.shared.work.notify_all();
        for get in gets.iter().chain(&running) {
            let targets = get.targets.lock().take();
            // Without the lock: to let go of them may take a lock of the caller's, such as the interpreter's.
            drop(targets);
        }
        drop(completed);
    }
}

impl<T: AsRef<ForeignSlice> + Send + 'static> Shared<T> {
    fn check_process(&self) -> Result<(), ClientError> {
        if std::process::id() == self.process {
            Ok(())
        } else {
            Err(ClientError::forked())
        }
    }

    /// One thread's life.
    fn work(&self) {
        let mut namespace = None;
        while let Some(get) = self.next() {
            let outcomes = self.get(&mut namespace, &get);
            self.complete(&get, outcomes);
        }
    }

    fn next(&self) -> Option<Arc<Get<T>>> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopped {
                return None;
            }
            if let Some(get) = queue.waiting.pop_front() {
                queue.running.insert(get.ticket, Arc::clone(&get));
                return Some(get);
            }
            self.work.wait(&mut queue);
        }
    }

    fn get(&self, connected: &mut Option<Namespace>, get: &Get<T>) -> Result<Vec<GetOutcome>, ClientError> {
        let namespace = match connected.take() {
            Some(namespace) => namespace,
            None => Client::connect(self.options.clone())?.namespace(&self.name, self.realization)?,
        };
        let namespace = connected.insert(namespace);
        namespace.fetch_with(&get.hashes, get.scope, |got| get.copy(got))?
    }

    fn complete(&self, get: &Get<T>, outcomes: Result<Vec<GetOutcome>, ClientError>) {
        let mut queue = self.queue.lock();
        // Nobody will collect it, and whoever stopped it takes its targets back.
        if queue.stopped {
            return;
        }
        queue.running.remove(&get.ticket);
        let Some(targets) = get.targets.lock().take() else {
            return;
        };
        queue.completed.push(Completion {
            ticket: get.ticket,
            outcomes,
            targets,
        });
        // It fails only when nobody has read it 2^64 - 2 times, and is readable then all the same.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

impl<T: AsRef<ForeignSlice>> Get<T> {
    fn copy(&self, got: &[Got]) -> Result<Vec<GetOutcome>, ClientError> {
        let targets = self.targets.lock();
        let Some(targets) = &*targets else {
            return Err(ClientError::closed("the get was cancelled"));
        };
        let copied = got.iter().zip(targets);
        copied
            .map(|(got, target)| copy_out(got, &mut target.as_ref()))
            .collect()
    }
}

impl<T: AsRef<ForeignSlice> + Send + 'static> std::fmt::Debug for Submissions<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Submissions")
            .field("namespace", &self.shared.name)
            .finish_non_exhaustive()
    }
}
