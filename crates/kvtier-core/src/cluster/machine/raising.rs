//! Purges of this member's own.

use super::super::learning::Then;
use super::super::raise::{Progress, Raise, Step, Told};
use super::{Cluster, RaiseRefusal, RaiseRequest, mutant_is};
use crate::cluster::{ClusterAction, MemberId, Message, Reach};
use crate::{Generation, OperationId, Time};

impl Cluster {
    /// Carries a purge to every member. `request.generation` is durable and in force here already. [`ClusterAction::Reached`] tells how far it got: when it has, or at the
    /// deadline where no majority has it. If a majority has it then, and members have not confirmed, it comes up to [`super::CheckedClusterSettings::fence_wait`] later.
    ///
    /// A coordinator that starts again raises what was not completed once more; that changes nothing where it was done.
    ///
    /// # Errors
    /// [`RaiseRefusal`]: nothing was begun.
    pub fn raise(&mut self, request: RaiseRequest, now: Time) -> Result<OperationId, RaiseRefusal> {
        self.advance(now);
        // Also where there is no room for the raise: it is in force here, and others must be told so.
        self.take_own(&request.name, request.generation)?;
        // Records of raises that were abandoned meanwhile count until they are answered.
        let abandoned = self.records.values().filter(|learning| match learning.then {
            Then::Raise(operation) => !self.raises.contains_key(&operation),
            _ => false,
        });
        let open = self.raises.len() + abandoned.count();
        if open >= self.settings.operations_max && !mutant_is!(self, UnboundedOperations) {
            return Err(RaiseRefusal::Busy);
        }
        let mut members = vec![Progress::default(); self.settings.members as usize];
        let confirmed = request.reached.iter().flatten();
        for member in confirmed.filter(|member| member.0 < self.settings.members) {
            members[member.0 as usize].confirmed = true;
        }
        let reached = request.reached.is_some();
        let raise = Raise {
            name: request.name,
            target: request.generation,
            deadline: request.deadline,
            begun: self.now,
            members,
            surveyed: reached,
            recording: false,
            stored_at: None,
            told: if reached { Told::Reached } else { Told::Nothing },
            resend_at: self.now,
            backoff: self.settings.resend_after,
        };
        let operation = self.operation();
        self.due.insert((self.due_of(&raise), operation));
        self.raises.insert(operation, raise);
        self.counters.raises += 1;
        self.attend(operation);
        Ok(operation)
    }

    /// Gives up an open raise: nobody is told of it any more, and nothing of it is told. What members have of it stays, and spreads with renewals.
    /// False where there is none.
    pub fn abandon(&mut self, operation: OperationId, now: Time) -> bool {
        self.advance(now);
        self.close(operation)
    }

    fn close(&mut self, operation: OperationId) -> bool {
        let due = self.raises.get(&operation).map(|raise| self.due_of(raise));
        if let Some(due) = due {
            self.due.remove(&(due, operation));
        }
        self.raises.remove(&operation).is_some()
    }

    /// When a raise wants to be looked at next.
    fn due_of(&self, raise: &Raise) -> Time {
        let fenced = raise.stored_at.map(|_| self.fenced_at(raise));
        let next = match raise.told {
            Told::Reached => None,
            Told::NotStored => fenced,
            Told::Nothing => fenced.or(Some(raise.deadline)),
        };
        next.map_or(raise.resend_at, |next| next.min(raise.resend_at))
    }

    /// When no lease is left that was renewed without the raise.
    fn fenced_at(&self, raise: &Raise) -> Time {
        let stored_at = raise.stored_at.unwrap_or(raise.begun);
        if mutant_is!(self, WaitSkipped) {
            return stored_at;
        }
        if mutant_is!(self, WaitWithoutDrift) {
            return stored_at.after(self.settings.lease_ttl);
        }
        if mutant_is!(self, WaitFromRaise) {
            return raise.begun.after(self.settings.fence_wait());
        }
        stored_at.after(self.settings.fence_wait())
    }

