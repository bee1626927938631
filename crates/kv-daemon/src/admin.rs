//! The admin HTTP server, on loopback: is it alive, is it ready, its numbers, its status, invalidate and flush.
//!
//! `/healthz` and `/readyz` answer anyone on this machine; everything else wants the bearer token of the state directory.
//! A request whose `Host` is not a name of loopback is refused, so that a page in a browser cannot reach the server by
//! pointing a name of its own at 127.0.0.1. Connections are bounded in number and in age.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use kvtier::ErrorKind;
use kvtier::node::Node;
use serde::Serialize;
use serde_json::json;
use subtle::ConstantTimeEq;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::metrics;

/// A connection older than this is closed, whatever it does.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(60);

/// No request of this server needs a body; a small one is read and ignored.
const BODY_BYTES_MAX: usize = 64 << 10;

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

/// An answer that is no success, as RFC 9457 has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminError {
    status: StatusCode,
    detail: String,
}

impl AdminError {
    fn of(status: StatusCode, detail: &str) -> AdminError {
        AdminError {
            status,
            detail: detail.to_string(),
        }
    }
}

impl IntoResponse for AdminError {
    fn into_response(self) -> Response {
        let body = json!({
            "type": "about:blank",
            "title": self.status.canonical_reason().unwrap_or("error"),
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        let mut response = (self.status, body.to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"kvtier\""),
            );
        }
        response
    }
}

/// The server's state. Cheap to clone.
#[derive(Clone)]
pub struct Admin {
    inner: Arc<Inner>,
}

