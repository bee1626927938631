//! Where the tree is, which files belong to it, and how cargo is called.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::outcome::Failure;

/// The source tree this program was built from.
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    /// Whether tests are built with what is too large for every day.
    pub(crate) has_heavy_features: bool,
}

/// Features that bring some hundred crates: tests of those that have real servers, and whole runs, are built with them.
const HEAVY_FEATURES: [&str; 1] = ["s3"];

impl Workspace {
    /// The nearest directory above the package (or, run by hand, above the current directory) with a `[workspace]`.
    pub(crate) fn find() -> Result<Workspace, Failure> {
        let start = match std::env::var_os("CARGO_MANIFEST_DIR") {
            Some(directory) => PathBuf::from(directory),
            None => std::env::current_dir()?,
        };
        start
            .ancestors()
            .find(|directory| {
                std::fs::read_to_string(directory.join("Cargo.toml")).is_ok_and(|text| text.contains("[workspace]"))
            })
            .map(|root| Workspace {
                root: root.to_owned(),
                has_heavy_features: false,
            })
            .ok_or_else(|| {
                Failure::usage(format!(
                    "no workspace above {}: run it in the source tree",
                    start.display()
                ))
            })
    }

    /// Cargo in the root of the tree.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.root).stdin(Stdio::null());
        // What cargo told us about ourselves would make it build dependencies anew for the next caller.
        for (name, _) in std::env::vars_os().filter(|(name, _)| {
            name.to_str()
                .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
        }) {
            command.env_remove(name);
        }
        command
    }

    /// Which features tests are built with, as arguments for cargo; of all packages, or of these. Features only add, so the tests that one
    /// brings run beside all others, in one build.
    pub(crate) fn features(&self, packages: &[String]) -> Result<Vec<String>, Failure> {
        if self.has_heavy_features {
            return Ok(vec!["--all-features".to_owned()]);
        }
        let names = light_features(&self.metadata()?, packages);
        Ok(vec!["--features".to_owned(), names.join(",")])
    }

    /// Every file of the tree that version control would keep, relative to the root, sorted.
    pub(crate) fn files(&self) -> Result<Vec<String>, Failure> {
        let git = Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
            .current_dir(&self.root)
            .stderr(Stdio::null())
            .output();
        let mut files = match git {
            Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout)
                .split('\0')
                .filter(|path| !path.is_empty() && self.root.join(path).is_file())
                .map(str::to_owned)
                .collect(),
            // An unpacked archive has no version control: take everything but build output.
            _ => {
                let mut files = Vec::new();
                walk(&self.root, &self.root, &mut files)?;
                files
            }
        };
        files.sort();
        files.dedup();
        Ok(files)
    }

    /// `cargo metadata` about the crates of this workspace.
    pub(crate) fn metadata(&self) -> Result<Value, Failure> {
        self.ask_cargo(&["metadata", "--format-version", "1", "--no-deps"])
    }

    /// The same with every third-party crate; a `Cargo.lock` that does not fit the manifests is an error.
    pub(crate) fn metadata_with_dependencies(&self) -> Result<Value, Failure> {
        self.ask_cargo(&["metadata", "--format-version", "1", "--locked"])
    }

    fn ask_cargo(&self, arguments: &[&str]) -> Result<Value, Failure> {
        let mut cargo = self.cargo();
        cargo.args(arguments);
        let output = cargo.output()?;
        if !output.status.success() {
            return Err(Failure::new(format!(
                "cargo metadata: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
        serde_json::from_slice(&output.stdout).map_err(|error| Failure::new(format!("cargo metadata: {error}")))
    }

    /// Where cargo leaves what it builds.
    pub(crate) fn target_directory(&self) -> Result<PathBuf, Failure> {
        self.metadata()?["target_directory"]
            .as_str()
            .map(PathBuf::from)
            .ok_or_else(|| Failure::new("cargo metadata names no target directory"))
    }
}

fn light_features(metadata: &Value, packages: &[String]) -> Vec<String> {
    let mut names = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        if !packages.is_empty() && packages.iter().all(|wanted| wanted != name) {
            continue;
        }
        let features = package["features"].as_object().into_iter().flatten();
        let light = features.filter(|(feature, _)| !HEAVY_FEATURES.contains(&feature.as_str()));
        names.extend(light.map(|(feature, _)| format!("{name}/{feature}")));
    }
    names
}

fn walk(root: &Path, directory: &Path, files: &mut Vec<String>) -> Result<(), Failure> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() {
            if name != "target" && name != ".git" {
                walk(root, &path, files)?;
            }
        } else if let Ok(relative) = path.strip_prefix(root) {
            files.push(relative.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::light_features;

    #[test]
    fn what_is_heavy_is_left_out_and_nothing_else() {
        let metadata = json!({"packages": [
            {"name": "a", "features": {"s3": [], "redis": [], "default": ["redis"]}},
            {"name": "b", "features": {}},
            {"name": "c", "features": {"fuzz": []}},
        ]});
        let mut all = light_features(&metadata, &[]);
        all.sort();
        assert_eq!(all, ["a/default", "a/redis", "c/fuzz"]);
        assert_eq!(light_features(&metadata, &["c".to_owned()]), ["c/fuzz"]);
    }
}
