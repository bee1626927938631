//! The client for threads that may block.
//!
//! One connection, one request at a time: a second thread that calls waits for the first. Threads that should not wait
//! for each other connect each for itself.

mod device;
mod keeper;
mod line;
mod namespace;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::locks::{Condvar, Mutex, MutexGuard};
use kvtier_core::{Generation, Hints, Realization};

use super::batch::unexpected;
use super::returns::{Alarm, Home, Returns};
use super::session::NamespaceName;
use super::{ClientError, ClientOptions, Flushed, Watched};
use crate::ErrorKind;
use crate::wire::{NAME_BYTES_MAX, Reply, Request, WATCH_MS_MAX, Welcome};
use line::Line;

pub use super::Writing;
pub use device::{DeviceArray, DeviceArrays, DeviceCache, Loading, Pages, Saving};
pub use namespace::Namespace;
pub use writer::BlockWriter;

/// A connection to a node. Cloning it shares the connection.
///
/// When the last clone, namespace, handle and writer is gone it says goodbye, which frees all it held at the node.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    options: ClientOptions,
    returns: Arc<Returns>,
    line: Mutex<Line>,
    names: Mutex<Vec<NamespaceName>>,
    clock_ns: AtomicU64,
    closed: AtomicBool,
}

impl Home for Shared {
    fn returns(&self) -> &Returns {
        &self.returns
    }
}

impl Client {
    /// Connects and says hello.
    ///
    /// # Errors
    /// `Unavailable` when nobody listens there or answers in time; `Denied` when the socket or the token is refused;
    /// `Invalid` when the two speak no common version.
    pub fn connect(options: ClientOptions) -> Result<Client, ClientError> {
        let returns = Arc::new(Returns::new(Alarm::Thread(Condvar::new())));
        let shared = Arc::new(Shared {
            options,
            returns: Arc::clone(&returns),
            line: Mutex::new(Line::default()),
            names: Mutex::new(Vec::new()),
            clock_ns: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        });
        shared.line()?.link(&shared)?;
        let weak = Arc::downgrade(&shared);
        thread::Builder::new()
            .name("kvtier-keeper".into())
            .spawn(move || keeper::keep(&returns, &weak))
            .map_err(|error| ClientError::new(ErrorKind::Unavailable, format!("no thread for releases: {error}")))?;
        Ok(Client { shared })
    }

    /// Whether this process may call it.
    ///
    /// # Errors
    /// `Closed` in a forked child.
    pub fn check(&self) -> Result<(), ClientError> {
        self.shared.returns.check_process()
    }

    /// What the node said first: its limits and lifetimes.
    ///
    /// # Errors
    /// As any call: it connects again when the connection was lost.
    pub fn welcome(&self) -> Result<Welcome, ClientError> {
        Ok(self.shared.line()?.link(&self.shared)?.session.welcome)
    }

