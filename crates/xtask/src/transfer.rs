//! `cargo xtask test transfer` and `cargo xtask test rdma`: one suite over every transport, on this machine and in the
//! verbs world.

use std::path::PathBuf;
use std::time::Duration;

use crate::built::Built;
use crate::outcome::{Failure, Tally};
use crate::process;
use crate::suite::Report;
use crate::verbs_world::VerbsWorld;
use crate::workspace::Workspace;

const SUITE_LIMIT: Duration = Duration::from_secs(10 * 60);
const GUEST_LIMIT: Duration = Duration::from_secs(15 * 60);
const RUN: &str = include_str!("verbs_world/run.sh");
const DEVICE: &str = include_str!("verbs_world/device.sh");
const BENCH: &str = "cp /host/kvctl /tmp/ && /tmp/kvctl bench transfer --transports verbs";
/// Transports, as the suite's modules are called, and where each runs.
const TRANSPORTS: [(&str, &str); 10] = [
    ("loopback", "cargo xtask test transfer"),
    ("shm", "cargo xtask test transfer"),
    ("tcp", "cargo xtask test transfer"),
    (
        "tcp_between",
        "cargo xtask test transfer: something between the two ends",
    ),
    ("tcp_tls", "cargo xtask test transfer: the cases of tcp within TLS"),
    ("tls", "cargo xtask test transfer: who is let in, and who is not"),
    (
        "between_hosts",
        "cargo xtask test transfer: TCP over a wire, where a namespace can be made",
    ),
    ("verbs", "cargo xtask test rdma"),
    (
        "world",
        "cargo xtask test rdma: two hosts, several rails, a wire with faults",
    ),
    ("iwarp", "cargo xtask test rdma, on siw"),
];

/// The programs of kvtier-transfer's tests.
struct Programs {
    unit: PathBuf,
    suite: PathBuf,
}

impl Programs {
    fn build(workspace: &Workspace) -> Result<Programs, Failure> {
        let built = Built::of(workspace, &["test", "--no-run", "--lib", "--test", "suite"])?;
        let unit = built.test("kvtier-transfer", "kvtier_transfer")?.to_owned();
        let suite = built.test("kvtier-transfer", "suite")?.to_owned();
        Ok(Programs { unit, suite })
    }
}

/// What whole nodes are tested with.
struct Nodes {
    daemon: PathBuf,
    tool: PathBuf,
    suite: PathBuf,
}

impl Nodes {
    fn build(workspace: &Workspace) -> Result<Nodes, Failure> {
        let built = Built::daemon(workspace)?;
        let daemon = built.program("kv-daemon")?.to_owned();
        let tool = built.program("kvctl")?.to_owned();
        let suite = built.test("kv-daemon", "suite")?.to_owned();
        Ok(Nodes { daemon, tool, suite })
    }
}

/// Runs the transports that need no device.
pub(crate) fn test(workspace: &Workspace) -> Result<Tally, Failure> {
    let programs = Programs::build(workspace)?;
    let mut report = Report::default();
    let mut run = |program: &PathBuf, arguments: &[&str]| -> Result<bool, Failure> {
        let mut command = std::process::Command::new(program);
        command.args(arguments).arg("--show-output");
        let status = process::stream(&mut command, "transfer", SUITE_LIMIT, |stream, line| {
            if report.read(stream, line) {
                println!("{line}");
            }
        })?;
        Ok(status.success())
    };
    // The device's own tests belong to the suite `rdma`.
    let unit = run(&programs.unit, &["--skip", "rdma::verbs::"])?;
    let suite = run(
        &programs.suite,
        &["--skip", "verbs::", "--skip", "world::", "--skip", "iwarp::"],
    )?;
    report.close(unit && suite);
    report.print_skipped();
    report.ended()
}

