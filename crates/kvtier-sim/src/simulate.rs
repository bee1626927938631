//! What policies would hit on a trace, metadata only: no tiers, no clients, one cache of so many blocks.
//!
//! A block counts as hit only where all before it in the prompt are hit too. [`Policy::Lru`] and [`Policy::Hazard`] are
//! the policies of `kvtier-core` themselves, driven as the state machine drives them; the others are yardsticks. Where a trace says how
//! long answers are, the policies of `kvtier-core` are told when an answer is complete, as a client may tell a node.

mod classic;
mod opt;
mod queue;
mod tree;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use kvtier_core::{EvictionPolicy, LeafFirstLru, LearnedTables, ReuseHazard};

use crate::trace::{TraceAnswer, TraceAnswers, TraceRequest};

/// Evicted blocks that the simulated hazard policy remembers.
const GHOSTS_MAX: usize = 1 << 20;

/// Which blocks go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Policy {
    /// Belady's: what is used again last goes first. It knows the future; nothing does better.
    Opt,
    /// Reuse hazards, ours: [`ReuseHazard`].
    Hazard,
    /// Least recently used, leaves first: [`LeafFirstLru`].
    Lru,
    /// Least frequently used, the older of two that are equal.
    Lfu,
    /// Yang et al., "FIFO queues are all you need for cache eviction" (SOSP '23).
    S3Fifo,
    /// Zhang et al., "SIEVE is simpler than LRU" (NSDI '24).
    Sieve,
    /// Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache" (FAST '03).
    Arc,
    /// Jiang and Zhang, "LIRS: an efficient low inter-reference recency set replacement policy" (SIGMETRICS '02).
    Lirs,
    /// Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy" (ACM TOS, 2017).
    WTinyLfu,
}

impl Policy {
    /// All, the best first.
    pub const ALL: [Policy; 9] = [
        Policy::Opt,
        Policy::Hazard,
        Policy::Lru,
        Policy::Lfu,
        Policy::S3Fifo,
        Policy::Sieve,
        Policy::Arc,
        Policy::Lirs,
        Policy::WTinyLfu,
    ];

    /// What it is called on a command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Policy::Opt => "opt",
            Policy::Hazard => "hazard",
            Policy::Lru => "lru",
            Policy::Lfu => "lfu",
            Policy::S3Fifo => "s3-fifo",
            Policy::Sieve => "sieve",
            Policy::Arc => "arc",
            Policy::Lirs => "lirs",
            Policy::WTinyLfu => "w-tinylfu",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(name: &str) -> Result<Policy, String> {
        let known = Policy::ALL.into_iter().find(|policy| policy.name() == name);
        known.ok_or_else(|| {
            let names: Vec<&str> = Policy::ALL.iter().map(|policy| policy.name()).collect();
            format!("{name:?} is no policy: {}", names.join(", "))
        })
    }
}

/// A use of a prompt, its ids renamed to small numbers.
#[derive(Clone, Debug)]
struct Prompt {
    time_ms: u64,
    answer: Option<TraceAnswer>,
    /// Tokens of the prompt, those that no id stands for too.
    tokens: u64,
    /// Each block and its tokens, in prefix order.
    blocks: Vec<(u32, u16)>,
}

/// A trace made ready to be simulated many times.
#[derive(Clone, Debug, Default)]
pub struct Prompts {
    prompts: Vec<Prompt>,
    /// Distinct blocks.
    blocks: usize,
}

impl Prompts {
    /// Of a trace in which an id stands for `tokens_per_id` tokens.
    #[must_use]
    pub fn new<'a>(requests: impl IntoIterator<Item = &'a TraceRequest>, tokens_per_id: u32) -> Prompts {
        let mut names = BTreeMap::new();
        let mut time_ms = 0;
        let prompts = requests
            .into_iter()
            .map(|request| {
                // Time never goes back: who is late in the file comes when the one before it came.
                time_ms = request.timestamp_ms.max(time_ms);
                let mut left = request.input_tokens;
                let blocks = request.hash_ids.iter().map(|id| {
                    let next = u32::try_from(names.len()).expect("fewer than 2^32 blocks");
                    let block = *names.entry(*id).or_insert(next);
                    let tokens = left.min(u64::from(tokens_per_id));
                    left -= tokens;
                    (block, u16::try_from(tokens).unwrap_or(u16::MAX))
                });
                Prompt {
                    time_ms,
                    answer: TraceAnswer::to(request, time_ms),
                    tokens: request.input_tokens,
                    blocks: blocks.collect(),
                }
            })
            .collect();
        Prompts {
            prompts,
            blocks: names.len(),
        }
    }

    /// The same, where nobody says how long the answers are.
    #[must_use]
    pub fn without_answers(mut self) -> Prompts {
        for prompt in &mut self.prompts {
            prompt.answer = None;
        }
        self
    }

    /// Distinct blocks.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Requests.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.prompts.len()
    }
}

