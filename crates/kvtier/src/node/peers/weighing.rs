//! Whether a peer's blocks are worth fetching: asks [`kvtier_core::cost`], and tells it what fetches and probes took.
//!
//! Without a model in the settings nothing is known of what recomputing takes, and peers are read from unasked.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvtier_core::cost::{
    BackendId, BackendProfile, Candidate, ComputeProfile, CostModel, Decision, FetchId, FetchPlan, GateMode,
    GateSettings, GpuProfile, ModelProfile, Patience, Question, RecomputeCoefficients,
};
use kvtier_core::{Hints, Time};
use kvtier_transfer::memory::{MemoryRegion, PageRequest};
use kvtier_transfer::{Direction, Piece, RemoteAccess, RemoteRegion, Transport};
use parking_lot::Mutex;

use super::Shared;
use super::comparing::{Comparing, Expected, TermComparison};
use super::link::Link;
use super::message::Message;
use super::regions::Way;
use super::sampling::Sampling;
use crate::settings::{CheckedSettings, PeerGate};

/// Bytes of a probe at most: what the region that peers probe has.
pub(in crate::node) const PROBE_BYTES: usize = 2 << 20;
/// How long a probe may take.
const PROBE_PATIENCE: Duration = Duration::from_secs(2);
/// Longest pause between two looks for probes that are due.
const PROBE_PAUSE: Duration = Duration::from_millis(200);

/// No fetch is over its soft deadline before this: of what arrives the model learns in parts, and a part of a fast peer may be late by
/// what threads and sockets take.
const SOFT_DEADLINE_MIN: Duration = Duration::from_millis(10);
/// Nor before this share of what recomputing takes: what comes in one piece is not heard of until it is there, and to give it up for
/// being a little late would cost far more than to wait.
const SOFT_DEADLINE_SHARE: f64 = 0.1;
/// No fetch lasts longer.
const SOFT_DEADLINE_MAX: Duration = Duration::from_secs(3600);

/// What an engine says it took, at most this many times more or less than the settings promise.
const PROPORTION: f64 = 16.0;

/// No prompt is longer.
const PROMPT_TOKENS_MAX: u32 = 1 << 22;

/// See the module.
pub(in crate::node) struct Weighing {
    state: Mutex<State>,
    /// What recomputing takes by the settings.
    profile: RecomputeCoefficients,
    block_tokens: u32,
    kv_bytes_per_token: u64,
    gate: GateMode,
    limit: Duration,
}

struct State {
    model: CostModel,
    backends: HashMap<String, BackendId>,
    next_fetch: u64,
    fetch: u64,
    recompute: u64,
    latest: HashMap<BackendId, String>,
    sampling: Sampling,
    comparing: Comparing,
}

/// What a lookup or a fetch is about, in blocks.
pub(in crate::node) struct Asked {
    /// All keys.
    pub(in crate::node) blocks: usize,
    /// Those before the first that is not here.
    pub(in crate::node) local: usize,
    pub(in crate::node) hints: Hints,
}

/// A fetch that was decided on.
pub(in crate::node) struct Chosen {
    pub(in crate::node) decision: Decision,
    /// Which of the offers.
    pub(in crate::node) offer: usize,
    /// The first block to fetch. A split leaves those before it to the engine, which can compute them meanwhile; else 0.
    pub(in crate::node) first_block: usize,
}

impl Chosen {
    /// Whether the engine computes a part.
    pub(in crate::node) fn is_split(&self) -> bool {
        matches!(self.decision.plan, FetchPlan::Split { .. })
    }
}

/// A fetch that was decided on and is under way.
pub(in crate::node) struct Fetching {
    id: FetchId,
    begun: Instant,
    /// After so many seconds.
    answered_s: Option<f64>,
    failed: bool,
    has_arrived: bool,
    decompressed_s: f64,
    expected: Expected,
    soft_deadline: Duration,
    recompute_s: f64,
}

/// How a fetch under way is judged, and when.
pub(in crate::node) struct Overdue {
    id: FetchId,
    recompute_s: f64,
    pub(in crate::node) at: Instant,
}

impl Fetching {
    pub(in crate::node) fn overdue(&self) -> Overdue {
        Overdue {
            id: self.id,
            recompute_s: self.recompute_s,
            at: self.begun + self.soft_deadline,
        }
    }
}

