//! What the driver has recorded.

use super::super::learning::{Learning, Then};
use super::{Cluster, mutant_is};
use crate::Time;
use crate::cluster::{ClusterEvent, Known, MemberId, Round};

impl Cluster {
    /// The driver answers a [`crate::cluster::ClusterAction::Record`].
    pub fn handle_event(&mut self, event: ClusterEvent, now: Time) {
        self.advance(now);
        let Some(Learning { from, raised, then }) = self.records.remove(&event.operation) else {
            self.counters.late_events += 1;
            return;
        };
        if let Then::Grant { .. } = then {
            self.peers[from.0 as usize].learning = false;
        }
        if !event.recorded {
            // Nothing is lost: the renewal, the store or the raise is tried again.
            self.counters.record_failures += 1;
            if let Then::Raise(operation) = then
                && let Some(raise) = self.raises.get_mut(&operation)
            {
                raise.recording = false;
            }
            return;
        }
        for (name, generation) in &raised {
            if mutant_is!(self, MergeByLatest) {
                self.names.put(name, *generation);
            } else {
                self.names.raise(name, *generation);
            }
            if from != self.settings.own {
                self.names.hold(name, *generation, from);
                self.counters.learnt += 1;
            }
        }
        match then {
            Then::Grant { known, round, complete } => self.count_grant(from, known, round, complete),
            Then::Confirm { incarnation, operation } => {
                for (name, _) in &raised {
                    self.confirm(from, incarnation, operation, name);
                }
            }
            Then::Raise(operation) => {
                if let Some(raise) = self.raises.get_mut(&operation) {
                    raise.recording = false;
                    // It goes on at once.
                    self.hurry(operation);
                }
            }
        }
    }

    /// All that a grant carried is durable here.
    pub(super) fn count_grant(&mut self, from: MemberId, known: Known, round: Round, complete: bool) {
        let peer = &mut self.peers[from.0 as usize];
        let before = peer.known.filter(|before| before.incarnation == known.incarnation);
        let further = before.is_none_or(|before| before.version < known.version);
        if further {
            peer.known = Some(known);
        }
        if !complete {
            // Not for a piece that came again: each would ask for the rest once more.
            if further {
                self.send_renew(from);
            }
            return;
        }
        self.counters.grants += 1;
        let others = self.majority() - 1;
        let ttl = self.settings.lease_ttl;
        if self.fence.grant(from.0 as usize, round, others, ttl) {
            self.counters.renewals += 1;
            #[cfg(feature = "mutants")]
            if mutant_is!(self, LeaseFromReceipt) {
                self.fence.extend(self.now.after(ttl));
            }
        }
        self.tell_serving();
        self.confirm_held(from);
    }
}