    /// A namespace of this client's trust domain, in one form. It comes into being when it is first named.
    ///
    /// # Errors
    /// `Invalid` for a name that is empty or over 256 bytes; `Denied` when the node refuses it; `Busy` when it has too many.
    pub fn namespace(&self, name: &str, realization: Realization) -> Result<Namespace, ClientError> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(ClientError::invalid(format!(
                "a namespace's name has 1 to {NAME_BYTES_MAX} bytes, not {}",
                name.len()
            )));
        }
        let wanted = NamespaceName {
            name: name.into(),
            realization,
        };
        let index = {
            let mut names = self.shared.names.lock();
            names.iter().position(|known| *known == wanted).unwrap_or_else(|| {
                names.push(wanted);
                names.len() - 1
            })
        };
        self.shared.line()?.opened(&self.shared, index)?;
        Ok(Namespace::new(Arc::clone(&self.shared), index))
    }

    /// Raises the generation of a namespace of this client's trust domain: every block in it is hidden at once, in every
    /// form. Returns once that is durable, with the generation now in force.
    ///
    /// # Errors
    /// As any call.
    pub fn invalidate(&self, name: &str) -> Result<Generation, ClientError> {
        let mut line = self.shared.line()?;
        let generation = line.call(
            &self.shared,
            &Request::Invalidate { name },
            Hints::default(),
            |_, reply| match reply {
                Reply::Invalidated { generation } => Ok(generation),
                _ => Err(unexpected()),
            },
        )?;
        let names = self.shared.names.lock();
        let session = &mut line.link(&self.shared)?.session;
        for (index, _) in names.iter().enumerate().filter(|(_, known)| &*known.name == name) {
            session.observe(index, generation);
        }
        Ok(generation)
    }

    /// Writes every block that was sealed before this call to the NVMe tier, and waits until it would survive a power cut.
    ///
    /// # Errors
    /// As any call; it may take up to [`ClientOptions::flush_timeout`].
    pub fn flush(&self) -> Result<Flushed, ClientError> {
        let mut line = self.shared.line()?;
        let timeout = self.shared.options.flush_timeout;
        line.call_within(
            &self.shared,
            &Request::Flush,
            Hints::default(),
            timeout,
            |_, reply| match reply {
                Reply::Flushed { written, left_out } => Ok(Flushed { written, left_out }),
                _ => Err(unexpected()),
            },
        )
    }

    /// Which namespaces of this client's trust domain were ever invalidated: at once when something changed since the
    /// sequence given (0: nothing is known), else when it does or when `wait` (at most ten seconds) is over. Calls on this
    /// client wait meanwhile: use one of its own.
    ///
    /// # Errors
    /// As any call.
    pub fn watch(&self, since: u64, wait: Duration) -> Result<Watched, ClientError> {
        let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX).min(WATCH_MS_MAX);
        let timeout = self.shared.options.timeout + Duration::from_millis(wait_ms.into());
        let mut line = self.shared.line()?;
        line.call_within(
            &self.shared,
            &Request::Watch { since, wait_ms },
            Hints::default(),
            timeout,
            |_, reply| match reply {
                Reply::Watched { sequence, json } => Watched::parse(sequence, json),
                _ => Err(unexpected()),
            },
        )
    }

    /// Says that a cache of this name holds nothing of generations of a namespace before this one. The node lists it in its
    /// status, and from then on as unconfirmed after each invalidation until it confirms again. Returns the generation in
    /// force.
    ///
    /// # Errors
    /// `Invalid` for a namespace that does not exist or a generation that is yet to come; `Busy` when too many have confirmed.
    pub fn confirm(&self, name: &str, generation: Generation, processor: &str) -> Result<Generation, ClientError> {
        let mut line = self.shared.line()?;
        let request = Request::Confirm {
            generation,
            name,
            processor,
        };
        line.call(&self.shared, &request, Hints::default(), |_, reply| match reply {
            Reply::Confirmed { generation } => Ok(generation),
            _ => Err(unexpected()),
        })
    }

    /// Says that an engine computed `tokens` of a prompt in `took` on its GPU, waiting not counted, behind `before_tokens` whose keys and
    /// values it had: the node learns from it what recomputing takes. Reports far from what the node's settings promise are ignored.
    ///
    /// # Errors
    /// As any call; `Protocol` from a node that does not know this.
    pub fn report_computed(&self, tokens: u32, before_tokens: u32, took: Duration) -> Result<(), ClientError> {
        let mut line = self.shared.line()?;
        let request = Request::Computed {
            tokens,
            before_tokens,
            took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        };
        line.call(&self.shared, &request, Hints::default(), |_, reply| match reply {
            Reply::Counted => Ok(()),
            _ => Err(unexpected()),
        })
    }

    /// The node's status as this client's trust domain may see it: a JSON object.
    ///
    /// # Errors
    /// As any call.
    pub fn status(&self) -> Result<String, ClientError> {
        let mut line = self.shared.line()?;
        line.call(
            &self.shared,
            &Request::Status,
            Hints::default(),
            |_, reply| match reply {
                Reply::Status { json } => Ok(json.to_owned()),
                _ => Err(unexpected()),
            },
        )
    }

    /// The virtual time, in nanoseconds, that requests carry from here on. Only a node that runs on its clients' clock
    /// looks at it; its time is the largest it was sent.
    pub fn set_clock(&self, clock_ns: u64) {
        self.shared.clock_ns.store(clock_ns, Ordering::Relaxed);
    }

    /// Gives everything back and closes the connection, for all clones: they answer `Closed` from here on.
    ///
    /// # Errors
    /// `Invalid` while handles or writers exist: drop them first, for the memory under them would be reused.
    pub fn goodbye(self) -> Result<(), ClientError> {
        let mut line = self.shared.line()?;
        let outstanding = self.shared.returns.outstanding();
        if outstanding > 0 {
            return Err(ClientError::invalid(format!(
                "{outstanding} handles or writers still exist: drop them first"
            )));
        }
        self.shared.closed.store(true, Ordering::Release);
        if line.is_connected() {
            line.call(
                &self.shared,
                &Request::Goodbye,
                Hints::default(),
                |_, reply| match reply {
                    Reply::Farewell => Ok(()),
                    _ => Err(unexpected()),
                },
            )?;
            line.disconnect(&self.shared);
        }
        Ok(())
    }
}

impl Shared {
    /// The connection, for one call at a time.
    fn line(&self) -> Result<MutexGuard<'_, Line>, ClientError> {
        self.returns.check_process()?;
        let line = self.line.lock();
        if self.closed.load(Ordering::Acquire) {
            return Err(ClientError::closed("this client has said goodbye: connect anew"));
        }
        Ok(line)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.returns.stop();
        // In a forked child the connection is the parent's: only the descriptor is closed.
        if self.returns.check_process().is_ok() {
            self.line.get_mut().part(&self.returns);
        }
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Client")
            .field("socket", &self.shared.options.socket)
            .finish_non_exhaustive()
    }
}
