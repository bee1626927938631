use super::{TierManager, mutant_is};
use crate::index::{NONE, flag};
use crate::{Action, BlockHash, ForgetScope, Labels, NamespaceId, OperationId, Time, TrustDomain};
use std::collections::BTreeSet;

/// Deletions to acknowledge.
#[derive(Debug)]
pub(super) struct Forget {
    operation: OperationId,
    blocks: u64,
    of_any_label: u64,
    /// The sync in flight was asked for after them.
    pub(super) is_covered: bool,
}

impl TierManager {
    /// Deletes part of a namespace and every block known to extend it, for good. Writers of the namespace that began before
    /// are refused: [`crate::Sealed::Stale`]. [`Action::Forgotten`] follows once no restart brings the blocks back. Costs a
    /// look at every block in the index.
    ///
    /// # Panics
    /// Where the namespace was never opened.
    pub fn forget_scope(&mut self, namespace: NamespaceId, scope: &ForgetScope<'_>, now: Time) -> OperationId {
        self.advance(now);
        let operation = self.take_operation_id();
        let domain = self
            .namespaces
            .entry(namespace)
            .expect("a namespace that was opened")
            .domain;
        self.fence_writers(namespace, domain, operation);
        let blocks = self.in_scope(namespace, scope);
        let (mut forgotten, mut of_any_label) = (0, 0);
        let is_label = matches!(scope, ForgetScope::Label(_));
        // Children first, so that no ghost stays behind.
        for block in blocks.into_iter().rev() {
            let entry = self.index.entry(block);
            if entry.is(flag::LIVE) && !entry.is_ghost() {
                of_any_label += u64::from(is_label && self.labels_of(entry) == Labels::Any);
                self.forget_for_good(block);
                forgotten += 1;
            }
        }
        self.forgets.push(Forget {
            operation,
            blocks: forgotten,
            of_any_label,
            is_covered: false,
        });
        match &mut self.nvme {
            Some(nvme) => nvme.attention = true,
            None => self.acknowledge_forgets(|_| true),
        }
        self.pump();
        operation
    }

    /// Refuses those who hold slots, or wait for them, since before `operation`.
    fn fence_writers(&mut self, namespace: NamespaceId, domain: TrustDomain, operation: OperationId) {
        if mutant_is!(self, ForgetWithoutFence) {
            return;
        }
        self.namespaces.at_mut(namespace.0).fence = operation;
        let clients = &self.clients;
        for holding in self.reservations.iter_mut() {
            // A grant may have been written for any namespace of its client's.
            let is_grant = holding.namespace == NONE && clients.at(holding.client).domain == domain;
            holding.fenced |= holding.namespace == namespace.0 || is_grant;
        }
    }

    /// Blocks of a scope and, after each, those that extend it.
    fn in_scope(&self, namespace: NamespaceId, scope: &ForgetScope<'_>) -> Vec<u32> {
        let hashes: BTreeSet<BlockHash> = match scope {
            ForgetScope::Hashes(hashes) => hashes.iter().copied().collect(),
            ForgetScope::Realization(_) | ForgetScope::Label(_) | ForgetScope::Orphans => BTreeSet::new(),
        };
        let mut chosen = Vec::new();
        let mut children = Vec::new();
        for block in 0..self.index.places() {
            let entry = self.index.entry(block);
            if !entry.is(flag::LIVE) || entry.namespace != namespace.0 || !self.is_current(entry) {
                continue;
            }
            if entry.parent != NONE {
                children.push((entry.parent, block));
            }
            let matches = match scope {
                ForgetScope::Realization(realization) => u32::from(entry.realization) == realization.0,
                ForgetScope::Hashes(_) => hashes.contains(&entry.hash),
                ForgetScope::Label(label) => self.labels_of(entry).may_include(*label),
                ForgetScope::Orphans => entry.is(flag::ORPHANED),
            };
            if matches {
                chosen.push(block);
            }
        }
        children.sort_unstable();
        let mut seen: BTreeSet<u32> = chosen.iter().copied().collect();
        let mut next = 0;
        while let Some(&block) = chosen.get(next) {
            next += 1;
            let first = children.partition_point(|&(parent, _)| parent < block);
            let of_block = children[first..].iter().take_while(|&&(parent, _)| parent == block);
            chosen.extend(of_block.map(|&(_, child)| child).filter(|&child| seen.insert(child)));
        }
        chosen
    }

    /// Sees to a sync for deletions that none covers yet.
    pub(super) fn pump_forgets(&mut self) {
        if self.forgets.iter().any(|forget| !forget.is_covered) {
            self.sync();
        }
    }

    pub(super) fn forgets_synced(&mut self, synced: bool) {
        if synced {
            self.acknowledge_forgets(|forget| forget.is_covered);
        }
        for forget in &mut self.forgets {
            forget.is_covered = false;
        }
        self.nvme_mut().attention |= !self.forgets.is_empty();
    }

    fn acknowledge_forgets(&mut self, is_done: impl Fn(&Forget) -> bool) {
        for forget in self.forgets.extract_if(.., |forget| is_done(forget)) {
            self.actions.push_back(Action::Forgotten {
                operation: forget.operation,
                blocks: forget.blocks,
                of_any_label: forget.of_any_label,
            });
        }
    }
}
