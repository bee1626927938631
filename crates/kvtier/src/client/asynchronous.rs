use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use kvtier_core::{Generation, Hints, Realization};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::batch::unexpected;
use super::returns::{Alarm, FLUSH_AFTER, Home, Look, Returns, Rounds};
use super::session::{NamespaceName, Opened, Session};
use super::{ClientError, ClientOptions, Flushed};
use crate::wire::{NAME_BYTES_MAX, Reply, Request, Welcome};
use connection::Connection;

mod connection;
mod namespace;
mod writer;

pub use namespace::Namespace;
pub use writer::BlockWriter;

/// A connection to a node, for tasks. Many requests are in flight on it at once. Cloning it shares the connection.
///
/// It belongs to the tokio runtime that it was connected in. Dropping a future gives back what its answer leases.
/// When the last clone, namespace, handle and writer is gone it says goodbye, which frees all it held at the node.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    options: ClientOptions,
    returns: Arc<Returns>,
    current: Mutex<Option<Arc<Connection>>>,
    /// Held while a connection is made, so that there is one.
    connecting: tokio::sync::Mutex<()>,
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
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O and time.
    pub async fn connect(options: ClientOptions) -> Result<Client, ClientError> {
        let alarm = Arc::new(Notify::new());
        let returns = Arc::new(Returns::new(Alarm::Task(Arc::clone(&alarm))));
        let shared = Arc::new(Shared {
            options,
            returns: Arc::clone(&returns),
            current: Mutex::new(None),
            connecting: tokio::sync::Mutex::new(()),
            names: Mutex::new(Vec::new()),
            clock_ns: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        });
        shared.connection().await?;
        let weak = Arc::downgrade(&shared);
        tokio::spawn(async move { keep(&returns, &alarm, &weak).await });
        Ok(Client { shared })
    }

    /// What the node said first: its limits and lifetimes.
    ///
    /// # Errors
    /// As any call: it connects again when the connection was lost.
    pub async fn welcome(&self) -> Result<Welcome, ClientError> {
        Ok(self.shared.connection().await?.with_session(|session| session.welcome))
    }

    /// A namespace of this client's trust domain, in one form. It comes into being when it is first named.
    ///
    /// # Errors
    /// `Invalid` for a name that is empty or over 256 bytes; `Denied` when the node refuses it; `Busy` when it has too many.
    pub async fn namespace(&self, name: &str, realization: Realization) -> Result<Namespace, ClientError> {
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
        self.shared.opened(index).await?;
        Ok(Namespace::new(Arc::clone(&self.shared), index))
    }

    /// Raises the generation of a namespace of this client's trust domain: every block in it is hidden at once, in every
    /// form. Returns once that is durable, with the generation now in force.
    ///
    /// # Errors
    /// As any call.
    pub async fn invalidate(&self, name: &str) -> Result<Generation, ClientError> {
        let shared = &self.shared;
        let connection = shared.connection().await?;
        shared
            .call(
                &connection,
                &Request::Invalidate { name },
                Hints::default(),
                |session, reply| {
                    let Reply::Invalidated { generation } = reply else {
                        return Err(unexpected());
                    };
                    for (index, _) in shared
                        .names
                        .lock()
                        .iter()
                        .enumerate()
                        .filter(|(_, known)| &*known.name == name)
                    {
                        session.observe(index, generation);
                    }
                    Ok(generation)
                },
            )
            .await
    }

    /// Writes every block that was sealed before this call to the NVMe tier, and waits until it would survive a power cut.
    ///
    /// # Errors
    /// As any call; it may take up to [`ClientOptions::flush_timeout`].
    pub async fn flush(&self) -> Result<Flushed, ClientError> {
        let connection = self.shared.connection().await?;
        let timeout = self.shared.options.flush_timeout;
        let answer = self
            .shared
            .send(&connection, &Request::Flush, Hints::default(), timeout)?;
        answer
            .wait(|_, reply| match reply {
                Reply::Flushed { written, left_out } => Ok(Flushed { written, left_out }),
                _ => Err(unexpected()),
            })
            .await
    }

    /// As the blocking client's: what an engine's computing took.
    ///
    /// # Errors
    /// As any call; `Protocol` from a node that does not know this.
    pub async fn report_computed(&self, tokens: u32, before_tokens: u32, took: Duration) -> Result<(), ClientError> {
        let connection = self.shared.connection().await?;
        let request = Request::Computed {
            tokens,
            before_tokens,
            took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        };
        let counted = |_: &mut Session, reply: Reply<'_>| match reply {
            Reply::Counted => Ok(()),
            _ => Err(unexpected()),
        };
        self.shared.call(&connection, &request, Hints::default(), counted).await
    }

    /// The node's status as this client's trust domain may see it: a JSON object.
    ///
    /// # Errors
    /// As any call.
    pub async fn status(&self) -> Result<String, ClientError> {
        let connection = self.shared.connection().await?;
        let status = |_: &mut Session, reply: Reply<'_>| match reply {
            Reply::Status { json } => Ok(json.to_owned()),
            _ => Err(unexpected()),
        };
        self.shared
            .call(&connection, &Request::Status, Hints::default(), status)
            .await
    }

    /// The virtual time, in nanoseconds, that requests carry from here on. Only a node that runs on its clients' clock
    /// looks at it; its time is the largest it was sent.
    pub fn set_clock(&self, clock_ns: u64) {
        self.shared.clock_ns.store(clock_ns, Ordering::Relaxed);
    }

    /// Gives everything back and closes the connection, for all clones: they answer `Closed` from here on. Requests in
    /// flight are lost.
    ///
    /// # Errors
    /// `Invalid` while handles or writers exist: drop them first, for the memory under them would be reused.
    pub async fn goodbye(self) -> Result<(), ClientError> {
        let shared = &self.shared;
        let outstanding = shared.returns.outstanding();
        if outstanding > 0 {
            return Err(ClientError::invalid(format!(
                "{outstanding} handles or writers still exist: drop them first"
            )));
        }
        shared.closed.store(true, Ordering::Release);
        let Some(connection) = shared.current.lock().clone() else {
            return Ok(());
        };
        let farewell = |_: &mut Session, reply: Reply<'_>| match reply {
            Reply::Farewell => Ok(()),
            _ => Err(unexpected()),
        };
        let answered = shared
            .call(&connection, &Request::Goodbye, Hints::default(), farewell)
            .await;
        connection.close();
        answered
    }
}

