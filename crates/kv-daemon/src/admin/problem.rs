//! Answers that are no success, as RFC 9457 has them.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use kvtier::purge::PurgeError;
use serde_json::{Map, Value, json};

/// A problem: its status, words for people and members for programs. `application/problem+json` on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    status: StatusCode,
    detail: String,
    members: Map<String, Value>,
    retry_after_s: Option<u64>,
}

impl Problem {
    /// A problem of this status: what went wrong, then what to do.
    #[must_use]
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Problem {
        Problem {
            status,
            detail: detail.into(),
            members: Map::new(),
            retry_after_s: None,
        }
    }

    /// 400.
    #[must_use]
    pub fn invalid(detail: impl Into<String>) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, detail)
    }

    /// 404 for a namespace that is not there, or not there for who asks: nobody can tell which.
    #[must_use]
    pub fn unknown_namespace(name: &str) -> Problem {
        Problem::new(
            StatusCode::NOT_FOUND,
            PurgeError::UnknownNamespace(name.to_string()).to_string(),
        )
    }

    /// 500: a rule of ours is broken.
    #[must_use]
    pub fn bug(what: &str) -> Problem {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, format!("{what}: report a bug"))
    }

    /// The same with one more member.
    #[must_use]
    pub fn with(mut self, member: &str, value: impl Into<Value>) -> Problem {
        self.members.insert(member.to_string(), value.into());
        self
    }

    /// The same with a `Retry-After`, seconds.
    #[must_use]
    pub fn retry_after(mut self, seconds: u64) -> Problem {
        self.retry_after_s = Some(seconds);
        self
    }

    /// Its status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }
}

impl From<PurgeError> for Problem {
    fn from(error: PurgeError) -> Problem {
        let words = error.to_string();
        match error {
            PurgeError::Invalid(_) => Problem::invalid(words),
            PurgeError::UnknownNamespace(_) => Problem::new(StatusCode::NOT_FOUND, words),
            PurgeError::Conflict { id, .. } => Problem::new(StatusCode::CONFLICT, words).with("purge", id),
            PurgeError::Busy(_) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, words).retry_after(1),
            PurgeError::Unavailable(_) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, words).retry_after(5),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut body = Map::new();
        body.insert("type".into(), json!("about:blank"));
        body.insert("title".into(), json!(self.status.canonical_reason().unwrap_or("error")));
        body.insert("status".into(), json!(self.status.as_u16()));
        body.insert("detail".into(), json!(self.detail));
        body.extend(self.members);
        let mut response = (self.status, Value::Object(body).to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"kvtier\""),
            );
        }
        response
    }
}
