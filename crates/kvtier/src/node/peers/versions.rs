//! How often each member raised each namespace's generation, as far as this node knows: durable, and never less than before.
//!
//! A generation is a node's own count: two nodes may reach the same one by different invalidations. What peers compare is
//! [`Versions`], a counter for each member that ever raised it. Who raises a namespace adds one to its own counter; who
//! learns that another's is higher raises its own generation and takes the counter over. So a block written under equal
//! lists was written after every invalidation that its reader knows of.
//!
//! The order is: generation in force, generation durable, counters durable, counters in force. Between the first and the
//! last step the node neither reads the namespace from peers nor tells them what it has.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use kvtier_core::{Generation, NamespaceId};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::message::{MemberKey, Versions};
use crate::keys::KeyError;
use crate::purge::journal::Journal;

const FILE: &str = "peers.versions";
/// The file is written anew at a start once it is larger.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// In a file that is written anew.
const COUNTERS_A_FRAME: usize = 1024;

/// What raised a generation of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// An invalidation here.
    Own,
    /// Counters of other members, for the operation of the machine that told them.
    Learned(Vec<(MemberKey, u64)>),
}

/// A counter that is durable now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counter {
    /// `DOMAIN/NAME`.
    pub(crate) namespace: String,
    /// Whose invalidations it counts.
    #[serde(with = "hex_member")]
    pub(crate) member: MemberKey,
    /// How many.
    pub(crate) count: u64,
}

/// See the module.
pub(crate) struct VersionBook {
    own: MemberKey,
    state: Mutex<State>,
    journal: Mutex<Journal>,
    path: PathBuf,
}

#[derive(Default)]
struct State {
    names: HashMap<String, Versions>,
    /// Generations that are in force and whose counters are not.
    pending: HashMap<NamespaceId, Vec<(Generation, Cause)>>,
}

impl VersionBook {
    pub(crate) fn open(directory: &Path, own: MemberKey) -> Result<VersionBook, KeyError> {
        let path = directory.join(FILE);
        let (mut journal, entries) = Journal::open::<Vec<Counter>>(&path)?;
        let mut state = State::default();
        for counter in entries.into_iter().flatten() {
            state.merge(&counter);
        }
        if journal.bytes() > FILE_BYTES_MAX {
            journal = Journal::compact(&path, state.counters().chunks(COUNTERS_A_FRAME))?;
        }
        Ok(VersionBook {
            own,
            state: Mutex::new(state),
            journal: Mutex::new(journal),
            path,
        })
    }

    /// Which member this node is.
    pub(crate) fn own(&self) -> MemberKey {
        self.own
    }

    /// Every counter there is.
    pub(crate) fn counters(&self) -> Vec<Counter> {
        self.state.lock().counters()
    }

    /// How often this node itself invalidated a namespace.
    pub(crate) fn own_counter(&self, name: &str) -> Option<Counter> {
        let state = self.state.lock();
        let count = *state.names.get(name)?.0.get(&self.own)?;
        Some(Counter {
            namespace: name.to_owned(),
            member: self.own,
            count,
        })
    }

    /// What this node knows of a namespace; `None` while its generation is being raised.
    pub(crate) fn of(&self, namespace: NamespaceId, name: &str) -> Option<Versions> {
        let state = self.state.lock();
        if state.pending.contains_key(&namespace) {
            return None;
        }
        Some(state.names.get(name).cloned().unwrap_or_default())
    }

    /// A generation of the namespace was raised to `target` a moment ago, under the lock that is still held.
    pub(crate) fn begin(&self, namespace: NamespaceId, target: Generation, cause: Cause) {
        let mut state = self.state.lock();
        state.pending.entry(namespace).or_default().push((target, cause));
    }

