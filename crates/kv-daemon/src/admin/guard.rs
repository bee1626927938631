//! What stands before every route: who asks, how often, what they may, how much they send, and the audit log.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde_json::Value;

use super::Admin;
use super::access::{Caller, Role};
use super::audit::{Entry, Stage};
use super::problem::Problem;
use super::rate::Admission;

/// Largest body that is taken.
pub const BODY_BYTES_MAX: usize = 64 << 10;

/// A longer body is read to its end so far, that its sender comes to read the answer; past it the connection is closed.
const DRAINED_BYTES_MAX: usize = 16 << 20;

/// Whom a route answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anyone who reaches it.
    Anyone,
    /// A token of this role or a higher one, whatever it is bound to.
    Token(Role),
    /// The same, bound to nothing: the answer is about the whole node.
    WholeNode(Role),
}

/// What a handler knows better than the request's text. An extension of its response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Audited {
    pub(super) namespace: Option<String>,
    pub(super) request_id: Option<String>,
}

/// An extension of a request whose body was longer than [`BODY_BYTES_MAX`]; what is left of it is empty.
#[derive(Clone, Copy, Debug)]
struct TooLarge;

/// Reads the body, so that nothing behind waits for a slow sender.
pub(super) async fn buffer_body(request: Request, next: Next) -> Response {
    let (mut parts, body) = request.into_parts();
    let bytes = match read(body).await {
        Ok(Some(bytes)) => bytes,
        Ok(None) => {
            parts.extensions.insert(TooLarge);
            Bytes::new()
        }
        Err(()) => return Problem::invalid("the body ended early").into_response(),
    };
    next.run(Request::from_parts(parts, Body::from(bytes))).await
}

async fn read(body: Body) -> Result<Option<Bytes>, ()> {
    let mut stream = Box::pin(body.into_data_stream());
    let mut bytes = Vec::new();
    let mut length = 0;
    while let Some(chunk) = std::future::poll_fn(|context| stream.as_mut().poll_next(context)).await {
        let chunk = chunk.map_err(drop)?;
        length += chunk.len();
        if length <= BODY_BYTES_MAX {
            bytes.extend_from_slice(&chunk);
        } else if length > DRAINED_BYTES_MAX {
            break;
        }
    }
    Ok((length <= BODY_BYTES_MAX).then(|| bytes.into()))
}

fn too_large() -> Problem {
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "the body is over 64 KiB")
}

/// Before routes that answer anyone.
pub(super) async fn open(request: Request, next: Next) -> Response {
    if request.extensions().get::<TooLarge>().is_some() {
        return too_large().into_response();
    }
    next.run(request).await
}

/// Before every other route.
pub(super) async fn guarded(
    State((admin, access)): State<(Admin, Access)>,
    mut request: Request,
    next: Next,
) -> Response {
    let caller = shown_token(request.headers())
        .and_then(|token| admin.tokens().authenticate(token, SystemTime::now()))
        .map(Arc::new);
    let admission = match &caller {
        Some(caller) => admin.limits().admit(&caller.token, Instant::now()),
        None => admin.limits().fail(Instant::now()),
    };
    let refused_before = match admission {
        Admission::Admitted { refused_before } => refused_before,
        Admission::Refused { retry_after_s } => {
            let words = format!("too many calls: ask again in {retry_after_s} s");
            return Problem::new(StatusCode::TOO_MANY_REQUESTS, words)
                .retry_after(retry_after_s)
                .into_response();
        }
    };
    let entry = Entry {
        token: caller.as_ref().map(|caller| caller.token.clone()),
        role: caller.as_ref().map(|caller| caller.role.word()),
        method: request.method().to_string(),
        path: request.uri().path().to_string(),
        refused_before,
        ..Entry::default()
    };
    if let Some(problem) = refusal(caller.as_deref(), access, &request) {
        return answered(&admin, entry, problem.into_response()).await;
    }
    if let Some(caller) = caller {
        request.extensions_mut().insert(caller);
    }
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        let answer = next.run(request).await;
        return answered(&admin, entry, answer).await;
    }
    // A task of its own: a caller who hangs up does not keep the outcome of a change out of the log.
    tokio::spawn(change(admin, entry, request, next))
        .await
        .unwrap_or_else(|_| Problem::bug("the call panicked").into_response())
}

/// Runs a call that changes something between its two lines.
async fn change(admin: Admin, mut entry: Entry, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    // It was read before and lies in memory.
    let bytes = axum::body::to_bytes(body, BODY_BYTES_MAX).await.unwrap_or_default();
    name_by_body(&mut entry, &bytes);
    let intent = Entry {
        stage: Stage::Intent,
        ..entry.clone()
    };
    if let Err(problem) = admin.audit(intent, true).await {
        return problem.into_response();
    }
    entry.refused_before = 0;
    let answer = next.run(Request::from_parts(parts, Body::from(bytes))).await;
    let status = answer.status();
    match record(&admin, entry, answer).await {
        Ok(answer) => answer,
        Err(_) => outcome_lost(status).into_response(),
    }
}

async fn answered(admin: &Admin, entry: Entry, answer: Response) -> Response {
    record(admin, entry, answer)
        .await
        .unwrap_or_else(Problem::into_response)
}

/// The answer, once it is in the log.
async fn record(admin: &Admin, mut entry: Entry, mut answer: Response) -> Result<Response, Problem> {
    if let Some(audited) = answer.extensions_mut().remove::<Audited>() {
        entry.namespace = audited.namespace.or(entry.namespace);
        entry.request_id = audited.request_id.or(entry.request_id);
    }
    entry.status = Some(answer.status().as_u16());
    admin.audit(entry, false).await?;
    Ok(answer)
}

/// The intent is in the log, so nothing was done in secret; but the caller must not take the answer for recorded.
fn outcome_lost(status: StatusCode) -> Problem {
    let words = format!(
        "the call was done and would have been answered with {}, but its outcome could not be written to the audit log; \
         its intent stands there: look at what is there now, and make room for the log",
        status.as_u16()
    );
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, words)
}

fn refusal(caller: Option<&Caller>, access: Access, request: &Request) -> Option<Problem> {
    let Some(caller) = caller else {
        let words = "send \"Authorization: Bearer TOKEN\" with a token that is good: the one of admin.token in the state \
                     directory, or one made by `kvctl token create`";
        return Some(Problem::new(StatusCode::UNAUTHORIZED, words));
    };
    let (role, whole_node) = match access {
        Access::Anyone => (Role::Read, false),
        Access::Token(role) => (role, false),
        Access::WholeNode(role) => (role, true),
    };
    if caller.role < role {
        let words = format!(
            "this takes a token of role {}; this one has {}",
            role.word(),
            caller.role.word()
        );
        return Some(Problem::new(StatusCode::FORBIDDEN, words));
    }
    if whole_node && caller.namespaces.is_some() {
        let words = "this is about the whole node: it takes a token that is bound to no namespace";
        return Some(Problem::new(StatusCode::FORBIDDEN, words));
    }
    request.extensions().get::<TooLarge>().map(|_| too_large())
}

fn shown_token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// What the body says of itself, for the intent; whether it makes sense is the handler's to find out.
fn name_by_body(entry: &mut Entry, body: &[u8]) {
    let Ok(Value::Object(members)) = serde_json::from_slice::<Value>(body) else {
        return;
    };
    let text = |name: &str| members.get(name).and_then(Value::as_str).map(str::to_string);
    entry.namespace = text("namespace");
    entry.request_id = text("request_id");
}
