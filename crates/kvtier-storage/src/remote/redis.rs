//! Objects in a Redis server, or in a cluster of them, or what speaks as they do (6.0 or newer).
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
//! # Clusters
//!
//! The address is that of any server of the cluster. That it is in one shows when it is first asked, or by its word that a key lies elsewhere;
//! then where each slot lies is asked for, and again whenever a server is away or gives such a word. A call goes to each server that has a
//! part of it, and is tried once more where the map has changed. A user of the server's needs `CLUSTER NODES` (`+cluster|nodes`) for
//! erasures, also where there is no cluster: else nobody could say that all servers were gone through. An erasure goes through the keys of every master, and is not done while slots
//! move between them.
//!
//! What a server keeps beside its memory (replicas, snapshots, an append-only file) is out of reach here: what is erased stays readable there
//! for who has the key.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use super::{Erased, ObjectGroup, ObjectName, ObjectStore, StoreError};
use cluster::Servers;
use connection::{Answer, Connection, Fault, STRING_BYTES_MAX};
use pool::{Kind, Place, Pool, Trouble};
use server::Server;

mod cluster;
mod connection;
mod pool;
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

/// Puts, fetches and erases objects in a Redis server or cluster. To be shared between threads; each call takes one connection, and in a
/// cluster one to each server that has a part of it.
pub struct RedisStore {
    seed: Arc<Pool>,
    servers: RwLock<Arc<Servers>>,
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
        let seed = Arc::new(Pool::new(Server::new(settings, authorities)?, settings.connections));
        Ok(RedisStore {
            servers: RwLock::new(Arc::new(Servers::one(&seed))),
            seed,
        })
    }

    /// The seed first.
    fn all_of(&self, servers: &Servers) -> Vec<Arc<Pool>> {
        let others = servers.pools.iter().filter(|pool| !Arc::ptr_eq(pool, &self.seed));
        std::iter::once(&self.seed).chain(others).cloned().collect()
    }

    fn now(&self) -> Arc<Servers> {
        Arc::clone(&self.servers.read())
    }

    /// Asks whoever answers where the slots lie. Whether that is something new.
    fn learn(&self, known: &Arc<Servers>, until: Instant) -> Result<bool, Trouble> {
        let mut trouble = None;
        for pool in self.all_of(known) {
            let told = match cluster::ask(&pool, until) {
                Ok(told) => told,
                Err(other) => {
                    trouble = trouble.or(Some(other));
                    continue;
                }
            };
            let servers = match told {
                Some(told) => Servers::of_told(&told, &pool, known),
                // What was a cluster stays one: half of its servers are not all of them.
                None if known.is_cluster() => continue,
                None => Servers::one(&self.seed),
            };
            let is_new = !servers.is_like(known);
            if is_new {
                *self.servers.write() = Arc::new(servers);
            }
            return Ok(is_new);
        }
        Err(trouble.unwrap_or_else(|| elsewhere(&self.seed)))
    }

    /// Does a job, and once more where that may help: a key lies elsewhere, or a server of the cluster is away and another has taken over.
    fn call<T>(
        &self,
        until: Instant,
        mut job: impl FnMut(&Arc<Servers>) -> Result<T, Trouble>,
    ) -> Result<T, StoreError> {
        let servers = self.now();
        let trouble = match job(&servers) {
            Ok(done) => return Ok(done),
            Err(trouble) => trouble,
        };
        let may_help = match trouble.kind {
            Kind::Elsewhere => true,
            Kind::Away => servers.is_cluster(),
            Kind::Other => false,
        };
        if may_help && self.learn(&servers, until).is_ok_and(|is_new| is_new) {
            return job(&self.now()).map_err(|trouble| trouble.error);
        }
        Err(trouble.error)
    }

    /// The positions of keys by the server that has them.
    fn by_server(servers: &Servers, keys: &[String]) -> Result<Vec<Vec<usize>>, Trouble> {
        let mut parts = vec![Vec::new(); servers.pools.len()];
        for (position, key) in keys.iter().enumerate() {
            parts[place_of(servers, key)?].push(position);
        }
        Ok(parts)
    }

    /// One command for each of these keys, in pipelines, and its answer to each.
    fn each_key<T: Clone>(
        &self,
        command: &'static str,
        keys: &[String],
        until: Instant,
        nothing: &T,
        answer: impl Fn(&mut Connection) -> Result<T, Fault>,
    ) -> Result<Vec<T>, StoreError> {
        self.call(until, |servers| {
            let mut answers = vec![nothing.clone(); keys.len()];
            for (pool, positions) in servers.pools.iter().zip(RedisStore::by_server(servers, keys)?) {
                if positions.is_empty() {
                    continue;
                }
                let found = pool.run(command, until, |connection| {
                    let mut found = Vec::with_capacity(positions.len());
                    for positions in positions.chunks(COMMANDS_MAX) {
                        for &position in positions {
                            connection.ask(&[command.as_bytes(), keys[position].as_bytes()])?;
                        }
                        connection.flush()?;
                        found.extend(all(connection, positions.len(), &answer)?);
                    }
                    Ok(found)
                })?;
                for (position, found) in positions.into_iter().zip(found) {
                    answers[position] = found;
                }
            }
            Ok(answers)
        })
    }

    /// As [`ObjectStore::erase_namespace`], of one generation.
    ///
    /// # Errors
    /// As [`ObjectStore::erase_namespace`].
    pub fn erase_group(&self, group: &ObjectGroup, until: Instant) -> Result<Erased, StoreError> {
        self.erase(&format!("{PREFIX}{group}:"), until)
    }

    fn erase(&self, prefix: &str, until: Instant) -> Result<Erased, StoreError> {
        let mut erased = Erased::default();
        self.call(until, |servers| {
            // Whether it is a cluster shows by no answer of these commands.
            let before = RedisStore::still(servers, until)?;
            if before.is_some() != servers.is_cluster() {
                return Err(elsewhere(&self.seed));
            }
            for pool in &servers.pools {
                pool.run("SCAN and UNLINK", until, |connection| {
                    scan(connection, prefix, b"UNLINK", &mut erased.deleted)
                })?;
            }
            erased.left = 0;
            for pool in &servers.pools {
                let mut left = 0;
                pool.run("SCAN and EXISTS", until, |connection| {
                    left = 0;
                    scan(connection, prefix, b"EXISTS", &mut left)
                })?;
                erased.left += left;
            }
            // A key that moved from a server that was to come to one that was gone through is in neither look.
            if RedisStore::still(servers, until)? != before {
                return Err(elsewhere(&self.seed));
            }
            Ok(())
        })?;
        Ok(erased)
    }

    /// What the servers say of the cluster, as long as no slot moves; `None`: there is none.
    fn still(servers: &Servers, until: Instant) -> Result<Option<cluster::Told>, Trouble> {
        let mut first = None;
        for pool in &servers.pools {
            let told = cluster::ask(pool, until)?;
            if told.as_ref().is_some_and(cluster::Told::is_moving) {
                return Err(Trouble {
                    kind: Kind::Other,
                    error: StoreError::Unavailable {
                        server: pool.server.name.clone(),
                        reason: "its cluster moves slots: what lies there is not gone through meanwhile".to_owned(),
                    },
                });
            }
            first = first.or(told);
        }
        Ok(first)
    }
}

