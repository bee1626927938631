//! Debian packages, fetched and unpacked beside the system without changing it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::is_program;
use crate::outcome::Failure;
use crate::process;

/// A kernel's source over a slow line.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// Package lists of some release, kept in a directory of our own.
pub(crate) struct Packages {
    options: Vec<String>,
    directory: PathBuf,
}

impl Packages {
    /// Of the release that this machine runs.
    pub(crate) fn of_this_machine(directory: &Path) -> Result<Packages, Failure> {
        Packages::new(directory.join("apt"), Vec::new())
    }

    /// Of Debian's unstable release, from the mirror that this machine uses.
    pub(crate) fn of_unstable(directory: &Path) -> Result<Packages, Failure> {
        let directory = directory.join("apt-unstable");
        std::fs::create_dir_all(&directory)?;
        let list = directory.join("sources.list");
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let mirror = mirror().unwrap_or_else(|| "http://deb.debian.org/debian".to_owned());
        std::fs::write(&list, format!("deb [signed-by={keys}] {mirror} sid main\n"))?;
        let options = vec![
            format!("Dir::Etc::sourcelist={}", list.display()),
            "Dir::Etc::sourceparts=/nonexistent".to_owned(),
        ];
        Packages::new(directory, options)
    }

    fn new(directory: PathBuf, mut options: Vec<String>) -> Result<Packages, Failure> {
        for program in ["apt-get", "apt-cache", "dpkg"] {
            if !is_program(program) {
                return Err(Failure::skipped(format!(
                    "what is needed comes from Debian's packages, and {program} is not here"
                )));
            }
        }
        for part in ["lists/partial", "cache/archives/partial"] {
            std::fs::create_dir_all(directory.join(part))?;
        }
        options.push(format!("Dir::State::lists={}/lists", directory.display()));
        options.push(format!("Dir::Cache={}/cache", directory.display()));
        // It would give up root for an unprivileged user who cannot write here.
        options.push("APT::Sandbox::User=root".to_owned());
        let packages = Packages { options, directory };
        // One of several sources may be out of reach; what is missing is missed below.
        let mut update = packages.command("apt-get");
        update.args(["update", "--quiet"]);
        process::stream(&mut update, "apt-get update", LIMIT, |_, _| {})?;
        Ok(packages)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for option in &self.options {
            command.args(["-o", option]);
        }
        command.env("LC_ALL", "C").current_dir(&self.directory);
        command
    }

    /// Names of packages that begin with `prefix`.
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>, Failure> {
        let output = self.command("apt-cache").args(["pkgnames", prefix]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(str::to_owned)
            .collect())
    }

    /// Unpacks into `target`. `names` are alternatives: the first that the release has.
    pub(crate) fn unpack(&self, names: &[&str], target: &Path) -> Result<(), Failure> {
        let known = names.iter().find(|name| {
            let mut show = self.command("apt-cache");
            show.args(["show", "--no-all-versions", name]);
            show.output()
                .is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
        });
        let Some(name) = known else {
            return Err(Failure::skipped(format!(
                "the package {} is needed, which is not in this machine's package lists",
                names.join(" or ")
            )));
        };
        let archives = self.directory.join("archives").join(name);
        if archives.exists() {
            std::fs::remove_dir_all(&archives)?;
        }
        std::fs::create_dir_all(&archives)?;
        let mut download = self.command("apt-get");
        download.args(["download", name]).current_dir(&archives);
        process::succeed_quietly(&mut download, "apt-get download", LIMIT)?;
        std::fs::create_dir_all(target)?;
        for archive in std::fs::read_dir(&archives)?.flatten() {
            let mut unpack = Command::new("dpkg");
            unpack.arg("-x").arg(archive.path()).arg(target);
            process::succeed_quietly(&mut unpack, "dpkg -x", LIMIT)?;
        }
        std::fs::remove_dir_all(&archives)?;
        Ok(())
    }
}

/// The mirror of this machine's own Debian packages.
fn mirror() -> Option<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    let text: String = files
        .iter()
        .filter_map(|file| std::fs::read_to_string(file).ok())
        .collect();
    mirror_in(&text)
}

fn mirror_in(text: &str) -> Option<String> {
    text.lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .flat_map(str::split_whitespace)
        .map(|word| word.trim_end_matches('/'))
        .find(|word| word.starts_with("http") && word.ends_with("/debian"))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::mirror_in;

    #[test]
    fn the_mirror_is_found_in_both_kinds_of_lists() {
        let lines = "deb https://example.org/other sid main\ndeb http://deb.debian.org/debian bookworm main\n";
        assert_eq!(mirror_in(lines).as_deref(), Some("http://deb.debian.org/debian"));
        let fields =
            "Types: deb\n# http://old.example.org/debian\nURIs: https://mirror.example.org/debian/\nSuites: sid\n";
        assert_eq!(mirror_in(fields).as_deref(), Some("https://mirror.example.org/debian"));
        assert_eq!(
            mirror_in("deb http://security.debian.org/debian-security x main\n"),
            None
        );
    }
}
