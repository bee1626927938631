mod ending;
mod network;
mod operator;
mod purges;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use kvtier_core::cluster::{Cluster, ClusterAction, ClusterEvent, Incarnation, MemberId, Message, Raised};
use kvtier_core::{Generation, OperationId, Time};

use super::clock::Clock;
use super::counts::ClusterCounts;
use super::member::{Member, Run};
use super::oracle::Oracle;
use super::plan::Plan;
use crate::oracle::{Check, Finding, found};
use crate::random::{Random, mix};

/// What is going to happen.
enum Happening {
    Deliver {
        from: MemberId,
        to: MemberId,
        message: Message,
    },
    /// A record becomes durable and in force.
    Recorded {
        member: MemberId,
        incarnation: u64,
        raised: Vec<Raised>,
    },
    /// A record is answered.
    Answered {
        member: MemberId,
        incarnation: u64,
        event: ClusterEvent,
    },
    /// A member that was killed starts again.
    Start(MemberId),
    /// The operator and the clients do something.
    Step,
}

pub(super) struct World {
    plan: Plan,
    random: Random,
    /// Real time.
    now: Time,
    names: Vec<Arc<str>>,
    members: Vec<Member>,
    oracle: Oracle,
    queue: BTreeMap<(Time, u64), Happening>,
    happened: u64,
    /// Who does not reach whom.
    cut: Vec<Vec<bool>>,
    next_job: u64,
    steps_left: u64,
    faults_on: bool,
    pub(super) counts: ClusterCounts,
    pub(super) trace_hash: u64,
    pub(super) actions: u64,
    /// The last things that happened, when somebody wants to read them.
    pub(super) log: Option<VecDeque<String>>,
}

const LOG_LINES_MAX: usize = 200;
const SPINS_MAX: u32 = 100;
const QUEUE_MAX: usize = 50_000;
/// Actions that one call may lead to before it counts as an endless loop.
const ACTIONS_AT_ONCE_MAX: u32 = 2_000;

impl World {
    pub(super) fn new(seed: u64, adjust: &dyn Fn(&mut Plan), logged: bool) -> World {
        let mut random = Random::new(mix(seed) ^ 0x636c_7573);
        let mut plan = Plan::new(&mut random);
        adjust(&mut plan);
        let members = plan.settings.members as usize;
        let fastest = u64::from(plan.settings.drift_permille) * 1000;
        let names: Vec<Arc<str>> = (0..plan.names)
            .map(|name| Arc::from(format!("domain/{name}")))
            .collect();
        World {
            members: (0..members)
                .map(|_| Member {
                    clock: Clock {
                        offset_ns: random.below(1 << 40),
                        fast_ppm: random.pick(&[0, 0, fastest / 2, fastest, fastest]),
                    },
                    run: None,
                    incarnation: 0,
                    durable: vec![Generation(0); names.len()],
                    written: BTreeMap::new(),
                    jobs: BTreeMap::new(),
                })
                .collect(),
            oracle: Oracle::new(members, names.len()),
            cut: vec![vec![false; members]; members],
            names,
            random,
            now: Time::ZERO,
            queue: BTreeMap::new(),
            happened: 0,
            next_job: 0,
            steps_left: plan.steps,
            faults_on: true,
            counts: ClusterCounts::default(),
            trace_hash: mix(seed),
            actions: 0,
            log: logged.then(VecDeque::new),
            plan,
        }
    }

    /// A life with faults, and an end without.
    pub(super) fn live(&mut self) -> Check {
        for member in 0..self.members.len() {
            self.start(MemberId(member as u32))?;
        }
        self.after(0, Happening::Step);
        while self.steps_left > 0 {
            self.happen()?;
        }
        self.end()
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        let Some(log) = &mut self.log else { return };
        if log.len() == LOG_LINES_MAX {
            log.pop_front();
        }
        log.push_back(format!("{:>12} ns  {}", self.now.0, line()));
    }

    fn after(&mut self, delay_ns: u64, happening: Happening) {
        self.happened += 1;
        let at = self.now.after(Duration::from_nanos(delay_ns));
        self.queue.insert((at, self.happened), happening);
    }

    /// Strikes with this chance while faults are on.
    fn strikes(&mut self, permille: u64, fault: &'static str) -> bool {
        let strikes = self.faults_on && permille > 0 && self.random.chance(permille);
        if strikes {
            self.counts.count(fault);
        }
        strikes
    }

    fn lease_ns(&self) -> u64 {
        self.plan.settings.lease_ttl.as_nanos() as u64
    }

    fn member(&mut self, member: MemberId) -> &mut Member {
        &mut self.members[member.0 as usize]
    }

    /// What this member's clock shows.
    fn shown(&self, member: MemberId) -> Time {
        self.members[member.0 as usize].clock.read(self.now)
    }

