//! What a coordinator's driver does: it journals a purge, has it carried to all, and goes on after a restart.

use kvtier_core::cluster::{MemberId, RaiseRefusal, RaiseRequest, Reach};
use kvtier_core::{Generation, OperationId};

use super::super::member::Job;
use super::World;
use crate::oracle::{Check, Finding, found};

/// Purges that one member carries at once; beyond that nobody asks for more.
const JOBS_MAX: usize = 12;

impl World {
    /// Somebody asks a member for a purge: its own register is raised, and the purge journalled.
    pub(super) fn purge(&mut self, member: MemberId, name: usize) -> Check {
        if self.members[member.0 as usize].jobs.len() >= JOBS_MAX {
            return Ok(());
        }
        let asked_at = self.now;
        let id = self.next_job;
        self.next_job += 1;
        let Some(generation) = self.raise_own(member, name) else {
            return Ok(());
        };
        self.note(|| format!("{member:?} is asked to purge name {name}: job {id}, {generation:?}"));
        let job = Job {
            name,
            generation,
            asked_at,
            reached: None,
            not_stored: false,
        };
        self.member(member).jobs.insert(id, job);
        self.begin(member, id)
    }

    /// Raises a member's own register by one, durable and in force at once.
    pub(super) fn raise_own(&mut self, member: MemberId, name: usize) -> Option<Generation> {
        let state = self.member(member);
        let run = state.run.as_mut()?;
        let generation = Generation(run.in_force[name].0.max(state.durable[name].0) + 1);
        state.durable[name] = generation;
        run.in_force[name] = generation;
        Some(generation)
    }

    /// Hands a journalled purge to the member's cluster; where it is busy, it stays in the journal.
    pub(super) fn begin(&mut self, member: MemberId, id: u64) -> Check {
        let shown = self.shown(member);
        let wait = self.random.below(self.lease_ns() * 3);
        let name = self.names.clone();
        let state = self.member(member);
        let (Some(run), Some(job)) = (&mut state.run, state.jobs.get_mut(&id)) else {
            return Ok(());
        };
        job.not_stored = false;
        // What others had may have made it go higher, and this member may have been killed before it had that itself.
        state.durable[job.name] = state.durable[job.name].max(job.generation);
        run.in_force[job.name] = run.in_force[job.name].max(job.generation);
        let request = RaiseRequest {
            name: name[job.name].clone(),
            generation: job.generation,
            reached: job.reached.clone(),
            deadline: kvtier_core::Time(shown.0 + wait),
        };
        match run.cluster.raise(request, shown) {
            Ok(operation) => {
                run.open.insert(operation, id);
            }
            Err(RaiseRefusal::Busy) => self.counts.count("event raised_busy"),
            Err(RaiseRefusal::Invalid) => return found(format!("{member:?} refuses job {id} as invalid")),
        }
        self.pump(member)
    }

    /// Begins what the journal has and the cluster does not know.
    pub(super) fn resume_jobs(&mut self, member: MemberId) -> Check {
        let state = self.member(member);
        let Some(run) = &state.run else { return Ok(()) };
        let waiting: Vec<(u64, bool)> = state
            .jobs
            .iter()
            .filter(|(id, _)| !run.open.values().any(|open| open == *id))
            .map(|(id, job)| (*id, job.reached.is_some()))
            .collect();
        for (id, reached) in waiting {
            self.counts.count(if reached {
                "event reached_resumed"
            } else {
                "event raise_resumed"
            });
            self.begin(member, id)?;
        }
        Ok(())
    }

    fn job(&mut self, member: MemberId, operation: OperationId) -> Result<(u64, &mut Job), Finding> {
        let state = self.member(member);
        let id = state.run.as_ref().and_then(|run| run.open.get(&operation).copied());
        let job = id.and_then(|id| Some((id, state.jobs.get_mut(&id)?)));
        job.ok_or_else(|| Finding(format!("{member:?} speaks of {operation:?}, which is not open")))
    }

    pub(super) fn reached(
        &mut self,
        member: MemberId,
        operation: OperationId,
        generation: Generation,
        reach: &Reach,
    ) -> Check {
        self.note(|| format!("{member:?} {operation:?}: {reach:?} at {generation:?}"));
        let members = self.members.len();
        let fenced = self.plan.settings.fenced;
        let (_, job) = self.job(member, operation)?;
        if job.reached.is_some() {
            return found(format!("{member:?} {operation:?} is reached twice"));
        }
        let (name, asked_at, twice) = (job.name, job.asked_at, job.not_stored);
        let (confirmed, others) = match reach {
            Reach::Fenced { confirmed, expired } => {
                job.reached = Some(confirmed.clone());
                job.generation = generation;
                (confirmed, expired)
            }
            Reach::Unfenced { confirmed, unconfirmed } => {
                job.reached = Some(confirmed.clone());
                job.generation = generation;
                (confirmed, unconfirmed)
            }
            Reach::NotStored { confirmed, unconfirmed } => {
                job.not_stored = true;
                (confirmed, unconfirmed)
            }
        };
        if confirmed.len() + others.len() != members || confirmed.iter().any(|member| others.contains(member)) {
            return found(format!("{reach:?} does not name each of {members} members once"));
        }
        match reach {
            Reach::Fenced { .. } if fenced => {
                if twice {
                    self.counts.count("event reached_after_not_stored");
                }
                self.oracle.bind_all(name, generation, asked_at);
            }
            Reach::NotStored { .. } if fenced && !twice => {}
            Reach::Unfenced { confirmed, .. } if !fenced => {
                for who in confirmed {
                    self.oracle
                        .bind(*who, name, generation_of(generation, *who, member), asked_at);
                }
            }
            _ => return found(format!("{reach:?} is out of place")),
        }
        self.oracle.check(&self.members, self.now)
    }

    pub(super) fn confirmed(&mut self, member: MemberId, operation: OperationId, who: MemberId) -> Check {
        let fenced = self.plan.settings.fenced;
        let (_, job) = self.job(member, operation)?;
        let Some(confirmed) = &mut job.reached else {
            return found(format!("{who:?} confirms {operation:?}, which is not reached"));
        };
        if confirmed.contains(&who) {
            return found(format!("{who:?} confirms {operation:?} of {member:?} twice"));
        }
        confirmed.push(who);
        let (name, generation, asked_at) = (job.name, job.generation, job.asked_at);
        let generation = if fenced { generation } else { Generation(0) };
        self.oracle.bind(who, name, generation, asked_at);
        self.oracle.check(&self.members, self.now)
    }

    pub(super) fn completed(&mut self, member: MemberId, operation: OperationId) -> Check {
        let members = self.members.len();
        let (id, job) = self.job(member, operation)?;
        let confirmed = job.reached.as_ref().map_or(0, Vec::len);
        // This member is not among those that confirm later, and may not have been when it was reached.
        if confirmed < members - 1 {
            return found(format!(
                "{operation:?} of {member:?} is complete, but {confirmed} of {members} confirmed"
            ));
        }
        let state = self.member(member);
        state.jobs.remove(&id);
        if let Some(run) = &mut state.run {
            run.open.remove(&operation);
        }
        self.note(|| format!("{member:?} has completed {operation:?}"));
        Ok(())
    }
}

/// Without a fence a raise may go higher while it is open: who confirmed before that has what hides his own blocks, and need not have more.
fn generation_of(generation: Generation, who: MemberId, coordinator: MemberId) -> Generation {
    if who == coordinator { generation } else { Generation(0) }
}
