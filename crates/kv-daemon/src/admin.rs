//! The admin HTTP server: is it alive, is it ready, its numbers, namespaces, purges and their receipts, tokens.
//!
//! `/healthz`, `/readyz`, `/v1/keys` and `/v1/openapi.json` answer anyone who reaches the server; everything else wants a
//! bearer token whose role allows it, and leaves a line in the audit log before it is answered. A token bound to namespaces
//! finds no others: a foreign one is as unknown as one that does not exist.
//!
//! Read first: [`routes::routes`] (the table), [`guard::Access`] (whom a route answers), [`purges::Purges`] (what is asked).

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use kvtier::node::Node;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use self::audit::{AuditLog, Entry};
use self::guard::Access;
use self::host::HostNames;
use self::listener::BoundedListener;
use self::problem::Problem;
use self::purges::Purges;
use self::rate::Limits;
use self::tls::Tls;
use self::tokens::TokenRegister;

pub mod access;
pub mod audit;
mod credentials;
mod events;
pub mod guard;
pub mod host;
mod input;
mod listener;
mod namespaces;
pub(crate) mod node;
pub mod problem;
pub mod purges;
pub mod rate;
pub mod routes;
pub mod tls;
pub mod tokens;

/// How long a command to the node may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// How far the daemon is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Memory is being made ready.
    Starting,
    /// Clients are served.
    Ready,
    /// A stop was asked for.
    Draining,
}

/// Where handlers find the node. Empty while it starts and once it stops.
#[derive(Default)]
pub struct NodeSlot(Mutex<Option<Arc<Node>>>);

impl NodeSlot {
    /// Puts a started node in.
    pub fn fill(&self, node: Node) {
        *self.lock() = Some(Arc::new(node));
    }

    /// The node, for one call.
    #[must_use]
    pub fn node(&self) -> Option<Arc<Node>> {
        self.lock().clone()
    }

