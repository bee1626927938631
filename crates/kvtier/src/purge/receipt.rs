use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::evidence::{Guarantee, ProcessorReport};
use super::{PurgeMode, PurgeReach, PurgeScope};

/// The version written and understood.
pub(super) const VERSION: u64 = 1;
/// Fields of an entry that its place in the chain gives it.
const OF_THE_CHAIN: [&str; 8] = [
    "object",
    "version",
    "id",
    "sequence",
    "previous_digest",
    "key_id",
    "digest",
    "signature",
];
/// What an Ed25519 signature covers before the digest.
pub(super) const DOMAIN: &[u8] = b"kvtier receipt chain v1\n";

/// Generations before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raised {
    /// In force until then.
    #[serde(with = "super::number")]
    pub from: u64,
    /// In force from then on.
    #[serde(with = "super::number")]
    pub to: u64,
}

/// Which master key wraps the namespace's new key, and who can reach it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MasterKeyNote {
    /// Its id in force when the receipt was written.
    pub id: String,
    /// `state_directory`, or `elsewhere` for a file that the operator named.
    pub location: String,
    /// In words.
    pub note: String,
}

/// What a receipt covers. Hashes of blocks never appear: they would say what a tenant asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReceiptScope {
    /// The whole namespace.
    All,
    /// One realization: its digest.
    Realization(String),
    /// So many blocks that were named, and what extends them.
    Hashes(u64),
    /// A label.
    Label(String),
}

impl From<&PurgeScope> for ReceiptScope {
    fn from(scope: &PurgeScope) -> ReceiptScope {
        match scope {
            PurgeScope::All => ReceiptScope::All,
            PurgeScope::Realization(digest) => ReceiptScope::Realization(digest.clone()),
            PurgeScope::Hashes(hashes) => ReceiptScope::Hashes(hashes.len() as u64),
            PurgeScope::Label(label) => ReceiptScope::Label(label.clone()),
        }
    }
}

/// What a receipt says. Its place in the chain, digest and signature are added when it is issued.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptBody {
    /// The job's id.
    pub purge: String,
    /// Chosen by whoever asked.
    pub request_id: String,
    /// `DOMAIN/NAME`.
    pub namespace: String,
    /// What of it.
    pub scope: ReceiptScope,
    /// Where.
    pub reach: PurgeReach,
    /// How far.
    pub mode: PurgeMode,
    /// As it was given.
    pub reason: String,
    /// Which node: 32 hexadecimal digits that its state directory keeps.
    pub node: String,
    /// `None` for a narrower scope.
    pub generation: Option<Raised>,
    /// RFC 3339, UTC.
    pub requested_at: String,
    /// From here on nothing older could be read. RFC 3339, UTC.
    pub acknowledged_at: String,
    /// RFC 3339, UTC.
    pub completed_at: String,
    /// What the weakest processor vouches for.
    pub guarantee: Guarantee,
    /// Who held state, and what became of it.
    pub processors: Vec<ProcessorReport>,
    /// What no processor can vouch for, in words.
    pub not_covered: Vec<String>,
    /// What wraps the keys.
    pub master_key: MasterKeyNote,
    /// `none`, or what keeps an older copy of the state directory from being served.
    pub rollback_protection: String,
    /// How often a restart resumed the job.
    #[serde(with = "super::number")]
    pub resumed: u64,
    /// Id of an earlier receipt of the job, which lacked members that have confirmed since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supersedes: Option<String>,
}

impl ReceiptBody {
    /// What a stored receipt says, without its place in the chain.
    pub(crate) fn of_line(text: &str) -> Result<ReceiptBody, serde_json::Error> {
        let mut entry: Value = serde_json::from_str(text)?;
        if let Some(fields) = entry.as_object_mut() {
            for field in OF_THE_CHAIN {
                fields.remove(field);
            }
        }
        serde_json::from_value(entry)
    }
}

/// An entry of the chain as it is signed and stored: one line of canonical JSON (RFC 8785).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedLine {
    /// The line, without its end.
    pub text: String,
    /// `rcp_` and 32 hexadecimal digits for a receipt, `rot_` for a rotation of the signing key.
    pub id: String,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
}

/// The digest of a chain entry: SHA-256 of its canonical JSON without `digest` and `signature`.
pub(super) fn digest_of(entry: &Value) -> Result<[u8; 32], serde_json::Error> {
    let mut entry = entry.clone();
    if let Some(fields) = entry.as_object_mut() {
        fields.remove("digest");
        fields.remove("signature");
    }
    let text = canonical(&entry)?;
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, text.as_bytes()).as_ref());
    Ok(bytes)
}

/// RFC 8785. Numbers are spelled as 64-bit floats there: those of receipts are whole and below 2^53, or text
/// (`super::number`).
pub(super) fn canonical(value: &Value) -> Result<String, serde_json::Error> {
    serde_json_canonicalizer::to_string(value)
}

/// What is signed of a digest.
pub(super) fn signed_bytes(digest: &[u8; 32]) -> Vec<u8> {
    [DOMAIN, digest].concat()
}

pub(super) fn named_digest(digest: &[u8; 32]) -> String {
    format!("sha256:{}", hex(digest))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}
