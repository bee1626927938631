//! Drives [`kvtier_core::cluster`]: what each member invalidated reaches every other, and a fenced member that a majority does not
//! renew serves nothing.
//!
//! The machine's names are `DOMAIN/NAME@MEMBER`: each counter has one writer, so that no two invalidations are ever taken for one.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use kvtier_core::cluster::{
    Cluster, ClusterAction, ClusterEvent, ClusterSettings, ClusterStatistics, Incarnation, MemberId, Message,
    RaiseRequest, Raised, Reach,
};
use kvtier_core::{Generation, NamespaceId, OperationId, Time};
use parking_lot::{Condvar, Mutex};

use super::Shared;
use super::cluster_wire;
use super::message::{self, MemberKey};
use super::versions::{Cause, Counter};
use crate::node::driver::{Settled, Waiter};

/// How long a learnt counter may take to be durable before it counts as not learnt.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);
/// What [`boot_time`] may be late by.
const CLOCK_STEP: Duration = Duration::from_millis(10);
/// Raises whose progress is remembered.
const PROGRESS_MAX: usize = 4096;

/// How far a cluster's purge got.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    /// How far, once that is known.
    pub(crate) reach: Option<Reach>,
    /// Members, by address, that have it in force.
    pub(crate) confirmed: Vec<String>,
    /// Every member has.
    pub(crate) completed: bool,
}

enum Input {
    Heard(String, Message),
    Note(Counter),
    Members(Vec<String>),
    Raise(Counter, Duration, Sender<Option<OperationId>>),
    Stop,
}

/// See the module.
pub(super) struct Generations {
    address: String,
    settings: ClusterSettings,
    inputs: Sender<Input>,
    /// Nanoseconds of [`boot_time`] until which this member serves; the largest number without a fence.
    serving_until: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
    shared: OnceLock<Weak<Shared>>,
}

#[derive(Default)]
struct State {
    /// Addresses, in the order of their places in the list.
    members: Vec<String>,
    progress: BTreeMap<OperationId, Progress>,
    statistics: ClusterStatistics,
    learnt_from: usize,
}

impl Generations {
    /// The caller starts [`Generations::run`].
    pub(super) fn new(address: String, members: Vec<String>, settings: ClusterSettings) -> (Generations, InputQueue) {
        let (inputs, work) = crossbeam_channel::unbounded();
        let until = if settings.fenced { 0 } else { u64::MAX };
        let generations = Generations {
            address,
            settings,
            inputs,
            serving_until: AtomicU64::new(until),
            state: Mutex::new(State {
                members,
                ..State::default()
            }),
            changed: Condvar::new(),
            shared: OnceLock::new(),
        };
        (generations, InputQueue(work))
    }

    pub(super) fn bind(&self, shared: &Arc<Shared>) {
        let _ = self.shared.set(Arc::downgrade(shared));
    }

    /// Whether this member may serve reads now. Where not, every read is a miss.
    pub(super) fn is_serving(&self) -> bool {
        let until = self.serving_until.load(Ordering::Acquire);
        until == u64::MAX || boot_time().after(CLOCK_STEP).0 < until
    }

    pub(super) fn is_fenced(&self) -> bool {
        self.settings.fenced
    }

    /// A message of the member with this address.
    pub(super) fn heard(&self, address: &str, bytes: &[u8]) {
        match cluster_wire::decode(bytes) {
            Ok(message) => {
                let _ = self.inputs.send(Input::Heard(address.to_owned(), message));
            }
            Err(error) => tracing::warn!(address, %error, "a member says what is not understood"),
        }
    }

    /// These are durable and in force here, whether or not the machine asked for that.
    pub(super) fn note(&self, counters: &[Counter]) {
        for counter in counters {
            let _ = self.inputs.send(Input::Note(counter.clone()));
        }
    }

    /// The list has changed.
    pub(super) fn set_members(&self, members: Vec<String>) {
        let _ = self.inputs.send(Input::Members(members));
    }

    /// Members, by address.
    pub(super) fn members(&self) -> Vec<String> {
        self.state.lock().members.clone()
    }

    pub(super) fn statistics(&self) -> ClusterStatistics {
        self.state.lock().statistics
    }

