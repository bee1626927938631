//! Connections to one server, and what becomes of a call.

use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::connection::{Connection, Fault};
use super::server::Server;
use crate::remote::StoreError;
use crate::remote::store::readable;

/// See the module.
pub(super) struct Pool {
    pub(super) server: Server,
    connections: usize,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Default)]
struct State {
    idle: Vec<Connection>,
    /// Calls that run.
    taken: usize,
}

/// A call that was not done, and what to make of it.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) kind: Kind,
    pub(super) error: StoreError,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Another server of the cluster has it.
    Elsewhere,
    /// The server is not there, or cannot serve now.
    Away,
    Other,
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Trouble {
        Trouble {
            kind: Kind::Other,
            error,
        }
    }
}

impl Pool {
    pub(super) fn new(server: Server, connections: usize) -> Pool {
        Pool {
            server,
            connections: connections.max(1),
            state: Mutex::default(),
            freed: Condvar::new(),
        }
    }

    /// For another server of the cluster, with as many connections.
    pub(super) fn beside(&self, server: Server) -> Pool {
        Pool::new(server, self.connections)
    }

    /// A connection of its own for as long as both are held.
    pub(super) fn connect(&self, command: &'static str, until: Instant) -> Result<(Place<'_>, Connection), Trouble> {
        let place = self.take(command, until)?;
        let mut connection = match place.idle() {
            Some(connection) => connection,
            None => {
                Connection::open(&self.server, until).map_err(|fault| self.trouble("a connection", fault, until))?
            }
        };
        connection.begin(until);
        Ok((place, connection))
    }

    /// Does a job on a connection, which goes back to the others when every answer of it came.
    pub(super) fn run<T>(
        &self,
        command: &'static str,
        until: Instant,
        mut job: impl FnMut(&mut Connection) -> Result<T, Fault>,
    ) -> Result<T, Trouble> {
        let place = self.take(command, until)?;
        let mut idle = place.idle();
        loop {
            let was_idle = idle.is_some();
            let opened = match idle.take() {
                Some(connection) => Ok(connection),
                None => Connection::open(&self.server, until),
            };
            let mut connection = opened.map_err(|fault| self.trouble("a connection", fault, until))?;
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
            return Err(self.trouble(command, fault, until));
        }
    }

    fn take(&self, command: &'static str, until: Instant) -> Result<Place<'_>, Trouble> {
        let mut pool = self.state.lock();
        while pool.taken >= self.connections {
            if self.freed.wait_until(&mut pool, until).timed_out() {
                return Err(self.trouble(command, Fault::Late, until));
            }
        }
        pool.taken += 1;
        Ok(Place { pool: self })
    }

    pub(super) fn trouble(&self, command: &'static str, fault: Fault, until: Instant) -> Trouble {
        let kind = match &fault {
            Fault::Refused(reason) => match reason.split(' ').next() {
                Some("MOVED" | "ASK") => Kind::Elsewhere,
                Some("CLUSTERDOWN" | "TRYAGAIN" | "MASTERDOWN") => Kind::Away,
                _ => Kind::Other,
            },
            Fault::Socket(_) => Kind::Away,
            Fault::Late | Fault::Garbled(_) => Kind::Other,
        };
        let error = self.error(command, fault, until);
        Trouble { kind, error }
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
                        reason: format!("its cluster moves what is asked for ({reason})"),
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

/// The right to one connection.
pub(super) struct Place<'pool> {
    pool: &'pool Pool,
}

impl Place<'_> {
    /// One that is connected and was not closed since, as far as can be seen.
    fn idle(&self) -> Option<Connection> {
        loop {
            let mut connection = self.pool.state.lock().idle.pop()?;
            if connection.is_quiet() {
                return Some(connection);
            }
        }
    }

    /// Leaves a connection for the next, unless an answer is still awaited on it, or one came unasked: it would be taken for another's.
    pub(super) fn keep(&self, connection: Connection) {
        if connection.is_settled() {
            self.pool.state.lock().idle.push(connection);
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.pool.state.lock().taken -= 1;
        self.pool.freed.notify_one();
    }
}
