use super::waiting::{Waiting, WaitingKind};
use super::{TierManager, mutant_is};
use crate::host_table::SlotState;
use crate::index::NONE;
use crate::{
    Answer, BlockHash, BlockKey, FetchScope, Fetched, NamespaceId, RealizationId, Refusal, Request, Tier, Time,
};

impl TierManager {
    /// Where each key is, one answer a key. Touches nothing, holds nothing: the answer may be stale at once.
    ///
    /// # Errors
    /// `Denied`, `UnknownClient` or `Invalid`.
    pub fn lookup(&mut self, request: &Request<'_>, now: Time) -> Result<Vec<Option<Tier>>, Refusal> {
        self.advance(now);
        self.admit_request(request)?;
        let nvme = self.nvme_in_service();
        let tier = |&block: &u32| {
            let entry = (block != NONE).then(|| self.index.entry(block))?;
            if request.hints.device && self.hbm_copy(block).is_some() {
                Some(Tier::Hbm)
            } else if entry.in_host() {
                Some(Tier::Host)
            } else {
                (nvme && entry.on_nvme()).then_some(Tier::Nvme)
            }
        };
        Ok(self.find_all(request).iter().map(tier).collect())
    }

    /// Tokens in each block that is cached, 0 elsewhere.
    #[must_use]
    pub fn tokens_of(&self, namespace: NamespaceId, realization: RealizationId, hashes: &[BlockHash]) -> Vec<u32> {
        let scope = BlockKey {
            namespace,
            realization,
            hash: BlockHash::default(),
        };
        let found = self
            .index
            .find_all(scope, hashes, self.namespaces.at(namespace.0).epoch);
        let tokens = |block: u32| match block {
            NONE => 0,
            block => u32::from(self.index.entry(block).tokens),
        };
        found.into_iter().map(tokens).collect()
    }

    /// Leases blocks where they can be read. Those on NVMe are read first: the answer is `Pending` then, and at the latest
    /// when the deadline passes `FetchDone` carries what is there; bytes that come later stay for the next fetch.
    ///
    /// # Errors
    /// `Denied`, `UnknownClient`, `Invalid`, `Draining`, or `Busy` for a client with too much in quarantine.
    pub fn fetch(
        &mut self,
        request: &Request<'_>,
        scope: FetchScope,
        now: Time,
    ) -> Result<Answer<Vec<Fetched>>, Refusal> {
        self.advance(now);
        let client = self.admit_request(request)?;
        self.may_hold_more(client)?;
        let device = request.hints.device && self.hbm.is_some();
        let mut found = self.find_all(request);
        let mut end = found.len();
        for (position, block) in found.iter_mut().enumerate() {
            let on_device = device && *block != NONE && self.hbm_copy(*block).is_some();
            if *block == NONE || !(on_device || self.is_readable(*block)) {
                *block = NONE;
                self.counters.fetch_misses += 1;
                if scope == FetchScope::Prefix {
                    end = position;
                    break;
                }
            }
        }
        found.truncate(end);
        if let Some(&first) = found.iter().find(|&&block| block != NONE) {
            self.touch_ancestors(first);
        }
        for &block in found.iter().filter(|&&block| block != NONE) {
            self.use_block(block);
        }
        let mut results = vec![Fetched::Miss; request.hashes.len()];
        let mut absent = 0;
        let mut for_device = Vec::new();
        for (result, &block) in results.iter_mut().zip(&found).filter(|(_, block)| **block != NONE) {
            let on_device = self.hbm_copy(block).filter(|_| device);
            if let Some(at) = on_device {
                *result = self.lease_hbm(client, block, at);
            } else if self.index.entry(block).in_host() {
                self.note_prefetch_hit(block);
                *result = self.lease(client, block, Tier::Host);
                if device && matches!(result, Fetched::Leased { .. }) {
                    for_device.push(block);
                }
            } else {
                absent += 1;
            }
        }
        // Copies that this fetch holds by now do not make room for others.
        for block in for_device {
            self.used_from_device(block);
        }
        let last = found.last().copied();
        let ahead_of = last.filter(|_| found.len() == request.hashes.len() && !found.contains(&NONE));
        if absent == 0 {
            if let Some(last) = ahead_of {
                self.prefetch_after(last);
                self.pump();
            }
            return Ok(Answer::Ready(results));
        }
        if !self.may_wait(client) || request.deadline <= self.now {
            for (result, &block) in results.iter_mut().zip(&found) {
                if block != NONE && *result == Fetched::Miss {
                    *result = Fetched::Busy;
                }
            }
            if scope == FetchScope::Prefix {
                self.end_at_first_gap(client, &mut results);
            }
            self.pump();
            return Ok(Answer::Ready(results));
        }
        let operation = self.take_operation_id();
        let undecided: Vec<(u32, u32)> = (0..)
            .zip(&found)
            .zip(&results)
            .filter(|((_, block), result)| **block != NONE && **result == Fetched::Miss)
            .map(|((position, block), _)| (position, *block))
            .collect();
        let waiting = Waiting {
            client,
            client_id: request.client,
            deadline: request.deadline,
            outstanding: absent,
            kind: WaitingKind::Fetch { scope, results },
        };
        self.start_waiting(operation, waiting);
        for (position, block) in undecided {
            self.promote(block, operation, position);
        }
        // Those that somebody waits for have their slots first.
        self.pump();
        if let Some(last) = ahead_of {
            self.prefetch_after(last);
            self.pump();
        }
        Ok(Answer::Pending(operation))
    }