    /// Changes a raise and keeps its place among those that are due.
    fn change<T>(&mut self, operation: OperationId, change: impl FnOnce(&mut Raise) -> T) -> Option<T> {
        let before = self.due_of(self.raises.get(&operation)?);
        let raise = self.raises.get_mut(&operation)?;
        let changed = change(raise);
        let after = self.due_of(self.raises.get(&operation)?);
        if before != after {
            self.due.remove(&(before, operation));
            self.due.insert((after, operation));
        }
        Some(changed)
    }

    /// Looks at a raise again and says at once what there is to say.
    pub(super) fn hurry(&mut self, operation: OperationId) {
        let (now, backoff) = (self.now, self.settings.resend_after);
        self.change(operation, |raise| {
            raise.resend_at = now;
            raise.backoff = backoff;
        });
        self.attend(operation);
    }

    /// Everything that is due of a raise.
    pub(super) fn attend(&mut self, operation: OperationId) {
        self.choose_target(operation);
        self.say(operation);
        self.conclude(operation);
    }

    /// Goes above what others told, and has the target recorded here.
    fn choose_target(&mut self, operation: OperationId) {
        let Some(raise) = self.raises.get(&operation) else {
            return;
        };
        let enough = raise.telling(&self.settings) + 1 >= self.majority();
        let (fenced, skipped) = (self.settings.fenced, mutant_is!(self, OutbidSkipped));
        let surveyed = raise.surveyed || (fenced && enough);
        let highest = raise.highest_told();
        let mut target = raise.target;
        // Without a fence each member that tells may raise the target; with one a majority does, once.
        let chooses = !fenced || (surveyed && !raise.surveyed);
        if chooses && highest >= target && !skipped {
            target = Generation(highest.0.saturating_add(1).min(u64::MAX - 1));
        }
        let outbid = target > raise.target;
        let recording = raise.recording;
        let own = self.names.generation(&raise.name) >= target;
        let raised = (raise.name.clone(), target);
        self.counters.outbid += u64::from(outbid);
        let (now, backoff) = (self.now, self.settings.resend_after);
        self.change(operation, |raise| {
            if surveyed != raise.surveyed || outbid {
                raise.resend_at = now;
                raise.backoff = backoff;
            }
            raise.surveyed = surveyed;
            raise.target = target;
            raise.recording |= !own;
        });
        if !own && !recording {
            self.record_own(operation, raised);
        }
    }

    /// Sends whatever is due to those who have not confirmed.
    fn say(&mut self, operation: OperationId) {
        let (now, most) = (self.now, self.settings.resend_after_max);
        let Some(raise) = self.raises.get(&operation).filter(|raise| raise.resend_at <= now) else {
            return;
        };
        let own = self.names.generation(&raise.name) >= raise.target;
        let (name, generation, again) = (raise.name.clone(), raise.target, raise.backoff);
        let first = again == self.settings.resend_after;
        let steps: Vec<(MemberId, Step)> = self
            .settings
            .others()
            .map(|member| (member, raise.step(member, self.settings.fenced, own)))
            .collect();
        for (to, step) in steps {
            let (incarnation, name) = (self.incarnation, name.clone());
            let message = match step {
                Step::Ask => Message::Ask {
                    incarnation,
                    operation,
                    name,
                },
                Step::Store => Message::Store {
                    incarnation,
                    operation,
                    name,
                    generation,
                },
                Step::Nothing => continue,
            };
            self.counters.resends += u64::from(!first);
            self.send(to, message);
        }
        self.change(operation, |raise| {
            raise.resend_at = now.after(again);
            raise.backoff = (again * 2).min(most);
        });
    }

