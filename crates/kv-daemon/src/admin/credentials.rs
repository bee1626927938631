//! The routes of `/v1/tokens`.

use std::time::SystemTime;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::input::{JsonBody, PathPart};
use super::problem::Problem;
use super::tokens::{NewToken, TokenError};
use super::{Admin, blocking, json_response};

impl From<TokenError> for Problem {
    fn from(error: TokenError) -> Problem {
        let status = match error {
            TokenError::Invalid(_) => StatusCode::BAD_REQUEST,
            TokenError::Unknown(_) => StatusCode::NOT_FOUND,
            TokenError::OfTheFile | TokenError::Full => StatusCode::CONFLICT,
            TokenError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Problem::new(status, error.to_string())
    }
}

pub(super) async fn create(State(admin): State<Admin>, JsonBody(new): JsonBody<NewToken>) -> Result<Response, Problem> {
    let (status, secret) = blocking(move || admin.tokens().create(new, SystemTime::now())).await??;
    let mut body = json!(status);
    body["token"] = json!(secret);
    let mut response = json_response(&body);
    *response.status_mut() = StatusCode::CREATED;
    // It is shown this once: no cache may show it again.
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

pub(super) async fn list(State(admin): State<Admin>) -> Response {
    json_response(&json!({ "tokens": admin.tokens().list() }))
}

pub(super) async fn revoke(State(admin): State<Admin>, PathPart(id): PathPart<String>) -> Result<Response, Problem> {
    blocking(move || admin.tokens().revoke(&id)).await??;
    Ok(StatusCode::NO_CONTENT.into_response())
}