    /// The namespace is durable at this generation: its counters follow. Those that changed, once they are durable and in
    /// force.
    pub(crate) fn settle(
        &self,
        namespace: NamespaceId,
        name: &str,
        generation: Generation,
    ) -> Result<Vec<Counter>, KeyError> {
        let changes = {
            let state = self.state.lock();
            let due = state.pending.get(&namespace).into_iter().flatten();
            let due = due.filter(|(target, _)| *target <= generation).map(|(_, cause)| cause);
            state.changes(self.own, name, due)
        };
        self.record(&changes)?;
        let mut state = self.state.lock();
        for change in &changes {
            state.merge(change);
        }
        if let Some(pending) = state.pending.get_mut(&namespace) {
            pending.retain(|(target, _)| *target > generation);
            if pending.is_empty() {
                state.pending.remove(&namespace);
            }
        }
        Ok(changes)
    }

    /// What was deleted from a namespace here must not be read again from a peer: one more invalidation, of which this
    /// node's own blocks know.
    pub(crate) fn set_apart(&self, name: &str) -> Result<Counter, KeyError> {
        let changes = self.state.lock().changes(self.own, name, [&Cause::Own].into_iter());
        self.record(&changes)?;
        let mut state = self.state.lock();
        for change in &changes {
            state.merge(change);
        }
        Ok(changes.into_iter().next().expect("the own counter"))
    }

    /// Takes over counters of a namespace that this node does not have, durably.
    pub(crate) fn learn(&self, name: &str, learned: &[(MemberKey, u64)]) -> Result<(), KeyError> {
        let cause = Cause::Learned(learned.to_vec());
        let changes = self.state.lock().changes(self.own, name, [&cause].into_iter());
        self.record(&changes)?;
        let mut state = self.state.lock();
        for change in &changes {
            state.merge(change);
        }
        Ok(())
    }

    /// Whether each of these counters is known, durably.
    pub(crate) fn knows(&self, name: &str, member: MemberKey, count: u64) -> bool {
        let state = self.state.lock();
        let known = state.names.get(name).and_then(|versions| versions.0.get(&member));
        known.copied().unwrap_or(0) >= count
    }

    fn record(&self, changes: &[Counter]) -> Result<(), KeyError> {
        if changes.is_empty() {
            return Ok(());
        }
        let mut journal = self.journal.lock();
        journal.append(&changes).inspect_err(|_| {
            tracing::error!(path = %self.path.display(), "what peers invalidated cannot be made durable: free space in the state directory");
        })
    }
}

impl State {
    fn merge(&mut self, counter: &Counter) {
        let versions = self.names.entry(counter.namespace.clone()).or_default();
        let known = versions.0.entry(counter.member).or_default();
        *known = (*known).max(counter.count);
    }

    fn changes<'a>(&self, own: MemberKey, name: &str, causes: impl Iterator<Item = &'a Cause>) -> Vec<Counter> {
        let known = self.names.get(name).cloned().unwrap_or_default();
        let mut changed = Versions::default();
        for cause in causes {
            match cause {
                Cause::Own => {
                    let count = known.0.get(&own).copied().unwrap_or(0) + 1;
                    changed.0.insert(own, count);
                }
                Cause::Learned(learned) => {
                    for &(member, count) in learned {
                        if known.0.get(&member).copied().unwrap_or(0) < count {
                            let entry = changed.0.entry(member).or_default();
                            *entry = (*entry).max(count);
                        }
                    }
                }
            }
        }
        let counter = |(member, count)| Counter {
            namespace: name.to_owned(),
            member,
            count,
        };
        changed.0.into_iter().map(counter).collect()
    }

    fn counters(&self) -> Vec<Counter> {
        let mut counters: Vec<Counter> = self
            .names
            .iter()
            .flat_map(|(name, versions)| {
                versions.0.iter().map(|(&member, &count)| Counter {
                    namespace: name.clone(),
                    member,
                    count,
                })
            })
            .collect();
        counters.sort_by(|one, other| (&one.namespace, one.member).cmp(&(&other.namespace, other.member)));
        counters
    }
}