    /// Tells the driver what there is to tell.
    fn conclude(&mut self, operation: OperationId) {
        let Some(raise) = self.raises.get(&operation) else {
            return;
        };
        let own = self.names.generation(&raise.name) >= raise.target;
        let having = raise.confirming(&self.settings) + usize::from(own);
        let all = own && raise.is_confirmed(&self.settings);
        let stands = raise.surveyed || !self.settings.fenced;
        let now = self.now;
        if raise.stored_at.is_none() && self.settings.fenced && stands && having >= self.majority() {
            self.change(operation, |raise| raise.stored_at = Some(now));
        }
        let Some(raise) = self.raises.get(&operation) else {
            return;
        };
        let late = raise.deadline <= now;
        let (confirmed, others) = raise.split(&self.settings, own);
        let reach = match raise.told {
            Told::Reached => None,
            _ if self.settings.fenced => {
                if raise.stored_at.is_some() && (all || self.fenced_at(raise) <= now) {
                    Some(Reach::Fenced {
                        confirmed,
                        expired: others,
                    })
                } else if raise.stored_at.is_none() && late && raise.told == Told::Nothing {
                    Some(Reach::NotStored {
                        confirmed,
                        unconfirmed: others,
                    })
                } else {
                    None
                }
            }
            _ if all || late => Some(Reach::Unfenced {
                confirmed,
                unconfirmed: others,
            }),
            _ => None,
        };
        let generation = raise.target;
        let mut over = raise.told == Told::Reached;
        if let Some(reach) = reach {
            over = !matches!(reach, Reach::NotStored { .. });
            self.counters.reached += u64::from(over);
            self.counters.not_stored += u64::from(!over);
            let told = if over { Told::Reached } else { Told::NotStored };
            self.change(operation, |raise| raise.told = told);
            self.actions.push_back(ClusterAction::Reached {
                operation,
                generation,
                reach,
            });
        }
        if over && all {
            self.counters.completed += 1;
            self.close(operation);
            self.actions.push_back(ClusterAction::Completed { operation });
        } else if over && mutant_is!(self, SilentAfterReach) {
            self.close(operation);
        }
    }

    pub(super) fn told_by(&mut self, from: MemberId, operation: OperationId, generation: Generation) {
        let fenced = self.settings.fenced;
        let news = self.change(operation, |raise| {
            let progress = &mut raise.members[from.0 as usize];
            let news = progress.told.is_none() && !(fenced && raise.surveyed);
            if news {
                progress.told = Some(generation);
            }
            news
        });
        match news {
            // Without a fence it is now its turn to store.
            Some(true) if !fenced => self.hurry(operation),
            Some(true) => self.attend(operation),
            _ => self.counters.late_messages += 1,
        }
    }

    pub(super) fn stored_by(&mut self, from: MemberId, operation: OperationId, generation: Generation) {
        let Some(raise) = self.raises.get(&operation) else {
            self.counters.late_messages += 1;
            return;
        };
        let name = raise.name.clone();
        self.names.hold(&name, generation, from);
        self.confirmed_by(from, operation, generation);
    }

    fn confirmed_by(&mut self, from: MemberId, operation: OperationId, generation: Generation) {
        let fenced = self.settings.fenced;
        let confirmed = self.change(operation, |raise| {
            let confirms = raise.confirms(from, generation, fenced);
            raise.members[from.0 as usize].confirmed |= confirms;
            confirms.then_some(raise.told)
        });
        if let Some(Some(told)) = confirmed {
            if told == Told::Reached {
                self.actions.push_back(ClusterAction::Confirmed {
                    operation,
                    member: from,
                });
            }
            self.attend(operation);
        }
    }

    /// Something told how much `member` has: whatever raise of this one it has, it confirms.
    pub(super) fn confirm_held(&mut self, member: MemberId) {
        let held: Vec<(OperationId, Generation)> = self
            .raises
            .iter()
            .filter(|(_, raise)| {
                let own = self.names.generation(&raise.name);
                own >= raise.target
                    && raise.confirms(member, own, self.settings.fenced)
                    && self.holds(&raise.name, member)
            })
            .map(|(operation, raise)| (*operation, self.names.generation(&raise.name)))
            .collect();
        for (operation, generation) in held {
            self.confirmed_by(member, operation, generation);
        }
    }
}
