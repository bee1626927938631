//! What must hold in every world, whatever goes wrong in it.

use std::collections::{BTreeMap, BTreeSet};

use kvtier_core::Generation;

use crate::memory::Tag;

/// A rule that was broken, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding(pub(crate) String);

/// Fine, or what was found.
pub(crate) type Check = Result<(), Finding>;

/// Shorthand for a broken rule.
pub(crate) fn found<T>(text: String) -> Result<T, Finding> {
    Err(Finding(text))
}

/// A block as the world knows it: which namespace of the plan, which realization, which node of the prompt forest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) space: u32,
    pub(crate) realization: u32,
    pub(crate) node: u32,
}

/// One write of one block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written {
    pub(crate) key: Key,
    pub(crate) generation: Generation,
    pub(crate) length: u32,
    pub(crate) published: bool,
    /// The labels that it was put under, one bit each.
    pub(crate) labels: u8,
    /// No request that starts after this step may see it.
    pub(crate) dead_from: u64,
}

/// Every write there was, and which may be seen.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    writes: Vec<Written>,
    /// The write that a key may show now.
    live: BTreeMap<Key, Tag>,
    /// Children whose parent was cached when they were published: it may not go before them.
    linked: BTreeMap<Key, Key>,
    /// Writes that a finished flush made durable and that were not written again since.
    covered: BTreeSet<Tag>,
    /// Writes that were deleted while they were cached, and when.
    deleted: BTreeMap<Tag, u64>,
    /// Writes that were deleted and destroyed, and when that was acknowledged.
    destroyed: BTreeMap<Tag, u64>,
}

/// What part of a namespace is to be deleted for good.
#[derive(Clone, Debug)]
pub(crate) struct Scope {
    pub(crate) space: u32,
    pub(crate) part: Part,
    /// Writes that began up to this one.
    pub(crate) until: Tag,
    /// Writes beyond it that are known to extend what is in it.
    pub(crate) descendants: BTreeSet<Tag>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    Node(u32),
    Realization(u32),
    Label(u8),
}

impl Scope {
    /// Whether it names a block that was put under these labels.
    pub(crate) fn names(&self, key: Key, labels: u8) -> bool {
        key.space == self.space
            && match self.part {
                Part::Node(node) => key.node == node,
                Part::Realization(realization) => key.realization == realization,
                Part::Label(label) => labels & (1 << label) != 0,
            }
    }

    pub(crate) fn covers(&self, tag: Tag, written: &Written) -> bool {
        (tag <= self.until && self.names(written.key, written.labels)) || self.descendants.contains(&tag)
    }
}

impl Ledger {
    /// A client begins to write a block; nobody may see it yet.
    pub(crate) fn begin(&mut self, key: Key, generation: Generation, length: u32) -> Tag {
        self.writes.push(Written {
            key,
            generation,
            length,
            published: false,
            labels: 0,
            dead_from: u64::MAX,
        });
        self.writes.len() as Tag
    }

    pub(crate) fn written(&self, tag: Tag) -> Option<&Written> {
        self.writes.get(usize::try_from(tag).ok()?.checked_sub(1)?)
    }

    fn kill(&mut self, tag: Tag, step: u64) {
        if let Some(written) = usize::try_from(tag).ok().and_then(|tag| self.writes.get_mut(tag - 1)) {
            written.dead_from = written.dead_from.min(step);
        }
    }

    /// A seal published it: it is what the key shows from now on.
    pub(crate) fn publish(&mut self, tag: Tag, step: u64) {
        let written = &mut self.writes[tag as usize - 1];
        written.published = true;
        let key = written.key;
        if let Some(before) = self.live.insert(key, tag) {
            self.kill(before, step);
        }
        // A block published anew was not cached: its children lost it, and whatever linked it before is over.
        self.unlink(key);
    }

    /// The live write of a key was put under these labels too, and its writer was told so.
    pub(crate) fn label(&mut self, key: Key, labels: u8) {
        if let Some(tag) = self.live(key) {
            self.writes[tag as usize - 1].labels |= labels;
        }
    }

    /// Labels of what the key may show now.
    pub(crate) fn labels(&self, key: Key) -> u8 {
        let written = self.live(key).and_then(|tag| self.written(tag));
        written.map_or(0, |written| written.labels)
    }

    /// A client forgot the key: no later request may see what it showed.
    pub(crate) fn forget(&mut self, key: Key, step: u64) {
        if let Some(tag) = self.live.remove(&key) {
            self.kill(tag, step);
        }
        self.unlink(key);
    }

    /// The same, and it was cached: no restart may bring it back once that is durable.
    pub(crate) fn delete(&mut self, key: Key, step: u64) {
        if let Some(tag) = self.live(key) {
            self.deleted.insert(tag, step);
        }
        self.forget(key, step);
    }

    pub(crate) fn is_deleted(&self, tag: Tag) -> bool {
        self.deleted.contains_key(&tag)
    }

    /// The last write that began.
    pub(crate) fn last(&self) -> Tag {
        self.writes.len() as Tag
    }

    /// A scope was deleted and destroyed, and both are acknowledged: no restart may bring anything of it back.
    pub(crate) fn destroy(&mut self, scope: &Scope, step: u64) {
        let covered = (1..)
            .zip(&self.writes)
            .filter(|(tag, written)| scope.covers(*tag, written));
        self.destroyed.extend(covered.map(|(tag, _)| (tag, step)));
    }

    pub(crate) fn is_destroyed(&self, tag: Tag) -> bool {
        self.destroyed.contains_key(&tag)
    }

