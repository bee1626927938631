//! `cargo xtask test remote`: what needs real servers on loopback, Redis and S3. They come from Debian's packages, unpacked in the cache.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::outcome::{Failure, SKIPPED, Tally};
use crate::process;
use crate::radosgw::Radosgw;
use crate::suite::Report;
use crate::verbs_world::{cache, packages::Packages};
use crate::workspace::Workspace;

const LIMIT: Duration = Duration::from_secs(20 * 60);
/// As the other suites build them, so that nothing is built twice.
const TESTS: [&str; 6] = ["--lib", "--test", "suite", "--", "directory::", "remote::"];
/// The Redis server and what it is linked with, alternatives in the order of their preference.
const PACKAGES: [&[&str]; 8] = [
    &["redis-server"],
    &["redis-tools"],
    &["libjemalloc2"],
    &["liblzf1"],
    &["liblua5.1-0"],
    &["lua-cjson"],
    &["lua-bitop"],
    &["libatomic1"],
];

/// Runs the tests that want a Redis server, or an S3 server.
pub(crate) fn test(workspace: &Workspace) -> Result<Tally, Failure> {
    let server = server()?;
    // Without it what wants it is skipped, and what wants Redis runs.
    let bucket_server = match Radosgw::start(&cache()?) {
        Ok(server) => Some(server),
        Err(failure) if failure.code == SKIPPED => {
            println!("{}", failure.message);
            None
        }
        Err(failure) => return Err(failure),
    };
    let mut report = Report::default();
    let mut cargo = workspace.cargo();
    cargo
        .args(["test", "--workspace"])
        .args(workspace.features(&[])?)
        .args(TESTS)
        .arg("--show-output")
        .env("KVTIER_REDIS_SERVER", &server.program)
        .env("KVTIER_REDIS_LIBRARIES", &server.libraries);
    if let Some(server) = &bucket_server {
        cargo
            .env("KVTIER_S3_ENDPOINT", &server.endpoint)
            .env("KVTIER_S3_CREDENTIALS", &server.credentials);
    }
    let status = process::stream(&mut cargo, "remote", LIMIT, |stream, line| {
        if report.read(stream, line) {
            println!("{line}");
        }
    })?;
    report.close(status.success());
    report.print_skipped();
    report.ended()
}

struct Server {
    program: PathBuf,
    libraries: PathBuf,
}

fn server() -> Result<Server, Failure> {
    let directory = cache()?.join("redis");
    let root = directory.join("root");
    let architecture = format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    let server = Server {
        program: root.join("usr/bin/redis-server"),
        libraries: root.join(architecture),
    };
    if runs(&server) {
        return Ok(server);
    }
    let packages = Packages::of_this_machine(&directory)?;
    for names in PACKAGES {
        packages.unpack(names, &root)?;
    }
    if runs(&server) {
        return Ok(server);
    }
    Err(Failure::skipped(format!(
        "the Redis server of Debian's packages does not run here: {}",
        server.program.display()
    )))
}

fn runs(server: &Server) -> bool {
    let version = |program: &Path| {
        let mut command = Command::new(program);
        command.arg("--version").env("LD_LIBRARY_PATH", &server.libraries);
        process::succeed_quietly(&mut command, "redis-server --version", Duration::from_secs(10)).is_ok()
    };
    server.program.exists() && version(&server.program)
}
