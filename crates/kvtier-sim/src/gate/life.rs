mod fetching;

use std::collections::BTreeMap;

use kvtier_core::cost::{CostModel, FetchId, GateReport, GateSettings};
use kvtier_core::{BlockHash, Event, Fetched, LeaseId, Reserved, Time};

use super::GateError;
use super::flight::{Flight, Kind, Outcome};
use super::hardware::GateHardware;
use super::link::{Lanes, Link};
use super::local::{Local, LocalSetup, PutBlock, Told, lay_in_host};
use super::profile::GateProfile;
use super::prompt::Prompt;
use super::remote::Remote;
use crate::cost::Gpus;

/// When a fetch that fails is known to have failed, seconds after it began.
const FAILURE_KNOWN_S: f64 = 2.0;

/// The cost model hears of a fetch as often as this many tokens have arrived, or a block where that is more.
const PART_TOKENS: u32 = 512;

pub(super) fn time(seconds: f64) -> Time {
    Time((seconds * 1e9) as u64)
}

pub(super) fn seconds(time: Time) -> f64 {
    time.0 as f64 * 1e-9
}

/// What is switched on.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Setup {
    pub(super) local: Option<LocalSetup>,
    /// Places of remotes in the hardware.
    pub(super) remotes: Vec<usize>,
}

/// What a link carried.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Carried {
    pub(super) link: String,
    pub(super) bytes: u64,
    pub(super) busy_s: f64,
}

/// What came of all requests.
#[derive(Clone, Debug)]
pub(super) struct LifeReport {
    pub(super) outcomes: Vec<Outcome>,
    pub(super) links: Vec<Carried>,
    /// Payload written to NVMe, moved between segments included.
    pub(super) nvme_written_bytes: u64,
    /// Of each remote, by its place in the hardware.
    pub(super) gates: Vec<(usize, GateReport)>,
    /// Bytes taken out of each of them.
    pub(super) fetched_bytes: Vec<(usize, u64)>,
    /// Bytes that each of them holds in the end.
    pub(super) held_bytes: Vec<(usize, u64)>,
}

enum Happening {
    Arrives {
        request: usize,
    },
    Device {
        event: Event,
    },
    /// The blocks of the node's own tiers are with the GPU.
    Loaded {
        request: usize,
    },
    /// A remote said that it has nothing.
    Answered {
        request: usize,
    },
    FirstByte {
        request: usize,
        lookup_s: f64,
    },
    Part {
        request: usize,
        bytes: u64,
        took_s: f64,
    },
    Fetched {
        request: usize,
        actual_s: f64,
    },
    Failed {
        request: usize,
    },
    Overdue {
        request: usize,
    },
    Prefilled {
        request: usize,
    },
    /// A remote has all of the prompt.
    Stored {
        request: usize,
        remote: usize,
    },
    Probed {
        remote: usize,
        lookup_s: f64,
        bytes: u64,
        took_s: f64,
    },
    ProbeFailed {
        remote: usize,
    },
}

struct Life<'a> {
    prompts: &'a [Prompt],
    profile: &'a GateProfile,
    can_split: bool,
    block_tokens: u32,
    block_bytes: u64,
    local: Option<Local>,
    remotes: Vec<Remote>,
    model: CostModel,
    gpus: Option<Gpus>,
    load: Lanes,
    store: Lanes,
    events: BTreeMap<(Time, u64), Happening>,
    announced: u64,
    now: Time,
    told: Vec<Told>,
    flights: BTreeMap<usize, Flight>,
    /// What was asked to be put and is not granted yet.
    puts: BTreeMap<usize, Vec<PutBlock>>,
    outcomes: Vec<Option<Outcome>>,
    left: usize,
    last_arrival: Time,
}

