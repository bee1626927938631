//! Objects in a Redis server, or one that speaks as it does (6.0 or newer, not a cluster).
//!
//! # Keys
//!
//! ```text
//! kvtier:1:NAMESPACE:GENERATION:NAME        each 32 hexadecimal digits, lower case
//! ```
//!
//! The 1 is the version of this layout. Namespace and generation are fingerprints that the caller makes, the name is a keyed digest: the
//! server can tell which objects belong together, and nothing of whose they are or what they hold. Objects are deleted together by the front
//! of their keys, with SCAN and UNLINK in small steps: nobody else waits for it. The value is an object as `remote` draws it.
//!
//! # Behaviour
//!
//! A call blocks its thread, and ends at its deadline: whatever the server does, each wait ends then. So does the wait for the host's
//! address. A connection on which anything went wrong is closed, never used again; one that the server closed while it lay idle is
//! replaced once within the call. Nothing else is tried again.
//!
//! What a server keeps beside its memory (replicas, snapshots, an append-only file) is out of reach here: what is erased stays readable there
//! for who has the key.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use thiserror::Error;

use super::{ObjectGroup, ObjectName};
use connection::{Answer, Connection, Fault, STRING_BYTES_MAX};
use server::Server;

mod connection;
mod server;

#[cfg(test)]
mod tests;

/// Commands on their way at once, at most.
const COMMANDS_MAX: usize = 256;
/// Bytes on their way at once, but for one object that is larger: what is asked for lies in the server's memory until it is read.
const WINDOW_BYTES: usize = 16 << 20;
/// What an object is taken for before the first of a call came.
const ASSUMED_BYTES: usize = 1 << 20;
/// Keys that one step of a scan looks at. The server serves nobody else meanwhile: some tenths of a millisecond.
const SCAN_COUNT: &[u8] = b"1000";
/// Longer explanations of a server are cut.
const REASON_CHARACTERS_MAX: usize = 200;

/// How a Redis server is reached.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisSettings {
    /// `redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`, or `rediss://` for TLS 1.3. Never shown with its password.
    pub url: String,
    /// Connections at most, at least one: as many calls run at once, others wait. Each holds some 100 KiB, and in a fetch an object.
    pub connections: usize,
    /// How long the server may stall: connect, take or give nothing. A call ends at its own deadline anyway.
    pub timeout: Duration,
}

/// What an erasure came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Erased {
    /// Objects that were deleted.
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
    /// No authorities that could sign the server's certificate.
    #[error(
        "the authorities for the Redis server's certificate cannot be used: {reason}; give them in PEM, or put them into the system's store"
    )]
    Authorities {
        /// What is wrong.
        reason: String,
    },
    /// It could not be reached, or went away.
    #[error("the Redis server {server} is not there: {reason}; check that it runs and can be reached from here")]
    Unavailable {
        /// Its address, without user and password.
        server: String,
        /// What happened.
        reason: String,
    },
    /// The call's time was over first.
    #[error("the Redis server {server} was not done with {command} in time; look at its load, or allow more time")]
    Late {
        /// Its address, without user and password.
        server: String,
        /// What was asked.
        command: &'static str,
    },
    /// It answered an error.
    #[error("the Redis server {server} refuses {command}: {reason}")]
    Refused {
        /// Its address, without user and password.
        server: String,
        /// What was asked.
        command: &'static str,
        /// Its words.
        reason: String,
    },
    /// It answered what no Redis server does.
    #[error(
        "{server} does not answer {command} as a Redis server does ({reason}); check the address, and what lies between"
    )]
    Garbled {
        /// Its address, without user and password.
        server: String,
        /// What was asked.
        command: &'static str,
        /// What it answered.
        reason: &'static str,
    },
    /// An object that Redis has no room for; none of the call's was put.
    #[error("an object of {bytes} bytes is larger than the {STRING_BYTES_MAX} that Redis keeps; use smaller blocks")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
}

/// Puts, fetches and erases objects in one Redis server. To be shared between threads; each call takes one connection.
pub struct RedisStore {
    server: Server,
    connections: usize,
    pool: Mutex<Pool>,
    freed: Condvar,
}

#[derive(Default)]
struct Pool {
    idle: Vec<Connection>,
    /// Calls that run.
    taken: usize,
}

