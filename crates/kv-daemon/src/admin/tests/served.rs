//! A router over the fake, asked in memory. Every answer is checked against the OpenAPI document.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tower::ServiceExt;

use super::fake::Fake;
use crate::admin::access::Role;
use crate::admin::audit::{AUDIT_FILE, AuditLog};
use crate::admin::host::HostNames;
use crate::admin::purges::Purges;
use crate::admin::rate::{Limits, Rate};
use crate::admin::routes::{DOCUMENT, routes};
use crate::admin::tokens::{NewToken, TokenRegister};
use crate::admin::{Admin, Parts};

pub(crate) const ADMIN: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

const OFTEN: Rate = Rate {
    per_second: 1e6,
    burst: 1e6,
};

pub(crate) struct Served {
    pub(crate) admin: Admin,
    pub(crate) fake: Arc<Fake>,
    pub(crate) directory: TempDir,
    router: Router,
    document: Value,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or("")
    }

    /// The detail of a problem of this status.
    pub(crate) fn problem(&self, status: u16) -> String {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        assert_eq!(self.header("content-type"), "application/problem+json");
        let body = self.json();
        assert_eq!(body["status"], status);
        body["detail"].as_str().expect("a detail").to_string()
    }
}

impl Served {
    pub(crate) fn new(namespaces: &[&str]) -> Served {
        Served::limited(namespaces, OFTEN, OFTEN)
    }

    pub(crate) fn limited(namespaces: &[&str], rate: Rate, failures: Rate) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let fake = Fake::with(namespaces);
        let purges = Arc::clone(&fake);
        let (audit, warnings) = AuditLog::open(directory.path(), 1 << 20).unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        let admin = Admin::new(Parts {
            tokens: TokenRegister::open(directory.path(), ADMIN).unwrap(),
            audit,
            limits: Limits::new(rate, failures),
            hosts: HostNames::new("127.0.0.1:1".parse().unwrap(), None),
            event_subscribers_max: 2,
            purges: Box::new(move |_| Some(Arc::clone(&purges) as Arc<dyn Purges>)),
        });
        Served {
            router: admin.router(),
            admin,
            fake,
            directory,
            document: serde_json::from_str(DOCUMENT).unwrap(),
        }
    }

    /// A new token.
    pub(crate) fn token(&self, role: Role, namespaces: Option<&[&str]>) -> String {
        let new = NewToken {
            role,
            namespaces: namespaces.map(|names| names.iter().map(ToString::to_string).collect()),
            label: String::new(),
            expires_at: None,
        };
        self.admin.tokens().create(new, SystemTime::now()).unwrap().1
    }

    pub(crate) async fn get(&self, token: &str, path: &str) -> Answer {
        self.ask("GET", path, token, "", Body::empty()).await
    }

    pub(crate) async fn send(&self, method: &str, token: &str, path: &str, body: &Value) -> Answer {
        let body = Body::from(body.to_string());
        self.ask(method, path, token, "application/json", body).await
    }

    pub(crate) async fn ask(&self, method: &str, path: &str, token: &str, kind: &str, body: Body) -> Answer {
        let mut request = Request::builder().method(method).uri(path).header("host", "localhost");
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if !kind.is_empty() {
            request = request.header("content-type", kind);
        }
        let response = self.raw(request.body(body).unwrap()).await;
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        let answer = Answer {
            status: parts.status,
            headers: parts.headers,
            body: String::from_utf8(bytes.to_vec()).unwrap(),
        };
        self.check(method, path, &answer);
        answer
    }

    pub(crate) async fn raw(&self, request: Request<Body>) -> axum::response::Response {
        self.router.clone().oneshot(request).await.unwrap()
    }

    /// The lines of the audit log.
    pub(crate) fn audited(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.directory.path().join(AUDIT_FILE)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn check(&self, method: &str, path: &str, answer: &Answer) {
        let path = path.split('?').next().unwrap_or_default();
        let Some(template) = template_of(path) else {
            answer.problem(404);
            return;
        };
        let operation = &self.document["paths"][template][method.to_lowercase()];
        if operation.is_null() {
            answer.problem(405);
            return;
        }
        let status = answer.status.as_str();
        let mut response = &operation["responses"][status];
        if let Some(reference) = response["$ref"].as_str() {
            response = self.document.pointer(&reference[1..]).expect("what is referred to");
        }
        assert!(
            !response.is_null(),
            "{method} {template} may not answer {status}: {answer:?}"
        );
        for (name, header) in response["headers"].as_object().into_iter().flatten() {
            assert!(
                header["required"] != true || answer.headers.contains_key(name),
                "{name} of {answer:?}"
            );
        }
        let Some(content) = response["content"].as_object() else {
            assert!(answer.body.is_empty(), "{answer:?}");
            return;
        };
        let kind = answer
            .header("content-type")
            .split(';')
            .next()
            .unwrap_or_default()
            .to_string();
        let media = content
            .get(&kind)
            .unwrap_or_else(|| panic!("{method} {template}: {kind} of {answer:?}"));
        if !kind.ends_with("json") {
            return;
        }
        let mut schema = media["schema"].clone();
        schema["components"] = self.document["components"].clone();
        let validator = jsonschema::validator_for(&schema).unwrap();
        let body = answer.json();
        let errors: Vec<String> = validator
            .iter_errors(&body)
            .map(|error| format!("{error} at {}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{method} {template} {status}: {errors:?} in {body}");
    }
}

/// The path of the table that a request's path falls under; what is fixed in it goes before what is named.
fn template_of(path: &str) -> Option<&'static str> {
    let parts: Vec<&str> = path.split('/').collect();
    let fits = |template: &str| {
        let pattern: Vec<&str> = template.split('/').collect();
        pattern.len() == parts.len()
            && pattern
                .iter()
                .zip(&parts)
                .all(|(wanted, part)| wanted == part || (wanted.starts_with('{') && !part.is_empty()))
    };
    let mut found: Vec<&str> = routes()
        .iter()
        .map(|route| route.path)
        .filter(|path| fits(path))
        .collect();
    found.sort_by_key(|path| path.matches('{').count());
    found.first().copied()
}

pub(crate) fn purge(namespace: &str, request_id: &str) -> Value {
    json!({"namespace": namespace, "request_id": request_id})
}
