//! The routes of `/v1/namespaces`, and how a name is found for who asks.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use kvtier::ErrorKind;
use kvtier::purge::{NamespaceSettings, NamespaceStatus, PurgeError};
use serde_json::json;

use super::access::{Caller, bare};
use super::guard::Audited;
use super::input::{JsonBody, PathPart};
use super::problem::Problem;
use super::purges::Purges;
use super::{Admin, COMMAND_TIMEOUT, json_response};

const LABELS_MAX: usize = 16;
const LABEL_BYTES_MAX: usize = 64;

/// `DOMAIN/NAME` of what the caller named: a full name as it is, a bare one by the domain that has it.
///
/// # Errors
/// Not there, not there for the caller, or in several domains.
pub(super) fn resolve(purges: &dyn Purges, caller: &Caller, name: &str) -> Result<String, Problem> {
    if name.contains('/') {
        return match caller.may_see(name) {
            true => Ok(name.to_string()),
            false => Err(Problem::unknown_namespace(name)),
        };
    }
    let mut found: Vec<String> = purges
        .namespaces()
        .into_iter()
        .map(|status| status.namespace)
        .filter(|namespace| bare(namespace) == name && caller.may_see(namespace))
        .collect();
    match found.len() {
        0 => Err(Problem::unknown_namespace(name)),
        1 => Ok(found.remove(0)),
        _ => Err(Problem::invalid(format!(
            "{name:?} is a name in several domains: write {}",
            found.join(" or ")
        ))),
    }
}

pub(super) async fn list(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
) -> Result<Response, Problem> {
    let mut namespaces = admin.ask_purges(|purges| purges.namespaces()).await?;
    namespaces.retain(|status| caller.may_see(&status.namespace));
    Ok(json_response(&json!({ "namespaces": namespaces })))
}

pub(super) async fn show(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    PathPart(name): PathPart<String>,
) -> Result<Response, Problem> {
    show_named(admin, caller, name).await
}

pub(super) async fn show_in_domain(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    PathPart((domain, name)): PathPart<(String, String)>,
) -> Result<Response, Problem> {
    show_named(admin, caller, format!("{domain}/{name}")).await
}

async fn show_named(admin: Admin, caller: Arc<Caller>, name: String) -> Result<Response, Problem> {
    let status: NamespaceStatus = admin
        .ask_purges(move |purges| {
            let namespace = resolve(purges, &caller, &name)?;
            purges
                .namespaces()
                .into_iter()
                .find(|status| status.namespace == namespace)
                .ok_or_else(|| Problem::unknown_namespace(&name))
        })
        .await??;
    Ok((Extension(about(&status.namespace)), json_response(&status)).into_response())
}

pub(super) async fn set(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    PathPart(name): PathPart<String>,
    JsonBody(settings): JsonBody<NamespaceSettings>,
) -> Result<Response, Problem> {
    set_named(admin, caller, name, settings).await
}

pub(super) async fn set_in_domain(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    PathPart((domain, name)): PathPart<(String, String)>,
    JsonBody(settings): JsonBody<NamespaceSettings>,
) -> Result<Response, Problem> {
    set_named(admin, caller, format!("{domain}/{name}"), settings).await
}

async fn set_named(
    admin: Admin,
    caller: Arc<Caller>,
    name: String,
    settings: NamespaceSettings,
) -> Result<Response, Problem> {
    let long = |text: &String| text.len() > LABEL_BYTES_MAX;
    let labels = &settings.labels;
    if labels.len() > LABELS_MAX
        || labels
            .iter()
            .any(|(key, value)| key.is_empty() || long(key) || long(value))
    {
        return Err(
            Problem::invalid("labels: at most 16, keys of 1 to 64 bytes, values of at most 64").with("field", "labels"),
        );
    }
    let status = admin
        .ask_purges(move |purges| {
            let namespace = resolve(purges, &caller, &name)?;
            purges.set_namespace(&namespace, settings).map_err(|error| match error {
                PurgeError::UnknownNamespace(_) => Problem::unknown_namespace(&name),
                error => Problem::from(error),
            })
        })
        .await??;
    Ok((Extension(about(&status.namespace)), json_response(&status)).into_response())
}

pub(super) async fn advance(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    PathPart(name): PathPart<String>,
) -> Result<Response, Problem> {
    advance_named(admin, caller, name).await
}

pub(super) async fn advance_in_domain(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    PathPart((domain, name)): PathPart<(String, String)>,
) -> Result<Response, Problem> {
    advance_named(admin, caller, format!("{domain}/{name}")).await
}

async fn advance_named(admin: Admin, caller: Arc<Caller>, name: String) -> Result<Response, Problem> {
    let status = admin
        .ask_purges(move |purges| {
            let namespace = resolve(purges, &caller, &name)?;
            purges.advance(&namespace).map_err(|error| match error {
                PurgeError::UnknownNamespace(_) => Problem::unknown_namespace(&name),
                error => Problem::from(error),
            })
        })
        .await??;
    Ok((Extension(about(&status.namespace)), json_response(&status)).into_response())
}

pub(super) async fn invalidate(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    PathPart(name): PathPart<String>,
) -> Result<Response, Problem> {
    raise(admin, caller, name).await
}

pub(super) async fn invalidate_in_domain(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    PathPart((domain, name)): PathPart<(String, String)>,
) -> Result<Response, Problem> {
    raise(admin, caller, format!("{domain}/{name}")).await
}

async fn raise(admin: Admin, caller: Arc<Caller>, asked: String) -> Result<Response, Problem> {
    let names = caller.expand(&asked);
    let audited = about(&asked);
    let raised = admin
        .ask(move |node| {
            let mut raised = Vec::new();
            for name in names {
                match node.invalidate(&name, COMMAND_TIMEOUT) {
                    Ok(some) => raised.extend(some),
                    Err(error) if error.kind == ErrorKind::Invalid => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(raised)
        })
        .await?
        .map_err(|error| match error.kind {
            ErrorKind::Internal => Problem::new(StatusCode::INTERNAL_SERVER_ERROR, error.message),
            _ => Problem::new(StatusCode::SERVICE_UNAVAILABLE, error.message).retry_after(RETRY.as_secs()),
        })?;
    if raised.is_empty() {
        return Err(Problem::unknown_namespace(&asked));
    }
    let raised: Vec<_> = raised
        .into_iter()
        .map(|(namespace, generation)| json!({"namespace": namespace, "generation": generation.0}))
        .collect();
    Ok((Extension(audited), json_response(&json!({ "invalidated": raised }))).into_response())
}

/// When to ask again after a generation could not be recorded.
const RETRY: Duration = Duration::from_secs(1);

fn about(namespace: &str) -> Audited {
    Audited {
        namespace: Some(namespace.to_string()),
        request_id: None,
    }
}
