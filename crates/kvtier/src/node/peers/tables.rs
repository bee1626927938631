//! What the eviction policy learned, handed to members that have learned nothing yet.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use kvtier_core::{LearnedTables, TierManager};

use super::Shared;
use super::message::Message;

/// An image has up to half a megabyte, and nobody waits for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// A run of a member is asked so often at most: one of an older version gives up the connection.
const QUESTIONS_MAX: u32 = 3;

/// A run of a member, by its address and incarnation.
pub(in crate::node) type Run = (String, u64);

impl Shared {
    /// What a member learned, of those that were not asked too often. Its address, and its tables.
    pub(in crate::node) fn learned_elsewhere(&self, asked: &mut HashMap<Run, u32>) -> Option<(String, LearnedTables)> {
        for link in self.links() {
            let Some(peer) = link.live().and_then(|_| link.peer()) else {
                continue;
            };
            let questions = asked.entry((link.address.clone(), peer.incarnation)).or_default();
            if self.is_stopping() || *questions == QUESTIONS_MAX {
                continue;
            }
            *questions += 1;
            let answer = link.ask(&Message::Learned, Instant::now() + PATIENCE);
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