/// A gate as the status shows it.
#[derive(Clone, Debug, Default)]
pub(in crate::node) struct GateStatus {
    pub(in crate::node) open: bool,
    pub(in crate::node) reason: String,
    pub(in crate::node) value: f64,
    pub(in crate::node) bytes_per_second: u64,
    pub(in crate::node) lookup_us: u64,
    pub(in crate::node) latest: String,
}

impl Weighing {
    /// `None` where the settings name no model. They were checked. A fetch may take as long as `limit`.
    pub(in crate::node) fn new(settings: &CheckedSettings, gate: PeerGate, limit: Duration) -> Option<Weighing> {
        let model = ModelProfile::preset(settings.cost_model.as_deref()?)?;
        let profile = ComputeProfile {
            model,
            gpu: GpuProfile::preset(&settings.cost_gpu)?,
            gpus: settings.cost_gpus,
            utilization: 0.5,
            overhead_s: 0.01,
        };
        Some(Weighing {
            state: Mutex::new(State {
                model: CostModel::new(profile.coefficients()),
                backends: HashMap::new(),
                next_fetch: 1,
                fetch: 0,
                recompute: 0,
                latest: HashMap::new(),
                sampling: Sampling::new(settings.cost_log_every),
                comparing: Comparing::default(),
            }),
            profile: profile.coefficients(),
            block_tokens: settings.block_tokens,
            kv_bytes_per_token: settings.kv_bytes_per_token.unwrap_or(model.kv_bytes_per_token),
            gate: match gate {
                PeerGate::Auto => GateMode::Auto,
                PeerGate::On => GateMode::On,
                PeerGate::Off => GateMode::Off,
            },
            limit,
        })
    }

    /// Decides which peer to fetch from: candidates are peers and how many of the first blocks are cached with what each has.
    pub(in crate::node::peers) fn decide(
        &self,
        now: Time,
        asked: &Asked,
        peers: &[(Arc<Link>, usize)],
    ) -> Option<(Chosen, Arc<Link>)> {
        let offers: Vec<(&str, usize)> = peers
            .iter()
            .map(|(link, blocks)| (link.address.as_str(), *blocks))
            .collect();
        let chosen = self.decide_among(now, asked, &offers)?;
        let link = Arc::clone(&peers[chosen.offer].0);
        Some((chosen, link))
    }

    /// Decides which backend to fetch from: each with how many of the first blocks are cached together with what it has.
    pub(in crate::node) fn decide_among(&self, now: Time, asked: &Asked, offers: &[(&str, usize)]) -> Option<Chosen> {
        let mut state = self.state.lock();
        let candidates: Vec<Candidate> = offers
            .iter()
            .map(|(name, blocks)| Candidate {
                backend: self.backend(&mut state, name),
                matched_tokens: self.tokens(*blocks),
            })
            .collect();
        let question = self.question(asked);
        let decision = state.model.decide(now, &question, &candidates);
        tracing::debug!(%decision, "blocks elsewhere were weighed");
        if let Some(backend) = decision.backend {
            state.latest.insert(backend, decision.to_string());
        }
        let is_chosen = |candidate: &Candidate| Some(candidate.backend) == decision.backend;
        let chosen = candidates.iter().position(is_chosen);
        state.sampling.see(&decision, chosen.map(|chosen| offers[chosen].0));
        if decision.plan == FetchPlan::Recompute {
            state.recompute += 1;
            return None;
        }
        state.fetch += 1;
        let first_token = match decision.plan {
            FetchPlan::Split { compute_front_tokens } => question.local_prefix_tokens + compute_front_tokens,
            FetchPlan::Fetch | FetchPlan::Recompute => 0,
        };
        Some(Chosen {
            decision,
            offer: chosen?,
            // One that is half computed is fetched.
            first_block: (first_token / self.block_tokens) as usize,
        })
    }

    /// What [`Weighing::decide`] would decide, and the address of the peer that was weighed; counts nothing. Peers that nothing is known of
    /// yet are left out.
    pub(in crate::node) fn explain(
        &self,
        now: Time,
        asked: &Asked,
        peers: &[(&str, usize)],
    ) -> (Question, Decision, Option<String>) {
        let state = self.state.lock();
        let offered: Vec<Candidate> = peers
            .iter()
            .filter_map(|(address, blocks)| {
                let backend = *state.backends.get(*address)?;
                let matched_tokens = self.tokens(*blocks);
                Some(Candidate {
                    backend,
                    matched_tokens,
                })
            })
            .collect();
        let question = self.question(asked);
        let decision = state.model.explain(now, &question, &offered);
        let weighed = decision.backend.and_then(|backend| {
            let mut known = state.backends.iter();
            known.find_map(|(address, other)| (*other == backend).then(|| address.clone()))
        });
        (question, decision, weighed)
    }

