use super::BackendId;

/// A queue wait beyond this is taken for this, seconds.
const WAIT_MAX_S: f64 = 86_400.0;

/// What is asked about one request. Where a caller gave no hint, the values come from settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Question {
    /// Tokens of the whole prompt.
    pub prompt_tokens: u32,
    /// Tokens of its prefix that the engine has already.
    pub local_prefix_tokens: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Keys and values of one token, bytes.
    pub kv_bytes_per_token: u64,
    /// How long the request waits for a GPU anyway, seconds.
    pub queue_wait_s: f64,
    /// The engine can compute the front while the rest is fetched.
    pub can_split: bool,
}

impl Question {
    /// The queue wait as it is counted with, seconds: what is no number is none.
    pub(super) fn wait_s(&self) -> f64 {
        if self.queue_wait_s > 0.0 {
            self.queue_wait_s.min(WAIT_MAX_S)
        } else {
            0.0
        }
    }
}

/// A backend that has some of the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub backend: BackendId,
    /// Tokens of the prompt's prefix that are cached up to and including what this backend has.
    pub matched_tokens: u32,
}