    /// Carries an invalidation of this node to every member. `None` where too many are under way.
    pub(super) fn raise(&self, counter: Counter, within: Duration) -> Option<OperationId> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        self.inputs.send(Input::Raise(counter, within, sender)).ok()?;
        receiver.recv_timeout(Duration::from_secs(5)).ok().flatten()
    }

    /// How far it got: at once where that is known, else when it is, or at the deadline.
    pub(super) fn await_reached(&self, operation: OperationId, until: Instant) -> Option<Progress> {
        let mut state = self.state.lock();
        loop {
            let progress = state.progress.get(&operation)?;
            if progress.reach.is_some() {
                return Some(progress.clone());
            }
            if self.changed.wait_until(&mut state, until).timed_out() {
                return state.progress.get(&operation).cloned();
            }
        }
    }

    /// How far it has got.
    pub(super) fn progress(&self, operation: OperationId) -> Option<Progress> {
        self.state.lock().progress.get(&operation).cloned()
    }

    /// Waits until as many other members have told what they know, or for so long.
    pub(super) fn await_learnt(&self, members: usize, until: Instant) -> usize {
        let mut state = self.state.lock();
        while state.learnt_from < members && !self.changed.wait_until(&mut state, until).timed_out() {}
        state.learnt_from
    }

    pub(super) fn stop(&self) {
        let _ = self.inputs.send(Input::Stop);
    }

    fn machine(&self, members: &[String], durable: Vec<Raised>) -> Option<Cluster> {
        let own = members.iter().position(|member| *member == self.address)?;
        let settings = ClusterSettings {
            members: u32::try_from(members.len()).ok()?,
            own: MemberId(u32::try_from(own).ok()?),
            ..self.settings.clone()
        };
        let mut incarnation = [0; 8];
        getrandom::fill(&mut incarnation).ok()?;
        let incarnation = Incarnation(u64::from_le_bytes(incarnation));
        let made = settings
            .check()
            .and_then(|settings| Cluster::new(settings, incarnation, durable, boot_time()));
        made.inspect_err(|error| tracing::error!(%error, "the cluster's list cannot be used"))
            .ok()
    }

    /// The thread.
    pub(super) fn run(&self, queue: &InputQueue) {
        let durable = |shared: &Shared| {
            let counters = shared.versions.counters();
            counters.iter().map(raised_of).collect::<Vec<_>>()
        };
        let Some(shared) = self.shared.get().and_then(Weak::upgrade) else {
            return;
        };
        let mut members = self.members();
        let Some(mut machine) = self.machine(&members, durable(&shared)) else {
            return;
        };
        drop(shared);
        loop {
            let due = machine
                .poll_timeout()
                .map_or(Duration::from_secs(1), |due| due.since(boot_time()));
            let input = match queue.0.recv_timeout(due) {
                Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(input) => Some(input),
                Err(RecvTimeoutError::Timeout) => None,
            };
            let Some(shared) = self.shared.get().and_then(Weak::upgrade) else {
                return;
            };
            let now = boot_time();
            match input {
                Some(Input::Heard(address, message)) => {
                    if let Some(place) = members.iter().position(|member| *member == address) {
                        let from = MemberId(u32::try_from(place).unwrap_or(u32::MAX));
                        machine.handle_message(from, message, now);
                    }
                }
                Some(Input::Note(counter)) => {
                    let (name, generation) = raised_of(&counter);
                    if let Err(error) = machine.note(&name, generation, now) {
                        tracing::warn!(%error, "members will not learn of an invalidation");
                    }
                }
                Some(Input::Raise(counter, within, reply)) => {
                    let (name, generation) = raised_of(&counter);
                    let request = RaiseRequest {
                        name,
                        generation,
                        reached: None,
                        deadline: now.after(within),
                    };
                    let raised = machine.raise(request, now).ok();
                    if let Some(operation) = raised {
                        let mut state = self.state.lock();
                        while state.progress.len() >= PROGRESS_MAX {
                            state.progress.pop_first();
                        }
                        state.progress.insert(operation, Progress::default());
                    }
                    let _ = reply.try_send(raised);
                }
                Some(Input::Members(list)) if list != members => {
                    // Without a fence only; what was under way is told as far as it got.
                    if let Some(other) = self.machine(&list, durable(&shared)) {
                        tracing::info!(?list, "the members are");
                        machine = other;
                        members = list;
                        self.state.lock().members.clone_from(&members);
                    }
                }
                Some(Input::Members(_) | Input::Stop) | None => {}
            }
            if machine.poll_timeout().is_some_and(|due| due <= boot_time()) {
                machine.handle_timeout(boot_time());
            }
            while let Some(action) = machine.poll_action() {
                self.carry_out(&shared, &mut machine, &members, action);
                if self.settings.fenced {
                    let until = machine.lease_until().map_or(0, |until| until.0);
                    self.serving_until.store(until, Ordering::Release);
                }
            }
            if self.settings.fenced {
                let until = machine.lease_until().map_or(0, |until| until.0);
                self.serving_until.store(until, Ordering::Release);
            }
            let mut state = self.state.lock();
            state.statistics = machine.statistics();
            state.learnt_from = machine.learnt_from();
            self.changed.notify_all();
        }
    }

    fn carry_out(&self, shared: &Shared, machine: &mut Cluster, members: &[String], action: ClusterAction) {
        match action {
            ClusterAction::Send { to, message } => {
                let address = &members[to.0 as usize];
                let links = shared.links();
                if let Some(link) = links.iter().find(|link| link.address == *address) {
                    link.tell(&message::Message::Cluster(cluster_wire::encode(&message)));
                }
            }
            ClusterAction::Record { operation, raised } => {
                let recorded = record(shared, &raised);
                machine.handle_event(ClusterEvent { operation, recorded }, boot_time());
            }
            ClusterAction::Serving { serving } => {
                if serving {
                    tracing::info!("a majority renews this member's lease: it serves");
                } else {
                    tracing::warn!("no majority renews this member's lease: it answers only misses until one does");
                }
            }
            ClusterAction::Reached { operation, reach, .. } => {
                let (Reach::Fenced { confirmed, .. }
                | Reach::NotStored { confirmed, .. }
                | Reach::Unfenced { confirmed, .. }) = &reach;
                let confirmed: Vec<String> = confirmed
                    .iter()
                    .map(|member| members[member.0 as usize].clone())
                    .collect();
                let mut state = self.state.lock();
                if let Some(progress) = state.progress.get_mut(&operation) {
                    progress.confirmed = confirmed;
                    progress.reach = Some(reach);
                }
            }
            ClusterAction::Confirmed { operation, member } => {
                let mut state = self.state.lock();
                if let Some(progress) = state.progress.get_mut(&operation) {
                    progress.confirmed.push(members[member.0 as usize].clone());
                }
            }
            ClusterAction::Completed { operation } => {
                let mut state = self.state.lock();
                if let Some(progress) = state.progress.get_mut(&operation) {
                    progress.completed = true;
                }
            }
        }
    }
}