    /// A member's process begins with what its disk has.
    fn start(&mut self, member: MemberId) -> Check {
        let mut settings = self.plan.settings.clone();
        settings.own = member;
        let settings = match settings.check() {
            Ok(settings) => settings,
            Err(error) => return found(format!("the plan's settings are refused: {error}")),
        };
        let (names, now, shown) = (self.names.clone(), self.now, self.shown(member));
        let state = self.member(member);
        state.incarnation += 1;
        let cluster = match Cluster::new(
            settings,
            // Numbers that no other run of any member has, in no order.
            Incarnation(mix(u64::from(member.0) << 32 | state.incarnation)),
            state.register(&names),
            shown,
        ) {
            Ok(cluster) => cluster,
            Err(error) => return found(format!("the register is refused: {error}")),
        };
        state.run = Some(Run {
            cluster,
            in_force: state.durable.clone(),
            open: BTreeMap::new(),
            unanswered: 0,
            recording: 0,
            stalled_until: now,
            timer_after: now,
            spins: 0,
            last_timer: Time::ZERO,
        });
        self.note(|| format!("{member:?} starts"));
        // Something new may come before what was left: then operations have other numbers than in the run before.
        if self.faults_on && self.now > Time::ZERO && self.random.chance(300) {
            let name = self.random.index(self.names.len());
            self.purge(member, name)?;
        }
        self.resume_jobs(member)?;
        self.oracle.check(&self.members, self.now)
    }

    /// The next timer of all members: when it fires, and whose it is.
    fn next_timer(&self) -> Option<(Time, MemberId)> {
        let timers = self.members.iter().enumerate().filter_map(|(index, member)| {
            let run = member.run.as_ref()?;
            let due = member.clock.when(run.cluster.poll_timeout()?);
            let due = due.max(run.timer_after).max(run.stalled_until).max(self.now);
            Some((due, MemberId(index as u32)))
        });
        timers.min()
    }

    /// The next thing that happens.
    fn happen(&mut self) -> Check {
        if self.queue.len() > QUEUE_MAX {
            return found(format!("{QUEUE_MAX} things are on their way at once"));
        }
        let next = self.queue.first_key_value().map(|((time, _), _)| *time);
        if let Some((due, member)) = self.next_timer()
            && next.is_none_or(|next| due <= next)
        {
            self.now = due;
            self.timer(member)?;
            return self.oracle.check(&self.members, self.now);
        }
        let Some(((time, _), happening)) = self.queue.pop_first() else {
            return found("nothing is left to happen".to_owned());
        };
        self.now = self.now.max(time);
        // Leases that ran out meanwhile only stop members from serving: who keeps to it after each happening has kept to it between.
        match happening {
            Happening::Deliver { from, to, message } => self.deliver(from, to, message)?,
            Happening::Recorded {
                member,
                incarnation,
                raised,
            } => self.recorded(member, incarnation, &raised),
            Happening::Answered {
                member,
                incarnation,
                event,
            } => self.answered(member, incarnation, event)?,
            Happening::Start(member) => self.start(member)?,
            Happening::Step => self.step()?,
        }
        self.oracle.check(&self.members, self.now)
    }

    fn timer(&mut self, member: MemberId) -> Check {
        let shown = self.shown(member);
        let late = self.plan.rates.timer_late;
        let late_ns = if self.strikes(late, "fault timer_late") {
            let most = self.lease_ns();
            self.random.below(most)
        } else {
            0
        };
        let timer_after = self.now.after(Duration::from_nanos(late_ns));
        self.counts.count("event timeout");
        let Some(run) = &mut self.member(member).run else {
            return Ok(());
        };
        run.spins = if run.last_timer == shown { run.spins + 1 } else { 0 };
        run.last_timer = shown;
        if run.spins > SPINS_MAX {
            return found(format!("the timer of {member:?} spins at {shown:?}"));
        }
        run.timer_after = timer_after;
        run.cluster.handle_timeout(shown);
        self.pump(member)
    }

    fn deliver(&mut self, from: MemberId, to: MemberId, message: Message) -> Check {
        let (now, shown) = (self.now, self.shown(to));
        let Some(run) = &mut self.member(to).run else {
            return Ok(());
        };
        if run.stalled_until > now {
            let wait = run.stalled_until.since(now).as_nanos() as u64;
            self.after(wait, Happening::Deliver { from, to, message });
            return Ok(());
        }
        self.note(|| format!("{from:?} -> {to:?}: {message:?}"));
        if let Some(run) = &mut self.member(to).run {
            run.cluster.handle_message(from, message, shown);
        }
        self.pump(to)
    }

    fn recorded(&mut self, member: MemberId, incarnation: u64, raised: &[Raised]) {
        let names = self.names.clone();
        let state = self.member(member);
        if state.incarnation != incarnation {
            return;
        }
        let Some(run) = &mut state.run else { return };
        for (name, generation) in raised {
            let Some(name) = names.iter().position(|known| known == name) else {
                continue;
            };
            // The register is told what to hold; that it holds the higher one is its own rule, which the core's planted bugs do not break here.
            state.durable[name] = state.durable[name].max(*generation);
            run.in_force[name] = run.in_force[name].max(*generation);
        }
        run.recording = run.recording.saturating_sub(1);
        run.unanswered += 1;
    }

