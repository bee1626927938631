use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use super::member::MemberSet;
use super::{MemberId, Raised, Version};
use crate::Generation;

struct Entry {
    generation: Generation,
    version: Version,
    /// Others who are known to have at least this generation.
    holders: MemberSet,
}

/// Generations that are durable and in force here, and in which order they came to be. A name that was never raised is not in it.
#[derive(Default)]
pub(super) struct NameTable {
    names: BTreeMap<Arc<str>, Entry>,
    /// Each name once, by the version of its last change.
    order: BTreeMap<Version, Arc<str>>,
    version: Version,
}

impl NameTable {
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn version(&self) -> Version {
        self.version
    }

    pub(super) fn generation(&self, name: &str) -> Generation {
        self.names.get(name).map_or(Generation(0), |entry| entry.generation)
    }

    /// How many of these names are new to the table.
    pub(super) fn new_names(&self, raised: &[Raised]) -> usize {
        raised.iter().filter(|(name, _)| !self.names.contains_key(name)).count()
    }

    /// Takes the higher generation; true where that is the new one.
    pub(super) fn raise(&mut self, name: &Arc<str>, generation: Generation) -> bool {
        if generation <= self.generation(name) {
            return false;
        }
        self.put(name, generation);
        true
    }

    /// Takes this generation, whatever there was.
    pub(super) fn put(&mut self, name: &Arc<str>, generation: Generation) {
        self.version.0 += 1;
        let entry = Entry {
            generation,
            version: self.version,
            holders: MemberSet::default(),
        };
        if let Some(before) = self.names.insert(name.clone(), entry) {
            self.order.remove(&before.version);
        }
        self.order.insert(self.version, name.clone());
    }

    /// `member` has this much of the name durable.
    pub(super) fn hold(&mut self, name: &str, generation: Generation, member: MemberId) {
        if let Some(entry) = self.names.get_mut(name)
            && generation >= entry.generation
        {
            entry.holders.add(member);
        }
    }

    /// Whether `member`, who knows the table up to `has`, is known to have the name's generation.
    pub(super) fn is_held(&self, name: &str, member: MemberId, has: Version) -> bool {
        self.names
            .get(name)
            .is_some_and(|entry| entry.version <= has || entry.holders.has(member))
    }

    /// What came after `version`, at most `most` names: how far that goes, and whether it is all.
    pub(super) fn after(&self, version: Version, most: usize) -> (Vec<Raised>, Version, bool) {
        let mut later = self.order.range((Bound::Excluded(version), Bound::Unbounded));
        let mut raised = Vec::new();
        let mut reached = version;
        for (at, name) in later.by_ref().take(most) {
            raised.push((name.clone(), self.generation(name)));
            reached = *at;
        }
        match later.next() {
            Some(_) => (raised, reached, false),
            None => (raised, self.version, true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Arc<str> {
        Arc::from(text)
    }

    #[test]
    fn the_higher_generation_stays() {
        let mut table = NameTable::default();
        assert!(table.raise(&name("a"), Generation(3)));
        assert!(!table.raise(&name("a"), Generation(3)));
        assert!(!table.raise(&name("a"), Generation(2)));
        assert_eq!(table.generation("a"), Generation(3));
        assert_eq!(table.generation("b"), Generation(0));
    }

    #[test]
    fn pieces_of_the_table_add_up_to_all_of_it() {
        let mut table = NameTable::default();
        for (text, generation) in [("a", 1), ("b", 1), ("c", 1), ("a", 2)] {
            table.raise(&name(text), Generation(generation));
        }
        let (first, reached, complete) = table.after(Version(0), 2);
        assert_eq!(first, [(name("b"), Generation(1)), (name("c"), Generation(1))]);
        assert_eq!((reached, complete), (Version(3), false));
        let (second, reached, complete) = table.after(reached, 2);
        assert_eq!(second, [(name("a"), Generation(2))]);
        assert_eq!((reached, complete), (Version(4), true));
        assert_eq!(table.after(reached, 2), (Vec::new(), Version(4), true));
    }

    #[test]
    fn who_held_an_older_generation_is_not_known_to_hold_the_new_one() {
        let mut table = NameTable::default();
        let (member, nothing) = (MemberId(1), Version(0));
        table.raise(&name("a"), Generation(1));
        table.hold("a", Generation(1), member);
        assert!(table.is_held("a", member, nothing));
        table.raise(&name("a"), Generation(2));
        assert!(!table.is_held("a", member, Version(1)));
        table.hold("a", Generation(1), member);
        assert!(!table.is_held("a", member, nothing));
        assert!(table.is_held("a", member, Version(2)));
    }
}
