//! A world: one manager, simulated devices, clients and an operator, all drawn from a seed, watched by the oracle.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use kvtier_core::{
    Action, BlockHash, ClientId, Event, Failure, Generation, Hints, Label, NamespaceId, OperationId, Realization,
    RealizationId, RecordLabel, Request, TierManager, Time, TrustDomain,
};

use crate::counts::{Fault, Tally, action_name};
use crate::memory::Memory;
use crate::oracle::{Check, Finding, Key, Ledger, found};
use crate::plan::Plan;
use crate::random::{Random, mix};

mod anchor;
mod clients;
mod crash;
mod devices;
mod ending;
mod lies;
mod operator;
mod purges;
mod reads;
mod writes;

use anchor::Image;
use clients::{Client, Wait};
use devices::{Fate, Flight};
use operator::Errand;
use purges::Job;

/// Something that will happen.
#[derive(Debug)]
enum Happening {
    /// A device gets to an operation.
    Execute(OperationId, Fate),
    /// An answer reaches the manager.
    Deliver(Event),
    /// A client does its next thing.
    Step(ClientId),
    /// The operator does its next thing.
    Operate,
    /// Somebody asks for a namespace right after its invalidation was acknowledged.
    Probe(u32),
    /// The operator purges a block, or its namespace.
    Purge(Key),
}

/// A namespace as this run of the manager knows it.
struct OpenSpace {
    domain: TrustDomain,
    id: NamespaceId,
    /// Highest generation whose invalidation was acknowledged. Holds for ever.
    acknowledged: Generation,
    /// Highest generation on record. Survives a crash, until an older image is put back.
    recorded: Generation,
    /// Highest generation that the anchor knows. Survives that too.
    anchored: Generation,
    /// When blocks of it were last deleted by their scope: who began to write before is refused.
    forgot_at: u64,
}

pub(crate) struct World {
    plan: Plan,
    random: Random,
    /// Draws labels, so that worlds without any are as they would be.
    label_random: Random,
    now: Time,
    /// Counts commands: orders what the oracle compares.
    step: u64,
    happened: u64,
    manager: TierManager,
    queue: BTreeMap<(Time, u64), Happening>,
    hbm: Memory,
    host: Memory,
    nvme: Memory,
    flights: BTreeMap<OperationId, Flight>,
    clients: BTreeMap<ClientId, Client>,
    waits: BTreeMap<OperationId, Wait>,
    errands: BTreeMap<OperationId, Errand>,
    ledger: Ledger,
    spaces: Vec<OpenSpace>,
    /// The last image taken.
    image: Option<Image>,
    /// Purges that were begun and not acknowledged. Survives a crash.
    journal: BTreeMap<u64, Job>,
    next_job: u64,
    realizations: Vec<RealizationId>,
    next_client: u64,
    next_holder: u64,
    faults_on: bool,
    draining: bool,
    /// The machine or the process dies when this many more things have happened.
    crash_after: Option<u64>,
    /// Namespaces of which a restart may have brought back more than their quota.
    over_quota: BTreeSet<u32>,
    /// Steps that clients may still take.
    steps_left: u64,
    /// Since the timer last moved the time on.
    spins: u32,
    /// Timer not before this.
    timer_after: Time,
    seen: BTreeSet<Key>,
    forgotten_before: u64,
    corrupt_answers: u64,
    pub(crate) tally: Tally,
    pub(crate) trace_hash: u64,
    pub(crate) actions: u64,
    /// The last things that happened, when somebody wants to read them.
    pub(crate) log: Option<VecDeque<String>>,
}

const LOG_LINES_MAX: usize = 80;
/// Actions that one call may lead to before it counts as an endless loop.
const ACTIONS_AT_ONCE_MAX: u32 = 20_000;
const SPINS_MAX: u32 = 300;

