//! Whole command lines against an admin server over something that purges nothing.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use kvtier::purge::{PurgeMode, PurgeReach, PurgeScope};
use tokio::net::TcpListener;

use crate::admin::access::Role;
use crate::admin::purges::Purges;
use crate::admin::tests::served::{ADMIN, Served};
use crate::exit::{ExitCode, Failure};
use crate::kvctl::{Arguments, run};

struct Shell {
    served: Arc<Served>,
    url: String,
}

impl Shell {
    fn new(namespaces: &[&str]) -> Shell {
        let served = Arc::new(Served::new(namespaces));
        let admin = served.admin.clone();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                sender.send(listener.local_addr().unwrap()).unwrap();
                let _ = admin.serve(listener, 8, None).await;
            });
        });
        let url = format!("http://{}", receiver.recv().unwrap());
        Shell { served, url }
    }

    fn kvctl(&self, arguments: &[&str]) -> Result<(), Failure> {
        self.kvctl_as(ADMIN, arguments)
    }

    fn kvctl_as(&self, token: &str, arguments: &[&str]) -> Result<(), Failure> {
        let file = self.path("token");
        std::fs::write(&file, format!("{token}\n")).unwrap();
        let reach = ["--http", &self.url, "--admin-token-file", &file];
        let line = [&["kvctl"], arguments, &reach].concat();
        run(Arguments::try_parse_from(line).unwrap_or_else(|error| panic!("{arguments:?}: {error}")))
    }

    fn code(&self, arguments: &[&str]) -> ExitCode {
        self.kvctl(arguments).expect_err("a failure").code
    }

    fn path(&self, name: &str) -> String {
        self.served.directory.path().join(name).to_str().unwrap().to_string()
    }
}

#[test]
fn a_purge_is_asked_for_as_the_command_line_says_and_waited_for_to_its_receipt() {
    let shell = Shell::new(&["red/a"]);
    let fake = Arc::clone(&shell.served.fake);
    let receipt = "{\"a\":1,  \"signed\":\"as it is\"}";
    let completing = std::thread::spawn(move || {
        while fake.jobs(None).is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(300));
        fake.complete(&fake.jobs(None)[0].id, receipt);
    });
    let file = shell.path("receipt.json");
    let line = [
        "purge",
        "a",
        "--mode",
        "physical",
        "--reach",
        "node",
        "--reason",
        "why",
        "--request-id",
        "r 1",
    ];
    shell.kvctl(&[&line[..], &["--wait", "-o", &file]].concat()).unwrap();
    completing.join().unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), receipt, "byte for byte");
    let request = shell.served.fake.jobs(None)[0].request.clone();
    assert_eq!(
        (request.namespace.as_str(), request.mode),
        ("red/a", PurgeMode::Physical)
    );
    assert_eq!(
        (request.reach, request.scope),
        (Some(PurgeReach::Node), PurgeScope::All)
    );
    assert_eq!((request.reason.as_str(), request.request_id.as_str()), ("why", "r 1"));
    shell.kvctl(&line).expect("asked again, it is the same");
    assert_eq!(shell.code(&["purge", "a", "--request-id", "r 1"]), ExitCode::DataFormat);
    assert_eq!(shell.served.fake.changes().len(), 1);
}

