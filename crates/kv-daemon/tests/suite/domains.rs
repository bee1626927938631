//! Trust domains: a connected client of another domain gets no memory, no hit and no listing of the first's, and the same
//! answers whether or not the first holds a name or a key.

use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use crate::daemon::{Daemon, words};
use crate::raw::{self, Answer, Raw};
use serde_json::Value;

const TOKENS: [&str; 2] = ["the-first-domains-token", "the-second-domains-token"];
const BLOCK_BYTES: usize = 20_000;
const SECRET: &[u8] = b"bytes of the first domain only";

/// A daemon that everybody may connect to, with two domains known by token.
fn daemon_for_all() -> (Daemon, [PathBuf; 2]) {
    let tokens = crate::daemon::directory();
    let paths = [0, 1].map(|index| {
        let path = tokens.path().join(format!("token-{index}"));
        std::fs::write(&path, format!("{}\n", TOKENS[index])).unwrap();
        path
    });
    let settings: String = paths
        .iter()
        .zip(["first", "second"])
        .map(|(path, name)| format!("[[domains]]\nname = \"{name}\"\ntoken_file = {path:?}\n"))
        .collect();
    let daemon = Daemon::start_with(&["--socket-mode", "0666", "--nvme-bytes", "16MiB"], &settings);
    // The daemon has read the tokens by now; the copies for clients lie in its directory.
    let paths = paths.map(|path| {
        let copy = daemon.directory.path().join(path.file_name().unwrap());
        std::fs::copy(&path, &copy).unwrap();
        copy
    });
    (daemon, paths)
}

fn secret_block() -> Vec<u8> {
    SECRET.iter().copied().cycle().take(BLOCK_BYTES).collect()
}

fn as_domain(daemon: &Daemon, token: &PathBuf, arguments: &[&str]) -> Output {
    daemon
        .kvctl()
        .arg("--json")
        .arg("--token-file")
        .arg(token)
        .args(arguments)
        .output()
        .unwrap()
}

/// The first domain stores a block in namespace `held` under the key `held`.
fn first_stores(daemon: &Daemon, token: &PathBuf) -> String {
    let file = daemon.directory.path().join("secret");
    std::fs::write(&file, secret_block()).unwrap();
    let put = as_domain(
        daemon,
        token,
        &["--namespace", "held", "put", "held", file.to_str().unwrap()],
    );
    assert!(put.status.success(), "{}", words(&put));
    let put: Value = serde_json::from_slice(&put.stdout).unwrap();
    put["key"].as_str().unwrap().to_string()
}

#[test]
fn another_token_gets_no_hit_and_no_listing_and_cannot_tell() {
    let (daemon, [first, second]) = daemon_for_all();
    let listing = |when: &str| {
        let status = as_domain(&daemon, &second, &["status"]);
        assert!(status.status.success(), "{when}: {}", words(&status));
        status.stdout
    };
    let before = listing("before");
    first_stores(&daemon, &first);
    assert_eq!(
        listing("after"),
        before,
        "the status of the second does not change with what the first holds"
    );
    let status: Value = serde_json::from_slice(&before).unwrap();
    assert_eq!(status["domain"], "second", "{status}");
    assert_eq!(status.get("domains"), None, "only the second's own numbers: {status}");
    assert_eq!(
        status.get("host_capacity_bytes"),
        None,
        "only the second's own numbers: {status}"
    );

    // Each question about what the first holds is answered as the same question about what nobody holds.
    for (held, absent) in [
        (
            vec!["--namespace", "held", "get", "held"],
            vec!["--namespace", "none", "get", "held"],
        ),
        (
            vec!["--namespace", "held", "exists", "held"],
            vec!["--namespace", "none", "exists", "held"],
        ),
        (
            vec!["--namespace", "held", "delete", "held"],
            vec!["--namespace", "none", "delete", "held"],
        ),
        (
            vec!["--namespace", "held", "exists", "held"],
            vec!["--namespace", "held", "exists", "gone"],
        ),
    ] {
        let (of_held, of_absent) = (as_domain(&daemon, &second, &held), as_domain(&daemon, &second, &absent));
        assert_eq!(of_held.status.code(), Some(1), "{held:?}: {}", words(&of_held));
        assert_eq!(of_absent.status.code(), Some(1), "{absent:?}: {}", words(&of_absent));
        if held.last() == absent.last() {
            assert_eq!(of_held.stdout, of_absent.stdout, "{held:?}");
        }
    }
    let unopened = |name: &str| {
        let output = as_domain(&daemon, &second, &["invalidate", name]);
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).replace(name, "NAME"),
        )
    };
    first_stores_in(&daemon, &first, "elsewhere");
    assert_eq!(unopened("elsewhere"), unopened("nowhere"));

    // The first still has its block, also after the second invalidated the name that both use.
    let mine = as_domain(&daemon, &second, &["--namespace", "held", "exists", "held"]);
    assert_eq!(mine.status.code(), Some(1));
    assert!(as_domain(&daemon, &second, &["invalidate", "held"]).status.success());
    let output = daemon
        .kvctl()
        .arg("--token-file")
        .arg(&first)
        .args(["--namespace", "held", "get", "held"])
        .output()
        .unwrap();
    assert!(
        output.status.success() && output.stdout == secret_block(),
        "{}",
        words(&output)
    );
}

