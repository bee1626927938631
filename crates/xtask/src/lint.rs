//! The rules of the house, each checked by a machine: `path:line: rule: what; remedy`.
//!
//! Rules are plain functions of text, so that their tests can show each of them failing.

mod documents;
mod lexer;
mod manifests;
mod source;
mod tree;

use std::fmt;
use std::time::Duration;

use crate::outcome::{Failure, Tally};
use crate::process;
use crate::workspace::Workspace;

/// Generous: a cold build of everything on two slow cores.
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);

/// One broken rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Violation {
    path: String,
    line: usize,
    rule: &'static str,
    what: String,
    remedy: &'static str,
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation {
            path,
            line,
            rule,
            what,
            remedy,
        } = self;
        write!(formatter, "{path}:{line}: {rule}: {what}; {remedy}")
    }
}

/// Checks the rules, then formatting, then clippy with and without the optional features, then the documentation build.
pub(crate) fn run(workspace: &Workspace, rules_only: bool) -> Result<Tally, Failure> {
    let violations = violations(workspace)?;
    for violation in &violations {
        println!("{violation}");
    }
    println!("rules: {} violations", violations.len());
    let mut tally = Tally {
        passed: u64::from(violations.is_empty()),
        failed: u64::from(!violations.is_empty()),
        skipped: 0,
    };
    if !rules_only {
        let clippy = |what: &[&'static str]| -> Vec<&'static str> {
            let common = ["clippy", "--workspace", "--keep-going"];
            let denied = ["--", "-D", "warnings"];
            common.iter().chain(what).chain(&denied).copied().collect()
        };
        let steps = [
            ("formatting (remedy: cargo fmt)", vec!["fmt", "--all", "--check"]),
            ("clippy, all features", clippy(&["--all-targets", "--all-features"])),
            // Features only add: what is built without them is checked here, its tests were above.
            ("clippy", clippy(&["--lib", "--bins", "--no-default-features"])),
            (
                "documentation",
                vec!["doc", "--workspace", "--lib", "--no-deps", "--all-features"],
            ),
        ];
        for (name, arguments) in steps {
            let mut cargo = workspace.cargo();
            cargo.args(arguments).env("RUSTDOCFLAGS", "-D warnings");
            match process::succeed(&mut cargo, name, BUILD_LIMIT) {
                Ok(()) => tally.passed += 1,
                Err(failure) => {
                    println!("{}", failure.message);
                    tally.failed += 1;
                }
            }
        }
    }
    println!("lint: {tally}");
    if tally.failed == 0 {
        Ok(tally)
    } else {
        Err(Failure::new("lint failed"))
    }
}

fn violations(workspace: &Workspace) -> Result<Vec<Violation>, Failure> {
    let files = workspace.files()?;
    let read = |path: &str| std::fs::read_to_string(workspace.root.join(path)).ok();
    let mut found = tree::check_names(&files);
    for path in &files {
        // What is not text has nothing to say about style.
        let Some(text) = read(path) else { continue };
        found.extend(tree::check_text(path, &text));
        if path.ends_with(".rs") {
            found.extend(source::check(path, &text));
        }
        if path.ends_with(".md") {
            found.extend(documents::check_links(
                path,
                &text,
                &|target| workspace.root.join(target).exists(),
                &read,
            ));
        }
    }
    found.extend(documents::check_architecture(
        &read("ARCHITECTURE.md").unwrap_or_default(),
    ));
    found.extend(documents::check_decisions(&files, &read));
    let plain = workspace.metadata()?;
    found.extend(manifests::check_arrows(&plain));
    found.extend(manifests::check_packages(&plain, &read));
    found.extend(manifests::check_licences(&workspace.metadata_with_dependencies()?));
    for room in source::PURE_ROOMS {
        let path = format!("crates/{room}/clippy.toml");
        found.extend(manifests::check_bans(&path, &read(&path).unwrap_or_default()));
    }
    found.sort();
    Ok(found)
}
