//! What a recording of requests sees of a connection. Costs nothing where none is made.

use std::sync::Arc;

use kvtier_core::{BlockHash, Hints, NamespaceId, Parent, RealizationId, SealItem, Sealed};

use super::Session;
use crate::node::traffic::{Kind, Sight, Traffic};
use crate::wire::{Keys, Lineage};

type Scope = (NamespaceId, RealizationId);

impl Session {
    fn traffic(&self) -> Option<Arc<Traffic>> {
        let traffic = self.shared.driver.traffic.get();
        traffic.filter(|traffic| traffic.is_recorded()).cloned()
    }

    /// The keys, which are in `self.hashes` too, are looked up or fetched.
    pub(super) fn see_asked(&self, kind: Kind, keys: &Keys<'_>, scope: Scope, hints: Hints) {
        let Some(traffic) = self.traffic() else { return };
        let driver = &self.shared.driver;
        let tokens = driver.look(|manager| manager.tokens_of(scope.0, scope.1, &self.hashes));
        traffic.see(Sight {
            tokens,
            lineage: keys.lineage,
            hashes: self.hashes.clone(),
            prompt_tokens: hints.prompt_tokens,
            ..self.sight(kind, scope)
        });
    }

    /// What is in `self.items` was sealed.
    pub(super) fn see_put(&self, scope: Scope, outcomes: &[Sealed]) {
        let Some(traffic) = self.traffic() else { return };
        let kept = self.items.iter().zip(outcomes);
        let kept = kept.filter(|(_, outcome)| matches!(outcome, Sealed::Published | Sealed::Present));
        let kept: Vec<&SealItem> = kept.map(|(item, _)| item).collect();
        // One message may carry several chains.
        for chain in kept.chunk_by(|before, item| item.parent == Parent::Block(before.hash)) {
            let hashes: Vec<BlockHash> = chain.iter().map(|item| item.hash).collect();
            traffic.see(Sight {
                tokens: chain.iter().map(|item| item.tokens).collect(),
                lineage: Lineage::Chain(chain[0].parent),
                hashes,
                ..self.sight(Kind::Put, scope)
            });
        }
    }

    /// The prompt of the keys in `self.hashes` was answered.
    pub(super) fn see_answered(&self, tokens: u32, scope: Scope) {
        if let Some(traffic) = self.traffic() {
            traffic.see(Sight {
                hashes: self.hashes.clone(),
                ..self.sight(Kind::Answered { tokens }, scope)
            });
        }
    }

    pub(super) fn see_end(&self) {
        if let Some(traffic) = self.traffic() {
            traffic.see(self.sight(Kind::Gone, Scope::default()));
        }
    }

    fn sight(&self, kind: Kind, scope: Scope) -> Sight {
        Sight {
            client: self.client,
            scope,
            kind,
            at: self.shared.driver.clock.now(),
            lineage: Lineage::default(),
            hashes: Vec::new(),
            tokens: Vec::new(),
            prompt_tokens: None,
        }
    }
}
