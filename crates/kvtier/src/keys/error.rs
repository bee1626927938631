use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvtier_core::NamespaceId;

use super::KeyId;

/// Why keys, register and realizations cannot be opened, or the master key not be changed. Nothing was overwritten.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Another process has the state directory.
    #[error("{} is in use by another process: stop that daemon, or choose another state directory", .path.display())]
    InUse {
        /// The register.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot {doing} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The system has no randomness to draw a key from.
    #[error("no randomness for a key: {0}")]
    Randomness(io::Error),
    /// Written by a later version.
    #[error(
        "{} is of version {version}, this program knows version {known}: run the newer program, or choose another state directory", .path.display()
    )]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Its version.
        version: u32,
        /// Ours.
        known: u32,
    },
    /// Something else has the name.
    #[error(
        "{} is no {what} of kvtier, or is damaged all over: move it away to start anew (what the NVMe tier holds is then lost)", .path.display()
    )]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
    },
    /// An anchor that cannot be read. An empty one in its place would let through what it is there to stop.
    #[error(
        "anchor {} is damaged or no anchor of kvtier: put it back from where it is kept; nothing was changed", .path.display()
    )]
    BadAnchor {
        /// Which file.
        path: PathBuf,
    },
    /// The state directory was served with an anchor before, and the one that is named is not there.
    #[error(
        "anchor {} is not there, and the state directory had one: put it back; or remove {} to begin an empty one, which knows of no earlier purge", .path.display(), .marker.display()
    )]
    NoAnchor {
        /// Where it was looked for.
        path: PathBuf,
        /// The file of the state directory that says that there was one.
        marker: PathBuf,
    },
    /// Receipts or a journal hold what nobody of ours wrote.
    #[error("{} was altered, {problem}: keep it as evidence, and restore it from a copy", .path.display())]
    ChainAltered {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The file named by `master_key_file` is not there.
    #[error(
        "master key file {}: there is no such file: name an existing one, or make one with `(umask 077; openssl rand -hex 32 > FILE)`", .path.display()
    )]
    NoKeyFile {
        /// Which file.
        path: PathBuf,
    },
    /// A state directory has no key that signs.
    #[error("signing key {}: there is no such file, or its rotation was cut short: name a daemon's state directory, and start a daemon on it once, which makes the key", .path.display())]
    NoSigningKey {
        /// Which file.
        path: PathBuf,
    },
    /// A key file that others can read.
    #[error(
        "master key file {}: others than its owner may read it (mode {mode:04o}), or it belongs to somebody else: chmod 0600 and chown it, and think about a new key", .path.display()
    )]
    OpenKeyFile {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A key file without a key.
    #[error(
        "master key file {}: it must hold 64 hexadecimal digits and nothing else, such as from `openssl rand -hex 32`", .path.display()
    )]
    BadKeyFile {
        /// Which file.
        path: PathBuf,
    },
    /// There is a register, and no key for it.
    #[error(
        "{} wraps its keys by master key {wrapped_by}, and {} is not there: put it back, or name its file with --master-key-file", .path.display(), .missing.display()
    )]
    NoMasterKey {
        /// The register.
        path: PathBuf,
        /// Its master key.
        wrapped_by: KeyId,
        /// Where the key was looked for.
        missing: PathBuf,
    },
    /// Another key than the register's.
    #[error(
        "{} wraps its keys by master key {wrapped_by}, not by {given}: name the file of the right key with --master-key-file{hint}; nothing was changed", .path.display()
    )]
    WrongMasterKey {
        /// The register.
        path: PathBuf,
        /// Its master key.
        wrapped_by: KeyId,
        /// The key that was given.
        given: KeyId,
        /// Where the right one lies, if that is known.
        hint: String,
    },
    /// A rotation between files of the operator was cut short.
    #[error(
        "{} wraps some keys by master key {given} and some by {other}: a rotation was cut short: run `kv-daemon rotate-master-key` again with the same two files; nothing was changed", .path.display()
    )]
    HalfRotated {
        /// The register.
        path: PathBuf,
        /// The key that was given.
        given: KeyId,
        /// The other.
        other: KeyId,
    },
    /// A rotation to the key in use.
    #[error("the new master key is the old one ({id}): name a file with another key, or one that does not exist yet")]
    SameMasterKey {
        /// Which.
        id: KeyId,
    },
    /// A rotation that would need a place of its own for the new key.
    #[error(
        "{} is there already, and the master key in use lies in another file: name a place for the new one with --new-master-key-file", .path.display()
    )]
    KeyFileTaken {
        /// What is there.
        path: PathBuf,
    },
    /// A rotation without a register.
    #[error(
        "there is no register in {}: nothing is wrapped yet, so there is nothing to rotate", .directory.display()
    )]
    NothingToRotate {
        /// Where it was looked for.
        directory: PathBuf,
    },
}

impl KeyError {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyError {
        let path = path.to_owned();
        move |source| KeyError::Io { doing, path, source }
    }
}

/// Why a namespace or a generation was not made durable. The register goes on; ask again.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RecordError {
    /// The system refused. What was durable before still is.
    #[error("the register cannot be written: {0}")]
    Io(Arc<io::Error>),
    /// A slot that was never opened, or whose name is lost.
    #[error("the register has no namespace in slot {}", .0.0)]
    Unknown(NamespaceId),
    /// A slot that another name has, or a name longer than a slot takes: our bug.
    #[error("slot {} of the register cannot take this name", .0.0)]
    Misnamed(NamespaceId),
}
