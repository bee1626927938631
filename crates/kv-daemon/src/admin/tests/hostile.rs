//! Calls that must not work: the right status, a problem as body, a line in the audit log, nothing changed.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::Request;
use serde_json::{Value, json};

use super::served::{ADMIN, Served, purge};
use crate::admin::access::Role;
use crate::admin::audit::AUDIT_FILE;
use crate::admin::guard::Access;
use crate::admin::rate::Rate;
use crate::admin::routes::routes;

#[tokio::test]
async fn what_cannot_be_a_purge_is_refused_by_name_and_changes_nothing() {
    let served = Served::new(&["red/a"]);
    let with = |member: &str, value: Value| {
        let mut body = purge("red/a", "r");
        body[member] = value;
        body
    };
    for (body, field) in [
        (with("namespaces", json!("x")), "namespaces"),
        (with("request_id", json!("")), "request_id"),
        (with("request_id", json!("a\nb")), "request_id"),
        (with("request_id", json!("ü")), "request_id"),
        (with("request_id", json!("r".repeat(129))), "request_id"),
        (with("reason", json!("r".repeat(1025))), "reason"),
        (with("namespace", json!("")), "namespace"),
        (with("namespace", json!("n".repeat(1025))), "namespace"),
        (with("scope", json!({"hashes": []})), "scope"),
        (with("scope", json!({"hashes": ["00"]})), "scope"),
        (with("scope", json!({"realization": "z".repeat(64)})), "scope"),
        (with("scope", json!({"label": ""})), "scope"),
    ] {
        let answer = served.send("POST", ADMIN, "/v1/purges", &body).await;
        assert!(answer.problem(400).contains(field), "{answer:?}");
        assert_eq!(answer.json()["field"], field);
    }
    for body in [
        with("scope", json!({"hashes": "all"})),
        with("scope", json!({"everything": 1})),
        with("scope", json!({"label": "a", "hashes": []})),
        with("mode", json!("burn")),
        with("reach", json!("galaxy")),
        with("namespace", json!(7)),
        json!({"namespace": "red/a"}),
        json!([]),
        json!("red/a"),
    ] {
        served.send("POST", ADMIN, "/v1/purges", &body).await.problem(400);
    }
    for text in ["", "{", "nul", "{\"namespace\": \"red/a\",}", "{\"a\":", "\u{0}"] {
        let answer = served
            .ask("POST", "/v1/purges", ADMIN, "application/json", Body::from(text))
            .await;
        answer.problem(400);
    }
    let deep = format!("{}{}", "[".repeat(30_000), "]".repeat(30_000));
    let answer = served
        .ask("POST", "/v1/purges", ADMIN, "application/json", Body::from(deep))
        .await;
    answer.problem(400);
    assert_eq!(served.fake.changes(), Vec::<String>::new());
}

#[tokio::test]
async fn a_body_that_is_not_json_or_too_long_is_refused() {
    let served = Served::new(&["red/a"]);
    let body = purge("red/a", "r").to_string();
    for kind in [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonx",
    ] {
        let answer = served
            .ask("POST", "/v1/purges", ADMIN, kind, Body::from(body.clone()))
            .await;
        answer.problem(415);
    }
    let long = |length: usize| Body::from(Bytes::from(vec![b' '; length]));
    for length in [(64 << 10) + 1, 10_000_000] {
        for kind in ["application/json", "text/plain"] {
            let answer = served.ask("POST", "/v1/purges", ADMIN, kind, long(length)).await;
            assert!(answer.problem(413).contains("64 KiB"));
        }
        served
            .ask("POST", "/v1/purges", "wrong", "application/json", long(length))
            .await
            .problem(401);
        served.ask("GET", "/healthz", "", "", long(length)).await.problem(413);
    }
    assert_eq!(served.fake.changes(), Vec::<String>::new());
    let mut padded = body;
    padded.push_str(&" ".repeat((64 << 10) - padded.len()));
    let fits = served
        .ask(
            "POST",
            "/v1/purges",
            ADMIN,
            "application/json; charset=utf-8",
            Body::from(padded),
        )
        .await;
    assert_eq!(fits.status.as_u16(), 201, "64 KiB to the byte: {fits:?}");
}

