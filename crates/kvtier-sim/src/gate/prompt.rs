use kvtier_core::{BlockHash, Parent};

use crate::TraceRequest;
use crate::trace::block_hash;

/// One request of the trace, ready to be lived through.
#[derive(Clone, Debug)]
pub(super) struct Prompt {
    pub(super) at_s: f64,
    pub(super) tokens: u32,
    pub(super) ids: Vec<u64>,
    pub(super) hashes: Vec<BlockHash>,
}

/// Longest prompt that is believed, tokens.
const TOKENS_MAX: u64 = 1 << 30;

impl Prompt {
    /// Tokens of the block at `place`.
    pub(super) fn tokens_at(&self, place: usize, block_tokens: u32) -> u32 {
        self.tokens_of(place + 1, block_tokens) - self.tokens_of(place, block_tokens)
    }

    /// Tokens of the first `blocks` blocks.
    pub(super) fn tokens_of(&self, blocks: usize, block_tokens: u32) -> u32 {
        (blocks as u64 * u64::from(block_tokens)).min(u64::from(self.tokens)) as u32
    }

    pub(super) fn parent_at(&self, place: usize) -> Parent {
        match place.checked_sub(1) {
            Some(before) => Parent::Block(self.hashes[before]),
            None => Parent::Root,
        }
    }
}

/// The prompts of a trace. Time never goes back: who is late in the file comes when the one before it came. The first comes at
/// zero, and a prompt has at least one token.
pub(super) fn prompts(requests: &[TraceRequest], tokens_per_id: u32) -> Vec<Prompt> {
    let first_ms = requests.first().map_or(0, |request| request.timestamp_ms);
    let mut last_ms = 0;
    requests
        .iter()
        .map(|request| {
            last_ms = request.timestamp_ms.saturating_sub(first_ms).max(last_ms);
            // What no id stands for is nobody's block; what no token is in neither.
            let spans = request.input_tokens.div_ceil(u64::from(tokens_per_id)) as usize;
            let ids = &request.hash_ids[..request.hash_ids.len().min(spans)];
            Prompt {
                at_s: last_ms as f64 * 1e-3,
                tokens: request.input_tokens.clamp(1, TOKENS_MAX) as u32,
                ids: ids.to_vec(),
                hashes: ids.iter().map(|id| block_hash(*id)).collect(),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::prompts;
    use crate::TraceRequest;

    #[test]
    fn time_begins_at_zero_and_never_goes_back_and_the_last_block_is_short() {
        let request = |timestamp_ms, input_tokens, hash_ids: &[u64]| TraceRequest {
            timestamp_ms,
            input_tokens,
            output_tokens: 1,
            hash_ids: hash_ids.to_vec(),
        };
        let prompts = prompts(
            &[
                request(5_000, 1_100, &[1, 2, 3]),
                request(4_000, 0, &[9]),
                request(6_500, 512, &[1]),
            ],
            512,
        );
        let times: Vec<f64> = prompts.iter().map(|prompt| prompt.at_s).collect();
        assert_eq!(times, [0.0, 0.0, 1.5]);
        let tokens: Vec<u32> = (0..3).map(|place| prompts[0].tokens_at(place, 512)).collect();
        assert_eq!(tokens, [512, 512, 76]);
        assert_eq!((prompts[1].tokens, prompts[1].ids.len()), (1, 0));
    }
}
