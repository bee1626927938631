mod raising;
mod receive;
mod recording;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::fence::Fence;
use super::learning::Learning;
use super::name_table::NameTable;
use super::raise::Raise;
use super::{
    CheckedClusterSettings, ClusterAction, ClusterStatistics, Incarnation, Known, MemberId, Message, Raised, Version,
};
use crate::{Generation, OperationId, SettingsError, Time};

/// A purge to be carried to every member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaiseRequest {
    /// Whose.
    pub name: Arc<str>,
    /// What this node's register was raised to: durable and in force. A coordinator that starts again raises its register to what `Reached` named first.
    pub generation: Generation,
    /// For a coordinator that started again, where [`ClusterAction::Reached`] named this generation for this purge before ([`super::Reach::NotStored`] does not count):
    /// who had confirmed. It goes on for the others, and `Reached` is not told again.
    pub reached: Option<Vec<MemberId>>,
    /// Until when a majority, or without a fence every member, should have it.
    pub deadline: Time,
}

/// Why a raise was not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RaiseRefusal {
    /// [`super::ClusterSettings::operations_max`] are open. The generation spreads with renewals, but nobody tells how far.
    #[error("too many purges wait for members to confirm: try again when some have, or abandon the oldest")]
    Busy,
    /// No member would take it.
    #[error("a name has 1 to `name_bytes_max` bytes and is raised above 0 and below 2^64 - 1")]
    Invalid,
}

/// What is known of another member.
#[derive(Clone, Copy, Default)]
struct Peer {
    /// How much of its table is durable here.
    known: Option<Known>,
    /// How much of this one's table is durable there.
    has: Version,
    /// A grant of its is being recorded.
    learning: bool,
}

/// One member's part in carrying purges to all of them, and its fence: the module says how.
///
/// Like [`crate::TierManager`] it never does anything itself: calls change it, what it wants done is drained with [`Cluster::poll_action`], and it asks to be called
/// again by [`Cluster::poll_timeout`]. The same calls in the same order give the same actions.
pub struct Cluster {
    settings: CheckedClusterSettings,
    incarnation: Incarnation,
    /// The latest time seen: it never runs backwards.
    now: Time,
    actions: VecDeque<ClusterAction>,
    next_operation: u64,
    names: NameTable,
    /// By member; this one's own place is not used.
    peers: Vec<Peer>,
    fence: Fence,
    renew_at: Time,
    /// What the driver was told last.
    serving: bool,
    raises: BTreeMap<OperationId, Raise>,
    /// When each open raise wants to be looked at.
    due: BTreeSet<(Time, OperationId)>,
    records: BTreeMap<OperationId, Learning>,
    counters: ClusterStatistics,
}

impl Cluster {
    /// A member that starts at `now` with what its register has: `durable` is in force already. It renews at once, and with a fence it does not serve before that.
    ///
    /// # Errors
    /// A name that is empty or longer than `name_bytes_max`.
    pub fn new(
        settings: CheckedClusterSettings,
        incarnation: Incarnation,
        durable: impl IntoIterator<Item = Raised>,
        now: Time,
    ) -> Result<Cluster, SettingsError> {
        let mut names = NameTable::default();
        for (name, generation) in durable {
            if name.is_empty() || name.len() > settings.name_bytes_max {
                return Err(SettingsError {
                    field: "name_bytes_max",
                    value: format!(
                        "{}, and the register has a name of {} bytes",
                        settings.name_bytes_max,
                        name.len()
                    ),
                    remedy: "give room for every name of the register".to_owned(),
                });
            }
            names.raise(&name, generation);
        }
        Ok(Cluster {
            incarnation,
            now,
            actions: VecDeque::new(),
            next_operation: 1,
            names,
            peers: vec![Peer::default(); settings.members as usize],
            fence: Fence::new(settings.members),
            renew_at: now,
            serving: false,
            raises: BTreeMap::new(),
            due: BTreeSet::new(),
            records: BTreeMap::new(),
            counters: ClusterStatistics::default(),
            settings,
        })
    }

    /// Whether this member may serve reads at `now`. Where not, every read is a miss.
    #[must_use]
    pub fn is_serving(&self, now: Time) -> bool {
        !self.settings.fenced || self.fence.holds(self.now.max(now))
    }

    /// Until when the lease lasts as it stands; `None` before the first, and without a fence.
    #[must_use]
    pub fn lease_until(&self) -> Option<Time> {
        self.fence.until().filter(|_| self.settings.fenced)
    }

    /// Whether blocks may be published under this generation of the name, the one in force. With a fence a majority has to be known to have it; without one this
    /// member has to know that it is recorded, which it does not between the record and the answer: a purge of another that asks would not be told of it, and
    /// would not go above it.
    #[must_use]
    pub fn is_settled(&self, name: &str, generation: Generation) -> bool {
        if generation == Generation(0) || self.mutant_settles() {
            return true;
        }
        if generation > self.names.generation(name) {
            return false;
        }
        if !self.settings.fenced {
            return true;
        }
        let holding = self
            .settings
            .others()
            .filter(|member| self.holds(name, *member))
            .count();
        holding + 1 >= self.majority()
    }

