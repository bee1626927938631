//! `GET /v1/events`: jobs that change their state, as server-sent events.
//!
//! Each event has `id: SEQUENCE`, `event: purge` and one JSON object as data. With `Last-Event-ID` it goes on after that one,
//! as far as events are still kept; without, it begins with the next. A stream ends by itself after a while, as any
//! connection of this server does: clients come back with the last id, as `EventSource` does on its own.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;

use super::Admin;
use super::access::Caller;
use super::problem::Problem;

/// How often the node is asked whether there is more.
const INTERVAL: Duration = Duration::from_millis(200);

/// Below the age at which a connection is closed, so that a stream on a connection of its own ends between two events.
const STREAM_AGE_MAX: Duration = Duration::from_secs(50);

/// When a client shall come back.
const RETRY: Duration = Duration::from_secs(1);

/// Events that wait for a slow reader; past them the stream itself waits.
const WAITING_MAX: usize = 64;

pub(super) async fn stream(
    State(admin): State<Admin>,
    Extension(caller): Extension<Arc<Caller>>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let after = match headers.get("last-event-id") {
        None => None,
        Some(value) => {
            let number = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
            Some(number.ok_or_else(|| Problem::invalid("Last-Event-ID: a number, as an event's id has it"))?)
        }
    };
    let place = Arc::clone(admin.subscribers()).try_acquire_owned().map_err(|_| {
        let words = "as many clients listen to events as may: close one, or raise http_event_subscribers_max";
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, words).retry_after(RETRY.as_secs())
    })?;
    let newest = admin
        .ask_purges(|purges| purges.events_after(0).last().map_or(0, |(sequence, _)| *sequence))
        .await?;
    // An id from an earlier life of the node counts from nothing.
    let after = match after {
        Some(after) if after > newest => 0,
        Some(after) => after,
        None => newest,
    };
    let (sender, receiver) = mpsc::channel(WAITING_MAX);
    tokio::spawn(follow(admin, caller, after, sender));
    let events = Events {
        receiver,
        _place: place,
    };
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}

async fn follow(admin: Admin, caller: Arc<Caller>, mut after: u64, sender: mpsc::Sender<Event>) {
    let end = Instant::now() + STREAM_AGE_MAX;
    if sender.send(Event::default().retry(RETRY)).await.is_err() {
        return;
    }
    while Instant::now() < end && admin.tokens().is_good(&caller.token, SystemTime::now()) {
        let Ok(events) = admin.ask_purges(move |purges| purges.events_after(after)).await else {
            return;
        };
        for (sequence, text) in events {
            after = after.max(sequence);
            if !is_for(&caller, &text) {
                continue;
            }
            let event = Event::default().id(sequence.to_string()).event("purge").data(text);
            if sender.send(event).await.is_err() {
                return;
            }
        }
        tokio::select! {
            () = sender.closed() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}

fn is_for(caller: &Caller, event: &str) -> bool {
    if caller.namespaces.is_none() {
        return true;
    }
    let event: Value = serde_json::from_str(event).unwrap_or_default();
    event["namespace"]
        .as_str()
        .is_some_and(|namespace| caller.may_see(namespace))
}

struct Events {
    receiver: mpsc::Receiver<Event>,
    _place: OwnedSemaphorePermit,
}

impl Stream for Events {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(context).map(|event| event.map(Ok))
    }
}