    fn answered(&mut self, member: MemberId, incarnation: u64, event: ClusterEvent) -> Check {
        let (now, shown) = (self.now, self.shown(member));
        let state = self.member(member);
        if state.incarnation != incarnation {
            return Ok(());
        }
        let Some(run) = &mut state.run else { return Ok(()) };
        if run.stalled_until > now {
            let wait = run.stalled_until.since(now).as_nanos() as u64;
            self.after(
                wait,
                Happening::Answered {
                    member,
                    incarnation,
                    event,
                },
            );
            return Ok(());
        }
        run.unanswered = run.unanswered.saturating_sub(1);
        run.cluster.handle_event(event, shown);
        self.counts.count(if event.recorded {
            "event recorded"
        } else {
            "event not_recorded"
        });
        self.note(|| format!("{member:?} <- {event:?}"));
        self.pump(member)
    }

    /// Carries out what a member's cluster asks for.
    fn pump(&mut self, member: MemberId) -> Check {
        let mut at_once = 0;
        while let Some(action) = self.poll(member) {
            at_once += 1;
            if at_once > ACTIONS_AT_ONCE_MAX {
                return found(format!("{ACTIONS_AT_ONCE_MAX} actions at once, the last {action:?}"));
            }
            self.actions += 1;
            self.fold(member, &action);
            self.counts.action(&action);
            match action {
                ClusterAction::Send { to, message } => self.send(member, to, message),
                ClusterAction::Record { operation, raised } => self.record(member, operation, raised)?,
                ClusterAction::Serving { .. } => self.note(|| format!("{member:?}: {action:?}")),
                ClusterAction::Reached {
                    operation,
                    generation,
                    reach,
                } => self.reached(member, operation, generation, &reach)?,
                ClusterAction::Confirmed { operation, member: who } => self.confirmed(member, operation, who)?,
                ClusterAction::Completed { operation } => self.completed(member, operation)?,
            }
        }
        self.check_bounds(member)
    }

    fn poll(&mut self, member: MemberId) -> Option<ClusterAction> {
        self.member(member).run.as_mut()?.cluster.poll_action()
    }

    fn check_bounds(&mut self, member: MemberId) -> Check {
        let settings = self.plan.settings.clone();
        let Some(run) = &self.member(member).run else {
            return Ok(());
        };
        let statistics = run.cluster.statistics();
        let operations = settings.operations_max as u64;
        let records = settings.records_in_flight_max as u64 + u64::from(settings.members) + operations;
        if statistics.operations > operations || statistics.records_in_flight > records {
            return found(format!(
                "{member:?} holds more than it may: {} raises, {} records",
                statistics.operations, statistics.records_in_flight
            ));
        }
        Ok(())
    }

    fn record(&mut self, member: MemberId, operation: OperationId, raised: Vec<Raised>) -> Check {
        self.note(|| format!("{member:?} records {raised:?} as {operation:?}"));
        if raised.is_empty() {
            return found(format!("{member:?} records nothing"));
        }
        let incarnation = self.member(member).incarnation;
        let rates = self.plan.rates;
        let mut durable_ns = self.random.exponential(self.plan.record_ns);
        if self.strikes(rates.record_slow, "fault record_slow") {
            let most = self.lease_ns() * 2;
            durable_ns += self.random.below(most);
        }
        let mean = self.plan.record_ns / 2;
        let answer_ns = durable_ns + self.random.exponential(mean);
        let fails = self.strikes(rates.record_fails, "fault record_fails");
        if !fails || self.strikes(500, "fault recorded_and_fails") {
            if let Some(run) = &mut self.member(member).run {
                run.recording += 1;
            }
            self.after(
                durable_ns,
                Happening::Recorded {
                    member,
                    incarnation,
                    raised,
                },
            );
        }
        let event = ClusterEvent {
            operation,
            recorded: !fails,
        };
        if self.strikes(rates.duplicate, "fault answered_twice") {
            let again_ns = answer_ns + self.random.below(1_000_000);
            self.after(
                again_ns,
                Happening::Answered {
                    member,
                    incarnation,
                    event,
                },
            );
        }
        self.after(
            answer_ns,
            Happening::Answered {
                member,
                incarnation,
                event,
            },
        );
        Ok(())
    }

    /// Adds an action to the trace's hash.
    fn fold(&mut self, member: MemberId, action: &ClusterAction) {
        let mut hash = mix(self.trace_hash ^ self.now.0 ^ u64::from(member.0));
        // The text of an action names every field, whatever fields come to be added.
        for chunk in format!("{action:?}").as_bytes().chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            hash = (hash.rotate_left(5) ^ u64::from_le_bytes(word)).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
        self.trace_hash = mix(hash);
    }

    /// Somebody who is up, if anybody is.
    fn somebody(&mut self) -> Result<Option<MemberId>, Finding> {
        let up: Vec<MemberId> = (0..self.members.len())
            .filter(|member| self.members[*member].run.is_some())
            .map(|member| MemberId(member as u32))
            .collect();
        Ok((!up.is_empty()).then(|| self.random.pick(&up)))
    }
}