#[tokio::test]
async fn a_replayed_request_id_with_another_body_is_a_conflict() {
    let served = Served::new(&["red/a", "red/b"]);
    let first = served
        .send("POST", ADMIN, "/v1/purges", &purge("red/a", "r"))
        .await
        .json();
    let before = served.fake.changes();
    for (member, value) in [
        ("namespace", json!("red/b")),
        ("mode", json!("physical")),
        ("reason", json!("another")),
        ("scope", json!({"label": "l"})),
        ("reach", json!("cluster")),
    ] {
        let mut body = purge("red/a", "r");
        body[member] = value;
        let answer = served.send("POST", ADMIN, "/v1/purges", &body).await;
        answer.problem(409);
        assert_eq!(answer.json()["purge"], first["id"]);
    }
    assert_eq!(served.fake.changes(), before);
}

#[tokio::test]
async fn without_the_token_or_the_role_no_route_does_anything() {
    let served = Served::new(&["red/a"]);
    let tokens = [Role::Read, Role::Purge, Role::Admin].map(|role| (role, served.token(role, None)));
    for route in routes() {
        let path = route
            .path
            .replace("{domain}", "red")
            .replace("{name}", "a")
            .replace("{id}", "prg_1");
        let role = match route.access {
            Access::Anyone => continue,
            Access::Token(role) | Access::WholeNode(role) => role,
        };
        let method = route.method.as_str();
        for wrong in ["", "0", &ADMIN[1..], &format!("{ADMIN}0"), &ADMIN.to_uppercase()] {
            let answer = served
                .ask(method, &path, wrong, "application/json", Body::from("{}"))
                .await;
            answer.problem(401);
            assert!(answer.header("www-authenticate").starts_with("Bearer"));
        }
        for (has, token) in tokens.iter().filter(|(has, _)| *has < role) {
            let answer = served
                .ask(method, &path, token, "application/json", Body::from("{}"))
                .await;
            let words = answer.problem(403);
            assert!(words.contains(role.word()) && words.contains(has.word()), "{words}");
        }
    }
    for scheme in ["Basic", "bearertoken", ""] {
        let request = Request::get("/v1/namespaces").header("host", "localhost");
        let request = request.header("authorization", format!("{scheme} {ADMIN}"));
        let response = served.raw(request.body(Body::empty()).unwrap()).await;
        assert_eq!(response.status(), 401, "{scheme}");
    }
    assert_eq!(served.fake.changes(), Vec::<String>::new());
    let unauthenticated = served.audited().iter().filter(|line| line["status"] == 401).count();
    assert!(unauthenticated > 50);
    assert!(
        served.audited().iter().all(|line| line["stage"] == "outcome"),
        "nothing was meant to change"
    );
}

#[tokio::test]
async fn other_paths_methods_and_hosts_are_problems_too() {
    let served = Served::new(&["red/a"]);
    for path in [
        "/",
        "/v1",
        "/v1/purges/",
        "/v1/purges/a/b/c",
        "/v2/purges",
        "/v1/namespaces/a/b/c/d",
    ] {
        served.get(ADMIN, path).await.problem(404);
    }
    for (method, path) in [
        ("DELETE", "/v1/purges"),
        ("PATCH", "/v1/namespaces/a"),
        ("POST", "/healthz"),
    ] {
        let answer = served.ask(method, path, ADMIN, "", Body::empty()).await;
        answer.problem(405);
        assert!(answer.header("allow").contains("GET"), "{answer:?}");
    }
    served.get(ADMIN, "/v1/namespaces/%ff").await.problem(400);
    for host in ["evil.example", "127.0.0.1.evil.example:80"] {
        let request = Request::get("/healthz")
            .header("host", host)
            .body(Body::empty())
            .unwrap();
        assert_eq!(served.raw(request).await.status(), 421);
    }
    let without = Request::get("/healthz").body(Body::empty()).unwrap();
    assert_eq!(served.raw(without).await.status(), 421);
}

