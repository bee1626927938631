//! What would be decided about fetching blocks from peers, term by term: asks as a lookup does, and decides nothing.

use std::time::{Duration, Instant};

use kvtier_core::cost::{Decision, FetchPlan, Question};
use kvtier_core::{Tier, TrustDomain};
use serde::{Deserialize, Serialize};

use super::Shared;
use super::reading::{LookupJob, asked, positions, prefix, reach};
use super::serving::request;
use super::weighing::Weighing;
use crate::node::outbox::Notice;

/// A lookup as the cost model sees it now. Times in seconds.
///
/// `recompute_s` and `expected_s` cover the matched tokens alone: what follows them is computed whatever is decided.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Explanation {
    /// Keys asked for.
    pub blocks: u64,
    /// Those of them that are on this node.
    pub here: u64,
    /// How many of the first keys are on this node.
    pub here_prefix: u64,
    /// What was asked of the model: hints, or what the keys say.
    pub question: ExplainedQuestion,
    /// Every peer, or the remote tier, and what it has.
    pub peers: Vec<ExplainedPeer>,
    /// The peer that was weighed: the best of those that have something; none where no peer has.
    pub backend: Option<String>,
    /// `fetch`, `recompute`, or `split`: the engine computes the front while the rest is fetched.
    pub plan: String,
    /// Why, in words.
    pub reason: String,
    /// Tokens that the peer offers beyond what the engine has.
    pub matched_tokens: u32,
    /// Of a split: tokens that the engine computes meanwhile, beyond what it has.
    pub compute_front_tokens: u32,
    /// Tokens to fetch; 0 where the plan is to recompute.
    pub fetch_tokens: u32,
    /// Bytes of keys and values to fetch; 0 where the plan is to recompute.
    pub fetch_bytes: u64,
    /// The five terms of a fetch of all matched tokens.
    pub terms: ExplainedTerms,
    /// Recomputing the matched tokens, with the wait for a GPU: R.
    pub recompute_s: f64,
    /// Reports of engines that R was learned from; 0: it is what the settings' model and GPU promise.
    pub recompute_measured: u64,
    /// The plan, with the wait for a GPU.
    pub expected_s: f64,
    /// What a fetch spares those who wait for a GPU, as far as it counted.
    pub relief_s: f64,
    /// Probability that the fetch fails.
    pub failure_probability: f64,
    /// After this a fetch that has not ended is judged again, after its start.
    pub soft_deadline_s: f64,
}

/// The request behind an [`Explanation`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExplainedQuestion {
    /// Tokens of the whole prompt.
    pub prompt_tokens: u32,
    /// Tokens of its prefix that the engine or this node has.
    pub local_prefix_tokens: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Keys and values of one token, bytes.
    pub kv_bytes_per_token: u64,
    /// How long the request waits for a GPU anyway.
    pub queue_wait_s: f64,
    /// Whether the engine can compute a part while the rest is fetched.
    pub can_split: bool,
}

/// The five terms of a fetch, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExplainedTerms {
    /// Until the peer answers.
    pub lookup_s: f64,
    /// Behind what is in flight.
    pub queue_s: f64,
    /// The bytes.
    pub transfer_s: f64,
    /// Decompression that the transfer does not hide.
    pub decompression_s: f64,
    /// What failing costs, times its probability.
    pub risk_s: f64,
}

/// A peer in an [`Explanation`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExplainedPeer {
    /// As the settings or the directory name it.
    pub address: String,
    /// It said in time what it has, and has seen the same invalidations.
    pub answered: bool,
    /// What it has of the keys that are not on this node.
    pub blocks: u64,
    /// How many of the first keys are cached with what it has.
    pub prefix: u64,
    /// Whether its gate is open.
    pub gate_open: bool,
    /// Why, in words; empty where nothing is known of it yet.
    pub gate_reason: String,
    /// What asking it saves, as a share of what recomputing takes.
    pub gate_value: f64,
    /// Bytes a second that are counted with.
    pub bytes_per_second: u64,
    /// Time until it answers that is counted with, microseconds.
    pub lookup_us: u64,
}

impl Shared {
    /// An engine computed so many tokens behind others in so long.
    pub(in crate::node) fn computed(&self, tokens: u32, before_tokens: u32, took: Duration) {
        if let Some(weighing) = &self.weighing {
            weighing.computed(tokens, before_tokens, took);
        }
    }

    /// Whether there is something to explain to clients of a domain; else why not, in words.
    pub(crate) fn can_explain(&self, domain: TrustDomain) -> Result<(), String> {
        let why = if self.weighing.is_none() {
            "there is no cost model: peers are read from unasked; set cost_model"
        } else if !self.domains.is_shared(domain) {
            "there is no backend to weigh: this trust domain is shared with no peer; name it under [[domains]] on every member"
        } else if !self.is_serving() {
            "this member answers only misses: no majority renews its lease"
        } else if !self.may_help(domain) {
            "there is no backend to weigh: no peer is connected; see kvctl peers"
        } else {
            return Ok(());
        };
        Err(why.to_owned())
    }

