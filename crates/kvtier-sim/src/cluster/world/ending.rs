//! Once faults stop, everything comes to its end.

use kvtier_core::cluster::MemberId;
use kvtier_core::{Generation, Time};

use super::World;
use crate::oracle::{Check, found};

impl World {
    pub(super) fn end(&mut self) -> Check {
        self.faults_on = false;
        self.heal();
        self.note(|| "faults stop".to_owned());
        let now = self.now;
        for run in self.members.iter_mut().filter_map(|member| member.run.as_mut()) {
            run.stalled_until = now;
            run.timer_after = now;
        }
        let patience = self.patience();
        let mut looked_at = self.now;
        while let Some(left) = self.left() {
            if self.now > patience {
                return found(format!("faults stopped, but {left}"));
            }
            self.happen()?;
            // Whatever the clusters were too busy for is tried again now and then.
            if self.now.since(looked_at) > self.plan.settings.renew_every {
                looked_at = self.now;
                for member in 0..self.members.len() {
                    self.look_after(MemberId(member as u32))?;
                }
            }
        }
        self.settle()?;
        for member in &mut self.members {
            if let Some(run) = &mut member.run {
                self.counts.run(&run.cluster.statistics());
            }
        }
        Ok(())
    }

    /// What is not as it will be in the end, in words.
    fn left(&self) -> Option<String> {
        let highest: Vec<Generation> = (0..self.names.len())
            .map(|name| {
                let durable = self.members.iter().map(|member| member.durable[name]);
                durable.max().unwrap_or_default()
            })
            .collect();
        self.members.iter().enumerate().find_map(|(index, member)| {
            let Some(run) = &member.run else {
                return Some(format!("member {index} is down"));
            };
            let statistics = run.cluster.statistics();
            let unsettled =
                (0..self.names.len()).find(|name| !run.cluster.is_settled(&self.names[*name], highest[*name]));
            if !run.cluster.is_serving(member.clock.read(self.now)) {
                Some(format!("member {index} does not serve"))
            } else if !member.jobs.is_empty() {
                Some(format!(
                    "member {index} has purges that are not complete: {:?}",
                    member.jobs
                ))
            } else if run.in_force != highest {
                Some(format!(
                    "member {index} has {:?} in force, not {highest:?}",
                    run.in_force
                ))
            } else if let Some(name) = unsettled {
                Some(format!("name {name} is not settled at member {index}"))
            } else if statistics.operations + statistics.records_in_flight > 0 {
                Some(format!("member {index} still has {statistics:?}"))
            } else {
                None
            }
        })
    }

    /// From here on nothing changes but renewals, and no lease lapses.
    fn settle(&mut self) -> Check {
        let end = Time(self.now.0 + 3 * self.lease_ns());
        let lapses = |world: &World| -> u64 {
            let runs = world.members.iter().filter_map(|member| member.run.as_ref());
            runs.map(|run| run.cluster.statistics().lapses).sum()
        };
        // What faults have held up still comes, and a lease that they left short may lapse once more.
        while self.now < end {
            self.happen()?;
        }
        let before = lapses(self);
        let end = Time(self.now.0 + 3 * self.lease_ns());
        while self.now < end {
            self.happen()?;
        }
        if self.plan.settings.fenced && self.plan.latency_ns * 20 < self.lease_ns() && lapses(self) > before {
            return found("a lease lapsed although nothing went wrong".to_owned());
        }
        Ok(())
    }
}
