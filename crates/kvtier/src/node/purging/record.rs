use std::time::Instant;

use kvtier_core::BlockHash;
use serde::{Deserialize, Serialize};

use crate::purge::{PurgeJob, PurgeRequest, PurgeScope, PurgeState};

/// Hashes that one purge may name.
pub(super) const HASHES_MAX: usize = 65_536;

/// A job as the journal has it. The last entry of a number counts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) number: u64,
    /// The namespace's id.
    pub(super) slot: u32,
    /// Blocks that a purge by label took because it is not known what they were put under.
    #[serde(default)]
    pub(super) of_any_label: u64,
    /// The generation in force when it was asked for.
    pub(super) from: Option<u64>,
    /// Of the request: the same id with another body is refused.
    pub(super) request_digest: String,
    pub(super) job: PurgeJob,
    /// When it was asked for, in this run.
    #[serde(skip)]
    pub(super) begun: Option<Instant>,
}

impl Record {
    pub(super) fn is_done(&self) -> bool {
        self.job.state == PurgeState::Completed
    }

    /// What names blocks does not stay longer than it is needed.
    pub(super) fn drop_hashes(&mut self) {
        if let PurgeScope::Hashes(hashes) = &mut self.job.request.scope {
            hashes.clear();
        }
    }
}

/// BLAKE3 of a request as it is meant: `reach` filled in, the namespace with its domain.
pub(super) fn digest_of_request(request: &PurgeRequest) -> String {
    let text = serde_json::to_vec(request).unwrap_or_default();
    blake3::hash(&text).to_hex().to_string()
}

pub(super) fn hash(text: &str) -> Option<BlockHash> {
    Some(BlockHash(from_hex(text)?))
}

pub(super) fn realization(text: &str) -> Option<[u8; 32]> {
    from_hex(text)
}

fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if text.len() != 2 * N || !text.is_ascii() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().as_chunks::<2>().0) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(bytes)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
