//! Objects that every member of the cluster can read: members hand each other the keys of theirs, and all write under the key of the first
//! of them, so that before long everything of a namespace lies in one group.
//!
//! What was handed over is kept in memory alone, and for as long as the counters of the namespace's invalidations are what they were: an
//! invalidation anywhere ends the group for whoever has heard of it. A member that was cut off and has not heard of it is told apart by
//! its counters, as in reading from peers.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_core::{Generation, NamespaceId, RealizationId};
use parking_lot::Mutex;

use super::{Place, Remote};
use crate::node::peers::{self, MemberKey, SharedGroup, Versions};

/// How long other members may take to answer, together.
const PATIENCE: Duration = Duration::from_millis(200);
/// Those that are there and had nothing to hand over are asked again after so long.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// Groups that are looked in. Members that were there together write to one.
const GROUPS_MAX: usize = 4;

/// What other members handed over, by namespace.
pub(super) struct Sharing {
    is_on: bool,
    known: Mutex<HashMap<NamespaceId, Known>>,
}

struct Known {
    versions: Versions,
    groups: BTreeMap<MemberKey, SharedGroup>,
    asked: Instant,
}

impl Sharing {
    pub(super) fn new(is_on: bool) -> Sharing {
        Sharing {
            is_on,
            known: Mutex::default(),
        }
    }

    /// The groups of these invalidations, this node's among them: where it writes comes first, then its own.
    fn groups(&self, namespace: NamespaceId, versions: &Versions, own: (MemberKey, SharedGroup)) -> Vec<SharedGroup> {
        let own_key = own.0;
        let mut groups = BTreeMap::from([own]);
        let mut known = self.known.lock();
        match known.get(&namespace) {
            Some(entry) if entry.versions == *versions => groups.extend(entry.groups.clone()),
            Some(_) => drop(known.remove(&namespace)),
            None => {}
        }
        drop(known);
        let first = groups.pop_first();
        let own = groups.remove(&own_key);
        let ordered = first.map(|(_, group)| group).into_iter().chain(own);
        ordered.chain(groups.into_values()).take(GROUPS_MAX).collect()
    }

    /// Forgets, and zeroes, what others handed over.
    pub(super) fn drop_handed_over(&self, namespace: NamespaceId) {
        self.known.lock().remove(&namespace);
    }

    /// Keys that were handed over and are in force, as far as is known.
    pub(super) fn count(&self) -> u64 {
        let known = self.known.lock();
        known.values().map(|entry| entry.groups.len() as u64).sum()
    }

    /// Which of the members that are there are to be asked now. Who is told so asks.
    fn due(&self, namespace: NamespaceId, versions: &Versions, live: &[MemberKey]) -> Vec<MemberKey> {
        let mut known = self.known.lock();
        let now = Instant::now();
        match known.get_mut(&namespace) {
            Some(entry) if entry.versions == *versions => {
                let has_group = |member: &&MemberKey| !entry.groups.contains_key(member);
                let missing: Vec<MemberKey> = live.iter().filter(has_group).copied().collect();
                if missing.is_empty() || entry.asked.elapsed() < ASK_AGAIN {
                    return Vec::new();
                }
                entry.asked = now;
                missing
            }
            _ if live.is_empty() => Vec::new(),
            _ => {
                let entry = Known {
                    versions: versions.clone(),
                    groups: BTreeMap::new(),
                    asked: now,
                };
                known.insert(namespace, entry);
                live.to_vec()
            }
        }
    }

    fn note(&self, namespace: NamespaceId, versions: &Versions, groups: Vec<(MemberKey, SharedGroup)>) {
        if let Some(entry) = self.known.lock().get_mut(&namespace)
            && entry.versions == *versions
        {
            entry.groups.extend(groups);
        }
    }
}

impl Remote {
    /// Whether members read each other's objects.
    pub(in crate::node) fn shares_groups(&self) -> bool {
        self.sharing.is_on
    }

    pub(super) fn sharing_peers(&self) -> Option<Arc<peers::Shared>> {
        self.sharing.is_on.then(|| self.driver.peers()).flatten()
    }

    /// Asks members for their keys, where that was not done: not on a thread that a client waits for at once.
    pub(super) fn meet(&self, namespace: NamespaceId) {
        let Some(peers) = self.sharing_peers() else { return };
        let Some(name) = self.shared_name(namespace) else {
            return;
        };
        let Some(versions) = self.versions.of(namespace, &name) else {
            return;
        };
        let due = self.sharing.due(namespace, &versions, &peers.live_members());
        if !due.is_empty() {
            let groups = peers.ask_for_groups(&due, &name, &versions, Instant::now() + PATIENCE);
            self.sharing.note(namespace, &versions, groups);
        }
    }

