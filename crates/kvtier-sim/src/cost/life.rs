use std::collections::{BTreeMap, VecDeque};

use kvtier_core::Time;
use kvtier_core::cost::{
    BackendId, BackendProfile, Candidate, ComputeProfile, CostModel, Decision, FetchId, FetchPlan, GateSettings,
    GpuProfile, ModelProfile, Patience, Question,
};

use super::events::{Event, Events, Happening};
use super::gpus::Gpus;
use super::plan::CostPlan;
use super::requests::{Arrival, END_S, GPU, KV_BYTES_PER_TOKEN};
use super::tally::{LifeReport, is_harm};
use super::waiting::Waiting;
use super::weather::{Luck, Weather};
use super::world::CostWorld;
use crate::trace::TOKENS_PER_ID;

/// When a fetch that fails is known to have failed, seconds after it began.
const FAILURE_KNOWN_S: f64 = 2.0;

/// After a step of the world decisions are watched for this long, seconds.
const SETTLE_WATCH_S: f64 = 60.0;

/// Weight of the newest bandwidth in the plan `ewma`.
const EWMA_WEIGHT: f64 = 0.2;

/// Probes have names of their own, far from those of requests.
const PROBE_NAME: u64 = 1 << 40;

/// A way through the link.
#[derive(Clone, Copy, Debug)]
struct Passage {
    first_byte_s: f64,
    end_s: f64,
    slowed: f64,
}

struct Life<'a> {
    weather: Weather<'a>,
    world: &'a CostWorld,
    plan: CostPlan,
    link_free_s: f64,
    /// Ends of the passages under way, in order.
    under_way: VecDeque<f64>,
    /// Requests whose outcome is not known yet.
    waiting: BTreeMap<u64, Waiting>,
    gpus: Gpus,
    model: CostModel,
    backend: BackendId,
    events: Events,
    probes: u64,
    ewma_bytes_per_s: Option<f64>,
    ewma_lookup_s: f64,
    report: LifeReport,
}

fn time(seconds: f64) -> Time {
    Time((seconds * 1e9) as u64)
}

fn seconds(time: Time) -> f64 {
    time.0 as f64 * 1e-9
}

/// What the settings would say of this deployment: a 70B model on four H100.
fn profile() -> ComputeProfile {
    ComputeProfile {
        model: ModelProfile::preset("llama-3.3-70b").expect("a preset"),
        gpu: GpuProfile::preset("h100").expect("a preset"),
        gpus: 4,
        utilization: 0.5,
        overhead_s: 0.01,
    }
}

/// Lets `arrivals` pass through a world as `plan` says.
pub(super) fn live(world: &CostWorld, seed: u64, plan: CostPlan, arrivals: &[Arrival]) -> LifeReport {
    let mut model = CostModel::new(profile().coefficients());
    let backend = model
        .add_backend(BackendProfile::default(), GateSettings::default())
        .expect("defaults hold");
    let mut life = Life {
        weather: Weather::new(world, seed),
        world,
        plan,
        link_free_s: 0.0,
        under_way: VecDeque::new(),
        waiting: BTreeMap::new(),
        gpus: Gpus::new(world.servers),
        model,
        backend,
        events: Events::default(),
        probes: 0,
        ewma_bytes_per_s: None,
        ewma_lookup_s: 0.0,
        report: LifeReport::default(),
    };
    for (index, arrival) in arrivals.iter().enumerate() {
        if world.contended || arrival.is_worth_a_thought() {
            life.advance(arrival.at_s);
            life.request(index as u64, arrival);
        }
    }
    life.advance(f64::INFINITY);
    life.close()
}

