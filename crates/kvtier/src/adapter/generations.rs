use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use kvtier_core::Generation;

/// Salts remembered for one namespace. A mapping may lead many to one.
const SALTS_MAX: usize = 4096;
/// Namespaces noted of which no node has said anything yet.
const UNHEARD_MAX: usize = 4096;
/// What a namespace begins with that was never invalidated.
const FIRST: Generation = Generation(1);
/// Older than any generation: nothing may be stored until LMCache's memory is purged.
const NEVER: Generation = Generation(0);

/// What is known of namespaces' generations. There are as many as the node has namespaces at most, and those that wait to be
/// heard of; none is forgotten, for LMCache's memory may hold something of it.
///
/// `seen` is the newest that the node spoke of. `clean` is the one that LMCache's memory holds nothing older of: a store is
/// taken only under it, for its bytes may come from that memory. Without somebody who purges that memory the two move together.
#[derive(Default)]
pub(super) struct Generations {
    names: HashMap<String, Known>,
    /// Names in there of which no node has said anything yet.
    unheard: usize,
    /// Somebody purges LMCache's memory and says so.
    purger: bool,
    /// The node spoke of a generation before one that it spoke of earlier.
    doubted: bool,
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

    /// LMCache's memory may hold something of a namespace that the node cannot be asked about now. Whether it is
    /// invalidated before the node is heard again nobody will know.
    pub(super) fn note(&mut self, name: &str, salt: &Arc<str>) {
        if !self.names.contains_key(name) {
            if self.unheard >= UNHEARD_MAX {
                return;
            }
            self.unheard += 1;
        }
        let known = self.names.entry(name.to_owned()).or_default();
        if known.salts.len() < SALTS_MAX {
            known.salts.insert(Arc::clone(salt));
        }
    }

    /// Whether this process has used or noted a namespace.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// The node spoke of a generation. When a namespace that this process uses was invalidated, or may have been: its salts.
    pub(super) fn observe(&mut self, name: &str, generation: Generation) -> Option<Vec<Arc<str>>> {
        let purger = self.purger;
        let fresh = !self.names.contains_key(name);
        let known = self.names.entry(name.to_owned()).or_default();
        let before = known.seen;
        if let Some(before) = before
            && before >= generation
        {
            self.doubted |= before > generation;
            return None;
        }
        if before.is_none() && !fresh {
            self.unheard -= 1;
        }
        // One that was noted only was first used at a time that nobody knows.
        let before = before.or((!known.salts.is_empty()).then_some(FIRST));
        let invalidated = before.is_some_and(|before| before < generation) && !known.salts.is_empty();
        known.seen = Some(generation);
        if !purger {
            known.clean = Some(generation);
        } else if known.clean.is_none() {
            known.clean = Some(if invalidated { NEVER } else { generation });
        }
        invalidated.then(|| known.salts.iter().cloned().collect())
    }

    /// Whether the node has to be asked for all generations: it may have lost what it knew.
    pub(super) fn take_doubt(&mut self) -> bool {
        std::mem::take(&mut self.doubted)
    }

    /// The node listed every generation past the first. A namespace that it puts before what was seen was lost with all
    /// its blocks, and invalidations of it since then may have been missed: it counts as invalidated, at the node's generation.
    pub(super) fn rebase(&mut self, listed: &[(String, Generation)]) -> Vec<(String, Generation, Vec<Arc<str>>)> {
        let listed: HashMap<&str, Generation> = listed.iter().map(|(name, at)| (&**name, *at)).collect();
        let mut lost = Vec::new();
        for (name, known) in &mut self.names {
            let now = listed.get(&**name).copied().unwrap_or(FIRST);
            if known.seen.is_some_and(|seen| seen > now) {
                known.seen = Some(now);
                known.clean = Some(if self.purger { NEVER } else { now });
                lost.push((name.clone(), now, known.salts.iter().cloned().collect()));
            }
        }
        lost
    }

    /// From now on nothing is taken as purged until [`Generations::purged`] says so.
    pub(super) fn expect_purger(&mut self) {
        self.purger = true;
    }

    /// LMCache's memory holds nothing older of a namespace.
    pub(super) fn purged(&mut self, name: &str, generation: Generation) {
        let Some(known) = self.names.get_mut(name) else { return };
        // A purge for a generation that the node has lost since says nothing of the present.
        let is_of_this_run = known.seen.is_some_and(|seen| generation <= seen);
        if is_of_this_run && known.clean.is_none_or(|clean| clean < generation) {
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
            .filter_map(|(name, known)| Some((name.clone(), known.clean.filter(|clean| *clean != NEVER)?)))
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

    #[test]
    fn a_node_that_lost_its_generations_is_believed_and_its_namespaces_count_as_invalidated() {
        let mut generations = Generations::default();
        generations.expect_purger();
        generations.enter("a", &"salt".into(), Generation(3));
        generations.enter("b", &"".into(), Generation(2));
        assert!(
            generations
                .rebase(&[("a".into(), Generation(3)), ("b".into(), Generation(2))])
                .is_empty()
        );
        assert_eq!(generations.observe("a", Generation(1)), None);
        assert!(generations.take_doubt());
        assert!(!generations.take_doubt(), "asked once");
        let lost = generations.rebase(&[("b".into(), Generation(2))]);
        assert_eq!(lost, [("a".to_owned(), Generation(1), vec!["salt".into()])]);
        generations.purged("a", Generation(3));
        assert_eq!(
            generations.clean("a"),
            Some(NEVER),
            "that purge was for the node's earlier life"
        );
        assert_eq!(
            generations.used(),
            [("b".to_owned(), Generation(2))],
            "nothing to confirm yet"
        );
        generations.purged("a", Generation(1));
        assert_eq!(generations.clean("a"), Some(Generation(1)));
        assert_eq!(generations.observe("a", Generation(2)), Some(vec!["salt".into()]));
    }

    #[test]
    fn what_was_noted_while_the_node_was_away_counts_as_invalidated_if_the_namespace_ever_was() {
        let mut generations = Generations::default();
        generations.expect_purger();
        for name in ["a", "b"] {
            generations.note(name, &name.into());
        }
        assert_eq!(generations.clean("a"), None);
        assert_eq!(generations.observe("a", FIRST), None);
        assert_eq!(generations.clean("a"), Some(FIRST));
        assert_eq!(generations.observe("b", Generation(4)), Some(vec!["b".into()]));
        assert_eq!(generations.clean("b"), Some(NEVER));
        generations.purged("b", Generation(4));
        assert_eq!(generations.clean("b"), Some(Generation(4)));
        assert_eq!(generations.unheard, 0);
        (0..2 * UNHEARD_MAX).for_each(|name| generations.note(&name.to_string(), &"".into()));
        assert_eq!(generations.names.len(), UNHEARD_MAX + 2);
    }
}
