//! Where a server is and how it is reached.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use parking_lot::{Condvar, Mutex};
use redis::{ConnectionAddr, IntoConnectionInfo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use zeroize::Zeroizing;

use super::connection::Fault;
use super::{RedisSettings, StoreError};

/// The shortest wait that is worth a system call.
const PATIENCE_MIN: Duration = Duration::from_millis(1);

pub(super) struct Server {
    /// For messages: no password in it.
    pub(super) name: String,
    host: String,
    port: u16,
    pub(super) user: Option<String>,
    pub(super) password: Option<Zeroizing<String>>,
    pub(super) database: i64,
    pub(super) tls: Option<Tls>,
    pub(super) patience: Duration,
    asking: Arc<Asking>,
}

/// Whether a thread asks for the host's addresses.
#[derive(Default)]
struct Asking {
    is_on: Mutex<bool>,
    ended: Condvar,
}

impl Asking {
    /// Waits for whoever asks; false when the time is over.
    fn begin(&self, until: Instant) -> bool {
        let mut is_on = self.is_on.lock();
        while *is_on {
            if self.ended.wait_until(&mut is_on, until).timed_out() {
                return false;
            }
        }
        *is_on = true;
        true
    }

    fn end(&self) {
        *self.is_on.lock() = false;
        self.ended.notify_one();
    }
}

pub(super) struct Tls {
    pub(super) config: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
}

/// An address, taken apart.
struct Url {
    host: String,
    port: u16,
    user: Option<String>,
    password: Option<Zeroizing<String>>,
    database: i64,
    is_tls: bool,
}

impl Url {
    fn parse(url: &str) -> Result<Url, StoreError> {
        let bad = |reason: &str| StoreError::Url {
            reason: reason.to_owned(),
        };
        let (is_tls, rest) = match url.split_once("://") {
            Some(("redis", rest)) => (false, rest),
            Some(("rediss", rest)) => (true, rest),
            _ => return Err(bad("it begins with something else than redis:// or rediss://")),
        };
        if rest.contains(['?', '#']) {
            return Err(bad(
                "options behind ? or # are not understood; write these characters in a password as %3F and %23",
            ));
        }
        // TLS is ours: the library need not know of it. Its reason may quote what is secret, and is left out.
        let parsed = Zeroizing::new(format!("redis://{rest}"))
            .as_str()
            .into_connection_info()
            .map_err(|_| bad("it has no host, or a port or a database that is no number"))?;
        let ConnectionAddr::Tcp(host, port) = parsed.addr() else {
            return Err(bad("it has no host"));
        };
        let settings = parsed.redis_settings();
        if settings.db() < 0 {
            return Err(bad("its database is below zero"));
        }
        if settings.username().is_some() && settings.password().is_none() {
            return Err(bad("it has a user and no password"));
        }
        Ok(Url {
            host: host.clone(),
            port: *port,
            user: settings.username().map(str::to_owned),
            password: settings.password().map(|password| Zeroizing::new(password.to_owned())),
            database: settings.db(),
            is_tls,
        })
    }

    fn name(&self) -> String {
        let scheme = if self.is_tls { "rediss" } else { "redis" };
        match self.host.parse() {
            Ok(IpAddr::V6(address)) => format!("{scheme}://[{address}]:{}/{}", self.port, self.database),
            _ => format!("{scheme}://{}:{}/{}", self.host, self.port, self.database),
        }
    }
}

/// Without user and password.
impl fmt::Debug for RedisSettings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Url::parse(&self.url).map_or_else(|_| "no address".to_owned(), |url| url.name());
        formatter
            .debug_struct("RedisSettings")
            .field("url", &name)
            .field("connections", &self.connections)
            .field("timeout", &self.timeout)
            .finish()
    }
}

impl Server {
    /// `authorities`, in PEM, sign the server's certificate; without them, those that the system knows.
    pub(super) fn new(settings: &RedisSettings, authorities: Option<&[u8]>) -> Result<Server, StoreError> {
        let url = Url::parse(&settings.url)?;
        if authorities.is_some() && !url.is_tls {
            return Err(StoreError::Url {
                reason: "authorities are given for a server without TLS: write rediss://".to_owned(),
            });
        }
        Ok(Server {
            name: url.name(),
            tls: url.is_tls.then(|| Tls::new(&url.host, authorities)).transpose()?,
            host: url.host,
            port: url.port,
            user: url.user,
            password: url.password,
            database: url.database,
            patience: settings.timeout.max(PATIENCE_MIN),
            asking: Arc::default(),
        })
    }

