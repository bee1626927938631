//! What callers send, read into what handlers take: every refusal is a problem that names what is wrong.

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use serde::de::DeserializeOwned;

use super::Admin;
use super::problem::Problem;

/// A JSON body.
pub(super) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Admin> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, admin: &Admin) -> Result<JsonBody<T>, Problem> {
        if !is_json(request.headers()) {
            let words = "send the body as JSON, with \"Content-Type: application/json\"";
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, words));
        }
        let bytes = Bytes::from_request(request, admin)
            .await
            .map_err(|_| Problem::invalid("the body ended early"))?;
        serde_json::from_slice(&bytes).map(JsonBody).map_err(|error| {
            let words = error.to_string();
            let problem = Problem::invalid(format!("the body cannot be read: {words}"));
            match words
                .strip_prefix("unknown field `")
                .and_then(|rest| rest.split_once('`'))
            {
                Some((field, _)) => problem.with("field", field),
                None => problem,
            }
        })
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else {
        return false;
    };
    let kind = kind.split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("application/json")
}

/// Parts of the path, with `%XX` read.
pub(super) struct PathPart<T>(pub(super) T);

impl<T: DeserializeOwned + Send> FromRequestParts<Admin> for PathPart<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, admin: &Admin) -> Result<PathPart<T>, Problem> {
        match Path::<T>::from_request_parts(parts, admin).await {
            Ok(Path(value)) => Ok(PathPart(value)),
            Err(rejection) => Err(Problem::invalid(format!(
                "the path cannot be read: {}",
                rejection.body_text()
            ))),
        }
    }
}

/// What stands behind the `?`.
pub(super) struct QueryOf<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<Admin> for QueryOf<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, admin: &Admin) -> Result<QueryOf<T>, Problem> {
        match Query::<T>::from_request_parts(parts, admin).await {
            Ok(Query(value)) => Ok(QueryOf(value)),
            Err(rejection) => Err(Problem::invalid(format!(
                "the query cannot be read: {}",
                rejection.body_text()
            ))),
        }
    }
}