struct Inner {
    token: String,
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
    /// A server that asks for `token`, without a node yet.
    #[must_use]
    pub fn new(token: String) -> Admin {
        let phase = AtomicU8::new(Phase::Starting as u8);
        Admin {
            inner: Arc::new(Inner {
                token,
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
        let guarded = Router::new()
            .route("/metrics", get(metrics_text))
            .route("/v1/status", get(status))
            .route("/v1/namespaces/{name}/invalidate", post(invalidate_everywhere))
            .route("/v1/namespaces/{domain}/{name}/invalidate", post(invalidate))
            .route("/v1/flush", post(flush))
            .method_not_allowed_fallback(method_not_allowed)
            .route_layer(middleware::from_fn_with_state(self.clone(), bearer));
        Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .merge(guarded)
            .method_not_allowed_fallback(method_not_allowed)
            .fallback(|| async { AdminError::of(StatusCode::NOT_FOUND, "there is no such path") })
            .layer(middleware::from_fn(small_body))
            .layer(middleware::from_fn(loopback_host))
            .with_state(self.clone())
    }

    /// Serves for as long as the runtime lives.
    ///
    /// # Errors
    /// When the listener breaks.
    pub async fn serve(&self, listener: TcpListener, connections_max: u32) -> io::Result<()> {
        let listener = BoundedListener {
            listener,
            places: Arc::new(Semaphore::new(connections_max as usize)),
        };
        axum::serve(listener, self.router()).await
    }

    /// Asks the node on a thread that may block.
    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Node) -> T + Send + 'static,
    ) -> Result<T, AdminError> {
        let Some(node) = self.inner.node.node() else {
            return Err(AdminError::of(
                StatusCode::SERVICE_UNAVAILABLE,
                "there is no node: the daemon is starting or stopping",
            ));
        };
        tokio::task::spawn_blocking(move || question(&node))
            .await
            .map_err(|_| AdminError::of(StatusCode::INTERNAL_SERVER_ERROR, "the call panicked: report a bug"))
    }
}

async fn method_not_allowed() -> AdminError {
    AdminError::of(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
}

async fn readyz(State(admin): State<Admin>) -> Response {
    let reason = match admin.phase() {
        Phase::Ready => return "ready\n".into_response(),
        Phase::Starting => "starting: memory is being made ready",
        Phase::Draining => "draining: a stop was asked for",
    };
    AdminError::of(StatusCode::SERVICE_UNAVAILABLE, reason).into_response()
}

async fn status(State(admin): State<Admin>) -> Result<Response, AdminError> {
    let status = admin.ask(Node::status).await?;
    Ok(json_response(&status))
}

async fn metrics_text(State(admin): State<Admin>) -> Result<Response, AdminError> {
    let status = admin.ask(Node::status).await.ok();
    let text = metrics::exposition(status.as_ref(), admin.inner.started.elapsed().as_secs_f64())
        .map_err(|_| AdminError::of(StatusCode::INTERNAL_SERVER_ERROR, "the encoder refused: report a bug"))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

async fn invalidate(
    State(admin): State<Admin>,
    Path((domain, name)): Path<(String, String)>,
) -> Result<Response, AdminError> {
    raise(admin, format!("{domain}/{name}")).await
}

async fn invalidate_everywhere(State(admin): State<Admin>, Path(name): Path<String>) -> Result<Response, AdminError> {
    raise(admin, name).await
}

async fn raise(admin: Admin, namespace: String) -> Result<Response, AdminError> {
    let raised = admin
        .ask(move |node| node.invalidate(&namespace, COMMAND_TIMEOUT))
        .await?
        .map_err(|error| {
            let status = match error.kind {
                ErrorKind::Invalid => StatusCode::NOT_FOUND,
                ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            AdminError {
                status,
                detail: error.message,
            }
        })?;
    let raised: Vec<_> = raised
        .into_iter()
        .map(|(namespace, generation)| json!({"namespace": namespace, "generation": generation.0}))
        .collect();
    Ok(json_response(&json!({ "invalidated": raised })))
}

async fn flush(State(admin): State<Admin>) -> Result<Response, AdminError> {
    match admin.ask(|node| node.flush(COMMAND_TIMEOUT)).await? {
        Some(report) => Ok(json_response(&report)),
        None => Err(AdminError::of(
            StatusCode::SERVICE_UNAVAILABLE,
            "the flush goes on, but did not end within 30 s: ask again",
        )),
    }
}

fn json_response(value: &impl Serialize) -> Response {
    match serde_json::to_string(value) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(_) => {
            AdminError::of(StatusCode::INTERNAL_SERVER_ERROR, "the answer is no JSON: report a bug").into_response()
        }
    }
}

async fn bearer(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    let shown = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map_or("", |(_, token)| token.trim());
    if bool::from(shown.as_bytes().ct_eq(admin.inner.token.as_bytes())) {
        next.run(request).await
    } else {
        let detail = "send \"Authorization: Bearer TOKEN\" with the token of admin.token in the state directory";
        AdminError::of(StatusCode::UNAUTHORIZED, detail).into_response()
    }
}

async fn small_body(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    match axum::body::to_bytes(body, BODY_BYTES_MAX).await {
        Ok(bytes) => next.run(Request::from_parts(parts, Body::from(bytes))).await,
        Err(_) => {
            AdminError::of(StatusCode::PAYLOAD_TOO_LARGE, "the body is over 64 KiB; none is needed").into_response()
        }
    }
}

async fn loopback_host(request: Request, next: Next) -> Response {
    if names_loopback(request.headers()) {
        next.run(request).await
    } else {
        let detail = "the Host header must be 127.0.0.1, [::1] or localhost";
        AdminError::of(StatusCode::MISDIRECTED_REQUEST, detail).into_response()
    }
}

fn names_loopback(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST).and_then(|value| value.to_str().ok()) else {
        return false;
    };
    if let Ok(address) = host.parse::<SocketAddr>() {
        return address.ip().is_loopback();
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || bare.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

/// A listener that takes the next connection when one of a fixed number of places is free.
struct BoundedListener {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl axum::serve::Listener for BoundedListener {
    type Io = AgedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (AgedStream, SocketAddr) {
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        let end = Box::pin(tokio::time::sleep(CONNECTION_AGE_MAX));
        (
            AgedStream {
                stream,
                end,
                _place: place,
            },
            address,
        )
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that reads nothing more past its age.
struct AgedStream {
    stream: TcpStream,
    end: Pin<Box<tokio::time::Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl AsyncRead for AgedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.end.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for AgedStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.end.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderMap, HeaderValue, header};

    use super::names_loopback;

    #[test]
    fn only_names_of_loopback_pass_the_host_check() {
        let passes = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_str(host).unwrap());
            names_loopback(&headers)
        };
        for host in [
            "127.0.0.1",
            "127.0.0.1:9640",
            "localhost",
            "LocalHost:1",
            "[::1]",
            "[::1]:9640",
            "127.9.9.9:1",
        ] {
            assert!(passes(host), "{host}");
        }
        for host in [
            "example.org",
            "127.0.0.1.example.org",
            "10.0.0.1:9640",
            "localhost.example.org:80",
            "",
            "[::2]:1",
        ] {
            assert!(!passes(host), "{host}");
        }
        assert!(
            !names_loopback(&HeaderMap::new()),
            "a request without a host is refused"
        );
    }
}