impl Life<'_> {
    /// Tells the model what has happened until `until_s`, and sends the probes that it asks for.
    fn advance(&mut self, until_s: f64) {
        while self.under_way.front().is_some_and(|end_s| *end_s <= until_s) {
            self.under_way.pop_front();
        }
        let until = time(until_s);
        loop {
            let event_at = self.events.next_at().filter(|at| *at <= until);
            let probe_at = self.plan.is_gated().then(|| self.model.poll_timeout()).flatten();
            let probe_at = probe_at.filter(|due| *due <= until.min(time(END_S)));
            match (event_at, probe_at) {
                (Some(at), due) if due.is_none_or(|due| at <= due) => {
                    if let Some(event) = self.events.pop() {
                        self.happen(event);
                    }
                }
                (_, Some(due)) => self.probe(due),
                _ => return,
            }
        }
    }

    fn push(&mut self, at_s: f64, what: Happening) {
        self.events.push(time(at_s), what);
    }

    fn happen(&mut self, event: Event) {
        let now = event.at;
        let now_s = seconds(now);
        match event.what {
            Happening::Averaged { lookup_s, bytes_per_s } => {
                let known = *self.ewma_bytes_per_s.get_or_insert(bytes_per_s);
                self.ewma_bytes_per_s = Some(known + EWMA_WEIGHT * (bytes_per_s - known));
                self.ewma_lookup_s += EWMA_WEIGHT * (lookup_s - self.ewma_lookup_s);
            }
            Happening::FirstByte { fetch, lookup_s } => {
                self.model.observe_lookup(now, FetchId(fetch), lookup_s);
            }
            Happening::Part { fetch, bytes, took_s } => {
                self.model.observe_progress(now, FetchId(fetch), bytes, took_s);
            }
            Happening::Fetched { fetch, actual_s } => {
                self.model.observe_fetched(now, FetchId(fetch), actual_s);
                self.settle(fetch, now_s, true);
            }
            Happening::Failed { fetch } => {
                self.model.observe_failed(now, FetchId(fetch), FAILURE_KNOWN_S);
                self.settle(fetch, now_s, false);
            }
            Happening::Overdue { fetch } => {
                if let Some(waiting) = self.waiting.get(&fetch).filter(|waiting| waiting.fetching) {
                    let recompute_s = GPU.seconds(waiting.arrival.matched_tokens, 0);
                    match self.model.judge(now, FetchId(fetch), recompute_s) {
                        Patience::Wait { until } => self.push(seconds(until), event.what),
                        Patience::GiveUp => self.settle(fetch, now_s, false),
                    }
                }
            }
            Happening::ServerFree => self.dispatch(now_s),
            Happening::Answered { request } => {
                if let Some(whole_s) = self.waiting.get(&request).map(|waiting| waiting.whole_s) {
                    self.gpus.make_ready(request, whole_s);
                }
                self.dispatch(now_s);
            }
            Happening::Probed {
                lookup_s,
                bytes,
                took_s,
            } => {
                self.model.observe_probed(now, self.backend, lookup_s, bytes, took_s);
            }
            Happening::ProbeFailed => self.model.observe_probe_failed(now, self.backend, FAILURE_KNOWN_S),
        }
    }

    fn probe(&mut self, due: Time) {
        // A probe that is due since before the last event is sent after it.
        while let Some((_, probe)) = self.model.poll_probe(due) {
            let at_s = seconds(due);
            let luck = self.weather.luck(PROBE_NAME + self.probes, at_s);
            self.probes += 1;
            if luck.fails {
                self.push(at_s + FAILURE_KNOWN_S, Happening::ProbeFailed);
                continue;
            }
            let passage = self.passage(at_s, luck, probe.bytes);
            self.take(passage);
            self.push(
                passage.end_s,
                Happening::Probed {
                    lookup_s: luck.latency_s,
                    bytes: probe.bytes,
                    took_s: passage.end_s - passage.first_byte_s,
                },
            );
        }
    }

    /// How `bytes` asked for at `at_s` would pass.
    fn passage(&mut self, at_s: f64, luck: Luck, bytes: u64) -> Passage {
        let first_byte_s = at_s.max(self.link_free_s) + luck.latency_s;
        let in_flight = self.under_way.len() as f64 + 1.0;
        let slowed = self
            .world
            .slowed_by_fetches
            .map_or(1.0, |fetches| 1.0 + in_flight / fetches);
        Passage {
            first_byte_s,
            end_s: self.weather.arrives_s(first_byte_s, bytes as f64, slowed),
            slowed,
        }
    }

    fn take(&mut self, passage: Passage) {
        self.link_free_s = passage.end_s;
        self.under_way.push_back(passage.end_s);
    }

    fn request(&mut self, name: u64, arrival: &Arrival) {
        let at_s = arrival.at_s;
        let luck = self.weather.luck(name, at_s);
        let wait_s = if self.world.contended {
            self.gpus.wait_s(at_s)
        } else {
            0.0
        };
        let (plan, decision) = self.decide(arrival, luck, wait_s);
        let mut waiting = Waiting {
            arrival: *arrival,
            plan,
            arrives_at_s: None,
            fetching: plan == FetchPlan::Fetch,
            // Where GPUs are idle, a request's time is that of its matched part: as if the rest were another prefill.
            whole_s: if self.world.contended {
                GPU.seconds(arrival.prompt_tokens, 0)
            } else {
                GPU.seconds(arrival.matched_tokens, 0) + arrival.rest_s()
            },
        };
        let ready = match plan {
            FetchPlan::Recompute => true,
            FetchPlan::Split { compute_front_tokens } => {
                let bytes = u64::from(arrival.matched_tokens - compute_front_tokens) * KV_BYTES_PER_TOKEN;
                waiting.arrives_at_s = self.fetch(name, at_s, luck, bytes, decision.as_ref());
                true
            }
            FetchPlan::Fetch => {
                let bytes = u64::from(arrival.matched_tokens) * KV_BYTES_PER_TOKEN;
                waiting.arrives_at_s = self.fetch(name, at_s, luck, bytes, decision.as_ref());
                false
            }
        };
        self.learn(arrival, plan);
        self.waiting.insert(name, waiting);
        if self.world.contended {
            // Who asks for what is not there waits for that answer too.
            let asked_in_vain = arrival.matched_tokens == 0 && self.asks_in_vain(at_s);
            let nominal_s = if plan == FetchPlan::Fetch {
                arrival.rest_s()
            } else {
                waiting.whole_s
            };
            self.gpus.join(name, nominal_s, ready && !asked_in_vain);
            if asked_in_vain {
                self.push(at_s + luck.latency_s, Happening::Answered { request: name });
            }
            self.dispatch(at_s);
        } else if ready {
            self.waiting.remove(&name);
            self.count(name, &waiting, waiting.computes_until_s(at_s));
        }
    }

    /// A fetch has ended, or nobody waits for it any longer.
    fn settle(&mut self, name: u64, now_s: f64, arrived: bool) {
        let Some(waiting) = self.waiting.get_mut(&name) else {
            return;
        };
        if !std::mem::take(&mut waiting.fetching) {
            return;
        }
        if !arrived {
            // From here on it is a request like any that recomputes.
            waiting.plan = FetchPlan::Recompute;
        }
        let waiting = *waiting;
        if self.world.contended {
            let nominal_s = if arrived {
                waiting.arrival.rest_s()
            } else {
                waiting.whole_s
            };
            self.gpus.make_ready(name, nominal_s);
            self.dispatch(now_s);
        } else {
            self.waiting.remove(&name);
            self.count(name, &waiting, waiting.computes_until_s(now_s));
        }
    }

    /// Starts whoever can start.
    fn dispatch(&mut self, now_s: f64) {
        while let Some(name) = self.gpus.next(now_s) {
            let Some(waiting) = self.waiting.remove(&name) else {
                return;
            };
            // Whole nanoseconds, so that the GPU is free when its event says so.
            let until_s = seconds(time(waiting.computes_until_s(now_s)));
            self.gpus.start(name, until_s);
            self.push(until_s, Happening::ServerFree);
            self.count(name, &waiting, until_s);
        }
    }

    /// Whether the backend is asked for what it does not have.
    fn asks_in_vain(&self, at_s: f64) -> bool {
        match self.plan {
            CostPlan::AlwaysFetch | CostPlan::Ewma => true,
            CostPlan::GatedBinary | CostPlan::GatedSplit => {
                self.model.gate(self.backend, time(at_s)).is_some_and(|gate| gate.open)
            }
            CostPlan::Recompute | CostPlan::OracleBinary | CostPlan::OracleSplit => false,
        }
    }

    /// The plan's word; a gated one comes with its reasons.
    fn decide(&mut self, arrival: &Arrival, luck: Luck, wait_s: f64) -> (FetchPlan, Option<Decision>) {
        let matched = arrival.matched_tokens;
        let at_s = arrival.at_s;
        if matched == 0 && !self.plan.is_gated() {
            return (FetchPlan::Recompute, None);
        }
        let recompute_s = wait_s + GPU.seconds(matched, 0);
        let bytes = u64::from(matched) * KV_BYTES_PER_TOKEN;
        let plan = match self.plan {
            CostPlan::Recompute => FetchPlan::Recompute,
            CostPlan::AlwaysFetch => FetchPlan::Fetch,
            CostPlan::Ewma => {
                let queue_s = (self.link_free_s - at_s).max(0.0);
                let fetch_s = |bytes_per_s: f64| self.ewma_lookup_s + queue_s + bytes as f64 / bytes_per_s;
                if self
                    .ewma_bytes_per_s
                    .is_none_or(|bytes_per_s| fetch_s(bytes_per_s).max(wait_s) < recompute_s)
                {
                    FetchPlan::Fetch
                } else {
                    FetchPlan::Recompute
                }
            }
            CostPlan::OracleBinary => {
                let passage = self.passage(at_s, luck, bytes);
                if !luck.fails && (passage.end_s - at_s).max(wait_s) < recompute_s {
                    FetchPlan::Fetch
                } else {
                    FetchPlan::Recompute
                }
            }
            CostPlan::OracleSplit => self.oracle_split(arrival, luck, wait_s),
            CostPlan::GatedBinary | CostPlan::GatedSplit => {
                let question = Question {
                    prompt_tokens: arrival.prompt_tokens,
                    local_prefix_tokens: 0,
                    block_tokens: TOKENS_PER_ID,
                    kv_bytes_per_token: KV_BYTES_PER_TOKEN,
                    queue_wait_s: wait_s,
                    can_split: self.plan == CostPlan::GatedSplit,
                };
                let candidate = Candidate {
                    backend: self.backend,
                    matched_tokens: matched,
                };
                let decision = self.model.decide(time(at_s), &question, &[candidate]);
                self.watch(arrival, luck, wait_s, &decision);
                return (decision.plan, Some(decision));
            }
        };
        (plan, None)
    }

    /// The front that ends with the fetch of the rest, by halving.
    fn oracle_split(&mut self, arrival: &Arrival, luck: Luck, wait_s: f64) -> FetchPlan {
        if luck.fails {
            return FetchPlan::Recompute;
        }
        let (at_s, matched) = (arrival.at_s, arrival.matched_tokens);
        let mut seconds = |front: u32| {
            let compute_s = wait_s + GPU.seconds(front, 0);
            if front == matched {
                return (compute_s, 0.0);
            }
            let bytes = u64::from(matched - front) * KV_BYTES_PER_TOKEN;
            (compute_s, self.passage(at_s, luck, bytes).end_s - at_s)
        };
        let blocks = matched.div_ceil(TOKENS_PER_ID);
        let (mut low, mut high) = (0, blocks);
        while high - low > 1 {
            let middle = (low + high) / 2;
            let (compute_s, fetch_s) = seconds((middle * TOKENS_PER_ID).min(matched));
            if compute_s < fetch_s {
                low = middle
            } else {
                high = middle
            }
        }
        let best = [0, low, high, blocks]
            .map(|block| (block * TOKENS_PER_ID).min(matched))
            .into_iter()
            .min_by(|left, right| {
                let (left, right) = (seconds(*left), seconds(*right));
                left.0.max(left.1).total_cmp(&right.0.max(right.1))
            });
        match best {
            Some(0) => FetchPlan::Fetch,
            Some(front) if front < matched => FetchPlan::Split {
                compute_front_tokens: front,
            },
            _ => FetchPlan::Recompute,
        }
    }

    /// Sends a fetch down the link; when it will have arrived, nothing where it fails.
    fn fetch(&mut self, name: u64, at_s: f64, luck: Luck, bytes: u64, decision: Option<&Decision>) -> Option<f64> {
        self.report.fetches += 1;
        if let Some(decision) = decision {
            self.model.begin_fetch(time(at_s), FetchId(name), decision);
            if decision.plan == FetchPlan::Fetch {
                self.push(at_s + decision.soft_deadline_s, Happening::Overdue { fetch: name });
            }
        }
        if luck.fails {
            self.report.failed += 1;
            self.push(at_s + FAILURE_KNOWN_S, Happening::Failed { fetch: name });
            return None;
        }
        let passage = self.passage(at_s, luck, bytes);
        self.take(passage);
        let actual_s = passage.end_s - at_s;
        if self.plan == CostPlan::Ewma {
            self.push(
                passage.end_s,
                Happening::Averaged {
                    lookup_s: luck.latency_s,
                    bytes_per_s: bytes as f64 / (passage.end_s - passage.first_byte_s),
                },
            );
        }
        if self.plan.is_gated() {
            self.follow(name, bytes, passage, luck, actual_s);
        } else {
            self.push(passage.end_s, Happening::Fetched { fetch: name, actual_s });
        }
        if let Some(decision) = decision {
            let forecast = &decision.forecast;
            self.report.forecasts += 1;
            for (within, quantile_s) in
                self.report
                    .within
                    .iter_mut()
                    .zip([forecast.p50_s, forecast.p90_s, forecast.p99_s])
            {
                *within += u64::from(actual_s <= quantile_s);
            }
        }
        Some(passage.end_s)
    }

    /// What the model will see of a passage: its first byte, each block, its end.
    fn follow(&mut self, name: u64, bytes: u64, passage: Passage, luck: Luck, actual_s: f64) {
        self.push(
            passage.first_byte_s,
            Happening::FirstByte {
                fetch: name,
                lookup_s: luck.latency_s,
            },
        );
        let block = u64::from(TOKENS_PER_ID) * KV_BYTES_PER_TOKEN;
        let (mut at_s, mut left) = (passage.first_byte_s, bytes);
        while left > 0 {
            let part = left.min(block);
            let end_s = self.weather.arrives_s(at_s, part as f64, passage.slowed);
            self.push(
                end_s,
                Happening::Part {
                    fetch: name,
                    bytes: part,
                    took_s: end_s - at_s,
                },
            );
            left -= part;
            at_s = end_s;
        }
        self.push(at_s.max(passage.end_s), Happening::Fetched { fetch: name, actual_s });
    }

    /// After a step of the world: whether the decision was the one that a clairvoyant had made in its place.
    fn watch(&mut self, arrival: &Arrival, luck: Luck, wait_s: f64, decision: &Decision) {
        let Some(step) = &self.world.step else { return };
        let since_s = arrival.at_s - step.at_s;
        if !(0.0..SETTLE_WATCH_S).contains(&since_s) || luck.fails {
            return;
        }
        let bytes = u64::from(arrival.matched_tokens) * KV_BYTES_PER_TOKEN;
        let fetch_s = (self.passage(arrival.at_s, luck, bytes).end_s - arrival.at_s).max(wait_s);
        let recompute_s = wait_s + GPU.seconds(arrival.matched_tokens, 0);
        let settle_s = self.report.settle_s.get_or_insert(0.0);
        let (chosen_s, best_s) = match decision.plan {
            FetchPlan::Recompute => (recompute_s, fetch_s),
            FetchPlan::Fetch => (fetch_s, recompute_s),
            FetchPlan::Split { .. } => return,
        };
        if is_harm(chosen_s, best_s) {
            *settle_s = since_s;
        }
    }

    /// The engine reports what it computed.
    fn learn(&mut self, arrival: &Arrival, plan: FetchPlan) {
        let computed = match plan {
            FetchPlan::Recompute => arrival.matched_tokens,
            FetchPlan::Fetch => 0,
            FetchPlan::Split { compute_front_tokens } => compute_front_tokens,
        };
        self.model.observe_recompute(computed, 0, GPU.seconds(computed, 0));
        let rest = arrival.prompt_tokens.saturating_sub(arrival.matched_tokens);
        let before = arrival.matched_tokens;
        self.model.observe_recompute(rest, before, GPU.seconds(rest, before));
    }

    /// `waiting` has its first token at `until_s`.
    fn count(&mut self, name: u64, waiting: &Waiting, until_s: f64) {
        let ttft_s = until_s - waiting.arrival.at_s;
        self.report.requests += 1;
        self.report.ttft_s += ttft_s;
        if self.world.contended {
            self.report.seconds += ttft_s;
            self.report.times_s.insert(name, ttft_s);
        } else {
            // Of the matched part: what is computed after it is the same for all.
            let took_s = ttft_s - waiting.arrival.rest_s();
            self.report.seconds += took_s;
            let recompute_s = GPU.seconds(waiting.arrival.matched_tokens, 0);
            self.report.harmed += u64::from(is_harm(took_s, recompute_s));
        }
    }

    fn close(mut self) -> LifeReport {
        self.report.capacity_bytes = self.weather.capacity_bytes(END_S);
        if let Some(gate) = self.model.gate(self.backend, time(END_S)) {
            self.report.flips = gate.flips;
            self.report.probe_bytes = gate.probe_bytes;
        }
        self.report
    }
}