fn first_stores_in(daemon: &Daemon, token: &PathBuf, namespace: &str) {
    let file = daemon.directory.path().join("secret");
    let put = as_domain(
        daemon,
        token,
        &["--namespace", namespace, "put", "k", file.to_str().unwrap()],
    );
    assert!(put.status.success(), "{}", words(&put));
}

#[test]
fn on_the_wire_the_answers_are_the_same_bytes_and_no_memory_comes_with_them() {
    let (daemon, [first, _]) = daemon_for_all();
    let digits = first_stores(&daemon, &first);
    let mut held = [0; 16];
    for (byte, place) in held.iter_mut().zip((0..32).step_by(2)) {
        *byte = u8::from_str_radix(&digits[place..place + 2], 16).unwrap();
    }
    // On a connection of its own, each: the same requests about what the first holds and about what nobody holds.
    let interview = |name: &str, hash: [u8; 16]| -> (Vec<Answer>, usize) {
        let mut connection = Raw::greet(&daemon.socket(), TOKENS[1].as_bytes());
        let mut answers = Vec::new();
        answers.push(connection.call(raw::OPEN_NAMESPACE, &raw::namespace(name)).unwrap());
        let (handle, _) = (answers[0].u32_at(0), answers[0].u64_at(8));
        answers.push(connection.call(raw::LOOKUP, &raw::keys(handle, &[hash])).unwrap());
        answers.push(connection.call(raw::FETCH, &raw::fetch(handle, &[hash])).unwrap());
        answers.push(connection.call(raw::DELETE, &raw::keys(handle, &[hash])).unwrap());
        answers.push(connection.call(raw::STATUS, &[]).unwrap());
        let descriptors = connection.fds.len();
        // Reserve last: a slot of its own comes with memory of its own, at a place of its own.
        let mut reserved = connection
            .call(raw::RESERVE, &raw::reserve(handle, &[hash], 4096))
            .unwrap();
        assert_eq!(reserved.body[12], 2, "granted, as for any absent key: {reserved:?}");
        reserved.body.truncate(13);
        answers.push(reserved);
        connection.call(raw::GOODBYE, &[]).unwrap();
        (answers, descriptors)
    };
    let (of_held, descriptors) = interview("held", held);
    assert_eq!(descriptors, 0, "no memory comes with a miss");
    let (of_absent, _) = interview("none", [0x55; 16]);
    assert_eq!(of_held, of_absent);
    daemon.settle();
}

#[test]
fn the_memory_that_a_domain_gets_never_holds_another_domains_bytes() {
    let (daemon, [first, _]) = daemon_for_all();
    first_stores(&daemon, &first);
    let contents = |token: &str, hash: [u8; 16]| {
        let mut connection = Raw::greet(&daemon.socket(), token.as_bytes());
        let (handle, _) = connection.open("mine").unwrap();
        let reserved = connection
            .call(raw::RESERVE, &raw::reserve(handle, &[hash], BLOCK_BYTES as u32))
            .unwrap();
        assert_eq!(reserved.body[12], 2, "{reserved:?}");
        assert!(!connection.fds.is_empty(), "a slot comes with its memory");
        let mut bytes = Vec::new();
        for fd in connection.fds.drain(..) {
            let file = File::from(fd);
            let mut part = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
            file.read_exact_at(&mut part, 0).unwrap();
            bytes.extend(part);
        }
        connection.call(raw::GOODBYE, &[]).unwrap();
        bytes
    };
    let holds_secret = |bytes: &[u8]| bytes.windows(SECRET.len()).any(|window| window == SECRET);
    // Inside the domain memory is shared: this shows that the search would find the bytes.
    assert!(
        holds_secret(&contents(TOKENS[0], [1; 16])),
        "the first's own memory holds them"
    );
    assert!(!holds_secret(&contents(TOKENS[1], [2; 16])));
    assert!(
        !holds_secret(&contents("", [3; 16])),
        "nor does that of the user's own domain"
    );
}

