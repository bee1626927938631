use std::collections::VecDeque;
use std::time::Duration;

use super::Round;
use crate::Time;

/// This member's lease: rounds that were sent, who granted which, until when it may serve.
pub(super) struct Fence {
    /// The last rounds and when they were sent, as long as they may give a lease.
    sent: VecDeque<(Round, Time)>,
    /// The latest round.
    round: Round,
    /// The highest round that each other member granted. A grant of a round is one of all before it: it was given later, and with more.
    granted: Vec<Option<Round>>,
    until: Option<Time>,
}

impl Fence {
    pub(super) fn new(members: u32) -> Fence {
        Fence {
            sent: VecDeque::new(),
            round: Round(0),
            granted: vec![None; members as usize],
            until: None,
        }
    }

    /// The latest round that was sent; zero before the first.
    pub(super) fn round(&self) -> Round {
        self.round
    }

    pub(super) fn begin(&mut self, now: Time, ttl: Duration) -> Round {
        while self.sent.front().is_some_and(|(_, sent)| sent.after(ttl) <= now) {
            self.sent.pop_front();
        }
        self.round.0 += 1;
        self.sent.push_back((self.round, now));
        self.round
    }

    /// How many others granted a round in this run.
    pub(super) fn granting(&self) -> usize {
        self.granted.iter().flatten().count()
    }

    /// Another member grants this round and those before it. True where the lease got longer: `others` of them, beside this one, are a majority.
    pub(super) fn grant(&mut self, member: usize, round: Round, others: usize, ttl: Duration) -> bool {
        let granted = &mut self.granted[member];
        *granted = (*granted).max(Some(round));
        let until = self.agreed(others).map(|sent| sent.after(ttl));
        let longer = until > self.until;
        self.until = self.until.max(until);
        longer
    }

    /// When the latest round was sent that `others` members granted.
    fn agreed(&self, others: usize) -> Option<Time> {
        let mut rounds: Vec<Round> = self.granted.iter().flatten().copied().collect();
        rounds.sort_unstable_by(|left, right| right.cmp(left));
        let round = match others {
            0 => self.round,
            others => *rounds.get(others - 1)?,
        };
        let sent = self.sent.iter().rev().find(|(sent, _)| *sent <= round);
        sent.map(|(_, sent)| *sent)
    }

    /// The lease ends no earlier than that.
    #[cfg(feature = "mutants")]
    pub(super) fn extend(&mut self, until: Time) {
        self.until = self.until.max(Some(until));
    }

    pub(super) fn until(&self) -> Option<Time> {
        self.until
    }

    pub(super) fn holds(&self, now: Time) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_nanos(100);

    #[test]
    fn a_lease_counts_from_the_sending_of_the_round_that_a_majority_granted() {
        let mut fence = Fence::new(5);
        let first = fence.begin(Time(10), TTL);
        let second = fence.begin(Time(40), TTL);
        assert!(!fence.grant(1, second, 2, TTL));
        assert!(!fence.holds(Time(41)));
        assert!(fence.grant(2, first, 2, TTL));
        assert_eq!(fence.until(), Some(Time(110)));
        assert!(fence.grant(3, second, 2, TTL));
        assert_eq!(fence.until(), Some(Time(140)));
        assert!(fence.holds(Time(139)));
        assert!(!fence.holds(Time(140)));
    }

    #[test]
    fn a_grant_that_comes_again_or_late_changes_nothing() {
        let mut fence = Fence::new(3);
        let first = fence.begin(Time(10), TTL);
        let second = fence.begin(Time(40), TTL);
        assert!(fence.grant(1, second, 1, TTL));
        assert!(!fence.grant(1, second, 1, TTL));
        assert!(!fence.grant(1, first, 1, TTL));
        assert!(!fence.grant(2, first, 1, TTL));
        assert_eq!(fence.until(), Some(Time(140)));
    }

    #[test]
    fn rounds_that_can_give_no_lease_are_forgotten() {
        let mut fence = Fence::new(3);
        let first = fence.begin(Time(0), TTL);
        for sent in 1..50 {
            fence.begin(Time(sent * 50), TTL);
        }
        assert!(fence.sent.len() <= 3, "{}", fence.sent.len());
        assert!(!fence.grant(1, first, 1, TTL));
        assert_eq!(fence.until(), None);
    }
}
