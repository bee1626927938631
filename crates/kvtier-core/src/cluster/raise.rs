use std::sync::Arc;
use std::time::Duration;

use super::{CheckedClusterSettings, MemberId};
use crate::{Generation, Time};

/// What is known of one other member.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    /// What it had when it was asked.
    pub(super) told: Option<Generation>,
    pub(super) confirmed: bool,
}

/// What the driver was told of a raise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    Nothing,
    NotStored,
    Reached,
}

/// What is to be said to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Ask,
    Store,
    Nothing,
}

/// A purge on its way to every member.
pub(super) struct Raise {
    pub(super) name: Arc<str>,
    /// What all shall have. Only ever higher.
    pub(super) target: Generation,
    pub(super) deadline: Time,
    pub(super) begun: Time,
    /// By member; this one's own place is not used.
    pub(super) members: Vec<Progress>,
    /// Enough members told what they have: with a fence the target stands.
    pub(super) surveyed: bool,
    /// This member's own record of the target is in flight.
    pub(super) recording: bool,
    /// From when on a majority is known to have the target.
    pub(super) stored_at: Option<Time>,
    pub(super) told: Told,
    pub(super) resend_at: Time,
    pub(super) backoff: Duration,
}

impl Raise {
    fn others<'a>(&'a self, settings: &'a CheckedClusterSettings) -> impl Iterator<Item = (MemberId, Progress)> + 'a {
        settings
            .others()
            .map(|member| (member, self.members[member.0 as usize]))
    }

    pub(super) fn telling(&self, settings: &CheckedClusterSettings) -> usize {
        self.others(settings)
            .filter(|(_, progress)| progress.told.is_some())
            .count()
    }

    pub(super) fn highest_told(&self) -> Generation {
        let told = self.members.iter().filter_map(|progress| progress.told);
        told.max().unwrap_or(Generation(0))
    }

    pub(super) fn confirming(&self, settings: &CheckedClusterSettings) -> usize {
        self.others(settings).filter(|(_, progress)| progress.confirmed).count()
    }

    pub(super) fn is_confirmed(&self, settings: &CheckedClusterSettings) -> bool {
        self.others(settings).all(|(_, progress)| progress.confirmed)
    }

    /// Those who confirmed, and those who did not; this member is one of the former where it has the target.
    pub(super) fn split(&self, settings: &CheckedClusterSettings, own: bool) -> (Vec<MemberId>, Vec<MemberId>) {
        (0..settings.members).map(MemberId).partition(|member| {
            if *member == settings.own {
                own
            } else {
                self.members[member.0 as usize].confirmed
            }
        })
    }

    /// Whether a member that has this generation durable has confirmed.
    ///
    /// With a fence: once the target stands, whoever has it. Without one nothing is settled and no majority tells for others: a member confirms by having
    /// more than it had when it was asked.
    pub(super) fn confirms(&self, member: MemberId, generation: Generation, fenced: bool) -> bool {
        let progress = self.members[member.0 as usize];
        if progress.confirmed {
            return false;
        }
        if fenced {
            self.surveyed && generation >= self.target
        } else {
            progress.told.is_some_and(|told| generation > told)
        }
    }

    /// What a member is to be told next; `own` is whether this one has the target durable.
    pub(super) fn step(&self, member: MemberId, fenced: bool, own: bool) -> Step {
        let progress = self.members[member.0 as usize];
        if progress.confirmed {
            Step::Nothing
        } else if (fenced && self.surveyed) || (!fenced && progress.told.is_some()) {
            if own { Step::Store } else { Step::Nothing }
        } else if progress.told.is_none() {
            Step::Ask
        } else {
            Step::Nothing
        }
    }
}
