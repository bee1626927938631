use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::AdapterSettings;
use super::key::{Place, namespace_of, realization};
use crate::ErrorKind;
use crate::client::{Client, ClientError, ClientOptions, Namespace};
use crate::{BlockHash, Hints, Label};

/// How long an unanswered connection lives. Callers give up far earlier, each at its own deadline; the connection stays so
/// that the answers, when they come, give back what they lease.
const CONNECTION_PATIENCE: Duration = Duration::from_secs(120);
const RETRY_FIRST: Duration = Duration::from_millis(25);
const RETRY_LONGEST: Duration = Duration::from_millis(500);
/// Namespaces on one connection before a new one is begun: the node has a bound for each connection.
const PLACES_MAX: usize = 2048;

/// Whether the node answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Health {
    Up,
    /// Connected, and a deadline passed without an answer.
    Stalled,
    Down,
}

/// The connection to the node: made, watched and made again in the background. Callers never wait for that; while it is not
/// up they are answered at once.
pub(super) struct Link {
    options: ClientOptions,
    health: AtomicU8,
    current: Mutex<Option<Arc<Current>>>,
    reconnects: AtomicU64,
    stalls: AtomicU64,
    why: Mutex<String>,
}

struct Current {
    client: Client,
    places: Mutex<HashMap<Place, Namespace>>,
    lease_ttl: Duration,
}

impl Link {
    pub(super) fn new(settings: &AdapterSettings) -> Link {
        let mut options = ClientOptions::new(&settings.socket).with_timeout(CONNECTION_PATIENCE);
        options.token = settings.token.as_ref().map(|token| token.clone().into_bytes());
        Link {
            options,
            health: AtomicU8::new(Health::Down as u8),
            current: Mutex::new(None),
            reconnects: AtomicU64::new(0),
            stalls: AtomicU64::new(0),
            why: Mutex::new("not connected yet".into()),
        }
    }

    pub(super) fn health(&self) -> Health {
        match self.health.load(Ordering::Acquire) {
            0 => Health::Up,
            1 => Health::Stalled,
            _ => Health::Down,
        }
    }

    /// The words of the latest failure, and how often the connection was made anew and stalled.
    pub(super) fn story(&self) -> (String, u64, u64) {
        let why = if self.health() == Health::Up {
            String::new()
        } else {
            self.why.lock().clone()
        };
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (why, count(&self.reconnects), count(&self.stalls))
    }

    /// How long the node's leases last.
    pub(super) fn lease_ttl(&self) -> Option<Duration> {
        Some(self.current.lock().as_ref()?.lease_ttl)
    }

    /// Connects, for the first time or anew, until it succeeds.
    pub(super) async fn connect(&self) {
        let mut pause = RETRY_FIRST;
        loop {
            match self.try_connect().await {
                Ok(()) => {
                    self.health.store(Health::Up as u8, Ordering::Release);
                    return;
                }
                Err(error) => *self.why.lock() = error.to_string(),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_LONGEST);
        }
    }

    async fn try_connect(&self) -> Result<(), ClientError> {
        // The lock is not held while waiting.
        let before = self.current.lock().clone();
        if let Some(current) = before {
            current.client.welcome().await?;
            self.reconnects.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        let client = Client::connect(self.options.clone()).await?;
        self.adopt(client).await
    }

    async fn adopt(&self, client: Client) -> Result<(), ClientError> {
        let lease_ttl = Duration::from_millis(client.welcome().await?.lease_ttl_ms);
        *self.current.lock() = Some(Arc::new(Current {
            client,
            places: Mutex::default(),
            lease_ttl,
        }));
        Ok(())
    }

    /// A call failed: whether the connection has to be made anew, which the caller then begins.
    pub(super) fn failed(&self, error: &ClientError) -> bool {
        // What the node refuses says nothing about the connection.
        if matches!(error.kind, ErrorKind::Busy | ErrorKind::Invalid | ErrorKind::Stale) {
            return false;
        }
        *self.why.lock() = error.to_string();
        self.health.swap(Health::Down as u8, Ordering::AcqRel) != Health::Down as u8
    }

    /// A deadline passed without an answer: whether the node has to be probed, which the caller then begins.
    pub(super) fn stalled(&self) -> bool {
        let up = self.health.compare_exchange(
            Health::Up as u8,
            Health::Stalled as u8,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        if up.is_ok() {
            self.stalls.fetch_add(1, Ordering::Relaxed);
            *self.why.lock() = "the node does not answer".into();
        }
        up.is_ok()
    }

    /// Asks the node something small and waits as long as it takes.
    pub(super) async fn probe(&self) -> Result<(), ClientError> {
        let Some(current) = self.current.lock().clone() else {
            return Err(ClientError::unanswered());
        };
        let place = current.places.lock().values().next().cloned();
        match place {
            Some(place) => drop(place.lookup(&[BlockHash([0; 16])]).await?),
            None => drop(current.client.status().await?),
        }
        self.health.store(Health::Up as u8, Ordering::Release);
        Ok(())
    }

    /// The namespace and form of some keys.
    pub(super) async fn place(&self, settings: &AdapterSettings, place: &Place) -> Result<Namespace, PlaceError> {
        if self.health() != Health::Up {
            return Err(PlaceError::Unreachable);
        }
        let current = self.current.lock().clone().ok_or(PlaceError::Unreachable)?;
        if let Some(known) = current.places.lock().get(place) {
            return Ok(known.clone());
        }
        let current = if current.places.lock().len() >= PLACES_MAX {
            let client = Client::connect(self.options.clone())
                .await
                .map_err(PlaceError::Client)?;
            self.adopt(client).await.map_err(PlaceError::Client)?;
            self.current.lock().clone().ok_or(PlaceError::Unreachable)?
        } else {
            current
        };
        let name = namespace_of(settings, &place.salt);
        let opened = current
            .client
            .namespace(&name, realization(&place.model, place.bytes))
            .await
            .map_err(PlaceError::Client)?
            .with_hints(Hints {
                prompt_tokens: settings.prompt_tokens,
                queue_wait_us: settings.queue_wait_us,
                label: settings.label.as_deref().map(Label::of),
                ..Hints::default()
            });
        current.places.lock().insert(place.clone(), opened.clone());
        Ok(opened)
    }

    /// Lets the connection go.
    pub(super) fn close(&self) {
        self.health.store(Health::Down as u8, Ordering::Release);
        *self.current.lock() = None;
    }
}

/// No namespace to ask.
#[derive(Debug)]
pub(super) enum PlaceError {
    Unreachable,
    Client(ClientError),
}
