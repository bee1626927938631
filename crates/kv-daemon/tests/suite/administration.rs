//! `kvctl` and the admin API together: tokens, namespaces, the audit log, TLS.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Output;

use crate::daemon::{Daemon, command, words};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};

fn kvctl(daemon: &Daemon, arguments: &[&str]) -> Output {
    let mut kvctl = command("kvctl");
    kvctl.env("KVTIER_STATE_DIR", daemon.state()).args(arguments);
    kvctl.output().unwrap()
}

fn answer(daemon: &Daemon, arguments: &[&str]) -> Value {
    let output = kvctl(daemon, &[&["--json"], arguments].concat());
    assert!(output.status.success(), "{arguments:?}: {}", words(&output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", words(&output)))
}

fn refused(daemon: &Daemon, arguments: &[&str], code: i32) -> String {
    let output = kvctl(daemon, arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", words(&output));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn tokens_are_made_used_and_revoked_from_a_shell() {
    let daemon = Daemon::start(&[]);
    let file = daemon.directory.path().join("reader.token");
    let path = file.to_str().unwrap();
    let made = answer(
        &daemon,
        &[
            "token",
            "create",
            "--role",
            "read",
            "--expires",
            "30d",
            "--label",
            "a b",
            "-o",
            path,
        ],
    );
    assert_eq!((&made["role"], &made["namespaces"]), (&json!("read"), &Value::Null));
    assert!(made["token"].is_null() && made["expires_at"].is_string(), "{made}");
    assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
    let secret = std::fs::read_to_string(&file).unwrap().trim().to_string();
    let bearer = format!("Bearer {secret}");
    assert_eq!(
        daemon.http_with("GET", "/v1/status", &[("Authorization", &bearer)]).0,
        200
    );
    assert_eq!(
        daemon.http_with("POST", "/v1/flush", &[("Authorization", &bearer)]).0,
        403
    );
    refused(&daemon, &["token", "list", "--admin-token-file", path], 77);
    let words = refused(&daemon, &["token", "create", "--role", "read", "-o", path], 73);
    assert!(
        words.contains("reader.token"),
        "what is there is not written over: {words}"
    );

    let bound = answer(
        &daemon,
        &[
            "token",
            "create",
            "--role",
            "purge",
            "--namespace",
            "red/a",
            "--namespace",
            "b",
        ],
    );
    assert_eq!(bound["namespaces"], json!(["red/a", "b"]));
    let list = answer(&daemon, &["token", "list"]);
    assert_eq!(list.as_array().unwrap().len(), 3);
    assert!(!list.to_string().contains(&secret[4..]));
    let id = made["id"].as_str().unwrap();
    answer(&daemon, &["token", "revoke", id]);
    assert_eq!(
        daemon.http_with("GET", "/v1/status", &[("Authorization", &bearer)]).0,
        401
    );
    refused(&daemon, &["token", "revoke", id], 1);
    refused(&daemon, &["token", "create", "--role", "read", "--expires", "soon"], 64);

    let plain = kvctl(&daemon, &["token", "create", "--role", "read"]);
    let shown = String::from_utf8(plain.stdout).unwrap();
    assert!(
        shown.starts_with("kvt_") && shown.trim().len() == 68,
        "only the token is on standard output"
    );
    let shown = shown.trim().to_string();
    let directory = daemon.stop_and_keep();
    let mut found = Vec::new();
    for item in std::fs::read_dir(directory.path().join("state")).unwrap() {
        let path = item.unwrap().path();
        let bytes = std::fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if text.contains(&shown[4..]) || text.contains(&secret[4..]) {
            found.push(path);
        }
    }
    assert_eq!(found, Vec::<PathBuf>::new(), "a token lies in the state directory");
    let daemon = Daemon::start_in(directory, &[]);
    let bearer = format!("Bearer {shown}");
    assert_eq!(
        daemon.http_with("GET", "/v1/status", &[("Authorization", &bearer)]).0,
        200,
        "good after a restart"
    );
}

#[test]
fn every_call_is_in_a_log_that_verifies_and_an_altered_one_does_not() {
    let daemon = Daemon::start(&[]);
    assert_eq!(daemon.http("GET", "/v1/status").0, 200);
    assert_eq!(daemon.http("POST", "/v1/flush").0, 200);
    assert_eq!(daemon.http_with("GET", "/v1/status", &[]).0, 401);
    let log = daemon.state().join("audit.jsonl");
    let path = log.to_str().unwrap().to_string();
    let found = answer(&daemon, &["audit", "verify", &path]);
    assert_eq!((&found["lines"], &found["breaks"]), (&json!(4), &json!([])));
    let token = daemon.token();
    let directory = daemon.kill();
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(!text.contains(&token) && text.contains("\"tok_admin\""), "{text}");

    let daemon = Daemon::start_in(directory, &[]);
    assert_eq!(daemon.http("GET", "/v1/status").0, 200);
    assert_eq!(
        answer(&daemon, &["audit", "verify", &path])["lines"],
        5,
        "one chain across a kill"
    );
    let directory = daemon.stop_and_keep();

    std::fs::write(&log, text.replacen("/v1/flush", "/v1/flash", 1)).unwrap();
    let output = command("kvctl").args(["audit", "verify", &path]).output().unwrap();
    assert_eq!(output.status.code(), Some(65), "{}", words(&output));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("line 2"),
        "{}",
        words(&output)
    );
    let daemon = Daemon::start_in(directory, &[]);
    assert_eq!(daemon.http("GET", "/v1/status").0, 200, "it serves on");
    let kept = std::fs::read_dir(daemon.state()).unwrap();
    let names: Vec<String> = kept
        .map(|item| item.unwrap().file_name().into_string().unwrap())
        .collect();
    let broken = names
        .iter()
        .find(|name| name.starts_with("audit-broken-"))
        .expect("set aside");
    let broken = daemon.state().join(broken);
    assert_eq!(
        answer(&daemon, &["audit", "verify", &path])["notes"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    refused(&daemon, &["audit", "verify", &path, broken.to_str().unwrap()], 65);
    let (_, log) = daemon.stop();
    assert!(log.contains("AUDIT LOG"), "{log}");
    let missing = command("kvctl")
        .args(["audit", "verify", "/nonexistent"])
        .output()
        .unwrap();
    assert_eq!(missing.status.code(), Some(66));
}

#[test]
fn kvctl_says_what_is_missing_and_keeps_tokens_out_of_the_clear() {
    let daemon = Daemon::start(&[]);
    let nowhere = daemon.directory.path().join("nowhere");
    let state = nowhere.to_str().unwrap();
    let words = refused(&daemon, &["purges", "--state-dir", state], 69);
    assert!(words.contains("http.addr") && words.contains("--http"), "{words}");
    let words = refused(&daemon, &["purges", "--http", "http://192.0.2.1:80"], 64);
    assert!(words.contains("in the clear"), "{words}");
    let words = refused(&daemon, &["purges", "--http", "https://127.0.0.1:1"], 64);
    assert!(words.contains("--http-ca-file"), "{words}");
    refused(&daemon, &["purges", "--admin-token-file", state], 66);
    let wrong = daemon.directory.path().join("wrong.token");
    std::fs::write(&wrong, "kvt_00\n").unwrap();
    refused(&daemon, &["purges", "--admin-token-file", wrong.to_str().unwrap()], 77);
    std::fs::write(&wrong, "two words\n").unwrap();
    refused(&daemon, &["purges", "--admin-token-file", wrong.to_str().unwrap()], 65);
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    refused(&daemon, &["purges", "--http", &free.to_string()], 69);
    refused(&daemon, &["purge", "a", "--hash", "00", "--label", "l"], 64);
    refused(&daemon, &["purge", "a", "--output", "f"], 64);
}

/// Certificates of one authority: the server's, a client's, and what signs both.
struct Certificates {
    ca: PathBuf,
    server: (PathBuf, PathBuf),
    client: (PathBuf, PathBuf),
}

fn certificates(directory: &Path) -> Certificates {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let write = |name: &str, text: String| {
        let path = directory.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    let pair = |name: &str, names: &[&str]| {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &ca).unwrap();
        let certificate = write(&format!("{name}.pem"), certificate.pem());
        (certificate, write(&format!("{name}.key"), key.serialize_pem()))
    };
    Certificates {
        server: pair("server", &["127.0.0.1", "kv.example.org"]),
        client: pair("client", &["operator"]),
        ca: write("ca.pem", ca.pem()),
    }
}

#[test]
fn with_a_certificate_the_server_speaks_tls_only_and_may_leave_loopback() {
    let directory = crate::daemon::directory();
    let made = certificates(directory.path());
    let settings = format!(
        "http_tls_certificate_file = {:?}\nhttp_tls_key_file = {:?}\n",
        made.server.0, made.server.1
    );
    let program = command("kv-daemon");
    let daemon = Daemon::try_launch_on(program, directory, &[], &settings, "0.0.0.0:0")
        .unwrap_or_else(|(log, _)| panic!("{log}"));
    let address = daemon.http_address();
    let port = address
        .strip_prefix("https://0.0.0.0:")
        .unwrap_or_else(|| panic!("{address}"))
        .to_string();
    let url = format!("https://127.0.0.1:{port}");
    let ca = made.ca.to_str().unwrap();
    let list = answer(&daemon, &["token", "list", "--http", &url, "--http-ca-file", ca]);
    assert_eq!(list[0]["id"], "tok_admin");
    // The wrong authority is not believed.
    let other = crate::daemon::directory();
    let others = certificates(other.path());
    let arguments = [
        "token",
        "list",
        "--http",
        &url,
        "--http-ca-file",
        others.ca.to_str().unwrap(),
    ];
    refused(&daemon, &arguments, 69);
    // Who speaks no TLS gets nothing, and nobody else waits for who says nothing at all.
    let silent = std::net::TcpStream::connect(("127.0.0.1", port.parse().unwrap())).unwrap();
    let plain = kvctl(
        &daemon,
        &["token", "list", "--http", &format!("http://127.0.0.1:{port}")],
    );
    assert_eq!(plain.status.code(), Some(69), "{}", words(&plain));
    answer(&daemon, &["token", "list", "--http", &url, "--http-ca-file", ca]);
    drop(silent);
}

#[test]
fn with_a_client_authority_a_token_alone_does_not_suffice() {
    let directory = crate::daemon::directory();
    let made = certificates(directory.path());
    let stranger = crate::daemon::directory();
    let strange = certificates(stranger.path());
    let settings = format!(
        "http_tls_certificate_file = {:?}\nhttp_tls_key_file = {:?}\nhttp_tls_client_ca_file = {:?}\n",
        made.server.0, made.server.1, made.ca
    );
    let daemon = Daemon::start_in_with(directory, &[], &settings);
    let ca = made.ca.to_str().unwrap();
    let with = |pair: &(PathBuf, PathBuf)| {
        let (certificate, key) = (
            pair.0.to_str().unwrap().to_string(),
            pair.1.to_str().unwrap().to_string(),
        );
        [
            "--http-client-certificate-file".to_string(),
            certificate,
            "--http-client-key-file".to_string(),
            key,
        ]
    };
    let ask = |extra: &[String]| {
        let mut arguments = vec!["token", "list", "--http-ca-file", ca];
        arguments.extend(extra.iter().map(String::as_str));
        kvctl(&daemon, &arguments)
    };
    let shown = ask(&with(&made.client));
    assert!(shown.status.success(), "{}", words(&shown));
    for extra in [Vec::new(), with(&strange.client).to_vec()] {
        let output = ask(&extra);
        assert_eq!(output.status.code(), Some(69), "{}", words(&output));
    }
}

#[test]
fn tls_files_that_cannot_be_used_keep_the_daemon_from_starting() {
    let directory = crate::daemon::directory();
    let made = certificates(directory.path());
    let other = crate::daemon::directory();
    let others = certificates(other.path());
    let nonsense = directory.path().join("nonsense");
    std::fs::write(&nonsense, "no PEM").unwrap();
    let settings = |certificate: &Path, key: &Path, ca: &Path| {
        format!(
            "http_tls_certificate_file = {certificate:?}\nhttp_tls_key_file = {key:?}\nhttp_tls_client_ca_file = {ca:?}\n"
        )
    };
    let (certificate, key) = &made.server;
    for (settings, field) in [
        (settings(&nonsense, key, &made.ca), "http_tls_certificate_file"),
        (settings(certificate, &nonsense, &made.ca), "http_tls_key_file"),
        (
            settings(certificate, &others.server.1, &made.ca),
            "http_tls_certificate_file",
        ),
        (settings(certificate, key, &nonsense), "http_tls_client_ca_file"),
        (
            settings(certificate, key, Path::new("/nonexistent")),
            "http_tls_client_ca_file",
        ),
    ] {
        let log = Daemon::try_start(&[], &settings).err().expect("refused");
        assert!(log.contains("exit status: 78") && log.contains(field), "{field}: {log}");
    }
}