/// Lets the prompts pass through a node on which so much is switched on.
pub(super) fn live(
    prompts: &[Prompt],
    block_tokens: u32,
    profile: &GateProfile,
    hardware: &GateHardware,
    setup: &Setup,
    seed: u64,
    progress: &mut dyn FnMut(),
) -> Result<LifeReport, GateError> {
    let block_bytes = u64::from(block_tokens) * profile.kv_bytes_per_token;
    let mut model = CostModel::new(profile.coefficients);
    let mut remotes = Vec::new();
    for place in &setup.remotes {
        let remote = &hardware.remote[*place];
        let backend = model
            .add_backend(Remote::profile(remote), GateSettings::default())
            .map_err(|error| GateError(error.to_string()))?;
        remotes.push(Remote::new(*place, remote, backend, seed, block_bytes));
    }
    let local = setup
        .local
        .map(|local| Local::new(hardware, local, block_bytes))
        .transpose()?;
    let link = Link::new(hardware.host.gb_per_s, hardware.host.latency_ms);
    let lanes = || Lanes::new(hardware.gpu_servers, &link);
    let mut life = Life {
        prompts,
        profile,
        can_split: hardware.engine_can_split,
        block_tokens,
        block_bytes,
        local,
        remotes,
        model,
        gpus: (hardware.gpu_servers > 0).then(|| Gpus::new(hardware.gpu_servers)),
        load: lanes(),
        store: lanes(),
        events: BTreeMap::new(),
        announced: 0,
        now: Time::ZERO,
        told: Vec::new(),
        flights: BTreeMap::new(),
        puts: BTreeMap::new(),
        outcomes: vec![None; prompts.len()],
        left: prompts.len(),
        last_arrival: prompts.last().map_or(Time::ZERO, |prompt| time(prompt.at_s)),
    };
    for (request, prompt) in prompts.iter().enumerate() {
        life.push(time(prompt.at_s), Happening::Arrives { request });
    }
    while life.left > 0 {
        let before = life.left;
        life.step();
        (life.left..before).for_each(|_| progress());
    }
    Ok(life.close())
}

