//! Server-sent events.

use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use axum::response::Response;
use futures_core::Stream;

use super::served::{ADMIN, Served, purge};
use crate::admin::access::Role;

async fn listen(served: &Served, token: &str, after: Option<&str>) -> Response {
    let mut request = Request::get("/v1/events")
        .header("host", "localhost")
        .header("authorization", format!("Bearer {token}"));
    if let Some(after) = after {
        request = request.header("last-event-id", after);
    }
    served.raw(request.body(Body::empty()).unwrap()).await
}

/// What comes until `text` has, or for a while.
async fn read_until(body: Body, text: &str) -> String {
    let mut stream = Box::pin(body.into_data_stream());
    let mut all = String::new();
    let reading = async {
        while let Some(chunk) = std::future::poll_fn(|context| stream.as_mut().poll_next(context)).await {
            all.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
            if all.contains(text) {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(3), reading).await;
    all
}

#[tokio::test]
async fn a_job_that_changes_its_state_is_told_once_from_now_on_or_after_an_id() {
    let served = Served::new(&["red/a", "red/b"]);
    served
        .send("POST", ADMIN, "/v1/purges", &purge("red/a", "before"))
        .await;
    let response = listen(&served, ADMIN, None).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert!(
        response.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/event-stream")
    );
    let job = served
        .send("POST", ADMIN, "/v1/purges", &purge("red/a", "after"))
        .await
        .json();
    let id = job["id"].as_str().unwrap();
    served.fake.complete(id, "{}");
    let text = read_until(response.into_body(), "completed").await;
    assert!(
        text.contains("id: 2\n") && text.contains("id: 3\n") && !text.contains("id: 1\n"),
        "{text}"
    );
    assert_eq!(text.matches("event: purge").count(), 2, "{text}");
    assert!(text.contains(id) && text.contains("\"state\":\"completed\""), "{text}");

    for (after, expected) in [("1", vec!["2", "3"]), ("2", vec!["3"]), ("99", vec!["1", "2", "3"])] {
        let text = read_until(listen(&served, ADMIN, Some(after)).await.into_body(), "id: 3").await;
        let ids: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("id: ")).collect();
        assert_eq!(ids, expected, "after {after}: {text}");
    }
    assert_eq!(
        listen(&served, ADMIN, Some("x")).await.status(),
        StatusCode::BAD_REQUEST
    );
}

#[tokio::test]
async fn a_bound_token_hears_of_its_own_only_and_a_revoked_one_no_more() {
    let served = Served::new(&["red/a", "red/b"]);
    let token = served.token(Role::Read, Some(&["red/b"]));
    for (number, name) in ["red/a", "red/b", "red/a"].iter().enumerate() {
        served
            .send("POST", ADMIN, "/v1/purges", &purge(name, &number.to_string()))
            .await;
    }
    let response = listen(&served, &token, Some("0")).await;
    let id = served.admin.tokens().list()[1].id.clone();
    let revoking = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        served.admin.tokens().revoke(&id).unwrap();
        tokio::time::Instant::now()
    };
    let (text, _) = tokio::join!(read_until(response.into_body(), "id: 3"), revoking);
    assert!(text.contains("id: 2\n") && !text.contains("red/a"), "{text}");
    assert_eq!(listen(&served, &token, None).await.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn listeners_are_bounded_and_one_that_goes_makes_room() {
    let served = Served::new(&[]);
    let first = listen(&served, ADMIN, None).await;
    let second = listen(&served, ADMIN, None).await;
    assert_eq!((first.status(), second.status()), (StatusCode::OK, StatusCode::OK));
    let third = listen(&served, ADMIN, None).await;
    assert_eq!(third.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(third.headers().contains_key("retry-after"));
    drop(second);
    assert_eq!(listen(&served, ADMIN, None).await.status(), StatusCode::OK);
}