    /// Takes the node out and waits until no handler uses it any more. Blocks as long as one flush at most.
    #[must_use]
    pub fn take(&self) -> Option<Node> {
        let mut shared = self.lock().take()?;
        loop {
            match Arc::try_unwrap(shared) {
                Ok(node) => return Some(node),
                Err(still_shared) => shared = still_shared,
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Node>>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Finds what purges for one call, given where the node is; `None`: not now.
pub type PurgeSource = Box<dyn Fn(&NodeSlot) -> Option<Arc<dyn Purges>> + Send + Sync>;

/// What a server is made of.
pub struct Parts {
    /// Who may ask.
    pub tokens: TokenRegister,
    /// Where calls are written down.
    pub audit: AuditLog,
    /// How often they may ask.
    pub limits: Limits,
    /// Under which names.
    pub hosts: HostNames,
    /// Listeners to events at once.
    pub event_subscribers_max: u32,
    /// What purges.
    pub purges: PurgeSource,
}

/// The server's state. Cheap to clone.
#[derive(Clone)]
pub struct Admin {
    inner: Arc<Inner>,
}

struct Inner {
    parts: Parts,
    subscribers: Arc<Semaphore>,
    phase: AtomicU8,
    started: Instant,
    node: NodeSlot,
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Admin")
            .field("phase", &self.phase())
            .finish_non_exhaustive()
    }
}

impl Admin {
    /// A server of these parts, without a node yet.
    #[must_use]
    pub fn new(parts: Parts) -> Admin {
        let phase = AtomicU8::new(Phase::Starting as u8);
        let subscribers = Arc::new(Semaphore::new(parts.event_subscribers_max as usize));
        Admin {
            inner: Arc::new(Inner {
                parts,
                subscribers,
                phase,
                started: Instant::now(),
                node: NodeSlot::default(),
            }),
        }
    }

    /// Where the node goes.
    #[must_use]
    pub fn slot(&self) -> &NodeSlot {
        &self.inner.node
    }

    /// Who may ask.
    #[must_use]
    pub fn tokens(&self) -> &TokenRegister {
        &self.inner.parts.tokens
    }

    /// How far the daemon is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.inner.phase.load(Ordering::Acquire) {
            0 => Phase::Starting,
            1 => Phase::Ready,
            _ => Phase::Draining,
        }
    }

    /// Moves on.
    pub fn set_phase(&self, phase: Phase) {
        self.inner.phase.store(phase as u8, Ordering::Release);
    }

    /// Every route and what guards it.
    pub fn router(&self) -> Router {
        let mut router = Router::new();
        for route in routes::routes() {
            let handler = match route.access {
                Access::Anyone => route.handler.route_layer(middleware::from_fn(guard::open)),
                access => route
                    .handler
                    .route_layer(middleware::from_fn_with_state((self.clone(), access), guard::guarded)),
            };
            router = router.route(route.path, handler);
        }
        router
            .method_not_allowed_fallback(method_not_allowed)
            .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "there is no such path") })
            .layer(middleware::from_fn(guard::buffer_body))
            .layer(middleware::from_fn_with_state(self.clone(), known_host))
            .with_state(self.clone())
    }

    /// Serves for as long as the runtime lives.
    ///
    /// # Errors
    /// When the listener breaks.
    pub async fn serve(&self, listener: TcpListener, connections_max: u32, tls: Option<&Tls>) -> io::Result<()> {
        let acceptor = tls.map(|tls| tls.acceptor().clone());
        let listener = BoundedListener::new(listener, connections_max, acceptor);
        axum::serve(listener, self.router()).await
    }

    fn limits(&self) -> &Limits {
        &self.inner.parts.limits
    }

    fn subscribers(&self) -> &Arc<Semaphore> {
        &self.inner.subscribers
    }

    fn uptime(&self) -> Duration {
        self.inner.started.elapsed()
    }

    /// Asks the node on a thread that may block.
    async fn ask<T: Send + 'static>(&self, question: impl FnOnce(&Node) -> T + Send + 'static) -> Result<T, Problem> {
        let node = self.inner.node.node().ok_or_else(no_node)?;
        blocking(move || question(&node)).await
    }

    /// Asks what purges on a thread that may block.
    async fn ask_purges<T: Send + 'static>(
        &self,
        question: impl FnOnce(&dyn Purges) -> T + Send + 'static,
    ) -> Result<T, Problem> {
        let purges = (self.inner.parts.purges)(&self.inner.node).ok_or_else(no_node)?;
        blocking(move || question(&*purges)).await
    }

    /// Writes a line of the audit log, or says that nobody may be answered.
    async fn audit(&self, entry: Entry, sync: bool) -> Result<(), Problem> {
        let admin = self.clone();
        let written = blocking(move || admin.inner.parts.audit.append(&entry, sync)).await?;
        written.map(drop).map_err(|error| {
            tracing::error!("the audit log cannot be written ({error}): calls are refused until it can");
            let words = format!("the audit log cannot be written ({error}), so this was not done: make room for it");
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, words).retry_after(5)
        })
    }
}

#[cfg(test)]
impl Admin {
    /// Writes lines until the audit log must go on in a new file.
    fn fill_audit_log(&self) {
        self.inner.parts.audit.fill();
    }
}

fn no_node() -> Problem {
    let words = "there is no node: the daemon is starting or stopping";
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, words).retry_after(1)
}

/// Runs what may block where it keeps nobody waiting.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Problem::bug("the call panicked"))
}

fn json_response(value: &impl Serialize) -> Response {
    match serde_json::to_string(value) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(_) => Problem::bug("the answer is no JSON").into_response(),
    }
}

async fn method_not_allowed() -> Problem {
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
}

async fn known_host(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    let host = request
        .headers()
        .get(header::HOST)
        .and_then(|value| value.to_str().ok());
    if host.is_some_and(|host| admin.inner.parts.hosts.accept(host)) {
        next.run(request).await
    } else {
        let words = "the Host header must be 127.0.0.1, [::1], localhost, the address that is listened on, or a name of the \
                     certificate";
        Problem::new(StatusCode::MISDIRECTED_REQUEST, words).into_response()
    }
}

#[cfg(test)]
pub(crate) mod tests;
