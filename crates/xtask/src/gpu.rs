//! `cargo xtask test gpu`: memory of devices and copies, on a software device and, where there is one, on a real one.

use std::path::Path;
use std::time::Duration;

use crate::built::Built;
use crate::outcome::{Failure, Tally};
use crate::process;
use crate::suite::{Report, together};
use crate::workspace::Workspace;

const LIMIT: Duration = Duration::from_secs(10 * 60);
/// What NVIDIA's driver makes where it has found a device.
const DRIVER: &str = "/dev/nvidiactl";

/// Runs the suite on each kind of device, or on the one that is insisted on.
///
/// # Errors
/// Exit status 69 where a real one is insisted on and there is none.
pub(crate) fn test(workspace: &Workspace, device: Option<&str>) -> Result<Tally, Failure> {
    let has_device = Path::new(DRIVER).exists();
    if device == Some("real") && !has_device {
        return Err(Failure::skipped(format!(
            "cuda unavailable: no {DRIVER} here, so no real device"
        )));
    }
    let tests = ["--test", "gpu", "--test", "hbm", "--test", "client", "--test", "suite"];
    let built = Built::of(workspace, &[&["test", "--no-run"][..], &tests].concat())?;
    let programs = [
        (built.test("kvtier-transfer", "gpu")?, None),
        (built.test("kvtier-storage", "hbm")?, None),
        (built.test("kvtier", "client")?, Some("device::")),
        (built.test("kv-daemon", "suite")?, Some("hbm::")),
    ];
    let mut tally = Tally::default();
    if device != Some("real") {
        println!("on the software device:");
        tally += on(
            &programs,
            "simulated",
            "kernels as the code of a device: a software one carries out what their PTX says, or none",
        )?;
    }
    if device == Some("simulated") {
        return Ok(tally);
    }
    if !has_device {
        println!("not executed: all of it on a real device: no {DRIVER} here");
        return Ok(tally);
    }
    println!("on the real device:");
    tally += on(&programs, "real", "")?;
    Ok(tally)
}

/// One kind of device, and what the suite did not execute on it.
fn on(programs: &[(&Path, Option<&str>)], kind: &str, never: &str) -> Result<Tally, Failure> {
    let mut never = never;
    let ended = programs
        .iter()
        .map(|(program, filter)| run(program, *filter, kind, std::mem::take(&mut never)));
    together(ended.collect())
}

/// One program, as far as the filter goes.
fn run(program: &Path, filter: Option<&str>, kind: &str, never: &str) -> Result<Tally, Failure> {
    let mut command = std::process::Command::new(program);
    command.args(filter).arg("--show-output").env("KVTIER_GPU", kind);
    let mut report = Report::default();
    let mut not_executed: Vec<String> = Some(never.to_owned())
        .into_iter()
        .filter(|words| !words.is_empty())
        .collect();
    let mut case = String::new();
    let status = process::stream(&mut command, "gpu", LIMIT, |stream, line| {
        if let Some(name) = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            name.clone_into(&mut case);
        }
        if let Some(words) = line.strip_prefix("not executed: ") {
            not_executed.push(format!("{case}: {words}"));
        } else if let Some(name) = line.strip_prefix("device: ") {
            println!("device: {name}");
        }
        if report.read(stream, line) {
            println!("{line}");
        }
    })?;
    for words in not_executed {
        println!("not executed: {words}");
    }
    report.close(status.success());
    report.print_skipped();
    report.ended()
}
