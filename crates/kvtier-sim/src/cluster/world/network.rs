//! Messages on their way.

use kvtier_core::cluster::{Known, MemberId, Message, Round};

use super::{Happening, World};

impl World {
    pub(super) fn send(&mut self, from: MemberId, to: MemberId, message: Message) {
        let rates = self.plan.rates;
        if self.cut[from.0 as usize][to.0 as usize] || self.strikes(rates.lost, "fault lost") {
            return;
        }
        if self.strikes(rates.invalid, "fault invalid") {
            let wrong = self.invalid(&message);
            self.on_its_way(from, to, wrong);
        }
        if self.strikes(rates.duplicate, "fault duplicate") {
            self.on_its_way(from, to, message.clone());
        }
        self.on_its_way(from, to, message);
    }

    fn on_its_way(&mut self, from: MemberId, to: MemberId, message: Message) {
        let mut delay_ns = self.random.exponential(self.plan.latency_ns);
        if self.strikes(self.plan.rates.late, "fault late") {
            let most = self.lease_ns() * 3;
            delay_ns += self.random.below(most);
        }
        self.after(delay_ns, Happening::Deliver { from, to, message });
    }

    /// What no member would say: a grant of a round to come, or more known than there is.
    fn invalid(&self, message: &Message) -> Message {
        match message {
            Message::Grant { to, round, known, .. } => Message::Grant {
                to: *to,
                round: Round(round.0 + 1_000_000),
                known: *known,
                complete: true,
                raised: Vec::new(),
            },
            Message::Renew {
                incarnation,
                round,
                known,
            } => Message::Renew {
                incarnation: *incarnation,
                round: *round,
                known: known.map(|known| Known {
                    incarnation: known.incarnation,
                    version: kvtier_core::cluster::Version(known.version.0 + 1_000_000),
                }),
            },
            other => other.clone(),
        }
    }
}
