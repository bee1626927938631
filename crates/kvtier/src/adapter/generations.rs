use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use kvtier_core::Generation;

/// Salts remembered for one namespace. A mapping may lead many to one.
const SALTS_MAX: usize = 4096;

/// Namespaces remembered. Past it those that nobody purges right now are forgotten, and learnt anew when they are used.
const NAMES_MAX: usize = 65_536;

/// What is known of namespaces' generations.
///
/// `seen` is the newest that the node spoke of. `clean` is the one that LMCache's memory holds nothing older of: a store is
/// taken only under it, for its bytes may come from that memory. Without somebody who purges that memory the two move together.
#[derive(Default)]
pub(super) struct Generations {
    names: HashMap<String, Known>,
    /// Somebody purges LMCache's memory and says so.
    purger: bool,
}

#[derive(Default)]
struct Known {
    seen: Option<Generation>,
    clean: Option<Generation>,
    salts: BTreeSet<Arc<str>>,
}

impl Generations {
    /// This process uses a namespace.
    pub(super) fn enter(&mut self, name: &str, salt: &Arc<str>, generation: Generation) {
        self.observe(name, generation);
        let known = self.names.entry(name.to_owned()).or_default();
        if known.salts.len() < SALTS_MAX {
            known.salts.insert(Arc::clone(salt));
        }
    }

    /// The node spoke of a generation. When a namespace that this process uses was invalidated: its salts.
    pub(super) fn observe(&mut self, name: &str, generation: Generation) -> Option<Vec<Arc<str>>> {
        let purger = self.purger;
        if self.names.len() >= NAMES_MAX && !self.names.contains_key(name) {
            self.names.retain(|_, known| known.clean != known.seen);
        }
        let known = self.names.entry(name.to_owned()).or_default();
        let before = known.seen;
        if before.is_some_and(|before| before >= generation) {
            return None;
        }
        known.seen = Some(generation);
        if !purger || known.clean.is_none() {
            known.clean = Some(generation);
        }
        (before.is_some() && !known.salts.is_empty()).then(|| known.salts.iter().cloned().collect())
    }

    /// From now on nothing is taken as purged until [`Generations::purged`] says so.
    pub(super) fn expect_purger(&mut self) {
        self.purger = true;
    }

    /// LMCache's memory holds nothing older of a namespace.
    pub(super) fn purged(&mut self, name: &str, generation: Generation) {
        let known = self.names.entry(name.to_owned()).or_default();
        if known.clean.is_none_or(|clean| clean < generation) {
            known.clean = Some(generation);
        }
    }

    /// Under which generation a store that begins now may be published; `None`: whichever the node says first.
    pub(super) fn clean(&self, name: &str) -> Option<Generation> {
        self.names.get(name)?.clean
    }

    /// The newest generation heard of.
    pub(super) fn seen(&self, name: &str) -> Option<Generation> {
        self.names.get(name)?.seen
    }

    /// Namespaces that this process uses, and what their memory is clean for.
    pub(super) fn used(&self) -> Vec<(String, Generation)> {
        self.names
            .iter()
            .filter(|(_, known)| !known.salts.is_empty())
            .filter_map(|(name, known)| Some((name.clone(), known.clean?)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalidation_is_told_once_and_only_of_namespaces_in_use() {
        let mut generations = Generations::default();
        assert_eq!(generations.observe("other", Generation(3)), None);
        assert_eq!(generations.observe("other", Generation(4)), None);
        generations.enter("a", &"salt".into(), Generation(1));
        assert_eq!(generations.observe("a", Generation(1)), None);
        assert_eq!(generations.observe("a", Generation(2)), Some(vec!["salt".into()]));
        assert_eq!(generations.observe("a", Generation(2)), None);
        assert_eq!(generations.clean("a"), Some(Generation(2)), "nobody has to purge");
    }

    #[test]
    fn stores_wait_for_the_purge_where_somebody_purges() {
        let mut generations = Generations::default();
        generations.expect_purger();
        generations.enter("a", &"".into(), Generation(1));
        assert_eq!(
            generations.clean("a"),
            Some(Generation(1)),
            "what is first heard of is clean"
        );
        generations.observe("a", Generation(2));
        assert_eq!(
            (generations.clean("a"), generations.seen("a")),
            (Some(Generation(1)), Some(Generation(2)))
        );
        generations.purged("a", Generation(2));
        assert_eq!(generations.clean("a"), Some(Generation(2)));
        assert_eq!(generations.used(), [("a".to_owned(), Generation(2))]);
    }
}
