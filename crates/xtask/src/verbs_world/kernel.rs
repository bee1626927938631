//! The kernel: dropped into the cache, or built there from Debian's source.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::packages::Packages;
use super::{CONFIGURATION, digest, is_program};
use crate::outcome::Failure;
use crate::process;

/// About eight minutes of a processor.
const BUILD_LIMIT: Duration = Duration::from_secs(60 * 60);
/// Older ones lack what the configuration asks for (more than one processor in user mode).
const MAJOR_MIN: u32 = 7;
/// Programs that a build needs and Debian packages that hold those that are easily missing.
const PROGRAMS: [&str; 5] = ["gcc", "make", "bc", "xz", "tar"];
const TOOLS: [&[&str]; 3] = [&["flex"], &["bison"], &["m4"]];

pub(super) fn prepare(directory: &Path) -> Result<PathBuf, Failure> {
    let dropped = directory.join("linux");
    if dropped.is_file() {
        std::fs::set_permissions(&dropped, std::fs::Permissions::from_mode(0o755))?;
        return Ok(dropped);
    }
    let built = directory.join(format!("linux-{:016x}", digest(CONFIGURATION.as_bytes())));
    if !built.is_file() {
        build(directory, &built)?;
    }
    Ok(built)
}

fn build(directory: &Path, target: &Path) -> Result<(), Failure> {
    if let Some(missing) = PROGRAMS.iter().find(|program| !is_program(program)) {
        return Err(Failure::skipped(format!(
            "building the kernel of the verbs world needs {missing} (or put a user-mode kernel there as {}/linux)",
            directory.display()
        )));
    }
    let work = directory.join("build");
    if work.exists() {
        std::fs::remove_dir_all(&work)?;
    }
    std::fs::create_dir_all(&work)?;
    let sid = Packages::of_unstable(directory)?;
    let package = newest(&sid.names("linux-source-")?).ok_or_else(|| {
        Failure::skipped(format!(
            "Debian's unstable release offers no linux-source-{MAJOR_MIN}.* or later"
        ))
    })?;
    println!("building the kernel of the verbs world from {package}: eight minutes of a processor, once");
    sid.unpack(&[&package], &work)?;
    let mut tar = Command::new("tar");
    tar.arg("xf")
        .arg(work.join("usr/src").join(format!("{package}.tar.xz")))
        .current_dir(&work);
    process::succeed_quietly(&mut tar, "tar", BUILD_LIMIT)?;
    let source = work.join(&package);
    let tools = tools(directory)?;
    std::fs::write(work.join("uml.config"), CONFIGURATION)?;
    let make = |arguments: &[&str]| {
        let mut make = Command::new("make");
        make.arg("ARCH=um").args(arguments).current_dir(&source);
        make.env("KCONFIG_ALLCONFIG", work.join("uml.config"));
        make.env_remove("MAKEFLAGS").env_remove("MFLAGS");
        if let Some(tools) = &tools {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let mut paths = vec![tools.join("usr/bin")];
            paths.extend(std::env::split_paths(&path));
            make.env("PATH", std::env::join_paths(paths).unwrap_or(path))
                .env("BISON_PKGDATADIR", tools.join("usr/share/bison"))
                .env("M4", tools.join("usr/bin/m4"));
        }
        make
    };
    process::succeed_quietly(&mut make(&["allnoconfig"]), "make allnoconfig", BUILD_LIMIT)?;
    let configured = std::fs::read_to_string(source.join(".config"))?;
    if !configured.lines().any(|line| line == "CONFIG_RDMA_RXE=y") {
        return Err(Failure::new(format!(
            "{package} takes the configuration without Soft-RoCE"
        )));
    }
    let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    process::succeed_quietly(&mut make(&[&format!("-j{jobs}"), "linux"]), "make linux", BUILD_LIMIT)?;
    let finished = work.join("finished");
    let mut strip = Command::new("strip");
    strip.arg("-o").arg(&finished).arg(source.join("linux"));
    process::succeed_quietly(&mut strip, "strip", BUILD_LIMIT)?;
    std::fs::rename(finished, target)?;
    std::fs::remove_dir_all(&work)?;
    Ok(())
}

/// flex and bison, unpacked beside the system where it has none.
fn tools(directory: &Path) -> Result<Option<PathBuf>, Failure> {
    if ["flex", "bison", "m4"].iter().all(|program| is_program(program)) {
        return Ok(None);
    }
    let target = directory.join("tools");
    let packages = Packages::of_this_machine(directory)?;
    for names in TOOLS {
        packages.unpack(names, &target)?;
    }
    Ok(Some(target))
}

/// The newest source package: by number, not by letter.
fn newest(names: &[String]) -> Option<String> {
    let version = |name: &String| -> Option<(u32, u32)> {
        let (major, minor) = name.strip_prefix("linux-source-")?.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    let versions = names.iter().filter_map(|name| Some((version(name)?, name)));
    versions
        .filter(|((major, _), _)| *major >= MAJOR_MIN)
        .max()
        .map(|(_, name)| name.clone())
}

#[cfg(test)]
mod tests {
    use super::newest;

    #[test]
    fn the_newest_source_is_found_by_number() {
        let names = [
            "linux-source-6.12",
            "linux-source-7.2",
            "linux-source-7.10",
            "linux-source",
            "linux-source-7.11-x",
        ];
        let names: Vec<String> = names.map(str::to_owned).to_vec();
        assert_eq!(newest(&names).as_deref(), Some("linux-source-7.10"));
        assert_eq!(newest(&names[..1]), None, "too old");
    }
}
