use kvtier_core::cluster::MemberId;
use kvtier_core::{Generation, Time};

use super::member::Member;
use crate::oracle::{Check, found};

/// What each member must keep to, by name, whenever it serves.
#[derive(Clone, Copy, Debug, Default)]
struct Duty {
    /// At least this is in force.
    generation: Generation,
    /// No block from before this is shown.
    written_from: Time,
}

/// What was promised to whoever asked for purges.
pub(super) struct Oracle {
    duties: Vec<Vec<Duty>>,
    /// What each member has had durable.
    durable: Vec<Vec<Generation>>,
}

impl Oracle {
    pub(super) fn new(members: usize, names: usize) -> Oracle {
        Oracle {
            duties: vec![vec![Duty::default(); names]; members],
            durable: vec![vec![Generation(0); names]; members],
        }
    }

    /// A purge that was asked for at `asked_at` was acknowledged for this member.
    pub(super) fn bind(&mut self, member: MemberId, name: usize, generation: Generation, asked_at: Time) {
        let duty = &mut self.duties[member.0 as usize][name];
        duty.generation = duty.generation.max(generation);
        duty.written_from = duty.written_from.max(asked_at);
    }

    /// The same for all of them.
    pub(super) fn bind_all(&mut self, name: usize, generation: Generation, asked_at: Time) {
        for member in 0..self.duties.len() {
            self.bind(MemberId(member as u32), name, generation, asked_at);
        }
    }

    /// Holds everybody to it at this real time.
    pub(super) fn check(&mut self, members: &[Member], now: Time) -> Check {
        for (index, member) in members.iter().enumerate() {
            for (name, durable) in member.durable.iter().enumerate() {
                let before = &mut self.durable[index][name];
                if durable < before {
                    return found(format!(
                        "name {name} fell at member {index} from {before:?} to {durable:?}"
                    ));
                }
                *before = *durable;
            }
            let Some(run) = &member.run else { continue };
            if !run.cluster.is_serving(member.clock.read(now)) {
                continue;
            }
            for (name, duty) in self.duties[index].iter().enumerate() {
                let in_force = run.in_force[name];
                if in_force < duty.generation {
                    return found(format!(
                        "member {index} serves name {name} at {in_force:?} after {:?} was acknowledged",
                        duty.generation
                    ));
                }
                let shown = member.written.range((name, in_force)..(name + 1, Generation(0)));
                for ((_, generation), written) in shown {
                    if *written < duty.written_from {
                        return found(format!(
                            "member {index} shows a block of name {name} written under {generation:?} at {written:?}, before the purge asked for at {:?}",
                            duty.written_from
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}
