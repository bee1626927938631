use super::operation::Operation;
use super::{TierManager, mutant_is};
use crate::namespace_table::backoff;
use crate::{Action, BlockHash, Generation, NamespaceId, OperationId, Refusal, Request, Time};
use std::time::Duration;

/// First pause after a generation could not be recorded.
const RECORD_PAUSE: Duration = Duration::from_millis(10);

impl TierManager {
    /// Forgets blocks; answers for each key whether it was cached. Memory that is leased or in flight is freed later.
    ///
    /// # Errors
    /// `Denied`, `UnknownClient` or `Invalid`.
    pub fn delete(&mut self, request: &Request<'_>, now: Time) -> Result<Vec<bool>, Refusal> {
        self.advance(now);
        self.admit_request(request)?;
        let epoch = self.namespaces.at(request.namespace.0).epoch;
        let mut delete = |hash: &BlockHash| {
            let key = crate::BlockKey {
                namespace: request.namespace,
                realization: request.realization,
                hash: *hash,
            };
            let Some(block) = self.index.find(key, epoch) else {
                return false;
            };
            if self.index.entry(block).is_ghost() {
                return false;
            }
            self.forget_for_good(block);
            true
        };
        let answers = request.hashes.iter().map(&mut delete).collect();
        self.pump();
        Ok(answers)
    }

    /// Raises a namespace's generation: to `target`, or by one. Older blocks are hidden at once; `Invalidated` follows when
    /// that is durable. A target that is not above the present generation changes nothing and is acknowledged all the
    /// same. Blocks left behind are reclaimed in steps.
    ///
    /// # Panics
    /// Where the namespace was never opened, or was invalidated more than 2^32 times in this run.
    pub fn invalidate(&mut self, namespace: NamespaceId, target: Option<Generation>, now: Time) -> OperationId {
        self.advance(now);
        let operation = self.take_operation_id();
        assert!(
            self.namespaces.entry(namespace).is_some(),
            "{namespace:?} was never opened"
        );
        let entry = self.namespaces.at_mut(namespace.0);
        let target = target.unwrap_or(Generation(entry.generation.0 + 1));
        if target > entry.generation {
            entry.generation = target;
            entry.epoch = entry
                .epoch
                .checked_add(1)
                .expect("fewer than 2^32 invalidations in a run");
            self.counters.invalidations += 1;
            self.counters.hidden_blocks += entry.blocks - entry.hidden_blocks;
            entry.hidden_blocks = entry.blocks;
            self.sweep.start(self.index.places());
        }
        self.namespaces.at_mut(namespace.0).awaiting.push((operation, target));
        if mutant_is!(self, AckBeforeRecorded) {
            self.acknowledge(namespace, target);
        }
        self.acknowledge_recorded(namespace);
        self.record(namespace);
        self.pump();
        operation
    }

    /// Has the generation in force recorded, unless it is or is being.
    pub(super) fn record(&mut self, namespace: NamespaceId) {
        let entry = self.namespaces.at(namespace.0);
        if entry.recorded >= entry.generation || entry.recording.is_some() {
            return;
        }
        let generation = entry.generation;
        let operation = self.issue(Operation::Record { namespace, generation });
        self.namespaces.at_mut(namespace.0).recording = Some(operation);
        self.actions.push_back(Action::RecordGeneration {
            operation,
            namespace,
            generation,
        });
    }

    pub(super) fn record_answered(&mut self, namespace: NamespaceId, generation: Generation, recorded: bool) {
        let now = self.now;
        let entry = self.namespaces.at_mut(namespace.0);
        if recorded {
            entry.recording = None;
            entry.recorded = entry.recorded.max(generation);
            entry.record_failures = 0;
            self.acknowledge_recorded(namespace);
            self.record(namespace);
            // Blocks of this generation may be written now.
            self.attend_all();
        } else {
            // `recording` stays set: no second attempt before the pause is over.
            let at = backoff(now, RECORD_PAUSE, entry.record_failures);
            entry.record_failures += 1;
            self.record_retries.insert((at, namespace.0));
            self.attend_all();
        }
    }

    pub(super) fn retry_records(&mut self) {
        while let Some(&(at, namespace)) = self.record_retries.first() {
            if at > self.now {
                return;
            }
            self.record_retries.pop_first();
            self.namespaces.at_mut(namespace).recording = None;
            self.record(NamespaceId(namespace));
        }
    }

    fn acknowledge_recorded(&mut self, namespace: NamespaceId) {
        let recorded = self.namespaces.at(namespace.0).recorded;
        self.acknowledge(namespace, recorded);
    }

    /// Tells who waits for a generation up to `recorded`.
    fn acknowledge(&mut self, namespace: NamespaceId, recorded: Generation) {
        let awaiting = &mut self.namespaces.at_mut(namespace.0).awaiting;
        for (operation, _) in awaiting.extract_if(.., |(_, target)| *target <= recorded) {
            self.actions.push_back(Action::Invalidated {
                operation,
                namespace,
                generation: recorded,
            });
        }
    }
}
