//! What the eviction policy learned, handed to members that have learned nothing yet.

use std::collections::HashSet;
use std::time::Instant;

use kvtier_core::{LearnedTables, TierManager};

use super::Shared;
use super::message::Message;

/// A run of a member, by its address and incarnation.
pub(in crate::node) type Run = (String, u64);

impl Shared {
    /// What a member learned that was not asked before; each run of one is asked once. Its address, and its tables.
    pub(in crate::node) fn learned_elsewhere(&self, asked: &mut HashSet<Run>) -> Option<(String, LearnedTables)> {
        for link in self.links() {
            let Some(peer) = link.live().and_then(|_| link.peer()) else {
                continue;
            };
            if self.is_stopping() || !asked.insert((link.address.clone(), peer.incarnation)) {
                continue;
            }
            let answer = link.ask(&Message::Learned, Instant::now() + self.query_timeout);
            let Ok(Message::Tables(image)) = answer else { continue };
            match LearnedTables::decode(&image) {
                Ok(tables) if !tables.is_empty() => return Some((link.address.clone(), tables)),
                // Empty: it learns nothing, or has not yet.
                Ok(_) => {}
                Err(_) if image.is_empty() => {}
                Err(error) => tracing::debug!(peer = link.address, %error, "a peer's learned tables are of no use"),
            }
        }
        None
    }

    /// What this node learned, for a member; no bytes where its policy learns nothing.
    pub(super) fn tables(&self) -> Vec<u8> {
        let learned = self.driver.look(TierManager::learned);
        learned.map(|tables| tables.encode()).unwrap_or_default()
    }
}
