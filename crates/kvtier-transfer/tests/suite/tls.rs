//! TLS between nodes: who is let in, and that nobody is without it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::OnceLock;
use std::time::Duration;

use kvtier_transfer::tcp::{Tcp, TcpSettings, Tls};
use kvtier_transfer::{ConnectError, PeerAddress, Transport};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::stand::PATIENCE;

const NAME: &str = "node.kvtier.test";

/// Signs nodes' certificates.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("signed");
        Authority {
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    /// A node's certificate and key.
    fn node(&self, name: &str, expired: bool) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        if expired {
            params.not_after = rcgen::date_time_ymd(2001, 1, 1);
            params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        }
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        (certificate.pem(), key.serialize_pem())
    }

    /// What a node of this authority has that believes `other`.
    fn tls(&self, other: &Authority, name: &str, expired: bool) -> Tls {
        let (certificate, key) = self.node(name, expired);
        let made = Tls::new(certificate.as_bytes(), key.as_bytes(), other.pem.as_bytes(), Some(NAME));
        made.expect("they go together")
    }
}

/// For the suite: a node that believes nodes like itself.
pub(crate) fn of_the_suite() -> Tls {
    static TLS: OnceLock<Tls> = OnceLock::new();
    TLS.get_or_init(|| {
        let authority = Authority::new();
        authority.tls(&authority, NAME, false)
    })
    .clone()
}

fn node(tls: Option<Tls>) -> Tcp {
    let settings = TcpSettings {
        tls,
        ..TcpSettings::default()
    };
    Tcp::start(settings).expect("a port")
}

fn connect(caller: Option<Tls>, owner: Option<Tls>) -> Result<(), ConnectError> {
    let (caller, owner) = (node(caller), node(owner));
    caller.connect(&owner.address(), PATIENCE).map(drop)
}

fn is_denied(outcome: &Result<(), ConnectError>) -> bool {
    matches!(outcome, Err(ConnectError::Denied { .. }))
}

#[test]
fn nodes_of_one_authority_accept_each_other() {
    let authority = Authority::new();
    let tls = || Some(authority.tls(&authority, NAME, false));
    assert_eq!(connect(tls(), tls()), Ok(()));
}

#[test]
fn a_certificate_of_another_authority_is_refused_whichever_side_shows_it() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let right = || Some(ours.tls(&ours, NAME, false));
    // It believes us, and we do not believe it.
    let wrong = || Some(theirs.tls(&ours, NAME, false));
    for outcome in [connect(wrong(), right()), connect(right(), wrong())] {
        assert!(is_denied(&outcome), "{outcome:?}");
    }
}

#[test]
fn an_expired_certificate_is_refused_whichever_side_shows_it() {
    let authority = Authority::new();
    let right = || Some(authority.tls(&authority, NAME, false));
    let expired = || Some(authority.tls(&authority, NAME, true));
    for outcome in [connect(expired(), right()), connect(right(), expired())] {
        assert!(is_denied(&outcome), "{outcome:?}");
    }
}

#[test]
fn a_listener_s_certificate_for_another_name_is_refused() {
    let authority = Authority::new();
    let right = Some(authority.tls(&authority, NAME, false));
    let other = Some(authority.tls(&authority, "elsewhere.kvtier.test", false));
    let outcome = connect(right, other);
    assert!(is_denied(&outcome), "{outcome:?}");
}

#[test]
fn a_node_without_tls_and_one_with_it_do_not_talk_in_the_clear() {
    let authority = Authority::new();
    let tls = || Some(authority.tls(&authority, NAME, false));
    for outcome in [connect(None, tls()), connect(tls(), None)] {
        assert!(outcome.is_err(), "{outcome:?}");
    }
}

#[test]
fn who_speaks_plainly_gets_no_word_of_the_protocol() {
    let authority = Authority::new();
    let owner = node(Some(authority.tls(&authority, NAME, false)));
    let PeerAddress::Tcp(address) = owner.address() else {
        unreachable!("it is tcp")
    };
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
    stream.write_all(b"KVTX\x01\x00\x00\x00nonce-of-16bytes").expect("sent");
    let mut answer = Vec::new();
    // A reset instead of an end is as good.
    let _ = stream.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"KVTX") && answer.len() < 16, "{answer:?}");
}

#[test]
fn a_certificate_that_is_none_is_told_before_anything_starts() {
    let authority = Authority::new();
    let (certificate, key) = authority.node(NAME, false);
    let (_, other_key) = authority.node(NAME, false);
    let made = |certificate: &str, key: &str, ca: &str| {
        let tls = Tls::new(certificate.as_bytes(), key.as_bytes(), ca.as_bytes(), None);
        tls.map(drop).map_err(|error| error.to_string())
    };
    assert!(made("", &key, &authority.pem).is_err_and(|why| why.contains("certificate")));
    assert!(made(&certificate, "", &authority.pem).is_err_and(|why| why.contains("key")));
    assert!(made(&certificate, &other_key, &authority.pem).is_err());
    assert!(made(&certificate, &key, "").is_err_and(|why| why.contains("authorities")));
}