impl Life<'_> {
    fn push(&mut self, at: Time, what: Happening) {
        self.announced += 1;
        // Devices answer in the nanosecond in which they were asked at the earliest.
        self.events.insert((at.max(self.now), self.announced), what);
    }

    /// The next thing happens: of several at one time first what was announced, then timers, then probes.
    fn step(&mut self) {
        let event_at = self.events.first_key_value().map(|((at, _), _)| *at);
        let timer_at = self.local.as_ref().and_then(Local::poll_timeout);
        let probe_at = self.model.poll_timeout().filter(|due| *due <= self.last_arrival);
        let next = [event_at, timer_at, probe_at].into_iter().flatten().min();
        // Whoever is not answered waits for an event, or for the manager's deadline.
        let next = next.expect("a request that is not answered has something to wait for");
        self.now = self.now.max(next);
        if event_at.is_some_and(|at| at <= next) {
            if let Some((_, what)) = self.events.pop_first() {
                self.happen(what);
            }
        } else if timer_at.is_some_and(|at| at <= next) {
            if let Some(local) = &mut self.local {
                local.handle_timeout(self.now, &mut self.told);
            }
        } else {
            self.probe();
        }
        self.hear();
    }

    /// Takes on what the manager has said.
    fn hear(&mut self) {
        while !self.told.is_empty() {
            for told in std::mem::take(&mut self.told) {
                match told {
                    Told::Fetched { request, results } => self.looked_up(request, &results),
                    Told::Reserved { request, results } => self.granted(request, &results),
                    Told::Device { at, event } => self.push(at, Happening::Device { event }),
                }
            }
        }
    }

    fn happen(&mut self, what: Happening) {
        let now = self.now;
        match what {
            Happening::Arrives { request } => self.arrive(request),
            Happening::Device { event } => {
                if let Some(local) = &mut self.local {
                    local.handle(event, now, &mut self.told);
                }
            }
            Happening::Loaded { request } => {
                let leases = self.flight(request, |flight| {
                    flight.loading = false;
                    std::mem::take(&mut flight.leases)
                });
                self.release(&leases.unwrap_or_default());
                self.try_start(request);
            }
            Happening::Answered { request } => {
                self.flight(request, |flight| flight.asks_in_vain = false);
                self.try_start(request);
            }
            Happening::FirstByte { request, lookup_s } => {
                self.model.observe_lookup(now, FetchId(request as u64), lookup_s);
            }
            Happening::Part { request, bytes, took_s } => {
                self.model.observe_progress(now, FetchId(request as u64), bytes, took_s);
            }
            Happening::Fetched { request, actual_s } => {
                self.model.observe_fetched(now, FetchId(request as u64), actual_s);
                self.settle(request, true);
            }
            Happening::Failed { request } => {
                self.model.observe_failed(now, FetchId(request as u64), FAILURE_KNOWN_S);
                self.settle(request, false);
            }
            Happening::Overdue { request } => self.overdue(request),
            Happening::Prefilled { request } => self.prefilled(request),
            Happening::Stored { request, remote } => self.remotes[remote].stored(&self.prompts[request].ids),
            Happening::Probed {
                remote,
                lookup_s,
                bytes,
                took_s,
            } => {
                let backend = self.remotes[remote].backend;
                self.model.observe_probed(now, backend, lookup_s, bytes, took_s);
            }
            Happening::ProbeFailed { remote } => {
                let backend = self.remotes[remote].backend;
                self.model.observe_probe_failed(now, backend, FAILURE_KNOWN_S);
            }
        }
    }

    fn flight<T>(&mut self, request: usize, change: impl FnOnce(&mut Flight) -> T) -> Option<T> {
        self.flights.get_mut(&request).map(change)
    }

    fn release(&mut self, leases: &[LeaseId]) {
        if let Some(local) = self.local.as_mut().filter(|_| !leases.is_empty()) {
            local.release(leases, self.now, &mut self.told);
        }
    }

    fn whole_s(&self, request: usize) -> f64 {
        self.profile.coefficients.seconds(self.prompts[request].tokens, 0)
    }

    fn arrive(&mut self, request: usize) {
        let prompt = &self.prompts[request];
        let whole_s = self.whole_s(request);
        let wait_s = self.gpus.as_ref().map_or(0.0, |gpus| gpus.wait_s(seconds(self.now)));
        self.flights.insert(request, Flight::new(wait_s));
        if let Some(gpus) = &mut self.gpus {
            gpus.join(request as u64, whole_s, false);
        }
        match &mut self.local {
            // An engine waits for its own node no longer than computing everything would take.
            Some(local) => {
                let deadline = time(seconds(self.now) + wait_s + whole_s);
                local.fetch(request, &prompt.hashes, (self.now, deadline), &mut self.told);
            }
            None => self.looked_up(request, &[]),
        }
    }

    /// The node's own tiers have answered.
    fn looked_up(&mut self, request: usize, results: &[Fetched]) {
        let prompt = &self.prompts[request];
        let mut leases = Vec::new();
        let (mut host_tokens, mut nvme_tokens) = (0, 0);
        for (place, outcome) in results.iter().enumerate() {
            let Fetched::Leased { lease, tier, .. } = outcome else {
                break;
            };
            leases.push(*lease);
            let tokens = prompt.tokens_at(place, self.block_tokens);
            if lay_in_host(*tier) {
                host_tokens += tokens;
            } else {
                nvme_tokens += tokens;
            }
        }
        let blocks = leases.len();
        let bytes = blocks as u64 * self.block_bytes;
        let Some(wait_s) = self.flight(request, |flight| {
            flight.answered = true;
            flight.loading = blocks > 0;
            flight.leases = leases;
            flight.local_blocks = blocks;
            flight.host_tokens = host_tokens;
            flight.nvme_tokens = nvme_tokens;
            flight.wait_s
        }) else {
            return;
        };
        if blocks > 0 {
            let end_s = self.load.pass(seconds(self.now), bytes);
            self.push(time(end_s), Happening::Loaded { request });
        }
        self.ask_remotes(request, host_tokens + nvme_tokens, wait_s);
        self.try_start(request);
    }

    /// Starts the request, or says to the queue for GPUs that it can, once nothing is missing.
    fn try_start(&mut self, request: usize) {
        let Some(flight) = self.flights.get(&request).filter(|flight| flight.is_ready()) else {
            return;
        };
        let now_s = seconds(self.now);
        let nominal_s = flight.prefill_s(&self.profile.coefficients, self.prompts[request].tokens, now_s);
        match &mut self.gpus {
            None => self.start(request),
            Some(gpus) => {
                gpus.make_ready(request as u64, nominal_s);
                self.dispatch();
            }
        }
    }

    /// Starts whoever can start.
    fn dispatch(&mut self) {
        let now_s = seconds(self.now);
        while let Some(request) = self.gpus.as_ref().and_then(|gpus| gpus.next(now_s)) {
            self.start(request as usize);
        }
    }

    fn start(&mut self, request: usize) {
        let now_s = seconds(self.now);
        let tokens = self.prompts[request].tokens;
        let coefficients = &self.profile.coefficients;
        let Some(prefill_s) = self.flight(request, |flight| {
            flight.started = true;
            flight.prefill_s = flight.prefill_s(coefficients, tokens, now_s);
            flight.prefill_s
        }) else {
            return;
        };
        let until = time(now_s + prefill_s);
        if let Some(gpus) = &mut self.gpus {
            // Whole nanoseconds, so that the GPU is free when its event says so.
            gpus.start(request as u64, seconds(until));
        }
        self.push(until, Happening::Prefilled { request });
    }

    fn prefilled(&mut self, request: usize) {
        let Some(flight) = self.flights.remove(&request) else {
            return;
        };
        let prompt = &self.prompts[request];
        if let Some((tokens, before)) = flight.computed(prompt.tokens) {
            self.model.observe_recompute(tokens, before, flight.prefill_s);
        }
        let mut outcome = flight.outcome(prompt.tokens);
        outcome.ttft_s = (seconds(self.now) - prompt.at_s).max(0.0);
        self.outcomes[request] = Some(outcome);
        self.left -= 1;
        self.put(request, flight.local_blocks);
        self.store_remotely(request);
        if self.gpus.is_some() {
            self.dispatch();
        }
    }

    /// The engine puts what the node did not have.
    fn put(&mut self, request: usize, from: usize) {
        let prompt = &self.prompts[request];
        let Some(local) = self.local.as_mut().filter(|_| from < prompt.hashes.len()) else {
            return;
        };
        let hashes = &prompt.hashes[from..];
        let blocks = (from..prompt.hashes.len())
            .map(|place| PutBlock {
                hash: prompt.hashes[place],
                parent: prompt.parent_at(place),
                tokens: prompt.tokens_at(place, self.block_tokens),
            })
            .collect();
        self.puts.insert(request, blocks);
        let hashes: Vec<BlockHash> = hashes.to_vec();
        local.reserve(request, &hashes, self.now, &mut self.told);
    }

    fn granted(&mut self, request: usize, results: &[Reserved]) {
        let (Some(blocks), Some(local)) = (self.puts.remove(&request), self.local.as_mut()) else {
            return;
        };
        let published = local.seal(&blocks, results, self.now, &mut self.told);
        self.store.pass(seconds(self.now), published * self.block_bytes);
    }

    fn close(self) -> LifeReport {
        let carried = |link: &str, of: &Link| Carried {
            link: link.to_string(),
            bytes: of.bytes,
            busy_s: of.busy_s,
        };
        let mut links = Vec::new();
        let mut nvme_written_bytes = 0;
        if let Some(local) = &self.local {
            for (link, lanes) in [("host to GPU", &self.load), ("GPU to host", &self.store)] {
                links.push(Carried {
                    link: link.to_string(),
                    bytes: lanes.bytes(),
                    busy_s: lanes.busy_s(),
                });
            }
            let statistics = local.statistics();
            nvme_written_bytes = statistics.demoted_bytes + statistics.relocated_bytes;
            if statistics.nvme_capacity_bytes > 0 {
                links.push(carried("read from NVMe", &local.nvme_read));
                links.push(carried("written to NVMe", &local.nvme_write));
            }
        }
        let gate = |remote: &Remote| Some((remote.place, self.model.gate(remote.backend, self.now)?));
        let gates = self.remotes.iter().filter_map(gate).collect();
        for remote in &self.remotes {
            links.push(carried(&format!("from {}", remote.name()), &remote.down));
            links.push(carried(&format!("to {}", remote.name()), remote.up()));
        }
        let of = |remote: &Remote, bytes: u64| (remote.place, bytes);
        LifeReport {
            links,
            nvme_written_bytes,
            gates,
            fetched_bytes: self
                .remotes
                .iter()
                .map(|remote| of(remote, remote.down.bytes))
                .collect(),
            held_bytes: self
                .remotes
                .iter()
                .map(|remote| of(remote, remote.held_blocks() as u64 * self.block_bytes))
                .collect(),
            outcomes: self
                .outcomes
                .into_iter()
                .map(|outcome| outcome.unwrap_or(Outcome::of(Kind::Computed)))
                .collect(),
        }
    }
}
