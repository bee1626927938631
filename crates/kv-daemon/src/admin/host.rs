//! Which `Host` a request may have, so that a page in a browser cannot reach the server by pointing a name of its own at it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::ParsedCertificate;

/// Names of loopback, the address that is listened on, and what the certificate names.
#[derive(Clone, Debug, Default)]
pub struct HostNames {
    bound: Option<IpAddr>,
    certificate: Option<Arc<CertificateDer<'static>>>,
}

impl HostNames {
    /// Of a server that listens on `address`, with the certificate that it shows, if any.
    #[must_use]
    pub fn new(address: SocketAddr, certificate: Option<CertificateDer<'static>>) -> HostNames {
        HostNames {
            bound: Some(address.ip()).filter(|ip| !ip.is_unspecified()),
            certificate: certificate.map(Arc::new),
        }
    }

    /// Whether a `Host` header of this value is for this server.
    #[must_use]
    pub fn accept(&self, host: &str) -> bool {
        let name = without_port(host);
        match name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            Ok(ip) => ip.is_loopback() || self.bound == Some(ip) || self.certified(name),
            Err(_) => name.eq_ignore_ascii_case("localhost") || self.certified(name),
        }
    }

    fn certified(&self, name: &str) -> bool {
        let Some(certificate) = &self.certificate else {
            return false;
        };
        let name = name.trim_start_matches('[').trim_end_matches(']');
        let Ok(name) = ServerName::try_from(name) else {
            return false;
        };
        ParsedCertificate::try_from(certificate.as_ref()).is_ok_and(|parsed| verify_server_name(&parsed, &name).is_ok())
    }
}

fn without_port(host: &str) -> &str {
    if host.ends_with(']') || host.matches(':').count() > 1 && !host.starts_with('[') {
        return host;
    }
    match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_loopback_pass_where_there_is_no_certificate() {
        let names = HostNames::new("127.0.0.1:9640".parse().unwrap(), None);
        for host in [
            "127.0.0.1",
            "127.0.0.1:9640",
            "localhost",
            "LocalHost:1",
            "[::1]",
            "[::1]:9640",
            "127.9.9.9:1",
        ] {
            assert!(names.accept(host), "{host}");
        }
        for host in [
            "example.org",
            "127.0.0.1.example.org",
            "10.0.0.1:9640",
            "localhost.example.org:80",
            "",
            "[::2]:1",
            ":80",
        ] {
            assert!(!names.accept(host), "{host}");
        }
    }

    #[test]
    fn the_bound_address_and_what_the_certificate_names_pass_too() {
        let made = rcgen::generate_simple_self_signed(["kv.example.org".to_string(), "192.0.2.9".to_string()]).unwrap();
        let names = HostNames::new("192.0.2.1:443".parse().unwrap(), Some(made.cert.der().clone()));
        for host in [
            "kv.example.org",
            "KV.example.org:443",
            "192.0.2.9:1",
            "192.0.2.1:443",
            "localhost:1",
        ] {
            assert!(names.accept(host), "{host}");
        }
        for host in ["example.org", "evil.kv.example.org", "192.0.2.2"] {
            assert!(!names.accept(host), "{host}");
        }
        let everywhere = HostNames::new("0.0.0.0:443".parse().unwrap(), None);
        assert!(!everywhere.accept("0.0.0.0:443"));
    }
}
