//! What a token that is bound to namespaces sees of the others: nothing.

use axum::body::Body;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::served::{ADMIN, Served, purge};
use crate::admin::access::Role;

#[tokio::test]
async fn a_foreign_namespace_is_answered_as_one_that_does_not_exist() {
    let served = Served::new(&["red/a", "red/foreign"]);
    let token = served.token(Role::Admin, Some(&["red/a"]));
    let job = served
        .send("POST", ADMIN, "/v1/purges", &purge("red/foreign", "theirs"))
        .await
        .json();
    let before = served.fake.changes();
    // "foreign" and "unknown" have the same length, so that the answers must be the same bytes but for the name.
    let unlike = |text: &str| text.replace("foreign", "unknown");
    for name in ["red/foreign", "foreign"] {
        let mut answers = Vec::new();
        for name in [name.to_string(), unlike(name)] {
            let path = format!("/v1/namespaces/{name}");
            let mut of_one = vec![
                served.get(&token, &path).await,
                served.send("PUT", &token, &path, &json!({})).await,
                served.get(&token, &format!("/v1/purges?namespace={name}")).await,
                served.send("POST", &token, "/v1/purges", &purge(&name, "theirs")).await,
                served.send("POST", &token, "/v1/purges", &purge(&name, "new")).await,
            ];
            for answer in &mut of_one {
                answer.problem(404);
                answer.headers.remove("date");
            }
            answers.push(of_one);
        }
        let (foreign, unknown) = (&answers[0], &answers[1]);
        for (foreign, unknown) in foreign.iter().zip(unknown) {
            assert_eq!(unlike(&foreign.body), unknown.body);
            assert_eq!(foreign.headers, unknown.headers);
        }
    }
    let id = job["id"].as_str().unwrap();
    let missing = "prg_ffffffffffffffffffffffffffffffff";
    for suffix in ["", "/receipt"] {
        let foreign = served.get(&token, &format!("/v1/purges/{id}{suffix}")).await;
        let unknown = served.get(&token, &format!("/v1/purges/{missing}{suffix}")).await;
        assert_eq!(foreign.problem(404).replace(id, missing), unknown.problem(404));
    }
    assert_eq!(served.fake.changes(), before, "nothing was changed");
}

#[tokio::test]
async fn lists_hold_only_what_a_token_is_bound_to() {
    let served = Served::new(&["red/a", "red/b", "blue/a", "blue/c"]);
    for (number, name) in ["red/a", "red/b", "blue/a"].iter().enumerate() {
        let made = served
            .send("POST", ADMIN, "/v1/purges", &purge(name, &number.to_string()))
            .await;
        assert_eq!(made.status, StatusCode::CREATED);
    }
    let seen = |list: Value, key: &str| -> Vec<String> {
        let items = list[key].as_array().unwrap().iter();
        items
            .map(|item| item["namespace"].as_str().unwrap().to_string())
            .collect()
    };
    for (bound, namespaces, purges) in [
        (vec!["red/a"], vec!["red/a"], vec!["red/a"]),
        (vec!["a"], vec!["blue/a", "red/a"], vec!["red/a", "blue/a"]),
        (vec!["blue/c", "red/b"], vec!["blue/c", "red/b"], vec!["red/b"]),
        (vec!["green"], vec![], vec![]),
    ] {
        let token = served.token(Role::Read, Some(&bound));
        assert_eq!(
            seen(served.get(&token, "/v1/namespaces").await.json(), "namespaces"),
            namespaces
        );
        assert_eq!(
            seen(served.get(&token, "/v1/purges").await.json(), "purges"),
            purges,
            "{bound:?}"
        );
    }
    // Of a name in two domains, a bound token sees its own, so that there is nothing to choose.
    let token = served.token(Role::Read, Some(&["red/a"]));
    assert_eq!(
        served.get(&token, "/v1/namespaces/a").await.json()["namespace"],
        "red/a"
    );
    assert_eq!(
        seen(served.get(&token, "/v1/purges?namespace=a").await.json(), "purges"),
        ["red/a"]
    );
}

#[tokio::test]
async fn a_request_id_of_somebody_else_is_taken_and_no_more_is_said() {
    let served = Served::new(&["red/a", "red/b"]);
    let theirs = served
        .send("POST", ADMIN, "/v1/purges", &purge("red/b", "same"))
        .await
        .json();
    let token = served.token(Role::Purge, Some(&["red/a"]));
    let answer = served.send("POST", &token, "/v1/purges", &purge("red/a", "same")).await;
    let words = answer.problem(409);
    assert!(words.contains("choose a new"), "{words}");
    assert!(!answer.body.contains(theirs["id"].as_str().unwrap()) && !answer.body.contains("red/b"));
}

#[tokio::test]
async fn the_whole_node_is_not_for_bound_tokens() {
    let served = Served::new(&["red/a"]);
    let token = served.token(Role::Admin, Some(&["red/a"]));
    for (method, path) in [
        ("GET", "/metrics"),
        ("GET", "/v1/status"),
        ("POST", "/v1/flush"),
        ("GET", "/v1/tokens"),
        ("POST", "/v1/tokens"),
        ("DELETE", "/v1/tokens/tok_1"),
    ] {
        let answer = served
            .ask(method, path, &token, "application/json", Body::from("{}"))
            .await;
        assert!(answer.problem(403).contains("bound to no namespace"), "{path}");
    }
}