impl World {
    pub(crate) fn new(seed: u64, adjust: &dyn Fn(&mut Plan), logged: bool) -> Result<World, Finding> {
        let mut random = Random::new(seed);
        let mut plan = Plan::new(&mut random);
        plan.anchor(Random::new(mix(seed)));
        plan.label(Random::new(mix(mix(seed))));
        plan.eviction(Random::new(mix(!seed)));
        plan.hbm(Random::new(mix(!mix(seed))));
        adjust(&mut plan);
        let manager = new_manager(&plan)?;
        let mut world = World {
            random,
            label_random: Random::new(mix(!seed)),
            now: Time::ZERO,
            step: 0,
            happened: 0,
            manager,
            queue: BTreeMap::new(),
            hbm: Memory::new("hbm"),
            host: Memory::new("host"),
            nvme: Memory::new("nvme"),
            flights: BTreeMap::new(),
            clients: BTreeMap::new(),
            waits: BTreeMap::new(),
            errands: BTreeMap::new(),
            ledger: Ledger::default(),
            spaces: Vec::new(),
            image: None,
            journal: BTreeMap::new(),
            next_job: 0,
            realizations: Vec::new(),
            next_client: 1,
            next_holder: 1,
            faults_on: true,
            draining: false,
            crash_after: None,
            over_quota: BTreeSet::new(),
            steps_left: plan.steps,
            spins: 0,
            timer_after: Time::ZERO,
            seen: BTreeSet::new(),
            forgotten_before: 0,
            corrupt_answers: 0,
            tally: Tally::default(),
            trace_hash: mix(seed),
            actions: 0,
            log: logged.then(VecDeque::new),
            plan,
        };
        world.open_spaces()?;
        world.admit_auditors()?;
        for _ in 0..world.plan.clients {
            world.arrive()?;
        }
        world.after(0, Happening::Operate);
        Ok(world)
    }

    /// Opens the plan's namespaces and realizations in the first manager.
    fn open_spaces(&mut self) -> Check {
        for index in 0..self.plan.spaces.len() {
            let space = self.plan.spaces[index].clone();
            let domain = TrustDomain(space.domain);
            let opened = self.manager.open_namespace(domain, space.name);
            let Ok((id, generation)) = opened else {
                return found(format!(
                    "namespace {}/{} was refused: {opened:?}",
                    space.domain, space.name
                ));
            };
            if self.spaces.iter().any(|other| other.id == id) {
                return found(format!("two namespaces have the id {id:?}"));
            }
            if space.quota_bytes.is_some() {
                self.manager.set_quota(id, space.quota_bytes);
            }
            self.spaces.push(OpenSpace {
                domain,
                id,
                acknowledged: generation,
                recorded: generation,
                anchored: generation,
                forgot_at: 0,
            });
        }
        for index in 0..self.plan.realizations {
            let digest = Realization::digest(&[("rank", &index.to_string())]);
            match self.manager.open_realization(digest) {
                Ok(id) => self.realizations.push(id),
                Err(refusal) => return found(format!("realization {index} was refused: {refusal:?}")),
            }
        }
        self.pump()
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        let Some(log) = &mut self.log else { return };
        if log.len() == LOG_LINES_MAX {
            log.pop_front();
        }
        log.push_back(format!("{:>12} ns  {}", self.now.0, line()));
    }

    fn at(&mut self, time: Time, happening: Happening) {
        self.happened += 1;
        self.queue.insert((time, self.happened), happening);
    }

    fn after(&mut self, delay_ns: u64, happening: Happening) {
        self.at(self.now.after(Duration::from_nanos(delay_ns)), happening);
    }

    /// Strikes with this chance while faults are on.
    fn strikes(&mut self, permille: u64) -> bool {
        self.faults_on && permille > 0 && self.random.chance(permille)
    }

    fn new_holder(&mut self) -> u64 {
        self.next_holder += 1;
        self.next_holder
    }

