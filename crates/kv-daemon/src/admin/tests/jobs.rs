//! Purges, receipts, namespaces and tokens, as an administrator uses them.

use axum::http::StatusCode;
use kvtier::purge::PurgeError;
use serde_json::{Value, json};

use super::served::{ADMIN, Served, purge};
use crate::admin::access::Role;

#[tokio::test]
async fn a_purge_is_made_once_found_by_its_location_and_ends_with_a_receipt() {
    let served = Served::new(&["red/a", "blue/b"]);
    let token = served.token(Role::Purge, None);
    let body = json!({"namespace": "a", "scope": {"label": "doc-7"}, "mode": "physical", "request_id": "r 1", "reason": "why"});
    let made = served.send("POST", &token, "/v1/purges", &body).await;
    assert_eq!(made.status, StatusCode::CREATED, "{made:?}");
    let job = made.json();
    assert_eq!(job["namespace"], "red/a", "a bare name becomes the full one");
    assert_eq!(
        (&job["scope"], &job["mode"]),
        (&json!({"label": "doc-7"}), &json!("physical"))
    );
    let location = made.header("location").to_string();
    assert_eq!(location, format!("/v1/purges/{}", job["id"].as_str().unwrap()));

    let mut full = body.clone();
    full["namespace"] = json!("red/a");
    for again in [&body, &full] {
        let answer = served.send("POST", &token, "/v1/purges", again).await;
        assert_eq!(
            (answer.status, answer.json()),
            (StatusCode::OK, job.clone()),
            "asked again"
        );
        assert_eq!(answer.header("location"), location);
    }
    assert_eq!(served.fake.changes(), ["purge red/a"]);

    assert_eq!(served.get(&token, &location).await.json(), job);
    let receipt_path = format!("{location}/receipt");
    let early = served.get(&token, &receipt_path).await;
    assert!(early.problem(404).contains("no receipt yet"));
    assert_eq!(early.json()["state"], "invalidated");
    let receipt = r#"{"b":1,"a":  "as it was signed"}"#;
    served.fake.complete(job["id"].as_str().unwrap(), receipt);
    let answer = served.get(&token, &receipt_path).await;
    assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, receipt));

    let other = served.send("POST", &token, "/v1/purges", &purge("b", "r2")).await;
    assert_eq!(other.status, StatusCode::CREATED);
    for (query, expected) in [
        ("", 2),
        ("?namespace=a", 1),
        ("?namespace=red/a", 1),
        ("?namespace=blue%2Fb", 1),
    ] {
        let list = served.get(&token, &format!("/v1/purges{query}")).await;
        assert_eq!(list.json()["purges"].as_array().unwrap().len(), expected, "{query}");
    }
    served.get(&token, "/v1/purges?namespace=nobody").await.problem(404);
    served.get(&token, "/v1/purges?name=a").await.problem(400);
    served.get(&token, "/v1/purges/prg_0").await.problem(404);
}

#[tokio::test]
async fn every_scope_and_default_comes_through_as_it_was_meant() {
    let served = Served::new(&["red/a"]);
    let hex = |digits: usize| "0aF".repeat(digits)[..digits].to_string();
    for (number, scope) in [
        json!("all"),
        json!({"realization": hex(64)}),
        json!({"hashes": [hex(32), hex(32)]}),
        json!({"label": "l"}),
    ]
    .into_iter()
    .enumerate()
    {
        let mut body = purge("red/a", &format!("r{number}"));
        body["scope"] = scope.clone();
        let job = served.send("POST", ADMIN, "/v1/purges", &body).await.json();
        assert_eq!(job["scope"], scope);
    }
    let job = served
        .send("POST", ADMIN, "/v1/purges", &purge("red/a", "defaults"))
        .await
        .json();
    assert_eq!(
        (&job["scope"], &job["mode"], &job["reach"], &job["reason"]),
        (&json!("all"), &json!("invalidate"), &Value::Null, &json!(""))
    );
}

#[tokio::test]
async fn what_the_engine_refuses_keeps_its_meaning() {
    let served = Served::new(&["red/a"]);
    for (error, status) in [
        (PurgeError::Invalid("no".into()), 400),
        (PurgeError::Busy("full".into()), 503),
        (PurgeError::Unavailable("disk".into()), 503),
    ] {
        served.fake.refuse(Some(error.clone()));
        let answer = served.send("POST", ADMIN, "/v1/purges", &purge("red/a", "r")).await;
        assert_eq!(answer.problem(status), error.to_string());
        assert_eq!(answer.headers.contains_key("retry-after"), status == 503);
    }
}