    fn question(&self, asked: &Asked) -> Question {
        let hints = &asked.hints;
        Question {
            prompt_tokens: hints.prompt_tokens.unwrap_or(0).max(self.tokens(asked.blocks)),
            local_prefix_tokens: hints.local_prefix_tokens.unwrap_or(0).max(self.tokens(asked.local)),
            block_tokens: self.block_tokens,
            kv_bytes_per_token: self.kv_bytes_per_token,
            queue_wait_s: hints.queue_wait_us.unwrap_or(0) as f64 / 1e6,
            can_split: hints.can_split,
        }
    }

    fn tokens(&self, blocks: usize) -> u32 {
        u32::try_from(blocks)
            .unwrap_or(u32::MAX)
            .saturating_mul(self.block_tokens)
    }

    fn backend(&self, state: &mut State, address: &str) -> BackendId {
        if let Some(backend) = state.backends.get(address) {
            return *backend;
        }
        let gate = GateSettings {
            probe_bytes_max: PROBE_BYTES as u64,
            ..GateSettings::default()
        };
        let profile = BackendProfile {
            lookup_s: 1e-3,
            parallel_fetches: 4,
            limit_s: self.limit.as_secs_f64(),
            ..BackendProfile::default()
        };
        let backend = state.model.add_backend(profile, gate).expect("these settings decide");
        state.model.set_gate_mode(backend, self.gate);
        state.backends.insert(address.to_owned(), backend);
        backend
    }

    pub(in crate::node) fn begin(&self, now: Time, decision: &Decision) -> Fetching {
        let mut state = self.state.lock();
        let id = FetchId(state.next_fetch);
        state.next_fetch += 1;
        state.model.begin_fetch(now, id, decision);
        // By then the wait for a GPU is over.
        let recompute_s = decision.recompute_s - decision.queue_wait_s;
        Fetching {
            id,
            begun: Instant::now(),
            answered_s: None,
            failed: false,
            has_arrived: false,
            decompressed_s: 0.0,
            expected: Expected::of(decision),
            soft_deadline: Duration::try_from_secs_f64(decision.soft_deadline_s.max(SOFT_DEADLINE_SHARE * recompute_s))
                .unwrap_or(SOFT_DEADLINE_MIN)
                .clamp(SOFT_DEADLINE_MIN, SOFT_DEADLINE_MAX),
            recompute_s,
        }
    }

    /// Whether to go on waiting for a fetch that is overdue: until when, or no longer.
    pub(in crate::node) fn judge(&self, now: Time, overdue: &Overdue) -> Option<Instant> {
        let mut state = self.state.lock();
        match state.model.judge(now, overdue.id, overdue.recompute_s) {
            Patience::Wait { until } => Some(Instant::now() + until.since(now)),
            Patience::GiveUp => None,
        }
    }

    /// The peer answered, or did not in time.
    pub(in crate::node) fn answered(&self, now: Time, fetching: &mut Fetching, in_time: bool) {
        if !in_time {
            fetching.failed = true;
        } else if fetching.answered_s.is_none() {
            let took_s = fetching.begun.elapsed().as_secs_f64();
            fetching.answered_s = Some(took_s);
            self.state.lock().model.observe_lookup(now, fetching.id, took_s);
        }
    }

    /// A part of it arrived, or did not.
    pub(in crate::node) fn arrived(
        &self,
        now: Time,
        fetching: &mut Fetching,
        bytes: u64,
        took: Duration,
        is_right: bool,
    ) {
        if is_right {
            fetching.has_arrived |= bytes > 0;
            let mut state = self.state.lock();
            state
                .model
                .observe_progress(now, fetching.id, bytes, took.as_secs_f64());
        } else {
            fetching.failed = true;
        }
    }