    fn hashes(nodes: &[u32]) -> Vec<BlockHash> {
        nodes.iter().map(|node| Plan::hash(*node)).collect()
    }

    fn request<'a>(
        &self,
        client: ClientId,
        space: u32,
        realization: u32,
        hashes: &'a [BlockHash],
        deadline: Time,
    ) -> Request<'a> {
        Request {
            client,
            namespace: self.spaces[space as usize].id,
            realization: self.realizations[realization as usize],
            hashes,
            hints: Hints {
                device: self.clients.get(&client).is_some_and(|client| client.device),
                ..Hints::default()
            },
            deadline,
        }
    }

    /// What a put is part of: the number of a label.
    fn draw_label(&mut self) -> Option<u8> {
        let labels = u64::from(self.plan.labels);
        (labels > 0 && self.label_random.chance(700)).then(|| self.label_random.below(labels) as u8)
    }

    fn label(number: u8) -> Label {
        Label(u64::from(number) + 1)
    }

    /// The block that a record's label names, if it is one of this world.
    fn key_of(&self, label: &RecordLabel) -> Option<Key> {
        let space = self.spaces.iter().position(|space| space.id == label.namespace)? as u32;
        let realization = self.realizations.iter().position(|id| *id == label.realization)? as u32;
        let node = (0..self.plan.lengths.len() as u32).find(|node| Plan::hash(*node) == label.hash)?;
        Some(Key {
            space,
            realization,
            node,
        })
    }

    /// Lives through everything that happens until `end`.
    fn run_until(&mut self, end: Time) -> Check {
        while self.happen(end)? {}
        self.now = self.now.max(end);
        Ok(())
    }

    /// The next thing that happens until `end`; false where there is none.
    fn happen(&mut self, end: Time) -> Result<bool, Finding> {
        self.check_deadlines()?;
        let happening = self.queue.first_key_value().map(|((time, _), _)| *time);
        let timer = self.manager.poll_timeout().map(|due| due.max(self.timer_after));
        if timer.is_some_and(|timer| timer <= end && happening.is_none_or(|time| timer <= time)) {
            let timer = timer.unwrap_or(end);
            self.timer(timer)?;
            if self.log.is_some() {
                self.audit()?;
            }
            return Ok(true);
        }
        let Some((time, happening)) = self
            .queue
            .first_entry()
            .filter(|entry| entry.key().0 <= end)
            .map(|entry| {
                let (time, _) = *entry.key();
                (time, entry.remove())
            })
        else {
            return Ok(false);
        };
        if time > self.now {
            self.spins = 0;
        }
        self.now = self.now.max(time);
        match happening {
            Happening::Execute(operation, fate) => self.execute(operation, fate)?,
            Happening::Deliver(event) => self.deliver(event)?,
            Happening::Step(client) => self.client_step(client)?,
            Happening::Operate => self.operate()?,
            Happening::Probe(space) => self.probe(space)?,
            Happening::Purge(key) => self.purge(key)?,
        }
        if let Some(left) = self.crash_after.filter(|_| self.faults_on) {
            self.crash_after = left.checked_sub(1);
            if left == 0 {
                self.crash()?;
            }
        }
        if self.log.is_some() {
            // Somebody reads along: say it where it happens, not where it is noticed.
            self.audit()?;
        }
        Ok(true)
    }

    fn timer(&mut self, timer: Time) -> Check {
        if timer > self.now {
            self.spins = 0;
        }
        self.now = self.now.max(timer);
        self.spins += 1;
        if self.spins > SPINS_MAX {
            return found(format!(
                "the timer spins: still due at {:?} after {SPINS_MAX} timeouts handled at {:?}",
                self.manager.poll_timeout(),
                self.now
            ));
        }
        self.manager.handle_timeout(self.now);
        self.pump()?;
        // The next one may come late, as those of a busy machine do.
        let late = self.plan.rates.timer_late_ns;
        if self.faults_on && late > 0 && self.random.chance(100) {
            self.tally.fault(Fault::LateTimer);
            let late = self.random.below(late);
            self.timer_after = self.now.after(Duration::from_nanos(late));
        }
        Ok(())
    }

    /// No wait outlives its deadline, and the manager asks to be woken in time for it.
    fn check_deadlines(&self) -> Check {
        let Some((operation, deadline)) = self
            .waits
            .iter()
            .map(|(operation, wait)| (*operation, wait.deadline))
            .min_by_key(|(_, deadline)| *deadline)
        else {
            return Ok(());
        };
        let slack = Duration::from_nanos(self.plan.rates.timer_late_ns);
        if deadline.after(slack) < self.now {
            return found(format!(
                "{operation:?} still waits at {:?}, its deadline was {deadline:?}",
                self.now
            ));
        }
        if self.manager.poll_timeout().is_none_or(|due| due > deadline) {
            return found(format!(
                "{operation:?} waits until {deadline:?}, but the manager asks to be woken at {:?}",
                self.manager.poll_timeout()
            ));
        }
        Ok(())
    }

    /// Carries out what the manager asks for.
    fn pump(&mut self) -> Check {
        let mut at_once = 0;
        while let Some(action) = self.manager.poll_action() {
            at_once += 1;
            if at_once > ACTIONS_AT_ONCE_MAX {
                return found(format!(
                    "{ACTIONS_AT_ONCE_MAX} actions at once, the last {}",
                    action_name(&action)
                ));
            }
            self.actions += 1;
            self.fold(&action);
            self.tally.action(&action);
            self.note(|| format!("-> {action:?}"));
            match action {
                Action::FetchDone {
                    operation,
                    client,
                    results,
                } => self.fetch_done(operation, client, &results)?,
                Action::ReserveDone {
                    operation,
                    client,
                    results,
                } => self.reserve_done(operation, client, &results)?,
                Action::Invalidated {
                    operation,
                    namespace,
                    generation,
                } => self.invalidated(operation, namespace, generation)?,
                Action::Flushed {
                    operation, left_out, ..
                } => self.flushed(operation, left_out)?,
                Action::Destroyed {
                    operation,
                    namespace,
                    evidence,
                } => self.destroyed(operation, namespace, evidence)?,
                Action::Forgotten { operation, .. } => self.forgotten(operation)?,
                action => self.start(action)?,
            }
        }
        Ok(())
    }

    /// Adds an action to the trace's hash.
    fn fold(&mut self, action: &Action) {
        struct Folder(u64);
        impl std::fmt::Write for Folder {
            fn write_str(&mut self, text: &str) -> std::fmt::Result {
                for chunk in text.as_bytes().chunks(8) {
                    let mut word = [0; 8];
                    word[..chunk.len()].copy_from_slice(chunk);
                    self.0 = (self.0.rotate_left(5) ^ u64::from_le_bytes(word)).wrapping_mul(0x517c_c1b7_2722_0a95);
                }
                Ok(())
            }
        }
        let mut folder = Folder(self.trace_hash ^ self.now.0);
        // The text of an action names every field, whatever fields come to be added.
        let _ = std::fmt::Write::write_fmt(&mut folder, format_args!("{action:?}"));
        self.trace_hash = mix(folder.0);
    }

    fn deliver(&mut self, event: Event) -> Check {
        self.tally.event(&event);
        self.note(|| format!("<- {event:?}"));
        if event.outcome == Err(Failure::Corrupt) {
            self.corrupt_answers += 1;
        }
        self.landed(&event);
        self.manager.handle_event(event, self.now);
        self.pump()
    }
}

fn new_manager(plan: &Plan) -> Result<TierManager, Finding> {
    match plan.settings.clone().check() {
        Ok(settings) => {
            let policy = settings.policy();
            Ok(TierManager::new(settings, policy))
        }
        Err(error) => found(format!("the plan's settings are refused: {error}")),
    }
}