    /// The devices are as they were at `step`: what was made durable later, deletions of single blocks included, is not.
    pub(crate) fn rewind(&mut self, step: u64) {
        self.deleted.retain(|_, deleted| *deleted <= step);
        self.destroyed.retain(|_, destroyed| *destroyed <= step);
        self.covered.clear();
    }

    /// Keys known to extend one that `is_chosen`, and those that extend them.
    pub(crate) fn descendants(&self, is_chosen: impl Fn(Key) -> bool) -> BTreeSet<Key> {
        let mut found: BTreeSet<Key> = BTreeSet::new();
        loop {
            let more: Vec<Key> = self
                .linked
                .iter()
                .filter(|(child, parent)| !found.contains(child) && (is_chosen(**parent) || found.contains(parent)))
                .map(|(child, _)| *child)
                .collect();
            if more.is_empty() {
                return found;
            }
            found.extend(more);
        }
    }

    /// A finished flush made it durable.
    pub(crate) fn cover(&mut self, tag: Tag) {
        self.covered.insert(tag);
    }

    pub(crate) fn uncover(&mut self, tag: Tag) {
        self.covered.remove(&tag);
    }

    pub(crate) fn is_covered(&self, tag: Tag) -> bool {
        self.covered.contains(&tag)
    }

    /// A restart brought a write back: it is what its key shows from now on.
    pub(crate) fn revive(&mut self, tag: Tag) {
        let written = &mut self.writes[tag as usize - 1];
        written.dead_from = u64::MAX;
        let key = written.key;
        self.deleted.remove(&tag);
        self.live.insert(key, tag);
    }

    /// An invalidation is acknowledged: no later request may see anything older.
    pub(crate) fn invalidate(&mut self, space: u32, generation: Generation, step: u64) {
        let old: Vec<(Key, Tag)> = self
            .live
            .iter()
            .filter(|(key, tag)| {
                key.space == space
                    && self
                        .written(**tag)
                        .is_some_and(|written| written.generation < generation)
            })
            .map(|(key, tag)| (*key, *tag))
            .collect();
        for (key, tag) in old {
            self.live.remove(&key);
            self.kill(tag, step);
        }
        self.linked.retain(|child, _| child.space != space);
    }

    /// Everything is gone.
    pub(crate) fn clear(&mut self, step: u64) {
        for tag in std::mem::take(&mut self.live).into_values() {
            self.kill(tag, step);
        }
        self.linked.clear();
    }

    /// What the key may show now.
    pub(crate) fn live(&self, key: Key) -> Option<Tag> {
        self.live.get(&key).copied()
    }

    /// Whether the key showed anything at `start` or later.
    pub(crate) fn showed_since(&self, key: Key, start: u64) -> bool {
        self.live.contains_key(&key)
            || self
                .writes
                .iter()
                .any(|written| written.key == key && written.published && written.dead_from >= start)
    }

    /// Every key that may show something.
    pub(crate) fn live_keys(&self) -> impl Iterator<Item = (Key, Tag)> + '_ {
        self.live.iter().map(|(key, tag)| (*key, *tag))
    }

    /// `child` was published after a parent that was cached.
    pub(crate) fn link(&mut self, child: Key, parent: Key) {
        self.linked.insert(child, parent);
    }

    /// A parent may be lost for a reason: its children are excused.
    pub(crate) fn unlink(&mut self, key: Key) {
        self.linked.remove(&key);
        self.linked.retain(|_, parent| *parent != key);
    }

    /// Anything may be lost for a reason.
    pub(crate) fn unlink_all(&mut self) {
        self.linked.clear();
    }

    /// Checks what a reader was given for `key`, asked for at `start`.
    pub(crate) fn check_seen(&self, key: Key, content: Option<Tag>, length: u32, start: u64) -> Result<Tag, Finding> {
        let Some(tag) = content else {
            return found(format!(
                "wrong bytes: the lease of {key:?} shows no whole content of any write"
            ));
        };
        let Some(written) = self.written(tag) else {
            return found(format!("wrong bytes: the lease of {key:?} shows unknown content {tag}"));
        };
        if written.key != key {
            return found(format!("wrong bytes: the lease of {key:?} shows {:?}", written.key));
        }
        if !written.published {
            return found(format!(
                "unsealed: the lease of {key:?} shows write {tag}, which no seal published"
            ));
        }
        if written.length != length {
            return found(format!(
                "wrong length: the lease of {key:?} has {length} bytes, written were {}",
                written.length
            ));
        }
        if written.dead_from < start {
            return found(format!(
                "purged: the lease of {key:?}, asked for at step {start}, shows write {tag} of {:?}, dead since step {}",
                written.generation, written.dead_from
            ));
        }
        Ok(tag)
    }

    /// Checks that only live keys are cached and that no linked parent went before its child.
    ///
    /// `hidden`: a tier is out of service, so some of what is cached cannot be listed.
    pub(crate) fn check_present(&mut self, present: &BTreeSet<Key>, hidden: bool) -> Check {
        for key in present {
            if !self.live.contains_key(key) {
                return found(format!(
                    "{key:?} is listed as cached but nothing that may be seen was published for it"
                ));
            }
        }
        if hidden {
            return Ok(());
        }
        self.linked.retain(|child, _| present.contains(child));
        for (child, parent) in &self.linked {
            if !present.contains(parent) {
                return found(format!("{parent:?} was forgotten before its cached child {child:?}"));
            }
        }
        Ok(())
    }
}