/// How long a request may take.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// At the node: it answers at this time at the latest.
    node: Duration,
    /// Until the connection is given up for want of an answer.
    answer: Duration,
}

impl Shared {
    /// The connection; a new one when there is none.
    async fn connection(&self) -> Result<Arc<Connection>, ClientError> {
        if let Some(connection) = self.usable()? {
            return Ok(connection);
        }
        let _one = self.connecting.lock().await;
        if let Some(connection) = self.usable()? {
            return Ok(connection);
        }
        let connection = Connection::open(&self.options, &self.returns).await?;
        *self.current.lock() = Some(Arc::clone(&connection));
        Ok(connection)
    }

    fn usable(&self) -> Result<Option<Arc<Connection>>, ClientError> {
        self.returns.check_process()?;
        if self.closed.load(Ordering::Acquire) {
            return Err(ClientError::closed("this client has said goodbye: connect anew"));
        }
        Ok(self.current.lock().clone().filter(|connection| !connection.is_closed()))
    }

    fn send(
        &self,
        connection: &Arc<Connection>,
        request: &Request<'_>,
        hints: Hints,
        timeout: Duration,
    ) -> Result<connection::Pending, ClientError> {
        let patience = Patience {
            node: timeout,
            answer: timeout,
        };
        connection.send(request, hints, patience, self.clock_ns.load(Ordering::Relaxed))
    }

    async fn call<T>(
        &self,
        connection: &Arc<Connection>,
        request: &Request<'_>,
        hints: Hints,
        absorb: impl FnOnce(&mut Session, Reply<'_>) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        self.send(connection, request, hints, self.options.timeout)?
            .wait(absorb)
            .await
    }

    /// The connection, with namespace `index` open on it.
    async fn opened(&self, index: usize) -> Result<(Arc<Connection>, Opened), ClientError> {
        let connection = self.connection().await?;
        if let Some(opened) = connection.with_session(|session| session.opened(index)) {
            return Ok((connection, opened));
        }
        let wanted = self.names.lock()[index].clone();
        let request = Request::OpenNamespace {
            name: &wanted.name,
            realization: wanted.realization,
        };
        // Two tasks may both ask; the node answers both alike.
        let open = |session: &mut Session, reply: Reply<'_>| match reply {
            Reply::NamespaceOpened { handle, generation } => {
                let opened = Opened { handle, generation };
                session.open(index, opened);
                Ok(opened)
            }
            _ => Err(unexpected()),
        };
        let opened = self.call(&connection, &request, Hints::default(), open).await?;
        Ok((connection, opened))
    }

    fn current(&self) -> Option<Arc<Connection>> {
        self.current.lock().clone()
    }

    /// Queues slots that are past half of their life, and says when to look again.
    fn expire_slots(&self) -> Option<Duration> {
        let connection = self.current()?;
        let now = Instant::now();
        let mut expired = Vec::new();
        let next = connection.with_session(|session| {
            session.slots.expire(now, &mut expired);
            session.slots.expires_in(now)
        });
        self.returns.abandon(connection.epoch(), expired);
        next.map(|next| next.max(FLUSH_AFTER))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.returns.stop();
        let Some(connection) = self.current.get_mut().take() else {
            return;
        };
        // In a forked child the connection is the parent's.
        if self.returns.check_process().is_ok() {
            connection.part();
        }
    }
}

/// The task that sends releases which no request takes along, and gives back slots that nobody used.
async fn keep(returns: &Returns, alarm: &Notify, shared: &Weak<Shared>) {
    let mut rounds = Rounds::default();
    let mut longest = Some(FLUSH_AFTER);
    loop {
        match longest {
            // Woken early by an alarm it merely looks once more.
            Some(longest) => drop(tokio::time::timeout(longest, alarm.notified()).await),
            None => alarm.notified().await,
        }
        let look = returns.look(&mut rounds);
        if look == Look::Stop {
            return;
        }
        let Some(shared) = shared.upgrade() else { return };
        longest = match look {
            Look::Sleep => shared.expire_slots(),
            Look::Flush => {
                if let Some(connection) = shared.current() {
                    connection.send_returns();
                }
                Some(FLUSH_AFTER)
            }
            Look::Wait | Look::Stop => Some(FLUSH_AFTER),
        };
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
