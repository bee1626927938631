//! What the admin server asks of whatever purges, and the routes of `/v1/purges`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use kvtier::purge::{NamespaceSettings, NamespaceStatus, PurgeError, PurgeJob, PurgeRequest, PurgeScope};
use serde::Deserialize;
use serde_json::json;

use super::access::{Caller, bare};
use super::guard::Audited;
use super::input::{JsonBody, PathPart, QueryOf};
use super::namespaces::resolve;
use super::problem::Problem;
use super::{Admin, json_response};

/// Bytes of a namespace's name or a label.
const NAME_BYTES_MAX: usize = 1024;
const REQUEST_ID_BYTES_MAX: usize = 128;
const REASON_BYTES_MAX: usize = 1024;

/// Who keeps namespaces and purges them. Calls may block for as long as a disk needs.
pub trait Purges: Send + Sync {
    /// Begins a purge and returns once nothing older can be read any more, durably. `namespace` is `DOMAIN/NAME`. The second
    /// value is whether the job is new: the same `request_id` with the same request is the same job.
    ///
    /// # Errors
    /// Nothing was changed.
    fn purge(&self, request: PurgeRequest) -> Result<(PurgeJob, bool), PurgeError>;

    /// The job of this id.
    fn job(&self, id: &str) -> Option<PurgeJob>;

    /// Jobs, oldest first; of one `DOMAIN/NAME`, or all.
    fn jobs(&self, namespace: Option<&str>) -> Vec<PurgeJob>;

    /// The signed receipt of a job as canonical JSON, byte for byte as it was signed; `None` while there is none.
    fn receipt(&self, id: &str) -> Option<String>;

    /// Every namespace that is known, those without blocks included.
    fn namespaces(&self) -> Vec<NamespaceStatus>;

    /// Sets a namespace, `DOMAIN/NAME`, as a whole, durably.
    ///
    /// # Errors
    /// Nothing was changed.
    fn set_namespace(&self, namespace: &str, settings: NamespaceSettings) -> Result<NamespaceStatus, PurgeError>;

    /// Serves a namespace again, `DOMAIN/NAME`, that an anchor knows at a higher generation: raises it above that, empty.
    ///
    /// # Errors
    /// When it is not known, or cannot be made durable.
    fn advance(&self, namespace: &str) -> Result<NamespaceStatus, PurgeError>;

    /// The public keys of receipts, as a JSON Web Key Set.
    fn keys(&self) -> String;