    /// Another server of its cluster, reached as this one is; an empty host is this one's.
    pub(super) fn sibling(&self, host: &str, port: u16) -> Server {
        let host = if host.is_empty() { &self.host } else { host };
        let url = Url {
            host: host.to_owned(),
            port,
            user: self.user.clone(),
            password: self.password.clone(),
            // A cluster has no other.
            database: 0,
            is_tls: self.tls.is_some(),
        };
        let tls = self.tls.as_ref().map(|tls| Tls {
            config: Arc::clone(&tls.config),
            // A host that can be in no certificate has none: the connection will say so.
            name: ServerName::try_from(host.to_owned()).unwrap_or_else(|_| tls.name.clone()),
        });
        Server {
            name: url.name(),
            tls,
            host: url.host,
            port,
            user: url.user,
            password: url.password,
            database: 0,
            patience: self.patience,
            asking: Arc::default(),
        }
    }

    /// A socket that is connected, whichever of the host's addresses answers first in their order.
    pub(super) fn connect(&self, until: Instant) -> Result<TcpStream, Fault> {
        let mut refused = None;
        for address in self.addresses(until)? {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Fault::Late);
            }
            match TcpStream::connect_timeout(&address, left.min(self.patience)) {
                Ok(socket) => return Ok(socket),
                Err(error) => refused = Some(error),
            }
        }
        Err(refused
            .unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"))
            .into())
    }

    /// The system asks for names without a deadline: a thread does, one at a time, and is left to itself when the call's time is over.
    fn addresses(&self, until: Instant) -> Result<Vec<SocketAddr>, Fault> {
        if let Ok(address) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, self.port)]);
        }
        if !self.asking.begin(until) {
            return Err(Fault::Late);
        }
        let (answer, answered) = bounded(1);
        let (host, asking) = ((self.host.clone(), self.port), Arc::clone(&self.asking));
        let asked = std::thread::Builder::new()
            .name("kvtier-resolve".to_owned())
            .spawn(move || {
                let addresses = host.to_socket_addrs().map(Iterator::collect);
                asking.end();
                // Who asked may have gone.
                let _ = answer.send(addresses);
            });
        if let Err(error) = asked {
            self.asking.end();
            return Err(error.into());
        }
        let addresses: io::Result<Vec<SocketAddr>> = answered.recv_deadline(until).map_err(|_| Fault::Late)?;
        Ok(addresses?)
    }
}

impl Tls {
    fn new(host: &str, authorities: Option<&[u8]>) -> Result<Tls, StoreError> {
        let bad = |reason: String| StoreError::Authorities { reason };
        let mut roots = RootCertStore::empty();
        match authorities {
            Some(pem) => {
                for root in CertificateDer::pem_slice_iter(pem) {
                    let root = root.map_err(|error| bad(error.to_string()))?;
                    roots.add(root).map_err(|error| bad(error.to_string()))?;
                }
            }
            None => {
                // The system's store may hold some that are of no use.
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            }
        }
        if roots.is_empty() {
            return Err(bad("there is none".to_owned()));
        }
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| bad(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(host.to_owned()).map_err(|error| StoreError::Url {
            reason: format!("its host cannot be in a certificate: {error}"),
        })?;
        Ok(Tls {
            config: Arc::new(config),
            name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_apart_and_shown_without_its_secrets() {
        let url = Url::parse("redis://me:s%23cret@cache.example:7000/3").expect("an address");
        assert_eq!((url.host.as_str(), url.port, url.database), ("cache.example", 7000, 3));
        assert_eq!(url.user.as_deref(), Some("me"));
        assert_eq!(url.password.as_deref().map(String::as_str), Some("s#cret"));
        assert_eq!(url.name(), "redis://cache.example:7000/3");
        let url = Url::parse("rediss://:secret@[::1]").expect("an address");
        assert!(url.is_tls && url.user.is_none() && url.password.is_some());
        assert_eq!(url.name(), "rediss://[::1]:6379/0");
    }

    #[test]
    fn what_is_no_address_is_refused_without_showing_it() {
        for url in [
            "",
            "localhost:6379",
            "unix:///run/secret.sock",
            "valkey://secret@host",
            "redis://",
            "redis://me:secret@host:port",
            "redis://me:secret@host/x",
            "redis://:secret@host/-1",
            "redis://secret@host",
            "redis://:secret@host?protocol=3",
            "rediss://:secret@host#insecure",
            "redis://:se#cret@host",
        ] {
            let error = Url::parse(url).err().unwrap_or_else(|| panic!("{url} is taken"));
            assert!(matches!(error, StoreError::Url { .. }));
            assert!(!format!("{error} {error:?}").contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_server_with_tls_needs_authorities_that_are_some() {
        let settings = |url: &str| RedisSettings {
            url: url.to_owned(),
            connections: 1,
            timeout: Duration::from_secs(1),
        };
        let of = |url: &str, pem: &[u8]| {
            Server::new(&settings(url), Some(pem))
                .err()
                .map(|error| error.to_string())
        };
        assert!(of("rediss://host", b"").is_some_and(|error| error.contains("there is none")));
        assert!(of("redis://host", b"").is_some_and(|error| error.contains("rediss://")));
    }
}