#[tokio::test]
async fn a_namespace_is_shown_and_set_by_any_spelling_of_its_name() {
    let served = Served::new(&["red/a", "red/x/y", "blue/b", "red/b"]);
    let names = served.get(ADMIN, "/v1/namespaces").await.json();
    assert_eq!(names["namespaces"].as_array().unwrap().len(), 4);
    for path in ["/v1/namespaces/a", "/v1/namespaces/red/a", "/v1/namespaces/red%2Fa"] {
        assert_eq!(served.get(ADMIN, path).await.json()["namespace"], "red/a", "{path}");
        let settings = json!({"quota_bytes": 7, "labels": {"team": path}});
        let set = served.send("PUT", ADMIN, path, &settings).await;
        assert_eq!(set.status, StatusCode::OK, "{set:?}");
        assert_eq!(set.json()["labels"]["team"], path);
    }
    let slashed = served.get(ADMIN, "/v1/namespaces/red/x%2Fy").await;
    assert_eq!(slashed.json()["namespace"], "red/x/y");
    let cleared = served.send("PUT", ADMIN, "/v1/namespaces/red/a", &json!({})).await;
    assert_eq!(cleared.json()["quota_bytes"], Value::Null);
    let words = served.get(ADMIN, "/v1/namespaces/b").await.problem(400);
    assert!(words.contains("blue/b or red/b"), "{words}");
    for path in ["/v1/namespaces/green/a", "/v1/namespaces/c"] {
        served.get(ADMIN, path).await.problem(404);
        served.send("PUT", ADMIN, path, &json!({})).await.problem(404);
    }
    let before = served.fake.changes().len();
    let labels: serde_json::Map<String, Value> = (0..17).map(|key| (key.to_string(), json!(""))).collect();
    for wrong in [
        json!({"labels": labels}),
        json!({"labels": {"": "x"}}),
        json!({"labels": {"x": "y".repeat(65)}}),
        json!({"quota_bytes": -1}),
        json!({"quota": 1}),
    ] {
        served
            .send("PUT", ADMIN, "/v1/namespaces/red/a", &wrong)
            .await
            .problem(400);
    }
    assert_eq!(served.fake.changes().len(), before);
}

#[tokio::test]
async fn tokens_are_made_listed_without_themselves_and_revoked() {
    let served = Served::new(&["red/a"]);
    let new = json!({"role": "read", "namespaces": ["red/a"], "label": "l", "expires_at": "2999-01-01T00:00:00Z"});
    let made = served.send("POST", ADMIN, "/v1/tokens", &new).await;
    assert_eq!(made.status, StatusCode::CREATED, "{made:?}");
    assert_eq!(made.header("cache-control"), "no-store");
    let (id, secret) = (
        made.json()["id"].clone(),
        made.json()["token"].as_str().unwrap().to_string(),
    );
    assert_eq!(served.get(&secret, "/v1/namespaces").await.status, StatusCode::OK);
    let list = served.get(ADMIN, "/v1/tokens").await;
    assert_eq!(list.json()["tokens"].as_array().unwrap().len(), 2);
    assert!(!list.body.contains(&secret[4..]) && !list.body.contains(ADMIN) && !list.body.contains("sha256"));
    let path = format!("/v1/tokens/{}", id.as_str().unwrap());
    let gone = served.ask("DELETE", &path, ADMIN, "", axum::body::Body::empty()).await;
    assert_eq!(gone.status, StatusCode::NO_CONTENT);
    served.get(&secret, "/v1/namespaces").await.problem(401);
    let delete = async |path: &str| served.ask("DELETE", path, ADMIN, "", axum::body::Body::empty()).await;
    delete(&path).await.problem(404);
    delete("/v1/tokens/tok_admin").await.problem(409);
    for wrong in [
        json!({}),
        json!({"role": "root"}),
        json!({"role": "read", "namespaces": []}),
        json!({"role": "read", "expires_at": "soon"}),
        json!({"role": "read", "token": "mine"}),
    ] {
        served.send("POST", ADMIN, "/v1/tokens", &wrong).await.problem(400);
    }
    assert_eq!(
        served.get(ADMIN, "/v1/tokens").await.json()["tokens"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let log = serde_json::to_string(&served.audited()).unwrap();
    assert!(
        !log.contains(&secret[4..]) && !log.contains(ADMIN),
        "a token is in the audit log"
    );
}

#[tokio::test]
async fn what_is_public_asks_for_no_token() {
    let served = Served::new(&[]);
    assert_eq!(served.get("", "/healthz").await.status, StatusCode::OK);
    served.get("", "/readyz").await.problem(503);
    let keys = served.get("", "/v1/keys").await;
    assert_eq!(keys.header("content-type"), "application/jwk-set+json");
    assert_eq!(served.get("", "/v1/openapi.json").await.json()["openapi"], "3.1.0");
    assert_eq!(served.audited(), Vec::<Value>::new());
}
