//! What any server that keeps objects does.

use std::time::{Duration, Instant};

use thiserror::Error;

use super::{ObjectGroup, ObjectName};

/// Longer explanations of a server are cut.
#[cfg(any(feature = "redis", feature = "s3"))]
const REASON_CHARACTERS_MAX: usize = 200;

/// Puts, fetches and erases objects. To be shared between threads. A call blocks its thread and ends at its deadline.
pub trait ObjectStore: Send + Sync {
    /// Which kind it is: one word, as settings and metrics call it.
    fn kind(&self) -> &'static str;

    /// Where the server is, for messages: without user and password.
    fn address(&self) -> &str;

    /// How many servers objects lie on, as far as is known.
    fn servers(&self) -> usize;

    /// Objects whose place is kept in memory here.
    fn indexed(&self) -> u64 {
        0
    }

    /// How long objects may wait for others to be put together with, where many at once cost less.
    fn linger(&self) -> Duration {
        Duration::ZERO
    }

    /// Whether what is there is known without a trip: then how long [`ObjectStore::exists`] takes says nothing of the server.
    fn knows_by_itself(&self) -> bool {
        false
    }

    /// Whether it answers, and lets this node in: the smallest trip that there is.
    ///
    /// # Errors
    /// [`StoreError`].
    fn ping(&self, until: Instant) -> Result<(), StoreError>;

    /// Which of these objects are there, in their order, as far as is known without fetching them.
    ///
    /// # Errors
    /// [`StoreError`].
    fn exists(&self, objects: &[(ObjectGroup, ObjectName)], until: Instant) -> Result<Vec<bool>, StoreError>;

    /// Fetches objects and gives each to `each`, with its position, in their order; `None` where there is none. On an error `each` has been
    /// given those before it.
    ///
    /// # Errors
    /// [`StoreError`].
    fn fetch(
        &self,
        objects: &[(ObjectGroup, ObjectName)],
        until: Instant,
        each: &mut dyn FnMut(usize, Option<&[u8]>),
    ) -> Result<(), StoreError>;

    /// Puts objects; with `ttl` they are gone that long after. One that is there is replaced. On an error some may have been put, or may be
    /// later.
    ///
    /// # Errors
    /// [`StoreError`].
    fn put(
        &self,
        group: &ObjectGroup,
        objects: &[(ObjectName, Vec<u8>)],
        ttl: Option<Duration>,
        until: Instant,
    ) -> Result<(), StoreError>;

    /// Deletes these objects, and others with them where they cannot be told apart; which of them were there, in their order.
    ///
    /// # Errors
    /// [`StoreError`]: some may have been deleted. [`StoreError::Unsure`] says nothing against the server.
    fn remove(&self, group: &ObjectGroup, names: &[ObjectName], until: Instant) -> Result<Vec<bool>, StoreError>;

    /// Deletes every object of a namespace, of all its generations, and looks again.
    ///
    /// # Errors
    /// [`StoreError`]: some may have been deleted.
    fn erase_namespace(&self, namespace: &[u8; 16], until: Instant) -> Result<Erased, StoreError>;
}

/// What an erasure came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Erased {
    /// Objects that were deleted, as the server counts them.
    pub deleted: u64,
    /// Objects that a second look, after the deletion, found. One that was put meanwhile may be among them, and one may be counted twice.
    pub left: u64,
}

/// A call that was not done. Reads become misses.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StoreError {
    /// The address cannot be used.
    #[error(
        "the address of the Redis server cannot be used: {reason}; write redis://[USER:PASSWORD@]HOST:PORT[/DATABASE], or rediss:// for TLS"
    )]
    Url {
        /// What is wrong, without the address.
        reason: String,
    },
    /// Settings that cannot be used, with the remedy.
    #[error("the server for objects cannot be used: {reason}")]
    Settings {
        /// What is wrong and what to do, without a secret.
        reason: String,
    },
    /// No authorities that could sign the server's certificate.
    #[error(
        "the authorities for the server's certificate cannot be used: {reason}; give them in PEM, or put them into the system's store"
    )]
    Authorities {
        /// What is wrong.
        reason: String,
    },
    /// It could not be reached, or went away.
    #[error("the server {server} is not there: {reason}; check that it runs and can be reached from here")]
    Unavailable {
        /// Its address, without user and password.
        server: String,
        /// What happened.
        reason: String,
    },
    /// The call's time was over first.
    #[error("the server {server} was not done with {command} in time; look at its load, or allow more time")]
    Late {
        /// Its address, without user and password.
        server: String,
        /// What was asked.
        command: &'static str,
    },
    /// It answered an error.
    #[error("the server {server} refuses {command}: {reason}")]
    Refused {
        /// Its address, without user and password.
        server: String,
        /// What was asked.
        command: &'static str,
        /// Its words.
        reason: String,
    },
    /// It answered what no such server does.
    #[error(
        "{server} does not answer {command} as such a server does ({reason}); check the address, and what lies between"
    )]
    Garbled {
        /// Its address, without user and password.
        server: String,
        /// What was asked.
        command: &'static str,
        /// What it answered.
        reason: &'static str,
    },
    /// What was asked cannot be said for sure, though the server is there: too much lies there to look through in time.
    #[error("not all that lies at {server} was looked through: {reason}")]
    Unsure {
        /// Its address, without user and password.
        server: String,
        /// What was left out.
        reason: String,
    },
    /// An object that the server has no room for; none of the call's was put.
    #[error("an object of {bytes} bytes is larger than the {most} that the server keeps; use smaller blocks")]
    TooLarge {
        /// Its length.
        bytes: usize,
        /// The longest.
        most: usize,
    },
}

/// A server's words, fit for a log.
#[cfg(any(feature = "redis", feature = "s3"))]
pub(super) fn readable(reason: &str) -> String {
    reason
        .chars()
        .take(REASON_CHARACTERS_MAX)
        .map(|character| if character.is_control() { ' ' } else { character })
        .collect()
}