    pub(in crate::node) fn end(&self, now: Time, fetching: &Fetching) {
        let took_s = fetching.begun.elapsed().as_secs_f64();
        let mut state = self.state.lock();
        // Of what was not there any more nothing can be compared.
        if fetching.failed || fetching.has_arrived {
            let answered_s = fetching.answered_s.unwrap_or(took_s);
            let times = (!fetching.failed).then_some((answered_s, took_s, fetching.decompressed_s));
            state.comparing.ended(&fetching.expected, times);
        }
        if fetching.failed {
            state.model.observe_failed(now, fetching.id, took_s);
        } else {
            state.model.observe_fetched(now, fetching.id, took_s);
        }
    }

    /// An engine computed so many tokens behind others in so long. What is out of all proportion to the model and the GPU that the settings
    /// name is ignored: it would be of another, or a tenant that wants to mislead the others.
    pub(in crate::node) fn computed(&self, tokens: u32, before_tokens: u32, took: Duration) {
        if tokens.saturating_add(before_tokens) > PROMPT_TOKENS_MAX {
            return;
        }
        let (took_s, promised_s) = (took.as_secs_f64(), self.profile.seconds(tokens, before_tokens));
        if (promised_s / PROPORTION..promised_s * PROPORTION).contains(&took_s) {
            let mut state = self.state.lock();
            let expected_s = state.model.recompute().seconds(tokens, before_tokens);
            state.comparing.recomputed(expected_s, took_s);
            state.model.observe_recompute(tokens, before_tokens, took_s);
        }
    }

    /// Reports of engines that were learned from.
    pub(in crate::node) fn measured(&self) -> u64 {
        self.state.lock().model.recompute().measured()
    }

    /// What was expected, and what it took.
    pub(in crate::node) fn terms(&self) -> Vec<TermComparison> {
        self.state.lock().comparing.terms()
    }

    /// Decisions so far: to fetch, to recompute.
    pub(in crate::node) fn decisions(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.fetch, state.recompute)
    }

    pub(in crate::node) fn gate(&self, now: Time, address: &str) -> Option<GateStatus> {
        let state = self.state.lock();
        let backend = *state.backends.get(address)?;
        let (gate, known) = (state.model.gate(backend, now)?, state.model.backend(backend, now)?);
        Some(GateStatus {
            open: gate.open,
            reason: gate.reason.to_string(),
            value: gate.value,
            bytes_per_second: known.bytes_per_s as u64,
            lookup_us: (known.lookup_s * 1e6) as u64,
            latest: state.latest.get(&backend).cloned().unwrap_or_default(),
        })
    }
}

/// Of a backend that is no peer.
#[cfg(feature = "remote")]
impl Weighing {
    /// Whether so many blocks would be fetched from a backend, were its gate open, by a request that waits that long for a GPU.
    pub(in crate::node) fn would_pay(&self, now: Time, name: &str, blocks: usize, queue_wait_us: u64) -> bool {
        let mut state = self.state.lock();
        let backend = self.backend(&mut state, name);
        let asked = Asked {
            blocks,
            local: 0,
            hints: Hints {
                queue_wait_us: Some(queue_wait_us),
                ..Hints::default()
            },
        };
        let offered = Candidate {
            backend,
            matched_tokens: self.tokens(blocks),
        };
        let decision = state.model.explain(now, &self.question(&asked), &[offered]);
        let fetched_s = decision.terms.total_s().max(decision.queue_wait_s);
        decision.backend.is_some() && fetched_s < decision.recompute_s
    }

    /// A backend said what it has, so long after it was asked.
    pub(in crate::node) fn said(&self, name: &str, took: Duration) {
        let mut state = self.state.lock();
        let backend = self.backend(&mut state, name);
        state.model.observe_answer(backend, took.as_secs_f64());
    }

    /// Whether a backend would be faster with blocks that are compressed to such a share, and come out again at such a rate.
    pub(in crate::node) fn compression_pays(&self, name: &str, stored_ratio: f64, decompress_bytes_per_s: f64) -> bool {
        let mut state = self.state.lock();
        let backend = self.backend(&mut state, name);
        state
            .model
            .compression_pays(backend, stored_ratio, decompress_bytes_per_s)
    }

    /// A block came out of so many bytes, of a fetch that is under way.
    pub(in crate::node) fn stored(
        &self,
        name: &str,
        fetching: &mut Fetching,
        (bytes, stored_bytes): (u64, u64),
        decompressed_in: Duration,
    ) {
        let took_s = decompressed_in.as_secs_f64();
        fetching.decompressed_s += took_s;
        let mut state = self.state.lock();
        let backend = self.backend(&mut state, name);
        state.model.observe_stored(backend, bytes, stored_bytes, took_s);
    }

