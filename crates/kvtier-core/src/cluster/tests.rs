//! Members that talk to each other over a network that only loses what a test cuts.

mod fencing;
mod raising;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::{Generation, OperationId, Time};

const MILLISECOND: u64 = 1_000_000;

struct Network {
    members: Vec<Cluster>,
    now: Time,
    /// From whom to whom nothing goes.
    cut: BTreeSet<(u32, u32)>,
    mail: VecDeque<(MemberId, MemberId, Message)>,
    /// Members whose records wait until the test answers them.
    holding: BTreeSet<u32>,
    records: Vec<(MemberId, OperationId)>,
    told: Vec<(MemberId, ClusterAction)>,
}

fn settings(members: u32, fenced: bool) -> ClusterSettings {
    ClusterSettings {
        members,
        fenced,
        lease_ttl: Duration::from_millis(1000),
        renew_every: Duration::from_millis(200),
        drift_permille: 100,
        resend_after: Duration::from_millis(50),
        resend_after_max: Duration::from_millis(400),
        ..ClusterSettings::default()
    }
}

fn name(text: &str) -> Arc<str> {
    Arc::from(text)
}

fn start(mut settings: ClusterSettings, own: u32, incarnation: u64, durable: &[(&str, u64)], now: Time) -> Cluster {
    settings.own = MemberId(own);
    let durable = durable
        .iter()
        .map(|(text, generation)| (name(text), Generation(*generation)));
    let settings = settings.check().expect("these can be");
    Cluster::new(settings, Incarnation(incarnation), durable, now).expect("they fit")
}

impl Network {
    fn new(settings: &ClusterSettings) -> Network {
        Network {
            members: (0..settings.members)
                .map(|own| start(settings.clone(), own, u64::from(own) + 100, &[], Time::ZERO))
                .collect(),
            now: Time::ZERO,
            cut: BTreeSet::new(),
            mail: VecDeque::new(),
            holding: BTreeSet::new(),
            records: Vec::new(),
            told: Vec::new(),
        }
    }

    /// The same, and everybody has renewed once.
    fn renewed(settings: &ClusterSettings) -> Network {
        let mut network = Network::new(settings);
        network.pass(1);
        network.told.clear();
        network
    }

    /// Cuts a member off from all others, both ways.
    fn isolate(&mut self, member: u32) {
        for other in (0..self.members.len() as u32).filter(|other| *other != member) {
            self.cut.insert((member, other));
            self.cut.insert((other, member));
        }
    }

    /// Delivers until all is said.
    fn settle(&mut self) {
        loop {
            for own in 0..self.members.len() {
                self.drain(MemberId(own as u32));
            }
            let Some((from, to, message)) = self.mail.pop_front() else {
                return;
            };
            self.members[to.0 as usize].handle_message(from, message, self.now);
        }
    }

    fn drain(&mut self, own: MemberId) {
        while let Some(action) = self.members[own.0 as usize].poll_action() {
            match action {
                ClusterAction::Send { to, message } => {
                    if !self.cut.contains(&(own.0, to.0)) {
                        self.mail.push_back((own, to, message));
                    }
                }
                ClusterAction::Record { operation, .. } if self.holding.contains(&own.0) => {
                    self.records.push((own, operation));
                }
                ClusterAction::Record { operation, .. } => self.answer(own, operation, true),
                told => self.told.push((own, told)),
            }
        }
    }

    fn answer(&mut self, own: MemberId, operation: OperationId, recorded: bool) {
        let event = ClusterEvent { operation, recorded };
        self.members[own.0 as usize].handle_event(event, self.now);
    }

    /// Lets time pass; messages take none.
    fn pass(&mut self, milliseconds: u64) {
        let end = Time(self.now.0 + milliseconds * MILLISECOND);
        loop {
            self.settle();
            let due = self.members.iter().filter_map(Cluster::poll_timeout).min();
            let Some(due) = due.filter(|due| *due <= end) else {
                break;
            };
            self.now = self.now.max(due);
            for member in &mut self.members {
                if member.poll_timeout().is_some_and(|due| due <= self.now) {
                    member.handle_timeout(self.now);
                }
            }
        }
        self.now = end;
    }

    fn raise(&mut self, own: u32, text: &str, generation: u64, deadline_ms: u64) -> OperationId {
        let request = request(text, generation, Time(self.now.0 + deadline_ms * MILLISECOND));
        let operation = self.members[own as usize].raise(request, self.now);
        let operation = operation.expect("there is room");
        self.settle();
        operation
    }

    fn serves(&self, own: u32) -> bool {
        self.members[own as usize].is_serving(self.now)
    }

    fn generation(&self, own: u32, text: &str) -> u64 {
        self.members[own as usize].generation(text).0
    }

    /// What the driver of `own` was told of a raise, and forgets it.
    fn told_of(&mut self, own: u32, operation: OperationId) -> Vec<ClusterAction> {
        let all = std::mem::take(&mut self.told);
        let about = |action: &ClusterAction| match action {
            ClusterAction::Reached { operation, .. }
            | ClusterAction::Confirmed { operation, .. }
            | ClusterAction::Completed { operation } => Some(*operation),
            _ => None,
        };
        let ours = all
            .into_iter()
            .filter(|(member, action)| *member == MemberId(own) && about(action) == Some(operation));
        ours.map(|(_, action)| action).collect()
    }
}

fn request(text: &str, generation: u64, deadline: Time) -> RaiseRequest {
    RaiseRequest {
        name: name(text),
        generation: Generation(generation),
        reached: None,
        deadline,
    }
}

fn members(list: &[u32]) -> Vec<MemberId> {
    list.iter().copied().map(MemberId).collect()
}