impl RedisStore {
    /// Checks the settings and connects to nobody: a server that is away is no error before something is asked of it. With TLS the
    /// authorities that the system knows must have signed its certificate.
    ///
    /// # Errors
    /// [`StoreError::Url`], [`StoreError::Authorities`].
    pub fn new(settings: RedisSettings) -> Result<RedisStore, StoreError> {
        RedisStore::of(&settings, None)
    }

    /// As [`RedisStore::new`], for `rediss://` alone: these authorities, in PEM, must have signed the server's certificate.
    ///
    /// # Errors
    /// As [`RedisStore::new`].
    pub fn with_authorities(settings: RedisSettings, authorities: &[u8]) -> Result<RedisStore, StoreError> {
        RedisStore::of(&settings, Some(authorities))
    }

    fn of(settings: &RedisSettings, authorities: Option<&[u8]>) -> Result<RedisStore, StoreError> {
        Ok(RedisStore {
            server: Server::new(settings, authorities)?,
            connections: settings.connections.max(1),
            pool: Mutex::default(),
            freed: Condvar::new(),
        })
    }

    /// Where the server is, for messages: without user and password.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.server.name
    }

    /// Whether it answers, and takes the password.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn ping(&self, until: Instant) -> Result<(), StoreError> {
        self.run("PING", until, |connection| {
            connection.ask(&[b"PING"])?;
            connection.flush()?;
            connection.done()
        })
    }

    /// Which of these objects are there, in their order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn exists(&self, objects: &[(ObjectGroup, ObjectName)], until: Instant) -> Result<Vec<bool>, StoreError> {
        self.run("EXISTS", until, |connection| {
            let mut found = Vec::with_capacity(objects.len());
            for objects in objects.chunks(COMMANDS_MAX) {
                for (group, name) in objects {
                    connection.ask(&[b"EXISTS", key(group, name).as_bytes()])?;
                }
                connection.flush()?;
                for answer in all(connection, objects.len(), Connection::number)? {
                    found.push(answer > 0);
                }
            }
            Ok(found)
        })
    }

    /// Fetches objects and gives each to `each`, with its position, in their order; `None` where there is none. Some 16 MiB are asked for at
    /// once, and one object at a time is held. On an error `each` has been given those before it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn fetch(
        &self,
        objects: &[(ObjectGroup, ObjectName)],
        until: Instant,
        each: &mut dyn FnMut(usize, Option<Vec<u8>>),
    ) -> Result<(), StoreError> {
        self.run("GET", until, |connection| {
            let (mut asked, mut largest) = (0, None);
            for position in 0..objects.len() {
                let window = window(largest);
                // Not one by one: a system call for several.
                if asked - position <= window / 2 {
                    let last = objects.len().min(position + window);
                    for (group, name) in &objects[asked.min(last)..last] {
                        connection.ask(&[b"GET", key(group, name).as_bytes()])?;
                    }
                    asked = asked.max(last);
                    connection.flush()?;
                }
                let object = connection.string()?;
                if let Some(object) = &object {
                    largest = largest.max(Some(object.len()));
                }
                each(position, object);
            }
            Ok(())
        })
    }

    /// Puts objects; with `ttl` (milliseconds count) the server drops them that long after. One that is there is replaced. On an error some
    /// may have been put.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn put(
        &self,
        group: &ObjectGroup,
        objects: &[(ObjectName, Vec<u8>)],
        ttl: Option<Duration>,
        until: Instant,
    ) -> Result<(), StoreError> {
        if let Some((_, large)) = objects.iter().find(|(_, object)| object.len() > STRING_BYTES_MAX) {
            return Err(StoreError::TooLarge { bytes: large.len() });
        }
        let ttl = ttl.map(|ttl| ttl.as_millis().clamp(1, u128::from(u32::MAX) * 1000).to_string());
        self.run("SET", until, |connection| {
            let mut rest = objects;
            while !rest.is_empty() {
                let mut bytes = 0;
                let fitting = rest.iter().take(COMMANDS_MAX).take_while(|(_, object)| {
                    bytes += object.len();
                    bytes <= WINDOW_BYTES
                });
                let (now, later) = rest.split_at(fitting.count().max(1));
                for (name, object) in now {
                    let key = key(group, name);
                    match &ttl {
                        Some(ttl) => connection.ask(&[b"SET", key.as_bytes(), object, b"PX", ttl.as_bytes()])?,
                        None => connection.ask(&[b"SET", key.as_bytes(), object])?,
                    }
                }
                connection.flush()?;
                all(connection, now.len(), Connection::done)?;
                rest = later;
            }
            Ok(())
        })
    }

    /// Deletes these objects; which of them were there, in their order.
    ///
    /// # Errors
    /// [`StoreError`]: some may have been deleted.
    pub fn remove(&self, group: &ObjectGroup, names: &[ObjectName], until: Instant) -> Result<Vec<bool>, StoreError> {
        self.run("UNLINK", until, |connection| {
            let mut removed = Vec::with_capacity(names.len());
            for names in names.chunks(COMMANDS_MAX) {
                for name in names {
                    connection.ask(&[b"UNLINK", key(group, name).as_bytes()])?;
                }
                connection.flush()?;
                let answers = all(connection, names.len(), Connection::number)?;
                removed.extend(answers.into_iter().map(|count| count > 0));
            }
            Ok(removed)
        })
    }

    /// Deletes every object of a namespace, of all its generations, and looks again. It goes through all keys of the server twice.
    ///
    /// # Errors
    /// [`StoreError`]: some may have been deleted.
    pub fn erase_namespace(&self, namespace: &[u8; 16], until: Instant) -> Result<Erased, StoreError> {
        self.erase(&format!("{PREFIX}{}:", ObjectName(*namespace)), until)
    }

    /// As [`RedisStore::erase_namespace`], of one generation.
    ///
    /// # Errors
    /// As [`RedisStore::erase_namespace`].
    pub fn erase_group(&self, group: &ObjectGroup, until: Instant) -> Result<Erased, StoreError> {
        self.erase(&format!("{PREFIX}{group}:"), until)
    }

    fn erase(&self, prefix: &str, until: Instant) -> Result<Erased, StoreError> {
        let mut erased = Erased::default();
        self.run("SCAN and UNLINK", until, |connection| {
            scan(connection, prefix, b"UNLINK", &mut erased.deleted)
        })?;
        self.run("SCAN and EXISTS", until, |connection| {
            erased.left = 0;
            scan(connection, prefix, b"EXISTS", &mut erased.left)
        })?;
        Ok(erased)
    }

    /// Does a job on a connection, which goes back to the others when every answer of it came.
    fn run<T>(
        &self,
        command: &'static str,
        until: Instant,
        mut job: impl FnMut(&mut Connection) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        let place = self.take(command, until)?;
        let mut idle = place.idle();
        loop {
            let was_idle = idle.is_some();
            let opened = match idle.take() {
                Some(connection) => Ok(connection),
                None => Connection::open(&self.server, until),
            };
            let mut connection = opened.map_err(|fault| self.error("a connection", fault, until))?;
            connection.begin(until);
            let fault = match job(&mut connection) {
                Ok(done) => {
                    place.keep(connection);
                    return Ok(done);
                }
                Err(fault) => fault,
            };
            if matches!(fault, Fault::Refused(_)) {
                place.keep(connection);
            } else if was_idle && fault.is_closed() && connection.answered() == 0 {
                continue;
            }
            return Err(self.error(command, fault, until));
        }
    }

    fn take(&self, command: &'static str, until: Instant) -> Result<Place<'_>, StoreError> {
        let mut pool = self.pool.lock();
        while pool.taken >= self.connections {
            if self.freed.wait_until(&mut pool, until).timed_out() {
                return Err(self.error(command, Fault::Late, until));
            }
        }
        pool.taken += 1;
        Ok(Place { store: self })
    }

    fn error(&self, command: &'static str, fault: Fault, until: Instant) -> StoreError {
        let server = self.server.name.clone();
        match fault {
            Fault::Late => StoreError::Late { server, command },
            Fault::Socket(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                if Instant::now() >= until {
                    return StoreError::Late { server, command };
                }
                let reason = format!("it stalled for {:?}", self.server.patience);
                StoreError::Unavailable { server, reason }
            }
            Fault::Socket(error) => StoreError::Unavailable {
                server,
                reason: readable(&error.to_string()),
            },
            Fault::Refused(reason) => {
                let reason = readable(&reason);
                match reason.split(' ').next() {
                    // It is there and says that it cannot serve yet, or not now.
                    Some("LOADING" | "MASTERDOWN" | "TRYAGAIN" | "CLUSTERDOWN" | "BUSY") => {
                        StoreError::Unavailable { server, reason }
                    }
                    Some("MOVED" | "ASK") => StoreError::Refused {
                        server,
                        command,
                        reason: "it is part of a cluster; give the address of a server that is not".to_owned(),
                    },
                    _ => StoreError::Refused {
                        server,
                        command,
                        reason,
                    },
                }
            }
            Fault::Garbled(reason) => StoreError::Garbled {
                server,
                command,
                reason,
            },
        }
    }
}

