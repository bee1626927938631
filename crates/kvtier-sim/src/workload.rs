//! A multi-turn chat workload, drawn from a seed: sessions arrive, share system prompts, and come back with everything
//! said so far plus a new question. The same schema as [`crate::trace`].

use std::collections::BTreeMap;

use crate::random::Random;
use crate::trace::{TOKENS_PER_ID, TraceRequest};

#[cfg(test)]
mod tests;

/// What to generate. The defaults give a few thousand requests over about twenty simulated minutes, of which a large
/// cache hits a good half of the tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatWorkload {
    /// Fixes everything below that is drawn.
    pub seed: u64,
    /// Chats.
    pub sessions: u32,
    /// Mean gap between two new chats, milliseconds.
    pub session_gap_ms: u64,
    /// Mean turns of a chat; at least 1 each.
    pub turns_mean: u64,
    /// Most turns of a chat.
    pub turns_max: u64,
    /// Mean pause between an answer and the next question, milliseconds.
    pub turn_gap_ms: u64,
    /// Distinct system prompts; low ones are chosen more often.
    pub system_prompts: u32,
    /// Mean length of a system prompt, tokens.
    pub system_prompt_tokens: u64,
    /// Mean length of a question with what is pasted into it, tokens.
    pub question_tokens: u64,
    /// Mean length of an answer, tokens.
    pub answer_tokens: u64,
    /// A chat that reaches this many tokens ends.
    pub context_tokens_max: u64,
}

impl Default for ChatWorkload {
    fn default() -> Self {
        ChatWorkload {
            seed: 1,
            sessions: 700,
            session_gap_ms: 1_500,
            turns_mean: 4,
            turns_max: 24,
            turn_gap_ms: 25_000,
            system_prompts: 12,
            system_prompt_tokens: 1_500,
            question_tokens: 700,
            answer_tokens: 300,
            context_tokens_max: 32_768,
        }
    }
}

/// Spoken once a turn: when, by whom, and how long the prompt and the answer are.
struct Turn {
    at_ms: u64,
    session: u32,
    input_tokens: u64,
    output_tokens: u64,
}

impl ChatWorkload {
    /// The requests in order of time. Equal settings, equal requests, on every machine.
    #[must_use]
    pub fn generate(&self) -> Vec<TraceRequest> {
        let mut random = Random::new(self.seed);
        let prompts: Vec<u64> = (0..self.system_prompts.max(1))
            .map(|_| self.system_prompt_tokens / 2 + random.exponential(self.system_prompt_tokens / 2))
            .collect();
        let mut chosen = Vec::new();
        let mut turns = Vec::new();
        let mut arrival_ms = 0;
        for session in 0..self.sessions {
            // The lesser of two draws: low prompts are the popular ones.
            let prompt = random.index(prompts.len()).min(random.index(prompts.len()));
            chosen.push(prompt);
            self.speak(&mut random, session, arrival_ms, prompts[prompt], &mut turns);
            arrival_ms += random.exponential(self.session_gap_ms);
        }
        turns.sort_by_key(|turn| (turn.at_ms, turn.session));
        Numbering {
            prompts,
            chosen,
            next: 0,
            shared: BTreeMap::new(),
            own: BTreeMap::new(),
        }
        .number(&turns)
    }

    fn speak(&self, random: &mut Random, session: u32, arrival_ms: u64, prompt_tokens: u64, turns: &mut Vec<Turn>) {
        let count = (1 + random.exponential(self.turns_mean.saturating_sub(1))).min(self.turns_max.max(1));
        let mut at_ms = arrival_ms;
        let mut context_tokens = prompt_tokens;
        for _ in 0..count {
            context_tokens += 1 + random.exponential(self.question_tokens);
            if context_tokens > self.context_tokens_max {
                break;
            }
            let output_tokens = 1 + random.exponential(self.answer_tokens);
            turns.push(Turn {
                at_ms,
                session,
                input_tokens: context_tokens,
                output_tokens,
            });
            context_tokens += output_tokens;
            // Some twenty milliseconds a token to answer, then the reader thinks.
            at_ms += output_tokens * 20 + random.exponential(self.turn_gap_ms);
        }
    }
}

/// Gives ids in order of first appearance, as published traces do: full spans of a prefix keep theirs, a partial last
/// span gets a new one because its tokens will change.
struct Numbering {
    prompts: Vec<u64>,
    chosen: Vec<usize>,
    next: u64,
    shared: BTreeMap<(usize, u64), u64>,
    own: BTreeMap<(u32, u64), u64>,
}

impl Numbering {
    fn number(mut self, turns: &[Turn]) -> Vec<TraceRequest> {
        turns
            .iter()
            .map(|turn| {
                let spans = turn.input_tokens.div_ceil(u64::from(TOKENS_PER_ID));
                TraceRequest {
                    timestamp_ms: turn.at_ms,
                    input_tokens: turn.input_tokens,
                    output_tokens: turn.output_tokens,
                    hash_ids: (0..spans).map(|span| self.id(turn, span)).collect(),
                }
            })
            .collect()
    }

    fn id(&mut self, turn: &Turn, span: u64) -> u64 {
        let end = (span + 1) * u64::from(TOKENS_PER_ID);
        let prompt = self.chosen[turn.session as usize];
        let fresh = self.next;
        let id = if end <= self.prompts[prompt] {
            *self.shared.entry((prompt, span)).or_insert(fresh)
        } else if end <= turn.input_tokens {
            *self.own.entry((turn.session, span)).or_insert(fresh)
        } else {
            fresh
        };
        if id == fresh {
            self.next += 1;
        }
        id
    }
}
