//! TLS between nodes, on request: both ends show a certificate and check the other's, TLS 1.3 only.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};

/// For a whole handshake, however its bytes drip.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(5);

/// What this node shows, and whom it believes.
#[derive(Clone)]
pub struct Tls {
    caller: Arc<ClientConfig>,
    listener: Arc<ServerConfig>,
    name: Option<ServerName<'static>>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Tls").finish_non_exhaustive()
    }
}

/// Certificates or a key that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("TLS between nodes: {0}")]
pub struct TlsError(String);

impl Tls {
    /// From PEM: this node's certificate chain and its key, and the authorities that sign every node's. A peer's certificate
    /// must be for `name`, or without one for the IP address that is called; a caller's for any name.
    ///
    /// # Errors
    /// Which of them cannot be used.
    pub fn new(certificate: &[u8], key: &[u8], authorities: &[u8], name: Option<&str>) -> Result<Tls, TlsError> {
        let bad = |what: &'static str| move |error: &dyn std::fmt::Display| TlsError(format!("{what}: {error}"));
        let chain = certificates("the certificate", certificate)?;
        let secret = PrivateKeyDer::from_pem_slice(key).map_err(|error| bad("the key")(&error))?;
        let mut roots = RootCertStore::empty();
        for root in certificates("the authorities", authorities)? {
            roots.add(root).map_err(|error| bad("the authorities")(&error))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| bad("the authorities")(&error))?;
        let pair = |error: rustls::Error| bad("the certificate and its key")(&error);
        let listener = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(pair)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), secret.clone_key())
            .map_err(pair)?;
        let caller = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(pair)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, secret)
            .map_err(pair)?;
        let name = name.map(|name| ServerName::try_from(name.to_owned())).transpose();
        Ok(Tls {
            caller: Arc::new(caller),
            listener: Arc::new(listener),
            name: name.map_err(|error| bad("the name of peers")(&error))?,
        })
    }

    /// Shakes hands with whoever was called. The stream's own time limits apply.
    pub(super) fn call(&self, stream: &TcpStream, address: SocketAddr) -> io::Result<Connection> {
        let name = self.name.clone().unwrap_or(ServerName::IpAddress(address.ip().into()));
        let connection = ClientConnection::new(Arc::clone(&self.caller), name).map_err(io::Error::other)?;
        shake_hands(stream, connection.into()).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                io::Error::new(io::ErrorKind::PermissionDenied, "it ended the TLS handshake")
            }
            _ => refused(error),
        })
    }

    /// Shakes hands with a caller. The stream's own time limits apply.
    pub(super) fn take(&self, stream: &TcpStream) -> io::Result<Connection> {
        let connection = ServerConnection::new(Arc::clone(&self.listener)).map_err(io::Error::other)?;
        shake_hands(stream, connection.into()).map_err(refused)
    }
}

fn shake_hands(mut stream: &TcpStream, mut connection: Connection) -> io::Result<Connection> {
    // Bounds what is encrypted and not sent: a record at a time goes out at once.
    connection.set_buffer_limit(Some(0x1_0000));
    let until = Instant::now() + HANDSHAKE_PATIENCE;
    while connection.is_handshaking() || connection.wants_write() {
        if Instant::now() >= until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if connection.wants_write() {
            connection.write_tls(&mut stream)?;
        } else if connection.read_tls(&mut stream)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        } else if let Err(error) = connection.process_new_packets() {
            // The other end is told why.
            let _ = connection.write_tls(&mut stream);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
    Ok(connection)
}

/// What TLS does not accept, in its words; anything else is the network's.
pub(super) fn refused(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::InvalidData => io::Error::new(io::ErrorKind::PermissionDenied, format!("TLS: {error}")),
        _ => error,
    }
}

fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    match read {
        Ok(found) if found.is_empty() => Err(TlsError(format!("{what}: there is none, write PEM"))),
        Ok(found) => Ok(found),
        Err(error) => Err(TlsError(format!("{what}: {error}"))),
    }
}