    /// The highest generation of this name that is durable and in force here; zero where it was never raised.
    #[must_use]
    pub fn generation(&self, name: &str) -> Generation {
        self.names.generation(name)
    }

    /// How many other members have told all they know since this one started. Without a fence, whoever wants to learn before it serves
    /// waits for those that it can reach.
    #[must_use]
    pub fn learnt_from(&self) -> usize {
        self.fence.granting()
    }

    /// Counters and gauges.
    #[must_use]
    pub fn statistics(&self) -> ClusterStatistics {
        ClusterStatistics {
            names: self.names.len() as u64,
            operations: self.raises.len() as u64,
            records_in_flight: self.records.len() as u64,
            ..self.counters
        }
    }

    /// This node raised a name by itself, for no purge of the cluster: durable and in force. Others learn it with their next renewals.
    ///
    /// # Errors
    /// [`RaiseRefusal`]: others will not learn it.
    pub fn note(&mut self, name: &Arc<str>, generation: Generation, now: Time) -> Result<(), RaiseRefusal> {
        self.advance(now);
        self.take_own(name, generation)
    }

    /// Takes what this node's own register has, which knows its own bound: what is not in the table would not be told to those who ask.
    fn take_own(&mut self, name: &Arc<str>, generation: Generation) -> Result<(), RaiseRefusal> {
        if !self.is_name(name) || generation == Generation(0) || generation.0 == u64::MAX {
            return Err(RaiseRefusal::Invalid);
        }
        self.names.raise(name, generation);
        Ok(())
    }

    /// The next thing to do, in order. Call until `None` after every command, message, event and timeout.
    #[must_use]
    pub fn poll_action(&mut self) -> Option<ClusterAction> {
        self.actions.pop_front()
    }

    /// When [`Cluster::handle_timeout`] is to be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let lapse = self.fence.until().filter(|_| self.serving && self.settings.fenced);
        let due = self.due.first().map(|(due, _)| *due);
        [Some(self.renew_at), lapse, due].into_iter().flatten().min()
    }

    /// Whatever is due at `now`.
    pub fn handle_timeout(&mut self, now: Time) {
        self.advance(now);
        if self.renew_at <= self.now {
            self.renew();
        }
        while let Some((due, operation)) = self.due.first().copied()
            && due <= self.now
        {
            self.attend(operation);
        }
    }

    fn renew(&mut self) {
        self.fence.begin(self.now, self.settings.lease_ttl);
        self.renew_at = self.now.after(self.settings.renew_every);
        self.counters.rounds += 1;
        for member in self.settings.others() {
            self.send_renew(member);
        }
    }

    fn send_renew(&mut self, to: MemberId) {
        let message = Message::Renew {
            incarnation: self.incarnation,
            round: self.fence.round(),
            known: self.peers[to.0 as usize].known,
        };
        self.send(to, message);
    }

    fn send(&mut self, to: MemberId, message: Message) {
        self.actions.push_back(ClusterAction::Send { to, message });
    }

    fn advance(&mut self, now: Time) {
        self.now = self.now.max(now);
        self.tell_serving();
    }

    fn tell_serving(&mut self) {
        let serving = self.is_serving(self.now);
        if serving != self.serving {
            self.serving = serving;
            self.counters.lapses += u64::from(!serving);
            self.actions.push_back(ClusterAction::Serving { serving });
        }
    }

    fn operation(&mut self) -> OperationId {
        let operation = OperationId(self.next_operation);
        self.next_operation += 1;
        operation
    }

    /// Whether another member is known to have as much of the name as this one.
    fn holds(&self, name: &str, member: MemberId) -> bool {
        self.names.is_held(name, member, self.peers[member.0 as usize].has)
    }

    fn is_name(&self, name: &str) -> bool {
        !name.is_empty() && name.len() <= self.settings.name_bytes_max
    }

    fn majority(&self) -> usize {
        if mutant_is!(self, MinorityIsMajority) {
            return self.settings.members as usize / 2;
        }
        self.settings.majority()
    }

    fn mutant_settles(&self) -> bool {
        mutant_is!(self, UnsettledPublished)
    }

    #[cfg(feature = "mutants")]
    fn mutant_is(&self, mutant: super::ClusterMutant) -> bool {
        self.settings.mutant == Some(mutant)
    }
}

/// Whether a planted bug is active. Without the feature `mutants` this is `false` at compile time.
macro_rules! mutant_is {
    ($cluster:expr, $mutant:ident) => {{
        #[cfg(feature = "mutants")]
        let active = $cluster.mutant_is(crate::cluster::ClusterMutant::$mutant);
        #[cfg(not(feature = "mutants"))]
        let active = false;
        active
    }};
}
use mutant_is;
