//! What other members say.

use std::sync::Arc;

use super::super::learning::{Learning, Then};
use super::{Cluster, mutant_is};
use crate::cluster::{ClusterAction, Incarnation, Known, MemberId, Message, Raised, Round, Version};
use crate::{Generation, OperationId, Time};

impl Cluster {
    /// A message of `from`, whom the driver has authenticated. `now` is read after it was taken.
    pub fn handle_message(&mut self, from: MemberId, message: Message, now: Time) {
        self.advance(now);
        if from == self.settings.own || from.0 >= self.settings.members {
            self.counters.invalid_messages += 1;
            return;
        }
        match message {
            Message::Renew {
                incarnation,
                round,
                known,
            } => self.renewed_by(from, incarnation, round, known),
            Message::Grant {
                to,
                round,
                known,
                complete,
                raised,
            } => {
                if self.is_ours(to, mutant_is!(self, LateGrantAccepted)) {
                    self.granted_by(from, round, known, complete, raised);
                }
            }
            Message::Ask {
                incarnation,
                operation,
                name,
            } => {
                let message = Message::Told {
                    to: incarnation,
                    operation,
                    generation: self.names.generation(&name),
                };
                self.send(from, message);
            }
            Message::Told {
                to,
                operation,
                generation,
            } => {
                if self.is_ours(to, false) {
                    self.told_by(from, operation, generation);
                }
            }
            Message::Store {
                incarnation,
                operation,
                name,
                generation,
            } => self.store_for(from, incarnation, operation, name, generation),
            Message::Stored {
                to,
                operation,
                generation,
            } => {
                if self.is_ours(to, mutant_is!(self, LateStoredAccepted)) {
                    self.stored_by(from, operation, generation);
                }
            }
        }
    }

    /// Whether an answer is one to this run.
    fn is_ours(&mut self, to: Incarnation, whatever: bool) -> bool {
        let ours = to == self.incarnation || whatever;
        self.counters.late_messages += u64::from(!ours);
        ours
    }

    fn renewed_by(&mut self, from: MemberId, incarnation: Incarnation, round: Round, known: Option<Known>) {
        let trusting = mutant_is!(self, StaleVersionTrusted);
        let since = match known {
            Some(known) if known.incarnation == self.incarnation || trusting => known.version,
            _ => Version(0),
        };
        if since > self.names.version() && !trusting {
            self.counters.invalid_messages += 1;
            return;
        }
        let has = &mut self.peers[from.0 as usize].has;
        *has = (*has).max(since);
        let (raised, version, complete) = self.names.after(since, self.settings.entries_per_message_max);
        self.counters.granted += 1;
        self.counters.continuations += u64::from(!complete);
        let known = Known {
            incarnation: self.incarnation,
            version,
        };
        self.send(
            from,
            Message::Grant {
                to: incarnation,
                round,
                known,
                complete,
                raised,
            },
        );
        self.confirm_held(from);
    }

    fn granted_by(&mut self, from: MemberId, round: Round, known: Known, complete: bool, raised: Vec<Raised>) {
        let never = round == Round(0) || round > self.fence.round();
        let large = raised.len() > self.settings.entries_per_message_max;
        if (never && !mutant_is!(self, LateGrantAccepted)) || large || !raised.iter().all(|one| self.is_raised(one)) {
            self.counters.invalid_messages += 1;
            return;
        }
        let complete = complete || mutant_is!(self, IncompleteGrantCounts);
        let then = Then::Grant { known, round, complete };
        let news: Vec<Raised> = raised
            .iter()
            .filter(|(name, generation)| self.is_news(name, *generation))
            .cloned()
            .collect();
        if !news.is_empty() {
            if self.peers[from.0 as usize].learning {
                // The next renewal brings it again.
                self.counters.busy_messages += 1;
                return;
            }
            if !self.has_room(&news) {
                return;
            }
        }
        for (name, generation) in &raised {
            self.names.hold(name, *generation, from);
        }
        if news.is_empty() {
            self.count_grant(from, known, round, complete);
            return;
        }
        if mutant_is!(self, GrantBeforeDurable) {
            self.count_grant(from, known, round, complete);
        }
        self.peers[from.0 as usize].learning = true;
        self.record(Learning {
            from,
            raised: news,
            then,
        });
    }

    fn store_for(
        &mut self,
        from: MemberId,
        incarnation: Incarnation,
        operation: OperationId,
        name: Arc<str>,
        generation: Generation,
    ) {
        let raised = (name, generation);
        if !self.is_raised(&raised) {
            self.counters.invalid_messages += 1;
            return;
        }
        if !self.is_news(&raised.0, generation) {
            self.names.hold(&raised.0, generation, from);
            self.confirm(from, incarnation, operation, &raised.0);
            return;
        }
        let then = Then::Confirm { incarnation, operation };
        let mut storing = 0;
        for learning in self.records.values() {
            if learning.from == from && learning.then == then {
                // It was sent again while its record is in flight.
                return;
            }
            storing += usize::from(matches!(learning.then, Then::Confirm { .. }));
        }
        if storing >= self.settings.records_in_flight_max {
            self.counters.busy_messages += 1;
            return;
        }
        let raised = vec![raised];
        if !self.has_room(&raised) {
            return;
        }
        if mutant_is!(self, ConfirmBeforeDurable) {
            let message = Message::Stored {
                to: incarnation,
                operation,
                generation,
            };
            self.send(from, message);
        }
        self.record(Learning { from, raised, then });
    }

    /// Says what is durable here of the name that `operation` of another member is about.
    pub(super) fn confirm(&mut self, to: MemberId, incarnation: Incarnation, operation: OperationId, name: &str) {
        let message = Message::Stored {
            to: incarnation,
            operation,
            generation: self.names.generation(name),
        };
        self.send(to, message);
    }

    fn is_raised(&self, (name, generation): &Raised) -> bool {
        self.is_name(name) && *generation > Generation(0) && generation.0 < u64::MAX
    }

    fn is_news(&self, name: &str, generation: Generation) -> bool {
        generation > self.names.generation(name)
            || (generation < self.names.generation(name) && mutant_is!(self, MergeByLatest))
    }

    /// Whether the table has room for these names and those that are being recorded.
    fn has_room(&mut self, raised: &[Raised]) -> bool {
        let new = self.names.new_names(raised);
        if new == 0 {
            return true;
        }
        let recording = self.records.values();
        let coming: usize = recording.map(|learning| self.names.new_names(&learning.raised)).sum();
        let room = self.names.len() + coming + new <= self.settings.names_max;
        self.counters.names_refused += u64::from(!room);
        room
    }

    fn record(&mut self, learning: Learning) {
        let operation = self.operation();
        self.actions.push_back(ClusterAction::Record {
            operation,
            raised: learning.raised.clone(),
        });
        self.records.insert(operation, learning);
    }

    /// Records a generation that a raise of this member's own chose.
    pub(super) fn record_own(&mut self, raise: OperationId, raised: Raised) {
        let learning = Learning {
            from: self.settings.own,
            raised: vec![raised],
            then: Then::Raise(raise),
        };
        self.record(learning);
    }
}