    /// A reading thread explains.
    pub(super) fn explain(&self, job: &LookupJob) {
        let explained = self
            .weighing
            .as_ref()
            .ok_or_else(|| "there is no cost model".to_owned());
        let json = explained
            .and_then(|weighing| self.explanation(weighing, job))
            .and_then(|explanation| serde_json::to_string(&explanation).map_err(|error| error.to_string()));
        job.outbox.push(Notice::Explained {
            request: job.request,
            json,
        });
    }

    fn explanation(&self, weighing: &Weighing, job: &LookupJob) -> Result<Explanation, String> {
        let (scope, hashes) = (job.scope, &job.hashes);
        let looked = self.driver.with(|decider, now| {
            let asked = request(scope.client, scope.namespace, scope.realization, hashes, now);
            decider.manager.lookup(&asked, now)
        });
        let tiers = looked.map_err(|refusal| refusal.to_string())?;
        let missing = positions(&tiers, Option::is_none);
        let found = match self.question(scope, hashes, &missing) {
            Some((keys, versions)) => self.locate(&keys, &versions, Instant::now() + self.query_timeout),
            None => Vec::new(),
        };
        let offers: Vec<(&str, usize)> = found
            .iter()
            .map(|(link, _, theirs)| (link.address.as_str(), reach(&tiers, &missing, theirs)))
            .collect();
        let now = self.driver.clock.now();
        let (question, decision, backend) = weighing.explain(now, &asked(&tiers, job.hints), &offers);
        let peers = self.links().into_iter().map(|link| {
            let gate = weighing.gate(now, &link.address).unwrap_or_default();
            let theirs = found.iter().find(|(other, ..)| other.address == link.address);
            let theirs = theirs.map(|(_, _, theirs)| theirs.as_slice());
            ExplainedPeer {
                address: link.address.clone(),
                answered: theirs.is_some(),
                blocks: theirs.map_or(0, |theirs| theirs.iter().flatten().count() as u64),
                prefix: theirs.map_or(prefix(&tiers), |theirs| reach(&tiers, &missing, theirs)) as u64,
                gate_open: gate.open,
                gate_reason: gate.reason,
                gate_value: gate.value,
                bytes_per_second: gate.bytes_per_second,
                lookup_us: gate.lookup_us,
            }
        });
        let peers = peers.collect();
        let explanation = Explanation::of(&tiers, &question, &decision, backend, peers);
        Ok(Explanation {
            recompute_measured: weighing.measured(),
            ..explanation
        })
    }
}

impl Explanation {
    /// Of a lookup that found this here, and what the model says of the rest.
    pub(in crate::node) fn of(
        tiers: &[Option<Tier>],
        question: &Question,
        decision: &Decision,
        backend: Option<String>,
        peers: Vec<ExplainedPeer>,
    ) -> Explanation {
        Explanation {
            blocks: tiers.len() as u64,
            here: tiers.iter().flatten().count() as u64,
            here_prefix: prefix(tiers) as u64,
            question: ExplainedQuestion {
                prompt_tokens: question.prompt_tokens,
                local_prefix_tokens: question.local_prefix_tokens,
                block_tokens: question.block_tokens,
                kv_bytes_per_token: question.kv_bytes_per_token,
                queue_wait_s: question.queue_wait_s,
                can_split: question.can_split,
            },
            peers,
            backend,
            plan: match decision.plan {
                FetchPlan::Recompute => "recompute",
                FetchPlan::Fetch => "fetch",
                FetchPlan::Split { .. } => "split",
            }
            .to_owned(),
            compute_front_tokens: match decision.plan {
                FetchPlan::Split { compute_front_tokens } => compute_front_tokens,
                FetchPlan::Recompute | FetchPlan::Fetch => 0,
            },
            reason: decision.reason.to_string(),
            matched_tokens: decision.matched_tokens,
            fetch_tokens: decision.fetch_tokens,
            fetch_bytes: decision.fetch_bytes,
            terms: ExplainedTerms {
                lookup_s: decision.terms.lookup_s,
                queue_s: decision.terms.queue_s,
                transfer_s: decision.terms.transfer_s,
                decompression_s: decision.terms.decompression_s,
                risk_s: decision.terms.risk_s,
            },
            recompute_s: decision.recompute_s,
            recompute_measured: 0,
            expected_s: decision.expected_s,
            relief_s: decision.relief_s,
            failure_probability: decision.failure_probability,
            soft_deadline_s: decision.soft_deadline_s,
        }
    }
}
