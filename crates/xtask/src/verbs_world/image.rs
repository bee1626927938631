//! The guest's first file system: busybox, iproute2, libibverbs with the providers of Soft-RoCE and siw, librdmacm, and the
//! libraries that these and a program built on this machine need.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::archive::Archive;
use super::packages::Packages;
use super::{INIT, digest};
use crate::outcome::Failure;

/// Packages; alternatives are names in other releases.
const PACKAGES: [&[&str]; 14] = [
    &["busybox-static"],
    &["iproute2"],
    &["libibverbs1"],
    &["librdmacm1"],
    &["ibverbs-providers"],
    &["libnl-3-200"],
    &["libnl-route-3-200"],
    &["libmnl0"],
    &["libbpf1", "libbpf0"],
    &["libelf1", "libelf1t64"],
    &["libcap2"],
    &["libxtables12"],
    &["libbsd0"],
    &["libmd0"],
];
/// Where in the packages the guest's programs may lie, and what they are called there.
const PROGRAMS: [(&str, &[&str]); 3] = [
    ("bin/ip", &["bin/ip", "usr/bin/ip", "sbin/ip", "usr/sbin/ip"]),
    ("bin/rdma", &["usr/bin/rdma", "bin/rdma", "sbin/rdma", "usr/sbin/rdma"]),
    ("bin/tc", &["sbin/tc", "usr/sbin/tc"]),
];
/// What a test program needs besides.
const LIBRARIES: [&str; 2] = ["libgcc_s.so.1", "libm.so.6"];
const MOUNTS: [&str; 9] = ["proc", "sys", "dev", "tmp", "run", "host", "var/run", "mnt", "sbin"];

pub(super) fn prepare(directory: &Path) -> Result<PathBuf, Failure> {
    let names: Vec<&str> = PACKAGES.iter().flat_map(|names| names.iter().copied()).collect();
    let recipe = digest(format!("{INIT}{}{}", names.join(" "), std::env::consts::ARCH).as_bytes());
    let image = directory.join(format!("image-{recipe:016x}"));
    if image.is_file() {
        return Ok(image);
    }
    if std::env::consts::ARCH != "x86_64" {
        return Err(Failure::skipped(
            "the verbs world runs on x86-64 only: user-mode Linux has no other 64-bit port",
        ));
    }
    println!("fetching what the guest of the verbs world needs (five megabytes)");
    let root = directory.join("root");
    if root.exists() {
        std::fs::remove_dir_all(&root)?;
    }
    let packages = Packages::of_this_machine(directory)?;
    for names in PACKAGES {
        packages.unpack(names, &root)?;
    }
    let bytes = pack(&root)?;
    let unfinished = directory.join("image.unfinished");
    std::fs::write(&unfinished, bytes)?;
    std::fs::rename(unfinished, &image)?;
    std::fs::remove_dir_all(&root)?;
    Ok(image)
}

fn pack(root: &Path) -> Result<Vec<u8>, Failure> {
    let mut archive = Archive::default();
    for mount in MOUNTS {
        archive.directory(mount)?;
    }
    let busybox = first_of(root, &["bin/busybox", "usr/bin/busybox"])?;
    archive.file("bin/busybox", &std::fs::read(&busybox)?)?;
    let applets = Command::new(&busybox).arg("--list").output()?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines() {
        if !["busybox", "ip", "tc"].contains(&applet) {
            archive.link(&format!("bin/{applet}"), "busybox")?;
        }
    }
    let library = first_of(
        root,
        &[
            "usr/lib/x86_64-linux-gnu/libibverbs.so.1",
            "lib/x86_64-linux-gnu/libibverbs.so.1",
        ],
    )?;
    let manager = first_of(
        root,
        &[
            "usr/lib/x86_64-linux-gnu/librdmacm.so.1",
            "lib/x86_64-linux-gnu/librdmacm.so.1",
        ],
    )?;
    let providers = root.join("usr/lib/x86_64-linux-gnu/libibverbs");
    let mut needing = vec![library.clone(), manager.clone()];
    for provider in std::fs::read_dir(&providers)?.flatten().map(|entry| entry.path()) {
        let name = provider
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default()
            .to_owned();
        if name.starts_with("librxe-") || name.starts_with("libsiw-") {
            archive.file(
                &format!("usr/lib/x86_64-linux-gnu/libibverbs/{name}"),
                &std::fs::read(&provider)?,
            )?;
            needing.push(provider);
        }
    }
    for driver in ["rxe", "siw"] {
        archive.file(
            &format!("etc/libibverbs.d/{driver}.driver"),
            format!("driver {driver}\n").as_bytes(),
        )?;
    }
    for (at, candidates) in PROGRAMS {
        let program = first_of(root, candidates)?;
        archive.file(at, &std::fs::read(&program)?)?;
        needing.push(program);
    }
    let mut libraries = BTreeSet::from([library, manager]);
    for file in &needing {
        libraries.extend(needed_by(file, root)?);
    }
    for name in LIBRARIES {
        libraries.insert(first_of(
            Path::new("/"),
            &[
                &format!("lib/x86_64-linux-gnu/{name}"),
                &format!("usr/lib/x86_64-linux-gnu/{name}"),
                &format!("lib64/{name}"),
            ],
        )?);
    }
    for library in libraries {
        let name = library.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        archive.file(&format!("lib/x86_64-linux-gnu/{name}"), &std::fs::read(&library)?)?;
    }
    archive.file(
        "lib64/ld-linux-x86-64.so.2",
        &std::fs::read("/lib64/ld-linux-x86-64.so.2")?,
    )?;
    archive.file("etc/passwd", b"root:x:0:0::/:/bin/sh\n")?;
    archive.file("etc/hosts", b"127.0.0.1 localhost\n")?;
    archive.file("init", INIT.as_bytes())?;
    Ok(archive.finish()?)
}

fn first_of(root: &Path, candidates: &[&str]) -> Result<PathBuf, Failure> {
    let found = candidates
        .iter()
        .map(|path| root.join(path))
        .find(|path| path.is_file());
    found.ok_or_else(|| Failure::new(format!("no {} below {}", candidates.join(" or "), root.display())))
}

/// The libraries that the loader would take, those of the unpacked packages before this machine's.
fn needed_by(file: &Path, root: &Path) -> Result<Vec<PathBuf>, Failure> {
    let unpacked = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|path| root.join(path));
    let paths = std::env::join_paths(unpacked).map_err(|error| Failure::new(error.to_string()))?;
    let output = Command::new("ldd").arg(file).env("LD_LIBRARY_PATH", paths).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(missing) = text.lines().find(|line| line.contains("not found")) {
        return Err(Failure::new(format!("{}: {}", file.display(), missing.trim())));
    }
    let words = text.lines().flat_map(str::split_whitespace);
    let libraries = words.filter(|word| word.starts_with('/') && word.contains(".so") && !word.contains("ld-linux"));
    Ok(libraries.map(PathBuf::from).collect())
}