#[test]
fn a_token_that_is_nobodys_is_refused() {
    let (daemon, _) = daemon_for_all();
    let wrong = daemon.directory.path().join("wrong");
    std::fs::write(&wrong, "a token that is nobody's").unwrap();
    let output = as_domain(&daemon, &wrong, &["status"]);
    assert_eq!(output.status.code(), Some(77), "{}", words(&output));
    let mut connection = Raw::connect(&daemon.socket());
    let answer = connection
        .call(raw::HELLO, &raw::hello(b"a token that is nobody's"))
        .unwrap();
    assert_eq!(answer.kind, raw::ERROR);
    assert!(connection.is_closed());
}

/// The build's directory may be closed to others, so they get a copy.
fn kvctl_for_all(daemon: &Daemon) -> PathBuf {
    let kvctl = daemon.directory.path().join("kvctl");
    // Copied by another process: a file that this one had open for writing could be inherited by a child that a test
    // beside this one starts, and could not be executed as long as that lives.
    let copied = Command::new("cp")
        .arg(crate::daemon::binary("kvctl"))
        .arg(&kvctl)
        .status()
        .unwrap();
    assert!(copied.success());
    std::fs::set_permissions(&kvctl, PermissionsExt::from_mode(0o755)).unwrap();
    kvctl
}

#[test]
fn another_user_gets_no_hit_and_no_listing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: another uid: only root can become another user");
        return;
    }
    let (daemon, _) = daemon_for_all();
    let file = daemon.directory.path().join("secret");
    std::fs::write(&file, secret_block()).unwrap();
    daemon.ask(&["--namespace", "held", "put", "held", file.to_str().unwrap()]);

    let kvctl = kvctl_for_all(&daemon);
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new(&kvctl);
        command
            .arg("--socket")
            .arg(daemon.socket())
            .arg("--json")
            .args(arguments)
            .env_clear()
            .uid(65_534)
            .gid(65_534);
        match command.output() {
            Ok(output) => Some(output),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => None,
            Err(error) => panic!("{error}"),
        }
    };
    let Some(status) = as_nobody(&["status"]) else {
        eprintln!("skipped: another uid: this process may not become another user");
        return;
    };
    assert!(status.status.success(), "{}", words(&status));
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(
        (&status["domain"], &status["blocks"]),
        (&Value::from("uid-65534"), &Value::from(0)),
        "{status}"
    );
    assert_eq!(status.get("domains"), None, "{status}");
    for arguments in [
        ["--namespace", "held", "get", "held"],
        ["--namespace", "held", "exists", "held"],
        ["--namespace", "held", "delete", "held"],
    ] {
        let of_held = as_nobody(&arguments).unwrap();
        let of_absent = as_nobody(&["--namespace", "none", arguments[2], "held"]).unwrap();
        assert_eq!(of_held.status.code(), Some(1), "{}", words(&of_held));
        assert_eq!((of_held.stdout, of_held.stderr), (of_absent.stdout, of_absent.stderr));
    }
    let own = daemon
        .kvctl()
        .args(["--namespace", "held", "get", "held"])
        .output()
        .unwrap();
    assert!(
        own.status.success() && own.stdout == secret_block(),
        "the owner still has it"
    );
}

#[test]
fn a_socket_of_mode_0600_is_closed_to_other_users() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: another uid: only root can become another user");
        return;
    }
    let daemon = Daemon::start(&[]);
    let kvctl = kvctl_for_all(&daemon);
    let output = Command::new(&kvctl)
        .arg("--socket")
        .arg(daemon.socket())
        .arg("status")
        .env_clear()
        .uid(65_534)
        .gid(65_534)
        .output();
    match output {
        Ok(output) => assert_eq!(output.status.code(), Some(77), "{}", words(&output)),
        Err(error) => eprintln!("skipped: another uid: {error}"),
    }
}