#[test]
fn narrower_scopes_and_drawn_request_ids() {
    let shell = Shell::new(&["red/a"]);
    let (block, digest) = ("0a".repeat(16), "0b".repeat(32));
    shell
        .kvctl(&["purge", "red/a", "--hash", &block, "--hash", &block])
        .unwrap();
    shell.kvctl(&["purge", "red/a", "--label", "doc"]).unwrap();
    shell
        .kvctl(&["purge", "red/a", "--scope-realization", &digest])
        .unwrap();
    let jobs = shell.served.fake.jobs(None);
    let scopes: Vec<PurgeScope> = jobs.iter().map(|job| job.request.scope.clone()).collect();
    assert_eq!(
        scopes,
        [
            PurgeScope::Hashes(vec![block.clone(), block]),
            PurgeScope::Label("doc".into()),
            PurgeScope::Realization(digest),
        ]
    );
    assert!(
        jobs.iter()
            .all(|job| job.request.request_id.len() == 38 && job.request.reach.is_none())
    );
    for line in [
        &["purge", "a", "--hash", "00", "--label", "l"][..],
        &["purge", "a", "--output", "f"],
        &["purge", "a", "--wait-max", "1"],
    ] {
        assert!(
            Arguments::try_parse_from([&["kvctl"], line].concat()).is_err(),
            "{line:?}"
        );
    }
}

#[test]
fn a_wait_that_takes_too_long_ends_with_75_and_leaves_no_receipt() {
    let shell = Shell::new(&["red/a"]);
    let file = shell.path("receipt.json");
    let code = shell.code(&["purge", "a", "--wait", "--wait-max", "0", "-o", &file]);
    assert_eq!(code, ExitCode::TryAgain);
    assert!(!Path::new(&file).exists());
    assert_eq!(shell.served.fake.changes().len(), 1, "the purge goes on");
}

#[test]
fn what_the_server_refuses_has_its_code() {
    let shell = Shell::new(&["red/a"]);
    let reader = shell.served.token(Role::Read, None);
    let tenant = shell.served.token(Role::Admin, Some(&["blue/b"]));
    let as_whom = |token: &str, line: &[&str]| shell.kvctl_as(token, line).expect_err("a failure").code;
    assert_eq!(shell.code(&["purge", "nobody"]), ExitCode::No);
    assert_eq!(shell.code(&["purge", "a", "--hash", "00"]), ExitCode::DataFormat);
    assert_eq!(as_whom(&reader, &["purge", "a"]), ExitCode::Denied);
    assert_eq!(as_whom("wrong", &["purges"]), ExitCode::Denied);
    assert_eq!(as_whom(&tenant, &["namespace", "show", "red/a"]), ExitCode::No);
    assert_eq!(as_whom(&tenant, &["token", "list"]), ExitCode::Denied);
    shell.kvctl_as(&reader, &["purges", "--namespace", "a"]).unwrap();
    assert_eq!(shell.code(&["purges", "--namespace", "nobody"]), ExitCode::No);
    assert!(shell.served.fake.changes().is_empty());
}

#[test]
fn setting_a_namespace_changes_what_is_named_and_nothing_else() {
    let shell = Shell::new(&["red/a b/c"]);
    let status = || shell.served.fake.namespaces()[0].clone();
    shell
        .kvctl(&[
            "namespace",
            "set",
            "red/a b/c",
            "--quota-bytes",
            "1MiB",
            "--label",
            "team=x=y",
        ])
        .unwrap();
    assert_eq!(
        (status().quota_bytes, status().labels["team"].as_str()),
        (Some(1 << 20), "x=y")
    );
    shell
        .kvctl(&["namespace", "set", "red/a b/c", "--label", "cost=7"])
        .unwrap();
    assert_eq!((status().quota_bytes, status().labels.len()), (Some(1 << 20), 2));
    shell
        .kvctl(&[
            "namespace",
            "set",
            "red/a b/c",
            "--quota-bytes",
            "none",
            "--remove-label",
            "team",
        ])
        .unwrap();
    assert_eq!((status().quota_bytes, status().labels.len()), (None, 1));
    shell.kvctl(&["namespace", "list"]).unwrap();
    shell.kvctl(&["--json", "namespace", "show", "red/a b/c"]).unwrap();
    assert_eq!(
        shell.code(&["namespace", "set", "red/a b/c", "--label", "x"]),
        ExitCode::Usage
    );
    assert_eq!(
        shell.code(&["namespace", "set", "red/a b/c", "--quota-bytes", "much"]),
        ExitCode::Usage
    );
}