    /// A block that may be read: of the generation in force, and on a tier in service.
    pub(super) fn find(&self, namespace: NamespaceId, realization: RealizationId, hash: BlockHash) -> Option<u32> {
        let key = BlockKey {
            namespace,
            realization,
            hash,
        };
        #[cfg(feature = "mutants")]
        if self.mutant_is(crate::Mutant::SkippedGenerationCheck) {
            return self.index.find_any_epoch(key).filter(|&block| self.is_readable(block));
        }
        let epoch = self.namespaces.at(namespace.0).epoch;
        self.index.find(key, epoch).filter(|&block| self.is_readable(block))
    }

    /// The same for all keys of a request, but whether each may be read is for the caller to see.
    pub(super) fn find_all(&self, request: &Request<'_>) -> Vec<u32> {
        let scope = BlockKey {
            namespace: request.namespace,
            realization: request.realization,
            hash: BlockHash::default(),
        };
        #[cfg(feature = "mutants")]
        if self.mutant_is(crate::Mutant::SkippedGenerationCheck) {
            let find = |hash: &BlockHash| {
                self.index
                    .find_any_epoch(BlockKey { hash: *hash, ..scope })
                    .unwrap_or(NONE)
            };
            return request.hashes.iter().map(find).collect();
        }
        self.index
            .find_all(scope, request.hashes, self.namespaces.at(request.namespace.0).epoch)
    }

    /// A copy lies on a tier in service.
    pub(super) fn is_readable(&self, block: u32) -> bool {
        let entry = self.index.entry(block);
        entry.in_host() || (entry.on_nvme() && self.nvme_in_service())
    }

    /// Last looks before a fetch is answered: what became unreadable meanwhile is a miss, and so is what follows a gap.
    pub(super) fn settle_fetch(&mut self, client: u32, scope: FetchScope, results: &mut [Fetched]) {
        for result in results.iter_mut() {
            let Some((lease, block)) = self.leased_block(result) else {
                continue;
            };
            let careless = mutant_is!(self, SkippedRecheck);
            if careless || (block.is_none() && mutant_is!(self, PromotePublishesBeforeRead)) {
                continue;
            }
            if block.is_none_or(|block| !self.is_current(self.index.entry(block))) {
                self.end_lease(lease);
                *result = Fetched::Miss;
            }
        }
        if scope == FetchScope::Prefix {
            self.end_at_first_gap(client, results);
        }
        // Blocks arrived in any order: once more in that of the prefix.
        for result in &*results {
            if let Some((_, Some(block))) = self.leased_block(result) {
                self.touch(block);
            }
        }
    }

    /// In a prefix nothing after the first gap is of use.
    fn end_at_first_gap(&mut self, _client: u32, results: &mut [Fetched]) {
        let gap = results
            .iter()
            .position(|result| !matches!(result, Fetched::Leased { .. }))
            .unwrap_or(results.len());
        for result in results.iter_mut().skip(gap + 1) {
            if let Fetched::Leased { lease, .. } = result {
                self.end_lease(lease.0);
                *result = Fetched::Miss;
            }
        }
    }

    /// The lease of a result, and the block whose copy it still is.
    fn leased_block(&self, result: &Fetched) -> Option<(u64, Option<u32>)> {
        let Fetched::Leased { lease, .. } = result else {
            return None;
        };
        let holding = self.leases.find(lease.0)?;
        if holding.on_device {
            return Some((lease.0, self.hbm_owner(holding)));
        }
        let slot = self.host.slot(holding.segment, holding.slot);
        Some((lease.0, (slot.state == SlotState::Block).then_some(slot.owner)))
    }
}