    /// What happened after this event, oldest first, as far as it is still kept: sequences that only grow, from 1, and JSON
    /// objects with at least `purge` (the job's id), `namespace` (`DOMAIN/NAME`), `state` and `at` (RFC 3339).
    fn events_after(&self, sequence: u64) -> Vec<(u64, String)>;
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Filter {
    namespace: Option<String>,
}

pub(super) async fn create(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    JsonBody(mut request): JsonBody<PurgeRequest>,
) -> Result<Response, Problem> {
    check(&request)?;
    let asked = request.namespace.clone();
    let request_id = request.request_id.clone();
    let (job, created) = admin
        .ask_purges(move |purges| {
            request.namespace = resolve(purges, &caller, &request.namespace)?;
            purges
                .purge(request)
                .map_err(|error| refusal(error, &asked, purges, &caller))
        })
        .await??;
    let audited = Audited {
        namespace: Some(job.request.namespace.clone()),
        request_id: Some(request_id),
    };
    let status = if created { StatusCode::CREATED } else { StatusCode::OK };
    let mut response = (status, Extension(audited), json_response(&job)).into_response();
    *response.status_mut() = status;
    if let Ok(location) = HeaderValue::from_str(&format!("/v1/purges/{}", job.id)) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

pub(super) async fn list(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    QueryOf(filter): QueryOf<Filter>,
) -> Result<Response, Problem> {
    let audited = Audited {
        namespace: filter.namespace.clone(),
        request_id: None,
    };
    let jobs = admin
        .ask_purges(move |purges| {
            match filter.namespace {
                None => Ok(purges.jobs(None)),
                Some(name) => {
                    let fits = |namespace: &str| namespace == name || (!name.contains('/') && bare(namespace) == name);
                    let mut jobs = purges.jobs(Some(&name).filter(|name| name.contains('/')).map(String::as_str));
                    jobs.retain(|job| fits(&job.request.namespace) && caller.may_see(&job.request.namespace));
                    let known = |status: &NamespaceStatus| fits(&status.namespace) && caller.may_see(&status.namespace);
                    if jobs.is_empty() && !purges.namespaces().iter().any(known) {
                        return Err(Problem::unknown_namespace(&name));
                    }
                    Ok(jobs)
                }
            }
            .map(|mut jobs| {
                jobs.retain(|job| caller.may_see(&job.request.namespace));
                jobs
            })
        })
        .await??;
    Ok((Extension(audited), json_response(&json!({ "purges": jobs }))).into_response())
}

pub(super) async fn show(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    PathPart(id): PathPart<String>,
) -> Result<Response, Problem> {
    let job = admin.ask_purges(move |purges| visible(purges, &caller, &id)).await??;
    Ok((Extension(about(&job)), json_response(&job)).into_response())
}

pub(super) async fn receipt(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    PathPart(id): PathPart<String>,
) -> Result<Response, Problem> {
    let (job, receipt) = admin
        .ask_purges(move |purges| {
            let job = visible(purges, &caller, &id)?;
            let receipt = purges.receipt(&id);
            Ok::<_, Problem>((job, receipt))
        })
        .await??;
    let Some(receipt) = receipt else {
        let words = format!("{} has no receipt yet: ask again when its state is completed", job.id);
        return Err(Problem::new(StatusCode::NOT_FOUND, words).with("state", json!(job.state)));
    };
    let json = [(header::CONTENT_TYPE, "application/json")];
    Ok((Extension(about(&job)), json, receipt).into_response())
}

fn about(job: &PurgeJob) -> Audited {
    Audited {
        namespace: Some(job.request.namespace.clone()),
        request_id: Some(job.request.request_id.clone()),
    }
}

fn visible(purges: &dyn Purges, caller: &Caller, id: &str) -> Result<PurgeJob, Problem> {
    purges
        .job(id)
        .filter(|job| caller.may_see(&job.request.namespace))
        .ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, format!("no purge {id:?}")))
}

/// An engine's refusal in words that tell nobody about a namespace that is not theirs.
fn refusal(error: PurgeError, asked: &str, purges: &dyn Purges, caller: &Caller) -> Problem {
    match error {
        PurgeError::UnknownNamespace(_) => Problem::unknown_namespace(asked),
        PurgeError::Conflict { request_id, id } if visible(purges, caller, &id).is_err() => Problem::new(
            StatusCode::CONFLICT,
            format!("request_id {request_id:?} was used before: choose a new request_id"),
        ),
        error => Problem::from(error),
    }
}

fn check(request: &PurgeRequest) -> Result<(), Problem> {
    let invalid = |field: &str, words: &str| Err(Problem::invalid(format!("{field}: {words}")).with("field", field));
    let is_hex =
        |text: &String, digits: usize| text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if request.namespace.is_empty() || request.namespace.len() > NAME_BYTES_MAX {
        return invalid("namespace", "write DOMAIN/NAME or NAME, at most 1,024 bytes");
    }
    let printable = request.request_id.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if !(1..=REQUEST_ID_BYTES_MAX).contains(&request.request_id.len()) || !printable {
        return invalid("request_id", "1 to 128 printable ASCII characters");
    }
    if request.reason.len() > REASON_BYTES_MAX {
        return invalid("reason", "at most 1,024 bytes");
    }
    match &request.scope {
        PurgeScope::Realization(digest) if !is_hex(digest, 64) => {
            invalid("scope", "a realization is 64 hexadecimal digits")
        }
        PurgeScope::Hashes(hashes) if hashes.is_empty() || !hashes.iter().all(|hash| is_hex(hash, 32)) => {
            invalid("scope", "name at least one block hash, 32 hexadecimal digits each")
        }
        PurgeScope::Label(label) if label.is_empty() || label.len() > NAME_BYTES_MAX => {
            invalid("scope", "a label has 1 to 1,024 bytes")
        }
        _ => Ok(()),
    }
}