    /// Whether requests are let through to a backend now.
    pub(in crate::node) fn is_open(&self, now: Time, name: &str) -> bool {
        let mut state = self.state.lock();
        let backend = self.backend(&mut state, name);
        state.model.gate(backend, now).is_some_and(|gate| gate.open)
    }

    /// The next probe of the only backend that is known under this name.
    pub(in crate::node) fn poll_probe(&self, now: Time, name: &str) -> Option<u64> {
        let mut state = self.state.lock();
        let _ = self.backend(&mut state, name);
        state.model.poll_probe(now).map(|(_, probe)| probe.bytes)
    }

    /// What a probe took: until the answer, and for so many bytes. `None`: it failed.
    pub(in crate::node) fn probed(
        &self,
        now: Time,
        name: &str,
        begun: Instant,
        outcome: Option<(Duration, u64, Duration)>,
    ) {
        let mut state = self.state.lock();
        let backend = self.backend(&mut state, name);
        match outcome {
            Some((lookup, bytes, took)) => {
                let (lookup_s, took_s) = (lookup.as_secs_f64(), took.as_secs_f64());
                state.model.observe_probed(now, backend, lookup_s, bytes, took_s);
            }
            None => state
                .model
                .observe_probe_failed(now, backend, begun.elapsed().as_secs_f64()),
        }
    }
}

impl Shared {
    /// The probing thread: reads a little from peers that nobody has read from for a while.
    pub(in crate::node) fn probe_peers(&self) {
        let Some(weighing) = &self.weighing else { return };
        while !self.is_stopping() {
            for link in self.links() {
                weighing.backend(&mut weighing.state.lock(), &link.address);
            }
            let now = self.driver.clock.now();
            let due = weighing.state.lock().model.poll_probe(now);
            let Some((backend, probe)) = due else {
                std::thread::sleep(PROBE_PAUSE);
                continue;
            };
            let address = {
                let state = weighing.state.lock();
                let named = state.backends.iter().find(|(_, other)| **other == backend);
                named.map(|(address, _)| address.clone())
            };
            let link = self
                .links()
                .into_iter()
                .find(|link| Some(&link.address) == address.as_ref());
            let begun = Instant::now();
            let bytes = usize::try_from(probe.bytes)
                .unwrap_or(PROBE_BYTES)
                .clamp(1, PROBE_BYTES);
            let probed = link.and_then(|link| self.probe(&link, bytes));
            let now = self.driver.clock.now();
            let mut state = weighing.state.lock();
            match probed {
                Some((lookup, took)) => {
                    let (lookup_s, took_s) = (lookup.as_secs_f64(), took.as_secs_f64());
                    state.model.observe_probed(now, backend, lookup_s, bytes as u64, took_s);
                }
                None => state
                    .model
                    .observe_probe_failed(now, backend, begun.elapsed().as_secs_f64()),
            }
        }
    }

    /// How long the answer took, and the bytes.
    fn probe(&self, link: &Arc<Link>, bytes: usize) -> Option<(Duration, Duration)> {
        let begun = Instant::now();
        let until = begun + PROBE_PATIENCE;
        let live = link.live()?;
        let Ok(Message::Probed(region)) = link.answer(live.ask(&Message::Probe), until) else {
            return None;
        };
        let lookup = begun.elapsed();
        let region = Arc::new(RemoteRegion::decode(&region).ok()?);
        let (local, _) = MemoryRegion::create("kvtier-probe", PROBE_BYTES, PageRequest::Small).ok()?;
        let registered = match (live.way, &self.verbs) {
            (Way::Verbs, Some(verbs)) => Some(verbs.register(&local, None, RemoteAccess::Read).ok()?),
            _ => None,
        };
        let length = u64::try_from(bytes).ok()?.min(region.bytes);
        let piece = Piece {
            local: local.slice(0, usize::try_from(length).ok()?).ok()?.into(),
            remote: region.slice(0, length).ok()?,
            direction: Direction::Read,
        };
        let asked = Instant::now();
        let moved = live.data.submit(vec![piece], PROBE_PATIENCE).ok()?.wait();
        let took = asked.elapsed();
        drop(registered);
        if moved.is_err() {
            link.counts.failed.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some((lookup, took))
    }
}
