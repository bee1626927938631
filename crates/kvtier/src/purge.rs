//! Purges: what is asked for, and how far it is.
//!
//! A purge first raises a generation, so that nothing older can be read from the moment it is acknowledged; mode `physical`
//! then destroys what is left in memory and on devices. It ends with a signed receipt.
//!
//! Read first: [`PurgeRequest`], [`PurgeJob`].

mod chain;
mod document;
mod evidence;
pub(crate) mod journal;
mod moment;
mod number;
mod receipt;
mod signing;
mod verify;

use serde::{Deserialize, Serialize};

pub use chain::{ReceiptLog, rotate_signing_key};
pub use document::{DocumentKey, REPLAY_GATE_REPORT};
pub use evidence::{Evidence, Guarantee, Method, ProcessorReport, Standing, weakest};
pub use moment::rfc3339;
pub use receipt::{MasterKeyNote, Raised, ReceiptBody, ReceiptScope, SignedLine};
pub use signing::{Jwk, KeySet};
pub use verify::{CheckedLine, VerifyReport, verify, verify_documents};

/// Within the state directory.
pub(crate) const RECEIPTS_DIRECTORY: &str = "receipts";

/// Longest label, bytes.
pub const LABEL_BYTES_MAX: usize = 1024;

/// What a purge covers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PurgeScope {
    /// The whole namespace. Constant cost: one generation is raised.
    #[default]
    All,
    /// Every block of one realization: its digest, 64 hexadecimal digits. Costs a walk over the index.
    Realization(String),
    /// Blocks, 32 hexadecimal digits each, and every block known to extend them. Costs a visit of each of these.
    Hashes(Vec<String>),
    /// Blocks that were put under this label ([`crate::Label::of`] it), and every block known to extend them; those of which it is
    /// not known go too. Costs a walk over the index.
    Label(String),
}

/// How far a purge goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PurgeMode {
    /// Nothing older can be read any more; its memory is used anew in time.
    #[default]
    Invalidate,
    /// The same, and what is left is destroyed and the destruction is verified.
    Physical,
}

/// Which nodes a purge reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PurgeReach {
    /// This node.
    #[default]
    Node,
    /// Every member of the cluster.
    Cluster,
    /// This node, as its part of what reaches every member: only members ask for that.
    Part,
}

/// What an administrator asks for. As JSON it is the body of `POST /v1/purges`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PurgeRequest {
    /// `DOMAIN/NAME`, or a bare `NAME` where only one trust domain has it.
    pub namespace: String,
    /// What of it.
    #[serde(default)]
    pub scope: PurgeScope,
    /// Where.
    #[serde(default)]
    pub reach: Option<PurgeReach>,
    /// How far.
    #[serde(default)]
    pub mode: PurgeMode,
    /// Chosen by whoever asks, 1 to 128 printable ASCII characters: the same request asked again is the same job.
    pub request_id: String,
    /// For the receipt, at most 1,024 bytes.
    #[serde(default)]
    pub reason: String,
}

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PurgeState {
    /// Journalled; the generation is not durable yet.
    Requested,
    /// Nothing older can be read any more. What is left is being destroyed.
    Invalidated,
    /// Done, with a receipt.
    Completed,
}

/// A purge, as an administrator sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeJob {
    /// `prg_` and 32 hexadecimal digits.
    pub id: String,
    /// What was asked for; `namespace` is `DOMAIN/NAME` here.
    #[serde(flatten)]
    pub request: PurgeRequest,
    /// How far it is.
    pub state: PurgeState,
    /// RFC 3339, UTC.
    pub requested_at: String,
    /// When nothing older could be read any more. RFC 3339, UTC.
    pub acknowledged_at: Option<String>,
    /// RFC 3339, UTC.
    pub completed_at: Option<String>,
    /// The generation that the namespace was raised to; `None` for a narrower scope.
    pub generation: Option<u64>,
    /// Blocks destroyed so far.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How often a restart resumed it.
    pub resumed: u32,
    /// Id of the receipt, once there is one.
    pub receipt: Option<String>,
}

/// Why a purge was not begun. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PurgeError {
    /// The request cannot be.
    #[error("{0}")]
    Invalid(String),
    /// No domain knows the name.
    #[error("no namespace {0:?}: nothing was stored under that name")]
    UnknownNamespace(String),
    /// The request id belongs to a job with another body.
    #[error("request_id {request_id:?} was used for {id} with another body: choose a new request_id")]
    Conflict {
        /// The id that was used again.
        request_id: String,
        /// Of the earlier job.
        id: String,
    },
    /// Too many jobs run at once.
    #[error("{0}")]
    Busy(String),
    /// It could not be made durable.
    #[error("{0}")]
    Unavailable(String),
}

/// A namespace, as an administrator sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceStatus {
    /// `DOMAIN/NAME`.
    pub namespace: String,
    /// In force.
    pub generation: u64,
    /// Blocks with at least one copy, those that a purge has hidden and not yet destroyed included.
    pub blocks: u64,
    /// Blocks with a copy in host memory.
    pub host_blocks: u64,
    /// Blocks with a copy on NVMe.
    pub nvme_blocks: u64,
    /// Bytes of cached and reserved blocks, each counted once.
    pub used_bytes: u64,
    /// Bytes that it may use; `None`: no limit.
    pub quota_bytes: Option<u64>,
    /// Words of the administrator's own.
    pub labels: std::collections::BTreeMap<String, String>,
    /// Why it is not served, in words; `None`: it is.
    pub refused: Option<String>,
}

/// What an administrator may set of a namespace. As JSON it is the body of `PUT /v1/namespaces/{ns}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NamespaceSettings {
    /// Bytes that it may use; `None`: no limit.
    pub quota_bytes: Option<u64>,
    /// Words of the administrator's own: at most 16, keys and values of at most 64 bytes.
    pub labels: std::collections::BTreeMap<String, String>,
}
