//! Requests that are refused, and change nothing.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use super::{NVME, answer, blocks, cached, jobs, purge, put};
use crate::daemon::{Daemon, PATIENCE};

/// One request: status, headers as they came, body.
fn ask(daemon: &Daemon, method: &str, path: &str, token: Option<&str>, body: &[u8]) -> (u16, String, Value) {
    let address = daemon.http_address();
    let mut stream = TcpStream::connect(&address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let authorization = token.map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"));
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{authorization}\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // The server may have heard enough before the end.
    let mut writer = stream.try_clone().unwrap();
    let body = body.to_vec();
    let writing = std::thread::spawn(move || writer.write_all(&body));
    let mut text = Vec::new();
    let mut bytes = [0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut bytes) {
        text.extend_from_slice(&bytes[..read]);
    }
    let _ = writing.join();
    let text = String::from_utf8_lossy(&text).into_owned();
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {text:?}"));
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap();
    let body = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"));
    (code, head.to_ascii_lowercase(), body)
}

fn token(daemon: &Daemon, role: &str, namespace: Option<&str>) -> String {
    let file = daemon.directory.path().join("token");
    let mut arguments = vec!["token", "create", "--role", role, "-o", file.to_str().unwrap()];
    arguments.extend(namespace.into_iter().flat_map(|name| ["--namespace", name]));
    answer(daemon, &arguments);
    let token = std::fs::read_to_string(&file).unwrap().trim().to_string();
    std::fs::remove_file(&file).unwrap();
    token
}

fn request(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut request = json!({"namespace": "mine", "mode": "physical", "request_id": "refused"});
    change(&mut request);
    request.to_string().into_bytes()
}

#[test]
fn what_is_refused_changes_nothing() {
    let daemon = Daemon::start(&NVME);
    put(&daemon, "mine", &blocks("mine"));
    put(&daemon, "other", &blocks("other"));
    put(&daemon, "purged", &blocks("purged"));
    let done = purge(&daemon, &["purged", "--request-id", "used", "--reason", "first"]);
    let admin = daemon.token();
    let reader = token(&daemon, "read", None);
    let bound = token(&daemon, "purge", Some("other"));
    let state = || (answer(&daemon, &["namespace", "list"]), jobs(&daemon));
    let before = state();

    let long = "x".repeat(10_000_000);
    let good = || request(|_| ());
    let with = |field: &'static str, value: Value| request(|request| request[field] = value);
    let replayed = |reason: &str, mode: &str| {
        json!({"namespace": "purged", "request_id": "used", "reason": reason, "mode": mode})
            .to_string()
            .into_bytes()
    };
    let admin = Some(admin.as_str());
    let zeros = "0".repeat(64);
    let cases: Vec<(&str, Option<&str>, Vec<u8>, u16)> = vec![
        ("no token", None, good(), 401),
        ("a wrong token", Some(&zeros), good(), 401),
        ("a reader's token", Some(&reader), good(), 403),
        ("a token of another namespace", Some(&bound), good(), 404),
        ("an unknown namespace", admin, with("namespace", json!("unknown")), 404),
        (
            "an unknown domain",
            admin,
            with("namespace", json!("nowhere/mine")),
            404,
        ),
        ("a name of another kind", admin, with("namespace", json!(7)), 400),
        ("no name", admin, with("namespace", json!("")), 400),
        ("a body of 10 MB", admin, with("reason", json!(long)), 413),
        (
            "malformed JSON",
            admin,
            b"{\"namespace\": \"mine\", \"request_id\"".to_vec(),
            400,
        ),
        ("no JSON", admin, b"\xff\xfe".to_vec(), 400),
        ("no body", admin, Vec::new(), 400),
        ("an unknown field", admin, with("force", json!(true)), 400),
        ("an unknown mode", admin, with("mode", json!("gently")), 400),
        (
            "an unknown scope",
            admin,
            with("scope", json!({"everything": true})),
            400,
        ),
        (
            "two scopes",
            admin,
            with("scope", json!({"hashes": [&zeros[..32]], "realization": zeros})),
            400,
        ),
        ("no hash", admin, with("scope", json!({"hashes": []})), 400),
        (
            "a short hash",
            admin,
            with("scope", json!({"hashes": [&zeros[..31]]})),
            400,
        ),
        (
            "a hash that is no hex",
            admin,
            with("scope", json!({"hashes": ["g".repeat(32)]})),
            400,
        ),
        (
            "one good hash and one bad",
            admin,
            with("scope", json!({"hashes": [&zeros[..32], "bad"]})),
            400,
        ),
        (
            "a realization that is none",
            admin,
            with("scope", json!({"realization": "ab"})),
            400,
        ),
        ("an empty label", admin, with("scope", json!({"label": ""})), 400),
        (
            "a long label",
            admin,
            with("scope", json!({"label": "l".repeat(1025)})),
            400,
        ),
        ("a cluster that is none", admin, with("reach", json!("cluster")), 400),
        ("no request id", admin, with("request_id", json!("")), 400),
        (
            "a long request id",
            admin,
            with("request_id", json!("i".repeat(129))),
            400,
        ),
        (
            "a request id in other letters",
            admin,
            with("request_id", json!("né")),
            400,
        ),
        ("a long reason", admin, with("reason", json!("r".repeat(1025))), 400),
        (
            "a replay with another reason",
            admin,
            replayed("second", "invalidate"),
            409,
        ),
        ("a replay with another mode", admin, replayed("first", "physical"), 409),
        (
            "a replay for another namespace",
            admin,
            with("request_id", json!("used")),
            409,
        ),
    ];
    for (what, token, body, expected) in cases {
        let (code, head, problem) = ask(&daemon, "POST", "/v1/purges", token, &body);
        assert_eq!(code, expected, "{what}: {head}\n{problem}");
        assert!(
            head.contains("content-type: application/problem+json"),
            "{what}: {head}"
        );
        assert_eq!(problem["status"], expected, "{what}: {problem}");
        assert!(
            problem["detail"].as_str().is_some_and(|words| words.len() > 8),
            "{what}: {problem}"
        );
    }
    for (method, path, expected) in [
        ("GET", "/v1/purges/prg_unknown", 404),
        ("GET", "/v1/purges/prg_unknown/receipt", 404),
        ("GET", "/v1/purges?namespace=unknown", 404),
        ("DELETE", "/v1/purges", 405),
        ("PUT", "/v1/namespaces/unknown", 404),
        ("POST", "/v1/namespaces/unknown/advance", 404),
    ] {
        let body = if method == "PUT" { &b"{}"[..] } else { b"" };
        let (code, head, problem) = ask(&daemon, method, path, admin, body);
        assert_eq!(code, expected, "{method} {path}: {problem}");
        assert!(
            head.contains("content-type: application/problem+json"),
            "{path}: {head}"
        );
    }
    let (code, _, found) = ask(&daemon, "GET", "/v1/purges", Some(&bound), b"");
    assert_eq!(
        (code, &found),
        (200, &json!({"purges": []})),
        "others' purges are nobody's"
    );
    let of_others = format!("/v1/purges/{}/receipt", done["purge"].as_str().unwrap());
    assert_eq!(ask(&daemon, "GET", &of_others, Some(&bound), b"").0, 404);

    assert_eq!(state(), before);
    assert_eq!(cached(&daemon, "mine", &blocks("mine")), [true; 3]);
    assert_eq!(cached(&daemon, "other", &blocks("other")), [true; 3]);
    assert_eq!(super::verified_receipts(&daemon).len(), 1);

    // The same once more is no replay; and who may purge one namespace may do so.
    let again = replayed("first", "invalidate");
    let (code, _, job) = ask(&daemon, "POST", "/v1/purges", admin, &again);
    assert_eq!((code, &job["id"]), (200, &done["purge"]));
    let body = with("namespace", json!("other"));
    let (code, head, job) = ask(&daemon, "POST", "/v1/purges", Some(&bound), &body);
    assert_eq!(code, 201, "{job}");
    assert!(
        head.contains(&format!("location: /v1/purges/{}", job["id"].as_str().unwrap())),
        "{head}"
    );
    assert_eq!(cached(&daemon, "other", &blocks("other")), [false; 3]);
    assert_eq!(cached(&daemon, "mine", &blocks("mine")), [true; 3]);
}