/// Counters of other members: their namespaces are raised here, durably. False where one was not in time.
fn record(shared: &Shared, raised: &[Raised]) -> bool {
    let mut learned: HashMap<&str, Vec<(MemberKey, u64)>> = HashMap::new();
    for (name, generation) in raised {
        let Some((namespace, member)) = name.rsplit_once('@') else {
            continue;
        };
        let Some(member) = MemberKey::parse(member) else {
            continue;
        };
        if !shared.versions.knows(namespace, member, generation.0) {
            learned.entry(namespace).or_default().push((member, generation.0));
        }
    }
    let until = Instant::now() + RECORD_TIMEOUT;
    let mut waiting = Vec::new();
    for (name, counters) in learned {
        let local = name.split_once('/').and_then(|(domain, bare)| {
            let domain = shared.domains.shared(domain)?;
            let (namespace, _) = shared.driver.look(|manager| manager.find_namespace(domain, bare))?;
            Some(namespace)
        });
        match local {
            Some(namespace) => waiting.push((begin(shared, namespace, counters.clone()), name, counters)),
            None if shared.versions.learn(name, &counters).is_err() => return false,
            None => {}
        }
    }
    waiting.into_iter().all(|(settled, name, counters)| {
        let raised = matches!(settled.recv_deadline(until), Ok(Settled::Invalidated(_)));
        raised
            && counters
                .iter()
                .all(|(member, count)| shared.versions.knows(name, *member, *count))
    })
}

fn begin(shared: &Shared, namespace: NamespaceId, counters: Vec<(MemberKey, u64)>) -> Receiver<Settled> {
    let (sender, receiver) = crossbeam_channel::bounded(1);
    shared.driver.with(|decider, now| {
        let operation = shared
            .driver
            .raise(decider, namespace, None, Cause::Learned(counters), now);
        decider.wait(operation, Waiter::Caller(sender));
    });
    receiver
}

/// What waits for the machine.
pub(super) struct InputQueue(Receiver<Input>);

fn raised_of(counter: &Counter) -> Raised {
    (
        format!("{}@{}", counter.namespace, counter.member).into(),
        Generation(counter.count),
    )
}

/// Time since the machine was started, suspended or not, a hundredth of a second late at most.
///
/// Of `/proc/uptime`: the clock that the system has for it is not to be had everywhere that this runs.
fn boot_time() -> Time {
    static UPTIME: OnceLock<Option<File>> = OnceLock::new();
    static STARTED: OnceLock<Instant> = OnceLock::new();
    let file = UPTIME.get_or_init(|| File::open("/proc/uptime").ok());
    let mut text = [0; 64];
    let read = file.as_ref().and_then(|file| file.read_at(&mut text, 0).ok());
    let seconds = read.and_then(|read| seconds_in(&text[..read]));
    // Without it a machine that slept may take a lease to last for longer than it does.
    let passed = seconds.unwrap_or_else(|| STARTED.get_or_init(Instant::now).elapsed());
    Time(u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX))
}

fn seconds_in(text: &[u8]) -> Option<Duration> {
    let seconds = std::str::from_utf8(text).ok()?.split_whitespace().next()?;
    Duration::try_from_secs_f64(seconds.parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_since_boot_is_read_and_goes_on() {
        assert_eq!(seconds_in(b"12.34 99.00\n"), Some(Duration::from_millis(12_340)));
        assert_eq!(seconds_in(b""), None);
        let before = boot_time();
        std::thread::sleep(Duration::from_millis(30));
        assert!(boot_time() > before && before.0 > 0);
    }
}