    /// Where the objects of a generation lie, the first where this node writes; `None` while it is being raised, and once it is not in force
    /// any more: also where the key is another member's.
    pub(super) fn places(
        &self,
        namespace: NamespaceId,
        realization: RealizationId,
        generation: Generation,
    ) -> Option<Vec<Place>> {
        let name = self.shared_name(namespace)?;
        let versions = self.versions.of(namespace, &name)?;
        let own = self.own_group(namespace, generation, &versions)?;
        let groups = self.sharing.groups(namespace, &versions, (self.versions.own(), own));
        let place = |group: &SharedGroup| self.place_of(namespace, &name, realization, group);
        groups.iter().map(place).collect()
    }

    /// What this node's own objects of a namespace are sealed with, for a member that knows of the same invalidations.
    pub(in crate::node) fn group_to_share(&self, namespace: NamespaceId, versions: &Versions) -> Option<SharedGroup> {
        if !self.sharing.is_on {
            return None;
        }
        let name = self.shared_name(namespace)?;
        // Before the counters: where it is raised meanwhile, there is no key for it any more, or counters that are not equal.
        let generation = self.driver.look(|manager| manager.generation(namespace));
        if self.versions.of(namespace, &name)? != *versions {
            return None;
        }
        self.own_group(namespace, generation, versions)
    }
}

#[cfg(test)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;

    const NAMESPACE: NamespaceId = NamespaceId(4);

    fn member(byte: u8) -> MemberKey {
        MemberKey([byte; 16])
    }

    fn versions(count: u64) -> Versions {
        Versions(BTreeMap::from([(member(1), count)]))
    }

    fn group(byte: u8) -> SharedGroup {
        SharedGroup {
            generation: [byte; 16],
            key: Zeroizing::new([byte; 32]),
        }
    }

    /// By the first byte of each, this node being member 5.
    fn groups(sharing: &Sharing, count: u64) -> Vec<u8> {
        let groups = sharing.groups(NAMESPACE, &versions(count), (member(5), group(5)));
        groups.iter().map(|group| group.generation[0]).collect()
    }

    #[test]
    fn all_write_to_the_first_and_look_in_their_own_next() {
        let sharing = Sharing::new(true);
        assert_eq!(groups(&sharing, 1), [5]);
        let live = [7, 3, 4, 6].map(member);
        assert_eq!(sharing.due(NAMESPACE, &versions(1), &live), live);
        sharing.note(NAMESPACE, &versions(1), vec![(member(7), group(7))]);
        assert_eq!(groups(&sharing, 1), [5, 7]);
        let more = [4, 3, 6].map(|byte| (member(byte), group(byte)));
        sharing.note(NAMESPACE, &versions(1), more.to_vec());
        assert_eq!(groups(&sharing, 1), [3, 5, 4, 6], "and in four at most");
    }

    #[test]
    fn keys_end_with_the_invalidations_that_they_belong_to() {
        let sharing = Sharing::new(true);
        sharing.due(NAMESPACE, &versions(1), &[member(3)]);
        sharing.note(NAMESPACE, &versions(1), vec![(member(3), group(3))]);
        assert_eq!(groups(&sharing, 2), [5]);
        assert_eq!(groups(&sharing, 1), [5], "and the old one is gone");
        sharing.due(NAMESPACE, &versions(2), &[member(3)]);
        sharing.note(NAMESPACE, &versions(1), vec![(member(3), group(3))]);
        assert_eq!(groups(&sharing, 2), [5], "an answer that came late");
        sharing.note(NAMESPACE, &versions(2), vec![(member(3), group(4))]);
        assert_eq!(groups(&sharing, 2), [4, 5]);
        sharing.drop_handed_over(NAMESPACE);
        assert_eq!(groups(&sharing, 2), [5]);
    }

    #[test]
    fn who_has_answered_is_not_asked_again() {
        let sharing = Sharing::new(true);
        assert_eq!(sharing.due(NAMESPACE, &versions(1), &[]), []);
        assert_eq!(sharing.due(NAMESPACE, &versions(1), &[member(3)]), [member(3)]);
        sharing.note(NAMESPACE, &versions(1), vec![(member(3), group(3))]);
        assert_eq!(
            sharing.due(NAMESPACE, &versions(1), &[member(3), member(4)]),
            [],
            "so soon"
        );
        assert_eq!(sharing.due(NAMESPACE, &versions(2), &[member(3)]), [member(3)]);
    }
}