impl MemberKey {
    /// Of 32 hexadecimal digits.
    pub(crate) fn parse(text: &str) -> Option<MemberKey> {
        let mut bytes = [0; 16];
        if text.len() != 32 || !text.is_ascii() {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().as_chunks::<2>().0) {
            let digits = std::str::from_utf8(pair).ok()?;
            *byte = u8::from_str_radix(digits, 16).ok()?;
        }
        Some(MemberKey(bytes))
    }
}

impl std::fmt::Display for MemberKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

mod hex_member {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::MemberKey;

    pub(super) fn serialize<S: Serializer>(member: &MemberKey, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(member)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<MemberKey, D::Error> {
        let text = String::deserialize(deserializer)?;
        MemberKey::parse(&text).ok_or_else(|| D::Error::custom("32 hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MemberKey = MemberKey([1; 16]);
    const OTHER: MemberKey = MemberKey([2; 16]);
    const NAMESPACE: NamespaceId = NamespaceId(3);

    fn open(directory: &Path) -> VersionBook {
        VersionBook::open(directory, OWN).expect("a private directory")
    }

    fn versions(entries: &[(MemberKey, u64)]) -> Option<Versions> {
        Some(Versions(entries.iter().copied().collect()))
    }

    #[test]
    fn an_invalidation_counts_once_it_is_durable_and_survives() {
        let directory = tempfile::tempdir().expect("a directory");
        let book = open(directory.path());
        assert_eq!(book.of(NAMESPACE, "a/n"), versions(&[]));
        book.begin(NAMESPACE, Generation(2), Cause::Own);
        assert_eq!(book.of(NAMESPACE, "a/n"), None, "neither the old nor the new list is true now");
        let changed = book.settle(NAMESPACE, "a/n", Generation(2)).expect("written");
        assert_eq!(changed.len(), 1);
        assert_eq!(book.of(NAMESPACE, "a/n"), versions(&[(OWN, 1)]));
        drop(book);
        assert_eq!(open(directory.path()).of(NAMESPACE, "a/n"), versions(&[(OWN, 1)]));
    }

    #[test]
    fn what_was_raised_after_the_durable_generation_stays_pending() {
        let directory = tempfile::tempdir().expect("a directory");
        let book = open(directory.path());
        book.begin(NAMESPACE, Generation(2), Cause::Own);
        book.begin(NAMESPACE, Generation(3), Cause::Learned(vec![(OTHER, 5)]));
        book.settle(NAMESPACE, "a/n", Generation(2)).expect("written");
        assert_eq!(book.of(NAMESPACE, "a/n"), None);
        assert!(!book.knows("a/n", OTHER, 5));
        book.settle(NAMESPACE, "a/n", Generation(3)).expect("written");
        assert_eq!(book.of(NAMESPACE, "a/n"), versions(&[(OWN, 1), (OTHER, 5)]));
    }

    #[test]
    fn counters_never_fall() {
        let directory = tempfile::tempdir().expect("a directory");
        let book = open(directory.path());
        book.learn("a/n", &[(OTHER, 5)]).expect("written");
        book.learn("a/n", &[(OTHER, 4)]).expect("nothing to write");
        assert!(book.knows("a/n", OTHER, 5) && !book.knows("a/n", OTHER, 6));
        assert_eq!(book.counters().len(), 1);
    }

    #[test]
    fn two_nodes_that_invalidate_at_once_differ_until_each_has_learned_of_the_other() {
        let (one, other) = (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("other"));
        let (a, b) = (open(one.path()), VersionBook::open(other.path(), OTHER).expect("private"));
        for book in [&a, &b] {
            book.begin(NAMESPACE, Generation(2), Cause::Own);
            book.settle(NAMESPACE, "n", Generation(2)).expect("written");
        }
        assert_ne!(a.of(NAMESPACE, "n"), b.of(NAMESPACE, "n"));
        a.learn("n", &[(OTHER, 1)]).expect("written");
        assert_ne!(a.of(NAMESPACE, "n"), b.of(NAMESPACE, "n"));
        b.learn("n", &[(OWN, 1)]).expect("written");
        assert_eq!(a.of(NAMESPACE, "n"), b.of(NAMESPACE, "n"));
    }
}