#[tokio::test]
async fn too_many_calls_are_refused_for_a_while_and_counted_in_the_log() {
    let slow = Rate {
        per_second: 0.01,
        burst: 3.0,
    };
    let served = Served::limited(&["red/a"], slow, slow);
    let other = served.token(Role::Purge, None);
    for round in 0..6 {
        let answer = served
            .send("POST", ADMIN, "/v1/purges", &purge("red/a", &format!("r{round}")))
            .await;
        if round < 3 {
            assert_eq!(answer.status.as_u16(), 201);
        } else {
            answer.problem(429);
            assert!(answer.header("retry-after").parse::<u64>().unwrap() > 1);
        }
        let answer = served.get("wrong", "/v1/namespaces").await;
        answer.problem(if round < 3 { 401 } else { 429 });
    }
    assert_eq!(served.fake.changes().len(), 3);
    assert_eq!(
        served.get(&other, "/v1/namespaces").await.status.as_u16(),
        200,
        "others go on"
    );
    assert!(served.audited().iter().all(|line| line["status"] != 429));
}

#[tokio::test]
async fn each_call_is_in_the_log_before_it_is_answered_and_a_change_before_it_is_made() {
    let served = Served::new(&["red/a"]);
    let token = served.token(Role::Purge, Some(&["a"]));
    served.send("POST", &token, "/v1/purges", &purge("a", "r1")).await;
    served
        .get(&token, "/v1/purges/prg_00000000000000000000000000000001")
        .await;
    served.get("wrong", "/v1/purges").await;
    served
        .send("POST", &token, "/v1/tokens", &json!({"role": "admin"}))
        .await
        .problem(403);
    let log = served.audited();
    let seen: Vec<(&str, &str, Option<u64>)> = log
        .iter()
        .map(|line| {
            let text = |name: &str| line[name].as_str().unwrap_or("-");
            (text("stage"), text("namespace"), line["status"].as_u64())
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("intent", "a", None),
            ("outcome", "red/a", Some(201)),
            ("outcome", "red/a", Some(200)),
            ("outcome", "-", Some(401)),
            ("outcome", "-", Some(403)),
        ]
    );
    let first = &log[0];
    assert_eq!(
        (&first["request_id"], &first["role"], &first["method"]),
        (&json!("r1"), &json!("purge"), &json!("POST"))
    );
    assert!(first["token"].as_str().unwrap().starts_with("tok_") && log[3]["token"].is_null());
}

#[tokio::test]
async fn a_call_that_cannot_be_logged_is_not_done() {
    let served = Served::new(&["red/a"]);
    assert_eq!(served.get(ADMIN, "/v1/namespaces").await.status.as_u16(), 200);
    // Past its size the log goes on in a new file, and a directory is in the way of the old one's name.
    let path = served.directory.path().join(AUDIT_FILE);
    served.admin.fill_audit_log();
    std::fs::create_dir(served.directory.path().join(format!("audit-{:020}.jsonl", 1))).unwrap();
    for _ in 0..2 {
        let answer = served.send("POST", ADMIN, "/v1/purges", &purge("red/a", "r")).await;
        assert!(answer.problem(503).contains("audit log"), "{answer:?}");
        served.get(ADMIN, "/v1/namespaces").await.problem(503);
    }
    assert_eq!(served.fake.changes(), Vec::<String>::new());
    std::fs::remove_dir(served.directory.path().join(format!("audit-{:020}.jsonl", 1))).unwrap();
    let answer = served.send("POST", ADMIN, "/v1/purges", &purge("red/a", "r")).await;
    assert_eq!(answer.status.as_u16(), 201, "it goes on when it can");
    assert!(path.exists());
}

#[tokio::test]
async fn a_caller_who_hangs_up_does_not_keep_the_outcome_out_of_the_log() {
    let served = Served::new(&["red/a"]);
    served.fake.slow_down(Duration::from_millis(200));
    let body = purge("red/a", "r");
    let asked = served.send("POST", ADMIN, "/v1/purges", &body);
    let gone = tokio::time::timeout(Duration::from_millis(50), asked).await;
    assert!(gone.is_err(), "it takes longer");
    for _ in 0..100 {
        if served.audited().len() == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(served.audited()[1]["status"], 201);
    assert_eq!(served.fake.changes().len(), 1);
}
