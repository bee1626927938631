//! What cargo builds for tests, once: the suites that start programs all start these, so that a whole run builds them once.
//!
//! Every call selects the whole workspace and the same features. Cargo unites features over what is selected: another selection
//! would build the same crates once more.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::outcome::Failure;
use crate::process;
use crate::workspace::Workspace;

const LIMIT: Duration = Duration::from_secs(20 * 60);

/// A program that cargo built.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Program {
    /// The directory of its package, by its last name.
    package: String,
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    is_test: bool,
}

/// The programs of one build.
pub(crate) struct Built(Vec<Program>);

impl Built {
    /// Exactly what `cargo xtask test` builds.
    pub(crate) fn all(workspace: &Workspace) -> Result<Built, Failure> {
        Built::of(workspace, &["test", "--no-run"])
    }

    /// What `cargo test` or `cargo build` with these arguments builds.
    pub(crate) fn of(workspace: &Workspace, arguments: &[&str]) -> Result<Built, Failure> {
        let mut messages = String::new();
        let mut cargo = workspace.cargo();
        cargo
            .args(arguments)
            .arg("--workspace")
            .args(workspace.features(&[])?)
            .arg("--message-format=json-render-diagnostics");
        let status = process::stream(&mut cargo, "building", LIMIT, |stream, line| match stream {
            process::Stream::Output => {
                messages.push_str(line);
                messages.push('\n');
            }
            process::Stream::Error => println!("{line}"),
        })?;
        if !status.success() {
            return Err(Failure::new(format!("the programs do not build: {status}")));
        }
        Ok(Built(programs(&messages)))
    }

    /// What a suite that starts a daemon needs.
    pub(crate) fn daemon(workspace: &Workspace) -> Result<Built, Failure> {
        // The suite's own program is small, and cargo builds the binaries along with it.
        Built::of(workspace, &["test", "--no-run", "--test", "suite"])
    }

    pub(crate) fn tests(&self) -> impl Iterator<Item = &Program> {
        self.0.iter().filter(|program| program.is_test)
    }

    /// A binary or an example by its name.
    pub(crate) fn program(&self, name: &str) -> Result<&Path, Failure> {
        self.0
            .iter()
            .find(|program| !program.is_test && program.name == name)
            .map(|program| program.path.as_path())
            .ok_or_else(|| Failure::new(format!("cargo built no {name} along with the tests")))
    }

    /// A package's program of tests by the name of its target.
    pub(crate) fn test(&self, package: &str, name: &str) -> Result<&Path, Failure> {
        self.tests()
            .find(|program| program.package == package && program.name == name)
            .map(|program| program.path.as_path())
            .ok_or_else(|| Failure::new(format!("cargo built no tests {name} of {package}")))
    }

    /// Where `kv-daemon` and `kvctl` lie beside each other.
    pub(crate) fn directory(&self) -> Result<PathBuf, Failure> {
        let daemon = self.program("kv-daemon")?;
        let directory = daemon.parent().unwrap_or(Path::new("/"));
        self.program("kvctl")?;
        Ok(directory.to_owned())
    }
}

fn programs(messages: &str) -> Vec<Program> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| {
            let path = PathBuf::from(message["executable"].as_str()?);
            let name = message["target"]["name"].as_str()?.to_owned();
            let is_test = message["profile"]["test"].as_bool()?;
            // `path+file:///…/crates/kvtier-core#0.1.0`, with the name before the version where the directory has another.
            let place = message["package_id"].as_str()?.split('#').next()?;
            let package = place.rsplit('/').next()?.to_owned();
            Some(Program {
                package,
                name,
                path,
                is_test,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_told_apart_by_kind_and_package() {
        let message = |package: &str, name: &str, test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"path+file:///t/crates/{package}#0.1.0","target":{{"name":"{name}"}},"profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let messages = [
            message("kvtier", "kvtier", true, r#""/t/kvtier-1""#),
            message("kvtier", "kvtier", false, "null"),
            message("kvtier-transfer", "suite", true, r#""/t/suite-1""#),
            message("kv-daemon", "suite", true, r#""/t/suite-2""#),
            message("kv-daemon", "kvctl", false, r#""/t/kvctl""#),
            message("kv-daemon", "kv-daemon", true, r#""/t/kv-daemon-1""#),
            message("kvtier", "fuzz_wire", false, r#""/t/examples/fuzz_wire""#),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
            "not JSON".to_owned(),
        ];
        let built = Built(programs(&messages.join("\n")));
        assert_eq!(built.tests().count(), 4);
        assert_eq!(built.test("kv-daemon", "suite").ok(), Some(Path::new("/t/suite-2")));
        assert_eq!(
            built.test("kvtier-transfer", "suite").ok(),
            Some(Path::new("/t/suite-1"))
        );
        assert_eq!(built.program("kvctl").ok(), Some(Path::new("/t/kvctl")));
        assert_eq!(
            built.program("fuzz_wire").ok(),
            Some(Path::new("/t/examples/fuzz_wire"))
        );
        // Its tests are there, the program is not.
        assert!(built.program("kv-daemon").is_err());
        assert!(built.test("kvtier", "suite").is_err());
    }
}