impl ObjectStore for RedisStore {
    fn kind(&self) -> &'static str {
        "redis"
    }

    fn address(&self) -> &str {
        &self.seed.server.name
    }

    fn servers(&self) -> usize {
        self.servers.read().pools.len()
    }

    /// In a cluster one that answers is enough.
    fn ping(&self, until: Instant) -> Result<(), StoreError> {
        let mut trouble = None;
        for pool in self.all_of(&self.now()) {
            let answered = pool.run("PING", until, |connection| {
                connection.ask(&[b"PING"])?;
                connection.flush()?;
                connection.done()
            });
            match answered {
                Ok(()) => return Ok(()),
                Err(other) => trouble = trouble.or(Some(other.error)),
            }
        }
        Err(trouble.expect("the seed was asked"))
    }

    fn exists(&self, objects: &[(ObjectGroup, ObjectName)], until: Instant) -> Result<Vec<bool>, StoreError> {
        let keys: Vec<String> = objects.iter().map(|(group, name)| key(group, name)).collect();
        let there = |connection: &mut Connection| Ok(connection.number()? > 0);
        self.each_key("EXISTS", &keys, until, &false, there)
    }

    /// Some 16 MiB are asked for at once, and one object at a time is held.
    fn fetch(
        &self,
        objects: &[(ObjectGroup, ObjectName)],
        until: Instant,
        each: &mut dyn FnMut(usize, Option<&[u8]>),
    ) -> Result<(), StoreError> {
        if objects.is_empty() {
            return Ok(());
        }
        let keys: Vec<String> = objects.iter().map(|(group, name)| key(group, name)).collect();
        // Where it is tried again it goes on from here.
        let mut given = 0;
        self.call(until, |servers| {
            if !servers.is_cluster() {
                return servers.pools[0].run("GET", until, |connection| {
                    let mut places = [connection];
                    let from = given;
                    fetch_from(&mut places, &keys[from..], &|_| 0, &mut |position, object| {
                        each(from + position, object);
                        given += 1;
                    })
                    .map_err(|(_, fault)| fault)
                });
            }
            let from = given;
            let mut of = Vec::with_capacity(keys.len() - from);
            for key in &keys[from..] {
                of.push(place_of(servers, key)?);
            }
            // In the order of the servers: whoever waits for a connection waits for none that is held for its own.
            let wanted: BTreeSet<usize> = of.iter().copied().collect();
            let mut held: Vec<(usize, Place<'_>, Connection)> = Vec::with_capacity(wanted.len());
            for &server in &wanted {
                let (place, connection) = servers.pools[server].connect("GET", until)?;
                held.push((server, place, connection));
            }
            let place_of_server = |server: usize| wanted.iter().position(|other| *other == server);
            let of: Vec<usize> = of.into_iter().filter_map(place_of_server).collect();
            let mut connections: Vec<&mut Connection> = held.iter_mut().map(|(_, _, connection)| connection).collect();
            let fetched = fetch_from(
                &mut connections,
                &keys[from..],
                &|position| of[position],
                &mut |position, object| {
                    each(from + position, object);
                    given += 1;
                },
            );
            let failed = fetched.err().map(|(place, fault)| {
                let pool = &servers.pools[held[place].0];
                pool.trouble("GET", fault, until)
            });
            for (_, place, connection) in held {
                place.keep(connection);
            }
            failed.map_or(Ok(()), Err)
        })
    }

    /// Milliseconds of `ttl` count.
    fn put(
        &self,
        group: &ObjectGroup,
        objects: &[(ObjectName, Vec<u8>)],
        ttl: Option<Duration>,
        until: Instant,
    ) -> Result<(), StoreError> {
        if let Some((_, large)) = objects.iter().find(|(_, object)| object.len() > STRING_BYTES_MAX) {
            return Err(StoreError::TooLarge {
                bytes: large.len(),
                most: STRING_BYTES_MAX,
            });
        }
        let ttl = ttl.map(|ttl| ttl.as_millis().clamp(1, u128::from(u32::MAX) * 1000).to_string());
        let keys: Vec<String> = objects.iter().map(|(name, _)| key(group, name)).collect();
        self.call(until, |servers| {
            for (pool, positions) in servers.pools.iter().zip(RedisStore::by_server(servers, &keys)?) {
                if positions.is_empty() {
                    continue;
                }
                pool.run("SET", until, |connection| {
                    let mut rest = positions.as_slice();
                    while !rest.is_empty() {
                        let mut bytes = 0;
                        let fitting = rest.iter().take(COMMANDS_MAX).take_while(|position| {
                            bytes += objects[**position].1.len();
                            bytes <= WINDOW_BYTES
                        });
                        let (now, later) = rest.split_at(fitting.count().max(1));
                        for &position in now {
                            let (key, object) = (keys[position].as_bytes(), objects[position].1.as_slice());
                            match &ttl {
                                Some(ttl) => connection.ask(&[b"SET", key, object, b"PX", ttl.as_bytes()])?,
                                None => connection.ask(&[b"SET", key, object])?,
                            }
                        }
                        connection.flush()?;
                        all(connection, now.len(), Connection::done)?;
                        rest = later;
                    }
                    Ok(())
                })?;
            }
            Ok(())
        })
    }

    fn remove(&self, group: &ObjectGroup, names: &[ObjectName], until: Instant) -> Result<Vec<bool>, StoreError> {
        let keys: Vec<String> = names.iter().map(|name| key(group, name)).collect();
        let was_there = |connection: &mut Connection| Ok(connection.number()? > 0);
        self.each_key("UNLINK", &keys, until, &false, was_there)
    }

    /// It goes through all keys of every server twice.
    fn erase_namespace(&self, namespace: &[u8; 16], until: Instant) -> Result<Erased, StoreError> {
        self.erase(&format!("{PREFIX}{}:", ObjectName(*namespace)), until)
    }
}

