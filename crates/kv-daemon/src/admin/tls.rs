//! TLS of the admin server: what it shows, and what a client must show.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

/// A setting that cannot be used: which, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("setting {field} = {path:?}: {what}")]
pub struct TlsError {
    /// The setting.
    pub field: &'static str,
    /// Its file.
    pub path: String,
    /// What is wrong, then what to do.
    pub what: String,
}

/// What a TLS server needs.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    certificate: CertificateDer<'static>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Tls").finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads a certificate chain and its key, PEM; with `client_ca`, clients must show a certificate of it. TLS 1.3 only.
    ///
    /// # Errors
    /// Which file cannot be used.
    pub fn load(certificate: &Path, key: &Path, client_ca: Option<&Path>) -> Result<Tls, TlsError> {
        let of = |field, path: &Path, what: String| TlsError {
            field,
            path: path.display().to_string(),
            what,
        };
        let bad_certificate = |what: String| of("http_tls_certificate_file", certificate, what);
        let chain = certificates(certificate).map_err(bad_certificate)?;
        let first = chain[0].clone();
        let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| {
            of(
                "http_tls_key_file",
                key,
                format!("no private key in PEM can be read: {error}"),
            )
        })?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| bad_certificate(error.to_string()))?;
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let bad_ca = |what: String| of("http_tls_client_ca_file", path, what);
                let mut roots = RootCertStore::empty();
                for root in certificates(path).map_err(bad_ca)? {
                    roots.add(root).map_err(|error| bad_ca(error.to_string()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .build()
                    .map_err(|error| bad_ca(error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_single_cert(chain, secret).map_err(|error| {
            bad_certificate(format!(
                "it does not go with its key ({error}): name a pair that was made together"
            ))
        })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Tls {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            certificate: first,
        })
    }

    /// What turns a connection into one of TLS.
    #[must_use]
    pub fn acceptor(&self) -> &TlsAcceptor {
        &self.acceptor
    }

    /// What the server shows.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(found) if found.is_empty() => Err("there is no certificate in it: write PEM".to_string()),
        Ok(found) => Ok(found),
        Err(error) => Err(format!("no certificates in PEM can be read: {error}")),
    }
}
