//! Members that talk within TLS, and who is not let in.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::{Plan, await_connected, cluster_of, get, put, until};
use crate::daemon::{self, Daemon};

const NAME: &str = "member.kvtier.test";

/// Signs certificates, and keeps the files.
struct Authority {
    directory: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let directory = tempfile::tempdir().expect("a directory");
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("signed");
        std::fs::write(directory.path().join("ca.pem"), certificate.pem()).expect("written");
        let issuer = Issuer::new(params, key);
        Authority { directory, issuer }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Flags of a member with a certificate for this name, who believes `believed`.
    fn flags(&self, member: &str, name: &str, believed: &Authority) -> Vec<String> {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let (at, key_at) = (self.file(&format!("{member}.pem")), self.file(&format!("{member}.key")));
        std::fs::write(&at, certificate.pem()).expect("written");
        std::fs::write(&key_at, key.serialize_pem()).expect("written");
        [
            ("--peer-tls-certificate-file", at),
            ("--peer-tls-key-file", key_at),
            ("--peer-tls-ca-file", believed.file("ca.pem")),
        ]
        .into_iter()
        .flat_map(|(flag, path)| [flag.to_owned(), path.display().to_string()])
        .collect()
    }
}

fn start(plan: &Plan, member: usize, more: &[String], settings: &str) -> Daemon {
    let mut flags = plan.flags_of(member);
    flags.extend(more.iter().cloned());
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let settings = format!("{settings}{}", Plan::settings());
    Daemon::start_in_with(daemon::directory(), &flags, &settings)
}

fn trouble(node: &Daemon) -> String {
    let cluster = cluster_of(node);
    cluster["peers"][0]["trouble"].as_str().expect("words").to_owned()
}

/// The first bytes that whoever listens there answers to these.
fn answer(address: &str, said: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).expect("listening");
    let patience = Some(Duration::from_secs(10));
    stream.set_read_timeout(patience).expect("set");
    stream.write_all(said).expect("sent");
    let mut bytes = vec![0; 64];
    let count = stream.read(&mut bytes).unwrap_or(0);
    bytes.truncate(count);
    bytes
}

#[test]
fn members_with_certificates_read_each_others_blocks_and_say_nothing_in_the_clear() {
    let (plan, authority) = (Plan::on_loopback(2), Authority::new());
    let port = TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("bound")
        .port();
    let settings = format!("peer_data_port = {port}\n");
    let nodes = [
        start(&plan, 0, &authority.flags("0", "127.0.0.1", &authority), &settings),
        start(&plan, 1, &authority.flags("1", "127.0.0.1", &authority), ""),
    ];
    await_connected(&nodes[0], 1);
    await_connected(&nodes[1], 1);
    put(&nodes[0], "sealed");
    assert_eq!(get(&nodes[1], "sealed").as_deref(), Some("remote"));
    // Who greets in the clear, as a member without certificates does, is told of an error of TLS by either port, and no more.
    let greetings = [
        (plan.addresses[0].clone(), [b"kvtierP1".as_slice(), &[0; 32]].concat()),
        (
            format!("127.0.0.1:{port}"),
            [b"KVTX\x01\x00\x01\x00".as_slice(), &[0; 16]].concat(),
        ),
    ];
    for (address, greeting) in greetings {
        let told = answer(&address, &greeting);
        assert_eq!(told.first(), Some(&21), "{address} answers {told:?}");
    }
}

#[test]
fn who_shows_no_certificate_or_one_of_others_is_not_let_in_and_both_say_why() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let plan = Plan::on_loopback(2);
    let node = start(&plan, 0, &ours.flags("0", "127.0.0.1", &ours), "");
    put(&node, "ours");
    // It believes our authority and is not of it.
    let stranger = start(&plan, 1, &theirs.flags("1", "127.0.0.1", &ours), "");
    until("it is told why", || trouble(&stranger).contains("TLS"));
    until("so is the other", || trouble(&node).contains("TLS"));
    assert_eq!(get(&stranger, "ours"), None);
    drop(stranger);
    let plain = start(&plan, 1, &[], "");
    until("it is told what is missing", || {
        trouble(&plain).contains("peer_tls_certificate_file")
    });
    assert_eq!(get(&plain, "ours"), None);
    assert_eq!(cluster_of(&node)["leased_blocks"], 0);
    drop(plain);
    let member = start(&plan, 1, &ours.flags("1", "127.0.0.1", &ours), "");
    await_connected(&member, 1);
    assert_eq!(get(&member, "ours").as_deref(), Some("remote"));
}

#[test]
fn certificates_are_for_the_address_that_is_called_or_for_the_name_that_the_settings_give() {
    let authority = Authority::new();
    let plan = Plan::on_loopback(2);
    let named = format!("peer_tls_name = \"{NAME}\"\n");
    let node = start(&plan, 0, &authority.flags("0", NAME, &authority), &named);
    let other = start(&plan, 1, &authority.flags("1", NAME, &authority), "");
    until("the name is looked at", || {
        trouble(&other).contains("not valid for name")
    });
    drop(other);
    let member = start(&plan, 1, &authority.flags("1", NAME, &authority), &named);
    await_connected(&member, 1);
    await_connected(&node, 1);
}

#[test]
fn certificates_that_cannot_be_used_keep_a_node_from_starting() {
    let (authority, plan) = (Authority::new(), Plan::on_loopback(2));
    let mut flags = plan.flags_of(0);
    flags.extend(authority.flags("0", NAME, &authority));
    std::fs::write(authority.file("0.pem"), "nothing\n").expect("written");
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let refused = Daemon::try_start(&flags, &Plan::settings())
        .map(drop)
        .expect_err("refused");
    assert!(refused.contains("0.pem") && refused.contains("write PEM"), "{refused}");
}