/// The map is not what it was.
fn elsewhere(pool: &Pool) -> Trouble {
    Trouble {
        kind: Kind::Elsewhere,
        error: StoreError::Unavailable {
            server: pool.server.name.clone(),
            reason: "its cluster is another than a moment ago".to_owned(),
        },
    }
}

/// Which of the servers has a key.
fn place_of(servers: &Servers, key: &str) -> Result<usize, Trouble> {
    servers.of(key).ok_or_else(|| Trouble {
        kind: Kind::Away,
        error: StoreError::Unavailable {
            server: servers
                .pools
                .first()
                .map_or_else(String::new, |pool| pool.server.name.clone()),
            reason: "nobody in its cluster has the slot of a key".to_owned(),
        },
    })
}

/// Gets what keys name, each at one of these connections. On a fault, at which of them.
fn fetch_from(
    connections: &mut [&mut Connection],
    keys: &[String],
    of: &dyn Fn(usize) -> usize,
    each: &mut dyn FnMut(usize, Option<&[u8]>),
) -> Result<(), (usize, Fault)> {
    let (mut asked, mut largest) = (0, None);
    for position in 0..keys.len() {
        let window = window(largest);
        // Not one by one: a system call for several.
        if asked - position <= window / 2 {
            let last = keys.len().min(position + window);
            for (next, key) in keys.iter().enumerate().take(last).skip(asked) {
                let place = of(next);
                let asked = connections[place].ask(&[b"GET", key.as_bytes()]);
                asked.map_err(|fault| (place, fault))?;
            }
            asked = asked.max(last);
            for (place, connection) in connections.iter_mut().enumerate() {
                connection.flush().map_err(|fault| (place, fault))?;
            }
        }
        let place = of(position);
        let connection = &mut connections[place];
        let object = connection.string().map_err(|fault| (place, fault))?;
        if let Some(object) = &object {
            largest = largest.max(Some(object.len()));
        }
        each(position, object.as_deref());
        connection.keep(object.unwrap_or_default());
    }
    Ok(())
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("RedisStore")
            .field("server", &self.seed.server.name)
            .field("servers", &self.servers())
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
            // A cluster takes no keys of two slots in one command.
            for key in keys {
                connection.ask(&[command, key])?;
            }
            connection.flush()?;
            *sum += all(connection, keys.len(), Connection::number)?.iter().sum::<u64>();
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
