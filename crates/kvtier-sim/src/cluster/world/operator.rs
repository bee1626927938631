//! What clients and the operator do, and what befalls the members.

use std::time::Duration;

use kvtier_core::Time;
use kvtier_core::cluster::MemberId;

use super::{Happening, World};
use crate::oracle::Check;

impl World {
    pub(super) fn step(&mut self) -> Check {
        self.steps_left = self.steps_left.saturating_sub(1);
        if self.steps_left > 0 {
            let gap = self.random.exponential(self.plan.step_gap_ns);
            self.after(gap, Happening::Step);
        }
        let Some(member) = self.somebody()? else { return Ok(()) };
        let name = self.random.index(self.names.len());
        for _ in 0..2 {
            let name = self.random.index(self.names.len());
            if let Some(writer) = self.somebody()? {
                self.publish(writer, name);
            }
        }
        if self.random.chance(self.plan.raise_permille) {
            self.purge(member, name)?;
        } else if self.random.chance(30) {
            self.raise_alone(member, name)?;
        } else if self.random.chance(200) {
            self.look_after(member)?;
        } else if self.random.chance(5) {
            self.abandon(member)?;
        }
        self.befall()
    }

    /// A client puts a block, if it may.
    fn publish(&mut self, member: MemberId, name: usize) {
        let (text, now) = (self.names[name].clone(), self.now);
        let state = self.member(member);
        let Some(run) = &state.run else { return };
        let generation = run.in_force[name];
        let settled = run.cluster.is_settled(&text, generation);
        if settled {
            state.written.entry((name, generation)).or_insert(now);
        }
        self.counts
            .count(if settled { "event published" } else { "event unsettled" });
    }

    /// A member raises a name for a reason of its own.
    fn raise_alone(&mut self, member: MemberId, name: usize) -> Check {
        let (text, shown) = (self.names[name].clone(), self.shown(member));
        if let Some(generation) = self.raise_own(member, name)
            && let Some(run) = &mut self.member(member).run
        {
            let noted = run.cluster.note(&text, generation, shown);
            assert_eq!(noted, Ok(()), "it can be noted");
            self.counts.count("event noted");
        }
        self.pump(member)
    }

    /// What a driver does now and then: whatever was too much before is tried again, and what a failed record has put in force is noted.
    pub(super) fn look_after(&mut self, member: MemberId) -> Check {
        let (names, shown) = (self.names.clone(), self.shown(member));
        if let Some(run) = &mut self.member(member).run
            && run.recording + run.unanswered == 0
        {
            for (name, generation) in names.iter().zip(run.in_force.clone()) {
                if generation > run.cluster.generation(name) {
                    let noted = run.cluster.note(name, generation, shown);
                    assert_eq!(noted, Ok(()), "it can be noted");
                }
            }
            self.pump(member)?;
        }
        self.resume_jobs(member)
    }

    /// The operator gives up on those who have not confirmed.
    fn abandon(&mut self, member: MemberId) -> Check {
        let shown = self.shown(member);
        let state = self.member(member);
        let Some(run) = &mut state.run else { return Ok(()) };
        let reached = run.open.iter().find(|(_, id)| {
            let job = state.jobs.get(id);
            job.is_some_and(|job| job.reached.is_some())
        });
        if let Some((operation, id)) = reached.map(|(operation, id)| (*operation, *id)) {
            run.open.remove(&operation);
            state.jobs.remove(&id);
            assert!(run.cluster.abandon(operation, shown), "it was open");
            self.counts.count("event abandoned");
        }
        self.pump(member)
    }

    fn befall(&mut self) -> Check {
        let rates = self.plan.rates;
        let members = self.members.len();
        if self.faults_on && rates.cut > 0 && self.random.chance(rates.cut) {
            self.cut_off(members);
            // Who was cut off has a lease that was just renewed: now its end matters.
            if self.random.chance(500)
                && let Some(member) = self.somebody()?
            {
                let name = self.random.index(self.names.len());
                self.purge(member, name)?;
            }
        } else if self.random.chance(60) {
            self.heal();
        }
        if self.faults_on && rates.kill > 0 && self.random.chance(rates.kill) {
            self.kill()?;
        }
        if self.faults_on
            && rates.stall > 0
            && self.random.chance(rates.stall)
            && let Some(member) = self.somebody()?
        {
            let stalled_ns = self.random.below(self.lease_ns() * 3);
            let until = self.now.after(Duration::from_nanos(stalled_ns));
            self.counts.count("fault stall");
            self.note(|| format!("{member:?} is stopped for {stalled_ns} ns"));
            if let Some(run) = &mut self.member(member).run {
                run.stalled_until = until;
            }
        }
        Ok(())
    }

    /// Some members no longer hear the others, who may or may not hear them.
    fn cut_off(&mut self, members: usize) {
        let side: Vec<bool> = (0..members).map(|_| self.random.chance(400)).collect();
        let one_way = self.random.chance(300);
        self.counts
            .count(if one_way { "fault cut_one_way" } else { "fault cut" });
        self.note(|| format!("cut: {side:?}, one way: {one_way}"));
        for (from, row) in self.cut.iter_mut().enumerate() {
            for (to, cut) in row.iter_mut().enumerate() {
                *cut = side[from] != side[to] && (!one_way || side[from]);
            }
        }
    }

    pub(super) fn heal(&mut self) {
        self.note(|| "all reach all".to_owned());
        for row in &mut self.cut {
            row.fill(false);
        }
    }

    fn kill(&mut self) -> Check {
        let Some(member) = self.somebody()? else { return Ok(()) };
        let down_ns = if self.random.chance(500) {
            self.random.below(1_000_000)
        } else {
            self.random.below(self.lease_ns() * 4)
        };
        let reboots = self.plan.reboots && self.random.chance(500);
        let offset_ns = self.random.below(1 << 40);
        self.note(|| format!("{member:?} is killed for {down_ns} ns"));
        self.counts.count("fault kill");
        let state = self.member(member);
        if let Some(run) = state.run.take() {
            if reboots {
                state.clock.offset_ns = offset_ns;
            }
            self.counts.run(&run.cluster.statistics());
            if run.unanswered > 0 {
                self.counts.count("fault kill_between_durable_and_answer");
            }
            if run.recording > 0 {
                self.counts.count("fault kill_while_recording");
            }
            if reboots {
                self.counts.count("fault reboot");
            }
        }
        self.after(down_ns, Happening::Start(member));
        Ok(())
    }

    /// How long it may take until nothing is left to do.
    pub(super) fn patience(&self) -> Time {
        let settings = &self.plan.settings;
        let waits = settings.lease_ttl * 20 + settings.resend_after_max * 40 + settings.renew_every * 20;
        self.now
            .after(waits + Duration::from_nanos(self.plan.record_ns + self.plan.latency_ns) * 400)
    }
}