/// What a simulation hit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Simulated {
    /// Prompt tokens found as a cached prefix.
    pub hit_tokens: u64,
    /// Prompt tokens.
    pub tokens: u64,
    /// Blocks found as a cached prefix.
    pub hit_blocks: u64,
    /// Blocks asked for.
    pub blocks: u64,
}

impl Simulated {
    /// Share of the prompt tokens that were hit; 0 without any.
    #[must_use]
    pub fn token_ratio(self) -> f64 {
        share(self.hit_tokens, self.tokens)
    }

    /// Share of the blocks that were hit; 0 without any.
    #[must_use]
    pub fn block_ratio(self) -> f64 {
        share(self.hit_blocks, self.blocks)
    }

    fn count(&mut self, prompt: &Prompt, hit: usize) {
        let tokens = |blocks: &[(u32, u16)]| blocks.iter().map(|(_, tokens)| u64::from(*tokens)).sum::<u64>();
        self.hit_tokens += tokens(&prompt.blocks[..hit]);
        self.tokens += prompt.tokens;
        self.hit_blocks += hit as u64;
        self.blocks += prompt.blocks.len() as u64;
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// A cache of blocks as the simulation sees it.
trait Cache {
    /// Looks a prompt up, then caches what it can of it. How many of its blocks were hit as a prefix.
    fn request(&mut self, prompt: &Prompt) -> usize;

    /// Hears how long the answer to a prompt of before was.
    fn answered(&mut self, prompt: &Prompt, answer: TraceAnswer) {
        let _ = (prompt, answer);
    }
}

/// Runs a trace through a cache of `capacity_blocks` blocks that starts empty. Before each request `progress` is called.
#[must_use]
pub fn simulate(prompts: &Prompts, policy: Policy, capacity_blocks: usize, progress: &mut dyn FnMut()) -> Simulated {
    let blocks = prompts.blocks;
    let mut cache: Box<dyn Cache> = match policy {
        Policy::Opt => Box::new(opt::Opt::new(prompts, capacity_blocks)),
        Policy::Hazard => Box::new(tree::TreeCache::new(
            ReuseHazard::new(GHOSTS_MAX),
            blocks,
            capacity_blocks,
        )),
        Policy::Lru => Box::new(tree::TreeCache::new(LeafFirstLru::new(), blocks, capacity_blocks)),
        Policy::Lfu => Box::new(classic::Flat(classic::Lfu::new(blocks, capacity_blocks))),
        Policy::S3Fifo => Box::new(classic::Flat(classic::S3Fifo::new(blocks, capacity_blocks))),
        Policy::Sieve => Box::new(classic::Flat(classic::Sieve::new(blocks, capacity_blocks))),
        Policy::Arc => Box::new(classic::Flat(classic::Arc::new(blocks, capacity_blocks))),
        Policy::Lirs => Box::new(classic::Flat(classic::Lirs::new(blocks, capacity_blocks))),
        Policy::WTinyLfu => Box::new(classic::Flat(classic::WTinyLfu::new(blocks, capacity_blocks))),
    };
    run(cache.as_mut(), &prompts.prompts, progress)
}

/// The same with reuse hazards and what they learned before; also what they know in the end.
#[must_use]
pub fn simulate_learned(
    prompts: &Prompts,
    learned: &LearnedTables,
    capacity_blocks: usize,
) -> (Simulated, LearnedTables) {
    let mut policy = ReuseHazard::new(GHOSTS_MAX);
    policy.learn(learned);
    let mut cache = tree::TreeCache::new(policy, prompts.blocks, capacity_blocks);
    let simulated = run(&mut cache, &prompts.prompts, &mut || ());
    (simulated, cache.policy().learned().unwrap_or_default())
}

fn run(cache: &mut dyn Cache, prompts: &[Prompt], progress: &mut dyn FnMut()) -> Simulated {
    let mut simulated = Simulated::default();
    let mut answers = TraceAnswers::default();
    for prompt in prompts {
        progress();
        while let Some((answer, answered)) = answers.complete(prompt.time_ms) {
            cache.answered(answered, answer);
        }
        if let Some(answer) = prompt.answer {
            answers.begin(answer, prompt);
        }
        let hit = cache.request(prompt);
        simulated.count(prompt, hit);
    }
    simulated
}

#[cfg(test)]
mod tests;