/// The right to one connection of the store's.
struct Place<'store> {
    store: &'store RedisStore,
}

impl Place<'_> {
    /// One that is connected and was not closed since, as far as can be seen.
    fn idle(&self) -> Option<Connection> {
        loop {
            let mut connection = self.store.pool.lock().idle.pop()?;
            if connection.is_quiet() {
                return Some(connection);
            }
        }
    }

    /// Leaves a connection for the next, unless an answer is still awaited on it, or one came unasked: it would be taken for another's.
    fn keep(&self, connection: Connection) {
        if connection.is_settled() {
            self.store.pool.lock().idle.push(connection);
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.store.pool.lock().taken -= 1;
        self.store.freed.notify_one();
    }
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("RedisStore")
            .field("server", &self.server.name)
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

/// Version 1 of the layout.
const PREFIX: &str = "kvtier:1:";

fn key(group: &ObjectGroup, name: &ObjectName) -> String {
    format!("{PREFIX}{group}:{name}")
}

/// Objects that are asked for at once, when the largest has this many bytes.
fn window(largest: Option<usize>) -> usize {
    (WINDOW_BYTES / largest.unwrap_or(ASSUMED_BYTES).max(1)).clamp(1, COMMANDS_MAX)
}

/// Takes `count` answers. What the server refuses does not end it: the others' answers are taken, too, so that the connection can go on.
fn all<T>(
    connection: &mut Connection,
    count: usize,
    answer: impl Fn(&mut Connection) -> Result<T, Fault>,
) -> Result<Vec<T>, Fault> {
    let mut answers = Vec::with_capacity(count);
    let mut refused = None;
    for _ in 0..count {
        match answer(connection) {
            Ok(answer) => answers.push(answer),
            Err(Fault::Refused(reason)) => refused = refused.or(Some(reason)),
            Err(fault) => return Err(fault),
        }
    }
    refused.map_or(Ok(answers), |reason| Err(Fault::Refused(reason)))
}

/// Goes through the keys that begin so, gives each step's to `command` and adds up what it answers. SCAN finds every key that is there from
/// its beginning to its end, and may find one twice.
fn scan(connection: &mut Connection, prefix: &str, command: &'static [u8], sum: &mut u64) -> Result<(), Fault> {
    // Hexadecimal digits and colons: nothing in it is a pattern.
    let pattern = format!("{prefix}*");
    let mut cursor = b"0".to_vec();
    loop {
        connection.ask(&[b"SCAN", &cursor, b"MATCH", pattern.as_bytes(), b"COUNT", SCAN_COUNT])?;
        connection.flush()?;
        let (next, keys) = step(connection.answer()?)?;
        let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
        if keys.iter().any(|key| !key.starts_with(prefix.as_bytes())) {
            return Err(Fault::Garbled("keys that were not asked for"));
        }
        for keys in keys.chunks(COMMANDS_MAX) {
            let asked: Vec<&[u8]> = std::iter::once(command).chain(keys.iter().copied()).collect();
            connection.ask(&asked)?;
            connection.flush()?;
            *sum += connection.number()?;
        }
        if next == b"0" {
            return Ok(());
        }
        cursor = next;
    }
}

/// The next cursor and the keys of an answer to SCAN, each once.
fn step(answer: Answer) -> Result<(Vec<u8>, BTreeSet<Vec<u8>>), Fault> {
    let garbled = Fault::Garbled("something else than a step of a scan");
    let Answer::Array(parts) = answer else {
        return Err(garbled);
    };
    let [Answer::String(Some(cursor)), Answer::Array(found)] = &parts[..] else {
        return Err(garbled);
    };
    let keys = found.iter().map(|key| match key {
        Answer::String(Some(key)) => Some(key.clone()),
        _ => None,
    });
    match keys.collect() {
        Some(keys) => Ok((cursor.clone(), keys)),
        None => Err(garbled),
    }
}

/// A server's words, fit for a log.
fn readable(reason: &str) -> String {
    reason
        .chars()
        .take(REASON_CHARACTERS_MAX)
        .map(|character| if character.is_control() { ' ' } else { character })
        .collect()
}