/// Boots the verbs world and runs everything that needs a device in it.
pub(crate) fn rdma(workspace: &Workspace) -> Result<Tally, Failure> {
    let world = VerbsWorld::prepare()?;
    let programs = Programs::build(workspace)?;
    let directory = tempfile::Builder::new().prefix("kvtier-world-").tempdir()?;
    std::fs::copy(&programs.unit, directory.path().join("unit"))?;
    std::fs::copy(&programs.suite, directory.path().join("suite"))?;
    // Opened at run time, from beside the program.
    let device = "libkvtier_softgpu.so";
    std::fs::copy(programs.suite.with_file_name(device), directory.path().join(device))?;
    let nodes = Nodes::build(workspace)?;
    for (program, name) in [
        (&nodes.daemon, "kv-daemon"),
        (&nodes.tool, "kvctl"),
        (&nodes.suite, "nodes"),
    ] {
        std::fs::copy(program, directory.path().join(name))?;
    }
    std::fs::write(directory.path().join("run.sh"), format!("{DEVICE}{RUN}"))?;
    let mut report = Report::default();
    let status = world.run(directory.path(), GUEST_LIMIT, |stream, line| {
        if report.read(stream, line) && !line.contains("setup_one_line") && !line.contains("Using a channel") {
            println!("{line}");
        }
    })?;
    report.close(status == 0);
    report.print_skipped();
    report.ended()
}

/// Measures RDMA reads beside a bare loop of them in the verbs world. Prints the rows on the output, all else on the error
/// output.
pub(crate) fn bench(workspace: &Workspace, arguments: &[String]) -> Result<(), Failure> {
    let world = VerbsWorld::prepare()?;
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--release", "--package", "kv-daemon", "--bin", "kvctl"]);
    process::hand_over(&mut cargo, "build")?;
    let directory = tempfile::Builder::new().prefix("kvtier-world-").tempdir()?;
    std::fs::copy(
        workspace.target_directory()?.join("release/kvctl"),
        directory.path().join("kvctl"),
    )?;
    // A shell of the guest reads it.
    let arguments: Vec<String> = arguments
        .iter()
        .map(|argument| format!("'{}'", argument.replace('\'', r"'\''")))
        .collect();
    let asked = format!("{} </dev/null >/host/rows", arguments.join(" "));
    std::fs::write(directory.path().join("run.sh"), format!("{DEVICE}\n{BENCH} {asked}\n"))?;
    let status = world.run(directory.path(), GUEST_LIMIT, |_, line| eprintln!("{line}"))?;
    print!(
        "{}",
        std::fs::read_to_string(directory.path().join("rows")).unwrap_or_default()
    );
    match status {
        0 => Ok(()),
        status => Err(Failure::new(format!(
            "the measuring program ended with status {status}"
        ))),
    }
}

/// Prints every case by transport, and what a transport cannot have.
pub(crate) fn list(workspace: &Workspace) -> Result<(), Failure> {
    let programs = Programs::build(workspace)?;
    let ask = |arguments: &[&str]| -> Result<String, Failure> {
        let output = std::process::Command::new(&programs.suite).args(arguments).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let listed = ask(&["--list"])?;
    let reasons = ask(&[
        "--exact",
        "what_a_transport_cannot_have_is_listed_with_a_reason",
        "--nocapture",
    ])?;
    for (transport, command) in TRANSPORTS {
        println!("{transport} ({command})");
        let prefix = format!("{transport}::");
        let cases = listed
            .lines()
            .filter_map(|line| line.strip_prefix(&prefix)?.strip_suffix(": test"));
        cases.for_each(|case| println!("  {case}"));
        for line in reasons
            .lines()
            .filter_map(|line| line.split_once("cannot: ").map(|(_, rest)| rest))
        {
            if let Some((kind, rest)) = line.split_once(": ")
                && kind.eq_ignore_ascii_case(transport)
            {
                println!("  cannot have: {rest}");
            }
        }
    }
    Ok(())
}
