//! How often each member raised each namespace's generation, as far as this node knows: durable, and never less than before.
//!
//! A generation is a node's own count: two nodes may reach the same one by different invalidations. What peers compare is
//! [`Versions`], a counter for each member that ever raised it. Who raises a namespace adds one to its own counter; who
//! learns that another's is higher raises its own generation and takes the counter over. So a block written under equal
//! lists was written after every invalidation that its reader knows of.
//!
//! With the counters goes the generation that they were last brought up to. Where the register has a higher one at a start, because the
//! node was killed in between or ran without peers for a while, that counts as one more invalidation here.
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
const NAMES_A_FRAME: usize = 1024;

/// What raised a generation of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// An invalidation here.
    Own,
    /// Counters of other members, for the operation of the machine that told them.
    Learned(Vec<(MemberKey, u64)>),
}

/// A counter that is durable now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Counter {
    /// `DOMAIN/NAME`.
    pub(crate) namespace: String,
    /// Whose invalidations it counts.
    pub(crate) member: MemberKey,
    /// How many.
    pub(crate) count: u64,
}

/// Counters of a namespace that changed together, and the generation of this node that they go with.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    namespace: String,
    generation: u64,
    counters: Vec<(String, u64)>,
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
    names: HashMap<String, Known>,
    /// Generations that are in force and whose counters are not.
    pending: HashMap<NamespaceId, Vec<(Generation, Cause)>>,
}

#[derive(Clone, Default)]
struct Known {
    versions: Versions,
    /// The generation of this node that the counters were brought up to; 0: none yet.
    generation: u64,
}

impl VersionBook {
    pub(crate) fn open(directory: &Path, own: MemberKey) -> Result<VersionBook, KeyError> {
        let path = directory.join(FILE);
        let (mut journal, entries) = Journal::open::<Vec<Entry>>(&path)?;
        let mut state = State::default();
        for entry in entries.iter().flatten() {
            state.merge(entry);
        }
        if journal.bytes() > FILE_BYTES_MAX {
            journal = Journal::compact(&path, state.entries().chunks(NAMES_A_FRAME))?;
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
        let count = *state.names.get(name)?.versions.0.get(&self.own)?;
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
        let known = state.names.get(name);
        Some(known.map(|known| known.versions.clone()).unwrap_or_default())
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
        self.record(&changes, name, generation)?;
        let mut state = self.state.lock();
        if let Some(pending) = state.pending.get_mut(&namespace) {
            pending.retain(|(target, _)| *target > generation);
            if pending.is_empty() {
                state.pending.remove(&namespace);
            }
        }
        Ok(counters(name, &changes))
    }

    /// At a start: what was raised and not counted counts as one more invalidation here.
    pub(crate) fn reconcile(&self, name: &str, generation: Generation, first: Generation) -> Result<bool, KeyError> {
        let known = self.state.lock().names.get(name).map_or(0, |known| known.generation);
        if generation.0 <= known.max(first.0) {
            return Ok(false);
        }
        let changes = self.state.lock().changes(self.own, name, [&Cause::Own].into_iter());
        self.record(&changes, name, generation)?;
        Ok(true)
    }

    /// What was deleted from a namespace here must not be read again from a peer: one more invalidation, of which this
    /// node's own blocks know.
    pub(crate) fn set_apart(&self, name: &str) -> Result<Counter, KeyError> {
        let changes = self.state.lock().changes(self.own, name, [&Cause::Own].into_iter());
        self.record(&changes, name, Generation(0))?;
        Ok(counters(name, &changes).remove(0))
    }

    /// Takes over counters of a namespace that this node does not have, durably.
    pub(crate) fn learn(&self, name: &str, learned: &[(MemberKey, u64)]) -> Result<(), KeyError> {
        let cause = Cause::Learned(learned.to_vec());
        let changes = self.state.lock().changes(self.own, name, [&cause].into_iter());
        if changes.0.is_empty() {
            return Ok(());
        }
        self.record(&changes, name, Generation(0))
    }

    /// Whether this counter is known, durably.
    pub(crate) fn knows(&self, name: &str, member: MemberKey, count: u64) -> bool {
        let state = self.state.lock();
        let known = state.names.get(name).and_then(|known| known.versions.0.get(&member));
        known.copied().unwrap_or(0) >= count
    }

    /// Makes it durable, then puts it in force.
    fn record(&self, changes: &Versions, name: &str, generation: Generation) -> Result<(), KeyError> {
        let entry = Entry {
            namespace: name.to_owned(),
            generation: generation.0,
            counters: changes
                .0
                .iter()
                .map(|(member, count)| (member.to_string(), *count))
                .collect(),
        };
        let appended = self.journal.lock().append(&[&entry]);
        appended.inspect_err(|_| {
            tracing::error!(path = %self.path.display(), "what peers invalidated cannot be made durable: free space in the state directory");
        })?;
        self.state.lock().merge(&entry);
        Ok(())
    }
}

impl State {
    fn merge(&mut self, entry: &Entry) {
        let known = self.names.entry(entry.namespace.clone()).or_default();
        known.generation = known.generation.max(entry.generation);
        for (member, count) in &entry.counters {
            // Written by us: what is no member was damaged, and the journal's sums say so.
            if let Some(member) = MemberKey::parse(member) {
                let counter = known.versions.0.entry(member).or_default();
                *counter = (*counter).max(*count);
            }
        }
    }

    fn changes<'a>(&self, own: MemberKey, name: &str, causes: impl Iterator<Item = &'a Cause>) -> Versions {
        let known = self.names.get(name).cloned().unwrap_or_default().versions;
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
        changed
    }

    fn counters(&self) -> Vec<Counter> {
        self.names
            .iter()
            .flat_map(|(name, known)| counters(name, &known.versions))
            .collect()
    }

    fn entries(&self) -> Vec<Entry> {
        let entry = |(name, known): (&String, &Known)| Entry {
            namespace: name.clone(),
            generation: known.generation,
            counters: known
                .versions
                .0
                .iter()
                .map(|(member, count)| (member.to_string(), *count))
                .collect(),
        };
        self.names.iter().map(entry).collect()
    }
}

fn counters(name: &str, versions: &Versions) -> Vec<Counter> {
    let counter = |(&member, &count): (&MemberKey, &u64)| Counter {
        namespace: name.to_owned(),
        member,
        count,
    };
    versions.0.iter().map(counter).collect()
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
        assert_eq!(
            book.of(NAMESPACE, "a/n"),
            None,
            "neither the old nor the new list is true now"
        );
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
    fn what_was_raised_while_nobody_counted_counts_once_at_the_next_start() {
        let directory = tempfile::tempdir().expect("a directory");
        let first = Generation(1);
        let book = open(directory.path());
        assert!(!book.reconcile("a/n", first, first).expect("nothing to write"));
        assert!(book.reconcile("a/n", Generation(4), first).expect("written"));
        assert_eq!(book.of(NAMESPACE, "a/n"), versions(&[(OWN, 1)]));
        drop(book);
        let book = open(directory.path());
        assert!(!book.reconcile("a/n", Generation(4), first).expect("nothing to write"));
        book.begin(NAMESPACE, Generation(5), Cause::Own);
        book.settle(NAMESPACE, "a/n", Generation(5)).expect("written");
        assert!(!book.reconcile("a/n", Generation(5), first).expect("nothing to write"));
        assert_eq!(book.of(NAMESPACE, "a/n"), versions(&[(OWN, 2)]));
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
        let (a, b) = (
            open(one.path()),
            VersionBook::open(other.path(), OTHER).expect("private"),
        );
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
