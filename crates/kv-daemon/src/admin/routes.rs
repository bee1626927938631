//! Every route: its method, its path, whom it answers, and what does. The router is made of this table and the OpenAPI
//! document is compared with it.

use axum::extract::State;
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post, put};
use kvtier::node::Node;

use super::access::Role;
use super::guard::Access;
use super::problem::Problem;
use super::{Admin, COMMAND_TIMEOUT, Phase, credentials, events, json_response, namespaces, purges};
use crate::metrics;

/// The OpenAPI document, as it is served.
pub const DOCUMENT: &str = include_str!("openapi.json");

/// One of them.
pub struct Route {
    /// The method.
    pub method: Method,
    /// The path, as OpenAPI writes templates.
    pub path: &'static str,
    /// Whom it answers.
    pub access: Access,
    pub(super) handler: MethodRouter<Admin>,
}

/// All of them.
#[must_use]
pub fn routes() -> Vec<Route> {
    use Access::{Anyone, Token, WholeNode};
    use Role::{Purge, Read};
    let route = |method, path, access, handler| Route {
        method,
        path,
        access,
        handler,
    };
    vec![
        route(Method::GET, "/healthz", Anyone, get(|| async { "ok\n" })),
        route(Method::GET, "/readyz", Anyone, get(readyz)),
        route(Method::GET, "/v1/keys", Anyone, get(keys)),
        route(Method::GET, "/v1/openapi.json", Anyone, get(document)),
        route(Method::GET, "/metrics", WholeNode(Read), get(metrics_text)),
        route(Method::GET, "/v1/status", WholeNode(Read), get(status)),
        route(Method::POST, "/v1/flush", WholeNode(Role::Admin), post(flush)),
        route(Method::GET, "/v1/namespaces", Token(Read), get(namespaces::list)),
        route(Method::GET, "/v1/namespaces/{name}", Token(Read), get(namespaces::show)),
        route(
            Method::PUT,
            "/v1/namespaces/{name}",
            Token(Role::Admin),
            put(namespaces::set),
        ),
        route(
            Method::POST,
            "/v1/namespaces/{name}/invalidate",
            Token(Purge),
            post(namespaces::invalidate),
        ),
        route(
            Method::POST,
            "/v1/namespaces/{name}/advance",
            Token(Role::Admin),
            post(namespaces::advance),
        ),
        route(
            Method::POST,
            "/v1/namespaces/{domain}/{name}/advance",
            Token(Role::Admin),
            post(namespaces::advance_in_domain),
        ),
        route(
            Method::GET,
            "/v1/namespaces/{domain}/{name}",
            Token(Read),
            get(namespaces::show_in_domain),
        ),
        route(
            Method::PUT,
            "/v1/namespaces/{domain}/{name}",
            Token(Role::Admin),
            put(namespaces::set_in_domain),
        ),
        route(
            Method::POST,
            "/v1/namespaces/{domain}/{name}/invalidate",
            Token(Purge),
            post(namespaces::invalidate_in_domain),
        ),
        route(Method::POST, "/v1/purges", Token(Purge), post(purges::create)),
        route(Method::GET, "/v1/purges", Token(Read), get(purges::list)),
        route(Method::GET, "/v1/purges/{id}", Token(Read), get(purges::show)),
        route(
            Method::GET,
            "/v1/purges/{id}/receipt",
            Token(Read),
            get(purges::receipt),
        ),
        route(Method::GET, "/v1/events", Token(Read), get(events::stream)),
        route(
            Method::GET,
            "/v1/tokens",
            WholeNode(Role::Admin),
            get(credentials::list),
        ),
        route(
            Method::POST,
            "/v1/tokens",
            WholeNode(Role::Admin),
            post(credentials::create),
        ),
        route(
            Method::DELETE,
            "/v1/tokens/{id}",
            WholeNode(Role::Admin),
            delete(credentials::revoke),
        ),
    ]
}

async fn readyz(State(admin): State<Admin>) -> Response {
    let reason = match admin.phase() {
        Phase::Ready => return "ready\n".into_response(),
        Phase::Starting => "starting: memory is being made ready",
        Phase::Draining => "draining: a stop was asked for",
    };
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, reason).into_response()
}

async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT).into_response()
}

async fn keys(State(admin): State<Admin>) -> Result<Response, Problem> {
    let keys = admin.ask_purges(|purges| purges.keys()).await?;
    Ok(([(header::CONTENT_TYPE, "application/jwk-set+json")], keys).into_response())
}

async fn status(State(admin): State<Admin>) -> Result<Response, Problem> {
    let status = admin.ask(Node::status).await?;
    Ok(json_response(&status))
}

async fn metrics_text(State(admin): State<Admin>) -> Result<Response, Problem> {
    let status = admin.ask(Node::status).await.ok();
    let text = metrics::exposition(status.as_ref(), admin.uptime().as_secs_f64())
        .map_err(|_| Problem::bug("the encoder refused"))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

async fn flush(State(admin): State<Admin>) -> Result<Response, Problem> {
    match admin.ask(|node| node.flush(COMMAND_TIMEOUT)).await? {
        Some(report) => Ok(json_response(&report)),
        None => Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "the flush goes on, but did not end within 30 s: ask again",
        )),
    }
}
